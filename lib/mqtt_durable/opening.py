"""What a client is made of, and its journal after the flash has failed: loaded for that, see once.py, and no longer.

Every attribute of the client has its first value here.
"""

import time
from asyncio import Event
from collections import deque

from micropython import const

from .errors import JournalLost, JournalUnavailable
from .flash import open_home, resolve
from .journal import Journal
from .log import ERROR, INFO, WARNING, Log
from .once import once
from .packet import Decoder, put_publish_head
from .store import identity
from .transport import Addresses

# As in client.py.
_SEND_BYTES = const(768)
_INBOX = const(16)

_RECEIVE_BYTES = const(768)
_RAM_BYTES = const(32768)  # of a journal that lost its home


def make(
    client,
    config,
    device=None,
    link=None,
    will=None,
    prog_size=4,
    backoff_ms=(1000, 60000),
    answer_ms=10000,
    limit_bytes=4096,
    properties=None,
    authenticate=None,
):
    """Give a Client all that it has, and mount its journal.  Arguments, and what it raises: see there."""
    broker = config["broker"]
    journal = config["journal"]
    session = config["session"]
    levels = config.get("log") or {}
    wifi = config.get("wifi") or {}
    client.log = Log(
        levels.get("level", "info"),
        levels.get("console", "warning"),
        (broker["password"], wifi.get("password")),
    )
    client.client_id = once("board_id", "client_id", config)
    client._broker = broker
    client._tls = None
    if broker.get("tls"):
        from .tls import TLS

        client._tls = TLS(broker["tls"], broker["host"])
    client._keep_alive(broker["keep_alive_s"])
    client._clean = session["clean"]
    client._identity = identity(client.client_id, broker["host"], broker["port"])
    client._waits = journal["when_full"] == "wait"
    client._grace_ms = journal["grace_ms"] if journal.get("durability") == "grace" else 0
    client._will = will
    client._link = link
    client._addresses = Addresses(broker["host"], broker["port"])
    client._backoff_ms = backoff_ms
    client._answer_ms = answer_ms
    client._stream = None
    client._files = None  # a files.Files, once the program wants one
    if client._version == 5:
        client._decoder = client._set_up(config, limit_bytes, properties, authenticate)
    elif properties or authenticate:
        raise ValueError("properties: only with version 5")
    else:
        client._decoder = Decoder(_RECEIVE_BYTES, limit_bytes)
        client._put_head = put_publish_head
    client._connect_packet(True)  # a bad argument shows here, not in the field
    size = None
    client.journal_home = "device"  # where the journal lives
    client._home = None  # that, and its bytes, if it can be opened anew
    if device is None:
        client.journal_home = resolve(journal["home"])
        client._home = client.journal_home, journal["size_kib"] * 1024
        device, prog_size, size = open_home(*client._home)
    client._device = device
    note = getattr(device, "note", None)  # what of an older journal there was lost
    client.journal_lost = 1 if note else 0
    client.last_error = None  # what ended the last connection or attempt
    client._stepped = time.ticks_ms()
    if note:
        _lost(client, JournalLost(note))
    client.store = client._Store(
        Journal(device, prog_size, size), session["in_flight"], journal["when_full"], None, client._grace_ms > 0
    )
    client.store.open()
    _log(client)

    client.connected = False
    client.session_present = False
    client.on_connect = None  # called with session_present after each CONNACK
    client._send = memoryview(bytearray(_SEND_BYTES))
    client._quick = False  # the writer waits for something to do: whoever has something may write
    client._burst = 0
    client._run_task = None
    client._down = Event()  # the connection has failed
    client._wake = Event()  # the writer has something to do
    client._sent = Event()  # the writer has made room
    client._progress = Event()  # messages were acknowledged
    client._arrived = Event()  # for the dispatcher
    client._accepted = Event()  # by the dispatcher
    client._said = Event()  # DISCONNECT has gone out
    client._leaving = False
    client._attempt = 0
    client._renewing = False  # the broker said that it has no session, and that is not recorded yet
    client._epoch = 0  # counts the sessions at the broker: a message belongs to the one it came in
    client._last_sent = client._last_received = 0
    client._ping_at = None  # ticks_ms of the PINGREQ that is not answered yet
    client._put_at = None  # ticks_ms of the piece that the broker has not taken yet
    client._address = None  # the link's, when the connection began
    client._young = []  # (packet identifier, ticks_ms) of the messages in their grace, oldest first
    client._aging = Event() if client._grace_ms else None  # there are some
    client._outbox = []
    client._inbox = deque((), _INBOX)
    client._inbox_bytes = 0
    client._handling = None  # the message whose handler is running
    client._blocked = False  # the reader waits for room in the inbox
    client._passed_over = False  # it did so in vain: see _pass_over()
    client._handlers = []
    client._wanted = {}  # topic filter -> QoS, of every subscription the program has asked for
    client._requests = []
    client._waiters = {}  # packet identifier -> Waiter
    client.connections = client.received = client.handler_errors = client.discarded = client.too_large = 0
    client.protocol_errors = client.passed_over = 0
    # What each message goes through is bound once.  That saves the search for a method, and with 74 attributes or more
    # MicroPython's table of them, which grows only when it is full, has room: then what is not in it is seen at once.
    for name in ("publish", "_publish", "_send_now", "_write_now", "_on_publish", "_flush", "_Message"):
        setattr(client, name, getattr(client, name))


def remount(client):
    """After a failure of the flash what it holds is what counts.  Only while there is no connection.  OSError."""
    store = client.store
    waiting = store.waiting()
    try:
        store.open()
    except JournalLost as e:
        _move(client, e, waiting)
    _log(client)
    for message in [client._handling] + list(client._inbox):
        if message is not None and message._flags & 6 and message._id >> 16 == client._epoch:
            store.session.busy.add(message._id & 0xFFFF)
    client._sweep()


def _move(client, error, waiting):
    """The journal's home is lost for good, and so is what waited there: make a new one, there or else in RAM."""
    device = None
    why = ""
    if client._home is not None:
        try:
            device, prog_size, size = open_home(*client._home, True)
        except (JournalUnavailable, OSError) as e:
            why = " (%s)" % e
    if device is None:
        client.journal_home = "ram, for %s was lost" % client.journal_home
        device, prog_size, size = open_home("ram", _RAM_BYTES)
    client._device = device
    store = client.store
    store.journal = Journal(device, prog_size, size)
    store.session.limit = min(store.session.limit, 4 * store.journal.sectors)
    store.open()
    store.lost += waiting - store.waiting()
    client.journal_lost += 1
    _lost(client, JournalLost("%s; the journal begins anew in %s%s" % (error, client.journal_home, why)))


def _lost(client, error):
    client.last_error = error
    client.log.add(ERROR, "journal", error)


def _log(client):
    """The journal has been mounted."""
    journal = client.store.journal
    if journal.damaged:
        client.log.add(WARNING, "journal: %d records are damaged" % journal.damaged)
    state = "new" if journal.fresh else "%d messages wait" % client.store.waiting()
    client.log.add(INFO, "journal in %s: %s" % (client.journal_home, state))
