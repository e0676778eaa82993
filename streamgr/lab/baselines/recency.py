"""Recency: first the user's own last items, newest first (people come back), then what anybody acted on last.

It has no notion of a probability, so it is judged by ranks alone.
"""

import math

from streamgr.lab.baselines import Catalogue, Target

OWN_ITEMS = 50


class Recency:
    """`own_items`: how many of the user's own last items go first; 0 leaves what anybody acted on last."""

    def __init__(self, own_items: int = OWN_ITEMS) -> None:
        self._own_items = own_items
        self._last = Catalogue(-math.inf)  # event time of the last action
        self._own: dict[str, dict[str, None]] = {}  # user → own items, oldest first

    def probabilities(self, target: Target) -> dict[str, float] | None:
        return None

    def rank(self, target: Target) -> int:
        if target.item not in self._last:
            return -1
        own = self._own.get(target.user, {})
        if target.item in own:
            return list(reversed(own)).index(target.item) + 1
        mine = self._last.get(target.item)
        behind = sum(self._last.get(item) < mine for item in own)  # own items that go first all the same
        return self._last.rank(target.item) + behind

    def learn(self, target: Target) -> None:
        if not target.labels and target.shown:
            if target.item not in self._last:
                self._last.put(target.item, -math.inf)
            return
        self._last.put(target.item, max(self._last.get(target.item), float(target.time_ms)))
        if self._own_items:
            own = self._own.setdefault(target.user, {})
            own.pop(target.item, None)
            own[target.item] = None
            if len(own) > self._own_items:
                del own[next(iter(own))]
