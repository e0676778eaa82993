"""From records to sequences and targets, against the oracle of the contract, through real Kafka and real processes."""

import json
from collections import Counter
from pathlib import Path

import pytest

from streamgr.clock import SystemClock
from tests.oracle import Oracle, Target
from tests.streams import START, Row, events, heartbeats, row, rubbish
from tests.system import PARTITIONS, System

WINDOW, LATENESS, STEP = 2_000, 1_000, 200
SETTINGS = {
    "sequence__attribution_window_seconds": WINDOW / 1000,
    "sequence__lateness_seconds": LATENESS / 1000,
    "sequence__close_step_seconds": STEP / 1000,
}


@pytest.fixture
def system(kafka: str, prefix: str, tmp_path: Path) -> System:
    system = System(kafka, prefix, tmp_path, **SETTINGS)
    system.run("topics", "apply")
    return system


def expected(system: System, bad: set[tuple[int, int]]) -> list[Oracle]:
    """The oracle's answer for what now lies in the events topic; `bad` are (partition, offset) to skip."""
    oracles = [Oracle(WINDOW, LATENESS, STEP) for _ in range(PARTITIONS)]
    for message in system.read("events"):
        if (message.partition(), message.offset()) in bad:
            continue
        value = message.value()
        event = {"erase": message.key().decode()} if value is None else json.loads(value)
        oracles[message.partition()].feed(message.offset(), event)
    return oracles


def assert_equal(system: System, oracles: list[Oracle]) -> None:
    """Sequences and accepted targets are the oracle's, each once."""
    sequences = sorted((s for o in oracles for s in o.sequences()), key=lambda s: s["user_id"])
    assert system.exported() == sequences
    accepted: dict[tuple[int, int, int], list[Target]] = {}
    for example in system.examples():
        partition, offset, n = example["position"]["partition"], example["position"]["offset"], example["position"]["n"]
        targets = [
            Target(offset, example["user"], t["event_id"], t["item"], tuple(sorted(t["labels"])))
            for t in example["targets"]
        ]
        again = accepted.setdefault((partition, offset, n), targets)
        assert again == targets, "the same position says two things"
    got = Counter(t for targets in accepted.values() for t in targets)
    want = Counter(t for o in oracles for t in o.targets)
    assert got == want


def test_a_disorderly_stream_gives_the_oracles_sequences_and_targets(system: System) -> None:
    system.publish([row(e) for e in events(7, 3_000)] + heartbeats(120_000, PARTITIONS))
    system.run("sequencer", "--until-end")
    oracles = expected(system, set())
    assert sum(len(o.targets) for o in oracles) > 500
    assert sum(o.duplicates for o in oracles) > 50
    assert_equal(system, oracles)
    system.run("sequencer", "--until-end")  # nothing new: nothing changes
    assert_equal(system, oracles)


def test_rubbish_goes_to_the_dead_letters_with_its_reason_and_the_stream_goes_on(system: System) -> None:
    good = [row(e) for e in events(8, 300)]
    bad = rubbish(SystemClock().now_ms())
    system.publish(good[:150] + [r for _, r in bad] + good[150:] + heartbeats(120_000, PARTITIONS))
    system.run("sequencer", "--until-end")
    wanted: dict[Row, str] = {r: reason for reason, r in bad}
    published = {(m.partition(), m.offset()): m for m in system.read("events")}
    letters = {}
    for letter in system.read("dead-letters"):
        headers = {k: v.decode() for k, v in letter.headers()}
        source = (int(headers["partition"]), int(headers["offset"]))
        assert headers["topic"] == f"{system.prefix}.events"
        assert letter.partition() == source[0]
        assert (letter.key(), letter.value()) == (published[source].key(), published[source].value())
        letters[source] = headers["reason"]
    reasons = {(m.key(), m.value(), m.partition()): letters.get(at) for at, m in published.items()}
    assert {r: reasons[r] for r in wanted} == wanted
    assert len(letters) == len(bad)
    assert_equal(system, expected(system, set(letters)))


def test_an_erased_user_is_gone_and_may_come_back(system: System) -> None:
    stream = events(9, 600, users=4)
    half = [row(e) for e in stream[:300]]
    rest = [row(e) for e in stream[300:]]
    system.publish([*half, (b"u0", None, None), *rest, *heartbeats(120_000, PARTITIONS)])
    system.run("sequencer", "--until-end")
    assert_equal(system, expected(system, set()))


def test_show_says_what_export_says(system: System) -> None:
    system.publish([row(e) for e in events(10, 100, users=3)])
    system.run("sequencer", "--until-end")
    for sequence in system.exported():
        assert json.loads(system.run("sequences", "show", sequence["user_id"])) == sequence
    assert system.run("sequences", "show", "nobody", code=65) == ""
    assert START > 0
