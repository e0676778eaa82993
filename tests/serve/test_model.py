"""Every answer comes from exactly one version, and what does not fit is refused before a byte is written."""

import threading

import msgspec
import numpy as np
import pytest
import torch
from prometheus_client import REGISTRY

from streamgr.config import Scorer
from streamgr.serve.copies import Copy
from streamgr.serve.model import LiveWeights, NoWeights
from streamgr.serve.ranker import Ranker
from streamgr.serve.wire import RankRequest
from streamgr.weights.manifest import Probe
from streamgr.weights.subscriber import Rollback, Version
from tests.serve.kit import ACTIONS, NOW, FakeSequences, Weights, learned, log_and_clock, settings, some_events

ITEMS = [f"i{n}" for n in range(60)]


@pytest.fixture
def live() -> LiveWeights:
    log, clock = log_and_clock()
    return LiveWeights(ACTIONS, clock, log)


def sample(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(f"streamgr_{name}", labels) or 0.0


def contents(live: LiveWeights) -> dict[str, torch.Tensor]:
    """Everything that answers are made of."""
    with live.lease() as served:
        return of_copy(served.copy, served.rows, served.manifest.watermark_ms)


def of_copy(copy: Copy, rows: torch.Tensor, watermark: int) -> dict[str, torch.Tensor]:
    dense = {name: tensor.clone() for name, tensor in copy.recommender.state_dict().items()}
    table = copy.table.rows(copy.table.snapshot_rows(watermark))
    return dense | table | {"norms": copy.inverse_norms[rows].clone(), "live": rows}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_before_the_first_version_nothing_can_be_leased(live: LiveWeights) -> None:
    with pytest.raises(NoWeights), live.lease():
        pass


def test_any_chain_of_deltas_serves_what_its_last_snapshot_would(live: LiveWeights) -> None:
    weights = Weights(settings())
    weights.learn(ITEMS[:20])
    assert live.install(weights.publish())
    for n in range(7):
        rows = weights.learn(ITEMS[n * 5 : n * 5 + 20])
        assert live.install(weights.publish(rows))
        log, clock = log_and_clock()
        whole = LiveWeights(ACTIONS, clock, log)
        twin = msgspec.structs.replace(weights.publish().manifest, version=live.version or 0)
        weights.version -= 1
        weights_payload = weights.publish().payload
        weights.version -= 1
        assert whole.install(Version(twin, weights_payload, ()))
        assert same(contents(live), contents(whole)), f"after delta {n}"


def test_inverse_norms_follow_the_rows(live: LiveWeights) -> None:
    weights = Weights(settings())
    weights.learn(ITEMS[:20])
    live.install(weights.publish())
    live.install(weights.publish(weights.learn(ITEMS[10:30])))
    with live.lease() as served:
        norms = served.copy.table.weight[served.rows].norm(dim=1)
        torch.testing.assert_close(served.copy.inverse_norms[served.rows], 1 / norms)
        assert len(served.rows) == 30


def test_a_lease_holds_its_version_while_the_next_is_installed(live: LiveWeights) -> None:
    weights = Weights(settings())
    weights.learn(ITEMS)
    live.install(weights.publish())
    installed = threading.Event()

    def install() -> None:
        for _ in range(2):
            live.install(weights.publish(weights.learn(ITEMS)))
        installed.set()

    with live.lease() as held:
        before = held.copy.table.weight.clone()
        thread = threading.Thread(target=install)
        thread.start()
        while live.version == 1:
            pass
        with live.lease() as newer:  # the swap did not wait for us ...
            assert newer.manifest.version == 2
            assert newer.copy is not held.copy
        assert not installed.wait(0.2)  # ... but our copy is not written while we read it
        assert torch.equal(held.copy.table.weight, before)
    assert installed.wait(10)
    thread.join()
    assert live.version == 3


def test_answers_are_of_one_version_while_versions_fly_past(live: LiveWeights) -> None:
    """Each answer, recomputed on a quiet copy of the version that it names, is the same to the bit."""
    config = settings()
    weights = Weights(config)
    weights.learn(ITEMS)
    log, clock = log_and_clock()
    sequences = FakeSequences({"u": some_events(30)})
    ask = RankRequest("u", list(ITEMS))
    versions = [weights.publish()]
    versions += [weights.publish(weights.learn(ITEMS)) for _ in range(30)]
    quiet = LiveWeights(ACTIONS, clock, log)
    expected = {}
    for version in versions:
        quiet.install(version)
        expected[version.manifest.version] = Ranker(config, clock, quiet, sequences).rank(ask).items
    live.install(versions[0])
    ranker, done, seen, wrong = Ranker(config, clock, live, sequences), threading.Event(), set(), []

    def ask_on() -> None:
        while not done.is_set():
            answer = ranker.rank(ask)
            seen.add(answer.weights_version)
            if answer.items != expected[answer.weights_version]:
                wrong.append(answer.weights_version)

    threads = [threading.Thread(target=ask_on) for _ in range(2)]
    for thread in threads:
        thread.start()
    for n, version in enumerate(versions[1:], 1):
        assert live.install(version)
        if n % 5 == 0:  # three steps back, and again what was undone
            assert live.install(Rollback(versions[n - 3].manifest))
            assert all(live.install(again) for again in versions[n - 2 : n + 1])
    done.set()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(seen) > 3


def refused(live: LiveWeights, version: Version | Rollback, reason: str) -> None:
    served, count = live.version, sample("weights_rejected_total", reason=reason)
    before = contents(live) if served else None
    assert not live.install(version)
    assert sample("weights_rejected_total", reason=reason) == count + 1
    assert live.version == served
    assert before is None or same(contents(live), before)


def test_a_state_that_is_not_the_trainers_is_refused_and_leaves_no_trace(live: LiveWeights) -> None:
    weights = Weights(settings())
    rows = weights.learn(ITEMS[:20])
    live.install(weights.publish())
    good = weights.publish(weights.learn(ITEMS[5:40]))
    lost = {n: t[1:] if n.startswith("table/") else t for n, t in good.payload.items()}
    refused(live, Version(good.manifest, lost, ()), "digest")
    other = {**good.payload, "table/until_ms": good.payload["table/until_ms"] + 1}
    refused(live, Version(good.manifest, other, ()), "digest")
    louder = {n: t + 1.0 if n.startswith("dense/") else t for n, t in good.payload.items()}
    refused(live, Version(good.manifest, louder, ()), "probe")
    for unproven, reason in (({"state_digest": ""}, "digest"), ({"probe": Probe()}, "probe")):
        refused(live, Version(msgspec.structs.replace(good.manifest, **unproven), good.payload, ()), reason)
    assert live._spare is not None
    with live.lease() as served:
        spare = of_copy(live._spare, served.rows, NOW - 500)
        assert same(spare, contents(live)), "the spare copy keeps what was refused"
    assert live.install(good)
    assert live.install(weights.publish(rows))


def test_a_snapshot_must_prove_itself_too(live: LiveWeights) -> None:
    weights = Weights(settings())
    weights.learn(ITEMS)
    whole = weights.publish()
    fewer = {n: t[:-1] if n.startswith("table/") else t for n, t in whole.payload.items()}
    refused(live, Version(whole.manifest, fewer, ()), "digest")
    unshared = {n: t[1:] if n.startswith("table/") else t for n, t in whole.payload.items()}
    refused(live, Version(whole.manifest, unshared, ()), "schema")
    assert live.install(whole)


@pytest.mark.parametrize("back", [1, 2, 5])
def test_going_back_and_on_again_changes_nothing(live: LiveWeights, back: int) -> None:
    """P15, over a snapshot in the middle."""
    weights = Weights(settings())
    weights.learn(ITEMS[:20])
    versions, states = [weights.publish()], []
    for n in range(6):
        rows = weights.learn(ITEMS[n * 5 : n * 5 + 20])
        versions.append(weights.publish(None if n == 3 else rows))
    for version in versions:
        assert live.install(version)
        states.append(contents(live))
    for _ in range(2):
        aim = versions[-1 - back]
        assert live.can_go_back(aim.manifest)
        assert live.install(Rollback(aim.manifest)) and live.version == aim.manifest.version
        assert same(contents(live), states[-1 - back])
        for version, state in zip(versions[-back:], states[-back:], strict=True):
            assert live.install(version)
            assert same(contents(live), state)


def test_the_ring_is_bounded_by_count_and_by_bytes() -> None:
    log, clock = log_and_clock()
    weights = Weights(settings())
    weights.learn(ITEMS)
    versions = [weights.publish(), *(weights.publish(weights.learn(ITEMS)) for _ in range(6))]
    plenty, three, few = (
        LiveWeights(ACTIONS, clock, log, Scorer(undo_versions=n, undo_bytes=b))
        for n, b in ((32, 1 << 28), (3, 1 << 28), (32, 100_000))
    )
    for version in versions:
        for live in (plenty, three, few):
            assert live.install(version)
    a_step = plenty._ring.bytes // 6
    reach = [sum(live.can_go_back(v.manifest) for v in versions) for live in (plenty, three, few)]
    assert reach == [6, 3, 100_000 // a_step] and 0 < reach[2] < 6
    refused(few, Rollback(versions[0].manifest), "gap")


def test_an_undo_that_does_not_prove_itself_is_not_served(live: LiveWeights) -> None:
    weights = Weights(settings())
    weights.learn(ITEMS)
    versions = [weights.publish(), *(weights.publish(weights.learn(ITEMS)) for _ in range(2))]
    for version in versions:
        live.install(version)
    with torch.inference_mode():
        live._ring._steps[-1][1].rows["weight"][3] += 1.0  # a broken memory
    refused(live, Rollback(versions[1].manifest), "digest")
    assert not live.can_go_back(versions[0].manifest), "nothing that rests on it is trusted any more"
    refused(live, weights.publish(weights.learn(ITEMS)), "gap")
    assert live.install(weights.publish())


def test_a_table_that_has_grown_comes_with_a_snapshot(live: LiveWeights) -> None:
    weights = Weights(settings())
    weights.learn(ITEMS)
    assert live.install(weights.publish())
    weights.table.grow()
    rows = weights.learn(ITEMS[:20])
    weights.version += 1
    weights.digest.clear(len(weights.table.weight))
    outgrown = weights.publish(rows)
    refused(live, outgrown, "gap")
    assert live.install(weights.publish())
    assert live.install(weights.publish(weights.learn([f"more {n}" for n in range(500)])))
    with live.lease() as served:
        assert len(served.copy.table.index) == 2048 and len(served.rows) > 500
    assert not live.can_go_back(outgrown.manifest)


def test_a_delta_without_its_parent_is_refused_until_the_next_snapshot(live: LiveWeights) -> None:
    weights = Weights(settings())
    refused(live, weights.publish(weights.learn(ITEMS)), "gap")
    assert live.install(weights.publish())
    weights.publish(weights.learn(ITEMS))  # lost
    refused(live, weights.publish(weights.learn(ITEMS)), "gap")
    assert live.install(weights.publish())
    assert live.install(weights.publish(weights.learn(ITEMS)))


def test_versions_never_go_back(live: LiveWeights) -> None:
    weights = Weights(settings())
    weights.learn(ITEMS)
    old, new = weights.publish(), weights.publish()
    assert live.install(new)
    refused(live, new, "gap")
    refused(live, old, "gap")
    refused(live, Version(msgspec.structs.replace(new.manifest, epoch=0, version=7), new.payload, ()), "epoch")


def test_what_belongs_to_another_model_is_refused_by_name(live: LiveWeights) -> None:
    weights = Weights(settings())
    rows = weights.learn(ITEMS)
    good = weights.publish()
    other = msgspec.structs.replace(good.manifest, model={**good.manifest.model, "actions": ["click"]})
    refused(live, Version(other, good.payload, ()), "schema")
    unreadable = msgspec.structs.replace(good.manifest, model={"model": {"dim": 16, "depth": 3}})
    refused(live, Version(unreadable, good.payload, ()), "schema")
    assert live.install(good)

    name = next(n for n in good.payload if n.startswith("dense/"))
    longer = {**good.payload, name: torch.cat([good.payload[name], good.payload[name]])}
    refused(live, Version(msgspec.structs.replace(good.manifest, version=9), longer, ()), "shape")
    fewer = {n: t for n, t in good.payload.items() if n != name}
    refused(live, Version(msgspec.structs.replace(good.manifest, version=9), fewer, ()), "shape")
    delta = weights.publish(rows)
    outside = {**delta.payload, "table/rows": delta.payload["table/rows"] + 100_000}
    refused(live, Version(delta.manifest, outside, ()), "shape")


def test_a_snapshot_may_bring_another_architecture(live: LiveWeights) -> None:
    config = settings()
    weights = Weights(config)
    weights.learn(ITEMS)
    live.install(weights.publish())
    wider = Weights(msgspec.structs.replace(config, model=msgspec.structs.replace(config.model, dim=32)))
    wider.learn(ITEMS)
    wider.version = 1
    assert live.install(wider.publish())
    assert live.install(wider.publish(wider.learn(ITEMS)))
    with live.lease() as served:
        assert served.vectors(np.zeros(1, np.uint64))[0].shape == (1, 32)


def test_the_swap_observes_every_learned_target_once(live: LiveWeights) -> None:
    weights = Weights(settings())
    weights.learn(ITEMS)
    first = weights.publish()
    live.install(Version(first.manifest, first.payload, ()))  # what was learned before we began did not wait for us
    names = ("event_to_serving_seconds", "label_to_serving_seconds", "gradient_to_serving_seconds")
    before = [(sample(f"{n}_sum"), sample(f"{n}_count")) for n in names]
    targets = learned((NOW - 9000, NOW - 4000, NOW - 1000), (NOW - 8000, NOW - 4000, NOW - 1000))
    skipped = weights.publish(weights.learn(ITEMS), learned=targets).manifest
    version = weights.publish(learned=learned((NOW - 7000, NOW - 3000, NOW + 500)))
    live.install(Version(version.manifest, version.payload, (skipped, version.manifest)))
    after = [(sample(f"{n}_sum"), sample(f"{n}_count")) for n in names]
    changes = [(a[0] - b[0], a[1] - b[1]) for a, b in zip(after, before, strict=True)]
    assert changes == [pytest.approx((24.0, 3)), pytest.approx((11.0, 3)), pytest.approx((2.0, 3))]
    assert sample("model_horizon_timestamp_seconds", role="scorer") == (NOW - 5000) / 1000
