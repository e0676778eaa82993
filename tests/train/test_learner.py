"""A step is a function of the state before it and of the batch; growth and checkpoints in the middle do not show."""

import numpy as np
import pytest
import torch
from torch import Tensor

from streamgr.config import Config, Model, Table, Trainer
from streamgr.events import FIRST_ACTION, IMPRESSION
from streamgr.model.table import ITEM
from streamgr.model.tokens import Layout
from streamgr.train import learner as learners
from streamgr.train.batch import Batch, assemble
from streamgr.train.learner import Learner, Predictions
from tests.train.kit import example

START = 1_700_000_000_000
ITEMS = [f"i{n}" for n in range(300)]


def settings(
    optimizer: str = "adagrad", slots: int = 64, grows: bool = False, ttl: float = 400.0, **more: int
) -> Config:
    return Config(
        model=Model(dim=8, layers=1, heads=2, position_buckets=64, time_buckets=16, negatives=16, **more),
        table=Table(slots=slots, max_slots=16 * slots * grows, bucket_width=8, fallback_rows=16, ttl_seconds=ttl),
        trainer=Trainer(
            threads=1, table_optimizer=optimizer, table_half_life_steps=50.0, dense_learning_rate=0.01, seed=3
        ),
    )


def batches(count: int, seed: int = 0) -> list[Batch]:
    """Slates of four, some clicked, on a catalogue that moves on: ids come, are learned and expire."""
    r = np.random.default_rng(seed)
    made, past = [], []
    for n in range(count):
        examples = []
        for user in range(3):
            now = START + 10_000 * n + 100 * user
            items = [ITEMS[(5 * n + int(x)) % len(ITEMS)] for x in r.zipf(1.5, 4) % 40]
            shown = [(IMPRESSION, item, now, 3 * n + user + 1) for item in items]
            clicked = r.random(4) < 0.4
            history = [*past[-8:], *shown]
            examples.append(
                example(
                    (n, user), events=history, targets=range(len(history) - 4, len(history)),
                    labels=clicked.astype(int).tolist(), watermark=now,
                )
            )  # fmt: skip
            past = [*history, *((FIRST_ACTION, i, now + 50, 0) for i, on in zip(items, clicked, strict=True) if on)]
        made.append(assemble(examples, Layout(2)))
    return made


def state(learner: Learner) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in learner.state().items()}


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def bits(predictions: Predictions) -> tuple[list[int], list[int], int]:
    return predictions.probabilities.view(np.int32).tolist(), predictions.rank.tolist(), predictions.live


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table is asked every fourth step whether it should grow."""
    monkeypatch.setattr(learners, "GROW_STEPS", 4)


@pytest.mark.parametrize("optimizer", ["adagrad", "adam"])
def test_the_same_steps_give_the_same_bits_however_often_they_are_interrupted(optimizer: str, often: None) -> None:
    """In one go, again in one go, and by way of checkpoints: before the growths, between and after them."""
    made, rules = batches(24), settings(optimizer, slots=16, grows=True, ttl=90.0, batch_negatives=8)
    once, twice, interrupted = (Learner(rules) for _ in range(3))
    sizes = []
    for n, batch in enumerate(made):
        if n in (3, 9, 10, 17):
            kept, step, watermark = state(interrupted), interrupted.step, interrupted.watermark_ms
            interrupted = Learner(rules)
            interrupted.load_state(kept, step, watermark)
        first, *others = (bits(learner.learn(batch)[0]) for learner in (once, twice, interrupted))
        assert others == [first, first]
        sizes.append(len(once.table.index))
    assert same(state(once), state(twice)) and same(state(once), state(interrupted))
    assert len(set(sizes)) >= 3 and sizes[3] > 16
    stats = once.table.stats()
    assert stats.expiries and stats.evictions + stats.unplaced


@pytest.mark.parametrize("optimizer", ["adagrad", "adam"])
def test_growth_in_the_middle_of_training_changes_no_prediction(optimizer: str) -> None:
    """Of any id, at once; and not what a step makes of any of them, as long as it draws the same negatives."""
    made, rules = batches(14), settings(optimizer, slots=256)
    one, two = Learner(rules), Learner(rules)
    for batch in made[:10]:
        one.learn(batch)
        two.learn(batch)
    keys = np.concatenate([one.table.live(0)[1], np.arange(50, dtype=np.uint64)])

    def predicted(learner: Learner) -> Tensor:
        return learner.table.vectors(learner.table.lookup(keys, watermark_ms=learner.watermark_ms))

    before = predicted(two)
    two._grow()
    assert len(two.table.index) == 512 and torch.equal(predicted(two), before)
    probabilities = [learner.learn(made[10])[0].probabilities for learner in (one, two)]
    assert np.array_equal(*probabilities, equal_nan=True)
    assert not np.isnan(probabilities[0]).all()


def test_without_negatives_a_grown_table_learns_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows, weights and optimizer state have moved together: what follows is the same to the last bit, id by id."""
    nothing = learners.Negatives(np.zeros(0, np.int64), np.zeros(0, np.uint64), np.zeros(0, np.float32))
    monkeypatch.setattr(Learner, "_negatives", lambda *_: nothing)
    for optimizer in ("adagrad", "adam"):
        one, two = (Learner(settings(optimizer, slots=256)) for _ in range(2))
        for n, batch in enumerate(batches(20)):
            if n == 10:
                two._grow()
            probabilities = [learner.learn(batch)[0].probabilities for learner in (one, two)]
            np.testing.assert_allclose(*probabilities, rtol=1e-5)
        (rows, keys), (_, others) = one.table.live(one.watermark_ms), two.table.live(two.watermark_ms)
        assert np.array_equal(np.sort(keys), np.sort(others)) and len(rows) > 30
        moved = two.table.lookup(keys, watermark_ms=two.watermark_ms).rows_a
        torch.testing.assert_close(one.table.weight[rows], two.table.weight[moved], rtol=1e-4, atol=1e-6)
        for name, column in one.sparse.state.items():
            torch.testing.assert_close(column[rows], two.sparse.state[name][moved], rtol=1e-4, atol=1e-6)


def test_a_gradient_reaches_only_rows_of_the_ids_of_its_step() -> None:
    """P10; and of a row that was given to a new id the optimizer knows this step at most."""
    learner = Learner(settings("adam", slots=16))
    taken = 0
    for batch in batches(12):
        before, watermark = learner.table.weight.clone(), learner.watermark_ms
        held = {int(k): int(r) for r, k in zip(*learner.table.live(watermark), strict=True)}
        learner.learn(batch)
        moved = set(torch.nonzero((learner.table.weight != before).any(1)).flatten().tolist())
        own = {int(k): int(r) for r, k in zip(*learner.table.live(watermark), strict=True)}
        mine = set(range(1, learner.table.first_slot)) | set(own.values())
        assert moved <= mine and 0 not in moved
        named = set(batch.tokens.keys.tolist())
        given = {key: row for key, row in own.items() if held.get(key) != row}
        assert given.keys() <= named
        taken += len(set(given.values()) & set(held.values()))
        assert learner.sparse.state["steps"][list(given.values())].le(1).all()
    assert taken > 10 and learner.sparse.state["steps"][learner.table.first_slot :].max() > 3


def test_negatives_are_live_items_and_log_q_is_how_often_each_stands_among_them() -> None:
    """What is drawn evenly is; what the batch brings is told by the table's share."""
    learner = Learner(settings(slots=256, batch_negatives=6))
    for batch in batches(12):
        learner.learn(batch)
    batch, table = batches(13)[12], learner.table
    rows, keys = table.live(learner.watermark_ms, ITEM)
    own = batch.targets.keys[batch.targets.retrieved]
    counts, steps, sizes = np.zeros(len(table.weight)), 2000, set()
    for learner.step in range(steps):
        found = learner._negatives(batch)
        assert np.isin(found.rows, rows).all() and set(found.keys[16:].tolist()) <= set(own.tolist())
        assert np.array_equal(table.index.keys[found.rows - table.first_slot], found.keys)
        q = 16 / len(rows) + (len(found.rows) - 16) * table.share(found.rows)
        np.testing.assert_allclose(np.exp(found.log_q), q, rtol=1e-5)
        counts += np.bincount(found.rows, minlength=len(counts))
        sizes.add(len(found.rows))
    assert 16 < max(sizes) <= 22
    others = counts[rows[~np.isin(keys, own)]] / steps
    assert len(others) > 20 and others.mean() == pytest.approx(16 / len(rows), rel=0.03)
    assert np.abs(others / others.mean() - 1).max() < 0.2  # 500 of each, so that 4.5 % is a standard error
    learner.table.index.until_ms[:] = START  # all is over
    learner.watermark_ms = START + 10**9
    assert len(learner._negatives(batch).keys) == 0


def test_without_a_correction_asked_for_there_is_none() -> None:
    learner = Learner(settings(slots=256))
    for batch in batches(5):
        learner.learn(batch)
        found = learner._negatives(batch)
        assert len(found.keys) == 16 and not found.log_q.any()
