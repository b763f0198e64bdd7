"""The wire codec against bytes typed from the MQTT 3.1.1 specification."""

import sys

import micropython
import mqtt_durable.packet as packet
from mqtt_durable.errors import ProtocolError
from mqtt_durable.packet import CONNACK, PINGRESP, PUBACK, PUBCOMP, PUBLISH, PUBREC, PUBREL, SUBACK, UNSUBACK, Decoder
from mqtt_durable.packet5 import remaining_length_size
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
            payload = None if decoder.payload is None else bytes(decoder.payload)
            if kind == PUBLISH:
                found.append((kind, decoder.flags, decoder.packet_id, decoder.topic, payload))
            elif kind == CONNACK:
                found.append((kind, decoder.session_present, decoder.return_code))
            elif kind == SUBACK:
                found.append((kind, decoder.packet_id, payload))
            elif kind == PINGRESP:
                found.append((kind,))
            else:
                found.append((kind, decoder.packet_id))
    return found


# -- encoding


def test_remaining_length_takes_the_bytes_of_table_2_4():
    for length, size, field in (
        (0, 1, b"\x00"),
        (127, 1, b"\x7f"),
        (128, 2, b"\x80\x01"),
        (16383, 2, b"\xff\x7f"),
        (16384, 3, b"\x80\x80\x01"),
        (2097151, 3, b"\xff\xff\x7f"),
        (2097152, 4, b"\x80\x80\x80\x01"),
        (268435455, 4, b"\xff\xff\xff\x7f"),
    ):
        buf = bytearray(8)
        assert remaining_length_size(length) == size
        end = packet.put_fixed_header(buf, 1, 0x30, length)
        assert end == 2 + size
        assert bytes(buf[1:end]) == b"\x30" + field, length


def test_acknowledgements_have_the_flags_of_table_2_2():
    """[MQTT-2.2.2-1] [MQTT-3.6.1-1]"""
    for kind, data in (
        (PUBACK, b"\x40\x02\x12\x34"),
        (PUBREC, b"\x50\x02\x12\x34"),
        (PUBREL, b"\x62\x02\x12\x34"),
        (PUBCOMP, b"\x70\x02\x12\x34"),
    ):
        buf = bytearray(6)
        assert packet.put_ack(buf, 1, kind, 0x1234) == 5
        assert bytes(buf) == b"\x00" + data + b"\x00"


def test_connect_has_the_bytes_of_section_3_1():
    """[MQTT-3.1.2-9] [MQTT-3.1.3-1]"""
    for args, data in (
        (("a", True, 0), b"\x10\x0d\x00\x04MQTT\x04\x02\x00\x00\x00\x01a"),
        (("a", False, 10), b"\x10\x0d\x00\x04MQTT\x04\x00\x00\x0a\x00\x01a"),
        (("", True, 65535), b"\x10\x0c\x00\x04MQTT\x04\x02\xff\xff\x00\x00"),
        # Figure 3.6 and its example: user name, password, will at QoS 1, clean session, keep alive 10.
        (
            ("c", True, 10, "u", "p", ("w", b"m", 1, False)),
            b"\x10\x19\x00\x04MQTT\x04\xce\x00\x0a\x00\x01c\x00\x01w\x00\x01m\x00\x01u\x00\x01p",
        ),
        (
            ("c", False, 1, "u", None, ("w", "", 2, True)),
            b"\x10\x15\x00\x04MQTT\x04\xb4\x00\x01\x00\x01c\x00\x01w\x00\x00\x00\x01u",
        ),
        (("c", True, 1, "", b"\xff\x00"), b"\x10\x13\x00\x04MQTT\x04\xc2\x00\x01\x00\x01c\x00\x00\x00\x02\xff\x00"),
    ):
        assert packet.encode_connect(*args) == data, args


def test_connect_refuses_what_the_broker_would():
    """[MQTT-3.1.2-14] [MQTT-3.1.2-22] [MQTT-3.1.3-7]"""
    for args in (
        ("", False, 0),
        ("a", True, -1),
        ("a", True, 65536),
        ("a", True, 0, None, "p"),
        ("a\0", True, 0),
        (b"\xff", True, 0),
        ("x" * 65536, True, 0),
        ("a", True, 0, "u" * 65536),
        ("a", True, 0, "u", b"p" * 65536),
        ("a", True, 0, None, None, ("w", b"", 3, False)),
        ("a", True, 0, None, None, ("w/#", b"", 1, False)),
        ("a", True, 0, None, None, ("", b"", 1, False)),
        ("a", True, 0, None, None, ("w", b"m" * 65536, 1, False)),
    ):
        raises(ValueError, packet.encode_connect, *args)


def test_publish_at_qos_0_has_no_packet_identifier():
    """[MQTT-2.3.1-5] [MQTT-3.3.1-2] [MQTT-4.3.1-1]"""
    assert packet.encode_publish(b"a/b", b"21.5") == b"\x30\x09\x00\x03a/b21.5"
    assert packet.encode_publish(b"a/b", b"", True) == b"\x31\x05\x00\x03a/b"
    assert packet.encode_publish(b"t", b"x" * 125) == b"\x30\x80\x01\x00\x01t" + b"x" * 125


def test_subscribe_and_unsubscribe_have_the_bytes_of_sections_3_8_and_3_10():
    """[MQTT-3.8.1-1] [MQTT-3.8.3-3] [MQTT-3.10.1-1] [MQTT-3.10.3-2]"""
    assert packet.encode_subscribe(10, b"a/b", 1) == b"\x82\x08\x00\x0a\x00\x03a/b\x01"
    assert packet.encode_unsubscribe(0x100, b"c/d") == b"\xa2\x07\x01\x00\x00\x03c/d"


def test_pingreq_and_disconnect_have_two_bytes():
    """[MQTT-2.2.2-1]"""
    assert packet.PINGREQ_BYTES == b"\xc0\x00" and packet.DISCONNECT_BYTES == b"\xe0\x00"


# -- text, topics, filters

_ILL_FORMED = (
    b"\xff",
    b"\xc3",
    b"a\x80",
    b"\xc0\x80",  # U+0000, overlong
    b"\xc1\xbf",
    b"\xe0\x9f\xbf",  # overlong
    b"\xf0\x8f\xbf\xbf",  # overlong
    b"\xed\xa0\x80",  # U+D800
    b"\xed\xbf\xbf",  # U+DFFF
    b"\xf4\x90\x80\x80",  # U+110000
    b"\xe2\x82",
    b"\xf8\x88\x80\x80\x80",
    b"\0",
    b"a\0b",
)
_WELL_FORMED = (
    b"plain",
    b"\xc2\x80",
    b"\xdf\xbf",
    b"\xe0\xa0\x80",
    b"\xed\x9f\xbf",
    b"\xee\x80\x80",
    b"\xef\xbb\xbf",  # U+FEFF is never stripped [MQTT-1.5.3-3]
    b"\xf0\x90\x80\x80",
    b"\xf4\x8f\xbf\xbf",
    b"\xf0\xaa\x9b\x94",  # section 1.5.3's own example
)


def test_text_is_the_utf_8_of_mqtt_on_every_interpreter():
    """[MQTT-1.5.3-1] [MQTT-1.5.3-2] [MQTT-1.5.3-3]"""
    for data in _ILL_FORMED:
        raises(ValueError, packet.utf8, data)
        raises(ValueError, packet.utf8, memoryview(data))
    for data in _WELL_FORMED:
        assert packet.utf8(data).encode() == data
        assert packet.utf8(memoryview(data)).encode() == data


def test_topic_names_and_filters_are_checked():
    """[MQTT-3.3.2-2] [MQTT-3.8.3-1] [MQTT-3.8.3-3] [MQTT-3.10.3-1] [MQTT-3.10.3-2] [MQTT-4.7.1-1]
    [MQTT-4.7.1-2] [MQTT-4.7.1-3] [MQTT-4.7.3-1] [MQTT-4.7.3-2] [MQTT-4.7.3-3]
    """
    for good in ("a", "/", "a//b", "$SYS/x", " ", "\u00e4/\U0002a6d4", "a" * 65535):
        assert packet.check_topic(good) == good.encode() == packet.check_topic(good.encode())
        assert packet.check_filter(good) == good.encode()
    for bad in ("", "a\0", b"\xff", "a" * 65536):
        raises(ValueError, packet.check_topic, bad)
        raises(ValueError, packet.check_filter, bad)
    for wild in ("#", "+", "a/#", "a/+/b", "+/+", "/+", "+/"):
        raises(ValueError, packet.check_topic, wild)
        assert packet.check_filter(wild) == wild.encode()
    for wild in ("a#", "#/a", "a/#/b", "a+", "+a", "a/b+/c", "##", "++"):
        raises(ValueError, packet.check_topic, wild)
        raises(ValueError, packet.check_filter, wild)


def test_filters_match_as_section_4_7_says():
    """[MQTT-4.7.1-1] [MQTT-4.7.1-2] [MQTT-4.7.1-3]"""
    for topic_filter, topic_name, expected in (
        ("sport/tennis/player1/#", "sport/tennis/player1", True),
        ("sport/tennis/player1/#", "sport/tennis/player1/ranking", True),
        ("sport/tennis/player1/#", "sport/tennis/player1/score/wimbledon", True),
        ("sport/tennis/player1/#", "sport/tennis/player2", False),
        ("sport/#", "sport", True),
        ("sport/#", "sports", False),
        ("#", "sport/tennis", True),
        ("#", "/", True),
        ("sport/tennis/+", "sport/tennis/player1", True),
        ("sport/tennis/+", "sport/tennis/player1/ranking", False),
        ("sport/+", "sport", False),
        ("sport/+", "sport/", True),
        ("+/+", "/finance", True),
        ("/+", "/finance", True),
        ("+", "/finance", False),
        ("+/#", "a", True),
        ("+/a/#", "x/a", True),
        ("#", "$SYS/a", False),
        ("+/monitor/Clients", "$SYS/monitor/Clients", False),
        ("$SYS/#", "$SYS/a", True),
        ("$SYS/monitor/+", "$SYS/monitor/Clients", True),
        ("ACCOUNTS", "Accounts", False),
        ("/finance", "finance", False),
        ("a/b", "a/b", True),
        ("a/b", "a", False),
        ("a", "a/b", False),
        ("a//b", "a//b", True),
        ("a/+/b", "a//b", True),
    ):
        assert packet.matches(topic_filter, topic_name) == expected, (topic_filter, topic_name)


# -- decoding

_PACKETS = (
    (b"\x20\x02\x00\x00", (CONNACK, False, 0)),
    (b"\x20\x02\x01\x00", (CONNACK, True, 0)),
    (b"\x20\x02\x00\x05", (CONNACK, False, 5)),
    (b"\x40\x02\x00\x01", (PUBACK, 1)),
    (b"\x50\x02\xff\xff", (PUBREC, 65535)),
    (b"\x62\x02\x01\x00", (PUBREL, 256)),
    (b"\x70\x02\x12\x34", (PUBCOMP, 0x1234)),
    (b"\x90\x03\x00\x0a\x80", (SUBACK, 10, b"\x80")),
    (b"\x90\x06\x00\x0a\x00\x01\x02\x80", (SUBACK, 10, b"\x00\x01\x02\x80")),
    (b"\xb0\x02\x00\x0a", (UNSUBACK, 10)),
    (b"\xd0\x00", (PINGRESP,)),
    (b"\x30\x05\x00\x03a/b", (PUBLISH, 0, 0, "a/b", b"")),
    (b"\x31\x06\x00\x03a/bx", (PUBLISH, 1, 0, "a/b", b"x")),
    (b"\x32\x09\x00\x03a/b\x00\x0a\x00\xff", (PUBLISH, 2, 10, "a/b", b"\x00\xff")),
    (b"\x3d\x07\x00\x03a/b\x00\x0a", (PUBLISH, 13, 10, "a/b", b"")),
    (b"\x3a\x88\x01\x00\x01t\x01\x00" + b"y" * 131, (PUBLISH, 10, 256, "t", b"y" * 131)),
    (b"\x30\x04\x00\x02\xc3\xa4", (PUBLISH, 0, 0, "\u00e4", b"")),
)


def test_every_packet_of_a_server_is_decoded():
    for data, expected in _PACKETS:
        assert _feed(Decoder(), data) == [expected], data


def test_a_stream_is_decoded_alike_however_it_is_cut():
    """[MQTT-7.1.2-1]"""
    stream = b"".join([data for data, _ in _PACKETS])
    expected = [fields for _, fields in _PACKETS]
    for size in (8, 9, 10, 16, 64, 512):
        for piece in (1, 2, 3, 4, 5, 9, 64, len(stream)):
            decoder = Decoder(size)
            found = []
            for i in range(0, len(stream), piece):
                found += _feed(decoder, stream[i : i + piece])
            assert found == expected, (size, piece)


def test_every_prefix_of_a_packet_needs_more():
    for data, expected in _PACKETS:
        for n in range(len(data)):
            decoder = Decoder(16)
            assert _feed(decoder, data[:n]) == [], (data, n)
            assert _feed(decoder, data[n:]) == [expected], (data, n)


def test_the_dup_flag_and_the_qos_can_be_read():
    decoder = Decoder()
    _feed(decoder, b"\x3c\x05\x00\x01t\x00\x01")
    assert decoder.flags == 0x0C


def test_what_no_server_may_send_is_a_protocol_error():
    """[MQTT-1.5.3-1] [MQTT-1.5.3-2] [MQTT-2.2.2-2] [MQTT-3.2.2-4] [MQTT-3.3.1-2] [MQTT-3.3.1-4] [MQTT-3.3.2-1]
    [MQTT-3.3.2-2] [MQTT-3.6.1-1] [MQTT-3.9.3-2] [MQTT-4.7.3-1]
    """
    for name, data in (
        ("type 0", b"\x00\x00"),
        ("CONNECT", b"\x10\x00"),
        ("SUBSCRIBE", b"\x82\x08\x00\x0a\x00\x03a/b\x01"),
        ("UNSUBSCRIBE", b"\xa2\x07\x00\x0a\x00\x03a/b"),
        ("PINGREQ", b"\xc0\x00"),
        ("DISCONNECT", b"\xe0\x00"),
        ("type 15", b"\xf0\x00"),
        ("flags in CONNACK", b"\x21\x02\x00\x00"),
        ("flags in PUBACK", b"\x42\x02\x00\x01"),
        ("flags in PUBREC", b"\x52\x02\x00\x01"),
        ("no flags in PUBREL", b"\x60\x02\x00\x01"),
        ("flags in PUBCOMP", b"\x71\x02\x00\x01"),
        ("flags in SUBACK", b"\x92\x03\x00\x01\x00"),
        ("flags in UNSUBACK", b"\xb2\x02\x00\x01"),
        ("flags in PINGRESP", b"\xd1\x00"),
        ("long PINGRESP", b"\xd0\x01"),
        ("short CONNACK", b"\x20\x01"),
        ("long CONNACK", b"\x20\x03"),
        ("long PUBACK", b"\x40\x03"),
        ("short PUBREL", b"\x62\x01"),
        ("remaining length of 5 bytes", b"\x30\xff\xff\xff\xff"),
        ("CONNACK with reserved flags", b"\x20\x02\x02\x00"),
        ("session present in a refusal", b"\x20\x02\x01\x02"),
        ("packet identifier 0 in PUBACK", b"\x40\x02\x00\x00"),
        ("packet identifier 0 in PUBREL", b"\x62\x02\x00\x00"),
        ("packet identifier 0 in PUBLISH", b"\x32\x05\x00\x01t\x00\x00"),
        ("packet identifier 0 in SUBACK", b"\x90\x03\x00\x00\x00"),
        ("SUBACK without a code", b"\x90\x02\x00\x01"),
        ("SUBACK of 1 byte", b"\x90\x01\x00"),
        ("SUBACK of 0 bytes", b"\x90\x00"),
        ("SUBACK code 3", b"\x90\x03\x00\x01\x03"),
        ("SUBACK code 129", b"\x90\x04\x00\x01\x00\x81"),
        ("QoS 3", b"\x36\x05\x00\x01t\x00\x01"),
        ("DUP at QoS 0", b"\x38\x03\x00\x01t"),
        ("PUBLISH of 0 bytes", b"\x30\x00"),
        ("PUBLISH of 1 byte", b"\x30\x01\x00"),
        ("empty topic name", b"\x30\x02\x00\x00"),
        ("topic name longer than the packet", b"\x30\x03\x00\x02t"),
        ("no room for a packet identifier", b"\x32\x04\x00\x01t\x00"),
        ("wildcard + in a topic name", b"\x30\x03\x00\x01+"),
        ("wildcard # in a topic name", b"\x30\x05\x00\x03a/#"),
        ("U+0000 in a topic name", b"\x30\x03\x00\x01\x00"),
        ("surrogate in a topic name", b"\x30\x05\x00\x03\xed\xa0\x80"),
        ("no UTF-8 in a topic name", b"\x30\x03\x00\x01\xff"),
    ):
        try:
            found = _feed(Decoder(), data)
        except ProtocolError:
            continue
        raise AssertionError("%s passed as %s" % (name, found))


def test_a_packet_larger_than_the_buffer_arrives_whole_and_the_buffer_shrinks_again():
    decoder = Decoder(64, 4096)
    large = b"\x30\xe8\x07\x00\x01t" + b"z" * 997
    small = b"\x40\x02\x00\x07"
    assert _feed(decoder, large + small) == [(PUBLISH, 0, 0, "t", b"z" * 997), (PUBACK, 7)]
    assert len(decoder.space()) == 64


def test_a_message_over_the_limit_is_announced_and_passed_over():
    decoder = Decoder(64, 256)
    body = b"\x00\x01t\x00\x09" + b"z" * 100000
    length = len(body)
    head = bytes((0x34, length & 127 | 128, length >> 7 & 127 | 128, length >> 14))
    small = b"\x40\x02\x00\x07"
    assert _feed(decoder, small + head + body + small) == [(PUBACK, 7), (PUBLISH, 4, 9, "t", None), (PUBACK, 7)]
    assert len(decoder.space()) == 64


def test_the_payload_of_a_message_over_the_limit_can_be_taken_in_pieces_up_to_any_point():
    payload = bytes([n & 255 for n in range(1000)])
    body = b"\x00\x01t\x00\x09" + payload
    stream = b"\x34" + bytes((len(body) & 127 | 128, len(body) >> 7)) + body + b"\x40\x02\x00\x07"
    for step in (1, 2, 7, 63, 64):
        for most in (0, 1, 500, 1000):
            decoder = Decoder(64, 256)
            taken = b""
            found = []
            at = 0
            while at < len(stream):
                space = decoder.space()
                n = min(step, len(space), len(stream) - at)
                space[:n] = stream[at : at + n]
                at += n
                decoder.end += n
                if not (decoder.left and len(taken) < most):
                    kind = decoder.next()
                    if not kind:
                        continue
                    found.append(kind)
                    if kind != PUBLISH:
                        continue
                    assert decoder.payload is None and decoder.left == 1000 and decoder.packet_id == 9
                    if not most:
                        continue
                taken += decoder.piece()
                assert len(taken) + decoder.left == 1000
            while decoder.next():
                found.append(decoder.type)
            assert found == [PUBLISH, PUBACK] and taken == payload[: len(taken)] and len(taken) >= most


def test_the_limit_is_checked_before_anything_is_allocated():
    # 256 MB are announced; no such buffer may be tried for.
    decoder = Decoder(64, 4096)
    assert _feed(decoder, b"\x30\xff\xff\xff\x7f\x00\x01txx") == [(PUBLISH, 0, 0, "t", None)]
    assert len(decoder.space()) <= 64
    raises(ProtocolError, _feed, Decoder(64, 4096), b"\x90\xff\xff\xff\x7f")
    # A topic name that fits no buffer cannot be told to the program.
    raises(ProtocolError, _feed, Decoder(64, 128), b"\x30\xff\xff\xff\x7f\xff\xffttt")


def test_reading_no_more_than_is_missing_takes_every_packet_and_nothing_of_the_next():
    long = b"\x30\xac\x02\x00\x01t" + b"z" * 297
    for data in (b"\xd0\x00", b"\x40\x02\x00\x07", b"\x32\x06\x00\x01t\x00\x09x", long, b"\x90\x03\x00\x05\x01"):
        for limit in (4096, 64):  # the second: too large, and passed over
            decoder = Decoder(32, limit)
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
    decoder = Decoder()
    _feed(decoder, b"\x30\x7f\x00")
    decoder.reset()
    assert _feed(decoder, b"\x40\x02\x00\x07") == [(PUBACK, 7)]
    _feed(decoder, b"\x30\xff\xff\xff\x7f\x00\x01t")  # in the middle of being passed over
    decoder.reset()
    assert _feed(decoder, b"\x40\x02\x00\x07") == [(PUBACK, 7)]


def test_put_functions_allocate_nothing():
    buf = bytearray(16)
    if sys.implementation.name != "micropython":
        packet.put_ack(buf, 0, PUBREL, 65535)
        return  # only MicroPython can forbid it
    micropython.heap_lock()
    try:
        packet.put_ack(buf, 0, PUBREL, 65535)
        packet.put_fixed_header(buf, 4, 0x32, 16384)
        remaining_length_size(16384)
    finally:
        micropython.heap_unlock()
    assert bytes(buf[:8]) == b"\x62\x02\xff\xff\x32\x80\x80\x01"
