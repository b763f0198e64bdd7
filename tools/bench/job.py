"""One measurement of one entry, run by tools/bench_peers.py: main(ENTRY, JOB, PORT, HOME, IN_FLIGHT, ARGUMENTS...)

Prints its result as one line of JSON; before that "ready" when messages are to be sent to it.  Runs on MicroPython, and
for paho on CPython.  WARM messages go ahead of what is measured.
"""

import gc
import sys
import time

WARM = 32

if hasattr(time, "ticks_us"):
    ticks_us = time.ticks_us
    ticks_diff = time.ticks_diff
else:

    def ticks_us():
        return time.perf_counter_ns() // 1000

    def ticks_diff(a, b):
        return a - b


def tell(name, figure):
    print('{"%s": %s}' % (name, figure))


def cpu_publish(entry, qos, n):
    """For valgrind: the difference between two n counts."""
    entry.connect()
    entry.publish(qos, n)
    tell("n", n)


def cpu_receive(entry, qos, n):
    entry.connect()
    entry.subscribe(qos)
    print("ready")
    entry.receive(n)
    tell("n", n)


def publish(entry, qos, n):
    """us: the time that n messages take until all are acknowledged, at QoS 0 until all are sent."""
    entry.connect()
    entry.publish(qos, WARM)
    gc.collect()
    begin = ticks_us()
    entry.publish(qos, n)
    tell("us", ticks_diff(ticks_us(), begin))


def receive(entry, qos, n):
    """us: the time that n messages take, which wait already."""
    entry.connect()
    entry.subscribe(qos)
    print("ready")
    entry.receive(WARM)
    gc.collect()
    begin = ticks_us()
    entry.receive(WARM + n)
    tell("us", ticks_diff(ticks_us(), begin))


def publish_bytes(entry, qos, n):
    """bytes: allocated for n messages, freed or not."""
    entry.connect()
    entry.publish(qos, WARM)
    before = gc.mem_alloc()
    entry.publish(qos, n)
    tell("bytes", gc.mem_alloc() - before)


def receive_bytes(entry, qos, n):
    entry.connect()
    entry.subscribe(qos)
    print("ready")
    entry.receive(WARM)
    got = entry.got
    before = gc.mem_alloc()
    entry.receive(WARM + n)
    tell("bytes", (gc.mem_alloc() - before) * n // (entry.got - got))


def run(entry, qos, n):
    """Publish n messages and receive n: all that a device does.  modules: those that are loaded then."""
    entry.connect()
    entry.publish(qos, n)
    entry.subscribe(qos)
    print("ready")
    entry.receive(n)
    tell("modules", '"%s"' % " ".join(sys.modules))


def numbers(entry, qos, last):
    """Publish the numbers up to last, over whatever happens to the link."""
    entry.connect()
    print("ready")
    entry.numbers(qos, last)
    tell("done", "true")


def heap(module, port, home, in_flight):
    """bytes: of code and objects that importing the library and connecting leave behind."""
    gc.collect()
    before = gc.mem_alloc()
    entry = module.Entry(port, home, in_flight)
    entry.connect()
    gc.collect()
    gc.collect()
    tell("bytes", gc.mem_alloc() - before)


class NoCollection:
    """In place of the module gc: a collection hides what was allocated, and its cost depends on the heap's size."""

    def __getattr__(self, name):
        return int if name == "collect" else getattr(gc, name)


def main(name, job, port, home, in_flight, *arguments):
    if job.startswith("cpu_") or job.endswith("_bytes"):
        gc.disable()
        sys.modules["gc"] = NoCollection()
    module = __import__(name)
    if job == "heap":
        heap(module, int(port), home, int(in_flight))
        return
    entry = module.Entry(int(port), home, int(in_flight))
    globals()[job](entry, *[int(a) for a in arguments])


if __name__ == "__main__":
    main(*sys.argv[1:])
