"""Run test files under MicroPython: tests/run_upy.py [-v] [test_x.py | test_x.py::test_name] ...

Without names it runs every tests/test_*.py in this one interpreter; run_all.py starts a fresh one per file.  A file's
test_* functions run in the order of their names, each with an asyncio of its own.  Prints a line per file, and for
each failure the traceback and the command that runs just that test again.  -v tells each test before it starts.
Exit status: 0 when every test passed or was skipped and at least one was found, else 1.
"""

import gc
import os
import sys

HERE = sys.argv[0].rpartition("/")[0] or "."
ROOT = HERE + "/.."

for name in ("tests", "", "lib", "tools", "tools/shim"):
    sys.path.insert(0, ROOT + "/" + name if name else ROOT)

import host  # noqa: E402

host.install()

# As boot.py does it: a heap that is only collected when it is full is in small pieces then.
gc.threshold((gc.mem_alloc() + gc.mem_free()) // 4)

from skip import SkipTest  # noqa: E402


def _run(function):
    """Run one test; None or the reason for skipping it.  Raises what the test raises."""
    gc.collect()
    try:
        result = function()
    except SkipTest as e:
        return str(e)
    finally:
        if "asyncio" in sys.modules:
            # Tasks that a test leaves behind must not run inside the next one.
            sys.modules["asyncio"].new_event_loop()
    if result is not None:
        raise AssertionError("returned %r: a test returns None, and runs its own coroutines by asyncio.run()" % result)
    return None


def _failed(where, error):
    print("FAILED %s" % where)
    sys.print_exception(error)
    print("again: make test-upy ARGS=%s" % where)


def run_file(file, only, verbose):
    """Run one file's tests, or the one called only; return (passed, failed, skipped)."""
    if verbose:
        print("RUN import")
    try:
        module = __import__(file[:-3])
    except SkipTest as e:
        print("SKIP %s: %s" % (file, e))
        return 0, 0, 1
    except Exception as e:
        _failed(file, e)
        return 0, 1, 0
    passed = failed = skipped = 0
    for name in sorted(dir(module)):
        function = getattr(module, name)
        if not name.startswith("test_") or not callable(function) or (only and name != only):
            continue
        where = file + "::" + name
        if verbose:
            print("RUN " + name)
        try:
            reason = _run(function)
        except KeyboardInterrupt:
            raise
        except BaseException as e:
            failed += 1
            _failed(where, e)
            continue
        if reason is None:
            passed += 1
        else:
            skipped += 1
            print("SKIP %s: %s" % (where, reason))
    return passed, failed, skipped


def main(names):
    verbose = "-v" in names
    names = [name for name in names if name != "-v"]
    if not names:
        names = sorted(n for n in os.listdir(HERE) if n.startswith("test_") and n.endswith(".py"))
    ok = bool(names)
    for name in names:
        file, _, only = name.partition("::")
        file = file.rpartition("/")[2]
        passed, failed, skipped = run_file(file, only, verbose)
        if passed + failed + skipped == 0:
            print("%s: no such test" % name)
        ok = ok and failed == 0 and passed + skipped > 0
        print("%s %d passed %d failed %d skipped" % (file, passed, failed, skipped))
    return 0 if ok else 1


sys.exit(main(sys.argv[1:]))
