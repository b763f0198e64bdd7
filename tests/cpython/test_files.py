"""Files larger than the device's heap, both ways, between the client on MicroPython and a real mosquitto.

The device's heap is a quarter of a file: if a payload were ever whole in it, or its garbage not collected, the device
would die of MemoryError.  The far side is paho-mqtt.
"""

import contextlib
import queue
import random

import paho.mqtt.client as paho
from brokers import Mosquitto
from packet_types import PUBACK, PUBCOMP, PUBLISH
from proxy import DOWN, UP, Proxy
from upydevice import PATIENCE_S, UpyDevice

HEAP = "512k"  # of 64-bit objects, and the library is compiled in it; half of what is received and sent
SIZE = 1 << 20
CONTENT = random.Random(4).randbytes(SIZE)

# play(client), in front of it, is the test's own part.
DEVICE = """
import asyncio, gc, json
import host
host.install()
from mqtt_durable import Client, config

async def main():
    with open("device.json") as file:
        settings = json.load(file)
    client = Client(config.complete(settings["config"]), backoff_ms=(20, 200))
    async with client:
        await play(client)

asyncio.run(main())
"""

RECEIVES = """
import os

def handle(message):
    os.rename(message.path, "%s.received" % message.topic.split("/")[1])
    print("got", message.size)

async def play(client):
    client.on_file("in/big", "big", handle, 1 << 21)
    client.on_file("in/small", "small", handle, 100000)
    client.on("#", lambda message: print("end", client.stats()["too_large"], client.stats()["connections"]))
    await client.subscribe("in/#", 2)
    gc.collect()
    before = gc.mem_alloc()
    print("ready")
    while client.received < EXPECTED:
        await asyncio.sleep_ms(5)
    gc.collect()
    print("grown", gc.mem_alloc() - before)
    while True:
        await asyncio.sleep_ms(5)
"""

SENDS = """
from mqtt_durable import files  # or it would be counted below

async def play(client):
    for qos in (0, 1):
        while not client.connected:
            await asyncio.sleep_ms(1)
        gc.collect()
        before = gc.mem_alloc()
        print("sent", qos, await client.publish_file("out", "file", qos=qos))
        gc.collect()
        print("grown", gc.mem_alloc() - before)
    print("connections", client.connections)
"""


class Device(UpyDevice):
    """The client on MicroPython with a heap of HEAP, its files in directory."""

    def __init__(self, directory, port, play):
        configuration = {
            "wifi": None,
            "broker": {"host": "127.0.0.1", "port": port},
            "client_id": "p7",
            "journal": {"home": "file:journal.bin"},
        }
        super().__init__(directory, play + DEVICE, {"config": configuration}, HEAP)


@contextlib.contextmanager
def far_side(port, topic="none"):
    """A paho client; yields it and the queue of the messages it gets."""
    arrived, ready = queue.Queue(), queue.Queue()
    client = paho.Client(paho.CallbackAPIVersion.VERSION2, "far")
    client.on_message = lambda _client, _userdata, message: arrived.put(message)
    client.on_subscribe = lambda *_: ready.put(True)
    client.connect("127.0.0.1", port)
    client.loop_start()
    try:
        client.subscribe(topic, 2)
        ready.get(timeout=PATIENCE_S)
        yield client, arrived
    finally:
        client.disconnect()
        client.loop_stop()


def test_payload_larger_than_the_heap_is_received_into_a_file(tmp_path):
    play = RECEIVES.replace("EXPECTED", "4")
    with Mosquitto() as broker, far_side(broker.port) as (far, _), Device(tmp_path, broker.port, play) as device:
        device.line("ready")
        for qos in (0, 1, 2):
            far.publish("in/big", CONTENT, qos).wait_for_publish(PATIENCE_S)
            assert device.line("got") == str(SIZE)
            assert (tmp_path / "big.received").read_bytes() == CONTENT
        far.publish("in/end", b"", 1).wait_for_publish(PATIENCE_S)
        assert device.line("end") == "0 1"
        assert int(device.line("grown")) < 4096
        assert not list(tmp_path.glob("*.part"))


def test_payload_over_every_limit_is_refused_before_anything_is_allocated_for_it(tmp_path):
    play = RECEIVES.replace("EXPECTED", "1")
    with Mosquitto() as broker, far_side(broker.port) as (far, _), Device(tmp_path, broker.port, play) as device:
        device.line("ready")
        for topic in ("in/small", "in/memory"):
            for qos in (0, 1, 2):
                far.publish(topic, CONTENT, qos).wait_for_publish(PATIENCE_S)
        far.publish("in/end", b"", 2).wait_for_publish(PATIENCE_S)
        assert device.line("end") == "6 1"
        assert int(device.line("grown")) < 4096
        assert not list(tmp_path.glob("small*"))


def test_payload_larger_than_the_heap_comes_again_when_the_link_is_cut(tmp_path):
    play = RECEIVES.replace("EXPECTED", "1000")
    with Mosquitto() as broker, Proxy(broker.port) as link, far_side(broker.port) as (far, _):
        with Device(tmp_path, link.port, play) as device:
            device.line("ready")
            for qos, answer in ((1, PUBACK), (2, PUBCOMP)):
                for n, nbytes in enumerate((5000, SIZE - 1, SIZE // 2)):
                    cut = link.cut_after(DOWN, nbytes)
                    far.publish("in/big", CONTENT, qos).wait_for_publish(PATIENCE_S)
                    assert device.line("got") == str(SIZE) and cut.fired
                    # Or the next cut, a reset, takes an answer with it that the broker has not read.
                    link.wait(lambda counts: counts[UP, answer] > n)  # noqa: B023
                    (tmp_path / "big.received").rename(tmp_path / "read")
                    assert (tmp_path / "read").read_bytes() == CONTENT
            far.publish("in/end", b"", 1).wait_for_publish(PATIENCE_S)
            # Each once: after the cuts none was left to be handled again.
            assert device.line("end") == "0 7" and device.lines.count("got %d" % SIZE) == 6


def test_file_larger_than_the_heap_is_sent(tmp_path):
    (tmp_path / "file").write_bytes(CONTENT)
    with Mosquitto() as broker, far_side(broker.port, "out") as (_, arrived):
        with Device(tmp_path, broker.port, SENDS) as device:
            for qos in (0, 1):
                message = arrived.get(timeout=PATIENCE_S)
                assert (message.qos, message.payload == CONTENT) == (qos, True)
                assert device.line("sent") == "%d True" % qos
                assert int(device.line("grown")) < 4096
            assert device.line("connections") == "1"
            assert arrived.empty()


def test_file_larger_than_the_heap_is_sent_again_when_the_link_is_cut(tmp_path):
    (tmp_path / "file").write_bytes(CONTENT)
    for name, order in (
        ("beginning", lambda link: link.cut_after(UP, SIZE + 5000)),
        ("end", lambda link: link.cut_after(UP, SIZE + SIZE)),
        ("packet", lambda link: link.cut_at_packet(UP, PUBLISH, 2, "after")),
        ("answer", lambda link: link.cut_at_packet(DOWN, PUBACK, 1, "before")),
    ):
        with Mosquitto() as broker, Proxy(broker.port) as link, far_side(broker.port, "out") as (_, arrived):
            cut = order(link)
            with Device(tmp_path, link.port, SENDS) as device:
                assert device.line("sent 0") == "True" and device.line("sent 1") == "True" and cut.fired
                # What the broker has had whole and not acknowledged in time is sent again: at least once.
                for _ in range(3 if name in ("packet", "answer") else 2):
                    assert arrived.get(timeout=PATIENCE_S).payload == CONTENT, name
            (tmp_path / "journal.bin").unlink()
