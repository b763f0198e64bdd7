"""The asyncio front end: connection, reconnection, keep-alive, dispatch to the program's handlers.

One task reads, one writes, one keeps the connection up, one runs the program's coroutines.  A change of task costs as
much as all else, so what can be done at once is: publish() and the reader write to the socket themselves while the
writer has nothing to do and the socket takes it, and the reader calls a plain handler.  What must survive power loss is
the store's, and is recorded before publish() returns; or, where the configuration has a grace, within that by a task of
its own, unless the broker was quicker.
"""

import asyncio
import errno
import time
from asyncio import Event
from collections import deque
from random import getrandbits

from micropython import const

from .errors import (
    ConnectRefused,
    JournalFull,
    MessageDropped,
    MQTTError,
    ProtocolError,
    SubscribeRefused,
)
from .once import once
from .packet import (
    DISCONNECT_BYTES,
    PINGREQ_BYTES,
    check_filter,
    check_topic,
    encode_connect,
    encode_publish,
    encode_subscribe,
    encode_unsubscribe,
    matches,
    utf8,
)
from .store import Store
from .transport import dial

# As packet.py and log.py have them: here they cost nothing.
_CONNACK = const(2)
_PUBLISH = const(3)
_SUBACK = const(9)
_UNSUBACK = const(11)
_PINGRESP = const(13)
_ERROR = const(1)
_WARNING = const(2)
_INFO = const(3)
_DEBUG = const(4)

_SEND_BYTES = const(768)  # one write: what the Pico W's lwIP takes without waiting
_INBOX = const(16)  # messages received that wait for their handler
_INBOX_BYTES = const(8192)  # their payloads, not counting the last one taken
_OUTBOX = const(8)  # QoS 0 messages that wait for the writer
_BURST = const(512)  # bytes that publish() sends before it lets the other tasks run
_LARGEST_HEAD = const(14)  # of a PUBLISH, not counting its topic name; in MQTT 5 without properties
_PULSE_MS = const(1000)
_ENDURANCE = const(100000)  # erases of a sector
_TELLING_MS = const(3600000)  # before that the rate of erases says nothing


class Message:
    """A message received.

    .topic (str), .payload (bytes), .qos, .retain, .dup.  .token: at QoS 2 a number, else None.  If power fails after
    the handler took effect but before that was recorded, or close() cuts the handler short, the same message comes
    again with the same token.  .path, .size, .error: see Client.on_file().
    """

    path = size = error = token = None
    _sink = None  # the files.Sink that has its payload
    _coroutine = None  # what its handler has returned

    def __init__(self, decoder, epoch):
        # An attribute more would cost a larger table, and the time to build it.
        self.topic = decoder.topic
        payload = decoder.payload
        # None, and no sink: too large, only to be acknowledged in its turn.
        self.payload = None if payload is None else bytes(payload)
        self._flags = decoder.flags
        self._id = epoch << 16 | decoder.packet_id

    def __getattr__(self, name):
        # In place of properties: where a class has one, MicroPython searches it at each store of an attribute.
        if name == "qos":
            return self._flags >> 1 & 3
        if name == "retain":
            return self._flags & 1 != 0
        if name == "dup":
            return self._flags & 8 != 0
        raise AttributeError(name)


class Client:
    """An MQTT client whose QoS 1 and 2 messages survive power loss.

    Client(config, device=None, link=None, will=None, prog_size=4, backoff_ms=(1000, 60000), answer_ms=10000,
        limit_bytes=4096, properties=None, authenticate=None)

    config: a dict as config.load() returns; with config["broker"]["version"] 5 this makes a client5.Client5, which
    speaks MQTT 5 and has more than is said here, else MQTT 3.1.1 is spoken. device: a block device for the journal
    in place of config["journal"]["home"]. prog_size: its program size in bytes. link: what brings the network up
    before each connection, `await link.up()`; OSError there counts as a failed attempt. If it has link.address(),
    the connection ends when what that returns changes. will: (topic, payload, qos, retain).
    backoff_ms: first and longest pause between attempts; each pause is drawn from its upper half.
    answer_ms: the broker must answer CONNECT and PINGREQ within this.
    limit_bytes: the largest packet received whole; a larger message is acknowledged, counted and not delivered.
    properties, authenticate: of MQTT 5, see client5.py.

    .mark: the newest mark whose message was accepted by publish(), None if there is none; survives power loss.
    .idle: True when nothing is going on: connected, the broker has all that is stored, no message is being handled.
    .log: the last events, see log.py; `print(client.log)`.  Its levels are config["log"]'s, if there is that.

    The journal is mounted here, so .mark is known at once.  Raises JournalUnavailable, ValueError, OSError (flash),
    ConfigError (a certificate's file).
    """

    _version = 4  # the protocol level of MQTT 3.1.1
    _goodbye = DISCONNECT_BYTES
    _on_other = None  # takes what is neither PUBLISH nor an answer to a request, in place of store.on_ack()

    _made = False
    _Message = Message
    _Store = Store

    def __new__(cls, config, *arguments, **more):
        if cls is Client and config["broker"].get("version") == 5:
            from .client5 import Client5

            return Client5(config, *arguments, **more)
        return object.__new__(cls)

    def __init__(self, config, *arguments, **more):
        if not self._made:  # CPython does it again for a Client5
            self._made = True
            once("opening", "make", self, config, *arguments, **more)
            self.messages = _Messages(self)

    def __getattr__(self, name):
        # In place of properties, as in Message.
        if name == "mark":
            return self.store.mark
        if name == "idle":
            store = self.store
            busy = store.waiting() or store.answers or self._inbox or self._handling or self._outbox
            return self.connected and not busy
        raise AttributeError(name)

    # -- what MQTT 5 does in another way

    def _connect_packet(self, clean):
        broker = self._broker
        return encode_connect(
            self.client_id, clean, broker["keep_alive_s"], broker["username"], broker["password"], self._will
        )

    async def _answer(self):
        """Return the type of the packet that answers CONNECT."""
        while True:
            kind = self._decoder.next()
            if kind:
                return kind
            await self._receive()

    def _on_connack(self, clean):
        decoder = self._decoder
        if decoder.return_code:
            raise ConnectRefused(decoder.return_code, once("reasons", "refused", decoder.return_code))
        if clean and decoder.session_present:  # [MQTT-3.2.2-1]; it would take new identifiers for old ones
            raise ProtocolError("session present after a clean CONNECT")

    def _encode_request(self, request, topic_filter):
        """Return the SUBSCRIBE or UNSUBSCRIBE."""
        if request.options is None:
            return encode_unsubscribe(request.packet_id, topic_filter)
        return encode_subscribe(request.packet_id, topic_filter, request.options)

    def _undelivered(self, packet_id, result):
        """Return the error for a message that has not reached the broker."""
        return MessageDropped("message %d" % packet_id)

    def _refused(self, topic_filter, code):
        """Return the error for a subscription that the broker has not granted."""
        return SubscribeRefused(topic_filter)

    # -- life

    async def start(self):
        """Begin to connect, and to stay connected.  Returns the client at once; publish() works from here on, connected
        or not."""
        if self._run_task is None:
            self._leaving = False
            self._stepped = time.ticks_ms()
            broker = self._broker
            self.log.add(_INFO, "started as %s, broker %s:%d" % (self.client_id, broker["host"], broker["port"]))
            self._dispatch_task = asyncio.create_task(self._dispatch())
            self._run_task = asyncio.create_task(self._run())
        return self

    async def __aenter__(self):
        await self.start()  # not an alias of it: a derived class may have its own
        return self

    async def __aexit__(self, *_):
        await self.close()

    async def close(self):
        """End in order: what is pending is recorded, DISCONNECT is sent if there is a connection, the journal closed.

        Unacknowledged messages stay stored.  A handler that is running is cancelled, unless it is the caller; its
        message, like those that wait for theirs, is not acknowledged and comes again.  A loop over .messages in
        another task ends.  Takes 4 s at most.  The client can be started again.
        """
        if self._run_task is None:
            return
        self._leaving = True
        self.messages.changed.set()
        self._down.set()
        self._wake.set()
        try:
            # With limits: a handler may refuse to be cancelled, and a Ctrl-C that strikes a task of MicroPython's loop
            # leaves it neither alive nor done.
            if asyncio.current_task() is not self._dispatch_task:
                await _within(1000, _end((self._dispatch_task,), False))
            await _within(3000, self._run_task)  # or it is cancelled
        finally:
            self._run_task = None
            for message in self._inbox:
                if message._coroutine is not None:
                    message._coroutine.close()
            self._inbox = deque((), _INBOX)
            self._inbox_bytes = 0
            self._handling = None
            self.store.session.busy.clear()
            if self._files:
                self._files.clear()
            try:
                self.store.close()
            except (MQTTError, OSError) as e:
                self.last_error = e  # all that was promised is stored already, but for messages in their grace
                self.log.add(_ERROR, "journal", e)
            self.log.add(_INFO, "closed")

    # -- the program's calls

    def publish(self, topic, payload, qos=1, retain=False, mark=None, properties=None):
        """Publish a message; at QoS 1 or 2 it survives power loss from the moment this returns.

        With journal.durability "grace" a QoS 1 message without a mark that is sent at once survives power loss only
        when the broker has it, or after journal.grace_ms.
        topic: str or bytes.  payload: str or bytes-like.  mark: an integer of 64 bits stored with the message, see
        .mark.  Returns the packet identifier, to be given to acknowledged(); None at QoS 0, which is sent at most
        once, never stored, and discarded while there is no connection.  properties: of MQTT 5.
        Raises ValueError for a bad argument or a message too large for the journal; JournalFull as configured.
        OSError: the flash failed, and only .mark tells whether the message was stored before it did; the journal is
        mounted anew, with JournalUnavailable for messages until then.
        """
        # A small coroutine where nothing has to be waited for: publish() as one would take more heap than all else.
        try:
            if type(payload) is not bytes:
                payload = as_bytes(payload)
            if qos == 1 or qos == 2:
                packet_id = self._publish(topic, payload, qos, retain, mark, properties)
                if not packet_id:
                    return self._publish_later(topic, payload, qos, retain, mark, properties)
            elif qos == 0:
                if mark is not None:
                    raise ValueError("mark: needs QoS 1 or 2")
                topic = check_topic(topic)
                packet_id = None
                if not self._send_now(0x31 if retain else 0x30, topic, 0, payload):
                    return self._publish_0_later(topic, payload, retain)
            else:
                raise ValueError("qos: found %r, expected 0, 1 or 2" % (qos,))
            if self._burst >= _BURST:
                return self._give_way(packet_id)
        except JournalFull as e:
            # A program that tries again at once must not keep the broker from making room.
            return self._give_way(None, e)
        except Exception as e:
            return given(None, e)
        return given(packet_id) if packet_id else _SENT

    async def _give_way(self, packet_id, error=None):
        self._burst = 0
        await asyncio.sleep_ms(0)  # a program that only publishes must not keep the others from their turn
        if error is not None:
            raise error
        return packet_id

    async def _publish_later(self, *message):
        packet_id = 0
        while not packet_id:
            await self._progressed()
            packet_id = self._publish(*message)
        return packet_id

    async def _publish_0_later(self, topic, payload, retain):
        while self.connected and len(self._outbox) >= _OUTBOX:
            self._sent.clear()
            await self._sent.wait()
        if self.connected:
            self._outbox.append(encode_publish(topic, payload, retain))
            self._wake.set()
        else:
            self.discarded += 1
        await self._give_way(None)

    def _publish(self, topic, payload, qos, retain, mark, properties):
        """Store a message, send it if that can be done at once; return its packet identifier, 0: there is no room."""
        store = self.store
        if self._stream is None and not store.journal.usable:
            once("opening", "remount", self)
        try:
            if properties is None:
                packet_id = store.publish(topic, payload, qos, retain, mark)
            elif self._version != 5:
                raise ValueError("properties: only with version 5")
            else:
                packet_id = store.publish(topic, payload, qos, retain, mark, properties)
        except JournalFull as e:
            self.log.add(_INFO if self._waits else _WARNING, "publish", e)
            if self._waits:
                return 0
            raise
        except Exception as e:
            if isinstance(e, OSError) or not store.journal.usable:
                self._journal_failed(e)
            raise
        if self._grace_ms:
            # Either this one waits in RAM now, or none does any more.
            if store.unsettled():
                self._young.append((packet_id, time.ticks_ms()))
                store.finished = self._on_finished
                self._aging.set()
            else:
                self._young.clear()
        if not self._send_now(0x30 | qos << 1 | (1 if retain else 0), topic, packet_id, payload):
            self._wake.set()
        return packet_id

    def _send_now(self, first, topic, packet_id, payload):
        """Send a PUBLISH if the writer has nothing to do, and nothing is to be sent before it.  first: its first byte.
        packet_id: 0 at QoS 0."""
        if self._quick and not self._outbox:
            topic = check_topic(topic)
            n = len(payload)
            if len(topic) + n <= _SEND_BYTES - _LARGEST_HEAD and (not packet_id or self.store.at_once(packet_id)):
                buf = self._send
                off = self._put_head(buf, 0, first, topic, packet_id, n)
                n += off
                buf[off:n] = payload
                self._burst += n
                self._write_now(n)
                return True
        self._burst = _BURST
        return False

    def _write_now(self, n):
        """Write n bytes of the buffer while the writer has nothing to do; it sends what the socket does not take."""
        stream = self._stream
        buf = self._send
        self._last_sent = time.ticks_ms()
        try:
            taken = stream.s.write(buf, 0, n)  # a slice would come from the heap
            if taken == n:
                return
            stream.out_buf = buf[taken or 0 : n]  # the buffer is the writer's now, which sends that first
            self._wake.set()
        except Exception as e:  # without memory for the rest, too, half a packet has gone out
            self._failed(e)
            self._down.set()
        self._quick = False

    def _flush(self):
        """Send what is to be sent, or have the writer do it.  Raises JournalFull, OSError from the device."""
        if self._quick and not self._outbox and not (self._files and self._files.upload):
            store = self.store
            n = store.fill(self._send, 0)
            if n:
                self._write_now(n)
                self._sent.set()
            if not store.unsent():
                return
            self._quick = False  # the rest of a message goes before all else
        self._wake.set()

    def _settle(self):
        """Record all messages that are in their grace.  Raises nothing: what has failed is noted, and they stay."""
        try:
            if self.store.journal.usable:  # else it will be mounted anew
                self.store.settle()
                self._young.clear()
        except JournalFull as e:
            self._failed(e)
        except OSError as e:
            self._journal_failed(e)

    async def acknowledged(self, packet_id):
        """Return when the broker has the message that publish() gave this identifier.

        Raises MessageDropped if it was dropped to make room, or lost because its record no longer reads back.
        """
        if packet_id is None:
            return
        store = self.store
        while not store.journal.usable:  # a flash that failed is to be mounted anew before it is known
            await self._progressed()
        if not store.is_live(packet_id):
            return
        waiter = self._waiters.get(packet_id)
        if waiter is None:
            waiter = self._waiters[packet_id] = Waiter()
            store.finished = self._on_finished
        await waiter.wait()
        if waiter.result is not True:
            raise self._undelivered(packet_id, waiter.result)

    async def drain(self, timeout_s=None):
        """Wait until the broker has every message stored here; return False if that took longer than timeout_s.

        What it does not have then is recorded, also if its grace is not over.
        """
        try:
            if self.store.waiting() or not self.store.journal.usable:
                await asyncio.wait_for(self._until_drained(), timeout_s)
        except asyncio.TimeoutError:
            self._settle()
            return False
        return True

    async def _until_drained(self):
        while self.store.waiting() or not self.store.journal.usable:
            await self._progressed()

    def stalled_ms(self):
        """Return the time since the client's own tasks took a step, connected or not: for a watchdog.

        A step is taken each second while connected, else at each attempt, of which there is one in 2.5 minutes:
        the longest pause, Wi-Fi, look-up and CONNECT without an answer.  To be asked once in 6 days.
        """
        return time.ticks_diff(time.ticks_ms(), self._stepped)

    async def subscribe(self, topic_filter, qos=0):
        """Subscribe, now and after every loss of the session; return the QoS granted, 0-2.

        Waits for the broker's answer.  If it has given that before and still has the session, nothing is sent; if it
        turns out to have lost the session, the subscription is made again by itself.  When cancelled, it will still
        be made.  Raises ValueError, SubscribeRefused.
        """
        text = utf8(check_filter(topic_filter))
        if qos not in (0, 1, 2):
            raise ValueError("qos: found %r, expected 0, 1 or 2" % (qos,))
        return await self._subscribe(text, qos)

    async def _subscribe(self, text, options):
        """options: the QoS; in MQTT 5 the subscription options."""
        self._wanted[text] = options
        granted = self.store.granted(text, options)
        if granted is None:
            granted = await self._request(text, options)
            if granted > 2:
                self._wanted.pop(text, None)
                raise self._refused(text, granted)
        return granted

    async def unsubscribe(self, topic_filter):
        """End a subscription; returns when the broker has confirmed it.  Raises ValueError, JournalFull, OSError."""
        text = utf8(check_filter(topic_filter))
        self.store.unsubscribing(text)
        self._wanted.pop(text, None)
        await self._request(text, None)

    def on(self, topic_filter, handler):
        """Have handler(message), plain or async, called for every message whose topic matches; the first match wins.

        PUBACK or PUBREC goes out when it has returned.  If it raises, that is printed and counted, not repeated.
        The same filter again replaces its handler.  Set all handlers before the first await: a message that comes
        when there are some, none that matches and no loop over .messages is acknowledged and counted as discarded.
        """
        text = utf8(check_filter(topic_filter))
        for i, known in enumerate(self._handlers):
            if known[0] == text:
                self._handlers[i] = text, handler
                break
        else:
            self._handlers.append((text, handler))
        self._arrived.set()

    def on_file(self, topic_filter, path, handler, limit_bytes):
        """As on(), but the payload of a message goes into the file path, as it comes, and need not fit the heap.

        message.payload is None, message.size its bytes.  message.path: path, which holds the whole payload and is the
        handler's until it has returned; the next message for path then takes its place.  One such message at most waits
        for its turn, in path + ".part"; for the third there is no room, as for one in RAM when 16 wait: at QoS 1 and 2
        the broker keeps it, at QoS 0 it is discarded and counted.  message.error: None, or the OSError of the file;
        message.path is None then.  The handler decides what to do: as always the message is acknowledged when it has
        returned.  limit_bytes: a larger payload is acknowledged, counted in too_large and not delivered.
        Raises ValueError.
        """
        from .files import Sink

        self.on(topic_filter, Sink(self._with_files(), path, handler, limit_bytes))

    async def publish_file(self, topic, path, qos=1, retain=False):
        """Publish what is in the file path, which need not fit the heap or the journal, and must not change meanwhile.

        At QoS 1 it returns True when the broker has acknowledged, however long there is no connection: the file is the
        store.  After a reset the program has to call this again, and the broker may get it twice.  At QoS 0 it returns
        True when the file has been sent, False if there is no connection, or it is lost.  One file is sent at a time;
        it is sent in one piece, and other packets wait until it is out.  If this is cancelled in the middle of that,
        the connection is made anew.
        Raises ValueError for a bad argument, QoS 2 or a file of 256 MiB; OSError if the file cannot be read or shrinks;
        JournalFull if 512 subscriptions wait for the broker.
        """
        return await self._with_files().publish(topic, path, qos, retain)

    def _with_files(self):
        if self._files is None:
            from .files import Files

            self._files = Files(self)
        return self._files

    def stats(self):
        """Counters since the start of the program, and what is stored now: a flat dict of numbers and one text.

        journal_home: the text.  journal_lost: how often another hand took the journal's home away; what waited there is
        counted in lost.  unsettled: messages that are in RAM only until their grace is over; spared: how many the
        broker had before that, which cost the flash nothing and do not count as stored.  journal_sectors_used: of
        journal_sectors, from the oldest that holds anything still wanted to the newest.  journal_erases: over the
        journal's life.  journal_years_left: at the present rate, until the flash has had the 100,000 erases that it is
        made for; None in the first hour and before the first of them.
        """
        store = self.store
        journal = store.journal
        oldest = store.oldest()
        years_left = None
        up_ms = self.log.uptime_ms()
        if journal.erases and up_ms >= _TELLING_MS and self.journal_home[:3] != "ram":
            # Blocks of a file system take turns.
            blocks = self._device.sharing() if hasattr(self._device, "sharing") else journal.sectors
            erases = max(0, _ENDURANCE * blocks - journal.seq)
            years_left = round(erases / journal.erases * up_ms / 31557600000, 1)  # ms of a year
        return {
            "stored": store.stored,
            "sent": store.sent,
            "resent": store.resent,
            "acknowledged": store.acknowledged,
            "waiting": store.waiting(),
            "unsettled": store.unsettled(),
            "spared": store.spared,
            "dropped": store.dropped,
            "lost": store.lost,
            "discarded": self.discarded,
            "received": self.received,
            "duplicates": store.duplicates,
            "too_large": self.too_large,
            "passed_over": self.passed_over,
            "handler_errors": self.handler_errors,
            "connections": self.connections,
            "protocol_errors": self.protocol_errors,
            "unknown_acks": store.session.unknown,
            "journal_home": self.journal_home,
            "journal_lost": self.journal_lost,
            "journal_sectors": journal.sectors,
            "journal_sectors_used": 1 if oldest is None else min(journal.sectors, journal.seq - oldest + 1),
            "journal_erases": journal.seq,
            "journal_years_left": years_left,
            "journal_damaged": journal.damaged,
        }

    # -- connection

    def _keep_alive(self, keep_alive_s):
        self._keep_alive_ms = keep_alive_s * 1000
        # A PINGREQ is due after 3/4 of the keep-alive, and a pulse later it has gone out.
        self._pulse_ms = min(_PULSE_MS, self._keep_alive_ms // 8 or _PULSE_MS)

    async def _run(self):
        while not self._leaving:
            self._stepped = time.ticks_ms()
            self._down.clear()
            try:
                await self._connection()
            except Exception as e:
                self._failed(e)
            if self._leaving:
                return
            self._down.clear()
            await _within(self._pause_ms(), self._down.wait())

    def _pause_ms(self):
        """The pause before the next attempt: doubled each time up to the longest, drawn from its upper half."""
        first_ms, longest_ms = self._backoff_ms
        limit_ms = min(longest_ms, first_ms << min(self._attempt, 16))
        self._attempt += 1
        half_ms = limit_ms >> 1
        pause_ms = half_ms + (getrandbits(16) * (limit_ms - half_ms) >> 16)
        self.log.add(_DEBUG, "next attempt in %d ms" % pause_ms)
        return pause_ms

    def _failed(self, error):
        """Note what ended a connection."""
        # A MemoryError, or our own fault, is no reason to give up.
        fault = not isinstance(error, (MQTTError, OSError, asyncio.TimeoutError))
        if isinstance(error, ProtocolError):
            self.protocol_errors += 1
        if fault or not self._leaving:
            level = _ERROR if fault or isinstance(error, (ConnectRefused, ProtocolError)) else _WARNING
            self.log.add(level, "connection lost" if self.connected else "no connection", error, fault)
        if not self._leaving:
            self.last_error = error
        if getattr(error, "lasting", False):
            self._attempt = 16  # only a person can mend that: at once to the longest pause

    def _journal_failed(self, error):
        """The flash failed in a program's call: the connection ends, so that the journal can be mounted anew."""
        self._failed(error)
        if self.connected:
            self._down.set()

    def _sweep(self):
        """End the waiting for messages that are no longer there: their records do not read back."""
        for packet_id in list(self._waiters):
            if self.store.journal.usable and not self.store.is_live(packet_id):
                self._on_finished(packet_id, False)
        self._progress.set()

    async def _connection(self):
        """One connection, from the network's coming up to the end.  Raises MQTTError, OSError, TimeoutError."""
        store = self.store
        if not store.journal.usable:
            once("opening", "remount", self)
        self._address = self._put_at = None
        if self._link is not None:
            await self._link.up()
            if hasattr(self._link, "address"):
                self._address = self._link.address()
        tasks = ()
        try:
            if store.identity != self._identity and not self._clean:
                # A journal that knows no session with this broker must not meet an old one there: the broker would
                # take new identifiers for old ones and swallow messages.  A clean session ends with its connection.
                await self._open(True)
                store.begin(self._identity)
                self._epoch += 1
                self._stream.write(DISCONNECT_BYTES)
                await asyncio.wait_for_ms(self._stream.drain(), self._answer_ms)
                self._hang_up()
            if not self._clean:
                store.connecting()
            await self._open(self._clean)
            # Once it has said that it has none, what it has the next time is a new one, until we have recorded that.
            self.session_present = present = self._decoder.session_present and not self._renewing
            if not present:
                self._renewing = True
                self._epoch += 1
            store.connected(present, self._identity, self._clean)
            self._renewing = False
            self._passed_over = False
            self._said.clear()
            self.connections += 1
            self._ping_at = None
            self._last_sent = self._last_received = time.ticks_ms()
            self.connected = True
            self.log.add(_INFO, "connected, " + ("session present" if present else "new session"))
            self._renew_requests()
            if self.on_connect:
                try:
                    self.on_connect(present)
                except Exception as e:
                    self._handler_failed(e, "on_connect")
            tasks = [self._read(), self._pulse(), self._write()]
            if self._grace_ms:
                tasks.append(self._age())
            for i, coro in enumerate(tasks):
                tasks[i] = asyncio.create_task(self._guard(coro))
            await self._down.wait()
            if self._leaving:  # the writer says good-bye
                await asyncio.wait_for_ms(self._said.wait(), 2000)
        finally:
            self.connected = self._quick = False
            store.ending()
            try:
                await _end(tasks)
            finally:
                store.disconnected()
                if self._files:
                    self._files.disconnected()
                self._settle()
                for data in self._outbox:
                    if data[0] >> 4 == _PUBLISH:
                        self.discarded += 1
                self._outbox.clear()
                self._sent.set()
                self._hang_up()

    def _hang_up(self):
        """End the connection.  MicroPython's Stream.close() does nothing."""
        stream = self._stream
        if stream is not None:
            stream.s.close()
            stream.sock.close()  # a TLS socket whose handshake has failed leaves it open (modtls_mbedtls.c)
            self._stream = None

    async def _guard(self, coro):
        """Run one of the connection's tasks; its failure ends the connection."""
        try:
            await coro
        except Exception as e:
            self._failed(e)
            self._down.set()
            self._said.set()  # or close() would wait for it

    async def _open(self, clean):
        try:
            await asyncio.wait_for_ms(self._handshake(clean), self._answer_ms)
        except asyncio.TimeoutError:
            raise OSError(errno.ETIMEDOUT, "no CONNACK within %d ms" % self._answer_ms)

    async def _handshake(self, clean):
        """CONNECT and its CONNACK (MQTT 3.1.1 sections 3.1, 3.2), where TLS is on inside its handshake."""
        self._stream = dial(self._addresses.next(), self._tls)
        self._decoder.reset()
        try:
            await self._put(self._connect_packet(clean))
            kind = await self._answer()
        except (OSError, ValueError) as e:
            raise e if self._tls is None else self._tls.explained(e)
        if kind != _CONNACK:
            raise ProtocolError("packet type %d before CONNACK" % kind)
        self._on_connack(clean)
        self._addresses.good()

    async def _receive(self):
        self._flush()
        decoder = self._decoder
        n = _some(await self._stream.readinto(decoder.space()))
        decoder.end += n
        self._last_received = time.ticks_ms()

    async def _put(self, data):
        """Send data in pieces that a Pico W's lwIP takes without waiting, each with a turn for the loop after it."""
        data = memoryview(data)
        for off in range(0, len(data), _SEND_BYTES):
            self._stream.write(data[off : off + _SEND_BYTES])
            await self._drain()
        self._last_sent = time.ticks_ms()

    async def _drain(self):
        self._put_at = time.ticks_ms()
        await self._stream.drain()
        self._put_at = None

    async def _read(self):
        stream = self._stream
        decoder = self._decoder
        store = self.store
        on_ack = self._on_other or store.on_ack
        while True:
            kind = decoder.next()
            if not kind:
                self._flush()
                n = _some(await stream.readinto(decoder.space()))
                decoder.end += n
                self._last_received = time.ticks_ms()
                continue
            while store.answers and not store.can_answer():
                await self._room()
            if kind == _PUBLISH:
                if not self._on_publish():
                    await self._enqueue()
            elif kind == _SUBACK or kind == _UNSUBACK:
                self._on_granted(kind)
            elif kind == _PINGRESP:
                self._ping_at = None
            elif kind == _CONNACK:
                raise ProtocolError("a second CONNACK")
            elif not self._files or not self._files.on_ack(kind, decoder.packet_id):
                on_ack(kind, decoder.packet_id)

    async def _room(self):
        """Return when the writer has sent something."""
        self._sent.clear()
        self._wake.set()
        await self._sent.wait()

    def _on_publish(self):
        """Have a plain handler handle the message that the decoder has; False if that has to wait for its turn.

        Raises ProtocolError, JournalFull, OSError.
        """
        decoder = self._decoder
        qos = decoder.flags >> 1 & 3
        if qos:
            try:
                if not self.store.on_publish(qos, decoder.packet_id):
                    return True
            except ProtocolError:
                # mosquitto 2.0 after a reconnection: it sends all that waits, whatever its window.
                self._pass_over("the broker sends too much at once")
                self.passed_over += 1
                return True
        if self._inbox or self._handling or self._files or self._passed_over or decoder.payload is None:
            return False
        topic = decoder.topic
        handler = None
        for topic_filter, found in self._handlers:
            if topic_filter == topic or matches(topic_filter, topic):
                handler = found
                break
        if handler is None:
            return False
        try:
            message = self._Message(decoder, self._epoch)
        except MemoryError:
            self.store.session.busy.discard(decoder.packet_id)  # it has to come again
            raise
        self._handling = message
        self.received += 1
        if qos == 2:
            message.token = self.store.token(decoder.packet_id)
        try:
            result = handler(message)
            if result is not None and hasattr(result, "send"):  # for the dispatcher to await
                message._coroutine = result
                self._inbox.append(message)
                self._inbox_bytes += len(message.payload)
                self._arrived.set()
                self._handling = None
                return True
        except (Exception, asyncio.CancelledError) as e:
            self._handler_failed(e, "handler of " + topic)
        if qos:
            self._handled(message)
        self._handling = None
        return True

    async def _enqueue(self):
        """Have the message that the decoder has wait for its turn, when the inbox, and its sink, has room for it.

        Without room QoS 0 is discarded at once.  For the others reading stops, and so does the broker.  But a handler
        that itself waits for the broker would then wait for ever: after answer_ms without a step of the dispatcher the
        message is passed over, see _pass_over().
        """
        decoder = self._decoder
        qos = decoder.flags >> 1 & 3
        packet_id = decoder.packet_id
        sink = self._files and self._files.sink()
        if decoder.payload is None and not sink:
            self.too_large += 1
            self.log.add(_WARNING, "too large: " + decoder.topic)
            if not qos:
                return
        taken = False
        try:
            while len(self._inbox) >= _INBOX or self._inbox_bytes >= _INBOX_BYTES or (sink and sink.taken):
                if not qos:
                    self.discarded += 1
                    return
                if self._passed_over:
                    break
                self._accepted.clear()
                self._blocked = True
                self._wake.set()  # what has been answered until now is not to wait for that
                try:
                    await asyncio.wait_for_ms(self._accepted.wait(), self._answer_ms)
                except asyncio.TimeoutError:
                    self._pass_over("the handlers do not get on")
                finally:
                    self._blocked = False
                    self._last_received = time.ticks_ms()
            if qos and self._passed_over:
                self.passed_over += 1
                return
            message = self._Message(decoder, self._epoch)
            if sink:
                await sink.receive(message)
            self._inbox.append(message)
            self._inbox_bytes += len(message.payload or b"")
            self._arrived.set()
            taken = True
        finally:
            if qos and not taken:
                self.store.session.busy.discard(packet_id)  # it has to come again

    def _pass_over(self, why):
        """From here on no message is taken.  The broker has them still, and sends them again, in order, over a new
        connection, which _pulse() makes when those taken are handled and have had their PUBRELs, or none comes."""
        if not self._passed_over:
            self._passed_over = True
            self.log.add(_WARNING, why + ": messages are passed over until the next connection")

    async def _write(self):
        buf = self._send
        store = self.store
        outbox = self._outbox
        turn = False
        while True:
            if self._stream.out_buf:
                await self._drain()
            off = 0
            large = False
            turn = not turn
            if turn and not store.rest:  # every other turn only: neither kind can keep the other waiting for ever
                if self._files and self._files.due:
                    large = True
                    await self._files.upload.send()
                while outbox and off + len(outbox[0]) <= len(buf):
                    data = outbox.pop(0)
                    buf[off : off + len(data)] = data
                    off += len(data)
                if outbox and not off:  # larger than the buffer
                    large = True
                    await self._put(outbox.pop(0))
            off = store.fill(buf, off)
            if off:
                await self._put(buf[:off])
            if off or large:
                self._sent.set()
            elif outbox or (self._files and self._files.due):
                continue
            if self._leaving:
                if not store.rest and not store.answers and not outbox:
                    await self._put(self._goodbye)
                    self._said.set()
                    return
            elif not off and not large:
                self._wake.clear()
                self._quick = True
                await self._wake.wait()
                self._quick = False

    async def _pulse(self):
        """Keep-alive, and what is done when nothing else is: lazy records, erasing ahead."""
        keep_alive_ms = self._keep_alive_ms
        answer_ms = self._answer_ms
        store = self.store
        stored = -1
        suspect = None
        while True:
            await asyncio.sleep_ms(self._pulse_ms)
            self._attempt = 0  # only a connection that holds ends the growing of the pauses
            self._stepped = now = time.ticks_ms()
            self.log.uptime_ms()
            if self._blocked:  # nobody reads, so nothing can be said about the broker; but it is to hear from us
                self._last_received = now
                self._ping_at = None
                if self._put_at is not None:
                    self._put_at = now
            if self._ping_at is not None and PINGREQ_BYTES in self._outbox:
                self._ping_at = now  # it waits behind a large packet
            silent_ms = time.ticks_diff(now, self._last_received)
            fault = None
            if self._address and self._link.address() != self._address:
                fault = "the network's address is gone"
            elif self._put_at is not None and time.ticks_diff(now, self._put_at) > answer_ms:
                fault = "the broker takes nothing"
            elif self._ping_at is not None:
                # PINGRESP comes behind all that the broker has queued for us.
                most_ms = answer_ms if silent_ms > answer_ms else 6 * answer_ms
                if time.ticks_diff(now, self._ping_at) > most_ms:
                    fault = "the broker no longer answers"
            if fault and suspect:
                raise OSError(errno.ETIMEDOUT, fault)
            suspect = fault  # not at once: the loop may have been blocked, with the answer there unread
            if self._ping_at is None and (
                (keep_alive_ms and time.ticks_diff(now, self._last_sent) >= keep_alive_ms * 3 // 4)
                # The broker owes an answer: a link that swallows all is noticed long before the keep-alive is over.
                or (
                    silent_ms > answer_ms
                    and (store.waiting() or self._requests or (self._files and self._files.upload))
                )
            ):
                self._ping_at = now
                self._outbox.insert(0, PINGREQ_BYTES)
                self._wake.set()
            if self._passed_over and not self._inbox and self._handling is None:
                if not store.session.held or silent_ms >= self._pulse_ms:
                    self._down.set()
            self._sweep()
            if stored == store.stored:  # idle
                store.commit()
                store.journal.idle()
            stored = store.stored

    async def _age(self):
        """Record the messages that the broker has not acknowledged within their grace."""
        young = self._young
        while True:
            if not young:
                self._aging.clear()
                await self._aging.wait()
                continue
            left_ms = self._grace_ms - time.ticks_diff(time.ticks_ms(), young[0][1])
            if left_ms <= 0:
                self._settle()
                if not young:
                    continue
                left_ms = self._pulse_ms  # the broker makes room
            await asyncio.sleep_ms(left_ms)

    # -- SUBSCRIBE and UNSUBSCRIBE: sent when connected, and again after every reconnection until answered

    async def _request(self, topic_filter, options):
        """Ask the broker; return the code of its SUBACK, None for an UNSUBACK.  options: None to unsubscribe."""
        request = self._asked(topic_filter)
        if request is None or request.options != options:  # else the last thing asked is this already
            request = self._ask(topic_filter, options)
            if self.connected:
                self._submit(request)
        await request.wait()
        return request.result

    def _asked(self, topic_filter):
        """Return the last request for topic_filter that is not answered, None if there is none."""
        for request in reversed(self._requests):
            if request.filter == topic_filter:
                return request
        return None

    def _ask(self, topic_filter, options):
        request = Waiter()
        request.filter = topic_filter
        request.options = options
        self._requests.append(request)
        return request

    def _submit(self, request):
        packet_id = request.packet_id = self.store.session.request_id()
        if not packet_id:
            return  # when an answer has come
        self._outbox.append(self._encode_request(request, request.filter.encode()))
        self._wake.set()

    def _renew_requests(self):
        """A connection begins: ask for all that the broker has not acknowledged, or has forgotten."""
        self.store.session.requests.clear()
        if self._files:
            self._files.connected()
        for topic_filter, options in self._wanted.items():
            if self._asked(topic_filter) is None and self.store.granted(topic_filter, options) is None:
                self._ask(topic_filter, options)
        for request in self._requests:
            self._submit(request)

    def _on_granted(self, kind):
        """A SUBACK or UNSUBACK came (MQTT 3.1.1 sections 3.9, 3.11)."""
        decoder = self._decoder
        packet_id = decoder.packet_id
        store = self.store
        for request in self._requests:
            if request.packet_id == packet_id:
                break
        else:
            store.session.unknown += 1
            return
        options = request.options
        if (kind == _UNSUBACK) != (options is None):
            raise ProtocolError("packet type %d for request %d" % (kind, packet_id))
        if kind == _SUBACK:
            if len(decoder.payload) != 1:  # [MQTT-3.8.4-5]
                raise ProtocolError("SUBACK with %d return codes" % len(decoder.payload))
            request.result = code = decoder.payload[0]
            if code > 2:
                self.last_error = self._refused(request.filter, code)
                self.log.add(_ERROR, "subscription", self.last_error)
            elif self._wanted.get(request.filter) == options:
                try:
                    store.subscribed(request.filter, options, code)
                except JournalFull:
                    pass  # only asked for again on the next connection
        self._requests.remove(request)
        store.session.requests.discard(packet_id)
        request.set()
        for request in self._requests:
            if not request.packet_id:
                self._submit(request)
                break

    # -- messages

    async def _progressed(self):
        """Return when a message was acknowledged, or the journal was mounted anew."""
        self._progress.clear()
        self.store.finished = self._on_finished
        await self._progress.wait()

    def _on_finished(self, packet_id, delivered):
        if self._young:
            for young in self._young:
                if young[0] == packet_id:
                    self._young.remove(young)
                    break
        if self._waiters:
            waiter = self._waiters.pop(packet_id, None)
            if waiter is not None:
                waiter.result = delivered
                waiter.set()
        self._progress.set()
        if not (self._waiters or self._young):
            self.store.finished = None  # nobody wants to know

    async def _dispatch(self):
        """Hand one message after the other to the program; acknowledge it when the program is done with it."""
        inbox = self._inbox
        store = self.store
        while not self._leaving:
            while not inbox:
                self._arrived.clear()
                await self._arrived.wait()
            message = inbox.popleft()
            self._inbox_bytes -= len(message.payload or b"")
            self._accepted.set()
            self._handling = message
            if message.payload is not None or message._sink:
                if message._coroutine is None:
                    self.received += 1
                    if message._flags & 4:
                        message.token = store.token(message._id & 0xFFFF)
                topic = message.topic
                try:
                    await self._deliver(message)
                except asyncio.CancelledError as e:
                    # Ours comes from close() or, on CPython, from the end of the loop; else it is that of a task which
                    # the handler has waited for.
                    if self._leaving or getattr(asyncio.current_task(), "cancelling", int)():
                        raise
                    self._handler_failed(e, "handler of " + topic)
                except Exception as e:
                    self._handler_failed(e, "handler of " + topic)
            while message._flags & 6 and self.connected and not store.can_answer():
                await self._room()
            if message._flags & 6:
                self._handled(message)
                self._wake.set()
            self._handling = None

    def _handled(self, message):
        """The program is done with a message of QoS 1 or 2: acknowledge it."""
        store = self.store
        packet_id = message._id & 0xFFFF
        try:
            # -1: the session it came in is over, nobody waits for an answer.
            epoch = store.session.epoch if message._id >> 16 == self._epoch else -1
            store.handled(message._flags >> 1 & 3, packet_id, epoch)
        except Exception as e:
            store.session.busy.discard(packet_id)  # it has to come again
            self._journal_failed(e)

    async def _deliver(self, message):
        if message._coroutine is not None:
            await message._coroutine
            return
        while True:
            for topic_filter, handler in self._handlers:
                if message._sink or matches(topic_filter, message.topic):
                    result = (message._sink or handler)(message)
                    if hasattr(result, "send"):  # a coroutine
                        await result
                    return
            if self.messages.begun:
                await self.messages.give(message)
                return
            if self._handlers:
                self.discarded += 1
                return
            # A program that has said neither on() nor "async for" yet will.
            self._arrived.clear()
            await self._arrived.wait()

    def _handler_failed(self, error, what):
        self.handler_errors += 1
        self.log.add(_ERROR, what, error, True)


class _Sent(tuple):
    """A coroutine that is over already: what publish() returns at QoS 0.

    All that awaiting it takes from MicroPython's heap is an iterator of one block.  Were it a coroutine, of three, the
    search for room would not get on: it begins at the last single block, and passes all that was taken since.
    """

    def __await__(self):
        return iter(())

    def send(self, _):
        raise StopIteration

    def throw(self, error, *_):
        raise error

    def close(self):
        pass


_SENT = _Sent()


async def given(packet_id, error=None):
    """Return packet_id, or raise error."""
    if error is not None:
        raise error
    return packet_id


def as_bytes(payload):
    """Return payload as bytes or bytearray, text as UTF-8.  ValueError for what is neither text nor bytes-like."""
    if isinstance(payload, str):
        return payload.encode()
    if isinstance(payload, memoryview):
        return bytes(payload)  # its items may be larger than a byte
    if not isinstance(payload, (bytes, bytearray)):
        raise ValueError("payload: expected text or bytes")
    return payload


class _Messages:
    """client.messages: the messages that no handler takes, by `async for`.

    A message counts as handled, and is acknowledged, when the loop asks for the next one: a loop that is left by break
    keeps its last message, and all that come after it, until it is begun again.  close() ends the loop.
    """

    def __init__(self, client):
        self.client = client
        self.changed = Event()  # a message is there, or is no more
        self._handling = None
        self._seen = False  # the program has it
        self.begun = False

    def __aiter__(self):
        return self

    async def __anext__(self):
        if self._seen:
            self._seen = False
            self._handling = None
            self.changed.set()
        self.begun = True
        self.client._arrived.set()
        while self._handling is None:
            if self.client._leaving:
                raise StopAsyncIteration
            self.changed.clear()
            await self.changed.wait()
        self._seen = True
        return self._handling

    async def give(self, message):
        self._handling = message
        self.changed.set()
        try:
            while self._handling is message:
                self.changed.clear()
                await self.changed.wait()
        finally:
            self._handling = None
            self._seen = False


class Waiter(Event):
    """For who waits for one result: set when .result is there.  For one of SUBSCRIBE or UNSUBSCRIBE, which has .filter
    and .options, .packet_id is 0 until it is sent."""

    result = None
    packet_id = 0


def _some(n):
    """The bytes that readinto() has read: None is a false alarm, 0 the end."""
    if n == 0:
        raise OSError(errno.ECONNRESET, "the broker closed the connection")
    return n or 0


async def _within(ms, aw):
    """Wait for an awaitable, but no longer than that."""
    try:
        await asyncio.wait_for_ms(aw, ms)
    except asyncio.TimeoutError:
        pass


async def _end(tasks, again=True):
    """Cancel tasks and wait until they have ended; not by await: it could not tell our own cancellation from theirs.

    again: until they have, for wait_for() swallows a cancellation that comes when what it waits for has just ended.
    """
    for task in tasks:
        task.cancel()
    for task in tasks:
        while not task.done():
            await asyncio.sleep_ms(0)
            if again:
                task.cancel()
