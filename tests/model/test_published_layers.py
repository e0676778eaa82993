"""The two presets against what others publish, on equal weights, to 1e-5 in float32; by each twin of the attention.

`paper`: outputs that RecTools' `STULayer` gave (`record_stu.py`). `dlrm_v3`: that layer's code wants a GPU library, so
it stands here once more, token by token, from its description: affine norms, SiLU on u alone, q . k / sqrt(d), the
concatenated output (arXiv 2402.17152; meta-recsys/generative-recommenders, `modules/stu.py`).
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from streamgr import config
from streamgr.model import attention, attention_blocks
from streamgr.model.attention import Attend, Shape, time_bucket
from streamgr.model.hstu import EPS, Layer
from streamgr.model.tokens import Layout, Tokens, tokenize

from .histories import ACTIONS, random_history
from .interpreter import DEVICE, attention_triton, interpreting

TIMES = 128  # wide enough for the recorded decades
TWINS = ["reference", "blocks", "triton"]


@pytest.fixture(scope="module", autouse=True)
def interpreter() -> Iterator[None]:
    with interpreting():
        yield


def twin(kind: str, tokens: Tokens, shape: Shape) -> tuple[Attend, Any]:
    match kind:
        case "reference":
            return attention.reference, attention.pairs(tokens, shape)
        case "blocks":
            return attention_blocks.attend, attention_blocks.plan(tokens, shape)
    return attention_triton.attend, attention_triton.plan(tokens, shape, DEVICE, tile=16)


def run(layer: Layer, x: Tensor, plan: Any, kind: str) -> Tensor:
    device = DEVICE if kind == "triton" else "cpu"
    out: Tensor = layer.to(device)(x.to(device), plan)[0]
    return out.detach().cpu()


@pytest.mark.parametrize("kind", TWINS)
def test_paper_is_the_layer_of_rectools(kind: str) -> None:
    recorded = json.loads((Path(__file__).parent / "data" / "rectools_stu.json").read_text())
    weights = {name: torch.tensor(value) for name, value in recorded["weights"].items()}
    seconds, lengths = torch.tensor(recorded["seconds"]), recorded["lengths"]
    n, dim = seconds.shape[1] - 1, len(weights["uvqk_proj"])
    real = torch.arange(n) >= n - torch.tensor(lengths)[:, None]
    model = config.Model(dim=dim, heads=recorded["heads"], position_buckets=n, time_buckets=TIMES, scaling_seqlen=n)
    tokens = actions(lengths, seconds * 1000)
    attend, plan = twin(kind, tokens, Shape.of(model))
    layer = Layer(model, torch.Generator(), attend)
    layer.load_state_dict({
        "uvqk": weights["uvqk_proj"],
        "out": weights["output_mlp.weight"].T,
        "out_bias": weights["output_mlp.bias"],
        "position_bias": weights["rel_attn.pos_weights"][:n].flip(0),  # theirs: n - 1 + j - i
        "time_bias": translated(weights["rel_attn.time_weights"], seconds, real),
    })  # fmt: skip
    assert all((weights[f"{norm}.weight"] == 1).all() for norm in ("norm_input", "norm_attn_output"))
    mine = run(layer, torch.tensor(recorded["x"])[real], plan, kind)
    torch.testing.assert_close(mine, torch.tensor(recorded["out"])[real], rtol=1e-5, atol=1e-5)


def actions(lengths: list[int], times: Tensor) -> Tokens:
    """Tokens that see everything before them and ask at the time of the next one; times i64[B, n + 1], left padded."""
    n = times.shape[1] - 1
    stamped = np.concatenate([times[i, n - m : n].numpy() for i, m in enumerate(lengths)])
    asked = np.concatenate([times[i, n - m + 1 :].numpy() for i, m in enumerate(lengths)])
    visible = np.concatenate([np.arange(m) for m in lengths])
    nothing = np.zeros(len(visible), np.int64)
    return Tokens(
        offsets=np.cumsum([0, *lengths]),
        marks=nothing,
        keys=nothing.astype(np.uint64),
        fields=nothing.astype(np.uint8),
        times=stamped,
        query_times=asked,
        visible=visible,
        provisional=np.ones(len(visible), np.bool_),
        targets=nothing[:0],
        queries=nothing[:0],
    )


def translated(table: Tensor, seconds: Tensor, real: Tensor) -> Tensor:
    """Their time table in our buckets; the recorded times are such that one bucket tells the other. Buckets that no
    pair is in hold what would be noticed."""
    elapsed = (seconds[:, 1:, None] - seconds[:, None, :-1])[(real[:, None] & real[..., None]).tril()]
    theirs = (elapsed.clamp(min=1).log() / 0.301).long().clamp(max=len(table) - 1)
    ours = time_bucket(elapsed * 1000, TIMES).long()
    pairs = torch.stack([theirs, ours], 1).unique(dim=0)
    assert len(pairs) == len(pairs[:, 0].unique()) == len(pairs[:, 1].unique()) > 6
    return torch.full((TIMES,), 1e3).index_copy(0, pairs[:, 1], table[pairs[:, 0]])


@pytest.mark.parametrize("kind", TWINS)
def test_dlrm_v3_is_its_description(kind: str) -> None:
    model = config.Model(preset="dlrm_v3", dim=12, heads=2, position_buckets=8, time_buckets=8, scaling_seqlen=5)
    tokens = tokenize([random_history(n, n) for n in (13, 1, 20)], Layout(ACTIONS))
    attend, plan = twin(kind, tokens, Shape.of(model))
    g = torch.Generator().manual_seed(3)
    layer = Layer(model, g, attend)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0, 0.5, generator=g)
    x = torch.randn(len(tokens), model.dim, generator=g)
    weights = {name: value.detach().double() for name, value in layer.state_dict().items()}
    expected = by_hand(tokens, x.double(), weights, model)
    mine = run(layer, x, plan, kind).double()
    assert float((mine - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


def by_hand(tokens: Tokens, x: Tensor, weights: dict[str, Tensor], model: config.Model) -> Tensor:
    """The layer as sums over pairs, in float64."""
    dim, d = model.dim, model.dim // model.heads
    out = torch.empty_like(x)
    projected = norm(x, weights, "norm") @ weights["uvqk"] + weights["uvqk_bias"]
    u, v, q, k = projected.split(dim, dim=1)
    u = u * u.sigmoid()
    for start, end in zip(tokens.offsets[:-1], tokens.offsets[1:], strict=True):
        for i in range(start, end):
            attended = torch.zeros(dim, dtype=x.dtype)
            for j in range(start, end):
                if j == i or j - start < tokens.visible[i]:
                    for h in range(0, dim, d):
                        score = q[i, h : h + d] @ k[j, h : h + d] / d**0.5
                        attended[h : h + d] += score * score.sigmoid() / model.scaling_seqlen * v[j, h : h + d]
            gated = u[i] * norm(attended[None], weights, "attended_norm")[0]
            out[i] = x[i] + torch.cat([u[i], attended, gated]) @ weights["out"]
    return out


def norm(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    """Layer norm, affine."""
    centred = x - x.mean(1, keepdim=True)
    scale = (centred.square().mean(1, keepdim=True) + EPS).sqrt()
    return centred / scale * weights[f"{name}.weight"] + weights[f"{name}.bias"]
