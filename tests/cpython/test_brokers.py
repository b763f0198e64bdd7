"""tools/brokers.py and tools/proxy.py do what the other tests and the demo build on, with paho-mqtt as the device."""

import contextlib
import queue
import socket

import brokers
import paho.mqtt.client as paho
import proxy as proxies
from brokers import BrokerError, Mosquitto
from packet_types import CONNACK, CONNECT, PINGRESP, PUBACK, PUBLISH, PUBREC, PUBREL, SUBSCRIBE
from proxy import DOWN, UP, PacketScanner, Proxy

PATIENCE_S = 60


class Device:
    """A paho client whose events come out of queues."""

    def __init__(self, client_id, port, clean=True, user=None):
        self.connects = queue.Queue()  # (session present, reason)
        self.disconnects = queue.Queue()
        self.messages = queue.Queue()
        self.subscribed = queue.Queue()
        self.client = paho.Client(paho.CallbackAPIVersion.VERSION2, client_id, clean_session=clean)
        self.client.on_connect = lambda c, u, flags, reason, p: self.connects.put((flags.session_present, reason))
        self.client.on_disconnect = lambda c, u, flags, reason, p: self.disconnects.put(reason)
        self.client.on_message = lambda c, u, message: self.messages.put(message)
        self.client.on_subscribe = lambda c, u, mid, codes, p: self.subscribed.put(mid)
        self.client.reconnect_delay_set(1, 1)
        if user:
            self.client.username_pw_set(*user)
        self.client.connect("127.0.0.1", port)
        self.client.loop_start()

    def connected(self):
        return self.connects.get(timeout=PATIENCE_S)

    def subscribe(self, topic_filter, qos):
        self.client.subscribe(topic_filter, qos)
        self.subscribed.get(timeout=PATIENCE_S)

    def payload(self):
        return self.messages.get(timeout=PATIENCE_S).payload

    def publish(self, topic, payload, qos):
        self.client.publish(topic, payload, qos).wait_for_publish(PATIENCE_S)

    def close(self):
        self.client.disconnect()
        self.client.loop_stop()


def device(*args, **kwargs):
    return contextlib.closing(Device(*args, **kwargs))


class Peer:
    """A listener whose connections come out of a queue: the far side where the exact bytes matter."""

    def __init__(self):
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]

    def accept(self):
        self.listener.settimeout(PATIENCE_S)
        connection, _ = self.listener.accept()
        connection.settimeout(PATIENCE_S)
        return connection

    def close(self):
        self.listener.close()


def dial(port):
    return socket.create_connection(("127.0.0.1", port), PATIENCE_S)


def read_all(sock):
    """All bytes up to the end of the connection, and how it ended."""
    data = b""
    while True:
        try:
            piece = sock.recv(65536)
        except ConnectionResetError:
            return data, "reset"
        if not piece:
            return data, "end"
        data += piece


def read_exactly(sock, n):
    data = b""
    while len(data) < n:
        piece = sock.recv(n - len(data))
        assert piece, "ended after %d of %d bytes" % (len(data), n)
        data += piece
    return data


@contextlib.contextmanager
def line():
    """(proxy, device's socket, broker's socket), connected through the proxy."""
    with contextlib.closing(Peer()) as peer, Proxy(peer.port) as proxy:
        with dial(proxy.port) as near, peer.accept() as far:
            yield proxy, near, far


def publish(payload):
    return bytes([0x30, 3 + len(payload), 0, 1]) + b"t" + payload


# The broker.


def test_broker_delivers_to_a_subscriber():
    with Mosquitto() as broker, device("a", broker.port) as a:
        assert a.connected() == (False, "Success")
        a.subscribe("t/#", 2)
        a.publish("t/1", b"x", 2)
        assert a.payload() == b"x"


def test_broker_is_gone_after_close():
    broker = Mosquitto()
    with broker:
        directory = broker.directory
        assert broker.alive
    assert not broker.alive and not brokers.os.path.exists(directory)
    with contextlib.suppress(ConnectionRefusedError):
        dial(broker.port)
        raise AssertionError("it still accepts connections")


def _queued_message_survives(broker, end):
    with device("keeper", broker.port, clean=False) as keeper:
        keeper.connected()
        keeper.subscribe("t", 2)
    with device("sender", broker.port) as sender:
        sender.connected()
        sender.publish("t", b"kept", 2)
    port = broker.port
    end()
    assert not broker.alive
    broker.start()
    assert (broker.port, broker.starts) == (port, 2)
    with device("keeper", broker.port, clean=False) as keeper:
        assert keeper.connected()[0], "the session is gone"
        assert keeper.payload() == b"kept"


def test_broker_keeps_sessions_over_a_restart():
    with Mosquitto() as broker:
        _queued_message_survives(broker, broker.stop)


def test_broker_keeps_over_a_kill_what_it_has_saved():
    with Mosquitto() as broker:

        def save_and_kill():
            broker.save()
            broker.kill()

        _queued_message_survives(broker, save_and_kill)


def test_restart_brings_clients_back():
    with Mosquitto() as broker, device("a", broker.port) as a:
        a.connected()
        broker.restart()
        a.disconnects.get(timeout=PATIENCE_S)
        assert a.connected()[1] == "Success"


def test_broker_with_users_refuses_others():
    with Mosquitto(users={"plant7": "secret"}) as broker:
        with device("good", broker.port, user=("plant7", "secret")) as good:
            assert good.connected()[1] == "Success"
        with device("bad", broker.port, user=("plant7", "wrong")) as bad:
            assert bad.connected()[1] == "Not authorized"
        with device("anonymous", broker.port) as anonymous:
            assert anonymous.connected()[1] == "Not authorized"


def test_options_and_lines_reach_the_broker():
    with Mosquitto(max_packet_size=100, lines=["# a comment"]) as broker, device("a", broker.port) as a:
        a.connected()
        a.client.publish("t", b"x" * 200, 1)
        a.disconnects.get(timeout=PATIENCE_S)


def test_log_is_captured():
    with Mosquitto() as broker, device("plant7", broker.port) as a:
        a.connected()
        assert "CONNACK" in broker.wait_log("CONNACK to plant7")
        try:
            broker.wait_log("no such line", timeout_s=0)
        except BrokerError as e:
            assert "no such line" in str(e)
        else:
            raise AssertionError("a line was found that is not there")


def _start_error(broker):
    """The one line that start() fails with."""
    try:
        with broker:
            raise AssertionError("it started")
    except BrokerError as e:
        assert "\n" not in str(e)
        return str(e)


def test_missing_mosquitto_is_one_line_that_says_what_to_install():
    path, sbin = brokers.os.environ["PATH"], brokers._SBIN
    try:
        brokers.os.environ["PATH"], brokers._SBIN = "/nowhere", ""
        assert "apt-get install mosquitto" in _start_error(Mosquitto())
    finally:
        brokers.os.environ["PATH"], brokers._SBIN = path, sbin
    assert "/nowhere/mosquitto" in _start_error(Mosquitto(program="/nowhere/mosquitto"))


def test_bad_option_is_one_line_with_the_brokers_own_words():
    assert "no_such_option" in _start_error(Mosquitto(no_such_option=1))


def test_taken_port_is_chosen_anew_unless_it_was_given():
    with contextlib.closing(Peer()) as taken:
        assert "port %d" % taken.port in _start_error(Mosquitto(taken.port))
        ports = [taken.port, taken.port]
        free = brokers.free_port
        try:
            brokers.free_port = lambda: ports.pop() if ports else free()
            with Mosquitto() as broker:
                assert not ports and broker.port != taken.port and broker.starts == 1
        finally:
            brokers.free_port = free


# The proxy, byte by byte.


def test_proxy_forwards_both_ways_and_passes_the_end_on():
    with line() as (proxy, near, far):
        near.sendall(publish(b"up"))
        assert read_exactly(far, 7) == publish(b"up")
        far.sendall(publish(b"down!"))
        assert read_exactly(near, 10) == publish(b"down!")
        near.shutdown(socket.SHUT_WR)
        assert read_all(far) == (b"", "end")
        far.sendall(b"\xd0\x00")
        far.close()
        assert read_all(near) == (b"\xd0\x00", "end")
        proxy.wait(lambda c: c["closed_by_broker"] and c["closed_by_device"])
        counters = proxy.counters()
        assert counters["connections"] == 1 and counters["cuts"] == 0
        assert (counters[UP, "bytes"], counters[DOWN, "bytes"]) == (7, 12)
        assert (counters[UP, PUBLISH], counters[DOWN, PINGRESP]) == (1, 1)


def test_proxy_passes_a_reset_on():
    with line() as (proxy, near, far):
        far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, proxies.struct.pack("ii", 1, 0))
        far.close()
        assert read_all(near) == (b"", "reset")


def test_cut_resets_both_ends():
    with line() as (proxy, near, far):
        assert proxy.open_links == 1
        assert proxy.cut() == 1
        assert read_all(near) == read_all(far) == (b"", "reset")
        assert proxy.open_links == 0 and proxy.counters()["cuts"] == 1


def test_cut_without_reset_ends_both_ends():
    with line() as (proxy, near, far):
        assert proxy.cut(reset=False) == 1
        assert read_all(near) == read_all(far) == (b"", "end")
        assert proxy.cut() == 0


def test_refuse_until_accept():
    with line() as (proxy, near, far):
        for _ in range(3):
            proxy.refuse()
            proxy.refuse()
            try:
                dial(proxy.port).close()
            except ConnectionRefusedError:
                pass
            else:
                raise AssertionError("not refused")
            proxy.accept()
            proxy.accept()
            dial(proxy.port).close()
        near.sendall(b"\xc0\x00")
        assert read_exactly(far, 2) == b"\xc0\x00"


def test_target_that_is_down_resets_the_device():
    with contextlib.closing(Peer()) as peer, contextlib.closing(Peer()) as other:
        with Proxy(peer.port) as proxy:
            peer.close()
            try:
                with dial(proxy.port) as near:
                    assert read_all(near) == (b"", "reset")
            except ConnectionResetError:
                pass  # as early as in connect()
            assert proxy.counters()["refused_by_target"] == 1
            proxy.target = other.port
            with dial(proxy.port) as near, other.accept() as far:
                near.sendall(b"\xc0\x00")
                assert read_exactly(far, 2) == b"\xc0\x00"


def test_swallowed_connections_stay_up_and_silent():
    with line() as (proxy, near, far):
        proxy.swallow()
        near.sendall(b"12345")
        far.sendall(b"123")
        with dial(proxy.port) as late:
            late.sendall(b"12")
            proxy.wait(lambda c: c["swallowed_bytes"] == 10)
            counters = proxy.counters()
            assert counters["connections"] == 2 and counters[UP, "bytes"] == counters[DOWN, "bytes"] == 0
            proxy.accept()
            near.sendall(b"1")
            proxy.wait(lambda c: c["swallowed_bytes"] == 11)
            # The far end does not hear that the device gave up.
            near.close()
            proxy.wait(lambda c: c["closed_by_device"] == 1)
            assert proxy.open_links == 2
            assert proxy.cut() == 2
            assert read_all(far) == read_all(late) == (b"", "reset")


def test_cut_after_lets_exactly_so_many_bytes_through():
    for n in (0, 1, 4, 5):
        for reset, ending in ((True, "reset"), (False, "end")):
            with line() as (proxy, near, far):
                cut = proxy.cut_after(DOWN, n, reset=reset)
                near.sendall(b"\xc0\x00")
                assert read_exactly(far, 2) == b"\xc0\x00" and not cut.fired
                far.sendall(b"\x30\x03\x00\x01t")
                cut.wait()
                assert read_all(near) == (b"\x30\x03\x00\x01t"[:n], "end")
                near.close()
                assert read_all(far) == (b"", ending)
                assert proxy.counters()[DOWN, "bytes"] == n


def test_cut_at_packet_before_inside_and_after():
    stream = publish(b"1") + b"\xc0\x00" + publish(b"2") + publish(b"3")
    for nth, when, passed in (
        (1, "before", 0),
        (1, "inside", 1),
        (1, "after", 6),
        (2, "before", 8),
        (2, "inside", 9),
        (2, "after", 14),
    ):
        for direction in (UP, DOWN):
            for split in (1, 3, len(stream)):
                with line() as (proxy, near, far):
                    source, sink = (near, far) if direction == UP else (far, near)
                    cut = proxy.cut_at_packet(direction, PUBLISH, nth, when)
                    other = proxy.cut_at_packet(DOWN if direction == UP else UP, PUBLISH)
                    source.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    where = (nth, when, direction, split)
                    # The system tells of a reset once: at whichever call comes first.
                    ending = None
                    try:
                        for pos in range(0, len(stream), split):
                            source.sendall(stream[pos : pos + split])
                    except ConnectionError:
                        ending = b"", "reset"
                    cut.wait()
                    assert read_all(sink) == (stream[:passed], "end"), where
                    assert (ending or read_all(source)) == (b"", "reset"), where
                    assert not other.fired, where


def test_cuts_count_over_connections_and_can_be_cancelled():
    with contextlib.closing(Peer()) as peer, Proxy(peer.port) as proxy:
        cut = proxy.cut_at_packet(UP, PUBLISH, 2, "after")
        for number in (1, 2):
            with dial(proxy.port) as near, peer.accept() as far:
                near.sendall(publish(b"x"))
                assert read_exactly(far, 6) == publish(b"x")
                if number == 1:
                    assert not cut.fired
                else:
                    cut.wait()
        forgotten = proxy.cut_after(UP, 1)
        proxy.cancel_cuts()
        with dial(proxy.port) as near, peer.accept() as far:
            near.sendall(publish(b"x"))
            assert read_exactly(far, 6) == publish(b"x")
        assert not forgotten.fired


def test_bad_orders_are_refused():
    with Proxy(1) as proxy:
        for order in (
            lambda: proxy.cut_after("left", 1),
            lambda: proxy.cut_after(UP, -1),
            lambda: proxy.cut_at_packet(UP, PUBACK, nth=0),
            lambda: proxy.cut_at_packet(UP, PUBACK, when="during"),
        ):
            try:
                order()
            except ValueError:
                pass
            else:
                raise AssertionError("not refused")


def test_wait_gives_up():
    with Proxy(1) as proxy:
        for wait in (lambda: proxy.wait(lambda c: c["cuts"], 0), lambda: proxy.cut_after(UP, 1).wait(0)):
            try:
                wait()
            except TimeoutError:
                pass
            else:
                raise AssertionError("it did not give up")


def test_scanner_finds_the_same_packets_in_any_split():
    bodies = (b"", b"x", b"y" * 127, b"z" * 128, b"w" * 20000)
    lengths = (b"\x00", b"\x01", b"\x7f", b"\x80\x01", b"\xa0\x9c\x01")
    stream = b"".join(bytes([(i + 1) << 4]) + lengths[i] + bodies[i] for i in range(5))
    for split in (1, 2, 3, 7, 130, 4096, len(stream)):
        scanner, types, ends = PacketScanner(), [], []
        for start in range(0, len(stream), split):
            data, pos = stream[start : start + split], 0
            while pos < len(data):
                pos = scanner.step(data, pos, len(data))
                if scanner.complete:
                    types.append(scanner.packet_type)
                    ends.append(start + pos)
                    scanner.next_packet()
        assert types == [1, 2, 3, 4, 5], split
        assert ends == [2, 5, 134, 265, 20269], split


def test_what_is_no_mqtt_is_forwarded_all_the_same():
    with line() as (proxy, near, far):
        near.sendall(b"\xff" * 1000)
        assert read_exactly(far, 1000) == b"\xff" * 1000


# The proxy between paho and mosquitto.


def test_messages_come_through_in_single_bytes_and_late():
    seen = []
    with Mosquitto() as broker, Proxy(broker.port, on_packet=lambda *row: seen.append(row)) as proxy:
        proxy.chunk(1)
        proxy.delay(1)
        with device("a", proxy.port) as a:
            a.connected()
            a.subscribe("t", 2)
            a.publish("t", b"x" * 300, 2)
            assert a.payload() == b"x" * 300
            counters = proxy.counters()
            for packet_type in (CONNECT, SUBSCRIBE, PUBLISH, PUBREL):
                assert counters[UP, packet_type] == 1, packet_type
        assert [(d, p[0] >> 4) for d, p in seen[:2]] == [(UP, CONNECT), (DOWN, CONNACK)]
        assert seen[0][1][4:8] == b"MQTT"


def test_message_is_delivered_once_when_its_pubrec_is_lost():
    with Mosquitto() as broker, Proxy(broker.port) as proxy, device("far", broker.port) as far:
        far.connected()
        far.subscribe("t", 2)
        cut = proxy.cut_at_packet(DOWN, PUBREC, when="before")
        with device("near", proxy.port, clean=False) as near:
            near.connected()
            near.publish("t", b"once", 2)
            cut.wait()
            assert near.connected()[0]
            near.publish("t", b"last", 2)
        assert [far.payload(), far.payload()] == [b"once", b"last"]
        assert proxy.counters()[UP, PUBLISH] == 3


def test_packet_cut_after_it_reaches_the_broker():
    with Mosquitto() as broker, Proxy(broker.port) as proxy, device("far", broker.port) as far:
        far.connected()
        far.subscribe("t", 0)
        cut = proxy.cut_at_packet(UP, PUBLISH, when="after")
        with device("near", proxy.port) as near:
            near.connected()
            near.client.publish("t", b"x", 0)
            cut.wait()
            assert far.payload() == b"x"


def test_proxy_serves_many_connections_at_once():
    with contextlib.closing(Peer()) as peer, Proxy(peer.port) as proxy, contextlib.ExitStack() as stack:
        nears = [stack.enter_context(dial(proxy.port)) for _ in range(20)]
        fars = [stack.enter_context(peer.accept()) for _ in range(20)]
        for i, near in enumerate(nears):
            near.sendall(bytes([0xC0 + i % 16, 0]) * 1000)
        sizes = [len(read_exactly(far, 2000)) for far in fars]
        assert sizes == [2000] * 20
        assert proxy.cut() == 20
        assert all(read_all(s)[1] == "reset" for s in nears + fars)
