"""The rules of the session, one by one, with a restart from the flash wherever it could hurt."""

import gc
import sys

import powercut
from mqtt_durable.errors import JournalFull, JournalUnavailable, ProtocolError
from mqtt_durable.journal import Journal
from mqtt_durable.packet import PUBACK, PUBCOMP, PUBREC, PUBREL
from mqtt_durable.store import Store, identity
from norsim import MODES_ERASE, MODES_PROGRAM, Nor, PowerCut, Rng
from raises import raises

_UNITS = (4, 16, 256)


def _open(nor, in_flight=4, when_full="raise", finished=None, grace=False):
    """A store as after a restart."""
    store = Store(Journal(nor, nor.prog_size, None, lambda n: b"\x5a" * n), in_flight, when_full, finished, grace)
    store.open()
    return store


def _begin(unit=4, sectors=8, **options):
    """A new device, connected to a broker that has no session yet: (nor, store)."""
    nor = Nor(4096 * sectors, unit)
    store = _open(nor, **options)
    store.connected(False, 7)
    return nor, store


def _peek(nor, **options):
    """What a restart now would find; the device stays as it is."""
    copy = Nor(nor.size, nor.prog_size)
    copy.mem[:] = nor.mem
    return _open(copy, **options)


def _reopen(nor, present=True, **options):
    """Restart and connect again."""
    store = _open(nor, **options)
    store.connected(present, 7)
    return store


def _bytes(store, size=1024):
    buf = memoryview(bytearray(size))
    data = b""
    while True:
        n = store.fill(buf, 0)
        if not n:
            return data
        data += bytes(buf[:n])


def _sent(store, size=1024):
    """All that is to be sent now: (type and flags, packet identifier, payload or None) of each packet."""
    packets, rest = powercut.split(_bytes(store, size))
    assert not rest
    found = []
    for packet in packets:
        if packet[0] >> 4 == 3:
            packet_id, _, payload = powercut.publish_fields(packet)
            found.append((packet[0], packet_id, payload))
        else:
            found.append((packet[0], powercut.id_of(packet), None))
    return found


def _publish(store, count, qos=1, first=0, size=0, mark=False):
    """Publish payloads b"0", b"1", ...; return their packet identifiers."""
    ids = []
    for number in range(first, first + count):
        ids.append(store.publish("t", b"%d" % number + b"." * size, qos, False, number if mark else None))
    return ids


def _skip_to(store, packet_id):
    """As after as many messages, all of them finished."""
    store.session.newest = store._taken = store._upto = packet_id


def _receive(store, packet_id, qos=2):
    """A message comes and the handler takes it."""
    assert store.on_publish(qos, packet_id)
    store.handled(qos, packet_id, store.session.epoch)


def _laps(store, bytes_):
    """Let the head run on over bytes_ bytes."""
    done = 0
    while done < bytes_:
        packet_id = store.publish("lap", b"x" * 400, 1)
        _bytes(store)
        store.on_ack(PUBACK, packet_id)
        done += 420


# -- outbound: rules 1 to 4


def test_publish_returns_when_its_record_is_programmed():
    for unit in _UNITS:
        nor, store = _begin(unit)
        programs = nor.programs
        packet_id = store.publish("plant/7/temp", b"21.5", 2, True)
        assert nor.programs > programs
        packets, _ = powercut.split(_bytes(_reopen(nor)))
        assert packets == [b"\x3d\x14\x00\x0cplant/7/temp\x00" + bytes((packet_id,)) + b"21.5"], unit


def test_a_message_is_sent_as_it_was_given():
    """[MQTT-3.3.2-1]"""
    for unit in _UNITS:
        nor, store = _begin(unit)
        store.publish("a/b", b"", 1)
        store.publish(b"a/\xc3\xa4", memoryview(b"\x00\xff"), 2, True)
        store.publish("x" * 300, b"y" * 100, 1)
        packets, rest = powercut.split(_bytes(store))
        assert not rest
        assert packets[0] == b"\x32\x07\x00\x03a/b\x00\x01"
        assert packets[1] == b"\x35\x0a\x00\x04a/\xc3\xa4\x00\x02\x00\xff"
        assert packets[2] == b"\x32\x94\x03\x01\x2c" + b"x" * 300 + b"\x00\x03" + b"y" * 100


def test_bad_arguments_are_refused_and_change_nothing():
    """[MQTT-3.3.2-1]"""
    nor, store = _begin()
    ops = nor.ops
    for topic in ("", "a/#", "+", "a\0", b"\xff"):
        raises(ValueError, store.publish, topic, b"", 1)
    raises(ValueError, store.publish, "t", b"x" * 4096, 1)
    assert nor.ops == ops and not store.waiting() and store.stored == 0
    assert store.publish("t", b"", 1) == 1


def test_the_largest_message_is_the_one_named_by_the_error():
    for unit in _UNITS:
        for mark in (None, 5):
            nor, store = _begin(unit)
            error = raises(ValueError, store.publish, "t", b"x" * 4096, 1, False, mark)
            most = int(str(error).split()[-1])
            raises(ValueError, store.publish, "t", b"x" * most, 1, False, mark)
            _publish(store, 3)
            for packet_id in [entry[1] for entry in _sent(store)]:
                store.on_ack(PUBACK, packet_id)  # their DONEs must not make it too large
            store.publish("t", b"x" * (most - 1), 1, False, mark)
            assert len(_sent(_reopen(nor))[-1][2]) == most - 1


def test_pubrel_goes_out_only_after_its_record():
    for unit in _UNITS:
        nor, store = _begin(unit)
        store.publish("t", b"a", 2)
        _bytes(store)
        store.on_ack(PUBREC, 1)
        nor.cut_after(1, "none")
        raises(PowerCut, _bytes, store)  # not a byte before the record
        nor.power_on()
        store = _reopen(nor)
        assert _sent(store) == [(0x3C, 1, b"a")]
        store.on_ack(PUBREC, 1)
        assert _sent(store) == [(0x62, 1, None)]
        for _ in range(2):
            assert _sent(_reopen(nor)) == [(0x62, 1, None)]  # never PUBLISH again


def test_an_acknowledgement_costs_no_program_and_rides_with_the_next_record():
    for unit in _UNITS:
        nor, store = _begin(unit)
        _publish(store, 2)
        _bytes(store)
        programs = nor.programs
        store.on_ack(PUBACK, 1)
        assert nor.programs == programs and store.waiting() == 1
        assert [entry[:2] for entry in _sent(_reopen(nor))] == [(0x3A, 1), (0x3A, 2)]  # losing it only repeats
        nor, store = _begin(unit)
        _publish(store, 2)
        _bytes(store)
        store.on_ack(PUBACK, 1)
        store.publish("t", b"c", 1)
        assert [entry[:2] for entry in _sent(_reopen(nor))] == [(0x3A, 2), (0x3A, 3)]


def test_what_waits_in_front_of_finished_messages_is_unfinished_when_a_mount_has_moved_the_head():
    nor, store = _begin(sectors=64)
    _publish(store, 20, 2, 0, 200)  # a snapshot has the last ones behind the window
    for packet_id in (1, 2, 3, 4, 6, 7):
        _sent(store)
        store.on_ack(PUBREC, packet_id)
        _sent(store)
        store.on_ack(PUBCOMP, packet_id)
        store.commit()
    _publish(store, 1, 2, 20, 2500)  # the last record, which has no room a second time
    store = _reopen(nor)
    assert _sent(store)[0][:2] == (0x3C, 5)
    store.on_ack(PUBREC, 5)
    assert (0x62, 5, None) in _sent(store)
    store = _reopen(nor)
    assert _sent(store)[0] == (0x62, 5, None)


def test_an_acknowledgement_is_recorded_by_commit_and_by_close():
    for orderly in (False, True):
        nor, store = _begin()
        _publish(store, 2, 2)
        _bytes(store)
        store.on_ack(PUBREC, 1)
        store.on_ack(PUBCOMP, 1)
        if orderly:
            store.close()
        else:
            store.commit()
        store = _reopen(nor)
        assert store.waiting() == 1 and _sent(store) == [(0x3C, 2, b"1")]


def test_at_most_16_acknowledgements_wait_for_their_record():
    nor, store = _begin(sectors=16, in_flight=64)
    _publish(store, 40)
    _bytes(store)
    for packet_id in range(1, 41):
        store.on_ack(PUBACK, packet_id)
        again = _peek(nor, in_flight=64)
        assert again.waiting() - store.waiting() <= 16
    assert store.waiting() == 0


def test_packet_identifiers_wrap_and_keep_their_order():
    for unit in _UNITS:
        nor, store = _begin(unit, in_flight=3)
        _publish(store, 1)
        _sent(store)
        store.on_ack(PUBACK, 1)
        _skip_to(store, 65020)
        store.begin(7)
        assert _publish(store, 6) == [65021, 65022, 65023, 1, 2, 3]
        store.connected(True, 7)
        sent = [entry[1] for entry in _sent(store)]
        while store.waiting():
            packet_id = [p for p in (65021, 65022, 65023, 1, 2, 3) if p in store.session.out][0]
            store.on_ack(PUBACK, packet_id)
            sent += [entry[1] for entry in _sent(store)]
        assert sent == [65021, 65022, 65023, 1, 2, 3], unit


def test_the_order_across_the_wrap_survives_a_restart():
    for unit in _UNITS:
        nor, store = _begin(unit, in_flight=3)
        for lap in range(63):  # nearly a whole round, of which only the last message counts
            _skip_to(store, (store.session.newest + 1022) % 65023)
            packet_id = store.publish("t", b"", 1)
            _sent(store)
            store.on_ack(PUBACK, packet_id)
        _skip_to(store, 65019)
        ids = _publish(store, 7)
        assert ids == [65020, 65021, 65022, 65023, 1, 2, 3]
        store = _reopen(nor, in_flight=3)
        sent = []
        while store.waiting():
            now = [entry[1] for entry in _sent(store)]
            assert now
            sent += now
            store.on_ack(PUBACK, now[0])
            for packet_id in now[1:]:
                store.on_ack(PUBACK, packet_id)
        assert sent[-7:] == ids, unit


def test_a_live_identifier_is_never_given_again():
    """[MQTT-2.3.1-2]"""
    nor, store = _begin(in_flight=4)
    stuck = store.publish("t", b"stuck", 1)
    _bytes(store)
    assert stuck == 1
    _skip_to(store, 64511)
    raises(JournalFull, store.publish, "t", b"next", 1)
    request = store.session.request_id()
    assert request > 65023  # SUBSCRIBE draws from the same space, from identifiers kept for it
    store.on_ack(PUBACK, stuck)
    assert store.publish("t", b"next", 1) == 64512


# -- inbound: rules 5 to 7


def test_pubrec_goes_out_only_after_its_record():
    for unit in _UNITS:
        nor, store = _begin(unit)
        _receive(store, 9)
        nor.cut_after(1, "none")
        raises(PowerCut, _bytes, store)
        nor.power_on()
        store = _reopen(nor)
        _receive(store, 9)  # again: neither side had agreed
        assert _sent(store) == [(0x50, 9, None)]
        store = _reopen(nor)
        assert not store.on_publish(2, 9) and _sent(store) == [(0x50, 9, None)]
        assert store.duplicates == 1


def test_pubcomp_goes_out_only_after_its_record():
    for unit in _UNITS:
        nor, store = _begin(unit)
        _receive(store, 9)
        _bytes(store)
        store.on_ack(PUBREL, 9)
        nor.cut_after(1, "none")
        raises(PowerCut, _bytes, store)
        nor.power_on()
        store = _reopen(nor)
        assert not store.on_publish(2, 9)
        store.on_ack(PUBREL, 9)
        assert _sent(store) == [(0x50, 9, None), (0x70, 9, None)]
        store = _reopen(nor)
        assert store.on_publish(2, 9)  # the identifier is free for a new message, which must not be swallowed


def test_received_and_done_with_one_identifier_again_and_again_are_replayed_in_order():
    for rounds in (1, 2, 5):
        nor, store = _begin()
        for _ in range(rounds):
            _receive(store, 9)
            store.on_ack(PUBREL, 9)
        _bytes(store)
        assert not _peek(nor).session.held
        _receive(store, 9)
        _bytes(store)
        assert list(_peek(nor).session.held) == [9]


def test_puback_is_sent_when_the_handler_has_returned():
    nor, store = _begin()
    assert store.on_publish(1, 5)
    assert _sent(store) == []
    store.handled(1, 5, store.session.epoch)
    assert _sent(store) == [(0x40, 5, None)]
    assert store.on_publish(1, 5)  # at least once


def test_the_token_is_the_same_exactly_when_the_message_is():
    for unit in _UNITS:
        nor, store = _begin(unit)
        tokens = []
        for packet_id in (1, 2, 1, 2, 3):
            assert store.on_publish(2, packet_id)
            token = store.token(packet_id)
            # The handler has taken effect, the power fails before the record.
            store = _reopen(nor)
            assert store.on_publish(2, packet_id)
            assert store.token(packet_id) == token
            store.handled(2, packet_id, store.session.epoch)
            _bytes(store)
            store.on_ack(PUBREL, packet_id)
            _bytes(store)
            tokens.append(token)
        assert len(set(tokens)) == 5 and min(tokens) > 0


def test_a_token_of_the_old_session_is_not_given_to_a_message_of_the_new_one():
    nor, store = _begin()
    _receive(store, 1)
    _bytes(store)
    store.on_publish(2, 2)
    token = store.token(2)
    store = _reopen(nor, False)
    for _ in range(20):
        store.on_publish(2, 2)
        assert store.token(2) != token
        store.handled(2, 2, store.session.epoch)
        store.on_ack(PUBREL, 2)
        _bytes(store)


def test_a_snapshot_has_a_message_received_and_its_count_together():
    # One may be programmed before the record of the message.
    nor, store = _begin()
    received = store.received
    _receive(store, 5)
    store.journal.close()
    found = _peek(nor)
    assert sorted(found.session.held) == [5] and found.received == received + 1


def test_acknowledgements_of_the_unknown_are_answered_as_the_standard_says():
    nor, store = _begin()
    ops = nor.ops
    store.on_ack(PUBREC, 77)
    store.on_ack(PUBREL, 78)
    store.on_ack(PUBACK, 79)
    store.on_ack(PUBCOMP, 80)
    assert _sent(store) == [(0x62, 77, None), (0x70, 78, None)]
    assert store.session.unknown == 4 and nor.ops == ops


def test_an_acknowledgement_that_cannot_be_is_a_protocol_error_and_costs_nothing():
    nor, store = _begin()
    _publish(store, 1, 2)
    _bytes(store)
    raises(ProtocolError, store.on_ack, PUBACK, 1)
    assert [entry[:2] for entry in _sent(_reopen(nor))] == [(0x3C, 1)]


def test_no_more_answers_than_fit_are_taken():
    nor, store = _begin()
    taken = 0
    while store.can_answer():
        store.on_ack(PUBREL, 1 + taken)
        taken += 1
    assert taken == 64 and len(_sent(store)) == 64 and store.can_answer()


# -- reconnect: rules 8 to 10


def test_the_unfinished_go_out_again_in_order_before_anything_new_and_once_a_connection():
    """[MQTT-4.4.0-1] [MQTT-4.6.0-1]"""
    for unit in _UNITS:
        for restart in (False, True):
            nor, store = _begin(unit, in_flight=6)
            for number, qos in enumerate((1, 2, 2, 1, 2)):
                store.publish("t", b"%d" % number, qos)
            _bytes(store)
            store.on_ack(PUBREC, 2)
            store.on_ack(PUBACK, 4)
            _bytes(store)
            if restart:
                store = _reopen(nor, in_flight=6)
            else:
                store.disconnected()
                store.connected(True, 7)
            store.publish("t", b"new", 1)
            expected = [(0x3A, 1, b"0"), (0x62, 2, None), (0x3C, 3, b"2"), (0x3C, 5, b"4"), (0x32, 6, b"new")]
            assert _sent(store) == expected, (unit, restart)
            assert _sent(store) == []
            assert store.resent == 4


def test_without_a_session_all_goes_out_as_new_and_what_had_its_pubrec_is_over():
    for unit in _UNITS:
        done = []
        nor, store = _begin(unit, in_flight=6)
        for number, qos in enumerate((1, 2, 2)):
            store.publish("t", b"%d" % number, qos)
        _bytes(store)
        store.on_ack(PUBREC, 2)
        _receive(store, 40)
        _bytes(store)
        store.subscribed("a/#", 1, 1)
        store = _open(nor, finished=lambda packet_id, ok: done.append((packet_id, ok)))
        assert store.granted("a/#", 1) == 1 and list(store.session.held) == [40]
        store.connected(False, 7)
        assert _sent(store) == [(0x32, 1, b"0"), (0x34, 3, b"2")], unit
        assert done == [(2, True)]
        store = _reopen(nor)  # and so it stays
        assert not store.session.held and store.granted("a/#", 1) is None
        assert _sent(store) == [(0x3A, 1, b"0"), (0x3C, 3, b"2")]
        assert store.on_publish(2, 40)


def test_a_new_journal_knows_no_session_and_an_old_one_knows_whose():
    """[MQTT-3.1.3-2]"""
    nor = Nor(32768)
    store = _open(nor)
    assert store.identity == 0
    me = identity("device", "broker", 1883)
    assert me and me != identity("device", "broker", 1884) and me != identity("devic", "ebroker", 1883)
    _publish(store, 1)
    assert _peek(nor).identity == 0 and _peek(nor).waiting() == 1
    store.begin(me)
    store = _open(nor)
    assert store.identity == me
    other = identity("other", "broker", 1883)
    store.connected(False, other)
    assert _sent(store) == [(0x32, 1, b"0")]  # the messages are kept
    assert _peek(nor).identity == other


def test_nothing_is_answered_or_half_sent_after_a_reconnection():
    nor, store = _begin()
    store.publish("t", b"x" * 500, 1)
    buf = memoryview(bytearray(100))
    assert store.fill(buf, 0) == 100 and store.rest
    store.on_ack(PUBREL, 9)
    store.disconnected()
    store.connected(True, 7)
    assert store.rest == 0
    assert [entry[:2] for entry in _sent(store)] == [(0x3A, 1)]


def test_a_handler_that_ends_after_the_session_changes_nothing_in_the_new_one():
    nor, store = _begin()
    assert store.on_publish(2, 9) and store.on_publish(1, 10)
    epoch = store.session.epoch
    store.disconnected()
    store.connected(False, 7)
    store.handled(2, 9, epoch)
    store.handled(1, 10, epoch)
    assert _sent(store) == [] and not store.session.held
    assert store.on_publish(2, 9)


def test_a_handler_that_ends_on_the_next_connection_answers_what_came_again():
    nor, store = _begin()
    assert store.on_publish(2, 9)
    store.disconnected()
    store.connected(True, 7)
    assert not store.on_publish(2, 9)
    store.handled(2, 9, store.session.epoch)
    assert _sent(store) == [(0x50, 9, None)]
    assert not store.on_publish(2, 9)


def test_subscriptions_survive_until_they_are_ended():
    """[MQTT-3.1.2-4]"""
    for unit in _UNITS:
        nor, store = _begin(unit, sectors=4)
        store.subscribed("a/+", 1, 1)
        store.subscribed("b/#", 2, 0)
        store.subscribed("c", 0, 0)
        store.unsubscribing("c")
        _laps(store, 40000)
        store = _open(nor)
        assert store.granted("a/+", 1) == 1 and store.granted("b/#", 2) == 0
        assert store.granted("a/+", 2) is None and store.granted("c", 0) is None
        store.unsubscribing("a/+")
        store = _open(nor)
        assert store.granted("a/+", 1) is None and store.granted("b/#", 2) == 0


def test_subscriptions_beyond_what_is_stored_are_made_again_and_harm_no_other():
    for unit in _UNITS:
        nor, store = _begin(unit)
        for n in range(32):
            store.subscribed("f%d" % n, 1, 1)
        store.subscribed("f32", 1, 1)  # too many
        store.unsubscribing("f0")
        store.subscribed("g" * 3800, 1, 1)  # too long
        store.subscribed("f1", 2, 2)  # known, with another QoS
        for found in (store, _open(nor)):
            assert [n for n in range(33) if found.granted("f%d" % n, 1) == 1] == list(range(2, 32))
            assert found.granted("f1", 2) == 2 and found.granted("f1", 1) is None
            assert found.granted("g" * 3800, 1) is None


def test_a_connect_without_answer_puts_the_subscriptions_in_doubt():
    for restart, laps in ((False, 0), (True, 0), (True, 40000)):
        nor, store = _begin()
        store.subscribed("a/+", 1, 1)
        for _ in range(3):  # answered: nothing is in doubt
            store.disconnected()
            store.connecting()
            store.connected(True, 7)
            assert store.granted("a/+", 1) == 1
        store.commit()
        store.disconnected()
        store.connecting()
        _laps(store, laps)
        if restart:
            store = _open(nor)
        store.disconnected()
        assert store.granted("a/+", 1) == 1
        store.connecting()
        store.connected(True, 7)
        # The session may be one that the CONNECT without answer began.
        assert store.granted("a/+", 1) is None
        assert _peek(nor).granted("a/+", 1) is None
        store.subscribed("a/+", 1, 1)
        store = _open(nor)
        store.connecting()
        store.connected(True, 7)
        assert store.granted("a/+", 1) == 1


def test_connecting_costs_nothing_without_subscriptions():
    nor, store = _begin()
    ops = nor.ops
    store.disconnected()
    store.connecting()
    store.connected(True, 7)
    store.commit()
    assert nor.ops == ops


# -- the queue: rules 11 and 12


def _drain(store):
    """Acknowledge all; return the payloads in the order they were sent in."""
    payloads = []
    while True:
        now = _sent(store)
        if not now:
            return payloads
        assert len(now) <= store.session.limit
        for first, packet_id, payload in now:
            payloads.append(payload)
            store.on_ack(PUBACK, packet_id)


def test_only_the_window_is_sent_the_rest_waits_on_flash():
    for unit in _UNITS:
        nor, store = _begin(unit, in_flight=4)
        _publish(store, 30)
        assert [entry[1] for entry in _sent(store)] == [1, 2, 3, 4]
        assert _sent(store) == [] and store.waiting() == 30 and len(store.session.out) == 4
        store.on_ack(PUBACK, 2)
        assert [entry[1] for entry in _sent(store)] == [5]


def test_the_order_survives_a_restart_in_the_middle_of_the_queue():
    for unit in _UNITS:
        for done in (0, 1, 5):
            nor, store = _begin(unit, in_flight=4)
            _publish(store, 40)
            for packet_id in range(1, done + 1):
                _sent(store)
                store.on_ack(PUBACK, packet_id)
            store.commit()
            store = _reopen(nor, in_flight=4)
            assert store.waiting() == 40 - done
            assert _drain(store) == [b"%d" % number for number in range(done, 40)], (unit, done)
            assert store.waiting() == 0 and store.lost == 0


def test_what_is_sent_after_an_orderly_restart_has_dup_after_a_cut():
    """[MQTT-3.3.1-1]"""
    for unit in _UNITS:
        for offline in (False, True):
            nor, store = _begin(unit, in_flight=1)
            if offline:
                store.disconnected()
            _publish(store, 3, 2)
            if not offline:
                assert _sent(store) == [(0x34, 1, b"0")]
            store.close()
            store = _reopen(nor, in_flight=1)
            if offline:
                assert _sent(store) == [(0x34, 1, b"0")]
            else:
                assert _sent(store) == [(0x3C, 1, b"0")]
                store.on_ack(PUBREC, 1)
                assert _sent(store) == [(0x62, 1, None)]
                store.close()
                store = _reopen(nor, in_flight=1)
                assert _sent(store) == [(0x62, 1, None)]
                store.on_ack(PUBCOMP, 1)
                assert _sent(store) == [(0x34, 2, b"1")]
            again = _sent(_reopen(nor, in_flight=3))
            assert (0x3C, 1 if offline else 2, b"0" if offline else b"1") in again, (unit, offline, again)


def test_a_smaller_window_after_a_restart_is_kept_to():
    nor, store = _begin(sectors=16, in_flight=64)
    _publish(store, 70)
    _sent(store)
    for packet_id in range(1, 41):
        store.on_ack(PUBACK, packet_id)
    store.commit()
    store = _reopen(nor, in_flight=2)
    assert [entry[1] for entry in _sent(store)] == [41, 42]
    store.on_ack(PUBACK, 41)
    assert [entry[1] for entry in _sent(store)] == [43]
    while store.waiting():
        for packet_id in store.session.order()[::-1]:
            store.on_ack(PUBACK, packet_id)
        _sent(store)
    assert store.lost == 0


def _held_objects(store):
    count = 0
    for owner in (store, store.session):
        for value in owner.__dict__.values():
            if isinstance(value, (dict, list, set, tuple)):
                count += len(value)
    return count


def test_ram_does_not_grow_with_the_backlog():
    nor, store = _begin(in_flight=4)
    _publish(store, 20)
    _sent(store)
    objects = _held_objects(store)
    gc.collect()
    used = gc.mem_alloc() if sys.implementation.name == "micropython" else 0
    for number in range(600):
        store.publish("t", b"more", 1)
    assert _held_objects(store) == objects and store.waiting() == 620
    gc.collect()
    if used:
        assert gc.mem_alloc() - used < 256  # CPython cannot tell
    again = _peek(nor, in_flight=4)
    assert again.waiting() == 620 and _held_objects(again) < 32


def test_a_full_journal_refuses_and_loses_nothing():
    for unit in _UNITS:
        for options in ({}, {"when_full": "wait"}):
            nor, store = _begin(unit, sectors=4, in_flight=4, **options)
            accepted = 0
            while True:
                newest = store.session.newest
                try:
                    _publish(store, 1, first=accepted, size=100, mark=True)
                except JournalFull:
                    break
                accepted += 1
            assert 10 < accepted < 200
            assert store.waiting() == accepted and store.mark == accepted - 1 and store.session.newest == newest
            found = _peek(nor, in_flight=4, **options)
            assert found.waiting() == accepted and found.mark == accepted - 1
            assert [int(p.split(b".")[0]) for p in _drain(store)] == list(range(accepted)), unit
            store.publish("t", b"again", 1)


def test_a_full_journal_never_locks_up():
    # Whatever is published whenever there is room, every acknowledgement can still be recorded, inbound ones too.
    for unit in _UNITS:
        for size in (0, 150, 900):
            nor, store = _begin(unit, sectors=4, in_flight=3)
            number = 0
            for turn in range(60):
                while True:
                    try:
                        _publish(store, 1, 2, number, size)
                    except JournalFull:
                        break
                    number += 1
                    if number % 40 == 0:
                        break
                _sent(store)
                for packet_id in store.session.order()[::-1]:
                    if store.session.out[packet_id] & 3 == 2:
                        store.on_ack(PUBREC, packet_id)
                        _sent(store)
                        store.on_ack(PUBCOMP, packet_id)
                _receive(store, turn % 10 + 1)
                _sent(store)
                store.on_ack(PUBREL, turn % 10 + 1)
                _sent(store)
            assert store.acknowledged > 100 and store.lost == 0, (unit, size)


def test_drop_oldest_makes_room_and_tells():
    for unit in _UNITS:
        dropped = []

        def finished(packet_id, ok, dropped=dropped):
            dropped.append((packet_id, ok))

        nor, store = _begin(unit, 4, in_flight=4, when_full="drop_oldest", finished=finished)
        _publish(store, 4, size=100)
        _sent(store)  # in flight: never dropped
        ids = _publish(store, 300, first=4, size=100, mark=True)
        assert dropped and not any(ok for _, ok in dropped)
        assert store.dropped == len(dropped) and store.waiting() == 304 - len(dropped)
        gone = [packet_id for packet_id, _ in dropped]
        assert gone == list(range(5, 5 + len(gone)))  # the oldest, in order
        assert not store.is_live(gone[0]) and store.is_live(ids[-1])
        left = [b"%d" % n + b"." * 100 for n in range(304) if n + 1 not in gone]
        again = _reopen(nor, in_flight=4)
        assert again.waiting() == len(left) and again.mark == 303  # the dropped do not come back
        dropped.clear()
        assert _drain(again) == left, unit


# -- the mark: rule 13


def test_the_mark_is_that_of_the_newest_message_accepted():
    for unit in _UNITS:
        nor, store = _begin(unit)
        assert store.mark is None and _peek(nor).mark is None
        for mark in (0, 5, -1, 2**63 - 1, -(2**63)):
            store.publish("t", b"", 1, False, mark)
            assert store.mark == mark and _peek(nor).mark == mark
        store.publish("t", b"", 1)  # without one
        assert _peek(nor).mark == mark


def test_the_mark_outlives_its_message_and_its_sector():
    for unit in _UNITS:
        nor, store = _begin(unit, sectors=4)
        packet_id = store.publish("t", b"", 1, False, 4711)
        _sent(store)
        store.on_ack(PUBACK, packet_id)
        for _ in range(3):
            _laps(store, 20000)
            assert _peek(nor).mark == 4711
        assert min(nor.erases) > 1


def test_a_publish_cut_short_is_there_with_its_mark_or_not_at_all():
    for unit in _UNITS:
        for operation in range(1, 4):
            for mode in ("none", "all", "prefix", "bits"):
                nor, store = _begin(unit)
                store.publish("t", b"a", 2, False, 1)
                nor.cut_after(operation, mode, seed=operation)
                try:
                    store.publish("t", b"b" * 300, 2, False, 2)
                except PowerCut:
                    pass
                nor.power_on()
                store = _reopen(nor)
                there = [entry[2][:1] for entry in _sent(store)]
                assert (store.mark, there) in ((1, [b"a"]), (2, [b"a", b"b"])), (unit, operation, mode)


# -- large messages, the buffer


def test_a_message_larger_than_the_buffer_comes_in_pieces_with_nothing_in_between():
    for unit in _UNITS:
        nor, store = _begin(unit, sectors=4)
        payload = bytes([i * 7 & 255 for i in range(3000)])
        for restart in (False, True):
            if restart:
                store = _reopen(nor)
            else:
                store.publish("big", payload, 1)
                store.publish("t", b"next", 1)
            buf = memoryview(bytearray(256))
            data = b""
            while True:
                n = store.fill(buf, 0)
                if not n:
                    break
                data += bytes(buf[:n])
                if len(data) == 256:
                    store.on_ack(PUBREL, 9)  # its answer has to wait
                    assert store.rest
            packets, rest = powercut.split(data)
            assert [p[0] & 0xF7 for p in packets] == [0x32, 0x70, 0x32] and not rest
            assert powercut.publish_fields(packets[0])[2] == payload


def test_a_message_in_pieces_may_be_carried_forward_meanwhile():
    nor, store = _begin(sectors=4)
    payload = bytes([i * 7 & 255 for i in range(1500)])
    store.publish("big", payload, 1)
    buf = memoryview(bytearray(64))
    n = store.fill(buf, 0)
    data = bytes(buf[:n])
    where = store.session.out[1]
    number = 0
    while store.session.out[1] == where:
        try:
            _publish(store, 1, size=300, first=number)
        except JournalFull:
            raise AssertionError("full before the sector was given up")
        number += 1
        for _ in range(8):  # facts that use up the head
            store.on_publish(2, 1)
            store.handled(2, 1, store.session.epoch)
            store.commit()
            store.on_ack(PUBREL, 1)
            store.commit()
            store.answers = 0
        if store.queued() > 3:
            break
    while store.rest:
        n = store.fill(buf, 0)
        data += bytes(buf[:n])
    packets, _ = powercut.split(data)
    assert powercut.publish_fields(packets[0])[2] == payload


def test_a_message_may_be_sent_at_once_only_when_nothing_else_is_to_be_sent_and_then_counts_as_sent():
    nor, store = _begin()
    first, second = _publish(store, 2)
    assert not store.at_once(second)  # first the first
    assert [packet[1] for packet in _sent(store)] == [first, second]
    third = _publish(store, 1, qos=2)[0]
    assert store.at_once(third) and not store.at_once(third)
    assert _sent(store) == [] and store.sent == 3
    store.on_ack(PUBREC, third)
    fourth = _publish(store, 1)[0]
    assert not store.at_once(fourth)  # the PUBREL comes before it
    assert [packet[:2] for packet in _sent(store)] == [(0x62, third), (0x32, fourth)]
    fifth = _publish(store, 1)[0]
    assert not store.at_once(fifth)  # the window is full
    store.on_ack(PUBACK, first)
    assert not store.at_once(fifth)  # it waits on flash
    assert [packet[1] for packet in _sent(store)] == [fifth]
    store.connected(True, 7)
    for packet_id in (second, third, fourth, fifth):
        assert not store.at_once(packet_id)
    assert [packet[:2] for packet in _sent(store)] == [(0x3A, second), (0x62, third), (0x3A, fourth), (0x3A, fifth)]
    for packet_id in (second, fourth, fifth):
        store.on_ack(PUBACK, packet_id)
    sixth = _publish(store, 1)[0]
    assert store.at_once(sixth)
    store.disconnected()
    assert not store.at_once(_publish(store, 1)[0])
    store = _reopen(nor)
    assert (0x3A, sixth, b"0") in _sent(store)


def test_what_is_published_while_the_connection_ends_goes_out_on_the_next_one_as_new():
    _, store = _begin()
    _publish(store, 1)
    _sent(store)
    store.ending()
    assert not store.at_once(_publish(store, 1)[0])
    store.disconnected()
    store.connected(True, 7)
    assert [packet[:2] for packet in _sent(store)] == [(0x3A, 1), (0x32, 2)]


def test_nothing_is_sent_at_once_in_the_middle_of_a_message():
    _, store = _begin()
    _publish(store, 1, size=300)
    buf = memoryview(bytearray(128))
    assert store.fill(buf, 0) == 128 and store.rest
    packet_id = _publish(store, 1)[0]
    assert not store.at_once(packet_id)
    while store.rest:
        store.fill(buf, 0)
    assert not store.at_once(packet_id)


def test_fill_leaves_what_is_in_the_buffer_before_it():
    nor, store = _begin()
    store.publish("t", b"abc", 1)
    buf = memoryview(bytearray(b"0123456789" + bytes(20)))
    end = store.fill(buf, 10)
    assert bytes(buf[:10]) == b"0123456789" and bytes(buf[10:end]) == b"\x32\x08\x00\x01t\x00\x01abc"


def test_a_packet_that_does_not_fit_behind_others_waits_for_the_next_buffer():
    nor, store = _begin()
    _publish(store, 2, size=40)
    buf = memoryview(bytearray(60))
    first = store.fill(buf, 0)
    packets, rest = powercut.split(bytes(buf[:first]))
    assert len(packets) == 1 and not rest and not store.rest
    assert len(_sent(store)) == 1


# -- damage


def _rot(nor, needle):
    """Clear a bit of the only place where needle is stored."""
    at = bytes(nor.mem).find(needle)
    assert at >= 0 and bytes(nor.mem).find(needle, at + 1) < 0
    nor.mem[at] &= nor.mem[at] - 1


def test_a_rotted_message_is_lost_alone_and_counted():
    for unit in _UNITS:
        for restart in (False, True):
            for number in (1, 2, 7, 8):  # in the window, and behind it
                nor, store = _begin(unit, in_flight=4)
                for n in range(10):
                    store.publish("t", b"payload-%d" % n, 1)
                _rot(nor, b"payload-%d" % number)
                if restart:
                    store = _reopen(nor, in_flight=4)
                    assert store.journal.damaged == 1
                left = [b"payload-%d" % n for n in range(10) if n != number]
                assert _drain(store) == left, (unit, restart, number)
                assert store.waiting() == 0 and (restart or store.lost == 1)
                store.publish("t", b"after", 1)
                assert _drain(store) == [b"after"]


def test_a_rotted_message_that_comes_first_does_not_hold_up_those_behind_it():
    nor, store = _begin()
    for n in range(2):
        store.publish("t%d" % n, b"payload-%d" % n, 1)  # with a topic of its own
    _rot(nor, b"payload-0")
    buf = memoryview(bytearray(64))
    assert bytes(buf[: store.fill(buf, 0)]).endswith(b"payload-1")  # in one call: 0 means that there is nothing


def test_a_rotted_message_in_flight_is_lost_alone_when_its_sector_is_given_up():
    nor, store = _begin(sectors=4, in_flight=4)
    for n in range(3):
        store.publish("t", b"payload-%d" % n, 1)
    _sent(store)
    _rot(nor, b"payload-1")
    _laps(store, 20000)
    store.commit()
    assert sorted(store.session.out) == [1, 3] and store.lost == 1
    assert [entry[2] for entry in _sent(_reopen(nor))] == [b"payload-0", b"payload-2"]


def test_a_message_published_when_only_a_rotted_one_is_left_in_the_queue_is_not_lost_with_it():
    nor, store = _begin(256, in_flight=1)
    number = 0
    last = (store.journal.head + 1) * 4096 - 256
    while nor.mem[last : last + 256] == b"\xff" * 256:  # each record has a page: the last one ends with its sector
        store.publish("t", b"payload-%d" % number, 1)
        number += 1
    _rot(nor, b"payload-5")
    for last in [n for n in range(number) if n != 5]:
        assert [entry[2] for entry in _sent(store)] == [b"payload-%d" % last]
        if last < number - 1:
            store.on_ack(PUBACK, last + 1)
    store.publish("t", b"after", 1)
    store.on_ack(PUBACK, number)
    assert [entry[2] for entry in _sent(store)] == [b"after"] and store.lost == 1


def test_a_rotted_message_does_no_harm_when_a_full_journal_is_packed():
    for unit in _UNITS:
        nor, store = _begin(unit, sectors=4, in_flight=2)
        number = 0
        while True:
            try:
                store.publish("t", b"payload-%d." % number + bytes(200), 1)
            except JournalFull:
                break
            number += 1
        bad = number - 3
        _rot(nor, b"payload-%d." % bad)
        seq = store.journal.seq
        for turn in range(300):  # facts alone: no message goes
            _receive(store, 1)
            store.commit()
            store.on_ack(PUBREL, 1)
            store.commit()
            store.answers = 0
        assert store.journal.seq > seq
        assert [int(p[8:].split(b".")[0]) for p in _drain(store)] == [n for n in range(number) if n != bad], unit
        assert store.lost == 1 and store.waiting() == 0


def test_a_queue_packed_anew_keeps_its_order_and_identifiers_through_restarts():
    for unit in _UNITS:
        nor = Nor(4096 * 6, unit)
        powercut.used(nor, 64900)
        store = _reopen(nor, False, in_flight=2)
        number = 0
        while True:
            try:
                _publish(store, 1, first=number, size=90)
            except JournalFull:
                break
            number += 1
        most = 3 * number
        seq = store.journal.seq
        for _ in range(300):  # facts alone: no message goes
            _receive(store, 1)
            store.commit()
            store.on_ack(PUBREL, 1)
            store.commit()
            store.answers = 0
        assert store.journal.seq > seq
        left = list(range(number))
        while left:
            found = _peek(nor, in_flight=2)
            assert found.session.newest == store.session.newest and found.waiting() == len(left), (unit, left)
            found.connected(True, 7)
            assert [int(p.split(b".")[0]) for p in _drain(found)] == left
            for _, packet_id, payload in _sent(store):
                assert int(payload.split(b".")[0]) == left.pop(0)
                store.on_ack(PUBACK, packet_id)
                if number < most:  # the ring goes on, until the packed sector is the oldest, and farther
                    try:
                        _publish(store, 1, first=number, size=90)
                    except JournalFull:
                        continue
                    left.append(number)
                    number += 1
            store.commit()
        assert store.lost == 0


def test_a_journal_of_rubbish_is_no_obstacle():
    for filler in (b"\0", b"\x5a"):
        nor = Nor(32768)
        nor.mem[:] = filler * 32768
        store = _open(nor)
        assert store.waiting() == 0 and store.identity == 0 and store.mark is None
        store.publish("t", b"a", 1)
        assert _peek(nor).waiting() == 1


def test_a_failed_device_leaves_what_is_stored_and_open_takes_it_up_again():
    nor, store = _begin()
    _publish(store, 2)
    program = nor._program

    def fails(*_):
        raise OSError(5)

    nor._program = fails
    raises(OSError, store.publish, "t", b"c", 1)
    assert store.waiting() == 2
    nor._program = program
    store.open()
    store.connected(True, 7)
    assert [entry[2] for entry in _sent(store)] == [b"0", b"1"]
    store.publish("t", b"c", 1)


# -- the ring


def test_messages_in_every_state_are_carried_forward_over_many_laps():
    """[MQTT-4.1.0-2]"""
    for unit in _UNITS:
        nor, store = _begin(unit, sectors=4, in_flight=8)
        store.publish("t", b"one", 1)
        store.publish("t", b"two", 2)
        store.publish("t", b"rel", 2)
        store.subscribed("a/#", 2, 2)
        _receive(store, 3)
        _sent(store)
        store.on_ack(PUBREC, 3)
        for lap in range(3):
            _laps(store, 20000)
            store.commit()  # or up to 16 of these come again
            found = _reopen(nor, in_flight=8)
            assert sorted((p, w & 3) for p, w in found.session.out.items() if p <= 3) == [(1, 1), (2, 2), (3, 3)]
            assert list(found.session.held) == [3] and found.granted("a/#", 2) == 2 and found.identity == 7
            assert [e for e in _sent(found) if e[1] <= 3] == [(0x3A, 1, b"one"), (0x3C, 2, b"two"), (0x62, 3, None)]
            store = _reopen(nor, in_flight=8)
        assert store.lost == 0


def test_many_held_messages_are_carried_forward():
    nor, store = _begin(sectors=4)
    for packet_id in range(1, 121):
        _receive(store, packet_id)
        _bytes(store)
    _laps(store, 20000)
    store = _open(nor)
    assert sorted(store.session.held) == list(range(1, 121))


def test_a_record_carried_forward_does_not_end_a_younger_message_with_an_identifier_used_again():
    nor, store = _begin(sectors=4, in_flight=8)

    def until(newest):
        while 0 < (newest - store.session.newest) % 65023 < 64000:
            step = min(1000, (newest - store.session.newest) % 65023)
            after = (store.session.newest + step - 2) % 65023 + 1
            store.session.newest = store._taken = after
            if not store.session.out:
                store._upto = after
            packet_id = store.publish("t", b"", 1)
            _sent(store)
            store.on_ack(PUBACK, packet_id)

    until(4)
    store.commit()
    assert store.publish("t", b"old", 1) == 5
    _sent(store)
    until(60000)
    store.commit()
    store.on_ack(PUBACK, 5)
    stuck = store.publish("t", b"stuck", 1)  # its record says, too, that 5 is done
    _sent(store)
    _laps(store, 4096)
    until(4)
    assert store.publish("t", b"young", 1) == 5  # in a later sector than the one that says that 5 is done
    for _ in range(60):
        _laps(store, 400)
        store.commit()
        out = _peek(nor, in_flight=8).session.out
        assert sorted(out) == [5, stuck]


def test_finished_is_told_once_for_each_message():
    done = []
    nor, store = _begin(in_flight=8, finished=lambda packet_id, ok: done.append((packet_id, ok)))
    _publish(store, 2, 1)
    _publish(store, 2, 2)
    _bytes(store)
    for packet_id in (1, 2):
        store.on_ack(PUBACK, packet_id)
        store.on_ack(PUBACK, packet_id)
    for packet_id in (3, 4):
        for packet in (PUBREC, PUBREC, PUBCOMP, PUBCOMP):
            store.on_ack(packet, packet_id)
    assert done == [(1, True), (2, True), (3, True), (4, True)]
    assert store.acknowledged == 4 and store.session.unknown == 4


def test_what_is_live_can_be_asked():
    nor, store = _begin(in_flight=1)
    first, second, third = _publish(store, 3)
    _sent(store)
    assert store.is_live(first) and store.is_live(third) and not store.is_live(third + 1)
    store.on_ack(PUBACK, first)
    assert not store.is_live(first) and store.is_live(second)


def test_a_new_journal_in_place_of_a_lost_one_does_not_send_with_the_old_topics():
    nor, store = _begin()
    store.publish("old", b"1", 1)
    assert b"old" in _bytes(store)
    # As the client does when its home is lost: the same places and ages come again.
    store.journal = Journal(Nor(nor.size), 4, None, lambda n: b"\x5b" * n)
    store.open()
    store.connected(False, 7)
    store.publish("new", b"2", 1)
    packets, rest = powercut.split(_bytes(store))
    assert packets == [b"\x32\x08\x00\x03new\x00\x01" + b"2"] and not rest


# -- messages in their grace


def _graced(nor, in_flight=16, **options):
    """A store as after a restart, which keeps QoS 1 messages in RAM until settle()."""
    return _open(nor, in_flight, grace=True, **options)


def _begin_graced(unit=4, sectors=8, in_flight=16, **options):
    return _begin(unit, sectors, in_flight=in_flight, grace=True, **options)


def _next_sector(store):
    """Let records of facts alone move the head on."""
    seq = store.journal.seq
    while store.journal.seq == seq:
        _receive(store, 1)
        store.commit()
        store.on_ack(PUBREL, 1)
        store.commit()
        store.answers = 0


def test_a_message_acknowledged_in_its_grace_costs_no_program_and_no_erase():
    for unit in _UNITS:
        done = []
        nor, store = _begin_graced(unit, finished=lambda packet_id, ok: done.append((packet_id, ok)))
        programs = nor.programs
        erases = sum(nor.erases)
        for turn in range(30):
            ids = _publish(store, 16)
            assert store.unsettled() == store.waiting() == 16 and store.is_live(ids[0])
            assert [entry[1] for entry in _sent(store)] == ids
            for packet_id in ids if turn & 1 else reversed(ids):
                store.on_ack(PUBACK, packet_id)
        store.settle()
        store.commit()
        assert nor.programs == programs and sum(nor.erases) == erases
        assert store.spared == store.acknowledged == 480 and store.stored == store.waiting() == store.unsettled() == 0
        assert len(done) == 480 and all(ok for _, ok in done)
        assert _peek(nor).waiting() == 0


def test_settle_records_what_is_left_in_order_and_a_restart_has_it():
    for unit in _UNITS:
        nor, store = _begin_graced(unit)
        ids = _publish(store, 8)
        _sent(store)
        for n in (0, 3, 4, 7):
            store.on_ack(PUBACK, ids[n])
        assert store.unsettled() == 4 and _peek(nor).waiting() == 0
        store.settle()
        assert (store.unsettled(), store.stored, store.spared) == (0, 4, 4)
        assert _sent(_reopen(nor)) == [(0x3A, ids[n], b"%d" % n) for n in (1, 2, 5, 6)], unit
        programs = nor.programs
        store.settle()
        assert nor.programs == programs


def test_an_orderly_end_records_the_unsettled():
    nor, store = _begin_graced()
    _publish(store, 3)
    store.close()
    assert [entry[2] for entry in _sent(_reopen(nor))] == [b"0", b"1", b"2"]


def test_a_restart_loses_the_unsettled_and_nothing_else():
    for unit in _UNITS:
        nor, store = _begin_graced(unit)
        stored = store.publish("t", b"stored", 2)
        first = _publish(store, 4)
        _sent(store)
        store.on_ack(PUBACK, first[1])
        store.settle()
        lost = _publish(store, 4)
        _sent(store)
        store.on_ack(PUBACK, lost[2])
        store.on_ack(PUBACK, first[3])
        store.commit()
        store = _graced(nor)
        assert store.session.order()[::-1] == [stored, first[0], first[2]], unit
        store.connected(True, 7)
        new = store.publish("t", b"new", 2)
        assert [entry[1:] for entry in _sent(store)] == [
            (stored, b"stored"),
            (first[0], b"0"),
            (first[2], b"2"),
            (new, b"new"),
        ]
        assert _peek(nor).session.order()[0] == new and store.lost == 0


def test_qos_2_and_marks_are_recorded_at_once_behind_the_unsettled_before_them():
    for unit in _UNITS:
        for qos, mark in ((2, None), (1, 5), (2, 5)):
            nor, store = _begin_graced(unit)
            _publish(store, 3)
            assert store.unsettled() == 3 and store.mark is None
            store.publish("t", b"3", qos, False, mark)
            assert store.unsettled() == 0
            found = _reopen(nor)
            assert found.mark == mark and [entry[2] for entry in _sent(found)] == [b"0", b"1", b"2", b"3"]


def test_what_does_not_go_out_at_once_is_recorded_at_once_behind_the_unsettled():
    for unit in _UNITS:
        nor, store = _begin_graced(unit, in_flight=4)
        _publish(store, 4)
        assert store.unsettled() == 4
        _publish(store, 6, first=4)
        assert store.unsettled() == 0 and _peek(nor).waiting() == 10
        store.on_ack(PUBACK, 1)
        _publish(store, 1, first=10)  # room in the window, but others come first
        assert store.unsettled() == 0
        store.disconnected()
        _publish(store, 1, first=11)
        assert store.unsettled() == 0
        assert _drain(_reopen(nor, in_flight=4)) == [b"%d" % n for n in range(1, 12)], unit


def test_no_more_than_2_kib_wait_in_ram():
    nor, store = _begin_graced()
    store.publish("t", bytes(1000), 1)
    store.publish("t", bytes(1000), 1)
    assert store.unsettled() == 2
    store.publish("t", bytes(1000), 1)
    assert store.unsettled() == 0 and store.stored == 3
    store.publish("t", bytes(3000), 1)
    assert store.unsettled() == 0 and store.stored == 4
    payload = bytearray(b"abc")
    store.publish("t", payload, 1)
    payload[:] = b"xyz"  # the caller's own again
    assert store.unsettled() == 1 and _sent(store)[-1][2] == b"abc"


def test_the_unsettled_go_out_again_on_the_next_connection():
    for present in (True, False):
        nor, store = _begin_graced()
        ids = _publish(store, 3)
        store.publish("t", b"three", 1, True)
        _sent(store)
        store.on_ack(PUBACK, ids[1])
        store.disconnected()
        store.connected(present, 7)
        new = store.publish("t", b"new", 1)
        dup = 8 if present else 0
        assert _sent(store) == [
            (0x32 | dup, ids[0], b"0"),
            (0x32 | dup, ids[2], b"2"),
            (0x33 | dup, ids[2] + 1, b"three"),
            (0x32, new, b"new"),
        ]
        assert store.unsettled() == 4 and store.resent == 3
        for packet_id in (ids[0], ids[2], ids[2] + 1, new):
            store.on_ack(PUBACK, packet_id)
        assert store.waiting() == 0 and store.stored == 0


def test_a_message_settled_in_the_middle_of_being_sent_is_sent_whole():
    nor, store = _begin_graced()
    payload = bytes([i * 7 & 255 for i in range(1500)])
    store.publish("big", payload, 1)
    buf = memoryview(bytearray(200))
    data = b""
    while True:
        n = store.fill(buf, 0)
        if not n:
            break
        data += bytes(buf[:n])
        if len(data) == 600:
            store.settle()
    packets, rest = powercut.split(data)
    assert len(packets) == 1 and not rest and powercut.publish_fields(packets[0])[2] == payload


def test_what_was_settled_after_a_snapshot_that_knew_of_it_does_not_come_back_when_it_is_finished():
    for unit in _UNITS:
        nor, store = _begin_graced(unit)
        ids = _publish(store, 4)
        _sent(store)
        _next_sector(store)
        assert _peek(nor).waiting() == 0
        store.settle()
        assert _peek(nor).session.order()[::-1] == ids
        store.on_ack(PUBACK, ids[1])
        store.commit()
        assert _peek(nor).session.order()[::-1] == [ids[0], ids[2], ids[3]]
        for packet_id in (ids[0], ids[2], ids[3]):
            store.on_ack(PUBACK, packet_id)
        store.commit()
        assert _peek(nor).waiting() == 0, unit
        store.publish("t", b"", 2)
        assert _peek(nor).waiting() == 1


def test_a_sector_that_begins_while_the_unsettled_are_recorded_loses_and_doubles_none():
    for unit in _UNITS:
        for left in range(0, 400, unit if unit > 4 else 12):
            nor, store = _begin_graced(unit)
            while store.journal._off < 4096 - left - unit:
                if store.on_publish(2, 1):
                    store.handled(2, 1, store.session.epoch)
                store.commit()
                store.on_ack(PUBREL, 1)
                store.commit()
                store.answers = 0
                if store.journal.seq > 1:
                    break
            for n in range(6):
                store.publish("topic/%d" % (n % 3), b"%d" % n, 1)
            _sent(store)
            store.settle()
            store.publish("topic/0", b"6", 2)
            found = _peek(nor, in_flight=8)
            found.connected(True, 7)
            packets, _ = powercut.split(_bytes(found))
            expected = [("topic/%d" % (n % 3), b"%d" % n) for n in range(7)]
            assert [powercut.publish_fields(packet)[1:] for packet in packets] == expected, (unit, left)
            for packet_id in range(1, 7):
                store.on_ack(PUBACK, packet_id)
            store.commit()
            assert _peek(nor).waiting() == 1, (unit, left)


def test_a_message_stored_at_once_keeps_its_topic_when_the_unsettled_before_it_fill_a_sector():
    for unit in _UNITS:
        for size in range(100, 400, 12):
            nor, store = _begin_graced(unit)
            first = store.journal.seq
            number = 0
            while store.journal.seq == first:
                for n in range(3):
                    store.publish("other/%d/%d" % (number, n), b"." * size, 1)
                store.publish("kept", b"%d" % number, 2)
                number += 1
                packets, _ = powercut.split(_bytes(store))
                assert powercut.publish_fields(packets[-1])[1] == "kept", (unit, size)
                for packet in packets:
                    packet_id = powercut.publish_fields(packet)[0]
                    if packet[0] >> 1 & 3 == 1:
                        store.on_ack(PUBACK, packet_id)
                    else:
                        store.on_ack(PUBREC, packet_id)
                        _bytes(store)
                        store.on_ack(PUBCOMP, packet_id)
            assert store.lost == 0


def test_however_many_were_spared_the_next_record_is_known_as_the_newest():
    for behind in (0, 1):  # how many are always unsettled
        for spared in (1000, 1100, 3000, 65533):
            nor, store = _begin_graced(sectors=4)
            ids = []
            for _ in range(spared):
                ids.append(store.publish(b"t", b"", 1))
                _sent(store)
                if len(ids) > behind:
                    store.on_ack(PUBACK, ids.pop(0))
            assert store.stored <= spared // 480 + 1
            packet_id = store.publish(b"t", b"a", 2, False, 41)
            found = _peek(nor)
            assert found.mark == 41 and found.session.newest == packet_id == found.session.order()[0], (behind, spared)


def test_carried_messages_and_unsettled_ones_keep_their_order():
    for unit in _UNITS:
        nor, store = _begin_graced(unit, sectors=4)
        kept = [store.publish("kept", b"a", 1), store.publish("kept", b"b", 2)]
        _sent(store)
        for lap in range(6):
            held = _publish(store, 3)
            _sent(store)
            _next_sector(store)
            assert store.unsettled() == (0 if lap == 6 else 3)
            for packet_id in held if lap & 1 else held[1:]:
                store.on_ack(PUBACK, packet_id)
            if not lap & 1:
                kept.append(held[0])
            store.settle()
            store.commit()
            assert _peek(nor).session.order()[::-1] == kept, (unit, lap)
        assert store.lost == 0


def test_a_failed_flash_mounted_anew_has_the_unsettled_still():
    for begun in (False, True):  # a snapshot knows of them
        nor, store = _begin_graced()
        stored = store.publish("t", b"stored", 2)
        ids = _publish(store, 3)
        _sent(store)
        if begun:
            _next_sector(store)
        whole = nor.writeblocks
        fails = [1]  # the first of them is on the flash then

        def write(*args, fails=fails, whole=whole):
            fails[0] -= 1
            if fails[0] < 0:
                raise OSError(5)
            return whole(*args)

        nor.writeblocks = write
        raises(OSError, store.settle)
        raises(JournalUnavailable, store.publish, "t", b"x", 1)  # not into RAM, which nobody records
        raises(OSError, _failing_open, store, nor)
        nor.writeblocks = whole
        store.disconnected()
        store.open()
        assert store.session.order()[::-1] == [stored] + ids and store.unsettled() == 2
        store.connected(True, 7)
        assert [entry[1] for entry in _sent(store)] == [stored] + ids
        new = store.publish("t", b"new", 2)
        assert new == ids[-1] + 1 and _peek(nor).session.order()[::-1] == [stored] + ids + [new]
        for packet_id in ids:
            store.on_ack(PUBACK, packet_id)
        store.commit()
        assert _peek(nor).session.order() == [new, stored]


def _failing_open(store, nor):
    def read(*_):
        raise OSError(5)

    whole = nor.readblocks
    nor.readblocks = read
    try:
        store.open()
    finally:
        nor.readblocks = whole


class _Grace:
    """A run under cuts.  .live: number -> packet identifier, of what was accepted and not acknowledged; .safe: numbers
    of these that a restart must find."""

    def __init__(self, seed):
        self.seed = seed
        self.rng = Rng(seed)
        self.unit = _UNITS[self.rng.below(3)]
        self.nor = Nor(4096 * (6 if self.unit == 256 else 4), self.unit)
        self.window = (2, 8, 16)[self.rng.below(3)]
        self.live = []
        self.safe = []
        self.done = []
        self.released = {}
        self.ids = {}
        self.number = 0
        self.mark = None
        self.trying_mark = None
        self.cuts = self.lost = self.spared = 0
        self.boot()

    def boot(self):
        self.store = _graced(self.nor, self.window)
        if not self.store.identity:
            self.store.begin(7)
        self.check()
        self.store.connected(True, 7)

    def check(self):
        copy = Nor(self.nor.size, self.unit)
        copy.mem[:] = self.nor.mem
        store = _reopen(copy, in_flight=self.window)
        assert store.mark == self.mark or store.mark == self.trying_mark, (self.seed, store.mark, self.mark)
        self.mark = store.mark
        found = []
        ids = {}
        while True:
            packets, rest = powercut.split(_bytes(store))
            assert not rest
            if not packets:
                break
            for packet in packets:
                if packet[0] >> 4 == 6:
                    packet_id = powercut.id_of(packet)
                    number = self.released[packet_id]
                    store.on_ack(PUBCOMP, packet_id)
                else:
                    packet_id, topic, payload = powercut.publish_fields(packet)
                    number = int(payload)
                    assert topic == _topic_of(number), (self.seed, number, topic)
                    if packet[0] >> 1 & 3 == 1:
                        store.on_ack(PUBACK, packet_id)
                    else:
                        store.on_ack(PUBREC, packet_id)
                        self.released[packet_id] = number
                if number not in found:
                    found.append(number)
                    ids[number] = packet_id
        fresh = [n for n in found if n in self.live]
        assert fresh == sorted(fresh), (self.seed, found)
        missing = [n for n in self.safe if n not in found]
        assert not missing, (self.seed, self.cuts, missing)
        back = [n for n in found if n not in self.live and n not in self.done[-17:]]
        assert not back, (self.seed, self.cuts, back)
        assert store.lost == 0 and store.waiting() == 0
        self.lost += len([n for n in self.live if n not in found])
        self.live = sorted(found)
        self.safe = self.live[:]
        self.ids = ids

    def step(self):
        rng = self.rng
        store = self.store
        what = rng.below(20)
        if what < 9:
            for _ in range(1 + rng.below(6)):
                number = self.number = self.number + 1
                qos = 2 if rng.below(8) == 0 else 1
                mark = number if rng.below(8) == 0 else None
                payload = b"%d" % number
                payload = b" " * rng.below(120) + payload
                self.live.append(number)
                self.trying_mark = self.mark if mark is None else mark
                try:
                    self.ids[number] = store.publish(_topic_of(number), payload, qos, False, mark)
                except JournalFull:
                    self.live.remove(number)
                    break
                self.mark = self.trying_mark
                if not store.unsettled():
                    self.safe = self.live[:]
        elif what < 15:
            _bytes(store)
            for number in self.live[: rng.below(12)]:
                packet_id = self.ids[number]
                if packet_id not in store.session.out:
                    break
                if rng.below(4) == 0:
                    continue
                state = store.session.out[packet_id] & 3
                if state == 2:
                    self.released[packet_id] = number
                    store.on_ack(PUBREC, packet_id)
                    continue
                spared = store.spared
                safe = number in self.safe
                self.live.remove(number)
                if safe:
                    self.safe.remove(number)
                    self.done.append(number)
                store.on_ack(PUBACK if state == 1 else PUBCOMP, packet_id)
                assert (store.spared == spared) == safe, (self.seed, number)
                self.spared += store.spared - spared
        elif what < 17:
            store.settle()
            self.safe = self.live[:]
        elif what < 18:
            _receive(store, 1)
            store.on_ack(PUBREL, 1)
            store.commit()
            store.journal.idle()
        elif what < 19:
            store.close()
            self.safe = self.live[:]
        else:
            store.disconnected()
            store.connected(True, 7)

    def steps(self, n):
        rng = self.rng
        for _ in range(n):
            if rng.below(8) == 0:
                program = MODES_PROGRAM[rng.below(len(MODES_PROGRAM))]
                self.nor.cut_after(1 + rng.below(12), program, MODES_ERASE[rng.below(len(MODES_ERASE))], rng.next())
            try:
                self.step()
            except PowerCut:
                self.cuts += 1
                self.nor.power_on()
                self.boot()
            self.nor.power_on()


def _topic_of(number):
    return "some/topic/%d" % (number * 7 % 5)


def test_under_cuts_nothing_that_was_settled_or_stored_at_once_is_lost():
    totals = [0, 0, 0, 0]
    for seed in range(20 if sys.implementation.name != "micropython" else 5):
        run = _Grace(seed)
        run.steps(200)
        for i, n in enumerate((run.number, run.cuts, run.lost, run.spared)):
            totals[i] += n
    assert min(totals) > 0, totals


def test_in_a_clean_session_a_qos_2_message_goes_out_again_until_its_pubcomp():
    nor, store = _begin()
    store.connected(False, 7, True)
    _publish(store, 2, qos=2)
    _bytes(store)
    for packet_id in (1, 2):
        store.on_ack(PUBREC, packet_id)
    assert [kind for kind, _, _ in _sent(store)] == [0x62, 0x62]
    store.on_ack(PUBCOMP, 1)
    store.commit()
    for again in (store, _peek(nor)):  # the link is lost; power, too
        again.connected(False, 7, True)
        assert _sent(again) == [(0x34, 2, b"1")]
        again.on_ack(PUBREC, 2)
        again.on_ack(PUBCOMP, 2)
        assert not again.waiting() and _sent(again) == [(0x62, 2, None)]


def test_a_subscription_however_long_never_makes_a_journal_full_in_which_nothing_waits():
    for unit in _UNITS:
        for filter_size in (200, 900, 2000):
            nor, store = _begin(unit, sectors=16)
            store.subscribed("f" * filter_size, 1, 1)
            for _ in range(60):
                packet_id = store.publish("t", b"x" * 3200, 1)
                _bytes(store)
                store.on_ack(PUBACK, packet_id)
            assert store.granted("f" * filter_size, 1) == 1
