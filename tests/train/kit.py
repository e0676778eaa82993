"""Examples made by hand, a source of records and a publisher in memory, and a small trainer on them."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from streamgr.clock import ManualClock
from streamgr.config import Config, Kafka, Model, Sequence, State, Table, Telemetry, Trainer
from streamgr.events import IMPRESSION, History, Record, item_key
from streamgr.sequence.examples import BEFORE_ALL, Example, Position, Progress, encode
from streamgr.service import Stop
from streamgr.telemetry import Health, Log
from streamgr.train import trainer
from streamgr.train.lane import LaneState
from streamgr.train.reader import ExamplesReader
from streamgr.weights.manifest import Manifest, model_digest
from streamgr.weights.payload import Payload
from streamgr.weights.publisher import Claim, Facts

TOPIC = "streamgr.examples"


def history(events: Iterable[tuple[int, str, int, int]]) -> History:
    """Events as (kind, item, time, request key), oldest first."""
    kinds, items, times, requests = zip(*events, strict=True)
    return History(
        np.array(kinds, np.uint8),
        np.array([item_key(i) for i in items], np.uint64),
        np.array(times, np.int64),
        np.array(requests, np.uint64),
    )


def example(
    position: Position,
    prev: Position = BEFORE_ALL,
    *,
    events: Iterable[tuple[int, str, int, int]] = ((IMPRESSION, "a", 1000, 0),),
    targets: Iterable[int] = (0,),
    labels: Iterable[int] = (0,),
    watermark: int = 2000,
    append_ms: int | None = None,
    user: str = "u",
    fingerprint: str = "f" * 16,
) -> Example:
    targets, events = list(targets), list(events)
    appended = 10_000 + position[0] if append_ms is None else append_ms
    return Example(
        fingerprint,
        position,
        prev,
        user,
        watermark,
        appended,
        history(events),
        np.array(targets, np.int64),
        np.array(list(labels), np.uint32),
        np.full(len(targets), appended - 100, np.int64),
        [events[t][1] for t in targets],
        [f"{user}-{position[0]}-{position[1]}-{t}" for t in targets],
    )


def progress(offset: int, watermark: int = 0, append_ms: int = 0, fingerprint: str = "f" * 16) -> Progress:
    return Progress(1, fingerprint, offset, watermark, append_ms)


class MemorySource:
    """Partitions as lists of values; hands out `chunk` records a poll, from the partitions in turn."""

    def __init__(self, logs: list[list[bytes]], chunk: int = 7, events: Mapping[int, int] | None = None) -> None:
        self.logs, self.chunk, self.events = logs, chunk, events or {}
        self.positions: dict[int, int] = {}
        self.paused: set[int] = set()
        self.committed: dict[tuple[str, int], int] = {}
        self.turns = 0

    def partitions(self, topic: str) -> list[int]:
        return list(range(len(self.logs)))

    def bounds(self, topic: str, partition: int) -> tuple[int, int]:
        return 0, len(self.logs[partition]) if topic == TOPIC else self.events.get(partition, 0)

    def assign(self, positions: Mapping[tuple[str, int], int]) -> None:
        self.positions = {p: offset for (_, p), offset in positions.items()}

    def poll(self, max_records: int = 1000, timeout: float = 0.05) -> list[Record]:
        found: list[Record] = []
        for shift in range(len(self.logs)):
            p = (self.turns + shift) % len(self.logs)
            at = self.positions[p]
            if p not in self.paused:
                part = self.logs[p][at : at + self.chunk - len(found)]
                found += [Record(TOPIC, p, at + i, None, value, 0) for i, value in enumerate(part)]
                self.positions[p] += len(part)
        self.turns += 1
        return found

    def pause(self, topic: str, partitions: Iterable[int]) -> None:
        self.paused |= set(partitions)

    def resume(self, topic: str, partitions: Iterable[int]) -> None:
        self.paused -= set(partitions)

    def commit(self, positions: Mapping[tuple[str, int], int]) -> None:
        self.committed |= positions

    def close(self) -> None: ...


class MemoryPublisher:
    """Keeps what was published; a snapshot first, then deltas."""

    def __init__(self) -> None:
        self.versions: list[tuple[Manifest, Payload]] = []
        self.claims: list[int] = []
        self.fence: Exception | None = None
        self._fresh = True

    def claim(self, at_least: int = 0) -> Claim:
        self.claims.append(at_least)
        self._fresh = True
        last = self.versions[-1][0].step if self.versions else 0
        return Claim(len(self.claims), max([at_least, *(m.version for m, _ in self.versions)]), last)

    def snapshot_due(self) -> bool:
        return self._fresh

    def publish(self, kind: str, payload: Payload, facts: Facts) -> Manifest:
        if self.fence:
            raise self.fence
        version = 1 + max([0, *(m.version for m, _ in self.versions)])
        manifest = Manifest(
            kind=kind,
            epoch=len(self.claims),
            version=version,
            parent=None if kind == "snapshot" else version - 1,
            model=facts.model,
            model_digest=model_digest(facts.model),
            step=facts.step,
            targets_learned=facts.targets_learned,
            horizon_ms=facts.horizon_ms,
            watermark_ms=facts.watermark_ms,
            positions={t: dict(p) for t, p in facts.positions.items()},
            published_ms=0,
            tensors={},
            chunks=[],
            bytes=0,
            quality=dict(facts.quality),
            learned=facts.learned.pack(),
            state_digest=facts.state_digest,
            probe=facts.probe,
        )
        self.versions.append((manifest, {name: tensor.clone() for name, tensor in payload.items()}))
        self._fresh = False
        return manifest

    def close(self) -> None: ...


def settings(directory: Path, **changes: object) -> Config:
    return Config(
        kafka=Kafka(),
        state=State(directory=str(directory)),
        sequence=Sequence(history_length=32),
        model=Model(dim=8, layers=1, heads=2, position_buckets=64, time_buckets=16, negatives=8),
        table=Table(slots=64, bucket_width=8, fallback_rows=16, ttl_seconds=1e6),
        trainer=Trainer(
            **{"threads": 1, "batch_tokens": 64, "publish_seconds": 1.0, "checkpoint_seconds": 1e9} | changes
        ),
        telemetry=Telemetry(log_level="error"),
    )


def build(config: Config, source: MemorySource, publisher: MemoryPublisher | None = None) -> trainer.Trainer:
    clock = ManualClock(1_000_000)
    return trainer.Trainer(
        config,
        clock,
        Log("trainer", config.telemetry, clock),
        Health("trainer", clock),
        Stop(),
        source=source,
        publisher=publisher or MemoryPublisher(),
    )


def reader(source: MemorySource, states: Mapping[int, LaneState] | None = None, **changes: object) -> ExamplesReader:
    options = {"clock": ManualClock(), "batch_tokens": 8, "max_skew_ms": 10_000} | changes
    return ExamplesReader(source, TOPIC, states or {}, **options)


def stream(partitions: int, examples: int, seed: int = 0, items: int = 30) -> list[list[bytes]]:
    """A log of examples a partition: requests of 3 items, some clicked, with histories that grow; a like is organic."""
    rng = np.random.default_rng(seed)
    logs: list[list[bytes]] = []
    for partition in range(partitions):
        log, prev, past = [], BEFORE_ALL, []
        for n in range(examples):
            now = 1_000_000 + 10_000 * n + int(rng.integers(5_000))
            shown = [(IMPRESSION, f"i{rng.integers(items)}", now, n + 1) for _ in range(3)]
            labels = [int(rng.random() < 0.3) for _ in shown]
            events = [*past, *shown][-24:]
            targets = list(range(len(events) - 3, len(events)))
            if n % 5 == 4:
                events.append((3, f"i{rng.integers(items)}", now + 50, 0))
                targets.append(len(events) - 1)
                labels.append(0)
            position = (10 * n, 0)
            log.append(
                encode(
                    example(
                        position,
                        prev,
                        events=events,
                        targets=targets,
                        labels=labels,
                        watermark=now + 5_000,
                        user=f"p{partition}",
                    )
                )
            )
            if n % 4 == 0:
                log.append(encode(progress(10 * n + 5, now + 5_000, 10_000 + 10 * n + 5)))
            prev = position
            past = [
                *events,
                *((2, item, now + 100, 0) for (_, item, _, _), on in zip(shown, labels, strict=False) if on),
            ]
        logs.append(log)
    return logs
