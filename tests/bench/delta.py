"""A delta of many rows from the trainer's table to answers: `make bench-delta`.

A table of a million slots, three quarters full; each turn a hundred thousand random rows change, as a few seconds of
heavy traffic would. What is measured, each turn anew:

    cut         what the training loop waits for: the rows changed since the copy ahead (a twentieth), and the network
    serialise   in the thread beside it: both copies put together, guard, state digest, probe, payload, checksums
    verify      the scorer: chunk checksums, names, dtypes, shapes, finite values
    apply       onto the spare copy, digest and probe, the list of live items, the swap
    rollback    the undo ring, digest and probe, the swap

`apply` and `rollback` end at the swap: from then on requests are answered from the new version; `settle` is what the
installing thread then does to bring the other copy there. Wall and CPU milliseconds: on a busy machine the CPU figures
and the minimum say what the work costs.
"""

import argparse
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from typing import Any, cast

import msgspec
import numpy as np
import torch

from streamgr.clock import SystemClock
from streamgr.config import Config, Model, Table, Telemetry
from streamgr.model.recommender import Recommender
from streamgr.model.table import IdTable
from streamgr.serve.model import LiveWeights
from streamgr.telemetry import Log
from streamgr.train.guard import Guard
from streamgr.train.prequential import Prequential
from streamgr.train.versions import Published, Versions
from streamgr.weights import payload as payloads
from streamgr.weights.manifest import Chunk, Kind, Learned, Manifest, model_digest
from streamgr.weights.payload import Payload
from streamgr.weights.publisher import Facts, Publisher
from streamgr.weights.subscriber import Rollback, Version
from tests.bench.kit import Json, machine, report

NOW = 1_700_000_000_000
FULL = 0.75
ACTIONS = Config().sequence.actions


class Meter:
    """Wall and CPU milliseconds by name, a list of each."""

    def __init__(self) -> None:
        self.wall: dict[str, list[float]] = {}
        self.cpu: dict[str, list[float]] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        wall, cpu = time.perf_counter(), time.thread_time()
        yield
        self.note(name, time.perf_counter() - wall, time.thread_time() - cpu)

    def note(self, name: str, wall: float, cpu: float) -> None:
        self.wall.setdefault(name, []).append(1000 * wall)
        self.cpu.setdefault(name, []).append(1000 * cpu)

    def table(self) -> Json:
        return {
            name: {
                f"{kind}_{what}_ms": round(f(values[name]), 1)
                for kind, values in (("wall", self.wall), ("cpu", self.cpu))
                for what, f in (("min", min), ("median", statistics.median))
            }
            for name in self.wall
        }


class Kept:
    """A publisher without a broker: it does what costs time and keeps what it would send."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.kind: Kind = "snapshot"  # of what is due
        self.version = 0
        self.chunks: list[bytes] = []

    def snapshot_due(self) -> bool:
        return self.kind == "snapshot"

    def publish(self, kind: Kind, payload: Payload, facts: Facts) -> Manifest:
        data, tensors = payloads.encode(payload)
        self.chunks = payloads.split(data, self.config.weights.chunk_bytes)
        chunks = [Chunk(i, len(chunk), sha256(chunk).hexdigest()) for i, chunk in enumerate(self.chunks)]
        self.version += 1
        return Manifest(
            kind=kind,
            epoch=0,
            version=self.version,
            parent=None if kind == "snapshot" else self.version - 1,
            model=facts.model,
            model_digest=model_digest(facts.model),
            step=facts.step,
            targets_learned=0,
            horizon_ms=NOW,
            watermark_ms=NOW,
            positions={},
            published_ms=NOW,
            tensors=tensors,
            chunks=chunks,
            bytes=len(data),
            state_digest=facts.state_digest,
            probe=facts.probe,
        )


class Trainer:
    """A table, a network, and the real way out of a trainer."""

    def __init__(self, config: Config, log: Log, meter: Meter) -> None:
        self.config, self.meter, self.kept = config, meter, Kept(config)
        network = Recommender(config.model, config.sequence.actions, seed=1)
        self.network = network.eval().requires_grad_(False)
        self.table = IdTable(config.table, config.model.dim, seed=1)
        self.model = msgspec.to_builtins({"model": config.model, "table": config.table, "actions": ACTIONS})
        self.prequential = Prequential(ACTIONS, 100, 100.0)
        self.versions = Versions(
            cast(Publisher, self.kept),
            Guard(config.weights, log),
            self.table,
            Recommender(config.model, ACTIONS, seed=2),
            compared_targets=100,
            sync=lambda: None,
            clock=SystemClock(),
        )
        publish = self.versions._publish

        def metered(cut: Any) -> Any:
            with meter(f"{cut.kind}_serialise"):
                return publish(cut)

        self.versions._publish = metered  # type: ignore[method-assign]
        self._random = np.random.default_rng(1)

    def fill(self) -> None:
        keys = self._random.integers(0, 1 << 63, int(FULL * self.config.table.slots), dtype=np.uint64)
        for at in range(0, len(keys), 1 << 16):
            part = keys[at : at + (1 << 16)]
            self.table.map(part, np.full(len(part), NOW), watermark_ms=NOW)
        self.table.weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
        self.table.weight[0] = 0
        self._live = self.table.live(NOW)[0]

    def change(self, rows: int) -> None:
        chosen = self._random.choice(self._live, rows, replace=False)
        self.table.weight[torch.from_numpy(chosen)] += 0.01
        self.table.touch(chosen)
        for parameter in self.network.parameters():
            parameter.mul_(1.0001)

    def publish(self, kind: Kind, late_rows: int) -> tuple[Manifest, list[bytes]]:
        self.kept.kind = kind
        self.versions.copy_ahead(NOW)
        while self.versions.ahead is None:
            self.versions.ended(1.0)
        self.change(late_rows)  # training has gone on
        empty = np.zeros(0, np.int64)
        facts = Facts(
            model=self.model, step=self.kept.version + 1, targets_learned=0, horizon_ms=NOW, watermark_ms=NOW,
            positions={}, learned=Learned(empty, empty, empty, 0), quality={},
        )  # fmt: skip
        with self.meter(f"{kind}_cut"):
            self.versions.cut(self.network.state_dict(), self.prequential, 0.0, facts)
        while (done := self.versions.ended(1.0)) is None:
            pass
        assert isinstance(done, Published), done
        return done.manifest, self.kept.chunks


class Scorer:
    """Verifies and installs; the clock stops at the swap."""

    def __init__(self, log: Log, meter: Meter) -> None:
        self.meter = meter
        self.live = LiveWeights(ACTIONS, SystemClock(), log)
        swap = self.live._swap

        def noted(*args: Any) -> None:
            swap(*args)
            self._swapped = time.perf_counter(), time.thread_time()

        self.live._swap = noted  # type: ignore[method-assign]

    def verify(self, manifest: Manifest, chunks: list[bytes]) -> Version:
        with self.meter(f"{manifest.kind}_verify"):
            for chunk, data in zip(manifest.chunks, chunks, strict=True):
                assert sha256(data).hexdigest() == chunk.sha256
            return Version(manifest, payloads.decode(b"".join(chunks), manifest.tensors, vouched=True), ())

    def install(self, name: str, step: Version | Rollback) -> None:
        wall, cpu = time.perf_counter(), time.thread_time()
        assert self.live.install(step), "refused: see the log"
        done_wall, done_cpu = self._swapped
        self.meter.note(name, done_wall - wall, done_cpu - cpu)
        self.meter.note(f"{name}_settle", time.perf_counter() - done_wall, time.thread_time() - done_cpu)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--slots", type=int, default=1 << 20)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--turns", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(1)
    config = Config(model=Model(dim=args.dim), table=Table(slots=args.slots))
    found: Json = {"machine": machine(), **vars(args)}
    meter = Meter()
    log = Log("bench", Telemetry(log_level="error"), SystemClock())
    trainer, scorer = Trainer(config, log, meter), Scorer(log, meter)
    trainer.fill()
    late = args.rows // 20
    snapshot, chunks = trainer.publish("snapshot", late)
    scorer.install("snapshot_apply", scorer.verify(snapshot, chunks))
    before = snapshot
    for _ in range(args.turns):
        trainer.change(args.rows)
        delta, chunks = trainer.publish("delta", late)
        version = scorer.verify(delta, chunks)
        scorer.install("delta_apply", version)
        scorer.install("rollback", Rollback(before))
        scorer.install("delta_again", version)
        before = delta
    found["times"] = meter.table()
    found["times"].pop("delta_again_settle"), found["times"].pop("delta_again")
    for kind in ("wall", "cpu"):
        both = [a + b for a, b in zip(*(getattr(meter, kind)[f"delta_{n}"] for n in ("verify", "apply")), strict=True)]
        sums = {f"{kind}_min_ms": round(min(both), 1), f"{kind}_median_ms": round(statistics.median(both), 1)}
        found["times"].setdefault("delta_verify_and_apply", {}).update(sums)
    found["bytes"] = {
        "delta": delta.bytes,
        "snapshot": snapshot.bytes,
        "share": round(delta.bytes / snapshot.bytes, 4),
        "delta_rows": delta.tensors["table/rows"].shape[0],
        "snapshot_rows": snapshot.tensors["table/rows"].shape[0],
        "undo_a_version": scorer.live._ring.bytes // len(scorer.live._ring._steps),
    }
    trainer.versions.close()
    report("bench-delta", found)


if __name__ == "__main__":
    main()
