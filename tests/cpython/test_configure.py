"""tools/configure.py: config.json made by KEY=VALUE or by questions, checked by the device's own validator."""

import json
import os
import pty
import select
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path

import configure
from brokers import Mosquitto, free_port
from certs import Authority

from mqtt_durable import config as device

ROOT = Path(__file__).resolve().parents[2]
TOOL = str(ROOT / "tools" / "configure.py")
SECRET = "Kennwort-4711"
WAIT_S = 60


def run(path, *arguments, tool=(sys.executable, TOOL)):
    done = subprocess.run(
        [*tool, "--file", str(path), *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    return done.returncode, done.stdout.decode()


def test_keys_and_values_make_a_file_that_the_device_takes_and_only_its_owner_reads(tmp_path):
    path = tmp_path / "config.json"
    given = (
        "wifi.ssid=my net",
        "wifi.password=" + SECRET,
        "broker.host=10.0.0.2",
        "telemetry.every_s=300",
        "log.level=debug",
    )
    code, said = run(path, "--no-broker", *given)
    assert code == 0 and SECRET not in said, said
    config = device.load(str(path))
    assert config["wifi"]["ssid"] == "my net" and config["wifi"]["password"] == SECRET
    assert config["telemetry"]["every_s"] == 300 and config["log"]["level"] == "debug"
    assert list(json.loads(path.read_text())) == ["wifi", "broker", "log", "telemetry"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    code, said = run(
        path, "--no-broker", "broker.host=10.0.0.3", "sleep.every_s=900", "client_id=plant7", "commands=null"
    )
    config = device.load(str(path))
    assert code == 0 and config["broker"]["host"] == "10.0.0.3" and config["wifi"]["password"] == SECRET
    assert config["sleep"]["every_s"] == 900 and config["client_id"] == "plant7" and config["commands"] is None
    assert run(path, "--check") == (0, "%s: as it should be\n" % path)
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


def test_nothing_is_written_when_something_is_wrong_and_no_password_is_shown(tmp_path):
    path = tmp_path / "config.json"
    for given, why in (
        ((), "broker.host: found nothing, expected a host name"),
        (("broker.host=mqtt://x", "wifi=null"), 'broker.host: found "mqtt://x"'),
        (
            ("wifi.ssid=a", "broker.host=b", "wifi.password=" + SECRET * 9),
            "wifi.password: found a text of 117 characters",
        ),
        (("broker.port=1883x",), 'broker.port: found "1883x", expected a whole number'),
        (("broker.prot=1",), "broker.prot: an unknown key, expected one of broker.host"),
        (("bro=1",), "bro: an unknown key, expected one of wifi, broker"),
        (("broker.host.name=1",), "broker.host has no keys below it"),
        (("wifi=" + SECRET,), "wifi: found a text, expected null or its keys one by one"),
        (("broker.host",), "expected KEY=VALUE"),
    ):
        code, said = run(path, "--no-broker", *given)
        assert code == 1 and why in said and SECRET not in said and "Traceback" not in said, said
        assert list(tmp_path.iterdir()) == []
    path.write_text('{"wifi": \n\n nonsense')
    assert run(path, "wifi=null") == (
        1,
        "config: %s: line 3: found something that is not JSON; mend or remove it\n" % path,
    )
    assert path.read_text() == '{"wifi": \n\n nonsense'


def test_checking_prints_the_devices_own_lines(tmp_path):
    path = tmp_path / "config.json"
    assert run(path, "--check")[0] == 1
    path.write_text('{"wifi": null, "broker": {"host": "h", "port": "1883"}}')
    assert run(path, "--check") == (1, 'broker.port: found "1883", expected a whole number 1-65535\n')
    path.write_text('{"wifi": null, "broker": {"host": "h"}}')
    path.chmod(0o644)
    code, said = run(path, "--check")
    assert code == 0 and "chmod 600" in said


def test_make_hands_over_what_was_typed_as_it_was_typed(tmp_path):
    path = tmp_path / "config.json"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    names = "a b", 'say "it"; $HOME $$ `x` \\ #1', "100% = ü", "(tab)"
    for name in names:
        command = [
            "make",
            "-s",
            "config",
            "FILE=%s" % path,
            "wifi.ssid=" + name,
            "broker.host=127.0.0.1",
            "broker.port=1",
        ]
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        assert done.returncode == 0, done.stdout
        assert json.loads(path.read_text())["wifi"]["ssid"] == name


# -- questions


class Answers:
    """Answers the questions in order; notes them."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.asked = []

    def __call__(self, words):
        self.asked.append(words)
        if not self.answers:
            raise EOFError
        return self.answers.pop(0)


def asked(config, *answers):
    """What comes of the answers: (the configuration, the questions)."""
    both = Answers(*answers)
    configure.ask(config, [row[0] for row in configure.QUESTIONS], both, both)
    assert both.answers == []
    return config, both.asked


def test_questions_take_defaults_on_enter_and_ask_again_after_a_mistake(capsys):
    # network, password (too short first), country, broker (with a mistake), TLS, port, version, user, id, topics
    config, words = asked({}, "home", "short", SECRET, "", "mqtt://x", "", "10.0.0.2", "", "", "", "", "", "", "30", "")
    assert config == {
        "wifi": {"ssid": "home", "password": SECRET},
        "broker": {"host": "10.0.0.2"},
        "telemetry": {"every_s": 30},
    }
    said = capsys.readouterr().out
    assert 'broker.host: found "mqtt://x"' in said and "wifi.password: found a text of 5 characters" in said
    assert "it has no default" in said
    assert device.check(config) == []


def test_questions_keep_what_is_there_and_show_no_password(capsys):
    config = {
        "wifi": {"ssid": "home", "password": SECRET},
        "broker": {"host": "h", "username": "u", "password": SECRET},
        "log": {"level": "debug"},
    }
    before = json.loads(json.dumps(config))
    after, words = asked(config, *[""] * 13)
    assert after == before
    assert "Wi-Fi network [home] (- for none: wired): " in words
    assert "Wi-Fi password [set, not shown] (- for none: an open network): " in words
    assert SECRET not in "".join(words) + capsys.readouterr().out


def test_a_dash_takes_away(capsys):
    config = {"wifi": {"ssid": "home"}, "broker": {"host": "h", "username": "u", "password": "p"}}
    after, words = asked(config, "-", "", "-", "", "5", "-", "", "", "", "")
    assert after["wifi"] is None and after["broker"] == {
        "host": "h",
        "tls": None,
        "version": 5,
        "username": None,
        "password": None,
    }
    assert device.check(after) == [] and not [line for line in words if "password" in line]


def test_tls_asks_for_the_ca_and_changes_the_port(capsys):
    after, words = asked({}, "-", "h", "/certs/ca.pem", "", "", "", "", "", "", "")
    assert after["broker"] == {"host": "h", "tls": {"ca": "/certs/ca.pem"}}
    assert "port of the broker [8883]: " in words and device.complete(after)["broker"]["port"] == 8883


def test_somebody_at_a_terminal_is_asked_and_passwords_are_not_echoed(tmp_path):
    path = tmp_path / "config.json"
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, TOOL, "--file", str(path), "--no-broker"],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
    )
    os.close(slave)
    said = b""
    seen = 0

    def wait_for(text):
        nonlocal said, seen
        while text not in said[seen:]:
            assert select.select([master], [], [], WAIT_S)[0], said
            said += os.read(master, 4096)
        seen = said.index(text, seen) + len(text)

    try:
        for question, answer in (
            (b"Wi-Fi network", b"home"),
            (b"Wi-Fi password", SECRET.encode()),
            (b"Wi-Fi country", b""),
            (b"address of the broker", b"10.0.0.2"),
            (b"TLS", b""),
            (b"port of", b""),
            (b"MQTT version", b""),
            (b"user name", b""),
            (b"client identifier", b"plant7"),
            (b"topic of the telemetry", b""),
            (b"seconds between", b""),
            (b"filter of the commands", b""),
        ):
            wait_for(question)
            wait_for(b": ")
            os.write(master, answer + b"\n")
        wait_for(b"written")
        assert process.wait(WAIT_S) == 0
    finally:
        process.kill()
        process.wait()
        os.close(master)
    assert SECRET.encode() not in said
    config = json.loads(path.read_text())
    assert config == {
        "wifi": {"ssid": "home", "password": SECRET},
        "broker": {"host": "10.0.0.2"},
        "client_id": "plant7",
    }


# -- the broker


def probed(port, tmp_path, **broker):
    config = device.complete({"wifi": None, "broker": dict({"host": "127.0.0.1", "port": port}, **broker)})
    return configure.probe(config, tmp_path, 10)


def answering(answer):
    """A server on a free port that says answer to the first who comes."""
    server = socket.create_server(("127.0.0.1", 0))

    def serve():
        link, _ = server.accept()
        with link:
            link.recv(4096)
            link.sendall(answer)

    thread = threading.Thread(target=serve)
    thread.start()
    return server, thread


def test_the_broker_says_whether_it_takes_such_a_client(tmp_path):
    with Mosquitto(users={"u": "right"}) as broker:
        for version in 4, 5:
            good, line = probed(broker.port, tmp_path, version=version, username="u", password="right")
            assert good and "answers and takes the client" in line
            good, line = probed(broker.port, tmp_path, version=version, username="u", password="wrong-and-secret")
            assert not good and ("user name" in line or "authori" in line) and "secret" not in line, line
    good, line = probed(free_port(), tmp_path)
    assert not good and "refused" in line
    good, line = probed(1883, tmp_path, host="no-such-name.invalid")
    assert not good and "finds no such name" in line
    for host in "a..b", "x" * 64 + ".lan":
        good, line = probed(1883, tmp_path, host=host)
        assert not good and "finds no such name" in line


def test_asking_the_broker_does_not_disturb_the_board_that_is_connected(tmp_path):
    import paho.mqtt.client as mqtt

    path = tmp_path / "config.json"
    with Mosquitto() as broker:
        lost = threading.Event()
        board = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, client_id="plant7", clean_session=False)
        board.on_disconnect = lambda *_: lost.set()
        board.connect("127.0.0.1", broker.port)
        board.loop_start()
        code, said = run(path, "wifi=null", "broker.host=127.0.0.1", "broker.port=%d" % broker.port, "client_id=plant7")
        assert code == 0 and "answers and takes the client" in said and "for the board is the board itself" in said
        broker.wait_log("mqj-check-")
        assert not lost.is_set()
        board.disconnect()
        board.loop_stop()


def test_what_is_no_broker_is_said_and_only_a_warning(tmp_path):
    for answer, why in (
        (b"HTTP/1.1 400\r\n", "not MQTT"),
        (b"", "without an answer"),
        (b"\x20\x02\x00\x02", "client_id"),
    ):
        server, thread = answering(answer)
        with server:
            port = server.getsockname()[1]
            code, said = run(tmp_path / "c.json", "wifi=null", "broker.host=127.0.0.1", "broker.port=%d" % port)
            thread.join()
        assert code == 0 and "config: warning: 127.0.0.1:%d" % port in said and why in said, said


def test_a_tls_broker_is_asked_in_tls_and_its_certificate_checked_if_the_ca_is_there(tmp_path):
    (tmp_path / "certs").mkdir()
    authority = Authority(tmp_path / "certs")
    other = Authority(tmp_path / "certs", "other")
    certfile, keyfile = authority.issue("server")
    names = {path: "/certs/" + Path(path).name for path in (authority.pem, authority.der, other.pem)}
    with Mosquitto(tls={"certfile": certfile, "keyfile": keyfile}) as broker:
        for ca in (authority.pem, authority.der):
            good, line = probed(broker.tls_port, tmp_path, tls={"ca": names[ca]})
            assert good and "was not checked" not in line, line
        text = Path(authority.pem).read_bytes()
        Path(authority.pem).write_bytes("Gültig\n".encode("latin-1") + text)
        for encoding in "pem", "der":
            files = authority.issue("own", encoding=encoding)
            own = {key: "/certs/" + Path(path).name for key, path in zip(("cert", "key"), files)}
            good, line = probed(broker.tls_port, tmp_path, tls=dict(own, ca=names[authority.pem]))
            assert good and ("own certificate was not shown" in line) == (encoding == "der"), line
        good, line = probed(broker.tls_port, tmp_path, tls={"ca": "/certs/none.pem"})
        assert good and "its certificate was not checked, because" in line
        good, line = probed(broker.tls_port, tmp_path, tls={"ca": names[other.pem]})
        assert not good and "its certificate is not accepted" in line
        good, line = probed(broker.port, tmp_path, tls={"ca": names[authority.pem]})
        assert not good
