"""What an operator asks of the weights: which versions are there, what is in one, is it whole; and what to serve.

Each question reads the topics afresh; answers are plain dicts for `streamgr weights`. Only `pin`, `unpin` and
`rollback` write: one record in the manifests, which every scorer follows in log order.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from streamgr.clock import Clock, Deadline
from streamgr.config import Config
from streamgr.errors import BrokerUnreachable, DataError
from streamgr.kafka.consumer import Consumer
from streamgr.kafka.producer import Producer
from streamgr.weights import payload as payloads
from streamgr.weights.chain import Order, links
from streamgr.weights.digest import StateDigest, row_hashes
from streamgr.weights.log import ChunkLog, ManifestLog
from streamgr.weights.manifest import (
    PIN_KEY,
    ClaimRecord,
    Learned,
    Manifest,
    PinRecord,
    Rejected,
    Unpinned,
    encode,
)
from streamgr.weights.payload import Payload

SECONDS = 15.0  # for the whole answer


@dataclass(frozen=True, slots=True)
class Weights:
    """What the manifests say: every manifest that can be read, in log order, which of them are fenced off (a later
    claim stands before them, so no reader takes them), and the pin that stands.
    """

    manifests: list[Manifest]
    fenced: set[int]  # places in `manifests`
    pin: PinRecord | None

    @property
    def standing(self) -> dict[Order, Manifest]:
        """Those that readers take."""
        return {m.order: m for i, m in enumerate(self.manifests) if i not in self.fenced}

    def find(self, version: int) -> Manifest:
        """The newest of that number; raises `DataError`."""
        for manifest in reversed(self.manifests):
            if manifest.version == version:
                return manifest
        numbers = [manifest.version for manifest in self.manifests]
        have = f"{numbers[0]} to {numbers[-1]}" if numbers else "none"
        raise DataError(f"no weights version {version}; there are: {have}", remedy="streamgr weights list")


def list_versions(config: Config, clock: Clock) -> list[dict[str, Any]]:
    """One short dict a version, oldest first; `fenced` where no reader takes it, `pinned` where scorers are held."""
    with _reading(config, clock) as (weights, _):
        return [
            _summary(manifest) | {"fenced": i in weights.fenced, "pinned": _is_pinned(weights, manifest)}
            for i, manifest in enumerate(weights.manifests)
        ]


def show(config: Config, clock: Clock, version: int) -> dict[str, Any]:
    """All that the manifest says, tensors by name. Raises `DataError` where there is no such version."""
    with _reading(config, clock) as (weights, _):
        manifest = weights.find(version)
        return _summary(manifest) | {
            "pinned": _is_pinned(weights, manifest),
            "state_digest": manifest.state_digest,
            "model_digest": manifest.model_digest,
            "model": manifest.model,
            "positions": {topic: {str(p): o for p, o in at.items()} for topic, at in manifest.positions.items()},
            "watermark_ms": manifest.watermark_ms,
            "code": manifest.code,
            "learned": Learned.unpack(manifest.learned).total,
            "tensors": {name: msgspec.structs.asdict(spec) for name, spec in manifest.tensors.items()},
            "chunks": [msgspec.structs.asdict(chunk) for chunk in manifest.chunks],
        }


def verify(config: Config, clock: Clock, version: int) -> dict[str, Any]:
    """Read the version and all that it stands on, from its snapshot on; check every byte, and each state digest
    against the whole state as the chain gives it.

    `{"version", "ok", "checked": [versions, snapshot first], "bytes", "reason", "detail"}`; the last two null when ok.
    Raises `DataError` where there is no such version, `BrokerUnreachable` where the broker does not answer in time.
    """
    answer: dict[str, Any] = {"version": version, "ok": True, "checked": [], "bytes": 0, "reason": None, "detail": None}
    with _reading(config, clock) as (weights, chunks):
        weights.find(version)
        digest = StateDigest(0)
        try:
            for manifest in links(weights.standing, _order(weights, version)):
                data = chunks.fetch(manifest, deadline := Deadline(clock, SECONDS))
                while data is None and not deadline.passed():
                    data = chunks.fetch(manifest, deadline)
                if data is None:
                    raise BrokerUnreachable("its chunks do not come", where=manifest.name(), remedy="check the broker")
                _require_state(digest, payloads.decode(data, manifest.tensors), manifest)
                answer["checked"].append(manifest.version)
                answer["bytes"] += len(data)
        except Rejected as rejected:
            answer |= {"ok": False, "reason": rejected.reason, "detail": rejected.what}
    return answer


def pin(config: Config, clock: Clock, version: int, why: str = "") -> dict[str, Any]:
    """Hold every scorer at a version until `unpin`; trainers go on. The answer says what was written.

    Raises `DataError` where no reader could have the version, `TryAgain` where the broker does not acknowledge.
    """
    with _reading(config, clock) as (weights, _):
        weights.find(version)
        order = _order(weights, version)
        try:
            links(weights.standing, order)
        except Rejected as rejected:
            raise DataError(
                f"nobody could serve version {version}: {rejected.what}",
                where=rejected.where,
                remedy="pin one whose snapshot and deltas are all there: streamgr weights list, verify VERSION",
            ) from None
    record = PinRecord(epoch=order[0], version=version, pinned_ms=clock.now_ms(), why=why)
    return {"pinned": version, "epoch": order[0], "why": why, "offset": _write(config, encode(record))}


def unpin(config: Config) -> dict[str, Any]:
    """Let the scorers go on to the newest version; harmless where there is no pin. Raises `TryAgain`."""
    return {"pinned": None, "offset": _write(config, None)}


def rollback(config: Config, clock: Clock, version: int | None = None, why: str = "") -> dict[str, Any]:
    """Pin a version; without a number the one before the newest. Raises as `pin`."""
    if version is None:
        with _reading(config, clock) as (weights, _):
            standing = sorted(weights.standing)
        if len(standing) < 2:
            raise DataError(f"no version before the newest: there are {len(standing)}", remedy="streamgr weights list")
        version = standing[-2][1]
    return pin(config, clock, version, why or "rollback")


@contextmanager
def _reading(config: Config, clock: Clock) -> Iterator[tuple[Weights, ChunkLog]]:
    """What the manifests say now, and a reader of chunks."""
    log = ManifestLog(Consumer(config.kafka, client_id="streamgr-weights"), config.topic("manifests"))
    chunks = ChunkLog(Consumer(config.kafka, client_id="streamgr-weights"), config.topic("weights"))
    try:
        log.start(SECONDS)
        epoch, pinned = -1, None
        manifests: list[Manifest] = []
        fenced: set[int] = set()
        for entry in log.read_until(log.bounds(SECONDS)[1], Deadline(clock, SECONDS)):
            match entry.content:
                case ClaimRecord():
                    epoch = entry.offset
                case PinRecord() as record:
                    pinned = record
                case Unpinned():
                    pinned = None
                case Manifest() as manifest:
                    if manifest.epoch < epoch:
                        fenced.add(len(manifests))
                    manifests.append(manifest)
                    epoch = max(epoch, manifest.epoch)
        yield Weights(manifests, fenced, pinned), chunks
    finally:
        log.close()
        chunks.close()


def _write(config: Config, value: bytes | None) -> int:
    """The offset of the new pin record (null: removed), acknowledged."""
    producer = Producer(config.kafka, client_id="streamgr-weights")
    try:
        return producer.send_confirmed(config.topic("manifests"), value, key=PIN_KEY, partition=0, timeout=SECONDS)
    finally:
        producer.close()


def _order(weights: Weights, version: int) -> Order:
    """The newest of that number that readers take; one that none takes has the epoch that it claims."""
    found = [order for order in weights.standing if order[1] == version]
    return max(found) if found else weights.find(version).order


def _is_pinned(weights: Weights, manifest: Manifest) -> bool:
    return weights.pin is not None and weights.pin.order == manifest.order


def _require_state(digest: StateDigest, payload: Payload, manifest: Manifest) -> None:
    """Take the version in; raises `Rejected` ("digest") unless the state is now the one that its manifest names."""
    part = {name.removeprefix("table/"): t for name, t in payload.items() if name.startswith("table/")}
    rows = part["rows"].numpy() if part else np.zeros(0, np.int64)
    if manifest.kind == "snapshot":
        digest.clear(0)
    if short := max(0, int(rows.max(initial=-1)) + 1 - len(digest.hashes)):
        digest.hashes = np.append(digest.hashes, np.zeros(short, np.uint64))
    if part:
        digest.replace(rows, row_hashes(part))
    if digest.text != manifest.state_digest:
        said = manifest.state_digest or "nothing"
        raise Rejected("digest", f"the state is {digest.text}, the manifest says {said}", where=manifest.name())


def _summary(manifest: Manifest) -> dict[str, Any]:
    """What a table of versions shows."""
    return {
        "version": manifest.version,
        "kind": manifest.kind,
        "parent": manifest.parent,
        "epoch": manifest.epoch,
        "published_ms": manifest.published_ms,
        "horizon_ms": manifest.horizon_ms,
        "step": manifest.step,
        "targets_learned": manifest.targets_learned,
        "bytes": manifest.bytes,
        "digest": manifest.digest(),
        "quality": manifest.quality,
    }
