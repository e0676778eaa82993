"""What no key forbids by itself and all of them together make wrong: for `config check` and `doctor`.

What can never work is refused when the configuration is loaded; here is what starts and then disappoints.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from streamgr.config import Config
from streamgr.errors import ConfigError

STALE_SECONDS = 60.0  # the age of knowledge that the service-level objective allows
KEY_BYTES = 24  # of a table row on the wire, beside its weights
LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, slots=True)
class Finding:
    """One line for an operator. level: "ok" | "warn" | "fail"; exit_code: of a command that ends with this, 0 unless it
    is a failure.
    """

    level: str
    check: str
    what: str
    remedy: str = ""
    exit_code: int = 0

    def __str__(self) -> str:
        return f"{self.level:4}  {self.check}: {self.what}" + (f"  ->  {self.remedy}" if self.remedy else "")


def findings(config: Config) -> Iterator[Finding]:
    """What is amiss with the values as a whole, worst first within a section; nothing where nothing is."""
    for check in (_sequence, _model, _weights, _state, _scorer, _kafka):
        for level, what, remedy in check(config):
            yield Finding(level, "configuration", what, remedy, ConfigError.exit_code if level == "fail" else 0)


Said = Iterator[tuple[str, str, str]]


def _sequence(config: Config) -> Said:
    sequence, model = config.sequence, config.model
    if sequence.history_length > model.position_buckets:
        yield (
            "warn",
            f"sequence.history_length {sequence.history_length} is more than model.position_buckets "
            f"{model.position_buckets}: the oldest events share one position",
            "raise model.position_buckets (a new model), or shorten the history",
        )
    if sequence.history_length > config.trainer.batch_tokens:
        yield (
            "warn",
            f"trainer.batch_tokens {config.trainer.batch_tokens} is less than one history of {sequence.history_length}",
            "raise trainer.batch_tokens to some 16 histories",
        )
    if config.table.ttl_seconds < sequence.attribution_window_seconds + sequence.lateness_seconds:
        yield (
            "fail",
            f"table.ttl_seconds {config.table.ttl_seconds:g} is shorter than window and lateness: ids leave the table "
            "before what was shown of them is learned",
            "raise table.ttl_seconds well above sequence.attribution_window_seconds",
        )


def _model(config: Config) -> Said:
    table, trainer = config.table, config.trainer
    if table.max_slots and (table.max_slots < table.slots or (ratio := table.max_slots / table.slots) != int(ratio)):
        yield (
            "fail",
            f"table.max_slots {table.max_slots} is not reached by doubling {table.slots}",
            "a power of two more",
        )
    if trainer.accept_loss:
        yield "warn", "trainer.accept_loss is on: missing examples are passed over", "set it to false after one start"


def _weights(config: Config) -> Said:
    table, weights, trainer = config.table, config.weights, config.trainer
    rows = max(table.slots, table.max_slots) + table.fallback_rows
    snapshot = rows * (2 * config.model.dim + KEY_BYTES)
    if snapshot > weights.retention_bytes / 4:
        yield (
            "fail",
            f"a full table's snapshot has some {snapshot >> 20} MiB, more than a quarter of weights.retention_bytes "
            f"({weights.retention_bytes >> 20} MiB): the trainer will refuse to publish it",
            f"set weights.retention_bytes to {4 * snapshot}, and retention.bytes of the weights topic to no less",
        )
    if 2 * trainer.publish_seconds > STALE_SECONDS:
        yield (
            "warn",
            f"trainer.publish_seconds {trainer.publish_seconds:g} alone makes answers older than the objective of "
            f"{STALE_SECONDS:g} s",
            "publish every few seconds",
        )
    if trainer.checkpoint_seconds < trainer.publish_seconds:
        yield "warn", "trainer.checkpoint_seconds is less than trainer.publish_seconds", "checkpoint once a minute"
    if weights.compared_targets > trainer.window_targets:
        yield (
            "warn",
            f"weights.compared_targets {weights.compared_targets} is more than trainer.window_targets "
            f"{trainer.window_targets}: the guard never has enough to judge by entropy",
            "lower it to the window, or widen the window",
        )


def _state(config: Config) -> Said:
    state = config.state
    if state.snapshots_directory:
        home, shared = Path(state.directory).absolute(), Path(state.snapshots_directory).absolute()
        if shared == home or home in shared.parents:
            yield (
                "warn",
                "state.snapshots_directory lies inside state.directory: both are lost together",
                "put snapshots on a volume of their own, which all workers share",
            )


def _scorer(config: Config) -> Said:
    scorer, telemetry = config.scorer, config.telemetry
    if scorer.port and scorer.port == telemetry.port:
        yield "fail", f"scorer.port and telemetry.port are both {scorer.port}", "give each its own"
    if scorer.host not in LOOPBACK and not scorer.token:
        yield (
            "warn",
            f"the scorer listens on {scorer.host} and wants no token: whoever reaches the port reads users' sequences",
            "set STREAMGR_SCORER__TOKEN_FILE, or keep the port on a trusted network",
        )
    elif scorer.host not in LOOPBACK and not scorer.tls_certificate:
        yield "warn", "the scorer's token crosses the network in clear", "set scorer.tls_certificate and scorer.tls_key"


def _kafka(config: Config) -> Said:
    passed = config.kafka.librdkafka
    protocol = str(passed.get("security.protocol", "plaintext")).upper()
    password = config.kafka.sasl_password or passed.get("sasl.password", "")
    mechanism = str(passed.get("sasl.mechanism", passed.get("sasl.mechanisms", "GSSAPI"))).upper()
    if password and not protocol.startswith("SASL"):
        yield (
            "fail",
            f"a SASL password is given, and security.protocol is {protocol}: it is never sent",
            'set kafka.librdkafka "security.protocol" = "SASL_SSL"',
        )
    if (
        protocol.startswith("SASL")
        and mechanism.startswith(("PLAIN", "SCRAM"))
        and not (password and passed.get("sasl.username"))
    ):
        yield (
            "fail",
            f"{mechanism} wants sasl.username and a password",
            "set both: kafka.librdkafka, STREAMGR_KAFKA__SASL_PASSWORD_FILE",
        )
    if protocol == "SASL_PLAINTEXT" and mechanism == "PLAIN":
        yield "warn", "SASL PLAIN without TLS: the password crosses the network in clear", "use SASL_SSL"
    if protocol.endswith("SSL") and str(passed.get("enable.ssl.certificate.verification", "true")).lower() == "false":
        yield (
            "warn",
            "the broker's certificate is not checked: anybody can be the broker",
            "name its CA: ssl.ca.location",
        )
