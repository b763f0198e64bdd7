"""Payloads that need not fit the heap: received into a file, sent from one.  Loaded when a program asks for it.

Bytes go between the connection and the file through the client's own two buffers.  Nothing of a message is in the
journal but, at QoS 2, its packet identifier: a payload cut short is sent again from its beginning, by the broker or by
publish().  Reading and writing the file blocks the event loop, each time as long as the file system takes for a piece
of up to 768 bytes, the erasing of a flash block included.
"""

import asyncio
import errno
import os

from .errors import JournalFull, ProtocolError
from .packet import PUBACK, PUBREL, check_topic, matches, put_publish_head

_LARGEST = 268435455  # a remaining length (MQTT 3.1.1 section 2.2.3)


class Files:
    """What a client has to do with files."""

    def __init__(self, client):
        self._client = client
        self.parts = set()  # the files of messages that are being received, or wait for their handler
        self.upload = None  # the Upload that is being sent, or waits for a connection or for its PUBACK
        self._lock = asyncio.Lock()

    def clear(self):
        """The client is closed: the messages that wait for their handler come again."""
        for part in self.parts:
            _remove(part)
        self.parts.clear()

    # -- receiving

    def sink(self):
        """The Sink for the PUBLISH that the decoder has, None if it is to be taken as any other.

        One that is too large for its sink loses its payload: it is only to be acknowledged.
        """
        decoder = self._client._decoder
        for topic_filter, handler in self._client._handlers:
            if matches(topic_filter, decoder.topic):
                if not isinstance(handler, Sink):
                    break
                if _size(decoder) <= handler.limit_bytes:
                    return handler
                decoder.payload = None
                break
        return None

    # -- sending

    @property
    def due(self):
        """Whether the writer is to send .upload now.

        At QoS 1 it is when the broker has acknowledged all that was sent before: what is sent again after the link was
        lost then keeps its order [MQTT-4.6.0-1], the file first.
        """
        upload = self.upload
        if upload is None or not upload.due or self._client._leaving:
            return False
        store = self._client.store
        store.hold = upload.packet_id and not upload.begun
        return not store.hold or store.in_flight() <= 0

    async def publish(self, topic, path, qos, retain):
        """See Client.publish_file()."""
        client = self._client
        upload = Upload(client, topic, path, qos, retain)
        async with self._lock:
            if not qos and not client.connected:
                client.discarded += 1
                return False
            session = client.store.session
            if qos:
                upload.packet_id = session.request_id()
                if not upload.packet_id:
                    raise JournalFull("no free packet identifier: 512 requests wait for the broker")
            self.upload = upload
            client._wake.set()
            try:
                await upload.ended.wait()
            finally:
                self.upload = None
                client.store.hold = False
                client._wake.set()
                if upload.ended.is_set() or not (upload.half or upload.sent):
                    session.requests.discard(upload.packet_id)
                elif upload.half:  # cancelled in the middle of the packet
                    client._down.set()
        if upload.error is not None:
            raise upload.error
        return upload.delivered

    def connected(self):
        """A connection begins."""
        upload = self.upload
        if upload is not None:
            self._client.store.session.requests.add(upload.packet_id)
            upload.due = True
            upload.sent = False

    def disconnected(self):
        """The connection is over."""
        upload = self.upload
        if upload is not None and not upload.packet_id and not upload.ended.is_set():
            self._client.discarded += 1
            upload.end(False)

    def on_ack(self, kind, packet_id):
        """An acknowledgement came: return whether it was for a file."""
        upload = self.upload
        if upload is None or upload.packet_id != packet_id or kind == PUBREL:  # which has identifiers of the broker's
            return False
        if kind != PUBACK or not upload.sent:
            raise ProtocolError("packet type %d for a file" % kind)
        code = 0
        if self._client._version == 5:
            code = self._client._decoder.reason_code
            self._client.store.beside(-1)
        if code < 0x80:
            upload.end(True)
        else:
            upload.end(False, self._client._undelivered(packet_id, code))
        return True


class Sink:
    """The handler of on_file(): receives payloads into a file, and gives them to the program's handler.

    A payload is in the part file until the handler's turn, and only then takes the place of the one before.
    """

    def __init__(self, files, path, handler, limit_bytes):
        if not isinstance(path, str) or not path:
            raise ValueError("path: expected text")
        self._files = files
        self._client = files._client
        self._path = path
        self._part = path + ".part"
        self._handler = handler
        self.limit_bytes = limit_bytes
        if not self.taken:
            _remove(self._part)  # power failed while it was being written

    @property
    def taken(self):
        """Whether a message is in the part file already."""
        return self._part in self._files.parts

    async def receive(self, message):
        """Write the payload of the message that the decoder has.  The failure of a file becomes message.error."""
        client = self._client
        decoder = client._decoder
        message._sink = self
        message.size = _size(decoder)
        piece = decoder.payload
        message.payload = None
        if piece is None:
            piece = decoder.piece()
        parts = self._files.parts
        file = None
        parts.add(self._part)
        complete = False
        try:
            while True:
                if message.error is None:
                    try:
                        if file is None:
                            file = open(self._part, "wb")
                        file.write(piece)
                        if not decoder.left:
                            file.close()  # on littlefs this is what makes it last
                    except OSError as e:
                        self._fail(message, e)
                if not decoder.left:
                    break
                await client._receive()
                piece = decoder.piece()
            complete = message.error is None
        finally:
            if not complete:
                if file is not None:
                    try:
                        file.close()
                    except OSError:
                        pass
                _remove(self._part)
                parts.discard(self._part)

    def __call__(self, message):
        # Without a sink of its own it came before on_file(), and has its payload.
        if message._sink is not None and message.error is None:
            try:
                os.rename(self._part, self._path)
                message.path = self._path
            except OSError as e:
                _remove(self._part)
                self._fail(message, e)
            self._files.parts.discard(self._part)
        return self._handler(message)

    def _fail(self, message, error):
        message.error = error
        self._client._failed(error)


class Upload:
    """A file that is being published.  .packet_id: 0 at QoS 0.  .half: the packet has begun and not ended.  .sent: it
    has been sent on this connection.  .ended: event; then .error or .delivered tells."""

    def __init__(self, client, topic, path, qos, retain):
        if qos not in (0, 1):
            raise ValueError("qos: found %r, expected 0 or 1; at 2 publish the file's name, or pieces of it" % (qos,))
        self._client = client
        self._topic = check_topic(topic)
        self._path = path
        self._first = 0x30 | qos << 1 | (1 if retain else 0)
        self.begun = False  # perhaps the broker has it
        self.packet_id = 0
        self.half = self.sent = self.delivered = False
        self.due = True
        self.error = None
        self.ended = asyncio.Event()
        self._size()

    def end(self, delivered, error=None):
        self.due = False
        self.delivered = delivered
        self.error = error
        self.ended.set()

    def _size(self):
        """Bytes of the file.  Raises OSError, ValueError."""
        size = os.stat(self._path)[6]
        if size + len(self._topic) + 4 > _LARGEST:
            raise ValueError("%s: %d bytes are more than a message can have" % (self._path, size))
        return size

    async def send(self):
        """Send the whole packet.  Raises OSError if that cannot be: the connection is of no more use then."""
        client = self._client
        buf = client._send
        self.due = False
        client.store.hold = False
        try:
            left = self._size()
            if client._version == 5:
                client._check_file(self._first, len(self._topic) + left)
            file = open(self._path, "rb")
        except (OSError, ValueError) as e:
            self.end(False, e)
            return
        try:
            first = self._first
            if self.packet_id and self.begun and client.session_present:
                first |= 8
            self.begun = self.half = True
            more = 0
            if client._version == 5:
                more = 1  # the property length
                if self.packet_id:
                    client.store.beside(1)
            head = bytearray(len(self._topic) + 10)
            off = put_publish_head(head, 0, first, self._topic, self.packet_id, left + more)
            piece = memoryview(head)[: off + more]
            while True:
                self.sent = not left  # before it is known: the PUBACK may be quicker
                await client._put(piece)
                client._last_received = client._last_sent  # as long as the other side takes bytes the link is alive
                if not left:
                    break
                try:
                    n = file.readinto(buf[: min(left, len(buf))])
                    if not n:
                        raise OSError(errno.EIO, "%s has become shorter while it was sent" % self._path)
                except OSError as e:
                    self.end(False, e)
                    raise
                left -= n
                piece = buf[:n]
            if not self.packet_id:
                self.end(True)
        finally:
            self.half = False
            file.close()


def _size(decoder):
    """Bytes of the payload of the PUBLISH that the decoder has."""
    return decoder.left if decoder.payload is None else len(decoder.payload)


def _remove(path):
    try:
        os.remove(path)
    except OSError:
        pass
