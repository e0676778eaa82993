"""Examples into one batch: jagged tokens, and which of them are judged on what.

Ranking targets are impressions: one label per action kind, read from the bits. Retrieval targets are the positively
engaged ones, impressions with any label and organic actions: their item is to be found from the hidden state of the
last action before the request (decision 1: nothing of the request itself is seen). Without such an action the query is
the model's learned start vector, index -1.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from streamgr.events import IMPRESSION, user_key
from streamgr.model.tokens import Layout, Tokens, tokenize
from streamgr.sequence.examples import Example

Ints = NDArray[np.int64]
Number = TypeVar("Number", bound=np.generic)


@dataclass(frozen=True, slots=True)
class Targets:
    """What a batch is judged on, in batch order, as columns of length m; token indices count over the whole batch.

    token i64, kind u8, keys u64 (the item's), labels bool[m, K], query i64 (token whose state asks for the item, -1 =
    start), positive bool (is a retrieval target), append_ms and closed_ms i64 (broker append times of the target's
    record and of the one that closed it), example i64 (which example it came with).
    """

    token: Ints
    kind: NDArray[np.uint8]
    keys: NDArray[np.uint64]
    labels: NDArray[np.bool_]
    query: Ints
    positive: NDArray[np.bool_]
    append_ms: Ints
    closed_ms: Ints
    example: Ints

    def __len__(self) -> int:
        return len(self.token)

    @property
    def ranked(self) -> Ints:
        """Which targets are ranking targets."""
        return np.flatnonzero(self.kind == IMPRESSION)

    @property
    def retrieved(self) -> Ints:
        """Which targets are retrieval targets."""
        return np.flatnonzero(self.positive)


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's work. `watermark_ms` is the greatest watermark among its examples."""

    examples: Sequence[Example]
    tokens: Tokens
    targets: Targets
    watermark_ms: int


def assemble(examples: Sequence[Example], layout: Layout) -> Batch:
    """The batch of these examples, in their order."""
    local = [example.target_index for example in examples]
    tokens = tokenize(
        [example.history for example in examples],
        layout,
        targets=local,
        users=[user_key(example.user) for example in examples] if layout.user_token else None,
    )
    counts = [len(index) for index in local]
    kind = _join([example.history.kinds[index] for example, index in zip(examples, local, strict=True)], np.uint8)
    bits = _join([example.target_labels for example in examples], np.uint32)
    return Batch(
        examples,
        tokens,
        Targets(
            token=tokens.targets,
            kind=kind,
            keys=_join([e.history.items[index] for e, index in zip(examples, local, strict=True)], np.uint64),
            labels=((bits[:, None] >> np.arange(layout.actions, dtype=np.uint32)) & 1).astype(np.bool_),
            query=tokens.queries,
            positive=(kind != IMPRESSION) | (bits != 0),
            append_ms=_join([example.target_append_ms for example in examples], np.int64),
            closed_ms=np.repeat(np.array([example.append_ms for example in examples], np.int64), counts),
            example=np.repeat(np.arange(len(examples)), counts),
        ),
        max(example.watermark for example in examples),
    )


def _join(columns: Sequence[NDArray[Any]], dtype: type[Number]) -> NDArray[Number]:
    return np.concatenate(columns).astype(dtype, copy=False) if columns else np.empty(0, dtype)
