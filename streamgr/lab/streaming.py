"""One pass over a stream of records: each is predicted, judged among what is available, then learned, once.

The models are those of `sequential`, the stream that of `dirichlet`. A step is a few records; its softmax runs over all
ids that are available by then, so no sampling stands between the models. Every position but the first is predicted.
"""

import time
from dataclasses import dataclass

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from streamgr.events import FIRST_ACTION
from streamgr.lab.dirichlet import Records
from streamgr.lab.full_softmax import full_softmax
from streamgr.lab.leave_one_out import Windows
from streamgr.lab.sequential import Recommender, Shape
from streamgr.model.table import ITEM
from streamgr.model.tokens import Tokens

CUTOFFS = 10, 50


class Recipe(msgspec.Struct, frozen=True, kw_only=True):
    """How a stream is learned."""

    records_a_step: int = 16
    learning_rate: float = 1e-3


@dataclass(frozen=True, slots=True)
class Course:
    """hits f64[steps, 2]: hit rates by cut-off of each step, before it was learned; new: those of ids that were not
    there at the beginning (NaN where there are none); loss f64[steps]; seconds of CPU."""

    hits: NDArray[np.float64]
    new: NDArray[np.float64]
    loss: NDArray[np.float64]
    cpu_seconds: float

    def late(self, share: float) -> list[float]:
        """Hit rates by cut-off over the last `share` of the stream."""
        return [float(x) for x in self.hits[-max(1, round(len(self.hits) * share)) :].mean(0)]


def run(model: str, records: Records, shape: Shape, recipe: Recipe, seed: int) -> Course:
    """One pass; same seed, same course."""
    torch.manual_seed(seed)
    network = Recommender(model, shape, len(records.category), seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0)
    started, rows = time.process_time(), []
    first = int(records.available[0])
    for start in range(0, len(records.items), recipe.records_a_step):
        part = records.items[start : start + recipe.records_a_step]
        live = int(records.available[start : start + len(part)].max())
        given = windows(part)
        loss, rank = full_softmax(network.queries(given), network.catalogue()[:live], torch.from_numpy(given.following))
        hits = np.stack([rank.numpy() <= cut for cut in CUTOFFS], 1).astype(float)
        new = hits[given.following >= first]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        rows.append((*hits.mean(0), *(new.mean(0) if len(new) else (np.nan, np.nan)), float(loss.detach())))
    table = np.array(rows)
    return Course(table[:, :2], table[:, 2:4], table[:, 4], time.process_time() - started)


def windows(items: NDArray[np.int64]) -> Windows:
    """Records i64[b, L] as windows of L - 1 tokens."""
    b, length = items.shape[0], items.shape[1] - 1
    offsets = np.arange(b + 1) * length
    given = items[:, :-1].reshape(-1)
    visible = np.tile(np.arange(length), b)
    none = np.zeros(0, np.int64)
    times = np.zeros(len(given), np.int64)
    tokens = Tokens(
        offsets=offsets,
        marks=np.full(len(given), 1 << FIRST_ACTION),
        keys=given.astype(np.uint64),
        fields=np.full(len(given), ITEM, np.uint8),
        times=times,
        query_times=times,
        visible=visible,
        provisional=np.ones(len(given), bool),
        targets=none,
        queries=none,
    )
    return Windows(tokens, given, items[:, 1:].reshape(-1), offsets[1:] - 1)
