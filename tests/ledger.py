"""The smallest owner a journal can have, for its tests and for the fuzzer: numbered entries, added and removed.

Entry k's content is made from k, so every payload can be checked when it is read back.
"""

from struct import pack, unpack_from

from mqtt_durable.journal import Journal

_ADD = 0x10  # number u32, content
_REMOVE = 0x20  # number u32
_KEEP = 0x30  # numbers u32 of all entries that are live


def content(number, size):
    return bytes((number * 7 + i * (number | 1)) & 255 for i in range(size))


class Ledger:
    """journal: mounted at once.  queued: entries above this number must keep their order and are never carried."""

    def __init__(self, device, prog_size=4, size=None):
        self.journal = Journal(device, prog_size, size, lambda n: b"\x5a" * n)  # a fixed id, so that runs repeat
        self.where = {}  # number -> position
        self.count = 0  # 1 + the newest number ever added, kept in the state
        self.queued = None
        self.journal.mount(self)

    def add(self, number, size, reserve=0):
        pos = self.journal.append(_ADD, (pack("<I", number), content(number, size)), reserve)
        self.where[number] = pos
        self.count = number + 1

    def remove(self, number):
        self.journal.append(_REMOVE, (pack("<I", number),))
        del self.where[number]

    def check(self):
        """Read every live entry back; return {number: size}."""
        found = {}
        for number, pos in self.where.items():
            size = self.journal.load(pos)
            if not size:
                raise AssertionError("entry %d does not read back" % number)
            body = bytearray(size - 8)
            self.journal.read(pos, 4, body)
            if unpack_from("<I", body)[0] != number or bytes(body[4:]) != content(number, size - 12):
                raise AssertionError("entry %d holds something else" % number)
            found[number] = size - 12
        return found

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
            self.where = {n: at for n, at in self.where.items() if n in keep}
        else:
            self.where.pop(number, None)

    def restore(self, state):
        self.count = max(self.count, unpack_from("<I", state)[0])

    def state(self):
        return pack("<I", self.count)

    def _in(self, sector):
        return sorted(n for n, pos in self.where.items() if pos >> 12 == sector)

    def live(self, sector, whole):
        size = self.journal.room_for(4 * len(self.where)) if whole else 0
        for number in self._in(sector):
            if self.queued is not None and number >= self.queued and not whole:
                return -1
            size += self.journal.room_for(self.journal.load(self.where[number]) - 8)
        return size

    def carry(self, sector, whole):
        if whole:
            self.journal.append(_KEEP, [pack("<I", number) for number in self.where])
        for number in self._in(sector):
            self.where[number] = self.journal.copy(self.where[number])

    def oldest(self):
        seqs = [self.journal.seq_of(pos) for pos in self.where.values()]
        return min(seqs) if seqs else None
