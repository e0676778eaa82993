"""What leaves the trainer is what it holds, byte for byte, whatever happened to the table and on the way."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import sha256

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streamgr import config
from streamgr.clock import SystemClock
from streamgr.errors import BrokerUnreachable, DataError
from streamgr.model import probe
from streamgr.model.recommender import Recommender
from streamgr.model.table import FEATURE, IdTable
from streamgr.train.guard import Guard
from streamgr.train.prequential import Prequential
from streamgr.train.versions import Published, Versions, Withheld
from streamgr.weights import payload as payloads
from streamgr.weights.digest import StateDigest, row_hashes
from streamgr.weights.manifest import Learned, Manifest, decode
from streamgr.weights.publisher import Facts
from tests.weights import kit
from tests.weights.kit import MANIFESTS, WEIGHTS, MemoryLog

ACTIONS, DIM = ("click", "like"), 4
MODEL = config.Model(dim=DIM, layers=1, heads=2, position_buckets=16, time_buckets=8)
TABLE = config.Table(slots=16, max_slots=64, bucket_width=8, fallback_rows=4, ttl_seconds=10.0, user_ttl_seconds=3.0)


@dataclass
class Trainer:
    """A table that is stepped by hand, and its way out to a log in memory."""

    log: MemoryLog = field(default_factory=MemoryLog)
    watermark: int = 1_000_000

    def __post_init__(self) -> None:
        self.random = np.random.default_rng(1)
        self.table = IdTable(TABLE, DIM, seed=1)
        self.model = Recommender(MODEL, ACTIONS, seed=1)
        self.prequential = Prequential(ACTIONS, 100, 50.0)
        publisher, self.producer = kit.publisher(self.log, snapshot_every=5)
        publisher.claim()
        self.versions = Versions(
            publisher,
            Guard(config.Weights(), kit.quiet()),
            self.table,
            Recommender(MODEL, ACTIONS, seed=2),
            compared_targets=100,
            sync=lambda: None,
            clock=SystemClock(),
        )

    def step(self, keys: list[int], advance: int) -> None:
        """Admit, evict, expire; move what was touched, and the network."""
        ids = np.array(keys, np.uint64)
        fields = (ids % (FEATURE + 1)).astype(np.uint8)
        lookup = self.table.map(ids, np.full(len(ids), self.watermark), fields, watermark_ms=self.watermark)
        rows = np.union1d(lookup.rows_a, lookup.rows_b)
        self.table.weight[rows] += torch.from_numpy(self.random.normal(size=(len(rows), DIM))).float()
        self.table.touch(rows)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter += 0.01
        self.watermark += advance

    def cut(self) -> None:
        facts = Facts(
            {"slots": len(self.table.index)}, 1, 1, 1, self.watermark, {}, Learned.none(), {}
        )  # fmt: skip
        self.versions.cut(self.model.state_dict(), self.prequential, 1.0, facts)

    def wait(self) -> Published | Withheld | None:
        ended = None
        while self.versions.busy:
            ended = self.versions.ended(5.0)
        return ended


class Reader:
    """A scorer's table, kept from the log alone; it takes nothing whose digest is not the manifest's."""

    def __init__(self) -> None:
        self.table: IdTable | None = None
        self.dense: dict[str, torch.Tensor] = {}

    def take(self, log: MemoryLog, manifest: Manifest) -> None:
        chunks = [log.records[WEIGHTS][chunk.offset].value or b"" for chunk in manifest.chunks]
        assert [sha256(chunk).hexdigest() for chunk in chunks] == [chunk.sha256 for chunk in manifest.chunks]
        payload = payloads.decode(b"".join(chunks), manifest.tensors)
        part = {name.removeprefix("table/"): t for name, t in payload.items() if name.startswith("table/")}
        if manifest.kind == "snapshot":
            self.table = IdTable(msgspec.structs.replace(TABLE, slots=manifest.model["slots"]), DIM, seed=99)
            self.digest = StateDigest(len(self.table.weight))
        assert self.table is not None
        self.table.put_rows(part)
        self.digest.replace(part["rows"].numpy(), row_hashes(part))
        self.dense = {name.removeprefix("dense/"): t for name, t in payload.items() if name.startswith("dense/")}
        assert self.digest.text == manifest.state_digest, manifest.name()

    def require_same(self, trainer: Trainer) -> None:
        """Every row that is held, its key, life, field and served bytes; the network; and the probe's answer."""
        assert self.table is not None
        rows = trainer.table.snapshot_rows(trainer.watermark)
        assert np.array_equal(rows, self.table.snapshot_rows(trainer.watermark))
        mine, theirs = self.table.rows(rows), trainer.table.rows(rows)
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
        assert all(torch.equal(self.dense[name], value) for name, value in trainer.model.state_dict().items())

    def answer(self, manifest: Manifest) -> torch.Tensor:
        assert self.table is not None
        recommender = Recommender(MODEL, ACTIONS, seed=5).eval()
        recommender.load_state_dict(self.dense)
        keys = np.array(manifest.probe.keys, np.uint64)
        lookup = self.table.lookup(keys, watermark_ms=manifest.watermark_ms)
        return probe.ask(recommender, self.table.vectors(lookup))


def manifests(log: MemoryLog) -> Iterator[Manifest]:
    for offset, record in sorted(log.records[MANIFESTS].items()):
        if isinstance(content := decode(record.key, record.value, offset), Manifest):
            yield content


KEYS = st.lists(st.integers(0, 60), min_size=1, max_size=12)
OPERATIONS = st.one_of(
    st.tuples(st.just("step"), KEYS, st.sampled_from([0, 500, 2_500, 12_000])),
    st.tuples(st.just("ahead")),
    st.tuples(st.just("cut")),
    st.tuples(st.just("fail"), st.integers(0, 3)),
    st.tuples(st.just("poison")),
    st.tuples(st.just("grow")),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(OPERATIONS, min_size=5, max_size=40))
def test_what_is_published_is_what_is_held(operations: list[tuple]) -> None:
    trainer, follower = Trainer(), Reader()
    seen = 0

    def published() -> None:
        """The version just published brings one who follows, and one who has just come, to the trainer's state."""
        nonlocal seen
        every = list(manifests(trainer.log))
        assert len(every) == seen + 1
        seen = len(every)
        follower.take(trainer.log, every[-1])
        follower.require_same(trainer)
        fresh = Reader()
        for manifest in every[max(n for n, m in enumerate(every) if m.kind == "snapshot") :]:
            fresh.take(trainer.log, manifest)
        fresh.require_same(trainer)
        assert torch.allclose(
            fresh.answer(every[-1]), torch.tensor(every[-1].probe.logits), atol=probe.TOLERANCE, rtol=0
        )

    for name, *arguments in [*operations, ("cut",)]:
        if name == "step":
            trainer.step(*arguments)
        elif name == "grow":
            if 2 * len(trainer.table.index) <= TABLE.max_slots:
                trainer.table.grow()
        elif name == "ahead":  # from here on the thread copies while steps change what it copies
            if not trainer.versions.busy and trainer.versions.ahead is None:
                trainer.versions.copy_ahead(trainer.watermark)
        elif name == "cut":
            trainer.wait()
            trainer.cut()
            assert isinstance(trainer.wait(), Published)
            published()
        elif name == "fail":
            trainer.wait()
            trainer.producer.fail_at = arguments[0]
            trainer.cut()
            try:
                trainer.wait()
            except BrokerUnreachable:
                continue
            trainer.producer.fail_at = None
            published()  # it was shorter than that
        else:
            trainer.wait()
            row = trainer.table.first_slot
            kept = trainer.table.weight[row].clone()
            trainer.table.weight[row] = float("nan")
            trainer.table.touch(np.array([row]))
            trainer.cut()
            ended = trainer.wait()
            trainer.table.weight[row] = kept
            trainer.table.touch(np.array([row]))
            if isinstance(ended, Published):  # a snapshot does not hold a row that nobody has
                assert ended.manifest.kind == "snapshot"
                published()
            else:
                assert isinstance(ended, Withheld) and ended.verdict.reason == "nonfinite"
    trainer.versions.close()


def test_a_version_that_could_not_be_sent_is_whole_in_the_next_one() -> None:
    trainer, reader = Trainer(), Reader()
    trainer.cut()
    trainer.wait()
    trainer.step([1, 2, 3], 0)
    trainer.producer.fail_at = 1
    trainer.cut()
    with pytest.raises(BrokerUnreachable):
        trainer.wait()
    trainer.step([4], 0)
    trainer.cut()
    ended = trainer.wait()
    assert isinstance(ended, Published)
    assert (ended.manifest.version, ended.manifest.kind) == (3, "snapshot")
    reader.take(trainer.log, ended.manifest)
    reader.require_same(trainer)
    trainer.versions.close()


def test_a_version_that_was_refused_before_it_was_sent_leaves_no_trace_in_the_digest() -> None:
    trainer, reader = Trainer(), Reader()
    trainer.cut()
    trainer.wait()
    trainer.step([1, 2, 3], 0)
    trainer.versions.cut(
        trainer.model.state_dict(), trainer.prequential, 1.0, Facts({"slots": 1}, 1, 1, 1, 0, {}, Learned.none(), {})
    )
    with pytest.raises(DataError, match="weights of another model"):
        trainer.wait()
    trainer.step([1], 0)
    trainer.cut()
    ended = trainer.wait()
    assert isinstance(ended, Published)
    reader.take(trainer.log, ended.manifest)
    reader.require_same(trainer)
    trainer.versions.close()


def test_a_withheld_version_is_whole_in_the_next_delta() -> None:
    trainer, reader = Trainer(), Reader()
    trainer.step([9], 0)
    trainer.cut()
    trainer.wait()
    trainer.step([1, 2, 3], 0)
    row = int(trainer.table.lookup(np.array([9], np.uint64), watermark_ms=trainer.watermark).rows_a[0])
    trainer.table.weight[row] = float("inf")
    trainer.table.touch(np.array([row]))
    trainer.cut()
    ended = trainer.wait()
    assert isinstance(ended, Withheld) and f"first of them {row}" in ended.verdict.what
    assert trainer.log.end[MANIFESTS] == 2, "a claim and one version"
    trainer.table.weight[row] = 1.0
    trainer.step([4], 0)
    trainer.cut()
    ended = trainer.wait()
    assert isinstance(ended, Published)
    assert (ended.manifest.version, ended.manifest.kind, ended.manifest.parent) == (2, "delta", 1)
    for manifest in manifests(trainer.log):
        reader.take(trainer.log, manifest)
    reader.require_same(trainer)
    trainer.versions.close()


def test_what_changes_between_the_copy_and_the_cut_is_in_the_version() -> None:
    trainer, reader = Trainer(), Reader()
    trainer.step([1, 2, 3, 4, 5], 0)
    trainer.cut()
    trainer.wait()
    trainer.step([1, 2], 0)
    trainer.versions.copy_ahead(trainer.watermark)
    assert trainer.wait() is None and trainer.versions.ahead is not None
    early = set(trainer.versions.ahead.part["rows"].tolist())
    trainer.step([2, 3], 0)  # one row that was copied, and one that was not
    trainer.cut()
    ended = trainer.wait()
    assert isinstance(ended, Published) and ended.manifest.kind == "delta"
    named = ended.manifest.tensors["table/rows"].shape[0]
    assert len(early) < named == len(early | set(ended.cut.late["rows"].tolist()))
    for manifest in manifests(trainer.log):
        reader.take(trainer.log, manifest)
    reader.require_same(trainer)
    trainer.versions.close()


def test_a_snapshot_is_the_same_whether_it_was_copied_ahead_or_not() -> None:
    """Ids that expire, or change and then expire, between the copy and the cut are in neither."""
    manifests_, rows = [], []
    for ahead in (False, True):
        trainer = Trainer()
        trainer.step([1, 2, 3], 0)
        if ahead:
            trainer.versions.copy_ahead(trainer.watermark)
            assert trainer.wait() is None
        trainer.step([3, 4, 5], 4_000)
        trainer.step([5], 8_000)
        trainer.cut()
        ended = trainer.wait()
        assert isinstance(ended, Published) and ended.manifest.kind == "snapshot"
        assert ended.cut.ahead is None or set(ended.cut.ahead.part["keys"].tolist()) >= {1, 2, 3}
        manifests_.append(ended.manifest)
        rows.append(trainer.table.snapshot_rows(trainer.watermark))
        trainer.versions.close()
    assert manifests_[0].state_digest == manifests_[1].state_digest
    assert manifests_[0].tensors["table/rows"].shape == manifests_[1].tensors["table/rows"].shape == [len(rows[0])]
    assert len(rows[0]) == len(rows[1]) < 5 + TABLE.fallback_rows
