"""`streamgr produce`: a file's events into the events topic, in the file's order, at its own pace or faster.

The file's clock is carried by heartbeats to every partition, so that the watermark of a partition whose users are
silent moves too: as event time goes on and, when paced, while it waits for the next event. A file that turns out not to
be in time order (by more than the lateness) has no clock to tell: it gets no more of them. `sequence.max_step_seconds`
limits how far one record moves a watermark; a longer gap is crossed in as many heartbeats. `--close` ends with
heartbeats that lie past everything still open: last event + window + lateness + step.

Keys are the users, so Kafka's murmur2 puts a user into one partition. No timestamp is ever set: freshness starts at the
broker's clock. An event that is published again changes nothing, so after any error the remedy is to run it again.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from streamgr import config as configuration
from streamgr.clock import Clock, SystemClock, milliseconds
from streamgr.config import Config
from streamgr.errors import TryAgain, UsageError
from streamgr.events import Heartbeat, heartbeat
from streamgr.kafka import topics
from streamgr.kafka.producer import ONE_SHOT_QUEUE_SECONDS, Producer
from streamgr.lab.datasets import Dataset, Row
from streamgr.service import Stop

LINGER_SECONDS = 0.02
BEAT_SECONDS = 0.2  # paced: wall time from one round of heartbeats to the next
EVENTS_A_BEAT = 10  # as fast as possible: events a partition before the next round


class Sender(Protocol):
    """What is needed of `kafka.producer.Producer`."""

    def send(
        self, topic: str, value: bytes | None, *, key: bytes | None = None, partition: int | None = None
    ) -> None: ...

    def confirm(self, timeout: float | None = None) -> None: ...


@dataclass(slots=True)
class Published:
    """What went out. `heartbeats` counts records; times are event times in ms, -1 where there was no event."""

    events: int = 0
    heartbeats: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    kinds: list[str] = field(default_factory=list)
    first_ms: int = -1
    last_ms: int = -1
    seconds: float = 0.0


def publish(
    config: Config,
    dataset: Dataset,
    sender: Sender,
    partitions: int,
    *,
    speed: float = 0.0,
    close: bool = False,
    clock: Clock,
    stop: Stop,
    progress: Callable[[int], None] = lambda events: None,
) -> Published:
    """Send every event of `dataset`; return when all of it is acknowledged.

    speed: seconds of event time per second, 0 = as fast as possible. Memory is bounded by the producer's queue, which
    holds `send` up. Raises `DataError` on a bad row (what was sent before it stays sent) and `TryAgain` when told to
    stop or when the broker takes nothing any more.
    """
    return _Publication(config, dataset, sender, partitions, speed=speed, clock=clock, stop=stop).run(close, progress)


class _Publication:
    def __init__(
        self,
        config: Config,
        dataset: Dataset,
        sender: Sender,
        partitions: int,
        *,
        speed: float,
        clock: Clock,
        stop: Stop,
    ) -> None:
        self._dataset, self._sender, self._partitions = dataset, sender, partitions
        self._topic, self._speed = config.topic("events"), speed
        self._clock, self._stop = clock, stop
        settings = config.sequence
        self._closing_ms = closing_ms(settings)
        self._max_step_ms = milliseconds(settings.max_step_seconds)
        self._lateness_ms = milliseconds(settings.lateness_seconds)
        beat_seconds = BEAT_SECONDS * speed if speed else settings.attribution_window_seconds
        self._beat_ms = max(milliseconds(settings.close_step_seconds), milliseconds(beat_seconds))
        self._beat_events = 0 if speed else EVENTS_A_BEAT * partitions
        self._beaten_ms, self._since_beat, self._in_order = -1, 0, True
        self._done = Published()

    def run(self, close: bool, progress: Callable[[int], None]) -> Published:
        started, done = self._clock.monotonic(), self._done
        try:
            for row in self._dataset.rows():
                if done.first_ms < 0:
                    done.first_ms, self._beaten_ms = row.event.time, row.event.time
                self._keep_pace(started, row.event.time)
                self._send(row)
                if done.events % 256 == 0:
                    progress(done.events)
        finally:
            done.skipped, done.kinds = dict(self._dataset.skipped), list(self._dataset.kinds)
            self._sender.confirm()
        if close and done.last_ms >= 0:
            self._round(self._through(max(done.last_ms, self._beaten_ms) + self._closing_ms))
            self._sender.confirm()
        progress(done.events)
        done.seconds = self._clock.monotonic() - started
        return done

    def _send(self, row: Row) -> None:
        done = self._done
        self._in_order = self._in_order and row.event.time >= done.last_ms - self._lateness_ms
        done.last_ms = max(done.last_ms, row.event.time)
        if isinstance(row.event, Heartbeat):
            self._round([row.event.time])
            return
        self._sender.send(self._topic, row.value, key=row.key)
        done.events += 1
        self._since_beat += 1

    def _keep_pace(self, started: float, time: int) -> None:
        """Wait until `time` is due, with heartbeats as event time goes by; none of them lies past `time`."""
        while not self._stop:
            now = time
            if self._speed:
                elapsed_ms = (self._clock.monotonic() - started) * 1000 * self._speed
                now = min(time, self._done.first_ms + int(elapsed_ms))
            due = now - self._beaten_ms >= self._beat_ms and self._since_beat >= self._beat_events
            if due and self._in_order:
                self._round(self._through(now))
            if now >= time:
                return
            self._stop.wait(min(BEAT_SECONDS, (time - now) / 1000 / self._speed))
        raise TryAgain(
            f"told to stop after {self._done.events} events",
            where=str(self._dataset.path),
            remedy="run it again: events that are published twice change nothing",
        )

    def _through(self, time: int) -> Iterator[int]:
        """Heartbeat times from the last round up to `time`, no farther apart than one record may move a watermark."""
        if self._max_step_ms:
            yield from range(self._beaten_ms + self._max_step_ms, time, self._max_step_ms)
        yield time

    def _round(self, times: "Iterator[int] | list[int]") -> None:
        """Heartbeats of these times to every partition."""
        for time in times:
            value = heartbeat(time)
            for partition in range(self._partitions):
                self._sender.send(self._topic, value, partition=partition)
            self._done.heartbeats += self._partitions
            self._beaten_ms = max(self._beaten_ms, time)
        self._since_beat = 0


def closing_ms(settings: configuration.Sequence) -> int:
    """How far past an event a heartbeat must lie to close its label: window + lateness + one step (ms)."""
    seconds = (settings.attribution_window_seconds, settings.lateness_seconds, settings.close_step_seconds)
    return sum(map(milliseconds, seconds))


def run(config: Config, args: argparse.Namespace) -> int:
    """The command: args.file, .mapping, .column (FIELD=COLUMN), .speed, .close, .skip_bad_rows."""
    if args.speed < 0:
        raise UsageError(
            f"--speed {args.speed} is negative", remedy="0 is as fast as possible, 1 is the log's own pace"
        )
    clock, stop = SystemClock(), Stop().on_signals()
    dataset = Dataset(Path(args.file), args.mapping, columns(args.column), skip_bad_rows=args.skip_bad_rows)
    partitions = topics.identity(config.kafka, config.topic("events")).partitions
    producer = Producer(
        config.kafka,
        client_id="streamgr-produce",
        linger_seconds=LINGER_SECONDS,
        stop=stop,
        queue_seconds=ONE_SHOT_QUEUE_SECONDS,
    )
    console = Console(stderr=True)
    try:
        with Bar(console, dataset, f"{dataset.path.name} ({dataset.layout.name})") as progress:
            done = publish(
                config,
                dataset,
                producer,
                partitions,
                speed=args.speed,
                close=args.close,
                clock=clock,
                stop=stop,
                progress=progress,
            )
    finally:
        producer.close()
    if unknown := [kind for kind in done.kinds if kind not in config.sequence.actions]:
        print(
            f"streamgr: sequence.actions lacks {', '.join(unknown)}: sequencers with this configuration put them to "
            f"the dead letters; remedy: set sequence.actions = {[*config.sequence.actions, *unknown]}",
            file=sys.stderr,
        )
    for reason, count in done.skipped.items():
        print(f"streamgr: {count} rows skipped: {reason}", file=sys.stderr)
    print(f"{done.events} events and {done.heartbeats} heartbeats published in {done.seconds:.1f} s")
    return 0


def columns(options: list[str]) -> dict[str, str]:
    """`--column FIELD=COLUMN` options as field → column."""
    parsed = {}
    for option in options:
        name, equals, column = option.partition("=")
        if not equals or not name or not column:
            raise UsageError(f"--column wants FIELD=COLUMN, got {option!r}")
        parsed[name] = column
    return parsed


class Bar:
    """A progress bar by bytes read on a terminal, nothing elsewhere; as a context it gives the function to call."""

    def __init__(self, console: Console, dataset: Dataset, title: str) -> None:
        self._dataset = dataset
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[events]} events"),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(title, total=max(1, dataset.size_bytes), events=0)

    def __enter__(self) -> Callable[[int], None]:
        self._bar.start()
        return lambda events: self._bar.update(self._task, completed=self._dataset.read_bytes, events=events)

    def __exit__(self, *exc: object) -> None:
        self._bar.stop()
