"""The smallest owner a journal can have, for its tests and for the fuzzer: numbered entries, added and removed.

Entry k's content is made from k, so every payload can be checked when it is read back.
"""

from struct import pack, unpack_from

from mqtt_durable.journal import Journal

_ADD = 0x10  # number u32, content
_REMOVE = 0x20  # number u32
_KEEP = 0x30  # the first number behind the window, then those in it, u32: all below the first that are live

_BYTES = bytes(range(256)) * 17


def content(number, size):
    """The bytes of an entry; size: 0-4096."""
    at = number * 37 & 255
    return _BYTES[at : at + size]


class Ledger:
    """Mounts the journal of device at once.

    window: so many of the oldest entries may be moved, the order of all behind them must stay (None: no such limit).
    urandom: makes the journal's id; a fixed one as a rule, so that runs repeat.
    """

    def __init__(self, device, prog_size=4, size=None, window=None, urandom=lambda n: b"\x5a" * n):
        self.journal = Journal(device, prog_size, size, urandom)
        self.window = window
        self.mount()

    def mount(self):
        self.where = {}  # number -> position
        self.count = 0  # 1 + the newest number ever added, kept in the state
        self.journal.mount(self)

    def format(self):
        self.where = {}
        self.count = 0
        self.journal.format(self)

    def add(self, number, size, reserve=0):
        pos = self.journal.append(_ADD, (pack("<I", number), content(number, size)), reserve)
        self.where[number] = pos
        self.count = number + 1

    def remove(self, number):
        self.journal.append(_REMOVE, (pack("<I", number),))
        del self.where[number]

    def check(self):
        """Read every live entry back; return {number: size}."""
        journal = self.journal
        found = {}
        for number, pos in self.where.items():
            size = journal.load(pos)
            if not size:
                raise AssertionError("entry %d does not read back" % number)
            body = bytearray(size - 8)
            journal.read(pos, 4, body)
            if unpack_from("<I", body)[0] != number or bytes(body[4:]) != content(number, size - 12):
                raise AssertionError("entry %d holds something else" % number)
            found[number] = size - 12
        ages = [(journal.seq_of(self.where[n]), self.where[n]) for n in self._waiting()]
        if ages != sorted(ages):
            raise AssertionError("the order of the entries behind the window has changed")
        return found

    def _waiting(self):
        return [] if self.window is None else sorted(self.where)[self.window :]

    # -- what the journal asks of its owner

    def replay(self, kind, pos):
        number = unpack_from("<I", self.journal.buf, 4)[0]
        if kind == _ADD:
            self.where[number] = pos
            self.count = max(self.count, number + 1)
        elif kind == _KEEP:
            body = bytearray(self.journal.load(pos) - 8)
            self.journal.read(pos, 4, body)
            keep = unpack_from("<%dI" % (len(body) // 4), body)
            self.where = {n: at for n, at in self.where.items() if n >= keep[0] or n in keep}
        else:
            self.where.pop(number, None)

    def restore(self, state):
        self.count = max(self.count, unpack_from("<I", state)[0])

    def state(self):
        return pack("<I", self.count)

    def _kept(self):
        waiting = self._waiting()
        first = waiting[0] if waiting else self.count
        return [first] + [n for n in self.where if n < first]

    def _in(self, sector):
        return sorted(n for n, pos in self.where.items() if pos >> 12 == sector)

    def live(self, sector, whole):
        size = self.journal.room_for(4 * len(self._kept())) if whole else 0
        here = self._in(sector)
        if here and not whole and self.window is not None and here[-1] in self._waiting():
            return -1
        for number in here:
            size += self.journal.room_for(self.journal.load(self.where[number]) - 8)
        return size

    def carry(self, sector, whole):
        if whole:
            self.journal.append(_KEEP, [pack("<I", number) for number in self._kept()])
        for number in self._in(sector):
            self.where[number] = self.journal.copy(self.where[number])

    def oldest(self):
        seqs = [self.journal.seq_of(pos) for pos in self.where.values()]
        return min(seqs) if seqs else None
