"""What a board gets: mip's list in package.json and the frozen image of firmware/manifest.py."""

import json
import os
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIB = ROOT / "lib"


def test_mip_list_is_the_directory():
    package = json.loads((ROOT / "package.json").read_text())
    there = sorted(path.relative_to(LIB).as_posix() for path in (LIB / "mqtt_durable").rglob("*.py"))
    assert sorted(target for target, _ in package["urls"]) == there, "run `make package`"


def test_mip_list_is_relative_and_installs_under_the_same_names():
    package = json.loads((ROOT / "package.json").read_text())
    for target, url in package["urls"]:
        # Relative to package.json itself: a fork or a local clone installs its own files.
        assert url == "lib/" + target
    assert package["deps"] == []
    assert re.fullmatch(r"\d+\.\d+\.\d+", package["version"])


def test_manifest_freezes_the_package_and_keeps_line_numbers():
    manifest = ROOT / "firmware" / "manifest.py"
    frozen, included, required = [], [], []

    def package(path, files=None, base_path=".", opt=0):
        # The build runs a manifest from its own directory.
        frozen.append((Path(os.path.normpath(manifest.parent / base_path / path)), files, opt))

    names = {"package": package, "include": included.append, "require": required.append}
    exec(compile(manifest.read_text(), str(manifest), "exec"), names)
    [(directory, files, opt)] = frozen
    assert directory == LIB / "mqtt_durable" and files is None
    assert 0 <= opt <= 2
    # Without the port's own manifest the image would lack asyncio.
    assert included == ["$(PORT_DIR)/boards/manifest.py"]
    # It replaces the board's own manifest, from which alone a Pico W has ssl and ntptime.
    assert required == ["bundle-networking"]
