"""The demo: a short run of the real thing, and that its verdict sees what it must see."""

import collections
import io
import types

import demo
from rich.console import Console


def trial_of(tmp_path, qos, arrived, messages=5, tracebacks=(), problem=None):
    """A trial that never ran, with what its far side would have received."""
    trial = demo.Trial(qos, messages, 4, "1", "micropython", tmp_path, lambda *_: None)
    trial.far = types.SimpleNamespace(arrived=arrived, seen=set(arrived), strange=[])
    trial.device = types.SimpleNamespace(published=messages, tracebacks=list(tracebacks))
    trial.problem = problem
    return trial


def test_short_run_loses_and_doubles_nothing():
    console = Console(file=io.StringIO(), width=200)
    trials, failures, home = demo.run(40, 4, "7", console)
    assert failures == [] and home is None
    assert [trial.qos for trial in trials] == [1, 2]
    for trial in trials:
        figures, _ = trial.verdict()
        expected = {"published": 40, "delivered": 40, "power_cuts": 4, "link_cuts": 2, "restarts": 1, "tracebacks": 0}
        assert {name: figures[name] for name in expected} == expected
        assert figures["duplicated"] == 0 or trial.qos == 1
        assert sum(trial.flash["erases"]) > 0 and trial.flash["programmed_bytes"] > 40 * 48
    console.print(demo.table_of(trials))
    text = console.file.getvalue()
    assert "power cut" in text and "lost" in text and "years of flash life" in text


def test_verdict_names_what_went_wrong(tmp_path):
    for qos, arrived, words in (
        (2, [1, 2, 3, 4, 5], []),
        (2, [1, 2, 4, 5], ["lost: 3"]),
        (2, [1, 2, 2, 3, 4, 5], ["duplicated: 2"]),
        (1, [1, 2, 1, 2, 3, 4, 5], []),
        (1, [2, 3, 4, 5, 2], ["lost: 1"]),
        (2, [1, 3, 2, 4, 5], ["out of order: 2"]),
        (2, [1, 2, 3, 4, 5, 6], ["unexpected: 6"]),
    ):
        figures, failures = trial_of(tmp_path, qos, arrived).verdict()
        assert failures == words, arrived
        assert figures["delivered"] == len(set(arrived))
    trial = trial_of(tmp_path, 2, [1, 2, 3, 4, 5], tracebacks=["life 3: x"], problem="it did not finish")
    _, failures = trial.verdict()
    assert failures == ["it did not finish", "traceback in life 3: x"]


def test_console_tells_progress_and_tracebacks(tmp_path):
    device = demo.Device("micropython", tmp_path, {}, {})
    device.life = 2
    device._read(
        io.BytesIO(
            b"main.py: client a\ndemo: begins at 8\ndemo: published 8\nTraceback (most recent call last):\n"
            b'  File "app.py", line 1, in main\nOSError: 5\ndemo: published 9\ndemo: done\n'
            b"demo: power failed in program 0x10+4: bits\n"
        )
    )
    assert device.published == 9 and device.begun and device.done
    assert device.note == "program 0x10+4: bits"
    assert device.tracebacks == ['life 2: File "app.py", line 1, in main | OSError: 5']
    device.close()


def test_same_seed_gives_the_same_faults(tmp_path):
    plans = [demo.Trial(2, 100, 40, seed, "micropython", tmp_path, None) for seed in ("1", "1", "2")]
    first, again, other = [(trial._faults, trial._due, trial._power.random()) for trial in plans]
    assert first == again != other
    kinds = collections.Counter(first[0])
    assert kinds["broker"] == 4 and sum(kinds.values()) == 24 and set(demo._LINK_FAULTS) < set(kinds)


def test_flash_life_is_endurance_over_rate():
    # 16 sectors of 100000 erases, one erase in 40 messages, a message in 10 s: 640 million seconds.
    assert abs(demo._years(16, 25, 1000, 10) - 640e6 / (365.25 * 86400)) < 1e-9
