"""The recommender: one trunk over a user's tokens, heads for ranking and retrieval.

A token is its id's vector * sqrt(D) plus the sum of the embeddings of its marks (which event it is, which actions were
taken). `transduce` maps a whole jagged batch to hidden states in one pass (training); `score` maps one history and all
its candidates (serving). The two are the same function: a candidate is an item token whose request time is `at`. The
ids' vectors come from the ID table, as an argument.
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
from streamgr.model.heads import RankingHead, RetrievalHead
from streamgr.model.hstu import Encoding, Seen, Stack, normal
from streamgr.model.tokens import Layout, Tokens, tokenize

CANDIDATES_A_PASS = 512
MARK_STD = 0.3  # what a user did must stand out from which item it was
LONG_AGO_MS = 1 << 62


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

    def score(self, tokens: Tokens, at: int, vectors: Tensor, candidate_vectors: Tensor) -> Tensor:
        """Logits f32[c, K] of candidates f32[c, D] shown at `at` (ms), after `tokens` of vectors f32[n, D]."""
        hidden, kept = self._run(tokens, vectors)
        elapsed = torch.from_numpy(at - tokens.times)
        parts = [
            self.rank(self.stack.extend(self._candidates(part, tokens, at), kept, elapsed))
            for part in torch.split(candidate_vectors, CANDIDATES_A_PASS)
        ]
        return torch.cat(parts) if parts else hidden.new_zeros(0, len(self.actions))

    def retrieval_query(self, tokens: Tokens, vectors: Tensor) -> Tensor:
        """The query f32[D], of length 1, after `tokens(…)`: off the last action, else the start query."""
        return self.queries(self.transduce(tokens, vectors), torch.from_numpy(tokens.queries))[0]

    def _run(self, tokens: Tokens, vectors: Tensor) -> tuple[Tensor, list[Seen]]:
        plan = self._plan(tokens, self.stack.shape)
        embedded = self._embed(vectors, tokens.marks)
        if self.encoding is not None:
            start = np.repeat(tokens.offsets[:-1], np.diff(tokens.offsets))
            last = tokens.times[start + np.maximum(tokens.visible - 1, 0)]
            asked = np.where(tokens.provisional, tokens.times, tokens.query_times)
            waited = np.where(tokens.visible > 0, asked - last, LONG_AGO_MS)
            embedded = embedded + self.encoding(self._here(tokens.visible), self._here(waited))
        hidden, kept = self.stack(embedded, plan)
        return hidden, kept

    def _candidates(self, vectors: Tensor, tokens: Tokens, at: int) -> Tensor:
        embedded = self._embed(vectors, np.full(len(vectors), 1 << IMPRESSION))
        if self.encoding is not None:
            n = len(tokens)
            waited = at - int(tokens.times[-1]) if n else LONG_AGO_MS
            embedded = embedded + self.encoding(torch.tensor([n]), torch.tensor([waited]))
        return embedded

    def _embed(self, vectors: Tensor, marks: "np.typing.NDArray[np.int64]") -> Tensor:
        bits = torch.from_numpy(marks[:, None] >> np.arange(self.layout.marks) & 1).to(vectors)
        embedded: Tensor = torch.addmm(vectors * self.settings.dim**0.5, bits, self.marks)
        return embedded

    def _here(self, values: "np.typing.NDArray[np.int64]") -> Tensor:
        return torch.from_numpy(values).to(self.marks.device)
