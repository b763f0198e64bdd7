"""tools/image.py: what is in an image is what was asked for, and a board that has nothing but the image runs from it.

The images are read back by others' readers: littlefs-python, esptool, MicroPython's own littlefs, and a few lines here
for .uf2 and the partition table.  The firmware in them is a stand-in, made here.
"""

import csv
import hashlib
import io
import json
import os
import queue
import struct
import subprocess
import sys
from pathlib import Path

import image as tool
import paho.mqtt.client as mqtt
import pytest
from brokers import Mosquitto
from esptool.bin_image import ELFSection, ESP32FirmwareImage, ESP32S3FirmwareImage
from littlefs import LittleFS
from mpy import compile_tree
from raises import raises

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 60
PASSWORD = "Kennwort-4711"
XIP = 0x10000000
STORAGE_AT = 0x1012C000  # of a Pico W with 2 MiB: the last 848 KiB
STORAGE = 212 * 4096
FIRMWARE_END = 0x10003A00
CONFIG = {
    "wifi": {"ssid": "net", "password": PASSWORD},
    "broker": {"host": "broker.lan"},
    "client_id": "mast7",
}

# -- stand-ins for official firmware


def uf2_blocks(pages, family=0xE48BFF56):
    for n, (at, data) in enumerate(pages):
        head = struct.pack("<8I", 0x0A324655, 0x9E5D5157, 0x2000, at, 256, n, len(pages), family)
        yield head + data.ljust(476, b"\0") + struct.pack("<I", 0x0AB16F30)


def pico_firmware(storage=(STORAGE_AT, STORAGE), family=0xE48BFF56, machine=b"Raspberry Pi Pico W\0"):
    """A .uf2 that declares its end and its file system, as pico-sdk's binary info does."""
    flash = bytearray(random_bytes("pico", FIRMWARE_END - XIP))
    entries = [struct.pack("<HHII", 5, 0x5052, 0x68F465DE, FIRMWARE_END)]
    if storage:
        entries.append(struct.pack("<HHIIIIH", 7, 0x504D, XIP + 0x900, *storage, 0, 3))
    table = b""
    at = 0x2001
    for entry in entries:
        flash[at : at + len(entry)] = entry
        table += struct.pack("<I", XIP + at)
        at += len(entry) + 3
    flash[0x900:0x90C] = b"MicroPython\0"
    flash[0x910 : 0x910 + len(machine)] = machine
    flash[0x1000 : 0x1000 + len(table)] = table
    where = XIP + 0x1000, XIP + 0x1000 + len(table), XIP + 0x1800
    struct.pack_into("<5I", flash, 0x1D4, 0x7188EBF2, *where, 0xE71AA390)
    pages = [(XIP + at, bytes(flash[at : at + 256])) for at in range(0, len(flash), 256)]
    return b"".join(uf2_blocks(pages, family))


def random_bytes(seed, n):
    return hashlib.shake_256(seed.encode()).digest(n)


def esp_image(sections, flash_mib=4, kind=ESP32FirmwareImage):
    made = kind()
    made.chip_id = kind.ROM_LOADER.IMAGE_CHIP_ID
    made.entrypoint = 0x40080000
    made.flash_mode, made.flash_size_freq = 2, {2: 0x10, 4: 0x20}[flash_mib]  # DIO, 40 MHz
    made.segments = [ELFSection(b"s%d" % n, at, data, 6) for n, (at, data) in enumerate(sections)]
    return made.save(None)


def stock_table():
    """As MicroPython 1.28 has it: no vfs."""
    entries = b"".join(
        struct.pack("<2sBBLL16sL", b"\xaa\x50", *entry, 0)
        for entry in (
            (1, 2, 0x9000, 0x6000, b"nvs"),
            (1, 1, 0xF000, 0x1000, b"phy_init"),
            (0, 0, 0x10000, 0x1F0000, b"factory"),
        )
    )
    return (entries + b"\xeb\xeb" + b"\xff" * 14 + hashlib.md5(entries).digest()).ljust(0xC00, b"\xff")


def esp32_firmware(program=20000, flash_mib=4):
    sections = (0x3FFF0030, random_bytes("boot", 400)), (0x40080400, random_bytes("code", 5000))
    app = (0x3F400020, random_bytes("rodata", program)), (0x40080000, random_bytes("iram", 3000))
    bootloader = esp_image(sections, flash_mib)
    return bootloader.ljust(0x7000, b"\xff") + stock_table().ljust(0x8000, b"\xff") + esp_image(app)


def esp32s3_firmware():
    """Begins at address 0, where the bootloader of an S3 is."""
    sections = (0x3FCD0108, random_bytes("boot", 400)), (0x403C9700, random_bytes("code", 5000))
    app = (0x3C000020, random_bytes("rodata", 20000)), (0x40374000, random_bytes("iram", 3000))
    bootloader, program = (esp_image(part, kind=ESP32S3FirmwareImage) for part in (sections, app))
    return bootloader.ljust(0x8000, b"\xff") + stock_table().ljust(0x8000, b"\xff") + program


FIRMWARE = {"pico_w": pico_firmware, "esp32": esp32_firmware}
BOARDS = sorted(FIRMWARE)


# -- readers


def uf2_flash(data):
    """{address: 256 bytes} of a .uf2 whose every field is as it must be."""
    assert len(data) % 512 == 0
    pages = {}
    for n in range(len(data) // 512):
        block = data[512 * n : 512 * n + 512]
        one, two, flags, at, size, number, total, family = struct.unpack("<8I", block[:32])
        assert (one, two, block[508:]) == (0x0A324655, 0x9E5D5157, struct.pack("<I", 0x0AB16F30))
        assert (flags, size, number, total, family) == (0x2000, 256, n, len(data) // 512, 0xE48BFF56)
        assert at not in pages and at % 256 == 0 and XIP <= at <= XIP + (2 << 20) - 256
        pages[at] = block[32:288]
    return pages


def partitions(flash):
    """{label: (type, subtype, offset, size)} of a partition table, checked as the bootloader does."""
    table = flash[0x8000:0x8C00]
    found = {}
    for at in range(0, len(table), 32):
        entry = table[at : at + 32]
        if entry[:2] != b"\xaa\x50":
            break
        kind, subtype, offset, size, label, flags = struct.unpack("<2xBBLL16sL", entry)
        assert flags == 0
        found[label.rstrip(b"\0").decode()] = kind, subtype, offset, size
    assert entry[:16] == b"\xeb\xeb" + b"\xff" * 14 and entry[16:] == hashlib.md5(table[:at]).digest()
    assert not table[at + 32 :].strip(b"\xff")
    return found


def regions(board, data):
    """(the bytes of the file system, those of the journal partition or None) of an image."""
    if board == "pico_w":
        pages = uf2_flash(data)
        return b"".join(pages.get(at, b"\xff" * 256) for at in range(STORAGE_AT, STORAGE_AT + STORAGE, 256)), None
    found = partitions(data)
    return tuple(data[at : at + size] for _, _, at, size in (found["vfs"], found["mqj"]))


def mounted(board, data):
    """The file system of an image, in littlefs-python."""
    storage = regions(board, data)[0]
    fs = LittleFS(
        block_size=4096, block_count=len(storage) // 4096, prog_size=256 if board == "pico_w" else 32, mount=False
    )
    fs.context.buffer = bytearray(storage)
    fs.mount()
    return fs


def contents(fs):
    files = {}
    for directory, _, names in fs.walk("/"):
        for name in names:
            path = directory.rstrip("/") + "/" + name
            with fs.open(path, "rb") as file:
                files[path.lstrip("/")] = file.read()
    return files


def make(directory, board, config=CONFIG, firmware=None, **options):
    """Run the tool; return its exit status.  The images are in directory/out."""
    (directory / "firmware").write_bytes(FIRMWARE[board]() if firmware is None else firmware)
    (directory / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    command = [board, "--firmware", directory / "firmware", "--config", directory / "config.json"]
    command += ["--out", directory / "out"]
    if "devices" in options:
        text = options["devices"]
        (directory / "devices.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
        command += ["--devices", directory / "devices.csv"]
    return tool.main([str(word) for word in command])


def made(directory):
    return {path.name: path.read_bytes() for path in (directory / "out").iterdir()}


def journal_check(directory, data):
    (directory / "journal.bin").write_bytes(data)
    command = [sys.executable, str(ROOT / "tools" / "journal.py"), "check", str(directory / "journal.bin")]
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


# -- what is in it


@pytest.mark.parametrize("board", BOARDS)
def test_an_image_has_the_compiled_library_the_programs_and_the_configuration(tmp_path, board, capsys):
    assert make(tmp_path, board) == 0
    [(name, data)] = made(tmp_path).items()
    assert name == "mast7" + {"pico_w": ".uf2", "esp32": ".bin"}[board]
    files = contents(mounted(board, data))
    journal = {path: data for path, data in files.items() if path.startswith("mqj/")}
    config = files.pop("config.json")
    assert json.loads(config) == CONFIG
    assert {path: data for path, data in files.items() if path not in journal} == compile_tree()
    assert files["boot.py"] == (ROOT / "boot.py").read_bytes()
    printed = capsys.readouterr()
    assert name in printed.out and PASSWORD not in printed.out + printed.err


@pytest.mark.parametrize("board", BOARDS)
def test_the_firmware_in_it_is_the_one_given(tmp_path, board):
    assert make(tmp_path, board) == 0
    [data] = made(tmp_path).values()
    given = FIRMWARE[board]()
    if board == "pico_w":
        pages, before = uf2_flash(data), uf2_flash(given)
        assert {at: page for at, page in pages.items() if at < STORAGE_AT} == before
        # The ROM erases a sector at its first page: none of the file system's is written in part.
        storage = [at for at in pages if at >= STORAGE_AT]
        for at in storage:
            assert all((at & -4096) + off in pages for off in range(0, 4096, 256))
        assert len(storage) < STORAGE // 256  # blank ones are left out
    else:
        assert len(data) == 4 << 20
        assert data[:0x1000] == b"\xff" * 0x1000 and data[0x1000:0x8000] == given[:0x7000]
        assert data[0x10000 : 0x10000 + len(given) - 0xF000] == given[0xF000:]
        for at, end in ((0x1000, 0x8000), (0x10000, 0x200000)):
            (tmp_path / "part.bin").write_bytes(data[at:end])
            command = [sys.executable, "-m", "esptool", "image-info", str(tmp_path / "part.bin")]
            info = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            assert info.returncode == 0 and "Detected image type: ESP32" in info.stdout, info.stdout
            assert info.stdout.count("(valid)") == 2, info.stdout  # checksum and hash
            assert "Flash size: 4MB" in info.stdout


def test_a_chip_of_the_family_gets_its_bootloader_where_it_looks_for_it(tmp_path):
    firmware = esp32s3_firmware()
    assert make(tmp_path, "esp32", firmware=firmware) == 0
    [data] = made(tmp_path).values()
    assert data[:0x8000] == firmware[:0x8000] and data[0x10000 : len(firmware)] == firmware[0x10000:]
    assert "mqj" in partitions(data)


@pytest.mark.parametrize("board", BOARDS)
def test_an_image_is_firmware_for_the_next_one(tmp_path, board):
    (tmp_path / "again").mkdir()
    assert make(tmp_path, board, dict(CONFIG, journal={"size_kib": 128})) == 0
    [first] = made(tmp_path).values()
    assert make(tmp_path / "again", board, firmware=first) == 0
    [second] = made(tmp_path / "again").values()
    if board == "esp32":
        assert first[:0x200000] == second[:0x200000]
    else:
        firmware = [[item for item in uf2_flash(data).items() if item[0] < STORAGE_AT] for data in (first, second)]
        assert firmware[0] == firmware[1]
    assert "journal" not in json.loads(contents(mounted(board, second))["config.json"])


def test_the_partition_table_of_an_esp32_has_a_journal_and_room_for_stock_firmware(tmp_path):
    assert make(tmp_path, "esp32") == 0
    [data] = made(tmp_path).values()
    found = partitions(data)
    listed = [row for row in csv.reader(io.StringIO(tool.TABLE.read_text())) if not row[0].startswith("#")]
    assert list(found) == [row[0] for row in listed]
    for label, _, _, offset, size in listed:
        assert found[label][2:] == (int(offset, 0), int(size, 0))
    at = 0x9000
    for kind, _, offset, size in found.values():  # without a hole, on sectors, programs on 64 KiB
        assert offset == at and size % 4096 == 0 and (kind or offset % 0x10000 == 0)
        at += size
    assert at == 4 << 20
    assert found["factory"][:3] == (0, 0, 0x10000) and found["factory"][3] >= 0x1F0000
    assert found["vfs"][:2] == (1, 0x81) and found["mqj"][0] == 1 and found["nvs"] == (1, 2, 0x9000, 0x6000)


@pytest.mark.parametrize(
    "board, home", [("esp32", "auto"), ("esp32", "pinned"), ("pico_w", "auto"), ("pico_w", "pinned:/j")]
)
def test_the_journal_is_there_and_empty(tmp_path, board, home):
    config = dict(CONFIG, journal={"home": home, "size_kib": 32})
    assert make(tmp_path, board, config) == 0
    [data] = made(tmp_path).values()
    directory = home[8:] or "mqj"
    files = {path: data for path, data in contents(mounted(board, data)).items() if path.startswith(directory + "/")}
    journal = regions(board, data)[1]
    if (board, home) == ("esp32", "auto"):
        assert not files and len(journal) == 0x40000
    else:
        if board == "esp32":
            assert journal == b"\xff" * 0x40000
        assert sorted(files) == ["%s/%03d.8" % (directory, n) for n in range(8)] + [directory + "/README.txt"]
        journal = b"".join(files["%s/%03d.8" % (directory, n)] for n in range(8))
    done = journal_check(tmp_path, journal)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    "board, home", [("pico_w", "gap"), ("pico_w", "ram"), ("esp32", "file:/j.bin"), ("esp32", "ram")]
)
def test_other_homes_need_nothing_made(tmp_path, board, home):
    assert make(tmp_path, board, dict(CONFIG, journal={"home": home})) == 0
    [data] = made(tmp_path).values()
    assert sorted(contents(mounted(board, data))) == sorted([*compile_tree(), "config.json"])
    if board == "esp32":
        assert regions(board, data)[1] == b"\xff" * 0x40000


# -- a board that has only the image

RUN = """
import sys, vfs
sys.path[:] = [".frozen"] + %(host)r
import host, esp32, rp2, machine
from norsim import Nor
def load(path, prog_size):
    with open(path, "rb") as file:
        nor = Nor(file.seek(0, 2), prog_size)
        file.seek(0)
        file.readinto(nor.mem)
    return nor
nors = [load(path, prog_size) for path, prog_size in %(flash)r]
host.use_board(%(kind)r)
if %(kind)r == "rp2":
    rp2.set_flash(nors[0])
    fs = vfs.VfsLfs2(rp2.Flash(), progsize=256)
else:
    esp32.add_partition("vfs", nors[0], subtype=0x81)
    esp32.add_partition("mqj", nors[1])
    fs = vfs.VfsLfs2(esp32.Partition("vfs"))
vfs.umount("/")
vfs.mount(fs, "/")
vfs.mount(vfs.VfsPosix("/"), "/host")
sys.path[:] = ["", ".frozen", "/lib"] + ["/host" + path for path in %(host)r]
from mqtt_durable import config, flash
settings = config.load()
device, unit, size = flash.open_home(settings["journal"]["home"], settings["journal"]["size_kib"] * 1024)
from mqtt_durable.journal import Journal
from mqtt_durable.store import Store
store = Store(Journal(device, unit, size))
store.open()
print("journal:", size, store.journal.fresh, store.journal.closed, store.waiting(), getattr(device, "note", None))
print("programmed:", sum([nor.ops for nor in nors]))
print("library:", flash.__file__, Store.__module__)
for name in ("boot.py", "main.py"):
    exec(open(name).read(), {"__name__": "__main__"})
"""


@pytest.mark.parametrize("board", BOARDS)
def test_a_board_that_has_nothing_but_the_image_publishes(tmp_path, board):
    with Mosquitto() as broker:
        arrived, ready = queue.Queue(), queue.Queue()
        far = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, client_id="far")
        far.on_message = lambda _c, _u, message: arrived.put(message)
        far.on_subscribe = lambda *_: ready.put(True)
        far.connect("127.0.0.1", broker.port)
        far.loop_start()
        far.subscribe("devices/#", 1)
        ready.get(timeout=PATIENCE_S)
        # "auto" on the unix port is a file.
        home = {"pico_w": "pinned", "esp32": "partition:mqj"}[board]
        config = {
            "wifi": None,
            "broker": {"host": "127.0.0.1", "port": broker.port},
            "client_id": "mast7",
            "journal": {"home": home},
        }
        assert make(tmp_path, board, config) == 0
        [data] = made(tmp_path).values()
        flash = []
        for name, part, prog_size in zip(("vfs", "mqj"), regions(board, data), (256 if board == "pico_w" else 4, 4)):
            if part is not None:
                (tmp_path / name).write_bytes(part)
                flash.append((str(tmp_path / name), prog_size))
        kind = "rp2" if board == "pico_w" else "esp32"
        host = [str(ROOT / "tools" / "shim"), str(ROOT / "tools")]
        interpreter = os.environ.get("MICROPYTHON") or str(Path(sys.executable).parent / "micropython")
        process = subprocess.Popen(
            [interpreter, "-X", "heapsize=16m", "-c", RUN % {"host": host, "flash": flash, "kind": kind}],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=tmp_path,
        )
        try:
            message = arrived.get(timeout=PATIENCE_S)
        except queue.Empty:
            message = None
        finally:
            process.kill()
            output = process.communicate()[0]
            far.disconnect()
            far.loop_stop()
    assert message, output
    assert message.topic == "devices/mast7/telemetry"
    stats = json.loads(message.payload)["stats"]
    assert stats["journal_home"] == home and not stats["journal_lost"], stats
    lines = dict(line.split(": ", 1) for line in output.splitlines() if ": " in line)
    # What is in the image is what the board finds: made, ended in order, empty; and it need not make anything.
    assert lines["journal"] == "%d False True 0 None" % {"pico_w": 65536, "esp32": 262144}[board], output
    assert lines["programmed"] == "0", output
    assert lines["library"].startswith("/lib/mqtt_durable/flash/__init__.mpy"), output


# -- a list of devices


@pytest.mark.parametrize("board", BOARDS)
def test_a_list_makes_an_image_for_each_line(tmp_path, board, capsys):
    devices = (
        "\ufeffclient_id,wifi.password,broker.port,telemetry.qos,sleep\r\n"
        "mast/1,Geheimwort-1,1884,0,\r\n"
        "\r\n"
        '"mast ,2",,,,\r\n'
        "mast3,12345678,,2,\"{\"\"every_s\"\": 900}\"\r\n"
    )
    assert make(tmp_path, board, devices=devices) == 0
    images = made(tmp_path)
    suffix = {"pico_w": ".uf2", "esp32": ".bin"}[board]
    assert sorted(images) == ["mast%20%2C2" + suffix, "mast%2F1" + suffix, "mast3" + suffix]
    configs = {name: json.loads(contents(mounted(board, data))["config.json"]) for name, data in images.items()}
    first, second, third = configs["mast%2F1" + suffix], configs["mast%20%2C2" + suffix], configs["mast3" + suffix]
    assert first["client_id"] == "mast/1" and first["wifi"] == {"ssid": "net", "password": "Geheimwort-1"}
    assert first["broker"] == {"host": "broker.lan", "port": 1884} and first["telemetry"] == {"qos": 0}
    assert second == dict(CONFIG, client_id="mast ,2")  # empty cells leave what all share
    assert third["wifi"]["password"] == "12345678" and third["sleep"] == {"every_s": 900}
    printed = capsys.readouterr()
    for secret in (PASSWORD, "Geheimwort-1", "12345678"):
        assert secret not in printed.out + printed.err
    # No two journals are the same one.
    assert len({regions(board, data) for data in images.values()}) == 3


def test_a_list_of_a_spreadsheet_with_semicolons_is_read_too(tmp_path):
    assert make(tmp_path, "pico_w", devices="client_id;wifi.ssid\nmast1;Netz, hinten\n") == 0
    [data] = made(tmp_path).values()
    assert json.loads(contents(mounted("pico_w", data))["config.json"])["wifi"]["ssid"] == "Netz, hinten"


def test_the_certificates_that_a_configuration_names_go_along_each_device_its_own(tmp_path):
    (tmp_path / "certs").mkdir()
    for name in ("ca", "mast1", "mast2"):
        (tmp_path / "certs" / name).write_bytes(name.encode())
    config = dict(CONFIG, broker={"host": "broker.lan", "tls": {"ca": "/certs/ca", "key": "/certs/ca"}})
    devices = "client_id,broker.tls.cert,broker.tls.key\nmast1,/certs/mast1,\nmast2,certs/mast2,certs/mast2\n"
    assert make(tmp_path, "pico_w", config, devices=devices) == 0
    for name, data in made(tmp_path).items():
        files = contents(mounted("pico_w", data))
        assert {path for path in files if path.startswith("certs/")} == {"certs/ca", "certs/" + name[:5]}
        assert files["certs/ca"] == b"ca" and files["certs/" + name[:5]] == name[:5].encode()


def test_only_their_owner_can_read_images(tmp_path):
    assert make(tmp_path, "pico_w") == 0
    assert (tmp_path / "out" / "mast7.uf2").stat().st_mode & 0o077 == 0


# -- what is refused

DAMAGED = bytearray(esp32_firmware())
DAMAGED[-100] ^= 1
BOOT_DAMAGED = bytearray(esp32_firmware())
BOOT_DAMAGED[500] ^= 1
NO_DIGEST_FLAG = bytearray(esp32_firmware())
NO_DIGEST_FLAG[0xF000 + 23] = 7
HUGE = dict(CONFIG, journal={"size_kib": 2048, "home": "pinned"})
TLS = dict(CONFIG, broker={"host": "broker.lan", "tls": {"ca": "/ca.pem"}})
REFUSED = {
    "no .uf2": ("pico_w", {"firmware": b"MZ" * 1024}, ["no .uf2"]),
    "empty": ("pico_w", {"firmware": b""}, ["no .uf2"]),
    ".uf2 cut short": ("pico_w", {"firmware": pico_firmware()[:-512]}, ["damaged .uf2"]),
    ".uf2 cut in a block": ("pico_w", {"firmware": pico_firmware()[:-100]}, ["a part of one"]),
    "another chip": ("pico_w", {"firmware": pico_firmware(family=0xE48BFF59)}, ["another chip", "RP2040"]),
    "a Pico without W": ("pico_w", {"firmware": pico_firmware(machine=b"Raspberry Pi Pico")}, ["not for the Pico W"]),
    "no file system": ("pico_w", {"firmware": pico_firmware(None)}, ["does not declare"]),
    "file system in the firmware": ("pico_w", {"firmware": pico_firmware((XIP + 0x3000, 65536))}, ["does not declare"]),
    "no .bin": ("esp32", {"firmware": pico_firmware()}, ["no bootloader"]),
    "no firmware": ("esp32", {"firmware": b""}, ["no bootloader"]),
    "only the program": ("esp32", {"firmware": esp32_firmware()[0xF000:]}, ["no partition table"]),
    "cut in the bootloader": ("esp32", {"firmware": esp32_firmware()[:0x4000]}, ["no partition table"]),
    "program cut short": ("esp32", {"firmware": esp32_firmware()[:-5000]}, ["program", "damaged"]),
    "program damaged": ("esp32", {"firmware": bytes(DAMAGED)}, ["program", "damaged"]),
    "program's header damaged": ("esp32", {"firmware": bytes(NO_DIGEST_FLAG)}, ["program", "damaged"]),
    "bootloader damaged": ("esp32", {"firmware": bytes(BOOT_DAMAGED)}, ["bootloader", "damaged"]),
    "gap": ("esp32", {"config": dict(CONFIG, journal={"home": "gap"})}, ["gap", "Pico"]),
    "partition": ("pico_w", {"config": dict(CONFIG, journal={"home": "partition:mqj"})}, ["partition:mqj", "ESP32"]),
    "gap in a list": ("esp32", {"devices": "client_id,journal.home\na,\nb,gap\n"}, ["line 3", "gap"]),
    "no such partition": ("esp32", {"config": dict(CONFIG, journal={"home": "partition:x"})}, ["no x"]),
    "partition of another": ("esp32", {"config": dict(CONFIG, journal={"home": "partition:vfs"})}, ["vfs", "none for"]),
    "journal too large": ("pico_w", {"config": HUGE}, ["size_kib"]),
    "flash too small": ("esp32", {"firmware": esp32_firmware(flash_mib=2)}, ["does not fit", "partitions-esp32.csv"]),
    "no JSON": ("esp32", {"config": '{"wifi":\n{,}}'}, ["line 2", "not JSON"]),
    "no object": ("esp32", {"config": "[]"}, ["no object"]),
    "no object for a list": ("esp32", {"config": "[]", "devices": "client_id\na\n"}, ["no object"]),
    "wrong value": ("esp32", {"config": dict(CONFIG, broker={"host": "b", "port": 0})}, ["broker.port: found 0"]),
    "certificate missing": ("esp32", {"config": TLS}, ["broker.tls.ca", "/ca.pem"]),
    "no column": ("pico_w", {"devices": "name\nx\n"}, ["no column client_id"]),
    "empty list": ("pico_w", {"devices": ""}, ["no column client_id"]),
    "no device": ("pico_w", {"devices": "client_id\n\n"}, ["no device"]),
    "column twice": ("pico_w", {"devices": "client_id,client_id\na,b\n"}, ["twice"]),
    "cell missing": ("pico_w", {"devices": "client_id,wifi.ssid\na,b\nc\n"}, ["line 3", "found 1 cells"]),
    "no client id": ("pico_w", {"devices": "client_id,wifi.ssid\n,b\n"}, ["line 2", "client_id"]),
    "auto": ("pico_w", {"devices": "client_id\nauto\n"}, ["line 2", "client_id"]),
    "same client id": ("pico_w", {"devices": "client_id\na\nb\na\n"}, ["line 4", '"a"', "line 2"]),
    "unknown key": ("pico_w", {"devices": "client_id,wifi.pasword\na,%s\n" % PASSWORD}, ["unknown key"]),
    "section as a text": ("pico_w", {"devices": "client_id,telemetry\na,off\n"}, ["line 2", "telemetry"]),
    "wrong cell": ("pico_w", {"devices": "client_id,broker.port\na,1883\nb,many\n"}, ["line 3", "broker.port"]),
    "short password": ("pico_w", {"devices": "client_id,wifi.password\na,4711-xy\n"}, ["7 characters"]),
    "no UTF-8": ("pico_w", {"devices": "client_id\nKüche\n".encode("latin-1")}, ["UTF-8"]),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_makes_no_image_is_one_line_and_nothing_is_written(tmp_path, name, capsys):
    board, options, words = REFUSED[name]
    assert make(tmp_path, board, **options) == 1
    printed = capsys.readouterr()
    [line] = printed.err.splitlines()
    assert line.startswith("image: ") and not printed.out
    assert all(word in line for word in words), line
    assert PASSWORD not in line and "4711" not in line
    assert not (tmp_path / "out").exists() or not made(tmp_path)


def test_all_that_is_wrong_in_a_list_is_told_at_once(tmp_path, capsys):
    devices = "client_id,broker.port,wifi.ssid\na,0,n\nb,1883,n\nc,1883,%s\n" % ("n" * 33)
    assert make(tmp_path, "pico_w", devices=devices) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and "line 2: broker.port" in lines[0] and "line 4: wifi.ssid" in lines[1]


def test_a_program_that_its_partition_cannot_hold_is_refused(tmp_path):
    table = tmp_path / "table.csv"
    table.write_text(tool.TABLE.read_text().replace("0x1F0000", "0x10000").replace("0x200000", "0x20000"))
    board = tool.Esp32(esp32_firmware(program=0xF000), table)
    assert board.image({}, tool.configuration.complete(dict(CONFIG, journal={"home": "ram"})))
    error = raises(tool.Unusable, tool.Esp32, esp32_firmware(program=0x10000), table)
    assert "factory" in str(error) and "table.csv" in str(error)


def test_a_missing_firmware_is_one_line(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    files = ["--config", str(tmp_path / "config.json"), "--out", str(tmp_path / "out")]
    assert tool.main(["esp32", "--firmware", str(tmp_path / "nowhere.bin"), *files]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line == "image: %s: No such file or directory" % (tmp_path / "nowhere.bin")
