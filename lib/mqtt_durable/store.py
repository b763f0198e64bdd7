"""Session facts -> journal records: a message is stored from publish() until it is acknowledged.

In RAM it has only its place, while it is in the in-flight window; what waits behind the window stays on flash, found by
one cursor.  Knows no socket and no clock.  The records' layout, and how all this is found again, is recall.py's.

Order that crash safety needs: PUBLISH is recorded before publish() returns, RELEASED before PUBREL goes out, RECEIVED
before PUBREC, INDONE before PUBCOMP.  DONE is lazy: each message says up to which one all are finished, and the rest
rides with the next record; at most 16 are missing after a cut.
"""

from binascii import crc32
from struct import pack, pack_into

from micropython import const

from .errors import JournalFull
from .once import once
from .packet import check_topic, put_ack, put_publish_head
from .recall import Recall

# As in recall.
_PUB = const(0x10)
_FACTS = const(0x30)
_SESSION = const(0x33)
_SUBS = const(0x34)
_UPTO = const(5)
_ASKED = const(6)
_TOLD = const(7)
_DROPPED = const(8)
# As in session.
_IDS = const(65023)
_PUB1 = const(1)
_PUB2 = const(2)
_REL = const(3)
_DONE = const(1)
_RELEASED = const(2)
_RECEIVED = const(3)
# As in packet.
_PUBACK = const(4)
_PUBREC = const(5)
_PUBREL = const(6)
_PUBCOMP = const(7)

_PENDING = const(48)
_LONGEST = const(9)  # bytes of the longest entry
_LAZY = const(16)
_ANSWERS = const(256)
_MOST_QUEUED = const(60000)  # of 65023 packet identifiers
_MOST_SUBS = const(32)  # subscriptions that are stored
_TOPICS = const(8)  # of which it is known where they stand in the newest sector
_GRACE_BYTES = const(2048)  # payloads that wait in RAM, see settle()
_APART = const(960)  # identifiers between two records, see _keeps(): 1024 less a window
_UNSAID = const(63)
_LEAP = const(16)  # more than messages can be handled and not yet recorded
len = len  # MicroPython finds it sooner here than behind all the other built-in names
_NOTHING = {}


def identity(client_id, host, port):
    """The number a broker session is known by in the journal, never 0."""
    return crc32(("%s\n%s\n%d" % (client_id, host, port)).encode()) or 1


class Store(Recall):
    """journal: not yet mounted.  in_flight: 1-64, of which at most 4 per sector are used.  when_full: "raise", "wait"
    (same here: the client waits) or "drop_oldest".

    finished: called with (packet_id, True) when the broker has the message, (packet_id, False) when it was dropped.
    grace: QoS 1 messages published while connected stay in RAM until settle(): see there.
    """

    def __init__(self, journal, in_flight=16, when_full="raise", finished=None, grace=False):
        # A small ring has no room to carry a large window over.
        super().__init__(journal, min(in_flight, 4 * journal.sectors))
        self._drops = when_full == "drop_oldest"
        self.finished = finished
        self._grace = grace
        self._pending = memoryview(bytearray(_PENDING + 7))
        self._answers = memoryview(bytearray(_ANSWERS))
        self.stored = self.acknowledged = self.sent = self.resent = self.dropped = self.duplicates = 0
        self.spared = 0  # messages that were acknowledged before they had to be stored
        self._held = {}  # packet identifier -> (topic, payload, retain): not stored yet
        self._held_bytes = 0
        # What each message goes through is bound once.  That saves the search for a method, and with 60 attributes
        # MicroPython's table of them, which grows only when it is full, has room: what is there is found sooner.
        self.publish = self.publish
        self.at_once = self.at_once
        self.on_ack = self.on_ack
        self.fill = self.fill
        self.on_publish = self.on_publish
        self.handled = self.handled
        self.is_live = self.is_live
        self.due = self.due
        self._forget()

    def _forget(self):
        self.clear()
        self._used = 0  # bytes of _pending
        self._urgent = False  # an answer waits for _pending
        self._said = 0  # how far a record says that all are finished
        self._cut = 0  # power failed: in the queue up to this packet identifier may be what has been sent
        self._doubt = False  # CONNECT had gone out and no CONNACK come, before this CONNECT
        self._recorded = self.session.newest  # the newest message recorded
        # Of what is known of places and sizes nothing holds in another journal, whose ages and places are the same.
        self._topics.clear()
        self._reserve_for = -1  # bytes of the body that _reserved is for
        self._reserved = 1
        self._sent_at = -1  # where the topic sent last stands
        self._sent_seq = 0
        self._sent_topic = b""
        self.disconnected()

    def open(self):
        """Mount the journal and take up what it holds; what waits in RAM stays there.  OSError only from the device."""
        self._forget()
        once("replay", "mount", self)

    def _take_up_sent(self):
        """What may have been sent before a cut goes out with DUP: a window full, and what lost its lazy DONE."""
        while self._cut and self._is_queued(self._cut) and len(self.session.out) < self._most and self._take():
            pass
        self._cut = 0

    def close(self):
        """Record what is pending, then an orderly end.  Raises JournalFull, OSError; all but DONEs is safe already."""
        full = None
        try:
            self.settle()
        except JournalFull as e:
            full = e
        self.commit()
        self.journal.close()
        if full:
            raise full

    # -- outbound

    def publish(self, topic_name, payload, qos, retain=False, mark=None):
        """Record a QoS 1 or 2 message; when this returns it survives power loss.  Return its packet identifier.

        topic_name: str or bytes.  payload: bytes-like.  mark: None or an integer of 64 bits, signed.
        (qos | 0x20: store5 has put properties in front of the payload.)
        Raises ValueError for a bad argument or a message that no sector can hold, JournalFull, OSError.
        """
        session = self.session
        newest = session.newest
        packet_id = newest % _IDS + 1
        try:
            ref = self._usual.get(topic_name)
        except TypeError:  # a bytearray
            ref = None
        if ref and mark is None and packet_id & 511:
            # The usual case, all in one piece.
            out = session.out
            upto = self._upto
            distance = (packet_id - upto - 1) % _IDS
            if distance < _UNSAID and len(out) < session.limit:
                pos = self.journal.put(
                    _PUB | qos << 1 | (1 if retain else 0), packet_id, distance | ref << 6, payload
                )
                if pos:
                    session.newest = self._taken = packet_id
                    out[packet_id] = pos << 2 | qos
                    self._said = upto
                    self.stored += 1
                    return packet_id
        journal = self.journal
        if self._urgent:
            self.commit()
        topic = check_topic(topic_name)
        key = topic_name if isinstance(topic_name, str) and not self._grace else topic
        size = len(topic) + len(payload)
        most = journal.max_body - (6 if mark is None else 14)
        if size > most:
            raise ValueError("topic and payload have %d bytes, the journal holds messages of at most %d" % (size, most))
        if not packet_id & 511:
            packet_id = session.new_id()
        at_once = False
        if self._taken == newest:
            # At once into the window: it need not be looked for on flash.
            at_once = self.online and len(session.out) < session.limit
        elif self.queued() >= _MOST_QUEUED:
            raise JournalFull("no free packet identifier: %d messages wait" % self.queued())
        if self._grace and self._keeps(packet_id, topic, payload, qos, retain, mark, at_once):
            where = 1
        else:
            pos = self._record(packet_id, key, topic, payload, qos, retain, mark)
            where = pos << 2 | qos & 3
            if not at_once and self._taken == newest:
                self._cursor = pos
            self.stored += 1
        # Not before: a snapshot taken on the way must not count this message among those before it.
        session.newest = packet_id
        if at_once:
            session.out[packet_id] = where
            self._taken = packet_id
        if mark is not None:
            self.mark = mark
        self._consider()
        return packet_id

    def _consider(self):
        """Whether publish() has nothing to think of but the topic changes: call this then."""
        usual = self.online and not self._urgent and not self._grace and self._taken == self.session.newest
        self._usual = self._topics if usual else _NOTHING

    def _keeps(self, packet_id, topic, payload, qos, retain, mark, at_once):
        """Whether a message can wait in RAM for its grace to be over.  If not, those that do are recorded: in order."""
        size = len(topic) + len(payload)
        # A replay knows a message as new only if it is less than 1024 after the newest one recorded.
        apart = (packet_id - self._recorded) % _IDS
        if (
            at_once
            and qos == 1
            and mark is None
            and self._held_bytes + size <= _GRACE_BYTES
            and apart < (_APART if self._held else _APART // 2)  # rather when it takes no others along
            and self.journal.usable
        ):
            self._held[packet_id] = topic, bytes(payload), retain
            self._held_bytes += size
            return True
        self.settle()
        return False

    def _record(self, packet_id, key, topic, payload, qos, retain, mark):
        """Program a PUB record, dropping others for it if need be; return its position."""
        journal = self.journal
        kind = _PUB | qos << 1 | (1 if retain else 0)
        more = b""
        if mark is not None:
            kind |= 8
            more = pack("<q", mark)
        n = 4 + len(more) + len(payload) + len(topic) + 2
        if n != self._reserve_for:
            self._reserve_for = n
            # Sectors that a message with a body of n bytes must leave, so that a full journal can always be left again:
            # one for the records that acknowledgements need, and twice a window full of such messages as it is after
            # a mount, which may have to be carried over at the same time.
            window = self._most * journal.room_for(n)
            self._reserved = min(1 + 2 * window // journal.room, journal.sectors - 3)
        while True:
            # Now, and not before: a record on the way here may have begun a sector.
            ref = self._topics.get(key, 0)
            if ref and not journal.fits(n):
                ref = 0  # the topic stands in a sector that will not be the newest
            distance = (packet_id - self._upto - 1) % _IDS
            if distance > _UNSAID:
                distance = _UNSAID
            head = pack("<HH", packet_id, distance | ref << 6) + more
            parts = (head, payload) if ref else (head, pack("<H", len(topic)), topic, payload)
            try:
                pos = journal.append(kind, parts, self._reserved)
                break
            except JournalFull:
                if not self._drops or not self._drop():
                    raise
        if distance != _UNSAID:
            self._said = self._upto
        if not ref and len(self._topics) < _TOPICS:
            self._topics[key] = (pos & 0xFFF) >> 2
        self._recorded = packet_id
        return pos

    def settle(self):
        """Record what waits in RAM for its grace to be over, oldest first.  Raises JournalFull, OSError."""
        if not self._held:
            return
        session = self.session
        for packet_id in reversed(session.order()):
            held = self._held.get(packet_id)
            if held is None:
                continue
            topic, payload, retain = held
            session.out[packet_id] = self._record(packet_id, topic, topic, payload, 1, retain, None) << 2 | 1
            self._drop_held(packet_id)
            self.stored += 1

    def unsettled(self):
        """How many messages wait in RAM."""
        return len(self._held)

    def _drop_held(self, packet_id):
        topic, payload, _ = self._held.pop(packet_id)
        self._held_bytes -= len(topic) + len(payload)

    def waiting(self):
        """How many messages wait for their end."""
        return self.queued() + len(self.session.out)

    def _drop(self):
        """Drop the queued messages of the oldest sector that has any; False if there is none."""
        self._take_up_sent()
        if not self.queued():
            return False
        self._ready()
        journal = self.journal
        before = self._taken
        seq = journal.seq_of(self._cursor)
        while self.queued() and self._cursor >= 0 and journal.seq_of(self._cursor) == seq:
            if self._find() >= 0:
                self.dropped += 1
                if self.finished:
                    self.finished(self._taken, False)
        self._advance()
        self._note(_DROPPED, before, pack("<Hi", self._taken, self._cursor))
        self.commit()  # before the sector is erased
        return True

    def at_once(self, packet_id):
        """Whether the message that publish() has just returned is all that is to be sent: it then counts as sent.

        The caller sends it, whole, before it calls fill() again: it has at hand what fill() would read from flash.
        """
        if (
            self._taken != packet_id
            or self._sent_to % _IDS + 1 != packet_id
            or self._resend
            or self._held_back
            or self.rest
            or self.answers
            or self.hold
            or not self.online
        ):
            return False
        self._sent_to = packet_id
        self.sent += 1
        return True

    def fill(self, buf, off):
        """Write what is to be sent into buf from off on, whole packets one after the other; return the next offset.

        A PUBLISH larger than buf comes in pieces, in this and the following calls, with nothing in between: as long
        as .rest is not 0 only fill() may write.  Raises JournalFull, OSError from the device.
        """
        if self._urgent:
            self.commit()
        size = len(buf)
        if self.rest:
            off = self._more(buf, off)
        n = self.answers
        if n and not self.rest:
            answers = self._answers
            n = min(n, size - off & ~3)
            buf[off : off + n] = answers[:n]
            off += n
            self.answers = left = self.answers - n
            if left:
                answers[:left] = bytes(answers[n : n + left])
        out = self.session.out
        while not self.rest:
            packet_id = self._held_back or self._next()
            if not packet_id:
                break
            self._held_back = packet_id
            where = out.get(packet_id)
            if where is None:  # finished in the meantime
                self._held_back = 0
                continue
            if where & 3 == _REL:
                if size - off < 4:
                    break
                off = put_ack(buf, off, _PUBREL, packet_id)
            else:
                after = self._put_publish(buf, off, packet_id, where >> 2)
                if after < 0:
                    break
                off = after
            self.resent += self._again
            self._held_back = 0
        return off

    def due(self):
        """Whether fill() may have something to write."""
        return self.answers or self._sent_to != self.session.newest or self._resend or self.rest or self._held_back

    def unsent(self):
        """Whether fill() had no room for something."""
        return self.rest or self.answers or self._held_back

    def _put_publish(self, buf, off, packet_id, pos):
        """Write a PUBLISH, or its beginning; return the next offset, -1 if it has to wait for a buffer of its own."""
        journal = self.journal
        if pos:
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
            first = journal.buf[0]
            if first & 0x40:  # properties that version 5 has recorded: they are not sent here
                size = bytearray(2)
                journal.read(pos, 4 + begin, size)
                begin += 2 + (size[0] >> 1 | size[1] << 7) + (size[0] & 1) * 8
            n -= begin
            first = first & 7 | 0x30
        else:
            topic, payload, retain = self._held[packet_id]
            n = len(payload)
            first = 0x33 if retain else 0x32
        head = len(topic) + 9  # at most
        room = len(buf) - off
        if head + n > room and off:
            return -1
        if self._dup:
            first |= 8
        self.rest = n
        self._sending = packet_id
        self.sent += 1
        if head > room:
            lead = bytearray(head)
            self._lead = memoryview(lead)[: put_publish_head(lead, 0, first, topic, packet_id, n)]
            self.rest += len(self._lead)
        else:
            off = put_publish_head(buf, off, first, topic, packet_id, n)
            if pos and begin + n + 4 <= len(journal.buf) and off + n <= len(buf):
                self.rest = 0
                buf[off : off + n] = journal.buf[begin + 4 : begin + 4 + n]
                return off + n
        return self._more(buf, off)

    def _more(self, buf, off):
        n = len(self._lead)
        if n:
            n = min(n, len(buf) - off)
            buf[off : off + n] = self._lead[:n]
            self._lead = self._lead[n:]
            off += n
            self.rest -= n
        n = min(self.rest, len(buf) - off)
        if n:
            where = self.session.out.get(self._sending)
            if where is None:
                raise OSError("message %d is gone in the middle of being sent" % self._sending)
            if where > 3:
                # It may have been carried to another sector since: its payload is the end of its record.
                size = bytearray(2)
                self.journal.read(where >> 2, 2, size)
                begin = 4 + (size[0] | size[1] << 8) - self.rest
                self.journal.read(where >> 2, begin, buf[off : off + n])
            else:
                payload = self._held[self._sending][1]
                begin = len(payload) - self.rest
                buf[off : off + n] = payload[begin : begin + n]
            self.rest -= n
        return off + n

    def in_flight(self):
        """How many messages that have been sent wait for their end."""
        return len(self.session.out) - (self._taken - self._sent_to) % _IDS

    def _next(self):
        """The next message to send on this connection, 0 if the window is full or nothing waits."""
        session = self.session
        taken = self._taken
        direct = self._sent_to
        if direct == taken == session.newest and not self._resend:
            return 0
        out = session.out
        while direct != taken:
            direct = direct % _IDS + 1
            if direct in out:
                break
            self._sent_to = direct  # lost or dropped
        room = session.limit - len(out) + len(self._resend) + (taken - self._sent_to) % _IDS
        if self._resend:
            self._again = 1
            return self._resend.pop() if room > 0 else 0
        self._again = 0
        self._dup = False
        if room <= 0 or self.hold:
            return 0
        if direct != self._sent_to:
            self._sent_to = direct
            return direct
        if taken == session.newest:
            return 0
        self.journal.reopen()  # or a mount after a cut would take it for never sent
        packet_id = self._take()
        self._sent_to = self._taken
        self._consider()
        return packet_id

    def _lose(self, packet_id):
        """A message is no longer readable: count it and go on, or it would stop all others for ever."""
        self.lost += 1
        self._ready()
        self.session.out.pop(packet_id, None)
        self._done(packet_id, False)

    def _advance(self):
        """The oldest message is finished: find the next one that is not."""
        out = self.session.out
        upto = self._upto
        taken = self._taken
        while upto != taken:
            after = upto % _IDS + 1
            if after in out:
                break
            upto = after
        self._upto = upto

    def _done(self, packet_id, result):
        """A message is finished, and no longer in the window.  To be called after _ready()."""
        if self._held and packet_id in self._held:
            self._drop_held(packet_id)
            self.spared += 1
            said = self._said == self._upto
            self._advance()
            if said:  # no record speaks of this message, none has to say that it is over
                self._said = self._upto
        elif self._upto % _IDS + 1 == packet_id:
            self._advance()
        else:
            self._note(_DONE, packet_id)
        if self.finished:
            self.finished(packet_id, result)

    # -- the connection

    def connecting(self):
        """To be called before a CONNECT that is not clean goes out.  Raises JournalFull, OSError.

        The broker may have lost the session and make a new one, and its CONNACK, or the record of it, may be lost,
        too.  The next CONNACK says "session present" then, but the subscriptions are gone.
        """
        self._doubt = self._asked
        if self._subs_at >= 0 and not self._asked:
            self._ready()
            self._note(_ASKED, 0)
            self.commit()
            self._asked = True

    def connected(self, session_present, identity, clean=False):
        """CONNACK came.  Everything unfinished goes out again, in order, before anything new.

        Without a session at the broker it goes out as new, and what already had its PUBREC is over.  Then, too, all
        subscriptions have to be made again.  clean: CONNECT said so; a QoS 2 message then waits for its PUBCOMP and is
        sent again without it, perhaps twice.  Raises JournalFull, OSError.  MQTT 3.1.1 section 4.4.
        """
        self.disconnected()
        if not session_present:
            self.begin(identity)
        elif self._asked:
            self._ready()
            self._note(_TOLD, self._doubt)
            if self._doubt:
                self.commit()
                self._found_subscriptions()
            self._asked = False
        self._take_up_sent()
        self._resend = self.session.order()
        self._sent_to = self._taken
        self._dup = session_present
        self.session.clean = clean
        self.online = True
        self._consider()

    def begin(self, identity):
        """Record that a new session begins at the broker: nothing of an older one counts any more."""
        self.commit()
        # A message that was handled but not recorded never comes again: none of the new ones may have its token.
        received = self.received + _LEAP & 0xFFFF
        self.journal.append(_SESSION, (pack("<IH", identity, received),))
        self.identity = identity
        self.received = received
        gone = self._renew()  # the broker has had them
        self._advance()
        for packet_id in gone:
            if self.finished:
                self.finished(packet_id, True)

    def ending(self):
        """The connection is about to end: what is published from here on is none that may have been sent on it."""
        self.online = False
        self._consider()

    def disconnected(self):
        """The connection is over: nothing half sent is continued, no answer is owed."""
        self.session.disconnected()
        self._resend = ()
        self._sent_to = self._taken  # what is in the window behind it is not sent yet
        self._again = 0
        self._dup = False
        self._held_back = 0  # taken, but there was no room in the buffer
        self._sending = 0
        self._lead = b""  # of a PUBLISH still to come: what is in front of its payload
        self.rest = 0  # bytes of a PUBLISH still to come
        self.answers = 0  # bytes of _answers
        self.online = False
        self.hold = False  # no message but those that have been sent before is to be sent now
        self._consider()

    # -- inbound

    def can_answer(self):
        """Whether there is room for one more answer; the reader waits until there is."""
        return self.answers < _ANSWERS

    def _act(self, action, packet_id):
        record = action >> 4
        if record == _DONE:
            self.acknowledged += 1
            self._done(packet_id, True)
        elif record:
            more = b""
            if record == _RECEIVED:
                self.received = self.received + 1 & 0xFFFF
                more = pack("<H", self.received)
            self._note(record, packet_id, more)
            self._urgent = True
            self._usual = _NOTHING
        if action & 15 and self.online:
            self.answers = put_ack(self._answers, self.answers, action & 15, packet_id)

    def on_ack(self, packet, packet_id):
        """A PUBACK, PUBREC, PUBREL or PUBCOMP came.  Raises ProtocolError, JournalFull, OSError."""
        # In a frame of 11 words: MicroPython takes a larger one from the heap.
        out = self.session.out
        where = out.get(packet_id, 0)
        if where > 3 and (self._upto - self._said) % _IDS + self._used // 3 < _LAZY:
            # The usual cases, in short: what TRANSITIONS says of them, too.
            where &= 3
            if packet_id == self._upto % _IDS + 1 and packet == (
                _PUBACK if where == _PUB1 else _PUBCOMP if where == _REL else 0
            ):
                # The oldest message is over.
                del out[packet_id]
                self._upto = packet_id
                if packet_id != self._taken and packet_id % _IDS + 1 not in out:
                    self._advance()
                self.acknowledged += 1
                if self.finished:
                    self.finished(packet_id, True)
                return
            if packet == _PUBREC and where == _PUB2 and self._used <= _PENDING - _LONGEST and not self.session.clean:
                out[packet_id] |= _REL
                self._act(_RELEASED << 4 | _PUBREL, packet_id)
                return
        self._ready()
        where = self.session.acknowledged(packet, packet_id)
        if where:
            self._act(where, packet_id)

    def on_publish(self, qos, packet_id):
        """A QoS 1 or 2 PUBLISH came: return whether to deliver it.  Raises ProtocolError."""
        answer = self.session.incoming(qos, packet_id)
        if not answer:
            return True
        self.duplicates += 1
        if answer > 0:
            self._act(answer, packet_id)
        return False

    def token(self, packet_id):
        """A number that stays the same if the same QoS 2 message has to be handled again after a power cut."""
        return (self.received + 1 & 0x3FFF) << 16 | packet_id

    def handled(self, qos, packet_id, epoch):
        """The handler has returned.  epoch: session.epoch when the message came.  Raises JournalFull, OSError."""
        if qos == 2:
            self._ready()
            self._act(self.session.handled(qos, packet_id, epoch), packet_id)
        elif self.session.handled(qos, packet_id, epoch) and self.online:
            self.answers = put_ack(self._answers, self.answers, _PUBACK, packet_id)

    # -- subscriptions

    def granted(self, topic_filter, qos):
        """The QoS the broker granted to this very subscription, None if it has not acknowledged it."""
        found = self.subscriptions().get(topic_filter)
        return found & 3 if found is not None and found >> 2 == qos else None

    def subscribed(self, topic_filter, qos, granted):
        """SUBACK came.  Losing this only makes a SUBSCRIBE again; so it is for more than 32, or 3 KB, of them.

        granted: None: there is no such subscription any more.
        """
        subs = dict(self.subscriptions())
        if granted is None:
            del subs[topic_filter]
        else:
            subs[topic_filter] = qos << 2 | granted
        if len(subs) > _MOST_SUBS:
            return
        body = bytearray()
        for topic_filter, how in subs.items():
            text = topic_filter.encode()
            body += pack("<BH", how, len(text))
            body += text
        if len(body) <= self.journal.max_body:
            pos = self.journal.append(_SUBS, (body,))
            self._subs_at = pos if subs else -1
            self._subs = subs

    def unsubscribing(self, topic_filter):
        """To be called before UNSUBSCRIBE goes out: afterwards nobody may believe in the subscription."""
        if topic_filter in self.subscriptions():
            self.subscribed(topic_filter, 0, None)

    # -- records

    def _ready(self):
        """Make room for an entry, before the session changes: a failure here must leave it as it was."""
        if (self._upto - self._said) % _IDS + self._used // 3 >= _LAZY or self._used + _LONGEST > _PENDING:
            self.commit()

    def _note(self, record, packet_id, more=b""):
        i = self._used
        pending = self._pending
        pending[i] = record
        pending[i + 1] = packet_id & 255
        pending[i + 2] = packet_id >> 8
        i += 3
        pending[i : i + len(more)] = more
        self._used = i + len(more)

    def commit(self):
        """Record all that is pending now: when idle, before an answer that depends on it, before sleeping."""
        if not self._used and self._said == self._upto:
            return
        pending = self._pending
        n = self._used
        if self._said != self._upto:
            # With the position from which on all unfinished messages can be found, -1 if it is not known.
            pos = -1
            packet_id = self._upto
            if (self._taken - packet_id) % _IDS <= 2 * self._most:
                while pos < 0 and packet_id != self._taken:
                    packet_id = packet_id % _IDS + 1
                    where = self.session.out.get(packet_id, 0)
                    if where > 3 and where & 3 != _REL:
                        pos = where >> 2
                if pos < 0 and self.queued():
                    pos = self._cursor
            pack_into("<BHi", pending, n, _UPTO, self._upto, pos)
            n += 7
        if n == 3:
            pending[3] = 0  # says nothing, and put() takes it
            n = 4
        entry = pending[0] | pending[1] << 8
        if not self.journal.put(_FACTS, entry, pending[2] | pending[3] << 8, pending[4:n]):
            self.journal.append(_FACTS, (pending[:n],))
        self._used = 0
        self._said = self._upto
        self._urgent = False
        self._consider()
