"""Print the bytes of .mpy per module of lib/mqtt_durable, as they go to a board, and the change since the last release.

The last release is the newest tag that the checked-out commit has among its ancestors.
"""

import io
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from mpy import PACKAGE, ROOT, CannotCompile, compile_library


def git(*arguments):
    """What git prints, None if it fails or is not there."""
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    except OSError:
        return None
    return done.stdout if done.returncode == 0 else None


def last_release():
    """Return its tag and its {path: bytes of .mpy}; (None, {}) before the first.  Raises CannotCompile."""
    tag = git("describe", "--tags", "--abbrev=0")
    if not tag:
        return None, {}
    tag = tag.decode().strip()
    archive = git("archive", tag, PACKAGE)
    if archive is None:
        return None, {}
    with tempfile.TemporaryDirectory() as directory:
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            for member in filter(tarfile.TarInfo.isfile, tar):
                path = Path(directory) / member.name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(tar.extractfile(member).read())
        return tag, {path: len(code) for path, code in compile_library(directory).items()}


def table(now, before, lines):
    """Return rows (name, lines, bytes, change) and their sum.  now, before: {path: bytes}.  lines: {path: lines}."""
    rows = []
    for path in sorted({*now, *before}):
        name = path[len("lib/") : -len("mpy")] + "py"
        rows.append((name, lines.get(path, 0), now.get(path, 0), now.get(path, 0) - before.get(path, 0)))
    return rows + [("all",) + tuple(sum(row[i] for row in rows) for i in (1, 2, 3))]


def main():
    try:
        now = {path: len(code) for path, code in compile_library().items()}
        tag, before = last_release()
    except CannotCompile as e:
        sys.exit("size: %s" % e)
    lines = {path: len((ROOT / path).with_suffix(".py").read_text().splitlines()) for path in now}
    rows = table(now, before, lines)
    width = max(len(row[0]) for row in rows)
    print("%-*s  %6s  %10s%s" % (width, "module", "lines", ".mpy bytes", "  since " + tag if tag else ""))
    for name, count, size, change in rows:
        print("%-*s  %6d  %10d%s" % (width, name, count, size, "  %+*d" % (len("since " + tag), change) if tag else ""))
    if not tag:
        print("no release yet to compare with")


if __name__ == "__main__":
    main()
