"""What every Kafka client here shares: its settings, what it says aloud, and how its errors read.

Operators pass librdkafka's own settings through (`[kafka.librdkafka]`); librdkafka validates their names. What the
exactness of the system rests on is ours and refused: where a consumer starts (never `auto.offset.reset`), who
commits, idempotence, acknowledgements. A broker that is away is not an error of a running role: librdkafka retries for
ever, we count each complaint and log it at most once a minute. No secret ever enters a message.
"""

import logging
import os
import socket
from collections.abc import Callable
from typing import Any, TypeVar

from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import AdminClient, ClusterMetadata  # type: ignore[attr-defined]

from streamgr.clock import Clock, Deadline, SystemClock
from streamgr.config import SECRET, Kafka
from streamgr.errors import BrokerUnreachable, ConfigError, StreamgrError
from streamgr.service import Stop
from streamgr.telemetry import Log, counter

KAFKA_ERRORS = counter("kafka_errors", "Complaints of a Kafka client, retried or not.", ("client",))
for _client in ("consumer", "producer", "admin"):
    KAFKA_ERRORS.labels(_client)  # 0 is a value too

OURS = frozenset(
    (
        *("bootstrap.servers", "metadata.broker.list", "client.id", "error_cb", "logger", "stats_cb", "log.queue"),
        *("group.id", "group.instance.id", "group.protocol", "group.remote.assignor", "partition.assignment.strategy"),
        *("session.timeout.ms", "heartbeat.interval.ms", "auto.offset.reset", "enable.auto.commit", "isolation.level"),
        *("enable.auto.offset.store", "auto.commit.interval.ms", "enable.partition.eof", "allow.auto.create.topics"),
        *("enable.idempotence", "enable.gapless.guarantee", "transactional.id", "acks", "request.required.acks"),
        *("retries", "message.send.max.retries", "message.timeout.ms", "delivery.timeout.ms", "partitioner"),
        *("max.in.flight", "max.in.flight.requests.per.connection", "message.max.bytes", "on_delivery", "on_commit"),
        *(
            "queue.buffering.max.kbytes",
            "dr_cb",
            "linger.ms",
            "queue.buffering.max.ms",
            "default.topic.config",
            "test.mock.num.brokers",
        ),
    )
)
SAY_AGAIN_SECONDS = 60.0
ASK_SECONDS = 2.0  # one question to the broker; asked again while the caller may wait
ADMIN_SECONDS = 15.0  # a one-shot command waits no longer
REFUSED_SECONDS = 2.0  # nor this long, where a broker is there and does not let us in
NEWS_SECONDS = 2.0  # how long a broker may not have heard yet of a topic that there is

_AWAY = frozenset(
    (
        KafkaError._TRANSPORT,
        KafkaError._TIMED_OUT,
        KafkaError._ALL_BROKERS_DOWN,
        KafkaError._RESOLVE,
        KafkaError._AUTHENTICATION,
        KafkaError._SSL,
        KafkaError._WAIT_COORD,
        KafkaError._TIMED_OUT_QUEUE,
        KafkaError.LEADER_NOT_AVAILABLE,
        KafkaError.NOT_LEADER_FOR_PARTITION,
        KafkaError.BROKER_NOT_AVAILABLE,
        KafkaError.REQUEST_TIMED_OUT,
        # while brokers come, go and elect
        KafkaError._DESTROY_BROKER,
        KafkaError._UNKNOWN_PARTITION,  # of a topic without metadata yet
        KafkaError.NETWORK_EXCEPTION,
        KafkaError.KAFKA_STORAGE_ERROR,
        KafkaError.OFFSET_NOT_AVAILABLE,
        KafkaError.FENCED_LEADER_EPOCH,
        KafkaError.UNKNOWN_LEADER_EPOCH,
        KafkaError.REPLICA_NOT_AVAILABLE,
        KafkaError.NOT_CONTROLLER,
        KafkaError.COORDINATOR_NOT_AVAILABLE,
        KafkaError.COORDINATOR_LOAD_IN_PROGRESS,
        KafkaError.NOT_COORDINATOR,
    )
)
REMEDIES = {  # of a broker that answers, and refuses
    KafkaError._AUTHENTICATION: "check sasl.mechanism, sasl.username and kafka.sasl_password (kafka.librdkafka)",
    KafkaError._SSL: "check ssl.ca.location, the broker's certificate and name, and that its port speaks TLS",
}
DENIED = frozenset(
    (
        KafkaError.TOPIC_AUTHORIZATION_FAILED,
        KafkaError.GROUP_AUTHORIZATION_FAILED,
        KafkaError.CLUSTER_AUTHORIZATION_FAILED,
    )
)
MISSING = frozenset((KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._UNKNOWN_TOPIC))

T = TypeVar("T")
Setting = Any  # text, a number, a callback or a logger: librdkafka's own check is the type


class Voice:
    """How a client speaks: counts every complaint, logs the same kind once a minute, hides secrets."""

    def __init__(self, client: str, settings: Kafka, log: Log | None, clock: Clock | None = None) -> None:
        self._client, self._log, self._clock = client, log, clock or SystemClock()
        self._secrets = [str(v) for k, v in settings.librdkafka.items() if SECRET.search(k)] + [settings.sasl_password]
        self._said: dict[str, tuple[float, int]] = {}
        self.heard: KafkaError | None = None  # the newest that the client said of itself: it knows more than an answer

    def clean(self, text: object) -> str:
        """The text without any secret of the settings."""
        words = str(text)
        for secret in self._secrets:
            words = words.replace(secret, "***") if secret else words
        return words

    def hear(self, error: KafkaError) -> None:
        """What the client says of itself, between its answers."""
        if error.code() != KafkaError._ALL_BROKERS_DOWN:  # that says nothing of why
            self.heard = error
        self.complain(error)

    def complain(self, error: KafkaError) -> None:
        """An error that librdkafka retries by itself."""
        KAFKA_ERRORS.labels(self._client).inc()
        self.say(error.name(), error.str())

    def say(self, name: str, text: str) -> None:
        """Log a warning, unless one of this name was logged within the minute."""
        now = self._clock.monotonic()
        last, held_back = self._said.get(name, (-SAY_AGAIN_SECONDS, 0))
        if now - last < SAY_AGAIN_SECONDS:
            self._said[name] = (last, held_back + 1)
            return
        self._said[name] = (now, 0)
        if self._log is not None:
            self._log.warning("kafka_error", self.clean(text), client=self._client, error=name, more=held_back)

    def librdkafka_logger(self) -> logging.Logger:
        """Where librdkafka's own warnings go: our log, each kind once a minute (by default they go to stderr)."""
        voice = self

        class Handler(logging.Handler):
            def emit(self, record: logging.LogRecord) -> None:
                voice.say(f"librdkafka {record.getMessage().split(' ', 1)[0]}", record.getMessage())

        logger = logging.Logger("librdkafka", logging.WARNING)
        logger.addHandler(Handler())
        return logger


def librdkafka_settings(settings: Kafka, client_id: str, voice: Voice, **ours: Setting) -> dict[str, Setting]:
    """The whole configuration of one client: the operator's passthrough under ours.

    Raises `ConfigError` where the passthrough touches what is ours.
    """
    if refused := sorted(OURS & settings.librdkafka.keys()):
        raise ConfigError(
            f"{', '.join(f'`{name}`' for name in refused)}: not for you to set",
            where="kafka.librdkafka",
            remedy="remove it; streamgr's exactness rests on its own value (the broker's address is kafka.bootstrap)",
        )
    conf: dict[str, Setting] = {
        "reconnect.backoff.max.ms": 2_000,
        "socket.timeout.ms": 10_000,  # a broker that hangs is left for the others sooner than in librdkafka's minute
        "log.connection.close": False,
        # A broker that leaves in good order names nobody as its partitions' leader, and librdkafka (2.16, issue 5430)
        # may ask again only when this has passed, by default five minutes, though the broker is long back.
        "topic.metadata.refresh.interval.ms": 5_000,
    }
    conf |= settings.librdkafka
    if settings.sasl_password:
        conf["sasl.password"] = settings.sasl_password
    conf |= {name.replace("_", "."): value for name, value in ours.items()}
    return conf | {
        "bootstrap.servers": settings.bootstrap,
        "client.id": f"{client_id}-{socket.gethostname()}-{os.getpid()}",
        "error_cb": voice.hear,
        "logger": voice.librdkafka_logger(),
    }


def refused(error: KafkaException, voice: Voice) -> ConfigError:
    """librdkafka would not take the configuration."""
    return ConfigError(
        voice.clean(error.args[0].str()), where="kafka.librdkafka", remedy="see librdkafka's CONFIGURATION.md"
    )


def translate(error: KafkaError, voice: Voice, where: str, settings: Kafka) -> StreamgrError:
    """An error that ends the work, with its remedy."""
    text = voice.clean(error.str())
    if error.code() in MISSING:
        return ConfigError(f"the topic does not exist: {text}", where=where, remedy="streamgr topics apply")
    if error.code() in DENIED:
        return ConfigError(text, where=where, remedy="grant this principal the access (Kafka ACLs)")
    if error.code() in _AWAY:
        if voice.heard is not None:
            text += f" ({voice.clean(voice.heard.str())})"
        return BrokerUnreachable(
            text, where=where, remedy=f"check kafka.bootstrap ({settings.bootstrap}) and the security settings"
        )
    return StreamgrError(f"{error.name()}: {text}", where=where, remedy="see the broker's log")


def ask(
    question: Callable[[float], T],
    *,
    voice: Voice,
    settings: Kafka,
    where: str,
    stop: Stop | None = None,
    wait_seconds: float | None = None,
    waiting: Callable[[], None] = lambda: None,
) -> T:
    """Ask the broker, and ask again while it is away: for ever, or for `wait_seconds`, or until told to stop.

    `waiting` is called between two attempts. Raises `BrokerUnreachable` when that is over, `ConfigError` where a topic
    is still unknown after `NEWS_SECONDS`, and whatever else ends the work.
    """
    clock = SystemClock()
    asked = clock.monotonic()
    end = None if wait_seconds is None else asked + wait_seconds
    while True:
        left = ASK_SECONDS if end is None else max(0.1, min(ASK_SECONDS, end - clock.monotonic()))
        try:
            return question(left)
        except KafkaException as raised:
            error: KafkaError = raised.args[0]
            problem, now = translate(error, voice, where, settings), clock.monotonic()
            unheard = error.code() in MISSING and now - asked < NEWS_SECONDS
            if not (unheard or isinstance(problem, BrokerUnreachable)):
                raise problem from None
            voice.complain(error)
            if stop or (end is not None and now >= end):
                raise problem from None
        waiting()
        (Stop() if stop is None else stop).wait(0.2)


class Admin:
    """One admin client, kept alive as long as its futures; bounded questions only."""

    def __init__(self, settings: Kafka, *, client_id: str = "streamgr-topics", log: Log | None = None) -> None:
        self.settings, self.voice = settings, Voice("admin", settings, log)
        try:
            self.client = AdminClient(librdkafka_settings(settings, client_id, self.voice))
        except KafkaException as error:
            raise refused(error, self.voice) from None

    def ask(
        self,
        where: str,
        question: Callable[[float], T],
        wait_seconds: float | None = ADMIN_SECONDS,
        *,
        stop: Stop | None = None,
        waiting: Callable[[], None] = lambda: None,
    ) -> T:
        """As `client.ask`; None waits without end, also for a broker that does not let us in: it may learn to.

        With an end to it, raises `ConfigError` for that, and sooner.
        """
        patience = Deadline(SystemClock(), REFUSED_SECONDS)

        def between() -> None:
            self.client.poll(0)  # lets it say what it knows
            heard = self.voice.heard
            if wait_seconds is not None and patience.passed() and heard is not None and heard.code() in REMEDIES:
                raise ConfigError(self.voice.clean(heard.str()), where=where, remedy=REMEDIES[heard.code()])
            waiting()

        return ask(
            question,
            voice=self.voice,
            settings=self.settings,
            where=where,
            stop=stop,
            wait_seconds=wait_seconds,
            waiting=between,
        )

    def metadata(self, wait_seconds: float = ADMIN_SECONDS) -> ClusterMetadata:
        """The cluster and its topics. Raises `BrokerUnreachable` after `wait_seconds`."""
        return self.ask(self.settings.bootstrap, lambda s: self.client.list_topics(timeout=s), wait_seconds)
