import numpy as np

from streamgr.events import IMPRESSION
from streamgr.model.tokens import Layout
from streamgr.train.batch import assemble
from tests.train.kit import example

CLICK, LIKE = 2, 3


def test_targets_labels_and_queries_of_a_batch() -> None:
    events = [
        (IMPRESSION, "a", 100, 1),  # 0
        (CLICK, "a", 150, 0),  # 1
        (IMPRESSION, "b", 200, 2),  # 2  request 2 is asked at 200
        (CLICK, "b", 210, 0),  # 3  happens inside the request, must not be seen by token 4
        (IMPRESSION, "c", 220, 2),  # 4
        (LIKE, "d", 300, 0),  # 5  organic
    ]
    first = example((1, 0), events=events, targets=[0, 2, 4, 5], labels=[0, 0b11, 0b10, 0], append_ms=900)
    second = example((2, 0), (1, 0), events=events[2:], targets=[0], labels=[1], watermark=9_999)
    batch = assemble([first, second], Layout(2))
    targets = batch.targets
    assert targets.token.tolist() == [0, 2, 4, 5, 6]
    assert targets.labels.tolist() == [[False, False], [True, True], [False, True], [False, False], [True, False]]
    assert targets.positive.tolist() == [False, True, True, True, True]
    assert targets.query.tolist() == [-1, 1, 1, 3, -1]
    assert targets.ranked.tolist() == [0, 1, 2, 4]
    assert targets.example.tolist() == [0, 0, 0, 0, 1]
    assert targets.closed_ms.tolist() == [900] * 4 + [10_002]
    assert targets.append_ms.tolist() == [800] * 4 + [9_902]
    assert (targets.keys == batch.tokens.keys[targets.token]).all()
    assert batch.watermark_ms == 9_999


def test_an_organic_action_does_not_see_itself_or_its_contemporaries() -> None:
    events = [(CLICK, "a", 100, 0), (CLICK, "b", 200, 0), (LIKE, "c", 200, 0)]
    batch = assemble([example((1, 0), events=events, targets=[1, 2], labels=[0, 0])], Layout(2))
    assert batch.targets.query.tolist() == [0, 0]
    assert len(batch.targets.ranked) == 0
    assert batch.targets.labels.dtype == np.bool_
