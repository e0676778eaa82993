"""The comparison: continuous, frozen, popularity and oracle predictions of the same targets.

The trainer writes what it predicted for each target before it learned it (`trainer.prequential_log`); this file
follows that log. From the freeze point on, a target counts only when every model has an answer for it, so that all
are judged on the same ones:

    continuous  what the trainer's log says: the weights as they stood just before this target was learned
    frozen      the weights that were served when a third of the targets had been learned (`observer.py` asks them)
    popularity  per item a decayed click-through rate, shrunk to the running base rate, updated as labels close
    oracle      the simulator's own probability; the best anyone can do

Normalized entropy is judged on the first action kind, at impressions: log loss over the entropy of the base rate of
the same targets. HR@10 is judged at retrieval targets: was the true item among the first ten of all live items.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from streamgr.errors import DataError

SHRINK = 20.0  # impressions that the base rate counts for
BASE_RATE_TARGETS = 1_000.0  # half-life of the running base rate
NOW_TARGETS = 1_000.0  # half-life of the figures shown as "now"
HIT_AT = 10
EPSILON = 1e-7


class Row(msgspec.Struct, frozen=True, gc=False):
    """One line of the prequential log: a target, what came of it, and what was predicted before it was learned."""

    event_id: str
    user: str
    item: str
    time: int
    watermark: int
    version: int
    labels: list[str]
    kind: str
    p: dict[str, float] | None
    rank: int | None
    offset: int
    partition: int
    live: int = 0
    learned_ms: int = 0


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model said of one target: probabilities by kind, and the rank of the true item (None: not asked)."""

    p: Mapping[str, float] | None
    rank: int | None


class Popularity:
    """Per item: clicks and impressions that fade with event time; the rate is shrunk to the running base rate."""

    def __init__(self, half_life_seconds: float, live_seconds: float) -> None:
        """`half_life_seconds`: of an item's counts. `live_seconds`: an item not seen for so long is not ranked."""
        self._half_life_ms, self._live_ms = half_life_seconds * 1000, live_seconds * 1000
        self._index: dict[str, int] = {}
        self._clicks, self._shown = np.zeros(256), np.zeros(256)
        self._seen_ms = np.zeros(256, np.int64)
        self._base_clicks, self._base_shown = 1.0, 5.0

    def predict(self, item: str, now_ms: int) -> float:
        """The probability that `item` is clicked when shown."""
        if (k := self._index.get(item)) is None:
            return self._base
        return float(self._rates(np.array([k]), now_ms)[0])

    def rank(self, item: str, now_ms: int) -> int:
        """The place of `item` among the live items (1 = best; ties share their middle), -1 when it is not one."""
        k = self._index.get(item)
        live = np.flatnonzero(now_ms - self._seen_ms[: len(self._index)] <= self._live_ms)
        if k is None or now_ms - self._seen_ms[k] > self._live_ms:
            return -1
        rates = self._rates(live, now_ms)
        own = self._rates(np.array([k]), now_ms)[0]
        return 1 + int((rates > own).sum()) + (int((rates == own).sum()) - 1) // 2

    def learn(self, item: str, now_ms: int, clicked: bool, shown: bool) -> None:
        """One closed target; an organic action (`shown` false) counts for its item, not for the base rate."""
        k = self._index.setdefault(item, len(self._index))
        if k == len(self._clicks):
            self._clicks, self._shown = (np.concatenate([a, np.zeros(k)]) for a in (self._clicks, self._shown))
            self._seen_ms = np.concatenate([self._seen_ms, np.zeros(k, np.int64)])
        keep = 0.5 ** (max(0, now_ms - int(self._seen_ms[k])) / self._half_life_ms)
        self._clicks[k] = keep * self._clicks[k] + clicked
        self._shown[k] = keep * self._shown[k] + 1
        self._seen_ms[k] = max(now_ms, int(self._seen_ms[k]))
        if shown:
            fade = 0.5 ** (1 / BASE_RATE_TARGETS)
            self._base_clicks = fade * self._base_clicks + clicked
            self._base_shown = fade * self._base_shown + 1

    @property
    def _base(self) -> float:
        return self._base_clicks / self._base_shown

    def _rates(self, k: NDArray[np.intp], now_ms: int) -> NDArray[np.float64]:
        keep = 0.5 ** (np.maximum(0, now_ms - self._seen_ms[k]) / self._half_life_ms)
        rates: NDArray[np.float64] = (keep * self._clicks[k] + SHRINK * self._base) / (keep * self._shown[k] + SHRINK)
        return rates


@dataclass(slots=True)
class Tally:
    """Sums over targets that all models answered; `fade` < 1 forgets old ones."""

    fade: float = 1.0
    targets: float = 0.0
    positives: float = 0.0
    retrievals: float = 0.0
    loss: dict[str, float] = field(default_factory=dict)
    hits: dict[str, float] = field(default_factory=dict)

    def judge(self, label: bool, p: Mapping[str, float]) -> None:
        """One ranking target: what each model gave for the label."""
        self.targets = self.fade * self.targets + 1
        self.positives = self.fade * self.positives + label
        for model, value in p.items():
            value = min(max(value, EPSILON), 1 - EPSILON)
            self.loss[model] = self.fade * self.loss.get(model, 0.0) - math.log(value if label else 1 - value)

    def search(self, ranks: Mapping[str, int]) -> None:
        """One retrieval target: where each model put the true item."""
        self.retrievals = self.fade * self.retrievals + 1
        for model, rank in ranks.items():
            self.hits[model] = self.fade * self.hits.get(model, 0.0) + (1 <= rank <= HIT_AT)

    def normalized_entropy(self, model: str) -> float | None:
        """Log loss over the entropy of the base rate; None where there is nothing to divide by."""
        if model not in self.loss or not 0 < self.positives < self.targets:
            return None
        base = self.positives / self.targets
        return self.loss[model] / self.targets / -(base * math.log(base) + (1 - base) * math.log(1 - base))

    def hit_rate(self, model: str) -> float | None:
        return self.hits[model] / self.retrievals if model in self.hits else None


class Comparison:
    """Judges the log's rows in order; before the freeze it only teaches popularity and shows the figures of now."""

    def __init__(self, kind: str, half_life_seconds: float, live_seconds: float, *, oracle: bool) -> None:
        """`kind`: the action whose probability is judged. `oracle`: whether true probabilities are known."""
        self.kind, self._oracle = kind, oracle
        self._popularity = Popularity(half_life_seconds, live_seconds)
        self.total, self.now = Tally(), Tally(fade=0.5 ** (1 / NOW_TARGETS))
        self.learned = self.learned_at_freeze = self.left_out = 0
        self.frozen_version: int | None = None

    def freeze(self, version: int) -> None:
        """From here on the frozen weights of `version` take part; the figures start anew."""
        self.frozen_version, self.learned_at_freeze = version, self.learned
        self.total, self.now = Tally(), Tally(fade=self.now.fade)

    def close(self, rows: list[Row], frozen: Mapping[str, Answer], truth: Mapping[str, Mapping[str, float]]) -> None:
        """Judge rows that closed together, then let popularity learn them.

        `frozen` and `truth` by event id; after the freeze a row without its answers is left out, for all models.
        """
        for row in rows:
            self._judge(row, frozen.get(row.event_id), truth.get(row.event_id))
        for row in rows:
            shown = row.p is not None
            self._popularity.learn(row.item, row.watermark, self.kind in row.labels or not shown, shown)
        self.learned += len(rows)

    def _judge(self, row: Row, frozen: Answer | None, truth: Mapping[str, float] | None) -> None:
        if self.frozen_version is not None and frozen is None:
            self.left_out += 1
            return
        if row.p is not None and self.kind in row.p:
            p = {"continuous": row.p[self.kind], "popularity": self._popularity.predict(row.item, row.watermark)}
            if frozen is not None and frozen.p is not None:
                p["frozen"] = frozen.p[self.kind]
            if truth is not None:
                p["oracle"] = truth[self.kind]
            elif self._oracle:  # shown by somebody else: the true probability is unknown
                self.left_out += 1
                return
            for tally in (self.total, self.now):
                tally.judge(self.kind in row.labels, p)
        if row.rank is not None:
            ranks = {"continuous": row.rank, "popularity": self._popularity.rank(row.item, row.watermark)}
            if frozen is not None and frozen.rank is not None:
                ranks["frozen"] = frozen.rank
            for tally in (self.total, self.now):
                tally.search(ranks)


class Plan:
    """When a third of the targets will have been learned, known beforehand.

    Of a timed run: targets come at a steady rate once the first labels have closed, so the first third of them is
    learned a third of the time after that. Of a file: a third of the targets it holds.
    """

    OPEN_END_SECONDS = 20.0  # without an end, there is no third

    def __init__(self, *, seconds: float | None = None, label_delay_seconds: float = 0.0, targets: int | None = None):
        self._targets = targets
        self._after_seconds = label_delay_seconds + (self.OPEN_END_SECONDS if seconds is None else seconds / 3)

    def due(self, learned: int, elapsed_seconds: float) -> bool:
        """Whether it is time to freeze."""
        if self._targets is not None:
            return learned >= max(1, self._targets / 3)
        return learned > 0 and elapsed_seconds >= self._after_seconds


def closed_together(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Split the log's rows into those that one source record closed: popularity may not learn within such a group."""
    group: list[Row] = []
    for row in rows:
        if group and (row.partition, row.offset) != (group[-1].partition, group[-1].offset):
            yield group
            group = []
        group.append(row)
    if group:
        yield group


class Tail:
    """Follows a growing file of JSON lines; a line without its end is left for the next time."""

    def __init__(self, path: Path) -> None:
        self._path, self._position, self._rest = path, 0, b""

    def lines(self) -> list[bytes]:
        """The whole lines written since the last call; none while the file does not exist."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._position)
                data = file.read()
        except FileNotFoundError:
            return []
        self._position += len(data)
        *whole, self._rest = (self._rest + data).split(b"\n")
        return [line for line in whole if line]


_row = msgspec.json.Decoder(Row)


def read_rows(lines: Iterable[bytes], where: str) -> list[Row]:
    """Rows of the prequential log; `DataError` on a line that is not one."""
    try:
        return [_row.decode(line) for line in lines]
    except msgspec.MsgspecError as error:
        raise DataError(f"not a row of the prequential log: {error}", where=where) from None
