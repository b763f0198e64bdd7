"""A throw-away certification authority for tests of TLS: its certificates are worth nothing anywhere.

    ca = Authority(directory, "ca")                  # writes ca.pem and ca.der
    cert, key = ca.issue("broker", names=["broker.test"])
"""

import datetime
import ipaddress
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID

_PEM = serialization.Encoding.PEM
_DER = serialization.Encoding.DER


def _general_name(name):
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


class Authority:
    """A CA of its own with an EC key.  .pem, .der: the paths of its certificate, in directory."""

    def __init__(self, directory, name="ca"):
        self._directory = Path(directory)
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "throw-away " + name)])
        certificate = self._sign(self._name, self._key.public_key(), -30, 30, x509.BasicConstraints(True, None))
        self.pem = self._write(name + ".pem", certificate.public_bytes(_PEM))
        self.der = self._write(name + ".der", certificate.public_bytes(_DER))

    def issue(self, name, names=("127.0.0.1", "localhost"), from_day=-1, to_day=1, use_rsa=False, encoding="pem"):
        """Write a key and a certificate for names, hosts or addresses; return (certificate's path, key's path).

        from_day, to_day: valid between them, counted from now.  encoding: "pem" or "der".
        """
        key = rsa.generate_private_key(65537, 2048) if use_rsa else ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        san = x509.SubjectAlternativeName([_general_name(n) for n in names])
        certificate = self._sign(subject, key.public_key(), from_day, to_day, san)
        forms = serialization.PrivateFormat
        form = forms.PKCS8 if encoding == "der" else forms.TraditionalOpenSSL
        encoding, ext = (_DER, ".der") if encoding == "der" else (_PEM, ".pem")
        secret = key.private_bytes(encoding, form, serialization.NoEncryption())
        return self._write(name + ext, certificate.public_bytes(encoding)), self._write(name + ".key" + ext, secret)

    def _sign(self, subject, public_key, from_day, to_day, extension):
        now = datetime.datetime.now(datetime.timezone.utc)
        builder = x509.CertificateBuilder(
            self._name,
            subject,
            public_key,
            x509.random_serial_number(),
            now + datetime.timedelta(from_day),
            now + datetime.timedelta(to_day),
        )
        critical = isinstance(extension, x509.BasicConstraints)
        return builder.add_extension(extension, critical).sign(self._key, hashes.SHA256())

    def _write(self, name, data):
        path = self._directory / name
        path.write_bytes(data)
        return str(path)
