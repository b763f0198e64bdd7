"""Power cuts at random operations of a journal: journal_fuzz.py [--seeds FIRST LAST | ID ...]

A run is named by its id, unit:seed ("16:1015"; "sealed:7" is an encrypted partition, its unit 16), which replays it on
CPython and on MicroPython.  The seed picks the
sectors, the sizes of the entries, whether the journal is kept full, and for each cut the operation it hits and what it
leaves: programs and erases half done in every way the simulator knows, cells that read at random from then on, many
or very few of them, with 256-byte units a whole page ruined; and again during the mounts that follow.

After each cut the journal is what it was before or after the operation that was cut; mounting what is then on the
flash gives the same again, whatever the unstable cells read as; every entry reads back; the entries that may not be
moved are in order.  Between the cuts: adding never harms, "full" programs nothing, removing always has room.
"""

import sys

if __name__ == "__main__":
    HERE = sys.argv[0].rpartition("/")[0] or "."
    for name in ("tests", "lib", "tools", "tools/shim"):
        sys.path.insert(0, HERE + "/../" + name)
    import host

    host.install()

from ledger import Ledger  # noqa: E402
from norsim import MODES_ERASE, MODES_PROGRAM, Encrypted, Nor, PowerCut, Rng  # noqa: E402

from mqtt_durable.errors import JournalFull  # noqa: E402

SEALED = "sealed"  # in place of a unit
UNITS = (4, 16, 256, SEALED)
_SIZES = (0, 5, 40, 72, 72, 72, 200, 236, 300, 300, 520, 700)
_NEVER = 1 << 30


class Mismatch(Exception):
    """A promise was broken.  The argument begins with the id that replays it."""


class Chip(Nor):
    """A Nor that can be copied, and whose cuts may leave only a few weak bits.

    With many of them a torn record always reads torn; with one it reads whole every other time.
    """

    few = 0  # how many bits of the next cut are weak; 0: as many as Nor makes
    ruined = 0  # cuts that ruined a page which held a record already

    def _fail(self, note, start, end, sector):
        if self.few:
            rng = Rng(self._plan[2] + 2)
            new = [at for at in sorted(self._weak) if start <= at < end]
            keep = [new[rng.below(len(new))] for _ in range(self.few)] if new else ()
            for at in new:
                mask = self._weak.pop(at)
                bit = 1 << rng.below(8)
                while at in keep and not mask & bit:
                    bit = 1 << rng.below(8)
                if at in keep:
                    self._weak[at] = bit
        super()._fail(note, start, end, sector)

    def _torn_program(self, start, end, old, new, buf):
        if self._plan[4] and old != b"\xff" * len(old) and bytes(buf) != bytes(len(buf)):
            self.ruined += 1
        super()._torn_program(start, end, old, new, buf)

    def copy(self, seed):
        """The same cells, weak ones too, which read differently there."""
        other = Chip(self.size, self.prog_size)
        other.mem[:] = self.mem
        other._weak = dict(self._weak)
        other._weak_at = list(self._weak_at)
        other._noise = Rng(seed)
        return other


class Run:
    """One run.  .cuts: how many cuts it has had; .mounts, .fulls, .formats, .nested, .tolerated likewise."""

    def __init__(self, unit, seed):
        self.id = "%s:%d" % (unit, seed)
        self.sealed = unit == SEALED
        rng = self.rng = Rng(seed * 8 + (1 if self.sealed else unit))
        self.unit = 16 if self.sealed else unit
        self.sectors = (4, 4, 5, 6, 8, 16)[rng.below(6)]
        self.weak = rng.below(4) > 0
        self.damage = unit == 256 and rng.below(2) == 0
        self.window = (None, None, 2, 5)[rng.below(4)]  # with a window the journal is kept nearly full
        self.most = 5 + rng.below(40)  # entries, without a window
        self.serial = 0
        self.cuts = self.nested = self.mounts = self.fulls = self.formats = self.closes = self.tolerated = 0
        self.chip = Chip(self.sectors * 4096, self.unit)
        self.model = {}
        self.count = 0
        self.past = [({}, 0)]  # the states before, newest first
        self.led = self._mounted(self.chip)

    def _mounted(self, chip):
        def urandom(n):
            self.serial += 1
            return bytes((self.serial & 255, self.serial >> 8, 7, 7))

        self.mounts += 1
        device = Encrypted(chip) if self.sealed else chip
        return Ledger(device, self.unit, window=self.window, urandom=urandom)

    def _fail(self, text):
        raise Mismatch("journal_fuzz %s: cut %d: %s" % (self.id, self.cuts, text))

    def _plan_cut(self, most):
        rng = self.rng
        chip = self.chip
        chip.few = (0, 0, 1, 1, 2, 4)[rng.below(6)]
        chip.cut_after(
            1 + rng.below(most),
            MODES_PROGRAM[rng.below(len(MODES_PROGRAM))],
            MODES_ERASE[rng.below(len(MODES_ERASE))],
            rng.next(),
            self.weak and rng.below(8) > 0,
            self.damage and rng.below(2) == 0,
        )

    def steps(self, n):
        """Go on for n bursts of operations, most of them cut short."""
        for _ in range(n):
            self.step()

    def step(self):
        rng = self.rng
        if rng.below(10) < 6:
            self._plan_cut((2, 3, 8, 30)[rng.below(4)])
        self.before = self.model, self.count  # what a cut may go back to
        try:
            for _ in range(1 + rng.below(12)):
                self._operate()
            if rng.below(8) == 0:
                self.chip.power_on()
                self.after = self.model, self.count
                self._mount()
        except PowerCut:
            self.cuts += 1
            self._mount()
        self.chip.power_on()

    def _operate(self):
        """One operation.  Sets before and after first; model and count when it is done."""
        rng = self.rng
        led = self.led
        model = dict(self.model)
        count = self.count
        self.before = self.after = self.model, self.count
        what = rng.below(100)
        if what < 3:
            led.journal.idle()
        elif what < 5:
            led.journal.close()
            self.closes += 1
        elif what == 5 and rng.below(20) == 0:
            self.after = {}, 0
            led.format()
            self.formats += 1
        elif model and (what < 45 or self.window is None and len(model) > self.most):
            oldest = sorted(model)
            number = oldest[rng.below(min(len(oldest), self.window or _NEVER)) if rng.below(3) else 0]
            del model[number]
            self.after = model, count
            try:
                led.remove(number)
            except JournalFull:
                self._fail("no room to remove an entry")
        else:
            number = count
            size = _SIZES[rng.below(len(_SIZES))]
            if rng.below(40) == 0:
                size = rng.below(led.journal.max_body - 4)
            model[number] = size
            self.after = model, count + 1
            ops = self.chip.ops
            try:
                led.add(number, size, 1)
            except JournalFull:
                self.fulls += 1
                self.after = self.before
                if self.chip.ops > ops + 2:  # OPEN behind a CLOSE is all that may be programmed, perhaps on two pages
                    self._fail("full, but %d operations" % (self.chip.ops - ops))
        if self.after != self.before:
            self.past = [self.after] + self.past[:5]
        self.before = self.model, self.count = self.after

    def _mount(self):
        """Mount after the power came back, perhaps to lose it again; then see what is there."""
        rng = self.rng
        allowed = [self.before, self.after]
        ruined = self.chip.ruined
        first = True
        while True:
            self.chip.power_on()
            if rng.below(10) < 4:
                self._plan_cut((1, 2, 3, 6)[rng.below(4)])
                if not first:
                    self.nested += 1
            try:
                led = self._mounted(self.chip)
                break
            except PowerCut:
                first = False
                self.cuts += 1
        self.chip.power_on()
        got = self._check(led)
        ruined = self.chip.ruined - ruined
        if got not in allowed and ruined and got in self.past[: 1 + ruined]:
            # A full journal has no room for a copy of its last record, see FORMAT.md.
            self.tolerated += 1
            self.past = self.past[self.past.index(got) :]
        elif got not in allowed:
            near = allowed[1][0]
            self._fail(
                "%s; mounted %d entries, missing %s, unexpected %s, count %d of %d"
                % (
                    self.chip.cut_note,
                    len(got[0]),
                    sorted(n for n in near if n not in got[0]),
                    sorted(n for n in got[0] if n not in near),
                    got[1],
                    allowed[1][1],
                )
            )
        self.led = led
        self.model, self.count = got
        if got != self.past[0]:
            self.past = [got] + self.past
        if self.chip.weak_cells:
            for seed in (1, 2):
                self._compare(self._mounted(self.chip.copy(rng.next() + seed)))
        if rng.below(4) == 0:
            self.led = self._mounted(self.chip)
            self._compare(self.led)

    def _check(self, led):
        try:
            return led.check(), led.count
        except AssertionError as e:
            self._fail("%s; %s" % (self.chip.cut_note, e))

    def _compare(self, led):
        got = self._check(led)
        if got != (self.model, self.count):
            other = set(got[0]).symmetric_difference(set(self.model))
            self._fail("%s; mounted again, entries %s differ" % (self.chip.cut_note, sorted(other)))

    def spread(self):
        """How far apart the erases of the sectors are."""
        return max(self.chip.erases) - min(self.chip.erases)


_TOTALS = ("cuts", "nested", "mounts", "fulls", "formats", "closes", "tolerated")


def run(unit, seed, steps=120):
    """Do one run and return it.  Raises Mismatch; what else is raised is given the id."""
    one = Run(unit, seed)
    try:
        one.steps(steps)
    except Mismatch:
        raise
    except Exception as e:
        if not hasattr(sys, "print_exception"):
            raise
        sys.print_exception(e)
        one._fail("%s: %s" % (type(e).__name__, e))
    return one


def run_seeds(first, last, steps=120, report=None):
    """Do the runs of the seeds first..last-1 with all units; return the totals."""
    totals = dict((name, 0) for name in _TOTALS)
    totals["runs"] = totals["spread"] = 0
    for seed in range(first, last):
        for unit in UNITS:
            one = run(unit, seed, steps)
            for name in _TOTALS:
                totals[name] += getattr(one, name)
            totals["runs"] += 1
            totals["spread"] = max(totals["spread"], one.spread())
        if report:
            report(seed, totals)
    return totals


def main(arguments):
    import time

    start = time.time()
    bad = []
    totals = None

    def add(one):
        for name in one:
            if name == "spread":
                totals[name] = max(totals.get(name, 0), one[name])
            else:
                totals[name] = totals.get(name, 0) + one[name]

    totals = {}
    if arguments and arguments[0] == "--seeds":
        ids = [(unit, seed) for seed in range(int(arguments[1]), int(arguments[2])) for unit in UNITS]
    else:
        words = [word.split(":") for word in arguments]
        ids = [(unit if unit == SEALED else int(unit), int(seed)) for unit, seed in words]
    for i, (unit, seed) in enumerate(ids):
        try:
            one = run(unit, seed)
            add(dict((name, getattr(one, name)) for name in _TOTALS))
            add({"runs": 1, "spread": one.spread()})
        except Mismatch as e:
            bad.append(e)
            print(e)
        if i % 100 == 99:
            print("%d of %d runs, %d failed: %s, %d s" % (i + 1, len(ids), len(bad), totals, time.time() - start))
    print("%d runs, %d failed: %s, %d s" % (len(ids), len(bad), totals, time.time() - start))
    return 1 if bad or not ids else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
