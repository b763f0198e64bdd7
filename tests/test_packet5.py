"""The wire codec of MQTT 5 against bytes typed from the specification."""

import sys

import micropython
import mqtt_durable.packet5 as wire
from mqtt_durable.errors import ProtocolError
from mqtt_durable.packet import CONNACK, PINGRESP, PUBACK, PUBCOMP, PUBLISH, PUBREC, PUBREL, SUBACK, UNSUBACK
from mqtt_durable.packet5 import AUTH, DISCONNECT, Decoder5
from mqtt_durable.reasons import text
from raises import raises


def _feed(decoder, data):
    """Give data to the decoder as fast as it takes it; return what next() told, as tuples."""
    found = []
    while data:
        space = decoder.space()
        n = min(len(space), len(data))
        space[:n] = data[:n]
        data = data[n:]
        decoder.end += n
        while True:
            kind = decoder.next()
            if not kind:
                break
            fields = (kind,)
            if kind == PUBLISH:
                payload = None if decoder.payload is None else bytes(decoder.payload)
                fields += (decoder.flags, decoder.packet_id, decoder.topic, payload)
                assert decoder.reason_code == 0
            elif kind == CONNACK:
                fields += (decoder.session_present, decoder.reason_code)
            elif kind in (SUBACK, UNSUBACK):
                fields += (decoder.packet_id, bytes(decoder.payload))
            elif kind in (PUBACK, PUBREC, PUBREL, PUBCOMP):
                fields += (decoder.packet_id, decoder.reason_code)
            elif kind != PINGRESP:
                fields += (decoder.reason_code,)
            found.append(fields + (decoder.properties,) if decoder.properties else fields)
    return found


def _code(data, decoder=None):
    return raises(ProtocolError, _feed, decoder or Decoder5(), data).reason_code


# -- encoding


def test_connect_has_the_bytes_of_section_3_1():
    """[MQTT5-2.2.2-1] [MQTT5-3.1.2-1] [MQTT5-3.1.2-2] [MQTT5-3.1.2-3] [MQTT5-3.1.2-9] [MQTT5-3.1.2-11] [MQTT5-3.1.2-13]
    [MQTT5-3.1.2-16] [MQTT5-3.1.2-17] [MQTT5-3.1.2-18] [MQTT5-3.1.2-19] [MQTT5-3.1.3-1] [MQTT5-3.1.3-3]
    """
    for args, data in (
        (("a", True, 0), b"\x10\x0e\x00\x04MQTT\x05\x02\x00\x00\x00\x00\x01a"),
        (("a", False, 10), b"\x10\x0e\x00\x04MQTT\x05\x00\x00\x0a\x00\x00\x01a"),
        (("", False, 65535), b"\x10\x0d\x00\x04MQTT\x05\x00\xff\xff\x00\x00\x00"),
        (
            ("a", False, 10, None, None, None, {"session_expiry_interval": 10}),
            b"\x10\x13\x00\x04MQTT\x05\x00\x00\x0a\x05\x11\x00\x00\x00\x0a\x00\x01a",
        ),
        # User name, password, will at QoS 1, clean start.
        (
            ("c", True, 10, "u", "p", ("w", b"m", 1, False)),
            b"\x10\x1b\x00\x04MQTT\x05\xce\x00\x0a\x00\x00\x01c\x00\x00\x01w\x00\x01m\x00\x01u\x00\x01p",
        ),
        (
            ("c", False, 1, "u", None, ("w", "", 2, True, {"will_delay_interval": 5}), {"receive_maximum": 2}),
            b"\x10\x1f\x00\x04MQTT\x05\xb4\x00\x01\x03\x21\x00\x02\x00\x01c"
            b"\x05\x18\x00\x00\x00\x05\x00\x01w\x00\x00\x00\x01u",
        ),
        # A password without a user name.
        (("c", True, 1, None, b"\xff\x00"), b"\x10\x12\x00\x04MQTT\x05\x42\x00\x01\x00\x00\x01c\x00\x02\xff\x00"),
    ):
        assert wire.encode_connect(*args) == data, args


def test_connect_refuses_what_the_broker_would():
    """[MQTT5-3.1.2-12] [MQTT5-3.1.3-4] [MQTT5-3.1.3-11] [MQTT5-3.1.3-12]"""
    for args in (
        ("a", True, -1),
        ("a", True, 65536),
        ("a\0", True, 0),
        (b"\xff", True, 0),
        ("x" * 65536, True, 0),
        ("a", True, 0, "u" * 65536),
        ("a", True, 0, b"\xff"),
        ("a", True, 0, "u", b"p" * 65536),
        ("a", True, 0, None, None, ("w", b"", 3, False)),
        ("a", True, 0, None, None, ("w/#", b"", 1, False)),
        ("a", True, 0, None, None, (b"\xff", b"", 1, False)),
        ("a", True, 0, None, None, ("", b"", 1, False)),
        ("a", True, 0, None, None, ("w", b"m" * 65536, 1, False)),
        ("a", True, 0, None, None, ("w", b"m", 1, False, {"receive_maximum": 1})),
        ("a", True, 0, None, None, None, {"will_delay_interval": 1}),
    ):
        raises(ValueError, wire.encode_connect, *args)


def test_publish_at_qos_0_has_no_packet_identifier():
    """[MQTT5-2.2.1-2] [MQTT5-2.2.2-1] [MQTT5-3.3.1-2] [MQTT5-3.3.2-1] [MQTT5-4.3.1-1]"""
    assert wire.encode_publish(b"a/b", b"21.5") == b"\x30\x0a\x00\x03a/b\x0021.5"
    assert wire.encode_publish(b"a/b", b"", True) == b"\x31\x06\x00\x03a/b\x00"
    properties = {"payload_format_indicator": 1}
    assert wire.encode_publish(b"t", b"x", False, properties) == b"\x30\x07\x00\x01t\x02\x01\x01x"
    assert wire.encode_publish(b"t", b"x", False, properties, 9) == b"\x30\x0a\x00\x01t\x05\x23\x00\x09\x01\x01x"
    assert wire.encode_publish(b"", b"x", topic_alias=9) == b"\x30\x07\x00\x00\x03\x23\x00\x09x"


def test_publish_at_qos_1_and_2_is_a_head_a_block_of_properties_and_the_payload():
    """[MQTT5-2.2.2-1] [MQTT5-3.3.2-1]"""
    block = wire.encode({"payload_format_indicator": 1}, PUBLISH)
    buf = bytearray(32)
    end = wire.put_publish_head(buf, 0, 0x32, b"a/b", 10, len(block) + 1)
    assert bytes(buf[:end]) + block + b"x" == b"\x32\x0b\x00\x03a/b\x00\x0a\x02\x01\x01x"


def test_subscribe_and_unsubscribe_have_the_bytes_of_sections_3_8_and_3_10():
    """[MQTT5-2.1.3-1] [MQTT5-3.8.1-1] [MQTT5-3.8.3-2] [MQTT5-3.10.1-1] [MQTT5-3.10.3-2]"""
    assert wire.encode_subscribe(10, b"a/b", 1) == b"\x82\x09\x00\x0a\x00\x00\x03a/b\x01"
    properties = {"subscription_identifiers": 300}
    assert wire.encode_subscribe(10, b"a/b", 0x2E, properties) == b"\x82\x0c\x00\x0a\x03\x0b\xac\x02\x00\x03a/b\x2e"
    assert wire.encode_unsubscribe(0x100, b"c/d") == b"\xa2\x08\x01\x00\x00\x00\x03c/d"
    properties = {"user_properties": [("a", "b")]}
    assert wire.encode_unsubscribe(1, b"c", properties) == b"\xa2\x0d\x00\x01\x07\x26\x00\x01a\x00\x01b\x00\x01c"


def test_subscription_options_have_the_bits_of_section_3_8_3_1():
    """[MQTT5-3.8.3-4] [MQTT5-3.8.3-5]"""
    for args, options in (
        ((b"a", 0), 0),
        ((b"a", 2), 2),
        ((b"a", 1, True), 0x05),
        ((b"a", 1, False, True), 0x09),
        ((b"a", 0, False, False, 1), 0x10),
        ((b"a", 2, True, True, 2), 0x2E),
        ((b"$share/g/a", 2, False, True, 2), 0x2A),
        ((b"$share", 0, True), 4),
    ):
        assert wire.subscription_options(*args) == options, args
    for args in ((b"a", 3), (b"a", -1), (b"a", None), (b"a", 0, False, False, 3), (b"$share/g/a", 1, True)):
        raises(ValueError, wire.subscription_options, *args)


def test_acknowledgements_have_a_reason_code_only_if_it_is_not_0():
    """[MQTT5-2.1.3-1] [MQTT5-3.4.2-1] [MQTT5-3.5.2-1] [MQTT5-3.6.1-1] [MQTT5-3.6.2-1] [MQTT5-3.7.2-1]"""
    acks = (0x10, 0x80, 0x83, 0x87, 0x90, 0x91, 0x97, 0x99)
    rest = (0x92,)
    for kind, first, codes in ((PUBACK, 0x40, acks), (PUBREC, 0x50, acks), (PUBREL, 0x62, rest), (PUBCOMP, 0x70, rest)):
        buf = bytearray(7)
        assert wire.put_ack(buf, 1, kind, 0x1234) == 5
        assert bytes(buf) == bytes((0, first, 2, 0x12, 0x34, 0, 0))
        for code in range(1, 256):
            if code in codes:
                assert wire.put_ack(buf, 1, kind, 0x1234, code) == 6
                assert bytes(buf) == bytes((0, first, 3, 0x12, 0x34, code, 0))
            else:
                raises(ValueError, wire.put_ack, buf, 1, kind, 0x1234, code)


def test_disconnect_has_the_bytes_of_section_3_14():
    """[MQTT5-2.1.3-1] [MQTT5-3.14.1-1] [MQTT5-3.14.2-1]"""
    assert wire.encode_disconnect() == wire.DISCONNECT_BYTES == b"\xe0\x00"
    ours = (4, 0x80, 0x81, 0x82, 0x83, 0x90, 0x93, 0x94, 0x95, 0x96, 0x97, 0x98, 0x99)
    for code in range(1, 256):
        if code in ours:
            assert wire.encode_disconnect(code) == bytes((0xE0, 1, code))
        else:
            raises(ValueError, wire.encode_disconnect, code)
    expected = b"\xe0\x07\x00\x05\x11\x00\x00\x00\x3c"
    assert wire.encode_disconnect(0, {"session_expiry_interval": 60}) == expected
    raises(ValueError, wire.encode_disconnect, 0, {"server_reference": "x"})


def test_auth_has_the_bytes_of_section_3_15():
    """[MQTT5-2.1.3-1] [MQTT5-3.15.1-1] [MQTT5-3.15.2-1]"""
    method = {"authentication_method": "m"}
    assert wire.encode_auth(0x18, method) == b"\xf0\x06\x18\x04\x15\x00\x01m"
    assert wire.encode_auth(0x19, method) == b"\xf0\x06\x19\x04\x15\x00\x01m"
    for code in (0, 1, 0x17, 0x1A, 0x8C):
        raises(ValueError, wire.encode_auth, code, method)
    raises(ValueError, wire.encode_auth, 0x18, {})
    raises(ValueError, wire.encode_auth, 0x18, {"authentication_data": b"x"})


def test_pingreq_has_two_bytes():
    """[MQTT5-2.1.3-1]"""
    assert wire.PINGREQ_BYTES == b"\xc0\x00"


# -- topics, filters, reasons


def test_topic_names_and_filters_are_checked():
    """[MQTT5-1.5.4-1] [MQTT5-1.5.4-2] [MQTT5-1.5.4-3] [MQTT5-3.3.2-2] [MQTT5-3.8.3-1] [MQTT5-3.10.3-1] [MQTT5-4.7.0-1]
    [MQTT5-4.7.1-1] [MQTT5-4.7.1-2] [MQTT5-4.7.3-1] [MQTT5-4.7.3-2] [MQTT5-4.7.3-3]
    """
    for good in ("a", "/", "a//b", "\ufeff", "a" * 65535):
        assert wire.check_topic(good) == good.encode() == wire.check_filter(good)
    for bad in ("", "a\0", b"\xff", b"\xed\xa0\x80", "a" * 65536):
        raises(ValueError, wire.check_topic, bad)
        raises(ValueError, wire.check_filter, bad)
    for wild in ("#", "+", "a/#", "a/+/b"):
        raises(ValueError, wire.check_topic, wild)
        assert wire.check_filter(wild) == wild.encode()
    for wild in ("a#", "#/a", "a+", "+a"):
        raises(ValueError, wire.check_filter, wild)


def test_a_shared_subscription_has_a_name_and_a_filter():
    """[MQTT5-4.8.2-1] [MQTT5-4.8.2-2]"""
    for good in ("$share/g/a", "$share/g/#", "$share/g//", "$share/g/+/a", "$share/\u00e4/a", "$share", "$shared/a"):
        assert wire.check_filter(good) == good.encode() == wire.check_filter(good.encode()), good
    for bad in ("$share/", "$share/g", "$share/g/", "$share//a", "$share/+/a", "$share/#", "$share/#/a", "$share/g+/a"):
        raises(ValueError, wire.check_filter, bad)


def test_a_shared_filter_matches_as_the_filter_behind_its_name():
    for topic_filter, topic_name, expected in (
        ("$share/g/a/+", "a/b", True),
        ("$share/g/a/+", "a", False),
        ("$share/g/#", "a", True),
        ("$share/g/#", "$SYS/a", False),
        ("$share/g//a", "/a", True),
        ("a/+", "a/b", True),
        ("$share", "$share", True),
    ):
        assert wire.matches(topic_filter, topic_name) == expected, (topic_filter, topic_name)


def test_reason_codes_have_their_names():
    for code, expected in (
        (0, "0x00 success"),
        (0x19, "0x19 re-authenticate"),
        (0x80, "0x80 unspecified error"),
        (0x81, "0x81 malformed packet"),
        (0x87, "0x87 not authorized"),
        (0x8E, "0x8e session taken over"),
        (0x92, "0x92 packet identifier not found"),
        (0x97, "0x97 quota exceeded"),
        (0x9C, "0x9c use another server"),
        (0xA2, "0xa2 wildcard subscriptions not supported"),
        (0x03, "0x03 unknown reason"),
        (0xA3, "0xa3 unknown reason"),
        (0xFF, "0xff unknown reason"),
    ):
        assert text(code) == expected


# -- decoding

_PACKETS = (
    (b"\x20\x03\x00\x00\x00", (CONNACK, False, 0)),
    (b"\x20\x03\x01\x00\x00", (CONNACK, True, 0)),
    (b"\x20\x03\x00\x87\x00", (CONNACK, False, 0x87)),
    (b"\x20\x06\x00\x00\x03\x21\x00\x0a", (CONNACK, False, 0, {"receive_maximum": 10})),
    (b"\x20\x02\x00\x01", (CONNACK, False, 0x84)),  # from a server that speaks 3.1.1 alone
    (b"\x40\x02\x00\x01", (PUBACK, 1, 0)),
    (b"\x40\x03\x00\x01\x10", (PUBACK, 1, 0x10)),
    (b"\x40\x04\x00\x01\x97\x00", (PUBACK, 1, 0x97)),
    (b"\x50\x09\xff\xff\x87\x05\x1f\x00\x02no", (PUBREC, 65535, 0x87, {"reason_string": "no"})),
    (b"\x62\x02\x01\x00", (PUBREL, 256, 0)),
    (b"\x62\x03\x01\x00\x92", (PUBREL, 256, 0x92)),
    (b"\x70\x03\x12\x34\x92", (PUBCOMP, 0x1234, 0x92)),
    (b"\x90\x04\x00\x0a\x00\x87", (SUBACK, 10, b"\x87")),
    (b"\x90\x07\x00\x0a\x00\x00\x01\x02\x80", (SUBACK, 10, b"\x00\x01\x02\x80")),
    (b"\x90\x08\x00\x0a\x04\x1f\x00\x01x\x01", (SUBACK, 10, b"\x01", {"reason_string": "x"})),
    (b"\xb0\x05\x00\x0a\x00\x00\x11", (UNSUBACK, 10, b"\x00\x11")),
    (b"\xd0\x00", (PINGRESP,)),
    (b"\x30\x06\x00\x03a/b\x00", (PUBLISH, 0, 0, "a/b", b"")),
    (b"\x31\x09\x00\x03a/b\x02\x01\x01x", (PUBLISH, 1, 0, "a/b", b"x", {"payload_format_indicator": 1})),
    (b"\x32\x0a\x00\x03a/b\x00\x0a\x00\x00\xff", (PUBLISH, 2, 10, "a/b", b"\x00\xff")),
    (b"\x3d\x08\x00\x03a/b\x00\x0a\x00", (PUBLISH, 13, 10, "a/b", b"")),
    (b"\x3a\x89\x01\x00\x01t\x01\x00\x00" + b"y" * 131, (PUBLISH, 10, 256, "t", b"y" * 131)),
    (b"\x30\x07\x00\x01t\x03\x23\x00\x02", (PUBLISH, 0, 0, "t", b"")),
    (b"\x32\x0a\x00\x00\x00\x05\x03\x23\x00\x02ok", (PUBLISH, 2, 5, "t", b"ok")),
    (
        b"\x30\x8a\x01\x00\x01t\x85\x01\x03\x00\x80" + b"c" * 128 + b"\x0b\x05",
        (PUBLISH, 0, 0, "t", b"", {"content_type": "c" * 128, "subscription_identifiers": [5]}),
    ),
    (b"\xf0\x00", (AUTH, 0)),
    (b"\xf0\x06\x18\x04\x15\x00\x01m", (AUTH, 0x18, {"authentication_method": "m"})),
    (b"\xe0\x00", (DISCONNECT, 0)),
    (b"\xe0\x01\x8e", (DISCONNECT, 0x8E)),
    (b"\xe0\x02\x8b\x00", (DISCONNECT, 0x8B)),
    (b"\xe0\x06\x9c\x04\x1c\x00\x01s", (DISCONNECT, 0x9C, {"server_reference": "s"})),
)


def test_every_packet_of_a_server_is_decoded():
    """[MQTT5-2.2.2-1] [MQTT5-3.3.2-1] [MQTT5-3.11.3-1] [MQTT5-3.9.3-1]"""
    decoder = Decoder5(512, 4096, 2)
    for data, expected in _PACKETS:
        assert _feed(decoder, data) == [expected], data


def test_a_stream_is_decoded_alike_however_it_is_cut():
    """[MQTT5-4.2.0-1] [MQTT5-7.1.2-1]"""
    stream = b"".join([data for data, _ in _PACKETS])
    expected = [fields for _, fields in _PACKETS]
    for size in (8, 9, 10, 16, 64, 512):
        for piece in (1, 2, 3, 4, 5, 9, 64, len(stream)):
            decoder = Decoder5(size, 4096, 2)
            found = []
            for i in range(0, len(stream), piece):
                found += _feed(decoder, stream[i : i + piece])
            assert found == expected, (size, piece)
            assert len(decoder.space()) == size


def test_every_prefix_of_a_packet_needs_more():
    for data, expected in _PACKETS:
        for n in range(len(data)):
            decoder = Decoder5(16, 4096, 2)
            _feed(decoder, b"\x30\x07\x00\x01t\x03\x23\x00\x02")
            assert _feed(decoder, data[:n]) == [], (data, n)
            assert _feed(decoder, data[n:]) == [expected], (data, n)


def test_reason_codes_are_those_of_the_packets_table():
    """[MQTT5-3.4.2-1] [MQTT5-3.5.2-1] [MQTT5-3.6.2-1] [MQTT5-3.7.2-1] [MQTT5-3.9.3-2] [MQTT5-3.14.2-1]
    [MQTT5-3.15.2-1]
    """
    acks = (0, 0x10, 0x80, 0x83, 0x87, 0x90, 0x91, 0x97, 0x99)
    suback = (0, 1, 2, 0x80, 0x83, 0x87, 0x8F, 0x91, 0x97, 0x9E, 0xA1, 0xA2)
    connack = set(range(0x80, 0xA0)) - {0x8B, 0x8D, 0x8E, 0x8F, 0x91, 0x92, 0x93, 0x94, 0x96, 0x98, 0x9E}
    disconnect = set(range(0x80, 0xA3)) - {0x84, 0x85, 0x86, 0x88, 0x8A, 0x91, 0x92}
    for head, tail, codes in (
        (b"\x20\x03\x00", b"\x00", connack | {0}),
        (b"\x40\x03\x00\x01", b"", acks),
        (b"\x50\x03\x00\x01", b"", acks),
        (b"\x62\x03\x00\x01", b"", (0, 0x92)),
        (b"\x70\x03\x00\x01", b"", (0, 0x92)),
        (b"\x90\x04\x00\x01\x00", b"", suback),
        (b"\xb0\x04\x00\x01\x00", b"", (0, 0x11, 0x80, 0x83, 0x87, 0x8F, 0x91)),
        (b"\xe0\x01", b"", disconnect | {0}),
        (b"\xf0\x06", b"\x04\x15\x00\x01m", (0, 0x18)),
    ):
        for code in range(256):
            data = head + bytes((code,)) + tail
            if code in codes:
                assert len(_feed(Decoder5(), data)) == 1, (head, code)
            else:
                assert _code(data) == 0x82, (head, code)


def test_what_no_server_may_send_has_its_reason_code():
    """[MQTT5-1.5.4-1] [MQTT5-1.5.4-2] [MQTT5-1.5.5-1] [MQTT5-2.1.3-1] [MQTT5-3.2.2-1] [MQTT5-3.2.2-6] [MQTT5-3.3.1-2]
    [MQTT5-3.3.1-4] [MQTT5-3.3.2-1] [MQTT5-3.3.2-2] [MQTT5-3.6.1-1] [MQTT5-3.14.1-1] [MQTT5-3.14.2-2] [MQTT5-3.15.1-1]
    [MQTT5-4.7.0-1] [MQTT5-4.7.3-1]
    """
    for name, data, code in (
        ("type 0", b"\x00\x00", 0x82),
        ("CONNECT", b"\x10\x00", 0x82),
        ("SUBSCRIBE", b"\x80\x00", 0x82),
        ("UNSUBSCRIBE", b"\xa0\x00", 0x82),
        ("PINGREQ", b"\xc0\x00", 0x82),
        ("flags in CONNACK", b"\x21\x03\x00\x00\x00", 0x81),
        ("flags in PUBACK", b"\x42\x02\x00\x01", 0x81),
        ("flags in PUBREC", b"\x52\x02\x00\x01", 0x81),
        ("no flags in PUBREL", b"\x60\x02\x00\x01", 0x81),
        ("flags in PUBCOMP", b"\x71\x02\x00\x01", 0x81),
        ("flags in SUBACK", b"\x92\x04\x00\x01\x00\x00", 0x81),
        ("flags in UNSUBACK", b"\xb2\x04\x00\x01\x00\x00", 0x81),
        ("flags in PINGRESP", b"\xd1\x00", 0x81),
        ("flags in DISCONNECT", b"\xe2\x00", 0x81),
        ("flags in AUTH", b"\xf1\x00", 0x81),
        ("remaining length of 5 bytes", b"\x30\xff\xff\xff\xff", 0x81),
        ("remaining length in 2 bytes for 1", b"\x40\x82\x00\x00\x01", 0x81),
        ("remaining length in 2 bytes for 0", b"\xd0\x80\x00", 0x81),
        ("remaining length in 3 bytes for 0", b"\xe0\x80\x80\x00", 0x81),
        ("remaining length in 3 bytes for 2", b"\x32\x89\x80\x00\x00\x01t\x00\x01\x00xyz", 0x81),
        ("long PINGRESP", b"\xd0\x01\x00", 0x81),
        ("CONNACK of 0 bytes", b"\x20\x00", 0x81),
        ("CONNACK of 1 byte", b"\x20\x01\x00", 0x81),
        ("CONNACK without properties", b"\x20\x02\x00\x00", 0x81),
        ("CONNACK and more", b"\x20\x04\x00\x00\x00\x00", 0x81),
        ("CONNACK with reserved flags", b"\x20\x03\x02\x00\x00", 0x81),
        ("session present in a refusal", b"\x20\x03\x01\x87\x00", 0x82),
        ("PUBACK of 0 bytes", b"\x40\x00", 0x81),
        ("PUBACK of 1 byte", b"\x40\x01\x00", 0x81),
        ("PUBACK and more", b"\x40\x05\x00\x01\x00\x00\x00", 0x81),
        ("properties longer than PUBREC", b"\x50\x04\x00\x01\x00\x01", 0x81),
        ("properties longer than PUBLISH", b"\x30\x04\x00\x01t\x01", 0x81),
        ("PUBLISH without properties", b"\x30\x03\x00\x01t", 0x81),
        ("property of another packet", b"\x62\x07\x00\x01\x00\x03\x21\x00\x01", 0x81),
        ("session expiry from a server", b"\xe0\x07\x00\x05\x11\x00\x00\x00\x01", 0x81),
        ("a property twice", b"\xe0\x08\x00\x06\x1f\x00\x00\x1f\x00\x00", 0x82),
        ("packet identifier 0 in PUBACK", b"\x40\x02\x00\x00", 0x82),
        ("packet identifier 0 in PUBREL", b"\x62\x02\x00\x00", 0x82),
        ("packet identifier 0 in PUBLISH", b"\x32\x06\x00\x01t\x00\x00\x00", 0x82),
        ("packet identifier 0 in SUBACK", b"\x90\x04\x00\x00\x00\x00", 0x82),
        ("packet identifier 0 in UNSUBACK", b"\xb0\x04\x00\x00\x00\x00", 0x82),
        ("SUBACK without a code", b"\x90\x03\x00\x01\x00", 0x81),
        ("UNSUBACK without a code", b"\xb0\x03\x00\x01\x00", 0x81),
        ("UNSUBACK of MQTT 3.1.1", b"\xb0\x02\x00\x01", 0x81),
        ("SUBACK of 0 bytes", b"\x90\x00", 0x81),
        ("AUTH without a method", b"\xf0\x02\x18\x00", 0x82),
        ("AUTH with its code alone", b"\xf0\x01\x18", 0x82),
        ("AUTH and more", b"\xf0\x07\x18\x04\x15\x00\x01mx", 0x81),
        ("DISCONNECT and more", b"\xe0\x03\x00\x00\x00", 0x81),
        ("DISCONNECT with a client's code", b"\xe0\x01\x04", 0x82),
        ("QoS 3", b"\x36\x06\x00\x01t\x00\x01\x00", 0x81),
        ("DUP at QoS 0", b"\x38\x04\x00\x01t\x00", 0x81),
        ("PUBLISH of 0 bytes", b"\x30\x00", 0x81),
        ("PUBLISH of 1 byte", b"\x30\x01\x00", 0x81),
        ("empty topic name", b"\x30\x03\x00\x00\x00", 0x82),
        ("topic name longer than the packet", b"\x30\x03\x00\x02t", 0x81),
        ("no room for a packet identifier", b"\x32\x04\x00\x01t\x00", 0x81),
        ("wildcard + in a topic name", b"\x30\x04\x00\x01+\x00", 0x82),
        ("wildcard # in a topic name", b"\x30\x06\x00\x03a/#\x00", 0x82),
        ("U+0000 in a topic name", b"\x30\x04\x00\x01\x00\x00", 0x81),
        ("surrogate in a topic name", b"\x30\x06\x00\x03\xed\xa0\x80\x00", 0x81),
        ("no UTF-8 in a topic name", b"\x30\x04\x00\x01\xff\x00", 0x81),
    ):
        assert _code(data) == code, name


def test_topic_aliases_are_resolved_until_the_connection_ends():
    """[MQTT5-3.1.2-26] [MQTT5-3.1.2-27] [MQTT5-3.3.2-7] [MQTT5-3.3.2-10] [MQTT5-3.3.2-11]"""
    decoder = Decoder5(512, 4096, 65535)
    for alias in (1, 2, 256, 65535):
        block = b"\x03\x23" + bytes((alias >> 8, alias & 255))
        name = b"t%d" % (alias % 10)
        assert _code(b"\x30\x06\x00\x00" + block, decoder) == 0x82  # not yet known
        decoder.reset()
        told = (PUBLISH, 0, 0, name.decode(), b"")
        assert _feed(decoder, b"\x30\x08\x00\x02" + name + block) == [told]
        assert _feed(decoder, b"\x30\x06\x00\x00" + block) == [told]
        # It may be given to another topic.
        assert _feed(decoder, b"\x30\x07\x00\x01n" + block + b"\x30\x06\x00\x00" + block)[1][3] == "n"
        decoder.reset()
        assert _code(b"\x30\x06\x00\x00" + block, decoder) == 0x82
        decoder.reset()
    # Two at a time.
    stream = b"\x30\x07\x00\x01a\x03\x23\x00\x01" + b"\x30\x07\x00\x01b\x03\x23\x00\x02"
    stream += b"\x30\x06\x00\x00\x03\x23\x00\x01" + b"\x30\x06\x00\x00\x03\x23\x00\x02"
    assert [fields[3] for fields in _feed(decoder, stream)] == ["a", "b", "a", "b"]
    for maximum, alias in ((0, 1), (2, 3), (2, 65535), (2, 0)):
        data = b"\x30\x07\x00\x01t\x03\x23" + bytes((alias >> 8, alias & 255))
        assert _code(data, Decoder5(512, 4096, maximum)) == 0x94


def test_problem_information_that_was_not_asked_for_is_a_protocol_error():
    """[MQTT5-3.1.2-29]"""
    reason = b"\x04\x1f\x00\x01x"
    pair = b"\x07\x26\x00\x01a\x00\x01b"
    for data in (
        b"\x40\x08\x00\x01\x00" + reason,
        b"\x50\x0b\x00\x01\x00" + pair,
        b"\x62\x08\x00\x01\x00" + reason,
        b"\x70\x0b\x00\x01\x00" + pair,
        b"\x90\x08\x00\x01" + reason + b"\x00",
        b"\xb0\x0b\x00\x01" + pair + b"\x00",
        b"\xf0\x0a\x18\x08\x15\x00\x01m" + reason[1:],
    ):
        assert len(_feed(Decoder5(), data)) == 1
        assert _code(data, Decoder5(problem_information=False)) == 0x82, data
    for data in (
        b"\x20\x07\x00\x00" + reason,
        b"\xe0\x06\x00" + reason,
        b"\x30\x0b\x00\x01t" + pair,
        b"\x40\x04\x00\x01\x00\x00",
    ):
        assert len(_feed(Decoder5(problem_information=False), data)) == 1


def test_properties_of_one_packet_are_not_those_of_the_next():
    decoder = Decoder5()
    data = b"\x20\x07\x00\x87\x04\x1f\x00\x01x" + b"\x40\x02\x00\x01" + b"\x20\x07\x00\x87\x04\x1f\x00\x01x"
    decoder.space()[: len(data)] = data
    decoder.end += len(data)
    assert decoder.next() == CONNACK
    assert decoder.properties == {"reason_string": "x"} and decoder.reason_code == 0x87
    assert decoder.next() == PUBACK
    assert decoder.properties == {} and decoder.reason_code == 0
    assert decoder.next() == CONNACK
    decoder.reset()
    assert decoder.properties == {} and decoder.reason_code == 0


# -- large packets


def _large(properties, payload):
    """(a QoS 1 PUBLISH to t, its head) with a remaining length of 3 bytes."""
    body = b"\x00\x01t\x00\x09" + properties
    length = len(body) + len(payload)
    assert 16384 <= length < 2097152
    head = bytes((0x32, length & 127 | 128, length >> 7 & 127 | 128, length >> 14)) + body
    return head + payload, head


def test_a_packet_larger_than_the_buffer_arrives_whole_and_the_buffer_shrinks_again():
    decoder = Decoder5(64, 4096)
    large = b"\x30\xe9\x07\x00\x01t\x00" + b"z" * 997
    small = b"\x40\x02\x00\x07"
    assert _feed(decoder, large + small) == [(PUBLISH, 0, 0, "t", b"z" * 997), (PUBACK, 7, 0)]
    assert len(decoder.space()) == 64


def test_a_message_over_the_limit_is_announced_with_its_properties_and_passed_over():
    small = b"\x40\x02\x00\x07"
    for block, properties in (
        (b"\x00", ()),
        (b"\x05\x02\x00\x00\x00\x09", ({"message_expiry_interval": 9},)),
        (b"\x28\x03\x00\x25" + b"c" * 37, ({"content_type": "c" * 37},)),
    ):
        data, _ = _large(block, b"z" * 100000)
        expected = [(PUBACK, 7, 0), (PUBLISH, 2, 9, "t", None) + properties, (PUBACK, 7, 0)]
        stream = small + data + small
        for piece in (1, 2, 3, 7, 64, 300):
            decoder = Decoder5(64, 256)
            found = []
            for i in range(0, 300, piece):
                found += _feed(decoder, stream[i : min(i + piece, 300)])
            found += _feed(decoder, stream[300:])
            assert found == expected, (block, piece)
            assert len(decoder.space()) == 64


def test_the_payload_of_a_message_over_the_limit_can_be_taken_in_pieces():
    payload = bytes([n & 255 for n in range(20000)])
    data, head = _large(b"\x05\x02\x00\x00\x00\x09", payload)
    for step in (1, 5, 64):
        decoder = Decoder5(64, 256)
        taken = b""
        at = 0
        while at < len(data):
            space = decoder.space()
            n = min(step, len(space), len(data) - at)
            space[:n] = data[at : at + n]
            at += n
            decoder.end += n
            if not decoder.left:
                kind = decoder.next()
                assert kind == (PUBLISH if at >= len(head) else 0)
                if not kind:
                    continue
                assert decoder.payload is None and decoder.left == len(payload)
            if len(taken) < 1000:
                taken += bytes(decoder.piece())
            else:
                decoder.piece()
        assert not decoder.left and taken == payload[: len(taken)] and len(taken) >= 1000


def test_what_is_too_large_is_told_to_the_broker():
    assert _code(b"\x90\xff\xff\xff\x7f", Decoder5(64, 4096)) == 0x95
    assert _code(b"\x20\x81\x02", Decoder5(64, 256)) == 0x95
    # A topic name or properties that fit no buffer cannot be told to the program.
    assert _code(b"\x30\xff\xff\xff\x7f\xff\xffttt", Decoder5(64, 128)) == 0x95
    assert _code(b"\x30\xff\xff\xff\x7f\x00\x01t\xff\x7f", Decoder5(64, 128)) == 0x95
    assert _code(b"\x30\xff\xff\xff\x7f\x03\xe8ttt", Decoder5(64, 4096)) == 0x95
    # A head that is longer than its packet is not waited for.
    assert _code(b"\x30\x46\x00\x48", Decoder5(512, 64)) == 0x95
    assert _code(b"\x30\x46\x00\x01t\x7f", Decoder5(512, 64)) == 0x95
    # 256 MB are announced; no such buffer may be tried for.
    decoder = Decoder5(64, 4096)
    assert _feed(decoder, b"\x30\xff\xff\xff\x7f\x00\x01t\x00xx") == [(PUBLISH, 0, 0, "t", None)]
    assert len(decoder.space()) <= 64
    assert _code(b"\x30\xff\xff\xff\x7f\x00\x01t\xff\xff\xff\x7f", Decoder5(64, 4096)) == 0x95
    assert _code(b"\x30\xff\xff\xff\x7f\x00\x01t\x80\x80\x80\x80\x80\x01", Decoder5(64, 4096)) == 0x81


def test_reading_no_more_than_is_missing_takes_every_packet_and_nothing_of_the_next():
    long, _ = _large(b"\x05\x02\x00\x00\x00\x09", b"z" * 20000)
    for data in (b"\xd0\x00", b"\x40\x04\x00\x07\x00\x00", b"\x32\x07\x00\x01t\x00\x09\x00x", long, b"\xe0\x00"):
        for limit in (30000, 64):
            decoder = Decoder5(32, limit)
            stream = data + b"\x40\x02\x00\x08"
            found = []
            while len(found) < 2:
                kind = decoder.next()
                if kind:
                    found.append(kind)
                    continue
                assert decoder.missing > 0
                if not found and limit > len(data):
                    assert decoder.missing <= len(stream) - 4
                space = decoder.space()
                n = min(len(space), decoder.missing)
                space[:n] = stream[:n]
                stream = stream[n:]
                decoder.end += n
            assert found == [data[0] >> 4, PUBACK] and not stream


def test_reset_forgets_half_a_packet_of_the_last_connection():
    decoder = Decoder5()
    _feed(decoder, b"\x30\x7f\x00")
    decoder.reset()
    assert _feed(decoder, b"\x40\x02\x00\x07") == [(PUBACK, 7, 0)]
    _feed(decoder, b"\x30\xff\xff\xff\x7f\x00\x01t\x00")  # in the middle of being passed over
    decoder.reset()
    assert _feed(decoder, b"\x40\x02\x00\x07") == [(PUBACK, 7, 0)]


def test_put_functions_allocate_nothing():
    buf = bytearray(24)
    if sys.implementation.name != "micropython":
        return  # only MicroPython can forbid it
    micropython.heap_lock()
    try:
        end = wire.put_ack(buf, 0, PUBREL, 65535, 0x92)
    finally:
        micropython.heap_unlock()
    assert bytes(buf[:end]) == b"\x62\x03\xff\xff\x92"
