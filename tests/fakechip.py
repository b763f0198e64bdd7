"""An ESP32 on a pseudo-terminal, as esptool meets it when its stub flasher already runs there.

Facts: esptool's loader.py (commands, their replies), targets/esp32.py (registers).  The flash is a bytearray, whose
bits only become 0 by programming.
"""

import hashlib
import os
import pty
import select
import struct
import threading
import tty
import zlib

MAGIC_REG = 0x40001000
ESP32_MAGIC = 0x00F01D83
SPI_W0 = 0x3FF42080
FLASH_ID = 0x164020  # a chip of 4 MiB

SYNC, READ_REG, SECURITY_INFO, MD5 = 0x08, 0x0A, 0x14, 0x13
DEFL_BEGIN, DEFL_DATA, ERASE_ALL, READ_FLASH = 0x10, 0x11, 0xD0, 0xD2
SECTOR = 4096


def slip(data):
    return b"\xc0" + data.replace(b"\xdb", b"\xdb\xdd").replace(b"\xc0", b"\xdb\xdc") + b"\xc0"


class FakeChip:
    """A context manager.  flash: its content.  port: what a tool is given.  erased: how often all was erased."""

    def __init__(self, size=1 << 22):
        self.flash = bytearray(b"\xff" * size)
        self.erased = 0
        self.commands = set()

    def __enter__(self):
        self._master, self._slave = pty.openpty()
        tty.setraw(self._slave)
        self.port = os.ttyname(self._slave)
        self._wait, self._wake = os.pipe()
        self._thread = threading.Thread(target=self._live)
        self._thread.start()
        return self

    def __exit__(self, *_):
        os.close(self._wake)
        self._thread.join()
        for fd in (self._wait, self._master, self._slave):
            os.close(fd)

    def _live(self):
        buf = b""
        while True:
            if self._wait in select.select([self._master, self._wait], [], [])[0]:
                return
            buf += os.read(self._master, 65536)
            while buf.count(b"\xc0") >= 2:
                _, packet, buf = buf.split(b"\xc0", 2)
                self._obey(packet.replace(b"\xdb\xdc", b"\xc0").replace(b"\xdb\xdd", b"\xdb"))

    def _send(self, data):
        data = slip(data)
        while data:
            data = data[os.write(self._master, data) :]

    def _answer(self, command, value=0, data=b"", status=0):
        data += bytes((status, 0xFF if status else 0))
        self._send(struct.pack("<BBHI", 1, command, len(data), value) + data)

    def _obey(self, packet):
        if len(packet) < 8 or packet[0] != 0:
            return  # also what acknowledges a packet of read flash
        command = packet[1]
        body = packet[8:]
        self.commands.add(command)
        if command == SYNC:
            for _ in range(8):
                self._answer(SYNC)
        elif command == READ_REG:
            address = struct.unpack_from("<I", body)[0]
            self._answer(command, {MAGIC_REG: ESP32_MAGIC, SPI_W0: FLASH_ID}.get(address, 0))
        elif command == SECURITY_INFO:
            self._answer(command, status=1)
        elif command == ERASE_ALL:
            self.flash[:] = b"\xff" * len(self.flash)
            self.erased += 1
            self._answer(command)
        elif command == READ_FLASH:
            at, size, block, _ = struct.unpack_from("<IIII", body)
            data = bytes(self.flash[at : at + size])
            self._answer(command)
            for off in range(0, size, block):
                self._send(data[off : off + block])
            self._send(hashlib.md5(data).digest())
        elif command == DEFL_BEGIN:
            size, _, _, self._at = struct.unpack_from("<IIII", body)
            self._inflate = zlib.decompressobj()
            first, last = self._at // SECTOR * SECTOR, -(-(self._at + size) // SECTOR) * SECTOR
            self.flash[first:last] = b"\xff" * (last - first)
            self._answer(command)
        elif command == DEFL_DATA:
            data = self._inflate.decompress(body[16 : 16 + struct.unpack_from("<I", body)[0]])
            there = self.flash[self._at : self._at + len(data)]
            mixed = int.from_bytes(there, "little") & int.from_bytes(data, "little")
            self.flash[self._at : self._at + len(data)] = mixed.to_bytes(len(data), "little")
            self._at += len(data)
            self._answer(command)
        elif command == MD5:
            at, size = struct.unpack_from("<II", body)
            self._answer(command, data=hashlib.md5(self.flash[at : at + size]).digest())
        else:
            self._answer(command)
