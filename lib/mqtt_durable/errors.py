"""Every exception this package raises, one cause each.

Imported by all modules and imports nothing.  A bad argument is a plain ValueError and a network failure is the
platform's own OSError; only what has no built-in name is here.
"""


class MQTTError(Exception):
    """Base of the errors that have to do with the broker or with the stored session."""


class ProtocolError(MQTTError):
    """The broker sent what MQTT does not allow.  The connection ends and is made again; nothing stored is lost.

    .reason_code: what the DISCONNECT of MQTT 5 tells the broker of it (section 4.13).
    """

    reason_code = 0x82


class ConnectRefused(MQTTError):
    """CONNACK carried a return code other than 0 (MQTT 3.1.1 section 3.2.2.3).

    .return_code: 1-5, or what the broker sent.  After 3 the connection is tried again after the usual growing pause;
    after the others, which only a person can mend (.lasting), after the longest at once, for ever, for that may have
    happened.
    """

    def __init__(self, return_code, told):
        super().__init__(told)
        self.return_code = return_code
        self.lasting = return_code != 3


class TLSError(MQTTError):
    """TLS with the broker failed before its CONNACK.  The argument says what did: a certificate, the clock, the broker.

    The connection is tried again after the usual pauses; nothing stored is lost.
    """


class SubscribeRefused(MQTTError):
    """SUBACK carried 0x80 for a topic filter (MQTT 3.1.1 section 3.9.3).  The argument is the filter."""


class MQTTException(MQTTError):
    """The blocking front end's: the broker refused.  The argument is CONNACK's return code, or 128 from a SUBACK."""


class JournalFull(MQTTError):
    """No room for one more record.  What is stored stays stored; the refused message is not.

    Room comes back as the broker acknowledges.
    """


class JournalCorrupt(MQTTError):
    """A stored record no longer passes its checksum when it is read back.

    The argument is where it stands.  Every other record is still safe.
    """


class JournalUnavailable(MQTTError):
    """No flash for the journal could be found or used.  The argument says what was looked for and what to do."""


class JournalLost(OSError):
    """The journal's home was taken away while it was in use, by another hand: all its calls raise this from then on.

    The argument says what happened.  What waited there is lost; nothing else on the flash was harmed.
    """


class MessageDropped(MQTTError):
    """The awaited message was dropped unsent, to make room: journal.when_full is "drop_oldest"."""


class ConfigError(MQTTError):
    """The configuration has mistakes.  .problems: one line each, with key path, what was found, what was expected."""

    def __init__(self, problems):
        self.problems = problems
        super().__init__("; ".join(problems))
