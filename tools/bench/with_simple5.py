"""mqtt_durable.simple, MQTT 5

The journal on, in RAM in place of flash, where no other home is said.
"""

import with_simple


class Entry(with_simple.Entry):
    version = 5
