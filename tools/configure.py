"""Make config.json, or check it: configure.py [--file FILE] [--check] [KEY=VALUE ...]

KEY is a path of config.json, as in firmware/config.example.json: wifi.ssid=home broker.host=192.168.1.10 sleep=null.
What is not given is asked for, if there is somebody at a terminal to answer; Enter keeps what is in brackets, which
comes from the file where there is one.  Passwords are not shown.  What else is in the file stays.

The device's own validator decides what is right.  Then the broker is asked whether it takes such a client; one that
cannot be reached from here is only a warning.  Nothing is written if something is wrong.
"""

import argparse
import getpass
import json
import os
import socket
import ssl
import stat
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "lib"), str(ROOT / "tools" / "shim")]

import host  # noqa: E402

host.install()

from mqtt_durable import config as device  # noqa: E402
from mqtt_durable import packet, packet5, reasons  # noqa: E402
from mqtt_durable.errors import ConfigError, ProtocolError  # noqa: E402

TIMEOUT_S = 5
BROKER_WORDS = "host name or address of the broker"

# Key, question, what an answer of "-" stands for in words (None: it is no answer), only asked if this key is set.
QUESTIONS = (
    ("wifi.ssid", "Wi-Fi network", "none: wired", None),
    ("wifi.password", "Wi-Fi password", "none: an open network", "wifi"),
    ("wifi.country", "Wi-Fi country", None, "wifi"),
    ("broker.host", BROKER_WORDS, None, None),
    ("broker.tls", "TLS: file of the CA certificate on the board, such as /certs/ca.pem", "no TLS", None),
    ("broker.port", "port of the broker", None, None),
    ("broker.version", "MQTT version: 4, which is 3.1.1, or 5", None, None),
    ("broker.username", "user name at the broker", "none", None),
    ("broker.password", "password at the broker", "none", "broker.username"),
    ("client_id", "client identifier, or auto for one made of the board's own number", None, None),
    ("telemetry.topic", "topic of the telemetry", None, "telemetry"),
    ("telemetry.every_s", "seconds between telemetry", None, "telemetry"),
    ("commands.topic", "topic filter of the commands", None, "commands"),
)
SECRETS = "wifi.password", "broker.password"


class Wrong(Exception):
    """The argument is one line."""


def get(config, key):
    """Return what config holds at a path, ... if it does not say."""
    for name in key.split("."):
        if type(config) is not dict or name not in config:
            return ...
        config = config[name]
    return config


def put(config, key, value):
    """Set a path of config, making the sections on its way."""
    *sections, name = key.split(".")
    for section in sections:
        if type(config.get(section)) is not dict:
            config[section] = {}
        config = config[section]
    config[name] = value


def row_of(key):
    """Return (default, kind) of a key; (default, "section") of a section.  Raises Wrong."""
    rows = device._TABLE
    names = key.split(".")
    for n, name in enumerate(names):
        row = next((row for row in rows if row[0] == name), None)
        if row is None:
            known = ", ".join(".".join(names[:n] + [row[0]]) for row in rows)
            raise Wrong("%s: an unknown key, expected one of %s" % (key, known))
        if len(row) != 3:
            if n + 1 < len(names):
                raise Wrong("%s: %s has no keys below it" % (key, ".".join(names[: n + 1])))
            return row[1], row[2]
        rows = row[2]
    return (None if row[1] is None else ...), "section"


def default_of(key):
    """What a key means when it is left out; ... if it must be given or is a section that is there by default."""
    return row_of(key)[0]


def value_of(key, text):
    """Return the value of a text as it is typed; what is no number, flag or null stays a text, for the validator.

    Raises Wrong for an unknown key and for a section that is neither null nor an object.
    """
    default, kind = row_of(key)
    if kind == "section":
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        if value is not None and type(value) is not dict:
            raise Wrong("%s: found a text, expected null or its keys one by one, such as %s.%s=..." % (key, key, "KEY"))
        return value
    if text == "null" and default is None:
        return None
    if kind in ("number", "sectors", "flag", "version"):
        try:
            return json.loads(text)
        except ValueError:
            return text
    return text


def from_make(flags):
    """Return the KEY=VALUE texts that stand in MAKEFLAGS.  make doubles each $ and puts a \\ before blank and \\."""
    words, word, i = [], "", 0
    while i < len(flags):
        c = flags[i]
        if c == "\\" and i + 1 < len(flags):
            i += 1
            word += flags[i]
        elif c == "$" and flags[i + 1 : i + 2] == "$":
            i += 1
            word += c
        elif c == " ":
            words.append(word)
            word = ""
        else:
            word += c
        i += 1
    words.append(word)
    if "--" not in words:
        return []
    given = [word for word in words[words.index("--") + 1 :] if "=" in word]
    # Capitals are the Makefile's own variables.
    return [word for word in given if not word.partition("=")[0].isupper()]


def read(path):
    """Return the configuration in a file, {} if there is none.  Raises Wrong."""
    try:
        text = path.read_text("utf-8-sig")
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as e:
        raise Wrong("%s: cannot be read: %s" % (path, e))
    try:
        config = json.loads(text)
    except json.JSONDecodeError as e:
        raise Wrong("%s: line %d: found something that is not JSON; mend or remove it" % (path, e.lineno))
    if type(config) is not dict:
        raise Wrong("%s: found no object; mend or remove it" % path)
    return config


def problems_of(path):
    """Return the lines that the device would print for a configuration file, none if it is right."""
    try:
        device.load(str(path))
    except ConfigError as e:
        return list(e.problems)
    return []


def write(path, config):
    """Replace the file, so that it is the old or the new one, and only its owner can read it.  Raises OSError."""
    handle, name = tempfile.mkstemp(prefix=path.name + ".", dir=path.parent)  # mode 600
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def _in_order(config, rows):
    """The same with the keys in the order of the validator's table."""
    ordered = {}
    for row in rows:
        if row[0] in config:
            value = config[row[0]]
            ordered[row[0]] = _in_order(value, row[2]) if len(row) == 3 and value is not None else value
    return ordered


# -- questions


def ask(config, keys, prompt=input, secret=getpass.getpass):
    """Ask for keys, each until the validator has nothing against the answer, and put the answers into config.

    Raises EOFError when nobody answers any more.
    """
    for key, words, none, needs in QUESTIONS:
        if key not in keys or (needs and _is_off(config, needs)):
            continue
        while True:
            now = _present(config, key)
            shown = "set, not shown" if key in SECRETS and now else none if now is None else now
            hint = "" if shown is None or shown is ... else " [%s]" % shown
            hint += " (- for %s)" % none if none and now is not None else ""
            answer = (secret if key in SECRETS else prompt)("%s%s: " % (words, hint)).strip()
            if not answer:
                if now is ...:
                    print("  it has no default")
                    continue
                break
            problems = _set(config, key, None if answer == "-" and none else answer)
            if not problems:
                break
            for line in problems:
                print("  " + line)


def _is_off(config, key):
    return get(config, key) is None or (get(config, key) is ... and default_of(key) is None)


def _present(config, key):
    """What an empty answer would leave; ... if there is nothing yet."""
    if key == "broker.tls":
        tls = get(config, key)
        return (tls.get("ca") or "set") if type(tls) is dict else None
    if key == "wifi.ssid" and get(config, "wifi") is None:
        return None
    if key == "broker.port" and get(config, key) is ... and not _is_off(config, "broker.tls"):
        return 8883
    value = get(config, key)
    return default_of(key) if value is ... else value


def _set(config, key, answer):
    """Put an answer into config; return what the validator has against it, and then config is as before."""
    before = json.dumps(config)
    if key == "wifi.ssid" and answer is None:
        config["wifi"] = None
    elif key == "broker.tls":
        if answer is None:
            put(config, key, None)
        else:
            put(config, "broker.tls.ca", answer)
    elif answer is None:
        put(config, key, None)
    else:
        put(config, key, value_of(key, answer))
        if get(config, key) == default_of(key) and get(json.loads(before), key) is ...:
            config.clear()  # it goes without saying
            config.update(json.loads(before))
    if key == "broker.username" and answer is None and get(config, "broker.password") not in (None, ...):
        put(config, "broker.password", None)
    mine = [line for line in device.check(config) if line.startswith((key + ":", key + "."))]
    if mine:
        config.clear()
        config.update(json.loads(before))
    return mine


# -- the broker


def probe(config, directory, timeout_s=TIMEOUT_S):
    """Connect to the broker as a client of another name; return what came of it, as (is it all right, one line).

    Another name and a clean session: under the board's own the broker would drop the board's connection, and end the
    session that holds its messages.
    """
    broker = config["broker"]
    where = "%s:%d" % (broker["host"], broker["port"])
    if broker["host"] in ("localhost", "::1") or broker["host"].startswith("127."):
        where += " (which for the board is the board itself)"
    more = ""
    try:
        with socket.create_connection((broker["host"], broker["port"]), timeout_s) as link:
            if broker["tls"]:
                link, more = _secure(link, broker, directory)
            with link:
                name = "mqj-check-" + os.urandom(4).hex()
                five = broker["version"] == 5
                encode_connect = packet5.encode_connect if five else packet.encode_connect
                link.sendall(encode_connect(name, True, 10, broker["username"], broker["password"]))
                decoder = packet5.Decoder5() if five else packet.Decoder()
                while not decoder.next():
                    n = link.recv_into(decoder.space())
                    if not n:
                        return False, "%s: closed the connection without an answer: is it an MQTT broker?" % where
                    decoder.end += n
                if decoder.type != packet.CONNACK:
                    return False, "%s: answered with something that is not MQTT" % where
                if five and decoder.reason_code:
                    words = reasons.text(decoder.reason_code)
                    return False, "%s: broker refused the connection: %s" % (where, words)
                if decoder.return_code:
                    words = reasons.refused(decoder.return_code).partition(";")[0]
                    return False, "%s: %s" % (where, words)
                link.sendall(b"\xe0\x00")
    except ProtocolError:
        return False, "%s: answered with something that is not MQTT" % where
    except (socket.gaierror, UnicodeError):  # UnicodeError: a label is empty or too long
        return False, "%s: this machine finds no such name; an address always works" % where
    except ssl.SSLCertVerificationError as e:
        return False, "%s: its certificate is not accepted: %s" % (where, e.verify_message)
    except ssl.SSLError as e:
        return False, "%s: no TLS connection: %s" % (where, e.reason or e)
    except (TimeoutError, socket.timeout):
        return False, "%s: no answer within %g s" % (where, timeout_s)
    except OSError as e:
        return False, "%s: %s" % (where, e.strerror or e)
    return True, "%s: answers and takes the client%s" % (where, more)


def _secure(link, broker, directory):
    """Return (link in TLS, words on what was not checked)."""
    tls = broker["tls"]
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    files = {key: directory / (tls[key] or "").lstrip("/") for key in ("ca", "cert", "key") if tls[key]}
    there = {key: path for key, path in files.items() if path.is_file()}
    more = ""
    if tls["verify"] and "ca" in there:
        data = there["ca"].read_bytes()
        # PEM may have a text around it, in whatever encoding.
        context.load_verify_locations(cadata=data.decode("ascii", "ignore") if b"-----BEGIN" in data else data)
    else:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        if tls["verify"]:
            more = "; its certificate was not checked, because %s is not there" % files["ca"]
    if "cert" in there and "key" in there:
        try:
            context.load_cert_chain(there["cert"], there["key"])
        except ssl.SSLError:  # DER, which the board takes, is not taken here
            more += "; the client's own certificate was not shown, because it is not PEM"
    return context.wrap_socket(link, server_hostname=tls["server_hostname"] or broker["host"]), more


# -- the command line


def make(path, given, terminal, check_broker=True):
    """Make the configuration file; return the exit code.  Raises Wrong, OSError, EOFError."""
    config = read(path)
    keys = [question[0] for question in QUESTIONS]
    for text in given:
        key, equals, value = text.partition("=")
        if not equals:
            raise Wrong("%s: expected KEY=VALUE, such as broker.host=192.168.1.10" % text)
        put(config, key, value_of(key, value))
        keys = [k for k in keys if k != key and not k.startswith(key + ".") and not key.startswith(k + ".")]
    if terminal:
        print("%s: Enter keeps what is in brackets" % path)
        ask(config, keys)
    problems = device.check(config)
    for line in problems:
        print(line, file=sys.stderr)
    if problems:
        if not terminal and not given:
            hint = "config: give KEY=VALUE, such as wifi.ssid=... broker.host=...; or run it in a terminal"
            print(hint, file=sys.stderr)
        return 1
    write(path, _in_order(config, device._TABLE))
    ignored = ", and git ignores it" if path == ROOT / "config.json" else ""
    print("%s: written; only you can read it%s" % (path, ignored))
    if check_broker:
        good, line = probe(device.complete(config), path.parent)
        print(("config: " if good else "config: warning: ") + line)
    return 0


def check(path):
    """Say whether the file is right; return the exit code."""
    problems = problems_of(path)
    for line in problems:
        print(line, file=sys.stderr)
    if not problems:
        print("%s: as it should be" % path)
        if os.name == "posix" and path.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH):
            print("config: note: others on this machine can read it, passwords and all: chmod 600 %s" % path)
    return 1 if problems else 0


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("given", nargs="*", metavar="KEY=VALUE", help="a path of config.json and its value")
    parser.add_argument("--file", type=Path, default=ROOT / "config.json", help="config.json at the top")
    parser.add_argument("--check", action="store_true", help="only check the file")
    parser.add_argument("--no-broker", action="store_true", help="do not ask the broker")
    parser.add_argument("--make", action="store_true", help="take KEY=VALUE from make's own command line, too")
    args = parser.parse_args(argv)
    if args.check:
        return check(args.file)
    given = (from_make(os.environ.get("MAKEFLAGS", "")) if args.make else []) + args.given
    try:
        return make(args.file, given, sys.stdin.isatty(), not args.no_broker)
    except (EOFError, KeyboardInterrupt):
        sys.exit("\nconfig: stopped; nothing was written")
    except Wrong as e:
        sys.exit("config: %s" % e)
    except OSError as e:
        sys.exit("config: %s: %s" % (args.file, e.strerror or e))


if __name__ == "__main__":
    sys.exit(main())
