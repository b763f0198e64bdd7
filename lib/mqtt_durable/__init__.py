"""An MQTT client that loses nothing: what publish() has accepted at QoS 1 or 2 survives power loss.

    from mqtt_durable import Client, load_config

Names are loaded on first use, so that a program pays only for what it uses.
"""

__version__ = "0.1.0"

_WHERE = {"Client": "client", "Message": "client", "load_config": "config", "Journal": "journal", "Store": "store"}


def __getattr__(name):
    module = _WHERE.get(name, "errors")
    found = getattr(
        __import__("mqtt_durable." + module, None, None, (module,)), "load" if name == "load_config" else name
    )
    globals()[name] = found
    return found
