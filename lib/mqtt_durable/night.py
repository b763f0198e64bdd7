"""The device between two sleeps, where the configuration has a section sleep: how long it is awake, and its end."""

import asyncio
import sys
import time

from micropython import const

from . import watchdog
from .once import once

_POLL_MS = const(50)
_CLOSING_MS = const(20000)  # close() takes 4 s, a name look-up in the way 14 s

SLEEP = "the waking is over"


def least_ms(settings):
    """Return how long this waking has to last: after a power-on or a reset somebody may want to get in."""
    return 0 if once("cause", "started") in ("sleep", "restart") else settings["reach_s"] * 1000


def most_ms(settings):
    """Return how long this waking may last, until the client is closed."""
    return max(settings["awake_s"] * 1000, least_ms(settings))


class Night:
    """The way to sleep.  settings: the section sleep of the configuration; link: Wifi or None."""

    def __init__(self, settings, link):
        self._settings = settings
        self._link = link
        self._began = time.ticks_ms()

    def begin_waking(self):
        """Make sure that this waking ends: a program that stands still is put to sleep, however it does that."""
        watchdog.limit(most_ms(self._settings) + _CLOSING_MS, self.fall)

    def fall(self):
        """Switch the radio off and sleep until the next waking is due; then the board starts anew."""
        if self._link:
            self._link.down()
        # 1 s: a waking that took longer than every_s is not to be followed at once by the next.
        awake = time.ticks_diff(time.ticks_ms(), self._began)
        ms = max(self._settings["every_s"] * 1000 - awake, 1000)
        print("main.py: asleep for %d s" % (ms // 1000))
        watchdog.sleep(ms)


async def cycle(device, start):
    """Be awake once; return SLEEP.

    device: a Device.  start() measures and publishes; then the broker is to have all of it, and linger_s long nothing
    must have come from there: commands that waited there come within moments of the connection, and their answers are
    part of it.  After awake_s that is given up: what is unsent waits in the journal.  Nothing that start() does, raise
    or hang, keeps the board awake longer.
    """
    settings = device.config["sleep"]
    client = device.client
    least = least_ms(settings)
    most = most_ms(settings)
    linger = settings["linger_s"] * 1000
    if least:
        print("main.py: awake for %d s at least; Ctrl-C ends at the REPL" % settings["reach_s"])
    task = asyncio.create_task(_work(client, start))
    quiet = passed = 0
    received = client.received
    began = device.ticks_ms()
    while passed < most and not (task.done() and quiet >= linger and passed >= least):
        await device.sleep_ms(_POLL_MS)
        passed = time.ticks_diff(device.ticks_ms(), began)
        if not client.idle or received != client.received:
            received = client.received
            quiet = 0
        else:
            quiet += _POLL_MS
    task.cancel()
    return SLEEP


async def _work(client, start):
    try:
        await start()
    except Exception as error:
        sys.print_exception(error)
    await client.drain()
