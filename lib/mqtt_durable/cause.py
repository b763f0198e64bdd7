"""What started the board."""

# What machine.reset_cause() says.
_STARTS = (
    ("PWRON_RESET", "power"),
    ("HARD_RESET", "reset"),
    ("WDT_RESET", "watchdog"),
    ("DEEPSLEEP_RESET", "sleep"),
    ("SOFT_RESET", "soft reset"),
)


def started():
    """Return what started the board: "power", "reset", "watchdog", "sleep", "soft reset"; None if that is not known.

    A Pico knows only "power" and "restart", which is all of the others.
    """
    try:
        import machine

        cause = machine.reset_cause()
    except (ImportError, AttributeError):
        return None
    for name, text in _STARTS:
        if cause == getattr(machine, name, None):
            return text if text == "power" or hasattr(machine, "DEEPSLEEP_RESET") else "restart"
    return None


def reset_cause():
    """Return the name of the board's last reset, None where it does not tell.

    A Pico resets itself by its watchdog, so machine.reset() is WDT_RESET there, too.
    """
    try:
        import machine

        cause = machine.reset_cause()
    except (ImportError, AttributeError):
        return None
    for name, _ in _STARTS:
        if getattr(machine, name, None) == cause:
            return name
    return str(cause)
