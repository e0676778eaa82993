"""`examples list`: what a reader accepts, each once."""

from collections.abc import Sequence

import numpy as np
import pytest

from streamgr.config import Config
from streamgr.errors import BrokerUnreachable
from streamgr.events import Record
from streamgr.sequence import listing
from streamgr.sequence.examples import BEFORE_ALL, Example, Position, encode
from streamgr.sequence.tail import Tail


def example(fingerprint: str, prev: Position, position: Position) -> bytes:
    none = np.zeros(0, np.int64)
    return encode(
        Example(fingerprint, position, prev, "u", 1, 2, Tail().window(0, 0), none, none.astype(np.uint32), none, [], [])
    )


class OnePartition:
    """A consumer of this log, which claims to hold `beyond` more records than ever come."""

    def __init__(self, values: Sequence[bytes], beyond: int = 0) -> None:
        self._values, self._beyond = values, beyond

    def partitions(self, topic: str, *, wait_seconds: float) -> list[int]:
        return [0]

    def bounds(self, topic: str, partition: int, *, wait_seconds: float) -> tuple[int, int]:
        return 0, len(self._values) + self._beyond

    def assign(self, positions: dict[tuple[str, int], int]) -> None:
        self._left = [Record("t", 0, n, None, value, 0) for n, value in enumerate(self._values)]

    def poll(self, *, timeout: float) -> list[Record]:
        found, self._left = self._left, []
        return found

    def close(self) -> None:
        pass


def test_repetitions_are_left_out_and_a_recreated_topic_begins_again(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = example("a", BEFORE_ALL, (3, 0)), example("a", (3, 0), (5, 0))
    again = example("b", BEFORE_ALL, (2, 0))
    log = OnePartition([first, first, second, first, second, again, again])
    monkeypatch.setattr(listing, "Consumer", lambda *_, **__: log)
    shown = [(row["position"]["offset"], row["position"]["n"]) for row in listing.examples(Config())]
    assert shown == [(3, 0), (5, 0), (2, 0)]
    assert len(list(listing.examples(Config(), limit=2))) == 2


def test_a_broker_that_goes_away_is_no_endless_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "Consumer", lambda *_, **__: OnePartition([], beyond=1))
    monkeypatch.setattr(listing, "WAIT_SECONDS", 0.05)
    with pytest.raises(BrokerUnreachable, match=r"examples\[0\]@0"):
        list(listing.examples(Config()))
