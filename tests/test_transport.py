"""The broker's addresses: when they are looked up, which is tried, and that a name server may be away."""

import asyncio
import socket

import mqtt_durable.transport as transport_module
from fakebroker import FakeBroker, until
from mqtt_durable.transport import Addresses, dial
from raises import raises
from test_client import Rig, play

NO_ANSWER = OSError(-2, "no name server")
REFUSED = OSError(111, "refused")


class Dns:
    """In place of the module socket in transport.  answers: of each look-up a list of addresses, or an error; the last
    one stays.  .asked: how often it was."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.asked = 0

    def __getattr__(self, name):
        return getattr(socket, name)

    def __enter__(self):
        transport_module.socket = self
        return self

    def __exit__(self, *_):
        transport_module.socket = socket

    def getaddrinfo(self, host, port, *more):
        self.asked += 1
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return [(2, 1, 6, "", (address, port)) for address in answer]


def _tried(addresses, n):
    return [addresses.next()[4][0] for _ in range(n)]


def test_every_address_is_tried_before_the_name_is_looked_up_again():
    with Dns(["a", "b", "c"], ["d", "b"]) as dns:
        addresses = Addresses("h", 1883)
        assert _tried(addresses, 3) == ["a", "b", "c"] and dns.asked == 1
        assert _tried(addresses, 3) == ["d", "b", "d"] and dns.asked == 3


def test_address_that_was_good_is_tried_first_then_the_others_then_a_look_up():
    with Dns(["a", "b", "c"], ["d"]) as dns:
        addresses = Addresses("h", 1883)
        assert _tried(addresses, 2) == ["a", "b"]
        for _ in range(5):
            addresses.good()
            assert _tried(addresses, 1) == ["b"]
        assert _tried(addresses, 2) == ["c", "a"] and dns.asked == 1
        assert _tried(addresses, 1) == ["d"] and dns.asked == 2


def test_addresses_of_the_last_look_up_are_tried_again_while_no_name_server_answers():
    with Dns(["a", "b"], NO_ANSWER) as dns:
        addresses = Addresses("h", 1883)
        assert _tried(addresses, 7) == ["a", "b"] * 3 + ["a"] and dns.asked == 4
        addresses.good()
        assert _tried(addresses, 3) == ["a", "b", "a"] and dns.asked == 5


def test_without_any_address_every_try_is_a_look_up_and_an_error():
    with Dns(NO_ANSWER, [], ["0.0.0.0"], ["0.0.0.0", "a"]) as dns:
        addresses = Addresses("h", 1883)
        assert raises(OSError, addresses.next) is NO_ANSWER
        for _ in range(2):
            assert "no address for h" in str(raises(OSError, addresses.next))
        assert _tried(addresses, 1) == ["a"] and dns.asked == 4


def test_an_answer_of_0_0_0_0_does_not_replace_what_is_known():
    with Dns(["a"], ["0.0.0.0"]):
        assert _tried(Addresses("h", 1883), 3) == ["a", "a", "a"]


def test_addresses_kept_are_bounded():
    with Dns([str(n) for n in range(100)]) as dns:
        addresses = Addresses("h", 1883)
        _tried(addresses, 9)
        assert dns.asked == 2


class Resolver(Dns):
    """Knows one name; .fails: it does not, at present.  link: must have come up before each look-up."""

    def __init__(self, link=None):
        super().__init__(())
        self.fails = False
        self.link = link

    def getaddrinfo(self, host, port, *more):
        self.asked += 1
        if self.link:
            self.link.looked_up()
        if self.fails:
            raise NO_ANSWER
        return socket.getaddrinfo("127.0.0.1", port, *more)


def _play(resolver, scenario, **options):
    async def run():
        async with FakeBroker() as broker:
            rig = Rig(broker, **options)
            async with rig.client:
                await scenario(rig)

    with resolver:
        asyncio.run(run())


def test_reconnects_need_no_name_server():
    async def scenario(rig):
        await rig.up()
        dns.fails = True
        for n in range(2, 5):
            await rig.broker.drop()
            await rig.up(n)
        assert dns.asked == 1

    dns = Resolver()
    _play(dns, scenario)


def test_broker_that_was_away_is_found_again_without_a_name_server():
    async def scenario(rig):
        await rig.up()
        dns.fails = True
        await rig.broker.stop()
        await until(lambda: dns.asked > 3)
        await rig.broker.start()
        await rig.up(2)

    dns = Resolver()
    _play(dns, scenario)


def test_clean_first_connection_of_a_new_journal_costs_no_second_look_up():
    async def scenario(rig):
        await rig.up(2)
        assert dns.asked == 1

    dns = Resolver()
    _play(dns, scenario, fresh=True)


class Link:
    """Comes up at every call, but for each third; is down again after each look-up."""

    def __init__(self):
        self.calls = 0
        self.connected = False
        self.blind = 0  # look-ups without network: a Pico W would never return

    async def up(self):
        self.calls += 1
        self.connected = False
        if self.calls % 3 == 0:
            raise OSError("no Wi-Fi")
        await asyncio.sleep_ms(0)
        self.connected = True

    def looked_up(self):
        self.blind += not self.connected
        self.connected = False


def test_name_is_looked_up_only_when_the_link_has_just_come_up():
    async def scenario(rig):
        dns.fails = True
        await until(lambda: dns.asked > 6)
        dns.fails = False
        await rig.up(2)
        await rig.broker.stop()
        dns.asked = 0
        await until(lambda: dns.asked > 6)
        await rig.broker.start()
        await rig.up(3)
        assert link.blind == 0 and link.calls > 14

    link = Link()
    dns = Resolver(link)
    _play(dns, scenario, link=link, fresh=True)


class Options(Dns):
    """Makes sockets that take options, or have none as in old firmware, and go no further."""

    def __init__(self, error=None):
        super().__init__(())
        self.error = error
        self.options = []

    def socket(self, *_):
        return self

    def setblocking(self, _):
        pass

    def setsockopt(self, *option):
        self.options.append(option)
        if self.error:
            raise self.error

    def connect(self, _):
        raise REFUSED

    def close(self):
        pass


def test_small_writes_do_not_wait_for_the_acknowledgement_of_those_before():
    for error in (None, OSError(95)):
        with Options(error) as sock:
            assert raises(OSError, dial, (2, 1, 6, "", "address")) is REFUSED
        assert sock.options == [(6, 1, 1)]  # IPPROTO_TCP, TCP_NODELAY

    async def scenario(rig):
        await until(lambda: rig.client.connected)
        sock = rig.client._stream.sock
        if hasattr(sock, "getsockopt"):  # CPython's
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)

    play(scenario)
