from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from uuid import UUID, uuid4

import pytest
import redis

from jobguard.errors import NotLeading
from jobguard.model import (
    DROPPED_BY_LIVE_WORKER,
    Cause,
    Claim,
    End,
    Observation,
    Outcome,
    Owed,
    Parent,
    Part,
    Presence,
)
from jobguard.pulse import ACCEPTED
from jobguard.reconciler import source_monitor as watch_module
from jobguard.store.protocols import Brake
from tests.fakes.world import (
    FOR_EVER,
    NAMESPACE,
    SOURCE,
    FakeWorker,
    World,
    delivery,
    events,
    leader_store,
)


def ids(count: int) -> list[str]:
    """Name so many jobs."""
    return [f"job-{n:04}" for n in range(count)]


def calm(**settings: object) -> World:
    """Begin with one guarded worker, a trusted queue, and a leader that knows everybody."""
    world = World(**settings)
    world.trusted()
    return world


def with_reports_unwritten() -> tuple[World, FakeWorker]:
    """Begin calmly, with a job that is owed; and the worker has reports that Postgres does not have."""
    world = World()
    worker = world.trusted()
    world.enqueue("job")
    world.run(6)
    worker.unflushed_since = world.clock.wall()
    worker.beat()
    return world, worker


def resume(world: World) -> None:
    """Say `jobguard resume`."""
    world.ledger._tables.leases[NAMESPACE].held.clear()


# -- a loss ------------------------------------------------------------------------------------------


def test_flushall_of_a_thousand_waiting_jobs() -> None:
    """After FLUSHALL nothing goes back at the first look, and all of it after the grace, in order."""
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
    """I2: with no worker left to see, what a trusted queue owes is restored all the same."""
    world = World()
    world.trusted().leave()
    world.enqueue("a", "b")
    world.broker.names.clear()
    world.run(20)
    world.flushall()

    world.run_until(lambda: world.broker.pushed == ["a", "b"], within=10)


def test_an_empty_ledger_survives_a_loss() -> None:
    """A loss of nothing is an incident that is over after one walk."""
    world = calm()
    world.flushall()

    world.run(5)

    assert world.store.incidents(SOURCE.id) == []
    assert world.broker.pushed == []


def test_what_is_back_by_itself_is_not_pushed() -> None:
    """A job that Redis has again at the second look is suspected no longer, and not pushed."""
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
    """F2: what was recorded a moment ago may still be pushed by its producer."""
    world = calm()
    (job,) = world.enqueue("job")
    recorded_at = world.clock()
    world.flushall()

    world.run_until(lambda: world.broker.pushed, within=8, step=0.1)

    assert world.clock() - recorded_at >= world.settings.push_deadline
    assert world.outcome(job) is None


def test_round_robin_over_queues() -> None:
    """A small queue is not restored behind a large one."""
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
    """The incident is open until the last job is back, and then says what was missing."""
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


def test_a_leader_killed_in_the_middle() -> None:
    """A new leader resumes the open incident, and restores what the old one had not."""
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


def test_a_leader_killed_after_the_first_look() -> None:
    """A new leader that never saw the loss knows of it, and need not see it again."""
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
    """Redis flushed again while the first loss is being dealt with leaves no incident open."""
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
    """More suspects than one look takes go back in the order of recording all the same."""
    monkeypatch.setattr(watch_module, "_WATCHED", 10)
    world = calm()
    names = ids(100)
    world.enqueue(*names)
    world.run(6)
    world.flushall()

    world.run_until(lambda: len(world.broker.pushed) == 100, within=20, step=0.05)

    assert world.broker.pushed == names


# -- what is never put back --------------------------------------------------------------------------


def test_a_claimed_job_of_a_live_worker_is_never_recovered() -> None:
    """R4: a job whose worker beats and lists it is left alone, were it hours long."""
    world = World()
    worker = world.trusted()
    (job,) = world.enqueue("job")
    claim = worker.start(job)
    assert isinstance(claim, Claim)
    worker.beat()
    world.flushall()

    world.run(7200, step=1.5)

    assert world.broker.pushed == []
    assert worker.end(job, claim).value == "ended"


def test_a_listed_job_is_never_recovered_though_unclaimed() -> None:
    """A job started while Postgres was away is protected by its worker's list."""
    world = World()
    worker = world.trusted()
    (job,) = world.enqueue("job")
    worker.listed.append(job.token)
    worker.beat()
    world.flushall()

    world.run(200)

    assert world.broker.pushed == []
    assert "job" in world.owed()


def test_a_cancelled_job_stays_cancelled() -> None:
    """R8: what was cancelled before the loss does not come back."""
    world = calm()
    world.enqueue("kept", "cancelled")
    world.run(6)
    world.host.cancel(SOURCE.id, job_ids=["cancelled"], meant=world.host.now())
    world.flushall()

    world.run(30)

    assert world.broker.pushed == ["kept"]


def test_an_expired_job_is_closed() -> None:
    """What the library would have dropped by now is not put back, but closed as cancelled."""
    world = calm()
    (job,) = world.enqueue("job", expires_at=world.clock.wall() + 8)
    world.run(9)
    world.flushall()

    world.run(10)

    assert world.broker.pushed == []
    assert world.outcome(job) is Outcome.CANCELLED


@pytest.mark.parametrize(
    ("presence", "outcome"),
    [
        (Presence.FINISHED, Outcome.COMPLETED),
        (Presence.FAILED, Outcome.FAILED),
        (Presence.CANCELLED, Outcome.CANCELLED),
    ],
)
def test_an_end_that_only_redis_knows(presence: Presence, outcome: Outcome) -> None:
    """A job that the library has ended, and nobody reported, is closed as the library says."""
    world = calm()
    (job,) = world.enqueue("job")
    world.broker.put(job, presence)

    world.run_until(lambda: world.outcome(job) is outcome, within=60)

    assert world.owed() == {}
    assert world.broker.pushed == []


def test_what_a_living_worker_let_go_waits_for_its_reports() -> None:
    """A child has ended it, or has been retried, while Postgres was away: that is not written yet."""
    world = calm()
    (job,) = world.enqueue("job")
    worker = world.workers[0]
    claim = worker.start(job)
    assert isinstance(claim, Claim)
    world.run(4)
    world.broker.bodies.clear()
    worker.listed.clear()
    worker.unflushed_since = world.clock.wall()

    world.run(60)

    assert world.broker.pushed == []
    worker.end(job, claim)
    worker.unflushed_since = None
    world.run(10)
    assert world.outcome(job) is Outcome.COMPLETED
    assert world.broker.pushed == []


def test_what_ends_between_two_questions_of_the_leader(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its worker has told it by the time that it is closed: nothing is said or counted of it."""
    world = calm()
    (job,) = world.enqueue("job")
    worker = world.workers[0]
    claim = worker.start(job)
    assert isinstance(claim, Claim)
    world.broker.bodies.clear()
    tombstones = world.store.tombstones

    def end_and_tell(source: int, tokens: Sequence[UUID]) -> Mapping[UUID, Outcome]:
        if job.token in tokens:
            worker.end(job, claim)
        return tombstones(source, tokens)

    monkeypatch.setattr(world.store, "tombstones", end_and_tell)
    with caplog.at_level(logging.INFO):
        world.run_until(lambda: not world.owed(), within=120)
        world.run(5)

    assert world.outcome(job) is Outcome.COMPLETED
    assert "job_closed" not in events(caplog.records)


def test_overwritten_by_another_life() -> None:
    """An id in whose place somebody else's delivery stands is closed after two looks, not one."""
    world = calm()
    (job,) = world.enqueue("job")
    world.run(80)
    other = world.describe("job", fresh=True)
    world.record(other)
    world.broker.put(other)

    world.run_until(lambda: (SOURCE.id, job.token) in world.ledger._tables.suspects, within=60)
    seen_at = world.clock()
    world.run_until(lambda: world.outcome(job) is Outcome.SUPERSEDED, within=20)

    assert world.clock() - seen_at >= world.settings.grace - 0.5
    assert world.broker.pushed == []


def test_a_life_that_nobody_recorded_takes_nobodys_place_for_good() -> None:
    """A retry whose record is lost stands there: should that be lost as well, this one comes back."""
    world = calm()
    (job,) = world.enqueue("job")
    world.run(80)
    world.broker.put(world.describe("job"))
    world.run(200)
    assert world.outcome(job) is None

    world.flushall()
    world.run_until(lambda: world.broker.pushed == ["job"], within=10)


def test_an_older_life_in_its_place_is_replaced() -> None:
    """A5: a retry that was recorded and not pushed replaces the body that it superseded."""
    world = World()
    worker = world.trusted()
    (first,) = world.enqueue("job")
    claim = worker.start(first)
    assert isinstance(claim, Claim)
    retry = world.describe("job", parent=Parent(first.token, claim.number))
    worker.listed.clear()
    world.record(retry)
    assert world.outcome(first) is Outcome.SUPERSEDED

    world.run_until(lambda: world.broker.pushed == ["job"], within=60)

    assert world.broker.bodies["job"] == (retry.token, Presence.WAITING)
    assert world.owed()["job"].token == retry.token
    # The library would believe in the run that recorded it until the job's own timeout is over.
    assert world.broker.taken_over == ["job"]


def test_an_older_life_that_a_worker_lists_is_not_taken_over() -> None:
    """It has ended by the ledger, but a worker that beats says that it runs it: let it finish."""
    world = World()
    worker = world.trusted()
    (first,) = world.enqueue("job")
    claim = worker.start(first)
    assert isinstance(claim, Claim)
    world.record(world.describe("job", parent=Parent(first.token, claim.number)))
    assert first.token in worker.listed
    world.run_until(lambda: world.broker.pushed == ["job"], within=60)
    assert world.broker.taken_over == []


def test_an_older_life_does_not_come_back_when_a_later_one_has_run() -> None:
    """A retry that nobody recorded before it ran: what it retried is not put back after a loss."""
    world = World()
    worker = world.trusted()
    (first,) = world.enqueue("job")
    assert isinstance(worker.start(first), Claim)
    worker.beat()
    world.run(1)
    retry = world.describe("job")
    world.record(retry)  # adopted at its start: its parent is not known
    claim = worker.start(retry)
    assert isinstance(claim, Claim)
    worker.end(retry, claim)
    worker.listed.clear()
    world.flushall()

    world.run_until(lambda: world.outcome(first) is Outcome.SUPERSEDED, within=60)

    assert world.outcome(retry) is Outcome.COMPLETED
    assert world.broker.pushed == []


def test_a_scheduled_job_is_where_it_belongs() -> None:
    """A delayed job that Redis has is not suspected; one that it lost comes back before it is due."""
    world = calm()
    (job,) = world.enqueue("job", due_at=world.clock.wall() + 3600)
    world.broker.put(job, Presence.SCHEDULED)
    world.run(130)
    assert world.suspects() == {}

    world.flushall()
    world.run_until(lambda: world.broker.pushed == ["job"], within=10)


# -- a worker's death --------------------------------------------------------------------------------


def running(world: World, worker: FakeWorker, name: str = "job") -> None:
    """Let a worker run a job that a producer enqueued."""
    if name not in world.owed():
        world.enqueue(name)
    token = world.owed()[name].token
    assert isinstance(worker.start(delivery(name, token=token)), Claim)
    worker.beat()


def test_a_dead_workers_job_goes_back_with_takeover() -> None:
    """An only worker's death is seen after worker_timeout, and its job is back within 2 s of that."""
    world = World()
    worker = world.trusted()
    running(world, worker)
    worker.kill()

    took = world.run_until(lambda: world.broker.pushed, within=30, step=0.1)

    assert world.settings.worker_timeout <= took <= world.settings.worker_timeout + 2
    assert world.broker.pushed == world.broker.taken_over == ["job"]
    assert (world.owed()["job"].crashes, world.owed()["job"].recoveries) == (1, 1)
    assert world.owed()["job"].claim_number is None


def test_a_goodbye_costs_nothing_and_takes_no_time() -> None:
    """What a departing worker leaves goes back at once, and is no crash."""
    world = World()
    worker = world.trusted()
    running(world, worker)
    worker.leave()

    world.run_until(lambda: world.broker.pushed == ["job"], within=2, step=0.1)

    assert world.owed()["job"].crashes == 0


def test_what_a_dead_worker_had_taken_goes_back_with_it() -> None:
    """It had not begun it: within 2 s of the death, without a grace, and it is no crash."""
    world = World()
    worker = world.trusted()
    world.enqueue(*ids(30))
    world.broker.held = dict.fromkeys(ids(30), worker.name)
    world.run(70)
    assert world.broker.pushed == []
    worker.kill()

    took = world.run_until(lambda: len(world.broker.pushed) == 30, within=30, step=0.1)

    assert took <= world.settings.worker_timeout + 2
    assert world.broker.taken_from == [(job, worker.name) for job in ids(30)]
    assert {owed.crashes for owed in world.owed().values()} == {0}


def test_what_a_departed_worker_had_taken_goes_back_at_once() -> None:
    """It said goodbye, and did not put it back itself; named by the id of its session."""
    world = World()
    worker = world.trusted()
    world.enqueue("job")
    world.broker.held["job"] = worker.id.hex
    world.run(20)
    worker.leave()
    world.run_until(lambda: world.broker.taken_from == [("job", worker.id.hex)], within=3)


def test_what_a_stranger_has_taken_is_left_alone() -> None:
    """A worker of that name was never heard of: it is not guarded, and lives for all we know."""
    world = calm()
    world.enqueue("job")
    world.broker.held["job"] = "stranger"
    world.run(200)
    assert world.broker.pushed == []


def test_what_a_forgotten_worker_had_taken_goes_back() -> None:
    """The ledger does not know the id any more: that boot is long gone."""
    world = calm()
    world.enqueue("job")
    world.broker.held["job"] = uuid4().hex
    world.run_until(lambda: world.broker.pushed == ["job"], within=130)


def test_what_a_living_worker_has_let_go_of_goes_back_when_all_reports_are_written() -> None:
    """It may have run it all the same, before Postgres could be told."""
    world, worker = with_reports_unwritten()
    world.broker.held["job"] = DROPPED_BY_LIVE_WORKER
    world.run(130)
    assert world.broker.pushed == []

    worker.unflushed_since = None
    worker.beat()
    world.run_until(lambda: world.broker.taken_from == [("job", DROPPED_BY_LIVE_WORKER)], within=70)


def test_joins_are_mended_before_members_go_back() -> None:
    """After a loss; and nothing is asked while nothing is lost."""
    world = calm()
    world.enqueue("member")
    world.host.open_join(SOURCE.id, "chord", size=2, state=b"", namespace=NAMESPACE)
    world.run(70)
    assert world.broker.rejoined == []
    seen: list[list[tuple[str, bool]]] = []
    world.broker.before_restore = lambda: seen.append(list(world.broker.rejoined))
    world.flushall()
    world.run_until(lambda: world.broker.pushed == ["member"], within=10)
    assert seen[0] == [("chord", False)]


def test_a_complete_join_is_told_again_until_something_comes_of_it() -> None:
    """After the grace, then again ever more seldom."""
    world = World()
    worker = world.trusted()
    (member,) = world.enqueue("member")
    world.host.open_join(SOURCE.id, "chord", size=1, state=b"", namespace=NAMESPACE)
    claim = worker.start(member)
    assert isinstance(claim, Claim)
    end = End(member.token, claim.number, Outcome.COMPLETED, worker.id, part=Part("chord"))
    world.host.end(SOURCE.id, [end])
    world.run(world.settings.grace - 1)
    assert world.broker.rejoined == []
    world.run(5)
    assert world.broker.rejoined == [("chord", True)]
    world.run(100)
    assert world.broker.rejoined == [("chord", True)] * 3
    world.record(world.describe("body", closes="chord"))
    world.run(300)
    assert world.broker.rejoined == [("chord", True)] * 3


def test_a_paused_leader_finishes_no_join() -> None:
    """It would push something."""
    world = World()
    worker = world.trusted()
    (member,) = world.enqueue("member")
    world.host.open_join(SOURCE.id, "chord", size=1, state=b"", namespace=NAMESPACE)
    claim = worker.start(member)
    assert isinstance(claim, Claim)
    end = End(member.token, claim.number, Outcome.COMPLETED, worker.id, part=Part("chord"))
    world.host.end(SOURCE.id, [end])
    world.brake = Brake(paused=True)
    world.run(60)
    assert world.broker.rejoined == []


def test_the_crash_budget() -> None:
    """A job whose worker dies for the third time is dead, and never goes back."""
    world = World(crash_backoff=(0.0,))
    world.trusted()
    (job,) = world.enqueue("job")
    for death in range(1, 4):
        worker = world.worker(f"victim-{death}")
        world.run(4)
        running(world, worker)
        worker.kill()
        if death < 3:
            world.run_until(lambda n=death: len(world.broker.pushed) == n, within=30)  # type: ignore[misc]

    world.run_until(lambda: world.outcome(job) is Outcome.DEAD, within=30)
    world.run(70)

    assert len(world.broker.pushed) == 2
    assert world.broker.buried == ["job"]
    assert world.broker.reported == [("job", job.envelope)]  # whole, and once


def test_poison_beside_innocents() -> None:
    """A process that runs several jobs dies again and again: only what is alone then is charged twice."""
    world = World(crash_backoff=(0.0,))
    world.trusted()
    world.enqueue("poison", "innocent")
    for _ in range(6):
        worker = world.worker()
        world.run(4)
        running(world, worker, "innocent")
        running(world, worker, "poison")
        worker.kill()
        pushed = len(world.broker.pushed)
        world.run_until(lambda n=pushed: len(world.broker.pushed) == n + 2, within=60)  # type: ignore[misc]
        assert {owed.crashes for owed in world.owed().values()} == {1}
    for alone in (2, 3):
        worker = world.worker()
        world.run(4)
        running(world, worker, "poison")
        worker.kill()
        world.run_until(
            lambda n=alone: "poison" not in world.owed() or world.owed()["poison"].crashes == n,  # type: ignore[misc]
            within=60,
        )
        world.run(2)
    assert world.broker.buried == ["poison"]
    assert world.owed()["innocent"].crashes == 1


def test_the_crash_of_a_held_queue_waits() -> None:
    """A dead worker's job of a paused queue goes back when it is resumed."""
    world = World()
    worker = world.trusted()
    running(world, worker)
    world.brake = Brake(paused=True)
    worker.kill()
    world.run(40)
    assert world.broker.pushed == []
    assert world.owed()["job"].crashes == 0

    world.brake = Brake()
    world.run_until(lambda: world.broker.pushed == ["job"], within=3)


def test_backoff_between_the_looks_at_suspects() -> None:
    """A job that cost a worker its life is not among the watched while it backs off."""
    world = World(crash_backoff=(30.0,))
    worker = world.trusted()
    running(world, worker)
    worker.kill()
    world.run_until(lambda: world.owed()["job"].crashes == 1, within=30)

    assert world.store.watched(SOURCE.id, limit=9) == []
    assert world.owed()["job"].backoff > 25


def test_backoff() -> None:
    """A job that cost a worker its life waits its 30 s out before it goes back."""
    world = World(crash_backoff=(30.0,))
    worker = world.trusted()
    running(world, worker)
    worker.kill()
    world.run_until(lambda: world.owed()["job"].crashes == 1, within=30)
    died_at = world.clock()

    world.run_until(lambda: world.broker.pushed, within=40)

    assert world.clock() - died_at >= 29.5


# -- pushes that were never made ---------------------------------------------------------------------


def test_the_outbox_is_pushed_at_once() -> None:
    """A recorded job whose push was left to the leader is pushed with the next looks."""
    world = calm()
    world.record(world.describe("job"), outbox=True)

    world.run_until(lambda: world.broker.pushed == ["job"], within=0.5, step=0.1)

    assert world.store.watched(SOURCE.id, limit=9) == []


def test_an_outbox_that_was_pushed_after_all() -> None:
    """A job in the outbox that Redis has is not pushed again."""
    world = calm()
    (job,) = world.enqueue("job")
    world.host.outbox(SOURCE.id, [job.token])

    world.run(20)

    assert world.broker.pushed == []
    assert world.store.watched(SOURCE.id, limit=9) == []


def test_a_producer_that_died_before_its_push() -> None:
    """A job that was recorded and never pushed is found absent, and pushed within 30 s."""
    world = calm()
    world.enqueue("job", push=False)

    took = world.run_until(lambda: world.broker.pushed == ["job"], within=30)

    assert took >= world.settings.push_deadline


def test_a_young_job_has_its_grace() -> None:
    """A young job that was seen absent once (on its way to a worker) has the grace before it returns."""
    world = calm()
    (job,) = world.enqueue("job")
    world.run(6)
    del world.broker.bodies["job"]
    world.run_until(lambda: "job" in world.suspects(), within=10, step=0.1)
    seen_at = world.clock()

    world.run_until(lambda: world.broker.pushed, within=30, step=0.1)

    assert world.clock() - seen_at >= world.settings.grace - 0.1
    assert world.outcome(job) is None


def test_a_job_on_its_way_after_another_workers_goodbye_has_its_grace() -> None:
    """A worker's goodbye takes the grace from no job that was not its own."""
    world = World()
    world.trusted()
    other = world.worker("w2")
    (job,) = world.enqueue("job")
    world.run(70)
    other.leave()
    world.run(1)
    del world.broker.bodies["job"]
    world.run_until(lambda: "job" in world.suspects(), within=70, step=0.1)
    seen_at = world.clock()

    world.run_until(lambda: world.broker.pushed, within=30, step=0.1)

    assert world.clock() - seen_at >= world.settings.grace - 0.1
    assert world.outcome(job) is None


def test_an_unclaimed_run_is_not_taken_over_for_anothers_goodbye() -> None:
    """A job that the library says is running, unclaimed, is left alone when another worker leaves."""
    world = World()
    world.trusted()
    other = world.worker("w2")
    (job,) = world.enqueue("job")
    world.broker.put(job, Presence.RUNNING)
    world.run(70)

    other.leave()
    world.run(130)

    assert world.broker.pushed == []


# -- when absence may be judged ----------------------------------------------------------------------


def test_an_unflushed_worker_blocks_the_judgement() -> None:
    """C1: while a live worker has unwritten reports nothing is judged lost."""
    world, worker = with_reports_unwritten()
    world.flushall()
    world.run(60)
    assert world.broker.pushed == []

    worker.unflushed_since = None
    worker.beat()
    world.run_until(lambda: world.broker.pushed == ["job"], within=3)


def test_a_worker_not_heard_yet_blocks_the_judgement() -> None:
    """A new leader waits for a word of every worker of before, or for its death."""
    world = World()
    worker = world.trusted()
    world.enqueue("job")
    world.run(6)
    worker.kill()
    world.flushall()
    world.new_leader()

    took = world.run_until(lambda: world.broker.pushed == ["job"], within=30)

    assert took >= world.settings.worker_timeout


def test_the_untrusted_is_held_and_reported(caplog: pytest.LogCaptureFixture) -> None:
    """I1: while a stranger consumes the queue nothing of it goes back, and that is said."""
    caplog.set_level(logging.INFO, "jobguard")
    world = World()
    world.broker.names["mail"] = frozenset({"stranger"})
    world.worker()
    world.run(10)
    world.enqueue("job")
    world.run(6)
    world.flushall()

    world.run(120)

    assert world.broker.pushed == []
    assert world.monitor.result.untrusted > 0
    assert "queue_untrusted" in events(caplog.records)
    assert not world.is_trusted("mail")


def test_a_loss_before_the_first_worker_is_mended() -> None:
    """Where no unguarded worker was ever seen, nobody can have run what was lost."""
    world = World()
    world.run(5)
    world.enqueue(*ids(20))
    world.run(6)
    world.flushall()

    world.run_until(lambda: len(world.broker.pushed) == 20, within=30)
    world.run_until(lambda: world.store.incidents(SOURCE.id) == [], within=30)


@pytest.mark.parametrize("kind", ["flushed", "restarted", "taken"])
def test_what_was_lost_before_the_first_look(kind: str) -> None:
    """Redis tells of a restart and of a flush; what is absent without either, somebody has run."""
    world = World()
    world.enqueue(*ids(3))
    world.clock.advance(20)
    if kind == "taken":
        world.broker.bodies.clear()
    else:
        world.flushall() if kind == "flushed" else world.restart()
    world.new_leader()

    world.run(90)

    assert world.broker.pushed == ([] if kind == "taken" else ids(3))
    assert set(world.suspects()) == (set(ids(3)) if kind == "taken" else set())


def test_what_is_taken_again_and_again_is_held(caplog: pytest.LogCaptureFixture) -> None:
    """Something runs it that never claims: put back twice, then held, and an incident names the path."""
    world = calm()
    world.enqueue("bypass", "well")
    for _ in range(1500):
        world.step(0.25)
        world.broker.bodies.pop("bypass", None)

    assert world.broker.pushed == ["bypass", "bypass"]
    assert world.monitor.result.bypassed > 0
    (incident,) = world.store.incidents(SOURCE.id)
    assert "task" in incident.detail and "mail" in incident.detail
    assert incident.missing == 1
    assert events(caplog.records).count("restores_held") == 1

    world.new_leader()
    for _ in range(400):
        world.step(0.25)
    assert world.broker.pushed == ["bypass", "bypass"]
    assert [one.id for one in world.store.incidents(SOURCE.id)] == [incident.id]

    world.host.cancel(SOURCE.id, job_ids=["bypass"], meant=world.host.now())
    world.run_until(lambda: world.store.incidents(SOURCE.id) == [], within=300)


def test_a_waiting_job_may_be_lost_with_redis_however_often() -> None:
    """Redis lost it each time: that is no sign of a path that we do not see."""
    world = calm()
    world.enqueue("job")
    for n in range(1, 6):
        world.run(20)
        world.flushall()
        world.run_until(lambda n=n: world.broker.pushed == ["job"] * n, within=20)  # type: ignore[misc]


def test_a_rollback(caplog: pytest.LogCaptureFixture) -> None:
    """What an unguarded image ran while no leader looked is not run again; what is there is trusted."""
    world = calm()
    world.enqueue("taken", "kept")
    world.run(6)
    for worker in world.workers:
        worker.leave()
    world.workers.clear()
    world.clock.advance(30)
    world.broker.bodies.pop("taken")
    world.new_leader()
    world.worker("w2")

    world.run(120)
    assert world.broker.pushed == []
    assert world.suspects() == {"taken": Cause.UNTRUSTED}
    assert "jobs_untrusted" in events(caplog.records)
    world.flushall()

    world.run_until(lambda: world.broker.pushed == ["kept"], within=30)


@pytest.mark.parametrize("away", [8.0, 600.0])
def test_a_loss_while_no_leader_looked(away: float) -> None:
    """No unguarded worker was ever seen here: what Redis lost goes back, however long nobody led."""
    world = calm()
    world.enqueue(*ids(3))
    world.run(6)
    world.clock.advance(away)
    world.flushall()
    world.new_leader()

    world.run_until(lambda: world.broker.pushed == ids(3), within=60)


def test_a_loss_right_after_a_change_of_leaders() -> None:
    """The new leader has not vouched for anything yet."""
    world = calm()
    world.enqueue(*ids(3))
    world.run(6)
    world.clock.advance(12)
    world.new_leader()
    world.flushall()

    world.run_until(lambda: world.broker.pushed == ids(3), within=30)


def test_what_was_suspected_before_a_change_of_leaders_is_restored() -> None:
    """A leader saw it absent while the queue was trusted: nobody can have taken it in the gap."""
    world = calm()
    (job,) = world.enqueue("job")
    world.run(70)
    world.broker.bodies.pop("job")
    world.run_until(world.suspects, within=70)
    world.clock.advance(12)
    world.new_leader()

    world.run_until(lambda: world.broker.pushed == ["job"], within=90)
    assert world.outcome(job) is None


def test_what_was_absent_before_the_trust_is_never_recovered(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """What a stranger may have run stays where it is when the stranger has gone; the rest is guarded."""
    caplog.set_level(logging.INFO, "jobguard")
    world = World()
    world.worker()
    world.broker.names["mail"] |= {"stranger"}
    world.enqueue("taken", "kept")
    world.run(10)
    del world.broker.bodies["taken"]
    world.broker.names["mail"] = frozenset({"w1"})

    world.run_until(lambda: world.is_trusted("mail"), within=60)
    assert world.suspects()["taken"] is Cause.UNTRUSTED
    assert {"queue_trusted", "jobs_untrusted"} <= set(events(caplog.records))
    world.flushall()
    world.run(120)

    assert world.broker.pushed == ["kept"]


def test_the_outbox_of_before_the_trust_is_pushed() -> None:
    """A job that was surely not pushed cannot have been run by a stranger: it is pushed."""
    world = World()
    world.record(world.describe("job"), outbox=True)
    world.clock.advance(5)
    world.new_leader()
    world.trusted()

    world.run(120)

    assert world.broker.pushed == ["job"]


# -- the brake ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "brake",
    [Brake(paused=True), Brake(held={f"{SOURCE.id}/mail": {}}), Brake(held={f"{SOURCE.id}/*": {}})],
    ids=["all", "queue", "source"],
)
def test_a_pause_holds(brake: Brake) -> None:
    """While a person holds them, lost jobs wait, and their incident stays open."""
    world = calm()
    world.enqueue("job")
    world.run(6)
    world.brake = brake
    world.flushall()
    world.run(70)
    assert world.broker.pushed == []
    assert len(world.store.incidents(SOURCE.id)) == 1

    world.brake = Brake()
    world.run_until(lambda: world.broker.pushed == ["job"], within=2)
    world.run(2)
    assert world.store.incidents(SOURCE.id) == []


def test_a_pause_of_another_queue_holds_nothing_here() -> None:
    """One queue's pause is no other's."""
    world = calm()
    world.enqueue("job")
    world.run(6)
    world.brake = Brake(held={f"{SOURCE.id}/video": {}})
    world.flushall()

    world.run_until(lambda: world.broker.pushed == ["job"], within=5)


def emptied(world: World, count: int) -> None:
    """Let a tool that knows nothing of us empty the queue."""
    world.enqueue(*ids(count))
    world.run(80)
    world.broker.bodies.clear()


def test_too_many_unexplained_absences_hold_the_queue(caplog: pytest.LogCaptureFixture) -> None:
    """I4: a queue that somebody emptied is held by itself, and a person is told."""
    caplog.set_level(logging.ERROR, "jobguard")
    world = calm()
    emptied(world, 150)

    world.run(90)

    assert world.broker.pushed == []
    assert f"{SOURCE.id}/mail" in world.store.brake(world.term).held
    assert "queue_held" in events(caplog.records)


def test_a_few_unexplained_absences_go_back() -> None:
    """A handful of jobs without a cause is restored, after two looks a grace apart."""
    world = calm()
    emptied(world, 5)

    world.run_until(lambda: "job-0000" in world.suspects(), within=70)
    seen_at = world.clock()
    world.run_until(lambda: len(world.broker.pushed) == 5, within=20)

    assert world.clock() - seen_at >= world.settings.grace - 0.5


def test_unexplained_may_be_held_by_setting() -> None:
    """With unexplained="hold" what is absent without a cause is reported, and not put back."""
    world = calm(unexplained="hold")
    emptied(world, 5)

    world.run(150)

    assert world.broker.pushed == []
    assert len(world.suspects()) == 5


def test_a_person_resumes_a_queue_that_held_itself() -> None:
    """After `resume` what the queue was held for goes back."""
    world = calm()
    emptied(world, 150)
    world.run_until(lambda: world.store.brake(world.term).held, within=100)

    resume(world)
    world.run(30)

    assert len(world.broker.pushed) == 150


def test_waiting_for_the_limiter_is_no_new_absence() -> None:
    """Absences that are few enough stay so, though the limiter lets them go back slowly."""
    world = calm(repair_rate=1.0, brake_count=30, brake_share=1.0)
    emptied(world, 20)

    world.run_until(lambda: world.broker.pushed, within=100)
    world.run(10)

    assert not world.store.brake(world.term).held


# -- observing ---------------------------------------------------------------------------------------


def test_observe_puts_nothing_back(caplog: pytest.LogCaptureFixture) -> None:
    """mode="observe" detects and reports a loss, a death and the outbox, and pushes nothing."""
    caplog.set_level(logging.INFO, "jobguard")
    world = World(mode="observe")
    world.trusted()
    victim = world.worker("w2")
    world.run(4)
    world.enqueue("lost")
    running(world, victim, "running")
    world.record(world.describe("outbox"), outbox=True)
    victim.kill()
    world.run(6)
    world.flushall()

    world.run(60)

    assert world.broker.pushed == []
    assert {"would_restore", "redis_lost_data", "worker_dead"} <= set(events(caplog.records))
    assert set(world.owed()) == {"lost", "running", "outbox"}


def test_observe_reports_a_loss_and_is_done(caplog: pytest.LogCaptureFixture) -> None:
    """An observed loss is told once or so, and not four times a second."""
    caplog.set_level(logging.INFO, "jobguard")
    world = calm(mode="observe")
    world.enqueue("lost")
    world.run(6)
    world.flushall()

    world.run(60)

    assert events(caplog.records).count("would_restore") < 10


# -- leaders -----------------------------------------------------------------------------------------


def succeed(world: World) -> None:
    """Let another process take the lease, while the old leader believes to lead."""
    world.store.resign(world.term)
    assert leader_store(world.ledger).elect(lease=FOR_EVER) is not None


def test_a_stale_term_in_the_middle_of_a_step() -> None:
    """R5: a leader whose term ends while it looks changes no row and pushes nothing."""
    world = calm()
    world.enqueue("job")
    world.run(6)
    world.flushall()
    world.step(0.6)
    presence = world.broker.presence

    def meanwhile(page: Sequence[Owed]) -> Mapping[UUID, Observation]:
        succeed(world)
        return presence(page)

    world.broker.presence = meanwhile  # type: ignore[method-assign]
    world.clock.advance(2)
    held = world.held
    with pytest.raises(NotLeading):
        world.monitor.step(world.term, held)

    assert world.broker.pushed == []
    assert world.owed()["job"].recoveries == 0


def test_a_leader_that_fell_asleep_before_its_push() -> None:
    """R5: 5 s after it read presence, a leader that slept pushes nothing."""
    world = calm()
    world.enqueue("job")
    world.run(6)
    world.flushall()
    world.step(0.6)

    def sleep() -> None:
        world.clock.advance(6)
        succeed(world)

    world.broker.before_restore = sleep
    with pytest.raises(NotLeading):
        world.run(5)

    assert world.broker.pushed == []
    assert world.owed()["job"].recoveries == 0


def test_a_redis_that_goes_away_in_the_middle() -> None:
    """Redis gone at the push is a state: the job goes back when it is there again."""
    world = calm()
    world.enqueue("job")
    world.run(6)
    world.flushall()

    def vanish() -> None:
        world.redis.error = redis.ConnectionError("gone")
        world.broker.before_restore = lambda: None

    world.broker.before_restore = vanish
    world.run(5)
    assert world.broker.pushed == []

    world.redis.error = None
    world.run_until(lambda: world.broker.pushed == ["job"], within=5)


def test_while_redis_is_down_nobody_is_dead_and_nothing_is_absent() -> None:
    """An outage of Redis is neither a loss nor anybody's death."""
    world = World()
    worker = world.trusted()
    running(world, worker)
    worker.kill()
    world.redis.error = redis.BusyLoadingError("LOADING")

    world.run(60)

    assert world.suspects() == {}
    assert not any(row.dead for row in world.store.workers(SOURCE.id))
    assert world.store.incidents(SOURCE.id) == []


def verified(world: World, act: Callable[[], None]) -> float:
    """Tell how long after this act an absence was seen that only a walk can find."""
    world.enqueue("job")
    world.run(130)
    world.run_until(lambda: not world.monitor._lap.running, within=60)
    world.broker.bodies.clear()
    act()
    return world.run_until(lambda: "job" in world.suspects(), within=60, step=0.1)


@pytest.mark.parametrize("doubt", ["restart", "eviction", "reconnect"])
def test_a_doubt_is_verified_at_once(doubt: str) -> None:
    """After a change of topology, an eviction or a reconnect everything owed is looked at at once."""
    world = calm()

    def act() -> None:
        if doubt == "restart":
            world.redis.run_id = "another"
        elif doubt == "eviction":
            world.redis.evicted += 1
        else:
            world.redis.error = redis.ConnectionError("gone")
            world.run(1)
            world.redis.error = None

    assert verified(world, act) <= 2


def test_the_sweep_finds_what_nothing_hints_at() -> None:
    """A job that vanished without any sign is looked at within sweep_interval."""
    world = calm()

    assert verified(world, lambda: None) <= world.settings.sweep_interval


# -- the right place ---------------------------------------------------------------------------------


def moved(world: World, *, named: bool = False) -> None:
    """Let a new leader come up at a Redis that is empty and another server process."""
    world.flushall()
    world.redis.restart()
    world.new_leader(named=named)


def test_an_unnamed_ledger_without_workers_asks_a_person() -> None:
    """With nobody to say that this is the right Redis, all is held until a person says resume."""
    world = World()
    world.trusted().leave()
    world.enqueue("job")
    world.run(20)
    moved(world)

    world.run(9)
    assert not world.store.brake(world.term).held
    world.run(60)
    assert f"{SOURCE.id}/*" in world.store.brake(world.term).held
    assert world.redis.pulse() is None
    assert world.broker.pushed == []

    resume(world)
    world.run_until(lambda: world.broker.pushed == ["job"], within=20)


def test_a_worker_of_before_vouches_for_the_place() -> None:
    """A worker that misses the pulse as the leader does says that the place is right."""
    world = calm()
    world.enqueue("job")
    world.run(6)
    moved(world)

    world.run_until(lambda: world.broker.pushed == ["job"], within=15)


def test_a_worker_that_sees_the_pulse_elsewhere() -> None:
    """Workers that see a living pulse where the leader sees none: touch nothing, for ever."""
    world = World()
    worker = world.trusted()
    world.enqueue("job")
    world.run(6)
    worker.sees_redis = False  # it goes on reporting the pulse of the right Redis
    moved(world)

    world.run(60)

    assert world.redis.pulse() is None
    assert world.broker.pushed == []
    assert world.store.incidents(SOURCE.id) == []


def test_a_named_ledger_listens_to_its_workers_as_well() -> None:
    """R11: a named ledger at the wrong Redis, whose workers see the pulse elsewhere, touches nothing."""
    world = World()
    worker = world.trusted()
    world.enqueue("job")
    world.run(6)
    worker.sees_redis = False
    moved(world, named=True)

    world.run(60)

    assert world.redis.pulse() is None
    assert world.broker.pushed == []


def test_one_worker_that_sees_the_pulse_elsewhere_is_enough() -> None:
    """A worker that read no pulse does not outvote one that sees it alive."""
    world = World()
    blind = world.trusted()
    seeing = world.worker("w2")
    world.enqueue("job")
    world.run(6)
    assert blind.id < seeing.id
    blind.sees_redis, blind.pulse = False, None
    seeing.sees_redis = False
    moved(world)

    world.run(60)

    assert world.redis.pulse() is None
    assert world.broker.pushed == []


def test_an_old_master_is_not_the_right_place() -> None:
    """E4: a leader at a master of before a failover, whose workers see the pulse go on, stops."""
    world = World()
    worker = world.trusted()
    world.enqueue("job")
    world.run(6)
    pulse = world.redis.pulse()
    assert pulse is not None
    worker.sees_redis = False  # it reads the pulse of the new master
    world.redis.set_pulse(n=pulse[1] - 10)
    world.redis.run_id = "the old master"
    world.broker.bodies.clear()
    world.new_leader()

    world.run(60)

    assert world.broker.pushed == []
    assert world.redis.pulse() == (pulse[0], pulse[1] - 10)


def test_a_ledger_that_forgot_touches_nothing() -> None:
    """R11: a pulse that is ahead of Postgres stops the watch, whatever is absent."""
    world = calm()
    world.enqueue("job")
    world.run(6)
    pulse = world.redis.pulse()
    assert pulse is not None
    world.redis.set_pulse(n=pulse[1] + 50)
    world.broker.bodies.clear()

    world.run(100)

    assert world.broker.pushed == []
    assert world.suspects() == {}


def test_a_loss_behind_an_accepted_move() -> None:
    """A Redis that is empty when a person says `resume --moved` has lost what is owed."""
    world = calm()
    world.enqueue(*ids(150))
    world.run(80)
    sources = world.ledger._tables.sources
    sources[SOURCE.id] = replace(
        sources[SOURCE.id], pulse_epoch=None, pulse_n=ACCEPTED, run_id=None
    )
    moved(world)

    world.run(120)

    assert len(world.broker.pushed) == 150


def test_another_ledgers_redis_is_left_alone() -> None:
    """A pulse of another installation stops the watch."""
    world = calm()
    world.enqueue("job")
    world.run(6)
    world.redis.set_pulse(installation=uuid4())
    world.broker.bodies.clear()

    world.run(100)

    assert world.broker.pushed == []
