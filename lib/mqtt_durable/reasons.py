"""The reason codes of MQTT 5 as text.  Loaded by version 5 only."""

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
