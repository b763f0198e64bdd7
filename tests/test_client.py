"""The client against a scripted broker (fakebroker.py), its flash a Nor: what it promises its program and the broker.

Waiting is always for an event; a bound is reached only when something is broken.
"""

import asyncio
import sys
import time
from array import array

import mqtt_durable.client as client_module
from fakebroker import FakeBroker, ack, packet, publish, turns, until
from mqtt_durable.client import Client
from mqtt_durable.errors import (
    ConnectRefused,
    JournalFull,
    JournalLost,
    JournalUnavailable,
    MessageDropped,
    ProtocolError,
    SubscribeRefused,
)
from mqtt_durable.journal import Journal
from mqtt_durable.store import Store, identity
from norsim import Nor

SECRET = "Kennwort-4711"


class Rig:
    """A broker, a flash and the client on it.  more: arguments of Client; in_flight, when_full, grace_ms (without it:
    always durable), clean, client_id, username, keep_alive_s, version, expiry_s: of its configuration.  fresh: the
    journal has known no session with this broker."""

    def __init__(self, broker, size=65536, fresh=False, **more):
        self.broker = broker
        self.more = more
        self.nor = Nor(size)
        if not fresh:
            store = Store(Journal(self.nor))
            store.open()
            store.begin(identity("p7", "127.0.0.1", broker.port))
            store.close()
        self.client = self.make()

    def make(self, **more):
        """Power on: a new client."""
        options = dict(self.more)
        options.update(more)
        config = {
            "broker": {
                "host": "127.0.0.1",
                "port": self.broker.port,
                "username": options.pop("username", None),
                "password": options.pop("password", None),
                "keep_alive_s": options.pop("keep_alive_s", 60),
                "version": options.pop("version", 4),
            },
            "client_id": options.pop("client_id", "p7"),
            "session": {
                "clean": options.pop("clean", False),
                "in_flight": options.pop("in_flight", 16),
                "expiry_s": options.pop("expiry_s", 604800),
            },
            "journal": {
                "home": "ram",
                "size_kib": 64,
                "when_full": options.pop("when_full", "raise"),
                "durability": "grace" if "grace_ms" in options else "always",
                "grace_ms": options.pop("grace_ms", 500),
            },
            "log": {"level": "info", "console": "error"},
            "wifi": options.pop("wifi", None),
        }
        options.setdefault("backoff_ms", (1, 8))
        options.setdefault("answer_ms", 30000)
        self.client = Client(config, device=self.nor, **options)
        return self.client

    async def cut(self):
        """Power off, at whatever point the tasks are."""
        client = self.client
        for task in (client._run_task, client._dispatch_task) if client._run_task else ():
            while not task.done():
                task.cancel()  # again and again: before 3.12 CPython's wait_for() sometimes swallows it
                await asyncio.sleep_ms(0)
            client._leaving = True  # or the dispatcher would take its cancellation for a handler's failure
        client._run_task = None

    async def reboot(self, **more):
        await self.cut()
        client = self.make(**more)
        await client.start()
        return client

    async def up(self, number=1):
        """Return when the client is connected, over that connection."""
        await until(lambda: self.client.connected and self.broker.connections >= number, "connection %d" % number)


def play(scenario, script=(), start=True, says=None, **options):
    """Run scenario(rig): a broker with this script, a client that is started unless told otherwise."""

    async def run():
        async with FakeBroker(script, says) as broker:
            rig = Rig(broker, **options)
            try:
                if start:
                    await rig.client.start()
                await scenario(rig)
            finally:
                await rig.client.close()

    asyncio.run(run())


def hurry(client, keep_alive_ms):
    """Before the start: a keep-alive of milliseconds, whatever CONNACK says of it, and a pulse each millisecond."""
    client._keep_alive = lambda keep_alive_s: None
    client._keep_alive_ms = keep_alive_ms
    client._pulse_ms = 1


async def raised(awaitable, kind):
    """Await; return the exception of that kind that comes."""
    try:
        await awaitable
    except kind as e:
        return e
    raise AssertionError("no %s" % kind.__name__)


def wrap(owner, name, function):
    """Replace owner.name by function(original, *args)."""
    original = getattr(owner, name)
    setattr(owner, name, lambda *args: function(original, *args))


# Connecting.


def test_async_with_calls_the_start_of_a_class_derived_from_it():
    class Mine(Client):
        async def start(self):
            self.begun = True
            await super().start()

    async def scenario(rig):
        mine = Mine.__new__(Mine, {"broker": {}})
        mine._run_task = rig.client  # has been started
        async with mine as client:
            assert client is mine and client.begun
            client._run_task = None

    play(scenario, start=False)


def test_first_connect_is_retried_until_the_broker_is_there():
    async def scenario(rig):
        await rig.broker.stop()
        await rig.client.start()
        await until(lambda: rig.client._attempt > 3)
        assert isinstance(rig.client.last_error, OSError)
        await rig.broker.start()
        await rig.up()

    play(scenario, start=False)


def test_first_connect_is_retried_when_refused():
    """[MQTT-3.2.2-5]"""
    async def scenario(rig):
        await rig.up(2)
        assert isinstance(rig.client.last_error, ConnectRefused) and rig.client.last_error.return_code == 3

    play(scenario, [(1, "CONNECT", 1, "refuse 3")])


def test_connect_without_an_answer_is_given_up():
    async def scenario(rig):
        await rig.up(2)

    play(scenario, [(1, "CONNECT", 1, "silent")], answer_ms=100)


def test_link_is_brought_up_before_each_attempt_and_its_failure_is_one():
    class Link:
        ups = 0

        async def up(self):
            self.ups += 1
            if self.ups < 3:
                raise OSError("no Wi-Fi")

    async def scenario(rig):
        await rig.up()
        assert rig.client._link.ups == 3 and rig.broker.connections == 1

    play(scenario, link=Link())


def test_backoff_grows_is_capped_and_jittered():
    async def scenario(rig):
        client = rig.client
        pauses = [client._pause_ms() for _ in range(12)]
        for n, pause in enumerate(pauses):
            limit = min(100 << n, 3000)
            assert limit // 2 <= pause <= limit, pauses
        assert len(set(pauses[5:])) > 1
        client._attempt = 1000
        assert client._pause_ms() <= 3000

    play(scenario, start=False, backoff_ms=(100, 3000))


def test_every_new_attempt_is_after_a_pause_that_grows_also_when_the_broker_drops_us_at_once():
    pauses = []

    async def scenario(rig):
        def note(original):
            pauses.append((rig.broker.connections, rig.client._attempt))
            return original()

        rig.client._pulse_ms = 1000000
        wrap(rig.client, "_pause_ms", note)
        await rig.client.start()
        await until(lambda: len(pauses) == 6)
        assert pauses == [(n + 1, n) for n in range(6)]

    play(scenario, [(0, "CONNECT", 1, "answered")], start=False)


def test_backoff_begins_anew_after_a_connection_that_held():
    async def scenario(rig):
        rig.client._attempt = 5
        rig.client._pulse_ms = 1
        await rig.client.start()
        await until(lambda: rig.client._attempt == 0)

    play(scenario, start=False)


def test_connect_carries_what_was_configured():
    async def scenario(rig):
        await rig.up()
        connect = rig.broker.packets[0]
        assert (connect.client_id, connect.username, connect.password) == ("p7", "plant", SECRET)
        assert connect.keep_alive_s == 77 and not connect.clean
        assert connect.will == ("gone", b"bye", 1, True)

    will = ("gone", "bye", 1, True)
    for version in (4, 5):
        play(scenario, username="plant", password=SECRET, keep_alive_s=77, will=will, version=version)


def test_connect_is_plain_without_options():
    async def scenario(rig):
        await rig.up()
        connect = rig.broker.packets[0]
        assert (connect.username, connect.password, connect.will) == (None, None, None)

    play(scenario)


def test_bad_will_is_refused_at_once():
    """[MQTT-3.1.2-14]"""
    async def scenario(rig):
        for will in (("a/#", "", 0, False), ("a", "", 3, False)):
            try:
                rig.make(will=will)
            except ValueError:
                continue
            raise AssertionError("accepted")

    play(scenario, start=False)


# Rule 10: a journal that knows no session with this broker must not meet an old one.


def test_new_journal_connects_clean_first_then_persistently():
    async def scenario(rig):
        await rig.up(2)
        await rig.reboot()
        await rig.up(3)
        assert rig.broker.trace() == ["CONNECT clean", "DISCONNECT", "CONNECT", "CONNECT"]
        assert rig.client.session_present

    for version in (4, 5):
        play(scenario, fresh=True, version=version)


def test_clean_connect_is_repeated_until_it_was_answered():
    async def scenario(rig):
        await rig.up(3)
        assert rig.broker.trace() == ["CONNECT clean", "CONNECT clean", "DISCONNECT", "CONNECT"]

    play(scenario, [(1, "CONNECT", 1, "unanswered")], fresh=True)


def test_other_client_id_begins_a_new_session_and_keeps_the_messages():
    """[MQTT-3.1.3-2] [MQTT5-3.1.3-2]"""
    async def scenario(rig):
        await rig.client.publish("a", b"1", qos=2)
        await rig.client.publish("a", b"2", qos=1)
        await rig.broker.expect("PUBLISH 2 2")
        client = await rig.reboot(client_id="p8")
        assert await client.drain(20)
        assert rig.broker.trace(2) + rig.broker.trace(3)[:3] == [
            "CONNECT clean",
            "DISCONNECT",
            "CONNECT",
            "PUBLISH 1 1",
            "PUBLISH 2 2",
        ]
        assert rig.broker.packets[-1].connection == 3

    for version in (4, 5):
        play(scenario, [(1, "PUBLISH", 0, "ignored")], version=version)


def test_other_broker_begins_a_new_session():
    async def scenario(rig):
        await rig.up()
        async with FakeBroker() as other:
            rig.broker, first = other, rig.broker
            await rig.reboot()
            await rig.up(2)
            assert other.trace() == ["CONNECT clean", "DISCONNECT", "CONNECT"]
            await rig.client.close()
        rig.broker = first

    play(scenario)


def test_clean_session_connects_clean_each_time_and_still_loses_nothing():
    async def scenario(rig):
        await rig.client.publish("a", b"1", qos=1)
        await rig.broker.expect("PUBLISH 1 1")
        await rig.broker.drop()
        assert await rig.client.drain(20)
        assert rig.broker.trace() == ["CONNECT clean", "PUBLISH 1 1", "CONNECT clean", "PUBLISH 1 1"]

    for version in (4, 5):
        play(scenario, [(1, "PUBLISH", 1, "ignored")], clean=True, version=version)


def test_clean_session_sends_a_qos_2_message_again_that_was_not_completed():
    async def scenario(rig):
        await rig.up()
        await rig.client.publish("t", "1", qos=2)
        assert await rig.client.drain(30)
        assert rig.broker.trace() == [
            "CONNECT clean", "PUBLISH 1 1", "PUBREL 1", "CONNECT clean", "PUBLISH 1 1", "PUBREL 1"
        ]  # fmt: skip

    for version in (4, 5):
        play(scenario, [(1, "PUBREL", 1, "lost")], clean=True, version=version)


# Rules 8 and 9: the session is there, or it is not.

SILENT = [(1, "PUBLISH", 0, "ignored")]


async def _three_unacknowledged(rig):
    for text in ("a", "b", "c"):
        await rig.client.publish("t", text, qos=1)
    await rig.broker.expect("PUBLISH 3 c")


def test_session_present_resends_with_dup_same_id_in_order_before_anything_new_and_once():
    """[MQTT-2.3.1-3] [MQTT-3.3.1-1] [MQTT-3.3.1-3] [MQTT-4.3.2-1] [MQTT-4.6.0-1] [MQTT5-3.3.1-1] [MQTT5-4.3.2-3]
    [MQTT5-4.4.0-1] [MQTT5-4.6.0-1]
    """
    async def scenario(rig):
        await _three_unacknowledged(rig)
        await rig.broker.stop()
        await until(lambda: not rig.client.connected)
        await rig.client.publish("t", "d", qos=1)
        await rig.broker.start()
        assert await rig.client.drain(20)
        await turns()
        expected = ["CONNECT", "PUBLISH 1 dup a", "PUBLISH 2 dup b", "PUBLISH 3 dup c", "PUBLISH 4 d"]
        assert rig.broker.trace(2) == expected
        assert rig.client.stats()["resent"] == 3

    for version in (4, 5):
        play(scenario, SILENT, version=version)


def test_session_present_resends_the_same_after_a_reboot():
    """[MQTT-2.3.1-3] [MQTT-3.1.2-4] [MQTT-3.3.1-1] [MQTT-4.4.0-1] [MQTT5-3.1.2-23] [MQTT5-3.3.1-1] [MQTT5-4.1.0-1]
    [MQTT5-4.4.0-1]
    """
    async def scenario(rig):
        await _three_unacknowledged(rig)
        client = await rig.reboot()
        await client.publish("t", "d", qos=1)
        assert await client.drain(20)
        expected = ["CONNECT", "PUBLISH 1 dup a", "PUBLISH 2 dup b", "PUBLISH 3 dup c", "PUBLISH 4 d"]
        assert rig.broker.trace(2) == expected

    for version in (4, 5):
        play(scenario, SILENT, version=version)


def test_no_session_sends_as_new_subscribes_again_and_tells_the_application():
    """[MQTT5-3.2.2-5]"""
    async def scenario(rig):
        client = rig.client
        told = []
        client.on_connect = told.append
        await client.start()
        assert await client.subscribe("cmd/#", 2) == 2
        for text in ("a", "b"):
            await client.publish("t", text, qos=2)
        await rig.broker.expect("PUBREL 2")  # a: no PUBREC yet, b: the broker's own
        await rig.broker.drop()
        await rig.up(2)
        assert await client.drain(20)
        await rig.broker.expect("SUBSCRIBE 65024 cmd/#", connection=2)
        assert rig.broker.trace(2, without=("SUBSCRIBE",)) == ["CONNECT", "PUBLISH 1 a", "PUBREL 1"]
        assert told == [False, False] and not client.session_present

    script = [(1, "PUBLISH", 1, "ignored"), (1, "PUBREL", 1, "ignored"), (2, "CONNECT", 1, "present 0")]
    for version in (4, 5):
        play(scenario, script, start=False, version=version)


def test_session_present_is_told():
    told = []

    async def scenario(rig):
        rig.client.on_connect = told.append
        await rig.client.start()
        await rig.up()
        await rig.broker.drop()
        await rig.up(2)
        assert told == [False, True] and rig.client.session_present

    play(scenario, start=False)


def test_on_connect_that_raises_is_counted():
    def bad(session_present):
        raise KeyError("on_connect")

    async def scenario(rig):
        rig.client.on_connect = bad
        await rig.client.start()
        await rig.client.acknowledged(await rig.client.publish("t", "a"))
        assert rig.client.stats()["handler_errors"] == 1

    play(scenario, start=False)


# Loss of the link at each step, in both flavours: the request was lost, or its answer was.

LOSSES = (
    # QoS, packet, flavour, what the broker had of a, b, c; packets of the second connection
    (1, "PUBLISH", "lost", "abc", ["PUBLISH 1 dup a"]),
    (1, "PUBLISH", "unanswered", "aabc", ["PUBLISH 1 dup a"]),
    (1, "PUBLISH", "answered", "abc", []),
    (2, "PUBLISH", "lost", "abc", ["PUBLISH 1 dup a"]),
    (2, "PUBLISH", "unanswered", "abc", ["PUBLISH 1 dup a"]),
    (2, "PUBLISH", "answered", "abc", ["PUBREL 1"]),
    (2, "PUBREL", "lost", "abc", ["PUBREL 1"]),
    (2, "PUBREL", "unanswered", "abc", ["PUBREL 1"]),
    (2, "PUBREL", "answered", "abc", []),
)


def _lose(reboot):
    for qos, name, flavour, delivered, again in LOSSES:

        async def scenario(rig):
            client = rig.client
            await client.publish("t", "a", qos=qos, mark=1)
            await until(lambda: rig.broker.closed == [1])
            # Not only .connected: the writer may have put something on the dead link until it has ended.
            await until(lambda: client._stream is None or rig.broker.connections == 2)
            if reboot:
                client = await rig.reboot()
                assert client.mark == 1
            await client.publish("t", "b", qos=qos, mark=2)
            await client.publish("t", "c", qos=qos, mark=3)
            assert await client.drain(20)
            case = "%d %s %s: %r" % (qos, name, flavour, rig.broker.packets)
            arrived = "".join([payload.decode() for _, payload, _ in rig.broker.delivered])
            if reboot and flavour == "answered" and qos == 1:  # power failed before the answer was recorded
                arrived = arrived.replace("aa", "a")
            assert arrived == delivered, case
            trace = rig.broker.trace(2)
            if not (reboot and flavour == "answered"):
                assert trace[1 : 1 + len(again)] == again and "dup" not in " ".join(trace[1 + len(again) :]), case

        for version in (4, 5):
            backoff_ms = (600000, 600000) if reboot else (1, 8)
            play(scenario, [(1, name, 1, flavour)], backoff_ms=backoff_ms, version=version)


def test_lost_link_at_each_step_loses_nothing_and_doubles_nothing_at_qos_2():
    """[MQTT-4.1.0-2] [MQTT-4.3.2-1] [MQTT-4.3.3-1] [MQTT5-4.3.2-3] [MQTT5-4.3.3-3] [MQTT5-4.3.3-5] [MQTT5-4.3.3-6]
    [MQTT5-4.4.0-1]
    """
    _lose(reboot=False)


def test_lost_power_at_each_step_loses_nothing_and_doubles_nothing_at_qos_2():
    """[MQTT-4.1.0-1] [MQTT5-3.1.2-23] [MQTT5-4.1.0-1]"""
    _lose(reboot=True)


def test_publish_is_not_sent_again_after_its_pubrec():
    """[MQTT-4.3.3-1] [MQTT5-4.3.3-3] [MQTT5-4.3.3-5] [MQTT5-4.3.3-6]"""
    async def scenario(rig):
        await rig.client.publish("t", "a", qos=2)
        await rig.broker.expect("PUBREL 1")
        for n in (2, 3):
            await rig.broker.drop()
            await rig.broker.expect("PUBREL 1", n)
        assert len(rig.broker.named("PUBLISH")) == 1

    for version in (4, 5):
        play(scenario, [(0, "PUBREL", 0, "silent")], version=version)


def test_link_that_delivers_byte_by_byte_is_understood():
    """[MQTT-7.1.2-1]"""
    async def scenario(rig):
        got = []
        rig.client.on("#", lambda message: got.append(message.payload))
        await rig.up()
        for byte in publish("t", b"x" * 200, 1, 9) + publish("t", b"y"):
            await rig.broker.send(bytes((byte,)))
            await turns(3)
        await until(lambda: len(got) == 2)
        assert got == [b"x" * 200, b"y"]

    play(scenario)


def test_publish_larger_than_the_send_buffer_goes_out_whole():
    """[MQTT-7.1.2-1]"""
    async def scenario(rig):
        payload = "0123456789" * 300
        for qos in (1, 2, 0):
            await rig.client.publish("t", payload, qos=qos)
        await rig.up()
        await rig.client.publish("t", payload, qos=0)
        assert await rig.client.drain(20)
        await until(lambda: len(rig.broker.delivered) == 3)
        assert {payload.encode()} == {p for _, p, _ in rig.broker.delivered}

    for version in (4, 5):
        play(scenario, version=version)


def test_qos_0_goes_into_the_middle_of_no_large_message():
    """What is told by the acknowledgement that makes room for the large one may publish at once."""

    async def scenario(rig):
        client = rig.client
        await rig.up()
        first = await client.publish("t", "a")
        await client.publish("t", "b" * 2000)
        await rig.broker.expect("PUBLISH 1 a")
        await rig.broker.send(ack("PUBACK", first))
        await client.acknowledged(first)
        await client.publish("t", "c", qos=0)
        await until(lambda: len(rig.broker.named("PUBLISH")) == 3)
        assert sorted(p.payload for p in rig.broker.named("PUBLISH")) == [b"a", b"b" * 2000, b"c"]

    play(scenario, [(0, "PUBLISH", 0, "silent")], in_flight=1)


class _Half:
    """A stream that takes the half of a write; for the rest there is no memory."""

    out_buf = property(lambda self: b"")

    @out_buf.setter
    def out_buf(self, _):
        raise MemoryError("no room")

    def __init__(self, stream):
        self.stream = stream
        self.sock = stream.sock
        self.s = self

    def write(self, data, off, n):
        return self.stream.s.write(data, off, n // 2)

    def close(self):
        self.stream.s.close()


def test_half_a_packet_that_there_is_no_memory_to_complete_ends_the_connection():
    async def scenario(rig):
        client = rig.client
        await rig.up()
        await turns()
        assert client._quick
        client._stream = _Half(client._stream)
        await client.publish("t", "a" * 100)
        await client.publish("t", "b" * 100)
        assert await client.drain(20)
        assert rig.broker.trace(1) == ["CONNECT"]
        assert rig.broker.delivered == [("t", b"a" * 100, 1), ("t", b"b" * 100, 1)]

    play(scenario)


def test_payload_may_be_a_view_of_what_is_larger_than_bytes():
    async def scenario(rig):
        numbers = array("H", (1, 2, 515))
        await rig.up()
        for n in range(6):
            await rig.client.publish("t", memoryview(numbers), qos=n % 3)
        assert await rig.client.drain(20)
        await until(lambda: len(rig.broker.delivered) == 6)
        assert {payload for _, payload, _ in rig.broker.delivered} == {bytes(numbers)}

    for version in (4, 5):
        play(scenario, version=version)


def test_retain_and_topic_reach_the_broker():
    async def scenario(rig):
        await rig.up()
        for qos in (0, 1, 2):
            await rig.client.publish("r/ä", b"x", qos=qos, retain=True)
            await rig.client.publish(b"r/b", bytearray(b"x"), qos=qos)
        assert await rig.client.drain(20)
        await until(lambda: len(rig.broker.named("PUBLISH")) == 6)
        found = {(p.qos, p.topic, p.retain) for p in rig.broker.named("PUBLISH")}
        assert found == {(qos, t, t == "r/ä") for qos in (0, 1, 2) for t in ("r/ä", "r/b")}

    for version in (4, 5):
        play(scenario, version=version)


# Acknowledgements of nothing.


def test_unknown_acknowledgements_are_answered_or_counted():
    async def scenario(rig):
        await rig.up()
        for name in ("PUBREC", "PUBREL", "PUBACK", "PUBCOMP", "UNSUBACK"):
            await rig.broker.send(ack(name, 999))
        await rig.broker.expect("PUBREL 999")
        await rig.broker.expect("PUBCOMP 999")
        await rig.client.acknowledged(await rig.client.publish("t", "a"))
        # The broker answers the PUBREL by one more PUBCOMP.
        await until(lambda: rig.client.stats()["unknown_acks"] == 6)
        assert rig.broker.connections == 1

    play(scenario)


# The in-flight window.


def test_window_is_held_exactly_also_after_reconnect_and_reboot():
    async def scenario(rig):
        for n in range(7):
            await rig.client.publish("t", str(n), qos=1)
        await rig.broker.expect("PUBLISH 3 2")
        await turns()
        assert len(rig.broker.named("PUBLISH", 1)) == 3
        await rig.broker.send(ack("PUBACK", 2))
        await rig.broker.expect("PUBLISH 4 3")
        await turns()
        assert len(rig.broker.named("PUBLISH", 1)) == 4
        await rig.client.close()  # orderly, so that the PUBACK is recorded
        await rig.broker.expect("DISCONNECT")
        assert len(rig.broker.named("PUBLISH", 1)) == 4
        expected = ["CONNECT", "PUBLISH 1 dup 0", "PUBLISH 3 dup 2", "PUBLISH 4 dup 3"]
        await rig.client.start()
        await rig.broker.expect(expected[-1], connection=2)
        await turns()
        assert rig.broker.trace(2) == expected
        await rig.reboot()
        await rig.broker.expect(expected[-1], connection=3)
        await turns()
        assert rig.broker.trace(3) == expected

    for version in (4, 5):
        play(scenario, [(0, "PUBLISH", 0, "silent")], in_flight=3, version=version)


def test_window_counts_messages_that_wait_for_pubcomp():
    async def scenario(rig):
        for n in range(4):
            await rig.client.publish("t", str(n), qos=2)
        await rig.broker.expect("PUBREL 2")
        await turns()
        assert len(rig.broker.named("PUBLISH")) == 2
        await rig.broker.send(ack("PUBCOMP", 1))
        await rig.broker.expect("PUBLISH 3 2")

    for version in (4, 5):
        play(scenario, [(0, "PUBREL", 0, "silent")], in_flight=2, version=version)


# Messages to the program.


class Gate:
    """A handler that notes each message and lets the client go on only when told."""

    def __init__(self, client, topic_filter="#"):
        self.messages = []
        self.gate = asyncio.Event()
        client.on(topic_filter, self.handle)

    async def handle(self, message):
        self.messages.append(message)
        await self.gate.wait()

    @property
    def texts(self):
        return [message.payload.decode() for message in self.messages]


def test_puback_and_pubrec_go_out_only_when_the_handler_has_returned():
    """[MQTT-3.3.4-1] [MQTT5-3.3.4-1] [MQTT5-4.3.2-4] [MQTT5-4.3.3-8]"""
    for qos, answer in ((1, "PUBACK 7"), (2, "PUBREC 7")):

        async def scenario(rig):
            held = Gate(rig.client)
            await rig.up()
            await rig.broker.publish("t", b"a", qos, 7)
            await until(lambda: held.messages)
            await turns()
            assert rig.broker.trace() == ["CONNECT"]
            held.gate.set()
            await rig.broker.expect(answer)

        for version in (4, 5):
            play(scenario, version=version)


def test_message_tells_topic_payload_qos_retain_dup_token():
    async def scenario(rig):
        got = []
        rig.client.on("#", got.append)
        await rig.up()
        await rig.broker.publish("a/ü", b"\0\xff", 0, retain=True)
        await rig.broker.publish("b", b"", 1, 3, dup=True)
        await rig.broker.publish("c", b"x", 2, 4)
        await rig.broker.expect("PUBCOMP 4")
        assert [(m.topic, m.payload, m.qos, m.retain, m.dup) for m in got] == [
            ("a/ü", b"\0\xff", 0, True, False),
            ("b", b"", 1, False, True),
            ("c", b"x", 2, False, False),
        ]
        assert got[0].token is None and got[1].token is None and isinstance(got[2].token, int)

    play(scenario)


def test_publish_is_a_coroutine_to_who_awaits_it_runs_it_as_a_task_or_gives_it_a_time():
    async def scenario(rig):
        client = rig.client
        await rig.up()
        for qos, ids in ((1, (1, 2, 3)), (0, (None, None, None))):
            assert await client.publish("t", "a", qos) == ids[0]
            assert await asyncio.create_task(client.publish("t", "b", qos)) == ids[1]
            assert await asyncio.wait_for_ms(client.publish("t", "c", qos), 20000) == ids[2]
        for bad in (("#", "a"), ("t", 5), ("t", "a", 3), ("t", "a", 0, False, 1)):
            await raised(client.publish(*bad), ValueError)
            await raised(asyncio.create_task(client.publish(*bad)), ValueError)
        assert await client.drain(20)
        await until(lambda: len(rig.broker.delivered) == 6)

    play(scenario)


def test_plain_handler_waits_for_the_coroutine_before_it():
    async def scenario(rig):
        client = rig.client
        go = asyncio.Event()
        got = []

        async def slow(message):
            await go.wait()
            got.append(message.payload)

        client.on("slow", lambda message: slow(message))
        client.on("plain", lambda message: got.append(message.payload))
        await rig.up()
        for n, topic in enumerate(("plain", "slow", "plain", "slow", "plain")):
            await rig.broker.publish(topic, b"%d" % n, 1, n + 1)
        await until(lambda: got == [b"0"] and len(client._inbox) == 3)
        assert len(rig.broker.named("PUBACK")) == 1
        go.set()
        await until(lambda: len(got) == 5)
        assert got == [b"0", b"1", b"2", b"3", b"4"] and client.received == 5
        await rig.broker.expect("PUBACK 5")

    play(scenario)


def test_first_handler_that_matches_is_called_and_the_same_filter_replaces_it():
    async def scenario(rig):
        got = []
        for topic_filter, name in (("a/+", "old"), ("#", "rest"), ("a/+", "plus")):
            rig.client.on(topic_filter, lambda message, name=name: got.append((name, message.topic)))
        await rig.up()
        for topic in ("a/1", "b", "$SYS/x", "a/2"):
            await rig.broker.publish(topic, b"")
        await until(lambda: len(got) == 3)
        assert got == [("plus", "a/1"), ("rest", "b"), ("plus", "a/2")]
        assert rig.client.stats()["discarded"] == 1  # "#" does not match $SYS

    play(scenario)


def test_qos_2_message_is_handled_once_however_often_it_is_sent_before_pubrel():
    """[MQTT-3.3.1-3] [MQTT-4.3.3-2] [MQTT5-4.3.3-10] [MQTT5-4.3.3-12]"""
    async def scenario(rig):
        held = Gate(rig.client)
        await rig.up()
        await rig.broker.publish("t", b"a", 2, 5)
        await rig.broker.publish("t", b"a", 2, 5, dup=True)  # while the handler runs
        await until(lambda: held.messages)
        held.gate.set()
        await rig.broker.expect("PUBREC 5")
        await rig.broker.publish("t", b"a", 2, 5)  # without DUP: the identifier alone decides
        await rig.broker.expect("PUBREC 5", 2)
        await rig.broker.send(ack("PUBREL", 5))
        await rig.broker.expect("PUBCOMP 5")
        await rig.broker.publish("t", b"b", 2, 5)  # a new message, the identifier is free
        await rig.broker.expect("PUBREC 5", 3)
        assert held.texts == ["a", "b"]
        assert rig.client.stats()["duplicates"] == 2

    for version in (4, 5):
        play(scenario, [(0, "PUBREC", 0, "silent")], version=version)


def test_qos_2_message_is_handled_once_over_reconnects_and_reboots():
    """[MQTT-3.1.2-4] [MQTT-4.1.0-1] [MQTT5-3.1.2-23] [MQTT5-4.3.3-10]"""
    async def scenario(rig):
        held = Gate(rig.client)
        held.gate.set()
        await rig.up()
        await rig.broker.publish("t", b"a", 2, 5)
        await rig.broker.expect("PUBREC 5")
        await rig.broker.drop()
        await rig.up(2)
        await rig.broker.publish("t", b"a", 2, 5, dup=True)
        await rig.broker.expect("PUBREC 5", 2)
        again = Gate(await rig.reboot())
        await rig.up(3)
        await rig.broker.publish("t", b"a", 2, 5, dup=True)
        await rig.broker.expect("PUBREC 5", 3)
        await rig.broker.send(ack("PUBREL", 5))
        await rig.broker.expect("PUBCOMP 5")
        assert held.texts == ["a"] and again.texts == []

    for version in (4, 5):
        play(scenario, [(0, "PUBREC", 0, "silent")], version=version)


def test_qos_2_message_is_handled_once_when_the_link_drops_while_the_handler_runs():
    async def scenario(rig):
        held = Gate(rig.client)
        await rig.up()
        await rig.broker.publish("t", b"a", 2, 5)
        await until(lambda: held.messages)
        await rig.broker.drop()
        await rig.up(2)
        await rig.broker.publish("t", b"a", 2, 5, dup=True)
        await until(lambda: rig.client.stats()["duplicates"] == 1)
        held.gate.set()
        await rig.broker.expect("PUBREC 5")
        await rig.broker.expect("PUBCOMP 5")
        assert held.texts == ["a"] and rig.broker.trace(2) == ["CONNECT", "PUBREC 5", "PUBCOMP 5"]

    play(scenario)


def test_handler_of_an_old_session_answers_nobody_in_a_new_one():
    """[MQTT5-3.2.2-5]"""
    async def scenario(rig):
        held = Gate(rig.client)
        await rig.up()
        await rig.broker.publish("t", b"old", 2, 5)
        await until(lambda: held.messages)
        rig.broker.forget()
        await rig.broker.drop()
        await rig.up(2)
        await rig.broker.publish("t", b"new", 2, 5)
        await turns()
        held.gate.set()
        await rig.broker.expect("PUBCOMP 5")
        assert held.texts == ["old", "new"] and rig.broker.trace(2) == ["CONNECT", "PUBREC 5", "PUBCOMP 5"]

    for version in (4, 5):
        play(scenario, version=version)


def test_token_is_the_same_when_power_fails_before_the_record_and_else_new():
    async def scenario(rig):
        held = Gate(rig.client)
        await rig.up()
        await rig.broker.publish("t", b"a", 2, 5)
        await until(lambda: held.messages)
        again = Gate(await rig.reboot())
        again.gate.set()
        await rig.up(2)
        await rig.broker.publish("t", b"a", 2, 5, dup=True)
        await rig.broker.expect("PUBCOMP 5")
        await rig.broker.publish("t", b"b", 2, 5)
        await rig.broker.expect("PUBCOMP 5", 2)
        first, second = [message.token for message in again.messages]
        assert held.messages[0].token == first != second

    play(scenario)


def test_handler_that_raises_is_counted_and_the_client_goes_on():
    async def scenario(rig):
        def bad(message):
            raise KeyError("handler")

        async def worse(message):
            raise asyncio.TimeoutError("handler")

        rig.client.on("bad", bad)
        rig.client.on("worse", worse)
        await rig.up()
        await rig.broker.publish("bad", b"a", 1, 1)
        await rig.broker.publish("worse", b"a", 2, 2)
        await rig.broker.expect("PUBACK 1")
        await rig.broker.expect("PUBCOMP 2")
        assert rig.client.stats()["handler_errors"] == 2 and rig.broker.connections == 1

    play(scenario)


def test_handlers_get_what_their_filter_matches_by_the_rules():
    """[MQTT-4.7.1-2] [MQTT-4.7.1-3]"""
    topics = ("a", "a/", "a/b", "a//b", "a/b/c", "/a", "/", "A", "b/a", "$a", "$a/b", "a/$b", "ü/€")
    for topic_filter, matching in (
        ("a", "a"),
        ("a/#", "a|a/|a/b|a//b|a/b/c|a/$b"),
        ("a/+", "a/|a/b|a/$b"),
        ("+", "a|A"),
        ("+/+", "a/|a/b|/a|/|b/a|a/$b|ü/€"),
        ("/+", "/a|/"),
        ("+/", "a/|/"),
        ("a//b", "a//b"),
        ("a/+/b", "a//b"),
        ("#", "a|a/|a/b|a//b|a/b/c|/a|/|A|b/a|a/$b|ü/€"),
        ("/#", "/a|/"),
        ("$a", "$a"),
        ("$a/#", "$a|$a/b"),
        ("$a/+", "$a/b"),
        ("+/b", "a/b"),
        ("ü/+", "ü/€"),
    ):

        async def scenario(rig):
            got = []
            rig.client.on(topic_filter, lambda message: got.append(message.topic))
            await rig.up()
            for topic in topics:
                await rig.broker.publish(topic, b"x")
            await until(lambda: rig.client.received == len(topics))
            assert got == matching.split("|"), (topic_filter, got)
            assert rig.client.stats()["discarded"] == len(topics) - len(got)

        play(scenario)


def test_no_failure_of_a_handler_ends_the_client():
    async def for_ever():
        await asyncio.Event().wait()

    async def cancelled():
        task = asyncio.create_task(for_ever())
        await asyncio.sleep_ms(0)
        task.cancel()
        await task

    for kind in (ValueError, OSError, MemoryError, StopIteration, StopAsyncIteration, asyncio.CancelledError, None):

        async def scenario(rig):
            client = rig.client
            got = []

            def plain(message):
                raise kind("plain")

            async def coroutine(message):
                await asyncio.sleep_ms(0)
                if kind is None:
                    await cancelled()
                raise kind("coroutine")

            if kind is not None:
                client.on("plain", plain)
            client.on("coroutine", coroutine)
            client.on("#", lambda message: got.append(message.topic))
            await rig.up()
            for n, topic in enumerate(("plain", "coroutine", "other")):
                await rig.broker.publish(topic, b"1", 1, 10 * n + 1)
                await rig.broker.publish(topic, b"2", 2, 10 * n + 2)
                await rig.broker.expect("PUBACK %d" % (10 * n + 1))
                await rig.broker.expect("PUBCOMP %d" % (10 * n + 2))
            assert got[-2:] == ["other", "other"]
            assert client.stats()["handler_errors"] == (2 if kind is None else 4), kind
            await client.acknowledged(await client.publish("t", "a"))
            assert rig.broker.connections == 1

        play(scenario)


def test_slow_handler_keeps_no_acknowledgement_of_our_own_messages_waiting():
    """[MQTT-4.6.0-2]"""
    async def scenario(rig):
        client = rig.client
        held = Gate(client)
        await rig.up()
        for n in range(1, 10):
            await rig.broker.publish("t", b"%d" % n, 2 - n % 2, n)
        await until(lambda: held.messages)
        for qos in (0, 1, 2, 1, 2):
            await client.acknowledged(await client.publish("out", "x", qos=qos))
        assert await client.subscribe("more", 1) == 1
        await client.unsubscribe("more")
        assert await client.drain(20)
        assert held.texts == ["1"] and not rig.broker.named("PUBACK") and not rig.broker.named("PUBREC")
        held.gate.set()
        await rig.broker.expect("PUBACK 9")
        await rig.broker.expect("PUBCOMP 8")
        # In the order in which the messages came.
        assert [p.packet_id for p in rig.broker.packets if p.name in ("PUBACK", "PUBREC")] == list(range(1, 10))

    play(scenario)


def test_reader_that_waits_for_room_owes_the_broker_nothing():
    async def scenario(rig):
        client = rig.client
        held = Gate(client)
        await rig.up()
        await client.publish("out", "a", qos=2)
        await client.publish("out", "b", qos=2)
        await rig.broker.expect("PUBLISH 1 a")
        for n in range(1, 18):
            await rig.broker.publish("t", b"%d" % n, 1, n)
        await until(lambda: held.messages and len(client._inbox) == 16)
        await rig.broker.send(ack("PUBREC", 1) + publish("t", b"18", 1, 18))
        await until(lambda: client._blocked)
        await rig.broker.expect("PUBREL 1")
        held.gate.set()
        await rig.broker.expect("PUBACK 18")
        await rig.broker.send(ack("PUBCOMP", 1))
        await rig.broker.expect("PUBLISH 2 b")

    play(scenario, [(0, "PUBLISH", 0, "silent"), (0, "PUBREL", 0, "silent")], in_flight=1)


def test_handler_may_publish_at_every_qos_while_window_and_journal_are_full():
    async def scenario(rig):
        client = rig.client
        done = []
        full = []

        def note(original, *args):
            try:
                return original(*args)
            except JournalFull:
                full.append(True)
                raise

        async def handler(message):
            for qos in (0, 1, 2):
                await client.publish("out", b"%s %d" % (message.payload, qos) + b"." * 1000, qos=qos)
            done.append(message.payload)

        async def program():
            for n in range(40):
                await client.publish("own", b"%02d" % n + b"." * 1000)

        client.on("in", handler)
        await rig.up()
        wrap(client.store, "publish", note)
        task = asyncio.create_task(program())
        await until(lambda: full and len(client.store.session.out) == 2)
        assert not task.done()
        for n in range(1, 4):
            await rig.broker.publish("in", b"%d" % n, n % 3, n)
        await until(lambda: len(full) > 1 and client._handling and len(client._inbox) == 2)
        assert not done
        await rig.broker.drop()
        await until(lambda: len(done) == 3)
        await task
        assert await client.drain(20)
        texts = [payload.decode()[:3] for topic, payload, qos in rig.broker.delivered if topic == "out" and qos]
        assert texts == ["1 1", "1 2", "2 1", "2 2", "3 1", "3 2"]

    play(scenario, [(1, "PUBLISH", 0, "ignored")], size=16384, when_full="wait", in_flight=2)


def test_publish_subscribe_and_waiting_work_inside_a_handler():
    async def scenario(rig):
        client = rig.client
        done = []

        async def handler(message):
            await client.acknowledged(await client.publish("out", message.payload, qos=2))
            done.append(await client.subscribe("more", 1))
            assert await client.drain(20)

        client.on("in", handler)
        await rig.up()
        await rig.broker.publish("in", b"a", 2, 5)
        await rig.broker.expect("PUBCOMP 5")
        assert rig.broker.delivered == [("out", b"a", 2)] and done == [1]

    play(scenario)


def test_slow_handler_holds_the_broker_back_in_bounded_memory_and_loses_nothing():
    async def scenario(rig):
        client = rig.client
        held = Gate(client)
        await rig.up()
        for n in range(1, 31):
            await rig.broker.publish("t", b"%d" % n, 1 + n % 2, n)
        await until(lambda: client._blocked)
        await turns()
        assert len(client._inbox) == 16 and held.texts == ["1"]
        held.gate.set()
        await until(lambda: len(held.texts) == 30)
        assert held.texts == [str(n) for n in range(1, 31)]
        await rig.broker.expect("PUBACK 30")
        await rig.broker.expect("PUBCOMP 29")
        assert rig.broker.connections == 1

    play(scenario)


def test_large_messages_fill_the_inbox_by_their_bytes():
    async def scenario(rig):
        client = rig.client
        held = Gate(client)
        await rig.up()
        for n in range(1, 8):
            await rig.broker.publish("t", b"%d" % n * 3000, 1, n)
        await until(lambda: client._blocked)
        assert len(client._inbox) == 3
        held.gate.set()
        await rig.broker.expect("PUBACK 7")
        assert client._inbox_bytes == 0 and len(held.messages) == 7

    play(scenario)


def test_qos_0_beyond_the_inbox_is_discarded_and_counted():
    async def scenario(rig):
        held = Gate(rig.client)
        await rig.up()
        await rig.broker.publish("t", b"0", 0)
        await until(lambda: held.messages)
        for n in range(1, 21):
            await rig.broker.publish("t", b"%d" % n, 0)
        await until(lambda: rig.client.stats()["discarded"] == 4)
        held.gate.set()
        await until(lambda: len(held.messages) == 17)
        assert held.texts == [str(n) for n in range(17)]

    play(scenario)


def test_link_lost_while_the_inbox_is_full_loses_no_message():
    async def scenario(rig):
        held = Gate(rig.client)
        await rig.up()
        for n in range(1, 21):
            await rig.broker.publish("t", b"%d" % n, 2, n)
        await until(lambda: rig.client._blocked)
        await rig.broker.drop()
        rig.client._down.set()  # it does not read, so it would notice only at its next write
        await rig.up(2)
        for n in range(1, 21):
            await rig.broker.publish("t", b"%d" % n, 2, n, dup=True)
        held.gate.set()
        await rig.broker.expect("PUBCOMP 20")
        assert held.texts == [str(n) for n in range(1, 21)]

    play(scenario)


def test_cancellation_that_wait_for_swallows_does_not_keep_an_old_connection_alive():
    swallowed = []

    class Swallowing:
        """In place of the client's asyncio: as wait_for() is when what it waits for ends in the same turn."""

        def __getattr__(self, name):
            return getattr(asyncio, name)

        async def wait_for_ms(self, awaitable, ms):
            try:
                return await asyncio.wait_for_ms(awaitable, ms)
            except asyncio.CancelledError:
                if swallowed:
                    raise
                swallowed.append(True)

    async def scenario(rig):
        held = Gate(rig.client)
        await rig.up()
        client_module.asyncio = Swallowing()
        try:
            for n in range(1, 21):
                await rig.broker.publish("t", b"%d" % n, 1, n)
            await until(lambda: rig.client._blocked)
            rig.client._down.set()
            await rig.up(2)
        finally:
            client_module.asyncio = asyncio
        assert swallowed
        held.gate.set()

    play(scenario)


def test_handler_that_waits_for_the_broker_behind_a_full_inbox_does_not_wait_for_ever():
    async def scenario(rig):
        client = rig.client
        got = []

        async def handler(message):
            got.append(int(message.payload))
            if len(got) == 1:
                await client.acknowledged(await client.publish("out", b"x", qos=1))

        client.on("#", handler)
        await rig.up()
        for n in range(1, 26):
            await rig.broker.publish("t", b"%d" % n, 2, n)
        await rig.broker.expect("PUBLISH 1 x")
        await rig.broker.send(ack("PUBACK", 1))  # the client has it behind 25 messages
        await rig.up(2)
        assert client.stats()["passed_over"] == 8
        for n in range(18, 26):  # it has a PUBCOMP for each of the others
            await rig.broker.publish("t", b"%d" % n, 2, n, dup=True)
        await rig.broker.expect("PUBCOMP 25")
        assert got == list(range(1, 26))

    play(scenario, [(0, "PUBLISH", 0, "silent")], answer_ms=200)


def test_broker_that_sends_more_than_256_messages_before_a_pubrel_is_no_error():
    # mosquitto 2.0 does after a reconnection: all that waits goes out at once, whatever its window.
    async def scenario(rig):
        got = []
        rig.client.on("t", lambda message: got.append(int(message.payload)))
        await rig.up()
        await rig.broker.send(b"".join([publish("t", b"%d" % n, 1 + (n < 291), n) for n in range(1, 301)]))
        await rig.up(2)
        assert got == list(range(1, 257)) and not rig.client.store.session.held
        again = [publish("t", b"%d" % n, 1 + (n < 291), n, dup=True) for n in range(257, 301)]
        await rig.broker.send(b"".join(again))
        await until(lambda: len(got) == 300)
        await rig.broker.expect("PUBACK 300")
        stats = rig.client.stats()
        assert got == list(range(1, 301)) and stats["protocol_errors"] == 0 and stats["passed_over"] == 44
        assert [text for text in _logged(rig.client) if "passed over" in text]
        assert rig.broker.connections == 2

    play(scenario)


def test_messages_nobody_asks_for_do_not_stop_a_program_that_only_publishes():
    async def scenario(rig):
        await rig.up()
        for n in range(1, 26):
            await rig.broker.publish("t", b"%d" % n, 1, n)
        await rig.client.acknowledged(await rig.client.publish("out", b"x", qos=2))

    play(scenario, answer_ms=200)


def test_messages_by_async_for():
    async def scenario(rig):
        got = []
        await rig.up()
        for n in (1, 2, 3):
            await rig.broker.publish("t", b"%d" % n, 1, n)
        async for message in rig.client.messages:
            got.append(message.payload)
            assert len(rig.broker.named("PUBACK")) < len(got)  # not before the loop asks for the next
            if len(got) == 3:
                break
        await rig.broker.expect("PUBACK 2")
        await turns()
        assert got == [b"1", b"2", b"3"] and rig.broker.trace()[-1] == "PUBACK 2"
        await rig.broker.publish("t", b"4", 1, 4)
        async for message in rig.client.messages:
            assert message.payload == b"4"
            break
        await rig.broker.expect("PUBACK 3")

    play(scenario)


def test_message_that_came_while_nobody_was_in_the_loop_is_not_lost():
    async def scenario(rig):
        await rig.up()
        waiting = asyncio.create_task(rig.client.messages.__anext__())
        await turns()
        waiting.cancel()
        await rig.broker.publish("t", b"1", 1, 1)
        await until(lambda: rig.client.received == 1)
        message = await rig.client.messages.__anext__()
        assert message.payload == b"1" and not rig.broker.named("PUBACK")

    play(scenario)


def test_handlers_and_loop_share_the_messages():
    async def scenario(rig):
        handled = []
        rig.client.on("a", lambda message: handled.append(message.payload))
        waiting = asyncio.create_task(rig.client.messages.__anext__())
        await rig.up()
        await rig.broker.publish("a", b"1", 1, 1)
        await rig.broker.publish("b", b"2", 1, 2)
        assert (await waiting).payload == b"2" and handled == [b"1"]

    play(scenario)


def test_loop_over_messages_ends_with_close():
    async def scenario(rig):
        ended = []

        async def loop():
            async for _ in rig.client.messages:
                pass
            ended.append(True)

        task = asyncio.create_task(loop())
        await rig.up()
        await rig.client.close()
        await task
        assert ended

    play(scenario)


def test_oversized_message_is_acknowledged_counted_and_not_delivered():
    """[MQTT-4.5.0-2]"""
    async def scenario(rig):
        got = []
        rig.client.on("#", lambda message: got.append(message.payload))
        await rig.up()
        await rig.broker.publish("t", b"x" * 5000, 1, 1)
        await rig.broker.publish("t", b"y" * 5000, 2, 2)
        await rig.broker.publish("t", b"z" * 5000, 0)
        await rig.broker.publish("t", b"small", 1, 4)
        await rig.broker.expect("PUBACK 4")
        await rig.broker.expect("PUBCOMP 2")
        assert got == [b"small"] and rig.client.stats()["too_large"] == 3
        assert rig.broker.trace().count("PUBACK 1") == 1 and rig.broker.connections == 1

    play(scenario)


# Subscriptions.


def test_subscribe_returns_the_granted_qos():
    async def scenario(rig):
        for qos in (0, 1, 2):
            assert await rig.client.subscribe("f%d" % qos, qos) == qos
        rig.broker.script = [(0, "SUBSCRIBE", 0, bytes((0x90, 3, 0xFE, 0, 1)))]
        assert await rig.client.subscribe("less", 2) == 1

    play(scenario)


def test_subscribe_refused():
    async def scenario(rig):
        error = await raised(rig.client.subscribe("secret/#", 2), SubscribeRefused)
        assert error.args == ("secret/#",)
        await rig.broker.drop()
        await rig.up(2)
        assert await rig.client.subscribe("open", 1) == 1
        assert len(rig.broker.named("SUBSCRIBE")) == 2  # nobody asks for what was refused

    play(scenario, [(1, "SUBSCRIBE", 1, "refuse 128")])


def test_bad_arguments_are_value_errors_and_change_nothing():
    """[MQTT-3.3.1-4] [MQTT-3.3.2-2] [MQTT-3.8.3-1] [MQTT-3.10.3-1]"""
    async def scenario(rig):
        client = rig.client
        await rig.up()
        before = client.stats()
        for call in (
            lambda: client.subscribe("a/#/b", 1),
            lambda: client.subscribe("", 1),
            lambda: client.subscribe("a", 3),
            lambda: client.unsubscribe("a#"),
            lambda: client.publish("a/+", b""),
            lambda: client.publish("", b""),
            lambda: client.publish("a", b"", qos=3),
            lambda: client.publish("a", b"", qos=0, mark=1),
            lambda: client.publish("a", 21.5),
            lambda: client.publish("a", None, qos=0),
            lambda: client.publish("a", b"x" * 5000),
        ):
            await raised(call(), ValueError)
        try:
            client.on("a#", print)
            raise AssertionError("accepted")
        except ValueError:
            pass
        assert client.stats() == before and client.mark is None

    play(scenario)


def test_subscription_is_not_sent_again_while_the_broker_has_it():
    async def scenario(rig):
        await rig.client.subscribe("f", 1)
        await rig.broker.drop()
        await rig.up(2)
        assert await rig.client.subscribe("f", 1) == 1
        await rig.client.close()
        client = await rig.reboot()
        await rig.up(3)
        assert await client.subscribe("f", 1) == 1
        assert len(rig.broker.named("SUBSCRIBE")) == 1
        assert await client.subscribe("f", 2) == 2  # something else
        assert len(rig.broker.named("SUBSCRIBE")) == 2

    for version in (4, 5):
        play(scenario, version=version)


def test_subscription_is_sent_again_when_the_link_is_lost_before_suback():
    for flavour in ("lost", "unanswered"):

        async def scenario(rig):
            assert await rig.client.subscribe("f", 2) == 2
            assert rig.broker.trace() == ["CONNECT", "SUBSCRIBE 65024 f", "CONNECT", "SUBSCRIBE 65024 f"]

        for version in (4, 5):
            play(scenario, [(1, "SUBSCRIBE", 1, flavour)], version=version)


def test_subscription_is_made_again_by_itself_when_the_broker_lost_the_session():
    async def scenario(rig):
        await rig.client.subscribe("f", 1)
        rig.broker.forget()
        await rig.broker.drop()
        await until(lambda: rig.broker.sessions.get("p7", ({},))[0] == {"f": 1})

    for version in (4, 5):
        play(scenario, version=version)


def test_subscription_is_made_again_when_a_connack_that_told_of_the_loss_was_lost_itself():
    for reboot in (False, True):

        async def scenario(rig):
            await rig.client.subscribe("f", 1)
            rig.broker.forget()
            await rig.broker.drop()
            await until(lambda: 2 in rig.broker.closed)
            if reboot:
                client = await rig.reboot()
                await client.subscribe("f", 1)
            await until(lambda: rig.broker.sessions["p7"][0] == {"f": 1}, "SUBSCRIBE on the new session")
            assert rig.client.session_present

        play(scenario, [(2, "CONNECT", 1, "unanswered")])


def test_two_tasks_may_ask_for_the_same_subscription():
    async def scenario(rig):
        tasks = [asyncio.create_task(rig.client.subscribe("f", 1)) for _ in range(3)]
        for task in tasks:
            assert await task == 1
        assert len(rig.broker.named("SUBSCRIBE")) == 1

    play(scenario)


def test_unsubscribe_is_confirmed_and_remembered():
    async def scenario(rig):
        await rig.client.subscribe("f", 1)
        await rig.client.unsubscribe("f")
        assert rig.broker.sessions["p7"][0] == {}
        rig.broker.forget()
        await rig.broker.drop()
        await rig.up(3)  # the UNSUBSCRIBE was lost the first time
        assert await rig.client.subscribe("g", 1) == 1
        assert rig.broker.sessions["p7"][0] == {"g": 1}

    for version in (4, 5):
        play(scenario, [(1, "UNSUBSCRIBE", 1, "lost")], version=version)


def test_subscribe_offline_is_sent_when_connected():
    async def scenario(rig):
        task = asyncio.create_task(rig.client.subscribe("f", 1))
        await turns()
        await rig.client.start()
        assert await task == 1

    play(scenario, start=False)


def test_identifiers_of_subscribe_are_none_of_a_live_message():
    """[MQTT-2.3.1-2] [MQTT5-2.2.1-3]"""
    async def scenario(rig):
        for n in range(3):
            await rig.client.publish("t", str(n), qos=1)
        await rig.broker.expect("PUBLISH 3 2")
        await rig.client.subscribe("f", 1)
        assert rig.broker.named("SUBSCRIBE")[0].packet_id not in (1, 2, 3)

    for version in (4, 5):
        play(scenario, SILENT, version=version)


# Keep-alive and links that die.


class _Clock:
    """In place of the client's time: goes on when told to."""

    def __init__(self):
        self.now = time.ticks_add(0, -3)  # and soon wraps

    def __enter__(self):
        client_module.time = self
        return self

    def __exit__(self, *_):
        client_module.time = time

    def ticks_ms(self):
        return self.now

    def ticks_diff(self, a, b):
        return time.ticks_diff(a, b)

    def wait(self, ms):
        self.now = time.ticks_add(self.now, ms)


class _Pulses(_Clock):
    """A clock in place of the client's, whose pulse comes when told to."""

    def __init__(self, client):
        super().__init__()
        self._client = client
        self._due = asyncio.Event()
        self._waits = False

    def __enter__(self):
        client_module.asyncio = self
        return super().__enter__()

    def __exit__(self, *_):
        client_module.asyncio = asyncio
        super().__exit__()
        self._due.set()

    def __getattr__(self, name):  # of asyncio
        return getattr(asyncio, name)

    async def sleep_ms(self, ms):
        if ms != self._client._pulse_ms:
            return await asyncio.sleep_ms(ms)
        self._waits = True
        await self._due.wait()
        self._due.clear()

    async def pulse(self, ms):
        """Let ms pass, and a pulse come."""
        await until(lambda: self._waits, "the pulse")
        self.wait(ms)
        self._waits = False
        self._due.set()
        await turns()


def test_ping_goes_out_in_idle_time_and_an_answer_keeps_the_link():
    """[MQTT-3.1.2-23] [MQTT5-3.1.2-20]"""
    async def scenario(rig):
        hurry(rig.client, 4)
        await rig.client.start()
        await rig.broker.expect("PINGREQ", 3)
        assert rig.broker.connections == 1

    for version in (4, 5):
        play(scenario, start=False, version=version)


def test_no_ping_without_keep_alive():
    async def scenario(rig):
        rig.client._pulse_ms = 1
        await rig.client.start()
        await rig.up()
        rig.client._attempt = 1
        await until(lambda: rig.client._attempt == 0)  # one pulse
        assert rig.broker.trace() == ["CONNECT"]

    play(scenario, start=False, keep_alive_s=0)


def test_half_open_link_is_noticed_by_its_own_deadline_when_idle():
    """[MQTT-3.12.4-1] [MQTT5-3.12.4-1]"""
    async def scenario(rig):
        hurry(rig.client, 4)
        await rig.client.start()
        await rig.up(2)
        assert rig.client.last_error.errno == 110 or "no longer answers" in str(rig.client.last_error)

    for version in (4, 5):
        play(scenario, [(1, "PINGREQ", 0, "ignored")], start=False, answer_ms=200, version=version)


def test_half_open_link_is_noticed_long_before_keep_alive_when_a_message_waits():
    async def scenario(rig):
        rig.client._pulse_ms = 1
        await rig.client.start()
        await rig.client.acknowledged(await rig.client.publish("t", "a", qos=2))
        assert rig.broker.connections == 2 and len(rig.broker.named("PINGREQ", 1)) == 1

    script = [(1, "PUBLISH", 0, "ignored"), (1, "PINGREQ", 0, "ignored")]
    play(scenario, script, start=False, keep_alive_s=3600, answer_ms=200)


def test_half_open_link_is_noticed_also_when_only_a_subscription_waits():
    async def scenario(rig):
        rig.client._pulse_ms = 1
        await rig.client.start()
        assert await rig.client.subscribe("f", 2) == 2
        assert rig.broker.connections == 2 and len(rig.broker.named("PINGREQ", 1)) == 1

    script = [(1, "SUBSCRIBE", 0, "ignored"), (1, "PINGREQ", 0, "ignored")]
    play(scenario, script, start=False, keep_alive_s=0, answer_ms=200)


def test_half_open_link_is_noticed_in_bounded_time():
    for more, waits, limit_ms in (
        ({}, False, 45000 + 10000 + 2000),
        ({}, True, 2 * 10000 + 3000),
        ({"keep_alive_s": 3600}, True, 2 * 10000 + 3000),
        ({"keep_alive_s": 20}, False, 15000 + 10000 + 2000),
    ):

        async def scenario(rig):
            client = rig.client
            with _Pulses(client) as clock:
                await client.start()
                await rig.up()
                if waits:
                    await client.publish("t", "a")
                    await rig.broker.expect("PUBLISH 1 a")
                passed_ms = 0
                while not client.last_error:
                    await clock.pulse(1000)
                    passed_ms += 1000
                    assert passed_ms <= limit_ms + 1000, (more, waits)
                assert passed_ms > limit_ms - 3000 and "no longer answers" in str(client.last_error)
            await rig.up(2)

        options = {"answer_ms": 10000}
        options.update(more)
        play(scenario, [(1, "PUBLISH", 0, "ignored"), (1, "PINGREQ", 0, "ignored")], start=False, **options)


def test_broker_that_sends_but_never_answers_is_left():
    async def scenario(rig):
        client = rig.client
        client.on("#", lambda message: None)
        with _Pulses(client) as clock:
            await client.start()
            await rig.up()
            for n in range(1000):
                await rig.broker.publish("t", b"%d" % n)
                await until(lambda: client.received > n)
                await clock.pulse(1000)
                if client.last_error:
                    break
            assert 45 + 60 <= n <= 45 + 63, n
            assert "no longer answers" in str(client.last_error)
        await rig.up(2)

    play(scenario, [(1, "PINGREQ", 0, "ignored")], start=False, answer_ms=10000)


def test_broker_that_takes_nothing_more_is_left_also_while_it_sends():
    for write in ("qos 0", "qos 1", "subscribe"):

        async def scenario(rig):
            client = rig.client
            client.on("#", lambda message: None)

            async def never():
                await asyncio.Event().wait()

            with _Pulses(client) as clock:
                await client.start()
                await rig.up()
                client._stream.drain = never
                if write == "subscribe":
                    task = asyncio.create_task(client.subscribe("f"))
                else:
                    await client.publish("t", "a" * 2000, qos=int(write[4:]))
                for n in range(100):
                    await rig.broker.publish("t", b"%d" % n)
                    await until(lambda: client.received > n)
                    await clock.pulse(1000)
                    if client.last_error:
                        break
                assert 10 <= n <= 12, (write, n)
                assert "takes nothing" in str(client.last_error)
            await rig.up(2)
            if write == "qos 1":
                assert await client.drain(20)
            elif write == "subscribe":
                assert await task == 0

        play(scenario, start=False, answer_ms=10000)


class _Streams:
    """Has each connection's stream given to change(number of the connection, stream) before it is used."""

    def __init__(self, change):
        self.change = change
        self.n = 0

    def __enter__(self):
        self.dial = client_module.dial
        client_module.dial = self._dial
        return self

    def __exit__(self, *_):
        client_module.dial = self.dial

    def _dial(self, *args):
        stream = self.dial(*args)
        self.n += 1
        self.change(self.n, stream)
        return stream


def test_write_that_is_never_taken_ends_by_a_deadline_at_every_place():
    for blocked in (1, 2):  # the CONNECT; the DISCONNECT that ends a clean first connection
        drains = []

        def change(number, stream):
            async def drain(original):
                drains.append(number)
                if len(drains) == blocked:
                    await asyncio.Event().wait()
                await original()

            wrap(stream, "drain", drain)

        async def scenario(rig):
            with _Streams(change):
                await rig.client.start()
                await rig.up(2)
                assert rig.client.last_error is not None

        play(scenario, start=False, fresh=True, answer_ms=200)


def test_close_ends_also_when_the_broker_takes_nothing():
    async def scenario(rig):
        async def never():
            await asyncio.Event().wait()

        await rig.up()
        rig.client._stream.drain = never
        await rig.client.publish("t", "a")
        await asyncio.wait_for_ms(rig.client.close(), 20000)
        assert not rig.client.connected and rig.client._stream is None

    play(scenario)


def test_everything_is_written_in_pieces_that_a_pico_w_takes_with_a_turn_after_each():
    calls = []

    def change(number, stream):
        def write(original, data):
            calls.append(len(data))
            original(data)

        def drain(original):
            calls.append(0)
            return original()

        wrap(stream, "write", write)
        wrap(stream, "drain", drain)

    async def scenario(rig):
        client = rig.client
        with _Streams(change):
            await client.start()
            await rig.up()
            await client.publish("t", "0" * 3000, qos=0)
            await client.subscribe("f" * 900)
            for qos in (1, 2):
                await client.acknowledged(await client.publish("t", str(qos) * 3000, qos=qos))
            assert await client.drain(20)
            await client.close()
        assert max(calls) <= 800 and sum(calls) > 4 * 3000 + 900
        together = [0]
        for n in calls:
            if n:
                together[-1] += n
            else:
                together.append(0)
        assert max(together) <= 800
        assert [len(payload) for _, payload, _ in rig.broker.delivered] == [3000] * 3
        assert rig.broker.packets[0].password == "p" * 3000

    play(scenario, start=False, username="u", password="p" * 3000)


def test_answer_that_is_there_unread_after_the_loop_was_blocked_is_an_answer():
    async def scenario(rig):
        client = rig.client
        with _Pulses(client) as clock:
            await client.start()
            await rig.up()
            await clock.pulse(50000)
            await rig.broker.expect("PINGREQ")
            await clock.pulse(25000)  # blocked for so long
            await rig.broker.send(b"\xd0\x00")
            await until(lambda: client._ping_at is None)
            await clock.pulse(1000)
            await clock.pulse(1000)
            assert client.connected and rig.broker.connections == 1

    play(scenario, [(1, "PINGREQ", 1, "silent")], start=False, answer_ms=10000)


def test_ping_that_waits_behind_a_large_message_has_its_time_from_when_it_goes_out():
    async def scenario(rig):
        client = rig.client
        with _Pulses(client) as clock:
            await client.start()
            await rig.up()
            drain = client._stream.drain
            slow = asyncio.Event()

            async def wait():
                await slow.wait()
                slow.clear()
                await drain()

            client._stream.drain = wait
            await client.publish("t", "a" * 10000, qos=0)
            for n in range(14):
                await clock.pulse(9000)  # longer than the keep-alive and answer_ms together
                slow.set()
                await turns()
            assert client.connected and rig.broker.connections == 1
            await until(lambda: rig.broker.delivered or slow.set())
            client._stream.drain = drain
            slow.set()
            await rig.broker.expect("PINGREQ")
            await until(lambda: client._ping_at is None)
            assert len(rig.broker.named("PINGREQ")) == 1 and rig.broker.connections == 1

    play(scenario, start=False, answer_ms=10000)


class Network:
    """A link whose address can change, or be gone."""

    def __init__(self):
        self.ups = 0
        self.has = None

    async def up(self):
        self.ups += 1
        self.has = self.has or "10.0.0.%d" % self.ups

    def address(self):
        return self.has


def test_connection_ends_soon_when_the_network_has_gone_or_has_another_address():
    for address in (None, "10.0.0.99"):

        async def scenario(rig):
            client = rig.client
            with _Pulses(client) as clock:
                await client.start()
                await rig.up()
                for _ in range(5):
                    await clock.pulse(1000)
                assert client.connected and client._link.ups == 1
                client._link.has = address
                await clock.pulse(1000)
                assert client.connected  # a state that flickers decides nothing
                client._link.has = "10.0.0.1"
                await clock.pulse(1000)
                client._link.has = address
                await clock.pulse(1000)
                await clock.pulse(1000)
                await until(lambda: rig.broker.closed == [1], "the end of the old connection")
                assert "network's address" in str(client.last_error)
            await rig.up(2)
            assert client._link.ups == 2 and client._link.has == (address or "10.0.0.2")
            assert list(rig.broker.links) == [2]

        play(scenario, start=False, link=Network())


def test_slow_handler_is_no_reason_to_drop_the_link():
    async def scenario(rig):
        client = rig.client
        client._keep_alive_ms = 4
        client._pulse_ms = 1
        held = Gate(client)
        await client.start()
        await rig.up()
        await rig.broker.send(b"".join([publish("t", b"%d" % n, 1, n) for n in range(1, 26)]))
        await until(lambda: client._blocked)
        pings = len(rig.broker.named("PINGREQ"))
        await rig.broker.expect("PINGREQ", pings + 20)
        held.gate.set()
        await rig.broker.expect("PUBACK 25")
        assert rig.broker.connections == 1

    play(scenario, start=False)


def test_every_failure_is_followed_by_a_pause_and_attempts_in_an_hour_are_few():
    class Down:
        async def up(self):
            raise OSError("no Wi-Fi")

    def no_address():
        raise OSError(-2, "no address")

    def no_memory(*_):
        raise MemoryError("no room")

    class Mute:
        def print_exception(self, error):
            pass

    for name, script, longest in (
        ("cut", [(0, "CONNECT", 0, "lost")], False),
        ("cut after CONNACK", [(0, "CONNECT", 0, "answered")], False),
        ("unavailable", [(0, "CONNECT", 0, "refuse 3")], False),
        ("protocol version", [(0, "CONNECT", 0, "refuse 1")], True),
        ("client_id", [(0, "CONNECT", 0, "refuse 2")], True),
        ("password", [(0, "CONNECT", 0, "refuse 4")], True),
        ("not authorised", [(0, "CONNECT", 0, "refuse 5")], True),
        ("reserved", [(0, "CONNECT", 0, "refuse 77")], True),
        ("captive portal", [(0, "CONNECT", 0, b"HTTP/1.1 302 Found\r\nLocation: /\r\n\r\n")], False),
        ("no CONNACK", [(0, "CONNECT", 0, "silent")], False),
        ("no broker", None, False),
        ("no link", (), False),
        ("no address", (), False),
        ("no memory", (), False),
    ):
        pauses = []

        async def pause(ms, awaitable):
            awaitable.close()
            pauses.append(ms)
            if sum(pauses) > 3600000:
                rig_.client._leaving = True
            await asyncio.sleep_ms(0)

        async def scenario(rig):
            nonlocal rig_
            rig_ = rig
            client = rig.client
            client._pulse_ms = 1000000
            if name == "no broker":
                await rig.broker.stop()
            elif name == "no link":
                client._link = Down()
            elif name == "no address":
                client._addresses.next = no_address
            elif name == "no memory":
                client.store.connected = no_memory
            await client.publish("t", "kept", qos=2)
            within, client_module._within = client_module._within, pause
            client_module.sys = Mute()
            try:
                await client.start()
                await until(lambda: client._run_task.done(), name)
            finally:
                client_module._within = within
                client_module.sys = sys
            assert 60 <= len(pauses) <= 140, (name, len(pauses))
            for n, ms in enumerate(pauses):
                limit_ms = 60000 if longest else min(1000 << n, 60000)
                assert limit_ms // 2 <= ms <= limit_ms, (name, pauses)
            assert rig.broker.connections <= len(pauses)
            assert client.store.waiting() == 1, name

        rig_ = None
        play(scenario, script or (), start=False, backoff_ms=(1000, 60000), answer_ms=20)


def test_refusal_that_only_a_person_can_mend_is_said_and_ends_when_it_is_mended():
    for code, text in (
        (1, "it does not speak MQTT 3.1.1; it is only asked again at the longest pause"),
        (2, "it does not accept the client_id; it is only asked again at the longest pause"),
        (3, "it is unavailable"),
        (4, "bad user name or password; it is only asked again at the longest pause"),
        (5, "not authorised; it is only asked again at the longest pause"),
        (6, "return code 6; it is only asked again at the longest pause"),
    ):

        async def scenario(rig):
            client = rig.client
            assert await client.drain(20)
            assert client.last_error.return_code == code
            assert str(client.last_error) == "broker refused the connection: " + text
            assert rig.broker.connections == 3

        async def begin(rig):
            await rig.client.publish("t", "kept", qos=1)
            await rig.client.start()
            await scenario(rig)

        script = [(1, "CONNECT", 1, "refuse %d" % code), (2, "CONNECT", 1, "refuse %d" % code)]
        play(begin, script, start=False)


def test_broker_that_closes_is_connected_again():
    async def scenario(rig):
        for n in range(1, 4):
            await rig.up(n)
            await rig.broker.drop()
        await rig.up(4)

    play(scenario)


GARBAGE = (
    # what a broker sends, instead of its answer to the first packet of that name
    ("CONNECT", b"\xff\xff\xff\xff\xff"),
    ("CONNECT", b"HTTP/1.1 400 Bad Request\r\n\r\n"),
    ("CONNECT", publish("t", b"before CONNACK")),
    ("CONNECT", b"\x20\x02\x02\x00"),
    ("PUBLISH", b"\x20\x02\x00\x00"),  # a second CONNACK
    ("PUBLISH", b"\x00\x00"),
    ("PUBLISH", b"\x36\x07\x00\x01a\x00\x01xx"),  # QoS 3
    ("PUBLISH", ack("PUBREC", 1)),  # of a QoS 1 message
    ("PUBLISH", b"\x40\x02\x00\x00"),  # identifier 0
    ("PUBLISH", b"\x40\x80\x80\x80\x80\x01"),
    ("PUBLISH", packet(0x30, b"\x00\x01\xff")),  # a topic that is no UTF-8
    ("SUBSCRIBE", b"\x90\x03\xfe\x00\x03"),  # return code 3
    ("SUBSCRIBE", b"\x90\x04\xfe\x00\x01\x01"),  # two return codes for one filter
    ("SUBSCRIBE", ack("UNSUBACK", 65024)),
)


def test_garbage_ends_the_connection_is_counted_and_loses_nothing():
    """[MQTT-3.2.0-1] [MQTT-3.8.4-5] [MQTT-3.9.3-2] [MQTT-4.8.0-1]"""
    for name, data in GARBAGE:

        async def scenario(rig):
            client = rig.client
            await client.publish("t", "a", qos=1)
            await client.start()
            if name == "SUBSCRIBE":
                await client.subscribe("f", 2)
            else:
                assert await client.drain(20)
            assert client.stats()["protocol_errors"] == 1, (name, data)
            assert isinstance(client.last_error, ProtocolError)
            assert rig.broker.connections == 2 and rig.broker.delivered[0][1] == b"a"

        play(scenario, [(1, name, 1, data)], start=False)


def test_packets_merged_and_split_anyhow_are_understood():
    """[MQTT-7.1.2-1]"""
    packets = [b"\xd0\x00", ack("PUBACK", 999), publish("t", b"x" * 300)]
    packets += [publish("t", b"%d" % n, n % 3, n) for n in range(1, 13)] + [ack("PUBREL", 77)]
    data = b"".join(packets)
    for size in (1, 2, 3, 7, 64, 300, 301, len(data)):

        async def scenario(rig):
            got = []
            rig.client.on("#", lambda message: got.append(message.payload))
            await rig.up()
            for at in range(0, len(data), size):
                await rig.broker.send(data[at : at + size])
                if size < 300:
                    await asyncio.sleep_ms(0)
            await rig.broker.expect("PUBCOMP 77")
            await until(lambda: len(got) == 13)
            assert got[1:] == [b"%d" % n for n in range(1, 13)] and rig.broker.connections == 1

        play(scenario, [(0, "PUBREC", 0, "silent")])


def test_fault_in_a_connection_task_makes_a_new_connection():
    """[MQTT-4.8.0-2]"""
    async def scenario(rig):
        faults = [MemoryError("no room")]

        def fail(original, *args):
            if faults:
                raise faults.pop()
            return original(*args)

        await rig.up()
        wrap(rig.client.store, "_act", fail)
        await rig.client.acknowledged(await rig.client.publish("t", "a", qos=2))
        assert rig.broker.connections == 2 and len(rig.broker.delivered) == 1
        faults.append(MemoryError("no room"))
        wrap(rig.client.store, "connected", fail)
        await rig.broker.drop()
        await rig.up(4)

    play(scenario)


def test_message_there_is_no_memory_for_comes_again():
    """[MQTT-4.8.0-2]"""
    async def scenario(rig):
        got = []
        rig.client.on("#", lambda message: got.append(message.payload))
        await rig.up()
        client = rig.client
        real = client._Message

        def no_room(*_):
            client._Message = real
            raise MemoryError("no room")

        client._Message = no_room
        await rig.broker.publish("t", b"a", 2, 5)
        await rig.up(2)
        await rig.broker.publish("t", b"a", 2, 5, dup=True)
        await rig.broker.expect("PUBCOMP 5")
        assert got == [b"a"]

    play(scenario)


# A full journal.


async def _fill(client):
    """Publish until the journal is full; return how many were stored."""
    n = 0
    while n < 1000:
        try:
            await client.publish("t", "%04d" % n + "." * 400, qos=1, mark=n)
        except JournalFull:
            return n
        n += 1
    raise AssertionError("never full")


def _numbers(broker):
    return [int(payload[:4]) for _, payload, _ in broker.delivered]


def test_full_journal_raises_and_all_that_was_stored_arrives():
    async def scenario(rig):
        client = rig.client
        n = await _fill(client)
        assert n > 10 and client.mark == n - 1
        for text in ("a", "b"):
            await raised(client.publish("t", text * 400, qos=1), JournalFull)
        subscribed = asyncio.create_task(client.subscribe("f", 1))
        await client.start()
        assert await client.drain(20)
        assert _numbers(rig.broker) == list(range(n))
        assert await subscribed == 1
        await client.publish("t", "%04d" % n, qos=1)
        assert await client.drain(20)
        assert rig.broker.connections == 1

    play(scenario, start=False, size=16384)


def test_full_journal_is_left_also_when_the_program_tries_again_at_once():
    async def scenario(rig):
        client = rig.client
        await _fill(client)
        await client.start()
        while True:
            try:
                await client.publish("t", "x" * 400)
                break
            except JournalFull:
                assert time.ticks_diff(time.ticks_ms(), began) < 20000, "it never gets a turn"

    began = time.ticks_ms()
    play(scenario, start=False, size=16384)


def test_full_journal_on_a_new_session_still_gets_through():
    async def scenario(rig):
        n = await _fill(rig.client)
        rig.make()
        await rig.client.start()
        assert await rig.client.drain(20)
        assert _numbers(rig.broker) == list(range(n))

    play(scenario, start=False, size=16384, fresh=True)


def test_full_journal_with_subscriptions_still_gets_through():
    async def scenario(rig):
        client = rig.client
        for n in range(5):
            await client.subscribe("f%d" % n, 1)
        await rig.broker.stop()
        await until(lambda: not client.connected)
        n = await _fill(client)
        await until(lambda: client._attempt >= 3)
        await rig.broker.start()
        assert await client.drain(20)
        assert _numbers(rig.broker) == list(range(n)) and rig.broker.connections == 2
        await _fill(await rig.reboot())
        assert await rig.client.drain(20)

    play(scenario, size=16384)


def test_full_journal_waits_until_the_broker_has_made_room():
    async def scenario(rig):
        client = rig.client
        done = []

        async def program():
            for n in range(100):
                await client.publish("t", "%04d" % n + "." * 400, qos=2)
                done.append(n)

        task = asyncio.create_task(program())
        await turns(300)
        assert 10 < len(done) < 100
        await client.start()
        await task
        assert await client.drain(20)
        assert _numbers(rig.broker) == list(range(100))

    play(scenario, start=False, size=16384, when_full="wait")


def test_full_journal_drops_the_oldest_not_yet_sent_and_says_so():
    async def scenario(rig):
        client = rig.client
        ids = []
        for n in range(100):
            ids.append(await client.publish("t", "%04d" % n + "." * 400, qos=1))
            if n == 0:
                first = asyncio.create_task(client.acknowledged(ids[0]))
                await turns()
        await raised(first, MessageDropped)
        dropped = client.stats()["dropped"]
        await client.start()
        assert await client.drain(20)
        assert _numbers(rig.broker) == list(range(dropped, 100)) and dropped > 0

    play(scenario, start=False, size=16384, when_full="drop_oldest")


# Waiting for the broker.


def test_acknowledged_returns_when_the_broker_has_that_message():
    async def scenario(rig):
        client = rig.client
        first = await client.publish("t", "a", qos=1)
        second = await client.publish("t", "b", qos=2)
        waiting = asyncio.create_task(client.acknowledged(first))
        also = asyncio.create_task(client.acknowledged(first))
        await client.acknowledged(second)
        await turns()
        assert not waiting.done()
        await rig.broker.send(ack("PUBACK", first))
        await waiting
        await also
        await client.acknowledged(first)  # long done
        await client.acknowledged(None)  # QoS 0

    play(scenario, [(1, "PUBLISH", 1, "silent")])


def test_drain_tells_whether_it_was_in_time():
    async def scenario(rig):
        client = rig.client
        assert await client.drain(0)
        await client.publish("t", "a", qos=1)
        await rig.broker.expect("PUBLISH 1 a")
        assert not await client.drain(0.01)
        waiting = asyncio.create_task(client.drain())
        await rig.broker.send(ack("PUBACK", 1))
        assert await waiting and await client.drain(1)

    play(scenario, [(1, "PUBLISH", 1, "silent")])


def test_waiting_for_a_message_whose_record_is_gone_ends():
    async def scenario(rig):
        client = rig.client
        client._pulse_ms = 1
        packet_id = await client.publish("t", "a", qos=1)
        await client.publish("u", "b", qos=1)
        memory = rig.nor.mem
        at = bytes(memory).find(b"\x01\x00ta")
        memory[at + 3] = 0x7A  # bit rot
        waiting = asyncio.create_task(client.acknowledged(packet_id))
        await turns()
        await client.start()
        await raised(waiting, MessageDropped)
        assert await client.drain(20)
        assert rig.broker.delivered == [("u", b"b", 1)] and client.stats()["lost"] == 1

    play(scenario, start=False)


# Offline, and the end.


def test_publish_before_start_and_offline_is_stored_and_sent_later():
    async def scenario(rig):
        client = rig.client
        await client.publish("t", "a", qos=2)
        await client.start()
        assert await client.drain(20)
        await rig.broker.stop()
        await until(lambda: not client.connected)
        await client.publish("t", "b", qos=1)
        await rig.broker.start()
        assert await client.drain(20)
        assert [p for _, p, _ in rig.broker.delivered] == [b"a", b"b"]

    play(scenario, start=False)


def test_qos_0_offline_is_discarded_and_counted():
    async def scenario(rig):
        client = rig.client
        assert await client.publish("t", "a", qos=0) is None
        await client.start()
        await rig.up()
        await client.publish("t", "b", qos=0)
        await until(lambda: rig.broker.delivered)
        assert rig.broker.delivered == [("t", b"b", 0)]
        assert client.stats()["discarded"] == 1 and client.stats()["stored"] == 0

    play(scenario, start=False)


def test_flood_of_qos_0_is_bounded_and_keeps_neither_messages_nor_acknowledgements_waiting():
    async def scenario(rig):
        client = rig.client
        await rig.up()
        running = [True]

        async def flood():
            while running:
                await client.publish("flood", b"x" * 900, qos=0)
                assert len(client._outbox) <= 10

        task = asyncio.create_task(flood())
        client.on("in", lambda message: None)
        await rig.broker.publish("in", b"a", 2, 5)
        await client.acknowledged(await client.publish("t", "a" * 700, qos=2))
        await rig.broker.expect("PUBCOMP 5")
        running.clear()
        await task

    play(scenario)


def test_close_flushes_and_sends_disconnect_and_nothing_after_it():
    """[MQTT-3.14.4-2] [MQTT5-3.14.4-1]"""
    async def scenario(rig):
        client = rig.client
        await rig.up()
        for n in range(4):
            await client.publish("t", "0%d" % n + "x" * 500, qos=0)
        await client.publish("t", "1", qos=1)
        await client.close()
        await until(lambda: rig.broker.closed)
        trace = rig.broker.trace()
        assert len(trace) == 7 and trace[-1] == "DISCONNECT" and "PUBLISH 1 1" in trace
        assert not client.connected

    for version in (4, 5):
        play(scenario, version=version)


def test_close_sends_disconnect_also_after_a_connection_that_failed():
    async def scenario(rig):
        await rig.up()
        await rig.broker.drop()
        await rig.up(2)
        await rig.client.close()
        await rig.broker.expect("DISCONNECT", connection=2)

    play(scenario)


def test_close_of_a_client_that_is_not_connected_ends():
    async def scenario(rig):
        await rig.broker.stop()
        await rig.client.start()
        await until(lambda: rig.client._attempt)
        await rig.client.close()
        await rig.client.close()
        assert rig.client._run_task is None

    play(scenario, start=False, backoff_ms=(60000, 60000))


def test_close_before_start_and_twice_is_harmless():
    async def scenario(rig):
        await rig.client.close()
        await rig.client.start()
        await rig.client.start()
        await rig.up()
        await rig.client.close()
        await rig.client.close()
        assert rig.broker.connections == 1

    play(scenario, start=False)


def test_close_ends_also_when_a_handler_will_not():
    async def scenario(rig):
        released = asyncio.Event()

        async def stubborn(message):
            while not released.is_set():
                try:
                    await released.wait()
                except asyncio.CancelledError:
                    pass

        rig.client.on("#", stubborn)
        await rig.up()
        await rig.broker.publish("t", b"a", 1, 1)
        await until(lambda: rig.client._handling)
        await rig.client.close()
        assert rig.broker.trace()[-1] == "DISCONNECT"
        released.set()
        await turns()

    play(scenario)


def test_close_inside_a_handler_works():
    async def scenario(rig):
        client = rig.client
        closed = []

        async def handler(message):
            await client.close()
            closed.append(True)

        client.on("#", handler)
        await rig.up()
        await rig.broker.publish("t", b"a", 1, 1)
        await until(lambda: closed and rig.broker.closed)
        assert rig.broker.trace() == ["CONNECT", "DISCONNECT"]

    play(scenario)


def test_started_again_after_close_it_goes_on_where_it_was():
    async def scenario(rig):
        client = rig.client
        await client.publish("t", "a", qos=1)
        await rig.broker.expect("PUBLISH 1 a")
        await client.close()
        await client.publish("t", "b", qos=1)
        await client.start()
        assert await client.drain(20)
        assert rig.broker.trace(2) == ["CONNECT", "PUBLISH 1 dup a", "PUBLISH 2 b"]

    play(scenario, SILENT)


def test_message_whose_handler_close_has_cut_short_is_not_being_handled_any_more():
    async def scenario(rig):
        client = rig.client
        held = Gate(client)
        await rig.up()
        await rig.broker.publish("t", b"a", 1, 1)
        await until(lambda: held.messages)
        await client.close()
        await client.start()
        await rig.up(2)
        await turns()
        assert client.idle

    play(scenario)


def test_close_with_messages_unhandled_has_them_come_again_in_order():
    async def scenario(rig):
        client = rig.client
        held = Gate(client)
        await rig.up()
        for n in (1, 2, 3):
            await rig.broker.publish("t", b"%d" % n, 2, n)
        await until(lambda: len(client._inbox) == 2 and held.messages)
        await client.close()
        assert not rig.broker.named("PUBREC")
        held.gate.set()
        await client.start()
        await rig.up(2)
        for n in (1, 2, 3):
            await rig.broker.publish("t", b"%d" % n, 2, n, dup=True)
        await rig.broker.expect("PUBCOMP 3")
        assert held.texts == ["1", "1", "2", "3"]
        assert held.messages[0].token == held.messages[1].token

    play(scenario)


def test_orderly_close_leaves_a_journal_that_mounts_without_doubt():
    async def scenario(rig):
        await rig.client.publish("t", "a", qos=2, mark=41)
        assert await rig.client.drain(20)
        await rig.client.close()
        programs = rig.nor.programs
        client = rig.make()
        assert rig.nor.programs == programs and client.mark == 41 and client.stats()["waiting"] == 0

    play(scenario)


# A flash that fails.


class _Fault:
    """Lets the rig's flash fail: .left operations from now on raise .error."""

    def __init__(self, nor):
        self.left = 0
        self.error = OSError(5, "EIO")
        self.hits = 0
        wrap(nor, "writeblocks", self.act)
        wrap(nor, "ioctl", self.act)

    def act(self, original, *args):
        if self.left and args[0] not in (4, 5):
            self.left -= 1
            self.hits += 1
            raise self.error
        return original(*args)


def test_flash_that_fails_once_in_publish_is_mounted_anew_and_nothing_stored_is_lost():
    for connected in (True, False):

        async def scenario(rig):
            client = rig.client
            fault = _Fault(rig.nor)
            if connected:
                await client.start()
                await rig.up()
            await client.publish("t", "0000", qos=2, mark=0)
            fault.left = 1
            await raised(client.publish("t", "0001", qos=2, mark=1), OSError)
            n = client.mark + 1  # what the program goes on with
            while n < 4:
                try:
                    await client.publish("t", "%04d" % n, qos=2, mark=n)
                except JournalUnavailable:
                    await turns()
                    continue
                n += 1
            await client.start()
            assert await client.drain(20)
            assert _numbers(rig.broker) == [0, 1, 2, 3] and fault.hits == 1

        play(scenario, start=False)


def test_journal_that_any_exception_has_left_in_a_record_is_mounted_anew():
    async def scenario(rig):
        client = rig.client
        fault = _Fault(rig.nor)
        fault.error = MemoryError("no room")
        await rig.up()
        await client.publish("t", "0000", qos=2)
        assert await client.drain(20)
        client.store.commit()  # nothing is left to be recorded, by which it would be noticed
        fault.left = 1
        await raised(client.publish("another topic", "lost", qos=2), MemoryError)
        await rig.up(2)
        await client.publish("t", "0001", qos=2)
        assert await client.drain(20)
        assert _numbers(rig.broker) == [0, 1] and fault.hits == 1

    play(scenario)


def test_flash_that_fails_at_any_one_operation_of_an_exchange_loses_and_doubles_nothing():
    for at in range(1, 12):

        async def scenario(rig):
            client = rig.client
            held = Gate(client)
            held.gate.set()
            fault = _Fault(rig.nor)
            count = [0]

            def act(original, *args):
                if args[0] not in (4, 5):
                    count[0] += 1
                    fault.left = 1 if count[0] == at else 0
                return original(*args)

            wrap(fault, "act", act)
            wrap(rig.nor, "writeblocks", lambda original, *args: act(original, *args))
            await client.start()
            n = 0
            while n < 4:
                try:
                    await client.publish("t", "%04d" % n, qos=2, mark=n)
                except (OSError, JournalUnavailable):
                    await turns()
                n = 0 if client.mark is None else client.mark + 1
            answered = []

            async def remind():  # a broker resends what is not acknowledged, over each new connection
                for connection in range(1, 20):
                    await until(lambda: rig.client.connected and rig.broker.connections >= connection)
                    if connection == rig.broker.connections:
                        await rig.broker.publish("in", b"in", 2, 9, dup=connection > 1)
                    await until(lambda: rig.broker.named("PUBCOMP") or rig.broker.connections > connection)
                    if rig.broker.named("PUBCOMP"):
                        answered.append(True)
                        return

            task = asyncio.create_task(remind())
            assert await client.drain(20)
            await task
            assert answered and _numbers(rig.broker) == [0, 1, 2, 3], at
            tokens = {message.token for message in held.messages}
            assert len(tokens) == 1 and len(held.messages) <= 2, at

        play(scenario, start=False)


def test_message_whose_handler_runs_while_the_flash_is_mounted_anew_is_handled_once():
    async def scenario(rig):
        client = rig.client
        held = Gate(client)
        fault = _Fault(rig.nor)
        await client.start()
        await rig.up()
        for n in (1, 2):
            await rig.broker.publish("t", b"%d" % n, 2, n)
        await until(lambda: held.messages and client._inbox)
        fault.left = 1
        await raised(client.publish("t", "x", qos=1), OSError)
        await rig.up(2)
        for n in (1, 2):
            await rig.broker.publish("t", b"%d" % n, 2, n, dup=True)
        await until(lambda: client.stats()["duplicates"] == 2)
        held.gate.set()
        await rig.broker.expect("PUBCOMP 2")
        assert held.texts == ["1", "2"]

    play(scenario, start=False)


def test_new_session_that_could_not_be_recorded_is_recorded_the_next_time():
    async def scenario(rig):
        client = rig.client
        fault = _Fault(rig.nor)
        await client.start()
        await client.subscribe("f", 1)
        rig.broker.forget()

        def fail(original, *args):
            if args[0] is False and not fault.hits:
                fault.left = 1
            return original(*args)

        wrap(client.store, "connected", fail)
        await rig.broker.drop()
        await until(lambda: rig.broker.sessions.get("p7", ({},))[0] == {"f": 1}, "SUBSCRIBE on the new session")
        assert fault.hits == 1 and rig.broker.connections == 3

    play(scenario, start=False)


def test_flash_that_keeps_failing_makes_no_tight_loop():
    async def scenario(rig):
        client = rig.client
        fault = _Fault(rig.nor)
        await client.publish("t", "a", qos=2)
        fault.left = 1000000
        await client.start()
        await until(lambda: client._attempt >= 4)
        assert fault.hits < 50
        fault.left = 0
        assert await client.drain(20)
        assert len(rig.broker.delivered) == 1

    play(scenario, start=False)


# A program's task that is cancelled.


def test_cancelled_tasks_leave_the_client_sound():
    async def scenario(rig):
        client = rig.client
        first = await client.publish("t", "a", qos=1)
        calls = (
            lambda: client.acknowledged(first),
            lambda: client.drain(),
            lambda: client.drain(1000),
            lambda: client.subscribe("f", 1),
            lambda: client.subscribe("f", 1),
            lambda: client.unsubscribe("g"),
            lambda: client.publish("t", "b", qos=1),
            lambda: client.messages.__anext__(),
        )
        for call in calls:
            task = asyncio.create_task(call())
            await turns(3)
            task.cancel()
            try:
                await task
            except asyncio.CancelledError:
                pass
        assert len(client._requests) == 2
        await client.start()
        assert await client.drain(20)
        await client.acknowledged(first)
        assert await client.subscribe("f", 1) == 1
        assert rig.broker.delivered == [("t", b"a", 1), ("t", b"b", 1)]
        assert rig.broker.sessions["p7"][0] == {"f": 1}
        assert client._requests == [] and client._waiters == {}

    play(scenario, start=False)


def test_cancelled_publish_that_waits_for_room_stores_nothing():
    async def scenario(rig):
        client = rig.client

        async def program():
            for n in range(1000):
                await client.publish("t", "%04d" % n + "." * 400, qos=1)

        task = asyncio.create_task(program())
        await turns(300)
        stored = client.stats()["stored"]
        task.cancel()
        await turns()
        await client.start()
        assert await client.drain(20)
        assert _numbers(rig.broker) == list(range(stored))

    play(scenario, start=False, size=16384, when_full="wait")


def test_cancelled_close_can_be_repeated():
    async def scenario(rig):
        await rig.up()
        task = asyncio.create_task(rig.client.close())
        await asyncio.sleep_ms(0)
        task.cancel()
        try:
            await task
        except asyncio.CancelledError:
            pass
        await rig.client.close()
        await until(lambda: rig.broker.closed)
        await rig.client.start()
        await rig.up(2)

    play(scenario)


# What must not be seen.


def test_password_is_in_no_error_and_no_statistic():
    async def scenario(rig):
        client = rig.client
        errors = []
        wrap(client, "_failed", lambda original, e: (errors.append(e), original(e)))
        await client.start()
        await rig.up(3)
        assert len(errors) == 2
        assert SECRET not in repr(errors) + repr(client.stats()) + str(client.last_error)
        assert SECRET.encode() not in rig.nor.mem
        error = None
        try:
            rig.make(username=None)
        except ValueError as e:
            error = e
        assert error and SECRET not in repr(error)

    script = [(1, "CONNECT", 1, "refuse 4"), (2, "CONNECT", 1, b"rubbish")]
    play(scenario, script, start=False, username="plant", password=SECRET)


# A grace: QoS 1 messages need not be stored if the broker is quick.


def _on_flash(rig):
    """What a restart now would find; the device stays as it is."""
    copy = Nor(rig.nor.size)
    copy.mem[:] = rig.nor.mem
    store = Store(Journal(copy))
    store.open()
    return store


def _waiting_on_flash(rig):
    return _on_flash(rig).waiting()


def _texts(broker):
    return [payload.decode() for _, payload, _ in broker.delivered]


def _figures(client):
    stats = client.stats()
    return stats["stored"], stats["spared"], stats["unsettled"]


def test_message_acknowledged_in_its_grace_is_never_programmed():
    async def scenario(rig):
        await rig.up()
        programs = rig.nor.programs
        for n in range(20):
            await rig.client.acknowledged(await rig.client.publish("t", "%d" % n))
        assert len(rig.broker.delivered) == 20
        assert rig.nor.programs == programs and _figures(rig.client) == (0, 20, 0)
        assert not rig.client._young

    play(scenario, grace_ms=60000)


def test_messages_are_recorded_when_the_grace_of_the_oldest_is_over_and_not_before():
    async def scenario(rig):
        client = rig.client
        with _Clock() as clock:
            await client.start()
            await rig.up()
            for n in range(3):
                ids = []
                for text in "abc":
                    ids.append(await client.publish("t", text))
                    clock.wait(1)
                await rig.broker.expect("PUBLISH %d c" % ids[2])
                await rig.broker.send(ack("PUBACK", ids[0]))
                await until(lambda: client.stats()["unsettled"] == 2)
                clock.wait(2)  # 5 since a, 4 since b
                await asyncio.sleep_ms(20)
                assert _figures(client) == (2 * n, n + 1, 2)
                clock.wait(1)
                await until(lambda: client.stats()["unsettled"] == 0)
                assert _figures(client) == (2 * n + 2, n + 1, 0) and not client._young
                assert _waiting_on_flash(rig) == 2 * n + 2
            assert rig.broker.connections == 1
        await rig.reboot()
        assert await rig.client.drain(20)
        assert rig.broker.trace(2)[1:3] == ["PUBLISH 2 dup b", "PUBLISH 3 dup c"]

    play(scenario, [(1, "PUBLISH", 0, "silent")], start=False, grace_ms=5)


def test_nothing_wakes_up_while_no_message_is_in_its_grace():
    async def scenario(rig):
        client = rig.client
        await rig.up()
        settled = []
        wrap(client.store, "settle", lambda original: (settled.append(1), original()))
        await asyncio.sleep_ms(20)
        assert not settled and not client._aging.is_set()
        await client.publish("t", "a", qos=2)
        await turns()
        assert not client._aging.is_set()

    play(scenario, grace_ms=1)


def test_messages_in_their_grace_are_recorded_at_once_when_the_link_is_lost():
    async def scenario(rig):
        client = rig.client
        await rig.up()
        await _three_unacknowledged(rig)
        assert _figures(client) == (0, 0, 3)
        await rig.broker.stop()
        await until(lambda: not client.connected and client._stream is None)
        assert _figures(client) == (3, 0, 0) and _waiting_on_flash(rig) == 3
        await client.publish("t", "d")  # offline: at once
        assert _waiting_on_flash(rig) == 4
        await rig.broker.start()
        assert await client.drain(20)
        expected = ["CONNECT", "PUBLISH 1 dup a", "PUBLISH 2 dup b", "PUBLISH 3 dup c", "PUBLISH 4 d"]
        assert rig.broker.trace(2) == expected

    play(scenario, SILENT, grace_ms=60000)


def test_messages_in_their_grace_are_recorded_by_close():
    async def scenario(rig):
        await rig.up()
        await _three_unacknowledged(rig)
        await rig.client.close()
        assert _figures(rig.client) == (3, 0, 0)
        client = rig.make()
        assert client.stats()["waiting"] == 3
        await client.start()
        assert await client.drain(20)
        assert _texts(rig.broker) == ["a", "b", "c"]

    play(scenario, SILENT, grace_ms=60000)


def test_messages_in_their_grace_are_recorded_before_drain_gives_up():
    async def scenario(rig):
        await rig.up()
        await _three_unacknowledged(rig)
        assert not await rig.client.drain(0.01)
        assert _figures(rig.client) == (3, 0, 0) and _waiting_on_flash(rig) == 3

    play(scenario, SILENT, grace_ms=60000)


def test_only_qos_1_without_a_mark_has_a_grace_and_the_default_has_none():
    for grace in (True, False):

        async def scenario(rig):
            client = rig.client
            await rig.up()
            await client.publish("t", "a")
            assert client.stats()["unsettled"] == (1 if grace else 0)
            await client.publish("t", "b", mark=7)
            assert _waiting_on_flash(rig) == 2 and _on_flash(rig).mark == 7
            await client.publish("t", "c")
            await client.publish("t", "d", qos=2)
            assert client.stats()["unsettled"] == 0 and _waiting_on_flash(rig) == 4
            assert not client._young

        play(scenario, [(1, "PUBLISH", 0, "silent")], **({"grace_ms": 60000} if grace else {}))


def test_full_journal_keeps_messages_in_ram_beyond_their_grace_and_says_so():
    async def scenario(rig):
        client = rig.client
        await rig.up()
        full = [True]

        def settle(original):
            if full and client.store.unsettled():
                raise JournalFull("no room")
            original()

        wrap(client.store, "settle", settle)
        client._pulse_ms = 1
        await client.publish("t", "a")
        await until(lambda: isinstance(client.last_error, JournalFull))
        client.last_error = None
        await until(lambda: isinstance(client.last_error, JournalFull))  # tried again
        assert rig.broker.connections == 1 and client.stats()["unsettled"] == 1
        assert not await client.drain(0.01)
        client.last_error = None
        await rig.broker.drop()
        await until(lambda: isinstance(client.last_error, JournalFull))
        await rig.up(2)
        await rig.broker.expect("PUBLISH 1 dup a")
        full.clear()
        await until(lambda: client.stats()["unsettled"] == 0)
        assert _waiting_on_flash(rig) == 1
        full.append(True)
        await client.publish("t", "b")
        await client.close()
        assert isinstance(client.last_error, JournalFull)
        full.clear()
        await client.start()  # it is in RAM still
        assert await client.drain(20)
        assert _texts(rig.broker) == ["a", "b"]

    script = [(1, "PUBLISH", 0, "ignored"), (2, "PUBLISH", 0, "ignored")]
    play(scenario, script, grace_ms=5)


def test_program_that_publishes_more_than_the_broker_takes_loses_nothing_with_a_grace():
    async def scenario(rig):
        client = rig.client
        for n in range(150):
            await client.publish("t%d" % (n % 3), "%04d" % n + "." * 300)
            if n == 75:
                await rig.broker.drop()
        assert await client.drain(20)
        assert sorted(set(_numbers(rig.broker))) == list(range(150)) and client.stats()["lost"] == 0

    play(scenario, size=16384, when_full="wait", grace_ms=2)


def test_flash_that_fails_while_the_unsettled_are_recorded_loses_none():
    for error in (OSError(5, "EIO"), JournalLost("taken away")):

        async def scenario(rig):
            client = rig.client
            fault = _Fault(rig.nor)
            fault.error = error
            await rig.up()
            await client.publish("t", "stored", qos=2)
            await client.drain(20)
            await rig.broker.drop()
            await rig.up(2)
            waiting = []
            for text in "ab":
                waiting.append(asyncio.create_task(client.acknowledged(await client.publish("t", text))))
            fault.left = 1 if error.errno == 5 else 1000
            for task in waiting:
                await task
            assert fault.hits and _texts(rig.broker) == ["stored", "a", "b"]
            assert client.stats()["lost"] == 0 and client.stats()["waiting"] == 0

        play(scenario, [(2, "PUBLISH", 0, "ignored")], grace_ms=20)


# For a watchdog and for a board that sleeps.


class Ticks:
    """In the place of the client's module time: stands still unless moved."""

    def __init__(self):
        self.now = time.ticks_add(0, -100000)
        self.ticks_diff = time.ticks_diff

    def ticks_ms(self):
        return self.now

    def pass_ms(self, ms):
        self.now = time.ticks_add(self.now, ms)


class Unreachable:
    """A network that does not come up: each attempt takes 26 s and fails, until it hangs."""

    def __init__(self, ticks):
        self.ticks = ticks
        self.attempts = 0
        self.hangs = False

    async def up(self):
        self.attempts += 1
        if self.hangs:
            await asyncio.Event().wait()
        self.ticks.pass_ms(26000)
        raise OSError(110)


def test_a_client_without_a_network_takes_steps_and_one_that_hangs_does_not():
    ticks = client_module.time = Ticks()
    try:
        link = Unreachable(ticks)

        async def scenario(rig):
            seen = []
            for _ in range(20):
                attempts = link.attempts
                await until(lambda attempts=attempts: link.attempts > attempts)
                seen.append(rig.client.stalled_ms())
            assert max(seen) <= 52000 and not rig.client.idle
            attempts = link.attempts
            link.hangs = True
            await until(lambda: link.attempts > attempts)
            ticks.pass_ms(400000)
            await turns()
            assert rig.client.stalled_ms() >= 400000

        play(scenario, link=link)
    finally:
        client_module.time = time


def test_a_client_that_is_connected_takes_steps_without_any_traffic():
    async def scenario(rig):
        await rig.up()
        client = rig.client
        before = client._stepped
        await until(lambda: client._stepped != before)
        assert client.idle and client.stalled_ms() < 60000

    play(scenario, keep_alive_s=1)


def test_a_client_is_idle_when_all_is_acknowledged_and_handled():
    async def scenario(rig):
        client = rig.client
        assert not client.idle  # not connected
        gate = asyncio.Event()

        async def handler(message):
            await gate.wait()

        client.on("in", handler)
        await rig.up()
        await until(lambda: client.idle)
        await client.publish("out", b"1", qos=1)
        assert not client.idle
        await client.drain()
        await until(lambda: client.idle)
        await rig.broker.send(publish("in", b"x", 1, 7))
        await until(lambda: client._handling)
        assert not client.idle
        gate.set()
        await until(lambda: client.idle)

    play(scenario)


# The log.


def _logged(client):
    return [text for _, _, text, _ in client.log.events()]


def test_log_tells_of_the_connection_from_start_to_end():
    async def scenario(rig):
        await rig.up()
        await rig.broker.drop()
        await rig.up(2)
        await rig.client.close()
        events = rig.client.log.events()
        texts = _logged(rig.client)
        assert texts[:3] == [
            "journal in device: 0 messages wait",
            "started as p7, broker 127.0.0.1:%d" % rig.broker.port,
            "connected, new session",
        ]
        assert [level for _, level, text, _ in events if text.startswith("connection lost: ")] == ["warning"]
        assert texts[-2:] == ["connected, session present", "closed"]

    play(scenario)


def test_log_tells_why_there_is_no_connection():
    async def scenario(rig):
        await rig.up(4)
        events = [event for event in rig.client.log.events() if "no conn" in event[2]]
        found = [(level, text.partition(";")[0], times) for _, level, text, times in events]
        refused = "no connection: ConnectRefused: broker refused the connection: "
        assert found == [
            ("error", refused + "bad user name or password", 2),
            ("error", refused + "not authorised", 1),
        ]

    play(scenario, [(1, "CONNECT", 1, "refuse 4"), (2, "CONNECT", 1, "refuse 4"), (3, "CONNECT", 1, "refuse 5")])


def test_log_tells_of_a_new_journal():
    async def scenario(rig):
        assert _logged(rig.client)[0] == "journal in device: new"

    play(scenario, fresh=True, start=False)


def test_log_tells_what_the_program_should_know():
    async def scenario(rig):
        def handler(message):
            raise ValueError("of a test")

        rig.client.on("bad", handler)
        await rig.up()
        await raised(rig.client.subscribe("secret/#", 1), SubscribeRefused)
        await rig.broker.publish("bad", b"x", 1, 1)
        await rig.broker.expect("PUBACK 1")
        await rig.broker.publish("large", b"x" * 5000, 1, 2)
        await rig.broker.expect("PUBACK 2")
        texts = _logged(rig.client)
        assert texts[-3:] == [
            "subscription: SubscribeRefused: secret/#",
            "handler of bad: ValueError: of a test",
            "too large: large",
        ]

    play(scenario, [(1, "SUBSCRIBE", 1, "refuse 128")])


def test_nothing_that_is_logged_holds_the_password():
    async def scenario(rig):
        def handler(message):
            raise ValueError("it is " + rig.client._broker["password"])

        rig.client.on("#", handler)
        await rig.up(2)
        await rig.broker.publish("t", b"x", 1, 1)
        await rig.broker.expect("PUBACK 1")
        log = rig.client.log
        assert "bad user name" in str(log) and "ValueError: it is ***" in str(log)
        assert SECRET not in str(log) and SECRET not in repr(log.events())

    play(scenario, [(1, "CONNECT", 1, "refuse 4")], username="u", password=SECRET)


def test_failure_of_the_link_is_logged_without_the_password_of_the_network():
    class Link:
        async def up(self):
            raise OSError("Wi-Fi: no access point for " + SECRET)

    async def scenario(rig):
        await until(lambda: rig.client.last_error)
        assert _logged(rig.client)[-1] == "no connection: OSError: Wi-Fi: no access point for ***"

    play(scenario, link=Link(), wifi={"ssid": "net", "password": SECRET})


def test_stats_tell_how_much_of_the_journal_is_in_use():
    async def scenario(rig):
        used = [rig.client.stats()["journal_sectors_used"]]
        for _ in range(10):
            await rig.client.publish("t", b"x" * 1000, qos=1)
            used.append(rig.client.stats()["journal_sectors_used"])
        assert used[0] == 1 and used == sorted(used) and used[-1] == 4  # three in each
        await rig.client.start()
        await rig.client.drain()
        assert rig.client.stats()["journal_sectors_used"] == 1 and rig.client.stats()["journal_sectors"] == 16

    play(scenario, start=False, in_flight=2)
