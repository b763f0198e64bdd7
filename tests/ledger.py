"""The smallest owner a journal can have, for its tests and for the fuzzer: numbered entries, added and removed.

Entry k's content is made from k, so every payload can be checked when it is read back.
"""

from struct import pack, unpack_from

import mqtt_durable.mount  # noqa: F401 - thousands of mounts: what is loaded stays loaded, see once.py
from mqtt_durable.journal import Journal

_ADD = 0x10  # number u32, content
_REMOVE = 0x20  # number u32
_NOWHERE = 0xFFFFFFFF

_BYTES = bytes(range(256)) * 17


def content(number, size):
    """The bytes of an entry; size: 0-4096."""
    at = number * 37 & 255
    return _BYTES[at : at + size]


class Ledger:
    """Mounts the journal of device at once.

    window: so many of the oldest entries may be moved and removed; those behind them wait in order on flash and are
    found by a cursor (None: no such limit, up to 80 entries).
    urandom: makes the journal's id; a fixed one as a rule, so that runs repeat.
    """

    def __init__(self, device, prog_size=4, size=None, window=None, urandom=lambda n: b"\x5a" * n):
        self.journal = Journal(device, prog_size, size, urandom)
        self.window = window
        self.max_state = 16 + 8 * (window or 44)
        self.mount()

    def mount(self):
        self.journal.mount(self)
        self._refill()

    def format(self):
        self.restore(b"")
        self.journal.format(self)

    def add(self, number, size, reserve=0):
        pos = self.journal.append(_ADD, (pack("<I", number), content(number, size)), reserve)
        if self.first == self.count and (self.window is None or len(self.where) < self.window):
            self.where[number] = pos
            self.first = self.count = number + 1
        else:
            self._added(number, pos)

    def remove(self, number):
        self.journal.append(_REMOVE, (pack("<I", number),))
        del self.where[number]
        self._refill()

    def check(self):
        """Read every live entry back; return {number: size}."""
        found = {number: self._read(number, pos) for number, pos in self.where.items()}
        journal = self.journal
        pos = self.cursor
        for number in range(self.first, self.count):
            while True:
                pos = journal.next(pos) if pos >= 0 else -1
                if pos < 0:
                    raise AssertionError("entry %d cannot be found" % number)
                at = pos
                kind, other = journal.buf[0], unpack_from("<I", journal.buf, 4)[0]
                pos = journal.behind(pos)
                if kind == _ADD and other >= number:
                    break
            if other != number:
                raise AssertionError("entry %d stands where %d is expected" % (other, number))
            found[number] = self._read(number, at)
        return found

    def _read(self, number, pos):
        journal = self.journal
        size = journal.load(pos)
        if not size:
            raise AssertionError("entry %d does not read back" % number)
        body = bytearray(size - 8)
        journal.read(pos, 4, body)
        if unpack_from("<I", body)[0] != number or bytes(body[4:]) != content(number, size - 12):
            raise AssertionError("entry %d holds something else" % number)
        return size - 12

    # -- the queue: entries first to count - 1, from the cursor on

    def _added(self, number, pos):
        if self.first == self.count:
            self.first = number  # whatever was between is gone
            self.cursor = pos
        self.count = number + 1

    def _refill(self, upto=-1):
        """Take queued entries in while the window has room, or up to that one."""
        journal = self.journal
        while self.first < self.count and (self.window is None or len(self.where) < self.window or self.first <= upto):
            pos = journal.next(self.cursor) if self.cursor >= 0 else -1
            if pos < 0:
                self.first = self.count
                return
            number = unpack_from("<I", journal.buf, 4)[0]
            self.cursor = journal.behind(pos)
            if journal.load(pos) and journal.buf[0] == _ADD and self.first <= number < self.count:
                self.where[number] = pos
                self.first = number + 1

    # -- what the journal asks of its owner

    def restore(self, state):
        self.where = {}  # number -> position
        self.count = 0  # 1 + the newest number ever added
        self.first = 0  # the oldest in the queue
        self.cursor = -1
        if state:
            self.count, self.first, cursor, n = unpack_from("<IIII", state)
            self.cursor = -1 if cursor == _NOWHERE else cursor
            for i in range(n):
                number, pos = unpack_from("<II", state, 16 + 8 * i)
                self.where[number] = pos

    def state(self):
        parts = [pack("<IIII", self.count, self.first, self.cursor & _NOWHERE, len(self.where))]
        return b"".join(parts + [pack("<II", number, pos) for number, pos in self.where.items()])

    def state_size(self):
        return 16 + 8 * len(self.where)

    def replay(self, kind, pos):
        number = unpack_from("<I", self.journal.buf, 4)[0]
        if kind == _ADD:
            if number >= self.count:
                self._added(number, pos)
                if self.window is None or self.first == number and len(self.where) < self.window:
                    self._refill()
            elif number < self.first:
                self.where[number] = pos
        else:
            self._refill(number)
            self.where.pop(number, None)

    def moved(self, kind, body):
        if kind == _ADD:
            number = unpack_from("<I", body)[0]
            if self.first <= number == self.count - 1:
                self.count = number
            self.where.pop(number, None)
        return body

    def _in(self, sector, whole):
        found = sorted(pos for pos in self.where.values() if pos >> 12 == sector)
        if whole and self.first < self.count:
            journal = self.journal
            pos = self.cursor if self.cursor >> 12 == sector else journal.start_of(sector)
            while pos >= 0 and pos >> 12 == sector:
                pos = journal.next(pos)
                if pos < 0 or pos >> 12 != sector:
                    break
                behind = journal.behind(pos)
                number = unpack_from("<I", journal.buf, 4)[0]
                if journal.buf[0] == _ADD and self.first <= number < self.count and pos not in found:
                    found.append(pos)
                pos = behind
        return found

    def live(self, sector, whole):
        journal = self.journal
        if not whole and self.first < self.count:
            if self.cursor >> 12 == sector:
                self.cursor = journal.next(self.cursor)
            if self.cursor >> 12 == sector:
                return -1
        return sum([journal.room_for(journal.load(pos) - 8) for pos in self._in(sector, whole)])

    def carry(self, sector, whole):
        moved = {}
        for pos in self._in(sector, whole):
            moved[pos] = self.journal.copy(pos)
        for number in list(self.where):
            self.where[number] = moved.get(self.where[number], self.where[number])
        if self.first < self.count and self.cursor >> 12 == sector:
            self.cursor = self.journal.start_of(self.journal.head)

    def oldest(self):
        places = list(self.where.values())
        if self.first < self.count:
            places.append(self.cursor)
        seqs = [self.journal.seq_of(pos) for pos in places]
        return min(seqs) if seqs else None
