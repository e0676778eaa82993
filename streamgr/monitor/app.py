"""The Faust application: events, scores and dead letters in, windowed tables kept in Kafka, freshness summaries out.

The board decides, Faust carries. Its agents hand records to the board; its windowed tables hold what the board's own
windows hold (dead letters by reason, online quality by weights version and kind), so that a monitor that starts again
goes on where the last one stood; its group's offsets say from where. A change is written to its table within a second,
under the window of its own time, and the tables' changelogs are topics of topics.toml: Faust declares none.

What Faust does not do here, and why, checked with faust-streaming 0.15.3 and aiokafka 0.14:

    on Kafka 4      all of this works, by aiokafka's protocol versions; nothing had to be replaced
    manifests       are read by the plain client: a group's offsets and one `consumer_auto_offset_reset` for all topics
                    leave no way to read one topic from its beginning at each start
    first start     begins at the end of every topic, for the same reason
    mock cluster    librdkafka's speaks no CreateTopics and drops the connection (aiokafka: NodeNotReadyError), so the
                    demo feeds the board by the plain client (`monitor.engine = "plain"`)
    a lost group    a Faust application that has crashed stays down; we build a new one, after a pause, and count it

One process a group: every monitor needs all partitions, so a second one would halve what both see.
"""

import asyncio
import json
import logging
import ssl
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

import faust
import msgspec

from streamgr.clock import Clock
from streamgr.config import Config, Kafka
from streamgr.errors import ConfigError
from streamgr.events import Records
from streamgr.kafka.topics import identity
from streamgr.monitor.board import LETTER_KEEP_MS, LETTER_STEP_MS, Board, Kept
from streamgr.service import Stop
from streamgr.telemetry import Health, Log, counter

RESTARTS = counter("monitor_restarts", "Times that Faust was built anew after it had failed.")
TURN_SECONDS = 0.25
FLUSH_RECORDS = 500
PAUSE_SECONDS = 2.0  # before a new application
LEAVE_SECONDS = 10.0  # for the last commit and the group
SAY_AGAIN_SECONDS = 60.0
TABLES = ("dead_letters", "quality")


class _Table(faust.Table):  # type: ignore[type-arg]
    """A table whose changelog keeps a key in the partition of the source that the key names, whoever sets it.

    Faust knows that partition only while an agent handles a record; its own way out, `use_partitioner`, asks for
    metadata that the producer has not fetched yet and crashes on the first key.
    """

    def partition_for_key(self, key: Any) -> int:
        return int(key[0].rpartition("/")[2])


class Engine:
    """Runs applications, one after the other where one fails, until told to stop."""

    def __init__(
        self,
        config: Config,
        board: Board,
        *,
        clock: Clock,
        log: Log,
        health: Health,
        stop: Stop,
        look: Callable[[], None],
    ) -> None:
        """`look` is called once a turn: the role's own health."""
        self._config, self._board, self._clock, self._log = config, board, clock, log
        self._health, self._stop, self._look = health, stop, look
        self._waiting: list[Any] = []  # messages of events that the board has not seen yet
        self._kept: dict[tuple[str, str, int], Kept] = {}  # what the tables do not hold yet
        self._partitions = 0

    def run(self) -> None:
        """Until `stop`. Raises `ConfigError` where topics or settings do not do."""
        logger = logging.getLogger()
        handler = _ToLog(self._log, self._clock)
        logger.handlers, level = [handler], logger.level
        logger.setLevel(logging.WARNING)
        try:
            self._await_topics()
            asyncio.run(self._lives())
        finally:
            logger.removeHandler(handler)
            logger.setLevel(level)

    def _await_topics(self) -> None:
        """Wait for the broker; the tables have as many partitions as what they count."""
        for name in ("events", "scores", "dead-letters", "freshness", *map(_changelog, TABLES)):
            topic = self._config.topic(name)
            found = identity(
                self._config.kafka, topic, wait_seconds=None, log=self._log, stop=self._stop, waiting=self._look
            )
            if name == "events":
                self._partitions = found.partitions
            elif name in map(_changelog, TABLES) and found.partitions != self._partitions:
                raise ConfigError(
                    f"{found.partitions} partitions, the events have {self._partitions}",
                    where=topic,
                    remedy="it holds nothing but the monitor's tables: delete it, then streamgr topics apply",
                )

    async def _lives(self) -> None:
        while not self._stop:
            app = self._build()
            starting = asyncio.create_task(app.start())
            reason = await self._live(app, starting)
            self._health.hold("tables", "draining" if self._stop else f"Faust has failed: {reason}")
            if not self._stop:
                RESTARTS.inc()
                stack = "".join(traceback.format_exception(reason)) if reason is not None else ""
                self._log.warning("faust_failed", f"built anew in {PAUSE_SECONDS:g} s: {reason!r}", stack=stack)
            await self._leave(app, starting)
            until = self._clock.monotonic() + PAUSE_SECONDS
            await self._while(partial(self._before, until))

    async def _live(self, app: Any, starting: "asyncio.Task[None]") -> BaseException | None:
        """One application's life; why it ended, where not by us."""
        try:
            await self._while(lambda: not starting.done())
            if not self._stop:
                await starting
                self._health.hold("tables")
                await self._while(lambda: not app.should_stop)
            reason: BaseException | None = app.crash_reason
        except Exception as error:
            reason = error
        return reason

    def _before(self, moment: float) -> bool:
        return self._clock.monotonic() < moment

    async def _while(self, condition: Callable[[], bool]) -> None:
        """Turn while it holds and nobody has told us to stop."""
        while condition() and not self._stop:
            self._look()
            await asyncio.sleep(TURN_SECONDS)

    async def _leave(self, app: Any, starting: "asyncio.Task[None]") -> None:
        """Commit and leave the group, within a bound."""
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        try:
            await asyncio.wait_for(app.stop(), LEAVE_SECONDS)
        except Exception as error:
            self._log.warning("drain_incomplete", f"Faust did not leave well: {error!r}")

    def _build(self) -> Any:
        """The application: its tables, agents and timers. Faust decorates what it is to call."""
        config, kafka = self._config, self._config.kafka
        app = faust.App(
            config.group("monitor"),
            broker=[f"kafka://{address.strip()}" for address in kafka.bootstrap.split(",")],
            broker_credentials=credentials(kafka),
            store="memory://",
            autodiscover=False,
            web_enabled=False,
            topic_allow_declare=False,
            topic_disable_leader=True,
            topic_partitions=self._partitions,
            Table=_Table,
            consumer_auto_offset_reset="latest",
            key_serializer="raw",
            value_serializer="raw",
        )
        windows = {
            "dead_letters": (LETTER_STEP_MS, LETTER_KEEP_MS),
            "quality": (self._board.quality_step_ms, round(config.monitor.online_window_seconds * 1000)),
        }
        tables: dict[str, Any] = {}
        for name, (step_ms, keep_ms) in windows.items():
            log = app.topic(
                config.topic(_changelog(name)),
                key_serializer="json",
                value_serializer="json",
                internal=True,
                acks=False,
                allow_empty=True,
            )
            table = app.Table(name, partitions=self._partitions, changelog_topic=log)
            tables[name] = table.tumbling(step_ms / 1000, expires=keep_ms / 1000)
            table.changelog_topic = log  # `tumbling` has forgotten it
            tables[name].on_recover(self._recovered(name, table))
        freshness = app.topic(config.topic("freshness"), key_serializer="raw", value_serializer="raw")

        async def letters(stream: Any) -> None:
            async for event in stream.events():
                self._dead_letter(event.message)

        async def scores(stream: Any) -> None:
            async for event in stream.events():
                self._board.score(event.message.value)

        async def events(stream: Any) -> None:
            async for event in stream.events():
                self._waiting.append(event.message)
                if len(self._waiting) >= FLUSH_RECORDS:
                    self._flush()

        async def settle() -> None:
            self._flush()
            for kept in self._board.settle(self._clock.now_ms()):
                self._kept[kept.table, kept.key, kept.at_ms] = kept
            for kept in self._kept.values():
                tables[kept.table].relative_to(kept.at_ms / 1000)[kept.key] = kept.value
            self._kept.clear()

        async def publish() -> None:
            record = msgspec.json.encode(self._board.summary(self._clock.now_ms()))
            await freshness.send(key=b"summary", value=record)

        app.agent(app.topic(config.topic("dead-letters")), name="dead-letters")(letters)
        if config.monitor.online_window_seconds:
            app.agent(app.topic(config.topic("scores")), name="scores")(scores)
            app.agent(app.topic(config.topic("events")), name="events")(events)
        app.timer(interval=1.0)(settle)
        app.timer(interval=config.monitor.publish_seconds)(publish)
        app.finalize()
        return app

    def _dead_letter(self, message: Any) -> None:
        headers = dict(message.headers or ())
        reason = headers.get("reason", b"other").decode(errors="replace")
        kept = self._board.dead_letter(reason, round(message.timestamp * 1000), message.partition)
        self._kept[kept.table, kept.key, kept.at_ms] = kept

    def _flush(self) -> None:
        """Hand what waits to the board, a batch a partition."""
        waiting, self._waiting = self._waiting, []
        for partition in {message.partition for message in waiting}:
            batch = [message for message in waiting if message.partition == partition]
            records = Records(
                batch[0].topic,
                partition,
                [m.offset for m in batch],
                [m.key for m in batch],
                [m.value for m in batch],
                [round(m.timestamp * 1000) for m in batch],
                batch[-1].offset + 1,
            )
            self._board.events(records, self._clock.now_ms())

    def _recovered(self, name: str, table: Any) -> Callable[[], Any]:
        """What a table has kept goes back to the board, once it has been recovered."""

        async def recovered() -> None:
            count = 0
            for (key, (start, _)), value in list(table.items()):
                try:
                    self._board.restore(name, key, round(start * 1000), value)
                    count += 1
                except (ValueError, TypeError) as error:
                    self._log.warning("table_value_unreadable", str(error), table=name, key=str(key))
            self._log.info("table_recovered", table=name, values=count)

        return recovered


def credentials(kafka: Kafka) -> Any:
    """Faust's credentials from librdkafka's settings; None without any.

    Raises `ConfigError` on what cannot be said to Faust.
    """
    settings = {key: str(value) for key, value in kafka.librdkafka.items()}
    protocol = settings.get("security.protocol", "PLAINTEXT").upper()
    known = {
        *("security.protocol", "sasl.mechanism", "sasl.mechanisms", "sasl.username", "sasl.password"),
        *("ssl.ca.location", "ssl.certificate.location", "ssl.key.location", "ssl.key.password"),
        "ssl.endpoint.identification.algorithm",
    }
    if unknown := sorted(
        key for key in settings if key.startswith(("sasl.", "ssl.", "enable.ssl")) and key not in known
    ):
        raise ConfigError(
            f"{', '.join(unknown)}: Faust cannot be told this",
            where="kafka.librdkafka",
            remedy='set monitor.engine = "plain"',
        )
    context = None
    if protocol.endswith("SSL"):
        context = ssl.create_default_context(cafile=settings.get("ssl.ca.location"))
        if settings.get("ssl.endpoint.identification.algorithm", "https") == "none":
            context.check_hostname = False
        if certificate := settings.get("ssl.certificate.location"):
            password = settings.get("ssl.key.password")
            context.load_cert_chain(certificate, settings.get("ssl.key.location"), password)
    if protocol.startswith("SASL"):
        return faust.SASLCredentials(
            username=settings.get("sasl.username"),
            password=kafka.sasl_password or settings.get("sasl.password"),
            mechanism=settings.get("sasl.mechanism") or settings.get("sasl.mechanisms") or "PLAIN",
            ssl_context=context,
        )
    return faust.SSLCredentials(context) if context is not None else None


def _changelog(table: str) -> str:
    """The topic, without its prefix, of a table's changelog."""
    return f"monitor-{table.replace('_', '-')}"


class _ToLog(logging.Handler):
    """Faust's and aiokafka's own words in our log, the same place once a minute."""

    def __init__(self, log: Log, clock: Clock) -> None:
        super().__init__(logging.WARNING)
        self._log, self._clock = log, clock
        self._said: dict[tuple[str, int], float] = {}

    def emit(self, record: logging.LogRecord) -> None:
        place, now = (record.name, record.lineno), self._clock.monotonic()
        if now - self._said.get(place, -SAY_AGAIN_SECONDS) < SAY_AGAIN_SECONDS:
            return
        self._said[place] = now
        try:
            text = record.getMessage()
        except (TypeError, ValueError):
            text = json.dumps(str(record.msg))
        if record.exc_info and record.exc_info[1] is not None:
            text += f": {record.exc_info[1]!r}"
        self._log.warning("faust", text[:2_000], logger=record.name)
