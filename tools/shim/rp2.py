"""Stand-in for rp2: the flash of a Pico W, over simulated NOR flash (tools/norsim.py).

What the real driver (ports/rp2/rp2_flash.c) does silently or fatally is an error here: it checks nothing, programs
whatever follows a buffer that is not a multiple of 256 bytes, and freezes the board past the end of the flash.
Negative block numbers reach what lies below the file system, as they do there, if set_flash() was told of anything.
"""

from network import country  # noqa: F401  the same function on a board
from norsim import Nor

_BLOCK_SIZE = 4096
_PAGE = 256
_STOCK_BLOCKS = 212  # of a Pico W
_nor = None
_base = 0  # where in _nor the storage area begins


class FlashTrap(Exception):
    """A call that would have harmed a real board.  The argument says how."""


def set_flash(nor, storage=None):
    """Use nor, a Nor with prog_size 256, as the storage area; None: a new blank one of a Pico W's size.

    storage: bytes of the storage area when that is only the end of nor, the whole flash from its first byte on.
    """
    global _nor, _base
    _nor = nor
    _base = nor.size - storage if storage else 0


def memory(offset, n):
    """Return n bytes of the flash as they are seen in memory, offset bytes behind its beginning."""
    if _nor is None or not 0 <= offset <= _nor.size - n:
        raise FlashTrap("memory 0x%x: no flash is there, the board would stop in a hard fault" % offset)
    return bytes(_nor.mem[offset : offset + n])


class Flash:
    """The storage area, or the window of len bytes from start on (ValueError if not whole sectors of it)."""

    def __init__(self, *, start=-1, len=-1):
        global _nor
        if _nor is None:
            _nor = Nor(_STOCK_BLOCKS * _BLOCK_SIZE, _PAGE)
        self._nor = _nor
        storage = _nor.size - _base
        if start != -1 and not (0 <= start < storage and start % _BLOCK_SIZE == 0):
            raise ValueError
        self._start = _base + max(start, 0)
        if len != -1 and not (0 < len <= _nor.size - self._start and len % _BLOCK_SIZE == 0):
            raise ValueError
        self._size = len if len != -1 else _nor.size - self._start

    def readblocks(self, n, buf, off=0):
        """Read len(buf) bytes; any offset and length inside."""
        at = self._address(n, off, len(buf))
        self._nor.readblocks(0, buf, at)

    def writeblocks(self, n, buf, off=None):
        """Program whole pages; without off, erase the sectors touched first."""
        at = self._address(n, off or 0, len(buf))
        if at % _PAGE or len(buf) % _PAGE:
            raise FlashTrap(
                "program of %d bytes at 0x%x: not whole pages of %d, the board would program what follows in RAM"
                % (len(buf), at, _PAGE)
            )
        if off is None:
            if len(buf) % _BLOCK_SIZE:
                raise FlashTrap(
                    "erase of %d bytes: the board erases whole sectors, the rest of the last one too" % len(buf)
                )
            self._nor.writeblocks(at // _BLOCK_SIZE, buf)
        else:
            self._nor.writeblocks(0, buf, at)

    def ioctl(self, op, arg):
        """4: number of sectors, 5: bytes of a sector, 6: erase sector arg; 1-3: 0; else None."""
        if op == 4:
            return self._size // _BLOCK_SIZE
        if op == 6:
            return self._nor.ioctl(6, self._address(arg, 0, _BLOCK_SIZE) // _BLOCK_SIZE)
        return self._nor.ioctl(op, arg)

    def _address(self, n, off, length):
        at = n * _BLOCK_SIZE + off
        if at < 0 and (not _base or self._start + at < 0):
            raise FlashTrap("block %d offset %d: below the storage, the board would reach its own firmware" % (n, off))
        if at + length > self._size:
            raise FlashTrap("block %d offset %d: past the end of the flash, the board would freeze" % (n, off))
        return self._start + at
