"""Freshness over minutes at a steady rate: what every hop takes, and which objective that supports.

    python -m tests.ops.soak --minutes 10 --rate 300            (make soak: in containers where Docker runs)
    python -m tests.ops.soak --processes --minutes 10           (the same roles as processes; KAFKA_HOME)

A simulated site publishes and asks for its rankings, so every distribution is over real answers. Figures are the
difference of the roles' own histograms between the end of a warm-up and the end; percentiles are linear within a
bucket. The last line of stdout is a JSON object; exit 1 where the objective was missed. The load average stands beside
the result: on a busy machine this measures the neighbours too.
"""

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import msgspec
from prometheus_client.parser import text_string_to_metric_families

from streamgr.clock import SystemClock
from streamgr.config import load
from streamgr.kafka import topics
from streamgr.kafka.embedded import EmbeddedBroker
from streamgr.lab import stage
from streamgr.lab.children import Children
from streamgr.scrape import quantile
from tests.ops.stack import ROOT, Json, Stack, Trouble, wait_for

ROLES = ("sequencer", "trainer", "scorer", "feed")
SLI = "score_model_age_seconds"
HOPS = {  # histogram: who has it, and from where to where it goes
    "event_to_sequence_seconds": ("sequencer", "append → in the sequence"),
    "label_to_gradient_seconds": ("trainer", "append of what closed the label → learned"),
    "gradient_to_serving_seconds": ("scorer", "learned → served"),
    "label_to_serving_seconds": ("scorer", "append of what closed the label → served"),
    "event_to_serving_seconds": ("scorer", "append of the impression → served, window included"),
    SLI: ("scorer", "age of the knowledge behind an answer"),
}
EXPOSE = "import urllib.request as u; print(u.urlopen('http://127.0.0.1:9464/metrics').read().decode())"
START_SECONDS = 240.0
Buckets = Mapping[float, float]  # upper edge -> cumulative count
Reading = dict[str, dict[str, float]]  # role -> every sample `name{labels}` and its value
Read = Callable[[str], str]


def reading(read: Read) -> Reading:
    """Every sample of every role, as it is now."""
    found: Reading = {}
    for role in ROLES:
        samples = found.setdefault(role, {})
        for family in text_string_to_metric_families(read(role)):
            for sample in family.samples:
                labels = ",".join(f"{k}={v}" for k, v in sorted(sample.labels.items()))
                samples[f"{sample.name}{{{labels}}}"] = sample.value
    return found


def difference(before: Reading, after: Reading) -> Reading:
    """What was counted between two readings."""
    return {
        role: {name: value - before[role].get(name, 0.0) for name, value in samples.items()}
        for role, samples in after.items()
    }


def total(samples: Mapping[str, float], name: str) -> float:
    return sum(value for sample, value in samples.items() if sample.startswith(f"streamgr_{name}{{"))


def buckets(samples: Mapping[str, float], name: str) -> dict[float, float]:
    found: dict[float, float] = {}
    for sample, value in samples.items():
        if sample.startswith(f"streamgr_{name}_bucket{{"):
            edge = float(sample.partition("le=")[2].rstrip("}").partition(",")[0])
            found[edge] = found.get(edge, 0.0) + value
    return found


def supported(counts: Buckets, share: float) -> float:
    """The lowest edge at or below which at least this share lies."""
    edges = sorted(counts)
    return next((edge for edge in edges if counts[edge] >= share * counts[edges[-1]]), float("inf"))


# --- where it runs ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def in_containers(rate: float, without: set[str]) -> Iterator[Read]:
    stack = Stack("streamgr-soak", port_shift=20_000, FEED_RATE=f"{rate:g}")
    try:
        stack.compose("up", "-d", "--build", *stack.services(without | {"kafka-exporter", "grafana"}))
        wait_for("an answer", lambda: stack.rank("u", ["a"]), START_SECONDS)
        yield lambda role: stack.compose("exec", "-T", role, "python", "-c", EXPOSE)
    finally:
        stack.compose("down", "-v")


@contextlib.contextmanager
def as_processes(rate: float) -> Iterator[Read]:
    with tempfile.TemporaryDirectory(prefix="soak-") as name, contextlib.ExitStack() as stack:
        directory = Path(name)
        broker = stack.enter_context(EmbeddedBroker.start(directory / "broker"))
        config, _ = load([ROOT / "config" / "compose.toml"], {})
        change = msgspec.structs.replace
        kafka, feed = change(config.kafka, bootstrap=broker.bootstrap), change(config.feed, rate=rate)
        staged = stage.build(change(config, kafka=kafka, feed=feed), directory)
        topics.ensure(staged.config.kafka)
        children = stack.enter_context(Children(directory, SystemClock(), os.environ))
        for role in stage.ROLES:
            children.start(role, "-m", "streamgr", role, "--config", staged.files[role], is_role=True)
        how = ["--config", staged.files["feed"], "--scorer", staged.scorer]
        children.start("feed", "-m", "streamgr", "feed", *how, is_role=True)

        def read(role: str) -> str:
            children.check()
            with urllib.request.urlopen(f"http://127.0.0.1:{staged.ports[role]}/metrics", timeout=10) as answer:
                text: str = answer.read().decode()
                return text

        def serves() -> bool:
            try:
                return total(reading(read)["scorer"], "weights_version") > 0
            except OSError:
                return False

        wait_for("the roles to serve", serves, START_SECONDS)
        print(f"broker: {broker.description}", flush=True)
        yield read


# --- what came out ---------------------------------------------------------------------------------------------------


def report(counted: Reading, seconds: float, objective: float, share: float, loads: list[float]) -> Json:
    """Print the tables; the same as one object."""
    out: Json = {
        "seconds": round(seconds, 1),
        "events_per_second": round(total(counted["feed"], "feed_events_total") / seconds, 1),
        "answers": round(total(counted["scorer"], f"{SLI}_count")),
        "load_average": {"mean": round(sum(loads) / len(loads), 2), "max": max(loads)},
        "hops": {},
    }
    print(
        f"\n{out['events_per_second']:g} events/s over {seconds:.0f} s, {out['answers']} answers; load average"
        f" {out['load_average']['mean']} (mean), {max(loads)} (most) on {os.cpu_count()} cores"
    )
    print(f"\n{'seconds':54} {'p50':>7} {'p95':>7} {'p99':>7} {'count':>9}")
    for name, (role, what) in HOPS.items():
        counts = buckets(counted[role], name)
        found = {f"p{round(q * 100)}": quantile(counts, q) for q in (0.5, 0.95, 0.99)}
        out["hops"][name] = {k: v and round(v, 3) for k, v in found.items()}
        told = " ".join(f"{v:7.2f}" if v is not None else f"{'-':>7}" for v in found.values())
        print(f"{what:54} {told} {counts.get(float('inf'), 0):9.0f}")
    ages = buckets(counted["scorer"], SLI)
    every = ages.get(float("inf"), 0.0)
    if not every:
        raise Trouble("no answers: nothing was measured")
    print("\nshare of the answers whose knowledge was at most so many seconds old")
    out["share"] = {}
    for edge in sorted(ages):
        out["share"][f"{edge:g}"] = round(ages[edge] / every, 6)
        print(f"{edge:8g} s  {ages[edge] / every:9.4%}")
        if ages[edge] == every:
            break
    out["supported"] = {f"{s:g}": supported(ages, s) for s in (0.95, 0.99, 0.999)}
    out["objective"] = {"seconds": objective, "share": share, "reached": round(ages[objective] / every, 6)}
    out["met"] = ages[objective] >= share * every
    told = ", ".join(f"{s:.1%} within {supported(ages, s):g} s" for s in (0.95, 0.99, 0.999))
    print(
        f"\nsupported: {told}; the objective, {share:.0%} within {objective:g} s: {'met' if out['met'] else 'MISSED'}"
    )
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--rate", type=float, default=300.0, help="events a second")
    parser.add_argument("--warm-up", type=float, default=60.0, metavar="SECONDS", help="before anything is counted")
    parser.add_argument("--objective", type=float, default=60.0, metavar="SECONDS", help="a bucket's edge")
    parser.add_argument("--share", type=float, default=0.99, help="of the answers, that must be as fresh")
    parser.add_argument("--processes", action="store_true", help="without Docker: on KAFKA_HOME, or the mock broker")
    parser.add_argument("--without", default="", help="services to leave out")
    args = parser.parse_args()
    where = as_processes(args.rate) if args.processes else in_containers(args.rate, set(args.without.split(",")))
    with where as read:
        print(f"warming up for {args.warm_up:g} s", flush=True)
        time.sleep(args.warm_up)
        before, began, loads = reading(read), time.monotonic(), list[float]()
        while (left := began + args.minutes * 60 - time.monotonic()) > 0:
            loads.append(round(os.getloadavg()[0], 2))
            time.sleep(min(10.0, left))
        after, seconds = reading(read), time.monotonic() - began
    result = report(difference(before, after), seconds, args.objective, args.share, loads)
    print(json.dumps(result))
    return 0 if result["met"] else 1


if __name__ == "__main__":
    sys.exit(main())
