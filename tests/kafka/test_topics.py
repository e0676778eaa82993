"""topics.toml says what the contract says; `check` sees every difference; `apply` makes what it may and no more."""

from collections.abc import Callable
from pathlib import Path

import pytest
from confluent_kafka.admin import AdminClient, NewTopic

from streamgr.clock import SystemClock
from streamgr.config import Kafka
from streamgr.errors import BrokerUnreachable, ConfigError
from streamgr.kafka import topics
from streamgr.kafka.embedded import EmbeddedBroker
from streamgr.kafka.topics import Finding, TopicSpec
from streamgr.service import Stop


@pytest.fixture
def specs(prefix: str) -> list[TopicSpec]:
    return topics.load_specs(topics.specs_path(), prefix)


def levels(findings: list[Finding]) -> dict[str, list[str]]:
    by_topic: dict[str, list[str]] = {}
    for f in findings:
        by_topic.setdefault(f.topic.split(".")[1], []).append(f.level)
    return by_topic


def create(bootstrap: str, *new: NewTopic) -> AdminClient:
    admin = AdminClient({"bootstrap.servers": bootstrap})
    for future in admin.create_topics(list(new)).values():
        future.result(10)
    until(lambda: {n.topic for n in new} <= admin.list_topics(timeout=10).topics.keys())
    return admin


def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """The controller's answer comes before the brokers' metadata."""
    clock = SystemClock()
    end = clock.monotonic() + seconds
    while not condition():
        assert clock.monotonic() < end
        Stop().wait(0.05)


def test_the_file_specifies_every_topic_of_the_contract(repository: Path) -> None:
    assert topics.specs_path() == repository / "topics"
    specs = {s.name: s for s in topics.load_specs(topics.specs_path(), "streamgr")}
    names = ("events", "examples", "dead-letters", "weights", "manifests", "freshness", "scores")
    tables = ("monitor-dead-letters", "monitor-quality")  # changelogs: nobody else's business
    assert list(specs) == [f"streamgr.{name}" for name in (*names, *tables)]
    events, letters = specs["streamgr.events"], specs["streamgr.dead-letters"]
    assert events.config["message.timestamp.type"] == "LogAppendTime"
    assert int(letters.config["max.message.bytes"]) - int(events.config["max.message.bytes"]) == 64 << 10
    assert events.partitions == letters.partitions == specs["streamgr.examples"].partitions
    assert specs["streamgr.weights"].partitions == specs["streamgr.manifests"].partitions == 1
    assert specs["streamgr.manifests"].config["cleanup.policy"] == "compact"
    assert "compact" not in specs["streamgr.weights"].config["cleanup.policy"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[a]\npartitions = 1", "missing required field `about`"),
        ("[a]\nabout = ''\npartitions = 'x'", "Expected `int`"),
        ("[a]\nabout = ''\npartitions = 1\nretention = 3", "unknown field `retention`"),
        ("[a]\nabout = ''\npartitions = 0", "needs a partition"),
        ("[a]\nabout = ''\npartitions = 1\nsame_partitions_as = 'b'", "as many partitions as `b`"),
        ("[a", "topics.toml"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "topics.toml").write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        topics.load_specs(tmp_path, "p")
    assert str(tmp_path) in str(caught.value)
    with pytest.raises(ConfigError, match="cannot read the file"):
        topics.load_specs(tmp_path / "absent.toml", "p")


def test_apply_creates_what_check_misses_and_again_changes_nothing(kafka: str, specs: list[TopicSpec]) -> None:
    settings = Kafka(bootstrap=kafka)
    missing = topics.check(settings, specs)
    assert {f.level for f in missing} == {"fail"} and all("streamgr topics apply" in str(f) for f in missing)
    assert {f.level for f in topics.apply(settings, specs)} == {"done"}
    assert {f.level for f in topics.check(settings, specs)} == {"ok"}
    assert {f.level for f in topics.apply(settings, specs)} == {"ok"}


def test_check_sees_a_missing_append_time_and_a_wrong_count_and_apply_mends_only_the_first(
    kafka: str, prefix: str, specs: list[TopicSpec]
) -> None:
    settings = Kafka(bootstrap=kafka)
    create(
        kafka, NewTopic(f"{prefix}.events", 2, 1), NewTopic(f"{prefix}.weights", 1, 1, config={"retention.ms": "1000"})
    )
    found = [f for f in topics.check(settings, specs) if f.topic in (f"{prefix}.events", f"{prefix}.weights")]
    text = "\n".join(map(str, found))
    assert all(f.level == "fail" for f in found)
    assert "message.timestamp.type is CreateTime, specified is LogAppendTime" in text
    assert "2 partitions, specified are 4  ->  a count never changes" in text
    assert "retention.ms is 1000, specified is 172800000" in text
    done = levels(topics.apply(settings, specs))
    assert done["events"] == ["done", "fail"] and done["weights"] == ["done"] and done["examples"] == ["done"]
    (left,) = (f for f in topics.check(settings, specs) if f.level != "ok")
    assert left.topic == f"{prefix}.events" and "2 partitions" in left.what


def test_apply_deletes_nothing_and_resets_nothing_it_does_not_specify(
    kafka: str, prefix: str, specs: list[TopicSpec]
) -> None:
    name = f"{prefix}.scores"
    admin = create(kafka, NewTopic(f"{prefix}.mine", 1, 1), NewTopic(name, 4, 1, config={"segment.ms": "123456"}))
    topics.apply(Kafka(bootstrap=kafka), specs)
    assert f"{prefix}.mine" in admin.list_topics(timeout=10).topics
    assert topics._configs(topics.Admin(Kafka(bootstrap=kafka)), [name])[name]["segment.ms"].value == "123456"


def test_a_setting_the_broker_refuses_is_named(kafka: str, prefix: str) -> None:
    bad = TopicSpec(f"{prefix}.bad", "", 1, {"cleanup.policy": "sometimes"})
    with pytest.raises(ConfigError, match=rf"{prefix}\.bad: .*sometimes.*topics.toml"):
        topics.apply(Kafka(bootstrap=kafka), [bad])


def test_a_recreated_topic_has_another_identity(kafka: str, prefix: str, specs: list[TopicSpec]) -> None:
    settings, name = Kafka(bootstrap=kafka), f"{prefix}.events"
    topics.apply(settings, specs)
    first = topics.identity(settings, name)
    assert first.partitions == 4 and first.topic_id and first.cluster_id
    assert topics.identity(settings, name) == first
    assert topics.identity(settings, f"{prefix}.examples").topic_id != first.topic_id
    admin = AdminClient({"bootstrap.servers": kafka})  # it must outlive its futures
    admin.delete_topics([name], operation_timeout=10)[name].result(10)
    until(lambda: name not in admin.list_topics(timeout=10).topics)
    topics.apply(settings, specs)
    again = topics.identity(settings, name)
    assert again.topic_id != first.topic_id and again.cluster_id == first.cluster_id


def test_on_the_mock_topics_appear_and_the_findings_say_what_that_lacks(prefix: str, specs: list[TopicSpec]) -> None:
    with EmbeddedBroker.start_mock() as mock:
        settings = Kafka(bootstrap=mock.bootstrap)
        assert {f.level for f in topics.check(settings, specs)} == {"fail"}
        for findings in (topics.apply(settings, specs), topics.check(settings, specs)):
            assert {f.level for f in findings} == {"ok"}
            assert all("mock broker (4 partitions, no settings" in f.what for f in findings)
        found = topics.identity(settings, f"{prefix}.weights")
        assert found.topic_id == "" and found.partitions == 4 and topics.is_mock(found.cluster_id)


def test_without_a_broker_the_answer_is_bounded_and_names_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamgr.kafka.client.ADMIN_SECONDS", 0.5)
    with pytest.raises(BrokerUnreachable, match=r"check kafka.bootstrap \(127.0.0.1:1\)") as caught:
        topics.check(Kafka(bootstrap="127.0.0.1:1"), [])
    assert caught.value.exit_code == 69
