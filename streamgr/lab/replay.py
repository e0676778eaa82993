"""A log as the demo's feed: `produce`'s own publication, in a thread, that waits for those who work behind it.

Published as fast as possible, a log would be through long before the first weights, and the mock broker would have lost
most of it (about 5 MB a partition). So an event is sent only while fewer than `BEHIND` are on their way: sent and not
yet in sequences, or closed and not yet learned. The order, the pace (`--speed`) and the heartbeats stay `produce`'s.
"""

import threading
from collections.abc import Callable

from streamgr.clock import Clock, Deadline
from streamgr.config import Config
from streamgr.errors import StreamgrError, TryAgain
from streamgr.kafka import topics
from streamgr.kafka.producer import ONE_SHOT_QUEUE_SECONDS, Producer
from streamgr.lab import produce
from streamgr.lab.datasets import Dataset
from streamgr.service import Stop

BEHIND = 2_000
LOOK_EVERY = 100  # events
LOOK_SECONDS = 0.1


class Replay:
    """Publishes a data set from a thread of its own; `exit_code` and `stop` as of a child process."""

    def __init__(
        self, config: Config, dataset: Dataset, speed: float, clock: Clock, on_their_way: Callable[[int], int]
    ) -> None:
        """`on_their_way`: given how many events were sent, how many are still to be sequenced or learned."""
        self._config, self._dataset, self._speed, self._clock = config, dataset, speed, clock
        self._on_their_way, self._stop = on_their_way, Stop()
        self._told = False
        self.sent = 0
        self.failure: StreamgrError | None = None
        self._thread = threading.Thread(target=self._run, name="replay", daemon=True)

    def start(self) -> "Replay":
        self._thread.start()
        return self

    @property
    def exit_code(self) -> int | None:
        """None while it publishes, 0 when all of it is acknowledged, else that of `failure`."""
        if self._thread.is_alive() or self._thread.ident is None:
            return None
        return self.failure.exit_code if self.failure else 0

    def stop(self, deadline: Deadline) -> bool:
        """End it early; what was sent stays sent. False when it does not come to an end in time."""
        self._told = True
        self._stop.set()
        self._thread.join(max(0.05, deadline.remaining()))
        return not self._thread.is_alive()

    def send(self, topic: str, value: bytes | None, *, key: bytes | None = None, partition: int | None = None) -> None:
        """One record, when there is room; heartbeats (no key) are never held up."""
        if key is not None:
            self.sent += 1
            while self.sent % LOOK_EVERY == 0 and not self._stop and self._on_their_way(self.sent) > BEHIND:
                self._stop.wait(LOOK_SECONDS)
        self._producer.send(topic, value, key=key, partition=partition)

    def confirm(self, timeout: float | None = None) -> None:
        self._producer.confirm(timeout)

    def _run(self) -> None:
        """The thread. An error ends it and is kept for the main thread, unless it was told to stop."""
        try:
            partitions = topics.identity(self._config.kafka, self._config.topic("events")).partitions
            self._producer = Producer(
                self._config.kafka,
                client_id="streamgr-demo-replay",
                stop=self._stop,
                queue_seconds=ONE_SHOT_QUEUE_SECONDS,
            )
            try:
                produce.publish(
                    self._config,
                    self._dataset,
                    self,
                    partitions,
                    speed=self._speed,
                    close=True,
                    clock=self._clock,
                    stop=self._stop,
                )
            finally:
                self._producer.close()
        except TryAgain as error:
            self.failure = None if self._told else error
        except StreamgrError as error:
            self.failure = error
