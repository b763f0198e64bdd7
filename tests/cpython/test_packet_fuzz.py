"""The codec against any bytes in any pieces, and against paho's encoder."""

import struct

import paho.mqtt.client as paho
from hypothesis import given, settings
from hypothesis import strategies as st

import mqtt_durable.packet as packet
from mqtt_durable.errors import ProtocolError
from mqtt_durable.packet import CONNACK, PUBLISH, PUBREL, SUBACK, Decoder

_SERVER = (2, 3, 4, 5, 6, 7, 9, 11, 13)
topics = st.text(st.characters(exclude_characters="\0+#", exclude_categories=("Cs",)), min_size=1, max_size=40)
ids = st.integers(1, 65535)


def feed(decoder, pieces):
    """Yield a tuple for each packet, from bytes in pieces."""
    for data in pieces:
        while data:
            space = decoder.space()
            assert len(space) > 0
            n = min(len(space), len(data))
            space[:n] = data[:n]
            data = data[n:]
            decoder.fed(n)
            while kind := decoder.next():
                assert kind in _SERVER
                payload = bytes(decoder.payload) if decoder.payload is not None else None
                if kind == PUBLISH:
                    yield kind, decoder.flags, decoder.packet_id, decoder.topic, payload
                elif kind == CONNACK:
                    yield kind, decoder.session_present, decoder.return_code
                elif kind == SUBACK:
                    yield kind, decoder.packet_id, payload
                else:
                    yield kind, decoder.packet_id


def outcome(data, cuts, size, limit):
    """([packets], ended by a ProtocolError) of data cut at the places given."""
    places = sorted({0, len(data), *[cut % (len(data) + 1) for cut in cuts]})
    pieces = [data[a:b] for a, b in zip(places, places[1:])]
    found = []
    try:
        for fields in feed(Decoder(size, limit), pieces):
            found.append(fields)
    except ProtocolError:
        return found, True
    return found, False


def field(data):
    return struct.pack(">H", len(data)) + data


def remaining_length(n):
    out = b""
    while True:
        out += bytes((n & 127 | (128 if n > 127 else 0),))
        n >>= 7
        if not n:
            return out


@st.composite
def publishes(draw):
    """(bytes, what the decoder must tell of them)."""
    qos = draw(st.integers(0, 2))
    flags = qos << 1 | draw(st.integers(0, 1)) | (draw(st.sampled_from((0, 8))) if qos else 0)
    topic = draw(topics)
    payload = draw(st.binary(max_size=300))
    packet_id = draw(ids) if qos else 0
    body = field(topic.encode()) + (struct.pack(">H", packet_id) if qos else b"") + payload
    return bytes((0x30 | flags,)) + remaining_length(len(body)) + body, (PUBLISH, flags, packet_id, topic, payload)


@st.composite
def acknowledgements(draw):
    kind = draw(st.sampled_from((4, 5, 6, 7, 11)))
    packet_id = draw(ids)
    return bytes((kind << 4 | (2 if kind == PUBREL else 0), 2)) + struct.pack(">H", packet_id), (kind, packet_id)


@st.composite
def subacks(draw):
    packet_id = draw(ids)
    codes = bytes(draw(st.lists(st.sampled_from((0, 1, 2, 128)), min_size=1, max_size=200)))
    body = struct.pack(">H", packet_id) + codes
    return b"\x90" + remaining_length(len(body)) + body, (SUBACK, packet_id, codes)


streams = st.lists(st.one_of(publishes(), acknowledgements(), subacks()), max_size=8)
splits = st.lists(st.integers(0, 5000), max_size=12)


@settings(max_examples=400)
@given(st.binary(max_size=200), splits, st.sampled_from((8, 16, 64)), st.sampled_from((16, 64, 4096)))
def test_any_bytes_in_any_pieces_are_packets_or_need_more_or_a_protocol_error(data, cuts, size, limit):
    assert outcome(data, cuts, size, limit) == outcome(data, (), size, limit)


@settings(max_examples=400)
@given(streams, st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 255)), max_size=3), splits)
def test_damaged_streams_are_told_alike_however_they_are_cut(stream, damage, cuts):
    data = bytearray(b"".join(part for part, _ in stream))
    for at, value in damage:
        if data:
            data[at % len(data)] = value
    assert outcome(bytes(data), cuts, 16, 400) == outcome(bytes(data), (), 16, 400)


@settings(max_examples=300)
@given(streams, splits, st.sampled_from((8, 16, 64, 512)))
def test_every_packet_comes_out_as_it_went_in(stream, cuts, size):
    data = b"".join(part for part, _ in stream)
    assert outcome(data, cuts, size, 4096) == ([fields for _, fields in stream], False)


@settings(max_examples=200)
@given(publishes(), acknowledgements(), st.integers(8, 64), splits)
def test_a_message_over_the_limit_costs_no_packet_behind_it(publish, acknowledgement, size, cuts):
    (data, (_, flags, packet_id, topic, _)), (behind, fields) = publish, acknowledgement
    body = field(topic.encode()) + (struct.pack(">H", packet_id) if flags & 6 else b"") + bytes(size + 200)
    large = data[:1] + remaining_length(len(body)) + body
    head = len(large) - size - 200 + (0 if flags & 6 else 2)
    found, failed = outcome(large + behind, cuts, size, 100)
    if head > min(size, 100):
        assert failed and not found  # its topic name fits no buffer
    else:
        assert (found, failed) == ([(PUBLISH, flags, packet_id, topic, None), fields], False)


class _Sent(paho.Client):
    """paho, with what it would write to its socket kept instead."""

    def __init__(self, *args, **kwargs):
        super().__init__(paho.CallbackAPIVersion.VERSION2, *args, protocol=paho.MQTTv311, **kwargs)
        self.sent = b""

    def _packet_queue(self, command, packet, mid, qos, info=None):
        self.sent += bytes(packet)
        return paho.MQTT_ERR_SUCCESS


texts = st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), min_size=1, max_size=30)
wills = st.none() | st.tuples(topics, st.binary(min_size=1, max_size=40), st.integers(0, 2), st.booleans())


@given(texts, st.booleans(), st.integers(0, 65535), st.none() | texts, st.none() | texts, wills)
def test_connect_is_pahos_byte_for_byte(client_id, clean, keep_alive_s, username, password, will):
    other = _Sent(client_id=client_id, clean_session=clean)
    if username is not None:
        other.username_pw_set(username, password)
    if will is not None:
        other.will_set(*will)
    other._send_connect(keep_alive_s)
    password = password if username is not None else None
    assert packet.encode_connect(client_id, clean, keep_alive_s, username, password, will) == other.sent


@given(topics, ids, st.integers(0, 2), st.binary(max_size=300), st.booleans())
def test_subscribe_unsubscribe_and_publish_are_pahos_byte_for_byte(topic, packet_id, qos, payload, retain):
    other = _Sent()
    other._mid_generate = lambda: packet_id
    name = topic.encode()
    other._send_subscribe(False, [(name, qos)])
    assert packet.encode_subscribe(packet_id, name, qos) == other.sent
    other.sent = b""
    other._send_unsubscribe(False, [name])
    assert packet.encode_unsubscribe(packet_id, name) == other.sent
    other.sent = b""
    other._sock = object()
    other._send_publish(packet_id, name, payload, 0, retain)
    other._sock = None
    assert packet.encode_publish(name, payload, retain) == other.sent


@given(ids, st.sampled_from((4, 5, 6, 7)))
def test_acknowledgements_are_pahos_byte_for_byte(packet_id, kind):
    other = _Sent()
    other._send_command_with_mid(kind << 4 | (2 if kind == PUBREL else 0), packet_id, False)
    buf = bytearray(4)
    assert packet.put_ack(buf, 0, kind, packet_id) == 4
    assert bytes(buf) == other.sent


@given(st.integers(0, 268435455))
def test_remaining_length_is_the_algorithm_of_section_2_2_3(length):
    buf = bytearray(6)
    end = packet.put_fixed_header(buf, 0, 0x30, length)
    assert bytes(buf[1:end]) == remaining_length(length)
    assert packet.remaining_length_size(length) == end - 1


@given(st.binary(max_size=12))
def test_text_is_accepted_exactly_when_python_accepts_it(data):
    try:
        expected = data.decode()
        if "\0" in expected:
            raise ValueError
    except ValueError:
        expected = None
    try:
        found = packet.utf8(data)
    except ValueError:
        found = None
    assert found == expected
