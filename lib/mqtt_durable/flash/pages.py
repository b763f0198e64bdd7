"""rp2.Flash for programs of a few bytes: the rest of their page is programmed with 0xFF, which changes nothing.

The driver of the Pico W takes only whole pages and checks nothing: of a shorter buffer it programs whatever follows in
RAM, past the end of the flash it freezes the board (ports/rp2/rp2_flash.c).  So bounds are checked here, always.
"""

from micropython import const

_SECTOR = const(4096)
_PAGE = const(256)
_EINVAL = const(22)


class Pages:
    """count sectors of flash (an rp2.Flash) from its block first on, which may be negative: below the file system.

    A program may begin and end at any multiple of 4 and goes through a buffer in RAM, where the driver needs it.
    """

    prog_size = 4
    whole_pages = True  # a caller with a page in RAM does better to pass all of it

    def __init__(self, flash, first, count):
        self._flash = flash
        self._first = first
        self._count = count
        self._page = memoryview(bytearray(b"\xff" * _PAGE))

    def readblocks(self, n, buf, off=0):
        """Read len(buf) bytes at sector n, off bytes into it.  OSError if that is not inside."""
        if not (0 <= n < self._count and 0 <= off <= _SECTOR - len(buf)):
            self._check(n, off, len(buf))
        self._flash.readblocks(self._first + n, buf, off)

    def writeblocks(self, n, buf, off=None):
        """Program buf at sector n, off bytes into it; without off erase the sectors it fills first."""
        size = len(buf)
        if size == _PAGE and off is not None and not off & ~0xF00 and 0 <= n < self._count:
            self._flash.writeblocks(self._first + n, buf, off)
            return
        self._check(n, off or 0, size)
        if off is None:
            if size % _SECTOR:
                raise OSError(_EINVAL, "EINVAL")
            for i in range(size // _SECTOR):
                self.ioctl(6, n + i)
            off = 0
        if off % 4 or size % 4:
            raise OSError(_EINVAL, "EINVAL")
        buf = memoryview(buf)
        page = self._page
        done = 0
        while done < size:
            begin = off % _PAGE
            k = min(_PAGE - begin, size - done)
            page[begin : begin + k] = buf[done : done + k]
            try:
                self._flash.writeblocks(self._first + n, page, off - begin)
            finally:
                page[begin : begin + k] = b"\xff" * k
            done += k
            off += k

    def ioctl(self, op, arg):
        """4: number of sectors, 5: bytes of a sector, 6: erase sector arg; 1-3: 0; else None."""
        if op == 4:
            return self._count
        if op == 5:
            return _SECTOR
        if op == 6:
            self._check(arg, 0, _SECTOR)
            self._flash.ioctl(6, self._first + arg)
            return 0
        return 0 if op in (1, 2, 3) else None

    def _check(self, n, off, length):
        at = n * _SECTOR + off
        if n < 0 or off < 0 or at + length > self._count * _SECTOR:
            raise OSError(_EINVAL, "EINVAL")
