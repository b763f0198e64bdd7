"""Bringing the radio up and keeping it up, on ESP32 and Pico W.

Owns the WLAN station interface.  Refuses to know what it is used for: the client awaits up() before each attempt to
connect and repeats both with its own growing pauses.  Nothing here survives a reset, and nothing prints the password.

Both drivers' status() values lag and flicker (the ESP32 keeps the reason of an earlier failure until the next event),
so only isconnected() decides anything here and status() lends its words to an error.
"""

import asyncio
import gc
import time

from .once import once

_ATTEMPT_MS = 12000  # scan, association and DHCP at a slow access point
_PAUSE_MS = 1000  # an access point that has just restarted refuses for about as long
_POLL_MS = 250


class Wifi:
    """The station interface.

    settings: the wifi section of the configuration: ssid, password or None, country, power_save.
    """

    def __init__(self, settings, network=None):
        """network: stands in for the module network.  Touches no hardware yet."""
        self._settings = settings
        self._network = network
        self._wlan = None
        self._ticks_ms = time.ticks_ms
        self._sleep_ms = asyncio.sleep_ms

    async def up(self):
        """Return when the interface is connected and has an address; at once if it is already.

        Makes two attempts of 12 s each.  Raises OSError with a text that names the network and the likely reason.
        """
        wlan = self._wlan or self._start()
        if wlan.isconnected():
            return
        reason = None
        for _ in range(2):
            # A connect() while one is under way raises "Wifi Internal Error" on the ESP32, or joins twice.
            self._leave()
            await self._sleep_ms(_PAUSE_MS)
            try:
                if self._settings["password"] is None:
                    wlan.connect(self._settings["ssid"])
                else:
                    wlan.connect(self._settings["ssid"], self._settings["password"])
                began = self._ticks_ms()
                while time.ticks_diff(self._ticks_ms(), began) < _ATTEMPT_MS:
                    await self._sleep_ms(_POLL_MS)
                    if wlan.isconnected():
                        return
                reason = wlan.status() or reason
            except (OSError, RuntimeError):  # ENOMEM on the Pico W, "Wifi Internal State Error" on the ESP32
                gc.collect()
        self._leave()
        raise OSError(once("wifi_reasons", "text", reason, self._settings["ssid"], 2 * _ATTEMPT_MS // 1000))

    def down(self):
        """Switch the radio off, as before a deep sleep; up() switches it on again.  Raises nothing."""
        wlan = self._wlan
        if wlan is None:
            return
        self._leave()
        self._wlan = None
        try:
            wlan.active(False)
            if hasattr(wlan, "deinit"):
                wlan.deinit()  # the Pico W's chip keeps its power otherwise, also while the processor sleeps
        except (OSError, RuntimeError):
            pass

    def address(self):
        """Return the address as text, None while not connected."""
        try:
            if self._wlan and self._wlan.isconnected():
                return self._wlan.ifconfig()[0]
        except OSError:  # lost in between
            pass
        return None

    def rssi(self):
        """Return the signal strength in dBm, None while not connected."""
        try:
            if self._wlan and self._wlan.isconnected():
                return self._wlan.status("rssi")
        except (OSError, ValueError, TypeError):  # lost in between, or a driver that does not tell
            pass
        return None

    def _start(self):
        """Switch the interface on and set it up.  Raises OSError, ENOMEM for one, and may be called again then."""
        network = self._network
        if network is None:
            import network
        network.country(self._settings["country"])  # the Pico W's driver takes it over when it is switched on
        wlan = network.WLAN(network.STA_IF)
        wlan.active(True)
        try:
            # The ESP32's driver would connect again for ever by itself, and every connect() of ours would hit it.
            wlan.config(reconnects=0)
        except (ValueError, TypeError):
            # Unknown to the Pico W.  Its power saving costs up to 200 ms a packet and loses some; the ESP32's does not.
            if not self._settings["power_save"]:
                wlan.config(pm=wlan.PM_NONE)
        self._wlan = wlan
        return wlan

    def _leave(self):
        try:
            self._wlan.disconnect()
        except (OSError, RuntimeError):  # there was nothing to leave
            pass
