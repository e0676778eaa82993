"""The broker and its topics, and how far the roles say they are."""

from collections.abc import Iterator
from pathlib import Path

from streamgr.doctor.case import Case, age, fail, ok, warn
from streamgr.errors import ConfigError, RetentionPassed, StreamgrError
from streamgr.kafka import topics as specified
from streamgr.kafka.inquiry import Inquiry
from streamgr.kafka.security import security
from streamgr.sanity import Finding
from streamgr.state.snapshot import Snapshots

SKEW_SECONDS, BAD_SKEW_SECONDS = 0.5, 30.0
OVERDUE = 3  # times `state.snapshot_seconds`
REPLAY_EVENTS_PER_SECOND = 10_000  # on purpose low: what a slow machine reads again, beside other work


def reached(case: Case) -> Iterator[Finding]:
    """Asked before all that follows."""
    kafka = case.config.kafka
    cluster, brokers = Inquiry(kafka, case.clock).brokers()
    way = security(kafka)
    yield ok(
        "broker",
        f"{kafka.bootstrap} answers: {brokers} broker(s) of cluster {cluster}, {way.protocol} {way.mechanism}".rstrip(),
    )


def present(case: Case) -> Iterator[Finding]:
    """Without them there is nothing to look at."""
    kafka = case.config.kafka
    wanted = {spec.name for spec in specified.load_specs(specified.specs_path(), kafka.topic_prefix)}
    if missing := sorted(wanted - Inquiry(kafka, case.clock).topics()):
        yield fail("topics", f"missing: {', '.join(missing)}", "streamgr topics apply", ConfigError.exit_code)


def topics(case: Case) -> Iterator[Finding]:
    """As specified, LogAppendTime of the events among it."""
    kafka = case.config.kafka
    for found in specified.check(kafka, specified.load_specs(specified.specs_path(), kafka.topic_prefix)):
        exit_code = ConfigError.exit_code if found.level == "fail" else 0
        yield Finding(found.level, "topics", f"{found.topic}: {found.what}", found.remedy, exit_code)


def version(case: Case) -> Iterator[Finding]:
    """Kafka's topics had `message.format.version` until 4.0; no broker tells librdkafka its version outright."""
    if _is_mock(case):
        yield ok("broker version", "skipped: the mock broker has none")
        return
    old = (
        Inquiry(case.config.kafka, case.clock).topic_settings(case.config.topic("events")).get("message.format.version")
    )
    if old:
        yield warn(
            "broker version", f"older than Kafka 4 ({old}): streamgr is tested with 4 alone", "upgrade the brokers"
        )
    else:
        yield ok("broker version", "Kafka 4 or later")


def clock(case: Case) -> Iterator[Finding]:
    """Freshness is a difference of two machines' clocks."""
    if _is_mock(case):
        yield ok("clock", "skipped: the mock broker runs on this machine's")
        return
    try:
        skew = Inquiry(case.config.kafka, case.clock).skew(
            case.config.topic("events"), f"{case.config.kafka.topic_prefix}.doctor"
        )
    except StreamgrError as error:
        yield warn("clock", f"the broker's could not be read: {error.what}", error.remedy)
        return
    ahead = "ahead of" if skew.seconds > 0 else "behind"
    what = f"the broker's is {abs(skew.seconds):.3f} s {ahead} ours, give or take {skew.uncertain:.3f} s"
    sure = abs(skew.seconds) - skew.uncertain
    remedy = "run NTP or chrony on both machines: every freshness figure is wrong by this"
    if sure > BAD_SKEW_SECONDS:
        yield fail("clock", what, remedy, ConfigError.exit_code)
    elif sure > SKEW_SECONDS:
        yield warn("clock", what, remedy)
    else:
        yield ok("clock", what)


def retention(case: Case) -> Iterator[Finding]:
    """A store that is lost must be back long before the log has forgotten what it needs."""
    if _is_mock(case):
        yield ok("retention", "skipped: the mock broker keeps about 5 MB a partition and then forgets")
        return
    inquiry, topic = Inquiry(case.config.kafka, case.clock), case.config.topic("events")
    settings = inquiry.topic_settings(topic)
    kept = int(settings["retention.ms"]) / 1000
    events = _to_replay(case, inquiry, topic)
    restore = events / REPLAY_EVENTS_PER_SECOND
    what = (
        f"{topic} keeps {'everything' if kept < 0 else age(kept)}; {events} events to replay take some {age(restore)}"
    )
    if 0 <= kept < 2 * restore:
        remedy = "raise retention.ms in topics.toml, or take snapshots (state.snapshots_directory)"
        yield fail("retention", what, remedy, ConfigError.exit_code)
    elif int(settings["retention.bytes"]) >= 0:
        remedy = "unset retention.bytes: it may forget sooner than any time says"
        yield warn("retention", f"{topic} has a limit of {settings['retention.bytes']} bytes a partition", remedy)
    else:
        yield ok("retention", what)
    weights = case.config.topic("weights")
    held = int(inquiry.topic_settings(weights)["retention.bytes"])
    if 0 <= held < case.config.weights.retention_bytes:
        what = f"{weights} holds {held} bytes, less than weights.retention_bytes {case.config.weights.retention_bytes}"
        yield fail("retention", what, "set retention.bytes of the topic to no less", ConfigError.exit_code)


def lag(case: Case) -> Iterator[Finding]:
    """What the groups have reported: progress itself lives in the stores."""
    if _is_mock(case):
        yield ok("lag", "skipped: the mock broker tells of no groups")
        return
    inquiry = Inquiry(case.config.kafka, case.clock)
    for role, name in (("sequencer", "events"), ("trainer", "examples")):
        topic = case.config.topic(name)
        kept = int(inquiry.topic_settings(topic)["retention.ms"]) / 1000
        stands = inquiry.stands(topic, case.config.group(role))
        if all(stand.at is None for stand in stands):
            yield warn("lag", f"no {role} has reported yet", f"start the {role}; with --until-end it reports nothing")
            continue
        records = sum(stand.end - (stand.first if stand.at is None else max(stand.at, stand.first)) for stand in stands)
        waiting = [stand.waiting_ms for stand in stands if stand.waiting_ms is not None]
        behind = max(0.0, (case.clock.now_ms() - min(waiting)) / 1000) if waiting else 0.0
        what = f"the {role} is {records} records and {age(behind)} behind the end of {topic}"
        if lost := [stand for stand in stands if stand.at is not None and stand.at < stand.first]:
            where = f"{topic}[{lost[0].partition}]@{lost[0].at}, the log starts at {lost[0].first}"
            remedy = "if the role's store is no farther: restore a snapshot, or rebuild with --accept-loss"
            yield fail("lag", f"retention has overtaken the {role}: {where}", remedy, RetentionPassed.exit_code)
        elif 0 <= kept < 2 * behind:
            yield warn("lag", what, f"half of the retention of {age(kept)} is gone: start it, or raise retention.ms")
        else:
            yield ok("lag", what)


def snapshots(case: Case) -> Iterator[Finding]:
    """In the shared directory: readable, and not too old for what has come since."""
    state, topic = case.config.state, case.config.topic("events")
    if not state.snapshots_directory:
        remedy = "set state.snapshots_directory to a volume that all workers share"
        yield warn("snapshots", "none are taken: a lost store is read again from the log's start", remedy)
        return
    for partition, (_, end) in Inquiry(case.config.kafka, case.clock).bounds(topic).items():
        there, refused = Snapshots(Path(state.snapshots_directory)).find(topic, partition)
        for error in refused:
            yield warn("snapshots", f"{error.where}: {error.what}", error.remedy)
        where = f"{topic}[{partition}]"
        if not there:
            if end:
                remedy = f"a sequencer takes the first after {state.snapshot_seconds:g} s: see its log, or start one"
                yield warn("snapshots", f"none of {where} in {state.snapshots_directory}", remedy)
            continue
        newest = there[0].manifest
        old = (case.clock.now_ms() - newest.created_ms) / 1000
        what = f"{where} up to {newest.next_offset} of {end}, {newest.bytes / (1 << 20):.1f} MiB, {age(old)} old"
        if newest.next_offset < end and old > OVERDUE * state.snapshot_seconds:
            yield warn("snapshots", what, "no sequencer takes them: see its log for snapshot_failed, or start one")
        else:
            yield ok("snapshots", what)


def _to_replay(case: Case, inquiry: Inquiry, topic: str) -> int:
    """Events that a worker without any store would read: from the newest snapshots, else from the log's start."""
    root, total = case.config.state.snapshots_directory, 0
    for partition, (first, end) in inquiry.bounds(topic).items():
        found = Snapshots(Path(root)).find(topic, partition)[0] if root else []
        total += end - max([first, *(snapshot.manifest.next_offset for snapshot in found[:1])])
    return max(0, total)


def _is_mock(case: Case) -> bool:
    return specified.is_mock(Inquiry(case.config.kafka, case.clock).brokers()[0])
