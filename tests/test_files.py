"""Payloads received into a file and sent from one (files.py), against the scripted broker."""

import asyncio
import os
import sys

import mqtt_durable.files as files_module
from fakebroker import ack, publish, turns, until
from mqtt_durable.errors import JournalFull, ProtocolError
from skip import SkipTest
from test_client import play, raised

_PATH = "test_files.%s.tmp" % sys.implementation.name  # both interpreters may run at once
_PART = _PATH + ".part"
_LARGE = 20000  # several times what the client takes whole, and its two buffers


def _content(n, seed=1):
    """n bytes in which no piece is like another."""
    data = bytearray(n)
    for i in range(n):
        seed = seed * 1103515245 + 12345 & 0x7FFFFFFF
        data[i] = seed >> 16 & 255
    return bytes(data)


def _read(path=_PATH):
    with open(path, "rb") as file:
        return file.read()


def _write(data, path=_PATH):
    with open(path, "wb") as file:
        file.write(data)


def _exists(path):
    try:
        os.stat(path)
    except OSError:
        return False
    return True


def _clean():
    for path in (_PATH, _PART):
        if _exists(path):
            os.remove(path)


def run(scenario, script=(), **options):
    """As test_client.play(), with no file there before and after it."""
    _clean()
    try:
        play(scenario, script, **options)
        assert not _exists(_PART)
    finally:
        _clean()


class Taker:
    """A handler of on_file() that keeps what it gets, what is then in the file, and goes on when told."""

    def __init__(self, client, topic_filter="#", limit_bytes=100000, hold=False):
        self.messages = []
        self.contents = []
        self.gate = asyncio.Event()
        if not hold:
            self.gate.set()
        client.on_file(topic_filter, _PATH, self.handle, limit_bytes)

    async def handle(self, message):
        assert message.payload is None
        self.messages.append(message)
        await self.gate.wait()
        self.contents.append(_read() if message.path else None)


class Failing:
    """In place of open() in files.py: files that raise OSError when more than room bytes are written or read."""

    def __init__(self, room):
        self.room = room

    def __enter__(self):
        files_module.open = self.open

    def __exit__(self, *_):
        del files_module.open

    def open(self, path, mode):
        self.file = open(path, mode)
        return self

    def write(self, data):
        self._take(len(data))
        return self.file.write(data)

    def readinto(self, buf):
        self._take(len(buf))
        return self.file.readinto(buf)

    def _take(self, n):
        self.room -= n
        if self.room < 0:
            raise OSError(28, "no space")

    def close(self):
        self.file.close()


# Receiving.


def test_payload_goes_into_the_file_whole_whatever_its_size_and_is_acknowledged_after_the_handler():
    cases = [(size, qos) for size in (0, 1, 700, 760, 4000, 4096, 4097, _LARGE) for qos in (0, 1, 2)]

    async def scenario(rig):
        client = rig.client
        taker = Taker(client, hold=True)
        await rig.up()
        for n, (size, qos) in enumerate(cases):
            taker.gate.clear()
            data = _content(size, n)
            await rig.broker.publish("a/%d" % n, data, qos, qos and n + 1, retain=n % 2 == 1)
            await until(lambda: len(taker.messages) == n + 1)
            await turns()
            assert not qos or "PUB%s %d" % (("ACK", "REC")[qos - 1], n + 1) not in rig.broker.trace()
            taker.gate.set()
            if qos:
                await rig.broker.expect(("PUBACK %d", "PUBCOMP %d")[qos - 1] % (n + 1))
            await until(lambda: len(taker.contents) == n + 1)
            message = taker.messages[n]
            assert taker.contents[n] == data and message.size == size and message.path == _PATH
            assert (message.topic, message.qos, message.retain) == ("a/%d" % n, qos, n % 2 == 1)
            assert message.error is None and (message.token is None) == (qos < 2)
        assert client.stats()["received"] == len(cases) and client.stats()["too_large"] == 0
        assert rig.broker.connections == 1

    for version in (4, 5):
        run(scenario, version=version)


def test_payload_that_comes_in_any_pieces_is_the_same_and_the_packets_around_it_are_understood():
    data = _content(6000)
    stream = publish("b", b"before", 1, 1) + publish("a", data, 1, 2) + publish("b", b"after", 1, 3)
    for step in (1, 2, 3, 767, 768, 769):

        async def scenario(rig):
            taker = Taker(rig.client, "a")
            got = []
            rig.client.on("b", lambda message: got.append(message.payload))
            await rig.up()
            at = 0
            while at < len(stream):
                # Single bytes where heads are, else the file alone takes long.
                n = step if step > 3 or at < 60 or at > len(stream) - 30 else 500 + step
                await rig.broker.send(stream[at : at + n])
                at += n
                await turns(2)
            await rig.broker.expect("PUBACK 3")
            assert taker.contents == [data] and got == [b"before", b"after"]

        run(scenario)


def test_payload_over_the_limit_is_acknowledged_counted_and_neither_written_nor_delivered():
    async def scenario(rig):
        taker = Taker(rig.client, "a", limit_bytes=1000)
        got = []
        rig.client.on("b", got.append)
        await rig.up()
        with Failing(0):  # nothing is to be opened
            await rig.broker.publish("a", b"x" * 1001, 1, 1)
            await rig.broker.publish("a", b"x" * _LARGE, 1, 2)
            await rig.broker.publish("a", b"x" * _LARGE, 2, 3)
            await rig.broker.publish("a", b"x" * _LARGE, 0)
            await rig.broker.publish("b", b"x" * _LARGE, 1, 4)  # a handler without a file: the client's own limit
            await rig.broker.expect("PUBACK 4")
            await rig.broker.expect("PUBCOMP 3")
        assert not taker.messages and not got and not _exists(_PATH)
        assert rig.client.stats()["too_large"] == 5
        await rig.broker.publish("a", b"y" * 1000, 1, 5)
        await rig.broker.expect("PUBACK 5")
        assert taker.contents == [b"y" * 1000] and rig.broker.connections == 1

    run(scenario)


def test_link_lost_in_the_middle_leaves_no_part_and_the_message_comes_again():
    data = _content(_LARGE)
    for qos, answer in ((1, "PUBACK 7"), (2, "PUBCOMP 7")):

        async def scenario(rig):
            taker = Taker(rig.client)
            await rig.up()
            connection = 1
            for bytes_sent in (3, 10, 500, _LARGE // 2, _LARGE):
                await rig.broker.send(publish("t", data, qos, 7, dup=connection > 1)[:bytes_sent])
                if bytes_sent >= 500:
                    await until(lambda: _exists(_PART))
                await rig.broker.drop()
                connection += 1
                await rig.up(connection)
                assert not _exists(_PART) and not _exists(_PATH) and not taker.messages
            await rig.broker.publish("t", data, qos, 7, dup=True)
            await rig.broker.expect(answer)
            assert taker.contents == [data] and not rig.client.store.session.busy

        run(scenario)


def test_link_lost_in_the_middle_at_qos_0_loses_that_message_only():
    async def scenario(rig):
        taker = Taker(rig.client)
        await rig.up()
        await rig.broker.send(publish("t", b"x" * _LARGE)[: _LARGE // 2])
        await until(lambda: _exists(_PART))
        await rig.broker.drop()
        await rig.up(2)
        await rig.broker.publish("t", b"y" * _LARGE)
        await until(lambda: taker.contents)
        assert taker.contents == [b"y" * _LARGE]

    run(scenario)


def test_qos_2_message_is_written_and_handled_once_however_often_it_comes_before_pubrel():
    async def scenario(rig):
        taker = Taker(rig.client, hold=True)
        await rig.up()
        await rig.broker.publish("t", b"1" * _LARGE, 2, 7)
        await until(lambda: taker.messages)
        with Failing(0):
            await rig.broker.publish("t", b"2" * _LARGE, 2, 7, dup=True)  # while the handler has it
            await rig.broker.publish("t", b"", 1, 8)  # by then that has been read
            await until(lambda: rig.client.stats()["duplicates"] == 1)
            taker.gate.set()
            await rig.broker.expect("PUBREC 7")
            await rig.broker.publish("t", b"3" * _LARGE, 2, 7, dup=True)
            await rig.broker.expect("PUBREC 7", 2)
        assert rig.client.stats()["duplicates"] == 2 and taker.contents[0] == b"1" * _LARGE
        assert [message.size for message in taker.messages if message.qos == 2] == [_LARGE]

    run(scenario, [(1, "PUBREC", 0, "silent")])


def test_disk_that_is_full_is_told_to_the_handler_and_the_message_is_acknowledged():
    for room in (0, 300, 5000):
        for qos, answer in ((1, "PUBACK 7"), (2, "PUBCOMP 7")):

            async def scenario(rig):
                taker = Taker(rig.client)
                await rig.up()
                with Failing(room):
                    await rig.broker.publish("t", b"x" * _LARGE, qos, 7)
                    await rig.broker.expect(answer)
                (message,) = taker.messages
                assert message.error.errno == 28 and message.path is None and message.size == _LARGE
                assert rig.client.last_error is message.error and not _exists(_PART) and not _exists(_PATH)
                await rig.broker.publish("t", b"y" * _LARGE, qos, 8)
                await until(lambda: len(taker.messages) == 2)
                assert taker.contents[1] == b"y" * _LARGE and rig.broker.connections == 1

            run(scenario)


class _Ram:
    """A block device for a file system."""

    def __init__(self, blocks):
        self.data = memoryview(bytearray(512 * blocks))

    def readblocks(self, n, buf, off=0):
        at = n * 512 + off
        buf[:] = self.data[at : at + len(buf)]

    def writeblocks(self, n, buf, off=0):
        at = n * 512 + off
        self.data[at : at + len(buf)] = buf

    def ioctl(self, op, arg):
        return {4: len(self.data) // 512, 5: 512}.get(op, 0)


def test_on_the_boards_file_systems_a_payload_replaces_the_one_before_and_a_full_disk_is_freed_again():
    import vfs

    if sys.implementation.name != "micropython":
        raise SkipTest("needs MicroPython's file systems")
    for kind in (vfs.VfsLfs2, vfs.VfsFat):

        async def scenario(rig):
            got = []

            def handle(message):
                got.append(message.error.errno if message.error else _read(message.path))

            rig.client.on_file("t", "/ram/f", handle, 1000000)
            await rig.up()
            for n, size in enumerate((5000, _LARGE, 50000, _LARGE)):
                await rig.broker.publish("t", b"%d" % n * size, 1, n + 1)
                await rig.broker.expect("PUBACK %d" % (n + 1))
            assert got == [b"0" * 5000, b"1" * _LARGE, 28, b"3" * _LARGE]
            assert os.listdir("/ram") == ["f"] and _read("/ram/f") == b"3" * _LARGE
            assert await rig.client.publish_file("out", "/ram/f")
            assert rig.broker.delivered == [("out", b"3" * _LARGE, 1)]

        device = _Ram(120)
        kind.mkfs(device)
        vfs.mount(kind(device), "/ram")
        try:
            run(scenario)
        finally:
            vfs.umount("/ram")


def test_file_that_cannot_be_made_is_told_to_the_handler():
    got = []

    async def scenario(rig):
        rig.client.on_file("t", "no/such/directory/f", got.append, 100000)
        await rig.up()
        await rig.broker.publish("t", b"x" * _LARGE, 1, 7)
        await rig.broker.publish("t", b"x", 1, 8)
        await rig.broker.expect("PUBACK 8")
        assert [(message.path, message.error.errno) for message in got] == [(None, 2), (None, 2)]

    run(scenario)


def test_file_that_cannot_take_its_name_is_told_to_the_handler():
    async def scenario(rig):
        taker = Taker(rig.client, hold=True)
        os.mkdir(_PATH)
        try:
            await rig.up()
            await rig.broker.publish("t", b"x", 1, 7)
            await until(lambda: taker.messages)
            assert isinstance(taker.messages[0].error, OSError) and taker.messages[0].path is None
            assert not _exists(_PART)
        finally:
            os.rmdir(_PATH)
        taker.gate.set()
        await rig.broker.publish("t", b"y", 1, 8)
        await rig.broker.expect("PUBACK 8")
        assert taker.contents == [None, b"y"]

    run(scenario)


def test_file_is_the_handlers_until_it_returns_and_messages_wait_for_it_in_bounds():
    async def scenario(rig):
        client = rig.client
        taker = Taker(client, hold=True)
        await rig.up()
        for n in range(1, 5):
            await rig.broker.publish("t", b"%d" % n * _LARGE, 1, n)
            if n == 1:
                await until(lambda: taker.messages)
        await until(lambda: client._blocked)  # the first is being handled, the second is in the part file
        await turns()
        assert _read() == b"1" * _LARGE and _read(_PART) == b"2" * _LARGE
        assert len(taker.messages) == 1 and not rig.broker.named("PUBACK")
        taker.gate.set()
        await rig.broker.expect("PUBACK 4")
        assert taker.contents == [b"%d" % n * _LARGE for n in range(1, 5)] and rig.broker.connections == 1

    run(scenario)


def test_qos_0_message_for_a_file_that_is_taken_is_discarded_and_counted():
    async def scenario(rig):
        taker = Taker(rig.client, hold=True)
        await rig.up()
        await rig.broker.publish("t", b"1" * _LARGE)
        await until(lambda: taker.messages)
        await rig.broker.publish("t", b"2" * _LARGE)
        await rig.broker.publish("t", b"3" * _LARGE)
        await until(lambda: rig.client.stats()["discarded"] == 1)
        taker.gate.set()
        await until(lambda: len(taker.contents) == 2)
        assert taker.contents == [b"1" * _LARGE, b"2" * _LARGE]

    run(scenario)


def test_handler_that_waits_for_the_broker_behind_a_taken_file_does_not_wait_for_ever():
    async def scenario(rig):
        client = rig.client
        got = []

        async def handler(message):
            got.append(_read())
            if len(got) == 1:
                await client.acknowledged(await client.publish("out", b"x", qos=1))

        client.on_file("t", _PATH, handler, 100000)
        await rig.up()
        for n in range(1, 5):
            await rig.broker.publish("t", b"%d" % n * _LARGE, 2, n)
        await rig.broker.expect("PUBLISH 1 x")
        await rig.broker.send(ack("PUBACK", 1))  # the client has it behind four messages
        await rig.broker.expect("PUBCOMP 2")
        await rig.up(2)
        for n in range(3, 5):  # those passed over
            await rig.broker.publish("t", b"%d" % n * _LARGE, 2, n, dup=True)
        await rig.broker.expect("PUBCOMP 4")
        assert got == [b"%d" % n * _LARGE for n in range(1, 5)]

    run(scenario, [(0, "PUBLISH", 0, "silent")], answer_ms=200)


def test_message_that_waits_for_its_handler_at_close_comes_again():
    async def scenario(rig):
        client = rig.client
        taker = Taker(client, hold=True)
        await rig.up()
        await rig.broker.publish("t", b"1" * _LARGE, 1, 1)
        await until(lambda: taker.messages)
        await rig.broker.publish("t", b"2" * _LARGE, 1, 2)
        await until(lambda: client._inbox)
        await client.close()
        assert not _exists(_PART)
        taker.gate.set()
        await client.start()
        await rig.up(2)
        for n in (1, 2):
            await rig.broker.publish("t", b"%d" % n * _LARGE, 1, n, dup=True)
        await rig.broker.expect("PUBACK 2")
        assert taker.contents == [b"1" * _LARGE, b"2" * _LARGE]

    run(scenario)


def test_part_that_a_power_cut_left_is_removed():
    async def scenario(rig):
        _write(b"half")
        _write(b"half", _PART)
        Taker(rig.client)
        assert not _exists(_PART) and _read() == b"half"

    run(scenario, start=False)


def test_handler_that_replaces_one_with_a_file_does_not_get_its_messages():
    async def scenario(rig):
        client = rig.client
        taker = Taker(client, "t", hold=True)
        await rig.up()
        await rig.broker.publish("t", b"1" * _LARGE, 1, 1)
        await until(lambda: taker.messages)
        await rig.broker.publish("t", b"2" * _LARGE, 1, 2)
        await until(lambda: client._inbox)
        got = []
        client.on("t", got.append)
        taker.gate.set()
        await rig.broker.publish("t", b"3", 1, 3)
        await rig.broker.expect("PUBACK 3")
        assert taker.contents == [b"1" * _LARGE, b"2" * _LARGE] and [m.payload for m in got] == [b"3"]

    run(scenario)


# Sending.


def test_file_is_published_whole_whatever_its_size():
    """[MQTT-2.3.1-5]"""
    async def scenario(rig):
        client = rig.client
        await rig.up()
        sizes = (0, 1, 110, 120, 767, 768, 769, 16370, _LARGE)
        for n, size in enumerate(sizes):
            data = _content(size, n)
            _write(data)
            for qos in (0, 1):
                assert await client.publish_file("out/ü", _PATH, qos=qos, retain=n % 2 == 1) is True
                await until(lambda: len(rig.broker.delivered) == 2 * n + qos + 1)
                assert rig.broker.delivered.pop() == ("out/ü", data, qos)
                rig.broker.delivered.append(None)
                sent = rig.broker.packets.pop()
                assert (sent.retain, sent.dup) == (n % 2 == 1, False) and (sent.packet_id > 65023) == (qos == 1)
        assert rig.broker.connections == 1 and not client.store.session.requests and client.store.waiting() == 0

    for version in (4, 5):
        run(scenario, version=version)


def test_file_with_a_topic_longer_than_the_buffer_is_published_whole():
    async def scenario(rig):
        _write(_content(3000))
        await rig.up()
        for topic in ("t" * 760, "t" * 2000):
            assert await rig.client.publish_file(topic, _PATH)
            assert rig.broker.delivered.pop() == (topic, _content(3000), 1)

    run(scenario)


def test_nothing_comes_between_the_pieces_of_a_file_and_all_the_rest_goes_on_around_it():
    async def scenario(rig):
        client = rig.client
        got = []
        client.on("#", got.append)
        await rig.up()
        _write(_content(_LARGE))
        sending = [asyncio.create_task(client.publish_file("f%d" % n, _PATH, qos=n % 2)) for n in range(4)]
        for n in range(1, 11):
            await client.publish("q2", "%d" % n, qos=2)
            await client.publish("q0", "%d" % n, qos=0)
            await rig.broker.publish("in", b"%d" % n, 1, n)
        for task in sending:
            assert await task is True
        assert await client.drain(20)
        await rig.broker.expect("PUBACK 10")
        await until(lambda: len([1 for topic, _, _ in rig.broker.delivered if topic == "q0"]) == 10)
        files = [(topic, payload == _content(_LARGE)) for topic, payload, _ in rig.broker.delivered if topic[0] == "f"]
        assert files == [("f%d" % n, True) for n in range(4)]
        assert len(got) == 10 and rig.broker.connections == 1

    run(scenario)


def test_flood_of_qos_0_does_not_keep_a_file_waiting():
    async def scenario(rig):
        client = rig.client
        await rig.up()
        _write(b"x" * 100)
        done = []

        async def flood():
            while not done:
                await client.publish("q0", b"y" * 300, qos=0)

        flooding = asyncio.create_task(flood())
        await turns(20)
        assert await client.publish_file("f", _PATH)
        done.append(True)
        await flooding

    run(scenario)


def test_file_at_qos_1_is_sent_again_with_dup_and_its_identifier_when_the_link_is_lost():
    """[MQTT-3.3.1-1] [MQTT-2.3.1-3]"""
    for what in ("lost", "unanswered"):

        async def scenario(rig):
            client = rig.client
            await rig.up()
            _write(_content(_LARGE))
            request = asyncio.create_task(client.subscribe("f", 1))  # draws from the same identifiers
            assert await client.publish_file("out", _PATH) is True
            assert await request == 1
            first, second, third = rig.broker.named("PUBLISH")
            assert [p.dup for p in (first, second, third)] == [False, True, True]
            assert first.packet_id == second.packet_id == third.packet_id
            assert third.payload == _content(_LARGE) and rig.broker.connections == 3
            assert first.packet_id not in [p.packet_id for p in rig.broker.named("SUBSCRIBE")]

        for version in (4, 5):
            run(scenario, [(1, "PUBLISH", 1, what), (2, "PUBLISH", 1, what)], version=version)


def test_file_at_qos_1_waits_for_what_was_sent_before_and_what_comes_behind_waits_for_it():
    """[MQTT-4.6.0-1]"""
    async def scenario(rig):
        client = rig.client
        await rig.up()
        _write(b"file")
        await client.publish("t", b"a", qos=1)
        await client.publish("t", b"b", qos=2)
        await rig.broker.expect("PUBLISH 2 b")
        sending = asyncio.create_task(client.publish_file("out", _PATH))
        await turns()
        await client.publish("t", b"c", qos=1)
        await client.publish("t", b"0", qos=0)
        await rig.broker.send(ack("PUBACK", 1))
        await rig.broker.expect("PUBLISH 0")
        assert rig.broker.trace() == ["CONNECT", "PUBLISH 1 a", "PUBLISH 2 b", "PUBLISH 0"]
        await rig.broker.send(ack("PUBREC", 2))
        await rig.broker.expect("PUBLISH 3 c")
        assert rig.broker.trace()[4:] == ["PUBREL 2", "PUBLISH 65024 file", "PUBLISH 3 c"]
        await rig.broker.drop()
        assert await sending is True
        assert await client.drain(20)
        assert rig.broker.trace(2) == ["CONNECT", "PUBLISH 65024 dup file", "PUBLISH 3 dup c"]

    run(scenario, [(1, "PUBLISH", 0, "silent")])


def test_file_behind_messages_that_are_sent_again_waits_for_them_on_the_next_connection():
    """[MQTT-4.6.0-1]"""
    async def scenario(rig):
        client = rig.client
        await rig.up()
        _write(b"file")
        for n in range(1, 4):
            await client.publish("t", b"%d" % n, qos=1)
        await rig.broker.expect("PUBLISH 3 3")
        sending = asyncio.create_task(client.publish_file("out", _PATH))
        await turns()
        await rig.broker.drop()
        assert await sending is True
        again = ["PUBLISH %d dup %d" % (n, n) for n in (1, 2, 3)]
        assert rig.broker.trace(2) == ["CONNECT"] + again + ["PUBLISH 65024 file"]

    run(scenario, [(1, "PUBLISH", 0, "silent")])


def test_file_at_qos_1_goes_as_new_to_a_broker_that_has_lost_the_session():
    async def scenario(rig):
        await rig.up()
        _write(b"x" * 3000)
        assert await rig.client.publish_file("out", _PATH) is True
        assert [p.dup for p in rig.broker.named("PUBLISH")] == [False, False]

    run(scenario, [(1, "PUBLISH", 1, "lost"), (2, "CONNECT", 1, "present 0")])


class Choked:
    """Has a client's stream stop taking bytes after so many, until told to go on."""

    def __init__(self, client, nbytes):
        self.stream = client._stream
        self.left = nbytes
        self.choked = asyncio.Event()
        self.released = asyncio.Event()
        self._drain = self.stream.drain
        self._write = self.stream.write
        self.stream.drain = self.drain
        self.stream.write = self.write

    def write(self, data):
        self.left -= len(data)
        self._write(data)

    async def drain(self):
        await self._drain()
        if self.left < 0:
            self.choked.set()
            await self.released.wait()


def test_link_lost_in_the_middle_of_a_file_has_it_sent_again_from_the_beginning():
    for nbytes in (0, 10, 5000):

        async def scenario(rig):
            client = rig.client
            await rig.up()
            _write(_content(_LARGE))
            choked = Choked(client, nbytes)
            sending = asyncio.create_task(client.publish_file("out", _PATH))
            await choked.choked.wait()
            await rig.broker.drop()
            assert await sending is True
            (sent,) = rig.broker.named("PUBLISH")
            assert sent.dup and sent.payload == _content(_LARGE) and rig.broker.connections == 2

        run(scenario)


def test_link_lost_in_the_middle_of_a_file_at_qos_0_discards_it():
    async def scenario(rig):
        client = rig.client
        await rig.up()
        _write(_content(_LARGE))
        choked = Choked(client, 5000)
        sending = asyncio.create_task(client.publish_file("out", _PATH, qos=0))
        await choked.choked.wait()
        await rig.broker.drop()
        assert await sending is False and client.stats()["discarded"] == 1
        await rig.up(2)
        assert await client.publish_file("out", _PATH, qos=0) is True
        await until(lambda: rig.broker.delivered)

    run(scenario)


class Dribbling:
    """Has a client's stream take a while for each piece."""

    def __init__(self, client, ms):
        self.drains = 0
        self._ms = ms
        self._drain = client._stream.drain
        client._stream.drain = self.drain

    async def drain(self):
        self.drains += 1
        await self._drain()
        await asyncio.sleep_ms(self._ms)


def test_slow_file_is_no_reason_to_drop_the_link():
    async def scenario(rig):
        client = rig.client
        client._pulse_ms = 20
        await rig.up()
        _write(_content(_LARGE))
        slow = Dribbling(client, 100)
        sending = asyncio.create_task(client.publish_file("out", _PATH))
        await until(lambda: slow.drains > 1)
        await client.publish("t", b"x", qos=1)  # with a message waiting the answers' deadline is the short one
        assert await sending is True  # after three times that
        assert await client.drain(20)
        assert rig.broker.connections == 1 and client.stats()["resent"] == 0

    run(scenario, answer_ms=900, keep_alive_s=1)


def test_link_that_takes_no_more_of_a_file_is_noticed_and_left():
    async def scenario(rig):
        client = rig.client
        client._pulse_ms = 20
        await rig.up()
        _write(_content(_LARGE))
        choked = Choked(client, 5000)
        sending = asyncio.create_task(client.publish_file("out", _PATH))
        await choked.choked.wait()
        assert await sending is True
        assert rig.broker.connections == 2 and rig.broker.delivered == [("out", _content(_LARGE), 1)]

    run(scenario, answer_ms=200, keep_alive_s=0)


def test_close_in_the_middle_of_a_file_ends_and_started_again_it_is_sent():
    async def scenario(rig):
        client = rig.client
        await rig.up()
        _write(_content(_LARGE))
        choked = Choked(client, 5000)
        sending = asyncio.create_task(client.publish_file("out", _PATH))
        await choked.choked.wait()
        await client.close()
        assert not rig.broker.named("DISCONNECT") and not sending.done()
        await client.start()
        assert await sending is True
        assert [(p.connection, p.dup) for p in rig.broker.named("PUBLISH")] == [(2, True)]

    run(scenario)


def test_file_published_offline_waits_at_qos_1_and_is_discarded_at_qos_0():
    async def scenario(rig):
        client = rig.client
        _write(_content(_LARGE))
        assert await client.publish_file("out", _PATH, qos=0) is False and client.stats()["discarded"] == 1
        sending = asyncio.create_task(client.publish_file("out", _PATH))
        await turns()
        assert not sending.done()
        await client.start()
        assert await sending is True
        assert rig.broker.delivered == [("out", _content(_LARGE), 1)] and not rig.broker.named("PUBLISH")[0].dup

    run(scenario, start=False)


def test_cancelled_in_the_middle_of_the_packet_the_connection_is_made_anew():
    async def scenario(rig):
        client = rig.client
        await rig.up()
        _write(_content(_LARGE))
        choked = Choked(client, 5000)
        sending = asyncio.create_task(client.publish_file("out", _PATH))
        await choked.choked.wait()
        sending.cancel()
        await raised(sending, asyncio.CancelledError)
        await rig.up(2)
        await client.publish("t", b"next", qos=1)
        assert await client.drain(20)
        assert rig.broker.trace(2)[1:] == ["PUBLISH 1 next"] and not client.store.session.requests

    run(scenario)


def test_cancelled_while_it_waits_nothing_is_left_of_it():
    async def scenario(rig):
        client = rig.client
        _write(_content(_LARGE))
        waiting = [asyncio.create_task(client.publish_file("out", _PATH)) for _ in range(2)]
        await turns()
        for task in waiting:
            task.cancel()
            await raised(task, asyncio.CancelledError)
        assert not client.store.session.requests
        await client.start()
        await rig.up()
        assert await client.publish_file("next", _PATH) is True
        assert [topic for topic, _, _ in rig.broker.delivered] == ["next"]

    run(scenario, start=False)


def test_identifier_of_a_cancelled_file_is_not_used_while_its_puback_may_come():
    async def scenario(rig):
        client = rig.client
        await rig.up()
        _write(b"x" * 2000)
        sending = asyncio.create_task(client.publish_file("out", _PATH))
        await until(lambda: rig.broker.delivered)
        sending.cancel()
        await raised(sending, asyncio.CancelledError)
        again = asyncio.create_task(client.publish_file("out", _PATH))
        await until(lambda: len(rig.broker.delivered) == 2)
        first, second = [p.packet_id for p in rig.broker.named("PUBLISH")]
        assert first != second
        await rig.broker.send(ack("PUBACK", first))
        await until(lambda: client.stats()["unknown_acks"] == 1)
        assert not again.done()
        await rig.broker.send(ack("PUBACK", second))
        assert await again is True and rig.broker.connections == 1

    run(scenario, [(1, "PUBLISH", 0, "silent")])


def test_file_that_shrinks_or_fails_ends_the_connection_and_is_an_os_error():
    for failing in (False, True):

        async def scenario(rig):
            client = rig.client
            await rig.up()
            _write(_content(_LARGE))
            if failing:
                with Failing(5000):
                    error = await raised(client.publish_file("out", _PATH), OSError)
                assert error.errno == 28
            else:
                choked = Choked(client, 800)
                sending = asyncio.create_task(client.publish_file("out", _PATH))
                await choked.choked.wait()
                _write(b"")
                choked.left = 1 << 30
                choked.released.set()
                error = await raised(sending, OSError)
                assert "shorter" in str(error)
            await rig.up(2)
            assert not rig.broker.named("PUBLISH") and not client.store.session.requests
            _write(b"next")
            assert await client.publish_file("out", _PATH) is True
            assert rig.broker.delivered == [("out", b"next", 1)]

        run(scenario)


def test_file_that_is_gone_when_it_is_to_be_sent_again_is_an_os_error_and_no_connection_is_lost():
    async def scenario(rig):
        client = rig.client
        _write(b"x")
        sending = asyncio.create_task(client.publish_file("out", _PATH))
        await turns()
        os.remove(_PATH)
        await client.start()
        assert (await raised(sending, OSError)).errno == 2
        await rig.up()
        assert rig.broker.connections == 1

    run(scenario, start=False)


def test_bad_arguments_are_errors_and_send_nothing():
    async def scenario(rig):
        client = rig.client
        await rig.up()
        _write(b"x")
        assert "at 2" in str(await raised(client.publish_file("t", _PATH, qos=2), ValueError))
        await raised(client.publish_file("t/#", _PATH), ValueError)
        await raised(client.publish_file("", _PATH), ValueError)
        assert (await raised(client.publish_file("t", "no.such.file"), OSError)).errno == 2
        for path in ("", None, 7):
            try:
                client.on_file("t", path, print, 1)
                raise AssertionError("path %r was taken" % (path,))
            except ValueError:
                pass
        try:
            client.on_file("t/#/", _PATH, print, 1)
            raise AssertionError("a bad filter was taken")
        except ValueError:
            pass
        session = client.store.session
        session.requests.update(range(65024, 65536))
        await raised(client.publish_file("t", _PATH), JournalFull)
        session.requests.clear()
        assert await client.publish_file("t", _PATH) is True
        assert rig.broker.trace() == ["CONNECT", "PUBLISH 65024 x"]

    run(scenario)


def test_answer_that_does_not_belong_to_a_file_is_a_protocol_error_and_it_is_sent_again():
    for answer in ("PUBREC", "PUBCOMP"):

        async def scenario(rig):
            await rig.up()
            _write(b"x" * 3000)
            assert await rig.client.publish_file("out", _PATH) is True
            assert rig.client.stats()["protocol_errors"] == 1 and rig.broker.connections == 2
            assert isinstance(rig.client.last_error, ProtocolError)

        run(scenario, [(1, "PUBLISH", 1, ack(answer, 65024))])


def test_puback_before_the_file_is_out_is_a_protocol_error_and_it_is_sent_again():
    async def scenario(rig):
        client = rig.client
        await rig.up()
        _write(_content(_LARGE))
        choked = Choked(client, 5000)
        sending = asyncio.create_task(client.publish_file("out", _PATH))
        await choked.choked.wait()
        await rig.broker.send(ack("PUBACK", 65024))
        assert await sending is True
        assert client.stats()["protocol_errors"] == 1 and rig.broker.delivered == [("out", _content(_LARGE), 1)]

    run(scenario)


def test_pubrel_with_the_identifier_of_a_file_is_the_brokers_own():
    async def scenario(rig):
        client = rig.client
        await rig.up()
        _write(b"x")
        sending = asyncio.create_task(client.publish_file("out", _PATH))
        await until(lambda: rig.broker.delivered)
        await rig.broker.send(ack("PUBREL", 65024))
        await rig.broker.expect("PUBCOMP 65024")
        assert not sending.done()
        await rig.broker.send(ack("PUBACK", 65024))
        assert await sending is True

    run(scenario, [(1, "PUBLISH", 1, "silent")])


def test_link_that_swallows_a_file_is_noticed_and_left():
    async def scenario(rig):
        _write(b"x" * 3000)
        await rig.up()
        assert await rig.client.publish_file("out", _PATH) is True
        assert rig.broker.connections == 2

    run(scenario, [(1, "PUBLISH", 0, "silent"), (1, "PINGREQ", 0, "silent")], answer_ms=200, keep_alive_s=0)


def test_file_that_the_broker_does_not_take_is_a_value_error_and_not_sent():
    """[MQTT5-3.2.2-11] [MQTT5-3.2.2-14] [MQTT5-3.2.2-15]"""
    for says, qos, retain in (
        ({"maximum_packet_size": 1008}, 1, False),
        ({"maximum_packet_size": 1006}, 0, False),
        ({"maximum_qos": 0}, 1, False),
        ({"retain_available": 0}, 0, True),
    ):

        async def scenario(rig):
            _write(_content(1000))
            await rig.up()
            await raised(rig.client.publish_file("t", _PATH, qos, retain), ValueError)
            _write(_content(999))
            if "maximum_packet_size" in says:
                assert await rig.client.publish_file("t", _PATH, qos, retain)
                await until(lambda: [len(p.payload) for p in rig.broker.named("PUBLISH")] == [999], "the smaller file")
            else:
                assert not rig.broker.named("PUBLISH")
            assert rig.broker.connections == 1

        run(scenario, version=5, says={"CONNACK": says})


def test_file_counts_against_the_receive_maximum_until_its_puback_also_when_cancelled():
    """[MQTT5-3.3.4-7]"""
    async def scenario(rig):
        for cancelled in (False, True):
            _write(b"file")
            await rig.up()
            before = len(rig.broker.named("PUBLISH"))
            upload = asyncio.create_task(rig.client.publish_file("t", _PATH))
            await until(lambda: len(rig.broker.named("PUBLISH")) > before)
            if cancelled:
                await turns()
                upload.cancel()
            for n in range(3):
                await rig.client.publish("m", "%d" % n)
            await turns(200)
            came = rig.broker.named("PUBLISH")[before:]
            assert [p.payload for p in came] == [b"file", b"0"], came
            await rig.broker.send(ack("PUBACK", came[0].packet_id))
            await until(lambda: len(rig.broker.named("PUBLISH")) == before + 3)
            for n in (1, 2, 3):
                await rig.broker.send(ack("PUBACK", rig.broker.named("PUBLISH")[before + n].packet_id))
                await until(lambda: len(rig.broker.named("PUBLISH")) >= min(before + n + 3, before + 4))
            assert await rig.client.drain(10)

    run(scenario, ((0, "PUBLISH", 0, "silent"),), version=5, says={"CONNACK": {"receive_maximum": 2}})
