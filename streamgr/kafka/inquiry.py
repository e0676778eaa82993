"""What an operator wants to know of a broker, beyond its topics: how old it is, what its clock says, how far we are.

Nothing is written to a topic of ours. To read the broker's clock a group of the doctor's own commits an offset: the
broker stamps that commit in its own log of groups, where it is read back. The group expires by itself.
"""

from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeVar

from confluent_kafka import ConsumerGroupTopicPartitions, KafkaException, TopicPartition
from confluent_kafka.admin import ConfigResource, ResourceType  # type: ignore[attr-defined]

from streamgr.clock import Clock, Deadline
from streamgr.config import Kafka
from streamgr.errors import BrokerUnreachable
from streamgr.kafka.client import DENIED, Admin, translate
from streamgr.kafka.consumer import Consumer
from streamgr.service import Stop

SECONDS = 10.0  # for one question
GROUPS = "__consumer_offsets"
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Stand:
    """How far a group is in one partition. first, end: what the log holds. at: its position, None before the first.

    waiting_ms: append time of the next record it has not reported, None at the end of the log.
    """

    partition: int
    first: int
    end: int
    at: int | None
    waiting_ms: int | None


@dataclass(frozen=True, slots=True)
class Skew:
    """The broker's clock is ahead of ours by `seconds`, give or take `uncertain`."""

    seconds: float
    uncertain: float


class Inquiry:
    """Questions to one cluster. Each raises `BrokerUnreachable` or `ConfigError` (denied) with its remedy."""

    def __init__(self, settings: Kafka, clock: Clock) -> None:
        self._settings, self._clock = settings, clock
        self._admin = Admin(settings, client_id="streamgr-doctor")

    def brokers(self) -> tuple[str, int]:
        """(cluster id, how many brokers)"""
        metadata = self._admin.metadata(SECONDS)
        return metadata.cluster_id or "", len(metadata.brokers)

    def topics(self) -> set[str]:
        """The names of all topics that we may see."""
        return set(self._admin.metadata(SECONDS).topics)

    def topic_settings(self, topic: str) -> Mapping[str, str]:
        """Kafka's own settings of a topic, by name."""
        resource = ConfigResource(ResourceType.TOPIC, topic)
        futures = self._admin.client.describe_configs([resource], request_timeout=SECONDS)
        return {key: str(entry.value) for key, entry in self._result(futures[resource], topic).items()}

    def bounds(self, topic: str) -> dict[int, tuple[int, int]]:
        """(first offset held, end) by partition."""
        consumer = Consumer(self._settings, client_id="streamgr-doctor")
        try:
            numbers = consumer.partitions(topic, wait_seconds=SECONDS)
            return {p: consumer.bounds(topic, p, wait_seconds=SECONDS) for p in numbers}
        finally:
            consumer.close()

    def stands(self, topic: str, group: str) -> list[Stand]:
        """How far the group says it is in each partition of the topic."""
        bounds = self.bounds(topic)
        asked = [ConsumerGroupTopicPartitions(group)]
        told = self._result(
            self._admin.client.list_consumer_group_offsets(asked, request_timeout=SECONDS)[group], group
        )
        at = {tp.partition: tp.offset for tp in told.topic_partitions if tp.topic == topic and tp.offset >= 0}
        behind = {p: at[p] for p, (first, end) in bounds.items() if first <= at.get(p, -1) < end}
        waiting = self._append_times(topic, behind)
        return [Stand(p, *bounds[p], at.get(p), waiting.get(p)) for p in sorted(bounds)]

    def skew(self, topic: str, group: str) -> Skew:
        """The broker's clock against ours, by a commit of `group`, which nobody else is in."""
        self._commit(group, topic)  # the broker makes its log of groups with the first one
        consumer = Consumer(self._settings, client_id="streamgr-doctor")
        try:
            places = len(consumer.partitions(GROUPS, wait_seconds=SECONDS))
            place = java_hash(group) % places
            end = consumer.bounds(GROUPS, place, wait_seconds=SECONDS)[1]
            before = self._clock.now_ms()
            self._commit(group, topic)
            after = self._clock.now_ms()
            consumer.assign({(GROUPS, place): end})
            stamp = self._stamp(consumer, group.encode())
        finally:
            consumer.close()
        return Skew((stamp - (before + after) / 2) / 1000, (after - before) / 2000)

    def _commit(self, group: str, topic: str) -> None:
        """Until it is taken: the log of groups may be in the making."""
        deadline, pause = Deadline(self._clock, SECONDS), Stop()
        while True:
            commit = ConsumerGroupTopicPartitions(group, [TopicPartition(topic, 0, 0)])
            futures = self._admin.client.alter_consumer_group_offsets([commit], request_timeout=SECONDS)
            told = self._result(futures[group], group)
            error = next((tp.error for tp in told.topic_partitions if tp.error is not None), None)
            if error is None:
                return
            if error.code() in DENIED or deadline.passed():
                raise translate(error, self._admin.voice, f"group {group}", self._settings)
            pause.wait(0.2)

    def _stamp(self, consumer: Consumer, group: bytes) -> int:
        deadline = Deadline(self._clock, SECONDS)
        while not deadline.passed():
            for record in consumer.poll(timeout=0.2):
                if record.key is not None and group in record.key and record.value is not None:
                    return record.append_ms
        raise BrokerUnreachable("a commit did not come back", where=GROUPS, remedy="see the broker's log")

    def _append_times(self, topic: str, positions: dict[int, int]) -> dict[int, int]:
        """Append time of the record at each position (or the next that there is)."""
        found: dict[int, int] = {}
        if not positions:
            return found
        consumer, deadline = Consumer(self._settings, client_id="streamgr-doctor"), Deadline(self._clock, SECONDS)
        try:
            consumer.assign({(topic, p): offset for p, offset in positions.items()})
            while len(found) < len(positions) and not deadline.passed():
                for record in consumer.poll(max_records=100, timeout=0.2):
                    found.setdefault(record.partition, record.append_ms)
        finally:
            consumer.close()
        return found

    def _result(self, future: "Future[T]", where: str) -> T:
        try:
            return future.result(SECONDS + 5)
        except KafkaException as raised:
            raise translate(raised.args[0], self._admin.voice, where, self._settings) from None


def java_hash(text: str) -> int:
    """Java's `String.hashCode` of ASCII text without its sign: by it a group finds its place in the log of groups."""
    value = 0
    for byte in text.encode("ascii", "replace"):
        value = (31 * value + byte) & 0xFFFFFFFF
    return min(value, (1 << 32) - value)
