import torch

from streamgr.train.optim import INITIAL, RowAdagrad


def test_row_adagrad_matches_its_formula() -> None:
    weight = torch.ones(6, 2)
    optimizer = RowAdagrad(6, fallback_rows=2, learning_rate=0.1)
    rows = torch.tensor([1, 4])
    gradient = torch.tensor([[3.0, 4.0], [0.6, 0.8]])  # mean squares 12.5 and 0.5
    optimizer.step(weight, rows, gradient, 1)
    optimizer.step(weight, rows, gradient, 2)
    first, second = (0.1 * ((INITIAL + g) ** -0.5 + (INITIAL + 2 * g) ** -0.5) for g in (12.5, 0.5))
    assert torch.allclose(weight[1], 1 - first * gradient[0] / 4)  # a fallback row learns at a quarter of the rate
    assert torch.allclose(weight[4], 1 - second * gradient[1])
    assert torch.equal(weight[[0, 2, 3, 5]], torch.ones(4, 2))


def test_a_row_given_to_a_new_id_starts_with_an_empty_accumulator() -> None:
    optimizer = RowAdagrad(4, fallback_rows=2, learning_rate=0.1)
    fresh, old = torch.ones(4, 2), torch.ones(4, 2)
    row, gradient = torch.tensor([3]), torch.ones(1, 2)
    optimizer.step(old, row, gradient, 1)
    optimizer.reset(row)
    optimizer.step(fresh, row, gradient, 2)
    assert torch.equal(fresh, old)
