"""The whole way from a damaged log to what is served: the trainer's exact state, or a named and counted refusal.

A real chain (a small table that evicts and lets expire, a network, digests, probes) is damaged in every part: bits,
lengths, order, repetition, loss of records; and by lies that carry sound signatures: a manifest or payload with one
thing changed and every checksum made anew. A manifest's bare facts (step, quality, horizon, watermark) nobody could
check against anything; all the rest is covered.

`STREAMGR_WEIGHTS_FUZZ=20000` asks for so many examples of each instead of the few of every run.
"""

import os
from collections.abc import Callable
from functools import cache
from hashlib import sha256
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from streamgr.clock import SystemClock
from streamgr.config import Model, Table
from streamgr.serve.model import LiveWeights
from streamgr.weights import payload as payloads
from streamgr.weights.digest import row_hashes
from streamgr.weights.manifest import Chunk, Manifest, Probe, Rejected, encode, manifest_key, model_digest
from streamgr.weights.subscriber import Subscriber
from tests.serve.kit import ACTIONS, NOW, Weights
from tests.serve.kit import settings as scorer_settings
from tests.weights.kit import (
    MANIFESTS,
    WEIGHTS,
    MemoryConsumer,
    MemoryLog,
    MemoryProducer,
    config,
    quiet,
    rejected,
    rejected_since,
)
from tests.weights.scribe import Churn, Scribe

LONG = int(os.environ.get("STREAMGR_WEIGHTS_FUZZ", "0"))
KINDS = ["snapshot", "delta", "delta", "delta", "delta", "snapshot", "delta", "delta", "delta"]
LAST = len(KINDS)
LIFE_MS = 60_000
SMALL = msgspec.structs.replace(
    scorer_settings(),
    model=Model(dim=8, layers=1, heads=2, position_buckets=16, time_buckets=8),
    table=Table(slots=64, bucket_width=8, fallback_rows=8, ttl_seconds=LIFE_MS / 1000),
)


def profile(examples: int) -> settings:
    """So many examples in every run, always the same; or as many as are asked for, new ones each time."""
    slow = [HealthCheck.too_slow]
    return settings(max_examples=LONG or examples, deadline=None, derandomize=not LONG, suppress_health_check=slow)


State = tuple[str, str]  # of the table: its digest; of the network: a sha256


@cache
def chain() -> tuple[MemoryLog, Churn, dict[int, Manifest], dict[int, State]]:
    """A sound log, its trainer, and of each version the manifest and what the trainer had when it wrote it."""
    log, churn = MemoryLog(), Churn(Weights(SMALL), LIFE_MS, NOW)
    scribe = Scribe(config(chunk_bytes=1_500), MemoryProducer(log))
    scribe.claim()
    manifests, truth = {}, {}
    for kind in KINDS:
        churn.step()
        manifest = scribe.write(churn.publish(kind))
        manifests[manifest.version] = manifest
        truth[manifest.version] = churn.weights.digest.text, dense_sum(churn.weights.model)
    stats = churn.weights.table.stats()
    assert stats.evictions > 5 and stats.expiries > 5, f"nothing happens in this chain: {stats}"
    return log, churn, manifests, truth


def dense_sum(model: torch.nn.Module) -> str:
    return sha256(b"".join(t.numpy().tobytes() for _, t in sorted(model.state_dict().items()))).hexdigest()


class Reader:
    """A scorer without HTTP."""

    def __init__(self, log: MemoryLog) -> None:
        self.subscriber = Subscriber(config(), SystemClock(), quiet(), lambda: MemoryConsumer(log))
        self.live = LiveWeights(ACTIONS, SystemClock(), quiet())

    @property
    def version(self) -> int:
        return self.live.version or 0

    def drain(self, truth: dict[int, State]) -> None:
        """Follow until nothing comes; whatever is served on the way is what the trainer had."""
        idle = 0
        while idle < 2:
            idle = 0 if self.live.follow(self.subscriber, 0) else idle + 1
            if self.version:
                assert self.states() == {truth[self.version]}, f"version {self.version} is not the trainer's"

    def states(self) -> set[State]:
        """Of both copies, computed anew from all that they hold."""
        with self.live.lease() as served:
            found = set()
            for copy in filter(None, (served.copy, self.live._spare)):
                held = np.flatnonzero(copy.digest.hashes)
                total = int(row_hashes(copy.table.rows(held)).sum(dtype=np.uint64))
                found.add((f"{total:016x}", dense_sum(copy.recommender)))
            return found


def follower(seen: int) -> tuple[MemoryLog, Reader]:
    """A copy of the log, of which a reader knows the versions up to `seen`."""
    whole, _, manifests, truth = chain()
    log = whole.copy()
    log.end[MANIFESTS] = offset_of(whole, manifests[seen]) + 1 if seen else 1
    log.records[MANIFESTS] = {o: r for o, r in whole.records[MANIFESTS].items() if o < log.end[MANIFESTS]}
    reader = Reader(log)
    reader.drain(truth)
    assert reader.version == seen
    log.end, log.records[MANIFESTS] = dict(whole.end), dict(whole.records[MANIFESTS])
    return log, reader


def heal(log: MemoryLog, reader: Reader) -> None:
    """Whatever has happened: a snapshot of a later trainer, and a delta on it, give exactly its state."""
    was, truth = reader.version, dict(chain()[3])
    scribe = Scribe(config(chunk_bytes=1_500), MemoryProducer(log))
    scribe.claim(LAST)
    churn = Churn(Weights(SMALL, seed=2, version=LAST), LIFE_MS, NOW)
    for kind in ("snapshot", "delta"):
        churn.step()
        manifest = scribe.write(churn.publish(kind))
        truth[manifest.version] = churn.weights.digest.text, dense_sum(churn.weights.model)
        reader.drain(truth)
        assert reader.version == manifest.version, f"stuck at {was}"


def test_the_sound_chain_is_served_to_its_end() -> None:
    before = rejected()
    for seen in range(LAST + 1):
        _, reader = follower(seen)
        reader.drain(chain()[3])
        assert reader.version == LAST
    assert rejected_since(before) == {}


damages = st.lists(
    st.tuples(
        st.sampled_from(["drop", "flip", "cut", "swap", "null", "key", "truncate", "repeat"]),
        st.sampled_from([WEIGHTS, MANIFESTS]),
        st.integers(0, 10**4),
        st.integers(0, 10**6),
    ),
    min_size=1,
    max_size=4,
)


@profile(60)
@given(damages, st.integers(0, LAST))
def test_damage_gives_the_trainers_state_or_a_named_refusal(harm: list[tuple[str, str, int, int]], seen: int) -> None:
    whole, _, manifests, truth = chain()
    log, reader = follower(seen)
    before, passed = rejected(), reader.subscriber._manifests.next_offset
    for one in harm:
        _damage(log, *one)
    reader.drain(truth)
    if reader.version < LAST and not rejected_since(before):
        newest = whole.records[MANIFESTS][offset_of(whole, manifests[LAST])]
        there = [o for o, r in log.records[MANIFESTS].items() if (r.key, r.value) == (newest.key, newest.value)]
        waits = bool(reader.subscriber._path)  # its last chunk is gone, and nothing has come after it yet
        assert waits or not [o for o in there if o >= passed], "silent"
    heal(log, reader)


Lie = Callable[[Manifest, dict[str, torch.Tensor], int], tuple[dict[str, Any], dict[str, torch.Tensor] | None]]


def _about(**fields: Callable[[Manifest, int], Any]) -> Lie:
    """The manifest says something else."""
    return lambda manifest, _, n: ({name: wrong(manifest, n) for name, wrong in fields.items()}, None)


def _bit(name: str) -> Lie:
    """One bit of one tensor is another one, in its last rows (those of slots; a shared row has no key)."""

    def lie(_: Manifest, payload: dict[str, torch.Tensor], n: int) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        tensor = payload[name]
        bits = 8 * tensor[-4:].nbytes
        raw = flipped(tensor.contiguous().view(torch.uint8).numpy().tobytes(), 8 * tensor.nbytes - 1 - n % bits)
        return {}, payload | {name: torch.frombuffer(bytearray(raw), dtype=tensor.dtype).reshape(tensor.shape)}

    return lie


def _rows(change: Callable[[int, int], list[int]]) -> Lie:
    """The table has other rows, by their places in the payload."""

    def lie(_: Manifest, payload: dict[str, torch.Tensor], n: int) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        index = torch.tensor(change(len(payload["table/rows"]), n))
        return {}, payload | {name: payload[name][index] for name in payloads.TABLE}

    return lie


def _louder(_: Manifest, payload: dict[str, torch.Tensor], n: int) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    return {}, {name: t + 0.5 + n % 3 if name.startswith("dense/ranking") else t for name, t in payload.items()}


LIES: dict[str, Lie] = {
    "kind": _about(
        kind=lambda m, _: "delta" if m.kind == "snapshot" else "snapshot",
        parent=lambda m, _: m.version - 1 if m.kind == "snapshot" else None,
    ),
    "parent": _about(parent=lambda m, n: max(0, m.version - 2 - n % 3)),
    "version": _about(version=lambda m, n: m.version + 1 + n % 3),
    "epoch": _about(epoch=lambda m, n: m.epoch + 1 + n % 3),
    "model": _about(model=lambda m, n: m.model | {"actions": ["click"]}),
    "state_digest": _about(state_digest=lambda m, n: f"{int(m.state_digest, 16) ^ 1 << n % 64:016x}"),
    "no state_digest": _about(state_digest=lambda m, _: ""),
    "probe.logits": _about(
        probe=lambda m, n: _replaced(m.probe, logits=[[x + 0.01 for x in r] for r in m.probe.logits])
    ),
    "probe.keys": _about(probe=lambda m, n: _replaced(m.probe, keys=m.probe.keys[n % 15 + 1 :])),
    "probe of no id": _about(probe=lambda m, n: _replaced(m.probe, keys=[-1 - n, *m.probe.keys[1:]])),
    "no probe": _about(probe=lambda m, _: _replaced(m.probe, keys=[], logits=[])),
    "tensors": _about(tensors=lambda m, n: dict(list(m.tensors.items())[: n % len(m.tensors)])),
    "chunks": _about(chunks=lambda m, n: m.chunks[::-1]),
    "chunk sizes": _about(chunks=lambda m, n: [Chunk(c.offset, c.size + 1, c.sha256) for c in m.chunks]),
    "bytes": _about(bytes=lambda m, n: m.bytes + 1 + n % 9),
    "a key": _bit("table/keys"),
    "a life": _bit("table/until_ms"),
    "a field": _bit("table/field"),
    "a weight": _bit("table/weight"),
    "a row": _bit("table/rows"),
    "a row less": _rows(lambda k, n: [i for i in range(k) if i != n % k]),
    "a row twice": _rows(lambda k, n: [*range(k), n % k]),
    "rows reordered": _rows(lambda k, n: [*range(1, k), 0]),  # is no lie: the same rows
    "the network": _louder,
}


@pytest.mark.parametrize("name", LIES)
@profile(4)
@given(st.integers(6, LAST), st.integers(0, 10**6), st.booleans())
def test_a_well_signed_lie_is_refused_by_name(name: str, version: int, n: int, behind: bool) -> None:
    """On the way of every reader: in the newest snapshot, 6, or after it."""
    whole, _, manifests, truth = chain()
    log, reader = follower(5 if behind else version - 1)
    sound = manifests[version]
    data = b"".join(whole.records[WEIGHTS][c.offset].value or b"" for c in sound.chunks)
    changed, payload = LIES[name](sound, payloads.decode(data, sound.tensors), n)
    before = rejected()
    try:
        if payload is not None:
            changed |= _signed(log, sound, payload)
    except Rejected:  # not even `encode` takes it
        return
    told = msgspec.structs.replace(sound, **changed)
    told = msgspec.structs.replace(told, model_digest=model_digest(told.model))
    log.replace(MANIFESTS, offset_of(whole, sound), key=manifest_key(told.version), value=encode(told))
    reader.drain(truth)
    if name == "rows reordered":
        assert reader.version == LAST and not rejected_since(before)
    elif name == "kind":  # a whole table laid over another one can be all the same the right one
        assert reader.version == LAST or rejected_since(before)
    else:
        assert reader.version < version or version == 6, f"served {reader.version}"
        assert rejected_since(before), "silent"
    heal(log, reader)


def _signed(log: MemoryLog, sound: Manifest, payload: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Put another payload where the sound one was, one chunk more where it is longer; its fields of the manifest."""
    data, tensors = payloads.encode(payload)
    size = max(len(data) // len(sound.chunks), 1)
    parts = payloads.split(data, size)
    parts[len(sound.chunks) - 1 :] = [b"".join(parts[len(sound.chunks) - 1 :])]
    for chunk, part in zip(sound.chunks, parts, strict=True):
        log.replace(WEIGHTS, chunk.offset, value=part)
    chunks = [Chunk(c.offset, len(part), sha256(part).hexdigest()) for c, part in zip(sound.chunks, parts, strict=True)]
    return {"tensors": tensors, "chunks": chunks, "bytes": len(data)}


def _off(logits: list[list[float]]) -> list[list[float]]:
    return [[x + 0.01 for x in row] for row in logits]


def _replaced(probe: Probe, **fields: Any) -> Probe:
    return msgspec.structs.replace(probe, **fields)


def _damage(log: MemoryLog, kind: str, topic: str, where: int, what: int) -> None:
    offsets = sorted(log.records[topic])
    if not offsets:
        return
    at = offsets[where % len(offsets)]
    record = log.records[topic][at]
    value = record.value or b""
    match kind:
        case "drop":
            del log.records[topic][at]
        case "flip" if value:
            bit = what % (8 * len(value))
            log.replace(topic, at, value=flipped(value, bit))
        case "cut":
            log.replace(topic, at, value=value[: what % (len(value) + 1)])
        case "swap":
            other = log.records[topic][offsets[what % len(offsets)]]
            log.replace(topic, at, key=other.key, value=other.value)
            log.replace(topic, other.offset, key=record.key, value=record.value)
        case "null":
            log.replace(topic, at, value=None)
        case "key":
            log.replace(topic, at, key=(b"claim", b"pin", b"manifest/3")[what % 3])
        case "truncate":
            log.truncate(topic, at)
        case "repeat":
            log.append(topic, record.key, record.value)


def flipped(value: bytes, bit: int) -> bytes:
    damaged = bytearray(value)
    damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)


def offset_of(log: MemoryLog, manifest: Manifest) -> int:
    wire = encode(manifest)
    return next(o for o, r in log.records[MANIFESTS].items() if r.value == wire)
