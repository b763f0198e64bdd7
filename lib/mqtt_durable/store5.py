"""The store of MQTT 5: properties, message expiry, refusals and the broker's limits, on top of store.py.

Loaded by version 5 only.  The properties of a message are recorded in front of its payload, as they are on the wire but
for the message expiry interval, see FORMAT.md.  What the broker's limits make of a message, and a topic alias, never
enter the journal: what they change is changed as it is sent.  A message recorded by version 3.1.1 is sent without
properties, and so is by 3.1.1 one that was recorded by version 5.

The age of a message: two lines of time go on with the clock as long as the program runs, wall time and powered
seconds.  After a restart both go on from the newest that the journal knows, wall time until the clock is set.  A
message has a stamp of wall time if the clock was set when it was published, else of powered seconds, and its age is how
far the same line has come since.  So it is exact if the clock was set both times; otherwise time without power, and
before the store was made, counts for nothing, and a message is rather sent too late than dropped too early.
"""

from struct import pack, pack_into, unpack_from

from micropython import const

from .packet import put_fixed_header, put_publish_head
from .packet5 import put_ack, remaining_length_size
from .properties import encode, get_length
from .store import Store

_PROPERTIES = const(0x40)  # in the kind of a PUB record
_PUB5 = const(0x50)
_ASSIGNED = const(0x35)  # the client identifier that the broker assigned

_WALL = const(1 << 30)  # a clock that says less has not been set
_TIMES_BYTES = const(8)
_LONGEST_ID = const(128)  # bytes of an assigned client identifier
_POSTPONED = const(8)  # messages refused for now that take no place in the window
_ALIASES = const(8)
_ALIAS = const(0x23)  # as in properties
_WHOLE = const(0x100)
_LARGEST = const(268435460)  # bytes of a packet
_LARGE = const(1024)  # bytes: a larger packet is not sent at once
_SHORT = const(3)  # bytes of a topic name for which an alias would save nothing
_UNKNOWN_ID = const(0x92)
_TOO_LARGE = const(0x95)
_QUOTA = const(0x97)
# As in session.
_IDS = const(65023)
_PUB1 = const(1)
_PUB2 = const(2)
_REL = const(3)
# As in packet.
_PUBLISH = const(3)
_PUBACK = const(4)
_PUBREC = const(5)
_PUBREL = const(6)
_PUBCOMP = const(7)
_NOTHING = {}


class Store5(Store):
    """journal, in_flight, when_full: as in Store.  grace: has no effect, every message is recorded at once.

    finished: called with (packet_id, True) when the broker has the message, (packet_id, False) when it was dropped or
    has expired, (packet_id, reason code) when the broker refused it or, 0x95, would not take one of its size.
    clock: returns whole seconds: since 1970 if they are 1 << 30 or more, else of being powered; None: there is none.

    .refused, .expired: messages that ended so.  .postponed: how often the broker had no quota for one.  .lowered:
    messages sent with a lower QoS or without retain, because the broker has no more.  .assigned: see assign().
    """

    _window = 0
    _later = ()
    _beside = 0
    _unrecorded = False  # that a message has expired

    def __init__(self, journal, in_flight=16, when_full="raise", finished=None, grace=False, clock=None):
        self._clock = clock
        self._read = clock() if clock else 0  # what it said when it was looked at last
        self._powered = self._wall = 0
        super().__init__(journal, in_flight, when_full, finished)
        self._own = self.session.limit
        self._most += _POSTPONED
        self.max_state += 6 * _POSTPONED + _TIMES_BYTES + 1 + _LONGEST_ID
        self._answers = memoryview(bytearray(len(self._answers) + 4))  # the last one may have 5 bytes
        self.refused = self.expired = self.postponed = self.lowered = 0
        self.limits()

    def clear(self):
        super().clear()
        self.assigned = ""
        self._stamped = False  # a message with an expiry interval has been recorded

    def limits(
        self,
        receive_maximum=65535,
        maximum_packet_size=_LARGEST,
        maximum_qos=2,
        retain_available=True,
        topic_alias_maximum=0,
        **_,
    ):
        """The properties of CONNACK; to be called after each one, before connected().  .largest: bytes of a packet.

        In flight are at most min(in_flight, receive_maximum) messages.  One that is larger than maximum_packet_size is
        not sent: it ends, refused with 0x95.  Above maximum_qos a message is sent with that one, and with QoS 0 it ends
        when it has gone into the buffer.  .lacks: whether it may come to any of these.  MQTT 5.0 sections 3.2.2.3 and
        4.9.
        """
        self._window = self.session.limit = min(self._own, receive_maximum)
        self._beside = 0
        self.largest = maximum_packet_size
        self._maximum_qos = maximum_qos
        self._retain_available = retain_available
        self.lacks = maximum_qos < 2 or not retain_available or maximum_packet_size < _LARGE
        self._alias_maximum = min(topic_alias_maximum, _ALIASES)
        self._look()

    # -- what is in the journal beside that of Store

    def replay_more(self):
        """While it is mounted: have what Store does not know taken up, too."""
        restore = self.restore
        replay = self.replay

        def restore5(state):
            restore(state)
            if state:
                flags = state[4]
                i = 26 + 6 * state[23] + 2 * (state[24] | state[25] << 8) + (flags & 4)
                if flags & 8:
                    for stamp in unpack_from("<II", state, i):
                        self._found_stamp(stamp)
                    i += _TIMES_BYTES
                if flags & 16:
                    self.assigned = str(bytes(state[i + 1 : i + 1 + state[i]]), "utf-8")

        def replay5(kind, pos):
            buf = self.journal.buf
            if kind & 0xF0 == _PUB5:
                i = 4 + self._payload_at()
                if i + 6 <= len(buf) and buf[i] & 1:  # if not, nothing is dropped too early
                    self._found_stamp(unpack_from("<I", buf, i + 2)[0])
            elif kind == _ASSIGNED:
                self.assigned = str(bytes(self.journal.body(pos)), "utf-8")
            replay(kind, pos)

        self.restore = restore5
        self.replay = replay5

    def _found_stamp(self, stamp):
        self._stamped = True
        if stamp >= _WALL:
            self._wall = max(self._wall, stamp)
        else:
            self._powered = max(self._powered, stamp)

    def state_size(self):
        n = super().state_size() + (_TIMES_BYTES if self._stamped else 0)
        return n + (1 + len(self.assigned.encode()) if self.assigned else 0)

    def state(self):
        state = super().state()
        if self._stamped:
            self._look()
            state[4] |= 8
            state += pack("<II", self._powered, self._wall)
        if self.assigned:
            text = self.assigned.encode()
            state[4] |= 16
            state += bytes((len(text),)) + text
        return state

    def assign(self, client_id):
        """Record the client identifier that the broker assigned, str: .assigned, through restarts and whatever becomes
        of the session.  Raises ValueError beyond 128 bytes, JournalFull, OSError.  Section 3.2.2.3.7.
        """
        text = client_id.encode()
        if len(text) > _LONGEST_ID:
            raise ValueError("assigned client identifier: found %d bytes, expected at most 128" % len(text))
        if client_id != self.assigned:
            self.journal.append(_ASSIGNED, (text,))
            self.assigned = client_id

    # -- time

    def _look(self):
        """Let both lines of time go on; return the stamp of a message that is published now."""
        before = self._read
        now = self._read = self._clock() if self._clock else 0
        if now > before and (before >= _WALL or now < _WALL):  # when the clock is set it jumps
            self._powered += now - before
            self._wall += now - before
        if now < _WALL:
            return self._powered
        self._wall = now
        return now

    def _age(self, stamp):
        """Seconds since a message with this stamp was published."""
        self._look()
        if stamp >= _WALL:
            return max(0, self._wall - stamp)
        return max(0, self._powered - stamp)

    # -- outbound

    def publish(self, topic_name, payload, qos, retain=False, mark=None, properties=None):
        """Record a QoS 1 or 2 message; see Store.publish().  properties: None or a dictionary, see properties.py."""
        block = encode(properties, _PUBLISH) if properties else b"\0"
        self._plain = len(block) == 1
        if self._plain:
            return super().publish(topic_name, payload, qos, retain, mark)
        size, at = get_length(block, 0, len(block))
        if size > self.journal.max_body:
            raise ValueError(
                "properties: found %d bytes, the journal holds messages of at most %d" % (size, self.journal.max_body)
            )
        if block[at] == 2:  # encode() puts the message expiry interval in front
            head = pack("<HII", (size - 5) << 1 | 1, self._look(), unpack_from(">I", block, at + 1)[0])
            at += 5
            self._stamped = True
        else:
            head = pack("<H", size << 1)
        self._usual = _NOTHING  # which knows no properties
        return super().publish(topic_name, head + block[at:] + payload, qos | _PROPERTIES >> 1, retain, mark)

    def at_once(self, packet_id):
        """See Store.at_once(): a message without properties, to a broker that takes what it is."""
        return (
            self._plain
            and not self.lacks
            and not self._due
            and not self._unrecorded
            and super().at_once(packet_id)
        )

    def alias(self, topic_name):
        """Return the topic alias, 0 for none, and the topic name that a PUBLISH has to carry with topic_name (bytes).

        If the name is not empty, that PUBLISH tells the broker: it is sent, whole, before the next one of that name.
        The first 8 names of a connection that are longer than 3 bytes have one.  MQTT 5.0 section 3.3.2.3.4.
        """
        aliases = self._aliases
        found = aliases.get(topic_name)
        if found:
            return found, b""
        if len(topic_name) <= _SHORT or len(aliases) >= self._alias_maximum:
            return 0, topic_name
        found = aliases[bytes(topic_name)] = len(aliases) + 1
        return found, topic_name

    def put_head(self, buf, off, first, topic_name, packet_id, payload_size):
        """packet.put_publish_head() for a message without properties that goes out before anything else does, with its
        topic alias; at most 14 bytes more than the topic name.  first | 0x100: the payload has properties in front."""
        if first & _WHOLE:
            return put_publish_head(buf, off, first & 0xFF, topic_name, packet_id, payload_size)
        alias = 0
        if len(topic_name) + payload_size + 14 <= self.largest:
            try:
                alias, topic_name = self.alias(topic_name)
            except MemoryError:
                pass  # it counts as sent already, so it goes out without one
        size = 3 if alias else 0  # of the properties
        off = put_publish_head(buf, off, first, topic_name, packet_id, payload_size + 1 + size)
        buf[off] = size
        if alias:
            buf[off + 1] = _ALIAS
            buf[off + 2] = 0
            buf[off + 3] = alias
        return off + 1 + size

    def fill(self, buf, off):
        """See Store.fill()."""
        if self.answers:
            if self._urgent:
                self.commit()
            if self.rest:
                off = self._more(buf, off)
                if self.rest:
                    return off
            answers = self._answers
            n = 0
            while n < self.answers and off + n + 2 + answers[n + 1] <= len(buf):
                n += 2 + answers[n + 1]
            buf[off : off + n] = answers[:n]
            off += n
            self.answers -= n
            if self.answers:
                answers[: self.answers] = bytes(answers[n : n + self.answers])
                return off
        return super().fill(buf, off)

    def _put_publish(self, buf, off, packet_id, pos):
        journal = self.journal
        if self._unrecorded:  # or after a cut that message would be sent behind this one
            self.commit()
            self._unrecorded = False
        if not self._maximum_qos:
            self._ready()
        pos = self.session.out.get(packet_id, 0) >> 2  # the record may have moved it
        if not pos:
            return off  # or found that it is not readable any more
        n = journal.load(pos) - 8
        at = self._topic_at(pos)
        if n >= 0 and (self._sent_at != at or self._sent_seq != journal.seq_of(at)):
            topic = self._topic(at)
            if topic is None:
                n = -1
            else:
                self._sent_at = at
                self._sent_seq = journal.seq_of(at)
                self._sent_topic = topic
                if at != pos:
                    journal.load(pos)
        if n < 0:
            self._lose(packet_id)
            return off
        topic = self._sent_topic
        begin = self._payload_at()
        first = journal.buf[0] & 7 | 0x30
        size = 0  # bytes of the properties, but for the message expiry interval
        left = 0  # that
        if journal.buf[0] & _PROPERTIES:
            head = bytearray(2)
            journal.read(pos, 4 + begin, head)
            size = head[0] | head[1] << 8
            begin += 2
            if size & 1:
                head = bytearray(8)
                journal.read(pos, 4 + begin, head)
                begin += 8
                stamp, left = unpack_from("<II", head)
                left -= self._age(stamp)
                if left <= 0 and not (self._again and self._dup):  # else the broker may have it already
                    self._ready()
                    self._unrecorded = True
                    self.expired += 1
                    self._end(packet_id, False)
                    return off
                left = max(1, left)
            size >>= 1
        n -= begin  # the properties and the payload, as they stand in the record
        if self._dup:
            first |= 8
        wire = first
        if not self._retain_available:
            wire &= ~1
        if wire >> 1 & 3 > self._maximum_qos:
            wire = wire & ~6 | self._maximum_qos << 1
            if not self._maximum_qos:
                wire &= ~8
        before = size + (5 if left else 0)
        whole = len(topic) + 2 + (2 if wire & 6 else 0) + remaining_length_size(before) + before - size + n
        whole += 1 + remaining_length_size(whole)
        most = self.largest
        if whole > most:
            self._ready()
            self.refused += 1
            self._end(packet_id, _TOO_LARGE)
            return off
        head = len(topic) + 20  # at most
        room = len(buf) - off
        if head + n > room and off:
            return -1
        if wire != first and not self._again:
            self.lowered += 1
        # Now that it goes out: an alias makes a packet larger by 3 bytes, and perhaps its two lengths.
        alias = 0
        if self._alias_maximum and whole + 5 <= most:
            alias, topic = self.alias(topic)
            if alias:
                before += 3
        block = bytearray(13)
        i = put_fixed_header(block, 0, 0, before)  # the property length, behind a byte that is not used
        if left:
            pack_into(">BI", block, i, 2, left)
            i += 5
        if alias:
            pack_into(">BH", block, i, _ALIAS, alias)
            i += 3
        self.rest = n
        self._sending = packet_id
        self.sent += 1
        out = bytearray(head) if head > room else buf
        at = 0 if head > room else off
        at = put_publish_head(out, at, wire, topic, packet_id if wire & 6 else 0, n + i - 1)
        out[at : at + i - 1] = block[1:i]
        at += i - 1
        if head > room:
            self._lead = memoryview(out)[:at]
            self.rest += at
        else:
            off = at
            if begin + n + 4 <= len(journal.buf) and off + n <= len(buf):
                self.rest = 0
                buf[off : off + n] = journal.buf[begin + 4 : begin + 4 + n]
                self._gone()
                return off + n
        return self._more(buf, off)

    def _more(self, buf, off):
        if not self._maximum_qos:
            self._ready()
        off = super()._more(buf, off)
        if not self.rest:
            self._gone()
        return off

    def _gone(self):
        """A PUBLISH is in the buffer, whole."""
        if not self._maximum_qos and self._sending in self.session.out:
            self._end(self._sending, True)

    def _end(self, packet_id, result):
        """A message is finished, but not by what Store knows.  To be called after _ready()."""
        self.session.out.pop(packet_id, None)
        self.session.released.discard(packet_id)
        self._done(packet_id, result)

    def in_flight(self):
        """How many messages that have been sent wait for their end, but for those that are to be sent anew."""
        ours = len(self.session.out) - (self._taken - self._sent_to) % _IDS - len(self._later)
        return ours + self._beside

    def beside(self, change):
        """1: a PUBLISH that is not of the store's goes out, -1: it has its PUBACK.  It takes a place in the window."""
        self._beside = max(0, self._beside + change)
        self._exempt()

    def _next(self):
        out = self.session.out
        while self._due and not self._resend:
            packet_id = self._due[0]
            if packet_id in out and self.in_flight() >= self._window:
                break
            self._due.pop(0)
            self._later.remove(packet_id)
            self._exempt()
            if packet_id in out:
                self._again = 0
                self._dup = False
                return packet_id
        packet_id = super()._next()
        if not packet_id and self._resend:
            # The window is full.  A PUBREL waits for no quota [MQTT5-3.3.4-8].
            for i in range(len(self._resend) - 1, -1, -1):
                if out.get(self._resend[i], 0) & 3 == _REL:
                    return self._resend.pop(i)
        return packet_id

    # -- refusals

    def later(self):
        """How many messages wait for retry()."""
        return len(self._later) - len(self._due)

    def retry(self):
        """Have fill() send anew the messages that the broker had no quota for, in their order, before any others."""
        self._due = [packet_id for packet_id in reversed(self.session.order()) if packet_id in self._later]

    def _exempt(self):
        """What waits for retry() takes no place in the window, as far as there is one in a snapshot."""
        self.session.limit = self._window - self._beside + min(len(self._later), _POSTPONED)

    def disconnected(self):
        super().disconnected()
        self._aliases = {}  # topic name -> topic alias that the broker knows [MQTT5-3.3.2-7]
        self._later = []  # refused for want of quota, until they are sent again
        self._due = []  # of these, what is to be sent now
        self._beside = 0
        if self._window:
            self._exempt()

    def on_ack(self, packet, packet_id, reason_code=0):
        """A PUBACK, PUBREC, PUBREL or PUBCOMP came.  Raises ProtocolError, JournalFull, OSError.

        A reason code of 0x80 or more ends the message, but for 0x97: then it is to be sent anew, see retry(), and until
        then takes no place in the window, if there are not more than 8 of them.  A PUBREL or PUBCOMP means the same
        with 0x92 as without.  MQTT 5.0 sections 3.4-3.7 and 4.3.
        """
        session = self.session
        if packet != _PUBREL and reason_code < 0x80 and packet_id in session.out and not self._later and not self.lacks:
            pass  # the usual case
        elif packet == _PUBREL:
            if packet_id not in session.held:
                self._answer_unknown(_PUBCOMP, packet_id)
                return
        elif packet != _PUBCOMP:
            # In a clean session what had its PUBREL stays as it is.
            state = _REL if packet_id in session.released else session.out.get(packet_id, 0) & 3
            if packet_id in self._later:
                session.unknown += 1
                return
            lowered = state == _PUB2 and packet == _PUBACK and self._maximum_qos == 1
            if reason_code >= 0x80:
                if state == (_PUB1 if packet == _PUBACK else _PUB2) or lowered:
                    if reason_code == _QUOTA:
                        self.postponed += 1
                        self._later.append(packet_id)
                        self._exempt()
                    else:
                        self._ready()
                        self.refused += 1
                        self._end(packet_id, reason_code)
                    return
                if not state or state == _REL:
                    session.unknown += 1
                    return
            elif lowered:
                self._ready()
                self.acknowledged += 1
                self._end(packet_id, True)
                return
            elif packet == _PUBREC and not state:
                self._answer_unknown(_PUBREL, packet_id)
                return
        super().on_ack(packet, packet_id)

    def _answer_unknown(self, packet, packet_id):
        self.session.unknown += 1
        if self.online:
            self.answers = put_ack(self._answers, self.answers, packet, packet_id, _UNKNOWN_ID)
