"""What every entry sends: 24 bytes of topic, 64 of payload."""

TOPIC = b"bench/plant/7/mast/wind1"
PAYLOAD = b"0123456789abcdef" * 4
HOST = "127.0.0.1"
IN_FLIGHT = 16


def numbered(n):
    """The payload of number n, where it counts which of them arrive."""
    return b"%07d " % n + PAYLOAD[:56]
