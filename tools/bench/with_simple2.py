"""umqtt.simple2, TCP_NODELAY

Needs umqtt/simple2.py, umqtt/errno.py.  Its publish() does not wait: the program keeps 16 unacknowledged, and in
trouble connects again and sends what publish() has raised for.
"""

import time

import with_umqtt
from work import HOST, IN_FLIGHT, PAYLOAD, TOPIC, numbered

_IPPROTO_TCP = 6
_TCP_NODELAY = 1


class Entry(with_umqtt.Entry):
    def make(self, port):
        from umqtt.simple2 import MQTTClient

        return MQTTClient(b"bench", HOST, port)

    def came(self, topic, payload, retained, dup):
        self.got += 1

    def connect(self):
        super().connect()
        self.client.sock.setsockopt(_IPPROTO_TCP, _TCP_NODELAY, 1)

    def publish(self, qos, n):
        client = self.client
        waiting = client.rcv_pids
        for _ in range(n):
            client.publish(TOPIC, PAYLOAD, False, qos)
            while len(waiting) >= IN_FLIGHT:
                client.check_msg()
        while waiting:
            client.check_msg()

    def subscribe(self, qos):
        super().subscribe(qos)
        while self.client.rcv_pids:
            self.client.check_msg()

    def receive(self, n):
        while self.got < n:
            self.client.check_msg()

    def numbers(self, qos, last):
        client = self.client
        waiting = client.rcv_pids
        for n in range(1, last + 1):
            self.until(lambda n=n: client.publish(TOPIC, numbered(n), False, qos) or True)
            self.until(lambda: client.check_msg() or len(waiting) < IN_FLIGHT)
        self.until(lambda: client.check_msg() or not waiting)

    def until(self, step):
        from umqtt.simple2 import MQTTException

        while True:
            try:
                if step():
                    return
            except (OSError, MQTTException):
                self.again()

    def again(self):
        from umqtt.simple2 import MQTTException

        while True:
            try:
                self.connect()
                return
            except (OSError, MQTTException):
                time.sleep_ms(100)
