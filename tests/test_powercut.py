"""The power cut at every flash operation of recorded workloads: see tools/powercut.py, which replays the ids."""

import sys

import powercut

# MicroPython is slower, so it cuts at fewer of the operations.
_QUICK = sys.implementation.name != "micropython"
_SMALL = ("qos1_publish", "qos2_publish", "qos1_receive", "qos2_receive", "both_ways", "reconnects", "session_lost")
_VERSION_5 = ("properties", "refusals")
_LARGE = ("wrap", "receive_wrap", "full", "drop_oldest")


def _explore(names, prog_size=4, wanted=None, weak=False, nested=False, step=1):
    total = 0
    failures = []
    for name in names:
        once, twice, failed = powercut.explore(name, prog_size, wanted, weak, 1, nested, step)
        total += once + twice
        failures += failed
    print("%d runs with a power cut" % total)
    assert total and not failures, failures


def test_nothing_is_lost_or_doubled_by_a_cut_anywhere():
    _explore(_SMALL, step=1 if _QUICK else 2)


def test_nothing_is_lost_or_doubled_by_a_cut_after_laps_of_the_ring_or_in_a_full_one():
    _explore(_LARGE, step=4 if _QUICK else 24)


def test_nothing_is_lost_or_doubled_by_a_cut_that_leaves_unstable_cells():
    _explore(_SMALL, 16, weak=True, step=1 if _QUICK else 3)


def test_nothing_is_lost_or_doubled_by_a_second_cut_during_recovery():
    _explore(("qos1_publish", "qos2_publish", "qos2_receive"), nested=True, step=2 if _QUICK else 10)


def test_nothing_is_lost_or_doubled_in_a_session_of_mqtt_5():
    _explore(_VERSION_5, step=2 if _QUICK else 8)
    _explore(("expiry",), step=5 if _QUICK else 40)
    _explore(_VERSION_5, 16, weak=True, step=5 if _QUICK else 20)
    _explore(_VERSION_5, 256, step=5 if _QUICK else 20)
    _explore(("expiry",), powercut.SEALED, weak=True, step=23 if _QUICK else 90)


def test_every_record_in_a_page_of_its_own_survives_as_well():
    _explore(_SMALL, 256, step=1 if _QUICK else 3)


def test_nothing_is_lost_or_doubled_in_an_encrypted_partition():
    _explore(_SMALL, powercut.SEALED, weak=True, step=3 if _QUICK else 12)
    _explore(_LARGE, powercut.SEALED, weak=True, step=24 if _QUICK else 80)


def test_an_encrypted_partition_goes_on_after_an_orderly_shutdown_in_the_last_page():
    # CLOSE stood in the last page of a sector, and the record behind it had no room.
    for cuts in ("", "@154.none.54", "@152.all.63"):
        powercut.run(*powercut.parse_id("wrap/sealed" + cuts))


def test_an_id_replays_the_same_run():
    traces = []
    for _ in range(2):
        lines = []
        name, prog_size, plans = powercut.parse_id("qos2_publish@9.bits.1")
        powercut.run(name, prog_size, plans, lines.append)
        traces.append(lines)
    assert traces[0] == traces[1] and len(traces[0]) > 20
