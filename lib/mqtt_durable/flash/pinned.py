"""Pinned blocks: the journal's home on stock firmware, in files of a littlefs2 file system, used raw.

A file of exactly 4096 bytes is one block, which littlefs neither moves nor checksums nor reads while nobody writes to
the file.  So each sector of the journal is such a file, NNN.COUNT in a directory of its own, and the journal programs
and erases its block directly.  The blocks are found at every start, by mounting the file system once more through a
block device that notes which block is read: littlefs itself tells, and no block number is ever stored.

What keeps every other file safe: littlefs erases a block before it uses it again, so a sector's first 16 bytes are what
they are known to be only as long as the block is ours.  They are read before every program and erase.  Where they tell
nothing (a blank sector that was not just erased here, cells that power failed on), or are not as known, the file is
located again; before an erase always, together with the sector programmed last.  If the file is not there, not of its
size or in another block, raw access ends for good, and every call raises JournalLost.  So that the bytes do tell, a
sector never is without a header, the journal's or a free one, but between our own erase and the header that follows it.

pinning.py makes the files and opens what is there.
"""

from array import array
from binascii import crc32
from os import urandom
from struct import pack, unpack

from micropython import const

from ..errors import JournalLost, JournalUnavailable
from .board import shadow

_SECTOR = const(4096)
_PAGE = const(256)
_HEADER = const(16)
_JOURNAL = const(0x4A4D)  # "MJ": <HBBIII magic, unit, state, seq, id, then their CRC, see FORMAT.md
_FREE = const(0x6A6D)  # "mj", ten random bytes, then their CRC; programmed over by the journal "mj" becomes "MJ"
_NOT_LOCATED = const(-2)
_EINVAL = const(22)


def _is_ours(head):
    """Whether these 16 bytes are a sector's header: the journal's or a free one, or either disowned by the journal."""
    magic, a, seq, unique, crc = unpack("<HHIII", head)
    if magic != _JOURNAL and magic != _FREE:
        return False
    # Disowned: all zeros but for magic and id.
    return crc == crc32(head[:12]) or not (a or seq or crc or unique in (0, 0xFFFFFFFF))


def free_header():
    head = pack("<H", _FREE) + urandom(10)
    return head + pack("<I", crc32(head))


class PinnedDevice:
    """A block device whose sectors are files of the directory at path.

    fs: a function that returns the VfsLfs2 mounted there.  flash: its block device, programmable in multiples of 4
    bytes (rp2: see pages.Pages).  count: of sectors.  rehome_laps: once in so many laps of the journal a sector moves
    to another block, which littlefs chooses, so that all the free blocks share the wear; 0: never.  Made by
    pinning.pin(), which sees to it that the files are there and located.

    Reads and programs stay within a sector, programs begin and end at multiples of 4, else OSError.
    .note: None, or what was found to be lost when it was opened.  .lost: None, or why every call raises JournalLost.
    """

    prog_size = 4

    def __init__(self, fs, flash, path, count, rehome_laps):
        self._fs = fs
        self._flash = flash
        self.whole_pages = getattr(flash, "whole_pages", False)
        self._path = path
        self._count = count
        self._laps = rehome_laps
        self._blocks = array("i", [_NOT_LOCATED] * count)
        self._known = array("i", self._blocks)
        self._head = memoryview(bytearray(_HEADER))
        self._sharing = 0
        self._blank = -1  # the sector erased by the last call that was not about that sector alone
        self._last = 0  # the sector programmed last
        self.note = self.lost = None

    # -- the block device

    def readblocks(self, n, buf, off=0):
        """Read len(buf) bytes of sector n, from off on."""
        block = self._block(n, off, len(buf))
        if n != self._blank:
            self._blank = -1
        self._flash.readblocks(block, buf, off)

    def writeblocks(self, n, buf, off=None):
        """Program buf into sector n from off on; without off erase it first, then program all of it."""
        size = len(buf)
        if off and off >= _HEADER and 0 <= n < self._count and off + size <= _SECTOR and not (off | size) & 3:
            # The usual case, all in one piece: the header is the one that is known.
            known = self._known[n]
            if known >= 0 and not self.lost:
                flash = self._flash
                head = self._head
                block = self._blocks[n]
                flash.readblocks(block, head, 0)
                if crc32(head) & 0x3FFFFFFF == known:
                    self._blank = -1
                    self._last = n
                    flash.writeblocks(block, buf, off)
                    return
        if (off or 0) % 4 or size % 4 or (off is None and size != _SECTOR):
            raise OSError(_EINVAL, "EINVAL")
        if off is None:
            self.ioctl(6, n)
            off = 0
        self._block(n, off, size)
        self._guard(n)
        self._blank = -1
        self._last = n
        try:
            self._flash.writeblocks(self._blocks[n], buf, off)
        finally:
            if off < _HEADER:
                self._known[n] = self.learn(n)

    def ioctl(self, op, arg):
        """4: number of sectors, 5: bytes of a sector, 6: erase sector arg; 1-3: 0; else None."""
        if op == 4:
            return self._count
        if op == 5:
            return _SECTOR
        if op == 6:
            self._block(arg, 0, 0)
            self._erase(arg)
            return 0
        return 0 if op in (1, 2, 3) else None

    def sharing(self):
        """How many blocks share the wear of the journal."""
        if not self._sharing:
            self._sharing = self._count
            if self._laps:
                try:
                    self._sharing += self._fs().statvfs(self._path)[3]
                except (OSError, JournalUnavailable):
                    pass
        return self._sharing

    def _block(self, n, off, length):
        if self.lost:
            raise JournalLost(self.lost)
        if not 0 <= n < self._count or off < 0 or off + length > _SECTOR:
            raise OSError(_EINVAL, "EINVAL")
        if self._blocks[n] == _NOT_LOCATED:
            self._confirm((n,))
        return self._blocks[n]

    def _erase(self, n):
        self._guard(n)
        magic, _, seq = unpack("<HHI", self._head[:8])
        lap = seq // self._count
        if self._laps and magic == _JOURNAL and lap and (lap + n) % self._laps == 0:
            self._rehome(n)
        self._confirm((n, self._last))
        self._known[n] = -1
        self._flash.ioctl(6, self._blocks[n])
        self._blank = n

    # -- the guards

    def learn(self, n):
        """Read the header of sector n into _head; return what is known of it from now on, -1: it does not tell."""
        self._flash.readblocks(self._blocks[n], self._head, 0)
        return crc32(self._head) & 0x3FFFFFFF if _is_ours(self._head) else -1

    def _guard(self, n):
        """Return when the block of sector n is known to be ours, its header in _head; JournalLost if it is not."""
        known = self.learn(n)
        if known != self._known[n] or (known < 0 and self._blank != n):
            self._confirm((n,))
            self._known[n] = known

    def _confirm(self, sectors):
        """Return when the files of these sectors are all where they were; JournalLost if one is not."""
        wrong = self._compare(sectors)
        if wrong:
            try:
                settle(self._fs(), self._path)
            except JournalUnavailable:  # unmounted
                pass
            wrong = self._compare(sectors)
            if wrong:
                self.lost = "%s while the journal used it: what waited there is lost" % wrong
                raise JournalLost(self.lost)

    def _compare(self, sectors):
        """Return None, or what has become of a file that is not where it was.  One not located yet is, here."""
        now = None
        for n in sectors:
            try:
                now = now or shadow(self._flash)
                block = self.locate(now, n)
            except OSError:
                block = -1
            if self._blocks[n] == _NOT_LOCATED and block > 1:
                self._blocks[n] = block
                self._known[n] = self.learn(n)
            if block != self._blocks[n]:
                what = "rewritten" if block > 1 else "deleted, renamed or changed in size"
                return "%s was %s" % (self.file(n), what)
        return None

    def locate(self, now, n):
        """The block of sector n, -1 if its file has another size.  now: of shadow().  OSError if there is none."""
        tracer, fs = now
        with fs.open(self.file(n), "rb") as file:
            if file.seek(0, 2) != _SECTOR:
                return -1
            file.seek(0)
            tracer.block = -1
            file.read(1)
        return tracer.block

    # -- the files

    def file(self, n):
        return "%s/%03d.%d" % (self._path, n, self._count)

    def make(self, fs, n):
        """Make the file of sector n, in place of the one there is; a cut leaves either."""
        name = self.file(n)
        new = name + ".new"
        try:
            with fs.open(new, "wb") as file:
                file.write(free_header())
                file.write(b"\xff" * (_PAGE - _HEADER))
                blank = b"\xff" * _PAGE
                for _ in range(_SECTOR // _PAGE - 1):
                    file.write(blank)
            fs.rename(new, name)
        except (OSError, MemoryError):
            remove(fs, new)
            raise

    def _rehome(self, n):
        """Give the dead sector n another block; where the file system has none it stays where it is."""
        self._confirm((n,))  # or a file that somebody else put there would be replaced
        self._blocks[n] = _NOT_LOCATED
        try:
            self.make(self._fs(), n)
        except (OSError, JournalUnavailable, MemoryError):
            pass
        self._confirm((n,))


def settle(fs, path):
    """Have littlefs end what a cut or a full disk has interrupted: until then it may hide files that are there.

    It does so before it writes anything, and also before it finds that there is nothing to remove.
    """
    remove(fs, path + "/nothing")


def remove(fs, name):
    try:
        fs.remove(name)
    except OSError:
        pass
