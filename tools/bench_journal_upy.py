"""One measurement of tools/bench_journal.py, run by MicroPython: bench_journal_upy.py JOB [ARGUMENTS]

Prints its result as one line of JSON.  The library is found through MICROPYPATH, compiled as on a board.  The jobs for
valgrind print nothing: the caller runs each with two lengths, and the difference in instructions is the result.  They
never collect garbage, whose price depends on the size of the heap.
"""

import gc
import json
import os
import sys
import time

from mqtt_durable.errors import JournalFull
import mqtt_durable.mount  # noqa: F401
import mqtt_durable.replay  # noqa: F401 - or mounting would be measured with the loading of its code
from mqtt_durable.journal import Journal
from mqtt_durable.packet import PUBACK, PUBCOMP, PUBREC
from mqtt_durable.store import Store
from ram import Ram

TOPICS = [b"plant/%d/greenhouse/tempC" % i for i in range(8)]  # 24 bytes each
TOPIC = TOPICS[7]
PAYLOAD = b'{"t":21.50,"h":55.1,"n":1234567,"at":1790000000}'  # 48 bytes
IN_FLIGHT = 16
RING = 65536
LARGE = 1 << 20
BACKLOG = 10000
SUBSCRIPTIONS = 10
IDENTITY = 1
SEND = memoryview(bytearray(768))  # as large as the one of the client


class FileDevice:
    """A block device outside the heap, where no byte on it can look like a pointer."""

    def __init__(self, path, size):
        self._size = size
        with open(path, "wb") as f:
            for _ in range(size >> 12):
                f.write(b"\xff" * 4096)
        self._file = open(path, "r+b")

    def readblocks(self, n, buf, off=0):
        self._file.seek((n << 12) + off)
        self._file.readinto(buf)

    def writeblocks(self, n, buf, off=0):
        self._file.seek((n << 12) + off)
        self._file.write(buf)

    def ioctl(self, op, arg):
        if op == 4:
            return self._size >> 12
        if op == 5:
            return 4096
        if op == 6:
            self.writeblocks(arg, b"\xff" * 4096)
        return 0


# -- a session


def start(device, unit, in_flight=IN_FLIGHT, present=False):
    """A mounted and connected store on all of the device."""
    store = Store(Journal(device, unit, None), in_flight=in_flight)
    store.open()
    store.connected(present, IDENTITY)
    return store


def exchange(store, qos, n, topics=0):
    """n messages; the oldest is acknowledged when 16 are in flight.  On a new journal, where identifiers count up.

    topics: they have one topic (0) or eight in turn (7).
    """
    publish = store.publish
    fill = store.fill
    on_ack = store.on_ack
    for i in range(n):
        packet_id = publish(TOPICS[i & topics], PAYLOAD, qos)
        fill(SEND, 0)
        if packet_id >= IN_FLIGHT:
            packet_id -= IN_FLIGHT - 1
            if qos == 1:
                on_ack(PUBACK, packet_id)
            else:
                on_ack(PUBREC, packet_id)
                fill(SEND, 0)
                on_ack(PUBCOMP, packet_id)


class Broker:
    """Acknowledges what is really sent, so also what is sent again after a mount."""

    def __init__(self):
        self.waiting = []

    def take(self, store):
        """Send what is to be sent."""
        off = 0
        end = store.fill(SEND, 0)
        while off < end:
            n = SEND[off + 1]
            at = off + 2
            if n > 127:
                n = n & 127 | SEND[at] << 7
                at += 1
            if SEND[off] >> 4 == 3:
                i = at + 2 + (SEND[at] << 8 | SEND[at + 1])
                packet_id = SEND[i] << 8 | SEND[i + 1]
                if packet_id not in self.waiting:
                    self.waiting.append(packet_id)
            off = at + n
            if off == end:
                off = 0
                end = store.fill(SEND, 0)

    def acknowledge(self, store, leave):
        """Acknowledge the oldest until only so many are in flight."""
        while len(self.waiting) > leave:
            store.on_ack(PUBACK, self.waiting.pop(0))
            self.take(store)

    def step(self, store, leave=IN_FLIGHT - 1):
        """One message more."""
        store.publish(TOPIC, PAYLOAD, 1)
        self.take(store)
        self.acknowledge(store, leave)


# -- flash


def flash(qos, unit, n, topics, alone):
    """Costs of n messages on a 64 KiB ring.  alone: one at a time, and everything is recorded when it is idle."""
    from norsim import Nor

    nor = Nor(RING, prog_size=unit)
    store = start(nor, unit)
    broker = Broker()

    def run(n):
        if not alone:
            exchange(store, qos, n, topics)
            return
        for _ in range(n):
            broker.step(store, 0)
            store.commit()

    run(1000)
    before = nor.stats()
    run(n)
    print(json.dumps(_costs(before, nor.stats(), n)))


def _costs(before, after, n):
    costs = {}
    for key in ("programmed_bytes", "page_programs", "programs", "reads"):
        costs[key] = (after[key] - before[key]) / n
    costs["erases"] = (sum(after["erases"]) - sum(before["erases"])) / n
    costs["wear"] = max(after["erases"]) - min(after["erases"])
    return costs


class AppendFile:
    """Records appended and flushed one by one; rewritten with what is live at 32 KiB."""

    def __init__(self):
        self.live = {}
        self.file = open("/lfs/queue", "ab")

    def put(self, n):
        self.live[n] = b"P%8d" % n + TOPIC + PAYLOAD
        self._add(self.live[n])

    def done(self, n):
        del self.live[n]
        self._add(b"A%8d" % n)

    def _add(self, record):
        self.file.write(record)
        self.file.flush()
        if self.file.tell() > 32768:
            self.file.close()
            with open("/lfs/queue.new", "wb") as f:
                for n in sorted(self.live):
                    f.write(self.live[n])
            os.rename("/lfs/queue.new", "/lfs/queue")
            self.file = open("/lfs/queue", "ab")


class JsonFile:
    """All that is live, written anew at every change."""

    def __init__(self):
        self.live = []

    def put(self, n):
        self.live.append({"id": n, "topic": str(TOPIC, "utf-8"), "payload": str(PAYLOAD, "utf-8")})
        self._save()

    def done(self, n):
        self.live = [message for message in self.live if message["id"] != n]
        self._save()

    def _save(self):
        with open("/lfs/outbox.json", "w") as f:
            json.dump(self.live, f)


class FileEach:
    """A file per message."""

    def put(self, n):
        with open("/lfs/%d" % n, "wb") as f:
            f.write(TOPIC)
            f.write(PAYLOAD)

    def done(self, n):
        os.remove("/lfs/%d" % n)


def littlefs(scheme, prog_size, n):
    """Costs of the same n messages in files, on the file system of a stock Pico W (256) or ESP32 (32)."""
    import vfs
    from norsim import Nor

    nor = Nor((212 if prog_size == 256 else 512) * 4096, prog_size=prog_size)
    vfs.VfsLfs2.mkfs(nor, progsize=prog_size)
    vfs.mount(vfs.VfsLfs2(nor, progsize=prog_size), "/lfs")
    queue = {"append": AppendFile, "json": JsonFile, "file each": FileEach}[scheme]()
    before = None
    for i in range(n // 4 + n):
        if i == n // 4:
            before = nor.stats()
        queue.put(i)
        if i >= IN_FLIGHT - 1:
            queue.done(i - IN_FLIGHT + 1)
    costs = _costs(before, nor.stats(), n)
    del costs["wear"]  # the run is short against the 100 erases between two moves of a block
    print(json.dumps(costs))


# -- instructions


def turns(n):
    for i in range(n):  # noqa: B007
        pass


def messages(qos, unit, n):
    exchange(start(Ram(RING), unit), qos, n)


def first(last, n):
    """n messages on a new ring, fewer than one sector holds, as far as the step last: publish, send, acknowledge."""
    store = start(Ram(RING), 4, in_flight=64)
    for _ in range(n):
        store.publish(TOPIC, PAYLOAD, 1)
    if last != "publish":
        while store.fill(SEND, 0):
            pass
    if last == "acknowledge":
        for packet_id in range(1, n + 1):
            store.on_ack(PUBACK, packet_id)


def device(what, n):
    """The device's own part: n calls of one kind, as the journal makes them."""
    ram = Ram(RING)
    buf = memoryview(bytearray(128))
    if what == "readblocks":
        for _ in range(n):
            ram.readblocks(3, buf, 512)
    elif what == "writeblocks":
        for _ in range(n):
            ram.writeblocks(3, buf, 512)
    else:
        for _ in range(n):
            ram.ioctl(6, 3)


class Scenario:
    """size: of the ring.  begin(store, broker): what comes before the first image.  leave: in flight afterwards."""

    def __init__(self, begin, size=RING, leave=IN_FLIGHT - 1):
        self.begin = begin
        self.size = size
        self.leave = leave


def _steady(store, broker):
    for _ in range(1500):
        broker.step(store)


def _full(store, broker):
    try:
        while True:
            store.publish(TOPIC, PAYLOAD, 1)
            broker.take(store)
    except JournalFull:
        pass


def _backlog(store, broker):
    _steady(store, broker)
    try:
        while store.waiting() < BACKLOG:
            store.publish(TOPIC, PAYLOAD, 1)
            broker.take(store)
    except JournalFull:
        pass


def _subscribed(store, broker):
    for i in range(SUBSCRIPTIONS):
        store.subscribed("plant/7/greenhouse/%d/#" % i, 1, 1)
    _steady(store, broker)


def _drained(store, broker):
    for _ in range(1500):
        broker.step(store, 0)


SCENARIOS = {
    "empty": Scenario(lambda store, broker: None, leave=0),
    "16 in flight": Scenario(_steady),
    "full ring": Scenario(_full),
    "10,000 waiting": Scenario(_backlog, LARGE),
    "10 subscriptions": Scenario(_subscribed),
    "drained": Scenario(_drained, leave=0),
}


def scenarios():
    """Print the size of the ring by scenario."""
    print(json.dumps({name: plan.size for name, plan in SCENARIOS.items()}))


def images(scenario, unit, orderly, lives, keep, prefix):
    """Write keep images of a ring as mounts find them, the one that costs most first; print what they need.

    The device lives so many lives of a few messages each: an orderly one ends with close(), the others with a cut in
    some program or erase.  What is kept are the images that take longest and shortest to mount here, and as many in
    between; what they take on a board, or in instructions, is measured later.
    """
    from norsim import MODES_ERASE, MODES_PROGRAM, Nor, PowerCut

    plan = SCENARIOS[scenario]
    nor = Nor(plan.size, prog_size=unit)
    broker = Broker()
    store = start(nor, unit)
    plan.begin(store, broker)
    rows = []
    ram = Ram(plan.size)
    for life in range(lives):
        if life or not orderly:
            if not orderly:
                nor.cut_after(1 + life * 5 % 47, MODES_PROGRAM[life % 5], MODES_ERASE[life % 4], seed=life)
            try:
                for _ in range(3 if orderly else 200):
                    try:
                        broker.step(store, plan.leave)
                    except JournalFull:
                        broker.acknowledge(store, max(0, len(broker.waiting) - 1))
            except PowerCut:
                nor.power_on()
        if orderly:
            store.close()
        name = "%s-%d.life" % (prefix, life)
        with open(name, "wb") as f:
            f.write(nor.mem)
        took = min([_time_of_mount(ram, unit, name) for _ in range(3)])
        before = nor.stats()
        store = Store(Journal(nor, unit, None), in_flight=IN_FLIGHT)
        store.open()
        after = nor.stats()
        rows.append(
            (
                took,
                life,
                after["reads"] - before["reads"],
                after["programs"] - before["programs"],
                sum(after["erases"]) - sum(before["erases"]),
            )
        )
        broker.waiting.clear()
        store.connected(True, IDENTITY)
        broker.take(store)
        gc.collect()
    rows.sort()
    rows.reverse()
    kept = [rows[i * (lives - 1) // (keep - 1)] for i in range(keep)]
    for i, row in enumerate(kept):
        os.rename("%s-%d.life" % (prefix, row[1]), "%s-%d.img" % (prefix, i))
    for row in rows:
        if row not in kept:
            os.remove("%s-%d.life" % (prefix, row[1]))
    print(json.dumps({"size": plan.size, "calls": [row[2:] for row in kept]}))


def _time_of_mount(ram, unit, image):
    with open(image, "rb") as f:
        f.readinto(ram.mem)
    gc.collect()
    store = Store(Journal(ram, unit, None), in_flight=IN_FLIGHT)
    begin = time.ticks_us()
    store.open()
    return time.ticks_diff(time.ticks_us(), begin)


def mount(unit, size, prefix, count, mounted):
    """Load count images and mount the first so many of them."""
    ram = Ram(size)
    for i in range(count):
        with open("%s-%d.img" % (prefix, i), "rb") as f:
            f.readinto(ram.mem)
        if i < mounted:
            Store(Journal(ram, unit, None), in_flight=IN_FLIGHT).open()


# -- heap: called from outside one by one, with a collection in between


class Heap:
    """What is alive between two figures."""

    def __init__(self):
        self.device = FileDevice("/small", RING)

    def make_journal(self):
        self.journal = Journal(self.device, 4, RING)

    def make_store(self):
        self.store = Store(self.journal, in_flight=IN_FLIGHT)

    def mount(self):
        self.store.open()
        self.store.connected(False, IDENTITY)

    def messages(self, n):
        """Return the bytes allocated for n messages and their acknowledgements, freed or not."""
        gc.disable()
        before = gc.mem_alloc()
        exchange(self.store, 1, n)
        return gc.mem_alloc() - before

    def make_large(self):
        self.store = self.journal = self.device = None
        self.device = FileDevice("/large", LARGE)
        self.store = start(self.device, 4)

    def wait(self, n):
        """Let n messages wait."""
        while self.store.waiting() < n:
            self.store.publish(TOPIC, PAYLOAD, 1)
            self.store.fill(SEND, 0)
        SEND[:] = bytes(len(SEND))

    def reboot(self):
        self.store = start(self.device, 4, present=True)
        self.store.fill(SEND, 0)


def main(job, arguments):
    values = [int(a) if a.isdigit() else a for a in arguments]
    if job in ("turns", "messages", "first", "device", "mount"):
        gc.disable()
    globals()[job](*values)


if __name__ == "__main__":
    if sys.argv[1] == "module_turns":
        gc.disable()
        for i in range(int(sys.argv[2])):  # noqa: B007
            pass
    else:
        main(sys.argv[1], sys.argv[2:])
