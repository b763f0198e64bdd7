"""A ring of checksummed records over a NOR block device; knows nothing of MQTT.  FORMAT.md has every byte.

Owns where records lie, which sector is next, and what a power cut may have left behind.  The meaning of a record, and
whether it is still live, belong to the owner (the store).  append() returns when the record is programmed: from then on
it survives power loss.  Exactly one record is programmed at a time, its CRC last, so a cut leaves at most one record in
doubt; mount() settles that doubt for good before it returns.

The owner has six methods:
    replay(kind, pos)   one valid record, oldest first; journal.buf holds its first 256 bytes, body from 4 on
    restore(state)      a sector's opening snapshot, in its place among the records
    state()             the bytes of such a snapshot, at most 48
    live(sector, whole) the bytes that carry() of the same will take at most (see room_for), or -1: the order of the
                        records there must not change, so the sector cannot be given up.  whole is asked of older
                        sectors, too: what it would take to pack anew the sector that they were carried to
    carry(sector, whole) append() or copy() what is live in that sector.  whole: it is the newest, so its order is
                        kept and -1 is not allowed; but what its records say about older sectors must be said again
    oldest()            lowest seq of the sectors that hold anything live, or None
A position (pos) is sector << 12 | offset.
"""

from array import array
from binascii import crc32
from struct import pack_into, unpack_from
import os

from micropython import const

from .errors import JournalCorrupt, JournalFull, JournalUnavailable

_SECTOR = const(4096)  # erase size of every supported part
_PAGE = const(256)  # one program call stays inside one page: a cut tears one page at most
_MAGIC = const(0x4A4D)  # "MJ"
_VERSION = const(1)
_HEADER = const(16)
_OVERHEAD = const(8)  # record header 4, CRC 4
_STATE = const(48)

# Kinds below 0x80 have a body of arg bytes; the others have none and arg is a number of their own.
_TAIL = const(0x60)  # ends a sector's copies: oldest seq u32, replaced seq u32, the owner's state
_CLOSE = const(0xF0)  # orderly shutdown; arg: 1 + the sector erased ahead, or 0
_OPEN = const(0xF1)  # says nothing itself; behind a CLOSE: more was begun, behind a TAIL: the sector counts
_LAPS = const(4)  # most sectors one append may use up: bounds the write amplification


class Journal:
    """device: a block device with 4096-byte erase blocks (readblocks, writeblocks with offset, ioctl 4-6).

    prog_size: 4, 16 or 256 bytes, the unit every record is padded to; not below what the device can program.
    size: bytes of the device to use, a multiple of 4096, at least 16384; None: all of it.
    urandom: makes the journal's id, urandom(4).
    Raises ValueError for a bad argument, JournalUnavailable if the device cannot serve.

    RAM: two 256-byte pages and 4 bytes a sector; it does not grow with what is stored.
    After an OSError from the device the journal refuses to append until mount() has been called again.
    """

    def __init__(self, device, prog_size=4, size=None, urandom=os.urandom):
        if prog_size not in (4, 16, 256):
            raise ValueError("prog_size: found %r, expected 4, 16 or 256" % (prog_size,))
        if device.ioctl(5, 0) != _SECTOR:
            raise JournalUnavailable("the journal needs erase blocks of 4096 bytes")
        count = device.ioctl(4, 0)
        if size is not None:
            if size % _SECTOR or not 4 * _SECTOR <= size <= count * _SECTOR:
                raise ValueError(
                    "journal size: found %d, expected a multiple of 4096 within 16384-%d" % (size, count * _SECTOR)
                )
            count = size // _SECTOR
        if count < 4:
            raise JournalUnavailable("the journal needs at least 4 erase blocks, the device has %d" % count)
        self._device = device
        self._urandom = urandom
        self._prog_size = self._unit = prog_size
        self.sectors = count
        self._seqs = array("I", bytes(4 * count))  # 0: no header to be trusted
        self.buf = memoryview(bytearray(_PAGE))  # what load() read
        self._page = memoryview(bytearray(b"\xff" * _PAGE))  # what is being programmed; blank in between
        self._from = 0  # bytes _from.._to of the page wait to be programmed
        self._to = 0
        self._head = count - 1  # sector being filled; a new journal begins behind it
        self._off = _SECTOR  # next free byte in it
        self._id = 0
        self._seed_seq = -1
        self._seed_crc = 0
        self._ready = -1  # sector erased ahead, header programmed
        self._oldest = 1  # lower seqs hold nothing live
        self._tight = True  # nothing is known of the sectors that a record with reserve leaves to be given up
        self._replaced = -1  # sector that the head was packed anew from, its header still whole
        self._usable = False
        self._carrying = False  # the owner's carry() is under way: what it appends has room in the head
        self._torn = False  # what copy() read does not pass its checksum
        self._closed = False
        self._next_seq = 1
        self.fresh = False  # mount() found no journal and made one
        self.damaged = 0  # records that no longer pass their checksum
        self.erases = 0  # since the start of this program
        self._owner = None

    # -- geometry

    def _pad(self, n):
        return (n + self._unit - 1) & -self._unit

    @property
    def max_body(self):
        """Bytes of the largest record body."""
        return self.room - self.room_for(8 + _STATE) - _OVERHEAD

    @property
    def room(self):
        """Bytes of a sector that records can take."""
        return _SECTOR - self._pad(_HEADER)

    def room_for(self, n):
        """Bytes that a record with a body of n bytes takes."""
        return self._pad(_OVERHEAD + n)

    @property
    def usable(self):
        """False before mount() and after the device has failed."""
        return self._usable

    @property
    def head(self):
        """The sector being filled."""
        return self._head

    @property
    def seq(self):
        """Age of the newest sector: about the number of erases over the journal's life."""
        return self._seqs[self._head]

    def seq_of(self, pos):
        """Age of the sector that pos lies in."""
        return self._seqs[pos >> 12]

    def _seed(self, sector):
        """Records are checksummed with their sector's seq and journal id, so that a stale one never passes."""
        seq = self._seqs[sector]
        if seq != self._seed_seq:
            head = bytearray(8)
            pack_into("<II", head, 0, seq, self._id)
            self._seed_crc = crc32(head) & 0x3FFFFFFF
            self._seed_seq = seq
        return self._seed_crc

    def _by_age(self):
        """All sectors: the one erased ahead, those without a header in ring order behind the head, then by age."""
        head = self._head
        count = self.sectors

        def age(s):
            return -1 - count if s == self._ready else self._seqs[s] or (s - head - 1) % count - count

        return sorted(range(count), key=age)

    # -- reading

    def load(self, pos):
        """Read and check the record at pos; its first bytes are then in self.buf.  Return its size, 0 if invalid."""
        sector = pos >> 12
        off = pos & 0xFFF
        buf = self.buf
        n = _SECTOR - off
        if n > _PAGE:
            n = _PAGE
        self._device.readblocks(sector, buf[:n], off)
        kind = buf[0]
        if buf[1] != kind ^ buf[2] ^ buf[3] ^ 0xA5:
            return 0
        stop = 4 + (buf[2] | buf[3] << 8 if kind < 0x80 else 0)
        if off + stop + 4 > _SECTOR:
            return 0
        crc = self._seed(sector)
        if stop + 4 <= n:
            crc = crc32(buf[:stop], crc)
            last = buf[stop : stop + 4]
        else:
            crc = crc32(buf[: min(n, stop)], crc)
            more = memoryview(bytearray(_PAGE))
            while n < stop:
                k = min(_PAGE, stop - n)
                self._device.readblocks(sector, more[:k], off + n)
                crc = crc32(more[:k], crc)
                n += k
            last = more[:4]
            self._device.readblocks(sector, last, off + stop)
        if crc != unpack_from("<I", last)[0]:
            return 0
        self._crc = crc
        return stop + 4

    def read(self, pos, skip, buf):
        """Fill buf from the record at pos, from byte skip of the record on.  Not checked again: load() did that."""
        self._device.readblocks(pos >> 12, buf, (pos & 0xFFF) + skip)

    def start_of(self, sector):
        """The position of the first record of a sector."""
        return sector << 12 | self._pad(_HEADER)

    def _after(self, seq):
        """The sector with the lowest seq above seq, or -1."""
        best = -1
        for s in range(self.sectors):
            if self._seqs[s] > seq and (best < 0 or self._seqs[s] < self._seqs[best]):
                best = s
        return best

    def next(self, pos):
        """Return the position of the first valid record at pos or behind it, loaded into self.buf; -1 at the end."""
        while True:
            sector = pos >> 12
            stop = self._off if sector == self._head else _SECTOR
            off = pos & 0xFFF
            while off < stop:
                size = self.load(sector << 12 | off)
                if size:
                    return sector << 12 | off
                off += self._gap(off)
            if sector == self._head:
                return -1
            sector = self._after(self._seqs[sector])
            pos = self.start_of(sector)

    def behind(self, pos):
        """The position behind the record at pos, which is the one loaded last; -1 at the end of the newest sector."""
        size = _OVERHEAD + (self.buf[2] | self.buf[3] << 8 if self.buf[0] < 0x80 else 0)
        end = (pos & 0xFFF) + self._pad(size)
        if end < _SECTOR:
            return pos & ~0xFFF | end
        if pos >> 12 == self._head:
            return -1
        return self.start_of(self._after(self._seqs[pos >> 12]))

    def _gap(self, off):
        """How far the bytes loaded from off on, which are no record, can be passed over at once."""
        n = min(_PAGE, _SECTOR - off)
        for filler in (b"\xff", b"\0"):
            if self.buf[:n] == filler * n:
                return n
        return self._unit

    def _length(self, pos):
        """Bytes that the torn record at pos, just loaded, was to take, 0 if its header does not tell.

        Once the first page was whole the header reads the same however often; otherwise that page alone is torn.
        """
        buf = self.buf
        head = bytes(buf[:4])
        if head[1] != head[0] ^ head[2] ^ head[3] ^ 0xA5:
            return 0
        for _ in range(8):
            self.read(pos, 0, buf[:4])
            if buf[:4] != head:
                return 0
        return self.room_for(head[2] | head[3] << 8 if head[0] < 0x80 else 0)

    def _scan(self, sector, stop, visit):
        """Call visit(pos, kind) for each valid record that starts before stop.  Return (end, junk, damaged).

        end: offset behind the last valid record.  junk: offset behind the last byte that may have been programmed
        after it, or end.  damaged: runs of bytes before end that should have been records.
        """
        off = end = junk = self._pad(_HEADER)
        damaged = doubt = 0
        begins = True  # whether a record may begin at off
        while off < stop:
            pos = sector << 12 | off
            size = self.load(pos)
            if size:
                damaged += doubt
                doubt = 0
                off += self._pad(size)
                end = junk = off
                begins = True
                visit(pos, self.buf[0])
                continue
            n = self._gap(off)
            blank = self.buf[:n] == b"\xff" * n
            if blank or self.buf[:n] == bytes(n):  # zeros are what an earlier mount made of a torn record
                begins = True
            else:
                doubt = 1
                if begins:
                    # The page behind may have been the one that was torn, visibly or not.
                    junk = max(junk, min(off + self._length(pos), _SECTOR))
                begins = False
            off += n
            if not blank:
                junk = max(junk, off)
        return end, junk, damaged

    # -- programming

    def _seek(self, off):
        self._off = off
        self._from = self._to = off & (_PAGE - 1)

    def _put(self, data):
        """Append data to the page buffer, programming each page as it fills."""
        n = len(data)
        to = self._to
        if to + n < _PAGE:
            self._page[to : to + n] = data
            self._to = to + n
            return
        data = memoryview(data)
        done = 0
        while done < n:
            k = min(n - done, _PAGE - self._to)
            self._page[self._to : self._to + k] = data[done : done + k]
            self._to += k
            done += k
            if self._to == _PAGE:
                self._program()

    def _program(self):
        """Program what waits in the page buffer, padded to the unit with 0xFF."""
        a = self._from
        b = self._pad(self._to)
        if a == b:
            return
        base = self._off & ~(_PAGE - 1)
        self._device.writeblocks(self._head, self._page[a:b], base + a)
        self._page[a:b] = b"\xff" * (b - a)
        self._seek(base + b)

    def _write(self, kind, arg, parts=()):
        """Program one record at the head, which has room; return its position."""
        if self._off + self.room_for(arg if kind < 0x80 else 0) > _SECTOR:
            raise JournalUnavailable("carry() has more than live() said")
        usable = self._usable
        self._usable = False  # until it is whole: after any exception in between the head ends in half a record
        pos = self._head << 12 | self._off
        head = bytes((kind, kind ^ arg & 255 ^ arg >> 8 ^ 0xA5, arg & 255, arg >> 8))
        crc = crc32(head, self._seed(self._head))
        self._put(head)
        for part in parts:
            crc = crc32(part, crc)
            self._put(part)
        if self._torn:
            crc ^= 0xFFFFFFFF
        # The CRC comes last: until it is programmed the record does not exist.
        self._put(bytes((crc & 255, crc >> 8 & 255, crc >> 16 & 255, crc >> 24)))
        self._program()
        self._usable = usable
        return pos

    def _reopen(self):
        """Append OPEN if CLOSE is the last record; close() left the room."""
        if self._closed:
            self._closed = False
            self._write(_OPEN, 0)

    def append(self, kind, parts, reserve=0):
        """Program one record and return its position.  kind: 0x10-0x5F.  parts: a sequence of bytes-like objects.

        reserve: sectors that must be left to be given up beside those this record needs.
        Raises ValueError if the body exceeds max_body; JournalFull, and nothing was programmed (but the OPEN behind a
        CLOSE); JournalUnavailable if it is not mounted; OSError from the device.  After that one, or any exception
        that comes in the middle of it, nothing can be appended until it is mounted again.
        """
        n = 0
        for part in parts:
            n += len(part)
        if n > self.max_body:
            raise ValueError("%d bytes are too many for the journal, at most %d" % (n, self.max_body))
        if not self._carrying:
            if not self._usable:
                raise JournalUnavailable("the journal is not mounted, or its device failed: mount it again")
            self._reopen()
            self._make_room(self.room_for(n), reserve)
        return self._write(kind, n, parts)

    def copy(self, pos):
        """For the owner's carry(): append the record at pos once more and return its new position.

        Raises JournalCorrupt if the bytes copied do not pass their checksum.
        """
        size = self.load(pos)
        if not size:
            raise JournalCorrupt(pos)
        kind = self.buf[0]
        n = self.buf[2] | self.buf[3] << 8
        if n + 4 <= _PAGE:
            return self._write(kind, n, (self.buf[4 : 4 + n],))
        try:
            new = self._write(kind, n, self._pieces(pos, n))
            if self._torn:
                raise JournalCorrupt(pos)
        finally:
            self._torn = False
        return new

    def _pieces(self, pos, n):
        """The body of the record just loaded, in pieces.

        They are read a second time, and cells that power failed on may read differently.  ._torn then tells that they
        do not pass the record's checksum, and _write() programs one that nothing passes.
        """
        crc = crc32(self.buf[:4], self._seed(pos >> 12))
        done = 0
        while done < n:
            piece = self.buf[: min(n - done, _PAGE)]
            self.read(pos, 4 + done, piece)
            crc = crc32(piece, crc)
            done += len(piece)
            yield piece
        self.read(pos, 4 + n, self.buf[:4])
        self._torn = crc != unpack_from("<I", self.buf)[0]

    # -- sectors

    def _erase(self, sector):
        """Erase a dead sector and program its header: only then is it trusted, an erase cut short can read blank."""
        usable = self._usable
        self._usable = False
        if self._replaced >= 0 and self._replaced != sector:
            self._disown(self._replaced)  # the head's TAIL, which says that it does not count, will not last
        self._replaced = -1
        self._seqs[sector] = 0
        self._device.ioctl(6, sector)
        self.erases += 1
        head = bytearray(b"\xff" * self._pad(_HEADER))
        log2 = 2 if self._unit == 4 else 4 if self._unit == 16 else 8
        pack_into("<HBBII", head, 0, _MAGIC, _VERSION << 4 | log2, 0xFF, self._next_seq, self._id)
        pack_into("<I", head, 12, crc32(memoryview(head)[:12]))
        self._device.writeblocks(sector, head, 0)
        self._usable = usable
        self._ready = sector

    def _switch(self, victim, leaving, doubt=()):
        """Make the dead sector victim the head, carrying there what is live in the sector leaving, and the record
        doubt (kind and body).  leaving may be the newest sector: it is then replaced as a whole.

        Until something follows the TAIL the new sector does not count, and nothing else is erased: a cut goes back.
        """
        usable = self._usable
        self._usable = False
        whole = leaving == self._head
        if self._ready != victim:
            self._erase(victim)
        self._ready = -1
        self._seqs[victim] = self._next_seq
        self._next_seq += 1
        self._head = victim
        self._seek(self._pad(_HEADER))
        if leaving >= 0 and self._seqs[leaving] >= self._oldest:
            self._carrying = True
            try:
                self._owner.carry(leaving, whole)
            finally:
                self._carrying = False
        if doubt:
            self._rewrite(*doubt)
        replaced = 0
        if whole:  # all of it that is live was carried
            replaced = self._seqs[leaving]
            self._seqs[leaving] = 0
            self._replaced = leaving
        oldest = self._owner.oldest()
        self._oldest = self.seq if oldest is None else oldest
        head = bytearray(8)
        pack_into("<II", head, 0, self._oldest, replaced)
        state = self._owner.state()
        self._write(_TAIL, 8 + len(state), (head, state))
        self._usable = usable

    def _disown(self, sector):
        """Spoil the header of a sector that does not count, so that no later mount can come to trust it."""
        self._seqs[sector] = 0
        self._device.writeblocks(sector, bytes(self._pad(_HEADER)), 0)

    def _make_room(self, size, reserve, doubt=()):
        """Make the head have room for size more bytes, or raise JournalFull before anything is erased.

        The oldest sector is dead, always: it becomes the head.  Then the next oldest must become dead.  If that
        cannot be, because records wait there whose order must not change, and the record to come is one that helps
        to get on (reserve 0), the head itself is packed anew.
        """
        fits = self._off + size <= _SECTOR
        if fits and not (reserve and self._tight):
            return
        order = self._by_age()
        if fits:
            if not self._ways_out(order[1 : 1 + reserve], 0):
                raise JournalFull("the journal is full")
            self._tight = False
            return
        most = self.max_body + _OVERHEAD - self.room_for(0)
        limit = self.max_body + _OVERHEAD - size
        laps = _LAPS
        if doubt:
            limit = most - size - self.room_for(_STATE)
            laps = 2 if self._ways_out(order[1:2], size) else 1
        for k in range(1, min(laps, self.sectors - 1 - reserve)):
            live = self._live(order[k], False)
            if not 0 <= live <= most:
                break
            if live <= limit:
                if not self._ways_out(order[k + 1 : k + 1 + reserve], 0):
                    break
                for i in range(k - 1):
                    self._switch(order[i], order[i + 1])
                    self._write(_OPEN, 0)
                self._switch(order[k - 1], order[k], doubt)
                self._tight = not reserve
                return
        if reserve or self._owner.live(self._head, True) > limit:
            raise JournalFull("the journal is full")
        self._switch(order[0], self._head, doubt)

    def _ways_out(self, sectors, size):
        """Whether each of these can be given up, and what is carried then could be packed anew with size more bytes
        and one of the records that help to get on: no way into a full journal that does not lead out again."""
        most = self.max_body - self.room_for(0) - self.room_for(_STATE) - size
        for s in sectors:
            if self._live(s, False) < 0 or self._live(s, True) > most:
                return False
        return True

    def _live(self, sector, whole):
        return 0 if self._seqs[sector] < self._oldest else self._owner.live(sector, whole)

    def idle(self):
        """Erase the next sector ahead of need, when the head is three quarters full.  May block for 45-400 ms."""
        if self._usable and not self._closed and self._ready < 0 and self._off > _SECTOR * 3 // 4:
            self._erase(self._by_age()[0])

    def close(self):
        """Program the mark of an orderly shutdown, after which the next mount has nothing to doubt."""
        if self._usable and not self._closed and self._off + 2 * self._pad(_OVERHEAD) <= _SECTOR:
            self._write(_CLOSE, self._ready + 1)
            self._closed = True

    # -- mounting

    def mount(self, owner):
        """Find the journal on the device, or make one, and hand its records to owner.

        Nothing on the flash can make it fail; what cannot be read is counted in .damaged.  OSError only from the
        device.  Afterwards .fresh tells whether no journal was there.
        """
        units, ids = self._read_headers(owner)
        found = self._find_head(units, ids)
        self.fresh = found is None
        if self.fresh:
            self._make()
            return
        begin, last, kind, arg, end, junk, damaged, unfinished = found
        head = self._head
        clean = kind == _CLOSE and junk == end
        for s in range(self.sectors):
            if ids[s] == self._id and units[s] == self._unit and s not in unfinished:
                if self._seqs[s] == self._skip:
                    self._replaced = s
                    self._seqs[s] = 0
            elif clean and s + 1 == arg and s in unfinished:
                self._ready = s
                self._next_seq = self._seqs[s]
                self._seqs[s] = 0
            elif not clean or s in unfinished:
                # Half erased or half programmed, its header or its TAIL may be read differently the next time.
                self._disown(s)
            else:
                self._seqs[s] = 0
        self.damaged = damaged
        sector = self._after(self._oldest - 1)
        while sector != head:
            self.damaged += self._scan(sector, _SECTOR, self._replay)[2]
            sector = self._after(self._seqs[sector])
        # The newest record may be in doubt, and be there more than once: it is judged once, in _settle().
        self._scan(head, begin if kind < _TAIL else end, self._replay)
        self._seek(end)
        if not clean:
            self._settle(begin, last, kind, end, junk)
        self._closed = clean
        self._usable = True

    def format(self, owner):
        """Forget all records and begin a new journal, which mount() will never mix up with the old one.

        Of a journal that is mounted a power cut leaves all or nothing.
        """
        dead = self._by_age()[0] if self._usable else -1
        self._read_headers(owner)
        self._make(dead)

    def _make(self, victim=-1):
        self._unit = self._prog_size
        self._id = unpack_from("<I", self._urandom(4))[0]
        self._seed_seq = -1
        self._oldest = self._next_seq
        if victim < 0:
            victim = self._by_age()[0]
        for s in range(self.sectors):
            self._seqs[s] = 0
        self._switch(victim, -1)
        self._write(_OPEN, 0)
        self._usable = True

    def _read_headers(self, owner):
        """Begin anew: fill _seqs; return the units and journal ids of all sectors, 0 without a valid header."""
        self._owner = owner
        self._ready = self._replaced = -1
        self._usable = self._carrying = self._closed = False
        self._tight = True
        self._page[:] = b"\xff" * _PAGE
        self.damaged = 0
        ids = array("I", bytes(4 * self.sectors))
        units = array("H", bytes(2 * self.sectors))
        top = 0
        head = self.buf[:_HEADER]
        for s in range(self.sectors):
            self._seqs[s] = 0
            self._device.readblocks(s, head, 0)
            magic, version, _, seq, unique, crc = unpack_from("<HBBIII", head)
            if magic != _MAGIC or crc != crc32(head[:12]):
                continue
            if version in (_VERSION << 4 | 2, _VERSION << 4 | 4, _VERSION << 4 | 8) and seq < 0x3FFFFFFF:
                self._seqs[s] = seq
                ids[s] = unique
                units[s] = 1 << (version & 15)
                top = max(top, seq)
        self._next_seq = top + 1
        return units, ids

    def _note(self, pos, kind):
        key = bytes(self.buf[:4]), self._crc
        if key != self._key:
            self._key = key
            self._begin = self._end
        self._last = pos
        self._last_kind = kind
        self._last_arg = self.buf[2] | self.buf[3] << 8
        self._end = (pos & 0xFFF) + self.room_for(self._last_arg if kind < 0x80 else 0)
        if kind == _TAIL:
            self._oldest, self._skip = unpack_from("<II", self.buf, 4)

    def _find_head(self, units, ids):
        """Set _head, _unit, _id, _oldest and _skip.  Return None if there is no journal, or about the head:
        offset behind the last record but one, copies of the last not counted; position, kind and arg of the last; end,
        junk, damaged; the sectors begun after the head but never committed."""
        found = None
        unfinished = []
        for s in reversed(self._by_age()):
            if not self._seqs[s] or units[s] < self._prog_size:
                continue
            if found and (ids[s] != self._id or units[s] != self._unit):
                continue
            self._id = ids[s]
            self._unit = units[s]
            self._seed_seq = -1
            self._oldest = self._last = self._last_kind = self._last_arg = 0
            self._key = None
            self._end = self._pad(_HEADER)
            end, junk, damaged = self._scan(s, _SECTOR, self._note)
            if not found:
                if not damaged and (not self._oldest or self._last_kind == _TAIL and junk == end):
                    # Nothing behind its TAIL: it holds only copies, and all that they were made from is still there.
                    # The TAIL may be one that is read differently the next time.  (Nor is it damaged: records follow.)
                    unfinished.append(s)
                    continue
                self._head = s
                key = self._key
                found = self._begin, self._last, self._last_kind, self._last_arg, end, junk, damaged, unfinished
            if self._oldest:
                break
        else:
            self._oldest = 1  # every TAIL is damaged: read all there is
            self._skip = 0
        if found:
            self._key = key
        return found

    def _replay(self, pos, kind):
        if kind == _TAIL:
            self._owner.restore(bytes(self.buf[12 : 4 + self.buf[2]]))
        elif kind < _TAIL:
            self._owner.replay(kind, pos)

    def _rewrite(self, kind, body):
        """Program a record that was in doubt once more, and let the owner have it."""
        pos = self._write(kind, len(body), (body,))
        if self.load(pos):
            self._replay(pos, kind)

    def _settle(self, begin, last, kind, end, junk):
        """After a cut: whatever the last program left half done reads the same from now on.

        The last valid record, which is of that kind, lies at last and perhaps in other places from begin to end.
        junk: behind the last byte that may be torn.
        Order: first nothing torn can come back to life, then the last record is programmed once more, on a page that
        nothing was torn in, and only then is it believed.  This may be cut, and begin again, any number of times.
        """
        # What was torn begins at end, or at the page behind the zeros of a mount that was cut itself.  It need not
        # show.  But for what shows it lies in one page; behind that the cells are good.
        free = min((junk // _PAGE + 1) * _PAGE, _SECTOR)
        if end < free:
            # Behind a CLOSE blank flash is believed, and zeros cut short may look blank: so none before it is certain
            # that the next mount sees no CLOSE with nothing behind it.
            mark = min(end + self.room_for(0), free)
            pos = self._head << 12 | end
            self.load(pos)
            if kind == _CLOSE:
                self._seek(end)
                self._write(_OPEN, 0)  # which may be half there already
            elif self._length(pos) <= self.room_for(0):
                self._zero(self._head, end, mark)
            else:
                mark = end  # a long record: its header goes last, for it tells the next mount how far all this went
            self._zero(self._head, mark, free)
        self._seek(free)
        if kind >= _TAIL:
            return
        body = self._find(self._head << 12, begin, end)
        if body is None:
            self._zero(self._head, begin, end)
            return
        size = self.room_for(len(body))
        if free + size <= _SECTOR:
            self._rewrite(kind, body)
            return
        try:
            self._make_room(size, 0, (kind, body))
            self._write(_OPEN, 0)
        except JournalFull:
            # In place.  With a 256-byte unit this is the one time that a page with a record in it is at stake.
            self._seek(last & 0xFFF)
            self._rewrite(kind, body)
            self._seek(free)

    def _find(self, base, off, end):
        """The body of the record _key, as one read of it found it whole; None if there is none left in off..end."""
        while off < end:
            size = self.load(base | off)
            if size and self._key == (bytes(self.buf[:4]), self._crc):
                record = bytearray(size)
                self.read(base | off, 0, record)
                crc = crc32(memoryview(record)[: size - 4], self._seed(self._head))
                if crc == self._key[1] == unpack_from("<I", record, size - 4)[0]:
                    return memoryview(record)[4 : size - 4]
            off += self._gap(off)
        return None

    def _zero(self, sector, a, b):
        """Program zeros over bytes a..b of a sector, the last page first."""
        while a < b:
            n = b - max(a, (b - 1) & -_PAGE)
            b -= n
            self._device.writeblocks(sector, bytes(n), b)
