"""Setting the stage for a run on one machine: the profile, free ports, and one configuration file a process."""

import json
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from streamgr.config import Config, load, shipped
from streamgr.errors import ConfigError
from streamgr.events import FIRST_ACTION, IMPRESSION, Event
from streamgr.kafka.consumer import Consumer
from streamgr.kafka.embedded import free_ports
from streamgr.lab.datasets import Dataset

ROLES = ("sequencer", "trainer", "scorer")
PROCESSES = (*ROLES, "feed")


def profile(name: str, config: Config, origin: Mapping[str, str]) -> Config:
    """The profile `config/<name>.toml` with every key of `config` that somebody has set: those in `origin`."""
    settings, _ = load([shipped(f"config/{name}.toml")], {})
    for path in origin:
        section, _, key = path.partition(".")
        table = msgspec.structs.replace(getattr(settings, section), **{key: getattr(getattr(config, section), key)})
        settings = msgspec.structs.replace(settings, **{section: table})
    return settings


@dataclass(frozen=True, slots=True)
class Stage:
    """What the processes of one run share. `files` and `ports` (telemetry) by process."""

    config: Config
    files: Mapping[str, str]
    ports: Mapping[str, int]
    predictions: Path  # the trainer's prequential log
    truth: Path  # the simulator's probabilities

    @property
    def scorer(self) -> str:
        """HOST:PORT of the scorer's HTTP."""
        return f"{self.config.scorer.host}:{self.config.scorer.port}"


def build(config: Config, directory: Path) -> Stage:
    """Write a configuration file for each process into `directory`, which also takes the state and the logs."""
    change = msgspec.structs.replace
    *telemetry, http, page = free_ports(len(PROCESSES) + 2)
    ports = dict(zip(PROCESSES, telemetry, strict=True))
    predictions = directory / "predictions.jsonl"
    shared = change(
        config,
        state=change(config.state, directory=str(directory / "state")),
        trainer=change(config.trainer, prequential_log=str(predictions)),
        scorer=change(config.scorer, port=config.scorer.port if _is_free(config.scorer.port) else http),
    )
    shared = change(
        shared,
        monitor=change(
            config.monitor,
            port=config.monitor.port if _is_free(config.monitor.port) else page,
            scrape=tuple(f"{role}=http://127.0.0.1:{ports[role]}" for role in ROLES),
            scorer=f"http://{shared.scorer.host}:{shared.scorer.port}",
        ),
    )
    files = {}
    for name in PROCESSES:
        own = change(shared, telemetry=change(config.telemetry, host="127.0.0.1", port=ports[name], log_format="json"))
        file = directory / f"{name}.toml"
        file.write_text(to_toml(own))
        files[name] = str(file)
    return Stage(shared, files, ports, predictions, directory / "truth.jsonl")


def in_use(config: Config) -> bool:
    """Whether the topics of this prefix hold records already; a run starts on empty ones."""
    consumer = Consumer(config.kafka, client_id="streamgr-demo-look")
    try:
        for topic in map(config.topic, ("events", "examples", "manifests")):
            partitions = consumer.partitions(topic, wait_seconds=10.0)
            if any(consumer.bounds(topic, p, wait_seconds=10.0)[1] for p in partitions):
                return True
    except ConfigError:  # it does not exist
        return False
    finally:
        consumer.close()
    return False


@dataclass(frozen=True, slots=True)
class Survey:
    """What a log to be replayed holds: how many targets it will make, and its action kinds."""

    targets: int
    kinds: list[str]

    def fit(self, config: Config) -> Config:
        """The configuration with the log's own action kinds appended."""
        known = config.sequence.actions
        actions = (*known, *(kind for kind in self.kinds if kind not in known))
        change = msgspec.structs.replace
        return change(config, sequence=change(config.sequence, actions=actions))


def survey(path: Path, mapping: str) -> Survey:
    """Read a log once. Its targets are its impressions; without any, its actions. `DataError` on a bad row."""
    dataset = Dataset(path, mapping)
    impressions = actions = 0
    for row in dataset.rows():
        if isinstance(row.event, Event):
            impressions += row.event.kind == IMPRESSION
            actions += row.event.kind >= FIRST_ACTION
    return Survey(impressions or actions, list(dataset.kinds))


def to_toml(config: Config) -> str:
    """The configuration as a file that `config.load` reads back to the same values."""
    lines = []
    for section, table in msgspec.to_builtins(config).items():
        lines += [f"[{section}]", *(f"{key} = {_value(value)}" for key, value in table.items()), ""]
    return "\n".join(lines)


def _value(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_value, value)) + "]"
    return json.dumps(value)


def _is_free(port: int) -> bool:
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True
