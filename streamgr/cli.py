"""The command line: reads the configuration, builds the objects, runs one thing.

Nothing heavy is imported until a command needs it, so that `--help`, `health` and the stream side never load torch.
"""

import argparse
import json
import os
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path

from streamgr import __version__, sanity
from streamgr.config import Config, flatten, load, secret_file
from streamgr.errors import BrokerUnreachable, ConfigError, DataError, StreamgrError, TryAgain, UsageError

EXTRAS = {  # what a stream-side installation goes without, and where it comes from
    **dict.fromkeys(("torch", "safetensors", "fastapi", "uvicorn"), "model"),
    "faust": "monitor",
}
Command = Callable[[argparse.Namespace, Config, dict[str, str]], int]


def main(argv: list[str] | None = None) -> int:
    """Run one command; the result is the process's exit code."""
    args = _parser().parse_args(argv)
    try:
        files = [Path(p) for p in args.config or filter(None, [os.environ.get("STREAMGR_CONFIG")])]
        flags = dict(_assignment(text) for text in args.set)
        config, origin = load(files, flags=flags)
        command: Command = args.command
        return command(args, config, origin)
    except StreamgrError as error:
        print(f"streamgr: {error}", file=sys.stderr)
        return error.exit_code
    except ModuleNotFoundError as error:
        if error.name not in EXTRAS:
            raise
        extra = EXTRAS[error.name]
        print(f"streamgr: this needs {error.name}; remedy: pip install 'streamgr[{extra}]'", file=sys.stderr)
        return ConfigError.exit_code
    except BrokenPipeError:  # the reader of our output has gone: `… | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130


def _assignment(text: str) -> tuple[str, str]:
    path, equals, value = text.partition("=")
    if not equals or "." not in path:
        raise UsageError(f"--set wants section.key=value, got {text!r}")
    return path.strip(), value.strip()


# --- the roles -------------------------------------------------------------------------------------------------------


def _role(args: argparse.Namespace, config: Config, origin: dict[str, str]) -> int:
    """One role in the foreground until SIGTERM, or up to the end of its input."""
    from streamgr.clock import SystemClock
    from streamgr.service import Stop
    from streamgr.telemetry import Health, Log, Probes, announce, watch_disk

    clock, stop = SystemClock(), Stop().on_signals()
    log, health = Log(args.role, config.telemetry, clock), Health(args.role, clock)
    announce(args.role)
    watch_disk(config.role_directory(args.role))
    log.info("starting", version=__version__, settings={k: flatten(config)[k] for k in origin})
    probes = None if getattr(args, "until_end", False) else Probes(config.telemetry, health)
    try:
        if not probes:
            _require_broker(config, "events" if args.role == "sequencer" else "examples")
        if args.role == "sequencer":
            from streamgr.sequence.sequencer import Sequencer
            from streamgr.service import calm_collector

            calm_collector()
            sequencer = Sequencer(config, clock, log, health, stop, rebuild=args.rebuild, accept_loss=args.accept_loss)
            sequencer.run_until_end() if args.until_end else sequencer.run()
        elif args.role == "trainer":
            from streamgr.train.trainer import Trainer

            trainer = Trainer(config, clock, log, health, stop)
            trainer.run_until_end() if args.until_end else trainer.run()
        elif args.role == "monitor":
            from streamgr.monitor.monitor import Monitor

            Monitor(config, clock, log, health, stop).run()
        else:
            from streamgr.serve.scorer import Scorer

            Scorer(config, clock, log, health, stop).run()
    except (BrokerUnreachable, TryAgain) as error:
        if not (stop and probes):
            log.error("stopped_by_error", str(error), exit_code=error.exit_code)
            return error.exit_code
        # told to leave while waiting for a broker or a lock: what is not acknowledged was not committed either
        log.warning("stopped_waiting", str(error))
        return 0
    except StreamgrError as error:
        log.error("stopped_by_error", str(error), exit_code=error.exit_code)
        return error.exit_code
    finally:
        if probes:
            probes.close()
    log.info("stopped", "drained and left")
    return 0


def _require_broker(config: Config, topic: str) -> None:
    """For one-shot commands: roles wait for a broker that is away or refuses them, these say so and leave."""
    from streamgr.kafka import topics

    topics.identity(config.kafka, config.topic(topic))


def _health(args: argparse.Namespace, config: Config, origin: dict[str, str]) -> int:
    url = f"http://127.0.0.1:{config.telemetry.port}/livez"
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            print(answer.read().decode())
            return 0
    except urllib.error.HTTPError as error:
        print(error.read().decode(), file=sys.stderr)
    except OSError as error:
        print(f"no role answers on {url}: {error}", file=sys.stderr)
    return 1


def _doctor(args: argparse.Namespace, config: Config, origin: dict[str, str]) -> int:
    from streamgr import doctor
    from streamgr.clock import SystemClock
    from streamgr.doctor.case import Case
    from streamgr.doctor.upgrade import steps

    if args.upgrade_from:
        for number, step in enumerate(steps(args.upgrade_from), 1):
            print(json.dumps({"step": number, "do": step}) if args.json else f"{number:2}. {step}")
        return 0
    found = []
    for finding in doctor.examine(Case(config, origin, os.environ, SystemClock(), tuple(args.url))):
        found.append(finding)
        print(json.dumps(asdict(finding)) if args.json else finding, flush=True)
    return doctor.exit_code(found)


def _demo(args: argparse.Namespace, config: Config, origin: dict[str, str]) -> int:
    from streamgr.lab import demo

    return demo.run(config, origin, args)


# --- topics, events, sequences, examples, weights --------------------------------------------------------------------


def _topics(args: argparse.Namespace, config: Config, origin: dict[str, str]) -> int:
    from streamgr.kafka import topics

    specs = topics.load_specs(topics.specs_path(), config.kafka.topic_prefix)
    findings = (topics.apply if args.verb == "apply" else topics.check)(config.kafka, specs)
    for finding in findings:
        print(finding)
    return ConfigError.exit_code if any(finding.level == "fail" for finding in findings) else 0


def _produce(args: argparse.Namespace, config: Config, origin: dict[str, str]) -> int:
    from streamgr.lab import produce

    return produce.run(config, args)


def _feed(args: argparse.Namespace, config: Config, origin: dict[str, str]) -> int:
    from streamgr.lab import feed

    return feed.run(config, args)


def _sequences(args: argparse.Namespace, config: Config, origin: dict[str, str]) -> int:
    from streamgr.sequence import views

    if args.verb == "export":
        return _lines(views.export(Path(args.state or config.state.directory)))
    part = views.Part(args.since, args.before, args.last)
    if args.url:
        asked = {name: value for name, value in part._asdict().items() if value}
        path = f"/v1/users/{urllib.parse.quote(args.user, safe='')}/sequence?{urllib.parse.urlencode(asked)}"
        return _lines([_get(args.url.rstrip("/") + path.rstrip("?"), args.token_file)])
    sequence = views.show(Path(args.state or config.state.directory), args.user, part)
    if sequence is None:
        raise DataError(f"no user {args.user!r} here", where=str(args.state or config.state.directory))
    return _lines([sequence])


def _state(args: argparse.Namespace, config: Config, origin: dict[str, str]) -> int:
    from streamgr.clock import SystemClock
    from streamgr.sequence import maintenance

    directory = Path(args.state or config.state.directory)
    if args.verb == "show":
        return _lines(maintenance.show(directory))
    if args.verb == "backup":
        kept = config.state.snapshots_kept
        return _lines(maintenance.backup(directory, args.role, Path(args.directory), kept, SystemClock()))
    if args.verb == "erase":
        _require_broker(config, "events")
    if args.verb == "restore":
        return _lines(maintenance.restore(config, directory / args.role, Path(args.directory)))
    if args.verb == "erase":
        return _lines([maintenance.erase(config, args.user)])
    sound = True
    for row in maintenance.verify(directory):
        sound = sound and row["ok"]
        _lines([row])
    return 0 if sound else DataError.exit_code


def _examples(args: argparse.Namespace, config: Config, origin: dict[str, str]) -> int:
    from streamgr.sequence import listing

    _require_broker(config, "examples")
    return _lines(listing.examples(config, args.limit))


def _weights(args: argparse.Namespace, config: Config, origin: dict[str, str]) -> int:
    if args.verb == "pin" and args.remove == (args.version is not None):
        raise UsageError("name the version to pin, or give --remove, not both")
    _require_broker(config, "manifests")  # before torch, whose import takes as long
    from streamgr.clock import SystemClock
    from streamgr.weights import views

    clock = SystemClock()
    if args.verb == "list":
        return _lines(views.list_versions(config, clock))
    if args.verb == "show":
        return _lines([views.show(config, clock, args.version)])
    if args.verb == "pin":
        return _lines([views.unpin(config) if args.remove else views.pin(config, clock, args.version, args.why)])
    if args.verb == "rollback":
        return _lines([views.rollback(config, clock, args.version, args.why)])
    verdict = views.verify(config, clock, args.version)
    _lines([verdict])
    return 0 if verdict["ok"] else 65


def _evaluate(args: argparse.Namespace, config: Config, origin: dict[str, str]) -> int:
    from streamgr.lab import evaluate

    return evaluate.run(config, args)


def _config(args: argparse.Namespace, config: Config, origin: dict[str, str]) -> int:
    if args.verb == "check":
        found = list(sanity.findings(config))
        for finding in found:
            print(finding)
        failed = any(finding.level == "fail" for finding in found)
        if not failed:
            print(f"ok: {len(origin)} keys set, the rest are defaults")
        return ConfigError.exit_code if failed else 0
    for path, value in flatten(config).items():
        print(f"{path} = {json.dumps(value)}  # {origin.get(path, 'default')}")
    return 0


def _lines(rows: Iterable[object]) -> int:
    for row in rows:
        print(json.dumps(row, ensure_ascii=False))
    return 0


def _get(url: str, token_file: str | None) -> object:
    if not url.startswith(("http://", "https://")):
        raise UsageError(f"--url wants http(s)://HOST:PORT, got {url!r}")
    token = secret_file(token_file, "--token-file") if token_file else ""
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"} if token else {})  # noqa: S310
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:  # noqa: S310 (checked above)
            return json.load(answer)
    except urllib.error.HTTPError as error:
        remedy = "give the scorer's token: --token-file FILE" if error.code == 401 else ""
        raise UsageError(f"{error.code}: {error.read().decode(errors='replace')}", where=url, remedy=remedy) from None
    except OSError as error:
        raise UsageError(f"no answer: {error}", where=url, remedy="is the scorer running?") from None


# --- the parser ------------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--config", action="append", metavar="FILE", help="TOML file(s); later ones win")
    common.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="one key, wins over all"
    )
    parser = argparse.ArgumentParser(prog="streamgr", description="A streaming generative recommender.")
    parser.add_argument("--version", action="version", version=f"streamgr {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run: Command, help_: str, example: str, **defaults: object) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            parents=[common],
            help=help_,
            description=help_,
            epilog=f"example: {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(command=run, **defaults)
        return sub

    demo = add("demo", _demo, "the whole system on one machine", "streamgr demo --seconds 60 --json")
    demo.add_argument("--seconds", type=float, metavar="N", help="end by itself N seconds after the first event")
    demo.add_argument("--bootstrap", metavar="HOST:PORT", help="use this broker instead of an embedded one")
    demo.add_argument("--replay", metavar="FILE", help="feed this log instead of the simulator")
    demo.add_argument("--mapping", default="", help="how to read the log's columns (see `produce`)")
    demo.add_argument("--speed", type=float, default=0.0, help="replay: event-time speed-up, 0 = as fast as possible")
    demo.add_argument("--json", action="store_true", help="the summary as one JSON object, last line of stdout")

    for role, does in (
        ("sequencer", "events into sequences and training examples"),
        ("trainer", "examples into weights, without end"),
        ("scorer", "weights and sequences into answers over HTTP"),
        ("monitor", "all of it into figures and a live page; sends canaries"),
    ):
        sub = add(role, _role, f"the {role}: {does}", f"streamgr {role} --config my.toml", role=role)
        if role in ("sequencer", "trainer"):
            sub.add_argument("--until-end", action="store_true", help="work up to the end of the input and leave")
        if role == "sequencer":
            sub.add_argument("--rebuild", action="store_true", help="start from an empty store")
            sub.add_argument("--accept-loss", action="store_true", help="go on where the log no longer starts at 0")

    sub = add("topics", _topics, "compare or create the topics; never deletes", "streamgr topics apply")
    sub.add_argument("verb", choices=["check", "apply"])

    sub = add("produce", _produce, "publish events from a file", "streamgr produce log.csv.gz --close")
    sub.add_argument("file", metavar="FILE", help="JSON lines or CSV, .gz too")
    sub.add_argument("--mapping", default="", help="deskdrop, ebnerd, globo, movielens or events; default: by header")
    sub.add_argument("--column", action="append", default=[], metavar="FIELD=COLUMN", help="own mapping")
    sub.add_argument("--speed", type=float, default=0.0, help="event-time speed-up, 0 = as fast as possible")
    sub.add_argument("--close", action="store_true", help="end with heartbeats that close every open label")
    sub.add_argument("--skip-bad-rows", action="store_true", help="count rows that cannot be read instead of stopping")

    sub = add("feed", _feed, "a simulated site's events until SIGTERM", "streamgr feed --scorer 127.0.0.1:8080")
    sub.add_argument("--scorer", default="127.0.0.1:8080", metavar="HOST:PORT", help="who ranks what is shown")
    sub.add_argument("--seconds", type=float, metavar="N", help="end by itself after N seconds")
    sub.add_argument("--oracle", metavar="FILE", help="where the true probabilities go (default: nowhere)")

    again = argparse.ArgumentParser(add_help=False)  # the common options after a verb; silent where they are not given
    again.add_argument("--config", action="append", metavar="FILE", default=argparse.SUPPRESS)
    again.add_argument("--set", action="append", metavar="SECTION.KEY=VALUE", default=argparse.SUPPRESS)

    def verbs_of(sub: argparse.ArgumentParser) -> Callable[[str, str, str], argparse.ArgumentParser]:
        verbs = sub.add_subparsers(dest="verb", required=True)
        return lambda name, help_, example: verbs.add_parser(
            name, parents=[again], help=help_, description=help_, epilog=f"example: {example}"
        )

    verb = verbs_of(add("sequences", _sequences, "users' sequences as JSON", "streamgr sequences show u1"))
    show = verb("show", "one user's sequence, oldest first", "streamgr sequences show u1 --state state")
    show.add_argument("user")
    show.add_argument("--state", metavar="DIR", help="a state directory (default: state.directory)")
    show.add_argument("--url", help="ask a running scorer instead (https:// too: SSL_CERT_FILE names a CA of your own)")
    show.add_argument("--token-file", metavar="FILE", help="with --url: the file that holds scorer.token")
    show.add_argument("--since", type=int, default=0, metavar="MS", help="events of this time and later")
    show.add_argument("--before", type=int, metavar="MS", help="events before this time")
    show.add_argument("--last", type=int, default=0, metavar="N", help="of these the newest N")
    export = verb("export", "every user's sequence, a line each, sorted by user id", "streamgr sequences export")
    export.add_argument("--state", metavar="DIR", help="a state directory (default: state.directory)")

    verb = verbs_of(add("state", _state, "the stores of a state directory", "streamgr state verify"))
    for name, does, example in (
        ("show", "each partition's store: whose it is and how far", "streamgr state show"),
        ("verify", "read every byte and hold it against the rest", "streamgr state verify --state state"),
        ("backup", "a snapshot of each partition of a role that is not running", "streamgr state backup /backup"),
        ("restore", "the newest sound snapshots, where there is no store yet", "streamgr state restore /backup"),
        ("erase", "publish the record that makes every store forget a user", "streamgr state erase u1"),
    ):
        sub = verb(name, does, example)
        sub.add_argument("--state", metavar="DIR", help="a state directory (default: state.directory)")
        if name in ("backup", "restore"):
            sub.add_argument("directory", metavar="SNAPSHOTS", help="the directory of the snapshots")
            sub.add_argument("--role", default="sequencer", choices=["sequencer", "scorer"])
        if name == "erase":
            sub.add_argument("user", metavar="USER")

    sub = add("examples", _examples, "the examples topic as JSON lines", "streamgr examples list --limit 10")
    sub.add_argument("verb", choices=["list"])
    sub.add_argument("--limit", type=int, default=0, help="stop after so many (0: all there are)")

    verb = verbs_of(add("weights", _weights, "published weights", "streamgr weights list"))
    verb("list", "the versions there are", "streamgr weights list")
    for name, does in (("show", "one version's manifest"), ("verify", "read a version's bytes again and check them")):
        verb(name, does, f"streamgr weights {name} 41").add_argument("version", type=int)
    for name, does, example in (
        ("pin", "hold every scorer at a version", "streamgr weights pin 41 --why 'clicks fell'"),
        ("rollback", "pin a version, without a number the one before the newest", "streamgr weights rollback"),
    ):
        sub = verb(name, does, example)
        sub.add_argument("version", type=int, nargs="?")
        sub.add_argument("--why", default="", metavar="TEXT", help="kept with the pin")
        if name == "pin":
            sub.add_argument("--remove", action="store_true", help="let the scorers go on to the newest")

    sub = add("evaluate", _evaluate, "replay a log and compare models, test-then-train", "streamgr evaluate log.csv.gz")
    sub.add_argument("file", metavar="DATA")
    sub.add_argument("--mapping", default="")
    sub.add_argument("--bootstrap", metavar="HOST:PORT", help="use this broker instead of an embedded one")
    sub.add_argument("--models", default="hstu,popularity,popularity-1h,recency,recency-global")
    sub.add_argument("--json", action="store_true", help="the report as one JSON object, last line of stdout")

    sub = add("config", _config, "effective values and where each came from", "streamgr config show")
    sub.add_argument("verb", choices=["show", "check"])

    sub = add("doctor", _doctor, "all that can be wrong here, a line and a remedy each", "streamgr doctor --json")
    sub.add_argument("--url", action="append", default=[], metavar="URL", help="ask this role too: http://HOST:9464")
    sub.add_argument("--upgrade-from", metavar="VERSION", help="list the steps from that version to this one instead")
    sub.add_argument("--json", action="store_true", help="one JSON object a line")

    add("health", _health, "exit 0 if the role on telemetry.port is live", "streamgr health")
    return parser
