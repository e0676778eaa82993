"""What people see of sequences and examples."""

from pathlib import Path

import numpy as np
import pytest

from streamgr import config
from streamgr.errors import DataError
from streamgr.events import History
from streamgr.sequence import views
from streamgr.sequence.examples import BEFORE_ALL, Example
from streamgr.sequence.partition import Partition
from streamgr.state.store import Store, partition_directory
from tests.sequence.test_partition import FAST, MEMORY, META, Json, records


def keep(state: Path, partition: int, rows: list[Json]) -> Store:
    """A sequencer's partition with these events; still open, as its writer has it."""
    store = Store(partition_directory(state / "sequencer", partition), MEMORY)
    store.claim(META)
    worker = Partition(store, FAST, "f")
    worker.apply(records(rows))
    worker.commit()
    return store


def event(kind: str, event_id: str, user: str, time: int, **more: object) -> Json:
    return {"type": kind, "event_id": event_id, "user_id": user, "event_time": time, **more}


def test_a_sequence_is_shown_beside_its_writer_as_the_contract_has_it(tmp_path: Path) -> None:
    keep(
        tmp_path,
        0,
        [
            event("like", "l", "ü", 20, item_id=7),
            event("click", "c", "ü", 20, item_id=7),
            event("impression", "i", "ü", 10, item_id=7, request_id="r", position=1, features={"a": 1}),
            event("profile", "p1", "ü", 5, features={"country": "BR"}),
            event("profile", "p3", "ü", 15, features={"country": "US"}),
            event("profile", "p2", "ü", 9, features={"country": "BR"}),
            event("profile", "p4", "ü", 16, features={"country": "BR"}),
        ],
    )
    keep(tmp_path, 1, [event("like", "l", "a", 1, item_id="x")])
    shown = views.show(tmp_path, "ü")
    assert shown == {
        "user_id": "ü",
        "events": [
            {"type": "profile", "event_time": 5, "event_id": "p1"},  # of a run, the first
            {"type": "impression", "item_id": "7", "event_time": 10, "event_id": "i", "actions": ["click", "like"]},
            {"type": "profile", "event_time": 15, "event_id": "p3"},
            {"type": "profile", "event_time": 16, "event_id": "p4"},
            {"type": "click", "item_id": "7", "event_time": 20, "event_id": "c"},
            {"type": "like", "item_id": "7", "event_time": 20, "event_id": "l"},
        ],
    }
    assert views.show(tmp_path, "nobody") is None
    assert [s["user_id"] for s in views.export(tmp_path)] == ["a", "ü"]
    assert next(iter(views.export(tmp_path / "sequencer")))["user_id"] == "a"


def test_no_state_is_an_error_not_an_empty_answer(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no sequences here.*remedy"):
        list(views.export(tmp_path))
    with pytest.raises(DataError, match="no sequences here"):
        views.show(tmp_path / "nowhere", "u")


def test_an_example_in_json() -> None:
    times = np.array([1, 2, 3], np.int64)
    history = History(np.array([1, 1, 2], np.uint8), np.arange(3, dtype=np.uint64), times, np.zeros(3, np.uint64))
    example = Example(
        "f", (9, 1), BEFORE_ALL, "u", 100, 200, history, np.array([0, 2]), np.array([3, 1], np.uint32),
        np.array([5, 6]), ["x", "y"], ["e", "o"],
    )  # fmt: skip
    assert views.examples_json(example, 3, config.Sequence().actions) == {
        "position": {"partition": 3, "offset": 9, "n": 1},
        "user": "u",
        "targets": [
            {"item": "x", "event_id": "e", "event_time": 1, "labels": ["click", "like"]},
            {"item": "y", "event_id": "o", "event_time": 3, "labels": ["click"]},
        ],
    }
