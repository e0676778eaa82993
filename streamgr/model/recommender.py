"""The recommender: one trunk over a user's tokens, heads for ranking and retrieval.

A token is its id's vector * sqrt(D) plus the sum of the embeddings of its marks (which event it is, which actions were
taken). `transduce` maps a whole jagged batch to hidden states in one pass (training). Serving is the same function, a
candidate being an item token whose request time is `at`, in parts that can be kept: `prefill` makes a history's
`Cache`, `extend` makes it that of the history as it is now, `score` and `retrieval_query` read it. With n tokens and c
candidates the first costs O(n^2 D) and the last O(c n D). The ids' vectors come from the ID table, as an argument.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from streamgr import config
from streamgr.events import IMPRESSION, History
from streamgr.model import attention, attention_blocks
from streamgr.model.attention import Attend
from streamgr.model.cache import Cache
from streamgr.model.heads import RankingHead, RetrievalHead
from streamgr.model.hstu import Encoding, Seen, Stack, View, normal
from streamgr.model.tokens import Layout, Tokens, tokenize

MARK_STD = 0.3  # what a user did must stand out from which item it was
LONG_AGO_MS = 1 << 62
PAIRS_A_VIEW = 1 << 20  # of an appended row and a token before it: more rows are appended in parts


def attention_of(device: torch.device | None) -> tuple[Attend, Callable[[Tokens, attention.Shape], Any]]:
    """The twin of the attention for a device, and what lays out a batch for it."""
    if device is None or device.type == "cpu":
        return attention_blocks.attend, attention_blocks.plan
    from streamgr.model import attention_triton  # Triton is there where a GPU is

    return attention_triton.attend, partial(attention_triton.plan, device=device)


class Recommender(nn.Module):
    """All dense parameters. `actions`: the ordered action kinds, one task each. Equal seeds give equal weights."""

    def __init__(
        self,
        settings: config.Model,
        actions: Sequence[str],
        seed: int,
        window_ms: int = 0,
        device: torch.device | None = None,
    ) -> None:
        """window_ms: the attribution window, which summed tokens depend on. device: the CPU unless another one."""
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.settings, self.actions = settings, tuple(actions)
        if settings.tokens == "summed" and window_ms < 1:
            raise ValueError("summed tokens depend on the attribution window: give `window_ms`")
        self.layout = Layout(len(actions), window_ms if settings.tokens == "summed" else 0, settings.user_token)
        self.marks = normal((self.layout.marks, settings.dim), generator, MARK_STD)
        attend, self._plan = attention_of(device)
        self.stack = Stack(settings, generator, attend)
        self.encoding = Encoding(settings, generator) if self.stack.encoded else None
        self.ranking = RankingHead(settings.dim, len(self.actions), generator)
        self.retrieval = RetrievalHead(settings.dim, generator)
        if device is not None:
            self.to(device)

    def tokens(self, history: History, at: int, user: int) -> Tokens:
        """The tokens of one history (all before `at`, ms), asked at `at`; user: `events.user_key`."""
        if len(history) and int(history.times[-1]) >= at:
            raise ValueError(f"the history reaches {history.times[-1]}, not before at={at}: it would leak")
        return tokenize([history], self.layout, users=[user], at=[at])

    def transduce(self, tokens: Tokens, vectors: Tensor) -> Tensor:
        """Hidden states f32[T, D] of a jagged batch; vectors f32[T, D]: each token's id."""
        return self._run(tokens, vectors)[0]

    def rank(self, hidden: Tensor) -> Tensor:
        """Logits f32[m, K] at item tokens' hidden states f32[m, D]."""
        logits: Tensor = self.ranking(hidden)
        return logits

    def queries(self, hidden: Tensor, index: Tensor) -> Tensor:
        """Query vectors f32[m, D] of length 1 at the tokens index i64[m]; -1: the start query (never acted)."""
        queries: Tensor = self.retrieval(hidden, index)
        return queries

    def prefill(self, tokens: Tokens, at: int, vectors: Tensor) -> Cache:
        """What is known of a history after one pass over it: `tokens(…)` of it at `at` (ms), of vectors f32[n, D]."""
        hidden, kept = self._run(tokens, vectors)
        return Cache(tokens, at, tuple(kept), _row(hidden, int(tokens.queries[0])))

    def extend(self, cache: Cache, tokens: Tokens, at: int, vectors: Tensor) -> Cache:
        """The same as `prefill(tokens, at, …)`, of vectors f32[r, D] of the last r tokens alone.

        The n - r before them are taken from a cache of the same weights; at most `cache.reusable(tokens)` may be.
        """
        n, start, known = len(tokens), len(tokens) - len(vectors), cache.reusable(tokens)
        if not 0 <= start <= known:
            raise ValueError(f"the vectors of {len(vectors)} of {n} tokens, when the cache holds for the first {known}")
        if start == n == len(cache.tokens):  # nothing new, and no row asks for the time of what comes next
            return Cache(tokens, at, cache.kept, cache.acted)
        embedded, hidden = self._embedded(tokens, vectors, start), [vectors[:0]]
        kept = tuple(seen.upto(start) for seen in cache.kept)
        size = max(1, PAIRS_A_VIEW // n) if n else 1
        for begin in range(start, n, size):
            end = min(begin + size, n)
            rows, times = slice(begin, end), tokens.times
            view = View.of(tokens.visible[rows], tokens.query_times[rows], times[rows], times[:end], self.stack.shape)
            states, kept = self.stack.extend(embedded[begin - start : end - start], kept, view, append=True)
            hidden.append(states)
        query = int(tokens.queries[0])
        acted = cache.acted if 0 <= query < start else _row(torch.cat(hidden), query - start if query >= start else -1)
        return Cache(tokens, at, kept, acted)

    def score(self, cache: Cache, candidate_vectors: Tensor) -> Tensor:
        """Logits f32[c, K] of candidates f32[c, D] shown at the cache's `at`."""
        times, at = cache.tokens.times, np.array([cache.at])
        visible = np.array([len(times)])
        embedded = self._embed(candidate_vectors, np.full(len(candidate_vectors), 1 << IMPRESSION))
        if self.encoding is not None:
            waited = at - times[-1:] if len(times) else np.array([LONG_AGO_MS])
            embedded = embedded + self.encoding(torch.from_numpy(visible), torch.from_numpy(waited))
        view = View.of(visible, at, at, times, self.stack.shape)
        return self.rank(self.stack.extend(embedded, cache.kept, view)[0])

    def retrieval_query(self, cache: Cache) -> Tensor:
        """The query f32[D], of length 1: off the last action, else the start query."""
        return self.queries(cache.acted, torch.tensor([len(cache.acted) - 1]))[0]

    def _run(self, tokens: Tokens, vectors: Tensor) -> tuple[Tensor, list[Seen]]:
        hidden, kept = self.stack(self._embedded(tokens, vectors), self._plan(tokens, self.stack.shape))
        return hidden, kept

    def _embedded(self, tokens: Tokens, vectors: Tensor, start: int = 0) -> Tensor:
        """f32[T - start, D]: the tokens from `start` on, of which these are the ids' vectors."""
        embedded = self._embed(vectors, tokens.marks[start:])
        if self.encoding is not None:
            visible = tokens.visible[start:]
            first = np.repeat(tokens.offsets[:-1], np.diff(tokens.offsets))[start:]
            last = tokens.times[first + np.maximum(visible - 1, 0)]
            asked = np.where(tokens.provisional, tokens.times, tokens.query_times)[start:]
            waited = np.where(visible > 0, asked - last, LONG_AGO_MS)
            embedded = embedded + self.encoding(self._here(visible), self._here(waited))
        return embedded

    def _embed(self, vectors: Tensor, marks: "np.typing.NDArray[np.int64]") -> Tensor:
        bits = torch.from_numpy(marks[:, None] >> np.arange(self.layout.marks) & 1).to(vectors)
        embedded: Tensor = torch.addmm(vectors * self.settings.dim**0.5, bits, self.marks)
        return embedded

    def _here(self, values: "np.typing.NDArray[np.int64]") -> Tensor:
        return torch.from_numpy(values).to(self.marks.device)


def _row(hidden: Tensor, index: int) -> Tensor:
    """f32[1, D]: a copy of one row; f32[0, D] for -1."""
    return hidden[max(index, 0) : index + 1].clone()
