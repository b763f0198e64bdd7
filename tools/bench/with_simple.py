"""mqtt_durable.simple

The journal on, in RAM in place of flash, where no other home is said.
"""

import time

import with_umqtt
from work import HOST, PAYLOAD, TOPIC, numbered


class Entry(with_umqtt.Entry):
    clean = False
    version = 4

    def __init__(self, port, home, in_flight):
        from mqtt_durable.simple import MQTTClient

        device = None
        if home == "ram":
            from ram import Ram

            device = Ram(65536)
        self.got = 0
        more = {"home": home, "device": device, "in_flight": in_flight, "version": self.version}
        self.client = MQTTClient("bench", HOST, port, **more)
        self.client.set_callback(self.came)

    def publish(self, qos, n):
        client = self.client
        for _ in range(n):
            client.publish(TOPIC, PAYLOAD, False, qos)

    def numbers(self, qos, last):
        client = self.client
        for n in range((client.mark or 0) + 1, last + 1):
            client.publish(TOPIC, numbered(n), False, qos, mark=n)
        while client.store.waiting():  # what was accepted while the link was down
            try:
                client.check_msg()
                time.sleep_ms(10)
            except OSError:
                self.again()
