"""Words for a Wi-Fi that could not be joined: loaded for the error that says them, see once.py, and no longer."""

# What status() means: the ESP32's reasons are positive, those of the Pico W's cyw43 negative or small.
_REASONS = {
    200: "lost the access point",
    201: "no access point",
    202: "password or association refused by",
    203: "association refused by",
    204: "wrong password for",
    205: "connection refused by",
    210: "no access point with suitable security",
    211: "no access point with suitable security",
    212: "no access point strong enough",
    -1: "connection refused by",
    -2: "no access point",
    -3: "wrong password for",
    2: "no address from",
}


def text(reason, ssid, tried_s):
    """Return what the error says.  reason: the last status() of the driver, or None.  tried_s: how long it was."""
    return 'Wi-Fi: %s "%s"' % (_REASONS.get(reason, "no connection within %d s to" % tried_s), ssid)
