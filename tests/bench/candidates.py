"""What it costs to score candidates: `make bench-candidates`.

Three ways to the same logits (checked before anything is timed), one core, taking turns within one run:

    cached      the history's keys and values are at hand; `at` is new, so a last action's row is computed again
    one pass    nothing is at hand: one pass over the n tokens of the history, then all candidates after it
    one by one  each candidate as the last of n + 1 tokens of its own, as rankers without a shared pass do it;
                in batches of up to `BATCH` tokens; beyond `--alone` candidates multiplied up from that many
                ("extrapolated": true)

Each counts from the user's events to the logits: tokens, rows of the ID table (65,536 slots), network, heads. `hit` is
what a cached request spends where. `retrieval` is the exact top 100 of n live items against sorting all scores.

`--http` asks two running scorers, one with its cache and one without, in turn over HTTP: 100 candidates, a user who
comes again within one version of the weights (a hit), and one whom an event has happened to since (extended).

Wall milliseconds p50 and p99, and the CPU time of the thread (median), which other work on the machine changes less:
ratios are of that one.
"""

import argparse
import http.client
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor

from streamgr.clock import SystemClock
from streamgr.config import Config, Kafka, Model, Scorer, Sequence, Table, Telemetry
from streamgr.events import FIRST_ACTION, IMPRESSION, History, item_key
from streamgr.kafka import topics
from streamgr.kafka.embedded import EmbeddedBroker
from streamgr.kafka.producer import Producer
from streamgr.model.tokens import tokenize
from streamgr.serve.model import LiveWeights, Served
from streamgr.serve.retrieval import Items, nearest
from streamgr.telemetry import Log
from tests.bench.kit import Json, machine, report, settings
from tests.serve.kit import ACTIONS, NOW, Weights
from tests.weights.scribe import Scribe

USER, BATCH, WARM = 1, 8_192, 2
ITEMS = [f"i{n}" for n in range(20_000)]
KEYS = np.array([item_key(item) for item in ITEMS], np.uint64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="256,1024,4096", help="tokens of the history, with commas")
    parser.add_argument("--candidates", default="1,16,100,512,1024,4096")
    parser.add_argument("--preset", default="paper")
    parser.add_argument("--alone", type=int, default=64, help="one by one up to so many candidates; then multiplied")
    parser.add_argument("--turns", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=6.0, help="for each way in each cell, after 3 turns")
    parser.add_argument("--http", action="store_true", help="HTTP alone")
    parser.add_argument("--requests", type=int, default=300, help="over HTTP, of each kind")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found: Json = {"machine": machine() | {"torch": torch.__version__, "threads": torch.get_num_threads()}}
    found |= {"dim": 64, "layers": 2, "heads": 2, "preset": args.preset}
    if not args.http:
        with torch.inference_mode():
            found["runs"] = in_process(args)
            found["retrieval"] = retrieval()
    found["http"] = over_http(args)
    found["machine"]["load_after"] = [round(x, 2) for x in os.getloadavg()]
    report("bench-candidates", found)


def configured(preset: str) -> Config:
    return Config(
        model=Model(preset=preset),  # type: ignore[arg-type]
        table=Table(slots=65_536),
        sequence=Sequence(actions=ACTIONS, history_length=4_096),
        telemetry=Telemetry(log_level="error"),
    )


def some_history(n: int) -> History:
    """Requests of four items, one of which is clicked; it ends with a click, whose query time is open."""
    r = np.random.default_rng(1)
    place = np.arange(n - 1, -1, -1)
    kinds = np.where(place % 5 == 0, FIRST_ACTION, IMPRESSION).astype(np.uint8)
    times = NOW - 30_000 * (place // 5 + 1) + np.where(kinds == IMPRESSION, 0, 5_000)
    requests = np.where(kinds == IMPRESSION, place // 5 + 1, 0).astype(np.uint64)
    return History(kinds, r.choice(KEYS, n), times.astype(np.int64), requests)


class Times:
    """Wall and CPU milliseconds of one thing."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def __call__(self, run: Callable[[], Any]) -> Any:
        wall, cpu = time.perf_counter(), time.thread_time()
        result = run()
        self.cpu.append((time.thread_time() - cpu) * 1e3)
        self.wall.append((time.perf_counter() - wall) * 1e3)
        return result

    def summary(self, factor: float = 1.0) -> Json:
        p50, p99 = np.percentile(self.wall, (50, 99)) * factor
        cpu = float(np.median(self.cpu)) * factor
        return {"p50_ms": round(p50, 3), "p99_ms": round(p99, 3), "cpu_ms": round(cpu, 3), "turns": len(self.wall)}


# --- in one process ---


@dataclass
class Bench:
    """One history and its candidates, over served weights."""

    served: Served
    history: History

    def __post_init__(self) -> None:
        self.model = self.served.copy.recommender
        tokens = self.model.tokens(self.history, NOW, USER)
        self.cache = self.model.prefill(tokens, NOW, self.vectors(tokens.keys))

    def vectors(self, keys: np.ndarray) -> Tensor:
        return self.served.vectors(keys)[0]

    def cached(self, candidates: np.ndarray, at: int) -> Tensor:
        tokens = self.model.tokens(self.history, at, USER)
        start = self.cache.reusable(tokens)
        cache = self.model.extend(self.cache, tokens, at, self.vectors(tokens.keys[start:]))
        return self.model.score(cache, self.vectors(candidates))

    def one_pass(self, candidates: np.ndarray, at: int) -> Tensor:
        tokens = self.model.tokens(self.history, at, USER)
        cache = self.model.prefill(tokens, at, self.vectors(tokens.keys))
        return self.model.score(cache, self.vectors(candidates))

    def one_by_one(self, candidates: np.ndarray, at: int) -> Tensor:
        h, size = self.history, max(1, BATCH // (len(self.history) + 1))
        logits = []
        for start in range(0, len(candidates), size):
            batch = candidates[start : start + size]
            asked = [
                History(
                    np.append(h.kinds, np.uint8(IMPRESSION)),
                    np.append(h.items, key),
                    np.append(h.times, at),
                    np.append(h.requests, np.uint64(1 << 60)),
                )
                for key in batch
            ]
            tokens = tokenize(asked, self.model.layout, users=[USER] * len(batch), at=[at + 1] * len(batch))
            hidden = self.model.transduce(tokens, self.vectors(tokens.keys))
            logits.append(self.model.rank(hidden[torch.from_numpy(tokens.offsets[1:] - 1)]))
        return torch.cat(logits)

    def split(self, candidates: np.ndarray, turns: int) -> Json:
        """What a hit spends where."""
        parts = {name: Times() for name in ("tokens", "compare", "own_row", "candidate_rows", "score")}
        for turn in range(turns):
            at = NOW + 1_000 + turn
            tokens = parts["tokens"](lambda at=at: self.model.tokens(self.history, at, USER))
            start = parts["compare"](lambda tokens=tokens: self.cache.reusable(tokens))
            cache = parts["own_row"](
                lambda tokens=tokens, start=start, at=at: self.model.extend(
                    self.cache, tokens, at, self.vectors(tokens.keys[start:])
                )
            )
            rows = parts["candidate_rows"](lambda: self.vectors(candidates))
            parts["score"](lambda cache=cache, rows=rows: self.model.score(cache, rows))
        return {name: times.summary() for name, times in parts.items()}


def served(preset: str) -> Served:
    config = configured(preset)
    weights = Weights(config)
    weights.learn(ITEMS)
    live = LiveWeights(ACTIONS, SystemClock(), Log("scorer", config.telemetry, SystemClock()))
    if not live.install(weights.publish()):
        sys.exit("the weights were refused")
    with live.lease() as found:
        return found


def in_process(args: argparse.Namespace) -> list[Json]:
    weights, found = served(args.preset), []
    for n in (int(text) for text in args.lengths.split(",")):
        bench = Bench(weights, some_history(n))
        check(bench)
        for c in (int(text) for text in args.candidates.split(",")):
            candidates = np.random.default_rng(c).choice(KEYS, c, replace=False)
            alone = min(c, args.alone, max(1, args.alone * 256 // n))
            ways: dict[str, Callable[[int], Tensor]] = {
                "cached": lambda at, b=bench, x=candidates: b.cached(x, at),
                "one pass": lambda at, b=bench, x=candidates: b.one_pass(x, at),
                "one by one": lambda at, b=bench, x=candidates[:alone]: b.one_by_one(x, at),
            }
            times = in_turn(ways, args.turns, args.seconds)
            one: Json = {"history": n, "candidates": c}
            one |= {way: time.summary(c / alone if way == "one by one" else 1.0) for way, time in times.items()}
            one["one by one"]["extrapolated"] = alone < c
            one["one pass / cached"] = round(one["one pass"]["cpu_ms"] / one["cached"]["cpu_ms"], 2)
            one["one by one / cached"] = round(one["one by one"]["cpu_ms"] / one["cached"]["cpu_ms"], 1)
            found.append(one)
            print(json.dumps(one), file=sys.stderr)
        hit = bench.split(np.random.default_rng(100).choice(KEYS, 100, replace=False), args.turns)
        found.append({"history": n, "candidates": 100, "hit": hit, "cache_bytes": bench.cache.nbytes})
        print(json.dumps(found[-1]), file=sys.stderr)
    return found


def in_turn(ways: dict[str, Callable[[int], Tensor]], turns: int, seconds: float) -> dict[str, Times]:
    """Everybody once a turn, so that a noisy machine is noisy for all; who is slow has fewer turns, but three."""
    times = {way: Times() for way in ways}
    for turn in range(-WARM, turns):
        for way, run in ways.items():
            spent = times[way]
            if len(spent.wall) >= 3 and sum(spent.wall) > 1e3 * seconds:
                continue
            at = NOW + 1_000 + turn
            if turn < 0:
                if way != "one by one":
                    run(at)
            else:
                spent(lambda run=run, at=at: run(at))
    return times


def check(bench: Bench) -> None:
    """The three ways are one function."""
    candidates, at = KEYS[:5], NOW + 77_000
    expected = bench.one_by_one(candidates, at)
    for found in (bench.cached(candidates, at), bench.one_pass(candidates, at)):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def retrieval() -> list[Json]:
    """The best 100 of n live items, without 2,000 seen ones, against sorting all scores."""
    found = []
    for n in (10_000, 100_000, 1_000_000):
        generator, r = torch.Generator().manual_seed(1), np.random.default_rng(1)
        weight = torch.randn(n + 1, 64, generator=generator)
        items = Items(weight, 1 / weight.norm(dim=1), torch.arange(1, n + 1), r.permutation(n).astype(np.uint64))
        queries = torch.nn.functional.normalize(torch.randn(8, 64, generator=generator), dim=1)
        seen = r.choice(items.keys, 2_000, replace=False)

        def by_sorting(q: Tensor, items: Items = items, seen: np.ndarray = seen) -> np.ndarray:
            scores = torch.from_numpy(items.similarities(q, 0, len(items.keys)))
            scores[:, torch.from_numpy(np.isin(items.keys, seen))] = -torch.inf
            return scores.sort(descending=True).indices[:, :100].numpy()

        streamed, sorted_, eight = Times(), Times(), Times()
        for _ in range(7):
            best = streamed(lambda q=queries, i=items, s=seen: nearest(q[:1], i, 100, [s]))[0]
            plain = sorted_(lambda q=queries, f=by_sorting: f(q[:1]))[0]
            assert np.array_equal(best.index, plain)
            eight(lambda q=queries, i=items, s=seen: nearest(q, i, 100, [s] * 8))
        one: Json = {"items": n, "streamed": streamed.summary(), "sorted": sorted_.summary()}
        one |= {"eight at once": eight.summary()}
        one["sorted / streamed"] = round(one["sorted"]["cpu_ms"] / one["streamed"]["cpu_ms"], 2)
        found.append(one)
        print(json.dumps(one), file=sys.stderr)
    return found


# --- over HTTP ---


def over_http(args: argparse.Namespace) -> list[Json]:
    """Two scorers over one log, asked in turn."""
    found = []
    with tempfile.TemporaryDirectory(prefix="bench-") as name, EmbeddedBroker.start(Path(name) / "kafka") as broker:
        for n in (256, 1_024):
            roles = Roles(broker.bootstrap, Path(name), n, args.preset)
            try:
                found.append(roles.measure(args.requests))
                print(json.dumps(found[-1]), file=sys.stderr)
            finally:
                roles.close()
    return found


class Roles:
    """A log with the events of users, weights, and two scorers that follow both."""

    def __init__(self, bootstrap: str, directory: Path, n: int, preset: str) -> None:
        self.n, prefix = n, f"c{n}"
        config = msgspec.structs.replace(
            configured(preset),
            kafka=Kafka(bootstrap=bootstrap, topic_prefix=prefix),
            sequence=Sequence(actions=ACTIONS, history_length=n),
        )
        topics.ensure(config.kafka)
        self._producer = Producer(config.kafka, client_id="bench")
        self._events, self._count = config.topic("events"), 0
        begin = SystemClock().now_ms() - 1_000 * n
        for user in ("hit", "extended"):
            for i in range(n):
                self._happens(user, begin + 1_000 * i, "click" if i % 5 == 4 else "impression")
        weights = Weights(config)
        weights.learn(ITEMS)
        scribe = Scribe(config, self._producer)
        scribe.claim()
        scribe.write(weights.publish(None, horizon_ms=SystemClock().now_ms()))
        self._producer.confirm()
        self.roles: dict[str, subprocess.Popen[str]] = {}
        self.clients: dict[str, http.client.HTTPConnection] = {}
        for which, nbytes in (("on", Scorer().cache_bytes), ("off", 0)):
            state = directory / f"{prefix}-{which}"
            given = settings(
                bootstrap, prefix, state, sequence__history_length=n, scorer__port=0, scorer__cache_bytes=nbytes
            )
            role = subprocess.Popen(
                [sys.executable, "-m", "streamgr", "scorer"],
                env={**os.environ, **given},
                stderr=subprocess.PIPE,
                text=True,
            )
            self.roles[which] = role
            assert role.stderr is not None
            port = next(line["port"] for text in role.stderr if (line := json.loads(text))["event"] == "listening")
            self.clients[which] = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        for which in self.clients:
            while self._ask(which, "GET", "/readyz")[0] != 200:
                time.sleep(0.2)

    def measure(self, requests: int) -> Json:
        candidates = ITEMS[:100]
        found: Json = {"history": self.n, "candidates": 100}
        for kind in ("hit", "extended"):
            times: dict[str, list[float]] = {which: [] for which in self.clients}
            lengths: dict[str, int] = {}
            for turn in range(requests + 10):
                if kind == "extended":
                    self._happens(kind, SystemClock().now_ms() - 1, "click" if turn % 5 == 4 else "impression")
                    self._producer.confirm()
                    time.sleep(0.05)
                for which in sorted(self.clients, reverse=bool(turn % 2)):
                    body = json.dumps({"user_id": kind, "candidates": candidates, "k": 10})
                    started = time.perf_counter()
                    status, answer = self._ask(which, "POST", "/v1/rank", body)
                    if turn >= 10:
                        times[which].append((time.perf_counter() - started) * 1e3)
                    assert status == 200, answer
                    lengths[which] = answer["sequence_length"]
            found[kind] = {
                which: {
                    "p50_ms": round(float(np.percentile(ms, 50)), 2),
                    "p99_ms": round(float(np.percentile(ms, 99)), 2),
                    "last_length": lengths[which],
                }
                for which, ms in times.items()
            }
            found[kind]["off / on, p50"] = round(found[kind]["off"]["p50_ms"] / found[kind]["on"]["p50_ms"], 2)
        found["outcomes"] = self._outcomes()
        return found

    def close(self) -> None:
        for role in self.roles.values():
            role.terminate()
            role.communicate()
        self._producer.close()

    def _happens(self, user: str, at: int, kind: str) -> None:
        self._count += 1
        event = {"type": kind, "event_id": f"e{self._count}", "user_id": user, "event_time": at}
        event |= {"item_id": ITEMS[self._count * 7 % len(ITEMS)], "request_id": f"r{self._count // 5}"}
        self._producer.send(self._events, json.dumps(event).encode(), key=user.encode())

    def _ask(self, which: str, method: str, path: str, body: str | None = None) -> tuple[int, Any]:
        client = self.clients[which]
        client.request(method, path, body, {"content-type": "application/json"})
        answer = client.getresponse()
        read = answer.read()
        return answer.status, json.loads(read)

    def _outcomes(self) -> Json:
        client = self.clients["on"]
        client.request("GET", "/metrics")
        lines = client.getresponse().read().decode().splitlines()
        return {line.split()[0]: float(line.split()[1]) for line in lines if line.startswith("streamgr_cache_")}


if __name__ == "__main__":
    main()
