"""The device program, which main.py runs: configuration, journal, Wi-Fi, client, application, watchdog.

With nothing but config.json edited the board publishes its telemetry and answers commands (builtin.py).  A file
app.py beside main.py replaces both; it has

    async def main(client, config):

which is started again, after a growing pause, when it raises; client, journal and connection stay as they are
meanwhile, so handlers it has set with client.on() are still set.  Five crashes in a row, each within 60 s of its start,
a bad configuration, no place for the journal, the end of app.main() and Ctrl-C all lead to the REPL, the client closed
in order and the watchdog fed; main() there starts again.

Ctrl-T on the console has the statistics printed, as one line (`make watch` asks for them that way); all other keys but
Ctrl-C are passed over.

With a section "sleep" in the configuration the board is awake only for a moment at a time: see night.py.  Then
the end of app.main() means that it has published, and a crash too is followed by sleep.
"""

import asyncio
import gc
import json
import sys
import time

from micropython import const

from . import load_config, watchdog
from .errors import ConfigError, MQTTError
from .log import ERROR, INFO
from .once import once

_PULSE_MS = const(1000)
_FIRST_PAUSE_MS = const(1000)
_LONGEST_PAUSE_MS = const(30000)
_SHORT_LIFE_MS = const(60000)
_CRASHES = const(5)
_STALLED_MS = const(300000)  # of the client's tasks, whose longest pause between two steps is two minutes
_CTRL_T = b"\x14"  # BSD's key for status
_KEYS = const(64)  # most in a second that are looked at

ENDED = "the application has ended"
CRASHED = "the application crashed %d times in a row, each within %d s" % (_CRASHES, _SHORT_LIFE_MS // 1000)
RESET = "reset on command"


def main(path="config.json", make_client=None):
    """Run the device until something ends it; return why, as a text.  Raises nothing but an application's SystemExit.

    make_client: called as Client(config, link=...); stands in for it.
    """
    why = None
    night = None
    try:
        config = load_config(path)
        link = None
        if config["wifi"]:
            from .wifi import Wifi

            link = Wifi(config["wifi"])
        watchdog.start()
        if config["sleep"]:
            from .night import Night

            night = Night(config["sleep"], link)
        if night and once("cause", "started") == "watchdog":
            # What stood still then would stand still again, and drain the battery: less often this way.
            why = "the watchdog has ended the last waking"
        else:
            if make_client is None:
                from .client import Client as make_client
            device = Device(config, make_client(config, link=link), link)
            if night:
                night.begin_waking()  # not before: formatting a large journal may take longer
            why = _run(device)
    except ConfigError as error:
        for problem in error.problems:
            print(problem)
        why = "bad configuration"
        night = None
    except (MQTTError, ValueError) as error:  # no place for the journal: no waking would be any better
        why = str(error) or repr(error)
        night = None
    except OSError as error:
        why = str(error) or repr(error)
    except KeyboardInterrupt:
        why = "Ctrl-C"
        night = None
    except Exception as error:
        sys.print_exception(error)
        why = "a fault in the program itself"
    finally:
        if why is None or not night:
            watchdog.release()
    print("main.py: %s" % why)
    if why == RESET:
        import machine

        machine.reset()
    if night:
        try:
            night.fall()
        except KeyboardInterrupt:
            why = "Ctrl-C"
        except Exception as error:
            sys.print_exception(error)
            why = "this board cannot sleep"
        watchdog.release()
        print("main.py: %s" % why)
    print("main.py: the board is at the REPL; main() starts again")
    return why


def _run(device):
    """Run device.run() to its end, also the orderly one after a Ctrl-C."""
    loop = asyncio.new_event_loop()
    if hasattr(asyncio, "set_event_loop"):  # CPython
        asyncio.set_event_loop(loop)
    task = loop.create_task(device.run())
    try:
        return loop.run_until_complete(task)
    except KeyboardInterrupt:
        device.listening = False  # what follows the Ctrl-C is for the REPL
        # Ctrl-C mostly strikes while the loop waits, outside every task: they are all still there to be ended.
        # Where it strikes this very task, the task has closed the client before passing it on: CPython says done(),
        # MicroPython refuses to cancel it with a RuntimeError.
        if task.done():
            task.exception()  # asked for, or CPython prints it
        else:
            try:
                task.cancel()
                loop.run_until_complete(task)
            except (asyncio.CancelledError, RuntimeError):
                pass
        raise
    finally:
        loop.close()
        if not hasattr(asyncio, "set_event_loop"):
            asyncio.new_event_loop()  # MicroPython's only loop: forget what tasks the application has left in it


class Device:
    """One run of the device.  config: complete; client: made, not started; link: Wifi or None.

    sleep_ms, ticks_ms: stand in for asyncio.sleep_ms and time.ticks_ms.
    """

    def __init__(self, config, client, link=None, sleep_ms=None, ticks_ms=None):
        self.config = config
        self.client = client
        self.link = link
        self.sleep_ms = sleep_ms or asyncio.sleep_ms
        self.ticks_ms = ticks_ms or time.ticks_ms
        self._uptime_ms = 0
        self._ticks = self.ticks_ms()
        self._builtin = None
        self.keys = Keys()
        self.listening = False  # to the keys: only while the client runs

    async def run(self):
        """Start the client and keep the application running; return why it ended.

        Raises JournalUnavailable, ValueError or OSError from the start of the client.
        """
        cause = once("cause", "reset_cause")
        if cause:
            self.client.log.add(INFO, "reset cause: " + cause)
        pulse = asyncio.create_task(self._pulse())
        try:
            async with self.client:
                # Not before: formatting a large journal takes longer than any pause a running program may make.
                watchdog.guard()
                print("main.py: client", self.client.client_id)
                self.listening = True
                try:
                    if self.config["sleep"]:
                        return await self.cycle(self.application)
                    return await self.supervise(self.application)
                finally:
                    self.listening = False
        finally:
            pulse.cancel()
            await asyncio.sleep(0)  # for it to end within the loop

    async def supervise(self, start):
        """Run start() until it returns (its result, or ENDED) or has crashed too often (CRASHED)."""
        crashes = 0
        log = self.client.log
        while True:
            began_s = self.uptime_s()
            try:
                log.add(INFO, "the application begins")
                why = await start() or ENDED
                log.add(INFO, why)
                return why
            except Exception as error:
                log.add(ERROR, "application", error)
                sys.print_exception(error)
            gc.collect()
            if (self.uptime_s() - began_s) * 1000 >= _SHORT_LIFE_MS:
                crashes = 0
            crashes += 1
            if crashes >= _CRASHES:
                log.add(ERROR, CRASHED)
                return CRASHED
            await self.sleep_ms(min(_FIRST_PAUSE_MS << (crashes - 1), _LONGEST_PAUSE_MS))

    async def cycle(self, start):
        """Be awake once, between two sleeps; see night.cycle()."""
        from .night import cycle

        return await cycle(self, start)

    async def application(self):
        """Run app.main() where there is an app, else what is built in."""
        try:
            import app
        except ImportError as error:
            # The same error comes from an app that imports what is not there; that one is a crash.
            if not str(error).lower().startswith("no module named 'app'"):
                raise
        else:
            await app.main(self.client, self.config)
            return ENDED
        if self._builtin is None:
            from .builtin import Builtin

            self._builtin = Builtin(self)
        return await self._builtin.run() and RESET

    def uptime_s(self):
        """Return the whole seconds since the start.  Must be called every few days: ticks wrap after 12."""
        now = self.ticks_ms()
        self._uptime_ms += time.ticks_diff(now, self._ticks)
        self._ticks = now
        return self._uptime_ms // 1000

    async def _pulse(self):
        while True:
            # The loop turns, and so does the client: connected, or trying to be.
            if self.client.stalled_ms() < _STALLED_MS:
                watchdog.alive()
            self.uptime_s()
            self._obey_keys()
            await self.sleep_ms(_PULSE_MS)

    def _obey_keys(self):
        for _ in range(_KEYS):
            key = self.listening and self.keys.read()
            if key == _CTRL_T:
                print("main.py: stats", json.dumps(dict(self.client.stats(), connected=self.client.connected)))
            if not key:
                break


class Keys:
    """The keys that are pressed on the console; none where it cannot be asked."""

    def __init__(self):
        self._poll = None
        try:
            import select

            poll = select.poll()
            poll.register(sys.stdin, select.POLLIN)
            self._poll = poll
        except (ImportError, AttributeError, OSError, TypeError, ValueError):
            pass

    def read(self):
        """Return the next key as bytes, b"" if there is none.  Does not wait."""
        key = b""
        try:
            if self._poll and self._poll.poll(0):
                key = sys.stdin.buffer.read(1)
        except OSError:
            pass
        return key or b""
