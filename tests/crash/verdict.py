"""What a storm has left, held against the contract: sequences, targets and dead letters, each exactly once.

The expectation is computed from what lies in the events topic in the end: judged record by record by the rule book,
fed to one oracle a partition. The examples are read as a trainer accepts them: only the next position (decision 3); a
predecessor beyond the mark is a gap, and whatever repeats a position must say the same bytes.
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from confluent_kafka import Consumer, Message, TopicPartition

from streamgr.clock import Deadline, SystemClock
from streamgr.sequence import examples as wire
from tests import rulebook
from tests.crash.hosts import ACTIONS, LATENESS_MS, MAX_FUTURE_MS, STEP_MS, WINDOW_MS, Host
from tests.crash.worker import MARK
from tests.oracle import Oracle, Target
from tests.system import PARTITIONS

SHOWN = 5
PATIENCE_SECONDS = 30.0
Json = dict[str, Any]
Place = tuple[int, int]  # partition, offset


@dataclass(frozen=True)
class Rules:
    """What decides the answer: the settings under which the log was written and read."""

    window_ms: int
    lateness_ms: int
    step_ms: int
    max_future_ms: int

    @property
    def closing_ms(self) -> int:
        return self.window_ms + self.lateness_ms + self.step_ms


STORM = Rules(WINDOW_MS, LATENESS_MS, STEP_MS, MAX_FUTURE_MS)


@dataclass
class Expected:
    """What must come out, and of which records."""

    oracles: list[Oracle]
    records: int = 0
    reasons: dict[Place, str] = field(default_factory=dict)  # of the bad records
    bad: dict[Place, tuple[bytes | None, bytes | None]] = field(default_factory=dict)  # their keys and values

    @property
    def sequences(self) -> list[Json]:
        return sorted((s for o in self.oracles for s in o.sequences()), key=lambda s: str(s["user_id"]))

    @property
    def targets(self) -> Counter[Target]:
        return Counter(t for o in self.oracles for t in o.targets)


@dataclass
class Emitted:
    """What the examples topic says. `problems` name the first of each kind."""

    targets: Counter[Target] = field(default_factory=Counter)
    examples: int = 0
    repeated: int = 0
    gaps: int = 0
    contradictions: int = 0  # positions that say two things
    after_the_end: int = 0  # examples that were accepted though all had been said before
    problems: list[str] = field(default_factory=list)


def judge(host: Host, export: str, said: dict[int, int] | None = None, rules: Rules = STORM) -> tuple[Json, list[str]]:
    """What is there against what must be: counts, and what is wrong.

    export: the sequences as the store has them. said: where the examples ended when all had been said (None: now).
    """
    want = expected(host, rules)
    sequences, wanted = want.sequences, want.targets
    lost, doubled, different = difference(export, sequences)
    got = emitted(host, said)
    letters, wrong = wrong_letters(host, want)
    twice, missing = got.targets - wanted, wanted - got.targets
    counted = {
        "events": want.records,
        "users": len(sequences),
        "targets": wanted.total(),
        "examples": got.examples,
        "repeated_outputs": got.repeated,
        "lost": lost,
        "doubled": doubled,
        "targets_twice": twice.total(),
        "targets_missing": missing.total(),
        "gaps": got.gaps,
        "contradictions": got.contradictions,
        "came_after_the_end": got.after_the_end,
        "bad_records": len(want.reasons),
        "dead_letters": letters,
        "wrong_dead_letters": len(wrong),
    }
    problems = different + got.problems + wrong[:SHOWN]
    problems += [f"a target too many: {t}" for t in list(twice)[:SHOWN]]
    problems += [f"a target missing: {t}" for t in list(missing)[:SHOWN]]
    return counted, problems


def records(host: Host, topic: str) -> Iterator[Message]:
    """Every record of a topic as it stands, each partition's in order."""
    name = f"{host.prefix}.{topic}"
    consumer = Consumer({"bootstrap.servers": host.bootstrap, "group.id": "verdict", "enable.auto.commit": False})
    try:
        left = {p: end for p, end in ends(consumer, name).items() if end}
        consumer.assign([TopicPartition(name, p, 0) for p in left])
        patience = Deadline(SystemClock(), PATIENCE_SECONDS)
        while left:
            assert not patience.passed(), f"{name}: nothing more comes, and these ends are not reached: {left}"
            for message in consumer.consume(1_000, 0.2):
                assert message.error() is None, message.error()
                patience, partition = Deadline(SystemClock(), PATIENCE_SECONDS), message.partition()
                if message.offset() + 1 >= left.get(partition, 0):
                    left.pop(partition, None)
                yield message
    finally:
        consumer.close()


def ends(consumer: Consumer, name: str) -> dict[int, int]:
    """Each partition's end offset. Raises `KafkaException` where the broker is away."""
    return {p: int(consumer.get_watermark_offsets(TopicPartition(name, p), timeout=5)[1]) for p in range(PARTITIONS)}


def expected(host: Host, rules: Rules = STORM) -> Expected:
    """The oracles' answer to what now lies in the events topic."""
    found = Expected([Oracle(rules.window_ms, rules.lateness_ms, rules.step_ms) for _ in range(PARTITIONS)])
    limits = {"max_future_ms": rules.max_future_ms, "closing_ms": rules.closing_ms}
    for m in records(host, "events"):
        key, value = m.key(), m.value()
        outcome = rulebook.judge(key, value, m.timestamp()[1], actions=ACTIONS, **limits)
        found.records += 1
        if isinstance(outcome, str):
            found.reasons[m.partition(), m.offset()] = outcome
            found.bad[m.partition(), m.offset()] = key, value
        else:
            found.oracles[m.partition()].feed(m.offset(), outcome)
    return found


def emitted(host: Host, said: dict[int, int] | None = None) -> Emitted:
    """The examples as a trainer accepts them. said: where the topic ended when all had been said."""
    out = Emitted()
    marks = dict.fromkeys(range(PARTITIONS), wire.BEFORE_ALL)
    words: dict[tuple[int, wire.Position], int] = {}
    for message in records(host, "examples"):
        value, partition = bytes(message.value()), message.partition()
        example = wire.decode(value)
        if not isinstance(example, wire.Example):
            continue
        out.examples += 1
        if MARK in example.target_events[0]:
            example = _original(example)
            value = wire.encode(example)
        where = f"examples[{partition}]@{message.offset()}: {example.position} after {example.prev}"
        first = words.setdefault((partition, example.position), hash(value))
        if first != hash(value):
            out.contradictions += 1
            _name(out, f"{where} says something else than before")
        if example.position <= marks[partition]:
            out.repeated += 1
            continue
        if example.prev > marks[partition]:
            out.gaps += 1
            _name(out, f"{where}, and the mark is {marks[partition]}")
        if said is not None and message.offset() >= said[partition]:
            out.after_the_end += 1
            _name(out, f"{where} came only when the storm was over")
        marks[partition] = example.position
        for event_id, item, labels in zip(
            example.target_events, example.target_items, example.target_labels.tolist(), strict=True
        ):
            kinds = tuple(sorted(name for bit, name in enumerate(ACTIONS) if labels >> bit & 1))
            out.targets[Target(example.position[0], example.user, event_id, item, kinds)] += 1
    return out


def wrong_letters(host: Host, want: Expected) -> tuple[int, list[str]]:
    """How many dead letters there are (repetitions included), and what is wrong with them."""
    problems, seen, count = list[str](), dict[Place, Json](), 0
    for letter in records(host, "dead-letters"):
        count += 1
        headers = {name: value.decode() for name, value in letter.headers() or []}
        source = int(headers["partition"]), int(headers["offset"])
        where = f"dead-letters[{letter.partition()}]@{letter.offset()} of {source}"
        right = {
            "reason": want.reasons.get(source, "none: it is good"),
            "topic": f"{host.prefix}.events",
            "partition": str(source[0]),
            "offset": str(source[1]),
        }
        if headers != right or letter.partition() != source[0]:
            problems.append(f"{where} has {headers}, not {right}")
        elif (letter.key(), letter.value()) != want.bad[source]:
            problems.append(f"{where}: not the record's bytes")
        seen[source] = headers
    problems += [f"no dead letter of {source} ({want.reasons[source]})" for source in want.reasons.keys() - seen.keys()]
    return count, problems


def difference(export: str, want: list[Json]) -> tuple[int, int, list[str]]:
    """Events lost, events doubled (or invented), and the first users whose sequences are not the oracle's."""
    got = [_cut(json.loads(line)) for line in export.splitlines()]
    held, wanted = (Counter(_identities(sequences)) for sequences in (got, want))
    theirs, ours = ({s["user_id"]: s for s in sequences} for sequences in (got, want))
    users = sorted(u for u in theirs.keys() | ours.keys() if theirs.get(u) != ours.get(u))
    problems = [f"user {u}: {_first_difference(theirs.get(u), ours.get(u))}" for u in users[:SHOWN]]
    if not problems and [s["user_id"] for s in got] != [s["user_id"] for s in want]:
        problems.append("users are not sorted by id, or one is there twice")
    return (wanted - held).total(), (held - wanted).total(), problems


def _identities(sequences: list[Json]) -> Iterator[tuple[str, str, int, str]]:
    for s in sequences:
        for e in s["events"]:
            yield s["user_id"], e["type"], e["event_time"], e["event_id"]


def _first_difference(got: Json | None, want: Json | None) -> str:
    if got is None or want is None:
        return "missing" if got is None else "should not be there"
    for i, (g, w) in enumerate(zip(got["events"], want["events"], strict=False)):
        if g != w:
            return f"event {i} is {g}, not {w}"
    return f"{len(got['events'])} events, not {len(want['events'])}"


def _cut(sequence: Json) -> Json:
    """Ids that were made unique, as they were before."""
    for event in sequence["events"]:
        event["event_id"] = _before(event["event_id"])
    return sequence


def _original(example: wire.Example) -> wire.Example:
    return replace(example, target_events=[_before(event_id) for event_id in example.target_events])


def _before(event_id: str) -> str:
    return event_id.partition(MARK)[0]


def _name(out: Emitted, problem: str) -> None:
    if len(out.problems) < SHOWN:
        out.problems.append(problem)
