"""Nothing that the library keeps holds on to the code of a module that was loaded for one call."""

import ast
import builtins
import gc
import os
import sys
import types
import weakref
from functools import partial
from pathlib import Path

import esp32
import rp2
import vfs
from mqtt_durable import load_config
from mqtt_durable.flash import open_home
from norsim import Nor
from test_gap import pico
from test_once import without

ROOT = Path(__file__).resolve().parents[2]
LIB = ROOT / "lib" / "mqtt_durable"
SIZE = 4 * 4096


def called_once():
    """{name of a module that once() is called for}."""
    found = set()
    for path in [*LIB.rglob("*.py"), ROOT / "main.py"]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "once":
                found.add("mqtt_durable." + node.args[0].value)
    return found


def kept(function):
    """Call function(); return (names of the modules it has called once, those of them whose code is still there)."""
    names = called_once()
    functions = []
    load = builtins.__import__

    def watching(name, *arguments):
        module = load(name, *arguments)
        if name in names and name in sys.modules:
            code = [f for f in vars(sys.modules[name]).values() if isinstance(f, types.FunctionType)]
            functions.extend((name, weakref.ref(f)) for f in code if f.__module__ == name)
        return module

    def call():
        builtins.__import__ = watching
        try:
            return function()
        finally:
            builtins.__import__ = load

    body = call
    for name in names:
        body = partial(without, name, body)
    result = body()  # what it returns is in use while we look
    gc.collect()
    found = {name for name, _ in functions}, {name for name, function in functions if function() is not None}
    del result
    return found


def test_a_configuration_does_not_keep_its_checks():
    used, there = kept(lambda: load_config(str(ROOT / "firmware" / "config.example.json")))
    assert used == {"mqtt_durable.config", "mqtt_durable.board_id"} and not there


def test_no_home_keeps_what_has_opened_it(tmp_path):
    here = os.getcwd()
    os.chdir(tmp_path)
    nor = Nor(48 * 4096)
    try:
        pico()
        esp32.clear()
        esp32.add_partition("mqj", Nor(SIZE))
        esp32.add_partition("vfs", nor)
        vfs.VfsLfs2.mkfs(nor)
        vfs.mount(vfs.VfsLfs2(nor), "/board")
        for home, opener in (
            ("file:journal.bin", set()),
            ("ram", set()),
            ("partition:mqj", {"mqtt_durable.flash.partition"}),
            ("gap", {"mqtt_durable.flash.gap"}),
            ("pinned:/board/mqj", {"mqtt_durable.flash.pinning"}),
        ):
            used, there = kept(lambda home=home: open_home(home, SIZE))
            assert used == {"mqtt_durable.flash.homes"} | opener and not there, home
        vfs.umount("/board")
    finally:
        esp32.clear()
        rp2.set_flash(None)
        os.chdir(here)


def test_what_is_kept_is_found(tmp_path):
    """That the two above can fail."""
    from mqtt_durable.once import once

    used, there = kept(lambda: once("flash.homes", "__getattribute__", "open_home"))
    assert used == there == {"mqtt_durable.flash.homes"}
