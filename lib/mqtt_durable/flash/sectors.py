"""The block device protocol over anything that holds plain bytes: what the file and RAM homes have in common."""

from micropython import const

_ERASE_SIZE = const(4096)
_EINVAL = const(22)
# A sector in pieces: a heap that has been used for a while may have no room for a whole one.
BLANK = b"\xff" * 256
BLANKS = const(16)


class Sectors:
    """A block device of .size bytes.

    A program replaces the bytes; it does not only clear bits as flash does, so nothing may be built on that.
    A device has get(at, buf) and put(at, data, times), which puts data there so many times in a row; at counts from its
    beginning.
    """

    prog_size = 4

    def readblocks(self, n, buf, off=0):
        """Read len(buf) bytes at sector n, off bytes into it.  OSError if that is not inside."""
        self.get(self._address(n, off, len(buf)), buf)

    def writeblocks(self, n, buf, off=None):
        """Program buf at sector n, off bytes into it; without off it fills whole sectors.  OSError if not inside."""
        if off is None and len(buf) % _ERASE_SIZE:
            raise OSError(_EINVAL, "EINVAL")
        self.put(self._address(n, off or 0, len(buf)), buf, 1)

    def ioctl(self, op, arg):
        """4: number of sectors, 5: bytes of a sector, 6: erase sector arg; 1-3: 0; else None."""
        if op == 4:
            return self.size // _ERASE_SIZE
        if op == 5:
            return _ERASE_SIZE
        if op == 6:
            self.put(self._address(arg, 0, _ERASE_SIZE), BLANK, BLANKS)
            return 0
        return 0 if op in (1, 2, 3) else None

    def _address(self, n, off, length):
        at = n * _ERASE_SIZE + off
        if at < 0 or at + length > self.size:
            raise OSError(_EINVAL, "EINVAL")
        return at
