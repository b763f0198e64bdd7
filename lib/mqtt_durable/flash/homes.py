"""Which home is meant, and its opening: what open_home() and resolve() of the package do, see there."""

import sys

from micropython import const

from ..once import once

_ERASE_SIZE = const(4096)
_MIN_BYTES = const(16384)  # four sectors: with fewer the ring cannot turn
_AUTO_LABEL = "mqj"
_AUTO_FILE = "journal.bin"
_AUTO_DIRECTORY = "/mqj"
_HOSTS = ("linux", "darwin", "win32")


def open_home(home, size, anew):
    kind, _, name = resolve(home).partition(":")
    if kind == "partition":
        return once("flash.partition", "open_partition", name)
    if size < _MIN_BYTES or size % _ERASE_SIZE:
        raise ValueError("size: found %d, expected a multiple of %d, at least %d" % (size, _ERASE_SIZE, _MIN_BYTES))
    if kind == "file":
        from .file import FileDevice

        device = FileDevice(name, size)
    elif kind == "pinned":
        device = once("flash.pinning", "open_pinned", name or _AUTO_DIRECTORY, size, anew)
    elif kind == "gap":
        device = once("flash.gap", "open_gap", size)
    else:
        from .ram import RamDevice

        device = RamDevice(size)
    return device, device.prog_size, device.ioctl(4, 0) * _ERASE_SIZE


def resolve(home):
    kind, _, name = home.partition(":")
    if not (home in ("auto", "pinned", "gap", "ram") or (name and kind in ("partition", "file", "pinned"))):
        raise ValueError(
            'home: found "%s", expected auto, partition:LABEL, pinned, pinned:DIRECTORY, gap, file:PATH or ram' % home
        )
    if kind != "auto":
        return home
    try:
        from esp32 import Partition
    except ImportError:
        Partition = None
    if Partition is not None and Partition.find(Partition.TYPE_DATA, label=_AUTO_LABEL):
        return "partition:" + _AUTO_LABEL
    return "file:" + _AUTO_FILE if sys.platform in _HOSTS else "pinned"
