"""`streamgr evaluate`: one log through the real pipeline, and every model judged on the same targets of it.

The roles are the operator's own commands, run to the end of their input one after the other on one broker under a topic
prefix of their own: topics apply → produce --close → sequencer --until-end → trainer --until-end, which writes what it
predicted of each target before learning it. Then two checks that owe each other nothing: the census (every valid event
in exactly one sequence, counted straight from the file) and the verdict (`lab.judge`). Action kinds that the log has
and the configuration lacks are appended to `sequence.actions`.

The trainer reads examples in the order of their watermarks; "test, then train" is per step: a step's targets are all
predicted before any of them is learned. A backlog fills every step, and with the default `trainer.batch_tokens` one
step would be hours of a small log, in which items are born and forgotten; so steps are cut to at most `STEP_TOKENS`
here, nearer to what a live trainer takes. Baselines learn after every source record, which if anything favours them.
"""

import argparse
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from streamgr.clock import Clock, SystemClock
from streamgr.config import Config
from streamgr.errors import ConfigError, DataError, TryAgain, UsageError
from streamgr.kafka import topics
from streamgr.kafka.embedded import EmbeddedBroker
from streamgr.kafka.producer import ONE_SHOT_QUEUE_SECONDS, Producer
from streamgr.lab import census
from streamgr.lab.baselines import Baseline
from streamgr.lab.baselines.popularity import Popularity
from streamgr.lab.baselines.recency import Recency
from streamgr.lab.children import Children
from streamgr.lab.compare import read_rows
from streamgr.lab.datasets import Dataset
from streamgr.lab.judge import MODEL, judge
from streamgr.lab.produce import LINGER_SECONDS, publish
from streamgr.lab.stage import to_toml
from streamgr.sequence import views
from streamgr.service import Stop

Json = dict[str, Any]
BASELINES: Mapping[str, Callable[[list[str]], Baseline]] = {
    "popularity": Popularity,
    "popularity-1h": lambda actions: Popularity(actions, 3_600),
    "popularity-7d": lambda actions: Popularity(actions, 7 * 86_400),
    "recency": lambda actions: Recency(),
    "recency-global": lambda actions: Recency(own_items=0),
}
STEP_TOKENS = 256
WIDTH = 120  # of the tables where there is no terminal
MOCK_EVENTS = 2_000  # the mock broker forgets what is more than about 5 MB a partition


def evaluate(
    config: Config,
    dataset: Dataset,
    broker: EmbeddedBroker,
    directory: Path,
    models: list[str],
    *,
    clock: Clock,
    stop: Stop,
    say: Callable[[str], None],
) -> Json:
    """Run the pipeline in `directory` and judge `models`; the report as JSON (see `judge.Verdict.report`).

    Raises `ChildFailed` with the tail of its log where a role fails, `DataError` on a bad row, `TryAgain` when told to
    stop.
    """
    started = clock.monotonic()
    baselines = {name: BASELINES[name] for name in models if name != MODEL}
    events = sum(1 for _ in dataset.rows())
    if broker.kind == "mock" and events > MOCK_EVENTS:
        raise ConfigError(
            f"{events} events are too many for the mock broker",
            where=str(dataset.path),
            remedy="set KAFKA_HOME (with Java 17), or name a broker: --bootstrap HOST:PORT",
        )
    config = _own(config, dataset, broker, directory, clock)
    prefix, actions = config.kafka.topic_prefix, list(config.sequence.actions)
    topics.ensure(config.kafka)
    say(f"publishing {events} events to {prefix}.events")
    producer = Producer(
        config.kafka,
        client_id="streamgr-evaluate",
        linger_seconds=LINGER_SECONDS,
        stop=stop,
        queue_seconds=ONE_SHOT_QUEUE_SECONDS,
    )
    try:
        partitions = topics.identity(config.kafka, config.topic("events")).partitions
        published = publish(config, dataset, producer, partitions, close=True, clock=clock, stop=stop)
    finally:
        producer.close()
    seconds = {"produce": published.seconds}
    with Children(directory, clock, os.environ) as children:
        for role in ("sequencer", "trainer"):
            say(f"{role} --until-end")
            seconds[role] = _to_the_end(children, role, directory, clock, stop)
    say("counting and judging")
    found = census.take(dataset, views.export(Path(config.state.directory)))
    log = Path(config.trainer.prequential_log)
    with log.open("rb") as lines:
        rows = read_rows(lines, str(log))
    verdict = judge(rows, actions, {name: make(actions) for name, make in baselines.items()})
    return {
        "data": str(dataset.path),
        "mapping": dataset.layout.name,
        "broker": broker.description,
        "topic_prefix": prefix,
        "actions": actions,
        "models": models,
        "step_tokens": config.trainer.batch_tokens,
        "history_length": config.sequence.history_length,
        "events": published.events,
        "heartbeats": published.heartbeats,
        "skipped": published.skipped,
        "census": asdict(found) | {"exact": found.exact},
        "targets_learned_once": len(rows) == len({(r.partition, r.user, r.kind, r.time, r.event_id) for r in rows}),
        **verdict.report(),
        "seconds": {name: round(value, 1) for name, value in seconds.items()}
        | {"total": round(clock.monotonic() - started, 1)},
    }


def _own(config: Config, dataset: Dataset, broker: EmbeddedBroker, directory: Path, clock: Clock) -> Config:
    """The configuration of this run, also as `<directory>/config.toml`: own topics, own state, all the log's kinds."""
    change = msgspec.structs.replace
    extra = [kind for kind in dataset.kinds if kind not in config.sequence.actions]
    prefix = f"{config.kafka.topic_prefix}-evaluate-{clock.now_ms():x}"
    own = change(
        config,
        kafka=change(config.kafka, bootstrap=broker.bootstrap, topic_prefix=prefix),
        state=change(config.state, directory=str(directory / "state")),
        sequence=change(config.sequence, actions=(*config.sequence.actions, *extra)),
        trainer=change(
            config.trainer,
            batch_tokens=min(config.trainer.batch_tokens, STEP_TOKENS),
            prequential_log=str(directory / "predictions.jsonl"),
        ),
    )
    file = directory / "config.toml"
    file.touch(mode=0o600)  # it may hold a password
    file.write_text(to_toml(own))
    return own


def _to_the_end(children: Children, role: str, directory: Path, clock: Clock, stop: Stop) -> float:
    """Run a role to the end of its input; the seconds it took."""
    started = clock.monotonic()
    config = str(directory / "config.toml")
    child = children.start(role, "-m", "streamgr", role, "--until-end", "--config", config, is_role=False)
    while child.exit_code is None:
        if stop.wait(0.1):
            raise TryAgain(f"told to stop while the {role} ran", remedy="run it again; it starts from nothing")
    children.check()
    return clock.monotonic() - started


def run(config: Config, args: argparse.Namespace) -> int:
    """The command: args.file, .mapping, .bootstrap, .models (with commas), .json."""
    clock, stop, console = SystemClock(), Stop().on_signals(), Console(stderr=True)
    if not console.is_terminal:
        console.width = WIDTH
    models = [name.strip() for name in args.models.split(",") if name.strip()]
    if unknown := [name for name in models if name != MODEL and name not in BASELINES]:
        raise UsageError(f"--models: unknown {', '.join(unknown)}", remedy=f"known: {', '.join((MODEL, *BASELINES))}")
    dataset = Dataset(Path(args.file), args.mapping)
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="streamgr-evaluate-")))
        if args.bootstrap:
            broker = EmbeddedBroker(args.bootstrap, "kafka", f"{args.bootstrap}, not ours", lambda: None)
        else:
            broker = stack.enter_context(EmbeddedBroker.start(directory / "broker"))
        report = evaluate(config, dataset, broker, directory, models, clock=clock, stop=stop, say=console.print)
    show(report, console)
    if args.json:
        print(json.dumps(report), flush=True)
    return 0 if report["census"]["exact"] and report["targets_learned_once"] else DataError.exit_code


def show(report: Json, console: Console) -> None:
    """The report as tables."""
    counted, seconds = report["census"], report["seconds"]
    good = "every event in exactly one sequence" if counted["exact"] else f"NOT EXACT: {'; '.join(counted['wrong'])}"
    console.print(
        f"{report['events']:,} events of {counted['users']:,} users in {seconds['total']} s "
        f"({', '.join(f'{k} {v} s' for k, v in seconds.items() if k != 'total')}); broker: {report['broker']}\n"
        f"census by {counted['method']}: {counted['expected']:,} in the file, {counted['found']:,} in sequences: "
        f"{good}\n"
        f"targets learned: {', '.join(f'{n:,} {kind}' for kind, n in report['targets'].items()) or 'none'}",
        soft_wrap=True,
        highlight=False,
    )
    _table(
        console, "ranking, prequential, at impressions", report["ranking"], ("normalized_entropy", "auc", "calibration")
    )
    _table(console, "retrieval, prequential, among all known items", report["retrieval"],
           ("hit_rate_at_10", "ndcg_at_10", "unknown_item"))  # fmt: skip


def _table(console: Console, title: str, part: Json, figures: tuple[str, ...]) -> None:
    table = Table(title=title, title_justify="left")
    for name in ("kind", "targets", "base rate", "model"):
        table.add_column(name, justify="right" if name in ("targets", "base rate") else "left")
    for name in figures:
        table.add_column(name.replace("_", " "), justify="right")
    for kind, body in part.items():
        for place, (model, values) in enumerate(body["models"].items()):
            rate = body.get("base_rate")
            lead = (
                (kind, f"{body['targets']:,}", "-" if rate is None else f"{rate:.4f}") if place == 0 else ("", "", "")
            )
            cells = ("-" if values[f] is None else f"{values[f]:.4f}" for f in figures)
            table.add_row(*lead, model, *cells, end_section=place == len(body["models"]) - 1)
    if part:
        console.print(table)
