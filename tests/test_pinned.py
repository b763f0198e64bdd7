"""The journal in pinned littlefs blocks: no other file is ever harmed, and a journal that nobody touches stays whole.

Run as a program it takes the seeds FIRST..LAST of all the random tests and prints the totals:
    MICROPYPATH=tests:lib:tools:tools/shim:.frozen micropython tests/test_pinned.py FIRST LAST
"""

import asyncio
import gc
import os
import sys
from binascii import crc32
from struct import pack

from mqtt_durable.errors import JournalLost, JournalUnavailable
from norsim import MODES_ERASE, MODES_PROGRAM, Nor, PowerCut, Rng
from raises import raises
from skip import SkipTest

try:
    import vfs

    VfsLfs2 = vfs.VfsLfs2
except (ImportError, AttributeError):
    raise SkipTest("no littlefs2 here: pip install littlefs-python, or a MicroPython that has it")

import esp32
import rp2
from mqtt_durable.client import Client
from mqtt_durable.flash import board as board_module
from mqtt_durable.flash import homes, open_home
from mqtt_durable.flash.pages import Pages
from mqtt_durable.flash.pinned import PinnedDevice
from mqtt_durable.flash.pinning import pin

_DIR = "/mqj"
_SECTORS = 8
_SIZE = _SECTORS * 4096
_BLANK = b"\xff" * 16
_BOARDS = ("esp32", "rp2")


class Power:
    """A Nor for as long as its power lasts, as the file system's device.

    A cut becomes an error of the device, for littlefs to end in order, and from then on nothing of this boot reaches
    the flash any more.  kept: blocks that must not be programmed or erased through it; .harm counts when they are.
    """

    def __init__(self, nor):
        self._nor = nor
        self.on = True
        self.kept = ()
        self.harm = 0

    def _do(self, function, *args):
        if not self.on:
            return -5
        try:
            return function(*args)
        except PowerCut:
            self.on = False
            return -5

    def readblocks(self, n, buf, off=0):
        return self._do(self._nor.readblocks, n, buf, off)

    def writeblocks(self, n, buf, off):
        if n in self.kept:
            self.harm += 1
        return self._do(self._nor.writeblocks, n, buf, off)

    def ioctl(self, op, arg):
        if op == 6 and arg in self.kept:
            self.harm += 1
        return self._do(self._nor.ioctl, op, arg)


_BLOCKS = 48
_nor = Nor(_BLOCKS * 4096)  # one for all tests: a small heap has no room for many


def blank(prog_size):
    """Return the Nor, blank."""
    _nor.power_on()
    _nor.prog_size = prog_size
    for n in range(_BLOCKS):
        _nor.ioctl(6, n)
        _nor.erases[n] = 0
    _nor.ops = 0
    return _nor


class Board:
    """A board with a file system, booted."""

    def __init__(self, kind):
        self.prog_size = 256 if kind == "rp2" else 32
        self.nor = blank(256 if kind == "rp2" else 4)
        self._kind = kind
        self.power = None
        VfsLfs2.mkfs(self.nor, progsize=self.prog_size)
        self.boot()

    def boot(self):
        """Power off and on; the file system is mounted."""
        if self.power:
            self.power.on = False
        self.nor.power_on()
        self.power = Power(self.nor)
        self.flash = Pages(self.nor, 0, _BLOCKS) if self._kind == "rp2" else self.nor
        self.fs = VfsLfs2(self.power, progsize=self.prog_size)

    def open(self, size=_SIZE, **more):
        try:
            return pin(lambda: self.fs, self.flash, _DIR, size, **more)
        except JournalUnavailable:
            self.check_power()
            raise

    def check_power(self):
        """PowerCut if that is why something failed."""
        if not self.power.on:
            raise PowerCut("power is off")

    def names(self):
        return sorted([entry[0] for entry in self.fs.ilistdir(_DIR)])

    def write(self, name, data, mode="wb"):
        with self.fs.open(name, mode) as file:
            file.write(data)

    def read(self, name):
        with self.fs.open(name, "rb") as file:
            return file.read()


def header(seq):
    head = pack("<HBBII", 0x4A4D, 0x32, 0xFF, seq, 0x12345678)
    return head + pack("<I", crc32(head))


def read(device, n, length=4096, off=0):
    buf = bytearray(length)
    device.readblocks(n, buf, off)
    return buf


class Ring:
    """Uses a device as the journal does: sector by sector, erase, header, records; and knows what must be there."""

    def __init__(self, device, rng):
        self.rng = rng
        self.sectors = device.ioctl(4, 0)
        self.expected = [None] * self.sectors  # None: not known, after a cut or before its first use
        self.at = self.seq = self.off = 0
        self.doubt = None
        self.attach(device)

    def attach(self, device):
        """Go on with a device after a new start."""
        self.device = device
        self.doubt = None
        self.off = 4096  # the next thing is a new sector

    def step(self):
        """Program one record; JournalLost or PowerCut may come out of it."""
        rng = self.rng
        size = 4 * (1 + rng.below(60))
        if self.off + size > 4096:
            self.at = (self.at + 1) % self.sectors
            self.seq += 1
            self.doubt = self.at
            self.expected[self.at] = None
            self.device.ioctl(6, self.at)
            self.device.writeblocks(self.at, header(self.seq), 0)
            self.expected[self.at] = bytearray(b"\xff" * 4096)
            self.expected[self.at][:16] = header(self.seq)
            self.off = 16
        at = self.off
        k = min(size, 256 - at % 256)  # never across a page
        data = rng.bytes(k)
        self.doubt = self.at
        self.off = at + k
        self.device.writeblocks(self.at, data, at)
        self.expected[self.at][at : at + k] = data
        self.doubt = None

    def check(self):
        for n in range(self.sectors):
            want = self.expected[n]
            if want is not None and n != self.doubt:
                assert read(self.device, n) == want, "sector %d" % n

    def after_cut(self):
        """What was being programmed is not known any more."""
        if self.doubt is not None:
            self.expected[self.doubt] = None


class Traffic:
    """Ordinary files beside the journal, and what must be in them."""

    def __init__(self, board, rng):
        self.board = board
        self.rng = rng
        self.files = {}  # name -> content
        self.doubt = {}  # name -> contents it may have; None: it may be missing
        self.full = 0
        self._count = 0

    def _data(self, most):
        return bytes(self.rng.bytes(1 + self.rng.below(most)))

    def step(self):
        """One operation; OSError for no space is part of it."""
        names = sorted(self.files)
        rng = self.rng
        kind = rng.below(12)
        name = names[rng.below(len(names))] if names else None
        fs = self.board.fs
        try:
            if kind < 5 or not names:
                self._count += 1
                name = "/d%d/f%d" % (rng.below(2), self._count) if rng.below(2) else "/f%d" % self._count
                data = self._data(9000 if rng.below(4) else 300)
                self.doubt = {name: (None, b"", data)}
                if name[1] == "d":
                    try:
                        fs.mkdir(name[:3])
                    except OSError as e:
                        if e.errno != 17:  # EEXIST
                            raise
                self.board.write(name, data)
                self.files[name] = data
            elif kind < 7:
                data = self._data(5000)
                self.doubt = {name: (self.files[name], self.files[name] + data)}
                self.board.write(name, data, "ab")
                self.files[name] += data
            elif kind < 8:
                old = self.files[name]
                data = self._data(200)[: len(old)]
                at = rng.below(len(old) - len(data) + 1)
                new = old[:at] + data + old[at + len(data) :]
                self.doubt = {name: (old, new)}
                with fs.open(name, "r+b") as file:
                    file.seek(at)
                    file.write(data)
                self.files[name] = new
            elif kind < 10:
                self.doubt = {name: (self.files[name], None)}
                fs.remove(name)
                del self.files[name]
            elif kind == 10:
                other = names[rng.below(len(names))]
                if other != name:
                    self.doubt = {name: (self.files[name], None), other: (self.files[other], self.files[name])}
                    fs.rename(name, other)
                    self.files[other] = self.files.pop(name)
            else:
                fs.statvfs("/")
                list(fs.ilistdir("/"))
            self.doubt = {}
        except OSError as e:
            self.board.check_power()
            if e.errno != 28:  # ENOSPC
                raise
            self.full += 1
            self.settle()
            for name in names[::2]:
                if name in self.files:
                    fs.remove(name)
                    del self.files[name]

    def settle(self):
        """After a cut or a full disk: see which of the states that are possible it is."""
        for name, possible in self.doubt.items():
            try:
                found = self.board.read(name)
            except OSError:
                found = None
            assert found in possible, "%s: %r" % (name, found and len(found))
            self.files.pop(name, None)
            if found is not None and found != b"":
                self.files[name] = found
            elif found is not None:
                self.board.fs.remove(name)
        self.doubt = {}

    def check(self):
        for name in self.files:
            assert self.board.read(name) == self.files[name], name


# The home as such.


def test_its_files_are_made_once_and_tell_what_they_are():
    for kind in _BOARDS:
        board = Board(kind)
        device = board.open()
        assert board.names() == ["%03d.%d" % (n, _SECTORS) for n in range(_SECTORS)] + ["README.txt"]
        assert b"mqtt_durable" in board.read(_DIR + "/README.txt")
        assert device.ioctl(4, 0) == _SECTORS and device.ioctl(5, 0) == 4096 and device.prog_size == 4
        heads = [bytes(read(device, n, 16)) for n in range(_SECTORS)]
        assert len(set(heads)) == _SECTORS and all([head[:2] == b"mj" for head in heads])
        for n in range(_SECTORS):
            assert read(device, n, 4080, 16) == b"\xff" * 4080
            assert board.read("%s/%03d.%d" % (_DIR, n, _SECTORS))[:16] == heads[n]
        ops = board.nor.ops
        board.boot()
        device = board.open(16 * _SIZE)  # what exists keeps its own size
        assert board.nor.ops == ops and device.ioctl(4, 0) == _SECTORS and device.note is None
        assert [bytes(read(device, n, 16)) for n in range(_SECTORS)] == heads


def test_it_is_a_block_device_with_small_programs():
    for kind in _BOARDS:
        board = Board(kind)
        device = board.open()
        assert device.ioctl(6, 1) == 0
        assert read(device, 1) == b"\xff" * 4096
        device.writeblocks(1, header(1), 0)
        data = bytes(range(48))
        device.writeblocks(1, memoryview(data)[:20], 236)
        device.writeblocks(1, data[20:], 256)
        device.writeblocks(1, data[:4], 4092)
        assert read(device, 1, 48, 236) == data and read(device, 1, 4, 4092) == data[:4]
        assert read(device, 1, 5, 239) == data[3:8] and read(device, 1, 16) == header(1)
        device.writeblocks(2, header(2) + b"\x11" * 4080)
        assert read(device, 2, 4096) == header(2) + b"\x11" * 4080
        buf = bytearray(16)
        ops = board.nor.ops
        for bad in (
            (device.readblocks, _SECTORS, buf),
            (device.readblocks, -1, buf),
            (device.readblocks, 0, buf, 4084),
            (device.readblocks, 0, buf, -4),
            (device.writeblocks, _SECTORS, bytes(16), 0),
            (device.writeblocks, -1, bytes(16), 0),
            (device.writeblocks, 1, bytes(16), 4084),
            (device.writeblocks, 1, bytes(16), 258),
            (device.writeblocks, 1, bytes(15), 256),
            (device.writeblocks, 1, bytes(16)),
            (device.ioctl, 6, _SECTORS),
            (device.ioctl, 6, -1),
        ):
            assert not isinstance(raises(OSError, *bad), JournalLost), bad
        assert board.nor.ops == ops and device.lost is None


def test_pages_pad_programs_and_check_bounds():
    nor = Nor(16 * 4096, 256)
    pages = Pages(nor, 4, 8)
    data = bytes(range(200)) * 2
    pages.writeblocks(1, data, 100)
    assert read(pages, 1, 400, 100) == data and read(pages, 1, 100) == b"\xff" * 100
    pages.writeblocks(1, b"abcd", 500)
    assert read(pages, 1, 404, 100) == data + b"abcd" and read(pages, 1, 8, 504) == b"\xff" * 8
    pages.writeblocks(7, b"\x12" * 4096)
    assert nor.mem[11 * 4096 : 12 * 4096] == b"\x12" * 4096
    assert pages.ioctl(4, 0) == 8 and pages.ioctl(5, 0) == 4096 and pages.ioctl(6, 7) == 0
    ops = nor.ops
    for bad in (
        (pages.writeblocks, 8, bytes(4), 0),
        (pages.writeblocks, -1, bytes(4), 0),
        (pages.writeblocks, -1, bytes(4), 4096),
        (pages.writeblocks, 7, bytes(8), 4092),
        (pages.writeblocks, 0, bytes(4), 2),
        (pages.writeblocks, 0, bytes(4)),
        (pages.readblocks, 7, bytearray(8), 4092),
        (pages.readblocks, -1, bytearray(4)),
        (pages.ioctl, 6, 8),
        (pages.ioctl, 6, -1),
    ):
        raises(OSError, *bad)
    assert nor.ops == ops


def test_it_is_opened_by_name_on_either_board():
    for kind in _BOARDS:
        nor = blank(256 if kind == "rp2" else 4)
        esp32.clear()
        if kind == "rp2":
            rp2.set_flash(nor)
            bdev = rp2.Flash()
        else:
            esp32.add_partition("vfs", nor)
            bdev = esp32.Partition("vfs")
        prog_size = 256 if kind == "rp2" else 32
        VfsLfs2.mkfs(bdev, progsize=prog_size)
        fs = VfsLfs2(bdev, progsize=prog_size)
        vfs.mount(fs, "/board")
        hosts = homes._HOSTS
        try:
            device, unit, size = open_home("pinned:/board/sub", _SIZE)
            assert isinstance(device, PinnedDevice) and (unit, size) == (4, _SIZE)
            assert "000.8" in [entry[0] for entry in fs.ilistdir("/sub")]
            ring = Ring(device, Rng(1))
            for _ in range(300):
                ring.step()
            # Mounted anew, as a program may: the file system object must not be the old one.
            vfs.umount("/board")
            fs = VfsLfs2(bdev, progsize=prog_size)
            vfs.mount(fs, "/board")
            for _ in range(300):
                ring.step()
            ring.check()
            homes._HOSTS = ()
            homes._AUTO_DIRECTORY = "/board/mqj"
            device, unit, size = open_home("auto", _SIZE)
            assert isinstance(device, PinnedDevice) and (unit, size) == (4, _SIZE)
            esp32.add_partition("mqj", Nor(_SIZE))
            assert isinstance(open_home("auto", _SIZE)[0], esp32.Partition)
        finally:
            homes._HOSTS = hosts
            homes._AUTO_DIRECTORY = "/mqj"
            vfs.umount("/board")
            esp32.clear()
            rp2.set_flash(None)


def test_other_file_systems_are_refused_with_what_to_do():
    class Odd:
        def mount(self, readonly, mkfs):
            pass

        def umount(self):
            pass

    esp32.clear()
    nor = blank(4)
    esp32.add_partition("vfs", nor)
    vfs.mount(Odd(), "/fat")
    try:
        error = str(raises(JournalUnavailable, open_home, "pinned:/fat/mqj", _SIZE))
        assert "Odd" in error and "littlefs2" in error and "partition:LABEL" in error and "\n" not in error
    finally:
        vfs.umount("/fat")
    # The mounted one is littlefs2, but not the board's own flash.
    other = Nor(24 * 4096)
    VfsLfs2.mkfs(other)
    vfs.mount(VfsLfs2(other), "/sd")
    try:
        error = str(raises(JournalUnavailable, open_home, "pinned:/sd/mqj", _SIZE))
        assert "littlefs2" in error
        VfsLfs2.mkfs(nor)
        fs = VfsLfs2(nor)
        pin(lambda: fs, nor, _DIR, _SIZE)
        error = str(raises(JournalUnavailable, open_home, "pinned:/sd/mqj", _SIZE))
        assert "own flash" in error
    finally:
        vfs.umount("/sd")
        esp32.clear()


def test_firmware_that_does_not_list_its_mounts_is_served_by_way_of_os():
    if sys.implementation.name != "micropython":
        raise SkipTest("CPython's os has no mount points")

    class Old:
        VfsLfs2 = VfsLfs2

        @staticmethod
        def mount():
            raise TypeError("function missing 2 required positional arguments")

    nor = blank(4)
    VfsLfs2.mkfs(nor)
    root = [fs for fs, point in vfs.mount() if point == "/"][0]
    esp32.clear()
    esp32.add_partition("vfs", nor)
    here = os.getcwd()
    vfs.umount("/")
    try:
        vfs.mount(VfsLfs2(nor), "/")
        board_module.vfs = Old
        device, _, _ = open_home("pinned", _SIZE)
        ring = Ring(device, Rng(1))
        device._laps = 1
        blocks = list(device._blocks)
        while ring.seq < 3 * _SECTORS:
            ring.step()
        ring.check()
        assert blocks != list(device._blocks) and device.sharing() > _SECTORS
        # Is what is mounted another file system, nothing of that on the flash is touched.
        other = Nor(24 * 4096)
        VfsLfs2.mkfs(other)
        vfs.umount("/")
        vfs.mount(VfsLfs2(other), "/")
        ops = nor.ops
        raises(JournalUnavailable, open_home, "pinned", _SIZE)
        assert nor.ops == ops
    finally:
        board_module.vfs = vfs
        vfs.umount("/")
        vfs.mount(root, "/")
        os.chdir(here)
        esp32.clear()


def test_too_little_room_is_said_in_numbers():
    board = Board("esp32")
    for _ in range(31):
        board.write("/big", bytes(4096), "ab")
    error = str(raises(JournalUnavailable, board.open, 2 * _SIZE))
    assert "KiB" in error and "size_kib" in error and "\n" not in error
    assert board.names() == []
    assert board.open(4 * 4096).ioctl(4, 0) == 4


def test_left_over_new_files_are_removed_and_nothing_else():
    board = Board("esp32")
    device = board.open()
    ring = Ring(device, Rng(5))
    for _ in range(100):
        ring.step()
    for name in ("003.8.new", "000.16.new", "notes.new", "7.txt", "009.8", "001.2", "3.8"):
        board.write(_DIR + "/" + name, b"y" * 4096)
    board.boot()
    ring.attach(board.open())
    ring.check()
    assert ring.device.note is None
    names = board.names()
    assert "003.8.new" not in names and "000.16.new" not in names
    assert "notes.new" in names and "7.txt" in names and "009.8" in names and "3.8" in names


def test_a_set_with_missing_or_doubled_files_is_made_anew_and_says_so():
    for change in ("remove", "truncate", "copy", "last"):
        board = Board("esp32")
        ring = Ring(board.open(), Rng(9))
        for _ in range(1000):
            ring.step()
        if change == "remove" or change == "last":
            board.fs.remove("%s/%03d.8" % (_DIR, 7 if change == "last" else 2))
        elif change == "truncate":
            board.write(_DIR + "/003.8", b"short")
        else:
            board.write(_DIR + "/003.8", board.read(_DIR + "/004.8"))
        board.boot()
        device = board.open()
        assert _DIR in device.note and "lost" in device.note, change
        assert device.ioctl(4, 0) == _SECTORS
        assert [bytes(read(device, n, 2)) for n in range(_SECTORS)] == [b"mj"] * _SECTORS
        board.boot()
        assert board.open().note is None


def test_files_missing_before_the_journal_was_used_are_only_made():
    board = Board("esp32")
    device = board.open()
    head = read(device, 1, 16)
    board.fs.remove(_DIR + "/000.8")
    board.boot()
    device = board.open()
    assert device.note is None and read(device, 1, 16) == head and read(device, 0, 2) == b"mj"


def test_a_sector_without_header_gets_a_free_one_and_disowned_ones_are_kept():
    for kind in _BOARDS:
        board = Board(kind)
        device = board.open()
        ring = Ring(device, Rng(3))
        for _ in range(400):
            ring.step()
        # Disowned by the journal: only magic and id stay; over a free header the id is what is left of both.
        for n in (0, 7):
            device.writeblocks(n, pack("<H6xII", 0x4A4D, 0x12345678, 0), 0)
        assert read(device, 0, 8) == b"MJ\0\0\0\0\0\0"
        kept = [bytes(read(device, n, 16)) for n in (0, 7)]
        device.ioctl(6, 2)  # and power fails here
        ops = board.nor.ops
        board.boot()
        device = board.open()
        assert read(device, 2, 2) == b"mj" and read(device, 2, 4080, 16) == b"\xff" * 4080
        assert [bytes(read(device, n, 16)) for n in (0, 7)] == kept and device.note is None
        assert board.nor.ops == ops + 2  # one erase, one program
        device.ioctl(6, 0)
        device.writeblocks(0, header(99), 0)


# Beside other files.


def traffic(kind, seed, turns):
    """Files and journal side by side; return (journal programs, times the disk was full, rehomed sectors)."""
    rng = Rng(seed)
    board = Board(kind)
    files = Traffic(board, rng)
    ring = Ring(board.open(rehome_laps=2), rng)
    blocks = list(ring.device._blocks)
    moved = steps = 0
    for turn in range(turns):
        kept = tuple(ring.device._blocks)
        board.power.kept = kept
        files.step()
        assert board.power.harm == 0, "littlefs touched a pinned block"
        board.power.kept = ()
        for _ in range(rng.below(8)):
            ring.step()
            steps += 1
        now = list(ring.device._blocks)
        moved += sum([a != b for a, b in zip(blocks, now)])
        blocks = now
        if turn % 40 == 39:
            ring.check()
            files.check()
        if rng.below(60) == 0:
            doubt = ring.doubt
            board.boot()
            ring.attach(board.open(rehome_laps=2))
            ring.doubt = doubt
            assert list(ring.device._blocks) == blocks and ring.device.note is None
    ring.check()
    files.check()
    return steps, files.full, moved


def test_no_file_and_no_record_suffers_from_heavy_traffic():
    for kind, seed in (("esp32", 1), ("rp2", 2)):
        steps, full, moved = traffic(kind, seed, 400)
        assert steps > 1000 and full > 2 and moved > 2, (steps, full, moved)


def sabotage(kind, how, seed):
    """Touch the journal's files while it runs; return how many steps later it noticed, None if it need not."""
    rng = Rng(seed)
    board = Board(kind)
    files = Traffic(board, rng)
    ring = Ring(board.open(rehome_laps=rng.below(2) * 3), rng)
    for _ in range(300 + rng.below(400)):
        ring.step()
        if rng.below(20) == 0:
            files.step()
    n = rng.below(_SECTORS)
    name = "%s/%03d.8" % (_DIR, n)
    fs = board.fs
    files.files["/bystander"] = b"bystander" * 500
    board.write("/bystander", files.files["/bystander"])
    if how == "delete":
        fs.remove(name)
    elif how == "delete all":
        for k in range(_SECTORS):
            fs.remove("%s/%03d.8" % (_DIR, k))
    elif how == "overwrite":
        board.write(name, bytes(rng.bytes(4096)))
    elif how == "rewrite":
        board.write(name, board.read(name))
    elif how == "poke":
        with fs.open(name, "r+b") as file:
            file.seek(100 + rng.below(3000))
            file.write(b"!")
    elif how == "append":
        board.write(name, b"more", "ab")
    elif how == "truncate":
        board.write(name, b"")
    elif how == "rename":
        fs.rename(name, "/mine")  # still the block that the journal programs, until it notices
    elif how == "replace":
        fs.rename("/bystander", name)
        del files.files["/bystander"]
    elif how == "swap":
        other = "%s/%03d.8" % (_DIR, (n + 3) % _SECTORS)
        fs.rename(name, "/swap")
        fs.rename(other, name)
        fs.rename("/swap", other)
    elif how == "copy":
        files.files["/copy"] = board.read(name)
        board.write("/copy", files.files["/copy"])
    elif how == "read":
        board.read(name)
        fs.stat(name)
    steps = 0
    noticed = None
    while steps < 900:
        try:
            ring.step()
        except JournalLost as error:
            assert _DIR in str(error) and "lost" in str(error)
            noticed = steps
            break
        steps += 1
        if rng.below(3) == 0:
            files.step()
    for _ in range(30):
        files.step()
    files.check()
    if how in ("copy", "read"):
        assert noticed is None
        ring.check()
        return noticed
    assert noticed is not None, how
    ops = board.nor.ops
    for call in (
        (ring.device.readblocks, 0, bytearray(4)),
        (ring.device.writeblocks, 0, bytes(4), 64),
        (ring.device.ioctl, 6, 0),
    ):
        raises(JournalLost, *call)
    assert board.nor.ops == ops
    for name in [name for name in files.files if name[:2] != "/b"][2:]:  # room for new ones
        fs.remove(name)
        del files.files[name]
    ring = Ring(board.open(anew=True), rng)
    for _ in range(300):
        ring.step()
    ring.check()
    files.check()
    return noticed


SABOTAGE = (
    "delete",
    "delete all",
    "overwrite",
    "rewrite",
    "poke",
    "append",
    "truncate",
    "rename",
    "replace",
    "swap",
    "copy",
    "read",
)


def test_whatever_is_done_to_its_files_no_other_file_is_harmed():
    for i, how in enumerate(SABOTAGE):
        for kind in _BOARDS:
            sabotage(kind, how, 100 + i)


def test_a_deleted_file_whose_block_is_in_other_use_is_noticed_before_a_program():
    board = Board("esp32")
    device = board.open()
    device.ioctl(6, 3)
    device.writeblocks(3, header(1), 0)
    device.writeblocks(3, b"data", 16)
    board.fs.remove(_DIR + "/003.8")
    i = 0
    while read(device, 3, 16) == header(1):  # until littlefs has come round to it
        board.write("/f%d" % (i % 3), bytes([i + 1]) * 12000)
        i += 1
        assert i < 50
    ops = board.nor.ops
    raises(JournalLost, device.writeblocks, 3, b"more", 20)
    assert board.nor.ops == ops
    raises(JournalLost, device.writeblocks, 4, b"more", 20)


def test_after_a_format_nothing_raw_is_written():
    board = Board("esp32")
    ring = Ring(board.open(), Rng(4))
    for _ in range(100):
        ring.step()
    VfsLfs2.mkfs(board.nor, progsize=32)
    board.fs = VfsLfs2(board.power, progsize=32)
    files = Traffic(board, Rng(5))
    lost = False
    for _ in range(400):
        files.step()
        try:
            ring.step()
        except JournalLost:
            lost = True
    assert lost
    files.check()


# The client.


class Mounted:
    """An ESP32's file system, mounted at /board for as long as the block lasts."""

    def __enter__(self):
        esp32.clear()
        nor = blank(4)
        esp32.add_partition("vfs", nor)
        VfsLfs2.mkfs(nor)
        self.fs = VfsLfs2(esp32.Partition("vfs"))
        vfs.mount(self.fs, "/board")
        return self

    def __exit__(self, *_):
        if ("/board",) in [entry[1:] for entry in vfs.mount()]:
            vfs.umount("/board")
        esp32.clear()

    def client(self):
        return Client(
            {
                "broker": {"host": "h", "port": 1, "username": None, "password": None, "keep_alive_s": 60},
                "client_id": "p7",
                "session": {"clean": False, "in_flight": 16},
                "journal": {"home": "pinned:/board/mqj", "size_kib": 32, "when_full": "raise"},
            }
        )


async def publish_until_lost(client):
    """Publish until the journal notices; return how many were accepted before."""
    for n in range(1000):
        try:
            await client.publish("t", b"x" * 100, qos=1)
        except JournalLost as error:
            assert "/mqj/" in str(error)
            return n
    raise AssertionError("not noticed")


def test_a_client_whose_files_are_taken_away_goes_on_in_new_ones_and_says_so():
    async def scenario(board):
        client = board.client()
        assert client.stats()["journal_home"] == "pinned:/board/mqj" and client.stats()["journal_lost"] == 0
        await client.publish("t", b"first", qos=2)
        for name in [entry[0] for entry in board.fs.ilistdir("/mqj")]:
            board.fs.remove("/mqj/" + name)
        n = 1 + await publish_until_lost(client)
        await client.publish("t", b"again", qos=2, mark=7)
        stats = client.stats()
        assert stats["lost"] == n and stats["waiting"] == 1 and stats["journal_lost"] == 1
        assert stats["journal_home"] == "pinned:/board/mqj"
        assert isinstance(client.last_error, JournalLost) and "anew" in str(client.last_error)
        assert client.store.identity == 0  # so the first connection is a clean one
        for _ in range(100):
            await client.publish("t", b"x" * 100, qos=1, mark=8)
        again = board.client()  # after a reset
        assert again.mark == 8 and again.stats()["waiting"] == 101 and again.stats()["journal_lost"] == 0

    with Mounted() as board:
        asyncio.run(scenario(board))


def test_where_no_new_files_can_be_the_client_goes_on_in_ram_and_says_so():
    async def scenario(board):
        client = board.client()
        await client.publish("t", b"first", qos=2)
        board.fs.remove("/mqj/002.8")
        vfs.umount("/board")
        n = 1 + await publish_until_lost(client)
        for _ in range(20):
            await client.publish("t", b"again", qos=2, mark=7)
        stats = client.stats()
        assert stats["lost"] == n and stats["waiting"] == 20 and stats["journal_lost"] == 1
        assert stats["journal_home"] == "ram, for pinned:/board/mqj was lost" and stats["journal_years_left"] is None
        assert "ram" in str(client.last_error) and "set journal.home" in str(client.last_error)

    with Mounted() as board:
        asyncio.run(scenario(board))


def test_a_journal_that_lost_files_while_the_board_was_off_is_said():
    with Mounted() as board:
        client = board.client()
        asyncio.run(client.publish("t", b"first", qos=2))
        board.fs.remove("/mqj/002.8")
        client = board.client()
        assert client.stats()["journal_lost"] == 1 and "gone" in str(client.last_error)
        assert client.stats()["waiting"] == 0 and client.store.identity == 0


def test_years_left_follow_from_the_erases_so_far():
    with Mounted() as board:
        client = board.client()

        async def scenario():
            for _ in range(120):
                await client.publish("t", b"x" * 100, qos=1)

        asyncio.run(scenario())
        stats = client.stats()
        journal = client.store.journal
        assert stats["journal_years_left"] is None  # too early to tell
        client.log._up_ms = 365.25 * 86400000 * 2  # as if that had taken two years
        years = client.stats()["journal_years_left"]
        blocks = client._device.sharing()
        assert blocks > 30 and stats["journal_erases"] == journal.seq >= journal.erases > 2
        want = (100000 * blocks - journal.seq) * 2 / journal.erases
        assert abs(years - want) < want / 1000, (years, want)


# Re-homing.


def test_sectors_move_so_that_the_file_system_shares_the_wear():
    board = Board("esp32")
    device = board.open(rehome_laps=2)
    ring = Ring(device, Rng(7))
    blocks = set(device._blocks)
    before = list(board.nor.erases)
    while ring.seq < 40 * _SECTORS:
        ring.step()
        blocks.update(device._blocks)
    ring.check()
    spent = [now - then for now, then in zip(board.nor.erases, before)]
    assert len(blocks) > 24, blocks
    assert max(spent) < 40, spent  # staying it would be 40 for each of the journal's own blocks
    assert device.sharing() > 24
    fixed = Board("esp32").open(rehome_laps=0)
    assert fixed.sharing() == _SECTORS
    ring = Ring(fixed, Rng(7))
    blocks = list(fixed._blocks)
    while ring.seq < 4 * _SECTORS:
        ring.step()
    assert list(fixed._blocks) == blocks


def test_on_a_full_disk_sectors_stay_and_the_journal_goes_on():
    board = Board("rp2")
    ring = Ring(board.open(rehome_laps=1), Rng(8))
    for mode in ("ab", "ab", "wb"):
        try:
            for i in range(40):
                board.write("/fill" + mode, b"z" * 4096, mode)
                if mode == "wb":
                    board.fs.rename("/fillwb", "/fill%d" % i)
        except OSError as e:
            assert e.errno == 28
    size = board.fs.stat("/fillab")[6]
    blocks = list(ring.device._blocks)
    while ring.seq < 3 * _SECTORS:
        ring.step()
    ring.check()
    assert list(ring.device._blocks) == blocks and ring.device.lost is None
    assert not [name for name in board.names() if name.endswith(".new")]
    with board.fs.open("/fillab", "rb") as file:
        for _ in range(size // 4096):
            assert file.read(4096) == b"z" * 4096


# Power cuts.


def cuts(kind, seed, count, weak=False):
    """Cut the power so often in files and journal; with weak only in what the journal itself programs and erases.

    littlefs takes no precaution against cells that read differently each time.  Returns how many cuts came.
    """
    rng = Rng(seed)
    board = Board(kind)
    files = Traffic(board, rng)
    laps = 0 if weak else 1
    ring = Ring(board.open(rehome_laps=laps), rng)
    came = 0
    for _ in range(count):
        modes = MODES_PROGRAM[rng.below(len(MODES_PROGRAM))], MODES_ERASE[rng.below(len(MODES_ERASE))]
        note = "seed %d, cut %d" % (seed, came + 1)
        if not weak:
            board.nor.cut_after(1 + rng.below(40), modes[0], modes[1], seed=rng.next())
        try:
            for _ in range(40):
                if rng.below(3) == 0 and not weak:
                    files.step()
                if weak and rng.below(25) == 0:
                    board.nor.cut_after(1 + rng.below(3), modes[0], modes[1], seed=rng.next(), weak=True)
                ring.step()
        except PowerCut:
            came += 1
        ring.after_cut()
        while True:
            try:
                if rng.below(4) == 0:  # and in the start itself
                    board.boot()
                    board.nor.cut_after(1 + rng.below(3), modes[0], modes[1], seed=rng.next(), weak=weak)
                else:
                    board.boot()
                ring.attach(board.open(rehome_laps=laps))
                break
            except PowerCut:
                came += 1
        board.nor.cut_after(0)
        assert ring.device.note is None, note
        assert ring.device.ioctl(4, 0) == _SECTORS, note
        files.settle()
        files.check()
        ring.check()
        assert not [name for name in board.names() if name.endswith(".new")], note
    return came


def test_power_cuts_in_files_journal_and_rehoming_harm_neither():
    for kind, seed in (("esp32", 11), ("rp2", 12)):
        assert cuts(kind, seed, 60) > 30


def test_cells_left_unstable_by_a_cut_are_no_sabotage():
    for kind, seed in (("esp32", 21), ("rp2", 22)):
        assert cuts(kind, seed, 15, True) > 8


def test_a_cut_while_the_files_are_made_is_made_good():
    for kind in _BOARDS:
        for ops in range(1, 60, 3):
            board = Board(kind)
            board.nor.cut_after(ops, "prefix", "mixed", seed=ops)
            try:
                board.open()
            except PowerCut:
                pass
            board.boot()
            device = board.open()
            assert device.note is None and device.ioctl(4, 0) == _SECTORS
            Ring(device, Rng(ops)).step()


def test_a_cut_at_every_operation_of_a_rehoming_leaves_either():
    for kind in _BOARDS:
        ops = 0
        while True:
            ops += 1
            board = Board(kind)
            ring = Ring(board.open(rehome_laps=1), Rng(1))
            while ring.seq < _SECTORS - 1 or ring.off < 3800:
                ring.step()
            ring.seq = 2 * _SECTORS
            ring.at = 0
            device = ring.device
            device.ioctl(6, 0)
            device.writeblocks(0, header(ring.seq), 0)
            ring.expected[0] = None
            before = [bytes(read(device, n)) for n in range(1, _SECTORS)]
            old = device._blocks[0]
            board.nor.cut_after(ops, "bytes", "mixed", seed=ops)
            try:
                device.ioctl(6, 0)
                break
            except PowerCut:
                pass
            board.boot()
            device = board.open(rehome_laps=1)
            assert device.note is None
            assert [bytes(read(device, n)) for n in range(1, _SECTORS)] == before
            assert read(device, 0, 2) in (b"mj", b"MJ")
        assert device._blocks[0] != old and ops > 8, (kind, ops)


def main(first, last):
    """Take all the random tests through the seeds first..last, and print what that came to."""
    steps = full = moved = stopped = came = weak = 0
    for seed in range(first, last + 1):
        gc.collect()
        for kind in _BOARDS:
            print("seed %d %s" % (seed, kind))
            a, b, c = traffic(kind, seed, 400)
            steps += a
            full += b
            moved += c
            for how in SABOTAGE:
                stopped += sabotage(kind, how, seed) is not None
            came += cuts(kind, seed, 60)
            weak += cuts(kind, seed, 15, True)
    print(
        "%d journal programs beside files, disk full %d times, %d sectors rehomed; "
        "%d times stopped after sabotage; %d power cuts, %d with unstable cells"
        % (steps, full, moved, stopped, came, weak)
    )


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
