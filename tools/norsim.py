"""NOR flash as a MicroPython block device, with power that can fail in the middle of any operation.

Owns the physics: a program only clears bits, an erase sets a whole sector to 0xFF, a cut leaves either half done and
may leave cells that read differently each time.  Knows nothing of what is stored.  The same file runs on CPython and
on MicroPython, and the same seed gives the same cut on both, so an id printed by one replays on the other.

    nor = Nor(65536)                      # in RAM: nor.mem is the flash
    nor.cut_after(3, program="bits")      # the third program or erase from now is left half done, PowerCut is raised
    nor.power_on()                        # what is in the cells stays, weak cells included

    nor = Nor(65536, path="mqj.nor")      # in a file that survives SIGKILL; read_counters("mqj.nor") from outside
    nor.kill_after(20, erase="mixed")     # the process ends as if by SIGKILL, in the middle of that operation

    device = Encrypted(nor)               # the same flash, as an ESP32 with flash encryption shows it
"""

import os
import struct
import time
from array import array

MODES_PROGRAM = ("none", "all", "prefix", "bytes", "bits")
MODES_ERASE = ("none", "all", "mixed", "bits", "zeros", "random")

_EINVAL = 22
_PROGRAM_PIECE = 16  # bytes reaching the file in one write: a SIGKILL tears a program here
_ERASE_PIECE = 256
# After the cells: magic, size, prog_size, erase_size, page_size, then the six totals, then 4 bytes per sector.
_TRAILER = "<8sIIIIQQQQQQ"
_TRAILER_BYTES = 72
_TOTALS_AT = 24
_MAGIC = b"NORSIM1\n"
_MAX_WEAK_ERASED = 300  # bytes of a half-erased sector that may read unstably
_BLOCK = 16  # bytes encrypted together
_HALF = 0xFFFFFFFFFFFFFFFF  # eight of them


class PowerCut(Exception):
    """The simulated power failed; the operation is done in part, the device answers nothing until power_on()."""


class Rng:
    """xorshift32: the same numbers on every interpreter.  seed: any int."""

    def __init__(self, seed):
        self._x = (seed * 2654435761 + 0x9E3779B9) & 0xFFFFFFFF or 1
        self.next()

    def next(self):
        """Return the next number, 1..2**32-1."""
        x = self._x
        x ^= (x << 13) & 0xFFFFFFFF
        x ^= x >> 17
        x ^= (x << 5) & 0xFFFFFFFF
        self._x = x
        return x

    def below(self, n):
        """Return a number 0..n-1."""
        return self.next() % n

    def bytes(self, n):
        """Return n random bytes."""
        out = bytearray((n + 3) & ~3)
        for i in range(0, n, 4):
            x = self.next()
            out[i] = x & 255
            out[i + 1] = x >> 8 & 255
            out[i + 2] = x >> 16 & 255
            out[i + 3] = x >> 24
        return out[:n]


def _mode(modes, mode):
    """Return the name of mode, given as a name or an index; ValueError if there is none such."""
    if isinstance(mode, int) and 0 <= mode < len(modes):
        return modes[mode]
    if mode not in modes:
        raise ValueError("mode: %r, expected one of %s" % (mode, ", ".join(modes)))
    return mode


def _kill_self():
    """End this process as SIGKILL does."""
    if hasattr(os, "kill"):
        os.kill(os.getpid(), 9)
    os.system("kill -9 $PPID")  # MicroPython has no os.kill; the parent of the shell is this process
    while True:
        time.sleep(1)


def read_counters(path):
    """Return the geometry and counters of a Nor file as a dict, without disturbing the process that has it open.

    Raises OSError if the file cannot be read, ValueError if it is not a Nor file.
    """
    with open(path, "rb") as f:
        data = f.read()
    at = data.rfind(_MAGIC)  # the last one: the cells may hold anything
    if at < 0 or len(data) < at + _TRAILER_BYTES:
        raise ValueError("%s: not a Nor file" % path)
    fields = struct.unpack(_TRAILER, data[at : at + _TRAILER_BYTES])
    size, erase_size = fields[1], fields[3]
    if size != at or not erase_size or len(data) != at + _TRAILER_BYTES + 4 * (size // erase_size):
        raise ValueError("%s: not a Nor file" % path)
    return {
        "size": size,
        "prog_size": fields[2],
        "erase_size": erase_size,
        "page_size": fields[4],
        "reads": fields[5],
        "programs": fields[6],
        "page_programs": fields[7],
        "programmed_bytes": fields[8],
        "overprograms": fields[9],
        "ops": fields[10],
        "erases": list(struct.unpack("<%dI" % (size // erase_size), data[at + _TRAILER_BYTES :])),
    }


class Nor:
    """A NOR flash of size bytes; a standard block device whose block is one erase sector.

    prog_size: bytes a program must be aligned to and a multiple of.  page_size: what page_programs counts and what
    damage_page ruins.  path: a file that holds cells and counters, made when missing; ValueError if what is there has
    another geometry.  seed: default seed of the cuts.  program_us, erase_ms (attributes, default 0): the time one page
    program and one sector erase take in a file, spread over the pieces of the operation.

    Counters: reads, programs, page_programs, programmed_bytes, overprograms (programs that asked for a 1 where the
    cell was 0), erases (array, one per sector), ops (programs and sector erases: what cut_after counts).
    Misaligned or out-of-range access raises OSError(22) and changes nothing.
    """

    def __init__(self, size=65536, prog_size=4, erase_size=4096, page_size=256, path=None, seed=0):
        if size <= 0 or size % erase_size or erase_size % prog_size or erase_size % page_size:
            raise ValueError("size %d: no whole number of sectors, programs and pages" % size)
        self.size = size
        self.prog_size = prog_size
        self.erase_size = erase_size
        self.page_size = page_size
        self.program_us = 0
        self.erase_ms = 0
        self.reads = self.programs = self.page_programs = self.programmed_bytes = self.overprograms = self.ops = 0
        self.erases = array("I", [0] * (size // erase_size))
        self.cut_note = ""  # what the last cut did, for messages
        self._seed = seed
        self._dead = False
        self._cut_in = 0  # operations until the cut; 0: none is planned
        self._plan = None
        self._weak = {}  # address -> mask of the bits that read at random
        self._weak_at = []  # its addresses in order: a dict has no order on MicroPython
        self._noise = None
        self._file = None
        if path is None:
            self.mem = bytearray(b"\xff" * size)
        else:
            self._open(path)
        self._view = memoryview(self.mem)

    # The block device.

    def readblocks(self, n, buf, off=0):
        """Read len(buf) bytes from sector n, off bytes into it; may run on into the next sectors."""
        if self._dead:
            raise PowerCut("power is off")
        start = n * self.erase_size + off
        end = start + len(buf)
        if start < 0 or end > self.size:
            raise OSError(_EINVAL, "EINVAL")
        self.reads += 1
        buf[:] = self._view[start:end]
        if self._weak_at:
            self._read_weak(start, end, buf)

    def writeblocks(self, n, buf, off=None):
        """Program buf at sector n, off bytes into it.  Without off: erase every sector touched, then program."""
        if self._dead:
            raise PowerCut("power is off")
        start = n * self.erase_size + (off or 0)
        end = start + len(buf)
        if start < 0 or end > self.size or start % self.prog_size or end % self.prog_size:
            raise OSError(_EINVAL, "EINVAL")
        if end == start:
            return
        if off is None:
            for sector in range(n, (end - 1) // self.erase_size + 1):
                self._erase(sector)
        self._program(start, end, buf)

    def ioctl(self, op, arg=0):
        """4: number of sectors, 5: bytes of a sector, 6: erase sector arg; 1-3: nothing to do, 0; else None."""
        if self._dead:
            raise PowerCut("power is off")
        if op == 4:
            return self.size // self.erase_size
        if op == 5:
            return self.erase_size
        if op == 6:
            if not 0 <= arg < self.size // self.erase_size:
                raise OSError(_EINVAL, "EINVAL")
            self._erase(arg)
            return 0
        return 0 if op in (1, 2, 3) else None

    # Power.

    def cut_after(self, ops, program="prefix", erase="mixed", seed=None, weak=False, damage_page=False):
        """Let the power fail in the ops-th program or erase from now (1: the next); 0 plans no cut.

        program, erase: how the one it hits is left, a name or an index of MODES_PROGRAM, MODES_ERASE.
        program: none | all | prefix (random length) | bytes (random ones) | bits (random ones of those to clear).
        erase: none | all | mixed (part blank, part old) | bits (a few left over) | zeros | random.
        weak: up to half of the bits being cleared, or up to 300 bytes of the sector, read at random from then on, until
        a program clears them or the sector is erased.  damage_page: one page being programmed becomes random, the
        pages before it are complete.  Raises ValueError for an unknown mode.
        """
        seed = self._seed if seed is None else seed
        self._plan = (_mode(MODES_PROGRAM, program), _mode(MODES_ERASE, erase), seed, weak, damage_page, False)
        self._cut_in = ops

    def kill_after(self, ops, program="prefix", erase="mixed", seed=None, damage_page=False):
        """As cut_after, but the process ends there as by SIGKILL.  Only for a device in a file (else ValueError).

        There are no weak cells: they live in the process.
        """
        if self._file is None:
            raise ValueError("kill_after: the device is in RAM and would be gone")
        self.cut_after(ops, program, erase, seed, False, damage_page)
        self._plan = self._plan[:5] + (True,)

    def power_on(self):
        """Give power again; a cut still planned is forgotten."""
        self._dead = False
        self._cut_in = 0

    @property
    def weak_cells(self):
        """How many bytes hold a bit that reads at random."""
        return len(self._weak_at)

    def stats(self):
        """Return the counters as a dict; erases as a list, one per sector."""
        return {
            "reads": self.reads,
            "programs": self.programs,
            "page_programs": self.page_programs,
            "programmed_bytes": self.programmed_bytes,
            "overprograms": self.overprograms,
            "ops": self.ops,
            "erases": list(self.erases),
        }

    def close(self):
        """Write the counters and close the file, if there is one."""
        if self._file is not None:
            self._save_totals()
            self._file.close()
            self._file = None

    # Cells.

    def _program(self, start, end, buf):
        mem = self.mem
        n = end - start
        old = mem[start:end]
        want = int.from_bytes(buf, "big")
        new = want & int.from_bytes(old, "big")
        self.ops += 1
        self.programs += 1
        self.programmed_bytes += n
        pages = (end - 1) // self.page_size - start // self.page_size + 1
        self.page_programs += pages
        if new != want:
            self.overprograms += 1
        new = new.to_bytes(n, "big")
        if self._cut_in:
            self._cut_in -= 1
            if not self._cut_in:
                self._torn_program(start, end, old, new, buf)
        mem[start:end] = new
        if self._weak_at:
            self._firm(start, end, buf)
        if self._file is not None:
            self._save_totals()
            self._save_cells(start, end, _PROGRAM_PIECE, pages * self.program_us / 1000000)

    def _erase(self, sector):
        size = self.erase_size
        start = sector * size
        self.ops += 1
        self.erases[sector] += 1
        if self._cut_in:
            self._cut_in -= 1
            if not self._cut_in:
                self._torn_erase(start, sector)
        self.mem[start : start + size] = b"\xff" * size
        if self._weak_at:
            self._forget_weak(start, start + size)
        if self._file is not None:
            self._save_totals(sector)
            self._save_cells(start, start + size, _ERASE_PIECE, self.erase_ms / 1000)

    def _torn_program(self, start, end, old, new, buf):
        mode, _, seed, weak, damage_page, _ = self._plan
        rng = Rng(seed)
        n = end - start
        note = mode
        done = 0  # bytes from the start that are programmed to the full
        got = bytearray(old)
        if mode == "all":
            done = n
        elif mode == "prefix":
            done = rng.below(n + 1)
            note = "prefix %d" % done
        if done:
            got[:done] = new[:done]
            self._firm(start, start + done, buf)
        else:
            if mode == "bytes":
                for i in range(n):
                    if rng.below(2):
                        got[i] = new[i]
            elif mode == "bits":
                keep = rng.bytes(n)
                for i in range(n):
                    got[i] &= new[i] | keep[i]
        first, last = start, end
        self.mem[start:end] = got
        if damage_page:
            page = self.page_size
            lo = (start // page + rng.below((end - 1) // page - start // page + 1)) * page
            note += ", page at 0x%x random" % lo
            self.mem[start:end] = old
            if lo > start:
                self.mem[start:lo] = new[: lo - start]
            self.mem[lo : lo + page] = rng.bytes(page)
            first, last = min(start, lo), max(end, lo + page)
        if weak:
            masks = [rng.bytes(n) for _ in range(1 + rng.below(3))]  # of the bits being cleared 1/2, 1/4 or 1/8
            for i in range(n):
                m = old[i] & ~new[i]
                for mask in masks:
                    m &= mask[i]
                if m:
                    self._weak[start + i] = self._weak.get(start + i, 0) | m
        self._fail("program 0x%x+%d: %s" % (start, n, note), first, last, None)

    def _torn_erase(self, start, sector):
        _, mode, seed, weak, _, _ = self._plan
        rng = Rng(seed)
        size = self.erase_size
        end = start + size
        old = self.mem[start:end]
        got = old
        if mode == "zeros":
            got = bytearray(size)
        elif mode == "random":
            got = rng.bytes(size)
        elif mode != "none":
            got = bytearray(b"\xff" * size)
        if mode == "all":
            self._forget_weak(start, end)
        elif mode == "mixed":
            how = rng.below(3)
            k = rng.below(size + 1)
            if how == 0:
                got[k:] = old[k:]
            elif how == 1:
                got[:k] = old[:k]
            else:
                for lo in range(0, size, self.page_size):
                    if rng.below(2):
                        got[lo : lo + self.page_size] = old[lo : lo + self.page_size]
        elif mode == "bits":
            for _ in range(1 + rng.below(64)):
                at = rng.below(size)
                got[at] &= old[at] | (255 ^ 1 << rng.below(8))
        self.mem[start:end] = got
        if weak:
            for _ in range(1 + rng.below(_MAX_WEAK_ERASED)):
                at = start + rng.below(size)
                self._weak[at] = self._weak.get(at, 0) | (1 + rng.below(255))
        self._fail("erase sector %d: %s" % (sector, mode), start, end, sector)

    def _fail(self, note, start, end, sector):
        """Write what is left of the operation, then let the power be off or the process be dead."""
        self.cut_note = note
        self._weak_at = sorted(self._weak)
        self._noise = Rng(self._plan[2] + 1)
        if self._file is not None:
            self._save_totals(sector)
            self._save_cells(start, end, end - start, 0)
        self._dead = True
        if self._plan[5]:
            _kill_self()
        raise PowerCut(note)

    # Weak cells.

    def _read_weak(self, start, end, buf):
        weak = self._weak
        noise = self._noise
        # Both ways go by rising address, so both draw the same random numbers.
        for at in range(start, end) if end - start < len(self._weak_at) else self._weak_at:
            if start <= at < end and at in weak:
                mask = weak[at]
                buf[at - start] = (buf[at - start] & ~mask) | (noise.below(256) & mask)

    def _firm(self, start, end, buf):
        """A program has cleared the bits that are 0 in buf: those read 0 from now on."""
        for at in range(start, end):
            if at in self._weak:
                self._weak[at] &= buf[at - start]
                if not self._weak[at]:
                    del self._weak[at]
        self._weak_at = sorted(self._weak)

    def _forget_weak(self, start, end):
        for at in self._weak_at:
            if start <= at < end:
                del self._weak[at]
        self._weak_at = sorted(self._weak)

    # The file.

    def _open(self, path):
        try:
            os.stat(path)
        except OSError:
            # Made under another name first: a kill in between must not leave half a device.
            with open(path + ".new", "wb") as f:
                f.write(b"\xff" * self.size)
                f.write(self._totals())
                f.write(bytes(4 * len(self.erases)))
            os.rename(path + ".new", path)
        found = read_counters(path)
        for key in ("size", "prog_size", "erase_size", "page_size"):
            if found[key] != getattr(self, key):
                raise ValueError("%s: %s is %d, expected %d" % (path, key, found[key], getattr(self, key)))
        for key in ("reads", "programs", "page_programs", "programmed_bytes", "overprograms", "ops"):
            setattr(self, key, found[key])
        self.erases = array("I", found["erases"])
        self._file = open(path, "r+b", buffering=0)
        self.mem = bytearray(self._file.read(self.size))

    def _totals(self):
        return struct.pack(
            _TRAILER,
            _MAGIC,
            self.size,
            self.prog_size,
            self.erase_size,
            self.page_size,
            self.reads,
            self.programs,
            self.page_programs,
            self.programmed_bytes,
            self.overprograms,
            self.ops,
        )

    def _save_totals(self, sector=None):
        """Counters go first: an operation cut short has still worn the cells."""
        self._file.seek(self.size + _TOTALS_AT)
        self._file.write(self._totals()[_TOTALS_AT:])
        if sector is not None:
            self._file.seek(self.size + _TRAILER_BYTES + 4 * sector)
            self._file.write(struct.pack("<I", self.erases[sector]))

    def _save_cells(self, start, end, piece, seconds):
        wait = seconds * piece / (end - start)
        self._file.seek(start)
        while start < end:
            stop = min(start + piece, end)
            self._file.write(self._view[start:stop])
            start = stop
            if wait:
                time.sleep(wait)


class Encrypted:
    """A Nor behind flash encryption: a block device whose programs are multiples of 16 bytes at multiples of 16.

    Each 16 bytes are one cipher block, which depends on its address, so erased flash reads as noise, the same each
    time, a program over what is programmed gives noise, and one torn or weak cell garbles its 16 bytes.  Cuts, cells
    and counters are those of .nor, which has the cipher text.  The cipher only mixes well: it protects nothing.
    """

    def __init__(self, nor):
        self.nor = nor
        # Decrypting is slow: what was read last, as it stood in the cells and as plain text.
        self._cells = bytearray(b"\xff" * nor.size)
        self._plain = bytearray(_erased_text(nor.size))

    def readblocks(self, n, buf, off=0):
        """Read len(buf) bytes from sector n, off bytes into it; may run on into the next sectors."""
        start = n * self.nor.erase_size + off
        skip = start % _BLOCK
        data = bytearray((skip + len(buf) + _BLOCK - 1) // _BLOCK * _BLOCK)
        self.nor.readblocks(0, data, start - skip)
        self._decrypt((start - skip) // _BLOCK, data)
        buf[:] = memoryview(data)[skip : skip + len(buf)]

    def writeblocks(self, n, buf, off=None):
        """Program buf at sector n, off bytes into it.  Without off: erase every sector touched, then program."""
        if len(buf) % _BLOCK or (off or 0) % _BLOCK:
            raise OSError(_EINVAL, "EINVAL")
        block = (n * self.nor.erase_size + (off or 0)) // _BLOCK
        data = bytearray(len(buf))
        for i in range(0, len(buf), _BLOCK):
            data[i : i + _BLOCK] = _encrypt(block, buf[i : i + _BLOCK])
            block += 1
        self.nor.writeblocks(n, data, off)

    def ioctl(self, op, arg=0):
        return self.nor.ioctl(op, arg)

    def dump(self):
        """All of it, as it reads; weak cells as they are at best."""
        data = bytearray(self.nor.mem)
        self._decrypt(0, data)
        return bytes(data)

    def _decrypt(self, block, data):
        at = block * _BLOCK
        if self._cells[at : at + len(data)] == data:
            data[:] = self._plain[at : at + len(data)]
            return
        erased = _erased_text(self.nor.size)
        for i in range(0, len(data), _BLOCK):
            cells = bytes(data[i : i + _BLOCK])
            if self._cells[at : at + _BLOCK] != cells:
                self._cells[at : at + _BLOCK] = cells
                if cells == _ERASED:
                    self._plain[at : at + _BLOCK] = erased[at : at + _BLOCK]
                else:
                    self._plain[at : at + _BLOCK] = _decrypt(block, cells)
            data[i : i + _BLOCK] = self._plain[at : at + _BLOCK]
            block += 1
            at += _BLOCK


_ERASED = b"\xff" * _BLOCK
_erased_texts = {}  # by size


def _erased_text(size):
    """What erased flash reads as."""
    if size not in _erased_texts:
        text = _erased_texts[size] = bytearray(size)
        for at in range(0, size, _BLOCK):
            text[at : at + _BLOCK] = _decrypt(at // _BLOCK, _ERASED)
    return _erased_texts[size]


def _round(half, key):
    """What one half of a block does to the other."""
    x = (half ^ key) * 0x9E3779B97F4A7C15 & _HALF
    x = (x ^ x >> 32) * 0xD6E8FEB86659FD93 & _HALF
    return x ^ x >> 32


def _encrypt(block, data):
    """A Feistel network of four rounds."""
    a = int.from_bytes(data[:8], "little")
    b = int.from_bytes(data[8:], "little")
    for i in range(4):
        a, b = b, a ^ _round(b, block << 3 | i)
    return a.to_bytes(8, "little") + b.to_bytes(8, "little")


def _decrypt(block, data):
    a = int.from_bytes(data[:8], "little")
    b = int.from_bytes(data[8:], "little")
    for i in range(3, -1, -1):
        a, b = b ^ _round(a, block << 3 | i), a
    return a.to_bytes(8, "little") + b.to_bytes(8, "little")
