"""Where the journal lives: each home as a block device, and the choice between them."""

import os
import sys

import esp32
from ledger import Ledger, content
from mqtt_durable.errors import JournalUnavailable
from mqtt_durable.flash import homes, open_home, resolve
from norsim import Nor
from raises import raises

_SIZE = 16384
_PATH = "test_flash.%s.tmp" % sys.implementation.name  # both interpreters may run at once


def _remove(path=_PATH):
    for name in (path, path + ".new"):
        try:
            os.remove(name)
        except OSError:
            pass


def _read(device, n, length, off=0):
    buf = bytearray(length)
    device.readblocks(n, buf, off)
    return bytes(buf)


def _check_block_device(device, size, prog_size):
    """The protocol the journal relies on, for any home."""
    assert device.ioctl(4, 0) == size // 4096
    assert device.ioctl(5, 0) == 4096
    assert device.ioctl(6, 1) == 0
    assert _read(device, 1, 4096) == b"\xff" * 4096
    data = bytes(range(48))
    device.writeblocks(1, data, 2 * prog_size)
    assert _read(device, 1, 48, 2 * prog_size) == data
    assert _read(device, 1, 5, 2 * prog_size + 3) == data[3:8]
    assert _read(device, 1, 4, 2 * prog_size - 4) == b"\xff" * 4
    buf = bytearray(64)
    device.readblocks(1, memoryview(buf)[8:56], 2 * prog_size)
    assert buf == bytes(8) + data + bytes(8)
    device.writeblocks(1, memoryview(buf)[8:24], 2 * prog_size + 64)
    assert _read(device, 1, 16, 2 * prog_size + 64) == data[:16]
    device.writeblocks(0, b"\x00" * 32, 4096 - 16)
    assert _read(device, 1, 16) == bytes(16)
    device.writeblocks(2, b"\x11" * 4096)
    assert _read(device, 2, 4096) == b"\x11" * 4096
    device.ioctl(6, 2)
    assert _read(device, 2, 4096) == b"\xff" * 4096
    for bad in (
        (device.readblocks, size // 4096, bytearray(4)),
        (device.readblocks, 0, bytearray(8), size - 4),
        (device.readblocks, 0, bytearray(4), -4),
        (device.writeblocks, size // 4096, bytes(16), 0),
        (device.writeblocks, -1, bytes(16), 0),
        (device.ioctl, 6, size // 4096),
        (device.ioctl, 6, -1),
    ):
        raises(OSError, *bad)


def test_ram_is_a_block_device():
    device, prog_size, size = open_home("ram", _SIZE)
    assert (prog_size, size) == (4, _SIZE)
    _check_block_device(device, size, prog_size)


def test_a_file_is_a_block_device():
    _remove()
    try:
        device, prog_size, size = open_home("file:" + _PATH, _SIZE)
        assert (prog_size, size) == (4, _SIZE)
        assert _read(device, 0, _SIZE) == b"\xff" * _SIZE
        _check_block_device(device, size, prog_size)
        device.close()
    finally:
        _remove()


def test_a_program_is_in_the_file_when_it_returns():
    _remove()
    try:
        device, _, _ = open_home("file:" + _PATH, _SIZE)
        device.writeblocks(1, b"abcd", 4)
        with open(_PATH, "rb") as f:
            f.seek(4100)
            assert f.read(4) == b"abcd"
        device.close()
    finally:
        _remove()


def test_an_existing_file_keeps_its_data_and_its_size():
    _remove()
    try:
        device, _, _ = open_home("file:" + _PATH, _SIZE)
        device.writeblocks(2, b"kept", 0)
        device.close()
        device, _, size = open_home("file:" + _PATH, 8 * _SIZE)
        assert size == _SIZE and device.ioctl(4, 0) == 4
        assert _read(device, 2, 4) == b"kept"
        device.close()
    finally:
        _remove()


def test_a_file_of_no_journal_size_is_left_alone():
    try:
        for length in (0, 8192, _SIZE + 100):
            with open(_PATH, "wb") as f:
                f.write(b"x" * length)
            error = raises(JournalUnavailable, open_home, "file:" + _PATH, _SIZE)
            assert _PATH in str(error) and str(length) in str(error) and "\n" not in str(error)
            assert os.stat(_PATH)[6] == length
    finally:
        _remove()


def test_a_file_that_cannot_be_made_is_said():
    error = raises(JournalUnavailable, open_home, "file:no/such/directory/journal.bin", _SIZE)
    assert "no/such/directory/journal.bin" in str(error)


def test_a_file_half_made_by_a_cut_is_made_again():
    _remove()
    try:
        with open(_PATH + ".new", "wb") as f:
            f.write(b"\xff" * 5000)
        device, _, size = open_home("file:" + _PATH, _SIZE)
        assert size == _SIZE
        device.close()
    finally:
        _remove()


def test_a_partition_is_used_as_it_comes():
    esp32.clear()
    nor = Nor(2 * _SIZE)
    esp32.add_partition("other", Nor(_SIZE))
    esp32.add_partition("journal", nor)
    try:
        device, prog_size, size = open_home("partition:journal", 4096)
        assert isinstance(device, esp32.Partition)
        assert (prog_size, size) == (4, 2 * _SIZE)
        _check_block_device(device, size, prog_size)
        assert nor.programs > 0
    finally:
        esp32.clear()


def test_an_encrypted_partition_holds_a_journal():
    esp32.clear()
    nor = Nor(_SIZE, 16)
    esp32.add_partition("mqj", nor, encrypted=True)
    try:
        device, prog_size, size = open_home("auto", _SIZE)
        assert isinstance(device, esp32.Partition) and (prog_size, size) == (16, _SIZE)
        led = Ledger(device, prog_size)
        for number in range(200):
            led.add(number, 200)
            led.remove(number)
        led.add(200, 300)
        assert min(nor.erases) > 1 and nor.overprograms == 0 and bytes(content(200, 16)) not in bytes(nor.mem)
        for orderly in (False, True):
            device, prog_size, size = open_home("auto", _SIZE)
            led = Ledger(device, prog_size)
            assert led.check() == {200: 300} and not led.journal.fresh and led.journal.damaged == 0
            if not orderly:
                led.journal.close()
    finally:
        esp32.clear()


def test_an_encrypted_partition_is_programmed_in_whole_cipher_blocks_only():
    esp32.clear()
    nor = Nor(_SIZE)
    esp32.add_partition("mqj", nor, encrypted=True)
    try:
        device = open_home("auto", _SIZE)[0]
        erased = _read(device, 1, 4096)
        assert erased != b"\xff" * 4096 and erased == _read(device, 1, 4096) != _read(device, 2, 4096)
        for size, off in ((4, 0), (15, 16), (16, 4), (32, 8), (20, 32)):
            raises(OSError, device.writeblocks, 1, bytes(size), off)
        assert nor.ops == 0
        data = bytes(range(32))
        device.writeblocks(1, data, 48)
        assert _read(device, 1, 32, 48) == data and _read(device, 1, 5, 51) == data[3:8]
        assert _read(device, 1, 48) == erased[:48] and _read(device, 1, 99, 80) == erased[80:179]
        device.writeblocks(1, bytes(16), 48)
        assert _read(device, 1, 16, 48) not in (data[:16], bytes(16)) and _read(device, 1, 16, 64) == data[16:]
        device.writeblocks(1, data * 128)
        assert _read(device, 1, 4096) == data * 128
        assert device.ioctl(6, 1) == 0 and _read(device, 1, 4096) == erased
    finally:
        esp32.clear()


def test_a_partition_that_is_missing_or_too_small_is_said():
    esp32.clear()
    esp32.add_partition("app", Nor(_SIZE), type=esp32.Partition.TYPE_APP)
    esp32.add_partition("tiny", Nor(8192))
    try:
        for label, word in (("nope", "label"), ("app", "label"), ("tiny", "8192")):
            error = str(raises(JournalUnavailable, open_home, "partition:" + label, _SIZE))
            assert '"%s"' % label in error and word in error and "\n" not in error
    finally:
        esp32.clear()


def test_auto_takes_the_partition_mqj_before_a_file():
    esp32.clear()
    esp32.add_partition("mqj", Nor(2 * _SIZE))
    try:
        device, _, size = open_home("auto", _SIZE)
        assert isinstance(device, esp32.Partition) and size == 2 * _SIZE
    finally:
        esp32.clear()


def test_auto_on_a_host_is_a_file_in_the_current_directory():
    esp32.clear()
    here = os.getcwd()
    os.mkdir(_PATH)
    os.chdir(_PATH)
    try:
        device, prog_size, size = open_home("auto", _SIZE)
        assert (prog_size, size) == (4, _SIZE)
        device.close()
        assert os.stat("journal.bin")[6] == _SIZE
    finally:
        _remove("journal.bin")
        os.chdir(here)
        os.rmdir(_PATH)


def test_what_auto_stands_for_can_be_asked():
    esp32.clear()
    hosts = homes._HOSTS
    try:
        assert resolve("auto") == "file:journal.bin"
        homes._HOSTS = ()
        assert resolve("auto") == "pinned"
        esp32.add_partition("mqj", Nor(_SIZE))
        assert resolve("auto") == "partition:mqj"
        assert resolve("pinned:/x") == "pinned:/x" and resolve("gap") == "gap"
    finally:
        homes._HOSTS = hosts
        esp32.clear()


def test_bad_homes_and_sizes_are_refused():
    for home in ("", "flash", "partition", "partition:", "file:", "ram:", "auto:x", "Ram", "pinned:", "gap:1", ":"):
        assert "partition:LABEL" in str(raises(ValueError, open_home, home, _SIZE))
    for size in (0, 8192, _SIZE + 1, -4096):
        raises(ValueError, open_home, "ram", size)
        raises(ValueError, open_home, "file:" + _PATH, size)
