"""The gap between the end of the firmware and the file system of a Pico W as the journal's home, only when asked for.

No file to delete, and it survives a new file system; a larger firmware overwrites it, and then the journal begins anew.
rp2.Flash takes block numbers without a check, so negative ones reach the flash below the file system.  Whether there is
a gap is read from what the firmware declares of itself (pico-sdk, pico_binary_info): both its ends, or it is refused.
"""

from struct import unpack

from micropython import const

from ..errors import JournalUnavailable
from .pages import Pages

_SECTOR = const(4096)
_MIN_BYTES = const(16384)
_XIP = const(0x10000000)  # where the flash is seen in memory
_FLASH_END = const(0x11000000)
_SEARCHED = const(4096)  # bytes of the image in which its binary info is found: 256 behind boot2 on RP2040
_ENTRIES = const(1000)
_MARKER = b"\xf2\xeb\x88\x71"  # 0x7188ebf2, start, end, mapping table, 0xe71aa390
_MARKER_END = const(0xE71AA390)
_ID_AND_INT = const(5)
_BLOCK_DEVICE = const(7)
_RASPBERRY_PI = const(0x5052)  # tag "RP"
_BINARY_END = const(0x68F465DE)


def open_gap(size):
    """Return the device of the last size bytes below the file system, fewer if the gap is smaller.

    Raises JournalUnavailable where the gap is not known to be one.
    """
    try:
        from machine import mem8
        from rp2 import Flash
    except ImportError:
        Flash = None
    if Flash is None:
        raise _no("only a Pico has one")
    flash = Flash()
    end, devices = _declared(mem8)
    storage = flash.ioctl(4, 0) * _SECTOR
    base = 0
    for address, length in devices:
        if length == storage and not base:
            base = address
    if not end or not base:
        raise _no("the firmware does not declare its end and its file system")
    begin = (end + _SECTOR - 1) & -_SECTOR
    for address, length in devices:
        if address != base and address < base and address + length > begin:
            raise _no("the firmware has another block device there")
    if base - begin < _MIN_BYTES:
        raise _no("there are %d bytes between firmware and file system, it needs %d" % (base - begin, _MIN_BYTES))
    # Block numbers below 0 have to mean what they are taken for: the image's own sectors must be found at theirs.
    for address in (_XIP, begin - _SECTOR, base - _SECTOR):
        found = bytearray(256)
        try:
            flash.readblocks((address - base) // _SECTOR, found, 0)
        except (OSError, ValueError):  # a driver that checks
            pass
        if found != _memory(mem8, address, 256):
            raise _no("this firmware's rp2.Flash does not read it")
    count = min(size, base - begin) // _SECTOR
    return Pages(flash, -count, count)


def _no(why):
    return JournalUnavailable("no gap for the journal: %s; choose another journal.home" % why)


def _memory(mem8, at, n):
    """n bytes of memory: packed structures need not be aligned, as mem32 wants them."""
    found = bytearray(n)
    for i in range(n):
        found[i] = mem8[at + i]
    return bytes(found)


def _declared(mem8):
    """Return the end of the firmware, 0 if it is not declared, and (address, size) of every block device it declares.

    Nothing at all is believed of a list that is not whole.
    """
    head = _memory(mem8, _XIP, _SEARCHED)
    at = head.find(_MARKER)
    while at >= 0:
        if at % 4 == 0 and at + 20 <= _SEARCHED:
            _, first, last, _, marker = unpack("<5I", head[at : at + 20])
            if marker == _MARKER_END:
                break
        at = head.find(_MARKER, at + 1)
    end = 0
    devices = []
    if at < 0 or not _XIP <= first <= last <= _FLASH_END or last - first > 4 * _ENTRIES:
        return end, devices
    for pointer in range(first, last - 3, 4):
        at = unpack("<I", _memory(mem8, pointer, 4))[0]
        if not _XIP <= at < _FLASH_END - 24:
            return 0, []
        kind, tag, a, b, c = unpack("<HHIII", _memory(mem8, at, 16))
        if kind == _ID_AND_INT and tag == _RASPBERRY_PI and a == _BINARY_END:
            end = b
        elif kind == _BLOCK_DEVICE:  # name, address, size
            devices.append((b, c))
    return end if _XIP < end < _FLASH_END else 0, devices
