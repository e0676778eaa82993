"""The two losses: cross entropy per action kind, and sampled softmax over items."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

MASKED = -5e4


def ranking_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Binary cross entropy, summed over the K tasks, mean over the m targets. f32[m, K] both; 0 without targets."""
    loss = F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="sum")
    return loss / max(len(logits), 1)


def sampled_softmax(  # noqa: PLR0917
    queries: Tensor,
    positive_vectors: Tensor,
    negative_vectors: Tensor,
    positive_keys: NDArray[np.uint64],
    negative_keys: NDArray[np.uint64],
    temperature: float,
    log_q: NDArray[np.float32],
) -> Tensor:
    """Mean of -log softmax of each positive among itself and the shared negatives; 0 without targets.

    queries f32[m, D] of length 1; positive_vectors f32[m, D], negative_vectors f32[r, D] of any length: cosine /
    temperature. A negative that is the row's own positive (by key, u64[m] and u64[r]) is masked. log_q f32[r]: of how
    often each negative stands in such a sample on average; taken off its score, the sum estimates the one over all
    items. The positive is always there, so its own stays (Yi et al., RecSys 2019; Khrylchenko et al., RecSys 2025).
    """
    positives, negatives = (
        F.normalize(positive_vectors, dim=-1, eps=1e-6),
        F.normalize(negative_vectors, dim=-1, eps=1e-6),
    )
    hit = torch.from_numpy(positive_keys[:, None] == negative_keys[None, :]).to(queries.device)
    others = queries @ negatives.T / temperature - torch.from_numpy(log_q).to(queries)
    others = others.masked_fill(hit, MASKED)
    own = (queries * positives).sum(-1, keepdim=True) / temperature
    every = torch.cat([own, others], 1)
    return (torch.logsumexp(every, 1) - own.squeeze(1)).sum() / max(len(queries), 1)
