"""umqtt.simple, TCP_NODELAY

Needs umqtt/simple.py.
"""

import with_umqtt

_IPPROTO_TCP = 6
_TCP_NODELAY = 1


class Entry(with_umqtt.Entry):
    def connect(self):
        super().connect()
        self.client.sock.setsockopt(_IPPROTO_TCP, _TCP_NODELAY, 1)
