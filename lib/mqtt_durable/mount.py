"""The mounting of the journal: what a power cut has left in doubt is settled for good.  FORMAT.md has every byte.

The newest sector alone is read: each begins with a snapshot of all that the owner must know.  journal.py has the rest,
and what the two share of its attributes.
"""

from array import array
from binascii import crc32
from struct import pack, unpack_from

from micropython import const

from .errors import JournalFull

# As in journal.py.
_SECTOR = const(4096)
_PAGE = const(256)
_MAGIC = const(0x4A4D)
_VERSION = const(3)
_HEADER = const(16)
_SEALED = const(48)
_OVERHEAD = const(8)
_TAIL_HEAD = const(10)
_TAIL = const(0x60)
_SNAP = const(0x61)
_CLOSE = const(0xF0)
_OPEN = const(0xF1)
_AHEAD = const(0x8000)
_RESIDUE = const(0x2144DF1C)  # the CRC, from whatever seed, of bytes and the CRC of these that follows them


def mount(journal, owner):
    """See Journal.mount()."""
    mounting = Mounting(journal, owner)
    while not mounting.step():
        pass
    journal.seq = journal._seqs[journal.head]
    _measure(journal)


def format(journal, owner):
    """See Journal.format()."""
    dead = journal._by_age()[0] if journal.usable else -1
    mounting = Mounting(journal, owner)
    mounting._read_headers()
    mounting._make(dead)
    _measure(journal)


def _measure(journal):
    journal.max_body = journal.room - journal.room_for(_TAIL_HEAD + journal._owner.max_state) - _OVERHEAD


class Mounting:
    """RAM: a sector, 4096 bytes."""

    def __init__(self, journal, owner):
        self.journal = journal
        journal._owner = owner
        self._cells = memoryview(bytearray(_SECTOR))  # the sector _seen
        self._seen = -1

    def step(self):
        """Return False if all has to be read again: the last record is gone now."""
        journal = self.journal
        units, ids = self._read_headers()
        seqs = array("I", journal._seqs)
        order = [s for s in reversed(journal._by_age()) if seqs[s]]
        if self._find_close(units, ids, order):
            journal.usable = journal.closed = True
            return True
        journal._ready = -1
        journal.fresh = not self._find_head(units, ids, seqs, order)
        if journal.fresh:
            journal._owner.restore(b"")
            self._make()
            return True
        # Half erased or half programmed, a header or a TAIL may be read differently the next time.  Another journal's
        # sectors only when it is certain that this one counts.
        ours = self._ours(units, ids)
        self._disown_all([s for s in range(journal.sectors) if ours[s] or not seqs[s]])
        journal._off = self._end
        if not self._settle():
            return False
        self._disown_all([s for s in range(journal.sectors) if seqs[s] and not ours[s]])
        journal.usable = True
        return True

    def _disown_all(self, sectors):
        journal = self.journal
        for s in sectors:
            if not journal._seqs[s] and s != journal._void and s != journal._ready:
                journal._disown(s)

    def _make(self, victim=-1):
        journal = self.journal
        if victim < 0:
            victim = journal._by_age()[0]
        journal._device.ioctl(6, victim)
        journal.erases += 1
        journal._device.readblocks(victim, journal.buf, 0)
        journal._set_unit(journal._prog_size, journal._prog_size == 16 and journal.buf != b"\xff" * _PAGE)
        journal._id = unpack_from("<I", journal._urandom(4))[0]
        journal._oldest = journal._next_seq
        journal._void_seq = 0
        for s in range(journal.sectors):
            journal._seqs[s] = 0
        journal._put_header(victim)
        journal._switch(victim, -1)
        journal._write(_OPEN, 0)
        journal.usable = True

    def _is_ours(self, s, units, ids):
        journal = self.journal
        return ids[s] == journal._id and units[s] & 0x1FF == journal._unit

    def _ours(self, units, ids):
        """By sector: whether its header is of this journal."""
        journal = self.journal
        unique = journal._id
        unit = journal._unit
        return [ids[s] == unique and units[s] & 0x1FF == unit for s in range(journal.sectors)]

    def _read_headers(self):
        """Begin anew: fill _seqs; return the units and journal ids of all sectors, 0 without a valid header."""
        journal = self.journal
        journal._ready = journal._void = self._seen = -1
        journal.usable = journal._carrying = journal.closed = journal.fresh = False
        journal._put_end = 0
        journal._tight = True
        journal._page[:] = b"\xff" * (2 * _PAGE)
        journal.damaged = 0
        ids = array("I", bytes(4 * journal.sectors))
        units = array("H", bytes(2 * journal.sectors))
        top = 0
        head = journal.buf[:48]
        for s in range(journal.sectors):
            journal._seqs[s] = 0
            journal._device.readblocks(s, head, 0)
            magic, version, flags, seq, unique, crc = unpack_from("<HBBIII", head)
            if magic != _MAGIC or version not in (_VERSION << 4 | 2, _VERSION << 4 | 4, _VERSION << 4 | 8):
                continue
            sealed = flags == 0xFE
            good = crc32(head[:_HEADER]) == _RESIDUE if not sealed else crc == crc32(head[_HEADER:], crc32(head[:12]))
            if good and seq < 0x3FFFFFFF:
                journal._seqs[s] = seq
                ids[s] = unique
                units[s] = 1 << (version & 15) | (0x200 if sealed else 0)
                top = max(top, seq)
        journal._next_seq = top + 1
        return units, ids

    def _enter(self, sector, units, ids):
        """Read a sector as one of the journal that it belongs to."""
        journal = self.journal
        journal._id = ids[sector]
        journal._set_unit(units[sector] & 0x1FF, units[sector] >> 9)
        if self._seen != sector:
            # All of it in one read: cells that power failed on read the same for everything that is decided here.
            journal._device.readblocks(sector, self._cells, 0)
            self._seen = sector
        if journal._sums:
            journal._sums[:] = self._cells[_HEADER:_SEALED]

    def _find_close(self, units, ids, order):
        """After an orderly shutdown: take up its snapshot and return True."""
        journal = self.journal
        for s in order[:2]:
            if units[s] & 0x1FF < journal._prog_size:
                return False
            self._enter(s, units, ids)
            pos = self._last_record(s)
            if pos < 0:
                if self._touched:
                    return False
                continue  # it may be one erased ahead
            arg = journal.buf[2] | journal.buf[3] << 8
            if (s == order[0]) == (arg >= _AHEAD):
                return False
            snap = s << 12 | (arg & 0x3FF) << 2
            if not journal.load(snap) or journal.buf[0] | 1 != _SNAP:
                return False
            journal.head = s
            if arg >= _AHEAD:
                if journal._seqs[order[0]] != journal._seqs[s] + 1 or not self._is_ours(order[0], units, ids):
                    return False
                journal._ready = order[0]
                journal._next_seq = journal._seqs[order[0]]
                journal._seqs[order[0]] = 0
            for other in order:
                if not self._is_ours(other, units, ids):
                    journal._seqs[other] = 0
            if not self._restore(snap):
                return False
            end = (pos & 0xFFF) + journal.room_for(0)
            journal._off = -(-end // _PAGE) * _PAGE if journal._sums else end
            return True
        return False

    def _last_record(self, sector):
        """The position of the CLOSE that ends what is programmed in a sector, loaded; -1 if something else does."""
        journal = self.journal
        off = _SECTOR
        cells = self._cells
        self._touched = False
        while off and not self._touched:
            off -= _PAGE
            if off and journal._sums:
                journal.buf[:] = cells[off : off + _PAGE]
                self._touched = journal._gap(off)[1] != 0xFF
            elif off:
                self._touched = cells[off : off + _PAGE] != journal._page1
        if not off and journal._first == _PAGE:
            return -1
        if journal._sums:  # what is not blank in this page cannot be seen
            tries = range(off + _PAGE - journal.room_for(0), max(off, journal._first) - 1, -journal._unit)
        else:
            n = _PAGE  # a page that is not blank as a whole
            step = _PAGE // 2
            while step:
                if cells[off + n - step : off + n] == journal._page1[:step]:
                    n -= step
                step >>= 1
            tries = (off + journal._pad(n) - journal.room_for(0),)
        for at in tries:
            if at >= journal._first and journal.load(sector << 12 | at):
                return sector << 12 | at if journal.buf[0] == _CLOSE else -1
        return -1

    def _restore(self, pos):
        """The record just loaded is a snapshot: take it up, unless it reads differently now."""
        journal = self.journal
        state = journal.body(pos)
        if state is None or len(state) < _TAIL_HEAD:
            return False
        journal._oldest, journal._void_seq, journal._void_from = unpack_from("<IIH", state)
        journal._tail_at = pos
        for s in range(journal.sectors):
            if journal._void_seq and journal._seqs[s] == journal._void_seq:
                journal._void = s
                if not journal._void_from:  # packed anew: it holds nothing, though its header is whole
                    journal._seqs[s] = 0
        journal._owner.restore(state[_TAIL_HEAD:])
        return True

    def _scan(self, sector):
        """Replay the sector entered last, from its first snapshot on; in front of it stand copies.  Afterwards:

        _end: offset behind the last valid record.  _junk: offset behind the last byte that may have been programmed
        after it, or _end.  Return the number of runs of bytes before _end that should have been records.
        _last, _last_kind, _last_arg, _last_crc: position of the last record, and what tells it from others.
        _begin: offset behind the last record but one, copies of the last not counted.  _flawed: damaged between them.
        _tail_at: the last snapshot, or -1.  _tail_end: offset behind TAIL.
        """
        journal = self.journal
        off = end = junk = begin = tail_end = journal._first
        damaged = doubt = flawed = 0
        last = last_kind = last_arg = last_stop = 0
        begins = True  # whether a record may begin at off
        tail_at = journal._tail_at = -1
        replay = journal._owner.replay
        buf = journal.buf
        unit = journal._unit
        sums = journal._sums
        seed = journal._seed(sector)
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
                            journal._crc = unpack_from("<I", cells, stop - 4)[0]
                        buf[:n] = cells[off : off + n]
                        if kind < _TAIL:
                            replay(kind, last)
                        else:
                            if kind == _TAIL:
                                tail_end = end
                            self._restore(last)
                            tail_at = journal._tail_at
                    off = end
                    continue
            n = unit
            filler = -1
            run = sums or (not kind or kind == 0xFF) and cells[off + 1] == kind
            if run or begins:
                n = min(_PAGE, _SECTOR - off)
                buf[:n] = cells[off : off + n]
                n, filler = journal._gap(off) if run else (unit, -1)
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
        journal = self.journal
        buf = journal.buf
        head = bytes(buf[:4])
        if head[1] != head[0] ^ head[2] ^ head[3] ^ 0xA5:
            return 0
        for _ in range(8):
            journal.read(pos, 0, buf[:4])
            if buf[:4] != head:
                return 0
        return journal.room_for(head[2] | head[3] << 8 if head[0] < 0x80 else 0)

    def _find_head(self, units, ids, seqs, order):
        """Find the newest sector that counts and replay it, see _scan(); return whether there is one.

        seqs: of all sectors; order: those with one, the newest first.  In _seqs only those remain that hold something.
        """
        journal = self.journal
        unfinished = []
        found = None
        for s in order:
            if units[s] & 0x1FF < journal._prog_size or found and not self._is_ours(s, units, ids):
                continue
            self._enter(s, units, ids)
            journal._void = -1
            ours = self._ours(units, ids)
            for other in range(journal.sectors):
                journal._seqs[other] = seqs[other] if ours[other] and other not in unfinished else 0
            if not found:
                journal.head = s
                journal._off = _SECTOR
            damaged = self._scan(s)
            if not found:
                if not damaged and (
                    journal._tail_at < 0
                    or self._last_kind == _TAIL and (self._junk == self._end or journal._sums)
                    or self._begin <= self._tail_end and not self._is_firm(s)
                ):
                    # Nothing behind its TAIL: it holds only copies, and all that they were made from is still there.
                    # The TAIL may be one that is read differently the next time.  (Nor is it damaged: records follow.)
                    unfinished.append(s)
                    continue
                found = self._begin, self._end, self._junk, self._last, self._last_kind
                found += self._last_arg, self._last_crc, self._flawed
            journal.damaged += damaged
            if journal._tail_at >= 0:
                break
        else:
            if not found:
                return False
            journal._owner.restore(b"")  # every TAIL is damaged: read all there is
            journal._oldest = 1
            journal._void_seq = 0
            s = -1
        if s != journal.head:
            self._catch_up(journal.start_of(s) if s >= 0 else journal.first())
        self._begin, self._end, self._junk, self._last, self._last_kind = found[:5]
        self._last_arg, self._last_crc, self._flawed = found[5:]
        return True

    def _is_firm(self, sector):
        """Whether a header always reads the same.

        An earlier mount may have found nothing behind the TAIL, where now there is something, and have lost its power
        while it did away with the header: then the sector must not begin to count.
        """
        journal = self.journal
        head = journal.buf[:_HEADER]
        journal._device.readblocks(sector, head, 0)
        first = bytes(head)
        for _ in range(32):
            journal._device.readblocks(sector, head, 0)
            if head != first:
                return False
        return True

    def _catch_up(self, pos):
        """The newest sector's TAIL is damaged: replay all from pos on, where there is one, or the oldest record."""
        journal = self.journal
        while pos >= 0:
            pos = journal.next(pos)
            if pos < 0:
                return
            kind = journal.buf[0]
            behind = journal.behind(pos)
            if kind | 1 == _SNAP:
                self._restore(pos)
            elif kind < _TAIL:
                journal._owner.replay(kind, pos)
            pos = behind

    def _settle(self):
        """After a cut: whatever the last program left half done reads the same from now on.

        The last valid record may lie in several places between _begin and _end.
        Order: first nothing torn can come back to life, then the last record is programmed once more, on a page that
        nothing was torn in.  This may be cut, and begin again, any number of times.
        Return False if the last record no longer reads back: it is gone now, all has to be read again without it.
        """
        journal = self.journal
        begin = self._begin
        end = self._end
        junk = self._junk
        kind = self._last_kind
        last = self._last
        # What was torn begins at end, or at the page behind the zeros of a mount that was cut itself.  It need not
        # show.  But for what shows it lies in one page; behind that the cells are good.
        if kind == _CLOSE:
            junk = max(junk, end + journal.room_for(0))  # an OPEN has to go there
        free = min((junk // _PAGE + 1) * _PAGE, _SECTOR)
        if end < free:
            # Behind a CLOSE blank flash is believed, and zeros cut short may look blank: so none before it is certain
            # that the next mount sees no CLOSE with nothing behind it.
            mark = min(end + journal.room_for(0), free)
            journal.load(journal.head << 12 | end)
            if kind != _CLOSE and self._length(journal.head << 12 | end) > journal.room_for(0):
                # A long record: its header goes last, for it tells the next mount how far all this went.
                mark = end | _PAGE - 1
                for page in range(free - _PAGE, mark, -_PAGE):
                    journal._zero(journal.head, page, page + _PAGE)
                journal._zero(journal.head, end, mark + 1)
            else:
                if kind == _CLOSE:
                    journal._off = end
                    journal._write(_OPEN, 0)  # which may be half there already
                else:
                    journal._zero(journal.head, end, mark)
                # Rising: each page tells the next mount to go on to the one behind.
                journal._zero(journal.head, mark, free)
        journal._off = free
        if kind >= _TAIL:
            if journal._sums and (free < _SECTOR or kind == _OPEN):
                # That one stands there must not depend on one that is in doubt.  Without room: the same once more.
                if free == _SECTOR:
                    journal._off = last & 0xFFF
                journal._write(_OPEN, 0)
                journal._off = max(free, journal._off)
            return True
        body = self._find(journal.head << 12, begin, end)
        if body is None:
            journal._zero(journal.head, begin, end)
            return False
        if self._flawed and self._is_spoilt(begin, body):
            journal.damaged -= self._flawed
        if free + journal.room_for(len(body)) <= _SECTOR:
            journal._rewrite(kind, body)
            journal._zero(journal.head, begin, end)  # or it would be read there, one time and not the other
            return True
        moved = journal._owner.moved(kind, body)
        if moved is None:
            return True
        try:
            journal._make_room(journal.room_for(len(moved)), 0, (kind, moved, begin))
            journal._write(_OPEN, 0)
        except JournalFull:
            # In place; encrypted, it is the same bits again.  With a 256-byte unit this is the one time that a page
            # with a record in it is at stake.
            journal._off = last & 0xFFF
            journal._rewrite(kind, body)
            journal._off = free
            for _ in range(32):
                if not journal.load(last):
                    # An earlier mount has found it torn, and been cut while it did away with it.
                    journal._zero(journal.head, begin, end)
                    return False
        return True

    def _is_spoilt(self, off, body):
        """Whether what stands at off is left of the last record, programmed to zeros by a mount that was cut."""
        journal = self.journal
        kind = self._last_kind
        arg = self._last_arg
        whole = pack("<BBH", kind, kind ^ arg & 255 ^ arg >> 8 ^ 0xA5, arg) + body + pack("<I", self._last_crc)
        found = bytearray(min(len(whole), _SECTOR - off))
        journal._device.readblocks(journal.head, found, off)
        for i in range(len(found)):
            if found[i] & ~whole[i]:
                return False
        return True

    def _find(self, base, off, end):
        """The body of the last record, as one read of it found it whole; None if none is left in off..end."""
        journal = self.journal
        while off < end:
            size = journal.load(base | off)
            if size and journal._crc == self._last_crc and journal.buf[0] == self._last_kind:
                body = journal.body(base | off)
                if body is not None:
                    return body
            off += journal._gap(off)[0]
        return None
