"""A picture of what bench_peers.py has measured, as SVG: a panel for each figure, a bar for each client.

    bench_plot.py [-o OUT.svg] [RESULTS.json]       build/bench.json, to build/bench.svg

A thin line in a bar's row is the bar that ours has to reach.  Where the figures are far apart the scale is logarithmic,
and its panel says so.
"""

import argparse
import json
import math
import time
from pathlib import Path

from bench_common import BUILD, number
from journal_plot import FRAME, INK, STYLE, Drawing

OURS = "mqtt_durable"
COLOUR = {True: "#1f7a52", False: "#9fb0ba"}
MISSED = "#d6454f"
WIDE = 1240
PANEL_W, PANEL_GAP = 380, 30
LEFT, TOP = 30, 104
ROW, BAR = 19, 13
LABEL_W, VALUE_W = 168, 44

# part, column, the headline, logarithmic scale
PANELS = (
    ("speed", "QoS 1", "publish QoS 1, messages/s", True),
    ("rtt", "50 ms", "publish QoS 1 at 50 ms round trip, messages/s", True),
    ("receive", "QoS 1", "receive QoS 1, messages/s", True),
    ("cpu", "publish 1", "instructions to publish at QoS 1", True),
    ("cpu", "receive 1", "instructions to receive at QoS 1", True),
    ("alloc", "publish 1", "heap bytes allocated to publish at QoS 1", True),
    ("heap", "32 bit", "heap after import and connect, bytes, 32 bit", False),
    ("smallest", "bytes", "smallest heap that works, bytes, 64 bit", False),
    ("size", ".mpy bytes", "code, bytes of .mpy", False),
)
FAULTS = "cut", "kill", "restart", "half-open"
HEADS = "link cut after a PUBLISH, 10 times", "process killed, 10 times", "broker restarted, 3 times", "half-open link"


def svg(results, title, bars_of):
    """Return the picture as text.  results: the tables.  bars_of: as in bench_common.show()."""
    d = Drawing()
    d.text(LEFT, 36, "MQTT clients side by side", "h1")
    d.text(LEFT, 58, title, "h2")
    d.text(LEFT, 74, "a line across: what ours has to reach, red where it does not", "s")
    x, y, low = LEFT, TOP, 0
    for panel in PANELS:
        rows = [(name, row[panel[1]]) for name, row in results.get(panel[0], {}).items() if panel[1] in row]
        rows = [(name, figure) for name, figure in rows if not isinstance(figure, str)]
        if not rows:
            continue
        low = max(low, _panel(d, x, y, panel, rows, bars_of))
        x += PANEL_W + PANEL_GAP
        if x + PANEL_W > WIDE:
            x, y, low = LEFT, low + 26, 0
    if x > LEFT:
        y = low + 26
    y = _faults(d, y, results.get("faults", {}))
    size = 'width="%d" height="%d" viewBox="0 0 %d %d"' % (WIDE, y, WIDE, y)
    head = '<svg xmlns="http://www.w3.org/2000/svg" %s>\n<style>%s</style>\n' % (size, STYLE)
    return head + '<rect width="100%" height="100%" fill="#fbfbf9"/>\n' + "\n".join(d.parts) + "\n</svg>\n"


def _panel(d, x, y, panel, rows, bars_of):
    """Draw one; return where it ends."""
    part, column, headline, logarithmic = panel
    d.text(x, y, headline, "n b")
    d.text(x + PANEL_W, y, "log" if logarithmic else "", "s", "end")
    bars = {name: bars_of(part, name).get(column) for name, _ in rows}
    most = max([figure for _, figure in rows] + [bar.limit for bar in bars.values() if bar])
    least = min([figure for _, figure in rows if figure > 0] + [bar.limit for bar in bars.values() if bar])
    room = PANEL_W - LABEL_W - VALUE_W

    def length(figure):
        if not logarithmic:
            return room * figure / most
        floor = least / 2
        return room * max(0.01, math.log(max(figure, floor) / floor) / math.log(most / floor))

    for i, (name, figure) in enumerate(rows):
        top = y + 10 + i * ROW
        bar = bars[name]
        missed = bar is not None and bar.missed(figure)
        ours = name.startswith(OURS) or name.startswith("main.py")
        label = name.replace(", window 16", "").replace(", window", ", w.")
        d.text(x + LABEL_W - 6, top + 11, label, "s b" if ours else "s", "end")
        d.rect(x + LABEL_W, top, length(figure), BAR, COLOUR[ours], None, "%s: %s" % (name, number(figure)))
        if bar is not None:
            at = x + LABEL_W + length(bar.limit)
            d.rect(at - 1, top - 3, 2, BAR + 6, MISSED if missed else INK, None, "bar: %s" % bar)
        end = length(max(figure, bar.limit)) if bar is not None else length(figure)
        d.text(x + LABEL_W + end + 5, top + 11, _short(figure), "s")
    return y + 10 + len(rows) * ROW


def _short(figure):
    return "%.1fk" % (figure / 1000) if figure >= 1000 else number(figure)


def _faults(d, y, rows):
    rows = {name: row for name, row in rows.items() if any(kind in row for kind in FAULTS)}
    if not rows:
        return y
    d.text(LEFT, y, "200 messages under faults: lost / twice / out of order", "n b")
    for i, head in enumerate(HEADS):
        d.text(LEFT + 270 + i * 230, y + 22, head, "s")
    for j, (name, row) in enumerate(rows.items()):
        top = y + 32 + j * ROW
        d.text(LEFT + 250, top + 11, name, "s b" if name.startswith(OURS) else "s", "end")
        for i, kind in enumerate(FAULTS):
            text = row.get(kind, "")
            d.rect(LEFT + 264 + i * 230, top - 1, 222, ROW - 3, _fault_colour(text), FRAME, None, 0.4)
            d.text(LEFT + 270 + i * 230, top + 11, text, "s")
    d.text(LEFT, y + 50 + len(rows) * ROW, "green: none lost, none twice, in order; yellow: twice only; red: lost, "
           "out of order or stopped", "s")  # fmt: skip
    return y + 50 + len(rows) * ROW + 24


def _fault_colour(text):
    """By what is worst in "lost / twice / out of order"."""
    parts = text.split(" / ")
    if len(parts) != 3:
        return "#f4c9c9" if text.startswith("stops") else "#f1f1ee"
    lost, twice, late = map(int, parts)
    return "#f4c9c9" if lost or late else "#f7ecc4" if twice else "#cfe8d8"


def main():
    from bench_peers import ABOUT, bars_of

    parser = argparse.ArgumentParser(prog="bench_plot.py")
    parser.add_argument("results", nargs="?", type=Path, default=BUILD / "bench.json")
    parser.add_argument("-o", dest="out", type=Path, default=BUILD / "bench.svg")
    options = parser.parse_args()
    results = json.loads(options.results.read_text())["results"]
    day = time.strftime("%Y-%m-%d", time.localtime(options.results.stat().st_mtime))
    options.out.write_text(svg(results, ABOUT % day, bars_of))


if __name__ == "__main__":
    main()
