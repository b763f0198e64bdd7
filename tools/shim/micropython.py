"""Stand-in for the micropython module under CPython.  On MicroPython the built-in module is found first."""


def const(value):
    """Return value; the compiler of MicroPython folds it."""
    return value


def native(function):
    """Return function; MicroPython would compile it to machine code."""
    return function


viper = bytecode = native
_locks = 0


def heap_lock():
    """Count a lock.  CPython cannot forbid allocation: the promise is checked on MicroPython only."""
    global _locks
    _locks += 1
    return _locks


def heap_unlock():
    """Undo one heap_lock(); return the locks left."""
    global _locks
    _locks -= 1
    return _locks


def heap_locked():
    """Return the depth of the lock."""
    return _locks


def opt_level(level=None):
    """Return 0, the level at which nothing is left out; setting it does nothing."""
    return 0 if level is None else None


def mem_info(verbose=None):
    """Print nothing: CPython's heap has nothing to do with a board's."""


def stack_use():
    """Return 0: not known here."""
    return 0


def schedule(function, arg):
    """Call function(arg) at once; a board calls it between two bytecodes."""
    function(arg)


def alloc_emergency_exception_buf(size):
    """Nothing to reserve here."""


def kbd_intr(char):
    """Ctrl-C stays as it is."""
