"""Decision 1: what the trainer predicted of a target, before learning it, is what `/v1/rank` answers at its time.

One log through the real partition; its examples through the real learner, published step by step; each target asked
again over the same weights, with `at` = its request time. Retrieval likewise: the rank of the true item.
"""

from pathlib import Path

import numpy as np
import pytest

from streamgr.config import Config, Model, Scorer, State, Table
from streamgr.config import Sequence as SequenceSettings
from streamgr.events import IMPRESSION, History, Record
from streamgr.model.tokens import request_times
from streamgr.sequence.examples import Example, decode
from streamgr.sequence.partition import Partition
from streamgr.serve.model import LiveWeights
from streamgr.serve.ranker import Ranker
from streamgr.serve.wire import RankRequest, RetrieveRequest
from streamgr.state.rocks import Memory
from streamgr.state.store import Meta, Store
from streamgr.train.batch import assemble
from streamgr.train.learner import Learner
from tests.serve.kit import ACTIONS, Weights, log_and_clock
from tests.streams import START, columns, events, row


class OnePartition:
    """What the follower does for its readers, over one partition."""

    def __init__(self, partition: Partition) -> None:
        self._partition = partition

    def history(self, user: str, at_ms: int, limit: int) -> History:
        found = self._partition.history(user, at_ms, limit)
        assert found is not None
        return found

    def item_text(self, key: int) -> str | None:
        return self._partition.item_text(key)

    def newest_event_ms(self) -> int:
        return self._partition.newest_event_ms or 0

    def age_seconds(self) -> float:
        return 0.0


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return Config(
        state=State(directory=str(tmp_path), cache_bytes=1 << 20, write_buffer_bytes=1 << 20),
        model=Model(dim=16, layers=2, heads=2, negatives=16),
        table=Table(slots=64, bucket_width=8, fallback_rows=8, ttl_seconds=8.0),
        sequence=SequenceSettings(
            actions=ACTIONS, attribution_window_seconds=2.0, lateness_seconds=1.0, history_length=512
        ),
        scorer=Scorer(clock="event"),
    )


def open_partition(config: Config, path: Path) -> Partition:
    store = Store(path, Memory(config.state))
    store.claim(
        Meta(cluster_id="c", topic_id="t", topic="t.events", partition=0, partitions=1, fingerprint="f",
             actions=ACTIONS, window_ms=2000, emits=True)
    )  # fmt: skip
    return Partition(store, config.sequence, "f")


def test_the_trainers_prediction_is_the_scorers_answer(config: Config, tmp_path: Path) -> None:
    log, clock = log_and_clock()
    partition = open_partition(config, tmp_path / "p")
    learner, live = Learner(config), LiveWeights(ACTIONS, clock, log)
    ranker = Ranker(config, clock, live, OnePartition(partition))
    published = Weights(config)
    published.model, published.table = learner.model, learner.table
    ranked = retrieved = seen_before = 0
    since = learner.table.mark()

    arriving = events(3, 200, users=4, items=60)
    arriving.append({"type": "impression", "event_id": "last", "user_id": "u0", "item_id": "i0",
                     "event_time": START + 90_000})  # fmt: skip
    for offset, event in enumerate(arriving):
        key, value, _ = row(event)
        examples: list[Example] = []
        arrived = columns([Record("t.events", 0, offset, key, value, START + 100_000)])
        partition.apply(arrived, lambda _, example, to=examples: to.append(decode(example)))  # type: ignore[misc]
        if not examples:
            continue
        rows = None if live.version is None else learner.table.changed_since(since)
        version = published.publish(rows, watermark_ms=learner.watermark_ms)
        since = learner.table.mark()
        assert live.install(version)

        batch = assemble(examples, learner.model.layout)
        catalogue = len(learner.table.live(learner.watermark_ms)[1])
        predictions, skipped = learner.learn(batch)
        assert not skipped
        starts = np.cumsum([0, *(len(e.target_index) for e in examples)])
        for example, start in zip(examples, starts, strict=False):
            assert len(example.history) < config.sequence.history_length
            for n, at in enumerate(asked_at(example)):
                m = int(start) + n
                if example.history.kinds[example.target_index[n]] == IMPRESSION:
                    answer = ranker.rank(RankRequest(example.user, [example.target_items[n]], at=at))
                    found = [answer.items[0].probabilities[action] for action in ACTIONS]
                    np.testing.assert_allclose(found, predictions.probabilities[m], atol=1e-5, rtol=0)
                    ranked += 1
                    seen_before += answer.sequence_length > 0
                if predictions.rank[m] > 0:
                    asked = RetrieveRequest(example.user, catalogue, exclude_seen=False, at=at)
                    names = [item.item_id for item in ranker.retrieve(asked).items]
                    assert names.index(example.target_items[n]) + 1 == predictions.rank[m]
                    retrieved += 1
    assert ranked > 80 and seen_before > 50 and retrieved > 20, (ranked, seen_before, retrieved)
    partition.store.close()


def asked_at(example: Example) -> list[int]:
    """The request time of each target."""
    times = request_times(example.history)
    return [int(times[i]) for i in example.target_index]
