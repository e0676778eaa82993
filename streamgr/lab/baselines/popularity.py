"""Popularity: what many acted on lately ranks first; an item's click-through rate is its probability.

Counts fade with event time (half-life). For ranking, an item's score is log2 of its faded number of positive targets,
taken at a fixed instant instead of now: fading scales all items alike, so their order is that of any instant, and no
score has to be touched as time goes by. For probabilities, per action kind: (positives + k·base) / (shown + k), all
faded, which shrinks an item that was rarely shown to the running base rate.
"""

import math
from collections.abc import Sequence

from streamgr.lab.baselines import Catalogue, Target

HALF_LIFE_SECONDS = 86_400.0
SHRINK = 20.0  # impressions that the base rate counts for
BASE_RATE_IMPRESSIONS = 1_000.0  # half-life of the base rate, in impressions


class Popularity:
    """See the module. `actions`: the kinds to give probabilities for."""

    def __init__(self, actions: Sequence[str], half_life_seconds: float = HALF_LIFE_SECONDS) -> None:
        self._actions, self._half_life_ms = list(actions), half_life_seconds * 1000
        self._liked = Catalogue(-math.inf)
        self._shown: dict[str, list[float]] = {}  # item → [last ms, shown, positives by kind…], faded to last ms
        self._base = [
            2.0,
            *([1.0] * len(self._actions)),
        ]  # shown, positives by kind: 1 of 2 before the first impression

    def probabilities(self, target: Target) -> dict[str, float] | None:
        if not target.shown:
            return None
        shown = self._faded(target.item, target.time_ms)
        return {
            kind: (shown[2 + b] + SHRINK * self._base[1 + b] / self._base[0]) / (shown[1] + SHRINK)
            for b, kind in enumerate(self._actions)
        }

    def rank(self, target: Target) -> int:
        return self._liked.rank(target.item)

    def learn(self, target: Target) -> None:
        if target.labels or not target.shown:
            at = target.time_ms / self._half_life_ms
            old = self._liked.get(target.item)
            high, low = max(old, at), min(old, at)
            self._liked.put(target.item, high + math.log2(1 + 2 ** (low - high)))  # log2(2^old + 2^at)
        elif target.item not in self._liked:
            self._liked.put(target.item, -math.inf)
        if target.shown:
            counts = self._faded(target.item, target.time_ms)
            positives = [float(kind in target.labels) for kind in self._actions]
            self._shown[target.item] = [counts[0], *(a + b for a, b in zip(counts[1:], [1.0, *positives], strict=True))]
            fade = 0.5 ** (1 / BASE_RATE_IMPRESSIONS)
            self._base = [fade * a + b for a, b in zip(self._base, [1.0, *positives], strict=True)]

    def _faded(self, item: str, now_ms: int) -> list[float]:
        counts = self._shown.get(item)
        if counts is None:
            return [float(now_ms), 0.0, *([0.0] * len(self._actions))]
        keep = 0.5 ** (max(0.0, now_ms - counts[0]) / self._half_life_ms)
        return [max(counts[0], float(now_ms)), *(keep * value for value in counts[1:])]
