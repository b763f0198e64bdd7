"""The imports in lib/mqtt_durable hold the picture of its layers:

    packet, properties <- session <- store <- client, simple <- main
    flash/*            <- journal <- store        errors: imported by all, imports nothing
                              log <- client       imports nothing either

mount is a part of journal, recall and replay of store; once, which loads and forgets, imports nothing.  For MQTT 5
packet5 is packet and properties together, store5 a store, client5 a client.
What a module may import is read off the directory as it is: a new module needs no entry here unless it is one of the
picture's own.
"""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "mqtt_durable"
LIB = ROOT / "lib" / PACKAGE

# Leftmost first: none imports one further right.  flash stands for all of flash/*.
PICTURE = {
    "errors": set(),
    "log": set(),
    "packet": {"errors"},
    "properties": {"errors", "packet"},
    "packet5": {"errors", "packet", "properties"},
    "reasons": {"errors"},
    "session": {"errors", "packet", "properties"},
    "mount": {"errors"},
    "journal": {"errors", "mount", "once"},
    "recall": {"errors", "packet", "properties", "session"},
    "replay": {"errors", "session", "recall"},
    "store": {"errors", "packet", "properties", "session", "recall", "replay", "journal", "once"},
    "store5": {"errors", "packet", "packet5", "properties", "session", "recall", "store"},
    "flash": {"errors", "flash", "once"},
    "once": set(),
}
NAMED = {"errors", "packet", "session", "journal", "store", "client", "simple"}
FRONT = {"client", "simple", "transport", "tls", "log"}

# A front end makes, where version 5 is asked for, the one that is derived from it, and knows no more of it.
MADE = {"client": "client5", "simple": "simple5"}

# From store leftward: time arrives as now_ms, bytes as arguments.
OUTSIDE = set("socket asyncio uasyncio select ssl tls time utime network machine esp32 rp2 ntptime _thread".split())
BOARD = {"machine", "network", "esp32", "rp2"}
# Who may know which board this is; board_id for the chip's own number, config for whether it can sleep,
# watchdog for the chip's timer, cause, device and builtin for its resets and its temperature.
KNOWS_THE_BOARD = {"flash", "wifi"}
USES_THE_BOARD = KNOWS_THE_BOARD | {"board_id", "builtin", "cause", "config", "device", "watchdog"}

# What MicroPython and CPython (or the shim) both have.
BOTH = OUTSIDE | set("array binascii collections errno gc hashlib io json micropython os random struct sys vfs".split())


def module_of(path):
    """packet for packet.py, flash.file for flash/file.py, flash for flash/__init__.py, '' for the package's own."""
    parts = list(path.relative_to(LIB).with_suffix("").parts)
    if parts[-1] == "__init__":
        parts.pop()
    return ".".join(parts)


def layer(module):
    return module.partition(".")[0]


def imports(source, module, is_package, modules):
    """(modules of the package, other top-level modules) that a source imports, inside functions too."""
    inner, outer = set(), set()

    def add(name, names=()):
        """One dotted name that names are taken from, or that is itself imported."""
        top, _, rest = name.partition(".")
        if top != PACKAGE:
            outer.add(top)
            return
        taken = {rest + "." + n if rest else n for n in names} & modules
        inner.update(taken)
        # A name that is no module is found in the package's __init__ or in the module itself.
        if len(taken) < len(names) or not names:
            inner.add(rest)

    here = PACKAGE.split() + (module.split(".") if module else [])
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                add(alias.name)
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + is_package] if node.level else []
            add(".".join(base + ([node.module] if node.module else [])), [alias.name for alias in node.names])
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "__import__":
            if node.args and isinstance(node.args[0], ast.Constant):
                add(node.args[0].value)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "once":
            add(PACKAGE + "." + node.args[0].value)
    return inner, outer


def read_lib():
    """{module: (source, inner imports, outer imports)} of all there is."""
    paths = {module_of(path): path for path in LIB.rglob("*.py")}
    found = {}
    for module, path in paths.items():
        source = path.read_text()
        inner, outer = imports(source, module, path.name == "__init__.py", set(paths))
        found[module] = source, inner - {MADE.get(module)}, outer
    return found


def core(found):
    """store and every module that it reaches."""
    reached, ahead = set(), ["store"]
    while ahead:
        module = ahead.pop()
        if module in reached or module not in found:
            continue
        reached.add(module)
        ahead += found[module][1]
    return reached


def test_imports_are_read_in_every_form():
    flash_inner = {"flash.file", "flash.ram", "errors"}
    modules = {"", "errors", "packet", "session", "flash", "flash.file", "flash.ram"}
    for module, is_package, source, inner, outer in (
        ("store", False, "from .packet import PUBLISH", {"packet"}, set()),
        ("store", False, "from . import packet, session", {"packet", "session"}, set()),
        ("store", False, "from . import Client", {""}, set()),
        ("store", False, "from . import packet, Client", {"packet", ""}, set()),
        ("store", False, "import mqtt_durable.session as s", {"session"}, set()),
        ("store", False, "from mqtt_durable.session import x", {"session"}, set()),
        ("store", False, "from mqtt_durable import session", {"session"}, set()),
        ("store", False, "def f():\n    import time, os.path", set(), {"time", "os"}),
        ("store", False, "x = __import__('mqtt_durable.session')", {"session"}, set()),
        ("store", False, "once('flash.ram', 'open', 1)", {"flash.ram"}, set()),
        ("", True, "from .session import x\nfrom . import errors", {"session", "errors"}, set()),
        ("flash", True, "from .file import F\nfrom ..errors import E\nfrom . import ram", flash_inner, set()),
        ("flash.file", False, "from .ram import R\nfrom ..errors import E\nfrom . import file", flash_inner, set()),
    ):
        assert imports(source, module, is_package, modules) == (inner, outer), source


def test_every_module_of_the_picture_is_there():
    assert NAMED <= set(read_lib())


def test_errors_imports_nothing():
    assert read_lib()["errors"][1:] == (set(), set())


def test_no_module_imports_one_to_its_right():
    for module, (_, inner, _) in read_lib().items():
        if layer(module) in PICTURE:
            wrong = {name for name in inner if layer(name) not in PICTURE[layer(module)]}
            assert not wrong, "%s imports %s" % (module, wrong)


def test_only_store_sees_both_session_and_journal():
    for module, (_, inner, _) in read_lib().items():
        assert module == "store" or not {"session", "journal"} <= inner, module


def test_core_reaches_no_front_end_and_no_outside_world():
    found = read_lib()
    for module in core(found):
        assert layer(module) not in FRONT | {"flash", "wifi", "config", ""}, "store reaches %s" % (module or "__init__")
        wrong = found[module][2] & OUTSIDE
        assert not wrong, "%s imports %s" % (module, wrong)


def test_the_blocking_front_end_reaches_no_asyncio_and_no_other_front_end():
    found = read_lib()
    reached, ahead = set(), ["simple"]
    while ahead:
        module = ahead.pop()
        if module not in reached:
            reached.add(module)
            ahead += found[module][1]
    assert not reached & {"client", "transport", "config", "wifi", "log", ""}
    for module in reached:
        assert not found[module][2] & {"asyncio", "uasyncio", "_thread"}, module


def test_imports_make_no_circle():
    found = read_lib()
    done, path = set(), []

    def visit(module):
        assert module not in path, " -> ".join(path + [module])
        if module in done or module not in found:
            return
        path.append(module)
        for name in found[module][1] - {module}:
            visit(name)
        done.add(path.pop())

    for module in found:
        visit(module)


def test_only_flash_and_wifi_ask_which_board_this_is():
    for module, (source, _, outer) in read_lib().items():
        if layer(module) in KNOWS_THE_BOARD:
            continue
        for node in ast.walk(ast.parse(source)):
            asked = isinstance(node, ast.Attribute) and node.attr in ("platform", "uname", "_machine")
            assert not asked, "%s line %d" % (module, node.lineno)
            taken = isinstance(node, ast.ImportFrom) and node.module == "sys"
            assert not taken, "%s line %d: import sys, not from it" % (module, node.lineno)
        if layer(module) not in USES_THE_BOARD:
            assert not outer & BOARD, "%s imports %s" % (module, outer & BOARD)


def test_package_imports_only_what_both_interpreters_have():
    for module, (_, _, outer) in read_lib().items():
        if module == "device":
            outer -= {"app"}  # the user's own
        assert outer <= BOTH, "%s imports %s" % (module, outer - BOTH)


def numbers(path):
    """What a module has by const(), without a leading underscore -> the text of its value."""
    return {
        node.targets[0].id.lstrip("_"): ast.unparse(node.value.args[0])
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call) and ast.unparse(node.value.func) == "const"
    }


# Modules that each have the same numbers, where an import would cost more than all of them together; and the names that
# stand for something else in one of them.
COPIES = (
    ("packet", "packet5", "session", "recall", "replay", "store", "store5"),
    ("journal", "mount"),
    ("packet", "log", "client", "opening"),
    ("packet", "simple"),
)
OWN = {"packet": {"KNOWN", "SHORT"}, "store5": {"SHORT"}}


def test_numbers_that_modules_have_each_for_itself_are_the_same():
    for modules in COPIES:
        known = {}
        for module in modules:
            for name, value in numbers(LIB / (module + ".py")).items():
                if name not in OWN.get(module, ()):
                    assert known.setdefault(name, value) == value, "%s in %s" % (name, module)
        if "session" in modules:
            assert known["PUBREL"] == "6" and known["REL"] == "3"


def test_device_code_has_no_assert():
    for path in [*LIB.rglob("*.py"), ROOT / "boot.py", ROOT / "main.py"]:
        for node in ast.walk(ast.parse(path.read_text())):
            # It vanishes at -O1, and its exception is nobody's to catch.
            assert not isinstance(node, ast.Assert), "%s line %d" % (path.relative_to(ROOT), node.lineno)
