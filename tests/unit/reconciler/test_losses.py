"""A loss of Redis: what is restored, when, and in which order."""

from __future__ import annotations

import pytest

from jobguard.model import Cause
from jobguard.reconciler import source_monitor as source_monitor_module
from tests.fakes.world import SOURCE, World, calm, ids


def test_flushall_of_a_thousand_waiting_jobs() -> None:
    """After FLUSHALL all is restored in order after the grace, and nothing at the first inspection."""
    world = calm()
    names = ids(1000)
    world.enqueue(*names)
    world.run(6)
    world.flushall()

    lost_at = world.clock()
    world.run_until(world.suspects, within=0.6, step=0.1)
    assert world.broker.pushed == []
    assert set(world.suspects()) == set(names)

    world.run_until(lambda: world.broker.pushed, within=2, step=0.1)
    assert world.clock() - lost_at >= world.settings.loss_grace
    world.run_until(lambda: len(world.broker.pushed) == 1000, within=2, step=0.1)
    assert world.broker.pushed == names
    assert world.suspects() == {}
    world.run(120)
    assert world.broker.pushed == names


def test_a_flushed_registry_of_workers() -> None:
    """The owed jobs of a trusted queue are restored even if no worker is left."""
    world = World()
    world.trusted().leave()
    world.enqueue("a", "b")
    world.broker.names.clear()
    world.run(20)
    world.flushall()

    world.run_until(lambda: world.broker.pushed == ["a", "b"], within=10)


def test_an_empty_ledger_survives_a_loss() -> None:
    """A loss of nothing is an incident that ends after one walk."""
    world = calm()
    world.flushall()

    world.run(5)

    assert world.store.incidents(SOURCE.id) == []
    assert world.broker.pushed == []


def test_a_job_that_is_back_by_itself_is_not_pushed() -> None:
    """A job that Redis has again at the second inspection is no suspect any more, and not pushed."""
    world = calm()
    (job,) = world.enqueue("job")
    world.run(6)
    world.flushall()
    world.step(0.6)
    assert "job" in world.suspects()

    world.broker.put(job)
    world.run(30)

    assert world.suspects() == {}
    assert world.broker.pushed == []


def test_a_young_record_has_the_push_deadline_after_a_loss() -> None:
    """A record that was made a moment ago may still be pushed by its producer."""
    world = calm()
    (job,) = world.enqueue("job")
    recorded_at = world.clock()
    world.flushall()

    world.run_until(lambda: world.broker.pushed, within=8, step=0.1)

    assert world.clock() - recorded_at >= world.settings.push_deadline
    assert world.outcome(job) is None


def test_round_robin_over_queues() -> None:
    """A small queue does not wait behind a large one."""
    world = World()
    world.worker(queues=("mail", "video"))
    world.run(8)
    world.enqueue(*ids(700), queue="mail")
    world.enqueue("film", queue="video")
    world.run(6)
    world.flushall()

    world.run_until(lambda: world.broker.pushed, within=3, step=0.1)

    assert "film" in world.broker.pushed[:2]


def test_an_incident_closes_only_when_all_is_back() -> None:
    """The incident is open until the last job is restored, and then has the right counts."""
    world = calm()
    world.enqueue(*ids(1200))
    world.run(6)
    world.flushall()
    world.step(0.6)

    while len(world.broker.pushed) < 1200:
        assert [i.cause for i in world.store.incidents(SOURCE.id)] == [Cause.INCIDENT]
        world.step()
    world.run(2)

    assert world.store.incidents(SOURCE.id) == []
    (loss,) = world.ledger._tables.incidents.values()
    assert (loss.missing, loss.restored, loss.closed) == (1200, 1200, True)


def test_an_incident_stays_open_while_the_consumers_are_in_doubt() -> None:
    """A consumer that is seen once, as a worker that just ended, delays the restores of the loss."""
    world = calm()
    world.enqueue(*ids(20))
    world.run(6)
    world.broker.names["mail"] = frozenset({"ends"})
    world.flushall()
    world.run_until(lambda: world.store.incidents(SOURCE.id), within=5)
    world.run(1)
    assert world.store.incidents(SOURCE.id) and not world.broker.pushed
    world.broker.names["mail"] = frozenset()
    world.run_until(lambda: not world.store.incidents(SOURCE.id), within=60)
    (loss,) = world.ledger._tables.incidents.values()
    assert (loss.missing, loss.restored) == (20, 20)


def test_a_second_walk_during_an_incident_counts_no_job_again() -> None:
    """A worker that leaves begins another walk while the jobs are still missing."""
    world = calm(loss_grace=5.0)
    world.enqueue(*ids(20))
    worker = world.worker()
    world.run(2)
    world.flushall()
    world.run_until(lambda: world.store.incidents(SOURCE.id), within=5)
    world.run(1)
    worker.leave()
    world.run_until(lambda: not world.store.incidents(SOURCE.id), within=60)
    (loss,) = world.ledger._tables.incidents.values()
    assert (loss.missing, loss.restored) == (20, 20)


def test_a_leader_killed_in_the_middle() -> None:
    """A new leader continues the open incident, and restores the rest."""
    world = calm()
    names = ids(1200)
    world.enqueue(*names)
    world.run(6)
    world.flushall()
    world.run_until(lambda: world.broker.pushed, within=3, step=0.1)
    result = len(world.broker.pushed)
    assert result < 1200

    world.new_leader()
    world.run_until(lambda: len(world.broker.pushed) == 1200, within=15)
    world.run(30)

    assert world.broker.pushed == names
    assert world.store.incidents(SOURCE.id) == []


def test_a_leader_killed_after_the_first_inspection() -> None:
    """A new leader that never saw the loss knows it from the incident."""
    world = calm()
    world.enqueue("job")
    world.run(6)
    world.flushall()
    world.step(0.6)
    assert world.broker.pushed == []

    world.new_leader()
    world.run_until(lambda: world.broker.pushed == ["job"], within=8)
    world.run(5)

    assert world.store.incidents(SOURCE.id) == []


def test_two_losses_in_a_row_both_close() -> None:
    """A second flush during the repair of the first loss leaves no incident open."""
    world = calm()
    world.enqueue(*ids(20))
    world.run(6)
    world.flushall()
    world.run(0.6)
    world.flushall()

    world.run_until(lambda: len(world.broker.pushed) >= 20, within=5)
    world.run(60)

    assert world.store.incidents(SOURCE.id) == []


def test_the_order_of_recording_is_kept_over_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """More suspects than one inspection takes are restored in the order of recording."""
    monkeypatch.setattr(source_monitor_module, "_WATCHED", 10)
    world = calm()
    names = ids(100)
    world.enqueue(*names)
    world.run(6)
    world.flushall()

    world.run_until(lambda: len(world.broker.pushed) == 100, within=20, step=0.05)

    assert world.broker.pushed == names
