"""How many ids a second become slots: `make bench-table`.

One core, one process, everybody in turn on the same ids, so that a noisy machine is noisy for all:

    lookup                 the distinct ids of a batch, in random order, all known: what is left to do after dedup
    lookup_raw             the batch as it came, repeats and all
    map_0, map_1, map_10   a batch for training, with 0, 1 or 10 % of its ids new; repeats and all, no dedup before it

A table of `slots` slots is filled to `--load`; a batch draws from those ids, in proportion to rank^-zipf or evenly.
Each turn begins from the same filled table with a batch that is not counted, then times `BATCHES` of them. Millions of
ids a second of one core's time, best and median of the turns. `streamgr` touches score, life and pin of every id on the
way (and could evict); the others (`mappings`) map and do nothing else. `dedup` is the price of making a batch distinct.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
import torch

from streamgr.model.hashing import U64, fmix64
from tests.bench.kit import Json, machine, report
from tests.bench.mappings import Dict, LinearProbe, Modulo, Ours, SortedSearch

BATCHES = 4  # timed in a turn: new ids at 10 % fill a table of a million slots by 3 % more
NEW = {"map_0": 0.0, "map_1": 0.01, "map_10": 0.10}
GOALS = {  # million ids a second on one core, by (slots in millions, case), on either distribution
    (1, "lookup"): 8.0,
    (8, "lookup"): 4.0,
    (1, "map_10"): 3.0,
    (8, "map_10"): 3.0,
}
Mapping = Ours | Dict | Modulo | SortedSearch | LinearProbe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slots", default="1,8", help="millions (of 2^20), with commas")
    parser.add_argument("--load", type=float, default=0.75)
    parser.add_argument("--batch", type=int, default=65_536)
    parser.add_argument("--zipf", type=float, default=1.1)
    parser.add_argument("--width", type=int, default=16, help="slots of a bucket")
    parser.add_argument("--turns", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    found: Json = {"machine": machine() | {"numpy": np.__version__, "torch": torch.__version__}, "runs": []}
    found |= {"batch": args.batch, "load": args.load, "zipf": args.zipf, "width": args.width, "turns": args.turns}
    for millions in (int(n) for n in args.slots.split(",")):
        size = millions << 20
        known = ids(0, int(args.load * size))
        mappings = filled(size, known, args.width)
        nbytes = {name: round(mapping.nbytes / size, 1) for name, mapping in mappings.items()}
        for law, exponent in (("zipf", args.zipf), ("uniform", 0.0)):
            draws = Draws(known, exponent, args.batch)
            one: Json = {"slots": size, "law": law, "distinct_in_a_batch": len(np.unique(draws.batch(0.0)))}
            one |= {"bytes_a_slot": nbytes, "dedup": dedup(draws, args.turns)}
            for case in ("lookup", "lookup_raw", *NEW):
                one[case] = compare(mappings, draws, case, args.turns)
                show(size, law, case, one[case])
            found["runs"].append(one)
    found["goals"] = goals(found["runs"])
    report("bench-table", found)


def ids(first: int, count: int) -> U64:
    """Distinct ids that look like nothing, never 0."""
    return fmix64(np.arange(first + 1, first + 1 + count, dtype=np.uint64))


def filled(size: int, known: U64, width: int) -> dict[str, Mapping]:
    """Everybody, with the same ids in it."""
    mappings: dict[str, Mapping] = {
        "streamgr": Ours(size, width),
        "dict": Dict(size),
        "id % size": Modulo(size),
        "sorted search": SortedSearch(size),
        "linear probing": LinearProbe(size),
    }
    for name, mapping in mappings.items():
        for part in np.array_split(known, 8 if name == "sorted search" else max(8, len(known) >> 16)):
            mapping.map(part)
        print(f"{name}: {size} slots filled with {len(known)} ids", file=sys.stderr)
    return mappings


class Draws:
    """Batches of ids: known ones by their law, new ones that have never been before."""

    def __init__(self, known: U64, exponent: float, batch: int) -> None:
        self._batch, self._rng = batch, np.random.default_rng(1)
        self._known = self._rng.permutation(
            known
        )  # by rank; or popular ids would lie where they were filled in, together
        self._law = np.cumsum(np.arange(1, len(known) + 1, dtype=np.float64) ** -exponent)
        self._law /= self._law[-1]
        self._next = 2 * len(known)

    def batch(self, new: float) -> U64:
        rank = np.searchsorted(self._law, self._rng.random(self._batch))
        batch = self._known[np.minimum(rank, len(self._known) - 1)]
        count = int(new * self._batch)
        batch[self._rng.permutation(self._batch)[:count]] = ids(self._next, count)
        self._next += count
        return batch

    def distinct(self) -> U64:
        return self._rng.permutation(np.unique(self.batch(0.0)))


def compare(mappings: dict[str, Mapping], draws: Draws, case: str, turns: int) -> dict[str, Json]:
    """Everybody in turn on the same batches; million ids a second."""
    rates: dict[str, list[float]] = {name: [] for name in mappings}
    for _ in range(turns):
        batches = [
            draws.distinct() if case == "lookup" else draws.batch(NEW.get(case, 0.0)) for _ in range(BATCHES + 1)
        ]
        for name, mapping in mappings.items():
            before = mapping.save() if case in NEW else None
            run = mapping.map if case in NEW else mapping.find
            run(batches[0])  # whatever the one before has left in the caches
            seconds = timed(lambda run=run, batches=batches: [run(batch) for batch in batches[1:]])
            rates[name].append(sum(map(len, batches[1:])) / seconds / 1e6)
            if case in NEW:
                mapping.restore(before)
    return {name: summary(values) for name, values in rates.items()}


def dedup(draws: Draws, turns: int) -> dict[str, Json]:
    """What it costs to make a batch distinct, with the way back; million ids a second."""
    ways: dict[str, Callable[[U64], object]] = {
        "np.unique": lambda batch: np.unique(batch, return_inverse=True),
        "torch.unique": lambda batch: torch.unique(torch.from_numpy(batch.view(np.int64)), return_inverse=True),
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(turns):
        batch = draws.batch(0.0)
        for name, way in ways.items():
            rates[name].append(len(batch) / timed(lambda way=way, batch=batch: way(batch)) / 1e6)
    return {name: summary(values) for name, values in rates.items()}


def timed(run: Callable[[], object]) -> float:
    started = time.thread_time()  # of the core, so that a process beside us does not count
    run()
    return time.thread_time() - started


def summary(rates: list[float]) -> Json:
    return {"best": round(max(rates), 2), "median": round(statistics.median(rates), 2)}


def goals(runs: list[Json]) -> list[Json]:
    """Each goal against the median and the best of every law."""
    return [
        {"slots": one["slots"], "law": one["law"], "case": case, "goal": goal, **one[case]["streamgr"]}
        | {"met_by_median": one[case]["streamgr"]["median"] >= goal}
        for (millions, case), goal in GOALS.items()
        for one in runs
        if one["slots"] == millions << 20
    ]


def show(size: int, law: str, case: str, rates: dict[str, Json]) -> None:
    told = ", ".join(f"{name} {rate['median']} ({rate['best']})" for name, rate in rates.items())
    print(f"{size >> 20} M slots, {law}, {case}: {told}", file=sys.stderr)


if __name__ == "__main__":
    main()
