"""The console of a board, with its statistics every few seconds: watch.py [--port PORT] [--every S]

Nothing is stopped: the board's own lines come as it prints them, and main.py prints the statistics when Ctrl-T asks for
them.  A reset of the board or an unplugged cable ends nothing, the port is opened again when it is back.  Ctrl-C ends.
"""

import argparse
import json
import sys
import time

from board import Board, NoBoard, fail

CTRL_T = b"\x14"
STATS = "main.py: stats "


def words(stats):
    """The statistics in one line: the link, messages, the journal; in capitals what should be 0 and is not."""
    parts = ["connected" if stats.get("connected") else "not connected"]
    names = "waiting", "sent", "acknowledged", "received"
    parts += ["%s %s" % (name, stats[name]) for name in names if name in stats]
    if "journal_home" in stats:
        sectors = stats.get("journal_sectors_used"), stats.get("journal_sectors"), stats.get("journal_erases")
        parts.append("journal %s: %s of %s sectors, %s erases" % (stats["journal_home"], *sectors))
    if stats.get("journal_years_left") is not None:
        parts.append("%s years left" % stats["journal_years_left"])
    for name in ("dropped", "lost", "discarded", "too_large", "handler_errors", "protocol_errors", "journal_lost"):
        if stats.get(name):
            parts.append("%s %s" % (name.upper(), stats[name]))
    return " | ".join(parts)


class Console:
    """The lines that a board prints.  board: a Board whose program runs."""

    def __init__(self, board):
        self._board = board
        self._rest = b""

    @property
    def rest(self):
        """What has come of a line that has not ended: a prompt, mostly."""
        return self._rest.decode(errors="replace")

    def lines(self, timeout_s):
        """Return the lines that have come, waiting up to timeout_s for the first bytes.  Raises NoBoard."""
        *lines, self._rest = (self._rest + self._board.read(timeout_s)).split(b"\n")
        if len(self._rest) > 1 << 16:  # no text at all: another baud rate
            self._rest = b""
        return [line.decode(errors="replace").rstrip("\r").replace("\x1b", "?") for line in lines]

    def ask(self):
        """Have main.py print its statistics."""
        self._board.write(CTRL_T)


def stats_of(line):
    """Return the statistics in a line of the console, None if it holds none."""
    if not line.startswith(STATS):
        return None
    try:
        stats = json.loads(line[len(STATS) :])
    except ValueError:
        return None
    return stats if type(stats) is dict else None


def show(line):
    """Print a line of the console; return its statistics, if that is what it holds."""
    stats = stats_of(line)
    print("    [%s]" % words(stats) if stats else line, flush=True)
    return stats


def watch(port, every_s):
    """Print what the board at port prints, until Ctrl-C.  Raises NoBoard if there is none at the beginning."""
    with Board(port) as board:
        port = board.port  # also if "auto" has named it: the same one after a reset
        print("watch: %s; Ctrl-C ends, the board goes on" % port, flush=True)
        _follow(board, every_s)
    while True:
        print("watch: %s is gone; waiting for it" % port, flush=True)
        while True:
            try:
                with Board(port) as board:
                    print("watch: %s is back" % port, flush=True)
                    _follow(board, every_s)
                break
            except NoBoard:
                time.sleep(0.25)


def _follow(board, every_s):
    """Print until the port is gone."""
    console = Console(board)
    asked = answered = 0
    due = 0.0
    try:
        while True:
            now = time.monotonic()
            if now >= due:
                if console.rest.endswith(">>> "):
                    print("watch: at the REPL, no program runs: make deploy, or the reset button", flush=True)
                elif asked == answered + 3:
                    print("watch: no statistics: main.py does not answer (asleep, or an older one?)", flush=True)
                console.ask()
                asked += 1
                due = now + every_s
            for line in console.lines(min(0.5, every_s)):
                if show(line):
                    answered = asked
    except NoBoard:
        pass


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", default="auto", help="serial port of the board; auto: the only one there is")
    parser.add_argument("--every", type=float, default=10, metavar="S", help="seconds between statistics (10)")
    args = parser.parse_args(argv)
    if args.every < 1:
        parser.error("--every: found %g, expected at least 1" % args.every)
    try:
        watch(args.port, args.every)
    except NoBoard as e:
        fail("watch", e)
    except KeyboardInterrupt:
        print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
