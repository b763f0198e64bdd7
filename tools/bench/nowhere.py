"""A network for the WebAssembly port, which has none: sockets whose other end is a broker that answers at once.

install() puts socket, select and asyncio.stream into sys.modules.  It knows CONNECT, PUBLISH at QoS 1 and SUBSCRIBE, as
far as is needed to get connected and to publish.
"""

import asyncio
import sys


class Socket:
    def __init__(self, *_):
        self.sent = b""
        self.came = b""

    def connect(self, *_):
        pass

    close = settimeout = setblocking = setsockopt = connect

    def write(self, data, *span):
        """span: how many bytes, or from where on and how many."""
        if span:
            begin = span[0] if len(span) == 2 else 0
            data = data[begin : begin + span[-1]] if span[-1] >= 0 else data
        data = bytes(data)
        self.sent += data
        while len(self.sent) > 1 and len(self.sent) >= 2 + self.sent[1]:  # no packet here has 128 bytes
            end = 2 + self.sent[1]
            self.answer(self.sent[0], self.sent[2:end])
            self.sent = self.sent[end:]
        return len(data)

    send = write

    def answer(self, first, body):
        if first == 0x10:
            self.version = body[6]
            self.came += b"\x20\x03\0\0\0" if self.version == 5 else b"\x20\x02\0\0"
        elif first & 0xF6 == 0x32:
            at = 2 + body[1]
            self.came += b"\x40\x02" + body[at : at + 2]
        elif first == 0x82:
            more = b"\0" if self.version == 5 else b""
            self.came += bytes((0x90, 3 + len(more))) + body[:2] + more + body[-1:]

    def read(self, size):
        if not self.came:
            return None
        data = self.came[:size]
        self.came = self.came[size:]
        return data

    def readinto(self, buf, size=None):
        data = self.read(len(buf) if size is None else size)
        if data is None:
            return None
        buf[: len(data)] = data
        return len(data)


class Poll:
    def register(self, sock, events=None):
        self.sock = sock

    def modify(self, sock, events):
        pass

    def unregister(self, sock):
        pass

    def poll(self, ms=-1):
        return [(self.sock, 4 | (1 if self.sock.came else 0))]


class Stream:
    """asyncio's, whose code is frozen on boards, too."""

    out_buf = b""  # the socket takes all

    def __init__(self, s):
        self.s = s

    def write(self, data):
        self.s.write(data)

    async def drain(self):
        pass

    async def readinto(self, buf):
        while not self.s.came:
            await asyncio.sleep_ms(1)
        return self.s.readinto(buf)


class Module:
    def __init__(self, **names):
        for name, value in names.items():
            setattr(self, name, value)


def install():
    import errno
    import time

    sys.modules["socket"] = sys.modules["usocket"] = Module(
        socket=Socket,
        SOCK_STREAM=1,
        AF_INET=2,
        getaddrinfo=lambda host, port, *_: [(2, 1, 0, "", ("127.0.0.1", port))],
    )
    sys.modules["select"] = sys.modules["uselect"] = Module(poll=Poll, POLLIN=1, POLLOUT=4, POLLERR=8, POLLHUP=16)
    sys.modules["asyncio.stream"] = Module(Stream=Stream)
    sys.modules["machine"] = Module(unique_id=lambda: b"bench")
    sys.modules["utime"] = time
    sys.modules["uerrno"] = errno
