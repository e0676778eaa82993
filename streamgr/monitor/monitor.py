"""The monitor's life: a board that everything is folded into, and those who feed and show it.

    Faust       events, scores and dead letters; windowed tables that outlive the process; `<prefix>.freshness`
    follower    the manifests by the plain client, and all topics where Faust cannot be had (`monitor.engine`)
    scraper     the roles' /metrics, once a second
    canary      a marked event now and then, and how long until it is served
    page        the live page and its snapshots

The main thread runs Faust's event loop, or waits. Ready: the manifests are followed, and Faust has recovered its
tables. It needs no role to be up: what does not answer is shown as away. On SIGTERM the canary and the readers stop,
Faust commits what it has worked on and leaves its group, and the page closes last.
"""

from typing import Any

import msgspec

from streamgr.clock import Clock
from streamgr.config import Config
from streamgr.errors import ConfigError, TryAgain
from streamgr.kafka.producer import Producer
from streamgr.monitor.board import Board
from streamgr.monitor.canary import Canary
from streamgr.monitor.page import Page
from streamgr.monitor.plain import Follower
from streamgr.monitor.readings import Scraper, Target
from streamgr.service import Stop
from streamgr.telemetry import FRESHNESS_BUCKETS, Health, Log

TURN_SECONDS = 0.25


class Watch:
    """What the role and the demo share: the board, its readers and its page; no engine."""

    def __init__(self, config: Config, clock: Clock, log: Log, stop: Stop, *, title: str, everything: bool) -> None:
        """`everything`: the plain client brings all topics. Raises `ConfigError` (targets, port, target_seconds)."""
        monitor = config.monitor
        if monitor.target_seconds not in FRESHNESS_BUCKETS:
            edges = ", ".join(f"{edge:g}" for edge in FRESHNESS_BUCKETS)
            raise ConfigError(
                f"{monitor.target_seconds:g} is no edge of the histogram, so nobody could count what is within it",
                where="monitor.target_seconds",
                remedy=f"choose one of {edges}",
            )
        targets = [Target.of(text) for text in monitor.scrape]
        if len({target.name for target in targets}) < len(targets):
            raise ConfigError("two sources of one name", where="monitor.scrape", remedy="name them: NAME=URL")
        self._config, self._clock, self._log, self._stop = config, clock, log, stop
        self.board = Board(config, clock.now_ms(), title=title)
        self.follower = Follower(config, self.board, clock, log, stop, everything=everything)
        self._scraper = Scraper(
            targets,
            clock,
            log,
            every_seconds=monitor.scrape_seconds,
            timeout_seconds=monitor.scrape_timeout_seconds,
            answered=self.board.answered,
            silent=self.board.silent,
        )
        self._page = Page(monitor.host, monitor.port, clock, self._snapshot)
        self.port = self._page.port
        self._canary_stop = Stop()
        self._producer: Producer | None = None

    @property
    def failure(self) -> Exception | None:
        """What has ended a thread of ours for good."""
        return self.follower.failure or self._page.failure

    def start(self) -> None:
        """Page, scraper and follower; the canary has a start of its own."""
        self._page.start()
        self._scraper.start()
        self.follower.start()

    def start_canary(self) -> None:
        """Let canaries fly, if they are wanted: they are events of now, and stay away from logs of long ago."""
        if self._config.scorer.clock == "event":
            self._log.info("canary_off", "scorer.clock is event: an event of now would move the watermark of a replay")
        elif self._config.monitor.canary_seconds > 0:
            self._producer = Producer(
                self._config.kafka, client_id="streamgr-monitor", log=self._log, stop=self._canary_stop
            )
            topic, board = self._config.topic("events"), self.board
            Canary(
                self._config.monitor,
                topic,
                self._producer,
                clock=self._clock,
                log=self._log,
                stop=self._canary_stop,
                seen=board.canary,
            ).start()

    def stop_canary(self) -> None:
        """No more canaries; the last one is given up."""
        self._canary_stop.set()

    def close(self) -> None:
        """Stop all of it. The follower ends by the common `stop`, which must be set."""
        self._canary_stop.set()
        self.follower.close()
        self._scraper.close()
        if self._producer is not None:
            self._producer.close()
        self._page.close()

    def _snapshot(self) -> dict[str, Any]:
        now_ms = self._clock.now_ms()
        self.board.tick(now_ms)
        return self.board.snapshot(now_ms)


class Monitor:
    """The role. `run` returns after a drained stop and raises what made it impossible to go on."""

    def __init__(self, config: Config, clock: Clock, log: Log, health: Health, stop: Stop) -> None:
        self._config, self._clock, self._log, self._health, self._stop = config, clock, log, health, stop
        self._faust = config.monitor.engine == "faust"
        health.hold("manifests", "waiting for the broker")
        if self._faust:
            health.hold("tables", "waiting for the broker")

    def run(self) -> None:
        """Watch until told to stop."""
        if self._faust:  # first: what is missing or wrong there ends us before anything has begun
            from streamgr.monitor.app import Engine, credentials

            credentials(self._config.kafka)
        watch = Watch(self._config, self._clock, self._log, self._stop, title="streamgr", everything=not self._faust)
        watch.start()
        watch.start_canary()
        self._log.info("listening", host=self._config.monitor.host, port=watch.port)
        try:
            if self._faust:
                Engine(
                    self._config,
                    watch.board,
                    clock=self._clock,
                    log=self._log,
                    health=self._health,
                    stop=self._stop,
                    look=lambda: self._look(watch),
                ).run()
            else:
                self._wait(watch)
        finally:
            self._stop.set()
            watch.close()
        if failure := watch.failure:
            raise failure

    def _look(self, watch: Watch) -> None:
        """Once a turn: the health of the others is ours."""
        if watch.follower.following:
            self._health.hold("manifests")
        if watch.failure is not None:
            self._stop.set()
        elif self._clock.monotonic() - watch.follower.turned < Health.STALL_SECONDS:
            self._health.turned()

    def _wait(self, watch: Watch) -> None:
        """The plain engine: the follower does the work, this publishes the summaries."""
        producer = Producer(self._config.kafka, client_id="streamgr-monitor", log=self._log, stop=self._stop)
        due = self._clock.monotonic() + self._config.monitor.publish_seconds
        try:
            while not self._stop.wait(TURN_SECONDS):
                self._look(watch)
                if self._clock.monotonic() >= due:
                    due += self._config.monitor.publish_seconds
                    record = msgspec.json.encode(watch.board.summary(self._clock.now_ms()))
                    producer.send(self._config.topic("freshness"), record, key=b"summary")
            producer.confirm(2.0)
        except TryAgain as error:
            self._log.warning("summary_lost", str(error))
        finally:
            producer.close()
