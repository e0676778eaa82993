"""A question to which trainer and scorer must give the same answer, before anybody else is answered from a version.

The digests prove that the bytes are the same; the probe proves that the same bytes mean the same here, with this build
of the libraries, on this device. One short history and a few candidates, made of ids that the trainer picks: known ones
and unknown ones, so that slots, shared rows, trunk and heads all have a part in it.
"""

import numpy as np
import torch
from torch import Tensor

from streamgr.events import FIRST_ACTION, IMPRESSION, History
from streamgr.model.hashing import U64, fmix64
from streamgr.model.recommender import Recommender

HISTORY, CANDIDATES = 12, 4
KEYS = HISTORY + CANDIDATES
TOLERANCE = 1e-4  # of a logit of order 1: sums in another order, nothing more
GAP_MS = 1_000


def pick(live: U64, seed: int) -> U64:
    """u64[KEYS]: ids from those that are live, u64[k], every fourth one unknown (as good as surely)."""
    numbers = fmix64(np.arange(KEYS, dtype=np.uint64) + np.uint64(seed * KEYS))
    keys = live[(numbers % np.uint64(len(live))).view(np.int64)] if len(live) else numbers.copy()
    keys[::4] = numbers[::4]
    return keys


@torch.inference_mode()
def ask(recommender: Recommender, vectors: Tensor) -> Tensor:
    """Logits f32[CANDIDATES, K] for the ids whose served vectors are f32[KEYS, D]."""
    kinds = np.full(HISTORY, IMPRESSION, np.uint8)
    kinds[1::2] = FIRST_ACTION + np.arange(HISTORY // 2) % len(recommender.actions)
    times = np.arange(1, HISTORY + 1, dtype=np.int64) * GAP_MS
    history = History(kinds, np.zeros(HISTORY, np.uint64), times, np.zeros(HISTORY, np.uint64))
    tokens = recommender.tokens(history, at := int(times[-1]) + GAP_MS, user=0)
    cache = recommender.prefill(tokens, at, vectors[torch.arange(len(tokens)) % HISTORY])
    return recommender.score(cache, vectors[HISTORY:])
