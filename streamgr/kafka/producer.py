"""The one way records go out: idempotent, in order, confirmed or the work stops.

`send` only queues; `confirm` returns when every record so far is acknowledged by all in-sync replicas. Nobody may
commit before it. A broker that is away is waited for without end (`message.timeout.ms=0`): with a finite timeout an
outage leaves holes even with idempotence. A record that is refused for good breaks the producer: every later `send`
and `confirm` raises the same error, so nothing is ever committed over a hole.

Thread safe for `send` and `confirm`, as librdkafka is.
"""

from collections.abc import Callable, Iterable
from typing import Any, cast

import confluent_kafka
from confluent_kafka import KafkaError, KafkaException, Message

from streamgr.clock import Deadline, SystemClock
from streamgr.config import Kafka
from streamgr.errors import DataError, StreamgrError, TryAgain
from streamgr.kafka.client import Voice, librdkafka_settings, refused, translate
from streamgr.service import Stop
from streamgr.telemetry import Log

MAX_MESSAGE_BYTES = (2 << 20) + (128 << 10)  # the events' 2 MiB, the dead letters' 64 KiB more, and their overhead
ONE_SHOT_QUEUE_SECONDS = 60.0  # how long a command, which somebody waits for, lets a full queue hold it up
QUEUE_KBYTES = 65_536  # of records that are not acknowledged; then `send` holds its caller up
DRAIN_SECONDS = 5.0  # how long `confirm` goes on waiting once told to stop
Headers = list[tuple[str, bytes]]
Delivered = Callable[[KafkaError | None, Message], None]


class Producer:
    """Writes records; `confirm` before anything is committed that depends on them."""

    def __init__(
        self,
        settings: Kafka,
        *,
        client_id: str,
        linger_seconds: float = 0.005,
        log: Log | None = None,
        stop: Stop | None = None,
        waiting: Callable[[], None] = lambda: None,
        queue_seconds: float | None = None,
    ) -> None:
        """`waiting` is called twice a second while `send` or `confirm` waits. queue_seconds: how long a full queue may
        hold up `send`; None for without end. Raises `ConfigError` where librdkafka refuses.
        """
        self._settings, self._stop, self._waiting, self._queue_seconds = settings, stop, waiting, queue_seconds
        self._voice = Voice("producer", settings, log)
        self._clock = SystemClock()
        self._broken: StreamgrError | None = None
        try:
            self._producer = confluent_kafka.Producer(
                librdkafka_settings(
                    settings,
                    client_id,
                    self._voice,
                    enable_idempotence=True,
                    acks="all",
                    message_timeout_ms=0,
                    compression_type=str(settings.librdkafka.get("compression.type", "lz4")),
                    partitioner="murmur2_random",
                    linger_ms=linger_seconds * 1000,
                    queue_buffering_max_kbytes=QUEUE_KBYTES,
                    message_max_bytes=MAX_MESSAGE_BYTES,
                )
            )
        except KafkaException as error:
            raise refused(error, self._voice) from None

    def send(
        self,
        topic: str,
        value: bytes | None,
        *,
        key: bytes | None = None,
        partition: int | None = None,
        headers: Headers | None = None,
    ) -> None:
        """Queue one record; without `partition`, its key's murmur2 chooses.

        Holds the caller up while the queue is full (`TryAgain` after `queue_seconds`, or when told to stop). Raises
        `DataError` where the record is too large, and whatever an earlier record was refused for.
        """
        self._send(topic, value, key=key, partition=partition, headers=headers, delivered=self._delivered)

    def send_confirmed(
        self,
        topic: str,
        value: bytes | None,
        *,
        key: bytes | None = None,
        partition: int | None = None,
        headers: Headers | None = None,
        timeout: float | None = None,
    ) -> int:
        """Send one record, wait until it (and all before it) is acknowledged, and return its offset."""
        offsets: dict[int, int] = {}
        delivered = self._noting(0, offsets)
        self._send(topic, value, key=key, partition=partition, headers=headers, delivered=delivered)
        self.confirm(timeout)
        return self._known(1, offsets, topic)[0]

    def send_stamped(self, topic: str, value: bytes, *, key: bytes, timeout: float | None = None) -> int:
        """Send one record, wait until it (and all before it) is acknowledged, and return its append time in ms: the
        broker's, where the topic uses LogAppendTime and the broker says so, else when we sent it.
        """
        stamps: list[int] = []
        sent_ms = self._clock.now_ms()

        def delivered(error: KafkaError | None, message: Message) -> None:
            self._delivered(error, message)
            if error is None:
                kind, stamp = message.timestamp()  # the mock broker's is none, whatever its kind says
                stamps.append(stamp if kind == confluent_kafka.TIMESTAMP_LOG_APPEND_TIME and stamp > 0 else sent_ms)

        self._send(topic, value, key=key, partition=None, headers=None, delivered=delivered)
        self.confirm(timeout)
        return self._known(1, dict(enumerate(stamps)), topic)[0]

    def send_all(self, topic: str, records: Iterable[tuple[bytes, bytes]], *, partition: int) -> list[int]:
        """Send (key, value) after (key, value), then wait once until all are acknowledged; their offsets, in order."""
        offsets: dict[int, int] = {}
        count = 0
        for key, value in records:
            self._send(topic, value, key=key, partition=partition, headers=None, delivered=self._noting(count, offsets))
            count += 1
        self.confirm()
        return self._known(count, offsets, topic)

    def confirm(self, timeout: float | None = None) -> None:
        """Return when every record sent so far is acknowledged.

        Waits for a broker that is away, without end unless `timeout` (seconds) says so or the role is told to stop:
        then `TryAgain`. Raises the reason where a record was refused for good.
        """
        deadline = Deadline(self._clock, timeout) if timeout is not None else None
        stopping: Deadline | None = None
        while self._producer.flush(min(0.5, deadline.remaining()) if deadline else 0.5):
            self._check()
            self._waiting()
            if self._stop and stopping is None:
                stopping = Deadline(self._clock, DRAIN_SECONDS)
            if (deadline and deadline.passed()) or (stopping and stopping.passed()):
                raise TryAgain(
                    f"{len(self._producer)} records are not acknowledged",
                    where=self._settings.bootstrap,
                    remedy="nothing was committed over them; start again when the broker is back",
                )
        self._check()

    def close(self) -> None:
        """Forget what was never confirmed (its sender committed nothing over it) and let go of the connections."""
        self._producer.purge()
        self._producer.flush(1.0)

    def _send(
        self,
        topic: str,
        value: bytes | None,
        *,
        key: bytes | None,
        partition: int | None,
        headers: Headers | None,
        delivered: Delivered,
    ) -> None:
        self._check()
        deadline = None if self._queue_seconds is None else Deadline(self._clock, self._queue_seconds)
        stopping: Deadline | None = None
        where = topic if partition is None else f"{topic}[{partition}]"
        while True:
            try:
                self._producer.produce(
                    topic,
                    value,
                    key,
                    -1 if partition is None else partition,
                    on_delivery=delivered,
                    headers=cast(Any, headers),
                )
                self._producer.poll(0)
                return
            except BufferError:
                self._producer.poll(0.5)  # serves deliveries, so the queue moves if the broker does
                self._check()
                self._waiting()
                if self._stop and stopping is None:
                    stopping = Deadline(self._clock, DRAIN_SECONDS)
                if (deadline and deadline.passed()) or (stopping and stopping.passed()):
                    raise TryAgain(
                        f"the queue of {len(self._producer)} records is full and does not move",
                        where=where,
                        remedy="check the broker; nothing was committed over them",
                    ) from None
            except KafkaException as raised:
                raise self._reason(raised.args[0], where) from None

    def _delivered(self, error: KafkaError | None, message: Message) -> None:
        if error is not None and error.code() not in (KafkaError._PURGE_QUEUE, KafkaError._PURGE_INFLIGHT):
            self._voice.complain(error)
            if self._broken is None:
                self._broken = self._reason(error, f"{message.topic()}[{message.partition()}]")

    def _noting(self, index: int, offsets: dict[int, int]) -> Delivered:
        """Where the record came to stand, once it is acknowledged, as offsets[index]."""

        def delivered(error: KafkaError | None, message: Message) -> None:
            self._delivered(error, message)
            if error is None:
                offsets[index] = cast(int, message.offset())

        return delivered

    @staticmethod
    def _known(count: int, offsets: dict[int, int], where: str) -> list[int]:
        """The offsets of `count` records. Raises `TryAgain` where `close` has forgotten some meanwhile."""
        if len(offsets) < count:
            what = f"{count - len(offsets)} of {count} records were given up"
            raise TryAgain(what, where=where, remedy="none: their sender was leaving")
        return [offsets[index] for index in range(count)]

    def _reason(self, error: KafkaError, where: str) -> StreamgrError:
        if error.code() == KafkaError.MSG_SIZE_TOO_LARGE:
            return DataError(
                f"a record is larger than the topic or the producer ({MAX_MESSAGE_BYTES} bytes) takes",
                where=where,
                remedy="streamgr topics apply sets the topic's max.message.bytes; else split the record",
            )
        return translate(error, self._voice, where, self._settings)

    def _check(self) -> None:
        if self._broken is not None:
            raise self._broken
