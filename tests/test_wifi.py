"""Bringing the radio up on both boards, through the stand-in for the module network; no test waits."""

import asyncio
import time

import network
from mqtt_durable.wifi import Wifi

SETTINGS = {"ssid": "net", "password": "hunter2hunter2", "country": "GB", "power_save": False}
BOARDS = ("esp32", "rp2")


def make(board, *script, **settings):
    """A Wifi whose time passes only in its own pauses.  script: lists of steps of network.script."""
    network.use_board(board)
    network.script.extend(script)
    merged = dict(SETTINGS)
    merged.update(settings)
    wifi = Wifi(merged)
    wifi.now = wifi.passed_ms = 0
    wifi.pauses = []

    async def sleep_ms(ms):
        wifi.now = time.ticks_add(wifi.now, ms)
        wifi.passed_ms += ms
        wifi.pauses.append(ms)

    wifi._ticks_ms = lambda: wifi.now
    wifi._sleep_ms = sleep_ms
    return wifi


def station():
    return network.WLAN(network.STA_IF)


def up(wifi):
    """Run wifi.up(); return the text of its OSError, None without one."""
    try:
        asyncio.run(wifi.up())
    except OSError as error:
        return str(error)
    return None


def test_up_connects_and_sets_the_interface_up():
    for board in BOARDS:
        wifi = make(board)
        assert wifi.rssi() is None
        assert up(wifi) is None
        assert station().isconnected() and station().connects == [("net", "hunter2hunter2")]
        assert network.country() == "GB"
        if board == "esp32":
            assert station().config("reconnects") == 0
        else:
            assert station().config("pm") == station().PM_NONE
        assert wifi.rssi() == network.rssi


def test_power_saving_is_left_on_when_asked_for():
    for board in BOARDS:
        wifi = make(board, power_save=True)
        assert up(wifi) is None
        assert station().config("pm") == station().PM_PERFORMANCE


def test_the_esp32_keeps_its_own_power_saving():
    wifi = make("esp32")
    assert up(wifi) is None and station().config("pm") == station().PM_PERFORMANCE


def test_down_switches_the_radio_off_and_up_on_again():
    for board in BOARDS:
        wifi = make(board)
        wifi.down()  # nothing to do
        assert up(wifi) is None and station().powered
        wifi.down()
        assert not station().active() and not station().isconnected() and wifi.rssi() is None
        assert station().powered == (board == "esp32")  # what has deinit() needs it
        wifi.down()
        assert up(wifi) is None and len(station().connects) == 2


def test_down_is_not_stopped_by_a_driver_that_fails():
    wifi, net = stubborn(disconnect=9)
    assert up(wifi) is None
    net.failures["active"] = 1
    wifi.down()
    assert net.calls[-2:] == ["disconnect", "active"]


def test_up_returns_at_once_while_connected():
    wifi = make("esp32")
    up(wifi)
    del wifi.pauses[:]
    assert up(wifi) is None
    assert len(station().connects) == 1 and wifi.pauses == []


def test_a_network_that_is_up_already_is_left_alone():
    wifi = make("rp2")
    station().active(True)
    station().connect("other")
    station().isconnected()
    assert up(wifi) is None and station().connects == [("other", None)]


def test_an_open_network_is_joined_without_a_key():
    for board in BOARDS:
        wifi = make(board, password=None)
        assert up(wifi) is None and station().connects == [("net", None)]


def test_flickering_states_decide_nothing():
    slow = ["connecting", "idle", "no_ip", "connecting", "no_ip", "idle", "up"]
    for board in BOARDS:
        wifi = make(board, slow)
        assert up(wifi) is None and len(station().connects) == 1


def test_up_tries_twice_then_names_the_reason():
    for board, steps, text in (
        ("esp32", ["connecting", "no_ap"], 'Wi-Fi: no access point "net"'),
        ("rp2", ["connecting", "no_ap"], 'Wi-Fi: no access point "net"'),
        ("esp32", ["connecting", "wrong_password"], 'Wi-Fi: password or association refused by "net"'),
        ("rp2", ["connecting", "wrong_password"], 'Wi-Fi: wrong password for "net"'),
        ("esp32", ["fail"], 'Wi-Fi: association refused by "net"'),
        ("rp2", ["fail"], 'Wi-Fi: connection refused by "net"'),
        ("rp2", ["connecting", "no_ip"], 'Wi-Fi: no address from "net"'),
        ("esp32", ["connecting"], 'Wi-Fi: no connection within 24 s to "net"'),
        ("rp2", ["connecting"], 'Wi-Fi: no connection within 24 s to "net"'),
    ):
        wifi = make(board, steps, steps)
        assert up(wifi) == text
        assert len(station().connects) == 2
        assert 24000 <= wifi.passed_ms <= 30000
        assert min(wifi.pauses) >= 100  # no busy polling
        assert "hunter2" not in text


def test_a_second_attempt_succeeds_where_the_first_failed():
    for board in BOARDS:
        wifi = make(board, ["connecting", "wrong_password"], ["connecting", "up"])
        assert up(wifi) is None and len(station().connects) == 2


def test_up_after_a_failure_starts_again():
    for board in BOARDS:
        wifi = make(board, ["no_ap"], ["no_ap"], ["connecting", "up"])
        assert up(wifi) is not None
        assert up(wifi) is None and len(station().connects) == 3


def test_a_lost_link_is_made_again():
    for board in BOARDS:
        wifi = make(board, ["up", "up", "drop"], ["connecting", "up"])
        assert up(wifi) is None
        while station().isconnected():
            pass
        assert wifi.rssi() is None
        assert up(wifi) is None and len(station().connects) == 2


def test_address_is_none_unless_connected():
    for board in BOARDS:
        wifi = make(board, ["up", "up", "up", "drop"], ["connecting", "up"])
        assert wifi.address() is None
        up(wifi)
        station().ifconfig(("10.0.0.7", "255.0.0.0", "10.0.0.1", "10.0.0.1"))
        assert wifi.address() == "10.0.0.7"
        while station().isconnected():
            pass
        assert wifi.address() is None
        up(wifi)
        station().ifconfig(("10.0.0.8", "255.0.0.0", "10.0.0.1", "10.0.0.1"))
        assert wifi.address() == "10.0.0.8"


def test_the_time_limit_holds_while_the_ticks_wrap():
    wifi = make("esp32", ["connecting"], ["connecting"])
    wifi.now = time.ticks_add(0, -5000)
    assert up(wifi) is not None
    assert 24000 <= wifi.passed_ms <= 30000


class Stubborn:
    """A network module whose interface refuses what it is told to, as drivers do when they are out of memory."""

    STA_IF = 0

    def __init__(self, **failures):
        self.failures = failures  # name of a call -> how often it fails
        self.connected = False
        self.calls = []

    def WLAN(self, interface):
        return self

    def country(self, code):
        pass

    def isconnected(self):
        return self.connected

    def status(self, what=None):
        if what:
            raise ValueError("unknown status param")
        return 1

    def config(self, **values):
        pass

    def ifconfig(self):
        raise OSError(12)

    def active(self, value):
        self._call("active")

    def disconnect(self):
        self._call("disconnect")

    def connect(self, ssid, key=None):
        self._call("connect")
        self.connected = True

    def _call(self, name):
        self.calls.append(name)
        if self.failures.get(name, 0):
            self.failures[name] -= 1
            raise OSError(12)


def stubborn(**failures):
    wifi = make("esp32")
    wifi._network = Stubborn(**failures)
    return wifi, wifi._network


def test_an_interface_that_does_not_start_is_started_at_the_next_call():
    wifi, net = stubborn(active=1)
    assert up(wifi) is not None and net.calls == ["active"]
    assert up(wifi) is None and net.calls.count("active") == 2


def test_a_refused_connect_is_tried_again_after_a_pause():
    wifi, net = stubborn(connect=1, disconnect=9)
    assert up(wifi) is None
    assert net.calls == ["active", "disconnect", "connect", "disconnect", "connect"]
    assert wifi.pauses.count(1000) == 2
    assert wifi.rssi() is None and wifi.address() is None  # this driver does not tell


def test_connect_is_never_called_without_leaving_first():
    wifi, net = stubborn(connect=2)
    assert up(wifi) == 'Wi-Fi: no connection within 24 s to "net"'
    assert net.calls == ["active", "disconnect", "connect", "disconnect", "connect", "disconnect"]
