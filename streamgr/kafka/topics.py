"""Topics as specified (topics/topics.toml), compared with the cluster and brought to it.

`apply` creates topics and alters their settings; it never deletes and never changes a partition count, since that would
move users. `check` only looks. The mock broker knows no topic administration: there, asking for a topic is what
creates it, always with 4 partitions, and both say so.
"""

import tomllib
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, cast

import msgspec
from confluent_kafka import KafkaError, KafkaException, TopicCollection
from confluent_kafka.admin import (  # type: ignore[attr-defined]
    AlterConfigOpType,
    ClusterMetadata,
    ConfigEntry,
    ConfigResource,
    NewTopic,
    ResourceType,
    TopicMetadata,
)

from streamgr.clock import Deadline, SystemClock
from streamgr.config import Kafka, shipped
from streamgr.errors import ConfigError
from streamgr.kafka.client import ADMIN_SECONDS, Admin, translate
from streamgr.service import Stop
from streamgr.telemetry import Log

MOCK_CLUSTER = "mockCluster"  # how librdkafka's mock cluster names itself
REFUSED = (KafkaError.INVALID_CONFIG, KafkaError.POLICY_VIOLATION, KafkaError.INVALID_REPLICATION_FACTOR)
T = TypeVar("T")


class _Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One table of topics.toml."""

    about: str
    partitions: int
    config: dict[str, str | int | float] = {}
    same_partitions_as: str = ""


@dataclass(frozen=True, slots=True)
class TopicSpec:
    """One topic as it must be: its full name, and Kafka's own topic settings as text."""

    name: str
    about: str
    partitions: int
    config: dict[str, str]


@dataclass(frozen=True, slots=True)
class Finding:
    """What was found of one topic. level: "ok" | "done" (we changed it) | "warn" | "fail"."""

    level: str
    topic: str
    what: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.level:4}  {self.topic}: {self.what}" + (f"  ->  {self.remedy}" if self.remedy else "")


@dataclass(frozen=True, slots=True)
class Identity:
    """Which incarnation of a topic this is: another cluster or a recreated topic has another. "" on the mock broker."""

    cluster_id: str
    topic_id: str
    partitions: int


def specs_path() -> Path:
    """The directory `topics/` that comes with the package."""
    return shipped("topics/topics.toml").parent


def load_specs(path: Path, prefix: str) -> list[TopicSpec]:
    """The topics that `path` (a directory with topics.toml, or such a file) specifies, under their full names.

    Raises `ConfigError` naming the key.
    """
    file = path / "topics.toml" if path.is_dir() else path
    try:
        tables = msgspec.convert(tomllib.loads(file.read_text()), dict[str, _Table])
    except OSError as error:
        raise ConfigError(f"cannot read the file: {error.strerror}", where=str(file)) from None
    except (tomllib.TOMLDecodeError, msgspec.ValidationError, UnicodeDecodeError) as error:
        raise ConfigError(str(error), where=str(file)) from None
    for name, table in tables.items():
        like = table.same_partitions_as
        if table.partitions < 1 or (like and (like not in tables or tables[like].partitions != table.partitions)):
            raise ConfigError(
                f"[{name}] must have as many partitions as `{like}`" if like else f"[{name}] needs a partition",
                where=str(file),
                remedy="set `partitions` of both to the same number",
            )
    return [
        TopicSpec(f"{prefix}.{name}", t.about, t.partitions, {key: str(value) for key, value in t.config.items()})
        for name, t in tables.items()
    ]


def check(settings: Kafka, specs: list[TopicSpec]) -> list[Finding]:
    """Compare the cluster with the specs; one finding or more a topic. Raises `BrokerUnreachable` when it is away."""
    admin = Admin(settings)
    metadata = admin.metadata()
    there = {s.name: metadata.topics[s.name] for s in specs if s.name in metadata.topics}
    configs = {} if is_mock(metadata.cluster_id) else _configs(admin, list(there))
    findings = []
    for spec in specs:
        if spec.name not in there:
            findings.append(Finding("fail", spec.name, "missing", "streamgr topics apply"))
        elif is_mock(metadata.cluster_id):
            findings.append(_on_mock(spec))
        else:
            findings += _compare(spec, there[spec.name], configs[spec.name], len(metadata.brokers))
    return findings


def apply(settings: Kafka, specs: list[TopicSpec]) -> list[Finding]:
    """Create what is missing, alter settings that differ, and check. Raises `BrokerUnreachable`, `ConfigError`."""
    admin = Admin(settings)
    metadata = admin.metadata()
    if is_mock(metadata.cluster_id):
        for spec in specs:
            _touch(admin, spec.name)
        return [_on_mock(spec) for spec in specs]
    missing = [spec for spec in specs if spec.name not in metadata.topics]
    done = [Finding("done", name, "created") for name in _create(admin, missing)]
    configs = _configs(admin, [s.name for s in specs])
    for spec in specs:
        if differing := _differing(spec, configs[spec.name]):
            _alter(admin, spec, differing)
            done.append(Finding("done", spec.name, f"set {', '.join(f'{k}={spec.config[k]}' for k in differing)}"))
    changed = {finding.topic for finding in done}
    return done + [f for f in check(settings, specs) if f.level != "ok" or f.topic not in changed]


def ensure(settings: Kafka) -> None:
    """Bring all topics to their specs. Raises `ConfigError` for the first that cannot be brought there."""
    for finding in apply(settings, load_specs(specs_path(), settings.topic_prefix)):
        if finding.level == "fail":
            raise ConfigError(finding.what, where=finding.topic, remedy=finding.remedy)


def identity(
    settings: Kafka,
    topic: str,
    *,
    wait_seconds: float | None = ADMIN_SECONDS,
    log: Log | None = None,
    stop: Stop | None = None,
    waiting: Callable[[], None] = lambda: None,
) -> Identity:
    """The topic's identity.

    Waits for a broker that is away, and says so to `log`: for `wait_seconds`, None for ever, or until told to stop
    (`BrokerUnreachable`).
    Raises `ConfigError` where the topic does not exist.
    """
    admin = Admin(settings, log=log)

    def found(seconds: float) -> ClusterMetadata:
        metadata = admin.client.list_topics(topic, timeout=seconds)
        if (error := metadata.topics[topic].error) is not None:
            raise KafkaException(error)
        return metadata

    metadata = admin.ask(topic, found, wait_seconds, stop=stop, waiting=waiting)
    partitions = len(metadata.topics[topic].partitions)
    if is_mock(metadata.cluster_id):
        return Identity(metadata.cluster_id or "", "", partitions)
    described = admin.ask(
        topic,
        lambda seconds: admin.client.describe_topics(TopicCollection([topic]), request_timeout=seconds)[topic].result(),
        wait_seconds,
        stop=stop,
        waiting=waiting,
    )
    return Identity(metadata.cluster_id or "", str(described.topic_id), partitions)


def is_mock(cluster_id: str | None) -> bool:
    """Whether this is librdkafka's in-process mock cluster."""
    return (cluster_id or "").startswith(MOCK_CLUSTER)


def _on_mock(spec: TopicSpec) -> Finding:
    return Finding("ok", spec.name, "present on the mock broker (4 partitions, no settings, no compaction)")


def _compare(spec: TopicSpec, found: TopicMetadata, config: dict[str, ConfigEntry], brokers: int) -> list[Finding]:
    findings = []
    if (count := len(found.partitions)) != spec.partitions:
        findings.append(
            Finding(
                "fail",
                spec.name,
                f"{count} partitions, specified are {spec.partitions}",
                f"a count never changes: set `partitions = {count}` in topics.toml, or choose a new topic_prefix",
            )
        )
    for key in _differing(spec, config):
        value = config[key].value if key in config else None
        findings.append(
            Finding("fail", spec.name, f"{key} is {value}, specified is {spec.config[key]}", "streamgr topics apply")
        )
    replicas = min((len(p.replicas) for p in found.partitions.values()), default=0)
    if brokers >= 3 > replicas:
        findings.append(
            Finding("warn", spec.name, f"{replicas} replicas on {brokers} brokers", "set default.replication.factor=3")
        )
    in_sync = config["min.insync.replicas"].value if "min.insync.replicas" in config else "1"
    if brokers >= 3 and replicas >= 3 and in_sync == "1":
        what = "min.insync.replicas is 1: a write counts as safe when one broker has it"
        findings.append(Finding("warn", spec.name, what, "set the brokers' min.insync.replicas=2"))
    return findings or [Finding("ok", spec.name, f"{count} partitions, settings as specified")]


def _differing(spec: TopicSpec, config: dict[str, ConfigEntry]) -> list[str]:
    return [key for key, value in spec.config.items() if key not in config or config[key].value != value]


def _configs(admin: Admin, names: list[str]) -> dict[str, dict[str, ConfigEntry]]:
    """The settings of topics that there are; a broker that has not heard of one yet is asked again."""

    def asked(seconds: float) -> dict[str, dict[str, ConfigEntry]]:
        resources = [ConfigResource(ResourceType.TOPIC, name) for name in names]
        futures = admin.client.describe_configs(resources, request_timeout=seconds)
        return {resource.name: future.result(seconds + 5) for resource, future in futures.items()}

    return admin.ask(", ".join(names), asked) if names else {}


def _create(admin: Admin, specs: list[TopicSpec]) -> list[str]:
    """Create them and wait until the cluster shows them. Another `apply` at the same moment is no error."""
    new = [NewTopic(s.name, num_partitions=s.partitions, replication_factor=-1, config=s.config) for s in specs]
    if not new:
        return []
    futures = admin.client.create_topics(new, operation_timeout=ADMIN_SECONDS, request_timeout=ADMIN_SECONDS)
    for name, future in futures.items():
        _result(admin, name, future, fine=KafkaError.TOPIC_ALREADY_EXISTS)
    for name in futures:
        _touch(admin, name)
    return list(futures)


def _alter(admin: Admin, spec: TopicSpec, keys: list[str]) -> None:
    entries = [ConfigEntry(key, spec.config[key], incremental_operation=AlterConfigOpType.SET) for key in keys]
    resource = ConfigResource(ResourceType.TOPIC, spec.name, incremental_configs=entries)
    for future in admin.client.incremental_alter_configs([resource], request_timeout=ADMIN_SECONDS).values():
        _result(admin, spec.name, future)
    deadline, pause = Deadline(SystemClock(), ADMIN_SECONDS), Stop()  # the controller has it, brokers follow
    while _differing(spec, _configs(admin, [spec.name])[spec.name]) and not deadline.passed():
        pause.wait(0.1)


def _touch(admin: Admin, name: str) -> None:
    """Ask for one topic until it has leaders; on the mock broker, asking creates it."""
    deadline, pause = Deadline(SystemClock(), ADMIN_SECONDS), Stop()
    while True:
        found = admin.ask(name, lambda seconds: admin.client.list_topics(name, timeout=seconds)).topics[name]
        if found.error is None and found.partitions and all(p.leader >= 0 for p in found.partitions.values()):
            return
        if deadline.passed():
            raise ConfigError(f"did not appear within {ADMIN_SECONDS:.0f} s", where=name, remedy="see the broker's log")
        pause.wait(0.1)


def _result(admin: Admin, topic: str, future: "Future[T]", fine: int | None = None) -> T:
    try:
        return future.result(ADMIN_SECONDS + 5)
    except KafkaException as raised:
        error: KafkaError = raised.args[0]
        if error.code() == fine:
            return cast(T, None)
        if error.code() in REFUSED:
            text = admin.voice.clean(error.str())
            raise ConfigError(text, where=topic, remedy="change it in topics.toml, or the broker's settings") from None
        raise translate(error, admin.voice, topic, admin.settings) from None
