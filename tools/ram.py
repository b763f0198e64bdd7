"""The block device of the benchmarks, in place of flash."""

_BLANK = b"\xff" * 4096


class Ram:
    """A block device that costs next to nothing: no checks, and a program replaces what was there."""

    def __init__(self, size):
        self.mem = bytearray(size)
        self._view = memoryview(self.mem)
        for sector in range(size >> 12):
            self.ioctl(6, sector)

    def readblocks(self, n, buf, off=0):
        at = (n << 12) + off
        buf[:] = self._view[at : at + len(buf)]

    def writeblocks(self, n, buf, off=0):
        at = (n << 12) + off
        # Not self.mem[...] = buf: MicroPython then moves all that is behind onto itself.
        self._view[at : at + len(buf)][:] = buf

    def ioctl(self, op, arg):
        if op == 4:
            return len(self.mem) >> 12
        if op == 5:
            return 4096
        if op == 6:
            self._view[arg << 12 : (arg + 1) << 12][:] = _BLANK
        return 0
