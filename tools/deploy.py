"""Bring this tree to a board and start it: deploy.py [--port PORT] [--config]

The library goes as .mpy, boot.py, main.py and (if there is one) app.py as they are, config.json if the board has none
or --config says so, and the certificates that it names, if they are here.  Only what differs is copied.  Each file is
replaced whole: a power cut leaves the old or the new one.  In lib/mqtt_durable what the library no longer has is
deleted, also a .py beside its .mpy, because MicroPython would import that one.  The journal is not touched, nor is
anything else on the board.

The program is stopped by Ctrl-C, so its client ends in order.  At the end the board is soft reset, and its first lines
are shown until a message has been acknowledged.
"""

import argparse
import ast
import hashlib
import json
import sys
import time
from pathlib import Path

from board import Board, NoBoard, fail
from configure import problems_of
from mpy import ABI, PACKAGE, ROOT, CannotCompile, compile_tree
from rich.console import Console as Terminal
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn
from watch import Console, show, stats_of

SLACK = 16384  # free bytes the file system is to keep: littlefs writes anew before it frees

# Each prints one literal.
WHO = """\
import sys
try:
    import network
    wifi = hasattr(network, "WLAN")
except ImportError:
    wifi = False
try:
    import mqtt_durable
    where = mqtt_durable.__file__
except Exception:
    where = None
print((sys.implementation.name, sys.version, getattr(sys.implementation, "_machine", "?"),
    getattr(sys.implementation, "_mpy", 0) & 255, wifi, where))
"""
LOOK = """\
import os, hashlib
def look(path, found):
    try:
        kind = os.stat(path)[0]
    except OSError:
        return
    if kind & 0x4000:
        found[path] = None
        for name in os.listdir(path):
            look(path + "/" + name, found)
        return
    h = hashlib.sha256()
    buf = bytearray(512)
    with open(path, "rb") as f:
        while True:
            n = f.readinto(buf)
            if not n:
                break
            h.update(memoryview(buf)[:n])
    found[path] = h.digest()
found = {}
for path in %r:
    look(path, found)
print(found)
"""
SPACE = """\
import os
s = os.statvfs(os.getcwd())
print(s[0] * s[3])
"""
MAKE = """\
import os
for path in %r:
    try:
        os.mkdir(path)
    except OSError:
        os.stat(path)
"""
REMOVE = """\
import os
for path in %r:
    (os.rmdir if os.stat(path)[0] & 0x4000 else os.remove)(path)
"""


def ask(board, code):
    """Return the literal that code prints on the board."""
    said = board.run(code)
    try:
        return ast.literal_eval(said.strip())
    except (ValueError, SyntaxError):
        raise NoBoard("the board gives no answer that makes sense: %.60r" % said)


def local_config(root):
    """Return (bytes of config.json, {path on the board: bytes} of the files it names); None, {} if there is none.

    Raises NoBoard with every mistake in it: a bad configuration would only end at the REPL.
    """
    path = root / "config.json"
    if not path.exists():
        return None, {}
    problems = problems_of(path)
    if problems:
        raise NoBoard("config.json is not right; make config, or edit it:\n  " + "\n  ".join(problems))
    data = path.read_bytes()
    tls = (json.loads(data.decode("utf-8-sig"))["broker"].get("tls")) or {}
    named = {}
    for key in ("ca", "cert", "key"):
        name = (tls.get(key) or "").lstrip("/")
        if name and (root / name).is_file():
            named[name] = (root / name).read_bytes()
    return data, named


def plan(files, found):
    """Return (paths to copy, paths to delete, in the order in which they can be).

    files: path -> bytes, what the board is to have.  found: path -> sha256, None for a directory.
    """
    copied = [path for path, data in files.items() if found.get(path) != hashlib.sha256(data).digest()]
    wanted = set(files)
    for path in files:
        while "/" in path:
            path = path.rpartition("/")[0]
            wanted.add(path)
    dead = [path for path in found if path.startswith(PACKAGE + "/") and path not in wanted]
    return copied, sorted(dead, reverse=True)


def copy(board, files, terminal):
    """Write files to the board, with a bar."""
    directories = set()
    for path in files:
        parts = path.split("/")[:-1]
        directories |= {"/".join(parts[: n + 1]) for n in range(len(parts))}
    board.run(MAKE % sorted(directories))
    columns = TextColumn("{task.description:<36}"), BarColumn(), DownloadColumn()
    with Progress(*columns, console=terminal, transient=True, disable=not terminal.is_terminal) as progress:
        task = progress.add_task("", total=sum(len(data) for data in files.values()))
        for path, data in files.items():
            progress.update(task, description=path)
            board.put(path, data, lambda n: progress.advance(task, n))


def first_messages(board, wait_s):
    """Show what the board prints after its start; return why that ended and the exit code."""
    console = Console(board)
    begun = time.monotonic()
    asked = 0.0
    stopped = None
    shown = None
    why = "the board has not answered within %d s: make watch shows whether it does later" % wait_s
    while time.monotonic() - begun < wait_s:
        for line in console.lines(0.5):
            if not line.strip() or line.startswith("MPY: soft reboot"):
                continue
            stats = stats_of(line)
            news = stats and [stats.get(key) for key in ("connected", "waiting", "acknowledged")]
            if not stats or news != shown:
                shown = news
                show(line)
            if stats:
                if stats.get("connected") and stats.get("acknowledged"):
                    return "the broker has acknowledged the first message; make watch shows more", 0
                state = "connected, but no message was acknowledged" if stats.get("connected") else "no connection"
                why = "%s within %d s; the board goes on: make watch shows it" % (state, wait_s)
            if line.startswith("main.py: asleep"):
                return "the board sleeps until its next waking", 0
            if line.startswith("main.py: the board is at the REPL"):
                stopped = "the program has ended, see above; the board is at its REPL"
        if console.rest.endswith(">>> "):
            return stopped or "the program has ended: the board is at its REPL", 1
        if time.monotonic() - asked >= 2:
            asked = time.monotonic()
            console.ask()
    return why, 1


def deploy(port, root=ROOT, with_config=False, wait_s=60):
    """Bring the tree at root to the board; return the exit code.  Raises NoBoard, CannotCompile, OSError."""
    terminal = Terminal()
    config, named = local_config(root)
    with Board(port) as board:
        print("deploy: %s: stopping the program" % board.port, flush=True)
        board.stop()
        name, version, machine, abi, wifi, where = ask(board, WHO)
        if name != "micropython":
            raise NoBoard("the board runs %s, not MicroPython: make flash" % name)
        print("deploy: %s, MicroPython %s" % (machine, version.split("MicroPython ")[-1].split(" ")[0]), flush=True)
        if abi != ABI:
            raise NoBoard("its MicroPython wants .mpy version %s, mpy-cross makes %s: make flash" % (abi, ABI))
        files = compile_tree(root)
        if where and not where.lstrip("/").startswith("lib/"):
            print("deploy: the firmware has mqtt_durable frozen in, which wins: lib/ is not copied")
            files = {path: data for path, data in files.items() if not path.startswith(PACKAGE)}
        files.update(named)
        paths = [PACKAGE] + [path for path in files if not path.startswith(PACKAGE)] + ["config.json"]
        found = ask(board, LOOK % (paths,))
        notes = []
        if config is None and "config.json" not in found:
            notes.append("the board has no config.json, and there is none here: make config, then deploy again")
        elif config is not None and found.get("config.json") != hashlib.sha256(config).digest():
            if with_config or "config.json" not in found:
                files["config.json"] = config
            else:
                notes.append("the board keeps its config.json, which differs from the one here: CONFIG=1 replaces it")
        if config and json.loads(config.decode("utf-8-sig")).get("wifi") and not wifi:
            notes.append("this board's firmware has no Wi-Fi: is it the right BOARD, or the firmware for another one?")
        copied, dead = plan(files, found)
        size = sum(len(files[path]) for path in copied)
        free = ask(board, SPACE)
        if size + SLACK > free:
            sizes = free >> 10, (size + SLACK) >> 10
            raise NoBoard("the board has %d KiB free, %d are needed: delete files there" % sizes)
        copy(board, {path: files[path] for path in copied}, terminal)
        if dead:
            board.run(REMOVE % (dead,))
        done = "all files are there already"
        if copied:
            done = "%d of %d files copied (%.1f KB)" % (len(copied), len(files), size / 1000)
        print("deploy: " + done + (", %d deleted: %s" % (len(dead), _few(dead)) if dead else ""))
        for note in notes:
            print("deploy: " + note)
        print("deploy: starting it", flush=True)
        board.start()
        try:
            why, code = first_messages(board, wait_s)
        except NoBoard:  # its own USB goes with a reset or sleep
            why, code = "the board has left the port: asleep, or reset; make watch waits for it", 0
    print("deploy: " + why)
    return code


def _few(paths):
    names = [path[len(PACKAGE) + 1 :] for path in paths]
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", default="auto", help="serial port of the board; auto: the only one there is")
    parser.add_argument("--config", action="store_true", help="replace the board's config.json by the one here")
    parser.add_argument("--root", type=Path, default=ROOT, help="the tree to deploy (this one)")
    parser.add_argument("--wait", type=float, default=60, metavar="S", help="how long to show what it prints (60)")
    args = parser.parse_args(argv)
    try:
        return deploy(args.port, args.root, args.config, args.wait)
    except (NoBoard, CannotCompile) as e:
        fail("deploy", e)
    except OSError as e:
        fail("deploy", "%s: %s" % (e.filename, e.strerror))
    except KeyboardInterrupt:
        fail("deploy", "stopped; the board may be at its REPL with some files old, some new: run it again")


if __name__ == "__main__":
    sys.exit(main())
