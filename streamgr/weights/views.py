"""What an operator asks of the weights: which versions are there, what is in one, is it whole.

Each question reads the topics afresh and changes nothing; answers are plain dicts for `streamgr weights`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec

from streamgr.clock import Clock, Deadline
from streamgr.config import Config
from streamgr.errors import BrokerUnreachable, DataError
from streamgr.kafka.consumer import Consumer
from streamgr.weights import payload as payloads
from streamgr.weights.log import ChunkLog, ManifestLog
from streamgr.weights.manifest import ClaimRecord, Learned, Manifest, Rejected

SECONDS = 15.0  # for the whole answer


def list_versions(config: Config, clock: Clock) -> list[dict[str, Any]]:
    """One short dict a version, oldest first; `fenced` where a later claim stands before it (no reader takes it)."""
    with _reading(config, clock) as (versions, _):
        return [_summary(manifest) | {"fenced": fenced} for manifest, fenced in versions]


def show(config: Config, clock: Clock, version: int) -> dict[str, Any]:
    """All that the manifest says, tensors by name. Raises `DataError` where there is no such version."""
    with _reading(config, clock) as (versions, _):
        manifest = _find([m for m, _ in versions], version)
        return _summary(manifest) | {
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
    """Read the version and all that it stands on, down to its snapshot, and check every byte.

    `{"version", "ok", "checked": [versions, snapshot first], "bytes", "reason", "detail"}`; the last two null when ok.
    Raises `DataError` where there is no such version, `BrokerUnreachable` where the broker does not answer in time.
    """
    answer: dict[str, Any] = {"version": version, "ok": True, "checked": [], "bytes": 0, "reason": None, "detail": None}
    with _reading(config, clock) as (versions, chunks):
        try:
            for manifest in _chain([m for m, fenced in versions if not fenced], version):
                data = chunks.fetch(manifest, deadline := Deadline(clock, SECONDS))
                while data is None and not deadline.passed():
                    data = chunks.fetch(manifest, deadline)
                if data is None:
                    raise BrokerUnreachable("its chunks do not come", where=manifest.name(), remedy="check the broker")
                payloads.decode(data, manifest.tensors)
                answer["checked"].append(manifest.version)
                answer["bytes"] += len(data)
        except Rejected as rejected:
            answer |= {"ok": False, "reason": rejected.reason, "detail": rejected.what}
    return answer


@contextmanager
def _reading(config: Config, clock: Clock) -> Iterator[tuple[list[tuple[Manifest, bool]], ChunkLog]]:
    """Every manifest that can be read, oldest first, whether it is fenced off, and a reader of chunks."""
    log = ManifestLog(Consumer(config.kafka, client_id="streamgr-weights"), config.topic("manifests"))
    chunks = ChunkLog(Consumer(config.kafka, client_id="streamgr-weights"), config.topic("weights"))
    try:
        log.start(SECONDS)
        epoch, versions = -1, []
        for entry in log.read_until(log.bounds(SECONDS)[1], Deadline(clock, SECONDS)):
            match entry.content:
                case ClaimRecord():
                    epoch = entry.offset
                case Manifest() as manifest:
                    versions.append((manifest, manifest.epoch < epoch))
                    epoch = max(epoch, manifest.epoch)
        yield versions, chunks
    finally:
        log.close()
        chunks.close()


def _find(manifests: list[Manifest], version: int) -> Manifest:
    """The newest manifest of that number."""
    for manifest in reversed(manifests):
        if manifest.version == version:
            return manifest
    have = f"{manifests[0].version} to {manifests[-1].version}" if manifests else "none"
    raise DataError(f"no weights version {version}; there are: {have}", remedy="streamgr weights list")


def _chain(manifests: list[Manifest], version: int) -> list[Manifest]:
    """The version and what it stands on, its snapshot first. Raises `Rejected` ("gap") where a link is missing."""
    chain = [_find(manifests, version)]
    by_order = {m.order: m for m in manifests}
    while (parent := chain[-1].parent) is not None:
        link = by_order.get((chain[-1].epoch, parent))
        if link is None:
            raise Rejected("gap", f"version {parent}, on which it stands, is gone", where=chain[-1].name())
        payloads.require_same_form(chain[-1].tensors, link.tensors)
        chain.append(link)
    return chain[::-1]


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
