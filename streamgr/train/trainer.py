"""The trainer: examples in, weights out. One loop: poll, step, cut a version, checkpoint.

What makes it exactly once (decisions 3, 6 and 7), in the order of a life:

1. The state directory is locked and the weights log claimed: a trainer that was here before is fenced off.
2. The newest checkpoint gives weights, optimizers, marks and positions under one step number; the step log says how
   the steps after it were formed, and they are formed and learned again, with the same bits on CPU.
3. Each new step is written to the step log, then learned. The log is synced before a version that contains the step
   is published, so no served weights can be forgotten. The loop only cuts a version; a thread of its own publishes it
   (`versions`), and what depends on a version moves when it is acknowledged.
4. What the guard withholds is said and counted (`guard`), and the role is not ready until a version goes out again.
5. The checkpoint moves what a restart must repeat; the step log is then cut to what the oldest checkpoint needs.
   Offsets committed to Kafka are for lag tools only and never read.

`run_until_end` merges without regard to arrival, so that all of it is a function of the topic.
"""

from contextlib import ExitStack
from typing import Any

import msgspec
import torch

from streamgr.clock import Clock, milliseconds
from streamgr.config import Config
from streamgr.errors import DataError
from streamgr.kafka.consumer import Consumer
from streamgr.kafka.producer import Producer
from streamgr.model.recommender import Recommender
from streamgr.service import Stop
from streamgr.telemetry import DURATION_BUCKETS, HORIZON, WATERMARK, Health, Log, counter, histogram
from streamgr.train.batch import assemble
from streamgr.train.checkpoint import Checkpoints, Facts, lock
from streamgr.train.device import training_device
from streamgr.train.guard import Candidate, Guard
from streamgr.train.learner import Learner
from streamgr.train.meters import TableMeters
from streamgr.train.outcomes import Outcomes
from streamgr.train.prequential import Prequential
from streamgr.train.reader import ExamplesReader, Formed, Source
from streamgr.train.steplog import Step, StepLog
from streamgr.train.versions import Published, Versions, Withheld
from streamgr.weights import publisher as weights
from streamgr.weights.publisher import Publisher

EXAMPLES = counter("train_examples", "Examples learned, replays after a restart included.")
STEPS = counter("train_steps", "Steps learned.", ("origin",))
DURATION = histogram("train_step_duration_seconds", "One step: map, forward, judge, backward.", (), DURATION_BUCKETS)
for _origin in ("live", "replay"):
    STEPS.labels(_origin)
WAIT_SECONDS = 0.5


class Trainer:
    """One trainer process. `source` and `publisher` are built from the configuration unless given (tests)."""

    def __init__(
        self,
        config: Config,
        clock: Clock,
        log: Log,
        health: Health,
        stop: Stop,
        *,
        source: Source | None = None,
        publisher: Publisher | None = None,
    ) -> None:
        self._device = training_device(config.trainer.device)
        self._config, self._clock, self._log, self._health, self._stop = config, clock, log, health, stop
        self._given = source, publisher
        self._closing = ExitStack()
        self._directory = config.role_directory("trainer")
        self._published_step = -1  # of the newest version that is acknowledged
        self._busy = False  # the last turn took a step: there may be work for another at once
        self._cut_at = self._checkpointed = 0.0

    def run(self) -> None:
        """Learn and publish until told to stop; then publish, checkpoint and leave."""
        with self._closing:
            if not self.start():
                return
            while not self._stop:
                self.turn()
            self._wait()
            if self._learner.step > self._published_step:
                self._cut()
                self._wait()
            self._checkpoint()

    def run_until_end(self) -> None:
        """Learn what the topic holds now, checkpoint, publish, return."""
        with self._closing:
            if not self._open():
                return
            self._reader.stop_at_end()
            while not self._stop:
                self._reader.poll(0.05)
                while (formed := self._reader.form()) is not None:
                    self._learn(formed)
                    if self._due(self._checkpointed, self._config.trainer.checkpoint_seconds):
                        self._checkpoint()
                self._health.turned()
                if self._reader.ended():
                    break
            self._checkpoint()
            self._cut()
            if (withheld := self._wait()) is not None:
                raise DataError(withheld.verdict.what, where="weights withheld", remedy=withheld.verdict.remedy)

    def start(self) -> bool:
        """Open, recover, and publish what we have, so that scorers can serve; false when stopped before that."""
        if not self._open():
            return False
        self._cut()
        self._wait()
        return True

    def turn(self) -> None:
        """Once around the loop."""
        settings = self._config.trainer
        self._reader.poll(0.0 if self._busy else 0.05)
        formed = self._reader.form()
        self._busy = formed is not None
        if formed is not None:
            self._learn(formed)
        self._follow_version()
        if self._versions.ahead is not None:
            self._cut()
        elif not self._versions.busy and self._due(self._cut_at, settings.publish_seconds) and self._news():
            if self._busy:
                self._versions.copy_ahead(self._learner.watermark_ms)
            else:  # nobody is held up
                self._cut()
        if self._due(self._checkpointed, settings.checkpoint_seconds):
            self._checkpoint()
        self._health.turned()

    # -- start

    def _open(self) -> bool:
        """Lock, claim, load and recover: afterwards we are where the step log ends; false when stopped before that."""
        config, settings = self._config, self._config.trainer
        self._health.hold("recovered", "loading the checkpoint")
        self._health.hold("published", "no version yet")
        self._closing.enter_context(lock(self._directory))
        if settings.threads:
            torch.set_num_threads(settings.threads)
        torch.use_deterministic_algorithms(True)
        # a debugging aid that costs a seventh of a step
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        self._learner = Learner(config, self._device)
        prequential = Prequential(config.sequence.actions, settings.window_targets, settings.fade_targets)
        self._architecture: dict[str, Any] = msgspec.to_builtins(
            {
                "model": config.model,
                "table": config.table,
                "actions": config.sequence.actions,
                "window_ms": self._learner.model.layout.window_ms,
            }
        )
        self._checkpoints = Checkpoints(self._directory / "checkpoints", self._log)
        lanes, log_bytes = {}, 0
        self._targets_learned = self._version = self._horizon_ms = 0
        if (loaded := self._checkpoints.load(self._architecture, settings.seed)) is not None:
            facts, tensors = loaded
            self._learner.load_state(tensors, facts.step, facts.watermark_ms)
            prequential.load_state(
                {n.removeprefix("prequential/"): t for n, t in tensors.items() if n.startswith("prequential/")}
            )
            lanes, log_bytes = facts.lanes, facts.log_bytes
            self._targets_learned, self._version = facts.targets_learned, facts.version
            self._horizon_ms = facts.horizon_ms
        self._outcomes = Outcomes(config.sequence.actions, prequential, settings.prequential_log, log_bytes)
        self._closing.callback(self._outcomes.close)
        self._steps = StepLog(self._directory / "steps.jsonl")
        self._closing.callback(self._steps.close)

        self._publisher = self._connect_publisher()
        self._claim = self._publisher.claim(self._version)
        self._version = self._claim.last_version
        source = self._given[0] or Consumer(
            config.kafka,
            client_id=config.group("trainer"),
            group=config.group("trainer"),
            log=self._log,
            stop=self._stop,
            waiting=self._health.turned,
        )
        self._closing.callback(source.close)
        self._source = source
        self._reader = ExamplesReader(
            source,
            config.topic("examples"),
            lanes,
            clock=self._clock,
            batch_tokens=settings.batch_tokens,
            max_skew_ms=milliseconds(settings.max_skew_seconds),
            accept_loss=settings.accept_loss,
        )
        self._guard = Guard(config.weights, self._log)
        self._versions = Versions(
            self._publisher,
            self._guard,
            self._learner.table,
            Recommender(config.model, config.sequence.actions, settings.seed, self._architecture["window_ms"]),
            compared_targets=min(config.weights.compared_targets, settings.window_targets),
            sync=self._steps.sync,
            clock=self._clock,
        )
        self._closing.callback(self._versions.close)
        self._cut_at = self._checkpointed = self._clock.monotonic()
        self._meters = TableMeters(self._learner.table)
        return self._recover()

    def _connect_publisher(self) -> Publisher:
        if self._given[1] is not None:
            return self._given[1]
        kafka = self._config.kafka
        producer = Producer(kafka, client_id=self._config.group("trainer"), log=self._log, stop=self._stop)
        self._closing.callback(producer.close)
        publisher = Publisher(
            self._config,
            self._clock,
            self._log,
            producer,
            lambda: Consumer(kafka, client_id=self._config.group("trainer-manifests"), log=self._log, stop=self._stop),
            patience=lambda: not self._stop,
        )
        self._closing.callback(publisher.close)
        return publisher

    def _recover(self) -> bool:
        """Learn again the steps between checkpoint and crash, exactly as they were formed.

        False when stopped half-way: what is behind the versions already served must be neither published nor kept.
        """
        steps = self._steps.after(self._learner.step)
        if steps and self._reader.jumped:
            self._log.warning("steps_lost", f"{len(steps)} steps cannot be formed again: their examples are gone")
            self._steps.forget(steps[-1].step)
            steps = []
        if steps:
            self._log.info("recovering", f"{len(steps)} steps since the checkpoint", step=self._learner.step)
        for step in steps:
            self._health.hold("recovered", f"replaying steps, {steps[-1].step - step.step + 1} to go")
            while (formed := self._reader.form_recorded(step.ends)) is None:
                if self._stop:
                    return False
                self._reader.poll(0.05)
                self._health.turned()
            self._learn(formed, replay=True)
        if self._learner.step < self._claim.last_step:
            self._log.warning(
                "steps_missing",
                f"the last version was of step {self._claim.last_step}, our files end at {self._learner.step}: what "
                "lies between is learned anew; remedy: none if the state was restored or removed on purpose",
            )
        self._health.hold("recovered")
        self._log.info(
            "trainer_ready",
            step=self._learner.step,
            targets_learned=self._targets_learned,
            positions={p: lane.state.next_offset for p, lane in self._reader.lanes.items()},
        )
        return True

    # -- the three verbs

    def _learn(self, formed: Formed, *, replay: bool = False) -> None:
        if not replay:
            self._steps.append(Step(self._learner.step + 1, self._reader.ends(formed)))
        partitions = [partition for partition, _ in formed.examples]
        batch = assemble([example for _, example in formed.examples], self._learner.model.layout)
        started = self._clock.monotonic()
        predictions, skipped = self._learner.learn(batch)
        DURATION.observe(self._clock.monotonic() - started)
        gradient_ms = self._clock.now_ms()
        self._reader.learned(formed)
        self._outcomes.add(partitions, batch, predictions, version=self._version, gradient_ms=gradient_ms)
        EXAMPLES.inc(len(partitions))
        STEPS.labels("replay" if replay else "live").inc()
        if skipped:
            self._log.warning(
                "learning_skipped", f"the {skipped} is not finite", step=self._learner.step, targets=len(batch.targets)
            )
            return
        self._targets_learned += len(batch.targets)
        if not replay:
            self._outcomes.learned(batch, gradient_ms)

    def _cut(self) -> None:
        """A version of all that was learned goes on its way."""
        lanes = self._reader.lanes.items()
        self._cut_at = self._clock.monotonic()
        self._versions.cut(
            self._learner.model.state_dict(),
            self._outcomes.prequential,
            self._learner.take_gradient_norm(),
            weights.Facts(
                model=self._model(),
                step=self._learner.step,
                targets_learned=self._targets_learned,
                horizon_ms=self._horizon(),
                watermark_ms=self._learner.watermark_ms,
                positions={
                    self._config.topic("events"): {p: lane.state.source_next for p, lane in lanes},
                    self._config.topic("examples"): {p: lane.state.next_offset for p, lane in lanes},
                },
                learned=self._outcomes.freshness(),
                quality={},
            ),
        )

    def _follow_version(self, timeout: float = 0.0) -> Withheld | None:
        """What became of the version on its way; raises what stopped it."""
        match ended := self._versions.ended(timeout):
            case Published(cut, manifest):
                self._version, self._published_step = manifest.version, cut.facts.step
                self._horizon_ms = cut.facts.horizon_ms
                self._outcomes.carried(cut.facts.learned)
                topic = self._config.topic("examples")
                self._source.commit({(topic, p): offset for p, offset in cut.facts.positions[topic].items()})
                self._health.hold("published")
            case Withheld(cut, verdict):
                self._log.error(
                    "weights_withheld",
                    f"{verdict.what}; remedy: {verdict.remedy}",
                    reason=verdict.reason,
                    step=cut.facts.step,
                    serving=self._version,
                )
                self._health.hold("published", f"withheld: {verdict.what}")
            case None:
                return None
        self._export()
        return ended if isinstance(ended, Withheld) else None

    def _wait(self) -> Withheld | None:
        """Until no version is on its way; the last one, if it was withheld."""
        withheld = None
        while self._versions.busy:
            withheld = self._follow_version(WAIT_SECONDS)
            self._health.turned()
        return withheld

    def _checkpoint(self) -> None:
        """Everything under one step number; the step log is cut to what the oldest checkpoint kept still needs.

        Weights that may not be published are not kept either: they would take the place of the last good ones.
        """
        self._checkpointed = self._clock.monotonic()
        table, dense = self._learner.table, self._learner.model.state_dict()
        every = Candidate(dense, torch.arange(len(table.weight)), table.weight)
        if (verdict := self._guard.inspect(every)) is not None:
            self._log.error("checkpoint_withheld", f"{verdict.what}; remedy: {verdict.remedy}", reason=verdict.reason)
            return
        self._steps.sync()  # else the machine could lose steps that the checkpoint before this one needs
        tensors = self._learner.state()
        tensors |= {f"prequential/{name}": tensor for name, tensor in self._outcomes.prequential.state().items()}
        oldest = self._checkpoints.save(
            Facts(
                step=self._learner.step,
                watermark_ms=self._learner.watermark_ms,
                targets_learned=self._targets_learned,
                architecture=self._architecture,
                seed=self._config.trainer.seed,
                lanes={p: lane.state for p, lane in self._reader.lanes.items()},
                version=self._version,
                horizon_ms=self._horizon_ms,
                log_bytes=self._outcomes.sync(),
                written_ms=self._clock.now_ms(),
            ),
            tensors,
        )
        self._steps.forget(oldest)

    # -- what we know of ourselves

    def _due(self, since: float, seconds: float) -> bool:
        return self._clock.monotonic() - since >= seconds

    def _model(self) -> dict[str, Any]:
        """What a scorer must build: the table has as many slots as it has grown to."""
        return self._architecture | {"table": msgspec.to_builtins(self._learner.table.geometry)}

    def _news(self) -> bool:
        """Whether a version would tell more than the last one that was published."""
        return self._learner.step > self._published_step or self._horizon_moved()

    def _horizon(self) -> int:
        """Append time (ms) of the newest source record fully in the weights, the minimum over partitions; 0: unknown.

        A partition that has no records holds nobody back; one whose records are still unanswered holds the horizon
        where it is. Where nobody has any, it is the moment we first looked. It never moves back.
        """
        known = []
        for partition, lane in self._reader.lanes.items():
            if lane.state.horizon_ms >= 0:
                known.append(lane.state.horizon_ms)
                continue
            low, high = self._source.bounds(self._config.topic("events"), partition)
            if low < high:
                return self._horizon_ms
        if not known:
            return self._horizon_ms or self._clock.now_ms()
        return max(self._horizon_ms, min(known))

    def _horizon_moved(self) -> bool:
        """Whether a version with nothing new in it would still be younger than the last one."""
        known = [ms for lane in self._reader.lanes.values() if (ms := lane.state.horizon_ms) >= 0]
        return bool(known) and min(known) > self._horizon_ms

    def _export(self) -> None:
        """Gauges, once a version."""
        HORIZON.labels("trainer").set(self._horizon_ms / 1000)
        if known := [lane.state.watermark_ms for lane in self._reader.lanes.values() if lane.state.watermark_ms >= 0]:
            WATERMARK.labels(self._config.topic("examples")).set(min(known) / 1000)
        self._meters.export()
