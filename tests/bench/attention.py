"""HSTU's attention against a Transformer of equal width and against the plain padded reference: `make bench-attention`.

    streamgr      two HSTU layers (`paper`), attention by `attention_blocks` (on a GPU by `attention_triton`, bfloat16)
    padded        the same layers, attention by `attention.reference`: padded, biases gathered, autograd
    transformer   two layers of equal width, padded: Q, K, V, O and a 4 D feed-forward, causal
                  `scaled_dot_product_attention` (FlashAttention on a GPU), no position or time bias

Everybody in turn on the same batches, so that a noisy machine is noisy for all; medians of the turns. A turn lays out
the batch, runs forward and, for training, backward. Real tokens a second (of the core's own time with one thread on a
CPU): padding does not count. Peak memory is what a turn takes beyond what was there. Beside the sweep of lengths:

    model       the whole dense model and its AdamW step, 16 sequences of 256 tokens
    real        lengths as users of a real log have them (--data)
    window      semi-local attention at the greatest length
    stochastic  training on subsequences of N^(alpha / 2) (arXiv 2402.17152, section 2.3): tokens of the histories that
                these stand for, a second, against a Transformer on the whole of them
"""

import argparse
import csv
import ctypes
import gzip
import importlib
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from streamgr import config
from streamgr.events import FIRST_ACTION, IMPRESSION, History
from streamgr.model import attention, attention_blocks, jagged
from streamgr.model.attention import Attend, Pairs, Shape
from streamgr.model.hstu import Stack
from streamgr.model.recommender import Recommender
from streamgr.model.tokens import Layout, Tokens, tokenize
from tests.bench.kit import Json, machine, report

ACTIONS = 2
DAY_MS = 86_400_000
PADDED_CELLS = 1 << 28  # more pairs and heads than this the padded reference is not asked for
ALPHAS = (1.6, 1.8)

Turn = Callable[[], object]
Run = Callable[[Tensor], Tensor]


def histories(lengths: Sequence[int], seed: int = 0) -> list[History]:
    """Requests of one to four items, actions on some, gaps from seconds to days."""
    rng = np.random.default_rng(seed)
    found = []
    for n in lengths:
        kinds = np.where(rng.random(n) < 0.5, IMPRESSION, FIRST_ACTION + rng.integers(0, ACTIONS, n)).astype(np.uint8)
        gaps = np.where(rng.random(n) < 0.8, rng.exponential(20_000, n), rng.exponential(DAY_MS, n))
        request = np.cumsum(rng.random(n) < 0.4).astype(np.uint64) + 1
        items = rng.integers(1, 10_000, n).astype(np.uint64)
        found.append(
            History(kinds, items, 1 << 40 | np.cumsum(gaps.astype(np.int64) + 1), request * (kinds == IMPRESSION))
        )
    return found


def lay_out(lengths: Sequence[int], seed: int = 0) -> Tokens:
    return tokenize(histories(lengths, seed), Layout(ACTIONS))


class TransformerLayer(nn.Module):
    """A pre-norm Transformer layer over padded sequences, right padding: causal attention needs no mask beside."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.inner_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.wide, self.narrow = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """f32[B, n, D] -> f32[B, n, D]"""
        b, n, dim = x.shape
        q, k, v = self.qkv(self.norm(x)).view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).reshape(b, n, dim))
        x = x + self.narrow(F.gelu(self.wide(self.inner_norm(x))))
        return x


@dataclass(frozen=True, slots=True)
class Contest:
    """Who takes part, on which device."""

    settings: config.Model
    device: str
    attend: Attend
    plan: Callable[[Tokens, Shape], Any]

    def entrants(self, tokens: Tokens) -> dict[str, tuple[nn.Module, Run]]:
        """By name: the weights, and what makes hidden states f32[T, D] of a batch f32[T, D], layout included."""
        shape, generator = Shape.of(self.settings), torch.Generator().manual_seed(0)
        fast = Stack(self.settings, generator, self.attend).to(self.device)
        plain = Stack(self.settings, generator, attention.reference).to(self.device)
        torch.manual_seed(0)
        dim, heads = self.settings.dim, self.settings.heads
        layers = nn.ModuleList(TransformerLayer(dim, heads) for _ in range(self.settings.layers)).to(self.device)

        def transform(x: Tensor) -> Tensor:
            block = jagged.pad(tokens.offsets)
            padded = x[torch.from_numpy(block.tokens).to(x.device)]
            for layer in layers:
                padded = layer(padded)
            return padded[torch.from_numpy(block.real).to(x.device)]

        found: dict[str, tuple[nn.Module, Run]] = {
            "streamgr": (fast, lambda x: fast(x, self.plan(tokens, shape))[0]),
            "padded": (plain, lambda x: plain(x, on(attention.pairs(tokens, shape), self.device))[0]),
            "transformer": (layers, transform),
        }
        n = int(np.diff(tokens.offsets).max())
        if (len(tokens.offsets) - 1) * n * n * heads > PADDED_CELLS:
            del found["padded"]
        return found

    def turns(self, tokens: Tokens, training: bool) -> dict[str, Turn]:
        """What each entrant does in a turn."""
        x = torch.randn(len(tokens), self.settings.dim, generator=torch.Generator().manual_seed(1)).to(self.device)

        def turn(weights: nn.Module, run: Run) -> None:
            with torch.set_grad_enabled(training), torch.autocast("cuda", torch.bfloat16, self.device == "cuda"):
                out = run(x.clone().requires_grad_(training))
            if training:
                weights.zero_grad()
                out.float().square().mean().backward()  # type: ignore[no-untyped-call]
            if self.device == "cuda":
                torch.cuda.synchronize()

        return {
            name: lambda weights=weights, run=run: turn(weights, run)
            for name, (weights, run) in self.entrants(tokens).items()
        }


def on(pairs: Pairs, device: str) -> Pairs:
    return Pairs(*(getattr(pairs, name).to(device) for name in Pairs.__dataclass_fields__))


def model_turns(settings: config.Model, tokens: Tokens) -> dict[str, Turn]:
    """A training step of the whole dense model: every item ranked, both attentions."""
    labels = torch.zeros(int((tokens.marks >> IMPRESSION & 1).sum()), ACTIONS)
    items = torch.from_numpy(np.flatnonzero(tokens.marks >> IMPRESSION & 1))
    vectors = torch.randn(len(tokens), settings.dim, generator=torch.Generator().manual_seed(1)) * 0.1

    def stepper(attend: Attend, plan: Callable[[Tokens, Shape], Any]) -> Turn:
        model = Recommender(settings, [f"a{i}" for i in range(ACTIONS)], seed=0)
        for layer in model.stack.layers:
            layer.attend = attend
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

        def step() -> None:
            with patch.object(attention_blocks, "plan", plan):
                hidden = model.transduce(tokens, vectors.clone().requires_grad_())
            loss = F.binary_cross_entropy_with_logits(model.rank(hidden.index_select(0, items)), labels)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()

        return step

    return {
        "streamgr": stepper(attention_blocks.attend, attention_blocks.plan),
        "padded": stepper(attention.reference, attention.pairs),
    }


def measure(turns: Mapping[str, Turn], counted: int, repeats: int, device: str) -> Json:
    """Everybody in turn; `counted` tokens a second, median and best, and peak bytes of one turn."""
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    peaks = {name: peak_bytes(turn, device) for name, turn in turns.items()}  # the turn that warms up
    alone = device == "cpu" and torch.get_num_threads() == 1
    clock = time.thread_time if alone else time.perf_counter  # of the core: a process beside us does not count
    for _ in range(repeats):
        for name, turn in turns.items():
            started = clock()
            turn()
            seconds[name].append(clock() - started)
    return {
        name: {
            "tokens_per_second": round(counted / statistics.median(took)),
            "best": round(counted / min(took)),
            "peak_mib": None if peaks[name] is None else round(peaks[name] / 2**20, 1),
        }
        for name, took in seconds.items()
    }


def peak_bytes(turn: Turn, device: str) -> int | None:
    """How far memory in use rises in a turn; on a CPU by the kernel's own high-water mark (Linux), else None."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        turn()
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what is free but held would hide what is needed
        Path("/proc/self/clear_refs").write_text("5")
        before = status("VmRSS")
        turn()
        return status("VmHWM") - before
    except OSError:
        turn()
        return None


def status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def real_lengths(data: Path, users: int, most: int) -> list[int]:
    """How many events users of a log have, `users` of them drawn evenly; longer ones cut."""
    with gzip.open(data / "deskdrop" / "events.csv.gz", "rt") as file:
        counts = Counter(row["user"] for row in csv.DictReader(file))
    drawn = np.random.default_rng(0).permutation(sorted(counts.values()))[:users]
    return np.minimum(drawn, most).tolist()


def stochastic_lengths(lengths: Sequence[int], most: int, alpha: float) -> list[int]:
    """N^(alpha / 2) of a longer history, unless, with probability N^alpha / n^2, all of it."""
    rng, threshold = np.random.default_rng(0), int(most ** (alpha / 2))
    return [n if n <= threshold or rng.random() < most**alpha / n**2 else threshold for n in lengths]


def show(label: str, found: Json) -> None:
    """A row of the table; each beside `streamgr`."""
    ours = found["streamgr"]["tokens_per_second"]
    cells = []
    for name, one in found.items():
        ratio = "" if name == "streamgr" else f" (streamgr {ours / one['tokens_per_second']:.2f}x)"
        cells.append(f"{name} {one['tokens_per_second']:,} tokens/s, {one['peak_mib']} MiB{ratio}")
    print(f"| {label} | " + " | ".join(cells) + " |", file=sys.stderr)


def contests(args: argparse.Namespace, contest: Contest) -> list[Json]:
    """Every row of the table."""
    device, settings, rows = contest.device, contest.settings, []

    def row(label: str, turns: Mapping[str, Turn], counted: int) -> None:
        found = measure(turns, counted, args.repeats, device)
        show(f"{device}: {label}", found)
        rows.append({"case": label, "device": device, **found})

    lengths = args.lengths or ([128, 256, 512, 1024] if device == "cpu" else [2**i for i in range(7, 14)])
    for n in lengths:
        batch = lay_out([n] * max(1, args.tokens // n))
        for training in (True, False):
            label = f"{'training' if training else 'inference'}, length {n}, batch {len(batch.offsets) - 1}"
            row(label, contest.turns(batch, training), len(batch))

    most = max(lengths)
    full = [most] * max(1, args.tokens // most)
    if device == "cpu":
        batch = lay_out([256] * 16)
        row("training, whole model, length 256, batch 16", model_turns(settings, batch), len(batch))
    if args.data:
        batch = lay_out(real_lengths(args.data, 64, most))
        row("training, lengths of a real log, batch 64", contest.turns(batch, True), len(batch))
        if device == "cpu":
            row("training, whole model, lengths of a real log, batch 64", model_turns(settings, batch), len(batch))
    batch = lay_out(full)
    whole = contest.turns(batch, True)
    local = Contest(
        config.Model(local_window=128, global_prefix=16, **args.model), device, contest.attend, contest.plan
    )
    turns = {"streamgr": local.turns(batch, True)["streamgr"], "whole": whole["streamgr"]}
    row(f"training, length {most}, window 128 + 16", turns | {"transformer": whole["transformer"]}, len(batch))
    for alpha in ALPHAS:
        short = lay_out(stochastic_lengths(full, most, alpha))
        turns = {"streamgr": contest.turns(short, True)["streamgr"], "transformer": whole["transformer"]}
        row(f"training, histories of {most}, stochastic length {alpha}", turns, len(batch))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two lengths, three turns")
    parser.add_argument(
        "--lengths", type=lambda text: [int(n) for n in text.split(",")], default=[], help="with commas"
    )
    parser.add_argument("--tokens", type=int, default=4096, help="of a batch; on a GPU 16 times as many")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--data", type=Path, help="holds deskdrop/events.csv.gz: the rows on real lengths")
    args = parser.parse_args()
    if args.quick:
        args.lengths, args.repeats = args.lengths or [128, 256], 3
    args.model = {"dim": args.dim, "heads": args.heads, "layers": args.layers}
    torch.set_num_threads(args.threads)
    settings = config.Model(**args.model)
    found: Json = {"machine": machine() | {"torch": torch.__version__, "threads": args.threads}, "model": args.model}
    found["rows"] = contests(args, Contest(settings, "cpu", attention_blocks.attend, attention_blocks.plan))
    if torch.cuda.is_available():
        kernels = importlib.import_module("streamgr.model.attention_triton")
        found["gpu"] = torch.cuda.get_device_name()
        args.tokens *= 16
        tile = kernels.TILES[torch.bfloat16]
        found["rows"] += contests(
            args,
            Contest(settings, "cuda", kernels.attend, lambda batch, shape: kernels.plan(batch, shape, "cuda", tile)),
        )
    report("bench-attention", found)


if __name__ == "__main__":
    main()
