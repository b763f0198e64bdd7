"""Print the bytes of .mpy per module of lib/mqtt_durable, as they go to a board."""

import sys

from mpy import ROOT, CannotCompile, compile_library


def main():
    try:
        files = compile_library()
    except CannotCompile as e:
        sys.exit("size: %s" % e)
    rows = []
    for path, code in files.items():
        source = (ROOT / path).with_suffix(".py")
        rows.append((source.relative_to(ROOT / "lib").as_posix(), len(source.read_text().splitlines()), len(code)))
    width = max(len(name) for name, _, _ in rows)
    print("%-*s  %6s  %10s" % (width, "module", "lines", ".mpy bytes"))
    for name, lines, size in rows:
        print("%-*s  %6d  %10d" % (width, name, lines, size))
    print("%-*s  %6d  %10d" % (width, "all", sum(r[1] for r in rows), sum(r[2] for r in rows)))


if __name__ == "__main__":
    main()
