"""The client against a real mosquitto, over a link that fails on command; paho-mqtt is the far side.

What is counted is what the far side's own persistent session has received: messages are numbered by their mark.
"""

import asyncio
import contextlib
import queue
import random
import threading

import paho.mqtt.client as paho
from brokers import Mosquitto
from fakebroker import turns
from mqtt_durable.client import Client
from mqtt_durable.errors import ConnectRefused, JournalUnavailable
from mqtt_durable.reasons import MessageRefused
from norsim import Nor, PowerCut
from packet_types import PUBACK, PUBCOMP, PUBLISH, PUBREC, PUBREL
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from proxy import DOWN, UP, Proxy

PATIENCE_S = 60


class Far:
    """A paho client with a persistent session.  .payloads: what it has received, in order; .messages: all of it."""

    def __init__(self, broker, name="far", clean=False, version=4):
        self.payloads = []
        self.retained = []
        self.messages = []
        self._connected = threading.Event()
        self._subscribed = queue.Queue()
        if version == 5:
            self.client = paho.Client(paho.CallbackAPIVersion.VERSION2, name, protocol=paho.MQTTv5)
        else:
            self.client = paho.Client(paho.CallbackAPIVersion.VERSION2, name, clean_session=clean)
        self.client.on_connect = lambda *_: self._connected.set()
        self.client.on_subscribe = lambda *_: self._subscribed.put(True)
        self.client.on_message = self._on_message
        self.client.connect("127.0.0.1", broker.port)
        self.client.loop_start()
        assert self._connected.wait(PATIENCE_S)

    def _on_message(self, client, userdata, message):
        self.retained.append(message.retain)
        self.messages.append(message)
        self.payloads.append(message.payload.decode())

    def subscribe(self, topic_filter):
        self.client.subscribe(topic_filter, 2)
        self._subscribed.get(timeout=PATIENCE_S)

    def publish(self, topic, payload, qos=2, retain=False, **properties):
        """properties: of MQTT 5, by paho's names."""
        found = None
        if properties:
            found = Properties(PacketTypes.PUBLISH)
            for name, value in properties.items():
                setattr(found, name, value)
        self.client.publish(topic, payload, qos, retain, found).wait_for_publish(PATIENCE_S)

    def close(self):
        self.client.disconnect()
        self.client.loop_stop()


def far(*args, **kwargs):
    return contextlib.closing(Far(*args, **kwargs))


def make(port, nor=None, **more):
    """A client on port of 127.0.0.1, its journal on nor."""
    config = {
        "broker": {
            "host": "127.0.0.1",
            "port": port,
            "username": more.pop("username", None),
            "password": more.pop("password", None),
            "keep_alive_s": 60,
            "version": more.pop("version", 4),
        },
        "client_id": more.pop("client_id", "p7"),
        "session": {"clean": False, "in_flight": 8, "expiry_s": more.pop("expiry_s", 604800)},
        "journal": {"home": "ram", "size_kib": 64, "when_full": "wait"},
    }
    more.setdefault("backoff_ms", (10, 100))
    return Client(config, device=nor or Nor(65536), **more)


async def until(condition, what="what the test waits for"):
    """Return when condition() is true; AssertionError after a time that only a broken client needs."""
    for _ in range(PATIENCE_S * 500):
        if condition():
            return
        await asyncio.sleep(0.002)
    raise AssertionError("never happened: " + what)


async def settled(client):
    """Return when the broker has all that was published."""
    assert await client.drain(PATIENCE_S), "%r, %r" % (client.last_error, client.stats())


def without_doubles(payloads):
    return list(dict.fromkeys(payloads))


# Cuts of the link at named packets: before it, so that it is lost, and after it, so that its answer is.

OUTBOUND = (
    (1, UP, PUBLISH),
    (1, DOWN, PUBACK),
    (2, UP, PUBLISH),
    (2, DOWN, PUBREC),
    (2, UP, PUBREL),
    (2, DOWN, PUBCOMP),
)
INBOUND = (
    (1, DOWN, PUBLISH),
    (1, UP, PUBACK),
    (2, DOWN, PUBLISH),
    (2, UP, PUBREC),
    (2, DOWN, PUBREL),
    (2, UP, PUBCOMP),
)


def test_no_message_is_lost_or_doubled_when_the_link_is_cut_at_any_packet_on_its_way_out():
    """[MQTT-7.0.0-2]"""
    async def case(broker, link, other, name, qos, direction, packet, when):
        async with make(link.port, client_id=name) as client:
            await until(lambda: client.connected)
            cut = link.cut_at_packet(direction, packet, nth=3, when=when)
            expected = []
            for n in range(6):
                expected.append("%s %d" % (name, n))
                await client.publish("out", expected[-1], qos=qos, mark=n)
            await settled(client)
            assert cut.fired and client.mark == 5
            await until(lambda: expected[-1] in other.payloads, "the last message of " + name)
        got = [payload for payload in other.payloads if payload.startswith(name + " ")]
        assert (got if qos == 2 else without_doubles(got)) == expected, (name, got)

    with Mosquitto() as broker, Proxy(broker.port) as link, far(broker) as other:
        other.subscribe("out")
        for qos, direction, packet in OUTBOUND:
            for when in ("before", "inside", "after"):
                name = "%d.%s.%d.%s" % (qos, direction, packet, when)
                asyncio.run(case(broker, link, other, name, qos, direction, packet, when))


def test_no_message_is_lost_or_doubled_when_the_link_is_cut_at_any_packet_on_its_way_in():
    """[MQTT-7.0.0-2]"""
    async def case(broker, link, other, name, qos, direction, packet, when):
        got = []
        async with make(link.port, client_id=name) as client:
            client.on("#", lambda message: got.append(message.payload.decode()))
            assert await client.subscribe("in/" + name, qos) == qos
            cut = link.cut_at_packet(direction, packet, nth=3, when=when)
            expected = [str(n) for n in range(6)]
            for text in expected:
                other.publish("in/" + name, text, qos)
            await until(lambda: expected[-1] in got and cut.fired, "the last message of " + name)
            await until(lambda: not client.store.session.held and not client._inbox)
        assert (got if qos == 2 else without_doubles(got)) == expected, (name, got)

    with Mosquitto() as broker, Proxy(broker.port) as link, far(broker) as other:
        for qos, direction, packet in INBOUND:
            for when in ("before", "inside", "after"):
                name = "%d.%s.%d.%s" % (qos, direction, packet, when)
                asyncio.run(case(broker, link, other, name, qos, direction, packet, when))


def test_link_in_single_bytes_with_large_and_small_messages():
    """[MQTT-7.1.2-1]"""
    async def scenario(broker, link, other):
        got = []
        async with make(link.port) as client:
            client.on("#", lambda message: got.append(message.payload))
            await client.subscribe("back", 2)
            sent = [b"%d" % n * size for n, size in enumerate((1, 300, 3000, 0, 800))]
            for data in sent:
                await client.publish("back", data, qos=2)
            await settled(client)
            await until(lambda: len(got) == len(sent))
            assert got == sent

    with Mosquitto() as broker, Proxy(broker.port) as link:
        link.chunk(1)
        asyncio.run(scenario(broker, link, None))


# Brokers that are away.


def test_broker_restarts_lose_and_double_nothing():
    async def scenario(broker, other, version):
        async with make(broker.port, version=version) as client:
            got = []
            client.on("#", lambda message: got.append(message.payload.decode()))
            await client.subscribe("in", 2)
            for n in range(90):
                await client.publish("out", str(n), qos=2, mark=n)
                await client.publish("in", str(n), qos=2)
                if n % 30 == 15:
                    await until(lambda: client.connected)
                    before = client.connections
                    await asyncio.to_thread(broker.restart)
                    await until(lambda: client.connections > before)
            await settled(client)
            assert client.session_present and client.stats()["connections"] >= 4
            await until(lambda: len(got) >= 90)
            assert got == [str(n) for n in range(90)]

    for version in (4, 5):
        with Mosquitto() as broker:
            with far(broker) as other:
                other.subscribe("out")
            asyncio.run(scenario(broker, other, version))
            with far(broker) as other:
                asyncio.run(until(lambda: len(other.payloads) >= 90))
                assert other.payloads == [str(n) for n in range(90)]


def test_broker_that_forgot_everything_gets_messages_and_subscriptions_again():
    async def scenario(broker):
        told = []
        async with make(broker.port) as client:
            client.on_connect = told.append
            got = []
            client.on("#", lambda message: got.append(message.payload))
            await client.subscribe("in", 2)
            await asyncio.to_thread(broker.stop)
            await client.publish("in", "kept", qos=2)
            await asyncio.to_thread(broker.start)
            await settled(client)
            # Sent before SUBSCRIBE was answered it has no receiver; the next one has.
            await client.subscribe("in", 1)
            await client.publish("in", "next", qos=2)
            await until(lambda: b"next" in got)
            assert told == [False, False]

    with Mosquitto(persistence=False) as broker:
        asyncio.run(scenario(broker))


def test_broker_down_at_the_start_gets_all_when_it_comes():
    async def scenario(broker):
        async with make(broker.port) as client:
            for n in range(5):
                await client.publish("out", str(n), qos=2)
            await until(lambda: client.last_error is not None)
            await asyncio.to_thread(broker.start)
            await settled(client)
            assert client.stats()["acknowledged"] == 5

    with Mosquitto() as broker:
        broker.stop()
        asyncio.run(scenario(broker))


def test_half_open_link_is_noticed_and_left():
    """[MQTT-3.12.4-1]"""
    async def scenario(link, other):
        async with make(link.port, answer_ms=300) as client:
            client._pulse_ms = 50
            await until(lambda: client.connected)
            link.swallow()
            await client.publish("out", "swallowed", qos=2)
            await until(lambda: not client.connected, "the end of the half-open connection")
            link.accept()
            await settled(client)
            await until(lambda: other.payloads == ["swallowed"])

    with Mosquitto() as broker, Proxy(broker.port) as link, far(broker) as other:
        other.subscribe("out")
        asyncio.run(scenario(link, other))


def test_delayed_link_in_pieces_loses_and_doubles_nothing():
    async def scenario(link, other):
        got = []
        async with make(link.port) as client:
            client.on("in", lambda message: got.append(message.payload.decode()))
            await client.subscribe("in", 2)
            for n in range(20):
                await client.publish("out", str(n), qos=1 + n % 2)
                await client.publish("in", str(n), qos=2)
            await settled(client)
            await until(lambda: len(got) == 20)
            assert got == [str(n) for n in range(20)] and client.connections == 1
        await until(lambda: len(other.payloads) == 20)
        assert sorted(other.payloads, key=int) == got

    with Mosquitto() as broker, Proxy(broker.port) as link, far(broker) as other:
        other.subscribe("out")
        link.delay(30)
        link.chunk(5)
        asyncio.run(scenario(link, other))


class Wifi:
    """A link that has come back with another address: what the old connection carries goes nowhere."""

    def __init__(self):
        self.has = "10.0.0.1"

    async def up(self):
        pass

    def address(self):
        return self.has


def test_old_connection_does_not_linger_when_the_network_has_another_address():
    async def scenario(link, other):
        wifi = Wifi()
        async with make(link.port, link=wifi) as client:
            client._pulse_ms = 20
            for n in range(3):
                await client.publish("out", "%d" % n, qos=2)
                await settled(client)
                link.swallow()
                await client.publish("out", "%d swallowed" % n, qos=2)
                wifi.has = "10.0.0.%d" % (n + 2)
                await until(lambda: not client.connected, "the end of the old connection")
                assert "network's address" in str(client.last_error)
                link.accept()
                await settled(client)
                await asyncio.to_thread(link.wait, lambda counts: counts["closed_by_device"] > n)
        await until(lambda: len(other.payloads) == 6)
        assert other.payloads == [text % n for n in range(3) for text in ("%d", "%d swallowed")]

    with Mosquitto() as broker, Proxy(broker.port) as link, far(broker) as other:
        other.subscribe("out")
        asyncio.run(scenario(link, other))


def test_wrong_password_is_refused_again_and_again_until_it_is_right():
    async def scenario(broker):
        nor = Nor(65536)
        async with make(broker.port, nor, username="plant7", password="wrong") as client:
            await client.publish("out", "kept", qos=1, mark=7)
            await until(lambda: client._attempt > 2)
            assert isinstance(client.last_error, ConnectRefused) and client.last_error.return_code == 5
        async with make(broker.port, nor, username="plant7", password="secret") as client:
            await settled(client)
            assert client.mark == 7 and client.stats()["acknowledged"] == 1

    with Mosquitto(users={"plant7": "secret"}) as broker:
        asyncio.run(scenario(broker))


# Sessions, wills, retained messages.


def test_persistent_subscription_receives_what_was_sent_while_away():
    async def scenario(broker, other):
        nor = Nor(65536)
        async with make(broker.port, nor) as client:
            await client.subscribe("in/#", 2)
        for n in range(10):
            other.publish("in/%d" % n, str(n), qos=1 + n % 2)
        got = []
        async with make(broker.port, nor) as client:
            async for message in client.messages:
                got.append(message.payload.decode())
                if len(got) == 10:
                    break
            assert client.session_present and got == [str(n) for n in range(10)]

    with Mosquitto() as broker, far(broker) as other:
        asyncio.run(scenario(broker, other))


def test_will_is_delivered_on_a_cut_and_not_on_close():
    async def scenario(link, other):
        nor = Nor(65536)
        will = ("will", "gone", 1, False)
        async with make(link.port, nor, will=will) as client:
            await client.acknowledged(await client.publish("will", "here"))
        async with make(link.port, nor, will=will) as client:
            await client.acknowledged(await client.publish("will", "again"))
            link.cut()
            await until(lambda: "gone" in other.payloads)
        assert other.payloads == ["here", "again", "gone"]

    with Mosquitto() as broker, Proxy(broker.port) as link, far(broker) as other:
        other.subscribe("will")
        asyncio.run(scenario(link, other))


def test_retained_messages_both_ways():
    async def scenario(broker, other):
        async with make(broker.port) as client:
            for qos in (0, 1, 2):
                await until(lambda: client.connected)
                await client.publish("kept/%d" % qos, "r%d" % qos, qos=qos, retain=True)
            await settled(client)
            other.subscribe("kept/#")
            await until(lambda: len(other.payloads) == 3)
            assert sorted(other.payloads) == ["r0", "r1", "r2"] and all(other.retained)
            got = []
            client.on("#", lambda message: got.append((message.payload, message.retain)))
            await client.subscribe("kept/#", 2)
            await until(lambda: len(got) == 3)
            assert sorted(got) == [(b"r0", True), (b"r1", True), (b"r2", True)]

    with Mosquitto() as broker, far(broker) as other:
        asyncio.run(scenario(broker, other))


def test_qos_is_granted_by_the_broker():
    async def scenario(broker):
        async with make(broker.port) as client:
            assert [await client.subscribe("f%d" % qos, qos) for qos in (0, 1, 2)] == [0, 1, 2]
            await client.unsubscribe("f1")
            got = []
            client.on("#", lambda message: got.append(message.payload))
            await client.publish("f1", "no", qos=1)
            await client.publish("f2", "yes", qos=1)
            await until(lambda: got)
            assert got == [b"yes"]

    with Mosquitto() as broker:
        asyncio.run(scenario(broker))


# MQTT 5.


def test_properties_go_there_and_come_back_at_each_qos():
    """[MQTT5-7.0.0-2]"""
    async def scenario(broker, other):
        got = []
        async with make(broker.port, version=5) as client:
            client.on("in", got.append)
            assert await client.subscribe("in", 2, identifier=300) == 2
            properties = {
                "payload_format_indicator": 1,
                "content_type": "text/plain",
                "response_topic": "answers",
                "correlation_data": b"\x00\xff",
                "user_properties": [("b", "1"), ("a", "\u00e4"), ("b", "1")],
            }
            for qos in (0, 1, 2):
                await client.publish("out", str(qos), qos=qos, properties=dict(properties, message_expiry_interval=100))
            await settled(client)
            await until(lambda: len(other.messages) == 3)
            for message in other.messages:
                found = message.properties
                assert (found.PayloadFormatIndicator, found.ContentType) == (1, "text/plain")
                assert (found.ResponseTopic, found.CorrelationData) == ("answers", b"\x00\xff")
                assert found.UserProperty == properties["user_properties"]
                assert 90 < found.MessageExpiryInterval <= 100
            for qos in (0, 1, 2):
                other.publish(
                    "in", str(qos), qos, PayloadFormatIndicator=1, ContentType="text/plain", ResponseTopic="answers",
                    CorrelationData=b"\x00\xff", UserProperty=properties["user_properties"],
                )  # fmt: skip
            await until(lambda: len(got) == 3)
            expected = dict(properties, subscription_identifiers=[300])
            assert [m.properties for m in got] == [expected] * 3 and [m.qos for m in got] == [0, 1, 2]
            assert client.connections == 1 and client.stats()["protocol_errors"] == 0

    with Mosquitto() as broker, far(broker, version=5) as other:
        other.subscribe("out")
        asyncio.run(scenario(broker, other))


def test_session_that_expired_at_the_broker_begins_anew_and_loses_no_message():
    async def scenario(broker):
        nor = Nor(65536)
        told = []
        async with make(broker.port, nor, version=5, expiry_s=1) as client:
            client.on_connect = told.append
            await client.subscribe("in", 2)
        await until(lambda: [line for line in broker.log if "Expiring client p7" in line], "the end of the session")
        async with make(broker.port, nor, version=5, expiry_s=1) as client:
            client.on_connect = told.append
            got = []
            client.on("in", lambda message: got.append(message.payload))
            await client.subscribe("in", 2)  # which the broker has no longer
            await client.publish("in", "kept", qos=2)
            await settled(client)
            await until(lambda: got == [b"kept"])
        assert told == [False, False]

    with Mosquitto() as broker:
        asyncio.run(scenario(broker))


def test_shared_subscription_has_each_message_handled_once():
    async def scenario(broker, other):
        got = []
        async with make(broker.port, version=5, client_id="a") as a, make(broker.port, version=5, client_id="b") as b:
            for client in (a, b):
                client.on("$share/g/in/+", lambda message, client=client: got.append((client, message.payload)))
                assert await client.subscribe("$share/g/in/+", 2) == 2
            for n in range(20):
                other.publish("in/%d" % n, str(n))
            await until(lambda: len(got) >= 20)
            await turns()
            assert sorted(int(payload) for _, payload in got) == list(range(20))
            assert {client for client, _ in got} == {a, b}

    with Mosquitto() as broker, far(broker) as other:
        asyncio.run(scenario(broker, other))


def test_repeated_topics_go_as_aliases_that_the_broker_resolves():
    async def scenario(broker, other):
        async with make(broker.port, version=5) as client:
            await until(lambda: client.connected)
            expected = []
            for n in range(36):
                topic = "plant/%d/temperature" % (n % 12)
                expected.append((topic, str(n)))
                await client.publish(topic, str(n), qos=2, properties={"content_type": "c"} if n % 2 else None)
            await settled(client)
            assert 0 < len(client.store._aliases) <= client.connack["topic_alias_maximum"]
            await until(lambda: len(other.messages) == 36)
            assert [(m.topic, m.payload.decode()) for m in other.messages] == expected
            assert client.connections == 1

    with Mosquitto() as broker, far(broker, version=5) as other:
        other.subscribe("plant/#")
        asyncio.run(scenario(broker, other))


def test_limits_of_the_broker_are_kept():
    async def scenario(broker, other):
        async with make(broker.port, version=5) as client:
            large = await client.publish("out", "x" * 300, qos=1)  # not yet connected
            refused = asyncio.create_task(client.acknowledged(large))
            await until(refused.done)
            assert isinstance(refused.exception(), MessageRefused) and refused.exception().reason_code == 0x95
            try:
                await client.publish("out", "x" * 300, qos=2)
                raise AssertionError("accepted")
            except ValueError:
                pass
            for n in range(40):
                await client.publish("out", str(n), qos=2)
            await settled(client)
            await until(lambda: len(other.payloads) == 40)
            assert other.payloads == [str(n) for n in range(40)] and client.connections == 1
            assert client.connack["receive_maximum"] == 3 and client.connack["server_keep_alive"] == 30

    with Mosquitto(max_inflight_messages=3, max_packet_size=200, max_keepalive=30) as broker, far(broker) as other:
        other.subscribe("out")
        asyncio.run(scenario(broker, other))


def test_client_identifier_that_the_broker_assigns_names_the_session_from_then_on():
    async def scenario(broker):
        nor = Nor(65536)
        names = []
        for _ in range(2):
            async with make(broker.port, nor, version=5, client_id="") as client:
                await client.acknowledged(await client.publish("out", "x", qos=2))
                names.append((client.client_id, client.session_present))
        assert names[0][0] and names[0][0] == names[1][0] and names[1][1]

    with Mosquitto() as broker:
        asyncio.run(scenario(broker))


def test_will_with_a_delay_is_not_published_by_who_is_back_before_it_and_has_its_properties():
    async def scenario(link, other):
        nor = Nor(65536)
        for delay, text in ((60, "never"), (0, "gone")):
            will = ("will", text, 1, False, {"will_delay_interval": delay, "content_type": "c"})
            async with make(link.port, nor, version=5, will=will) as client:
                await client.acknowledged(await client.publish("will", "here"))
                link.cut()
                await client.acknowledged(await client.publish("will", "back"))
        await until(lambda: other.payloads.count("back") == 2 and "gone" in other.payloads)
        assert sorted(other.payloads) == ["back", "back", "gone", "here", "here"]
        [gone] = [m for m in other.messages if m.payload == b"gone"]
        assert gone.properties.ContentType == "c"

    with Mosquitto() as broker, Proxy(broker.port) as link, far(broker, version=5) as other:
        other.subscribe("will")
        asyncio.run(scenario(link, other))


def test_retained_messages_come_as_the_subscription_says():
    async def scenario(broker, other):
        other.publish("kept", "r", retain=True)
        got = []
        async with make(broker.port, version=5) as client:
            client.on("kept", lambda message: got.append((message.payload, message.retain)))
            for handling, more in ((2, []), (0, [(b"r", True)]), (1, [])):
                got.clear()
                await client.subscribe("kept", 1, retain_handling=handling)
                await client.publish("kept", "end", qos=1)
                await until(lambda: (b"end", False) in got)
                assert got == more + [(b"end", False)], (handling, got)
            # Of another filter: mosquitto 2.0 leaves these two options as they were when a subscription is made again.
            client.on("flag", lambda message: got.append((message.payload, message.retain)))
            await client.subscribe("flag", 1, no_local=True, retain_as_published=True)
            got.clear()
            await client.publish("flag", "not to me", qos=1)
            other.publish("flag", "yes", retain=True)
            await until(lambda: got)
            assert got == [(b"yes", True)]

    with Mosquitto() as broker, far(broker) as other:
        asyncio.run(scenario(broker, other))


# All of it together, in an order drawn from a seed.

RUNS = ((1, 11), (1, 12), (2, 13), (2, 14), (2, 15), (2, 16), (2, 17), (2, 18))  # QoS, seed
MESSAGES = 120


class Program:
    """A device's program through power cuts: numbers what it sends by the mark, handles each command by its token."""

    def __init__(self, port, qos, rng):
        self.port = port
        self.qos = qos
        self.rng = rng
        self.nor = Nor(65536)
        self.client = None
        self.commands = []
        self.tokens = set()
        self.power_cuts = 0

    def command(self, message):
        # What a program does that must not act twice.  The set stands for a record of its own.
        if message.token not in self.tokens:
            self.tokens.add(message.token)
            self.commands.append(message.payload.decode())

    async def power_on(self):
        self.client = make(self.port, self.nor, answer_ms=5000)
        self.client._pulse_ms = 20
        self.client.on("#", self.command)
        await self.client.start()
        task = asyncio.create_task(self.client.subscribe("in", 2))
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        return task

    async def power_off(self):
        self.power_cuts += 1
        tasks = [self.client._run_task, self.client._dispatch_task, self.subscribing]
        for task in tasks:
            while not task.done():
                task.cancel()  # again and again: before 3.12 wait_for() sometimes swallows it
                await asyncio.sleep(0)
        self.nor.power_on()

    async def run(self, faults):
        """Publish numbers 0 to MESSAGES - 1 while faults(n) act; return when the broker has them all."""
        self.subscribing = await self.power_on()
        await self.subscribing  # from here on the broker keeps every command for us
        while True:
            n = 0 if self.client.mark is None else self.client.mark + 1
            if n == MESSAGES:
                break
            try:
                if await faults(n, self):
                    raise PowerCut("switched off")
                await self.client.publish("out", str(n), qos=self.qos, mark=n)
                if self.rng.random() < 0.5:
                    await until(lambda: self.client.connected or not self.client.store.journal.usable)
                await turns(self.rng.randrange(20))
            except (PowerCut, JournalUnavailable):
                await self.power_off()
                self.subscribing = await self.power_on()
        self.nor.power_on()
        if not self.client.store.journal.usable:
            await self.power_off()
            self.subscribing = await self.power_on()
        await settled(self.client)


def _run(qos, seed):
    rng = random.Random(seed)
    kinds = []

    with Mosquitto() as broker, Proxy(broker.port) as link:
        with far(broker) as other:
            other.subscribe("out")
        sent = []

        def send(text):
            # A new connection each: after a restart paho resends more at once than mosquitto allows, again and again.
            with far(broker, "sender", clean=True) as sender:
                sender.publish("in", text)

        async def faults(n, program):
            """Perhaps do something to the device; True: switch it off."""
            if n % 3 == 0 and len(sent) <= n // 3:
                sent.append(str(n))
                await asyncio.to_thread(send, str(n))
            if rng.random() > 0.2:
                return False
            kind = rng.choice(("cut", "packet", "packet", "bytes", "restart", "off", "flash", "flash"))
            if kind == "restart" and kinds.count(kind) == 2:
                kind = "cut"
            kinds.append(kind)
            if kind == "cut":
                link.cut(reset=rng.random() < 0.5)
            elif kind == "packet":
                qos_, direction, packet = rng.choice(OUTBOUND + INBOUND)
                link.cut_at_packet(direction, packet, rng.randrange(1, 4), rng.choice(("before", "inside", "after")))
            elif kind == "bytes":
                link.cut_after(rng.choice((UP, DOWN)), rng.randrange(200))
            elif kind == "restart":
                await asyncio.to_thread(broker.restart)
            elif kind == "flash":
                program.nor.cut_after(rng.randrange(1, 12), "bits", "mixed", rng.randrange(1000), weak=True)
            return kind == "off"

        async def scenario():
            program = Program(link.port, qos, rng)
            await program.run(faults)
            link.cancel_cuts()
            await until(lambda: len(program.commands) == len(sent), "all commands: %r %r" % (program.commands, sent))
            await program.client.close()
            return program

        program = asyncio.run(scenario())
        with far(broker) as other:
            asyncio.run(until(lambda: str(MESSAGES - 1) in other.payloads))
        expected = [str(n) for n in range(MESSAGES)]
        note = "seed %d: %r" % (seed, kinds)
        assert (other.payloads if qos == 2 else without_doubles(other.payloads)) == expected, note
        assert program.commands == sent, note
    return kinds, program.power_cuts


def test_random_cuts_restarts_and_reboots_lose_nothing_and_double_nothing_at_qos_2():
    """[MQTT-4.1.0-1]"""
    kinds = set()
    power_cuts = 0
    for qos, seed in RUNS:
        happened, cuts = _run(qos, seed)
        kinds.update(happened)
        power_cuts += cuts
    assert kinds == {"cut", "packet", "bytes", "restart", "off", "flash"} and power_cuts > len(RUNS)
