"""One trainer for offline sequence models, so that only the model differs: `make bench-offline`.

AdamW, a rate that falls along a half cosine, batches of users whose windows (`leave_one_out`) lie end to end. The
weights judged on the test are those of the epoch with the best NDCG@10 in validation; a run ends when that has not
risen for `patience` evaluations.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import msgspec
import numpy as np
import torch

from streamgr.lab.leave_one_out import TEST, TRAINING, VALIDATION, Interactions, Quality, batches, evaluate, windows
from streamgr.lab.sequential import Recommender, Shape


class Recipe(msgspec.Struct, frozen=True, kw_only=True):
    """How it is learned. evaluate_every: epochs."""

    users_a_batch: int = 32
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    epochs: int = 40
    evaluate_every: int = 2
    patience: int = 5


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


def train(model: str, data: Interactions, shape: Shape, recipe: Recipe, seed: int) -> Iterator[Epoch]:
    """Learn, one `Epoch` an evaluation; the last one holds the result. Same seed, same run."""
    torch.manual_seed(seed)  # of dropout
    rng = np.random.default_rng(seed)
    network = Recommender(model, shape, data.count, seed)
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
            given = windows(data, users, TRAINING, shape.length)
            loss = network.loss(given, rng)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            total, learned = total + float(loss.detach()) * len(given.items), learned + len(given.items)
        schedule.step()
        if number % recipe.evaluate_every and number != recipe.epochs:
            continue
        network.eval()
        validation = evaluate(network.score, data, VALIDATION, shape.length)
        if best is None or validation.ndcg_10 > best[1].ndcg_10:
            best = number, validation, evaluate(network.score, data, TEST, shape.length)
        spent = time.perf_counter() - started, time.process_time() - started_cpu
        yield Epoch(number, total / learned, validation, best[0], best[2], *spent)
        if number - best[0] >= recipe.patience * recipe.evaluate_every:
            return
