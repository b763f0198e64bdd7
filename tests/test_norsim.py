"""The NOR simulator: what flash does, what a power cut leaves, and that both interpreters cut alike."""

import os
import sys
from binascii import crc32

from norsim import MODES_ERASE, MODES_PROGRAM, Encrypted, Nor, PowerCut, Rng, read_counters
from raises import raises

_SIZE = 16384
_PATH = "test_norsim.%s.tmp" % sys.implementation.name  # both interpreters may run at once


def _read(nor, n, length, off=0):
    buf = bytearray(length)
    nor.readblocks(n, buf, off)
    return bytes(buf)


def _cut(nor, function, *args, **plan):
    nor.cut_after(1, **plan)
    raises(PowerCut, function, *args)
    nor.power_on()


def _is_between(got, old, new):
    """Every bit of got is that of old or that of new."""
    return len(got) == len(old) and all((g ^ old[i]) & (g ^ new[i]) == 0 for i, g in enumerate(got))


def test_a_new_device_is_erased():
    nor = Nor(_SIZE)
    assert nor.ioctl(4, 0) == 4 and nor.ioctl(5, 0) == 4096
    assert bytes(nor.mem) == b"\xff" * _SIZE


def test_program_only_clears_bits():
    nor = Nor(_SIZE)
    nor.writeblocks(1, b"\xf0\x0f\xaa\xff", 8)
    assert _read(nor, 1, 4, 8) == b"\xf0\x0f\xaa\xff"
    assert nor.overprograms == 0
    nor.writeblocks(1, b"\x33\x33\x33\x33", 8)
    assert _read(nor, 1, 4, 8) == b"\x30\x03\x22\x33"
    assert nor.overprograms == 1


def test_scrubbing_with_zeros_is_no_overprogram():
    nor = Nor(_SIZE)
    nor.writeblocks(0, b"abcd", 0)
    nor.writeblocks(0, bytes(4), 0)
    assert nor.overprograms == 0 and _read(nor, 0, 4) == bytes(4)


def test_erase_sets_one_whole_sector():
    nor = Nor(_SIZE)
    nor.writeblocks(0, bytes(_SIZE), 0)
    assert nor.ioctl(6, 2) == 0
    assert bytes(nor.mem) == bytes(8192) + b"\xff" * 4096 + bytes(4096)
    assert list(nor.erases) == [0, 0, 1, 0]


def test_write_without_offset_erases_the_sectors_it_touches():
    nor = Nor(_SIZE)
    nor.writeblocks(0, bytes(_SIZE), 0)
    nor.writeblocks(1, b"\x55" * 4100)
    assert _read(nor, 1, 4100) == b"\x55" * 4100
    assert _read(nor, 2, 4092, 4) == b"\xff" * 4092
    assert list(nor.erases) == [0, 1, 1, 0] and nor.ops == 4
    nor.writeblocks(3, b"\x11" * 4)
    assert _read(nor, 3, 4096) == b"\x11" * 4 + b"\xff" * 4092


def test_offset_may_exceed_a_sector_and_cross_its_end():
    nor = Nor(_SIZE, prog_size=256)
    nor.writeblocks(0, b"\x5a" * 512, 4096 + 3840)
    assert _read(nor, 1, 512, 3840) == b"\x5a" * 512
    assert _read(nor, 2, 3, 254) == b"\x5a\x5a\xff"


def test_misaligned_and_out_of_range_access_is_refused_and_changes_nothing():
    for prog_size in (4, 16, 256):
        nor = Nor(_SIZE, prog_size)
        n = prog_size
        cases = (
            (nor.writeblocks, 0, bytes(n), 2),
            (nor.writeblocks, 0, bytes(n - 1), 0),
            (nor.writeblocks, 3, bytes(2 * n), 4096 - n),
            (nor.writeblocks, -1, bytes(n), 0),
            (nor.writeblocks, 4, bytes(n)),
            (nor.writeblocks, 3, bytes(4096 + n)),
            (nor.writeblocks, 0, bytes(n + 1)),
            (nor.readblocks, 4, bytearray(1)),
            (nor.readblocks, 0, bytearray(2), _SIZE - 1),
            (nor.readblocks, 0, bytearray(1), -1),
            (nor.ioctl, 6, 4),
            (nor.ioctl, 6, -1),
        )
        for case in cases:
            assert raises(OSError, *case).errno == 22
        assert bytes(nor.mem) == b"\xff" * _SIZE
        assert nor.ops == 0 and nor.reads == 0 and list(nor.erases) == [0, 0, 0, 0]


def test_counters_count_calls_bytes_and_pages():
    nor = Nor(_SIZE)
    nor.writeblocks(0, bytes(4), 252)
    nor.writeblocks(0, bytes(8), 252)
    nor.writeblocks(0, bytes(512), 256)
    nor.writeblocks(0, bytes(0), 0)
    _read(nor, 0, 100)
    assert nor.stats() == {
        "reads": 1,
        "programs": 3,
        "page_programs": 5,
        "programmed_bytes": 524,
        "overprograms": 0,
        "ops": 3,
        "erases": [0, 0, 0, 0],
    }


def test_after_a_cut_nothing_answers_until_power_is_back():
    nor = Nor(_SIZE)
    nor.cut_after(2, program="none")
    nor.writeblocks(0, b"abcd", 0)
    raises(PowerCut, nor.writeblocks, 0, b"efgh", 4)
    raises(PowerCut, nor.readblocks, 0, bytearray(4))
    raises(PowerCut, nor.writeblocks, 0, b"efgh", 4)
    raises(PowerCut, nor.ioctl, 6, 0)
    nor.power_on()
    assert _read(nor, 0, 8) == b"abcd\xff\xff\xff\xff"
    nor.writeblocks(0, b"efgh", 4)
    assert _read(nor, 0, 8) == b"abcdefgh"


def test_a_cut_not_reached_is_forgotten_at_power_on():
    nor = Nor(_SIZE)
    nor.cut_after(1)
    nor.power_on()
    nor.writeblocks(0, b"abcd", 0)
    assert _read(nor, 0, 4) == b"abcd"


def test_torn_prefix_program():
    lengths = set()
    for seed in range(40):
        nor = Nor(_SIZE)
        _cut(nor, nor.writeblocks, 0, bytes(64), 0, program="prefix", seed=seed)
        got = _read(nor, 0, 64)
        k = got.count(b"\0")
        assert got == bytes(k) + b"\xff" * (64 - k)
        assert _read(nor, 0, 64, 64) == b"\xff" * 64
        lengths.add(k)
    assert len(lengths) > 20


def test_torn_programs_leave_each_bit_old_or_new():
    old, new, both = b"\xf5" * 64, b"\x3a" * 64, b"\x30" * 64
    for mode in MODES_PROGRAM:
        seen = set()
        for seed in range(20):
            nor = Nor(_SIZE)
            nor.writeblocks(0, old, 0)
            _cut(nor, nor.writeblocks, 0, new, 0, program=mode, seed=seed)
            got = _read(nor, 0, 64)
            assert _is_between(got, old, both)
            seen.add(got)
        if mode == "none":
            assert seen == {old}
        elif mode == "all":
            assert seen == {both}
        else:
            assert len(seen) > 10
        if mode == "bytes":
            assert all(b in (0xF5, 0x30) for got in seen for b in got)


def test_half_done_erases():
    for mode in MODES_ERASE:
        seen = set()
        for seed in range(12):
            nor = Nor(_SIZE)
            nor.writeblocks(0, b"\x5a" * _SIZE, 0)
            _cut(nor, nor.ioctl, 6, 1, erase=mode, seed=seed)
            got = _read(nor, 1, 4096)
            seen.add(got)
            assert _read(nor, 0, 4096) == _read(nor, 2, 4096) == b"\x5a" * 4096
            if mode == "mixed":
                assert set(got) <= {0x5A, 0xFF}
            elif mode == "bits":
                assert 4096 - got.count(b"\xff") <= 64 and all(b & 0x5A == 0x5A for b in got)
        if mode in ("none", "all", "zeros"):
            assert seen == {{"none": b"\x5a", "all": b"\xff", "zeros": b"\x00"}[mode] * 4096}
        else:
            assert len(seen) > 6
        assert list(nor.erases) == [0, 1, 0, 0]


def test_modes_go_by_name_or_index_and_a_wrong_one_is_refused():
    nor = Nor(_SIZE)
    nor.cut_after(1, program=MODES_PROGRAM.index("all"), erase=0)
    raises(PowerCut, nor.writeblocks, 0, b"abcd", 0)
    nor.power_on()
    assert _read(nor, 0, 4) == b"abcd"
    raises(ValueError, nor.cut_after, 1, "half")
    raises(ValueError, nor.cut_after, 1, "all", len(MODES_ERASE))
    raises(ValueError, nor.kill_after, 1)


def test_weak_cells_read_differently_and_only_where_bits_were_being_cleared():
    nor = Nor(_SIZE)
    nor.writeblocks(0, b"\xff\x00" * 32, 0)
    _cut(nor, nor.writeblocks, 0, b"\x0f\x00" * 32, 0, program="none", weak=True, seed=3)
    assert 0 < nor.weak_cells <= 32
    reads = {_read(nor, 0, 64) for _ in range(20)}
    assert len(reads) > 1
    for got in reads:
        assert all(got[i] | 0xF0 == 0xFF for i in range(0, 64, 2))
        assert all(got[i] == 0 for i in range(1, 64, 2))
    assert _read(nor, 0, 64, 64) == b"\xff" * 64


def test_weak_cells_settle_when_programmed():
    nor = Nor(_SIZE)
    _cut(nor, nor.writeblocks, 0, bytes(64), 0, program="bits", weak=True, seed=5)
    weak = nor.weak_cells
    nor.writeblocks(0, b"\xff" * 64, 0)  # asks for no bit: all stay weak
    assert nor.weak_cells == weak
    nor.writeblocks(0, bytes(32), 0)
    assert 0 < nor.weak_cells < weak
    assert {_read(nor, 0, 32) for _ in range(10)} == {bytes(32)}
    nor.writeblocks(0, bytes(32), 32)
    assert nor.weak_cells == 0
    assert {_read(nor, 0, 64) for _ in range(10)} == {bytes(64)}


def test_weak_cells_of_a_half_erased_sector_settle_when_it_is_erased():
    nor = Nor(_SIZE)
    nor.writeblocks(0, bytes(_SIZE), 0)
    _cut(nor, nor.ioctl, 6, 2, erase="all", weak=True, seed=1)
    assert 0 < nor.weak_cells <= 300
    assert len({_read(nor, 2, 4096) for _ in range(5)}) > 1
    assert _read(nor, 1, 4096) == _read(nor, 3, 4096) == bytes(4096)
    _cut(nor, nor.ioctl, 6, 2, erase="mixed", seed=1)
    assert nor.weak_cells > 0
    nor.ioctl(6, 2)
    assert nor.weak_cells == 0
    assert _read(nor, 2, 4096) == b"\xff" * 4096


def test_damage_page_ruins_one_page_and_spares_the_others():
    pages = set()
    for seed in range(12):
        nor = Nor(_SIZE, prog_size=256)
        nor.writeblocks(0, b"\x0f" * 4096, 0)
        nor.ioctl(6, 1)
        _cut(nor, nor.writeblocks, 1, bytes(768), 0, damage_page=True, seed=seed)
        assert _read(nor, 0, 4096) == b"\x0f" * 4096
        got = [_read(nor, 1, 256, at) for at in (0, 256, 512, 768)]
        ruined = [i for i, page in enumerate(got) if page not in (bytes(256), b"\xff" * 256)]
        assert len(ruined) == 1 and ruined[0] < 3
        assert got[: ruined[0]] == [bytes(256)] * ruined[0]
        assert got[ruined[0] + 1 :] == [b"\xff" * 256] * (3 - ruined[0])
        pages.add(ruined[0])
    assert len(pages) == 3


def test_the_random_numbers_are_the_same_everywhere():
    rng = Rng(7)
    assert [rng.next() for _ in range(3)] == [1427436313, 2776720098, 2993792908]
    assert Rng(7).bytes(6) == Rng(7).bytes(8)[:6]
    assert Rng(-1).next() != Rng(0).next() != Rng(1).next()


def test_a_cut_is_the_same_everywhere():
    crc = 0
    for weak in (False, True):
        for program in MODES_PROGRAM:
            for erase in MODES_ERASE:
                nor = Nor(8192, seed=11)
                nor.writeblocks(0, b"\x5a" * 200, 100)
                _cut(nor, nor.writeblocks, 0, b"\x21" * 100, 200, program=program, weak=weak)
                _cut(nor, nor.ioctl, 6, 0, erase=erase, weak=weak, seed=12)
                crc = crc32(nor.mem, crc)
                crc = crc32(_read(nor, 0, 4096), crc)
                crc = crc32(_read(nor, 0, 16, 64), crc)
    assert crc & 0xFFFFFFFF == 0xDD2B16D5, hex(crc)


def _remove():
    for name in (_PATH, _PATH + ".new"):
        try:
            os.remove(name)
        except OSError:
            pass


def test_a_file_keeps_cells_and_counters():
    _remove()
    try:
        nor = Nor(_SIZE, path=_PATH)
        nor.writeblocks(1, b"abcd" * 20, 8)
        nor.ioctl(6, 3)
        # Not closed: that is how a killed process leaves it.
        outside = read_counters(_PATH)
        assert outside["programmed_bytes"] == 80 and outside["erases"] == [0, 0, 0, 1]
        assert outside["size"] == _SIZE and outside["prog_size"] == 4
        again = Nor(_SIZE, path=_PATH)
        assert bytes(again.mem) == bytes(nor.mem)
        assert again.stats() == nor.stats()
        again.writeblocks(1, bytes(4), 8)
        again.close()
        nor.close()
        third = Nor(_SIZE, path=_PATH)
        assert _read(third, 1, 8, 8) == bytes(4) + b"abcd"
        third.close()
    finally:
        _remove()


def test_a_cut_is_in_the_file_too():
    _remove()
    try:
        nor = Nor(_SIZE, path=_PATH)
        _cut(nor, nor.writeblocks, 0, bytes(64), 0, program="bytes", seed=4)
        _cut(nor, nor.ioctl, 6, 1, erase="random", seed=4)
        again = Nor(_SIZE, path=_PATH)
        assert bytes(again.mem) == bytes(nor.mem) != b"\xff" * _SIZE
        assert again.ops == 2 and list(again.erases) == [0, 1, 0, 0]
        nor.close()
        again.close()
    finally:
        _remove()


def test_a_file_of_another_geometry_is_refused():
    _remove()
    try:
        Nor(_SIZE, path=_PATH).close()
        raises(ValueError, lambda: Nor(2 * _SIZE, path=_PATH))
        raises(ValueError, lambda: Nor(_SIZE, 256, path=_PATH))
        with open(_PATH, "wb") as f:
            f.write(b"\xff" * _SIZE)
        raises(ValueError, lambda: Nor(_SIZE, path=_PATH))
    finally:
        _remove()


def test_a_size_of_no_whole_sectors_is_refused():
    raises(ValueError, Nor, 5000)
    raises(ValueError, Nor, 0)
    raises(ValueError, Nor, _SIZE, 24)


def test_behind_the_encryption_one_torn_cell_garbles_sixteen_bytes():
    nor = Nor(_SIZE, 16)
    device = Encrypted(nor)
    erased = _read(device, 1, 4096)
    data = bytes(range(48))
    device.writeblocks(1, data, 32)
    assert _read(device, 1, 48, 32) == data and bytes(nor.mem[4096 + 32 : 4096 + 80]) != data
    at = 4096 + 48
    while not nor.mem[at]:
        at += 1
    nor.mem[at] &= nor.mem[at] - 1
    got = _read(device, 1, 48, 32)
    assert got[:16] == data[:16] and got[32:] == data[32:]
    assert len([i for i in range(16, 32) if got[i] != data[i]]) > 8
    assert _read(device, 1, 7, 45) == got[13:20]
    assert device.dump()[4096 : 4096 + 128] == erased[:32] + got + erased[80:128]
    device.ioctl(6, 1)
    assert _read(device, 1, 4096) == erased


def test_the_encryption_is_the_same_on_both_interpreters():
    nor = Nor(_SIZE, 16)
    device = Encrypted(nor)
    device.writeblocks(0, bytes(range(256)), 512)
    assert crc32(nor.mem) == 0x4FE31405 and crc32(device.dump()) == 0xC0395B2
