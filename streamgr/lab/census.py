"""The census: what a file holds, counted straight from the file, against what lies in the sequences.

For the ready-made logs the count is independent of `lab.datasets`: plain csv, a few lines a log. Other files have no
second reading; there the reader's own events are counted, repeated ones once (profiles apart: of a run of equal ones
only the first enters a sequence).
"""

import csv
import gzip
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from streamgr.events import FIRST_ACTION, IMPRESSION, PROFILE, Event
from streamgr.lab.datasets import LAYOUTS, Dataset

Key = tuple[str, str, str, int]  # user, type, item, event time
SHOWN = 5  # of what is wrong, so many are named

# the kinds of event that a row of a ready-made log stands for, said again without `lab.datasets`
BY_HAND: Mapping[str, Callable[[Mapping[str, str]], list[str]]] = {
    "deskdrop": lambda row: [row["event"]],
    "ebnerd": lambda row: ["impression", "click"] if row["event"] == "click" else [row["event"]],
    "globo": lambda row: ["click"],
    "movielens": lambda row: ["like" if float(row["rating"]) >= 4 else "click"],
}


@dataclass(frozen=True, slots=True)
class Census:
    """`missing`: events of the file in no sequence; `surplus`: in the sequences more often than in the file."""

    method: str  # "file" | "reader"
    expected: int
    found: int
    users: int
    missing: int
    surplus: int
    wrong: list[str]  # a few of them by name

    @property
    def exact(self) -> bool:
        """Every valid event lies in exactly one sequence, once."""
        return self.missing == 0 and self.surplus == 0


def take(dataset: Dataset, sequences: Iterable[Mapping[str, Any]]) -> Census:
    """Compare the file with exported sequences (`sequence.views.export`), profiles left out of both."""
    method, expected = count(dataset)
    found: Counter[Key] = Counter()
    users: set[str] = set()
    wrong: list[str] = []
    twice = 0
    for sequence in sequences:
        user = sequence["user_id"]
        if user in users:
            twice += 1
            wrong.append(f"user {user} has two sequences")
        users.add(user)
        for event in sequence["events"]:
            if event["type"] != "profile":
                found[user, event["type"], event["item_id"], event["event_time"]] += 1
    missing, surplus = expected - found, found - expected
    wrong += [f"missing: {key}" for key in sorted(missing)[:SHOWN]] + [f"surplus: {k}" for k in sorted(surplus)[:SHOWN]]
    return Census(
        method, expected.total(), found.total(), len(users), missing.total(), surplus.total() + twice, wrong[:SHOWN]
    )


def count(dataset: Dataset) -> tuple[str, "Counter[Key]"]:
    """How the file was counted ("file" or "reader"), and how often it holds each (user, type, item, time)."""
    by_hand = BY_HAND.get(dataset.layout.name)
    if by_hand and dataset.layout == LAYOUTS[dataset.layout.name] and not dataset.skip_bad_rows:
        with _text(dataset.path) as file:
            rows = csv.DictReader(file)
            return "file", Counter((r["user"], kind, r["item"], int(r["ts_ms"])) for r in rows for kind in by_hand(r))
    identities = set()
    for row in dataset.rows():
        event = row.event
        if isinstance(event, Event) and event.kind != PROFILE:
            name = "impression" if event.kind == IMPRESSION else dataset.kinds[event.kind - FIRST_ACTION]
            identities.add((event.user, name, event.item, event.time, event.event_id))
    return "reader", Counter((user, kind, item, time) for user, kind, item, time, _ in identities)


def _text(path: Path) -> IO[str]:
    gz = path.suffix == ".gz"
    return gzip.open(path, "rt", encoding="utf-8", newline="") if gz else path.open(encoding="utf-8", newline="")
