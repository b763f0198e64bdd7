"""What the benchmarks share: running MicroPython and counting its instructions, the 32-bit port, tables with bars.

A table is {part: {row: {column: figure}}}.  A figure that misses its bar is marked.  What cannot be measured raises
Missing and is told as one line, after all else was.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import mpy

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build"
WASM = "@micropython/micropython-webassembly-pyscript"
WASM_VERSION = "1.29.0-6"
CALLGRIND = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null"]


class Missing(Exception):
    """A tool is missing or has failed; the argument is one line."""


def progress(text):
    print("bench: " + text, file=sys.stderr, flush=True)


def run(command, what, env=None):
    """What a command printed.  Raises Missing."""
    try:
        done = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    except OSError as e:
        raise Missing("%s: %s: %s" % (what, command[0], e.strerror))
    if done.returncode:
        lines = (done.stdout + done.stderr).strip().splitlines() or ["exit status %d" % done.returncode]
        raise Missing("%s: %s" % (what, lines[-1]))
    return done.stdout + done.stderr


def need(program, package):
    if not shutil.which(program):
        raise Missing("%s is missing: install it (apt-get install %s)" % (program, package))


def micropython():
    """The path of the unix port."""
    return os.environ.get("MICROPYTHON", str(ROOT / ".venv" / "bin" / "micropython"))


def collected(text):
    """The instructions that callgrind has counted, from what it printed."""
    return int(text.rpartition("Collected :")[2].split()[0])


def compile_library(directory):
    """Compile the library into directory/lib; return the names of the files, relative to that.  Raises Missing."""
    try:
        files = mpy.compile_library()
    except mpy.CannotCompile as e:
        raise Missing(str(e))
    return [write(directory / path, code).relative_to(directory / "lib") for path, code in files.items()]


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


WASM_DRIVER = """
import { loadMicroPython } from %(module)s;
import fs from "node:fs";
const mp = await loadMicroPython({ heapsize: 192 * 1024 });
for (const name of %(directories)s) mp.FS.mkdir("/bench/" + name);
for (const [name, path] of %(files)s) mp.FS.writeFile("/bench/" + name, fs.readFileSync(path));
async function run(code) {
  if (code.includes("await ")) await mp.runPythonAsync(code); else mp.runPython(code);
  return mp.globals.get("result");
}
// Garbage is collected only when nothing runs.
async function alive() { await run("import gc; gc.collect()"); return await run("result = gc.mem_alloc()"); }
try {
  await run("import sys; sys.path.append('/bench'); result = 0");
  // The port has no os.urandom.
  await run("sys.modules['os'] = type('os', (), {'urandom': staticmethod(lambda n: b'seed'[:n])})");
  const rows = [];
  for (const code of %(steps)s) { const result = await run(code); rows.push([await alive(), result]); }
  console.log(JSON.stringify(rows));
  process.exit(0);
} catch (error) {
  console.error(String(error));
  process.exit(1);
}
"""


def heap_32_bit(driver, files, steps):
    """Run steps one after the other on the WebAssembly port, whose objects have 32 bits as on a board.

    driver: where the script for node goes.  files: {path under /bench, which is on sys.path: the file here}.
    steps: Python texts, which may await.
    Returns for each (bytes alive after it, what it has put into the variable result).
    """
    need("node", "nodejs")
    module = BUILD / "wasm" / WASM_VERSION
    main = module / "node_modules" / WASM / "micropython.mjs"
    if not main.exists():
        need("npm", "npm")
        progress("npm install " + WASM)
        module.mkdir(parents=True, exist_ok=True)
        options = ["--silent", "--no-audit", "--no-fund", "--prefix", str(module)]
        run(["npm", "install"] + options + [WASM + "@" + WASM_VERSION], "npm install " + WASM)
    directories = {""}
    for name in files:
        directories.update(parent.as_posix() for parent in Path(name).parents if parent != Path("."))
    code = WASM_DRIVER % {
        "module": json.dumps(main.as_uri()),
        "directories": json.dumps(sorted(directories)),
        "files": json.dumps([(name, str(path)) for name, path in files.items()]),
        "steps": json.dumps(list(steps)),
    }
    write(driver, code.encode())
    return [tuple(row) for row in json.loads(run(["node", str(driver)], "node").splitlines()[-1])]


class Bar:
    """At most (or with least=True at least) so much."""

    def __init__(self, limit, least=False):
        self.limit = limit
        self.least = least

    def missed(self, figure):
        return figure < self.limit if self.least else figure > self.limit

    def __str__(self):
        return "%s %s" % (">=" if self.least else "<=", number(self.limit))


def number(figure):
    """A figure as text, with digits that mean something."""
    if isinstance(figure, str):
        return figure
    digits = 4 if 0 < figure < 1 else 2 if 0 < figure < 100 else 0
    text = "%.*f" % (digits, figure)
    return re.sub(r"\.0+$", "", text)


def show(results, bars_of, titles):
    """Print the tables; return how many figures miss their bars.

    bars_of(part, row): {column: Bar}.  titles: {part: its headline}.  A figure that is a text stands as it is.
    """
    misses = 0
    for part, rows in results.items():
        columns = list(dict.fromkeys(column for row in rows.values() for column in row))
        width = max((len(name) for name in rows), default=0)
        print("\n%s" % titles.get(part, part))
        print(" " * width + "".join("%15s" % column for column in columns))
        for name, row in rows.items():
            bars = {column: bar for column, bar in bars_of(part, name).items() if column in row}
            line = "%-*s" % (width, name)
            for column in columns:
                if column not in row:
                    line += " " * 15
                    continue
                figure = row[column]
                bad = column in bars and not isinstance(figure, str) and bars[column].missed(figure)
                misses += bad
                line += "%14s%s" % (number(figure), "!" if bad else " ")
            if bars:
                line += "  bar: " + ", ".join("%s %s" % pair for pair in bars.items())
            print(line.rstrip())
    return misses


def measure(plans, chosen, path, bars_of, titles, missing=None, kept=None):
    """Measure the chosen parts of plans, all if none; print the tables and write them to path.  Return the exit status.

    plans: {part: function that returns tables}.  missing: a list to which parts may add lines.  kept: tables of an
    earlier run, which go to path, too.  A run that is stopped leaves the parts that are done there.  Raises Missing for
    an unknown part.
    """
    if not set(chosen) <= set(plans):
        raise Missing("parts are %s" % ", ".join(plans))
    results = {}
    missing = [] if missing is None else missing
    for name, part in plans.items():
        if name in chosen or not chosen:
            try:
                results.update(part())
            except Missing as e:
                missing.append("%s was not measured: %s" % (name, e))
            text = json.dumps({"results": {**(kept or {}), **results}, "missing": missing}, indent=1)
            write(path, (text + "\n").encode())
    misses = show(results, bars_of, titles)
    print("\n%d miss their bar, marked !" % misses)
    for line in missing:
        print("bench: " + line)
    return 1 if missing else 0
