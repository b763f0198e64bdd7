"""The device program, with a client that only remembers and a clock that moves only when every task sleeps."""

import asyncio
import json
import os
import sys
import time

import main
from mqtt_durable.errors import JournalFull, JournalUnavailable, SubscribeRefused

_HERE = __file__.replace("\\", "/").rpartition("/")[0] or "."
_FILE = "%s/_test_main_%s.json" % (_HERE, sys.implementation.name)


class Clock:
    """Time that jumps to the earliest sleeper once all tasks have had some turns."""

    def __init__(self, now=0):
        self.now = now
        self.passed_ms = 0
        self.sleepers = []

    def ticks_ms(self):
        return self.now

    async def sleep_ms(self, ms):
        until = self.passed_ms + ms
        self.sleepers.append(until)
        try:
            for _ in range(4):
                await asyncio.sleep(0)
            while self.passed_ms < until:
                if until == min(self.sleepers):
                    self.now = time.ticks_add(self.now, until - self.passed_ms)
                    self.passed_ms = until
                else:
                    await asyncio.sleep(0)
        finally:
            self.sleepers.remove(until)


class Message:
    def __init__(self, topic, payload=b"", retain=False):
        self.topic = topic
        self.payload = payload
        self.retain = retain
        self.qos = 2
        self.dup = False
        self.token = None


class Client:
    """Remembers what was asked of it.  The lists of failures hold exceptions to raise, one a call; None: none."""

    def __init__(self, config, device=None, link=None):
        self.config = config
        self.link = link
        self.client_id = config["client_id"]
        self.log = []
        self.published = []  # (topic, payload, qos)
        self.handlers = []
        self.publish_failures = []
        self.subscribe_failures = []
        self.start_failure = None
        Client.last = self

    async def __aenter__(self):
        if self.start_failure:
            raise self.start_failure
        self.log.append("start")
        return self

    async def __aexit__(self, *args):
        await asyncio.sleep(0)
        self.log.append("close")

    def on(self, topic_filter, handler):
        self.handlers.append((topic_filter, handler))

    async def subscribe(self, topic_filter, qos=0):
        self.log.append("subscribe %s %d" % (topic_filter, qos))
        self.fail(self.subscribe_failures)
        return qos

    async def publish(self, topic, payload, qos=1, retain=False, mark=None):
        self.fail(self.publish_failures)
        self.published.append((topic, payload, qos))

    def stats(self):
        return {"published": len(self.published)}

    def fail(self, failures):
        failure = failures.pop(0) if failures else None
        if failure:
            raise failure


class Link:
    def rssi(self):
        return -55


class App:
    """In the place of the module app: runs each of steps once, as its main()."""

    def __init__(self, *steps):
        self.steps = list(steps)
        self.starts = 0

    async def main(self, client, config):
        self.starts += 1
        await self.steps.pop(0)(client)


CONFIG = {
    "wifi": None,
    "broker": {"host": "h", "port": 1883, "username": None, "password": None, "keep_alive_s": 60},
    "client_id": "p7",
    "session": {"clean": False, "in_flight": 16},
    "journal": {"home": "auto", "size_kib": 64, "when_full": "raise"},
    "telemetry": {"topic": "t/{client_id}", "every_s": 60, "qos": 1},
    "commands": {"topic": "c/{client_id}/#", "qos": 2},
}


def configured(**changes):
    config = dict(CONFIG)
    config.update(changes)
    return config


def device(link=None, clock=None, **changes):
    config = configured(**changes)
    clock = clock or Clock()
    made = main.Device(config, Client(config), link, clock.sleep_ms, clock.ticks_ms)
    made.clock = clock
    return made


def with_app(app, function, *args):
    """Call function(*args) with app in the place of app.py, None: without one."""
    if app is not None:
        sys.modules["app"] = app
    try:
        return function(*args)
    finally:
        sys.modules.pop("app", None)


def run(made, app=None):
    return with_app(app, asyncio.run, made.run())


def run_for(made, ms, *messages):
    """Run the built-in application that long; then hand it the messages, one a second."""

    async def body():
        task = asyncio.create_task(made.application())
        await made.clock.sleep_ms(ms)
        for message in messages:
            await made.client.handlers[0][1](message)
            await made.clock.sleep_ms(1000)
        if not task.done():
            task.cancel()
        try:
            return await task
        except asyncio.CancelledError:
            return None

    return with_app(None, asyncio.run, body())


async def crash(client):
    raise ValueError("crash of a test")


async def end(client):
    pass


def quietly(function, *args):
    """Call function(*args) without its tracebacks and lines on the console; return (result, lines)."""
    lines = []
    main.print = lambda *words: lines.append(" ".join([str(word) for word in words]))
    main.sys = Silent(lines)
    try:
        return function(*args), lines
    finally:
        main.sys = sys
        del main.print


class Silent:
    """In the place of the module sys."""

    def __init__(self, lines):
        self.lines = lines

    def print_exception(self, error):
        self.lines.append(repr(error))


def run_main(config, app=None, make_client=Client):
    """Write config to a file and run main.main() on it; return (why, lines)."""
    with open(_FILE, "w") as file:
        file.write(config if isinstance(config, str) else json.dumps(config))
    try:
        return quietly(with_app, app, main.main, _FILE, make_client)
    finally:
        os.remove(_FILE)


# the application: its end, its crashes


def test_the_end_of_the_application_closes_the_client():
    made = device()
    why, lines = quietly(run, made, App(end))
    assert why == main.ENDED and made.client.log == ["start", "close"]


def test_a_crash_restarts_the_application_on_the_same_connection():
    made = device()
    app = App(crash, crash, end)
    why, lines = quietly(run, made, app)
    assert why == main.ENDED and app.starts == 3
    assert made.client.log == ["start", "close"]
    assert [line for line in lines if "crash of a test" in line] == [repr(ValueError("crash of a test"))] * 2


def test_the_pause_before_a_restart_grows():
    made = device()
    starts = []

    async def start():
        starts.append(made.clock.passed_ms)
        raise ValueError

    assert quietly(asyncio.run, made.supervise(start))[0] == main.CRASHED
    assert starts == [0, 1000, 3000, 7000, 15000]


def test_a_crash_loop_closes_the_client():
    made = device()
    app = App(*[crash] * 9)
    assert quietly(run, made, app)[0] == main.CRASHED
    assert app.starts == 5 and made.client.log == ["start", "close"]


def test_crashes_far_apart_are_no_loop():
    for began in (0, time.ticks_add(0, -100000)):
        clock = Clock(began)

        async def long_then_crash(client, clock=clock):
            await clock.sleep_ms(60000)
            raise ValueError

        app = App(*([long_then_crash] * 12 + [end]))
        assert quietly(run, device(clock=clock), app)[0] == main.ENDED and app.starts == 13


def test_an_app_that_imports_what_is_missing_crashes():
    made = device()

    class Broken:
        def __getattr__(self, name):
            raise ImportError("no module named 'bmp280'")

    assert quietly(run, made, Broken())[0] == main.CRASHED
    assert made.client.published == []


def test_uptime_outlives_the_wrap_of_the_ticks():
    made = device(clock=Clock(time.ticks_add(0, -1500)))
    asyncio.run(made.clock.sleep_ms(4000))
    assert made.uptime_s() == 4


# what is built in


def test_telemetry_goes_out_at_once_and_then_on_time():
    made = device(link=Link())
    run_for(made, 150500)
    sent = made.client.published
    assert [(topic, qos) for topic, _, qos in sent] == [("t/p7", 1)] * 3
    report = json.loads(sent[2][1])
    assert report["uptime_s"] == 120 and report["rssi_dbm"] == -55 and report["skipped"] == 0
    assert report["stats"] == {"published": 2} and report["free_bytes"] > 0
    assert -40 <= report["temperature_c"] <= 125


def test_telemetry_and_commands_can_be_switched_off():
    made = device(telemetry=None, commands=None)
    run_for(made, 100000)
    assert made.client.published == [] and made.client.log == [] and made.client.handlers == []


def test_commands_are_subscribed_to_once():
    made = device()
    run_for(made, 100000)
    assert made.client.log == ["subscribe c/p7/# 2"]
    assert [topic_filter for topic_filter, _ in made.client.handlers] == ["c/p7/#"]


def test_a_subscription_cut_short_is_made_again():
    made = device()
    made.client.subscribe_failures = [OSError(104), None]
    run_for(made, 20000)
    assert made.client.log == ["subscribe c/p7/# 2"] * 2


def test_a_refused_subscription_is_reported():
    made = device()
    made.client.subscribe_failures = [SubscribeRefused("c/p7/#")]
    lines = quietly(run_for, made, 20000)[1]
    assert len(made.client.log) == 1
    assert lines == ["main.py: no commands: the broker refuses c/p7/#"]


def test_telemetry_without_room_is_counted():
    made = device()
    made.client.publish_failures = [JournalFull("full"), ValueError("too large")]
    lines = quietly(run_for, made, 130000)[1]
    assert len(lines) == 2 and len(made.client.published) == 1
    assert json.loads(made.client.published[0][1])["skipped"] == 2


def answers(*messages, **changes):
    made = device(**changes)
    result = run_for(made, 100, *messages)
    assert result is None
    return [sent for sent in made.client.published if sent[0].startswith("devices/")]


def test_commands_are_answered():
    assert answers(Message("c/p7/ping", b"\xff1")) == [("devices/p7/answers/ping", b"\xff1", 2)]
    ((topic, payload, qos),) = answers(Message("c/p7/stats"))
    assert topic == "devices/p7/answers/stats" and json.loads(payload) == {"published": 1}
    ((topic, payload, qos),) = answers(Message("c/p7/telemetry"))
    assert topic == "devices/p7/answers/telemetry" and json.loads(payload)["uptime_s"] == 0
    ((topic, payload, qos),) = answers(Message("c/p7/x"), telemetry=None)
    assert topic == "devices/p7/answers/x" and json.loads(payload)["error"] == "unknown command"


def test_what_is_no_command_is_ignored():
    assert answers(Message("c/p7/ping", retain=True)) == []
    assert answers(Message("devices/p7/answers/ping")) == []
    assert answers(Message("devices/other/answers/ping")) == []
    assert answers(Message("t/p7")) == []


def test_reset_waits_for_its_acknowledgement():
    made = device()
    assert run_for(made, 31000, Message("c/p7/reset"), Message("c/p7/ping"), Message("c/p7/ping")) == main.RESET
    assert ("devices/p7/answers/reset", b'{"reset": true}', 2) in made.client.published


def test_a_reset_soon_after_the_start_is_refused():
    ((topic, payload, qos),) = answers(Message("c/p7/reset"), telemetry=None)
    assert json.loads(payload) == {"reset": False}


# main() itself


def test_a_bad_configuration_gives_a_line_for_each_mistake():
    bad = configured(session={"clean": 1}, client_id="")
    why, lines = run_main(bad)
    assert lines[:2] == [
        'client_id: found "", expected a text of 1-128 bytes',
        "session.clean: found 1, expected true or false",
    ]
    assert why == "bad configuration" and "REPL" in lines[-1] and len(lines) == 4


def test_main_runs_the_application_and_says_why_it_ended():
    why, lines = run_main(CONFIG, App(end))
    assert why == main.ENDED
    assert lines[0] == "main.py: client p7" and lines[1] == "main.py: " + main.ENDED
    assert Client.last.log == ["start", "close"] and Client.last.link is None


def test_main_makes_a_link_of_the_wifi_section():
    run_main(configured(wifi={"ssid": "net"}), App(end))
    assert Client.last.link._settings["ssid"] == "net"


def test_no_place_for_the_journal_is_one_line():
    def at_once(config, link):
        raise JournalUnavailable("no partition mqj")

    def at_start(config, link):
        client = Client(config)
        client.start_failure = JournalUnavailable("no partition mqj")
        return client

    for make_client in (at_once, at_start):
        why, lines = run_main(CONFIG, None, make_client)
        assert why == "no partition mqj" and lines[0] == "main.py: no partition mqj" and len(lines) == 2


def test_a_fault_in_the_program_leaves_the_board_at_the_repl():
    def broken(config, link):
        raise KeyError("x")

    why, lines = run_main(CONFIG, None, broken)
    assert why == "a fault in the program itself" and lines[0] == repr(KeyError("x"))


def test_ctrl_c_in_the_application_closes_the_client():
    async def interrupted(client):
        await asyncio.sleep(0)
        raise KeyboardInterrupt

    why, lines = run_main(CONFIG, App(interrupted))
    assert why == "Ctrl-C" and Client.last.log == ["start", "close"]


def test_ctrl_c_in_another_task_closes_the_client():
    async def elsewhere():
        raise KeyboardInterrupt

    async def waiting(client):
        task = asyncio.create_task(elsewhere())
        client.task = task
        while True:
            await asyncio.sleep(0)

    why, lines = run_main(CONFIG, App(waiting))
    if hasattr(Client.last.task, "exception"):
        Client.last.task.exception()  # CPython prints what nobody asks for
    assert why == "Ctrl-C" and Client.last.log == ["start", "close"]


def test_a_reset_command_ends_in_a_reset():
    old = main.Device.application

    async def application(self):
        return main.RESET

    main.Device.application = application
    try:
        run_main(CONFIG)
    except SystemExit as error:
        assert "reset" in str(error)
    else:
        raise AssertionError("no reset")
    finally:
        main.Device.application = old
    assert Client.last.log == ["start", "close"]
