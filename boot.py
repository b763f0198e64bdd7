"""The earliest start-up: nothing here can fail, for nothing behind it would run then.

Runs at every start, also when mpremote starts the board without main.py.
"""

import gc

if hasattr(gc, "threshold"):
    # Collect early and often: a heap in small pieces has no room for a buffer, however much of it is free.
    gc.threshold(gc.mem_alloc() + gc.mem_free() // 4)

try:
    from mqtt_durable import watchdog

    watchdog.start()
except Exception as error:  # also a library that is not there yet, or half of it
    print("boot.py: no watchdog:", error)
