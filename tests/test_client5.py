"""The client with MQTT 5 against the scripted broker: what it promises beside what test_client.py says of both.

In test_client.py, test_conformance.py and test_files.py a test with a loop over the versions runs for 5 as well.
"""

import asyncio
import time

import mqtt_durable.client5 as client5_module
from fakebroker import ack, packet, publish, told, turns, until
from mqtt_durable.client import Client
from mqtt_durable.client5 import Client5
from mqtt_durable.errors import ConnectRefused, MessageDropped, ProtocolError, SubscribeRefused
from mqtt_durable.reasons import Disconnected, MessageRefused
from raises import raises
from test_client import SILENT, Gate, _Pulses, hurry, play, raised
from test_conformance import play_raw

_CONNACK = told("CONNACK")
_METHOD = {"authentication_method": "m"}


def play5(scenario, script=(), says=None, **options):
    """As test_client.play(), for version 5.  says: the properties of CONNACK, or those of several packets by name."""
    if says and "CONNACK" not in says and not [name for name in says if name.isupper()]:
        says = {"CONNACK": says}
    play(scenario, script, says=says, version=5, **options)


class _Pulses5(_Pulses):
    """In place of the time of both modules."""

    def __getattr__(self, name):
        return getattr(time if hasattr(time, name) else asyncio, name)

    def __enter__(self):
        client5_module.time = self
        return super().__enter__()

    def __exit__(self, *_):
        client5_module.time = time
        super().__exit__()


def subscriptions(rig):
    return [(p.filter, p.options, p.properties) for p in rig.broker.named("SUBSCRIBE")]


# CONNECT and CONNACK.


def test_version_5_makes_a_client_of_its_own_and_version_4_takes_nothing_of_it():
    async def scenario(rig):
        assert type(rig.client) is Client5 and isinstance(rig.client, Client)
        for more in (
            {"properties": {"user_properties": [("a", "b")]}},
            {"authenticate": print},
            {"will": ("w", "", 0, False, {"will_delay_interval": 1})},
        ):
            raises(ValueError, lambda more: rig.make(version=4, **more), more)
        assert type(rig.make(version=4)) is Client

    play5(scenario, start=False)


def test_connect_carries_the_clients_properties_and_the_programs():
    async def scenario(rig):
        await rig.up()
        connect = rig.broker.packets[0]
        assert connect.version == 5 and connect.properties == {
            "session_expiry_interval": 604800,
            "receive_maximum": 16,
            "maximum_packet_size": 4096,
            "topic_alias_maximum": 16,
            "user_properties": [("site", "north"), ("site", "roof")],
            "request_response_information": 1,
        }
        assert connect.will == ("gone", b"bye", 1, True)
        assert connect.will_properties == {"will_delay_interval": 30, "content_type": "text"}

    will = ("gone", "bye", 1, True, {"will_delay_interval": 30, "content_type": "text"})
    properties = {"user_properties": [("site", "north"), ("site", "roof")], "request_response_information": 1}
    play5(scenario, properties=properties, will=will)


def test_bad_properties_of_connect_and_will_are_refused_at_once():
    async def scenario(rig):
        for more in (
            {"properties": {"content_type": "none of CONNECT"}},
            {"properties": {"request_problem_information": 2}},
            {"properties": {"authentication_data": b"without a method"}},
            {"will": ("w", "", 0, False, {"topic_alias": 1})},
        ):
            raises(ValueError, lambda more: rig.make(**more), more)

    play5(scenario, start=False)


def test_session_expiry_is_the_configurations_and_none_with_a_clean_session():
    for options, expected in (
        ({"expiry_s": 60}, (False, 60)),
        ({"expiry_s": 0xFFFFFFFF}, (False, 0xFFFFFFFF)),
        ({"clean": True}, (True, 0)),
    ):

        async def scenario(rig):
            await rig.up()
            connect = rig.broker.packets[0]
            assert (connect.clean, connect.properties.get("session_expiry_interval", 0)) == expected

        play5(scenario, **options)


def test_password_needs_no_user_name():
    async def scenario(rig):
        await rig.up()
        assert (rig.broker.packets[0].username, rig.broker.packets[0].password) == (None, "secret")

    play5(scenario, password="secret")


def test_what_the_broker_says_of_itself_can_be_read_and_is_forgotten_with_the_connection():
    async def scenario(rig):
        await rig.up()
        assert rig.client.connack == {"response_information": "answers/", "user_properties": [("a", "1"), ("a", "2")]}
        rig.broker.says = {}
        await rig.broker.drop()
        await rig.up(2)
        assert rig.client.connack == {}

    play5(scenario, says={"response_information": "answers/", "user_properties": [("a", "1"), ("a", "2")]})


def test_client_identifier_that_the_broker_assigns_is_kept():
    """[MQTT5-3.2.2-16]"""
    async def scenario(rig):
        await rig.client.acknowledged(await rig.client.publish("t", "a", qos=2))
        assert rig.client.client_id == "auto-7"
        await rig.broker.drop()
        await rig.client.acknowledged(await rig.client.publish("t", "b", qos=2))
        ids = [p.client_id for p in rig.broker.named("CONNECT")]
        assert ids[0] == "" and ids[-1] == "auto-7" and rig.client.session_present
        connections = rig.broker.connections
        client = await rig.reboot()
        rig.broker.says = {}
        await client.acknowledged(await client.publish("t", "c", qos=2))
        assert client.client_id == "auto-7" and client.session_present
        assert rig.broker.connections == connections + 1 and rig.broker.named("CONNECT")[-1].client_id == "auto-7"
        assert [payload for _, payload, _ in rig.broker.delivered] == [b"a", b"b", b"c"]

    play5(scenario, says={"assigned_client_identifier": "auto-7"}, client_id="", fresh=True)


def test_broker_that_assigns_no_client_identifier_is_not_taken():
    """[MQTT5-3.2.2-16]"""
    async def scenario(rig):
        await until(lambda: rig.broker.closed)
        assert isinstance(rig.client.last_error, ProtocolError) and not rig.client.connected
        assert rig.broker.trace(1)[1:] == ["DISCONNECT 0x82"]

    play5(scenario, client_id="", fresh=True, backoff_ms=(600000, 600000))


REFUSALS = (
    # reason code, its text, whether only a person can mend it
    (0x80, "0x80 unspecified error", False),
    (0x84, "0x84 unsupported protocol version", True),
    (0x85, "0x85 client identifier not valid", True),
    (0x86, "0x86 bad user name or password", True),
    (0x87, "0x87 not authorized", True),
    (0x88, "0x88 server unavailable", False),
    (0x89, "0x89 server busy", False),
    (0x8A, "0x8a banned", True),
    (0x8C, "0x8c bad authentication method", True),
    (0x97, "0x97 quota exceeded", True),
    (0x9C, "0x9c use another server", True),
    (0x9D, "0x9d server moved", True),
    (0x9F, "0x9f connection rate exceeded", False),
)


def test_refusal_tells_its_reason_and_decides_when_the_broker_is_asked_again():
    """[MQTT5-3.2.2-7] [MQTT5-4.13.2-1]"""
    for code, text, lasting in REFUSALS:
        attempts = []

        async def scenario(rig):
            client = rig.client
            pause_ms = client._pause_ms

            def note():
                attempts.append(client._attempt)
                return pause_ms()

            client._pause_ms = note
            await client.start()
            await rig.up(2)
            error = client.last_error
            assert isinstance(error, ConnectRefused), (code, error)
            assert error.reason_code == error.return_code == code
            assert text in str(error), (text, str(error))
            assert error.properties == {"server_reference": "other:1883", "reason_string": "as a test"}
            assert attempts == [16 if lasting else 0], (code, attempts)
            assert rig.broker.trace(1) == ["CONNECT"]

        properties = {"server_reference": "other:1883", "reason_string": "as a test"}
        script = [(1, "CONNECT", 1, told("CONNACK", code, properties))]
        play5(scenario, script, start=False)


def test_session_present_after_a_clean_start_is_answered_by_its_reason_code():
    """[MQTT5-3.2.2-4]"""
    async def scenario(rig):
        await rig.up(2)
        assert rig.broker.trace(1) == ["CONNECT clean", "DISCONNECT 0x82"]
        assert rig.client.stats()["protocol_errors"] == 1

    play5(scenario, [(1, "CONNECT", 1, "present 1")], clean=True)


def test_state_that_the_broker_no_longer_has_is_dropped_here_too():
    """[MQTT5-3.2.2-5]"""
    async def scenario(rig):
        got = []
        rig.client.on("#", lambda message: got.append(message.payload))
        await rig.up()
        await rig.broker.publish("t", b"old", 2, 5)
        await rig.broker.expect("PUBREC 5")
        rig.broker.forget()  # as if the session expired
        await rig.broker.drop()
        await rig.up(2)
        assert not rig.client.session_present
        await rig.broker.publish("t", b"new", 2, 5)
        await until(lambda: len(got) == 2)
        assert got == [b"old", b"new"]

    play5(scenario, [(0, "PUBREC", 0, "silent")])


def test_keep_alive_of_the_broker_holds_for_its_connection():
    """[MQTT5-3.1.2-21] [MQTT5-3.2.2-21]"""
    async def scenario(rig):
        client = rig.client
        with _Pulses(client) as clock:
            await client.start()
            await rig.up()
            for _ in range(4):
                await clock.pulse(1000)
            await rig.broker.expect("PINGREQ")
            rig.broker.says = {}
            await rig.broker.drop()
            await rig.up(2)
            for _ in range(10):
                await clock.pulse(1000)
            assert not rig.broker.named("PINGREQ", 2)

    play5(scenario, start=False, says={"server_keep_alive": 4})


def test_broker_without_a_keep_alive_gets_no_ping():
    """[MQTT5-3.2.2-21]"""
    async def scenario(rig):
        client = rig.client
        with _Pulses(client) as clock:
            await client.start()
            await rig.up()
            for _ in range(100):
                await clock.pulse(1000)
            assert rig.broker.trace() == ["CONNECT"]

    play5(scenario, start=False, says={"server_keep_alive": 0})


# What the broker offers.


def test_publish_beyond_what_the_broker_offers_is_refused_while_connected():
    """[MQTT5-3.2.2-11] [MQTT5-3.2.2-14] [MQTT5-3.2.2-15]"""
    async def scenario(rig):
        client = rig.client
        await rig.up()
        before = client.stats()
        for qos in (0, 1):
            await raised(client.publish("t", b"x" * 300, qos=qos), ValueError)
            await raised(client.publish("t", b"", qos=qos, retain=True), ValueError)
            await raised(client.publish("t", b"", qos=qos, properties={"content_type": "x" * 300}), ValueError)
        await raised(client.publish("t", b"", qos=2), ValueError)
        assert client.stats() == before
        await client.acknowledged(await client.publish("t", "a", qos=1))
        assert rig.broker.trace() == ["CONNECT", "PUBLISH 1 a"]

    play5(scenario, says={"maximum_qos": 1, "retain_available": 0, "maximum_packet_size": 200})


def test_largest_packet_that_the_broker_takes_is_sent_and_no_larger_one():
    """[MQTT5-3.2.2-15]"""
    async def scenario(rig):
        client = rig.client
        await rig.up()
        # Of 100 bytes: fixed header 2, topic 3, identifier 2, property length 1.
        await client.acknowledged(await client.publish("t", b"x" * 92, qos=1))
        await client.publish("t", b"x" * 94, qos=0)
        await raised(client.publish("t", b"x" * 93, qos=1), ValueError)
        await raised(client.publish("t", b"x" * 95, qos=0), ValueError)
        await until(lambda: len(rig.broker.named("PUBLISH")) == 2)
        assert max([len(p.body) for p in rig.broker.packets[1:]]) == 98

    play5(scenario, says={"maximum_packet_size": 100})


def test_stored_messages_beyond_what_the_broker_offers_are_lowered_or_refused():
    """[MQTT5-3.2.2-11] [MQTT5-3.2.2-14] [MQTT5-3.2.2-15]"""
    for most in (0, 1):

        async def scenario(rig):
            client = rig.client
            ids = []
            for n, (qos, retain, size) in enumerate(((2, False, 1), (1, True, 1), (1, False, 300), (1, False, 1))):
                ids.append(await client.publish("t", b"%d" % n * size, qos=qos, retain=retain))
            large = asyncio.create_task(raised(client.acknowledged(ids[2]), MessageRefused))
            await turns()
            await client.start()
            assert await client.drain(20)
            assert (await large).reason_code == 0x95
            await until(lambda: len(rig.broker.delivered) == 3)
            assert rig.broker.delivered == [("t", b"%d" % n, most) for n in (0, 1, 3)]
            assert not [p for p in rig.broker.named("PUBLISH") if p.retain or p.qos > most]
            stats = client.stats()
            assert stats["refused"] == 1 and stats["lowered"] == (2 if most else 3), stats

        says = {"maximum_qos": most, "retain_available": 0, "maximum_packet_size": 200}
        play5(scenario, says=says, start=False)


def test_no_packet_at_all_is_larger_than_the_broker_takes():
    """[MQTT5-3.2.2-15]"""
    async def scenario(rig):
        client = rig.client
        await rig.up()
        for call in (client.subscribe("f" * 60, 1), client.unsubscribe("f" * 60)):
            error = await raised(call, SubscribeRefused)
            assert error.reason_code == 0x95
        assert await client.subscribe("f", 1) == 1
        await turns()
        assert [p.filter for p in rig.broker.named("SUBSCRIBE")] == ["f"] and not rig.broker.named("UNSUBSCRIBE")

    play5(scenario, says={"maximum_packet_size": 50})


def test_subscription_that_the_broker_does_not_offer_is_refused():
    for name, filters, more in (
        ("wildcard_subscription_available", ("a/+", "#", "$share/g/a/#"), {}),
        ("shared_subscription_available", ("$share/g/a",), {}),
        ("subscription_identifier_available", ("a",), {"identifier": 7}),
    ):

        async def scenario(rig):
            await rig.up()
            for topic_filter in filters:
                await raised(rig.client.subscribe(topic_filter, 1, **more), ValueError)
            assert await rig.client.subscribe("plain", 1) == 1
            assert [p.filter for p in rig.broker.named("SUBSCRIBE")] == ["plain"]

        play5(scenario, says={name: 0})


def test_subscription_asked_for_before_the_connection_is_not_sent_to_a_broker_that_does_not_offer_it():
    for name, topic_filter, more, code in (
        ("wildcard_subscription_available", "a/+", {}, 0xA2),
        ("shared_subscription_available", "$share/g/a", {}, 0x9E),
        ("subscription_identifier_available", "a", {"identifier": 7}, 0xA1),
    ):

        async def scenario(rig):
            asked = asyncio.create_task(raised(rig.client.subscribe(topic_filter, 1, **more), SubscribeRefused))
            plain = asyncio.create_task(rig.client.subscribe("plain", 1))
            await turns()
            await rig.client.start()
            assert (await asked).reason_code == code and await plain == 1
            assert [p.filter for p in rig.broker.named("SUBSCRIBE")] == ["plain"]
            assert rig.client.last_error.reason_code == code

        play5(scenario, says={name: 0}, start=False)


def test_subscription_that_the_broker_no_longer_offers_is_not_sent_again():
    async def scenario(rig):
        await rig.up()
        await rig.client.subscribe("a/+", 1)
        rig.broker.says = {"CONNACK": {"wildcard_subscription_available": 0}}
        rig.broker.forget()
        await rig.broker.drop()
        await rig.up(2)
        await rig.client.subscribe("plain", 1)
        assert [p.filter for p in rig.broker.named("SUBSCRIBE", 2)] == ["plain"]
        rig.broker.says = {}
        await rig.broker.drop()
        await rig.broker.expect("SUBSCRIBE %d a/+" % rig.broker.named("SUBSCRIBE")[0].packet_id, 1, 3)

    play5(scenario)


# Authentication.


def _authenticator(calls):
    def authenticate(data):
        calls.append(data)
        return None if data is None else b"to " + data

    return authenticate


def test_authentication_goes_back_and_forth_before_anything_else_is_sent():
    """[MQTT5-3.1.2-30] [MQTT5-4.12.0-3] [MQTT5-4.12.0-5] [MQTT5-3.15.2-2] [MQTT5-3.15.2-3]"""
    calls = []

    async def scenario(rig):
        client = rig.client
        for qos in (0, 1, 2):
            await client.publish("t", "%d" % qos, qos=qos)
        asking = asyncio.create_task(client.subscribe("f", 1))
        await client.start()
        await rig.broker.expect("AUTH 0x18")
        await turns()
        assert rig.broker.trace() == ["CONNECT", "AUTH 0x18"] and not client.connected
        rig.broker.script = []
        await rig.broker.send(told("AUTH", 0x18, dict(_METHOD, authentication_data=b"2")))
        await rig.broker.expect("AUTH 0x18", 2)
        await asking
        assert await client.drain(20)
        first, second = rig.broker.named("AUTH")
        assert first.properties == dict(_METHOD, authentication_data=b"to 1")
        assert second.properties == dict(_METHOD, authentication_data=b"to 2")
        assert calls == [None, b"1", b"2"]
        connect = rig.broker.packets[0].properties
        assert connect["authentication_method"] == "m" and "authentication_data" not in connect
        assert rig.broker.trace()[1:3] == ["AUTH 0x18", "AUTH 0x18"]

    challenge = told("AUTH", 0x18, dict(_METHOD, authentication_data=b"1"))
    script = [(1, "CONNECT", 1, challenge), (1, "AUTH", 1, "ignored")]
    play5(scenario, script, start=False, properties=_METHOD, authenticate=_authenticator(calls))


def test_authentication_data_may_begin_with_connect_and_begins_anew_with_each():
    calls = []

    def authenticate(data):
        calls.append(data)
        return b"hello"

    async def scenario(rig):
        await rig.up()
        await rig.broker.drop()
        await rig.up(2)
        for connect in rig.broker.named("CONNECT"):
            assert connect.properties["authentication_data"] == b"hello"
        assert calls == [None, None]

    play5(scenario, properties=_METHOD, authenticate=authenticate)


def test_callback_that_raises_fails_the_attempt_and_is_asked_again():
    calls = []

    def authenticate(data):
        calls.append(data)
        if len(calls) == 2:
            raise KeyError("no answer to that")

    async def scenario(rig):
        await rig.up(2)
        assert isinstance(rig.client.last_error, KeyError)

    challenge = told("AUTH", 0x18, dict(_METHOD, authentication_data=b"1"))
    play5(scenario, [(1, "CONNECT", 1, challenge)], properties=_METHOD, authenticate=authenticate)


def test_other_method_than_that_of_connect_or_none_asked_for_is_a_protocol_error():
    """[MQTT5-4.12.0-5] [MQTT5-4.12.0-6] [MQTT5-4.12.0-7] [MQTT5-3.2.0-1]"""
    other = {"authentication_method": "other"}
    for options, data in (
        ({"properties": _METHOD, "authenticate": _authenticator([])}, told("AUTH", 0x18, other)),
        ({"properties": _METHOD, "authenticate": _authenticator([])}, told("CONNACK", 0, other)),
        ({"properties": _METHOD, "authenticate": _authenticator([])}, _CONNACK),
        ({}, told("AUTH", 0x18, _METHOD)),
        ({}, told("CONNACK", 0, _METHOD)),
        ({}, _CONNACK + told("AUTH", 0x18, _METHOD)),
        ({}, _CONNACK + told("AUTH", 0, {})),
    ):

        async def scenario(rig):
            await until(lambda: 1 in rig.broker.closed)
            await until(lambda: rig.client.last_error)
            assert isinstance(rig.client.last_error, ProtocolError), data
            assert rig.client.stats()["protocol_errors"] == 1
            assert rig.broker.trace(1) == ["CONNECT", "DISCONNECT 0x82"], (data, rig.broker.trace(1))

        play5(scenario, [(1, "CONNECT", 1, data)], backoff_ms=(600000, 600000), **options)


def test_no_auth_is_sent_without_a_method():
    """[MQTT5-4.12.0-7]"""
    async def scenario(rig):
        await rig.up()
        await raised(rig.client.reauthenticate(), ValueError)
        await turns()
        assert rig.broker.trace() == ["CONNECT"]

    play5(scenario)


def test_reauthentication_has_the_same_method_and_returns_when_the_broker_agrees():
    """[MQTT5-4.12.1-1] [MQTT5-4.12.0-3] [MQTT5-4.12.0-5] [MQTT5-3.15.2-2] [MQTT5-3.15.2-3]"""
    calls = []

    async def scenario(rig):
        await rig.up()
        task = asyncio.create_task(rig.client.reauthenticate())
        await rig.broker.expect("AUTH 0x19")
        await turns()
        assert not task.done()
        await rig.broker.send(told("AUTH", 0x18, dict(_METHOD, authentication_data=b"again")))
        await rig.broker.expect("AUTH 0x18")
        await task
        first, second = rig.broker.named("AUTH")
        assert first.properties == _METHOD
        assert second.properties == dict(_METHOD, authentication_data=b"to again")
        assert rig.broker.connections == 1 and calls == [None, None, b"again"]

    script = [(1, "AUTH", 1, "silent")]
    play5(scenario, script, properties=_METHOD, authenticate=_authenticator(calls))


def test_failed_reauthentication_ends_the_connection_and_is_told():
    """[MQTT5-4.12.1-2]"""
    async def scenario(rig):
        await rig.up()
        await raised(rig.client.reauthenticate(), OSError)
        await until(lambda: 1 in rig.broker.closed)
        error = rig.client.last_error
        assert isinstance(error, Disconnected) and error.reason_code == 0x87
        await rig.up(2)

    script = [(1, "AUTH", 1, told("DISCONNECT", 0x87))]
    play5(scenario, script, properties=_METHOD, authenticate=_authenticator([]))


def test_reauthentication_ends_with_the_connection():
    async def scenario(rig):
        await rig.up()
        task = asyncio.create_task(raised(rig.client.reauthenticate(), OSError))
        await rig.broker.expect("AUTH 0x19")
        await rig.broker.drop()
        await task
        await rig.up(2)

    play5(scenario, [(1, "AUTH", 1, "silent")], properties=_METHOD, authenticate=_authenticator([]))


# PUBLISH out.

FULL = {
    "payload_format_indicator": 1,
    "content_type": "text/plain",
    "response_topic": "answers/ü",
    "correlation_data": b"\x00\xff",
    "user_properties": [("b", "1"), ("a", "ä"), ("b", "1")],
}


def test_properties_of_a_message_reach_the_broker_at_each_qos_now_and_from_the_journal():
    async def scenario(rig):
        client = rig.client
        for n in range(2):
            for qos in (0, 1, 2) if n else (1, 2):
                await client.publish("t", b"x%d" % qos, qos=qos, properties=FULL)
                await client.publish("t", b"y%d" % qos, qos=qos)
                await client.publish("t", b"z%d" % qos * 1000, qos=qos, properties=FULL)
            if not n:
                await rig.reboot()
                client = rig.client
                await rig.up()
            assert await client.drain(20)
        await until(lambda: len(rig.broker.named("PUBLISH")) == 15)
        for p in rig.broker.named("PUBLISH"):
            assert p.properties == ({} if p.payload[:1] == b"y" else FULL), p
            assert p.payload in (b"x%d" % p.qos, b"y%d" % p.qos, b"z%d" % p.qos * 1000)

    play5(scenario, start=False)


def test_bad_properties_of_a_message_are_refused_and_nothing_is_stored():
    async def scenario(rig):
        await rig.up()
        before = rig.client.stats()
        for qos in (0, 1, 2):
            for properties in (
                {"topic_alias": 1},
                {"subscription_identifiers": [1]},
                {"response_topic": "a/+"},
                {"response_topic": ""},
                {"message_expiry_interval": -1},
                {"content_type": 7},
                {"no such": 1},
            ):
                await raised(rig.client.publish("t", b"", qos=qos, properties=properties), ValueError)
        assert rig.client.stats() == before and rig.broker.trace() == ["CONNECT"]

    play5(scenario)


def test_repeated_topics_go_out_as_aliases_within_the_brokers_maximum():
    """[MQTT5-3.2.2-17] [MQTT5-3.3.2-7] [MQTT5-3.3.2-8] [MQTT5-3.3.2-9]"""
    async def scenario(rig):
        client = rig.client
        await rig.up()
        for connection in (1, 2):
            expected = []
            for n in range(12):
                topic = "plant/%d/temperature" % (n % 4)
                expected.append((topic, b"%d" % n))
                properties = FULL if n % 3 else None
                await client.acknowledged(await client.publish(topic, "%d" % n, 1 + n % 2, properties=properties))
            packets = rig.broker.named("PUBLISH", connection)
            assert [(p.topic, p.payload) for p in packets] == expected
            aliases = [p.properties.get("topic_alias") for p in packets]
            assert set(aliases) <= {None, 1, 2} and {1, 2} <= set(aliases)
            assert packets[0].properties.get("topic_alias") and not packets[0].bare and packets[4].bare
            assert len([p for p in packets if p.bare]) == 4
            for p in packets:  # a topic alone has none, unless it makes one
                properties = dict(p.properties)
                properties.pop("topic_alias", None)
                assert properties == (FULL if int(p.payload) % 3 else {})
            await rig.broker.drop()
            await rig.up(connection + 1)

    play5(scenario, says={"topic_alias_maximum": 2})


def test_qos_0_goes_out_at_the_call_with_properties_and_without():
    async def scenario(rig):
        client = rig.client
        await rig.up()
        await until(lambda: client._quick)
        client.publish("t", b"1", qos=0, properties=FULL)  # as from a plain handler
        client.publish("t", b"2", qos=0)
        await asyncio.gather(client.publish("t", b"3", qos=0, properties=FULL), client.publish("t", b"4", qos=0))
        await until(lambda: len(rig.broker.named("PUBLISH")) == 4)
        assert [p.payload for p in rig.broker.named("PUBLISH")] == [b"1", b"2", b"3", b"4"]
        assert [p.properties for p in rig.broker.named("PUBLISH")] == [FULL, {}, FULL, {}]

    play5(scenario)


def test_the_properties_of_a_message_are_its_own():
    async def scenario(rig):
        seen = []

        def came(message):
            seen.append(dict(message.properties))
            message.properties["content_type"] = "text/plain"

        rig.client.on("in", came)
        await rig.up()
        for payload in (b"1", b"2"):
            await rig.broker.publish("in", payload, properties={})
            await until(lambda: len(seen) == int(payload))
        assert seen == [{}, {}]

    play5(scenario)


def test_no_alias_is_sent_unless_the_broker_takes_some():
    """[MQTT5-3.2.2-18]"""
    for says in ({}, {"topic_alias_maximum": 0}):

        async def scenario(rig):
            client = rig.client
            await rig.up()
            for qos in (0, 1, 2, 0, 1, 2):
                await client.publish("topic", "x", qos=qos)
            assert await client.drain(20)
            await until(lambda: len(rig.broker.named("PUBLISH")) == 6)
            assert not [p for p in rig.broker.named("PUBLISH") if p.bare or "topic_alias" in p.properties]

        play5(scenario, says=says)


def test_alias_never_enters_the_journal():
    """[MQTT5-3.3.2-7]"""
    async def scenario(rig):
        client = rig.client
        await rig.up()
        for n in range(4):
            await client.publish("topic", "%d" % n, qos=1)
        await rig.broker.expect("PUBLISH 4 3")
        assert [p.bare for p in rig.broker.named("PUBLISH", 1)] == [False, True, True, True]
        rig.broker.says = {}
        client = await rig.reboot()
        assert await client.drain(20)
        assert [(p.bare, p.topic) for p in rig.broker.named("PUBLISH", 2)] == [(False, "topic")] * 4

    play5(scenario, [(1, "PUBLISH", 0, "silent")], says={"topic_alias_maximum": 5})


def test_large_messages_with_aliases_go_out_whole():
    """[MQTT5-3.2.2-17]"""
    async def scenario(rig):
        client = rig.client
        payload = b"0123456789" * 150
        for n in range(3):
            await client.publish("large", payload, qos=1 + n % 2, properties=FULL)
        await client.start()
        assert await client.drain(20)
        assert [p for _, p, _ in rig.broker.delivered] == [payload] * 3
        assert [p.bare for p in rig.broker.named("PUBLISH")] == [False, True, True]

    play5(scenario, start=False, says={"topic_alias_maximum": 5}, in_flight=2, size=131072)


# Flow control.


def test_receive_maximum_of_the_broker_is_held_exactly_on_every_connection():
    """[MQTT5-3.3.4-7] [MQTT5-4.9.0-1] [MQTT5-4.9.0-2]"""
    async def scenario(rig):
        client = rig.client
        await rig.up()
        for n in range(7):
            await client.publish("t", "%d" % n, qos=1 + n % 2)
        await rig.broker.expect("PUBLISH 2 1")
        await turns()
        assert len(rig.broker.named("PUBLISH", 1)) == 2
        await rig.broker.send(ack("PUBACK", 1))
        await rig.broker.expect("PUBLISH 3 2")
        await rig.broker.send(ack("PUBREC", 2))  # 2 counts until PUBCOMP
        await rig.broker.expect("PUBREL 2")
        await turns()
        assert len(rig.broker.named("PUBLISH", 1)) == 3
        await rig.broker.send(ack("PUBCOMP", 2))
        await rig.broker.expect("PUBLISH 4 3")
        await turns()
        rig.broker.says = {"CONNACK": {"receive_maximum": 1}}
        await rig.broker.drop()
        await rig.broker.expect("PUBLISH 3 dup 2", connection=2)
        await turns()
        assert rig.broker.trace(2) == ["CONNECT", "PUBLISH 3 dup 2"]
        rig.broker.says = {}
        rig.broker.script = []
        await rig.broker.drop()
        assert await client.drain(20)
        numbers = [int(p.payload) for p in rig.broker.named("PUBLISH", 3)]
        assert numbers == sorted(numbers) == list(range(2, 7))

    script = [(1, "PUBLISH", 0, "silent"), (1, "PUBREL", 0, "silent"), (2, "PUBLISH", 0, "silent")]
    play5(scenario, script, says={"receive_maximum": 2})


def test_refused_message_makes_room_for_the_next():
    """[MQTT5-4.9.0-2]"""
    async def scenario(rig):
        client = rig.client
        await rig.up()
        for n in range(3):
            await client.publish("t", "%d" % n, qos=2)
        await rig.broker.expect("PUBLISH 1 0")
        await turns()
        assert len(rig.broker.named("PUBLISH")) == 1
        await rig.broker.send(ack("PUBREC", 1, 0x87))
        await rig.broker.expect("PUBLISH 2 1")

    play5(scenario, [(0, "PUBLISH", 0, "silent")], says={"receive_maximum": 1})


def test_used_up_quota_delays_nothing_but_publish():
    """[MQTT5-3.3.4-8] [MQTT5-4.9.0-3]"""
    async def scenario(rig):
        client = rig.client
        got = []
        client.on("in", lambda message: got.append(message.payload))
        hurry(client, 4)
        await client.start()
        await rig.up()
        await client.publish("t", "first", qos=2)
        await rig.broker.expect("PUBLISH 1 first")
        await client.publish("t", "waits", qos=1)
        assert await client.subscribe("in", 2) == 2
        await client.publish("t", "zero", qos=0)
        await rig.broker.publish("in", b"1", 1, 7)
        await rig.broker.publish("in", b"2", 2, 8)
        await rig.broker.expect("PUBACK 7")
        await rig.broker.expect("PUBCOMP 8")
        await client.unsubscribe("in")
        await rig.broker.expect("PINGREQ")
        await rig.broker.expect("PUBLISH zero")
        await rig.broker.send(ack("PUBREC", 1))
        await rig.broker.expect("PUBREL 1")
        assert got == [b"1", b"2"]
        await rig.broker.expect("PUBLISH 2 waits")  # its PUBCOMP made the room
        order = rig.broker.trace()
        assert order.index("PUBREL 1") < order.index("PUBLISH 2 waits")

    play5(scenario, [(0, "PUBLISH", 1, "silent")], says={"receive_maximum": 1}, start=False)


def test_pubrels_are_sent_again_whatever_the_quota():
    """[MQTT5-3.3.4-8] [MQTT5-4.9.0-3]"""
    async def scenario(rig):
        client = rig.client
        await rig.up()
        for n in range(3):
            await client.publish("t", "%d" % n, qos=2)
        await rig.broker.expect("PUBREL 3")
        rig.broker.says = {"CONNACK": {"receive_maximum": 1}}
        await rig.broker.drop()
        await rig.broker.expect("PUBREL 3", connection=2)
        assert rig.broker.trace(2) == ["CONNECT", "PUBREL 1", "PUBREL 2", "PUBREL 3"]

    play5(scenario, [(0, "PUBREL", 0, "silent")])


def test_broker_that_sends_more_than_the_client_keeps_in_mind_is_told_why_it_gets_a_new_connection():
    """[MQTT5-3.3.4-9]"""
    async def scenario(rig):
        got = []
        rig.client.on("t", lambda message: got.append(int(message.payload)))
        await rig.up()
        for n in range(1, 258):
            await rig.broker.publish("t", b"%d" % n, 2, n)
        await rig.up(2)
        assert rig.broker.trace(1)[-1] == "DISCONNECT 0x93"
        assert got == list(range(1, 257)) and rig.client.stats()["passed_over"] == 1

    play5(scenario, [(1, "PUBREC", 0, "silent")])


# What the broker says of a message.


def test_refused_message_is_finished_counted_told_and_never_sent_again():
    """[MQTT5-4.4.0-2] [MQTT5-4.3.3-4] [MQTT5-3.4.2-1] [MQTT5-3.5.2-1]"""
    for qos in (1, 2):
        for code in (0x80, 0x83, 0x87, 0x90, 0x91, 0x99):

            async def scenario(rig):
                client = rig.client
                await rig.up()
                packet_id = await client.publish("t", "a", qos=qos)
                error = await raised(client.acknowledged(packet_id), MessageRefused)
                assert error.reason_code == code
                await client.publish("t", "b", qos=qos)
                assert await client.drain(20)
                stats = client.stats()
                assert stats["refused"] == 1 and stats["waiting"] == 0 and stats["acknowledged"] in (1, 2)
                await rig.broker.drop()
                await rig.up(2)
                await client.close()
                client = await rig.reboot()
                await rig.up(3)
                await turns()
                expected = ["CONNECT", "PUBLISH 1 a", "PUBLISH 2 b"] + (["PUBREL 2"] if qos == 2 else [])
                assert rig.broker.trace(1) == expected
                assert rig.broker.trace(2) == ["CONNECT", "DISCONNECT"] and rig.broker.trace(3) == ["CONNECT"]

            play5(scenario, [(1, "PUBLISH", 1, "refuse %d" % code)])


def test_no_matching_subscribers_is_no_refusal():
    async def scenario(rig):
        for qos in (1, 2):
            await rig.client.acknowledged(await rig.client.publish("t", "a", qos=qos))
        assert rig.client.stats()["refused"] == 0 and rig.client.stats()["acknowledged"] == 2
        assert rig.broker.trace()[-1] == "PUBREL 2"

    play5(scenario, [(0, "PUBLISH", 0, "refuse 16")])


def test_message_beyond_a_quota_is_sent_again_as_new_after_growing_pauses():
    async def scenario(rig):
        client = rig.client
        client.on("in", lambda message: None)
        with _Pulses5(client) as clock:
            await client.start()
            await rig.up()
            waiting = asyncio.create_task(client.acknowledged(await client.publish("t", "a", qos=1)))
            await client.publish("t", "b", qos=1)
            await rig.broker.expect("PUBLISH 2 b")
            sent = []  # seconds
            for second in range(1, 60):
                await clock.pulse(1000)
                for n in (2 * second, 2 * second + 1):  # there and back, and what came of it
                    await rig.broker.publish("in", b"", 1, n)
                    await rig.broker.expect("PUBACK %d" % n)
                n = len([p for p in rig.broker.named("PUBLISH") if p.packet_id == 1])
                while len(sent) < n - 1:
                    sent.append(second)
                if waiting.done():
                    break
            assert waiting.done(), sent
            await waiting
            assert len(sent) == 3 and 4 <= sent[0] <= 7, sent
            assert sent[1] - sent[0] >= 9 and sent[2] - sent[1] >= 18, sent
            assert not [p for p in rig.broker.named("PUBLISH") if p.dup]
            assert client.stats()["postponed"] == 3 and client.stats()["refused"] == 0
            assert rig.broker.connections == 1

    script = [(0, "PUBLISH", n, "refuse 151") for n in (1, 3, 4)]
    play5(scenario, script, start=False, keep_alive_s=0)


def test_message_beyond_a_quota_is_sent_on_the_next_connection():
    async def scenario(rig):
        client = rig.client
        await rig.up()
        await client.publish("t", "a", qos=2)
        await until(lambda: client.stats()["postponed"] == 1)
        await rig.broker.drop()
        assert await client.drain(20)
        assert [payload for _, payload, _ in rig.broker.delivered] == [b"a"]
        assert not rig.broker.named("PUBREL", 1)

    play5(scenario, [(1, "PUBLISH", 1, "refuse 151")])


def test_release_that_the_broker_does_not_know_ends_the_message():
    async def scenario(rig):
        client = rig.client
        await client.acknowledged(await client.publish("t", "a", qos=2))
        assert client.stats()["waiting"] == 0 and rig.broker.connections == 1

    play5(scenario, [(1, "PUBREL", 1, "refuse 146")])


def test_acknowledgements_of_nothing_are_answered_with_their_reason_code_and_no_more():
    """[MQTT5-3.6.2-1] [MQTT5-3.6.2-2] [MQTT5-3.6.2-3] [MQTT5-3.7.2-1] [MQTT5-3.7.2-2] [MQTT5-3.7.2-3]"""
    async def scenario(rig):
        await rig.up()
        for name in ("PUBREC", "PUBREL", "PUBACK", "PUBCOMP"):
            await rig.broker.send(ack(name, 999))
        await rig.broker.expect("PUBREL 999 0x92")
        await rig.broker.expect("PUBCOMP 999 0x92")
        await rig.client.acknowledged(await rig.client.publish("t", "a"))
        # The broker answers the PUBREL by one more PUBCOMP.
        await until(lambda: rig.client.stats()["unknown_acks"] >= 3)
        assert rig.broker.connections == 1
        for name in ("PUBREL", "PUBCOMP"):
            [p] = rig.broker.named(name)
            assert len(p.body) == 3

    play5(scenario)


# Message expiry.


class _Wall:
    """The time of the client's clock() is what .now says."""

    def __init__(self, rig, now=1 << 30):
        self.rig = rig
        self.now = now
        self.take(rig.client)

    def take(self, client):
        client.store._clock = lambda: self.now


def test_message_that_expired_in_the_journal_is_dropped_counted_and_told():
    async def scenario(rig):
        client = rig.client
        wall = _Wall(rig)
        ids = []
        for n in (10, 11, 30):
            properties = {"message_expiry_interval": n}
            ids.append(await client.publish("t", "%d" % n, qos=1 + n % 2, properties=properties))
        ids.append(await client.publish("t", "stays", qos=1))
        waiting = [asyncio.create_task(raised(client.acknowledged(n), MessageDropped)) for n in ids[:2]]
        waiting += [asyncio.create_task(client.acknowledged(n)) for n in ids[2:]]
        await turns()
        wall.now += 11
        await client.start()
        for task in waiting:
            await task
        assert client.stats()["expired"] == 2
        [thirty, stays] = rig.broker.named("PUBLISH")
        assert thirty.properties == {"message_expiry_interval": 19} and thirty.payload == b"30"
        assert stays.properties == {} and stays.payload == b"stays"

    play5(scenario, start=False)


def test_message_that_was_sent_does_not_expire_any_more():
    """[MQTT5-4.3.3-7]"""
    async def scenario(rig):
        client = rig.client
        wall = _Wall(rig)
        await client.start()
        for qos in (1, 2):
            await client.publish("t", "%d" % qos, qos=qos, properties={"message_expiry_interval": 10})
        await rig.broker.expect("PUBLISH 2 2")
        wall.now += 1000
        await rig.broker.drop()
        assert await client.drain(20)
        assert rig.broker.trace(2)[1:3] == ["PUBLISH 1 dup 1", "PUBLISH 2 dup 2"] and "PUBREL 2" in rig.broker.trace(2)
        assert client.stats()["expired"] == 0

    play5(scenario, SILENT, start=False)


def test_handshake_of_a_message_that_expired_goes_on():
    """[MQTT5-4.3.3-7] [MQTT5-4.3.3-13]"""
    async def scenario(rig):
        client = rig.client
        wall = _Wall(rig)
        held = Gate(client)
        await client.start()
        await client.publish("t", "a", qos=2, properties={"message_expiry_interval": 1})
        await rig.broker.expect("PUBREL 1")
        await rig.broker.publish("t", b"b", 2, 9, properties={"message_expiry_interval": 1})
        await until(lambda: held.messages)
        wall.now += 1000
        held.gate.set()
        await rig.broker.expect("PUBREC 9")
        await rig.broker.expect("PUBCOMP 9")
        await rig.broker.drop()
        await rig.broker.expect("PUBREL 1", connection=2)
        assert await client.drain(20) and client.stats()["expired"] == 0

    play5(scenario, [(1, "PUBREL", 1, "ignored")], start=False)


# PUBLISH in.


def test_message_tells_its_properties_at_each_qos_to_every_kind_of_program():
    async def scenario(rig):
        got = []

        async def later(message):
            await asyncio.sleep_ms(0)
            got.append(message)

        rig.client.on("plain/#", got.append)
        rig.client.on("coroutine/#", later)

        async def loop():
            async for message in rig.client.messages:
                got.append(message)

        await rig.up()
        task = asyncio.create_task(loop())
        await turns()
        expected = dict(FULL, message_expiry_interval=60, subscription_identifiers=[3, 268435455])
        for topic in ("plain/ü", "coroutine/1", "loop/1"):
            for qos in (0, 1, 2):
                await rig.broker.publish(topic, b"x", qos, qos and len(topic) * 10 + qos, properties=expected)
                await rig.broker.publish(topic, b"y", qos, qos and len(topic) * 10 + qos + 5)
        await until(lambda: len(got) == 18)
        for message in got:
            assert message.properties == (expected if message.payload == b"x" else {}), message.topic
        task.cancel()

    play5(scenario)


def test_properties_of_a_message_that_waits_are_still_its_own():
    async def scenario(rig):
        held = Gate(rig.client)
        await rig.up()
        for n in range(1, 4):
            await rig.broker.publish("t", b"%d" % n, 1, n, properties={"content_type": "c%d" % n})
        await rig.broker.publish("t", b"4", 1, 4)
        await until(lambda: held.messages)
        held.gate.set()
        await rig.broker.expect("PUBACK 4")
        assert [m.properties.get("content_type") for m in held.messages] == ["c1", "c2", "c3", None]

    play5(scenario)


def test_aliases_of_the_broker_are_resolved_and_forgotten_with_the_connection():
    """[MQTT5-3.3.2-7] [MQTT5-3.3.2-10]"""
    async def scenario(rig):
        got = []
        rig.client.on("#", lambda message: got.append((message.topic, message.properties)))
        await rig.up()
        for alias in range(1, 17):
            await rig.broker.publish("topic/%d" % alias, b"", properties={"topic_alias": alias})
        for alias in range(16, 0, -1):
            await rig.broker.publish("", b"", 1, alias, properties={"topic_alias": alias})
        await until(lambda: len(got) == 32)
        assert got == [("topic/%d" % n, {}) for n in list(range(1, 17)) + list(range(16, 0, -1))]
        await rig.broker.drop()
        await rig.up(2)
        await rig.broker.publish("", b"", properties={"topic_alias": 1})
        await rig.broker.expect("DISCONNECT 0x82", connection=2)
        assert len(got) == 32 and rig.client.stats()["protocol_errors"] == 1

    play5(scenario)


def test_handler_of_a_shared_subscription_gets_what_matches_its_filter():
    async def scenario(rig):
        got = []
        rig.client.on("$share/group/plant/+/cmd", lambda message: got.append(message.topic))
        await rig.up()
        assert await rig.client.subscribe("$share/group/plant/+/cmd", 1) == 1
        await rig.broker.publish("plant/7/cmd", b"x", 1, 1)
        await rig.broker.publish("plant/7/other", b"x", 1, 2)
        await rig.broker.expect("PUBACK 2")
        assert got == ["plant/7/cmd"] and rig.broker.named("SUBSCRIBE")[0].filter == "$share/group/plant/+/cmd"

    play5(scenario)


# Subscriptions.


def test_subscription_carries_its_options_and_identifier():
    async def scenario(rig):
        client = rig.client
        assert await client.subscribe("a", 1) == 1
        assert await client.subscribe("b", 2, no_local=True) == 2
        assert await client.subscribe("c", 0, retain_as_published=True) == 0
        assert await client.subscribe("d", 1, retain_handling=1) == 1
        assert await client.subscribe("e", 1, True, True, 2, 268435455) == 1
        identified = {"subscription_identifiers": 268435455}
        expected = [("a", 1, {}), ("b", 6, {}), ("c", 8, {}), ("d", 0x11, {}), ("e", 0x2D, identified)]
        found = []
        for topic_filter, options, properties in subscriptions(rig):
            identifiers = properties.get("subscription_identifiers")
            if isinstance(identifiers, list):
                properties = {"subscription_identifiers": identifiers[0]}
            found.append((topic_filter, options, properties))
        assert found == expected

    play5(scenario)


def test_bad_options_of_a_subscription_are_value_errors():
    """[MQTT5-3.8.3-4]"""
    async def scenario(rig):
        await rig.up()
        for arguments, more in (
            (("a", 3), {}),
            (("a", 1), {"retain_handling": 3}),
            (("$share/g/a", 1), {"no_local": True}),
            (("$share/g", 1), {}),
            (("$share//a", 1), {}),
            (("a", 1), {"identifier": 0}),
            (("a", 1), {"identifier": 268435456}),
        ):
            await raised(rig.client.subscribe(*arguments, **more), ValueError)
        await turns()
        assert rig.broker.trace() == ["CONNECT"]

    play5(scenario)


def test_subscription_is_made_again_with_its_options_and_identifier_and_only_when_needed():
    async def scenario(rig):
        client = rig.client
        await client.subscribe("f", 1, no_local=True, retain_handling=2, identifier=7)
        await client.subscribe("f", 1, no_local=True, retain_handling=2, identifier=7)
        assert len(subscriptions(rig)) == 1
        rig.broker.forget()
        await rig.broker.drop()
        await until(lambda: len(subscriptions(rig)) == 2)
        first, second = subscriptions(rig)
        assert first == second and first[1] == 0x25 and first[2]
        assert await client.subscribe("f", 1, no_local=True, retain_handling=1, identifier=7) == 1  # something else
        assert subscriptions(rig)[2][1] == 0x15
        client = await rig.reboot()
        await rig.up(3)
        assert await client.subscribe("f", 1, no_local=True, retain_handling=1, identifier=7) == 1
        assert len(subscriptions(rig)) in (3, 4)  # an identifier need not be known after a reset

    play5(scenario)


def test_refused_subscription_tells_why():
    for code in (0x80, 0x83, 0x87, 0x8F, 0x91, 0x97, 0x9E, 0xA1, 0xA2):

        async def scenario(rig):
            error = await raised(rig.client.subscribe("secret/#", 2), SubscribeRefused)
            assert error.filter == "secret/#" and error.reason_code == code

        play5(scenario, [(1, "SUBSCRIBE", 1, "refuse %d" % code)])


def test_unsubscribe_of_what_the_broker_does_not_have_is_done():
    async def scenario(rig):
        await rig.client.unsubscribe("f")
        assert rig.broker.trace()[1:] == ["UNSUBSCRIBE %d f" % rig.broker.named("UNSUBSCRIBE")[0].packet_id]

    play5(scenario, [(1, "UNSUBSCRIBE", 1, "refuse 17")])


# The end of a connection.

ENDINGS = (
    # reason code, whether the client waits as long as it can
    (0x00, False),
    (0x80, False),
    (0x87, True),
    (0x89, False),
    (0x8B, False),
    (0x8D, False),
    (0x8E, True),
    (0x97, True),
    (0x98, False),
    (0x9C, True),
    (0x9D, True),
    (0xA0, False),
)


def test_disconnect_of_the_broker_is_told_and_decides_when_it_is_asked_again():
    """[MQTT5-4.13.2-1] [MQTT5-3.14.4-2]"""
    for code, lasting in ENDINGS:
        attempts = []

        async def scenario(rig):
            client = rig.client
            pause_ms = client._pause_ms

            def note():
                attempts.append(client._attempt)
                return pause_ms()

            client._pause_ms = note
            await client.start()
            await rig.up()
            client._attempt = 0
            await rig.broker.send(told("DISCONNECT", code, {"reason_string": "as a test", "server_reference": "b"}))
            await until(lambda: 1 in rig.broker.closed)  # the client closes
            await rig.up(2)
            error = client.last_error
            assert isinstance(error, Disconnected) and error.reason_code == code, (code, error)
            assert error.properties == {"reason_string": "as a test", "server_reference": "b"}
            assert attempts == [16 if lasting else 0], (code, attempts)
            assert rig.broker.trace(1) == ["CONNECT"] and client.stats()["protocol_errors"] == 0

        play5(scenario, start=False)


def test_disconnect_before_connack_is_a_protocol_error():
    """[MQTT5-3.14.0-1] [MQTT5-3.2.0-1]"""
    async def scenario(rig):
        await rig.up(2)
        assert isinstance(rig.client.last_error, ProtocolError) and rig.client.stats()["protocol_errors"] == 1

    play5(scenario, [(1, "CONNECT", 1, told("DISCONNECT", 0x89))])


def test_close_says_how_and_for_how_long():
    """[MQTT5-3.14.4-1] [MQTT5-3.14.4-2] [MQTT5-3.14.2-3] [MQTT5-3.14.2-4]"""
    for arguments, text, properties in (
        ({}, "DISCONNECT", {}),
        ({"reason_code": 4}, "DISCONNECT 0x04", {}),
        ({"session_expiry_s": 30}, "DISCONNECT", {"session_expiry_interval": 30}),
        ({"reason_code": 4, "session_expiry_s": 0}, "DISCONNECT 0x04", {"session_expiry_interval": 0}),
    ):

        async def scenario(rig):
            await rig.up()
            await rig.client.close(**arguments)
            await until(lambda: 1 in rig.broker.closed)
            assert rig.broker.trace()[-1] == text and rig.broker.packets[-1].properties == properties
            # The next close() is as usual.
            await rig.client.start()
            await rig.up(2)
            assert rig.client.session_present == (arguments.get("session_expiry_s") != 0)
            await rig.client.close()
            await until(lambda: 2 in rig.broker.closed)
            assert rig.broker.trace()[-1] == "DISCONNECT" and not rig.broker.packets[-1].properties

        play5(scenario)


def test_bad_arguments_of_close_are_value_errors_and_the_client_goes_on():
    async def scenario(rig):
        await rig.up()
        await raised(rig.client.close(reason_code=0x8E), ValueError)
        await raised(rig.client.close(session_expiry_s=-1), ValueError)
        await rig.client.acknowledged(await rig.client.publish("t", "a"))
        assert rig.broker.connections == 1

    play5(scenario)


# Violations: what the broker sends in place of an answer, and the code it is told.

VIOLATIONS = (
    ("CONNECT", b"\x20\x03\x02\x00\x00", 0x81),  # flags of CONNACK
    ("CONNECT", b"\x20\x03\x01\x87\x00", 0x82),  # session present in a refusal
    ("CONNECT", publish("t", b"before CONNACK", properties={}), 0x82),
    ("CONNECT", b"\x21\x03\x00\x00\x00", 0x81),
    ("CONNECT", _CONNACK + _CONNACK, 0x82),
    ("PUBLISH", _CONNACK, 0x82),
    ("PUBLISH", b"\x00\x00", 0x82),
    ("PUBLISH", b"\x36\x06\x00\x01a\x00\x01\x00", 0x81),  # QoS 3
    ("PUBLISH", publish("t", b"x", dup=True, properties={}), 0x81),
    ("PUBLISH", publish("t", b"x", 1, 0, properties={}), 0x82),  # identifier 0
    ("PUBLISH", publish("a/#", b"x", properties={}), 0x82),
    ("PUBLISH", publish("", b"x", properties={}), 0x82),
    ("PUBLISH", publish("t", b"x", properties={"topic_alias": 17}), 0x94),
    ("PUBLISH", publish("t", b"x", properties=b"\x03\x23\x00\x00"), 0x94),
    ("PUBLISH", publish("t", b"x", properties=b"\x02\x01\x02"), 0x82),  # payload format 2
    ("PUBLISH", publish("t", b"x", properties=b"\x05\x11\x00\x00\x00\x01"), 0x81),  # no property of PUBLISH
    ("PUBLISH", packet(0x30, b"\x00\x01\xff\x00"), 0x81),  # a topic that is no UTF-8
    ("PUBLISH", ack("PUBACK", 1, 0x11), 0x82),  # no reason code of PUBACK
    ("PUBLISH", ack("PUBREC", 1), 0x82),  # of a QoS 1 message
    ("PUBLISH", b"\x40\x02\x00\x00", 0x82),
    ("PUBLISH", b"\x42\x02\x00\x01", 0x81),
    ("PUBLISH", b"\x60\x02\x00\x01", 0x81),
    ("PUBLISH", b"\x40\x80\x80\x80\x80\x01", 0x81),
    ("PUBLISH", b"\xe0\x07\x00\x05\x11\x00\x00\x00\x01", 0x81),  # session expiry from a server
    ("PUBLISH", b"\xe1\x00", 0x81),
    ("PUBLISH", b"\xf1\x00", 0x81),
    ("PUBLISH", b"\xf0\x00", 0x82),
    ("SUBSCRIBE", b"\x90\x04\xfe\x00\x00\x03", 0x82),  # reason code 3
    ("SUBSCRIBE", b"\x90\x05\xfe\x00\x00\x01\x01", 0x82),  # two for one filter
    ("SUBSCRIBE", b"\xb0\x04\xfe\x00\x00\x00", 0x82),  # UNSUBACK
)


def test_violation_is_answered_by_its_reason_code_counted_and_loses_nothing():
    """[MQTT5-1.5.4-1] [MQTT5-2.1.3-1] [MQTT5-2.2.1-4] [MQTT5-3.2.0-1] [MQTT5-3.2.0-2] [MQTT5-3.2.2-1] [MQTT5-3.2.2-6]
    [MQTT5-3.3.1-2] [MQTT5-3.3.1-4] [MQTT5-3.3.2-2] [MQTT5-3.3.2-11] [MQTT5-3.8.4-6] [MQTT5-3.14.1-1] [MQTT5-3.14.2-2]
    [MQTT5-3.14.2-3] [MQTT5-3.14.2-4] [MQTT5-3.15.1-1]
    """
    for name, data, code in VIOLATIONS:

        async def scenario(rig):
            client = rig.client
            got = []
            client.on("#", got.append)
            await client.publish("t", "a", qos=1)
            await client.start()
            if name == "SUBSCRIBE":
                await client.subscribe("f", 2)
            assert await client.drain(20)
            case = name, data, rig.broker.trace(1)
            assert client.stats()["protocol_errors"] == 1, case
            assert isinstance(client.last_error, ProtocolError) and client.last_error.reason_code == code, case
            assert [p.reason_code for p in rig.broker.named("DISCONNECT", 1)] == [code], case
            said = [p for p in rig.broker.packets if p.connection == 1][-1]
            assert said.name == "DISCONNECT" and len(said.body) == 1, case
            assert rig.broker.connections == 2 and rig.broker.delivered[0][1] == b"a" and not got, case

        play5(scenario, [(1, name, 1, data)], start=False)


def test_message_larger_than_we_take_ends_the_connection_with_its_reason_code():
    """[MQTT5-3.1.2-24]"""
    async def scenario(rig):
        got = []
        rig.client.on("#", lambda message: got.append(len(message.payload)))
        await rig.up()
        size = 4096 - 3 - 3 - 1  # fixed header, topic, property length
        await rig.broker.publish("t", b"x" * size)
        await until(lambda: got)
        await rig.broker.publish("t", b"x" * (size + 1))
        await rig.broker.expect("DISCONNECT 0x95", connection=1)
        await rig.up(2)
        assert got == [size]

    play5(scenario)


def test_nothing_follows_the_disconnect_that_answers_a_violation_and_the_client_closes():
    """[MQTT5-3.14.4-1] [MQTT5-3.14.4-2]"""
    async def scenario(rig):
        client = rig.client
        running = [True]

        async def program():
            n = 0
            while running:
                await client.publish("t", "x", qos=n % 3)
                n += 1

        await until(lambda: client.connected)
        task = asyncio.create_task(program())
        await turns()
        await rig.broker.send(b"\x00\x00")
        await until(lambda: 1 in rig.broker.closed)  # not by the broker, which would listen on
        running.clear()
        await task
        assert rig.broker.heard[0][-3:] == b"\xe0\x01\x82" and rig.broker.heard[0].count(b"\xe0\x01\x82") == 1

    play_raw(scenario, _CONNACK, version=5, in_flight=64, when_full="drop_oldest", backoff_ms=(600000, 600000))


def test_nothing_follows_the_disconnect_of_close_either():
    """[MQTT5-3.14.4-1]"""
    async def scenario(rig):
        client = rig.client
        await until(lambda: client.connected)

        end = client._said.set

        def said():
            client._failed(ProtocolError("a violation, read when it has gone out"))
            end()

        client._said.set = said
        await client.close()
        await until(lambda: 1 in rig.broker.closed)
        assert rig.broker.heard[0][-2:] == b"\xe0\x00"

    play_raw(scenario, _CONNACK, version=5)


# Request and response.


def test_request_returns_the_answer_that_has_its_correlation_data():
    async def scenario(rig):
        client = rig.client
        got = []
        client.on("#", got.append)
        await rig.up()
        tasks = [asyncio.create_task(client.request("service", "question %d" % n)) for n in range(2)]
        await until(lambda: len(rig.broker.named("PUBLISH")) == 2)
        asked = rig.broker.named("PUBLISH")
        topic = asked[0].properties["response_topic"]
        assert topic == asked[1].properties["response_topic"] == "devices/p7/responses"
        data = [p.properties["correlation_data"] for p in asked]
        assert data[0] != data[1]
        assert rig.broker.named("SUBSCRIBE")[0].filter == topic
        for n in (1, 0):  # in another order
            await rig.broker.publish(topic, b"answer %d" % n, 1, 5 + n, properties={"correlation_data": data[n]})
        await rig.broker.publish(topic, b"to nobody", 1, 9, properties={"correlation_data": b"?"})
        await rig.broker.publish(topic, b"to nobody", 1, 10)
        for n, task in enumerate(tasks):
            assert (await task).payload == b"answer %d" % n
        for packet_id in (5, 6, 9, 10):
            await rig.broker.expect("PUBACK %d" % packet_id)
        assert not got

    play5(scenario)


def test_request_that_nobody_answers_times_out():
    async def scenario(rig):
        await rig.up()
        await raised(rig.client.request("service", "?", timeout_s=0.05), asyncio.TimeoutError)
        await raised(rig.client.request("service", "?", timeout_s=0.05), asyncio.TimeoutError)
        assert len(rig.broker.named("SUBSCRIBE")) == 1
        await rig.client.acknowledged(await rig.client.publish("t", "a"))

    play5(scenario)


def test_request_without_a_connection_times_out_and_nothing_is_stored():
    async def scenario(rig):
        # A limit of its own, or this test would wait as long as the fault it looks for.
        asked = raised(rig.client.request("svc", "?", timeout_s=0.01), asyncio.TimeoutError)
        await asyncio.wait_for(asked, 10)
        assert rig.client.stats()["stored"] == 0 and not rig.client._calls

    play5(scenario, start=False)


def test_requests_before_the_first_connection_wait_for_the_client_identifier():
    async def scenario(rig):
        tasks = [asyncio.create_task(rig.client.request("svc", "?", timeout_s=60)) for _ in range(2)]
        await turns()
        await rig.client.start()
        await until(lambda: len(rig.broker.named("PUBLISH")) == 2)
        for asked in rig.broker.named("PUBLISH"):
            assert asked.properties["response_topic"] == "devices/given/responses"
            more = {"correlation_data": asked.properties["correlation_data"]}
            await rig.broker.publish("devices/given/responses", b"!", properties=more)
        for task in tasks:
            assert (await task).payload == b"!"
        assert len(rig.client._handlers) == 1

    play5(scenario, says={"assigned_client_identifier": "given"}, start=False, client_id="")


def test_request_uses_the_response_information_of_the_broker():
    async def scenario(rig):
        client = rig.client
        await rig.up()
        task = asyncio.create_task(client.request("service", "?", properties={"content_type": "c"}))
        await until(lambda: rig.broker.named("PUBLISH"))
        [asked] = rig.broker.named("PUBLISH")
        topic = asked.properties["response_topic"]
        assert topic.startswith("answers/p7") and asked.properties["content_type"] == "c"
        properties = {"correlation_data": asked.properties["correlation_data"]}
        await rig.broker.publish(topic, b"!", properties=properties)
        assert (await task).payload == b"!"

    play5(scenario, says={"response_information": "answers/p7"}, properties={"request_response_information": 1})


def test_reply_goes_where_the_request_says():
    async def scenario(rig):
        client = rig.client

        async def serve(message):
            await client.reply(message, b"re " + message.payload, properties={"content_type": "c"})

        client.on("service", serve)
        await rig.up()
        properties = {"response_topic": "answers/9", "correlation_data": b"\x00\x01"}
        await rig.broker.publish("service", b"q", 1, 7, properties=properties)
        await rig.broker.expect("PUBACK 7")
        assert await client.drain(20)
        [said] = rig.broker.named("PUBLISH")
        assert (said.topic, said.payload, said.qos) == ("answers/9", b"re q", 1)
        assert said.properties == {"correlation_data": b"\x00\x01", "content_type": "c"}

    play5(scenario)


def test_reply_to_what_asks_for_none_is_a_value_error():
    async def scenario(rig):
        got = []
        rig.client.on("#", got.append)
        await rig.up()
        await rig.broker.publish("t", b"x")
        await until(lambda: got)
        await raised(rig.client.reply(got[0], b""), ValueError)

    play5(scenario)


def test_no_packet_that_could_tell_a_reason_does_whatever_the_broker_takes():
    """[MQTT5-3.4.2-2] [MQTT5-3.4.2-3] [MQTT5-3.5.2-2] [MQTT5-3.5.2-3] [MQTT5-3.6.2-2] [MQTT5-3.6.2-3] [MQTT5-3.7.2-2]
    [MQTT5-3.7.2-3] [MQTT5-3.14.2-3] [MQTT5-3.14.2-4]
    """
    async def scenario(rig):
        client = rig.client
        client.on("#", lambda message: None)
        await rig.up()
        await client.publish("t", "a", qos=2)
        await rig.broker.publish("t", b"b", 1, 1)
        await rig.broker.publish("t", b"c", 2, 2)
        await rig.broker.expect("PUBCOMP 2")
        assert await client.drain(20)
        await rig.broker.send(ack("PUBREC", 99) + ack("PUBREL", 98))
        await rig.broker.expect("PUBCOMP 98 0x92")
        await rig.broker.send(b"\x00\x00")
        await until(lambda: rig.broker.named("DISCONNECT"))
        quiet = [p for p in rig.broker.packets if p.name in ("PUBACK", "PUBREC", "PUBREL", "PUBCOMP", "DISCONNECT")]
        assert len({p.name for p in quiet}) == 5
        for p in quiet:
            assert p.properties == {} and 2 + len(p.body) <= 5, p

    play5(scenario, says={"maximum_packet_size": 60})
