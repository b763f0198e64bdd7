"""A plain file as the journal's home, for hosts: a block device whose sectors stand one after the other.

Every program and erase has reached the disk when it returns (flush, and fsync where os has it; on MicroPython flush
does both).  A program replaces the bytes; it does not only clear bits as flash does, so nothing may be built on that.
"""

import os

from micropython import const

from ..errors import JournalUnavailable

_ERASE_SIZE = const(4096)
_MIN_BYTES = const(16384)
_EINVAL = const(22)
_EIO = const(5)


class FileDevice:
    """The file at path, made with size bytes if it is not there.  size, prog_size: what it has.

    A file that exists keeps its data and its own size.  Raises JournalUnavailable if that is not a multiple of 4096
    of at least 16384, or if the file cannot be made or opened.
    """

    prog_size = 4

    def __init__(self, path, size):
        problem = None
        try:
            try:
                self._file = open(path, "r+b")
            except OSError as e:
                if e.errno != 2:  # ENOENT
                    raise
                self._make(path, size)
                self._file = open(path, "r+b")
            self.size = self._file.seek(0, 2)
        except OSError as e:
            problem = e
        if problem:
            raise JournalUnavailable("file %s: cannot be opened or made (%s); change journal.home" % (path, problem))
        if self.size < _MIN_BYTES or self.size % _ERASE_SIZE:
            self._file.close()
            raise JournalUnavailable(
                "file %s: it has %d bytes, no journal's size (a multiple of %d, at least %d); move it away or change "
                "journal.home" % (path, self.size, _ERASE_SIZE, _MIN_BYTES)
            )

    def _make(self, path, size):
        # Under another name until it is whole: a cut in between leaves no journal of a wrong size.
        with open(path + ".new", "wb") as f:
            blank = b"\xff" * _ERASE_SIZE
            for _ in range(size // _ERASE_SIZE):
                f.write(blank)
            _sync(f)
        os.rename(path + ".new", path)

    def readblocks(self, n, buf, off=0):
        """Read len(buf) bytes at sector n, off bytes into it.  OSError if that is not inside the file."""
        self._seek(n, off, len(buf))
        if self._file.readinto(buf) != len(buf):
            raise OSError(_EIO, "EIO")

    def writeblocks(self, n, buf, off=None):
        """Program buf at sector n, off bytes into it; without off it fills whole sectors.  OSError if not inside."""
        if off is None and len(buf) % _ERASE_SIZE:
            raise OSError(_EINVAL, "EINVAL")
        self._seek(n, off or 0, len(buf))
        self._file.write(buf)
        _sync(self._file)

    def ioctl(self, op, arg):
        """4: number of sectors, 5: bytes of a sector, 6: erase sector arg; 1-3: 0; else None."""
        if op == 4:
            return self.size // _ERASE_SIZE
        if op == 5:
            return _ERASE_SIZE
        if op == 6:
            self.writeblocks(arg, b"\xff" * _ERASE_SIZE, 0)
            return 0
        return 0 if op in (1, 2, 3) else None

    def close(self):
        """Close the file; nothing is left to write."""
        self._file.close()

    def _seek(self, n, off, length):
        at = n * _ERASE_SIZE + off
        if at < 0 or at + length > self.size:
            raise OSError(_EINVAL, "EINVAL")
        self._file.seek(at)


def _sync(f):
    f.flush()
    if hasattr(os, "fsync"):
        os.fsync(f.fileno())
