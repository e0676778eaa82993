"""The manifest: the checked list that makes a weights version whole or absent.

A version is chunks in `<prefix>.weights` and, written after the last of them was confirmed, one manifest in
`<prefix>.manifests`. The manifest names every chunk by offset, size and sha256 and every tensor by dtype, shape and
sha256; it says which model the weights belong to, what they were learned from, and what they follow. Without a
manifest, chunks are nothing; with one, a reader can tell whole from damaged without trusting anybody.

The manifests topic is compacted, so its keys decide what it keeps:

    claim              the newest claim; its offset is the epoch of the trainer that wrote it
    manifest/<n>       n = version mod 4096: the topic keeps the last 4096 versions and no more, so a reader that
                       starts from its beginning reads a bounded log, and nobody has to write tombstones
    pin                the version that scorers are held at; a null value lets them go

The wire is JSON in an envelope `{"format", "sha256", "body"}`; the digest is over the body's bytes as they came, so a
flipped bit anywhere is an error here and not a wrong horizon later.
"""

import zlib
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from streamgr import __version__
from streamgr.errors import DataError

FORMAT = 2  # 1 had neither state digest nor probe, and float32 rows
KEPT_VERSIONS = 4096
CLAIM_KEY, PIN_KEY = b"claim", b"pin"
MAX_BYTES = (2 << 20) - (64 << 10)  # of a record of the manifests topic, which takes 2 MiB with its overhead
MAX_LEARNED = 4096  # targets whose freshness one manifest carries

Kind = Literal["snapshot", "delta"]
Reason = Literal["gap", "digest", "shape", "nonfinite", "schema", "epoch", "truncated", "probe"]


class Rejected(DataError):
    """A version that may not be served, by reason. Operator action: none while the next snapshot heals it."""

    def __init__(self, reason: Reason, what: str, *, where: str = "") -> None:
        super().__init__(what, where=where, remedy="the next snapshot heals this; if it repeats, look at the trainer")
        self.reason: Reason = reason


class TensorSpec(msgspec.Struct, array_like=True, frozen=True):
    """One tensor of the payload: safetensors dtype name, shape, sha256 (hex) of its little-endian bytes."""

    dtype: str
    shape: list[int]
    sha256: str


class Chunk(msgspec.Struct, array_like=True, frozen=True):
    """One record of the weights topic: its offset in partition 0, its size in bytes, its sha256 (hex)."""

    offset: int
    size: int
    sha256: str


class Probe(msgspec.Struct, frozen=True):
    """Ids (u64) and what the trainer answered about them with this version; see `model.probe`."""

    keys: list[int] = []
    logits: list[list[float]] = []


class PackedLearned(msgspec.Struct, frozen=True):
    """See `Learned.pack`; `total` counts the targets before sampling."""

    total: int = 0
    count: int = 0
    columns: bytes = b""


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What one version is. Times are ms since 1970; `parent` is the version a delta builds on, null for a snapshot."""

    kind: Kind
    epoch: int
    version: int
    parent: int | None
    model: dict[str, Any]  # hyper-parameters, actions, table geometry: all that a scorer needs to build it
    model_digest: str
    step: int
    targets_learned: int
    horizon_ms: int
    watermark_ms: int
    positions: dict[str, dict[int, int]]  # topic: partition: next offset
    published_ms: int
    tensors: dict[str, TensorSpec]
    chunks: list[Chunk]
    bytes: int
    quality: dict[str, Any] = {}
    learned: PackedLearned = PackedLearned()
    state_digest: str = ""  # of the whole table as it stands after this version; see `weights.digest`
    probe: Probe = Probe()
    code: str = __version__

    @property
    def order(self) -> tuple[int, int]:
        """Versions are ordered by epoch first: a trainer that was fenced off cannot come after its successor."""
        return self.epoch, self.version

    def digest(self) -> str:
        """One digest for all of the version's tensors: of their names, dtypes, shapes and own digests."""
        return sha256(msgspec.json.encode(self.tensors, order="sorted")).hexdigest()

    def name(self) -> str:
        """How messages call it."""
        return f"weights version {self.version} ({self.kind}, epoch {self.epoch})"


class ClaimRecord(msgspec.Struct, frozen=True):
    """A trainer's claim to be the only publisher from here on; its epoch is the offset of its record."""

    claimed_ms: int
    last_version: int  # the highest that the claimant knew of by itself, 0 for none


class PinRecord(msgspec.Struct, frozen=True):
    """An operator's word: serve this version and no other until the pin is taken away."""

    epoch: int
    version: int
    pinned_ms: int
    why: str = ""

    @property
    def order(self) -> tuple[int, int]:
        return self.epoch, self.version


class Unpinned(msgspec.Struct, frozen=True):
    """The pin has been taken away."""


class Envelope(msgspec.Struct, frozen=True):
    """The outer form of every record of the manifests topic."""

    format: int
    sha256: str
    body: msgspec.Raw


@dataclass(frozen=True, slots=True)
class Learned:
    """When the targets learned since the parent version were shown, closed and learned; ms, one row a target.

    target_append_ms, closing_append_ms, gradient_ms i64[n]: append time of the target's own record, append time of
    the record that closed it, wall time of its gradient step. `total` may exceed n: a sample stands for all.
    """

    target_append_ms: NDArray[np.int64]
    closing_append_ms: NDArray[np.int64]
    gradient_ms: NDArray[np.int64]
    total: int

    @classmethod
    def none(cls) -> "Learned":
        """Nothing learned."""
        empty = np.empty(0, np.int64)
        return cls(empty, empty, empty, 0)

    def pack(self) -> PackedLearned:
        """At most `MAX_LEARNED` rows at even distances, differenced and deflated: about 2 bytes a number."""
        table = np.stack([self.target_append_ms, self.closing_append_ms, self.gradient_ms]).astype("<i8")
        if table.shape[1] > MAX_LEARNED:
            table = table[:, np.linspace(0, table.shape[1] - 1, MAX_LEARNED).round().astype(np.int64)]
        steps = np.diff(table, axis=1, prepend=np.int64(0))
        return PackedLearned(self.total, table.shape[1], zlib.compress(steps.tobytes()) if steps.size else b"")

    @classmethod
    def unpack(cls, packed: PackedLearned) -> "Learned":
        """The inverse of `pack`; raises `DataError` on damage, and never inflates past `MAX_LEARNED` rows."""
        if not 0 <= packed.count <= MAX_LEARNED:
            raise DataError(f"{packed.count} learned targets, at most {MAX_LEARNED} may be named", where="manifest")
        if not packed.count:
            return cls.none()
        size = 24 * packed.count
        try:
            data = zlib.decompressobj().decompress(packed.columns, size + 1)
        except zlib.error as error:
            raise DataError(f"damaged columns of learned targets: {error}", where="manifest") from None
        if len(data) != size:
            raise DataError("columns of learned targets of the wrong length", where="manifest")
        target, closing, gradient = np.frombuffer(data, "<i8").reshape(3, -1).cumsum(axis=1)
        return cls(target, closing, gradient, packed.total)


def model_digest(model: dict[str, Any]) -> str:
    """The digest of what the weights belong to: equal exactly if every hyper-parameter is equal."""
    return sha256(msgspec.json.encode(model, order="sorted")).hexdigest()


def model_differences(model: dict[str, Any], other: dict[str, Any], path: str = "") -> list[str]:
    """What differs between two models, by name: `["dim: 64 is not 32", …]`; empty if nothing does."""
    found = []
    for key in sorted(model.keys() | other.keys()):
        a, b, name = model.get(key), other.get(key), f"{path}{key}"
        if isinstance(a, dict) and isinstance(b, dict):
            found += model_differences(a, b, f"{name}.")
        elif msgspec.json.encode(a) != msgspec.json.encode(b):
            found.append(f"{name}: {a!r} is not {b!r}")
    return found


def require_model(manifest: Manifest, model: dict[str, Any]) -> None:
    """Raise `DataError` naming every hyper-parameter in which the weights' model is not `model`."""
    if manifest.model_digest != model_digest(model):
        raise DataError(
            "weights of another model: " + ", ".join(model_differences(manifest.model, model)),
            where=manifest.name(),
            remedy="start with the settings that these weights were trained with, or train anew",
        )


def manifest_key(version: int) -> bytes:
    """The key under which compaction keeps a manifest until the version 4096 later replaces it."""
    return f"manifest/{version % KEPT_VERSIONS}".encode()


def chunk_key(epoch: int, version: int, index: int) -> bytes:
    """The key of a record of the weights topic."""
    return f"{epoch}/{version}/{index}".encode()


_body = msgspec.json.Encoder()
_envelope = msgspec.json.Decoder(Envelope)
Content = Manifest | ClaimRecord | PinRecord | Unpinned
_bodies: dict[type, msgspec.json.Decoder[Any]] = {
    t: msgspec.json.Decoder(t) for t in (Manifest, ClaimRecord, PinRecord)
}


def encode(record: Manifest | ClaimRecord | PinRecord) -> bytes:
    """The bytes of one record of the manifests topic."""
    body = _body.encode(record)
    return msgspec.json.encode(Envelope(FORMAT, sha256(body).hexdigest(), msgspec.Raw(body)))


def decode(key: bytes | None, value: bytes | None, offset: int) -> Content:
    """Read one record. Raises `Rejected` (schema, digest, epoch) on what is none."""
    where = f"manifests[0]@{offset}"
    if key == PIN_KEY and value is None:
        return Unpinned()
    kind: type = {CLAIM_KEY: ClaimRecord, PIN_KEY: PinRecord}.get(key or b"", Manifest)
    if value is None or len(value) > MAX_BYTES:
        raise Rejected("schema", f"a value of {len(value) if value else 0} bytes under key {key!r}", where=where)
    try:
        envelope = _envelope.decode(value)
        if envelope.format != FORMAT:
            raise Rejected("schema", f"format {envelope.format}, this version reads {FORMAT}", where=where)
        if sha256(envelope.body).hexdigest() != envelope.sha256:
            raise Rejected("digest", "the body is not what was written", where=where)
        record: Content = _bodies[kind].decode(envelope.body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Rejected("schema", f"not a {kind.__name__}: {error}", where=where) from None
    if isinstance(record, Manifest):
        _check(record, key, offset, where)
    return record


def _check(manifest: Manifest, key: bytes | None, offset: int, where: str) -> None:
    """Whether a manifest agrees with itself, its key and its place in the log."""
    if key != manifest_key(manifest.version) or manifest.version < 1:
        raise Rejected("schema", f"version {manifest.version} under key {key!r}", where=where)
    if not 0 <= manifest.epoch < offset:
        raise Rejected("epoch", f"epoch {manifest.epoch} is not the offset of an earlier claim", where=where)
    if model_digest(manifest.model) != manifest.model_digest:
        raise Rejected("digest", "the model is not the one its digest names", where=where)
    if (manifest.parent is None) != (manifest.kind == "snapshot") or (manifest.parent or 0) >= manifest.version:
        raise Rejected("schema", f"a {manifest.kind} of parent {manifest.parent}", where=where)
    sizes = [chunk.size for chunk in manifest.chunks]
    if not sizes or min(sizes) < 1 or sum(sizes) != manifest.bytes or min(c.offset for c in manifest.chunks) < 0:
        raise Rejected("schema", f"chunks of {sum(sizes)} bytes for {manifest.bytes}", where=where)
    try:
        Learned.unpack(manifest.learned)
    except DataError as error:
        raise Rejected("schema", error.what, where=where) from None
