"""A board on a pseudo-terminal: the MicroPython unix port with its own REPL, its files in a directory.

What a board's firmware does and the unix port does not is done here: after Ctrl-D at a prompt boot.py runs and, unless
that was the raw REPL's, main.py, in a fresh interpreter; then there is a REPL of the same kind as before.
"""

import contextlib
import fcntl
import os
import pty
import re
import select
import subprocess
import sys
import termios
import threading
import tty
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MICROPYTHON = os.environ.get("MICROPYTHON") or str(Path(sys.executable).parent / "micropython")
BANNER = b"MicroPython "
RAW = b"raw REPL; CTRL-B to exit\r\n>"
PROMPT = b">>> "
PATIENCE_S = 60
_MOST = 1 << 20

START = """\
import os, sys
print("\\x06", end="")
os.chdir(%(directory)r)
sys.path[:] = ["", ".frozen", "lib", %(shim)r, %(tools)r]
import host
host.install()
host.use_board(%(kind)r)
def _run(name):
    try:
        with open(name) as f:
            source = f.read()
    except OSError:
        return
    try:
        exec(compile(source, name, "exec"), globals())
    except Exception as e:
        sys.print_exception(e)
%(more)s
for _name in %(names)r:
    _run(_name)
"""


class PtyBoard:
    """A context manager.  directory: the board's file system.  port: what a tool is given.

    kind: of the shim.  more: code that runs before boot.py.  cut(): the power fails, and the port is gone as a board's
    own USB is; plug(): it is there again.  lives: how often the board has started; said: all that it has printed;
    typed: all that was sent to it.
    """

    def __init__(self, directory, kind="rp2", more=""):
        self.directory = Path(directory)
        self.directory.mkdir(exist_ok=True)
        self.port = str(self.directory.parent / (self.directory.name + ".tty"))
        self.kind = kind
        self.more = more
        self.lives = 0
        self.said = b""
        self.typed = b""
        self._thread = None
        self._news = threading.Condition()

    def __enter__(self):
        self.plug()
        return self

    def __exit__(self, *_):
        self.cut()

    def plug(self):
        self._outer, slave = pty.openpty()
        tty.setraw(slave)
        os.set_blocking(self._outer, False)
        self._unsent = b""
        self._wait, self._wake = os.pipe()
        os.symlink(os.ttyname(slave), self.port)
        self._thread = threading.Thread(target=self._live, args=(slave,))
        self._thread.start()

    def cut(self):
        if self._thread:
            os.unlink(self.port)
            os.close(self._wake)
            self._thread.join()
            os.close(self._wait)
            os.close(self._outer)
            self._thread = None

    def wait_said(self, text, times=1):
        """Return when the board has printed text that often.  AssertionError if it never does."""
        with self._news:
            assert self._news.wait_for(lambda: self.said.count(text) >= times, PATIENCE_S), self.said[-2000:]

    # -- what runs in the thread

    def _live(self, slave):
        raw = False
        try:
            while self._life(raw) != "cut":
                raw = self._raw
                self._say(b"MPY: soft reboot\r\n")
        finally:
            os.close(slave)

    def _life(self, raw):
        """One interpreter; return "cut" or "reset"."""
        inner, tail = pty.openpty()
        mode = termios.tcgetattr(tail)
        mode[0] &= ~termios.ICRNL
        mode[1] &= ~termios.ONLCR  # the REPL sends both itself
        mode[3] &= ~(termios.ICANON | termios.ECHO)  # Ctrl-C interrupts, all else comes as it is
        termios.tcsetattr(tail, termios.TCSANOW, mode)
        script = self.directory.parent / (self.directory.name + ".start.py")
        names = ["boot.py"] if raw else ["boot.py", "main.py"]
        places = {"directory": str(self.directory), "kind": self.kind, "names": names, "more": self.more}
        for name in ("shim", "tools"):
            places[name] = str(ROOT / "tools" / ("shim" if name == "shim" else ""))
        script.write_text(START % places)
        process = subprocess.Popen(
            [MICROPYTHON, "-X", "heapsize=4M", "-i", str(script)],
            stdin=tail,
            stdout=tail,
            stderr=tail,
            preexec_fn=lambda: (os.setsid(), fcntl.ioctl(0, termios.TIOCSCTTY, 0)),
        )
        os.close(tail)
        self.lives += 1
        try:
            return self._forward(inner, raw)
        finally:
            process.kill()
            process.wait()
            os.close(inner)

    def _forward(self, inner, raw):
        self._raw = raw
        up = False  # before, a Ctrl-C would kill the interpreter
        seen = b""  # until the first prompt
        held = b""  # typed while there is none
        busy = True
        while True:
            writers = [self._outer] if self._unsent else []
            ready, writable, _ = select.select([inner, self._outer, self._wait], writers, [])
            if writable:
                with contextlib.suppress(BlockingIOError):
                    self._unsent = self._unsent[os.write(self._outer, self._unsent) :]
            if self._wait in ready:
                return "cut"
            if inner in ready:
                try:
                    data = os.read(inner, 4096)
                except OSError:  # the interpreter has ended
                    return "reset"
                if not busy:
                    self._say(data)
                    continue
                if not up:
                    if b"\x06" not in data:
                        continue
                    data = data.partition(b"\x06")[2]
                    up = True
                    os.write(inner, bytes(byte for byte in held if byte in b"\x03"))
                    held = held.replace(b"\x03", b"")
                seen += data
                if raw:
                    # A board goes on in the kind of REPL in which it was: no banner, no friendly prompt.
                    if seen.endswith(PROMPT) and BANNER in seen:
                        os.write(inner, b"\x01")
                    if seen.endswith(RAW):
                        self._say(seen[: seen.index(BANNER)] + RAW)
                        busy = False
                else:
                    self._say(data)
                    busy = not seen.endswith(PROMPT)
                if not busy:
                    os.write(inner, held)
            if self._outer in ready:
                data = os.read(self._outer, 4096)
                self.typed += data
                # A program of the unix port would lose what comes for the REPL behind it.
                now = bytes(byte for byte in data if not busy or (up and byte in b"\x03\x14"))
                if busy:
                    held += bytes(byte for byte in data if not (up and byte in b"\x03\x14"))
                for byte in data:
                    if byte in b"\x01\x02":
                        self._raw = byte == 1
                os.write(inner, now)

    def _say(self, data):
        data = re.sub(rb"(?<!\r)\n", b"\r\n", data)
        with self._news:
            self.said += data
            self._news.notify_all()
        self._unsent = (self._unsent + data)[-_MOST:]  # nobody may be reading: a board drops it, too
