"""The trainer's side: claim the right to publish, then write each version whole, its manifest last.

The order, and what a crash between the steps leaves:

1. The claim. Its offset is our epoch; everybody who reads the log from here on refuses lower epochs.
2. Before each version: has somebody claimed after us? Then stop (`TryAgain`): the other one publishes now. The
   look is an early exit, not the guard; what slips through it is refused by every reader.
3. The chunks, all on their way at once, and all acknowledged. A crash leaves records that nobody refers to; retention
   takes them.
4. The manifest, acknowledged. From here on the version exists.

A version number is never used twice: whatever fails after step 2 uses it up, and makes the next version a snapshot.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

from streamgr.clock import Clock, Deadline
from streamgr.config import Config
from streamgr.errors import BrokerUnreachable, DataError, TryAgain
from streamgr.kafka.producer import Producer
from streamgr.telemetry import DURATION_BUCKETS, Log, counter, gauge, histogram
from streamgr.weights import payload as payloads
from streamgr.weights.log import ConsumerFactory, Entry, ManifestLog
from streamgr.weights.manifest import (
    CLAIM_KEY,
    MAX_BYTES,
    Chunk,
    ClaimRecord,
    Kind,
    Learned,
    Manifest,
    Probe,
    Rejected,
    TensorSpec,
    chunk_key,
    encode,
    manifest_key,
    model_digest,
    require_model,
)
from streamgr.weights.payload import Payload

PUBLISHED = counter("weights_published", "Versions published.", ("kind",))
BYTES = counter("weights_bytes", "Payload bytes of the versions published.", ("kind",))
DURATION = histogram(
    "weights_publish_duration_seconds", "From payload to acknowledged manifest.", ("kind",), DURATION_BUCKETS
)
for _kind in ("snapshot", "delta"):
    PUBLISHED.labels(_kind), BYTES.labels(_kind), DURATION.labels(_kind)  # 0 is a value too
VERSION = gauge("weights_version", "The newest version published, or handed over for serving.", ("role",))

READ_SECONDS = 10.0  # for one attempt to read the manifests


@dataclass(frozen=True, slots=True)
class Claim:
    """The right to publish: epoch (the claim's offset), the highest version written before it (0: none), and the step
    that the last of them was of.
    """

    epoch: int
    last_version: int
    last_step: int = 0


@dataclass(frozen=True, slots=True)
class Facts:
    """What the trainer knows of the weights it publishes; see `Manifest` for the fields."""

    model: dict[str, Any]
    step: int
    targets_learned: int
    horizon_ms: int
    watermark_ms: int
    positions: Mapping[str, Mapping[int, int]]
    learned: Learned
    quality: Mapping[str, float | None]
    state_digest: str = ""
    probe: Probe = field(default_factory=Probe)


class Publisher:
    """One trainer's publisher; one thread at a time. `claim` first."""

    def __init__(
        self,
        config: Config,
        clock: Clock,
        log: Log,
        producer: Producer,
        consumer_factory: ConsumerFactory,
        *,
        patience: Callable[[], bool] = lambda: False,
    ) -> None:
        """patience: asked where the manifests cannot be read, whether to try again; if not, `TryAgain` is raised."""
        self._settings, self._clock, self._log, self._producer = config.weights, clock, log, producer
        self._patience = patience
        self._weights_topic, self._manifests_topic = config.topic("weights"), config.topic("manifests")
        self._manifests = ManifestLog(consumer_factory(), self._manifests_topic)
        self._claim: Claim | None = None
        self._successor: int | None = None  # the epoch of a later claim: we are done
        self._version = 0  # the last number used
        self._parent: Manifest | None = None  # what the next delta builds on; None: a snapshot is due
        self._snapshot_bytes = self._delta_bytes = self._deltas = 0  # since the last snapshot

    def claim(self, at_least: int = 0) -> Claim:
        """Become the only publisher. `at_least`: the version in the trainer's own checkpoint, should the log know less.

        Raises `TryAgain` where the manifests before the claim cannot be read.
        """
        ours = encode(ClaimRecord(self._clock.now_ms(), at_least))
        epoch = self._producer.send_confirmed(self._manifests_topic, ours, key=CLAIM_KEY, partition=0)
        last, step = at_least, 0

        def before_claim(deadline: Deadline) -> list[Entry]:
            self._manifests.start(deadline.remaining())
            return self._manifests.read_until(epoch + 1, deadline)

        for entry in self._patiently(before_claim):
            match entry.content:
                case Manifest() as manifest:
                    last, step = max(last, manifest.version), manifest.step
                case ClaimRecord() as record:
                    last = max(last, record.last_version)
                case Rejected() as rejected:
                    self._log.warning("manifest_damaged", str(rejected), reason=rejected.reason)
        self._claim, self._successor, self._version, self._parent = Claim(epoch, last, step), None, last, None
        self._log.info("weights_claimed", epoch=epoch, last_version=last)
        return self._claim

    def snapshot_due(self) -> bool:
        """Whether the next version must be a snapshot: first of an epoch, after a failure, by count, or by bytes."""
        return (
            self._parent is None
            or self._deltas + 1 >= self._settings.snapshot_every
            or self._delta_bytes > self._snapshot_bytes
        )

    def publish(self, kind: Kind, payload: Payload, facts: Facts) -> Manifest:
        """Write one version and return its manifest when every byte of it is acknowledged.

        Raises `TryAgain` when a later claim exists, `DataError` for a payload that no reader would take (values that
        are not finite, a delta of another form than its parent) or a snapshot that outgrows the topic.
        """
        if self._claim is None or (kind == "delta" and self._parent is None):
            raise ValueError("claim() and a snapshot come before a delta")
        started = self._clock.monotonic()
        data, tensors = self._encode(kind, payload, facts)
        self._look_for_successor(self._claim.epoch)

        parent, self._parent = self._parent, None  # until the manifest is acknowledged
        self._version += 1
        epoch, version = self._claim.epoch, self._version
        parts = payloads.split(data, self._settings.chunk_bytes)
        named = ((chunk_key(epoch, version, index), part) for index, part in enumerate(parts))
        offsets = self._producer.send_all(self._weights_topic, named, partition=0)
        chunks = [Chunk(at, len(part), sha256(part).hexdigest()) for at, part in zip(offsets, parts, strict=True)]
        manifest = Manifest(
            kind=kind,
            epoch=epoch,
            version=version,
            parent=parent.version if kind == "delta" and parent is not None else None,
            model=facts.model,
            model_digest=model_digest(facts.model),
            step=facts.step,
            targets_learned=facts.targets_learned,
            horizon_ms=facts.horizon_ms,
            watermark_ms=facts.watermark_ms,
            positions={topic: dict(offsets) for topic, offsets in facts.positions.items()},
            published_ms=self._clock.now_ms(),
            tensors=tensors,
            chunks=chunks,
            bytes=len(data),
            quality=dict(facts.quality),
            learned=facts.learned.pack(),
            state_digest=facts.state_digest,
            probe=facts.probe,
        )
        record = encode(manifest)
        if len(record) > MAX_BYTES:
            raise DataError(
                f"a manifest of {len(record)} bytes, at most {MAX_BYTES} may be written",
                where=manifest.name(),
                remedy=f"raise weights.chunk_bytes ({len(chunks)} chunks)",
            )
        self._producer.send_confirmed(self._manifests_topic, record, key=manifest_key(version), partition=0)
        self._published(manifest, self._clock.monotonic() - started)
        return manifest

    def close(self) -> None:
        """Let go of the consumer; the producer is its owner's."""
        self._manifests.close()

    def _encode(self, kind: Kind, payload: Payload, facts: Facts) -> tuple[bytes, dict[str, TensorSpec]]:
        """The payload's bytes, checked as every reader will check them: what fails, fails here, before it is sent."""
        try:
            data, tensors = payloads.encode(payload)
            if kind == "delta" and self._parent is not None:
                require_model(self._parent, facts.model)
                payloads.require_same_form(tensors, self._parent.tensors)
        except Rejected as rejected:
            raise DataError(
                rejected.what,
                where=rejected.where or f"weights version {self._version + 1}",
                remedy="not published, the last version stays; go back to the checkpoint before the weights broke",
            ) from None
        limit = self._settings.retention_bytes // 4
        if kind == "snapshot" and len(data) >= limit:
            raise DataError(
                f"a snapshot of {len(data)} bytes must stay below a quarter of what its topic holds ({limit})",
                where=f"{self._weights_topic}[0]",
                remedy="raise weights.retention_bytes and the topic's retention.bytes, or lower table.slots",
            )
        return data, tensors

    def _look_for_successor(self, epoch: int) -> None:
        """Read what has come to the manifests since the last look: our own versions, or the claim that ends us."""

        def since(deadline: Deadline) -> list[Entry]:
            return self._manifests.read_until(self._manifests.bounds(deadline.remaining())[1], deadline)

        for entry in self._patiently(since):
            if isinstance(entry.content, ClaimRecord) and entry.offset > epoch:
                self._successor = entry.offset
        if self._successor is not None:
            raise TryAgain(
                f"another trainer has claimed epoch {self._successor}; ours is {epoch}",
                where=f"{self._manifests_topic}[0]@{self._successor}",
                remedy="one trainer a topic prefix: stop the other one, or leave this one stopped",
            )

    def _patiently(self, read: Callable[[Deadline], list[Entry]]) -> list[Entry]:
        """Read the manifests, as often as it takes while the broker is away. Raises `TryAgain` when patience ends."""
        while True:
            try:
                return read(Deadline(self._clock, READ_SECONDS))
            except BrokerUnreachable as error:
                if not self._patience():
                    raise TryAgain(error.what, where=error.where, remedy=error.remedy) from None

    def _published(self, manifest: Manifest, seconds: float) -> None:
        """The version exists: what the next one builds on, and what the operator sees."""
        self._parent = manifest
        if manifest.kind == "snapshot":
            self._snapshot_bytes, self._delta_bytes, self._deltas = manifest.bytes, 0, 0
        else:
            self._delta_bytes, self._deltas = self._delta_bytes + manifest.bytes, self._deltas + 1
        PUBLISHED.labels(manifest.kind).inc()
        BYTES.labels(manifest.kind).inc(manifest.bytes)
        DURATION.labels(manifest.kind).observe(seconds)
        VERSION.labels("trainer").set(manifest.version)
        self._log.info(
            "weights_published",
            version=manifest.version,
            kind=manifest.kind,
            bytes=manifest.bytes,
            chunks=len(manifest.chunks),
            seconds=round(seconds, 4),
        )
