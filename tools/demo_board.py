"""The demo's board, on the MicroPython unix port: runs boot.py, then main.py, in the current directory.

    MICROPYPATH=.:.frozen:ROOT/lib:ROOT/tools/shim micropython ROOT/tools/demo_board.py

The flash is the partition of tools/shim/esp32.py.  Beside that module's MQTT_DURABLE_NOR_KILL, which counts from the
start, the environment may say

    DEMO_CUT    "ops,program,erase,seed": the same, counted from when the client is connected (see arm())

A cut in the middle of a flash operation says on the console which operation it hit.
"""

import asyncio
import os

import esp32
import norsim


def _flash():
    """The simulated flash behind the partition, None without one."""
    found = esp32.Partition.find(esp32.Partition.TYPE_DATA, label="mqj")
    return found[0]._device if found else None


def arm(client):
    """Plan the cut that DEMO_CUT orders, once the client is connected."""
    order = os.getenv("DEMO_CUT")
    if order:
        asyncio.create_task(_arm(client, order.split(",")))


async def _arm(client, order):
    while not client.connected:
        await asyncio.sleep_ms(1)
    ops, program, erase, seed = order
    _flash().kill_after(int(ops), program, erase, int(seed))


def _talk():
    """Have the flash say what it was doing when the power failed."""
    die = norsim._kill_self

    def tell_and_die():
        print("demo: power failed in %s" % _flash().cut_note)
        die()

    norsim._kill_self = tell_and_die


def _run(name):
    """Run a file as the firmware does, in __main__."""
    with open(name) as f:
        source = f.read()
    exec(compile(source, name, "exec"), {"__name__": "__main__"})


if __name__ == "__main__":
    _talk()
    _run("boot.py")
    _run("main.py")
