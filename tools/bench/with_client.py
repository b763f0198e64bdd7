"""mqtt_durable.Client

The journal on, in RAM in place of flash, where no other home is said.
"""

import asyncio

from work import HOST, PAYLOAD, TOPIC, numbered


class Entry:
    version = 4

    def __init__(self, port, home, in_flight):
        from mqtt_durable.client import Client

        device = None
        if home == "ram":
            from ram import Ram

            device = Ram(65536)
        self.got = 0
        self.wanted = 1 << 30
        self.enough = asyncio.Event()
        self.client = Client(
            {
                "client_id": "bench",
                "broker": {
                    "host": HOST,
                    "port": port,
                    "keep_alive_s": 60,
                    "username": None,
                    "password": None,
                    "version": self.version,
                },
                "session": {"clean": False, "in_flight": in_flight},
                "journal": {"home": home, "size_kib": 64, "when_full": "wait"},
            },
            device=device,
            backoff_ms=(100, 1000),
        )
        self.client.on(str(TOPIC, "utf-8"), self.came)

    def came(self, message):
        self.got += 1
        if self.got >= self.wanted:
            self.enough.set()

    def connect(self):
        asyncio.run(self._connect())

    async def _connect(self):
        await self.client.start()
        while not self.client.connected:
            await asyncio.sleep_ms(1)

    def publish(self, qos, n):
        asyncio.run(self._publish(qos, n))

    async def _publish(self, qos, n):
        client = self.client
        for _ in range(n):
            await client.publish(TOPIC, PAYLOAD, qos)
        if qos:
            await client.drain()
        while not client.idle:
            await asyncio.sleep_ms(0)

    def subscribe(self, qos):
        asyncio.run(self.client.subscribe(TOPIC, qos))

    def receive(self, n):
        asyncio.run(self._receive(n))

    async def _receive(self, n):
        self.wanted = n
        if self.got < n:
            self.enough.clear()
            await self.enough.wait()

    def numbers(self, qos, last):
        asyncio.run(self._numbers(qos, last))

    async def _numbers(self, qos, last):
        client = self.client
        for n in range((client.mark or 0) + 1, last + 1):
            await client.publish(TOPIC, numbered(n), qos, mark=n)
        await client.drain()

    def close(self):
        asyncio.run(self.client.close())
