# Freezes mqtt_durable into a board image, beside everything the port's own image has:
#     make -C ports/esp32 BOARD=ESP32_GENERIC FROZEN_MANIFEST=/path/to/firmware/manifest.py
# opt=2 keeps line numbers in the field's tracebacks; opt=3 would drop them.
include("$(PORT_DIR)/boards/manifest.py")
package("mqtt_durable", base_path="../lib", opt=2)
