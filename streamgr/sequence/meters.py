"""What the sequencer measures, observed per batch. Names and definitions: the outside contract."""

from collections.abc import Collection, Iterable, Sequence

from streamgr.decoder import REASONS
from streamgr.sequence.partition import Applied, Partition
from streamgr.telemetry import DURATION_BUCKETS, WATERMARK, counter, gauge, histogram

EVENTS = counter("events", "Records taken into sequences (and heartbeats, erasures), by kind.", ("kind",))
DEAD_LETTERS = counter("deadletters", "Records that break the contract, by reason.", ("reason",))
DUPLICATES = counter("duplicates", "Events that were here already and changed nothing.")
LATE = counter("late_events", "Events that came after the label they belong to had closed.")
EXPIRED = counter("expired_events", "Events older than sequence.keep_seconds when they came: not kept.")
EXAMPLES = counter("examples", "Examples emitted.")
TARGETS = counter("targets", "Targets in them.")
OPEN = gauge("open_impressions", "Impressions whose label has not closed.")
TO_SEQUENCE = histogram("event_to_sequence_seconds", "Broker append to written, oldest and newest record of a commit.")
AGE_AT_APPEND = histogram("event_age_at_append_seconds", "Event time to broker append, first and last of a batch.")
DISK = gauge("state_bytes", "What the stores of the partitions take on the disk.")
COMMIT = histogram("commit_duration_seconds", "Outputs confirmed and state written.", buckets=DURATION_BUCKETS)


def prepare(actions: Sequence[str]) -> None:
    """Export every label value from the start: 0 is a value too."""
    for kind in ("profile", "impression", "heartbeat", "erasure", *actions):
        EVENTS.labels(kind)
    for reason in REASONS:
        DEAD_LETTERS.labels(reason)


def applied(out: Applied) -> None:
    """A batch was applied and its outputs sent."""
    for kind, count in out.kinds.items():
        EVENTS.labels(kind).inc(count)
    for _, bad in out.dead_letters:
        DEAD_LETTERS.labels(bad.reason).inc()
    DUPLICATES.inc(out.duplicates)
    LATE.inc(out.late)
    EXPIRED.inc(out.expired)
    EXAMPLES.inc(out.examples)
    TARGETS.inc(out.targets)
    for age_ms in out.ages_ms:
        AGE_AT_APPEND.observe(age_ms / 1000)


def written(now_ms: int, appended_ms: Iterable[Sequence[int]], seconds: float) -> None:
    """A commit is written; `appended_ms` per partition: append times of its oldest and newest record."""
    for span in appended_ms:
        for append_ms in span:
            TO_SEQUENCE.observe(max(0, now_ms - append_ms) / 1000)
    COMMIT.observe(seconds)


def state(topic: str, partitions: Collection[Partition]) -> None:
    """How things stand."""
    OPEN.set(sum(p.open_impressions for p in partitions))
    if marks := [p.watermark for p in partitions if p.watermark is not None]:
        WATERMARK.labels(topic).set(min(marks) / 1000)


def disk(partitions: Collection[Partition]) -> None:
    """What is on the disk, as often as it is synced."""
    DISK.set(sum(p.store.database.size_bytes() for p in partitions))
