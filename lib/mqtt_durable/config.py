"""The device's configuration: config.json read, checked and completed.

Owns the table of keys with their defaults and limits, and the words for each mistake.  Refuses to know what the values
are used for.  A problem line says key path, what was found, what was expected; it never shows a password, nor the value
of a key or section it does not know, which may be a misplaced one.

    config = load()                     # config.json -> dict with every key, or ConfigError with .problems
    config = complete({"broker": ...})  # the same for a dict made by a program
    problems = check({"broker": ...})   # only the lines
"""

import json

from .errors import ConfigError
from .once import once
from .packet import check_filter, check_topic

# Rows of (key, default, kind, lower limit, upper limit).  A default of ...: there is none.  A value may be null when
# its default is.  A section: (key, may it be null, rows); None: it may, and is when it is missing.
# One constant: frozen or in .mpy it costs no heap to build.
_TABLE = (
    ("wifi", True, (
        ("ssid", ..., "text", 1, 32),
        ("password", None, "secret", 8, 64),
        ("country", "DE", "country", 2, 2),
        ("power_save", False, "flag", 0, 1),
    )),
    ("broker", False, (
        ("host", ..., "host", 1, 253),
        ("port", 1883, "number", 1, 65535),
        ("username", None, "text", 0, 65535),
        ("password", None, "secret", 0, 65535),
        ("keep_alive_s", 60, "number", 0, 65535),
        ("version", 4, "version", 4, 5),
        ("tls", None, (
            ("ca", None, "text", 1, 255),
            ("cert", None, "text", 1, 255),
            ("key", None, "text", 1, 255),
            ("verify", True, "flag", 0, 1),
            ("server_hostname", None, "host", 1, 253),
            ("ntp_host", "pool.ntp.org", "host", 1, 253),
        )),
    )),
    ("client_id", "auto", "client_id", 1, 128),
    ("session", False, (
        ("clean", False, "flag", 0, 1),
        ("in_flight", 16, "number", 1, 64),
        ("expiry_s", 604800, "number", 0, 4294967295),
    )),
    ("journal", False, (
        ("home", "auto", "home", 0, 0),
        ("size_kib", 64, "sectors", 16, 16384),
        ("when_full", "raise", "full", 0, 0),
        ("durability", "always", "durability", 0, 0),
        ("grace_ms", 500, "number", 1, 60000),
    )),
    ("log", False, (
        ("level", "info", "level", 0, 0),
        ("console", "warning", "level", 0, 0),
    )),
    ("telemetry", True, (
        ("topic", "devices/{client_id}/telemetry", "topic_name", 1, 65535),
        ("every_s", 60, "number", 1, 86400),
        ("qos", 1, "number", 0, 2),
    )),
    ("commands", True, (
        ("topic", "devices/{client_id}/commands/#", "topic_filter", 1, 65535),
        ("qos", 2, "number", 0, 2),
    )),
    ("sleep", None, (
        ("every_s", 600, "number", 10, 86400),
        ("awake_s", 30, "number", 5, 3600),
        ("linger_s", 1, "number", 0, 60),
        ("reach_s", 10, "number", 0, 3600),
    )),
)  # fmt: skip

_EXPECTED = {
    "text": "a text of %d-%d bytes",
    "secret": "a text of %d-%d bytes",
    "client_id": "a text of %d-%d bytes",
    "version": "%d, which is MQTT 3.1.1, or %d",
    "country": 'two capital letters, such as "DE"',
    "host": "a host name or an address, without mqtt://, port and path",
    "number": "a whole number %d-%d",
    "sectors": "a multiple of 4, %d-%d",
    "flag": "true or false",
    "home": '"auto", "partition:LABEL", "pinned", "pinned:/DIRECTORY", "gap", "file:PATH" or "ram"',
    "full": '"raise", "wait" or "drop_oldest"',
    "durability": '"always" or "grace"',
    "level": '"off", "error", "warning", "info" or "debug"',
    "topic_name": "a topic without + and #",
    "topic_filter": "a topic filter: + alone in its level, # alone in the last one",
}

_MISSING = {}  # a section that is not there


def load(path="config.json"):
    """Read the file at path; return the configuration as a dict that has every key.

    Raises ConfigError with one line per mistake in .problems.
    """
    try:
        file = open(path, "rb")
    except OSError as error:
        if error.errno == 2:  # ENOENT
            raise ConfigError([path + ": not found; make config, or edit a copy of firmware/config.example.json"])
        raise ConfigError(["%s: cannot be read: %s" % (path, error)])
    with file:
        start = 3 if file.read(3) == b"\xef\xbb\xbf" else 0  # some editors put a byte order mark in front
        file.seek(start)
        try:
            config = json.load(file)
        except ValueError as error:
            raise ConfigError(["%s: line %d: found something that is not JSON" % (path, _line(file, error))])
    return complete(config)


def complete(config):
    """Return a new dict: config with every default filled in.  Raises ConfigError with one line per mistake."""
    filled, problems = _walk(config)
    if problems:
        raise ConfigError(problems)
    return filled


def check(config):
    """Return the list of problem lines of a configuration, empty when it is right."""
    return _walk(config)[1]


def _can_sleep():
    try:
        from machine import deepsleep  # noqa: F401
    except ImportError:
        return False
    return True


def _line(file, error):
    """Return the number of the line at which json gave up."""
    if hasattr(error, "lineno"):
        return error.lineno
    # MicroPython's error carries no position, but its reader takes one byte at a time and is one byte ahead.
    end = file.tell()
    file.seek(0)
    return 1 + file.read(max(0, end - 1)).count(b"\n")


def _walk(config):
    """Return (config completed, problem lines)."""
    problems = []
    filled = _fill(config, "", False, _TABLE, problems)
    if not problems:
        if filled["broker"]["tls"] and "port" not in config["broker"]:
            filled["broker"]["port"] = 8883  # secure-mqtt
        _check_together(filled, problems)
    return filled, problems


def _fill(given, path, null_ok, rows, problems):
    """Return the section at path completed, None for null; add its problem lines."""
    if given is None and null_ok is not False:
        return None
    if type(given) is not dict:
        # The kind only: whoever writes "wifi": "..." may have written the password there.
        null = "" if null_ok is False else "null or "
        problems.append("%s: found %s, expected %san object" % (path or "config", _kind(given), null))
        return None
    prefix = path and path + "."
    _refuse_unknown(given, prefix, [row[0] for row in rows], problems)
    filled = {}
    for row in rows:
        key = row[0]
        if len(row) == 3:
            missing = None if row[1] is None else _MISSING
            filled[key] = _fill(given.get(key, missing), prefix + key, row[1], row[2], problems)
            continue
        key, default, kind, low, high = row
        value = filled[key] = given.get(key, default)
        if value is ...:
            _note(problems, prefix + key, "nothing", kind, low, high, False)
            if path == "wifi" and given is _MISSING:
                problems[-1] += '; or "wifi": null where the network is up without it'
        elif not (value is None and default is None) and not _fits(value, kind, low, high):
            found = _kind(value) if kind == "secret" else _shown(value)
            _note(problems, prefix + key, found, kind, low, high, default is None)
    return filled


def _check_together(config, problems):
    """Add what is wrong only in combination; every value by itself is known to be right."""
    broker = config["broker"]
    if broker["version"] == 4 and broker["password"] is not None and broker["username"] is None:
        # [MQTT-3.1.2-22]
        problems.append(
            "broker.username: found null, expected a text, because broker.password is set and broker.version is 4"
        )
    tls = broker["tls"]
    if tls:
        if tls["verify"] and tls["ca"] is None:
            problems.append(
                "broker.tls.ca: found null, expected the path of the CA certificate that the broker's is signed with, "
                'because MicroPython has none of its own; or "verify": false, and anyone can pose as the broker'
            )
        for key, other in (("cert", "key"), ("key", "cert")):
            if tls[key] is None and tls[other] is not None:
                line = "broker.tls.%s: found null, expected the path of a file, because broker.tls.%s is set"
                problems.append(line % (key, other))
    sleep = config["sleep"]
    if sleep:
        if not _can_sleep():
            problems.append("sleep: found an object, expected null, because this machine has no machine.deepsleep()")
        if sleep["every_s"] <= sleep["awake_s"]:
            line = "sleep.every_s: found %d, expected more than sleep.awake_s, which is %d"
            problems.append(line % (sleep["every_s"], sleep["awake_s"]))
        if config["telemetry"] and config["telemetry"]["qos"] == 0:
            problems.append("telemetry.qos: found 0, expected 1 or 2, because sleep is set and QoS 0 waits for no link")
    name = config["client_id"]
    if name == "auto":
        try:
            once("board_id", "client_id", config)
        except ConfigError as error:
            problems += error.problems
    elif not name:
        _check_without_name(config, problems)
    elif "+" in name or "#" in name:
        for section in ("telemetry", "commands"):
            if config[section] and "{client_id}" in config[section]["topic"]:
                line = "client_id: found %s, expected no + and no #, because %s.topic holds {client_id}"
                problems.append(line % (_shown(name), section))


def _check_without_name(config, problems):
    """Add what is wrong when the broker is to assign the client identifier: it is not known before."""
    if config["broker"]["version"] == 4:
        problems.append('client_id: found "", expected a text of 1-128 bytes, because broker.version is 4')
        return
    telemetry = config["telemetry"]
    if telemetry and "{client_id}" in telemetry["topic"]:
        problems.append('telemetry.topic: found {client_id}, expected a topic without it, because client_id is ""')
    if config["commands"]:
        problems.append('commands: found an object, expected null, because client_id is "" and their answers hold it')


def _refuse_unknown(given, prefix, names, problems):
    for key in sorted(given):
        if key not in names:
            near = [name for name in names if _plain(name) == _plain(key)]
            expected = '"%s"' % near[0] if near else "one of " + ", ".join(names)
            problems.append("%s%s: found an unknown key, expected %s" % (prefix, key, expected))


def _plain(key):
    return key.lower().replace("_", "").replace("-", "").replace(" ", "")


def _note(problems, path, found, kind, low, high, null_ok):
    expected = _EXPECTED[kind]
    if "%d" in expected:
        expected = expected % (low, high)
    problems.append("%s: found %s, expected %s%s" % (path, found, "null or " if null_ok else "", expected))


def _fits(value, kind, low, high):
    """True when value is of its kind and within its limits."""
    if kind == "flag":
        return value is True or value is False
    if kind == "number" or kind == "sectors" or kind == "version":
        # type() and not isinstance(): true is no number here.
        return type(value) is int and low <= value <= high and (kind != "sectors" or value % 4 == 0)
    if type(value) is not str or "\0" in value:  # [MQTT-1.5.3-2]
        return False
    if kind == "full":
        return value in ("raise", "wait", "drop_oldest")
    if kind == "durability":
        return value in ("always", "grace")
    if kind == "level":
        return value in ("off", "error", "warning", "info", "debug")
    if kind == "home":
        name, colon, rest = value.partition(":")
        if not colon:
            return name in ("auto", "pinned", "gap", "ram")
        # 16: the room for a label in the ESP32's partition table.
        if name == "partition":
            return 1 <= len(rest) <= 16
        return (name == "file" and len(rest) > 0) or (name == "pinned" and len(rest) > 1 and rest[0] == "/")
    try:
        size = len(value.encode())
    except ValueError:  # half of a surrogate pair, from a \u escape
        return False
    if not low <= size <= high and (size or kind != "client_id"):
        return False
    if kind == "country":
        return "A" <= value[0] <= "Z" and "A" <= value[1] <= "Z"
    if kind == "host":
        return not (" " in value or "/" in value or "@" in value or value.count(":") == 1)
    try:
        if kind == "topic_name":
            check_topic(value)
        elif kind == "topic_filter":
            check_filter(value)
    except ValueError:
        return False
    return True


def _kind(value):
    """Name the JSON kind of a value without showing it."""
    if value is None:
        return "null"
    if type(value) is bool:
        return "true" if value else "false"
    if type(value) is str:
        return "a text of %d characters" % len(value)
    return "a list" if type(value) is list else "an object" if type(value) is dict else "a number"


def _shown(value):
    """Show a value in one short line; a list, an object and what may hold user:password@host only by its kind."""
    if type(value) is str:
        if "@" in value:
            return _kind(value)
        value = "".join([c if c >= " " else "?" for c in value])
        return '"%s"' % (value if len(value) <= 40 else value[:40] + "...")
    return str(value) if type(value) in (int, float) else _kind(value)
