"""What becomes of quality when ids come and go and do not all fit: `make bench-vocabulary`.

Everybody learns the same batches of the same streams (`churn`) with the same number of rows (`contestants`), judged
before each step as the trainer is: normalized entropy (NE) of impressions, HR@10 of what is acted on, over the whole
stream and over its second half. HR@10 twice: among what each would recommend itself (ours: what holds a slot; rivals:
what has been seen within the time to live, which they are told), and among the latter for everybody (`common`).

Three studies: `memory` (the contestants, at equal memory), `defaults` (one setting of ours changed at a time, same
memory) and `negatives` (a row for every id; how many negatives are drawn evenly + taken from the batch). Figures are
means and standard deviations over seeds (of the network and, simulated, of the world), and differences to `streamgr` of
the same seed. The curves go to reports/bench-vocabulary-<stream>.svg.
"""

import argparse
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from streamgr import config
from streamgr.clock import milliseconds
from streamgr.events import FIRST_ACTION
from streamgr.train.batch import Batch
from streamgr.train.learner import Predictions
from streamgr.train.prequential import Prequential
from tests.bench.churn import HISTORY, PLANS, Stream, prepare
from tests.bench.contestants import DEFAULTS, EQUAL_MEMORY, NEGATIVES, Contestant, Recent, entrant
from tests.bench.kit import REPORTS, Json, machine, report
from tests.bench.plot import curves

STUDIES = {"memory": [*EQUAL_MEMORY], "defaults": ["streamgr", *DEFAULTS], "negatives": [*NEGATIVES]}
REFERENCE = {"memory": "streamgr", "defaults": "streamgr", "negatives": "128 + 0 negatives"}
SAMPLES = 60  # points of a curve


class Task(NamedTuple):
    """One run: somebody, on a stream, with a seed."""

    stream: str
    name: str
    seed: int


class Size(NamedTuple):
    """How much of a stream is learned, and with what."""

    data: str
    limit: int
    seconds: float
    batch_tokens: int
    shrink: int
    dim: int
    negatives: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="../shared/data", help="the directory of the logs")
    parser.add_argument("--streams", default=",".join(PLANS))
    parser.add_argument("--study", default="memory", choices=[*STUDIES])
    parser.add_argument("--only", default="", help="contestants, with commas; empty: all of the study")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--limit", type=int, default=0, help="events of a log at most; 0: all")
    parser.add_argument("--seconds", type=float, default=600.0, help="of the simulated world")
    parser.add_argument("--batch-tokens", type=int, default=0, help="tokens of a step; 0: as each stream's plan has it")
    parser.add_argument("--shrink", type=int, default=1, help="everybody has so many times fewer rows")
    parser.add_argument("--dim", type=int, default=32)
    parser.add_argument("--negatives", type=int, default=config.Model().negatives, help="drawn evenly, a step")
    parser.add_argument("--jobs", type=int, default=1, help="processes, of one thread each")
    args = parser.parse_args()
    size = Size(args.data, args.limit, args.seconds, args.batch_tokens, args.shrink, args.dim, args.negatives)
    streams, names = args.streams.split(","), args.only.split(",") if args.only else STUDIES[args.study]
    found: Json = {"machine": machine() | {"torch": torch.__version__}, "study": args.study, **size._asdict()}
    del found["data"]
    found["streams"] = {}
    for stream in streams:
        tasks = [Task(stream, name, seed) for seed in range(1, args.seeds + 1) for name in names]
        with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
            runs = list(pool.map(run, tasks, [size] * len(tasks)))
        found["streams"][stream] = told = summary(tasks, runs, REFERENCE[args.study])
        show(stream, told)
        REPORTS.mkdir(exist_ok=True)
        title = f"{stream}: {told['rows']} rows for {told['vocabulary']} ids"
        curves(REPORTS / f"bench-{_title(args)}-{stream}.svg", title, told["curves"])
    report(f"bench-{_title(args)}", found)


def _title(args: argparse.Namespace) -> str:
    parts = ["vocabulary", args.study] if args.study != "memory" else ["vocabulary"]
    for name, plain in (("shrink", 1), ("negatives", config.Model().negatives), ("batch_tokens", 0)):
        if (value := getattr(args, name)) != plain:
            parts.append(f"{name}{value}")
    return "-".join(parts)


@lru_cache(maxsize=1)
def streamed(name: str, seed: int, size: Size) -> Stream:
    tokens = size.batch_tokens or PLANS[name].batch_tokens
    return prepare(name, Path(size.data), seed=seed, batch_tokens=tokens, limit=size.limit, seconds=size.seconds)


def run(task: Task, size: Size) -> Json:
    """One contestant over one stream: figures, and curves of `SAMPLES` points."""
    torch.set_num_threads(1)
    plan = PLANS[task.stream]
    stream = streamed(task.stream, task.seed if not plan.path else 0, size)
    slots = plan.slots // size.shrink
    settings = config.Config(
        sequence=config.Sequence(actions=stream.actions),
        model=config.Model(
            dim=size.dim,
            layers=1,
            scaling_seqlen=HISTORY,
            position_buckets=2 * HISTORY,
            negatives=size.negatives,
            retrieval_weight=plan.retrieval_weight,
        ),
        table=config.Table(slots=slots, fallback_rows=plan.fallback_rows // size.shrink, ttl_seconds=plan.ttl_seconds),
        trainer=config.Trainer(seed=task.seed),
    )
    recent = Recent(stream.vocabulary, milliseconds(plan.ttl_seconds))
    contestant, course = entrant(task.name, settings, recent), Course(stream)
    started = time.perf_counter()
    for number, batch in enumerate(stream.batches):
        own = contestant.has_own(batch.targets.keys)
        predictions, why_not = contestant.learn(batch)
        assert not why_not, f"{task}: step {number} was skipped: {why_not}"
        course.add(number, batch, predictions, contestant.common, own)
        if course.due(number):
            course.sample(batch, contestant)
    seconds = round(time.perf_counter() - started, 1)
    print(f"{task.stream}, {task.name}, seed {task.seed}: {seconds} s", file=sys.stderr)
    rows = slots + settings.table.fallback_rows
    what = {"events": stream.events, "vocabulary": len(stream.vocabulary), "rows": rows, "steps": len(stream.batches)}
    what |= {"targets": sum(len(batch.targets) for batch in stream.batches), "ttl_seconds": plan.ttl_seconds}
    oracle = {action: stream.oracle(action) for action in stream.actions if stream.truth}
    return {"what": what, "oracle_ne": oracle, "seconds": seconds, "figures": course.figures(), "curve": course.curve}


class Course:
    """What is judged along the way."""

    def __init__(self, stream: Stream) -> None:
        self._actions, self._steps = stream.actions, len(stream.batches)
        everything = sum(len(batch.targets) for batch in stream.batches) + 1
        self._parts = {part: [self._judge(everything), self._judge(everything)] for part in ("whole", "late")}
        self._recent = [self._judge(max(500, everything // 20)) for _ in range(2)]
        self._own: list[np.ndarray] = []
        self._hits = {"whole": [0, 0], "late": [0, 0]}
        self.curve: dict[str, list[float | None]] = {}

    def _judge(self, window: int) -> Prequential:
        return Prequential(self._actions, window, 2_000.0)

    def add(self, number: int, batch: Batch, told: Predictions, common: np.ndarray, own: np.ndarray) -> None:
        """own bool[m]: which targets' ids had a row to themselves."""
        targets = batch.targets
        late, ranked, found = 2 * number >= self._steps, targets.ranked, targets.retrieved
        kind = np.arange(len(self._actions)) == targets.kind[found][:, None].astype(np.int64) - FIRST_ACTION
        engaged = targets.labels[found] | kind
        for judges in (self._parts["whole"], self._recent, *([self._parts["late"]] * late)):
            judges[0].add_ranking(told.probabilities[ranked], targets.labels[ranked])
            judges[0].add_retrieval(told.rank[found], engaged)
            judges[1].add_retrieval(common[found], engaged)
        for part in ("whole", *(["late"] * late)):
            self._hits[part][0] += int(own.sum())
            self._hits[part][1] += len(own)
        self._own.append(own)

    def due(self, number: int) -> bool:
        return (number + 1) * SAMPLES // self._steps > number * SAMPLES // self._steps

    def sample(self, batch: Batch, contestant: Contestant) -> None:
        """A point of every curve."""
        own, common = (judge.figures() for judge in self._recent)
        point: dict[str, float | None] = {
            "day": batch.watermark_ms / 86_400_000,
            "normalized entropy": own[f"normalized_entropy/{self._actions[0]}"],
            "hit rate at 10": own["hit_rate_at_10/any"],
            "hit rate at 10, common": common["hit_rate_at_10/any"],
            "id has its own row": float(np.concatenate(self._own).mean()),
            "ids of interest": float(len(contestant.recent.live(contestant.watermark_ms))),
        }
        self._own.clear()
        if not contestant.is_rival:
            stats = contestant.table.stats()
            point |= {"occupancy": stats.used / stats.slots}
            point |= {"evictions": stats.evictions, "expiries": stats.expiries, "admissions": stats.admissions}
            point |= {"stale": stats.stale, "unadmitted": stats.unadmitted, "unplaced": stats.unplaced}
        for name, value in point.items():
            self.curve.setdefault(name, []).append(value)

    def figures(self) -> Json:
        """By part of the stream; what does not exist is left out."""
        found: Json = {}
        for part, (own, common) in self._parts.items():
            figures = own.figures()
            for action in self._actions:
                if (ne := figures[f"normalized_entropy/{action}"]) is not None:
                    found[f"ne {action} {part}"] = ne
            found[f"hr@10 {part}"] = figures["hit_rate_at_10/any"]
            found[f"hr@10 common {part}"] = common.figures()["hit_rate_at_10/any"]
            found[f"own row {part}"] = self._hits[part][0] / max(1, self._hits[part][1])
        return {name: value for name, value in found.items() if value is not None}


def summary(tasks: list[Task], runs: list[Json], reference: str) -> Json:
    """Means and deviations over seeds; differences to the reference seed by seed; curves averaged."""
    by_name: dict[str, dict[int, Json]] = {}
    for task, one in zip(tasks, runs, strict=True):
        by_name.setdefault(task.name, {})[task.seed] = one
    found: Json = {**runs[0]["what"], "oracle_ne": runs[0]["oracle_ne"], "contestants": {}, "curves": {}}
    for name, seeds in by_name.items():
        told: Json = {"seconds": round(float(np.mean([one["seconds"] for one in seeds.values()])), 1)}
        for figure in next(iter(seeds.values()))["figures"]:
            values = [one["figures"][figure] for one in seeds.values()]
            told[figure] = spread(values)
            if name != reference and reference in by_name:
                gaps = [one["figures"][figure] - by_name[reference][s]["figures"][figure] for s, one in seeds.items()]
                told[figure] |= {"difference": spread(gaps)}
        found["contestants"][name] = told
        found["curves"][name] = averaged(one["curve"] for one in seeds.values())
    return found


def spread(values: list[float]) -> Json:
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": round(float(np.mean(values)), 4), "sd": deviation if deviation is None else round(deviation, 4)}


def averaged(curves_of_seeds: Iterable[dict[str, list[float | None]]]) -> dict[str, list[float | None]]:
    """Point by point; None where one of them is."""
    given = list(curves_of_seeds)
    return {
        name: [
            None if None in column else round(sum(column) / len(column), 4)  # type: ignore[arg-type]
            for column in zip(*(curve[name] for curve in given), strict=True)
        ]
        for name in given[0]
    }


def show(stream: str, told: Json) -> None:
    """A table for the eye."""
    print(
        f"\n{stream}: {told['events']} events, {told['targets']} targets in {told['steps']} steps; "
        f"{told['vocabulary']} ids, {told['rows']} rows; true NE {told['oracle_ne'] or 'unknown'}",
        file=sys.stderr,
    )
    for name, figures in told["contestants"].items():
        cells = [
            f"{key} {value['mean']:.4f}±{value['sd'] or 0:.4f}" for key, value in figures.items() if key != "seconds"
        ]
        print(f"  {name:18}" + "  ".join(cells), file=sys.stderr)


if __name__ == "__main__":
    main()
