"""Properties of MQTT 5 against bytes typed from section 2.2.2 and the sections of the packets."""

from mqtt_durable.errors import ProtocolError
from mqtt_durable.properties import decode, encode, get_length
from raises import raises

WILL, CONNECT, CONNACK, PUBLISH, PUBACK, PUBREC, PUBREL, PUBCOMP = range(8)
SUBSCRIBE, SUBACK, UNSUBSCRIBE, UNSUBACK, _, _, DISCONNECT, AUTH = range(8, 16)
ACKS = (PUBACK, PUBREC, PUBREL, PUBCOMP)

# name, bytes, value, packets of a client that may have it, packets of a server that may
ALL = (
    ("payload_format_indicator", b"\x01\x01", 1, (WILL, PUBLISH), (PUBLISH,)),
    ("message_expiry_interval", b"\x02\x00\x01\x51\x80", 86400, (WILL, PUBLISH), (PUBLISH,)),
    ("content_type", b"\x03\x00\x03a/b", "a/b", (WILL, PUBLISH), (PUBLISH,)),
    ("response_topic", b"\x08\x00\x03r/t", "r/t", (WILL, PUBLISH), (PUBLISH,)),
    ("correlation_data", b"\x09\x00\x02\x00\xff", b"\x00\xff", (WILL, PUBLISH), (PUBLISH,)),
    ("session_expiry_interval", b"\x11\xff\xff\xff\xff", 4294967295, (CONNECT, DISCONNECT), (CONNACK,)),
    ("assigned_client_identifier", b"\x12\x00\x02id", "id", (), (CONNACK,)),
    ("server_keep_alive", b"\x13\x00\x3c", 60, (), (CONNACK,)),
    ("authentication_method", b"\x15\x00\x01m", "m", (CONNECT, AUTH), (CONNACK, AUTH)),
    ("request_problem_information", b"\x17\x00", 0, (CONNECT,), ()),
    ("will_delay_interval", b"\x18\x00\x00\x00\x05", 5, (WILL,), ()),
    ("request_response_information", b"\x19\x01", 1, (CONNECT,), ()),
    ("response_information", b"\x1a\x00\x01i", "i", (), (CONNACK,)),
    ("server_reference", b"\x1c\x00\x01s", "s", (), (CONNACK, DISCONNECT)),
    (
        "reason_string",
        b"\x1f\x00\x02no",
        "no",
        ACKS + (DISCONNECT, AUTH),
        ACKS + (CONNACK, SUBACK, UNSUBACK, DISCONNECT, AUTH),
    ),
    ("receive_maximum", b"\x21\xff\xff", 65535, (CONNECT,), (CONNACK,)),
    ("topic_alias_maximum", b"\x22\x00\x00", 0, (CONNECT,), (CONNACK,)),
    ("topic_alias", b"\x23\x00\x07", 7, (), (PUBLISH,)),
    ("maximum_qos", b"\x24\x01", 1, (), (CONNACK,)),
    ("retain_available", b"\x25\x00", 0, (), (CONNACK,)),
    (
        "user_properties",
        b"\x26\x00\x01b\x00\x01x\x26\x00\x01a\x00\x00\x26\x00\x01b\x00\x01x",
        [("b", "x"), ("a", ""), ("b", "x")],
        ACKS + (WILL, CONNECT, PUBLISH, SUBSCRIBE, UNSUBSCRIBE, DISCONNECT, AUTH),
        ACKS + (CONNACK, PUBLISH, SUBACK, UNSUBACK, DISCONNECT, AUTH),
    ),
    ("maximum_packet_size", b"\x27\x00\x00\x00\x01", 1, (CONNECT,), (CONNACK,)),
    ("wildcard_subscription_available", b"\x28\x01", 1, (), (CONNACK,)),
    ("subscription_identifier_available", b"\x29\x00", 0, (), (CONNACK,)),
    ("shared_subscription_available", b"\x2a\x01", 1, (), (CONNACK,)),
)
_CLIENT = ACKS + (WILL, CONNECT, PUBLISH, SUBSCRIBE, UNSUBSCRIBE, DISCONNECT, AUTH)
_SERVER = ACKS + (CONNACK, PUBLISH, SUBACK, UNSUBACK, DISCONNECT, AUTH)


def _block(data):
    """data behind its property length."""
    assert len(data) < 16384
    return (bytes((len(data),)) if len(data) < 128 else bytes((len(data) & 127 | 128, len(data) >> 7))) + data


def _decode(data, packet=PUBLISH):
    """What decode() makes of the properties in data, with bytes in front of and behind them."""
    block = _block(data)
    found, end = decode(memoryview(b"xx" + block + b"yyyy"), 2, 2 + len(block), packet)
    assert end == 2 + len(block)
    return found


def _code(data, packet=PUBLISH):
    return raises(ProtocolError, _decode, data, packet).reason_code


def test_every_property_has_the_bytes_of_its_section_both_ways():
    """[MQTT5-1.5.4-1] [MQTT5-3.3.2-13] [MQTT5-3.3.2-19]"""
    for name, data, value, out, into in ALL:
        for packet in out:
            assert encode({name: value}, packet) == _block(data), (name, packet)
        for packet in into:
            assert _decode(data, packet) == {name: value}, (name, packet)
    method = {"authentication_method": "m", "authentication_data": b"\x01"}
    data = b"\x15\x00\x01m\x16\x00\x01\x01"
    for packet in (CONNECT, AUTH):  # a dictionary of MicroPython has no order
        assert encode(method, packet) in (_block(data), _block(data[4:] + data[:4]))
    for packet in (CONNACK, AUTH):
        assert _decode(data, packet) == method


def test_no_properties_are_a_length_of_0():
    """[MQTT5-2.2.2-1]"""
    for packet in _CLIENT:
        assert encode({}, packet) == encode(None, packet) == b"\x00"
    for packet in _SERVER:
        assert _decode(b"", packet) == {}


def test_a_packet_takes_its_own_properties_only():
    """[MQTT5-3.3.4-6] [MQTT5-3.14.2-2]"""
    for name, data, value, out, into in ALL:
        for packet in _CLIENT:
            if packet not in out:
                text = str(raises(ValueError, encode, {name: value}, packet))
                assert name in text and "user_properties" in text, text
        for packet in _SERVER:
            if packet not in into:
                assert _code(data, packet) == 0x81, (name, packet)
    raises(ValueError, encode, {"subscription_identifiers": 1}, PUBLISH)
    raises(ValueError, encode, {"subscription_identifiers": [1]}, PUBLISH)
    assert "content_type" in str(raises(ValueError, encode, {"contenttype": "x"}, PUBLISH))
    raises(ValueError, encode, {"subscription_identifiers": 1}, UNSUBSCRIBE)
    for ident in (0, 4, 0x0A, 0x14, 0x1B, 0x20, 0x2B, 0x7F, 0x80, 0xFF):
        assert _code(bytes((ident, 0, 0, 0, 0))) == 0x81, ident


def test_subscription_identifiers_are_one_going_out_and_any_number_coming_in():
    """[MQTT5-1.5.5-1]"""
    for value, data in (
        (1, b"\x0b\x01"),
        (127, b"\x0b\x7f"),
        (128, b"\x0b\x80\x01"),
        (16384, b"\x0b\x80\x80\x01"),
        (268435455, b"\x0b\xff\xff\xff\x7f"),
    ):
        assert encode({"subscription_identifiers": value}, SUBSCRIBE) == _block(data)
        assert _decode(data) == {"subscription_identifiers": [value]}
    assert _decode(b"\x0b\x05\x0b\x80\x01\x0b\x05") == {"subscription_identifiers": [5, 128, 5]}
    assert _code(b"\x0b\x00") == 0x82
    for value in (0, 268435456, -1, "1", [1]):
        raises(ValueError, encode, {"subscription_identifiers": value}, SUBSCRIBE)


def test_message_expiry_comes_first_wherever_it_is_in_the_dictionary():
    properties = {"content_type": "t", "user_properties": [("a", "b")], "message_expiry_interval": 9}
    assert encode(properties, PUBLISH)[1:6] == b"\x02\x00\x00\x00\x09"
    assert encode(properties, PUBLISH, 5)[1:9] == b"\x02\x00\x00\x00\x09\x23\x00\x05"
    assert encode({"will_delay_interval": 1, "message_expiry_interval": 9}, WILL)[1:2] == b"\x02"
    assert encode(None, PUBLISH, 0x102) == b"\x03\x23\x01\x02"


def test_bad_values_of_the_program_are_told_with_what_is_expected():
    """[MQTT5-1.5.4-1] [MQTT5-1.5.4-2] [MQTT5-1.5.7-1] [MQTT5-3.3.2-13] [MQTT5-3.3.2-14]
    [MQTT5-3.3.2-19]
    """
    for packet, name, value, text in (
        (PUBLISH, "payload_format_indicator", 2, "0-1"),
        (PUBLISH, "payload_format_indicator", "1", "0-1"),
        (PUBLISH, "message_expiry_interval", -1, "0-4294967295"),
        (PUBLISH, "message_expiry_interval", 4294967296, "0-4294967295"),
        (PUBLISH, "message_expiry_interval", 1.5, "0-4294967295"),
        (PUBLISH, "message_expiry_interval", None, "0-4294967295"),
        (CONNECT, "receive_maximum", 0, "1-65535"),
        (CONNECT, "receive_maximum", 65536, "1-65535"),
        (CONNECT, "topic_alias_maximum", 65536, "0-65535"),
        (CONNECT, "maximum_packet_size", 0, "1-4294967295"),
        (PUBLISH, "content_type", 5, "text"),
        (PUBLISH, "content_type", "a\0", "U+0000"),
        (PUBLISH, "content_type", b"\xff", "UTF-8"),
        (PUBLISH, "content_type", b"\xed\xa0\x80", ""),
        (PUBLISH, "content_type", "x" * 65536, "65535"),
        (PUBLISH, "response_topic", "a/+", "wildcard"),
        (PUBLISH, "response_topic", "#", "wildcard"),
        (PUBLISH, "response_topic", "", "topic name"),
        (PUBLISH, "response_topic", b"\xc0\x80", ""),
        (PUBLISH, "correlation_data", 5, "65535 bytes"),
        (PUBLISH, "correlation_data", bytes(65536), "65535 bytes"),
        (PUBLISH, "user_properties", 5, "list"),
        (PUBLISH, "user_properties", {"a": "b"}, "list"),
        (PUBLISH, "user_properties", ["ab"], "list"),
        (PUBLISH, "user_properties", [("a", "b", "c")], "list"),
        (PUBLISH, "user_properties", [("a", 1)], "text"),
        (PUBLISH, "user_properties", [("a\0", "b")], "U+0000"),
        (PUBLISH, "user_properties", [("a", b"\xff")], "UTF-8"),
        (AUTH, "authentication_data", b"x", "authentication_method"),
    ):
        told = str(raises(ValueError, encode, {name: value}, packet))
        assert name in told and text in told, told


def test_text_may_be_bytes_and_data_may_be_text():
    """[MQTT5-1.5.4-3]"""
    assert encode({"content_type": b"\xef\xbb\xbf"}, PUBLISH) == b"\x06\x03\x00\x03\xef\xbb\xbf"
    assert encode({"correlation_data": "\u00e4"}, PUBLISH) == b"\x05\x09\x00\x02\xc3\xa4"
    assert encode({"user_properties": (["a", b"b"],)}, PUBLISH) == b"\x07\x26\x00\x01a\x00\x01b"
    assert encode({"retain_available": True}, CONNACK) == b"\x02\x25\x01"
    assert _decode(b"\x03\x00\x03\xef\xbb\xbf") == {"content_type": "\ufeff"}


def test_what_a_server_may_not_send_has_its_reason_code():
    """[MQTT5-1.5.4-1] [MQTT5-1.5.4-2] [MQTT5-1.5.7-1]"""
    for name, packet, data, code in (
        ("twice", PUBLISH, b"\x01\x00\x01\x00", 0x82),
        ("text twice", PUBLISH, b"\x03\x00\x00\x03\x00\x00", 0x82),
        ("data twice", PUBLISH, b"\x09\x00\x00\x09\x00\x00", 0x82),
        ("flag 2", PUBLISH, b"\x01\x02", 0x82),
        ("maximum QoS 2", CONNACK, b"\x24\x02", 0x82),
        ("receive maximum 0", CONNACK, b"\x21\x00\x00", 0x82),
        ("maximum packet size 0", CONNACK, b"\x27\x00\x00\x00\x00", 0x82),
        ("topic alias 0", PUBLISH, b"\x23\x00\x00", 0x94),
        ("data without a method", CONNACK, b"\x16\x00\x00", 0x82),
        ("data without a method", AUTH, b"\x16\x00\x01x", 0x82),
        ("wildcard in a response topic", PUBLISH, b"\x08\x00\x01+", 0x82),
        ("empty response topic", PUBLISH, b"\x08\x00\x00", 0x82),
        ("no UTF-8", PUBLISH, b"\x03\x00\x01\xff", 0x81),
        ("U+0000", PUBLISH, b"\x03\x00\x01\x00", 0x81),
        ("surrogate", PUBLISH, b"\x03\x00\x03\xed\xa0\x80", 0x81),
        ("ill-formed name of a pair", PUBLISH, b"\x26\x00\x01\xff\x00\x00", 0x81),
        ("ill-formed value of a pair", PUBLISH, b"\x26\x00\x00\x00\x01\x00", 0x81),
        ("pair without its value", PUBLISH, b"\x26\x00\x01a", 0x81),
        ("half a length", PUBLISH, b"\x03\x00", 0x81),
        ("no length", PUBLISH, b"\x03", 0x81),
        ("text longer than the block", PUBLISH, b"\x03\x00\x02a", 0x81),
        ("data longer than the block", PUBLISH, b"\x09\x00\x02a", 0x81),
        ("one byte of none", PUBLISH, b"\x01", 0x81),
        ("four bytes of three", PUBLISH, b"\x02\x00\x00\x00", 0x81),
        ("two bytes of one", CONNACK, b"\x21\x01", 0x81),
        ("identifier of none", PUBLISH, b"\x0b", 0x81),
        ("identifier cut short", PUBLISH, b"\x0b\x80", 0x81),
        ("identifier longer than needed", PUBLISH, b"\x0b\x81\x00", 0x81),
        ("identifier of 5 bytes", PUBLISH, b"\x0b\x81\x81\x81\x81\x01", 0x81),
    ):
        assert _code(data, packet) == code, name


def test_a_property_length_is_a_variable_byte_integer_within_its_packet():
    """[MQTT5-1.5.5-1]"""
    for data in (b"", b"\x80", b"\x80\x00", b"\x83\x80\x00", b"\xff\xff\xff\xff\x01", b"\x02\x01", b"\xff\x7f\x01\x01"):
        assert raises(ProtocolError, decode, data + b"\x00", 0, len(data), PUBLISH).reason_code == 0x81, data
    long = [("name", "x" * 100), ("name", "y" * 100)]
    block = encode({"user_properties": long}, PUBLISH)
    assert block[:2] == b"\xda\x01" and decode(block, 0, len(block), PUBLISH) == ({"user_properties": long}, len(block))
    for n, data in ((0, b"\x00"), (128, b"\x80\x01"), (268435455, b"\xff\xff\xff\x7f")):
        assert get_length(data, 0, len(data)) == (n, len(data))
