"""pytest's side of the tests: import paths, the shim, settings, and the figures that run_all.py prints."""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# The same order as in run_upy.py.
for name in ("tests", ".", "lib", "tools", "tools/shim"):
    sys.path.insert(0, str(ROOT / name))

import host  # noqa: E402

host.install()

import hypothesis  # noqa: E402
import mqtt_durable.mount  # noqa: E402, F401
import mqtt_durable.replay  # noqa: E402, F401 - thousands of mounts: what is loaded stays loaded, see once.py
import pytest  # noqa: E402
from skip import SkipTest  # noqa: E402

# No luck and no clock: the same examples in every run, however slow the machine.
hypothesis.settings.register_profile("repeatable", derandomize=True, database=None, deadline=None)
hypothesis.settings.load_profile("repeatable")


def pytest_addoption(parser):
    parser.addoption("--figures", metavar="FILE", help="write passed, failed, skipped and the reasons as JSON")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    try:
        return (yield)
    except SkipTest as e:
        pytest.skip(str(e))


def _reason(report):
    """The reason of a skipped or expected-to-fail test."""
    if hasattr(report, "wasxfail"):
        return report.wasxfail
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    for prefix in ("Skipped: ", "unittest.case.SkipTest: "):
        text = text.removeprefix(prefix)
    return text


def pytest_sessionfinish(session):
    path = session.config.getoption("--figures")
    if not path:
        return
    stats = session.config.pluginmanager.get_plugin("terminalreporter").stats
    skipped = stats.get("skipped", []) + stats.get("xfailed", [])
    figures = {
        "passed": len(stats.get("passed", [])),
        "failed": len(stats.get("failed", [])) + len(stats.get("error", [])),
        "skipped": [[report.nodeid, _reason(report)] for report in skipped],
    }
    Path(path).write_text(json.dumps(figures))
