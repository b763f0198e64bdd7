"""TLS between the client and a real mosquitto, with a certification authority made for the test.

The client runs on MicroPython's unix port, whose TLS is the boards' own: mbedtls under modtls_mbedtls.c.  CPython's ssl
is another library with other errors and no handshake inside read() and write(): a bridge to it would be what is tested.
"""

import contextlib
import json
import queue
import re
import socket
import ssl
import threading
from pathlib import Path

import paho.mqtt.client as paho
import pytest
from brokers import Mosquitto
from certs import Authority
from proxy import DOWN, UP, Proxy
from upydevice import PATIENCE_S, UpyDevice


# Says each failure and each pause; play(client), in front of it, is the test's own part.
DEVICE = """
import asyncio, json, sys
import host
host.install()
from mqtt_durable import Client, ConfigError, config

with open("device.json") as file:
    settings = json.load(file)

def watched(client):
    failed, pause_ms = client._failed, client._pause_ms

    def fail(error):
        failed(error)
        print("failed: %s: %s" % (type(error).__name__, error))

    def pause():
        ms = pause_ms()
        print("pause:", ms)
        return ms

    client._failed, client._pause_ms = fail, pause

async def until(condition):
    while not condition():
        await asyncio.sleep_ms(1)

async def main():
    try:
        client = Client(config.complete(settings["config"]), **settings["options"])
    except ConfigError as error:
        for line in error.problems:
            print("config:", line)
        return
    watched(client)
    async with client:
        await play(client)

asyncio.run(main())
"""

SENDS = """
async def play(client):
    await client.publish("out", "hello", qos=2)
    await client.drain()
    print("sent")
"""

# As long as the event loop goes on it says so.
WAITS = """
async def play(client):
    while True:
        await asyncio.sleep_ms(5)
        print("tick")
"""


class Device(UpyDevice):
    """The client on MicroPython, its files in directory; tls: the configuration's section."""

    def __init__(self, directory, port, tls, play, **options):
        options.setdefault("backoff_ms", (20, 200))
        broker = {"host": "127.0.0.1", "port": port, "tls": tls}
        configuration = {"wifi": None, "broker": broker, "client_id": "p7", "journal": {"home": "ram"}}
        super().__init__(directory, play + DEVICE, {"config": configuration, "options": options}, "64m")

    def failures(self, n):
        """The texts of the next n failures; each followed by a pause that is longer than the one before."""
        texts, limit_ms = [], 20
        for _ in range(n):
            texts.append(self.line("failed:"))
            assert limit_ms // 2 <= int(self.line("pause:")) <= limit_ms, self.lines
            limit_ms = min(200, 2 * limit_ms)
        return texts


@pytest.fixture(scope="module")
def ca(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("ca"))


def listener(certificate, **more):
    """Options of mosquitto's TLS listener."""
    return dict(certfile=certificate[0], keyfile=certificate[1], **more)


@contextlib.contextmanager
def listening(port, topic):
    """A paho client over plain TCP; yields it and the queue of the payloads it gets."""
    arrived, ready = queue.Queue(), queue.Queue()
    client = paho.Client(paho.CallbackAPIVersion.VERSION2, "far")
    client.on_message = lambda _client, _userdata, message: arrived.put(message.payload)
    client.on_subscribe = lambda *_: ready.put(True)
    client.connect("127.0.0.1", port)
    client.loop_start()
    try:
        client.subscribe(topic, 2)
        ready.get(timeout=PATIENCE_S)
        yield client, arrived
    finally:
        client.disconnect()
        client.loop_stop()


def assert_refused(device, *texts, n=4):
    """Every attempt fails with an error that says all of this, after pauses that grow."""
    for failure in device.failures(n):
        assert failure.startswith("TLSError: "), failure
        for text in texts:
            assert text in failure, failure
    assert "Traceback" not in "\n".join(device.lines)


def test_broker_whose_certificate_the_ca_has_signed_is_connected_to(tmp_path, ca):
    for name, file, certificate in (
        ("PEM", ca.pem, ca.issue("ec")),
        ("DER", ca.der, ca.issue("ec")),
        ("an RSA key", ca.pem, ca.issue("rsa", use_rsa=True)),
    ):
        with Mosquitto(tls=listener(certificate)) as broker, listening(broker.port, "out") as (_, arrived):
            with Device(tmp_path, broker.tls_port, {"ca": file}, SENDS) as device:
                device.line("sent")
                assert arrived.get(timeout=PATIENCE_S) == b"hello", name
                assert device.lines == ["sent"], name


def test_one_of_several_cas_is_enough(tmp_path, ca):
    both = tmp_path / "both.pem"
    both.write_text(Path(Authority(tmp_path, "other").pem).read_text() + "# the right one\n" + Path(ca.pem).read_text())
    with Mosquitto(tls=listener(ca.issue("broker"))) as broker:
        with Device(tmp_path, broker.tls_port, {"ca": str(both)}, SENDS) as device:
            device.line("sent")


def test_certificate_of_another_ca_is_refused(tmp_path, ca):
    other = Authority(tmp_path, "other")
    with Mosquitto(tls=listener(ca.issue("broker"))) as broker:
        with Device(tmp_path, broker.tls_port, {"ca": other.pem}, WAITS) as device:
            assert_refused(device, "not correctly signed by the trusted CA")


def test_certificate_of_another_name_is_refused_and_server_hostname_says_which_is_expected(tmp_path, ca):
    with Mosquitto(tls=listener(ca.issue("broker", names=["broker.test"]))) as broker:
        with Device(tmp_path, broker.tls_port, {"ca": ca.pem}, WAITS) as device:
            assert_refused(device, '"127.0.0.1"', "does not match")
        with Device(tmp_path, broker.tls_port, {"ca": ca.pem, "server_hostname": "other.test"}, WAITS) as device:
            assert_refused(device, '"other.test"', "does not match")
        with Device(tmp_path, broker.tls_port, {"ca": ca.pem, "server_hostname": "broker.test"}, SENDS) as device:
            device.line("sent")


def test_certificate_that_is_over_or_has_not_begun_is_refused_with_the_date(tmp_path, ca):
    for from_day, to_day, text in ((-10, -5, "expired"), (5, 10, "starts in the future")):
        with Mosquitto(tls=listener(ca.issue("broker", from_day=from_day, to_day=to_day))) as broker:
            with Device(tmp_path, broker.tls_port, {"ca": ca.pem}, WAITS) as device:
                assert_refused(device, text)
                failure = [line for line in device.lines if line.startswith("failed")][0]
                assert re.search(r" on 20\d\d-\d\d-\d\d: ", failure), failure


def test_client_certificate(tmp_path, ca):
    other = Authority(tmp_path, "other")
    tls = listener(ca.issue("broker"), cafile=ca.pem, require_certificate=True)
    with Mosquitto(tls=tls) as broker:
        for name, certificate in (
            ("EC, PEM", ca.issue("client")),
            ("EC, DER", ca.issue("client", encoding="der")),
            ("RSA, PEM", ca.issue("client", use_rsa=True)),
            ("RSA, DER", ca.issue("client", use_rsa=True, encoding="der")),
        ):
            own = {"ca": ca.pem, "cert": certificate[0], "key": certificate[1]}
            with Device(tmp_path, broker.tls_port, own, SENDS) as device:
                device.line("sent")
                assert device.lines == ["sent"], name
        with Device(tmp_path, broker.tls_port, {"ca": ca.pem}, WAITS) as device:
            assert_refused(device, "client certificate")
        foreign = other.issue("foreign")
        foreign = {"ca": ca.pem, "cert": foreign[0], "key": foreign[1]}
        with Device(tmp_path, broker.tls_port, foreign, WAITS) as device:
            assert_refused(device, "client certificate")


def test_unverified_any_certificate_will_do(tmp_path, ca):
    bad = ca.issue("broker", names=["other.test"], from_day=-10, to_day=-5)
    with Mosquitto(tls=listener(bad)) as broker:
        with Device(tmp_path, broker.tls_port, {"verify": False}, SENDS) as device:
            device.line("sent")


def test_file_that_holds_no_certificate_is_one_line_at_the_start(tmp_path, ca):
    cert, key = ca.issue("client")
    rubbish = tmp_path / "rubbish"
    rubbish.write_bytes(b"rubbish" * 30)
    broken = tmp_path / "broken.pem"
    broken.write_text(Path(ca.pem).read_text().replace("M", "", 3))
    for key_, tls in (
        ("ca", {"ca": str(rubbish)}),
        ("ca", {"ca": str(broken)}),
        ("ca", {"ca": key}),
        ("ca", {"ca": "nowhere.pem"}),
        ("cert", {"ca": ca.pem, "cert": key, "key": key}),
        ("cert", {"ca": ca.pem, "cert": str(rubbish), "key": key}),
        ("key", {"ca": ca.pem, "cert": cert, "key": cert}),
        ("key", {"ca": ca.pem, "cert": cert, "key": str(rubbish)}),
    ):
        with Device(tmp_path, 1, tls, WAITS) as device:
            said = device.line("config:")
            assert said.startswith("broker.tls.%s: %s " % (key_, tls[key_])), said
            assert len(device.lines) == 1


def test_port_without_tls_is_named(tmp_path, ca):
    with Mosquitto() as broker, Device(tmp_path, broker.port, {"ca": ca.pem}, WAITS) as device:
        assert_refused(device, "is the port its TLS port")


def test_answer_that_is_no_tls_is_named_and_no_socket_stays_open(tmp_path, ca):
    with socket.create_server(("127.0.0.1", 0)) as server:
        closed = queue.Queue()

        def answer():
            for _ in range(4):
                with server.accept()[0] as peer, contextlib.suppress(ConnectionResetError):
                    peer.recv(1)
                    peer.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                    while peer.recv(1000):
                        pass
                closed.put(True)

        threading.Thread(target=answer, daemon=True).start()
        with Device(tmp_path, server.getsockname()[1], {"ca": ca.pem}, WAITS) as device:
            assert_refused(device, "is the port its TLS port")
            for _ in range(3):
                closed.get(timeout=PATIENCE_S)


def test_port_where_nobody_listens_is_the_networks_own_error(tmp_path, ca):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with Device(tmp_path, unused.getsockname()[1], {"ca": ca.pem}, WAITS) as device:
            for failure in device.failures(3):
                assert "ECONNREFUSED" in failure or "111" in failure


def test_handshake_that_is_never_answered_blocks_nothing(tmp_path, ca):
    with socket.create_server(("127.0.0.1", 0)) as server:
        with Device(tmp_path, server.getsockname()[1], {"ca": ca.pem}, WAITS, answer_ms=3600000) as device:
            with server.accept()[0] as peer:
                assert peer.recv(1) == b"\x16"  # the ClientHello
                for _ in range(100):
                    device.line("tick")


def test_handshake_that_is_never_answered_ends_by_its_deadline(tmp_path, ca):
    with socket.create_server(("127.0.0.1", 0)) as server:
        with Device(tmp_path, server.getsockname()[1], {"ca": ca.pem}, WAITS, answer_ms=100) as device:
            for _ in range(2):
                with server.accept()[0] as peer:
                    assert peer.recv(1) == b"\x16"
                    assert "no CONNACK within 100 ms" in device.line("failed:")
                    while peer.recv(1000):  # it hangs up
                        pass


UNSET_CLOCK = """
import sys
import mqtt_durable.tls as tls

class ntptime:
    asked = 0

    @classmethod
    def settime(cls):
        cls.asked += 1
        if cls.asked < 3:
            raise OSError(110)
        tls._year = year

year = tls._year
tls._year = lambda: 2021
sys.modules["ntptime"] = ntptime
"""


def test_clock_is_set_before_the_handshake_and_asked_for_until_there_is_an_answer(tmp_path, ca):
    with Mosquitto(tls=listener(ca.issue("broker"))) as broker:
        with Device(tmp_path, broker.tls_port, {"ca": ca.pem}, UNSET_CLOCK + SENDS) as device:
            for failure in device.failures(2):
                assert failure.startswith("TLSError: the clock is not set: it says 2021"), failure
            device.line("sent")


def test_handshake_in_single_bytes(tmp_path, ca):
    with Mosquitto(tls=listener(ca.issue("broker"))) as broker, Proxy(broker.tls_port) as link:
        link.chunk(1)
        with Device(tmp_path, link.port, {"ca": ca.pem}, SENDS) as device:
            device.line("sent")
            assert device.lines == ["sent"]


# 40 messages each way at QoS 2, 3 KiB each: several of TLS's records, more than one segment.
BOTH_WAYS = """
async def play(client):
    got = []
    client.on("in", lambda message: got.append(bytes(message.payload)))
    await client.subscribe("in", 2)
    print("subscribed")
    for n in range(40):
        await client.publish("out", b"%03d" % n + bytes(3000), qos=2)
        await client.drain()
    await until(lambda: len(got) >= 40)
    print("got:", [int(payload[:3]) for payload in got if payload[3:] == bytes(3500)])
    print("connections:", client.connections)
"""


def test_nothing_is_lost_when_the_link_is_cut_at_any_place_of_the_tls_stream(tmp_path, ca):
    with Mosquitto(tls=listener(ca.issue("broker"))) as broker, Proxy(broker.tls_port) as link:
        with listening(broker.port, "out") as (far, arrived):
            # In the handshake, in its first record, and within records of messages; of at least 120 KB either way.
            cuts = [link.cut_after(UP, nbytes) for nbytes in (40, 400, 7000, 20001, 50123, 90003)]
            cuts += [link.cut_after(DOWN, nbytes) for nbytes in (300, 9001, 30003, 60002, 100001)]
            with Device(tmp_path, link.port, {"ca": ca.pem}, BOTH_WAYS) as device:
                device.line("subscribed")
                for n in range(40):
                    far.publish("in", b"%03d" % n + bytes(3500), 2)
                assert json.loads(device.line("got:")) == list(range(40))
                assert int(device.line("connections:")) >= 5
            assert all(cut.fired for cut in cuts)
            for n in range(40):
                assert arrived.get(timeout=PATIENCE_S) == b"%03d" % n + bytes(3000)
            assert arrived.empty()


LARGE = """
async def play(client):
    await until(lambda: client.connected)
    await client.publish("out", bytes(range(256)) * 20480, qos=0)
    while True:
        await asyncio.sleep_ms(5)
        print("tick")
"""


def test_message_larger_than_all_buffers_goes_out_whole_to_a_broker_that_takes_its_time(tmp_path, ca):
    def packet():
        """Read one from the device: (first byte, the rest)."""
        first, length, shift = stream.read(1)[0], 0, 0
        while True:
            byte = stream.read(1)[0]
            length |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return first, stream.read(length)

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*ca.issue("broker"))
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        server.bind(("127.0.0.1", 0))
        server.listen()
        with Device(tmp_path, server.getsockname()[1], {"ca": ca.pem}, LARGE) as device:
            for session in (0, 1):  # the first only begins a clean session
                with context.wrap_socket(server.accept()[0], server_side=True) as peer, peer.makefile("rb") as stream:
                    assert packet()[0] == 0x10
                    peer.sendall(b"\x20\x02\0\0")
                    if session:
                        for _ in range(100):
                            device.line("tick")  # its write has to wait, its event loop has not
                        assert packet() == (0x30, b"\0\x03out" + bytes(range(256)) * 20480)
                    else:
                        assert packet() == (0xE0, b"")


def test_broker_that_restarts_is_connected_to_again(tmp_path, ca):
    play = SENDS + "    await until(lambda: client.connections == 2)\n    print('again')\n"
    with Mosquitto(tls=listener(ca.issue("broker"))) as broker:
        with Device(tmp_path, broker.tls_port, {"ca": ca.pem}, play) as device:
            device.line("sent")
            broker.restart()
            device.line("again")
