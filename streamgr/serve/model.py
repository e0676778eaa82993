"""The served weights: two copies, of which requests read one while the other takes the next version.

Every answer comes from exactly one version, and a new version costs what its delta costs, not what the table costs:

1. the spare copy, which nobody reads, takes the version;
2. it must now be what the trainer had: state digest and probe, else it is put back and the version refused;
3. one reference assignment makes it the live one: requests that begin from now on read it;
4. the copy that was live waits for its last reader, takes the same version, and is the spare.

A snapshot, which may come with another architecture, is built into new copies instead. Going back is the same dance:
the spare undoes versions (`undo`), must be what that version was, and becomes the live one.

Whatever does not fit is refused by name and the live weights stay; every later delta is then refused until the next
snapshot, because a gap is never guessed over. One thread installs; any number read.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from streamgr import config
from streamgr.clock import Clock
from streamgr.events import item_key
from streamgr.model.table import ITEM
from streamgr.serve.copies import Architecture, Copy
from streamgr.serve.kv_cache import KvCache
from streamgr.serve.undo import UndoRing
from streamgr.telemetry import DURATION_BUCKETS, HORIZON, Log, gauge, histogram
from streamgr.weights.manifest import Learned, Manifest, Reason, Rejected
from streamgr.weights.publisher import VERSION
from streamgr.weights.subscriber import REJECTED, Rollback, Subscriber, Version

EVENT_TO_SERVING = histogram("event_to_serving_seconds", "From a learned target's append to the swap that serves it.")
LABEL_TO_SERVING = histogram("label_to_serving_seconds", "From the record that closed the label to the swap.")
GRADIENT_TO_SERVING = histogram("gradient_to_serving_seconds", "From the gradient step to the swap.")
SWAP = histogram("weights_swap_duration_seconds", "Applying, proving and swapping in a version.", (), DURATION_BUCKETS)
UNDO_BYTES = gauge("weights_undo_bytes", "What the undo ring holds.")


@dataclass(frozen=True, slots=True)
class Served:
    """One version as requests see it. rows i64[k] and keys u64[k]: the live items, rows ascending; caches: of the
    histories that went through these weights."""

    manifest: Manifest
    architecture: Architecture
    copy: Copy
    rows: torch.Tensor
    keys: NDArray[np.uint64]
    caches: KvCache

    @property
    def actions(self) -> tuple[str, ...]:
        return self.architecture.actions

    def age_seconds(self, now_ms: int) -> float:
        """How old what these weights know is: now - horizon."""
        return max(0.0, (now_ms - self.manifest.horizon_ms) / 1000)

    def vectors(self, keys: NDArray[np.uint64]) -> tuple[torch.Tensor, NDArray[np.bool_]]:
        """f32[n, D] for keys u64[n], and which of them have no slot and are answered by the shared rows."""
        return self.copy.vectors(keys, self.manifest.watermark_ms)


class NoWeights(Exception):
    """No version has arrived yet."""


class LiveWeights:
    """Owns the copies. Installing belongs to one thread; `lease` to everybody."""

    def __init__(self, actions: tuple[str, ...], clock: Clock, log: Log, settings: config.Scorer | None = None) -> None:
        settings = settings or config.Scorer()
        self._actions, self._clock, self._log = actions, clock, log
        self._free = threading.Condition()
        self._live: Served | None = None
        self._spare: Copy | None = None  # at the live version too
        self._cache_bytes = settings.cache_bytes
        self._ring = UndoRing(settings.undo_versions, settings.undo_bytes)

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

    def follow(self, subscriber: Subscriber, timeout: float) -> bool:
        """Take the subscriber's next step, if one comes in time (seconds); whether one did."""
        step = subscriber.poll(timeout, self.can_go_back)
        if step is not None and not self.install(step):
            subscriber.take_back(step)
        return step is not None

    def can_go_back(self, manifest: Manifest) -> bool:
        """Whether the undo ring leads back to this version."""
        return self._spare is not None and bool(self._ring.way_to(manifest))

    def install(self, step: Version | Rollback) -> bool:
        """Serve this from now on; false where it was refused (counted, and what is served stays)."""
        started = self._clock.monotonic()
        try:
            if isinstance(step, Version):
                self._install(step, started)
            else:
                self._roll_back(step.manifest, started)
        except Rejected as rejected:
            manifest = step.manifest
            REJECTED.labels(rejected.reason).inc()
            self._log.error(
                "weights_refused", str(rejected), reason=rejected.reason, version=manifest.version, serving=self.version
            )
            return False
        finally:
            UNDO_BYTES.set(self._ring.bytes)
        return True

    def _install(self, version: Version, started: float) -> None:
        manifest, payload, old = version.manifest, version.payload, self._live
        architecture = self._fitting(version)
        copy = Copy(architecture) if version.whole else self._spare
        if copy is None:
            raise Rejected("gap", "the spare copy was lost", where=manifest.name())
        copy.check(payload, whole=version.whole)
        undo = None if version.whole else copy.before(payload)
        copy.take(payload)
        try:
            copy.require(manifest)
        except Rejected:
            if undo is not None:
                copy.put_back(undo)
            raise
        if old is None or architecture != old.architecture:
            self._ring.clear()
        else:
            self._ring.push(old.manifest, undo or old.copy.undo_to(copy))
        self._swap(manifest, architecture, copy, started, version.covers)
        if version.whole:
            self._renew(Copy(architecture), lambda spare: spare.take(payload))
        else:
            self._renew(self._retired(old), lambda spare: spare.take(payload))

    def _roll_back(self, manifest: Manifest, started: float) -> None:
        way, copy, old = self._ring.way_to(manifest), self._spare, self._live
        if copy is None or old is None or not way:
            raise Rejected("gap", "the undo ring does not lead there", where=manifest.name())
        self._spare = None  # until it is proven
        for undo in way:
            copy.put_back(undo)
        try:
            copy.require(manifest)
        except Rejected:
            self._ring.clear()
            raise
        self._ring.forget(len(way))
        self._swap(manifest, old.architecture, copy, started, ())

        def put_back(spare: Copy) -> None:
            for undo in way:
                spare.put_back(undo)

        self._renew(self._retired(old), put_back)

    def _swap(
        self, manifest: Manifest, architecture: Architecture, copy: Copy, started: float, covers: tuple[Manifest, ...]
    ) -> None:
        """Serve this copy from now on."""
        rows, keys = copy.table.live(manifest.watermark_ms, ITEM)
        old, caches = self._live, KvCache(self._cache_bytes)
        back = old is not None and manifest.order < old.manifest.order
        self._live = Served(manifest, architecture, copy, torch.from_numpy(rows), keys, caches)
        if old is not None:
            old.caches.close()
        seconds, now = self._clock.monotonic() - started, self._clock.now_ms()
        SWAP.observe(seconds)
        VERSION.labels("scorer").set(manifest.version)
        HORIZON.labels("scorer").set(manifest.horizon_ms / 1000)
        self._log.info(
            "weights_rolled_back" if back else "weights_swapped",
            version=manifest.version,
            kind=manifest.kind,
            targets=_observe(covers, now),
            age_seconds=(now - manifest.horizon_ms) / 1000,
            duration_s=round(seconds, 4),
        )

    def _retired(self, old: "Served | None") -> Copy:
        """The copy that was live, once its last reader has gone."""
        assert old is not None
        with self._free:
            self._free.wait_for(lambda: not old.copy.readers)
        return old.copy

    def _renew(self, spare: Copy, bring: Callable[[Copy], object]) -> None:
        """Bring a copy that nobody reads to the live version: the next version is taken by it."""
        assert self._live is not None
        manifest, self._spare = self._live.manifest, None
        bring(spare)
        if spare.digest.text == manifest.state_digest:
            self._spare = spare
        else:  # what is served is proven; this one must not be
            REJECTED.labels("digest").inc()
            self._log.error("weights_spare_lost", "deltas wait for the next snapshot", version=manifest.version)

    def _fitting(self, version: Version) -> Architecture:
        """The architecture of a version that may follow what is served; raises `Rejected`."""
        live, manifest = self._live, version.manifest
        if live is not None and manifest.order <= live.manifest.order and not version.pinned:
            reason: Reason = "gap" if manifest.epoch == live.manifest.epoch else "epoch"
            raise Rejected(reason, f"is not newer than {live.manifest.name()}", where=manifest.name())
        if not version.whole and live is not None and manifest.model_digest == live.manifest.model_digest:
            if (manifest.epoch, manifest.parent) != (live.manifest.epoch, live.manifest.version):
                raise Rejected(
                    "gap", f"builds on version {manifest.parent}, we serve {self.version}", where=manifest.name()
                )
            return live.architecture
        if not version.whole:
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


def _observe(covers: tuple[Manifest, ...], now: int) -> int:
    """What a swap has made fresh: one observation a learned target; how many targets there were."""
    targets = 0
    for covered in covers:
        learned = Learned.unpack(covered.learned)
        targets += learned.total
        for metric, column in (
            (EVENT_TO_SERVING, learned.target_append_ms),
            (LABEL_TO_SERVING, learned.closing_append_ms),
            (GRADIENT_TO_SERVING, learned.gradient_ms),
        ):
            for seconds in np.maximum(0.0, (now - column) / 1000).tolist():
                metric.observe(seconds)
    return targets


def item_keys(texts: list[str]) -> NDArray[np.uint64]:
    """The keys u64[n] of item ids."""
    return np.fromiter(map(item_key, texts), np.uint64, len(texts))
