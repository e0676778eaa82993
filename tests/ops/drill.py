"""A fault drill over a real stack: break one thing after another, and see it heal, say so, and lose nothing.

    python -m tests.ops.drill                         (make drill; needs Docker with compose)
    python -m tests.ops.drill --without grafana,kafka-exporter --only kill,disk --keep

The stack is a project of its own, on ports of its own, made and removed here. Faults come one at a time, while a
simulated site feeds it: each container's process is killed, each role is stopped, the broker goes away and comes back,
the trainer is cut off from it, a disk fills, poison is fed. For each of them

- the alert that must fire fires while it lasts (asked of Prometheus; the rules are those of config/prometheus with
  every `for:` cut to seconds, and scraped more often; their expressions are untouched),
- afterwards everything is well again by itself: containers healthy, targets up, roles ready, answers fresh,
- no container has been restarted more often than the fault explains, and none restarts afterwards.

In the end the events topic is judged record by record, and the sequencer's volume, its examples and its dead letters
must be what the oracle says, each once. The exit code tells; a table says how long each took.
"""

import argparse
import json
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from streamgr.clock import SystemClock
from streamgr.config import load
from tests.crash import verdict
from tests.ops.stack import ROOT, Json, Stack, State, Trouble, wait_for
from tests.streams import Row, row, rubbish
from tests.system import publish

ROLES = ("sequencer", "trainer", "scorer", "monitor")
EVENTS = "streamgr.events"
STEP_SECONDS = 5  # between two scrapes, and two evaluations
FOR_SECONDS = 10  # every rule's `for:`
START_SECONDS = 240.0
WELL_SECONDS = 180.0
FRESH_SECONDS = 15.0
SETTLED_SECONDS = 15.0
BALLAST = "/var/lib/streamgr/ballast"
HEADROOM = 0.05  # of the disk, left free at first


@dataclass(frozen=True)
class Fault:
    """One thing that breaks. alert: a name and labels that must fire while it lasts, {} for none."""

    name: str
    begin: Callable[[], object]
    end: Callable[[], object] = lambda: None
    alert: Mapping[str, str] = field(default_factory=dict)
    patience: float = 120.0  # for the alert
    hold: float = 0.0  # it lasts at least so many seconds
    worse: Callable[[], object] = lambda: None  # after the alert
    restarts: int = 0  # how many of Docker's own it explains


@dataclass
class Outcome:
    """How it went."""

    fault: str
    alert: str = "none wanted"
    recovered: float = 0.0
    restarts: int = 0
    problems: list[str] = field(default_factory=list)


class Drill:
    """`run` gives every outcome and the verdict on the data."""

    def __init__(self, stack: Stack, services: list[str]) -> None:
        self._stack, self._services = stack, services
        self._watched = [s for s in services if s not in ("topics", "holder")]
        self._roles = [role for role in ROLES if role in services]
        self._clock = SystemClock()

    def run(self, only: set[str]) -> tuple[list[Outcome], Json, list[str]]:
        began = time.monotonic()
        self._stack.compose("up", "-d", "--build", *self._services)
        seconds = wait_for("the stack to be well", self._well, START_SECONDS)
        tell(f"up: {len(self._watched)} containers well {time.monotonic() - began:.0f} s after `up`, build included")
        tell(f"    ({seconds:.0f} s of them after `up` had come back)")
        self._host_is_heard()
        outcomes = [
            self._one(fault) for fault in self._faults() if not only or only & {fault.name, fault.name.split()[0]}
        ]
        counted, problems = self._judge()
        return outcomes, counted, problems

    # -- the faults

    def _faults(self) -> Iterator[Fault]:
        stack = self._stack
        yield Fault(
            "disk full",
            lambda: self._fill(HEADROOM),
            lambda: self._in_holder("rm", "-f", BALLAST),
            alert={"alertname": "DiskFilling", "role": "sequencer"},
            worse=lambda: self._fill(0.0),
            hold=60.0,
            restarts=12,
        )
        yield Fault(
            "network cut: trainer, broker",
            lambda: stack.cut("trainer", "stream"),
            lambda: stack.mend("trainer", "stream"),
            alert={"alertname": "KafkaErrors", "role": "trainer"},
            hold=60.0,
        )
        yield Fault("poison", self._poison, alert={"alertname": "DeadLetters", "reason": "invalid_json"})
        for service in self._watched:
            yield Fault(f"kill {service}", lambda s=service: self._crash(s), restarts=1)
        for role in self._roles:
            yield Fault(
                f"stop {role}",
                lambda r=role: self._leave(r),
                lambda r=role: stack.compose("start", r),
                alert={"alertname": "TargetDown", "role": role},
            )
        yield Fault("restart kafka", lambda: stack.compose("restart", "kafka"), alert={})
        yield Fault(
            "stop kafka",
            lambda: stack.compose("stop", "kafka"),
            lambda: stack.compose("start", "kafka"),
            alert={"alertname": "HeartbeatLost"},
            patience=240.0,
        )

    def _one(self, fault: Fault) -> Outcome:
        out, before = Outcome(fault.name), self._stack.states(self._watched)
        tell(f"-- {fault.name}")
        began = time.monotonic()
        try:
            if fault.alert and self._fires(fault.alert):
                out.problems.append(f"{fault.alert} fires before there is a reason to")
            fault.begin()
            if fault.alert:
                seconds = wait_for(f"the alert {dict(fault.alert)}", lambda: self._fires(fault.alert), fault.patience)
                out.alert = f"{fault.alert['alertname']} after {seconds:.0f} s"
            fault.worse()
            time.sleep(max(0.0, began + fault.hold - time.monotonic()))
        except Trouble as trouble:
            out.problems.append(str(trouble))
        try:
            fault.end()
            out.recovered = wait_for("everything to be well again", self._well, WELL_SECONDS)
        except Trouble as trouble:
            out.problems.append(f"{trouble}: {self._ill()}")
        then = self._stack.states(self._watched)
        time.sleep(SETTLED_SECONDS)
        after = self._stack.states(self._watched)
        out.restarts = sum(self._restarted(before[s], after[s]) for s in self._watched)
        again = [s for s in self._watched if then[s].started != after[s].started]
        if again:
            out.problems.append(f"started once more though all had been well: {', '.join(again)}")
        if out.restarts > fault.restarts:
            out.problems.append(f"{out.restarts} restarts, and the fault explains {fault.restarts}")
        tell(f"   {out.alert}; well after {out.recovered:.0f} s; restarts: {out.restarts} {out.problems or ''}")
        return out

    @staticmethod
    def _restarted(before: State, after: State) -> int:
        """Docker counts from the last start by hand."""
        return after.restarts - before.restarts if after.restarts >= before.restarts else after.restarts

    def _crash(self, service: str) -> None:
        was = self._stack.states([service])[service].started
        self._stack.crash(service)
        wait_for(f"Docker to start {service} again", lambda: self._state(service).started != was, 30.0)

    def _leave(self, role: str) -> None:
        """SIGTERM; it must have drained before Docker loses patience."""
        self._stack.compose("stop", role)
        if (code := self._state(role).exit_code) != 0:
            raise Trouble(f"{role} left with {code}, not drained")

    def _fill(self, headroom: float) -> None:
        """Fill the sequencer's disk, all but this share of it."""
        told = self._in_holder("df", "--output=avail,size", "-B1", "/var/lib/streamgr").split()[-2:]
        available, size = map(int, told)
        amount = max(0, available - round(headroom * size)) + (1 << 20 if not headroom else 0)
        self._in_holder("sh", "-c", f"head -c {amount} /dev/zero >>{BALLAST}")

    def _in_holder(self, *command: str) -> str:
        return self._stack.compose("exec", "-T", "holder", *command, code=None)

    def _poison(self) -> None:
        rows = [bad for _ in range(5) for _, bad in rubbish(self._clock.now_ms())]
        publish(self._stack.bootstrap, EVENTS, rows)

    def _host_is_heard(self) -> None:
        """What a host's own client publishes is in the next answer."""
        user, now = f"host-{self._clock.now_ms()}", self._clock.now_ms()
        common = {"user_id": user, "item_id": "from-the-host", "event_time": now}
        shown = [{"type": kind, "event_id": kind, **common} for kind in ("impression", "click")]
        rows: list[Row] = [row(event) for event in shown]
        publish(self._stack.bootstrap, EVENTS, rows)
        seconds = wait_for(
            "the host's events in an answer",
            lambda: (self._stack.rank(user, ["from-the-host", "another"]) or {}).get("sequence_length", 0) >= 2,
            30.0,
        )
        answer = self._stack.rank(user, ["from-the-host", "another"])
        tell(f"events from the host are in the answers (looked after {seconds:.0f} s): {json.dumps(answer)}")

    # -- is it well?

    def _state(self, service: str) -> State:
        return self._stack.states([service])[service]

    def _well(self) -> bool:
        return not self._ill()

    def _ill(self) -> str:
        """What is not well; empty when everything is."""
        states = self._stack.states(self._watched)
        if ill := [f"{name} {state.health or state}" for name, state in states.items() if not state.well]:
            return ", ".join(ill)
        targets = self._stack.targets()
        if down := [role for role in self._roles if targets.get(role) != "up"]:
            return f"not scraped: {', '.join(down)}"
        ready = {labels["role"]: value for labels, value in self._stack.query("min by (role) (streamgr_ready)") or []}
        if waiting := [role for role in self._roles if ready.get(role) != 1]:
            return f"not ready: {', '.join(waiting)}"
        answer = self._stack.rank("drill", ["a", "b"])
        if answer is None or answer["model_age_seconds"] > FRESH_SECONDS:
            return f"not fresh: {answer}"
        return ""

    def _fires(self, wanted: Mapping[str, str]) -> bool:
        return any(wanted.items() <= labels.items() for labels in self._stack.firing() or [])

    # -- is it whole?

    def _judge(self) -> tuple[Json, list[str]]:
        """Stop the sources, let everything close, stop the sequencer, and hold its volume against the oracle."""
        tell("-- the data")
        config, _ = load([ROOT / "config" / "compose.toml"], {})
        sequence = config.sequence
        window, lateness, step, future = (
            round(1_000 * seconds)
            for seconds in (
                sequence.attribution_window_seconds,
                sequence.lateness_seconds,
                sequence.close_step_seconds,
                sequence.max_future_seconds,
            )
        )
        sources = [s for s in ("monitor", "feed") if s in self._services]
        self._stack.compose("stop", *sources)
        time.sleep((window + lateness + step) / 1_000 + 5)  # the sequencer's own heartbeats close what is open
        wait_for("the sequencer to come to the end", self._at_the_end, 120.0)
        self._leave("sequencer")
        export = self._stack.compose("run", "--rm", "-T", "--no-deps", "sequencer", "sequences", "export")
        rules = verdict.Rules(window, lateness, step, future)
        return verdict.judge(Site(self._stack.bootstrap), export, rules=rules)

    def _at_the_end(self) -> bool:
        lag = self._stack.query(f'max(streamgr_consumer_lag_records{{role="sequencer",topic="{EVENTS}"}})')
        return bool(lag) and lag[0][1] < 10  # a heartbeat a second and partition is always on its way


@dataclass(frozen=True)
class Site:
    """What the verdict needs to know of it."""

    bootstrap: str
    prefix: str = "streamgr"


def hasty(directory: Path) -> Path:
    """The project's Prometheus configuration in a hurry: waits and intervals cut to seconds, expressions untouched."""
    target = directory / "prometheus"
    shutil.copytree(ROOT / "config" / "prometheus", target)
    for file in target.rglob("*.yml"):
        text = re.sub(r"^( *for:) *\S+", rf"\1 {FOR_SECONDS}s", file.read_text(), flags=re.MULTILINE)
        if file.name == "prometheus.yml":
            text = re.sub(r"((?:scrape|evaluation|refresh)_(?:interval|timeout):) *\S+", rf"\1 {STEP_SECONDS}s", text)
        file.write_text(text)
    for path in (directory, *directory.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)  # the container's user reads it
    return target


def tell(text: str) -> None:
    print(text, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--project", default="streamgr-drill")
    parser.add_argument(
        "--without", default="", help="services to leave out, such as those whose image is not to be had"
    )
    parser.add_argument(
        "--only",
        default="",
        help="some faults: whole names, or first words: disk, network, poison, kill, stop, restart",
    )
    parser.add_argument("--keep", action="store_true", help="leave the stack running")
    args = parser.parse_args()
    without, only = (set(filter(None, text.split(","))) for text in (args.without, args.only))
    with tempfile.TemporaryDirectory(prefix="drill-") as directory:
        rules = hasty(Path(directory))
        overrides = [ROOT / "tests" / "ops" / "drill.yaml"]
        stack = Stack(args.project, overrides=overrides, port_shift=10_000, PROMETHEUS_CONFIG=str(rules))
        try:
            outcomes, counted, problems = Drill(stack, stack.services(without)).run(only)
        finally:
            if not args.keep:
                stack.compose("down", "-v", "--remove-orphans")
    print(f"\n{'fault':32} {'alert':32} {'well after':>10} {'restarts':>8}")
    for out in outcomes:
        print(f"{out.fault:32} {out.alert:32} {out.recovered:8.0f} s {out.restarts:8}  {'; '.join(out.problems)}")
    print(json.dumps(counted))
    for problem in problems:
        print(problem)
    wrong = sum(bool(out.problems) for out in outcomes)
    print(f"{len(outcomes)} faults, {wrong} with problems; the data: {'exact' if not problems else 'NOT EXACT'}")
    return 0 if outcomes and not wrong and not problems else 1


if __name__ == "__main__":
    sys.exit(main())
