"""The hardware watchdog, which once started can be stopped on neither board.

Owns machine.WDT and the one machine.Timer that feeds it.  Feeding from a timer and not from the program has three
reasons: a DNS look-up without an answer stands still for up to 14 s, longer than the RP2040 can wait; the board must
stay alive at the REPL when the program has ended; and it must after a soft reset that runs no main.py (mpremote), which
ends every timer.  So boot.py calls start(), and from guard() to release() the timer feeds only while the program says
alive().  Where machine has no WDT or no Timer, all of it does nothing.
"""

import time

_FEED_MS = 1000
_STALL_MS = 60000

_wdt = None
_timer = None
_seen = None  # ticks_ms of the last alive(); None: feed unconditionally
_stall_ms = _STALL_MS


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
    timer = _make_timer(machine)
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
    """Let the timer feed for good: the program has ended in order."""
    global _seen
    _seen = None


def _make_timer(machine):
    try:
        timer = machine.Timer(-1)
    except ValueError:  # an ESP32 without software timers
        timer = machine.Timer(0)
    timer.init(period=_FEED_MS, mode=machine.Timer.PERIODIC, callback=_feed)
    return timer


def _feed(_):
    if _wdt is not None and (_seen is None or time.ticks_diff(time.ticks_ms(), _seen) < _stall_ms):
        _wdt.feed()
