"""A TCP proxy between a device and its broker that fails on command: cuts, refusals, silence, delay, small pieces.

    with Proxy(broker.port) as proxy:
        cut = proxy.cut_at_packet(UP, PUBREL, when="after")
        ... the device connects to 127.0.0.1, proxy.port ...
        cut.wait()

UP is device to broker, DOWN broker to device.  It runs in a thread of its own; every method may be called from any
other thread, and has taken effect when it returns.  MQTT is read only as far as the fixed header (MQTT 3.1.1 section
2.2), to know where packets begin and end.
"""

import asyncio
import collections
import contextlib
import socket
import struct
import threading

UP = "up"
DOWN = "down"

_READ_BYTES = 65536
_LINE = 1000  # pieces that are held back, for a direction


class PacketScanner:
    """Finds MQTT packets in a stream, in any split.  A length of more than 4 bytes ends the search: no MQTT."""

    def __init__(self):
        self.packet_type = 0
        self.have = 0  # bytes of the packet seen, 0 between packets
        self.total = 0  # bytes of the packet, 0 until its header is complete
        self.lost = False  # what came was no MQTT
        self._length = 0

    def step(self, data, pos, end):
        """Take data[pos:end] up to the end of a header or a packet at most; return the new position."""
        if self.lost:
            return end
        if self.total:
            taken = min(end - pos, self.total - self.have)
            self.have += taken
            return pos + taken
        byte = data[pos]
        if self.have == 0:
            self.packet_type = byte >> 4
            self._length = 0
        else:
            self._length |= (byte & 0x7F) << (7 * (self.have - 1))
            if byte < 0x80:
                self.total = self.have + 1 + self._length
            elif self.have == 4:
                self.lost = True
        self.have += 1
        return pos + 1

    @property
    def complete(self):
        """Whether the last step ended a packet; call next_packet() then."""
        return self.total != 0 and self.have == self.total

    def next_packet(self):
        self.have = self.total = 0


class Cut:
    """One cut that has been ordered.  .fired: whether it has happened."""

    def __init__(self, direction, nbytes=None, packet_type=None, nth=0, when=None, reset=True):
        if direction not in (UP, DOWN):
            raise ValueError("direction %r: expected UP or DOWN" % (direction,))
        if nbytes is not None and nbytes < 0:
            raise ValueError("nbytes %r: expected 0 or more" % (nbytes,))
        if packet_type is not None and (when not in ("before", "inside", "after") or nth < 1):
            raise ValueError("when %r, nth %r: expected before, inside or after, and 1 or more" % (when, nth))
        self.direction = direction
        self.nbytes = nbytes
        self.packet_type = packet_type
        self.nth = nth
        self.when = when
        self.reset = reset
        self._event = threading.Event()

    @property
    def fired(self):
        return self._event.is_set()

    def wait(self, timeout_s=60):
        """Wait for it.  Raises TimeoutError if it does not happen."""
        if not self._event.wait(timeout_s):
            raise TimeoutError("the cut has not happened within %d s" % timeout_s)

    def _reached(self, packet_type, at_end):
        """Count a packet that begins or ends; True if the cut falls due there."""
        if packet_type != self.packet_type or at_end != (self.when == "after"):
            return False
        self.nth -= 1
        return self.nth == 0

    def _fire(self):
        self._event.set()


class _Link:
    """A device's connection and the broker's that belongs to it."""

    def __init__(self, device):
        self.device = device
        self.broker = None
        self.swallowed = False
        self.cut = False
        self.pumps = 0
        self.tasks = []

    def sockets(self):
        return [s for s in (self.device, self.broker) if s is not None]


class Proxy:
    """Listens on 127.0.0.1:.port and connects each device to 127.0.0.1:target.

    target may be changed at any time; it counts for the next connection.  on_packet(direction, packet): called in the
    proxy's thread with each whole packet's bytes before they go out; packets that are cut or swallowed are not shown.

    on_packet must not call the proxy.

    Counters, see counters(): "connections", "refused_by_target", "cuts", "swallowed_bytes", "closed_by_device",
    "closed_by_broker"; of what was forwarded (direction, "bytes") and, whole packets, (direction, packet_type).
    """

    def __init__(self, target, port=0, on_packet=None):
        self.target = target
        self.port = port
        self._on_packet = on_packet
        self._counts = collections.Counter()
        self._news = threading.Condition()
        self._links = set()
        self._cuts = []
        self._delay_s = 0
        self._chunk = 0
        self._swallowing = False
        self._port_holder = None
        self._listener = None
        self._accepting = None
        self._loop = None
        self._thread = None

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.close()

    def start(self):
        """Listen and forward.  Raises OSError if the port is taken."""
        # Bound but never listening, it keeps the port while refuse() has closed the listener.
        self._port_holder = self._bind()
        self.port = self._port_holder.getsockname()[1]
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._call(self._listen)

    def close(self):
        """Close every connection and the port, and end the thread."""
        if self._thread is None:
            return
        asyncio.run_coroutine_threadsafe(self._close_all(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._thread = None

    def counters(self):
        """A copy of the counters; what has not happened counts 0."""
        with self._news:
            return collections.Counter(self._counts)

    def wait(self, check, timeout_s=60):
        """Wait until check(counters) is true.  Raises TimeoutError.  check must not wait or call the proxy."""
        with self._news:
            if not self._news.wait_for(lambda: check(self._counts), timeout_s):
                raise TimeoutError("not reached within %d s: %r" % (timeout_s, dict(self._counts)))

    @property
    def open_links(self):
        """How many connections are open, swallowed ones included."""
        return self._call(lambda: len(self._links))

    def cut(self, reset=True):
        """Close every connection now, by RST or, without reset, by FIN.  Returns how many there were."""
        return self._call(self._cut_all, reset)

    def cut_after(self, direction, nbytes, reset=True):
        """Cut the connection that carries the nbytes-th byte from now on, after exactly that many.

        Returns a Cut.  With nbytes 0 the next byte to come is not let through.
        """
        return self._call(self._order, Cut(direction, nbytes=nbytes, reset=reset))

    def cut_at_packet(self, direction, packet_type, nth=1, when="before", reset=True):
        """Cut at the nth packet of a type that begins from now on, on whatever connection.  Returns a Cut.

        when: "before" lets nothing of it through, "inside" its first byte, "after" all of it and no answer.
        As with cut_after(), what was let through reaches its receiver: its connection ends by FIN.  The sender's ends
        by RST or, without reset, by FIN.
        """
        return self._call(self._order, Cut(direction, packet_type=packet_type, nth=nth, when=when, reset=reset))

    def cancel_cuts(self):
        """Forget the cuts that have not happened."""
        self._call(self._cuts.clear)

    def refuse(self):
        """Refuse new connections (ECONNREFUSED) until accept(); those that are open go on."""
        self._call(self._refuse)

    def accept(self):
        """Accept and forward new connections again.  Swallowed ones stay dead until an end closes them or cut()."""
        self._call(self._accept)

    def swallow(self):
        """Go half-open until accept(): connections stay up, new ones are accepted, and not a byte comes through."""
        self._call(self._swallow)

    def delay(self, delay_ms):
        """Hold back what comes by delay_ms, both ways; as on a long link, what comes meanwhile is on its way, too."""
        self._delay_s = delay_ms / 1000

    def chunk(self, nbytes):
        """Forward in pieces of at most nbytes; 0: as they come.  TCP may join pieces again."""
        self._chunk = nbytes

    # What follows runs in the proxy's thread, but for _call().

    def _call(self, function, *args):
        """Run function in the proxy's thread and return its result."""

        async def call():
            return function(*args)

        return asyncio.run_coroutine_threadsafe(call(), self._loop).result()

    def _count(self, key, n=1):
        with self._news:
            self._counts[key] += n
            self._news.notify_all()

    def _order(self, cut):
        self._cuts.append(cut)
        return cut

    def _bind(self):
        sock = socket.socket()
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(("127.0.0.1", self.port))
        except OSError:
            sock.close()
            raise
        return sock

    def _listen(self):
        self._listener = self._bind()
        self._listener.setblocking(False)
        self._listener.listen(100)
        self._accepting = self._loop.create_task(self._accept_links())

    def _unlisten(self):
        if self._accepting is not None:
            self._accepting.cancel()
            self._accepting = None
            self._close_socket(self._listener, False)

    def _refuse(self):
        self._swallowing = False
        self._unlisten()

    def _accept(self):
        self._swallowing = False
        if self._accepting is None:
            self._listen()

    def _swallow(self):
        self._accept()
        self._swallowing = True
        for link in self._links:
            link.swallowed = True

    async def _close_all(self):
        tasks = [task for link in self._links for task in link.tasks]
        if self._accepting is not None:
            tasks.append(self._accepting)
            self._unlisten()
        for link in list(self._links):
            self._end(link, True)
        self._port_holder.close()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _cut_all(self, reset):
        links = [link for link in self._links if not link.cut]
        for link in links:
            if reset:
                self._end(link, True)
            else:
                self._finish(link, link.sockets())
            self._count("cuts")
        return len(links)

    def _close_socket(self, sock, reset):
        if sock.fileno() < 0:
            return
        # asyncio must forget the number before the system gives it to another socket.
        self._loop.remove_reader(sock)
        self._loop.remove_writer(sock)
        if reset:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.close()

    def _cancel_tasks(self, link):
        for task in link.tasks:
            if task is not asyncio.current_task():
                task.cancel()

    def _end(self, link, reset):
        """Close both sides of a link now."""
        link.cut = True
        self._links.discard(link)
        self._cancel_tasks(link)
        for sock in link.sockets():
            self._close_socket(sock, reset)

    def _finish(self, link, gently):
        """Close the sides in gently by FIN, what was sent to them delivered; the others by RST."""
        link.cut = True
        self._cancel_tasks(link)
        for sock in link.sockets():
            if sock not in gently:
                self._close_socket(sock, True)
        link.tasks = [self._loop.create_task(self._drain(link, gently))]

    async def _drain(self, link, socks):
        """End what goes to each socket, read it to its end, close it: closed with bytes unread it would reset."""
        for sock in socks:
            # One that was reset or never connected is closed all the same.
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_WR)
        for sock in socks:
            with contextlib.suppress(OSError):
                while await self._loop.sock_recv(sock, _READ_BYTES):
                    pass
        self._end(link, False)

    async def _accept_links(self):
        while True:
            device, _ = await self._loop.sock_accept(self._listener)
            device.setblocking(False)
            device.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            link = _Link(device)
            link.swallowed = self._swallowing
            self._links.add(link)
            link.tasks.append(self._loop.create_task(self._connect(link)))
            self._count("connections")

    async def _connect(self, link):
        """Connect to the target and start forwarding."""
        directions = [UP]
        if not link.swallowed:
            link.broker = socket.socket()
            link.broker.setblocking(False)
            try:
                await self._loop.sock_connect(link.broker, ("127.0.0.1", self.target))
            except OSError:
                self._count("refused_by_target")
                self._end(link, True)
                return
            link.broker.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            directions.append(DOWN)
        link.pumps = len(directions)
        for direction in directions:
            link.tasks.append(self._loop.create_task(self._pump(link, direction)))

    async def _pump(self, link, direction):
        """Forward one direction until it ends, then pass the end on."""
        source, sink = (link.device, link.broker) if direction == UP else (link.broker, link.device)
        reset = False
        try:
            if await self._forward(link, direction, source, sink):
                return
        except OSError:
            reset = True
        self._count("closed_by_device" if direction == UP else "closed_by_broker")
        link.pumps -= 1
        if link.pumps == 0 or (reset and not link.swallowed):
            self._end(link, reset)
        elif not link.swallowed and not link.cut:
            try:
                sink.shutdown(socket.SHUT_WR)
            except OSError:
                self._end(link, True)

    async def _forward(self, link, direction, source, sink):
        """Forward until source ends (False) or a cut falls due (True).  OSError if either end was reset."""
        scanner = PacketScanner()
        partial = bytearray()
        line = asyncio.Queue(_LINE)
        link.tasks.append(self._loop.create_task(self._read(source, line)))
        while True:
            due, data = await line.get()
            left_s = due - self._loop.time()
            if left_s > 0:
                await asyncio.sleep(left_s)
            if isinstance(data, OSError):
                raise data
            if not data:
                return False
            if link.swallowed or link.cut:
                self._count("swallowed_bytes", len(data))
                continue
            n, cut, packets = self._scan(direction, scanner, partial, data)
            if cut:
                # Both directions stop here and now: no answer slips through while the rest goes out.
                link.cut = True
                self._cuts.remove(cut)
            if self._on_packet:
                for packet in packets:
                    self._on_packet(direction, packet)
            try:
                await self._send(sink, data[:n])
                with self._news:
                    self._counts[direction, "bytes"] += n
                    for packet in packets:
                        self._counts[direction, packet[0] >> 4] += 1
                    self._news.notify_all()
            finally:
                if cut:
                    self._finish(link, [sink] if cut.reset else [sink, source])
                    self._count("cuts")
                    cut._fire()
            if cut:
                return True

    async def _read(self, source, line):
        """Put what comes into line, each piece with the time at which it may go on: (time, bytes, b"" or OSError)."""
        data = None
        while data != b"":
            try:
                data = await self._loop.sock_recv(source, _READ_BYTES)
            except OSError as e:
                await line.put((self._loop.time() + self._delay_s, e))
                return
            await line.put((self._loop.time() + self._delay_s, data))

    async def _send(self, sink, data):
        step = self._chunk or len(data)
        view = memoryview(data)
        for pos in range(0, len(data), step or 1):
            await self._loop.sock_sendall(sink, view[pos : pos + step])
            if self._chunk:
                await asyncio.sleep(0)

    def _scan(self, direction, scanner, partial, data):
        """How much of data may go out: (bytes, the Cut that falls due there or None, whole packets ending in it)."""
        limit, due = len(data), None
        cuts = [cut for cut in self._cuts if cut.direction == direction]
        for cut in cuts:
            if cut.nbytes is not None and cut.nbytes <= limit:
                limit, due = cut.nbytes, cut
        packets = []
        pos = 0
        while pos < limit:
            if scanner.have == 0:
                for cut in cuts:
                    if cut._reached(data[pos] >> 4, at_end=False):
                        limit, due = pos + (cut.when == "inside"), cut
                        break
                if pos == limit:
                    break
            end = scanner.step(data, pos, limit)
            if not scanner.lost:
                partial += data[pos:end]
            pos = end
            if scanner.complete:
                packets.append(bytes(partial))
                del partial[:]
                scanner.next_packet()
                for cut in cuts:
                    if cut._reached(scanner.packet_type, at_end=True):
                        limit, due = pos, cut
                        break
        for cut in cuts:
            if cut.nbytes is not None:
                cut.nbytes -= limit
        return limit, due, packets
