"""The codecs of both versions against any bytes in any pieces, and against paho's encoder."""

import struct

import paho.mqtt.client as paho
from hypothesis import given, settings
from hypothesis import strategies as st
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.subscribeoptions import SubscribeOptions
from raises import raises

import mqtt_durable.packet as packet
import mqtt_durable.packet5 as packet5
from mqtt_durable.errors import ProtocolError
from mqtt_durable.packet import CONNACK, PUBLISH, PUBREL, SUBACK, UNSUBACK, Decoder
from mqtt_durable.packet5 import AUTH, DISCONNECT, Decoder5
from mqtt_durable.properties import decode, encode

_SERVER = (2, 3, 4, 5, 6, 7, 9, 11, 13)
_SERVER_5 = _SERVER + (AUTH, DISCONNECT)
_ALIASES = 3
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
            decoder.end += n
            while kind := decoder.next():
                assert kind in (_SERVER_5 if isinstance(decoder, Decoder5) else _SERVER)
                payload = bytes(decoder.payload) if decoder.payload is not None else None
                if kind == PUBLISH:
                    yield kind, decoder.flags, decoder.packet_id, decoder.topic, payload
                elif kind == CONNACK:
                    yield kind, decoder.session_present, decoder.return_code
                elif kind == SUBACK:
                    yield kind, decoder.packet_id, payload
                else:
                    yield kind, decoder.packet_id


def feed_5(decoder, pieces):
    """As feed(), with what MQTT 5 has besides."""
    for fields in feed(decoder, pieces):
        if fields[0] == UNSUBACK:
            fields += (bytes(decoder.payload),)
        elif fields[0] == CONNACK:
            fields = fields[:2]
        elif fields[0] in (AUTH, DISCONNECT):
            fields = fields[:1]
        yield fields + (decoder.reason_code, decoder.properties)


def outcome(data, cuts, size, limit, version=4):
    """([packets], reason code of the ProtocolError that ended them or 0) of data cut at the places given."""
    places = sorted({0, len(data), *[cut % (len(data) + 1) for cut in cuts]})
    pieces = [data[a:b] for a, b in zip(places, places[1:])]
    found = []
    try:
        if version == 5:
            for fields in feed_5(Decoder5(size, limit, _ALIASES), pieces):
                found.append(fields)
        else:
            for fields in feed(Decoder(size, limit), pieces):
                found.append(fields)
    except ProtocolError as e:
        return found, e.reason_code
    return found, 0


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
versions = st.sampled_from((4, 5))


@settings(max_examples=400)
@given(st.binary(max_size=200), splits, st.sampled_from((8, 16, 64)), st.sampled_from((16, 64, 4096)), versions)
def test_any_bytes_in_any_pieces_are_packets_or_need_more_or_a_protocol_error(data, cuts, size, limit, version):
    assert outcome(data, cuts, size, limit, version) == outcome(data, (), size, limit, version)


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
    assert outcome(data, cuts, size, 4096) == ([fields for _, fields in stream], 0)


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
        assert (found, failed) == ([(PUBLISH, flags, packet_id, topic, None), fields], 0)


# -- MQTT 5

strings = st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), max_size=20)
bits = st.integers(0, 1)
u16 = st.integers(0, 65535)
u32 = st.integers(0, 4294967295)
# paho's name, values.  In the order of their identifiers, as paho writes them.
_PROPERTIES = {
    "payload_format_indicator": ("PayloadFormatIndicator", bits),
    "message_expiry_interval": ("MessageExpiryInterval", u32),
    "content_type": ("ContentType", strings),
    "response_topic": ("ResponseTopic", topics),
    "correlation_data": ("CorrelationData", st.binary(max_size=20)),
    "subscription_identifiers": ("SubscriptionIdentifier", st.integers(1, 268435455)),
    "session_expiry_interval": ("SessionExpiryInterval", u32),
    "assigned_client_identifier": ("AssignedClientIdentifier", strings),
    "server_keep_alive": ("ServerKeepAlive", u16),
    "authentication_method": ("AuthenticationMethod", strings),
    "authentication_data": ("AuthenticationData", st.binary(max_size=20)),
    "request_problem_information": ("RequestProblemInformation", bits),
    "will_delay_interval": ("WillDelayInterval", u32),
    "request_response_information": ("RequestResponseInformation", bits),
    "response_information": ("ResponseInformation", strings),
    "server_reference": ("ServerReference", strings),
    "reason_string": ("ReasonString", strings),
    "receive_maximum": ("ReceiveMaximum", ids),
    "topic_alias_maximum": ("TopicAliasMaximum", u16),
    "maximum_qos": ("MaximumQoS", bits),
    "retain_available": ("RetainAvailable", bits),
    "user_properties": ("UserProperty", st.lists(st.tuples(strings, strings), min_size=1, max_size=4)),
    "maximum_packet_size": ("MaximumPacketSize", st.integers(1, 268435455)),
    "wildcard_subscription_available": ("WildcardSubscriptionAvailable", bits),
    "subscription_identifier_available": ("SubscriptionIdentifierAvailable", bits),
    "shared_subscription_available": ("SharedSubscriptionAvailable", bits),
}
# What only a server, and only a client, has in a packet that both send.
_NOT_OURS = {PUBLISH: ("subscription_identifiers",), DISCONNECT: ("server_reference",)}
_NOT_THEIRS = {DISCONNECT: ("session_expiry_interval",)}
_OURS = (1, 3, 4, 5, 6, 7, 8, 10, DISCONNECT, AUTH, PacketTypes.WILLMESSAGE)


def pahos(properties, kind):
    """paho's object with these properties."""
    other = Properties(kind)
    for name, value in properties.items():
        setattr(other, _PROPERTIES[name][0], value)
    return other


@st.composite
def property_sets(draw, kind, without=()):
    """A dictionary of properties, in paho's order, that a packet of that kind may have."""
    ours = Properties(kind)
    found = {}
    for name, (other, values) in _PROPERTIES.items():
        allowed = kind in ours.properties[ours.getIdentFromName(other)][1] and name not in without
        if allowed and draw(st.integers(0, 3)) == 0:
            found[name] = draw(values)
            if name == "subscription_identifiers" and kind == PUBLISH:
                found[name] = [found[name]] + draw(st.lists(values, max_size=2))
    if "authentication_method" not in found:
        found.pop("authentication_data", None)
    return found


def theirs(kind):
    return property_sets(kind, _NOT_THEIRS.get(kind, ()))


def ours(kind):
    return property_sets(kind, _NOT_OURS.get(kind, ()))


def whole(first, body):
    return bytes((first,)) + remaining_length(len(body)) + body


@st.composite
def publishes_5(draw):
    data, (_, flags, packet_id, topic, payload) = draw(publishes())
    properties = draw(theirs(PUBLISH))
    identifier = struct.pack(">H", packet_id) if flags & 6 else b""
    body = field(topic.encode()) + identifier + pahos(properties, PUBLISH).pack() + payload
    return whole(data[0], body), (PUBLISH, flags, packet_id, topic, payload, 0, properties)


@st.composite
def answers_5(draw):
    """All that is no PUBLISH."""
    kind = draw(st.sampled_from((2, 4, 5, 6, 7, 9, 11, 13, DISCONNECT, AUTH)))
    first = kind << 4 | (2 if kind == PUBREL else 0)
    if kind == 13:
        return whole(first, b""), (kind, 0, 0, {})
    properties = draw(theirs(kind))
    packed = pahos(properties, kind).pack()
    packet_id = draw(ids)
    identifier = struct.pack(">H", packet_id)
    if kind == CONNACK:
        code = draw(st.sampled_from((0, 0x80, 0x87, 0x9F)))
        present = code == 0 and draw(st.booleans())
        return whole(first, bytes((present, code)) + packed), (kind, present, code, properties)
    if kind in (SUBACK, UNSUBACK):
        codes = bytes(draw(st.lists(st.sampled_from((0, 0x80, 0x87, 0x91)), min_size=1, max_size=20)))
        return whole(first, identifier + packed + codes), (kind, packet_id, codes, 0, properties)
    code = draw(st.sampled_from({PUBREL: (0, 0x92), 7: (0, 0x92), AUTH: (0, 0x18)}.get(kind, (0, 0x80, 0x87, 0x97))))
    if kind == AUTH:
        properties.setdefault("authentication_method", "m")
        packed = pahos(properties, kind).pack()
    body = bytes((code,)) + packed
    if not properties and draw(st.booleans()):
        body = body[: draw(st.integers(0, 1))] if code == 0 else body[:1]
    if kind in (DISCONNECT, AUTH):
        return whole(first, body), (kind, code, properties)
    return whole(first, identifier + body), (kind, packet_id, code, properties)


def without_identifier(found):
    """The packets of outcome() in the form of the strategies: PINGRESP keeps an older packet's identifier."""
    return [(13, 0) + fields[2:] if fields[0] == 13 else fields for fields in found]


streams_5 = st.lists(st.one_of(publishes_5(), answers_5()), max_size=8)


@settings(max_examples=400)
@given(streams_5, st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 255)), max_size=3), splits)
def test_damaged_streams_of_version_5_are_told_alike_however_they_are_cut(stream, damage, cuts):
    data = bytearray(b"".join(part for part, _ in stream))
    for at, value in damage:
        if data:
            data[at % len(data)] = value
    for limit in (400, 40):
        found, failed = outcome(bytes(data), cuts, 16, limit, 5)
        assert (found, failed) == outcome(bytes(data), (), 16, limit, 5)
        assert failed in (0, 0x81, 0x82, 0x94, 0x95)


@settings(max_examples=300)
@given(streams_5, splits, st.sampled_from((8, 16, 64, 512)))
def test_every_packet_of_version_5_comes_out_as_it_went_in(stream, cuts, size):
    data = b"".join(part for part, _ in stream)
    found, failed = outcome(data, cuts, size, 65536, 5)
    assert (without_identifier(found), failed) == ([fields for _, fields in stream], 0)


@settings(max_examples=200)
@given(publishes_5(), answers_5(), st.integers(8, 128), splits)
def test_a_message_of_version_5_over_the_limit_costs_no_packet_behind_it(publish, answer, size, cuts):
    (data, (_, flags, packet_id, topic, payload, _, properties)), (behind, fields) = publish, answer
    limit = 100
    body = data[2 if len(data) < 130 else 3 :]
    body = body[: len(body) - len(payload)]
    large = whole(data[0], body + bytes(size + 200))
    found, failed = outcome(large + behind, cuts, size, limit, 5)
    if len(large) - size - 200 > min(size, limit):
        assert failed == 0x95 and not found  # its head fits no buffer
    elif len(behind) <= limit:
        expected = [(PUBLISH, flags, packet_id, topic, None, 0, properties), fields]
        assert (without_identifier(found), failed) == (expected, 0)


@given(st.data(), st.sampled_from(_OURS))
def test_properties_are_pahos_byte_for_byte(draw, kind):
    properties = draw.draw(ours(kind))
    if "message_expiry_interval" in properties:
        properties.pop("payload_format_indicator", None)  # which paho puts before it
    block = encode(properties, 0 if kind == PacketTypes.WILLMESSAGE else kind)
    assert block == pahos(properties, kind).pack()


@given(st.data(), st.sampled_from([kind for kind in _SERVER_5 if kind != 13]))
def test_properties_of_paho_are_understood(draw, kind):
    properties = draw.draw(theirs(kind))
    block = pahos(properties, kind).pack()
    assert decode(block, 0, len(block), kind) == (properties, len(block))


@settings(max_examples=400)
@given(st.binary(max_size=60), st.sampled_from([kind for kind in _SERVER_5 if kind != 13]))
def test_any_bytes_are_properties_or_a_protocol_error(data, kind):
    block = remaining_length(len(data)) + data
    try:
        found, end = decode(block, 0, len(block), kind)
    except ProtocolError as e:
        assert e.reason_code in (0x81, 0x82, 0x94)
        return
    assert end == len(block) and isinstance(found, dict)


class _Sent(paho.Client):
    """paho, with what it would write to its socket kept instead."""

    def __init__(self, *args, protocol=paho.MQTTv311, **kwargs):
        super().__init__(paho.CallbackAPIVersion.VERSION2, *args, protocol=protocol, **kwargs)
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


_CONNECT, _WILL = PacketTypes.CONNECT, PacketTypes.WILLMESSAGE


@given(
    texts, st.booleans(), u16, st.none() | texts, st.none() | texts, wills, ours(_CONNECT), ours(_WILL)
)
def test_connect_of_version_5_is_pahos_byte_for_byte(
    client_id, clean, keep_alive_s, username, password, will, properties, will_properties
):
    other = _Sent(client_id=client_id, protocol=paho.MQTTv5)
    other._clean_start = clean
    other._connect_properties = pahos(properties, _CONNECT)
    if username is not None:
        other.username_pw_set(username, password)
    if will is not None:
        if "message_expiry_interval" in will_properties:
            will_properties.pop("payload_format_indicator", None)
        other.will_set(*will, properties=pahos(will_properties, _WILL))
        will += (will_properties,)
    other._send_connect(keep_alive_s)
    password = password if username is not None else None
    args = client_id, clean, keep_alive_s, username, password, will, properties
    assert packet5.encode_connect(*args) == other.sent


@given(
    topics, ids, st.integers(0, 2), st.booleans(), st.booleans(), st.integers(0, 2), ours(8), ours(10), ours(PUBLISH)
)
def test_subscribe_unsubscribe_and_publish_of_version_5_are_pahos_byte_for_byte(
    topic, packet_id, qos, no_local, as_published, handling, subscribe, unsubscribe, publish
):
    other = _Sent(protocol=paho.MQTTv5)
    other._mid_generate = lambda: packet_id
    name = topic.encode()
    options = SubscribeOptions(qos, no_local, as_published, handling)
    other._send_subscribe(False, [(name, options)], pahos(subscribe, PacketTypes.SUBSCRIBE))
    if no_local and topic.startswith("$share/"):
        raises(ValueError, packet5.subscription_options, name, qos, no_local, as_published, handling)
        no_local = False
    byte = packet5.subscription_options(name, qos, no_local, as_published, handling)
    assert packet5.encode_subscribe(packet_id, name, byte, subscribe) == other.sent
    other.sent = b""
    other._send_unsubscribe(False, [name], pahos(unsubscribe, PacketTypes.UNSUBSCRIBE))
    assert packet5.encode_unsubscribe(packet_id, name, unsubscribe) == other.sent
    other.sent = b""
    if "message_expiry_interval" in publish:
        publish.pop("payload_format_indicator", None)
    other._sock = object()
    other._send_publish(packet_id, name, b"payload", qos, no_local, properties=pahos(publish, PUBLISH))
    other._sock = None
    block = encode(publish, PUBLISH)
    buf = bytearray(len(name) + 9)
    first = 0x30 | qos << 1 | no_local
    end = packet5.put_publish_head(buf, 0, first, name, packet_id, len(block) + 7)
    head = bytes(buf[:end]) + block + b"payload"
    assert (head if qos else packet5.encode_publish(name, b"payload", no_local, publish)) == other.sent


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
    assert packet5.remaining_length_size(length) == end - 1


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
