"""The device program, with a client that only remembers and a clock that moves only when every task sleeps."""

import asyncio
import gc
import json
import os
import sys
import time

import machine
import network
from mqtt_durable import builtin, night, watchdog, wifi
from mqtt_durable import device as main
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
            while self.passed_ms < until:
                for _ in range(4):  # whoever has just woken up may want to sleep again
                    await asyncio.sleep(0)
                if until == min(self.sleepers) and self.passed_ms < until:
                    self.now = time.ticks_add(self.now, until - self.passed_ms)
                    self.passed_ms = until
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


class Log(list):
    """What was asked of the client; the events that are added stand beside it."""

    def __init__(self):
        super().__init__()
        self.added = []

    def add(self, level, text, error=None, trace=False):
        self.added.append(text if error is None else text + ": " + repr(error))

    def events(self):
        return [(n, "info", text, 1) for n, text in enumerate(self.added)]


class Client:
    """Remembers what was asked of it.  The lists of failures hold exceptions to raise, one a call; None: none."""

    def __init__(self, config, device=None, link=None):
        self.config = config
        self.link = link
        self.client_id = config["client_id"]
        self.log = Log()
        self.published = []  # (topic, payload, qos)
        self.handlers = []
        self.publish_failures = []
        self.subscribe_failures = []
        self.start_failure = None
        self.received = 0
        self.idle = True
        self.hears = None  # the broker: a coroutine function that ends when it has everything
        self.stalled = 0
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

    async def drain(self):
        self.log.append("drain")
        if self.hears:
            await self.hears()

    def stalled_ms(self):
        return self.stalled

    def stats(self):
        return {"published": len(self.published)}

    def fail(self, failures):
        failure = failures.pop(0) if failures else None
        if failure:
            raise failure


class Link:
    downs = 0

    def rssi(self):
        return -55

    def down(self):
        self.downs += 1


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
    "sleep": None,
}
SLEEP = {"every_s": 600, "awake_s": 30, "linger_s": 1, "reach_s": 10}


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
    modules = main, night, builtin
    for module in modules:
        module.print = lambda *words: lines.append(" ".join([str(word) for word in words]))
        module.sys = Silent(lines)
    try:
        return function(*args), lines
    finally:
        for module in modules:
            module.sys = sys
            del module.print


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


def test_log_answers_with_the_events():
    made = device()
    run_for(made, 1000, Message("c/p7/log"))
    topic, payload, qos = made.client.published[-1]
    assert topic == "devices/p7/answers/log" and qos == 2
    assert json.loads(payload)["log"] == [list(event) for event in made.client.log.events()]


def test_log_that_no_message_can_hold_loses_its_oldest_events():
    made = device()
    for n in range(32):
        made.client.log.add(2, "event %d" % n)
    made.client.publish_failures = [None] + [ValueError("too large")] * 5  # the first is the telemetry
    why, lines = quietly(run_for, made, 1000, Message("c/p7/log"))
    log = json.loads(made.client.published[-1][1])["log"]
    assert 8 <= len(log) < 24 and log[-1][2] == "event 31"
    assert made._builtin._skipped == 0 and lines == []


def test_no_log_fits():
    made = device()
    made.client.log.add(2, "event")
    made.client.publish_failures = [None] + [ValueError("too large")] * 9
    why, lines = quietly(run_for, made, 1000, Message("c/p7/log"))
    assert made._builtin._skipped == 1 and len(made.client.published) == 1


def test_application_and_reset_are_events():
    made = device()
    quietly(run, made, App(crash, end))
    assert made.client.log.added[-4:] == [
        "the application begins",
        "application: " + repr(ValueError("crash of a test")),
        "the application begins",
        main.ENDED,
    ]
    assert made.client.log.added[:-4] in (["reset cause: PWRON_RESET"], [])  # a host may have no machine


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
    bad = configured(session={"clean": 1}, client_id=7)
    why, lines = run_main(bad)
    assert lines[:2] == [
        "client_id: found 7, expected a text of 1-128 bytes",
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


class Keyboard:
    """In the place of Keys."""

    def __init__(self, pressed):
        self.pressed = [bytes((key,)) for key in pressed]

    def read(self):
        return self.pressed.pop(0) if self.pressed else b""


def test_ctrl_t_on_the_console_prints_the_statistics_and_other_keys_are_passed_over():
    made = device()
    made.client.connected = True
    made.keys = Keyboard(b"x\x14\r")

    async def pressing(client):
        await made.clock.sleep_ms(1500)
        made.keys.pressed.append(b"\x14")
        await made.clock.sleep_ms(1000)
        return None

    _, lines = quietly(run, made, App(pressing))
    answers = [json.loads(line[15:]) for line in lines if line.startswith("main.py: stats ")]
    assert answers == [{"published": 0, "connected": True}] * 2
    assert made.keys.pressed == []


def test_what_is_typed_before_the_client_runs_or_behind_a_ctrl_c_is_left_for_others():
    made = device()
    made.keys = Keyboard(b"\x02\x01")
    left = []

    class Closing(Client):
        async def __aenter__(self):
            made._obey_keys()
            left.append(len(made.keys.pressed))
            made.keys.pressed.clear()
            return await super().__aenter__()

        async def __aexit__(self, *args):
            made._obey_keys()
            left.append(len(made.keys.pressed))
            await super().__aexit__(*args)

    async def interrupted(client):
        made.keys.pressed.append(b"\x02")
        raise KeyboardInterrupt

    made.client = Closing(CONFIG)
    try:
        quietly(with_app, App(interrupted), main._run, made)
    except KeyboardInterrupt:
        pass
    assert left == [2, 1] and not made.listening


def test_a_console_that_cannot_be_asked_has_no_keys():
    class Ended:
        buffer = None

    class Without:
        stdin = Ended()

    main.sys = Without
    try:
        assert main.Keys().read() == b""
    finally:
        main.sys = sys


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


# sleep: one waking


def waking(cause, *steps, **options):
    """Be awake once with an app of these steps, without any with what is built in; return (device, its ms, lines)."""
    machine.use_board(options.pop("board", "esp32"))
    machine.cause = cause
    settings = dict(SLEEP)
    settings.update(options.pop("settings", {}))
    hears = options.pop("hears", None)
    made = device(sleep=settings, **options)
    made.client.clock = made.clock
    if hears:
        made.client.hears = hears
        made.client.idle = False
    cycle = made.cycle
    ended = []

    async def timed(start):
        why = await cycle(start)
        ended.append(made.clock.passed_ms)
        return why

    made.cycle = timed
    try:
        why, lines = quietly(run, made, App(*steps) if steps else None)
    finally:
        machine.use_board("esp32")
    assert why == night.SLEEP and made.client.log[0] == "start" and made.client.log[-1] == "close"
    return made, ended[0], lines


WOKEN = 4
POWER = 1


async def forever():
    await asyncio.Event().wait()


async def hang(client):
    await forever()


def test_a_waking_ends_when_all_is_said_and_nothing_more_comes():
    made, ms, lines = waking(WOKEN)
    assert [sent[0] for sent in made.client.published] == ["t/p7"]
    assert made.client.log == ["start", "subscribe c/p7/# 2", "drain", "close"]
    assert 1000 <= ms <= 1200 and lines == ["main.py: client p7"]


def test_the_end_of_the_app_is_no_end_but_of_the_waking():
    made, ms, lines = waking(WOKEN, end)
    assert made.client.log == ["start", "drain", "close"] and 1000 <= ms <= 1200


def test_without_linger_a_waking_ends_with_the_last_acknowledgement():
    made, ms, lines = waking(WOKEN, end, settings={"linger_s": 0})
    assert ms <= 100


def test_a_hanging_application_is_put_to_sleep():
    made, ms, lines = waking(WOKEN, hang)
    assert 30000 <= ms <= 30200 and made.client.log == ["start", "close"]


def test_an_application_that_does_not_let_itself_be_cancelled_is_put_to_sleep():
    async def stubborn(client):
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            await client.clock.sleep_ms(3600000)

    made, ms, lines = waking(WOKEN, stubborn)
    assert 30000 <= ms <= 30200


def test_a_crashing_application_is_put_to_sleep_when_what_it_published_is_delivered():
    made, ms, lines = waking(WOKEN, crash)
    assert made.client.log == ["start", "drain", "close"] and ms <= 1200
    assert repr(ValueError("crash of a test")) in lines


def test_a_waking_without_a_broker_is_given_up():
    made, ms, lines = waking(WOKEN, end, hears=forever)
    assert 30000 <= ms <= 30200 and made.client.log == ["start", "drain", "close"]


def test_commands_that_come_prolong_a_waking():
    async def commanded(client):
        async def broker():
            for _ in range(5):
                await client.clock.sleep_ms(900)
                client.received += 1

        client.task = asyncio.create_task(broker())

    assert 5500 <= waking(WOKEN, commanded)[1] <= 5700


def test_a_message_with_its_handler_prolongs_a_waking():
    async def handling(client):
        client.idle = False

        async def handler():
            await client.clock.sleep_ms(7000)
            client.idle = True

        client.task = asyncio.create_task(handler())

    assert 7900 <= waking(WOKEN, handling)[1] <= 8100


def test_after_a_power_on_there_is_time_to_get_in():
    made, ms, lines = waking(POWER, end)
    assert 10000 <= ms <= 10200
    assert "main.py: awake for 10 s at least; Ctrl-C ends at the REPL" in lines
    assert 45000 <= waking(POWER, hang, settings={"reach_s": 45})[1] <= 45200


def test_a_pico_takes_every_restart_for_a_waking():
    assert waking(3, end, board="rp2")[1] <= 1200
    assert waking(POWER, end, board="rp2")[1] >= 10000


def test_the_ticks_may_wrap_in_a_waking():
    assert 30000 <= waking(WOKEN, hang, clock=Clock(time.ticks_add(0, -5000)))[1] <= 30200


def test_telemetry_tells_what_started_the_board():
    for board, cause, text in (
        ("esp32", 1, "power"),
        ("esp32", 2, "reset"),
        ("esp32", 3, "watchdog"),
        ("esp32", 4, "sleep"),
        ("esp32", 5, "soft reset"),
        ("rp2", 1, "power"),
        ("rp2", 3, "restart"),
    ):
        made = waking(cause, board=board)[0]
        assert json.loads(made.client.published[0][1])["started"] == text


def test_between_two_sleeps_a_reset_on_command_is_refused():
    made = device(sleep=SLEEP)

    async def late(message):
        await made.application()
        await made.clock.sleep_ms(31000)
        await made.client.handlers[0][1](message)

    with_app(None, asyncio.run, late(Message("c/p7/reset")))
    assert made.client.published[-1] == ("devices/p7/answers/reset", b'{"reset": false}', 2)


# sleep: main()


def run_to_sleep(config, app=None, make_client=Client, cause=WOKEN):
    """As run_main(), on a board that can sleep; return (what ended it, its sleeps, lines)."""
    machine.use_board("esp32")
    machine.cause = cause
    lines = []
    try:
        try:
            result, lines = run_main(config, app, make_client)
        except SystemExit as error:
            result = error.args[0]
        return result, list(machine.slept), lines
    finally:
        machine.use_board("esp32")
        watchdog.release()


SHORT = {"every_s": 600, "awake_s": 5, "linger_s": 0, "reach_s": 0}


def test_main_puts_the_board_to_sleep_until_the_next_waking_is_due():
    result, slept, _ = run_to_sleep(configured(sleep=SHORT), App(end))
    assert result == "deepsleep" and Client.last.log == ["start", "drain", "close"]
    assert len(slept) == 1 and 590000 < slept[0] <= 600000


def test_the_radio_is_off_in_the_sleep():
    network.use_board("esp32")
    wlan = network.WLAN(network.STA_IF)

    async def online(client):
        await client.link.up()
        assert wlan.isconnected()

    pauses = wifi._PAUSE_MS, wifi._POLL_MS
    wifi._PAUSE_MS = wifi._POLL_MS = 0
    try:
        result, slept, _ = run_to_sleep(configured(wifi={"ssid": "net"}, sleep=SHORT), App(online))
    finally:
        wifi._PAUSE_MS, wifi._POLL_MS = pauses
    assert result == "deepsleep" and not wlan.active() and wlan.connects


def test_a_crash_is_followed_by_sleep():
    assert run_to_sleep(configured(sleep=SHORT), App(crash))[0] == "deepsleep"


def test_a_flash_that_fails_and_a_fault_of_the_program_are_followed_by_sleep():
    for failure in (OSError(5), KeyError("x"), MemoryError()):

        def failing(config, link, failure=failure):
            raise failure

        result, slept, _ = run_to_sleep(configured(sleep=SHORT), None, failing)
        assert result == "deepsleep" and len(slept) == 1


def test_what_no_waking_mends_stays_at_the_repl():
    def nowhere(config, link):
        raise JournalUnavailable("no partition mqj")

    async def interrupted(client):
        raise KeyboardInterrupt

    for config, app, make_client, why in (
        (configured(sleep={"every_s": "often"}), None, Client, "bad configuration"),
        (configured(sleep=SHORT, client_id=""), None, Client, "bad configuration"),
        (configured(sleep=SHORT), None, nowhere, "no partition mqj"),
        (configured(sleep=SHORT), App(interrupted), Client, "Ctrl-C"),
    ):
        result, slept, lines = run_to_sleep(config, app, make_client)
        assert result == why and slept == [] and "REPL" in lines[-1]
        assert watchdog._act is None  # nor is it put to sleep later
    gc.collect()  # or CPython tells of the task that ended so in the middle of another test


def test_a_program_that_stands_still_is_put_to_sleep_by_the_timer():
    acts = []
    limit = watchdog.limit
    watchdog.limit = lambda ms, act: acts.append((ms, act))
    try:
        run_to_sleep(configured(sleep=SHORT), App(end))
    finally:
        watchdog.limit = limit
    ((ms, act),) = acts
    assert ms == 25000  # awake_s, and what an orderly end takes
    try:
        quietly(act)
    except SystemExit as error:
        assert error.args[0] == "deepsleep"
    else:
        raise AssertionError("stays awake")
    finally:
        machine.use_board("esp32")


def test_after_a_watchdog_reset_an_esp32_sleeps_first():
    Client.last = None
    result, slept, _ = run_to_sleep(configured(sleep=SHORT), App(end), Client, 3)
    assert result == "deepsleep" and len(slept) == 1 and Client.last is None
    # Without sleep it begins at once.
    assert run_to_sleep(CONFIG, App(end), Client, 3)[0] == main.ENDED


# the watchdog


class Fed:
    """In the place of the module watchdog: counts alive()."""

    def __init__(self):
        self.count = 0

    def guard(self):
        pass

    def alive(self):
        self.count += 1


def test_the_watchdog_is_fed_while_the_client_takes_steps_whether_connected_or_not():
    made = device()
    fed = Fed()

    async def body():
        pulse = asyncio.create_task(made._pulse())
        made.client.idle = False  # not connected
        made.client.stalled = 299999
        await made.clock.sleep_ms(10500)
        counts = [fed.count]
        made.client.stalled = 300000
        await made.clock.sleep_ms(60000)
        counts.append(fed.count)
        made.client.stalled = 0
        await made.clock.sleep_ms(10000)
        counts.append(fed.count)
        pulse.cancel()
        return counts

    main.watchdog = fed
    try:
        assert asyncio.run(body()) == [11, 11, 21]
    finally:
        main.watchdog = watchdog
