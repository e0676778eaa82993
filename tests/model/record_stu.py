"""Record what RecTools' `STULayer` answers: `python record_stu.py > data/rectools_stu.json`, where RecTools is.

Needs `pip install 'rectools[torch]'` (recorded with 0.19.0, Apache-2.0) and nothing of ours; it only runs their layer.
Their time buckets are logarithms of seconds and ours bits of milliseconds, so the timestamps are chosen such that, over
all pairs of the batch, either bucket tells the other: then a table of theirs is a table of ours in another order, and
both layers are the same function. One sequence has ever longer gaps, one ever shorter ones, one
has them in any order.
"""

import itertools
import json
import math
import random
from importlib.metadata import version

import torch
from rectools.models.nn.transformers.hstu import STULayer

LENGTH, HEADS, DIM = 9, 2, 8
RATIO = math.exp(7 * 0.301)  # seven of their buckets and, nearly, six of ours
LENGTHS = (9, 9, 5)  # the last one padded, on the left, as theirs are


def theirs(seconds: int) -> int:
    return int(math.log(max(1, abs(seconds))) / 0.301)


def ours(seconds: int) -> int:
    """Two buckets an octave of 1 + ms / 64 (the test asks `attention.time_bucket` itself)."""
    octave, x = 0, 1 + seconds * 1000 / 64
    while x >= 2:
        octave, x = octave + 1, x / 2
    return 2 * octave + (x >= 1.5)


def gaps(r: random.Random) -> list[list[int]]:
    """LENGTH gaps of each sequence, the last one up to the request."""
    scale = r.uniform(20, 20 * RATIO)
    growing = [round(scale * RATIO**i) for i in range(LENGTH)]
    return [growing, growing[::-1], r.sample(growing, LENGTH)]


def is_one_to_one(times: list[list[int]]) -> bool:
    pairs = set()
    for row, length in zip(times, LENGTHS, strict=True):
        first = LENGTH - length
        for i, j in itertools.product(range(first, LENGTH), repeat=2):
            if j <= i:
                pairs.add((theirs(row[i + 1] - row[j]), ours(row[i + 1] - row[j])))
    return len({a for a, _ in pairs}) == len({b for _, b in pairs}) == len(pairs)


def timestamps() -> list[list[int]]:
    """LENGTH + 1 of each sequence, in seconds."""
    for seed in itertools.count():
        times = [[0, *itertools.accumulate(row)] for row in gaps(random.Random(seed))]
        if is_one_to_one(times):
            return [[1_000_000_000 + t for t in row] for row in times]
    raise AssertionError


def main() -> None:
    torch.manual_seed(1)
    layer = STULayer(
        DIM, HEADS, DIM // HEADS, DIM // HEADS, LENGTH,
        relative_time_attention=True, relative_pos_attention=True,
        attn_dropout_rate=0.0, dropout_rate=0.0, epsilon=1e-6,
    ).eval()  # fmt: skip
    with torch.no_grad():
        for parameter in (layer.uvqk_proj, layer.rel_attn.time_weights, layer.rel_attn.pos_weights):
            parameter.normal_()
        layer.output_mlp.bias.normal_()
        times = timestamps()
        x = torch.randn(len(times), LENGTH, DIM)
        real = torch.tensor([[i >= LENGTH - n for i in range(LENGTH)] for n in LENGTHS])
        mask = real[:, :, None].float()
        causal = torch.ones(LENGTH, LENGTH).tril()
        out = layer(x * mask, {"x": real.long(), "unix_ts": torch.tensor(times)}, causal, mask, None)
    tensors = {name: value.tolist() for name, value in layer.state_dict().items()}
    facts = {"rectools": version("rectools"), "torch": torch.__version__, "heads": HEADS, "lengths": LENGTHS}
    rounded = {"weights": tensors, "x": x.tolist(), "seconds": times, "out": out.tolist()}
    print(json.dumps(facts | rounded, indent=None, separators=(",", ":")).replace('],"', '],\n"'))


main()
