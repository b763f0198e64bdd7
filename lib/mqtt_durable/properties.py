"""MQTT 5 properties: a dictionary of the program <-> bytes.  Knows no state and does no I/O; loaded by version 5 only.

The names are the specification's, as "message_expiry_interval".  Values are int (flags 0 or 1), str, or bytes for
"correlation_data" and "authentication_data".  "user_properties" is a list of (name, value), both str, in their order;
"subscription_identifiers" a list of int in a PUBLISH, one int in a SUBSCRIBE.  What is decoded takes up to some twelve
times the bytes of its packet, whose size is bounded.
MQTT 5.0 section 2.2.2.
"""

from micropython import const

from .errors import ProtocolError
from .packet import _field, _packet, _text, put_fixed_header, utf8

# Types.  Of an integer: its bytes, one that is 0 or 1, 2, 4; 3 stands for a variable byte integer.
_SIZE = const(7)
_NOT_0 = const(8)  # added to the size
_TEXT = const(16)
_TOPIC = const(17)  # text that is a topic name
_DATA = const(18)
_PAIRS = const(19)

_SUBSCRIPTION = const(0x0B)
_ALIAS = const(0x23)
_SUBSCRIBE = const(8)

_NAMES = (
    "payload_format_indicator",
    "message_expiry_interval",
    "content_type",
    "response_topic",
    "correlation_data",
    "subscription_identifiers",
    "session_expiry_interval",
    "assigned_client_identifier",
    "server_keep_alive",
    "authentication_method",
    "authentication_data",
    "request_problem_information",
    "will_delay_interval",
    "request_response_information",
    "response_information",
    "server_reference",
    "reason_string",
    "receive_maximum",
    "topic_alias_maximum",
    "topic_alias",
    "maximum_qos",
    "retain_available",
    "user_properties",
    "maximum_packet_size",
    "wildcard_subscription_available",
    "subscription_identifier_available",
    "shared_subscription_available",
)
# Table 2-4, in the order of the names: identifier, type, and two bytes with a bit for each packet type that may have
# it.  Bit 0 is a will; 12 and 13, whose packets have no properties, are PUBLISH and DISCONNECT from a client.  A topic
# alias is none of the program's: it must not enter the journal.
_ROWS = (
    b"\x01\x01\x10\x09"
    b"\x02\x04\x10\x09"
    b"\x03\x10\x10\x09"
    b"\x08\x11\x10\x09"
    b"\x09\x12\x10\x09"
    b"\x0b\x0b\x01\x08"
    b"\x11\x04\x20\x06"
    b"\x12\x10\x00\x04"
    b"\x13\x02\x00\x04"
    b"\x15\x10\x80\x06"
    b"\x16\x12\x80\x06"
    b"\x17\x01\x00\x02"
    b"\x18\x04\x00\x01"
    b"\x19\x01\x00\x02"
    b"\x1a\x10\x00\x04"
    b"\x1c\x10\x40\x04"
    b"\x1f\x10\xea\xf4"
    b"\x21\x0a\x00\x06"
    b"\x22\x02\x00\x06"
    b"\x23\x0a\x00\x08"
    b"\x24\x01\x00\x04"
    b"\x25\x01\x00\x04"
    b"\x26\x13\xff\xff"
    b"\x27\x0c\x00\x06"
    b"\x28\x01\x00\x04"
    b"\x29\x01\x00\x04"
    b"\x2a\x01\x00\x04"
)


class Violation(ProtocolError):
    """The broker broke a rule of MQTT 5.  .reason_code: what DISCONNECT has to carry (section 4.13)."""

    def __init__(self, reason_code, text):
        super().__init__(text)
        self.reason_code = reason_code


def _allowed(row, packet):
    """True if a packet of that type may have the property in the row that begins at _ROWS[row]."""
    return (_ROWS[row + 2] << 8 | _ROWS[row + 3]) >> packet & 1


def _encoded(name, ident, kind, value):
    """One property with its identifier; ValueError if the value is not of its kind."""
    if kind < _TEXT:
        low = 1 if kind & _NOT_0 else 0
        kind &= _SIZE
        high = (1, 65535, 268435455, 4294967295)[kind - 1]
        if not isinstance(value, (int, bool)) or not low <= value <= high:
            raise ValueError("%s: expected an integer of %d-%d" % (name, low, high))
        if kind == 3:
            head = bytearray(5)
            return bytes(head[: put_fixed_header(head, 0, ident, value)])
        data = int(value).to_bytes(kind, "big")
    elif kind == _DATA:
        data = value.encode() if isinstance(value, str) else value
        if not isinstance(data, (bytes, bytearray, memoryview)) or len(data) > 65535:
            raise ValueError("%s: expected at most 65535 bytes" % name)
        data = _field(data)
    else:
        if not isinstance(value, (str, bytes)):
            raise ValueError("%s: expected text" % name)
        data = _text(value, name)
        if kind == _TOPIC and (not data or b"+" in data or b"#" in data):  # [MQTT-3.3.2-14]
            raise ValueError("%s: expected a topic name, which has no wildcard" % name)
        data = _field(data)
    return bytes((ident,)) + data


def encode(properties, packet, topic_alias=0):
    """Return the property length and the properties, {name: value} or None, that a client sends in a packet of type
    packet (0: in a will).  topic_alias: not 0, one for this PUBLISH.  The message expiry interval comes first, so that
    it can be changed in place.  Raises ValueError for a name, a value or a packet that does not fit.
    """
    packet = 12 if packet == 3 else 13 if packet == 14 else packet
    body = bytes((_ALIAS, topic_alias >> 8, topic_alias & 255)) if topic_alias else b""
    properties = properties or {}
    for name, value in properties.items():
        row = _NAMES.index(name) * 4 if name in _NAMES else -1
        if row < 0 or not _allowed(row, packet):
            names = ", ".join([_NAMES[i] for i in range(len(_NAMES)) if _allowed(i * 4, packet)])
            raise ValueError("properties: found %s, expected one of %s" % (name, names))
        ident = _ROWS[row]
        kind = _ROWS[row + 1]
        if kind == _PAIRS:
            for pair in value if isinstance(value, (list, tuple)) else (0,):
                if not isinstance(pair, (list, tuple)) or len(pair) != 2:
                    raise ValueError("%s: expected a list of (name, value)" % name)
                body += _encoded(name, ident, _TEXT, pair[0]) + _encoded(name, ident, _TEXT, pair[1])[1:]
        elif ident == 2:
            body = _encoded(name, ident, kind, value) + body
        else:
            body += _encoded(name, ident, kind, value)
    if "authentication_data" in properties and "authentication_method" not in properties:
        raise ValueError("authentication_data: expected with an authentication_method")
    return _packet(0, body)[1:]


def get_length(buf, at, stop):
    """Return the variable byte integer at buf[at], which ends before stop, and the offset behind it.  Section 1.5.5."""
    n = shift = 0
    while at < stop:
        byte = buf[at]
        at += 1
        n |= (byte & 127) << shift
        if byte < 128:
            if shift and not byte:
                break  # [MQTT-1.5.5-1]
            return n, at
        shift += 7
        if shift > 21:
            break
    raise Violation(0x81, "variable byte integer cut short, longer than needed or than 4 bytes")


def _data(buf, at, stop):
    """Return the two-byte length at buf[at] and the offsets where its bytes begin and end."""
    begin = at + 2
    end = begin + (buf[at] << 8 | buf[at + 1]) if begin <= stop else begin
    if end > stop:
        raise Violation(0x81, "property cut short")
    return begin, end


def _string(buf, at, stop):
    """Return the text at buf[at] and the offset behind it."""
    at, stop = _data(buf, at, stop)
    try:
        return utf8(buf[at:stop]), stop
    except ValueError as e:
        raise Violation(0x81, "property: %s" % e)


def decode(buf, at, stop, packet):
    """Return ({name: value}, offset behind them) of the properties at buf[at], property length first, in a packet of
    type packet from a server that ends at stop.  Raises ProtocolError with the reason code.
    """
    n, at = get_length(buf, at, stop)
    if n > stop - at:
        raise Violation(0x81, "property length %d, with %d bytes to come" % (n, stop - at))
    stop = at + n
    found = {}
    while at < stop:
        ident = buf[at]
        at += 1
        row = 0
        while _ROWS[row] != ident or not _allowed(row, packet):
            row += 4
            if row == len(_ROWS):
                raise Violation(0x81, "property 0x%02x in packet type %d" % (ident, packet))  # section 2.2.2.2
        name = _NAMES[row >> 2]
        kind = _ROWS[row + 1]
        if kind < _TEXT:
            if kind & _SIZE == 3:
                value, at = get_length(buf, at, stop)
            else:
                end = at + (kind & _SIZE)
                if end > stop:
                    raise Violation(0x81, "property cut short")
                value = 0
                while at < end:
                    value = value << 8 | buf[at]
                    at += 1
            if (kind & _NOT_0 and not value) or (kind == 1 and value > 1):
                raise Violation(0x94 if ident == _ALIAS else 0x82, "%s: %d" % (name, value))
        elif kind == _DATA:
            at, end = _data(buf, at, stop)
            value = bytes(buf[at:end])
            at = end
        else:
            value, at = _string(buf, at, stop)
            if kind == _PAIRS:
                second, at = _string(buf, at, stop)
                value = value, second
            elif kind == _TOPIC and (not value or "+" in value or "#" in value):
                raise Violation(0x82, "%s: no topic name" % name)
        if kind == _PAIRS or (ident == _SUBSCRIPTION and packet != _SUBSCRIBE):
            found.setdefault(name, []).append(value)
        elif name in found:
            raise Violation(0x82, "%s: twice" % name)
        else:
            found[name] = value
    if "authentication_data" in found and "authentication_method" not in found:
        raise Violation(0x82, "authentication data without a method")
    return found, at
