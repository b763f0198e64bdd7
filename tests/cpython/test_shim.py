"""The shim: CPython behaves as MicroPython does, the stand-ins behave as the boards' drivers do, on both interpreters.

And what a device in a file looks like after its process was killed, which only another process can see.
"""

import asyncio
import errno
import io
import os
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import esp32
import host
import machine
import network
import pytest
import rp2
from norsim import Nor, read_counters

ROOT = Path(__file__).resolve().parent.parent.parent
MICROPYTHON = os.environ.get("MICROPYTHON") or str(Path(sys.executable).parent / "micropython")
INTERPRETERS = {"cpython": sys.executable, "micropython": MICROPYTHON}
both_interpreters = pytest.mark.parametrize("interpreter", sorted(INTERPRETERS))


def start(interpreter, code, cwd, **environment):
    """Start code under an interpreter with the shim installed."""
    path = [str(ROOT / name) for name in ("tools/shim", "tools", "lib")]
    env = dict(os.environ, PYTHONPATH=os.pathsep.join(path), MICROPYPATH=":".join(path + [".frozen"]), **environment)
    command = [INTERPRETERS[interpreter], "-c", "import host; host.install()\n" + code]
    return subprocess.Popen(command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def run(interpreter, code, cwd, **environment):
    """Run code to its end; return (exit status, output).  A process killed by a signal has a negative status."""
    process = start(interpreter, code, cwd, **environment)
    output, _ = process.communicate(timeout=60)
    return process.returncode, output


# CPython with MicroPython's functions.


def test_install_may_be_repeated():
    before = time.ticks_ms, asyncio.stream.Stream, list(sys.path)
    host.install()
    assert (time.ticks_ms, asyncio.stream.Stream, list(sys.path)) == before


def test_ticks_wrap_as_on_a_board():
    top = (1 << 30) - 1
    assert time.ticks_add(top, 1) == 0
    assert time.ticks_add(0, -1) == top
    assert time.ticks_diff(3, top) == 4
    assert time.ticks_diff(top, 3) == -4
    assert time.ticks_diff(1000, 400) == 600
    assert 0 <= time.ticks_ms() <= top and 0 <= time.ticks_us() <= top


def test_print_exception_goes_to_the_console_or_to_a_file(capsys):
    try:
        raise ValueError("a reason")
    except ValueError as e:
        sys.print_exception(e)
        file = io.StringIO()
        sys.print_exception(e, file)
    for text in (capsys.readouterr().out, file.getvalue()):
        assert "Traceback" in text and "ValueError: a reason" in text


def test_asyncio_in_milliseconds():
    async def main():
        await asyncio.sleep_ms(0)
        assert await asyncio.wait_for_ms(asyncio.sleep(0, "value"), 60000) == "value"
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for_ms(asyncio.Event().wait(), 1)

    asyncio.run(main())


def pair():
    a, b = socket.socketpair()
    a.setblocking(False)
    return a, b


def test_readinto_of_a_non_blocking_socket():
    a, b = pair()
    with a, b:
        buf = bytearray(8)
        assert a.readinto(buf) is None
        b.sendall(b"abc")
        assert a.readinto(buf) == 3 and buf[:3] == b"abc"
        b.sendall(b"0123456789")
        assert a.readinto(memoryview(buf)[2:6]) == 4 and buf == b"ab0123\0\0"
        assert a.readinto(buf, 1) == 1 and buf[0] == ord("4")
        b.close()
        assert a.readinto(buf) == 5
        assert a.readinto(buf) == 0


def test_write_of_a_non_blocking_socket_takes_a_part_then_none():
    a, b = pair()
    with a, b:
        data = bytes(1 << 24)
        n = a.write(data)
        assert 0 < n < len(data)
        assert a.write(data) is None
        assert a.write(b"") == 0


def test_write_takes_a_part_of_a_buffer():
    a, b = pair()
    with a, b:
        assert a.write(b"0123456789", 2) == 2
        assert a.write(memoryview(b"0123456789"), 3, 4) == 4
        assert a.write(b"0123456789", 8, 9) == 2
        assert b.recv(100) == b"01" + b"3456" + b"89"


def test_poll_tells_objects_and_ipoll_does_too():
    a, b = pair()
    with a, b:
        poll = select.poll()
        poll.register(a, select.POLLIN)
        assert poll.poll(0) == [] and list(poll.ipoll(0)) == []
        b.sendall(b"x")
        assert poll.poll(0) == [(a, select.POLLIN)] and list(poll.ipoll(-1)) == [(a, select.POLLIN)]
        poll.modify(a, select.POLLOUT)
        assert [(found[0], found[1]) for found in poll.ipoll(0)] == [(a, select.POLLOUT)]
        poll.unregister(a)
        assert poll.poll(0) == []
        poll.register(a.fileno())
        assert poll.poll(0) == [(a.fileno(), select.POLLIN | select.POLLOUT)]


def test_a_socket_with_a_timeout_raises_etimedout():
    a, b = socket.socketpair()
    with a, b:
        a.settimeout(0.01)
        with pytest.raises(OSError) as e:
            a.readinto(bytearray(4))
        assert e.value.errno == errno.ETIMEDOUT


def test_a_stream_waits_for_its_socket():
    async def main():
        a, b = pair()
        with a, b:
            stream = asyncio.stream.Stream(a)
            buf = bytearray(4)
            reader = asyncio.create_task(stream.readinto(buf))
            await asyncio.sleep(0)
            assert not reader.done()
            b.sendall(b"ping")
            assert await asyncio.wait_for(reader, 60) == 4
            b.close()
            assert await asyncio.wait_for(stream.readinto(buf), 60) == 0

    asyncio.run(main())


def test_a_stream_keeps_what_the_socket_does_not_take():
    async def main():
        a, b = pair()
        with a, b:
            b.setblocking(False)
            stream = asyncio.stream.Stream(a)
            data = bytes(range(256)) * 8192
            stream.write(memoryview(data))
            assert stream.out_buf
            writer = asyncio.create_task(stream.drain())
            other = asyncio.stream.Stream(b)
            got = bytearray()
            buf = bytearray(65536)
            while len(got) < len(data):
                got += buf[: await asyncio.wait_for(other.readinto(buf), 60)]
            await writer
            assert bytes(got) == data

    asyncio.run(main())


def test_a_cancelled_wait_leaves_nothing_behind_even_when_the_socket_is_closed():
    async def main():
        loop = asyncio.get_running_loop()
        a, b = pair()
        with a, b:
            fd = a.fileno()
            task = asyncio.create_task(asyncio.stream.Stream(a).readinto(bytearray(1)))
            await asyncio.sleep(0)
            task.cancel()
            a.close()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert not loop.remove_reader(fd)

    asyncio.run(main())


def test_micropython_module():
    import micropython

    assert micropython.const(5) == 5
    assert micropython.heap_lock() == 1 and micropython.heap_locked()
    assert micropython.heap_unlock() == 0
    assert micropython.opt_level() == 0
    seen = []
    micropython.schedule(seen.append, 1)
    assert seen == [1]


# Wi-Fi.


def station(board, *attempts):
    host.use_board(board)
    network.script.extend(attempts)
    wlan = network.WLAN(network.WLAN.IF_STA)
    wlan.active(True)
    return wlan


def test_wlan_is_one_object_and_off_at_first():
    for board in ("esp32", "rp2"):
        host.use_board(board)
        wlan = network.WLAN(network.STA_IF)
        assert wlan is network.WLAN() and wlan is not network.WLAN(network.AP_IF)
        assert not wlan.active() and not wlan.isconnected()
        with pytest.raises(OSError):
            wlan.connect("net", "key")
        with pytest.raises(ValueError):
            network.WLAN(2)


def test_without_a_script_it_joins():
    for board, up in (("esp32", 1010), ("rp2", 3)):
        wlan = station(board)
        wlan.connect("net", "key")
        assert [wlan.isconnected() for _ in range(3)] == [False, True, True]
        assert wlan.status() == up == network.STAT_GOT_IP
        assert wlan.ifconfig()[0] == "127.0.0.1" and wlan.connects == [("net", "key")]
        wlan.disconnect()
        assert not wlan.isconnected() and wlan.status() == network.STAT_IDLE


def test_esp32_connect_while_connecting_raises():
    wlan = station("esp32", ["connecting"])
    wlan.connect("net", "key")
    with pytest.raises(OSError) as e:
        wlan.connect("net", "key")
    assert e.value.args == ("Wifi Internal Error",)
    wlan.disconnect()
    wlan.connect("net", "key")


def test_esp32_tries_again_by_itself_and_keeps_the_old_reason():
    wlan = station("esp32", ["connecting", "no_ap"], ["connecting", "wrong_password"])
    wlan.connect("net", "key")
    assert [wlan.status() for _ in range(6)] == [1001, 201, 201, 202, 202, 1010]


def test_esp32_with_no_reconnects_stays_down():
    wlan = station("esp32", ["up", "drop"])
    wlan.config(reconnects=0)
    wlan.connect("net", "key")
    assert [wlan.status() for _ in range(4)] == [1010, 200, 200, 200]
    wlan.connect("net", "key")
    assert [wlan.isconnected() for _ in range(2)] == [False, True]


def test_esp32_flickers():
    wlan = station("esp32", ["connecting", "idle", "up"])
    wlan.connect("net", "key")
    assert [wlan.status() for _ in range(3)] == [1001, 1000, 1010]


def test_pico_codes_and_no_retry_of_its_own():
    wlan = station("rp2", ["connecting", "no_ip", "up", "drop"], ["wrong_password"], ["no_ap"], ["fail"])
    wlan.connect("net", "key")
    assert [wlan.status() for _ in range(5)] == [1, 2, 3, 0, 0]
    for code in (-3, -2, -1):
        wlan.connect("net", "key")
        assert [wlan.status() for _ in range(3)] == [code] * 3
        assert not wlan.isconnected()


def test_wlan_config_knows_what_the_board_knows():
    for board, performance, none in (("esp32", 1, 0), ("rp2", 0xA11142, 0x10)):
        wlan = station(board)
        assert wlan.config("pm") == performance == wlan.PM_PERFORMANCE and wlan.PM_NONE == none
        wlan.config(pm=wlan.PM_NONE, hostname="plant7")
        assert wlan.config("pm") == none and network.hostname() == "plant7"
        assert len(wlan.config("mac")) == 6
        with pytest.raises(ValueError):
            wlan.config(nonsense=1)
        with pytest.raises(TypeError):
            wlan.config("pm", txpower=3)
    with pytest.raises(ValueError):
        wlan.config(reconnects=0)
    network.country("de")
    assert network.country() == rp2.country() == "DE"


def test_rssi_needs_a_link_on_esp32():
    wlan = station("esp32", ["up"])
    with pytest.raises(OSError):
        wlan.status("rssi")
    wlan.connect("net", "key")
    assert wlan.isconnected() and wlan.status("rssi") == network.rssi


# The other modules.


def test_calls_that_never_return_end_the_program():
    for function in (machine.reset, machine.soft_reset, machine.deepsleep):
        with pytest.raises(SystemExit):
            function()


def test_watchdog_counts_and_knows_the_boards_limit():
    host.use_board("esp32")
    wdt = machine.WDT(timeout=60000)
    wdt.feed()
    assert machine.wdt is wdt and wdt.feeds == 1 and wdt.timeout_ms == 60000
    host.use_board("rp2")
    assert machine.wdt is None
    machine.WDT(timeout=8388)
    with pytest.raises(ValueError):
        machine.WDT(timeout=8389)


def test_only_an_esp32_tells_a_sleep_from_a_reset():
    host.use_board("rp2")
    assert not [name for name in ("HARD_RESET", "DEEPSLEEP_RESET", "SOFT_RESET") if hasattr(machine, name)]
    host.use_board("esp32")
    assert (machine.HARD_RESET, machine.DEEPSLEEP_RESET, machine.SOFT_RESET) == (2, 4, 5)


def ended(function, *args):
    with pytest.raises(SystemExit) as e:
        function(*args)
    return e.value.args[0]


def test_a_pico_sleeps_lightly_with_its_watchdog_running():
    host.use_board("rp2")
    lasted = []
    machine.on_sleep = lasted.append
    assert ended(machine.deepsleep, 600000) == "reset"
    with pytest.raises(ValueError):
        machine.lightsleep(4294967)
    wdt = machine.WDT(timeout=8000)
    machine.lightsleep(5000)
    assert ended(machine.lightsleep, 3000) == "locked up"
    wdt.feed()
    machine.Timer(period=1000)
    machine.lightsleep(5000)
    assert lasted == [600000, 5000, 1000]
    host.use_board("esp32")
    machine.WDT(timeout=8000)
    assert ended(machine.deepsleep, 600000) == "deepsleep" and machine.slept == [600000]


def test_only_a_pico_takes_the_radios_power_away():
    host.use_board("esp32")
    assert not hasattr(network.WLAN(), "deinit")
    host.use_board("rp2")
    wlan = network.WLAN()
    wlan.active(True)
    wlan.active(False)
    assert wlan.powered
    wlan.deinit()
    assert not wlan.powered and not wlan.active()


def test_machine_remembers():
    host.use_board("rp2")
    assert machine.reset_cause() == machine.PWRON_RESET and len(machine.unique_id()) == 6
    machine.RTC().memory(b"kept")
    assert machine.RTC().memory() == b"kept"
    volts = machine.ADC(machine.ADC.CORE_TEMP).read_u16() * 3.3 / 65535
    assert abs(27 - (volts - 0.706) / 0.001721 - machine.temperature_c) < 0.1
    pin = machine.Pin("LED", machine.Pin.OUT)
    pin.on()
    pin.toggle()
    assert pin.value() == 0
    fired = []
    timer = machine.Timer(mode=machine.Timer.ONE_SHOT, period=5, callback=fired.append)
    timer.fire()
    timer.fire()
    assert fired == [timer]


def test_partitions_are_found_by_type_subtype_and_label():
    esp32.clear()
    esp32.add_partition("factory", Nor(16384), type=esp32.Partition.TYPE_APP, subtype=0)
    esp32.add_partition("mqj", Nor(32768))
    try:
        find = esp32.Partition.find
        assert [p.info()[4] for p in find(esp32.Partition.TYPE_APP)] == ["factory"]
        assert find(esp32.Partition.TYPE_DATA, label="factory") == []
        assert find(esp32.Partition.TYPE_DATA, subtype=1) == []
        (found,) = find(esp32.Partition.TYPE_DATA, label="mqj")
        assert found.info() == (1, 0x40, 0x204000, 32768, "mqj", False)
        assert esp32.Partition("mqj").info() == found.info()
        with pytest.raises(OSError):
            esp32.Partition("none")
        with pytest.raises(OSError):
            found.writeblocks(0, bytes(100))
    finally:
        esp32.clear()


def test_pico_flash_turns_the_drivers_traps_into_errors():
    nor = Nor(65536, 256)
    rp2.set_flash(nor)
    try:
        flash = rp2.Flash(start=8192, len=16384)
        assert flash.ioctl(4, 0) == 4 and flash.ioctl(5, 0) == 4096
        flash.writeblocks(0, b"\x21" * 256, 4096 + 512)
        buf = bytearray(3)
        flash.readblocks(1, buf, 511)
        assert buf == b"\xff\x21\x21"
        assert nor.mem[8192 + 4096 + 512] == 0x21
        assert flash.ioctl(6, 1) == 0 and list(nor.erases).index(1) == 3
        for trap in (
            lambda: flash.writeblocks(0, bytes(100), 0),
            lambda: flash.writeblocks(0, bytes(256), 100),
            lambda: flash.writeblocks(0, bytes(256)),
            lambda: flash.writeblocks(4, bytes(256), 0),
            lambda: flash.readblocks(3, bytearray(257), 3840),
            lambda: flash.readblocks(-1, bytearray(4)),
            lambda: flash.ioctl(6, 4),
        ):
            with pytest.raises(rp2.FlashTrap):
                trap()
        for window in ({"start": 100}, {"start": 65536}, {"len": 0}, {"start": 4096, "len": 65536}):
            with pytest.raises(ValueError):
                rp2.Flash(**window)
    finally:
        rp2.set_flash(None)


BOARDS = """
import asyncio, machine, network, esp32, rp2, micropython, sys, time
from asyncio.stream import Stream
for board in ("esp32", "rp2"):
    host.use_board(board)
    wlan = network.WLAN(network.STA_IF)
    wlan.active(True)
    network.script.append(["connecting", "no_ap"])
    wlan.connect("net", "key")
    print([wlan.status() for _ in range(4)], wlan.PM_PERFORMANCE, network.WLAN() is wlan)
    try:
        machine.WDT(timeout=10000).feed()
    except ValueError as e:
        print(e)
    try:
        machine.reset()
    except SystemExit as e:
        print(e.args[0])
machine.idle()
print(micropython.const(3), hasattr(Stream, "readinto"), time.ticks_diff(5, 3))
print([p.info()[3:5] for p in esp32.Partition.find(1, label="mqj")], rp2.Flash().ioctl(4, 0))
"""


@both_interpreters
def test_the_stand_ins_win_over_built_in_modules(interpreter, tmp_path):
    status, output = run(interpreter, BOARDS, tmp_path, MQTT_DURABLE_NOR="mqj.nor", MQTT_DURABLE_NOR_SIZE="32768")
    assert (status, output.splitlines()) == (
        0,
        [
            "[1001, 201, 201, 1010]" + " 1 True",
            "reset",
            "[1, -2, -2, -2] 10555714 True",
            "timeout exceeds 8388",
            "reset",
            "3 True 2",
            "[(32768, 'mqj')] 212",
        ],
    )


# Killed in the middle.

PROGRAM_TWICE = """
import esp32
p = esp32.Partition("mqj")
p.writeblocks(0, b"\\x0f" * 64, 0)
p.writeblocks(0, b"\\x21" * 64, 64)
p.ioctl(6, 1)
print("alive")
"""


def cells(path):
    return path.read_bytes()[: read_counters(str(path))["size"]]


@both_interpreters
def test_kill_after_leaves_a_torn_program(interpreter, tmp_path):
    expected = Nor(65536)
    expected.cut_after(1, program="bits", seed=9)
    try:
        expected.writeblocks(0, b"\x21" * 64, 64)
    except Exception:
        expected.power_on()
    path = tmp_path / "mqj.nor"
    status, output = run(
        interpreter, PROGRAM_TWICE, tmp_path, MQTT_DURABLE_NOR=str(path), MQTT_DURABLE_NOR_KILL="2,bits,none,9"
    )
    assert (status, output) == (-signal.SIGKILL, "")
    flash = cells(path)
    assert flash[:64] == b"\x0f" * 64
    torn = flash[64:128]
    assert torn == bytes(expected.mem[64:128])  # the same cut, whichever interpreter made it
    assert torn not in (b"\x21" * 64, b"\xff" * 64)
    assert flash[128:] == b"\xff" * (65536 - 128)
    counters = read_counters(str(path))
    assert counters["programs"] == 2 and counters["programmed_bytes"] == 128 and sum(counters["erases"]) == 0
    # The next start finds it so and goes on.
    status, output = run(interpreter, PROGRAM_TWICE, tmp_path, MQTT_DURABLE_NOR=str(path))
    assert (status, output) == (0, "alive\n")
    assert read_counters(str(path))["erases"][:2] == [0, 1]


@both_interpreters
def test_kill_after_leaves_a_half_done_erase(interpreter, tmp_path):
    path = tmp_path / "mqj.nor"
    nor = Nor(16384, path=str(path))
    nor.writeblocks(1, bytes(4096), 0)
    nor.close()
    status, output = run(
        interpreter, PROGRAM_TWICE, tmp_path, MQTT_DURABLE_NOR=str(path), MQTT_DURABLE_NOR_KILL="3,none,mixed,2"
    )
    assert (status, output) == (-signal.SIGKILL, "")
    sector = cells(path)[4096:8192]
    assert set(sector) == {0, 0xFF}
    assert read_counters(str(path))["erases"] == [0, 1, 0, 0]


@both_interpreters
def test_sigkill_from_outside_tears_a_program_between_two_pieces(interpreter, tmp_path):
    path = tmp_path / "mqj.nor"
    Nor(16384, path=str(path)).close()
    slow = str(600 * 1000000)  # a page program of ten minutes: it cannot end before the kill
    process = start(
        interpreter,
        "import esp32\nesp32.Partition('mqj').writeblocks(0, bytes(256), 0)",
        tmp_path,
        MQTT_DURABLE_NOR=str(path),
        MQTT_DURABLE_NOR_PROGRAM_US=slow,
    )
    try:
        while cells(path)[0] and process.poll() is None:
            time.sleep(0.01)
    finally:
        process.kill()
        process.communicate(timeout=60)
    flash = cells(path)
    k = flash.count(0)
    assert 0 < k < 256 and k % 16 == 0
    assert flash == bytes(k) + b"\xff" * (16384 - k)
    assert read_counters(str(path))["programs"] == 1
