"""umqtt.robust

Needs umqtt/simple.py, umqtt/robust.py.  It connects again by itself.
"""

import with_umqtt
from work import HOST, TOPIC, numbered


class Entry(with_umqtt.Entry):
    def make(self, port):
        from umqtt.robust import MQTTClient

        return MQTTClient(b"bench", HOST, port)

    def numbers(self, qos, last):
        for n in range(1, last + 1):
            self.client.publish(TOPIC, numbered(n), False, qos)
