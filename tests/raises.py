"""For tests that run on both interpreters, where pytest.raises is not to be had."""


def raises(kind, function, *args):
    """Call function(*args) and return the exception of that kind that it raises; AssertionError if it raises none."""
    try:
        function(*args)
    except kind as e:
        return e
    raise AssertionError("%s was not raised for %r" % (kind.__name__, args))
