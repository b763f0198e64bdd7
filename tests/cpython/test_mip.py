"""mip installs the library from the list at the top of the repository, and what it has installed runs."""

import contextlib
import http.server
import io
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from mpremote import mip
from ptyboard import MICROPYTHON, PtyBoard

ROOT = Path(__file__).resolve().parents[2]
LIB = ROOT / "lib"
PATIENCE_S = 120

# mip as on a board, but that what it asks of GitHub goes to the server here.
INSTALL = """
import mip
asked = []
get = mip.requests.get
def there(url, *more, **named):
    asked.append(url)
    return get(url.replace(%(github)r, %(server)r), *more, **named)
mip.requests.get = there
mip.install(%(package)r, target=%(target)r, version=%(version)r)
print("asked:", len(asked), all([url.startswith(%(prefix)r) for url in asked]))
"""

# Every module, then a message through the journal.
RUN = """
import sys
sys.path[:] = [".frozen", %(target)r]
from mqtt_durable import Client, load_config
from mqtt_durable.simple import MQTTClient
for name in %(modules)r:
    __import__(name)
    assert sys.modules[name].__file__.startswith(%(target)r + "/mqtt_durable/"), name
c = MQTTClient("plant7", "127.0.0.1", home="ram")
c.publish(b"plant/7/temp", b"21.5", qos=1)
print("stored")
"""


@contextlib.contextmanager
def served(directory):
    """Serve a directory on loopback; yield its URL and the list of paths that were asked for."""
    paths = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *more):
            super().__init__(*more, directory=str(directory))

        def log_message(self, *_):
            paths.append(self.path)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield "http://127.0.0.1:%d" % server.server_port, paths
        finally:
            server.shutdown()
            thread.join()


def library(directory):
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def sources():
    return {p.relative_to(LIB).as_posix(): p.read_bytes() for p in (LIB / "mqtt_durable").rglob("*.py")}


def micropython(code, directory):
    return subprocess.run(
        [MICROPYTHON, "-c", code],
        cwd=directory,
        env=dict(os.environ, MICROPYPATH=".frozen"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=PATIENCE_S,
    )


@pytest.mark.parametrize(
    "package, version, prefix",
    [
        ("SERVER", None, "SERVER/"),
        ("SERVER/package.json", None, "SERVER/"),
        ("github:org/repo", None, "https://raw.githubusercontent.com/org/repo/HEAD/"),
        ("github:org/repo/", "v0.1.0", "https://raw.githubusercontent.com/org/repo/v0.1.0/"),
    ],
)
def test_a_board_installs_it_and_runs_it_from_there(tmp_path, package, version, prefix):
    target = str(tmp_path / "lib")
    with served(ROOT) as (server, _):
        package, prefix = package.replace("SERVER", server), prefix.replace("SERVER", server)
        github = prefix.rstrip("/") if version or "github" in package else "no such place"
        code = INSTALL % dict(locals())
        done = micropython(code, tmp_path)
    assert done.returncode == 0 and "Done" in done.stdout, done.stdout
    assert library(tmp_path / "lib") == sources()
    assert "asked: %d True" % (1 + len(sources())) in done.stdout, done.stdout
    modules = [name[:-3].replace("/__init__", "").replace("/", ".") for name in sources()]
    modules.remove("mqtt_durable.wifi")  # imports network, which the firmware of a board has
    done = micropython(RUN % {"target": target, "modules": modules}, tmp_path)
    assert done.returncode == 0 and done.stdout.endswith("stored\n"), done.stdout


def test_mpremote_installs_it_on_a_board(tmp_path):
    with served(ROOT) as (server, _), PtyBoard(tmp_path / "board") as board:
        command = [sys.executable, "-m", "mpremote", "connect", board.port, "mip", "install", "--target", "lib", server]
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=PATIENCE_S
        )
        assert done.returncode == 0 and "Done" in done.stdout, done.stdout
        assert library(tmp_path / "board" / "lib") == sources()


def test_mpremote_finds_all_of_it_on_github(monkeypatch):
    class Transport:
        files = {}

        def fs_exists(self, path):
            return True

        def fs_writefile(self, path, data, progress_callback=None):
            self.files[path] = data

    def urlopen(url):
        assert url.startswith("https://raw.githubusercontent.com/org/repo/v0.1.0/"), url
        return io.BytesIO((ROOT / url.removeprefix("https://raw.githubusercontent.com/org/repo/v0.1.0/")).read_bytes())

    monkeypatch.setattr(mip.urllib.request, "urlopen", urlopen)
    mip._install_package(Transport(), "github:org/repo", "no index", "/lib", "v0.1.0", True)
    assert Transport.files == {"/lib/" + path: data for path, data in sources().items()}
