"""mqtt_as

Needs mqtt_as/__init__.py.  Its publish() waits for the acknowledgement, so 16 tasks publish; numbered messages, one
after the other, by one.
"""

import asyncio

from work import HOST, IN_FLIGHT, PAYLOAD, TOPIC, numbered


class Entry:
    def __init__(self, port, home, in_flight):
        import network

        network.default[:] = ("up",)
        from mqtt_as import MQTTClient, config

        config["client_id"] = b"bench"
        config["server"] = HOST
        config["port"] = port
        config["ssid"] = config["wifi_pw"] = "bench"
        config["subs_cb"] = self.came
        self.got = 0
        self.client = MQTTClient(config)

    def came(self, topic, payload, retained):
        self.got += 1

    def connect(self):
        asyncio.run(self._connect())

    async def _connect(self):
        await self.client.connect(quick=True)

    def publish(self, qos, n):
        asyncio.run(self._publish(qos, n))

    async def _publish(self, qos, n):
        if not qos:
            await self._some(qos, n)
            return
        await asyncio.gather(*[self._some(qos, (n + i) // IN_FLIGHT) for i in range(IN_FLIGHT)])

    async def _some(self, qos, n):
        for _ in range(n):
            await self.client.publish(TOPIC, PAYLOAD, False, qos)

    def subscribe(self, qos):
        asyncio.run(self.client.subscribe(TOPIC, qos))

    def receive(self, n):
        asyncio.run(self._receive(n))

    async def _receive(self, n):
        while self.got < n:
            await asyncio.sleep_ms(1)

    def numbers(self, qos, last):
        asyncio.run(self._numbers(qos, last))

    async def _numbers(self, qos, last):
        for n in range(1, last + 1):
            await self.client.publish(TOPIC, numbered(n), False, qos)

    def close(self):
        asyncio.run(self.client.disconnect())
