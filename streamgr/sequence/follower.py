"""The follower: the sequencer's own partition code over the same events, emitting nothing.

A scorer steps it in one thread and reads it from others; one lock a partition keeps them apart, and records are applied
a few at a time so that a reader never waits long. It assigns itself every partition (no group) from the stored offsets.
"""

import threading
from dataclasses import dataclass, field

from streamgr.clock import Clock
from streamgr.config import Config
from streamgr.errors import RetentionPassed
from streamgr.events import History
from streamgr.kafka.consumer import Consumer
from streamgr.kafka.topics import identity
from streamgr.sequence import views
from streamgr.sequence.opening import Opener
from streamgr.sequence.partition import Partition
from streamgr.sequence.replay import Replay
from streamgr.sequence.tail import Tail
from streamgr.service import Stop
from streamgr.telemetry import Log

BITE = 100  # records applied under one hold of the lock
EMPTY = Tail().window(0, 0)
LOOK_SECONDS = 1.0  # how often we ask where the end is


@dataclass(slots=True)
class Followed:
    """A partition and what keeps its readers and its writer apart. `end`: of the log when last asked."""

    partition: Partition
    start: int
    end: int
    lock: threading.Lock = field(default_factory=threading.Lock)


class Follower:
    """Keeps every user's sequence as of now. `open`, `step` and `close` from one thread, the rest from any."""

    def __init__(
        self, config: Config, clock: Clock, log: Log, *, role: str = "scorer", stop: Stop | None = None
    ) -> None:
        self._config, self._clock, self._log, self._role = config, clock, log, role
        self._topic = config.topic("events")
        self._stop = Stop() if stop is None else stop
        self._consumer = Consumer(config.kafka, client_id=f"{role}-follower", log=log, stop=self._stop)
        self._opener = Opener(config, clock, log, self._stop, role=role, emits=False)
        self._replay = Replay(clock, log)
        self._followed: dict[int, Followed] = {}
        self._committed = self._synced = self._looked = clock.monotonic()
        self._ready = False

    def open(self) -> None:
        """Open the stores and start at their offsets.

        Raises `TryAgain` where another process holds one, `ConfigError` where one belongs to another log.
        """
        numbers = self._consumer.partitions(self._topic)
        topic = identity(self._config.kafka, self._topic, wait_seconds=None, log=self._log, stop=self._stop)
        for number in numbers:
            opened = self._opener.open(number, self._consumer, topic)
            partition = opened.partition
            partition.cache(self._config.sequence.cached_events // len(numbers))
            self._followed[number] = Followed(partition, partition.next_offset, opened.end)
            self._replay.opened(number, partition, opened.end)
        self._consumer.assign({(self._topic, n): f.start for n, f in self._followed.items()})
        self._log.info("following", partitions=numbers, behind=self._behind())

    def step(self, timeout: float = 0.05) -> int:
        """Take what has come; how many records. Raises `RetentionPassed` where the log has overtaken us."""
        try:
            batches = self._consumer.fetch(timeout=timeout)
        except RetentionPassed as error:
            directory = self._config.role_directory(self._role)
            remedy = f"remove {directory}: the sequences start again where the log does; then raise its retention.ms"
            raise RetentionPassed(error.what, where=error.where, remedy=remedy) from None
        for records in batches:
            followed = self._followed[records.partition]
            for bite in range(0, max(1, len(records)), BITE):
                end = records.offsets[bite + BITE] if bite + BITE < len(records) else records.next_offset
                with followed.lock:
                    followed.partition.apply(records.between(followed.partition.next_offset, end))
        now = self._clock.monotonic()
        if now - self._looked >= LOOK_SECONDS:
            self._looked = now
            for (_, number), lag in self._consumer.lag().items():
                followed = self._followed[number]
                followed.end = max(followed.end, followed.partition.next_offset + lag)
        if now - self._committed >= self._config.sequence.commit_interval_seconds:
            self._committed = now
            self._commit()
        return sum(len(records) for records in batches)

    def close(self) -> None:
        """Keep what was read, release the stores."""
        self._consumer.close()
        self._synced = -self._config.state.sync_seconds
        self._commit()
        for followed in self._followed.values():
            with followed.lock:
                followed.partition.store.close()
        self._followed = {}

    def history(self, user: str, at_ms: int, limit: int) -> History:
        """The user's newest `limit` impressions and actions before `at_ms`, oldest first; empty if unknown."""
        for followed in self._followed.values():
            with followed.lock:
                if (found := followed.partition.history(user, at_ms, limit)) is not None:
                    return found
        return EMPTY

    def sequence(self, user: str, part: views.Part = views.WHOLE) -> views.Json:
        """The user's sequence, or a part of it, as the contract shows it; no events if unknown."""
        for followed in self._followed.values():
            with followed.lock:
                if not followed.partition.knows(user):
                    continue
                if followed.partition.pending:
                    followed.partition.commit()
            return views.sequence(followed.partition.store, user, part)  # unlocked: it may be long
        return {"user_id": user, "events": []}

    def item_text(self, key: int) -> str | None:
        """The item id behind an item key; None if it was never seen."""
        for followed in self._followed.values():
            with followed.lock:
                if text := followed.partition.item_text(key):
                    return text
        return None

    def newest_event_ms(self) -> int:
        """The greatest event time seen, 0 before the first."""
        return max((f.partition.newest_event_ms or 0 for f in self._followed.values()), default=0)

    def age_seconds(self) -> float:
        """How far the sequences are behind the end of the events (as of the last second); 0 when caught up."""
        late = [f.partition.append_ms for f in self._followed.values() if f.partition.next_offset < f.end]
        return max(0, self._clock.now_ms() - min(late)) / 1000 if late else 0.0

    def caught_up(self) -> bool:
        """Whether everything that was in the log within the last second has been read."""
        return bool(self._followed) and self._behind() == 0

    def why_not_ready(self) -> str:
        """Empty once the end has been reached for the first time."""
        if not self._ready:
            self._ready = self.caught_up()
        if self._ready:
            return ""
        start = {n: f.start for n, f in self._followed.items()}
        return f"replaying events from offsets {start}: {self._behind()} records to go" if start else "not opened"

    def _behind(self) -> int:
        return sum(max(0, f.end - f.partition.next_offset) for f in self._followed.values())

    def _commit(self) -> None:
        now = self._clock.monotonic()
        sync = now - self._synced >= self._config.state.sync_seconds
        if sync:
            self._synced = now
        for followed in self._followed.values():
            with followed.lock:
                if followed.partition.pending:
                    followed.partition.commit()
            if sync:
                followed.partition.store.sync()
        self._replay.look({number: followed.partition for number, followed in self._followed.items()})
