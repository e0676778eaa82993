"""Whole or absent, in order, never silently wrong: the reader against every way a log can be damaged.

The list follows what other systems are known to lose updates by: a version read half written, a delta dropped and the
next applied on top, a publisher that was fenced off, rows evicted and reused, a marker without its data.
"""

from functools import cache

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streamgr.weights.manifest import CLAIM_KEY, ClaimRecord, Manifest, decode, encode, manifest_key
from streamgr.weights.payload import Payload
from streamgr.weights.publisher import Publisher
from tests.weights.kit import (
    MANIFESTS,
    MODEL,
    WEIGHTS,
    MemoryLog,
    State,
    World,
    drain,
    facts,
    publish,
    publisher,
    rejected,
    rejected_since,
    subscriber,
)


def history(count: int, **weights: int) -> tuple[MemoryLog, Publisher, World, dict[int, State]]:
    """A log of `count` versions and the state that each must give."""
    made, _ = publisher(log := MemoryLog(), **{"snapshot_every": 5} | weights)
    made.claim()
    world = World(7)
    return log, made, world, dict(publish(made, world) for _ in range(count))


def test_versions_arrive_in_order_and_give_the_trainers_state() -> None:
    made, _ = publisher(log := MemoryLog(), snapshot_every=6)
    made.claim()
    reader, world, state, before = subscriber(log), World(1), State(), rejected()
    assert reader.poll(0) is None
    for expected in range(1, 20):
        number, truth = publish(made, world)
        (version,) = drain(reader)
        assert version.manifest.version == number == expected
        assert [m.version for m in version.covers] == ([expected] if expected > 1 else [])
        state.apply(version)
        assert state == truth
    assert rejected_since(before) == {}


def test_a_late_reader_starts_at_the_newest_snapshot_and_follows() -> None:
    log, _, _, truth = history(13)
    versions = drain(subscriber(log))
    snapshot = max(v for v in truth if _manifest(log, v).kind == "snapshot")
    assert [v.manifest.version for v in versions] == list(range(snapshot, 14))
    assert versions[0].covers == ()
    assert _apply(versions) == truth[13]


def test_a_reader_that_fell_behind_skips_to_the_snapshot_and_says_what_it_covers() -> None:
    log, made, world, _ = history(1)
    reader = subscriber(log)
    assert reader.poll(0) is not None
    truth = dict(publish(made, world) for _ in range(9))
    versions = drain(reader)
    assert versions[0].manifest.kind == "snapshot"
    assert [m.version for v in versions for m in v.covers] == list(range(2, 11)), "every version covered exactly once"
    assert _apply(versions) == truth[10]


def test_chunks_without_a_manifest_are_nothing() -> None:
    log, made, world, truth = history(2)
    producer = made._producer
    producer.fail_at = 2  # type: ignore[attr-defined]
    with pytest.raises(Exception, match="broke"):
        publish(made, world)
    reader = subscriber(log)
    versions = drain(reader)
    assert _apply(versions) == truth[versions[-1].manifest.version] and versions[-1].manifest.version == 2
    number, state = publish(made, world)
    (healed,) = drain(reader)
    assert (healed.manifest.version, healed.manifest.kind) == (number, "snapshot")
    assert _apply([*versions, healed]) == state


@pytest.mark.parametrize("lost", ["manifest", "chunk"])
def test_a_delta_is_never_applied_over_a_hole(lost: str) -> None:
    log, _, _, truth = history(4, snapshot_every=50)
    manifest = _manifest(log, 3)
    before = rejected()
    if lost == "manifest":
        del log.records[MANIFESTS][_offset(log, 3)]
    else:
        del log.records[WEIGHTS][manifest.chunks[-1].offset]
    versions = drain(subscriber(log))
    assert _apply(versions) == truth[2]
    assert rejected_since(before) == ({"gap": 1} if lost == "manifest" else {"truncated": 1, "gap": 1})


def test_the_next_snapshot_heals_and_covers_what_was_refused() -> None:
    log, made, world, _ = history(2, snapshot_every=4)
    reader = subscriber(log)
    state = State()
    for version in drain(reader):
        state.apply(version)
    publish(made, world)
    log.replace(WEIGHTS, _manifest(log, 3).chunks[0].offset, value=b"x" * _manifest(log, 3).chunks[0].size)
    before = rejected()
    assert drain(reader) == [] and rejected_since(before) == {"digest": 1}
    while (done := publish(made, world))[0] and _manifest(log, done[0]).kind == "delta":
        assert drain(reader) == []
    (healed,) = drain(reader)
    state.apply(healed)
    assert state == done[1]
    assert [m.version for m in healed.covers] == list(range(3, done[0] + 1))


def test_a_damaged_newest_snapshot_falls_back_to_the_one_before() -> None:
    log, _, _, truth = history(8)
    snapshots = [v for v in truth if _manifest(log, v).kind == "snapshot"]
    newest = snapshots[-1]
    log.truncate(WEIGHTS, 0)
    log.replace(WEIGHTS, _manifest(log, newest).chunks[0].offset, value=None)
    versions = drain(subscriber(log))
    assert versions[0].manifest.version == snapshots[-2]
    assert _apply(versions) == truth[newest - 1]


def test_a_log_cut_by_retention_waits_for_a_snapshot() -> None:
    log, made, world, _ = history(4, snapshot_every=50)
    log.truncate(WEIGHTS, _manifest(log, 3).chunks[0].offset)
    before = rejected()
    reader = subscriber(log)
    assert drain(reader) == []
    assert rejected_since(before) == {"truncated": 1, "gap": 3}
    made._parent = None
    number, truth = publish(made, world)
    versions = drain(reader)
    assert versions[0].manifest.version == number and _apply(versions) == truth


def test_manifests_cut_by_retention_while_we_read() -> None:
    log, made, world, _ = history(3, snapshot_every=50)
    reader = subscriber(log)
    state = _apply(drain(reader))
    publish(made, world)
    made._parent = None
    number, truth = publish(made, world)
    log.truncate(MANIFESTS, _offset(log, number))
    (version,) = drain(reader)
    state.apply(version)
    assert version.manifest.version == number and state == truth


def test_a_compacted_log_reads_the_same() -> None:
    log, _, _, truth = history(12)
    log.append(MANIFESTS, CLAIM_KEY, encode(ClaimRecord(1, 12)))
    log.compact()
    assert _apply(drain(subscriber(log))) == truth[12]


def test_a_fenced_trainer_is_refused_and_its_successor_served() -> None:
    log, first, world, _ = history(3, snapshot_every=50)
    reader = subscriber(log)
    state = _apply(drain(reader))
    second, _ = publisher(log)
    first._look_for_successor = lambda epoch: None  # type: ignore[method-assign]  # the look came just too early
    second.claim()
    other = World(8)
    publish(first, other)
    before = rejected()
    assert drain(reader) == [] and rejected_since(before) == {"epoch": 1}
    number, truth_ = publish(second, world)
    assert number == 4, "the fenced trainer used the same number"
    (version,) = drain(reader)
    state.apply(version)
    assert state == truth_
    publish(first, other)
    publish(second, world)
    assert [v.manifest.epoch for v in drain(reader)] == [version.manifest.epoch]
    assert _apply(drain(subscriber(log))) == world.state(), "and for a reader that starts now"


def test_an_epoch_that_nobody_claimed_is_refused() -> None:
    log, _, _, truth = history(3, snapshot_every=50)
    reader = subscriber(log)
    state = _apply(drain(reader))
    log.append(MANIFESTS, b"x", None)
    forged = msgspec.structs.replace(_manifest(log, 1), epoch=log.end[MANIFESTS] - 1, version=9)
    log.append(MANIFESTS, manifest_key(9), encode(forged))
    before = rejected()
    assert drain(reader) == [] and rejected_since(before) == {"epoch": 1, "schema": 1}
    assert state == truth[3]


def test_repeated_and_reordered_manifests() -> None:
    log, made, world, truth = history(3, snapshot_every=50)
    reader = subscriber(log)
    state = _apply(drain(reader))
    again = log.records[MANIFESTS][_offset(log, 2)]
    before = rejected()
    log.append(MANIFESTS, again.key, again.value)
    assert drain(reader) == [] and rejected_since(before) == {"gap": 1}
    publish(made, world)
    number, _ = publish(made, world)
    a, b = _offset(log, number - 1), _offset(log, number)
    ra, rb = log.records[MANIFESTS][a], log.records[MANIFESTS][b]
    log.replace(MANIFESTS, a, key=rb.key, value=rb.value)
    log.replace(MANIFESTS, b, key=ra.key, value=ra.value)
    assert drain(reader) == [] and state == truth[3]
    made._parent = None
    _, final = publish(made, world)
    (version,) = drain(reader)
    state.apply(version)
    assert state == final


@pytest.mark.parametrize(
    ("payload", "changes", "reason"),
    [
        ({"dense/w": torch.tensor([float("nan"), 0.0])}, {}, "nonfinite"),
        ({"dense/w": torch.zeros(3)}, {}, "shape"),
        ({"dense/w": torch.zeros(2), "dense/v": torch.zeros(1)}, {}, "shape"),
        ({"dense/w": torch.ones(2)}, {"model": MODEL | {"dim": 9}}, "schema"),
        ({"dense/w": torch.ones(2)}, {"parent": 0}, "gap"),
    ],
)
def test_a_publisher_that_does_not_look_is_refused_by_the_reader(
    payload: Payload, changes: dict, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, _ = publisher(log := MemoryLog())
    made.claim()
    made.publish("snapshot", {"dense/w": torch.zeros(2)}, facts())
    reader = subscriber(log)
    assert reader.poll(0) is not None
    from streamgr.weights import payload as payloads
    from streamgr.weights import publisher as module

    with monkeypatch.context() as patch:
        patch.setattr(payloads, "check", lambda _: None)
        patch.setattr(payloads, "require_same_form", lambda *_: None)
        patch.setattr(module, "require_model", lambda *_: None)
        made.publish("delta", payload, facts(model=changes.get("model")))
    if "parent" in changes:
        manifest = msgspec.structs.replace(_manifest(log, 2), **changes)
        log.replace(MANIFESTS, _offset(log, 2), value=encode(manifest))
    before = rejected()
    assert reader.poll(0) is None
    assert rejected_since(before) == {reason: 1}


def test_a_broker_that_is_away_delays_and_breaks_nothing() -> None:
    log, made, world, _ = history(2)
    log.away = True
    reader = subscriber(log)
    before = rejected()
    assert reader.poll(0) is None
    log.away = False
    state = _apply(drain(reader))
    _, truth = publish(made, world)
    log.away = True
    assert reader.poll(0.05) is None
    log.away = False
    (version,) = drain(reader)
    state.apply(version)
    assert state == truth and rejected_since(before) == {}


damages = st.lists(
    st.tuples(
        st.sampled_from(["drop", "flip", "cut", "swap", "null", "key", "truncate", "repeat"]),
        st.sampled_from([WEIGHTS, MANIFESTS]),
        st.integers(0, 10_000),
        st.integers(0, 10_000),
    ),
    min_size=1,
    max_size=4,
)


@cache
def _undamaged() -> tuple[MemoryLog, World, dict[int, State]]:
    log, _, world, truth = history(11, snapshot_every=4)
    return log, world, truth


@settings(max_examples=200, deadline=None)
@given(damages, st.integers(0, 11))
def test_any_damage_gives_a_true_state_or_a_named_refusal(harm: list[tuple[str, str, int, int]], seen: int) -> None:
    """Whatever the log went through: each version handed over gives exactly the trainer's state of that number."""
    whole, world, truth = _undamaged()
    log = whole.copy()
    reader = subscriber(log)
    log.end[MANIFESTS] = _offset(whole, seen) + 1 if seen else 1
    log.records[MANIFESTS] = {o: r for o, r in whole.records[MANIFESTS].items() if o < log.end[MANIFESTS]}
    served = drain(reader)  # up to version `seen`
    log.end, log.records[MANIFESTS] = dict(whole.end), dict(whole.records[MANIFESTS])
    before, passed = rejected(), reader._manifests.next_offset
    for damage in harm:
        _damage(log, *damage)
    served += drain(reader)
    state, orders = State(), [v.manifest.order for v in served]
    for version in served:
        state.apply(version)
        assert state == truth[version.manifest.version]
    assert orders == sorted(set(orders))
    if not served or served[-1].manifest.version < 11:
        lost_tail = not any(_is(log, offset, 11) for offset in log.records[MANIFESTS] if offset >= passed)
        waits = bool(reader._path)  # its last chunk is gone and nothing has come after it yet
        assert rejected_since(before) or lost_tail or waits, f"silent: {orders}"
    successor, _ = publisher(log)
    successor.claim(at_least=11)
    successor.publish("snapshot", world.snapshot(), facts(12))
    healed = drain(reader)
    assert healed and healed[-1].manifest.version == 12, "the next snapshot did not heal"
    state.apply(healed[-1])
    assert state == truth[11]


def _damage(log: MemoryLog, kind: str, topic: str, where: int, what: int) -> None:
    offsets = sorted(log.records[topic])
    if not offsets:
        return
    at = offsets[where % len(offsets)]
    record = log.records[topic][at]
    value = record.value or b""
    if kind == "drop":
        del log.records[topic][at]
    elif kind == "flip" and value:
        bit = what % (8 * len(value))
        damaged = bytearray(value)
        damaged[bit // 8] ^= 1 << bit % 8
        log.replace(topic, at, value=bytes(damaged))
    elif kind == "cut":
        log.replace(topic, at, value=value[: what % (len(value) + 1)])
    elif kind == "swap":
        other = log.records[topic][offsets[what % len(offsets)]]
        log.replace(topic, at, key=other.key, value=other.value)
        log.replace(topic, other.offset, key=record.key, value=record.value)
    elif kind == "null":
        log.replace(topic, at, value=None)
    elif kind == "key":
        log.replace(topic, at, key=b"claim" if what % 2 else b"manifest/3")
    elif kind == "truncate":
        log.truncate(topic, at)
    elif kind == "repeat":
        log.append(topic, record.key, record.value)


def _apply(versions: list) -> State:
    state = State()
    for version in versions:
        state.apply(version)
    return state


def _offset(log: MemoryLog, version: int) -> int:
    return max(o for o in log.records[MANIFESTS] if _is(log, o, version))


def _manifest(log: MemoryLog, version: int) -> Manifest:
    offset = _offset(log, version)
    record = log.records[MANIFESTS][offset]
    manifest = decode(record.key, record.value, offset)
    assert isinstance(manifest, Manifest)
    return manifest


def _is(log: MemoryLog, offset: int, version: int) -> bool:
    record = log.records[MANIFESTS][offset]
    return record.key == manifest_key(version) and b'"version":%d,' % version in (record.value or b"")
