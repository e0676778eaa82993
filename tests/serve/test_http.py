"""The contract over HTTP, against the app itself."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest
from prometheus_client import REGISTRY

from streamgr.serve import http
from streamgr.serve.http import Desk
from tests.serve.kit import NOW, FakeSequences, Service, Weights, settings, some_events


class Client:
    """Speaks to an app in one event loop."""

    def __init__(self, app: Any) -> None:
        self._transport = httpx.ASGITransport(app=app)

    async def asked(self, method: str, path: str, **how: Any) -> httpx.Response:
        async with httpx.AsyncClient(transport=self._transport, base_url="http://scorer") as client:
            return await client.request(method, path, **how)

    def post(self, path: str, body: Any = None, **how: Any) -> httpx.Response:
        how = how or {"content": body if isinstance(body, bytes) else json.dumps(body).encode()}
        return asyncio.run(self.asked("POST", path, **how))

    def get(self, path: str) -> httpx.Response:
        return asyncio.run(self.asked("GET", path))


@pytest.fixture
def service() -> Iterator[Service]:
    config = settings()
    service = Service(config, FakeSequences({"u": some_events(20), "5": some_events(8)}))
    weights = Weights(config)
    weights.learn([f"i{n}" for n in range(40)])
    service.live.install(weights.publish())
    yield service
    service.pool.shutdown()


@pytest.fixture
def client(service: Service) -> Client:
    return Client(service.app())


def outcome(name: str) -> float:
    return REGISTRY.get_sample_value("streamgr_scores_total", {"outcome": name}) or 0.0


def test_a_ranking_has_the_contracts_shape_best_first(client: Client) -> None:
    answer = client.post("/v1/rank", {"user_id": "u", "candidates": ["i1", "i2", "i3", "never seen"]})
    assert answer.status_code == 200
    body = answer.json()
    assert body.keys() == {"items", "weights_version", "model_age_seconds", "sequence_length", "cold"}
    assert (body["weights_version"], body["model_age_seconds"], body["sequence_length"]) == (1, 5.0, 20)
    assert body["cold"] is False
    scores = [item["score"] for item in body["items"]]
    assert scores == sorted(scores, reverse=True) and len(set(scores)) == 4
    for item in body["items"]:
        assert item["score"] == pytest.approx(sum(item["probabilities"].values()))
        assert item["probabilities"].keys() == {"click", "like"}


def test_integers_are_their_decimal_text_and_duplicates_are_answered_once(client: Client) -> None:
    body = client.post("/v1/rank", {"user_id": 5, "candidates": [7, "7", "i1", "i1", -3]}).json()
    assert sorted(item["item_id"] for item in body["items"]) == ["-3", "7", "i1"]
    assert body["sequence_length"] == 8


def test_tasks_and_k_narrow_the_answer(client: Client) -> None:
    everything = client.post("/v1/rank", {"user_id": "u", "candidates": ["i1", "i2", "i3"]}).json()
    body = client.post(
        "/v1/rank", {"user_id": "u", "candidates": ["i1", "i2", "i3"], "tasks": ["like", "like"], "k": 2}
    ).json()
    likes = sorted((item["probabilities"]["like"] for item in everything["items"]), reverse=True)
    assert [item["probabilities"] for item in body["items"]] == [{"like": p} for p in likes[:2]]
    assert [item["score"] for item in body["items"]] == likes[:2]


def test_unknown_users_are_answered_cold(client: Client) -> None:
    for path, extra in (("/v1/rank", {"candidates": ["i1"]}), ("/v1/retrieve", {})):
        body = client.post(path, {"user_id": "nobody", **extra}).json()
        assert body["cold"] is True and body["sequence_length"] == 0 and body["items"]


def test_at_hides_what_comes_later(client: Client) -> None:
    rows = some_events(20)
    for at in (rows[10][2], "2001-09-09T01:46:40+00:00", "1970-01-01T00:00:00Z"):
        body = client.post("/v1/rank", {"user_id": "u", "candidates": ["i1"], "at": at}).json()
        expected = sum(1 for r in rows if isinstance(at, int) and r[2] < at)
        assert (body["sequence_length"], body["cold"]) == (expected, expected == 0)


def test_retrieval_has_no_probabilities_and_leaves_out_what_was_seen(client: Client) -> None:
    seen = {row[1] for row in some_events(20)}
    body = client.post("/v1/retrieve", {"user_id": "u", "k": 1000}).json()
    assert {item["item_id"] for item in body["items"]} == {f"i{n}" for n in range(40)} - seen
    assert all(item.keys() == {"item_id", "score"} for item in body["items"])
    assert len(client.post("/v1/retrieve", {"user_id": "u"}).json()["items"]) == 10
    assert len(client.post("/v1/retrieve", {"user_id": "u", "k": 1000, "exclude_seen": False}).json()["items"]) == 40


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"candidates": ["a"]}, "user_id"),
        ({"user_id": "u"}, "candidates"),
        ({"user_id": True, "candidates": ["a"]}, "user_id"),
        ({"user_id": 1.5, "candidates": ["a"]}, "user_id"),
        ({"user_id": 1 << 63, "candidates": ["a"]}, "user_id"),
        ({"user_id": "", "candidates": ["a"]}, "user_id"),
        ({"user_id": "x" * 257, "candidates": ["a"]}, "user_id"),
        ({"user_id": "u", "candidates": []}, "candidates"),
        ({"user_id": "u", "candidates": "a"}, "candidates"),
        ({"user_id": "u", "candidates": ["a", None]}, "candidates[1]"),
        ({"user_id": "u", "candidates": ["a", "y" * 257]}, "candidates[1]"),
        ({"user_id": "u", "candidates": ["a"], "k": 0}, "k"),
        ({"user_id": "u", "candidates": ["a"], "k": True}, "k"),
        ({"user_id": "u", "candidates": ["a"], "tasks": []}, "tasks"),
        ({"user_id": "u", "candidates": ["a"], "tasks": ["click", "buy"]}, "tasks[1]"),
        ({"user_id": "u", "candidates": ["a"], "at": -1}, "at"),
        ({"user_id": "u", "candidates": ["a"], "at": 1.5}, "at"),
        ({"user_id": "u", "candidates": ["a"], "at": "yesterday"}, "at"),
        ({"user_id": "u", "candidates": ["a"], "at": "2024-01-01T00:00:00"}, "at"),
    ],
)
def test_a_malformed_field_is_named(client: Client, body: dict[str, Any], field: str) -> None:
    before = outcome("invalid")
    answer = client.post("/v1/rank", body)
    assert answer.status_code == 422
    assert answer.json().items() >= {"error": "invalid", "field": field}.items()
    assert outcome("invalid") == before + 1


@pytest.mark.parametrize(
    "body",
    [b"", b"[", b"[1]", b"nonsense", b'{"user_id": "\xff"}', b'{"user_id": "\\ud800", "candidates": ["a"]}',
     b'{"x":' + b"[" * 200_000 + b"]" * 200_000 + b', "user_id": 1, "candidates": ["a"]}'],
)  # fmt: skip
def test_what_is_no_json_object_is_refused(client: Client, body: bytes) -> None:
    answer = client.post("/v1/rank", body)
    assert answer.status_code == 422 and answer.json()["error"] == "invalid"


def test_limits_of_code_points_and_candidates_hold_exactly(client: Client) -> None:
    fits = {"user_id": "\U0001f600" * 256, "candidates": [f"c{n}" for n in range(4096)]}
    answer = client.post("/v1/rank", fits)
    assert answer.status_code == 200 and len(answer.json()["items"]) == 4096
    over = client.post("/v1/rank", {"user_id": "u", "candidates": list(range(4097))})
    assert over.status_code == 413
    assert over.json()["field"] == "candidates"


def test_a_body_over_one_mebibyte_is_refused_whatever_its_headers_say(client: Client) -> None:
    whole = json.dumps({"user_id": "u", "candidates": ["i1"], "pad": ""}).encode()
    exact = whole[:-2] + b"x" * ((1 << 20) - len(whole)) + whole[-2:]
    assert client.post("/v1/rank", exact).status_code == 200
    assert client.post("/v1/rank", exact + b" ").status_code == 413

    async def in_pieces() -> AsyncIterator[bytes]:
        for _ in range(40):
            yield b" " * (1 << 16)

    chunked = client.post("/v1/rank", content=in_pieces())
    assert "content-length" not in chunked.request.headers
    assert chunked.status_code == 413 and chunked.json()["error"] == "too_large"


def test_a_body_that_does_not_come_is_not_waited_for(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "BODY_SECONDS", 0.05)

    async def never() -> AsyncIterator[bytes]:
        yield b'{"user_id": '
        await asyncio.Event().wait()

    answer = client.post("/v1/rank", content=never())
    assert (answer.status_code, answer.json()) == (408, {"error": "slow_body"})


def test_before_the_first_version_there_are_no_weights(service: Service) -> None:
    client = Client(Service(settings()).app())
    for path, extra in (("/v1/rank", {"candidates": ["a"]}), ("/v1/retrieve", {})):
        answer = client.post(path, {"user_id": "u", **extra})
        assert (answer.status_code, answer.json()) == (503, {"error": "no_weights"})


def test_a_full_line_is_refused_at_once_and_the_work_inside_goes_on(service: Service) -> None:
    hold, inside = threading.Event(), threading.Semaphore(0)

    def slow(ask: Any) -> Any:
        inside.release()
        assert hold.wait(10)
        return service.ranker.rank(ask)

    client = Client(service.app(rank=slow, desk=Desk(service.pool, 1, 2)))
    ask = {"content": b'{"user_id": "u", "candidates": ["i1"]}'}

    async def crowd() -> None:
        waiting = [asyncio.create_task(client.asked("POST", "/v1/rank", **ask)) for _ in range(3)]
        await asyncio.to_thread(inside.acquire)
        while sum(not task.done() for task in waiting) < 3:
            await asyncio.sleep(0)
        refused = await client.asked("POST", "/v1/rank", **ask)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert refused.json() == {"error": "overload"}
        hold.set()
        assert {(await task).status_code for task in waiting} == {200}
        assert (await client.asked("POST", "/v1/rank", **ask)).status_code == 200

    asyncio.run(crowd())


def test_a_bug_shows_no_insides(service: Service, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(_: Any) -> Any:
        raise RuntimeError("the secret inside")

    client = Client(service.app(rank=broken, sequence=broken))
    for answer in (
        client.post("/v1/rank", {"user_id": "u", "candidates": ["a"]}),
        client.get("/v1/users/u/sequence"),
    ):
        assert (answer.status_code, answer.json()) == (500, {"error": "internal_error"})
    assert capsys.readouterr().err.count("the secret inside") >= 2


def test_old_weights_still_answer_and_say_so(service: Service, client: Client) -> None:
    ask = {"user_id": "u", "candidates": ["i1"]}
    assert "x-streamgr-stale" not in client.post("/v1/rank", ask).headers
    service.clock.advance(120)
    stale = client.post("/v1/rank", ask)
    assert stale.status_code == 200 and stale.headers["x-streamgr-stale"] == "125"
    assert stale.json()["model_age_seconds"] == 125.0


def test_sequences_are_read_by_any_user_id(service: Service, client: Client) -> None:
    service.sequences.users["a/b é?"] = [(1, "i1", NOW, "")]
    body = client.get("/v1/users/a%2Fb%20%C3%A9%3F/sequence").json()
    assert body == {"user_id": "a/b é?", "events": [{"item_id": "i1", "event_time": NOW}]}
    assert client.get("/v1/users/nobody/sequence").json() == {"user_id": "nobody", "events": []}
    assert client.get(f"/v1/users/{'x' * 257}/sequence").status_code == 422
    assert client.get("/v1/users/a%2Fb%20%C3%A9%3F/sequence?since=99999999999999&last=3").json()["events"] == []
    for query, field in (("since=x", "since"), ("last=-1", "last"), ("before=1.5", "before")):
        refused = client.get(f"/v1/users/u/sequence?{query}")
        assert (refused.status_code, refused.json()["field"]) == (422, field)


def test_probes_metrics_and_documentation(service: Service, client: Client) -> None:
    assert client.get("/livez").status_code == 200
    assert client.get("/readyz").status_code == 503
    service.health.hold("weights")
    assert client.get("/readyz").json() == {"weights": "ok"}
    client.post("/v1/rank", {"user_id": "u", "candidates": ["i1"]})
    metrics = client.get("/metrics").text
    for name in ("score_model_age_seconds_bucket", "sequence_age_seconds_count", "score_duration_seconds_sum",
                 "candidates_total", "unknown_items_total", 'scores_total{outcome="ok"}',
                 'model_horizon_timestamp_seconds{role="scorer"}', "weights_swap_duration_seconds_count"):  # fmt: skip
        assert f"streamgr_{name}" in metrics, name
    document = client.get("/openapi.json").json()
    schema = document["components"]["schemas"]["RankRequest"]
    assert schema["required"] == ["user_id", "candidates"]
    reference = document["paths"]["/v1/rank"]["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    assert reference == "#/components/schemas/RankRequest"
    page = client.get("/docs").text
    assert "POST /v1/rank" in page and "<script" not in page  # it must work where there is no network
