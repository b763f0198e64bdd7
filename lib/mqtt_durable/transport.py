"""A connection to the broker, TCP or TLS over it, for asyncio.  Knows no MQTT; nothing here survives power loss."""

import socket
from asyncio.stream import Stream
from errno import EAGAIN, EINPROGRESS

# "In progress" of ESP32 firmware that does not translate lwIP's numbers (micropython-esp32#166).
_OLD_ESP32 = (118, 119)


def dial(host, port, attempt=0, tls=None):
    """Begin a connection and return its Stream, for hang_up(); whether it succeeds shows at the first write or read.

    attempt: counts up over attempts, so that every address of the host gets its turn.  tls: a tls.TLS.
    Raises OSError, TLSError.
    The name look-up blocks the event loop on every board, for seconds if no server answers.
    """
    if tls is not None:
        tls.check_clock()
    infos = socket.getaddrinfo(host, port, 0, socket.SOCK_STREAM)
    if not infos:
        raise OSError(-2, "no address for " + host)
    family, kind, proto, _, address = infos[attempt % len(infos)]
    sock = socket.socket(family, kind, proto)
    stream = None
    try:
        try:
            sock.setblocking(False)
            sock.connect(address)
        except OSError as e:
            if e.errno not in (EINPROGRESS, EAGAIN) and e.errno not in _OLD_ESP32:
                raise
        stream = Stream(sock if tls is None else tls.wrap(sock))
        stream.sock = sock
    finally:
        if stream is None:
            sock.close()
    return stream


def hang_up(stream):
    """End the connection.  MicroPython's Stream.close() does nothing."""
    stream.s.close()
    stream.sock.close()  # a TLS socket whose handshake has failed leaves it open (modtls_mbedtls.c)
