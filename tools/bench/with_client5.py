"""mqtt_durable.Client, MQTT 5

The journal on, in RAM in place of flash, where no other home is said.
"""

import with_client


class Entry(with_client.Entry):
    version = 5
