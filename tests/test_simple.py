"""The blocking client against a scripted broker (fakebroker.py) in the same thread, its flash a Nor, its clock ours.

Nothing here waits: when the client would, its clock goes on, and what is due by then happens.
"""

from array import array

import mqtt_durable.simple as simple
from fakebroker import FakeBroker, Packet, ack, packet, publish
from mqtt_durable.errors import ConnectRefused, JournalFull, JournalLost, JournalUnavailable, MQTTError
from mqtt_durable.journal import Journal
from mqtt_durable.store import Store, identity
from norsim import Nor, Rng
from raises import raises

MOST_MS = 600000  # a client that waits longer waits for ever


class Clock:
    """In place of the module time: no time passes but where the client waits."""

    def __init__(self):
        self.now = (1 << 30) - 5000  # MicroPython's ticks wrap soon
        self.waited = 0
        self.later = []  # (when, what happens)

    def ticks_ms(self):
        return self.now & (1 << 30) - 1

    def ticks_add(self, ticks, delta):
        return ticks + delta & (1 << 30) - 1

    def ticks_diff(self, a, b):
        return (a - b + (1 << 29) & (1 << 30) - 1) - (1 << 29)

    def after(self, ms, action):
        self.later.append((self.now + ms, action))

    def wait(self, ms):
        self.waited += ms
        assert self.waited <= MOST_MS, "waits for ever"
        self.now += ms
        for when, action in sorted(self.later, key=lambda entry: entry[0]):
            if when <= self.now:
                self.later.remove((when, action))
                action()


class Link:
    """A connection's socket: what the client writes goes to the broker at once.

    .waiting: bytes for the client.  .ended: by the broker.  .writes: each as it was made.  .takes: bytes that it takes
    until somebody waits.
    """

    def __init__(self, broker):
        self.broker = broker
        self.waiting = b""
        self.ended = self.closed = False
        self.writes = []
        self.takes = None
        self._data = b""
        self._version = 4

    # what FakeBroker needs of a writer

    def answer(self, data):
        self.waiting += data

    async def drain(self):
        pass

    # what the client needs of a socket and of select.poll()

    def poll(self, ms):
        if self.closed:
            raise OSError(9)
        if self.writing:
            self.takes = None
            return [1] if ms and not self.broker.deaf else self._wait(ms, [])
        return [1] if self.waiting or self.ended else self._wait(ms, None)

    def _wait(self, ms, otherwise):
        assert ms >= 0, "waits for ever"
        self.broker.clock.wait(ms)
        return [1] if otherwise is None and (self.waiting or self.ended) else []

    def modify(self, sock, events):
        self.writing = events == simple.select.POLLOUT

    writing = False

    def readinto(self, view, n):
        if self.closed:
            raise OSError(9)
        n = min(n, len(view), len(self.waiting))
        view[:n] = self.waiting[:n]
        self.waiting = self.waiting[n:]
        return n if n or self.ended else None

    def write(self, data, at, n):
        if self.closed:
            raise OSError(9)
        if self.ended:
            raise OSError(104)
        data = bytes(memoryview(data)[at : at + n])
        if self.broker.deaf:
            return None
        if self.takes is not None:
            data = data[: self.takes]
            self.takes -= len(data)
            if not data:
                return None
        self.writes.append(data)
        self._data += data
        while len(self._data) > 1:
            length, head = self._data[1] & 127, 2
            if self._data[1] > 127:
                if len(self._data) < 3:
                    break
                length, head = length | self._data[2] << 7, 3
            if len(self._data) < head + length:
                break
            came = Packet(self.broker.connections, self._data[0], self._data[head : head + length], self._version)
            self._version = came.version
            self._data = self._data[head + length :]
            self.broker.take(came, self)
        return len(data)

    def close(self):
        self.closed = True


class Writer:
    def __init__(self, link):
        self.write = link.answer
        self.drain = link.drain


class Broker(FakeBroker):
    """.link: the newest connection's.  .away: nobody listens.  .deaf: it takes nothing.  .hears: called with each
    packet that came, before it is answered."""

    def __init__(self, script=(), clock=None, says=None):
        super().__init__(script, says)
        self.clock = clock
        self.port = 1883
        self.link = None
        self.away = self.deaf = False
        self.hears = None

    def dial(self):
        if self.away:
            raise OSError(111)
        self.connections += 1
        self.link = Link(self)
        return self.link

    def take(self, came, link):
        self._resolve(came)
        self.packets.append(came)
        if self.hears:
            self.hears(came)
        try:
            self._take(came, Writer(link)).send(None)
        except StopIteration as e:
            if not e.value:
                link.ended = True
            return
        raise AssertionError("the broker waits")

    def say(self, data):
        self.link.waiting += data

    def cut(self):
        self.link.ended = True


class Client(simple.MQTTClient):
    broker = None

    def _dial(self):
        self.sock = self.broker.dial()


class Rig:
    """A broker, a flash, a clock, the client; use with play()."""

    Client = Client

    def __init__(self, script=(), size=65536, fresh=False, says=None):
        self.clock = simple.time = Clock()
        self.broker = Broker(script, self.clock, says)
        self.nor = Nor(size)
        self.got = []
        if not fresh:
            store = Store(Journal(self.nor))
            store.open()
            store.begin(identity("p7", "b", 1883))
            store.close()

    def make(self, client_id="p7", off=True, **more):
        """Power on; off: after the power was off."""
        if off:
            simple._owners.clear()
        client = self.Client(client_id, "b", device=self.nor, **more)
        client.broker = self.broker
        client.mark  # noqa: B018 (mounts)
        client.set_callback(lambda topic, msg: self.got.append((topic, msg)))
        return client

    def connected(self, clean=False, timeout=None, **more):
        client = self.make(**more)
        client.connect(clean, timeout)
        return client

    def payloads(self):
        return [payload for _, payload, _ in self.broker.delivered]


def play(scenario, script=(), **more):
    time, select = simple.time, simple.select

    class Select:
        POLLIN = 1
        POLLOUT = 4

        @staticmethod
        def poll():
            return _Registers()

    simple.select = Select
    try:
        scenario(Rig(script, **more))
    finally:
        simple.time, simple.select = time, select
        simple._owners.clear()


class _Registers:
    """A poll object: what it does is the link's own."""

    def register(self, sock, events):
        self.ipoll = sock.poll
        self.modify = sock.modify


# -- umqtt.simple's calls


def test_a_program_of_umqtt_simple_connects_publishes_and_subscribes():
    def scenario(rig):
        c = rig.make(keepalive=30, user="u", password="p")
        c.set_last_will(b"w", b"gone", True, 1)
        assert c.connect() == 0
        assert c.subscribe(b"in/#") is None
        assert c.publish(b"out", b"0") is None
        assert c.publish("out", "1", True, 1) is None
        assert c.publish(b"out", b"2", qos=2) is None
        assert c.ping() is None
        assert c.wait_msg() is None
        assert c.check_msg() is None
        rig.broker.say(publish("in/x", b"a") + publish("in/y", b"b", 1, 7))
        assert c.check_msg() == 0x30
        assert c.wait_msg() == 0x32
        assert rig.got == [(b"in/x", b"a"), (b"in/y", b"b")]
        assert c.unsubscribe(b"in/#") is None
        c.disconnect()
        connect = rig.broker.packets[0]
        assert (connect.clean, connect.keep_alive_s, connect.username, connect.password) == (True, 30, "u", "p")
        assert connect.will == ("w", b"gone", 1, True)
        assert rig.broker.delivered == [("out", b"0", 0), ("out", b"1", 1), ("out", b"2", 2)]
        assert [p.name for p in rig.broker.packets[1:]] == (
            "SUBSCRIBE PUBLISH PUBLISH PUBLISH PUBREL PINGREQ PUBACK UNSUBSCRIBE DISCONNECT".split()
        )

    play(scenario)


def test_the_port_is_that_of_tls_when_there_is_tls():
    def scenario(rig):
        assert (rig.make().port, rig.make(ssl=True).port, rig.make(port=7, ssl=True).port) == (1883, 8883, 7)

    play(scenario)


def test_each_packet_is_one_write():
    def scenario(rig):
        c = rig.connected()
        for qos in range(3):
            del rig.broker.link.writes[:]
            c.publish(b"topic", b"payload", qos=qos)
            assert len(rig.broker.link.writes) == (1, 1, 2)[qos]  # the second is the PUBREL

    play(scenario)


def test_what_the_broker_refuses_is_an_mqtt_exception_with_its_code():
    def scenario(rig):
        c = rig.make()
        e = raises(simple.MQTTException, c.connect)
        assert e.args == (5,) and isinstance(e, MQTTError) and not isinstance(e, ConnectRefused)
        c.connect()
        assert raises(simple.MQTTException, c.subscribe, b"t").args == (128,)
        c.publish(b"t", b"1")  # the connection is as before
        assert rig.payloads() == [b"1"]

    play(scenario, ((1, "CONNECT", 1, "refuse 5"), (2, "SUBSCRIBE", 1, "refuse 128")))


def test_a_wrong_argument_is_a_value_error_and_leaves_the_connection_as_it_was():
    def scenario(rig):
        c = rig.connected()
        before = len(rig.broker.packets)
        raises(ValueError, c.publish, b"t/#", b"x", False, 1)
        raises(ValueError, c.publish, b"", b"x")
        raises(ValueError, c.publish, b"t", b"x", False, 3)
        raises(ValueError, c.publish, b"t", b"z" * 4000, False, 1)
        raises(ValueError, c.set_last_will, b"", b"x")
        raises(ValueError, c.set_last_will, b"t", b"x", False, 3)
        raises(ValueError, c.subscribe, b"a#")
        c.set_callback(None)
        raises(ValueError, c.subscribe, b"a")
        assert len(rig.broker.packets) == before
        c.publish(b"t", b"1", qos=1)
        assert rig.payloads() == [b"1"]

    play(scenario)


def test_only_the_bytes_of_one_packet_are_read_so_that_a_program_may_poll_the_socket():
    def scenario(rig):
        c = rig.connected()
        for size in (30, 300):
            one = publish("t", b"a" * size)
            rig.broker.say(one + one)
            c.check_msg()
            assert rig.broker.link.waiting == one
            c.check_msg()
            assert not rig.broker.link.waiting
        assert len(rig.got) == 4

    play(scenario)


def test_check_msg_never_waits_and_a_packet_in_pieces_is_taken_up_again():
    def scenario(rig):
        c = rig.connected()
        assert c.check_msg() is None
        data = publish("topic", b"payload", 1, 9)
        for i in range(len(data) - 1):
            rig.broker.say(data[i : i + 1])
            assert c.check_msg() is None
        assert rig.clock.waited == 0 and not rig.got
        rig.broker.say(data[-1:])
        assert c.check_msg() == 0x32
        assert rig.got == [(b"topic", b"payload")]

    play(scenario)


def test_answers_to_pings_that_nobody_waits_for_take_nothing_from_what_is_behind_them():
    def scenario(rig):
        c = rig.connected()
        pong = b"\xd0\x00"
        one = publish("t", b"a", 1, 7)
        rig.broker.say(pong + one + pong + pong + one[:3])
        assert c.check_msg() == 0x32
        for _ in range(2):
            assert c.check_msg() is None
        rig.broker.say(one[3:] + pong + publish("t", b"b"))
        assert c.check_msg() == 0x32
        assert c.wait_msg() == 0x30
        assert [msg for _, msg in rig.got] == [b"a", b"a", b"b"] and not rig.broker.link.waiting
        for _ in range(2):
            c.ping()
        rig.broker.say(pong + one)
        assert (c.wait_msg(), c.wait_msg()) == (None, 0x32)
        assert rig.broker.connections == 1

    play(scenario)


# -- what umqtt.simple gets wrong


def test_packet_identifiers_wrap():
    def scenario(rig):
        c = rig.connected()
        c.store.session.newest = c.store._taken = c.store._upto = 65021
        for n in range(5):
            c.publish(b"t", b"%d" % n, qos=1)
        assert [p.packet_id for p in rig.broker.named("PUBLISH")] == [65022, 65023, 1, 2, 3]
        for _ in range(600):
            c.subscribe(b"t")
        assert all(p.packet_id for p in rig.broker.named("SUBSCRIBE"))

    play(scenario)


def test_half_a_message_is_never_delivered():
    def scenario(rig):
        c = rig.connected()
        data = publish("t", b"0123456789", 1, 9)
        for n in range(len(data)):
            rig.broker.say(data[:n])
            rig.broker.cut()
            raises(OSError, c.wait_msg)
            c.connect(False)
        assert not rig.got

    play(scenario)


def test_a_packet_cut_short_at_connect_or_in_subscribe_is_an_os_error():
    def scenario(rig):
        c = rig.make()
        raises(OSError, c.connect)
        raises(OSError, c.connect)
        c.connect()
        raises(OSError, c.subscribe, b"t")

    script = (
        (1, "CONNECT", 1, b"\x20\x02\x00"),
        (2, "CONNECT", 1, b"HTTP/1.1 302 Found\r\n\r\n"),
        (3, "SUBSCRIBE", 1, b"\x90\x03\x00"),
    )
    play(scenario, script)


def test_no_wait_is_endless_but_that_for_a_message():
    def scenario(rig):
        c = rig.make()
        for number, call in enumerate(
            (
                lambda: c.connect(False),
                lambda: c.subscribe(b"t"),
                lambda: c.unsubscribe(b"t"),
                lambda: c.wait_msg(),  # half a packet
            )
        ):
            if number:
                c.connect(False)
            if number == 3:
                rig.broker.say(b"\x30\x05\x00")
            rig.clock.waited = 0
            raises(OSError, call)
            assert 10000 <= rig.clock.waited <= 20000
        c.connect(False)
        rig.broker.deaf = True
        raises(OSError, c.publish, b"t", b"x")

    script = ((1, "CONNECT", 1, "silent"), (0, "SUBSCRIBE", 0, "silent"), (0, "UNSUBSCRIBE", 0, "silent"))
    play(scenario, script)


def test_the_timeout_of_connect_stays_in_force():
    def scenario(rig):
        c = rig.make()
        c.connect(False, timeout=3)
        for _ in range(2):
            rig.clock.waited = 0
            assert raises(OSError, c.wait_msg).errno == 110
            assert 3000 <= rig.clock.waited <= 4000
            rig.broker.say(publish("t", b"x"))  # with umqtt.simple it is over after the first byte of the first message
            assert c.wait_msg() == 0x30
        rig.clock.waited = 0
        raises(OSError, c.subscribe, b"t")
        assert 3000 <= rig.clock.waited <= 4000
        assert rig.broker.connections == 1

    play(scenario, ((1, "SUBSCRIBE", 1, "silent"),))


def test_a_publish_in_the_callback_leaves_the_acknowledgement_of_the_outer_one_alone():
    def scenario(rig):
        c = rig.connected()
        c.subscribe(b"t")

        def callback(topic, msg):
            rig.got.append(msg)
            if len(rig.got) == 1:
                c.publish(b"in", b"inner", qos=1)
                c.publish(b"in", b"inner 2", qos=2)
                c.publish(b"in", b"inner 0")
                c.subscribe(b"u")

        c.set_callback(callback)

        def hears(came):
            if came.name == "PUBLISH" and came.payload == b"outer":
                rig.broker.say(publish("t", b"a", 1, 7))  # before its PUBACK

        rig.broker.hears = hears
        c.publish(b"out", b"outer", qos=1)
        assert rig.got == [b"a"] and not c.store.waiting()
        assert rig.payloads() == [b"outer", b"inner", b"inner 2", b"inner 0"]
        assert rig.clock.waited == 0
        trace = rig.broker.trace()
        assert trace.index("PUBACK 7") > trace.index("SUBSCRIBE 65024 u")  # when the callback has returned

    play(scenario)


def test_a_callback_that_answers_each_message_does_not_grow_the_stack():
    def scenario(rig):
        c = rig.connected()
        deepest = [0]

        def callback(topic, msg):
            deepest[0] = max(deepest[0], c._depth)
            n = int(msg)
            if n < 50:
                c.publish(b"t", b"%d" % (n + 1), qos=1)

        def hears(came):  # every message comes back before it is acknowledged
            if came.name == "PUBLISH":
                rig.broker.say(publish("t", came.payload))

        c.set_callback(callback)
        rig.broker.hears = hears
        c.publish(b"t", b"0", qos=1)
        while rig.broker.link.waiting:
            c.check_msg()
        assert len(rig.payloads()) == 51 and not c.store.waiting()
        assert deepest[0] < 8

    play(scenario)


def test_a_message_whose_callback_raises_comes_again():
    def scenario(rig):
        for qos in (1, 2):
            c = rig.connected()
            fails = [True]

            def callback(topic, msg):
                rig.got.append((qos, c.token is not None))
                if fails.pop() if fails else False:
                    raise KeyError("made to fail")

            c.set_callback(callback)
            rig.broker.say(publish("t", b"a", qos, 7))
            raises(KeyError, c.wait_msg)
            rig.broker.say(publish("t", b"b"))
            c.wait_msg()  # the connection is as before
            c.connect(False)
            rig.broker.say(publish("t", b"a", qos, 7, dup=True))
            c.wait_msg()
            assert rig.got == [(qos, qos == 2), (qos, False), (qos, qos == 2)]
            del rig.got[:]
            c.check_msg()  # PUBREL
            c.disconnect()
        assert [p.name for p in rig.broker.packets if p.packet_id] == ["PUBACK", "PUBREC", "PUBCOMP"]

    play(scenario)


def test_a_callbacks_os_error_is_not_taken_for_the_links():
    def scenario(rig):
        c = rig.connected()

        def callback(topic, msg):
            raise OSError(19, "no sensor")

        def hears(came):
            if came.name == "PUBLISH":
                rig.broker.say(publish("t", b"a"))

        c.set_callback(callback)
        rig.broker.hears = hears
        assert raises(OSError, c.publish, b"t", b"1", False, 1).errno == 19
        rig.broker.hears = None
        c.publish(b"t", b"2", qos=1)
        assert rig.payloads() == [b"1", b"2"] and rig.broker.connections == 1

    play(scenario)


# -- durability


def test_what_publish_has_accepted_survives_power_loss_at_any_packet_of_its_way():
    for qos, name, what in (
        (1, "PUBLISH", "lost"),
        (1, "PUBLISH", "unanswered"),
        (2, "PUBLISH", "lost"),
        (2, "PUBLISH", "unanswered"),
        (2, "PUBREL", "lost"),
        (2, "PUBREL", "unanswered"),
    ):

        def scenario(rig):
            c = rig.connected()
            c._pause_ms = 60000  # the power fails before it can connect again
            c._next_ms = rig.clock.ticks_add(rig.clock.ticks_ms(), 60000)
            c._lost = lambda e: (c._hang_up(), e)[1]
            c.publish(b"t", b"1", qos=qos, mark=7)
            c = rig.make()
            assert c.mark == 7 and c.store.waiting() == 1
            assert c.connect(False) == 1
            c.publish(b"t", b"2", qos=qos)
            assert not c.store.waiting()
            want = [b"1", b"2"]
            if (qos, what) == (1, "unanswered"):
                want.insert(0, b"1")  # with DUP
                assert rig.broker.named("PUBLISH", 2)[0].dup
            assert rig.payloads() == want

        play(scenario, ((1, name, 1, what),))


def test_a_lost_link_is_no_error_and_no_double_at_qos_1_and_2():
    def scenario(rig):
        c = rig.connected()
        for n in range(40):
            if n % 5 == 2:
                rig.broker.cut()
            if n == 20:
                rig.broker.away = True
            if n == 30:
                rig.broker.away = False
                rig.clock.now += 60000
            c.publish(b"t", b"%d" % n, qos=1 + n % 2)
        c.publish(b"t", b"40", qos=1)
        assert rig.payloads() == [b"%d" % n for n in range(41)]

    play(scenario)


def test_attempts_to_connect_again_pause_from_1_s_to_60_s():
    def scenario(rig):
        c = rig.connected()
        c.publish(b"t", b"0", qos=1)
        rig.broker.away = True
        rig.broker.cut()
        tries = []

        def dial():
            tries.append(rig.clock.now)
            raise OSError(111)

        rig.broker.dial = dial
        begin = rig.clock.now
        for _ in range(3000):
            rig.clock.now += 100
            try:
                c.publish(b"t", b"x", qos=1)
            except JournalFull:
                break
        del rig.broker.dial
        pauses = [b - a for a, b in zip(tries, tries[1:])]
        assert tries[0] - begin == 100  # at once: the connection was good
        assert pauses[:7] == [1000, 2000, 4000, 8000, 16000, 32000, 60000][: len(pauses)] and len(pauses) >= 4
        for call in (lambda: c.publish(b"t", b"x"), c.ping, lambda: c.subscribe(b"t"), c.wait_msg, c.check_msg):
            raises(OSError, call)
        rig.broker.away = False
        assert c.connect(False) == 1  # the program's own is made at once

    play(scenario)


def test_publish_connects_by_itself_also_when_the_first_connect_failed_but_not_before_connect_or_after_disconnect():
    def scenario(rig):
        c = rig.make()
        c.publish(b"t", b"0", qos=1)
        assert rig.broker.connections == 0
        rig.broker.away = True
        raises(OSError, c.connect)
        c.publish(b"t", b"1", qos=1)
        rig.broker.away = False
        rig.clock.now += 1000
        c.publish(b"t", b"2", qos=1)
        assert rig.payloads() == [b"0", b"1", b"2"]
        c.disconnect()
        rig.clock.now += 100000
        c.publish(b"t", b"3", qos=1)
        assert rig.broker.connections == 1
        c = rig.make()
        c.connect()
        c.publish(b"t", b"4", qos=1)
        assert rig.payloads() == [b"0", b"1", b"2", b"3", b"4"]

    play(scenario)


def test_a_broker_that_swallows_everything_ends_the_wait_of_publish():
    def scenario(rig):
        c = rig.connected()
        c.publish(b"t", b"0", qos=1)
        rig.broker.away = False
        c.publish(b"t", b"1", qos=1)
        assert 10000 <= rig.clock.waited <= 21000
        assert rig.broker.connections == 2 and not c.store.waiting()
        assert rig.payloads() == [b"0", b"1"]

    play(scenario, ((1, "PUBLISH", 2, "ignored"),))


def test_a_slow_callback_does_not_use_up_the_brokers_time():
    def scenario(rig):
        c = rig.connected()

        def callback(topic, msg):
            rig.clock.now += 30000

        def hears(came):
            if came.name == "PUBLISH":
                rig.broker.say(publish("t", b"a"))

        c.set_callback(callback)
        rig.broker.hears = hears
        c.publish(b"t", b"1", qos=1)
        assert rig.broker.connections == 1 and not c.store.waiting()

    play(scenario)


def test_a_new_journal_begins_with_a_clean_session():
    def scenario(rig):
        rig.broker.sessions["p7"] = ({}, {1})  # of an earlier life, and it would swallow message 1
        c = rig.make()
        c.connect(False)
        c.publish(b"t", b"1", qos=2)
        assert rig.payloads() == [b"1"]
        assert rig.broker.trace()[:3] == ["CONNECT clean", "DISCONNECT", "CONNECT"]

    play(scenario, fresh=True)


def test_with_a_clean_session_what_is_stored_goes_out_as_new():
    def scenario(rig):
        c = rig.connected()
        c.publish(b"t", b"1", qos=2)
        rig.clock.now += 60000
        assert c.connect(True) == 0
        c.publish(b"t", b"2", qos=2)
        assert rig.payloads() == [b"1", b"2"]
        assert not any(p.dup for p in rig.broker.named("PUBLISH"))

    play(scenario, ((1, "PUBLISH", 0, "lost"),))


def test_subscriptions_are_made_again_when_publish_has_connected_again_and_the_broker_has_lost_them():
    for clean, forgets, again in ((False, False, 0), (False, True, 1), (True, False, 1)):

        def scenario(rig):
            c = rig.connected(clean)
            c.subscribe(b"t/#", 1)
            c.subscribe(b"u")
            c.unsubscribe(b"u")
            rig.broker.cut()
            if forgets:
                rig.broker.forget()
            c.publish(b"x", b"1", qos=1)
            assert rig.broker.trace(2).count("SUBSCRIBE 65024 t/#") == again
            c.check_msg()
            rig.broker.cut()
            c.publish(b"x", b"2", qos=1)
            assert rig.broker.trace(3).count("SUBSCRIBE 65024 t/#") == clean
            assert rig.payloads() == [b"1", b"2"]

        play(scenario)


def test_a_programs_own_clean_connect_begins_without_subscriptions_as_in_umqtt_simple():
    def scenario(rig):
        c = rig.connected()
        c.subscribe(b"t/#", 1)
        c.connect(True)
        c.connect(False)
        assert not rig.broker.named("SUBSCRIBE", 2) and not rig.broker.named("SUBSCRIBE", 3)

    play(scenario)


def test_a_qos_2_message_received_is_delivered_once_also_when_power_fails_on_its_way():
    def scenario(rig):
        c = rig.connected()
        rig.broker.say(publish("t", b"a", 2, 7))
        c.wait_msg()  # PUBREC goes out and the link drops
        c = rig.connected()
        rig.broker.say(publish("t", b"a", 2, 7, dup=True))
        c.check_msg()  # PUBREC
        c.check_msg()  # PUBREL
        c = rig.connected()
        rig.broker.say(publish("t", b"b", 2, 7))
        c.wait_msg()
        assert rig.got == [(b"t", b"a"), (b"t", b"b")]
        assert rig.broker.trace(2)[1:] == ["PUBREC 7", "PUBCOMP 7"]

    play(scenario, ((1, "PUBREC", 1, "lost"),))


def flood(rig, first, last, dup=False):
    """As mosquitto 2.0 after a reconnection: all that waits, whatever its window."""
    rig.broker.say(b"".join([publish("t", b"%d" % n, 2, n, dup=dup) for n in range(first, last + 1)]))


def test_more_messages_at_qos_2_than_are_kept_in_mind_come_again_over_a_new_connection():
    for unanswered in (0, 5):

        def scenario(rig):
            c = rig.connected(timeout=5)
            flood(rig, 1, 300)
            for n in range(1, 257):
                assert c.wait_msg() == 0x34
            rig.broker.say(publish("t", b"QoS 0") + publish("t", b"QoS 1", 1, 400))
            assert c.wait_msg() == 0x30
            raises(OSError, c.wait_msg)
            assert rig.broker.connections == 2 and c.passed_over == 45
            flood(rig, 257, 300, True)
            for n in range(257, 301):
                assert c.wait_msg() == 0x3C
            assert c.check_msg() is None
            assert [payload for _, payload in rig.got] == (
                [b"%d" % n for n in range(1, 257)] + [b"QoS 0"] + [b"%d" % n for n in range(257, 301)]
            )
            assert [p.packet_id for p in rig.broker.named("PUBREC")] == list(range(1, 301))
            assert not rig.broker.named("PUBACK")

        play(scenario, ((1, "PUBREC", unanswered, "ignored"),) if unanswered else ())


def test_a_broker_that_finishes_none_of_its_messages_is_not_connected_to_again_and_again():
    def scenario(rig):
        c = rig.connected(timeout=5)
        flood(rig, 1, 300)
        for n in range(256):
            c.wait_msg()
        for n in range(10):
            raises(OSError, c.wait_msg)
        rig.broker.say(publish("t", b"QoS 0"))
        assert c.wait_msg() == 0x30
        c.publish(b"t", b"x", qos=1)
        assert rig.broker.connections == 1 and rig.payloads() == [b"x"]

    play(scenario, ((1, "PUBREC", 0, "ignored"),))


def test_a_callback_that_takes_itself_away_has_had_its_message():
    for qos in (1, 2):

        def scenario(rig):
            c = rig.connected()
            c.set_callback(lambda topic, msg: c.set_callback(None))
            rig.broker.say(publish("t", b"a", qos, 7))
            c.wait_msg()
            assert len(rig.broker.named("PUBACK" if qos == 1 else "PUBREC")) == 1

        play(scenario)


def test_what_a_callback_raises_after_the_link_was_lost_in_it_and_made_again_leaves_the_new_link_alone():
    def scenario(rig):
        c = rig.connected()

        def callback(topic, msg):
            rig.broker.cut()
            c.publish(b"in", b"inner", qos=1)  # finds it out, and connects again
            raise OSError(5)

        c.set_callback(callback)
        rig.broker.say(publish("t", b"a", 1, 7))
        assert raises(OSError, c.wait_msg).args == (5,)
        assert rig.broker.connections == 2 and rig.payloads() == [b"inner"]
        c.publish(b"in", b"outer", qos=1)
        assert rig.broker.connections == 2 and rig.payloads() == [b"inner", b"outer"]

    play(scenario)


def test_without_a_callback_a_message_is_kept_by_the_broker():
    def scenario(rig):
        c = rig.connected()
        c.set_callback(None)
        rig.broker.say(publish("t", b"a", 1, 7) + publish("t", b"b"))
        c.wait_msg()
        c.wait_msg()
        assert not rig.broker.named("PUBACK")

    play(scenario)


def test_keep_alive_is_kept_in_wait_msg_and_a_broker_that_does_not_answer_is_noticed():
    def scenario(rig):
        c = rig.connected(keepalive=40)
        rig.clock.after(100000, lambda: rig.broker.say(publish("t", b"x")))
        assert c.wait_msg() == 0x30  # their answers do not end it
        assert len(rig.broker.named("PINGREQ")) == 3
        raises(OSError, c.wait_msg)
        assert rig.clock.waited < 100000 + 60000

    play(scenario, ((1, "PINGREQ", 4, "silent"),))


def test_finished_messages_are_recorded_once_a_second_when_nothing_comes_and_at_the_end():
    def scenario(rig):
        c = rig.connected()
        c.publish(b"t", b"1", qos=1)
        assert rig.make().store.waiting() == 0  # as on a board that wakes, publishes and sleeps
        for wait_ms in (1000, 0):
            c = rig.connected()
            c.publish(b"t", b"1", qos=1)
            c.publish(b"t", b"2", qos=1)
            rig.clock.now += wait_ms
            (c.check_msg if wait_ms else c.disconnect)()
            assert rig.make().store.waiting() == 0

    play(scenario)


def test_a_backlog_goes_out_in_order_before_anything_new():
    def scenario(rig):
        c = rig.make()
        for n in range(100):
            c.publish(b"t", b"%d" % n + b"." * 100, qos=1, mark=n)
        c = rig.make()
        assert c.mark == 99
        c.connect(False)
        c.publish(b"t", b"100", qos=1)
        assert [int(p.split(b".")[0]) for p in rig.payloads()] == list(range(101))

    play(scenario)


def test_a_full_journal_is_said_and_the_message_is_not_stored():
    def scenario(rig):
        c = rig.make()
        stored = 0
        try:
            while True:
                c.publish(b"t", b"%4d" % stored + b"." * 800, qos=1)
                stored += 1
        except JournalFull:
            pass
        c.connect(False)
        c.publish(b"t", b"end", qos=1)
        assert len(rig.payloads()) == stored + 1

    play(scenario, size=16384)


def test_a_later_client_for_the_same_session_takes_the_journal_over():
    def scenario(rig):
        a = rig.connected()
        a.publish(b"t", b"1", qos=1)
        b = rig.connected(off=False)
        raises(OSError, a.check_msg)
        b.publish(b"t", b"2", qos=1)
        a.disconnect()
        b.publish(b"t", b"3", qos=1)
        assert rig.payloads() == [b"1", b"2", b"3"]
        assert rig.make(off=False).store.waiting() == 0  # even what is recorded lazily

    play(scenario)


def test_of_two_clients_on_one_journal_the_later_one_is_told():
    def scenario(rig):
        a = rig.connected()
        a.publish(b"t", b"1", qos=1)
        b = Client("other", "b", device=rig.nor)
        b.broker = rig.broker
        for call in (b.connect, lambda: b.publish(b"t", b"x", qos=1), lambda: b.mark):
            raises(JournalUnavailable, call)
        b.disconnect()
        a.publish(b"t", b"2", qos=1)
        a.disconnect()
        b.connect()  # one after the other they may use it
        b.publish(b"t", b"3", qos=1)
        b.disconnect()
        a.connect()
        a.publish(b"t", b"4", qos=1)
        assert rig.payloads() == [b"1", b"2", b"3", b"4"]

    play(scenario)


def test_through_random_faults_every_message_arrives_in_order_and_at_qos_2_once():
    names = ("CONNECT", "PUBLISH", "PUBREL", "PUBREC", "PUBACK", "PUBCOMP")
    faults = ("lost", "unanswered", "answered", "silent", "ignored")
    for seed in range(12):

        def scenario(rig):
            rng = Rng(seed)
            c = rig.connected()
            received = 0
            for n in range(120):
                rig.broker.script = ()
                if not rng.below(3):
                    name = names[rng.below(len(names))]
                    rig.broker.script = ((0, name, 1 + rng.below(40), faults[rng.below(len(faults))]),)
                if not rng.below(12):
                    rig.broker.cut()
                if not rng.below(15):  # the power fails
                    c = rig.make()
                    c._stay, c._clean = True, False
                if not rng.below(8) and c._up and rig.broker.link and not rig.broker.link.ended:
                    received += 1
                    rig.broker.say(publish("in", b"%d" % received, 2, received))
                c.publish(b"q%d" % (n % 2), b"%d" % n, qos=1 + n % 2, mark=n)
                assert c.mark == n
                rig.clock.waited = 0
                rig.clock.now += rng.below(40000)
            rig.broker.script = ()
            for _ in range(3):  # the first may find a link that is dead
                rig.clock.now += 60000
                c.publish(b"q1", b"end", qos=2)
            got = rig.broker.delivered
            once = [int(payload) for topic, payload, _ in got if topic == "q1" and payload != b"end"]
            assert once == list(range(1, 120, 2)), (seed, once)
            some = []
            for topic, payload, _ in got:
                if topic == "q0" and int(payload) not in some:
                    some.append(int(payload))
            assert some == list(range(0, 120, 2)), (seed, some)
            assert rig.got and len(rig.got) == len(set(rig.got)), (seed, rig.got)
            assert rig.broker.connections > 8 and any(p.dup for p in rig.broker.named("PUBLISH"))

        play(scenario)


def test_after_another_hand_has_taken_the_journals_home_away_it_begins_anew():
    class Taken(Nor):
        taken = False

        def writeblocks(self, *args):
            if self.taken:
                raise JournalLost("pinned: gone")
            return super().writeblocks(*args)

        def readblocks(self, *args):
            if self.taken:
                raise JournalLost("pinned: gone")
            return super().readblocks(*args)

    def scenario(rig):
        homes = []

        def open_home(home, size, anew=False):
            homes.append(anew)
            rig.nor = Taken(size)
            return rig.nor, 4, None

        simple.open_home, before = open_home, simple.open_home
        try:
            c = Client("p7", "b", home="pinned")
            c.broker = rig.broker
            c.connect(False)
            c.publish(b"t", b"1", qos=1)
            rig.nor.taken = True
            raises(JournalLost, c.publish, b"t", b"2", False, 1)
            c.publish(b"t", b"3", qos=1)
            assert homes == [False, True] and isinstance(c.last_error, JournalLost)
            assert rig.payloads() == [b"1", b"3"]
            assert rig.broker.trace(3)[0] == "CONNECT clean"  # the new one begins with a clean session
        finally:
            simple.open_home = before

    play(scenario)


# -- broken brokers and links


def test_whatever_a_broker_sends_is_an_os_error_and_a_new_connection_works():
    qos_3 = b"\x36\x07\x00\x01t\x00\x01xy"
    for data in (b"\x00\x00", b"\x20\x02\x00\x00", qos_3, b"\x30\xff\xff\xff\xff", b"\x50\x00"):

        def scenario(rig):
            c = rig.connected()
            rig.broker.say(data)
            raises(OSError, c.wait_msg)
            raises(OSError, c.check_msg)
            c.connect(False)
            c.publish(b"t", b"1", qos=2)
            assert rig.payloads() == [b"1"] and not rig.got

        play(scenario)


def test_a_message_over_the_limit_is_acknowledged_and_counted():
    def scenario(rig):
        c = rig.connected(limit_bytes=1000)
        rig.broker.say(publish("t", b"z" * 5000, 1, 7) + publish("t", b"b"))
        c.wait_msg()
        assert rig.got == [(b"t", b"b")] and c.too_large == 1
        assert rig.broker.trace(1)[1:] == ["PUBACK 7"]
        c = rig.connected(limit_bytes=129)
        for size in range(4, 10):  # however little of it is still to come
            one = publish("t", b"c")
            rig.broker.say(publish("t" * 122, b"z" * size) + one + one)
            c.wait_msg()
            assert rig.got.pop() == (b"t", b"c") and c.too_large == size - 3
            assert rig.broker.link.waiting == one
            c.wait_msg()

    play(scenario)


def test_silence_behind_a_message_over_the_limit_is_no_half_packet():
    def scenario(rig):
        for limit in (100, 1000):  # it comes in one piece; in many
            c = rig.connected(limit_bytes=limit, keepalive=60)
            rig.broker.say(publish("t", b"z" * (limit + 20)))
            rig.clock.after(100000, lambda: rig.broker.say(publish("t", b"b")))
            c.wait_msg()
            assert rig.got.pop() == (b"t", b"b") and c.too_large == 1 and c.last_error is None

    play(scenario)


def test_half_a_message_over_the_limit_is_half_a_packet():
    def scenario(rig):
        c = rig.connected(limit_bytes=1000)
        rig.broker.say(publish("t", b"z" * 5000)[:3000])
        assert raises(OSError, c.wait_msg).args[0] == simple.ETIMEDOUT

    play(scenario)


def test_a_callback_that_fails_after_a_call_of_its_own_was_broken_off_leaves_the_connection_as_it_was():
    def scenario(rig):
        c = rig.connected()

        def callback(topic, msg):
            readinto = rig.broker.link.readinto

            def struck(view, n):
                rig.broker.link.readinto = readinto
                raise MemoryError

            rig.broker.link.readinto = struck
            raises(MemoryError, c.check_msg)
            raise OSError(5)  # a sensor's

        c.set_callback(callback)
        rig.broker.say(publish("t", b"a"))
        assert raises(OSError, c.wait_msg).args[0] == 5
        assert c._up and c.last_error is None

    play(scenario)


def test_a_large_message_goes_out_whole_over_a_link_that_takes_little_at_a_time():
    def scenario(rig):
        c = rig.connected()
        for qos in range(3):
            rig.broker.link.takes = 100
            c.publish(b"t", b"%d" % qos * 3000, qos=qos)
        assert rig.payloads() == [b"0" * 3000, b"1" * 3000, b"2" * 3000]

    play(scenario)


def test_an_interrupt_in_the_middle_of_a_packet_ends_the_connection():
    def scenario(rig):
        c = rig.connected()
        write = rig.broker.link.write

        def interrupted(data, at, n):
            write(data, at, 2)
            raise KeyboardInterrupt

        rig.broker.link.write = interrupted
        raises(KeyboardInterrupt, c.publish, b"t", b"1", False, 1)
        raises(OSError, c.publish, b"t", b"x")
        c.publish(b"t", b"2", qos=1)
        assert rig.payloads() == [b"1", b"2"] and rig.broker.connections == 2

    play(scenario)


def test_an_interrupt_before_connack_leaves_no_connection():
    def scenario(rig):
        c = rig.make()

        def hears(came):
            def interrupted(view, n):
                raise KeyboardInterrupt

            rig.broker.link.readinto = interrupted

        rig.broker.hears = hears
        raises(KeyboardInterrupt, c.connect, False)
        rig.broker.hears = None
        raises(OSError, c.publish, b"t", b"x")
        c.publish(b"t", b"1", qos=1)
        assert rig.payloads() == [b"1"]

    play(scenario)


def test_a_socket_that_the_program_has_closed_is_an_os_error():
    def scenario(rig):
        c = rig.connected()
        c.sock.close()
        raises(OSError, c.check_msg)
        c.sock.close()
        c.connect(False)
        assert c.check_msg() is None

    play(scenario)


def test_acknowledgements_of_nothing_change_nothing():
    def scenario(rig):
        c = rig.connected()
        rig.broker.say(ack("PUBACK", 77) + ack("PUBCOMP", 78) + packet(0x90, b"\xff\x00\x00") + ack("UNSUBACK", 65030))
        rig.broker.say(ack("PUBREC", 79) + ack("PUBREL", 80))
        assert c.check_msg() is None
        c.publish(b"t", b"1", qos=1)
        assert rig.broker.trace(1)[1:3] == ["PUBREL 79", "PUBCOMP 80"]
        assert c.store.session.unknown == 7  # the broker has answered our PUBREL

    play(scenario)


def test_msg_may_be_any_object_with_bytes_and_nothing_else_harms_the_journal():
    def scenario(rig):
        client = rig.connected()
        numbers = array("H", (1, 2, 515))
        for msg in (numbers, memoryview(numbers)):
            for qos in (0, 1, 2, 1):
                client.publish("t", msg, qos=qos)
        for msg in (5, None, [1, 2]):
            for qos in (0, 1):
                raises(TypeError, lambda: client.publish("t", msg, qos=qos))  # noqa: B023
        client.publish("t", bytearray(b"x"), qos=1)
        assert rig.payloads() == [bytes(numbers)] * 8 + [b"x"]

    play(scenario)


def test_journal_that_any_exception_has_left_in_a_record_is_mounted_anew():
    def scenario(rig):
        client = rig.connected()
        client.publish("t", b"1", qos=1)
        program = rig.nor.writeblocks

        def fail(*_):
            rig.nor.writeblocks = program
            raise MemoryError("no room")

        rig.nor.writeblocks = fail
        raises(MemoryError, lambda: client.publish("another topic", b"lost", qos=1))
        client.publish("t", b"2", qos=1)
        assert rig.payloads() == [b"1", b"2"] and rig.broker.connections == 2

    play(scenario)
