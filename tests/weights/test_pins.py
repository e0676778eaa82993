"""Pins and going back: scorers follow the operator's word in log order, by the shortest way, and are always exact."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import REGISTRY

from streamgr.clock import SystemClock
from streamgr.config import Scorer
from streamgr.serve.model import LiveWeights
from streamgr.weights.manifest import Manifest
from streamgr.weights.subscriber import Rollback, Subscriber, Version
from tests.serve.kit import ACTIONS, NOW, Weights
from tests.weights.kit import (
    MANIFESTS,
    WEIGHTS,
    MemoryConsumer,
    MemoryLog,
    MemoryProducer,
    config,
    quiet,
    rejected,
    rejected_since,
)
from tests.weights.scribe import Churn, Scribe
from tests.weights.test_fuzz import LIFE_MS, SMALL, Reader, State, dense_sum, offset_of

RING, NO_RING = Scorer(), Scorer(undo_versions=0)


@dataclass
class World:
    """A trainer that publishes on a log, and any number of scorers."""

    log: MemoryLog = field(default_factory=MemoryLog)
    manifests: dict[int, Manifest] = field(default_factory=dict)
    truth: dict[int, State] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.churn = Churn(Weights(SMALL), LIFE_MS, NOW)
        self.scribe = Scribe(config(chunk_bytes=1_500), MemoryProducer(self.log))
        self.scribe.claim()

    def publish(self, *kinds: str) -> Manifest:
        for kind in kinds:
            self.churn.step()
            manifest = self.scribe.write(self.churn.publish(kind))
            self.manifests[manifest.version] = manifest
            self.truth[manifest.version] = self.churn.weights.digest.text, dense_sum(self.churn.weights.model)
        return manifest

    def pin(self, version: int | None) -> None:
        self.scribe.pin(self.manifests[version] if version else None)


class Scoring(Reader):
    """A scorer that notes how it went from version to version."""

    def __init__(self, world: World, settings: Scorer = RING) -> None:
        self.world, self.steps = world, []
        self.subscriber = Subscriber(config(), SystemClock(), quiet(), lambda: MemoryConsumer(world.log))
        self.live = LiveWeights(ACTIONS, SystemClock(), quiet(), settings)
        install = self.live.install

        def noted(step: Version | Rollback) -> bool:
            self.steps.append((type(step).__name__, step.manifest.version))
            return install(step)

        self.live.install = noted  # type: ignore[method-assign]

    def go(self) -> list[tuple[str, int]]:
        """Follow to the end; the steps it took."""
        self.steps: list[tuple[str, int]] = []
        self.drain(self.world.truth)
        return self.steps


def gauge(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(f"streamgr_{name}", labels) or 0.0


@pytest.fixture
def world() -> Iterator[World]:
    """Snapshot 1, deltas 2 to 4, snapshot 5, deltas 6 and 7; and nothing may be refused unless a test says so."""
    before = rejected()
    world = World()
    world.publish("snapshot", "delta", "delta", "delta", "snapshot", "delta", "delta")
    yield world
    assert rejected_since(before) == getattr(world, "refusals", {})


def test_a_pin_undoes_what_came_after_and_holds_until_it_is_removed(world: World) -> None:
    scorer = Scoring(world)
    assert scorer.go() == [("Version", 5), ("Version", 6), ("Version", 7)]
    world.pin(6)
    assert scorer.go() == [("Rollback", 6)]
    assert gauge("weights_pinned_version") == gauge("weights_version", role="scorer") == 6
    world.publish("delta", "snapshot", "delta")  # trainers go on; scorers do not
    assert scorer.go() == [] and scorer.version == 6
    world.pin(None)
    assert scorer.go() == [("Version", 9), ("Version", 10)]
    assert gauge("weights_pinned_version") == 0


def test_the_ring_leads_back_over_a_snapshot_too(world: World) -> None:
    late = World()
    late.publish("snapshot", "delta", "delta")
    scorer = Scoring(late)
    scorer.go()
    for kind in ("snapshot", "delta"):
        late.publish(kind)
        scorer.go()
    late.pin(2)
    assert scorer.go() == [("Rollback", 2)]
    late.pin(4)  # forwards, and not by what was undone
    assert scorer.go() == [("Version", 4)]
    late.pin(None)
    assert scorer.go() == [("Version", 5)]


def test_without_a_ring_the_log_has_it_all_and_nothing_in_between_is_served(world: World) -> None:
    scorer = Scoring(world, NO_RING)
    scorer.go()
    world.pin(4)
    assert scorer.go() == [("Version", 4)], "versions 1 to 3 were served on the way"
    world.pin(1)
    assert scorer.go() == [("Version", 1)]
    world.pin(3)
    assert scorer.go() == [("Version", 2), ("Version", 3)]
    world.pin(None)
    assert scorer.go() == [("Version", 5), ("Version", 6), ("Version", 7)]


def test_a_fresh_scorer_serves_the_pinned_version_and_goes_on_when_it_is_let(world: World) -> None:
    world.pin(3)
    world.publish("delta")
    scorer = Scoring(world)
    assert scorer.go() == [("Version", 3)]
    world.log.compact()
    assert Scoring(world).go() == [("Version", 3)]
    world.pin(None)
    assert scorer.go()[-1] == ("Version", 8)
    assert Scoring(world).go()[-1] == ("Version", 8)


def test_a_pin_follows_a_version_that_has_only_just_come(world: World) -> None:
    scorer = Scoring(world)
    scorer.go()
    world.publish("delta", "delta")
    world.pin(8)
    assert scorer.go() == [("Version", 8)]
    assert scorer.live.version == 8


def test_a_pin_to_what_cannot_be_had_changes_nothing_but_an_alert(world: World) -> None:
    scorer = Scoring(world, NO_RING)
    scorer.go()
    missing = world.manifests[3].chunks[0].offset
    del world.log.records[WEIGHTS][missing]
    world.pin(4)
    assert scorer.go() == [] and scorer.version == 7 and gauge("weights_pin_unmet") == 1
    world.refusals = {"truncated": 1}  # type: ignore[attr-defined]
    world.publish("delta")
    assert scorer.go() == [] and scorer.version == 7, "it is not let go"
    fresh = Scoring(world)
    assert fresh.go() == [] and fresh.live.version is None
    assert fresh.subscriber.why_nothing == "pinned at version 4, which cannot be had"
    world.refusals = {"truncated": 2}  # type: ignore[attr-defined]
    world.pin(2)
    assert scorer.go() == [("Version", 2)] and gauge("weights_pin_unmet") == 0
    world.pin(None)
    assert scorer.go()[-1] == ("Version", 8)


def test_a_pin_to_a_manifest_that_is_gone(world: World) -> None:
    scorer = Scoring(world)
    del world.log.records[MANIFESTS][offset_of(world.log, world.manifests[6])]
    scorer.go()
    world.refusals = {"gap": 1}  # type: ignore[attr-defined]
    assert scorer.version == 5
    world.pin(6)
    assert scorer.go() == [] and gauge("weights_pin_unmet") == 1
    assert scorer.subscriber.why_nothing and scorer.version == 5


def test_a_version_that_was_refused_is_not_served_for_a_pin_either(world: World) -> None:
    scorer = Scoring(world)
    scorer.go()
    world.churn.step()
    version = world.churn.publish("delta")
    wrong = msgspec.structs.replace(version.manifest.probe, logits=[[9.0, 9.0]] * 4)
    world.manifests[8] = world.scribe.write(version, probe=wrong)
    assert scorer.go() == [("Version", 8)] and scorer.version == 7
    world.pin(8)
    assert scorer.go() == [] and gauge("weights_pin_unmet") == 1
    world.pin(None)
    world.publish("delta")
    assert scorer.go() == [] and scorer.version == 7
    world.refusals = {"probe": 1, "gap": 1}  # type: ignore[attr-defined]
    world.publish("snapshot")
    assert scorer.go() == [("Version", 10)]
    (healed,) = [m for m in scorer.subscriber._known.values() if m.version == 10]
    assert scorer.subscriber._covered == healed.order


def test_a_pin_may_name_a_trainer_that_was_fenced_off_since(world: World) -> None:
    scorer = Scoring(world)
    scorer.go()
    old = world.scribe.epoch
    world.scribe.claim(7)
    world.publish("snapshot", "delta")
    scorer.go()
    world.pin(6)
    assert scorer.go() == [("Rollback", 6)]
    fresh = Scoring(world)
    assert fresh.go() == [("Version", 6)] and world.manifests[6].epoch == old < world.manifests[8].epoch
    world.pin(None)
    assert scorer.go()[-1] == fresh.go()[-1] == ("Version", 9)


def test_a_stale_trainer_is_refused_whatever_is_pinned(world: World) -> None:
    """P17."""
    stale = World(world.log)
    stale.churn.weights.version = 7
    world.scribe.claim(7)
    world.publish("snapshot")
    scorer = Scoring(world)
    scorer.go()
    stale.publish("snapshot")
    assert scorer.go() == [] and scorer.version == 8
    world.pin(6)
    scorer.go()
    stale.publish("delta")
    world.pin(None)
    assert scorer.go() == [("Version", 8)]
    world.refusals = {"epoch": 2}  # type: ignore[attr-defined]


acts = st.lists(
    st.sampled_from(["delta", "delta", "delta", "snapshot", "fresh"]) | st.integers(0, 8), min_size=4, max_size=14
)


@settings(max_examples=40, deadline=None)
@given(acts, st.sampled_from([0, 2, 32]))
def test_any_story_of_versions_and_pins_ends_where_it_should(story: list[str | int], ring: int) -> None:
    """P12, P15: after every act each scorer serves exactly the trainer's state of the version that it should serve.

    An integer pins the version so far back from the newest; 8 removes the pin.
    """
    world, pinned, before = World(), None, rejected()
    newest = world.publish("snapshot").version
    scorers = [Scoring(world, Scorer(undo_versions=ring))]
    for act in story:
        if act == "fresh":
            scorers.append(Scoring(world, Scorer(undo_versions=ring)))
        elif isinstance(act, str):
            newest = world.publish(act).version
        elif act == 8:
            world.pin(pinned := None)
        else:
            world.pin(pinned := max(1, newest - act))
        for scorer in scorers:
            scorer.go()  # which holds every state on the way against the trainer's
            assert scorer.version == (pinned or newest)
    assert rejected_since(before) == {}
