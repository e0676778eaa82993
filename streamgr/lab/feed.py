"""The simulated site: asks the scorer what to show, shows it to a simulated user, and publishes what happens.

One process, one loop at wall time: heartbeats and drawn actions go out when they are due, and a slate is shown whenever
fewer events than `feed.rate` allows have been sent. The loop is closed: the ranking comes from `POST /v1/rank`. Three
things it never does: wait long for the scorer (then a random order is shown, counted by reason), build up a debt after
a stall, or run away from the trainer (when the served weights are `feed.max_model_age_seconds` old it shows nothing and
only beats, until a fresh answer comes; the mock broker keeps about 5 MB a partition).

The true probabilities go to a side file, a JSON line a slate, before the events are sent; nobody but the comparison
reads it. After `--seconds` no slate is shown, drawn actions are still sent, and one heartbeat far enough ahead closes
every open label.

    streamgr feed --config demo.toml --scorer 127.0.0.1:8080 --seconds 60 --oracle oracle.jsonl
"""

import argparse
import heapq
import http.client
import json
import os
import socket
import ssl
from collections.abc import Callable
from typing import BinaryIO, NamedTuple, Protocol

import msgspec

from streamgr.clock import Clock, SystemClock, milliseconds
from streamgr.config import Config
from streamgr.errors import BrokerUnreachable, ConfigError, StreamgrError, TryAgain
from streamgr.events import heartbeat
from streamgr.lab.produce import closing_ms
from streamgr.lab.simulator import Shown, World
from streamgr.service import Stop
from streamgr.telemetry import Health, Log, Probes, announce, counter, gauge

SENT = counter("feed_events", "Events published, by type.", ("kind",))
RANKED = counter("feed_rankings", "Slates, by where their order came from.", ("source",))
WAITS = counter("feed_waits", "Times the feed waited for the trainer.")
FIRST = gauge("feed_first_event_timestamp_seconds", "When the first event was sent; 0 before.")
CLOSED = gauge("feed_closed", "1 when everything is sent and every label closed.")
for _kind in ("impression", "action"):
    SENT.labels(_kind)
SOURCES = ("scorer", "untaught", "no_weights", "slow", "unreachable", "refused", "behind")
for _source in SOURCES:
    RANKED.labels(_source)

TICK_SECONDS = 0.01
DEBT_SECONDS = 1.0  # events that a stall kept back for longer than this are never sent
BREAK_SECONDS = 0.5  # after a slow, missing or worthless answer the scorer is left alone for so long
REST_SECONDS = 1.5  # a user comes back after this at the earliest, if there is anybody else


class Publisher(Protocol):
    """What the feed needs of `kafka.producer.Producer`."""

    def send(
        self, topic: str, value: bytes | None, *, key: bytes | None = None, partition: int | None = None
    ) -> None: ...

    def confirm(self, timeout: float | None = None) -> None: ...


class Ranking(NamedTuple):
    """Where an order came from, the order (empty unless from the scorer), and how old the weights were."""

    source: str
    items: list[str]
    age_seconds: float = 0.0


class Ranker:
    """Asks a scorer over one kept connection, and leaves it alone for a moment when it is slow."""

    def __init__(
        self, address: str, timeout_seconds: float, clock: Clock, *, token: str = "", certificate: str = ""
    ) -> None:
        """token: the scorer's, "" for none. certificate: the PEM file of the one that a scorer with TLS shows."""
        host, _, port = address.rpartition(":")
        if not host or not port.isdecimal():
            raise ConfigError(f"{address!r} is not HOST:PORT", where="--scorer")
        if certificate:
            trusted = ssl.create_default_context(cafile=certificate)
            self._connection: http.client.HTTPConnection = http.client.HTTPSConnection(
                host, int(port), timeout=timeout_seconds, context=trusted
            )
        else:
            self._connection = http.client.HTTPConnection(host, int(port), timeout=timeout_seconds)
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
        self._clock, self._started = clock, clock.monotonic()
        self._broken_until, self._broken = 0.0, Ranking("", [])

    def ask(self, user: str, candidates: list[str]) -> Ranking:
        """The candidates, best first; no items and the reason when there is no answer in time."""
        if self._clock.monotonic() < self._broken_until:
            return self._broken
        try:
            body = msgspec.json.encode({"user_id": user, "candidates": candidates})
            self._connection.request("POST", "/v1/rank", body, self._headers)
            answer = self._connection.getresponse()
            content = answer.read()
            if answer.status == 200:
                told = msgspec.json.decode(content)
                age, elapsed = float(told["model_age_seconds"]), self._clock.monotonic() - self._started
                if age > elapsed:  # weights from before our first event: no better than random
                    return self._leave_alone("untaught", elapsed)
                return Ranking("scorer", [item["item_id"] for item in told["items"]], age)
            return self._leave_alone("no_weights" if b"no_weights" in content else "refused")
        except TimeoutError:
            self._connection.close()  # or the late answer would be taken for that of the next request
            return self._leave_alone("slow")
        except (OSError, http.client.HTTPException):
            self._connection.close()
            return self._leave_alone("unreachable")

    def close(self) -> None:
        self._connection.close()

    def _leave_alone(self, source: str, age_seconds: float = 0.0) -> Ranking:
        self._broken_until = self._clock.monotonic() + BREAK_SECONDS
        self._broken = Ranking(source, [], age_seconds)
        return self._broken


class Feed:
    """The loop; `run` ends after `seconds` of events, or when told to stop."""

    def __init__(
        self,
        config: Config,
        clock: Clock,
        health: Health,
        stop: Stop,
        *,
        publisher: Publisher,
        partitions: int,
        ask: Callable[[str, list[str]], Ranking],
        oracle: BinaryIO,
    ) -> None:
        if missing := {"click", "like"} - set(config.sequence.actions):
            raise ConfigError(
                f"the simulator's users click and like; {sorted(missing)} is missing",
                where="sequence.actions",
                remedy="keep the default kinds for the demo, or --replay a log of your own",
            )
        self._config, self._settings = config, config.feed
        self._clock, self._health, self._stop = clock, health, stop
        self._publisher, self._partitions, self._ask, self._oracle = publisher, partitions, ask, oracle
        self._topic = config.topic("events")
        self._due: list[tuple[int, int, str, bytes]] = []  # a heap of drawn actions: (ms, number, user, value)
        self._rested: dict[str, int] = {}
        self._beat_ms = self._requests = self._events = 0

    def run(self, seconds: float | None) -> int:
        """Feed until the end; returns how many events were sent (heartbeats excluded)."""
        start_ms = self._clock.now_ms()
        world = World(self._settings, start_ms)
        end_ms = None if seconds is None else start_ms + milliseconds(seconds)
        paid_ms = start_ms  # the time whose events have been sent
        FIRST.set(start_ms / 1000)
        while not self._stop:
            now_ms = self._clock.now_ms()
            self._health.turned()
            self._beat(now_ms)
            self._act(now_ms)
            if end_ms is not None and now_ms >= end_ms:
                if not self._due:
                    break
            else:
                paid_ms = max(paid_ms, now_ms - milliseconds(DEBT_SECONDS))
                if paid_ms <= now_ms:
                    sent = self._show(world, now_ms, behind=now_ms - paid_ms > DEBT_SECONDS * 500)
                    paid_ms = paid_ms + round(sent * 1000 / self._settings.rate) if sent else now_ms
                    continue
            self._stop.wait(TICK_SECONDS)
        self._close()
        return self._events

    def _show(self, world: World, now_ms: int, *, behind: bool) -> int:
        """One slate for one user; returns the events it makes (actions included), 0 while the trainer is behind."""
        world.advance(now_ms)
        user = self._next_user(world, now_ms)
        candidates = world.candidates(self._settings.candidates)
        ranking = Ranking("behind", []) if behind else self._ask(user, candidates)
        if ranking.age_seconds > self._settings.max_model_age_seconds:
            WAITS.inc()
            self._stop.wait(self._settings.heartbeat_seconds)
            return 0
        RANKED.labels(ranking.source).inc()
        now_ms = self._clock.now_ms()  # shown when the answer is here
        self._rested[user] = now_ms + milliseconds(REST_SECONDS)
        shown = world.show(user, world.slate(ranking.items or candidates, self._settings.explore), now_ms)
        return self._publish(user, shown, now_ms)

    def _publish(self, user: str, shown: list[Shown], now_ms: int) -> int:
        self._requests += 1
        request = f"r{self._requests}"
        ids = [f"{request}.{one.position}" for one in shown]
        self._oracle.write(json.dumps({event: one.p for event, one in zip(ids, shown, strict=True)}).encode() + b"\n")
        self._oracle.flush()
        events = 0
        for event, one in zip(ids, shown, strict=True):
            common = {"user_id": user, "item_id": one.item_id, "request_id": request}
            impression = {"type": "impression", "event_id": event, "event_time": now_ms, "position": one.position}
            self._send("impression", user, msgspec.json.encode(impression | common))
            for kind, time_ms in one.actions:
                action = {"type": kind, "event_id": f"{event}.{kind}", "event_time": time_ms}
                heapq.heappush(self._due, (time_ms, self._requests, user, msgspec.json.encode(action | common)))
            events += 1 + len(one.actions)
        return events

    def _act(self, now_ms: int) -> None:
        """Send the drawn actions whose time has come."""
        while self._due and self._due[0][0] <= now_ms:
            _, _, user, value = heapq.heappop(self._due)
            self._send("action", user, value)

    def _beat(self, now_ms: int) -> None:
        """A heartbeat to every partition, when it is time."""
        if now_ms - self._beat_ms >= self._settings.heartbeat_seconds * 1000:
            self._beat_ms = now_ms
            beat = heartbeat(now_ms)
            for partition in range(self._partitions):
                self._publisher.send(self._topic, beat, partition=partition)

    def _close(self) -> None:
        """Close every open label: the watermark must pass the last event by window, lateness and a step."""
        sequence, now_ms = self._config.sequence, self._clock.now_ms()
        self._act(now_ms + milliseconds(self._settings.act_within_seconds))  # told to stop: send what is left
        beat = heartbeat(now_ms + closing_ms(sequence) + milliseconds(sequence.close_step_seconds))
        for partition in range(self._partitions):
            self._publisher.send(self._topic, beat, partition=partition)
        self._publisher.confirm(timeout=10.0)
        CLOSED.set(1)

    def _next_user(self, world: World, now_ms: int) -> str:
        """Somebody who has not been here just now, unless everybody has."""
        for _ in range(10):
            if self._rested.get(user := world.visitor(), 0) <= now_ms:
                break
        return user

    def _send(self, kind: str, user: str, value: bytes) -> None:
        self._publisher.send(self._topic, value, key=user.encode())
        SENT.labels(kind).inc()
        self._events += 1


def run(config: Config, args: argparse.Namespace) -> int:
    """The command; returns its exit code. Told to stop, it sends what is drawn, closes every label and leaves."""
    from streamgr.kafka.producer import Producer
    from streamgr.kafka.topics import identity

    clock, stop = SystemClock(), Stop().on_signals()
    log, health = Log("feed", config.telemetry, clock), Health("feed", clock)
    announce("feed")
    probes = Probes(config.telemetry, health)
    try:
        ranker = Ranker(
            args.scorer,
            config.feed.rank_timeout_seconds,
            clock,
            token=config.scorer.token,
            certificate=config.scorer.tls_certificate,
        )
        partitions = identity(config.kafka, config.topic("events")).partitions
        name = f"feed-{socket.gethostname()}"
        publisher = Producer(config.kafka, client_id=name, log=log, stop=stop, waiting=health.turned)
        with open(args.oracle or os.devnull, "wb") as oracle:
            feed = Feed(
                config, clock, health, stop, publisher=publisher, partitions=partitions, ask=ranker.ask, oracle=oracle
            )
            events = feed.run(args.seconds)
        ranker.close()
        publisher.close()
    except StreamgrError as error:
        if stop and isinstance(error, BrokerUnreachable | TryAgain):  # told to leave while the broker was away
            log.warning("stopped_waiting", str(error))
            return 0
        log.error("stopped_by_error", str(error), exit_code=error.exit_code)
        return error.exit_code
    finally:
        probes.close()
    log.info("fed", "everything is sent and closed", events=events)
    return 0
