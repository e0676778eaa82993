"""The scorer's side: versions, whole and verified, in order; or nothing, with the reason counted.

A version is handed over when all of this holds, else it is refused by name (`streamgr_weights_rejected_total{reason}`)
and what is served stays:

    schema      the record or payload is not of this format, or names tensors, dtypes or a parent that cannot be
    epoch       its trainer was fenced off: a later claim stands before it in the log
    digest      a byte of manifest, chunk or tensor is not what was written; or the state that it gives is not
    shape       tensors of other shapes than the manifest or, for a delta, the parent says
    nonfinite   NaN or infinite values
    truncated   the log no longer holds its chunks
    gap         a delta whose parent is not what we stand on
    probe       the weights answer otherwise here than where they were trained

State digest and probe can only be judged on the weights themselves: that is `serve`'s part, which says so by
`take_back`. After a refusal the next snapshot heals: a snapshot stands on nothing but itself. A reader also takes the
newest snapshot straight away whenever there is one ahead: the chain of deltas runs through it anyway (the version after
a snapshot has it as parent), so going there at once is never dearer. What it skips is not lost to the measurements:
`Version.covers` names every version whose targets are now served for the first time.

A pin in the log holds every reader at one version until it is taken away. The way there is the shortest that there is:
undo what is served (`Rollback`), the deltas from what is served, or all that the version stands on, put together as one
(`Version.pinned`), so that nothing in between is ever served. A pin that cannot be met changes nothing but an alert.
"""

from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from streamgr.clock import Clock, Deadline
from streamgr.config import Config
from streamgr.errors import BrokerUnreachable, RetentionPassed
from streamgr.telemetry import Log, counter, gauge
from streamgr.weights import payload as payloads
from streamgr.weights.chain import Order, links, require_link
from streamgr.weights.log import ChunkLog, ConsumerFactory, Entry, ManifestLog
from streamgr.weights.manifest import (
    KEPT_VERSIONS,
    ClaimRecord,
    Manifest,
    PackedLearned,
    PinRecord,
    Reason,
    Rejected,
    Unpinned,
)
from streamgr.weights.payload import Payload

REJECTED = counter("weights_rejected", "Versions refused; what was served stays.", ("reason",))
_REASONS: tuple[Reason, ...] = ("gap", "digest", "shape", "nonfinite", "schema", "epoch", "truncated", "probe")
for _reason in _REASONS:
    REJECTED.labels(_reason)  # an alert needs the zero before the first one
PINNED = gauge("weights_pinned_version", "The version that a pin names; 0: there is no pin.")
UNMET = gauge("weights_pin_unmet", "1 while a pin names a version that cannot be had; what was served stays.")


@dataclass(frozen=True, slots=True)
class Version:
    """A whole, verified version. A snapshot's payload is all there is; a delta's replaces what it names.

    covers: the manifests whose learned targets are served with this one for the first time, oldest first; empty for
    the first version a process serves (what was learned before it began did not wait for it).
    pinned: a pin asks for it: it may be older than what is served, and its payload is all there is.
    """

    manifest: Manifest
    payload: Payload
    covers: tuple[Manifest, ...]
    pinned: bool = False

    @property
    def whole(self) -> bool:
        """Whether the payload is all there is."""
        return self.pinned or self.manifest.kind == "snapshot"


@dataclass(frozen=True, slots=True)
class Rollback:
    """A pin asks for a version that was served and can be had again by undoing those after it."""

    manifest: Manifest


class Subscriber:
    """Follows the weights topics; one thread calls `poll`."""

    def __init__(self, config: Config, clock: Clock, log: Log, consumer_factory: ConsumerFactory) -> None:
        self._clock, self._log = clock, log
        self._manifests = ManifestLog(consumer_factory(), config.topic("manifests"))
        self._chunks = ChunkLog(consumer_factory(), config.topic("weights"))
        self._away = False  # the broker, when we last asked; said once
        self._start_end: int | None = None  # the end of the manifests when we began; None: not begun
        self._epoch = -1  # the newest that a claim or manifest has shown
        self._newest = (-1, 0)  # (epoch, version) of the last manifest taken in
        self._known: dict[Order, Manifest] = {}  # taken in, in order
        self._bad: set[Order] = set()  # those that will never be served
        self._orphans: set[Order] = set()  # deltas refused for what they would have had to stand on
        self._pin: PinRecord | None = None
        self._unmet = False
        self._served: Manifest | None = None
        self._covered: Order = (-1, 0)  # the newest whose learned targets have been handed over
        self._stood: tuple[Manifest | None, Order] = None, (-1, 0)  # both, before the last step was handed over
        self._path: list[Manifest] = []  # chosen, its chunks on their way
        self._parts: list[Payload] = []  # of the path, as far as they have come

    @property
    def why_nothing(self) -> str:
        """Why nothing is served yet, where a pin is the reason; else empty."""
        return f"pinned at version {self._pin.version}, which cannot be had" if self._pin and self._unmet else ""

    def poll(
        self, timeout: float, can_go_back: Callable[[Manifest], bool] = lambda _: False
    ) -> Version | Rollback | None:
        """What to serve next, or None. Takes at most `timeout` seconds and the verification of one version.

        can_go_back: whether whoever serves can undo what came after this version.
        """
        deadline = Deadline(self._clock, timeout)
        while True:
            self._follow(0.0 if self._caught_up() and self._has_work() else min(0.1, deadline.remaining()))
            if self._caught_up() and (step := self._advance(deadline, can_go_back)):
                return step
            if deadline.passed():
                return None

    def take_back(self, step: Version | Rollback) -> None:
        """What `poll` returned last was refused by whoever serves: we stand where we stood."""
        if isinstance(step, Version):
            self._bad.add(step.manifest.order)
        self._served, self._covered = self._stood

    def close(self) -> None:
        self._manifests.close()
        self._chunks.close()

    # --- the log

    def _caught_up(self) -> bool:
        """Whether the manifests have been read up to where they ended when we began: only then is the newest known."""
        return self._start_end is not None and self._manifests.next_offset >= self._start_end

    def _follow(self, timeout: float) -> None:
        """Take in what has come."""
        try:
            if self._start_end is None:
                self._manifests.start()
                self._start_end = self._manifests.bounds()[1]
                self._set_pin(None)  # it stands in the log if it still holds
            entries = self._manifests.read(timeout)
        except BrokerUnreachable as error:
            if not self._away:
                self._log.warning("weights_broker_away", str(error))
            self._away = True
            return
        except RetentionPassed as error:
            self._reject(Rejected("truncated", error.what, where=error.where))
            self._start_end = None  # begin again with what is left; the chain has a gap until the next snapshot
            return
        self._away = False
        for entry in entries:
            try:
                self._take_in(entry)
            except Rejected as rejected:
                self._reject(rejected)

    def _take_in(self, entry: Entry) -> None:
        """Claims, manifests and pins in log order: here older epochs end."""
        content = entry.content
        match content:
            case Rejected():
                raise content
            case ClaimRecord():
                self._epoch = max(self._epoch, entry.offset)
            case PinRecord():
                self._set_pin(content)
            case Unpinned():
                self._set_pin(None)
            case Manifest():
                self._take_in_manifest(content, entry.offset)

    def _take_in_manifest(self, manifest: Manifest, offset: int) -> None:
        if manifest.order <= self._newest and offset < (self._start_end or 0):
            return  # read again after the log was cut
        if manifest.epoch < self._epoch:
            raise Rejected("epoch", f"a later trainer claimed epoch {self._epoch}", where=manifest.name())
        if manifest.epoch > self._epoch and manifest.epoch >= (self._start_end or 0):
            raise Rejected("epoch", "nobody has claimed its epoch", where=manifest.name())
        if manifest.order <= self._newest:
            raise Rejected("gap", f"comes after version {self._newest[1]} in the log", where=manifest.name())
        self._epoch, self._newest = manifest.epoch, manifest.order
        if (last := next(reversed(self._known.values()), None)) and last.model_digest == manifest.model_digest:
            manifest = msgspec.structs.replace(manifest, model=last.model)  # thousands are held, and one model
        self._known[manifest.order] = manifest
        if len(self._known) > KEPT_VERSIONS:
            oldest = next(iter(self._known))
            del self._known[oldest]
            self._bad.discard(oldest)
            self._orphans.discard(oldest)

    def _set_pin(self, pin: PinRecord | None) -> None:
        if pin != self._pin:
            self._log.info("weights_pinned" if pin else "weights_unpinned", version=pin.version if pin else None)
            self._path, self._parts = [], []  # whatever was on its way, the pin decides anew
        self._pin, self._unmet = pin, False
        PINNED.set(pin.version if pin else 0)
        UNMET.set(0)

    # --- the way

    def _has_work(self) -> bool:
        if self._pin is None:
            return bool(self._path or self._standing())
        return not self._unmet and (self._served is None or self._served.order != self._pin.order)

    def _advance(self, deadline: Deadline, can_go_back: Callable[[Manifest], bool]) -> Version | Rollback | None:
        """Fetch and verify what comes next; over the refused ones on to the next that stands."""
        if self._pin and self._has_work() and (target := self._known.get(self._pin.order)) and can_go_back(target):
            self._hand_over(target)
            return Rollback(target)
        while path := self._path or self._choose():  # finish first: newer ones must not starve what was begun
            self._path = path
            link = path[len(self._parts)]
            try:
                data = self._chunks.fetch(link, deadline)
                if data is None:
                    return None
                self._parts.append(payloads.decode(data, link.tensors, vouched=True))
            except Rejected as rejected:
                self._refuse(link, rejected)
                continue
            if len(self._parts) == len(path):
                return self._version(link, payloads.overlay(self._parts))
        return None

    def _standing(self) -> list[Manifest]:
        """What lies ahead and is not refused, oldest first."""
        served = self._served.order if self._served else (-1, 0)
        return [m for o, m in self._known.items() if o > served and o not in self._bad and o not in self._orphans]

    def _choose(self) -> list[Manifest]:
        """What to fetch, each standing on the one before it; nothing to do where it is empty."""
        if self._pin is not None:
            return self._toward(self._pin) if self._has_work() else []
        standing = self._standing()
        for manifest in reversed(standing):
            if manifest.kind == "snapshot":
                return [manifest]
        for manifest in standing:
            try:
                self._require_parent(manifest)
            except Rejected as rejected:
                self._orphans.add(manifest.order)
                self._reject(rejected, manifest)
                continue
            return [manifest]
        return []

    def _toward(self, pin: PinRecord) -> list[Manifest]:
        """The pinned version and all that it stands on; or only the next delta on what is served, where that leads
        there. Empty where the version cannot be had.
        """
        try:
            path = links(self._known, pin.order, upto=self._served)
            if bad := [manifest for manifest in path if manifest.order in self._bad]:
                raise Rejected("gap", "was refused before", where=bad[0].name())
        except Rejected as rejected:
            self._unmet = True
            UNMET.set(1)
            serving = self._served.version if self._served else None
            self._log.error("weights_pin_unmet", str(rejected), version=pin.version, serving=serving)
            return []
        return path if path[0].kind == "snapshot" else path[:1]

    def _require_parent(self, delta: Manifest) -> None:
        """Raises `Rejected` unless `delta` stands on what is served."""
        served = self._served
        if served is None or delta.epoch != served.epoch or delta.parent != served.version:
            stand = "nothing yet" if served is None else f"version {served.version} of epoch {served.epoch}"
            raise Rejected("gap", f"builds on version {delta.parent}, we stand on {stand}", where=delta.name())
        require_link(delta, served)

    def _version(self, manifest: Manifest, payload: Payload) -> Version:
        """Hand it over: from now on it is what we stand on."""
        covered, fresh = self._covered, []
        for order, known in self._known.items():
            if covered < order <= manifest.order:
                fresh.append(known)
            elif order <= covered and known.learned.count:  # told and served: only its place in the chain still counts
                self._known[order] = msgspec.structs.replace(known, learned=PackedLearned())
        covers = tuple(fresh) if self._served else ()
        pinned = self._pin is not None and self._path[0].kind == "snapshot"
        self._hand_over(manifest)
        self._covered = max(covered, manifest.order)
        self._log.info(
            "weights_received", version=manifest.version, kind=manifest.kind, skipped=max(0, len(covers) - 1)
        )
        return Version(manifest, payload, covers, pinned)

    def _hand_over(self, manifest: Manifest) -> None:
        self._stood = self._served, self._covered
        self._served, self._path, self._parts = manifest, [], []

    def _refuse(self, manifest: Manifest, rejected: Rejected) -> None:
        """This manifest will never be served; its learned targets will, with the version that heals."""
        self._path, self._parts = [], []
        self._bad.add(manifest.order)
        self._reject(rejected, manifest)

    def _reject(self, rejected: Rejected, manifest: Manifest | None = None) -> None:
        REJECTED.labels(rejected.reason).inc()
        self._log.warning(
            "weights_rejected",
            str(rejected),
            reason=rejected.reason,
            version=manifest.version if manifest else None,
            serving=self._served.version if self._served else None,
        )
