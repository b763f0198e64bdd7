"""MQTT 5 on the wire: the calls of packet.py for version 5, which take properties as well.  Loaded by version 5 only.

Knows no state but the topic aliases of the connection and does no I/O; nothing here survives power loss.

A PUBLISH at QoS 1 or 2 is put_publish_head() as in packet.py, with the encoded properties in front of its payload.
All lengths are in bytes, all integers big endian (MQTT 5.0 section 1.5).
"""

from micropython import const

from . import packet
from .errors import ProtocolError
from .packet import (  # noqa: F401
    DISCONNECT_BYTES,
    PINGREQ_BYTES,
    _field,
    _packet,
    check_topic,
    put_fixed_header,
    put_publish_head,
    utf8,
)
from .properties import Violation, decode, encode

_WILL = const(0)
_CONNECT = const(1)
_CONNACK = const(2)
_PUBLISH = const(3)
_PUBACK = const(4)
_PUBREC = const(5)
_PUBREL = const(6)
_PUBCOMP = const(7)
_SUBSCRIBE = const(8)
_SUBACK = const(9)
_UNSUBSCRIBE = const(10)
_UNSUBACK = const(11)
_PINGRESP = const(13)
DISCONNECT = const(14)
AUTH = const(15)

# The reason codes that each packet may carry from a server (sections 2.4, 3.2.2.2, 3.4.2.1 to 3.7.2.1, 3.9.3, 3.11.3,
# 3.14.2.1, 3.15.2.1), those of an acknowledgement from a client, too.
_ACK = b"\x00\x10\x80\x83\x87\x90\x91\x97\x99"
_REASONS = {
    _CONNACK: b"\x00\x80\x81\x82\x83\x84\x85\x86\x87\x88\x89\x8a\x8c\x90\x95\x97\x99\x9a\x9b\x9c\x9d\x9f",
    _PUBACK: _ACK,
    _PUBREC: _ACK,
    _PUBREL: b"\x00\x92",
    _PUBCOMP: b"\x00\x92",
    _SUBACK: b"\x00\x01\x02\x80\x83\x87\x8f\x91\x97\x9e\xa1\xa2",
    _UNSUBACK: b"\x00\x11\x80\x83\x87\x8f\x91",
    DISCONNECT: b"\x00\x80\x81\x82\x83\x87\x89\x8b\x8c\x8d\x8e\x8f\x90\x93\x94\x95\x96\x97\x98\x99\x9a\x9b\x9c\x9d"
    b"\x9e\x9f\xa0\xa1\xa2",
    AUTH: b"\x00\x18",
}
_DISCONNECT_OUT = b"\x00\x04\x80\x81\x82\x83\x90\x93\x94\x95\x96\x97\x98\x99"
_NONE = {}  # the properties of a packet without any; nobody's to change


def remaining_length_size(length):
    """Bytes that the remaining length field takes for a remaining length of length bytes: 1-4."""
    return 1 if length < 128 else 2 if length < 16384 else 3 if length < 2097152 else 4


def check_filter(topic_filter):
    """Return topic_filter (str or bytes), which may be a shared subscription's, as UTF-8 bytes.

    Raises ValueError as packet.check_filter() does, and for "$share/" without a name or a filter behind it, or with a
    wildcard in the name.  MQTT 5.0 section 4.8.2.
    """
    data = packet.check_filter(topic_filter)
    if data.startswith(b"$share/"):
        parts = data.split(b"/", 2)
        if len(parts) < 3 or not parts[1] or not parts[2] or parts[1] == b"+":
            raise ValueError("topic filter: expected $share/NAME/FILTER, + and # not in NAME")
    return data


def matches(topic_filter, topic_name):
    """True if topic_name matches topic_filter, which may be a shared subscription's; both valid and both str."""
    if topic_filter.startswith("$share/"):
        topic_filter = topic_filter.split("/", 2)[2]
    return packet.matches(topic_filter, topic_name)


def subscription_options(topic_filter, qos, no_local=False, retain_as_published=False, retain_handling=0):
    """Return the options byte of a subscription to topic_filter (checked UTF-8 bytes).  MQTT 5.0 section 3.8.3.1.

    retain_handling: 0 sends retained messages, 1 only for a new subscription, 2 none.
    Raises ValueError for a bad value and for no_local on a shared subscription.
    """
    if qos not in (0, 1, 2):
        raise ValueError("qos: not 0, 1 or 2")
    if retain_handling not in (0, 1, 2):
        raise ValueError("retain_handling: not 0, 1 or 2")
    if no_local and topic_filter.startswith(b"$share/"):
        raise ValueError("no_local: not on a shared subscription")  # [MQTT-3.8.3-4]
    return qos | (4 if no_local else 0) | (8 if retain_as_published else 0) | retain_handling << 4


def put_ack(buf, off, packet_type, packet_id, reason_code=0):
    """Write a PUBACK, PUBREC, PUBREL or PUBCOMP, 4 bytes, or 5 with a reason code; return the next offset.

    Raises ValueError for a reason code that the packet does not have.  MQTT 5.0 sections 3.4-3.7.
    """
    end = packet.put_ack(buf, off, packet_type, packet_id)
    if reason_code:
        if reason_code not in _REASONS[packet_type]:
            raise ValueError("reason code 0x%02x in packet type %d" % (reason_code, packet_type))
        buf[off + 1] = 3
        buf[end] = reason_code
        end += 1
    return end


def encode_connect(client_id, clean_start, keep_alive_s, username=None, password=None, will=None, properties=None):
    """Return a CONNECT.  MQTT 5.0 section 3.1.

    client_id: str or bytes; empty lets the broker assign one.  keep_alive_s: 0-65535, 0 is off.
    will: None or (topic_name, payload, qos, retain[, properties]).  A password needs no username.
    Raises ValueError for a bad argument.
    """
    will_properties = b""
    if will is not None:
        will_properties = encode(will[4] if len(will) > 4 else None, _WILL)
        will = will[:4]
    block = encode(properties, _CONNECT)
    return packet.encode_connect(
        client_id, clean_start, keep_alive_s, username, password, will, block, will_properties
    )


def encode_publish(topic_name, payload, retain=False, properties=None, topic_alias=0):
    """Return a whole QoS 0 PUBLISH.  topic_name: checked UTF-8 bytes, empty where the broker knows the topic alias, if
    that is not 0.  Raises ValueError for bad properties.  MQTT 5.0 section 3.3.
    """
    block = encode(properties, _PUBLISH, topic_alias)
    return _packet(0x31 if retain else 0x30, _field(topic_name) + block + payload)


def _request(packet_id, block, topic_filter):
    return bytes((packet_id >> 8, packet_id & 255)) + block + _field(topic_filter)


def encode_subscribe(packet_id, topic_filter, options, properties=None):
    """Return a SUBSCRIBE for one filter (checked UTF-8 bytes).  options: from subscription_options().
    Raises ValueError for bad properties.  MQTT 5.0 section 3.8.
    """
    block = encode(properties, _SUBSCRIBE)
    return _packet(0x82, _request(packet_id, block, topic_filter) + bytes((options,)))


def encode_unsubscribe(packet_id, topic_filter, properties=None):
    """Return an UNSUBSCRIBE for one filter (checked UTF-8 bytes).  Raises ValueError for bad properties.
    MQTT 5.0 section 3.10.
    """
    block = encode(properties, _UNSUBSCRIBE)
    return _packet(0xA2, _request(packet_id, block, topic_filter))


def encode_disconnect(reason_code=0, properties=None):
    """Return a DISCONNECT.  Raises ValueError for a reason code that is not a client's or for bad properties.
    MQTT 5.0 section 3.14.
    """
    if reason_code not in _DISCONNECT_OUT:
        raise ValueError("reason code 0x%02x in DISCONNECT" % reason_code)
    if properties:
        return _packet(0xE0, bytes((reason_code,)) + encode(properties, DISCONNECT))
    return _packet(0xE0, bytes((reason_code,))) if reason_code else DISCONNECT_BYTES


def encode_auth(reason_code, properties):
    """Return an AUTH.  reason_code: 0x18 goes on with an authentication, 0x19 begins another.
    Raises ValueError for another one, for bad properties or without an authentication_method.  MQTT 5.0 section 3.15.
    """
    if reason_code not in (0x18, 0x19):
        raise ValueError("reason code 0x%02x in AUTH" % reason_code)
    if "authentication_method" not in properties:
        raise ValueError("properties: expected an authentication_method")
    return _packet(0xF0, bytes((reason_code,)) + encode(properties, AUTH))


class Decoder5(packet.Decoder):
    """Cuts the stream from a broker that speaks MQTT 5 into packets; see packet.Decoder.

    Fields besides those: .reason_code, 0 where a packet has none, and .properties, a dictionary; an empty one is not to
    be changed.  SUBACK and UNSUBACK leave their reason codes in .payload.  A topic alias is resolved here, it is not
    among the properties.  A ProtocolError carries the .reason_code for DISCONNECT.

    topic_alias_maximum: what CONNECT tells the broker; each alias keeps a topic name in RAM until reset().
    problem_information: False if CONNECT asks the broker for none.
    """

    _own = True

    def __init__(self, size=512, limit=4096, topic_alias_maximum=0, problem_information=True):
        self.topic_alias_maximum = topic_alias_maximum
        self.problem_information = problem_information
        super().__init__(size, limit)

    def reset(self):
        """Forget all bytes and topic aliases: a new connection begins."""
        super().reset()
        self._aliases = {}
        self.reason_code = 0
        self.properties = _NONE

    def next(self):
        """Return the type of the next whole packet, or 0 when more bytes are needed.

        Raises ProtocolError for what no MQTT 5 server may send; the connection is then of no more use.
        """
        self.properties = _NONE
        self.reason_code = 0
        at = self.start
        if self.end - at > 4 and not self.left:
            # What is usual as well: a PUBACK, PUBREC or PUBCOMP with a reason code.
            buf = self._buf
            kind = buf[at] >> 4
            if buf[at + 1] == 3 and (kind == _PUBACK or kind == _PUBREC or kind == _PUBCOMP) and not buf[at] & 15:
                packet_id = buf[at + 2] << 8 | buf[at + 3]
                if packet_id and buf[at + 4] in _REASONS[kind]:
                    self.reason_code = buf[at + 4]
                    self.start = at + 5
                    self.flags = 0
                    self.packet_id = packet_id
                    self.type = kind
                    return kind
        try:
            return super().next()
        except Violation:
            raise
        except ProtocolError as e:  # flags [MQTT-2.1.3-1] or remaining length
            raise Violation(0x81, str(e))

    def _oversize(self, first, i, length):
        """Parse the packet of length bytes behind i, when it is whole or, if it is over the limit, when its head is."""
        kind = first >> 4
        if kind != _PUBLISH and kind != _PINGRESP and kind not in _REASONS:
            raise Violation(0x82, "packet type %d from a server" % kind)
        at = self.start
        have = self.end - i
        # The last byte of a remaining length that is longer than needed is 0, of no length at all behind 0x80.
        if not self._buf[i - 1] and (length or self._buf[i - 2] == 128):
            raise Violation(0x81, "remaining length longer than needed")  # [MQTT-1.5.5-1]
        total = i - at + length
        need = length
        if total > self._limit:
            need = self._head(i, have, first & 6)
            if kind != _PUBLISH or i - at + need > min(self._limit, self._size):
                raise Violation(0x95, "packet type %d of %d bytes" % (kind, total))
        self.missing = need - have
        if have < need:
            if i - at + need > len(self._buf):
                grown = memoryview(bytearray(total))
                grown[: self.end - at] = self._buf[at : self.end]
                self._buf = grown
                self.start = 0
                self.end -= at
            return 0
        stop = i + length
        self.type = kind
        self.flags = first & 15
        if kind == _PUBLISH:
            at = self._publish_head(i, stop)
            if total > self._limit:
                self.payload = None
                self.start = at
                self.left = stop - at
                return kind
            self.payload = self._buf[at:stop]
        else:
            self._parse(kind, i, stop)
        self.start = stop
        return kind

    def _head(self, i, have, qos):
        """Return the bytes that a PUBLISH has in front of its payload, at least; exactly, when have is as many."""
        buf = self._buf
        head = 2
        if have >= 2:
            head = 3 + (buf[i] << 8 | buf[i + 1]) + (2 if qos else 0)
            at = i + head - 1  # the property length
            n = shift = 0
            while at < i + have and shift < 28:
                n |= (buf[at] & 127) << shift
                shift += 7
                at += 1
                if buf[at - 1] < 128:
                    return at - i + n
                head += 1
        return head

    def _identifier(self, i):
        self.packet_id = self._buf[i] << 8 | self._buf[i + 1]
        if not self.packet_id:
            raise Violation(0x82, "packet identifier 0")
        return i + 2

    def _parse(self, kind, i, stop):
        """Parse what is no PUBLISH."""
        buf = self._buf
        self.packet_id = -1  # where there is none
        codes = kind == _SUBACK or kind == _UNSUBACK
        if kind == _CONNACK:
            if stop - i == 2 and buf[i + 1] == 1:
                # A server that knows MQTT 3.1.1 alone says so in its own way.
                self.session_present = False
                self.reason_code = 0x84
                return
            if i < stop and buf[i] > 1:
                raise Violation(0x81, "CONNACK flags %d" % buf[i])  # [MQTT-3.2.2-1]
            self.session_present = i < stop and buf[i] == 1
            i += 1
        elif kind < _PINGRESP:
            if stop - i < 2:
                raise Violation(0x81, "packet type %d without a packet identifier" % kind)
            i = self._identifier(i)
        if i < stop and not codes and kind != _PINGRESP:
            self.reason_code = buf[i]
            if buf[i] not in _REASONS[kind]:
                raise Violation(0x82, "reason code 0x%02x in packet type %d" % (buf[i], kind))
            i += 1
        if kind == _CONNACK and self.session_present and self.reason_code:
            raise Violation(0x82, "session present with reason code 0x%02x" % self.reason_code)  # [MQTT-3.2.2-6]
        if kind != _PINGRESP and (i < stop or codes or kind == _CONNACK):
            found, i = decode(buf, i, stop, kind)
            self.properties = found
            if not self.problem_information and kind != _CONNACK and kind != DISCONNECT:
                if "reason_string" in found or "user_properties" in found:
                    raise Violation(0x82, "problem information that was not asked for")  # [MQTT-3.1.2-29]
        if kind == AUTH and (self.reason_code or self.properties) and "authentication_method" not in self.properties:
            raise Violation(0x82, "AUTH without an authentication method")
        if codes:
            self.payload = buf[i:stop]
            if i == stop:
                raise Violation(0x81, "packet type %d without a reason code" % kind)
            for code in self.payload:
                if code not in _REASONS[kind]:
                    raise Violation(0x82, "reason code 0x%02x in packet type %d" % (code, kind))
        elif i != stop:
            raise Violation(0x81, "%d bytes behind packet type %d" % (stop - i, kind))

    def _publish_head(self, i, stop):
        """Parse topic name, packet identifier and properties at i; return the offset of the payload."""
        buf = self._buf
        qos = self.flags & 6
        n = buf[i] << 8 | buf[i + 1] if i + 2 <= stop else stop
        i += 2
        if i + n + (2 if qos else 0) > stop:
            raise Violation(0x81, "PUBLISH cut short")
        if n and buf[i : i + n] != self.name:  # else it is that of the message before
            self._new_name(buf[i : i + n])
        i += n
        self.packet_id = 0
        if qos:
            i = self._identifier(i)
        if n and i < stop and not buf[i]:
            return i + 1  # no properties
        found, i = decode(buf, i, stop, _PUBLISH)
        self.properties = found
        if "topic_alias" in found:
            alias = found.pop("topic_alias")
            if alias > self.topic_alias_maximum:
                raise Violation(0x94, "topic alias %d" % alias)
            if n:
                self._aliases[alias] = self.topic, self.name
            elif alias in self._aliases:
                self.topic, self.name = self._aliases[alias]
                return i
        if not n:
            raise Violation(0x82, "PUBLISH without a topic name")
        return i

    def _new_name(self, name):
        try:
            topic = utf8(name)
        except ValueError as e:
            raise Violation(0x81, "PUBLISH topic name: %s" % e)
        if "+" in topic or "#" in topic:
            raise Violation(0x82, "PUBLISH with a wildcard in its topic name")
        self.topic = topic
        self.name = bytes(name)
