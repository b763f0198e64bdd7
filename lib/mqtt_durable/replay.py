"""The mounting of the store's journal: what its records and snapshots say is taken up.  Their layout is recall.py's."""

from struct import pack, unpack_from

from micropython import const

# As in recall.
_PUB = const(0x10)
_FACTS = const(0x30)
_SESSION = const(0x33)
_SUBS = const(0x34)
_FORMAT_BYTES = const(26)
_UNSAID = const(63)
_UPTO = const(5)
_ASKED = const(6)
_TOLD = const(7)
# As in session.
_IDS = const(65023)
_REL = const(3)
_DONE = const(1)
_RELEASED = const(2)
_RECEIVED = const(3)
_INDONE = const(4)
_AHEAD = const(1024)


def mount(store):
    """Mount the journal of a store, which is its owner, and take up what is there; what waits in RAM stays there.

    OSError only from the device.
    """
    # These three of the owner's calls only mounting makes.
    store.restore = lambda state: _restore(store, state)
    store.replay = lambda kind, pos: _replay(store, kind, pos)
    store.moved = lambda kind, body: _moved(store, kind, body)
    session = store.session
    store._mounting = True
    try:
        if hasattr(store, "replay_more"):  # store5 has more in its journal
            store.replay_more()
        store.journal.mount(store)
        out = session.out
        for packet_id in list(out):
            _take_to(store, packet_id)
            if not out.get(packet_id, 1):
                del out[packet_id]
    finally:
        store._mounting = False
        store.restore = store.replay = store.moved = None  # deleted, an object of MicroPython keeps hold of them
    store._cut = 0 if store.journal.closed else session.newest
    store._recorded = session.newest
    if store._held:
        _take_up_held(store)
    _look_for_oldest(store)
    store._said = store._upto


def _take_up_held(store):
    """The messages in RAM go into the window again, but for those whose records were found."""
    session = store.session
    held = session.order(store._held)
    if store._unknown:  # a journal without any record: its identifiers begin with theirs
        session.newest = store._taken = store._recorded = (held[-1] - 2) % _IDS + 1
        store._unknown = False
    for packet_id in reversed(held):
        if store.is_live(packet_id):
            store._drop_held(packet_id)
            continue
        if _is_new(session, packet_id):
            _take_to(store, session.newest)  # after damage only is there a queue
            session.newest = store._taken = packet_id
        session.out[packet_id] = 1


def _is_new(session, packet_id):
    """Whether packet_id was given out after the newest known here."""
    return 0 < (packet_id - session.newest) % _IDS < _AHEAD


def _take_to(store, packet_id):
    while store._is_queued(packet_id) and store._take():
        pass


def _look_for_oldest(store):
    session = store.session
    newest = session.newest
    # What is finished may stand in the queue while mounting, and then what is queued in front of it is older.
    most = store.queued()
    for packet_id in session.out:
        most = max(most, (newest - packet_id) % _IDS + 1)
    store._upto = (newest - most - 1) % _IDS + 1


def _restore(store, state):
    """Take up a snapshot; forget all else."""
    store.clear()
    if not state:
        return
    session = store.session
    store._unknown = False
    (
        store.identity,
        flags,
        mark,
        session.newest,
        store._taken,
        store.received,
        store._cursor,
        outs,
        helds,
    ) = unpack_from("<IBqHHHiBH", state)
    store.mark = mark if flags & 1 else None
    store._asked = bool(flags & 2)
    i = _FORMAT_BYTES
    out = session.out
    for _ in range(outs):
        packet_id, where = unpack_from("<HI", state, i)
        out[packet_id] = where
        i += 6
    for _ in range(helds):
        session.held.add(unpack_from("<H", state, i)[0])
        i += 2
    if flags & 4:
        store._found_subscriptions(unpack_from("<I", state, i)[0])
    _look_for_oldest(store)


def _replay(store, kind, pos):
    """Take up one record."""
    if kind & 0xB0 == _PUB:
        buf = store.journal.buf
        session = store.session
        out = session.out
        packet_id = buf[4] | buf[5] << 8
        distance = buf[6] & 63
        before = (packet_id - 2) % _IDS + 1
        last = (packet_id - distance - 2) % _IDS + 1  # all up to this one are finished
        if session.newest == before == store._taken and not (kind & 8 or store._unknown) and len(out) < store._most:
            # The usual case: nothing waits behind the window.
            session.newest = store._taken = packet_id
            out[packet_id] = pos << 2 | kind >> 1 & 3
            if last == store._upto % _IDS + 1 and distance != _UNSAID:
                store._upto = last
                out.pop(last, None)
                return
        else:
            _replay_publish(store, kind, pos, packet_id, before)
        if distance != _UNSAID and last != store._upto:
            _finish(store, last, -1)
    elif kind == _FACTS:
        buf = store.journal.buf
        if buf[4] == _UPTO and buf[2] == 7 and not (buf[3] or store._unknown):
            # The usual case: one entry.
            _finish(store, buf[5] | buf[6] << 8, unpack_from("<i", buf, 7)[0])
        else:
            _replay_facts(store, store.journal.body(pos) or b"")
    elif kind == _SUBS:
        if store.journal.buf[2] or store.journal.buf[3]:
            store._found_subscriptions(pos)
        else:
            store._found_subscriptions()
    elif kind == _SESSION:
        store.identity, store.received = unpack_from("<IH", store.journal.buf, 4)
        store._renew()


def _replay_publish(store, kind, pos, packet_id, before):
    session = store.session
    out = session.out
    newest = session.newest
    if store._unknown:
        newest = session.newest = store._taken = store._upto = before
        store._unknown = False
    if newest == before or _is_new(session, packet_id):
        if newest != before:
            # Those in between never came to the journal; so there was no queue, only the window.
            if store.queued() <= store._most:
                _take_to(store, newest)
            if store._taken == newest:
                store._taken = before
        session.newest = packet_id
        if store._taken != before:
            pass
        elif len(out) < store._most:
            out[packet_id] = pos << 2 | kind >> 1 & 3
            store._taken = packet_id
        else:
            store._cursor = pos
        if kind & 8:
            store.mark = unpack_from("<q", store.journal.buf, 8)[0]
    elif not store._is_queued(packet_id) and out.get(packet_id, 0) & 3 != _REL:
        out[packet_id] = pos << 2 | kind >> 1 & 3
        if (session.newest - packet_id) % _IDS >= (session.newest - store._upto) % _IDS:
            store._upto = before  # given out before the snapshot, recorded after it


def _finish(store, last, pos):
    """All messages up to the identifier last are finished; the next one that is not is at pos or, -1, anywhere."""
    newest = store.session.newest
    out = store.session.out
    age = (newest - last) % _IDS
    n = (newest - store._upto) % _IDS - age
    if n == 1:
        out.pop(last, None)
    elif n > len(out):
        for packet_id in list(out):
            if (newest - packet_id) % _IDS >= age:
                del out[packet_id]
    else:
        while n > 0:
            n -= 1
            out.pop((last - n - 1) % _IDS + 1, None)
    if n >= 0:
        store._upto = last
    if age < (newest - store._taken) % _IDS:
        store._taken = last
        if pos >= 0:
            store._cursor = pos


def _replay_facts(store, entries):
    session = store.session
    out = session.out
    sizes = b"\0\3\3\5\3\7\3\3\x09"  # type u8, packet identifier u16; RECEIVED: and the count of messages received
    i = 0
    while i + 3 <= len(entries):
        record = entries[i]
        if not 0 < record < len(sizes) or i + sizes[record] > len(entries):
            return
        packet_id = entries[i + 1] | entries[i + 2] << 8
        if record == _DONE:
            if store._is_queued(packet_id):
                out[packet_id] = 0
                if len(out) > 2 * store._most:
                    _take_to(store, packet_id)
            else:
                out.pop(packet_id, None)
        elif record == _RELEASED:
            if (session.newest - packet_id) % _IDS < (session.newest - store._upto) % _IDS:
                out[packet_id] = _REL
        elif record == _RECEIVED:
            session.held.add(packet_id)
            store.received = entries[i + 3] | entries[i + 4] << 8
        elif record == _INDONE:
            session.held.discard(packet_id)
        elif record == _UPTO:
            if not store._unknown:
                _finish(store, packet_id, unpack_from("<i", entries, i + 3)[0])
        elif record == _ASKED:
            store._asked = True
        elif record == _TOLD:
            store._asked = False
            if packet_id:
                store._found_subscriptions()
        else:  # DROPPED
            _take_to(store, packet_id)
            last = entries[i + 3] | entries[i + 4] << 8
            if store._is_queued(last):
                store._taken = last
                store._cursor = unpack_from("<i", entries, i + 5)[0]
        i += sizes[record]


def _moved(store, kind, body):
    """The newest record has to go to another sector: see journal.py."""
    if kind == _SUBS:
        store._found_subscriptions()
    if kind & 0xB0 != _PUB:
        return body
    packet_id = body[0] | body[1] << 8
    session = store.session
    if packet_id == session.newest and store._is_queued(packet_id):
        session.newest = (packet_id - 2) % _IDS + 1
    elif session.out.get(packet_id, 0) & 3 != _REL:
        session.out.pop(packet_id, None)
    ref = body[2] >> 6 | body[3] << 2
    if not ref:
        return body
    topic = store._topic(store.journal.head << 12 | ref << 2)
    if topic is None:
        return None
    at = 4 + (kind & 8)
    head = bytearray(body[:at])
    head[2] &= _UNSAID
    head[3] = 0
    return bytes(head) + pack("<H", len(topic)) + topic + bytes(body[at:])
