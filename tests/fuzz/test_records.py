"""The fuzz in short: every verdict, every count and every export right; and it does find what is wrong."""

from pathlib import Path

import pytest

from streamgr.decoder import Decoder
from tests.fuzz import broker
from tests.fuzz.messages import Message
from tests.fuzz.records import CHAPTER, SETTINGS, Tally, made, rules_of, run
from tests.fuzz.verdicts import Findings, Judges, shortened
from tests.rulebook import REASONS

COUNT = 20_000


@pytest.fixture(scope="module")
def findings() -> Findings:
    return Findings(seed=2)


@pytest.fixture(scope="module")
def tally(findings: Findings) -> Tally:
    return run(COUNT, 2, findings)


def test_every_message_is_judged_right_and_ends_where_it_should(tally: Tally, findings: Findings) -> None:
    assert not findings.kinds, findings.text()
    assert tally.messages == COUNT


def test_much_is_good_and_every_reason_occurs(tally: Tally) -> None:
    assert len(SETTINGS) == COUNT // CHAPTER
    assert 0.25 < tally.good.total() / COUNT < 0.5
    for kind in ("profile", "impression", "click", "like", "view", "heartbeat", "erasure"):
        assert tally.good[kind] > 100, kind
    for reason in REASONS:
        assert tally.bad[reason] > 40, reason
    assert tally.duplicates > 200
    assert tally.expired > 20
    assert tally.late > 100
    assert tally.targets > 1_000


def test_the_same_seed_makes_the_same_messages() -> None:
    assert list(made(3, 0, 300)) == list(made(3, 0, 300)) != list(made(4, 0, 300))
    assert list(made(3, 0, 300)) != list(made(3, CHAPTER, 300))


def test_a_judge_who_is_a_millisecond_wrong_is_found() -> None:
    rules = rules_of(SETTINGS[0])
    judges, findings = Judges(rules), Findings(seed=3)
    judges.decoder = Decoder(rules.actions, rules.max_future_ms + 1, rules.closing_ms)
    judges.verdicts(list(made(3, 0, CHAPTER)), 0, findings)
    kind = "the rule book says future_time, decode good, explain good"
    assert kind in findings.kinds
    assert f"--seed 3 --only {findings.kinds[kind].number}" in findings.text()


def test_what_is_found_is_cut_down() -> None:
    judges = Judges(rules_of(SETTINGS[0]))
    judges.decoder = Decoder(("click",), 0)
    value = b'{"pad": [1, 2, 3], "event_time": 5, "type": "like", "event_id": "e", "user_id": "u", "item_id": "i"}'
    short = shortened(Message(b"u", value, 10), judges)
    assert short.value == b'{"event_time":5,"type":"like","event_id":"e","user_id":"u","item_id":"i"}'


def test_through_a_broker(kafka: str, prefix: str, tmp_path: Path) -> None:
    findings = Findings()
    tally = broker.through(kafka, prefix, tmp_path, 2_000, 2, findings)
    assert not findings.kinds, findings.text()
    assert tally.messages == 2_000
    assert all(tally.bad[reason] for reason in REASONS)
    assert tally.targets > 100
