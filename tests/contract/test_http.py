"""The scorer over HTTP: what it answers, what it refuses, and that a refusal names its reason."""

import http.client
import json
import time
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from streamgr.clock import SystemClock
from tests.contract.conftest import Fresh
from tests.system import PARTITIONS, Json, System, wait_for

SETTINGS = {
    "sequence__attribution_window_seconds": 2.0,
    "sequence__lateness_seconds": 0.5,
    "sequence__close_step_seconds": 0.2,
    "trainer__publish_seconds": 0.5,
    "scorer__task_weights": "{click = 1.0, like = 3.0}",
}
USER = "a user/né?#%"  # an id is any text
ITEMS = [f"i{n}" for n in range(12)]
NOW = SystemClock().now_ms()
START = NOW - 60_000


def event(kind: str, user: str, item: str, at: int, **more: Any) -> tuple[bytes, bytes, None]:
    fields = {"type": kind, "event_id": f"{kind}-{item}-{at}", "user_id": user, "item_id": item, "event_time": at}
    return user.encode(), json.dumps({**fields, **more}).encode(), None


@dataclass
class Scorer:
    """A running system, and what its scorer said before there were weights."""

    system: System
    before: dict[str, tuple[int, Any]] = field(default_factory=dict)

    def call(self, method: str, path: str, body: bytes | Json | None = None, **headers: str) -> tuple[int, Any]:
        """Status and body: JSON where it says so, else text."""
        connection = http.client.HTTPConnection("127.0.0.1", self.system.scorer_port, timeout=10)
        try:
            sent = json.dumps(body).encode() if isinstance(body, dict) else body
            connection.request(method, path, sent, {"Content-Type": "application/json", **headers})
            answer = connection.getresponse()
            text = answer.read().decode()
            assert "Traceback" not in text
            is_json = answer.getheader("Content-Type", "").startswith("application/json")
            return answer.status, json.loads(text) if is_json else text
        except ConnectionRefusedError:
            return 0, ""
        finally:
            connection.close()

    def rank(self, **body: Any) -> Json:
        status, answer = self.call("POST", "/v1/rank", {"user_id": USER, "candidates": ["i0", "i1", "i2"], **body})
        assert status == 200, answer
        return answer  # type: ignore[no-any-return]

    def retrieve(self, **body: Any) -> Json:
        status, answer = self.call("POST", "/v1/retrieve", {"user_id": USER, **body})
        assert status == 200, answer
        return answer  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def scorer(fresh: Fresh) -> Iterator[Scorer]:
    system = fresh(**SETTINGS)
    scorer = Scorer(system)
    system.start("scorer")
    wait_for("the scorer to listen", lambda: scorer.call("GET", "/livez")[0] == 200)
    for path in ("/v1/rank", "/v1/retrieve"):
        scorer.before[path] = scorer.call("POST", path, {"user_id": "u", "candidates": ["a"]})
    scorer.before["/readyz"] = scorer.call("GET", "/readyz")
    rows = []
    for n in range(200):
        user, item, at = f"u{n % 7}" if n % 4 else USER, ITEMS[n % 5 if n % 4 else 5 + n // 4 % 7], START + n * 100
        rows.append(event("impression", user, item, at, request_id=n, position=0))
        if n % 3 == 0:
            rows.append(event("click", user, item, at + 50, request_id=n))
    beat = json.dumps({"type": "heartbeat", "event_time": NOW - 1_000}).encode()
    system.publish(rows + [(None, beat, p) for p in range(PARTITIONS)])
    system.start("sequencer")
    system.start("trainer")
    wait_for("readiness", lambda: scorer.call("GET", "/readyz")[0] == 200)
    wait_for("all learned", lambda: len(scorer.retrieve(k=50, exclude_seen=False)["items"]) == len(ITEMS))
    yield scorer
    system.close()


def test_before_the_first_weights_it_says_so(scorer: Scorer) -> None:
    for path in ("/v1/rank", "/v1/retrieve"):
        status, answer = scorer.before[path]
        assert status == 503
        assert "no_weights" in json.dumps(answer)
    assert scorer.before["/readyz"][0] == 503


def test_an_answer_has_the_contracts_fields_best_first(scorer: Scorer) -> None:
    answer = scorer.rank()
    assert set(answer) == {"items", "weights_version", "model_age_seconds", "sequence_length", "cold"}
    assert {i["item_id"] for i in answer["items"]} == {"i0", "i1", "i2"}
    for item in answer["items"]:
        assert set(item) == {"item_id", "score", "probabilities"}
        p = item["probabilities"]
        assert set(p) == {"click", "like"}
        assert all(0 <= v <= 1 for v in p.values())
        assert item["score"] == pytest.approx(p["click"] + 3 * p["like"], abs=1e-5)
    scores = [i["score"] for i in answer["items"]]
    assert scores == sorted(scores, reverse=True)
    assert isinstance(answer["weights_version"], int)
    assert 0 <= answer["model_age_seconds"] < 120
    assert answer["cold"] is False
    events = next(s for s in scorer.system.exported() if s["user_id"] == USER)["events"]
    assert answer["sequence_length"] == len(events)


def test_candidates_are_answered_once(scorer: Scorer) -> None:
    answer = scorer.rank(candidates=["i0", "i1", "i0", "new", "new"])
    assert sorted(i["item_id"] for i in answer["items"]) == ["i0", "i1", "new"]


def test_k_cuts_the_answer_to_its_best(scorer: Scorer) -> None:
    everything = [i["item_id"] for i in scorer.rank(candidates=ITEMS, at=NOW)["items"]]
    assert [i["item_id"] for i in scorer.rank(candidates=ITEMS, k=3, at=NOW)["items"]] == everything[:3]
    assert len(everything) == len(ITEMS)


def test_tasks_choose_what_is_told(scorer: Scorer) -> None:
    for item in scorer.rank(tasks=["like"])["items"]:
        assert set(item["probabilities"]) == {"like"}
        assert item["score"] == pytest.approx(3 * item["probabilities"]["like"], abs=1e-5)


def test_at_is_a_time_as_in_events(scorer: Scorer) -> None:
    at = START + 10_000
    text = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(at // 1000)) + f".{at % 1000:03}+00:00"
    by_number, by_text = scorer.rank(at=at), scorer.rank(at=text)
    assert by_number["items"] == by_text["items"]
    assert by_number["sequence_length"] == by_text["sequence_length"] < scorer.rank()["sequence_length"]
    assert scorer.rank(at=START - 1)["sequence_length"] == 0


def test_strangers_are_answered(scorer: Scorer) -> None:
    answer = scorer.rank(user_id="nobody", candidates=["never seen", "i0"])
    assert (answer["cold"], answer["sequence_length"], len(answer["items"])) == (True, 0, 2)
    assert scorer.retrieve(user_id="nobody")["cold"] is True


def test_retrieval_has_the_same_shape_without_probabilities(scorer: Scorer) -> None:
    answer = scorer.retrieve(k=5, exclude_seen=False)
    assert set(answer) == {"items", "weights_version", "model_age_seconds", "sequence_length", "cold"}
    assert len(answer["items"]) == 5
    assert all(set(i) == {"item_id", "score"} for i in answer["items"])
    scores = [i["score"] for i in answer["items"]]
    assert scores == sorted(scores, reverse=True)


def test_retrieval_covers_all_live_items_and_leaves_out_the_seen(scorer: Scorer) -> None:
    seen = {e["item_id"] for s in scorer.system.exported() if s["user_id"] == USER for e in s["events"]}
    shown = {e["item_id"] for s in scorer.system.exported() for e in s["events"]}
    assert {i["item_id"] for i in scorer.retrieve(k=50, exclude_seen=False)["items"]} == shown
    assert {i["item_id"] for i in scorer.retrieve(k=50)["items"]} == shown - seen


def test_a_sequence_is_the_sequencers_own(scorer: Scorer) -> None:
    status, answer = scorer.call("GET", f"/v1/users/{urllib.parse.quote(USER, safe='')}/sequence")
    expected = next(s for s in scorer.system.exported() if s["user_id"] == USER)
    assert (status, answer) == (200, expected)
    url = f"http://127.0.0.1:{scorer.system.scorer_port}"
    assert json.loads(scorer.system.run("sequences", "show", USER, "--url", url)) == expected
    assert scorer.call("GET", "/v1/users/nobody/sequence")[0] in (200, 404)


GOOD: Json = {"user_id": "u", "candidates": ["a"]}
REFUSED: list[tuple[str, str, Any]] = [
    *[("/v1/rank", "user_id", v) for v in (..., None, "", "x" * 257, 1.5, True, [])],
    *[("/v1/rank", "candidates", v) for v in (..., None, "a", {}, [None], [1.5], [""], ["x" * 257], [["a"]])],
    *[("/v1/rank", "k", v) for v in (0, -1, "x", 1.5)],
    *[("/v1/rank", "tasks", v) for v in ("click", ["buy"], [1], {})],
    *[("/v1/rank", "at", v) for v in ("yesterday", "2024-01-01T00:00:00", -1, 2**63, 1.5, [])],
    *[("/v1/retrieve", "user_id", v) for v in (..., "", [])],
    *[("/v1/retrieve", "k", v) for v in (0, -1, "x")],
    *[("/v1/retrieve", "exclude_seen", v) for v in ("perhaps", 7, [])],
]  # fmt: skip


@pytest.mark.parametrize(("path", "name", "value"), REFUSED, ids=lambda v: ascii(v)[:20])
def test_a_malformed_request_names_the_field(scorer: Scorer, path: str, name: str, value: Any) -> None:
    body = {k: v for k, v in {**GOOD, name: value}.items() if v is not ...}
    status, answer = scorer.call("POST", path, body)
    assert status == 422, answer
    assert name in json.dumps(answer)


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"\xff", b"null", b'{"user_id":' + b"[" * 100_000, b'{"user_id":"\\ud800"}']
)
def test_what_is_no_object_is_refused(scorer: Scorer, body: bytes) -> None:
    assert scorer.call("POST", "/v1/rank", body)[0] in (400, 422)


def test_limits(scorer: Scorer) -> None:
    assert len(scorer.rank(candidates=[f"c{n}" for n in range(4096)], k=4096)["items"]) == 4096
    assert scorer.call("POST", "/v1/rank", {**GOOD, "candidates": [f"c{n}" for n in range(4097)]})[0] == 413
    body = json.dumps({**GOOD, "pad": ""}).encode()
    pad = b"x" * ((1 << 20) - len(body))
    at_limit = body.replace(b'"pad": ""', b'"pad": "' + pad + b'"')
    assert len(at_limit) == 1 << 20
    assert scorer.call("POST", "/v1/rank", at_limit)[0] in (200, 422)  # an unknown field's fate is not said
    assert scorer.call("POST", "/v1/rank", at_limit + b" ")[0] == 413


def test_probes_documents_and_metrics(scorer: Scorer) -> None:
    for path in ("/livez", "/readyz", "/docs", "/openapi.json"):
        assert scorer.call("GET", path)[0] == 200, path
    assert scorer.call("GET", "/nothing")[0] == 404
    assert scorer.call("GET", "/v1/rank")[0] == 405
    status, text = scorer.call("GET", "/metrics")
    assert status == 200
    for name in (
        "gradient_to_serving_seconds_bucket",
        "label_to_serving_seconds_bucket",
        "event_to_serving_seconds_bucket",
        "score_model_age_seconds_bucket",
        "sequence_age_seconds",
        "model_horizon_timestamp_seconds",
        "weights_version",
        "scores_total",
        "score_duration_seconds_bucket",
        "candidates_total",
        "weights_rejected_total",
        "build_info",
        "ready",
    ):
        assert f"\nstreamgr_{name}" in text, name


def test_freshness_buckets_hold_the_objectives(scorer: Scorer) -> None:
    lines = scorer.call("GET", "/metrics")[1].splitlines()
    edges = {0.25, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 1800, 3600, float("inf")}
    for name in ("event_to_serving_seconds", "score_model_age_seconds"):
        found = [line for line in lines if line.startswith(f"streamgr_{name}_bucket")]
        assert {float(line.split('le="')[1].split('"')[0]) for line in found} >= edges


def test_each_learned_target_is_observed_once(scorer: Scorer) -> None:
    """event_to_serving counts the targets that the version in use has learned."""

    def observed() -> float:
        lines = scorer.call("GET", "/metrics")[1].splitlines()
        return sum(float(v.split()[-1]) for v in lines if v.startswith("streamgr_event_to_serving_seconds_count"))

    learned = {t["event_id"] for e in scorer.system.examples() for t in e["targets"]}
    wait_for("every target observed", lambda: observed() == len(learned), 10)
