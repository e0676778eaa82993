"""Brokers die, freeze and come back while sequencers work: what comes out is the oracle's, each once.

Every test: sequencers share a stream of disorder, duplicates, late events and rubbish; something happens to the
brokers in the middle of it; the roles go on by themselves, live whenever they are asked; at the end sequences, accepted
targets and dead letters are exact.
"""

import pytest

from streamgr.clock import SystemClock
from tests.cluster.cluster import Cluster, Node
from tests.cluster.work import Bad, Crew, Feed, assert_exact, learned, stream
from tests.e2e.test_stream import expected
from tests.streams import START, Json, row
from tests.system import PARTITIONS, System, wait_for

HUNG_SECONDS = 15.0  # past the consumers' session timeout (10) and the cluster's own patience with a node (9)
HUNG_LONG_SECONDS = 75.0  # past librdkafka's own patience with a connection that says nothing (60)
AWAY_SECONDS = 40.0  # past the probes' patience with a loop that does not turn (30)


def finish(cluster: Cluster, system: System, crew: Crew, feed: Feed, bad: Bad) -> None:
    """The rest of the stream; everybody reaches its end, leaves in order, and all is exact."""
    feed.finish()
    crew.await_done()
    crew.leave()
    cluster.restore()
    assert_exact(system, crew, feed, bad)


def victim(cluster: Cluster, system: System, what: str) -> Node:
    """The group's coordinator, or a leader of some partitions that is not it."""
    coordinator = cluster.coordinator(f"{system.prefix}-sequencer")
    if what == "coordinator":
        return coordinator
    leaders = [cluster.leader(f"{system.prefix}.events", p) for p in range(PARTITIONS)]
    return next(node for node in leaders if node is not coordinator)


@pytest.mark.parametrize("what", ["leader", "coordinator"])
def test_a_killed_broker_costs_nothing(cluster: Cluster, system: System, what: str) -> None:
    rows, bad = stream(31, 4_000, SystemClock().now_ms())
    with Crew(system, cluster) as crew, Feed(system, 100) as feed:
        crew.start("sequencer", "sequencer", "sequencer")
        crew.await_ready()
        feed.publish(rows)
        feed.await_part(0.2)
        node = victim(cluster, system, what)
        node.kill()
        cluster.await_gone(node.number)
        feed.await_part(0.7)
        cluster.start(node.number)
        finish(cluster, system, crew, feed, bad)
        crew.assert_retried()


@pytest.mark.parametrize("how", ["stopped", "killed"])
def test_every_broker_is_restarted_in_turn(cluster: Cluster, system: System, how: str) -> None:
    rows, bad = stream(32, 5_000, SystemClock().now_ms())
    with Crew(system, cluster) as crew, Feed(system, 60) as feed:
        crew.start("sequencer", "sequencer")
        crew.await_ready()
        feed.publish(rows)
        for number, node in cluster.nodes.items():
            feed.await_more(300)
            node.stop() if how == "stopped" else node.kill()
            feed.await_more(300)
            cluster.start(number)
            cluster.await_in_sync()
        finish(cluster, system, crew, feed, bad)
        if how == "killed":
            crew.assert_retried()


@pytest.mark.parametrize(("what", "seconds"), [("leader", HUNG_SECONDS), ("coordinator", HUNG_LONG_SECONDS)])
def test_a_broker_that_hangs_costs_nothing(cluster: Cluster, system: System, what: str, seconds: float) -> None:
    """Its connections stay open and nothing is answered, while the cluster has long gone on without it."""
    rows, bad = stream(33, 4_000, SystemClock().now_ms())
    with Crew(system, cluster) as crew, Feed(system, 4_000 / (20 + seconds)) as feed:
        crew.start("sequencer", "sequencer", "sequencer")
        crew.await_ready()
        feed.publish(rows)
        feed.await_part(0.1)
        node = victim(cluster, system, what)
        node.freeze()
        crew.live_through(seconds)
        cluster.await_gone(node.number)
        node.thaw()
        cluster.await_up(node.number)
        finish(cluster, system, crew, feed, bad)
        if seconds == HUNG_LONG_SECONDS:
            crew.assert_retried()


def test_roles_outlive_the_absence_of_every_broker(cluster: Cluster, system: System) -> None:
    rows, bad = stream(34, 4_000, SystemClock().now_ms())
    with Crew(system, cluster) as crew, Feed(system, 100) as feed:
        crew.start("sequencer", "sequencer", "trainer", "scorer")
        feed.publish(rows)
        feed.await_part(0.3)
        crew.await_ready()
        for node in cluster.nodes.values():
            node.kill()
        crew.live_through(AWAY_SECONDS)
        cluster.start(*cluster.nodes)
        crew.await_ready()
        feed.finish()
        crew.await_done()
        targets = sum(len(o.targets) for o in expected(system, set(bad_places(system, bad))))
        wait_for("the trainer to learn every target once", lambda: learned(system) >= targets)
        sequences = system.exported()
        wait_for("the scorer to know every sequence", lambda: all(served(system, s) for s in sequences))
        finish(cluster, system, crew, feed, bad)
        crew.assert_retried()
        assert learned(system) == targets


def test_nothing_is_committed_over_outputs_that_too_few_replicas_have(cluster: Cluster, system: System) -> None:
    """One topic asks for a replica more than there are: its outputs are refused, again and again, while events flow."""
    rows, bad = stream(35, 3_000, SystemClock().now_ms())
    newcomers = [row(shown(f"newcomer-{n}", n)) for n in range(40)]
    examples = f"{system.prefix}.examples"
    with Crew(system, cluster) as crew, Feed(system, 100) as feed:
        old = crew.start("sequencer", "sequencer")
        crew.await_ready()
        feed.publish(rows[:2_000])
        feed.await_part(0.3)
        cluster.set(examples, "min.insync.replicas", "3")
        node = victim(cluster, system, "leader")
        node.kill()
        cluster.await_replicas(examples, 2)
        feed.await_more(500)  # every partition has given outputs, or at least progress, that nobody takes
        feed.publish(newcomers)
        feed.await_part(1)
        crew.live_through(5)
        assert not strangers(system)
        for role in old:
            crew.kill(role)
        crew.start("sequencer", "sequencer")  # they do not even learn where the outputs of some partitions end
        crew.live_through(AWAY_SECONDS)
        assert not strangers(system)
        feed.publish(rows[2_000:])
        cluster.start(node.number)
        crew.await_ready()
        finish(cluster, system, crew, feed, bad)
        crew.assert_retried()
        assert len(strangers(system)) == len(newcomers)


def test_a_cluster_of_one_is_waited_for(cluster: Cluster, system: System) -> None:
    """Two of three are gone, and with them the controllers' majority: no elections, and nothing is ever confirmed."""
    rows, bad = stream(36, 4_000, SystemClock().now_ms())
    with Crew(system, cluster) as crew, Feed(system, 100) as feed:
        crew.start("sequencer", "sequencer")
        crew.await_ready()
        feed.publish(rows)
        feed.await_part(0.2)
        first, second, _ = cluster.nodes.values()
        first.kill()
        cluster.await_gone(first.number)
        feed.await_more(200)
        crew.start("sequencer")  # partitions are on the move
        second.kill()
        crew.live_through(AWAY_SECONDS)
        cluster.start(first.number, second.number)
        finish(cluster, system, crew, feed, bad)
        crew.assert_retried()


@pytest.mark.parametrize("away", [2, 3])
def test_a_role_that_starts_without_its_brokers_waits_for_them(cluster: Cluster, system: System, away: int) -> None:
    """With two of three away the last one still tells of topics, but nothing that needs the controllers."""
    rows, bad = stream(37, 1_000, SystemClock().now_ms())
    with Crew(system, cluster) as crew, Feed(system, 1_000) as feed:
        feed.publish(rows)
        feed.await_part(1)
        gone = list(cluster.nodes)[:away]
        for number in gone:
            cluster.nodes[number].kill()
        crew.start("sequencer", "sequencer", "sequencer", "trainer")
        crew.live_through(AWAY_SECONDS)
        cluster.start(*gone)
        crew.await_ready()
        finish(cluster, system, crew, feed, bad)
        crew.assert_retried()


def shown(user: str, n: int) -> Json:
    """An impression of a user."""
    return {"type": "impression", "event_id": f"n{n}", "user_id": user, "item_id": f"i{n}", "event_time": START + n}


def strangers(system: System) -> list[str]:
    """The newcomers among the users that have a sequence."""
    return [s["user_id"] for s in system.exported() if s["user_id"].startswith("newcomer")]


def served(system: System, sequence: Json) -> bool:
    """Whether the scorer has exactly this sequence."""
    return system.get(f"/v1/users/{sequence['user_id']}/sequence") == (200, sequence)


def bad_places(system: System, bad: Bad) -> list[tuple[int, int]]:
    """Where the rubbish lies among the events."""
    rubbish = {(key, value) for key, value, _ in bad}
    return [(m.partition(), m.offset()) for m in system.read("events") if (m.key(), m.value()) in rubbish]
