import torch

from streamgr.train.optim import RowAdagrad


def test_row_adagrad_matches_its_formula() -> None:
    weight = torch.ones(6, 2)
    optimizer = RowAdagrad(6, fallback_rows=2, learning_rate=0.1)
    rows = torch.tensor([1, 4])
    gradient = torch.tensor([[3.0, 4.0], [0.6, 0.8]])
    optimizer.step(weight, rows, gradient)
    optimizer.step(weight, rows, gradient)
    step = 0.1 * (1 / (12.5**0.5) + 1 / (25**0.5)) * torch.tensor([3.0, 4.0])
    assert torch.allclose(weight[1], 1 - step / 4)  # a fallback row learns at a quarter of the rate
    assert torch.allclose(weight[4], 1 - step)  # the row's size does not matter, its direction does
    assert torch.equal(weight[[0, 2, 3, 5]], torch.ones(4, 2))


def test_a_row_given_to_a_new_id_starts_with_an_empty_accumulator() -> None:
    optimizer = RowAdagrad(4, fallback_rows=2, learning_rate=0.1)
    fresh, old = torch.ones(4, 2), torch.ones(4, 2)
    row, gradient = torch.tensor([3]), torch.ones(1, 2)
    optimizer.step(old, row, gradient)
    optimizer.reset(row)
    optimizer.step(fresh, row, gradient)
    assert torch.equal(fresh, old)
