"""MiniMQTT

Needs adafruit_minimqtt/adafruit_minimqtt.py, adafruit_minimqtt/matcher.py.  In trouble its program calls reconnect()
and publishes the same message again.
"""

import sys
import time

from work import HOST, PAYLOAD, TOPIC, numbered


class Socket:
    """What a CircuitPython socket has and MicroPython's has not."""

    def __init__(self, host, port):
        import socket

        self._socket = socket.socket()
        self._socket.connect(socket.getaddrinfo(host, port)[0][-1])
        self._socket.settimeout(1)
        self.send = self._socket.send
        self.close = self._socket.close

    def recv_into(self, buf, size):
        n = self._socket.readinto(buf, size)
        if n is None:
            raise OSError(110)
        if not n:
            raise OSError(104)
        return n


class Manager:
    """adafruit_connection_manager."""

    def get_connection_manager(self, pool):
        return self

    def get_socket(self, host, port, **options):
        return Socket(host, port)

    def close_socket(self, socket):
        socket.close()


class Entry:
    def __init__(self, port, home, in_flight):
        sys.modules["adafruit_connection_manager"] = Manager()
        sys.modules["adafruit_ticks"] = time
        from adafruit_minimqtt.adafruit_minimqtt import MQTT

        self.client = MQTT(broker=HOST, port=port, client_id="bench", use_binary_mode=True)
        self.client.on_message = self.came
        self.topic = str(TOPIC, "utf-8")
        self.got = 0

    def came(self, client, topic, payload):
        self.got += 1

    def connect(self):
        self.client.connect()

    def publish(self, qos, n):
        client = self.client
        topic = self.topic
        for _ in range(n):
            client.publish(topic, PAYLOAD, False, qos)

    def subscribe(self, qos):
        self.client.subscribe(self.topic, qos)

    def receive(self, n):
        # Its loop() takes as long as its timeout, whatever comes.
        client = self.client
        while self.got < n:
            client._wait_for_msg()

    def numbers(self, qos, last):
        from adafruit_minimqtt.adafruit_minimqtt import MMQTTException

        for n in range(1, last + 1):
            while True:
                try:
                    self.client.publish(self.topic, numbered(n), False, qos)
                    break
                except (OSError, MMQTTException):
                    self.again()

    def again(self):
        from adafruit_minimqtt.adafruit_minimqtt import MMQTTException

        while True:
            try:
                self.client.reconnect()
                return
            except (OSError, MMQTTException):
                time.sleep_ms(100)

    def close(self):
        self.client.disconnect()
