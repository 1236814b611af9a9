"""The crash budget of a job, and its wait after a death."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from jobguard.model import Outcome
from jobguard.store.protocols import Brake
from tests.fakes.world import SOURCE, FakeWorker, World, running

Death = Callable[[FakeWorker], None]


@pytest.fixture(params=["silent", "proved"])
def dies(request: pytest.FixtureRequest) -> Death:
    """Return a function that kills a worker: it falls silent, or its host also proves its death.

    The proof comes when the leader has just polled the workers, and inspects before it polls again.
    """

    def die(worker: FakeWorker) -> None:
        worker.kill()
        if request.param == "proved":
            world = worker.world
            world.monitor._workers._poll_at = world.clock() + world.monitor._workers._interval
            world.host.report_death(worker.id)

    return die


def test_the_crash_budget(dies: Death) -> None:
    """A job whose worker dies for the third time is dead, and never restored."""
    world = World(crash_backoff=(0.0,))
    world.trusted()
    (job,) = world.enqueue("job")
    for death in range(1, 4):
        worker = world.worker(f"victim-{death}")
        world.run(4)
        running(world, worker)
        dies(worker)
        if death < 3:
            world.run_until(lambda n=death: len(world.broker.pushed) == n, within=30)  # type: ignore[misc]

    world.run_until(lambda: world.outcome(job) is Outcome.DEAD, within=30)
    world.run(70)

    assert len(world.broker.pushed) == 2
    assert world.broker.buried == ["job"]
    assert world.broker.reported == [("job", job.envelope)]  # It is reported whole, and once.


def test_poison_beside_innocents(dies: Death) -> None:
    """If a worker with several jobs dies repeatedly, only the job that runs alone then is charged again."""
    world = World(crash_backoff=(0.0,))
    world.trusted()
    world.enqueue("poison", "innocent")
    for _ in range(6):
        worker = world.worker()
        world.run(4)
        running(world, worker, "innocent")
        running(world, worker, "poison")
        dies(worker)
        pushed = len(world.broker.pushed)
        world.run_until(lambda n=pushed: len(world.broker.pushed) == n + 2, within=60)  # type: ignore[misc]
        assert {owed.crashes for owed in world.owed().values()} == {1}
    for alone in (2, 3):
        worker = world.worker()
        world.run(4)
        running(world, worker, "poison")
        dies(worker)
        world.run_until(
            lambda n=alone: "poison" not in world.owed() or world.owed()["poison"].crashes == n,  # type: ignore[misc]
            within=60,
        )
        world.run(2)
    assert world.broker.buried == ["poison"]
    assert world.owed()["innocent"].crashes == 1


def test_poison_beside_fresh_jobs(dies: Death) -> None:
    """A worker's death is charged again to its only job that was charged before, and once to the others."""
    world = World(crash_backoff=(0.0,))
    world.trusted()
    for death in range(1, 4):
        world.enqueue("poison", f"fresh-{death}") if death == 1 else world.enqueue(f"fresh-{death}")
        worker = world.worker()
        world.run(4)
        running(world, worker, "poison")
        running(world, worker, f"fresh-{death}")
        dies(worker)
        world.run_until(
            lambda n=death: (  # type: ignore[misc]
                world.owed()[f"fresh-{n}"].crashes == 1
                and ("poison" not in world.owed() or world.owed()["poison"].crashes == n)
            ),
            within=60,
        )
        world.run(2)
    assert world.broker.buried == ["poison"]
    assert {owed.crashes for owed in world.owed().values()} == {1}


def test_the_crash_of_a_held_queue_waits() -> None:
    """A dead worker's job of a paused queue is restored after the resume."""
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


def test_a_job_that_backs_off_is_no_suspect() -> None:
    """A job that waits after its worker's death is not among the suspects."""
    world = World(crash_backoff=(30.0,))
    worker = world.trusted()
    running(world, worker)
    worker.kill()
    world.run_until(lambda: world.owed()["job"].crashes == 1, within=30)

    assert world.store.watched(SOURCE.id, limit=9) == []
    assert world.owed()["job"].backoff > 25


def test_backoff() -> None:
    """A job whose worker died waits 30 s before it is restored."""
    world = World(crash_backoff=(30.0,))
    worker = world.trusted()
    running(world, worker)
    worker.kill()
    world.run_until(lambda: world.owed()["job"].crashes == 1, within=30)
    died_at = world.clock()

    world.run_until(lambda: world.broker.pushed, within=40)

    assert world.clock() - died_at >= 29.5
