"""A stream whose vocabulary grows while tastes follow a Dirichlet process: what pointwise attention was made for.

HSTU's authors compare attention with and without softmax on such a stream (arXiv 2402.17152, table 2). Their text gives
the plan, not the code; their later public generator (`dlrm_v3/streaming_synthetic_data.py` of generative-recommenders)
shares it: few categories a user, an urn, alpha between 1 and 500, ids that become available evenly in time. Ours:

    items        each belongs to one category, drawn so that all categories are equally large; ids come in order
    available    at record r of R the first (0.4 + 0.6 r / R) of all ids
    a record     k ~ U{1..5} categories out of all, a prior H over them ~ Dirichlet(1, …, 1), alpha ~ U(1, 500)
    position n   (n earlier ones): with probability alpha / (alpha + n) a category drawn from H, else the category of an
                 earlier position drawn evenly, so each with probability n_c / (alpha + n); then an item drawn evenly
                 from those of the category that are available at this record

Assumed, because no public text says it: equally large categories, k uniform, H uniform over the simplex, items even
within their category, and the sizes, which are smaller by far. The table's figures are therefore no yardstick for ours;
the order of the models is. `oracle` is the yardstick: the hit rate of who knows categories, alpha and H.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
AT_FIRST = 0.4  # of the ids
ALPHA = 1.0, 500.0


@dataclass(frozen=True, slots=True)
class Records:
    """items i64[R, L]; available i64[R]: so many leading ids at each record; category i64[items]. Of each record:
    chosen i64[R, K] and prior f64[R, K] (0 beyond its own categories), alpha f64[R]; drawn i64[R, L]: place in
    `chosen` of each position's category."""

    items: Ints
    available: Ints
    category: Ints
    chosen: Ints
    prior: NDArray[np.float64]
    alpha: NDArray[np.float64]
    drawn: Ints

    def oracle(self, rows: Ints, cutoffs: tuple[int, ...]) -> list[float]:
        """The best hit rate there is, by cut-off, at positions 1.. of records `rows`: mean of its expectation."""
        k = self.chosen.shape[1]
        drawn = self.drawn[rows]
        counts = np.cumsum(drawn[:, :-1, None] == np.arange(k), axis=1)
        n = np.arange(1, drawn.shape[1])
        alpha = self.alpha[rows, None, None]
        p = (alpha * self.prior[rows][:, None, :] + counts) / (alpha + n[:, None])
        size = self._sizes(rows)[:, None, :] + np.zeros_like(counts)
        order = np.argsort(-p / size, axis=2, kind="stable")
        p, size = np.take_along_axis(p, order, 2), np.take_along_axis(size, order, 2)
        before = np.cumsum(size, axis=2) - size
        return [float((np.clip(cut - before, 0, size) * p / size).sum(2).mean()) for cut in cutoffs]

    def _sizes(self, rows: Ints) -> Ints:
        """i64[r, K]: how many items of its categories are available at each record."""
        return available_of(self.category, self.chosen[rows], self.available[rows])[0]


def available_of(category: Ints, chosen: Ints, available: Ints) -> tuple[Ints, Ints, Ints]:
    """(how many of the leading `available` i64[R] ids belong to each of the categories `chosen` i64[R, K]: i64[R, K];
    all ids, category by category, ascending; where each category begins among them)"""
    by_category = np.argsort(category, kind="stable")
    begins = np.searchsorted(category[by_category], np.arange(category.max() + 1))
    n = len(category)
    place = np.searchsorted(category[by_category] * n + by_category, chosen * n + available[:, None])
    return place - begins[chosen], by_category, begins


def generate(records: int, length: int, items: int, categories: int, seed: int, *, most: int = 5) -> Records:
    """`records` records of `length`; `most`: categories of a record at most. Same seed, same stream."""
    if items * AT_FIRST < categories or items % categories or categories < most:
        raise ValueError(f"{items} items do not fill {categories} categories evenly from the beginning, or < {most}")
    rng = np.random.default_rng(seed)
    category = rng.permutation(items) % categories
    for one in np.setdiff1d(np.arange(categories), category[: int(items * AT_FIRST)]):
        late, common = np.flatnonzero(category == one)[0], np.bincount(category[: int(items * AT_FIRST)]).argmax()
        early = np.flatnonzero(category == common)[0]  # a category must not be empty at first: two ids change places
        category[[early, late]] = category[[late, early]]
    available = np.floor(items * (AT_FIRST + (1 - AT_FIRST) * np.arange(records) / records)).astype(np.int64)
    own = rng.integers(1, most + 1, records)
    chosen = np.argsort(rng.random((records, categories)), axis=1)[:, :most]
    prior = np.where(np.arange(most) < own[:, None], rng.exponential(size=(records, most)), 0.0)
    prior /= prior.sum(1, keepdims=True)
    alpha = rng.uniform(*ALPHA, records)

    fresh = (rng.random((records, length, 1)) >= np.cumsum(prior, axis=1)[:, None, :-1]).sum(2)
    drawn = np.empty((records, length), np.int64)
    for n in range(length):
        earlier = drawn[np.arange(records), (rng.random(records) * n).astype(np.int64)] if n else fresh[:, 0]
        drawn[:, n] = np.where(rng.random(records) < alpha / (alpha + n), fresh[:, n], earlier)
    sizes, by_category, begins = available_of(category, chosen, available)
    place = (rng.random((records, length)) * np.take_along_axis(sizes, drawn, 1)).astype(np.int64)
    found = by_category[begins[np.take_along_axis(chosen, drawn, 1)] + place]
    return Records(found, available, category, chosen, prior, alpha, drawn)
