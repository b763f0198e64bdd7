"""The client's half of an MQTT session: packet identifiers and the state of every QoS 1 and 2 message.

Events in, actions out; knows no socket, clock or flash.  Where a message is stored is a number the caller hands in and
gets back.  Nothing here survives power loss by itself: the store records what must.
MQTT 3.1.1 sections 2.3.1, 4.3, 4.4 and 4.6.
"""

from micropython import const

from .errors import JournalFull, ProtocolError

# Packet types, as in packet.
_PUBLISH = const(3)
_PUBACK = const(4)
_PUBREC = const(5)
_PUBREL = const(6)
_PUBCOMP = const(7)

# States of a message.  Outbound, ours to finish:
_PUB1 = const(1)  # QoS 1 PUBLISH, waits for PUBACK
_PUB2 = const(2)  # QoS 2 PUBLISH, waits for PUBREC
_REL = const(3)  # PUBREL, waits for PUBCOMP
# Inbound QoS 2:
_HELD = const(4)  # the handler has had it, waits for PUBREL

# What must be recorded, before the answer goes out (DONE: whenever convenient, losing it only repeats a message).
_DONE = const(1)
_RELEASED = const(2)
_RECEIVED = const(3)
_INDONE = const(4)

# state << 4 | packet: next state << 8 | record << 4 | answer.  State 0: no such message.
TRANSITIONS = {
    _PUB1 << 4 | _PUBACK: _DONE << 4,
    _PUB2 << 4 | _PUBREC: _REL << 8 | _RELEASED << 4 | _PUBREL,
    _REL << 4 | _PUBREC: _REL << 8 | _PUBREL,
    _REL << 4 | _PUBCOMP: _DONE << 4,
    _PUBREC: _PUBREL,  # unknown here: let the broker finish it
    _HELD << 4 | _PUBLISH: _HELD << 8 | _PUBREC,  # the packet identifier alone tells a duplicate
    _HELD << 4 | _PUBREL: _INDONE << 4 | _PUBCOMP,
    _PUBREL: _PUBCOMP,
    # Late answers to what is long forgotten: counted, never acted upon.
    _PUBACK: 0,
    _PUBCOMP: 0,
    _PUB1 << 4 | _PUBCOMP: _PUB1 << 8,
    _PUB2 << 4 | _PUBCOMP: _PUB2 << 8,
}

_IDS = const(65023)  # packet identifiers of messages: 1 to this, one after the other; those above are for requests
_REQUESTS = const(512)
_AHEAD = const(1024)  # identifiers always free ahead of the newest, so that old and new are never mistaken
_MOST_INBOUND = const(256)  # unfinished messages a broker may have with us


class Session:
    """in_flight: most PUBLISHes that wait for their end at a time, 1-64 (MQTT 5: the broker may lower .limit)."""

    def __init__(self, in_flight):
        self.limit = in_flight
        self.clear()

    def clear(self):
        """Forget everything, as on a device that has never been used."""
        self.newest = _IDS  # packet identifier given out last; the first is 1
        self.out = {}  # packet identifier -> where << 2 | state, of messages in the window
        self.held = set()  # inbound QoS 2: packet identifiers, until PUBREL
        self.busy = set()  # inbound: delivered, the handler has not returned
        self._unasked = set()  # of these, what the broker has not sent on this connection: no answer is due
        self.requests = set()  # identifiers of SUBSCRIBE and UNSUBSCRIBE under way: the same space
        self.clean = False  # the session ends with the connection
        self.released = set()  # in a clean session: messages that had their PUBREC on this connection
        self.epoch = 0  # which session at the broker; handlers finish in the one they began in
        self.unknown = 0  # acknowledgements of nothing

    def new_id(self):
        """Return the next packet identifier [MQTT-2.3.1-1, -2]; the caller then makes it .newest.

        Raises JournalFull when an unacknowledged message is nearly a whole round of identifiers old.
        """
        packet_id = self.newest % _IDS + 1
        if not packet_id & 511:
            for old in self.out:
                if 0 < (old - packet_id) % _IDS < _AHEAD:
                    raise JournalFull("no free packet identifier: message %d was never acknowledged" % old)
        return packet_id

    def request_id(self):
        """Return a free packet identifier for a SUBSCRIBE or UNSUBSCRIBE, which stays taken while in .requests; 0 if
        512 are under way."""
        packet_id = _IDS + 1
        while packet_id in self.requests:
            packet_id += 1
        if packet_id > _IDS + _REQUESTS:
            return 0
        self.requests.add(packet_id)
        return packet_id

    def order(self, packet_ids=()):
        """The identifiers in the window, or these, newest first: the reverse of the order of their PUBLISHes
        [MQTT-4.6.0-1].  What is newer than .newest comes last."""
        return sorted(packet_ids or self.out, key=lambda packet_id: (self.newest - packet_id) % _IDS)

    def acknowledged(self, packet, packet_id):
        """A PUBACK, PUBREC, PUBCOMP or PUBREL came: return record << 4 | answer.

        Raises ProtocolError if the packet is none that this message can get.
        """
        if packet == _PUBREL:
            state = _HELD if packet_id in self.held else 0
        else:
            where = self.out.get(packet_id, 0)
            state = where & 3
        rule = TRANSITIONS.get(state << 4 | packet)
        if self.clean and state == _PUB2:
            # Another rule, for the broker forgets with the link what it has not yet passed on.
            if packet == _PUBREC:
                self.released.add(packet_id)
                rule = _PUB2 << 8 | _PUBREL
            elif packet == _PUBCOMP and packet_id in self.released:
                rule = _DONE << 4
        if rule is None:
            raise ProtocolError("packet type %d for message %d in state %d" % (packet, packet_id, state))
        if packet == _PUBREL:
            if state:
                self.held.discard(packet_id)
        elif rule >> 4 & 15 == _DONE:
            del self.out[packet_id]
            self.released.discard(packet_id)
        elif rule >> 8 == _REL:
            self.out[packet_id] = where & ~3 | _REL
        if not rule & 255 or not state:
            self.unknown += 1
        return rule & 255

    def is_too_much(self, packet_id):
        """Whether a PUBLISH with this identifier would be one unfinished message more than the 256 we keep in mind."""
        busy = self.busy
        held = self.held
        return len(busy) + len(held) >= _MOST_INBOUND and packet_id not in busy and packet_id not in held

    def incoming(self, qos, packet_id):
        """A QoS 1 or 2 PUBLISH came: return 0 to deliver it, else it is a duplicate to be answered with that packet
        (-1: not now, the handler still has it).  Raises ProtocolError beyond 256 unfinished messages."""
        if packet_id in self.busy:
            self._unasked.discard(packet_id)
            return -1
        if qos == 2 and packet_id in self.held:
            return TRANSITIONS[_HELD << 4 | _PUBLISH] & 15
        if self.is_too_much(packet_id):
            raise ProtocolError("more than %d unfinished messages" % _MOST_INBOUND)
        self.busy.add(packet_id)
        return 0

    def handled(self, qos, packet_id, epoch):
        """The handler has returned: return record << 4 | answer, 0 if that session is over."""
        if epoch != self.epoch:
            return 0
        self.busy.discard(packet_id)
        # The broker will send it again.  An answer to both would be one too many, perhaps to a message not yet sent.
        due = packet_id not in self._unasked
        self._unasked.discard(packet_id)
        if qos == 1:
            return _PUBACK if due else 0
        self.held.add(packet_id)
        return _RECEIVED << 4 | (_PUBREC if due else 0)

    def disconnected(self):
        """The connection is over, and with it what was to be answered on it."""
        self._unasked = set(self.busy)
        self.released.clear()

    def renew(self):
        """The broker has no session (any more): what is not yet its own is to be sent as new, the rest is over.

        Return the messages that were its own: they are finished.
        """
        out = self.out
        gone = [packet_id for packet_id in out if out[packet_id] & 3 == _REL]
        for packet_id in gone:
            del out[packet_id]
        self.held.clear()
        self.busy.clear()
        self._unasked.clear()
        self.epoch += 1
        return gone
