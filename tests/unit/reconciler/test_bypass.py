"""Jobs that are taken again and again without a claim."""

from __future__ import annotations

import pytest

from tests.fakes.world import SOURCE, World, calm, events, running


def test_a_job_that_is_taken_again_and_again_is_held(caplog: pytest.LogCaptureFixture) -> None:
    """A job that is taken twice without a claim is held, and an incident names its task and queue."""
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
    """A job that Redis loses each time is restored each time."""
    world = calm()
    world.enqueue("job")
    for n in range(1, 6):
        world.run(20)
        world.flushall()
        world.run_until(lambda n=n: world.broker.pushed == ["job"] * n, within=20)  # type: ignore[misc]


@pytest.mark.parametrize(("runs", "restores"), [(True, 5), (False, 2)])
def test_a_job_that_waited_in_workers_that_died(*, runs: bool, restores: int) -> None:
    """A job beside others that kill their workers is restored each time; one that was alone is held."""
    world = calm()
    world.enqueue("waits")
    for n in range(1, 6):
        worker = world.worker(f"crowded-{n}")
        if runs:
            running(world, worker, f"killer-{n}")
        world.broker.bodies.pop("waits", None)  # acknowledged, and not claimed yet
        worker.kill()
        world.new_leader()  # it knows nothing of earlier deaths
        world.run(200)
        assert restored(world) == min(n, restores)


def restored(world: World) -> int:
    """Return how often the job that waits was pushed again."""
    return world.broker.pushed.count("waits")
