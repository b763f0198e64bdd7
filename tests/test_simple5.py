"""The blocking client at MQTT 5: all that test_simple.py says of it at 3.1.1, and what version 5 has besides."""

import mqtt_durable.simple as simple
import mqtt_durable.simple5 as simple5
import test_simple as base
from fakebroker import ack, publish, told
from mqtt_durable.reasons import Disconnected
from raises import raises

WEEK_S = 604800

# What a broker must not do at version 5, or is refused by another code.
OTHERWISE = (
    "test_a_message_over_the_limit_is_acknowledged_and_counted",
    "test_acknowledgements_of_nothing_change_nothing",
    "test_what_the_broker_refuses_is_an_mqtt_exception_with_its_code",
    "test_silence_behind_a_message_over_the_limit_is_no_half_packet",
    "test_half_a_message_over_the_limit_is_half_a_packet",
)


class Client(simple5.MQTTClient5):
    broker = None

    def _dial(self):
        self.sock = self.broker.dial()


class Clock(base.Clock):
    def __init__(self):
        super().__init__()
        self.set_s = None  # seconds since 1970, when the board's clock is set

    def time(self):
        return self.now // 1000 if self.set_s is None else self.set_s + self.now // 1000

    def gmtime(self, seconds=None):
        return (1970 if seconds == 0 or self.set_s is None else 2026,)


class Rig(base.Rig):
    Client = Client

    def __init__(self, script=(), **more):
        old, base.Clock = base.Clock, Clock
        try:
            super().__init__(script, **more)
        finally:
            base.Clock = old
        simple5.time = self.clock

    def say(self, *args, **more):
        more.setdefault("properties", {})
        self.broker.say(publish(*args, **more))


def play(scenario, script=(), **more):
    """As test_simple.play(), at version 5."""
    time, rig = simple5.time, base.Rig
    base.Rig = Rig
    try:
        _play(scenario, script, **more)
    finally:
        base.Rig = rig
        simple5.time = time


_play = base.play


def publish5(*args, **more):
    more.setdefault("properties", {})
    return publish(*args, **more)


def test_what_holds_at_3_1_1_holds_at_5():
    names = [name for name in sorted(dir(base)) if name.startswith("test_")]
    for name in OTHERWISE:
        names.remove(name)
    before = base.Client, base.publish, base.play
    base.Client, base.publish, base.play = Client, publish5, play
    try:
        for name in names:
            try:
                getattr(base, name)()
            except BaseException:
                print("at version 5: test_simple.py::" + name)
                raise
    finally:
        base.Client, base.publish, base.play = before


# -- CONNECT


def test_the_version_makes_the_class():
    device = base.Nor(65536)

    class Own(simple.MQTTClient):
        pass

    class Own5(simple5.MQTTClient5):
        pass

    c = simple.MQTTClient("p7", "b", 1884, device=device, version=5, session_expiry_s=9)
    assert type(c) is simple5.MQTTClient5 and (c.client_id, c.port, c.session_expiry_s) == ("p7", 1884, 9)
    assert type(simple.MQTTClient("p7", "b", device=device, version=4)) is simple.MQTTClient
    assert type(Own("p7", "b", device=device)) is Own
    assert type(Own5("p7", "b", device=device)) is Own5 and type(Own5("p7", "b", device=device, version=5)) is Own5
    for kind, version in (simple.MQTTClient, 3), (simple.MQTTClient, "5"), (Own, 5):
        raises(ValueError, lambda kind=kind, version=version: kind("p7", "b", device=device, version=version))


def test_connect_says_what_the_client_takes_and_how_long_the_session_is_to_last():
    def scenario(rig):
        c = rig.make(keepalive=30, password="t", limit_bytes=2048, connect_properties={"user_properties": [("a", "b")]})
        c.set_last_will("w", "gone", True, 1, properties={"will_delay_interval": 5})
        c.connect(False)
        connect = rig.broker.packets[0]
        assert (connect.version, connect.clean, connect.keep_alive_s) == (5, False, 30)
        assert (connect.username, connect.password) == (None, "t")
        assert connect.properties == {
            "session_expiry_interval": WEEK_S,
            "receive_maximum": 16,
            "maximum_packet_size": 2048,
            "topic_alias_maximum": 16,
            "user_properties": [("a", "b")],
        }
        assert connect.will == ("w", b"gone", 1, True) and connect.will_properties == {"will_delay_interval": 5}
        c.connect()
        again = rig.broker.packets[1]
        assert again.clean and again.properties["session_expiry_interval"] == 0

    play(scenario)


def test_the_identifier_that_the_broker_assigns_is_kept_over_a_power_cut():
    def scenario(rig):
        def assigns(came):
            assigned = {"CONNACK": {"assigned_client_identifier": "b-1"}}
            rig.broker.says = assigned if came.name == "CONNECT" and not came.client_id else {}

        c = rig.make("")
        assert c.client == ""
        rig.broker.hears = assigns
        c.connect(False)
        assert c.client == "b-1"
        c.publish(b"t", b"1", qos=1)
        c = rig.make("")
        assert c.client == "b-1" and c.connect(False) == 1
        # The first is the clean one that a new journal begins with.
        assert [p.client_id for p in rig.broker.named("CONNECT")] == ["", "b-1", "b-1"]
        rig.broker.hears = None
        rig.broker.says = {"CONNACK": {"assigned_client_identifier": "other"}}
        raises(OSError, c.connect, False)
        assert rig.broker.packets[-1].reason_code == 0x82

    play(scenario, fresh=True)


def test_a_refused_connect_is_an_mqtt_exception_and_what_only_a_person_can_mend_is_tried_after_the_longest_pause():
    for code, pause_ms in (0x87, 60000), (0x89, 1000):

        def scenario(rig, code=code, pause_ms=pause_ms):
            c = rig.make()
            assert raises(simple.MQTTException, c.connect, False).args == (code,)
            for wait_ms, connections in ((pause_ms - 1, 1), (1, 2)):
                rig.clock.wait(wait_ms)
                c.publish(b"t", b"1", qos=1)
                assert rig.broker.connections == connections, (code, wait_ms)
            assert len(rig.payloads()) == 2

        play(scenario, ((1, "CONNECT", 1, "refuse %d" % code),))


def test_a_broker_that_speaks_3_1_1_alone_refuses_as_its_version_does():
    def scenario(rig):
        assert raises(simple.MQTTException, rig.make().connect).args == (0x84,)

    play(scenario, ((1, "CONNECT", 1, b"\x20\x02\x00\x01"),))


def test_the_brokers_keep_alive_takes_the_place_of_the_clients_for_its_connection():
    def scenario(rig):
        c = rig.connected(keepalive=100)
        assert c.keepalive == 8
        rig.clock.wait(6000)
        c.check_msg()
        assert rig.broker.packets[-1].name == "PINGREQ"
        rig.broker.says = {}
        c.connect(False)
        assert rig.broker.named("CONNECT")[-1].keep_alive_s == c.keepalive == 100

    play(scenario, says={"CONNACK": {"server_keep_alive": 8}})


# -- what goes out


def test_properties_go_out_with_the_message_at_each_qos_and_survive_a_power_cut():
    properties = {"content_type": "text", "user_properties": [("a", "b"), ("a", "c")], "correlation_data": b"\0"}

    def scenario(rig):
        c = rig.connected()
        for qos in range(3):
            c.publish("t", "x", qos=qos, properties=properties)
        rig.broker.away = True
        rig.broker.cut()
        c.publish("t", "later", qos=2, properties=properties)
        rig.broker.away = False
        c = rig.connected()
        sent = rig.broker.named("PUBLISH")
        assert [p.qos for p in sent] == [0, 1, 2, 2] and sent[-1].payload == b"later"
        assert all([p.properties == properties for p in sent])
        for bad in {"topic_alias": 1}, {"content_type": 1}, {"nonsense": 1}:
            for qos in range(3):
                raises(ValueError, lambda qos=qos, bad=bad: c.publish("t", "x", qos=qos, properties=bad))
        c.publish("t", "x", qos=1)
        assert rig.broker.named("PUBLISH")[-1].properties == {}

    play(scenario)


def test_a_message_that_expired_unsent_is_not_sent_and_of_others_the_rest_of_their_time():
    def scenario(rig):
        c = rig.connected()
        rig.clock.set_s = 1800000000
        rig.broker.cut()
        raises(OSError, c.check_msg)
        rig.broker.away = True
        for seconds in 10, 100:
            c.publish("t", str(seconds), qos=1, properties={"message_expiry_interval": seconds})
        rig.clock.wait(30000)
        rig.broker.away = False
        c.connect(False)
        while c.store.waiting():
            c.check_msg()
        assert rig.payloads() == [b"100"]
        assert rig.broker.named("PUBLISH")[-1].properties == {"message_expiry_interval": 70}
        assert c.store.expired == 1

    play(scenario)


def test_a_repeated_topic_goes_out_as_its_alias():
    def scenario(rig):
        c = rig.connected()
        for qos in 1, 0, 2, 0:
            c.publish("a/long/topic", "x", qos=qos)
        assert [p.bare for p in rig.broker.named("PUBLISH")] == [False, True, True, True]
        c.connect(False)
        c.publish("a/long/topic", "x")
        assert not rig.broker.named("PUBLISH")[-1].bare
        assert [topic for topic, _, _ in rig.broker.delivered] == ["a/long/topic"] * 5

    play(scenario, says={"CONNACK": {"topic_alias_maximum": 3}})


def test_a_refused_message_is_finished_and_publish_says_so():
    def scenario(rig):
        c = rig.connected()
        for qos in 1, 2:
            e = raises(simple.MQTTException, lambda qos=qos: c.publish("t", "no", qos=qos))
            assert e.args == (0x87,) and not c.store.waiting()
            c.publish("t", "yes", qos=qos)
        assert rig.broker.trace(1, ("CONNECT",)) == (
            "PUBLISH 1 no,PUBLISH 2 yes,PUBLISH 3 no,PUBLISH 4 yes,PUBREL 4".split(",")
        )
        assert c.store.refused == 2
        c.connect(False)
        assert not rig.broker.named("PUBLISH", 2)

    play(scenario, ((1, "PUBLISH", 1, "refuse 135"), (1, "PUBLISH", 3, "refuse 135")))


def test_in_a_callback_each_publish_is_told_of_its_own_message():
    def scenario(rig):
        c = rig.connected()
        told = []

        def answer(topic, msg):
            told.append(raises(simple.MQTTException, lambda: c.publish("t", "inner", qos=1)).args[0])

        c.set_callback(answer)
        rig.broker.hears = lambda came: came.name == "PUBLISH" and came.payload == b"outer" and rig.say("in", b"x")
        c.publish("t", "outer", qos=1)
        assert told == [0x99] and rig.payloads() == [b"outer"]

    play(scenario, ((1, "PUBLISH", 2, "refuse 153"),))


def test_what_is_too_much_for_the_brokers_quota_is_sent_again_after_a_growing_pause():
    def scenario(rig):
        c = rig.connected()
        c.publish("t", "1", qos=1)  # returns: it is safe
        assert c.store.waiting() == 1 and c.store.postponed == 1
        c.publish("t", "2", qos=1)
        for wait_ms, sent in (4000, 2), (1000, 3), (9000, 3), (1000, 4):
            rig.clock.wait(wait_ms)
            for _ in range(2):
                c.check_msg()
            assert len(rig.broker.named("PUBLISH")) == sent, wait_ms
        assert not c.store.waiting()
        assert rig.broker.trace(1, ("CONNECT",)) == ["PUBLISH 1 1", "PUBLISH 2 2", "PUBLISH 1 1", "PUBLISH 1 1"]

    play(scenario, ((1, "PUBLISH", 1, "refuse 151"), (1, "PUBLISH", 3, "refuse 151")))


def test_what_the_connected_broker_does_not_take_is_a_value_error():
    offers = {"maximum_qos": 1, "retain_available": 0, "maximum_packet_size": 60}

    def scenario(rig):
        c = rig.connected()
        raises(ValueError, lambda: c.publish("t", "x", qos=2))
        for qos in 0, 1:
            raises(ValueError, lambda qos=qos: c.publish("t", "x", True, qos))
            raises(ValueError, lambda qos=qos: c.publish("t", "x" * 60, qos=qos))
        assert not c.store.waiting() and not rig.broker.named("PUBLISH")
        c.publish("t", "x", qos=1)
        # What was accepted before: with a lower QoS, without retain, and not at all.
        rig.broker.cut()
        raises(OSError, c.check_msg)
        rig.broker.away = True
        c.publish("t", "2", True, 2)
        c.publish("t", "3" * 60, qos=1)
        rig.broker.away = False
        c.connect(False)
        while c.store.waiting():
            c.check_msg()
        assert rig.broker.delivered[1:] == [("t", b"2", 1)] and not rig.broker.named("PUBLISH")[-1].retain
        assert (c.store.lowered, c.store.refused) == (1, 1)

    play(scenario, says={"CONNACK": offers})


def test_the_largest_packet_that_the_broker_takes_is_sent_and_no_larger_one_is_stored():
    def scenario(rig):
        c = rig.connected()
        for qos, head in ((0, 22), (1, 24), (2, 24)):
            more = {"qos": qos, "properties": {"content_type": "text/x"}}
            raises(ValueError, lambda: c.publish("topic/%d" % qos, b"x" * (301 - head), **more))
            c.publish("topic/%d" % qos, b"x" * (300 - head), **more)
        assert [len(p.payload) for p in rig.broker.named("PUBLISH")] == [278, 276, 276]
        assert c.store.refused == 0 and c.store.stored == 2

    play(scenario, says={"CONNACK": {"maximum_packet_size": 300}})


def test_no_more_are_in_flight_than_the_broker_receives():
    def scenario(rig):
        c = rig.make()
        for n in range(8):
            c.publish("t", str(n), qos=1)
        c.connect(False)
        assert len(rig.broker.named("PUBLISH")) == 3
        for n in range(8):
            rig.broker.say(ack("PUBACK", n + 1))
            c.check_msg()
            assert len(rig.broker.named("PUBLISH")) == min(8, n + 4)

    play(scenario, ((1, "PUBLISH", 0, "silent"),), says={"CONNACK": {"receive_maximum": 3}})


# -- what comes in


def test_in_the_callback_are_the_properties_of_its_message():
    def scenario(rig):
        c = rig.connected()
        got = []
        c.set_callback(lambda topic, msg: got.append((topic, c.properties)))
        rig.say("a/b", b"", properties={"topic_alias": 2, "content_type": "text"})
        rig.say("", b"", 1, 7, properties={"topic_alias": 2, "subscription_identifiers": [3, 300]})
        for _ in range(2):
            c.wait_msg()
        assert got == [
            (b"a/b", {"content_type": "text"}),
            (b"a/b", {"subscription_identifiers": [3, 300]}),
        ]

    play(scenario)


def test_subscriptions_have_their_options_and_are_made_again_with_them():
    def scenario(rig):
        c = rig.connected()
        c.subscribe("a/+", 1, no_local=True, retain_as_published=True, retain_handling=2, identifier=7)
        c.subscribe("$share/g/b", 2)
        for make in range(2):
            first, second = rig.broker.named("SUBSCRIBE")[-2:]
            assert (first.filter, first.options, first.properties) == ("a/+", 0x2D, {"subscription_identifiers": 7})
            assert (second.filter, second.options, second.properties) == ("$share/g/b", 2, {})
            rig.broker.forget()
            rig.broker.cut()
            c.publish("t", "x", qos=1)
            assert len(rig.broker.named("SUBSCRIBE")) == 4 + 2 * make
        raises(ValueError, lambda: c.subscribe("$share/g/b", no_local=True))
        raises(ValueError, lambda: c.subscribe("a", identifier=0))
        c.unsubscribe("$share/g/b")
        assert rig.broker.named("UNSUBSCRIBE")[-1].filter == "$share/g/b"

    play(scenario)


def test_a_subscription_that_the_broker_refuses_or_does_not_offer_is_an_error():
    offers = dict.fromkeys([name + "_subscription_available" for name in ("wildcard", "shared")], 0)
    offers["subscription_identifier_available"] = 0

    def scenario(rig):
        c = rig.connected()
        raises(ValueError, lambda: c.subscribe("a/#"))
        raises(ValueError, lambda: c.subscribe("$share/g/a"))
        raises(ValueError, lambda: c.subscribe("a", identifier=1))
        assert not rig.broker.named("SUBSCRIBE")
        assert raises(simple.MQTTException, c.subscribe, "a").args == (0x87,)
        c.subscribe("a")
        assert raises(simple.MQTTException, c.unsubscribe, "a").args == (0x83,)
        c.unsubscribe("a")

    script = (1, "SUBSCRIBE", 1, "refuse 135"), (1, "UNSUBSCRIBE", 1, "refuse 131")
    play(scenario, script, says={"CONNACK": offers})


def test_a_subscription_that_the_broker_no_longer_offers_or_is_too_large_for_it_is_not_sent_again():
    def scenario(rig):
        c = rig.connected()
        c.subscribe("a/#")
        c.subscribe("t" * 50)
        rig.broker.says = {"CONNACK": {"wildcard_subscription_available": 0, "maximum_packet_size": 50}}
        rig.broker.forget()
        c.connect(False)
        c.subscribe("plain")
        assert [p.filter for p in rig.broker.named("SUBSCRIBE", 2)] == ["plain"]
        assert raises(simple.MQTTException, c.subscribe, "u" * 50).args == (0x95,)
        assert len(rig.broker.named("SUBSCRIBE", 2)) == 1 and c.last_error is None
        rig.broker.says = {}
        c.connect(False)
        assert {p.filter for p in rig.broker.named("SUBSCRIBE", 3)} == {"a/#", "t" * 50}

    play(scenario)


# -- the end of a connection


def test_after_the_brokers_disconnect_its_reason_is_known_and_decides_when_to_connect_again():
    for code, pause_ms in (0x8B, 1000), (0x8E, 60000), (0x9C, 60000), (0x97, 60000):

        def scenario(rig, code=code, pause_ms=pause_ms):
            c = rig.connected()
            c.publish("t", "0", qos=1)
            rig.broker.say(told("DISCONNECT", code, {"reason_string": "why", "server_reference": "other"}))
            raises(OSError, c.check_msg)
            error = c.last_error
            assert type(error) is Disconnected and error.reason_code == code and "why" in str(error)
            assert error.properties["server_reference"] == "other"
            assert rig.broker.packets[-1].name != "DISCONNECT"
            for wait_ms, connections in ((pause_ms - 1, 1), (1, 2)):
                rig.clock.wait(wait_ms)
                c.publish("t", "1", qos=1)
                assert rig.broker.connections == connections, (code, wait_ms)

        play(scenario)


VIOLATIONS = (
    (publish("t", b"", 1, 1), 0x81),  # without property length
    (publish5("", b""), 0x82),
    (publish5("t", b"", properties={"topic_alias": 17}), 0x94),
    (publish5("t", b"x" * 20000), 0x95),
    (told("CONNACK"), 0x82),
    (told("AUTH", 0x18, {"authentication_method": "m"}), 0x82),
    (ack("PUBACK", 1, 0x88), 0x82),
    (b"\x90\x04\x00\x01\x00\x00", None),  # SUBACK of nothing
    (b"\xf1\x00", 0x81),
)


def test_what_a_broker_must_not_send_is_answered_by_disconnect_with_the_reason():
    def scenario(rig):
        c = rig.make()
        for data, code in VIOLATIONS:
            c.connect(True)
            rig.broker.say(data)
            try:
                for _ in range(20):
                    c.check_msg()
            except OSError:
                pass
            last = rig.broker.packets[-1]
            if code is None:
                assert last.name == "CONNECT"
            else:
                assert (last.name, last.reason_code) == ("DISCONNECT", code), data[:20]
                assert rig.broker.link.closed

    play(scenario)


def test_a_broker_that_sends_more_than_the_client_keeps_in_mind_is_told_why_it_gets_a_new_connection():
    def scenario(rig):
        c = rig.connected(timeout=5)
        rig.broker.say(b"".join([publish5("t", b"", 2, n) for n in range(1, 258)]))
        for _ in range(256):
            assert c.wait_msg() == 0x34
        raises(OSError, c.wait_msg)
        assert rig.broker.connections == 2 and rig.broker.trace(1)[-1] == "DISCONNECT 0x93"

    play(scenario)


def test_a_connack_that_breaks_the_rules_is_answered_by_disconnect_with_the_reason():
    def scenario(rig):
        c = rig.make()
        for code in 0x82, 0x82, 0x81, 0x82:
            raises(OSError, c.connect)
            last = rig.broker.packets[-1]
            assert (last.name, last.reason_code, last.connection) == ("DISCONNECT", code, rig.broker.connections)
        c.connect()

    play(
        scenario,
        (
            (1, "CONNECT", 1, "present 1"),
            (2, "CONNECT", 1, b"\xd0\x00"),
            (3, "CONNECT", 1, b"\x20\x03\x02\x00\x00"),
            (4, "CONNECT", 1, told("CONNACK", 0, {"authentication_method": "m"})),
        ),
    )


def test_a_program_can_end_with_a_reason_and_another_expiry():
    def scenario(rig):
        c = rig.connected()
        c.disconnect(4, 60)
        last = rig.broker.packets[-1]
        assert (last.reason_code, last.properties) == (4, {"session_expiry_interval": 60})
        c.connect(False)
        raises(ValueError, c.disconnect, 1)
        c.disconnect()
        assert rig.broker.packets[-1].reason_code == 0
        c.connect()
        raises(ValueError, c.disconnect, 0, 60)

    play(scenario)


# -- both versions


def test_a_journal_goes_from_one_version_to_the_other_and_back_and_loses_nothing():
    def scenario(rig):
        sent = []
        for make, kind in enumerate((base.Client, Client, base.Client, Client)):
            c = kind("p7", "b", device=rig.nor)
            c.broker = rig.broker
            c.set_callback(print)
            more = {} if kind is base.Client else {"properties": {"content_type": "text"}}
            for qos in 1, 2:
                sent.append(b"%d %d" % (make, qos))
                c.publish("t", sent[-1], qos=qos, **more)
            if make % 2:
                c.connect(False)
                while c.store.waiting():
                    c.check_msg()
            simple._owners.clear()
        assert rig.payloads() == sent
        assert [p.version for p in rig.broker.named("CONNECT")] == [5, 5]
        found = [p.properties.get("content_type", "") for p in rig.broker.named("PUBLISH")]
        assert found == ["", "", "text", "text"] * 2

    play(scenario)


def test_a_topic_may_be_any_bytes_where_the_broker_takes_aliases():
    def scenario(rig):
        client = rig.connected()
        for topic in (b"other", bytearray(b"topic"), "topic", bytearray(b"topic")):
            for qos in (0, 1, 2):
                client.publish(topic, b"x", qos=qos)
                client.publish(topic, b"x", qos=qos, properties={"content_type": "x"})
        assert client._up and rig.broker.connections == 1 and not client.store.waiting()
        assert [p.topic for p in rig.broker.named("PUBLISH")] == ["other"] * 6 + ["topic"] * 18

    play(scenario, says={"CONNACK": {"topic_alias_maximum": 8}})


def test_the_properties_of_a_message_are_its_own():
    def scenario(rig):
        client = rig.connected()
        seen = []

        def came(topic, msg):
            seen.append(dict(client.properties))
            client.properties["content_type"] = "text/plain"

        client.set_callback(came)
        client.subscribe(b"in")
        for msg in (b"1", b"2"):
            rig.say("in", msg)
            client.check_msg()
        assert seen == [{}, {}]

    play(scenario)


def test_an_alias_that_did_not_go_out_for_want_of_memory_is_not_used():
    def scenario(rig):
        def full(*_):
            raise MemoryError

        client = rig.connected()
        encode_publish = simple5.packet5.encode_publish
        simple5.packet5.encode_publish = full
        try:
            raises(MemoryError, lambda: client.publish(b"topic", b"0", properties={"content_type": "x"}))
        finally:
            simple5.packet5.encode_publish = encode_publish
        client.publish(b"topic", b"1", qos=1)
        assert [p.payload for p in rig.broker.named("PUBLISH")] == [b"1"] and not client.store.waiting()

    play(scenario, says={"CONNACK": {"topic_alias_maximum": 8}})


def test_a_qos_that_is_none_is_refused_with_properties_and_without():
    def scenario(rig):
        client = rig.connected()
        for qos in (None, 3, -1, "1"):
            for properties in (None, {"content_type": "x"}):
                raises(ValueError, lambda: client.publish(b"t", b"", qos=qos, properties=properties))
        assert not rig.broker.named("PUBLISH") and not client.store.waiting()

    play(scenario)
