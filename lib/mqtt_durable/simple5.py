"""The blocking front end for MQTT 5: what simple.MQTTClient does, with properties, reason codes and the rest of it.

Loaded by MQTTClient(..., version=5).  Section numbers are those of the MQTT 5.0 specification.
"""

import time

from micropython import const

from . import packet5, simple
from .errors import MQTTException, ProtocolError
from .packet import PUBACK, PUBCOMP, PUBLISH, UNSUBACK, check_topic, utf8
from .packet5 import AUTH, DISCONNECT, Decoder5, check_filter, remaining_length_size, subscription_options
from .properties import Violation, encode
from .reasons import _LASTING, Disconnected, text
from .store5 import Store5

_END = const(-1)  # as in simple
_PLENTY = const(65600)  # bytes of a PUBLISH at most, but for its properties and payload
_RECEIVE_BYTES = const(256)
_LONGEST_MS = const(60000)
_RECEIVE_MAXIMUM = const(16)
_ALIASES = const(16)  # topic aliases the broker may use
_RETRY_MS = const(5000)
_LONGEST_RETRY_MS = const(300000)
_MESSAGES = const(65023)  # packet identifiers above are those of requests
_QUOTA = const(0x97)
_YEAR = const(2024)  # a clock that says less is not set
_SINCE_1970 = const(946684800)  # where the clock counts from 2000


def made(cls, version, args, more):
    """What MQTTClient.__new__() returns when the version is not 4."""
    if version == 5:
        if cls is simple.MQTTClient:
            return MQTTClient5(*args, **more)  # which CPython initialises once more
        if issubclass(cls, MQTTClient5):
            return object.__new__(cls)
    raise ValueError("version: found %r, expected 4, or 5 in a class derived from MQTTClient5" % (version,))


class MQTTClient5(simple.MQTTClient):
    """A simple.MQTTClient that speaks MQTT 5; its arguments and calls, and these besides.

    session_expiry_s: how long the broker keeps the session, with the messages for us, while there is no connection;
    0xFFFFFFFF for ever.  With connect(clean_session=True) it ends with the connection.
    connect_properties: of CONNECT, beside those that are set here, such as user_properties.
    client_id: "" has the broker assign one, which is kept in the journal.  A password needs no user.
    limit_bytes: the broker is told; a larger packet ends the connection.

    .properties: in the callback those of its message, a dictionary, with the names of section 2.2.2.2 in snake case.
    .connack: those of the last CONNACK.  .client: the client identifier in use.
    A refusal is an MQTTException(reason code).  .last_error is reasons.Disconnected when the broker has ended the
    connection and said why; when that is for a person to mend, publish() connects again after the longest pause only.
    """

    def __init__(
        self, *args, version=5, session_expiry_s=604800, connect_properties=None, limit_bytes=16384, **more
    ):
        super().__init__(*args, limit_bytes=limit_bytes, **more)
        self.session_expiry_s = session_expiry_s
        self.connack = {}
        self.properties = {}
        self._decoder = Decoder5(_RECEIVE_BYTES, limit_bytes, _ALIASES)
        self._encode_connect = self._hello
        self._connect_properties = connect_properties or {}
        self._limit = limit_bytes
        self._will_properties = None
        self._identifiers = {}  # topic filter -> subscription identifier
        self._asked_s = self.keepalive  # which the broker may replace
        self._sending = None  # the entry of the publish() that runs, as in _requests
        self._retry_ms = _RETRY_MS // 2
        self._retry_at = None  # ticks_ms at which what was too much for the broker's quota is sent again
        self._retried = time.ticks_ms()
        self._began_s = int(time.time())

    # -- CONNECT

    def __getattr__(self, name):
        if name != "client":
            return super().__getattr__(name)
        if self.client_id or self.store is None:
            return self.client_id
        return self.store.assigned if self.store.identity == self._identity() else ""

    def _Store(self, *arguments):
        store = Store5(*arguments, self._finished, clock=self._clock)
        self._put_head = store.put_head
        keep = store.publish

        def publish(topic, msg, qos, retain, mark):
            entry = self._sending
            packet_id = entry[0] = keep(topic, msg, qos, retain, mark, entry[1])
            return packet_id

        store.publish = publish
        return store

    def _clock(self):
        """Seconds since 1970 if the board's clock is set, else powered seconds since the client was made."""
        now = int(time.time())
        if time.gmtime()[0] < _YEAR:
            return now - self._began_s
        return now + _SINCE_1970 if time.gmtime(0)[0] == 2000 else now

    def set_last_will(self, topic, msg, retain=False, qos=0, *, properties=None):
        """To be called before connect().  properties: also will_delay_interval.  Raises ValueError."""
        encode(properties, 0)
        super().set_last_will(topic, msg, retain, qos)
        self._will_properties = properties

    def _hello(self, client_id, clean, keepalive, user, password, will):
        properties = dict(self._connect_properties)
        properties["session_expiry_interval"] = 0 if clean else self.session_expiry_s
        properties["receive_maximum"] = _RECEIVE_MAXIMUM
        properties["maximum_packet_size"] = self._limit
        properties["topic_alias_maximum"] = _ALIASES
        if will:
            will += (self._will_properties,)
        return packet5.encode_connect(self.client, clean, self._asked_s, user, self.pswd, will, properties)

    def _handshake(self, clean):
        self._retry_at = None
        try:
            super()._handshake(clean)
        except ProtocolError:
            self._up = True  # CONNECT went out whole: DISCONNECT can say why
            raise
        decoder = self._decoder
        found = self.connack = decoder.properties
        if decoder.reason_code:
            raise MQTTException(decoder.reason_code)
        if clean and decoder.session_present:
            raise Violation(0x82, "session present after a clean start")
        if "authentication_method" in found:
            raise Violation(0x82, "CONNACK with an authentication method")
        assigned = found.get("assigned_client_identifier")
        if assigned and not self.client:
            self.store.assign(assigned)
        elif assigned:
            raise Violation(0x82, "a client identifier in place of ours")
        self.keepalive = found.get("server_keep_alive", self._asked_s)  # [MQTT-3.2.2-21]
        self.store.limits(**found)

    def disconnect(self, reason_code=0, session_expiry_s=None):
        """As MQTTClient.disconnect().  reason_code: 4 has the broker publish the will.  session_expiry_s: how long the
        broker keeps the session from now on.  Raises ValueError, too."""
        properties = {}
        if session_expiry_s is not None:
            if session_expiry_s and (self._clean or not self.session_expiry_s):
                # [MQTT-3.14.2-2]
                raise ValueError("session_expiry_s: the session is one that ends with its connection")
            properties["session_expiry_interval"] = session_expiry_s
        goodbye = packet5.encode_disconnect(reason_code, properties)
        try:
            if self._up:
                self._fill()
                self._write(goodbye)
                self._up = False
        except simple._FAULTS:
            pass
        self._hang_up()
        super().disconnect()

    def _hang_up(self):
        # No earlier: mosquitto 2.0.11 sends some more than the receive maximum as a matter of course.
        if self._up and self._passing:
            self._say_why(0x93)
        super()._hang_up()

    def _say_why(self, reason_code):
        try:
            self._write(packet5.encode_disconnect(reason_code))  # section 4.13
        except OSError:
            pass

    def _lost(self, error):
        code = 0
        if isinstance(error, ProtocolError):
            if self._up:
                self._say_why(error.reason_code)
                self._up = False
        elif isinstance(error, Disconnected):
            self._good = False  # nor does it mean anything that it has answered
            code = error.reason_code
        elif isinstance(error, MQTTException):
            code = error.args[0]
        failed = super()._lost(error)
        if code in _LASTING:
            self._pause_ms = _LONGEST_MS
            self._next_ms = time.ticks_add(time.ticks_ms(), _LONGEST_MS)
        return failed

    # -- sending

    def publish(self, topic, msg, retain=False, qos=0, *, mark=None, properties=None):
        """As MQTTClient.publish().  properties: {name: value}, of message_expiry_interval, content_type,
        response_topic, correlation_data, payload_format_indicator, user_properties.

        Raises ValueError, too, for what the connected broker does not take, and MQTTException(reason code) when it
        has refused the message, which is finished then.  One that only was too much for its quota is not: publish()
        returns, and it is sent again later.
        """
        if type(topic) is not bytes:
            topic = bytes(simple.to_bytes(topic))
        if type(msg) is not bytes:
            msg = simple.to_bytes(msg)
        if self._up and (properties or self.store.lacks or len(msg) > self.store.largest - _PLENTY):
            size = len(topic) + 2 + (2 if qos else 0) + len(encode(properties, PUBLISH)) + len(msg)
            size += 1 + remaining_length_size(size)
            self._check_taken(retain, qos, size)
            if properties and qos == 0 and mark is None:
                check_topic(topic)
                self._up = False  # unless the broker is told of the alias
                alias = 0
                if size + 5 <= self.store.largest:  # an alias may take as much more
                    alias, topic = self.store.alias(topic)
                data = packet5.encode_publish(topic, msg, retain, properties, alias)
                self._up = True
                return self._say(data)
        if not qos:
            return super().publish(topic, msg, retain, qos, mark=mark)
        before = self._sending
        entry = self._sending = [0, properties, qos, None]
        try:
            super().publish(topic, msg, retain, qos, mark=mark)
        finally:
            self._sending = before
            self._requests.pop(entry[0], None)
        if entry[3] and entry[3] is not True:
            raise MQTTException(entry[3])

    def _check_taken(self, retain, qos, size):
        found = self.connack
        if qos in (1, 2) and qos > found.get("maximum_qos", 2):  # [MQTT-3.2.2-11]
            raise ValueError("qos: the broker takes %d at most" % found["maximum_qos"])
        if retain and not found.get("retain_available", 1):  # [MQTT-3.2.2-14]
            raise ValueError("retain: the broker does not take retained messages")
        most = self.store.largest
        if size > most:  # [MQTT-3.2.2-15]
            raise ValueError("msg: the broker takes packets of %d bytes at most" % most)

    def _until(self, packet_id, request):
        if request is None:
            request = self._sending
            if request[3] is not None:
                return
            self._requests[packet_id] = request
        super()._until(packet_id, request)

    def _finished(self, packet_id, how):
        """how: True, False for a message dropped or expired, or the reason code of the broker's refusal."""
        entry = self._requests.pop(packet_id, self._sending)
        if entry and entry[0] == packet_id:
            entry[3] = how

    # -- receiving

    def _handle(self, kind):
        decoder = self._decoder
        packet_id = decoder.packet_id
        if kind == PUBLISH:
            if decoder.payload is None:
                raise Violation(0x95, "a packet larger than limit_bytes")
        elif kind == DISCONNECT:
            raise Disconnected(decoder.reason_code, decoder.properties)
        elif kind == AUTH:
            raise Violation(0x82, "AUTH without an authentication method in CONNECT")
        elif PUBACK <= kind <= PUBCOMP:
            self.store.on_ack(kind, packet_id, decoder.reason_code)
            if decoder.reason_code == _QUOTA:
                self._postponed()
                self._finished(packet_id, False)  # as far as publish() goes
            return kind << 4 | decoder.flags
        return super()._handle(kind)

    def _postponed(self):
        if self._retry_at is None:
            now = time.ticks_ms()
            quiet = time.ticks_diff(now, self._retried) > 2 * self._retry_ms
            self._retry_ms = _RETRY_MS if quiet else min(2 * self._retry_ms, _LONGEST_RETRY_MS)
            self._retry_at = time.ticks_add(now, self._retry_ms)

    def _deliver(self):
        self.properties = self._decoder.properties or {}  # the program's own
        return super()._deliver()

    def _pulse(self):
        if self._retry_at is not None and time.ticks_diff(time.ticks_ms(), self._retry_at) >= 0:
            self._retry_at = None
            self._retried = time.ticks_ms()
            self.store.retry()
            self._guard(self._fill)
        super()._pulse()

    # -- SUBSCRIBE and UNSUBSCRIBE

    def subscribe(self, topic, qos=0, no_local=False, retain_as_published=False, retain_handling=0, identifier=None):
        """As MQTTClient.subscribe(); topic may be "$share/NAME/FILTER".  Section 3.8.3.1 has the options.

        identifier: 1-268435455, in .properties["subscription_identifiers"] of the messages that it brings.
        Raises ValueError, OSError, MQTTException(reason code).
        """
        if self.cb is None:
            raise ValueError("subscribe: set_callback() comes first")
        topic_filter = check_filter(topic)
        options = subscription_options(topic_filter, qos, no_local, retain_as_published, retain_handling)
        code = self._unoffered(topic_filter, identifier)
        if self._up and code:
            raise ValueError("subscribe: the broker does not take it: " + text(code))
        topic_filter = utf8(topic_filter)
        self._identifiers.pop(topic_filter, None)
        if identifier is not None:
            encode({"subscription_identifiers": identifier}, 8)
            self._identifiers[topic_filter] = identifier
        code = self._ask(topic_filter, options)
        if code > 2:
            self._wanted.pop(topic_filter, None)
            raise MQTTException(code)
        self._wanted[topic_filter] = options

    def unsubscribe(self, topic):
        """As MQTTClient.unsubscribe().  Raises ValueError, OSError, JournalFull, MQTTException(reason code)."""
        check_filter(topic)
        super().unsubscribe(topic)

    def _ask(self, topic_filter, options):
        code = super()._ask(topic_filter, options)
        if options is None and code >= 0x80:
            raise MQTTException(code)
        return code

    def _unoffered(self, topic_filter, identifier):
        """Return the reason code of a broker that does not offer such a subscription, 0 if ours offers it."""
        found = self.connack
        for code, what, asked in (
            (0xA2, "wildcard_subscription_available", b"+" in topic_filter or b"#" in topic_filter),
            (0x9E, "shared_subscription_available", topic_filter.startswith(b"$share/")),
            (0xA1, "subscription_identifier_available", identifier is not None),
        ):
            if asked and not found.get(what, 1):
                return code
        return 0

    def _request(self, topic_filter, options):
        name = topic_filter.encode()
        identifier = self._identifiers.get(topic_filter)
        packet_id = self.store.session.request_id()
        if not packet_id:
            raise OSError(_END, "512 requests without an answer")
        request = [packet_id, topic_filter, options, None]
        if options is None:
            data = packet5.encode_unsubscribe(packet_id, name)
        else:
            request[3] = self._unoffered(name, identifier) or None  # offered by the last broker, perhaps
            properties = {"subscription_identifiers": identifier} if identifier else None
            data = packet5.encode_subscribe(packet_id, name, options, properties)
        if len(data) > self.store.largest:  # [MQTT-3.2.2-15]
            request[3] = 0x95
        if request[3]:
            self.store.session.requests.discard(packet_id)
        else:
            self._requests[packet_id] = request
            self._write(data)
        return request

    def _on_granted(self, kind):
        decoder = self._decoder
        packet_id = decoder.packet_id
        if packet_id <= _MESSAGES:
            self.store.session.unknown += 1
            return
        request = self._requests.get(packet_id)
        super()._on_granted(kind)
        if request and kind == UNSUBACK:
            if len(decoder.payload) != 1:  # [MQTT-3.11.3-2]
                raise ProtocolError("UNSUBACK with %d reason codes" % len(decoder.payload))
            request[3] = decoder.payload[0]
