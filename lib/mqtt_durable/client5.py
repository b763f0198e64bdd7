"""The asyncio front end for MQTT 5: what Client does, with properties, reason codes and the rest of version 5.

Loaded when the configuration says "version": 5.  Section numbers are those of the MQTT 5.0 specification.
"""

import asyncio
import errno
import time
from os import urandom

from micropython import const

from . import packet5
from .client import Client, Message, Waiter, as_bytes, given
from .errors import ProtocolError
from .log import ERROR
from .packet import PUBACK, PUBLISH, UNSUBACK, check_topic, utf8
from .packet5 import AUTH, DISCONNECT, Decoder5, check_filter, subscription_options
from .properties import Violation, encode
from .reasons import ConnectRefused5, Disconnected, MessageRefused, SubscribeRefused5
from .reasons import text as reason_text
from .store5 import Store5

_RECEIVE_BYTES = const(768)
_RECEIVE_MAXIMUM = const(16)  # as many as wait for their handlers
_ALIASES = const(16)  # topic aliases the broker may use
_WEEK_S = const(604800)
_RETRY_MS = const(5000)
_LONGEST_RETRY_MS = const(300000)
_WHOLE = const(0x100)  # as in store5
_PLENTY = const(65600)  # bytes of a PUBLISH at most, but for its properties and payload
_YEAR = const(2024)  # a clock that says less is not set
_SINCE_1970 = const(946684800)  # where the clock counts from 2000
_OURS = (
    "session_expiry_interval",
    "receive_maximum",
    "maximum_packet_size",
    "topic_alias_maximum",
)


class Message5(Message):
    """A message received over MQTT 5.  .properties: a dictionary, with the names of section 2.2.2.2 in snake case."""

    def __init__(self, decoder, epoch):
        super().__init__(decoder, epoch)
        if decoder.properties:
            self.properties = decoder.properties

    def __getattr__(self, name):
        if name == "properties":  # few messages have any, and few programs ask
            self.properties = {}
            return self.properties
        return super().__getattr__(name)


class Client5(Client):
    """A Client that speaks MQTT 5.  Made by Client() where config["broker"]["version"] is 5.

    config: config["session"]["expiry_s"]: how long the broker keeps the session and its messages while there is no
    connection, in seconds; 0xFFFFFFFF for ever.  A client_id "" has the broker assign one, which the journal keeps.
    will: (topic, payload, qos, retain) or with properties behind them, will_delay_interval among them.
    properties: of CONNECT, beside those the client sets itself: user_properties, request_response_information,
    request_problem_information, authentication_method, authentication_data.
    authenticate: called with the authentication data of an AUTH packet (bytes, b"" if there is none); returns those of
    the answer.  With an authentication_method and no authentication_data in properties it is called with None first.

    .connack: the properties of the last CONNACK.  A message that the broker refuses, with a reason code of 0x80 or
    more, is finished: counted as refused, and told by acknowledged().  One refused for "quota exceeded" is sent again
    after a pause of 5 s, which doubles up to 5 minutes.
    """

    _version = 5
    _Message = Message5

    def _set_up(self, config, limit_bytes, properties, authenticate):
        """Begin, as opening.make() has it; return the decoder."""
        properties = dict(properties or ())
        for name in properties:
            if name in _OURS:
                raise ValueError("properties: %s is the client's" % name)
        if authenticate and "authentication_method" not in properties:
            raise ValueError("authenticate: needs an authentication_method in properties")
        self._properties = properties
        self._authenticate = authenticate
        self._expiry_s = config["session"].get("expiry_s", _WEEK_S)
        self._named = self.client_id  # what the configuration says
        self._limit = limit_bytes
        self.connack = {}
        self._flooded = False  # the broker has sent more than the session keeps in mind
        self._identifiers = {}  # topic filter -> subscription identifier
        self._retry_ms = _RETRY_MS
        self._retry_at = None
        self._authenticating = None  # who waits for the end of a re-authentication
        self._calls = {}  # correlation data -> who waits for the answer
        self._answers_to = None  # the response topic, once it is subscribed to
        self._known = asyncio.Event()  # .client_id and .connack are there
        asks = properties.get("request_problem_information", 1)
        return Decoder5(_RECEIVE_BYTES, limit_bytes, _ALIASES, bool(asks))

    def _Store(self, *arguments):
        store = Store5(*arguments, clock=self._clock)
        self._put_head = store.put_head
        return store

    def _clock(self):
        """Seconds since 1970 if the board's clock is set, else powered seconds since the program began."""
        if time.gmtime()[0] >= _YEAR:
            return int(time.time()) + (_SINCE_1970 if time.gmtime(0)[0] == 2000 else 0)
        return self.log.uptime_ms() // 1000

    # -- CONNECT

    def _connect_packet(self, clean):
        broker = self._broker
        properties = dict(self._properties)
        # A session that is only to be ended, or that the configuration wants to be so, ends with its connection.
        properties["session_expiry_interval"] = 0 if clean else self._expiry_s
        properties["receive_maximum"] = _RECEIVE_MAXIMUM
        if not self._files:  # a payload that goes into a file may be larger
            properties["maximum_packet_size"] = self._limit
        properties["topic_alias_maximum"] = _ALIASES
        if self._authenticate and self._stream is not None and "authentication_data" not in properties:
            data = self._authenticate(None)
            if data is not None:
                properties["authentication_data"] = data
        return packet5.encode_connect(
            self.client_id,
            clean,
            broker["keep_alive_s"],
            broker["username"],
            broker["password"],
            self._will,
            properties,
        )

    async def _handshake(self, clean):
        if not self._named:
            self.client_id = self.store.assigned
        self._flooded = False
        self._retry_at = None
        try:
            await super()._handshake(clean)
        except ProtocolError as e:
            self._say_why(e.reason_code)
            raise

    async def _answer(self):
        """CONNACK, or what comes in its place; until then AUTH goes to and fro (section 4.12)."""
        while True:
            kind = await super()._answer()
            if kind != AUTH:
                return kind
            await self._put(self._auth_answer(0x18))

    def _auth_answer(self, expected):
        """Return the AUTH that answers the one which has come."""
        decoder = self._decoder
        method = self._properties.get("authentication_method")
        if method is None or decoder.properties.get("authentication_method") != method:  # [MQTT-4.12.0-5, -6]
            raise Violation(0x82, "AUTH with another authentication method")
        if decoder.reason_code != expected:
            raise Violation(0x82, "AUTH with reason code 0x%02x" % decoder.reason_code)
        return self._encode_auth(0x18, decoder.properties.get("authentication_data", b""))

    def _encode_auth(self, reason_code, data):
        properties = {"authentication_method": self._properties["authentication_method"]}
        answer = self._authenticate and self._authenticate(data)
        if answer is not None:
            properties["authentication_data"] = answer
        return packet5.encode_auth(reason_code, properties)

    def _on_connack(self, clean):
        decoder = self._decoder
        found = decoder.properties
        self.connack = found
        if decoder.reason_code >= 0x80:
            raise ConnectRefused5(decoder.reason_code, found)
        if clean and decoder.session_present:
            raise Violation(0x82, "session present after a clean start")  # [MQTT-3.1.2-4]
        if found.get("authentication_method") != self._properties.get("authentication_method"):
            raise Violation(0x82, "CONNACK with another authentication method")  # [MQTT-4.12.0-5, -6]
        if decoder.reason_code:
            raise Violation(0x82, "CONNACK with reason code 0x%02x" % decoder.reason_code)
        self.client_id = self.client_id or found.get("assigned_client_identifier", "")
        if not self.client_id:
            raise Violation(0x82, "CONNACK without an assigned client identifier")  # [MQTT-3.2.2-16]
        self._keep_alive(found.get("server_keep_alive", self._broker["keep_alive_s"]))  # [MQTT-3.2.2-21]
        self.store.limits(**found)

    def _renew_requests(self):
        if not self._named and self.client_id != self.store.assigned:
            self.store.assign(self.client_id)
        self._known.set()
        super()._renew_requests()

    # -- the program's calls

    def publish(self, topic, payload, qos=1, retain=False, mark=None, properties=None):
        """As Client.publish().  properties: {name: value}, of message_expiry_interval (seconds), content_type,
        response_topic, correlation_data, payload_format_indicator and user_properties.

        A message that is not sent for the first time within its expiry interval is dropped and counted as expired.
        Raises ValueError, too, for what the broker that is connected does not take.
        """
        try:
            if type(payload) is not bytes:
                payload = as_bytes(payload)
            if self.connected:
                if self.store.lacks:
                    self._check_taken(qos, retain)
                if properties or len(payload) > self.store.largest - _PLENTY:
                    n = len(encode(properties, PUBLISH)) + len(payload) + len(check_topic(topic))
                    self._check_size(n + (4 if qos else 2))
            if properties and qos == 0 and mark is None:
                # On the wire they stand together, and there is no store between.
                topic = check_topic(topic)
                payload = encode(properties, PUBLISH) + payload
                if self._send_now(_WHOLE | (0x31 if retain else 0x30), topic, 0, payload):
                    return self._give_way(None)
                return self._publish_0_later(topic, payload, retain, b"")
        except Exception as e:
            return given(None, e)
        return super().publish(topic, payload, qos, retain, mark, properties)

    def _publish_0_later(self, topic, payload, retain, properties=b"\0"):
        return super()._publish_0_later(topic, properties + payload, retain)

    def _check_size(self, length):
        """Raise ValueError if the broker takes no packet with that remaining length."""
        most = self.store.largest
        if length + 1 + packet5.remaining_length_size(length) > most:
            raise ValueError("the broker takes packets of %d bytes at most" % most)  # [MQTT-3.2.2-15]

    def _check_file(self, first, length):
        """Raise ValueError if the broker does not take the file whose PUBLISH has that first byte; length: of its topic
        name and payload."""
        qos = first >> 1 & 3
        self._check_taken(qos, first & 1)
        self._check_size(length + (5 if qos else 3))

    def _check_taken(self, qos, retain):
        found = self.connack
        if qos in (1, 2) and qos > found.get("maximum_qos", 2):  # [MQTT-3.2.2-11]
            raise ValueError("qos: the broker takes %d at most" % found["maximum_qos"])
        if retain and not found.get("retain_available", 1):  # [MQTT-3.2.2-14]
            raise ValueError("retain: the broker takes no retained messages")

    async def subscribe(
        self, topic_filter, qos=0, no_local=False, retain_as_published=False, retain_handling=0, identifier=None
    ):
        """As Client.subscribe().  no_local: not what this client publishes itself.  retain_as_published: messages keep
        their retain flag.  retain_handling: 0 has retained messages sent, 1 only for a new subscription, 2 never.
        identifier: 1-268435455, given with each message as properties["subscription_identifiers"], a list.
        topic_filter: also "$share/NAME/FILTER", whose messages go to one of all that share NAME.
        Raises ValueError, also for what the broker that is connected does not offer, SubscribeRefused.  Section 3.8.
        """
        data = check_filter(topic_filter)
        text = utf8(data)
        options = subscription_options(data, qos, no_local, retain_as_published, retain_handling)
        if identifier is not None and not 0 < identifier < 1 << 28:
            raise ValueError("identifier: found %r, expected 1-268435455" % (identifier,))
        if self.connected:
            self._check_offered(text, identifier)
        if identifier != self._identifiers.get(text):
            # The broker may know the subscription, but with another identifier or none.
            self._identifiers[text] = identifier
            self.store.unsubscribing(text)
        return await self._subscribe(text, options)

    def _check_offered(self, text, identifier):
        code = self._unoffered(text, identifier)
        if code:
            raise ValueError("the broker does not take it: %s" % reason_text(code))

    def _unoffered(self, text, identifier):
        """Return the reason code of a broker that does not offer such a subscription, 0 if ours offers it."""
        found = self.connack
        for code, name, wanted in (
            (0xA2, "wildcard_subscription_available", "+" in text or "#" in text),
            (0x9E, "shared_subscription_available", text.startswith("$share/")),
            (0xA1, "subscription_identifier_available", identifier is not None),
        ):
            if wanted and not found.get(name, 1):
                return code
        return 0

    async def unsubscribe(self, topic_filter):
        """As Client.unsubscribe().  Raises SubscribeRefused, too."""
        text = utf8(check_filter(topic_filter))
        self.store.unsubscribing(text)
        self._wanted.pop(text, None)
        self._identifiers.pop(text, None)
        code = await self._request(text, None)
        if code is not None:
            raise SubscribeRefused5(text, code)

    def on(self, topic_filter, handler):
        """As Client.on(); "$share/NAME/FILTER" is the same as FILTER."""
        text = utf8(check_filter(topic_filter))
        super().on(text.split("/", 2)[2] if text.startswith("$share/") else text, handler)

    async def request(self, topic, payload, timeout_s=10, qos=1, properties=None):
        """Publish a request and return the Message that answers it (section 4.10): on a topic of this client's own,
        with the request's correlation data.

        The first one of a program waits for a connection, and is not published without; a later one is stored as any
        message, and may go out after the time is over.  Raises what publish() and subscribe() do, asyncio.TimeoutError.
        """
        key = urandom(8)
        call = self._calls[key] = Waiter()
        try:
            await asyncio.wait_for_ms(self._exchange(call, key, topic, payload, qos, properties), int(timeout_s * 1000))
        finally:
            del self._calls[key]
        return call.result

    async def _exchange(self, call, key, topic, payload, qos, properties):
        if self._answers_to is None:
            await self._known.wait()
            text = self.connack.get("response_information") or "devices"
            text = "%s/%s/responses" % (text, self.client_id)
            await self.subscribe(text, 1)
            if self._answers_to is None:  # and no other request has come first
                self._answers_to = text
                self._handlers.insert(0, (text, self._on_response))  # before one of the program's that would match
        properties = dict(properties or ())
        properties["response_topic"] = self._answers_to
        properties["correlation_data"] = key
        await self.publish(topic, payload, qos, properties=properties)
        await call.wait()

    async def reply(self, message, payload, qos=1, properties=None):
        """Answer a request; return what publish() does.  Raises ValueError, too, if it asks for no answer."""
        asked = message.properties
        if "response_topic" not in asked:
            raise ValueError("reply: the message has no response_topic")
        properties = dict(properties or ())
        if "correlation_data" in asked:
            properties["correlation_data"] = asked["correlation_data"]
        return await self.publish(asked["response_topic"], payload, qos, properties=properties)

    async def reauthenticate(self):
        """Authenticate again (section 4.12.1); return when the broker is content.

        Raises ValueError without an authentication_method, OSError if there is no connection, or it is lost.
        """
        if "authentication_method" not in self._properties:
            raise ValueError("reauthenticate: needs an authentication_method")  # [MQTT-4.12.0-7]
        if not self.connected:
            raise OSError(errno.ENOTCONN, "not connected")
        if self._authenticating is None:
            self._authenticating = Waiter()
            self._outbox.append(self._encode_auth(0x19, None))
            self._wake.set()
        waiter = self._authenticating
        await waiter.wait()
        if not waiter.result:
            raise OSError(errno.ECONNRESET, "the connection was lost")

    async def close(self, reason_code=0, session_expiry_s=None):
        """As Client.close().  reason_code: 0x04 has the broker publish the will.  session_expiry_s: in place of the
        configuration's, from now on.  Raises ValueError.  Section 3.14.
        """
        properties = {}
        if session_expiry_s is not None:
            if session_expiry_s and (self._clean or not self._expiry_s):
                raise ValueError("session_expiry_s: a session that ends with its connection stays so")
            properties["session_expiry_interval"] = session_expiry_s
        self._goodbye = packet5.encode_disconnect(reason_code, properties)
        await super().close()

    def stats(self):
        """As Client.stats(), and .refused, .postponed, .expired, .lowered: see Store5."""
        found = super().stats()
        for name in ("refused", "postponed", "expired", "lowered"):
            found[name] = getattr(self.store, name)
        return found

    # -- what comes

    def _on_publish(self):
        if self._decoder.payload is None and not self._files:
            raise Violation(0x95, "a message over %d bytes" % self._limit)  # [MQTT-3.1.2-24]
        return super()._on_publish()

    def _pass_over(self, why):
        # Here, and not beyond the receive maximum: mosquitto 2.0 sends some more than that as a matter of course.
        self._flooded = self.store.session.is_too_much(0)
        super()._pass_over(why)

    def _on_response(self, message):
        call = self._calls.get(message.properties.get("correlation_data"))
        if call is not None:
            call.result = message
            call.set()

    def _on_other(self, kind, packet_id):
        decoder = self._decoder
        if kind == DISCONNECT:
            raise Disconnected(decoder.reason_code, decoder.properties)
        if kind != AUTH:
            if kind == PUBACK and packet_id in self.store.session.requests:
                self.store.beside(-1)  # that of a file whose publish_file() was cancelled
            self.store.on_ack(kind, packet_id, decoder.reason_code)
        elif self._authenticating is None:
            raise Violation(0x82, "AUTH that was not asked for")
        elif decoder.reason_code:
            self._outbox.append(self._auth_answer(0x18))
            self._wake.set()
        else:
            self._end_authentication(True)

    def _end_authentication(self, result):
        waiter = self._authenticating
        if waiter is not None:
            self._authenticating = None
            waiter.result = result
            waiter.set()

    def _on_granted(self, kind):
        if kind == UNSUBACK:
            decoder = self._decoder
            if len(decoder.payload) != 1:  # [MQTT-3.11.3-1]
                raise Violation(0x82, "UNSUBACK with %d reason codes" % len(decoder.payload))
            if decoder.payload[0] >= 0x80:
                for request in self._requests:
                    if request.packet_id == decoder.packet_id:
                        request.result = decoder.payload[0]
        super()._on_granted(kind)

    def _submit(self, request):
        code = 0
        if request.options is not None:
            # Asked for before the connection, or of a broker that offers less than the last one.
            code = self._unoffered(request.filter, self._identifiers.get(request.filter))
        if len(self._encode_request(request, request.filter.encode())) > self.store.largest:  # [MQTT-3.2.2-15]
            code = 0x95
        if code:
            self.last_error = self._refused(request.filter, code)
            self.log.add(ERROR, "subscription", self.last_error)
            self._requests = [other for other in self._requests if other is not request]
            request.result = code
            request.set()
        else:
            super()._submit(request)

    def _encode_request(self, request, topic_filter):
        if request.options is None:
            return packet5.encode_unsubscribe(request.packet_id, topic_filter)
        identifier = self._identifiers.get(request.filter)
        properties = {"subscription_identifiers": identifier} if identifier else None
        return packet5.encode_subscribe(request.packet_id, topic_filter, request.options, properties)

    def _undelivered(self, packet_id, result):
        if result:
            return MessageRefused(packet_id, result)
        return super()._undelivered(packet_id, result)

    def _refused(self, topic_filter, code):
        return SubscribeRefused5(topic_filter, code)

    # -- the connection

    def _failed(self, error):
        if isinstance(error, ProtocolError) and self.connected:
            self._say_why(error.reason_code)
        super()._failed(error)

    def _say_why(self, reason_code):
        """The broker broke a rule: DISCONNECT tells which, and nothing follows it.  Section 4.13."""
        stream = self._stream
        upload = self._files and self._files.upload
        if stream is None or self._leaving or stream.out_buf or self.store.rest or (upload and upload.half):
            return  # in the middle of a packet, or close() has said good-bye, or will [MQTT-3.14.4-1]
        try:
            stream.s.write(packet5.encode_disconnect(reason_code))
        except (OSError, ValueError):
            pass
        stream.s = _Hushed(stream.s)  # [MQTT-3.14.4-1]

    def _hang_up(self):
        if self._flooded:
            self._say_why(0x93)
            self._flooded = False
        super()._hang_up()
        self._end_authentication(False)

    def _sweep(self):
        super()._sweep()
        store = self.store
        if not store.later():
            self._retry_at = None
            self._retry_ms = _RETRY_MS
        elif self._retry_at is None:
            self._retry_at = time.ticks_add(time.ticks_ms(), self._retry_ms)
        elif time.ticks_diff(time.ticks_ms(), self._retry_at) >= 0:
            self._retry_at = None
            self._retry_ms = min(2 * self._retry_ms, _LONGEST_RETRY_MS)
            store.retry()
            self._wake.set()


class _Hushed:
    """In place of a socket over which nothing more is to be said."""

    def __init__(self, sock):
        self._sock = sock

    def write(self, data, off=0, n=0):
        return n or len(data)

    def close(self):
        self._sock.close()
