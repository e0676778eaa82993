"""A log in memory that can be damaged, and small versions to publish through it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from streamgr.clock import SystemClock
from streamgr.config import Config, Kafka, Telemetry, Weights
from streamgr.errors import BrokerUnreachable, RetentionPassed
from streamgr.events import Record
from streamgr.telemetry import Log
from streamgr.weights.digest import StateDigest, row_hashes
from streamgr.weights.manifest import Learned
from streamgr.weights.payload import Payload
from streamgr.weights.publisher import Facts, Publisher
from streamgr.weights.subscriber import REJECTED, Rollback, Subscriber, Version

WEIGHTS, MANIFESTS = "t.weights", "t.manifests"
MODEL = {"dim": 4, "layers": 2, "actions": ["click", "like"], "table": {"rows": 64, "seed": 1}}


@dataclass
class MemoryLog:
    """Partition 0 of each topic: offset to record; what is missing from the dict was compacted away."""

    records: dict[str, dict[int, Record]] = field(default_factory=lambda: {WEIGHTS: {}, MANIFESTS: {}})
    low: dict[str, int] = field(default_factory=lambda: {WEIGHTS: 0, MANIFESTS: 0})
    end: dict[str, int] = field(default_factory=lambda: {WEIGHTS: 0, MANIFESTS: 0})
    away: bool = False

    def append(self, topic: str, key: bytes | None, value: bytes | None) -> int:
        offset = self.end[topic]
        self.records[topic][offset] = Record(topic, 0, offset, key, value, 0)
        self.end[topic] = offset + 1
        return offset

    def truncate(self, topic: str, low: int) -> None:
        self.low[topic] = max(self.low[topic], low)
        self.records[topic] = {o: r for o, r in self.records[topic].items() if o >= low}

    def compact(self) -> None:
        """What Kafka's cleaner does to the manifests: the newest record of each key stays."""
        newest = {record.key: offset for offset, record in self.records[MANIFESTS].items()}
        self.records[MANIFESTS] = {o: r for o, r in self.records[MANIFESTS].items() if newest[r.key] == o}

    def copy(self) -> "MemoryLog":
        return MemoryLog({t: dict(r) for t, r in self.records.items()}, dict(self.low), dict(self.end))

    def replace(self, topic: str, offset: int, **changes: object) -> None:
        self.records[topic][offset] = self.records[topic][offset]._replace(**changes)


class MemoryConsumer:
    def __init__(self, log: MemoryLog) -> None:
        self._log = log
        self._topic, self._next = "", 0

    def bounds(self, topic: str, partition: int, *, wait_seconds: float | None = None) -> tuple[int, int]:
        if self._log.away:
            raise BrokerUnreachable("away")
        return self._log.low[topic], self._log.end[topic]

    def assign(self, positions: Mapping[tuple[str, int], int]) -> None:
        (((self._topic, partition), self._next),) = positions.items()
        assert partition == 0

    def poll(self, max_records: int = 1000, timeout: float = 0.05) -> list[Record]:
        if self._log.away:
            return []
        if self._next < self._log.low[self._topic]:
            raise RetentionPassed("the log starts later", where=f"{self._topic}[0]@{self._next}")
        records = self._log.records[self._topic]
        found = [records[o] for o in sorted(records) if o >= self._next][:max_records]
        if found:
            self._next = found[-1].offset + 1
        return found

    def close(self) -> None:
        pass


class MemoryProducer:
    def __init__(self, log: MemoryLog) -> None:
        self._log = log
        self.fail_at: int | None = None  # the n-th send from now raises

    def send_all(self, topic: str, records: Iterable[tuple[bytes, bytes]], *, partition: int) -> list[int]:
        return [self.send_confirmed(topic, value, key=key, partition=partition) for key, value in records]

    def send_confirmed(self, topic: str, value: bytes | None, *, key: bytes | None = None, partition: int) -> int:
        assert partition == 0
        if self.fail_at is not None:
            self.fail_at -= 1
            if self.fail_at < 0:
                self.fail_at = None
                raise BrokerUnreachable("the producer broke")
        return self._log.append(topic, key, value)


def config(**weights: int) -> Config:
    return Config(kafka=Kafka(topic_prefix="t"), weights=Weights(**{"chunk_bytes": 400} | weights))


def quiet() -> Log:
    return Log("test", Telemetry(log_level="error"), SystemClock())


def publisher(log: MemoryLog, **weights: int) -> tuple[Publisher, MemoryProducer]:
    producer = MemoryProducer(log)
    made = Publisher(config(**weights), SystemClock(), quiet(), producer, lambda: MemoryConsumer(log))
    return made, producer


def subscriber(log: MemoryLog) -> Subscriber:
    return Subscriber(config(), SystemClock(), quiet(), lambda: MemoryConsumer(log))


def facts(version: int = 0, model: dict | None = None) -> Facts:
    times = np.arange(version, dtype=np.int64) + 1_000_000
    return Facts(
        model=model or MODEL,
        step=version,
        targets_learned=10 * version,
        horizon_ms=1_000 + version,
        watermark_ms=900 + version,
        positions={"t.examples": {0: version, 3: 7}},
        learned=Learned(times, times + 5, times + 9, version),
        quality={"normalized_entropy": 0.9, "auc": None},
    )


class World:
    """A trainer's table and network that change step by step, and what each version must look like."""

    ROWS = 300

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        self.digest = StateDigest(self.ROWS)  # of what was published
        self.dense = {"w": torch.zeros(3, 2), "b": torch.zeros(2)}
        # Rows that never change, so that a snapshot outweighs some deltas.
        self.table: dict[int, tuple[int, int, list[float]]] = {r: (r, 5, [0.0] * 4) for r in range(100, self.ROWS)}

    def step(self) -> Payload:
        """Change everything dense and some rows; the delta of it."""
        for name, tensor in self.dense.items():
            self.dense[name] = tensor + torch.from_numpy(self._random.normal(size=tuple(tensor.shape))).float()
        rows = sorted(self._random.choice(40, size=int(self._random.integers(0, 8)), replace=False).tolist())
        for row in rows:
            key = int(self._random.integers(1, 1 << 60))
            weight = torch.from_numpy(self._random.normal(size=4)).bfloat16().tolist()
            self.table[row] = (key, int(self._random.integers(0, 1 << 40)), weight)
        return self._payload(rows)

    def snapshot(self) -> Payload:
        return self._payload(sorted(self.table))

    def state(self) -> "State":
        state = State()
        state.apply_payload("snapshot", self.snapshot())
        return state

    def _payload(self, rows: list[int]) -> Payload:
        held = [self.table[row] for row in rows]
        return {f"dense/{name}": tensor.clone() for name, tensor in self.dense.items()} | {
            "table/rows": torch.tensor(rows, dtype=torch.int64),
            "table/keys": torch.tensor([key for key, _, _ in held], dtype=torch.int64),
            "table/until_ms": torch.tensor([until for _, until, _ in held], dtype=torch.int64),
            "table/field": torch.zeros(len(rows), dtype=torch.uint8),
            "table/weight": torch.tensor([w for _, _, w in held]).reshape(len(rows), 4).bfloat16(),
        }


class State:
    """What a scorer holds: the plain way to apply snapshots and deltas."""

    def __init__(self) -> None:
        self.dense: dict[str, list[float]] = {}
        self.table: dict[int, tuple[int, int, tuple[float, ...]]] = {}

    def apply(self, version: Version) -> None:
        self.apply_payload("snapshot" if version.whole else "delta", version.payload)

    def apply_payload(self, kind: str, payload: Payload) -> None:
        self.dense = {n: t.flatten().tolist() for n, t in payload.items() if n.startswith("dense/")}
        if kind == "snapshot":
            self.table = {}
        columns = (payload[f"table/{name}"].tolist() for name in ("rows", "keys", "until_ms", "weight"))
        for row, key, until, weight in zip(*columns, strict=True):
            self.table[row] = (key, until, tuple(weight))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, State) and (self.dense, self.table) == (other.dense, other.table)

    __hash__ = None  # type: ignore[assignment]


def publish(made: Publisher, world: World, model: dict | None = None) -> tuple[int, State]:
    """One more version of the world, as due; its number and the state it must give."""
    delta = world.step()
    due = made.snapshot_due()
    snapshot, payload = (True, world.snapshot()) if due else (False, delta)
    if snapshot:
        world.digest.clear(world.ROWS)
    part = {name.removeprefix("table/"): column for name, column in payload.items() if name.startswith("table/")}
    world.digest.replace(part["rows"].numpy(), row_hashes(part))
    known = replace(facts(made._version + 1, model), state_digest=world.digest.text)
    manifest = made.publish("snapshot" if snapshot else "delta", payload, known)
    return manifest.version, world.state()


def drain(reader: Subscriber) -> list[Version]:
    """All that comes until two looks in a row bring nothing (one look may go into beginning again)."""
    versions: list[Version] = []
    idle = 0
    while idle < 2:
        version = reader.poll(0)
        assert not isinstance(version, Rollback), "nobody here can undo anything"
        idle = 0 if version else idle + 1
        versions += [version] if version else []
        assert len(versions) < 1_000, "the reader goes round in circles"
    return versions


def rejected() -> dict[str, float]:
    """Refusals so far by reason."""
    return {s.labels["reason"]: s.value for m in REJECTED.collect() for s in m.samples if s.name.endswith("_total")}


def rejected_since(before: dict[str, float]) -> dict[str, int]:
    return {r: int(n - before.get(r, 0)) for r, n in rejected().items() if n != before.get(r, 0)}
