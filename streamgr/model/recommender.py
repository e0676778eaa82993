"""The recommender: one trunk over interleaved item and action tokens, heads for ranking and retrieval.

A token is its item's vector * sqrt(D) plus the embedding of its kind. `transduce` maps a whole jagged batch to hidden
states in one pass (training); `score` maps one history and all its candidates (serving). The two are the same function:
a candidate is an item token whose request time is `at`. Item vectors come from the ID table, as an argument.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from streamgr import config
from streamgr.events import FIRST_ACTION, IMPRESSION, History
from streamgr.model import attention
from streamgr.model.heads import RankingHead, RetrievalHead
from streamgr.model.hstu import Seen, Stack, normal
from streamgr.model.tokens import Tokens, tokenize

CANDIDATES_A_PASS = 512
KIND_STD = 0.3  # what a user did must stand out from which item it was


class Recommender(nn.Module):
    """All dense parameters. `actions`: the ordered action kinds, one task each. Equal seeds give equal weights."""

    def __init__(self, settings: config.Model, actions: Sequence[str], seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.settings, self.actions = settings, tuple(actions)
        self.kinds = normal((FIRST_ACTION + len(self.actions), settings.dim), generator, KIND_STD)
        self.stack = Stack(settings, generator)
        self.ranking = RankingHead(settings.dim, len(self.actions), generator)
        self.retrieval = RetrievalHead(settings.dim, generator)

    def transduce(self, tokens: Tokens, vectors: Tensor) -> Tensor:
        """Hidden states f32[T, D] of a jagged batch; vectors f32[T, D]: each token's item."""
        return self._run(tokens, vectors)[0]

    def rank(self, hidden: Tensor) -> Tensor:
        """Logits f32[m, K] at item tokens' hidden states f32[m, D]."""
        logits: Tensor = self.ranking(hidden)
        return logits

    def queries(self, hidden: Tensor, index: Tensor) -> Tensor:
        """Query vectors f32[m, D] of length 1 at the tokens index i64[m]; -1: the start query (never acted)."""
        queries: Tensor = self.retrieval(hidden, index)
        return queries

    def score(self, history: History, at: int, history_vectors: Tensor, candidate_vectors: Tensor) -> Tensor:
        """Logits f32[c, K] of candidates f32[c, D] shown at `at` (ms), after a history (all before `at`) f32[n, D]."""
        hidden, kept = self._run(_before(history, at), history_vectors)
        elapsed = torch.from_numpy(at - history.times.astype(np.int64))
        parts = [
            self.rank(self.stack.extend(self._embed(part, torch.full((len(part),), IMPRESSION)), kept, elapsed))
            for part in torch.split(candidate_vectors, CANDIDATES_A_PASS)
        ]
        return torch.cat(parts) if parts else hidden.new_zeros(0, len(self.actions))

    def retrieval_query(self, history: History, at: int, history_vectors: Tensor) -> Tensor:
        """The query f32[D], of length 1, for what to show at `at` (ms): off the last action, else the start query."""
        acted = np.flatnonzero(history.kinds != IMPRESSION)
        hidden = self.transduce(_before(history, at), history_vectors)
        return self.queries(hidden, torch.tensor([acted[-1] if len(acted) else -1]))[0]

    def _run(self, tokens: Tokens, vectors: Tensor) -> tuple[Tensor, list[Seen]]:
        plan = attention.plan(tokens, self.settings.position_buckets, self.settings.time_buckets)
        hidden, kept = self.stack(self._embed(vectors, torch.from_numpy(tokens.kinds)), plan)
        return hidden, kept

    def _embed(self, vectors: Tensor, kinds: Tensor) -> Tensor:
        embedded: Tensor = vectors * self.settings.dim**0.5 + self.kinds.index_select(0, kinds)
        return embedded


def _before(history: History, at: int) -> Tokens:
    if len(history) and int(history.times[-1]) >= at:
        raise ValueError(f"the history reaches {history.times[-1]}, not before at={at}: it would leak")
    return tokenize([history], [at])
