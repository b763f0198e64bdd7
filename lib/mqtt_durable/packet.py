"""MQTT 3.1.1 on the wire: bytes <-> fields.  Knows no state and does no I/O; nothing here survives power loss.

put_ functions fill a caller's buffer and return the next offset; encode_ functions make new bytes, for packets that
are sent once a connection.  Decoder cuts the byte stream from the broker into packets, whatever pieces it comes in.
All lengths are in bytes, all integers big endian (MQTT 3.1.1 section 1.5).
"""

import gc

from micropython import const

from .errors import ProtocolError

CONNACK = const(2)
PUBLISH = const(3)
PUBACK = const(4)
PUBREC = const(5)
PUBREL = const(6)
PUBCOMP = const(7)
SUBACK = const(9)
UNSUBACK = const(11)
PINGRESP = const(13)

PINGREQ_BYTES = b"\xc0\x00"
DISCONNECT_BYTES = b"\xe0\x00"

_KNOWN = const(8)  # topic names that need not be checked again
_SHORT = const(96)  # bytes of the longest of these
len = len  # MicroPython finds it sooner here than behind all the other built-in names
_checked = {}  # such a name, as it was given -> its UTF-8 bytes


def utf8(data):
    """Return data (bytes-like) as str; ValueError if it is not the UTF-8 of MQTT [MQTT-1.5.3-1, -2].

    MicroPython's own decoder lets surrogates, overlong forms and U+0000 pass.
    """
    try:
        text = str(data, "utf-8")
    except UnicodeError:
        raise ValueError("not UTF-8")
    if "\0" in text:
        raise ValueError("U+0000 in text")
    if len(text) != len(data):  # not plain ASCII
        n = 0
        for char in text:
            c = ord(char)
            if c < 0xD800 or 0xDFFF < c < 0x110000:  # a character, in its shortest form
                n += 1 if c < 0x80 else 2 if c < 0x800 else 3 if c < 0x10000 else 4
        if n != len(data):
            raise ValueError("not UTF-8")
    return text


def _data(value, what, least=0):
    """Return value (str or bytes) as bytes, least to 65535 of them; ValueError names what."""
    data = value.encode() if isinstance(value, str) else value
    if not least <= len(data) <= 65535:
        raise ValueError("%s: found %d bytes, expected %d-65535" % (what, len(data), least))
    return data


def _text(value, what, least=0):
    """As _data(), and checked: UTF-8."""
    data = _data(value, what, least)
    try:
        utf8(data)
    except ValueError as e:
        raise ValueError("%s: %s" % (what, e))
    return data


def check_topic(topic_name):
    """Return topic_name (str or bytes) as UTF-8 bytes.

    Raises ValueError if it is empty, longer than 65535 bytes, ill-formed or holds a wildcard.
    MQTT 3.1.1 section 4.7 [MQTT-4.7.1-1, 4.7.3-1 to -3, 3.3.2-2].
    """
    try:
        data = _checked.get(topic_name)
    except TypeError:  # a bytearray
        data = None
        topic_name = bytes(topic_name)
    if data is None:
        data = _text(topic_name, "topic name", 1)
        if b"+" in data or b"#" in data:
            raise ValueError("topic name: found a wildcard")
        if len(data) <= _SHORT:
            if len(_checked) >= _KNOWN:
                _checked.clear()
            _checked[topic_name] = data
    return data


def check_filter(topic_filter):
    """Return topic_filter (str or bytes) as UTF-8 bytes.

    Raises ValueError if it is empty, longer than 65535 bytes, ill-formed or has a misplaced wildcard.
    MQTT 3.1.1 section 4.7.1 [MQTT-4.7.1-2, -3].
    """
    data = _text(topic_filter, "topic filter", 1)
    levels = data.split(b"/")
    wrong = b"#" in levels[:-1]
    for level in levels:
        if len(level) > 1 and (b"+" in level or b"#" in level):
            wrong = True
    if wrong:
        raise ValueError("topic filter: + and # must be whole levels, # the last one")
    return data


def matches(topic_filter, topic_name):
    """True if topic_name matches topic_filter, both valid and both str (MQTT 3.1.1 section 4.7)."""
    if topic_filter == topic_name:
        return True
    if topic_name.startswith("$") and topic_filter[0] in "+#":
        return False  # [MQTT-4.7.2-1]
    want = topic_filter.split("/")
    have = topic_name.split("/")
    if want[-1] == "#":  # "a/#" matches "a"
        want.pop()
        have = have[: len(want)]
    if len(want) != len(have):
        return False
    for i, level in enumerate(want):
        if level != "+" and level != have[i]:
            return False
    return True


def put_fixed_header(buf, off, first, remaining_length):
    """Write a fixed header, first byte as given; return the next offset.  2-5 bytes.  MQTT 3.1.1 section 2.2."""
    buf[off] = first
    off += 1
    while remaining_length > 127:
        buf[off] = remaining_length & 127 | 128
        off += 1
        remaining_length >>= 7
    buf[off] = remaining_length
    return off + 1


def put_publish_head(buf, off, first, topic_name, packet_id, payload_size):
    """Write a PUBLISH up to its payload of payload_size bytes, which the caller sends next; return the next offset.

    first: its first byte.  topic_name: checked UTF-8 bytes; 4-9 bytes more than that.  packet_id: 0 at QoS 0.
    MQTT 3.1.1 section 3.3.
    """
    # In a frame of 11 words: MicroPython takes a larger one from the heap.
    n = len(topic_name)
    payload_size += n + (4 if packet_id else 2)
    buf[off] = first
    off += 1
    while payload_size > 127:
        buf[off] = payload_size & 127 | 128
        off += 1
        payload_size >>= 7
    buf[off] = payload_size
    buf[off + 1] = n >> 8
    buf[off + 2] = n & 255
    off += 3
    n += off
    buf[off:n] = topic_name
    if packet_id:
        buf[n] = packet_id >> 8
        buf[n + 1] = packet_id & 255
        n += 2
    return n


def put_ack(buf, off, packet_type, packet_id):
    """Write a PUBACK, PUBREC, PUBREL or PUBCOMP, 4 bytes; return the next offset.  Sections 3.4-3.7."""
    buf[off] = packet_type << 4 | (2 if packet_type == PUBREL else 0)  # [MQTT-3.6.1-1]
    buf[off + 1] = 2
    buf[off + 2] = packet_id >> 8
    buf[off + 3] = packet_id & 255
    return off + 4


def _field(data):
    """A length-prefixed field."""
    return bytes((len(data) >> 8, len(data) & 255)) + data


def _packet(first, body):
    head = bytearray(5)
    return bytes(head[: put_fixed_header(head, 0, first, len(body))]) + body


def encode_connect(
    client_id, clean_session, keep_alive_s, username=None, password=None, will=None, properties=b"", will_properties=b""
):
    """Return a CONNECT.  MQTT 3.1.1 section 3.1.

    client_id: str or bytes, empty only with clean_session.  keep_alive_s: 0-65535, 0 is off.
    will: None or (topic_name, payload, qos, retain).  Raises ValueError for a bad argument.
    properties, will_properties: encoded, for MQTT 5, which takes an empty client_id, and a password without a username.
    """
    body = properties + _field(_text(client_id, "client_id"))
    if not properties:
        if not client_id and not clean_session:
            raise ValueError("client_id: empty needs a clean session")  # [MQTT-3.1.3-7]
        if password is not None and username is None:
            raise ValueError("password: needs a username")  # [MQTT-3.1.2-22]
    if not 0 <= keep_alive_s <= 65535:
        raise ValueError("keep_alive_s: not within 0-65535")
    flags = 2 if clean_session else 0
    if will is not None:
        topic_name, payload, qos, retain = will
        if qos not in (0, 1, 2):
            raise ValueError("will qos: not 0, 1 or 2")
        flags |= 4 | qos << 3 | (32 if retain else 0)
        body += will_properties + _field(check_topic(topic_name)) + _field(_data(payload, "will payload"))
    if username is not None:
        flags |= 128
        body += _field(_text(username, "username"))
    if password is not None:
        flags |= 64
        body += _field(_data(password, "password"))
    head = bytes((5 if properties else 4, flags, keep_alive_s >> 8, keep_alive_s & 255))
    return _packet(16, b"\x00\x04MQTT" + head + body)


def encode_publish(topic_name, payload, retain=False):
    """Return a whole QoS 0 PUBLISH.  topic_name: checked UTF-8 bytes.  MQTT 3.1.1 section 3.3."""
    head = bytearray(len(topic_name) + 7)
    n = put_publish_head(head, 0, 0x31 if retain else 0x30, topic_name, 0, len(payload))
    return bytes(head[:n]) + payload


def encode_subscribe(packet_id, topic_filter, qos):
    """Return a SUBSCRIBE for one filter (checked UTF-8 bytes) at qos 0-2.  MQTT 3.1.1 section 3.8."""
    return _packet(0x82, bytes((packet_id >> 8, packet_id & 255)) + _field(topic_filter) + bytes((qos,)))


def encode_unsubscribe(packet_id, topic_filter):
    """Return an UNSUBSCRIBE for one filter (checked UTF-8 bytes).  MQTT 3.1.1 section 3.10."""
    return _packet(0xA2, bytes((packet_id >> 8, packet_id & 255)) + _field(topic_filter))


class Decoder:
    """Cuts the stream from a broker into packets, in one buffer that is used again and again.

    Read from the socket into space(), add what came to .end, then call next() until it returns 0.  Bytes .start to
    .end of the buffer are those that it has not taken yet.  What next() leaves in the fields below is valid until the
    next call of space() or next().  After a 0, .missing is how many bytes the packet lacks at least: who reads no more
    than that leaves the next packet in the socket.

    size: bytes of the buffer, at least 8.  limit: the largest packet taken whole, in bytes; the buffer grows to such
    a packet and shrinks again.  A larger PUBLISH is announced with .payload None and .left bytes of payload to come:
    piece() takes them, next() passes them over, so that it can be acknowledged and does not come back for ever; any
    other larger packet is a ProtocolError.
    """

    _own = False  # whether all that next() does not take itself goes to _oversize()

    def __init__(self, size=512, limit=4096):
        self._size = size
        self._limit = limit
        # Bound once: that saves the search for a method.
        self.space = self.space
        self.next = self.next
        self._publish_head = self._publish_head
        self.reset()

    def reset(self):
        """Forget all bytes: a new connection begins."""
        self._buf = memoryview(bytearray(self._size))
        self.start = self.end = 0
        self.left = 0
        self.missing = 2
        self.type = 0  # packet type, 2-13
        self.flags = 0  # low nibble of the first byte; no property beside it: one slows every attribute down
        self.packet_id = 0
        self.topic = ""
        self.name = b""  # its bytes
        self.payload = None  # memoryview into the buffer (PUBLISH; SUBACK: the return codes)
        self.session_present = False
        self.return_code = 0

    def space(self):
        """The free part of the buffer, at least one byte, to be read into."""
        buf = self._buf
        if self.start == self.end:
            self.start = self.end = 0
            if len(buf) > self._size:  # grown for one large packet
                buf = self._buf = memoryview(bytearray(self._size))
            return buf
        if self.end == len(buf):
            n = self.end - self.start
            buf[:n] = bytes(buf[self.start : self.end])
            self.start = 0
            self.end = n
        return buf[self.end :]

    def piece(self):
        """Take what is here of the payload of a PUBLISH announced with .payload None; .left says what is to come."""
        at = self.start
        self.start = stop = min(at + self.left, self.end)
        self.left -= stop - at
        return self._buf[at:stop]

    def next(self):
        """Return the type of the next whole packet, or 0 when more bytes are needed.

        Raises ProtocolError for what no MQTT 3.1.1 server may send; the connection is then of no more use.
        """
        # What most packets are, in a frame of 11 words: MicroPython takes a larger one from the heap.
        at = self.start
        stop = self.end
        if stop - at > 3 and not self.left:
            buf = self._buf
            first = buf[at]
            n = buf[at + 1]
            at += 2
            if n == 2 and (first == 0x40 or first == 0x50 or first == 0x70):  # PUBACK, PUBREC, PUBCOMP
                n = buf[at] << 8 | buf[at + 1]
                if n:
                    self.start = at + 2
                    self.flags = 0
                    self.packet_id = n
                    first >>= 4
                    self.type = first
                    return first
            elif 0x30 <= first < 0x36 and n < 128 and at + n <= stop and n + 2 <= self._limit:  # PUBLISH, no DUP
                stop = at + n
                self.start = stop
                self.type = PUBLISH
                self.flags = first & 15
                self.payload = buf[self._publish_head(at, stop) : stop]
                return PUBLISH
        return self._any()

    def _any(self):
        """next() of whatever it is."""
        buf = self._buf
        if self.left:
            self.piece()
            if self.left:
                self.missing = self.left
                return 0
        at = self.start
        end = self.end
        have = end - at
        if have < 2:
            self.missing = 2 - have
            return 0
        first = buf[at]
        kind = first >> 4
        # A bit for each value of the flags that a packet of this type may have [MQTT-2.2.2-2, 3.3.1-2, 3.3.1-4].
        if not (0x3C3F if kind == PUBLISH else 4 if kind == PUBREL else 1) >> (first & 15) & 1:
            raise ProtocolError("flags %d in packet type %d" % (first & 15, kind))
        i = at + 1
        length = buf[i]
        i += 1
        if length > 127:
            length &= 127
            shift = 7
            while True:
                if shift > 21:
                    raise ProtocolError("remaining length longer than 4 bytes")
                if i == end:
                    self.missing = 1
                    return 0
                byte = buf[i]
                i += 1
                length |= (byte & 127) << shift
                if byte < 128:
                    break
                shift += 7
        total = i - at + length
        if self._own or total > self._limit:
            return self._oversize(first, i, length)
        # Remaining length that a packet of this type has when it comes from a server; \xfe: more than one, \xff: none.
        fixed = b"\xff\xff\x02\xfe\x02\x02\x02\x02\xff\xfe\xff\x02\xff\x00\xff\xff"[kind]
        if fixed == 255:
            raise ProtocolError("packet type %d from a server" % kind)
        if (length < 3 if kind == SUBACK else length != fixed and kind != PUBLISH):
            raise ProtocolError("remaining length %d in packet type %d" % (length, kind))
        if have < total:
            self.missing = total - have
            if total > len(buf):
                grown = memoryview(bytearray(total))
                grown[:have] = buf[at:end]
                self._buf = grown
                self.start = 0
                self.end = have
            return 0
        stop = i + length
        self.start = stop
        self.type = kind
        self.flags = first & 15
        if kind == PUBLISH:
            self.payload = buf[self._publish_head(i, stop) : stop]
        elif kind == CONNACK:
            self.return_code = buf[i + 1]
            self.session_present = buf[i] == 1
            if buf[i] > 1 or (buf[i] and self.return_code):  # [MQTT-3.2.2-4]
                raise ProtocolError("CONNACK flags %d with return code %d" % (buf[i], self.return_code))
        elif kind != PINGRESP:
            self.packet_id = buf[i] << 8 | buf[i + 1]
            if not self.packet_id:
                raise ProtocolError("packet identifier 0")
            if kind == SUBACK:
                self.payload = buf[i + 2 : stop]
                for code in self.payload:
                    if code > 2 and code != 128:  # [MQTT-3.9.3-2]
                        raise ProtocolError("SUBACK return code %d" % code)
        return kind

    def _publish_head(self, i, stop):
        """Parse topic name and packet identifier at i; return the offset of the payload."""
        # In a frame of 11 words, too.
        buf = self._buf
        n = buf[i] << 8 | buf[i + 1] if i + 2 <= stop else 0
        i += 2
        if not n or i + n + (2 if self.flags & 6 else 0) > stop:
            raise ProtocolError("PUBLISH with a topic name of %d bytes" % n)
        if buf[i : i + n] != self.name:  # else it is that of the message before
            self._new_name(buf[i : i + n])
        i += n
        self.packet_id = 0
        if self.flags & 6:
            self.packet_id = buf[i] << 8 | buf[i + 1]
            if not self.packet_id:
                raise ProtocolError("packet identifier 0")  # [MQTT-2.3.1-1]
            i += 2
        return i

    def _new_name(self, name):
        try:
            topic = self.topic = utf8(name)
            if "+" in topic or "#" in topic:
                raise ValueError("a wildcard")
        except ValueError as e:
            raise ProtocolError("PUBLISH topic name: %s" % e)
        self.name = bytes(name)

    def _oversize(self, first, i, length):
        """A packet over the limit: a PUBLISH is announced as soon as its head is here.  Where ._own, any."""
        head = length  # of what is no PUBLISH it is all
        if first >> 4 == PUBLISH:
            self.flags = first & 15
            self.missing = 2 - (self.end - i)
            if self.missing > 0:
                return 0
            head = 2 + (self._buf[i] << 8 | self._buf[i + 1]) + 2
        if i - self.start + head > min(self._limit, self._size):
            raise ProtocolError("packet type %d with a head of %d bytes" % (first >> 4, head))
        self.missing = min(head, length) - (self.end - i)
        if self.missing > 0:
            return 0
        stop = i + length
        self.start = i = self._publish_head(i, stop)
        self.left = stop - i
        self.type = PUBLISH
        self.payload = None
        return PUBLISH


gc.collect()  # loading leaves garbage between what stays: what is loaded next is to have the place of it
