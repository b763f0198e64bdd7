"""Stand-in for machine: what a program of this project calls, doing nothing but remembering.

A call that never returns on a board (reset, deepsleep) ends the program here by SystemExit, whose argument says which
it was; whoever runs the program starts it again, with the new cause in the environment as MQTT_DURABLE_RESET_CAUSE.  On
the unix port of MicroPython the built-in module's names stay.

Sleep and its watchdog are those of MicroPython 1.28; the lines are those of 1.29-preview.
"""

import os
import sys

if sys.implementation.name == "micropython":
    from umachine import *  # noqa: F403  time_pulse_us, ...

PWRON_RESET = 1
WDT_RESET = 3
# Only the ESP32 tells these (ports/esp32/modmachine.c:61-67): on the Pico deepsleep() and reset(), too, end in a reset
# by the watchdog (ports/rp2/modmachine.c:57, 74, 81, 368).
_ESP32 = {"HARD_RESET": 2, "DEEPSLEEP_RESET": 4, "SOFT_RESET": 5}

board = ""
cause = PWRON_RESET  # what reset_cause() returns
slept = []  # the ms of each sleep that was begun, for tests
on_sleep = None  # called with the ms that a lightsleep() lasts: a test's clock
wdt = None  # the watchdog, once one is started
temperature_c = 21.0  # what the Pico's sensor measures
_rtc_memory = b""
_armed = []  # the timers that would fire


class _Memory:
    """Read-only access by address to the Pico's flash, which rp2 has."""

    def __init__(self, size):
        self._size = size

    def __getitem__(self, address):
        import rp2

        if address % self._size:
            raise ValueError("address %08x is not aligned to %d bytes" % (address, self._size))
        return int.from_bytes(rp2.memory(address - 0x10000000, self._size), "little")


mem8 = _Memory(1)
mem16 = _Memory(2)
mem32 = _Memory(4)


def use_board(name):
    """Become "esp32" or "rp2" (its constants, limits and sensor), just powered on."""
    global board, cause, wdt, on_sleep, _rtc_memory
    board = name
    module = globals()
    for key in _ESP32:
        module.pop(key, None)
    if name == "esp32":
        module.update(_ESP32)
    cause = PWRON_RESET
    wdt = None
    on_sleep = None
    del slept[:], _armed[:]
    _rtc_memory = b""


def reset():
    """End the program; the next start is a hard reset."""
    raise SystemExit("reset")


def soft_reset():
    """End the program; on a board the interpreter starts again."""
    raise SystemExit("soft_reset")


def deepsleep(time_ms=None):
    """End the program; on a board it starts again after time_ms.

    On the Pico that is lightsleep() with a reset behind it (ports/rp2/modmachine.c:368); on the ESP32 the digital part
    of the chip is without power meanwhile (ports/esp32/modmachine.c:219), so no watchdog runs.
    """
    if board == "rp2":
        lightsleep(time_ms)
        reset()
    slept.append(time_ms)
    raise SystemExit("deepsleep")


def lightsleep(time_ms=None):
    """Return at once, however long a board would sleep: on_sleep(ms) is told.

    On the Pico (ports/rp2/modmachine.c:156): ValueError for 2**32 us and more (:167), any timer's interrupt ends it (at
    the __wfi() of :308), and the watchdog's counter goes on; if it runs out, an RP2040 is locked up until its power is
    cut (micropython#17228, mended after 1.28).  SystemExit("locked up") stands for that.
    """
    slept.append(time_ms)
    if board == "rp2" and time_ms is not None:
        if time_ms >= (1 << 32) // 1000:
            raise ValueError("sleep too long")
        if _armed:
            time_ms = min([time_ms] + [timer.period_ms for timer in _armed])
        if wdt and wdt.hungry_ms + time_ms >= wdt.timeout_ms:
            raise SystemExit("locked up")
        if wdt:
            wdt.hungry_ms += time_ms
    if on_sleep:
        on_sleep(time_ms)


def reset_cause():
    """Return why the program was started."""
    return cause


def unique_id():
    """Return six bytes that are this device's own."""
    return b"\x24\x0a\xc4\x00\x01\x02"


def freq(hz=None):
    """Return the processor's clock in Hz."""
    return 160000000 if board == "esp32" else 125000000


def idle():
    """Wait for an interrupt: there is none."""


class WDT:
    """The watchdog.  It never bites: timeout_ms and feeds, the number of feed() calls, are for tests.

    Raises ValueError for a timeout the board cannot do: 0 on both, over 8388 ms on rp2.
    """

    def __init__(self, id=0, timeout=5000):
        global wdt
        if timeout <= 0:
            raise ValueError("WDT timeout too short")
        if board == "rp2" and timeout > 8388:
            raise ValueError("timeout exceeds 8388")
        self.timeout_ms = timeout
        self.feeds = 0
        self.hungry_ms = 0  # of light sleep since the last feed()
        wdt = self

    def feed(self):
        """Count."""
        self.feeds += 1
        self.hungry_ms = 0


class RTC:
    """Only the memory that survives deep sleep (ESP32), 2048 bytes at most; ValueError for more."""

    def memory(self, data=None):
        """Return the bytes kept, or keep data."""
        global _rtc_memory
        if data is None:
            return _rtc_memory
        if len(data) > 2048:
            raise ValueError("buffer too long")
        _rtc_memory = bytes(data)


class ADC:
    """Reads the Pico's temperature sensor on channel CORE_TEMP, half the range on every other."""

    CORE_TEMP = 4

    def __init__(self, channel):
        self._channel = channel

    def read_u16(self):
        """Return 0..65535 for 0..3.3 V."""
        if self._channel != self.CORE_TEMP:
            return 32768
        volts = 0.706 - (temperature_c - 27) * 0.001721  # RP2040 data sheet, section 4.9.5
        return int(volts / 3.3 * 65535 + 0.5)


class Pin:
    """A pin that keeps what it was given.  id: a number, or a name as "LED"."""

    IN = 0
    OUT = 1
    PULL_UP = 2

    def __init__(self, id, mode=IN, pull=None, value=0):
        self.id = id
        self._value = value

    def value(self, value=None):
        """Return 0 or 1, or set it."""
        if value is None:
            return self._value
        self._value = 1 if value else 0

    def on(self):
        """Set 1."""
        self._value = 1

    def off(self):
        """Set 0."""
        self._value = 0

    def toggle(self):
        """Change to the other."""
        self._value ^= 1


class Timer:
    """A timer that fires only when a test calls fire()."""

    ONE_SHOT = 0
    PERIODIC = 1

    def __init__(self, id=-1, **settings):
        self._callback = None
        self.period_ms = 0
        if settings:
            self.init(**settings)

    def init(self, mode=PERIODIC, period=-1, freq=-1, callback=None):
        """Arm: callback(timer) at each fire()."""
        self._mode = mode
        self._callback = callback
        self.period_ms = period
        if self not in _armed:
            _armed.append(self)

    def deinit(self):
        """Disarm."""
        self._callback = None
        if self in _armed:
            _armed.remove(self)

    def fire(self):
        """Do what the time being up would do."""
        callback = self._callback
        if callback is not None:
            if self._mode == self.ONE_SHOT:
                self.deinit()
            callback(self)


use_board("esp32")
cause = int(os.getenv("MQTT_DURABLE_RESET_CAUSE") or PWRON_RESET)
