"""A Redis that answers and takes no writes, and restores that are bounded in bytes."""

from __future__ import annotations

from typing import Any

import pytest
import redis

from jobguard.model import Restorable, Restored
from jobguard.reconciler.limiter import Slice
from jobguard.redis_refusal import refusal_of
from tests.fakes.world import NAMESPACE, OOM, SOURCE, World, events


def lost(count: int, **fields: Any) -> World:
    """Begin with so many jobs that a FLUSHALL took."""
    world = World()
    world.trusted()
    world.enqueue(*(f"job-{n:04}" for n in range(count)), **fields)
    world.run(6)
    world.flushall()
    return world


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (redis.OutOfMemoryError(OOM.removeprefix("OOM ")), OOM),
        (redis.ResponseError(f"Error running script (call to f_0): @user_script:1: -{OOM}"), "OOM"),
        (redis.ReadOnlyError("You can't write against a read only replica."), "READONLY"),
        (redis.exceptions.NoPermissionError("this user has no permissions"), "NOPERM"),
        (redis.ResponseError("MISCONF Redis is configured to save RDB snapshots"), "MISCONF"),
        (redis.ResponseError("NOREPLICAS Not enough good replicas to write."), "NOREPLICAS"),
        (redis.BusyLoadingError("Redis is loading the dataset in memory"), "LOADING"),
    ],
)
def test_states_of_a_server_are_known_by_their_words(error: Exception, words: str) -> None:
    """The words of Redis are kept, with the code that the client cuts off."""
    reported = refusal_of(error)
    assert reported is not None and words in reported


@pytest.mark.parametrize(
    "error",
    [
        redis.ResponseError("WRONGTYPE Operation against a key holding the wrong kind of value"),
        redis.ResponseError("ERR BOOM"),
        redis.ConnectionError("refused"),
        redis.TimeoutError("timed out"),
    ],
)
def test_other_errors_are_no_state_of_the_server(error: Exception) -> None:
    """An error of one key, and a server that is away, are not refusals."""
    assert refusal_of(error) is None


def test_a_full_redis_is_one_line_one_incident_and_a_probe_a_second(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """400 jobs without room in Redis cost one log line a minute and one try of one job a second."""
    caplog.set_level("INFO", logger="jobguard")
    world = lost(400)
    world.broker.full = 0
    world.run(4)
    world.broker.tries.clear()

    world.run(30, step=0.1)

    assert len(world.broker.tries) <= 31
    assert set(world.broker.tries) == {1}
    assert len(caplog.records) <= 8
    reported = [vars(record)["jobguard"] for record in caplog.records]
    (line,) = [line for line in reported if line["event"] == "redis_refuses"]
    assert (line["error"], line["waiting"]) == (OOM, 400)
    details = [incident.detail for incident in world.store.incidents(SOURCE.id)]
    assert any(OOM in detail for detail in details)


def test_restores_go_on_when_there_is_room(caplog: pytest.LogCaptureFixture) -> None:
    """Every job is restored in order a few seconds after there is room; one log line ends the state."""
    caplog.set_level("INFO", logger="jobguard")
    world = lost(400)
    world.broker.full = 10
    world.run(20)
    assert len(world.broker.pushed) == 10

    world.broker.full = None

    world.run_until(lambda: len(world.broker.pushed) == 400, within=10)
    assert world.broker.pushed == sorted(world.broker.pushed)
    world.run_until(lambda: world.store.incidents(SOURCE.id) == [], within=90)
    assert events(caplog.records).count("redis_refuses") == 1
    assert events(caplog.records).count("redis_accepts") == 1


def test_joins_that_find_no_room_are_the_same_state(caplog: pytest.LogCaptureFixture) -> None:
    """The counts of joins are restored first: a refusal there is also one probe a second."""
    world = lost(5)
    world.host.open_join(SOURCE.id, "chord", size=2, state=b"", namespace=NAMESPACE)
    rejoin, tries = world.broker.rejoin, []

    def full(*_: Any, **__: Any) -> None:
        tries.append(world.clock())
        raise redis.OutOfMemoryError(OOM.removeprefix("OOM "))

    world.broker.rejoin = full  # type: ignore[method-assign]
    world.run(30, step=0.1)
    assert 1 <= len(tries) <= 31
    assert events(caplog.records).count("redis_refuses") == 1
    assert "redis_away" not in events(caplog.records)

    world.broker.rejoin = rejoin  # type: ignore[method-assign]
    world.run_until(lambda: len(world.broker.pushed) == 5, within=10)


def test_another_leader_ends_what_the_first_wrote_down() -> None:
    """A new leader closes the incident of a full Redis that an earlier leader opened."""
    world = lost(3)
    world.broker.full = 0
    world.run(5)
    world.new_leader()
    world.broker.full = None

    world.run_until(lambda: world.store.incidents(SOURCE.id) == [], within=90)
    assert len(world.broker.pushed) == 3


def test_a_pulse_that_cannot_be_moved_is_no_outage(caplog: pytest.LogCaptureFixture) -> None:
    """A Redis that is full is still read: it is not down, and nothing is lost."""
    caplog.set_level("INFO", logger="jobguard")
    world = World()
    world.trusted()
    world.run(6)

    def full(_text: str) -> None:
        raise redis.OutOfMemoryError(OOM.removeprefix("OOM "))

    world.redis.before_eval = full
    world.run(30)
    assert events(caplog.records).count("redis_refuses") == 1
    assert "redis_away" not in events(caplog.records)

    world.redis.before_eval = lambda _text: None
    before = world.redis.pulse()
    world.run(70)
    assert before is not None and world.redis.pulse() != before
    assert world.store.incidents(SOURCE.id) == []


def test_a_job_that_cannot_go_back_is_tried_later_each_time() -> None:
    """Ten jobs whose restore fails are tried a few times a minute, and do not delay others."""
    world = lost(10)
    tried: list[str] = []

    def failing(given: Restorable, deadline: float) -> Restored:
        tried.append(f"{given.job_id} by {deadline}")
        return Restored.ERROR

    original, world.broker._restore = world.broker._restore, failing  # type: ignore[method-assign]
    world.run(60)
    assert 10 <= len(tried) <= 10 * 8

    world.broker._restore = original  # type: ignore[method-assign]
    world.enqueue("another", push=False)
    world.run_until(lambda: len(world.broker.pushed) == 11, within=120)


def test_big_jobs_go_back_in_slices_that_fit_the_deadline() -> None:
    """600 jobs of 300 kB over 30 MB/s are restored in time, and the pulse is checked in between."""
    world = lost(600, envelope=bytes(300_000))
    rate = 30e6
    restore = world.broker.restore

    def slow(deliveries: Any, *, deadline: float) -> Any:
        size = sum(len(given.envelope) for given in deliveries)
        if size / rate > 1.0:
            world.clock.advance(1.0)
            raise redis.TimeoutError("it takes longer than the client waits")
        world.clock.advance(size / rate)
        return restore(deliveries, deadline=deadline)

    world.broker.restore = slow  # type: ignore[method-assign]
    world.run_until(lambda: len(world.broker.pushed) == 600, within=30)
    assert world.broker.pushed == sorted(world.broker.pushed)


def test_a_job_that_redis_cannot_take_in_time_delays_no_other(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A job that takes longer than the client waits is tried later each time, with a line in the log."""
    world = lost(1, envelope=bytes(60_000_000))
    world.enqueue(*[f"small-{n}" for n in range(20)], push=False)
    restore, tried = world.broker.restore, []

    def slow(deliveries: Any, *, deadline: float) -> Any:
        if any(len(given.envelope) > 30_000_000 for given in deliveries):
            tried.append(len(deliveries))
            world.clock.advance(1.0)
            raise redis.TimeoutError("it takes longer than the client waits")
        return restore(deliveries, deadline=deadline)

    world.broker.restore = slow  # type: ignore[method-assign]
    world.run_until(lambda: len(world.broker.pushed) == 20, within=120)
    world.run(60)
    assert len(tried) < 20
    assert "no answer in time" in caplog.text or any(
        "no answer in time" in str(getattr(record, "jobguard", "")) for record in caplog.records
    )


def test_a_slice_that_came_too_late_is_followed_by_a_smaller_one() -> None:
    """Over a network of 200 kB/s the jobs are restored one by one."""
    world = lost(20, envelope=bytes(100_000))
    restore = world.broker.restore

    def slow(deliveries: Any, *, deadline: float) -> Any:
        world.clock.advance(sum(len(g.envelope) for g in deliveries) / 2e5)
        return restore(deliveries, deadline=deadline)

    world.broker.restore = slow  # type: ignore[method-assign]
    world.run_until(lambda: len(world.broker.pushed) == 20, within=60)


def test_slices_shrink_and_grow() -> None:
    """A slice is smaller after a miss, and larger after one that was fast and nearly full."""
    slice_ = Slice()
    begin = slice_.most_bytes
    slice_.missed()
    assert slice_.most_bytes < begin
    for _ in range(20):
        slice_.took(slice_.most_bytes, 0.01)
    assert slice_.most_bytes > begin
    grown = slice_.most_bytes
    slice_.took(10, 0.01)
    assert slice_.most_bytes == grown
    slice_.took(grown, 3.0)
    assert slice_.most_bytes < grown
