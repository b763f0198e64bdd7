"""A TCP connection to the broker, for asyncio.  Knows no MQTT; nothing here survives power loss."""

import socket
from asyncio.stream import Stream
from errno import EAGAIN, EINPROGRESS

# "In progress" of ESP32 firmware that does not translate lwIP's numbers (micropython-esp32#166).
_OLD_ESP32 = (118, 119)


def dial(host, port, attempt=0):
    """Begin a connection and return its Stream; whether it succeeds shows at the first write or read.

    attempt: counts up over attempts, so that every address of the host gets its turn.  Raises OSError.
    The name look-up blocks the event loop on every board, for seconds if no server answers.
    """
    infos = socket.getaddrinfo(host, port, 0, socket.SOCK_STREAM)
    if not infos:
        raise OSError(-2, "no address for " + host)
    family, kind, proto, _, address = infos[attempt % len(infos)]
    sock = socket.socket(family, kind, proto)
    try:
        sock.setblocking(False)
        sock.connect(address)
    except OSError as e:
        if e.errno not in (EINPROGRESS, EAGAIN) and e.errno not in _OLD_ESP32:
            sock.close()
            raise
    return Stream(sock)
