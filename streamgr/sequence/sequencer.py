"""The sequencer: a role's loop around the partitions it owns, and the one commit order.

    1. apply    records change the partition's state in memory and fill its batch
    2. produce  what they gave (examples, dead letters, progress) is sent to the source's partition number
    3. confirm  every output is acknowledged by the broker
    4. write    one WriteBatch a partition: events, dictionaries, open labels, next offset, watermark, last output
    5. sync     the write-ahead log, every `state.sync_seconds`
    6. report   the group's offset, for lag tools only; never read back

A crash before 4 (in 1, 2, 3, or between 3 and 4): the records are read again from the stored offset and say the same
under the same positions; readers drop what they have. A crash after 4: a killed process loses nothing; a power failure
before 5 takes offset and data back together, which is the first case. After 5, only lag tools are behind. 1 to 6 happen
in this order for all partitions at once, every `sequence.commit_interval_seconds`.

Progress is the store's own offset: on assignment the consumer starts there. When a partition is revoked, it is
committed and closed; when it is lost, it is closed as it is, for somebody else may already be at work.
"""

from collections.abc import Mapping

from streamgr.clock import Clock, Deadline
from streamgr.config import Config
from streamgr.errors import TryAgain
from streamgr.events import Records, heartbeat
from streamgr.kafka.consumer import Consumer
from streamgr.kafka.producer import Producer
from streamgr.kafka.topics import Identity, identity
from streamgr.sequence import examples as wire
from streamgr.sequence import meters
from streamgr.sequence.opening import Opener
from streamgr.sequence.partition import Partition
from streamgr.sequence.replay import Replay
from streamgr.sequence.schedule import Schedule
from streamgr.service import Stop
from streamgr.telemetry import Health, Log

ROLE = "sequencer"
RETRY_SECONDS = 0.5  # a partition that cannot be opened yet (its last owner has not let go) is tried again
PROGRESS_SECONDS = 1.0
CONFIRM_SECONDS = 5.0  # one wait for acknowledgements; then say that we live, and go on waiting
SAY_AGAIN_SECONDS = 60.0
REVOKE_SECONDS = 5.0  # a partition that is taken from us is committed within this, or its next owner reads it again


class Sequencer:
    """Owns partitions of the events; sequences them and emits examples."""

    def __init__(
        self,
        config: Config,
        clock: Clock,
        log: Log,
        health: Health,
        stop: Stop,
        *,
        rebuild: bool = False,
        accept_loss: bool = False,
    ) -> None:
        """`rebuild`: start every partition from an empty store. `accept_loss`: though its log lacks the start."""
        self._config, self._clock, self._log, self._health, self._stop = config, clock, log, health, stop
        self._events, self._examples = config.topic("events"), config.topic("examples")
        self._letters = config.topic("dead-letters")
        self._opener = Opener(
            config,
            clock,
            log,
            stop,
            role=ROLE,
            emits=True,
            rebuild=rebuild,
            accept_loss=accept_loss,
            waiting=health.turned,
        )
        snapshots = self._opener.snapshots
        self._schedule = None if snapshots is None else Schedule(config.state, snapshots, clock, log)
        self._replay = Replay(clock, log)
        self._partitions: dict[int, Partition] = {}
        self._coming: dict[int, float] = {}  # given to us by the group and not open yet -> when to try (monotonic)
        self._said: dict[int, float] = {}  # when we last said that a partition waits (monotonic)
        self._held: list[Records] = []  # read while we waited for something else
        self._spans: dict[int, list[int]] = {}  # partition -> append times (ms) of the uncommitted, oldest and newest
        self._told: dict[int, tuple[int, float]] = {}  # partition -> (offset, when) of the last progress record
        self._committed = self._synced = self._beaten = clock.monotonic()
        self._identity = Identity("", "", 0)
        self._deadline: Deadline | None = None  # of the drain
        meters.prepare(config.sequence.actions)
        health.hold("partitions", "none assigned yet")

    def run(self) -> None:
        """Share the partitions with the group until told to stop; then commit and leave."""
        consumer, producer = self._connect(self._config.group(ROLE))
        try:
            consumer.subscribe(
                self._events,
                self._assigned,
                lambda removed: self._revoked(removed, producer),
                self._lost,
            )
            while not self._stop:
                self._open_next(consumer)
                self._turn(consumer, producer)
            self._health.hold("partitions", "draining")
            self._commit(consumer, producer, final=True)
        finally:
            self._leave(consumer, producer)

    def run_until_end(self) -> None:
        """Take every partition, work up to the end of the log as it stands now, commit and return.

        Raises `TryAgain` where another process holds a store.
        """
        consumer, producer = self._connect("")
        try:
            numbers = consumer.partitions(self._events)
            ends = {p: consumer.bounds(self._events, p)[1] for p in numbers}
            starts = {(self._events, p): self._open(p).next_offset for p in numbers}
            self._log.info("partitions_assigned", added=numbers, owned=numbers)
            consumer.assign(starts)
            while not self._stop and any(self._partitions[p].next_offset < end for p, end in ends.items()):
                self._turn(consumer, producer, ends)
            self._commit(consumer, producer, final=True)
        finally:
            self._leave(consumer, producer)

    def _connect(self, group: str) -> tuple[Consumer, Producer]:
        kafka, log, stop, waiting = self._config.kafka, self._log, self._stop, self._health.turned
        self._identity = identity(  # waits for the broker; names a missing topic
            kafka, self._events, wait_seconds=None, log=log, stop=stop, waiting=waiting
        )
        consumer = Consumer(kafka, client_id=ROLE, group=group, log=log, stop=stop, waiting=waiting)
        return consumer, Producer(kafka, client_id=ROLE, log=log, stop=stop, waiting=waiting)

    def _leave(self, consumer: Consumer, producer: Producer) -> None:
        """Let go of everything. What was not committed is read again by the next owner."""
        self._lost([*self._partitions, *self._coming])
        if self._schedule is not None:
            self._schedule.close(self._drain())
        producer.close()
        consumer.close()

    def _drain(self) -> Deadline:
        """Until when we must have left, counted from when we were told to."""
        if self._deadline is None:
            self._deadline = Deadline(self._clock, self._config.sequence.drain_seconds)
        return self._deadline

    def _turn(self, consumer: Consumer, producer: Producer, ends: Mapping[int, int] | None = None) -> None:
        """Poll, apply, produce; commit when it is time."""
        batches, self._held = self._held, []
        for records in batches or consumer.fetch():
            if ends is not None:
                records = records.between(0, ends[records.partition])
            if partition := self._partitions.get(records.partition):
                if records:
                    span = self._spans.setdefault(records.partition, [records.append_ms[0], 0])
                    span[1] = records.append_ms[-1]
                self._apply(partition, records, producer)
        if ends is None:  # a backfill adds nothing to what it works off
            self._heartbeat(producer)
        if self._clock.monotonic() - self._committed >= self._config.sequence.commit_interval_seconds:
            self._commit(consumer, producer)
        self._health.turned()

    def _apply(self, partition: Partition, records: Records, producer: Producer) -> None:
        """Steps 1 and 2 of one batch: its outputs go to the source's partition number as they come."""
        number = records.partition

        def emit(key: bytes, value: bytes) -> None:
            producer.send(self._examples, value, key=key, partition=number)

        out = partition.apply(records, emit)
        for record, bad in out.dead_letters:
            headers = {"reason": bad.reason, "topic": record.topic, "partition": number, "offset": record.offset}
            producer.send(
                self._letters,
                record.value,
                key=record.key,
                partition=number,
                headers=[(name, str(value).encode()) for name, value in headers.items()],
            )
        meters.applied(out)

    def _commit(self, consumer: Consumer, producer: Producer, *, final: bool = False) -> None:
        """Steps 2 (progress) to 6 for every partition; `final`: whatever the intervals say."""
        now = self._clock.monotonic()
        self._committed = now
        self._tell(producer, final=final)
        if any(p.pending for p in self._partitions.values()):
            self._confirm(producer, consumer)
            for partition in self._partitions.values():  # those that are still ours
                if partition.pending:
                    partition.commit()
            meters.written(self._clock.now_ms(), self._spans.values(), self._clock.monotonic() - now)
            self._spans.clear()
        meters.state(self._events, self._partitions.values())
        self._replay.look(self._partitions)
        if self._schedule is not None and not final:
            self._schedule.turn(self._partitions)
        if final or now - self._synced >= self._config.state.sync_seconds:
            self._synced = now
            for partition in self._partitions.values():
                partition.store.sync()
            meters.disk(self._partitions.values())
            consumer.commit({(self._events, n): p.store.progress.next_offset for n, p in self._partitions.items()})

    def _confirm(self, producer: Producer, consumer: Consumer) -> None:
        """Step 3, for as long as the broker is away (told to stop: for as long as the drain may last).

        The group goes on meanwhile: partitions that it takes from us are let go, or their next owner would wait for us.
        """
        while True:
            seconds = min(CONFIRM_SECONDS, self._drain().remaining()) if self._stop else CONFIRM_SECONDS
            try:
                return producer.confirm(seconds)
            except TryAgain:
                if self._stop and self._drain().passed():
                    raise
                self._health.turned()
                self._held += consumer.fetch(1, 0.0)

    def _tell(self, producer: Producer, *, final: bool) -> None:
        """A progress record for each partition that has moved, once a second."""
        now = self._clock.monotonic()
        for number, partition in self._partitions.items():
            offset, when = self._told.get(number, (-1, -PROGRESS_SECONDS))
            if partition.next_offset == offset or not (final or now - when >= PROGRESS_SECONDS):
                continue
            if progress := partition.progress():
                producer.send(self._examples, wire.encode(progress), partition=number)
                self._told[number] = (partition.next_offset, now)

    def _heartbeat(self, producer: Producer) -> None:
        """Where nobody else does: this moment as a record in each owned partition."""
        every = self._config.sequence.heartbeat_seconds
        if every and self._clock.monotonic() - self._beaten >= every:
            self._beaten = self._clock.monotonic()
            beat = heartbeat(self._clock.now_ms())
            for number in self._partitions:
                producer.send(self._events, beat, partition=number)

    def _assigned(self, added: list[int]) -> None:
        """Partitions have come: they are opened one by one, between two turns, so that the others go on."""
        self._coming |= dict.fromkeys(added, self._clock.monotonic())
        self._log.info("partitions_assigned", added=added, owned=sorted([*self._partitions, *self._coming]))
        self._hold()

    def _open_next(self, consumer: Consumer) -> None:
        """Open one of the partitions that have come, and start reading it where its store is."""
        now = self._clock.monotonic()
        if (number := next((n for n, due in self._coming.items() if due <= now), None)) is None:
            return
        del self._coming[number]
        try:
            partition = self._open(number)
        except TryAgain as error:  # its last owner has not let go yet, or the broker does not answer
            self._coming[number] = self._clock.monotonic() + RETRY_SECONDS
            if now - self._said.get(number, -SAY_AGAIN_SECONDS) >= SAY_AGAIN_SECONDS:
                self._said[number] = now
                self._log.warning("partition_waits", str(error), partition=number)
        else:
            self._said.pop(number, None)
            consumer.start(self._events, number, partition.next_offset)
        self._hold()

    def _open(self, number: int) -> Partition:
        kafka, log = self._config.kafka, self._log
        reader = Consumer(kafka, client_id=f"{ROLE}-opening", log=log, stop=self._stop, waiting=self._health.turned)
        try:
            opened = self._opener.open(number, reader, self._identity)
        finally:
            reader.close()
        partition = self._partitions[number] = opened.partition
        self._replay.opened(number, partition, opened.end)
        if self._schedule is not None:
            self._schedule.opened(number, self._identity.partitions, at_once=opened.changed)
        self._share_cache()
        self._log.info("partition_opened", partition=number, opened_from=opened.source, offset=partition.next_offset)
        return partition

    def _hold(self) -> None:
        """Ready: every partition that is ours is open."""
        why_not = "" if self._partitions else "none assigned yet"
        self._health.hold("partitions", f"opening {sorted(self._coming)}" if self._coming else why_not)

    def _revoked(self, removed: list[int], producer: Producer) -> None:
        """Commit what they have and close them: the next owner goes on from there."""
        leaving = {n: self._partitions[n] for n in removed if n in self._partitions}
        if any(p.pending for p in leaving.values()):
            try:
                producer.confirm(REVOKE_SECONDS)
            except TryAgain:
                self._log.warning("revoked_uncommitted", "outputs are not acknowledged", partitions=sorted(leaving))
            else:
                for partition in leaving.values():
                    partition.commit()
                    partition.store.sync()
        self._lost(removed)

    def _lost(self, removed: list[int]) -> None:
        """Close them and write nothing."""
        self._held = [records for records in self._held if records.partition not in removed]
        for number in removed:
            self._coming.pop(number, None)
        if not (closed := [number for number in removed if number in self._partitions]):
            return
        for number in closed:
            self._partitions.pop(number).store.close()
            self._spans.pop(number, None)
            self._told.pop(number, None)
            if self._schedule is not None:
                self._schedule.closed(number)
        self._share_cache()
        self._hold()
        self._log.info("partitions_closed", removed=closed, owned=sorted(self._partitions))

    def _share_cache(self) -> None:
        for partition in self._partitions.values():
            partition.cache(self._config.sequence.cached_events // len(self._partitions))
