"""Row-wise optimizers for the ID table: state by row, touched rows only. Dense parameters go to `torch.optim.AdamW`.

Both keep a row's own clock, so that untouched rows cost nothing, and start anew where a slot changes hands: the new id
must not inherit the old one's caution. Fallback rows are shared by many ids and learn at a quarter of the rate.
Gradients come summed per row, in float32 and in one fixed order (`Learner._gather`).

    Adagrad   acc = INITIAL + 2^(-s / half life) (acc - INITIAL) + mean_d g^2;   w -= lr g / sqrt(acc)

s is how many steps ago the row was last touched; without forgetting a hot id freezes while its meaning drifts on. From
0 a row's first step would have length lr whatever its gradient, which among newcomers is mostly noise; hence INITIAL.

    Adam      m = b1 m + (1 - b1) g;   v = b2 v + (1 - b2) mean_d g^2
              w -= lr m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)

with one v a row and t counted per row: bias correction by a global count would take an id's first step for its
thousandth (Kingma and Ba, 2015, algorithm 1, row-wise).
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from streamgr import config
from streamgr.errors import ConfigError

INITIAL = 0.03
FALLBACK_SHARE = 0.25
BETAS = 0.9, 0.99
EPSILON = 1e-6


class RowOptimizer(ABC):
    """Owns state for a table of `rows` rows, of which 1..`fallback_rows` are shared."""

    def __init__(self, rows: int, fallback_rows: int, learning_rate: float) -> None:
        self._shared, self._learning_rate = fallback_rows + 1, learning_rate
        self.state: dict[str, Tensor] = {}

    @abstractmethod
    def reset(self, rows: Tensor) -> None:
        """These rows (i64[k]) have been given to new ids."""

    @abstractmethod
    def _move(self, rows: Tensor, gradient: Tensor, now: int) -> Tensor:
        """What to go along, f32[k, D], at a rate of 1; the rows' state has taken the gradient in."""

    @torch.no_grad()
    def step(self, weight: Tensor, rows: Tensor, gradient: Tensor, now: int) -> None:
        """Move `weight` f32[R, D] in place at step `now`. rows i64[k] without repetitions; gradient f32[k, D]."""
        rate = torch.where(rows < self._shared, FALLBACK_SHARE * self._learning_rate, self._learning_rate)
        move = self._move(rows, gradient, now)
        weight.index_copy_(0, rows, weight.index_select(0, rows) - rate[:, None] * move)

    def grow(self, rows: int, before: Tensor, after: Tensor) -> None:
        """The table has so many rows now, and rows `before` have gone to `after`; shared rows stay where they are."""
        old = self.state
        self.state = {name: column.new_zeros((rows, *column.shape[1:])) for name, column in old.items()}
        self.reset(torch.arange(rows))
        for name, column in old.items():
            self.state[name][: self._shared] = column[: self._shared]
            self.state[name][after] = column[before]

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from `state`; `ConfigError` where it is another optimizer's."""
        if state.keys() != self.state.keys():
            raise ConfigError(
                f"the checkpoint holds the rows' {', '.join(sorted(state))}, not {', '.join(sorted(self.state))}",
                where="trainer.table_optimizer",
                remedy="start with the optimizer it was written with, or remove the trainer's state to train anew",
            )
        self.state = {name: state[name].clone() for name in self.state}


class RowAdagrad(RowOptimizer):
    """One accumulator a row, and when it was last touched."""

    def __init__(self, rows: int, fallback_rows: int, learning_rate: float, half_life_steps: float = 0.0) -> None:
        """half_life_steps: of what is remembered; 0: nothing is ever forgotten."""
        super().__init__(rows, fallback_rows, learning_rate)
        self._half_life = half_life_steps
        self.state = {"accumulator": torch.full((rows,), INITIAL), "touched": torch.zeros(rows, dtype=torch.int64)}

    def reset(self, rows: Tensor) -> None:
        self.state["accumulator"][rows] = INITIAL

    def _move(self, rows: Tensor, gradient: Tensor, now: int) -> Tensor:
        accumulator, touched = self.state["accumulator"], self.state["touched"]
        kept = accumulator.index_select(0, rows)
        if self._half_life:
            since = now - touched.index_select(0, rows)
            kept = INITIAL + (kept - INITIAL) * torch.exp2(-since / self._half_life)
        touched.index_fill_(0, rows, now)
        kept = kept + gradient.square().mean(dim=1)
        accumulator.index_copy_(0, rows, kept)
        return gradient / kept.sqrt()[:, None]


class RowAdam(RowOptimizer):
    """A first moment of the row's width, one second moment, and the row's own count of steps."""

    def __init__(self, rows: int, fallback_rows: int, learning_rate: float, dim: int) -> None:
        super().__init__(rows, fallback_rows, learning_rate)
        self.state = {
            "mean": torch.zeros(rows, dim),
            "square": torch.zeros(rows),
            "steps": torch.zeros(rows, dtype=torch.int64),
        }

    def reset(self, rows: Tensor) -> None:
        for column in self.state.values():
            column[rows] = 0

    def _move(self, rows: Tensor, gradient: Tensor, now: int) -> Tensor:
        first, second = BETAS
        mean, square, steps = (self.state[name].index_select(0, rows) for name in ("mean", "square", "steps"))
        mean, square, steps = mean.lerp(gradient, 1 - first), square * second, steps + 1
        square = square + (1 - second) * gradient.square().mean(dim=1)
        for name, column in (("mean", mean), ("square", square), ("steps", steps)):
            self.state[name].index_copy_(0, rows, column)
        scale = (square / (1 - second**steps)).sqrt() + EPSILON
        return mean / (scale * (1 - first**steps))[:, None]


def row_optimizer(settings: config.Trainer, rows: int, fallback_rows: int, dim: int) -> RowOptimizer:
    """As `trainer.table_optimizer` names it."""
    if settings.table_optimizer == "adam":
        return RowAdam(rows, fallback_rows, settings.table_learning_rate, dim)
    return RowAdagrad(rows, fallback_rows, settings.table_learning_rate, settings.table_half_life_steps)
