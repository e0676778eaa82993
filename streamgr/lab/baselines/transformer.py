"""The Transformer as sequence recommenders use it (SASRec, arXiv 1808.09781), causal, over jagged batches.

    x = x + dropout(out(softmax(q k^T / sqrt(d)) v))       q from the norm of x; k, v too
    x = x + dropout(down(dropout(act(up(norm(x))))))       hidden = D and ReLU in SASRec, 4 D elsewhere
    y = norm(x)

All before a position and itself are seen, nothing later: the same `Tokens` and masks as HSTU's, without window. The
attention weights have no dropout of their own, as HSTU's have none. Sequences of like length are padded side by side
(`jagged.blocks`); a padded key stands after every real query of its row, so causality alone hides it.
"""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from streamgr.model import jagged
from streamgr.model.hstu import EPS, normal
from streamgr.model.tokens import Tokens

PAIRS_A_BLOCK = 1 << 19  # scaled_dot_product_attention never holds them all


class Plan:
    """A batch's blocks: tokens i64[b, n] and real cells i64[k] of each; back i64[T]: where each token is in them."""

    def __init__(self, tokens: Tokens) -> None:
        lengths = np.diff(tokens.offsets)
        if not np.array_equal(tokens.visible, np.arange(len(tokens)) - np.repeat(tokens.offsets[:-1], lengths)):
            raise ValueError("a causal Transformer sees all that is before a token: `visible` says otherwise")
        self.blocks, places = [], []
        for block in jagged.blocks(tokens.offsets, PAIRS_A_BLOCK):
            cells = np.flatnonzero(block.real)
            self.blocks.append((torch.from_numpy(block.tokens), torch.from_numpy(cells)))
            places.append(block.tokens.reshape(-1)[cells])
        self.back = torch.from_numpy(np.argsort(np.concatenate(places)))


def attend(q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> Tensor:
    """softmax(q k^T / sqrt(d)) v over what is before each token and itself: f32[T, H, d] all."""
    parts = []
    for tokens, cells in plan.blocks:
        b, n = tokens.shape
        flat = tokens.view(-1)
        bq, bk, bv = (x.index_select(0, flat).view(b, n, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
        seen = F.scaled_dot_product_attention(bq, bk, bv, is_causal=True)
        parts.append(seen.transpose(1, 2).reshape(b * n, *v.shape[1:]).index_select(0, cells))
    return torch.cat(parts).index_select(0, plan.back)


class Layer(nn.Module):
    """Attention and feed-forward, each before a norm and beside a residual."""

    def __init__(self, dim: int, heads: int, hidden: int, dropout: float, generator: torch.Generator) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.inner_norm = nn.LayerNorm(dim, EPS), nn.LayerNorm(dim, EPS)
        self.qkv, self.out = xavier((dim, 3 * dim), generator), xavier((dim, dim), generator)
        self.up, self.down = xavier((dim, hidden), generator), xavier((hidden, dim), generator)
        self.qkv_bias, self.out_bias = nn.Parameter(torch.zeros(3 * dim)), nn.Parameter(torch.zeros(dim))
        self.up_bias, self.down_bias = nn.Parameter(torch.zeros(hidden)), nn.Parameter(torch.zeros(dim))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, plan: Plan) -> Tensor:
        """f32[T, D] -> f32[T, D]"""
        q, k, v = torch.addmm(self.qkv_bias, self.norm(x), self.qkv).view(len(x), 3, self.heads, -1).unbind(1)
        x = x + self.dropout(torch.addmm(self.out_bias, attend(q, k, v, plan).reshape(x.shape), self.out))
        inner = self.dropout(F.relu(torch.addmm(self.up_bias, self.inner_norm(x), self.up)))
        out: Tensor = x + self.dropout(torch.addmm(self.down_bias, inner, self.down))
        return out


class Transformer(nn.Module):
    """The layers and the last norm."""

    def __init__(
        self, dim: int, heads: int, layers: int, generator: torch.Generator, *, hidden: int, dropout: float
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(dim, heads, hidden, dropout, generator) for _ in range(layers))
        self.norm = nn.LayerNorm(dim, EPS)

    def forward(self, x: Tensor, tokens: Tokens) -> Tensor:
        """f32[T, D] -> f32[T, D]"""
        plan = Plan(tokens)
        for layer in self.layers:
            x = layer(x, plan)
        out: Tensor = self.norm(x)
        return out


def xavier(shape: tuple[int, int], generator: torch.Generator) -> nn.Parameter:
    """N(0, 2 / (in + out))."""
    return normal(shape, generator, (2 / sum(shape)) ** 0.5)
