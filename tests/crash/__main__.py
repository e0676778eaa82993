"""A crash storm from the command line.

    python -m tests.crash --kills 100 --seed 7        (KAFKA_HOME; make crash-test N=100)

The verdict is a JSON object on the last line of stdout; exit 0 only if all of it is exact. A control is the same storm
over workers that are wrong in one thing (`tests.crash.worker`): with `--control kafka-offsets` and with `unconfirmed`
it must not be exact, with `store-offsets` it must.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

from tests.crash.hosts import Broker, tell
from tests.crash.storm import KINDS, Plan, Storm, controlled
from tests.crash.worker import CONTROLS


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=0, help="over after so many deaths (100 if nothing else is given)")
    parser.add_argument("--minutes", type=float, default=0.0, help="over after so long")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rate", type=float, default=1_000.0, help="records a second")
    parser.add_argument(
        "--session-seconds", type=float, default=3.0, help="the group's session timeout (as shipped: 10)"
    )
    parser.add_argument("--kinds", default=",".join(KINDS), help="of death; `term` alone is a rebalance storm")
    parser.add_argument("--control", default="", choices=["", *CONTROLS])
    parser.add_argument("--directory", type=Path, help="where everything lies, and stays; else a temporary one")
    args = parser.parse_args()
    kinds = tuple(args.kinds.split(","))
    if unknown := sorted(set(kinds) - set(KINDS)):
        parser.error(f"no such kinds of death: {', '.join(unknown)}")
    if not os.environ.get("KAFKA_HOME"):
        sys.exit("a storm needs a broker of its own: set KAFKA_HOME")
    plan = Plan(
        kills=args.kills or (0 if args.minutes else 100),
        seconds=args.minutes * 60,
        seed=args.seed,
        rate=args.rate,
        kinds=kinds,
        session_seconds=args.session_seconds,
    )
    if args.control:
        plan = controlled(args.control, plan)
    directory = args.directory or Path(tempfile.mkdtemp(prefix="storm-"))
    with Broker(directory / "kafka", Path(os.environ["KAFKA_HOME"])) as broker:
        storm = Storm(plan, directory, broker.bootstrap, broker)
        try:
            result = storm.run()
        except AssertionError as error:
            result = {"exact": False, "seed": plan.seed, "kills": storm.tally.kills, "problems": [str(error)]}
    return tell(result, directory, keep=bool(args.directory))


if __name__ == "__main__":
    sys.exit(main())
