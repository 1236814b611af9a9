from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from jobguard.demo.servers import RedisServer
from tests.acceptance.rig import Process, Rig
from tests.support import eventually


@pytest.fixture
def rig(tmp_path: Path, database: str, own_redis: RedisServer) -> Iterator[Rig]:
    """Give a rig without processes."""
    rig = Rig(tmp_path, database, own_redis)
    yield rig
    rig.close()


def standby(rig: Rig, leader: Process) -> Process:
    """Start a second reconciler that stands by, because the first one leads."""
    second = rig.reconciler(leads=False)
    eventually(lambda: second.events("reconciler_started"))
    assert rig.leader() == leader.pid
    return second


# This test fails if a lease is valid for one minute after its end.
def test_when_the_leader_is_killed_the_other_leads_and_recovers(rig: Rig) -> None:
    """If the leader is killed, its lease expires, and the other reconciler recovers a later loss."""
    first = rig.reconciler()
    worker = rig.worker()
    rig.trust()
    worker.terminate()
    worker.wait()
    second = standby(rig, first)

    first.kill()
    at = time.monotonic()
    eventually(lambda: rig.leader() == second.pid, 20)
    print(f"another leads {time.monotonic() - at:.2f} s after the kill, with the default lease")

    labels = rig.enqueue(100)
    rig.redis.flushall()
    eventually(lambda: len(rig.waiting()) == 100, 30)
    assert rig.waiting() == labels
    assert rig.ask("select term from jobguard.leader") == [(2,)]


# This test fails if a leader that gets SIGTERM does not resign.
def test_a_leader_that_gets_sigterm_resigns_at_once(
    tmp_path: Path, database: str, own_redis: RedisServer
) -> None:
    """A leader that gets SIGTERM resigns, so that the other reconciler need not wait for the lease."""
    rig = Rig(tmp_path, database, own_redis, JOBGUARD_LEASE="60")
    try:
        first = rig.reconciler()
        second = standby(rig, first)
        ((end_of_lease,),) = rig.ask("select expires_at from jobguard.leader")

        first.terminate()
        at = time.monotonic()
        eventually(lambda: rig.leader() == second.pid)
        print(f"another leads {time.monotonic() - at:.2f} s after SIGTERM")

        assert rig.ask("select elected_at < %s from jobguard.leader", end_of_lease) == [(True,)]
        assert first.wait() == 0
        assert first.events("leader_resigned")
    finally:
        rig.close()


# This test fails if neither the lease nor the term is checked.
def test_a_leader_that_resumes_after_its_term_changes_nothing(
    tmp_path: Path, database: str, own_redis: RedisServer
) -> None:
    """A leader that is stopped between inspection and push, and resumed much later, writes nothing."""
    rig = Rig(tmp_path, database, own_redis, JOBGUARD_LEASE="4")
    try:
        first = rig.reconciler(JOBGUARD_RECOVERY_RATE="20")
        worker = rig.worker("mail", "post")
        rig.trust("mail", "post")
        worker.terminate()
        worker.wait()
        second = standby(rig, first)
        run, wait = rig.enqueue(300), rig.enqueue(100, "post", prefix="p")
        rig.redis.flushall()
        eventually(lambda: len(rig.waiting()) >= 10)  # hundreds of suspects wait for the limiter

        stop_between_inspection_and_push(rig, first)
        eventually(lambda: rig.leader() == second.pid, 20)
        eventually(lambda: (len(rig.waiting()), len(rig.waiting("post"))) == (300, 100), 30)
        for worker in [rig.worker(), rig.worker()]:
            assert not worker.ended
        rig.all_ended(run)
        eventually(lambda: rig.ask("select count(*) from jobguard.jobs") == [(100,)])
        eventually(lambda: rig.ask("select 1 from jobguard.incidents where closed_at is not null"))
        before = rows(rig)

        first.resume()
        eventually(lambda: first.events("leader_lost"))
        # By then, everything that the old leader had begun is over: each of its calls has 2 s.
        ticks = rig.ask("select pulse_n from jobguard.sources")[0][0]
        eventually(lambda: rig.ask("select pulse_n from jobguard.sources")[0][0] > ticks + 6)
        for table, after in rows(rig).items():
            assert after == before[table], table
        assert (rig.waiting(), rig.waiting("post")) == ([], wait)
        rig.worker("post")
        rig.all_ended(wait)
        rig.nothing_is_owed()

        assert set(rig.runs("start").values()) == {1}
        assert rig.leader() == second.pid
    finally:
        rig.close()


def stop_between_inspection_and_push(rig: Rig, leader: Process) -> None:
    """Stop the leader when it has read from Redis where the jobs are, and asks PostgreSQL which ended.

    A lock on the tombstones blocks all readers for a moment. A leader that waits for this lock is
    in the middle of its inspection.
    """
    waits = (
        "select 1 from pg_locks l join pg_stat_activity a using (pid)"
        " where not l.granted and l.relation = 'jobguard.history'::regclass"
        " and a.application_name = 'jobguard reconciler'"
    )
    with psycopg.connect(rig.database) as connection:
        connection.execute("lock table jobguard.history in access exclusive mode")
        eventually(lambda: rig.ask(waits), message="the leader inspects")
        leader.pause()


def rows(rig: Rig) -> dict[str, list[Any]]:
    """Return every row that a leader writes, except its pulse and the end of its lease."""
    return {
        "leader": rig.ask("select term, holder, elected_at, paused_at, held from jobguard.leader"),
        "incidents": rig.ask("select * from jobguard.incidents order by id"),
        "jobs": rig.ask(
            "select token, recoveries, crashes, claims from jobguard.jobs order by token"
        ),
        "suspects": rig.ask("select token, cause from jobguard.suspects order by token"),
        "queues": rig.ask("select * from jobguard.queues order by queue"),
    }
