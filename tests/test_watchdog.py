"""The watchdog and the timer that feeds it.  No test waits: the timer fires when told to, ticks are the test's own."""

import time

import machine
import micropython
from mqtt_durable import watchdog


class Ticks:
    """In the place of the module time."""

    def __init__(self):
        self.now = 0
        self.ticks_diff = time.ticks_diff

    def ticks_ms(self):
        return self.now


class HardwareTimer(machine.Timer):
    """A timer of an ESP32 without software timers."""

    def __init__(self, id):
        if id == -1:
            raise ValueError("invalid Timer number")
        super().__init__(id)


class NoTimer:
    """A board's module machine without a Timer."""

    WDT = machine.WDT


class OnlyHardwareTimers:
    """A board's module machine with timers 0..3."""

    WDT = machine.WDT
    Timer = HardwareTimer


def fresh(test):
    """Run test(ticks) with the module as it is at start-up, and leave it so."""
    try:
        for board in ("esp32", "rp2"):
            machine.use_board(board)
            watchdog.time = Ticks()
            watchdog._wdt = watchdog._timer = watchdog._seen = None
            test(watchdog.time)
    finally:
        watchdog.time = time
        watchdog._wdt = watchdog._timer = watchdog._seen = None
        machine.use_board("esp32")


def fed():
    """Fire the timer; return whether the watchdog was fed."""
    before = machine.wdt.feeds
    watchdog._timer.fire()
    return machine.wdt.feeds > before


def test_it_feeds_by_itself_once_started():
    def test(ticks):
        assert watchdog.start()
        assert machine.wdt.timeout_ms == (30000 if machine.board == "esp32" else 8000)
        ticks.now = 1000000
        assert fed() and fed()

    fresh(test)


def test_a_second_start_changes_nothing():
    def test(ticks):
        watchdog.start()
        wdt = machine.wdt
        assert watchdog.start() and machine.wdt is wdt

    fresh(test)


def test_it_lets_go_when_the_program_stands_still():
    def test(ticks):
        watchdog.start()
        watchdog.guard(5000)
        ticks.now = 4999
        assert fed()
        ticks.now = 5000
        assert not fed()

    fresh(test)


def test_alive_keeps_it_fed_also_while_the_ticks_wrap():
    def test(ticks):
        watchdog.start()
        ticks.now = time.ticks_add(0, -3000)
        watchdog.guard(5000)
        ticks.now = 1000
        assert fed()
        watchdog.alive()
        ticks.now = 5999
        assert fed()

    fresh(test)


def test_alive_and_the_timer_allocate_nothing():
    def test(ticks):
        watchdog.start()
        watchdog.guard()
        feed = watchdog._feed
        micropython.heap_lock()
        try:
            watchdog.alive()
            feed(None)
        finally:
            micropython.heap_unlock()
        assert machine.wdt.feeds == 1

    fresh(test)


def test_release_feeds_for_good():
    def test(ticks):
        watchdog.start()
        watchdog.guard(5000)
        watchdog.release()
        ticks.now = 1000000
        assert fed()

    fresh(test)


def test_a_hardware_timer_will_do():
    def test(ticks):
        assert watchdog.start(OnlyHardwareTimers) and fed()

    fresh(test)


def test_without_a_timer_there_is_no_watchdog():
    def test(ticks):
        assert not watchdog.start(NoTimer) and machine.wdt is None
        watchdog.guard()
        watchdog.alive()
        watchdog.release()

    fresh(test)
