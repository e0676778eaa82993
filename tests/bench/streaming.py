"""The streaming gate: attention without softmax, with it, and a Transformer, on a vocabulary that grows, in one pass.

    make bench-streaming             3 seeds of what `lab.dirichlet` describes, every model on the same streams
    … --study rates                  one other stream (seed 100): how each model fares at each learning rate, from which
                                     `RATES` was taken, the best NDCG… of its last tenth for each model alike

Hit rates over the last tenth of the stream (mean ± sd over seeds, which draw stream and weights), of ids that were not
there at the beginning, and along the way: reports/bench-streaming.svg. `oracle` knows the stream's law. The paper's
figures stand beside for the order they are in: its stream is larger and not public. Runs that have ended are lines of
reports/streaming.jsonl and are not repeated.
"""

import argparse
import json
import sys
from functools import lru_cache
from typing import NamedTuple

import msgspec
import numpy as np
import torch

from streamgr.lab.dirichlet import Records, generate
from streamgr.lab.sequential import MODELS, Shape
from streamgr.lab.streaming import CUTOFFS, Recipe
from streamgr.lab.streaming import run as one_pass
from tests.bench.kit import REPORTS, Json, machine, report
from tests.bench.plot import curves
from tests.bench.runs import Runs

PUBLISHED = {"transformer": (0.0442, 0.2025), "hstu softmax": (0.0617, 0.2496), "hstu -rab": (0.0893, 0.3170)}
RATES = {"hstu": 2e-3, "hstu -rab": 2e-3, "hstu softmax": 2e-3, "sasrec": 2e-3, "transformer": 2e-3}
GRID = 1e-3, 2e-3, 4e-3
LATE = 0.1  # of the stream
SAMPLES = 50  # points of a curve
OTHER = 100  # the seed whose stream rates are chosen on


class World(NamedTuple):
    """A stream's size."""

    records: int
    length: int
    items: int
    categories: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=10_000)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--items", type=int, default=5_000)
    parser.add_argument("--categories", type=int, default=100)
    parser.add_argument("--models", default=";".join(MODELS), help="with semicolons")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--dim", type=int, default=Shape().dim)
    parser.add_argument("--layers", type=int, default=Shape().layers)
    parser.add_argument("--records-a-step", type=int, default=8)
    parser.add_argument("--study", choices=["models", "rates"], default="models")
    parser.add_argument("--jobs", type=int, default=1, help="processes, of one thread each")
    parser.add_argument("--quick", action="store_true", help="a small stream and one seed")
    args = parser.parse_args()
    if args.quick:
        args.records, args.length, args.items, args.categories, args.seeds, args.dim = 300, 24, 200, 20, 1, 16
    world = World(args.records, args.length, args.items, args.categories)
    shape = Shape(dim=args.dim, layers=args.layers, length=args.length, dropout=0.0)
    rates = args.study == "rates"
    wanted = [
        identity(model, seed, world, shape, Recipe(records_a_step=args.records_a_step, learning_rate=rate))
        for seed in ([OTHER] if rates else range(1, args.seeds + 1))
        for model in args.models.split(";")
        for rate in (GRID if rates else (RATES[model],))
    ]
    runs = Runs(REPORTS / "streaming.jsonl").all(wanted, run, jobs=args.jobs)
    told = summary(runs)
    name = "bench-streaming-rates" if rates else "bench-streaming"
    if not rates:
        title = f"{world.items} ids from 40 % to all of them, {world.records} records of {world.length}, one pass"
        curves(REPORTS / f"{name}.svg", title, told["curves"])
    report(name, {"machine": machine() | {"torch": torch.__version__}, **told})
    show(told)


def identity(model: str, seed: int, world: World, shape: Shape, recipe: Recipe) -> Json:
    return {
        "model": model,
        "seed": seed,
        "world": world._asdict(),
        "shape": msgspec.to_builtins(shape),
        "recipe": msgspec.to_builtins(recipe),
    }


@lru_cache(maxsize=1)
def stream(world: World, seed: int) -> Records:
    return generate(*world, seed)


def run(what: Json) -> Json:
    """One model over one stream."""
    torch.set_num_threads(1)
    world, seed = World(**what["world"]), what["seed"]
    records = stream(world, seed)
    shape, recipe = msgspec.convert(what["shape"], Shape), msgspec.convert(what["recipe"], Recipe)
    course = one_pass(what["model"], records, shape, recipe, seed)
    rows = np.arange(round(len(records.items) * (1 - LATE)), len(records.items))
    parts = np.array_split(np.arange(len(course.hits)), min(SAMPLES, len(course.hits)))
    found: Json = {"oracle": records.oracle(rows, CUTOFFS), "late": course.late(LATE)}
    found["new"] = np.nanmean(course.new[-max(1, round(len(course.new) * LATE)) :], axis=0).tolist()
    found["curve"] = [course.hits[part].mean(0).round(4).tolist() for part in parts]
    found["oracle curve"] = [
        records.oracle(np.unique(part * recipe.records_a_step).clip(max=len(records.items) - 1), CUTOFFS)
        for part in parts
    ]
    found["cpu_seconds"] = round(course.cpu_seconds, 1)
    print(f"{what['model']}, seed {seed}, rate {recipe.learning_rate}: {found['late']}", file=sys.stderr)
    return found


def summary(runs: list[Json]) -> Json:
    """By model (and rate, where there are several): mean and deviation over seeds, and the mean curves."""
    by_name: dict[str, list[Json]] = {}
    several = len({(one["model"], one["recipe"]["learning_rate"]) for one in runs}) > len({o["model"] for o in runs})
    for one in runs:
        by_name.setdefault(f"{one['model']}{' ' + str(one['recipe']['learning_rate']) if several else ''}", []).append(
            one
        )
    found: Json = {"world": runs[0]["world"], "shape": runs[0]["shape"], "models": {}, "curves": {}}
    oracle = next(iter(by_name.values()))
    found["oracle"] = spread([one["oracle"] for one in oracle])
    found["curves"]["oracle"] = curve([one["oracle curve"] for one in oracle])
    for name, seeds in by_name.items():
        found["models"][name] = {
            "seeds": [one["seed"] for one in seeds],
            "rate": seeds[0]["recipe"]["learning_rate"],
            "late": spread([one["late"] for one in seeds]),
            "new": spread([one["new"] for one in seeds]),
            "cpu_seconds": round(float(np.mean([one["cpu_seconds"] for one in seeds])), 1),
        }
        found["curves"][name] = curve([one["curve"] for one in seeds])
    return found


def spread(values: list[list[float]]) -> Json:
    """By cut-off: mean, deviation, and each seed's."""
    table = np.array(values)
    return {
        f"hr@{cut}": {
            "mean": round(float(column.mean()), 4),
            "sd": round(float(column.std(ddof=1)), 4) if len(column) > 1 else None,
            "each": column.round(4).tolist(),
        }
        for cut, column in zip(CUTOFFS, table.T, strict=True)
    }


def curve(values: list[list[list[float]]]) -> dict[str, list[float]]:
    mean = np.array(values).mean(0).round(4)
    return {f"hit rate at {cut}": mean[:, place].tolist() for place, cut in enumerate(CUTOFFS)}


def show(told: Json) -> None:
    """A table for the eye."""
    print(f"\n{json.dumps(told['world'])}: the last {LATE:.0%} (new ids); published HR@10, HR@50", file=sys.stderr)
    for name, figures in {"oracle": {"late": told["oracle"]}, **told["models"]}.items():
        late = "  ".join(f"{k} {v['mean']:.4f} ± {v['sd'] or 0:.4f}" for k, v in figures["late"].items())
        new = ", ".join(f"{v['mean']:.4f}" for v in figures.get("new", {}).values())
        print(f"  {name:22}{late}  ({new})  {PUBLISHED.get(name, '')}", file=sys.stderr)


if __name__ == "__main__":
    main()
