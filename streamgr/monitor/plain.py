"""Following the topics with the plain client: the manifests always, the rest where Faust does not.

    manifests       read whole at each start, since the topic is compacted and bounded. Faust goes on where its group
                    stood and starts no single topic at its beginning; so this part is the plain client's for good
    dead letters    from a little before the end: the last hour is what is shown
    scores, events  from the end on

One thread, one consumer, no group and nothing committed: what the monitor knows is gone with it, and it learns anew.
A log that was cut under us (retention, a recreated topic) is followed again from where it stands now.
"""

import threading

from streamgr.clock import Clock
from streamgr.config import Config
from streamgr.errors import BrokerUnreachable, DataError
from streamgr.events import Records
from streamgr.kafka.consumer import Consumer
from streamgr.monitor.board import Board
from streamgr.monitor.readings import SOURCE_UP
from streamgr.service import Stop
from streamgr.telemetry import Log
from streamgr.weights.log import ManifestLog

TURN_SECONDS = 0.25
LETTERS_BACK = 1_000  # a partition
BATCH = 2_000
ASK_SECONDS = 1.0
BROKER = "broker"  # as a source


class Follower:
    """A thread that feeds a board; `everything`: also what Faust would bring."""

    def __init__(self, config: Config, board: Board, clock: Clock, log: Log, stop: Stop, *, everything: bool) -> None:
        self._config, self._board, self._clock, self._log, self._stop = config, board, clock, log, stop
        self._everything = everything
        self.turned = clock.monotonic()
        self.following = False  # whether we stand where we are to read on
        self.failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="follower", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Wait for the thread, which ends by `stop`."""
        if self._thread.ident is not None:
            self._thread.join(5.0)

    def _run(self) -> None:
        while not self._stop:
            try:
                self._follow()
            except BrokerUnreachable as error:
                if not self._stop:
                    self._log.warning("broker_away", str(error))
            except DataError as error:  # also `RetentionPassed`
                self._log.warning("records_passed_over", str(error))
            except Exception as error:
                self.failure = error
                return
            self._stop.wait(TURN_SECONDS)

    def _follow(self) -> None:
        manifests = ManifestLog(self._consumer("manifests"), self._config.topic("manifests"))
        records = self._consumer("records") if self._everything else None
        try:
            manifests.start()
            self._board.manifests_anew()
            if records is not None:
                records.assign(self._positions(records))
            self.following, asked = True, 0.0
            while not self._stop:
                self.turned = self._clock.monotonic()
                if self.turned - asked >= ASK_SECONDS:
                    asked = self.turned
                    self._ask(manifests)
                for entry in manifests.read(0.0 if records else TURN_SECONDS):
                    self._board.manifest(entry, self._clock.now_ms())
                if records is not None:
                    for batch in records.fetch(BATCH, TURN_SECONDS):
                        self._take(batch)
                    self._board.settle(self._clock.now_ms())
        finally:
            manifests.close()
            if records is not None:
                records.close()

    def _ask(self, manifests: ManifestLog) -> None:
        """Whether the broker is there: what is not heard from it is not news."""
        try:
            manifests.bounds(ASK_SECONDS)
        except BrokerUnreachable:
            SOURCE_UP.labels(BROKER).set(0)
        else:
            SOURCE_UP.labels(BROKER).set(1)
            self._board.heard(self._clock.now_ms())

    def _consumer(self, what: str) -> Consumer:
        def waiting() -> None:
            self.turned = self._clock.monotonic()

        client, kafka = f"streamgr-monitor-{what}", self._config.kafka
        return Consumer(kafka, client_id=client, log=self._log, stop=self._stop, waiting=waiting, headers=True)

    def _positions(self, consumer: Consumer) -> dict[tuple[str, int], int]:
        topics = {"dead-letters": LETTERS_BACK} | (
            {"scores": 0, "events": 0} if self._config.monitor.online_window_seconds else {}
        )
        at = {}
        for name, back in topics.items():
            topic = self._config.topic(name)
            for partition in consumer.partitions(topic):
                low, high = consumer.bounds(topic, partition)
                at[topic, partition] = max(low, high - back)
        return at

    def _take(self, batch: Records) -> None:
        if batch.topic == self._config.topic("events"):
            self._board.events(batch, self._clock.now_ms())
        elif batch.topic == self._config.topic("scores"):
            for value in batch.values:
                self._board.score(value)
        else:
            for at_ms, headers in zip(batch.append_ms, batch.headers or [], strict=True):
                self._board.dead_letter(reason(headers), at_ms, batch.partition)


def reason(headers: list[tuple[str, bytes]]) -> str:
    """Why a record is a dead letter, by its header."""
    return dict(headers).get("reason", b"other").decode(errors="replace")
