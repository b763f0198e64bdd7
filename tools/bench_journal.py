"""What the journal costs: flash, instructions, heap; beside it what files on littlefs cost for the same.

    bench_journal.py [PART ...]        flash littlefs cpu heap, default all

The library runs compiled by mpy-cross -O3, as deployed.  Prints a table and writes build/bench_journal.json.

flash, littlefs: counts of a Nor (norsim.py) under the MicroPython unix port.  Messages have 24 bytes of topic and 48 of
payload; 16 are in flight.
cpu: instructions, counted by valgrind: two runs of different length differ by what is asked, start-up cancels.  They
are told in turns of an empty for loop in a function.  What the block device takes, which is RAM here and written in
Python, is taken off; on a board the port's own comes instead.
heap: the WebAssembly port, whose objects have 32 bits as on a board.

A figure above its bar is marked.  Exit status 1 if something could not be measured, after all else was.
"""

import json
import os
import shutil
import sys
from functools import partial

from bench_common import (
    BUILD,
    CALLGRIND,
    ROOT,
    Bar,
    Missing,
    collected,
    compile_library,
    heap_32_bit,
    measure,
    micropython,
    need,
    progress,
    run,
)

WORK = BUILD / "bench-journal"
SCRIPT = ROOT / "tools" / "bench_journal_upy.py"
SCRIPTS = SCRIPT, ROOT / "tools" / "ram.py"
RESULTS = BUILD / "bench_journal.json"

TURN_US = 3.1  # on Pico W firmware 1.28 at 125 MHz, emulated (picow_journal.py); 4.6 at module level
MESSAGES = 10000
FILE_MESSAGES = 1000
LAP = 700  # messages after which a ring of 64 KiB has gone round
FIRST = 4, 14  # acknowledgements that all stay lazy
LIVES = 32
KEPT = 12  # of their images
MIB = 1 << 20

# Most a figure may be.
BARS = {
    ("flash", "QoS 1, unit 4"): {"bytes": 64, "page programs": 1.45, "erases": 0.016, "wear": 1},
    ("flash", "QoS 1, unit 256"): {"erases": 0.075, "wear": 1},
    ("cpu", "QoS 1, unit 4"): {"turns": 170},
    ("cpu", "QoS 1, unit 256"): {"turns": 170},
    ("heap", "Journal, mounted, 64 KiB"): {"bytes": 1536},
    # Beside garbage that stray bytes in a buffer keep alive, because they look like pointers.
    ("heap", "10,000 waiting, not 32"): {"bytes": 512},
}
MOUNT_BARS = {"orderly": 3600, "after a cut": 10850}

TITLES = {
    "turn": "a turn of an empty loop",
    "flash": "flash, per message; wear: most less fewest erases of a sector",
    "littlefs": "files on littlefs, per message",
    "cpu": "publish, send, acknowledge, per message; in turns of an empty loop",
    "mount": "mount; in turns of an empty loop, worst: of the image that takes longest",
    "heap": "heap, 32 bit",
}

# What a step adds to what is alive, and what it returns.
HEAP_STEPS = (
    ("nothing", "pass"),
    ("code: errors, journal", "import mqtt_durable.errors, mqtt_durable.journal"),
    ("code: store, session, packet", "import mqtt_durable.store"),
    ("bench", "import bench_journal_upy; heap = bench_journal_upy.Heap()"),
    ("Journal", "heap.make_journal()"),
    ("Store", "heap.make_store()"),
    ("mounted", "heap.mount()"),
    ("in flight", "heap.messages(200)"),
    ("allocated", "result = heap.messages(200)"),
    ("large", "heap.make_large()"),
    ("10 waiting", "heap.wait(10)"),
    ("32 waiting", "heap.wait(32)"),
    ("10,000 waiting", "heap.wait(10000)"),
    ("rebooted", "heap.reboot()"),
)

class Unix:
    """The MicroPython unix port and the jobs of bench_journal_upy.py."""

    def __init__(self):
        self._env = dict(os.environ, MICROPYPATH=str(WORK / "lib"), PYTHONHASHSEED="0")
        self._start = [micropython(), "-X", "heapsize=128m", str(SCRIPT)]

    def result(self, *job):
        """The JSON that a job prints."""
        return json.loads(run(self._start + [str(a) for a in job], job[0], self._env))

    def instructions(self, *job):
        """How many a job takes, start-up and all."""
        return collected(run(CALLGRIND + self._start + [str(a) for a in job], " ".join(str(a) for a in job), self._env))

    def slope(self, few, many, *job):
        """Instructions per item, of a job whose last argument is how many."""
        return (self.instructions(*job, many) - self.instructions(*job, few)) / (many - few)


def costs(found):
    """Columns of the table from what a job counted on its Nor."""
    columns = {
        "bytes": found["programmed_bytes"],
        "page programs": found["page_programs"],
        "erases": found["erases"],
    }
    if "wear" in found:
        columns["wear"] = found["wear"]
    return columns


def flash(unix):
    rows = {}
    plans = [(qos, unit, 0, 0) for qos in (1, 2) for unit in (4, 16, 256)]
    plans += [(1, 4, 7, 0), (1, 256, 7, 0), (1, 4, 0, 1), (1, 256, 0, 1)]
    for qos, unit, topics, alone in plans:
        name = "QoS %d, unit %d%s%s" % (
            qos,
            unit,
            ", eight topics in turn" if topics else "",
            ", one at a time, idle after each" if alone else "",
        )
        progress("flash: " + name)
        rows[name] = costs(unix.result("flash", qos, unit, MESSAGES, topics, alone))
    return {"flash": rows}


def littlefs(unix):
    rows = {}
    for scheme in ("append", "json", "file each"):
        for prog_size in (256, 32):
            name = "%s, prog %d" % (scheme, prog_size)
            progress("littlefs: " + name)
            rows[name] = costs(unix.result("littlefs", scheme, prog_size, FILE_MESSAGES))
    return {"littlefs": rows}


class Cpu:
    """Instructions, told in turns."""

    def __init__(self, unix):
        self._unix = unix
        progress("cpu: a turn of the loop, calls of the device")
        self.turn = unix.slope(1000, 21000, "turns")
        self.module_turn = unix.slope(1000, 21000, "module_turns")
        self._device = [
            unix.slope(200, 2200, "device", what) / self.turn - 1 for what in ("readblocks", "writeblocks", "ioctl")
        ]

    def columns(self, instructions, calls):
        """calls: reads, programs, erases."""
        turns = instructions / self.turn
        device = sum(n * cost for n, cost in zip(calls, self._device))
        return {"turns": turns - device, "device's": device, "ms": (turns - device) * TURN_US / 1000}

    def messages(self):
        unix = self._unix
        rows = {}
        for qos, unit in ((1, 4), (1, 16), (1, 256), (2, 4), (2, 256)):
            name = "QoS %d, unit %d" % (qos, unit)
            progress("cpu: " + name)
            found = unix.result("flash", qos, unit, 2 * LAP, 0, 0)
            calls = found["reads"], found["programs"], found["erases"]
            rows[name] = self.columns(unix.slope(LAP, 3 * LAP, "messages", qos, unit), calls)
        progress("cpu: one step alone")
        steps = ("publish", "send", "acknowledge")
        few, many = ([unix.instructions("first", step, n) for step in steps] for n in FIRST)
        spent = [(b - a) / (FIRST[1] - FIRST[0]) for a, b in zip(few, many)]
        whole = rows["QoS 1, unit 4"]
        calls = (0, 1, 0), (1, 0, 0), (0, 0, 0)
        rest = dict(whole)
        for i, step in enumerate(steps):
            row = rows["  of it " + step] = self.columns(spent[i] - (spent[i - 1] if i else 0), calls[i])
            rest = {key: rest[key] - row[key] for key in rest}
        rows["  of it changes of sector, all else"] = rest
        return rows

    def mounts(self):
        unix = self._unix
        rows = {}
        plans = [(name, 4) for name in sorted(unix.result("scenarios"))] + [("16 in flight", 256), ("full ring", 256)]
        for scenario, unit in plans:
            for how in MOUNT_BARS:
                name = "%s, %s, unit %d" % (scenario, how, unit)
                progress("mount: " + name)
                prefix = WORK / "image"
                found = unix.result("images", scenario, unit, int(how == "orderly"), LIVES, KEPT, prefix)
                run_ = [unix.instructions("mount", unit, found["size"], prefix, KEPT, n) for n in (0, 1, KEPT)]
                calls = found["calls"]
                mean = self.columns((run_[2] - run_[0]) / KEPT, [sum(c) / KEPT for c in zip(*calls)])
                worst = self.columns(run_[1] - run_[0], calls[0])
                rows[name] = dict(mean, worst=worst["turns"], **{"worst ms": worst["ms"], "reads": calls[0][0]})
        return rows


def cpu(unix):
    need("valgrind", "valgrind")
    counted = Cpu(unix)
    turn = {"instructions": {"in a function": counted.turn, "of a module": counted.module_turn}}
    return {"turn": turn, "cpu": counted.messages(), "mount": counted.mounts()}


def heap(names):
    progress("heap")
    files = {name.as_posix(): WORK / "lib" / name for name in names}
    files.update((path.name, path) for path in SCRIPTS)
    found = heap_32_bit(WORK / "heap.mjs", files, [step for _, step in HEAP_STEPS])
    alive = {name: row[0] for (name, _), row in zip(HEAP_STEPS, found)}
    grown = {}
    for (before, _), (name, _) in zip(HEAP_STEPS, HEAP_STEPS[1:]):
        grown[name] = alive[name] - alive[before]
    result = dict(zip(alive, (row[1] for row in found)))
    figures = {
        "Journal, mounted, 64 KiB": grown["Journal"] + grown["mounted"],
        "Store": grown["Store"],
        "16 in flight": grown["in flight"],
        "10,000 waiting, not 32": grown["10,000 waiting"],
        "more after a reboot": grown["rebooted"],
        "allocated per message, QoS 1": result["allocated"] / 200,
        "code: errors, journal": grown["code: errors, journal"],
        "code: store, session, packet": grown["code: store, session, packet"],
    }
    return {"heap": {name: {"bytes": figure} for name, figure in figures.items()}}


def bars_of(part, name):
    """Most the figures of a row may be, by column."""
    most = BARS.get((part, name), {})
    for how, turns in MOUNT_BARS.items():
        if part == "mount" and how in name:
            most = {"turns": turns, "worst": turns}
    return {column: Bar(limit) for column, limit in most.items()}


def main(parts):
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    names = compile_library(WORK)
    unix = Unix()
    plans = {
        "flash": partial(flash, unix),
        "littlefs": partial(littlefs, unix),
        "cpu": partial(cpu, unix),
        "heap": partial(heap, names),
    }
    return measure(plans, parts, RESULTS, bars_of, TITLES)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except Missing as e:
        sys.exit("bench: %s" % e)
