"""Code that is needed once: it is not there any more afterwards, unless somebody else has it."""

import gc
import sys

import mqtt_durable
from mqtt_durable import flash
from mqtt_durable.errors import ConfigError
from mqtt_durable.once import once
from raises import raises
from skip import SkipTest

CONFIG = "mqtt_durable.config"
MOUNT = "mqtt_durable.mount"
RAM = "mqtt_durable.flash.ram"


def away(name):
    """Have a module not be loaded; return it, None if it was not."""
    package, _, leaf = name.rpartition(".")
    module = sys.modules.get(name)
    if module is not None:
        del sys.modules[name]
    if leaf in sys.modules[package].__dict__:
        delattr(sys.modules[package], leaf)
    return module


def without(name, function):
    """Call function() with a module not loaded, then put that back."""
    module = away(name)
    try:
        return function()
    finally:
        away(name)
        if module is not None:
            package, _, leaf = name.rpartition(".")
            sys.modules[name] = module
            setattr(sys.modules[package], leaf, module)


def alive():
    if sys.implementation.name != "micropython":
        raise SkipTest("CPython does not tell")
    gc.collect()
    return gc.mem_alloc()


def gone(name, package):
    return name not in sys.modules and name.rpartition(".")[2] not in package.__dict__


def test_a_module_that_was_called_once_is_gone_with_its_result_there():
    def body():
        assert once("config", "check", {})[0].startswith("wifi.ssid: found nothing")
        assert gone(CONFIG, mqtt_durable)
        assert once("config", "check", 1) == ["config: found a number, expected an object"]  # and again
        assert gone(CONFIG, mqtt_durable)

    without(CONFIG, body)


def test_it_is_gone_when_it_raises_too():
    def body():
        raises(ConfigError, mqtt_durable.load_config, "there is no such file")
        assert gone(CONFIG, mqtt_durable)

    without(CONFIG, body)


def test_one_in_a_package_below_is_gone_too_and_its_package_is_not():
    def body():
        assert once("flash.ram", "RamDevice", 16384).ioctl(4, 0) == 4
        assert gone(RAM, flash) and sys.modules["mqtt_durable.flash"] is flash

    without(RAM, body)


def test_what_somebody_else_has_loaded_stays():
    def body():
        from mqtt_durable import config

        assert once("config", "check", 1) == config.check(1)
        assert sys.modules[CONFIG] is config and mqtt_durable.config is config

    without(CONFIG, body)


def test_a_module_that_is_not_there_is_an_import_error():
    raises(ImportError, once, "no_such_module", "call")


def test_the_heap_has_the_code_back():

    def body():
        once("config", "check", 1)  # names stay
        before = alive()
        __import__(CONFIG)
        size = alive() - before
        away(CONFIG)
        once("config", "check", 1)
        assert size > 5000 and alive() - before < size // 4

    without(CONFIG, body)


def test_a_store_does_not_keep_the_code_that_has_mounted_it():
    from mqtt_durable.flash.ram import RamDevice
    from mqtt_durable.journal import Journal
    from mqtt_durable.store import Store

    def body():
        __import__("mqtt_durable.replay")
        size = alive()
        away("mqtt_durable.replay")
        size -= alive()
        store = Store(Journal(RamDevice(16384)))
        store.open()
        held = alive()
        store.restore = store.replay = store.moved = None
        assert size > 2000 and held - alive() < size // 4

    without("mqtt_durable.replay", body)


def test_a_journal_does_not_keep_the_code_that_has_mounted_it():
    from ledger import Ledger
    from mqtt_durable.flash.ram import RamDevice

    def body():
        ledger = Ledger(RamDevice(16384))  # names stay
        before = alive()
        __import__(MOUNT)
        size = alive() - before
        away(MOUNT)
        before = alive()
        ledger.mount()
        ledger.format()
        assert size > 4000 and alive() - before < size // 8

    without(MOUNT, body)
