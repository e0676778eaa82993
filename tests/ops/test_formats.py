"""What the documents say of formats, endpoints and log events is what the code has."""

import ast
import re
from collections import defaultdict
from pathlib import Path

from streamgr.sequence import examples, origin
from streamgr.state import codec, snapshot, store
from streamgr.train import checkpoint
from streamgr.weights import manifest

ROOT = Path(__file__).resolve().parents[2]
SHARED = {  # one meaning, told from more than one place
    "partitions_assigned": "what a sequencer owns now: of its group, or by itself",
    "stopped_by_error": "a process leaves with a named error",
    "listening": "a role answers HTTP at this address",
    "stopped_waiting": "a process was told to leave while it waited for the broker",
    "drain_incomplete": "a role left before all of it had",
}


def test_upgrading_names_every_format_as_it_is() -> None:
    text = (ROOT / "UPGRADING.md").read_text()
    for row, said in (
        ("a partition's store", f"schema {store.SCHEMA}"),
        ("an event in it", f"value {codec.VERSION}"),
        ("a snapshot of a partition", f"manifest {snapshot.FORMAT}"),
        ("an example", f"format {examples.FORMAT}, emission {origin.EMISSION}"),
        ("a manifest, and its weights", f"format {manifest.FORMAT}"),
        ("a checkpoint", f"format {checkpoint.FORMAT}"),
    ):
        (line,) = (line for line in text.splitlines() if line.startswith(f"| {row} |"))
        assert f"| {said}" in line, line


def events() -> dict[str, list[str]]:
    """Every `….log.info("event", …)` and its like: the event, and where."""
    found: dict[str, list[str]] = defaultdict(list)
    for path in sorted((ROOT / "streamgr").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            owner = ast.unparse(node.func.value)
            if node.func.attr in ("info", "warning", "error") and re.search(r"(^|[._])log$", owner):
                where = f"{path.relative_to(ROOT)}:{node.lineno}"
                name = node.args[0]
                for choice in (name.body, name.orelse) if isinstance(name, ast.IfExp) else (name,):
                    assert isinstance(choice, ast.Constant), f"{where}: an event is a literal name"
                    found[str(choice.value)].append(where)
    return found


def test_log_events_are_stable_names_and_each_has_one_meaning() -> None:
    found = events()
    assert len(found) > 40
    assert not [name for name in found if not re.fullmatch(r"[a-z]+(_[a-z]+)*", name)]
    twice = {name: places for name, places in found.items() if len(places) > 1 and name not in SHARED}
    assert not twice, twice
    assert SHARED.keys() <= found.keys()
