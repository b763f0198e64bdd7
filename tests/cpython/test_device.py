"""The device program as a board runs it, out of the box: boot.py and main.py on MicroPython, a real mosquitto."""

import json
import os
import queue
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import paho.mqtt.client as mqtt
from brokers import Mosquitto
from proxy import Proxy

ROOT = Path(__file__).resolve().parent.parent.parent
PATIENCE_S = 30


def _interpreter():
    return os.environ.get("MICROPYTHON") or str(Path(sys.executable).parent / "micropython")


def _board(directory, config, **environment):
    """Start the device with its files in directory; its flash is a file there."""
    for name in ("boot.py", "main.py"):
        shutil.copy(ROOT / name, directory)
    (directory / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    code = "for name in ('boot.py', 'main.py'):\n    exec(open(name).read(), {'__name__': '__main__'})"
    path = ":".join([".", ".frozen", str(ROOT / "lib"), str(ROOT / "tools" / "shim"), str(ROOT / "tools")])
    return subprocess.Popen(
        [_interpreter(), "-c", code],
        cwd=directory,
        env=dict(
            os.environ, MICROPYPATH=path, MQTT_DURABLE_NOR="flash.nor", MQTT_DURABLE_NOR_SIZE="65536", **environment
        ),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _config(port):
    return {"wifi": None, "broker": {"host": "127.0.0.1", "port": port}, "client_id": "mast7"}


def _listen(port, topic_filter, clean=True, login=None):
    """A paho client and the queue of (topic, payload) it receives.  login: (user, password)."""
    arrived = queue.Queue()
    ready = queue.Queue()
    client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, client_id="far", clean_session=clean)
    client.on_message = lambda _c, _u, message: arrived.put((message.topic, message.payload))
    client.on_subscribe = lambda *_: ready.put(True)
    if login:
        client.username_pw_set(*login)
    client.connect("127.0.0.1", port)
    client.loop_start()
    client.subscribe(topic_filter, 2)
    ready.get(timeout=PATIENCE_S)
    return client, arrived


def test_out_of_the_box_a_board_sends_telemetry_and_obeys_commands_also_those_sent_while_it_was_off(tmp_path):
    with Mosquitto() as broker:
        client, arrived = _listen(broker.port, "devices/mast7/#")
        board = _board(tmp_path, _config(broker.port))
        try:
            topic, payload = arrived.get(timeout=PATIENCE_S)
            assert topic == "devices/mast7/telemetry"
            assert json.loads(payload)["stats"]["stored"] >= 0
            broker.wait_log("devices/mast7/commands/#")
        finally:
            board.kill()  # SIGKILL: the power is cut
            board.communicate()
        client.publish("devices/mast7/commands/ping", b"are you there?", 2).wait_for_publish(PATIENCE_S)
        board = _board(tmp_path, _config(broker.port))
        try:
            while True:
                topic, payload = arrived.get(timeout=PATIENCE_S)
                if topic.startswith("devices/mast7/answers/"):
                    break
            assert (topic, payload) == ("devices/mast7/answers/ping", b"are you there?")
        finally:
            board.kill()
            board.communicate()
            client.disconnect()
            client.loop_stop()


def test_a_mistake_in_the_configuration_is_one_line_and_ends_at_the_repl(tmp_path):
    config = _config(1883)
    config["broker"]["port"] = "1883"
    output, _ = _board(tmp_path, config).communicate(timeout=PATIENCE_S)
    assert 'broker.port: found "1883", expected a whole number 1-65535' in output.splitlines()
    assert "Traceback" not in output


SECRET = "Kennwort-4711"


def _answer(arrived, command):
    while True:
        topic, payload = arrived.get(timeout=PATIENCE_S)
        if topic == "devices/mast7/answers/" + command:
            return payload


def test_log_over_mqtt_tells_what_went_wrong_and_neither_it_nor_the_console_shows_a_password(tmp_path):
    with Mosquitto(users={"mast7": SECRET, "far": "another"}) as broker, Proxy(broker.port) as proxy:
        config = _config(proxy.port)
        config["broker"].update(username="mast7", password=SECRET)
        config["log"] = {"level": "debug", "console": "debug"}
        client, arrived = _listen(broker.port, "devices/mast7/#", login=("far", "another"))
        proxy.refuse()
        board = _board(tmp_path, config)
        try:
            for line in board.stdout:
                if "no connection" in line:
                    break
            output = line
            proxy.accept()
            assert arrived.get(timeout=PATIENCE_S)[0] == "devices/mast7/telemetry"
            broker.wait_log("devices/mast7/commands/#")
            proxy.cut()
            for command in ("log", "stats", "telemetry", "ping", "unknown"):
                client.publish("devices/mast7/commands/" + command, "", 2)
            log = json.loads(_answer(arrived, "log"))["log"]
            answers = json.dumps(log)
            for command in ("stats", "telemetry", "unknown"):
                answers += _answer(arrived, command).decode()
        finally:
            board.kill()
            output += board.communicate()[0]
            client.disconnect()
            client.loop_stop()
        texts = [text for _, _, text, _ in log]
        for begin in ("reset cause: PWRON_RESET", "journal in partition:mqj: new", "no connection: ", "connected, "):
            assert [text for text in texts if text.startswith(begin)], begin
        assert texts.index("the application begins") < texts.index("connected, new session")
        assert [text for text in texts if text.startswith("connection lost: ")]
        assert "mqtt: info: connected, session present" in output
        assert SECRET not in output and SECRET not in answers


def test_refused_password_is_logged_but_not_shown(tmp_path):
    with Mosquitto(users={"mast7": "another"}) as broker:
        config = _config(broker.port)
        config["broker"].update(username="mast7", password=SECRET)
        board = _board(tmp_path, config)
        try:
            output = ""
            for line in board.stdout:
                output += line
                if "bad user name or password" in line or "not authorised" in line:
                    break
        finally:
            board.kill()
            output += board.communicate()[0]
        assert "mqtt: error: no connection: ConnectRefused: " in output and SECRET not in output


# What follows has an app.py beside main.py, and reads the console line by line.

# Numbers its readings by the mark that is stored with each.
COUNTER = """
import asyncio

async def main(client, config):
    n = client.mark or 0
    print("app: from", n + 1, "waiting", client.stats()["waiting"])
    while n < 60:
        n += 1
        await client.publish("out", str(n), qos=2, mark=n)
        print("app: published", n)
        await asyncio.sleep_ms(3)
    await client.drain()
    print("app: done")
    await asyncio.sleep_ms(3600000)
"""

CRASHES_ONCE = """
starts = 0

async def main(client, config):
    global starts
    starts += 1
    await client.publish("out", "start %d" % starts, qos=1)
    await client.drain()
    if starts == 1:
        raise KeyError("made to crash")
"""


class Console:
    """A device that is switched on, and what it says."""

    def __init__(self, directory, port, app=None, **environment):
        if app:
            (directory / "app.py").write_text(app)
        self._board = _board(directory, _config(port), **environment)
        self.lines = []

    def wait_line(self, text):
        """Read on to a line that begins like this and return it."""
        for line in self._board.stdout:
            self.lines.append(line.rstrip())
            if line.startswith(text):
                return line.rstrip()
        raise AssertionError("never said %r: %r" % (text, self.lines))

    def interrupt(self):
        self._board.send_signal(signal.SIGINT)

    def ended(self):
        """Return its exit status, when it has ended and all that it said is known."""
        self.lines += self._board.communicate(timeout=PATIENCE_S)[0].splitlines()
        return self._board.returncode

    def power_off(self):
        self._board.kill()
        return self.ended()


def test_queue_outlives_power_cuts_while_the_broker_is_away_and_arrives_once_in_order(tmp_path):
    with Mosquitto() as broker:
        client, arrived = _listen(broker.port, "out", clean=False)
        board = Console(tmp_path, broker.port, COUNTER)
        try:
            board.wait_line("app: published 3")
            broker.stop()
            board.wait_line("app: published 20")
            board.power_off()
            kept = sum("app: published" in line for line in board.lines)
            # The power also fails in the middle of flash operations.
            for cut in ("9,bits,mixed,1", "7,prefix,zeros,2", "11,bytes,random,3"):
                board = Console(tmp_path, broker.port, MQTT_DURABLE_NOR_KILL=cut)
                assert board.ended() == -signal.SIGKILL
            board = Console(tmp_path, broker.port)
            begun = board.wait_line("app: from").split()
            assert int(begun[2]) > kept and int(begun[4]) >= kept - 3
            board.wait_line("app: published 40")
            broker.start()
            board.wait_line("app: done")
            got = [arrived.get(timeout=PATIENCE_S)[1].decode() for _ in range(60)]
            assert got == [str(n) for n in range(1, 61)]
            board.power_off()
            # What it may not have recorded of the last acknowledgements doubles nothing.
            board = Console(tmp_path, broker.port)
            assert board.wait_line("app: from").startswith("app: from 61 ")
            board.wait_line("app: done")
            assert arrived.empty()
        finally:
            board.power_off()
            client.disconnect()
            client.loop_stop()


def test_ctrl_c_ends_it_in_order(tmp_path):
    with Mosquitto() as broker:
        board = Console(tmp_path, broker.port)
        broker.wait_log("Sending SUBACK to mast7")
        board.interrupt()
        board.ended()
        broker.wait_log("Received DISCONNECT from mast7")
        assert "main.py: the board is at the REPL; main() starts again" in board.lines
        assert not [line for line in board.lines if "Traceback" in line], board.lines


def test_application_that_crashes_is_started_again(tmp_path):
    with Mosquitto() as broker:
        client, arrived = _listen(broker.port, "out")
        board = Console(tmp_path, broker.port, CRASHES_ONCE)
        assert [arrived.get(timeout=PATIENCE_S)[1] for _ in range(2)] == [b"start 1", b"start 2"]
        board.ended()
        client.disconnect()
        client.loop_stop()
        assert "KeyError: made to crash" in board.lines and "main.py: the application has ended" in board.lines


def test_flash_full_of_rubbish_does_not_stop_it(tmp_path):
    with Mosquitto() as broker:
        board = Console(tmp_path, broker.port)
        broker.wait_log("Sending SUBACK to mast7")
        board.power_off()
        flash = tmp_path / "flash.nor"
        data = bytearray(flash.read_bytes())
        data[:65536] = bytes(i * 73 + (i >> 8) & 255 for i in range(65536))
        flash.write_bytes(data)
        client, arrived = _listen(broker.port, "devices/mast7/telemetry")
        board = Console(tmp_path, broker.port)
        report = json.loads(arrived.get(timeout=PATIENCE_S)[1])
        board.power_off()
        client.disconnect()
        client.loop_stop()
        assert report["stats"]["stored"] == 0


# What follows sleeps: the shim's deepsleep() ends the process, and the test starts it again as the board would.

# One numbered reading a waking.
READING = """
async def main(client, config):
    client.on("in", lambda message: print("app: got", message.payload.decode()))
    n = (client.mark or 0) + 1
    await client.publish("out", str(n), qos=2, mark=n)
    print("app: published", n)
    if n == 1:
        await client.subscribe("in", 2)
"""

WOKEN = "4"  # machine.DEEPSLEEP_RESET


def _wake(directory, config, cause=WOKEN):
    """Let the board be awake once; return its console."""
    board = _board(directory, config, MQTT_DURABLE_RESET_CAUSE=cause)
    try:
        lines = board.communicate(timeout=PATIENCE_S)[0].splitlines()
    finally:
        board.kill()
    assert not [line for line in lines if "Traceback" in line], lines
    return lines


def _slept(lines):
    return lines[-1] == "deepsleep"  # SystemExit's argument


def _sleeping(port, **sleep):
    return dict(_config(port), sleep=dict({"every_s": 600, "awake_s": 20, "reach_s": 0}, **sleep))


def test_readings_of_a_board_that_sleeps_arrive_once_in_order_also_from_wakings_without_a_broker(tmp_path):
    (tmp_path / "app.py").write_text(READING)
    with Mosquitto() as broker:
        client, arrived = _listen(broker.port, "out", clean=False)
        config = _sleeping(broker.port)
        away = _sleeping(broker.port, awake_s=5)
        published = 0
        running = True
        try:
            for up in (True, False, True, False, False, True, True):
                if up and not running:
                    broker.start()
                elif running and not up:
                    broker.stop()
                running = up
                lines = _wake(tmp_path, config if up else away)
                published += 1
                assert "app: published %d" % published in lines and _slept(lines), lines
            got = [arrived.get(timeout=PATIENCE_S)[1].decode() for _ in range(published)]
            assert got == [str(n) for n in range(1, published + 1)]
            assert arrived.empty()
        finally:
            client.disconnect()
            client.loop_stop()


def test_a_board_that_sleeps_gets_what_was_sent_to_it_meanwhile(tmp_path):
    (tmp_path / "app.py").write_text(READING)
    with Mosquitto() as broker:
        client, _ = _listen(broker.port, "out")
        try:
            config = _sleeping(broker.port)
            assert _slept(_wake(tmp_path, config))
            for text in (b"first", b"second"):
                client.publish("in", text, 2).wait_for_publish(PATIENCE_S)
            lines = _wake(tmp_path, config)
            assert [line for line in lines if "got" in line] == ["app: got first", "app: got second"] and _slept(lines)
            lines = _wake(tmp_path, config)
            assert not [line for line in lines if "got" in line] and _slept(lines)
        finally:
            client.disconnect()
            client.loop_stop()


def test_out_of_the_box_a_board_that_sleeps_sends_telemetry_and_answers_what_was_asked_meanwhile(tmp_path):
    with Mosquitto() as broker:
        client, arrived = _listen(broker.port, "devices/mast7/#")
        try:
            config = _sleeping(broker.port)
            assert _slept(_wake(tmp_path, config))
            assert json.loads(arrived.get(timeout=PATIENCE_S)[1])["started"] == "sleep"
            client.publish("devices/mast7/commands/ping", b"asleep?", 2).wait_for_publish(PATIENCE_S)
            assert _slept(_wake(tmp_path, config))
            topics = [arrived.get(timeout=PATIENCE_S) for _ in range(3)]
            assert ("devices/mast7/answers/ping", b"asleep?") in topics
            assert [topic for topic, _ in topics].count("devices/mast7/telemetry") == 1  # and the command itself
        finally:
            client.disconnect()
            client.loop_stop()


def test_a_board_that_sleeps_stays_at_the_repl_with_a_bad_configuration(tmp_path):
    config = _sleeping(1883, awake_s=600)
    lines = _wake(tmp_path, config)
    assert "sleep.every_s: found 600, expected more than sleep.awake_s, which is 600" in lines
    assert lines[-1] == "main.py: the board is at the REPL; main() starts again"
