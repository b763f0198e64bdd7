"""The journal in the gap below a Pico's file system: only where the firmware's own words say that there is one."""

from binascii import crc32
from struct import pack

import rp2
from mqtt_durable.errors import JournalUnavailable
from mqtt_durable.flash import open_home
from norsim import Nor
from raises import raises

_XIP = 0x10000000
_FLASH = 48 * 4096  # of this small Pico: firmware from 0 on, file system in the last sixth
_STORAGE = 8 * 4096
_BASE = _FLASH - _STORAGE
_END = 20 * 4096 + 0x400  # where the firmware ends
_FIRST = 21 * 4096  # so the gap begins here
_SIZE = 65536


_nor = Nor(_FLASH, 256)  # one for all tests: a small heap has no room for many


def entry_end(end):
    """BINARY_END, as pico-sdk declares it."""
    return pack("<HHII", 5, 0x5052, 0x68F465DE, end)


def entry_device(address, size, name=_XIP + 0x900):
    return pack("<HHIIIIH", 7, 0x504D, name, address, size, 0, 3)


_DEVICE = entry_device(_XIP + _BASE, _STORAGE)
_OTHERS = (pack("<HHII", 6, 0x5052, 0x02031C86, _XIP + 0x900), pack("<HHI", 8, 0x5052, 0x1234))


def pico(entries=None, marker_at=0x1D4, marker_end=0xE71AA390, pointers=None, storage=_STORAGE):
    """A flash with a firmware that declares these entries, in use by rp2; return its Nor."""
    if entries is None:
        entries = (_OTHERS[0], entry_end(_XIP + _END), _OTHERS[1], _DEVICE)
    nor = _nor
    image = nor.mem
    for n in range(_FLASH // 4096):
        nor.ioctl(6, n)
        nor.erases[n] = 0
    for i in range(0, _END, 4):
        image[i : i + 4] = pack("<I", i * 2654435761 & 0xFFFFFFFF)
    image[0x900:0x90C] = b"MicroPython\0"
    at = 0x2001  # packed structures need not be aligned
    table = b""
    for entry in entries:
        image[at : at + len(entry)] = entry
        table += pack("<I", _XIP + at)
        at += len(entry) + 3
    if pointers is not None:
        table = pointers
    image[0x1000 : 0x1000 + len(table)] = table
    head = pack("<5I", 0x7188EBF2, _XIP + 0x1000, _XIP + 0x1000 + len(table), _XIP + 0x1800, marker_end)
    image[marker_at : marker_at + 20] = head
    rp2.set_flash(nor, storage)
    return nor


def read(device, n, length=4096, off=0):
    buf = bytearray(length)
    device.readblocks(n, buf, off)
    return buf


def test_the_journal_lies_right_below_the_file_system():
    try:
        nor = pico()
        nor.mem[_BASE - 4096 : _BASE] = b"\x55" * 4096  # what an older firmware has left
        image = crc32(memoryview(nor.mem)[:_FIRST])
        device, unit, size = open_home("gap", _SIZE)
        assert (unit, size) == (4, _SIZE) and device.ioctl(4, 0) == 16 and device.ioctl(5, 0) == 4096
        for n in range(16):
            device.ioctl(6, n)
            device.writeblocks(n, pack("<I", n) * 10, 100)
            device.writeblocks(n, b"next", 140)
        assert [nor.erases[(_BASE >> 12) - 16 + n] for n in range(16)] == [1] * 16
        for n in range(16):
            assert read(device, n, 48, 96) == b"\xff" * 4 + pack("<I", n) * 10 + b"next"
        at = _BASE - _SIZE + 100
        assert nor.mem[at : at + 4] == pack("<I", 0)
        assert crc32(memoryview(nor.mem)[:_FIRST]) == image and sum(nor.erases) == 16
        assert nor.mem[_BASE:] == b"\xff" * _STORAGE
    finally:
        rp2.set_flash(None)


def test_nothing_outside_the_gap_is_ever_reached():
    try:
        nor = pico()
        device, _, _ = open_home("gap", 32768)
        before = crc32(nor.mem)
        for bad in (
            (device.writeblocks, 8, b"abcd", 0),
            (device.writeblocks, -1, b"abcd", 0),
            (device.writeblocks, 0, b"abcd", -4),
            (device.writeblocks, 7, b"abcdefgh", 4092),
            (device.writeblocks, 0, b"abcd", 1 << 20),
            (device.writeblocks, 0, b"abc", 0),
            (device.writeblocks, 0, b"abcd", 2),
            (device.writeblocks, 7, bytes(8192)),
            (device.ioctl, 6, 8),
            (device.ioctl, 6, -1),
            (device.readblocks, 8, bytearray(4)),
            (device.readblocks, -1, bytearray(4)),
        ):
            raises(OSError, *bad)
        assert crc32(nor.mem) == before and sum(nor.erases) == 0
    finally:
        rp2.set_flash(None)


def test_a_smaller_gap_is_used_whole():
    try:
        pico((entry_end(_XIP + _BASE - 5 * 4096 - 1), _DEVICE))
        assert open_home("gap", _SIZE)[2] == 5 * 4096
    finally:
        rp2.set_flash(None)


def test_where_it_is_not_known_to_be_a_gap_it_is_refused():
    end = entry_end(_XIP + _END)
    other = 0x68F465DE
    try:
        for name, word, more in (
            ("no marker", "declare", {"marker_at": 0x3000}),
            ("marker cut short", "declare", {"marker_end": 0}),
            ("unaligned marker", "declare", {"marker_at": 0x1D5}),
            ("no end", "declare", {"entries": (_DEVICE,)}),
            ("end of another tag", "declare", {"entries": (pack("<HHII", 5, 0x504D, other, _XIP + _END), _DEVICE)}),
            ("end that is no address", "declare", {"entries": (entry_end(_END), _DEVICE)}),
            ("no file system", "declare", {"entries": (end,)}),
            ("file system of another size", "declare", {"entries": (end, entry_device(_XIP + _BASE, 4096))}),
            ("pointer into nowhere", "declare", {"pointers": pack("<II", _XIP + 0x2001, 0x20000000)}),
            ("endless list", "declare", {"pointers": bytes(4004)}),
            ("ROMFS", "another", {"entries": (end, entry_device(_XIP + _BASE - 16384, 16384), _DEVICE)}),
            ("ROMFS last", "another", {"entries": (end, _DEVICE, entry_device(_XIP + _BASE - 32768, 32768))}),
            ("device across the end", "another", {"entries": (end, _DEVICE, entry_device(_XIP + _END, 4096))}),
            ("grown image", "12288 bytes", {"entries": (entry_end(_XIP + _BASE - 12288), _DEVICE)}),
            ("image into the file system", "bytes", {"entries": (entry_end(_XIP + _BASE + 100), _DEVICE)}),
            # The declared place is not where the driver's block 0 is.
            ("moved", "rp2.Flash", {"entries": (end, entry_device(_XIP + _BASE - 8192, _STORAGE))}),
        ):
            nor = pico(**more)
            before = crc32(nor.mem)
            error = str(raises(JournalUnavailable, open_home, "gap", _SIZE))
            assert "gap" in error and word in error and "journal.home" in error and "\n" not in error, (name, error)
            assert crc32(nor.mem) == before and sum(nor.erases) == 0, name
    finally:
        rp2.set_flash(None)


def test_a_driver_that_checks_block_numbers_is_believed():
    nor = pico()
    flash = rp2.Flash

    class Checked(flash):
        def readblocks(self, n, buf, off=0):
            if n < 0:
                raise OSError(22, "EINVAL")
            flash.readblocks(self, n, buf, off)

    rp2.Flash = Checked
    try:
        assert "rp2.Flash" in str(raises(JournalUnavailable, open_home, "gap", _SIZE))
        assert sum(nor.erases) == 0
    finally:
        rp2.Flash = flash
        rp2.set_flash(None)


def test_the_shim_reads_memory_as_a_board_does():
    from machine import mem8, mem32

    nor = pico()
    try:
        assert mem32[_XIP + 0x1D4] == 0x7188EBF2 and mem8[_XIP + 0x1D4] == 0xF2
        raises(ValueError, lambda: mem32[_XIP + 1])
        raises(rp2.FlashTrap, lambda: mem8[_XIP + _FLASH])
        flash = rp2.Flash()
        buf = bytearray(4)
        flash.readblocks(-(_BASE >> 12), buf, 0x1D4)
        assert buf == nor.mem[0x1D4:0x1D8]
        raises(rp2.FlashTrap, flash.readblocks, -(_BASE >> 12) - 1, buf)
    finally:
        rp2.set_flash(None)
