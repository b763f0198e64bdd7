"""The soak: a short run of the real thing, and that its verdict sees what it must see."""

import collections
import io
import types

import soak
from rich.console import Console


def trial_of(tmp_path, arrived, heap=(), down=None, stats=None, problem=None):
    """A trial of 6 messages each way that never ran.  down: {qos: (count, missing, repeated, late)}."""
    trial = soak.Trial(6, "1", "micropython", tmp_path, lambda *_: None)
    trial.far = types.SimpleNamespace(arrived=arrived, seen=set(arrived), strange=[])
    counts = {"lost": 0, "dropped": 0, "handler_errors": 0}
    counts.update(stats or {})
    came = {1: (3, [], 0, 0), 2: (3, [], 0, 0)}
    came.update(down or {})
    samples = [{"heap_bytes": used, "strange": 0, "qos1": came[1], "qos2": came[2], "stats": counts} for used in heap]
    samples.append({"heap_bytes": 0, "strange": 0, "qos1": came[1], "qos2": came[2], "stats": counts})
    trial.device = types.SimpleNamespace(samples=samples, tracebacks=[], received=6, published=6)
    trial.problem = problem
    return trial


def test_short_run_loses_nothing_each_way():
    console = Console(file=io.StringIO(), width=200)
    trial, failures, home = soak.run(600, "7", console)
    assert failures == [] and home is None
    figures, _ = trial.verdict()
    assert figures["messages"] == figures["arrived"] == [300] * 4
    assert figures["lost"] == figures["disordered"] == [0] * 4
    assert figures["duplicated"][1] <= trial.repeats["up"].count
    assert figures["duplicated"][3] <= trial.repeats["down"].count
    assert trial.kinds and trial.heap()
    for table in soak.tables_of(trial):
        console.print(table)
    assert "heap in use, last tenth" in console.file.getvalue()


def test_verdict_names_what_went_wrong(tmp_path):
    right = [1, 2, 3, 4, 5, 6]
    for arrived, more, words in (
        (right, {}, []),
        ([2, 1, 4, 6, 3, 1, 5], {}, []),  # the order is that of each QoS; QoS 1 may repeat
        ([1, 2, 4, 5, 6], {}, ["up QoS 1: 1 lost"]),
        ([1, 2, 3, 4, 5, 6, 6], {}, ["up QoS 2: 1 duplicated"]),
        ([1, 4, 2, 3, 5, 6], {}, ["up QoS 2: 1 out of order"]),
        (right, {"down": {1: (2, [3], 9, 0)}}, ["down QoS 1: 1 lost"]),
        (right, {"down": {2: (3, [], 1, 0)}}, ["down QoS 2: 1 duplicated"]),
        (right, {"down": {2: (3, [], 0, 1)}}, ["down QoS 2: 1 out of order"]),
        (right, {"problem": "stuck"}, ["stuck"]),
        (right, {"heap": [9000] * 50 + [9000 + soak.FLAT_BYTES] * 50}, []),
        (right, {"heap": range(0, 100000, 1000)}, ["the heap has grown: at least 0 bytes in use, then 90000"]),
        # What is on its way comes and goes.
        (right, {"heap": [9000, 99000] * 49 + [99000, 9000]}, []),
    ):
        assert trial_of(tmp_path, arrived, **more).verdict()[1] == words, (arrived, more)
    lost = trial_of(tmp_path, right, stats={"lost": 1}).verdict()[1]
    assert len(lost) == 1 and "'lost': 1" in lost[0]


def test_what_the_broker_sends_anew_is_told_apart_from_duplicates_of_ours(tmp_path):
    def published(packet_id, dup=0, qos=2):
        return bytes((0x30 | dup << 3 | qos << 1, 4 + 6, 0, 4)) + b"soak" + packet_id.to_bytes(2, "big") + b"xx"

    released = b"\x62\x02\x00\x07"
    for packets, count in (
        ([published(7), published(7, 1), released], 0),
        ([published(7), released, published(7, 1)], 1),
        ([published(7), released, released, published(7, 1), published(7, 1)], 1),
        ([published(7), released, published(7)], 0),  # the identifier of a new message
        ([published(7), released, published(8, 1)], 0),
        ([published(7), released, published(7, 1, 1)], 0),
    ):
        repeats = soak.Repeats()
        for packet in packets:
            repeats.on_packet(soak.px.UP, packet)
        assert repeats.count == 0
        for packet in packets:
            repeats.on_packet(soak.px.DOWN, packet)
        assert repeats.count == count, packets
    trial = trial_of(tmp_path, [1, 2, 2, 3, 4, 5, 6])
    trial.repeats["up"].count = 1
    assert trial.verdict()[1] == []
    trial.repeats["up"].count = 0
    assert trial.verdict()[1] == ["up QoS 2: 1 duplicated"]


def test_same_seed_gives_the_same_faults_of_every_kind(tmp_path):
    plans = [soak.Trial(100000, seed, "micropython", tmp_path, None) for seed in ("1", "1", "2")]
    first, again, other = [(trial._faults, trial._due) for trial in plans]
    assert first == again != other
    assert set(collections.Counter(first[0])) == {*soak._FAULTS, "half-open"}
