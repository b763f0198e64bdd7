"""The application of the emulated Pico W: app.py beside main.py.

Publishes numbered readings, odd ones at QoS 1, even ones at QoS 2, each number stored as the mark of its own message.
demo.json says what: messages (how many), topic, fill (text of the payload), ahead (readings before the connection is
waited for), pause_ms.  The console tells each reading when it is accepted, with the microseconds that publish() took
while there was a connection: bringing the radio up stops the whole program for a second.
"""

import asyncio
import gc
import json
import time


async def main(client, config):
    """Publish the readings that are still missing, wait until the broker has them all, then idle."""
    with open("demo.json") as f:
        demo = json.load(f)
    n = client.mark or 0
    gc.collect()
    print("picow: free %d" % gc.mem_free())
    print("demo: begins at %d" % (n + 1))
    ahead = n + demo["ahead"]
    while n < demo["messages"]:
        while n >= ahead and not client.connected:
            await asyncio.sleep_ms(20)
        n += 1
        payload = ("%07d " % n + demo["fill"])[: 48 + n % 17]
        connected = client.connected
        began = time.ticks_us()
        await client.publish(demo["topic"], payload, qos=2 - n % 2, mark=n)
        took_us = time.ticks_diff(time.ticks_us(), began)
        print("demo: published", n, took_us if connected else "")
        await asyncio.sleep_ms(demo["pause_ms"])
    await client.drain()
    gc.collect()
    print("picow: free %d" % gc.mem_free())
    print("demo: done")
    while True:
        await asyncio.sleep_ms(1000)
