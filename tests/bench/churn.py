"""Streams in which ids come and go, as the steps a trainer would take of them: no Kafka, one partition, one process.

The events go the product's own way: `lab.produce` publishes them with its heartbeats (into a list), `Partition` joins
and closes them, `assemble` makes batches of at most `batch_tokens`. All of it is done once; every contestant learns the
very same batches.

    simulator   `lab.simulator`, open loop: random slates, so that nobody's ranking decides what the others learn from
    ebnerd      real lists of news, with what was shown and not clicked
    deskdrop    what a company's staff did with articles over a year; no impressions, so only retrieval is judged
    globo       clicks on news; no impressions either
"""

import heapq
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from streamgr import config
from streamgr.clock import SystemClock, milliseconds
from streamgr.events import Record
from streamgr.lab.datasets import Dataset
from streamgr.lab.metrics import EPSILON
from streamgr.lab.produce import publish
from streamgr.lab.simulator import World
from streamgr.model.hashing import U64
from streamgr.model.tokens import Layout
from streamgr.sequence.examples import Example, decode
from streamgr.sequence.partition import Partition
from streamgr.service import Stop
from streamgr.state.rocks import Memory
from streamgr.state.store import Meta, Store
from streamgr.train.batch import Batch, assemble
from tests.streams import columns

START_MS = 1_700_000_000_000
WORLD = config.Feed(rate=400.0, users=200, live_items=400, item_life_seconds=(30.0, 120.0))
HISTORY = 32
REPLAY = config.Sequence(history_length=HISTORY, max_step_seconds=86_400.0)
PARTITIONS = 1


@dataclass(frozen=True, slots=True)
class Plan:
    """Where a stream is and what is too small for it. `slots` + `fallback_rows` rows are what everybody has.

    ttl_seconds: about as long as items are of interest; set so that ids within it need some 3/4 to 4/3 of the slots.
    """

    path: str  # below the data directory; "": simulated
    slots: int
    fallback_rows: int
    ttl_seconds: float
    batch_tokens: int
    sequence: config.Sequence = REPLAY
    retrieval_weight: float = 0.2


PLANS = {
    "simulator": Plan(
        "", 512, 64, 15.0, 512,
        config.Sequence(
            history_length=HISTORY, attribution_window_seconds=1.5, lateness_seconds=0.5, close_step_seconds=0.2
        ),
        0.05,
    ),
    "ebnerd": Plan("ebnerd_slice/events.csv.gz", 256, 32, 86_400.0, 256),
    "deskdrop": Plan("deskdrop/events.csv.gz", 256, 32, 14 * 86_400.0, 1024),
    "globo": Plan("globo5/events.csv.gz", 1024, 128, 86_400.0, 512),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Stream:
    """A stream cut into steps. vocabulary u64[v], ascending: every item that is ever seen. truth: event id of an
    impression -> probability by action kind, where it is known."""

    name: str
    events: int
    actions: tuple[str, ...]
    batches: list[Batch]
    vocabulary: U64
    truth: Mapping[str, Mapping[str, float]]

    def oracle(self, action: str) -> float | None:
        """The normalized entropy of who knows the true probabilities."""
        if not self.truth:
            return None
        bit = self.actions.index(action)
        p, y = [], []
        for batch in self.batches:
            events = [event for example in batch.examples for event in example.target_events]
            for row in batch.targets.ranked:
                p.append(self.truth[events[row]][action])
                y.append(batch.targets.labels[row, bit])
        p, rate = np.clip(np.array(p), EPSILON, 1 - EPSILON), float(np.mean(y))
        loss = -np.where(y, np.log(p), np.log1p(-p)).mean()
        return float(loss / -(rate * np.log(rate) + (1 - rate) * np.log1p(-rate)))


@dataclass(frozen=True, slots=True)
class Told:
    """A stream before it is cut into steps: how many events, how they were sequenced, what came of it."""

    events: int
    sequence: config.Sequence
    examples: list[Example]
    truth: Mapping[str, Mapping[str, float]]


def prepare(name: str, data: Path, *, seed: int, batch_tokens: int, limit: int = 0, seconds: float = 600.0) -> Stream:
    """seed: of the simulated world, which lasts `seconds`; limit: so many events of a log at most, 0: all."""
    told = tell(name, data, seed=seed, limit=limit, seconds=seconds)
    batches = [assemble(step, Layout(len(told.sequence.actions))) for step in steps(told.examples, batch_tokens)]
    vocabulary = np.unique(np.concatenate([batch.tokens.keys for batch in batches]))
    return Stream(name, told.events, told.sequence.actions, batches, vocabulary, told.truth)


def tell(name: str, data: Path, *, seed: int, limit: int, seconds: float, history: int = HISTORY) -> Told:
    """The examples of a stream, with windows of `history` events."""
    plan, truth = PLANS[name], {}
    with tempfile.TemporaryDirectory(prefix="bench-") as directory:
        path = data / plan.path
        if not plan.path:
            path = Path(directory) / "simulated.jsonl"
            truth = simulate(path, seed, seconds)
        dataset = Dataset(path)
        list(dataset.rows())  # once, for the kinds of actions
        known = plan.sequence.actions
        actions = (*known, *(kind for kind in dataset.kinds if kind not in known))
        sequence = msgspec.structs.replace(plan.sequence, actions=actions, history_length=history)
        sent = _Sent(limit if plan.path else 0)
        publish(
            config.Config(sequence=sequence), dataset, sent, PARTITIONS, close=True, clock=SystemClock(), stop=Stop()
        )
        return Told(sent.events, sequence, list(sequenced(sent.records, sequence, Path(directory))), truth)


def sequenced(records: list[Record], settings: config.Sequence, directory: Path) -> Iterator[Example]:
    """The examples of one partition, in order."""
    store = Store(directory / "store", Memory(config.State()))
    store.claim(
        Meta(
            cluster_id="c", topic_id="t", topic="e", partition=0, partitions=PARTITIONS, fingerprint="f",
            actions=settings.actions, window_ms=milliseconds(settings.attribution_window_seconds), emits=True,
        )
    )  # fmt: skip
    partition, outputs = Partition(store, settings, "f"), []
    for at in range(0, len(records), 1000):
        applied = partition.apply(columns(records[at : at + 1000]), lambda key, value: outputs.append(value))
        assert not applied.dead_letters, applied.dead_letters[:1]
        partition.commit()
    for output in map(decode, outputs):
        assert isinstance(output, Example)
        yield output
    store.close()


def steps(examples: list[Example], batch_tokens: int) -> Iterator[list[Example]]:
    """As the trainer's reader fills them where there is no lack of examples."""
    step: list[Example] = []
    tokens = 0
    for example in examples:
        if step and tokens + len(example.history) > batch_tokens:
            yield step
            step, tokens = [], 0
        step.append(example)
        tokens += len(example.history)
    if step:
        yield step


def simulate(path: Path, seed: int, seconds: float) -> dict[str, dict[str, float]]:
    """Write a world's events to a file, in the order of their times; returns each impression's true probabilities."""
    settings = msgspec.structs.replace(WORLD, seed=seed)
    world, truth, due = World(settings, START_MS), {}, []
    rng, events, requests, now = np.random.default_rng((seed, 1)), 0, 0, START_MS
    with path.open("wb") as file:
        while now < START_MS + seconds * 1000:
            while due and due[0][0] <= now:
                file.write(heapq.heappop(due)[2])
                events += 1
            if events >= (now - START_MS) / 1000 * settings.rate:
                now += int(rng.integers(1, 40))
                world.advance(now)
                continue
            user = world.visitor()
            for one in world.show(user, world.candidates(settings.slate), now):
                event = f"r{requests}.{one.position}"
                common = {"user_id": user, "item_id": one.item_id, "request_id": f"r{requests}"}
                shown = {"type": "impression", "event_id": event, "event_time": now, "position": one.position}
                file.write(msgspec.json.encode(shown | common) + b"\n")
                truth[event] = one.p
                events += 1
                for kind, at in one.actions:
                    action = {"type": kind, "event_id": f"{event}.{kind}", "event_time": at}
                    heapq.heappush(due, (at, len(truth), msgspec.json.encode(action | common) + b"\n"))
            requests += 1
    return truth


class _Sent:
    """A producer whose topic is a list. After `limit` events (0: never) nothing more is taken but heartbeats."""

    def __init__(self, limit: int) -> None:
        self.records: list[Record] = []
        self._limit, self.events = limit, 0

    def send(self, topic: str, value: bytes | None, *, key: bytes | None = None, partition: int | None = None) -> None:
        if key is not None:
            if self._limit and self.events == self._limit:
                return
            self.events += 1
        # appended in the far future: a log replayed is never "in the future" itself
        self.records.append(Record(topic, 0, len(self.records), key, value, 1 << 45))

    def confirm(self, timeout: float | None = None) -> None:
        pass
