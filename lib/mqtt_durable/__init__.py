"""An MQTT client that loses nothing: what publish() has accepted at QoS 1 or 2 survives power loss.

    from mqtt_durable import Client, load_config

Names are loaded on first use, so that a program pays only for what it uses.
"""

__version__ = "0.1.0"

_WHERE = {
    "Client": "client",
    "Message": "client",
    "MQTTClient": "simple",
    "Journal": "journal",
    "Store": "store",
    "MessageRefused": "reasons",
    "Disconnected": "reasons",
}


def load_config(path="config.json"):
    """Return the configuration in the file at path, checked and completed.  Raises ConfigError, see config.load()."""
    from .once import once

    return once("config", "load", path)


def __getattr__(name):
    where = _WHERE.get(name, "errors")
    if name[0] == "_":
        raise AttributeError(name)
    if where == "errors" and name[0] > "Z":
        # MicroPython asks here before it looks for a module of that name.
        try:
            return __import__("mqtt_durable." + name, None, None, (name,))
        except ImportError:
            raise AttributeError(name)
    module = __import__("mqtt_durable." + where, None, None, (where,))
    found = globals()[name] = getattr(module, name)
    return found
