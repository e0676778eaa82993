"""Sequence models over item tokens that differ in nothing but the layers between input and output.

Everybody gets the item vectors * sqrt(D) plus learned absolute positions (as the public research code has them) and a
dropout; queries and items of length 1, their cosine over a temperature, and the softmax over all items, or over
negatives drawn evenly and shared by the batch; every position is a target (every interaction counts as positive, as
there).

    hstu           our own `model.hstu.Stack`, preset `paper`
    hstu -rab      the same without its position and time bias
    hstu softmax   that with softmax attention in the place of pointwise: what is not seen is masked before the softmax
                   (the public code's own variant masks after it, and so lets the future into the normaliser)
    sasrec         a Transformer whose feed-forward is as wide as itself
    transformer    one whose feed-forward is four times as wide
"""

from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from streamgr import config
from streamgr.lab.baselines import transformer
from streamgr.lab.full_softmax import full_softmax
from streamgr.lab.leave_one_out import Windows
from streamgr.model import attention_blocks
from streamgr.model.attention import Attend
from streamgr.model.hstu import Layer, Stack, normal
from streamgr.model.tokens import Tokens


class Shape(msgspec.Struct, frozen=True, kw_only=True):
    """What every model has alike. length: of the longest sequence. negatives 0: the softmax runs over all items."""

    dim: int = 64
    heads: int = 1
    layers: int = 2
    length: int = 200
    dropout: float = 0.2
    negatives: int = 0
    temperature: float = 0.05


class Hstu(nn.Module):
    """HSTU's stack: f32[T, D] -> f32[T, D]. Dropout as in the research code: of what the gate lets through."""

    def __init__(
        self, shape: Shape, generator: torch.Generator, attend: Attend, plan: Callable[[Tokens], Any], n: int
    ) -> None:
        """n: the constant that values are divided by."""
        super().__init__()
        settings = config.Model(
            dim=shape.dim, heads=shape.heads, layers=shape.layers, scaling_seqlen=n, position_buckets=shape.length + 1
        )
        self.stack, self._plan = Stack(settings, generator, attend), plan
        for layer in self.stack.layers:  # dropout(norm(attended) * u) = dropout(norm(attended)) * u
            assert isinstance(layer, Layer)
            layer.attended_norm = nn.Sequential(layer.attended_norm, nn.Dropout(shape.dropout))  # type: ignore[assignment]

    def forward(self, x: Tensor, tokens: Tokens) -> Tensor:
        out: Tensor = self.stack(x, self._plan(tokens))[0]
        return out


def hstu(shape: Shape, generator: torch.Generator, bias: bool = True) -> nn.Module:
    """Pointwise attention, with the relative biases or without."""

    def unbiased(q: Tensor, k: Tensor, v: Tensor, position: Any, time: Any, plan: Any) -> Tensor:  # noqa: PLR0917
        return attention_blocks.attend(q, k, v, None, None, plan)

    model = Hstu(shape, generator, attention_blocks.attend if bias else unbiased, lambda _: None, shape.length)
    seen = model.stack.shape
    model._plan = lambda tokens: attention_blocks.plan(tokens, seen)
    return model


def hstu_softmax(shape: Shape, generator: torch.Generator) -> nn.Module:
    """Softmax is its own normaliser: N is 1."""

    def attend(q: Tensor, k: Tensor, v: Tensor, position: Any, time: Any, plan: Any) -> Tensor:  # noqa: PLR0917
        return transformer.attend(q, k, v, plan)

    return Hstu(shape, generator, attend, transformer.Plan, 1)


def widened(times: int) -> Callable[[Shape, torch.Generator], nn.Module]:
    """A Transformer with a feed-forward of so many times its width."""
    return lambda shape, generator: transformer.Transformer(
        shape.dim, shape.heads, shape.layers, generator, hidden=times * shape.dim, dropout=shape.dropout
    )


MODELS: dict[str, Callable[[Shape, torch.Generator], nn.Module]] = {
    "hstu": hstu,
    "hstu -rab": lambda shape, generator: hstu(shape, generator, bias=False),
    "hstu softmax": hstu_softmax,
    "sasrec": widened(1),
    "transformer": widened(4),
}


class Recommender(nn.Module):
    """Item vectors and positions in, a model between, cosines out."""

    def __init__(self, model: str, shape: Shape, count: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.shape = shape
        self.items = normal((count, shape.dim), generator)
        self.positions = normal((shape.length, shape.dim), generator, shape.dim**-0.5)
        self.dropout = nn.Dropout(shape.dropout)
        self.encoder = MODELS[model](shape, generator)

    def queries(self, given: Windows) -> Tensor:
        """f32[T, D], of length 1 / temperature."""
        vectors = F.embedding(torch.from_numpy(given.items), self.items) * self.shape.dim**0.5
        placed = vectors + F.embedding(torch.from_numpy(given.tokens.visible), self.positions)
        hidden = self.encoder(self.dropout(placed), given.tokens)
        return F.normalize(hidden, dim=1, eps=1e-6) / self.shape.temperature

    def catalogue(self) -> Tensor:
        """f32[count, D], of length 1."""
        return F.normalize(self.items, dim=1, eps=1e-6)

    def loss(self, given: Windows, rng: np.random.Generator) -> Tensor:
        """Mean of -log softmax of what follows each token."""
        queries, catalogue = self.queries(given), self.catalogue()
        following = torch.from_numpy(given.following)
        if not self.shape.negatives:
            return full_softmax(queries, catalogue, following)[0]
        drawn = torch.from_numpy(rng.choice(len(catalogue), self.shape.negatives, replace=False))
        own = (queries * F.embedding(following, catalogue)).sum(1, keepdim=True)
        others = (queries @ catalogue[drawn].T).masked_fill(following[:, None] == drawn, -torch.inf)
        return (torch.logsumexp(torch.cat([own, others], 1), 1) - own.squeeze(1)).mean()

    @torch.no_grad()
    def score(self, given: Windows) -> Tensor:
        """f32[b, count]: what follows each window."""
        return self.queries(given)[torch.from_numpy(given.last)] @ self.catalogue().T
