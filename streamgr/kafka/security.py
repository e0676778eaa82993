"""librdkafka's security settings by what they mean: for clients of another make, and for whoever judges them.

Operators write librdkafka's own names once (`[kafka.librdkafka]`). A client that is not librdkafka, such as the
monitor's, is given the same through `security`, so that there is one place to change a password or a CA.
"""

import ssl
from dataclasses import dataclass

from streamgr.config import Kafka
from streamgr.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Security:
    """How a client gets in. Paths are of PEM files, "" where there is none; `mechanism` is "" without SASL.

    verifies: whether the broker's certificate is checked at all; checks_name: and the name in it.
    """

    protocol: str  # PLAINTEXT | SSL | SASL_PLAINTEXT | SASL_SSL
    mechanism: str
    username: str
    password: str
    ca: str
    certificate: str
    key: str
    key_password: str
    verifies: bool
    checks_name: bool

    @property
    def encrypted(self) -> bool:
        return self.protocol.endswith("SSL")

    def ssl_context(self) -> ssl.SSLContext | None:
        """For Python's own sockets; None without TLS. Raises `ConfigError` where a file cannot be used."""
        if not self.encrypted:
            return None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = self.verifies and self.checks_name
        context.verify_mode = ssl.CERT_REQUIRED if self.verifies else ssl.CERT_NONE
        try:
            if self.ca:
                context.load_verify_locations(self.ca)
            else:
                context.load_default_certs()
            if self.certificate:
                context.load_cert_chain(self.certificate, self.key or None, lambda: self.key_password)
        except (OSError, ValueError) as error:  # an SSLError is an OSError
            files = ", ".join(path for path in (self.ca, self.certificate, self.key) if path)
            remedy = "ssl.ca.location, ssl.certificate.location and ssl.key.location name PEM files that we can read"
            raise ConfigError(f"{files} cannot be used: {error}", where="kafka.librdkafka", remedy=remedy) from None
        return context


def security(settings: Kafka) -> Security:
    """What the settings say, with librdkafka's defaults."""

    def said(name: str, default: str = "") -> str:
        return str(settings.librdkafka.get(name, default))

    protocol = said("security.protocol", "plaintext").upper()
    sasl = protocol.startswith("SASL")
    return Security(
        protocol=protocol,
        mechanism=said("sasl.mechanism", said("sasl.mechanisms", "GSSAPI")) if sasl else "",
        username=said("sasl.username"),
        password=settings.sasl_password or said("sasl.password"),
        ca=said("ssl.ca.location"),
        certificate=said("ssl.certificate.location"),
        key=said("ssl.key.location"),
        key_password=said("ssl.key.password"),
        verifies=said("enable.ssl.certificate.verification", "true").lower() != "false",
        checks_name=said("ssl.endpoint.identification.algorithm", "https").lower() != "none",
    )
