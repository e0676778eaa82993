"""Claims, numbers, snapshots when due, and what is refused before it is written."""

import pytest
import torch

from streamgr.errors import BrokerUnreachable, DataError, TryAgain
from streamgr.weights.manifest import ClaimRecord, Learned, decode
from streamgr.weights.publisher import Claim
from tests.weights.kit import MANIFESTS, MODEL, WEIGHTS, MemoryLog, World, facts, publish, publisher


def test_the_first_claim_starts_at_version_one_with_a_snapshot() -> None:
    made, _ = publisher(log := MemoryLog())
    assert made.claim() == Claim(epoch=0, last_version=0)
    assert made.snapshot_due()
    with pytest.raises(ValueError, match="snapshot come before a delta"):
        made.publish("delta", World(1).step(), facts())
    manifest = made.publish("snapshot", World(1).snapshot(), facts())
    assert (manifest.version, manifest.parent, manifest.epoch, manifest.kind) == (1, None, 0, "snapshot")
    assert not made.snapshot_due()
    assert isinstance(decode(*_record(log, MANIFESTS, 0)), ClaimRecord)
    assert decode(*_record(log, MANIFESTS, 1)) == manifest


def test_a_version_is_its_chunks_first_and_its_manifest_last() -> None:
    made, producer = publisher(log := MemoryLog())
    made.claim()
    order: list[str] = []
    send = producer.send_confirmed

    def recorded(topic: str, value: bytes | None, **named: object) -> int:
        order.append(topic)
        return send(topic, value, **named)  # type: ignore[arg-type]

    producer.send_confirmed = recorded  # type: ignore[method-assign,assignment]
    manifest = made.publish("snapshot", World(1).step(), facts())
    assert order == [WEIGHTS] * len(manifest.chunks) + [MANIFESTS] and len(manifest.chunks) > 1
    assert [log.records[WEIGHTS][c.offset].key for c in manifest.chunks] == [
        f"0/1/{i}".encode() for i in range(len(manifest.chunks))
    ]
    assert sum(len(log.records[WEIGHTS][c.offset].value or b"") for c in manifest.chunks) == manifest.bytes
    assert manifest.positions == {"t.examples": {0: 0, 3: 7}}


def test_a_second_trainer_goes_on_from_the_highest_version_and_ends_the_first() -> None:
    first, _ = publisher(log := MemoryLog())
    first.claim()
    world = World(2)
    assert [publish(first, world)[0] for _ in range(3)] == [1, 2, 3]
    second, _ = publisher(log)
    claim = second.claim()
    assert claim == Claim(epoch=log.end[MANIFESTS] - 1, last_version=3, last_step=3)
    held = log.end[WEIGHTS]
    with pytest.raises(TryAgain, match=f"claimed epoch {claim.epoch}"):
        publish(first, world)
    assert log.end[WEIGHTS] == held, "the fenced trainer wrote chunks all the same"
    assert second.snapshot_due()
    assert publish(second, world)[0] == 4
    with pytest.raises(TryAgain):  # for good
        publish(first, world)


def test_a_claim_knows_the_highest_version_after_compaction_and_from_the_checkpoint() -> None:
    first, _ = publisher(log := MemoryLog())
    first.claim()
    world = World(3)
    for _ in range(5):
        publish(first, world)
    log.compact()
    second, _ = publisher(log)
    assert second.claim().last_version == 5
    log.truncate(MANIFESTS, log.end[MANIFESTS])
    third, _ = publisher(log)
    assert third.claim(at_least=5).last_version == 5
    log.compact()
    fourth, _ = publisher(log)
    assert fourth.claim().last_version == 5, "the claim itself carries the number on"


def test_snapshots_are_due_by_count_and_by_bytes() -> None:
    made, _ = publisher(MemoryLog(), snapshot_every=4)
    made.claim()
    kinds = []
    for _ in range(9):
        kinds.append(made.snapshot_due())
        rows = 500 if kinds[-1] else 1
        column = torch.arange(rows)
        payload = {"table/rows": column, "table/keys": column, "table/until_ms": column}
        payload |= {"table/field": column.to(torch.uint8), "table/weight": torch.zeros(rows, 4, dtype=torch.bfloat16)}
        made.publish("snapshot" if kinds[-1] else "delta", payload, facts())
    assert kinds == [True, False, False, False] * 2 + [True]

    made, _ = publisher(MemoryLog(), snapshot_every=1_000)
    made.claim()
    small = {"dense/w": torch.zeros(10)}
    first = made.publish("snapshot", small, facts())
    second = made.publish("delta", small, facts())
    assert second.bytes == first.bytes and not made.snapshot_due()
    made.publish("delta", small, facts())
    assert made.snapshot_due(), "the deltas outweigh the snapshot"


def test_a_failed_publish_uses_up_its_number_and_makes_the_next_a_snapshot() -> None:
    for broken_at in range(4):  # one of three chunks, or the manifest
        made, producer = publisher(MemoryLog(), chunk_bytes=200)
        made.claim()
        world = World(5)
        publish(made, world)
        producer.fail_at = broken_at
        with pytest.raises(BrokerUnreachable):
            publish(made, world)
        assert made.snapshot_due()
        assert publish(made, world)[0] == 3


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        ({"dense/w": torch.tensor([1.0, float("nan")])}, "not finite"),
        ({"dense/w": torch.tensor([float("inf")])}, "not finite"),
        ({"dense/w": torch.zeros(2, dtype=torch.complex64)}, "may not cross the wire"),
        ({"optimizer/w": torch.zeros(2)}, "neither"),
        ({"table/rows": torch.zeros(2, dtype=torch.int64)}, "a table needs"),
    ],
)
def test_what_no_reader_would_take_is_not_published(payload: dict[str, torch.Tensor], message: str) -> None:
    made, _ = publisher(log := MemoryLog())
    made.claim()
    with pytest.raises(DataError, match=message) as raised:
        made.publish("snapshot", payload, facts())
    assert "the last version stays" in str(raised.value)
    assert log.end[WEIGHTS] == 0


def test_a_delta_must_have_its_parents_form_and_model() -> None:
    made, _ = publisher(MemoryLog())
    made.claim()
    made.publish("snapshot", {"dense/w": torch.zeros(2)}, facts())
    with pytest.raises(DataError, match="not of its parent's form: dense/w"):
        made.publish("delta", {"dense/w": torch.zeros(3)}, facts())
    with pytest.raises(DataError, match="layers: 2 is not 3"):
        made.publish("delta", {"dense/w": torch.zeros(2)}, facts(model=MODEL | {"layers": 3}))
    assert made.publish("delta", {"dense/w": torch.ones(2)}, facts()).parent == 1, "refusals cost nothing"


def test_a_snapshot_that_outgrows_its_topic_is_refused_with_the_remedy() -> None:
    made, _ = publisher(MemoryLog(), retention_bytes=4_000)
    made.claim()
    made.publish("snapshot", {"dense/w": torch.zeros(100)}, facts())
    with pytest.raises(DataError, match=r"below a quarter.*1000.*raise weights.retention_bytes"):
        made.publish("snapshot", {"dense/w": torch.zeros(300)}, facts())


def test_learned_targets_travel_with_the_version() -> None:
    made, _ = publisher(MemoryLog())
    made.claim()
    manifest = made.publish("snapshot", {"dense/w": torch.zeros(1)}, facts(5))
    assert Learned.unpack(manifest.learned).gradient_ms.tolist() == [1_000_009 + i for i in range(5)]


def _record(log: MemoryLog, topic: str, offset: int) -> tuple[bytes | None, bytes | None, int]:
    record = log.records[topic][offset]
    return record.key, record.value, offset
