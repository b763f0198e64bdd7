"""Session facts <-> journal records, and their replay after a reboot.  FORMAT.md has the bytes.

Owns the queue: a message is a record from publish() until it is acknowledged, in RAM only its place while it is in
the in-flight window; what waits behind the window stays on flash, found by one cursor.  Knows no socket and no clock.

Order that crash safety needs: PUBLISH is recorded before publish() returns, RELEASED before PUBREL goes out, RECEIVED
before PUBREC, INDONE before PUBCOMP.  DONE is lazy: it rides with the next record, at most 16 of them wait.
"""

from binascii import crc32
from struct import pack, unpack_from

from micropython import const

from .errors import JournalCorrupt, JournalFull
from .packet import PUBREL, check_topic, put_ack, put_fixed_header, remaining_length_size
from .session import DONE, INDONE, RECEIVED, REL, RELEASED, Session

# Kinds of records.  The two low nibbles are the record's own.
_PUB = const(0x10)  # | 8 with a mark | QoS << 1 | retain: DONE entries, mark, then wire bytes from the topic on
_SUB = const(0x20)  # | requested QoS << 2 | granted QoS: a topic filter the broker has acknowledged
_FACTS = const(0x30)  # entries
_SYNC = const(0x31)  # all identifiers that are live up to here
_UNSUB = const(0x32)  # a topic filter that is no longer subscribed
_SESSION = const(0x33)  # identity u32, received u16: a new session at the broker begins

# Entries beside those of session: of no one message.
_DROPPED = const(5)  # all messages up to this packet identifier that come after the second one
_ASKED = const(6)  # CONNECT goes out
_TOLD = const(7)  # CONNACK told of a session at the broker; 1: but not whether of ours, so no subscription counts
_ENTRY = const(3)  # type u8, packet identifier u16; RECEIVED: and the count of messages received; _DROPPED: see above
_PENDING = const(48)
_ANSWERS = const(256)
_MOST_QUEUED = const(60000)  # of 65535 packet identifiers
_FORMAT = "<IBqHH"  # identity, 1: has a mark | 2: asked, mark, newest packet identifier, received
_LEAP = const(16)  # more than messages can be handled and not yet recorded


def identity(client_id, host, port):
    """The number a broker session is known by in the journal, never 0."""
    return crc32(("%s\n%s\n%d" % (client_id, host, port)).encode()) or 1


class Store:
    """journal: not yet mounted.  in_flight: 1-64, of which at most 4 per sector are used.  when_full: "raise", "wait"
    (same here: the client waits) or "drop_oldest".

    finished: called with (packet_id, True) when the broker has the message, (packet_id, False) when it was dropped.
    """

    def __init__(self, journal, in_flight=16, when_full="raise", finished=None):
        self.journal = journal
        in_flight = min(in_flight, 4 * journal.sectors)  # a small ring has no room to carry a large window over
        self.session = Session(in_flight)
        self._drops = when_full == "drop_oldest"
        self._finished = finished
        self._most = in_flight + _PENDING // _ENTRY  # in the window when replayed: lazy DONEs may be missing
        self._pending = bytearray(_PENDING)
        self._answers = bytearray(_ANSWERS)
        self.stored = self.acknowledged = self.sent = self.resent = self.dropped = self.lost = self.duplicates = 0
        self._forget()

    def _forget(self):
        self.session.clear()
        self.subscriptions = {}  # topic filter -> position << 4 | requested QoS << 2 | granted QoS
        self.mark = None
        self.identity = 0
        self.received = 0  # QoS 2 messages received, modulo 65536
        self._counted = 0  # of these, recorded as received: all that a snapshot may say
        self.queued = 0  # messages behind the window
        self._cursor = -1  # where to look for the first of them
        self._taken = 0  # packet identifier taken from there last
        self._begun = False  # replay has come to the first snapshot
        self._asked = False  # CONNECT has gone out, no CONNACK has come
        self._doubt = False  # and so it was before that CONNECT
        self._used = 0  # bytes of _pending
        self._urgent = False  # an answer waits for _pending
        self.disconnected()

    def open(self):
        """Mount the journal and take up what it holds.  OSError only from the device."""
        self._forget()
        self.journal.mount(self)
        # These may have been sent before, so they will be sent with DUP: a window full, and what lost its lazy DONE.
        while self.queued and len(self.session.out) < self._most and self._take():
            pass

    def close(self):
        """Record what is pending, then an orderly end.  Raises JournalFull, OSError; all but DONEs is safe already."""
        self.commit()
        self.journal.close()

    # -- outbound

    def publish(self, topic_name, payload, qos, retain=False, mark=None):
        """Record a QoS 1 or 2 message; when this returns it survives power loss.  Return its packet identifier.

        topic_name: str or bytes.  payload: bytes-like.  mark: None or an integer of 64 bits, signed.
        Raises ValueError for a bad argument or a message that no sector can hold, JournalFull, OSError.
        """
        topic_name = check_topic(topic_name)
        if self._urgent:
            self.commit()
        journal = self.journal
        size = len(topic_name) + len(payload)
        rest = 5 + (8 if mark is not None else 0)
        if rest + size > journal.max_body:
            raise ValueError(
                "topic and payload have %d bytes, the journal holds messages of at most %d"
                % (size, journal.max_body - rest)
            )
        if self.queued >= _MOST_QUEUED:
            raise JournalFull("no free packet identifier: %d messages wait" % self.queued)
        packet_id = self.session.new_id()
        kind = _PUB | qos << 1 | (1 if retain else 0) | (8 if mark is not None else 0)
        while True:
            try:
                if rest + size + self._used > journal.max_body:
                    self.commit()
                head = bytes((self._used,)) + self._pending[: self._used]
                if mark is not None:
                    head += pack("<q", mark)
                parts = (head, pack(">H", len(topic_name)), topic_name, pack(">H", packet_id), payload)
                pos = journal.append(kind, parts, self._reserve(rest + size))
                break
            except JournalFull:
                if not self._drops or not self._drop():
                    raise
        # Not before: a snapshot taken on the way must not count this message among those before it.
        self.session.newest = packet_id
        self._recorded(pos)
        self._new(packet_id, pos, qos, 0)
        self.stored += 1
        if mark is not None:
            self.mark = mark
        return packet_id

    def _reserve(self, size):
        """Sectors that a message with a body of size bytes must leave, so that a full journal can always be left again.

        One for the records that acknowledgements need, and twice a window full of such messages as it is after a mount,
        which may have to be carried over at the same time.
        """
        window = self._most * self.journal.room_for(size)
        return min(1 + 2 * window // self.journal.room, self.journal.sectors - 3)

    def is_live(self, packet_id):
        """Whether the message with this packet identifier still waits for its end."""
        return packet_id in self.session.out or self._is_queued(packet_id)

    @property
    def waiting(self):
        """How many messages wait for their end."""
        return self.queued + len(self.session.out)

    def _is_queued(self, packet_id):
        ahead = self.session.ahead
        return self.queued and 0 < ahead(packet_id, self._taken) <= ahead(self.session.newest, self._taken)

    def _new(self, packet_id, pos, qos, window):
        """A message newer than all others is at pos.  window: take it in at once while there are fewer."""
        if not self.queued:
            if len(self.session.out) < window:
                self.session.out[packet_id] = pos << 2 | qos
                self._taken = packet_id
                return
            self._cursor = pos
        self.queued += 1

    def _find(self):
        """Return the position of the first queued message, loaded, and make it the one taken last; -1 if none."""
        journal = self.journal
        pos = self._cursor
        while self.queued and pos >= 0:
            pos = journal.next(pos)
            if pos < 0:
                break
            kind = journal.buf[0]
            behind = journal.behind(pos)
            if kind & 0xF0 == _PUB:
                packet_id = self._packet_id(pos)
                if self._is_queued(packet_id):
                    self._taken = packet_id
                    self._cursor = behind
                    self.queued -= 1
                    if behind < 0:  # whatever else was queued is not readable: the next to come is the first again
                        self.lost += self.queued
                        self.queued = 0
                    return pos
            pos = behind
        self.lost += self.queued  # their records are no longer readable
        self.queued = 0
        return -1

    def _take(self):
        """Move the first queued message into the window; return its packet identifier, 0 if there is none."""
        pos = self._find()
        if pos < 0:
            return 0
        self.session.out[self._taken] = pos << 2 | self.journal.buf[0] >> 1 & 3
        return self._taken

    def _wire(self):
        """Offset, in the PUB record just loaded, of the wire bytes."""
        buf = self.journal.buf
        return 5 + buf[4] + (buf[0] & 8)

    def _packet_id(self, pos):
        """The packet identifier in the PUB record just loaded from pos."""
        buf = self.journal.buf
        at = self._wire()
        at += 2 + (buf[at] << 8 | buf[at + 1])
        two = buf[at : at + 2]
        if len(two) < 2:
            two = bytearray(2)
            self.journal.read(pos, at, two)
        return two[0] << 8 | two[1]

    def _drop(self):
        """Drop the queued messages of the oldest sector that has any; False if there is none."""
        if not self.queued:
            return False
        self._ready()
        before = self._taken
        seq = self.journal.seq_of(self._cursor)
        while self.queued and self._cursor >= 0 and self.journal.seq_of(self._cursor) == seq:
            if self._find() >= 0:
                self.dropped += 1
                if self._finished:
                    self._finished(self._taken, False)
        # It rides with the message they make room for.  A cut before that brings them back, unharmed.
        self._note(_DROPPED, self._taken, before)
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
        n = min(self.answers, size - off & ~3)
        if n and not self.rest:
            buf[off : off + n] = memoryview(self._answers)[:n]
            off += n
            self.answers -= n
            self._answers[: self.answers] = self._answers[n : n + self.answers]
        session = self.session
        while not self.rest:
            packet_id = self._held_back or self._next()
            if not packet_id:
                break
            self._held_back = packet_id
            where = session.out.get(packet_id)
            if where is None:  # finished in the meantime
                self._held_back = 0
                continue
            if where & 3 == REL:
                if size - off < 4:
                    break
                off = put_ack(buf, off, PUBREL, packet_id)
            else:
                length = self.journal.load(where >> 2)
                if not length:
                    self._lose(packet_id)
                    continue
                begin = self._wire()
                n = length - 4 - begin
                head = 1 + remaining_length_size(n)
                if head + n > size - off and off:
                    break
                kind = self.journal.buf[0]
                off = put_fixed_header(buf, off, 0x30 | kind & 7 | (8 if self._dup else 0), n)
                self.rest = n
                self._sending = packet_id, begin
                off = self._more(buf, off)
                self.sent += 1
            self.resent += self._again
            self._held_back = 0
        return off

    def _more(self, buf, off):
        packet_id, begin = self._sending
        where = self.session.out.get(packet_id)
        if where is None:
            raise OSError("message %d is gone in the middle of being sent" % packet_id)
        n = min(self.rest, len(buf) - off)
        self.journal.read(where >> 2, begin, buf[off : off + n])
        self._sending = packet_id, begin + n
        self.rest -= n
        return off + n

    def _next(self):
        """The next message to send on this connection, 0 if the window is full or nothing waits."""
        room = self.session.limit - len(self.session.out) + len(self._resend)
        if self._resend:
            self._again = 1
            return self._resend.pop() if room > 0 else 0
        self._again = 0
        self._dup = False
        return self._take() if room > 0 and self.queued else 0

    def _lose(self, packet_id):
        """A message is no longer readable: count it and go on, or it would stop all others for ever."""
        self.lost += 1
        self._ready()
        self.session.out.pop(packet_id, None)
        self._note(DONE, packet_id)
        self._held_back = 0
        if self._finished:
            self._finished(packet_id, False)

    # -- the connection

    def connecting(self):
        """To be called before a CONNECT that is not clean goes out.  Raises JournalFull, OSError.

        The broker may have lost the session and make a new one, and its CONNACK, or the record of it, may be lost,
        too.  The next CONNACK says "session present" then, but the subscriptions are gone.
        """
        self._doubt = self._asked
        if self.subscriptions and not self._asked:
            self._ready()
            self._note(_ASKED, 0)
            self.commit()
            self._asked = True

    def connected(self, session_present, identity):
        """CONNACK came.  Everything unfinished goes out again, in order, before anything new.

        Without a session at the broker it goes out as new, and what already had its PUBREC is over.  Then, too, all
        subscriptions have to be made again.  Raises JournalFull, OSError.  MQTT 3.1.1 section 4.4.
        """
        self.disconnected()
        if not session_present:
            self.begin(identity)
        elif self._asked:
            self._ready()
            self._note(_TOLD, self._doubt)
            if self._doubt:
                self.commit()
                self.subscriptions.clear()
            self._asked = False
        self._resend = self.session.order()
        self._dup = session_present
        self.online = True

    def begin(self, identity):
        """Record that a new session begins at the broker: nothing of an older one counts any more."""
        self.commit()
        # A message that was handled but not recorded never comes again: none of the new ones may have its token.
        received = self.received + _LEAP & 0xFFFF
        self.journal.append(_SESSION, (pack("<IH", identity, received),))
        self._renew(identity, received)

    def _renew(self, identity, received):
        gone = [p for p in self.session.out if self.session.out[p] & 3 == REL] if self._finished else ()
        self.session.renew()
        self.subscriptions.clear()
        self._asked = False
        self.identity = identity
        self.received = self._counted = received
        for packet_id in gone:  # the broker has had them
            self._finished(packet_id, True)

    def disconnected(self):
        """The connection is over: nothing half sent is continued, no answer is owed."""
        self.session.disconnected()
        self._resend = ()
        self._again = 0
        self._dup = False
        self._held_back = 0  # taken, but there was no room in the buffer
        self._sending = None
        self.rest = 0  # bytes of a PUBLISH still to come
        self.answers = 0  # bytes of _answers
        self.online = False

    # -- inbound

    @property
    def can_answer(self):
        """Whether there is room for one more answer; the reader waits until there is."""
        return self.answers < _ANSWERS

    def _act(self, action, packet_id):
        record = action >> 4
        if record == DONE:
            self.acknowledged += 1
            self._note(DONE, packet_id)
            if self._finished:
                self._finished(packet_id, True)
        elif record:
            if record == RECEIVED:
                self.received = self.received + 1 & 0xFFFF
            self._note(record, packet_id, self.received)
            self._urgent = True
        if action & 15 and self.online:
            self.answers = put_ack(self._answers, self.answers, action & 15, packet_id)

    def on_ack(self, packet, packet_id):
        """A PUBACK, PUBREC, PUBREL or PUBCOMP came.  Raises ProtocolError, JournalFull, OSError."""
        self._ready()
        self._act(self.session.acknowledged(packet, packet_id), packet_id)

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
        self._ready()
        self._act(self.session.handled(qos, packet_id, epoch), packet_id)

    # -- subscriptions

    def granted(self, topic_filter, qos):
        """The QoS the broker granted to this very subscription, None if it has not acknowledged it."""
        where = self.subscriptions.get(topic_filter)
        return where & 3 if where is not None and where >> 2 & 3 == qos else None

    def subscribed(self, topic_filter, qos, granted):
        """SUBACK came.  Losing this record only makes a SUBSCRIBE again."""
        pos = self.journal.append(_SUB | qos << 2 | granted, (topic_filter.encode(),))
        self.subscriptions[topic_filter] = pos << 4 | qos << 2 | granted

    def unsubscribing(self, topic_filter):
        """To be called before UNSUBSCRIBE goes out: afterwards nobody may believe in the subscription."""
        if topic_filter in self.subscriptions:
            self.journal.append(_UNSUB, (topic_filter.encode(),))
            del self.subscriptions[topic_filter]

    # -- records

    def _ready(self):
        """Make room for an entry, before the session changes: a failure here must leave it as it was."""
        if self._used + _ENTRY + 2 > _PENDING:
            self.commit()

    def _note(self, record, packet_id, more=0):
        i = self._used
        pending = self._pending
        pending[i] = record
        pending[i + 1] = packet_id & 255
        pending[i + 2] = packet_id >> 8
        i += _ENTRY
        if record == RECEIVED or record == _DROPPED:
            pending[i] = more & 255
            pending[i + 1] = more >> 8
            i += 2
        self._used = i

    def commit(self):
        """Record all pending entries now: when idle, before an answer that depends on one, before sleeping."""
        if self._used:
            self._recorded(self.journal.append(_FACTS, (memoryview(self._pending)[: self._used],)))

    def _recorded(self, pos):
        """The pending entries are programmed, in the record at pos."""
        if self._urgent:
            self._apply(self._pending, self._used, pos, False)
            self._urgent = False
        self._used = 0
        self._counted = self.received

    def _apply(self, entries, n, pos, replay, limit=0):
        """Note where the entries of a record at pos stand; replay: let them happen, too.

        limit: they are all about messages older than the one with this packet identifier.
        """
        session = self.session
        i = 0
        while i + _ENTRY <= n:
            record = entries[i]
            packet_id = entries[i + 1] | entries[i + 2] << 8
            i += _ENTRY
            if limit and (
                record > _DROPPED or session.ahead(session.newest, packet_id) < session.ahead(session.newest, limit)
            ):
                i += 2 if record == _DROPPED else 0
                continue
            if replay:
                while self._is_queued(packet_id) and record in (DONE, RELEASED):
                    if not self._take():
                        break
            if record == DONE:
                if replay:
                    session.out.pop(packet_id, None)
            elif record == RELEASED:
                if replay or packet_id in session.out:
                    session.out[packet_id] = pos << 2 | REL
            elif record == RECEIVED:
                if replay or packet_id in session.held:
                    session.held[packet_id] = pos
                if replay:
                    self.received = self._counted = entries[i] | entries[i + 1] << 8
                i += 2
            elif record == _DROPPED:
                before = entries[i] | entries[i + 1] << 8
                i += 2
                if replay:
                    span = session.ahead(packet_id, before)
                    for p in [p for p in session.out if 0 < session.ahead(p, before) <= span]:
                        del session.out[p]
                    while self._is_queued(packet_id) and self._find() >= 0:
                        pass
            elif not replay:
                pass
            elif record == INDONE:
                session.held.pop(packet_id, None)
            elif record == _ASKED:
                self._asked = True
            elif record == _TOLD:
                self._asked = False
                if packet_id:
                    self.subscriptions.clear()

    # -- what the journal asks of its owner

    def state(self):
        mark = self.mark
        return pack(
            _FORMAT,
            self.identity,
            (mark is not None) | self._asked << 1,
            mark or 0,
            self.session.newest,
            self._counted,
        )

    def restore(self, state):
        self.identity, flags, mark, newest, self.received = unpack_from(_FORMAT, state)
        self.mark = mark if flags & 1 else None
        self._asked = bool(flags & 2)
        self._counted = self.received
        if not self._begun:
            # Whatever was queued before this sector is finished, or its sector would be read.
            self._begun = True
            self.session.newest = self._taken = newest

    def replay(self, kind, pos):
        buf = self.journal.buf
        if kind & 0xF0 == _PUB:
            self._replay_publish(kind, pos)
        elif kind & 0xF0 == _SUB:
            self.subscriptions[str(self._body(pos), "utf-8")] = pos << 4 | kind & 15
        elif kind == _FACTS:
            body = self._body(pos)
            self._apply(body, len(body), pos, True)
        elif kind == _SYNC:
            self._replay_sync(self._body(pos))
        elif kind == _UNSUB:
            self.subscriptions.pop(str(self._body(pos), "utf-8"), None)
        elif kind == _SESSION:
            self._renew(*unpack_from("<IH", buf, 4))

    def _body(self, pos):
        """The whole body of the record just loaded from pos."""
        body = bytearray(self.journal.buf[2] | self.journal.buf[3] << 8)
        self.journal.read(pos, 4, body)
        return body

    def _replay_publish(self, kind, pos):
        buf = self.journal.buf
        session = self.session
        n = buf[4]
        entries = bytes(buf[5 : 5 + n])
        packet_id = self._packet_id(pos)
        mark = unpack_from("<q", buf, 5 + n)[0] if kind & 8 else None
        qos = kind >> 1 & 3
        new = self._begun and session.is_new(packet_id)
        # In an old record, carried over or programmed twice, an entry may name an identifier that is in use again.
        self._apply(entries, n, pos, True, 0 if new or not self._begun else packet_id)
        if new:
            session.newest = packet_id
            self._new(packet_id, pos, qos, self._most)
            if mark is not None:
                self.mark = mark
        elif not self._is_queued(packet_id):
            if session.out.get(packet_id, 0) & 3 != REL:
                session.out[packet_id] = pos << 2 | qos

    def _replay_sync(self, body):
        taken, newest, n = unpack_from("<HHH", body)
        session = self.session
        while self.queued and 0 < session.ahead(taken, self._taken) < 32768 and self._take():
            pass
        if not self._begun or session.ahead(taken, self._taken) < 32768:
            self._taken = taken
        if not self._begun or session.ahead(newest, session.newest) < 32768:
            session.newest = newest
        self._begun = True
        ids = unpack_from("<%dH" % ((len(body) - 6) // 2), body, 6)
        for packet_id in [p for p in session.out if p not in ids[:n]]:
            if session.ahead(packet_id, taken) == 0 or session.ahead(packet_id, taken) > 32767:
                del session.out[packet_id]  # finished; those ahead were still queued, replay only takes them earlier
        for packet_id in [p for p in session.held if p not in ids[n:]]:
            del session.held[packet_id]
        self.subscriptions.clear()

    def _places(self, sector, whole):
        """What is live in a sector: (messages oldest first, released, received, subscriptions, queued positions)."""
        session = self.session
        order = [p for p in reversed(session.order()) if session.out[p] >> 14 == sector]
        queued = []
        if whole and self.queued:
            journal = self.journal
            pos = self._cursor if self._cursor >> 12 == sector else journal.start_of(sector)
            while 0 <= pos and pos >> 12 == sector:
                pos = journal.next(pos)
                if pos < 0 or pos >> 12 != sector:
                    break
                behind = journal.behind(pos)
                if journal.buf[0] & 0xF0 == _PUB and self._is_queued(self._packet_id(pos)):
                    queued.append(pos)
                pos = behind
        return (
            [p for p in order if session.out[p] & 3 != REL],
            [p for p in order if session.out[p] & 3 == REL],
            [p for p in session.held if session.held[p] >> 12 == sector],
            [f for f in self.subscriptions if whole or self.subscriptions[f] >> 16 == sector],
            queued,
        )

    def live(self, sector, whole):
        journal = self.journal
        if self.queued and not whole:
            if self._cursor >> 12 == sector:
                self._cursor = journal.next(self._cursor)  # perhaps all that was left in the sector is behind it
            if self._cursor >> 12 == sector:
                return -1
        messages, released, received, filters, queued = self._places(sector, whole)
        size = 0
        for pos in [self.session.out[p] >> 2 for p in messages] + queued:
            size += journal.room_for(journal.load(pos) - 8)
        for topic_filter in filters:
            size += journal.room_for(4 * len(topic_filter))
        if released or received:
            size += journal.room_for(_ENTRY * len(released) + (_ENTRY + 2) * len(received))
        if whole:
            size += journal.room_for(6 + 2 * (len(self.session.out) + len(self.session.held)))
        return size

    def carry(self, sector, whole):
        session = self.session
        journal = self.journal
        messages, released, received, filters, queued = self._places(sector, whole)
        if whole:
            # The queued messages carried below are as new then as they were before.
            newest = session.newest
            if queued:
                journal.load(queued[0])
                newest = (self._packet_id(queued[0]) - 2) % 65535 + 1
            ids = list(session.out) + list(session.held)
            head = pack("<HHH", self._taken, newest, len(session.out))
            journal.append(_SYNC, (head, pack("<%dH" % len(ids), *ids)))
        for packet_id in messages:
            try:
                session.out[packet_id] = journal.copy(session.out[packet_id] >> 2) << 2 | session.out[packet_id] & 3
            except JournalCorrupt:
                self.lost += 1
                del session.out[packet_id]
        if released or received:
            entries = b"".join(
                [pack("<BH", RELEASED, p) for p in released]
                + [pack("<BHH", RECEIVED, p, self._counted) for p in received]
            )
            pos = journal.append(_FACTS, (entries,))
            for packet_id in released:
                session.out[packet_id] = pos << 2 | REL
            for packet_id in received:
                session.held[packet_id] = pos
        for topic_filter in filters:
            where = self.subscriptions[topic_filter]
            try:
                self.subscriptions[topic_filter] = journal.copy(where >> 4) << 4 | where & 15
            except JournalCorrupt:
                del self.subscriptions[topic_filter]  # it will be made again
        moved = -1
        for pos in queued:
            try:
                new = journal.copy(pos)
                moved = new if moved < 0 else moved
            except JournalCorrupt:
                self.lost += 1
                self.queued -= 1
        if self.queued and self._cursor >> 12 == sector:
            self._cursor = moved

    def oldest(self):
        places = [where >> 2 for where in self.session.out.values()]
        places += self.session.held.values()
        places += [where >> 4 for where in self.subscriptions.values()]
        if self.queued:
            places.append(self._cursor)
        seqs = [self.journal.seq_of(pos) for pos in places if pos >= 0]
        return min(seqs) if seqs else None
