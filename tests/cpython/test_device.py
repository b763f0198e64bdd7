"""The device program as a board runs it, out of the box: boot.py and main.py on MicroPython, a real mosquitto."""

import json
import os
import queue
import shutil
import subprocess
import sys
from pathlib import Path

import paho.mqtt.client as mqtt
from brokers import Mosquitto

ROOT = Path(__file__).resolve().parent.parent.parent
PATIENCE_S = 30


def _interpreter():
    return os.environ.get("MICROPYTHON") or str(Path(sys.executable).parent / "micropython")


def _board(directory, config):
    """Start the device with its files in directory; its flash is a file there."""
    for name in ("boot.py", "main.py"):
        shutil.copy(ROOT / name, directory)
    (directory / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    code = "for name in ('boot.py', 'main.py'):\n    exec(open(name).read(), {'__name__': '__main__'})"
    path = ":".join([".", ".frozen", str(ROOT / "lib"), str(ROOT / "tools" / "shim"), str(ROOT / "tools")])
    return subprocess.Popen(
        [_interpreter(), "-c", code],
        cwd=directory,
        env=dict(os.environ, MICROPYPATH=path, MQTT_DURABLE_NOR="flash.nor", MQTT_DURABLE_NOR_SIZE="65536"),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _config(port):
    return {"wifi": None, "broker": {"host": "127.0.0.1", "port": port}, "client_id": "mast7"}


def _listen(port, topic_filter):
    """A paho client and the queue of (topic, payload) it receives."""
    arrived = queue.Queue()
    ready = queue.Queue()
    client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, client_id="far")
    client.on_message = lambda _c, _u, message: arrived.put((message.topic, message.payload))
    client.on_subscribe = lambda *_: ready.put(True)
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
