"""Judging and the census: the same targets for all, asked before told, and a count that owes the reader nothing."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from streamgr.lab import census
from streamgr.lab.baselines import Target
from streamgr.lab.baselines.popularity import Popularity
from streamgr.lab.compare import Row
from streamgr.lab.datasets import Dataset
from streamgr.lab.judge import judge


def row(offset: int, item: str = "i", *, p: float | None = None, rank: int | None = None, **change: Any) -> Row:
    base: dict[str, Any] = {
        "event_id": f"e{offset}", "user": "u", "item": item, "time": offset, "watermark": 0, "version": 1, "labels": [],
        "kind": "like" if p is None else "impression", "p": None if p is None else {"click": p}, "rank": rank,
        "offset": offset, "partition": 0,
    }  # fmt: skip
    return Row(**{**base, **change})


class Witness:
    """A baseline that keeps the order in which it was asked and told."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def probabilities(self, target: Target) -> dict[str, float] | None:
        self.heard.append(f"p {target.item}")
        return None

    def rank(self, target: Target) -> int:
        self.heard.append(f"rank {target.item}")
        return 11

    def learn(self, target: Target) -> None:
        self.heard.append(f"learn {target.item} {sorted(target.labels)}")


def test_all_are_asked_about_what_closed_together_before_they_are_told() -> None:
    witness = Witness()
    rows = [row(5, "a", p=0.1), row(5, "b", p=0.9, labels=["click"], rank=1), row(6, "c", rank=2)]
    judge(rows, ["click"], {"w": witness})
    assert witness.heard == [
        "p a", "p b", "rank b", "learn a []", "learn b ['click']", "p c", "rank c", "learn c []"
    ]  # fmt: skip


def test_the_report_by_hand() -> None:
    rows = [
        row(1, p=0.5, labels=["click"], rank=1),
        row(2, p=0.25),
        row(3, p=0.25),
        row(4, p=0.25),
        row(5, rank=3),
        row(6, rank=-1),
    ]
    report = judge(rows, ["click"], {"w": Witness(), "popularity": Popularity(["click"])}).report()
    assert report["targets"] == {"impression": 4, "like": 2}
    click = report["ranking"]["click"]
    entropy = math.log(4) / 4 + 3 / 4 * math.log(4 / 3)
    assert (click["targets"], click["base_rate"]) == (4, 0.25)
    assert click["models"]["hstu"]["normalized_entropy"] == pytest.approx(
        (math.log(2) + 3 * math.log(4 / 3)) / 4 / entropy
    )
    assert click["models"]["hstu"]["auc"] == 1.0
    assert set(click["models"]) == {"hstu", "popularity"}  # the witness has no notion of a probability
    retrieval = report["retrieval"]
    assert retrieval["like"]["models"]["hstu"] == {"hit_rate_at_10": 0.5, "ndcg_at_10": 0.25, "unknown_item": 0.5}
    assert retrieval["any"]["targets"] == 3
    assert retrieval["any"]["models"]["hstu"]["hit_rate_at_10"] == pytest.approx(2 / 3)
    assert retrieval["any"]["models"]["w"]["hit_rate_at_10"] == 0.0
    json.dumps(report)


def test_a_log_without_targets_has_nothing_to_report() -> None:
    assert judge([], ["click"], {}).report() == {"targets": {}, "ranking": {}, "retrieval": {}}


LOG = (
    "ts_ms,user,item,event,imp,pos,session\n"
    "1000,u,a,click,r,0,s\n1000,u,b,impression,r,1,s\n2000,v,a,impression,q,0,s\n"
)
SEQUENCES: list[dict[str, Any]] = [
    {
        "user_id": "u",
        "events": [
            {"type": "impression", "item_id": "a", "event_time": 1000, "event_id": "1"},
            {"type": "impression", "item_id": "b", "event_time": 1000, "event_id": "2"},
            {"type": "click", "item_id": "a", "event_time": 1000, "event_id": "3"},
            {"type": "profile", "event_time": 1000, "event_id": "4"},
        ],
    },
    {"user_id": "v", "events": [{"type": "impression", "item_id": "a", "event_time": 2000, "event_id": "5"}]},
]


def taken(tmp_path: Path, sequences: list[dict[str, Any]], text: str = LOG) -> census.Census:
    path = tmp_path / ("log.csv" if text.startswith("ts_ms") else "log.jsonl")
    path.write_text(text)
    return census.take(Dataset(path), sequences)


def test_the_census_counts_every_event_once(tmp_path: Path) -> None:
    counted = taken(tmp_path, SEQUENCES)
    assert counted.exact
    assert (counted.method, counted.expected, counted.found, counted.users) == ("file", 4, 4, 2)


def test_the_census_names_what_is_lost_doubled_or_split(tmp_path: Path) -> None:
    lost = taken(tmp_path, SEQUENCES[:1])
    assert (lost.exact, lost.missing, lost.surplus) == (False, 1, 0)
    assert lost.wrong == ["missing: ('v', 'impression', 'a', 2000)"]
    doubled = [SEQUENCES[0], {"user_id": "v", "events": SEQUENCES[1]["events"] * 2}]
    assert (taken(tmp_path, doubled).exact, taken(tmp_path, doubled).surplus) == (False, 1)
    split = [
        {"user_id": "u", "events": SEQUENCES[0]["events"][:1]},
        {"user_id": "u", "events": SEQUENCES[0]["events"][1:]},
        SEQUENCES[1],
    ]
    assert taken(tmp_path, split).wrong == ["user u has two sequences"]
    assert not taken(tmp_path, split).exact


def test_the_census_of_our_own_lines_counts_a_repeated_event_once(tmp_path: Path) -> None:
    event = {"type": "impression", "event_id": "5", "user_id": "v", "item_id": "a", "event_time": 2000}
    again = event | {"event_time": "1970-01-01T00:00:02Z"}
    profile = {"type": "profile", "event_id": "6", "user_id": "v", "event_time": 1}
    counted = taken(tmp_path, SEQUENCES[1:], "\n".join(map(json.dumps, (event, again, profile))))
    assert (counted.method, counted.expected, counted.exact) == ("reader", 1, True)
