"""The scorer's side: versions, whole and verified, in order; or nothing, with the reason counted.

A version is handed over when all of this holds, else it is refused by one of seven names
(`streamgr_weights_rejected_total{reason}`) and what is served stays:

    schema      the record or payload is not of this format, or names tensors, dtypes or a parent that cannot be
    epoch       its trainer was fenced off: a later claim stands before it in the log
    digest      a byte of manifest, chunk or tensor is not what was written
    shape       tensors of other shapes than the manifest or, for a delta, the parent says
    nonfinite   NaN or infinite values
    truncated   the log no longer holds its chunks
    gap         a delta whose parent is not what we stand on

After a refusal the next snapshot heals: a snapshot stands on nothing but itself. A reader also takes the newest
snapshot straight away whenever there is one ahead: the chain of deltas runs through it anyway (the version after a
snapshot has it as parent), so going there at once is never dearer. What it skips is not lost to the measurements:
`Version.covers` names every version whose targets are now served for the first time.
"""

from collections import deque
from dataclasses import dataclass

from streamgr.clock import Clock, Deadline
from streamgr.config import Config
from streamgr.errors import BrokerUnreachable, RetentionPassed
from streamgr.telemetry import Log, counter
from streamgr.weights import payload as payloads
from streamgr.weights.log import ChunkLog, ConsumerFactory, Entry, ManifestLog
from streamgr.weights.manifest import KEPT_VERSIONS, ClaimRecord, Manifest, Reason, Rejected
from streamgr.weights.payload import Payload
from streamgr.weights.publisher import VERSION

REJECTED = counter("weights_rejected", "Versions refused; what was served stays.", ("reason",))
_REASONS: tuple[Reason, ...] = ("gap", "digest", "shape", "nonfinite", "schema", "epoch", "truncated", "probe")
for _reason in _REASONS:
    REJECTED.labels(_reason)  # an alert needs the zero before the first one


@dataclass(frozen=True, slots=True)
class Version:
    """A whole, verified version. A snapshot's payload is all there is; a delta's replaces what it names.

    covers: the manifests whose learned targets are served with this one for the first time, oldest first; empty for
    the first version a process serves (what was learned before it began did not wait for it).
    """

    manifest: Manifest
    payload: Payload
    covers: tuple[Manifest, ...]


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
        self._served: Manifest | None = None
        self._ahead: deque[Manifest] = deque(maxlen=KEPT_VERSIONS)  # taken in and not yet served, in order
        self._refused: set[tuple[int, int]] = set()  # those of `_ahead` that will never be
        self._fetching: Manifest | None = None  # chosen, its chunks on their way

    def poll(self, timeout: float) -> Version | None:
        """The next version to serve, or None. Takes at most `timeout` seconds and the verification of one version."""
        deadline = Deadline(self._clock, timeout)
        while True:
            busy = self._caught_up() and bool(self._standing())
            self._follow(0.0 if busy else min(0.1, deadline.remaining()))
            if self._caught_up() and (version := self._advance(deadline)):
                return version
            if deadline.passed():
                return None

    def close(self) -> None:
        self._manifests.close()
        self._chunks.close()

    def _caught_up(self) -> bool:
        """Whether the manifests have been read up to where they ended when we began: only then is the newest known."""
        return self._start_end is not None and self._manifests.next_offset >= self._start_end

    def _follow(self, timeout: float) -> None:
        """Take in the manifests that have come."""
        try:
            if self._start_end is None:
                self._manifests.start()
                self._start_end = self._manifests.bounds()[1]
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
        """Claims and manifests in log order: here older epochs end."""
        content = entry.content
        if isinstance(content, Rejected):
            raise content
        if isinstance(content, ClaimRecord):
            self._epoch = max(self._epoch, entry.offset)
            return
        if not isinstance(content, Manifest):
            return
        if content.order <= self._newest and entry.offset < (self._start_end or 0):
            return  # read again after the log was cut
        if content.epoch < self._epoch:
            raise Rejected("epoch", f"a later trainer claimed epoch {self._epoch}", where=content.name())
        if content.epoch > self._epoch and content.epoch >= (self._start_end or 0):
            raise Rejected("epoch", "nobody has claimed its epoch", where=content.name())
        if content.order <= self._newest:
            raise Rejected("gap", f"comes after version {self._newest[1]} in the log", where=content.name())
        self._epoch, self._newest = content.epoch, content.order
        self._ahead.append(content)

    def _advance(self, deadline: Deadline) -> Version | None:
        """Fetch and verify what comes next; over the refused ones on to the next that stands."""
        while chosen := self._fetching or self._choose():  # finish first: newer ones must not starve what was begun
            self._fetching = chosen
            try:
                data = self._chunks.fetch(chosen, deadline)
                if data is None:
                    return None
                payload = payloads.decode(data, chosen.tensors)
            except Rejected as rejected:
                self._refuse(chosen, rejected)
                continue
            return self._serve(chosen, payload)
        return None

    def _standing(self) -> list[Manifest]:
        """What lies ahead and is not refused, oldest first."""
        return [m for m in self._ahead if m.order not in self._refused]

    def _choose(self) -> Manifest | None:
        """The newest snapshot ahead; else the delta that stands on what is served; deltas that cannot are refused."""
        standing = self._standing()
        for manifest in reversed(standing):
            if manifest.kind == "snapshot":
                return manifest
        for manifest in standing:
            try:
                self._require_parent(manifest)
            except Rejected as rejected:
                self._refuse(manifest, rejected)
                continue
            return manifest
        return None

    def _require_parent(self, delta: Manifest) -> None:
        """Raises `Rejected` unless `delta` stands on what is served."""
        served = self._served
        if served is None or delta.epoch != served.epoch or delta.parent != served.version:
            stand = "nothing yet" if served is None else f"version {served.version} of epoch {served.epoch}"
            raise Rejected("gap", f"builds on version {delta.parent}, we stand on {stand}", where=delta.name())
        if delta.model_digest != served.model_digest:
            raise Rejected("schema", "a delta of another model than its parent", where=delta.name())
        payloads.require_same_form(delta.tensors, served.tensors)

    def _serve(self, manifest: Manifest, payload: Payload) -> Version:
        covers = tuple(m for m in self._ahead if m.order <= manifest.order) if self._served else ()
        while self._ahead and self._ahead[0].order <= manifest.order:
            self._refused.discard(self._ahead.popleft().order)
        self._served, self._fetching = manifest, None
        VERSION.labels("scorer").set(manifest.version)
        skipped = max(0, len(covers) - 1)
        self._log.info("weights_received", version=manifest.version, kind=manifest.kind, skipped=skipped)
        return Version(manifest, payload, covers)

    def _refuse(self, manifest: Manifest, rejected: Rejected) -> None:
        """This manifest will never be served; its learned targets will, with the version that heals."""
        self._fetching = None
        self._refused.add(manifest.order)
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
