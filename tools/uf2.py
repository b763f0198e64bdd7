"""The UF2 format, as far as a Pico W takes it: https://github.com/microsoft/uf2."""

import struct

BLOCK = 512
RP2040 = 0xE48BFF56
_MAGIC = 0x0A324655, 0x9E5D5157, 0x0AB16F30
_HAS_FAMILY = 0x2000


def pages_of(data):
    """Return {address: 256 bytes} of an .uf2 for the RP2040.  Raises ValueError, whose argument is one line."""
    pages = {}
    count = len(data) // BLOCK
    if not count or len(data) % BLOCK:
        raise ValueError("no .uf2, or a part of one: its %d bytes are no whole number of blocks" % len(data))
    for n in range(count):
        magic, second, flags, at, size, number, total, family = struct.unpack_from("<8I", data, n * BLOCK)
        last = struct.unpack_from("<I", data, n * BLOCK + BLOCK - 4)[0]
        if (magic, second, last) != _MAGIC:
            raise ValueError("no .uf2, or a damaged one: block %d is none" % n)
        if not flags & _HAS_FAMILY or family != RP2040:
            raise ValueError("an .uf2 for another chip than the RP2040 of the Pico W (family 0x%08x)" % family)
        if (number, total, size, at % 256) != (n, count, 256, 0):
            raise ValueError("a damaged .uf2: block %d says it is %d of %d" % (n, number, total))
        pages[at] = data[n * BLOCK + 32 : n * BLOCK + 288]
    return pages


def encode(pages):
    """Return the .uf2 for the RP2040 of {address: 256 bytes}, in the order of the addresses."""
    out = []
    for n, at in enumerate(sorted(pages)):
        head = struct.pack("<8I", *_MAGIC[:2], _HAS_FAMILY, at, 256, n, len(pages), RP2040)
        out.append(head + pages[at].ljust(476, b"\0") + struct.pack("<I", _MAGIC[2]))
    return b"".join(out)
