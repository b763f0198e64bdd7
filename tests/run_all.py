"""Run the tests on both interpreters: run_all.py [cpython [pytest arguments] | upy [test_x.py[::test_name]] ...]

CPython runs all of tests/ under pytest; the MicroPython unix port ($MICROPYTHON) runs tests/test_*.py, a fresh
interpreter per file.  Without arguments both run at once: the tests wait more than they compute.  The last lines say
why tests were skipped, then what passed on each.  Exit status: 0 only if every suite ran at least one test and nothing
failed.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent

# The unix port's own default on a 64-bit machine, stated so that every build has it.
HEAP = "2M"
# A file that takes longer hangs.
FILE_TIMEOUT_S = 120


class Suite:
    """What one interpreter's tests came to."""

    def __init__(self, word):
        self.word = word
        self.passed = 0
        self.failed = 0
        self.skipped = []  # (where, reason)
        self.problem = None

    def __str__(self):
        return "%s: %d passed, %d failed, %d skipped" % (self.word, self.passed, self.failed, len(self.skipped))


def run_cpython(arguments):
    """Run pytest; its own figures come back through conftest.py's --figures."""
    suite = Suite("CPython")
    with tempfile.TemporaryDirectory() as directory:
        figures = Path(directory) / "figures.json"
        command = [sys.executable, "-m", "pytest", "-q", "--figures", str(figures)]
        status = subprocess.run(command + (arguments or [str(TESTS)]), cwd=ROOT).returncode
        if figures.exists():
            found = json.loads(figures.read_text())
            suite.passed, suite.failed = found["passed"], found["failed"]
            suite.skipped = [tuple(row) for row in found["skipped"]]
        else:
            suite.failed = 1
            suite.problem = "pytest ended with status %d before it could report" % status
    if status and not suite.failed:
        suite.problem = "pytest ended with status %d" % status
    return suite


def run_upy_file(suite, micropython, name, say):
    """Run one file, or one test of it, in an interpreter of its own and add what came of it to suite."""
    command = [micropython, "-X", "heapsize=" + HEAP, "tests/run_upy.py", "-v", name]
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=FILE_TIMEOUT_S,
        )
        output, ending = done.stdout, "ended with status %d" % done.returncode
        status = done.returncode
    except subprocess.TimeoutExpired as e:
        output, ending, status = e.stdout or b"", "did not end within %d s" % FILE_TIMEOUT_S, 1
    lines = output.decode(errors="replace").splitlines()
    shown = [line for line in lines if not line.startswith("RUN ")]
    skips = [found.groups() for found in (re.fullmatch(r"SKIP (\S+): (.*)", line) for line in lines) if found]
    suite.skipped += skips
    found = re.fullmatch(r"(\S+) (\d+) passed (\d+) failed (\d+) skipped", lines[-1]) if lines else None
    if found:
        shown.pop()
        passed, failed, skipped = (int(number) for number in found.groups()[1:])
        if status and not failed:
            failed = 1  # no test of that name, or the interpreter failed on its way out
    else:
        running = [line[4:] for line in lines if line.startswith("RUN ")]
        skipped = len(skips)
        failed = 1 + sum(line.startswith("FAILED ") for line in lines)
        passed = max(0, len(running[1:]) - skipped - failed)
        shown.append("FAILED %s::%s: MicroPython %s" % (name, running[-1] if running else "start", ending))
    if failed:
        say("\n".join(shown))
    suite.passed += passed
    suite.failed += failed
    say("%-32s %4d passed %4d failed %4d skipped" % (name, passed, failed, skipped))


def run_upy(names, say):
    """say: called with each line or more of what there is to print."""
    suite = Suite("MicroPython")
    micropython = os.environ.get("MICROPYTHON") or str(Path(sys.executable).parent / "micropython")
    say("\nMicroPython: " + micropython)
    for name in names or sorted(path.name for path in TESTS.glob("test_*.py")):
        run_upy_file(suite, micropython, name, say)
    return suite


def main(arguments):
    which = arguments[0] if arguments else None
    if which not in (None, "cpython", "upy"):
        sys.exit(__doc__.splitlines()[0])
    if which == "cpython":
        suites = [run_cpython(arguments[1:])]
    elif which == "upy":
        suites = [run_upy(arguments[1:], partial(print, flush=True))]
    else:
        lines = []
        with ThreadPoolExecutor(1) as pool:
            upy = pool.submit(run_upy, [], lines.append)
            suites = [run_cpython([]), upy.result()]
        print("\n".join(lines))
    print()
    bad = False
    for suite in suites:
        for where, reason in suite.skipped:
            print("%s skipped %s: %s" % (suite.word, where, reason))
        if not suite.passed and not suite.failed:
            suite.problem = suite.problem or "no test ran"
        if suite.problem:
            print("%s: %s" % (suite.word, suite.problem))
        bad = bad or bool(suite.failed or suite.problem)
    for suite in suites:
        print(suite)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
