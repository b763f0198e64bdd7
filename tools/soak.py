"""The promise, tried for long: one device that stays on, messages both ways at once, a bad link, and its heap watched.

    soak.py [--messages N] [--seed S] [--version 5]

The device is the demo's (demo.py): the real boot.py and main.py on the MicroPython unix port, its journal in simulated
NOR flash in a file, a real mosquitto behind a proxy.  It publishes N messages and is sent N messages at the same time,
half of them at QoS 1, half at QoS 2.  Meanwhile the link is cut at packets and bytes, reset, ended, refused, slowed,
chopped into small pieces, left half open, and the broker restarted.  The far side counts what it gets; the device
counts what it gets, and tells the use of its heap after gc.collect() each time.

The heap is flat if its least use in the last tenth of the run is at most FLAT_BYTES above that in the first tenth: the
least, because messages on their way are in it too.  The seed fixes which faults come in which order; when exactly they
strike depends on the machine.  Exit status 1 if a message was lost, came in a wrong order for its QoS, or (QoS 2)
twice, but for what the broker itself sends anew (see Repeats), if the heap has grown, or the device did not finish or
printed a traceback; the logs are kept then.
"""

import argparse
import collections
import contextlib
import json
import queue
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

import demo
import norsim
import paho.mqtt.client as mqtt
import proxy as px
from brokers import BrokerError, Mosquitto, find_mosquitto
from packet_types import CONNACK, CONNECT, PUBACK, PUBCOMP, PUBLISH, PUBREC, PUBREL
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

MESSAGES = 100000
PER_FAULT = 1000  # messages each way for one fault
FLAT_BYTES = 4096
UP = "soak/up"
DOWN = "soak/down"

_SAMPLES = 400
_WINDOW = 100  # messages of the far side that its broker has not confirmed
_AHEAD = 100  # messages for the device that are under way, at most

_FAULTS = ("packet", "reset", "packet", "byte", "slow", "packet", "end", "packet", "away", "byte", "pieces", "broker")
# At which packets the link is cut.
_CUT_AT = (
    (px.UP, CONNECT),
    (px.DOWN, CONNACK),
    (px.UP, PUBLISH),
    (px.DOWN, PUBLISH),
    (px.UP, PUBACK),
    (px.DOWN, PUBACK),
    (px.UP, PUBREC),
    (px.DOWN, PUBREC),
    (px.UP, PUBREL),
    (px.DOWN, PUBREL),
    (px.UP, PUBCOMP),
    (px.DOWN, PUBCOMP),
)

_HALF_OPEN_IN = 30  # one fault in so many: the device needs 10 s and more to notice


class Repeats:
    """Counts what a broker sends again although it must not: a QoS 2 PUBLISH behind its PUBREL [MQTT-4.3.3-1].

    mosquitto 2.0 does after a restart; whoever gets it must take it for a new message, so these are no fault of ours.
    """

    def __init__(self):
        self.count = 0
        self._released = set()

    def on_packet(self, direction, packet):
        """To be called with every packet between the broker and one receiver."""
        if direction != px.DOWN:
            return
        if packet[0] >> 4 == PUBREL:
            self._released.add(bytes(packet[2:4]))
        elif packet[0] >> 4 == PUBLISH and packet[0] & 6 == 4:
            at = 2 + (packet[1] >= 128)  # no packet here is longer than 16383 bytes
            at += 2 + int.from_bytes(packet[at : at + 2], "big")
            packet_id = bytes(packet[at : at + 2])
            self.count += packet[0] & 8 != 0 and packet_id in self._released
            self._released.discard(packet_id)


class Sender:
    """Publishes N messages for the device, as fast as its broker and the device let it.  A session of its own."""

    def __init__(self, port, messages, received):
        """received: called for how many the device has by now."""
        self.sent = 0
        self._messages = messages
        self._received = received
        self._stop = threading.Event()
        self._room = threading.Semaphore(_WINDOW)
        self._client = client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, client_id="sender", clean_session=False)
        client.reconnect_delay_set(0.05, 0.5)
        client.max_inflight_messages_set(16)
        client.on_publish = lambda *_: self._room.release()
        client.connect_async("127.0.0.1", port)
        client.loop_start()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self):
        self._thread.start()

    def _run(self):
        while self.sent < self._messages and not self._stop.is_set():
            if self.sent - self._received() >= _AHEAD:
                self._stop.wait(0.005)
            elif self._room.acquire(timeout=0.1):
                n = self.sent + 1
                self._client.publish(DOWN, demo.payload_of(n), 2 - n % 2)
                self.sent = n

    def close(self):
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        self._client.disconnect()
        self._client.loop_stop()


class Device(demo.Device):
    """The demo's, with what its application tells."""

    def __init__(self, *args, **more):
        self.samples = []  # dicts, see soak_app.py
        self.received = 0
        super().__init__(*args, **more)

    def heard(self, line):
        if line.startswith("soak: at "):
            self.published, self.received = [int(word) for word in line.split()[2:]]
        elif line.startswith("soak: "):
            sample = json.loads(line[6:])
            self.samples.append(sample)
            self.published, self.received = sample["published"], sample["received"]
        else:
            super().heard(line)


class Trial(demo.Trial):
    """The one device, its faults, and what came of them."""

    def __init__(self, messages, seed, micropython, home, tell, version=4):
        super().__init__(0, messages, 0, seed, micropython, home, tell, version)
        self.topic = UP
        self.cut_at = _CUT_AT
        self.kinds = collections.Counter()  # faults that have come
        count = max(3, messages // PER_FAULT)
        self._faults = [_FAULTS[i % len(_FAULTS)] for i in range(count)]
        self._faults += ["half-open"] * (-(-count // _HALF_OPEN_IN))
        self._net.shuffle(self._faults)
        self._due = sorted(int(self._net.random() * messages * 0.95) for _ in self._faults)
        self._lines = collections.deque(maxlen=50000)
        self.repeats = {"up": Repeats(), "down": Repeats()}

    @property
    def received(self):
        return self.device.received if self.device else 0

    @property
    def _progress(self):
        return (self.delivered + self.received) // 2

    def _run(self):
        with contextlib.ExitStack() as stack:
            stack.callback(self._save_wire)
            # Without a limit to its window mosquitto 2.0 keeps the order; with one it does not, where that is full, and
            # after a reconnection it sends all that waits, window or not.
            logged = ["log_type warning", "log_type error"]
            broker = Mosquitto(log_type="information", lines=logged, max_inflight_messages=0)
            self._broker = stack.enter_context(broker)
            stack.callback(self._save_log, broker)
            proxy = self._proxy = stack.enter_context(px.Proxy(broker.port, on_packet=self._on_packet))
            far = stack.enter_context(px.Proxy(broker.port, on_packet=self.repeats["up"].on_packet))
            self.far = demo.FarSide(far.port, UP, self._log)
            stack.callback(self.far.close)
            config = {
                "wifi": None,
                "broker": {"host": "127.0.0.1", "port": proxy.port, "keep_alive_s": 5, "version": self.version},
                "client_id": "soak",
                "journal": {"when_full": "wait"},
                "telemetry": None,
                "commands": None,
            }
            told = {
                "messages": self.messages,
                "up": UP,
                "down": DOWN,
                "every": max(1, 2 * self.messages // _SAMPLES),
                "fill": demo.FILL,
            }
            fast = {"MQTT_DURABLE_NOR_PROGRAM_US": "0", "MQTT_DURABLE_NOR_ERASE_MS": "0"}
            device = self.device = Device(self._micropython, self.home, config, told, "soak_app.py", fast)
            stack.callback(device.close)
            sender = Sender(broker.port, self.messages, lambda: device.received)
            stack.callback(sender.close)
            device.start()
            self._until(lambda: device.begun)
            sender.start()
            self._until(lambda: device.done and self._step is None)
            self.far.settle()
            self.flash = norsim.read_counters(str(device.flash))

    def _on_packet(self, direction, packet):
        self.repeats["down"].on_packet(direction, packet)
        self._lines.append((time.monotonic() - self._began, direction, bytes(packet[:48])))

    def _log(self, line):
        pass

    def _save_wire(self):
        with open(self.home / "wire.log", "w") as f:
            for at, direction, packet in list(self._lines):
                f.write("%9.4f %-4s %s\n" % (at, direction, packet.hex() if len(packet) < 5 else packet))

    def _news_of(self):
        return super()._news_of() + (self.received,)

    def _fault(self, kind):
        self.kinds[kind] += 1
        if kind not in ("slow", "pieces"):
            yield from super()._fault(kind)
            return
        proxy = self._proxy
        rng = self._net
        goal = min(self.messages, self._progress + rng.randint(1, PER_FAULT // 2))
        if kind == "slow":
            delay_ms = rng.randint(5, 150)
            proxy.delay(delay_ms)
            self._say("link slow: %d ms each way" % delay_ms)
        else:
            nbytes = rng.randint(1, 40)
            proxy.chunk(nbytes)
            self._say("link in pieces of %d bytes" % nbytes)
        until = time.monotonic() + 3
        while self._progress < goal and time.monotonic() < until and not self.device.done:
            yield
        proxy.delay(0)
        proxy.chunk(0)

    def heap(self):
        """((least, mean) of the first tenth, of the last tenth) of what the heap held, in bytes; None without both."""
        used = [sample["heap_bytes"] for sample in self.device.samples[:-1]] if self.device else []
        n = len(used) // 10
        return ((min(used[:n]), sum(used[:n]) // n), (min(used[-n:]), sum(used[-n:]) // n)) if n else None

    def verdict(self):
        """The figures as a dict of lists [QoS 1 up, QoS 2 up, QoS 1 down, QoS 2 down], the failures as lines."""
        failures = [self.problem] if self.problem else []
        figures = {name: [] for name in ("messages", "arrived", "lost", "duplicated", "disordered")}

        def column(name, qos, arrived, lost, duplicated, disordered):
            wanted = (self.messages + 2 - qos) // 2
            for key, value in zip(figures, (wanted, arrived, lost, duplicated, disordered)):
                figures[key].append(value)
            doubled = duplicated - self.repeats[name].count if qos == 2 else 0
            for count, word in ((lost, "lost"), (disordered, "out of order"), (max(0, doubled), "duplicated")):
                if count:
                    failures.append("%s QoS %d: %d %s" % (name, qos, count, word))

        for qos in (1, 2):
            came = [n for n in self.far.arrived if n % 2 == qos % 2] if self.far else []
            first = list(dict.fromkeys(came))
            disordered = sum(b < a for a, b in zip(first, first[1:]))
            lost = len(set(range(qos, self.messages + 1, 2)).difference(first))
            column("up", qos, len(first), lost, len(came) - len(first), disordered)
        last = self.device.samples[-1] if self.device and self.device.samples else None
        for qos in (1, 2):
            count, _, repeated, late = last["qos%d" % qos] if last else (0, [], 0, 0)
            column("down", qos, count, (self.messages + 2 - qos) // 2 - count, repeated, late)
        strange = (self.far.strange if self.far else [])[:3]
        if last and last["strange"]:
            strange.append("%d messages at the device" % last["strange"])
        failures += ["unexpected: %s" % line for line in strange]
        if last and last["stats"]["lost"] + last["stats"]["dropped"] + last["stats"]["handler_errors"]:
            failures.append("the device counts a loss: %s" % last["stats"])
        failures += ["traceback in " + line for line in (self.device.tracebacks if self.device else [])[:3]]
        heap = self.heap()
        if heap and heap[1][0] > heap[0][0] + FLAT_BYTES:
            failures.append("the heap has grown: at least %d bytes in use, then %d" % (heap[0][0], heap[1][0]))
        return figures, failures


def tables_of(trial):
    """The closing tables."""
    figures, _ = trial.verdict()
    table = Table(title="What came through")
    table.add_column("")
    for name in ("up, QoS 1", "up, QoS 2", "down, QoS 1", "down, QoS 2"):
        table.add_column(name, justify="right")
    again = [trial.repeats[name].count if qos == 2 else 0 for name in ("up", "down") for qos in (1, 2)]
    words = {"duplicated": "duplicated (allowed at QoS 1)", "disordered": "out of order"}
    for key, values in figures.items():
        table.add_row(words.get(key, key), *["%d" % value for value in values])
        if key == "duplicated":
            table.add_row("  by the broker, behind its PUBREL", *["%d" % value for value in again])
    more = Table(title="Meanwhile")
    more.add_column("")
    more.add_column("", justify="right")
    for kind, count in sorted(trial.kinds.items()):
        more.add_row("fault: " + kind, "%d" % count)
    if trial.device and trial.device.samples:
        stats = trial.device.samples[-1]["stats"]
        names = "connections sent resent acknowledged received duplicates passed_over discarded protocol_errors"
        for name in names.split():
            more.add_row("device: " + name, "%d" % stats[name])
    heap = trial.heap()
    if heap:
        for (least, mean), word in zip(heap, ("first", "last")):
            more.add_row("heap in use, %s tenth: least" % word, "%d bytes" % least)
            more.add_row("  mean", "%d bytes" % mean)
    if trial.flash:
        more.add_row("flash bytes per message each way", "%.0f" % (trial.flash["programmed_bytes"] / trial.messages))
        more.add_row("sector erases", "%d" % sum(trial.flash["erases"]))
    more.add_row("seconds", "%.0f" % trial.seconds)
    return table, more


def show(trial, news, console):
    """Show what happens until the trial has ended.  news: queue of texts, None at the end."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    told = time.monotonic()
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bars = [(word, progress.add_task(word, total=trial.messages)) for word in ("delivered", "received")]
        while True:
            with contextlib.suppress(queue.Empty):
                text = news.get(timeout=0.1)
                if text is None:
                    return
                if console.is_terminal or time.monotonic() > told + 10:
                    told = time.monotonic()
                    samples = trial.device.samples if trial.device else []
                    used = samples[-1]["heap_bytes"] if samples else 0
                    line = "%6d up %6d down  heap %6d  %s" % (trial.delivered, trial.received, used, text)
                    console.print(line, markup=False, highlight=False, soft_wrap=True)
            for word, bar in bars:
                progress.update(bar, completed=getattr(trial, word))


def run(messages, seed, console, keep=False, version=4):
    """Run the soak; return (trial, failures, directory of the logs or None if they are not kept)."""
    micropython = demo.find_micropython()
    if not micropython:
        raise demo.Stuck("there is no micropython: name it with MICROPYTHON=path")
    find_mosquitto()
    home = Path(tempfile.mkdtemp(prefix="mqtt-durable-soak-"))
    news = queue.Queue()
    trial = Trial(messages, seed, micropython, home, lambda _, text: news.put(text), version)

    def whole():
        trial.run()
        news.put(None)

    thread = threading.Thread(target=whole)
    try:
        thread.start()
        show(trial, news, console)
    except KeyboardInterrupt:
        keep = None  # of a soak that was stopped nothing is left
        raise
    finally:
        trial.stop()
        thread.join()
        if keep is None:
            shutil.rmtree(home, ignore_errors=True)
    failures = trial.verdict()[1]
    if not failures and not keep:
        shutil.rmtree(home, ignore_errors=True)
        home = None
    return trial, failures, home


def _ended(*_):
    raise KeyboardInterrupt


def main(arguments=None):
    parser = argparse.ArgumentParser(description="One device, messages both ways, a bad link, its heap watched.")
    parser.add_argument("--messages", type=int, default=MESSAGES, metavar="N", help="each way, default %(default)s")
    parser.add_argument("--seed", default=None, metavar="S", help="default: a new one")
    parser.add_argument("--version", type=int, default=4, choices=(4, 5), help="of MQTT; 4, the default, is 3.1.1")
    parser.add_argument("--keep", action="store_true", help="keep the logs also when all went well")
    options = parser.parse_args(arguments)
    if not 10 <= options.messages <= 9999999:
        parser.error("--messages: expected 10 to 9999999")
    seed = options.seed or str(random.randrange(1000000))
    console = Console()
    console.print("SEED=%s  %d messages each way" % (seed, options.messages))
    signal.signal(signal.SIGTERM, _ended)
    try:
        trial, failures, home = run(options.messages, seed, console, options.keep, options.version)
    except KeyboardInterrupt:
        console.print("stopped")
        return 130
    except (demo.Stuck, BrokerError) as e:
        console.print(str(e), markup=False)
        return 1
    for table in tables_of(trial):
        console.print(table)
    for line in failures:
        console.print("FAILED  " + line, markup=False, highlight=False, soft_wrap=True)
    if home:
        console.print("SEED=%s, logs in %s" % (seed, home), markup=False, highlight=False, soft_wrap=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
