"""A picture of a journal as SVG: the ring on the left, each sector with its records on the right.

Owns the drawing; what is to be seen comes from journal.py.  Plain text, no dependency.
"""

import math
from html import escape

from journal import ENDURANCE, RELEASED, ROLES, SECTOR, USES, plural, position, wear_words

COLOURS = {
    "message": "#d6454f",
    "topic": "#eda3a0",
    "subscriptions": "#8e4fb0",
    "snapshot": "#1f5fa8",
    "fact": "#5aa0dc",
    "past": "#b9c1c7",
    "torn": "#f2a012",
    "damaged": "#111111",
    "noise": "#ece4d4",
    "zeros": "#f6dca0",
    "header": "#5d6b75",
    "blank": "#ffffff",
}
LABELS = {
    "message": "message that waits",
    "topic": "finished, topic in use",
    "subscriptions": "subscriptions",
    "snapshot": "snapshot that counts",
    "fact": "facts behind it",
    "past": "over",
    "torn": "torn",
    "damaged": "damaged",
    "noise": "not to be told (encrypted)",
    "zeros": "zeros",
    "header": "header",
    "blank": "blank",
}
INK = "#26323a"
FAINT = "#76838c"
FRAME = "#9aa5ad"
WIDE = 1620
LEFT = 40
RING_X, RING_R = 300, 180
ROWS_X = 740  # where sectors begin
ROWS_W = 700
WEAR_X, WEAR_W = 1475, 84
_MOST_LINES = 6
STYLE = """
text { font-family: 'DejaVu Sans', Verdana, Helvetica, sans-serif; fill: %s; }
.h1 { font-size: 21px; font-weight: bold; } .h2 { font-size: 13px; fill: %s; } .n { font-size: 12px; }
.s { font-size: 11px; fill: %s; } .b { font-weight: bold; } .warn { fill: #c02030; }
""" % (INK, FAINT, FAINT)


class Drawing:
    def __init__(self):
        self.parts = []

    def add(self, text):
        self.parts.append(text)

    def text(self, x, y, text, css="n", anchor="start"):
        self.add('<text x="%.1f" y="%.1f" class="%s" text-anchor="%s">%s</text>' % (x, y, css, anchor, escape(text)))

    def rect(self, x, y, w, h, fill, stroke=None, title=None, width=1):
        line = ' stroke="%s" stroke-width="%s"' % (stroke, width) if stroke else ""
        inner = "><title>%s</title></rect>" % escape(title) if title else "/>"
        self.add('<rect x="%.2f" y="%.2f" width="%.2f" height="%.2f" fill="%s"%s%s' % (x, y, w, h, fill, line, inner))

    def wedge(self, x, y, inner, outer, a, b, fill, stroke="none", width=1, title=None):
        """A piece of a ring from angle a to b, in turns, clockwise from the top."""
        b = min(b, a + 0.99999)
        large = 1 if b - a > 0.5 else 0
        points = [spot(x, y, outer, a), spot(x, y, outer, b), spot(x, y, inner, b), spot(x, y, inner, a)]
        path = "M%.2f %.2f" % points[0]
        path += "A%.2f %.2f 0 %d 1 %.2f %.2f" % ((outer, outer, large) + points[1])
        path += "L%.2f %.2f" % points[2]
        path += "A%.2f %.2f 0 %d 0 %.2f %.2fZ" % ((inner, inner, large) + points[3])
        end = "><title>%s</title></path>" % escape(title) if title else "/>"
        self.add('<path d="%s" fill="%s" stroke="%s" stroke-width="%s"%s' % (path, fill, stroke, width, end))


def spot(x, y, r, turn):
    return x + r * math.sin(2 * math.pi * turn), y - r * math.cos(2 * math.pi * turn)


def age_colour(share):
    """Green for the newest (0) to light grey-green for the oldest (1)."""
    new, old = (24, 122, 82), (222, 236, 226)
    return "#%02x%02x%02x" % tuple([round(a + (b - a) * share) for a, b in zip(new, old)])


def svg(journal, name, per_day=None):
    """Return the picture as text.  name: what the title calls it.  per_day: messages a day, for the years left."""
    d = Drawing()
    count = len(journal.sectors)
    row = 56 if count <= 8 else 34 if count <= 24 else 20 if count <= 64 else 13
    top = 118
    said = min(_MOST_LINES + 1, len(journal.problems) + len(journal.notes))
    height = max(top + count * row + 50 + 18 * said, top + 2 * RING_R + 430)
    _title(d, journal, name)
    _ring(d, journal, top + RING_R + 44)
    _legend(d, journal, top + 2 * RING_R + 124)
    _facts(d, journal, top + 2 * RING_R + 264, per_day)
    _rows(d, journal, top, row)
    size = 'width="%d" height="%d" viewBox="0 0 %d %d"' % (WIDE, height, WIDE, height)
    head = '<svg xmlns="http://www.w3.org/2000/svg" %s>\n<style>%s</style>\n' % (size, STYLE)
    return head + '<rect width="100%" height="100%" fill="#fbfbf9"/>\n' + "\n".join(d.parts) + "\n</svg>\n"


def _title(d, journal, name):
    waiting = len(journal.messages)
    released = len([m for m in journal.messages.values() if m[0] == RELEASED])
    d.text(LEFT, 40, "%s: %s waiting" % (name, plural(waiting, "message")), "h1")
    parts = [
        "journal %08X" % journal.journal_id,
        "%d sectors of %d bytes" % (len(journal.sectors), SECTOR),
        "unit %d" % journal.unit,
        plural(len(journal.subscriptions), "subscription"),
        "%d inbound unfinished" % len(journal.inbound),
        "%d only for PUBCOMP" % released,
        "mark %s" % ("none" if journal.mark is None else journal.mark),
        "closed in order" if journal.closed else "not closed",
    ]
    d.text(LEFT, 62, "  ·  ".join(parts), "h2")


def _share(journal, sector):
    """0 for the head to 1 for the oldest."""
    span = max(1, journal.head.seq - min(s.seq for s in journal.members))
    return (journal.head.seq - sector.seq) / span


def _ring(d, journal, y):
    count = len(journal.sectors)
    inner, outer = RING_R * 0.60, RING_R
    oldest = [s for s in journal.members if s.role != "dead"][0]
    for sector in journal.sectors:
        a = sector.place / count
        b = (sector.place + 1) / count
        counts = sector in journal.members
        fill = age_colour(_share(journal, sector)) if counts else "#ffffff"
        title = "sector %d, seq %s: %s" % (sector.place, sector.seq or "-", ROLES[sector.role])
        d.wedge(RING_X, y, inner, outer, a, b, fill, "#fbfbf9", 2, title)
        # Its contents, as they lie, in a band outside.
        for use, begin, end in _runs(sector):
            start = a + (b - a) * begin / SECTOR
            stop = a + (b - a) * end / SECTOR
            d.wedge(RING_X, y, outer + 4, outer + 20, start, stop, COLOURS[use])
        d.wedge(RING_X, y, outer + 4, outer + 20, a, b, "none", FRAME, 0.8)
        if count <= 40:
            x, ty = spot(RING_X, y, (inner + outer) / 2, (a + b) / 2)
            css = "n b" if sector.role in ("head",) else "n"
            dark = counts and _share(journal, sector) < 0.5
            text = '<text x="%.1f" y="%.1f" class="%s" text-anchor="middle"%s>%d</text>'
            d.add(text % (x, ty + 4, css, ' style="fill:#fff"' if dark else "", sector.place))
    _mark(d, y, (journal.head.place + journal.head.used / SECTOR) / count, "HEAD", None)
    if oldest is not journal.head:
        _mark(d, y, oldest.place / count, "OLDEST", spot(RING_X, y, outer + 34, journal.head.place / count))
    d.text(RING_X, y - 18, "seq %d" % journal.head.seq, "n b", "middle")
    d.text(RING_X, y + 2, "in sector %d" % journal.head.place, "s", "middle")
    d.text(RING_X, y + 18, "new → old", "s", "middle")
    for i in range(60):
        d.rect(RING_X - 45 + i * 1.5, y + 25, 1.6, 8, age_colour(i / 59))
    # Which way it turns.
    ax, ay = spot(RING_X, y, inner - 16, 0.06)
    bx, by = spot(RING_X, y, inner - 16, -0.06)
    arc = '<path d="M%.1f %.1fA%.1f %.1f 0 0 1 %.1f %.1f" fill="none" stroke="%s" stroke-width="1.5"/>'
    d.add(arc % (bx, by, inner - 16, inner - 16, ax, ay, FAINT))
    d.add('<path d="M%.1f %.1fl-8 -6l1 9z" fill="%s"/>' % (ax + 2, ay + 2, FAINT))


def _runs(sector):
    """[use, first byte, byte behind the last] of what is next to each other and of the same use."""
    runs = []
    for s in sector.slices:
        if s.use in ("blank", "header") or s.name == "nothing":
            continue
        if runs and runs[-1][0] == s.use and runs[-1][2] == s.off:
            runs[-1][2] += s.size
        else:
            runs.append([s.use, s.off, s.off + s.size])
    return runs


def _mark(d, y, turn, label, other):
    """A line through the ring with a label outside, which keeps off the label at other."""
    line = '<line x1="%.1f" y1="%.1f" x2="%.1f" y2="%.1f" stroke="%s" stroke-width="2.5"/>'
    inner, outer = RING_R * 0.60, RING_R
    d.add(line % (spot(RING_X, y, inner - 5, turn) + spot(RING_X, y, outer + 26, turn) + (INK,)))
    x, ty = spot(RING_X, y, outer + 36, turn)
    side = math.sin(2 * math.pi * turn)
    anchor = "middle" if abs(side) < 0.3 else "start" if side > 0 else "end"
    if other and abs(other[0] - x) < 70 and abs(other[1] - ty) < 30:
        ty += 16 if ty > y + 40 else -16 if abs(side) < 0.5 else 16 if side > 0 else -16
    d.text(x, ty + 4, label, "s b", anchor)


def _legend(d, journal, y):
    seen = {s.use for sector in journal.sectors for s in sector.slices}
    shown = [use for use in USES if use in seen or use in ("message", "past", "blank")]
    totals = {use: [0, 0] for use in USES}
    for sector in journal.sectors:
        for s in sector.slices:
            if s.name == "nothing":
                continue
            totals[s.use][0] += 1
            totals[s.use][1] += s.size
    for i, use in enumerate(shown):
        x = LEFT + (i % 2) * 280
        line = y + i // 2 * 21
        d.rect(x, line - 11, 20, 13, COLOURS[use], FRAME, None, 0.8)
        n, size = totals[use]
        amount = "%.1f KiB" % (size / 1024) if size >= 1024 else "%d B" % size
        if use not in ("blank", "noise"):
            amount = "%d, " % n + amount
        d.text(x + 27, line, LABELS[use])
        d.text(x + 258, line, amount, "s", "end")


def _facts(d, journal, y, per_day):
    lines = []
    order = journal.order()
    for packet_id in order[:4]:
        state, pub = journal.messages[packet_id]
        if state == RELEASED:
            lines.append("%d  waits for PUBCOMP" % packet_id)
        elif pub is not None:
            topic = journal.topic(pub)[0] or "topic lost"
            topic = topic if len(topic) <= 26 else topic[:25] + "…"
            lines.append("%d  QoS %d  %s  at %s" % (packet_id, state, topic, position(pub.pos)))
        else:
            lines.append("%d  does not read back" % packet_id)
    if order:
        d.text(LEFT, y, "the first that wait", "n b")
        if len(order) > 4:
            lines.append("… and %d more" % (len(order) - 4))
    for i, line in enumerate(lines):
        d.text(LEFT, y + 19 + 17 * i, line)
    y += 19 + 17 * len(lines) + (14 if order else -10)
    d.text(LEFT, y, "wear", "n b")
    for i, line in enumerate(_wrap(wear_words(journal, per_day), 66)):
        d.text(LEFT, y + 19 + 16 * i, line)


def _wrap(text, most):
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) >= most:
            lines.append("")
        lines[-1] = (lines[-1] + " " + word).strip()
    return lines


def _rows(d, journal, top, row):
    scale = ROWS_W / SECTOR
    low = row - (16 if row > 40 else 8 if row >= 20 else 3)
    worn = [journal.wear(s)[0] for s in journal.sectors]
    most = max(1, *worn)
    css = "n" if row >= 20 else "s"
    d.text(ROWS_X - 122, top - 14, "sector", "s")
    d.text(ROWS_X - 74, top - 14, "seq", "s")
    for kib in range(5):
        x = ROWS_X + kib * 1024 * scale
        d.text(x, top - 14, "%d KiB" % kib if kib else "0", "s", "middle")
        d.rect(x - 0.4, top - 9, 0.8, len(journal.sectors) * row + 8, "#d8dde0")
    counted = journal.erases is not None
    d.text(WEAR_X, top - 14, "erases" if counted else "laps (≈ erases)", "s")
    for i, sector in enumerate(journal.sectors):
        y = top + i * row
        head = sector is journal.head
        if head:
            d.rect(ROWS_X - 130, y - (row - low) / 2, ROWS_W + 136, row, "#e3f1ea")
        d.text(ROWS_X - 122, y + low / 2 + 4, "%d" % sector.place, css + (" b" if head else ""))
        seq = "-" if sector.seq is None else str(sector.seq)
        d.text(ROWS_X - 74, y + low / 2 + 4, seq, css + (" b" if head else ""))
        counts = sector in journal.members
        d.rect(ROWS_X - 26, y, 18, low, age_colour(_share(journal, sector)) if counts else "#ffffff", FRAME, None, 0.6)
        _row(d, sector, y, low, scale)
        if row >= 20 and (not counts or sector.role == "dead"):
            words = "holds nothing" if sector.seq is None else sector.role
            d.text(ROWS_X + ROWS_W - 6, y + low / 2 + 4, words, "s", "end")
        d.rect(WEAR_X, y + 1, WEAR_W, low - 2, "#eef1f2")
        d.rect(WEAR_X, y + 1, WEAR_W * worn[i] / most, low - 2, "#8a7a5c")
        d.text(WEAR_X + WEAR_W + 6, y + low / 2 + 4, str(worn[i]), "s")
    y = top + len(journal.sectors) * row + 16
    d.text(WEAR_X, y, "of %d" % ENDURANCE, "s")
    lines = [("problem: " + line, "n warn") for line in journal.problems]
    lines += [("note: " + line, "n") for line in journal.notes]
    for i, (line, css) in enumerate(lines[:_MOST_LINES]):
        d.text(ROWS_X - 122, y + 10 + 18 * i, line, css)
    if len(lines) > _MOST_LINES:
        d.text(ROWS_X - 122, y + 10 + 18 * _MOST_LINES, "… and %d more" % (len(lines) - _MOST_LINES))


def _row(d, sector, y, low, scale):
    d.rect(ROWS_X, y, SECTOR * scale, low, "#ffffff", FRAME, None, 0.8)
    for s in sector.slices:
        if s.use == "blank" or s.name == "nothing":
            continue
        x = ROWS_X + s.off * scale
        w = s.size * scale
        title = "0x%03x %s, %s. %s %s" % (s.off, s.name, plural(s.size, "byte"), s.words, s.fate)
        # A thin line between records, unless they are thinner than that.
        d.rect(x, y, max(0.5, w - (0.6 if w > 2 else 0)), low, COLOURS[s.use], None, title.strip())
    d.rect(ROWS_X, y, SECTOR * scale, low, "none", FRAME, None, 0.8)
