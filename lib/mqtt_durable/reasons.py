"""The reason codes of MQTT 5 as text, and the errors that carry one.  Loaded by version 5, and by MQTT 3.1.1 for the
words of a refusal only, see once.py."""

from .errors import ConnectRefused, MQTTError, SubscribeRefused

# Section 2.4.  Below 0x80 the meaning depends on the packet; what is here is true in each.
_GOOD = {
    0x00: "success",
    0x01: "granted QoS 1",
    0x02: "granted QoS 2",
    0x04: "disconnect with will message",
    0x10: "no matching subscribers",
    0x11: "no subscription existed",
    0x18: "continue authentication",
    0x19: "re-authenticate",
}
# From 0x80 on, without a gap.
_BAD = (
    "unspecified error;malformed packet;protocol error;implementation specific error;unsupported protocol version;"
    "client identifier not valid;bad user name or password;not authorized;server unavailable;server busy;banned;"
    "server shutting down;bad authentication method;keep alive timeout;session taken over;topic filter invalid;"
    "topic name invalid;packet identifier in use;packet identifier not found;receive maximum exceeded;"
    "topic alias invalid;packet too large;message rate too high;quota exceeded;administrative action;"
    "payload format invalid;retain not supported;QoS not supported;use another server;server moved;"
    "shared subscriptions not supported;connection rate exceeded;maximum connect time;"
    "subscription identifiers not supported;wildcard subscriptions not supported"
)


def text(reason_code):
    """Return the code and its name, as "0x87 not authorized"."""
    if reason_code < 0x80:
        name = _GOOD.get(reason_code)
    else:
        names = _BAD.split(";")
        name = names[reason_code - 0x80] if reason_code - 0x80 < len(names) else None
    return "0x%02x %s" % (reason_code, name or "unknown reason")


def refused(return_code):
    """Return what CONNACK's return code means in MQTT 3.1.1 (section 3.2.2.3), and what follows from it."""
    told = "return code %d" % return_code
    if 1 <= return_code <= 5:
        told = (
            "it does not speak MQTT 3.1.1;it does not accept the client_id;it is unavailable;"
            "bad user name or password;not authorised"
        ).split(";")[return_code - 1]
    told = "broker refused the connection: " + told
    return told if return_code == 3 else told + "; it is only asked again at the longest pause"


# What only a person can mend, or would only come again: the next attempt is at the longest pause at once.  Not
# authorized, banned, session taken over, quota exceeded, another server, ...
_LASTING = b"\x84\x85\x86\x87\x8a\x8c\x8e\x90\x95\x97\x99\x9a\x9b\x9c\x9d"


class ConnectRefused5(ConnectRefused):
    """CONNACK carried a reason code of 0x80 or more (MQTT 5.0 section 3.2.2.2).

    .reason_code; .return_code is the same.  .properties: CONNACK's, reason_string and server_reference among them.
    """

    def __init__(self, reason_code, properties):
        super().__init__(reason_code, _told("broker refused the connection", reason_code, properties))
        self.reason_code = reason_code
        self.properties = properties
        self.lasting = reason_code in _LASTING


class Disconnected(MQTTError):
    """The broker has ended the connection by DISCONNECT (MQTT 5.0 section 3.14).

    .reason_code, .properties: reason_string and server_reference among them.
    """

    def __init__(self, reason_code, properties):
        super().__init__(_told("the broker ended the connection", reason_code, properties))
        self.reason_code = reason_code
        self.properties = properties
        self.lasting = reason_code in _LASTING


class MessageRefused(MQTTError):
    """The broker refused the message, and it is finished.  .reason_code: 0x80 or more (MQTT 5.0 section 3.4.2.1)."""

    def __init__(self, packet_id, reason_code):
        super().__init__("message %d: %s" % (packet_id, text(reason_code)))
        self.reason_code = reason_code


class SubscribeRefused5(SubscribeRefused):
    """SUBACK or UNSUBACK carried a reason code of 0x80 or more (MQTT 5.0 sections 3.9.3, 3.11.3).

    .filter, .reason_code.
    """

    def __init__(self, topic_filter, reason_code):
        super().__init__("%s: %s" % (topic_filter, text(reason_code)))
        self.filter = topic_filter
        self.reason_code = reason_code


def _told(what, reason_code, properties):
    told = "%s: %s" % (what, text(reason_code))
    if "reason_string" in properties:
        told += ', "%s"' % properties["reason_string"]
    if "server_reference" in properties:
        told += "; it names %s" % properties["server_reference"]
    return told
