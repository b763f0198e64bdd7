"""umqtt.simple

Needs umqtt/simple.py.  In trouble its program connects again and publishes the same message again.
"""

import time

from work import HOST, PAYLOAD, TOPIC, numbered


class Entry:
    clean = True

    def __init__(self, port, home, in_flight):
        self.got = 0
        self.client = self.make(port)
        self.client.set_callback(self.came)

    def make(self, port):
        from umqtt.simple import MQTTClient

        return MQTTClient(b"bench", HOST, port)

    def came(self, topic, payload):
        self.got += 1

    def connect(self):
        self.client.connect(self.clean)

    def publish(self, qos, n):
        client = self.client
        for _ in range(n):
            client.publish(TOPIC, PAYLOAD, False, qos)

    def subscribe(self, qos):
        self.client.subscribe(TOPIC, qos)

    def receive(self, n):
        client = self.client
        while self.got < n:
            client.wait_msg()

    def numbers(self, qos, last):
        for n in range(1, last + 1):
            while True:
                try:
                    self.client.publish(TOPIC, numbered(n), False, qos)
                    break
                except OSError:
                    self.again()

    def again(self):
        while True:
            try:
                self.connect()
                return
            except OSError:
                time.sleep_ms(100)

    def close(self):
        self.client.disconnect()
