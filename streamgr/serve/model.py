"""The served weights: two copies, of which requests read one while the other takes the next version.

Every answer comes from exactly one version, and a new version costs what its delta costs, not what the table costs:

1. the spare copy, which nobody reads, takes the version;
2. one reference assignment makes it the live one: requests that begin from now on read it;
3. the copy that was live waits for its last reader, takes the same version, and is the spare.

A snapshot, which may come with another architecture, is built into new copies instead. Whatever does not fit is
refused by name before a byte is written; the live weights then stay, and every later delta is refused until the next
snapshot, because a gap is never guessed over. One thread installs; any number read.
"""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from streamgr.clock import Clock
from streamgr.config import Model, Table
from streamgr.errors import DataError
from streamgr.events import item_key
from streamgr.model.recommender import Recommender
from streamgr.model.table import IdTable
from streamgr.telemetry import DURATION_BUCKETS, HORIZON, Log, histogram
from streamgr.weights.manifest import Learned, Manifest, Reason, Rejected
from streamgr.weights.payload import Payload
from streamgr.weights.subscriber import REJECTED, Version

EVENT_TO_SERVING = histogram("event_to_serving_seconds", "From a learned target's append to the swap that serves it.")
LABEL_TO_SERVING = histogram("label_to_serving_seconds", "From the record that closed the label to the swap.")
GRADIENT_TO_SERVING = histogram("gradient_to_serving_seconds", "From the gradient step to the swap.")
SWAP = histogram("weights_swap_duration_seconds", "Building and swapping in a version.", (), DURATION_BUCKETS)


class Architecture(msgspec.Struct, frozen=True):
    """`Manifest.model`: what the weights belong to."""

    model: Model
    table: Table
    actions: tuple[str, ...]


class Copy:
    """One copy of network and table, written only while nobody reads it.

    `inverse_norms` f32[R] follows the table's rows, for retrieval. `readers` belongs to `LiveWeights`.
    """

    def __init__(self, architecture: Architecture) -> None:
        self.recommender = Recommender(architecture.model, architecture.actions, seed=0).eval().requires_grad_(False)
        self.table = IdTable(architecture.table, architecture.model.dim, seed=0)
        self.inverse_norms = torch.zeros(len(self.table.weight))
        self.readers = 0

    def check(self, payload: Payload, *, whole: bool) -> None:
        """Raises `Rejected` unless the payload's tensors are this copy's; `whole`: a snapshot names every one."""
        mine = {f"dense/{name}": tensor for name, tensor in self.recommender.state_dict().items()}
        theirs = {name: tensor for name, tensor in payload.items() if name.startswith("dense/")}
        odd = mine.keys() ^ theirs.keys() if whole else theirs.keys() - mine.keys()
        odd |= {name for name in mine.keys() & theirs.keys() if mine[name].shape != theirs[name].shape}
        if odd:
            raise Rejected("shape", f"not this model's tensors: {', '.join(sorted(odd)[:5])}")
        if whole and "table/rows" not in payload:
            raise Rejected("schema", "a snapshot without a table")

    def take(self, payload: Payload) -> None:
        """Replace what a checked payload names. Raises `DataError`, before any change, for rows of another table."""
        with torch.inference_mode():
            if "table/rows" in payload:
                self.table.put_rows({name.removeprefix("table/"): t for name, t in _table(payload).items()})
                rows = payload["table/rows"]
                norms = torch.linalg.vector_norm(self.table.weight.index_select(0, rows), dim=1)
                self.inverse_norms[rows] = 1.0 / norms.clamp_min(1e-12)
            own = self.recommender.state_dict()
            for name, tensor in payload.items():
                if name.startswith("dense/"):
                    own[name.removeprefix("dense/")].copy_(tensor)


@dataclass(frozen=True, slots=True)
class Served:
    """One version as requests see it. rows i64[k] and keys u64[k]: the live items, rows ascending."""

    manifest: Manifest
    architecture: Architecture
    copy: Copy
    rows: torch.Tensor
    keys: NDArray[np.uint64]

    @property
    def actions(self) -> tuple[str, ...]:
        return self.architecture.actions

    def age_seconds(self, now_ms: int) -> float:
        """How old what these weights know is: now - horizon."""
        return max(0.0, (now_ms - self.manifest.horizon_ms) / 1000)

    def vectors(self, keys: NDArray[np.uint64]) -> tuple[torch.Tensor, NDArray[np.bool_]]:
        """f32[n, D] for keys u64[n], and which of them have no slot and are answered by the shared rows."""
        lookup = self.copy.table.lookup(keys, watermark_ms=self.manifest.watermark_ms)
        return self.copy.table.vectors(lookup), lookup.rows_a < self.copy.table.first_slot


class NoWeights(Exception):
    """No version has arrived yet."""


class LiveWeights:
    """Owns the copies. `install` belongs to one thread; `lease` to everybody."""

    def __init__(self, actions: tuple[str, ...], clock: Clock, log: Log) -> None:
        self._actions, self._clock, self._log = actions, clock, log
        self._free = threading.Condition()
        self._live: Served | None = None
        self._spare: Copy | None = None

    @property
    def version(self) -> int | None:
        """The version served now."""
        live = self._live
        return live.manifest.version if live else None

    @contextmanager
    def lease(self) -> Iterator[Served]:
        """The live version, which stays as it is until given back. Raises `NoWeights` before the first."""
        with self._free:
            served = self._live
            if served is None:
                raise NoWeights
            served.copy.readers += 1
        try:
            yield served
        finally:
            with self._free:
                served.copy.readers -= 1
                self._free.notify_all()

    def install(self, version: Version) -> bool:
        """Serve this version from now on; false where it was refused (counted, and what is served stays)."""
        try:
            self._install(version)
        except Rejected as rejected:
            manifest = version.manifest
            REJECTED.labels(rejected.reason).inc()
            self._log.error(
                "weights_refused", str(rejected), reason=rejected.reason, version=manifest.version, serving=self.version
            )
            return False
        return True

    def _install(self, version: Version) -> None:
        started = self._clock.monotonic()
        manifest, payload = version.manifest, version.payload
        architecture = self._fitting(manifest)
        old = self._live
        copy = self._copy_for(manifest, architecture)
        copy.check(payload, whole=manifest.kind == "snapshot")
        self._spare = None  # taken, or superseded
        _take(copy, payload, manifest)
        rows, keys = copy.table.live(manifest.watermark_ms)
        self._live = Served(manifest, architecture, copy, torch.from_numpy(rows), keys)
        self._observe(version, started)
        if manifest.kind == "snapshot":
            self._spare = Copy(architecture)
        elif old is not None:
            with self._free:
                self._free.wait_for(lambda: not old.copy.readers)
            self._spare = old.copy
        if self._spare is not None:
            _take(self._spare, payload, manifest)

    def _fitting(self, manifest: Manifest) -> Architecture:
        """The architecture of a version that may follow what is served; raises `Rejected`."""
        live = self._live
        if live is not None and manifest.order <= live.manifest.order:
            reason: Reason = "gap" if manifest.epoch == live.manifest.epoch else "epoch"
            raise Rejected(reason, f"is not newer than {live.manifest.name()}", where=manifest.name())
        if manifest.kind == "delta" and live is not None and manifest.model_digest == live.manifest.model_digest:
            if (manifest.epoch, manifest.parent) != (live.manifest.epoch, live.manifest.version):
                raise Rejected(
                    "gap", f"builds on version {manifest.parent}, we serve {self.version}", where=manifest.name()
                )
            return live.architecture
        if manifest.kind == "delta":
            raise Rejected("gap", "a delta of a model that we do not serve", where=manifest.name())
        try:
            architecture = msgspec.convert(manifest.model, Architecture)
        except msgspec.ValidationError as error:
            raise Rejected("schema", f"cannot build its model: {error}", where=manifest.name()) from None
        if architecture.actions != self._actions:
            raise Rejected(
                "schema",
                f"trained on the actions {architecture.actions}, our `sequence.actions` are {self._actions}",
                where=manifest.name(),
            )
        return architecture

    def _copy_for(self, manifest: Manifest, architecture: Architecture) -> Copy:
        """A copy that nobody reads, at the state that the version builds on."""
        if manifest.kind == "snapshot":
            return Copy(architecture)
        if self._spare is None:
            raise Rejected("gap", "the version before it was refused", where=manifest.name())
        return self._spare

    def _observe(self, version: Version, started: float) -> None:
        """What the swap has made fresh; one observation a learned target."""
        manifest, now = version.manifest, self._clock.now_ms()
        SWAP.observe(self._clock.monotonic() - started)
        HORIZON.labels("scorer").set(manifest.horizon_ms / 1000)
        targets = 0
        for covered in version.covers:
            learned = Learned.unpack(covered.learned)
            targets += learned.total
            for metric, column in (
                (EVENT_TO_SERVING, learned.target_append_ms),
                (LABEL_TO_SERVING, learned.closing_append_ms),
                (GRADIENT_TO_SERVING, learned.gradient_ms),
            ):
                for seconds in np.maximum(0.0, (now - column) / 1000).tolist():
                    metric.observe(seconds)
        self._log.info(
            "weights_swapped",
            version=manifest.version,
            kind=manifest.kind,
            targets=targets,
            age_seconds=(now - manifest.horizon_ms) / 1000,
            duration_s=round(self._clock.monotonic() - started, 4),
        )


def _table(payload: Payload) -> Mapping[str, torch.Tensor]:
    return {name: tensor for name, tensor in payload.items() if name.startswith("table/")}


def _take(copy: Copy, payload: Payload, manifest: Manifest) -> None:
    try:
        copy.take(payload)
    except DataError as error:
        raise Rejected("shape", error.what, where=manifest.name()) from None


def item_keys(texts: list[str]) -> NDArray[np.uint64]:
    """The keys u64[n] of item ids."""
    return np.fromiter(map(item_key, texts), np.uint64, len(texts))
