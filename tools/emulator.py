"""A Pico W in the emulator rp2040py 0.3.6: a board whose flash outlives its chips, and whose power fails anywhere.

    board = Board(Path("image.uf2"), port)      # the NAT leads from GATEWAY:port to 127.0.0.1:port, and nowhere else
    board.power_on(hear)                        # hear: called with each line of the console
    board.cut_at_operation(12, "bits", "mixed", seed)
    await board.run(lambda: found)              # until that is true, or the power has failed: board.cut says how
    board.power_off(); board.power_on(hear)     # a new chip with the same flash

What rp2040py does by itself and this does otherwise: it answers the console's OUT endpoint with empty packets without
end; it lets the board's time fly while the board waits, so that no answer from a real network comes in time; it hands
every bit of the radio's program, which nothing here runs, to Python; it executes the driver's busy waits; its NAT
reaches all the world.

The CPU's time is right but for the misses of the flash cache; the flash itself takes no time (on a board a page program
0.4 ms, a sector erase 45 ms).  The radio joins any network at once, and has no access point but SSID.
"""

import asyncio
import time
from pathlib import Path

import norsim
from rp2040py.boards import BoardSpec
from rp2040py.device import MicroPythonDevice
from rp2040py.execute_batch import execute_batch
from rp2040py.external.bootsel_button import BootselButton
from rp2040py.external.cyw43.bus import BACKPLANE_FUNCTION, GSPIBus
from rp2040py.external.cyw43.chip import Cyw43439
from rp2040py.external.cyw43.nat import GATEWAY_IP
from rp2040py.gpio_pin import GPIOPinState
from rp2040py.memory_map import FLASH_START_ADDRESS
from rp2040py.peripherals import ssi

HZ = 125000000
GATEWAY = ".".join(str(n) for n in GATEWAY_IP)
SSID = "RP2040PY-GUEST"
FLASH = 2 << 20

SPEED = 4  # how much faster than the host's time the board's may pass while it waits
_TICKS = 64  # instructions between two looks at the clock, unless something is due
_SLICE_NS = 2000000  # a board that waits is given no longer before the network is heard
_LOOK_NS = 200000
_WAITS = 20  # readings of the timer, each less than _WAIT_CYCLES behind the one before, that make a busy wait
_WAIT_CYCLES = 200
_SKIP_NS = 10000
_BULK = 64  # bytes of a write to the radio that can only be its program


class Bus(GSPIBus):
    """The radio's bus, which does not listen to the radio's program, 224 KiB bit by bit: nothing here would run it."""

    def attach_gpio(self, rp2040, *, clk=29, data=24, cs=25):
        pins = rp2040.gpio
        data_pin = self._data_pin = pins[data]
        high = GPIOPinState.HIGH
        unlisten = None
        deaf = rp2040.clock.create_alarm(lambda: unlisten())

        def clock(new, old):
            if new == high and old != high:
                self._on_clock_rising(data_pin.value == high)
                command = self._pending_command
                if command and command.function == BACKPLANE_FUNCTION and command.size >= _BULK:
                    self._pending_command = None
                    self._selected = False
                    deaf.schedule(0)  # not at once: the pin is going through its listeners
            elif new != high and old == high:
                bit = self._on_clock_falling()
                if bit is not None:
                    data_pin.set_input_value(bit)

        def select(new, old):
            nonlocal unlisten
            unlisten = pins[clk].add_listener(clock)  # the same one, if it is still there
            self._on_cs_change(new != high)

        pins[cs].add_listener(select)


class Radio(Cyw43439):
    """The radio, whose NAT leads to one port of the loopback interface, as the gateway's, and nowhere else."""

    def __init__(self, port=None):
        super().__init__()
        self.bus = Bus()
        self.port = port

    def attach(self, rp2040):
        super().attach(rp2040)
        nat = self.bus.nat_bridge
        nat._udp.maybe_handle = lambda eth: True
        nat._tcp._connect_fn = self._connect

    async def _connect(self, host, port):
        if (host, port) != (GATEWAY, self.port):
            raise ConnectionRefusedError
        return await asyncio.open_connection("127.0.0.1", port)


def make_device(image, radio=None):
    """A chip with the .uf2 at image in its flash, as rp2040py's MicroPythonDevice; not started.

    radio: a Radio of its own, else one that leads nowhere.
    """
    radio = radio or Radio()
    device = MicroPythonDevice(board=BoardSpec(image=Path(image), extras=(BootselButton, lambda: radio)))
    _quiet(device)
    _skip_waits(device)
    return device


def _quiet(device):
    """Let an endpoint on which the host has nothing to say stay idle, as on a wire.

    The emulated host answers it with empty packets without end, and the board does little else.
    """
    cdc = device.cdc
    answer = cdc.usb.on_endpoint_read
    clock = device.simulator.clock
    idle = []

    def asked(endpoint, size):
        if endpoint == cdc._out_endpoint and not cdc.tx_fifo.item_count:
            idle.append((endpoint, size))
        else:
            answer(endpoint, size)

    def look():
        if idle and cdc.tx_fifo.item_count:
            answer(*idle.pop())
        alarm.schedule(_LOOK_NS)

    cdc.usb.on_endpoint_read = asked
    alarm = clock.create_alarm(look)
    alarm.schedule(_LOOK_NS)


def _skip_waits(device):
    """Pass over the driver's busy waits: loops that read the timer and do nothing else.

    device.skipped_ns is what they took of the board's time, which passes all the same.
    """
    timer = device.mcu.timer
    core = device.mcu.core
    clock = device.simulator.clock
    read = timer.read_uint32
    last = [0, 0, 0]  # where it was read from, at which cycle, how often in a row
    device.skipped_ns = 0

    def reading(offset):
        if core.pc == last[0] and core.cycles - last[1] < _WAIT_CYCLES:
            last[2] += 1
            if last[2] > _WAITS:
                clock.tick(_SKIP_NS)
                device.skipped_ns += _SKIP_NS
        else:
            last[0] = core.pc
            last[2] = 0
        last[1] = core.cycles
        return read(offset)

    timer.read_uint32 = reading


class Board:
    """See the top of this file.

    .flash: all bytes of it.  .programs, .erases, .bytes (programmed ones that were not 0xFF): over all its lives; an
    erase of 64 KiB counts as 16.  .operations: of this life.  .cut: "" or, in words, how the power failed.
    .resets: chip resets that nobody outside had asked for, by the watchdog or by the program.
    """

    def __init__(self, image, port):
        self.flash = None
        self.programs = self.erases = self.bytes = self.resets = self.operations = 0
        self.cut = ""
        self._image = image
        self._port = port
        self._chip = None
        self._gone = []  # radios of earlier lives, whose connections nobody has ended

    # -- power

    def power_on(self, hear):
        """Start a chip.  Must be called where an event loop runs, the one that run() then belongs to."""
        radio = Radio(self._port)
        chip = self._chip = make_device(self._image, radio)
        self._radio = radio
        self._simulator = chip.simulator
        self._clock = chip.simulator.clock
        self._core = chip.mcu.core
        self.cut = ""
        self.operations = 0
        self._plan = None
        self._cut_in = 0
        if self.flash is not None:
            chip.mcu.flash[:FLASH] = self.flash
        self._simulator.bind_loop()
        text = bytearray()

        def told(data):
            text.extend(data)
            while b"\n" in text:
                line, _, rest = text.partition(b"\n")
                text[:] = rest
                hear(line.decode(errors="replace").rstrip("\r"))

        chip.cdc.on_serial_data = told
        reset = chip.mcu.watchdog.on_watchdog_trigger

        def reset_itself():
            self.resets += 1
            reset()

        chip.mcu.watchdog.on_watchdog_trigger = reset_itself
        self._ssi = chip.mcu.ssi
        self._apply = self._ssi._apply_command
        self._ssi._apply_command = self._command
        self._slice = self._clock.create_alarm(self._end_of_slice)
        self._slice.schedule(_SLICE_NS)
        self._core.pc = FLASH_START_ADDRESS

    def power_off(self, hidden=False):
        """Take the chip away.  hidden: nobody at the far side of its connections hears of it, as with real power."""
        self.flash = bytes(self._chip.mcu.flash[:FLASH])
        if hidden:
            self._gone.append(self._radio)
        else:
            self._radio.bus.nat_bridge.reset()
        self._chip = None

    def close(self):
        """Take the chip away, and end all that earlier ones have left open."""
        if self._chip:
            self.power_off()
        for radio in self._gone:
            radio.bus.nat_bridge.reset()
        self._gone.clear()

    def lose(self, what):
        """Lose the "network", which the radio is told, or the "connections", which nobody on the board is told."""
        if what == "network":
            self._radio.bus._queue_disassoc_events()
        self._radio.bus.nat_bridge.reset()

    # -- time

    @property
    def seconds(self):
        """Of the board, since power_on()."""
        return self._clock.nanos / 1e9

    @property
    def cycles(self):
        """What the CPU was busy for since power_on(), busy waits included."""
        return self._core.cycles + round(self._chip.skipped_ns * HZ / 1e9)

    async def run(self, check):
        """Let it run until check() is true or the power fails.  check is called every few milliseconds."""
        while not self.cut and not check():
            board_ns = self._clock.nanos
            began = time.monotonic()
            self._simulator.stopped = False
            execute_batch(self._simulator, _TICKS)
            ahead_s = (self._clock.nanos - board_ns) / 1e9 / SPEED - (time.monotonic() - began)
            await asyncio.sleep(max(0, ahead_s))

    def _end_of_slice(self):
        if self._core.waiting:
            self._simulator.stopped = True
        self._slice.schedule(_SLICE_NS)

    # -- cuts

    def cut_at_operation(self, n, program, erase, seed):
        """Let the power fail in the n-th page program or sector erase from now, which is left half done.

        program, erase, seed: how, as norsim.Nor.cut_after() takes them.
        """
        self._cut_in = n
        self._plan = program, erase, seed

    def cut_after(self, seconds):
        """Let the power fail after so many seconds of the board's time, between two instructions."""
        self._cut_alarm = self._clock.create_alarm(lambda: self._fail("between two instructions"))
        self._cut_alarm.schedule(seconds * 1e9)

    def _fail(self, how):
        self.cut = self.cut or how
        self._simulator.stopped = True

    def _command(self):
        """Carry out a command that the flash was given, unless the power has failed or fails in it."""
        flash_chip = self._ssi
        command = flash_chip._tx_buffer
        sizes = {ssi.CMD_PAGE_PROGRAM: 256, ssi.CMD_SECTOR_ERASE: 4096, ssi.CMD_BLOCK_ERASE: 65536}
        size = sizes.get(command[0]) if len(command) >= 4 and flash_chip._write_enabled else None
        if size:
            data = bytes(command[4:]) if size == 256 else None
            self.operations += 1
            if data:
                self.programs += 1
                self.bytes += len(data) - data.count(0xFF)
            else:
                self.erases += size // 4096
            if self._cut_in:
                self._cut_in -= 1
                if not self._cut_in:
                    self._tear(int.from_bytes(command[1:4], "big"), size, data)
            if self.cut:
                command.clear()  # no command: nothing is done
        self._apply()

    def _tear(self, at, size, data):
        program, erase, seed = self._plan
        base = at & -max(size, 4096)
        cells = self._chip.mcu.flash[base : base + max(size, 4096)]
        nor = norsim.Nor(len(cells), 1, len(cells))
        nor.mem[:] = cells
        nor.cut_after(1, program, erase, seed)
        try:
            if data:
                nor.writeblocks(0, data, at - base)
            else:
                nor.ioctl(6, 0)
        except norsim.PowerCut as cut:
            self._fail("flash at 0x%x: %s" % (base, cut))
        cells[:] = nor.mem
