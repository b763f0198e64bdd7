"""An ESP32 flash partition as the journal's home: esp32.Partition is used as it comes."""

from micropython import const

from ..errors import JournalUnavailable

_ERASE_SIZE = const(4096)
_MIN_BYTES = const(16384)
_PROG_SIZE = const(4)
_CIPHER_BLOCK = const(16)  # what esp_partition_write() takes where the partition is encrypted
_ENCRYPTED = const(5)  # place in Partition.info() (ports/esp32/esp32_partition.c)
_SIZE = const(3)


def open_partition(label):
    """Return (device, prog_size, size in bytes) of the data partition with that label.

    In an encrypted one erased flash does not read 0xFF; the journal sees that by itself.
    Raises JournalUnavailable if there is none, or it is too small for a journal.
    """
    try:
        from esp32 import Partition
    except ImportError:
        Partition = None
    if Partition is None:
        raise JournalUnavailable(
            'partition "%s": this board has no ESP32 partitions; set journal.home to another home' % label
        )
    found = Partition.find(Partition.TYPE_DATA, label=label)
    if not found:
        raise JournalUnavailable(
            'partition "%s": no data partition has that label; add it to the partition table or change journal.home'
            % label
        )
    device = found[0]
    info = device.info()
    size = info[_SIZE] // _ERASE_SIZE * _ERASE_SIZE
    if size < _MIN_BYTES:
        raise JournalUnavailable(
            'partition "%s": it has %d bytes, a journal needs at least %d; make it larger'
            % (label, info[_SIZE], _MIN_BYTES)
        )
    return device, _CIPHER_BLOCK if info[_ENCRYPTED] else _PROG_SIZE, size
