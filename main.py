"""The device program: lib/mqtt_durable/device.py, which says what it does.

It is part of the library so that it goes to the board compiled.
"""

from mqtt_durable.device import main

if __name__ == "__main__":
    main()
