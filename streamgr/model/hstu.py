"""The HSTU stack (arXiv 2402.17152): both published layers, as presets of one.

    u, v, q, k = split(x_normed @ uvqk)
    `paper` (research code):    SiLU on all four, norms without parameters, q . k + rab^{p,t} of the layer,
                                y = x + out(norm(attended) * u)
    `dlrm_v3` (production code): SiLU on u alone, affine norms, uvqk with bias, q . k / sqrt(d), no rab: position and
                                time are added to the tokens,  y = x + out([u, attended, norm(attended) * u])

attended = attend(q, k, v / N): no softmax, N a constant (`scaling_seqlen`) in both. `out` has a bias in `paper` only;
x itself is the residual; norms are layer norms over all heads together, eps 1e-6; there is no final norm.

Two things differ from that code. `dlrm_v3` counts positions back from the target and times back from the request, which
changes every row with every request; here both look back from the token itself (how many tokens it sees, how long ago
the last of them was), so one pass serves targets of many requests, and rows can be kept. And the time bias starts at 1
and the `paper` projection a little wider than N(0, .02): SiLU then weighs all of a history alike and positively, so a
layer starts as its mean and not as noise of either sign, which a stream seen once has no time to unlearn (a minute of
the demo's world, four seeds: normalized entropy .90 to .91 instead of .91 to .96).

What `forward` does for a batch, `extend` does for single rows after one history whose keys and values are at hand: a
row sees what its `View` says of them and, by a dot product, itself. Rows that came later than the history are appended
to it and see each other as far as they may; candidates (M-FALCON) are not, and never do.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from streamgr import config
from streamgr.model import attention
from streamgr.model.attention import Attend, time_bucket
from streamgr.model.rows import Ints

EPS = 1e-6
INIT_STD = 0.02
PROJECTION_STD = 0.05
PAIRS_A_PASS = 1 << 17  # of a row and a key, all heads: a micro-batch's scores stay in the processor's cache


@dataclass(frozen=True, slots=True)
class Preset:
    """What tells the published layers apart."""

    silu_on_all: bool
    scaled: bool
    affine: bool
    relative_bias: bool
    input_encoding: bool
    concatenated: bool


PRESETS = {
    "paper": Preset(
        silu_on_all=True,
        scaled=False,
        affine=False,
        relative_bias=True,
        input_encoding=False,
        concatenated=False,
    ),
    "dlrm_v3": Preset(
        silu_on_all=False,
        scaled=True,
        affine=True,
        relative_bias=False,
        input_encoding=True,
        concatenated=True,
    ),
}


def normalize(x: Tensor) -> Tensor:
    """Layer norm without parameters."""
    return F.layer_norm(x, x.shape[-1:], eps=EPS)


def normal(shape: Sequence[int], generator: torch.Generator, std: float = INIT_STD) -> nn.Parameter:
    """A parameter drawn from N(0, std)."""
    return nn.Parameter(torch.empty(*shape).normal_(0, std, generator=generator))


def uniform(shape: tuple[int, int], generator: torch.Generator, bound: float = 0.0) -> nn.Parameter:
    """A parameter drawn from U(-bound, bound); 0: Xavier's bound."""
    bound = bound or (6 / sum(shape)) ** 0.5
    return nn.Parameter(torch.empty(*shape).uniform_(-bound, bound, generator=generator))


class Norm(nn.Module):
    """Layer norm, with parameters or without."""

    def __init__(self, dim: int, affine: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim)) if affine else None
        self.bias = nn.Parameter(torch.zeros(dim)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, EPS)


@dataclass(frozen=True, slots=True)
class Seen:
    """What one layer keeps of a history: keys, and values divided by N, f32[n, H, d]."""

    keys: Tensor
    values: Tensor

    def upto(self, n: int) -> "Seen":
        """Of the first n tokens."""
        return Seen(self.keys[:n], self.values[:n])

    def plus(self, keys: Tensor, values: Tensor) -> "Seen":
        return Seen(torch.cat([self.keys, keys]), torch.cat([self.values, values]))


@dataclass(frozen=True, slots=True)
class View:
    """What r rows see of a history: the same of `attention`, row by row; r = 1: all rows see the same.

    columns i64[k]: the tokens that any of them sees, None: all; position, time i64[r, k]: buckets, own i64[r]: the time
    bucket of a row to itself; mask f32[r, k], 1 for what is seen, None: everything.
    """

    columns: Tensor | None
    position: Tensor
    time: Tensor
    own: Tensor
    mask: Tensor | None

    @classmethod
    def of(cls, visible: Ints, asked: Ints, own: Ints, times: Ints, shape: attention.Shape) -> "View":
        """visible, asked (query times), own (times) i64[r] of the rows; times i64[n] of the history. All ms."""
        column = np.arange(len(times))
        distance = visible[:, None] - column
        seen = distance > 0
        if shape.local_window:
            seen &= (distance <= shape.local_window) | (column < shape.global_prefix)
        elapsed = asked[:, None] - times
        columns = np.flatnonzero(seen.any(0))
        if sparse := len(columns) < len(times):
            distance, seen, elapsed = distance[:, columns], seen[:, columns], elapsed[:, columns]
        return cls(
            torch.from_numpy(columns) if sparse else None,
            torch.from_numpy(distance.clip(0, shape.positions - 1)),
            time_bucket(torch.from_numpy(elapsed), shape.times).long(),
            time_bucket(torch.from_numpy(asked - own), shape.times).long(),
            None if seen.all() else torch.from_numpy(seen.astype(np.float32)),
        )


class Layer(nn.Module):
    """One HSTU layer over D channels; `attend` is one of the twins of `attention`."""

    def __init__(self, settings: config.Model, generator: torch.Generator, attend: Attend) -> None:
        super().__init__()
        self.preset = preset = PRESETS[settings.preset]
        self.heads, self.scale, dim = settings.heads, settings.scaling_seqlen, settings.dim
        self.attend = attend
        self.norm, self.attended_norm = Norm(dim, preset.affine), Norm(dim, preset.affine)
        if preset.silu_on_all:
            self.uvqk = normal((dim, 4 * dim), generator, PROJECTION_STD)
        else:
            self.uvqk = uniform((dim, 4 * dim), generator)
        self.uvqk_bias = nn.Parameter(torch.zeros(4 * dim)) if preset.affine else None
        self.position_bias = self.time_bias = None
        if preset.relative_bias:
            self.position_bias = normal((settings.position_buckets,), generator)
            self.time_bias = nn.Parameter(normal((settings.time_buckets,), generator).detach() + 1)
        self.out = uniform(((3 if preset.concatenated else 1) * dim, dim), generator)
        self.out_bias = None if preset.concatenated else nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor, plan: Any) -> tuple[Tensor, Seen]:
        """f32[T, D] -> f32[T, D], and the layer's keys and values. plan: of `attend`."""
        u, v, q, k = self._project(x)
        attended = self.attend(q, k, v, self.position_bias, self.time_bias, plan)
        return self._finish(x, u, attended), Seen(k, v)

    def extend(self, x: Tensor, seen: Seen, view: View, *, append: bool) -> tuple[Tensor, Seen]:
        """Rows f32[r, D] after a history -> f32[r, D], and the history, with the rows where they are appended to it."""
        u, v, q, k = self._project(x)
        if append:
            seen = seen.plus(k, v)
        return self._finish(x, u, self._look(q, k, v, seen, view)), seen

    def _look(self, q: Tensor, k: Tensor, v: Tensor, seen: Seen, view: View) -> Tensor:
        """`attention` for some rows, f32[r, H, d], a micro-batch of them at a time."""
        keys, values = seen.keys, seen.values
        if view.columns is not None:
            keys, values = keys.index_select(0, view.columns), values.index_select(0, view.columns)
        keys, values = keys.permute(1, 2, 0), values.transpose(0, 1)
        own, bias = (q * k).sum(-1), None
        if self.position_bias is not None and self.time_bias is not None:
            own = own + (self.position_bias[0] + self.time_bias[view.own])[:, None]
            bias = self.position_bias[view.position] + self.time_bias[view.time]
        attended = F.silu(own)[:, :, None] * v
        size = max(1, PAIRS_A_PASS // max(1, self.heads * keys.shape[2]))
        for start in range(0, len(q), size):
            batch = slice(start, start + size)
            rows = batch if len(view.own) > 1 else slice(None)
            queries = q[batch].transpose(0, 1)
            scores = torch.bmm(queries, keys) if bias is None else torch.baddbmm(bias[rows], queries, keys)
            weights = F.silu(scores, inplace=True)
            if view.mask is not None:
                weights *= view.mask[rows]
            attended[batch] += torch.bmm(weights, values).transpose(0, 1)
        return attended

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """u f32[T, D], v / N, q, k f32[T, H, d]"""
        parts = self.norm(x) @ self.uvqk
        if self.uvqk_bias is not None:
            parts = parts + self.uvqk_bias
        if self.preset.silu_on_all:
            parts = F.silu(parts)
        u, v, q, k = parts.view(len(x), 4, self.heads, x.shape[1] // self.heads).unbind(1)
        if not self.preset.silu_on_all:
            u = F.silu(u)
        if self.preset.scaled:
            q = q * q.shape[-1] ** -0.5
        return u.reshape(x.shape), v / self.scale, q.contiguous(), k.contiguous()

    def _finish(self, x: Tensor, u: Tensor, attended: Tensor) -> Tensor:
        attended = attended.reshape(x.shape)
        gated = self.attended_norm(attended) * u
        if self.preset.concatenated:
            return torch.addmm(x, torch.cat([u, attended, gated], 1), self.out)
        assert self.out_bias is not None
        return torch.addmm(x + self.out_bias, gated, self.out)


class Encoding(nn.Module):
    """What `dlrm_v3` adds to the tokens: where they stand, and how long after what they see."""

    def __init__(self, settings: config.Model, generator: torch.Generator) -> None:
        super().__init__()
        self.times = settings.time_buckets
        self.position = uniform((settings.position_buckets, settings.dim), generator, settings.position_buckets**-0.5)
        self.time = uniform((settings.time_buckets, settings.dim), generator, settings.time_buckets**-0.5)

    def forward(self, visible: Tensor, waited: Tensor) -> Tensor:
        """visible i64[T]: how many tokens it sees; waited i64[T], ms: since the last of them -> f32[T, D]."""
        place = visible.clamp(max=len(self.position) - 1)
        bucket = time_bucket(waited, self.times).long()
        return self.position.index_select(0, place) + self.time.index_select(0, bucket)


class Stack(nn.Module):
    """The layers, one after another."""

    def __init__(self, settings: config.Model, generator: torch.Generator, attend: Attend) -> None:
        super().__init__()
        self.shape = attention.Shape.of(settings)
        self.encoded = PRESETS[settings.preset].input_encoding
        self.layers = nn.ModuleList(Layer(settings, generator, attend) for _ in range(settings.layers))

    def forward(self, x: Tensor, plan: Any) -> tuple[Tensor, list[Seen]]:
        """f32[T, D] -> f32[T, D], and what each layer keeps. plan: of `attend`."""
        kept = []
        for layer in self.layers:
            x, seen = layer(x, plan)
            kept.append(seen)
        return x, kept

    def extend(
        self, x: Tensor, kept: Sequence[Seen], view: View, *, append: bool = False
    ) -> tuple[Tensor, tuple[Seen, ...]]:
        """Rows f32[r, D] after a history of which `kept` is known; appended to it, or blind to each other."""
        known = []
        for layer, seen in zip(self.layers, kept, strict=True):
            assert isinstance(layer, Layer)
            x, seen = layer.extend(x, seen, view, append=append)
            known.append(seen)
        return x, tuple(known)
