# Freezes mqtt_durable into a board image, beside what the port's own image has; how to build one: flash-maps.md.
include("$(PORT_DIR)/boards/manifest.py")
# This list takes the place of the board's own, which on a Pico W is where ssl, ntptime and mip come from.
require("bundle-networking")
# opt=2 keeps line numbers in the field's tracebacks; opt=3 would drop them.
package("mqtt_durable", base_path="../lib", opt=2)
