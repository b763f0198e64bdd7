"""A ring of checksummed records over a NOR block device; knows nothing of MQTT.  FORMAT.md has every byte.

The meaning of a record, and whether it is still live, belong to the owner (the store).  append() returns when the
record is programmed: from then on it survives power loss.  mount() settles for good what a power cut has left in doubt
before it returns.  It reads the newest sector only: each begins with a snapshot of all that its owner must know.

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
from struct import pack, unpack_from
import os

from micropython import const

from .errors import JournalFull
from .ring import Ring

_SECTOR = const(4096)
_PAGE = const(256)
_MAGIC = const(0x4A4D)
_VERSION = const(3)
_HEADER = const(16)
_SEALED = const(48)
_OVERHEAD = const(8)
_TAIL_HEAD = const(10)
_TAIL = const(0x60)
_SNAP = const(0x61)  # a snapshot like TAIL's, in front of a CLOSE
_CLOSE = const(0xF0)  # orderly shutdown; arg: where the snapshot is in units of 4 bytes, | 0x8000: one erased ahead
_OPEN = const(0xF1)
_AHEAD = const(0x8000)
_RESIDUE = const(0x2144DF1C)  # the CRC, from whatever seed, of bytes and the CRC of these that follows them


class Journal(Ring):
    """device: a block device with 4096-byte erase blocks (readblocks, writeblocks with offset, ioctl 4-6).

    prog_size: 4, 16 or 256 bytes, the unit every record is padded to; not below what the device can program.
    size: bytes of the device to use, a multiple of 4096, at least 16384; None: all of it.
    urandom: makes the journal's id, urandom(4).
    Raises ValueError for a bad argument, JournalUnavailable if the device cannot serve.

    RAM: three 256-byte pages and 4 bytes a sector, while it mounts a sector more; it does not grow with what is stored.
    After an OSError from the device the journal refuses to append until mount() has been called again.
    """

    def __init__(self, device, prog_size=4, size=None, urandom=os.urandom):
        super().__init__(device, prog_size, size)
        self._urandom = urandom
        self.fresh = False  # mount() found no journal and made one
        self.damaged = 0  # records that no longer pass their checksum
        self._cells = None  # while it mounts: the sector _seen
        self._seen = -1

    @property
    def usable(self):
        """False before mount() and after the device has failed."""
        return self._usable

    @property
    def closed(self):
        """Whether nothing was appended since an orderly shutdown."""
        return self._closed

    def idle(self):
        """Erase the next sector ahead of need, when the head is three quarters full.  May block for 45-400 ms."""
        if self._usable and not self._closed and self._ready < 0 and self._off > _SECTOR * 3 // 4:
            self._erase(self._by_age()[0])

    def close(self):
        """Program a snapshot and the mark of an orderly shutdown: the next mount reads these and has no doubt."""
        if not self._usable or self._closed:
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
        self._closed = True

    # -- mounting

    def mount(self, owner):
        """Find the journal on the device, or make one, and hand its records to owner.

        Nothing on the flash can make it fail; what cannot be read is counted in .damaged.  OSError only from the
        device.  Afterwards .fresh tells whether no journal was there.
        """
        self._cells = memoryview(bytearray(_SECTOR))
        try:
            while not self._mount(owner):
                pass
        finally:
            self._cells = None
        self.seq = self._seqs[self._head]
        self._measure()

    def _mount(self, owner):
        units, ids = self._read_headers(owner)
        seqs = array("I", self._seqs)
        order = [s for s in reversed(self._by_age()) if seqs[s]]
        if self._find_close(units, ids, order):
            self._usable = self._closed = True
            return True
        self._ready = -1
        self.fresh = not self._find_head(units, ids, seqs, order)
        if self.fresh:
            owner.restore(b"")
            self._make()
            return True
        # Half erased or half programmed, a header or a TAIL may be read differently the next time.  Another journal's
        # sectors only when it is certain that this one counts.
        ours = self._ours(units, ids)
        self._disown_all([s for s in range(self.sectors) if ours[s] or not seqs[s]])
        self._off = self._end
        if not self._settle():
            return False
        self._disown_all([s for s in range(self.sectors) if seqs[s] and not ours[s]])
        self._usable = True
        return True

    def _disown_all(self, sectors):
        for s in sectors:
            if not self._seqs[s] and s != self._void and s != self._ready:
                self._disown(s)

    def format(self, owner):
        """Forget all records and begin a new journal, which mount() will never mix up with the old one.

        Of a journal that is mounted a power cut leaves all or nothing.
        """
        dead = self._by_age()[0] if self._usable else -1
        self._read_headers(owner)
        self._make(dead)
        self._measure()

    def _make(self, victim=-1):
        if victim < 0:
            victim = self._by_age()[0]
        self._device.ioctl(6, victim)
        self.erases += 1
        self._device.readblocks(victim, self.buf, 0)
        self._set_unit(self._prog_size, self._prog_size == 16 and self.buf != b"\xff" * _PAGE)
        self._id = unpack_from("<I", self._urandom(4))[0]
        self._oldest = self._next_seq
        self._void_seq = 0
        for s in range(self.sectors):
            self._seqs[s] = 0
        self._put_header(victim)
        self._switch(victim, -1)
        self._write(_OPEN, 0)
        self._usable = True

    def _measure(self):
        self.max_body = self.room - self.room_for(_TAIL_HEAD + self._owner.max_state) - _OVERHEAD

    def _is_ours(self, s, units, ids):
        return ids[s] == self._id and units[s] & 0x1FF == self._unit

    def _ours(self, units, ids):
        """By sector: whether its header is of this journal."""
        unique = self._id
        unit = self._unit
        return [ids[s] == unique and units[s] & 0x1FF == unit for s in range(self.sectors)]

    def _read_headers(self, owner):
        """Begin anew: fill _seqs; return the units and journal ids of all sectors, 0 without a valid header."""
        self._owner = owner
        self._ready = self._void = self._seen = -1
        self._usable = self._carrying = self._closed = self.fresh = False
        self._put_end = 0
        self._tight = True
        self._page[:] = b"\xff" * (2 * _PAGE)
        self.damaged = 0
        ids = array("I", bytes(4 * self.sectors))
        units = array("H", bytes(2 * self.sectors))
        top = 0
        head = self.buf[:48]
        for s in range(self.sectors):
            self._seqs[s] = 0
            self._device.readblocks(s, head, 0)
            magic, version, flags, seq, unique, crc = unpack_from("<HBBIII", head)
            if magic != _MAGIC or version not in (_VERSION << 4 | 2, _VERSION << 4 | 4, _VERSION << 4 | 8):
                continue
            sealed = flags == 0xFE
            good = crc32(head[:_HEADER]) == _RESIDUE if not sealed else crc == crc32(head[_HEADER:], crc32(head[:12]))
            if good and seq < 0x3FFFFFFF:
                self._seqs[s] = seq
                ids[s] = unique
                units[s] = 1 << (version & 15) | (0x200 if sealed else 0)
                top = max(top, seq)
        self._next_seq = top + 1
        return units, ids

    def _enter(self, sector, units, ids):
        """Read a sector as one of the journal that it belongs to."""
        self._id = ids[sector]
        self._set_unit(units[sector] & 0x1FF, units[sector] >> 9)
        if self._seen != sector:
            # All of it in one read: cells that power failed on read the same for everything that is decided here.
            self._device.readblocks(sector, self._cells, 0)
            self._seen = sector
        if self._sums:
            self._sums[:] = self._cells[_HEADER:_SEALED]

    def _find_close(self, units, ids, order):
        """After an orderly shutdown: take up its snapshot and return True."""
        for s in order[:2]:
            if units[s] & 0x1FF < self._prog_size:
                return False
            self._enter(s, units, ids)
            pos = self._last_record(s)
            if pos < 0:
                if self._touched:
                    return False
                continue  # it may be one erased ahead
            arg = self.buf[2] | self.buf[3] << 8
            if (s == order[0]) == (arg >= _AHEAD):
                return False
            snap = s << 12 | (arg & 0x3FF) << 2
            if not self.load(snap) or self.buf[0] | 1 != _SNAP:
                return False
            self._head = s
            if arg >= _AHEAD:
                if self._seqs[order[0]] != self._seqs[s] + 1 or not self._is_ours(order[0], units, ids):
                    return False
                self._ready = order[0]
                self._next_seq = self._seqs[order[0]]
                self._seqs[order[0]] = 0
            for other in order:
                if not self._is_ours(other, units, ids):
                    self._seqs[other] = 0
            if not self._restore(snap):
                return False
            end = (pos & 0xFFF) + self.room_for(0)
            self._off = -(-end // _PAGE) * _PAGE if self._sums else end
            return True
        return False

    def _last_record(self, sector):
        """The position of the CLOSE that ends what is programmed in a sector, loaded; -1 if something else does."""
        off = _SECTOR
        cells = self._cells
        self._touched = False
        while off and not self._touched:
            off -= _PAGE
            if off and self._sums:
                self.buf[:] = cells[off : off + _PAGE]
                self._touched = self._gap(off)[1] != 0xFF
            elif off:
                self._touched = cells[off : off + _PAGE] != self._page1
        if not off and self._first == _PAGE:
            return -1
        if self._sums:  # what is not blank in this page cannot be seen
            tries = range(off + _PAGE - self.room_for(0), max(off, self._first) - 1, -self._unit)
        else:
            n = _PAGE  # a page that is not blank as a whole
            step = _PAGE // 2
            while step:
                if cells[off + n - step : off + n] == self._page1[:step]:
                    n -= step
                step >>= 1
            tries = (off + self._pad(n) - self.room_for(0),)
        for at in tries:
            if at >= self._first and self.load(sector << 12 | at):
                return sector << 12 | at if self.buf[0] == _CLOSE else -1
        return -1

    def _restore(self, pos):
        """The record just loaded is a snapshot: take it up, unless it reads differently now."""
        state = self.body(pos)
        if state is None or len(state) < _TAIL_HEAD:
            return False
        self._oldest, self._void_seq, self._void_from = unpack_from("<IIH", state)
        self._tail_at = pos
        for s in range(self.sectors):
            if self._void_seq and self._seqs[s] == self._void_seq:
                self._void = s
                if not self._void_from:  # packed anew: it holds nothing, though its header is whole
                    self._seqs[s] = 0
        self._owner.restore(state[_TAIL_HEAD:])
        return True

    def _scan(self, sector):
        """Replay the sector entered last, from its first snapshot on; in front of it stand copies.  Afterwards:

        _end: offset behind the last valid record.  _junk: offset behind the last byte that may have been programmed
        after it, or _end.  Return the number of runs of bytes before _end that should have been records.
        _last, _last_kind, _last_arg, _last_crc: position of the last record, and what tells it from others.
        _begin: offset behind the last record but one, copies of the last not counted.  _flawed: damaged between them.
        _tail_at: the last snapshot, or -1.  _tail_end: offset behind TAIL.
        """
        off = end = junk = begin = tail_end = self._first
        damaged = doubt = flawed = 0
        last = last_kind = last_arg = last_stop = 0
        begins = True  # whether a record may begin at off
        tail_at = self._tail_at = -1
        replay = self._owner.replay
        buf = self.buf
        unit = self._unit
        sums = self._sums
        seed = self._seed(sector)
        cells = self._cells
        base = sector << 12
        while off < _SECTOR:
            kind = cells[off]
            arg = cells[off + 2]
            high = cells[off + 3]
            if cells[off + 1] == kind ^ arg ^ high ^ 0xA5:
                arg |= high << 8
                stop = off + 8 if kind >= 0x80 else off + 8 + arg
                if stop <= _SECTOR and crc32(cells[off:stop], seed) == _RESIDUE:
                    if (
                        cells[stop - 1] != cells[last_stop - 1]
                        or kind != last_kind
                        or arg != last_arg
                        or cells[stop - 4 : stop] != cells[last_stop - 4 : last_stop]
                    ):  # not the same once more
                        last_kind = kind
                        last_arg = arg
                        last_stop = stop
                        begin = end
                        flawed = 0
                    if doubt:
                        flawed += 1
                        damaged += 1
                        doubt = 0
                    last = base | off
                    begins = True
                    end = junk = stop + unit - 1 & -unit
                    if kind < _TAIL and tail_at >= 0 or kind == _TAIL or kind == _SNAP:
                        # As load() does.
                        n = stop - off
                        if n > _PAGE:
                            n = _PAGE
                            self._crc = unpack_from("<I", cells, stop - 4)[0]
                        buf[:n] = cells[off : off + n]
                        if kind < _TAIL:
                            replay(kind, last)
                        else:
                            if kind == _TAIL:
                                tail_end = end
                            self._restore(last)
                            tail_at = self._tail_at
                    off = end
                    continue
            n = unit
            filler = -1
            run = sums or (not kind or kind == 0xFF) and cells[off + 1] == kind
            if run or begins:
                n = min(_PAGE, _SECTOR - off)
                buf[:n] = cells[off : off + n]
                n, filler = self._gap(off) if run else (unit, -1)
            if filler >= 0:  # zeros are what an earlier mount made of a torn record
                begins = True
            else:
                doubt = 0 if sums else 1
                if begins:
                    # The page behind may have been the one that was torn, visibly or not.
                    stop = off + self._length(base | off)
                    if sums:  # where it shows, all of its page does: every mount must come to the same
                        stop = -(-stop // _PAGE) * _PAGE
                    junk = max(junk, min(stop, _SECTOR))
                begins = False
            off += n
            if filler != 0xFF:
                junk = max(junk, off)
        self._begin = begin
        self._end = end
        self._junk = junk
        self._last = last
        self._last_kind = last_kind
        self._last_arg = last_arg
        self._last_crc = unpack_from("<I", cells, last_stop - 4)[0] if last_stop else -1
        self._flawed = flawed
        self._tail_end = tail_end
        return damaged

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

    def _find_head(self, units, ids, seqs, order):
        """Find the newest sector that counts and replay it, see _scan(); return whether there is one.

        seqs: of all sectors; order: those with one, the newest first.  In _seqs only those remain that hold something.
        """
        unfinished = []
        found = None
        for s in order:
            if units[s] & 0x1FF < self._prog_size or found and not self._is_ours(s, units, ids):
                continue
            self._enter(s, units, ids)
            self._void = -1
            ours = self._ours(units, ids)
            for other in range(self.sectors):
                self._seqs[other] = seqs[other] if ours[other] and other not in unfinished else 0
            if not found:
                self._head = s
                self._off = _SECTOR
            damaged = self._scan(s)
            if not found:
                if not damaged and (
                    self._tail_at < 0
                    or self._last_kind == _TAIL and (self._junk == self._end or self._sums)
                    or self._begin <= self._tail_end and not self._is_firm(s)
                ):
                    # Nothing behind its TAIL: it holds only copies, and all that they were made from is still there.
                    # The TAIL may be one that is read differently the next time.  (Nor is it damaged: records follow.)
                    unfinished.append(s)
                    continue
                found = self._begin, self._end, self._junk, self._last, self._last_kind
                found += self._last_arg, self._last_crc, self._flawed
            self.damaged += damaged
            if self._tail_at >= 0:
                break
        else:
            if not found:
                return False
            self._owner.restore(b"")  # every TAIL is damaged: read all there is
            self._oldest = 1
            self._void_seq = 0
            s = -1
        if s != self._head:
            self._catch_up(self.start_of(s) if s >= 0 else self.first())
        self._begin, self._end, self._junk, self._last, self._last_kind = found[:5]
        self._last_arg, self._last_crc, self._flawed = found[5:]
        return True

    def _is_firm(self, sector):
        """Whether a header always reads the same.

        An earlier mount may have found nothing behind the TAIL, where now there is something, and have lost its power
        while it did away with the header: then the sector must not begin to count.
        """
        head = self.buf[:_HEADER]
        self._device.readblocks(sector, head, 0)
        first = bytes(head)
        for _ in range(32):
            self._device.readblocks(sector, head, 0)
            if head != first:
                return False
        return True

    def _catch_up(self, pos):
        """The newest sector's TAIL is damaged: replay all from pos on, where there is one, or the oldest record."""
        while pos >= 0:
            pos = self.next(pos)
            if pos < 0:
                return
            kind = self.buf[0]
            behind = self.behind(pos)
            if kind | 1 == _SNAP:
                self._restore(pos)
            elif kind < _TAIL:
                self._owner.replay(kind, pos)
            pos = behind

    def _rewrite(self, kind, body):
        """Program a record that was in doubt once more, and let the owner have it."""
        pos = self._write(kind, len(body), (body,))
        if self.load(pos):
            self._owner.replay(kind, pos)

    def _settle(self):
        """After a cut: whatever the last program left half done reads the same from now on.

        The last valid record may lie in several places between _begin and _end.
        Order: first nothing torn can come back to life, then the last record is programmed once more, on a page that
        nothing was torn in.  This may be cut, and begin again, any number of times.
        Return False if the last record no longer reads back: it is gone now, all has to be read again without it.
        """
        begin = self._begin
        end = self._end
        junk = self._junk
        kind = self._last_kind
        last = self._last
        # What was torn begins at end, or at the page behind the zeros of a mount that was cut itself.  It need not
        # show.  But for what shows it lies in one page; behind that the cells are good.
        if kind == _CLOSE:
            junk = max(junk, end + self.room_for(0))  # an OPEN has to go there
        free = min((junk // _PAGE + 1) * _PAGE, _SECTOR)
        if end < free:
            # Behind a CLOSE blank flash is believed, and zeros cut short may look blank: so none before it is certain
            # that the next mount sees no CLOSE with nothing behind it.
            mark = min(end + self.room_for(0), free)
            self.load(self._head << 12 | end)
            if kind != _CLOSE and self._length(self._head << 12 | end) > self.room_for(0):
                # A long record: its header goes last, for it tells the next mount how far all this went.
                mark = end | _PAGE - 1
                for page in range(free - _PAGE, mark, -_PAGE):
                    self._zero(self._head, page, page + _PAGE)
                self._zero(self._head, end, mark + 1)
            else:
                if kind == _CLOSE:
                    self._off = end
                    self._write(_OPEN, 0)  # which may be half there already
                else:
                    self._zero(self._head, end, mark)
                self._zero(self._head, mark, free)  # rising: each page tells the next mount to go on to the one behind
        self._off = free
        if kind >= _TAIL:
            if self._sums and (free < _SECTOR or kind == _OPEN):
                # That one stands there must not depend on one that is in doubt.  Without room: the same once more.
                if free == _SECTOR:
                    self._off = last & 0xFFF
                self._write(_OPEN, 0)
                self._off = max(free, self._off)
            return True
        body = self._find(self._head << 12, begin, end)
        if body is None:
            self._zero(self._head, begin, end)
            return False
        if self._flawed and self._is_spoilt(begin, body):
            self.damaged -= self._flawed
        if free + self.room_for(len(body)) <= _SECTOR:
            self._rewrite(kind, body)
            self._zero(self._head, begin, end)  # or it would be read there, one time and not the other
            return True
        moved = self._owner.moved(kind, body)
        if moved is None:
            return True
        try:
            self._make_room(self.room_for(len(moved)), 0, (kind, moved, begin))
            self._write(_OPEN, 0)
        except JournalFull:
            # In place; encrypted, it is the same bits again.  With a 256-byte unit this is the one time that a page
            # with a record in it is at stake.
            self._off = last & 0xFFF
            self._rewrite(kind, body)
            self._off = free
            for _ in range(32):
                if not self.load(last):
                    # An earlier mount has found it torn, and been cut while it did away with it.
                    self._zero(self._head, begin, end)
                    return False
        return True

    def _is_spoilt(self, off, body):
        """Whether what stands at off is left of the last record, programmed to zeros by a mount that was cut."""
        kind = self._last_kind
        arg = self._last_arg
        whole = pack("<BBH", kind, kind ^ arg & 255 ^ arg >> 8 ^ 0xA5, arg) + body + pack("<I", self._last_crc)
        found = bytearray(min(len(whole), _SECTOR - off))
        self._device.readblocks(self._head, found, off)
        for i in range(len(found)):
            if found[i] & ~whole[i]:
                return False
        return True

    def _find(self, base, off, end):
        """The body of the last record, as one read of it found it whole; None if none is left in off..end."""
        while off < end:
            size = self.load(base | off)
            if size and self._crc == self._last_crc and self.buf[0] == self._last_kind:
                body = self.body(base | off)
                if body is not None:
                    return body
            off += self._gap(off)[0]
        return None
