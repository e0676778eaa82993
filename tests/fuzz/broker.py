"""The same messages through a real broker and `streamgr sequencer --until-end`, in two runs of it.

What the broker's clock stamped on a record decides what is too far ahead, so all are judged as they lie in the topic.
Left out are what no topic takes (records of more than its 2 MiB), and what the judges disagree on before it is sent
(that is reported, and would leave the rest without meaning).

    every bad record has one dead letter: the same key and value bytes, the same partition number, its reason and where
    it lay in the headers, and nothing else; and no other record has one
    the export is the oracles', and so are the targets, each once
"""

import json
import os
import shutil
import sys
import tempfile
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from streamgr.clock import SystemClock
from streamgr.kafka.embedded import EmbeddedBroker
from tests.fuzz.messages import MIB, Message, messages
from tests.fuzz.records import BASE, PACE_MS, Tally, compare_exports, feed, oracle_of, rules_of
from tests.fuzz.verdicts import Findings, Judges
from tests.oracle import Json, Oracle, Target
from tests.system import PARTITIONS, System

LARGEST = 2 * MIB - 200  # key and value; the rest is the record's frame
SETTINGS = {
    f"sequence__{name}": getattr(BASE, name)
    for name in (
        "attribution_window_seconds", "lateness_seconds", "close_step_seconds", "max_future_seconds", "history_length",
    )
}  # fmt: skip
Source = tuple[int, int]  # a partition and an offset of the events


def run(count: int, seed: int, findings: Findings) -> Tally:
    """`count` messages through a broker of this run's own, or that of KAFKA_BOOTSTRAP."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name, _broker(Path(name) / "kafka") as bootstrap:
        return through(bootstrap, f"fuzz{uuid.uuid4().hex[:8]}", Path(name), count, seed, findings)


@contextmanager
def _broker(directory: Path) -> Iterator[str]:
    """The address of a real broker."""
    if address := os.environ.get("KAFKA_BOOTSTRAP"):
        yield address
        return
    if not os.environ.get("KAFKA_HOME") or shutil.which("java") is None:
        sys.exit("no real Kafka: set KAFKA_BOOTSTRAP, or KAFKA_HOME with java on the PATH")
    with EmbeddedBroker.start(directory) as embedded:
        yield embedded.bootstrap


def through(bootstrap: str, prefix: str, directory: Path, count: int, seed: int, findings: Findings) -> Tally:
    """`count` messages through the broker, under a topic prefix of their own; where they ended."""
    judges = Judges(rules_of(BASE))
    sent = _chosen(count, seed, judges, findings)
    with System(bootstrap, prefix, directory, **SETTINGS) as system:
        system.run("topics", "apply")
        for half in (sent[: count // 2], sent[count // 2 :]):
            system.publish([(m.key, m.value, n % PARTITIONS if m.key is None else None) for n, m in enumerate(half)])
            system.run("sequencer", "--until-end")
        published = system.read("events")
        _compare(Counter((m.key(), m.value()) for m in published), Counter(m[:2] for m in sent), "records", findings)
        oracles = [oracle_of(BASE) for _ in range(PARTITIONS)]
        tally = Tally()
        bad: dict[Source, tuple[Any, str]] = {}
        for partition, oracle in enumerate(oracles):
            log = [m for m in published if m.partition() == partition]
            read = [Message(m.key(), m.value(), m.timestamp()[1]) for m in log]
            verdicts = judges.verdicts(read, 0, findings)
            offsets = [m.offset() for m in log]
            told, letters = feed(oracle, zip(offsets, verdicts, strict=True))
            tally.add(told)
            by_offset = dict(zip(offsets, log, strict=True))
            bad |= {(partition, offset): (by_offset[offset], reason) for offset, reason in letters}
        _compare_letters(system.read("dead-letters"), bad, f"{prefix}.events", findings)
        sequences = sorted((s for o in oracles for s in o.sequences()), key=lambda s: str(s["user_id"]))
        compare_exports(_lines(system, "sequences", "export"), sequences, 0, findings)
        tally.targets = _compare_targets(_lines(system, "examples", "list"), oracles, findings)
    return tally


def _chosen(count: int, seed: int, judges: Judges, findings: Findings) -> list[Message]:
    """The first `count` that a broker takes, without those on which the judges disagree. They lead up to now."""
    start = SystemClock().now_ms() - count * PACE_MS
    stream = messages(f"{seed}/kafka", 2 * count + 100, judges.rules, start, PACE_MS)
    chosen = list(islice((m for m in stream if len(m.key or b"") + len(m.value or b"") <= LARGEST), count))
    verdicts = judges.verdicts(chosen, 0, findings)
    return [m for m, verdict in zip(chosen, verdicts, strict=True) if verdict is not None]


def _compare_letters(letters: list[Any], bad: dict[Source, tuple[Any, str]], topic: str, findings: Findings) -> None:
    left = dict(bad)
    for letter in letters:
        headers = [(name, value.decode()) for name, value in letter.headers() or []]
        told = dict(headers)
        source = int(told.get("partition", -1)), int(told.get("offset", -1))
        record, reason = left.pop(source, (None, ""))
        message = Message(letter.key(), letter.value(), 0)
        if record is None:
            findings.add("a dead letter too many", str(headers), 0, message)
            continue
        wanted = {"reason": reason, "topic": topic, "partition": str(source[0]), "offset": str(source[1])}
        if told != wanted or len(headers) != len(wanted):
            findings.add("a dead letter's headers", f"{headers}, wanted {wanted}", 0, message)
        if letter.partition() != source[0]:
            findings.add("a dead letter's partition", f"{letter.partition()}, wanted {source[0]}", 0, message)
        if (letter.key(), letter.value()) != (record.key(), record.value()):
            findings.add("a dead letter's bytes", f"they are not those of {source}", 0, message)
    for source, (record, reason) in left.items():
        message = Message(record.key(), record.value(), record.timestamp()[1])
        findings.add("a dead letter is missing", f"{source}, {reason}", 0, message)


def _compare_targets(examples: Iterator[Json], oracles: list[Oracle], findings: Findings) -> int:
    """Each target once, of all examples; how many there are."""
    got: Counter[Target] = Counter()
    for example in examples:
        offset = example["position"]["offset"]
        for t in example["targets"]:
            got[Target(offset, example["user"], t["event_id"], t["item"], tuple(sorted(t["labels"])))] += 1
    wanted = Counter(t for o in oracles for t in o.targets)
    _compare(got, wanted, "targets", findings)
    return wanted.total()


def _compare(got: Counter[Any], wanted: Counter[Any], what: str, findings: Findings) -> None:
    if got != wanted:
        more, less = got - wanted, wanted - got
        some = [str([*counter][:2])[:400] for counter in (more, less)]
        findings.add(what, f"{more.total()} too many: {some[0]}, {less.total()} missing: {some[1]}", 0)


def _lines(system: System, *argv: str) -> Iterator[Json]:
    """What a command prints as JSON lines. Only a line feed ends one: U+2028 may stand in a text."""
    for line in system.run(*argv).split("\n")[:-1]:
        yield json.loads(line)
