"""Makes a host look like a board: install() once, then the device's files run unchanged.

    import host          # with tools/shim on the path (MICROPYPATH, PYTHONPATH or sys.path)
    host.install()
    host.use_board("rp2")

The unix port of MicroPython lacks only modules, and a module of this directory wins over the built-in `machine`
because that one is extensible.  CPython also lacks functions of `time`, `sys`, `gc`, `asyncio` and `socket`: they are
added; of those that are there only select.poll() is replaced, by one with ipoll().
"""

import sys

_TICKS_PERIOD = 1 << 30  # as on a 32-bit board, so that wrapping shows up here too
_ETIMEDOUT = 110


def install():
    """Put this directory first on sys.path and, on CPython, add what MicroPython's modules have.  Safe to repeat."""
    here = __file__.replace("\\", "/").rpartition("/")[0] or "."
    if here not in sys.path:
        sys.path.insert(0, here)
    if sys.implementation.name != "micropython":
        _install_cpython()


def use_board(name):
    """Make network and machine behave as on "esp32" or "rp2" (Pico W), everything back in its first state."""
    import machine
    import network

    network.use_board(name)
    machine.use_board(name)


def ticks_add(ticks, delta):
    """Return ticks + delta, wrapped."""
    return (ticks + delta) % _TICKS_PERIOD


def ticks_diff(a, b):
    """Return a - b, right while the two are less than half a period apart."""
    half = _TICKS_PERIOD // 2
    return (a - b + half) % _TICKS_PERIOD - half


def _install_cpython():
    import asyncio
    import gc
    import select
    import socket
    import time
    import traceback
    import types

    if hasattr(time, "ticks_ms"):
        return

    time.ticks_ms = lambda: time.monotonic_ns() // 1000000 % _TICKS_PERIOD
    time.ticks_us = lambda: time.monotonic_ns() // 1000 % _TICKS_PERIOD
    time.ticks_cpu = time.ticks_us
    time.ticks_add = ticks_add
    time.ticks_diff = ticks_diff
    time.sleep_ms = lambda ms: time.sleep(ms / 1000)
    time.sleep_us = lambda us: time.sleep(us / 1000000)

    def print_exception(exc, file=None):
        traceback.print_exception(type(exc), exc, exc.__traceback__, file=file or sys.stdout)

    sys.print_exception = print_exception

    # A Pico W at its prompt: code that reports or bounds by free memory gets a plausible number.
    gc.mem_free = lambda: 186000
    gc.mem_alloc = lambda: 8000
    gc.threshold = lambda size=None: -1 if size is None else None

    asyncio.sleep_ms = lambda ms: asyncio.sleep(ms / 1000)
    asyncio.wait_for_ms = lambda awaitable, ms: asyncio.wait_for(awaitable, ms / 1000)
    stream = types.ModuleType("asyncio.stream")
    stream.Stream = Stream
    asyncio.stream = stream
    sys.modules["asyncio.stream"] = stream

    socket.socket.readinto = _socket_readinto
    socket.socket.write = _socket_write
    make = select.poll
    select.poll = lambda: _Poll(make())


class Stream:
    """MicroPython's asyncio.stream.Stream over a non-blocking socket, as far as the library uses it."""

    def __init__(self, s):
        self.s = s
        self.out_buf = b""

    async def _wait(self, add, remove):
        import asyncio

        ready = asyncio.get_running_loop().create_future()
        fd = self.s.fileno()
        add(fd, lambda: ready.done() or ready.set_result(None))
        try:
            await ready
        finally:
            remove(fd)  # the number, not the socket: that may be closed by now

    async def readinto(self, buf):
        """Wait until there is something to read; return the bytes read, 0 at the end, None if it was a false alarm."""
        import asyncio

        loop = asyncio.get_running_loop()
        await self._wait(loop.add_reader, loop.remove_reader)
        return self.s.readinto(buf)

    def write(self, buf):
        """Send what the socket takes now, keep the rest for drain()."""
        if not self.out_buf:
            n = self.s.write(buf)
            if n == len(buf):
                return
            if n is not None:
                buf = buf[n:]
        self.out_buf += bytes(buf)

    async def drain(self):
        """Return when all is sent; always lets other tasks run."""
        import asyncio

        if not self.out_buf:
            await asyncio.sleep(0)
            return
        loop = asyncio.get_running_loop()
        while self.out_buf:
            await self._wait(loop.add_writer, loop.remove_writer)
            n = self.s.write(self.out_buf)
            if n is not None:
                self.out_buf = self.out_buf[n:]
        self.out_buf = b""

    def close(self):
        self.s.close()


class _Poll:
    """MicroPython's poll object, which has ipoll() as well, and tells objects, not file descriptors."""

    def __init__(self, poll):
        self._poll = poll
        self._objects = {}

    def register(self, obj, eventmask=5):  # POLLIN | POLLOUT
        self._poll.register(obj, eventmask)
        self._objects[obj if isinstance(obj, int) else obj.fileno()] = obj

    def unregister(self, obj):
        self._poll.unregister(obj)
        del self._objects[obj if isinstance(obj, int) else obj.fileno()]

    def modify(self, obj, eventmask):
        self._poll.modify(obj, eventmask)

    def poll(self, timeout=-1):
        return [(self._objects[fd], events) for fd, events in self._poll.poll(timeout)]

    def ipoll(self, timeout=-1, flags=0):
        return iter(self.poll(timeout))


# MicroPython's stream methods go on until all is done or the socket says "not now" (py/stream.c, mp_stream_rw).


def _socket_readinto(self, buf, nbytes=-1):
    """Read until buf is full, the end, or EAGAIN: bytes read, 0 at the end, None if there was nothing to read yet."""
    view = memoryview(buf)
    if nbytes >= 0:
        view = view[:nbytes]
    done = 0
    while done < len(view):
        try:
            n = self.recv_into(view[done:])
        except BlockingIOError:
            return done or None
        except TimeoutError:
            raise OSError(_ETIMEDOUT, "ETIMEDOUT") from None
        if n == 0:
            break
        done += n
    return done


def _socket_write(self, buf, *part):
    """Write until all of buf, its first n bytes (n) or n bytes from off on (off, n) are taken, or EAGAIN: bytes taken,
    None if there were none."""
    view = memoryview(buf)
    if len(part) == 2:
        view = view[part[0] :]
    if part:
        view = view[: part[-1]]
    done = 0
    while done < len(view):
        try:
            done += self.send(view[done:])
        except BlockingIOError:
            return done or None
        except TimeoutError:
            raise OSError(_ETIMEDOUT, "ETIMEDOUT") from None
    return done
