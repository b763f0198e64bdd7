"""What stock firmware has made of the board's flash: the file system that is mounted, and the block device below it."""

import os

from ..errors import JournalUnavailable

try:
    import vfs
except ImportError:  # before MicroPython 1.23
    vfs = os


def unsuitable(path, why):
    """Return the JournalUnavailable that says why no file at path can be used raw, and what to do."""
    return JournalUnavailable(
        'pinned:%s: %s, or set journal.home to "partition:LABEL", "file:PATH" or "ram"' % (path, why)
    )


def mounted(path):
    """Return the littlefs2 that path lies in, as it is mounted now, and the path in it.  Raises JournalUnavailable."""
    try:
        mounts = vfs.mount()
    except TypeError:  # this firmware does not list them; what it is shows when it is mounted once more
        return _Files(), path
    best = None
    for fs, point in mounts:
        point = point.rstrip("/")
        if path.startswith(point + "/") and (best is None or len(point) > len(best[1])):
            best = fs, point
    if best is None:
        raise unsuitable(path, "no file system is mounted there: mount one")
    if not isinstance(best[0], vfs.VfsLfs2):
        kind = type(best[0]).__name__
        raise unsuitable(path, "the file system is %s, and only littlefs2 leaves files in their blocks: use it" % kind)
    return best[0], path[len(best[1]) :]


def file_system(path):
    """Return a function that returns the littlefs2 that path lies in, as it is mounted at that moment.

    To be asked at each use: a file system object must not be used when it is no longer the one mounted.
    """
    return lambda: mounted(path)[0]


def shadow(device):
    """Mount the littlefs2 on a block device once more, as it is on the flash now, only to read.

    Returns (tracer, file system): tracer.block is the block read last.  OSError where there is no littlefs2.
    """
    tracer = _Tracer(device)
    return tracer, vfs.VfsLfs2(tracer, readsize=256, progsize=256, lookahead=16)


class _Tracer:
    """A block device that only reads, and remembers where."""

    def __init__(self, device):
        self._device = device
        self.block = -1

    def readblocks(self, n, buf, off=0):
        self.block = n
        self._device.readblocks(n, buf, off)

    def writeblocks(self, n, buf, off=0):
        return -30  # EROFS

    def ioctl(self, op, arg):
        return self._device.ioctl(op, arg) if op == 4 or op == 5 else -30 if op == 6 else 0


class _Files:
    """The calls of the file system at the root, by way of os."""

    def __init__(self):
        self.open = open
        self.ilistdir = os.ilistdir
        self.mkdir = os.mkdir
        self.remove = os.remove
        self.rename = os.rename
        self.statvfs = os.statvfs
