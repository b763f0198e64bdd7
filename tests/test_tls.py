"""TLS without a broker: the certificates' files, the clock, the words for failures.  The rest: cpython/test_tls.py."""

import asyncio
import os
import sys
from binascii import a2b_base64

import mqtt_durable.tls as tls_module
from fakebroker import until
from mqtt_durable.client import Client
from mqtt_durable.errors import ConfigError, TLSError
from mqtt_durable.tls import TLS
from norsim import Nor
from raises import raises

_HERE = __file__.replace("\\", "/").rpartition("/")[0] or "."
_FILE = "%s/_test_tls_%s" % (_HERE, sys.implementation.name)

# A CA of nobody's, valid to 2099.
CA = """-----BEGIN CERTIFICATE-----
MIIBITCByKADAgECAgEBMAoGCCqGSM49BAMCMA8xDTALBgNVBAMMBHRlc3QwIBcN
MjQwMTAxMDAwMDAwWhgPMjA5OTAxMDEwMDAwMDBaMA8xDTALBgNVBAMMBHRlc3Qw
WTATBgcqhkjOPQIBBggqhkjOPQMBBwNCAAQ6E3G9nhHyPsDP3L3ioZj4CRBcabwv
z+Y6ksNEC9pVWAhK0yZBzAFeqqmv6O3Za7Io5y1hb9ST5w3qI/+gOXBtoxMwETAP
BgNVHRMBAf8EBTADAQH/MAoGCCqGSM49BAMCA0gAMEUCIC/jdj9ezsiFdC9WFWp5
D8hJu7EhMAac+EQBqLMWWOg5AiEA9s1iXnvr8eaxmXXoiXXubqJwReYZZ3BjIW0i
cR84CHc=
-----END CERTIFICATE-----
"""
DER = a2b_base64("".join(CA.split("\n")[1:-2]))


def settings(**changes):
    """broker.tls as config.complete() leaves it."""
    filled = {"ca": _FILE, "cert": None, "key": None, "verify": True, "server_hostname": None, "ntp_host": "ntp.test"}
    filled.update(changes)
    return filled


def with_file(data, function, *args):
    """Call function while _FILE holds data."""
    with open(_FILE, "wb") as file:
        file.write(data)
    try:
        return function(*args)
    finally:
        os.remove(_FILE)


def problem(data, **changes):
    """The only line of the ConfigError that a file of data gives."""
    (line,) = with_file(data, raises, ConfigError, TLS, settings(**changes), "h").problems
    return line


class Ntp:
    """Stands in for the module ntptime, and for the clock: settime() sets year, or raises error."""

    def __init__(self, year, error=None):
        self.year = year
        self.error = error
        self.host = "pool.ntp.org"
        self.asked = []

    def settime(self):
        self.asked.append(self.host)
        if self.error:
            raise self.error
        self.year = 2031

    def __enter__(self):
        self._old = tls_module._year
        tls_module._year = lambda: self.year
        sys.modules["ntptime"] = self
        return self

    def __exit__(self, *_):
        tls_module._year = self._old
        del sys.modules["ntptime"]


def test_pem_gives_its_blocks_of_the_kind_and_anything_else_itself():
    pem = CA.encode()
    ec_key = b"-----BEGIN EC PARAMETERS-----\nBggq\n-----END EC PARAMETERS-----\n-----BEGIN EC PRIVATE KEY-----\nAAEC\n"
    for name, data, title, blocks in (
        ("DER", DER, b"CERTIFICATE", [DER]),
        ("PEM", pem, b"CERTIFICATE", [DER]),
        ("PEM of Windows", pem.replace(b"\n", b"\r\n"), b"CERTIFICATE", [DER]),
        ("text around it", b"Subject: test\n" + pem + b"\n", b"CERTIFICATE", [DER]),
        ("two", pem + pem, b"CERTIFICATE", [DER, DER]),
        ("key behind its parameters", ec_key, b"PRIVATE KEY", [b"\0\1\2"]),
        ("key among certificates", pem + ec_key + pem, b"PRIVATE KEY", [b"\0\1\2"]),
    ):
        assert tls_module._blocks(data, title) == blocks, name
    for data in (ec_key, b"-----BEGIN ", b"-----BEGIN CERTIFICATE-----\nA"):
        raises(ValueError, tls_module._blocks, data, b"CERTIFICATE")


def test_file_that_cannot_be_used_is_one_line():
    assert problem(CA.encode(), ca="/nowhere/ca.pem") == "broker.tls.ca: /nowhere/ca.pem cannot be read: not found"
    assert problem(bytes(16385)) == "broker.tls.ca: %s has more than 16384 bytes" % _FILE
    line = "broker.tls.ca: %s holds none that can be used, expected one as PEM or DER, not encrypted" % _FILE
    assert problem(b"-----BEGIN PRIVATE KEY-----\nAAEC\n-----END PRIVATE KEY-----\n") == line
    assert problem(CA.encode()[:100]) == line


def test_unset_clock_is_set_once_by_the_configured_server():
    for data in (CA.encode(), DER):
        tls = with_file(data, TLS, settings(), "h")
        for year, asked in ((2000, ["ntp.test"]), (2021, ["ntp.test"]), (2024, []), (2099, [])):
            with Ntp(year) as ntp:
                tls.check_clock()
                tls.check_clock()
                assert ntp.asked == asked, year


def test_clock_that_cannot_be_set_is_said_so():
    tls = with_file(DER, TLS, settings(), "h")
    for error in (OSError(110), OSError(-2), ValueError("buffer too small"), ImportError("no module named 'ntptime'")):
        with Ntp(2021, error):
            text = str(raises(TLSError, tls.check_clock))
            assert text.startswith("the clock is not set: it says 2021; ") and "ntp.test" in text, text


def test_unverified_the_clock_does_not_matter():
    with Ntp(2000) as ntp:
        TLS(settings(ca=None, verify=False), "h").check_clock()
        assert ntp.asked == []


def test_errors_of_the_network_stay_as_they_are_and_the_others_say_name_and_date():
    tls = with_file(DER, TLS, settings(server_hostname="broker.test"), "h")
    for error in (OSError(111, "ECONNREFUSED"), OSError(-2, "no address for h"), OSError(12, "ENOMEM")):
        assert tls.explained(error) is error
    for error, part in (
        (ValueError("expired\nnot signed\n"), ": expired; not signed"),
        (OSError(104, "ECONNRESET"), ": the broker closed the connection: is the port "),
        (OSError(-0x7280, "MBEDTLS_ERR_SSL_CONN_EOF"), ": MBEDTLS_ERR_SSL_CONN_EOF: is the port "),
        (OSError(-17040, "MBEDTLS_ERR_MPI_ALLOC_FAILED"), ": MBEDTLS_ERR_MPI_ALLOC_FAILED: not enough memory"),
    ):
        explained = tls.explained(error)
        assert type(explained) is TLSError
        assert str(explained).startswith('TLS with "broker.test" on 20') and part in str(explained), explained


def test_client_goes_on_storing_and_trying_while_the_clock_is_not_set():
    async def scenario():
        broker = {"host": "127.0.0.1", "port": 1, "username": None, "password": None, "keep_alive_s": 60}
        config = {
            "broker": dict(broker, tls=settings()),
            "client_id": "p7",
            "session": {"clean": False, "in_flight": 16},
            "journal": {"home": "ram", "size_kib": 64, "when_full": "raise"},
        }
        client = with_file(DER, lambda: Client(config, device=Nor(65536), backoff_ms=(1, 4)))
        async with client:
            await client.publish("t", "stored", qos=1)
            await until(lambda: len(ntp.asked) >= 4, "four attempts")
            assert type(client.last_error) is TLSError and "the clock is not set" in str(client.last_error)
            assert client.store.waiting() == 1

    with Ntp(2021, OSError(110)) as ntp:
        asyncio.run(scenario())
