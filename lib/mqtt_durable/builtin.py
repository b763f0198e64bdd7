"""What a board does that has no app.py."""

import asyncio
import gc
import json

from micropython import const

from .errors import JournalFull, MQTTError, SubscribeRefused
from .once import once

_RESET_AFTER_S = const(30)


class Builtin:
    """The telemetry and the commands of a board without an app.py.

    Telemetry is a JSON object: uptime_s, started (by what, see cause.started()), free_bytes, temperature_c where there
    is a sensor, rssi_dbm while on Wi-Fi, skipped (telemetry the full journal had no room for) and stats, the client's
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
        self._started = once("cause", "started")
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
        """Publish telemetry and obey commands until one of them is a reset; return True then.

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
                    return True
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
        values = {"started": self._started, "temperature_c": temperature_c(), "rssi_dbm": link and link.rssi()}
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
