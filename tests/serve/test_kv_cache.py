"""A scorer that keeps histories answers as one that keeps nothing; and what is kept has a bound."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from prometheus_client import REGISTRY

from streamgr.config import Config, Sequence
from streamgr.events import FIRST_ACTION, IMPRESSION, History
from streamgr.model.cache import Cache
from streamgr.model.hstu import Seen
from streamgr.model.tokens import Layout, tokenize
from streamgr.serve.kv_cache import OBJECTS_BYTES, Entry, KvCache
from streamgr.serve.wire import Answer, RankRequest, RetrieveRequest
from tests.serve.kit import ACTIONS, NOW, FakeSequences, Service, Weights, settings, some_events

ITEMS = [f"i{n}" for n in range(40)]
LENGTH, SLACK = 12, 0.5


def configured(cache_bytes: int = 1 << 20, *, length: int = LENGTH, **model: Any) -> Config:
    config = settings(cache_bytes=cache_bytes, cache_slack=SLACK)
    made = Config(
        model=type(config.model)(dim=16, layers=2, heads=2, **model),
        table=config.table,
        sequence=Sequence(actions=ACTIONS, history_length=length),
        scorer=config.scorer,
        telemetry=config.telemetry,
    )
    return made


class Twins:
    """The scorer with its caches; and for each length of a history one that keeps nothing, over the same events."""

    def __init__(self, **model: Any) -> None:
        self.sequences = FakeSequences()
        self.weights = Weights(configured(**model))
        self.model = model
        self.weights.learn(ITEMS)
        self.cached = Service(configured(**model), self.sequences)
        self.plain: dict[int, Service] = {}
        self.version = self.weights.publish()
        assert self.cached.live.install(self.version)

    def swap(self) -> None:
        self.weights.change(np.arange(1, 30))
        self.version = self.weights.publish()
        assert self.cached.live.install(self.version)
        self.plain.clear()

    def without_cache(self, length: int) -> Service:
        if length not in self.plain:
            service = Service(configured(0, length=max(1, length), **self.model), self.sequences)
            assert service.live.install(self.version)
            self.plain[length] = service
        return self.plain[length]

    def rank(self, user: str, at: int) -> Answer:
        ask = RankRequest(user, ITEMS[:15], at=at)
        found = self.cached.ranker.rank(ask)
        expected = self.without_cache(found.sequence_length).ranker.rank(ask)
        self.compare(found, expected)
        known = sum(row[2] < at for row in self.sequences.users.get(user, []))
        assert min(known, LENGTH) <= found.sequence_length <= min(known, int(LENGTH * (1 + SLACK)))
        return found

    def retrieve(self, user: str, at: int) -> Answer:
        ask = RetrieveRequest(user, 10, at=at)
        found = self.cached.ranker.retrieve(ask)
        self.compare(found, self.without_cache(found.sequence_length).ranker.retrieve(ask))
        return found

    @staticmethod
    def compare(found: Answer, expected: Answer) -> None:
        assert (found.weights_version, found.sequence_length) == (expected.weights_version, expected.sequence_length)
        scores = {item.item_id: item.score for item in expected.items}
        assert {item.item_id for item in found.items} == scores.keys()
        for item in found.items:
            assert item.score == pytest.approx(scores[item.item_id], abs=2e-5)


def count(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(f"streamgr_{name}", labels) or 0.0


def outcomes() -> dict[str, float]:
    return {outcome: count("cache_requests_total", outcome=outcome) for outcome in ("hit", "extended", "miss")}


def since(before: dict[str, float]) -> tuple[float, float, float]:
    now = outcomes()
    return now["hit"] - before["hit"], now["extended"] - before["extended"], now["miss"] - before["miss"]


class Interleavings(RuleBasedStateMachine):
    """Requests at any time, new events, late ones, erasures and swaps, in any order."""

    users = st.sampled_from(["u", "v", "w"])

    @initialize(
        preset=st.sampled_from(["paper", "dlrm_v3"]),
        local=st.sampled_from([0, 5]),
        user=st.booleans(),
        tokens=st.sampled_from(["interleaved", "summed"]),
    )
    def begin(self, preset: str, local: int, user: bool, tokens: str) -> None:
        torch.set_num_threads(1)
        self.twins = Twins(preset=preset, local_window=local, user_token=user, tokens=tokens)
        self.now, self.asked = NOW, 0

    @rule(user=users, kinds=st.lists(st.integers(IMPRESSION, FIRST_ACTION + 1), min_size=1, max_size=7),
          item=st.integers(0, 39), request=st.integers(0, 3), gap=st.integers(0, 400))  # fmt: skip
    def happens(self, user: str, kinds: list[int], item: int, request: int, gap: int) -> None:
        rows = self.twins.sequences.users.setdefault(user, [])
        for i, kind in enumerate(kinds):
            self.now += gap
            rows.append((kind, ITEMS[(item + i) % 40], self.now, f"r{request}" if request else ""))
        self.now += 1

    @rule(user=users, place=st.floats(0, 1), item=st.integers(0, 39), kind=st.integers(IMPRESSION, FIRST_ACTION + 1))
    def comes_late(self, user: str, place: float, item: int, kind: int) -> None:
        if rows := self.twins.sequences.users.get(user):
            before = rows[int(place * (len(rows) - 1))]
            rows.append((kind, ITEMS[item], before[2], ""))
            rows.sort(key=lambda row: row[2])

    @rule(user=users)
    def is_erased(self, user: str) -> None:
        self.twins.sequences.users.pop(user, None)

    @rule()
    def is_swapped(self) -> None:
        self.twins.swap()

    @rule(user=users, later=st.integers(0, 10**7))
    def is_ranked_for(self, user: str, later: int) -> None:
        self.twins.rank(user, self.now + later)

    @rule(user=users, earlier=st.integers(0, 2_000))
    def is_ranked_for_in_the_past(self, user: str, earlier: int) -> None:
        self.twins.rank(user, self.now - earlier)

    @rule(user=users)
    def retrieves(self, user: str) -> None:
        self.twins.retrieve(user, self.now)

    @invariant()
    def the_gauge_is_right(self) -> None:
        if hasattr(self, "twins"):
            with self.twins.cached.live.lease() as served:
                entries = served.caches._entries.values()
                assert served.caches._bytes == sum(entry.nbytes for entry in entries) <= 1 << 20


Interleavings.TestCase.settings = hypothesis_settings(max_examples=15, stateful_step_count=25, deadline=None)
test_a_scorer_with_caches_answers_as_one_without = Interleavings.TestCase


def test_a_user_who_comes_again_is_known_until_the_weights_change() -> None:
    twins = Twins()
    twins.sequences.users["u"] = some_events(8)
    before = outcomes()
    twins.rank("u", NOW)
    assert since(before) == (0, 0, 1)
    twins.rank("u", NOW + 5_000)
    twins.retrieve("u", NOW + 6_000)
    assert since(before) == (2, 0, 1)
    twins.sequences.users["u"] += [(IMPRESSION, "i3", NOW + 6_500, "new"), (FIRST_ACTION, "i3", NOW + 7_000, "new")]
    twins.rank("u", NOW + 8_000)
    assert since(before) == (2, 1, 1)
    twins.swap()
    twins.rank("u", NOW + 8_000)
    assert since(before) == (2, 1, 2)


def test_the_window_grows_by_the_slack_and_is_then_cut_back() -> None:
    twins, lengths, before = Twins(), [], outcomes()
    rows = some_events(30)
    for n in range(10, 31):
        twins.sequences.users["u"] = rows[:n]
        lengths.append(twins.rank("u", rows[n - 1][2] + 1).sequence_length)
    assert lengths == [10, 11, *range(12, 19), *range(12, 19), *range(12, 17)]
    assert since(before) == (0, 18, 3)


def test_an_erased_user_is_not_kept() -> None:
    twins = Twins(user_token=True)
    twins.sequences.users["u"] = some_events(10)
    twins.rank("u", NOW)
    with twins.cached.live.lease() as served:
        assert served.caches.get("u") is not None
        del twins.sequences.users["u"]
        assert twins.rank("u", NOW).cold
        assert served.caches.get("u") is None


def test_what_is_kept_is_gone_with_the_version() -> None:
    twins, before = Twins(), count("cache_bytes")
    twins.sequences.users |= {user: some_events(10) for user in "uvw"}
    for user in "uvw":
        twins.rank(user, NOW)
    with twins.cached.live.lease() as old:
        assert count("cache_bytes") - before == old.caches._bytes > 3 * OBJECTS_BYTES
    twins.swap()
    assert count("cache_bytes") == before
    window, cache = entry(5)
    old.caches.keep("u", window, cache, "miss")  # a request that was still at work on it
    assert old.caches.get("u") is None and count("cache_bytes") == before


def entry(n: int, rows: int = 8) -> tuple[History, Cache]:
    """A history of n events and a cache of so many rows a layer."""
    window = FakeSequences({"u": some_events(n)}).history("u", NOW, n)
    tokens = tokenize([window], Layout(2), at=[NOW])
    return window, Cache(tokens, NOW, (Seen(torch.zeros(rows, 2, 8), torch.zeros(rows, 2, 8)),), torch.zeros(0, 16))


def test_the_least_recently_used_makes_room() -> None:
    window, cache = entry(8)
    size = Entry(window, cache).nbytes
    caches, evictions, held = KvCache(3 * size), count("cache_evictions_total"), count("cache_bytes")
    for user in "abc":
        caches.keep(user, window, cache, "miss")
    assert caches.get("a") is not None  # which makes it the newest
    caches.keep("d", window, cache, "miss")
    assert [user for user in "abcd" if caches.get(user)] == ["a", "c", "d"]
    caches.keep("c", window, cache, "hit")
    assert count("cache_evictions_total") - evictions == 1
    assert count("cache_bytes") - held == 3 * size
    caches.keep("a", *entry(8, rows=10_000), "extended")  # larger than everything: not kept, nor is what it replaces
    assert [user for user in "abcd" if caches.get(user)] == ["c", "d"]
    caches.close()


def test_without_room_nothing_is_kept_or_counted() -> None:
    twins = Twins()
    service = twins.without_cache(LENGTH)
    twins.sequences.users["u"] = some_events(40)
    before = outcomes()
    for _ in range(2):
        assert service.ranker.rank(RankRequest("u", ITEMS, at=NOW)).sequence_length == LENGTH
    assert since(before) == (0, 0, 0)


def test_a_window_goes_on_where_it_began_or_is_of_no_use() -> None:
    window, cache = entry(20)
    kept = Entry(window.take(slice(4, 5)), cache)
    assert kept.goes_on(window, 12, 18) == 16
    assert kept.goes_on(window, 17, 18) is None, "fewer than there should be, when there are more"
    assert kept.goes_on(window, 12, 15) is None, "it has outgrown the slack"
    assert kept.goes_on(window.take(slice(5, None)), 12, 18) is None, "its first event is no longer there"
    assert kept.goes_on(window.take(slice(0)), 12, 18) is None
    profile = replace(window, kinds=np.where(np.arange(20) == 10, 0, window.kinds).astype(np.uint8))
    assert kept.goes_on(profile, 12, 15) == 15, "what is known of the user's profile takes no room"


def test_many_threads_beside_swaps() -> None:
    """The same users asked by several threads while versions change: every answer is that of its version."""
    twins = Twins()
    twins.sequences.users |= {f"u{n}": some_events(10) for n in range(4)}
    expected: dict[int, dict[str, list[float]]] = {}

    def scores(answer: Answer) -> list[float]:
        return [item.score for item in sorted(answer.items, key=lambda item: item.item_id)]

    def ask(n: int) -> tuple[int, str, list[float]]:
        user = f"u{n % 4}"
        answer = twins.cached.ranker.rank(RankRequest(user, ITEMS, at=NOW + n % 3))
        return answer.weights_version, f"{user}@{n % 3}", scores(answer)

    with ThreadPoolExecutor(4) as pool:
        asked = []
        for _ in range(3):
            plain = twins.without_cache(10).ranker
            expected[twins.version.manifest.version] = {
                f"u{n}@{at}": scores(plain.rank(RankRequest(f"u{n}", ITEMS, at=NOW + at)))
                for n in range(4)
                for at in range(3)
            }
            asked += [pool.submit(ask, n) for n in range(60)]
            twins.swap()
        for future in asked:
            version, question, found = future.result()
            if version in expected:
                np.testing.assert_allclose(found, expected[version][question], atol=2e-5)
    assert len({future.result()[0] for future in asked}) > 1
