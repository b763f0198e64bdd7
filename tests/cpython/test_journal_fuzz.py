"""Thousands of random power cuts in the journal; tests/journal_fuzz.py replays what fails, by the id in the message."""

import subprocess
import sys
from pathlib import Path

from journal_fuzz import run, run_seeds

TESTS = Path(__file__).resolve().parent.parent

# In runs that were never full a cut costs at most one more erase of a sector that had its turn already.
MOST_SPREAD = 12


def test_thousands_of_random_cuts():
    totals = run_seeds(100, 116)
    assert totals["cuts"] > 4000 and totals["nested"] > 500, totals
    assert totals["fulls"] > 500 and totals["closes"] > 200 and totals["formats"] > 2, totals


def test_wear_stays_even_under_power_cuts():
    seen = 0
    for seed in range(200, 225):
        for unit in (4, 16):
            one = run(unit, seed, 60)
            if not one.fulls:
                assert one.spread() <= MOST_SPREAD, one.id
                seen += 1
    assert seen > 10


def test_runs_that_failed_once():
    # A mount cut while it did away with a torn record of two pages; the first of them then read as blank.
    assert run("sealed", 70070).cuts > 60


def test_a_run_is_the_same_every_time():
    a, b = run(16, 7), run(16, 7)
    assert a.chip.mem == b.chip.mem and a.cuts == b.cuts > 50


def test_the_command_line_replays_an_id():
    done = subprocess.run(
        [sys.executable, str(TESTS / "journal_fuzz.py"), "4:3", "sealed:3"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0 and done.stdout.startswith("2 runs, 0 failed"), done.stdout + done.stderr
