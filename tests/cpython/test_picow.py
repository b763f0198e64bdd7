"""tools/picow.py and tools/emulator.py: what can be known without firmware, and, where PICOW_FIRMWARE names one, a run.

PICOW_FIRMWARE=RPI_PICO_W.uf2 runs a short version of `make picow`, which takes two to six minutes.
"""

import asyncio
import json
import os
import sys
import types
from pathlib import Path

import emulator
import flash
import picow
import pytest
import uf2
from rich.console import Console
from rp2040py.peripherals import ssi
from skip import SkipTest

sys.path.insert(0, str(Path(__file__).parent))
from test_image import contents, mounted, pico_firmware  # noqa: E402

SAYS = b"; Raspberry Pi Pico W with RP2040\0 3.4.0; MicroPython v1.28.0 on 2026-04-06\0"


def firmware(says=SAYS, **declared):
    """A stand-in for MicroPython's, with the texts that tell what it is."""
    pages = uf2.pages_of(pico_firmware(**declared))
    at = emulator.FLASH_START_ADDRESS + 0x3000
    pages[at] = says.ljust(256, b"\xff")
    return uf2.encode(pages)


# -- the firmware


def test_firmware_is_looked_at_before_it_runs(tmp_path):
    path = tmp_path / "given.uf2"
    path.write_bytes(firmware())
    assert picow.find_firmware(path) == firmware()
    for data, says in (
        (b"", "no .uf2"),
        (firmware()[:-512], "damaged .uf2"),
        (pico_firmware(family=0xE48BFF59), "for another chip"),
        (firmware(storage=None), "does not declare where its file system is"),
        (firmware(SAYS.replace(b"Pico W", b"Pico"), machine=b"Raspberry Pi Pico\0"), "not for the Pico W"),
        (firmware(SAYS.replace(b"v1.28.0 on", b"8.0")), "no MicroPython in it"),
    ):
        path.write_bytes(data)
        with pytest.raises(picow.NoFirmware) as caught:
            picow.find_firmware(path)
        text = str(caught.value)
        assert says in text and str(path) in text and "\n" not in text


def test_firmware_is_the_official_one_where_none_is_given(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(flash, "CACHE", tmp_path)
    monkeypatch.setattr(flash, "SOURCE", "http://127.0.0.1:1/")  # nobody is there
    assert picow.main([]) == 2
    text = capsys.readouterr().err
    assert text.startswith("picow: http://127.0.0.1:1/RPI_PICO_W") and "FIRMWARE=file" in text and text.count("\n") == 1
    monkeypatch.setitem(flash.OFFICIAL, "pico_w", ("there.uf2", None, None))
    (tmp_path / "there.uf2").write_bytes(firmware())
    assert picow.find_firmware() == firmware()


def test_command_says_what_is_wrong_in_one_line(tmp_path, capsys):
    assert picow.main([str(tmp_path / "none.uf2")]) == 2
    assert capsys.readouterr().err == "picow: %s: No such file or directory\n" % (tmp_path / "none.uf2")
    for arguments in (["--messages", "1"], ["--cuts", "-1"], ["--messages", "x"]):
        with pytest.raises(SystemExit) as caught:
            picow.main(arguments)
        assert caught.value.code == 2
        assert arguments[0] in capsys.readouterr().err


# -- what the board gets


def test_image_has_the_whole_device_and_leads_to_the_gateway():
    made = picow.make_image(firmware(), 18830, 50, emulator.GATEWAY, emulator.SSID)
    files = contents(mounted("pico_w", made))
    config = json.loads(files["config.json"])
    assert config["broker"] == {"host": "10.0.0.1", "port": 18830, "keep_alive_s": 3600}
    assert config["wifi"] == {"ssid": "RP2040PY-GUEST"} and config["journal"]["home"] == "pinned"
    assert json.loads(files["demo.json"])["messages"] == 50
    for name in ("boot.py", "main.py"):
        assert files[name] == (picow.ROOT / name).read_bytes()
    assert files["app.py"] == (picow.ROOT / "tools" / "picow_app.py").read_bytes()
    assert "lib/mqtt_durable/client.mpy" in files and len([n for n in files if n.startswith("mqj/")]) > 4


# -- the emulated board


def command(board, opcode, at, data=b""):
    """What the bootrom does to have the flash carry out a command."""
    chip = board._ssi
    chip._write_enabled = True
    chip._tx_buffer = bytearray((opcode,)) + at.to_bytes(3, "big") + data
    chip._apply_command()


def with_board(tmp_path, body):
    async def run():
        path = tmp_path / "image.uf2"
        path.write_bytes(firmware())
        board = emulator.Board(path, 1)
        board.power_on(lambda line: None)
        try:
            body(board)
        finally:
            board.close()

    asyncio.run(run())


def test_flash_is_counted_and_outlives_the_chip(tmp_path):
    def body(board):
        command(board, ssi.CMD_SECTOR_ERASE, 0x1F4000)
        command(board, ssi.CMD_PAGE_PROGRAM, 0x1F4100, b"\x00\x0f" + b"\xff" * 254)
        command(board, ssi.CMD_PAGE_PROGRAM, 0x1F4100, b"\xff\xf1" + b"\xff" * 254)
        command(board, ssi.CMD_READ_STATUS_1, 0)
        assert (board.programs, board.erases, board.bytes, board.operations) == (2, 1, 3, 3)
        board.power_off()
        board.power_on(lambda line: None)
        assert bytes(board._chip.mcu.flash[0x1F40FF:0x1F4103]) == b"\xff\x00\x01\xff"
        command(board, ssi.CMD_BLOCK_ERASE, 0x1F0000)
        assert (board.programs, board.erases, board.operations) == (2, 17, 1)

    with_board(tmp_path, body)


def test_power_fails_in_the_middle_of_the_operation_that_was_named(tmp_path):
    def body(board):
        page = bytes(range(256))
        command(board, ssi.CMD_PAGE_PROGRAM, 0x1F4200, page)
        board.cut_at_operation(2, "prefix", "mixed", 7)
        command(board, ssi.CMD_PAGE_PROGRAM, 0x1F4300, page)
        assert not board.cut
        command(board, ssi.CMD_PAGE_PROGRAM, 0x1F4400, page)
        assert board.cut.startswith("flash at 0x1f4000: program 0x400+256: prefix ")
        cells = board._chip.mcu.flash
        n = int(board.cut.rpartition(" ")[2])
        assert 0 < n < 256
        assert bytes(cells[0x1F4200:0x1F4500]) == page + page + page[:n] + b"\xff" * (256 - n)
        command(board, ssi.CMD_PAGE_PROGRAM, 0x1F4500, page)  # what follows comes too late
        command(board, ssi.CMD_SECTOR_ERASE, 0x1F4000)
        assert bytes(cells[0x1F4200:0x1F4300]) == page and bytes(cells[0x1F4500:0x1F4600]) == b"\xff" * 256
        board.power_off()
        board.power_on(lambda line: None)
        board.cut_at_operation(1, "none", "zeros", 7)
        command(board, ssi.CMD_SECTOR_ERASE, 0x1F4000)
        assert board.cut == "flash at 0x1f4000: erase sector 0: zeros"
        assert bytes(board._chip.mcu.flash[0x1F3F00:0x1F5100]) == b"\xff" * 256 + bytes(4096) + b"\xff" * 256

    with_board(tmp_path, body)


def test_radio_reaches_the_broker_and_nothing_else():
    async def reach():
        served = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0)
        port = served.sockets[0].getsockname()[1]
        radio = emulator.Radio(port)
        for host, number in (("10.0.0.1", port + 1), ("127.0.0.1", port), ("192.0.2.1", port)):
            with pytest.raises(ConnectionRefusedError):
                await radio._connect(host, number)
        reader, writer = await radio._connect("10.0.0.1", port)
        assert await reader.read() == b""
        writer.close()
        served.close()

    asyncio.run(reach())


# -- what came of it


def test_same_seed_gives_the_same_cuts():
    first, again, other = [picow.plan_of(200, 20, seed) for seed in ("1", "1", "2")]
    assert first == again != other
    assert [cut["early"] for cut in first].count(True) == 4
    assert 4 < [cut["flash"] for cut in first].count(True) < 18
    running = [cut["at"] for cut in first if not cut["early"]]
    assert running == sorted(running) and 0 <= running[0] and running[-1] < 200


def trial_of(arrived, said=(), messages=6, resets=0):
    """A trial that never ran, with what its far side would have received and its board said."""
    trial = picow.Trial(b"", messages, 0, "1")
    trial.far = types.SimpleNamespace(arrived=arrived, seen=set(arrived), strange=[])
    trial.board = types.SimpleNamespace(resets=resets, programs=12, bytes=600, erases=3, cycles=0)
    for line in said:
        trial.console.next_life() if line == "on" else trial.console.take(line)
    return trial


def test_verdict_names_what_went_wrong():
    for arrived, words in (
        ([1, 2, 3, 4, 5, 6], []),
        ([2, 1, 3, 5, 4, 6], []),  # QoS 1 and 2 have each an order of their own
        ([1, 1, 2, 3, 4, 1, 5, 6], []),
        ([1, 2, 3, 4, 4, 5, 6], ["QoS 2: duplicated: 4"]),
        ([1, 2, 4, 5], ["QoS 1: lost: 3", "QoS 2: lost: 6"]),
        ([1, 2, 5, 3, 4, 6], ["QoS 1: disordered: 3"]),
        ([1, 2, 3, 4, 5, 6, 8], ["QoS 2: unexpected: 8"]),
    ):
        assert trial_of(arrived).verdict()[1] == words, arrived
    everything = [1, 2, 3, 4, 5, 6]
    said = ["on", "demo: begins at 1", "demo: published 3 812", "demo: published 4 ", "on", "demo: begins at 4"]
    trial = trial_of(everything, said, resets=1)
    assert trial.verdict()[1] == ["life 2 begins at 4, after 4", "the board reset itself 1 times"]
    assert trial.console.took_us == [812]
    assert trial_of(everything, said[:4] + ["on", "demo: begins at 5"]).verdict()[1] == []
    assert trial_of(everything, ["on", "Traceback (most recent call last):", "OSError: 5"]).verdict()[1] == [
        "traceback in life 1: OSError: 5"
    ]


def test_table_tells_the_figures():
    trial = trial_of([1, 2, 3, 4, 5, 6, 5], ["picow: free 90000", "demo: published 6 1000", "picow: free 80000"])
    trial.busy = [(3000000, 4), (1000000, 0)]
    trial.boots_s, trial.connects_s = [1.2, 1.3], [3.0]
    console = Console(width=120)
    with console.capture() as captured:
        for table in picow.table_of(trial):
            console.print(table)
    text = captured.get()
    for figure in ("1 (allowed)", "125000", "1000000", "2.00", "0.500", "80000", "1.25"):
        assert figure in text, figure


# -- the real thing


def test_short_run_on_real_firmware_loses_and_doubles_nothing():
    path = os.environ.get("PICOW_FIRMWARE")
    if not path:
        raise SkipTest("PICOW_FIRMWARE names no firmware of a Pico W to run in the emulator")
    trial = picow.run(picow.find_firmware(path), 24, 2, "1", Console(file=open(os.devnull, "w"), width=120))
    figures, failures = trial.verdict()
    assert failures == []
    assert figures["delivered"] == [12, 12] and figures["lost"] == [0, 0]
    assert trial.cuts == 2 and trial.board.programs > 24 and trial.board.erases >= 0
    assert len(trial.console.took_us) > 12 and min(trial.console.free) > 40000
