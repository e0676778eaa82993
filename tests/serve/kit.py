"""A small trainer's output without a trainer, sequences without a broker, and the app over both."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
import torch
from fastapi import FastAPI

from streamgr.clock import ManualClock
from streamgr.config import Config, Model, Scorer, Sequence, Table, Telemetry
from streamgr.events import IMPRESSION, History, item_key, request_key
from streamgr.model import probe
from streamgr.model.recommender import Recommender
from streamgr.model.table import ITEM, IdTable
from streamgr.serve.http import Desk, create_app
from streamgr.serve.model import LiveWeights
from streamgr.serve.ranker import Ranker
from streamgr.serve.wire import SequencePart
from streamgr.telemetry import Health, Log
from streamgr.weights.digest import StateDigest, row_hashes
from streamgr.weights.manifest import Learned, Manifest, Probe, model_digest
from streamgr.weights.payload import Payload
from streamgr.weights.subscriber import Version

NOW = 1_700_000_000_000
ACTIONS = ("click", "like")
WINDOW_MS = 600_000


def settings(**scorer: Any) -> Config:
    return Config(
        model=Model(dim=16, layers=2, heads=2),
        table=Table(slots=1024, bucket_width=32, fallback_rows=16, ttl_seconds=3600.0),
        sequence=Sequence(actions=ACTIONS, history_length=64),
        scorer=Scorer(**scorer),
        telemetry=Telemetry(log_level="error"),
    )


@dataclass
class Weights:
    """What a trainer owns, and the versions it publishes."""

    config: Config
    seed: int = 1
    version: int = 0
    model: Recommender = field(init=False)
    table: IdTable = field(init=False)
    digest: StateDigest = field(init=False)

    def __post_init__(self) -> None:
        self.model = Recommender(self.config.model, ACTIONS, self.seed, WINDOW_MS)
        self.table = IdTable(self.config.table, self.config.model.dim, self.seed)
        self.digest = StateDigest(len(self.table.weight))

    def learn(self, items: list[str]) -> np.ndarray:
        """Admit these items and change their rows; the rows."""
        keys = np.array([item_key(i) for i in items], np.uint64)
        rows = self.table.map(keys, np.full(len(keys), NOW - 1000), watermark_ms=NOW - 500).rows_a
        self.change(rows)
        return rows

    def change(self, rows: np.ndarray) -> None:
        """What a step of training does to these rows and to the network."""
        generator = torch.Generator().manual_seed(self.seed + self.version)
        self.table.weight[torch.from_numpy(rows)] = torch.randn(len(rows), self.config.model.dim, generator=generator)
        self.table.touch(rows)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)

    def publish(self, rows: np.ndarray | None = None, **changed: Any) -> Version:
        """A snapshot, or the delta of these rows."""
        kind = "snapshot" if rows is None else "delta"
        watermark = changed.get("watermark_ms", NOW - 500)
        used = self.table.snapshot_rows(watermark) if rows is None else rows
        part = self.table.rows(np.unique(used))
        payload: Payload = {f"dense/{n}": t.detach().clone() for n, t in self.model.state_dict().items()}
        payload |= {f"table/{n}": t for n, t in part.items()}
        if rows is None:
            self.digest.clear(len(self.table.weight))
        self.digest.replace(part["rows"].numpy(), row_hashes(part))
        self.version += 1
        model = {
            "model": msgspec.to_builtins(self.config.model),
            "table": msgspec.to_builtins(self.table.geometry),
            "actions": list(ACTIONS),
            "window_ms": WINDOW_MS,
        }
        facts: dict[str, Any] = {
            "kind": kind, "epoch": 1, "version": self.version, "parent": None if rows is None else self.version - 1,
            "model": model, "model_digest": model_digest(model), "step": 1, "targets_learned": 1,
            "horizon_ms": NOW - 5000, "watermark_ms": NOW - 500, "positions": {}, "published_ms": NOW,
            "tensors": {}, "chunks": [], "bytes": 0,
            "state_digest": self.digest.text, "probe": self.probe(watermark),
        }  # fmt: skip
        manifest = Manifest(**facts | changed)
        return Version(manifest, payload, (manifest,))

    def probe(self, watermark: int) -> Probe:
        """A question about these weights, and their answer."""
        keys = probe.pick(self.table.live(watermark, ITEM)[1], self.version)
        vectors = self.table.vectors(self.table.lookup(keys, watermark_ms=watermark))
        return Probe(keys.tolist(), probe.ask(self.model, vectors).tolist())


def learned(*rows: tuple[int, int, int]) -> Any:
    columns = np.array(rows, np.int64).reshape(-1, 3).T
    return Learned(columns[0], columns[1], columns[2], len(rows)).pack()


@dataclass
class FakeSequences:
    """Histories in memory, with the follower's reading rules."""

    users: dict[str, list[tuple[int, str, int, str]]] = field(default_factory=dict)  # (kind, item, time, request)
    unnamed: set[str] = field(default_factory=set)

    def history(self, user: str, at_ms: int, limit: int) -> History:
        rows = [r for r in self.users.get(user, []) if r[2] < at_ms][-limit:]
        return History(
            np.array([r[0] for r in rows], np.uint8),
            np.array([item_key(r[1]) for r in rows], np.uint64),
            np.array([r[2] for r in rows], np.int64),
            np.array([request_key(r[3]) for r in rows], np.uint64),
        )

    def item_text(self, key: int) -> str | None:
        known = {f"i{n}" for n in range(200)} - self.unnamed
        return next((text for text in known if item_key(text) == key), None)

    def newest_event_ms(self) -> int:
        return max(r[2] for rows in self.users.values() for r in rows)

    def age_seconds(self) -> float:
        return 0.0

    def sequence(self, user: str, part: SequencePart) -> dict[str, Any]:
        shown = [{"item_id": r[1], "event_time": r[2]} for r in self.users.get(user, []) if r[2] >= part.since]
        return {"user_id": user, "events": shown}


def log_and_clock() -> tuple[Log, ManualClock]:
    clock = ManualClock(NOW)
    return Log("scorer", Telemetry(log_level="error"), clock), clock


@dataclass
class Service:
    """The scorer without Kafka."""

    config: Config
    sequences: FakeSequences = field(default_factory=FakeSequences)

    def __post_init__(self) -> None:
        self.log, self.clock = log_and_clock()
        self.live = LiveWeights(self.config.sequence.actions, self.clock, self.log, self.config.scorer)
        self.ranker = Ranker(self.config, self.clock, self.live, self.sequences)
        self.health = Health("scorer", self.clock, "weights")
        self.pool = ThreadPoolExecutor(self.config.scorer.threads)

    def app(self, **replaced: Any) -> FastAPI:
        parts: dict[str, Any] = {
            "rank": self.ranker.rank, "retrieve": self.ranker.retrieve, "sequence": self.sequences.sequence,
            "desk": Desk(self.pool, self.config.scorer.threads, self.config.scorer.max_queue),
            "health": self.health, "clock": self.clock, "log": self.log,
        }  # fmt: skip
        return create_app(**parts | replaced)


def some_events(n: int, before: int = NOW) -> list[tuple[int, str, int, str]]:
    """n events of one user: requests of three impressions, each followed by a click."""
    rows: list[tuple[int, str, int, str]] = []
    time = before - 10_000 * n
    while len(rows) < n:
        request = f"r{len(rows)}"
        rows += [(IMPRESSION, f"i{(len(rows) * 7 + j) % 40}", time, request) for j in range(3)]
        rows.append((IMPRESSION + 1, rows[-1][1], time + 500, request))
        time += 10_000
    return rows[:n]
