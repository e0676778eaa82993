"""The offline gate: HSTU beside SASRec in one trainer, leave one out, all items ranked: `make bench-offline`.

    ml-1m             the order of a million ratings, no times: so HSTU has its position bias alone
    ml-100k, ml-small with times (MovieLens 100K; latest-small of 2016)

Both models have the same width, depth, loss, optimizer and rate, none chosen for one of them: see `RECIPES`. Every run
that has ended is a line of reports/offline.jsonl and is not run again, so an interrupted comparison goes on where it
was; delete the file to begin anew. `--quick` takes a minute or two on ml-100k, for the eye and the tests alone. With
`--layers 8 --heads 2 --dim 50` it is the large model of the publications.
"""

import argparse
import sys
from dataclasses import asdict, replace
from functools import lru_cache, partial
from pathlib import Path

import msgspec
import numpy as np
import torch

from streamgr.lab.leave_one_out import TEST, VALIDATION, Interactions, evaluate, read
from streamgr.lab.offline import Recipe, train
from streamgr.lab.sequential import Shape
from tests.bench.kit import REPORTS, Json, machine, report
from tests.bench.runs import Runs

PATHS = {
    "ml-1m": "ml-1m-seq/sequences.txt.gz",
    "ml-100k": "ml-100k/events.csv.gz",
    "ml-small": "ml-latest-small-2016/events.csv.gz",
}
ORDER_ONLY = "hstu, order only"  # HSTU as if the times were not known
MODELS = {
    "ml-1m": ("popularity", "sasrec", "hstu"),
    "ml-100k": ("popularity", "sasrec", ORDER_ONLY, "hstu"),
    "ml-small": ("popularity", "sasrec", ORDER_ONLY, "hstu"),
}
RECIPES = {
    "ml-1m": Recipe(epochs=20, learning_rate=2e-3),  # by the validation split of seed 0, for both alike
    "ml-100k": Recipe(epochs=60),
    "ml-small": Recipe(epochs=60),
}
# (HR@10, NDCG@10) on ML-1M, all items ranked, seen ones left out
PUBLISHED = {
    "RecTools: stable sort, validation, early stopping (the protocol here)": {
        "SASRec": (0.2877, 0.1622),
        "HSTU without time bias": (0.3023, 0.1718),
        "HSTU": (0.3227, 0.1879),
        "HSTU-large": (0.3642, 0.2164),
    },
    "the authors' public code: unstable sort, no validation split, 101 epochs": {
        "SASRec": (0.2853, 0.1603),
        "HSTU": (0.3097, 0.1720),
        "HSTU-large": (0.3294, 0.1893),
    },
    "Turning Dross Into Gold Loss (5-core): softmax over all items": {"SASRec+": (0.3152, 0.1821)},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="../shared/data", help="the directory of the logs")
    parser.add_argument("--datasets", default=",".join(PATHS))
    parser.add_argument("--models", default="", help="with semicolons; empty: all of each data set")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--dim", type=int, default=Shape().dim)
    parser.add_argument("--heads", type=int, default=Shape().heads)
    parser.add_argument("--layers", type=int, default=Shape().layers)
    parser.add_argument("--epochs", type=int, default=0, help="0: as each data set's recipe has it")
    parser.add_argument("--jobs", type=int, default=1, help="processes, of one thread each")
    parser.add_argument("--quick", action="store_true", help="ml-100k, one seed, 8 epochs, dim 32")
    args = parser.parse_args()
    if args.quick:
        args.datasets, args.seeds, args.epochs, args.dim = "ml-100k", 1, 8, 32
    shape, directory = Shape(dim=args.dim, heads=args.heads, layers=args.layers), str(Path(args.data))
    wanted = [
        identity(dataset, model, seed, shape, args.epochs)
        for seed in range(1, args.seeds + 1)  # so that an early look has every model
        for dataset in args.datasets.split(",")
        for model in (args.models.split(";") if args.models else MODELS[dataset])
    ]
    name = "quick-offline" if args.quick else "offline"
    runs = Runs(REPORTS / f"{name}.jsonl").all(wanted, partial(run, directory), jobs=args.jobs)
    told = summary(runs)
    report(f"bench-{name}", {"machine": machine() | {"torch": torch.__version__}, "results": told})
    show(told)


def identity(dataset: str, model: str, seed: int, shape: Shape, epochs: int) -> Json:
    """What a run is known by; epochs 0: as the recipe has it."""
    if model == "popularity":
        return {"dataset": dataset, "model": model, "seed": 0}
    recipe = RECIPES[dataset]
    recipe = msgspec.structs.replace(recipe, epochs=epochs or recipe.epochs)
    what = {"dataset": dataset, "model": model, "seed": seed}
    return what | {"shape": msgspec.to_builtins(shape), "recipe": msgspec.to_builtins(recipe)}


@lru_cache(maxsize=1)
def loaded(path: Path) -> Interactions:
    return read(path)


def run(directory: str, what: Json) -> Json:
    """One model on one data set with one seed: its test figures at the best epoch in validation."""
    torch.set_num_threads(1)
    data, model = loaded(Path(directory) / PATHS[what["dataset"]]), what["model"]
    if model == "popularity":
        return popularity(data)
    if model == ORDER_ONLY:
        model, data = "hstu", replace(data, times=np.zeros_like(data.times))
    shape, recipe = msgspec.convert(what["shape"], Shape), msgspec.convert(what["recipe"], Recipe)
    for epoch in train(model, data, shape, recipe, what["seed"]):
        print(
            f"{what['dataset']}, {what['model']}, seed {what['seed']}: epoch {epoch.number}, loss {epoch.loss:.4f}, "
            f"validation HR@10 {epoch.validation.hr_10:.4f} NDCG@10 {epoch.validation.ndcg_10:.4f}, "
            f"best {epoch.best}, {epoch.cpu_seconds:.0f} CPU seconds",
            file=sys.stderr,
        )
    return asdict(epoch)


def popularity(data: Interactions) -> Json:
    """How often each item stands in what is learned from."""
    held_out = np.concatenate([data.offsets[1:] - TEST, data.offsets[1:] - VALIDATION])
    counts = np.bincount(np.delete(data.items, held_out), minlength=data.count)
    scores = torch.from_numpy(counts.astype(np.float32))
    found = evaluate(lambda given: scores.expand(len(given.last), -1), data, TEST, 1)
    return {"test": asdict(found), "best": 0, "cpu_seconds": 0.0}


def summary(runs: list[Json]) -> Json:
    """By data set and model: figures of each seed, mean and deviation, best epochs, CPU seconds."""
    found: Json = {}
    for line in runs:
        told = found.setdefault(line["dataset"], {}).setdefault(line["model"], {"seeds": []})
        if line["seed"] not in told["seeds"]:
            told["seeds"].append(line["seed"])
            for name, value in line["test"].items():
                told.setdefault(name, []).append(round(value, 4))
            told.setdefault("best epoch", []).append(line["best"])
            told.setdefault("CPU seconds", []).append(round(line["cpu_seconds"]))
    return found


def show(told: Json) -> None:
    """Tables for the eye."""
    for dataset, models in told.items():
        print(f"\n{dataset}: HR@10, NDCG@10 (mean ± sd over seeds), HR@10 of each seed", file=sys.stderr)
        for model, figures in models.items():
            cells = [f"{np.mean(figures[k]):.4f} ± {spread(figures[k]):.4f}" for k in ("hr_10", "ndcg_10")]
            print(f"  {model:24}{'   '.join(cells)}   {figures['hr_10']}", file=sys.stderr)
        if dataset == "ml-1m":
            for protocol, rows in PUBLISHED.items():
                print(f"  published, {protocol}", file=sys.stderr)
                for model, (hits, gain) in rows.items():
                    print(f"    {model:24}{hits:.4f}   {gain:.4f}", file=sys.stderr)


def spread(values: list[float]) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


if __name__ == "__main__":
    main()
