"""A ring of checksummed records over a NOR block device; knows nothing of MQTT.  FORMAT.md has every byte.

The meaning of a record, and whether it is still live, belong to the owner (the store).  append() returns when the
record is programmed: from then on it survives power loss.  Exactly one is programmed at a time, its CRC last, so a cut
leaves at most one in doubt, and what is to become of that mount.py settles for good.

The owner has:
    max_state           bytes of the largest snapshot that large records must leave room for
    state()             the bytes of a snapshot that is programmed now; restore(state) takes one up, b"": nothing is
                        known.  state_size(): how many bytes that would be, at most
    replay(kind, pos)   one valid record after a snapshot, oldest first; journal.buf holds its first 256 bytes, the
                        body from 4 on.  The newest may come more than once
    live(sector, whole) the bytes that carry() of the same will take at most (see room_for), or -1: the order of the
                        records there must not change, so the sector cannot be given up.  whole is asked of older
                        sectors, too: what it would take to pack anew the sector that they were carried to
    carry(sector, whole) append() or copy() what is live in that sector.  whole: it is the newest, so its order is
                        kept and -1 is not allowed
    moved(kind, body)   the newest record has to go to another sector: forget it, replay() tells where it is then;
                        return its body as it has to be there, None: it is lost
    oldest()            lowest seq of the sectors that hold anything live, or None
A position (pos) is sector << 12 | offset.
"""

from array import array
from binascii import crc32
from struct import pack, pack_into, unpack_from
import os

from micropython import const

from .errors import JournalCorrupt, JournalFull, JournalUnavailable
from .once import once

_SECTOR = const(4096)  # erase size of every supported part
_PAGE = const(256)  # one program call stays inside one page: a cut tears one page at most
_MAGIC = const(0x4A4D)  # "MJ"
_VERSION = const(3)
_HEADER = const(16)
_SEALED = const(48)  # the header where erased flash does not read 0xFF: a 16-bit sum of each blank page follows
_OVERHEAD = const(8)  # record header 4, CRC 4

# Kinds below 0x80 have a body of arg bytes; the others have none and arg is a number of their own.
_TAIL = const(0x60)  # ends a sector's copies: oldest seq u32, void seq u32, from there on u16, the owner's state
_TAIL_HEAD = const(10)
_SNAP = const(0x61)  # a snapshot like TAIL's, in front of a CLOSE
_CLOSE = const(0xF0)  # orderly shutdown; arg: where the snapshot is in units of 4 bytes, | 0x8000: one erased ahead
_AHEAD = const(0x8000)
_OPEN = const(0xF1)  # says nothing itself; behind a CLOSE: more was begun, behind a TAIL: the sector counts
_LAPS = const(4)  # most sectors one append may use up: bounds the write amplification
_HELP = const(48)  # body of the longest record that helps to get on in a full journal


class Journal:
    """device: a block device with 4096-byte erase blocks (readblocks, writeblocks with offset, ioctl 4-6).

    prog_size: 4, 16 or 256 bytes, the unit every record is padded to; not below what the device can program.
    size: bytes of the device to use, a multiple of 4096, at least 16384; None: all of it.
    urandom: makes the journal's id, urandom(4).
    Raises ValueError for a bad argument, JournalUnavailable if the device cannot serve.

    RAM: three 256-byte pages and 4 bytes a sector, while it mounts a sector more; it does not grow with what is stored.
    .usable: False before mount() and after the device has failed: then nothing is appended until mount() is called
    again.  .closed: nothing was appended since an orderly shutdown.  .fresh: mount() found no journal and made one.
    .damaged: records that no longer pass their checksum.  .head: the newest sector.  .room: what records can take of
    a sector, in bytes.
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
        self._prog_size = prog_size
        self._urandom = urandom
        self.sectors = count
        self._seqs = array("I", bytes(4 * count))  # 0: no header to be trusted
        self.buf = memoryview(bytearray(_PAGE))  # what load() read
        # What is being programmed, blank in between; two pages, for put().
        self._page = memoryview(bytearray(b"\xff" * (2 * _PAGE)))
        self._page1 = self._page[:_PAGE]
        self._page2 = self._page[_PAGE:]
        self._from = 0  # bytes _from.._to of the page wait to be programmed
        self._to = 0
        self.head = count - 1  # a new journal begins behind it
        self._off = _SECTOR  # next free byte in it
        self._id = 0
        self._seed_crc = 0
        self._ready = -1  # sector erased ahead, header programmed
        self._oldest = 1  # lower seqs hold nothing live
        self._tight = True  # nothing is known of the sectors that a record with reserve leaves to be given up
        self._void = -1  # sector of the seq below that is still to be spoilt
        self._void_seq = 0  # what the newest TAIL says: a sector of this seq holds nothing
        self._void_from = 0  # from this offset on; 0: at all
        self.usable = self.fresh = self.closed = False
        self.damaged = 0
        self._carrying = False  # the owner's carry() is under way: what it appends has room in the head
        self._torn = False  # what copy() read does not pass its checksum
        self._next_seq = 1
        self._tail_at = -1  # the newest snapshot
        self.max_body = 0  # bytes of the largest record body; known when mounted
        self.erases = 0  # since the start of this program
        self.seq = 0  # age of the newest sector: about the number of erases over the journal's life
        self._owner = None
        # For put(), which must be quick.
        self._put_end = 0  # up to where it may program: nowhere unless usable, not closed, not carrying, not tight
        self._head_crc = 0  # the seed of the newest sector
        self._whole = getattr(device, "whole_pages", False)  # it programs nothing smaller
        self._set_unit(prog_size, False)
        self.put = self._make_put()

    def mount(self, owner):
        """Find the journal on the device, or make one, and hand its records to owner.

        Nothing on the flash can make it fail; what cannot be read is counted in .damaged.  OSError only from the
        device.
        """
        once("mount", "mount", self, owner)

    def format(self, owner):
        """Forget all records and begin a new journal, which mount() will never mix up with the old one.

        Of a journal that is mounted a power cut leaves all or nothing.
        """
        once("mount", "format", self, owner)

    def idle(self):
        """Erase the next sector ahead of need, when the head is three quarters full.  May block for 45-400 ms."""
        if self.usable and not self.closed and self._ready < 0 and self._off > _SECTOR * 3 // 4:
            self._erase(self._by_age()[0])

    def close(self):
        """Program a snapshot and the mark of an orderly shutdown: the next mount reads these and has no doubt."""
        if not self.usable or self.closed:
            return
        size = self._tail_room()
        end = size + 2 * self.room_for(0)  # CLOSE, and OPEN behind it
        if self._sums:  # and after a restart that is on the next page
            end += _PAGE
        if self._off + end <= _SECTOR:
            self._snapshot(_SNAP)
        else:
            try:
                self._make_room(end, 0)
            except JournalFull:
                return  # the next mount has to look for the end, nothing worse
        self._write(_CLOSE, (self._tail_at & 0xFFF) >> 2 | (_AHEAD if self._ready >= 0 else 0))
        self.closed = True

    # -- geometry

    def _pad(self, n):
        return (n + self._unit - 1) & -self._unit

    def room_for(self, n):
        """Bytes that a record with a body of n bytes takes."""
        return (n + _OVERHEAD + self._unit - 1) & -self._unit

    def fits(self, n):
        """Whether a record with a body of n bytes goes into the newest sector as it is."""
        if self.closed:
            n += self.room_for(0)
        return self._off + self.room_for(n) <= _SECTOR

    def seq_of(self, pos):
        """Age of the sector that pos lies in, 0 if it holds nothing any more."""
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

    def _set_unit(self, unit, sealed):
        self._unit = unit
        self._first = _SEALED if sealed else self._pad(_HEADER)  # where the records of a sector begin
        self.room = _SECTOR - self._first
        # Where erased flash does not read 0xFF: of the blank pages of the sector looked at.
        self._sums = bytearray(32) if sealed else None
        self._seed_seq = -1

    def _by_age(self):
        """All sectors: the one erased ahead, those without a header in ring order behind the head, then by age."""
        count = self.sectors
        seqs = self._seqs
        ages = []
        for s in range(count):
            age = seqs[s]
            if s == self._ready:
                age = -1 - count
            elif not age:
                age = (s - self.head - 1) % count - count
            # Beside the newest, so that the numbers stay small; lists sort quicker without a key.
            ages.append((age - self._next_seq) * count + s)
        ages.sort()
        return [age % count for age in ages]

    # -- reading

    def load(self, pos):
        """Read and check the record at pos; its first bytes are then in self.buf.  Return its size, 0 if invalid."""
        sector = pos >> 12
        off = pos & 0xFFF
        buf = self.buf
        n = _SECTOR - off
        if n > _PAGE:
            n = _PAGE
        self._device.readblocks(sector, buf if n == _PAGE else buf[:n], off)
        kind = buf[0]
        if buf[1] != kind ^ buf[2] ^ buf[3] ^ 0xA5:
            return 0
        stop = 4 + (buf[2] | buf[3] << 8 if kind < 0x80 else 0)
        if off + stop + 4 > _SECTOR:
            return 0
        crc = self._seed_crc if self._seqs[sector] == self._seed_seq else self._seed(sector)
        if stop + 4 <= n:
            crc = crc32(buf[:stop], crc)
            if crc != unpack_from("<I", buf, stop)[0]:
                return 0
        else:
            crc = crc32(buf[: min(n, stop)], crc)
            more = memoryview(bytearray(_PAGE))
            while n < stop:
                k = min(_PAGE, stop - n)
                self._device.readblocks(sector, more[:k], off + n)
                crc = crc32(more[:k], crc)
                n += k
            self._device.readblocks(sector, more[:4], off + stop)
            if crc != unpack_from("<I", more)[0]:
                return 0
        self._crc = crc
        return stop + 4

    def read(self, pos, skip, buf):
        """Fill buf from the record at pos, from byte skip of the record on.  Not checked again: load() did that."""
        self._device.readblocks(pos >> 12, buf, (pos & 0xFFF) + skip)

    def body(self, pos):
        """The body of the record just loaded from pos, None if it no longer passes its checksum."""
        n = 4 + (self.buf[2] | self.buf[3] << 8)
        if n <= min(_PAGE, _SECTOR - (pos & 0xFFF)):
            return bytes(self.buf[4:n])
        record = bytearray(n)
        self.read(pos, 0, record)
        if crc32(record, self._seed(pos >> 12)) != self._crc:
            return None
        return memoryview(record)[4:]

    def start_of(self, sector):
        """The position of the first record of a sector."""
        return sector << 12 | self._first

    def first(self):
        """The position where the oldest record can be."""
        return self.start_of(self._after(0))

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
            stop = _SECTOR
            if sector == self.head:
                stop = self._off
            elif self._seqs[sector] == self._void_seq:
                stop = self._void_from
            off = pos & 0xFFF
            while off < stop:
                size = self.load(sector << 12 | off)
                if size:
                    return sector << 12 | off
                off += self._unit if self._sums else self._gap(off)[0]
            if sector == self.head:
                return -1
            sector = self._after(self._seqs[sector])
            pos = self.start_of(sector)

    def behind(self, pos):
        """The position behind the record at pos, which is the one loaded last; -1 at the end of the newest sector."""
        size = self.room_for(self.buf[2] | self.buf[3] << 8 if self.buf[0] < 0x80 else 0)
        end = (pos & 0xFFF) + size
        if end < (self._off if pos >> 12 == self.head else _SECTOR):
            return pos & ~0xFFF | end
        if pos >> 12 == self.head:
            return -1
        return self.start_of(self._after(self._seqs[pos >> 12]))

    def _gap(self, off):
        """How far the bytes loaded from off on, which are no record, can be passed over at once; 0xFF if they are as
        erased, 0 if they are zeros, else -1."""
        n = min(_PAGE, _SECTOR - off)
        if self._sums:  # zeros read as anything, too
            i = off >> 7
            if off & 0xFF == 0 and self._sums[i] | self._sums[i + 1] << 8 == crc32(self.buf) & 0xFFFF:
                return n, 0xFF
            return self._unit, -1
        buf = self.buf
        filler = buf[0]
        if filler == 0xFF and n == _PAGE and buf == self._page1:
            return n, filler
        if filler == 0 or filler == 0xFF:
            same = self._page1 if filler else bytes(128)
            run = 0
            step = 128 if n > 16 and buf[16] == filler else 16
            while step >= self._unit:
                if run + step <= n and buf[run : run + step] == same[:step]:
                    run += step
                else:
                    step >>= 1
            if run >= self._unit:
                return run & -self._unit, filler
        return self._unit, -1

    # -- programming

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
        """Program what waits in the page buffer, padded to the unit with 0xFF: no more than goes on two pages."""
        a = self._from
        b = self._pad(self._to)
        while a < b:
            off = self._off & ~(_PAGE - 1)
            end = min(b, _PAGE)
            if self._whole:
                self._device.writeblocks(self.head, self._page1, off)
            else:
                self._device.writeblocks(self.head, self._page[a:end], off + a)
            self._page[a:end] = b"\xff" * (end - a)
            self._off = off + end
            a = 0
            b -= end
            if b:
                self._page1[:b] = self._page2[:b]
                self._page2[:b] = b"\xff" * b
        self._from = self._to = self._off & (_PAGE - 1)

    def _write(self, kind, arg, parts=()):
        """Program one record at the head, which has room; return its position."""
        off = self._off
        n = arg if kind < 0x80 else 0
        if off + self.room_for(n) > _SECTOR:
            raise JournalUnavailable("carry() has more than live() said")
        usable = self.usable
        self.usable = False  # until it is whole: after any exception the head ends in half a record
        self._put_end = 0
        page = self._page
        a = i = off & (_PAGE - 1)
        self._from = self._to = a
        check = kind ^ arg & 255 ^ arg >> 8 ^ 0xA5
        crc = self._seed(self.head)
        # The CRC comes last: until it is programmed the record does not exist.
        if a + n + _OVERHEAD <= 2 * _PAGE:
            pack_into("<BBH", page, i, kind, check, arg)
            i += 4
            for part in parts:
                n = len(part)
                page[i : i + n] = part
                i += n
            crc = crc32(page[a:i], crc)
            if self._torn:
                crc ^= 0xFFFFFFFF
            pack_into("<I", page, i, crc)
            self._to = i + 4
        else:
            part = bytes((kind, check, arg & 255, arg >> 8))
            crc = crc32(part, crc)
            self._put(part)
            for part in parts:
                crc = crc32(part, crc)
                self._put(part)
            if self._torn:
                crc ^= 0xFFFFFFFF
            self._put(pack("<I", crc))
        self._program()
        self.usable = usable
        return self.head << 12 | off

    def _make_put(self):
        """Return put(kind, a, b, rest): append() of a record with the body u16 a, u16 b, rest, if it fits on two pages
        of the newest sector and nothing has to be made sure of first, which is the rule; else it returns 0.

        All in one piece, and what never changes is at hand as defaults: this is what a message costs.
        """

        def put(
            kind,
            a,
            b,
            rest,
            journal=self,
            write=self._device.writeblocks,
            whole=self._whole,
            page=self._page,
            page1=self._page1,
            page2=self._page2,
            fill=pack_into,
            crc=crc32,
            length=len,
        ):
            n = length(rest) + 4
            off = journal._off
            unit = journal._unit
            size = (n + 7 + unit) & -unit
            if n > 248 or off + size > journal._put_end:
                return 0
            sector = journal.head
            begin = off & (_PAGE - 1)
            end = begin + size
            i = begin + 8
            stop = begin + n + 4
            try:
                fill("<BBHHH", page, begin, kind, kind ^ n ^ 0xA5, n, a, b)
                page[i:stop] = rest
                fill("<I", page, stop, crc(page[begin:stop], journal._head_crc))
                if end <= _PAGE:
                    if whole:
                        write(sector, page1, off - begin)
                    else:
                        write(sector, page[begin:end], off)
                    page1[:] = page2
                else:
                    write(sector, page1 if whole else page[begin:_PAGE], off - begin if whole else off)
                    end -= _PAGE
                    write(sector, page2 if whole else page2[:end], off - begin + _PAGE)
                    # Each page is blank where the other is not.
                    page2[:end] = page[:end]
                    page[begin:_PAGE] = page2[begin:]
                journal._off = off + size
            except:  # noqa: E722  the newest sector ends in half a record
                journal.usable = False
                journal._put_end = 0
                raise
            return sector << 12 | off

        return put

    def reopen(self):
        """Have the next mount find no orderly shutdown any more.  OSError from the device."""
        if self.closed:
            self.closed = False
            self._write(_OPEN, 0)  # close() left the room

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
        if not self._carrying:
            if n > self.max_body:
                raise ValueError("%d bytes are too many for the journal, at most %d" % (n, self.max_body))
            if not self.usable:
                raise JournalUnavailable("the journal is not mounted, or its device failed: mount it again")
            self.reopen()
            size = self.room_for(n)
            if reserve and self._tight or self._off + size > _SECTOR:
                self._make_room(size, reserve)
        pos = self._write(kind, n, parts)
        if self.usable and not (self._carrying or self._tight):
            self._put_end = _SECTOR
            self._head_crc = self._seed(self.head)
        return pos

    def copy(self, pos, parts=(), skip=0):
        """For the owner's carry(): append the record at pos once more, with parts in place of the first skip bytes of
        its body, and return its new position.

        Raises JournalCorrupt if the bytes copied do not pass their checksum.
        """
        size = self.load(pos)
        if not size:
            raise JournalCorrupt(pos)
        kind = self.buf[0]
        n = size - _OVERHEAD
        arg = n - skip
        for part in parts:
            arg += len(part)
        if n + 4 <= _PAGE:
            return self._write(kind, arg, tuple(parts) + (self.buf[4 + skip : 4 + n],))
        try:
            new = self._write(kind, arg, self._pieces(pos, n, parts, skip))
            if self._torn:
                raise JournalCorrupt(pos)
        finally:
            self._torn = False
        return new

    def _pieces(self, pos, n, parts, skip):
        """parts, then the body of the record just loaded from byte skip on, in pieces.

        They are read a second time, and cells that power failed on may read differently.  ._torn then tells that they
        do not pass the record's checksum, and _write() programs one that nothing passes.
        """
        crc = crc32(self.buf[:4], self._seed(pos >> 12))
        for part in parts:
            yield part
        done = 0
        while done < n:
            piece = self.buf[: min(n - done, _PAGE)]
            self.read(pos, 4 + done, piece)
            crc = crc32(piece, crc)
            done += len(piece)
            if done > skip:
                yield piece[max(0, skip - done + len(piece)) :]
        self.read(pos, 4 + n, self.buf[:4])
        self._torn = crc != unpack_from("<I", self.buf)[0]

    # -- sectors

    def _erase(self, sector):
        """Erase a dead sector and program its header: only then is it trusted, an erase cut short can read blank."""
        usable = self.usable
        self.usable = False
        self._put_end = 0
        if self._void >= 0 and self._void != sector:
            # The head's TAIL, which says that it does not count, will not last.
            if self._void_from:
                self._zero(self._void, self._void_from, _SECTOR)
            else:
                self._disown(self._void)
        self._void = -1
        self._seqs[sector] = 0
        self._device.ioctl(6, sector)
        self.erases += 1
        self._put_header(sector)
        self.usable = usable

    def _put_header(self, sector):
        device = self._device
        head = bytearray(b"\xff" * self._first)
        log2 = 2 if self._unit == 4 else 4 if self._unit == 16 else 8
        flags = 0xFE if self._sums else 0xFF
        pack_into("<HBBII", head, 0, _MAGIC, _VERSION << 4 | log2, flags, self._next_seq, self._id)
        if self._sums:
            for page in range(16):
                device.readblocks(sector, self.buf, page * _PAGE)
                pack_into("<H", head, _HEADER + 2 * page, crc32(self.buf) & 0xFFFF)
        pack_into("<I", head, 12, crc32(self._sums and head[_HEADER:] or b"", crc32(head[:12])))
        device.writeblocks(sector, head, 0)
        self._ready = sector

    def _switch(self, victim, leaving, doubt=()):
        """Make the dead sector victim the head, carrying there what is live in the sector leaving, and the record
        doubt (kind, body, offset from which on the head so far holds nothing else).  leaving may be the newest sector:
        it is then replaced as a whole.

        Until something follows the TAIL the new sector does not count, and nothing else is erased: a cut goes back.
        """
        usable = self.usable
        self.usable = False
        self._put_end = 0
        old = self.head
        whole = leaving == old
        if self._ready != victim:
            self._erase(victim)
        self._ready = -1
        self._seqs[victim] = self._next_seq
        self._next_seq += 1
        self.head = victim
        self.seq = self._seqs[victim]
        self._off = self._first
        if leaving >= 0 and self._seqs[leaving] >= self._oldest:
            self._carrying = True
            try:
                self._owner.carry(leaving, whole)
            finally:
                self._carrying = False
        self._void = -1
        self._void_seq = self._void_from = 0
        if whole or doubt:  # all of it that is live was carried; or the one record that was in doubt there
            self._void = old
            self._void_seq = self._seqs[old]
        if whole:
            self._seqs[old] = 0
        if doubt:
            kind, body, self._void_from = doubt
            if whole:
                self._void_from = 0
            self._rewrite(kind, body)
        oldest = self._owner.oldest()
        self._oldest = self.seq if oldest is None else oldest
        self._snapshot(_TAIL)
        self.usable = usable

    def _snapshot(self, kind):
        """Program a record that says all that the owner has to know."""
        head = pack("<IIH", self._oldest, self._void_seq, self._void_from)
        state = self._owner.state()
        self._tail_at = self._write(kind, _TAIL_HEAD + len(state), (head, state))

    def _rewrite(self, kind, body):
        """Program a record that was in doubt once more, and let the owner have it."""
        pos = self._write(kind, len(body), (body,))
        if self.load(pos):
            self._owner.replay(kind, pos)

    def _disown(self, sector):
        """Spoil the header of a sector that does not count, so that no later mount can come to trust it.

        Magic number and journal id stay: a device that shares its flash with a file system knows its sectors by them.
        """
        self._seqs[sector] = 0
        head = bytearray(self._first)
        pack_into("<H6xI", head, 0, _MAGIC, self._id)
        self._device.writeblocks(sector, head, 0)

    def _zero(self, sector, a, b):
        """Program zeros over bytes a..b of a sector."""
        while a < b:
            n = min(b, (a | _PAGE - 1) + 1) - a
            self._device.writeblocks(sector, bytes(n), a)
            a += n

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
        most = self.room - self._tail_room() - self.room_for(0)
        limit = most + self.room_for(0) - size
        laps = _LAPS
        if doubt:
            limit = most - size - self.room_for(_HELP)
            laps = 2 if self._ways_out(order[1:2], size) else 1
        for k in range(1, min(laps, self.sectors - reserve)):
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
        if reserve or self._owner.live(self.head, True) > limit:
            raise JournalFull("the journal is full")
        self._switch(order[0], self.head, doubt)

    def _tail_room(self):
        return self.room_for(_TAIL_HEAD + self._owner.state_size())

    def _ways_out(self, sectors, size):
        """Whether each of these can be given up, and what is carried then could be packed anew with size more bytes
        and one of the records that help to get on: no way into a full journal that does not lead out again."""
        most = -1
        for s in sectors:
            if self._seqs[s] < self._oldest:
                continue
            if most < 0:
                tail = max(self._tail_room(), self.room_for(_TAIL_HEAD + self._owner.max_state))
                most = self.room - tail - self.room_for(0) - self.room_for(_HELP) - size
            if self._owner.live(s, False) < 0 or self._owner.live(s, True) > most:
                return False
        return True

    def _live(self, sector, whole):
        return 0 if self._seqs[sector] < self._oldest else self._owner.live(sector, whole)
