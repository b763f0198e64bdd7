"""tools/mpy.py: what goes to a board, and that MicroPython takes it."""

import os
import subprocess
import sys
from pathlib import Path

import mpy
from raises import raises

ROOT = Path(__file__).resolve().parents[2]
MICROPYTHON = os.environ.get("MICROPYTHON") or str(Path(sys.executable).parent / "micropython")


def test_a_board_gets_each_module_compiled_and_the_rest_as_it_is():
    files = mpy.compile_tree()
    modules = sorted((ROOT / "lib" / "mqtt_durable").rglob("*.py"))
    compiled = {path.relative_to(ROOT).with_suffix(".mpy").as_posix() for path in modules}
    assert set(files) - {"app.py"} == compiled | {"boot.py", "main.py"}
    assert files["main.py"] == (ROOT / "main.py").read_bytes()


def test_micropython_imports_what_was_compiled(tmp_path):
    for path, data in mpy.compile_library().items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(data)
    code = "import sys; print(sys.implementation._mpy & 255); import mqtt_durable.simple as m; print(m.__file__)"
    environment = dict(os.environ, MICROPYPATH=str(tmp_path / "lib"))
    done = subprocess.run([MICROPYTHON, "-c", code], env=environment, stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout.split() == [str(mpy.ABI), str(tmp_path / "lib/mqtt_durable/simple.mpy")]


def test_an_application_goes_to_the_board_where_there_is_one(tmp_path):
    (tmp_path / "lib" / "mqtt_durable").mkdir(parents=True)
    for name in ("boot.py", "main.py", "lib/mqtt_durable/a.py"):
        (tmp_path / name).write_text("pass\n")
    assert list(mpy.compile_tree(tmp_path)) == ["boot.py", "main.py", "lib/mqtt_durable/a.mpy"]
    (tmp_path / "app.py").write_text("# mine\n")
    assert mpy.compile_tree(tmp_path)["app.py"] == b"# mine\n"


def test_what_cannot_be_compiled_is_one_line(tmp_path):
    assert "version 5" in str(raises(mpy.CannotCompile, mpy.compile_tree, ROOT, 3, 5))
    assert "no source" in str(raises(mpy.CannotCompile, mpy.compile_library, tmp_path))
    (tmp_path / "lib" / "mqtt_durable").mkdir(parents=True)
    (tmp_path / "lib" / "mqtt_durable" / "bad.py").write_text("def (\n")
    error = raises(mpy.CannotCompile, mpy.compile_library, tmp_path)
    assert str(error) == "mpy-cross refuses mqtt_durable/bad.py: SyntaxError: invalid syntax"
