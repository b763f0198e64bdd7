"""A deep backlog under power cuts, against a list: test_store_fuzz.py FIRST LAST runs more seeds, SEED replays one.

The ring is kept nearly full, so that the window is carried forward, the head is packed anew and publish() refuses, all
of it again and again; between mounts some messages are acknowledged.  After every mount all that publish() accepted and
nobody acknowledged is there, in order, readable, with the newest mark; what was acknowledged may come back only while
its DONE was still pending.

FIRST LAST 5 is the store of MQTT 5: messages have properties and expire, the broker refuses some and has no quota for
others, and one mount in four is with the store of 3.1.1.
"""

import sys

if __name__ == "__main__":
    HERE = sys.argv[0].rpartition("/")[0] or "."
    for name in ("tests", "lib", "tools", "tools/shim"):
        sys.path.insert(0, HERE + "/../" + name)
    import host

    host.install()

from norsim import MODES_ERASE, MODES_PROGRAM, Nor, PowerCut, Rng  # noqa: E402

from mqtt_durable.errors import JournalFull  # noqa: E402
from mqtt_durable.journal import Journal  # noqa: E402
from mqtt_durable.packet import PUBACK, PUBCOMP, PUBREC  # noqa: E402
from mqtt_durable.store import Store  # noqa: E402
from mqtt_durable.store5 import Store5  # noqa: E402

_ME = 7
_REL = 3
_QUICK = sys.implementation.name != "micropython"
_TOTALS = "published %d, full %d, cuts %d, mounts %d, refused, expired or postponed %d"


class Run:
    """One run.  .cuts, .mounts, .fulls, .published, .ended (refused, expired, postponed): how many there were."""

    def __init__(self, seed, version=3):
        rng = self.rng = Rng(seed)
        self.seed = seed
        self.version = version
        self.now = 1 << 30
        self.unit = (4, 4, 16, 256)[rng.below(4)]
        self.sectors = (4, 6, 16)[rng.below(3)] + (2 if self.unit == 256 else 0)
        self.window = (1, 4, 16, 64)[rng.below(4)]
        self.nor = Nor(self.sectors * 4096, self.unit)
        self.buf = memoryview(bytearray(768))
        self.cuts = self.mounts = self.fulls = self.published = self.ended = 0
        self.live = []  # numbers accepted and not acknowledged
        self.done = []  # numbers whose DONE may still be pending, newest last
        self.number = 0  # the next one
        self.trying = None  # the number that publish() has not returned from
        self.sent = set()  # packet identifiers of messages that have been sent
        self.released = {}  # packet identifier -> number of messages that had their PUBREC
        self.boot()

    def boot(self):
        journal = Journal(self.nor, self.unit, None, lambda n: b"\x11" * n)
        self.is5 = self.version == 5 and self.rng.below(4) > 0
        if self.is5:
            store = Store5(journal, self.window, "raise", self.finished, False, lambda: self.now)
        else:
            store = Store(journal, self.window)
        self.store = store
        store.open()
        self.mounts += 1
        if not store.identity:
            store.begin(_ME)
        self.number_of = {}
        self.check()
        self.connect()
        for packet_id in self.sent:
            if store._is_queued(packet_id):
                self.fail("message %d was sent, but would be sent again as new" % packet_id)

    def connect(self):
        self.store.connecting()
        if self.is5:
            self.store.limits(1 + self.rng.below(20), topic_alias_maximum=self.rng.below(3))
        self.store.connected(True, _ME)

    def finished(self, packet_id, result):
        if result is not True:  # refused or expired
            self.over(packet_id)
            self.ended += 1

    def over(self, packet_id):
        number = self.number_of.get(packet_id)
        if number is None:
            number = self.released[packet_id]
        self.done.append(number)
        self.live.remove(number)

    def fail(self, text):
        version = " %d 5" % (self.seed + 1) if self.version == 5 else ""
        raise AssertionError("test_store_fuzz.py %d%s: cut %d: %s" % (self.seed, version, self.cuts, text))

    def numbers(self):
        """The numbers of all messages that wait, read back from their records, in the order they would go out."""
        store = self.store
        session = store.session
        order = [(packet_id, session.out[packet_id]) for packet_id in reversed(session.order())]
        saved = store._cursor, store._taken
        while store.queued():
            pos = store._find()
            if pos < 0:
                self.fail("a queued message cannot be found")
            order.append((store._taken, pos << 2))
        store._cursor, store._taken = saved
        found = []
        for packet_id, where in order:
            if where & 3 == _REL:
                found.append(self.released.get(packet_id, -packet_id))
                continue
            size = store.journal.load(where >> 2)
            if not size:
                self.fail("message %d does not read back" % packet_id)
            body = bytearray(size - 8)
            store.journal.read(where >> 2, 4, body)
            number = int(bytes(body[-7:]))
            if bytes(body[-7 - number % 90 : -7]) != b"x" * (number % 90):
                self.fail("message %d holds something else" % packet_id)
            self.number_of[packet_id] = number
            found.append(number)
        return found

    def check(self):
        got = self.numbers()
        known = self.live + ([self.trying] if self.trying in got else [])
        if self.trying is not None:
            self.number = self.trying if self.trying in got else self.trying - 1
        back = [n for n in got if n not in known]
        if [n for n in got if n in known] != known:
            self.fail("missing %s" % [n for n in known if n not in got][:5])
        if [n for n in back if n not in self.done[-17:]]:
            self.fail("unexpected %s" % back[:5])
        if got != sorted(got):
            self.fail("out of order")
        if (self.store.mark or 0) != self.number:
            self.fail("mark %s, expected %d" % (self.store.mark, self.number))
        self.live = got
        self.trying = None

    def properties(self, number):
        found = {"content_type": "c" * (number % 11)} if number % 3 else {}
        if number % 4 == 0:
            found["message_expiry_interval"] = 20 + number % 50
        return found

    def step(self):
        rng = self.rng
        store = self.store
        if self.is5:
            self.now += 1
            if rng.below(4) == 0:
                store.retry()
        what = rng.below(100)
        if what < 55:
            for _ in range(1 + rng.below(24)):
                number = self.trying = self.number + 1
                payload = b"x" * (number % 90) + b"%07d" % number
                more = {"properties": self.properties(number)} if self.is5 else {}
                try:
                    packet_id = store.publish("readings/of/a/meter", payload, 1 + number % 2, mark=number, **more)
                except JournalFull:
                    self.trying = None
                    self.fulls += 1
                    break
                self.number = number
                self.number_of[packet_id] = number
                self.live.append(number)
                self.trying = None
                self.published += 1
        elif what < 92:
            for _ in range(1 + rng.below(4)):
                store.fill(self.buf, 0)
            for packet_id in store.session.out:
                if packet_id not in store._resend and packet_id != store._held_back:
                    self.sent.add(packet_id)
            for packet_id in list(reversed(store.session.order()))[: rng.below(9)]:
                if packet_id in store._resend or packet_id == store._held_back or store.rest:
                    break
                state = store.session.out[packet_id] & 3
                if self.is5:
                    if (store._taken - packet_id) % 65023 < (store._taken - store._sent_to) % 65023:
                        break
                    if packet_id in store._later:
                        continue
                    if state != _REL and rng.below(8) == 0:
                        reason = 0x97 if rng.below(2) else 0x87
                        store.on_ack(PUBACK if state == 1 else PUBREC, packet_id, reason)
                        self.ended += reason == 0x97
                        continue
                if state == 2:
                    self.released[packet_id] = self.number_of.get(packet_id)
                    store.on_ack(PUBREC, packet_id)
                    continue
                self.over(packet_id)
                store.on_ack(PUBACK if state == 1 else PUBCOMP, packet_id)
        elif what < 95:
            store.commit()
        elif what < 97:
            store.journal.idle()
        elif what < 98:
            store.close()
        else:
            store.disconnected()
            self.connect()

    def steps(self, n):
        rng = self.rng
        for _ in range(n):
            cut = rng.below(6) == 0
            if cut:
                self.nor.cut_after(
                    1 + rng.below(20),
                    MODES_PROGRAM[rng.below(len(MODES_PROGRAM))],
                    MODES_ERASE[rng.below(len(MODES_ERASE))],
                    rng.next(),
                )
            try:
                self.step()
                if rng.below(40) == 0:
                    self.nor.power_on()
                    self.boot()
            except PowerCut:
                self.cuts += 1
                while True:
                    self.nor.power_on()
                    if rng.below(4) == 0:
                        self.nor.cut_after(1 + rng.below(4), "bits", "mixed", rng.next())
                    try:
                        self.boot()
                        break
                    except PowerCut:
                        self.cuts += 1
            self.nor.power_on()


def run(first, last, steps, version=3):
    """Run the seeds first..last-1; return their totals."""
    totals = [0, 0, 0, 0, 0]
    for seed in range(first, last):
        one = Run(seed, version)
        try:
            one.steps(steps)
        except AssertionError:
            raise
        except Exception as e:
            sys.print_exception(e)
            one.fail("%s: %s" % (type(e).__name__, e))
        for i, n in enumerate((one.published, one.fulls, one.cuts, one.mounts, one.ended)):
            totals[i] += n
    return totals


def test_a_deep_backlog_survives_any_cut():
    totals = run(0, 24 if _QUICK else 6, 400)
    print(_TOTALS % tuple(totals))
    assert min(totals[:4]) > 0


def test_a_deep_backlog_of_mqtt_5_survives_any_cut():
    totals = run(0, 12 if _QUICK else 3, 400, 5)
    print(_TOTALS % tuple(totals))
    assert min(totals) > 0


if __name__ == "__main__":
    first = int(sys.argv[1])
    last = int(sys.argv[2]) if len(sys.argv) > 2 else first + 1
    version = int(sys.argv[3]) if len(sys.argv) > 3 else 3
    print(_TOTALS % tuple(run(first, last, 400, version)))
