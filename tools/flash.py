"""Put MicroPython on a board: flash.py --board esp32|pico_w [--port PORT] [--firmware FILE] [--erase]

Without a file the official firmware is downloaded once, into build/firmware.  Either is checked before a board is
touched.

esp32 (also -S2, -S3, -C3, -C6 with a FILE for it): by esptool.  Where there is a MicroPython its partition table stays,
and only bootloader and program are replaced, so files, config.json and journal stay, too.  Where there is none, all of
the flash is erased.  What would take files or a journal away needs --erase.

pico_w: by its UF2 drive.  A running MicroPython is asked to go there, else hold BOOTSEL while plugging it in.  Only
what the file holds is replaced: the file system stays, with config.json and the journal.
"""

import argparse
import contextlib
import glob
import hashlib
import http.client
import os
import re
import string
import struct
import sys
import time
import urllib.request
from pathlib import Path

import uf2
from board import Board, NoBoard, fail, find_port, wait_for_port
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn
from serial.tools import list_ports

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / "build" / "firmware"
SOURCE = "https://micropython.org/resources/firmware/"
# File, its bytes and sha256 where they are known: micropython.org publishes none.
OFFICIAL = {
    "esp32": ("ESP32_GENERIC-20260406-v1.28.0.bin", None, None),
    "pico_w": (
        "RPI_PICO_W-20260406-v1.28.0.uf2",
        1749504,
        "a0210c9c8a085391cb66f530c298a5a4fb804a9d072289254c24df5fdf210f7a",
    ),
}
MOST_BYTES = 32 << 20  # of a firmware
VERSION = re.compile(rb"v\d+\.\d+\.\d+[-.\w]* on \d{4}-\d\d-\d\d")
BAUD = 460800

TABLE_AT = 0x8000
TABLE_BYTES = 0xC00
FILES = "vfs", "ffat"
OURS = (*FILES, "mqj")  # data partitions by which a MicroPython is known
SECTOR = 4096

XIP = 0x10000000
FILES_AT = XIP + 0x12C000  # of a Pico W: its last 848 KiB are the file system
PICO_VID = 0x2E8A
LABEL = "RPI-RP2"
DRIVE_WAIT_S = 60
CHUNK = 64 * 1024


class Unfit(Exception):
    """The firmware cannot be had or must not go to the board; the argument is one line."""


# -- the firmware


def official(board):
    """Return the path of the official firmware, downloaded unless it is in the cache.  Raises Unfit, OSError."""
    name, size, sha256 = OFFICIAL[board]
    path = CACHE / name
    if path.exists() and sha256 in (None, hashlib.sha256(path.read_bytes()).hexdigest()):
        return path
    print("flash: downloading %s" % (SOURCE + name), flush=True)
    try:
        data = download(SOURCE + name)
    except (OSError, ValueError, http.client.HTTPException) as e:
        why = e if hasattr(e, "code") else getattr(e, "reason", e)
        raise Unfit("%s cannot be downloaded (%s): get it elsewhere and give FIRMWARE=file" % (SOURCE + name, why))
    if sha256 and (len(data) != size or hashlib.sha256(data).hexdigest() != sha256):
        raise Unfit("what came from %s is not the file that is known: nothing was kept" % (SOURCE + name))
    CHECKS[board](data)
    CACHE.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_bytes(data)
    os.replace(part, path)
    return path


def download(url):
    """Return what is at url.  Raises OSError, ValueError."""
    with urllib.request.urlopen(url, timeout=20) as answer:
        size = int(answer.headers.get("Content-Length") or 0)
        if size > MOST_BYTES:
            raise ValueError("%d bytes are too many" % size)
        data = bytearray()
        with bar() as progress:
            task = progress.add_task("download", total=size or None)
            while chunk := answer.read(CHUNK):
                data += chunk
                if len(data) > MOST_BYTES:
                    raise ValueError("it does not end")
                progress.advance(task, len(chunk))
    if size and len(data) != size:
        raise ValueError("%d of %d bytes came" % (len(data), size))
    return bytes(data)


def bar():
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn()
    return Progress(*columns, transient=True, disable=not sys.stdout.isatty())


def version_of(data):
    """What MicroPython a firmware says it is."""
    found = VERSION.search(data)
    return "MicroPython " + found.group().decode() if found else "no version of MicroPython"


def table_of(data):
    """Return the partition table as [(label, type, subtype, offset, bytes)]; [] where there is none."""
    rows = []
    for off in range(0, min(len(data), TABLE_BYTES) - 31, 32):
        magic, kind, subtype, at, size, label = struct.unpack_from("<HBBII16s", data, off)
        if magic != 0x50AA:
            break
        rows.append((label.rstrip(b"\0").decode(errors="replace"), kind, subtype, at, size))
    return rows


class Esp32Firmware:
    """A .bin for an Espressif chip, which begins with the bootloader or at the flash's address 0.  Raises Unfit."""

    def __init__(self, data):
        from esptool.bin_image import LoadFirmwareImage
        from esptool.targets import ROM_LIST

        chips = {getattr(rom, "IMAGE_CHIP_ID", None): rom for rom in ROM_LIST}
        for first in (0, 0x1000):
            header = data[first : first + 24]
            if len(header) == 24 and header[0] == 0xE9:
                break
        else:
            raise Unfit("this is no .bin for an ESP32: no bootloader in it")
        rom = chips.get(struct.unpack_from("<H", header, 12)[0])
        if rom is None:
            raise Unfit("this is a .bin for a chip that esptool does not know")
        self.chip = rom.CHIP_NAME
        self.data = data
        self.at = rom.BOOTLOADER_FLASH_OFFSET - first
        self.table = table_of(data[TABLE_AT - self.at :]) if TABLE_AT >= self.at else []
        app = next((row for row in self.table if row[1] == 0), None)
        if self.at < 0 or app is None:
            raise Unfit("this .bin has no partition table at 0x8000: take the one that has the bootloader, too")
        self.app = data[app[3] - self.at : app[3] - self.at + app[4]]
        self.bootloader_at = rom.BOOTLOADER_FLASH_OFFSET
        self.flash_bytes = 1 << 20 + (header[3] >> 4)  # beyond that the bootloader takes no partition
        self.bootloader = data[first : TABLE_AT - self.at]
        for what, part in ("bootloader", self.bootloader), ("program", self.app):
            try:
                image = LoadFirmwareImage(rom.CHIP_NAME, part)
                image.verify()
                good = image.checksum == image.calculate_checksum()
                if getattr(image, "append_digest", 0):
                    good = good and image.stored_digest == image.calc_digest
            except (RuntimeError, struct.error, IndexError, TypeError) as e:  # FatalError is a RuntimeError
                raise Unfit("the %s in this .bin is damaged: get it again (%s)" % (what, str(e).splitlines()[0]))
            if not good:
                raise Unfit("the %s in this .bin is damaged: its checksum does not fit; get it again" % what)

    @property
    def replaces(self):
        """The labels of the data partitions that the file has something for: an image of a whole device."""
        end = self.at + len(self.data)
        return [label for label, kind, _, at, _ in self.table if kind == 1 and label in OURS and at < end]


def check_pico_w(data):
    """Return the pages of an .uf2.  Raises Unfit."""
    try:
        pages = uf2.pages_of(data)
    except ValueError as e:
        raise Unfit("this is " + str(e))
    if b"Pico W" not in b"".join(pages[at] for at in sorted(pages)):
        raise Unfit("this .uf2 is not for the Pico W: there is no Wi-Fi in it")
    return pages


CHECKS = {"esp32": Esp32Firmware, "pico_w": check_pico_w}


# -- ESP32


def plan_esp32(firmware, there, erase):
    """Return (what to say before, whether to erase all of the flash, [(address, bytes)] to write).

    there: the partition table on the board, [] if there is none.  Raises Unfit where that would take away what somebody
    may want.
    """
    whole = [(firmware.at, firmware.data)]
    mine = [row[0] for row in there if row[1] == 1 and row[0] in OURS]
    if erase:
        return "erasing all of the flash, as ERASE=1 says: files, config.json and the journal, too", True, whole
    if not mine:
        return "erasing all of the flash, because there is no MicroPython on it", True, whole
    save = "; save what you want (make pull-journal), then ERASE=1"
    if firmware.replaces:
        raise Unfit("this file is for a whole device, and would replace %s on the board%s" % (", ".join(mine), save))
    apps = [row for row in there if row[1] == 0]
    if len(apps) != 1 or apps[0][4] < len(firmware.app):
        why = "the board has %s for programs" % ("%d partitions" % len(apps) if len(apps) != 1 else "too little room")
        raise Unfit("%s, so %s on it cannot stay%s" % (why, ", ".join(mine), save))
    if max(at + size for _, _, _, at, size in there) > firmware.flash_bytes:
        why = "the board's partitions reach beyond the %d MiB that the firmware is for" % (firmware.flash_bytes >> 20)
        raise Unfit("%s, so %s on it cannot stay%s" % (why, ", ".join(mine), save))
    parts = [(firmware.bootloader_at, firmware.bootloader), (apps[0][3], firmware.app)]
    return "only the firmware is replaced: all else on the board stays (%s)" % ", ".join(mine), False, parts


def with_files(there, read):
    """Return the table with the file system that it does not name, where there is one; its size is given as 0.

    MicroPython's own tables name none since 1.26: it is behind the last partition (ports/esp32/main.c).
    read: called with an address and a number of bytes.
    """
    if not there or any(row[0] in FILES for row in there):
        return there
    end = max(at + size for _, _, _, at, size in there)
    blocks = read(end, 2 * SECTOR)
    found = any(b"littlefs" in blocks[at : at + 64] for at in (0, SECTOR)) or blocks[510:512] == b"\x55\xaa"  # FAT
    return there + [("vfs", 1, 0x81, end, 0)] if found else there


def flash_esp32(port, firmware, erase):
    """Write the firmware by esptool.  Raises Unfit, NoBoard."""
    from esptool import cmds
    from esptool.util import FatalError, flash_size_bytes

    quiet = not sys.stdout.isatty()
    try:
        with cmds.detect_chip(port) as found:
            if found.CHIP_NAME != firmware.chip:
                raise Unfit("the board has an %s, the firmware is for an %s" % (found.CHIP_NAME, firmware.chip))
            esp = cmds.run_stub(found)
            cmds.attach_flash(esp)
            esp.change_baud(BAUD)
            try:
                size = flash_size_bytes(cmds.detect_flash_size(esp))

                def read(at, n):
                    return b"" if size and at + n > size else cmds.read_flash(esp, at, n, no_progress=True)

                there = with_files(table_of(read(TABLE_AT, TABLE_BYTES)), read)
                words, erases, parts = plan_esp32(firmware, there, erase)
                print("flash: " + words, flush=True)
                if erases:
                    cmds.erase_flash(esp)
                cmds.write_flash(esp, parts, no_progress=quiet)
            finally:
                cmds.reset_chip(esp, "hard-reset")
    except FatalError as e:
        first = str(e).strip().splitlines()[0]
        raise NoBoard("%s: esptool says: %s (hold BOOT while it connects, if that is what it is about)" % (port, first))
    except OSError as e:  # pyserial's are, too
        raise NoBoard("%s: %s" % (port, e))


# -- Pico W


def drives():
    """Return the directories where a drive may be mounted."""
    if os.name == "nt":
        return [Path(letter + ":/") for letter in string.ascii_uppercase[3:]]
    places = glob.glob("/Volumes/*") + glob.glob("/media/*/*") + glob.glob("/run/media/*/*")
    with contextlib.suppress(OSError), open("/proc/mounts") as file:
        for line in file:
            _, place, kind = line.split()[:3]
            if kind == "vfat":
                places.append(re.sub(r"\\(\d{3})", lambda m: chr(int(m[1], 8)), place))
    return [Path(place) for place in dict.fromkeys(places)]


def is_boot_drive(path):
    """Whether an RP2040 in its bootloader is mounted at path."""
    try:
        return LABEL in (Path(path) / "INFO_UF2.TXT").read_text(errors="replace")
    except OSError:
        return False


def find_drive(drive=None):
    """Return the boot drive, None if there is none; the one named, or the only one."""
    found = [path for path in ([Path(drive)] if drive else drives()) if is_boot_drive(path)]
    if len(found) > 1:
        raise NoBoard("several Picos wait for a firmware: name one by DRIVE=... (%s)" % ", ".join(map(str, found)))
    return found[0] if found else None


def enter_bootloader(port):
    """Have MicroPython on the board go to its bootloader.  Raises NoBoard."""
    print("flash: %s: stopping the program; MicroPython goes to its bootloader" % port, flush=True)
    with Board(port) as board:
        board.stop()
        board.run_last("import machine; machine.bootloader()")


def pico_port():
    """Return the port of the only Pico that runs, None if there is none."""
    found = [p.device for p in list_ports.comports() if p.vid == PICO_VID]
    return find_port("auto") if len(found) > 1 else found[0] if found else None


def wait_for_drive(drive, wait_s):
    """Return the boot drive once it is there.  Raises NoBoard."""
    deadline = time.monotonic() + wait_s
    hinted = False
    while time.monotonic() < deadline:
        found = find_drive(drive)
        if found:
            return found
        device = Path("/dev/disk/by-label/" + LABEL)
        if device.exists() and not hinted and not drive and time.monotonic() > deadline - wait_s + 5:
            hinted = True
            print("flash: %s is not mounted: udisksctl mount -b %s, or mount it and name DRIVE=" % (LABEL, device))
        time.sleep(0.25)
    raise NoBoard("no %s drive within %d s: hold BOOTSEL while plugging the Pico W in, then again" % (LABEL, wait_s))


def copy_uf2(data, drive, wait_s=20):
    """Write the firmware to the boot drive, which is gone when it has all of it.  Raises NoBoard."""
    target = drive / "firmware.uf2"
    written = 0
    try:
        with bar() as progress, open(target, "wb", buffering=0) as file:
            task = progress.add_task("copying", total=len(data))
            while written < len(data):
                n = file.write(data[written : written + CHUNK])
                written += n
                progress.advance(task, n)
                with contextlib.suppress(OSError):
                    os.fsync(file.fileno())
    except OSError as e:
        # The board restarts with the last block, which may be before the operating system has closed the file.
        if written < len(data):
            raise NoBoard("%s: %s after %d of %d bytes: try again" % (drive, e.strerror, written, len(data)))
    deadline = time.monotonic() + wait_s
    while is_boot_drive(drive):
        if time.monotonic() > deadline:
            raise NoBoard("%s is still there: the board did not take the firmware; unplug it and try again" % drive)
        time.sleep(0.1)


def flash_pico_w(port, data, pages, drive, wait_s):
    """Write the firmware to the drive of a Pico W.  Raises NoBoard."""
    place = find_drive(drive)
    if place is None:
        port = port or pico_port()
        if port:
            enter_bootloader(port)
        else:
            print("flash: hold BOOTSEL while plugging the Pico W in; waiting for its drive", flush=True)
        place = wait_for_drive(drive, wait_s)
    if max(pages) >= FILES_AT:
        print("flash: the file system is replaced, with config.json and a journal in it", flush=True)
    else:
        print("flash: only the firmware is replaced: files, config.json and a journal in files stay", flush=True)
    print("flash: copying to %s" % place, flush=True)
    copy_uf2(data, place)


# -- the command line


def flash(board, port=None, firmware=None, erase=False, drive=None, wait_s=DRIVE_WAIT_S):
    """Put a firmware on a board.  Raises Unfit, NoBoard, OSError."""
    path = Path(firmware) if firmware else official(board)
    if path.stat().st_size > MOST_BYTES:
        raise Unfit("%s: too large for a firmware" % path)
    data = path.read_bytes()
    try:
        checked = CHECKS[board](data)
    except Unfit as e:
        raise Unfit("%s: %s" % (path, e))
    print("flash: %s, %d KB, %s" % (path.name, len(data) // 1000, version_of(data)), flush=True)
    if board == "esp32":
        port = find_port(port)
        print("flash: %s" % port, flush=True)
        flash_esp32(port, checked, erase)
    else:
        if max(checked) >= FILES_AT and not erase:
            raise Unfit("this file is for a whole device, files and journal on the board go: if they may, ERASE=1")
        if max(checked) < FILES_AT and erase:
            raise Unfit("leave ERASE=1 out: this .uf2 holds no file system, and a Pico erases only what it replaces")
        flash_pico_w(port, data, checked, drive, wait_s)
    if port:
        with contextlib.suppress(NoBoard):
            wait_for_port(port, 10)
    print("flash: done; next: make deploy" + (" PORT=" + port if port else ""))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--board", help="esp32 or pico_w")
    parser.add_argument("--port", help="serial port of the board, if there are several")
    parser.add_argument("--firmware", metavar="FILE", help="instead of the official one")
    parser.add_argument("--erase", action="store_true", help="files and journal on the board may go")
    parser.add_argument("--drive", metavar="DIRECTORY", help="where the Pico W's drive is mounted, if it is not found")
    parser.add_argument("--wait", type=float, default=DRIVE_WAIT_S, metavar="S", help="for the drive (60)")
    args = parser.parse_args(argv)
    if args.board not in OFFICIAL:
        found = ", found %s" % args.board if args.board else ""
        fail("flash", "say which board it is, BOARD=esp32 or BOARD=pico_w%s" % found)
    try:
        flash(args.board, args.port, args.firmware, args.erase, args.drive, args.wait)
    except (Unfit, NoBoard) as e:
        fail("flash", e)
    except OSError as e:
        fail("flash", "%s: %s" % (e.filename, e.strerror))
    except KeyboardInterrupt:
        fail("flash", "stopped; run it again, the board can always be flashed anew")
    return 0


if __name__ == "__main__":
    sys.exit(main())
