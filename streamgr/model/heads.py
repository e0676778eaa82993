"""What is read off the trunk: one logit per action kind at item tokens, and a query vector at action tokens."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from streamgr.model.hstu import normal, normalize

PRIOR_LOGIT = -2.0  # before anything is learned an action has p = 0.12: closer to life than one half


class RankingHead(nn.Module):
    """A shared hidden layer, then K logits: f32[m, D] -> f32[m, K]."""

    def __init__(self, dim: int, tasks: int, generator: torch.Generator) -> None:
        super().__init__()
        self.hidden = normal((dim, dim), generator, dim**-0.5)
        self.hidden_bias = nn.Parameter(torch.zeros(dim))
        self.out = normal((dim, tasks), generator)
        self.out_bias = nn.Parameter(torch.full((tasks,), PRIOR_LOGIT))

    def forward(self, hidden: Tensor) -> Tensor:
        inner = F.silu(torch.addmm(self.hidden_bias, normalize(hidden), self.hidden))
        return torch.addmm(self.out_bias, inner, self.out)


class RetrievalHead(nn.Module):
    """Unit query vectors from action tokens; `start` stands in where a user has not acted yet."""

    def __init__(self, dim: int, generator: torch.Generator) -> None:
        super().__init__()
        self.start = normal((dim,), generator)

    def forward(self, hidden: Tensor, index: Tensor) -> Tensor:
        """hidden f32[T, D], index i64[m] (-1: the start query) -> f32[m, D], of length 1."""
        rows = torch.cat([self.start[None, :], hidden]).index_select(0, index + 1)
        return F.normalize(rows, dim=-1, eps=1e-6)
