"""One step: predict, be judged, learn. Owns the model, the ID table and both optimizers; knows no Kafka.

The order within a step, and why:

1. What is live *before* the batch is the catalogue that retrieval is judged on: an item that this very batch brings
   counts as a miss, whatever its vector would have scored.
   Expiry, too, is judged at the watermark of the steps before: it is the one the served version carries.
2. The batch's ids are mapped (admitted, touched, evicted). A new slot starts as its key's fallback vector, so mapping
   changes no prediction: what the scorer answers with the same weights is what is judged here (decision 1).
3. One forward pass. Its probabilities and ranks go to the prequential figures, as they were before learning. It sees
   the table's rows as they are served, in bfloat16; what is learned goes to their float32 (straight through). With
   stochastic length what is learned is another, shorter pass (`stochastic`); judged is the whole.
4. The pass is learned: dense AdamW with clipping, a row-wise optimizer for the rows that the batch touched. A loss
   or gradient that is not finite skips the learning of this step, is counted, and nothing is lost but the lesson.
   Between mapping and learning no row changes hands, so no gradient can reach another id's row.
5. Now and then, a table that is three quarters full doubles, if it may.

A step is a function of the state before it and of the batch: negatives come from a generator seeded by (seed, step),
sums over repeated rows run in a fixed order. On CPU the same steps give the same bits.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import embedding, normalize

from streamgr import config
from streamgr.clock import milliseconds
from streamgr.model.losses import ranking_loss, sampled_softmax
from streamgr.model.recommender import Recommender
from streamgr.model.table import ITEM, WIRE, IdTable, Lookup, mean, served
from streamgr.telemetry import counter
from streamgr.train.batch import Batch, assemble
from streamgr.train.optim import row_optimizer
from streamgr.train.stochastic import shorten

SKIPPED = counter("train_skipped", "Steps whose learning was skipped.", ("reason",))
GROWN = counter("table_growths", "Times that the ID table has doubled.")
for _reason in ("loss", "gradient"):
    SKIPPED.labels(_reason)

RANK_CELLS = 1 << 24  # scores of one block of the ranking against all live items
GROW_STEPS = 64  # how often the table is asked whether it is crowded
LOG_Q_FLOOR = -20.0
WHOLE = 2.0  # the alpha of stochastic length that learns all of every history


@dataclass(frozen=True, slots=True)
class Predictions:
    """What the model said before it learned, aligned with `batch.targets`.

    probabilities f32[m, K], NaN where a target is not ranked; rank i64[m]: of the true item among the live ones, 1 is
    the best, ties against us, -1 where it was not live, 0 where the target is not retrieved; live: how many there are.
    """

    probabilities: NDArray[np.float32]
    rank: NDArray[np.int64]
    live: int


@dataclass(frozen=True, slots=True)
class Negatives:
    """Rows i64[N], keys u64[N], and log_q f32[N]: the log of how often each stands in such a sample on average."""

    rows: NDArray[np.int64]
    keys: NDArray[np.uint64]
    log_q: NDArray[np.float32]


class Learner:
    """The three things that change with a step: network, table, optimizers. Not thread safe."""

    def __init__(self, settings: config.Config, device: torch.device | None = None) -> None:
        """device: of the network, the CPU unless another one; see `device`."""
        trainer, table = settings.trainer, settings.table
        self._settings, self._history_length = trainer, settings.sequence.history_length
        window_ms = milliseconds(settings.sequence.attribution_window_seconds)
        self.model = Recommender(settings.model, settings.sequence.actions, trainer.seed, window_ms, device)
        self._device = device or torch.device("cpu")
        self.table = IdTable(table, settings.model.dim, trainer.seed)
        self._model_settings = settings.model
        self.dense = torch.optim.AdamW(
            self.model.parameters(), lr=trainer.dense_learning_rate, weight_decay=trainer.weight_decay
        )
        self.sparse = row_optimizer(trainer, len(self.table.weight), table.fallback_rows, settings.model.dim)
        self.step = 0
        self.watermark_ms = 0  # the table's clock: the greatest watermark learned
        self._gradient_norm = 0.0

    def learn(self, batch: Batch) -> tuple[Predictions, str]:
        """Take one step; returns what was predicted before it, and why nothing was learned ("" when it was)."""
        self.step += 1
        catalogue = self._catalogue() if len(batch.targets.retrieved) else None
        tokens = batch.tokens
        lookup = self.table.map(tokens.keys, tokens.seen_times, tokens.fields, watermark_ms=self.watermark_ms)
        self.sparse.reset(torch.from_numpy(lookup.fresh))
        negatives, lesson = self._negatives(batch), self._lesson(batch)
        if lesson is not batch:
            with torch.no_grad():
                judged = self._forward(batch, self.table.vectors(lookup).to(self._device))
            lookup = self.table.lookup(lesson.tokens.keys, watermark_ms=self.watermark_ms)
        rows, leaf, vectors, negative_vectors = self._gather(lookup, negatives)
        logits, queries = self._forward(lesson, vectors)
        predictions = self._predictions(batch, *(judged if lesson is not batch else (logits, queries)), catalogue)

        loss = torch.zeros(())
        if logits is not None:
            labels = torch.from_numpy(lesson.targets.labels[lesson.targets.ranked]).to(logits)
            loss = loss + self._model_settings.ranking_weight * ranking_loss(logits, labels)
        if queries is not None and len(negatives.keys):
            found = lesson.targets.retrieved
            positives = embedding(self._there(lesson.targets.token[found]), vectors)
            loss = loss + self._model_settings.retrieval_weight * sampled_softmax(
                queries,
                positives,
                negative_vectors,
                lesson.targets.keys[found],
                negatives.keys,
                self._model_settings.temperature,
                negatives.log_q,
            )
        why_not = self._descend(loss, rows, leaf)
        self.watermark_ms = max(self.watermark_ms, batch.watermark_ms)
        if self.step % GROW_STEPS == 0 and self.table.crowded():
            self._grow()
        return predictions, why_not

    def take_gradient_norm(self) -> float:
        """The greatest norm of a gradient, dense and rows together, before clipping, since the last call."""
        norm, self._gradient_norm = self._gradient_norm, 0.0
        return norm

    def _negatives(self, batch: Batch) -> "Negatives":
        """Items that the batch's targets are told from: some drawn evenly from the live ones, some from the batch.

        An item then stands in the sample Q = drawn / live + taken * share times on average, where share is its part of
        the recent past by the table's own count; log Q is what makes the sample stand for all live items. Of an even
        draw alone every Q is the same, and is left out.
        """
        settings, table = self._model_settings, self.table
        rng = np.random.default_rng((self._settings.seed, self.step))
        rows, keys = table.draw(settings.negatives, ITEM, self.watermark_ms, rng)
        if not len(keys) or not settings.batch_negatives:
            return Negatives(rows, keys, np.zeros(len(keys), np.float32))
        own = batch.targets.keys[batch.targets.retrieved]
        own = own[rng.permutation(len(own))[: settings.batch_negatives]]
        slots = table.lookup(own, watermark_ms=self.watermark_ms)
        held = slots.rows_a == slots.rows_b  # an id without a slot has no count of its own
        rows, keys = np.concatenate([rows, slots.rows_a[held]]), np.concatenate([keys, own[held]])
        q = settings.negatives / max(1, table.live_count(self.watermark_ms, ITEM)) + held.sum() * table.share(rows)
        return Negatives(rows, keys, np.maximum(np.log(q), LOG_Q_FLOOR).astype(np.float32))

    def _gather(self, lookup: Lookup, negatives: "Negatives") -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The rows that this step may change i64[k], as they are served, as one leaf f32[k, D]; the token vectors
        f32[T, D] and the negatives' f32[N, D], as functions of the leaf."""
        used, place = np.unique(np.concatenate([lookup.rows_a, lookup.rows_b, negatives.rows]), return_inverse=True)
        rows = torch.from_numpy(used)
        leaf = self.table.weight.index_select(0, rows).to(WIRE).float().to(self._device).requires_grad_()
        # `embedding` sums the gradient of a repeated row in one fixed order; indexing need not
        n = len(lookup.rows_a)
        a, b, c = (self._there(part) for part in np.split(place, [n, 2 * n]))
        return rows, leaf, mean(embedding(a, leaf), embedding(b, leaf)), embedding(c, leaf)

    def _grow(self) -> None:
        """Twice the slots, for table and optimizer alike."""
        before, after = self.table.grow()
        self.sparse.grow(len(self.table.weight), before, after)
        GROWN.inc()

    def _lesson(self, batch: Batch) -> Batch:
        """What of the batch is learned: all, or with stochastic length parts of its histories."""
        alpha = self._settings.stochastic_length
        if alpha == WHOLE:
            return batch
        rng = np.random.default_rng((self._settings.seed, self.step, 1))
        shortened = [shorten(example, alpha, self._history_length, rng) for example in batch.examples]
        if all(short is whole for short, whole in zip(shortened, batch.examples, strict=True)):
            return batch
        return assemble(shortened, self.model.layout)

    def _forward(self, batch: Batch, vectors: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Logits f32[ranked, K] and queries f32[retrieved, D] of a batch; None where there is nothing to ask."""
        hidden = self.model.transduce(batch.tokens, vectors)
        return self._logits(batch, hidden), self._queries(batch, hidden)

    def _logits(self, batch: Batch, hidden: Tensor) -> Tensor | None:
        """f32[ranked, K]"""
        ranked = batch.targets.ranked
        if not len(ranked) or not self._model_settings.ranking_weight:
            return None
        index = self._there(batch.targets.token[ranked])
        return self.model.rank(embedding(index, hidden))

    def _queries(self, batch: Batch, hidden: Tensor) -> Tensor | None:
        """f32[retrieved, D], normalised"""
        found = batch.targets.retrieved
        if not len(found) or not self._model_settings.retrieval_weight:
            return None
        return self.model.queries(hidden, self._there(batch.targets.query[found]))

    def _catalogue(self) -> tuple[NDArray[np.uint64], Tensor]:
        """The live items as they are now: keys u64[k] and normalised vectors f32[k, D] (a copy)."""
        rows, keys = self.table.live(self.watermark_ms, ITEM)
        vectors = normalize(served(self.table.weight.index_select(0, torch.from_numpy(rows))), dim=1, eps=1e-6)
        return keys, vectors

    @torch.no_grad()
    def _predictions(
        self,
        batch: Batch,
        logits: Tensor | None,
        queries: Tensor | None,
        catalogue: tuple[NDArray[np.uint64], Tensor] | None,
    ) -> Predictions:
        targets = batch.targets
        probabilities = np.full((len(targets), targets.labels.shape[1]), np.nan, np.float32)
        rank = np.zeros(len(targets), np.int64)
        if logits is not None:
            probabilities[targets.ranked] = logits.sigmoid().cpu().numpy()
        if queries is None or catalogue is None:
            return Predictions(probabilities, rank, len(self.table.live(self.watermark_ms, ITEM)[0]))
        keys, vectors = catalogue[0], catalogue[1].to(self._device)
        order = np.argsort(keys)
        found = targets.retrieved
        wanted = targets.keys[found]
        at = np.minimum(np.searchsorted(keys, wanted, sorter=order), max(0, len(keys) - 1))
        column = order[at] if len(keys) else np.zeros(len(found), np.int64)
        known = keys[column] == wanted if len(keys) else np.zeros(len(found), bool)
        rank[found] = -1
        block = max(1, RANK_CELLS // max(1, len(keys)))
        for part in np.array_split(np.flatnonzero(known), max(1, -(-int(known.sum()) // block))):
            scores = queries[self._there(part)] @ vectors.T
            true = scores.gather(1, self._there(column[part])[:, None])
            ahead = ~(
                scores < true
            )  # ties, and what is not finite, count against us; so does the item itself: 1 = best
            rank[found[part]] = ahead.sum(dim=1).cpu().numpy()
        return Predictions(probabilities, rank, len(keys))

    def _descend(self, loss: Tensor, rows: Tensor, leaf: Tensor) -> str:
        """Learn from the loss; returns why not ("" when learned)."""
        self.dense.zero_grad(set_to_none=True)
        if not loss.requires_grad:
            return ""
        if not bool(torch.isfinite(loss)):
            SKIPPED.labels("loss").inc()
            return "loss"
        loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self._settings.gradient_clip).cpu()
        gradient = (leaf.grad if leaf.grad is not None else torch.zeros_like(leaf)).cpu()
        if not (bool(torch.isfinite(norm)) and bool(torch.isfinite(gradient).all())):
            self.dense.zero_grad(set_to_none=True)
            SKIPPED.labels("gradient").inc()
            return "gradient"
        self._gradient_norm = max(self._gradient_norm, float(torch.hypot(norm, gradient.norm())))
        self.dense.step()
        touched = gradient.any(dim=1)
        self.sparse.step(self.table.weight, rows[touched], gradient[touched], self.step)
        self.table.touch(rows[touched].numpy())
        return ""

    # -- checkpoints

    def state(self) -> dict[str, Tensor]:
        """Everything that a later step depends on, by name, on the host."""
        tensors = {f"model/{name}": value.detach().cpu() for name, value in self.model.state_dict().items()}
        tensors |= {f"table/{name}": value for name, value in self.table.state().items()}
        tensors |= {f"sparse/{name}": column for name, column in self.sparse.state.items()}
        for name, parameter in self.model.named_parameters():
            for key, value in self.dense.state.get(parameter, {}).items():
                tensors[f"adamw/{key}/{name}"] = value.detach().cpu()
        return tensors

    def load_state(self, tensors: Mapping[str, Tensor], step: int, watermark_ms: int) -> None:
        """Become what `state` was taken from; raises `ConfigError` where the table's geometry differs."""
        self.model.load_state_dict(_under("model/", tensors))
        self.table.load_state(_under("table/", tensors))
        self.sparse.load_state(_under("sparse/", tensors))
        for name, parameter in self.model.named_parameters():
            state = {
                key: tensors[f"adamw/{key}/{name}"]
                for key in ("step", "exp_avg", "exp_avg_sq")
                if f"adamw/{key}/{name}" in tensors
            }
            if state:
                home = {"step": torch.device("cpu")}  # AdamW counts on the host
                self.dense.state[parameter] = {
                    key: value.to(home.get(key, self._device), copy=True) for key, value in state.items()
                }
        self.step, self.watermark_ms = step, watermark_ms

    def _there(self, values: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(values).to(self._device)


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
