"""Where the journal lives: turns the home named in the configuration into a block device.

Owns the choice and the search order; knows nothing of records or MQTT.  Each home is a module of its own, loaded only
when it is the one used.
"""

import sys

from micropython import const

from ..errors import JournalUnavailable

_ERASE_SIZE = const(4096)
_MIN_BYTES = const(16384)  # four sectors: with fewer the ring cannot turn
_AUTO_LABEL = "mqj"
_AUTO_FILE = "journal.bin"


def open_home(home, size):
    """Return (device, prog_size, size in bytes) of the journal's home.

    home: "auto" | "partition:LABEL" | "file:PATH" | "ram".  auto is the ESP32 data partition "mqj" if there is one,
    on a host the file journal.bin in the current directory.
    size: bytes, for a home that has to be made; a multiple of 4096, at least 16384.  What exists keeps its own size.
    Raises ValueError for a bad argument, JournalUnavailable if the home is not there or cannot be used.
    """
    kind, _, name = home.partition(":")
    if home not in ("auto", "ram") and not (kind in ("partition", "file") and name):
        raise ValueError('home: found "%s", expected auto, partition:LABEL, file:PATH or ram' % home)
    if kind == "auto":
        kind, name = _find()
    if kind == "partition":
        from .partition import open_partition

        return open_partition(name)
    if size < _MIN_BYTES or size % _ERASE_SIZE:
        raise ValueError("size: found %d, expected a multiple of %d, at least %d" % (size, _ERASE_SIZE, _MIN_BYTES))
    if kind == "file":
        from .file import FileDevice

        device = FileDevice(name, size)
        return device, device.prog_size, device.size
    from .ram import RamDevice

    return RamDevice(size), RamDevice.prog_size, size


def _find():
    """Return (kind, name) of the home that "auto" stands for here."""
    try:
        from esp32 import Partition
    except ImportError:
        Partition = None
    if Partition is not None and Partition.find(Partition.TYPE_DATA, label=_AUTO_LABEL):
        return "partition", _AUTO_LABEL
    if sys.platform in ("linux", "darwin", "win32"):
        return "file", _AUTO_FILE
    raise JournalUnavailable(
        'no home for the journal: looked for an ESP32 data partition "%s"; add one to the partition table, '
        'or set journal.home to "partition:LABEL", "file:PATH" or "ram"' % _AUTO_LABEL
    )
