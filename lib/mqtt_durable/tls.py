"""TLS with the broker: certificates from files, the clock that their dates need, and words for what goes wrong.

Owns the SSL context; loaded only where broker.tls is configured.  Refuses to know MQTT.  The handshake runs inside the
first writes and reads of the wrapped socket, so that waiting for the broker never blocks the event loop; each of its
calculations does, as long as the chip takes for it.
"""

import gc
import ssl
import time
from binascii import a2b_base64

from micropython import const

from .errors import ConfigError, TLSError

_FILE_BYTES = const(16384)  # a CA bundle of hundreds does not fit a board
_YEAR = const(2024)  # boards boot in 2000 or 2021; ntptime.settime() never gives an earlier year than this
_RESET = (32, 104)  # EPIPE, ECONNRESET


class TLS:
    """TLS with one broker.  settings: broker.tls of the configuration.  host: broker.host.

    Reads the files, once.  Raises ConfigError with a line about the one that cannot be used.
    """

    def __init__(self, settings, host):
        self._verify = settings["verify"]
        self._ntp_host = settings["ntp_host"]
        self._name = settings["server_hostname"] or host
        self._context = context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        key = "ca"
        try:
            if self._verify:
                context.verify_mode = ssl.CERT_REQUIRED
                for der in _blocks(_read(settings, key), b"CERTIFICATE"):
                    context.load_verify_locations(cadata=der)
            if settings["cert"]:
                key = "cert"
                chain = _read(settings, key)
                blocks = _blocks(chain, b"CERTIFICATE")
                key = "key"
                private = _blocks(_read(settings, key), b"PRIVATE KEY")[0]
                # Only as PEM a chain can be handed over whole.
                context.load_cert_chain(blocks[0] if len(blocks) == 1 else chain, private)
        except ValueError as e:  # mbedtls's own words for the last two: "invalid cert", "invalid key"
            if key == "key" and e.args[0] == "invalid cert":
                key = "cert"
            line = "broker.tls.%s: %s holds none that can be used, expected one as PEM or DER, not encrypted"
            raise ConfigError([line % (key, settings[key])])
        gc.collect()

    def check_clock(self):
        """Set the clock by NTP if nobody has yet; without it no certificate can be verified.

        Blocks the event loop for a name look-up and up to a second.  Raises TLSError.
        """
        if not self._verify or _year() >= _YEAR:
            return
        try:
            import ntptime

            ntptime.host = self._ntp_host
            ntptime.settime()
        except (ImportError, OSError, ValueError) as e:  # ValueError: the answer was too short
            text = "the clock is not set: it says %d; set it by machine.RTC, or by broker.tls.ntp_host: %s gave %r"
            raise TLSError(text % (_year(), self._ntp_host, e))

    def wrap(self, sock):
        """Return the TLS socket over a non-blocking sock, its handshake not begun.  Raises OSError."""
        gc.collect()  # its buffers, 16 KiB the larger, come from the C heap (ESP32) or in one piece from ours
        return self._context.wrap_socket(sock, server_hostname=self._name, do_handshake_on_connect=False)

    def explained(self, error):
        """Return a TLSError for what mbedtls raised, or the network where it may mean the same; else error itself."""
        text = str(error.args[-1]).strip().replace("\n", "; ")
        if isinstance(error, OSError):
            if error.errno in _RESET:
                text = "the broker closed the connection"
            elif error.errno > -256:  # not mbedtls's
                return error
            if "ALLOC" in text:
                text += ": not enough memory"
            else:
                text += ": is the port its TLS port, and does it ask for another client certificate?"
        # With the name and the date that a certificate has to fit.
        return TLSError('TLS with "%s" on %d-%02d-%02d: %s' % ((self._name,) + tuple(time.gmtime()[:3]) + (text,)))


def _year():
    return time.gmtime()[0]


def _read(settings, key):
    path = settings[key]
    try:
        with open(path, "rb") as file:
            data = file.read(_FILE_BYTES + 1)
    except OSError as e:
        raise ConfigError(["broker.tls.%s: %s cannot be read: %s" % (key, path, "not found" if e.errno == 2 else e)])
    if len(data) > _FILE_BYTES:
        raise ConfigError(["broker.tls.%s: %s has more than %d bytes" % (key, path, _FILE_BYTES)])
    return data


def _blocks(data, title):
    """Return the DER blocks of a file: of PEM those whose title ends so, else the file itself.

    Decoded here because the Pico W's firmware takes no PEM up to 1.28.  Raises ValueError if there is none.
    """
    parts = data.split(b"-----BEGIN ")
    if len(parts) == 1:
        return parts
    blocks = []
    for part in parts[1:]:
        head, _, rest = part.partition(b"-----")
        if head.endswith(title):
            blocks.append(a2b_base64(rest.partition(b"-")[0]))
    if not blocks:
        raise ValueError("nothing of it")
    return blocks
