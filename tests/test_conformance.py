"""What MQTT demands of a client and no other test proves: normative.md names the tests of each statement.

Here is what 3.1.1 demands, and what MQTT 5 demands just so; what only that demands is in test_client5.py.
"""

import asyncio
import time

import mqtt_durable.client as client_module
from fakebroker import FakeBroker, ack, packet, publish, turns, until
from mqtt_durable.errors import ConnectRefused, JournalFull, ProtocolError
from mqtt_durable import packet5
from mqtt_durable.packet import DISCONNECT_BYTES, Decoder, check_filter, check_topic, encode_connect, encode_publish
from mqtt_durable.session import Session
from raises import raises
from test_client import Gate, Rig, hurry, play, raised

# Table 2.2; of a PUBLISH the flags are its own.
FLAGS = {
    "CONNECT": 0,
    "PUBACK": 0,
    "PUBREC": 0,
    "PUBREL": 2,
    "PUBCOMP": 0,
    "SUBSCRIBE": 2,
    "UNSUBSCRIBE": 2,
    "PINGREQ": 0,
    "DISCONNECT": 0,
}


class RawBroker(FakeBroker):
    """A broker that hears bytes and says no more than .says, once.  .heard: the bytes of each connection."""

    def __init__(self, says=b""):
        super().__init__()
        self.says = says
        self.heard = []

    async def _serve(self, reader, writer):
        self.connections += 1
        number = self.connections
        self.links[number] = writer, asyncio.current_task()
        self.heard.append(b"")
        try:
            while True:
                some = await reader.read(1024)
                if not some:
                    break
                if not self.heard[number - 1]:
                    writer.write(self.says)
                    await writer.drain()
                self.heard[number - 1] += some
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            del self.links[number]
            if hasattr(writer, "s"):
                writer.s.close()
            else:
                writer.close()
            self.closed.append(number)


def connect(version):
    """The CONNECT of a rig."""
    if version == 4:
        return encode_connect("p7", False, 60)
    properties = {
        "session_expiry_interval": 604800,
        "receive_maximum": 16,
        "maximum_packet_size": 4096,
        "topic_alias_maximum": 16,
    }
    return packet5.encode_connect("p7", False, 60, properties=properties)


def play_raw(scenario, says=b"", **options):
    """As play(), with a RawBroker."""

    async def run():
        async with RawBroker(says) as broker:
            rig = Rig(broker, **options)
            try:
                await rig.client.start()
                await scenario(rig)
            finally:
                await rig.client.close()

    asyncio.run(run())


# Every packet that a client sends.


def test_one_conversation_with_every_packet_a_client_can_send():
    """[MQTT-2.2.2-1] [MQTT-2.3.1-1] [MQTT-2.3.1-5] [MQTT-2.3.1-6] [MQTT-3.1.0-2] [MQTT-3.3.1-2] [MQTT-3.6.1-1]
    [MQTT-3.8.1-1] [MQTT-3.8.3-3] [MQTT-3-8.3-4] [MQTT-3.10.1-1] [MQTT-3.10.3-2] [MQTT-4.3.1-1]

    [MQTT5-2.2.1-2] [MQTT5-2.2.1-3] [MQTT5-2.2.1-5] [MQTT5-3.1.0-2] [MQTT5-3.3.1-2] [MQTT5-4.3.1-1] [MQTT5-4.3.2-2]
    [MQTT5-4.3.3-2] [MQTT5-4.3.3-11]
    No acknowledgement has a reason code of 0x80 or more, so that no identifier is free before its time:
    [MQTT5-4.3.3-9].  None has a reason string or a user property, which could be too large: [MQTT5-3.4.2-2]
    [MQTT5-3.4.2-3] [MQTT5-3.5.2-2] [MQTT5-3.5.2-3] [MQTT5-3.6.2-2] [MQTT5-3.6.2-3] [MQTT5-3.7.2-2] [MQTT5-3.7.2-3]
    [MQTT5-3.14.2-3] [MQTT5-3.14.2-4]
    """
    async def scenario(rig):
        client = rig.client
        hurry(client, 4)
        client.on("#", lambda message: None)
        await client.start()
        await rig.up()
        assert await client.subscribe("a/+", 2) == 2
        for qos in (0, 1, 2):
            await client.publish("t", "%d" % qos, qos=qos)
        await rig.broker.publish("a/1", b"x", 1, 0x1234)
        await rig.broker.publish("a/1", b"x", 2, 65535)
        await rig.broker.expect("PUBACK 4660")
        await rig.broker.expect("PUBCOMP 65535")
        await client.unsubscribe("a/+")
        assert await client.drain(20)
        await rig.broker.expect("PINGREQ")
        await client.close()
        await until(lambda: rig.broker.closed)
        packets = rig.broker.packets
        assert {p.name for p in packets} == set(FLAGS) | {"PUBLISH"}
        assert [p.name for p in packets].count("CONNECT") == 1 and packets[0].name == "CONNECT"
        assert packets[-1].name == "DISCONNECT"
        identified = {}
        for p in packets:
            if p.name == "PUBLISH":
                assert p.flags == p.qos << 1 and bool(p.packet_id) == bool(p.qos), p
            else:
                assert p.flags == FLAGS[p.name], p
            if p.name in ("SUBSCRIBE", "UNSUBSCRIBE"):
                # One filter, and after that of a SUBSCRIBE one byte: 0, 1 or 2.
                size = 4 + len("a/+") + (1 if p.name == "SUBSCRIBE" else 0) + (1 if p.version == 5 else 0)
                assert len(p.body) == size and p.packet_id and p.qos in (0, 2), p
            elif p.name not in ("CONNECT", "PUBLISH"):
                assert len(p.body) == (2 if p.packet_id else 0), p
            if p.packet_id:
                identified.setdefault(p.name, []).append(p.packet_id)
        assert identified["PUBLISH"] == [1, 2] and identified["PUBREL"] == [2]
        assert identified["PUBACK"] == [0x1234] and identified["PUBREC"] == identified["PUBCOMP"] == [65535]

    for version in (4, 5):
        play(scenario, start=False, version=version)


def test_connection_begins_with_connect_itself_and_no_more_before_its_answer():
    """[MQTT-3.1.0-1] [MQTT-3.2.0-1] [MQTT-6.0.0-1] [MQTT-6.0.0-2] [MQTT-6.0.0-3] [MQTT5-3.1.0-1]"""
    async def scenario(rig):
        client = rig.client
        expected = connect(rig.more["version"])
        asking = asyncio.create_task(client.subscribe("f", 1))
        for qos in (0, 1, 2):
            await client.publish("t", "x", qos=qos)
        # A byte stream, no WebSocket: that would begin with an HTTP request.
        await until(lambda: rig.broker.heard and len(rig.broker.heard[0]) >= len(expected))
        await turns()
        assert rig.broker.heard == [expected] and not client.connected
        asking.cancel()
        await rig.cut()  # close() would wait for the answer

    for version in (4, 5):
        play_raw(scenario, version=version)


def test_refused_client_closes_also_when_the_broker_does_not():
    """[MQTT-3.2.2-5] [MQTT5-3.2.2-7] [MQTT5-4.13.2-1]"""
    for version, code, says in ((4, 5, b"\x20\x02\x00\x05"), (5, 0x87, b"\x20\x03\x00\x87\x00")):

        async def scenario(rig):
            await until(lambda: rig.broker.closed)
            assert isinstance(rig.client.last_error, ConnectRefused) and rig.client.last_error.return_code == code
            assert rig.broker.heard == [connect(version)]

        play_raw(scenario, says, backoff_ms=(600000, 600000), version=version)


def test_violation_is_answered_by_the_end_of_the_connection_and_by_not_one_byte():
    """[MQTT-1.5.3-1] [MQTT-1.5.3-2] [MQTT-2.2.2-2] [MQTT-3.2.0-1] [MQTT-3.2.2-4] [MQTT-3.3.1-4] [MQTT-4.8.0-1]"""
    for says in (
        b"\x20\x02\x01\x05",  # session present in a refusal
        b"\x21\x02\x00\x00",  # flags in CONNACK
        publish("t", b"x"),  # before CONNACK
        b"\x20\x02\x00\x00\x36\x05\x00\x01t\x00\x01",  # QoS 3
        b"\x20\x02\x00\x00" + publish("t", b"x", 0, dup=True),
        b"\x20\x02\x00\x00\x32\x07\x00\x03\xed\xa0\x80\x00\x01",  # a surrogate in the topic name
        b"\x20\x02\x00\x00\x32\x07\x00\x03a\x00b\x00\x01",  # U+0000
        b"\x20\x02\x00\x00" + publish("a/#", b"x", 1, 1),
        b"\x20\x02\x00\x00\x42\x02\x00\x01",  # flags in PUBACK
        b"\x20\x02\x00\x00\x60\x02\x00\x01",  # no flags in PUBREL
    ):

        async def scenario(rig):
            got = []
            rig.client.on("#", got.append)
            await until(lambda: 1 in rig.broker.closed)
            assert isinstance(rig.client.last_error, ProtocolError), says
            assert rig.broker.heard[0] == encode_connect("p7", False, 60) and not got, says

        play_raw(scenario, says)


def test_disconnect_is_followed_by_the_end_of_the_connection_and_nothing_else():
    """[MQTT-3.14.4-1] [MQTT-3.14.4-2] [MQTT5-3.14.4-1] [MQTT5-3.14.4-2]"""
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
        await client.close()
        await until(lambda: rig.broker.closed)  # not by the broker, which would listen on
        await turns()
        running.clear()
        await task
        [heard] = rig.broker.heard
        assert heard[-2:] == DISCONNECT_BYTES and heard.count(DISCONNECT_BYTES) == 1

    for version, says in ((4, b"\x20\x02\x00\x00"), (5, b"\x20\x03\x00\x00\x00")):
        play_raw(scenario, says, in_flight=64, when_full="drop_oldest", version=version)


def test_connect_flags_tell_exactly_what_the_payload_holds_and_in_which_order():
    """[MQTT-3.1.2-9] [MQTT-3.1.2-11] [MQTT-3.1.2-13] [MQTT-3.1.2-15] [MQTT-3.1.2-18] [MQTT-3.1.2-19]
    [MQTT-3.1.2-20] [MQTT-3.1.2-21] [MQTT-3.1.2-22] [MQTT-3.1.3-1] [MQTT-3.1.3-3]
    """
    for clean in (False, True):
        for will in (None, ("w\u00e9", b"\0m", 0, False), ("w", b"", 1, True), ("w", b"m", 2, False)):
            for username in (None, "", "us\u00e9r"):
                for password in (None, b"", b"\0p"):
                    if password is not None and username is None:
                        raises(ValueError, encode_connect, "id", clean, 1, username, password, will)
                        continue
                    data = encode_connect("id", clean, 1, username, password, will)
                    flags = data[9]
                    fields = []
                    i = 12
                    while i < len(data):
                        n = data[i] << 8 | data[i + 1]
                        fields.append(data[i + 2 : i + 2 + n])
                        i += 2 + n
                    assert i == len(data)
                    expected = [b"id"]
                    if will:
                        expected += [will[0].encode(), will[1]]
                        assert flags >> 2 & 1 and flags >> 3 & 3 == will[2] and bool(flags & 32) == will[3]
                    else:
                        assert not flags & 0x3C
                    if username is not None:
                        expected.append(username.encode())
                    if password is not None:
                        expected.append(password)
                    assert fields == expected
                    assert bool(flags & 128) == (username is not None) and bool(flags & 64) == (password is not None)
                    assert bool(flags & 2) == clean and not flags & 1


def test_text_of_connect_is_utf_8_or_refused():
    """[MQTT-3.1.3-4] [MQTT-3.1.3-10] [MQTT-3.1.3-11]"""
    for bad in (b"\xff", b"a\0", b"\xed\xa0\x80"):
        raises(ValueError, encode_connect, bad, True, 0)
        raises(ValueError, encode_connect, "a", True, 0, bad)
        raises(ValueError, encode_connect, "a", True, 0, None, None, (bad, b"", 0, False))


def test_u_feff_is_never_stripped():
    """[MQTT-1.5.3-3]"""
    bom = "\ufeffa"
    assert check_topic(bom) == check_filter(bom) == b"\xef\xbb\xbfa"
    assert encode_publish(check_topic(bom), b"") == b"\x30\x06\x00\x04\xef\xbb\xbfa"
    assert encode_connect(bom, True, 0)[-6:] == b"\x00\x04\xef\xbb\xbfa"
    decoder = Decoder()
    data = publish(bom, b"")
    decoder.space()[: len(data)] = data
    decoder.end += len(data)
    assert decoder.next() and decoder.topic == bom


# Packet identifiers.


def test_identifier_is_taken_until_the_last_acknowledgement():
    """[MQTT-2.3.1-2] [MQTT-2.3.1-3] [MQTT5-2.2.1-3] [MQTT5-4.3.2-1] [MQTT5-4.3.3-1]"""
    for state in (2, 3):  # waits for PUBREC; for PUBCOMP
        session = Session(4)
        session.out[600] = state
        session.newest = 65023
        given = 0
        while given < 1024:
            try:
                session.newest = session.new_id()
            except JournalFull:
                break
            assert session.newest != 600, state
            given += 1
        assert given < 600


def test_answers_to_subscribe_and_unsubscribe_are_matched_by_their_identifiers():
    """[MQTT-2.3.1-7] [MQTT-3.8.4-5] [MQTT-3.9.3-1] [MQTT5-2.2.1-6]"""
    async def scenario(rig):
        client = rig.client
        await rig.up()
        properties, code = (b"", b"") if rig.more["version"] == 4 else (b"\0", b"\0")

        async def answer(first, packet_id, code):
            head = bytes((packet_id >> 8, packet_id & 255))
            await rig.broker.send(packet(first, head + properties + code))

        tasks = [asyncio.create_task(client.subscribe(f, 2)) for f in ("a", "b", "c")]
        await rig.broker.expect("SUBSCRIBE 65026 c")
        ids = [p.packet_id for p in rig.broker.named("SUBSCRIBE")]
        assert len(set(ids)) == 3
        for i, granted in ((2, 1), (0, 0), (1, 128)):  # in another order
            await answer(0x90, ids[i], bytes((granted,)))
        assert await tasks[0] == 0 and await tasks[2] == 1
        await raised(tasks[1], Exception)
        for f in ("a", "c"):
            tasks.append(asyncio.create_task(client.unsubscribe(f)))
        await until(lambda: len(rig.broker.named("UNSUBSCRIBE")) == 2)
        second = rig.broker.named("UNSUBSCRIBE")[1].packet_id
        await answer(0xB0, second, code)
        await tasks[4]
        assert not tasks[3].done()
        await answer(0xB0, rig.broker.named("UNSUBSCRIBE")[0].packet_id, code)
        await tasks[3]

    for version in (4, 5):
        play(scenario, [(0, "SUBSCRIBE", 0, "silent"), (0, "UNSUBSCRIBE", 0, "silent")], version=version)


def test_requested_qos_is_0_to_2():
    """[MQTT-3-8.3-4]"""
    async def scenario(rig):
        await rig.up()
        for qos in (-1, 3, 4, 128, 256, None):
            await raised(rig.client.subscribe("f", qos), ValueError)
            await raised(rig.client.publish("f", b"", qos=qos), ValueError)
        await turns()
        assert rig.broker.trace() == ["CONNECT"]

    play(scenario)


# Messages received.


def test_each_publish_is_answered_as_its_qos_demands_wanted_or_not():
    """[MQTT-3.3.4-1] [MQTT-4.5.0-2] [MQTT5-3.3.4-1] [MQTT5-4.3.2-4] [MQTT5-4.3.3-8] [MQTT5-4.3.3-11]
    [MQTT5-4.5.0-2]
    """
    async def scenario(rig):
        got = []
        rig.client.on("wanted", lambda message: got.append(message.qos))
        await rig.up()
        for topic in ("wanted", "unwanted"):
            for qos in (0, 1, 2):
                await rig.broker.publish(topic, b"x", qos, 10 * len(topic) + qos if qos else 0)
        await rig.broker.expect("PUBCOMP 82")
        await turns()
        assert sorted(rig.broker.trace()[1:]) == [
            "PUBACK 61",
            "PUBACK 81",
            "PUBCOMP 62",
            "PUBCOMP 82",
            "PUBREC 62",
            "PUBREC 82",
        ]
        assert got == [0, 1, 2] and rig.client.stats()["discarded"] == 3

    for version in (4, 5):
        play(scenario, version=version)


def test_identifier_of_a_qos_1_message_is_free_after_its_puback_whatever_dup_says():
    """[MQTT-4.3.2-2] [MQTT5-4.3.2-5]"""
    async def scenario(rig):
        got = []
        rig.client.on("#", lambda message: got.append((message.payload, message.dup)))
        await rig.up()
        for n, dup in ((1, False), (2, True), (3, True)):
            await rig.broker.publish("t", b"%d" % n, 1, 7, dup=dup)
            await rig.broker.expect("PUBACK 7", n)
        assert got == [(b"1", False), (b"2", True), (b"3", True)]

    for version in (4, 5):
        play(scenario, version=version)


def test_dup_of_a_message_received_is_not_that_of_one_published_for_it():
    """[MQTT-3.3.1-3]"""
    async def scenario(rig):
        async def forward(message):
            for qos in (0, 1, 2):
                await rig.client.publish("out", message.payload, qos=qos)

        rig.client.on("in", forward)
        await rig.up()
        await rig.broker.publish("in", b"a", 1, 3, dup=True)
        await rig.broker.expect("PUBACK 3")
        assert await rig.client.drain(20)
        assert [p.flags for p in rig.broker.named("PUBLISH")] == [0, 2, 4]

    for version in (4, 5):
        play(scenario, version=version)


def test_answers_keep_the_order_of_the_publishes_also_behind_a_message_too_large():
    """[MQTT-4.6.0-2] [MQTT-4.6.0-3] [MQTT5-4.6.0-2] [MQTT5-4.6.0-3]"""
    for qos, name, version in [(q, n, v) for q, n in ((1, "PUBACK"), (2, "PUBREC")) for v in (4, 5)]:
        large = (2, 5) if version == 4 else ()  # in MQTT 5 the broker may not send them

        async def scenario(rig):
            held = Gate(rig.client)
            await rig.up()
            for n in range(1, 7):
                payload = b"%d" % n * (5000 if n in large else 1)
                await rig.broker.publish("t", payload, qos, n)
            await rig.broker.publish("t", b"last")
            await until(lambda: len(rig.client._inbox) >= 4)
            await turns()
            assert rig.broker.trace() == ["CONNECT"]
            held.gate.set()
            await rig.broker.expect("%s 6" % name)
            assert [p.packet_id for p in rig.broker.named(name)] == [1, 2, 3, 4, 5, 6]
            await until(lambda: "last" in held.texts)
            assert held.texts == [str(n) for n in range(1, 7) if n not in large] + ["last"]
            assert rig.client.stats()["too_large"] == len(large)

        play(scenario, version=version)


def test_pubrels_keep_the_order_of_the_pubrecs():
    """[MQTT-4.6.0-4] [MQTT5-4.3.3-4] [MQTT5-4.6.0-4]"""
    async def scenario(rig):
        for n in range(4):
            await rig.client.publish("t", "%d" % n, qos=2)
        await rig.broker.expect("PUBLISH 4 3")
        order = [3, 1, 4, 2]
        await rig.broker.send(b"".join([ack("PUBREC", n) for n in order]))
        await until(lambda: len(rig.broker.named("PUBREL")) == 4)
        assert [p.packet_id for p in rig.broker.named("PUBREL")] == order

    for version in (4, 5):
        play(scenario, [(0, "PUBLISH", 0, "silent")], version=version)


# Sessions.


def test_clean_session_uses_nothing_of_an_earlier_one():
    """[MQTT-3.1.2-6] [MQTT5-3.1.2-4]"""
    async def scenario(rig):
        got = []
        client = rig.client
        client.on("#", lambda message: got.append(message.payload))
        await client.subscribe("f", 1)
        await rig.broker.publish("f", b"a", 2, 9)
        await rig.broker.expect("PUBREC 9")  # and no PUBREL comes
        await client.publish("t", "1", qos=2)
        await rig.broker.expect("PUBREL 1")  # and no PUBCOMP comes
        await client.publish("t", "2", qos=1)
        await rig.broker.expect("PUBLISH 2 2")
        await rig.broker.drop()
        await rig.broker.expect("SUBSCRIBE 65024 f", connection=2)
        await rig.broker.publish("f", b"b", 2, 9)  # its identifier was that of the old session
        await rig.broker.expect("PUBCOMP 9")
        assert await client.drain(20)
        assert got == [b"a", b"b"] and not client.session_present
        # Both go out as new.  The first, too: what came of it the broker has forgotten with the session.
        trace = rig.broker.trace(2, without=("SUBSCRIBE", "PUBREC", "PUBCOMP"))
        assert trace == ["CONNECT clean", "PUBLISH 1 1", "PUBLISH 2 2", "PUBREL 1"]

    script = [(1, "PUBREC", 0, "silent"), (1, "PUBREL", 0, "silent"), (1, "PUBLISH", 2, "silent")]
    for version in (4, 5):
        play(scenario, script, clean=True, version=version)


def test_broker_that_claims_a_session_after_a_clean_connect_is_not_believed():
    """[MQTT-3.1.2-6] [MQTT5-3.2.2-4]"""
    for options in [{name: True, "version": version} for name in ("clean", "fresh") for version in (4, 5)]:

        async def scenario(rig):
            await rig.client.publish("t", "a", qos=2)
            assert await rig.client.drain(20)
            assert rig.client.stats()["protocol_errors"] == 1
            assert rig.broker.trace(1) == ["CONNECT clean"] + (["DISCONNECT 0x82"] if options["version"] == 5 else [])
            assert [repr(p) for p in rig.broker.named("PUBLISH")] == ["PUBLISH 1 a"]

        play(scenario, [(1, "CONNECT", 1, "present 1")], **options)


# Keep-alive.


class _Sleepless:
    """In place of the client's asyncio: a second of sleep is over when all is quiet."""

    def __init__(self, sleep_ms):
        self.sleep_ms = sleep_ms

    def __getattr__(self, name):
        return getattr(asyncio, name)


class _Time:
    """In place of the client's time."""

    now = 0

    def ticks_ms(self):
        return self.now

    def ticks_diff(self, a, b):
        return a - b


def test_no_more_than_keep_alive_passes_between_two_packets():
    """[MQTT-3.1.2-23] [MQTT5-3.1.2-20] [MQTT5-3.1.2-21] [MQTT5-3.2.2-21]"""
    for keep_alive_s, version in [(n, version) for n in (1, 2, 3, 4, 5, 7, 8, 60) for version in (4, 5)]:
        heard = []  # when each packet was

        async def scenario(rig):
            client = rig.client
            clock = _Time()

            async def quiet():
                await until(lambda: client._ping_at is None and not client._outbox)
                while len(heard) < len(rig.broker.packets):
                    heard.append(clock.now)

            async def sleep_ms(ms):
                if not ms:
                    return await asyncio.sleep_ms(0)
                await quiet()
                if len(heard) == 1:
                    clock.now += 1  # the worst moment: just after the clock was looked at
                    client._outbox.append((encode_publish if version == 4 else packet5.encode_publish)(b"t", b"x"))
                    client._wake.set()
                    await until(lambda: len(rig.broker.packets) == 2)
                    await quiet()
                    ms -= 1
                clock.now += ms
                await asyncio.sleep_ms(0)

            client_module.time = clock
            client_module.asyncio = _Sleepless(sleep_ms)
            try:
                await client.start()
                await rig.broker.expect("PINGREQ", 5)
                await client.close()
            finally:
                client_module.time = time
                client_module.asyncio = asyncio
            gaps = [b - a for a, b in zip(heard, heard[1:])]
            assert len(gaps) > 4 and max(gaps) < keep_alive_s * 1000, (keep_alive_s, gaps)

        if version == 4:
            play(scenario, start=False, keep_alive_s=keep_alive_s)
        else:  # what the broker says counts
            says = {"CONNACK": {"server_keep_alive": keep_alive_s}}
            play(scenario, start=False, says=says, version=5, keep_alive_s=(0, 600)[keep_alive_s % 2])
