"""The benchmark counts what it says: every entry's adapter sends and receives the messages it is asked for, a figure
that misses its bar is marked, and what cannot be measured says why.  No figure is judged here."""

import contextlib
import xml.etree.ElementTree

import bench_common
import bench_plot
import demo
import pytest
import size
from bench_common import Bar
from bench_peers import (
    ABOUT,
    FAULT_MESSAGES,
    NAMES,
    Bench,
    Entry,
    Trial,
    bars_of,
    in_order,
    not_measured,
    verdict,
    work,
)
from brokers import Mosquitto

HERE = "client", "simple", "client5", "simple5", "umqtt", "umqtt_nodelay", "paho"  # need no PEERS
FEW = 5


@pytest.fixture(scope="module")
def bench():
    with contextlib.closing(Bench([Entry(name, None) for name in NAMES], 1)) as made:
        yield made


def entry_of(bench, name):
    return next(entry for entry in bench.entries if entry.name == name)


@pytest.mark.parametrize("name", HERE)
def test_entry_publishes_and_receives_what_it_is_asked_for(bench, name):
    entry = entry_of(bench, name)
    assert entry.missing is None
    with Mosquitto() as broker:
        far = demo.FarSide(broker.port, work.TOPIC.decode(), lambda line: None, lambda n: work.PAYLOAD)
        with contextlib.closing(far):
            for qos in entry.qualities:
                before = len(far.arrived)
                assert bench.result(entry, "publish", broker, qos, FEW) > 0
                for _ in range(100):  # at QoS 0 the broker may still have to read them when the program has ended
                    far.settle()
                    if len(far.arrived) - before >= 32 + FEW:
                        break
                assert len(far.arrived) - before == 32 + FEW  # the 32 go ahead of those that are measured
            assert not far.strange
        for qos in entry.qualities:
            assert bench.result(entry, "receive", broker, qos, FEW, send=(qos, 32 + FEW)) > 0


@pytest.mark.parametrize("name", HERE)
def test_numbers_arrive_over_a_link_that_is_cut(bench, name):
    lost, _, late = Trial(bench, entry_of(bench, name), 1, "cut", 1).run().split(" / ")
    assert lost == "0"
    # paho sends what it has sent before behind what is new.
    assert late == "0" or name == "paho"


def test_ours_loses_and_doubles_nothing_when_it_is_killed(bench):
    assert Trial(bench, entry_of(bench, "client"), 2, "kill", 1).run() == "0 / 0 / 0"


def test_what_is_loaded_is_found_by_running(bench):
    with Mosquitto() as broker:
        loaded = bench.result(entry_of(bench, "simple"), "run", broker, 1, 1, send=(1, 1), home="file:j").split()
    assert "mqtt_durable.simple" in loaded and "mqtt_durable.store" in loaded
    assert "mqtt_durable.client" not in loaded


def test_peers_that_are_absent_say_so(bench, tmp_path):
    rows = in_order(bench, not_measured(bench))
    assert rows["mqtt_as"] == {"": "not measured: PEERS not given"}
    assert not set(rows) & {"mqtt_durable.Client", "umqtt.simple"}
    assert Entry("mqtt_as", tmp_path).missing == "no mqtt_as/__init__.py in PEERS"
    (tmp_path / "any" / "mqtt_as").mkdir(parents=True)
    (tmp_path / "any" / "mqtt_as" / "__init__.py").write_text("")
    assert Entry("mqtt_as", tmp_path).missing is None


def test_figure_that_misses_its_bar_is_marked_and_counted(capsys):
    tables = {"a": {"x": {"most": 11, "least": 0.7, "words": "1-2"}, "y": {"most": 11, "least": 0.7}}}
    bars = {"most": Bar(10), "least": Bar(0.8, True)}
    misses = bench_common.show(tables, lambda part, row: bars if row == "x" else {}, {"a": "headline"})
    out = capsys.readouterr().out.splitlines()
    assert misses == 2
    assert out[1] == "headline" and out[3].count("!") == 2 and "!" not in out[4]
    assert "most <= 10, least >= 0.8" in out[3] and "1-2" in out[3]
    assert not Bar(10).missed(10) and not Bar(10, True).missed(10)


def test_part_that_cannot_be_measured_leaves_the_others(tmp_path, capsys):
    def fails():
        raise bench_common.Missing("no valgrind")

    path = tmp_path / "new" / "results.json"
    plans = {"good": lambda: {"good": {"row": {"n": 1}}}, "bad": fails}
    kept = {"old": {"row": {"n": 2}}}
    assert bench_common.measure(plans, [], path, lambda *_: {}, {}, None, kept) == 1
    assert "bad was not measured: no valgrind" in capsys.readouterr().out
    assert '"good"' in path.read_text() and '"old"' in path.read_text()
    with pytest.raises(bench_common.Missing):
        bench_common.measure(plans, ["none such"], path, lambda *_: {}, {})


def test_verdict_counts_lost_repeated_and_late():
    everything = list(range(1, FAULT_MESSAGES + 1))
    assert verdict(everything, 0, False) == "0 / 0 / 0"
    assert verdict(everything[:1] + everything[2:], 0, False) == "1 / 0 / 0"
    assert verdict([1, 2, 2, 3, 1] + everything[3:], 0, False) == "0 / 2 / 0"
    assert verdict([1, 2, 2, 3] + everything[3:], 1, False) == "0 / 0 / 0"
    assert verdict([2, 1] + everything[2:], 0, False) == "0 / 0 / 1"
    assert verdict([1, 2, 3], 0, True) == "stops at 3"


def test_picture_shows_every_row_and_is_svg():
    tables = {
        "speed": {"mqtt_durable.Client": {"QoS 1": 5000}, "umqtt.simple": {"QoS 1": 22}, "mqtt_as": {"": "-"}},
        "heap": {"mqtt_durable.Client": {"32 bit": 90000}, "<odd>": {"32 bit": 1}},
        "faults": {"mqtt_durable.Client, QoS 2": {"cut": "0 / 0 / 0", "kill": "0 / 3 / 1"}},
    }
    text = bench_plot.svg(tables, ABOUT % "2026-01-01", bars_of)
    root = xml.etree.ElementTree.fromstring(text)
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    for word in ("mqtt_durable.Client", "umqtt.simple", "<odd>", "mqtt_durable.Client, QoS 2", "0 / 3 / 1"):
        assert word in texts, word
    assert "mqtt_as" not in texts


def test_size_tells_the_change_since_the_release():
    now, before = {"lib/m/a.mpy": 10, "lib/m/new.mpy": 5}, {"lib/m/a.mpy": 12, "lib/m/old.mpy": 3}
    rows = size.table(now, before, {"lib/m/a.mpy": 1})
    assert rows == [("m/a.py", 1, 10, -2), ("m/new.py", 0, 5, 5), ("m/old.py", 0, 0, -3), ("all", 1, 15, 0)]
