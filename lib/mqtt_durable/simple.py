"""The blocking front end: umqtt.simple's constructor and calls, over the journal.

    from mqtt_durable.simple import MQTTClient

Owns the socket, its deadlines and the order of calls; what must survive power loss is the store's.  No asyncio, no
task, no thread: everything happens inside the program's calls.  No wait is endless but wait_msg()'s for a message.
"""

import select
import socket
import time
from errno import ETIMEDOUT

from micropython import const

from .errors import JournalFull, JournalLost, JournalUnavailable, MQTTError, MQTTException, ProtocolError
from .flash import open_home, resolve
from .journal import Journal
from .packet import (
    CONNACK,
    DISCONNECT_BYTES,
    PINGREQ_BYTES,
    PUBACK,
    UNSUBACK,
    check_filter,
    check_topic,
    encode_connect,
    encode_subscribe,
    encode_unsubscribe,
    put_ack,
    put_publish_head,
    utf8,
    Decoder,
)
from .store import Store, identity

_PUBLISH = const(3)
_SUBACK = const(9)
_PINGRESP = const(13)
_SEND_BYTES = const(768)  # one write: what the Pico W's lwIP takes without waiting
_LARGEST_HEAD = const(14)  # as in client.py
_RECEIVE_BYTES = const(256)
_LIMIT_MS = const(10000)
_PULSE_MS = const(1000)
_FIRST_MS = const(1000)
_LONGEST_MS = const(60000)
_NESTED = const(3)
_END = const(-1)  # the errno that umqtt.simple's programs know
_FAULTS = (MQTTError, OSError)

# MicroPython finds them sooner here than behind all the other built-in names.
bytes = bytes
len = len
type = type

_owners = {}  # home of a journal, or the id() that stands for it -> the client that uses it


def to_bytes(msg):
    """Return msg (str or bytes-like) as bytes or bytearray.  Raises TypeError."""
    if isinstance(msg, str):
        return msg.encode()
    # Its items may be larger than a byte.
    return msg if isinstance(msg, (bytes, bytearray)) else bytes(memoryview(msg))


class MQTTClient:
    """An MQTT client with umqtt.simple's calls whose QoS 1 and 2 messages survive power loss.

    client_id, server, port, user, password, keepalive (seconds, 0: off), ssl, ssl_params: as in umqtt.simple; ssl is an
    SSLContext, or True with the arguments of ssl.wrap_socket() in ssl_params.
    home, size_kib, in_flight, when_full ("raise" or "drop_oldest"): as in the configuration's "journal" and "session".
    device, prog_size: a block device for the journal in place of home, and its program size in bytes.
    limit_bytes: the largest packet received whole; a larger message is acknowledged, counted in .too_large and not
    delivered.
    version: 4, which is MQTT 3.1.1, or 5: this then makes a simple5.MQTTClient5, from which a class of a program's own
    that speaks MQTT 5 is derived.

    .mark: the newest mark whose message publish() has accepted, None if there is none; survives power loss.

    The journal is mounted by the first call that needs it: connect(), publish() at QoS 1 and 2, .mark.  They raise
    JournalUnavailable if there is none, or if another client, with another broker or client_id, is connected and uses
    it; from one that is not connected, or is an earlier one for the same session, it is taken over.
    Raises ValueError.
    """

    _Store = Store

    def __new__(cls, *args, version=4, **more):
        if version != 4:
            from .simple5 import made

            return made(cls, version, args, more)
        return object.__new__(cls)

    def __init__(
        self,
        client_id,
        server,
        port=0,
        user=None,
        password=None,
        keepalive=0,
        ssl=None,
        ssl_params={},  # noqa: B006 (umqtt.simple's)
        *,
        home="auto",
        size_kib=64,
        in_flight=16,
        when_full="raise",
        device=None,
        prog_size=4,
        limit_bytes=16384,
        version=4,
    ):
        self.client_id = client_id
        self.server = server
        self.port = port or (8883 if ssl else 1883)
        self.user = user
        self.pswd = password
        self.keepalive = keepalive
        self.ssl = ssl
        self.ssl_params = ssl_params
        self.sock = None
        self.cb = None
        self.lw_topic = None
        self.lw_msg = None
        self.lw_qos = 0
        self.lw_retain = False
        if when_full not in ("raise", "drop_oldest"):
            raise ValueError('when_full: expected "raise" or "drop_oldest"')
        self._home = home
        self._home_bytes = size_kib * 1024
        self._device = device
        self._prog_size = prog_size
        self._in_flight = in_flight
        self._when_full = when_full
        self._key = id(self) if home == "ram" else resolve(home)
        if device is not None:
            self._key = id(device)
        self.store = None
        self.token = None  # in the callback, at QoS 2: stays the same if the message has to come again
        self.too_large = 0
        self.last_error = None  # what ended the last connection or attempt
        self._send = memoryview(bytearray(_SEND_BYTES))
        self._encode_connect = encode_connect
        self._decoder = Decoder(_RECEIVE_BYTES, limit_bytes)
        self._up = False  # the connection is there and in order
        self._stay = False  # connect() was called, and no disconnect() since
        self._good = False  # the broker has sent something after its CONNACK
        self._clean = True
        self._timed = False  # connect() was given a timeout
        self._limit_ms = _LIMIT_MS
        self._pause_ms = self._next_ms = 0
        self._attempt = 0
        self._renewing = False  # the broker said that it has no session, and that is not recorded yet
        self._era = 0  # counts the sessions at the broker: a message belongs to the one it came in
        self._depth = 0  # callbacks running
        self._ours = False  # what is raised is for _lost(), not from a callback
        self._until_ms = None  # ticks_ms at which a wait for an answer is over; it stands still in callbacks
        self._begun = False  # half a packet is here
        self._wanted = {}  # topic filter -> QoS, of every subscription that was granted
        self._passing = False  # messages are passed over, see _takes()
        self.passed_over = 0  # how often a message was
        self._requests = {}  # packet identifier -> [packet identifier, topic filter, QoS or None, return code]
        self._ping_at = None  # ticks_ms of the PINGREQ that is not answered yet
        self._asked = False  # by ping()
        self._last_sent = self._last_received = self._pulse_at = 0
        # What each message goes through is bound once, as in Store; with more than 59 attributes, too.
        self._put = self._put
        self._until = self._until
        self._step = self._step
        self._next = self._next
        self._ready = self._ready
        self._handle = self._handle
        self._deliver = self._deliver
        self._acknowledge = self._acknowledge
        self._receive = self._receive
        self._takes = self._takes
        self._put_head = put_publish_head

    def __getattr__(self, name):
        # No property: MicroPython would look for one at every store to any attribute.
        if name != "mark":
            raise AttributeError(name)
        self._mount()
        return self.store.mark

    def set_callback(self, f):
        """f(topic, msg), both bytes, is called for each message received; PUBACK or PUBREC goes out when it returns.

        If it raises, that comes out of the call that it ran in, the message is not acknowledged and comes again with
        the next connection.  So it is, too, while there is no callback.
        """
        self.cb = f

    def set_last_will(self, topic, msg, retain=False, qos=0):
        """To be called before connect().  Raises ValueError."""
        check_topic(topic)
        if qos not in (0, 1, 2):
            raise ValueError("will qos: not 0, 1 or 2")
        self.lw_topic = topic
        self.lw_msg = msg
        self.lw_qos = qos
        self.lw_retain = retain

    # -- connection

    def connect(self, clean_session=True, timeout=None):
        """Connect; return 1 if the broker has the session still, else 0.  What is stored goes out before anything new.

        timeout: seconds, for each wait from now on; wait_msg() then raises OSError(ETIMEDOUT) when no message comes.
        Without it the broker must answer within 10 s, and wait_msg() waits on.
        A clean session forgets the subscriptions; what is stored is sent as new.  A journal that knows no session with
        this broker begins with a clean one in any case.
        Raises OSError, MQTTException(return code), ValueError, JournalUnavailable.
        """
        self._stay = True
        self._clean = bool(clean_session)
        self._timed = bool(timeout)
        self._limit_ms = int(timeout * 1000) if timeout else _LIMIT_MS
        if clean_session:
            self._wanted.clear()
        return self._connect()

    def _connect(self):
        clean = self._clean
        self._good = False
        self._hang_up()
        self._mount()
        store = self.store
        broker = self._identity()
        try:
            if store.identity != broker and not clean:
                # The broker would take new identifiers for old ones and swallow messages.
                self._handshake(True)
                store.begin(broker)
                self._era += 1
                self._write(DISCONNECT_BYTES)
                self._hang_up()
            if not clean:
                store.connecting()
            self._handshake(clean)
            # Once it has said that it has none, what it has the next time is a new one, until we have recorded that.
            present = self._decoder.session_present and not self._renewing
            if not present:
                self._renewing = True
                self._era += 1
            store.connected(present, broker, clean)
            self._renewing = False
            self._fill()
            for topic_filter, qos in self._wanted.items():
                if store.granted(topic_filter, qos) is None:
                    self._request(topic_filter, qos)
        except MQTTException as e:
            self._lost(e)
            raise
        except _FAULTS as e:
            raise self._lost(e)
        return 1 if present else 0

    def _handshake(self, clean):
        """CONNECT and its CONNACK (MQTT 3.1.1 sections 3.1, 3.2)."""
        will = None
        if self.lw_topic:
            will = self.lw_topic, self.lw_msg, self.lw_qos, self.lw_retain
        user = self.user or None
        connect = self._encode_connect(self.client_id, clean, self.keepalive, user, user and self.pswd, will)
        self._dial()
        self._poll = select.poll()
        self._poll.register(self.sock, select.POLLIN)
        decoder = self._decoder
        decoder.reset()
        self._begun = self._asked = self._passing = False
        self._ping_at = None
        self._requests.clear()
        self.store.session.requests.clear()
        self._last_received = time.ticks_ms()
        self._pulse_at = time.ticks_add(self._last_received, -_PULSE_MS)  # the first message is recorded as finished
        self._write(connect)
        self._up = False
        kind = self._next(self._limit_ms)
        if not kind:
            raise OSError(ETIMEDOUT, "no CONNACK")
        if kind != CONNACK:
            raise ProtocolError("packet type %d before CONNACK" % kind)
        if decoder.return_code:
            raise MQTTException(decoder.return_code)
        self._up = True

    def _dial(self):
        """Make .sock, connected and not blocking.  Raises OSError.  The name look-up has no deadline on any board."""
        infos = socket.getaddrinfo(self.server, self.port, 0, socket.SOCK_STREAM)
        if not infos:
            raise OSError(-2, "no address for " + self.server)
        # Every address of the server gets its turn.
        family, kind, proto, _, address = infos[self._attempt % len(infos)]
        self.sock = sock = socket.socket(family, kind, proto)
        done = False
        try:
            sock.settimeout(self._limit_ms / 1000)
            try:
                sock.setsockopt(6, 1, 1)  # as in transport.dial()
            except OSError:
                pass
            sock.connect(address)
            if self.ssl is True:
                import ssl

                self.sock = ssl.wrap_socket(sock, **self.ssl_params)
            elif self.ssl:
                self.sock = self.ssl.wrap_socket(sock, server_hostname=self.server)
            self.sock.setblocking(False)
            done = True
        finally:
            if not done:
                sock.close()

    def _identity(self):
        client_id = self.client_id if isinstance(self.client_id, str) else str(self.client_id, "utf-8")
        return identity(client_id, self.server, self.port)

    def _mount(self, anew=False):
        """Make sure that the journal is ours and in order.  anew: its home was lost while in use.
        Raises JournalUnavailable, OSError."""
        if self.store is None:
            owner = _owners.get(self._key)
            if owner is not None and owner is not self:
                if owner._up and owner._identity() != self._identity():
                    raise JournalUnavailable(
                        'another MQTTClient is connected and uses "%s": give each a home of its own' % self._home
                    )
                try:
                    owner.disconnect()
                except _FAULTS:
                    pass  # it had not been able to record that before, either
                owner.store = None
                owner._era += 1
            device, prog_size, size = self._device, self._prog_size, None
            if device is None:
                device, prog_size, size = open_home(self._home, self._home_bytes, anew)
            store = self._Store(Journal(device, prog_size, size), self._in_flight, self._when_full)
            store.open()
            self.store = store
            _owners[self._key] = self
            self._era += 1
        elif not self.store.journal.usable:  # after a failure of the flash what it holds is what counts
            try:
                self.store.open()
                self._era += 1
            except JournalLost as e:
                if self._device is not None:
                    raise
                self.store = None
                self._mount(True)
                self.last_error = e

    def _hang_up(self):
        self._up = False
        if self.store is not None:
            self.store.disconnected()
        if self.sock is not None:
            self.sock.close()  # it stays there, as in umqtt.simple: a program may close it, too

    def _lost(self, error):
        """The connection has failed: end it, and return the OSError that says so."""
        self.last_error = error
        self._ours = False
        self._hang_up()
        if self._good:
            self._pause_ms = 0
        else:
            self._pause_ms = min(max(_FIRST_MS, 2 * self._pause_ms), _LONGEST_MS)
            self._attempt += 1
        self._good = False
        self._next_ms = time.ticks_add(time.ticks_ms(), self._pause_ms)
        return error if isinstance(error, OSError) else OSError(_END, str(error))

    def _due(self):
        """Whether publish() may try to connect again: not while the pause lasts.  (Ticks wrap.)"""
        return not 0 < time.ticks_diff(self._next_ms, time.ticks_ms()) <= self._pause_ms

    def disconnect(self):
        """End in order: what is pending is recorded, and DISCONNECT is sent if there is a connection.

        Unacknowledged messages stay stored.  Raises JournalFull, OSError (flash); connect() begins anew.
        """
        self._stay = False
        try:
            if self._up:
                self._fill()
                self._write(DISCONNECT_BYTES)
        except _FAULTS:
            pass  # nothing that matters is lost with it
        self._hang_up()
        if self.store is not None and self.store.journal.usable:
            self.store.close()

    # -- sending

    def publish(self, topic, msg, retain=False, qos=0, *, mark=None):
        """Publish a message; at QoS 1 or 2 it is on flash before it is sent, and survives power loss from then on.

        topic: str or bytes.  msg: str or bytes-like.  mark: an integer of 64 bits stored with the message, see .mark.
        At QoS 1 and 2 waits for the broker's acknowledgement; but returns as well, the message being safe, when the
        connection fails or has failed.  Then connects again by itself, at once and after pauses that grow from 1 s to
        60 s, in the first publish() after each; for that connect() must have been called, successfully or not.
        Raises, the message then not being stored: ValueError; JournalFull; OSError: the flash failed, or at QoS 0
        the connection.  What a callback raises that ran meanwhile comes out of here, too, and says nothing about this
        message.
        """
        # In what this calls for each message hardly a frame has more than 11 words: MicroPython takes a larger one from
        # the heap, and to look for room there costs as much as several calls.
        if type(topic) is not bytes:
            topic = bytes(to_bytes(topic))
        if type(msg) is not bytes:
            msg = to_bytes(msg)
        n = len(msg)
        packet_id = 0
        if qos == 1 or qos == 2:
            if not self._up:
                self._mount()
            store = self.store
            try:
                packet_id = store.publish(topic, msg, qos, retain, mark)
            except Exception as e:
                if isinstance(e, OSError) or not store.journal.usable:
                    self._lost(e)  # so that the journal is mounted anew
                raise
        elif qos != 0:
            raise ValueError("qos: found %r, expected 0, 1 or 2" % (qos,))
        elif mark is not None:
            raise ValueError("mark: needs QoS 1 or 2")
        else:
            check_topic(topic)
            self._check()
        for _ in range(2):
            self._ours = False
            try:
                small = len(topic) + n + _LARGEST_HEAD <= _SEND_BYTES
                if not self._up:
                    if not self._stay or not self._due():
                        return
                    self._connect()
                elif not packet_id or small and store.at_once(packet_id):
                    self._ours = True
                    self._up = False  # unless it ends well: a Ctrl-C in the middle of a packet spoils the stream
                    send = self._send if small else bytearray(len(topic) + _LARGEST_HEAD)
                    first = 0x30 | qos << 1 | (1 if retain else 0)
                    begin = self._put_head(send, 0, first, topic, packet_id, n)
                    if small:
                        end = begin + n
                        send[begin:end] = msg
                        self._put(send, end)
                    else:
                        self._put(send, begin)
                        self._put(msg, n)
                    self._up = True
                    self._ours = False
                    if not packet_id:
                        return
                else:
                    self._guard(self._fill)
                # A callback that publishes for each message it gets must not grow the stack without end.
                if self._depth <= _NESTED:
                    self._until(packet_id, None)
                    if time.ticks_diff(self._last_received, self._pulse_at) >= _PULSE_MS:
                        self._pulse()  # or a program that sleeps now would send it again
                return
            except _FAULTS as e:
                if self._ours:
                    e = self._lost(e)
                    if packet_id:
                        continue
                elif not self._up and isinstance(e, (MQTTException, OSError)):
                    continue
                raise e  # a callback's, or at QoS 0

    def ping(self):
        """Send PINGREQ; wait_msg() returns None when the answer comes.  Raises OSError."""
        self._say(PINGREQ_BYTES)
        self._asked = True
        if self._ping_at is None:
            self._ping_at = self._last_sent

    def _say(self, data):
        """Send a packet that needs no acknowledgement.  Raises OSError."""
        self._check()
        self._guard(self._write, data)

    def _check(self):
        if not self._up:
            raise OSError(_END, "not connected")

    def _guard(self, function, *arguments):
        """Call it; its failure ends the connection.  Raises OSError."""
        try:
            return function(*arguments)
        except _FAULTS as e:
            raise self._lost(e)

    def _fill(self):
        """Send what the store has to send.  Raises OSError, JournalFull."""
        send = self._send
        while True:
            self._up = False
            n = self.store.fill(send, 0)
            if n:
                self._put(send, n)
            self._up = True
            if not n or not self.store.due():
                return

    def _write(self, data):
        """Send a packet.  Raises OSError."""
        self._up = False
        self._put(data, len(data))
        self._up = True

    def _put(self, data, n):
        """Send n bytes of data.  Raises OSError when the broker takes nothing for the limit's time."""
        at = 0
        while n:
            done = self.sock.write(data, at, n if n < _SEND_BYTES else _SEND_BYTES)
            if done:
                at += done
                n -= done
                continue
            self._poll.modify(self.sock, select.POLLOUT)
            done = self._ready(self._limit_ms)
            self._poll.modify(self.sock, select.POLLIN)
            if not done:
                raise OSError(ETIMEDOUT, "the broker takes nothing")
        self._last_sent = time.ticks_ms()

    def _ready(self, wait_ms):
        """Wait until the socket is as it was registered for, but no longer than that; whether it is."""
        for _ in self._poll.ipoll(wait_ms):  # unlike poll() it makes no list
            return True
        return False

    # -- receiving

    def wait_msg(self):
        """Wait for a message, give it to the callback, return its first byte.

        Other packets are handled meanwhile; for the answer to a ping() it returns None.  With keepalive PINGREQs are
        sent, and a broker that does not answer is an OSError.  Raises OSError.
        """
        return self._receive(True)

    def check_msg(self):
        """The same, but return None at once if nothing is there.

        May only wait for the flash, and for a new connection after a flood of messages at QoS 2: see .passed_over.
        Raises OSError.
        """
        return self._receive(False)

    def _receive(self, wait):
        left_ms = _PULSE_MS if wait else 0
        begin = time.ticks_ms() if self._timed else 0
        self._ours = False
        try:
            while True:
                if wait and self._timed:
                    left_ms = self._limit_ms - time.ticks_diff(time.ticks_ms(), begin)
                    if left_ms <= 0:
                        raise OSError(ETIMEDOUT, "no message")  # the connection is in order
                    left_ms = min(left_ms, _PULSE_MS)
                came = self._step(0 if self._passing and not self.store.session.held else left_ms)
                if came >> 4 == _PUBLISH:
                    return came
                if came >> 4 == _PINGRESP and self._asked:
                    self._asked = False
                    return None
                if not came:
                    self._pulse()
                    if not wait:
                        return None
        except _FAULTS as e:
            raise self._lost(e) if self._ours else e

    def _until(self, packet_id, request):
        """Handle what comes until the message, or the request if there is one, is finished.

        Raises OSError: no progress for the limit's time.
        """
        done = -1
        store = self.store
        while store.is_live(packet_id) if request is None else self._requests.get(packet_id) is request:
            if store.acknowledged != done:
                done = store.acknowledged
                left_ms = self._limit_ms
                self._until_ms = time.ticks_add(time.ticks_ms(), left_ms)
            else:
                left_ms = time.ticks_diff(self._until_ms, time.ticks_ms())
                if left_ms <= 0:
                    raise self._lost(OSError(ETIMEDOUT, "the broker does not answer"))
            self._step(left_ms)
        self._until_ms = None

    def _next(self, wait_ms):
        """Return the type of the next packet, 0 if none has begun within wait_ms, or with 0 if it is not whole yet.

        Reads not a byte beyond it, but for two behind a PINGRESP not asked for: a program may poll .sock.
        Raises OSError, ProtocolError.
        """
        decoder = self._decoder
        most = 4 if self._ping_at is None else 2  # only a PINGRESP is shorter than 4 bytes
        if self._begun or decoder.left:
            n = decoder.next()
            if n:
                self._begun = False
                return n
            self._begun = decoder.left > 0 or decoder.start != decoder.end  # not behind one that was too large
            most = decoder.missing
        while True:
            space = decoder.space()
            # Before it polls: TLS may have bytes that the socket no longer has.
            n = self.sock.readinto(space, most)
            while n is None:
                if not wait_ms or not self._ready(wait_ms):
                    if self._begun and time.ticks_diff(time.ticks_ms(), self._last_received) >= self._limit_ms:
                        raise OSError(ETIMEDOUT, "half a packet came")
                    if not self._begun or not wait_ms:
                        return 0
                n = self.sock.readinto(space, most)
            if n == 0:
                raise OSError(_END, "the broker closed the connection")
            if not self._begun and n - 2 < space[1] < 128 and n > 1:
                most = self.sock.readinto(space[n:], space[1] + 2 - n)
                if most:
                    n += most
            decoder.end += n
            self._last_received = time.ticks_ms()
            n = decoder.next()
            if n:
                self._begun = False
                return n
            self._begun = decoder.left > 0 or decoder.start != decoder.end
            most = decoder.missing
            if wait_ms:
                wait_ms = self._limit_ms if self._begun else _PULSE_MS

    def _step(self, wait_ms):
        """Handle one packet if it begins within wait_ms; return its type << 4, of a PUBLISH its first byte if it was
        delivered, else 0.  Raises what the callback raises, and while ._ours, for _lost(), what ends the connection."""
        if not self._up:
            self._check()
        self._ours = True
        came = self._next(wait_ms)
        if came:
            self._good = True
            came = self._handle(came)
            if came >> 4 == _PUBLISH:
                self._ours = False
                if came & 6:
                    self._acknowledge()
                else:
                    self.token = None
                    self._deliver()
                return came
            if self.store.due():
                self._fill()
        self._ours = False
        return came

    def _handle(self, kind):
        """Handle a packet; return its type << 4, of a PUBLISH its first byte, or 0 if it is not to be delivered."""
        decoder = self._decoder
        store = self.store
        if _PUBLISH < kind < _SUBACK:
            store.on_ack(kind, decoder.packet_id)
        elif kind == _PUBLISH:
            kind = decoder.flags
            if kind & 6 and not self._takes(kind >> 1 & 3, decoder.packet_id):
                return 0
            if decoder.payload is None:
                self.too_large += 1
                if kind & 6:  # or it would come back for ever
                    store.handled(kind >> 1 & 3, decoder.packet_id, store.session.epoch)
                return 0
            return 0x30 | kind
        elif kind == _PINGRESP:
            self._ping_at = None
            self._begun = decoder.start != decoder.end  # it may have been one that was not asked for
        elif kind == CONNACK:
            raise ProtocolError("a second CONNACK")
        else:
            self._on_granted(kind)
        return kind << 4

    def _takes(self, qos, packet_id):
        """Whether a PUBLISH is to be delivered.

        mosquitto 2.0 after a reconnection sends all that waits, whatever its window.  What is more than the session
        keeps in mind, and all behind it, is passed over without an answer: the broker has it still, and sends it again,
        in order, over a new connection, which _pulse() makes when there is room.
        """
        store = self.store
        try:
            if not store.on_publish(qos, packet_id):
                return False
            if not self._passing:
                return True
            store.session.busy.discard(packet_id)
        except ProtocolError:
            self._passing = True
        self.passed_over += 1
        return False

    def _deliver(self):
        """Hand a message to the callback; whether there is one."""
        cb = self.cb
        if cb is None:
            return False
        began = self._last_received
        until_ms = self._until_ms
        self._depth += 1
        try:
            cb(self._decoder.name, bytes(self._decoder.payload))
        finally:
            self._depth -= 1
            self._ours = False  # a call of the callback's own may have been broken off
        if until_ms is not None:
            self._until_ms = time.ticks_add(until_ms, time.ticks_diff(time.ticks_ms(), began))
        return True

    def _acknowledge(self):
        """The same with a message at QoS 1 or 2, which is acknowledged when the callback has returned."""
        store = self.store
        session = store.session
        qos = self._decoder.flags >> 1 & 3
        packet_id = self._decoder.packet_id
        era = self._era
        done = False
        self.token = store.token(packet_id) if qos == 2 else None
        try:
            done = self._deliver()
        finally:
            if not done:
                session.busy.discard(packet_id)  # it has to come again
        if done:
            try:
                if qos == 1 and era == self._era and not store.answers:
                    # The usual case: nothing else is to be sent.
                    if session.handled(qos, packet_id, session.epoch) and self._up:
                        self._up = False
                        self._put(self._send, put_ack(self._send, 0, PUBACK, packet_id))
                        self._up = True
                    return
                # -1: the session it came in is over, nobody waits for an answer.
                store.handled(qos, packet_id, session.epoch if era == self._era else -1)
                if self._up:
                    self._fill()
            except _FAULTS as e:
                session.busy.discard(packet_id)
                raise self._lost(e)

    def _pulse(self):
        """What is done when nothing comes, once a second: lazy records, erasing ahead, keep-alive.  Raises OSError."""
        now = time.ticks_ms()
        store = self.store
        session = store.session
        silent_ms = time.ticks_diff(now, self._last_received)
        # Without room yet a new connection would bring nothing but the same again.
        if self._passing and not session.busy and not session.is_too_much(0):
            if not session.held or silent_ms >= _PULSE_MS:
                try:
                    self._connect()
                except MQTTException as e:
                    raise OSError(_END, str(e))
                return
        if time.ticks_diff(now, self._pulse_at) < _PULSE_MS:
            return
        self._pulse_at = now
        try:
            store.commit()
            store.journal.idle()
            if self._ping_at is not None:
                if time.ticks_diff(now, self._ping_at) > self._limit_ms and silent_ms > self._limit_ms:
                    raise OSError(ETIMEDOUT, "the broker no longer answers")
            elif (self.keepalive and time.ticks_diff(now, self._last_sent) >= self.keepalive * 750) or (
                store.waiting() and silent_ms > self._limit_ms
            ):
                self._ping_at = now
                self._write(PINGREQ_BYTES)
        except _FAULTS as e:
            raise self._lost(e)

    # -- SUBSCRIBE and UNSUBSCRIBE

    def subscribe(self, topic, qos=0):
        """Subscribe; returns when the broker has confirmed it.

        Made again by itself when publish() has connected again and the broker has lost it.
        Raises ValueError, OSError, MQTTException(128) if the broker refuses.
        """
        if self.cb is None:
            raise ValueError("subscribe: set_callback() comes first")
        if qos not in (0, 1, 2):
            raise ValueError("qos: found %r, expected 0, 1 or 2" % (qos,))
        topic_filter = utf8(check_filter(topic))
        code = self._ask(topic_filter, qos)
        if code > 2:
            self._wanted.pop(topic_filter, None)
            raise MQTTException(code)
        self._wanted[topic_filter] = qos

    def unsubscribe(self, topic):
        """End a subscription; returns when the broker has confirmed it.  Raises ValueError, OSError, JournalFull."""
        topic_filter = utf8(check_filter(topic))
        self._check()
        try:
            self.store.unsubscribing(topic_filter)
        except OSError as e:
            raise self._lost(e)
        self._wanted.pop(topic_filter, None)
        self._ask(topic_filter, None)

    def _ask(self, topic_filter, qos):
        """Ask the broker; return the code of its answer, 0 for an UNSUBACK.  Raises OSError."""
        self._check()
        request = self._guard(self._request, topic_filter, qos)
        self._ours = False
        try:
            self._until(request[0], request)
        except _FAULTS as e:
            raise self._lost(e) if self._ours else e
        if request[3] is None:
            raise OSError(_END, "the connection was lost")
        return request[3]

    def _request(self, topic_filter, qos):
        """Send a SUBSCRIBE, or with qos None an UNSUBSCRIBE; return its entry in _requests."""
        packet_id = self.store.session.request_id()
        if not packet_id:
            raise OSError(_END, "512 requests without an answer")
        request = self._requests[packet_id] = [packet_id, topic_filter, qos, None]
        if qos is None:
            self._write(encode_unsubscribe(packet_id, topic_filter.encode()))
        else:
            self._write(encode_subscribe(packet_id, topic_filter.encode(), qos))
        return request

    def _on_granted(self, kind):
        """A SUBACK or UNSUBACK came (MQTT 3.1.1 sections 3.9, 3.11)."""
        store = self.store
        decoder = self._decoder
        request = self._requests.pop(decoder.packet_id, None)
        if request is None:
            store.session.unknown += 1
            return
        store.session.requests.discard(decoder.packet_id)
        _, topic_filter, qos, _ = request
        if (kind == UNSUBACK) != (qos is None):
            raise ProtocolError("packet type %d for request %d" % (kind, decoder.packet_id))
        if qos is None:
            request[3] = 0
            return
        if len(decoder.payload) != 1:  # [MQTT-3.8.4-5]
            raise ProtocolError("SUBACK with %d return codes" % len(decoder.payload))
        request[3] = code = decoder.payload[0]
        # With a clean session the broker loses it together with the link.
        if code <= 2 and not self._clean and store.granted(topic_filter, qos) != code:
            try:
                store.subscribed(topic_filter, qos, code)
            except JournalFull:
                pass  # only asked for again on the next connection
