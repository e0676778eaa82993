"""A small world with known probabilities: users whose tastes drift, items that are born, live for seconds and die.

Whether a shown item is clicked is drawn from

    p(click) = examined(position) * sigmoid(base + propensity(user) + mood(user, t) + quality(item)
                                            + taste(user, t)[topic(item)] - tired(user, item))
    p(like)  = p(click) * sigmoid(like_base + half of the same quality and taste)

so each part rewards another ability. `quality` differs a lot between items and is all that popularity can see; it
also makes frozen weights go stale, because the items they knew die within a minute. `propensity` and the two-state
`mood` belong to the user and show only in what the user did lately; `taste` needs users and items together; `tired`
(an item clicked before) needs the user's own history. Nothing of this is published: the events carry ids, times
and the place in the list, and the probabilities go to a side file that only the comparison reads.

Pure and seeded: time is passed in, the same calls give the same world.
"""

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from streamgr.config import Feed

TOPICS = 5
BASE = -2.0
LIKE_BASE = -1.2
PROPENSITY_SPREAD = 1.5  # from those who click on much of what they see to those who hardly ever do
QUALITY_SPREAD = 2.0
TASTE_SPREAD = 0.6
TASTE_DRIFT_SECONDS = 60.0  # how long a taste lasts
MOOD = 0.7  # a user is either keen (+MOOD) or idle (-MOOD)
MOOD_SECONDS = 15.0  # the mean time until a mood changes
TIRED = 1.0  # an item once clicked is less likely to be clicked again
POSITION_BIAS = 0.04  # place k is examined with probability 1 / (1 + POSITION_BIAS * k)


@dataclass(frozen=True, slots=True)
class Item:
    """One item: what it is about, how good it is, and how long it lives (ms since 1970)."""

    item_id: str
    topic: int
    quality: float
    born_ms: int
    dies_ms: int


@dataclass(frozen=True, slots=True)
class Shown:
    """One impression and what will come of it: the true probabilities, and the actions drawn with their times."""

    item_id: str
    position: int
    p: dict[str, float]  # action kind -> probability, given everything but the draw itself
    actions: tuple[tuple[str, int], ...]  # (kind, event time in ms), in time order


@dataclass(slots=True)
class _User:
    propensity: float
    taste: NDArray[np.float64]  # one weight a topic
    keen: bool
    seen_ms: int
    clicked: set[str] = field(default_factory=set)


class World:
    """The users and items of one simulation, advanced by whoever holds the clock."""

    def __init__(self, settings: Feed, start_ms: int) -> None:
        self._settings = settings
        self._rng = np.random.default_rng(settings.seed)
        self._born = 0
        self._items: dict[str, Item] = {}
        self._users = {f"u{n}": self._new_user(start_ms) for n in range(settings.users)}
        self._names = list(self._users)
        for _ in range(settings.live_items):
            # the first items are of any age, so that deaths are spread out from the start
            self._bear(start_ms, spent=float(self._rng.random()))

    @property
    def born(self) -> int:
        """How many items there have been."""
        return self._born

    def live(self) -> list[str]:
        """The ids of the items alive now, oldest first."""
        return list(self._items)

    def item(self, item_id: str) -> Item:
        """A living item; `KeyError` for a dead one."""
        return self._items[item_id]

    def advance(self, now_ms: int) -> None:
        """Let items die, each making room for a new one."""
        for item in [item for item in self._items.values() if item.dies_ms <= now_ms]:
            del self._items[item.item_id]
            for user in self._users.values():
                user.clicked.discard(item.item_id)
            self._bear(now_ms)

    def visitor(self) -> str:
        """The user who comes next: each is as likely."""
        return self._names[int(self._rng.integers(len(self._names)))]

    def candidates(self, n: int) -> list[str]:
        """`n` living items (all, if there are fewer), without repetition, in random order."""
        live = self.live()
        return [live[k] for k in self._rng.permutation(len(live))[:n]]

    def slate(self, ranking: list[str], explore: float) -> list[str]:
        """What is shown of a ranking: its head, but each place is with probability `explore` a random other item.

        Without this a new item, unknown to the model, would never be shown and never be learned.
        """
        left = list(ranking)
        chosen = []
        for _ in range(min(self._settings.slate, len(left))):
            chosen.append(left.pop(int(self._rng.integers(len(left))) if self._rng.random() < explore else 0))
        return chosen

    def show(self, user_id: str, slate: list[str], now_ms: int) -> list[Shown]:
        """Show a slate to a user at `now_ms` and draw what the user will do within `act_within_seconds`."""
        user = self._users[user_id]
        self._live_on(user, now_ms)
        return [self._shown(user, self._items[item_id], position, now_ms) for position, item_id in enumerate(slate)]

    def _shown(self, user: _User, item: Item, position: int, now_ms: int) -> Shown:
        liking = item.quality + float(user.taste[item.topic])
        logit = BASE + user.propensity + (MOOD if user.keen else -MOOD) + liking
        if item.item_id in user.clicked:
            logit -= TIRED
        click = _sigmoid(logit) / (1 + POSITION_BIAS * position)
        like_after_click = _sigmoid(LIKE_BASE + liking / 2)
        actions: list[tuple[str, int]] = []
        within = self._settings.act_within_seconds * 1000
        if self._rng.random() < click:
            after = int(within * (0.1 + 0.5 * self._rng.random()))
            actions.append(("click", now_ms + after))
            user.clicked.add(item.item_id)
            if self._rng.random() < like_after_click:
                actions.append(("like", now_ms + after + int((within - after) * (0.1 + 0.8 * self._rng.random()))))
        return Shown(item.item_id, position, {"click": click, "like": click * like_after_click}, tuple(actions))

    def _live_on(self, user: _User, now_ms: int) -> None:
        """Drift the user's taste and mood over the time since the last visit."""
        seconds = max(0, now_ms - user.seen_ms) / 1000
        user.seen_ms = max(now_ms, user.seen_ms)
        keep = math.exp(-seconds / TASTE_DRIFT_SECONDS)
        drawn = self._rng.normal(0, TASTE_SPREAD, TOPICS)
        user.taste = keep * user.taste + math.sqrt(1 - keep * keep) * drawn
        # of a two-state Markov chain: the chance to be found in the other state after `seconds`
        if self._rng.random() < 0.5 * (1 - math.exp(-2 * seconds / MOOD_SECONDS)):
            user.keen = not user.keen

    def _new_user(self, now_ms: int) -> _User:
        return _User(
            propensity=float(self._rng.normal(0, PROPENSITY_SPREAD)),
            taste=self._rng.normal(0, TASTE_SPREAD, TOPICS),
            keen=bool(self._rng.random() < 0.5),
            seen_ms=now_ms,
        )

    def _bear(self, now_ms: int, spent: float = 0.0) -> None:
        low, high = self._settings.item_life_seconds
        life_ms = 1000 * float(self._rng.uniform(low, high))
        born_ms = now_ms - int(spent * life_ms)
        item = Item(
            item_id=f"i{self._born}",
            topic=int(self._rng.integers(TOPICS)),
            quality=float(self._rng.normal(0, QUALITY_SPREAD)),
            born_ms=born_ms,
            dies_ms=born_ms + int(life_ms),
        )
        self._born += 1
        self._items[item.item_id] = item


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))
