"""paho-mqtt on CPython

A yardstick: another interpreter, so there are no figures of its instructions and its heap.
"""

import threading

from work import HOST, PAYLOAD, TOPIC, numbered


class Entry:
    def __init__(self, port, home, in_flight):
        import paho.mqtt.client as mqtt

        self.got = 0
        self.port = port
        self.news = threading.Condition()
        self.left = 0
        self.up = threading.Event()
        self.subscribed = threading.Event()
        self.client = client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, client_id="bench", clean_session=False)
        client.max_inflight_messages_set(in_flight)
        client.reconnect_delay_set(0.1, 1)
        client.on_message = self.came
        client.on_publish = self.published
        client.on_connect = lambda *_: self.up.set()
        client.on_subscribe = lambda *_: self.subscribed.set()

    def came(self, client, data, message):
        with self.news:
            self.got += 1
            self.news.notify()

    def published(self, *_):
        with self.news:
            self.left -= 1
            self.news.notify()

    def connect(self):
        self.client.connect(HOST, self.port)
        self.client.loop_start()
        self.up.wait()

    def send(self, qos, payloads):
        topic = TOPIC.decode()
        with self.news:
            self.left += len(payloads)
        for payload in payloads:
            self.client.publish(topic, payload, qos)
        with self.news:
            self.news.wait_for(lambda: not self.left)

    def publish(self, qos, n):
        self.send(qos, [PAYLOAD] * n)

    def subscribe(self, qos):
        self.client.subscribe(TOPIC.decode(), qos)
        self.subscribed.wait()

    def receive(self, n):
        with self.news:
            self.news.wait_for(lambda: self.got >= n)

    def numbers(self, qos, last):
        self.send(qos, [numbered(n) for n in range(1, last + 1)])

    def close(self):
        self.client.disconnect()
        self.client.loop_stop()
