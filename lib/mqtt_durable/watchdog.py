"""The hardware watchdog, which once started can be stopped on neither board.

Owns machine.WDT and the one machine.Timer that feeds it.  Feeding from a timer and not from the program has three
reasons: a DNS look-up without an answer stands still for up to 14 s, longer than the RP2040 can wait; the board must
stay alive at the REPL when the program has ended; and it must after a soft reset that runs no main.py (mpremote), which
ends every timer.  So boot.py calls start(), and from guard() to release() the timer feeds only while the program says
alive().  Where machine has no WDT or no Timer, all of it but sleep() does nothing.

The sleep is here too, because the watchdog of a Pico runs on in it.
"""

import time

from micropython import const

_FEED_MS = const(1000)
_STALL_MS = const(60000)
_STEP_MS = const(5000)  # of a Pico's sleep, whose watchdog ends at 8 s
_NUDGE_MS = const(10)

_wdt = None
_timer = None
_seen = None  # ticks_ms of the last alive(); None: feed unconditionally
_stall_ms = _STALL_MS
_act = None  # what limit() has to be called
_act_ticks = 0  # ticks_ms of the beginning of that time
_act_ms = 0


def start(machine=None):
    """Start the watchdog and its timer, unless they run.  Return True when they run.

    machine: stands in for the module machine.
    """
    global _wdt, _timer
    if _wdt is not None:
        return True
    if machine is None:
        try:
            import machine
        except ImportError:
            return False
    if not (hasattr(machine, "WDT") and hasattr(machine, "Timer")):
        return False
    # The timer first: a watchdog without one would reset the board for ever.
    try:
        timer = machine.Timer(-1)
    except ValueError:  # an ESP32 without software timers
        timer = machine.Timer(0)
    _begin(timer, machine)
    # 30 s outlasts a look-up on the ESP32, where a timer's callback waits for it too.  The RP2040 ends at 8388 ms.
    try:
        _wdt = machine.WDT(timeout=30000)
    except ValueError:
        _wdt = machine.WDT(timeout=8000)
    _timer = timer
    return True


def guard(stall_ms=_STALL_MS):
    """From now on the board is reset when alive() is not called for stall_ms (and the watchdog's own 8 or 30 s)."""
    global _stall_ms
    _stall_ms = stall_ms
    alive()


def alive():
    """Say that the program is running.  Allocates nothing."""
    global _seen
    _seen = time.ticks_ms()


def release():
    """Let the timer feed for good: the program has ended in order.  Also ends the time of limit()."""
    global _seen, _act
    _seen = _act = None


def limit(ms, act):
    """Have the timer call act() ms from now, whatever the program does then; release() calls that off.

    It also does when there was no alive() for as long as guard() says, in place of having the board reset.
    ms: up to 6 days.  It strikes between two bytecodes, as Ctrl-C does, also in an endless loop; not within a call that
    does not return, which the watchdog ends.
    """
    global _act, _act_ticks, _act_ms
    _act = act
    _act_ticks = time.ticks_ms()
    _act_ms = ms


def sleep(ms, machine=None):
    """Sleep deeply for ms, then start anew: does not return.

    The ESP32's deepsleep() takes its watchdog's power away, too.  The Pico's is a light sleep with a reset behind it:
    its watchdog runs on, and when it bites an RP2040 with firmware up to 1.28 is locked up until its power is cut
    (micropython#17228); any interrupt ends it, so our own timer would after a second; and it takes 71 minutes at most.
    So there it is done in steps, with the watchdog fed in between, until ms have passed.
    Raises KeyboardInterrupt on a Pico, and what deepsleep() does where there is none; the timer feeds again then.
    machine: stands in for the module machine.
    """
    if machine is None:
        import machine
    release()
    if _timer is not None:
        _timer.deinit()
    try:
        if hasattr(machine, "DEEPSLEEP_RESET"):  # the ESP32: only where it is deep can it be told afterwards
            machine.deepsleep(ms)
        while ms > 0:
            began = time.ticks_ms()
            if _wdt is not None:
                _wdt.feed()
            machine.lightsleep(min(ms, _STEP_MS))
            if time.ticks_diff(time.ticks_ms(), began) < min(ms, _STEP_MS):
                # Something wants to be handled before there is any sleep: USB, or the radio's last words.
                time.sleep_ms(_NUDGE_MS)
            ms -= time.ticks_diff(time.ticks_ms(), began)
    except (Exception, KeyboardInterrupt):
        if _timer is not None:
            _begin(_timer, machine)
        raise
    machine.reset()


def _begin(timer, machine):
    timer.init(period=_FEED_MS, mode=machine.Timer.PERIODIC, callback=_feed)


def _feed(_):
    global _act
    alive = _seen is None or time.ticks_diff(time.ticks_ms(), _seen) < _stall_ms
    if _act is not None and (not alive or time.ticks_diff(time.ticks_ms(), _act_ticks) >= _act_ms):
        act = _act
        _act = None
        act()
    if _wdt is not None and alive:
        _wdt.feed()
