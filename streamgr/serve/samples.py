"""A share of the answers, written to `<prefix>.scores` for those who want to see what was served.

Taken evenly (every 1/share-th answer), so that no randomness is needed, and on the side: an answer never waits for
Kafka. What the small buffer cannot hold is dropped and counted.
"""

import queue
import threading

import msgspec

from streamgr.clock import Clock
from streamgr.errors import StreamgrError
from streamgr.kafka.producer import Producer
from streamgr.serve.wire import Answer, RankRequest, RetrieveRequest
from streamgr.telemetry import Log, counter

SAMPLED = counter("scores_sampled", "Answers chosen for the scores topic.", ("outcome",))
for _outcome in ("sent", "dropped"):
    SAMPLED.labels(_outcome)  # 0 is a value too
BUFFERED = 1_000
CLOSE_SECONDS = 3.0


class Samples:
    """Any thread `offer`s; one thread of its own sends."""

    def __init__(self, producer: Producer, topic: str, share: float, clock: Clock, log: Log) -> None:
        self._producer, self._topic, self._share, self._clock, self._log = producer, topic, share, clock, log
        self._lock, self._due = threading.Lock(), 0.0
        self._waiting: queue.Queue[tuple[bytes, bytes]] = queue.Queue(BUFFERED)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._send, name="samples", daemon=True)
        self._thread.start()

    def offer(self, ask: RankRequest | RetrieveRequest, answer: Answer) -> None:
        """Perhaps write this answer."""
        with self._lock:
            self._due += self._share
            if self._due < 1:
                return
            self._due -= 1
        kind = "rank" if isinstance(ask, RankRequest) else "retrieve"
        user = str(ask.user_id)
        sample = {"kind": kind, "user_id": user, "time": self._clock.now_ms(), "at": ask.at, "answer": answer}
        try:
            self._waiting.put_nowait((user.encode(), msgspec.json.encode(sample)))
        except queue.Full:
            SAMPLED.labels("dropped").inc()

    def close(self) -> None:
        """Send what waits, within a few seconds."""
        self._closing.set()
        self._thread.join(CLOSE_SECONDS)
        try:
            self._producer.confirm(CLOSE_SECONDS)
        except StreamgrError as error:
            self._log.warning("samples_lost", str(error))
        self._producer.close()

    def _send(self) -> None:
        said = False  # of drops in a row the first is logged; the counter has them all
        while not (self._closing.is_set() and self._waiting.empty()):
            try:
                key, value = self._waiting.get(timeout=0.2)
                self._producer.send(self._topic, value, key=key)
            except queue.Empty:
                continue
            except StreamgrError as error:
                SAMPLED.labels("dropped").inc()
                if not said:
                    self._log.warning("sample_dropped", str(error))
                said = True
            else:
                said = False
                SAMPLED.labels("sent").inc()
