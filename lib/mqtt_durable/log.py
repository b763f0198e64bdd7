"""The last events, kept in RAM for the REPL and for who asks over MQTT; some are printed on the console as they come.

Refuses to know what happens; whoever adds an event keeps to what is rare, for a text is made of it: connections,
failures, never a message that went well.  Nothing here survives a reset.
"""

import sys
import time

from micropython import const

LEVELS = ("off", "error", "warning", "info", "debug")
ERROR = const(1)
WARNING = const(2)
INFO = const(3)
DEBUG = const(4)

_EVENTS = const(32)
_TEXT = const(100)
_SECRET = const(4)  # a shorter one would be found in every other text


class Log:
    """The newest 32 events.  level, console: what is kept, what is printed, by names of LEVELS.

    secrets: texts of 4 characters and more that are replaced by *** wherever an event has them.
    """

    def __init__(self, level="info", console="warning", secrets=()):
        self.level = LEVELS.index(level)
        self.console = LEVELS.index(console)
        self._secrets = secrets
        self._events = []
        self._up_ms = 0
        self._ticks = time.ticks_ms()

    def uptime_ms(self):
        """Return the ms since this was made.  Must be called every few days: ticks wrap after 12."""
        now = time.ticks_ms()
        self._up_ms += time.ticks_diff(now, self._ticks)
        self._ticks = now
        return self._up_ms

    def add(self, level, text, error=None, trace=False):
        """Add an event, its text and an exception's type and text, cut to 100 characters.  Raises nothing.

        The same as the one before is counted there and not printed again.  trace: print the exception's traceback,
        if errors are printed.
        """
        try:
            kept = level <= self.level
            if kept or level <= self.console:
                if error is not None:
                    text = ("%s: %s: %s" % (text, type(error).__name__, error)).rstrip(": ")
                for secret in self._secrets:
                    if secret and len(secret) >= _SECRET:
                        text = text.replace(secret, "***")
                text = text[:_TEXT]
                name = LEVELS[level]
                times = 1
                events = self._events
                if kept:
                    if events and events[-1][1:3] == (name, text):
                        times += events.pop()[3]
                    elif len(events) >= _EVENTS:
                        events.pop(0)
                    events.append((self.uptime_ms() // 1000, name, text, times))
                if times == 1 and level <= self.console:
                    print("mqtt: %s: %s" % (name, text))
            if trace and self.console >= ERROR:
                sys.print_exception(error)
        except Exception:  # no memory, or an exception of the program's that has no text
            pass

    def events(self):
        """Return a list of the events, oldest first: (uptime in s, level, text, how often it came in a row).

        The uptime is that of the newest of them.
        """
        return list(self._events)

    def __str__(self):
        lines = []
        for uptime_s, level, text, times in self._events:
            lines.append("%7d s  %-7s  %s%s" % (uptime_s, level, text, " (%d times)" % times if times > 1 else ""))
        return "\n".join(lines)
