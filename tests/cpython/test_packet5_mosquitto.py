"""The wire layer of MQTT 5 against mosquitto: it takes what is encoded, and what it sends is understood."""

import socket

from brokers import Mosquitto
from mqtt_durable import packet5 as wire
from mqtt_durable.packet import CONNACK, PINGRESP, PUBACK, PUBCOMP, PUBLISH, PUBREC, PUBREL, SUBACK, UNSUBACK
from mqtt_durable.packet5 import DISCONNECT, Decoder5

_ANSWER_S = 30


class _Link:
    """A connection; packets are told as (type, packet_id), the decoder has the rest."""

    def __init__(self, broker, client_id, properties=None, **arguments):
        self.socket = socket.create_connection(("127.0.0.1", broker.port), _ANSWER_S)
        self.decoder = Decoder5(512, 4096, 10)
        self.send(wire.encode_connect(client_id, True, 60, properties=properties, **arguments))
        assert self.next() == CONNACK

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.close()

    def send(self, data):
        self.socket.sendall(data)

    def ack(self, kind, packet_id, reason_code=0):
        buf = bytearray(5)
        self.send(buf[: wire.put_ack(buf, 0, kind, packet_id, reason_code)])

    def next(self):
        """The type of the next packet, 0 at the end of the connection."""
        while not (kind := self.decoder.next()):
            n = self.socket.recv_into(self.decoder.space())
            if not n:
                return 0
            self.decoder.end += n
        return kind


def test_connack_tells_what_the_broker_offers():
    with Mosquitto(max_keepalive=30, max_inflight_messages=7) as broker:
        with _Link(broker, "", {"session_expiry_interval": 100}) as link:
            found = link.decoder.properties
            assert link.decoder.reason_code == 0 and not link.decoder.session_present
            assert found["server_keep_alive"] == 30 and found["receive_maximum"] == 7
            assert found["topic_alias_maximum"] == 10 and found["assigned_client_identifier"]


def test_a_refusal_has_its_reason_code():
    with Mosquitto(users={"u": "p"}) as broker:
        with _Link(broker, "a", username="u", password="wrong") as link:
            assert link.decoder.reason_code == 0x87
        with _Link(broker, "a", username="u", password="p") as link:
            assert link.decoder.reason_code == 0


def test_messages_with_properties_and_aliases_go_there_and_come_back():
    message = {
        "payload_format_indicator": 1,
        "content_type": "text/plain",
        "response_topic": "answers/here",
        "correlation_data": b"\x00\xff",
        "user_properties": [("b", "1"), ("a", "\u00e4"), ("b", "1")],
    }
    with Mosquitto() as broker, _Link(broker, "a", {"topic_alias_maximum": 10}) as link:
        options = wire.subscription_options(b"t/+", 2, retain_as_published=True)
        link.send(wire.encode_subscribe(1, b"t/+", options, {"subscription_identifiers": 300}))
        assert link.next() == SUBACK and link.decoder.packet_id == 1 and bytes(link.decoder.payload) == b"\x02"
        expected = dict(message, subscription_identifiers=[300])
        # At QoS 0 with the topic and an alias, then at QoS 2 with the alias alone.
        link.send(wire.encode_publish(b"t/1", b"zero", properties=message, topic_alias=5))
        block = wire.encode(message, PUBLISH, 5)
        buf = bytearray(32)
        end = wire.put_publish_head(buf, 0, 0x34, b"", 9, len(block) + 3)
        link.send(bytes(buf[:end]) + block + b"two")
        seen = []
        while len(seen) < 5:
            kind = link.next()
            seen.append(kind)
            if kind == PUBREC:
                link.ack(PUBREL, link.decoder.packet_id)
            elif kind == PUBLISH:
                assert link.decoder.topic == "t/1" and link.decoder.properties == expected
                assert bytes(link.decoder.payload) == (b"two" if link.decoder.flags & 6 else b"zero")
                if link.decoder.flags & 6:
                    link.ack(PUBREC, link.decoder.packet_id)
            elif kind == PUBREL:
                link.ack(PUBCOMP, link.decoder.packet_id)
        assert sorted(seen) == sorted((PUBLISH, PUBLISH, PUBREC, PUBCOMP, PUBREL))
        # An expiry that is first in its block, and the one that comes back is no longer.
        block = wire.encode(dict(message, message_expiry_interval=600), PUBLISH)
        end = wire.put_publish_head(buf, 0, 0x32, b"t/2", 10, len(block) + 3)
        link.send(bytes(buf[:end]) + block + b"one")
        kinds = {link.next(), link.next()}
        assert kinds == {PUBACK, PUBLISH} and 0 < link.decoder.properties.get("message_expiry_interval", 600) <= 600


def test_acknowledgements_carry_reason_codes():
    with Mosquitto() as broker, _Link(broker, "a") as link:
        for first, packet_id, kind in ((0x32, 1, PUBACK), (0x34, 2, PUBREC)):
            buf = bytearray(32)
            end = wire.put_publish_head(buf, 0, first, b"nobody", packet_id, 2)
            link.send(bytes(buf[:end]) + wire.encode(None, PUBLISH) + b"x")
            assert link.next() == kind and link.decoder.packet_id == packet_id
            assert link.decoder.reason_code in (0, 0x10)
        link.ack(PUBREL, 2)
        assert link.next() == PUBCOMP and link.decoder.packet_id == 2 and link.decoder.reason_code == 0
        link.send(wire.encode_unsubscribe(3, b"never/asked", {"user_properties": [("a", "b")]}))
        assert link.next() == UNSUBACK and bytes(link.decoder.payload) in (b"\x11", b"\x00")
        link.send(wire.PINGREQ_BYTES)
        assert link.next() == PINGRESP


def test_shared_subscription_and_no_local_are_understood():
    with Mosquitto() as broker, _Link(broker, "a") as link:
        shared = wire.check_filter("$share/group/s")
        link.send(wire.encode_subscribe(1, shared, wire.subscription_options(shared, 1)))
        assert link.next() == SUBACK and bytes(link.decoder.payload) == b"\x01"
        link.send(wire.encode_subscribe(2, b"mine", wire.subscription_options(b"mine", 0, no_local=True)))
        assert link.next() == SUBACK
        link.send(wire.encode_publish(b"mine", b"not back") + wire.encode_publish(b"s", b"back"))
        assert link.next() == PUBLISH and link.decoder.topic == "s"


def test_will_with_properties_is_published_and_a_broken_rule_is_answered_by_disconnect():
    with Mosquitto() as broker, _Link(broker, "far") as far:
        far.send(wire.encode_subscribe(1, b"will", 0))
        assert far.next() == SUBACK
        will = ("will", b"gone", 0, False, {"will_delay_interval": 0, "content_type": "c"})
        with _Link(broker, "a", will=will) as link:
            link.send(wire.encode_disconnect(0x04, {"user_properties": [("why", "test")]}))
            assert far.next() == PUBLISH and bytes(far.decoder.payload) == b"gone"
            assert far.decoder.properties == {"content_type": "c"}
        for bad, code in (
            (wire.encode_publish(b"t", b"", topic_alias=11), 0x94),  # mosquitto takes ten
            (wire.encode_publish(b"", b"", topic_alias=3), 0x82),
        ):
            with _Link(broker, "b") as link:
                link.send(bad)
                assert link.next() == DISCONNECT and link.decoder.reason_code == code
                assert link.next() == 0
