"""The one way records come in: an exact position in, batches of records out.

Progress is the caller's (its store, its checkpoint): a consumer starts at the positions it is given, never at one that
Kafka remembers and never at "earliest" or "latest". Positions are handed to librdkafka inside the assignment (not by
seek), so nothing can be fetched from elsewhere in between. Where the log no longer holds a position, that is an error
with a name, not a jump. A broker that is away is waited for.

Not thread safe: one thread polls, and the rebalance callbacks run inside its `poll` and `close`. They must end within
`max.poll.interval.ms`, which leaves half an hour for bringing a large state; that a loop turns is the probes' to watch.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar, cast

import confluent_kafka
from confluent_kafka import KafkaError, KafkaException, Message, TopicPartition

from streamgr.clock import Deadline, SystemClock
from streamgr.config import Kafka
from streamgr.errors import ConfigError, DataError, RetentionPassed, StreamgrError
from streamgr.events import Record, Records
from streamgr.kafka.client import DENIED, Voice, ask, librdkafka_settings, refused, translate
from streamgr.service import Stop
from streamgr.telemetry import Log, counter, gauge

LAG = gauge("consumer_lag_records", "Records between the position and the end, all partitions.", ("topic",))
POSITION_TIME = gauge(
    "consumer_position_timestamp_seconds", "Append time at the position, the oldest of the partitions.", ("topic",)
)
STRAYS = counter(
    "consumer_stray_records", "Records of partitions not owned, dropped unread (read again by their owner)."
)
REBALANCES = counter("consumer_rebalances", "Changes of the assignment by the group.", ("kind",))
for _kind in ("assign", "revoke", "lost"):
    REBALANCES.labels(_kind)

RENEWALS = counter("consumer_renewals", "Clients replaced because no question of theirs was answered for long.")

GAUGE_SECONDS = 1.0
DESPAIR_SECONDS = 15.0
T = TypeVar("T")
Partition = tuple[str, int]


class Consumer:
    """Reads topics from exact positions; one poll thread."""

    def __init__(
        self,
        settings: Kafka,
        *,
        client_id: str,
        group: str = "",
        log: Log | None = None,
        stop: Stop | None = None,
        waiting: Callable[[], None] = lambda: None,
        headers: bool = False,
    ) -> None:
        """`group` only for `subscribe` and `commit`. `headers`: batches carry the records' headers. `stop` ends
        a wait for a broker that is away, `waiting` is called in it.

        Raises `ConfigError` where librdkafka refuses the settings.
        """
        self._settings, self._group, self._log, self._stop, self._waiting = settings, group, log, stop, waiting
        self._headers = headers
        self._voice = Voice("consumer", settings, log)
        self._clock = SystemClock()
        self._positions: dict[Partition, int] = {}  # the next offset of each owned partition
        self._append_ms: dict[Partition, int] = {}
        self._gauged, self._topics = 0.0, set[str]()
        self._paused: set[Partition] = set()
        self._unanswered: float | None = None  # since when no question has been answered
        self._closed = False
        self._conf = librdkafka_settings(
            settings,
            client_id,
            self._voice,
            group_id=group or client_id,
            auto_offset_reset="error",
            enable_auto_commit=False,
            enable_auto_offset_store=False,
            enable_partition_eof=True,
            partition_assignment_strategy="cooperative-sticky",
            session_timeout_ms=10_000,
            heartbeat_interval_ms=2_000,
            isolation_level="read_committed",
        ) | {"on_commit": self._committed, **_DEFAULTS, **_chosen(settings)}
        try:
            self._consumer = confluent_kafka.Consumer(self._conf)
        except KafkaException as error:
            raise refused(error, self._voice) from None

    def partitions(self, topic: str, *, wait_seconds: float | None = None) -> list[int]:
        """The topic's partitions, sorted.

        Waits out a broker that is away (at most `wait_seconds`: `BrokerUnreachable`). Raises `ConfigError` where the
        topic does not exist.
        """

        def question(seconds: float) -> list[int]:
            found = self._consumer.list_topics(topic, timeout=seconds).topics[topic]
            if found.error is not None:
                raise KafkaException(found.error)
            return sorted(found.partitions)

        return self._ask(topic, question, wait_seconds)

    def bounds(self, topic: str, partition: int, *, wait_seconds: float | None = None) -> tuple[int, int]:
        """The first offset held and the end offset (that of the next record), as the broker has them now."""

        def question(seconds: float) -> tuple[int, int]:
            low, high = self._consumer.get_watermark_offsets(TopicPartition(topic, partition), timeout=seconds)
            return low, high

        return self._ask(f"{topic}[{partition}]", question, wait_seconds)

    def assign(self, positions: Mapping[Partition, int]) -> None:
        """Read exactly these partitions from exactly these offsets; replaces the assignment and un-pauses."""
        self._positions = dict(positions)
        self._append_ms.clear()
        self._paused.clear()
        self._consumer.assign(_at(positions))

    def subscribe(
        self,
        topic: str,
        on_assign: Callable[[list[int]], None],
        on_revoke: Callable[[list[int]], None],
        on_lost: Callable[[list[int]], None],
    ) -> None:
        """Share the topic with the group, partition by partition (cooperative).

        `on_assign` tells of partitions that have come; nothing is read of them before `start`, so there is time to
        open them. `on_revoke` commits and closes; `on_lost` only closes: another member may own them already. An error
        they raise comes out of `poll` or `close`.
        """

        def assigned(_: object, added: list[TopicPartition]) -> None:
            REBALANCES.labels("assign").inc()
            self._consumer.incremental_assign([])
            if added:
                on_assign(_numbers(added))

        def gone(kind: str, close: Callable[[list[int]], None], removed: list[TopicPartition]) -> None:
            REBALANCES.labels(kind).inc()
            started = [tp for tp in removed if self._positions.pop((topic, tp.partition), None) is not None]
            for tp in started:  # nothing of it is handed out any more, whatever `close` does
                self._append_ms.pop((topic, tp.partition), None)
            if removed:
                close(_numbers(removed))
            self._consumer.incremental_unassign(started)

        self._consumer.subscribe(
            [topic],
            on_assign=assigned,
            on_revoke=lambda _, removed: gone("revoke", on_revoke, removed),
            on_lost=lambda _, removed: gone("lost", on_lost, removed),
        )

    def start(self, topic: str, partition: int, offset: int) -> None:
        """Read a partition that the group has given us from exactly this offset."""
        positions = {(topic, partition): offset}
        self._positions |= positions
        self._consumer.incremental_assign(_at(positions))

    def poll(self, max_records: int = 1000, timeout: float = 0.05) -> list[Record]:
        """The next records one by one, in order within each partition; empty after `timeout` seconds without any."""
        patience = Deadline(self._clock, timeout)
        while True:
            batches = self.fetch(max_records, patience.remaining())
            records = [batch[i] for batch in batches for i in range(len(batch))]
            if records or patience.passed():
                return records

    def fetch(self, max_records: int = 1000, timeout: float = 0.05) -> list[Records]:
        """The next records as columns, a batch a partition; empty after `timeout` seconds without any.

        Where the end of a partition is reached, a batch, perhaps without records, says where that is (control records
        of transactions are passed over). Returns with what is there as soon as there is any: `timeout` is no added
        latency. Raises `RetentionPassed` where the log no longer holds a position, `DataError` where it ends before
        one, `ConfigError` where access is denied; what passes by itself is counted and retried.
        """
        first = self._consumer.poll(timeout)
        if first is None:
            self._gauge()
            return []
        messages = [first, *self._consumer.consume(max_records - 1, 0)] if max_records > 1 else [first]
        grouped: dict[Partition, list[Message]] = {}
        ends: dict[Partition, int] = {}
        for message in messages:
            owner = cast(Partition, (message.topic(), message.partition()))
            if (error := message.error()) is not None:
                if error.code() != KafkaError._PARTITION_EOF:
                    self._heed(message)
                elif owner in self._positions:
                    ends[owner] = cast(int, message.offset())
                    grouped.setdefault(owner, [])
            elif owner in grouped:
                grouped[owner].append(message)
            elif owner in self._positions:
                grouped[owner] = [message]
            else:
                STRAYS.inc()
        batches = []
        for (topic, partition), taken in grouped.items():
            batch = Records(
                topic,
                partition,
                cast(list[int], [message.offset() for message in taken]),
                cast(list[bytes | None], [message.key() for message in taken]),
                [message.value() for message in taken],
                [message.timestamp()[1] for message in taken],
                max(cast(int, taken[-1].offset()) + 1 if taken else 0, ends.get((topic, partition), 0)),
                [_headers(message) for message in taken] if self._headers else None,
            )
            self._positions[topic, partition] = batch.next_offset
            if taken:
                self._append_ms[topic, partition] = batch.append_ms[-1]
            batches.append(batch)
        self._gauge()
        return batches

    def pause(self, topic: str, partitions: Iterable[int]) -> None:
        """Stop fetching these; what was fetched and not yet polled is fetched again on `resume`."""
        places = [(topic, p) for p in partitions]
        self._paused.update(places)
        self._consumer.pause([TopicPartition(*place) for place in places])

    def resume(self, topic: str, partitions: Iterable[int]) -> None:
        places = [(topic, p) for p in partitions]
        self._paused.difference_update(places)
        self._consumer.resume([TopicPartition(*place) for place in places])

    def commit(self, positions: Mapping[Partition, int]) -> None:
        """Tell the group where we are, for lag tools only; asynchronous, never read back. Nothing without a group."""
        if not self._group or not positions:
            return
        try:
            self._consumer.commit(offsets=_at(positions), asynchronous=True)
        except KafkaException as error:  # the next commit says the same, later
            self._voice.complain(error.args[0])

    def lag(self) -> dict[Partition, int]:
        """Records between position and end of each owned partition, as last fetched (no question to the broker).

        A partition of which nothing has been fetched yet is left out.
        """
        found = {}
        for (topic, partition), position in self._positions.items():
            try:
                _, high = self._consumer.get_watermark_offsets(TopicPartition(topic, partition), cached=True)
            except KafkaException:  # no metadata of it yet
                continue
            if high >= 0:
                found[topic, partition] = max(0, high - position)
        return found

    def close(self) -> None:
        """Leave the group (revoking what is owned) and let go of the connections; again is harmless."""
        if not self._closed:
            self._closed = True
            self._consumer.close()

    def _heed(self, message: Message) -> None:
        """An error in place of a record: raise what ends the work, count the rest."""
        error = cast(KafkaError, message.error())
        topic, partition = message.topic() or "", cast(int, message.partition())
        where = f"{topic}[{partition}]"
        if error.code() == KafkaError._AUTO_OFFSET_RESET and (topic, partition) in self._positions:
            raise self._out_of_range(topic, partition, self._voice.clean(error.str()))
        if error.code() == KafkaError.GROUP_AUTHORIZATION_FAILED and not self._group:
            return  # librdkafka looks for a coordinator even where nothing is asked of one: no rights are needed for it
        if error.fatal() or error.code() in DENIED:
            raise translate(error, self._voice, where, self._settings)
        self._voice.complain(error)

    def _out_of_range(self, topic: str, partition: int, why: str) -> StreamgrError:
        position = self._positions[topic, partition]
        low, high = self.bounds(topic, partition)
        where = f"{topic}[{partition}]@{position}"
        if position < low:
            return RetentionPassed(
                f"the log starts at {low}: retention has overtaken us by {low - position} records",
                where=where,
                remedy="restore a state snapshot, or rebuild with --accept-loss; then raise the topic's retention.ms",
            )
        return DataError(
            f"the log holds {low} to {high}: the topic was recreated or truncated ({why})",
            where=where,
            remedy="restore the topic, or remove the state that was built from the old one",
        )

    def _committed(self, error: KafkaError | None, _: list[TopicPartition]) -> None:
        if error is not None:
            self._voice.complain(error)

    def _gauge(self) -> None:
        """Once a second: lag and position time of each topic."""
        now = self._clock.monotonic()
        if now - self._gauged < GAUGE_SECONDS:
            return
        self._gauged = now
        lags = self.lag()
        self._topics |= {topic for topic, _ in self._positions}  # one that is no longer owned has no lag, not its last
        for topic in self._topics:
            LAG.labels(topic).set(sum(records for (t, _), records in lags.items() if t == topic))
            if times := [ms for (t, _), ms in self._append_ms.items() if t == topic]:
                POSITION_TIME.labels(topic).set(min(times) / 1000)

    def _ask(self, where: str, question: Callable[[float], T], wait_seconds: float | None) -> T:
        def attempt(seconds: float) -> T:
            try:
                answer = question(seconds)
            except KafkaException as raised:
                self._despair(raised.args[0])
                raise
            self._unanswered = None
            return answer

        return ask(
            attempt,
            voice=self._voice,
            settings=self._settings,
            where=where,
            stop=self._stop,
            wait_seconds=wait_seconds,
            waiting=self._waiting,
        )

    def _despair(self, error: KafkaError) -> None:
        """Replace a client that has had no answer for long, the broker's absence or not.

        librdkafka (2.16, issue 5430) loses a partition for good where a broker that leaves in good order names nobody
        as its leader: `_UNKNOWN_PARTITION` without end, though the broker is back. What the old client had fetched and
        not handed out is fetched again from our positions. A member of a group keeps its client: the group's
        coordinator throws it out and lets it in again by itself.
        """
        now = self._clock.monotonic()
        if self._unanswered is None:
            self._unanswered = now
        if self._group or now - self._unanswered < DESPAIR_SECONDS:
            return
        self._unanswered = None
        RENEWALS.inc()
        if self._log is not None:
            self._log.warning("client_renewed", self._voice.clean(error.str()), unanswered_seconds=DESPAIR_SECONDS)
        old, self._consumer = self._consumer, confluent_kafka.Consumer(self._conf)
        old.close()
        if self._positions:
            self._consumer.assign(_at(self._positions))
            self._consumer.pause([TopicPartition(*place) for place in self._paused & self._positions.keys()])


_DEFAULTS = {
    "fetch.wait.max.ms": 50,
    "fetch.min.bytes": 1,
    "queued.max.messages.kbytes": 65_536,
    "max.poll.interval.ms": 1_800_000,
}


def _chosen(settings: Kafka) -> dict[str, str | int | float | bool]:
    """What the operator chose of these."""
    return {name: value for name, value in settings.librdkafka.items() if name in _DEFAULTS}


def _at(positions: Mapping[Partition, int]) -> list[TopicPartition]:
    for (topic, partition), offset in positions.items():
        if offset < 0:
            raise ConfigError(f"{offset} is not an offset", where=f"{topic}[{partition}]")
    return [TopicPartition(topic, partition, offset) for (topic, partition), offset in positions.items()]


def _numbers(partitions: list[TopicPartition]) -> list[int]:
    return sorted(tp.partition for tp in partitions)


def _headers(message: Message) -> list[tuple[str, bytes]]:
    headers = cast(list[tuple[str, bytes | None]], message.headers() or [])
    return [(name, value) for name, value in headers if value is not None]
