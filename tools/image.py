"""Make the images of devices for a production line: firmware, file system, configuration and journal in one file each.

    image.py BOARD [--firmware FILE] [--config FILE] [--devices LIST.csv] [--out DIRECTORY]

BOARD is esp32 (also -S2, -S3, -C3, -C6 with a FILE for it) or pico_w.  An image has
- the firmware, as it is in FILE or the official one; on an ESP32 its partition table is firmware/partitions-esp32.csv;
- a littlefs2 with the compiled library, boot.py, main.py, app.py where there is one, config.json, and the certificates
  that it names, which are looked for beside it (/certs/ca.pem in certs/ca.pem);
- the journal, made and empty, in its home.

LIST.csv makes an image for each of its lines.  Its first line names the columns: client_id, and further keys of the
configuration as in wifi.password; a cell that is not empty takes the place of what the configuration says.  All lines
are checked as the device would before anything is written.  No value of a cell is ever printed but a client_id.
"""

import argparse
import csv
import json
import sys
from pathlib import Path
from urllib.parse import quote

import configure  # finds the library and the shim
import flash
import host
import uf2
from mpy import CannotCompile, compile_tree
from mqtt_durable import config as configuration
from mqtt_durable.errors import JournalUnavailable
from mqtt_durable.flash.gap import _declared
from mqtt_durable.flash.pages import Pages
from mqtt_durable.flash.pinning import pin
from mqtt_durable.journal import Journal
from mqtt_durable.store import Store
from norsim import Nor
from vfs import VfsLfs2

ROOT = Path(__file__).resolve().parent.parent
SECTOR = 4096
PAGE = 256
MIN_JOURNAL = 16384
ENOSPC = 28
TAKEN = "nvs", "phy_init", "otadata", "vfs"

TABLE = ROOT / "firmware" / "partitions-esp32.csv"


class Unusable(Exception):
    """What was given makes no image; the argument says in one line what is wrong and what to do."""


def file_system(files, blocks, prog_size, journal=None, in_flight=16):
    """Return the bytes of a littlefs2 as the board's firmware makes it, with these files and a pinned journal.

    files: {path without a leading /: bytes}.  prog_size: 256 on a Pico, 32 on an ESP32: the firmware's own value, which
    decides what littlefs keeps inline.  journal: None, or (directory, bytes) of a pinned one.
    Raises Unusable if it is all too much.
    """
    nor = Nor(blocks * SECTOR, prog_size if prog_size == PAGE else 4)
    try:
        VfsLfs2.mkfs(nor, progsize=prog_size)
        fs = VfsLfs2(nor, progsize=prog_size)
        made = {""}
        for path in sorted(files):
            directory = ""
            for name in path.split("/")[:-1]:
                directory += "/" + name
                if directory not in made:
                    fs.mkdir(directory)
                    made.add(directory)
            with fs.open("/" + path, "wb") as file:
                file.write(files[path])
        if journal:
            directory, size = journal
            # Pages, on the ESP32 too, is what programs in fours: here it only checks bounds.
            device = pin(lambda: fs, Pages(nor, 0, blocks), directory, size)
            make_journal(device, device.ioctl(4, 0) * SECTOR, in_flight)
        fs.umount()
    except OSError as error:
        if error.errno != ENOSPC:
            raise
        total = sum(len(data) for data in files.values())
        raise Unusable("%d bytes of files do not fit a file system of %d KiB" % (total, blocks * SECTOR // 1024))
    except JournalUnavailable as error:
        raise Unusable(str(error))
    return bytes(nor.mem)


def make_journal(device, size, in_flight=16):
    """Make an empty journal on a device, as one that was ended in order."""
    store = Store(Journal(device, device.prog_size, size), in_flight=in_flight)
    store.open()
    store.close()


def encode(config):
    """The bytes of config.json."""
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


class Esp32:
    """What images of an ESP32 have in common.  firmware: the bytes of its .bin.

    Raises Unfit if it is none, Unusable if it does not fit the partition table.
    """

    name = kind = "esp32"
    suffix = ".bin"
    how = ".venv/bin/esptool write-flash 0x0 %s"

    def __init__(self, firmware, table=TABLE):
        from esp_idf_defs.partitions import InputError, PartitionTable

        given = flash.Esp32Firmware(firmware)
        try:
            self._table = PartitionTable.from_csv(Path(table).read_text())
            self._table.verify(flash.TABLE_AT)
            self._table.verify_size_fits(1 << 20 + (given.bootloader[3] >> 4))
        except InputError as error:
            raise Unusable("%s: %s" % (Path(table).name, error))
        factory = self._partition("factory", 0)
        app = given.app.rstrip(b"\xff")
        if len(app) > factory.size:
            raise Unusable(
                "the firmware's program has %d bytes, the partition factory in %s %d: make it larger, vfs smaller"
                % (len(app), Path(table).name, factory.size)
            )
        self._vfs = self._partition("vfs", 1)
        self._parts = [
            (given.bootloader_at, given.bootloader),
            (flash.TABLE_AT, self._table.to_binary()),
            (factory.offset, app),
        ]

    def _partition(self, label, kind):
        found = self._table.find_by_name(label)
        if found is None or found.type != kind:
            kinds = ", ".join(p.name for p in self._table if p.type == kind)
            raise Unusable("the partition table has no %s among %s" % (label, kinds))
        return found

    def image(self, files, config):
        """Return the image, from the first byte of the flash to the last that the table knows of."""
        parts = list(self._parts)
        in_flight = config["session"]["in_flight"]
        home, _, name = config["journal"]["home"].partition(":")
        pinned = None
        if home in ("auto", "partition"):
            partition = self._partition(name or "mqj", 1)
            size = partition.size // SECTOR * SECTOR
            if size < MIN_JOURNAL or partition.name in TAKEN:
                raise Unusable("the partition %s is none for a journal: too small, or MicroPython's" % partition.name)
            nor = Nor(size, 4)
            make_journal(nor, size, in_flight)
            parts.append((partition.offset, bytes(nor.mem)))
        elif home == "pinned":
            pinned = name or "/mqj", config["journal"]["size_kib"] * 1024
        elif home == "gap":
            raise Unusable('journal.home: found "gap", which only a Pico has')
        data = file_system(files, self._vfs.size // SECTOR, 32, pinned, in_flight)
        image = bytearray(b"\xff" * self._table.flash_size())
        for at, part in parts + [(self._vfs.offset, data)]:
            image[at : at + len(part)] = part
        return bytes(image)


class PicoW:
    """What images of the Pico W have in common.  firmware: the bytes of its .uf2.

    Raises Unfit if it is none, Unusable if it does not declare where its file system is.
    """

    name = "pico_w"
    kind = "rp2"
    suffix = ".uf2"
    how = "hold BOOTSEL while plugging in, then copy %s to the drive RPI-RP2"

    def __init__(self, firmware):
        pages = flash.check_pico_w(firmware)
        end, devices = _declared(_Memory(pages))
        # The file system is the last one; a ROMFS would be below it.
        self._at, size = max(devices, default=(0, 0))
        self.blocks = size // SECTOR
        if not self.blocks or self._at % SECTOR or not 0 < end <= self._at:
            raise Unusable("the firmware does not declare where its file system is: take MicroPython's own")
        self._pages = {at: page for at, page in pages.items() if at < self._at}

    def image(self, files, config):
        """Return the image, with the sectors of firmware and file system that are not blank."""
        home, _, name = config["journal"]["home"].partition(":")
        pinned = None
        if home in ("auto", "pinned"):
            pinned = name or "/mqj", config["journal"]["size_kib"] * 1024
        elif home == "partition":
            raise Unusable('journal.home: found "partition:%s", which only an ESP32 has' % name)
        data = file_system(files, self.blocks, PAGE, pinned, config["session"]["in_flight"])
        pages = dict(self._pages)
        for at in range(0, len(data), SECTOR):
            if data[at : at + SECTOR].strip(b"\xff"):
                for off in range(at, at + SECTOR, PAGE):
                    pages[self._at + off] = data[off : off + PAGE]
        return uf2.encode(pages)


class _Memory:
    """The flash of a firmware, as machine.mem8 shows it."""

    def __init__(self, pages):
        self._pages = pages

    def __getitem__(self, address):
        page = self._pages.get(address & -PAGE)
        return page[address % PAGE] if page else 0xFF


BOARDS = {"esp32": Esp32, "pico_w": PicoW}


# -- configurations


def read_config(path):
    """Return what is in a config.json.  Raises Unusable."""
    if not path.exists():
        raise Unusable("%s: not found; make config makes it" % path)
    try:
        return configure.read(path)
    except configure.Wrong as error:
        raise Unusable(str(error))


def read_devices(path, base):
    """Return [(where, configuration)] of a list, in its order, not yet checked.  Raises Unusable."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            head = file.readline()
            file.seek(0)
            reader = csv.reader(file, delimiter=";" if ";" in head and "," not in head else ",", strict=True)
            rows = [(reader.line_num, row) for row in reader]
    except OSError as error:
        raise Unusable("%s: %s" % (path, error.strerror))
    except (csv.Error, ValueError) as error:
        raise Unusable("%s: it is no CSV in UTF-8: %s" % (path, error))
    keys = [key.strip() for key in rows[0][1]] if rows else []
    if "client_id" not in keys:
        raise Unusable("%s: line 1: found no column client_id" % path)
    if len(set(keys)) < len(keys):
        raise Unusable("%s: line 1: found a column twice" % path)
    try:
        for key in keys:
            configure.row_of(key)
    except configure.Wrong as error:
        raise Unusable("%s: line 1: %s" % (path, error))
    devices = []
    for number, row in rows[1:]:
        if not any(cell.strip() for cell in row):
            continue
        where = "%s: line %d" % (path, number)
        if len(row) != len(keys):
            raise Unusable("%s: found %d cells, expected %d" % (where, len(row), len(keys)))
        config = json.loads(json.dumps(base))
        try:
            for key, cell in zip(keys, row):
                if cell:
                    configure.put(config, key, configure.value_of(key, cell))
        except configure.Wrong as error:
            raise Unusable("%s: %s" % (where, error))
        if dict(zip(keys, row))["client_id"] in ("", "auto"):
            raise Unusable("%s: client_id: expected one of the device's own" % where)
        devices.append((where, config))
    if not devices:
        raise Unusable("%s: it lists no device" % path)
    return devices


def check(devices):
    """Return the problem lines of [(where, configuration)]: what the device would say, and doubled client ids."""
    problems = []
    seen = {}
    for where, config in devices:
        lines = configuration.check(config)
        problems += ["%s: %s" % (where, line) for line in lines]
        if not lines:
            name = config.get("client_id", "auto")
            if name in seen:
                problems.append('%s: client_id: found "%s", which is also that of %s' % (where, name, seen[name]))
            seen[name] = where
    return problems


def named_files(config, root):
    """Return {path: bytes} of the files that a complete configuration names, found below root.  Raises Unusable."""
    tls = config["broker"]["tls"] or {}
    files = {}
    for key in ("ca", "cert", "key"):
        path = (tls.get(key) or "").lstrip("/")
        if path and (key != "ca" or tls["verify"]):
            try:
                files[path] = (root / path).read_bytes()
            except OSError as error:
                raise Unusable("broker.tls.%s: %s: %s" % (key, root / path, error.strerror))
    return files


# -- the command


def make(board, devices, root=ROOT, out=ROOT / "build" / "images", progress=lambda done: None):
    """Write an image for each of devices, [(where, configuration)]; return their paths.

    board: an Esp32 or PicoW.  root: where the certificates that they name are.  progress: called with the number made
    so far.  All are made or, whatever fails, none.  Raises Unusable, whose arguments are lines; OSError.
    """
    host.use_board(board.kind)
    problems = check(devices)
    if problems:
        raise Unusable(*problems)
    jobs = []
    library = compile_tree()
    for where, given in devices:
        config = configuration.complete(given)
        try:
            files = {**library, "config.json": encode(given), **named_files(config, root)}
        except Unusable as error:
            raise Unusable("%s: %s" % (where, error))
        jobs.append((where, config["client_id"], files, config))
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / ((board.name if name == "auto" else quote(name, safe="")) + board.suffix) for _, name, _, _ in jobs]
    parts = [path.with_name(path.name + ".part") for path in paths]
    try:
        for done, (part, (where, _, files, config)) in enumerate(zip(parts, jobs)):
            progress(done)
            try:
                data = board.image(files, config)
            except Unusable as error:
                raise Unusable("%s: %s" % (where, error))
            part.touch(0o600)  # passwords are in it
            part.write_bytes(data)
        for part, path in zip(parts, paths):
            part.replace(path)
    finally:
        for part in parts:
            part.unlink(missing_ok=True)
    return paths


def main(arguments=None):
    parser = argparse.ArgumentParser(description="Make the images of devices: firmware, files, configuration, journal.")
    parser.add_argument("board", choices=sorted(BOARDS))
    parser.add_argument("--firmware", type=Path, help="MicroPython for the board: .bin, .uf2 (else the official one)")
    parser.add_argument("--config", type=Path, default=Path("config.json"), help="what all share (config.json)")
    parser.add_argument("--devices", help="CSV: an image for each line; columns client_id, wifi.password, ...")
    parser.add_argument("--out", type=Path, default=Path("build/images"), help="directory (build/images)")
    args = parser.parse_args(arguments)
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    try:
        base = read_config(args.config)
        devices = read_devices(args.devices, base) if args.devices else [(args.config, base)]
        firmware = args.firmware or flash.official(args.board)
        try:
            board = BOARDS[args.board](firmware.read_bytes())
        except (Unusable, flash.Unfit) as error:
            raise Unusable("%s: %s" % (firmware, error))
        columns = TextColumn("images"), BarColumn(), MofNCompleteColumn()
        console = Console(stderr=True)
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
            task = bar.add_task("images", total=len(devices))
            paths = make(board, devices, args.config.parent, args.out, lambda done: bar.update(task, completed=done))
    except Unusable as error:
        for line in error.args:
            print("image: " + line, file=sys.stderr)
        return 1
    except OSError as error:
        print("image: %s: %s" % (error.filename or args.out, error.strerror), file=sys.stderr)
        return 1
    except (CannotCompile, flash.Unfit) as error:
        print("image: %s" % error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("image: stopped; no image was written", file=sys.stderr)
        return 1
    for path in paths:
        print("%s  %d KiB" % (path, path.stat().st_size // 1024))
    print("to write it: " + board.how % paths[0])
    return 0


if __name__ == "__main__":
    sys.exit(main())
