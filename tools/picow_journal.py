"""The journal on real Pico W firmware in an emulator: FIRMWARE=image.uf2 python picow_journal.py

Needs a MicroPython 1.23 or newer for the Pico W; the emulator is tools/emulator.py's.  Prints times of one message and
of mounts, as the board's own clock tells them at 125 MHz, and heap figures.
The emulator counts instructions: no misses of the flash cache, and no time for a page program (0.4 ms) or a sector
erase (45 ms), so a board takes longer.  4: program unit 4 by way of flash/pages.py; pinned: the same in files, with
their guard before each program; 256: rp2.Flash itself.
"""

import asyncio
import json
import os
import sys
from pathlib import Path

import emulator
from bench_common import Missing, compile_library, progress
from bench_journal import KEPT, LIVES, SCRIPTS, WORK, Unix
from littlefs import LittleFS

BLOCKS = 212  # of a Pico W's file system
SECTORS = 16
BARS_MS = {"message": 0.94, "orderly": 20, "after a cut": 60}

PREPARE = """
import gc, time
def alive():
    gc.collect()
    return gc.mem_alloc()
now = time.ticks_us
diff = time.ticks_diff
def device(home):
    if home == "pinned":
        from mqtt_durable.flash import open_home
        return open_home(home, %(sectors)d * 4096)[0]
    import rp2
    if home == 256:
        return rp2.Flash(start=%(first)d * 4096, len=%(sectors)d * 4096)
    from mqtt_durable.flash.pages import Pages
    return Pages(rp2.Flash(), %(first)d, %(sectors)d)
"""

TURNS = """
def turns(n):
    begin = now()
    for i in range(n):
        pass
    return diff(now(), begin)
print((turns(11000) - turns(1000)) / 10000)
"""

HEAP = """
heap = [alive()]
import mqtt_durable.errors, mqtt_durable.journal
heap.append(alive())
import mqtt_durable.store
heap.append(alive())
import bench_journal_upy as b
dev = device(4)
alive()
heap.append(alive())
journal = b.Journal(dev, 4, None)
heap.append(alive())
store = b.Store(journal, in_flight=16)
heap.append(alive())
store.open()
store.connected(False, 1)
heap.append(alive())
print([y - x for x, y in zip(heap, heap[1:])])
"""

# Times of the three steps: middle, mean, longest.
MESSAGES = """
import bench_journal_upy as b
store = b.start(device(%(home)r), %(unit)d)
times = [[], [], []]
allocated = 0
gc.disable()
for i in range(%(warm_up)d + %(n)d):
    if gc.mem_free() < 40000:
        gc.collect()
    before = gc.mem_alloc()
    t0 = now()
    packet_id = store.publish(b.TOPIC, b.PAYLOAD, 1)
    t1 = now()
    store.fill(b.SEND, 0)
    t2 = now()
    if packet_id >= 16:
        store.on_ack(b.PUBACK, packet_id - 15)
    t3 = now()
    if i >= %(warm_up)d:
        allocated += gc.mem_alloc() - before
        for step, t in zip(times, (diff(t1, t0), diff(t2, t1), diff(t3, t2))):
            step.append(t)
for step in times:
    step.sort()
print([[step[len(step) // 2], sum(step) / len(step), step[-1]] for step in times], allocated / %(n)d)
"""

MOUNT = """
import bench_journal_upy as b
store = b.Store(b.Journal(device(%(unit)d), %(unit)d, None), in_flight=16)
gc.collect()
t0 = now()
store.open()
print(diff(now(), t0))
"""


def file_system(names):
    """An image of the board's file system with the compiled library, and a block from which on so many are free."""
    fs = LittleFS(block_size=4096, block_count=BLOCKS, prog_size=256)
    for name, path in [(n.as_posix(), WORK / "lib" / n) for n in names] + [(path.name, path) for path in SCRIPTS]:
        fs.makedirs(("/lib/" + name).rpartition("/")[0], exist_ok=True)
        with fs.open("/lib/" + name, "wb") as f:
            f.write(path.read_bytes())
    image = bytes(fs.context.buffer)
    for first in range(BLOCKS - SECTORS):
        if not image[first * 4096 : (first + SECTORS) * 4096].strip(b"\xff"):
            return image, first
    raise Missing("littlefs leaves no room for the journal")


class Board:
    """The firmware in the emulator."""

    def __init__(self, firmware, names):
        self._firmware = firmware
        self._image, self._first = file_system(names)

    def run(self, code, journal=b"\xff" * SECTORS * 4096):
        """Boot with this journal, run code; return what it printed."""
        at = self._first * 4096
        image = self._image[:at] + journal + self._image[at + len(journal) :]
        prepare = PREPARE % {"first": self._first, "sectors": SECTORS}
        return asyncio.run(self._run(prepare + code, image))

    async def _run(self, code, image):
        device = emulator.make_device(self._firmware)
        device.mcu.flash[emulator.FLASH - len(image) : emulator.FLASH] = image
        async with device:
            out, err = await device.aexec(code, timeout=1200)
        if err or not out:
            raise Missing("on the board: " + (err.decode().strip().splitlines() or ["no answer"])[-1])
        return out.decode().strip()


def main(firmware):
    names = compile_library(WORK)
    board = Board(firmware, names)
    unix = Unix()
    print("empty loop: %s us a turn" % board.run(TURNS))
    kinds = "code: errors, journal", "code: store, session, packet", "", "Journal", "Store", "mounted"
    for kind, figure in zip(kinds, json.loads(board.run(HEAP))):
        if kind:
            print("heap: %-30s %6d bytes" % (kind, figure))
    print("\nus per message     publish      send  acknowledge   publish + acknowledge   longest of each       bytes")
    print("                middle  mean  middle  mean        middle   middle    mean                      allocated")
    for home, unit, n in ((4, 4, 130), ("pinned", 4, 130), (256, 256, 60)):  # some sectors full
        progress("messages, home %s" % home)
        out = board.run(MESSAGES % {"home": home, "unit": unit, "warm_up": 20, "n": n})
        (publish, send, acknowledge), allocated = json.loads("[" + out.replace("]] ", "]], ") + "]")
        both = [a + b for a, b in zip(publish, acknowledge)]
        line = "%-14s %7d %5d %7d %5d %13d" % (home, *publish[:2], *send[:2], acknowledge[0])
        for us in both[:2]:
            line += "%8d%s" % (us, "!" if us > BARS_MS["message"] * 1000 else " ")
        longest = [step[2] for step in (publish, send, acknowledge)]
        print("%s %-22s %8d" % (line, longest, allocated))
    print("\nms to mount                              middle    worst   (of images by their time on the unix port)")
    for scenario, size in sorted(unix.result("scenarios").items()):
        if size != SECTORS * 4096:
            continue
        for unit in (4, 256):
            for how in ("orderly", "after a cut"):
                name = "%s, %s, unit %d" % (scenario, how, unit)
                progress("mount: " + name)
                prefix = WORK / "image"
                unix.result("images", scenario, unit, int(how == "orderly"), LIVES, KEPT, prefix)
                line = "%-38s" % name
                for i in (KEPT // 2, 0):
                    ms = int(board.run(MOUNT % {"unit": unit}, Path("%s-%d.img" % (prefix, i)).read_bytes())) / 1000
                    line += "%8.1f%s" % (ms, "!" if ms > BARS_MS[how] else " ")
                print(line)


if __name__ == "__main__":
    if "FIRMWARE" not in os.environ:
        sys.exit("picow_journal: FIRMWARE=path names an .uf2 of MicroPython for the Pico W")
    try:
        main(os.environ["FIRMWARE"])
    except Missing as e:
        sys.exit("picow_journal: %s" % e)
