"""The board's own number, and the client identifier that is made of it."""

from .errors import ConfigError


def client_id(config):
    """Return the client identifier: as configured, or for "auto" one made of the board's own number.

    The same after every reboot, as a stored session needs it; at most 23 bytes when made here (MQTT 3.1.1 section
    3.1.3.1: what every broker accepts).  Raises ConfigError for "auto" where there is no such number: a random one
    would leave the session and its messages behind at the broker.
    """
    if config["client_id"] != "auto":
        return config["client_id"]
    number = unique_id()
    if number is None:
        why = 'client_id: found "auto", expected a text of 1-128 bytes, because this machine has no machine.unique_id()'
        raise ConfigError([why])
    return "mqj-" + "".join(["%02x" % byte for byte in number[-9:]])


def unique_id():
    """Return the board's number as bytes, None where it has none."""
    try:
        from machine import unique_id
    except ImportError:
        return None
    return unique_id()
