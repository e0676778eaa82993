"""A trainer that is killed again and again, each time at another point, and always comes back on the same directory.

Events are in the log and sequenced before it begins; every few lives there are more. Each life has another budget of
tokens for a step, so that a step that is formed anew is never by chance the one that was lost. Half of the deaths take
with them what the disk was not sure of, as a loss of power does. The last life is told to leave when it has learned
everything; then `reference` judges.

    python -m tests.crash.ordeal --kills 100 --seed 7        (KAFKA_HOME; make crash-test-trainer N=100)

dies at every point, and goes on to so many deaths. The verdict is a JSON object on the last line of stdout; exit 0 only
if all of it is exact, which it must not be with a `--control` (`trainer_worker`).
"""

import argparse
import itertools
import json
import os
import random
import signal
import sys
import tempfile
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamgr.config import Config, load
from tests.crash import reference
from tests.crash.feed import Stream
from tests.crash.hosts import CLOSING_MS, SETTINGS, Broker, Host, tell
from tests.crash.trainer_worker import BY_STEP, CONTROLS, POINTS
from tests.streams import Row
from tests.system import PARTITIONS

ROWS, LIVES = 900, 6  # so many events more for so many lives
AHEAD = 2_000  # events at the beginning: a life that has nothing to learn misses its point
LIFE_SECONDS = 20.0  # then it has missed its point
PATIENCE = 4  # lives that may miss a point
LEAVE_SECONDS = 30.0
ONCE = {"before_claim", "after_claim", "in_recovery"}  # points that a life passes but once, or none may pass twice
TOKENS = (8, 24, 40, 56, 72)  # of a step, by life
TRAINER = {
    "model__dim": 8,
    "model__layers": 1,
    "table__slots": 32,
    "table__max_slots": 64,
    "table__bucket_width": 8,
    "table__fallback_rows": 16,
    "table__ttl_seconds": 20.0,
    "trainer__publish_seconds": 0.05,
    "trainer__checkpoint_seconds": 0.1,
    "weights__chunk_bytes": 4_096,
    "weights__snapshot_every": 8,
    "weights__max_entropy_rise": 1e6,
}
Json = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """Each of the points once, in an order of its own; then so many `kills` in all."""

    points: tuple[str, ...] = POINTS
    kills: int = 0
    seed: int = 1
    power: float = 0.5  # the share of deaths that take what is not synced
    control: str = ""


class TrainersHost(Host):
    module = "tests.crash.trainer_worker"


class Ordeal:
    """One trainer's lives in a directory of its own; `run` gives the verdict."""

    def __init__(self, plan: Plan, directory: Path, bootstrap: str) -> None:
        self.plan, self.directory = plan, directory
        self.deaths, self.missed = Counter[str](), Counter[str]()
        self.power_failures = self.bytes_lost = 0
        self._rng = random.Random(plan.seed)
        self._began = time.monotonic()
        self._diary, self._prequential = directory / "diary", directory / "prequential.jsonl"
        options = ["--diary", str(self._diary), *(["--control", plan.control] if plan.control else [])]
        settings = SETTINGS | TRAINER | {"trainer__prequential_log": str(self._prequential)}
        self.host = TrainersHost(bootstrap, f"o{uuid.uuid4().hex[:8]}", directory, options, **settings)
        self._lives = 0

    def run(self) -> Json:
        """The whole of it. Raises `AssertionError` where a life ends otherwise than it should."""
        with self.host:
            self.host.command("topics", "apply")
            stream = Stream(self.plan.seed, PARTITIONS)
            rows, points = iter(stream), deque(self._order())
            while points:
                if self._lives % LIVES == 0:
                    self._sequence([*itertools.islice(rows, ROWS if self._lives else AHEAD)])
                point = points.popleft()
                if not self._live(point):
                    points.append(point)
                    assert self.missed[point] < PATIENCE, f"{point} was not reached in {PATIENCE} lives"
            self._sequence(stream.closing(2 * CLOSING_MS))
            want = reference.wanted(self.host)
            self._live_on(want.total())
            self._tell("asking the reference")
            counted, problems = reference.judge(
                self.host, want, self._config(), self._diary, self._prequential, self.directory / "reference"
            )
        return {
            "exact": not problems,
            "seed": self.plan.seed,
            "control": self.plan.control,
            "lives": self._lives,
            "deaths": self.deaths.total(),
            "points": dict(sorted(self.deaths.items())),
            "points_missed": dict(self.missed),
            "power_failures": self.power_failures,
            "bytes_lost": self.bytes_lost,
            **counted,
            "seconds": round(time.monotonic() - self._began, 1),
            "problems": problems,
        }

    def _order(self) -> list[str]:
        points = [*self.plan.points]
        points += self._rng.choices(self.plan.points, k=max(0, self.plan.kills - len(points)))
        self._rng.shuffle(points)
        return points

    def _sequence(self, rows: list[Row]) -> None:
        self.host.publish(rows)
        self.host.command("sequencer", "--until-end")

    def _live(self, point: str) -> bool:
        """One life, which ends at the point; one that does not come there is killed all the same, and is false."""
        name = f"life-{self._lives:03}"
        log, grave = self.directory / f"{name}.log", self.directory / f"{name}.point"
        passages = 1 if point in ONCE else self._rng.randint(1, 12 if point in BY_STEP else 3)
        power_fails = self._rng.random() < self.plan.power and point != "mid_append"  # it would take the torn line
        child = self.host.launch(log, "--die-at", f"{point}:{passages}", "--told", str(grave), role=self._role())
        self._until(lambda: child.poll() is not None or (point == "in_recovery" and "trainer_ready" in log.read_text()))
        if child.poll() is None:
            child.kill()
        code = child.wait()
        assert code == -signal.SIGKILL, f"{name}, to die at {point}, exited {code}: {log.read_text()[-3_000:]}"
        reached = grave.exists()
        (self.deaths if reached else self.missed)[point] += 1
        self._tell(f"{name} {'died at' if reached else 'missed'} {point}:{passages}")
        if reached and power_fails:
            self._tell("and the power failed")
            self._lose_power(json.loads(grave.with_suffix(".synced").read_text()))
        return reached

    def _live_on(self, targets: int) -> None:
        """The last life: until all is learned, then out by the door. (If it is too little, the judge says so.)"""
        log = self.directory / "last.log"
        child = self.host.launch(log, role=self._role())
        self._until(lambda: child.poll() is not None or "trainer_ready" in log.read_text())
        before = -1
        while before < (known := self._learned()) < targets and child.poll() is None:
            before = known
            self._until(lambda known=known: child.poll() is not None or self._learned() > known)
        child.send_signal(signal.SIGTERM)
        assert child.wait(LEAVE_SECONDS) == 0, log.read_text()[-3_000:]

    def _learned(self) -> int:
        """How many targets the log names by now."""
        return self._prequential.read_bytes().count(b"\n")

    @staticmethod
    def _until(condition: Callable[[], bool]) -> None:
        end = time.monotonic() + LIFE_SECONDS
        while not condition() and time.monotonic() < end:
            time.sleep(0.05)

    def _role(self) -> tuple[str, ...]:
        tokens = TOKENS[self._lives % len(TOKENS)]
        self._lives += 1
        return "trainer", "--set", f"trainer.batch_tokens={tokens}"

    def _lose_power(self, synced: dict[str, int]) -> None:
        """Cut the two logs back to what was synced."""
        self.power_failures += 1
        for path in (self.host.state / "trainer" / "steps.jsonl", self._prequential):
            if path.exists():
                size = path.stat().st_size
                durable = min(size, synced.get(str(path.stat().st_ino), 0))
                self.bytes_lost += size - durable
                os.truncate(path, durable)

    def _config(self) -> Config:
        """The killed trainer's, by the way that it had it."""
        return load([], environ=self.host._environment)[0]

    def _tell(self, what: str) -> None:
        print(f"{time.monotonic() - self._began:7.1f}  {what}", file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=0, help=f"at least one at each of the {len(POINTS)} points")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--control", default="", choices=["", *CONTROLS])
    parser.add_argument("--directory", type=Path, help="where everything lies, and stays; else a temporary one")
    args = parser.parse_args()
    if not os.environ.get("KAFKA_HOME"):
        sys.exit("an ordeal needs a broker of its own: set KAFKA_HOME")
    directory = args.directory or Path(tempfile.mkdtemp(prefix="ordeal-"))
    plan = Plan(kills=args.kills, seed=args.seed, control=args.control)
    with Broker(directory / "kafka", Path(os.environ["KAFKA_HOME"])) as broker:
        ordeal = Ordeal(plan, directory, broker.bootstrap)
        try:
            result = ordeal.run()
        except AssertionError as error:
            result = {"exact": False, "seed": args.seed, "deaths": ordeal.deaths.total(), "problems": [str(error)]}
    return tell(result, directory, keep=bool(args.directory))


if __name__ == "__main__":
    sys.exit(main())
