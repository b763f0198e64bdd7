"""The client against a broker gone mad: test_session_fuzz.py FIRST LAST runs more seeds, SEED replays one
(on MicroPython not always: there the order of tasks depends on the clock).

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
from fakebroker import ack, packet, publish  # noqa: E402
from mqtt_durable.errors import JournalFull, MQTTError, SubscribeRefused  # noqa: E402
from norsim import Rng  # noqa: E402
from packet_types import NAMES  # noqa: E402
from test_client import Rig  # noqa: E402

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


def publish_fields(flags, body):
    """(qos, packet identifier, topic, payload) of a PUBLISH."""
    qos = flags >> 1 & 3
    if qos == 3 or (flags & 8 and not qos):
        raise Violation("flags of PUBLISH")
    n = number(body)
    topic = text(body[2 : 2 + n])
    if not n or len(body) < 2 + n or "+" in topic or "#" in topic:
        raise Violation("topic name")
    packet_id = number(body, 2 + n) if qos else 0
    if qos and not packet_id:
        raise Violation("packet identifier 0")
    return qos, packet_id, topic, bytes(body[2 + n + (2 if qos else 0) :])


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
                if not self.unanswered:
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

    def write(self, data):
        link = self._link
        broker = link.broker
        if link.closed:
            raise OSError(_ECONNRESET)
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

    def __init__(self, seed):
        rng = self.rng = Rng(seed)
        self.seed = seed
        self.honest = False
        self.session = False  # as an honest broker knows it
        self.fault = None
        self.figures = {}
        self.connections = 0
        self.link = None
        # Outbound: what the program published, and what was told of it.
        self.published = {}  # packet identifier -> (topic, payload, QoS)
        self.owed = {}  # those that no acknowledgement has come for
        self.seen = set()  # those that the broker has whole, in this session
        self.released = set()  # those of which PUBREL was sent
        # Inbound:
        self.sent = []  # PUBLISHes for use as duplicates
        self.due = {}  # (QoS, packet identifier, topic, payload) -> how often the client has it
        self.unreleased = {}  # packet identifier -> .cuts and the client's session when a handler had it
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
        self.rig = Rig(self, fresh=rng.below(3) == 0, **options)

    def count(self, name):
        self.figures[name] = self.figures.get(name, 0) + 1

    def fail(self, what):
        what = "test_session_fuzz.py %d: connection %d: %s" % (self.seed, self.connections, what)
        self.fault = self.fault or what
        raise AssertionError(what)

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
                name, flags, body, link.unheard, _ = found
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
            qos, packet_id, topic, payload = publish_fields(flags, body)
            if qos:
                if self.published.get(packet_id) != (topic, payload, qos):
                    self.fail("message %d is another one" % packet_id)
                if packet_id in self.released:
                    self.fail("PUBLISH %d after its PUBREL" % packet_id)
                if packet_id in self.seen and not flags & 8:
                    self.fail("PUBLISH %d again without DUP" % packet_id)
                self.seen.add(packet_id)
        else:
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
                    if size > self.limit and link.unread[0] >> 4 == 3 and not link.passing and len(body) > 1:
                        if len(body) >= number(body) + 4:
                            link.passing = True
                            self.understand(link, "PUBLISH", flags, body, size)
                    return
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
        if name == "PUBLISH":
            qos, packet_id, topic, payload = publish_fields(flags, body)
            if size > self.limit or topic[0] == "$":
                self.taken.add(packet_id)
            else:
                key = qos, packet_id, topic, payload
                self.due[key] = self.due.get(key, 0) + 1
            if qos:
                # Either answer will do if the broker has used this identifier at both.
                used = self.used[packet_id] = self.used.get(packet_id, 0) | qos
                for name in ("PUBACK", "PUBREC"):
                    if used & (1 if name == "PUBACK" else 2):
                        link.came.setdefault(name, []).append(packet_id)
            return
        if name not in _FIXED and name != "SUBACK":
            raise Violation(str(name))
        if flags != _FLAGS.get(name, 0) or len(body) != _FIXED.get(name, len(body)):
            raise Violation("a fixed header")
        if name == "PINGRESP":
            return
        if name == "CONNACK":
            if not link.first or body[0] > 1 or (body[0] and link.clean):
                raise Violation("CONNACK")
            if not body[0]:
                self.seen.clear()
                self.unreleased.clear()
                self.before, self.taken = self.taken, set()
                self.before_epoch = self.rig.client._epoch
            return
        packet_id = number(body)
        if not packet_id:
            raise Violation("packet identifier 0")
        if name == "SUBACK":
            if len(body) < 3 or [code for code in body[2:] if code not in (0, 1, 2, 128)]:
                raise Violation("SUBACK")
        elif name == "PUBREL":
            link.came.setdefault("PUBCOMP", []).append(packet_id)
            self.unreleased.pop(packet_id, None)
        elif name in ("PUBACK", "PUBREC"):
            qos = 1 if name == "PUBACK" else 2
            if self.owed.get(packet_id) == qos:
                del self.owed[packet_id]
            if qos == 1:  # after a power cut an identifier that had its grace is given again
                self.seen.discard(packet_id)

    # -- what the broker does

    def answer(self, link):
        """Answer all that is due as a broker should."""
        for name, packet_id, qos in link.unanswered:
            if name == "CONNECT":
                present = self.session and not link.clean
                if not self.honest:
                    present = self.rng.below(4) > 0 and (not link.clean or self.rng.below(8) == 0)
                link.coming += bytes((0x20, 2, present, 0))
                self.session = not link.clean
            elif name == "SUBSCRIBE":
                link.coming += bytes((0x90, 3, packet_id >> 8, packet_id & 255, 0))
            elif name == "PINGREQ":
                link.coming += b"\xd0\x00"
            elif name != "PUBLISH" or qos:
                after = {"PUBREC": "PUBREL", "PUBREL": "PUBCOMP", "UNSUBSCRIBE": "UNSUBACK"}
                link.coming += ack(after.get(name) or ("PUBACK" if qos == 1 else "PUBREC"), packet_id)
        link.unanswered = []

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
        size = self.limit + rng.below(3000) if rng.below(12) == 0 else rng.below((20, 200, self.limit)[rng.below(3)])
        self.sent.append(publish("in/%d" % rng.below(3), rng.bytes(size), qos, packet_id))
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
            return ack(name, self.some_id() or 1)
        if what < 8:
            return ack("UNSUBACK", self.some_id() or 1)
        if what < 9:
            return packet(0x90, bytes((0xFE, rng.below(8), (0, 1, 2, 128)[rng.below(4)])))
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
            link.coming += _ILLEGAL[rng.below(len(_ILLEGAL))]
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

    # -- the program

    def on_message(self, message):
        packet_id = message._id & 0xFFFF
        epoch = message._id >> 16
        key = message.qos, packet_id, message.topic, message.payload
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
            if self.unreleased.get(packet_id) == now:
                self.fail("message %d twice" % packet_id)
            self.unreleased[packet_id] = now

    def prepare(self, client):
        slow = 200 if self.seed % 8 == 7 else 12
        client._pulse_ms = _NEVER_MS
        original = client._failed

        def failed(error):
            if not isinstance(error, (MQTTError, OSError, asyncio.TimeoutError)):
                self.fault = self.fault or "test_session_fuzz.py %d: %r" % (self.seed, error)
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
        for packet_id in self.owed:
            if not store.is_live(packet_id):
                self.fail("message %d is lost" % packet_id)
        session = store.session
        if len(session.busy) + len(session.held) > 256 or len(client._outbox) > 520 or store.lost:
            self.fail("out of bounds: %r" % client.stats())
        if client._inbox_bytes > _INBOX_BYTES + self.limit or self.largest > max(self.limit, 768):
            self.fail("too much memory: %d, a buffer of %d" % (client._inbox_bytes, self.largest))
        if client._run_task and client._run_task.done():
            self.fail("the client has ended")

    async def step(self):
        rng = self.rng
        client = self.rig.client
        what = rng.below(100)
        if what < 50:
            qos = (0, 1, 1, 2, 2)[rng.below(5)]
            topic = "out/%d" % rng.below(3)
            payload = rng.bytes(rng.below((10, 100, 1500)[rng.below(3)]))
            expected = client.store.session.newest % 65023 + 1
            if qos:  # it may go out, and be acknowledged, before publish() returns
                self.published[expected] = topic, payload, qos
                self.owed[expected] = qos
            try:
                packet_id = await client.publish(topic, payload, qos)
            except JournalFull:
                if qos:
                    del self.owed[expected]
                self.count("refused")
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
        await self.until(lambda: not client.store.waiting)
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


def run(first, last, steps):
    """Run the seeds first..last-1; return their figures, summed."""
    figures = {}
    dial = client_module.dial
    try:
        for seed in range(first, last):
            gc.collect()
            one = MadBroker(seed)
            client_module.dial = one.dial

            def counted(*args):
                data = bytearray(*args)
                one.largest = max(one.largest, len(data))
                return data

            packet_module.bytearray = counted
            try:
                asyncio.run(one.run(steps))
            finally:
                asyncio.new_event_loop()  # MicroPython's keeps the tasks of a run that has failed
            for name, n in one.figures.items():
                figures[name] = figures.get(name, 0) + n
    finally:
        client_module.dial = dial
        if hasattr(packet_module, "bytearray"):
            del packet_module.bytearray
    return figures


def told(figures):
    return ", ".join(["%s %d" % (name, figures[name]) for name in sorted(figures)])


def test_a_mad_broker_costs_no_message_and_doubles_none():
    figures = run(0, 12 if sys.implementation.name != "micropython" else 4, 300)
    print(told(figures))
    for name in ("published", "messages received", "violations", "power cuts", "connections"):
        assert figures.get(name), name


if __name__ == "__main__":
    first = int(sys.argv[1])
    last = int(sys.argv[2]) if len(sys.argv) > 2 else first + 1
    print(told(run(first, last, 300)))
