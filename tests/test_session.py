"""The session's rules, and every transition of its table, legal and illegal."""

from mqtt_durable.errors import JournalFull, ProtocolError
from mqtt_durable.packet import PUBACK, PUBCOMP, PUBLISH, PUBREC, PUBREL
from mqtt_durable.session import TRANSITIONS, Session
from raises import raises

PUB1, PUB2, REL, HELD = 1, 2, 3, 4
DONE, RELEASED, RECEIVED, INDONE = 1, 2, 3, 4
_WHERE = 77 << 2


def _session(state=0, packet_id=5):
    session = Session(4)
    if state == HELD:
        session.held.add(packet_id)
    elif state:
        session.out[packet_id] = _WHERE | state
    return session


def _state(session, packet_id=5):
    return HELD if packet_id in session.held else session.out.get(packet_id, 0) & 3


# state, packet that came, next state, record, answer
_OUTBOUND = (
    (PUB1, PUBACK, 0, DONE, 0),
    (PUB2, PUBREC, REL, RELEASED, PUBREL),
    (REL, PUBREC, REL, 0, PUBREL),
    (REL, PUBCOMP, 0, DONE, 0),
    (PUB1, PUBCOMP, PUB1, 0, 0),
    (PUB2, PUBCOMP, PUB2, 0, 0),
    (0, PUBREC, 0, 0, PUBREL),
    (0, PUBACK, 0, 0, 0),
    (0, PUBCOMP, 0, 0, 0),
)
_INBOUND = ((HELD, PUBREL, 0, INDONE, PUBCOMP), (0, PUBREL, 0, 0, PUBCOMP))


def test_every_legal_transition_has_its_record_and_its_answer():
    """[MQTT-2.3.1-6] [MQTT-4.3.2-1] [MQTT-4.3.3-1]"""
    for state, packet, after, record, answer in _OUTBOUND + _INBOUND:
        session = _session(state)
        assert session.acknowledged(packet, 5) == record << 4 | answer, (state, packet)
        assert _state(session) == after, (state, packet)
        if after in (PUB1, PUB2, REL):
            assert session.out[5] >> 2 == 77  # its place is kept


def test_in_a_clean_session_a_qos_2_message_stays_until_its_pubcomp():
    for state, packet, after, record, answer in (
        (PUB2, PUBREC, PUB2, 0, PUBREL),
        (PUB2, PUBCOMP, PUB2, 0, 0),
        (PUB1, PUBACK, 0, DONE, 0),
        (PUB1, PUBCOMP, PUB1, 0, 0),
        (0, PUBREC, 0, 0, PUBREL),
        (0, PUBCOMP, 0, 0, 0),
    ):
        session = _session(state)
        session.clean = True
        assert session.acknowledged(packet, 5) == record << 4 | answer, (state, packet)
        assert _state(session) == after, (state, packet)


def test_in_a_clean_session_only_the_pubcomp_that_follows_a_pubrec_on_the_same_connection_ends_a_message():
    session = _session(PUB2)
    session.clean = True
    session.acknowledged(PUBREC, 5)
    session.disconnected()
    session.acknowledged(PUBCOMP, 5)
    assert _state(session) == PUB2
    session.acknowledged(PUBREC, 5)
    assert session.acknowledged(PUBCOMP, 5) == DONE << 4 and _state(session) == 0


def test_every_illegal_transition_is_a_protocol_error_and_changes_nothing():
    legal = [row[:2] for row in _OUTBOUND]
    for state in (0, PUB1, PUB2, REL):
        for packet in (PUBACK, PUBREC, PUBCOMP):
            if (state, packet) in legal:
                continue
            session = _session(state)
            raises(ProtocolError, session.acknowledged, packet, 5)
            assert _state(session) == state


def test_the_table_holds_these_transitions_and_no_more():
    rows = _OUTBOUND + _INBOUND + ((HELD, PUBLISH, HELD, 0, PUBREC),)
    assert len(TRANSITIONS) == len(rows)
    for state, packet, after, record, answer in rows:
        assert TRANSITIONS[state << 4 | packet] == after << 8 | record << 4 | answer, (state, packet)


def test_acknowledgements_of_nothing_are_counted():
    session = _session()
    for packet in (PUBACK, PUBCOMP, PUBREC, PUBREL):
        session.acknowledged(packet, 9)
    assert session.unknown == 4 and not session.out and not session.held
    session = _session(PUB2)
    session.acknowledged(PUBREC, 5)
    session.acknowledged(PUBCOMP, 5)
    assert session.unknown == 0


def test_the_two_directions_are_separate_spaces():
    session = _session(PUB2)
    session.held.add(5)
    assert session.acknowledged(PUBREL, 5) == INDONE << 4 | PUBCOMP
    assert _state(session) == PUB2
    assert session.incoming(2, 5) == 0
    assert session.acknowledged(PUBREC, 5) == RELEASED << 4 | PUBREL


def test_identifiers_of_messages_run_from_1_to_65023_one_after_the_other_and_wrap():
    """[MQTT-2.3.1-1]"""
    session = Session(4)
    assert session.new_id() == 1
    session.newest = 65022
    assert session.new_id() == 65023
    session.newest = 65023
    assert session.new_id() == 1


def test_requests_have_identifiers_of_their_own():
    """[MQTT-2.3.1-1]"""
    session = Session(4)
    given = [session.request_id() for _ in range(513)]
    assert given == list(range(65024, 65536)) + [0]  # SUBSCRIBE draws from the same space as PUBLISH
    session.requests.discard(65100)
    assert session.request_id() == 65100


def test_a_message_never_acknowledged_stops_the_identifiers_before_they_are_ambiguous():
    session = Session(4)
    session.out[600] = _WHERE | PUB1
    given = 0
    session.newest = 600
    while given < 70000:
        try:
            session.newest = session.new_id()
        except JournalFull:
            break
        given += 1
    assert 63000 < given < 65535
    del session.out[600]
    assert session.new_id() == session.newest + 1


def test_order_is_that_of_the_publishes_across_the_wrap():
    """[MQTT-4.6.0-1]"""
    session = Session(8)
    for packet_id in (65022, 65023, 1, 2):
        session.out[packet_id] = _WHERE | PUB1
        session.newest = packet_id
    assert session.order() == [2, 1, 65023, 65022]


def test_a_qos_2_message_is_delivered_once_until_its_pubrel():
    """[MQTT-4.3.3-2]"""
    session = Session(4)
    assert session.incoming(2, 7) == 0
    assert session.incoming(2, 7) == -1  # the handler has it: no answer yet
    assert session.handled(2, 7, session.epoch) == RECEIVED << 4 | PUBREC
    assert session.incoming(2, 7) == PUBREC
    assert session.incoming(2, 7) == PUBREC
    assert session.acknowledged(PUBREL, 7) == INDONE << 4 | PUBCOMP
    assert session.acknowledged(PUBREL, 7) == PUBCOMP
    assert session.incoming(2, 7) == 0  # a new message


def test_a_qos_1_message_is_acknowledged_when_its_handler_has_returned():
    """[MQTT-4.3.2-2]"""
    session = Session(4)
    assert session.incoming(1, 7) == 0
    assert session.incoming(1, 7) == -1
    assert session.handled(1, 7, session.epoch) == PUBACK
    assert session.incoming(1, 7) == 0  # at least once


def test_no_answer_goes_out_on_a_new_connection_before_the_broker_has_sent_the_message_there():
    session = Session(4)
    for packet_id, qos in ((1, 1), (2, 2), (3, 1), (4, 2)):
        session.incoming(qos, packet_id)
    session.disconnected()
    assert session.handled(1, 1, session.epoch) == 0
    assert session.handled(2, 2, session.epoch) == RECEIVED << 4
    assert session.incoming(2, 2) == PUBREC  # the handler does not see it again
    assert session.incoming(1, 3) == -1 and session.incoming(2, 4) == -1
    assert session.handled(1, 3, session.epoch) == PUBACK
    assert session.handled(2, 4, session.epoch) == RECEIVED << 4 | PUBREC


def test_a_broker_may_have_256_unfinished_messages_with_us():
    session = Session(4)
    for packet_id in range(1, 257):
        assert session.incoming(2, packet_id) == 0
        if packet_id & 1:
            session.handled(2, packet_id, session.epoch)
    raises(ProtocolError, session.incoming, 2, 300)
    assert session.incoming(2, 1) == PUBREC and session.incoming(2, 2) == -1  # known ones still pass


def test_a_new_session_keeps_what_is_not_yet_the_brokers():
    session = Session(4)
    session.out[1] = _WHERE | PUB1
    session.out[2] = _WHERE | PUB2
    session.out[3] = _WHERE | REL
    session.held.add(4)
    session.incoming(2, 6)
    epoch = session.epoch
    session.renew()
    assert sorted(session.out) == [1, 2] and not session.held
    assert session.handled(2, 6, epoch) == 0 and not session.held  # it belonged to the old session
    assert session.incoming(2, 6) == 0


def test_clear_is_a_device_that_has_never_been_used():
    session = _session(PUB1)
    session.newest = 9
    session.incoming(2, 3)
    session.request_id()
    session.clear()
    assert not session.out and not session.held and not session.busy and not session.requests
    assert session.new_id() == 1
