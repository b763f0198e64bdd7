"""The device program: configuration, journal, Wi-Fi, client, application, watchdog.

With nothing but config.json edited the board publishes its telemetry and answers commands (class Builtin).  A file
app.py beside this one replaces both; it has

    async def main(client, config):

which is started again, after a growing pause, when it raises; client, journal and connection stay as they are
meanwhile, so handlers it has set with client.on() are still set.  Five crashes in a row, each within 60 s of its start,
a bad configuration, no place for the journal, the end of app.main() and Ctrl-C all lead to the REPL, the client closed
in order and the watchdog fed; main() there starts again.

Ctrl-T on the console has the statistics printed, as one line (`make watch` asks for them that way); all other keys but
Ctrl-C are passed over.

With a section "sleep" in the configuration the board is awake only for a moment at a time: see Device.cycle().  Then
the end of app.main() means that it has published, and a crash too is followed by sleep.
"""

import asyncio
import gc
import json
import sys
import time

from mqtt_durable import load_config, watchdog
from mqtt_durable.errors import ConfigError, JournalFull, MQTTError, SubscribeRefused
from mqtt_durable.log import ERROR, INFO

_PULSE_MS = 1000
_FIRST_PAUSE_MS = 1000
_LONGEST_PAUSE_MS = 30000
_SHORT_LIFE_MS = 60000
_CRASHES = 5
_RESET_AFTER_S = 30
_STALLED_MS = 300000  # of the client's tasks, whose longest pause between two steps is two minutes
_POLL_MS = 50
_CTRL_T = b"\x14"  # BSD's key for status
_KEYS = 64  # most in a second that are looked at
_CLOSING_MS = 20000  # close() takes 4 s, a name look-up in the way 14 s

ENDED = "the application has ended"
CRASHED = "the application crashed %d times in a row, each within %d s" % (_CRASHES, _SHORT_LIFE_MS // 1000)
RESET = "reset on command"
SLEEP = "the waking is over"

# What machine.reset_cause() says.
_STARTS = (
    ("PWRON_RESET", "power"),
    ("HARD_RESET", "reset"),
    ("WDT_RESET", "watchdog"),
    ("DEEPSLEEP_RESET", "sleep"),
    ("SOFT_RESET", "soft reset"),
)


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
            from mqtt_durable.wifi import Wifi

            link = Wifi(config["wifi"])
        watchdog.start()
        if config["sleep"]:
            night = Night(config["sleep"], link)
        if night and started() == "watchdog":
            # What stood still then would stand still again, and drain the battery: less often this way.
            why = "the watchdog has ended the last waking"
        else:
            if make_client is None:
                from mqtt_durable.client import Client as make_client
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


def started():
    """Return what started the board: "power", "reset", "watchdog", "sleep", "soft reset"; None if that is not known.

    A Pico knows only "power" and "restart", which is all of the others.
    """
    try:
        import machine

        cause = machine.reset_cause()
    except (ImportError, AttributeError):
        return None
    for name, text in _STARTS:
        if cause == getattr(machine, name, None):
            return text if text == "power" or hasattr(machine, "DEEPSLEEP_RESET") else "restart"
    return None


def least_ms(settings):
    """Return how long this waking has to last: after a power-on or a reset somebody may want to get in."""
    return 0 if started() in ("sleep", "restart") else settings["reach_s"] * 1000


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
        cause = reset_cause()
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
        while True:
            began_s = self.uptime_s()
            try:
                self.client.log.add(INFO, "the application begins")
                why = await start() or ENDED
                self.client.log.add(INFO, why)
                return why
            except Exception as error:
                self.client.log.add(ERROR, "application", error)
                sys.print_exception(error)
            gc.collect()
            if (self.uptime_s() - began_s) * 1000 >= _SHORT_LIFE_MS:
                crashes = 0
            crashes += 1
            if crashes >= _CRASHES:
                self.client.log.add(ERROR, CRASHED)
                return CRASHED
            await self.sleep_ms(min(_FIRST_PAUSE_MS << (crashes - 1), _LONGEST_PAUSE_MS))

    async def cycle(self, start):
        """Be awake once; return SLEEP.

        start() measures and publishes; then the broker is to have all of it, and linger_s long nothing must have come
        from there: commands that waited there come within moments of the connection, and their answers are part of it.
        After awake_s that is given up: what is unsent waits in the journal.  Nothing that start() does, raise or hang,
        keeps the board awake longer.
        """
        settings = self.config["sleep"]
        least = least_ms(settings)
        most = most_ms(settings)
        linger = settings["linger_s"] * 1000
        if least:
            print("main.py: awake for %d s at least; Ctrl-C ends at the REPL" % settings["reach_s"])
        task = asyncio.create_task(self._work(start))
        quiet = passed = 0
        received = self.client.received
        began = self.ticks_ms()
        while passed < most and not (task.done() and quiet >= linger and passed >= least):
            await self.sleep_ms(_POLL_MS)
            passed = time.ticks_diff(self.ticks_ms(), began)
            if not self.client.idle or received != self.client.received:
                received = self.client.received
                quiet = 0
            else:
                quiet += _POLL_MS
        task.cancel()
        return SLEEP

    async def _work(self, start):
        try:
            await start()
        except Exception as error:
            sys.print_exception(error)
        await self.client.drain()

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
            self._builtin = Builtin(self)
        return await self._builtin.run()

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


class Builtin:
    """The telemetry and the commands of a board without an app.py.

    Telemetry is a JSON object: uptime_s, started (by what, see started()), free_bytes, temperature_c where there is a
    sensor, rssi_dbm while on Wi-Fi, skipped (telemetry the full journal had no room for) and stats, the client's
    statistics.  The first goes out at once.

    A command is the last level of the topic of a message that matches commands.topic.  The answer goes to
    devices/CLIENT_ID/answers/COMMAND with the QoS of commands:

        ping       the payload, as it came
        telemetry  the telemetry object of this moment
        stats      the client's statistics
        log        {"log": [[uptime_s, level, text, times], ...]}, the client's last events, oldest first; of many only
                   the newest that one message can hold
        reset      {"reset": true}, then the board ends in order and starts again; not in its first 30 s, so that a
                   command that is delivered twice cannot hold it in a loop; and not between two sleeps
        another    {"error": "unknown command", "commands": [...]}

    A retained message is no command, for it would come again after every start.  Neither is a message on a topic that
    has a level "answers" or is the telemetry's: with a wide filter a board would answer its own answers.
    """

    def __init__(self, device):
        self._device = device
        self._client = device.client
        self._skipped = 0
        self._reset = False
        self._sleeps = device.config["sleep"] is not None
        config = device.config
        client_id = device.client.client_id
        self._answers = "devices/%s/answers/" % client_id
        self._telemetry = config["telemetry"]
        self._topic = self._telemetry and self._telemetry["topic"].replace("{client_id}", client_id)
        self._commands = config["commands"]
        self._filter = self._commands and self._commands["topic"].replace("{client_id}", client_id)
        if self._commands:
            self._client.on(self._filter, self.obey)

    async def run(self):
        """Publish telemetry and obey commands until one of them is a reset; return RESET then.

        Between two sleeps: publish once, and return when the commands are subscribed to.
        """
        if self._sleeps:
            if self._telemetry:
                await self._publish(self._topic, self.report(), self._telemetry["qos"])
            if self._commands:
                await self._listen()
            return None
        listening = self._commands and asyncio.create_task(self._listen())
        sleep_ms = self._device.sleep_ms
        wait_s = 0
        try:
            while True:
                if self._telemetry and wait_s <= 0:
                    await self._publish(self._topic, self.report(), self._telemetry["qos"])
                    wait_s = self._telemetry["every_s"]
                await sleep_ms(1000)
                wait_s -= 1
                if self._reset:
                    # Time for the message that asked for it to be acknowledged, or it would come again.
                    await sleep_ms(1000)
                    return RESET
        finally:
            if listening:
                listening.cancel()

    async def obey(self, message):
        """Handle one command."""
        levels = message.topic.split("/")
        if message.retain or "answers" in levels or message.topic == self._topic:
            return
        command = levels[-1]
        if command == "ping":
            answer = message.payload
        elif command == "telemetry":
            answer = self.report()
        elif command == "stats":
            answer = self._client.stats()
        elif command == "log":
            answer = {"log": self._client.log.events()}
        elif command == "reset":
            self._reset = not self._sleeps and self._device.uptime_s() >= _RESET_AFTER_S
            answer = {"reset": self._reset}
        else:
            answer = {"error": "unknown command", "commands": ["ping", "telemetry", "stats", "log", "reset"]}
        await self._publish(self._answers + command, answer, self._commands["qos"])

    def report(self):
        """Return the telemetry as a dict."""
        gc.collect()
        report = {"uptime_s": self._device.uptime_s(), "skipped": self._skipped, "stats": self._client.stats()}
        if hasattr(gc, "mem_free"):
            report["free_bytes"] = gc.mem_free()
        link = self._device.link
        values = {"started": started(), "temperature_c": temperature_c(), "rssi_dbm": link and link.rssi()}
        for name, value in values.items():
            if value is not None:
                report[name] = value
        return report

    async def _publish(self, topic, payload, qos):
        """Publish an object as JSON, or bytes as they are; count it when there is no room for it."""
        try:
            while True:
                data = json.dumps(payload).encode() if type(payload) is dict else bytes(payload)
                try:
                    await self._client.publish(topic, data, qos=qos)
                    return
                except ValueError:  # larger than the journal can ever hold
                    events = payload.get("log") if type(payload) is dict else None
                    if not events:
                        raise
                    del events[: 1 + len(events) // 8]
        except (JournalFull, ValueError) as error:
            self._skipped += 1
            print("main.py: not published to %s: %s" % (topic, error))

    async def _listen(self):
        while True:
            try:
                await self._client.subscribe(self._filter, self._commands["qos"])
                return
            except SubscribeRefused as error:
                print("main.py: no commands: the broker refuses", error)
                return
            except (MQTTError, OSError):  # the connection was lost before the answer came
                await self._device.sleep_ms(5000)


def reset_cause():
    """Return the name of the board's last reset, None where it does not tell.

    A Pico resets itself by its watchdog, so machine.reset() is WDT_RESET there, too.
    """
    try:
        import machine

        cause = machine.reset_cause()
    except (ImportError, AttributeError):
        return None
    for name in ("PWRON_RESET", "HARD_RESET", "WDT_RESET", "DEEPSLEEP_RESET", "SOFT_RESET"):
        if getattr(machine, name, None) == cause:
            return name
    return str(cause)


def temperature_c():
    """Return the chip's temperature in degrees Celsius, None where it has no sensor.

    Of the chip, not of the room, and not calibrated: some degrees off.
    """
    try:
        import esp32

        if hasattr(esp32, "mcu_temperature"):
            return esp32.mcu_temperature()
        return round((esp32.raw_temperature() - 32) / 1.8, 1)  # the first ESP32 gives Fahrenheit
    except (ImportError, AttributeError, OSError):
        pass
    try:
        from machine import ADC

        # RP2040 and RP2350 data sheets: 0.706 V at 27 degrees, 1.721 mV less for each degree more.
        volts = ADC(ADC.CORE_TEMP).read_u16() * 3.3 / 65535
        return round(27 - (volts - 0.706) / 0.001721, 1)
    except (ImportError, AttributeError):
        return None


if __name__ == "__main__":
    main()
