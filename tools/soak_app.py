"""The application of the soak's device: app.py beside main.py.

Publishes and receives at the same time, odd numbers at QoS 1, even ones at QoS 2.  demo.json says what: messages (how
many each way), up and down (the topics), every (numbers between two samples of the heap), fill (text of the payload).

What arrives is counted for each QoS by itself: missing, repeated, late (a number after a higher one, that had been
missing).  On the console "soak: at PUBLISHED RECEIVED" says how far it is, "soak: {...}" is a sample.
"""

import asyncio
import gc
import json

from mqtt_durable.errors import MQTTError
from mqtt_durable.log import INFO

_MISSING = 500  # numbers that are remembered as missing


class Stream:
    """What has come in at one QoS: every second number from first on."""

    def __init__(self, first):
        self.next = first
        self.count = self.repeated = self.late = 0
        self.missing = []

    def take(self, n):
        if n >= self.next:
            self.missing += range(self.next, min(n, self.next + 2 * _MISSING), 2)
            del self.missing[_MISSING:]
            self.next = n + 2
            self.count += 1
        elif n in self.missing:
            self.missing.remove(n)
            self.late += 1
            self.count += 1
        else:
            self.repeated += 1

    def figures(self):
        return self.count, self.missing, self.repeated, self.late


class Soak:
    def __init__(self, client, demo):
        self.client = client
        self.demo = demo
        self.streams = {1: Stream(1), 2: Stream(2)}
        self.strange = 0

    def handle(self, message):
        text = message.payload[:7]
        n = int(text) if text.isdigit() else 0
        if n < 1 or message.qos != 2 - n % 2 or message.payload != payload_of(n, self.demo["fill"]):
            self.strange += 1
        else:
            self.streams[message.qos].take(n)

    @property
    def received(self):
        return self.streams[1].count + self.streams[2].count

    def sample(self):
        """Tell the heap's use, and all that there is to tell."""
        gc.collect()
        figures = {
            "heap_bytes": gc.mem_alloc(),
            "published": self.client.mark or 0,
            "received": self.received,
            "strange": self.strange,
            "qos1": self.streams[1].figures(),
            "qos2": self.streams[2].figures(),
            "stats": self.client.stats(),
        }
        print("soak: " + json.dumps(figures))

    async def watch(self):
        """Tell how far it is, and give a sample for each so many numbers, sent and received together."""
        every = self.demo["every"]
        done = told = 0
        while True:
            await asyncio.sleep_ms(20)
            published = self.client.mark or 0
            at = published + self.received
            if at > told:
                told = at
                print("soak: at %d %d" % (published, self.received))
            if at // every > done:
                done = at // every
                self.sample()


def payload_of(n, fill):
    return ("%07d " % n + fill)[: 48 + n % 17].encode()


async def main(client, config):
    """Publish all, receive all, wait until the broker has all, then idle."""
    with open("demo.json") as f:
        demo = json.load(f)
    for n in range(32):  # what is bounded is to be full from the start, so that it does not look like growth
        client.log.add(INFO, "%03d " % n + "." * 96)
    soak = Soak(client, demo)
    client.on(demo["down"], soak.handle)
    while True:
        try:
            await client.subscribe(demo["down"], 2)
            break
        except (MQTTError, OSError):
            await asyncio.sleep_ms(100)
    print("demo: begins at %d" % ((client.mark or 0) + 1))
    watch = asyncio.create_task(soak.watch())
    for n in range((client.mark or 0) + 1, demo["messages"] + 1):
        await client.publish(demo["up"], payload_of(n, demo["fill"]), qos=2 - n % 2, mark=n)
    while soak.received < demo["messages"]:
        await asyncio.sleep_ms(20)
    await client.drain()
    watch.cancel()
    soak.sample()
    print("demo: done")
    while True:
        await asyncio.sleep_ms(1000)
