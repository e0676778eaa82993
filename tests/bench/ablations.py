"""What each part of the model is worth on our own streams, prequential, one thing changed at a time.

    both              the default: interleaved tokens, ranking and retrieval learned in one pass
    ranking alone, retrieval alone
    summed            an impression and its first action are one token
    length 1.8, 1.6   stochastic length: learned from about n^(alpha/2) of n; judged is the whole history
    window 32         semi-local attention: 32 tokens before each, and the first 8
    user token        each sequence begins with the user's own id
    dlrm_v3           the other published layer
    dlrm_v3 summed    as its authors feed it

Normalized entropy (NE) of the first action kind over impressions and HR@10 of what is acted on, over the second half
of the stream; the length of its sequences against interleaved ones, and targets a second of CPU time, judging included.
Everybody takes the same examples in the same steps. Simulated worlds differ by seed, logs do not. Runs that have ended
are lines of reports/ablations.jsonl and are not repeated.
"""

import argparse
import sys
import time
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from streamgr import config
from streamgr.events import FIRST_ACTION
from streamgr.train.batch import assemble
from streamgr.train.learner import Learner
from streamgr.train.prequential import Prequential
from tests.bench.churn import PLANS, Told, steps, tell
from tests.bench.kit import REPORTS, Json, machine, report
from tests.bench.runs import Runs

Changes = dict[str, dict[str, Any]]  # section -> key -> value
VARIANTS: dict[str, Changes] = {
    "both": {},
    "ranking alone": {"model": {"retrieval_weight": 0.0}},
    "retrieval alone": {"model": {"ranking_weight": 0.0}},
    "summed": {"model": {"tokens": "summed"}},
    "length 1.8": {"trainer": {"stochastic_length": 1.8}},
    "length 1.6": {"trainer": {"stochastic_length": 1.6}},
    "window 32": {"model": {"local_window": 32, "global_prefix": 8}},
    "user token": {"model": {"user_token": True}},
    "dlrm_v3": {"model": {"preset": "dlrm_v3"}},
    "dlrm_v3 summed": {"model": {"preset": "dlrm_v3", "tokens": "summed"}},
}
SLOTS = 1 << 14  # more than any of these streams has ids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="../shared/data", help="the directory of the logs")
    parser.add_argument("--streams", default="simulator,deskdrop")
    parser.add_argument("--only", default="", help="variants, with commas; empty: all")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=240.0, help="of the simulated world")
    parser.add_argument("--limit", type=int, default=20_000, help="events of a log; 0: all")
    parser.add_argument("--history", type=int, default=256)
    parser.add_argument("--batch-tokens", type=int, default=2_048)
    parser.add_argument("--dim", type=int, default=32)
    parser.add_argument("--jobs", type=int, default=1, help="processes, of one thread each")
    args = parser.parse_args()
    size = {name: getattr(args, name) for name in ("seconds", "limit", "history", "batch_tokens", "dim")}
    names = args.only.split(",") if args.only else [*VARIANTS]
    wanted = [
        {"stream": stream, "seed": seed, "variant": name, "changes": VARIANTS[name], **size}
        for stream in args.streams.split(",")
        for seed in range(1, args.seeds + 1)
        for name in names
    ]
    runs = Runs(REPORTS / "ablations.jsonl").all(wanted, partial(run, str(Path(args.data))), jobs=args.jobs)
    told = summary(runs)
    report("bench-ablations", {"machine": machine() | {"torch": torch.__version__}, **size, "streams": told})
    show(told)


@lru_cache(maxsize=1)
def told(directory: str, stream: str, seed: int, limit: int, seconds: float, history: int) -> Told:
    return tell(stream, Path(directory), seed=seed, limit=limit, seconds=seconds, history=history)


def run(directory: str, what: Json) -> Json:
    """One variant over one stream."""
    torch.set_num_threads(1)
    plan = PLANS[what["stream"]]
    seed = 0 if plan.path else what["seed"]
    given = told(directory, what["stream"], seed, what["limit"], what["seconds"], what["history"])
    settings = config.Config(
        sequence=given.sequence,
        model=config.Model(
            dim=what["dim"],
            scaling_seqlen=what["history"],
            position_buckets=2 * what["history"],
            retrieval_weight=plan.retrieval_weight,
        ),
        table=config.Table(slots=SLOTS, ttl_seconds=plan.ttl_seconds),
        trainer=config.Trainer(seed=what["seed"]),
    )
    for section, values in what["changes"].items():
        changed = msgspec.structs.replace(getattr(settings, section), **values)
        settings = msgspec.structs.replace(settings, **{section: changed})
    learner = Learner(settings)
    cut = [*steps(given.examples, what["batch_tokens"])]
    actions = given.sequence.actions
    judge = Prequential(actions, sum(len(example.target_index) for example in given.examples) + 1, 2_000.0)
    tokens = targets = 0
    spent = 0.0
    for number, examples in enumerate(cut):
        started = time.process_time()
        batch = assemble(examples, learner.model.layout)
        predictions, why_not = learner.learn(batch)
        spent += time.process_time() - started
        assert not why_not, f"step {number} was skipped: {why_not}"
        tokens, targets = tokens + len(batch.tokens), targets + len(batch.targets)
        if 2 * number < len(cut):
            continue
        ranked, found = batch.targets.ranked, batch.targets.retrieved
        if settings.model.ranking_weight:
            judge.add_ranking(predictions.probabilities[ranked], batch.targets.labels[ranked])
        if settings.model.retrieval_weight:
            kind = np.arange(len(actions)) == batch.targets.kind[found][:, None].astype(np.int64) - FIRST_ACTION
            judge.add_retrieval(predictions.rank[found], batch.targets.labels[found] | kind)
    figures = judge.figures()
    measured = {"ne": figures[f"normalized_entropy/{actions[0]}"], "hr@10": figures["hit_rate_at_10/any"]}
    print(f"{what['stream']}, {what['variant']}, seed {what['seed']}: {measured}, {spent:.0f} s", file=sys.stderr)
    return {"figures": measured, "tokens": tokens, "targets": targets, "steps": len(cut), "cpu_seconds": spent}


def summary(runs: list[Json]) -> Json:
    """By stream and variant: mean and deviation over seeds, and differences to `both` of the same seed."""
    found: Json = {}
    plain = {(one["stream"], one["seed"]): one for one in runs if one["variant"] == "both"}
    for stream in dict.fromkeys(one["stream"] for one in runs):
        for variant in dict.fromkeys(one["variant"] for one in runs):
            own = [one for one in runs if (one["stream"], one["variant"]) == (stream, variant)]
            base = [plain.get((stream, one["seed"]), one) for one in own]
            told: Json = {"seeds": [one["seed"] for one in own]}
            for name in ("ne", "hr@10"):
                values = [one["figures"][name] for one in own]
                if None in values:
                    continue
                told[name] = spread(values)
                if None not in (against := [one["figures"][name] for one in base]):
                    told[name]["difference"] = spread([x - y for x, y in zip(values, against, strict=True)])
            told["length"] = ratio([one["tokens"] for one in own], [one["tokens"] for one in base])
            rates = [one["targets"] / one["cpu_seconds"] for one in own]
            told["targets a CPU second"] = round(float(np.median(rates)))
            told["speed"] = ratio(rates, [one["targets"] / one["cpu_seconds"] for one in base])
            found.setdefault(stream, {})[variant] = told
    return found


def spread(values: list[float]) -> Json:
    deviation = round(float(np.std(values, ddof=1)), 4) if len(values) > 1 else None
    return {"mean": round(float(np.mean(values)), 4), "sd": deviation}


def ratio(values: list[float], base: list[float]) -> float:
    return round(float(np.median(np.array(values) / np.array(base))), 2)


def show(told: Json) -> None:
    """A table for the eye."""
    for stream, variants in told.items():
        print(f"\n{stream}: NE, HR@10 of the second half; length and speed against `both`", file=sys.stderr)
        for variant, figures in variants.items():
            cells = [
                f"{name} {figures[name]['mean']:.4f} ± {figures[name]['sd'] or 0:.4f}"
                if name in figures
                else f"{name} -"
                for name in ("ne", "hr@10")
            ]
            print(f"  {variant:18}{'  '.join(cells)}  x{figures['length']}  x{figures['speed']}", file=sys.stderr)


if __name__ == "__main__":
    main()
