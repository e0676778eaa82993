"""The comparison at work: follows the examples, the weights and the trainer's log beside the running roles.

Until the freeze it takes in every weights version exactly as a scorer does (`weights.Subscriber`, `serve.LiveWeights`);
at the freeze it stops, and what it holds then is the frozen model: the real weights that were served at that moment.
From then on each target that the trainer has learned is also asked of them, in the window that the sequencer sent and
through the trainer's own assembly, so that the two answers differ in nothing but the weights.

It must not slow down what it watches: it works in batches, and when it is busy for more than `BUSY` of the time it
halves the share of users whose targets are judged (for all models alike; `sampled` says what is left).
"""

import threading
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import torch

from streamgr.clock import Clock
from streamgr.config import Config
from streamgr.events import item_key
from streamgr.kafka.consumer import Consumer
from streamgr.lab.compare import Answer, Comparison, Plan, Row, Tail, closed_together, read_rows
from streamgr.sequence.examples import Example, decode
from streamgr.serve.model import LiveWeights, Served
from streamgr.service import Stop
from streamgr.telemetry import Log
from streamgr.train.batch import assemble
from streamgr.weights.subscriber import Subscriber

TURN_SECONDS = 0.25
BUSY = 0.3  # of one core
PATIENCE_SECONDS = 5.0  # how long a row waits for its example
EXAMPLES_A_PASS = 64
HELD_TARGETS = 200_000  # examples read and not yet learned; more are left in the topic


class FrozenModel:
    """One version of the weights, kept as it was."""

    def __init__(self, served: Served) -> None:
        self._served, self.version = served, served.manifest.version
        self._recommender = served.copy.recommender
        inverse = served.copy.inverse_norms.index_select(0, served.rows)
        self._items = served.copy.table.weight.index_select(0, served.rows) * inverse[:, None]
        self._place = {int(key): place for place, key in enumerate(served.keys)}

    def answer(self, examples: list[Example]) -> dict[str, Answer]:
        """What these weights say of the examples' targets, by event id."""
        batch = assemble(examples, self._recommender.layout)
        targets = batch.targets
        events = [event for example in examples for event in example.target_events]
        with torch.inference_mode():
            vectors, _ = self._served.vectors(batch.tokens.keys)
            hidden = self._recommender.transduce(batch.tokens, vectors)
            ranked, retrieved = targets.ranked, targets.retrieved
            p = torch.sigmoid(self._recommender.rank(hidden[torch.from_numpy(targets.token[ranked])])).tolist()
            queries = self._recommender.queries(hidden, torch.from_numpy(targets.query[retrieved]))
            similar = (queries @ self._items.T).numpy()
        probabilities = {
            int(k): dict(zip(self._served.actions, row, strict=True)) for k, row in zip(ranked, p, strict=True)
        }
        ranks: dict[int, int] = {}
        for row, k in zip(similar, retrieved, strict=True):
            place = self._place.get(int(targets.keys[k]))
            ranks[int(k)] = -1 if place is None else 1 + int(np.count_nonzero(row > row[place]))
        return {event: Answer(probabilities.get(k), ranks.get(k)) for k, event in enumerate(events)}


class Observer:
    """A thread beside the roles; `comparison` and the counts may be read from any thread."""

    def __init__(
        self,
        config: Config,
        clock: Clock,
        log: Log,
        *,
        plan: Plan,
        predictions: Path,
        truth: Path | None,
    ) -> None:
        """`predictions`: the trainer's prequential log. `truth`: the simulator's probabilities, None for a replay."""
        self._config, self._clock, self._plan = config, clock, plan
        self._predictions, self._predictions_name = Tail(predictions), str(predictions)
        self._truth_file = Tail(truth) if truth else None
        actions = config.sequence.actions
        self._live = LiveWeights(actions, clock, log)
        self._log = log
        ttl = config.table.ttl_seconds
        self.comparison = Comparison(actions[0], ttl, ttl, oracle=truth is not None)
        self.targets_emitted, self.sampled = 0, 1.0
        self.failure: Exception | None = None
        self._examples: dict[str, Example] = {}  # by event id of each target
        self._truth: dict[str, dict[str, float]] = {}
        self._rows: list[Row] = []  # read and not yet judged
        self._waited = self._busy = 0.0
        self._frozen: FrozenModel | None = None
        self._began: float | None = None
        self._stop = Stop()
        self._thread = threading.Thread(target=self._run, name="observer", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def begin(self) -> None:
        """The first event has been sent: the plan's clock starts."""
        self._began = self._clock.monotonic()

    def close(self) -> None:
        """End the thread and let go of its connections."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join(10.0)

    def _run(self) -> None:
        """The thread. Whatever ends it is kept in `failure`, for the main thread to report."""
        try:
            torch.set_num_threads(1)
            self._follow()
        except Exception as error:
            self.failure = error

    def _follow(self) -> None:
        examples = Consumer(self._config.kafka, client_id="streamgr-demo-examples", log=self._log, stop=self._stop)
        subscriber = Subscriber(self._config, self._clock, self._log, self._consumer_factory())
        try:
            topic = self._config.topic("examples")
            low = {(topic, p): examples.bounds(topic, p)[0] for p in examples.partitions(topic)}
            examples.assign(low)
            while not self._stop.wait(TURN_SECONDS):
                started = self._clock.monotonic()
                self._read_examples(examples)
                while self._frozen is None and self._live.follow(subscriber, 0.0):
                    pass
                self._read_files()
                self._judge()
                spent = self._clock.monotonic() - started
                self._busy = 0.9 * self._busy + 0.1 * spent / (spent + TURN_SECONDS)
                if self._busy > BUSY and self.sampled > 1 / 64:
                    self.sampled, self._busy = self.sampled / 2, BUSY / 2
                    self._log.warning("comparison_sampled", "too many targets to judge them all", share=self.sampled)
        finally:
            subscriber.close()
            examples.close()

    def _consumer_factory(self) -> Callable[[], Consumer]:
        return lambda: Consumer(self._config.kafka, client_id="streamgr-demo-weights", log=self._log, stop=self._stop)

    def _read_examples(self, consumer: Consumer) -> None:
        """Take in what the sequencer has sent, up to a bound."""
        while len(self._examples) < HELD_TARGETS:
            records = consumer.poll(1000, 0.0)
            for record in records:
                example = decode(record.value or b"")
                if isinstance(example, Example):
                    self.targets_emitted += len(example.target_events)
                    for event in example.target_events:
                        self._examples[event] = example
            if not records:
                return

    def _read_files(self) -> None:
        """What the trainer has learned; and what the simulator knew, which is always written before it."""
        self._rows += read_rows(self._predictions.lines(), self._predictions_name)
        if self._truth_file is not None:
            for line in self._truth_file.lines():
                self._truth |= msgspec.json.decode(line, type=dict[str, dict[str, float]])

    def _judge(self) -> None:
        """Judge the rows whose examples are here, in order; freeze first when it is time."""
        comparison, now = self.comparison, self._clock.monotonic()
        elapsed = now - self._began if self._began is not None else 0.0
        if self._frozen is None and self._live.version and self._plan.due(comparison.learned, elapsed):
            with self._live.lease() as served:  # nothing is installed any more: it stays as it is
                self._frozen = FrozenModel(served)
            comparison.freeze(self._frozen.version)
            self._log.info("frozen", version=self._frozen.version, learned=comparison.learned)
        rows, self._rows = self._rows, []
        missing = next((k for k, row in enumerate(rows) if row.event_id not in self._examples), None)
        if missing is None:
            self._waited = now
        elif now - self._waited < PATIENCE_SECONDS:
            rows, self._rows = rows[:missing], rows[missing:]
        answers = self._ask_frozen(rows) if self._frozen is not None else {}
        for group in closed_together(rows):
            comparison.close(group, answers, self._truth)
        for row in rows:
            self._examples.pop(row.event_id, None)
            self._truth.pop(row.event_id, None)

    def _ask_frozen(self, rows: list[Row]) -> dict[str, Answer]:
        assert self._frozen is not None
        examples = {id(e): e for row in rows if (e := self._examples.get(row.event_id)) and self._sampled(e.user)}
        asked = list(examples.values())
        answers: dict[str, Answer] = {}
        for start in range(0, len(asked), EXAMPLES_A_PASS):
            answers |= self._frozen.answer(asked[start : start + EXAMPLES_A_PASS])
        return answers

    def _sampled(self, user: str) -> bool:
        return item_key(user) < self.sampled * 2**64
