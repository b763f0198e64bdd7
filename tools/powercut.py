"""Cut the power at every flash operation of recorded workloads, and check what both ends of the session saw.

The device is the real Store, Journal and codec over a Nor; the broker is a model of a server of MQTT 3.1.1 or 5 with
one persistent session; between them are two queues of bytes.  No sockets, no clock: a run is a function of its id.

    powercut.py                              every workload, every operation, every way to leave it half done
    powercut.py qos2_publish@17.prefix.3     replay one run: packets both ways, flash operations, what went wrong,
                                             and the sectors as they are then; --plot FILE.svg draws them
    powercut.py --workload wrap --prog-size 256 --weak --nested
    powercut.py --workload wrap --sealed     an encrypted partition, program size 16

An id is workload[/prog_size | /sealed]@operation.mode.seed, followed by a second @operation.mode.seed for a second
cut, counted from the restart.  The seed also decides what becomes of the bytes on the link: 0 lost, 1 arrived but all
answers lost, 2 the first half arrived; then again from 0.  operation 0: no cut.

Checked of the device's messages: what publish() accepted arrives, QoS 2 once, in order, no gap and no double for a
program that goes on from the mark; of those to the device: the handler has each QoS 2 message once, or once more with
the same token if the power failed before its PUBREC; of every packet: the rules of the protocol (class Witness).
"""

import sys

if __name__ == "__main__":
    _TOOLS = sys.argv[0].rpartition("/")[0] or "."
    sys.path[:0] = [_TOOLS + "/../lib", _TOOLS + "/shim", _TOOLS]
    import host

    host.install()

import mqtt_durable.mount  # noqa: F401
import mqtt_durable.replay  # noqa: F401 - thousands of mounts: what is loaded stays loaded, see once.py
from mqtt_durable import packet as packet3
from mqtt_durable import packet5
from mqtt_durable.errors import JournalFull
from mqtt_durable.journal import Journal
from mqtt_durable.store import Store, identity
from mqtt_durable.store5 import Store5
from norsim import MODES_ERASE, MODES_PROGRAM, Encrypted, Nor, PowerCut
from packet_types import (
    CONNACK,
    CONNECT,
    DISCONNECT,
    NAMES,
    PUBACK,
    PUBCOMP,
    PUBLISH,
    PUBREC,
    PUBREL,
    SUBACK,
    SUBSCRIBE,
)


ME = identity("device", "broker", 1883)
FILTER = "to/device"
ROUNDS = 500  # more means that something waits for ever
SEALED = "sealed"  # in place of a prog_size: an encrypted partition
WALL = 1790000000  # what the clock says at first; a round takes a second
RESTART_OPS = 8  # of the operations after a mount, how many count as the restart a second cut may hit


class Failure(Exception):
    """A promise was broken; the argument says which."""


class Workload:
    """What a run does.

    publishes, receives: messages each way.  qos, qos_in: of message n, by n modulo their length.  size: payload bytes.
    events: {round: what}: "drop" the link, "lose" the broker's session (and the link), "close" the device orderly and
    start it again, "offline" and "online".  stuck: until this many messages have been delivered, the broker does not
    finish messages 1 and 2 of each direction.  handlers: how many messages the handler takes in a round.  burst: most
    messages published at a time, three times in each round that every divides.  newest: the packet identifier given
    out last, long ago.  version: 5 for MQTT 5, where messages have properties; aliases, receive_maximum: of its broker.
    refused, postponed: the numbers of the messages that it never takes, and not when they first come.  expiring:
    seconds, the message expiry interval of every second message.
    """

    def __init__(
        self,
        publishes=0,
        qos=(1,),
        receives=0,
        qos_in=(2,),
        size=24,
        sectors=4,
        in_flight=4,
        burst=1,
        when_full="raise",
        events=None,
        stuck=0,
        handlers=8,
        every=1,
        newest=0,
        version=3,
        aliases=0,
        receive_maximum=65535,
        refused=(),
        postponed=(),
        expiring=0,
    ):
        self.publishes = publishes
        self.qos = qos
        self.receives = receives
        self.qos_in = qos_in
        self.size = size
        self.sectors = sectors
        self.in_flight = in_flight
        self.burst = burst
        self.when_full = when_full
        self.events = events or {}
        self.stuck = stuck
        self.handlers = handlers
        self.every = every
        self.newest = newest
        self.version = version
        self.aliases = aliases
        self.receive_maximum = receive_maximum
        self.refused = refused
        self.postponed = postponed
        self.expiring = expiring

    def qos_of(self, number):
        return self.qos[number % len(self.qos)]

    def qos_in_of(self, number):
        return self.qos_in[number % len(self.qos_in)]

    def properties(self, number):
        """What message n has in MQTT 5, None or a dictionary."""
        found = {}
        if number % 3:
            found["content_type"] = "text/%d" % number
        if self.expiring and number % 2:
            found["message_expiry_interval"] = self.expiring
        return found or None

    def payload(self, number):
        return b"%d " % number + bytes([(number * 7 + i) & 255 for i in range(self.size + number % 5)])


WORKLOADS = {
    "qos1_publish": Workload(8, (1,)),
    "qos2_publish": Workload(8, (2,)),
    "qos1_receive": Workload(receives=8, qos_in=(1,), handlers=2),
    "qos2_receive": Workload(receives=8, qos_in=(2,), handlers=2),
    "both_ways": Workload(12, (1, 2, 2), 12, (2, 1, 2), burst=2, in_flight=8, handlers=3),
    "reconnects": Workload(
        12,
        (2, 1),
        12,
        (2, 1),
        handlers=1,
        newest=65018,
        events={2: "drop", 4: "close", 5: "drop", 7: "offline", 10: "online"},
    ),
    "session_lost": Workload(
        14,
        (2, 2, 1),
        14,
        (2, 2, 1),
        burst=2,
        handlers=2,
        events={2: "lose", 4: "drop", 6: "lose", 7: "close", 9: "lose"},
    ),
    "wrap": Workload(44, (1, 2), 24, (2, 1), size=520, burst=1, stuck=38, events={12: "drop", 20: "close"}),
    "receive_wrap": Workload(18, (1,), 72, (2,), size=560, burst=2, every=13),
    "full": Workload(
        36, (1, 2), 4, (2,), size=420, burst=3, in_flight=3, newest=64993, events={1: "offline", 9: "online"}
    ),
    "drop_oldest": Workload(
        40,
        (2, 1),
        4,
        (2,),
        size=420,
        burst=3,
        in_flight=3,
        when_full="drop_oldest",
        events={1: "offline", 11: "online"},
    ),
    "properties": Workload(
        14,
        (1, 2, 2),
        10,
        (2, 1),
        version=5,
        aliases=2,
        burst=2,
        in_flight=8,
        handlers=2,
        newest=65018,
        events={2: "drop", 4: "close", 6: "lose", 8: "drop"},
    ),
    "refusals": Workload(
        16,
        (1, 2),
        version=5,
        burst=2,
        receive_maximum=2,
        refused=(2, 5, 8),
        postponed=(1, 3, 6, 9, 10),
        events={3: "drop", 6: "close", 7: "lose"},
    ),
    "expiry": Workload(
        40,
        (1, 2),
        4,
        (2,),
        size=420,
        version=5,
        aliases=8,
        burst=3,
        in_flight=3,
        refused=(7, 30),
        postponed=(9, 20),
        expiring=4,
        events={1: "offline", 5: "online", 9: "close", 10: "offline", 16: "online"},
    ),
}


# -- packets, parsed without the library


def split(data):
    """Cut bytes into whole packets: return (packets, rest)."""
    packets = []
    at = 0
    while True:
        length = shift = 0
        i = at + 1
        while i < len(data):
            length |= (data[i] & 127) << shift
            shift += 7
            i += 1
            if data[i - 1] < 128:
                if i + length > len(data):
                    return packets, data[at:]
                packets.append(bytes(data[at : i + length]))
                at = i + length
                break
        else:
            return packets, data[at:]


def body_of(packet):
    i = 1
    while packet[i] > 127:
        i += 1
    return packet[i + 1 :]


def publish_fields(packet, version=3):
    """(packet identifier, topic, payload) of a PUBLISH at QoS 1 or 2; of MQTT 5 without its properties."""
    body = body_of(packet)
    n = body[0] << 8 | body[1]
    at = 4 + n
    if version == 5:
        at += 1 + body[at]  # of which there are less than 128 bytes here
    return body[2 + n] << 8 | body[3 + n], str(body[2 : 2 + n], "utf-8"), body[at:]


def properties_of(packet):
    """(topic alias, message expiry interval, content type) of a PUBLISH of MQTT 5; 0, 0 and "" for none."""
    body = body_of(packet)
    at = 4 + (body[0] << 8 | body[1])
    stop = at + 1 + body[at]
    at += 1
    alias = expiry = 0
    content_type = ""
    while at < stop:
        if body[at] == 35:
            alias = body[at + 1] << 8 | body[at + 2]
            at += 3
        elif body[at] == 2:
            expiry = body[at + 3] << 8 | body[at + 4]
            at += 5
        elif body[at] == 3:
            n = body[at + 2]
            content_type = str(body[at + 3 : at + 3 + n], "utf-8")
            at += 3 + n
        else:
            raise Failure("property %d in a PUBLISH" % body[at])
    return alias, expiry, content_type


def number_of(payload):
    return int(bytes(payload).split(b" ", 1)[0])


def id_of(packet):
    body = body_of(packet)
    return body[0] << 8 | body[1]


def ack(kind, packet_id, reason=0):
    first = kind << 4 | (2 if kind in (PUBREL, SUBSCRIBE) else 0)
    packet = bytes((first, 3 if reason else 2, packet_id >> 8, packet_id & 255))
    return packet + bytes((reason,)) if reason else packet


def put_publish(topic, qos, dup, packet_id, payload, version=3):
    body = bytes((0, len(topic))) + topic.encode() + bytes((packet_id >> 8, packet_id & 255))
    body += (b"\0" if version == 5 else b"") + payload
    n = len(body)
    size = bytes((n,)) if n < 128 else bytes((n & 127 | 128, n >> 7))
    return bytes((0x30 | qos << 1 | (8 if dup else 0),)) + size + body


def describe(packet, version=3):
    kind = packet[0] >> 4
    name = NAMES[kind]
    if kind == CONNECT:
        return name + (" clean" if body_of(packet)[7] & 2 else "")
    if kind == CONNACK:
        return "%s session present %d" % (name, packet[2])
    if kind == PUBLISH:
        packet_id, _, payload = publish_fields(packet, version)
        dup = " DUP" if packet[0] & 8 else ""
        return "%s id %d QoS %d%s: message %d" % (name, packet_id, packet[0] >> 1 & 3, dup, number_of(payload))
    if kind == DISCONNECT:
        return name
    reason = " reason 0x%02x" % packet[4] if packet[1] == 3 and kind in (PUBACK, PUBREC, PUBREL, PUBCOMP) else ""
    return "%s id %d%s" % (name, id_of(packet), reason)


# -- the broker


class Broker:
    """A server session for one client: sections 3 and 4 of MQTT 3.1.1 and 5.  Delivers a QoS 2 message when it first
    comes (method B of section 4.3.3).  Its packet identifiers run from 1 to 20 and then again; 6 are its window.
    """

    def __init__(self, world):
        self.world = world
        self.session = False
        self.online = False
        self.delivered = []  # numbers of the device's messages, as they came
        self.forgiven = []  # numbers that may come twice, because the session that knew them was lost
        self.forgotten = []  # numbers to the device that were lost with the session
        self.published = 0  # the outside publisher's position
        self.version = world.workload.version
        self._postponed = set()  # numbers that came and were refused for want of quota
        self._clean = True
        self._next_id = 0
        self._renew()

    def _renew(self):
        self.has = {}  # QoS 2 packet identifier -> number, until PUBREL
        self.flight = []  # [packet identifier, QoS, number, has had its PUBREC], in order
        self.queue = []
        self.subscribed = False
        self._owed = []  # answers kept back from a stuck message

    def lose(self):
        """The session is gone, as after a restart of a broker that does not persist."""
        self.forgiven += self.has.values()
        self.forgotten += [entry[2] for entry in self.flight] + self.queue
        self.session = False
        self._renew()

    def hang_up(self):
        self.online = False
        self._owed = []
        if self._clean:
            self.session = False

    @property
    def stuck(self):
        return len(set(self.delivered)) < self.world.workload.stuck

    def _answer(self, packet, number):
        if number in (1, 2) and self.stuck:
            self._owed.append(packet)
        else:
            self.world.answer(packet)

    def take(self, packet):
        """One whole packet has arrived."""
        kind = packet[0] >> 4
        if not self.online:
            if kind != CONNECT:
                raise Failure("%s before CONNECT" % NAMES[kind])
            self._connect(packet)
        elif kind == PUBLISH:
            self._publish(packet)
        elif kind == PUBREL:
            reason = 0x92 if self.version == 5 and id_of(packet) not in self.has else 0
            self._answer(ack(PUBCOMP, id_of(packet), reason), self.has.pop(id_of(packet), 0))
        elif kind in (PUBACK, PUBREC, PUBCOMP):
            self._acknowledged(kind, id_of(packet))
        elif kind == SUBSCRIBE:
            self.subscribed = True
            more = b"\0" if self.version == 5 else b""
            self.world.answer(bytes((0x90, 3 + len(more))) + body_of(packet)[:2] + more + packet[-1:])
        elif kind == DISCONNECT:
            self.hang_up()
        else:
            raise Failure("a client sends no %s here" % NAMES[kind])
        self.go_on()

    def _connect(self, packet):
        self._clean = bool(body_of(packet)[7] & 2)
        present = self.session and not self._clean
        self.online = True
        if not present:
            self._renew()
            self.world.witness.renewed()
        self.session = True
        self._aliases = {}
        more = b"\0" if self.version == 5 else b""
        self.world.answer(bytes((0x20, 2 + len(more), 1 if present else 0, 0)) + more)
        for entry in self.flight:
            self._send(entry, True)

    def _send(self, entry, dup):
        packet_id, qos, number, had_pubrec = entry
        if had_pubrec:
            self._answer(ack(PUBREL, packet_id), number if qos == 2 else 0)
        else:
            payload = self.world.workload.payload(number)
            self.world.answer(put_publish(FILTER, qos, dup, packet_id, payload, self.version))

    def _publish(self, packet):
        packet_id, topic, payload = publish_fields(packet, self.version)
        number = number_of(payload)
        qos = packet[0] >> 1 & 3
        workload = self.world.workload
        if self.version == 5:
            topic = self._properties(packet, topic, number)
        if topic != "from/device" or payload != workload.payload(number) or qos != workload.qos_of(number):
            raise Failure("message %d arrived garbled" % number)
        reason = 0
        if number in workload.refused:
            reason = 0x87
        elif number in workload.postponed and number not in self._postponed:
            self._postponed.add(number)
            reason = 0x97
        if reason:
            self.world.answer(ack(PUBACK if qos == 1 else PUBREC, packet_id, reason))
            return
        if qos == 1:
            self.delivered.append(number)
            self._answer(ack(PUBACK, packet_id), number)
            return
        if packet_id not in self.has:
            self.has[packet_id] = number
            self.delivered.append(number)
        elif self.has[packet_id] != number:
            raise Failure("packet id %d of message %d is message %d's" % (packet_id, number, self.has[packet_id]))
        self.world.answer(ack(PUBREC, packet_id))

    def _properties(self, packet, topic, number):
        """Return the topic that a PUBLISH has, by its topic alias if that is all it has."""
        workload = self.world.workload
        alias, expiry, content_type = properties_of(packet)
        want = workload.properties(number) or {}
        left = want.get("message_expiry_interval", 0)
        if content_type != want.get("content_type", "") or (not 0 < expiry <= left if left else expiry):
            raise Failure("message %d has other properties: %s, %d of %d s" % (number, content_type, expiry, left))
        if alias:
            if alias > workload.aliases:
                raise Failure("topic alias %d of %d" % (alias, workload.aliases))
            if topic:
                self._aliases[alias] = topic
            topic = self._aliases.get(alias, "")
        return topic

    def _acknowledged(self, kind, packet_id):
        for entry in self.flight:
            if entry[0] == packet_id:
                if (entry[1] == 1) != (kind == PUBACK) or (kind == PUBCOMP) != entry[3]:
                    break
                if kind == PUBREC:
                    entry[3] = True
                    self._send(entry, False)
                else:
                    self.flight.remove(entry)
                return
        raise Failure("%s for id %d, which waits for none" % (NAMES[kind], packet_id))

    def publish(self):
        """The outside publisher sends one more message to the device, once the device is subscribed."""
        if self.published < self.world.workload.receives and self.session and self.subscribed:
            self.published += 1
            self.queue.append(self.published)

    def go_on(self):
        if not self.online:
            return
        while self._owed and not self.stuck:
            self.world.answer(self._owed.pop(0))
        while self.queue and len(self.flight) < 6:
            number = self.queue.pop(0)
            taken = [entry[0] for entry in self.flight]
            while True:
                self._next_id = self._next_id % 20 + 1
                if self._next_id not in taken:
                    break
            self.flight.append([self._next_id, self.world.workload.qos_in_of(number), number, False])
            self._send(self.flight[-1], False)


class Witness:
    """Reads every packet the device sends, also those that are lost on the way, and holds them against the rules."""

    def __init__(self, world):
        self.world = world
        self.using = {}  # packet identifier -> number of the message it stands for until the device sees its end
        self.pubrec_sent = set()  # numbers to the device
        self._released = set()  # numbers whose PUBREL was sent
        self.renewed()
        self.connected()

    def renewed(self):
        """The broker begins a new session."""
        self._sent = set()  # numbers whose PUBLISH was sent in this session

    def connected(self):
        """A new connection begins."""
        self._rest = b""
        self._present = False
        self._last = {PUBLISH: 0, PUBREL: 0}
        self._late = set()  # numbers of messages the broker had no quota for
        self._open = set()  # numbers under way on this connection

    def told(self, session_present):
        """The device has read its CONNACK."""
        self._present = session_present

    def finished(self, packet_id):
        """The device has read a PUBACK or PUBCOMP, or a PUBREC that is a refusal."""
        self._open.discard(self.using.pop(packet_id, 0))

    def postponed(self, packet_id):
        """The device has read that the broker has no quota: it may send the message as new, behind others."""
        number = self.using.get(packet_id, 0)
        self._sent.discard(number)
        self._late.add(number)

    def see(self, data):
        """Return the whole packets that are complete with data."""
        packets, self._rest = split(self._rest + data)
        for packet in packets:
            self.world.say("     >", describe(packet, self.world.workload.version))
            kind = packet[0] >> 4
            if kind == PUBLISH:
                self._publish(packet)
            elif kind == PUBREL:
                self._pubrel(id_of(packet))
            elif kind == PUBREC:
                for packet_id, _, number, _ in self.world.broker.flight:
                    if packet_id == id_of(packet):
                        self.pubrec_sent.add(number)
        return packets

    def _publish(self, packet):
        packet_id, _, payload = publish_fields(packet, self.world.workload.version)
        number = number_of(payload)
        dup = bool(packet[0] & 8)
        if not packet_id:
            raise Failure("message %d has packet id 0" % number)
        if self.using.get(packet_id, number) != number:
            other = self.using[packet_id]
            raise Failure("packet id %d of message %d still is message %d's" % (packet_id, number, other))
        if number in self._released:
            raise Failure("PUBLISH of message %d again after its PUBREL" % number)
        if number in self._sent and not dup:
            raise Failure("message %d sent again without DUP" % number)
        if dup and not self._present:
            raise Failure("message %d sent with DUP into a new session" % number)
        if number not in self._late:
            if number <= self._last[PUBLISH]:
                raise Failure("message %d sent behind message %d on one connection" % (number, self._last[PUBLISH]))
            self._last[PUBLISH] = number
        self.using[packet_id] = number
        self._sent.add(number)
        self._open.add(number)
        workload = self.world.workload
        if len(self._open) > min(workload.in_flight, workload.receive_maximum):
            raise Failure("%d messages in flight" % len(self._open))

    def _pubrel(self, packet_id):
        number = self.using.get(packet_id)
        if number is None:
            return  # its end was read, but the device has forgotten it: again does no harm
        if number not in self.world.workload.postponed:  # their PUBRECs come in another order
            if number <= self._last[PUBREL]:
                raise Failure("PUBREL of message %d behind that of message %d" % (number, self._last[PUBREL]))
            self._last[PUBREL] = number
        self._released.add(number)
        self._open.add(number)  # which no quota keeps back
        if len(self._open) > self.world.workload.in_flight:
            raise Failure("%d messages in flight" % len(self._open))


# -- the device


class Tap:
    """Stands between journal and Nor: counts the operations since power came on, and can tell of them."""

    def __init__(self, world):
        self._world = world
        self.nor = Nor(4096 * world.workload.sectors, world.unit)
        self.device = world.device(self.nor)
        self.kinds = ""  # "p" or "e" for each operation since power came on

    def readblocks(self, n, buf, off=0):
        self.device.readblocks(n, buf, off)

    def writeblocks(self, n, buf, off):
        self.kinds += "p"
        self._world.say("flash", "%d: program 0x%x+%d" % (len(self.kinds), n << 12 | off, len(buf)))
        self.device.writeblocks(n, buf, off)

    def ioctl(self, op, arg):
        if op == 6:
            self.kinds += "e"
            self._world.say("flash", "%d: erase sector %d" % (len(self.kinds), arg))
        return self.device.ioctl(op, arg)

    def dump(self):
        """The flash as the journal reads it."""
        return self.nor.mem if self.device is self.nor else self.device.dump()

    def twin(self):
        """A device with the same cells."""
        nor = Nor(self.nor.size, self.nor.prog_size)
        nor.mem[:] = self.nor.mem
        nor._weak = dict(self.nor._weak)
        nor._weak_at = list(self.nor._weak_at)
        nor._noise = self.nor._noise
        return self._world.device(nor)


def facts(store):
    """All that a store knows, without places, and without what of the queue is in RAM already."""
    session = store.session
    messages = [(packet_id, session.out[packet_id] & 3) for packet_id in session.order()]
    messages.reverse()
    queued = 0
    pos = store._cursor
    journal = store.journal
    while pos >= 0 and queued < store.queued():
        pos = journal.next(pos)
        if pos < 0:
            break
        packet_id = journal.buf[4] | journal.buf[5] << 8
        if journal.buf[0] & 0xB0 == 0x10 and store._is_queued(packet_id):
            messages.append((packet_id, journal.buf[0] >> 1 & 3))
            queued += 1
        pos = journal.behind(pos)
    return {
        "messages": messages,
        "unreadable": store.queued() - queued,
        "held": sorted(session.held),
        "newest": session.newest,
        "mark": store.mark,
        "received": store.received,
        "identity": store.identity,
        "subscriptions": sorted(store.subscriptions().items()),
        "assigned": getattr(store, "assigned", ""),
    }


_used = {}  # (size, prog_size, newest) -> cells


def used(nor, newest, device=lambda nor: nor, unit=None):
    """Make nor one that has given out packet identifiers up to newest, with nothing left to do.

    device: makes of it what the journal is on.  unit: the journal's, if not the Nor's own.
    """
    unit = unit or nor.prog_size
    key = (nor.size, unit, newest, type(device(nor)).__name__)
    if key not in _used:
        other = Nor(nor.size, unit)
        store = Store(Journal(device(other), unit, None, lambda n: b"\x5a" * n))
        store.open()
        session = store.session
        while session.newest != newest:
            step = min(1000, (newest - session.newest) % 65023)
            session.newest = store._taken = store._upto = (session.newest + step - 2) % 65023 + 1
            packet_id = store.publish("t", b"", 1)
            store.fill(bytearray(64), 0)
            store.on_ack(PUBACK, packet_id)
        store.close()
        _used[key] = other.mem
    nor.mem[:] = _used[key]


class Device:
    """Drives a store as a client does, from the mount on."""

    def __init__(self, world):
        self.world = world
        workload = world.workload
        self.buf = memoryview(bytearray(160))
        self.version = workload.version
        self.wire = packet5 if self.version == 5 else packet3
        self.decoder = (packet5.Decoder5 if self.version == 5 else packet3.Decoder)(96, 700)
        self.todo = []  # delivered, the handler has not had them
        self.store = self._store(world.tap, self._finished)
        world.mount_ops = len(world.tap.kinds)
        found = facts(self.store)
        world.say("mount", ", ".join("%s %s" % (key, found[key]) for key in sorted(found) if found[key]))
        again = facts(self._store(world.tap.twin(), None))
        if again != found:
            raise Failure("a second mount finds %s instead of %s" % (again, found))
        if self.store.lost or self.store.journal.damaged:
            raise Failure("%d messages lost, %d records damaged" % (self.store.lost, self.store.journal.damaged))
        self.next = (self.store.mark or 0) + 1
        if not world.accepted <= self.next - 1 <= world.attempted:
            raise Failure("mark %s, but %d was accepted" % (self.store.mark, world.accepted))
        if world.accepted < self.next - 1:  # accepted in the moment of the cut
            world.numbers[self.store.session.newest] = self.next - 1
        world.accepted = self.next - 1
        self.workload = workload

    def _store(self, device, finished):
        workload = self.world.workload
        journal = Journal(device, self.world.unit, None, lambda n: b"\x5a" * n)
        if workload.version == 5:
            clock = self.world.clock
            store = Store5(journal, workload.in_flight, workload.when_full, finished, False, clock)
        else:
            store = Store(journal, workload.in_flight, workload.when_full, finished)
        store.open()
        return store

    def _finished(self, packet_id, ok):
        number = self.world.numbers[packet_id]
        if ok is True:
            if number not in self.world.broker.delivered:
                raise Failure("message %d reported as delivered, but it was not" % number)
        elif ok:
            if number not in self.workload.refused:
                raise Failure("message %d reported as refused, but it was not" % number)
        elif self.workload.expiring:
            age = self.world.round - self.world.accepted_in[number]
            if not number % 2 or age < self.workload.expiring:
                raise Failure("message %d expired after %d s" % (number, age))
            self.world.dropped.append(number)
        else:
            if self.workload.when_full != "drop_oldest":
                raise Failure("message %d dropped" % number)
            self.world.dropped.append(number)

    def send(self, data):
        self.world.up += self.world.witness.see(data)

    def flush(self):
        while True:
            n = self.store.fill(self.buf, 0)
            if not n:
                return
            self.send(bytes(self.buf[:n]))

    def _handshake(self, clean):
        world = self.world
        world.witness.connected()
        self.decoder.reset()
        self.send(self.wire.encode_connect("device", clean, 0))
        world.deliver()
        while True:
            kind = self.decoder.next()
            if kind:
                break
            self._feed(3)
        if kind != CONNACK:
            raise Failure("%s instead of CONNACK" % NAMES[kind])
        world.witness.told(self.decoder.session_present)
        return self.decoder.session_present

    def connect(self):
        world = self.world
        if self.store.identity != ME:
            self._handshake(True)
            self.send(packet3.DISCONNECT_BYTES)
            world.deliver()
        world.renewal = None if world.broker.session else sorted(self.store.session.held)
        self.store.connecting()
        present = self._handshake(False)
        if self.version == 5:
            self.store.limits(self.workload.receive_maximum, topic_alias_maximum=self.workload.aliases)
        self.store.connected(present, ME)
        world.renewal = None
        if self.workload.receives and self.store.granted(FILTER, 2) is None:
            self.store.session.requests.clear()
            packet_id = self.store.session.request_id()
            self.send(self.wire.encode_subscribe(packet_id, FILTER.encode(), 2))

    def disconnect(self):
        self.store.disconnected()

    def _feed(self, most):
        space = self.decoder.space()
        down = self.world.down
        n = min(len(space), len(down), most)
        if not n:
            raise Failure("the broker did not answer")
        space[:n] = down[:n]
        self.world.down = down[n:]
        self.decoder.end += n

    def read(self):
        """Take all that has arrived."""
        while True:
            while True:
                kind = self.decoder.next()
                if not kind:
                    break
                self._packet(kind)
                while not self.store.can_answer():
                    self.flush()
            if not self.world.down:
                return
            self._feed(50)

    def _packet(self, kind):
        store = self.store
        decoder = self.decoder
        packet_id = decoder.packet_id
        if kind == PUBLISH:
            number = number_of(decoder.payload)
            if bytes(decoder.payload) != self.workload.payload(number):
                raise Failure("message %d to the device came garbled" % number)
            if store.on_publish(decoder.flags >> 1 & 3, packet_id):
                self.todo.append((decoder.flags >> 1 & 3, packet_id, store.session.epoch, number))
        elif kind == SUBACK:
            store.session.requests.discard(packet_id)
            store.subscribed(FILTER, 2, decoder.payload[0])
        else:
            reason = decoder.reason_code if self.version == 5 else 0
            if self.version == 5:
                store.on_ack(kind, packet_id, reason)
            else:
                store.on_ack(kind, packet_id)
            if reason == 0x97:
                self.world.witness.postponed(packet_id)
            if kind in (PUBACK, PUBCOMP) or reason >= 0x80:
                self.world.witness.finished(packet_id)

    def handle(self, most):
        """The handler takes messages, one after the other."""
        while self.todo and most:
            qos, packet_id, epoch, number = self.todo.pop(0)
            most -= 1
            self.world.effect(number, qos, self.store.token(packet_id) if qos == 2 else None)
            self.store.handled(qos, packet_id, epoch)
            while not self.store.can_answer():
                self.flush()

    def publish(self, count):
        """The program publishes its next messages, each with its number as the mark."""
        world = self.world
        while count and self.next <= self.workload.publishes:
            world.attempted = self.next
            world.accepted_in[self.next] = world.round
            qos = self.workload.qos_of(self.next)
            world.say("app", "publish message %d at QoS %d" % (self.next, qos))
            more = (self.workload.properties(self.next),) if self.version == 5 else ()
            payload = self.workload.payload(self.next)
            try:
                packet_id = self.store.publish("from/device", payload, qos, False, self.next, *more)
            except JournalFull:
                world.say("app", "refused: full")
                return
            world.accepted = self.next
            world.numbers[packet_id] = self.next
            self.next += 1
            count -= 1


# -- both, and the world between them


class World:
    """One run."""

    def __init__(self, workload, prog_size, plans, trace=None):
        self.workload = workload
        self.prog_size = prog_size
        self.unit = 16 if prog_size == SEALED else prog_size
        self.plans = list(plans)
        self.trace = trace
        self.up = []  # packets on their way to the broker
        self.down = b""  # bytes on their way to the device
        self.accepted = self.attempted = 0
        self.accepted_in = {}  # number -> round
        self.numbers = {}  # packet identifier -> number of the message accepted under it last
        self.dropped = []
        self.effects = {}  # number -> token, of what the handler has had
        self.effect_order = []
        self.swallowed = set()
        self.renewal = None
        self.tokens = {}
        self.round = 0
        self.events = dict(workload.events)
        self.online = True
        self.cuts = []  # what each power cut did
        self.kinds = []  # of operations, for each time power was on
        self.mounts = []  # how many of them mounting took
        self.mount_ops = 0
        self.witness = Witness(self)
        self.broker = Broker(self)
        self.tap = Tap(self)
        if workload.newest:
            used(self.tap.nor, workload.newest, self.device, self.unit)

    def clock(self):
        return WALL + self.round

    def device(self, nor):
        """What the journal is given for that flash."""
        return Encrypted(nor) if self.prog_size == SEALED else nor

    def say(self, who, what):
        if self.trace:
            self.trace("%5s  %s" % (who, what))

    def answer(self, packet):
        self.say("<    ", describe(packet, self.workload.version))
        self.down += packet

    def deliver(self, most=None):
        """What is on its way to the broker arrives."""
        most = len(self.up) if most is None else most
        while self.up and most:
            self.broker.take(self.up.pop(0))
            most -= 1

    def hang_up(self, flavour):
        """The link is gone, and with it some of what was on it: see the module's docstring."""
        n = (0, len(self.up), len(self.up) // 2)[flavour % 3]
        self.say("link", "cut; %d of %d packets still arrive at the broker, no answer comes back" % (n, len(self.up)))
        self.deliver(n)
        self.up = []
        self.down = b""
        self.broker.hang_up()

    def effect(self, number, qos, token):
        """The handler has a message."""
        self.say("app", "handles message %d at QoS %d%s" % (number, qos, ", token %x" % token if token else ""))
        if qos == 2:
            if number in self.effects:
                if number in self.witness.pubrec_sent:
                    raise Failure("message %d handled again after its PUBREC" % number)
                if not self.cuts:
                    raise Failure("message %d handled again without a power cut" % number)
                if self.effects[number] != token:
                    raise Failure("message %d has another token now" % number)
            if self.tokens.get(token, number) != number:
                raise Failure("message %d has the token of message %d" % (number, self.tokens[token]))
            self.tokens[token] = number
        if number not in self.effects:
            if self.effect_order and number < self.effect_order[-1]:
                raise Failure("message %d handled behind message %d" % (number, self.effect_order[-1]))
            self.effect_order.append(number)
        self.effects[number] = token

    def run(self):
        """Until all is delivered.  Raises Failure."""
        device = None
        while True:
            nor = self.tap.nor
            plan = self.plans.pop(0) if self.plans else None
            if plan and plan[0]:
                self._arm(nor, plan)
            self.tap.kinds = ""
            try:
                device = Device(self)
                self._live(device)
                break
            except PowerCut:
                self.cuts.append(nor.cut_note)
                self.say("POWER", "cut: " + nor.cut_note)
                self._after_cut(plan[2])
            nor.power_on()
        self._ended()
        self._check()

    def _arm(self, nor, plan):
        operation, mode, seed = plan
        program = mode if mode in MODES_PROGRAM else "bits"
        erase = mode if mode in MODES_ERASE else "mixed"
        nor.cut_after(operation, program, erase, seed, mode == "weak", mode == "page")

    def _ended(self):
        self.kinds.append(self.tap.kinds)
        self.mounts.append(self.mount_ops)

    def _after_cut(self, seed):
        self._ended()
        self.mount_ops = len(self.tap.kinds)
        if self.renewal:
            # The broker began a new session, the device could not record that: its identifiers are from the old one.
            self.swallowed.update(self.renewal)
        self.renewal = None
        self.hang_up(seed)

    def _live(self, device):
        if self.online:
            device.connect()
        while True:
            self.round += 1
            if self.round > ROUNDS:
                store = device.store
                raise Failure("no end: waiting %d, held %s" % (store.waiting(), sorted(store.session.held)))
            event = self.events.pop(self.round, None)
            if event:
                self.say("event", event)
                device = self._event(device, event)
            burst = self.workload.burst if self.round % self.workload.every == 0 else 0
            device.publish(burst)
            if not self.online:
                continue
            device.flush()
            device.publish(burst)
            self.broker.publish()
            self.deliver(2)
            device.publish(burst)
            self.deliver()
            self.broker.publish()
            self.broker.go_on()
            device.read()
            device.handle(self.workload.handlers)
            if self.workload.version == 5:
                device.store.retry()
            device.flush()
            if self._is_over(device):
                break
        store = device.store
        if set(store.session.held) - self.swallowed or store.queued() or self.broker.has:
            raise Failure("left over: held %s, at the broker %s" % (sorted(store.session.held), self.broker.has))
        before = facts(store)
        store.close()
        after = facts(Device(self).store)
        if before != after:
            raise Failure("after the end a mount finds %s instead of %s" % (after, before))

    def _event(self, device, event):
        if event == "offline":
            self.online = False
        if event in ("drop", "lose", "close", "offline"):
            self.hang_up(self.round)
            device.disconnect()
        if event == "lose":
            self.broker.lose()
        if event == "close":
            device.store.close()
            device = Device(self)
        if event != "offline":
            self.online = True
            device.connect()
        return device

    def _is_over(self, device):
        broker = self.broker
        return (
            device.next > self.workload.publishes
            and not device.store.waiting()
            and (broker.published == self.workload.receives)
            and not broker.queue
            and not broker.flight
            and not device.todo
            and not self.up
            and not self.down
            and not self.events
        )

    def _check(self):
        delivered = self.broker.delivered
        first = []
        last = 0
        for number in delivered:
            if number in self.workload.refused:
                raise Failure("message %d delivered, but it was refused" % number)
            if number not in first:
                if number not in self.workload.postponed:
                    if number < last:
                        raise Failure("message %d delivered behind message %d" % (number, last))
                    last = number
                first.append(number)
            elif self.workload.qos_of(number) == 2 and number not in self.broker.forgiven:
                raise Failure("message %d delivered twice" % number)
        for number in range(1, self.workload.publishes + 1):
            if number not in first and number not in self.dropped and number not in self.workload.refused:
                raise Failure("message %d was lost" % number)
        for number in range(1, self.workload.receives + 1):
            if number not in self.effects and number not in self.broker.forgotten and number not in self.swallowed:
                raise Failure("message %d to the device was lost" % number)


def run(workload, prog_size=4, plans=(), trace=None):
    """Run a workload by name with cuts (operation, mode, seed); return the World.  Raises Failure.

    prog_size: 4, 16, 256 or SEALED.
    """
    world = World(WORKLOADS[workload], prog_size, plans, trace)
    world.run()
    return world


def modes(kind, wanted=None, weak=False):
    """The ways in which an operation ("p" or "e") can be left."""
    found = [m for m in (MODES_PROGRAM if kind == "p" else MODES_ERASE) if not wanted or m in wanted]
    return found + ["weak"] if weak else found


def run_id(name, prog_size, plans):
    cuts = "".join(["@%d.%s.%d" % plan for plan in plans])
    return name + ("/%s" % prog_size if prog_size != 4 else "") + cuts


def parse_id(text):
    """(workload, prog_size, plans) of an id; ValueError if it is none."""
    parts = text.split("@")
    name, _, prog_size = parts[0].partition("/")
    if name not in WORKLOADS:
        raise ValueError("%s: no such workload" % name)
    plans = []
    for part in parts[1:]:
        operation, mode, seed = part.split(".")
        plans.append((int(operation), mode, int(seed)))
    return name, prog_size if prog_size == SEALED else int(prog_size or 4), plans


def plans_for(kinds, first, last, wanted, weak, seeds):
    """Every cut in operations first..last of a run whose operations are kinds."""
    for operation in range(first, last + 1):
        for mode in modes(kinds[operation - 1], wanted, weak):
            for seed in range(seeds):
                yield operation, mode, seed


def explore(name, prog_size=4, wanted=None, weak=False, seeds=2, nested=False, step=1, progress=None):
    """Cut at every step-th operation of a workload.  Return (runs with one cut, runs with two, ids and reasons)."""
    failures = []
    once = twice = 0
    whole = _try(name, prog_size, [], failures)
    kinds = whole.kinds[0] if whole else ""
    for plan in plans_for(kinds, 1, len(kinds), wanted, weak, seeds):
        if plan[0] % step:
            continue
        once += 1
        world = _try(name, prog_size, [plan], failures)
        if progress:
            progress(name, plan[0], len(kinds), once, twice, len(failures))
        if not nested or world is None:
            continue
        again = world.kinds[1]
        last = min(len(again), world.mounts[1] + RESTART_OPS)
        for second in plans_for(again, 1, last, ("none", "all", "bits", "mixed"), weak, 1):
            twice += 1
            # Another fate of the link than at the first cut.
            _try(name, prog_size, [plan, (second[0], second[1], plan[2] + 1)], failures)
    return once, twice, failures


def _try(name, prog_size, plans, failures):
    world = World(WORKLOADS[name], prog_size, plans)
    try:
        world.run()
        return world
    except PowerCut:
        raise
    except Exception as e:  # whatever it is, the id that shows it again matters more
        failures.append((run_id(name, prog_size, plans), "%s: %s" % (type(e).__name__, e)))
    return None


def _replay(text, plot=None):
    import journal  # the tool beside this one, which no board has

    name, prog_size, plans = parse_id(text)
    world = World(WORKLOADS[name], prog_size, plans, print)
    try:
        world.run()
        print("as promised")
    except Failure as e:
        print("FAILED: %s" % e)
        return 1
    finally:
        cells = world.tap.dump()
        erases = world.tap.nor.erases
        print(journal.picture(cells, erases))
        if plot:
            from journal_plot import svg

            try:
                with open(plot, "w", encoding="utf-8") as f:
                    f.write(svg(journal.Journal(cells, erases), text))
            except journal.NoJournal as e:
                print("%s: not drawn: %s" % (plot, e))
    return 0


def main():
    import argparse
    import time

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("id", nargs="*", help="replay these")
    parser.add_argument("--plot", metavar="FILE.svg", help="of one replay: draw the sectors as they are at its end")
    parser.add_argument("--workload", action="append", choices=sorted(WORKLOADS))
    parser.add_argument("--modes", help="comma between: %s" % " ".join(dict.fromkeys(MODES_PROGRAM + MODES_ERASE)))
    parser.add_argument("--seeds", type=int, default=2, help="of each mode (2)")
    parser.add_argument("--prog-size", type=int, default=4, choices=(4, 16, 256))
    parser.add_argument("--sealed", action="store_true", help="an encrypted partition; its program size is 16")
    parser.add_argument("--weak", action="store_true", help="also leave cells that read differently each time")
    parser.add_argument("--nested", action="store_true", help="cut a second time, at every operation of the restart")
    args = parser.parse_args()
    if args.plot and len(args.id) != 1:
        parser.error("--plot: name one id")
    if args.id:
        try:
            return max([_replay(text, args.plot) for text in args.id])
        except ValueError as e:
            parser.error(str(e))
    wanted = args.modes.split(",") if args.modes else None
    for mode in wanted or ():
        if mode not in MODES_PROGRAM + MODES_ERASE:
            parser.error("no such mode: " + mode)

    def progress(name, operation, operations, once, twice, failed):
        if sys.stdout.isatty():
            text = "%-14s operation %d of %d: %d cuts, %d failed" % (name, operation, operations, once + twice, failed)
            print("\r%-78s" % text, end="", flush=True)

    prog_size = SEALED if args.sealed else args.prog_size
    total = 0
    failed = []
    for name in args.workload or WORKLOADS:
        begin = time.monotonic()
        once, twice, failures = explore(name, prog_size, wanted, args.weak, args.seeds, args.nested, progress=progress)
        total += once + twice
        failed += failures
        seconds = time.monotonic() - begin
        counts = (name, once, twice, len(failures), seconds)
        line = "%-14s %6d runs with one cut, %7d with two, %d failed, %.0f s" % counts
        print(("\r" if sys.stdout.isatty() else "") + "%-78s" % line, flush=True)
    for text, why in failed:
        print("%s  %s" % (text, why))
    print("%d runs, %d failed" % (total, len(failed)))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
