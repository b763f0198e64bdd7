"""Where the journal lives: turns the home named in the configuration into a block device.

Owns the choice and the search order; knows nothing of records or MQTT.  Each home is a module of its own, loaded only
when it is the one used, and what only opens it is not kept.
"""

from ..once import once


def open_home(home, size, anew=False):
    """Return (device, prog_size, size in bytes) of the journal's home.

    home: "auto" | "partition:LABEL" | "pinned" | "pinned:DIRECTORY" | "gap" | "file:PATH" | "ram".  auto is the ESP32
    data partition "mqj" if there is one, else on a board "pinned", on a host the file journal.bin in the current
    directory.
    size: bytes, for a home that has to be made; a multiple of 4096, at least 16384.  What exists keeps its own size.
    anew: the home was lost while in use (JournalLost): what is left there is no journal any more.
    Raises ValueError for a bad argument, JournalUnavailable if the home is not there or cannot be used.
    """
    return once("flash.homes", "open_home", home, size, anew)


def resolve(home):
    """Return home, or what "auto" stands for here.  Raises ValueError for a bad argument."""
    return once("flash.homes", "resolve", home)
