"""A connection to the broker, TCP or TLS over it, for asyncio.  Knows no MQTT; nothing here survives power loss."""

import socket
from asyncio.stream import Stream
from errno import EAGAIN, EINPROGRESS

from micropython import const

_MOST = const(8)  # addresses kept; the boards' look-up gives one


class Addresses:
    """The addresses of the broker, kept: a reconnection needs no look-up, and so no name server that answers."""

    def __init__(self, host, port):
        self._host = host
        self._port = port
        self._infos = []
        self._at = 0
        self._untried = 0  # since the last look-up or good()

    def next(self):
        """Return what getaddrinfo() gave of the address whose turn it is, for dial().  Raises OSError.

        The name is looked up when every address has been tried in vain; if that fails, they are tried again.  The
        look-up blocks the event loop on every board, for seconds if no server answers; without network a Pico W
        up to firmware 1.27 never returns from it.
        """
        if not self._untried:
            try:
                infos = []
                for info in socket.getaddrinfo(self._host, self._port, 0, socket.SOCK_STREAM):
                    # What an ESP32 may give in place of an error.  (The unix port's address is no text.)
                    if info[4][0] != "0.0.0.0" and len(infos) < _MOST:
                        infos.append(info)
                if not infos:
                    raise OSError(-2, "no address for " + self._host)
                self._infos = infos
                self._at = 0
            except OSError:
                if not self._infos:
                    raise
            self._untried = len(self._infos)
        self._untried -= 1
        self._at += 1
        return self._infos[(self._at - 1) % len(self._infos)]

    def good(self):
        """The address that next() gave last leads to the broker: it comes first from now on."""
        self._at -= 1
        self._untried = len(self._infos)


def dial(info, tls=None):
    """Begin a connection and return its Stream; whether it succeeds shows at the first write or read.

    Both .s and .sock of it are to be closed: Stream.close() does nothing in MicroPython.
    info: from Addresses.next().  tls: a tls.TLS.  Raises OSError, TLSError.
    """
    if tls is not None:
        tls.check_clock()
    family, kind, proto, _, address = info
    sock = socket.socket(family, kind, proto)
    stream = None
    try:
        try:
            sock.setblocking(False)
            try:
                # The second of two small writes is not to wait until the other side has acknowledged the first (Nagle).
                sock.setsockopt(6, 1, 1)  # IPPROTO_TCP, TCP_NODELAY, which have no names on the boards
            except OSError:
                pass  # firmware before 1.24
            sock.connect(address)
        except OSError as e:
            # 118, 119: of ESP32 firmware that does not translate lwIP's numbers (micropython-esp32#166).
            if e.errno not in (EINPROGRESS, EAGAIN, 118, 119):
                raise
        stream = Stream(sock if tls is None else tls.wrap(sock))
        stream.sock = sock
    finally:
        if stream is None:
            sock.close()
    return stream
