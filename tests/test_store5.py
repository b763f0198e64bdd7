"""The store of MQTT 5: what it records beside that of 3.1.1, and what the broker's limits make of it on the wire."""

import powercut
from mqtt_durable.errors import ProtocolError
from mqtt_durable.journal import Journal
from mqtt_durable.packet import PUBACK, PUBCOMP, PUBREC, PUBREL
from mqtt_durable.packet5 import subscription_options
from mqtt_durable.properties import decode
from mqtt_durable.store import Store
from mqtt_durable.store5 import Store5
from norsim import Nor
from raises import raises

_UNITS = (4, 16, 256)
_WALL = 1790000000
_MIXED = {
    "user_properties": [("a", "1"), ("a", "2")],
    "message_expiry_interval": 600,
    "payload_format_indicator": 1,
    "content_type": "text/plain",
    "response_topic": "plant/7/answer",
    "correlation_data": b"\x00\xff",
}


class Clock:
    """Says what the test has set."""

    def __init__(self, now=0):
        self.now = now

    def __call__(self):
        return self.now


def _into(ends):
    """A finished() that appends what it is told to ends."""
    return lambda packet_id, result: ends.append((packet_id, result))


def _open(nor, version=5, in_flight=4, clock=None, finished=None, when_full="raise"):
    """A store as after a restart."""
    journal = Journal(nor, nor.prog_size, None, lambda n: b"\x5a" * n)
    if version == 5:
        store = Store5(journal, in_flight, when_full, finished, False, clock)
    else:
        store = Store(journal, in_flight, when_full, finished)
    store.open()
    return store


def _begin(unit=4, sectors=8, limits=None, **options):
    """A new device, connected to a broker that has no session yet: (nor, store)."""
    nor = Nor(4096 * sectors, unit)
    store = _open(nor, **options)
    store.limits(**(limits or {}))
    store.connected(False, 7)
    return nor, store


def _reopen(nor, present=True, limits=None, version=5, **options):
    """Restart and connect again."""
    store = _open(nor, version, **options)
    if version == 5:
        store.limits(**(limits or {}))
    store.connected(present, 7)
    return store


def _reconnect(store, present=True, **limits):
    store.disconnected()
    store.limits(**limits)
    store.connected(present, 7)


def _packets(store, size=1024):
    """All that is to be sent now, as whole packets."""
    buf = memoryview(bytearray(size))
    data = b""
    while True:
        n = store.fill(buf, 0)
        if not n:
            break
        data += bytes(buf[:n])
    packets, rest = powercut.split(data)
    assert not rest
    return packets


def _fields(packet):
    """(first byte, packet identifier, topic, properties, payload) of a PUBLISH of MQTT 5."""
    body = powercut.body_of(packet)
    n = body[0] << 8 | body[1]
    topic = str(body[2 : 2 + n], "utf-8")
    at = 2 + n
    packet_id = 0
    if packet[0] & 6:
        packet_id = body[at] << 8 | body[at + 1]
        at += 2
    properties, at = decode(body, at, len(body), 3)
    return packet[0], packet_id, topic, properties, body[at:]


def _sent(store, size=1024):
    """_fields() of each PUBLISH that is to be sent now; every other packet as it is."""
    return [_fields(packet) if packet[0] >> 4 == 3 else packet for packet in _packets(store, size)]


def _heads(store):
    """(first byte, packet identifier) of each packet that is to be sent now."""
    return [entry[:2] if isinstance(entry, tuple) else (entry[0], powercut.id_of(entry)) for entry in _sent(store)]


def _laps(store, bytes_):
    """Let the head run on over bytes_ bytes."""
    done = 0
    while done < bytes_:
        packet_id = store.publish("lap", b"x" * 400, 1)
        _packets(store)
        store.on_ack(PUBACK, packet_id)
        done += 420


# -- properties


def test_properties_are_recorded_and_sent_with_their_message():
    """[MQTT5-3.3.1-1]"""
    for unit in _UNITS:
        for size in (1024, 48):  # large messages come in pieces
            for topic in ("t", "x" * 300):  # and their properties may be beyond the first page
                nor, store = _begin(unit)
                store.publish(topic, b"payload", 1, True, 77, _MIXED)
                store.publish(topic, memoryview(b"\x00" * 300), 2, properties={"content_type": "c" * 200})
                store.publish(topic, b"plain", 1)
                want = [
                    (0x33, 1, topic, _MIXED, b"payload"),
                    (0x34, 2, topic, {"content_type": "c" * 200}, b"\x00" * 300),
                    (0x32, 3, topic, {}, b"plain"),
                ]
                assert _sent(store, size) == want, (unit, size)
                store = _reopen(nor)
                assert _sent(store, size) == [(entry[0] | 8,) + entry[1:] for entry in want]
                assert store.mark == 77


def test_no_properties_cost_no_byte_on_flash():
    for properties in (None, {}, {"user_properties": []}):
        nor, store = _begin()
        store.publish("t", b"a", 1, properties=properties)
        other = Nor(nor.size, 4)
        older = _open(other, 3)
        older.connected(False, 7)
        older.publish("t", b"a", 1)
        assert nor.mem == other.mem, properties


def test_bad_properties_are_refused_and_change_nothing():
    """[MQTT5-3.3.4-6]"""
    nor, store = _begin()
    ops = nor.ops
    for properties in (
        {"topic_alias": 1},
        {"subscription_identifiers": [1]},
        {"message_expiry_interval": -1},
        {"response_topic": "a/+"},
        {"user_properties": [("a", "x" * 65535)]},
        {"no such": 1},
    ):
        raises(ValueError, store.publish, "t", b"", 1, False, None, properties)
    assert nor.ops == ops and not store.waiting() and store.stored == 0
    assert store.publish("t", b"", 1) == 1


def test_properties_go_wherever_their_message_is_carried():
    for unit in _UNITS:
        nor, store = _begin(unit, in_flight=4)
        store.publish("stays", b"first", 2, properties=_MIXED)
        store.publish("stays", b"second", 1, properties={"content_type": "x"})
        _packets(store)
        _laps(store, 60000)
        store.commit()
        store = _reopen(nor)
        assert [entry[3:] for entry in _sent(store)] == [(_MIXED, b"first"), ({"content_type": "x"}, b"second")]


def test_a_changed_version_loses_no_message_either_way():
    """[MQTT5-2.2.2-1]"""
    for unit in _UNITS:
        for size in (1024, 48):
            for orderly in (False, True):
                nor, store = _begin(unit)
                for n in range(9):  # in the window and behind it
                    properties = _MIXED if n % 3 == 0 else {"content_type": "c"} if n % 3 == 1 else None
                    store.publish("t" * 20, b"%d" % n + b"." * 40 * n, 1 + n % 2, properties=properties)
                if orderly:
                    store.close()
                store = _reopen(nor, version=3)
                sent = []
                while store.waiting():
                    for packet in _packets(store, size):
                        if packet[0] >> 4 == 3:
                            packet_id, topic, payload = powercut.publish_fields(packet)
                            assert topic == "t" * 20
                            sent.append(payload)
                            store.on_ack(PUBREC if packet[0] & 4 else PUBACK, packet_id)
                        else:
                            store.on_ack(PUBCOMP, powercut.id_of(packet))
                assert sent == [b"%d" % n + b"." * 40 * n for n in range(9)], (unit, size, orderly)
                for n in range(9):
                    store.publish("older", b"%d" % n, 1)
                if orderly:
                    store.close()
                store = _reopen(nor)
                sent = []
                while store.waiting():
                    for entry in _sent(store, size):
                        sent.append(entry[2:])
                        store.on_ack(PUBACK, entry[1])
                assert sent == [("older", {}, b"%d" % n) for n in range(9)]


def test_a_carried_message_keeps_its_properties_under_the_other_version():
    nor, store = _begin()
    store.publish("t", b"a", 1, properties=_MIXED)
    store = _reopen(nor, version=3)
    _packets(store)
    _laps(store, 40000)
    store.close()
    assert _sent(_reopen(nor))[0][3:] == (_MIXED, b"a")


def test_a_grace_has_no_effect():
    nor = Nor(4096 * 8, 4)
    store = Store5(Journal(nor, 4), 4, "raise", None, True)
    store.open()
    store.connected(False, 7)
    programs = nor.programs
    store.publish("t", b"a", 1)
    assert nor.programs > programs and store.unsettled() == 0


# -- the broker's limits


def test_no_more_messages_are_in_flight_than_the_broker_receives():
    """[MQTT5-3.3.4-7] [MQTT5-4.9.0-1] [MQTT5-4.9.0-2]"""
    for most in (1, 2, 3, 65535):
        for resent in (False, True):
            nor, store = _begin(limits={"receive_maximum": most})
            for n in range(10):
                store.publish("t", b"%d" % n, 1 + n % 2)
            if resent:
                _reconnect(store)
                _packets(store)
                assert store.in_flight() == 4
                _reconnect(store, receive_maximum=most)
            open_ = set()
            sent = []
            while store.waiting():
                while True:
                    heads = _heads(store)
                    if not heads:
                        break
                    for first, packet_id in heads:
                        if first >> 4 == 3:
                            open_.add(packet_id)
                            sent.append(packet_id)
                            assert len(open_) <= min(most, 4)
                        else:
                            open_.remove(packet_id)
                            store.on_ack(PUBCOMP, packet_id)
                assert len(open_) == min(most, 4, store.waiting()), "the window is not used"
                if not open_:
                    break
                packet_id = min(open_)
                if packet_id % 2:
                    open_.remove(packet_id)
                    store.on_ack(PUBACK, packet_id)
                else:
                    store.on_ack(PUBREC, packet_id)
            assert sent == list(range(1, 11)), (most, resent)


def test_a_pubrel_waits_for_no_quota():
    """[MQTT5-3.3.4-8] [MQTT5-4.9.0-3]"""
    nor, store = _begin()
    for n in range(4):
        store.publish("t", b"%d" % n, 2)
    _packets(store)
    store.on_ack(PUBREC, 2)
    store.on_ack(PUBREC, 4)
    _packets(store)
    _reconnect(store, receive_maximum=1)
    assert _heads(store) == [(0x3C, 1), (0x62, 2), (0x62, 4)]
    store.on_ack(PUBCOMP, 4)
    store.on_ack(PUBCOMP, 2)
    assert _heads(store) == []
    store.on_ack(PUBREC, 1)
    assert _heads(store) == [(0x62, 1)]
    store.on_ack(PUBCOMP, 1)
    assert _heads(store) == [(0x3C, 3)]


def test_a_packet_larger_than_the_broker_takes_is_never_sent():
    """[MQTT5-3.2.2-15]"""
    ends = []
    nor, store = _begin(limits={"maximum_packet_size": 30}, finished=_into(ends))
    ids = [store.publish("t", b"x" * n, 1 + n % 2, properties=p) for n in (22, 23, 60, 1) for p in (None,)]
    ids.append(store.publish("t", b"", 1, properties={"content_type": "x" * 20}))
    ids.append(store.publish("t", b"", 1, properties={"content_type": "x" * 19}))
    packets = _packets(store)
    assert [powercut.publish_fields(packet)[0] for packet in packets] == [1, 4, 6]
    assert [len(packet) for packet in packets] == [30, 9, 30]
    assert ends == [(2, 0x95), (3, 0x95), (5, 0x95)] and store.refused == 3
    store.commit()
    store = _open(nor)
    assert sorted(store.session.out) == [1, 4, 6]


def test_an_alias_does_not_make_a_packet_too_large():
    """[MQTT5-3.2.2-15]"""
    for most in range(20, 40):
        nor, store = _begin(limits={"maximum_packet_size": most, "topic_alias_maximum": 8})
        store.publish("topic", b"x" * 10, 1)
        store.publish("topic", b"x" * 10, 1)
        packets = _packets(store)
        assert [len(packet) <= most for packet in packets] == [True] * (2 if most >= 22 else 0), most


def test_no_message_is_sent_above_the_brokers_maximum_qos():
    """[MQTT5-3.2.2-11]"""
    ends = []
    nor, store = _begin(limits={"maximum_qos": 1}, finished=_into(ends))
    store.publish("t", b"a", 2)
    store.publish("t", b"b", 1)
    assert _heads(store) == [(0x32, 1), (0x32, 2)] and store.lowered == 1
    store.on_ack(PUBACK, 1)
    store.on_ack(PUBACK, 2)
    assert ends == [(1, True), (2, True)] and store.waiting() == 0 and store.acknowledged == 2
    store.commit()
    assert _open(nor).waiting() == 0


def test_a_message_lowered_for_one_broker_has_its_own_qos_for_the_next():
    nor, store = _begin(limits={"maximum_qos": 1})
    store.publish("t", b"a", 2)
    assert _heads(store) == [(0x32, 1)]
    _reconnect(store, False)
    assert _heads(store) == [(0x34, 1)]
    raises(ProtocolError, store.on_ack, PUBACK, 1)


def test_a_broker_without_qos_1_has_them_all_at_qos_0():
    """[MQTT5-3.2.2-11] [MQTT5-3.3.1-2] [MQTT5-2.2.1-2]"""
    for size in (1024, 48):
        for unit in _UNITS:
            ends = []
            nor, store = _begin(unit, limits={"maximum_qos": 0}, finished=_into(ends))
            for n in range(9):
                store.publish("t", b"x" * 100 * (n % 2), 1 + n % 2, properties=_MIXED)
            store.disconnected()
            store.connected(True, 7)  # again, and yet no DUP
            assert [entry[:2] for entry in _sent(store, size)] == [(0x30, 0)] * 9
            assert ends == [(n, True) for n in range(1, 10)] and store.waiting() == 0
            store.commit()
            assert _open(nor).waiting() == 0, unit


def test_a_message_at_qos_0_is_not_over_before_its_last_byte_is_in_the_buffer():
    ends = []
    nor, store = _begin(limits={"maximum_qos": 0}, finished=_into(ends))
    store.publish("t", b"x" * 200, 1)
    store.publish("t", b"y", 1)
    buf = memoryview(bytearray(64))
    for n in (1, 2, 3):
        assert store.fill(buf, 0) == 64 and not ends
    store.disconnected()
    store.connected(False, 7)
    assert [entry[4] for entry in _sent(store, 64)] == [b"x" * 200, b"y"] and len(ends) == 2


def test_a_broker_that_retains_nothing_is_not_asked_to():
    """[MQTT5-3.2.2-14]"""
    nor, store = _begin(limits={"retain_available": False})
    store.publish("t", b"a", 1, True)
    store.publish("t", b"b", 2)
    assert _heads(store) == [(0x32, 1), (0x34, 2)] and store.lowered == 1
    _reconnect(store)
    assert _heads(store) == [(0x3B, 1), (0x3C, 2)]


# -- topic aliases


def test_a_topic_is_sent_once_a_connection_if_the_broker_takes_aliases():
    """[MQTT5-3.2.2-17] [MQTT5-3.2.2-18] [MQTT5-3.3.2-7] [MQTT5-3.3.2-8] [MQTT5-3.3.2-9]"""
    topics = ["topic/%d" % n for n in range(10)]
    for most in (0, 1, 3, 8, 65535):
        for size in (1024, 30):
            nor, store = _begin(in_flight=32, limits={"topic_alias_maximum": most})
            for n in range(30):
                store.publish(topics[n % 10], b"%d" % n, 1, properties={"content_type": "x"} if n % 4 else None)
            for again in (False, True):
                known = {}
                found = []
                for entry in _sent(store, size):
                    alias = entry[3].get("topic_alias", 0)
                    topic = entry[2]
                    if alias:
                        assert alias <= min(most, 8)
                        if topic:
                            assert alias not in known
                            known[alias] = topic
                        topic = known[alias]
                    else:
                        assert topic
                    found.append((topic, entry[4]))
                assert found == [(topics[n % 10], b"%d" % n) for n in range(30)]
                assert len(known) == min(most, 8)
                _reconnect(store, topic_alias_maximum=most)
            assert nor.mem.find(b"\x23\x00\x01") < 0


def _direct(store, topic, payload, qos=1, properties=None):
    """publish(), and _fields() of what the caller sends at once; None if it may not."""
    packet_id = store.publish(topic, payload, qos, properties=properties)
    if not store.at_once(packet_id):
        return None
    buf = bytearray(len(topic) + 14 + len(payload))
    n = store.put_head(buf, 0, 0x30 | qos << 1, topic.encode(), packet_id, len(payload))
    return _fields(bytes(buf[:n]) + payload)


def test_a_message_without_properties_may_be_sent_at_once_with_its_alias():
    nor, store = _begin(in_flight=8, limits={"topic_alias_maximum": 1})
    assert _direct(store, "topic", b"a") == (0x32, 1, "topic", {"topic_alias": 1}, b"a")
    assert _direct(store, "topic", b"b", 2) == (0x34, 2, "", {"topic_alias": 1}, b"b")
    assert _direct(store, "other", b"x" * 200) == (0x32, 3, "other", {}, b"x" * 200)
    assert store.sent == 3 and not _packets(store)
    assert _direct(store, "topic", b"", properties={"content_type": "x"}) is None
    assert _sent(store) == [(0x32, 4, "", {"content_type": "x", "topic_alias": 1}, b"")]
    # One that was refused for want of quota goes before all others.
    store.on_ack(PUBACK, 1, 0x97)
    store.retry()
    assert _direct(store, "topic", b"c") is None
    assert [entry[1] for entry in _sent(store)] == [1, 5]
    _reconnect(store, topic_alias_maximum=1)
    assert len(_sent(store)) == 5
    assert _direct(store, "third", b"d") == (0x32, 6, "third", {}, b"d")  # the alias is another topic's now


def test_nothing_is_sent_at_once_to_a_broker_that_may_not_take_it():
    """[MQTT5-3.2.2-11] [MQTT5-3.2.2-14] [MQTT5-3.2.2-15]"""
    for limits in ({"maximum_qos": 1}, {"maximum_qos": 0}, {"retain_available": False}, {"maximum_packet_size": 1023}):
        nor, store = _begin(limits=limits)
        assert store.lacks and _direct(store, "t", b"") is None and len(_packets(store)) == 1
    nor, store = _begin(limits={"maximum_packet_size": 1024})
    assert not store.lacks and _direct(store, "t", b"")


def test_without_memory_for_an_alias_a_message_goes_out_without_one():
    class Full(dict):
        def __setitem__(self, key, value):
            raise MemoryError

    nor, store = _begin(limits={"topic_alias_maximum": 8})
    store._aliases = Full()
    assert _direct(store, "topic", b"a") == (0x32, 1, "topic", {}, b"a")


def test_the_mapping_is_written_whole_before_it_is_used():
    nor, store = _begin(limits={"topic_alias_maximum": 8})
    store.publish("topic", b"x" * 300, 1)
    store.publish("topic", b"y", 1)
    buf = memoryview(bytearray(40))
    off = store.fill(buf, 20)  # there is no room for it
    assert off == 20
    assert [entry[2] for entry in _sent(store, 40)] == ["topic", ""]


def test_the_client_has_its_own_messages_named_by_the_same_aliases():
    nor, store = _begin(limits={"topic_alias_maximum": 2})
    assert store.alias(b"topic") == (1, b"topic") and store.alias(b"topic") == (1, b"")
    assert store.alias(b"t") == (0, b"t")
    store.publish("topic", b"", 1)
    assert _sent(store)[0][2:4] == ("", {"topic_alias": 1})
    assert store.alias(b"other") == (2, b"other") and store.alias(b"third") == (0, b"third")


# -- message expiry


def _expiring(store, interval=60, **more):
    return store.publish("t", b"e%d" % interval, 1, properties={"message_expiry_interval": interval}, **more)


def _left(store):
    """What is left of the intervals of the messages that are sent now."""
    return [entry[3].get("message_expiry_interval") for entry in _sent(store)]


def test_what_is_left_of_the_interval_is_sent_and_nothing_that_has_expired():
    for now in (0, 5, _WALL):
        for age in (0, 1, 59, 60, 61, 100000):
            ends = []
            clock = Clock(now)
            nor, store = _begin(clock=clock, finished=_into(ends))
            store.disconnected()
            _expiring(store, 60)
            _expiring(store, 4294967295)
            store.publish("t", b"stays", 1)
            clock.now += age
            store.limits()
            store.connected(True, 7)
            want = [4294967295 - age, None]
            if age < 60:
                assert _left(store) == [60 - age] + want and not ends
            else:
                assert _left(store) == want and ends == [(1, False)] and store.expired == 1
                store.commit()
                assert 1 not in _open(nor).session.out


def test_without_a_clock_nothing_expires():
    nor, store = _begin()
    _expiring(store, 60)
    for _ in range(3):
        assert _left(_reopen(nor, False)) == [60]


def test_what_may_be_at_the_broker_is_sent_again_although_it_has_expired():
    """[MQTT5-4.3.3-7]"""
    clock = Clock(100)
    nor, store = _begin(clock=clock)
    store.publish("t", b"a", 2, properties={"message_expiry_interval": 60})
    _packets(store)
    clock.now += 1000
    _reconnect(store)
    assert _sent(store) == [(0x3C, 1, "t", {"message_expiry_interval": 1}, b"a")]
    _reconnect(store, False)  # but to a new session it is a new message
    assert _sent(store) == [] and store.expired == 1


def test_wall_time_counts_through_a_restart():
    for unit in _UNITS:
        clock = Clock(_WALL)
        nor, store = _begin(unit, clock=clock)
        _expiring(store, 60)
        _expiring(store, 600)
        assert _left(_reopen(nor, False, clock=Clock(_WALL + 61))) == [539]


def test_a_clock_that_is_not_set_any_more_goes_on_from_the_newest_wall_time_known():
    clock = Clock(_WALL)
    nor, store = _begin(clock=clock)
    _expiring(store, 60)
    clock.now += 30
    _expiring(store, 60)
    for left in ([25, 55], [20, 50]):
        clock = Clock(2)  # since the program began
        store = _open(nor, clock=clock)
        clock.now += 5
        store.limits()
        store.connected(False, 7)
        assert _left(store) == left
        store.close()  # which records how far time has got


def test_powered_time_goes_on_over_restarts_from_the_newest_known():
    clock = Clock(1000)
    nor, store = _begin(clock=clock)
    store.disconnected()
    _expiring(store, 60)
    clock.now += 20
    _expiring(store, 60)
    clock = Clock(3)
    store = _open(nor, clock=clock)
    clock.now += 15
    _expiring(store, 60)
    store = _open(nor, clock=Clock(0))
    store.connected(False, 7)
    assert _left(store) == [25, 45, 60]


def test_a_clock_that_is_set_in_the_meantime_ages_nothing_by_its_jump():
    clock = Clock(10)
    nor, store = _begin(clock=clock)
    store.disconnected()
    _expiring(store, 60)
    clock.now += 10
    _expiring(store, 60)
    clock.now = _WALL
    _expiring(store, 60)
    clock.now += 5
    store.limits()
    store.connected(False, 7)
    assert _left(store) == [45, 55, 55]
    clock.now -= 1000  # nor by going back
    _reconnect(store, False)
    assert _left(store) == [45, 55, 60]


def test_the_times_survive_laps_of_the_ring_and_an_orderly_end():
    for unit in _UNITS:
        for orderly in (False, True):
            clock = Clock(100)
            nor, store = _begin(unit, clock=clock)
            store.disconnected()
            first = _expiring(store, 60000)
            clock.now = _WALL
            second = _expiring(store, 60000)
            clock.now += 500
            store.limits()
            store.connected(False, 7)
            _laps(store, 60000)
            store.commit()
            if orderly:
                store.close()
            store = _open(nor, clock=Clock(0))
            assert store.is_live(first) and store.is_live(second)
            store.connected(False, 7)
            assert _left(store) == [59500, 59500], (unit, orderly)


def test_a_journal_in_which_nothing_expires_has_no_times():
    nor, store = _begin(clock=Clock(_WALL))
    store.publish("t", b"a", 1, properties={"content_type": "x"})
    assert len(store.state()) == store.state_size() and not store.state()[4] & 8
    _expiring(store)
    assert len(store.state()) == store.state_size() and store.state()[4] & 8


def test_many_expired_messages_do_not_hold_up_one_that_has_not():
    clock = Clock(_WALL)
    nor, store = _begin(clock=clock)
    store.disconnected()
    for _ in range(100):
        _expiring(store, 60)
    last = store.publish("t", b"last", 1)
    clock.now += 60
    store = _open(nor, clock=clock)
    store.connected(False, 7)
    buf = memoryview(bytearray(128))
    assert store.fill(buf, 0)  # 0 would mean that there is nothing
    assert list(store.session.out) == [last] and store.expired == 100
    store.commit()
    store = _open(nor)
    assert store.is_live(last) and store.waiting() == 1


def test_a_message_that_has_expired_is_not_sent_after_a_cut_behind_one_that_came_later():
    for unit in _UNITS:
        clock = Clock(_WALL)
        nor, store = _begin(unit, clock=clock)
        store.publish("t", b"first", 1)
        _packets(store)
        store.disconnected()
        _expiring(store, 60)
        store.publish("t", b"last", 1)
        clock.now += 60
        store.limits()
        store.connected(True, 7)
        assert [entry[4] for entry in _sent(store)] == [b"first", b"last"]
        store = _reopen(nor, clock=clock)  # where it would count as sent before
        assert [entry[4] for entry in _sent(store)] == [b"first", b"last"], unit


# -- reason codes


def test_a_refused_message_is_finished_counted_and_told():
    """[MQTT5-4.3.3-4] [MQTT5-4.4.0-2]"""
    for unit in _UNITS:
        for reason in (0x80, 0x83, 0x87, 0x90, 0x91, 0x99):
            ends = []
            nor, store = _begin(unit, finished=_into(ends))
            store.publish("t", b"a", 1)
            store.publish("t", b"b", 2)
            store.publish("t", b"c", 2)
            _packets(store)
            store.on_ack(PUBREC, 2, reason)
            store.on_ack(PUBACK, 1, reason)
            assert ends == [(2, reason), (1, reason)] and store.refused == 2 and store.acknowledged == 0
            assert _packets(store) == []  # no PUBREL
            assert store.waiting() == 1
            store.commit()
            assert _heads(_reopen(nor)) == [(0x3C, 3)]


def test_a_reason_code_below_0x80_is_a_success():
    """[MQTT5-4.3.3-4]"""
    ends = []
    nor, store = _begin(finished=_into(ends))
    store.publish("t", b"a", 1)
    store.publish("t", b"b", 2)
    _packets(store)
    store.on_ack(PUBACK, 1, 0x10)
    store.on_ack(PUBREC, 2, 0x10)
    assert _packets(store) == [b"\x62\x02\x00\x02"]
    store.on_ack(PUBCOMP, 2)
    assert ends == [(1, True), (2, True)] and store.refused == 0


def test_a_message_without_quota_is_sent_anew_when_asked_to_and_blocks_none():
    for in_flight in (1, 4):
        ends = []
        nor, store = _begin(in_flight=in_flight, finished=_into(ends))
        for n in range(6):
            store.publish("t", b"%d" % n, 1 + n % 2)
        sent = _heads(store)
        store.on_ack(PUBACK, 1, 0x97)
        assert store.postponed == 1 and store.refused == 0 and not ends
        sent += _heads(store)
        assert sent == [(0x34 if n % 2 else 0x32, n + 1) for n in range(in_flight + 1)]
        store.on_ack(PUBACK, 1)  # there is nothing to be acknowledged
        assert store.is_live(1) and store.session.unknown == 1
        store.on_ack(PUBREC, 2, 0x97)
        _heads(store)
        store.retry()
        assert _heads(store) == []  # the window is full
        for packet_id in range(3, 3 + in_flight):
            if packet_id % 2:
                store.on_ack(PUBACK, packet_id)
            else:
                store.on_ack(PUBREC, packet_id)
                store.on_ack(PUBCOMP, packet_id)
        found = [head for head in _heads(store) if head[0] >> 4 == 3]
        want = [(0x32, 1), (0x34, 2)]
        assert found[:2] == want[: len(found)], in_flight
        if in_flight == 1:
            store.on_ack(PUBACK, 1)
            assert _heads(store) == [(0x34, 2)]


def test_in_a_clean_session_a_message_that_had_its_pubrel_is_not_sent_again_for_want_of_quota():
    nor = Nor(32768, 4)
    store = _open(nor, in_flight=1)
    store.connected(False, 7, True)
    store.publish("t", b"1", 2)
    store.publish("t", b"2", 2)
    assert _heads(store) == [(0x34, 1)]
    store.on_ack(PUBREC, 1)
    store.on_ack(PUBREC, 1, 0x97)  # no broker should
    assert _heads(store) == [(0x62, 1)] and not store.later() and store.session.unknown == 1
    store.on_ack(PUBCOMP, 1)
    assert _heads(store) == [(0x34, 2)] and store.in_flight() == 1


def test_messages_without_quota_never_make_the_window_grow_without_bound():
    nor, store = _begin(sectors=16, in_flight=4)
    for n in range(100):
        store.publish("t", b"%d" % n, 1)
    for _ in range(30):
        for _, packet_id in _heads(store):
            store.on_ack(PUBACK, packet_id, 0x97)
    assert len(store.session.out) == 12  # 8 beside the window
    assert len(store.state()) <= store.max_state
    store.retry()
    sent = []
    while store.waiting():
        for _, packet_id in _heads(store):
            sent.append(packet_id)
            assert store.in_flight() <= 4
            store.on_ack(PUBACK, packet_id)
    assert sent == list(range(1, 101))


def test_a_message_without_quota_is_sent_on_a_new_connection():
    for restart in (False, True):
        nor, store = _begin()
        store.publish("t", b"a", 1)
        _packets(store)
        store.on_ack(PUBACK, 1, 0x97)
        if restart:
            store = _reopen(nor)
        else:
            _reconnect(store)
        assert _heads(store) == [(0x3A, 1)]
        store.on_ack(PUBACK, 1)
        assert store.waiting() == 0 and store.session.limit == 4


def test_what_is_not_known_is_answered_with_0x92():
    """[MQTT5-2.2.1-5] [MQTT5-4.3.3-11]"""
    nor, store = _begin()
    ops = nor.ops
    store.on_ack(PUBREC, 77)
    store.on_ack(PUBREL, 78)
    store.on_ack(PUBREL, 79, 0x92)
    for packet in (PUBACK, PUBCOMP):
        store.on_ack(packet, 80)
    store.on_ack(PUBREC, 81, 0x80)  # nothing is there, and nothing to be released
    assert _packets(store) == [b"\x62\x03\x00\x4d\x92", b"\x70\x03\x00\x4e\x92", b"\x70\x03\x00\x4f\x92"]
    assert store.session.unknown == 6 and nor.ops == ops


def test_0x92_finishes_what_is_to_be_finished():
    """[MQTT5-4.3.3-11]"""
    ends = []
    nor, store = _begin(finished=_into(ends))
    store.publish("t", b"a", 2)
    _packets(store)
    store.on_ack(PUBREC, 1)
    _packets(store)
    store.on_ack(PUBCOMP, 1, 0x92)
    assert ends == [(1, True)] and store.waiting() == 0
    assert store.on_publish(2, 9)
    store.handled(2, 9, store.session.epoch)
    assert _packets(store) == [b"\x50\x02\x00\x09"]
    store.on_ack(PUBREL, 9, 0x92)
    assert _packets(store) == [b"\x70\x02\x00\x09"] and not store.session.held


def test_a_second_pubrec_with_an_error_releases_nothing_again():
    nor, store = _begin()
    store.publish("t", b"a", 2)
    _packets(store)
    store.on_ack(PUBREC, 1)
    assert _packets(store) == [b"\x62\x02\x00\x01"]
    store.on_ack(PUBREC, 1, 0x91)
    assert _packets(store) == [] and store.is_live(1)
    store.on_ack(PUBCOMP, 1)
    assert store.waiting() == 0


def test_answers_of_both_lengths_are_whole_in_any_buffer():
    for size in (5, 6, 7, 9, 64, 300):
        nor, store = _begin()
        n = 0
        while store.can_answer():
            n += 1
            if n % 3:
                store.on_ack(PUBREL, n)
            else:
                store.on_publish(1, n)
                store.handled(1, n, store.session.epoch)
        assert n > 50
        buf = memoryview(bytearray(size))
        found = []
        while True:
            end = store.fill(buf, 0)
            if not end:
                break
            packets, rest = powercut.split(bytes(buf[:end]))
            assert not rest  # so that another packet can come in between
            found += packets
        want = [bytes((0x70, 3, 0, k, 0x92)) if k % 3 else bytes((0x40, 2, 0, k)) for k in range(1, n + 1)]
        assert found == want, size


def test_an_acknowledgement_that_cannot_be_is_a_protocol_error():
    nor, store = _begin()
    store.publish("t", b"a", 2)
    store.publish("t", b"b", 1)
    _packets(store)
    for reason in (0, 0x80, 0x97):
        raises(ProtocolError, store.on_ack, PUBACK, 1, reason)
        raises(ProtocolError, store.on_ack, PUBREC, 2, reason)
    assert store.waiting() == 2


# -- the session, as in 3.1.1


def test_each_message_is_acknowledged_once_and_by_what_its_qos_demands():
    """[MQTT5-2.2.1-5] [MQTT5-4.3.2-1] [MQTT5-4.3.2-2] [MQTT5-4.3.2-3] [MQTT5-4.3.3-1] [MQTT5-4.3.3-2] [MQTT5-4.3.3-3]
    [MQTT5-4.3.3-5] [MQTT5-4.3.3-6]"""
    nor, store = _begin()
    for qos in (1, 2):
        store.publish("t", b"a", qos, properties=_MIXED)
    assert _heads(store) == [(0x32, 1), (0x34, 2)]
    for _ in range(3):  # they are kept until the acknowledgement, and sent again under their identifiers
        store = _reopen(nor)
        assert store.publish("t", b"b", 1) > 2
        assert _heads(store)[:2] == [(0x3A, 1), (0x3C, 2)]
    store.on_ack(PUBREC, 2)
    for _ in range(3):
        assert (0x62, 2) in _heads(store)
        store = _reopen(nor)
        heads = _heads(store)
        assert (0x62, 2) in heads and (0x3C, 2) not in heads
        store.on_ack(PUBREC, 2)
    store.on_ack(PUBACK, 1)
    store.on_ack(PUBCOMP, 2)
    assert not store.is_live(1) and not store.is_live(2)


def test_what_is_not_acknowledged_is_sent_again_in_order_when_the_session_is_resumed_and_at_no_other_time():
    """[MQTT5-3.3.1-1] [MQTT5-4.4.0-1] [MQTT5-4.6.0-1] [MQTT5-4.6.0-4]"""
    for restart in (False, True):
        nor, store = _begin(in_flight=8)
        for n in range(6):
            store.publish("t", b"%d" % n, 1 + n % 2, properties={"content_type": "c"} if n % 3 else None)
        _packets(store)
        for packet_id in (4, 2):
            store.on_ack(PUBREC, packet_id)
        assert _heads(store) == [(0x62, 4), (0x62, 2)]
        for _ in range(2):
            store.publish("t", b"new", 1)
            assert len(_heads(store)) == 1 and _heads(store) == []
            if restart:
                store = _reopen(nor, in_flight=8)
            else:
                _reconnect(store)
            assert _heads(store)[:6] == [(0x3A, 1), (0x62, 2), (0x3A, 3), (0x62, 4), (0x3A, 5), (0x3C, 6)]
        _reconnect(store, False)
        assert _heads(store)[:4] == [(0x32, 1), (0x32, 3), (0x32, 5), (0x34, 6)]  # as new


def test_a_message_of_the_broker_is_taken_once_and_its_identifier_is_free_again_afterwards():
    """[MQTT5-4.3.2-4] [MQTT5-4.3.2-5] [MQTT5-4.3.3-8] [MQTT5-4.3.3-10] [MQTT5-4.3.3-11] [MQTT5-4.3.3-12]
    [MQTT5-4.6.0-2] [MQTT5-4.6.0-3]"""
    nor, store = _begin()
    for packet_id in (7, 3, 5):
        assert store.on_publish(1, packet_id)
        store.handled(1, packet_id, store.session.epoch)
        assert store.on_publish(2, packet_id + 1)
        store.handled(2, packet_id + 1, store.session.epoch)
    assert _heads(store) == [(0x40, 7), (0x50, 8), (0x40, 3), (0x50, 4), (0x40, 5), (0x50, 6)]
    assert store.on_publish(1, 7)  # a new one, whatever its DUP
    for _ in range(2):
        store = _reopen(nor)
        assert not store.on_publish(2, 8) and _heads(store) == [(0x50, 8)]
    store.on_ack(PUBREL, 8)
    assert _packets(store) == [b"\x70\x02\x00\x08"]
    for _ in range(2):
        assert store.on_publish(2, 8)
        store = _reopen(nor)


# -- the session at the broker


def test_the_assigned_client_identifier_survives_what_the_subscriptions_do_not():
    for unit in _UNITS:
        nor, store = _begin(unit)
        assert store.assigned == ""
        store.assign("auto-ä")
        store.subscribed("a/#", 1, 1)
        assert _open(nor).assigned == "auto-ä"
        store.begin(8)
        store.connecting()
        _laps(store, 60000)
        store.commit()
        store = _open(nor)
        assert store.assigned == "auto-ä" and store.subscriptions() == {}
        store.assign("b" * 128)
        store.close()
        store = _open(nor)
        assert store.assigned == "b" * 128
        ops = nor.ops
        store.assign("b" * 128)
        raises(ValueError, store.assign, "b" * 129)
        assert nor.ops == ops and len(store.state()) == store.state_size()


def test_the_largest_message_goes_with_the_largest_snapshot():
    for unit in _UNITS:
        nor, store = _begin(unit, 8, clock=Clock(_WALL))
        store.assign("b" * 128)
        error = raises(ValueError, store.publish, "t", b"x" * 4096, 1)
        most = int(str(error).split()[-1])
        store.publish("t", b"x" * (most - 1 - 10), 1, properties={"message_expiry_interval": 9})
        packet_id = 0
        while nor.erases[0] < 3:  # laps of the ring, made by what does not add to it
            packet_id += 1
            assert store.on_publish(2, packet_id)
            store.handled(2, packet_id, store.session.epoch)
            if packet_id > 64:
                store.on_ack(PUBREL, packet_id)
            _packets(store, 4096)
        store = _reopen(nor, clock=Clock(_WALL))
        assert _sent(store, 4096)[0][4] == b"x" * (most - 1 - 10), unit
        assert len(store.session.held) == 64 and store.assigned == "b" * 128


def test_subscription_options_are_part_of_the_subscription():
    nor, store = _begin()
    options = subscription_options(b"a/#", 2, True, True, 2)
    assert options == 0x2E
    store.subscribed("a/#", options, 1)
    store = _open(nor)
    assert store.granted("a/#", options) == 1
    for other in (2, options & ~4, options ^ 0x30):
        assert store.granted("a/#", other) is None
    store.subscribed("b", 2, 2)  # without any they are the QoS alone
    assert _open(nor, 3).granted("b", 2) == 2
