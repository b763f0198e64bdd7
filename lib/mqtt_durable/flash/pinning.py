"""The opening of pinned files, see pinned.py: made where they are missing, located, and judged after a power cut.

A sector whose erase was interrupted gets a free header, which the journal takes for a sector never used; NNN.COUNT.new
is what was being made, and is removed.  A set of which files are missing or doubled, while others hold a journal, is no
longer that journal, acknowledged messages could come back: it is made anew, and .note says so.
"""

from micropython import const

from .board import file_system, mounted, shadow, unsuitable
from .pinned import PinnedDevice, free_header, remove, settle

_SECTOR = const(4096)
_HEADER = const(16)
_SPARE = const(6)  # blocks left to the file system's own needs when the files are made
_REHOME_LAPS = const(64)

_README = b"""\
The files beside this one are the journal of mqtt_durable, an MQTT client: each is one block of flash that it programs
directly. In them wait the messages that the broker does not have yet.

Listing, reading and copying them is harmless. If one is written to, renamed or deleted, the journal stops, what waited
there is lost, and it begins anew. No other file is harmed. To be rid of it stop the program, then delete it all.
"""


def open_pinned(path, size, anew=False):
    """Return the PinnedDevice in the directory at path, on the file system of the board's own flash.

    Raises JournalUnavailable where that cannot be, with what to do.
    """
    path = path.rstrip("/")
    inner = mounted(path)[1]
    return pin(file_system(path), _flash(), inner, size, anew=anew)


def _flash():
    """Return the block device of the stock firmware's file system, programmable in fours.  JournalUnavailable."""
    try:
        from esp32 import Partition
    except ImportError:
        Partition = None
    found = Partition and Partition.find(Partition.TYPE_DATA, label="vfs")
    if found:
        return found[0]
    try:
        from rp2 import Flash
    except ImportError:
        Flash = None
    if Flash is None:
        raise unsuitable("/", 'there is no ESP32 partition "vfs" and no rp2.Flash: make a file system there')
    from .pages import Pages

    device = Flash()
    return Pages(device, 0, device.ioctl(4, 0))


def pin(fs, flash, path, size, rehome_laps=_REHOME_LAPS, anew=False):
    """Return the PinnedDevice in the directory at path, its files there and located.

    fs, flash, rehome_laps: as it takes them.  size: bytes of a journal that has to be made; one that is there keeps its
    size.  anew: whatever is there is no journal any more.
    Raises JournalUnavailable if the journal cannot be there.
    """
    if flash.ioctl(5, 0) != _SECTOR:
        raise unsuitable(path, "the file system has blocks of %d bytes: make it one of 4096" % flash.ioctl(5, 0))
    try:
        shadow(flash)  # before anything is written
    except OSError:
        raise unsuitable(path, "the board's flash holds no littlefs2: make it one")
    problem = None
    try:
        now = fs()
        files, count, readme = _files(now, path, size // _SECTOR)
        device = PinnedDevice(fs, flash, path, count, rehome_laps)
        _open(now, device, path, files, anew)
        if not readme:
            _write_readme(now, path)
    except OSError as error:
        problem = error
    if problem:
        raise unsuitable(path, "its files cannot be made (%s): make room" % problem)
    return device


def _open(fs, device, path, files, anew):
    """Locate the files, and make those that are missing.  files: as _files() tells."""
    count = device.ioctl(4, 0)
    missing = [n for n in range(count) if files.get(n) != _SECTOR]
    if not anew and files:
        _take(fs, device, path, missing)
    if anew or device.note:
        missing = list(range(count))
        for n in files:
            remove(fs, device.file(n))
    if missing:
        free = fs.statvfs(path)[3]
        if free < len(missing) + _SPARE:
            need = 4 * (len(missing) + _SPARE)
            why = "%d KiB are free, it takes %d: delete files, lower journal.size_kib" % (4 * free, need)
            raise unsuitable(path, why)
        for n in missing:
            device.make(fs, n)
        _take(fs, device, path, ())


def _write_readme(fs, path):
    try:
        with fs.open(path + "/README.txt", "wb") as file:
            file.write(_README)
    except OSError:  # full: no reason to go without a journal
        pass


def _files(fs, path, most):
    """Return {sector: bytes} of the files there are, how many there ought to be, and whether there is a README.txt.

    Removes what was being made.  most: how many there ought to be where there are none.
    """
    files = {}
    settle(fs, path)
    try:
        names = [(entry[0], entry[3]) for entry in fs.ilistdir(path)]
    except OSError as error:
        if error.errno != 2:  # ENOENT
            raise
        fs.mkdir(path)
        return files, most, False
    for name, length in names:
        n, _, count = name.partition(".")
        if n.isdigit() and count.endswith(".new") and count[:-4].isdigit():
            remove(fs, "%s/%s" % (path, name))
        elif n.isdigit() and count.isdigit() and name == "%03d.%d" % (int(n), int(count)):
            if int(n) >= int(count) or int(count) < 4:
                continue
            if not files or int(count) > most:
                most = int(count)
                files = {}
            if int(count) == most:
                files[int(n)] = length
    return files, most, ("README.txt" in [name for name, _ in names])


def _take(fs, device, path, missing):
    """Locate the files that are there; give a free header to those without a header.

    Sets device.note if some are missing or doubled while others hold a journal.
    """
    flash = device._flash
    count = device.ioctl(4, 0)
    blocks = device._blocks
    known = device._known
    now = shadow(flash)
    heads = []  # of a journal
    bare = []
    seen = []
    same = False
    for n in range(count):
        if n in missing:
            continue
        block = device.locate(now, n)
        if block < 2 or block in seen:
            raise unsuitable(path, "the file system is damaged, %d is in block %d: make it anew" % (n, block))
        seen.append(block)
        blocks[n] = block
        known[n] = device.learn(n)
        head = bytes(device._head)
        if not same:
            with fs.open(device.file(n), "rb") as file:
                same = file.read(_HEADER) == head
        if known[n] < 0:
            bare.append(n)
        elif head[:2] == b"MJ" and head[2]:  # not disowned
            heads.append(head)
    if not same and len(missing) < count:
        raise unsuitable(path, "the file system there is not that of the board's own flash: use that")
    if heads and missing:
        device.note = "%s: of %d files of the journal %d were gone" % (path, count, len(missing))
    elif len(set(heads)) < len(heads):
        device.note = "%s: files of the journal were copied over others" % path
    if device.note:
        device.note += ": what waited there is lost"
        return
    for n in bare:
        flash.ioctl(6, blocks[n])
        flash.writeblocks(blocks[n], free_header(), 0)
        known[n] = device.learn(n)
