"""The configuration: defaults, one clear line per mistake, files, the client identifier."""

import os
import sys

from mqtt_durable import board_id, config
from mqtt_durable.errors import ConfigError

_HERE = __file__.replace("\\", "/").rpartition("/")[0] or "."
_FILE = "%s/_test_config_%s.json" % (_HERE, sys.implementation.name)

DEFAULTS = {
    "wifi": {"ssid": "net", "password": None, "country": "DE", "power_save": False},
    "broker": {
        "host": "h",
        "port": 1883,
        "username": None,
        "password": None,
        "keep_alive_s": 60,
        "version": 4,
        "tls": None,
    },
    "client_id": "auto",
    "session": {"clean": False, "in_flight": 16, "expiry_s": 604800},
    "journal": {"home": "auto", "size_kib": 64, "when_full": "raise", "durability": "always", "grace_ms": 500},
    "log": {"level": "info", "console": "warning"},
    "telemetry": {"topic": "devices/{client_id}/telemetry", "every_s": 60, "qos": 1},
    "commands": {"topic": "devices/{client_id}/commands/#", "qos": 2},
    "sleep": None,
}


def minimal(**changes):
    """A right configuration of the least keys; changes are "section__key" or "section"."""
    given = {"wifi": {"ssid": "net"}, "broker": {"host": "h"}}
    for name, value in changes.items():
        section, split, key = name.partition("__")
        if split:
            given.setdefault(section, {})[key] = value
        else:
            given[section] = value
    return given


def with_unique_id(unique_id, function, *args):
    old = board_id.unique_id
    board_id.unique_id = lambda: unique_id
    try:
        return function(*args)
    finally:
        board_id.unique_id = old


def check(given):
    return with_unique_id(b"\x01\x02\x03\x04\x05\x06", config.check, given)


def problems_of(function, *args):
    try:
        with_unique_id(b"\x01", function, *args)
    except ConfigError as error:
        return error.problems
    return []


def load_bytes(data):
    with open(_FILE, "wb") as file:
        file.write(data)
    try:
        return with_unique_id(b"\x01", config.load, _FILE)
    finally:
        os.remove(_FILE)


def test_every_default_is_filled_in():
    assert with_unique_id(b"\x01", config.complete, minimal()) == DEFAULTS


def test_what_was_given_is_not_changed():
    given = minimal(session__in_flight=3)
    filled = with_unique_id(b"\x01", config.complete, given)
    assert given == {"wifi": {"ssid": "net"}, "broker": {"host": "h"}, "session": {"in_flight": 3}}
    assert filled["session"] == {"clean": False, "in_flight": 3, "expiry_s": 604800}
    assert config.complete(filled) == filled


def test_the_example_shows_every_key_with_its_default():
    path = _HERE + "/../firmware/config.example.json"
    example = with_unique_id(b"\x01", config.load, path)
    example["wifi"]["ssid"] = "net"
    example["wifi"]["password"] = None
    example["broker"]["host"] = "h"
    assert example == DEFAULTS
    with open(path) as file:
        text = file.read()
    for key in keys(config._TABLE):
        assert '"%s":' % key in text, key


def keys(rows):
    """The keys in rows and in their sections, but for those of a section that is null by default."""
    for row in rows:
        yield row[0]
        if len(row) == 3 and row[1] is not None:
            yield from keys(row[2])


RIGHT = (
    ("no Wi-Fi", minimal(wifi=None)),
    ("no telemetry, no commands", minimal(telemetry=None, commands=None)),
    ("open network", minimal(wifi__password=None)),
    ("hexadecimal key", minimal(wifi__password="0123456789abcdef" * 4)),
    ("user and password", minimal(broker__username="u", broker__password="")),
    ("MQTT 5", minimal(broker__version=5)),
    ("a token as the password, MQTT 5", minimal(broker__version=5, broker__password="t")),
    ("the broker assigns the id", minimal(broker__version=5, client_id="", telemetry__topic="t", commands=None)),
    ("no session kept", minimal(session__expiry_s=0)),
    ("a session for ever", minimal(session__expiry_s=4294967295)),
    ("IPv4", minimal(broker__host="192.168.1.2")),
    ("IPv6", minimal(broker__host="fe80::1")),
    ("TLS", minimal(broker__tls={"ca": "/certs/ca.der"})),
    ("TLS with a client certificate", minimal(broker__tls={"ca": "a", "cert": "b", "key": "c"})),
    ("TLS unverified", minimal(broker__tls={"verify": False})),
    ("TLS by another name", minimal(broker__tls={"ca": "a", "server_hostname": "broker.lan", "ntp_host": "10.0.0.1"})),
    ("no keep alive", minimal(broker__keep_alive_s=0)),
    ("long client_id", minimal(client_id="x" * 128)),
    ("client_id with + where no topic has it", minimal(client_id="a+b", telemetry=None, commands__topic="c")),
    ("partition", minimal(journal__home="partition:mqj")),
    ("file", minimal(journal__home="file:/tmp/j")),
    ("pinned", minimal(journal__home="pinned")),
    ("pinned in a directory", minimal(journal__home="pinned:/data/mqj")),
    ("gap", minimal(journal__home="gap")),
    ("ram", minimal(journal__home="ram")),
    ("smallest journal", minimal(journal__size_kib=16)),
    ("largest journal", minimal(journal__size_kib=16384)),
    ("wait", minimal(journal__when_full="wait")),
    ("drop_oldest", minimal(journal__when_full="drop_oldest")),
    ("grace", minimal(journal__durability="grace")),
    ("levels", minimal(log__level="debug", log__console="off")),
    ("shortest grace", minimal(journal__durability="grace", journal__grace_ms=1)),
    ("longest grace", minimal(journal__durability="grace", journal__grace_ms=60000)),
    ("Wi-Fi power saving", minimal(wifi__power_save=True)),
    ("sleep with its defaults", minimal(sleep={})),
    ("sleep without telemetry", minimal(sleep={"every_s": 86400, "linger_s": 0, "reach_s": 0}, telemetry=None)),
    ("QoS 0 without sleep", minimal(telemetry__qos=0, sleep=None)),
    ("filters", minimal(commands__topic="+/a/+/#")),
    ("only #", minimal(commands__topic="#")),
)


def test_right_configurations_have_no_problems():
    for name, given in RIGHT:
        assert check(given) == [], name


_NO_CA = (
    "broker.tls.ca: found null, expected the path of the CA certificate that the broker's is signed with, "
    'because MicroPython has none of its own; or "verify": false, and anyone can pose as the broker'
)

# name, configuration, the only problem line
WRONG = (
    ("text for number", minimal(broker__port="1883"), 'broker.port: found "1883", expected a whole number 1-65535'),
    ("number too large", minimal(broker__port=65536), "broker.port: found 65536, expected a whole number 1-65535"),
    ("fraction", minimal(broker__keep_alive_s=1.5), "broker.keep_alive_s: found 1.5, expected a whole number 0-65535"),
    ("true for number", minimal(telemetry__qos=True), "telemetry.qos: found true, expected a whole number 0-2"),
    ("null for number", minimal(commands__qos=None), "commands.qos: found null, expected a whole number 0-2"),
    ("number for flag", minimal(session__clean=0), "session.clean: found 0, expected true or false"),
    ("window", minimal(session__in_flight=65), "session.in_flight: found 65, expected a whole number 1-64"),
    ("sleep is no object", minimal(sleep=600), "sleep: found a number, expected null or an object"),
    ("a short sleep", minimal(sleep={"every_s": 9}), "sleep.every_s: found 9, expected a whole number 10-86400"),
    (
        "no time to sleep",
        minimal(sleep={"every_s": 30}),
        "sleep.every_s: found 30, expected more than sleep.awake_s, which is 30",
    ),
    (
        "QoS 0 and sleep",
        minimal(sleep={}, telemetry__qos=0),
        "telemetry.qos: found 0, expected 1 or 2, because sleep is set and QoS 0 waits for no link",
    ),
    ("too often", minimal(telemetry__every_s=0), "telemetry.every_s: found 0, expected a whole number 1-86400"),
    ("list", minimal(client_id=["x"]), "client_id: found a list, expected a text of 1-128 bytes"),
    (
        "empty id",
        minimal(client_id=""),
        'client_id: found "", expected a text of 1-128 bytes, because broker.version is 4',
    ),
    (
        "telemetry under an id not known yet",
        minimal(broker__version=5, client_id="", commands=None),
        'telemetry.topic: found {client_id}, expected a topic without it, because client_id is ""',
    ),
    (
        "answers under an id not known yet",
        minimal(broker__version=5, client_id="", telemetry=None),
        'commands: found an object, expected null, because client_id is "" and their answers hold it',
    ),
    (
        "version by its name",
        minimal(broker__version="3.1.1"),
        'broker.version: found "3.1.1", expected 4, which is MQTT 3.1.1, or 5',
    ),
    ("version", minimal(broker__version=3), "broker.version: found 3, expected 4, which is MQTT 3.1.1, or 5"),
    (
        "session without end",
        minimal(session__expiry_s=-1),
        "session.expiry_s: found -1, expected a whole number 0-4294967295",
    ),
    (
        "session longer than for ever",
        minimal(session__expiry_s=4294967296),
        "session.expiry_s: found 4294967296, expected a whole number 0-4294967295",
    ),
    (
        "long id",
        minimal(client_id="\u00e4" * 65),
        'client_id: found "%s...", expected a text of 1-128 bytes' % ("\u00e4" * 40),
    ),
    ("control characters", minimal(client_id="a\0\n"), 'client_id: found "a??", expected a text of 1-128 bytes'),
    (
        "id with #",
        minimal(client_id="a#", commands=None),
        'client_id: found "a#", expected no + and no #, because telemetry.topic holds {client_id}',
    ),
    ("odd size", minimal(journal__size_kib=66), "journal.size_kib: found 66, expected a multiple of 4, 16-16384"),
    ("small size", minimal(journal__size_kib=12), "journal.size_kib: found 12, expected a multiple of 4, 16-16384"),
    (
        "full",
        minimal(journal__when_full="drop"),
        'journal.when_full: found "drop", expected "raise", "wait" or "drop_oldest"',
    ),
    (
        "durability",
        minimal(journal__durability="never"),
        'journal.durability: found "never", expected "always" or "grace"',
    ),
    (
        "level",
        minimal(log__level="verbose"),
        'log.level: found "verbose", expected "off", "error", "warning", "info" or "debug"',
    ),
    (
        "level of the console",
        minimal(log__console=1),
        'log.console: found 1, expected "off", "error", "warning", "info" or "debug"',
    ),
    (
        "flag for durability",
        minimal(journal__durability=True),
        'journal.durability: found true, expected "always" or "grace"',
    ),
    ("no grace", minimal(journal__grace_ms=0), "journal.grace_ms: found 0, expected a whole number 1-60000"),
    ("long grace", minimal(journal__grace_ms=60001), "journal.grace_ms: found 60001, expected a whole number 1-60000"),
    ("null grace", minimal(journal__grace_ms=None), "journal.grace_ms: found null, expected a whole number 1-60000"),
    (
        "home",
        minimal(journal__home="flash"),
        'journal.home: found "flash", expected "auto", "partition:LABEL", "pinned", '
        '"pinned:/DIRECTORY", "gap", "file:PATH" or "ram"',
    ),
    (
        "home without label",
        minimal(journal__home="partition:"),
        'journal.home: found "partition:", expected "auto", "partition:LABEL", "pinned", '
        '"pinned:/DIRECTORY", "gap", "file:PATH" or "ram"',
    ),
    (
        "pinned in no whole path",
        minimal(journal__home="pinned:mqj"),
        'journal.home: found "pinned:mqj", expected "auto", "partition:LABEL", "pinned", '
        '"pinned:/DIRECTORY", "gap", "file:PATH" or "ram"',
    ),
    (
        "auto with something",
        minimal(journal__home="auto:x"),
        'journal.home: found "auto:x", expected "auto", "partition:LABEL", "pinned", '
        '"pinned:/DIRECTORY", "gap", "file:PATH" or "ram"',
    ),
    (
        "host with scheme",
        minimal(broker__host="mqtt://h"),
        'broker.host: found "mqtt://h", expected a host name or an address, without mqtt://, port and path',
    ),
    (
        "host with port",
        minimal(broker__host="h:1883"),
        'broker.host: found "h:1883", expected a host name or an address, without mqtt://, port and path',
    ),
    ("country", minimal(wifi__country="de"), 'wifi.country: found "de", expected two capital letters, such as "DE"'),
    (
        "wildcard in topic",
        minimal(telemetry__topic="a/+"),
        'telemetry.topic: found "a/+", expected a topic without + and #',
    ),
    (
        "wildcard inside a level",
        minimal(commands__topic="a/b+"),
        'commands.topic: found "a/b+", expected a topic filter: + alone in its level, # alone in the last one',
    ),
    (
        "# not at the end",
        minimal(commands__topic="#/a"),
        'commands.topic: found "#/a", expected a topic filter: + alone in its level, # alone in the last one',
    ),
    ("no ssid", minimal(wifi={}), "wifi.ssid: found nothing, expected a text of 1-32 bytes"),
    (
        "no wifi",
        {"broker": {"host": "h"}},
        'wifi.ssid: found nothing, expected a text of 1-32 bytes; or "wifi": null where the network is up without it',
    ),
    (
        "no broker",
        {"wifi": None},
        "broker.host: found nothing, expected a host name or an address, without mqtt://, port and path",
    ),
    ("null section", minimal(session=None), "session: found null, expected an object"),
    ("flag for section", minimal(telemetry=True), "telemetry: found true, expected null or an object"),
    (
        "password without user",
        minimal(broker__password="x"),
        "broker.username: found null, expected a text, because broker.password is set and broker.version is 4",
    ),
    ("flag for TLS", minimal(broker__tls=True), "broker.tls: found true, expected null or an object"),
    ("TLS without a CA", minimal(broker__tls={}), _NO_CA),
    ("TLS without a CA, said aloud", minimal(broker__tls={"ca": None, "verify": True}), _NO_CA),
    (
        "empty path",
        minimal(broker__tls={"ca": ""}),
        'broker.tls.ca: found "", expected null or a text of 1-255 bytes',
    ),
    (
        "number for verify",
        minimal(broker__tls={"ca": "a", "verify": 1}),
        "broker.tls.verify: found 1, expected true or false",
    ),
    (
        "certificate without key",
        minimal(broker__tls={"ca": "a", "cert": "c"}),
        "broker.tls.key: found null, expected the path of a file, because broker.tls.cert is set",
    ),
    (
        "key without certificate",
        minimal(broker__tls={"verify": False, "key": "k"}),
        "broker.tls.cert: found null, expected the path of a file, because broker.tls.key is set",
    ),
    (
        "unknown key of TLS",
        minimal(broker__tls={"ca": "a", "insecure": True}),
        "broker.tls.insecure: found an unknown key, expected one of ca, cert, key, verify, server_hostname, ntp_host",
    ),
    (
        "no NTP server",
        minimal(broker__tls={"ca": "a", "ntp_host": None}),
        "broker.tls.ntp_host: found null, expected a host name or an address, without mqtt://, port and path",
    ),
    ("other case", minimal(Telemetry=1), 'Telemetry: found an unknown key, expected "telemetry"'),
    (
        "other word separator",
        minimal(broker__keepAliveS=1),
        'broker.keepAliveS: found an unknown key, expected "keep_alive_s"',
    ),
    (
        "unknown key",
        minimal(session__window=1),
        "session.window: found an unknown key, expected one of clean, in_flight, expiry_s",
    ),
    (
        "unknown section",
        minimal(mqtt={}),
        "mqtt: found an unknown key, expected one of "
        "wifi, broker, client_id, session, journal, log, telemetry, commands, sleep",
    ),
    ("no object", [1], "config: found a list, expected an object"),
)


def test_each_mistake_gives_its_line():
    for name, given, line in WRONG:
        assert check(given) == [line], (name, check(given))


def test_tls_is_completed_and_changes_the_port_that_was_not_given():
    given = minimal(broker__tls={"ca": "a"})
    filled = with_unique_id(b"\x01", config.complete, given)
    tls = {"ca": "a", "cert": None, "key": None, "verify": True, "server_hostname": None, "ntp_host": "pool.ntp.org"}
    assert filled["broker"]["tls"] == tls and filled["broker"]["port"] == 8883
    assert with_unique_id(b"\x01", config.complete, filled) == filled
    given = minimal(broker__tls={"ca": "a"}, broker__port=1883)
    assert with_unique_id(b"\x01", config.complete, given)["broker"]["port"] == 1883


def test_every_mistake_is_reported_at_once():
    given = minimal(broker__port=0, session__clean="no", journal=[], bogus=1)
    assert len(check(given)) == 4
    assert problems_of(config.complete, given) == check(given)


def test_a_password_is_never_shown():
    for given in (
        minimal(wifi__password="hunter2"),
        minimal(wifi__password=["hunter2"]),
        minimal(wifi="hunter2"),
        minimal(wifi__pass="hunter2"),
        minimal(password="hunter2"),
        minimal(broker__username=1, broker__password="hunter2\0"),
        minimal(broker__password="hunter2"),
        minimal(broker__host="mqtt://me:hunter2@h"),
    ):
        problems = check(given)
        assert problems and "hunter2" not in str(problems), problems


def test_auto_needs_a_number_of_the_board():
    given = minimal()
    problems = with_unique_id(None, config.check, given)
    assert len(problems) == 1 and problems[0].startswith('client_id: found "auto", expected a text')
    given["client_id"] = "plant7"
    assert with_unique_id(None, config.check, given) == []


def test_client_id_comes_from_the_board_or_the_configuration():
    assert board_id.client_id({"client_id": "plant7"}) == "plant7"
    auto = {"client_id": "auto"}
    assert with_unique_id(b"\x24\x0a\xc4\x00\x01\x02", board_id.client_id, auto) == "mqj-240ac4000102"
    assert with_unique_id(b"\xe6\x61\x38\x52\x83\x11\x22\x33", board_id.client_id, auto) == "mqj-e661385283112233"
    assert len(with_unique_id(bytes(16), board_id.client_id, auto)) <= 23
    try:
        with_unique_id(None, board_id.client_id, auto)
    except ConfigError as error:
        assert "expected a text" in error.problems[0]
    else:
        raise AssertionError("no ConfigError")


def test_load_reads_a_file():
    text = b'{"wifi": {"ssid": "net"},\r\n "broker": {"host": "h"}}\n'
    assert load_bytes(text) == DEFAULTS
    assert load_bytes(b"\xef\xbb\xbf" + text) == DEFAULTS


def test_load_says_where_the_json_ends_to_make_sense():
    for name, data, line in (
        ("empty", b"", 1),
        ("brace too many", b'{\n"wifi": null}}\n', 2),
        ("bad word", b'{"wifi": null,\n"broker": {},\n"client_id": hunter2\n}', 3),
        ("cut short", b'{"wifi": null,\n"broker": {', 2),
    ):
        problems = problems_of(load_bytes, data)
        assert problems == ["%s: line %d: found something that is not JSON" % (_FILE, line)], (name, problems)
    assert len(problems_of(load_bytes, b'{"wifi": "\xff\xfe"}')) == 1


def test_load_says_what_to_do_without_a_file():
    problems = problems_of(config.load, "/nowhere/config.json")
    expected = "/nowhere/config.json: not found; make config, or edit a copy of firmware/config.example.json"
    assert problems == [expected]
