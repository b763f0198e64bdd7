"""SkipTest(reason): raised by a test that cannot run here.  The reason is reported; see run_all.py.

Importable on both interpreters; on CPython it is the exception that pytest already knows.
"""

try:
    from unittest import SkipTest
except ImportError:

    class SkipTest(Exception):
        """The argument is the reason."""


__all__ = ["SkipTest"]
