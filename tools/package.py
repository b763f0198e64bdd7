"""Write package.json, mip's list of the files to install, from the files in lib/mqtt_durable.

It lies at the top, where mip looks for it, and its URLs are relative to it, so a fork or a local clone installs itself:
mip install github:ORG/REPO.  The version and the dependencies in the file are kept.
"""

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main():
    path = ROOT / "package.json"
    package = json.loads(path.read_text()) if path.exists() else {"version": "0.1.0", "deps": []}
    urls = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "lib" / "mqtt_durable").rglob("*.py"))
    rows = ",\n".join("    %s" % json.dumps([url.removeprefix("lib/"), url]) for url in urls)
    rest = "".join(",\n  %s: %s" % (json.dumps(k), json.dumps(v)) for k, v in package.items() if k != "urls")
    path.write_text('{\n  "urls": [\n%s\n  ]%s\n}\n' % (rows, rest))
    print("package.json: %d files" % len(urls))


if __name__ == "__main__":
    main()
