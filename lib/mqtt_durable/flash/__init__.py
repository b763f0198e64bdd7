"""Where the journal lives: turns the home named in the configuration into a block device.

Owns the choice and the search order; knows nothing of records or MQTT.  Each home is a module of its own, loaded only
when it is the one used.
"""

import sys

from micropython import const

_ERASE_SIZE = const(4096)
_MIN_BYTES = const(16384)  # four sectors: with fewer the ring cannot turn
_AUTO_LABEL = "mqj"
_AUTO_FILE = "journal.bin"
_AUTO_DIRECTORY = "/mqj"
_HOSTS = ("linux", "darwin", "win32")


def open_home(home, size, anew=False):
    """Return (device, prog_size, size in bytes) of the journal's home.

    home: "auto" | "partition:LABEL" | "pinned" | "pinned:DIRECTORY" | "gap" | "file:PATH" | "ram".  auto is the ESP32
    data partition "mqj" if there is one, else on a board "pinned", on a host the file journal.bin in the current
    directory.
    size: bytes, for a home that has to be made; a multiple of 4096, at least 16384.  What exists keeps its own size.
    anew: the home was lost while in use (JournalLost): what is left there is no journal any more.
    Raises ValueError for a bad argument, JournalUnavailable if the home is not there or cannot be used.
    """
    kind, _, name = resolve(home).partition(":")
    if kind == "partition":
        from .partition import open_partition

        return open_partition(name)
    if size < _MIN_BYTES or size % _ERASE_SIZE:
        raise ValueError("size: found %d, expected a multiple of %d, at least %d" % (size, _ERASE_SIZE, _MIN_BYTES))
    if kind == "file":
        from .file import FileDevice

        device = FileDevice(name, size)
    elif kind == "pinned":
        from .pinned import open_pinned

        device = open_pinned(name or _AUTO_DIRECTORY, size, anew)
    elif kind == "gap":
        from .gap import open_gap

        device = open_gap(size)
    else:
        from .ram import RamDevice

        device = RamDevice(size)
    return device, device.prog_size, device.ioctl(4, 0) * _ERASE_SIZE


def resolve(home):
    """Return home, or what "auto" stands for here.  Raises ValueError for a bad argument."""
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
