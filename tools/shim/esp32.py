"""Stand-in for esp32: flash partitions over simulated NOR flash (tools/norsim.py).

A test makes partitions with add_partition(); clear() forgets them.  For a program run as a whole, the environment does:

    MQTT_DURABLE_NOR             path of a Nor file: a data partition "mqj" of that file's size
    MQTT_DURABLE_NOR_SIZE        bytes when the file has to be made (65536)
    MQTT_DURABLE_NOR_PROG_SIZE   program unit when the file has to be made (4)
    MQTT_DURABLE_NOR_PROGRAM_US  time of a page program (0)
    MQTT_DURABLE_NOR_ERASE_MS    time of a sector erase (0)
    MQTT_DURABLE_NOR_KILL        "ops,program,erase,seed": the process dies in that program or erase from the start on,
                                 left half done in that way (norsim.MODES_PROGRAM, MODES_ERASE), e.g. "17,bits,mixed,3"
"""

import os

from norsim import Encrypted, Nor, read_counters

_EINVAL = 22
_ENOENT = 2
_ESP_ERR_INVALID_ARG = -0x102
_BLOCK_SIZE = 4096
_partitions = []  # (type, subtype, address, size, label, encrypted, device)


def add_partition(label, device, type=1, subtype=0x40, encrypted=False):
    """Add a partition that fills device (a Nor), behind those there are.

    encrypted: what device holds is the cipher text.
    """
    size = device.ioctl(4, 0) * device.ioctl(5, 0)
    address = 0x200000
    for p in _partitions:
        address = max(address, p[2] + p[3])
    _partitions.append((type, subtype, address, size, label, encrypted, device))


def clear():
    """Forget all partitions."""
    del _partitions[:]


def mcu_temperature():
    """Return the chip's temperature in degrees Celsius."""
    return 41


class Partition:
    """A partition by its label (OSError if there is none).  block_size: only 4096, the sector, is supported here.

    Encrypted: programs are multiples of 16 at multiples of 16, else OSError, and erased flash reads as noise; see
    norsim.Encrypted.
    """

    TYPE_APP = 0
    TYPE_DATA = 1

    def __init__(self, id, block_size=_BLOCK_SIZE):
        if block_size != _BLOCK_SIZE:
            raise ValueError("block_size %d: only the sector's is supported here" % block_size)
        if isinstance(id, str):
            found = [p for p in _partitions if p[4] == id]
            if not found:
                raise OSError(_ENOENT, "ENOENT")
            id = found[0]
        self._info = id[:6]
        self._encrypted = id[5]
        self._device = Encrypted(id[6]) if self._encrypted else id[6]

    @staticmethod
    def find(type=TYPE_APP, subtype=0xFF, label=None, block_size=_BLOCK_SIZE):
        """Return the partitions of that type; subtype 0xFF: any; label None: any."""
        return [
            Partition(p, block_size)
            for p in _partitions
            if p[0] == type and subtype in (0xFF, p[1]) and label in (None, p[4])
        ]

    def info(self):
        """Return (type, subtype, address, size, label, encrypted)."""
        return self._info

    def readblocks(self, n, buf, off=0):
        """Read len(buf) bytes; OSError past either end of the partition."""
        self._device.readblocks(n, buf, off)

    def writeblocks(self, n, buf, off=None):
        """Program buf, erasing whole sectors first if off is not given; OSError past either end of the partition."""
        if off is None and len(buf) % _BLOCK_SIZE:
            raise OSError(_EINVAL, "only whole sectors can be erased")
        if self._encrypted and (len(buf) % 16 or (off or 0) % 16):
            raise OSError(_ESP_ERR_INVALID_ARG, "ESP_ERR_INVALID_ARG")
        if off is None:
            self._device.writeblocks(n, buf)
        else:
            self._device.writeblocks(n, buf, off)

    def ioctl(self, op, arg):
        """4: number of sectors, 5: bytes of a sector, 6: erase sector arg; 1-3: 0; else None."""
        return self._device.ioctl(op, arg)


def _from_environment():
    path = os.getenv("MQTT_DURABLE_NOR")
    if not path:
        return
    try:
        found = read_counters(path)
        size, prog_size = found["size"], found["prog_size"]
    except OSError:
        size = int(os.getenv("MQTT_DURABLE_NOR_SIZE") or 65536)
        prog_size = int(os.getenv("MQTT_DURABLE_NOR_PROG_SIZE") or 4)
    nor = Nor(size, prog_size, path=path)
    nor.program_us = int(os.getenv("MQTT_DURABLE_NOR_PROGRAM_US") or 0)
    nor.erase_ms = int(os.getenv("MQTT_DURABLE_NOR_ERASE_MS") or 0)
    kill = os.getenv("MQTT_DURABLE_NOR_KILL")
    if kill:
        ops, program, erase, seed = kill.split(",")
        nor.kill_after(int(ops), program, erase, int(seed))
    add_partition("mqj", nor)


_from_environment()
