"""A plain file as the journal's home, for hosts: a block device whose sectors stand one after the other.

Every program and erase has reached the disk when it returns (flush, and fsync where os has it; on MicroPython flush
does both).
"""

import os

from micropython import const

from ..errors import JournalUnavailable
from .sectors import BLANK, BLANKS, Sectors

_ERASE_SIZE = const(4096)
_MIN_BYTES = const(16384)
_EIO = const(5)


class FileDevice(Sectors):
    """The file at path, made with size bytes if it is not there.  size, prog_size: what it has.

    A file that exists keeps its data and its own size.  Raises JournalUnavailable if that is not a multiple of 4096
    of at least 16384, or if the file cannot be made or opened.
    """

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
            for _ in range(BLANKS * (size // _ERASE_SIZE)):
                f.write(BLANK)
            _sync(f)
        os.rename(path + ".new", path)

    def get(self, at, buf):
        self._file.seek(at)
        if self._file.readinto(buf) != len(buf):
            raise OSError(_EIO, "EIO")

    def put(self, at, data, times):
        self._file.seek(at)
        for _ in range(times):
            self._file.write(data)
        _sync(self._file)

    def close(self):
        """Close the file; nothing is left to write."""
        self._file.close()


def _sync(f):
    f.flush()
    if hasattr(os, "fsync"):
        os.fsync(f.fileno())
