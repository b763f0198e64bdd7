"""The ring of events: bounded, in order, without secrets."""

import sys

import mqtt_durable.log as log_module
from mqtt_durable.log import DEBUG, ERROR, INFO, LEVELS, WARNING, Log


def printed(function, *args):
    """Call function(*args); return the lines it prints, tracebacks as the repr of the exception."""
    lines = []

    class Silent:
        print_exception = staticmethod(lambda error: lines.append(repr(error)))

    log_module.print = lambda text: lines.append(text)
    log_module.sys = Silent
    try:
        function(*args)
    finally:
        log_module.sys = sys
        del log_module.print
    return lines


def texts(log):
    return [event[2] for event in log.events()]


def test_newest_events_are_kept_in_order():
    log = Log("debug", "off")
    for n in range(100):
        log.add(INFO, "event %d" % n)
    assert texts(log) == ["event %d" % n for n in range(68, 100)]
    assert [event[1] for event in log.events()] == ["info"] * 32


def test_level_decides_what_is_kept_and_console_what_is_printed():
    def add_all(log):
        for level in (ERROR, WARNING, INFO, DEBUG):
            log.add(level, "a %s" % LEVELS[level])

    for i, level in enumerate(LEVELS):
        for k, console in enumerate(LEVELS):
            log = Log(level, console)
            lines = printed(add_all, log)
            assert [event[1] for event in log.events()] == list(LEVELS[1 : i + 1]), (level, console)
            assert lines == ["mqtt: %s: a %s" % (name, name) for name in LEVELS[1 : k + 1]], (level, console)


def test_event_names_the_exception():
    log = Log("info", "off")
    log.add(WARNING, "no connection", OSError(5, "worn"))
    log.add(WARNING, "no connection", ValueError())
    assert texts(log)[0].startswith("no connection: OSError: ") and "worn" in texts(log)[0]
    assert texts(log)[1] == "no connection: ValueError"


def test_traceback_is_printed_only_where_errors_are():
    error = ValueError("x")
    assert printed(Log("info", "error").add, ERROR, "handler", error, True) == [
        "mqtt: error: handler: ValueError: x",
        repr(error),
    ]
    assert printed(Log("info", "off").add, ERROR, "handler", error, True) == []


def test_repeated_event_is_counted_and_printed_once():
    log = Log()

    def add_all():
        for text in ("a", "b", "b", "b", "a"):
            log.add(WARNING, text)
        log.add(ERROR, "a")

    assert len(printed(add_all)) == 4
    assert [event[1:] for event in log.events()] == [
        ("warning", "a", 1),
        ("warning", "b", 3),
        ("warning", "a", 1),
        ("error", "a", 1),
    ]
    assert str(log).split("\n")[1].endswith("s  warning  b (3 times)")


def test_long_text_is_cut():
    log = Log("info", "off")
    log.add(INFO, "x" * 1000)
    assert texts(log) == ["x" * 100]


def test_secrets_are_replaced_also_where_the_text_is_cut():
    log = Log("info", "off", ("Kennwort-4711", None, "", "abc"))
    log.add(ERROR, "x" * 92, ValueError("Kennwort-4711 and Kennwort-4711"))
    log.add(ERROR, "application", ValueError("{'password': 'Kennwort-4711'}"))
    log.add(ERROR, "abc")
    assert "Kennw" not in str(log) and "***" in texts(log)[1] and texts(log)[2] == "abc"


def test_adding_raises_nothing():
    class Mute(Exception):
        def __str__(self):
            raise KeyError("no text")

        __repr__ = __str__

    log = Log("info", "off")
    log.add(ERROR, "handler", Mute())
    log.add(INFO, "next")
    assert texts(log)[-1] == "next"


def test_uptime_goes_on_over_the_wrap_of_ticks():
    class Clock:
        now = 0

        @staticmethod
        def ticks_ms():
            return Clock.now

        ticks_diff = staticmethod(log_module.time.ticks_diff)

    time = log_module.time
    log_module.time = Clock
    try:
        Clock.now = time.ticks_add(0, -500)
        log = Log("info", "off")
        Clock.now = time.ticks_add(0, 1500)
        log.add(INFO, "later")
        assert log.events() == [(2, "info", "later", 1)]
    finally:
        log_module.time = time
