"""A board on a serial port: its console, its REPL, its program stopped and started.

The one place that talks to MicroPython on a board, through mpremote's SerialTransport.  All its failures are NoBoard,
whose argument is one line that says what to do.

Stopping: Ctrl-C, upon which main.py closes its client in order, then a soft reset that runs boot.py and not main.py.
So the heap is free, and boot.py's timer feeds the watchdog, however long the work at the REPL takes.
"""

import contextlib
import errno
import hashlib
import io
import os
import sys
import time
from pathlib import Path

import serial
from mpremote.transport import TransportError, TransportExecError
from mpremote.transport_serial import SerialTransport
from serial.tools import list_ports

CLOSING_S = 25  # main.py's orderly end takes up to 4 s, 14 s more with a name look-up in the way
SILENCE_S = 30  # of a board that works on something
PROMPT = b">>> "
GONE = errno.EIO, errno.ENXIO, errno.ENODEV, errno.EBADF


class NoBoard(Exception):
    """The argument is one line: what is wrong, what to do about it."""


def ports():
    """Return the USB serial ports that are there, [(device, words)]."""
    return sorted((p.device, p.description or p.device) for p in list_ports.comports() if p.vid is not None)


def find_port(port):
    """Return the port to use: port itself, or for "" and "auto" the only one there is.  Raises NoBoard."""
    if port not in ("", "auto", None):
        return port
    found = ports()
    if len(found) == 1:
        return found[0][0]
    if not found:
        raise NoBoard("no USB serial port found: plug the board in, with a cable that carries data; or name PORT=...")
    raise NoBoard("several ports found, name one: " + ", ".join("PORT=%s (%s)" % row for row in found))


def _open(port):
    """Return an open SerialTransport.  Raises NoBoard."""
    device = Path(port)
    if device.is_absolute() and os.name == "posix":
        if not device.exists():
            there = ", ".join(name for name, _ in ports())
            raise NoBoard("%s is not there: %s" % (port, "found " + there if there else "is the board plugged in?"))
        if not os.access(device, os.R_OK | os.W_OK):
            raise NoBoard("%s: no permission: sudo usermod -aG dialout $USER, log out and in again" % port)
    try:
        return SerialTransport(port, timeout=10)
    except (TransportError, OSError, ValueError):
        raise NoBoard("%s cannot be opened: does another program use it (mpremote, an IDE, a serial monitor)?" % port)


def wait_for_port(port, timeout_s):
    """Return when port can be opened.  Raises NoBoard after timeout_s."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            _open(port).close()
            return
        except NoBoard:
            if time.monotonic() >= deadline:
                raise
            time.sleep(0.25)


class Board:
    """A board at a port ("auto": the only one there is), open until close(); a context manager."""

    def __init__(self, port):
        self.port = find_port(port)
        self._transport = _open(self.port)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        with contextlib.suppress(OSError):  # mpremote's close() stumbles over a port that is gone
            self._transport.close()
        self._transport.serial.close()

    # -- the console

    def read(self, timeout_s):
        """Return the bytes that have come, b"" after timeout_s without any.  Raises NoBoard when the port is gone."""
        port = self._transport.serial
        with self._talking():
            port.timeout = timeout_s
            try:
                data = port.read(1)
                return data + port.read(port.in_waiting) if data else b""
            finally:
                port.timeout = 10

    def write(self, data):
        """Send bytes as if they were typed.  Raises NoBoard when the port is gone."""
        with self._talking():
            self._transport.serial.write(data)

    # -- the REPL

    def stop(self):
        """End the program in order and wait at the raw REPL after a soft reset.  Raises NoBoard."""
        for seconds in (CLOSING_S, 5):  # a second time, because a board that is just starting loses the first
            # Ctrl-B: whatever REPL there is, a friendly one answers with its prompt.
            self.write(b"\r\x03\x02")
            said = b""
            deadline = time.monotonic() + seconds
            while not said.endswith(PROMPT) and time.monotonic() < deadline:
                said = (said + self.read(0.2))[-4096:]
            if said.endswith(PROMPT):
                break
        else:
            raise NoBoard(
                "%s does not answer to Ctrl-C: press its reset button and try again at once (a board that sleeps: "
                "within sleep.reach_s); is there MicroPython on it (make flash)?" % self.port
            )
        with self._talking("entering the raw REPL"):
            self._transport.enter_raw_repl(soft_reset=True, timeout_overall=SILENCE_S)

    def run(self, code, consumer=None):
        """Run code on the stopped board; return what it printed.  Raises NoBoard, with the last line of a traceback.

        consumer: called with the bytes as they come, and nothing is returned.
        """
        with self._talking("running a program on the board"):
            out, error = self._transport.exec_raw(code, timeout=SILENCE_S, data_consumer=consumer)
        if error:
            last = error.decode(errors="replace").strip().splitlines()[-1]
            raise NoBoard("the board says: " + last)
        return out.decode(errors="replace").replace("\r\n", "\n")

    def run_last(self, code):
        """Run code on the stopped board, of which no answer will come."""
        with self._talking():
            self._transport.exec_raw_no_follow(code)

    def put(self, path, data, progress=None):
        """Write a file such that after a power cut it has its old content or data.  Raises NoBoard.

        progress: called with the number of bytes written since the last call.
        """
        new = path + ".new"
        done = 0

        def step(written, _):
            nonlocal done
            progress(written - done)
            done = written

        with self._talking("writing " + path):
            self._transport.fs_writefile(new, data, 1024, progress and step)
            digest = self._transport.fs_hashfile(new, "sha256")
        if digest != hashlib.sha256(data).digest():
            raise NoBoard("%s did not arrive as it was sent: run it again" % path)
        self.run("import os; os.rename(%r, %r)" % (new, path))

    def start(self):
        """Soft reset into boot.py and main.py; read() then has what they print.  Raises NoBoard."""
        with self._talking():
            self._transport.exit_raw_repl()
            self._transport.read_until(1, PROMPT, timeout=10)
            self._transport.serial.write(b"\x04")

    @contextlib.contextmanager
    def _talking(self, what="talking to it"):
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # mpremote prints what it did not understand
                yield
        except TransportExecError as e:
            last = (e.error_output.strip().splitlines() or ["?"])[-1]
            raise NoBoard("%s: the board says: %s" % (what, last))
        except TransportError as e:
            raise NoBoard("%s: %s: %s: run it again; if that does not help, reset the board" % (self.port, what, e))
        except (OSError, TypeError) as e:  # TypeError: pyserial, when the port is closed under it
            if isinstance(e, OSError) and not isinstance(e, serial.SerialException) and e.errno not in GONE:
                raise NoBoard("%s: %s" % (what, os.strerror(e.errno)))  # of the board's file system
            raise NoBoard("%s is gone while %s: was it unplugged, or did the board reset?" % (self.port, what))


def fail(tool, error):
    """End the program with one line."""
    sys.exit("%s: %s" % (tool, error))
