"""A scripted broker on a free loopback port, for both interpreters: it answers as a broker does, but for the packets
its script names.  It speaks what CONNECT says, MQTT 3.1.1 or 5.

    SCRIPT = (
        # connection, packet from the client, which of that name, what happens
        (1, "PUBLISH", 2, "lost"),
        (2, "CONNECT", 1, "present 1"),
    )

connection, which: counted from 1; 0: every one.  What can happen:

    "lost"         the broker never gets the packet, the link drops: the request is lost
    "unanswered"   it gets it, the link drops before its answer: the answer is lost
    "answered"     the answer goes out, then the link drops
    "silent"       it gets it and says nothing
    "ignored"      it never gets it, and the link stays
    "refuse N"     return code N (CONNECT; SUBSCRIBE: 128); MQTT 5: the answer has reason code N
    "present N"    session present N, whatever it has (CONNECT)
    b"..."         these bytes go out in place of the answer

Every packet, also a lost one, is noted with the number of its connection.  What arrived, once, is in .delivered.
"""

import asyncio
import os

from mqtt_durable import properties as _properties
from packet_types import NAMES

_PATIENCE_MS = 10000
_PAIRS = 19  # the type of the user properties
_CLIENTS = {"DISCONNECT": 13}  # packets whose properties are others from a client than from a broker


async def until(condition, what="what the test waits for"):
    """Return when condition() is true.  AssertionError if that takes so long that it will never be."""
    for _ in range(_PATIENCE_MS):
        if condition():
            return
        await asyncio.sleep_ms(1)
    raise AssertionError("never happened: %s" % what)


async def turns(n=50):
    """Let all tasks run n times: whatever does not wait for the network or the clock has happened then."""
    for _ in range(n):
        await asyncio.sleep_ms(0)


def packet(first, body):
    """Bytes of a packet: first byte, body."""
    n = len(body)
    length = b""
    while n > 127:
        length += bytes((n & 127 | 128,))
        n >>= 7
    return bytes((first,)) + length + bytes((n,)) + body


def _field(text):
    data = text.encode()
    return bytes((len(data) >> 8, len(data) & 255)) + data


def block(properties):
    """Property length and properties of MQTT 5: a dictionary, each property in whatever packet; bytes: as they are."""
    if isinstance(properties, bytes):
        return properties
    body = b""
    for name, value in properties.items():
        row = _properties._NAMES.index(name) * 4
        ident, kind = _properties._ROWS[row], _properties._ROWS[row + 1]
        for one in value if isinstance(value, list) else (value,):
            if kind == _PAIRS:
                body += bytes((ident,)) + _field(one[0]) + _field(one[1])
            else:
                body += _properties._encoded(name, ident, kind, one)
    return packet(0, body)[1:]


def ack(name, packet_id, reason_code=0, properties=None):
    """Bytes of a PUBACK, PUBREC, PUBREL, PUBCOMP or UNSUBACK.  The last two arguments: of MQTT 5, not for UNSUBACK."""
    kind = NAMES.index(name)
    body = bytes((packet_id >> 8, packet_id & 255))
    if reason_code or properties:
        body += bytes((reason_code,)) + (block(properties) if properties else b"")
    return packet(kind << 4 | (2 if name == "PUBREL" else 0), body)


def told(name, reason_code=0, properties=None, present=0):
    """Bytes of a CONNACK, DISCONNECT or AUTH of MQTT 5."""
    body = bytes((present, reason_code)) if name == "CONNACK" else bytes((reason_code,))
    return packet(NAMES.index(name) << 4, body + block(properties or {}))


def publish(topic, payload, qos=0, packet_id=0, dup=False, retain=False, properties=None):
    """Bytes of a PUBLISH.  topic: str.  payload: bytes.  properties: for MQTT 5, {} if there are none."""
    body = _field(topic)
    if qos:
        body += bytes((packet_id >> 8, packet_id & 255))
    if properties is not None:
        body += block(properties)
    return packet(0x30 | (8 if dup else 0) | qos << 1 | (1 if retain else 0), body + payload)


class Packet:
    """One packet from the client.  .connection, .name, .flags, .body; .packet_id (0: none), .topic, .payload,
    .filter, .qos; of a CONNECT .version, .clean, .keep_alive_s, .client_id, .will, .username, .password.
    Of MQTT 5 .properties, .reason_code, .options of a subscription, .will_properties.  Its PUBLISH has the topic that
    its alias stands for; .bare: there was none besides."""

    def __init__(self, connection, first, body, version=4):
        self.connection = connection
        self.name = NAMES[first >> 4]
        self.flags = first & 15
        self.body = body
        self.version = version
        self.at = 0
        self.reason_code = 0
        self.properties = {}
        self.packet_id = 0
        self.qos = first >> 1 & 3
        self.dup = bool(first & 8)
        self.retain = bool(first & 1)
        if self.name == "CONNECT":
            self._connect()
        elif self.name == "PUBLISH":
            self.topic = self._field().decode()
            if self.qos:
                self.packet_id = self._number()
            self._block()
            self.payload = body[self.at :]
        elif body and self.name not in ("DISCONNECT", "AUTH"):
            self.packet_id = self._number()
            if self.name in ("SUBSCRIBE", "UNSUBSCRIBE"):
                self._block()
                self.filter = self._field().decode()
                self.options = body[-1] if self.name == "SUBSCRIBE" else 0
                self.qos = self.options & 3
        if self.name != "PUBLISH" and self.at < len(body) and version == 5 and not hasattr(self, "filter"):
            self.reason_code = body[self.at]
            self.at += 1
            if self.at < len(body):
                self._block()

    def _number(self):
        self.at += 2
        return self.body[self.at - 2] << 8 | self.body[self.at - 1]

    def _field(self):
        n = self._number()
        self.at += n
        return self.body[self.at - n : self.at]

    def _block(self, kind=None):
        """The properties, of which MQTT 3.1.1 has none."""
        if self.version == 5:
            kind = _CLIENTS.get(self.name, NAMES.index(self.name)) if kind is None else kind
            self.properties, self.at = _properties.decode(self.body, self.at, len(self.body), kind)

    def _connect(self):
        protocol, self.version = self._field(), self.body[self.at]
        if protocol != b"MQTT" or self.version not in (4, 5):
            raise AssertionError("CONNECT for %r %d" % (protocol, self.version))
        flags = self.body[self.at + 1]
        self.at += 2
        self.clean = bool(flags & 2)
        self.keep_alive_s = self._number()
        self._block()
        properties = self.properties
        self.client_id = self._field().decode()
        self.will = None
        if flags & 4:
            self._block(0)
            self.properties, self.will_properties = properties, self.properties
            topic = self._field().decode()
            self.will = topic, self._field(), flags >> 3 & 3, bool(flags & 32)
        self.username = self._field().decode() if flags & 128 else None
        self.password = self._field().decode() if flags & 64 else None
        # Whether the broker drops the session when the connection ends.
        self.ends = self.clean if self.version == 4 else not properties.get("session_expiry_interval")

    def __repr__(self):
        if self.name == "CONNECT":
            return "CONNECT clean" if self.clean else "CONNECT"
        text = self.name
        if self.packet_id:
            text += " %d" % self.packet_id
        if self.name == "PUBLISH":
            try:
                payload = self.payload.decode()
            except UnicodeError:
                payload = "%d bytes" % len(self.payload)
            text += " %s%s" % ("dup " if self.dup else "", payload)
        elif self.name in ("SUBSCRIBE", "UNSUBSCRIBE"):
            text += " " + self.filter
        if self.reason_code:
            text += " 0x%02x" % self.reason_code
        return text


class FakeBroker:
    """async with FakeBroker(script) as broker: listens on 127.0.0.1:.port.

    .packets: every Packet.  .delivered: (topic, payload, qos) of the messages that arrived.  .connections: how many
    there have been.  .links: those that are open, by number.  .closed: numbers of those that ended.
    .sessions: client_id -> (topic filter -> QoS, packet identifiers of QoS 2 messages that wait for PUBREL).
    says: the properties that its answers have in MQTT 5: {"CONNACK": {name: value}}, see block().  After a CONNECT that
    the script answered by AUTH the next answer is the CONNACK; later an AUTH is answered by AUTH.
    """

    def __init__(self, script=(), says=None):
        self.script = script
        self.says = says or {}
        self.port = 0
        self.packets = []
        self.delivered = []
        self.connections = 0
        self.links = {}
        self.closed = []
        self.sessions = {}
        self._server = None
        self._seen = {}
        self._connacks = {}  # of a connection that has had an AUTH in its place
        self._aliases = {}  # (connection, topic alias) -> topic

    async def __aenter__(self):
        await self.start()
        return self

    async def __aexit__(self, *_):
        await self.stop()

    async def start(self):
        """Listen, on the same port as before."""
        for _ in range(1 if self.port else 100):
            port = self.port or 15000 + int.from_bytes(os.urandom(2), "big") % 17000
            try:
                self._server = await asyncio.start_server(self._serve, "127.0.0.1", port)
                self.port = port
                return
            except OSError as e:
                error = e
        raise error

    async def stop(self):
        """Drop every connection and listen no more.  The sessions are kept."""
        server, self._server = self._server, None
        if server is not None:
            server.close()  # first, or the client would be back before it
        for number in list(self.links):
            await self.drop(number)
        if server is not None:
            await server.wait_closed()

    async def drop(self, number=None):
        """Drop a connection, the newest if none is given."""
        number = number or self.connections
        if number in self.links:
            self.links[number][1].cancel()
            await until(lambda: number in self.closed, "the end of a dropped connection")

    def forget(self):
        """Lose all sessions."""
        self.sessions.clear()

    async def send(self, data):
        """Send bytes over the newest connection."""
        writer = self.links[self.connections][0]
        writer.write(data)
        await writer.drain()

    async def publish(self, *args, **kwargs):
        """Send a PUBLISH over the newest connection; see publish()."""
        if self.named("CONNECT", self.connections)[0].version == 5:
            kwargs.setdefault("properties", {})
        await self.send(publish(*args, **kwargs))

    async def connected(self, number=1):
        """Return when the client's CONNECT of that connection is there and has been answered."""
        await until(lambda: number in self.links and self._seen.get((number, "CONNECT")), "connection %d" % number)

    async def expect(self, text, count=1, connection=0):
        """Return when so many packets that read like this have come."""
        await until(lambda: self.trace(connection).count(text) >= count, "%s in %r" % (text, self.packets))

    def named(self, name, connection=0):
        """The packets of that name, of one connection or of all."""
        return [p for p in self.packets if p.name == name and connection in (0, p.connection)]

    def trace(self, connection=0, without=()):
        """The packets as texts."""
        return [repr(p) for p in self.packets if connection in (0, p.connection) and p.name not in without]

    # -- one connection

    async def _serve(self, reader, writer):
        self.connections += 1
        number = self.connections
        self.links[number] = writer, asyncio.current_task()
        data = b""
        version = 4
        try:
            while True:
                some = await reader.read(1024)
                if not some:
                    break
                data += some
                while len(data) > 1:
                    length = 0
                    head = 1
                    while head < len(data):
                        length |= (data[head] & 127) << 7 * (head - 1)
                        head += 1
                        if data[head - 1] < 128:
                            break
                    if data[head - 1] > 127 or len(data) < head + length:
                        break
                    came = Packet(number, data[0], data[head : head + length], version)
                    version = came.version
                    data = data[head + length :]
                    self._resolve(came)
                    self.packets.append(came)
                    if not await self._take(came, writer):
                        return
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            del self.links[number]
            for connect in self.named("CONNECT", number):
                if connect.ends:
                    self.sessions.pop(connect.client_id, None)
            if hasattr(writer, "s"):
                writer.s.close()  # MicroPython's close() does nothing
            else:
                writer.close()
            self.closed.append(number)

    def _resolve(self, came):
        """Topic alias and session expiry, which other packets told."""
        if came.name == "PUBLISH":
            came.bare = not came.topic
            key = came.connection, came.properties.get("topic_alias")
            if came.bare:
                came.topic = self._aliases[key]  # a KeyError is the client's fault
            elif key[1]:
                self._aliases[key] = came.topic
        elif came.name == "DISCONNECT" and "session_expiry_interval" in came.properties:
            self.named("CONNECT", came.connection)[0].ends = not came.properties["session_expiry_interval"]

    async def _take(self, came, writer):
        """Handle a packet; False if the link is to drop."""
        key = came.connection, came.name
        self._seen[key] = self._seen.get(key, 0) + 1
        what = ""
        instead = b""
        for connection, name, which, happens in self.script:
            if connection in (0, came.connection) and name == came.name and which in (0, self._seen[key]):
                what, instead = ("", happens) if isinstance(happens, bytes) else (happens, b"")
                break
        if what == "lost":
            return False
        if what == "ignored":
            return True
        answer = self._answer(came, what)
        if what == "unanswered":
            return False
        if instead[:1] == b"\xf0" and came.name == "CONNECT":
            self._connacks[came.connection] = answer
        answer = instead or answer
        if answer and what != "silent":
            writer.write(answer)
            await writer.drain()
        refused = came.name == "CONNECT" and not instead and answer[3:4] > b"\0"
        return what != "answered" and came.name != "DISCONNECT" and not refused

    def _answer(self, came, what):
        name = came.name
        code = int(what[7:]) if what.startswith("refuse") else 0
        if name == "CONNECT":
            return self._connack(came, code, what)
        if name == "AUTH":
            method = {"authentication_method": came.properties["authentication_method"]}
            method.update(self.says.get("AUTH", {}))
            return self._connacks.pop(came.connection, None) or told("AUTH", code, method)
        filters, unreleased = self._session
        if name == "PUBLISH":
            if came.packet_id not in unreleased and code < 128:
                self.delivered.append((came.topic, came.payload, came.qos))
            if came.qos == 2 and code < 128:
                unreleased.add(came.packet_id)
            return self._ack("PUBACK" if came.qos == 1 else "PUBREC", came, code) if came.qos else b""
        if name == "PUBREL":
            unreleased.discard(came.packet_id)
            return self._ack("PUBCOMP", came, code)
        if name == "PUBREC":
            return self._ack("PUBREL", came, code)
        if name == "SUBSCRIBE":
            granted = code or came.qos
            if granted < 128:
                filters[came.filter] = granted
            return self._codes("SUBACK", came, bytes((granted,)))
        if name == "UNSUBSCRIBE":
            filters.pop(came.filter, None)
            return self._codes("UNSUBACK", came, b"" if came.version == 4 else bytes((code,)))
        return b"\xd0\x00" if name == "PINGREQ" else b""

    def _connack(self, came, code, what):
        says = {}
        if came.version == 5:
            says.update(self.says.get("CONNACK", {}))
            if "authentication_method" in came.properties:
                says.setdefault("authentication_method", came.properties["authentication_method"])
        present = 0
        if not code:
            name = came.client_id or says.get("assigned_client_identifier")
            if came.clean:
                self.sessions.pop(name, None)
            present = name in self.sessions
            self._session = self.sessions.setdefault(name, ({}, set()))
            if what.startswith("present"):
                present = what == "present 1"
        return told("CONNACK", code, says, present) if came.version == 5 else bytes((0x20, 2, present, code))

    def _ack(self, name, came, code):
        return ack(name, came.packet_id, code, self.says.get(name) if came.version == 5 else None)

    def _codes(self, name, came, codes):
        head = bytes((came.packet_id >> 8, came.packet_id & 255))
        if came.version == 5:
            head += block(self.says.get(name, {}))
        return packet(NAMES.index(name) << 4, head + codes)
