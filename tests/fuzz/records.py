"""A million broken messages: each is judged right, and each ends where the contract says.

`python -m tests.fuzz.records --messages 1000000 --seed 1` (or `make fuzz`) makes messages (`messages`), puts each
before two judges (`verdicts`), and drives them in batches, with commits and reopenings, through a real Partition over
RocksDB on disk, beside the oracle, which gets what the rule book found good. What must hold:

    messages = good, by kind + duplicates + expired + dead letters, by reason + erasures + heartbeats
    per batch: the dead letters are those the rule book found bad, record for record; the targets are the oracle's
    at the end: the export is the oracle's, exactly

A run is cut into chapters of some thousand messages, each with a store and an oracle of its own (so that memory does
not grow with the run) and with settings of its own (`SETTINGS`, in turn). A message depends on the seed and its number
alone: `--only N` shows message N of a run, and what each judge says of it. `--kafka` sends the messages through a real
broker and `streamgr sequencer` instead (`broker`).

The last line is a JSON object of counts; the exit status is 0 only if all agree.
"""

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice, zip_longest
from pathlib import Path
from random import Random

from msgspec.structs import replace

from streamgr import config
from streamgr.events import Records
from streamgr.sequence import examples as wire
from streamgr.sequence import views
from streamgr.sequence.partition import Applied, Partition
from streamgr.state.rocks import Memory
from streamgr.state.store import Meta, Store
from tests.fuzz.messages import WINDOW_MS, Message, Rules, messages
from tests.fuzz.verdicts import Findings, Judges, batch, shortened
from tests.oracle import Json, Oracle, Target

CHAPTER = 4_000
START_MS = 1_700_000_000_000
PACE_MS = 20
BASE = config.Sequence(
    attribution_window_seconds=WINDOW_MS / 1000,
    lateness_seconds=5.0,
    close_step_seconds=1.0,
    max_future_seconds=2.0,
    history_length=8,
)
SETTINGS = [
    BASE,
    replace(BASE, keep_seconds=20.0),
    replace(BASE, actions=("view", "like", "click"), max_step_seconds=1.5),
    replace(BASE, lateness_seconds=0.0, history_length=0),
    replace(BASE, cached_events=1),
]


@dataclass(slots=True)
class Tally:
    """Where the messages ended."""

    good: Counter[str] = field(default_factory=Counter)  # by kind, erasures and heartbeats too
    bad: Counter[str] = field(default_factory=Counter)  # by reason
    duplicates: int = 0
    expired: int = 0
    late: int = 0
    targets: int = 0

    @property
    def messages(self) -> int:
        return self.good.total() + self.bad.total() + self.duplicates + self.expired

    def add(self, other: "Tally") -> None:
        self.good += other.good
        self.bad += other.bad
        self.duplicates += other.duplicates
        self.expired += other.expired
        self.late += other.late
        self.targets += other.targets

    def json(self) -> Json:
        events = {kind: n for kind, n in sorted(self.good.items()) if kind not in ("erasure", "heartbeat")}
        return {
            "messages": self.messages,
            "good": events,
            "duplicates": self.duplicates,
            "expired": self.expired,
            "dead_letters": dict(sorted(self.bad.items())),
            "erasures": self.good["erasure"],
            "heartbeats": self.good["heartbeat"],
            "targets": self.targets,
        }


def rules_of(settings: config.Sequence) -> Rules:
    closing = settings.attribution_window_seconds + settings.lateness_seconds + settings.close_step_seconds
    return Rules(settings.actions, round(settings.max_future_seconds * 1000), round(closing * 1000))


def oracle_of(settings: config.Sequence) -> Oracle:
    return Oracle(
        window_ms=round(settings.attribution_window_seconds * 1000),
        lateness_ms=round(settings.lateness_seconds * 1000),
        step_ms=round(settings.close_step_seconds * 1000),
        max_step_ms=round(settings.max_step_seconds * 1000),
        keep_ms=round(settings.keep_seconds * 1000),
    )


def run(count: int, seed: int, findings: Findings, progress: bool = False) -> Tally:
    """`count` messages of a seed, chapter by chapter."""
    tally, memory = Tally(), Memory(config.State(cache_bytes=1 << 20, write_buffer_bytes=4 << 20))
    for first in range(0, count, CHAPTER):
        with tempfile.TemporaryDirectory(prefix="fuzz-") as directory:
            tally.add(_chapter(Path(directory), memory, seed, first, min(CHAPTER, count - first), findings))
        if progress and first // CHAPTER % 25 == 24:
            print(f"{first + CHAPTER:,} messages, {findings.total} disagreements", file=sys.stderr)
    return tally


def settings_at(number: int) -> config.Sequence:
    """The settings under which a message is judged."""
    return SETTINGS[number // CHAPTER % len(SETTINGS)]


def made(seed: int, first: int, count: int) -> Iterator[Message]:
    """The messages of a chapter that starts at `first`."""
    return messages(f"{seed}/{first}", count, rules_of(settings_at(first)), START_MS, PACE_MS)


def _chapter(path: Path, memory: Memory, seed: int, first: int, count: int, findings: Findings) -> Tally:
    settings = settings_at(first)
    judges, oracle, rng = Judges(rules_of(settings)), oracle_of(settings), Random(f"{seed}/{first}/batches")
    stream, tally, at = made(seed, first, count), Tally(), first
    store = _opened(path, memory, settings)
    try:
        partition = Partition(store, settings, "f")
        while taken := list(islice(stream, rng.choice((1, 10, 200, 200, 700)))):
            verdicts = judges.verdicts(taken, at, findings)
            tally.add(_step(partition, oracle, taken, verdicts, at, findings))
            at += len(taken)
            if rng.random() < 0.5:
                partition.commit()
                if rng.random() < 0.05:
                    store.close()
                    store = _opened(path, memory, settings)
                    partition = Partition(store, settings, "f")
        partition.commit()
    finally:
        store.close()
    compare_exports(views.export(path), oracle.sequences(), first, findings)
    return tally


def _opened(path: Path, memory: Memory, settings: config.Sequence) -> Store:
    store = Store(path / "p00000", memory)
    window, keep = round(settings.attribution_window_seconds * 1000), round(settings.keep_seconds * 1000)
    meta = Meta(
        cluster_id="c", topic_id="t", topic="e", partition=0, partitions=1, fingerprint="f", actions=settings.actions,
        window_ms=window, keep_ms=keep, emits=True,
    )  # fmt: skip
    store.claim(meta)
    return store


def _step(
    partition: Partition,
    oracle: Oracle,
    taken: list[Message],
    verdicts: Sequence[str | Json | None],
    first: int,
    findings: Findings,
) -> Tally:
    """One batch through the partition and the oracle; what the judges do not agree on is left out of both."""
    whole, end = batch(taken, first), first + len(taken)
    wanted, letters = feed(oracle, zip(whole.offsets, verdicts, strict=True))
    records = whole if None not in verdicts else _agreed(whole, verdicts)
    targets: list[Target] = []
    out = partition.apply(records, lambda key, value: targets.extend(_targets(key, value, partition)))
    if partition.next_offset != end:
        findings.add("the next offset of a batch", f"{partition.next_offset}, wanted {end}", first)
    got = [(record, bad.reason) for record, bad in out.dead_letters]
    want = [(whole[offset - first], reason) for offset, reason in letters]
    if got != want:
        wrong = next(((g, w) for g, w in zip_longest(got, want) if g != w), None)
        findings.add("dead letters of a batch", f"first difference (got, wanted): {str(wrong)[:600]}", first)
    if Counter(targets) != Counter(oracle.targets):
        more, less = Counter(targets) - Counter(oracle.targets), Counter(oracle.targets) - Counter(targets)
        findings.add("targets of a batch", f"too many: {[*more][:3]}, missing: {[*less][:3]}", first)
    wanted.targets = len(oracle.targets)
    oracle.targets.clear()
    if _told(out) != wanted:
        findings.add("counts of a batch", f"the partition says {_told(out)}, wanted {wanted}", first)
    return wanted


def _agreed(records: Records, verdicts: Sequence[str | Json | None]) -> Records:
    """Those records with a verdict."""
    kept = [i for i, verdict in enumerate(verdicts) if verdict is not None]
    return Records(
        records.topic,
        records.partition,
        [records.offsets[i] for i in kept],
        [records.keys[i] for i in kept],
        [records.values[i] for i in kept],
        [records.append_ms[i] for i in kept],
        records.next_offset,
    )


def feed(oracle: Oracle, verdicts: Iterable[tuple[int, str | Json | None]]) -> tuple[Tally, list[tuple[int, str]]]:
    """Give the oracle what is good; where the records end by its account, and (offset, reason) of the bad ones."""
    tally, letters = Tally(), []
    late = oracle.late
    for offset, verdict in verdicts:
        if verdict is None:
            continue
        if isinstance(verdict, str):
            tally.bad[verdict] += 1
            letters.append((offset, verdict))
            continue
        duplicates, expired = oracle.duplicates, oracle.expired
        oracle.feed(offset, verdict)
        if oracle.duplicates != duplicates:
            tally.duplicates += 1
        elif oracle.expired != expired:
            tally.expired += 1
        else:
            tally.good["erasure" if "erase" in verdict else verdict["type"]] += 1
    tally.late = oracle.late - late
    return tally, letters


def _told(out: Applied) -> Tally:
    """What the partition says of a batch."""
    bad = Counter(letter.reason for _, letter in out.dead_letters)
    return Tally(out.kinds, bad, out.duplicates, out.expired, out.late, out.targets)


def _targets(key: bytes, value: bytes, partition: Partition) -> Iterator[Target]:
    """The targets of an example."""
    example = wire.decode(value)
    assert isinstance(example, wire.Example)
    assert key == example.user.encode()
    actions = partition.store.meta.actions if partition.store.meta is not None else ()
    for item, event_id, bits in zip(
        example.target_items, example.target_events, example.target_labels.tolist(), strict=True
    ):
        labels = sorted(name for bit, name in enumerate(actions) if bits >> bit & 1)
        yield Target(example.position[0], example.user, event_id, item, tuple(labels))


def compare_exports(got: Iterable[Json], want: Iterable[Json], number: int, findings: Findings) -> None:
    """Both sorted by user; the first difference is told."""
    for ours, oracles in zip_longest(got, want):
        if ours != oracles:
            pairs = zip_longest((ours or {}).get("events", []), (oracles or {}).get("events", []))
            where = next(((n, *pair) for n, pair in enumerate(pairs) if pair[0] != pair[1]), None)
            users = [(s or {}).get("user_id") for s in (ours, oracles)]
            what = f"users {users}, first difference (place, got, wanted): {str(where)[:600]}"
            findings.add("the export of a chapter", what, number)
            return


def show(seed: int, number: int) -> bool:
    """Print one message of a run and what is said of it, cut down if that is a disagreement; whether all agree."""
    first = number // CHAPTER * CHAPTER
    message = next(islice(made(seed, first, CHAPTER), number - first, None))
    judges, findings = Judges(rules_of(settings_at(number))), Findings(seed)
    message = shortened(message, judges)
    judges.verdicts([message], number, findings)
    print(f"key     {message.key!r}\nvalue   {message.value!r}\nappend  {message.append_ms}")
    print(f"verdict {judges.judged(message)!r}")
    print(findings.text() or "all agree")
    return not findings.kinds


def shorten(findings: Findings) -> None:
    """Cut every finding's message down to what it takes."""
    for found in findings.kinds.values():
        if found.message is not None:
            settings = BASE if findings.seed is None else settings_at(found.number)
            found.message = shortened(found.message, Judges(rules_of(settings)))


def main() -> int:
    options = argparse.ArgumentParser(prog="python -m tests.fuzz.records", description=__doc__.splitlines()[0])
    options.add_argument("--messages", type=int, help="how many (default 1000000; with --kafka 20000)")
    options.add_argument("--seed", type=int, default=1)
    options.add_argument("--only", type=int, metavar="N", help="show message N alone")
    options.add_argument("--kafka", action="store_true", help="through a real broker (KAFKA_BOOTSTRAP or KAFKA_HOME)")
    arguments = options.parse_args()
    if arguments.only is not None:
        return 0 if show(arguments.seed, arguments.only) else 1
    seed, wanted = arguments.seed, arguments.messages or (20_000 if arguments.kafka else 1_000_000)
    start = time.monotonic()
    if arguments.kafka:
        from tests.fuzz import broker

        findings = Findings()
        tally = broker.run(wanted, seed, findings)
    else:
        findings = Findings(seed)
        tally = run(wanted, seed, findings, progress=True)
    seconds = time.monotonic() - start
    agree = findings.total == 0 and tally.messages == wanted
    if findings.kinds:
        shorten(findings)
        print(findings.text())
    print(
        json.dumps(
            {
                **tally.json(),
                "seed": seed,
                "disagreements": findings.total,
                "seconds": round(seconds, 1),
                "messages_per_second": round(wanted / seconds),
            }
        )
    )
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
