"""Long comparisons that go on where they were interrupted: a run that has ended is a line of a file.

A run is known by what it depends on (`identity`: JSON, no functions); its result is added to that and written down at
once. The same identity is never run twice, so delete the file to begin anew.
"""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

from tests.bench.kit import Json

Run = Callable[[Json], Json]


class Runs:
    """The runs of one file of JSON lines."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def all(self, wanted: Sequence[Json], run: Run, *, jobs: int = 1) -> list[Json]:
        """identity | result of each; those that are missing are run, in `jobs` processes (1: in this one)."""
        finished = {_key(line, line["of"]): line for line in self._lines()}
        missing = [what for what in wanted if _key(what, [*what]) not in finished]
        self._path.parent.mkdir(exist_ok=True)
        with self._path.open("a") as file:
            if self._path.stat().st_size and not self._path.read_text().endswith("\n"):
                file.write("\n")  # after a line that was cut off
            for what, found in _performed(missing, run, jobs):
                line = {"of": [*what], **what, **found}
                finished[_key(what, [*what])] = line
                file.write(json.dumps(line) + "\n")
                file.flush()
        return [finished[_key(what, [*what])] for what in wanted]

    def _lines(self) -> Iterator[Json]:
        for text in self._path.read_text().splitlines() if self._path.exists() else []:
            try:
                yield json.loads(text)
            except json.JSONDecodeError:
                print(f"{self._path}: a line is not whole, its run is repeated", file=sys.stderr)


def _key(line: Json, names: Sequence[str]) -> str:
    return json.dumps({name: line[name] for name in names}, sort_keys=True)


def _performed(missing: Sequence[Json], run: Run, jobs: int) -> Iterator[tuple[Json, Json]]:
    """(identity, result) of each run, as they end."""
    if jobs == 1:
        for what in missing:
            yield what, run(what)
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(run, what): what for what in missing}
        for future in as_completed(futures):
            yield futures[future], future.result()
