"""What the store has in the journal, and how it finds it again: records <-> session facts.  FORMAT.md has the bytes.

Owns the layout of the store's records, the queue behind the in-flight window, and all that the journal asks of its
owner: snapshots, carrying; what it asks while it is mounted is replay.py's.  A topic is stored once per sector; other
messages there refer to it.
"""

import gc
from struct import pack, pack_into

from micropython import const

from .errors import JournalCorrupt
from .session import Session

# Kinds of records.  A PUB's low nibble is its own, and 0x40 tells that MQTT 5 properties are in front of the payload.
_PUB = const(0x10)  # | 8 with a mark | QoS << 1 | retain: identifier, reference, mark, perhaps topic, payload
_FACTS = const(0x30)  # entries
_SESSION = const(0x33)  # identity u32, received u16: a new session at the broker begins
_SUBS = const(0x34)  # all subscriptions: requested QoS << 2 | granted QoS u8, length u16, topic filter

# Entries beside those of session.
_UPTO = const(5)  # all messages up to this identifier are finished; the position of the next one that is not
_ASKED = const(6)  # CONNECT goes out
_TOLD = const(7)  # CONNACK told of a session at the broker; 1: but not whether of ours, so no subscription counts
_DROPPED = const(8)  # after the first identifier all messages up to the second are dropped; the position behind them

_FORMAT_BYTES = const(26)  # of a snapshot, in front of its lists
_UNSAID = const(63)  # the distance that says nothing
_HELD_ROOM = const(64)  # inbound identifiers that a message of the largest size leaves room for in a snapshot
# As in session.
_IDS = const(65023)
_REL = const(3)

_LAZY = const(16)  # DONEs that may be missing after a cut


class Recall:
    """What Store is made of; see there."""

    def __init__(self, journal, in_flight):
        self.journal = journal
        self.session = Session(in_flight)
        self._most = in_flight + _LAZY  # in the window when replayed: lazy DONEs may be missing
        self.max_state = _FORMAT_BYTES + 6 * self._most + 2 * _HELD_ROOM + 4
        self.lost = 0
        self._mounting = False
        self._topics = {}  # topic name, as it was given -> reference to its first record behind the newest snapshot

    def clear(self):
        """Forget everything."""
        session = self.session
        session.clear()
        self._found_subscriptions()
        self.mark = None
        self.identity = 0
        self.received = 0  # QoS 2 messages received, modulo 65536
        self._taken = session.newest  # packet identifier taken into the window last
        self._cursor = -1  # where to look for the first message behind it
        self._upto = session.newest  # all messages up to this one are finished
        self._asked = False  # CONNECT has gone out, no CONNACK has come
        self._unknown = True  # what came before the records to be replayed

    def _found_subscriptions(self, pos=-1):
        """They stand at pos, -1: there are none."""
        self._subs = None  # read when they are asked for
        self._subs_at = pos

    def subscriptions(self):
        """Topic filter -> requested QoS << 2 | granted QoS, of those the broker has acknowledged."""
        if self._subs is None:
            subs = self._subs = {}
            journal = self.journal
            pos = self._subs_at
            body = None
            if pos >= 0 and journal.load(pos) and journal.buf[0] == _SUBS:
                body = journal.body(pos)
            if body is None:  # they will be made again
                self._subs_at = -1
                return subs
            i = 0
            while i < len(body):
                at = i + 3
                n = body[i + 1] | body[i + 2] << 8
                subs[str(body[at : at + n], "utf-8")] = body[i]
                i = at + n
        return self._subs

    def state_size(self):
        session = self.session
        return _FORMAT_BYTES + 6 * len(session.out) + 2 * len(session.held) + 4 * (self._subs_at >= 0)

    def state(self):
        self._topics.clear()  # what stands in front of a snapshot is not referred to any more
        session = self.session
        out = session.out
        mark = self.mark
        state = bytearray(self.state_size())
        i = _FORMAT_BYTES
        outs = 0
        for packet_id, where in out.items():
            # What has no place on flash is not the journal's, but for PUBRELs and, while mounting, what is finished.
            if where > 3 or where & 1 == where >> 1:
                pack_into("<HI", state, i, packet_id, where)
                outs += 1
                i += 6
        for packet_id in session.held:
            pack_into("<H", state, i, packet_id)
            i += 2
        if self._subs_at >= 0:
            pack_into("<I", state, i, self._subs_at)
            i += 4
        pack_into(
            "<IBqHHHiBH",
            state,
            0,
            self.identity,
            (mark is not None) | self._asked << 1 | (self._subs_at >= 0) << 2,  # flags
            mark or 0,
            session.newest,
            self._taken,
            self.received,
            self._cursor,
            outs,
            len(session.held),
        )
        return state if i == len(state) else state[:i]

    # -- the queue: messages _taken + 1 to newest, from the cursor on

    def queued(self):
        """How many messages wait behind the window."""
        return (self.session.newest - self._taken) % _IDS

    def _is_queued(self, packet_id):
        taken = self._taken
        return 0 < (packet_id - taken) % _IDS <= (self.session.newest - taken) % _IDS

    def is_live(self, packet_id):
        """Whether the message with this packet identifier still waits for its end."""
        session = self.session
        return packet_id in session.out or self._taken != session.newest and self._is_queued(packet_id)

    def _find(self):
        """Return the position of the first queued message, loaded, and make it the one taken last; -1 if none."""
        journal = self.journal
        session = self.session
        pos = self._cursor
        if pos >= 0 and not journal.seq_of(pos):  # after damage only
            pos = journal.first()
        taken = self._taken
        while pos >= 0 and taken != session.newest:
            pos = journal.next(pos)
            if pos < 0:
                break
            self._cursor = journal.behind(pos)
            buf = journal.buf
            if buf[0] & 0xB0 == _PUB:
                packet_id = buf[4] | buf[5] << 8
                if self._is_queued(packet_id):
                    if not self._mounting:
                        self.lost += (packet_id - taken) % _IDS - 1
                    self._taken = packet_id
                    return pos
            pos = self._cursor
        if not self._mounting:
            self.lost += self.queued()  # their records are no longer readable
        self._taken = session.newest
        return -1

    def _take(self):
        """Move the first queued message into the window; return its packet identifier, 0 if there is none."""
        pos = self._find()
        if pos < 0:
            return 0
        out = self.session.out
        where = out.get(self._taken)
        if where is None:
            out[self._taken] = pos << 2 | self.journal.buf[0] >> 1 & 3
        elif not where:
            del out[self._taken]
        return self._taken

    # -- PUB records

    def _topic(self, pos):
        """The topic name in the PUB record at pos, None if it does not read back or has none."""
        journal = self.journal
        buf = journal.buf
        if not journal.load(pos) or buf[0] & 0xB0 != _PUB or buf[6] > _UNSAID or buf[7]:
            return None
        at = 8 + (buf[0] & 8)
        topic = bytearray(buf[at] | buf[at + 1] << 8)
        journal.read(pos, at + 2, topic)
        return bytes(topic)

    def _topic_at(self, pos):
        """Where the topic of the PUB record just loaded from pos stands."""
        ref = self.journal.buf[6] >> 6 | self.journal.buf[7] << 2
        return pos & ~0xFFF | ref << 2 if ref else pos

    def _payload_at(self):
        """Offset, in the body of the PUB record just loaded, of the payload."""
        buf = self.journal.buf
        at = 4 + (buf[0] & 8)
        if buf[6] <= _UNSAID and not buf[7]:
            at += 2 + (buf[4 + at] | buf[5 + at] << 8)
        return at

    def _renew(self):
        """A new session at the broker.  Return the messages that it took over from us: they are finished."""
        gone = self.session.renew()
        for packet_id in gone:
            if self._is_queued(packet_id):
                self.session.out[packet_id] = 0
        self._found_subscriptions()
        self._asked = False
        return gone

    # -- carrying

    def _messages(self, sector, whole):
        """The positions of the messages in a sector that have to be sent still, oldest first."""
        found = []
        for where in self.session.out.values():
            if where > 3 and where >> 14 == sector and where & 3 != _REL:
                found.append(where >> 2)
        found.sort()
        if whole and self.queued():
            journal = self.journal
            pos = self._cursor if self._cursor >> 12 == sector else journal.start_of(sector)
            while 0 <= pos and pos >> 12 == sector:
                pos = journal.next(pos)
                if pos < 0 or pos >> 12 != sector:
                    break
                behind = journal.behind(pos)
                buf = journal.buf
                if buf[0] & 0xB0 == _PUB and pos not in found and self._is_queued(buf[4] | buf[5] << 8):
                    found.append(pos)
                pos = behind
        return found

    def live(self, sector, whole):
        journal = self.journal
        if self.queued() and not whole:
            if self._cursor >> 12 == sector:
                self._cursor = journal.next(self._cursor)  # perhaps all that was left in the sector is behind it
            if self._cursor >> 12 == sector:
                return -1
        size = 0
        topics = []
        for pos in self._messages(sector, whole):
            n = journal.load(pos) - 8
            if n < 0:
                continue
            at = self._topic_at(pos)
            if at not in topics:
                topics.append(at)
                if at != pos and journal.load(at):  # the first of a topic takes it along
                    n += self._payload_at() - 4 - (journal.buf[0] & 8)
            size += journal.room_for(n)
        if self._subs_at >> 12 == sector:
            size += journal.room_for(max(0, journal.load(self._subs_at) - 8))
        return size

    def carry(self, sector, whole):
        journal = self.journal
        moved = {}
        refs = {}  # where a topic was -> the reference to where it is
        for pos in self._messages(sector, whole):
            moved[pos] = -1
            try:
                if not journal.load(pos):
                    raise JournalCorrupt(pos)
                at = self._topic_at(pos)
                skip = self._payload_at()
                head = bytearray(journal.buf[4 : 8 + (journal.buf[0] & 8)])
                ref = refs.get(at, 0)
                parts = (head,)
                if not ref:
                    topic = self._topic(at)
                    if topic is None:
                        raise JournalCorrupt(at)
                    parts = (head, pack("<H", len(topic)), topic)
                head[2] = _UNSAID | (ref & 3) << 6
                head[3] = ref >> 2
                new = moved[pos] = journal.copy(pos, parts, skip)
                if not ref:
                    refs[at] = (new & 0xFFF) >> 2
            except JournalCorrupt:
                pass
        out = self.session.out
        for packet_id in list(out):
            where = out[packet_id]
            if where & 3 != _REL and where >> 2 in moved:
                pos = moved[where >> 2]
                if pos < 0:
                    self.lost += 1
                    del out[packet_id]
                else:
                    out[packet_id] = pos << 2 | where & 3
        if self.queued() and self._cursor >> 12 == sector:
            self._cursor = journal.start_of(journal.head)
        if self._subs_at >> 12 == sector:
            try:
                self._subs_at = journal.copy(self._subs_at)
            except JournalCorrupt:
                self._found_subscriptions()  # they will be made again

    def oldest(self):
        places = {self._subs_at}
        if self.queued():
            places.add(self._cursor)
        for where in self.session.out.values():
            if where > 3 and where & 3 != _REL:
                places.add(where >> 14 << 12)
        places.discard(-1)
        return min(map(self.journal.seq_of, places)) if places else None


gc.collect()  # as in packet
