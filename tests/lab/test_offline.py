"""Leave one out as published, one trainer for all, and no model that sees what is to come."""

import gzip
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from streamgr.errors import DataError
from streamgr.lab.baselines import transformer
from streamgr.lab.full_softmax import full_softmax
from streamgr.lab.leave_one_out import TEST, TRAINING, VALIDATION, Interactions, Windows, evaluate, ranks, read, windows
from streamgr.lab.offline import Recipe, train
from streamgr.lab.sequential import MODELS, Recommender, Shape
from streamgr.lab.streaming import windows as stream_windows

SHAPE = Shape(dim=16, heads=2, layers=2, length=12, dropout=0.0)


def interactions(*users: list[int], count: int = 40) -> Interactions:
    items = np.concatenate([np.array(user) for user in users])
    offsets = np.append(0, np.cumsum([len(user) for user in users]))
    return Interactions(offsets, items, np.arange(len(items)) * 60_000, count)


def walks(users: int, length: int, count: int, seed: int) -> Interactions:
    """Users who go from item to item, mostly to the next one."""
    rng = np.random.default_rng(seed)
    steps = np.where(rng.random((users, length)) < 0.85, 1, rng.integers(2, count, (users, length)))
    return interactions(*(list(row % count) for row in np.cumsum(steps, 1)), count=count)


def _spans(data: Interactions) -> tuple[np.ndarray, np.ndarray]:
    return data.offsets[:-1], data.offsets[1:]


def test_the_last_item_is_the_test_and_the_one_before_it_the_validation() -> None:
    data = interactions([1, 2, 3, 4, 5, 6], [7, 8, 9, 10])
    both = np.array([0, 1])
    test, validation, training = (windows(data, both, place, 3) for place in (TEST, VALIDATION, TRAINING))
    assert test.items.tolist() == [3, 4, 5, 7, 8, 9] and test.following[test.last].tolist() == [6, 10]
    assert validation.items.tolist() == [2, 3, 4, 7, 8] and validation.following[validation.last].tolist() == [5, 9]
    assert training.items.tolist() == [1, 2, 3, 7] and training.following.tolist() == [2, 3, 4, 8]
    assert not {5, 6, 9, 10} & {*training.items.tolist(), *training.following.tolist()}
    assert test.tokens.visible.tolist() == [0, 1, 2, 0, 1, 2]
    assert np.array_equal(test.tokens.query_times, data.times[[3, 4, 5, 7, 8, 9]])  # of what came next


def test_ties_in_time_stay_in_the_file_s_order(tmp_path: Path) -> None:
    path = tmp_path / "events.csv.gz"
    rows = [("b", item, 5) for item in "zyxwv"] + [("a", "z", 3), ("a", "y", 2), ("a", "x", 2), ("a", "w", 1)]
    with gzip.open(path, "wt") as file:
        file.write("ts_ms,user,item\n" + "".join(f"{time},{user},{item}\n" for user, item, time in rows))
        file.write("1,short,z\n")
    data = read(path)
    names = np.array(list("vwxyz"))
    assert "".join(names[data.items]) == "wyxz" + "zyxwv" and data.count == 5
    path.write_bytes(b"not gzip")
    with pytest.raises(DataError, match=r"events\.csv\.gz"):
        read(path)


def test_a_line_a_user(tmp_path: Path) -> None:
    path = tmp_path / "sequences.txt.gz"
    with gzip.open(path, "wt") as file:
        file.write("1 30 10 20 40\n2 10 40 30 20\n")
    data = read(path)
    assert data.items.tolist() == [2, 0, 1, 3, 0, 3, 2, 1] and data.offsets.tolist() == [0, 4, 8]


def test_ties_count_against_the_model_and_what_was_seen_is_left_out() -> None:
    data = interactions([0, 1, 2, 3], [4, 5, 4, 4], count=6)
    scores = torch.tensor([[9.0, 9.0, 9.0, 1.0, 1.0, 0.0], [0.0, 1.0, 2.0, 3.0, 9.0, 9.0]])
    assert ranks(scores, data, np.array([0, 1]), TEST).tolist() == [2, -1]  # tied with item 4; had before
    assert ranks(torch.zeros(2, 6), data, np.array([0, 1]), TEST).tolist() == [3, -1]
    assert ranks(torch.full((2, 6), torch.nan), data, np.array([0, 1]), TEST).tolist() == [3, -1]
    assert ranks(scores, data, np.array([0, 1]), VALIDATION).tolist() == [1, -1]


def test_a_perfect_and_a_constant_scorer() -> None:
    data = walks(30, 9, 80, seed=1)
    asked = data.items[data.offsets[1:] - 1]
    perfect = evaluate(
        lambda given: F.one_hot(torch.from_numpy(given.following[given.last]), 80).float(), data, TEST, 5
    )
    constant = evaluate(lambda given: torch.zeros(len(given.last), 80), data, TEST, 5)
    again = np.array([item in data.items[s : e - 1] for s, e, item in zip(*_spans(data), asked, strict=True)])
    assert perfect.hr_10 == perfect.ndcg_10 == pytest.approx(1 - again.mean())
    assert constant.hr_10 == constant.hr_50 == 0


def test_the_full_softmax_is_cross_entropy() -> None:
    generator = torch.Generator().manual_seed(1)
    queries, catalogue = torch.randn(300, 8, generator=generator), torch.randn(57, 8, generator=generator)
    target = torch.randint(0, 57, (300,), generator=generator)
    found = []
    for blocked in (True, False):
        q, c = queries.clone().requires_grad_(), catalogue.clone().requires_grad_()
        loss = full_softmax(q, c, target)[0] if blocked else F.cross_entropy(q @ c.T, target)
        (3 * loss).backward()
        found.append((loss.detach(), q.grad, c.grad))
    for ours, plain in zip(*found, strict=True):
        assert ours is not None and plain is not None
        torch.testing.assert_close(ours, plain)
    scores = queries @ catalogue.T
    expected = (scores >= scores.gather(1, target[:, None])).sum(1)
    assert torch.equal(full_softmax(queries, catalogue, target)[1], expected)
    assert full_softmax(torch.zeros(1, 8), catalogue, target[:1])[1].item() == 57


@pytest.mark.parametrize("model", MODELS)
def test_no_model_sees_what_is_to_come_or_who_is_beside_it(model: str) -> None:
    network = Recommender(model, SHAPE, 40, seed=3).eval()
    rng = np.random.default_rng(4)
    for parameter in network.parameters():  # away from an initial point at which nothing would be seen
        parameter.data += torch.from_numpy(rng.normal(0, 0.3, parameter.shape).astype(np.float32))
    data = interactions(*(list(rng.integers(0, 40, n)) for n in (13, 13, 6, 4)))
    together = windows(data, np.arange(4), TEST, 12)
    queries = network.queries(together).detach()
    alone = torch.cat([network.queries(windows(data, np.array([u]), TEST, 12)).detach() for u in range(4)])
    torch.testing.assert_close(queries, alone, rtol=1e-4, atol=1e-4)
    place = 7
    changed = together.items.copy()
    changed[place] = (changed[place] + 1) % 40
    after = network.queries(replace(together, items=changed)).detach()
    torch.testing.assert_close(after[:place], queries[:place], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(after[12:], queries[12:], rtol=1e-5, atol=1e-5)
    assert ((after - queries)[place:12].abs().amax(1) > 1e-3).all()  # all later ones of this user do see it


def test_softmax_attention_is_its_formula_and_normalised_before_the_mask_could_leak() -> None:
    generator = torch.Generator().manual_seed(5)
    lengths = [5, 3, 4]
    tokens = windows(interactions(*([0] * (n + 1) for n in lengths)), np.arange(3), TEST, 9).tokens
    q, k, v = (torch.randn(12, 2, 4, generator=generator) for _ in range(3))
    found = transformer.attend(q, k, v, transformer.Plan(tokens))
    start = 0
    for n in lengths:
        part = slice(start, start + n)
        scores = torch.einsum("ihd,jhd->hij", q[part], k[part]) / 2
        weights = scores.masked_fill(~torch.ones(n, n, dtype=torch.bool).tril(), -torch.inf).softmax(-1)
        torch.testing.assert_close(found[part], torch.einsum("hij,jhd->ihd", weights, v[part]))
        start += n
    with pytest.raises(ValueError, match="visible"):
        transformer.Plan(replace(tokens, visible=np.zeros_like(tokens.visible)))


@pytest.mark.parametrize("model", ["hstu", "sasrec"])
def test_the_trainer_learns_what_there_is_to_learn_and_repeats_itself(model: str) -> None:
    data = walks(150, 10, 30, seed=6)
    recipe = Recipe(users_a_batch=10, learning_rate=5e-3, epochs=8, evaluate_every=4)
    shape = Shape(dim=16, heads=1, layers=1, length=8, dropout=0.1)
    first, last = train(model, data, shape, recipe, seed=1)
    assert last.loss < first.loss and last.validation.ndcg_10 > 0.5
    again = [*train(model, data, shape, recipe, seed=1)][-1]
    assert (again.loss, again.validation, again.test) == (last.loss, last.validation, last.test)


def test_patience_ends_a_run() -> None:
    data = walks(20, 6, 30, seed=7)
    recipe = Recipe(learning_rate=0.0, epochs=50, evaluate_every=1, patience=2)
    epochs = [*train("sasrec", data, Shape(dim=8, layers=1, length=4), recipe, seed=1)]
    assert [epoch.number for epoch in epochs] == [1, 2, 3] and epochs[-1].best == 1


def test_sampled_negatives_leave_the_target_out() -> None:
    network = Recommender("sasrec", Shape(dim=8, layers=1, length=4, dropout=0.0, negatives=30), 30, seed=1)
    given = windows(walks(5, 6, 30, seed=8), np.arange(5), TRAINING, 4)
    sampled = network.loss(given, np.random.default_rng(1))
    everything = full_softmax(network.queries(given), network.catalogue(), torch.from_numpy(given.following))[0]
    torch.testing.assert_close(sampled, everything)


def test_a_record_is_a_window() -> None:
    given: Windows = stream_windows(np.array([[3, 1, 2], [5, 4, 6]]))
    assert given.items.tolist() == [3, 1, 5, 4] and given.following.tolist() == [1, 2, 4, 6]
    assert given.tokens.visible.tolist() == [0, 1, 0, 1] and given.last.tolist() == [1, 3]
