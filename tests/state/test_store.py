"""A store belongs to one incarnation of one topic and says so."""

from pathlib import Path

import msgspec
import pytest

from streamgr.config import State
from streamgr.errors import ConfigError, DataError
from streamgr.state import codec
from streamgr.state.rocks import Memory
from streamgr.state.store import Meta, Progress, Store, partition_directory

MEMORY = Memory(State(cache_bytes=1 << 20, write_buffer_bytes=1 << 20))
META = Meta(
    cluster_id="c",
    topic_id="t",
    topic="events",
    partition=3,
    partitions=4,
    fingerprint="f",
    actions=("click", "like"),
    window_ms=2000,
    emits=True,
)


def changed(**fields: object) -> Meta:
    return msgspec.structs.replace(META, **fields)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(partition_directory(tmp_path, 3), MEMORY)
    store.claim(META)
    return store


@pytest.mark.parametrize(
    ("fields", "story"),
    [
        ({"cluster_id": "other"}, "another log"),
        ({"topic_id": "other"}, "the topic was recreated"),
        ({"partitions": 8}, "users have moved"),
        ({"partition": 2}, "another log"),
        ({"emits": False}, "follower"),
        ({"actions": ("like", "click")}, "only be added at the end"),
        ({"actions": ("click",)}, "only be added at the end"),
    ],
)
def test_a_store_refuses_any_other_log(store: Store, fields: dict[str, object], story: str) -> None:
    with pytest.raises(ConfigError, match=story) as caught:
        store.claim(changed(**fields))
    assert caught.value.remedy
    assert str(store.path) in str(caught.value)
    assert caught.value.exit_code == 78
    store.claim(META)


def test_new_kinds_and_a_new_fingerprint_are_kept(store: Store) -> None:
    store.claim(changed(actions=("click", "like", "share"), fingerprint="g"))
    store.close()
    again = Store(store.path, MEMORY)
    assert again.meta == changed(actions=("click", "like", "share"), fingerprint="g")
    assert again.path.name == "p00003"


def test_state_and_progress_are_written_together(store: Store) -> None:
    batch = store.batch()
    batch.put("users", codec.uid("u"), b"u")
    progress = Progress(7, 100, 90, (6, 1), 123, 4)
    assert (store.progress, store.has_user(codec.uid("u"), "u")) == (Progress(), False)
    store.write(batch, progress)
    store.close()
    again = Store(store.path, MEMORY, read_only=True)
    assert (again.progress, again.user_text(codec.uid("u")), list(again.users())) == (progress, "u", ["u"])
    assert list(again.user_keys(b"")) == [codec.uid("u")]
    assert list(again.user_keys(codec.uid("u") + b"\0")) == []


def test_two_users_who_share_a_key_are_an_error_that_names_both(store: Store) -> None:
    batch = store.batch()
    batch.put("users", codec.uid("u"), b"apple")
    batch.put("items", codec.item_bytes(5), b"pear")
    store.write(batch, Progress())
    assert store.has_user(codec.uid("u"), "apple")
    assert not store.has_user(codec.uid("v"), "apple")
    with pytest.raises(DataError, match=r"'apple' and 'u' share the key"):
        store.has_user(codec.uid("u"), "u")
    assert store.item_texts([6, 5]) == [None, "pear"]


def test_a_newer_schema_and_damage_are_refused(store: Store) -> None:
    batch = store.batch()
    batch.put("state", b"meta", msgspec.json.encode(changed(schema=4)))
    store.database.write(batch)
    store.close()
    with pytest.raises(DataError, match=r"schema 4.*remedy"):
        Store(store.path, MEMORY)
    database = Store.__new__(Store)
    with pytest.raises(DataError, match="schema 4"):  # it was closed: no lock is left behind
        database.__init__(store.path, MEMORY)  # type: ignore[misc]


def test_unreadable_progress_is_named(store: Store) -> None:
    batch = store.batch()
    batch.put("state", b"progress", b"\xc1")
    store.database.write(batch)
    store.close()
    with pytest.raises(DataError, match=r"unreadable progress.*remedy"):
        Store(store.path, MEMORY)
