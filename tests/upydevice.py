"""A program on the MicroPython unix port, with the library from its source: what a test on CPython plays against."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PATIENCE_S = 60


class UpyDevice:
    """program on MicroPython with this heap, its files in directory; settings are what it finds in device.json."""

    def __init__(self, directory, program, settings, heap):
        self.lines = []
        (directory / "device.json").write_text(json.dumps(settings))
        (directory / "device.py").write_text(program)
        micropython = os.environ.get("MICROPYTHON") or str(Path(sys.executable).parent / "micropython")
        path = ":".join([".frozen", str(ROOT / "lib"), str(ROOT / "tools" / "shim"), str(ROOT / "tools")])
        self._process = subprocess.Popen(
            [micropython, "-X", "heapsize=" + heap, "device.py"],
            cwd=directory,
            env=dict(os.environ, MICROPYPATH=path),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._watch = threading.Timer(PATIENCE_S, self._process.kill)
        self._watch.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._watch.cancel()
        self._process.kill()
        self._process.communicate()

    def line(self, text):
        """Read on to a line that begins like this; return what follows."""
        for line in self._process.stdout:
            self.lines.append(line.rstrip())
            if line.startswith(text):
                return line.rstrip()[len(text) :].strip()
        raise AssertionError("never said %r: %r" % (text, self.lines))
