"""Stand-in for network: the station interface of an ESP32 or of a Pico W, following a script instead of a radio.

Behaves as ports/esp32/network_wlan.c and extmod/network_cyw43.c of MicroPython 1.28 do, codes, exceptions and traps
included.  No clock: the link takes one step at each status() or isconnected().

    network.use_board("esp32")
    network.script.append(["connecting", "no_ap"])               # what happens at the first attempt to join
    network.script.append(["connecting", "idle", "up", "up", "drop"])       # ... and at the next

Steps: connecting | no_ip | up | idle (a flicker) | and the failures no_ap | wrong_password | fail | drop (the link is
lost).  The last step stays, but after a failure an ESP32 tries again by itself, as often as config(reconnects=) allows.
An attempt without a script follows `default`.
"""

STA_IF = 0
AP_IF = 1
FAILURES = ("no_ap", "wrong_password", "fail", "drop")

board = ""
script = []  # attempts to come, each a list of steps
default = []  # the attempt when the script is empty
rssi = -60
_country = "XX"
_hostname = ""
_interfaces = {}

_ESP32 = {
    "STAT_IDLE": 1000,
    "STAT_CONNECTING": 1001,
    "STAT_GOT_IP": 1010,
    "STAT_NO_AP_FOUND": 201,
    "STAT_WRONG_PASSWORD": 202,
    "STAT_BEACON_TIMEOUT": 200,
    "STAT_ASSOC_FAIL": 203,
    "STAT_CONNECT_FAIL": 203,
    "STAT_HANDSHAKE_TIMEOUT": 204,
}
_RP2 = {
    "STAT_IDLE": 0,
    "STAT_CONNECTING": 1,
    "STAT_WRONG_PASSWORD": -3,
    "STAT_NO_AP_FOUND": -2,
    "STAT_CONNECT_FAIL": -1,
    "STAT_GOT_IP": 3,
}
_ESP32_REASONS = {"no_ap": 201, "wrong_password": 202, "fail": 203, "drop": 200}
_ASSOC_LEAVE = 8
_RP2_STATES = {"up": 3, "no_ip": 2, "connecting": 1, "no_ap": -2, "wrong_password": -3, "fail": -1}


def use_board(name):
    """Become "esp32" or "rp2": its constants, a new interface that is off, an empty script that joins at once."""
    global board, default, rssi, _country, _hostname
    if name not in ("esp32", "rp2"):
        raise ValueError("board: %r, expected esp32 or rp2" % name)
    board = name
    module = globals()
    for names in (_ESP32, _RP2):
        for key in names:
            module.pop(key, None)
    module.update(_ESP32 if name == "esp32" else _RP2)
    WLAN.PM_NONE, WLAN.PM_PERFORMANCE, WLAN.PM_POWERSAVE = (0, 1, 2) if name == "esp32" else (0x10, 0xA11142, 0x11)
    if name == "rp2":
        WLAN.deinit = WLAN._deinit
    elif hasattr(WLAN, "deinit"):
        del WLAN.deinit
    del script[:]
    default = ["connecting", "up"]
    rssi = -60
    _country = "XX"
    _hostname = "mpy-esp32" if name == "esp32" else "PicoW"
    _interfaces.clear()


def country(code=None):
    """Return the two-letter country code, or set it; ValueError if it has not two letters."""
    global _country
    if code is None:
        return _country
    if len(code) != 2:
        raise ValueError
    _country = code.upper()


def hostname(name=None):
    """Return the host name, or set it; ValueError if it is longer than 32."""
    global _hostname
    if name is None:
        return _hostname
    if len(name) > 32:
        raise ValueError
    _hostname = name


class WLAN:
    """WLAN(STA_IF) or WLAN(AP_IF): the driver's one object for that interface, however often it is called."""

    IF_STA = STA_IF
    IF_AP = AP_IF
    PM_NONE = PM_PERFORMANCE = PM_POWERSAVE = 0  # use_board() gives the values

    def __new__(cls, interface=STA_IF):
        if interface not in (STA_IF, AP_IF):
            raise ValueError("invalid WLAN interface identifier")
        if interface not in _interfaces:
            _interfaces[interface] = self = super().__new__(cls)
            self._begin()
        return _interfaces[interface]

    def _begin(self):
        self._active = False
        self.powered = False  # for tests
        self._config = {"mac": b"\x24\x0a\xc4\x00\x01\x02", "ssid": "", "channel": 1, "pm": WLAN.PM_PERFORMANCE}
        self._config["txpower"] = 20
        if board == "esp32":
            self._config["reconnects"] = -1
        self._ifconfig = ("0.0.0.0", "0.0.0.0", "0.0.0.0", "0.0.0.0")
        self._steps = []
        self._state = "idle"
        self._reason = 0  # ESP32: why the link was lost last; only getting an address clears it
        self._requested = False
        self._retries = 0
        self.connects = []  # (ssid, key) of each accepted connect(), for tests

    def active(self, value=None):
        """Return whether the interface is on, or switch it."""
        if value is None:
            return self._active
        if not value:
            self._stop()
        elif not self._active:
            self._retries = 0
            self.powered = True
        self._active = bool(value)
        return self._active if board == "esp32" else None

    def connect(self, ssid=None, key=None, *, bssid=None):
        """Begin to join.  OSError if the interface is off or, on an ESP32, still joining."""
        if board == "esp32":
            if not self._active:
                raise OSError("Wifi Not Started")
            if self._joining():
                raise OSError("Wifi Internal Error")
        elif not self._active:
            raise OSError(1, "EPERM")
        if ssid is not None:
            self._config["ssid"] = ssid
        self.connects.append((ssid, key))
        self._retries = 0
        self._requested = True
        self._attempt()

    def disconnect(self):
        """Leave the network."""
        if board == "esp32" and not self._active:
            raise OSError("Wifi Not Started")
        self._stop()

    def _deinit(self):
        """deinit() of the Pico W: take the chip's power away (extmod/network_cyw43.c:133); active(False) does not.

        The ESP32's interface has no such method.
        """
        self.active(False)
        self.powered = False

    def isconnected(self):
        """Return whether the link is up and has an address."""
        self._step()
        return self._state == "up"

    def status(self, what=None):
        """Return the driver's code for the state of the link, or the signal strength in dBm for "rssi"."""
        if what == "rssi":
            if board == "esp32" and self._state != "up":
                raise OSError("Wifi Not Connected")
            return rssi
        if what is not None:
            raise ValueError("unknown status param")
        self._step()
        if board != "esp32":
            return _RP2_STATES.get(self._state, 0)
        if self._state == "up":
            return 1010
        if self._reason in (201, 202):
            return self._reason
        if self._reason == _ASSOC_LEAVE or self._state == "idle":
            return 1000
        if self._requested and self._may_retry():
            return 1001
        return self._reason or 1000

    def config(self, *names, **values):
        """Return one parameter, or set some.  ValueError for one this board's driver does not know."""
        if (len(names) == 1) == bool(values):
            raise TypeError("either pos or kw args are allowed")
        for key in names or values:
            if key != "hostname" and key not in self._config:
                raise ValueError("unknown config param")
        if names:
            return hostname() if names[0] == "hostname" else self._config[names[0]]
        if "hostname" in values:
            hostname(values.pop("hostname"))
        self._config.update(values)

    def ifconfig(self, addresses=None):
        """Return (address, netmask, gateway, DNS server) as text, or set them."""
        if addresses is not None:
            self._ifconfig = tuple(addresses)
            return None
        if self._state == "up" and self._ifconfig[0] == "0.0.0.0":
            return ("127.0.0.1", "255.0.0.0", "127.0.0.1", "127.0.0.1")
        return self._ifconfig

    def _attempt(self):
        self._steps = list(script.pop(0) if script else default)
        self._state = "connecting"

    def _stop(self):
        if self._requested:
            self._reason = _ASSOC_LEAVE
        self._requested = False
        self._steps = []
        self._state = "idle"

    def _may_retry(self):
        limit = self._config["reconnects"]
        return limit < 0 or self._retries <= limit

    def _joining(self):
        return self._requested and self._state != "up" and self._may_retry()

    def _step(self):
        if not self._requested:
            return
        if not self._steps:
            # An ESP32 whose attempt has failed is already in the next one.
            if board != "esp32" or self._state not in FAILURES or not self._may_retry():
                return
            self._attempt()
        self._state = self._steps.pop(0)
        if self._state == "up":
            self._reason = 0
        elif board == "esp32" and self._state in FAILURES:
            self._reason = _ESP32_REASONS[self._state]
            self._retries += 1
            if not self._may_retry():
                self._steps = []


use_board("esp32")
