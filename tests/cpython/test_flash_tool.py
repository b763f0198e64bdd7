"""tools/flash.py: esptool itself against a chip on a pseudo-terminal; a Pico's drive that is a directory."""

import hashlib
import http.server
import struct
import sys
import threading
from functools import partial
from pathlib import Path

import flash
import uf2
from board import NoBoard
from fakechip import FakeChip
from ptyboard import PtyBoard
from raises import raises

INFO = "UF2 Bootloader v3.0\r\nModel: Raspberry Pi RP2\r\nBoard-ID: RPI-RP2\r\n"


def esp_image(payload, chip=0):
    """A program as the ESP32's bootloader takes it, with checksum and digest."""
    payload += bytes(-len(payload) % 4)
    data = struct.pack("<BBBBI", 0xE9, 1, 2, 0x20, 0x40080000) + struct.pack(
        "<BBBBHBHHBBBBB", 0xEE, 0, 0, 0, chip, *[0] * 7, 1
    )
    data += struct.pack("<II", 0x3F400020, len(payload)) + payload
    data += bytes(15 - len(data) % 16)
    checksum = 0xEF
    for byte in payload:
        checksum ^= byte
    data += bytes((checksum,))
    return data + hashlib.sha256(data).digest()


def table(*rows):
    data = b"".join(struct.pack("<HBBII16sI", 0x50AA, k, s, at, size, n.encode(), 0) for n, k, s, at, size in rows)
    return data.ljust(0xC00, b"\xff")


STOCK = ("nvs", 1, 2, 0x9000, 0x6000), ("factory", 0, 0, 0x10000, 0x1F0000), ("vfs", 1, 0x81, 0x200000, 0x200000)
NAMELESS = STOCK[:2]  # since 1.26: the file system is behind the last partition
OURS = STOCK[:2] + (("mqj", 1, 0x40, 0x200000, 0x10000), ("vfs", 1, 0x81, 0x210000, 0x1F0000))


def firmware(rows=STOCK, program=b"MicroPython v1.28.0 on 2026-04-06", chip=0):
    """From 0x1000 on, as micropython.org's."""
    data = esp_image(b"bootloader", chip).ljust(0x7000, b"\xff") + table(*rows)
    return data.ljust(0xF000, b"\xff") + esp_image(program * 100, chip)


def pico_image(last=0x10001000, name=b"Pico W"):
    pages = {0x10000000: b"MicroPython v1.28.0 on 2026-04-06 " + name, last: b"end"}
    out = b""
    for n, at in enumerate(sorted(pages)):
        head = struct.pack("<8I", 0x0A324655, 0x9E5D5157, 0x2000, at, 256, n, len(pages), uf2.RP2040)
        out += (head + pages[at]).ljust(508, b"\0") + struct.pack("<I", 0x0AB16F30)
    return out


def stored(tmp_path, data, name="firmware"):
    path = tmp_path / name
    path.write_bytes(data)
    return path


# -- ESP32


def test_a_blank_esp32_is_erased_and_flashed(tmp_path, capsys):
    data = firmware()
    with FakeChip() as chip:
        flash.flash("esp32", chip.port, stored(tmp_path, data))
        assert chip.flash[0x1000 : 0x1000 + len(data)] == data and chip.erased == 1
    said = capsys.readouterr().out
    assert said.index("because there is no MicroPython on it") < said.index("Erasing flash")
    assert "MicroPython v1.28.0 on 2026-04-06" in said and "next: make deploy PORT=" in said


def test_a_new_firmware_leaves_table_files_and_journal_as_they_are(tmp_path, capsys):
    new = firmware(program=b"MicroPython v1.29.0 on 2026-08-29")
    littlefs = b"\1\0\0\0\xf0\x0f\xff\xf7littlefs".ljust(8192, b"f")
    for rows, files in (
        (STOCK, b"journal"),
        (OURS, b"journal"),
        (NAMELESS, littlefs),
        (NAMELESS, littlefs.replace(b"littlefs", b"x" * 8)[:4096] + littlefs),  # one of the two blocks is enough
        (NAMELESS, b"\xeb\xfe\x90MSDOS5.0".ljust(510, b"\0") + b"\x55\xaa"),
    ):
        with FakeChip() as chip:
            old = firmware(rows)
            chip.flash[0x1000 : 0x1000 + len(old)] = old
            chip.flash[0x9000:0x9003] = b"nvs"
            chip.flash[0x200000 : 0x200000 + len(files)] = files
            before = bytes(chip.flash)
            flash.flash("esp32", chip.port, stored(tmp_path, new))
            assert chip.erased == 0
            assert chip.flash[0x10000 : 0x10000 + len(new) - 0xF000] == new[0xF000:]
            assert chip.flash[0x8000:0x10000] == before[0x8000:0x10000]
            assert chip.flash[0x200000:] == before[0x200000:]
        assert "only the firmware is replaced" in capsys.readouterr().out


def test_a_program_that_is_no_micropython_is_erased_although_it_has_a_table(tmp_path):
    whole = NAMELESS[:1] + (("app", 0, 0, 0x10000, 0x3F0000),)  # to the last byte: nothing can be behind it
    for rows in (NAMELESS, whole):
        with FakeChip() as chip:
            chip.flash[0x8000:0x8C00] = table(*rows)
            chip.flash[0x200000:0x200004] = b"data"
            flash.flash("esp32", chip.port, stored(tmp_path, firmware()))
            assert chip.erased == 1


def test_what_would_take_files_or_a_journal_away_needs_a_word(tmp_path, capsys):
    small = (("factory", 0, 0, 0x10000, 0x800), ("vfs", 1, 0x81, 0x11000, 0x100000))
    ota = (("ota_0", 0, 16, 0x10000, 0x100000), ("ota_1", 0, 17, 0x110000, 0x100000), STOCK[2])
    large = (("factory", 0, 0, 0x10000, 0x1F0000), ("vfs", 1, 0x81, 0x200000, 0x600000))
    whole = firmware(OURS).ljust(0x200000, b"\xff") + b"journal and files"
    for there, data, why in (
        (small, firmware(), "too little room"),
        (large, firmware(), "reach beyond the 4 MiB"),
        (ota, firmware(), "2 partitions for programs"),
        (STOCK, whole, "for a whole device, and would replace vfs"),
    ):
        with FakeChip() as chip:
            chip.flash[0x8000:0x8C00] = table(*there)
            before = bytes(chip.flash)
            error = raises(flash.Unfit, flash.flash, "esp32", chip.port, stored(tmp_path, data))
            assert why in str(error) and "ERASE=1" in str(error), str(error)
            assert chip.flash == before
            flash.flash("esp32", chip.port, stored(tmp_path, data), True)
            assert chip.erased == 1 and chip.flash[0x1000 : 0x1000 + len(data)] == data
        assert "as ERASE=1 says: files, config.json and the journal, too" in capsys.readouterr().out


def test_a_whole_image_from_address_0_goes_onto_a_blank_board(tmp_path):
    data = b"\xff" * 0x1000 + firmware(OURS)
    with FakeChip() as chip:
        flash.flash("esp32", chip.port, stored(tmp_path, data))
        assert chip.flash[: len(data)] == data


def test_a_firmware_for_another_chip_is_refused_by_the_board(tmp_path):
    data = b"".join(
        (esp_image(b"b", 9).ljust(0x8000, b"\xff"), table(*STOCK).ljust(0x8000, b"\xff"), esp_image(b"a" * 99, 9))
    )
    with FakeChip() as chip:
        error = raises(flash.Unfit, flash.flash, "esp32", chip.port, stored(tmp_path, data))
        assert str(error) == "the board has an ESP32, the firmware is for an ESP32-S3"
        assert chip.flash.count(0xFF) == len(chip.flash)


def test_a_damaged_firmware_is_refused_before_any_board_is_looked_for(tmp_path):
    good = firmware()
    bent = bytearray(good)
    bent[0xF100] ^= 1
    for board, data, why in (
        ("esp32", b"", "no .bin for an ESP32"),
        ("esp32", good[:0x6000], "no partition table"),
        ("esp32", good[:-100], "damaged"),
        ("esp32", bytes(bent), "damaged"),
        ("esp32", firmware(chip=0x77), "does not know"),
        ("esp32", pico_image(), "no .bin for an ESP32"),
        ("pico_w", b"", "no .uf2"),
        ("pico_w", pico_image()[:-1], "no .uf2"),
        ("pico_w", pico_image()[:512], "says it is 0 of 2"),
        ("pico_w", pico_image()[512:], "says it is 1 of 2"),
        ("pico_w", pico_image().replace(struct.pack("<I", uf2.RP2040), b"xxxx"), "another chip"),
        ("pico_w", pico_image(name=b"Pico"), "not for the Pico W"),
        ("pico_w", good, "no .uf2"),
    ):
        error = raises(flash.Unfit, flash.flash, board, "/dev/none-such", stored(tmp_path, data))
        assert why in str(error) and "\n" not in str(error), str(error)


# -- Pico W


class Drive:
    """A directory that is a Pico's drive, until a whole .uf2 has come, which it keeps in .got."""

    def __init__(self, path):
        self.path = path
        self.got = None
        self._stop = threading.Event()
        path.mkdir()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()

    def appear(self):
        (self.path / "INFO_UF2.TXT").write_text(INFO)

    def _watch(self):
        while not self._stop.wait(0.01):
            for path in self.path.glob("*.uf2"):
                data = path.read_bytes()
                try:
                    uf2.pages_of(data)
                except ValueError:
                    continue
                self.got = data
                path.unlink()
                (self.path / "INFO_UF2.TXT").unlink()


def test_a_pico_in_its_bootloader_gets_the_firmware_by_its_drive(tmp_path, capsys):
    data = pico_image()
    with Drive(tmp_path / "drive") as drive:
        drive.appear()
        flash.flash("pico_w", None, stored(tmp_path, data), False, drive.path)
    assert drive.got == data
    assert "files, config.json and a journal in files stay" in capsys.readouterr().out


def test_a_pico_that_runs_micropython_is_asked_to_go_to_its_bootloader(tmp_path, capsys):
    data = pico_image()
    (tmp_path / "fs").mkdir()
    (tmp_path / "fs" / "main.py").write_text("import time\nwhile True:\n    time.sleep(1)\n")
    more = "import machine\ndef _go():\n    open(%r, 'w').write(%r)\n    print('gone')\nmachine.bootloader = _go"
    more %= (str(tmp_path / "drive" / "INFO_UF2.TXT"), INFO)
    with Drive(tmp_path / "drive") as drive, PtyBoard(tmp_path / "fs", more=more) as board:
        flash.flash("pico_w", board.port, stored(tmp_path, data), False, drive.path)
    assert drive.got == data
    assert "MicroPython goes to its bootloader" in capsys.readouterr().out


def test_an_uf2_of_a_whole_device_needs_a_word(tmp_path):
    data = pico_image(last=flash.FILES_AT + 4096)
    with Drive(tmp_path / "drive") as drive:
        drive.appear()
        path = stored(tmp_path, data)
        assert "ERASE=1" in str(raises(flash.Unfit, flash.flash, "pico_w", None, path, False, drive.path))
        assert drive.got is None
        flash.flash("pico_w", None, path, True, drive.path)
        assert drive.got == data
    error = raises(flash.Unfit, flash.flash, "pico_w", None, stored(tmp_path, pico_image()), True, drive.path)
    assert "leave ERASE=1 out" in str(error)


def test_without_a_drive_it_says_what_to_hold(tmp_path):
    (tmp_path / "drive").mkdir()
    error = raises(NoBoard, flash.wait_for_drive, tmp_path / "drive", 0)
    assert "hold BOOTSEL while plugging the Pico W in" in str(error)


def test_a_drive_that_does_not_go_away_has_not_taken_it(tmp_path):
    drive = tmp_path / "drive"
    drive.mkdir()
    (drive / "INFO_UF2.TXT").write_text(INFO)
    assert "did not take the firmware" in str(raises(NoBoard, flash.copy_uf2, pico_image(), drive, 0))


def test_a_directory_that_is_no_boot_drive_is_never_written_to(tmp_path):
    (tmp_path / "drive").mkdir()
    (tmp_path / "drive" / "INFO_UF2.TXT").write_text("Board-ID: SAMD21\n")
    assert flash.find_drive(tmp_path / "drive") is None


# -- the download


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def test_the_official_firmware_is_downloaded_once_and_only_kept_when_it_is_right(tmp_path, capsys, monkeypatch):
    site = tmp_path / "site"
    site.mkdir()
    good = pico_image()
    (site / "good.uf2").write_bytes(good)
    (site / "bad.uf2").write_bytes(good[:512])
    (site / "esp.bin").write_bytes(firmware())
    (site / "page.bin").write_bytes(b"<html>come back later</html>")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=site))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        monkeypatch.setattr(flash, "SOURCE", "http://127.0.0.1:%d/" % server.server_port)
        monkeypatch.setattr(flash, "CACHE", tmp_path / "cache")
        known = len(good), hashlib.sha256(good).hexdigest()
        for board, name, size, sha256 in (("pico_w", "good.uf2", *known), ("esp32", "esp.bin", None, None)):
            monkeypatch.setitem(flash.OFFICIAL, board, (name, size, sha256))
            path = flash.official(board)
            assert path.read_bytes() == (site / name).read_bytes()
        (site / "esp.bin").unlink()
        assert flash.official("esp32") == path
        for board, name, size, sha256, why in (
            ("pico_w", "bad.uf2", *known, "not the file that is known"),
            ("esp32", "page.bin", None, None, "no .bin for an ESP32"),
            ("esp32", "none.bin", None, None, "cannot be downloaded (HTTP Error 404"),
        ):
            monkeypatch.setitem(flash.OFFICIAL, board, (name, size, sha256))
            assert why in str(raises(flash.Unfit, flash.official, board))
        assert sorted(p.name for p in (tmp_path / "cache").iterdir()) == ["esp.bin", "good.uf2"]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_each_mistake_on_the_command_line_is_one_line(tmp_path):
    import subprocess

    tool = str(Path(flash.__file__))
    for arguments, why in (
        ((), "flash: say which board it is, BOARD=esp32 or BOARD=pico_w"),
        (("--board", "esp8266"), "BOARD=pico_w, found esp8266"),
        (("--board", "pico_w", "--firmware", tmp_path / "none"), "none: No such file"),
        (
            ("--board", "esp32", "--firmware", stored(tmp_path, firmware()), "--port", "/dev/none-such"),
            "/dev/none-such",
        ),
    ):
        done = subprocess.run([sys.executable, tool, *map(str, arguments)], stderr=subprocess.PIPE, text=True)
        assert done.returncode == 1 and why in done.stderr and done.stderr.count("\n") == 1, done.stderr
