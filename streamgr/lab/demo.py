"""`streamgr demo`: the whole loop on one machine, as the processes it consists of, watched and measured.

    broker (embedded, or --bootstrap) ─ topics ─ sequencer, trainer, scorer ─ feed (for --replay: `replay.py`)

The demo itself does nothing for the stream: it starts the real commands with a generated configuration in a temporary
directory, reads their /metrics, compares models beside them (`observer.py`), and serves the monitor's live page, whose
board it feeds by the plain client. N seconds count from the first event;
then the feed stops and closes every label, the sequencer and the trainer work off what is left, the scorer serves the
last version, and everything is stopped within 15 s more. Whatever happens, no process and no file is left behind.
"""

import argparse
import math
import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec
from rich.console import Console
from rich.live import Live

from streamgr import scrape
from streamgr.clock import Clock, Deadline, SystemClock
from streamgr.config import Config
from streamgr.errors import ConfigError, StreamgrError
from streamgr.kafka import topics
from streamgr.kafka.embedded import EmbeddedBroker
from streamgr.lab import report, stage
from streamgr.lab.children import Child, Children
from streamgr.lab.datasets import Dataset
from streamgr.lab.replay import Replay
from streamgr.lab.report import Figures
from streamgr.monitor.monitor import Watch
from streamgr.service import Stop
from streamgr.telemetry import Log

READY_SECONDS = 90.0
AFTER_SECONDS = 15.0  # after the N: everything must be over
STOP_SECONDS = 5.0  # of these, kept for stopping the processes
LOOK_SECONDS = 1.0
LINE_SECONDS = 5.0
CALM_SECONDS = 0.75  # nothing new for so long: worked off


class Interrupted(StreamgrError):
    """Told to stop before there was anything to sum up."""

    exit_code = 130


def run(config: Config, origin: dict[str, str], args: argparse.Namespace) -> int:
    """The command; returns its exit code. `origin` names the keys set by hand: they win over the profile.

    Raises `StreamgrError` when a process dies, the wait for readiness ends, or the configuration does not do.
    """
    if args.seconds is not None and not (math.isfinite(args.seconds) and args.seconds > 0):
        raise ConfigError(f"{args.seconds} is not a length of time", where="--seconds", remedy="use a positive number")
    if args.replay and not Path(args.replay).is_file():
        raise ConfigError("no such file", where=args.replay, remedy="name a log to replay")
    settings = stage.profile("replay" if args.replay else "demo", config, origin)
    stop, console = Stop().on_signals(), Console(stderr=True, highlight=False)
    with ExitStack() as stack:
        demo = Demo(settings, args, SystemClock(), stop=stop, console=console, stack=stack)
        demo.start()
        demo.watch()
        figures = demo.drain()
    console.print(report.summary_text(figures), soft_wrap=True)
    if args.json:
        print(msgspec.json.encode(report.summary_json(figures)).decode(), flush=True)
    return Interrupted.exit_code if stop and args.seconds is not None else 0


class Demo:
    """One run: `start`, `watch` until the feed has ended, `drain`."""

    def __init__(
        self, config: Config, args: argparse.Namespace, clock: Clock, *, stop: Stop, console: Console, stack: ExitStack
    ) -> None:
        """Everything that has to be undone is put on `stack`."""
        self._config, self._clock, self._stop, self._console = config, clock, stop, console
        self._stack, self._args = stack, args
        self._seconds: float | None = args.seconds
        self._replay = Path(args.replay) if args.replay else None
        self._directory = Path(stack.enter_context(TemporaryDirectory(prefix="streamgr-demo-")))
        self._survey: stage.Survey | None = None
        self._feed: Child | Replay | None = None
        self._state, self._since = (0, 0, 0), clock.monotonic()

    # -- start

    def start(self) -> None:
        """Broker, topics, roles, readiness, and then the feed."""
        if self._replay is not None:
            self._survey = stage.survey(self._replay, self._args.mapping)
            self._config = self._survey.fit(self._config)
        self._broker = self._find_broker()
        config = self._with_topics(self._broker)
        self._stage = stage.build(config, self._directory)
        self._say(f"broker: {self._broker.description}")
        self._say(f"events: {self._source()}, on {config.kafka.topic_prefix}.*")
        self._say(f"scorer: http://{self._stage.scorer}/docs")
        self._start_watch()
        self._children = self._stack.enter_context(Children(self._directory, self._clock, os.environ))
        for role in stage.ROLES:
            self._children.start(role, "-m", "streamgr", role, "--config", self._stage.files[role], is_role=True)
        self._start_observer()
        self._await("the roles to be ready", self._not_ready)
        self._feed = self._start_feed()
        self._await("the first event", self._no_event_yet)
        self._first = self._clock.monotonic()
        self._observer.begin()
        self._watch.start_canary()

    def _find_broker(self) -> EmbeddedBroker:
        if self._args.bootstrap:
            told = f"{self._args.bootstrap}, not ours: the topics and records stay there when the demo ends"
            return EmbeddedBroker(self._args.bootstrap, "kafka", told, lambda: None)
        with self._console.status("starting a broker"):
            return self._stack.enter_context(EmbeddedBroker.start(self._directory / "broker"))

    def _with_topics(self, broker: EmbeddedBroker) -> Config:
        """The configuration for this broker, its topics created; on somebody's broker, never on used ones."""
        change, kafka = msgspec.structs.replace, self._config.kafka
        config = change(self._config, kafka=change(kafka, bootstrap=broker.bootstrap))
        if self._args.bootstrap and stage.in_use(config):
            own = f"{kafka.topic_prefix}-demo-{self._clock.now_ms():x}"
            self._say(f"{kafka.topic_prefix}.* hold records already: this run uses topics of its own")
            config = change(config, kafka=change(config.kafka, topic_prefix=own))
        topics.ensure(config.kafka)
        return config

    def _source(self) -> str:
        if self._replay is not None:
            return str(self._replay)
        return f"a simulator's, {self._config.feed.rate:g} a second by {self._config.feed.users} users"

    def _start_watch(self) -> None:
        """The live page, and what feeds it."""
        config, ended = self._stage.config, Stop()
        log = Log("demo", msgspec.structs.replace(config.telemetry, log_level="error"), self._clock)
        self._watch = Watch(config, self._clock, log, ended, title="streamgr demo", everything=True)
        self._stack.callback(self._watch.close)
        self._stack.callback(ended.set)
        self._watch.start()
        self._say(f"live page: http://{config.monitor.host}:{self._watch.port}/")

    def _start_observer(self) -> None:
        # imported while the roles start: these load torch
        from streamgr.lab.compare import Plan
        from streamgr.lab.instruments import Instruments
        from streamgr.lab.observer import Observer

        config = self._stage.config
        delay = config.sequence.attribution_window_seconds + config.sequence.lateness_seconds
        self._observer = Observer(
            config,
            self._clock,
            Log("demo", msgspec.structs.replace(config.telemetry, log_level="error"), self._clock),
            plan=Plan(
                seconds=self._seconds,
                label_delay_seconds=0.0 if self._replay else delay,
                targets=self._survey.targets if self._survey else None,
            ),
            predictions=self._stage.predictions,
            truth=None if self._replay else self._stage.truth,
        )
        self._stack.callback(self._observer.close)
        self._observer.start()
        self._instruments = Instruments(self._stage, self._clock, self._observer, simulated=self._replay is None)

    def _start_feed(self) -> Child | Replay:
        if self._replay is not None:
            dataset = Dataset(self._replay, self._args.mapping)
            return Replay(self._stage.config, dataset, self._args.speed, self._clock, self._on_their_way).start()
        file = ["--config", self._stage.files["feed"]]
        how = ["--scorer", self._stage.scorer, "--oracle", str(self._stage.truth)]
        how += [] if self._seconds is None else ["--seconds", str(self._seconds)]
        return self._children.start("feed", "-m", "streamgr", "feed", *file, *how, is_role=False)

    def _on_their_way(self, sent: int) -> int:
        """Of the events sent: how many are not yet in sequences, or closed and not yet learned."""
        sequencer = scrape.metrics(self._stage.ports["sequencer"]) or scrape.Metrics()
        done = scrape.events(sequencer) + sequencer.count("deadletters_total") + sequencer.count("duplicates_total")
        return max(sent - done, self._observer.targets_emitted - self._observer.comparison.learned)

    def _await(self, what: str, waiting: Callable[[], str]) -> None:
        """Wait until `waiting` has no more reasons to; they are shown, and the wait is bounded."""
        deadline, why = Deadline(self._clock, READY_SECONDS), "starting"
        with self._console.status(f"waiting for {what}") as status:
            while why:
                self._check()
                if self._stop:
                    raise Interrupted("stopped before the first event")
                if deadline.passed():
                    remedy = "run it again on an idle machine; if it repeats, start the roles by hand to see more"
                    raise StreamgrError(f"{what} did not come within {READY_SECONDS:.0f} s: {why}", remedy=remedy)
                if why := waiting():
                    status.update(f"waiting for {what}: {why}")
                    self._stop.wait(0.1)

    def _not_ready(self) -> str:
        waiting = {role: scrape.why_not_ready(self._stage.ports[role]) for role in stage.ROLES}
        return "; ".join(f"{role} ({why})" for role, why in waiting.items() if why)

    def _no_event_yet(self) -> str:
        if self._replay is not None:
            sequencer = scrape.metrics(self._stage.ports["sequencer"])
            done = (self._feed is not None and self._feed.exit_code is not None) or (
                sequencer and scrape.events(sequencer)
            )
            return "" if done else "the log is being read"
        feed = scrape.metrics(self._stage.ports["feed"])
        return "" if feed and feed.total("feed_first_event_timestamp_seconds") else "the feed is starting"

    # -- watch

    def watch(self) -> None:
        """Show what happens until the feed has ended, the time is over, or somebody ends us."""
        title = "streamgr demo" + ("" if self._seconds is None else f", {self._seconds:g} s")
        page = f"http://{self._stage.config.monitor.host}:{self._watch.port}/"
        note = f"live page: {page}; {self._broker.description}; http://{self._stage.scorer}/docs; Ctrl-C ends it"
        next_line = LINE_SECONDS
        with Live(console=self._console, auto_refresh=False) if self._console.is_terminal else ExitStack() as live:
            while not self._stop and not self._fed():
                self._stop.wait(LOOK_SECONDS)
                self._check()
                figures = self._instruments.read(self._elapsed(), lately=True)
                self._show(figures)
                if isinstance(live, Live):
                    live.update(report.screen(figures, title, note), refresh=True)
                elif figures.seconds >= next_line:
                    next_line += LINE_SECONDS
                    self._say(report.line(figures))

    def _show(self, figures: Figures) -> None:
        """What only the demo knows: the models side by side."""
        compared = {"normalized_entropy": figures.normalized_entropy, "hit_rate_at_10": figures.hit_rate}
        self._watch.board.compare(compared, self._clock.now_ms())

    def _fed(self) -> bool:
        """Whether the feed has ended; a replay may also run out of time, or out of events and of work."""
        overtime = 0.0 if self._replay else AFTER_SECONDS / 3  # the feed keeps its time by itself
        if self._seconds is not None and self._elapsed() > self._seconds + overtime:
            return True
        ended = self._feed is None or self._feed.exit_code is not None
        return ended and (self._seconds is not None or self._worked_off())

    def _elapsed(self) -> float:
        return self._clock.monotonic() - self._first

    def _check(self) -> None:
        """Raise what has gone wrong in a child or in the comparison."""
        self._children.check()
        for failure in (self._observer.failure, self._watch.failure):
            if failure is not None:
                raise failure
        if isinstance(self._feed, Replay) and self._feed.failure is not None:
            raise self._feed.failure

    def _say(self, text: str) -> None:
        self._console.print(text, soft_wrap=True, markup=False)

    # -- drain

    def drain(self) -> Figures:
        """Stop the feed, let what was sent be learned and served, stop the roles; the final figures."""
        seconds = self._elapsed() if self._seconds is None else min(self._seconds, self._elapsed())
        left = AFTER_SECONDS - STOP_SECONDS
        if self._seconds is not None:
            left = max(2.0, self._seconds + left - self._elapsed())
        over = Deadline(self._clock, left)
        self._watch.stop_canary()
        if self._feed is not None:
            self._feed.stop(Deadline(self._clock, min(3.0, left)))
        with self._console.status("learning and serving what is left"):
            self._wait(over, self._worked_off)
            served = Deadline(self._clock, min(over.remaining(), self._stage.config.trainer.publish_seconds + 1.5))
            self._wait(served, self._served)
        if not self._worked_off():
            self._say("the roles did not work everything off in time; the figures say how far they came")
        figures = self._instruments.read(seconds, lately=False)
        self._observer.close()
        with self._console.status("stopping"):
            for name in self._children.stop(STOP_SECONDS - 1):
                self._say(f"the {name} did not leave in time and was killed")
        return figures

    def _wait(self, deadline: Deadline, done: Callable[[], bool]) -> None:
        pause = Stop()  # somebody's Ctrl-C has ended the feed; what is left is still worked off
        while not deadline.passed() and not done():
            self._check()
            pause.wait(0.2)

    def _worked_off(self) -> bool:
        """Whether every target that the sequencer has sent is learned, and nothing new has come for a while."""
        figures = self._instruments.read(self._elapsed(), lately=True)
        state = (figures.events, self._observer.targets_emitted, figures.targets_learned)
        if state != self._state or any(figures.lag.values()):
            self._state, self._since = state, self._clock.monotonic()
        calm = self._clock.monotonic() - self._since >= CALM_SECONDS
        return calm and figures.targets_learned == self._observer.targets_emitted

    def _served(self) -> bool:
        """Whether the scorer serves weights that know every target learned."""
        figures = self._instruments.read(self._elapsed(), lately=True)
        return figures.served >= figures.targets_learned
