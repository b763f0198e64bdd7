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

    def sleep_ms(self, ms):
        self.now = time.ticks_add(self.now, ms)


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
            watchdog._wdt = watchdog._timer = watchdog._seen = watchdog._act = None
            test(watchdog.time)
    finally:
        watchdog.time = time
        watchdog._wdt = watchdog._timer = watchdog._seen = watchdog._act = None
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


# limit(): a time after which something happens, whatever the program does


def test_the_time_of_limit_ends_in_its_act_once():
    def test(ticks):
        watchdog.start()
        watchdog.guard()
        ticks.now = time.ticks_add(0, -3000)
        acts = []
        watchdog.limit(5000, lambda: acts.append(ticks.now))
        ticks.now = 1999
        watchdog._timer.fire()
        assert acts == []
        ticks.now = 2000
        watchdog._timer.fire()
        watchdog._timer.fire()
        assert acts == [2000]

    fresh(test)


def test_the_time_of_limit_is_up_also_for_a_program_that_stands_still():
    def test(ticks):
        watchdog.start()
        watchdog.guard(5000)
        acts = []
        watchdog.limit(6000, lambda: acts.append(ticks.now))
        ticks.now = 6000
        assert not fed() and acts == [6000]

    fresh(test)


def test_release_calls_limit_off():
    def test(ticks):
        watchdog.start()
        watchdog.limit(5000, crash)
        watchdog.release()
        ticks.now = 5000
        assert fed()

    fresh(test)


def crash():
    raise AssertionError("called")


# sleep()


def asleep(ms):
    """Return what the sleep ended in: the argument of the shim's SystemExit."""
    try:
        watchdog.sleep(ms)
    except SystemExit as error:
        return error.args[0]


def test_an_esp32_sleeps_in_one_piece():
    def test(ticks):
        if machine.board == "esp32":
            watchdog.start()
            assert asleep(600000) == "deepsleep" and machine.slept == [600000]

    fresh(test)


def pico(ticks, wakes_after=None):
    """The clock of a Pico that sleeps: as long as it was told, or only so many ms each time."""

    def on_sleep(ms):
        ticks.now = time.ticks_add(ticks.now, ms if wakes_after is None else wakes_after)

    machine.on_sleep = on_sleep


def test_a_pico_sleeps_in_steps_that_its_watchdog_lives_through():
    def test(ticks):
        if machine.board == "rp2":
            ticks.now = time.ticks_add(0, -7000)
            began = ticks.now
            pico(ticks)
            watchdog.start()
            assert asleep(7200000 + 1234) == "reset"  # longer than its one light sleep can be
            assert time.ticks_diff(ticks.now, began) == 7200000 + 1234
            assert max(machine.slept) < 8000 and machine.wdt.feeds == len(machine.slept)
            assert len(machine.slept) == 1441  # no timer ends a step early

    fresh(test)


def test_a_pico_without_a_watchdog_sleeps_too():
    def test(ticks):
        if machine.board == "rp2":
            pico(ticks)
            assert asleep(12000) == "reset" and ticks.now == 12000

    fresh(test)


def test_a_pico_that_is_woken_early_sleeps_on():
    def test(ticks):
        if machine.board == "rp2":
            for wakes_after in (0, 1, 300):
                ticks.now = 0
                del machine.slept[:]
                pico(ticks, wakes_after)
                watchdog.start()
                assert asleep(20000) == "reset"
                assert 20000 <= ticks.now < 20500  # and neither resets early nor spins
                assert len(machine.slept) <= 2000

    fresh(test)


def test_ctrl_c_ends_the_sleep_of_a_pico_with_the_watchdog_fed():
    def test(ticks):
        if machine.board == "rp2":

            def interrupted(ms):
                raise KeyboardInterrupt

            watchdog.start()
            watchdog.guard(5000)
            machine.on_sleep = interrupted
            try:
                watchdog.sleep(60000)
            except KeyboardInterrupt:
                pass
            else:
                raise AssertionError("slept on")
            ticks.now = 1000000
            assert fed()

    fresh(test)


def test_a_board_that_cannot_sleep_says_so_with_the_watchdog_fed():
    class NoSleep:
        DEEPSLEEP_RESET = 4
        Timer = machine.Timer

        def deepsleep(ms):
            raise ValueError("DEEPSLEEP not supported on this chip")

    def test(ticks):
        watchdog.start()
        try:
            watchdog.sleep(60000, NoSleep)
        except ValueError:
            pass
        else:
            raise AssertionError("no error")
        assert fed()

    fresh(test)


def test_what_stands_still_acts_before_the_watchdog_bites():
    def test(ticks):
        watchdog.start()
        watchdog.guard(5000)
        acts = []
        watchdog.limit(3600000, lambda: acts.append(ticks.now))
        ticks.now = 4999
        assert fed() and acts == []
        ticks.now = 5000
        watchdog._timer.fire()
        assert acts == [5000]

    fresh(test)
