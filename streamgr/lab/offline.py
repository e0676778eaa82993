"""One trainer for offline sequence models, so that only the model differs: `make bench-offline`.

Both models, HSTU (our own `model.hstu.Stack`) and SASRec, get the same of everything else: the item vectors
* sqrt(D) plus learned absolute positions (as the public research code has them) and a dropout; queries and items of
length 1, their cosine over a temperature, and the softmax over all items, or over negatives drawn evenly and shared by
the batch; every position is a target (every interaction counts as positive, as there). AdamW, a rate that falls along a
half cosine, batches of users whose windows (`leave_one_out`) lie end to end. The weights judged on the test are those
of the epoch with the best NDCG@10 in validation; a run ends when that has not risen for `patience` evaluations.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import msgspec
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from streamgr import config
from streamgr.lab.baselines.transformer import Transformer
from streamgr.lab.leave_one_out import TEST, TRAINING, VALIDATION, Interactions, Quality, Windows
from streamgr.lab.leave_one_out import batches, evaluate, windows
from streamgr.model import attention_blocks
from streamgr.model.hstu import Stack, normal
from streamgr.model.tokens import Tokens


class Recipe(msgspec.Struct, frozen=True, kw_only=True):
    """What a run depends on beside its model, data and seed. negatives 0: the softmax runs over all items."""

    dim: int = 64
    heads: int = 1
    layers: int = 2
    length: int = 200
    dropout: float = 0.2
    users_a_batch: int = 32
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    negatives: int = 0
    temperature: float = 0.05
    epochs: int = 40
    evaluate_every: int = 2
    patience: int = 5


class Encoder(nn.Module):
    """HSTU's stack: f32[T, D] -> f32[T, D]. Dropout as in the research code: of what the gate lets through."""

    def __init__(self, recipe: Recipe, generator: torch.Generator) -> None:
        super().__init__()
        settings = config.Model(
            dim=recipe.dim,
            heads=recipe.heads,
            layers=recipe.layers,
            scaling_seqlen=recipe.length,
            position_buckets=recipe.length + 1,
        )
        self.stack = Stack(settings, generator, attention_blocks.attend)
        for layer in self.stack.layers:  # dropout(norm(attended) * u) = dropout(norm(attended)) * u
            layer.attended_norm = nn.Sequential(layer.attended_norm, nn.Dropout(recipe.dropout))

    def forward(self, x: Tensor, tokens: Tokens) -> Tensor:
        out: Tensor = self.stack(x, attention_blocks.plan(tokens, self.stack.shape))[0]
        return out


def sasrec(recipe: Recipe, generator: torch.Generator) -> nn.Module:
    """SASRec: a Transformer whose feed-forward is as wide as itself."""
    return Transformer(recipe.dim, recipe.heads, recipe.layers, recipe.dim, recipe.dropout, generator)


MODELS: dict[str, Callable[[Recipe, torch.Generator], nn.Module]] = {"hstu": Encoder, "sasrec": sasrec}


class Recommender(nn.Module):
    """Item vectors and positions in, a model between, cosines out."""

    def __init__(self, model: str, recipe: Recipe, count: int, generator: torch.Generator) -> None:
        super().__init__()
        self.recipe = recipe
        self.items = normal((count, recipe.dim), generator)
        self.positions = normal((recipe.length, recipe.dim), generator, recipe.dim**-0.5)
        self.dropout = nn.Dropout(recipe.dropout)
        self.encoder = MODELS[model](recipe, generator)

    def queries(self, given: Windows) -> Tensor:
        """f32[T, D], of length 1 / temperature."""
        vectors = F.embedding(torch.from_numpy(given.items), self.items) * self.recipe.dim**0.5
        placed = vectors + F.embedding(torch.from_numpy(given.tokens.visible), self.positions)
        hidden = self.encoder(self.dropout(placed), given.tokens)
        return F.normalize(hidden, dim=1, eps=1e-6) / self.recipe.temperature

    def catalogue(self) -> Tensor:
        """f32[count, D], of length 1."""
        return F.normalize(self.items, dim=1, eps=1e-6)

    def loss(self, given: Windows, rng: np.random.Generator) -> Tensor:
        """Mean of -log softmax of what follows each token."""
        queries, catalogue = self.queries(given), self.catalogue()
        following = torch.from_numpy(given.following)
        if not self.recipe.negatives:
            return F.cross_entropy(queries @ catalogue.T, following)
        drawn = torch.from_numpy(rng.choice(len(catalogue), self.recipe.negatives, replace=False))
        own = (queries * F.embedding(following, catalogue)).sum(1, keepdim=True)
        others = (queries @ catalogue[drawn].T).masked_fill(following[:, None] == drawn, -torch.inf)
        return (torch.logsumexp(torch.cat([own, others], 1), 1) - own.squeeze(1)).mean()

    @torch.no_grad()
    def score(self, given: Windows) -> Tensor:
        """f32[b, count]: what follows each window."""
        return self.queries(given)[torch.from_numpy(given.last)] @ self.catalogue().T


@dataclass(frozen=True, slots=True)
class Epoch:
    """Where a run stands. loss: mean of the epoch; test: at the best validation so far; seconds: of wall and CPU."""

    number: int
    loss: float
    validation: Quality
    best: int
    test: Quality
    seconds: float
    cpu_seconds: float


def train(model: str, data: Interactions, recipe: Recipe, seed: int) -> Iterator[Epoch]:
    """Learn, one `Epoch` an evaluation; the last one holds the result. Same seed, same run."""
    torch.manual_seed(seed)  # of dropout
    rng = np.random.default_rng(seed)
    network = Recommender(model, recipe, data.count, torch.Generator().manual_seed(seed))
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=recipe.weight_decay
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.epochs)
    started, started_cpu = time.perf_counter(), time.process_time()
    best: tuple[int, Quality, Quality] | None = None
    for number in range(1, recipe.epochs + 1):
        network.train()
        total = learned = 0.0
        for users in batches(data, recipe.users_a_batch, rng):
            given = windows(data, users, TRAINING, recipe.length)
            loss = network.loss(given, rng)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            total, learned = total + float(loss.detach()) * len(given.items), learned + len(given.items)
        schedule.step()
        if number % recipe.evaluate_every and number != recipe.epochs:
            continue
        network.eval()
        validation = evaluate(network.score, data, VALIDATION, recipe.length)
        if best is None or validation.ndcg_10 > best[1].ndcg_10:
            best = number, validation, evaluate(network.score, data, TEST, recipe.length)
        spent = time.perf_counter() - started, time.process_time() - started_cpu
        yield Epoch(number, total / learned, validation, best[0], best[2], *spent)
        if number - best[0] >= recipe.patience * recipe.evaluate_every:
            return
