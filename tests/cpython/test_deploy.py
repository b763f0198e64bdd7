"""tools/board.py, deploy.py, watch.py and journal.py's pull, with a board on a pseudo-terminal that runs this tree."""

import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import board
import deploy
import journal
import mpy
import watch
from brokers import Mosquitto, free_port
from ptyboard import PtyBoard
from raises import raises

ROOT = Path(__file__).resolve().parents[2]
WAIT_S = 60


def tree(path, config=None):
    """A copy of what is deployed."""
    path.mkdir()
    for name in ("boot.py", "main.py"):
        shutil.copy(ROOT / name, path)
    shutil.copytree(ROOT / "lib" / "mqtt_durable", path / "lib" / "mqtt_durable")
    if config:
        (path / "config.json").write_text(json.dumps(config))
    return path


def config_for(port, **more):
    broker = {"host": "127.0.0.1", "port": port}
    return dict({"wifi": None, "broker": broker, "client_id": "mast7", "journal": {"home": "file:j.bin"}}, **more)


def files_of(directory):
    """path -> bytes of a board's files."""
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def test_deploying_brings_a_board_from_nothing_to_its_first_acknowledged_message(tmp_path, capsys):
    with Mosquitto() as broker, PtyBoard(tmp_path / "fs") as there:
        root = tree(tmp_path / "root", config_for(broker.port))
        assert deploy.deploy(there.port, root, wait_s=WAIT_S) == 0
        files = files_of(there.directory)
        wanted = mpy.compile_tree(root)
        assert {path: files.get(path) for path in wanted} == wanted
        assert files["config.json"] == (root / "config.json").read_bytes()
    said = capsys.readouterr().out
    assert "%d of %d files copied" % ((len(wanted) + 1,) * 2) in said
    assert "main.py: client mast7" in said and "the broker has acknowledged the first message" in said


def test_deploying_again_copies_what_changed_deletes_what_is_dead_and_keeps_journal_and_configuration(tmp_path, capsys):
    with Mosquitto() as broker, PtyBoard(tmp_path / "fs") as there:
        root = tree(tmp_path / "root", config_for(broker.port))
        assert deploy.deploy(there.port, root, wait_s=WAIT_S) == 0
        capsys.readouterr()
        fs = there.directory
        mine = fs / "lib" / "mqtt_durable"
        count = len(mpy.compile_tree(root)) + 2  # app.py and config.json, too
        (mine / "client.py").write_text("an old source, which would win over client.mpy")
        (mine / "gone").mkdir()
        (mine / "gone" / "old.mpy").write_text("no longer part of it")
        (fs / "lib" / "umqtt.py").write_text("of the user")
        (fs / "mqj").mkdir()
        (fs / "mqj" / "0").write_text("a block of a journal")
        (root / "app.py").write_text(
            "async def main(client, config):\n    await client.publish('t', '1')\n    raise ValueError\n"
        )
        (root / "config.json").write_text(json.dumps(config_for(broker.port, telemetry=None)))
        before = files_of(fs)
        assert deploy.deploy(there.port, root, wait_s=WAIT_S) == 0
        after = files_of(fs)
        said = capsys.readouterr().out
        assert "1 of %d files copied" % (count - 1) in said, said
        assert "3 deleted: gone/old.mpy, gone, client.py" in said
        assert "the board keeps its config.json, which differs from the one here: CONFIG=1 replaces it" in said
        changed = {path for path in before if path in after and after[path] != before[path]} - {"j.bin"}
        assert changed == set()
        assert set(before) - set(after) == {"lib/mqtt_durable/client.py", "lib/mqtt_durable/gone/old.mpy"}
        assert set(after) - set(before) == {"app.py"} and not (mine / "gone").exists()
        assert deploy.deploy(there.port, root, True, WAIT_S) == 0
        assert (fs / "config.json").read_bytes() == (root / "config.json").read_bytes()
        assert "1 of %d files copied" % count in capsys.readouterr().out


def test_certificates_that_the_configuration_names_go_along(tmp_path):
    root = tree(tmp_path / "root", config_for(8883))
    config = config_for(8883)
    config["broker"]["tls"] = {"ca": "/certs/ca.pem"}
    (root / "config.json").write_text(json.dumps(config))
    assert deploy.local_config(root)[1] == {}
    (root / "certs").mkdir()
    (root / "certs" / "ca.pem").write_text("pem")
    assert deploy.local_config(root)[1] == {"certs/ca.pem": b"pem"}


def test_a_bad_configuration_is_not_deployed(tmp_path):
    root = tree(tmp_path / "root", config_for("1883"))
    error = raises(board.NoBoard, deploy.deploy, "/dev/none-such", root)
    assert 'broker.port: found "1883", expected a whole number 1-65535' in str(error)


def test_a_program_that_ends_at_the_repl_is_a_failure_that_shows_why(tmp_path, capsys):
    with PtyBoard(tmp_path / "fs") as there:
        assert deploy.deploy(there.port, tree(tmp_path / "root"), wait_s=WAIT_S) == 1
    said = capsys.readouterr().out
    assert "the board has no config.json, and there is none here: make config" in said
    assert "config.json: not found" in said and "the board is at its REPL" in said


def test_a_broker_that_is_away_is_a_failure_that_says_so(tmp_path, capsys):
    with PtyBoard(tmp_path / "fs") as there:
        root = tree(tmp_path / "root", config_for(free_port()))
        assert deploy.deploy(there.port, root, wait_s=30) == 1
    said = capsys.readouterr().out
    assert "no connection within 30 s; the board goes on" in said
    assert said.count("[not connected | waiting 1") == 1  # what does not change is not repeated


def test_frozen_firmware_gets_no_library(tmp_path, capsys):
    more = "class Frozen:\n    __file__ = 'mqtt_durable/__init__.py'\nsys.modules['mqtt_durable'] = Frozen\n"
    with PtyBoard(tmp_path / "fs", more=more) as there:
        deploy.deploy(there.port, tree(tmp_path / "root"), wait_s=WAIT_S)
        assert not (there.directory / "lib").exists() and (there.directory / "main.py").exists()
    assert "frozen in, which wins: lib/ is not copied" in capsys.readouterr().out


def test_a_board_without_room_keeps_what_it_has(tmp_path):
    more = "os = type('os', (), dict(os.__dict__, statvfs=lambda path: (4096, 0, 0, 5)))\nsys.modules['os'] = os\n"
    with PtyBoard(tmp_path / "fs", more=more) as there:
        error = raises(board.NoBoard, deploy.deploy, there.port, tree(tmp_path / "root"))
        assert "the board has 20 KiB free" in str(error)
        assert files_of(there.directory) == {}


def test_a_board_that_is_unplugged_in_the_middle_has_whole_files_and_can_be_deployed_again(tmp_path):
    with Mosquitto() as broker, PtyBoard(tmp_path / "fs") as there:
        root = tree(tmp_path / "root", config_for(broker.port))
        wanted = mpy.compile_tree(root)

        def cut(path, data, progress=None, put=board.Board.put):
            if path.endswith("session.mpy"):
                there.cut()
            put(self, path, data, progress)

        with board.Board(there.port) as self:
            self.stop()
            self.put = cut
            error = raises(board.NoBoard, deploy.copy, self, wanted, deploy.Terminal())
        assert "was it unplugged, or did the board reset?" in str(error)
        files = files_of(there.directory)
        assert 5 < len(files) < len(wanted)
        assert all(files[path] == wanted[path] for path in files if not path.endswith(".new"))
        there.plug()
        assert deploy.deploy(there.port, root, wait_s=WAIT_S) == 0


# -- the board


def test_the_program_is_ended_in_order_and_the_board_waits_without_main_py(tmp_path):
    fs = tmp_path / "fs"
    fs.mkdir()
    (fs / "boot.py").write_text("print('begins')\n")
    (fs / "main.py").write_text(
        "import time\ntry:\n    print('main')\n    while True:\n        time.sleep(1)\n"
        "except KeyboardInterrupt:\n    open('closed', 'w').close()\n"
    )
    with PtyBoard(fs) as there:
        with board.Board(there.port) as connected:
            there.wait_said(b"main\r\n")
            connected.stop()
            assert (fs / "closed").exists() and there.lives == 2 and there.said.count(b"main") == 1
            assert there.said.count(b"begins\r\n") == 2
            assert connected.run("print(6 * 7)") == "42\n"
            assert "ZeroDivisionError" in str(raises(board.NoBoard, connected.run, "1 / 0"))
            assert "No such file" in str(raises(board.NoBoard, connected.put, "none/a", b"x"))
            connected.start()
            there.wait_said(b"main\r\n", 2)


def test_a_tool_that_died_at_the_raw_repl_is_no_obstacle_for_the_next(tmp_path):
    with PtyBoard(tmp_path / "fs") as there:
        for _ in range(2):
            with board.Board(there.port) as connected:
                connected.stop()
                assert connected.run("print(1)") == "1\n"


def test_a_file_is_replaced_whole(tmp_path):
    data = bytes(range(256)) * 20
    with PtyBoard(tmp_path / "fs") as there, board.Board(there.port) as connected:
        connected.stop()
        (there.directory / "a.bin").write_bytes(b"old")
        steps = []
        connected.put("a.bin", data, steps.append)
        assert sum(steps) == len(data)
        assert files_of(there.directory) == {"a.bin": data}


def test_ports_that_cannot_be_used_say_what_to_do(tmp_path, monkeypatch):
    assert "is not there" in str(raises(board.NoBoard, board.Board, str(tmp_path / "none")))
    (tmp_path / "file").write_text("")
    assert "cannot be opened" in str(raises(board.NoBoard, board.Board, str(tmp_path / "file")))
    monkeypatch.setattr(board, "ports", lambda: [])
    assert "plug the board in" in str(raises(board.NoBoard, board.find_port, "auto"))
    monkeypatch.setattr(board, "ports", lambda: [("/dev/a", "one")])
    assert board.find_port("auto") == "/dev/a" and board.find_port("/dev/b") == "/dev/b"
    monkeypatch.setattr(board, "ports", lambda: [("/dev/a", "one"), ("/dev/b", "two")])
    assert "PORT=/dev/a (one), PORT=/dev/b (two)" in str(raises(board.NoBoard, board.find_port, ""))


# -- watching, pulling


def lines_of(process):
    """A queue of the lines that a process prints."""
    lines = queue.Queue()

    def read():
        for line in process.stdout:
            lines.put(line.rstrip("\n"))
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    return lines


def until(lines, text):
    seen = []
    for _ in range(100):
        line = lines.get(timeout=WAIT_S)
        assert line is not None, seen
        seen.append(line)
        if text in line:
            return line
    raise AssertionError(seen)


def test_watching_shows_console_and_statistics_across_a_reset_and_ends_with_ctrl_c(tmp_path):
    with Mosquitto() as broker, PtyBoard(tmp_path / "fs") as there:
        deploy.deploy(there.port, tree(tmp_path / "root", config_for(broker.port)), wait_s=WAIT_S)
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "tools" / "watch.py"), "--port", there.port, "--every", "1"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            # A shell's background job, as this suite may be, has Ctrl-C ignored for good.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        try:
            lines = lines_of(process)
            assert "acknowledged 1" in until(lines, "[connected | waiting 0")
            there.cut()
            until(lines, "is gone; waiting for it")
            there.plug()
            until(lines, "is back")
            until(lines, "[connected")
            process.send_signal(signal.SIGINT)
            assert process.wait(WAIT_S) == 0
        finally:
            process.kill()
            process.wait()


def test_statistics_in_words():
    stats = {"connected": False, "waiting": 3, "sent": 4, "lost": 1, "dropped": 0, "journal_years_left": 31.5}
    line = watch.STATS + json.dumps(stats)
    assert watch.words(watch.stats_of(line)) == "not connected | waiting 3 | sent 4 | 31.5 years left | LOST 1"
    for other in ("", "main.py: stats", watch.STATS + "{", watch.STATS + "[]", "x" + line):
        assert watch.stats_of(other) is None


def test_a_journal_is_pulled_from_a_running_board_which_goes_on_and_can_be_dumped_and_plotted(tmp_path):
    out = tmp_path / "j.bin"
    with Mosquitto() as broker, PtyBoard(tmp_path / "fs") as there:
        deploy.deploy(there.port, tree(tmp_path / "root", config_for(broker.port)), wait_s=WAIT_S)
        assert journal.main(["pull", str(out), "--port", there.port]) == 0
        there.wait_said(b"main.py: client mast7", 2)
    assert out.stat().st_size == 65536
    assert journal.main(["check", str(out)]) == 0
    assert journal.main(["dump", str(out)]) == 0
    assert journal.main(["plot", str(out), "-o", str(tmp_path / "j.svg")]) == 0


def test_pulling_from_a_board_without_the_library_says_what_is_missing(tmp_path):
    with PtyBoard(tmp_path / "fs") as there:
        error = raises(journal.NoJournal, journal.from_board, there.port)
        assert "ImportError" in str(error) and "make deploy" in str(error)


def test_make_hands_its_variables_on(tmp_path):
    """As somebody types it; every mistake is one line."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    for command, why in (
        (("deploy", "PORT=/dev/none-such"), "deploy: /dev/none-such is not there"),
        (("watch", "PORT=/dev/none-such"), "watch: /dev/none-such is not there"),
        (("pull-journal", "PORT=/dev/none-such", "FILE=%s/x" % tmp_path), "/dev/none-such is not there"),
        (("flash", "PORT=/dev/none-such"), "flash: say which board it is"),
        (("flash", "BOARD=pico_w", "FIRMWARE=/none/such file"), "flash: /none/such file: No such file"),
        (("image", "BOARD=esp32", "CONFIG=/none/such file"), "image: /none/such file: not found"),
        (("picow", "FIRMWARE=/none/such file"), "picow: /none/such file: No such file"),
        (("check-config", "FILE=/none/such file"), "/none/such file: not found"),
    ):
        done = subprocess.run(
            ["make", "-s", *command],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert done.returncode == 2 and why in done.stdout, done.stdout
