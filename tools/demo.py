"""The promise, tried: a device that loses power, link and broker at random, and a far side that counts.

    demo.py [--messages N] [--cuts C] [--seed S] [--version 5]

Two devices at once, one publishing N messages at QoS 1, one at QoS 2.  Each is the real boot.py and main.py on the
MicroPython unix port, its journal in simulated NOR flash in a file, behind a proxy, with a real mosquitto of its own;
the far side is a paho-mqtt subscriber with a session of its own.  Each loses its power C times: by SIGKILL at a random
moment, or in the middle of a page program or sector erase, which is left half done.  Beside that the link is cut C/2
times and the broker restarted C/10 times.  In the end the device is switched off and on once more and must stay silent.

The seed fixes which faults come in which order; when exactly they strike depends on the machine.  Exit status 1 if a
message was lost, came in a wrong order, or (QoS 2) twice, or a device did not finish or printed a traceback; the
logs of all that took part are kept then.
"""

import argparse
import collections
import contextlib
import json
import os
import queue
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import norsim
import paho.mqtt.client as mqtt
import proxy as px
from brokers import BrokerError, Mosquitto, find_mosquitto
from packet_types import CONNACK, CONNECT, NAMES, PUBACK, PUBCOMP, PUBLISH, PUBREC, PUBREL
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent

MESSAGES = 800
CUTS = 40

# The device.  Times of the flash: the longest page program and the typical erase of a W25Q data sheet.
HEAP = "512K"
PROGRAM_US = 3000
ERASE_MS = 45
LINK_DELAY_MS = 5  # each way
PAUSE_MS = 50
BURST = 24
FILL = "made-up readings of a sensor that does not exist, padded...."

ENDURANCE = 100000  # erases a sector is good for, by the data sheets
YEAR_S = 365.25 * 86400
RATE_S = 10  # flash life is told for one message in so many seconds

_STEP_S = 0.004
_STALL_S = 90  # no message, no fault, nothing: longer than any outage and back-off here
_OUTAGE_S = 25  # longer than a device needs to notice a half-open link
_HOLDS_S = 1.2  # a connection that the client takes for a good one
_RECOVERY_S = 4  # a life in which nothing gets through ends after this, or after _OUTAGE_S

# At which packets the link is cut.
_CUT_AT = {
    1: [(px.UP, CONNECT), (px.DOWN, CONNACK), (px.UP, PUBLISH), (px.DOWN, PUBACK)],
    2: [
        (px.UP, CONNECT),
        (px.DOWN, CONNACK),
        (px.UP, PUBLISH),
        (px.DOWN, PUBREC),
        (px.UP, PUBREL),
        (px.DOWN, PUBCOMP),
    ],
}
_LINK_FAULTS = ("packet", "reset", "packet", "byte", "packet", "half-open", "packet", "end", "packet", "away")


class Stuck(Exception):
    """A trial cannot go on.  The argument is one line."""


class Stopped(Exception):
    """The demo was told to end."""


def payload_of(n):
    """What the device sends as message n."""
    return ("%07d " % n + FILL)[: 48 + n % 17].encode()


def find_micropython():
    """The unix port's path: $MICROPYTHON, or beside this Python, or on the PATH."""
    beside = Path(sys.executable).parent / "micropython"
    return os.environ.get("MICROPYTHON") or (str(beside) if beside.exists() else shutil.which("micropython"))


class FarSide:
    """A subscriber with a persistent session at QoS 2, so that it neither loses nor doubles anything itself."""

    def __init__(self, port, topic, tell, payload=payload_of):
        """tell: called with a line for each message.  payload(n): what message n has to be."""
        self.arrived = []  # numbers in order of arrival
        self.strange = []  # messages that the device cannot have sent
        self.last = 0.0  # time.monotonic() of the newest
        self.seen = set()
        self._topic = topic
        self._tell = tell
        self._payload = payload
        self._ready = threading.Event()
        self._ends = {}
        self._client = client = mqtt.Client(
            mqtt.CallbackAPIVersion.VERSION2, client_id="far-side", clean_session=False
        )
        client.reconnect_delay_set(0.05, 0.5)
        client.on_connect = self._on_connect
        client.on_subscribe = lambda *_: self._ready.set()
        client.on_message = self._on_message
        client.connect_async("127.0.0.1", port)
        client.loop_start()
        if not self._ready.wait(30):
            self.close()
            raise Stuck("the far side could not subscribe within 30 s")

    def _on_connect(self, client, userdata, flags, reason, properties):
        if not reason.is_failure and not flags.session_present:
            if self._ready.is_set():
                self.strange.append("the broker forgot the far side's session")
            client.subscribe([(self._topic, 2), ("far-side/end", 2)])

    def _on_message(self, client, userdata, message):
        if message.topic != self._topic:
            self._ends[message.payload].set()
            return
        number = message.payload[:7]
        n = int(number) if number.isdigit() else 0
        self._tell("far  PUBLISH id %d: %s" % (message.mid, number.decode(errors="replace")))
        if message.payload != self._payload(n):
            self.strange.append(repr(message.payload))
            return
        self.arrived.append(n)
        self.seen.add(n)
        self.last = time.monotonic()

    def settle(self):
        """Return when all that the broker had for the far side has arrived: a message of its own comes last.

        Raises Stuck.
        """
        name = b"%d" % len(self._ends)
        self._ends[name] = threading.Event()
        self._client.publish("far-side/end", name, 2)
        if not self._ends[name].wait(60):
            raise Stuck("the far side's own message did not come back from the broker within 60 s")

    def close(self):
        self._client.disconnect()
        self._client.loop_stop()


class DeviceConsole:
    """What a device says, a life at a time: take() each line."""

    def __init__(self):
        self.life = 0
        self.published = 0  # newest number the console has told of
        self.begun = False  # this life: the application runs
        self.done = False  # this life: the broker has everything
        self.note = ""  # this life: the flash operation the power failed in
        self.tracebacks = []
        self.last_line = ""
        self._trace = None

    def next_life(self):
        self.life += 1
        self.begun = self.done = False
        self.note = self.last_line = ""
        self._trace = None

    def take(self, line):
        """Take a line of its console, without its end."""
        self.last_line = line
        trace = self._trace
        if trace is not None:
            trace.append(line)
            if not line.startswith("  "):
                self.tracebacks.append("life %d: %s" % (self.life, " | ".join(t.strip() for t in trace)))
                self._trace = None
        elif line.startswith("Traceback"):
            self._trace = []
        else:
            self.heard(line)

    def heard(self, line):
        """Take what a line that belongs to no traceback says."""
        if line.startswith("demo: published "):
            self.published = max(self.published, int(line.split()[2]))
        elif line.startswith("demo: begins at "):
            self.published = max(self.published, int(line.split()[3]) - 1)
            self.begun = True
        elif line == "demo: done":
            self.done = True
        elif line.startswith("demo: power failed in "):
            self.note = line[22:]


class Device(DeviceConsole):
    """One board: its files in a directory, its flash in a file beside it, one process a life."""

    def __init__(self, micropython, home, config, demo, app="demo_app.py", environment=None):
        """demo: what app finds in demo.json.  environment: of every life."""
        super().__init__()
        self.home = home
        self.flash = home / "flash.nor"
        self.process = None
        self._reader = None
        self._micropython = micropython
        self._environment = environment or {}
        self._directory = home / "device"
        self._directory.mkdir(parents=True)
        for name in ("boot.py", "main.py"):
            shutil.copy(ROOT / name, self._directory)
        shutil.copy(ROOT / "tools" / app, self._directory / "app.py")
        (self._directory / "config.json").write_text(json.dumps(config, indent=2))
        (self._directory / "demo.json").write_text(json.dumps(demo))
        self._console = open(home / "console.log", "w")

    def start(self, **environment):
        """Switch it on."""
        self.next_life()
        # As on a board: its own files, what is frozen, then lib.  (The script's directory, tools, comes first.)
        path = [str(self._directory), ".frozen"] + [str(ROOT / name) for name in ("lib", "tools/shim")]
        settings = {
            "MICROPYPATH": ":".join(path),
            "MQTT_DURABLE_NOR": str(self.flash),
            "MQTT_DURABLE_NOR_PROGRAM_US": str(PROGRAM_US),
            "MQTT_DURABLE_NOR_ERASE_MS": str(ERASE_MS),
        }
        self._log("---- life %d %s" % (self.life, environment or ""))
        self.process = subprocess.Popen(
            [self._micropython, "-X", "heapsize=" + HEAP, str(ROOT / "tools" / "demo_board.py")],
            cwd=self._directory,
            env={**os.environ, **settings, **self._environment, **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a Ctrl-C is for this program
        )
        self._reader = threading.Thread(target=self._read, args=(self.process.stdout,), daemon=True)
        self._reader.start()

    @property
    def alive(self):
        return self.process is not None and self.process.poll() is None

    def kill(self):
        """Cut its power."""
        if self.process is not None:
            self.process.kill()
            self.wait()

    def wait(self):
        """Return its exit status when it has ended and all that it said is known."""
        process, self.process = self.process, None
        status = process.wait()
        self._reader.join(10)
        return status

    def close(self):
        self.kill()
        self._console.close()

    def _log(self, line):
        self._console.write(line + "\n")
        self._console.flush()

    def _read(self, stream):
        with stream:
            for raw in stream:
                line = raw.decode(errors="replace").rstrip()
                self._log(line)
                self.take(line)


def tally(arrived, wanted):
    """What became of numbers: lists of those lost, of those that came again, of the disordered and the unexpected.

    arrived: in order of arrival.  wanted: a range.
    """
    counts = collections.Counter(arrived)
    first = list(counts)
    return {
        "lost": [n for n in wanted if n not in counts],
        "duplicated": [n for n in wanted if counts[n] > 1],
        "disordered": [b for a, b in zip(first, first[1:]) if b < a],
        "unexpected": [n for n in first if n not in wanted],
    }


class Trial:
    """One device at one QoS: its faults, and what came of them.  run() is a thread's whole life."""

    def __init__(self, qos, messages, cuts, seed, micropython, home, tell, version=4):
        self.qos = qos
        self.version = version  # of MQTT, as in config.json
        self.messages = messages
        self.home = home
        self.cut_at = _CUT_AT.get(qos)
        self.topic = "demo/qos%d" % qos
        self.power_cuts = self.flash_cuts = self.link_cuts = self.restarts = 0
        self.problem = None
        self.seconds = 0.0
        self.far = self.device = None
        self.flash = None  # norsim.read_counters() of the end
        self._cuts = cuts
        # Two generators: whether the link's faults come sooner or later changes nothing for the power's.
        self._power = random.Random("power %s %d" % (seed, qos))
        self._net = random.Random("net %s %d" % (seed, qos))
        restarts = -(-cuts // 10)
        links = [_LINK_FAULTS[i % len(_LINK_FAULTS)] for i in range(cuts // 2)]
        self._faults = links + ["broker"] * restarts
        self._net.shuffle(self._faults)
        self._due = sorted(int(self._net.random() * messages * 0.95) for _ in self._faults)
        self._micropython = micropython
        self._tell = tell
        self._stop = threading.Event()
        self._step = None  # the generator of the fault that is going on
        self._hold = False  # a half-open link, for the device to notice
        self._news = None
        self._wire = None
        self._began = 0.0

    # -- what the screen shows

    @property
    def published(self):
        return self.device.published if self.device else 0

    @property
    def delivered(self):
        return len(self.far.seen) if self.far else 0

    def stop(self):
        """Have run() end soon."""
        self._stop.set()

    def _say(self, text):
        self._tell(self, "%5.1f s  %s" % (time.monotonic() - self._began, text))

    # -- the trial

    def run(self):
        """Run it to its end; .problem says why it could not come to one."""
        self._began = time.monotonic()
        try:
            self._run()
        except Stopped:
            self.problem = "stopped"
        except (Stuck, BrokerError, OSError, TimeoutError) as e:
            self.problem = str(e) or repr(e)
        except Exception as e:  # a slip in this program: it must end with a line all the same
            self.problem = "%s: %s" % (type(e).__name__, e)
        finally:
            self.seconds = time.monotonic() - self._began
            self._say(self.problem or "finished")

    def _run(self):
        with contextlib.ExitStack() as stack:
            self._wire = stack.enter_context(open(self.home / "wire.log", "w"))
            broker = self._broker = stack.enter_context(Mosquitto())
            stack.callback(self._save_log, broker)
            proxy = self._proxy = stack.enter_context(px.Proxy(broker.port, on_packet=self._on_packet))
            proxy.delay(LINK_DELAY_MS)
            self.far = FarSide(broker.port, self.topic, self._log)
            stack.callback(self.far.close)
            config = {
                "wifi": None,
                "broker": {"host": "127.0.0.1", "port": proxy.port, "keep_alive_s": 5, "version": self.version},
                "journal": {"when_full": "wait"},
                "telemetry": None,
                "commands": None,
            }
            demo = {
                "messages": self.messages,
                "topic": self.topic,
                "qos": self.qos,
                "pause_ms": PAUSE_MS,
                "burst": BURST,
                "fill": FILL,
            }
            device = self.device = Device(self._micropython, self.home, config, demo)
            stack.callback(device.close)
            while not self._live():
                pass
            self.far.settle()
            self.flash = norsim.read_counters(str(device.flash))
            device.kill()
            self._say("switched off and on once more: nothing may come again")
            device.start()
            self._until(lambda: device.done)
            self.far.settle()

    def _save_log(self, broker):
        with open(self.home / "broker.log", "w") as f:
            f.writelines(line + "\n" for line in broker.log)

    def _on_packet(self, direction, packet):
        """Note a packet in wire.log: time, direction, type, flags, and the packet identifier or the number it has."""
        kind = packet[0] >> 4
        text = ""
        if kind == PUBLISH:
            at = packet.find(self.topic.encode()) + len(self.topic)
            text = "id %d: %s" % (int.from_bytes(packet[at : at + 2], "big"), packet[at + 2 : at + 9].decode())
        elif kind == CONNACK:
            text = "session present %d, return code %d" % (packet[2], packet[3])
        elif len(packet) == 4:
            text = "id %d" % int.from_bytes(packet[2:4], "big")
        name = NAMES[kind]
        self._log("%-4s %s flags %d %s" % (direction, name, packet[0] & 15, text))

    def _log(self, line):
        """Note a line in wire.log, beside the time.  Called by two threads."""
        if not self._wire.closed:
            self._wire.write("%9.4f %s\n" % (time.monotonic() - self._began, line))

    @property
    def _progress(self):
        """Messages done: a message counts half when it is published and half when it is delivered."""
        return (self.published + self.delivered) // 2

    # -- time

    def _tick(self):
        """Let a moment pass; the faults of link and broker go on meanwhile.  Raises Stopped, Stuck."""
        if self._stop.wait(_STEP_S):
            raise Stopped
        if self._step is None and self._faults:
            if self._progress >= self._due[0] or self.device.done:
                self._due.pop(0)
                self._step = self._fault(self._faults.pop(0))
        if self._step is not None and next(self._step, self) is self:
            self._step = None
        now = time.monotonic()
        news = self._news_of()
        if self._news is None or self._news[0] != news:
            self._news = news, now
        elif now - self._news[1] > _STALL_S:
            raise Stuck(
                "the device did not finish: nothing moved for %d s; it last said %r"
                % (_STALL_S, self.device.last_line)
            )

    def _news_of(self):
        """What changes as long as the trial gets on."""
        return self.delivered, self.published, self.power_cuts, len(self._faults), self._step is None

    def _until(self, check, longest_s=None):
        """Let time pass until check() is true; return whether it is.  Raises Stuck if the device ends by itself."""
        deadline = longest_s and time.monotonic() + longest_s
        while not check():
            if not self.device.alive:
                self.device.wait()
                raise Stuck(self._ended())
            if deadline and time.monotonic() > deadline:
                return False
            self._tick()
        return True

    def _ended(self):
        return 'the device ended by itself in life %d; it last said "%s"' % (self.device.life, self.device.last_line)

    def _connects(self):
        return self._proxy.counters()[px.DOWN, CONNACK]

    # -- power

    def _live(self):
        """One life of the device: until its power is cut; return True if it has finished instead."""
        device = self.device
        rng = self._power
        left = self._cuts - self.power_cuts
        if not left:
            device.start()
            self._until(lambda: device.done and not self._faults and self._step is None)
            return True
        # So that the cuts are spread over what there is still to do.
        mean = (self.messages - self._progress) / (left + 1)
        early = rng.random() < 0.25
        if rng.random() < 0.5:
            # Programs per message: one to store it, at QoS 2 another one for a few PUBRECs.
            share = rng.random()
            ops = rng.randint(1, 8) if early else 1 + int(share * 2 * mean * (1.1 if self.qos == 1 else 1.6))
            order = "%d,%s,%s,%d" % (
                ops,
                rng.choice(norsim.MODES_PROGRAM),
                rng.choice(norsim.MODES_ERASE),
                rng.getrandbits(30),
            )
            device.start(**{"MQTT_DURABLE_NOR_KILL" if early else "DEMO_CUT": order})
            self._cut_in_flash()
        else:
            wait_s = rng.random() * (0.6 if early else 0.03)
            steps = int(rng.random() * 2 * mean)
            hidden = rng.random() < 0.5
            device.start()
            self._cut_from_outside(early, wait_s, steps, hidden)
        self.power_cuts += 1
        return False

    def _cut_in_flash(self):
        """The flash itself ends the process."""
        device = self.device
        began = time.monotonic()
        patience_s = self._patience()
        while device.alive:
            self._tick()
            if device.done or time.monotonic() - max(began, self.far.last) > patience_s:
                # It does not come to that operation: all is done, or it waits for something.
                device.kill()
                self._say("power cut while it was %s, life %d" % ("idle" if device.done else "waiting", device.life))
                return
        status = device.wait()
        if status != -signal.SIGKILL or not device.note:
            raise Stuck(self._ended())
        self.flash_cuts += 1
        self._say("power cut in the middle of a flash operation: %s, life %d" % (device.note, device.life))

    def _cut_from_outside(self, early, wait_s, steps, hidden):
        """SIGKILL.  hidden: the broker does not hear that the connection has ended, as with real power."""
        device = self.device
        if early:
            self._until(lambda: False, wait_s)
            where = "%d ms after power on" % (wait_s * 1000)
        else:
            before = self._connects()
            patience_s = self._patience()
            self._until(lambda: self._connects() > before, patience_s)
            goal = self._progress + steps
            self._until(lambda: self._progress >= goal or device.done, patience_s)
            self._until(lambda: not self._hold)
            self._until(lambda: False, wait_s)
            where = "at %d" % self.published
        if hidden and self._step is None:
            self._proxy.swallow()
            device.kill()
            self._proxy.accept()
        else:
            device.kill()
        self._say("power cut %s, life %d" % (where, device.life))

    def _patience(self):
        """Half of the lives see an outage through to its end."""
        return self._power.choice((_RECOVERY_S, _OUTAGE_S))

    # -- link and broker

    def _fault(self, kind):
        """One fault, as a generator that takes a step at every tick, and ends when messages can come through again."""
        proxy = self._proxy
        rng = self._net
        connects = self._connects()
        if kind == "broker":
            pause_s = rng.random()
            yield from self._in_thread(self._broker.stop)
            back = time.monotonic() + pause_s
            while time.monotonic() < back:
                yield
            yield from self._in_thread(self._broker.start)
            self.restarts += 1
            self._say("broker restarted, %.1f s after its end" % pause_s)
        elif kind == "packet" or kind == "byte":
            if kind == "packet":
                direction, packet_type = rng.choice(self.cut_at)
                when = rng.choice(("before", "inside", "after"))
                nth = 1 if packet_type in (CONNECT, CONNACK) else rng.randint(1, 8)
                cut = proxy.cut_at_packet(direction, packet_type, nth, when)
                text = "%s %s" % (when, NAMES[packet_type])
                if packet_type in (CONNECT, CONNACK):
                    proxy.cut()  # or there is no such packet
            else:
                nbytes = rng.randint(0, 2000)
                direction = rng.choice((px.UP, px.DOWN))
                cut = proxy.cut_after(direction, nbytes)
                text = "after %d more bytes %s" % (nbytes, direction)
            while not cut.fired and not self.device.done:
                yield
            if not cut.fired:
                proxy.cancel_cuts()
                yield from self._cut_now(True)
                text = "when all was done"
            self.link_cuts += 1
            self._say("link cut " + text)
        elif kind == "half-open":
            while not (self.device.begun and proxy.open_links):
                yield
            gone = proxy.counters()["closed_by_device"]
            life = self.device.life
            proxy.swallow()
            self._hold = True
            self._say("link half open: everything is swallowed")
            began = time.monotonic()
            while proxy.counters()["closed_by_device"] == gone and time.monotonic() < began + _OUTAGE_S:
                yield
            self._hold = False
            proxy.accept()
            proxy.cut()
            self.link_cuts += 1
            who = "the device gave it up" if life == self.device.life and self.device.alive else "the power was cut"
            self._say("link whole again: %s after %.1f s" % (who, time.monotonic() - began))
        else:
            yield from self._cut_now(kind != "end")
            text = "link cut by %s" % ("FIN" if kind == "end" else "RST")
            if kind == "away":
                pause_s = rng.random() * 1.5
                proxy.refuse()
                back = time.monotonic() + pause_s
                while time.monotonic() < back:
                    yield
                proxy.accept()
                text += ", away for %.1f s" % pause_s
            self.link_cuts += 1
            self._say(text)
        while self._connects() == connects:
            yield
        # Mostly the new connection lives long enough to end the growing of the client's pauses.
        if self._faults and (rng.random() < 0.7 or self.device.done):
            life = self.device.life
            back = time.monotonic() + _HOLDS_S
            while time.monotonic() < back and self.device.life == life:
                yield

    def _cut_now(self, reset):
        while not self._proxy.cut(reset):
            yield

    def _in_thread(self, function):
        """Run a function that waits, without holding up the power cuts."""
        failed = []

        def call():
            try:
                function()
            except BrokerError as e:
                failed.append(e)

        thread = threading.Thread(target=call, daemon=True)
        thread.start()
        while thread.is_alive():
            yield
        if failed:
            raise failed[0]

    # -- what came of it

    def verdict(self):
        """The figures as a dict, the failures as a list of lines."""
        arrived = list(self.far.arrived) if self.far else []
        wanted = range(1, self.messages + 1)
        found = tally(arrived, wanted)
        lost, duplicated, disordered = found["lost"], found["duplicated"], found["disordered"]
        strange = list(self.far.strange) if self.far else []
        strange += [str(n) for n in found["unexpected"]]
        tracebacks = self.device.tracebacks if self.device else []
        figures = {
            "published": self.published,
            "delivered": len(set(arrived)),
            "lost": len(lost),
            "duplicated": sum(arrived.count(n) - 1 for n in duplicated),
            "disordered": len(disordered),
            "unexpected": len(strange),
            "power_cuts": self.power_cuts,
            "flash_cuts": self.flash_cuts,
            "link_cuts": self.link_cuts,
            "restarts": self.restarts,
            "tracebacks": len(tracebacks),
            "seconds": self.seconds,
        }
        failures = []
        if self.problem:
            failures.append(self.problem)
        for numbers, word in ((lost, "lost"), (duplicated if self.qos == 2 else [], "duplicated")):
            if numbers:
                failures.append("%s: %s" % (word, _some(numbers)))
        if disordered:
            failures.append("out of order: %s" % _some(disordered))
        if strange:
            failures.append("unexpected: %s" % _some(strange))
        failures += ["traceback in " + line for line in tracebacks[:3]]
        return figures, failures


def _some(items):
    """The first few of many, as a text."""
    return ", ".join(str(item) for item in items[:10]) + (" and %d more" % (len(items) - 10) if len(items) > 10 else "")


def _years(sectors, erases, messages, seconds):
    """Years until the sectors are worn, at as many erases per message and one message in so many seconds."""
    return sectors * ENDURANCE / (erases / messages) * seconds / YEAR_S if erases else float("inf")


def table_of(trials):
    """The closing table."""
    table = Table(title="What came through")
    table.add_column("")
    rows = {}

    def row(name, value):
        rows.setdefault(name, []).append(value)

    for trial in trials:
        table.add_column("QoS %d" % trial.qos, justify="right")
        figures, _ = trial.verdict()
        row("messages published", "%d" % figures["published"])
        row("delivered", "%d" % figures["delivered"])
        row("lost", "%d" % figures["lost"])
        allowed = " (allowed)" if trial.qos == 1 and figures["duplicated"] else ""
        row("duplicated", "%d%s" % (figures["duplicated"], allowed))
        row("out of order", "%d" % figures["disordered"])
        row("unexpected", "%d" % figures["unexpected"])
        row("power cuts", "%d" % figures["power_cuts"])
        row("  of them inside a flash operation", "%d" % figures["flash_cuts"])
        row("link cuts", "%d" % figures["link_cuts"])
        row("broker restarts", "%d" % figures["restarts"])
        flash = trial.flash
        if flash:
            erases = sum(flash["erases"])
            sectors = len(flash["erases"])
            row("flash bytes per message", "%.0f" % (flash["programmed_bytes"] / trial.messages))
            row("sector erases per message", "%.4f" % (erases / trial.messages))
            row(
                "years of flash life, 1 message in %d s" % RATE_S,
                "%.0f" % _years(sectors, erases, trial.messages, RATE_S),
            )
            per_message_s = figures["seconds"] / trial.messages
            row("  at this demo's rate", "%.1f" % _years(sectors, erases, trial.messages, per_message_s))
        else:
            for name in ("flash bytes per message", "sector erases per message"):
                row(name, "-")
            row("years of flash life, 1 message in %d s" % RATE_S, "-")
            row("  at this demo's rate", "-")
        row("seconds", "%.0f" % figures["seconds"])
    for name, values in rows.items():
        table.add_row(name, *values)
    sizes = {len(trial.flash["erases"]) for trial in trials if trial.flash}
    if sizes:
        table.caption = "flash life: %d sectors of 4 KiB, %d erases each, worn evenly" % (sizes.pop(), ENDURANCE)
    return table


def show(trials, news, console):
    """Show what happens until every trial has ended.  news: queue of (trial, text)."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bars = []
        for trial in trials:
            for word in ("published", "delivered"):
                bar = progress.add_task("QoS %d %s" % (trial.qos, word), total=trial.messages)
                bars.append((trial, word, bar))
        running = len(trials)
        while running:
            try:
                trial, text = news.get(timeout=0.1)
            except queue.Empty:
                pass
            else:
                if text is None:
                    running -= 1
                else:
                    console.print(
                        "QoS %d  %6d/%d  %s" % (trial.qos, trial.delivered, trial.messages, text),
                        markup=False,
                        highlight=False,
                        soft_wrap=True,
                    )
            for trial, word, bar in bars:
                progress.update(bar, completed=getattr(trial, word))


def run(messages, cuts, seed, console, qualities=(1, 2), keep=False, version=4):
    """Run the demo; return (trials, failures, directory of the logs or None if they are not kept)."""
    micropython = find_micropython()
    if not micropython:
        raise Stuck("there is no micropython: name it with MICROPYTHON=path")
    find_mosquitto()
    home = Path(tempfile.mkdtemp(prefix="mqtt-durable-demo-"))
    news = queue.Queue()
    trials = []
    threads = []

    def whole(trial):
        trial.run()
        news.put((trial, None))

    for qos in qualities:
        directory = home / ("qos%d" % qos)
        directory.mkdir()
        tell = lambda trial, text: news.put((trial, text))  # noqa: E731
        trial = Trial(qos, messages, cuts, seed, micropython, directory, tell, version)
        trials.append(trial)
        threads.append(threading.Thread(target=whole, args=(trial,)))
    try:
        for thread in threads:
            thread.start()
        show(trials, news, console)
    except KeyboardInterrupt:
        keep = None  # of a demo that was stopped nothing is left
        raise
    finally:
        for trial in trials:
            trial.stop()
        for thread in threads:
            thread.join()
        if keep is None:
            shutil.rmtree(home, ignore_errors=True)
    failures = ["QoS %d: %s" % (trial.qos, line) for trial in trials for line in trial.verdict()[1]]
    if not failures and not keep:
        shutil.rmtree(home, ignore_errors=True)
        home = None
    return trials, failures, home


def _ended(*_):
    raise KeyboardInterrupt


def main(arguments=None):
    parser = argparse.ArgumentParser(description="A device under power cuts, link cuts and broker restarts.")
    parser.add_argument("--messages", type=int, default=MESSAGES, metavar="N", help="per QoS, default %(default)s")
    parser.add_argument("--cuts", type=int, default=CUTS, metavar="C", help="of power per QoS, default %(default)s")
    parser.add_argument("--seed", default=None, metavar="S", help="default: a new one")
    parser.add_argument("--version", type=int, default=4, choices=(4, 5), help="of MQTT; 4, the default, is 3.1.1")
    parser.add_argument("--keep", action="store_true", help="keep the logs also when all went well")
    options = parser.parse_args(arguments)
    if not 1 <= options.messages <= 9999999:
        parser.error("--messages: expected 1 to 9999999")
    if options.cuts < 0:
        parser.error("--cuts: expected 0 or more")
    seed = options.seed or str(random.randrange(1000000))
    console = Console()
    console.print("SEED=%s  %d messages and %d power cuts at each QoS" % (seed, options.messages, options.cuts))
    signal.signal(signal.SIGTERM, _ended)
    try:
        trials, failures, home = run(
            options.messages, options.cuts, seed, console, keep=options.keep, version=options.version
        )
    except KeyboardInterrupt:
        console.print("stopped")
        return 130
    except (Stuck, BrokerError) as e:
        console.print(str(e), markup=False)
        return 1
    console.print(table_of(trials))
    for line in failures:
        console.print("FAILED  " + line, markup=False, highlight=False, soft_wrap=True)
    if home:
        console.print("SEED=%s, logs in %s" % (seed, home), markup=False, highlight=False, soft_wrap=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
