"""A real mosquitto under control: started on a free loopback port, stopped, killed, restarted with its state.

    with Mosquitto(max_inflight_messages=5) as broker:
        client.connect("127.0.0.1", broker.port)
        broker.restart()

Needs the mosquitto program and nothing but the standard library.  Everything it writes lies in a directory of its own,
removed at the end.
"""

import base64
import collections
import contextlib
import hashlib
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time

# Longer than any start or stop takes on a busy machine; reached only when something is broken.
_PATIENCE_S = 30

# Debian keeps it out of an ordinary user's PATH.
_SBIN = ":/usr/sbin:/usr/local/sbin"

_PORTS = random.Random()


class BrokerError(RuntimeError):
    """The broker is missing, did not start, or ended by itself.  The argument is one line."""


def find_mosquitto():
    """The path of the mosquitto program.  Raises BrokerError if there is none."""
    program = shutil.which("mosquitto", path=os.environ.get("PATH", os.defpath) + _SBIN)
    if not program:
        raise BrokerError("mosquitto is missing: install it (apt-get install mosquitto)")
    return program


def free_port():
    """A loopback port nobody uses now.

    From below the range that Linux takes for outgoing connections, so that none of those takes it while a broker is
    between stop and start.  Another process may still be quicker: Mosquitto.start() tries again.
    """
    for _ in range(100):
        port = _PORTS.randrange(15000, 32000)
        with socket.socket() as s:
            try:
                s.bind(("127.0.0.1", port))
                return port
            except OSError:
                continue
    raise BrokerError("no free loopback port found in 100 tries")


def password_line(user, password):
    """A line of mosquitto's password file: PBKDF2-HMAC-SHA512, 101 rounds, 12 bytes of salt, as mosquitto_passwd."""
    salt = os.urandom(12)
    key = hashlib.pbkdf2_hmac("sha512", password.encode(), salt, 101, 64)
    return "%s:$7$101$%s$%s\n" % (user, base64.b64encode(salt).decode(), base64.b64encode(key).decode())


def _config_lines(options):
    for name, value in options.items():
        if value is not None:
            yield "%s %s\n" % (name, str(value).lower() if isinstance(value, bool) else value)


class Mosquitto:
    """A mosquitto broker on 127.0.0.1.

    port: fixed, or 0 to choose a free one at the first start; it stays the same from then on.
    users: {name: password}; anonymous clients are then refused.
    lines: more lines for the configuration file.
    tls: options of a second listener, on .tls_port: certfile, keyfile, cafile, require_certificate.
    options: any of mosquitto.conf's, by name; True and False are written true and false, None leaves a default out.

    .port, .tls_port, .directory, .log (the newest 20000 lines, oldest first), .starts (how often it came up).
    """

    def __init__(self, port=0, *, users=None, lines=(), tls=None, program=None, **options):
        self.port = port
        self.tls_port = 0
        self.directory = None
        self.starts = 0
        self.log = collections.deque(maxlen=20000)
        self._program = program
        self._users = users
        self._lines = list(lines)
        self._tls = tls
        self._options = {
            "allow_anonymous": users is None,
            "persistence": True,
            # mosquitto's own limits drop messages silently; a count of lost ones must not count those.
            "max_queued_messages": 0,
            "set_tcp_nodelay": True,
            "sys_interval": 0,
            "log_type": "all",
        }
        self._options.update(options)
        self._process = None
        self._reader = None
        self._news = threading.Condition()
        self._running = False

    def __enter__(self):
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_):
        self.close()

    @property
    def alive(self):
        """Whether the process is there."""
        return self._process is not None and self._process.poll() is None

    def start(self):
        """Start it and return when it accepts connections.  Raises BrokerError with the reason and its last words."""
        if self.alive:
            return
        program = self._program or find_mosquitto()
        if self.directory is None:
            self.directory = tempfile.mkdtemp(prefix="mosquitto-")
        chosen = self.port == 0
        for _ in range(20):
            if chosen:
                self.port = free_port()
            if self._tls and (chosen or not self.tls_port):
                self.tls_port = free_port()
            if self._try_start(program):
                self.starts += 1
                return
            if not chosen:
                break
        port, self.port = self.port, 0 if chosen else self.port
        raise BrokerError("mosquitto: port %d of 127.0.0.1 is in use" % port)

    def stop(self):
        """SIGTERM: it saves its state and ends.  Returns when it has ended."""
        self._end(signal.SIGTERM)

    def kill(self):
        """SIGKILL: what mosquitto has not saved is lost, acknowledged messages too.  See save()."""
        self._end(signal.SIGKILL)

    def save(self):
        """Make it save its state now (SIGUSR1); return when that is on disk.  Raises BrokerError if it does not."""
        path = os.path.join(self.directory, "mosquitto.db")

        def version():
            # It writes a new file and renames it.
            with contextlib.suppress(FileNotFoundError):
                found = os.stat(path)
                return found.st_ino, found.st_mtime_ns

        before = version()
        self._process.send_signal(signal.SIGUSR1)
        deadline = time.monotonic() + _PATIENCE_S
        while version() == before:
            if time.monotonic() > deadline or not self.alive:
                raise BrokerError("mosquitto did not save within %d s of SIGUSR1" % _PATIENCE_S)
            time.sleep(0.005)

    def restart(self):
        """Stop and start again: same port, same state."""
        self.stop()
        self.start()

    def close(self):
        """Stop it and remove its directory."""
        try:
            self.stop()
        finally:
            if self.directory is not None:
                shutil.rmtree(self.directory, ignore_errors=True)
                self.directory = None

    def wait_log(self, text, timeout_s=_PATIENCE_S):
        """Wait for a log line that holds text and return the newest such.  Raises BrokerError if none comes."""
        deadline = time.monotonic() + timeout_s
        with self._news:
            while True:
                for line in reversed(self.log):
                    if text in line:
                        return line
                left = deadline - time.monotonic()
                if left <= 0:
                    raise BrokerError("mosquitto logged no %r within %d s" % (text, timeout_s))
                self._news.wait(left)

    def _write_config(self):
        options = dict(self._options)
        if os.geteuid() == 0:
            # Else it changes to user mosquitto, who cannot write here.
            options.setdefault("user", "root")
        if options.get("persistence"):
            options.setdefault("persistence_location", self.directory + "/")
        if self._users is not None:
            options["password_file"] = os.path.join(self.directory, "passwords")
            with open(options["password_file"], "w") as f:
                f.writelines(password_line(*user) for user in self._users.items())
        path = os.path.join(self.directory, "mosquitto.conf")
        with open(path, "w") as f:
            f.write("log_dest stderr\n")
            f.writelines(_config_lines(options))
            f.write("listener %d 127.0.0.1\n" % self.port)
            f.writelines(line + "\n" for line in self._lines)
            if self._tls:
                f.write("listener %d 127.0.0.1\n" % self.tls_port)
                f.writelines(_config_lines(self._tls))
        return path

    def _try_start(self, program):
        """Start it on self.port; False if the port is taken."""
        self._running = False
        said = []
        try:
            process = subprocess.Popen(
                [program, "-c", self._write_config()],
                cwd=self.directory,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                start_new_session=True,  # a Ctrl-C is for the program that controls it
            )
        except OSError as e:
            raise BrokerError("cannot run %s: %s" % (program, e.strerror)) from e
        self._process = process
        self._reader = threading.Thread(target=self._read_log, args=(process, said), daemon=True)
        self._reader.start()
        with self._news:
            self._news.wait_for(lambda: self._running or process.stderr.closed, _PATIENCE_S)
            running = self._running
        if running:
            # "running" is logged, and the system accepts connections, before its loop runs; a SIGTERM until then is
            # forgotten (2.0.11).  Only the loop answers: a PINGREQ without CONNECT by closing the connection.
            with socket.create_connection(("127.0.0.1", self.port), _PATIENCE_S) as s:
                s.sendall(b"\xc0\x00")
                with contextlib.suppress(ConnectionResetError):
                    s.recv(1)
            return True
        self._end(signal.SIGKILL)
        if any("Address already in use" in line for line in said):
            return False
        raise BrokerError("mosquitto did not start: " + ("; ".join(said[-5:]) or "it said nothing"))

    def _read_log(self, process, said):
        with process.stderr:
            for raw in process.stderr:
                line = raw.decode(errors="replace").rstrip()
                with self._news:
                    self.log.append(line)
                    if not self._running:
                        said.append(line)
                        # Written when every listener is open.
                        if line.endswith(" running"):
                            self._running = True
                    self._news.notify_all()
        with self._news:
            self._news.notify_all()

    def _end(self, number):
        process, self._process = self._process, None
        if process is None:
            return
        try:
            process.send_signal(number)
            process.wait(_PATIENCE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise BrokerError("mosquitto did not end within %d s of SIGTERM" % _PATIENCE_S) from None
        finally:
            self._reader.join(_PATIENCE_S)
