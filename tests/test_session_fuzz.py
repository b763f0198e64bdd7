"""The client against a broker gone mad: test_session_fuzz.py FIRST LAST runs more seeds, SEED replays one
(on MicroPython not always: there the order of tasks depends on the clock).  FIRST LAST 5 speaks MQTT 5.

The broker is a generator of answers, lies, duplicates, packets in a wrong order, illegal and damaged ones and
rubbish, in pieces cut at any byte, over links that break at any byte; now and then the power fails.  A reader of its
own, written against the standard and not against the decoder, follows what both sides have really got.  At all times

- the client goes on reading after a violation never, makes a new connection always, and fails by nothing but MQTTError
  and OSError;
- what publish() accepted is stored until the broker has acknowledged it, and at the end an honest broker has it;
- a handler sees only whole messages, as often as they were sent; at QoS 2 one of each until its PUBREL (and once
  more after a power cut or close());
- what the client sends is well-formed, what it acknowledges has come, what it sends again has DUP, and no PUBLISH
  follows its PUBREL;
- the decoder's buffer stays within the limit, and every queue within its bound.

With MQTT 5 a message is finished, too, when it is refused or has expired, or when the broker takes none of its size;
one that had no quota is not.  What the client sends keeps to the limits that CONNACK told: how many are in flight, the
size, QoS, retain and topic aliases.  A message has its properties, and of its expiry interval what is left.
"""

import sys

if __name__ == "__main__":
    HERE = sys.argv[0].rpartition("/")[0] or "."
    for name in ("tests", "lib", "tools", "tools/shim"):
        sys.path.insert(0, HERE + "/../" + name)
    import host

    host.install()

import asyncio  # noqa: E402
import gc  # noqa: E402

import mqtt_durable.client as client_module  # noqa: E402
import mqtt_durable.packet as packet_module  # noqa: E402
import mqtt_durable.packet5 as packet5_module  # noqa: E402
from fakebroker import ack, block, packet, publish, told  # noqa: E402
from mqtt_durable.client5 import Client5  # noqa: E402
from mqtt_durable.errors import JournalFull, MQTTError, SubscribeRefused  # noqa: E402
from norsim import Rng  # noqa: E402
from packet_types import NAMES  # noqa: E402
from test_client import Rig  # noqa: E402
from test_properties import ALL  # noqa: E402

_ECONNRESET = 104
_INBOX_BYTES = 8192
_NEVER_MS = 100000000
_FLAGS = {"PUBREL": 2, "SUBSCRIBE": 2, "UNSUBSCRIBE": 2}
_FIXED = {"CONNACK": 2, "PUBACK": 2, "PUBREC": 2, "PUBREL": 2, "PUBCOMP": 2, "UNSUBACK": 2, "PINGRESP": 0}
# Violations of their own; what is damaged or random makes many more.
_ILLEGAL = (
    b"\x00\x00",
    b"\xf0\x00",
    b"\x10\x00",
    b"\x82\x06\x00\x01\x00\x01a\x00",
    b"\xc0\x00",
    b"\xe0\x00",
    b"\x21\x02\x00\x00",
    b"\x20\x02\x02\x00",
    b"\x20\x02\x01\x01",
    b"\x20\x02\x00\x00",
    b"\x40\x02\x00\x00",
    b"\x42\x02\x00\x01",
    b"\x60\x02\x00\x01",
    b"\x62\x03\x00\x01\x00",
    b"\x70\x01\x00",
    b"\x90\x02\x00\x01",
    b"\x90\x03\xfe\x00\x03",
    b"\x90\xff\xff\xff\x7f",
    b"\xd0\x01\x00",
    b"\x30\x00",
    b"\x36\x05\x00\x01t\x00\x01",
    b"\x38\x03\x00\x01t",
    b"\x30\x02\x00\x00",
    b"\x30\x03\x00\x02t",
    b"\x32\x05\x00\x01t\x00\x00",
    b"\x30\x03\x00\x01#",
    b"\x30\x05\x00\x03\xed\xa0\x80",
    b"\x30\x03\x00\x01\x00",
    b"\x30\xff\xff\xff\xff\x01",
    b"HTTP/1.1 302 Found\r\n\r\n",
)

# MQTT 5.
_PUBLISH = 3
_SUBSCRIPTION, _ALIAS = 0x0B, 0x23  # properties
_QUOTA = 0x97
_WALL = 1 << 30
_ALIASES = 16  # that the client allows
_LARGEST = 1 << 28
_ACK = b"\x00\x10\x80\x83\x87\x90\x91\x97\x99"
_REASONS = {
    "PUBACK": _ACK,
    "PUBREC": _ACK,
    "PUBREL": b"\x00\x92",
    "PUBCOMP": b"\x00\x92",
    "SUBACK": b"\x00\x01\x02\x80\x83\x87\x8f\x91\x97\x9e\xa1\xa2",
    "UNSUBACK": b"\x00\x11\x80\x83\x87\x8f\x91",
}
_PROPERTIES = {row[1][0]: (row[0], row[2], len(row[1]) - 1, row[3], row[4]) for row in ALL}
_ILLEGAL_5 = _ILLEGAL + (
    b"\x20\x03\x01\x00\x00",
    b"\x20\x06\x00\x00\x03\x21\x00\x00",
    b"\x40\x03\x00\x01\x01",
    b"\x40\x04\x00\x01\x00\x01",
    b"\x40\x06\x00\x01\x00\x02\x01\x00",
    b"\x50\x03\x00\x01\x92",
    b"\x62\x03\x00\x01\x80",
    b"\x90\x03\xfe\x00\x00",
    b"\x90\x04\xfe\x00\x00\x03",
    b"\xb0\x03\xfe\x00\x00",
    b"\xb0\x02\xfe\x00",
    b"\x30\x04\x00\x01t\x80",
    b"\x30\x05\x00\x01t\x80\x00",
    b"\x30\x84\x00\x00\x01t\x00",
    b"\x30\x07\x00\x01t\x03\x23\x00\x00",
    b"\x30\x07\x00\x01t\x03\x23\x00\x11",
    b"\x30\x06\x00\x00\x03\x23\x00\x10",
    b"\x30\x06\x00\x01t\x02\x0b\x00",
    b"\x30\x06\x00\x01t\x02\x01\x02",
    b"\x30\x08\x00\x01t\x04\x01\x00\x01\x00",
    b"\x30\x09\x00\x01t\x05\x11\x00\x00\x00\x01",
    b"\x30\x08\x00\x01t\x04\x08\x00\x01+",
    b"\x30\x09\x00\x01t\x05\x03\x00\x02\xc0\x80",
    b"\xe0\x01\x04",
    b"\xe0\x02\x8b\x01",
    b"\xf0\x02\x18\x00",
    b"\xf0\x06\x18\x04\x15\x00\x01m",
)


class Violation(Exception):
    """The argument says of what."""


def text(data):
    """Text of MQTT, or Violation.  MicroPython's own decoder lets too much pass."""
    i = 0
    while i < len(data):
        c = data[i]
        more = 0 if c < 0x80 else 1 if 0xC2 <= c < 0xE0 else 2 if 0xE0 <= c < 0xF0 else 3 if 0xF0 <= c < 0xF5 else 9
        after = data[i + 1 : i + 1 + more]
        if not c or len(after) < more or [b for b in after if b & 0xC0 != 0x80]:
            raise Violation("text")
        if more and bytes(data[i : i + 2]) < {0xE0: b"\xe0\xa0", 0xF0: b"\xf0\x90"}.get(c, b""):
            raise Violation("overlong text")
        if more and bytes(data[i : i + 2]) >= {0xED: b"\xed\xa0", 0xF4: b"\xf4\x90"}.get(c, b"\xff"):
            raise Violation("no character")
        i += 1 + more
    return bytes(data).decode()


def take_packet(data):
    """(name, flags, body, bytes that follow, its size) of the first packet; None if that is not known.

    Of a packet that is not whole name is None, and body what is there of it.
    """
    length = 0
    for i in range(1, 5):
        if i >= len(data):
            return None
        length |= (data[i] & 127) << 7 * (i - 1)
        if data[i] < 128:
            break
    else:
        raise Violation("remaining length")
    size = i + 1 + length
    name = NAMES[data[0] >> 4] if len(data) >= size else None
    return name, data[0] & 15, data[i + 1 : size], data[size:], size


def number(body, at=0):
    if len(body) < at + 2:
        raise Violation("no number")
    return body[at] << 8 | body[at + 1]


def varint(body, at):
    """The variable byte integer at body[at], and the offset behind it."""
    n = shift = 0
    while at < len(body) and shift < 28:
        n |= (body[at] & 127) << shift
        shift += 7
        at += 1
        if body[at - 1] < 128:
            if shift > 7 and not body[at - 1]:
                break
            return n, at
    raise Violation("variable byte integer")


def field(body, at):
    """The bytes at body[at] behind their length, and the offset behind them."""
    end = at + 2 + number(body, at)
    if end > len(body):
        raise Violation("field")
    return body[at + 2 : end], end


def properties(body, at, kind, out):
    """({name: value}, offset behind them) of the properties at body[at].  out: of a client."""
    n, at = varint(body, at)
    stop = at + n
    if stop > len(body):
        raise Violation("property length")
    body = body[:stop]
    found = {}
    while at < stop:
        ident = body[at]
        at += 1
        if ident == _SUBSCRIPTION and kind == _PUBLISH and not out:
            value, at = varint(body, at)
            if not value:
                raise Violation("subscription identifier 0")
            found.setdefault("subscription_identifiers", []).append(value)
            continue
        name, like, size, of_client, of_server = _PROPERTIES.get(ident, ("", 0, 0, (), ()))
        if kind not in (of_client if out else of_server) and (ident != _ALIAS or kind != _PUBLISH):
            raise Violation("property 0x%02x" % ident)
        if isinstance(like, int):
            if at + size > stop:
                raise Violation(name)
            value = int.from_bytes(body[at : at + size], "big")
            at += size
            if (size == 1 and value > 1) or (not value and name in ("receive_maximum", "maximum_packet_size")):
                raise Violation(name)
        else:
            value, at = field(body, at)
            value = bytes(value) if isinstance(like, bytes) else text(value)
            if name == "response_topic" and (not value or "+" in value or "#" in value):
                raise Violation(name)
            if isinstance(like, list):
                second, at = field(body, at)
                found.setdefault(name, []).append((value, text(second)))
                continue
        if name in found:
            raise Violation(name + " twice")
        found[name] = value
    return found, at


def ending(body, at, kind, out):
    """(reason code, properties) at the end of a packet, where both may lack."""
    if at >= len(body):
        return 0, {}
    found = {}
    end = at + 1
    if end < len(body):
        found, end = properties(body, end, kind, out)
    if end != len(body):
        raise Violation("bytes behind properties")
    return body[at], found


def publish_fields(flags, body, aliases=None, most=0, out=False):
    """(qos, packet identifier, topic, payload, properties) of a PUBLISH.  aliases: topic alias -> topic, None: MQTT
    3.1.1.  most: topic aliases that there may be.  out: of a client."""
    qos = flags >> 1 & 3
    if qos == 3 or (flags & 8 and not qos):
        raise Violation("flags of PUBLISH")
    n = number(body)
    topic = text(body[2 : 2 + n])
    if len(body) < 2 + n or "+" in topic or "#" in topic:
        raise Violation("topic name")
    packet_id = number(body, 2 + n) if qos else 0
    if qos and not packet_id:
        raise Violation("packet identifier 0")
    at = 2 + n + (2 if qos else 0)
    found = {}
    if aliases is not None:
        found, at = properties(body, at, _PUBLISH, out)
        if "topic_alias" in found:
            alias = found.pop("topic_alias")
            if not 0 < alias <= most:
                raise Violation("topic alias")
            if topic:
                aliases[alias] = topic
            topic = aliases.get(alias, "")
    if not topic:
        raise Violation("topic name")
    return qos, packet_id, topic, bytes(body[at:]), found


def as_key(qos, packet_id, topic, payload, found):
    return qos, packet_id, topic, payload, str(sorted(found.items()))


class Link:
    """In place of the client's Stream: one connection.  Bytes to the client come in pieces of any size."""

    def __init__(self, broker, number_):
        self.s = Socket(self)
        self.sock = self
        self.broker = broker
        self.number = number_
        self.coming = b""  # to the client
        self.ends = 0  # 1: then it ends; 2: then it breaks
        self.actions = broker.rng.below(40)
        self.breaks = broker.rng.below(3000) if broker.rng.below(3) == 0 else -1  # after as many bytes to the broker
        self.closed = False
        self.out_buf = b""
        self.wake = asyncio.Event()
        # What the client has got, and what the broker has:
        self.unread = b""
        self.clean = False
        self.first = True
        self.passing = False
        self.violated = None
        self.unheard = b""
        self.names = []  # of the packets that the broker has
        self.unanswered = []  # (name, packet identifier, QoS)
        self.came = {}  # name -> packet identifiers that may be answered with it
        # MQTT 5:
        self.connack = {}  # its properties
        self.aliases = self.aliases_out = None
        if broker.five:
            self.aliases, self.aliases_out = {}, {}
        self.flight = set()  # packet identifiers of PUBLISHes over this connection that wait for their end
        self.early = set()  # those whose end was told before they came: such a lie may widen the window

    def close(self):
        self.closed = True
        self.wake.set()

    async def readinto(self, buf):
        broker = self.broker
        rng = broker.rng
        if self.violated:
            broker.fail("went on reading after a violation of %s" % self.violated)
        while not self.coming:
            if self.ends:
                if self.ends == 1:
                    return 0
                raise OSError(_ECONNRESET)
            for _ in range(rng.below(6)):
                await asyncio.sleep_ms(0)
            if broker.honest:
                if not self.unanswered and not self.ends:
                    self.wake.clear()
                    await self.wake.wait()
                broker.answer(self)
            else:
                broker.act(self)
        n = min(len(buf), len(self.coming), 1 + rng.below(1 << rng.below(11)))
        piece = self.coming[:n]
        self.coming = self.coming[n:]
        buf[:n] = piece
        broker.read_by_client(self, piece)
        return n

    def write(self, data):
        if not self.out_buf:
            n = self.s.write(data)
            data = data[n or 0 :]
        self.out_buf += bytes(data)

    async def drain(self):
        for _ in range(self.broker.rng.below(4)):
            await asyncio.sleep_ms(0)
        while self.out_buf:
            await asyncio.sleep_ms(0)
            self.out_buf = self.out_buf[self.s.write(self.out_buf) or 0 :]
        self.out_buf = b""


class Socket:
    """Of a Link: takes as many bytes as it likes, or none."""

    def __init__(self, link):
        self._link = link

    def close(self):
        self._link.close()

    def write(self, data, off=0, n=None):
        link = self._link
        broker = link.broker
        if link.closed:
            raise OSError(_ECONNRESET)
        data = data[off:] if n is None else data[off : off + n]
        if broker.rng.below(4) == 0:
            n = broker.rng.below(len(data) + 1)
            if not n:
                return None
            data = data[:n]
        data = bytes(data)
        n = len(data)
        if link.breaks >= 0 and not broker.honest:
            data = data[: link.breaks]
            link.breaks -= len(data)
            broker.hear(link, data)
            if len(data) < n:
                link.ends = 2
                raise OSError(_ECONNRESET)
        else:
            broker.hear(link, data)
        return n


class MadBroker:
    """One run: the broker, the power, the program.  .figures: what happened, by name."""

    port = 1883

    def __init__(self, seed, version=4):
        rng = self.rng = Rng(seed)
        self.seed = seed
        self.five = version == 5
        self.honest = False
        self.session = False  # as an honest broker knows it
        self.fault = None
        self.figures = {}
        self.connections = 0
        self.link = None
        # Outbound: what the program published, and what was told of it.
        self.published = {}  # packet identifier -> (topic, payload, QoS, retain, properties, .seconds then)
        self.owed = {}  # those that no acknowledgement has come for
        self.seen = set()  # those that the broker has whole, in this session
        self.released = set()  # those of which PUBREL was sent
        # Inbound:
        self.sent = []  # PUBLISHes for use as duplicates
        self.due = {}  # (QoS, packet identifier, topic, payload) -> how often the client has it
        self.handled = {}  # packet identifier -> .cuts and the client's session when a handler had it at QoS 2
        self.order = {}  # packet identifier -> what came of it since then, "P" for a PUBLISH, "R" for a PUBREL
        self.before = set()  # the same, of the session before
        self.before_epoch = -1  # the client's, when CONNACK told of the new one
        self.used = {}  # packet identifier -> the QoS it came with, or both: 3
        self.taken = set()  # packet identifiers of what a handler has had in this session, or what was not for it
        self.cuts = 0
        self.largest = 0
        self.limit = (300, 1024, 4096)[rng.below(3)]
        options = {"limit_bytes": self.limit, "backoff_ms": (0, 0), "answer_ms": _NEVER_MS}
        options["in_flight"] = (1, 4, 16)[rng.below(3)]
        options["size"] = (16384, 32768)[rng.below(2)]
        if rng.below(3) == 0:
            options["grace_ms"] = _NEVER_MS
        self.forgets = rng.below(5) == 0  # each connection is a session of its own
        if self.forgets:
            options["clean"] = True
        self.in_flight = options["in_flight"]
        self.connacks = []  # properties of those that have come since it was last looked what has ended
        self.seconds = self.booted = 0
        self.clock_set = False
        if self.five:
            Client5._clock = lambda client: self.clock()
            options["version"] = 5
        self.rig = Rig(self, fresh=rng.below(3) == 0, **options)

    def clock(self):
        return _WALL + self.seconds if self.clock_set else self.seconds - self.booted

    def count(self, name, n=1):
        self.figures[name] = self.figures.get(name, 0) + n

    def fail(self, what):
        what = "%s: connection %d: %s" % (self.name(), self.connections, what)
        self.fault = self.fault or what
        raise AssertionError(what)

    def name(self):
        seeds = "%d %d 5" % (self.seed, self.seed + 1) if self.five else "%d" % self.seed
        return "test_session_fuzz.py " + seeds

    # -- the link

    def dial(self, info, tls=None):
        self.connections += 1
        self.count("connections")
        if not self.honest and self.rng.below(12) == 0:
            raise OSError(_ECONNRESET)
        self.link = Link(self, self.connections)
        return self.link

    def hear(self, link, data):
        """Bytes from the client have come."""
        link.unheard += data
        try:
            while True:
                found = take_packet(link.unheard)
                if not found or not found[0]:
                    return
                name, flags, body, link.unheard, size = found
                if name != "CONNECT" and size > link.connack.get("maximum_packet_size", _LARGEST):
                    self.fail("%s of %d bytes" % (name, size))
                self.take(link, name, flags, body)
        except Violation as e:
            self.fail("the client violates the rules of %s after %s" % (e, link.names[-5:]))

    def take(self, link, name, flags, body):
        self.count("packets from the client")
        if (name == "CONNECT") != (not link.names) or "DISCONNECT" in link.names:
            self.fail("%s after %s" % (name, link.names[-5:]))
        link.names.append(name)
        if name == "CONNECT":
            link.clean = bool(body[7] & 2)
            if self.forgets:
                self.released.clear()
        if name == "PUBLISH":
            most = link.connack.get("topic_alias_maximum", 0)
            qos, packet_id, topic, payload, found = publish_fields(flags, body, link.aliases_out, most, True)
            if qos:
                self.compare(link, packet_id, topic, payload, qos, flags & 1, found)
                if packet_id in self.released:
                    self.fail("PUBLISH %d after its PUBREL" % packet_id)
                if packet_id in self.seen and not flags & 8:
                    self.fail("PUBLISH %d again without DUP" % packet_id)
                self.seen.add(packet_id)
                link.flight.add(packet_id)
                most = min(self.in_flight, link.connack.get("receive_maximum", 65535))
                if self.five and len(link.flight) > most + len(link.early):
                    self.fail("%d in flight" % len(link.flight))
        else:
            if self.five:
                self.parse(name, body, link)
            if flags != _FLAGS.get(name, 0):
                self.fail("flags %d in %s" % (flags, name))
            qos = 0
            packet_id = number(body) if name not in ("CONNECT", "PINGREQ", "DISCONNECT") else -1
            if not packet_id or name not in NAMES:
                self.fail("packet identifier 0 in %s" % name)
            if name in ("PUBACK", "PUBREC", "PUBCOMP"):
                may = link.came.get(name, [])
                if packet_id not in may:
                    self.fail("%s %d, of nothing that came" % (name, packet_id))
                may.remove(packet_id)
                if name != "PUBCOMP" and packet_id not in self.taken:
                    self.fail("%s %d, and no handler has had it" % (name, packet_id))
            elif name == "PUBREL" and packet_id in self.seen:  # else it answers a PUBREC of nothing
                self.released.add(packet_id)
        if name in ("PUBLISH", "PUBREC", "PUBREL", "SUBSCRIBE", "UNSUBSCRIBE", "PINGREQ", "CONNECT"):
            link.unanswered.append((name, packet_id, qos))
        link.wake.set()

    def compare(self, link, packet_id, topic, payload, qos, retain, found):
        """Fail if that is not the message with this packet identifier, or what CONNACK has left of it."""
        known = self.published.get(packet_id)
        if known:
            expected = dict(known[4])
            interval = expected.pop("message_expiry_interval", -1)
            left = found.pop("message_expiry_interval", -1)
            known_qos = min(known[2], link.connack.get("maximum_qos", 2))
            known_retain = known[3] and link.connack.get("retain_available", 1)
            if (topic, payload, qos, retain, found) == (known[0], known[1], known_qos, known_retain, expected):
                least = max(1, interval - self.seconds + known[5])
                if left == interval or (interval >= 0 and least <= left <= max(1, interval)):
                    return
        self.fail("message %d is another one" % packet_id)

    def parse(self, name, body, link):
        """Violation if the client's packet, no PUBLISH, is none of MQTT 5."""
        kind = NAMES.index(name)
        if name == "CONNECT":
            properties(body, 10, kind, True)
        elif name in ("SUBSCRIBE", "UNSUBSCRIBE"):
            _, at = properties(body, 2, kind, True)
            topic_filter, at = field(body, at)
            text(topic_filter)
            if len(body) - at != (1 if name == "SUBSCRIBE" else 0):
                raise Violation("options")
        elif name != "PINGREQ":
            code, _ = ending(body, 0 if name == "DISCONNECT" else 2, kind, True)
            if name == "DISCONNECT":
                if code >= 0x80:
                    self.count("violations told")
            elif code not in _REASONS[name]:
                raise Violation("reason code 0x%02x" % code)

    def read_by_client(self, link, data):
        """Bytes have gone to the client: from here on it may act on them."""
        link.unread += data
        try:
            while not link.violated:
                found = take_packet(link.unread)
                if not found:
                    return
                name, flags, body, rest, size = found
                if not name:
                    # One that is too large is passed over, and may be acknowledged when its head is there.
                    large = size > self.limit and not self.five
                    if large and link.unread[0] >> 4 == 3 and not link.passing and len(body) > 1:
                        if len(body) >= number(body) + 4:
                            link.passing = True
                            self.understand(link, "PUBLISH", flags, body, size)
                    return
                head = size - len(body)
                if self.five and head > 2 and not link.unread[head - 1]:
                    raise Violation("a remaining length longer than needed")
                if not link.passing:
                    self.understand(link, name, flags, body, size)
                link.unread = rest
                link.first = link.passing = False
        except Violation as e:
            link.violated = str(e)
            self.count("violations")

    def understand(self, link, name, flags, body, size):
        self.count("packets to the client")
        if link.first and (name != "CONNACK" or body[1:2] != b"\0"):
            raise Violation("the handshake")
        if self.five and size > self.limit:
            raise Violation("the maximum packet size")
        if name == "PUBLISH":
            qos, packet_id, topic, payload, found = publish_fields(flags, body, link.aliases, _ALIASES)
            if size > self.limit or topic[0] == "$":
                self.taken.add(packet_id)
            else:
                key = as_key(qos, packet_id, topic, payload, found)
                self.due[key] = self.due.get(key, 0) + 1
            if qos == 2:
                self.order[packet_id] = self.order.get(packet_id, "") + "P"
            if qos:
                # Either answer will do if the broker has used this identifier at both.
                used = self.used[packet_id] = self.used.get(packet_id, 0) | qos
                for name in ("PUBACK", "PUBREC"):
                    if used & (1 if name == "PUBACK" else 2):
                        link.came.setdefault(name, []).append(packet_id)
            return
        if name not in _FIXED and name != "SUBACK":
            raise Violation(str(name))
        fixed = _FIXED.get(name, len(body))
        if flags != _FLAGS.get(name, 0) or len(body) < fixed or (len(body) > fixed and (not self.five or not fixed)):
            raise Violation("a fixed header")
        if name == "PINGRESP":
            return
        code, found, codes = 0, {}, body[2:]
        if self.five:
            kind = NAMES.index(name)
            if name in ("CONNACK", "SUBACK", "UNSUBACK"):
                found, at = properties(body, 2, kind, False)
                codes = body[at:]
            else:
                code, found = ending(body, 2, kind, False)
                codes = bytes((code,))
            expected = _REASONS.get(name, b"")
            if (not codes) != (not expected) or [code for code in codes if code not in expected]:
                raise Violation("the reason codes of %s" % name)
        if name == "CONNACK":
            if not link.first or body[0] > 1 or (body[0] and link.clean) or "authentication_method" in found:
                raise Violation("CONNACK")
            link.connack = found
            self.connacks.append(found)
            if not body[0]:
                self.seen.clear()
                self.handled.clear()
                self.order.clear()
                self.before, self.taken = self.taken, set()
                self.before_epoch = self.rig.client._epoch
            return
        packet_id = number(body)
        if not packet_id:
            raise Violation("packet identifier 0")
        if name == "SUBACK":
            if not self.five and (not codes or [code for code in codes if code not in (0, 1, 2, 128)]):
                raise Violation("SUBACK")
        elif name == "PUBREL":
            link.came.setdefault("PUBCOMP", []).append(packet_id)
            self.order[packet_id] = self.order.get(packet_id, "") + "R"
        elif name in ("PUBACK", "PUBREC"):
            qos = 1 if name == "PUBACK" else 2
            lowered = qos == 1 and link.connack.get("maximum_qos") == 1
            if code != _QUOTA and (self.owed.get(packet_id) == qos or lowered):
                self.owed.pop(packet_id, 0)
            # After a power cut an identifier that had its grace is given again.  What was refused may come again, too,
            # or is sent anew.
            if qos == 1 or code >= 0x80:
                self.seen.discard(packet_id)
        if name in ("PUBACK", "PUBCOMP") or code >= 0x80:
            if packet_id not in link.flight and self.rig.client.store.is_live(packet_id):
                link.early.add(packet_id)
            link.flight.discard(packet_id)

    # -- what the broker does

    def answer(self, link):
        """Answer all that is due as a broker should."""
        for name, packet_id, qos in link.unanswered:
            if name == "CONNECT":
                present = self.session and not link.clean
                if not self.honest:
                    present = self.rng.below(4) > 0 and (not link.clean or self.rng.below(8) == 0)
                five = self.five
                link.coming += told("CONNACK", 0, self.some_limits(), present) if five else bytes((0x20, 2, present, 0))
                self.session = not link.clean
            elif name == "SUBSCRIBE":
                link.coming += self.codes("SUBACK", packet_id)
            elif name == "PINGREQ":
                link.coming += b"\xd0\x00"
            elif name != "PUBLISH" or qos:
                after = {"PUBREC": "PUBREL", "PUBREL": "PUBCOMP", "UNSUBSCRIBE": "UNSUBACK"}
                link.coming += self.ack(after.get(name) or ("PUBACK" if qos == 1 else "PUBREC"), packet_id)
        link.unanswered = []

    def ack(self, name, packet_id):
        """Of MQTT 5 with any reason code, unless the broker is honest."""
        if not self.five:
            return ack(name, packet_id)
        if name == "UNSUBACK":
            return self.codes(name, packet_id)
        rng = self.rng
        code = 0
        if not self.honest and rng.below(4) == 0:
            code = _QUOTA if name in ("PUBACK", "PUBREC") and rng.below(2) else self.some_code(name)
        return ack(name, packet_id, code, self.some_told())

    def some_code(self, name):
        codes = _REASONS[name]
        return codes[self.rng.below(len(codes))]

    def codes(self, name, packet_id, code=0):
        """A SUBACK or UNSUBACK."""
        head = bytes((packet_id >> 8, packet_id & 255))
        if self.five:
            head += block(self.some_told())
            if not self.honest and self.rng.below(3) == 0:
                code = self.some_code(name)
        return packet(NAMES.index(name) << 4, head + bytes((code,)))

    def some_told(self):
        """Properties that any answer may have."""
        what = self.rng.below(12)
        if what == 0:
            return {"reason_string": "no"}
        return {"user_properties": [("a", "b"), ("a", "")]} if what == 1 else {}

    def some_limits(self):
        """Properties of a CONNACK."""
        rng = self.rng
        found = self.some_told()
        if not self.honest:
            for name, often, least, most in (
                ("receive_maximum", 2, 1, 20),
                ("maximum_packet_size", 4, 60, 1600),
                ("maximum_qos", 8, 0, 1),
                ("retain_available", 4, 0, 1),
                ("topic_alias_maximum", 2, 0, 10),
                ("server_keep_alive", 8, 0, 65535),
                ("session_expiry_interval", 8, 0, 65535),
                ("shared_subscription_available", 8, 0, 1),
            ):
                if rng.below(often) == 0:
                    found[name] = least + rng.below(most - least + 1)
        return found

    def some_properties(self):
        """Of a PUBLISH, both ways."""
        rng = self.rng
        found = {}
        for name, often, value in (
            ("user_properties", 6, [("a", "b"), ("a", "")]),
            ("content_type", 6, "text/plain"),
            ("correlation_data", 6, b"\x00\xff"),
            ("response_topic", 6, "in/answer"),
            ("payload_format_indicator", 6, 0),
            ("message_expiry_interval", 3, (0, 5, 50, 4000000000)[rng.below(4)]),
        ):
            if rng.below(often) == 0:
                found[name] = value
        return found

    def some_id(self):
        rng = self.rng
        newest = max(self.published or (1,))
        return (1 + rng.below(newest + 2), 1 + rng.below(8), 65024 + rng.below(8), rng.below(65536))[rng.below(4)]

    def some_publish(self):
        rng = self.rng
        if self.sent and rng.below(3) == 0:
            return self.sent[rng.below(len(self.sent))]
        packet_id = 1 + rng.below(12)
        qos = rng.below(3)
        if qos and rng.below(30):
            qos = 1 + packet_id % 2
        size = rng.below((20, 200, self.limit)[rng.below(3)])
        if rng.below(60 if self.five else 12) == 0:
            size = self.limit + rng.below(3000)
        topic = "in/%d" % rng.below(3)
        found = None
        if self.five:
            found = self.some_properties()
            size = max(0, size - 100)
            if rng.below(4) == 0:
                found["subscription_identifiers"] = [1, 268435455]
            if rng.below(4) == 0:
                found["topic_alias"] = 1 + rng.below(2)
                topic = topic if rng.below(4) else ""
        self.sent.append(publish(topic, rng.bytes(size), qos, packet_id, properties=found))
        if len(self.sent) > 20:
            self.sent.pop(0)
        return self.sent[-1]

    def some_packet(self):
        rng = self.rng
        what = rng.below(10)
        if what < 4:
            return self.some_publish()
        if what < 7:
            name = ("PUBACK", "PUBREC", "PUBREL", "PUBCOMP")[rng.below(4)]
            return self.ack(name, self.some_id() or 1)
        if what < 8:
            return self.ack("UNSUBACK", self.some_id() or 1)
        if what < 9:
            return self.codes("SUBACK", 0xFE00 + rng.below(8), (0, 1, 2, 128)[rng.below(4)])
        return b"\xd0\x00"

    def act(self, link):
        """Do one thing over this connection."""
        rng = self.rng
        link.actions -= 1
        if link.actions < 0:
            link.ends = 1 + rng.below(2)
            return
        if link.first and "CONNECT" in link.names and rng.below(8):
            self.answer(link)
            return
        what = rng.below(100)
        if what < 45:
            self.answer(link)
        elif what < 58:
            link.coming += self.some_packet()
        elif what < 60:
            for _ in range(2 + rng.below(30)):
                link.coming += self.some_packet()
        elif what < 80:
            link.coming += self.some_publish()
        elif what < 84:  # what is due, and in a wrong order
            due = link.unanswered[:]
            link.unanswered = due[::-1] + due[: rng.below(3)]
            self.answer(link)
        elif what < 87:
            illegal = _ILLEGAL_5 if self.five else _ILLEGAL
            link.coming += illegal[rng.below(len(illegal))]
        elif what < 89:
            link.coming += rng.bytes(1 + rng.below(40))
        elif what < 92:  # damaged
            data = bytearray(self.some_packet())
            for _ in range(1 + rng.below(3)):
                data[rng.below(len(data))] = rng.below(256)
            link.coming += bytes(data)
        elif what < 94:  # cut short, and another one behind it
            data = self.some_packet()
            link.coming += data[: rng.below(len(data))] + self.some_packet()
        elif what < 96:
            data = self.some_packet()
            link.coming += data[: rng.below(len(data))]
            link.ends = 1 + rng.below(2)
        elif what < 97:
            link.coming += bytes((0x20, 2, rng.below(2), rng.below(8)))
        elif what < 98 and self.five:
            name, code = (("AUTH", 0x18), ("DISCONNECT", (0x00, 0x8B, 0x8E, 0x97)[rng.below(4)]))[rng.below(2)]
            link.coming += told(name, code, self.some_told())

    # -- the program

    def on_message(self, message):
        packet_id = message._id & 0xFFFF
        epoch = message._id >> 16
        found = message.properties if self.five else {}
        key = as_key(message.qos, packet_id, message.topic, message.payload, found)
        left = self.due.get(key, 0)
        if not left:
            self.fail("a message that was not sent: %r" % (key,))
        self.due[key] = left - 1
        self.count("messages received")
        if epoch != self.rig.client._epoch:
            return  # of an old session
        self.taken.add(packet_id)
        if message.qos == 2:
            now = self.cuts, epoch
            order = self.order.get(packet_id, "")
            if self.handled.get(packet_id) == now:
                # In one piece there may be its PUBREL and the next PUBLISH, before a handler has had the first.
                if "R" not in order:
                    self.fail("message %d twice" % packet_id)
                order = order[order.find("R") + 1 :]
            self.order[packet_id] = order[order.find("P") + 1 :]
            self.handled[packet_id] = now

    def prepare(self, client):
        slow = 200 if self.seed % 8 == 7 else 12
        client._pulse_ms = _NEVER_MS
        client._keep_alive = lambda keep_alive_s: None
        original = client._failed

        def failed(error):
            if not isinstance(error, (MQTTError, OSError, asyncio.TimeoutError)):
                self.fault = self.fault or "%s: %r" % (self.name(), error)
            original(error)

        async def handle(message):
            try:
                self.on_message(message)
            except AssertionError:
                return
            for _ in range(self.rng.below(slow)):
                await asyncio.sleep_ms(0)

        def handle_at_once(message):
            try:
                self.on_message(message)
            except AssertionError:
                pass

        client._failed = failed
        if self.seed % 2:
            client.on("in/1", handle_at_once)
        client.on("#", handle)
        return client

    def check(self):
        client = self.rig.client
        store = client.store
        if self.fault:
            raise AssertionError(self.fault)
        for packet_id in list(self.owed):
            if not store.is_live(packet_id):
                if not self.may_end(packet_id):
                    self.fail("message %d is lost" % packet_id)
                del self.owed[packet_id]
                self.count("expired, too large or without QoS")
        self.connacks = [self.link.connack] if self.link else []
        session = store.session
        if len(session.busy) + len(session.held) > 256 or len(client._outbox) > 520 or store.lost:
            self.fail("out of bounds: %r" % client.stats())
        if client._inbox_bytes > _INBOX_BYTES + self.limit or self.largest > max(self.limit, 768):
            self.fail("too much memory: %d, a buffer of %d" % (client._inbox_bytes, self.largest))
        if client._run_task and client._run_task.done():
            self.fail("the client has ended")

    def may_end(self, packet_id):
        """Whether a message may have ended although the broker has not acknowledged it."""
        topic, payload, qos, _, found, then = self.published[packet_id]
        if found.get("message_expiry_interval", self.seconds) <= self.seconds - then:
            return True
        for connack in self.connacks:
            if not connack.get("maximum_qos", 2) or self.is_too_large(connack, topic, payload, qos, found):
                return True
        return False

    def is_too_large(self, connack, topic, payload, qos, found):
        size = len(publish(topic, payload, min(qos, connack.get("maximum_qos", 2)), 1, properties=found))
        return size > connack.get("maximum_packet_size", _LARGEST)

    def pass_time(self):
        """Seconds pass, the clock may be set, and what the broker had no quota for may be due."""
        rng = self.rng
        client = self.rig.client
        self.seconds += rng.below(3)
        self.clock_set = self.clock_set or rng.below(100) == 0
        if client.connected and rng.below(8) == 0:
            self.count("sent again for quota", client.store.later())
            client._retry_ms = 0
            client._sweep()
            client._sweep()

    async def step(self):
        rng = self.rng
        client = self.rig.client
        if self.five:
            self.pass_time()
        what = rng.below(100)
        if what < 50:
            qos = (0, 1, 1, 2, 2)[rng.below(5)]
            topic = "out/%d" % rng.below(3)
            payload = rng.bytes(rng.below((10, 100, 1500)[rng.below(3)]))
            retain = self.five and rng.below(8) == 0
            found = self.some_properties() if self.five else {}
            expected = client.store.session.newest % 65023 + 1
            if qos:  # it may go out, and be acknowledged, before publish() returns
                self.published[expected] = topic, payload, qos, retain, found, self.seconds
                self.owed[expected] = qos
            try:
                packet_id = await client.publish(topic, payload, qos, retain, properties=found or None)
            except (JournalFull, ValueError) as e:
                if qos:
                    del self.owed[expected]
                self.count("refused")
                if isinstance(e, ValueError):
                    said = client.connected and self.link.connack or {}
                    over = qos > said.get("maximum_qos", 2) or (retain and not said.get("retain_available", 1))
                    if not over and not self.is_too_large(said, topic, payload, qos, found):
                        self.fail("not taken: %r" % e)
                return
            if qos:
                if packet_id != expected:
                    self.fail("packet identifier %d, expected %d" % (packet_id, expected))
                self.count("published")
        elif what < 54:
            self.tasks.append(asyncio.create_task(self.ask(client, "f%d" % rng.below(3), rng.below(4))))
        elif what < 55:
            self.count("closed")
            await client.close()
            self.forget_connack()
            self.cuts += 1  # it cuts a handler short, too
            await client.start()
        elif what < 57:
            await self.power_cut()
        else:
            for _ in range(rng.below(30)):
                await asyncio.sleep_ms(0)

    async def ask(self, client, topic_filter, qos):
        try:
            if qos == 3:
                await client.unsubscribe(topic_filter)
            else:
                await client.subscribe(topic_filter, qos)
        except (SubscribeRefused, JournalFull):
            pass

    async def power_cut(self):
        self.count("power cuts")
        await self.stop_tasks()
        graced = list(self.rig.client.store._held)
        await self.rig.cut()
        if self.five:
            self.seconds += self.rng.below(10)
            self.booted = self.seconds
            self.clock_set = self.rng.below(2) == 0
        self.forget_connack()
        self.cuts += 1
        self.link = None
        client = self.prepare(self.rig.make())
        for packet_id in graced:
            if not client.store.is_live(packet_id):
                self.owed.pop(packet_id, None)
                self.seen.discard(packet_id)
        await client.start()
        self.check()

    def forget_connack(self):
        """The client has ended, and may not have come to record the new session that a CONNACK told it of."""
        if self.before_epoch == self.rig.client._epoch:
            self.taken |= self.before
        self.before_epoch = -1

    async def stop_tasks(self):
        for task in self.tasks:
            task.cancel()
        for _ in range(3):
            await asyncio.sleep_ms(0)
        self.tasks = []

    async def run(self, steps):
        self.tasks = []
        try:
            await self.prepare(self.rig.client).start()
            for _ in range(steps):
                await self.step()
                self.check()
            await self.stop_tasks()
            await self.end()
        finally:
            await self.stop_tasks()
            await self.rig.cut()

    async def end(self):
        """An honest broker, over a new connection: all that is still stored arrives."""
        self.honest = True
        client = self.rig.client
        if self.link:
            self.link.ends = 2
            self.link.coming = b""
            self.link.wake.set()
            client._down.set()
        await self.until(lambda: client.connected and self.link and not self.link.closed and not self.link.ends)
        errors = client.protocol_errors
        await self.until(lambda: not client.store.waiting())
        if self.owed or client.protocol_errors != errors:
            self.fail("honest broker: %r owed, %r" % (self.owed, client.last_error))
        await client.close()

    async def until(self, condition):
        for _ in range(100000):
            self.check()
            if condition():
                return
            await asyncio.sleep_ms(0)
        self.fail("comes to no end: %r" % self.rig.client.stats())


def run(first, last, steps, version=4):
    """Run the seeds first..last-1; return their figures, summed."""
    figures = {}
    dial = client_module.dial
    clock = Client5._clock
    try:
        for seed in range(first, last):
            gc.collect()
            one = MadBroker(seed, version)
            client_module.dial = one.dial

            def counted(*args):
                data = bytearray(*args)
                one.largest = max(one.largest, len(data))
                return data

            packet_module.bytearray = packet5_module.bytearray = counted
            try:
                asyncio.run(one.run(steps))
            finally:
                asyncio.new_event_loop()  # MicroPython's keeps the tasks of a run that has failed
            for name, n in one.figures.items():
                figures[name] = figures.get(name, 0) + n
    finally:
        client_module.dial = dial
        Client5._clock = clock
        for module in (packet_module, packet5_module):
            if hasattr(module, "bytearray"):
                del module.bytearray
    return figures


def summary(figures):
    return ", ".join(["%s %d" % (name, figures[name]) for name in sorted(figures)])


def test_a_mad_broker_costs_no_message_and_doubles_none():
    figures = run(0, 12 if sys.implementation.name != "micropython" else 4, 300)
    print(summary(figures))
    for name in ("published", "messages received", "violations", "power cuts", "connections"):
        assert figures.get(name), name


def test_a_mad_broker_of_mqtt_5_does_neither():
    figures = run(0, 12 if sys.implementation.name != "micropython" else 1, 300, 5)
    print(summary(figures))
    for name in ("published", "messages received", "violations told", "power cuts", "sent again for quota"):
        assert figures.get(name), name


if __name__ == "__main__":
    first = int(sys.argv[1])
    last = int(sys.argv[2]) if len(sys.argv) > 2 else first + 1
    version = int(sys.argv[3]) if len(sys.argv) > 3 else 4
    print(summary(run(first, last, 300, version)))
