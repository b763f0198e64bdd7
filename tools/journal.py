"""Look into a journal: what is in each sector, what is still to be sent, whether all of it reads back.

    journal.py dump FILE              every sector from the oldest to the newest, every record in words, a summary
    journal.py check FILE             exit 0 if all that counts reads back; else 1, with a line for each problem
    journal.py plot FILE -o OUT.svg   a picture: the ring, and each sector with its records
    journal.py pull FILE --port PORT  save the journal of a board to FILE

FILE is the journal's sectors one after the other, as in a partition or pulled by this tool, or a file of norsim.py,
whose counters then tell the wear.  dump, check and plot take --port PORT in place of FILE and read the board at once.
The client on the board must not run meanwhile: it is ended in order, and the board's program started again afterwards.
Exit 2: wrong usage, nothing to read, or no journal there.

A reader of its own, written from lib/FORMAT.md: it shares no code with lib/, so each is a check of the other.
"""

import argparse
import base64
import struct
import sys
from binascii import crc32
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))

SECTOR = 4096
PAGE = 256
VERSION = 3
VERSIONS = [VERSION << 4 | log2 for log2 in (2, 4, 8)]  # in headers: with the unit
IDS = 65023  # packet identifiers of messages are 1 to this
AHEAD = 1024  # an identifier is newer than another if it is at most this much ahead
NOWHERE = 0xFFFFFFFF
ENDURANCE = 100000  # erases that a sector of NOR flash is good for

PUB, FACTS, SESSION, SUBS, ASSIGNED = 0x10, 0x30, 0x33, 0x34, 0x35
EITHER, PROPERTIES = 0xB0, 0x40  # of a kind: what is PUB in both kinds of PUB; set in that of MQTT 5
TAIL, SNAP, CLOSE, OPEN = 0x60, 0x61, 0xF0, 0xF1
NAMES = {FACTS: "FACTS", SESSION: "SESSION", SUBS: "SUBS", TAIL: "TAIL", SNAP: "SNAP", CLOSE: "CLOSE", OPEN: "OPEN"}
NAMES[ASSIGNED] = "ASSIGNED"
PROPERTY = {1: "payload format", 3: "content type", 8: "response topic", 9: "correlation data", 38: "user property"}
WALL = 1 << 30  # a time of this or more is since 1970
ENTRIES = {1: "DONE", 2: "RELEASED", 3: "RECEIVED", 4: "INDONE", 5: "UPTO", 6: "ASKED", 7: "TOLD", 8: "DROPPED"}
ENTRY_BYTES = {1: 3, 2: 3, 3: 5, 4: 3, 5: 7, 6: 3, 7: 3, 8: 9}
RELEASED = 3
SNAPSHOT = "<IIHIBqHHHIBH"
SNAPSHOT_BYTES = 36

# What a stretch of a sector is good for, each with its character in picture() and its words.
USES = {
    "message": ("#", "message that waits"),
    "topic": ("t", "finished message whose topic others refer to"),
    "subscriptions": ("s", "subscriptions"),
    "snapshot": ("@", "snapshot that counts"),
    "fact": ("+", "facts behind the snapshot"),
    "past": (":", "over: finished, superseded, in a dead sector"),
    "torn": ("?", "torn: power failed"),
    "damaged": ("!", "damaged"),
    "noise": ("~", "blank or torn, encryption hides which"),
    "zeros": ("0", "zeros: torn, and put right by a mount"),
    "header": ("h", "header"),
    "blank": (".", "blank"),
}
HINTS = {
    "torn": "power failed; the next mount puts it right",
    "zeros": "torn once, put right by a mount",
    "noise": "blank or torn; the encryption does not let see which",
}
ROLES = {
    "head": "the head: new records go here",
    "live": "holds what counts",
    "dead": "dead: may be erased",
    "replaced": "void: packed anew into the head",
    "ahead": "erased ahead of need",
    "unfinished": "begun and not finished: does not count",
    "foreign": "of another journal: holds nothing",
    "disowned": "header done away with: holds nothing",
    "free": "a pinned block not used yet",
    "none": "no header: holds nothing",
}


class NoJournal(Exception):
    """There is nothing to read; the argument says why."""


class Slice:
    """A stretch of a sector: its header, a record, or bytes that are none.

    name: of the kind of record, or "header", "torn", "damaged", "noise", "zeros", "blank".  use: a key of USES.
    body: None for what is no record.  words: what a record says.  fate: what has become of it.
    """

    def __init__(self, sector, off, size, name, kind=None, arg=0, body=None):
        self.sector = sector
        self.off = off
        self.size = size
        self.name = name
        self.kind = kind
        self.arg = arg
        self.body = body
        self.use = name if body is None else "past"
        self.words = ""
        self.fate = ""

    def read_pub(self):
        """Take the fields of a PUB out of its body.  packet_id 0, which no message has: the body cannot be."""
        self.packet_id = self.at = 0
        self.distance = 63
        self.mark = self.topic = self.properties = None
        self.payload = self.body
        try:
            packet_id, reference = struct.unpack_from("<HH", self.body)
            begin = 4
            if self.kind & 8:
                self.mark = struct.unpack_from("<q", self.body, begin)[0]
                begin += 8
            if not reference >> 6:
                size = struct.unpack_from("<H", self.body, begin)[0]
                begin += 2 + size
                self.topic = self.body[begin - size : begin].decode("utf-8", "replace")
            if self.kind & PROPERTIES:
                self.properties, begin = properties(self.body, begin)
        except (struct.error, IndexError):
            return
        if begin <= len(self.body) and packet_id <= IDS:
            self.packet_id = packet_id
            self.distance = reference & 63
            self.at = reference >> 6 << 2
            self.payload = self.body[begin:]

    @property
    def pos(self):
        return self.sector.place << 12 | self.off

    @property
    def where(self):
        return "sector %d, 0x%03x" % (self.sector.place, self.off)


class Sector:
    """place: 0 and up.  seq, journal_id, unit: None, 0, 0 without a valid header.  role: a key of ROLES.

    sums: None, or of a sealed sector the low half of the CRC of each page when it was blank.
    """

    def __init__(self, place, data):
        self.place = place
        self.data = data
        self.seq = None
        self.journal_id = self.unit = 0
        self.sums = None
        self.role = "none"
        self.slices = []
        self._read_header()
        if self.seq is not None:
            self._scan()
        else:
            end = len(data.rstrip(b"\xff"))
            if end:
                self.slices.append(Slice(self, 0, end, "nothing", None, 0, b""))
            if end < SECTOR:
                self.slices.append(Slice(self, end, SECTOR - end, "blank"))

    @property
    def records(self):
        return [s for s in self.slices if s.kind is not None]

    @property
    def used(self):
        """Bytes up to the end of the last thing that is not blank."""
        return max((s.off + s.size for s in self.slices if s.name != "blank"), default=0)

    def record_at(self, off):
        for s in self.slices:
            if s.off == off and s.kind is not None:
                return s
        return None

    def _read_header(self):
        data = self.data
        magic, version, seal, seq, journal_id, crc = struct.unpack("<2sBBIII", data[:16])
        if magic == b"mj" and crc == crc32(data[:12]):
            self.role = "free"
        if magic != b"MJ":
            return
        if not (version or seal or seq or crc):
            self.role = "disowned"
            return
        size = 48 if seal == 0xFE else 16
        good = crc == crc32(data[:12] + data[16:size])
        if not good or seal not in (0xFF, 0xFE) or version not in VERSIONS or not 0 < seq < 0x3FFFFFFF:
            return
        self.seq = seq
        self.journal_id = journal_id
        self.unit = 1 << (version & 15)
        self._begin = -(-size // self.unit) * self.unit
        if seal == 0xFE:
            self.sums = struct.unpack("<16H", data[16:48])

    def _scan(self):
        """Cut the sector into slices."""
        header = Slice(self, 0, self._begin, "header")
        sealed = ", sealed" if self.sums else ""
        text = "version %d, unit %d%s, seq %d, journal %08X"
        header.words = text % (VERSION, self.unit, sealed, self.seq, self.journal_id)
        self.slices = [header]
        seed = crc32(struct.pack("<II", self.seq, self.journal_id)) & 0x3FFFFFFF
        gap = off = self._begin
        while off < SECTOR:
            record = self._record(off, seed)
            if record is None:
                off += self.unit
                continue
            self._gap(gap, off, True)
            self.slices.append(record)
            gap = off = off + record.size
        self._gap(gap, SECTOR, False)

    def _record(self, off, seed):
        data = self.data
        kind, check, arg = struct.unpack_from("<BBH", data, off) if off + 8 <= SECTOR else (0, 0, 0)
        if kind in (0, 0xFF) or check != kind ^ arg & 255 ^ arg >> 8 ^ 0xA5:
            return None
        size = 4 + (arg if kind < 0x80 else 0)
        if off + size + 4 > SECTOR:
            return None
        crc = struct.unpack_from("<I", data, off + size)[0]
        if crc != crc32(data[off : off + size], seed):
            return None
        whole = -(-(size + 4) // self.unit) * self.unit
        name = "PUB" if kind & EITHER == PUB else NAMES.get(kind, "0x%02x" % kind)
        record = Slice(self, off, whole, name, kind, arg, data[off + 4 : off + size])
        if name == "PUB":
            record.read_pub()
        return record

    def _is_blank(self, off):
        if self.sums is None:
            return self.data[off : off + self.unit] == b"\xff" * self.unit
        page = off // PAGE
        return crc32(self.data[page * PAGE : (page + 1) * PAGE]) & 0xFFFF == self.sums[page]

    def _gap(self, begin, end, before_record):
        """Slices for what is between records: blank, zeros, or something that no longer says anything."""
        junk = "noise" if self.sums else "damaged" if before_record else "torn"
        names = []
        for off in range(begin, end, self.unit):
            zeros = not any(self.data[off : off + self.unit])
            names.append("blank" if self._is_blank(off) else "zeros" if zeros and not self.sums else junk)
        if junk in names:  # one run, whatever is in the middle of it
            first = names.index(junk)
            last = len(names) - names[::-1].index(junk)
            if not self.sums:
                names[first:last] = [junk] * (last - first)
        off = begin
        for i, name in enumerate(names):
            if i + 1 == len(names) or names[i + 1] != name:
                after = begin + (i + 1) * self.unit
                self.slices.append(Slice(self, off, after - off, name))
                off = after


class Journal:
    """What the sectors in data say, by FORMAT.md.

    data: bytes, a multiple of 4096, or a norsim file.  erases: how often each sector was erased, if that is known.
    Raises NoJournal, ValueError if data is no whole number of sectors.

    sectors: all, by place.  members: those of the journal that count, the oldest first.  messages: packet identifier ->
    [state, Slice of its PUB or None].  problems, notes: lines of text.
    """

    def __init__(self, data, erases=None):
        data = bytes(data)
        self.erases = erases
        if len(data) % SECTOR:
            data, self.erases = _split_norsim(data)
        self.sectors = [Sector(n, data[n * SECTOR : (n + 1) * SECTOR]) for n in range(len(data) // SECTOR)]
        self.problems = []
        self.notes = []
        self._find_head()
        self._find_members()
        self._replay()
        self._judge()

    # -- sectors

    def _find_head(self):
        named = sorted([s for s in self.sectors if s.seq is not None], key=lambda s: -s.seq)
        if not named:
            raise NoJournal("no journal: none of the %d sectors has a valid header" % len(self.sectors))
        for sector in named:
            names = [s.name for s in sector.slices]
            behind = sector.slices[names.index("TAIL") + 1 :] if "TAIL" in names else ()
            if "damaged" in names or any(s.kind is not None for s in behind):
                self.head = sector
                break
        else:
            raise NoJournal("no journal: %d sectors have a header, none has a record behind its TAIL" % len(named))
        self.journal_id = self.head.journal_id
        self.unit = self.head.unit

    def _find_members(self):
        head = self.head
        self.void_seq = self.void_from = 0
        last = head.records[-1]
        behind = head.slices[head.slices.index(last) + 1 :]
        self.closed = last.kind == CLOSE and all(s.name in ("blank", "noise") for s in behind)
        self.members = []
        for sector in self.sectors:
            if sector.seq is None:
                continue
            if (sector.journal_id, sector.unit) != (self.journal_id, self.unit):
                sector.role = "foreign"
            elif sector.seq > head.seq:
                sector.role = "unfinished" if sector.records or not self.closed else "ahead"
            else:
                self.members.append(sector)
        self.members.sort(key=lambda s: s.seq)
        if self.closed and bool(last.arg & 0x8000) != any(s.role == "ahead" for s in self.sectors):
            self.problems.append("%s: CLOSE and the headers disagree on a sector erased ahead" % last.where)
        oldest = 0
        snaps = [s for s in head.records if s.kind in (TAIL, SNAP) and len(s.body) >= SNAPSHOT_BYTES]
        if snaps:
            oldest, self.void_seq, self.void_from = struct.unpack_from("<IIH", snaps[-1].body)
        for sector in self.members:
            sector.role = "dead" if sector.seq < oldest else "live"
            if sector.seq == self.void_seq and not self.void_from:
                sector.role = "replaced"
        head.role = "head"
        self.members = [s for s in self.members if s.role != "replaced"]

    def _counts(self, record):
        """Whether a record of a member is not void."""
        return record.sector.seq != self.void_seq or record.off < self.void_from

    def _by_place(self, place):
        for sector in self.members:
            if sector.place == place:
                return sector
        return None

    def at(self, pos):
        """The record at a position, None if there is none that counts."""
        sector = self._by_place(pos >> 12)
        record = sector.record_at(pos & 0xFFF) if sector else None
        return record if record and self._counts(record) else None

    # -- what the records say

    def _replay(self):
        self.identity = self.received = 0
        self.mark = None
        self.asked = False
        self.newest = None  # packet identifier given out last; None: nothing is known yet
        self.window = set()  # of the newest snapshot
        self.messages = {}
        self.inbound = set()
        self.subs = None  # the record of all subscriptions
        self.assigned = ""
        self.base = None
        # In the head the newest snapshot is enough; if it has none that reads back, go on from an older TAIL.
        for sector in reversed(self.members):
            snaps = [s for s in sector.records if s.kind == TAIL or s.kind == SNAP and sector is self.head]
            snaps = [s for s in snaps if len(s.body) >= SNAPSHOT_BYTES]
            if snaps:
                self.base = snaps[-1]
                break
        stream = [record for sector in self.members for record in sector.records if self._counts(record)]
        if self.base is None:
            self.problems.append("no snapshot reads back: all begins at the oldest record")
        else:
            if self.base.sector is not self.head:
                text = "sector %d: no snapshot reads back, all begins at the one in sector %d"
                self.problems.append(text % (self.head.place, self.base.sector.place))
            stream = stream[stream.index(self.base) :]
        self.counted = stream
        for record in stream:
            try:
                self._take(record)
            except (struct.error, IndexError, UnicodeDecodeError):
                self.problems.append("%s: %s with a body that cannot be" % (record.where, record.name))

    def _take(self, record):
        kind, body = record.kind, record.body
        if kind in (TAIL, SNAP):
            if record is self.base or self.base is None or record.sector is not self.base.sector:
                self._take_snapshot(record)
        elif kind & EITHER == PUB:
            self._take_publish(record)
        elif kind == FACTS:
            for entry, packet_id, more in entries(body):
                self._take_entry(entry, packet_id, more)
        elif kind == SUBS:
            self.subs = record if subscriptions(body) else None
        elif kind == ASSIGNED:
            self.assigned = body.decode()
        elif kind == SESSION:
            self.identity, self.received = struct.unpack_from("<IH", body)
            self.messages = {p: m for p, m in self.messages.items() if m[0] != RELEASED}
            self.inbound.clear()
            self.subs = None
            self.asked = False

    def _take_snapshot(self, record):
        state = snapshot(record.body)
        self.identity = state["identity"]
        self.mark = state["mark"]
        self.asked = state["asked"]
        self.assigned = state["assigned"]
        self.newest = state["newest"]
        self.received = state["received"]
        self.inbound = set(state["inbound"])
        pos = state["subscriptions"]
        self.subs = None if pos is None else self.at(pos)
        if pos is not None and (self.subs is None or self.subs.kind != SUBS):
            self.subs = None
            text = "%s: the subscriptions are at 0x%x, but no SUBS reads back there"
            self.problems.append(text % (record.where, pos))
        self.messages = {}
        over = set()
        for packet_id, pos, how in state["window"]:
            if how:
                self.messages[packet_id] = [how, None if how == RELEASED else self.at(pos)]
            else:
                over.add(packet_id)
        self.window = set(self.messages)
        waiting = ahead(state["newest"], state["taken"])
        if not waiting:
            return
        # What waits behind the window: from the cursor on, in order.
        cursor = state["cursor"]
        begin = self._by_place(cursor >> 12) if cursor is not None else None
        if begin is None:
            text = "%s: %d messages wait behind the window, but no sector has the cursor's place"
            self.problems.append(text % (record.where, waiting))
            begin, cursor = self.members[0], 0
        for packet_id in [back(state["newest"], waiting - 1 - n) for n in range(waiting)]:
            if packet_id not in over and packet_id not in self.messages:
                self.messages[packet_id] = [0, None]
        for sector in self.members[self.members.index(begin) :]:
            for pub in sector.records:
                if pub is record:
                    return
                before = sector is begin and pub.off < cursor & 0xFFF
                if pub.kind & EITHER != PUB or before or not self._counts(pub):
                    continue
                found = self.messages.get(pub.packet_id)
                if found and pub.packet_id not in self.window and found[1] is None:
                    found[:] = [pub.kind >> 1 & 3, pub]

    def _take_publish(self, record):
        packet_id = record.packet_id
        if not packet_id:
            raise struct.error
        if self.newest is None:
            self.newest = back(packet_id, 1)
        qos = record.kind >> 1 & 3
        if 0 < ahead(packet_id, self.newest) < AHEAD:
            self.newest = packet_id
            self.messages[packet_id] = [qos, record]
            if record.mark is not None:
                self.mark = record.mark
        elif self.messages.get(packet_id, [0])[0] != RELEASED:
            self.messages[packet_id] = [qos, record]  # a copy: the newest counts
        if record.distance != 63:
            self._finish(back(packet_id, record.distance + 1))

    def _take_entry(self, entry, packet_id, more):
        if entry == 1:
            self.messages.pop(packet_id, None)
        elif entry == 2:
            self.messages[packet_id] = [RELEASED, None]
        elif entry == 3:
            self.inbound.add(packet_id)
            self.received = more[0]
        elif entry == 4:
            self.inbound.discard(packet_id)
        elif entry == 5 and self.newest is not None:
            self._finish(packet_id)
        elif entry == 6:
            self.asked = True
        elif entry == 7:
            self.asked = False
            if packet_id:
                self.subs = None
        elif entry == 8 and self.newest is not None:
            count = ahead(more[0], packet_id)
            for gone in [p for p in self.messages if 0 < ahead(p, packet_id) <= count]:
                del self.messages[gone]

    def _finish(self, last):
        """All messages up to the identifier last are finished."""
        age = ahead(self.newest, last)
        for packet_id in [p for p in self.messages if ahead(self.newest, p) >= age]:
            del self.messages[packet_id]

    def order(self):
        """The packet identifiers of all that waits, oldest first."""
        return sorted(self.messages, key=lambda p: -ahead(self.newest, p))

    # -- what has become of each record, and what is wrong

    def topic(self, record):
        """(topic name, Slice of the PUB that has it) of a PUB; (None, None) if it does not read back."""
        if record.at:
            record = record.sector.record_at(record.at)
        if record is None or record.kind & EITHER != PUB or record.topic is None:
            return None, None
        return record.topic, record

    def _judge(self):
        for sector in self.sectors:
            for record in sector.records:
                try:
                    record.words = self._words(record)
                except (struct.error, IndexError, UnicodeDecodeError):
                    record.words = "a body that cannot be"
                record.fate = "over"
                if sector not in self.members or not self._counts(record):
                    record.fate = "does not count"
        for record in self.counted:
            record.fate = ""
            if record.kind in (TAIL, SNAP):
                record.use = "snapshot" if record is self.base else "past"
                record.fate = "all is known from here" if record is self.base else "over"
            elif record.name in ("FACTS", "SESSION", "ASSIGNED", "OPEN", "CLOSE"):
                record.use = "fact"
        self._judge_messages()
        if self.subs:
            self.subs.use = "subscriptions"
            self.subs.fate = "counts"
        self._judge_sectors()

    @property
    def subscriptions(self):
        """Topic filter -> (requested QoS, granted QoS)."""
        return subscriptions(self.subs.body) if self.subs else {}

    def _judge_messages(self):
        for sector in self.members:
            for pub in sector.records:
                if pub.name == "PUB" and pub.fate != "does not count":
                    state = self.messages.get(pub.packet_id)
                    pub.fate = "released" if state and state[0] == RELEASED else "superseded" if state else "finished"
        for packet_id in self.order():
            state, pub = self.messages[packet_id]
            if state == RELEASED:
                continue
            if pub is None or pub.kind & EITHER != PUB or pub.packet_id != packet_id:
                self.problems.append("message %d waits, but its record does not read back" % packet_id)
                continue
            if pub.kind >> 1 & 3 != state:
                self.problems.append("%s: message %d has another QoS in the snapshot" % (pub.where, packet_id))
            topic, owner = self.topic(pub)
            if owner is None:
                self.problems.append("%s: the topic of message %d does not read back" % (pub.where, packet_id))
            elif owner.use == "past":
                owner.use = "topic"
            pub.use = "message"
            pub.fate = "waits"
            if pub.sector.role == "dead":
                self.problems.append("%s: message %d waits in a dead sector" % (pub.where, packet_id))
        for sector in self.members:
            for record in sector.records:
                if record.use == "topic":
                    record.fate += ", topic in use"

    def _judge_sectors(self):
        base = self.counted[0].sector.seq if self.counted else 0
        for sector in self.members:
            for s in sector.slices:
                if s.name == "torn" and sector is not self.head:
                    s.name = s.use = "damaged"
                if s.name == "torn":
                    self.notes.append("%s: %d torn bytes, which the next mount puts right" % (s.where, s.size))
                if s.name == "damaged" and self._is_old_copy(s):
                    s.name = s.use = "torn"
                    self.notes.append("%s: %d bytes of a record that stands behind them once more" % (s.where, s.size))
                if s.name != "damaged":
                    continue
                text = "%s: %d damaged bytes" % (s.where, s.size)
                behind = sector.seq > base or (sector.seq == base and self.base and s.off > self.base.off)
                if behind:
                    self.problems.append(text + ", and no snapshot behind them: what they said is not known")
                else:
                    self.notes.append(text + ("" if self.problems else ", which nothing needs"))
        seqs = [s.seq for s in self.members if s.role != "dead"]
        first = self.oldest
        missing = [n for n in range(first, self.head.seq) if n not in seqs]
        replaced = [s.seq for s in self.sectors if s.role == "replaced"]
        missing = [n for n in missing if n not in replaced]
        if missing and self.base is not None:
            self.notes.append("no sector with seq %s" % ", ".join(map(str, missing)))
        last = self.head.records[-1]
        if self.closed:
            at = self.head.record_at((last.arg & 0x7FFF) * 4)
            if at is None or at is not self.base:
                self.problems.append("%s: CLOSE does not point at the newest snapshot" % last.where)

    def _is_old_copy(self, s):
        """Whether a stretch of the head is what a mount was about to program to zeros: the last record's old place.

        Then its bits are some of those of the record.
        """
        last = self.head.records[-1]
        data = self.head.data
        if s.sector is not self.head or s.off > last.off:
            return False
        record = data[last.off : last.off + last.size]
        for off in range(max(0, s.off + s.size - last.size), s.off + 1, self.unit):
            if all(old & new == old for old, new in zip(data[off : off + last.size], record)):
                return True
        return False

    @property
    def oldest(self):
        """The lowest seq that holds anything live, by the newest snapshot."""
        if self.base is None:
            return self.members[0].seq
        return struct.unpack_from("<I", self.base.body)[0]

    # -- in words

    def _words(self, r):
        body = r.body
        if r.name == "PUB":
            if not r.packet_id:
                return "a body that cannot be"
            out = ["id %d, QoS %d" % (r.packet_id, r.kind >> 1 & 3)]
            if r.kind & 1:
                out.append("retain")
            if r.mark is not None:
                out.append("mark %d" % r.mark)
            out.append("distance %s" % ("-" if r.distance == 63 else r.distance))
            topic, owner = self.topic(r)
            if topic is None:
                out.append("topic at 0x%03x, which does not read back" % r.at)
            else:
                out.append("topic %s%s" % (topic, "" if owner is r else " (at 0x%03x)" % owner.off))
            out += r.properties or ()
            return ", ".join(out) + ", " + brief(r.payload)
        if r.kind == FACTS:
            return "; ".join([entry_words(*e) for e in entries(body)])
        if r.kind == SUBS:
            words = [subscription_words(f, *how) for f, how in subscriptions(body).items()]
            return "; ".join(words) or "none"
        if r.kind == ASSIGNED:
            return body.decode()
        if r.kind == SESSION:
            return "identity %08X, received %d" % struct.unpack_from("<IH", body)
        if r.kind in (TAIL, SNAP):
            return snapshot_words(body)
        if r.kind == CLOSE:
            ahead_of_need = ", a sector is erased ahead" if r.arg & 0x8000 else ""
            return "the snapshot is at 0x%03x%s" % ((r.arg & 0x7FFF) * 4, ahead_of_need)
        return "" if r.kind == OPEN else brief(body)

    def wear(self, sector):
        """(erases, whether that was counted) of a sector: else about its lap."""
        if self.erases:
            return self.erases[sector.place], True
        return self.lap(sector), False

    def lap(self, sector):
        """How often the ring had come to a sector when it got its seq; 0 without one."""
        return (sector.seq - 1) // len(self.sectors) + 1 if sector.seq else 0

    def messages_per_sector(self):
        """How many new messages a sector takes, from the sectors that are full; 0 if none is."""
        full = [s for s in self.members if s is not self.head]
        counts = []
        for sector in full:
            names = [s.name for s in sector.records]
            behind = sector.records[names.index("TAIL") + 1 :] if "TAIL" in names else sector.records
            counts.append(len([s for s in behind if s.name == "PUB"]))
        return sum(counts) / len(counts) if counts else 0


def _split_norsim(data):
    """(cells, erases) of a norsim file; ValueError if it is none."""
    at = data.rfind(b"NORSIM1\n")
    if at < 0 or at % SECTOR or len(data) < at + 72 + at // SECTOR * 4:
        raise ValueError("%d bytes are no whole number of sectors of %d bytes" % (len(data), SECTOR))
    size, _, erase_size = struct.unpack_from("<III", data, at + 8)
    if size != at or erase_size != SECTOR:
        raise ValueError("a norsim file of %d bytes with sectors of %d" % (size, erase_size))
    return data[:at], list(struct.unpack_from("<%dI" % (at // SECTOR), data, at + 72))


def ahead(packet_id, other):
    return (packet_id - other) % IDS


def back(packet_id, n):
    return (packet_id - n - 1) % IDS + 1


def entries(body):
    """[(type, packet identifier, the rest)] of a FACTS body; struct.error if it cannot be."""
    out = []
    at = 0
    while at + 3 <= len(body):
        entry = body[at]
        size = ENTRY_BYTES.get(entry)
        if size is None:
            raise struct.error("entry of type %d" % entry)
        packet_id = struct.unpack_from("<H", body, at + 1)[0]
        more = struct.unpack_from({3: "", 5: "<H", 7: "<I", 9: "<HI"}[size], body, at + 3)
        out.append((entry, packet_id, more))
        at += size
    return out


def entry_words(entry, packet_id, more):
    text = ENTRIES[entry]
    if entry == 6:
        return text
    if entry == 7:
        return text + (", perhaps of another session" if packet_id else "")
    text += " %d" % packet_id
    if entry == 3:
        text += " (%d received)" % more
    elif entry == 5:
        text += ", the next is at %s" % position(more[0])
    elif entry == 8:
        text += " to %d, go on at %s" % (more[0], position(more[1]))
    return text


def position(pos):
    return "-" if pos == NOWHERE else "%d:%03x" % (pos >> 12, pos & 0xFFF)


def snapshot(body):
    """The fields of a TAIL or SNAP as a dict; struct.error if it is too short."""
    fields = struct.unpack_from(SNAPSHOT, body)
    oldest, void_seq, void_from, identity, flags, mark, newest, taken, received, cursor, outs, held = fields
    at = SNAPSHOT_BYTES
    window = []
    for _ in range(outs):
        packet_id, where = struct.unpack_from("<HI", body, at)
        window.append((packet_id, where >> 2, where & 3))
        at += 6
    inbound = struct.unpack_from("<%dH" % held, body, at)
    at += 2 * held
    subscribed = times = None
    assigned = ""
    if flags & 4:
        subscribed = struct.unpack_from("<I", body, at)[0]
        at += 4
    if flags & 8:
        times = struct.unpack_from("<II", body, at)
        at += 8
    if flags & 16:
        assigned = struct.unpack_from("%ds" % body[at], body, at + 1)[0].decode()
    return {
        "oldest": oldest,
        "void_seq": void_seq,
        "void_from": void_from,
        "identity": identity,
        "mark": mark if flags & 1 else None,
        "asked": bool(flags & 2),
        "newest": newest,
        "taken": taken,
        "received": received,
        "cursor": None if cursor == NOWHERE else cursor,
        "window": window,
        "inbound": inbound,
        "subscriptions": subscribed,
        "times": times,
        "assigned": assigned,
    }


def properties(body, at):
    """([what each property says], offset behind them) of the properties of a PUB; struct.error if they cannot be."""
    size = struct.unpack_from("<H", body, at)[0]
    at += 2
    out = []
    if size & 1:
        stamp, interval = struct.unpack_from("<II", body, at)
        out.append("expires after %d s, stamp %d%s" % (interval, stamp, "" if stamp >= WALL else " of being powered"))
        at += 8
    stop = at + (size >> 1)
    end = at
    while end < stop:
        name = PROPERTY.get(body[end])
        if name is None:
            raise struct.error("property %d" % body[end])
        if body[end] == 1:
            out.append("%s %d" % (name, body[end + 1]))
            end += 2
            continue
        parts = []
        pair = body[end] == 38
        end += 1
        for _ in range(2 if pair else 1):
            n = struct.unpack_from(">H", body, end)[0]
            parts.append(brief(struct.unpack_from("%ds" % n, body, end + 2)[0]))
            end += 2 + n
        out.append("%s %s" % (name, " = ".join(parts)))
    if end != stop:
        raise struct.error("properties of %d bytes" % (end - at))
    return out, end


def subscriptions(body):
    """Topic filter -> (requested QoS, granted QoS) of a SUBS; struct.error or UnicodeDecodeError if it cannot be."""
    found = {}
    at = 0
    while at < len(body):
        how, size = struct.unpack_from("<BH", body, at)
        found[struct.unpack_from("%ds" % size, body, at + 3)[0].decode()] = how >> 2, how & 3
        at += 3 + size
    return found


def subscription_words(topic_filter, asked, granted):
    """asked: the QoS and, of MQTT 5, the other subscription options."""
    options = ((4, ", no local"), (8, ", retain as published"), (16, ", retained ones if new"), (32, ", none retained"))
    more = "".join([words for bit, words in options if asked & bit])
    return "%s, QoS %d%s asked, %d granted" % (topic_filter, asked & 3, more, granted)


def snapshot_words(body):
    s = snapshot(body)
    out = ["oldest %d" % s["oldest"]]
    if s["void_seq"]:
        out.append("seq %d is void%s" % (s["void_seq"], " from 0x%03x" % s["void_from"] if s["void_from"] else ""))
    out.append("identity %08X" % s["identity"])
    if s["mark"] is not None:
        out.append("mark %d" % s["mark"])
    if s["asked"]:
        out.append("a CONNECT is out")
    out.append("newest %d, taken %d, received %d" % (s["newest"], s["taken"], s["received"]))
    if s["cursor"] is not None:
        out.append("cursor %s" % position(s["cursor"]))
    states = ("finished", "QoS 1 at %s", "QoS 2 at %s", "released")
    window = []
    for packet_id, pos, how in s["window"]:
        text = states[how]
        window.append("%d %s" % (packet_id, text % position(pos) if "%" in text else text))
    out.append("window " + (", ".join(window) if window else "empty"))
    if s["inbound"]:
        out.append("inbound " + " ".join(map(str, s["inbound"])))
    if s["subscriptions"] is not None:
        out.append("subscriptions at " + position(s["subscriptions"]))
    if s["times"]:
        out.append("powered %d s, wall time %s" % (s["times"][0], s["times"][1] if s["times"][1] >= WALL else "-"))
    if s["assigned"]:
        out.append("client identifier assigned: " + s["assigned"])
    return "; ".join(out)


def brief(data, most=32):
    """Bytes as quoted text if they are that, else in hex; shortened, and then with their number."""
    try:
        text = data.decode()
        shown = '"%s"' % text if len(text) <= most else '"%s..."' % text[:most]
        long = len(text) > most
        if not text.isprintable():
            raise ValueError
    except ValueError:
        long = len(data) > most // 2
        shown = data[: most // 2].hex(" ") + (" ..." if long else "")
    return shown + (" (%d bytes)" % len(data) if long else "")


def plural(n, word):
    return "%d %s%s" % (n, word, "" if n == 1 else "s")


# -- the commands


def dump(journal, per_day=None):
    """Return the text of dump."""
    head = journal.head
    text = "journal %08X: format version %d, %d sectors of %d bytes, unit %d"
    out = [text % (journal.journal_id, VERSION, len(journal.sectors), SECTOR, journal.unit)]
    rest = [s for s in journal.sectors if s not in journal.members]
    rest.sort(key=lambda s: (s.seq is None, s.seq))
    for sector in journal.members + rest:
        line = "\nsector %d" % sector.place
        if sector.seq is not None:
            line += "  seq %d  " % sector.seq
            age = head.seq - sector.seq
            if sector.role in ("head", "live", "dead", "replaced"):
                line += "age %d, lap %d  " % (age, journal.lap(sector))
            line += "unit %d  %d bytes used, %d free" % (sector.unit, sector.used, SECTOR - sector.used)
        if journal.erases:
            line += "  erased %d times" % journal.erases[sector.place]
        out.append(line + "  (%s)" % ROLES[sector.role])
        if sector.seq is None:
            continue
        for s in sector.slices:
            words = s.words if s.kind is not None or s.use == "header" else plural(s.size, "byte")
            fate = HINTS.get(s.name, "") if s.kind is None else s.fate
            fate = "   <- " + fate if fate else ""
            out.append("  %03x  %-8s %s%s" % (s.off, s.name, words, fate))
    return "\n".join(out + [""] + summary(journal, per_day))


def summary(journal, per_day=None):
    """The lines at the end of a dump."""
    waiting = journal.order()
    released = [p for p in waiting if journal.messages[p][0] == RELEASED]
    inside = [p for p in waiting if p in journal.window]
    size = sum([m[1].size for m in journal.messages.values() if m[1] is not None])
    line = "messages waiting     %d" % len(waiting)
    if waiting:
        text = ", %d to %d: %d in the window of the newest snapshot, %d behind it; %d only wait for PUBCOMP; %d bytes"
        line += text % (
            waiting[0],
            waiting[-1],
            len(inside),
            len(waiting) - len(inside),
            len(released),
            size,
        )
    mark = "none" if journal.mark is None else str(journal.mark)
    out = [
        line,
        "newest identifier    %s" % journal.newest,
        "mark                 " + mark,
        "identity             " + ("%08X" % journal.identity if journal.identity else "none: no session known"),
    ]
    if journal.asked:
        out[-1] += "; a CONNECT went out, its CONNACK is not recorded"
    inbound = sorted(journal.inbound)
    out.append(
        "inbound QoS 2        %d unfinished%s, %d received (modulo 65536)"
        % (len(inbound), ": " + " ".join(map(str, inbound)) if inbound else "", journal.received)
    )
    subs = journal.subscriptions
    if journal.assigned:
        out.append("client identifier    %s, assigned by the broker" % journal.assigned)
    out.append("subscriptions        %s" % (len(subs) or "none"))
    out += [" " * 21 + subscription_words(f, *subs[f]) for f in sorted(subs)]
    ended = "closed in order" if journal.closed else "not closed: the next mount takes it for a power cut"
    out.append("last end             " + ended)
    out += ["wear                 " + wear_words(journal, per_day)]
    out += ["problem              " + line for line in journal.problems]
    out += ["note                 " + line for line in journal.notes]
    return out


def wear_words(journal, per_day=None):
    if journal.erases:
        most = max(journal.erases)
        text = "%d to %d erases per sector, as counted" % (min(journal.erases), most)
    else:
        most = journal.head.seq / len(journal.sectors)
        text = "about %.1f erases per sector (seq %d, %d sectors)" % (most, journal.head.seq, len(journal.sectors))
    if per_day:
        each = journal.messages_per_sector()
        if not each:
            return text + "; no sector is full yet, so nothing can be said of the years left"
        a_day = per_day / each / len(journal.sectors)
        years = max(0, ENDURANCE - most) / a_day / 365.25
        text += "; at %g messages a day and %.1f per sector %.3g erases a day: " % (per_day, each, a_day)
        text += "%s years left of %d erases" % ("%.0f" % years if years < 1000 else "more than 1000", ENDURANCE)
    return text


def picture(data, erases=None):
    """The sectors in characters, by place: a line for each, a character for 64 bytes.  Never raises for bad data."""
    step = 64
    try:
        journal = Journal(data, erases)
        sectors = journal.sectors
        problems = ["problem: " + line for line in journal.problems]
    except NoJournal as e:
        data = bytes(data)
        sectors = [Sector(n, data[n * SECTOR : (n + 1) * SECTOR]) for n in range(len(data) // SECTOR)]
        problems = [str(e)]
    rank = {use: n for n, use in enumerate(("damaged", "torn", *USES))}
    seen = set()
    out = []
    for sector in sectors:
        line = ""
        for off in range(0, SECTOR, step):
            here = [s for s in sector.slices if s.off < off + step and s.off + s.size > off]
            use = min([s.use for s in here], key=lambda use: rank.get(use, 99))
            seen.add(use)
            line += USES[use][0]
        seq = "-" if sector.seq is None else str(sector.seq)
        wear = "  %d erases" % erases[sector.place] if erases else ""
        out.append("sector %-3d seq %-6s |%s| %s%s" % (sector.place, seq, line, sector.role, wear))
    out += ["    %s %s" % USES[use] for use in USES if use in seen]
    return "\n".join(out + problems)


# -- from a board

# Runs on the board.  Opens only what is there: a home that is missing is not made.  (Opening one may put in order what
# a power cut left of its files, as every start does.)
PULL = """\
import json, os
from binascii import b2a_base64
from mqtt_durable.flash import open_home, resolve
def pull():
    try:
        with open("config.json") as f:
            config = json.load(f).get("journal") or {}
    except OSError:
        print("!", "the board has no config.json")
        return
    try:
        home = resolve(config.get("home", "auto"))
        kind, _, name = home.partition(":")
        if kind == "ram":
            print("!", "journal.home is ram: nothing is stored")
            return
        if kind == "pinned":
            name = name or "/mqj"
        if kind in ("pinned", "file"):
            try:
                os.stat(name)
            except OSError:
                print("!", "%s: there is no journal yet" % name)
                return
        device, unit, size = open_home(home, config.get("size_kib", 64) * 1024)
    except Exception as e:
        print("!", type(e).__name__, e)
        return
    buf = bytearray(512)
    print("=", home, size)
    for n in range(size // 4096):
        for off in range(0, 4096, 512):
            device.readblocks(n, buf, off)
            print("+", str(b2a_base64(buf), "ascii").strip())
    print(".")
pull()
"""


class Pulled:
    """What PULL prints on a board, taken in as it comes.  progress: called with (bytes so far, bytes in all)."""

    def __init__(self, progress=None):
        self._progress = progress
        self._rest = b""
        self._home = None
        self._size = 0
        self._data = bytearray()
        self._refusal = None
        self._other = []
        self._ended = False

    def feed(self, data):
        self._rest += data
        if b"\n" in data:
            *lines, self._rest = self._rest.split(b"\n")
            for line in lines:
                self._take(line.decode(errors="replace").strip())

    def _take(self, line):
        what, _, rest = line.partition(" ")
        try:
            if what == "=":
                self._home, _, rest = rest.rpartition(" ")
                self._size = int(rest)
            elif what == "+" and self._home:
                self._data += base64.b64decode(rest, validate=True)
                if self._progress:
                    self._progress(len(self._data), self._size)
            elif what == "!":
                self._refusal = rest
            elif what == "." and self._home:
                self._ended = True
            elif line:
                self._other.append(line)
        except ValueError:
            self._other.append(line)

    def end(self):
        """Return (home, data).  Raises NoJournal unless all of it has come."""
        if self._refusal:
            raise NoJournal("the board says: " + self._refusal)
        if not self._ended or len(self._data) != self._size:
            why = "; ".join(self._other[-3:]) or "%d of %d bytes came" % (len(self._data), self._size)
            raise NoJournal("nothing could be pulled: " + why)
        return self._home, bytes(self._data)


def from_board(port):
    """Return the journal of the board at port, which is started again afterwards.  Raises NoJournal."""
    from board import Board, NoBoard  # only here: a file is looked into without pyserial, too

    tty = sys.stderr.isatty()

    def progress(done, size):
        if tty:
            print("\r%d of %d KiB " % (done // 1024, size // 1024), end="", file=sys.stderr, flush=True)

    pulled = Pulled(progress)
    try:
        with Board(port) as board:
            port = board.port
            print("%s: stopping the program and reading its journal" % port, file=sys.stderr)
            board.stop()
            try:
                board.run(PULL, pulled.feed)
                home, data = pulled.end()
            finally:
                board.start()
    except NoBoard as e:
        hint = " (is mqtt_durable on the board? make deploy)" if "ImportError" in str(e) else ""
        raise NoJournal("nothing could be pulled: %s%s" % (e, hint))
    text = "%s%d bytes from %s; the board's program starts again"
    print(text % ("\r" if tty else "", len(data), home), file=sys.stderr)
    return data


# -- the command line


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="dump | check | plot | pull")
    for name, what in (
        ("dump", "every sector, every record, a summary"),
        ("check", "whether all that counts reads back"),
        ("plot", "a picture as SVG"),
        ("pull", "save the journal of a board to FILE"),
    ):
        command = commands.add_parser(name, help=what, description=what)
        command.add_argument("file", nargs=None if name == "pull" else "?", metavar="FILE")
        command.add_argument("--port", required=name == "pull", help="serial port of a board, auto: the only one")
        if name in ("dump", "plot"):
            command.add_argument("--per-day", type=float, metavar="N", help="messages a day: tells the years left")
        if name == "plot":
            command.add_argument("-o", "--out", metavar="OUT.svg", help="where to (FILE with .svg)")
    return parser


def main(argv=None):
    parser = arguments()
    args = parser.parse_args(argv)
    if args.command != "pull" and bool(args.file) == bool(args.port):
        parser.error("%s: name a FILE or a --port, one of them" % args.command)
    name = args.port if args.port else args.file
    try:
        data = from_board(args.port) if args.port else Path(args.file).read_bytes()
        if args.command == "pull":
            Path(args.file).write_bytes(data)
            print("%s: %d bytes" % (args.file, len(data)))
            return 0
        journal = Journal(data)
    except OSError as e:
        print("%s: %s" % (e.filename or name, e.strerror or e), file=sys.stderr)
        return 2
    except (NoJournal, ValueError) as e:
        print("%s: %s" % (name, e), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("%s: stopped" % name, file=sys.stderr)
        return 2
    if args.command == "dump":
        print(dump(journal, args.per_day))
    elif args.command == "check":
        for line in journal.problems:
            print("%s: %s" % (name, line))
        for line in journal.notes:
            print("%s: note: %s" % (name, line))
        waits = plural(len(journal.messages), "message")
        if journal.problems:
            print("%s: %s" % (name, plural(len(journal.problems), "problem")))
            return 1
        print("%s: as it should be: %s waiting, all of it reads back" % (name, waits))
    else:
        from journal_plot import svg

        out = Path(args.out) if args.out else Path(args.file or "journal").with_suffix(".svg")
        try:
            out.write_text(svg(journal, Path(name).name, args.per_day), encoding="utf-8")
        except OSError as e:
            print("%s: %s" % (out, e.strerror), file=sys.stderr)
            return 2
        print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
