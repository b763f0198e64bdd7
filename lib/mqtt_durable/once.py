"""Code needed at the start, or after a failure, and then no more: loaded for one call, and out of the heap again.

What runs from .mpy files lies in the heap as long as its module is loaded.  A module for this keeps nothing of its own,
and gives out no object that has its code: a class that has to stay is in another one, which stays loaded.
"""

import gc
import sys


def once(where, what, *arguments, **more):
    """Return what a function of a module of this package returns; raises what it raises.

    where: the module, below the package.  what: the function.  A module that was loaded before stays loaded.
    """
    name = __name__.rpartition(".")[0] + "." + where
    stays = name in sys.modules
    if not stays:
        gc.collect()  # it is to be had in the holes
    module = __import__(name, None, None, (what,))
    try:
        return getattr(module, what)(*arguments, **more)
    finally:
        if not stays:
            module = None
            package, _, leaf = name.rpartition(".")
            package = sys.modules[package]
            del sys.modules[name]
            delattr(package, leaf)
            gc.collect()  # what comes next takes the place
