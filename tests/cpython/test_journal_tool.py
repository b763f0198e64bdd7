"""tools/journal.py: the reader written from FORMAT.md alone, and lib/ itself, read the same out of the same flash.

The files in tests/golden hold the format still: journal-vN-unitA.bin was written by the store of format version N.  The
tool and the store both have to find in it what EXPECTED says.  When the format changes, its version does, too; then

    python tests/cpython/test_journal_tool.py --make

writes the files of the new version (the same bytes every time); those of the old one go, unless lib/ still reads them.
"""

import base64
import json
import os
import random
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path[:0] = [str(ROOT / name) for name in ("tools/shim", "tools", "lib", "tests")]
    import host

    host.install()

import journal as tool  # noqa: E402
import journal_plot  # noqa: E402
import powercut  # noqa: E402
from norsim import Encrypted, Nor, PowerCut  # noqa: E402
from raises import raises  # noqa: E402

from mqtt_durable.journal import Journal  # noqa: E402
from mqtt_durable.store import Store  # noqa: E402
from mqtt_durable.store5 import Store5  # noqa: E402

GOLDEN = ROOT / "tests" / "golden"
UNITS = {4: 4, 16: 4, 256: 8}  # program unit -> sectors
IDENTITY = 0x01020304
PUBACK, PUBREC, PUBREL, PUBCOMP = 4, 5, 6, 7
TOPICS = ("plant/7/temp", "plant/7/humidity", "küche/licht")

# What is in the golden files.  Message n has the packet identifier n; QoS, topic, payload and so on by message().
EXPECTED = {
    "waiting": [193, 197, 198, 199, 200] + list(range(201, 213)),
    "released": [197, 200],
    "mark": 212,
    "inbound": [8, 9],
    "received": 19,
    "subscriptions": {"plant/+/cmd": (2, 2), "all/#": (1, 0)},
}
WINDOW = 8
LAST_ONLINE = 200
LAST = 212


def message(n):
    """(topic, payload, QoS, retain, mark) of message n."""
    payload = b"%d: " % n + (bytes(range(n)) if n % 7 == 0 else b"%.1f " % (n / 4) * (n % 40))
    return TOPICS[n % 3], payload, (1, 2, 2)[n % 3], n % 5 == 0, n if n % 4 == 0 else None


def open_store(device, unit, in_flight=WINDOW):
    store = Store(Journal(device, unit, None, lambda n: b"\x5a" * n), in_flight)
    store.open()
    return store


def drain(store):
    """What the store sends now, as packets."""
    buf = memoryview(bytearray(1024))
    sent = b""
    while True:
        n = store.fill(buf, 0)
        if not n:
            return powercut.split(sent)[0]
        sent += buf[:n]


def acknowledge(store, packet_id):
    """The broker does the next thing for a message: return whether that finishes it."""
    state = store.session.out[packet_id] & 3
    store.on_ack({1: PUBACK, 2: PUBREC, 3: PUBCOMP}[state], packet_id)
    return state != 2


def publish(store, n):
    topic, payload, qos, retain, mark = message(n)
    assert store.publish(topic, payload, qos, retain, mark) == n


def write_journal(device, unit):
    """Fill a journal with what EXPECTED says; the ring turns more than once.  Return the store, still open."""
    store = open_store(device, unit)
    store.connected(False, IDENTITY)
    for topic_filter, requested, granted in (("plant/+/cmd", 2, 2), ("all/#", 1, 0), ("old/#", 0, 0)):
        store.subscribed(topic_filter, requested, granted)
    store.unsubscribing("old/#")
    for packet_id in (7, 8, 9):
        assert store.on_publish(2, packet_id)
        store.handled(2, packet_id, store.session.epoch)
        drain(store)
    store.on_ack(PUBREL, 7)
    drain(store)
    for n in range(1, LAST_ONLINE + 1):
        publish(store, n)
        drain(store)
        # One slow message holds up the oldest place; all others are finished three later.
        for packet_id in sorted(store.session.out):
            if packet_id <= n - 4 and (packet_id not in (19, 193) or n == 30):
                while not acknowledge(store, packet_id):
                    drain(store)
        if n % 6 == 0:
            store.commit()
    for packet_id in (197, 200):
        assert not acknowledge(store, packet_id)
        drain(store)
    store.commit()
    store.disconnected()
    for n in range(LAST_ONLINE + 1, LAST + 1):
        publish(store, n)
    return store


def write_golden(unit):
    """The bytes of a golden file: one closed in order, one with a torn record at its end, one just left."""
    nor = Nor(UNITS[unit] * tool.SECTOR, unit, seed=3)
    store = write_journal(nor, unit)
    if unit == 4:
        store.close()
    elif unit == 16:
        nor.cut_after(1, "prefix", seed=11)
        assert isinstance(raises(PowerCut, publish, store, LAST + 1), PowerCut)
    return bytes(nor.mem)


def golden(unit):
    return (GOLDEN / ("journal-v%d-unit%d.bin" % (tool.VERSION, unit))).read_bytes()


def content(journal):
    """summary(), once all that waits is what message() says."""
    assert journal.problems == []
    for n in journal.order():
        state, pub = journal.messages[n]
        topic, payload, qos, retain, mark = message(n)
        if state != tool.RELEASED:
            assert state == qos and pub.kind & 1 == retain and journal.topic(pub)[0] == topic
            assert pub.payload == payload
    return summary(journal)


def summary(journal):
    """What EXPECTED tells of, as the tool has it."""
    waiting = journal.order()
    return {
        "waiting": waiting,
        "released": sorted([n for n in waiting if journal.messages[n][0] == tool.RELEASED]),
        "mark": journal.mark,
        "inbound": sorted(journal.inbound),
        "received": journal.received,
        "subscriptions": journal.subscriptions,
    }


def facts(store):
    """The same of a store."""
    session = store.session
    queued = [(session.newest - n - 1) % 65023 + 1 for n in range(store.queued())]
    window = [n for n in session.out if session.out[n]]
    return {
        "waiting": sorted(window + queued, key=lambda n: (n - session.newest - 1) % 65023),
        "released": sorted([n for n in window if session.out[n] & 3 == tool.RELEASED]),
        "mark": store.mark,
        "inbound": sorted(session.held),
        "received": store.received,
        "subscriptions": {f: (how >> 2, how & 3) for f, how in store.subscriptions().items()},
    }


def run(*args, **more):
    """(exit code, stdout, stderr) of the tool as a command."""
    command = [sys.executable, str(ROOT / "tools" / "journal.py"), *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, **more)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout, done.stderr


# -- the golden files


def test_tool_reads_the_golden_files():
    for unit in UNITS:
        journal = tool.Journal(golden(unit))
        assert content(journal) == EXPECTED, unit
        assert journal.head.seq > UNITS[unit]
        assert journal.identity == IDENTITY and journal.journal_id == 0x5A5A5A5A and journal.unit == unit
        assert journal.closed == (unit == 4)
        torn = [s for sector in journal.sectors for s in sector.slices if s.name == "torn"]
        assert len(torn) == (unit == 16)


def test_store_mounts_the_golden_files():
    for unit in UNITS:
        nor = Nor(UNITS[unit] * tool.SECTOR, unit)
        nor.mem[:] = golden(unit)
        store = open_store(nor, unit)
        assert facts(store) == EXPECTED, unit
        assert store.identity == IDENTITY and not store.lost and not store.journal.damaged
        # And all of it goes out, in order.
        store.connected(True, IDENTITY)
        sent = drain(store)
        while store.waiting():
            acknowledge(store, store.session.order()[-1])
            sent += drain(store)
        got = [powercut.publish_fields(p) for p in sent if p[0] >> 4 == 3]
        numbers = [n for n in EXPECTED["waiting"] if n not in EXPECTED["released"]]
        assert [(n, topic, bytes(payload)) for n, topic, payload in got] == [(n, *message(n)[:2]) for n in numbers]


def test_a_change_of_the_format_changes_its_version():
    """What the store writes today is read as the version that FORMAT.md and the golden files are of."""
    assert "format version %d\n" % tool.VERSION in (ROOT / "lib" / "FORMAT.md").read_text(encoding="utf-8")
    for unit in UNITS:
        now = write_golden(unit)
        assert now[2] >> 4 == golden(unit)[2] >> 4 == tool.VERSION
        assert content(tool.Journal(now)) == EXPECTED


def test_example_in_format_md():
    rows = re.findall(r"^    [0-9a-f]{4}((?:  ?[0-9a-f]{2}){16})$", (ROOT / "lib/FORMAT.md").read_text("utf-8"), re.M)
    data = bytes.fromhex("".join(rows)).ljust(4 * tool.SECTOR, b"\xff")
    journal = tool.Journal(data)
    assert journal.problems == [] and journal.notes == [] and journal.closed
    assert journal.order() == [3] and journal.mark == 9 and journal.identity == 0x01020304
    state, pub = journal.messages[3]
    assert state == 2 and journal.topic(pub)[0] == "door/1" and pub.payload == b"open"
    nor = Nor(len(data))
    nor.mem[:] = data
    assert facts(open_store(nor, 4))["waiting"] == [3]


def test_a_sealed_journal_is_read():
    device = Encrypted(Nor(4 * tool.SECTOR, 16))
    store = write_journal(device, 16)
    journal = tool.Journal(device.dump())
    assert journal.head.sums and content(journal) == EXPECTED and "noise" in tool.dump(journal)
    store.close()
    journal = tool.Journal(device.dump())
    assert content(journal) == EXPECTED and journal.closed


WORKLOADS = (
    ("both_ways", 60),
    ("wrap", 170),
    ("session_lost", 60),
    ("drop_oldest", 110),
    ("properties", 60),
    ("expiry", 110),
)


def test_tool_and_store_agree_after_every_cut():
    """What the tool reads between a power cut and the mount is what a mount finds, second cuts included."""
    seen = []

    class Device(powercut.Device):
        def __init__(self, world):
            nor = Nor(world.tap.nor.size, world.unit)
            nor.mem[:] = world.tap.nor.mem
            try:
                journal = tool.Journal(world.tap.dump())
            except tool.NoJournal:
                journal = None
            found = facts(open_store(world.device(nor), world.unit, world.workload.in_flight))
            if journal is None:
                assert not found["waiting"] and found["mark"] is None
            else:
                assert journal.problems == [], world.cuts
                assert summary(journal) == found, world.cuts
                seen.append(len(found["waiting"]))
            super().__init__(world)

    original = powercut.Device
    powercut.Device = Device
    try:
        for unit in (4, 16, 256, powercut.SEALED):
            for name, most in WORKLOADS:
                for operation in range(len(str(unit)) + 3, most, 13):
                    mode = ("bits", "mixed", "prefix", "all", "zeros")[operation % 5]
                    try:
                        powercut.run(name, unit, [(operation, mode, operation), (operation % 9 + 1, "bytes", 1)])
                    except powercut.Failure:
                        pass  # what a run promises is for test_powercut.py
    finally:
        powercut.Device = original
    assert len(seen) > 80 and max(seen) > 10


# -- what can be wrong with a journal


def damaged(data, pos, n=4):
    return data[:pos] + bytes([b ^ 0x55 for b in data[pos : pos + n]]) + data[pos + n :]


def place(journal, packet_id):
    pub = journal.messages[packet_id][1]
    return pub.sector.place * tool.SECTOR + pub.off


def test_check_finds_a_message_that_no_longer_reads_back():
    for unit in UNITS:
        data = golden(unit)
        journal = tool.Journal(data)
        broken = tool.Journal(damaged(data, place(journal, 199) + 9))
        assert "message 199" in " ".join(broken.problems) or "what they said is not known" in broken.problems[0]


def test_check_finds_a_topic_that_is_gone():
    data = golden(4)
    journal = tool.Journal(data)
    owners = {journal.topic(m[1])[1] for m in journal.messages.values() if m[1]}
    owner = [o for o in owners if o.use == "topic"][0]
    broken = tool.Journal(damaged(data, owner.pos + 8))
    assert "topic" in " ".join(broken.problems)


def test_check_goes_on_without_the_newest_snapshot():
    data = golden(256)
    journal = tool.Journal(data)
    broken = tool.Journal(damaged(data, journal.base.pos))
    assert broken.problems and "no snapshot" in broken.problems[0]
    assert broken.order() == journal.order()


def test_what_nothing_needs_is_only_noted():
    data = golden(4)
    journal = tool.Journal(data)
    over = [r for s in journal.members for r in s.records if r.name == "PUB" and r.fate == "finished"]
    over = [r for r in over if r is not r.sector.records[-1]]
    noted = tool.Journal(damaged(data, over[0].pos + 9))
    assert noted.problems == [] and "which nothing needs" in noted.notes[0]


def test_any_bytes_are_read_without_a_fault():
    chance = random.Random(7)
    for turn in range(150):
        data = bytearray(golden(chance.choice(sorted(UNITS))))
        for _ in range(chance.choice((1, 4, 40))):
            at = chance.randrange(len(data))
            n = chance.choice((1, 1, 16, 300))
            data[at : at + n] = chance.choice((bytes(n), b"\xff" * n, chance.randbytes(n)))[: len(data) - at]
        assert "sector 0" in tool.picture(data)
        try:
            journal = tool.Journal(data)
        except tool.NoJournal:
            continue
        tool.dump(journal, 100)
        if turn % 10 == 0:
            ElementTree.fromstring(journal_plot.svg(journal, "x", 100))
    # A record whose checksum is right and whose body is nonsense.
    for _ in range(300):
        data = bytearray(golden(4)[: tool.SECTOR].ljust(4 * tool.SECTOR, b"\xff"))
        tail = tool.Sector(0, bytes(data[: tool.SECTOR])).records[0]
        seed = tool.crc32(data[4:12]) & 0x3FFFFFFF
        at = tail.off + tail.size
        data[at : tool.SECTOR] = b"\xff" * (tool.SECTOR - at)
        while at < 600:
            body = chance.randbytes(chance.randrange(30))
            kind = chance.choice((0x10, 0x18, 0x12, 0x2A, 0x30, 0x32, 0x33, 0x60, 0x61, 0x41))
            record = bytes((kind, kind ^ len(body) ^ 0xA5, len(body), 0)) + body
            record += tool.crc32(record, seed).to_bytes(4, "little")
            data[at : at + len(record)] = record
            at += len(record) + 3 & ~3
        tool.dump(tool.Journal(data), 1)
        assert tool.picture(data)


# -- the command


def test_dump_shows_every_record_in_words(tmp_path):
    path = tmp_path / "journal.bin"
    path.write_bytes(golden(4))
    code, out, _ = run("dump", path, "--per-day", 1440)
    assert code == 0
    ages = [int(age) for age in re.findall(r"^sector .* age (\d+)", out, re.M)]
    assert ages == sorted(ages, reverse=True) and ages[-1] == 0
    for text in (
        "journal 5A5A5A5A: format version 3, 4 sectors",
        "id 208, QoS 2, mark 208, distance 15, topic plant/7/humidity",
        "topic küche/licht",
        "<- waits",
        "<- finished",
        "<- released",
        "UPTO",
        "RELEASED 197",
        "all is known from here",
        "messages waiting     17, 193 to 212",
        "mark                 212",
        "plant/+/cmd, QoS 2 asked, 2 granted",
        "closed in order",
        "years left",
    ):
        assert text in out, text


def test_dump_shows_what_mqtt_5_has_recorded():
    nor = Nor(4 * tool.SECTOR, 4)
    store = Store5(Journal(nor, 4), 4, clock=lambda: tool.WALL + 5)
    store.open()
    store.assign("auto-7")
    properties = {
        "message_expiry_interval": 60,
        "payload_format_indicator": 1,
        "content_type": "text/plain",
        "response_topic": "a/b",
        "correlation_data": b"\x00\xff",
        "user_properties": [("key", "value")],
    }
    store.publish("t", b"payload", 1, properties=properties)
    store.publish("t" * 300, b"payload", 2, properties={"content_type": "x"})
    store.subscribed("a/#", 0x2E, 1)
    for orderly in (False, True):
        journal = tool.Journal(nor.mem)
        text = tool.dump(journal)
        assert "expires after 60 s, stamp 1073741829, payload format 1, content type \"text/plain\"" in text
        assert 'response topic "a/b", correlation data 00 ff, user property "key" = "value", "payload"' in text
        assert 'content type "x", "payload"' in text
        assert "auto-7, assigned by the broker" in text
        assert "a/#, QoS 2, no local, retain as published, none retained asked, 1 granted" in text
        assert journal.problems == [] and summary(journal) == facts(store)
        store.close()
    assert "wall time 1073741829" in text and "client identifier assigned: auto-7" in text


def test_wear_is_what_norsim_counted(tmp_path):
    path = tmp_path / "a.nor"
    nor = Nor(4 * tool.SECTOR, 4, path=str(path))
    write_journal(nor, 4)
    nor.close()
    code, out, _ = run("dump", path)
    assert code == 0 and "as counted" in out and "erased %d times" % nor.erases[0] in out
    assert content(tool.Journal(path.read_bytes())) == EXPECTED


def test_exit_codes_of_check(tmp_path):
    path = tmp_path / "journal.bin"
    path.write_bytes(golden(16))
    code, out, _ = run("check", path)
    assert code == 0 and "17 messages waiting" in out and "torn" in out
    path.write_bytes(damaged(golden(16), place(tool.Journal(golden(16)), 210) + 5))
    code, out, _ = run("check", path)
    assert code == 1 and ("message 210" in out or "damaged bytes" in out) and "1 problem" in out
    for data, why in ((b"\xff" * 16384, "no journal"), (b"x" * 5000, "no whole number"), (b"", "no journal")):
        path.write_bytes(data)
        code, _, err = run("check", path)
        assert code == 2 and why in err, err
    wrong = ("check",), ("check", tmp_path / "none"), ("look", path), ("check", path, "--port", "x"), ("pull", path)
    for args in wrong:
        assert run(*args)[0] == 2, args


def test_plot_is_a_picture_with_counts(tmp_path):
    path = tmp_path / "journal.bin"
    path.write_bytes(golden(16))
    assert run("plot", path)[0] == 0
    text = (tmp_path / "journal.svg").read_text(encoding="utf-8")
    words = " ".join(ElementTree.fromstring(text).itertext())
    for what in ("journal.bin: 17 messages waiting", "HEAD", "OLDEST", "message that waits", "torn", "mark 212"):
        assert what in words, what


def test_picture_of_a_replay():
    command = [sys.executable, str(ROOT / "tools" / "powercut.py"), "qos1_publish@9.bits.1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "as promised" in done.stdout
    assert re.search(r"sector 0 +seq 1 +\|.*\|", done.stdout)


# -- from a board


def said_by(interpreter, program, tmp_path):
    """What a program prints on a board whose file system is tmp_path."""
    lib = [str(ROOT / "lib")]
    if interpreter == sys.executable:
        start = "import sys; sys.path[:0] = %r; import host; host.install()\n" % ([str(ROOT / "tools/shim")] + lib)
    else:
        start = "import sys; sys.path[:0] = %r\n" % lib
    command = [interpreter, "-c", "import os; os.chdir(%r)\n" % str(tmp_path) + start + program]
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT).stdout


def interpreters():
    micropython = os.environ.get("MICROPYTHON") or str(Path(sys.executable).parent / "micropython")
    return [sys.executable] + ([micropython] if Path(micropython).exists() else [])


def test_pull_reads_the_home_that_config_json_names(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"journal": {"home": "file:here.bin"}}))
    (tmp_path / "here.bin").write_bytes(golden(256))
    for interpreter in interpreters():
        steps = []
        pulled = tool.Pulled(lambda *at: steps.append(at))
        pulled.feed(said_by(interpreter, tool.PULL, tmp_path))
        assert pulled.end() == ("file:here.bin", golden(256)), interpreter
        assert steps[-1] == (32768, 32768)


def test_pull_makes_no_journal_where_there_is_none(tmp_path):
    for interpreter in interpreters():
        for config, why in (
            (None, "no config.json"),
            ({"journal": {"home": "file:here.bin"}}, "here.bin: there is no journal"),
            ({}, "journal.bin: there is no journal"),
            ({"journal": {"home": "ram"}}, "nothing is stored"),
            ({"journal": {"home": "nowhere"}}, "expected auto"),
        ):
            (tmp_path / "config.json").unlink(missing_ok=True)
            if config is not None:
                (tmp_path / "config.json").write_text(json.dumps(config))
            pulled = tool.Pulled()
            pulled.feed(said_by(interpreter, tool.PULL, tmp_path))
            error = raises(tool.NoJournal, pulled.end)
            assert why in str(error), (interpreter, str(error))
            assert sorted(p.name for p in tmp_path.iterdir()) in ([], ["config.json"])


def test_pull_that_stops_half_way_is_an_error(tmp_path):
    line = "+ " + base64.b64encode(bytes(512)).decode()
    for said in ("= file:x 16384\n%s\n" % line, "", "mpremote: no device found", "= file:x 512\n+ ???\n.\n"):
        pulled = tool.Pulled()
        for byte in said.encode():  # as they come from a board
            pulled.feed(bytes((byte,)))
        assert "nothing could be pulled" in str(raises(tool.NoJournal, pulled.end))


def test_pull_without_a_board_says_so(tmp_path):
    code, _, err = run("pull", tmp_path / "x.bin", "--port", "/dev/none-such", env={**os.environ, "COLUMNS": "200"})
    assert code == 2 and "nothing could be pulled" in err and not (tmp_path / "x.bin").exists()


if __name__ == "__main__":
    if sys.argv[1:] != ["--make"]:
        sys.exit(__doc__)
    GOLDEN.mkdir(exist_ok=True)
    for unit in UNITS:
        data = write_golden(unit)
        assert content(tool.Journal(data)) == EXPECTED
        path = GOLDEN / ("journal-v%d-unit%d.bin" % (tool.VERSION, unit))
        path.write_bytes(data)
        print("%s: %d bytes" % (path.relative_to(ROOT), len(data)))
