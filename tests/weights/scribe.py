"""Real versions on a log, written as the format says, by hand: what a damaged or lying publisher could write too.

`Scribe` writes the versions that `tests.serve.kit.Weights` makes (a real table, network, digest and probe) through
anything with `send_confirmed`: a log in memory, or a producer on a broker.
"""

from hashlib import sha256
from typing import Any, Protocol

import msgspec
import numpy as np

from streamgr.config import Config
from streamgr.events import item_key
from streamgr.weights import payload as payloads
from streamgr.weights.manifest import (
    CLAIM_KEY,
    PIN_KEY,
    Chunk,
    ClaimRecord,
    Manifest,
    PinRecord,
    chunk_key,
    encode,
    manifest_key,
)
from streamgr.weights.subscriber import Version
from tests.serve.kit import Weights


class Sends(Protocol):
    def send_confirmed(self, topic: str, value: bytes | None, *, key: bytes | None = None, partition: int) -> int: ...


class Scribe:
    def __init__(self, config: Config, to: Sends) -> None:
        self._to, self._chunk_bytes = to, config.weights.chunk_bytes
        self._weights, self._manifests = config.topic("weights"), config.topic("manifests")
        self.epoch = -1

    def claim(self, last_version: int = 0) -> int:
        record = encode(ClaimRecord(1, last_version))
        self.epoch = self._to.send_confirmed(self._manifests, record, key=CLAIM_KEY, partition=0)
        return self.epoch

    def write(self, version: Version, **changed: Any) -> Manifest:
        """Chunks, then the manifest; `changed`: what the manifest says instead of the truth."""
        data, tensors = payloads.encode(version.payload)
        number, chunks = version.manifest.version, []
        for i, part in enumerate(payloads.split(data, self._chunk_bytes)):
            key = chunk_key(self.epoch, number, i)
            offset = self._to.send_confirmed(self._weights, part, key=key, partition=0)
            chunks.append(Chunk(offset, len(part), sha256(part).hexdigest()))
        told: dict[str, Any] = {"epoch": self.epoch, "tensors": tensors, "chunks": chunks, "bytes": len(data)}
        manifest = msgspec.structs.replace(version.manifest, **told | changed)
        self._to.send_confirmed(self._manifests, encode(manifest), key=manifest_key(manifest.version), partition=0)
        return manifest

    def pin(self, manifest: Manifest | None) -> int:
        """Hold scorers at a version, or let them go."""
        record = encode(PinRecord(manifest.epoch, manifest.version, 1)) if manifest else None
        return self._to.send_confirmed(self._manifests, record, key=PIN_KEY, partition=0)


class Churn:
    """A trainer whose small table is always in need of room: each step admits, evicts and lets expire."""

    def __init__(self, weights: Weights, life_ms: int, start_ms: int, seed: int = 1) -> None:
        self.weights, self._life, self.now = weights, life_ms, start_ms
        self._random, self._since, self._named = np.random.default_rng(seed), weights.table.mark(), 0

    def step(self) -> None:
        """A crowd or a handful of tokens in turn, half of them of items never seen before; time passes."""
        table, rng, pace = self.weights.table, self._random, self._life // 3
        count = 8 if self.weights.version % 2 else len(table.index)
        self.now += pace
        ids = np.where(rng.random(count) < 0.5, rng.integers(0, self._named + 1, count), self._named + np.arange(count))
        self._named += count
        keys = np.array([item_key(f"n{n}") for n in ids], np.uint64)
        times, fields = self.now - rng.integers(0, pace, count), rng.integers(0, 3, count).astype(np.uint8)
        self.weights.change(table.map(keys, times, fields, watermark_ms=self.now).rows_a)

    def publish(self, kind: str) -> Version:
        rows = self.weights.table.changed_since(self._since) if kind == "delta" else None
        self._since = self.weights.table.mark()
        return self.weights.publish(rows, watermark_ms=self.now)
