"""The application of the demo's device: app.py beside main.py.

It numbers its readings by the mark that is stored in each message's own record, so after any power cut it goes on
exactly where the journal ends, without a counter of its own.  demo.json says what to publish: messages (how many),
topic, qos, pause_ms (mean time between two readings), burst (most readings at once), fill (text of the payload).
"""

import asyncio
import json
from random import randint

import demo_board


async def main(client, config):
    """Publish the readings that are still missing, wait until the broker has them all, then idle."""
    with open("demo.json") as f:
        demo = json.load(f)
    demo_board.arm(client)
    n = client.mark or 0
    print("demo: begins at %d" % (n + 1))
    while n < demo["messages"]:
        # Bursts fill the in-flight window, however fast the link is.
        burst = min(randint(1, demo["burst"]), demo["messages"] - n)
        for _ in range(burst):
            n += 1
            payload = ("%07d " % n + demo["fill"])[: 48 + n % 17]
            await client.publish(demo["topic"], payload, qos=demo["qos"], mark=n)
            print("demo: published %d" % n)
        await asyncio.sleep_ms(demo["pause_ms"] * burst)
    await client.drain()
    print("demo: done")
    while True:
        await asyncio.sleep_ms(1000)
