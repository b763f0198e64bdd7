"""The real firmware of a Pico W, in an emulator, under power cuts: the promise tried below MicroPython's own drivers.

    picow.py [FIRMWARE.uf2] [--messages N] [--cuts C] [--seed S]

The firmware with the image that tools/image.py makes of the library, boot.py, main.py and a configuration, and with
tools/picow_app.py as its app.py, runs in the emulator rp2040py: it mounts its littlefs, finds the journal in its pinned
files, brings Wi-Fi up, reaches a real mosquitto on the loopback interface through the emulator's NAT and publishes N
messages, at QoS 1 and 2 in turn, each with its number as its mark.  C times the power fails, between two instructions
or in the middle of a page program or sector erase, which is left half done; a new chip goes on with the same flash.
In about half of its lives it loses the network or, without a word, its connection.
In the end it is switched off and on once more and must stay silent.

Without FIRMWARE the official one is downloaded once, as by tools/flash.py.  The seed fixes which cuts come; the
emulator's radio answers when the host's network does, so a run does not repeat to the instruction.  Exit status 1 if a
message that the board accepted was lost, if one came in a wrong order or (QoS 2) twice, or if the board did not finish;
2 if there is no firmware to run.
"""

import argparse
import asyncio
import random
import signal
import statistics
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    _TOOLS = str(Path(__file__).resolve().parent)
    sys.path[:0] = [_TOOLS + "/../lib", _TOOLS + "/shim", _TOOLS]
    import host

    host.install()

import flash
import host
import image
import mpy
import norsim
from brokers import BrokerError, Mosquitto
from demo import FILL, DeviceConsole, FarSide, Stuck, _some, tally
from mqtt_durable import config as configuration
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build" / "picow"

MESSAGES = 200
CUTS = 10
TOPIC = "picow/readings"
PAUSE_MS = 20
AHEAD = 4  # readings that a life publishes before it is connected

_START_S = 4  # of the board: from power on until it is connected
_STALL_S = 150  # of the board, without news: longer than two of the client's longest pauses
_STALL_HOST_S = 900
_IDLE_S = 3


class NoFirmware(Exception):
    """There is nothing to run; the argument says in one line why, and what to do."""


def find_firmware(path=None):
    """Return the bytes of a firmware that was looked at: those at path, else of the official one, downloaded once.

    Raises NoFirmware.
    """
    try:
        data = Path(path or flash.official("pico_w")).read_bytes()
        flash.check_pico_w(data)
        image.PicoW(data)
    except OSError as error:
        raise NoFirmware("%s: %s" % (path or "the official firmware", error.strerror or error))
    except (flash.Unfit, image.Unusable) as error:
        raise NoFirmware("%s: %s" % (path, error) if path else str(error))
    if not flash.VERSION.search(data):
        raise NoFirmware("%s: there is no MicroPython in it" % path)
    return data


def make_image(firmware, port, messages, gateway, ssid):
    """The bytes of the .uf2: firmware and all that the board gets, its broker at gateway:port."""
    given = {
        "wifi": {"ssid": ssid},
        # An emulated second takes the host half a minute: the broker must not count those in between.
        "broker": {"host": gateway, "port": port, "keep_alive_s": 3600},
        "journal": {"home": "pinned", "when_full": "wait"},
        "telemetry": None,
        "commands": None,
    }
    demo = {"messages": messages, "topic": TOPIC, "fill": FILL, "ahead": AHEAD, "pause_ms": PAUSE_MS}
    files = mpy.compile_tree()
    files["app.py"] = (ROOT / "tools" / "picow_app.py").read_bytes()
    files["config.json"] = image.encode(given)
    files["demo.json"] = image.encode(demo)
    host.use_board("rp2")
    return image.PicoW(firmware).image(files, configuration.complete(given))


class PicoConsole(DeviceConsole):
    """What the board says; the application's own figures besides."""

    def __init__(self):
        super().__init__()
        self.took_us = []  # by publish(), while connected
        self.free = []  # bytes of heap, at the beginnings and the end
        self.forgotten = []  # lives that began behind a number that had been accepted

    def heard(self, line):
        if line.startswith("demo: published "):
            self.took_us += [int(us) for us in line.split()[3:]]
        elif line.startswith("picow: free "):
            self.free.append(int(line.split()[2]))
        elif line.startswith("demo: begins at ") and int(line.split()[3]) <= self.published:
            self.forgotten.append("life %d begins at %s, after %d" % (self.life, line.split()[3], self.published))
        super().heard(line)


def plan_of(messages, cuts, seed):
    """The cuts of a run, one a life: dicts.

    early: counted from power on; else from when at messages have been accepted or, half of the sum, arrived.
    """
    rng = random.Random("picow %s" % seed)
    early = [i % 5 == 3 for i in range(cuts)]
    rng.shuffle(early)
    goals = sorted(rng.uniform(0, messages * 0.95) for _ in range(early.count(False)))
    plan = []
    for is_early in early:
        plan.append(
            {
                "early": is_early,
                "at": 0 if is_early else goals.pop(0),
                "flash": rng.random() < 0.6,
                "operations": rng.randint(1, 8) if is_early else rng.randint(1, 30),
                "seconds": rng.uniform(0.05, _START_S) if is_early else rng.uniform(0, 0.4),
                "program": rng.choice(norsim.MODES_PROGRAM),
                "erase": rng.choice(norsim.MODES_ERASE),
                "seed": rng.randrange(1 << 31),
                "hidden": rng.random() < 0.5,
                "lose": rng.choice((None, None, "network", "connections")),
            }
        )
    return plan


class Trial:
    """One run.  tell: called with a line for each thing that happens; tick: with nothing, a few times a second."""

    def __init__(self, firmware, messages, cuts, seed, tell=lambda text: None, tick=lambda: None):
        self.messages = messages
        self.console = PicoConsole()
        self.far = None
        self.board = None
        self.phase = ""
        self.problem = None
        self.cuts = self.flash_cuts = self.link_cuts = self.lives_s = 0
        self.boots_s = []  # of the board: until the application began
        self.connects_s = []  # until the first message of that life had arrived
        self.busy = []  # (cycles, messages that arrived meanwhile), from then to the end of the life
        self.began = time.monotonic()
        self.seconds = 0.0
        self._firmware = firmware
        self._plan = plan_of(messages, cuts, seed)
        self._tell = tell
        self._tick = tick
        self._ticked = 0.0
        self._news = None

    def run(self, log=None):
        """Run it to its end; .problem says why it could not come to one.  log: a file for the console's lines."""
        self._log = log
        try:
            asyncio.run(self._run())
        except (Stuck, BrokerError, image.Unusable, mpy.CannotCompile, OSError) as error:
            self.problem = str(error) or repr(error)
        finally:
            self.seconds = time.monotonic() - self.began

    async def _run(self):
        import emulator

        WORK.mkdir(parents=True, exist_ok=True)
        uf2 = WORK / "image.uf2"
        with Mosquitto() as broker:
            made = make_image(self._firmware, broker.port, self.messages, emulator.GATEWAY, emulator.SSID)
            uf2.write_bytes(made)
            self.far = FarSide(broker.port, TOPIC, lambda line: None)
            self.board = emulator.Board(uf2, broker.port)
            try:
                for cut in self._plan:
                    await self._live(cut)
                await self._live(None)
                self.far.settle()
                arrived = len(self.far.arrived)
                self._say("all is done; switched off and on once more: nothing may come again")
                self.board.power_off()
                await self._live(None)
                self.far.settle()
                if len(self.far.arrived) != arrived:
                    self.problem = "%d messages came again when all was done" % (len(self.far.arrived) - arrived)
            finally:
                self.board.close()
                self.far.close()

    async def _live(self, cut):
        """From power on to the cut, or to the end of all work."""
        board, console, far = self.board, self.console, self.far
        console.next_life()
        board.power_on(self._hear)
        self.phase = "starting"
        arrived = len(far.arrived)
        if cut and cut["early"]:
            self._arm(cut)
        await self._until(lambda: console.begun)
        if console.begun:
            self.boots_s.append(board.seconds)
            self.phase = "reaching the broker"
            await self._until(lambda: len(far.arrived) > arrived or console.done)
        if len(far.arrived) > arrived:
            self.connects_s.append(board.seconds)
            cycles, arrived = board.cycles, len(far.arrived)
            self.phase = "publishing"
            if cut and not cut["early"]:
                if cut["lose"] and not board.cut:
                    self.link_cuts += 1
                    self._say("%s lost after %.3f s" % (cut["lose"], board.seconds))
                    board.lose(cut["lose"])
                await self._until(lambda: (console.published + len(far.seen)) / 2 >= cut["at"] or console.done)
                self._arm(cut)
                waited = board.seconds
                await self._until(lambda: console.done or board.seconds > waited + _IDLE_S)
            else:
                await self._until(lambda: console.done)
            self.busy.append((board.cycles - cycles, len(far.arrived) - arrived))
        self.lives_s += board.seconds
        if cut:
            self._end(cut)

    def _arm(self, cut):
        if cut["flash"]:
            self.board.cut_at_operation(cut["operations"], cut["program"], cut["erase"], cut["seed"])
        else:
            self.board.cut_after(cut["seconds"])

    def _end(self, cut):
        board = self.board
        how = board.cut or ("while it had nothing to do" if self.console.done else "while it waited")
        self.cuts += 1
        self.flash_cuts += how.startswith("flash")
        self._say("power cut after %.3f s, %s" % (board.seconds, how))
        board.power_off(cut["hidden"])

    async def _until(self, check):
        """Let time pass until check() is true or the power has failed.  Raises Stuck."""
        board = self.board

        def looked():
            now = time.monotonic()
            if now - self._ticked > 0.2:
                self._ticked = now
                self._tick()
            news = self.console.last_line, len(self.far.arrived), self.console.life
            if self._news is None or self._news[0] != news:
                self._news = news, board.seconds, now
            elif board.seconds - self._news[1] > _STALL_S or now - self._news[2] > _STALL_HOST_S:
                raise Stuck(
                    "the board did not finish: in life %d nothing moved for %.0f s of its time; it last said %r"
                    % (self.console.life, board.seconds - self._news[1], self.console.last_line)
                )
            return check()

        await board.run(looked)

    def _hear(self, line):
        if self._log:
            self._log.write("%3d %9.4f %s\n" % (self.console.life, self.board.seconds, line))
        self.console.take(line)

    def _say(self, text):
        self._tell("%5.0f s  life %d  %s" % (time.monotonic() - self.began, self.console.life, text))

    # -- what came of it

    def verdict(self):
        """The figures as {name: (QoS 1, QoS 2) or one value}, the failures as a list of lines."""
        console, far, board = self.console, self.far, self.board
        arrived = far.arrived if far else []
        failures = [self.problem] if self.problem else []
        figures = {}
        for qos in (1, 2):
            # Odd ones go at QoS 1, even ones at QoS 2.
            mine = [n for n in arrived if n % 2 == qos % 2]
            found = tally(mine, range(qos, self.messages + 1, 2))
            for word in ("lost", "disordered", "unexpected") + (("duplicated",) if qos == 2 else ()):
                if found[word]:
                    failures.append("QoS %d: %s: %s" % (qos, word, _some(found[word])))
            figures.setdefault("delivered", []).append(len(set(mine)))
            for word in ("lost", "duplicated", "disordered"):
                figures.setdefault(word, []).append(len(found[word]))
        failures += ["unexpected: %s" % line for line in (far.strange[:3] if far else [])]
        failures += console.forgotten
        failures += ["traceback in " + line for line in console.tracebacks[:3]]
        if board and board.resets:
            failures.append("the board reset itself %d times" % board.resets)
        return figures, failures


def table_of(trial):
    """The closing table."""
    import emulator

    figures, _ = trial.verdict()
    board, console = trial.board, trial.console
    table = Table(title="What came through")
    table.add_column("")
    table.add_column("QoS 1", justify="right")
    table.add_column("QoS 2", justify="right")
    for name, (first, second) in figures.items():
        allowed = " (allowed)" if name == "duplicated" and first else ""
        table.add_row(name, "%d%s" % (first, allowed), "%d" % second)
    both = Table(show_header=False)
    both.add_column("")
    both.add_column("", justify="right")
    both.add_row("power cuts", "%d" % trial.cuts)
    both.add_row("  of them inside a flash operation", "%d" % trial.flash_cuts)
    both.add_row("link cuts", "%d" % trial.link_cuts)
    if console.took_us:
        cycles = sorted(us * (emulator.HZ // 1000000) for us in console.took_us)
        both.add_row("CPU cycles of a publish(): middle", "%d" % statistics.median(cycles))
        both.add_row("  mean", "%d" % statistics.mean(cycles))
        both.add_row("  longest", "%d" % cycles[-1])
    spent, messages = (sum(column) for column in zip(*trial.busy)) if trial.busy else (0, 0)
    if messages:
        both.add_row("CPU cycles of a message, radio driver and all", "%d" % (spent / messages))
    if board and console.published:
        both.add_row("page programs per message", "%.2f" % (board.programs / console.published))
        both.add_row("  bytes in them that are not 0xFF", "%.0f" % (board.bytes / console.published))
        both.add_row("sector erases per message", "%.3f" % (board.erases / console.published))
    if console.free:
        both.add_row("free heap: least, bytes", "%d" % min(console.free))
        both.add_row("  at the end", "%d" % console.free[-1])
    if trial.boots_s:
        both.add_row("power on to application: middle, s of the board", "%.2f" % statistics.median(trial.boots_s))
        both.add_row("  longest", "%.2f" % max(trial.boots_s))
    if trial.connects_s:
        both.add_row("power on to first message at the far side: middle", "%.2f" % statistics.median(trial.connects_s))
        both.add_row("  longest", "%.2f" % max(trial.connects_s))
    both.add_row("seconds of the board", "%.0f" % trial.lives_s)
    both.add_row("seconds", "%.0f" % trial.seconds)
    return table, both


def run(firmware, messages, cuts, seed, console, log=None):
    """Run a trial with progress on console; return it.  firmware: the bytes of a .uf2."""
    columns = (TextColumn("{task.description:<34}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        published = progress.add_task("published", total=messages)
        delivered = progress.add_task("delivered", total=messages)

        def tick():
            what = "life %d, %.2f s: %s" % (trial.console.life, trial.board.seconds, trial.phase)
            progress.update(published, completed=trial.console.published, description=what)
            progress.update(delivered, completed=len(trial.far.seen))

        def tell(text):
            console.print(text, markup=False, highlight=False, soft_wrap=True)

        trial = Trial(firmware, messages, cuts, seed, tell, tick)
        trial.run(log)
    return trial


def _ended(*_):
    raise KeyboardInterrupt


def main(arguments=None):
    parser = argparse.ArgumentParser(description="A Pico W's real firmware in an emulator, under power cuts.")
    parser.add_argument("firmware", nargs="?", help="a .uf2 of MicroPython for the Pico W; default: downloaded once")
    parser.add_argument("--messages", type=int, default=MESSAGES, metavar="N", help="default %(default)s")
    parser.add_argument("--cuts", type=int, default=CUTS, metavar="C", help="of power, default %(default)s")
    parser.add_argument("--seed", default=None, metavar="S", help="default: a new one")
    options = parser.parse_args(arguments)
    if not 2 <= options.messages <= 99999:
        parser.error("--messages: expected 2 to 99999")
    if not 0 <= options.cuts <= 1000:
        parser.error("--cuts: expected 0 to 1000")
    try:
        data = find_firmware(options.firmware)
    except NoFirmware as error:
        print("picow: %s" % error, file=sys.stderr)
        return 2
    seed = options.seed or str(random.randrange(1000000))
    console = Console()
    text = "SEED=%s  %s: %d messages, %d power cuts; a life takes half a minute and more"
    text %= seed, flash.version_of(data), options.messages, options.cuts
    console.print(text, highlight=False, soft_wrap=True)
    signal.signal(signal.SIGTERM, _ended)
    WORK.mkdir(parents=True, exist_ok=True)
    try:
        with open(WORK / "console.log", "w", buffering=1) as log:
            trial = run(data, options.messages, options.cuts, seed, console, log)
    except KeyboardInterrupt:
        console.print("stopped")
        return 130
    for table in table_of(trial):
        console.print(table)
    _, failures = trial.verdict()
    for line in failures:
        console.print("FAILED  " + line, markup=False, highlight=False, soft_wrap=True)
    if failures:
        console.print("SEED=%s, what the board said is in %s" % (seed, WORK / "console.log"), highlight=False)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
