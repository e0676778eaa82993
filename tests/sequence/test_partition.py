"""What comes out is a function of the records alone, and is what the oracle of the contract says."""

import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from streamgr import config
from streamgr.errors import DataError
from streamgr.events import IMPRESSION, PROFILE, Record, Records, item_key
from streamgr.sequence import examples as wire
from streamgr.sequence import items, views
from streamgr.sequence import partition as module
from streamgr.sequence.origin import fingerprint
from streamgr.sequence.partition import Partition
from streamgr.state.rocks import Memory
from streamgr.state.store import Meta, Store
from tests.oracle import Oracle
from tests.sequence import plain_windows
from tests.streams import columns, events

Json = dict[str, Any]
MEMORY = Memory(config.State(cache_bytes=1 << 20, write_buffer_bytes=4 << 20))
ACTIONS = ("click", "like")
FAST = config.Sequence(
    attribution_window_seconds=0.1,
    lateness_seconds=0.05,
    close_step_seconds=0.01,
    history_length=4,
    cached_events=1,
)
META = Meta(
    cluster_id="c", topic_id="t", topic="e", partition=0, partitions=1, fingerprint="f", actions=ACTIONS,
    window_ms=100, emits=True,
)  # fmt: skip
BATCHES = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))


def records(rows: Sequence[Json], append_ms: int = 10_000) -> Records:
    """One partition's log of events, {"erase": user}, heartbeats, and anything broken."""
    log = []
    for offset, row in enumerate(rows):
        key: bytes | None = str(row.get("user_id", "")).encode() or None
        value: bytes | None = json.dumps(row).encode()
        if "erase" in row:
            key, value = row["erase"].encode(), None
        log.append(Record("e", 0, offset, key, value, append_ms + offset))
    return columns(log)


@contextmanager
def directory() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="partition-"))
    try:
        yield path
    finally:
        shutil.rmtree(path)


class Run:
    """A partition over a store of its own; outputs by position, each held to say the same every time."""

    def __init__(self, path: Path, how: config.Sequence = FAST, *, emits: bool = True) -> None:
        self.path, self.how, self.emits = path / "p00000", how, emits
        self.outputs: dict[tuple[int, int], bytes] = {}
        self.order: list[wire.Example] = []
        self.dead: dict[int, str] = {}
        self.duplicates = self.late = self.expired = 0
        self.store = self.opened()
        self.partition = Partition(self.store, how, "f", emits=emits)

    def opened(self) -> Store:
        store = Store(self.path, MEMORY)
        store.claim(replace(META, keep_ms=round(self.how.keep_seconds * 1000)))
        return store

    def apply(self, log: Records) -> None:
        out = self.partition.apply(log, self.take)
        self.dead |= {record.offset: bad.reason for record, bad in out.dead_letters}
        self.duplicates += out.duplicates
        self.late += out.late
        self.expired += out.expired

    def take(self, key: bytes, value: bytes) -> None:
        example = wire.decode(value)
        assert isinstance(example, wire.Example)
        assert (key, wire.encode(example)) == (example.user.encode(), value)
        assert self.outputs.setdefault(example.position, value) == value
        self.order.append(example)

    def crash(self, *, reopen: bool = True) -> None:
        """All that was not committed is gone."""
        if reopen:
            self.store.close()
            self.store = self.opened()
        self.partition = Partition(self.store, self.how, "f", emits=self.emits)

    def exported(self) -> list[Json]:
        self.partition.commit()
        shown = (views.sequence(self.store, user) for user in sorted(self.store.users()))
        return [sequence for sequence in shown if sequence["events"]]

    def targets(self) -> Counter[tuple[int, str, str, tuple[str, ...]]]:
        found = Counter()
        for value in self.outputs.values():
            example = wire.decode(value)
            assert isinstance(example, wire.Example)
            shown = views.examples_json(example, 0, ACTIONS)
            for t in shown["targets"]:
                found[shown["position"]["offset"], example.user, t["event_id"], tuple(t["labels"])] += 1
        return found


# --- streams: two users, three items, few times, so that everything meets everything ---

TIME = st.integers(0, 400)
ID = st.sampled_from(["a", "b", "c", "d", "e", "f"])
EVENT = st.fixed_dictionaries(
    {
        "type": st.sampled_from(["impression", "impression", "click", "like", "profile"]),
        "event_id": ID,
        "user_id": st.sampled_from(["u", "v"]),
        "item_id": st.sampled_from(["x", "y", "z"]),
        "event_time": TIME,
    },
    optional={
        "request_id": st.sampled_from(["r", "s"]),
        "features": st.sampled_from(
            [{}, {"country": "BR"}, {"country": "US"}, {"age": "3", "country": "BR"}, {"age": 3}]
        ),
    },
)
HEARTBEAT = st.fixed_dictionaries({"type": st.just("heartbeat"), "event_time": TIME})
ERASURE = st.fixed_dictionaries({"erase": st.sampled_from(["u", "v", "nobody"])})
BROKEN = st.just({"type": "purchase", "user_id": "u"})
ONE = st.one_of(EVENT, EVENT, EVENT, EVENT, EVENT, HEARTBEAT, ERASURE, BROKEN).map(lambda row: [row])
SLATE = st.builds(
    lambda first, shown: [{**first, "type": "impression", "event_id": i, "item_id": x} for i, x in shown],
    EVENT, st.lists(st.tuples(ID, st.sampled_from(["x", "y", "z"])), min_size=2, max_size=6),
)  # fmt: skip
STREAM = st.lists(st.one_of(ONE, ONE, ONE, SLATE), min_size=1, max_size=50).map(lambda parts: [*chain(*parts)])
# what else a deployment may set: nothing kept for long, a watermark held back, no lateness, targets alone
HOW = st.sampled_from([
    FAST,
    replace(FAST, keep_seconds=0.16),
    replace(FAST, keep_seconds=0.2, max_step_seconds=0.03, history_length=3),
    replace(FAST, lateness_seconds=0.0),
    replace(FAST, cached_events=1_000_000),
    replace(FAST, history_length=0),
])  # fmt: skip
END = [{"type": "heartbeat", "event_time": 400 + 30 * n} for n in range(40)]  # closes all, however it is held back
# after how many records: go on, commit, or crash
CUTS = st.lists(st.tuples(st.integers(1, 12), st.sampled_from(["on", "commit", "crash"])), max_size=30)


def drive(run: Run, log: Records, cuts: Sequence[tuple[int, str]]) -> None:
    """Apply the whole log, cut and broken as told; then all that is left, in one batch."""
    for size, then in cuts:
        at = run.partition.next_offset
        run.apply(log.between(at, at + size))
        if then == "commit":
            run.partition.commit()
        elif then == "crash":
            run.crash(reopen=False)
    run.apply(log)


@pytest.fixture(autouse=True)
def trims_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """However short a tail is."""
    monkeypatch.setattr(module, "WORTH_TRIMMING", 0)


@BATCHES
@given(STREAM, CUTS, HOW)
def test_batches_commits_and_crashes_change_nothing(
    rows: list[Json], cuts: list[tuple[int, str]], how: config.Sequence
) -> None:
    log = records([*rows, *END])
    with directory() as one, directory() as two:
        whole, broken = Run(one, how), Run(two, how)
        whole.apply(log)
        drive(broken, log, cuts)
        assert broken.outputs == whole.outputs
        assert broken.dead == whole.dead
        assert broken.exported() == whole.exported()
        assert broken.partition.open_impressions == whole.partition.open_impressions == 0
        assert list(broken.store.due(-1)) == []
        assert broken.store.progress == whole.store.progress
        for run in (whole, broken):
            run.store.close()


def fed(rows: Sequence[Json], how: config.Sequence) -> Oracle:
    """What the oracle makes of it."""
    oracle = Oracle(
        window_ms=100,
        lateness_ms=round(how.lateness_seconds * 1000),
        step_ms=10,
        max_step_ms=round(how.max_step_seconds * 1000),
        keep_ms=round(how.keep_seconds * 1000),
    )
    for offset, row in enumerate(rows):
        if row.get("type") != "purchase":
            oracle.feed(offset, {k: v for k, v in row.items() if k != "item_id" or row["type"] != "profile"})
    return oracle


@BATCHES
@given(STREAM, CUTS, HOW)
def test_targets_and_sequences_are_the_oracles(
    rows: list[Json], cuts: list[tuple[int, str]], how: config.Sequence
) -> None:
    with directory() as path:
        run = Run(path, how)
        drive(run, records(rows), cuts)
        assert run.exported() == list(fed(rows, how).sequences())  # before all is closed, and perhaps trimmed
        rows = [*rows, *END]
        oracle = fed(rows, how)
        run.apply(records(rows))
        assert run.targets() == Counter((t.offset, t.user, t.event_id, t.labels) for t in oracle.targets)
        assert run.exported() == list(oracle.sequences())
        if not {"crash"} & {then for _, then in cuts}:  # else some were applied twice
            assert (run.duplicates, run.late, run.expired) == (oracle.duplicates, oracle.late, oracle.expired)
        run.store.close()


@BATCHES
@given(STREAM, HOW)
def test_a_slate_at_once_is_its_events_one_by_one(rows: list[Json], how: config.Sequence) -> None:
    log = records([*rows, *END])
    with directory() as one, directory() as two:
        fast, plain = Run(one, how), Run(two, how)
        plain.partition.slates = False
        for run in (fast, plain):
            run.apply(log)
        assert fast.outputs == plain.outputs
        assert fast.exported() == plain.exported()
        assert list(fast.store.database.scan("events")) == list(plain.store.database.scan("events"))
        for run in (fast, plain):
            run.store.close()


@BATCHES
@given(STREAM, CUTS, st.sampled_from([64, 2, 0]))
def test_a_window_is_the_sequence_as_it_stood_cut_at_its_last_target(
    rows: list[Json], cuts: list[Any], auxiliary: int
) -> None:
    log = records([*rows, {"type": "heartbeat", "event_time": 10_000}])
    with directory() as path:
        run = Run(path, replace(FAST, auxiliary_length=auxiliary))
        drive(run, log, cuts)
        for value in run.outputs.values():
            e = wire.decode(value)
            assert isinstance(e, wire.Example)
            stood: dict[tuple[Any, ...], Json] = {}
            for row in rows[: e.position[0] + 1]:
                if row.get("erase") == e.user:
                    stood.clear()
                elif row.get("user_id") == e.user and row["type"] in plain_windows.KINDS:
                    stood.setdefault(plain_windows.order(row), row)
            h, last = e.history, int(e.target_index[-1])
            assert last == len(h) - 1
            events = list(stood.values())
            ends = [row for row in events if row["event_id"] == e.target_events[-1] and row["type"] != "profile"]
            windows = [plain_windows.window(events, last=row, limit=4, auxiliary=auxiliary) for row in ends]
            assert list(zip(h.times.tolist(), h.kinds.tolist(), h.items.tolist(), strict=True)) in windows
            for i, item in zip(e.target_index.tolist(), e.target_items, strict=True):
                assert int(h.items[i]) == item_key(item) and h.kinds[i]


@BATCHES
@given(STREAM, CUTS, HOW, st.integers(0, 400), st.sampled_from([64, 3]))
def test_what_a_scorer_sees_is_the_plain_window(
    rows: list[Json], cuts: list[Any], how: config.Sequence, at: int, auxiliary: int
) -> None:
    how = replace(how, auxiliary_length=auxiliary)
    log = records(rows)
    with directory() as path:
        run = Run(path, how, emits=False)
        drive(run, log, cuts)
        oracle = fed(rows, how)
        watermark = run.partition.watermark
        cut = -1 if watermark is None or not how.keep_seconds else watermark - round(1000 * how.keep_seconds)
        for user in {str(row["user_id"]) for row in rows if "user_id" in row}:
            events = [held.event for held in oracle.users[user].held.values()] if user in oracle.users else []
            for limit in (1, 5, 100):
                found = run.partition.history(user, at, limit)
                mine = []
                if found is not None:
                    mine = list(zip(found.times.tolist(), found.kinds.tolist(), found.items.tolist(), strict=True))
                assert mine == plain_windows.window(events, upto=at, limit=limit, auxiliary=auxiliary, cut=cut)
        run.store.close()
        run.store.close()


@BATCHES
@given(st.lists(EVENT, max_size=40), st.randoms(use_true_random=False))
def test_disorder_within_the_lateness_changes_no_join_and_no_label(rows: list[Json], rng: Any) -> None:
    rows = list({(r["user_id"], r["type"], r["event_time"], r["event_id"]): r for r in rows}.values())
    end = [{"type": "heartbeat", "event_time": 10_000}]
    seen = []
    for spread in (0, 49):
        arrival = sorted(rows, key=lambda r: r["event_time"] + rng.uniform(0, spread))
        with directory() as path:
            run = Run(path)
            run.apply(records(arrival + end))
            assert run.late == 0
            seen.append((Counter(t[1:] for t in run.targets().elements()), run.exported()))
            run.store.close()
    assert seen[0] == seen[1]


def test_every_output_names_the_one_before(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for start in range(0, 900, 50):
        run.apply(records(events(5, 900, span_ms=9_000), append_ms=1_700_000_100_000).between(start, start + 50))
        run.partition.commit()
        if start % 200 == 0:
            run.crash()
    assert len(run.order) > 50
    mark = wire.BEFORE_ALL
    for example in run.order:
        assert example.prev == mark < example.position
        mark = example.position
    assert run.store.progress.last == mark


def test_one_user_one_example_by_name_unless_its_targets_span_too_much(tmp_path: Path) -> None:
    shown = [
        {"type": "impression", "event_id": f"{u}{k}", "user_id": u, "item_id": "x", "event_time": k}
        for k in range(7)
        for u in ("b", "a")
    ]
    run = Run(tmp_path)
    run.apply(records([*shown, {"type": "heartbeat", "event_time": 500}]))
    assert [(e.user, e.target_events, e.position) for e in run.order] == [
        ("a", ["a0", "a1"], (14, 0)),
        ("a", ["a2", "a3"], (14, 1)),
        ("a", ["a4", "a5"], (14, 2)),
        ("a", ["a6"], (14, 3)),
        ("b", ["b0", "b1"], (14, 4)),
        ("b", ["b2", "b3"], (14, 5)),
        ("b", ["b4", "b5"], (14, 6)),
        ("b", ["b6"], (14, 7)),
    ]
    assert [len(e.history) for e in run.order[:4]] == [2, 4, 4, 4]
    assert run.order[0].append_ms == 10_014
    assert run.order[0].target_append_ms.tolist() == [10_001, 10_003]


def test_the_same_event_again_changes_nothing_even_much_later(tmp_path: Path) -> None:
    first = {"type": "click", "event_id": "e", "user_id": "u", "item_id": "x", "event_time": 3}
    run = Run(tmp_path)
    run.apply(records([first, {**first, "item_id": "another item"}, {**first, "type": "like"}]))
    run.partition.commit()
    rest = [{**first, "event_id": f"n{k}", "event_time": 1_000 + k} for k in range(50)]
    run.apply(records([first] * 3 + rest + [first]))
    run.partition.commit()
    run.crash()
    before = run.store.progress.seen
    run.apply(records([first] * 54 + [first, {**first, "type": "profile"}, {**first, "type": "profile"}]))
    assert run.duplicates == 4
    assert run.partition.newest_event_ms == before
    assert [e["event_id"] for e in run.exported()[0]["events"][:3]] == ["e", "e", "e"]  # profile, click, like


def test_late_events_are_kept_marked_and_change_no_label(tmp_path: Path) -> None:
    def row(kind: str, event_id: str, time: int, item: str = "x") -> Json:
        return {"type": kind, "event_id": event_id, "user_id": "u", "item_id": item, "event_time": time}

    run = Run(tmp_path)
    run.apply(
        records(
            [
                row("impression", "shown", 100),
                row("impression", "w1", 99, "w"),
                {"type": "heartbeat", "event_time": 250},  # the watermark is at 200: `shown` closes
                row("impression", "too late", 100, "y"),
                row("impression", "just in time", 101, "y"),
                row("click", "late click", 150),
                row("click", "organic, behind the watermark", 150, "z"),
                row("click", "joins", 151, "y"),
                row("click", "late for w1", 190, "w"),
                row("impression", "w2", 185, "w"),  # that click joins it now, but was late when it came
                {"type": "heartbeat", "event_time": 400},
            ]
        )
    )
    assert [(e.target_events, e.target_labels.tolist()) for e in run.order] == [
        (["w1", "shown"], [0, 0]),
        (["just in time"], [1]),
        (["organic, behind the watermark"], [1]),
        (["w2"], [0]),
    ]
    assert run.late == 3
    shown = {e["event_id"]: (e.get("actions"), e.get("late")) for e in run.exported()[0]["events"]}
    assert shown == {
        "shown": (["click"], None),
        "too late": (None, True),
        "just in time": (["click"], None),
        "late click": (None, True),
        "organic, behind the watermark": (None, None),
        "joins": (None, None),
        "w1": (None, None),
        "late for w1": (None, True),
        "w2": (["click"], None),
    }


def test_an_old_organic_action_gets_the_window_of_its_own_time(tmp_path: Path) -> None:
    """Its tail was trimmed long ago: it is read back from the store, before and after a restart."""
    old = [
        {"type": "like", "event_id": f"o{k}", "user_id": "u", "item_id": f"x{k}", "event_time": 10 * k}
        for k in range(6)
    ]
    new = [
        {"type": "like", "event_id": f"n{k}", "user_id": "u", "item_id": "x", "event_time": 5_000 + 10 * k}
        for k in range(40)
    ]
    late = {"type": "click", "event_id": "late", "user_id": "u", "item_id": "z", "event_time": 25}
    log = records([*old, *new, late, {"type": "heartbeat", "event_time": 9_000}])
    for crash in (False, True):
        run = Run(tmp_path / str(crash))
        for start in range(0, 46, 5):
            run.apply(log.between(start, min(start + 5, 46)))
            run.partition.commit()
        run.apply(log.between(46, 47))
        run.partition.commit()
        if crash:
            run.crash()
        run.apply(log)
        by_last = {e.target_events[-1]: e for e in run.order}
        assert by_last["late"].history.items.tolist() == [item_key(i) for i in ("x0", "x1", "x2", "z")]


def test_a_follower_keeps_the_same_sequences_and_emits_nothing(tmp_path: Path) -> None:
    log = records(events(6, 800, span_ms=9_000), append_ms=1_700_000_100_000)
    leader, follower = Run(tmp_path / "a"), Run(tmp_path / "b", emits=False)
    for start in range(0, len(log), 100):
        leader.apply(log.between(start, start + 100))
        follower.apply(log.between(start, start + 100))
        for run in (leader, follower):
            run.partition.commit()
        for user in ("u0", "u1", "u7"):
            seen = [r.partition.history(user, 1_700_000_003_000, 5) for r in (leader, follower)]
            assert (seen[0] is None) == (seen[1] is None)
            if seen[0] is not None and seen[1] is not None:
                assert (seen[0].kinds != PROFILE).sum() <= 5
                assert seen[0].times.tolist() == seen[1].times.tolist()
                assert (seen[0].times < 1_700_000_003_000).all()
    assert leader.outputs
    assert not follower.outputs
    assert list(follower.store.due(-1)) == []
    assert leader.exported() == follower.exported()


def test_history_is_the_newest_before_a_time(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.apply(
        records(
            [
                {"type": "impression", "event_id": f"e{k}", "user_id": "u", "item_id": f"x{k}", "event_time": 100 * k}
                for k in range(40)
            ]
            + [{"type": "profile", "event_id": "p", "user_id": "u", "event_time": 3_000}]
        )
    )
    for before in ("uncommitted", "committed", "after a restart"):
        h = run.partition.history("u", 3_000, 3)
        assert h is not None, before
        assert h.times.tolist() == [2_700, 2_800, 2_900]
        assert h.kinds.tolist() == [IMPRESSION] * 3
        early = run.partition.history("u", 250, 64)
        assert early is not None
        assert early.times.tolist() == [0, 100, 200]
        assert run.partition.history("nobody", 3_000, 3) is None
        run.partition.commit()
        if before == "committed":
            run.crash()


def test_an_erased_user_leaves_nothing_and_may_come_back(tmp_path: Path) -> None:
    shown = {"type": "impression", "event_id": "e", "user_id": "u", "item_id": "x", "event_time": 1}
    run = Run(tmp_path)
    run.apply(records([shown, {**shown, "event_id": "f", "user_id": "v"}]))
    run.partition.commit()
    run.apply(records([shown, shown, {"erase": "u"}]))
    assert not run.partition.knows("u")
    assert run.partition.history("u", 10_000, 10) is None
    assert run.partition.open_impressions == 1
    run.apply(records([shown] * 3 + [shown]))  # the same event is a new one now
    run.apply(records([shown] * 4 + [{"erase": "u"}]))
    run.partition.commit()
    assert list(run.store.users()) == ["v"]
    assert len(list(run.store.database.scan("events"))) == 1
    assert run.duplicates == 0


@pytest.mark.parametrize("kind", ["profile", "impression"])
def test_what_comes_again_after_an_erasure_is_new_wherever_the_commits_fall(kind: str, tmp_path: Path) -> None:
    again = {"type": kind, "event_id": "e", "user_id": "u", "item_id": "x", "event_time": 1}
    rows = [again, again, {"erase": "u"}, again, again]
    shown = []
    for commits in (1, 2, 3, 4, 5):
        run = Run(tmp_path / str(commits))
        for start in range(0, len(rows), commits):
            run.apply(records(rows[: start + commits]))
            run.partition.commit()
        assert run.duplicates == 2
        shown.append(run.exported())
    assert shown == [shown[0]] * 5 and len(shown[0][0]["events"]) == 1


def test_two_items_under_one_key_stop_the_work_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(items, "item_key", lambda text: 7)
    row = {"type": "like", "event_id": "e", "user_id": "u", "item_id": "x", "event_time": 1}
    run = Run(tmp_path)
    run.apply(records([row]))
    for _ in range(2):
        with pytest.raises(DataError, match="'x' and 'y' share the key"):
            run.apply(records([row, {**row, "event_id": "f", "item_id": "y"}]))
        run.partition.commit()
        run.crash()


def test_the_fingerprint_knows_every_setting_that_decides_what_is_emitted() -> None:
    base = fingerprint("c", "t", FAST)
    assert len(base) == 16
    changed = [
        {"attribution_window_seconds": 0.2},
        {"lateness_seconds": 0.0},
        {"close_step_seconds": 0.02},
        {"max_step_seconds": 1.0},
        {"history_length": 5},
        {"keep_seconds": 60.0},
        {"actions": ("like", "click")},
    ]
    seen = {base, fingerprint("d", "t", FAST), fingerprint("c", "u", FAST)}
    for fields in changed:
        seen.add(fingerprint("c", "t", config.Sequence(**{**_fields(FAST), **fields})))
    assert len(seen) == 3 + len(changed)
    for fields in ({"cached_events": 7}, {"commit_interval_seconds": 5.0}, {"heartbeat_seconds": 1.0}):
        assert fingerprint("c", "t", config.Sequence(**{**_fields(FAST), **fields})) == base


def _fields(section: config.Sequence) -> Json:
    return {name: getattr(section, name) for name in section.__struct_fields__}
