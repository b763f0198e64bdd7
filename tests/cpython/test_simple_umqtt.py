"""The same program texts under the real umqtt.simple and under ours: MicroPython, a real mosquitto, paho far away.

Compared is all that can be seen: what the program prints, what the far side receives.  UMQTT=DIRECTORY names another
umqtt.simple than .venv's (the file DIRECTORY/umqtt/simple.py), UMQTT_EXAMPLES=DIRECTORY its published examples, which
its package lacks.  Then what umqtt.simple has not: the process is killed, and nothing is lost or doubled.
"""

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from pathlib import Path

import paho.mqtt.client as mqtt
import pytest
from brokers import Mosquitto, free_port
from mqtt_durable.simple import MQTTClient
from packet_types import PUBACK, PUBCOMP, PUBLISH, PUBREC, PUBREL
from proxy import DOWN, UP, Proxy

ROOT = Path(__file__).resolve().parent.parent.parent
UMQTT = Path(os.environ.get("UMQTT") or ROOT / ".venv" / "umqtt")
EXAMPLES = os.environ.get("UMQTT_EXAMPLES")
PATIENCE_S = 60
PATHS = {
    "umqtt.simple": [UMQTT],
    "mqtt_durable.simple": [ROOT / "lib"],
}
FIVE = """
def MQTTClient(*args, **more):
    from mqtt_durable.simple import MQTTClient
    return MQTTClient(*args, version=5, **more)
"""
VERSIONS = pytest.mark.parametrize("version", (4, 5))
BOARD = [ROOT / "tools" / "shim", ROOT / "tools"]


def _interpreter():
    return os.environ.get("MICROPYTHON") or str(Path(sys.executable).parent / "micropython")


class Program:
    """A program text that runs under one of the two modules.  .lines: what it has printed."""

    def __init__(self, module, text, directory, version=4):
        self.lines = []
        text = text.replace("umqtt.simple", module)
        if version == 5:
            end = text.index("\n", text.index("MQTTClient")) + 1  # of the import
            text = text[:end] + FIVE + text[end:]
        self.process = subprocess.Popen(
            [_interpreter(), "-c", text],
            cwd=directory,
            env=dict(os.environ, MICROPYPATH=":".join([".", ".frozen", *map(str, PATHS[module] + BOARD)])),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def wait_line(self, text):
        for line in self.process.stdout:
            self.lines.append(line.rstrip())
            if text in line:
                return
        raise AssertionError("%r has not come: %s" % (text, self.lines))

    def end(self):
        out, _ = self.process.communicate("\n", timeout=PATIENCE_S)
        self.lines += out.splitlines()
        assert not any("Traceback" in line for line in self.lines), self.lines

    def kill(self):
        self.process.kill()
        self.process.communicate()


class Far:
    """A paho client that receives what has these topics, with a persistent session."""

    def __init__(self, port, topics=("out/#", "status/#"), **login):
        self.arrived = queue.Queue()
        ready = queue.Queue()
        self.client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, client_id="far", clean_session=False)
        if login:
            self.client.username_pw_set(**login)
        self.client.on_message = lambda _c, _u, m: self.arrived.put([m.topic, m.payload.decode(), m.qos, m.retain])
        self.connected = threading.Event()
        self.client.on_connect = lambda *_: self.connected.set()
        self.client.on_disconnect = lambda *_: self.connected.clear()
        self.client.reconnect_delay_set(1, 1)
        self.client.on_subscribe = lambda *_: ready.put(True)
        self.client.connect("127.0.0.1", port)
        self.client.loop_start()
        self.client.subscribe([(topic, 2) for topic in (*topics, "out/end")])
        ready.get(timeout=PATIENCE_S)

    def publish(self, topic, payload, qos=2, retain=False):
        self.client.publish(topic, payload, qos, retain).wait_for_publish(PATIENCE_S)

    def all(self):
        """All that has been sent until now."""
        assert self.connected.wait(PATIENCE_S)
        self.publish("out/end", "")
        got = []
        while True:
            message = self.arrived.get(timeout=PATIENCE_S)
            if message[0] == "out/end":
                return got
            got.append(message)

    def close(self):
        self.client.disconnect()
        self.client.loop_stop()


def _gone(broker, count):
    """Return when so many connections of the program have ended."""
    with broker._news:
        assert broker._news.wait_for(
            lambda: sum("lient prog" in line and ("disconnected" in line or "closed" in line) for line in broker.log)
            >= count,
            PATIENCE_S,
        )


HEAD = """
from umqtt.simple import MQTTClient, MQTTException
import sys
def show(topic, msg):
    print("got", type(topic), topic, type(msg), len(msg), msg[:40])
def make(**more):
    return MQTTClient("prog", "127.0.0.1", PORT, **more)
def ready():
    print("ready")
    sys.stdin.readline()
"""

# Name -> steps: a program text; "wait" a line of it, then what the far side does meanwhile.
CASES = {
    "publish at QoS 0 and 1, retained or not, text or bytes, empty or large": """
c = make()
print(c.connect())
print(c.publish(b"out/a", b"1"), c.publish("out/b", "2"), c.publish(b"out/c", b"3", True))
print(c.publish(b"out/d", b"4", qos=1), c.publish(topic="out/e", msg=bytearray(b"5"), retain=True, qos=1))
print(c.publish(b"out/f", b""), c.publish(b"out/g", b"z" * 300), c.publish(b"out/h", b"y" * 20000))
print(c.publish(b"out/i", b"", qos=1), c.publish(b"out/j", b"x" * 3000, False, 1))
for n in range(30):
    c.publish(b"out/k", b"%d" % n, qos=n & 1)
print(c.disconnect())
""",
    "subscribe, and wait for messages at QoS 0 and 1": """
ended = []
def take(topic, msg):
    show(topic, msg)
    if msg == b"end":
        ended.append(True)
c = make()
print(c.set_callback(take))
c.connect()
print(c.subscribe(b"in/a"), c.subscribe("in/b/#", 1), c.subscribe(topic=b"in/+/c", qos=1))
for topic, qos in ((b"in/a", 0), (b"in/a", 1), (b"in/b", 1), (b"in/b/x/y", 0), (b"in/z/c", 1), (b"in/z/d", 1)):
    c.publish(topic, topic + b" at %d" % qos, qos=qos)
c.publish(b"in/a", b"m" * 3000)
c.publish(b"in/a", b"")
c.publish(b"in/a", b"end", qos=1)
while not ended:
    c.wait_msg()
print("end")
c.disconnect()
""",
    "check_msg returns None at once when nothing is there": """
import time
got = []
c = make()
c.set_callback(lambda topic, msg: got.append((topic, msg)))
c.connect()
c.subscribe(b"in/a")
print(c.check_msg(), got)
c.publish(b"in/a", b"1")
while not got:
    c.check_msg()
print(got)
print(c.check_msg())
c.disconnect()
""",
    "a program that polls the socket gets every message": """
import select
got = []
c = make()
c.set_callback(lambda topic, msg: got.append((topic, msg)))
c.connect()
c.subscribe(b"in/a")
p = select.poll()
p.register(c.sock, select.POLLIN)
ready()
while len(got) < 3:
    if p.poll(-1):
        c.check_msg()
print(got)
c.disconnect()
""",
    "ping": """
c = make(keepalive=60)
c.connect()
print(c.ping())
print(c.wait_msg())
print(c.check_msg())
c.disconnect()
""",
    "the last will comes when the program dies, with its QoS and retain flag": """
c = make(keepalive=60)
print(c.set_last_will(b"status/prog", b"gone", True, 1))
c.connect()
c.publish(b"out/a", b"alive")
c.sock.close()
""",
    "the last will does not come after disconnect()": """
c = make()
c.set_last_will("status/prog", "gone", qos=1)
print(c.connect())
c.disconnect()
""",
    "a wrong password is an MQTTException with the return code": """
for login in ({"user": "u", "password": "p"}, {"user": "u", "password": "wrong"}, {}):
    c = make(**login)
    try:
        print(c.connect())
        c.publish(b"out/a", b"1", qos=1)
        c.disconnect()
    except MQTTException as e:
        print("refused", e.args)
""",
    "a persistent session: the broker keeps the subscription and the messages": """
c = make()
c.set_callback(show)
print(c.connect(clean_session=False))
c.subscribe(b"in/a", 1)
c.disconnect()
ready()
print(c.connect(False))
for _ in range(3):
    c.wait_msg()
print(c.check_msg())
c.publish(b"out/a", b"1", qos=1)
c.disconnect()
print(c.connect())
c.disconnect()
print(c.connect(False))
c.disconnect()
""",
    "a retained message comes with each subscribe()": """
c = make()
c.set_callback(show)
c.connect(False)
for _ in range(2):
    c.subscribe(b"status/kept")
    c.wait_msg()
c.disconnect()
c.connect(False)
c.subscribe(b"status/kept")
c.wait_msg()
c.disconnect()
""",
    "publishing at QoS 0, and subscribing, in the callback": """
c = make()
def answer(topic, msg):
    show(topic, msg)
    if topic == b"in/a":
        c.publish(b"out/echo", msg)
        c.subscribe(b"in/b")
        c.publish(b"in/b", b"from inside")
c.set_callback(answer)
c.connect()
c.subscribe(b"in/a")
c.publish(b"in/a", b"1")
c.wait_msg()
c.wait_msg()
c.disconnect()
""",
    "an exception in the callback comes out of wait_msg(), and the connection stays": """
c = make()
def fail(topic, msg):
    raise KeyError(msg)
c.set_callback(fail)
c.connect()
c.subscribe(b"in/a")
c.publish(b"in/a", b"1")
try:
    c.wait_msg()
except KeyError as e:
    print("raised", e.args)
c.publish(b"out/a", b"2", qos=1)
c.disconnect()
""",
    "nobody listens": """
c = MQTTClient("prog", "127.0.0.1", FREE)
for _ in range(2):
    try:
        c.connect()
    except OSError as e:
        print(type(e), e.args[0])
c = make()
c.connect()
c.disconnect()
""",
    "the broker ends: wait_msg() and check_msg() raise OSError(-1), after connect() all is well again": """
c = make()
c.set_callback(show)
for call in (c.wait_msg, c.check_msg):
    c.connect()
    c.subscribe(b"in/a")
    ready()
    try:
        call()
    except OSError as e:
        print(type(e), e.args[0])
c.connect()
c.publish(b"out/a", b"1", qos=1)
c.disconnect()
""",
    "the attributes that programs use": """
c = make(user=None, keepalive=7)
print(c.client_id, c.server, c.port == PORT, c.keepalive, c.user, c.pswd, c.sock, c.cb)
print(MQTTClient("a", "b").port, MQTTClient("a", "b", ssl=True).port)
print(c.lw_topic, c.lw_msg, c.lw_qos, c.lw_retain)
c.set_callback(show)
print(c.cb is show)
c.client_id = b"prog"
c.connect()
c.cb = None
c.disconnect()
""",
    "unsubscribe": """
c = make()
c.set_callback(show)
c.connect()
c.subscribe(b"in/a")
c.subscribe(b"in/b")
print(c.unsubscribe(b"in/a"))
c.publish(b"in/a", b"1")
c.publish(b"in/b", b"2")
print(c.wait_msg())
c.disconnect()
""",
    "a reconnecting program, with a new client each time": """
for n in range(3):
    c = make()
    c.connect(n > 1)
    c.publish(b"out/a", b"%d" % n, qos=1)
    if n:
        c.disconnect()
""",
}

# What the far side does while the program waits, and how many connections of the program end.
MEANWHILE = {
    "a program that polls": lambda broker, far: [far.publish("in/a", "%d" % n, 0) for n in range(3)] and far.all(),
    "a persistent session": lambda broker, far: [far.publish("in/a", "%d" % n, 1) for n in range(3)],
    "the broker ends": lambda broker, far: broker.restart() or far.all(),
}
WAITS = {"the broker ends": 2}
KEPT = "a retained message"


def _of(table, name, otherwise=None):
    return next((value for key, value in table.items() if name.startswith(key)), otherwise)


def _observe(module, name, directory, version=4):
    """Run a case; return what was printed and what the far side got."""
    source = UMQTT / "umqtt" / "simple.py"
    assert source.exists(), "no umqtt.simple in %s: run `make setup`" % UMQTT
    if name == "unsubscribe" and "def unsubscribe" not in source.read_text():
        pytest.skip("the package's umqtt.simple has no unsubscribe() yet")
    login = {"username": "far", "password": "f"} if "password" in name else {}
    with Mosquitto(users={"u": "p", "far": "f"} if login else None) as broker:
        with contextlib.closing(Far(broker.port, **login)) as far:
            if name.startswith(KEPT):
                far.publish("status/kept", "kept", 1, True)
                far.all()
            ports = "PORT = %d\nFREE = %d\n" % (broker.port, free_port())
            program = Program(module, ports + HEAD + CASES[name], directory, version)
            try:
                for _ in range(_of(WAITS, name, 1) if _of(MEANWHILE, name) else 0):
                    program.wait_line("ready")
                    _of(MEANWHILE, name)(broker, far)
                    program.process.stdin.write("\n")
                    program.process.stdin.flush()
                program.end()
            finally:
                program.kill()
            _gone(broker, 1)
            assert any("as prog (p%d" % (5 if version == 5 else 2) in line for line in broker.log), broker.log
            return program.lines, far.all() + sorted(_retained(broker, login))


def _retained(broker, login):
    """What a newcomer is told."""
    far = queue.Queue()
    client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, client_id="newcomer")
    if login:
        client.username_pw_set(**login)
    client.on_message = lambda _c, _u, m: far.put(["retained " + m.topic, m.payload.decode(), m.qos, m.retain])
    client.on_connect = lambda c, *_: c.subscribe("#", 2)
    client.on_subscribe = lambda c, *_: c.publish("end", "", 2)
    client.connect("127.0.0.1", broker.port)
    client.loop_start()
    got = []
    while not got or got[-1][0] != "retained end":
        got.append(far.get(timeout=PATIENCE_S))
    client.disconnect()
    client.loop_stop()
    return [message for message in got if message[3]]


@pytest.mark.parametrize("name", CASES)
def test_the_same_program_does_the_same_under_umqtt_simple_and_under_ours(name, tmp_path):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    expected = _observe("umqtt.simple", name, theirs)
    assert any(expected), "the program does nothing"
    for version in 4, 5:
        ours = tmp_path / str(version)
        ours.mkdir()
        found = _observe("mqtt_durable.simple", name, ours, version)
        if version == 5:
            found = json.loads(json.dumps(found).replace("refused (135,)", "refused (5,)"))  # not authorized
        assert json.dumps(found, indent=1) == json.dumps(expected, indent=1)


# An example connects to port 1883 of whatever server it names, and waits for a button: on a board these are given.
SOCKET = """
from usocket import *
from usocket import getaddrinfo as _getaddrinfo

def getaddrinfo(host, port, *more):
    return _getaddrinfo("127.0.0.1", PORT if port == 1883 else port, *more)
"""
MACHINE = """
def unique_id():
    return b"\\x01\\x02"

class Pin:
    IN, OUT = 0, 1
    presses = [1, 0, 1, 1, 0]

    def __init__(self, number, mode, value=None):
        self.mode = mode

    def value(self, new=None):
        if self.mode == self.OUT:
            print("led", new)
        elif self.presses:
            return self.presses.pop(0)
        else:
            raise SystemExit
"""


@pytest.mark.skipif(not EXAMPLES, reason="UMQTT_EXAMPLES=DIRECTORY names no examples of umqtt.simple")
@pytest.mark.parametrize("name", ("example_pub", "example_sub", "example_sub_led", "example_pub_button"))
def test_the_published_examples_run_unchanged_but_for_their_import(name, tmp_path):
    with Mosquitto() as broker, contextlib.closing(Far(broker.port, ("foo_topic", "led"))) as far:
        (tmp_path / "socket.py").write_text("PORT = %d\n" % broker.port + SOCKET)
        (tmp_path / "machine.py").write_text(MACHINE)
        program = Program("mqtt_durable.simple", (Path(EXAMPLES) / (name + ".py")).read_text(), tmp_path)
        try:
            if name.startswith("example_sub"):
                broker.wait_log("Received SUBSCRIBE from " + ("umqtt_client" if name == "example_sub" else "0102"))
                for payload in ("on", "toggle", "off"):
                    far.publish("foo_topic", payload)
                    far.publish("led", payload)
                program.wait_line("b'off'")
                assert [line for line in program.lines if line[:3] == "(b'"] == [
                    "(b'%s', b'%s')" % ("foo_topic" if name == "example_sub" else "led", payload)
                    for payload in ("on", "toggle", "off")
                ]
            else:
                program.end()
                assert [message[:2] for message in far.all()] == {
                    "example_pub": [["foo_topic", "hello"]],
                    "example_pub_button": [["led", "toggle"]] * 2,
                }[name]
        finally:
            program.kill()


COUNTS = """
from umqtt.simple import MQTTClient
c = MQTTClient("prog", "127.0.0.1", PORT)
try:
    c.connect(CLEAN)
except OSError:
    pass  # publish() will
n = c.mark or 0
while n < 8:
    n += 1
    c.publish(b"out/n", b"%d" % n, qos=QOS, mark=n)
while c.store.waiting():  # the last one was published, but not acknowledged, before the kill
    c.ping()
    c.wait_msg()
c.disconnect()
print("done", c.store.waiting())
"""

LISTENS = """
from umqtt.simple import MQTTClient
def note(topic, msg):
    with open("got", "a") as f:
        f.write(b"%s %s\\n" % (msg, str(c.token).encode()))
c = MQTTClient("prog", "127.0.0.1", PORT)
c.set_callback(note)
c.connect(False)
c.subscribe(b"in/n", QOS)
print("ready")
while True:
    c.wait_msg()
"""


ECHOES = """
from umqtt.simple import MQTTClient
c = MQTTClient("prog", "127.0.0.1", PORT)
got = []
c.set_callback(lambda topic, msg: got.append(len(msg)))
c.connect(False, timeout=20)
c.subscribe(b"in/n", 2)
for n in range(12):
    c.publish(b"in/n", b"x" * (n * 100), qos=n % 3)
while len(got) < 12:
    c.wait_msg()
print(sorted(got) == [n * 100 for n in range(12)])
c.disconnect()
"""


@VERSIONS
def test_messages_come_whole_over_a_link_that_carries_a_byte_at_a_time(version, tmp_path):
    with Mosquitto() as broker, Proxy(broker.port) as link:
        link.chunk(1)
        program = Program("mqtt_durable.simple", "PORT = %d\n" % link.port + ECHOES, tmp_path, version)
        program.end()
        assert program.lines == ["True"]


@VERSIONS
def test_on_cpython_too_it_speaks_with_a_real_broker(version):
    got = []
    with Mosquitto() as broker:
        c = MQTTClient("p7", "127.0.0.1", broker.port, home="ram", version=version)
        c.set_callback(lambda topic, msg: got.append((topic, msg)))
        c.connect(False, timeout=PATIENCE_S)
        c.subscribe(b"out/#", 2)
        sent = [(b"out/%d" % qos, b"x" * size) for qos, size in ((0, 10), (1, 1000), (2, 3000), (0, 16000))]
        for topic, msg in sent:
            c.publish(topic, msg, qos=topic[4] - 48)
        while len(got) < len(sent):
            c.wait_msg()
        c.disconnect()
        assert c.connect(False) == 1 and c.check_msg() is None
        c.disconnect()
    assert got == sent


@pytest.mark.parametrize("version, clean", ((4, False), (4, True), (5, False)))
@pytest.mark.parametrize("when", ("before", "inside", "after"))
@pytest.mark.parametrize(
    "qos, direction, packet",
    (
        (1, UP, PUBLISH),
        (1, DOWN, PUBACK),
        (2, UP, PUBLISH),
        (2, DOWN, PUBREC),
        (2, UP, PUBREL),
        (2, DOWN, PUBCOMP),
    ),
)
def test_killed_between_publish_and_acknowledgement_nothing_is_lost_and_at_qos_2_nothing_doubled(
    qos, direction, packet, when, version, clean, tmp_path
):
    with Mosquitto() as broker, Proxy(broker.port) as link, contextlib.closing(Far(broker.port)) as far:
        text = "PORT = %d\nQOS = %d\nCLEAN = %s\n" % (link.port, qos, clean) + COUNTS
        cut = link.cut_at_packet(direction, packet, nth=4, when=when)
        program = Program("mqtt_durable.simple", text, tmp_path, version)
        try:
            cut.wait()
        finally:
            program.kill()
        program = Program("mqtt_durable.simple", text, tmp_path, version)
        program.end()
        assert program.lines[-1:] == ["done 0"], program.lines
        got = [int(payload) for _, payload, _, _ in far.all()]
        # With a clean session the broker forgets which it has had.
        assert (got if qos == 2 and not clean else list(dict.fromkeys(got))) == list(range(1, 9)), got


@VERSIONS
@pytest.mark.parametrize("when", ("before", "inside", "after"))
@pytest.mark.parametrize(
    "qos, direction, packet", ((1, UP, PUBACK), (2, UP, PUBREC), (2, DOWN, PUBREL), (2, UP, PUBCOMP))
)
def test_killed_between_the_callback_and_the_end_of_the_handshake_a_message_is_not_lost_and_at_qos_2_known_by_its_token(
    qos, direction, packet, when, version, tmp_path
):
    with Mosquitto() as broker, Proxy(broker.port) as link, contextlib.closing(Far(broker.port)) as far:
        text = "PORT = %d\nQOS = %d\n" % (link.port, qos) + LISTENS
        program = Program("mqtt_durable.simple", text, tmp_path, version)
        try:
            program.wait_line("ready")
            cut = link.cut_at_packet(direction, packet, nth=4, when=when)
            for n in range(8):
                far.publish("in/n", "%d" % n, qos)
            cut.wait()
        finally:
            program.kill()
        program = Program("mqtt_durable.simple", text, tmp_path, version)
        try:
            program.wait_line("ready")
            far.publish("in/n", "end", qos)
            got = []
            deadline = time.monotonic() + PATIENCE_S
            while "end" not in [number for number, _ in got] and time.monotonic() < deadline:
                got = [line.split() for line in (tmp_path / "got").read_text().splitlines() if line.count(" ") == 1]
        finally:
            program.kill()
        if qos == 2:
            # SIGKILL may strike any of them between what its callback did and the record of it: the token tells.
            got = [line for i, line in enumerate(got) if i == 0 or line != got[i - 1]]
        numbers = [number for number, _ in got]
        want = [str(n) for n in range(8)] + ["end"]
        assert (numbers if qos == 2 else list(dict.fromkeys(numbers))) == want, got
