"""The HSTU stack (arXiv 2402.17152, the research layer), `paper` preset.

    u, v, q, k = split(SiLU(norm(x) @ uvqk))        no bias; norm: layer norm, eps 1e-6, nothing to learn in it
    y = x + out(norm(attend(q, k, v / N)) * u)          `out` with bias; x itself is the residual

No 1/sqrt(d), no softmax, no final norm. Each layer has its own position and time bias, shared by its heads. The time
bias starts at 1 and the projection a little wider than the paper's N(0, .02): SiLU then weighs all of a history alike
and positively, so a layer starts as its mean and not as noise of either sign, which a stream seen once has no time to
unlearn (a minute of the demo's world, four seeds: normalized entropy .90 to .91 instead of .91 to .96). What
`forward` does for a batch, `prefill` and `extend` do for one history and many candidates: the history's keys and
values are computed once a layer, a candidate then sees all of them and, by a dot product, itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from streamgr import config
from streamgr.model import attention

EPS = 1e-6
INIT_STD = 0.02
PROJECTION_STD = 0.05


def normalize(x: Tensor) -> Tensor:
    """Layer norm without parameters."""
    return F.layer_norm(x, x.shape[-1:], eps=EPS)


def normal(shape: Sequence[int], generator: torch.Generator, std: float = INIT_STD) -> nn.Parameter:
    """A parameter drawn from N(0, std)."""
    return nn.Parameter(torch.empty(*shape).normal_(0, std, generator=generator))


@dataclass(frozen=True, slots=True)
class Seen:
    """What one layer keeps of a history: keys, and values divided by N, f32[n, H, d]."""

    keys: Tensor
    values: Tensor


class Layer(nn.Module):
    """One HSTU layer over D channels."""

    def __init__(self, settings: config.Model, generator: torch.Generator) -> None:
        super().__init__()
        self.heads, self.scale = settings.heads, settings.scaling_seqlen
        self.times = settings.time_buckets
        self.uvqk = normal((settings.dim, 4 * settings.dim), generator, PROJECTION_STD)
        self.position_bias = normal((settings.position_buckets,), generator)
        self.time_bias = nn.Parameter(normal((settings.time_buckets,), generator).detach() + 1)
        bound = (3 / settings.dim) ** 0.5  # Xavier, uniform
        self.out = nn.Parameter(torch.empty(settings.dim, settings.dim).uniform_(-bound, bound, generator=generator))
        self.out_bias = nn.Parameter(torch.zeros(settings.dim))

    def forward(self, x: Tensor, plan: attention.Plan) -> tuple[Tensor, Seen]:
        """f32[T, D] -> f32[T, D], and the layer's keys and values."""
        u, v, q, k = self._project(x)
        attended = attention.attend(q, k, v, self._bias(), plan)
        return self._finish(x, u, attended), Seen(k, v)

    def extend(self, x: Tensor, seen: Seen, bias: Tensor) -> Tensor:
        """Candidates f32[c, D] after a history; bias i64[n]: the row of the bias table of each history token."""
        u, v, q, k = self._project(x)
        table = self._bias()
        scores = torch.einsum("chd,nhd->hcn", q, seen.keys) + table[bias]
        attended = torch.einsum("hcn,nhd->chd", F.silu(scores), seen.values)
        own = F.silu((q * k).sum(-1) + table[0])
        return self._finish(x, u, attended + own[:, :, None] * v)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        parts = F.silu(normalize(x) @ self.uvqk).view(len(x), 4, self.heads, x.shape[1] // self.heads)
        u, v, q, k = parts.unbind(1)
        return u.reshape(x.shape), v / self.scale, q.contiguous(), k.contiguous()

    def _finish(self, x: Tensor, u: Tensor, attended: Tensor) -> Tensor:
        return torch.addmm(x + self.out_bias, normalize(attended.reshape(x.shape)) * u, self.out)

    def _bias(self) -> Tensor:
        return attention.bias_table(self.position_bias, self.time_bias)


class Stack(nn.Module):
    """The layers, one after another."""

    def __init__(self, settings: config.Model, generator: torch.Generator) -> None:
        super().__init__()
        self.positions, self.times = settings.position_buckets, settings.time_buckets
        self.layers = nn.ModuleList(Layer(settings, generator) for _ in range(settings.layers))

    def forward(self, x: Tensor, plan: attention.Plan) -> tuple[Tensor, list[Seen]]:
        """f32[T, D] -> f32[T, D], and what each layer keeps."""
        kept = []
        for layer in self.layers:
            x, seen = layer(x, plan)
            kept.append(seen)
        return x, kept

    def extend(self, x: Tensor, kept: Sequence[Seen], elapsed: Tensor) -> Tensor:
        """Candidates f32[c, D] after a history whose tokens lie `elapsed` i64[n] ms back; blind to each other."""
        n = len(elapsed)
        distance = torch.arange(n, 0, -1).clamp_(max=self.positions - 1)
        bias = distance * self.times + attention.time_bucket(elapsed, self.times)
        for layer, seen in zip(self.layers, kept, strict=True):
            assert isinstance(layer, Layer)
            x = layer.extend(x, seen, bias)
        return x
