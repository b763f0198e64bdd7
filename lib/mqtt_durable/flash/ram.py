"""RAM as the journal's home, when asked for: survives a lost link, not a reset."""

from .sectors import Sectors


class RamDevice(Sectors):
    """A block device of size bytes (a multiple of 4096), blank."""

    def __init__(self, size):
        self.size = size
        self.mem = bytearray(size)
        for sector in range(self.ioctl(4, 0)):
            self.ioctl(6, sector)

    def get(self, at, buf):
        buf[:] = memoryview(self.mem)[at : at + len(buf)]

    def put(self, at, data, times):
        mem = memoryview(self.mem)  # a slice of the array itself would move all behind it
        for _ in range(times):
            mem[at : at + len(data)] = data
            at += len(data)
