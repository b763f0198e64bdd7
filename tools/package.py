"""Write lib/package.json, mip's list of the files to install, from the files in lib/mqtt_durable.

The URLs are relative to the list, so a fork or a local clone installs itself: mip install github:ORG/REPO/lib.
The version and the dependencies in the file are kept.
"""

import json
from pathlib import Path

LIB = Path(__file__).resolve().parent.parent / "lib"


def main():
    path = LIB / "package.json"
    package = json.loads(path.read_text()) if path.exists() else {"version": "0.1.0", "deps": []}
    names = sorted(p.relative_to(LIB).as_posix() for p in (LIB / "mqtt_durable").rglob("*.py"))
    rows = ",\n".join("    %s" % json.dumps([name, name]) for name in names)
    rest = "".join(",\n  %s: %s" % (json.dumps(k), json.dumps(v)) for k, v in package.items() if k != "urls")
    path.write_text('{\n  "urls": [\n%s\n  ]%s\n}\n' % (rows, rest))
    print("lib/package.json: %d files" % len(names))


if __name__ == "__main__":
    main()
