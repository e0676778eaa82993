"""What is kept of a user's history between two requests: an immutable value, passed in and out.

A row of the trunk depends on its own token and on the tokens before it, never on what comes later. So the keys and
values that were computed for one list of tokens are right for another one as far as the two lists agree, whatever made
them differ: new events, one that came late, an erased user, a window that slid, another `at` (on which the query time
of a last action depends, which is the time of what comes after it). `reusable` says how far that is; the rows from
there on are computed again. What is kept belongs to one set of weights, which is the owner's matter
(`serve.kv_cache`).
"""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from streamgr.model.hstu import Seen
from streamgr.model.tokens import Tokens


@dataclass(frozen=True, slots=True)
class Cache:
    """One history as the model sees it at `at` (ms): its n tokens, the keys and values of every layer, and the hidden
    state of its last action, f32[1, D], or f32[0, D] without one."""

    tokens: Tokens
    at: int
    kept: tuple[Seen, ...]
    acted: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of all its columns."""
        t = self.tokens
        columns = (t.marks, t.keys, t.fields, t.times, t.query_times, t.visible, t.provisional)
        return sum(column.nbytes for column in columns) + sum(s.keys.nbytes + s.values.nbytes for s in self.kept)

    def reusable(self, tokens: Tokens) -> int:
        """How many leading rows are what they would be for `tokens` (one sequence) at its `at`."""
        mine, n = self.tokens, min(len(self.tokens), len(tokens))
        differs = np.zeros(n, bool)
        for a, b in (
            (mine.marks, tokens.marks),
            (mine.keys, tokens.keys),
            (mine.fields, tokens.fields),
            (mine.times, tokens.times),
            (mine.query_times, tokens.query_times),
            (mine.visible, tokens.visible),
            (mine.provisional, tokens.provisional),
        ):
            differs |= a[:n] != b[:n]
        rows = int(differs.argmax()) if differs.any() else n
        query = int(tokens.queries[0])
        if 0 <= query < rows and query != int(mine.queries[0]):
            return query  # the hidden state that retrieval needs now was not kept
        return rows
