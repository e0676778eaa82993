"""Configuration: one frozen tree of values, checked before anything starts.

Defaults < profile or file (`--config`, TOML) < `STREAMGR_SECTION__KEY` variables < flags. An unknown key is an
error that names its path. A string key can be given as a file with the suffix `_FILE` (secrets). All times are in
seconds and all sizes in bytes, and say so in the key's name. `config/streamgr.toml` lists every key with its
default; a test holds the two together.
"""

import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from streamgr.clock import milliseconds
from streamgr.errors import ConfigError

ENV_PREFIX = "STREAMGR_"
MIN_TOKEN = 16  # characters
SECRET = re.compile(r"password|passphrase|secret|token$|jaas|key\.pem|oauthbearer\.config", re.IGNORECASE)

Seconds = Annotated[float, Meta(ge=0, le=1e10)]
Positive = Annotated[float, Meta(gt=0, le=1e10)]
Rate = Annotated[float, Meta(ge=0, le=1e3)]  # of learning
Share = Annotated[float, Meta(ge=0, le=1)]
Count = Annotated[int, Meta(ge=1)]
Natural = Annotated[int, Meta(ge=0)]
Seed = Annotated[int, Meta(ge=0, lt=1 << 31)]
Port = Annotated[int, Meta(ge=0, le=65_535)]


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A frozen table of the configuration; unknown keys are refused."""


class Kafka(Section, frozen=True):
    bootstrap: str = "127.0.0.1:9092"
    topic_prefix: str = "streamgr"  # topics <prefix>.events …, groups <prefix>-sequencer …
    librdkafka: dict[str, str | int | float | bool] = {}  # passed through: security.protocol, sasl.*, ssl.*
    sasl_password: str = ""


class State(Section, frozen=True):
    directory: str = "state"  # each role owns <directory>/<role>/
    cache_bytes: Count = 128 << 20
    write_buffer_bytes: Count = 32 << 20
    sync_seconds: Seconds = 1.0
    snapshots_directory: str = ""  # shared by all workers; "": none are taken
    snapshot_seconds: Positive = 600.0  # from one snapshot of a partition to its next
    snapshots_kept: Count = 2


class Sequence(Section, frozen=True):
    actions: tuple[str, ...] = ("click", "like")  # append-only: a kind's place in the list is its bit
    attribution_window_seconds: Positive = 600.0
    lateness_seconds: Seconds = 60.0
    close_step_seconds: Positive = 1.0
    commit_interval_seconds: Seconds = 0.2
    history_length: Annotated[int, Meta(ge=0, le=32_768)] = 256  # 0: an example holds its targets alone
    keep_seconds: Seconds = 0.0  # events older than the watermark minus this leave the sequences; 0: never
    max_future_seconds: Seconds = 60.0
    max_step_seconds: Seconds = 0.0  # 0: the watermark may jump; replays of old logs: 86400
    heartbeat_seconds: Seconds = 0.0  # 0: somebody else sends them, or nobody
    drain_seconds: Positive = 25.0  # told to stop: so long for the last commit and the hand-over
    cached_events: Count = 4_000_000  # decoded events at hand, all users of a process together

    def __post_init__(self) -> None:
        if not self.actions or len(self.actions) > 30 or len(set(self.actions)) != len(self.actions):
            raise ValueError("`actions` must be 1 to 30 different kinds")
        if reserved := {"impression", "profile", "heartbeat"} & set(self.actions):
            raise ValueError(f"`actions` may not contain the reserved {sorted(reserved)}")
        least = self.attribution_window_seconds + self.lateness_seconds + self.close_step_seconds
        if 0 < milliseconds(self.keep_seconds) < milliseconds(least):
            raise ValueError(f"`keep_seconds` must be at least window + lateness + step ({least:g}), or 0 to keep all")


class Model(Section, frozen=True):
    dim: Count = 64
    layers: Count = 2
    heads: Count = 2
    scaling_seqlen: Count = 256  # the constant N of the paper's 1/N; stored with the weights
    position_buckets: Count = 512
    time_buckets: Count = 64
    negatives: Count = 512  # drawn evenly from the live items
    batch_negatives: Natural = 0  # and as many at most from the batch's own targets, corrected by log Q
    temperature: Positive = 0.05
    retrieval_weight: Rate = 0.2

    def __post_init__(self) -> None:
        if self.dim % self.heads:
            raise ValueError(f"`dim` {self.dim} is not a multiple of `heads` {self.heads}")


class Table(Section, frozen=True):
    slots: Count = 65_536
    max_slots: Natural = 0  # doubles up to here when three quarters are taken; 0: stays as it is
    bucket_width: Count = 16
    fallback_rows: Count = 1_024
    ttl_seconds: Positive = 30 * 86_400.0  # of event time since an id was last seen
    user_ttl_seconds: Seconds = 0.0  # 0: as `ttl_seconds`
    feature_ttl_seconds: Seconds = 0.0
    half_life_seconds: Seconds = 0.0  # eviction: towards 0 is LRU, large is LFU; 0 means ttl / 4
    admit_min: Count = 1

    def __post_init__(self) -> None:
        buckets = self.slots // self.bucket_width
        if self.bucket_width % 8 or self.slots % self.bucket_width or buckets & (buckets - 1):
            raise ValueError("`bucket_width` must be a multiple of 8, and `slots` that times a power of two")
        if self.fallback_rows < 2 or self.fallback_rows % 2:
            raise ValueError("`fallback_rows` must be even and at least 2")


class Trainer(Section, frozen=True):
    device: str = "cpu"
    seed: Seed = 1
    threads: Natural = 1  # torch threads; more only where the trainer has cores to itself; 0: torch's own choice
    batch_tokens: Count = 4_096
    publish_seconds: Seconds = 2.0
    checkpoint_seconds: Seconds = 60.0
    max_skew_seconds: Seconds = 60.0
    dense_learning_rate: Rate = 2e-3
    weight_decay: Rate = 0.0
    table_optimizer: Literal["adagrad", "adam"] = "adagrad"
    table_learning_rate: Rate = 0.05
    table_half_life_steps: Seconds = 0.0  # adagrad: how long a row's past gradients count; 0: without end
    gradient_clip: Positive = 5.0
    window_targets: Count = 5_000  # prequential: the sliding window
    fade_targets: Positive = 2_000.0  # prequential: half-life of the faded figures
    prequential_log: str = ""  # a file: one JSON line a target, for reports
    accept_loss: bool = False  # go on over examples that are gone (counted); for one start, then false again


class Weights(Section, frozen=True):
    snapshot_every: Count = 60  # versions; sooner when the deltas outweigh the snapshot
    chunk_bytes: Count = 512 << 10
    retention_bytes: Count = 1 << 30  # what the weights topic holds at least; a snapshot must stay below a quarter
    max_dense_norm: Positive = 1e4  # beyond any of these three a version is withheld: the network's weights together,
    max_row_norm: Positive = 1e3  # one row of the table,
    max_gradient_norm: Positive = 1e3  # the gradient of one step, before it is clipped
    max_entropy_rise: Positive = 0.25  # share above the median of the last versions' prequential entropy: withheld too
    compared_versions: Count = 10  # the last so many; before there are as many, nothing is compared
    compared_targets: Count = 1_000  # the newest judged targets, at most `trainer.window_targets`; fewer: no judgement
    max_withheld: Count = 30  # versions in a row for their entropy; then the world has changed, and it is let go


class Scorer(Section, frozen=True):
    host: str = "127.0.0.1"
    port: Port = 8080
    task_weights: dict[str, float] = {}  # empty: every task counts 1
    clock: Literal["wall", "event"] = "wall"  # or "event": replays
    threads: Count = 1
    max_queue: Natural = 64
    max_connections: Count = 1_024  # open at a time; one more is told to come back and closed
    token: str = ""  # who asks must send it: `Authorization: Bearer …`; "": anyone who reaches the port
    tls_certificate: str = ""  # PEM files, of the certificate (with its chain) and its key; "": plain HTTP
    tls_key: str = ""
    docs: bool = True  # `/docs` and `/openapi.json`
    score_sample: Share = 0.0  # share of answers written to <prefix>.scores
    undo_versions: Natural = 32  # so many versions, and so many bytes, can be taken back at once; others from the log
    undo_bytes: Natural = 256 << 20

    def __post_init__(self) -> None:
        if bool(self.tls_certificate) != bool(self.tls_key):
            raise ValueError("`tls_certificate` and `tls_key` go together: give both files, or neither")
        if self.token and not (len(self.token) >= MIN_TOKEN and self.token.isascii() and self.token.isprintable()):
            raise ValueError(f"`token` must be at least {MIN_TOKEN} printable ASCII characters: openssl rand -hex 32")


class Monitor(Section, frozen=True):
    host: str = "127.0.0.1"
    port: Port = 8090  # the live page; 0: a free one
    engine: Literal["faust", "plain"] = (
        "faust"  # or "plain": no tables in Kafka, for brokers that Faust cannot work with
    )
    scrape: tuple[str, ...] = ("http://127.0.0.1:9464", "http://127.0.0.1:9465", "http://127.0.0.1:9466")  # or NAME=URL
    scrape_seconds: Positive = 1.0
    scrape_timeout_seconds: Positive = 1.0
    window_seconds: Positive = 60.0  # over which percentiles and rates of "now" are taken
    target_seconds: Positive = 60.0  # how old the knowledge behind an answer may be; an edge of the histogram's buckets
    publish_seconds: Positive = 10.0  # from one record of <prefix>.freshness to the next
    online_window_seconds: Seconds = 600.0  # served scores against outcomes; 0: not judged, the events are not read
    serve_seconds: Positive = 10.0  # how long after an answer its items may be shown
    scorer: str = "http://127.0.0.1:8080"  # which the canary asks
    canary_seconds: Seconds = 30.0  # from one canary to the next; 0: none
    canary_patience_seconds: Positive = 60.0  # then it is lost

    def __post_init__(self) -> None:
        if not self.scorer.startswith(("http://", "https://")):
            raise ValueError("`scorer` must be http(s)://HOST:PORT")
        if self.online_window_seconds and self.online_window_seconds < 10:
            raise ValueError("`online_window_seconds` must be at least 10, or 0 for none")


class Telemetry(Section, frozen=True):
    host: str = "127.0.0.1"
    port: Port = 9464  # 0: a free one
    log_level: Literal["info", "warning", "error"] = "info"  # or "warning", "error"
    log_format: Literal["json", "text"] = "json"  # or "text"


class Feed(Section, frozen=True):
    rate: Positive = 400.0  # events per second
    users: Count = 400
    seed: Seed = 1
    slate: Count = 10
    item_life_seconds: tuple[Positive, Positive] = (20.0, 60.0)
    live_items: Count = 40
    act_within_seconds: Positive = 1.2
    heartbeat_seconds: Seconds = 0.2
    candidates: Count = 40  # of the live items, so many are offered to the scorer for a ranking
    explore: Share = 0.25  # the share of places that are given to a random candidate instead of the best
    rank_timeout_seconds: Positive = 0.25  # a slower answer is not waited for: a random order is shown
    max_model_age_seconds: Positive = 20.0  # served weights older than this: the feed waits for the trainer


class Config(Section, frozen=True):
    """The whole tree; `load` is the only way in."""

    kafka: Kafka = Kafka()
    state: State = State()
    sequence: Sequence = Sequence()
    model: Model = Model()
    table: Table = Table()
    trainer: Trainer = Trainer()
    weights: Weights = Weights()
    scorer: Scorer = Scorer()
    monitor: Monitor = Monitor()
    telemetry: Telemetry = Telemetry()
    feed: Feed = Feed()

    def topic(self, name: str) -> str:
        """The full name of one of our topics: `events`, `examples`, …"""
        return f"{self.kafka.topic_prefix}.{name}"

    def group(self, role: str) -> str:
        """The consumer group of a role."""
        return f"{self.kafka.topic_prefix}-{role}"

    def role_directory(self, role: str) -> Path:
        """Where a role keeps its state: `<state.directory>/<role>`."""
        return Path(self.state.directory) / role


def load(
    files: list[Path] | None = None,
    environ: Mapping[str, str] | None = None,
    flags: Mapping[str, str] | None = None,
) -> tuple[Config, dict[str, str]]:
    """The effective configuration, and for each key that is not a default, where it came from.

    `files` are merged in order; `flags` maps `section.key` to text. Raises `ConfigError` naming the key's path.
    """
    environ = os.environ if environ is None else environ
    tree: dict[str, dict[str, Any]] = {}
    origin: dict[str, str] = {}
    for path in files or []:
        for section, values in _read(path).items():
            if not isinstance(values, dict):
                raise ConfigError(f"`{section}` is not a table", where=str(path), remedy="keys live in [sections]")
            for key, value in values.items():
                tree.setdefault(section, {})[key] = value
                origin[f"{section}.{key}"] = str(path)
    for name, text in environ.items():
        if name.startswith(ENV_PREFIX) and "__" in name:
            section, key = (part.lower() for part in name.removeprefix(ENV_PREFIX).split("__", 1))
            if key.endswith("_file") and key not in _fields(section):
                key, text = key.removesuffix("_file"), secret_file(text, f"${name}")
            _set(tree, origin, f"{section}.{key}", text, f"${name}")
    for flag, text in (flags or {}).items():
        _set(tree, origin, flag, text, f"--{flag}")
    try:
        return msgspec.convert(tree, Config), origin
    except msgspec.ValidationError as error:
        at = re.search(r"at `\$\.?([\w.]*)", str(error))
        unknown = re.search(r"unknown field `([^`]+)`", str(error))
        at_key = ".".join(match.group(1) for match in (at, unknown) if match and match.group(1))
        source = next((s for k, s in origin.items() if at_key and f"{k}.".startswith(f"{at_key}.")), "configuration")
        raise ConfigError(str(error), where=source, remedy="see config/streamgr.toml for every key") from None


def shipped(name: str) -> Path:
    """A file or directory that comes with the package, such as `config/demo.toml`: inside a wheel, beside a checkout's.

    Raises `ConfigError` where it is missing.
    """
    package = Path(__file__).resolve().parent
    for path in (package / "_data" / name, package.parent / name):
        if path.exists():
            return path
    raise ConfigError(f"{name} is missing", where=str(package), remedy="install streamgr again")


def flatten(config: Config) -> dict[str, Any]:
    """Every `section.key` with its value, secrets masked: what `config show` prints."""
    flat = {}
    for section in config.__struct_fields__:
        for key, value in msgspec.to_builtins(getattr(config, section)).items():
            path = f"{section}.{key}"
            if isinstance(value, dict):
                value = {k: "***" if SECRET.search(k) else v for k, v in value.items()}
            flat[path] = "***" if value and SECRET.search(key) else value
    return flat


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read the file: {error.strerror}", where=str(path)) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"not valid TOML: {error}", where=str(path)) from None


def secret_file(path: str, asked_by: str) -> str:
    """A secret as its file holds it, without line ends. Raises `ConfigError` naming who asked."""
    try:
        return Path(path).read_text().rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not text"
        raise ConfigError(f"cannot read the secret file {path}: {why}", where=asked_by) from None


def _fields(section: str) -> tuple[str, ...]:
    table = getattr(Config(), section, None)
    return table.__struct_fields__ if isinstance(table, Section) else ()


def _set(tree: dict[str, dict[str, Any]], origin: dict[str, str], path: str, text: str, source: str) -> None:
    """Put a value given as text into the tree, read as TOML unless its key holds a string."""
    section, _, key = path.partition(".")
    default = getattr(getattr(Config(), section, None), key, None)
    value: Any = text
    if not isinstance(default, str):
        try:
            value = tomllib.loads(f"v = {text}")["v"]
        except tomllib.TOMLDecodeError:
            value = text  # msgspec names the wanted type
    if isinstance(default, float) and isinstance(value, int):
        value = float(value)
    tree.setdefault(section, {})[key] = value
    origin[path] = source
