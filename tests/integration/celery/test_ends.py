"""The ends of a run, from the sources of Celery and billiard: the ledger's record, and what runs again.

"Bare" is Celery without jobguard.

| ended by              | pool            | acks  | bare                          | the ledger         |
|-----------------------|-----------------|-------|-------------------------------|--------------------|
| any BaseException     | prefork         | both  | FAILURE, acknowledged, once   | failed             |
| any BaseException     | threads, gevent | early | once, no result               | failed             |
| any BaseException     | threads, gevent | late  | unacknowledged: runs again    | owed, then its end |
| GreenletExit          | gevent          | both  | acknowledged, once, no result | failed             |
| any BaseException     | solo            | early | ends the worker, once         | failed             |
| any BaseException     | solo            | late  | ends the worker: runs again   | owed, then its end |
| cancel, connection lost | prefork, gevent | late | redelivered                  | owed, then its end |
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import celery
import pytest

from jobguard.demo.servers import RedisServer
from tests.integration.celery.rig import Rig, a_rig

KINDS = ["CancelledError", "GeneratorExit", "KeyboardInterrupt", "SystemExit", "Stopped"]


@pytest.fixture
def rig(tmp_path: Path, database: str, redis_url: str) -> Iterator[Rig]:
    """Give real workers with a leader, and a guarded application."""
    with a_rig(tmp_path, database, redis_url) as rig:
        rig.reconciler()
        yield rig


def kinds(pool: str) -> list[str]:
    """Return the BaseExceptions that a task of this pool can raise."""
    return [*KINDS, "gevent.Timeout"] if pool == "gevent" else KINDS


@pytest.mark.parametrize("pool", ["prefork", "threads", "gevent"])
def test_a_base_exception_is_a_failure(rig: Rig, pool: str) -> None:
    """A message acknowledged before its run has failed, and runs once, also after a restart."""
    worker = rig.worker(pool)
    rig.until(rig.trusted)
    names = [*kinds(pool), *(["GreenletExit"] if pool == "gevent" else [])]
    sent = {name: rig.send("broken", name) for name in names}
    rig.until(lambda: not rig.owed())
    assert {name: rig.ended(job_id) for name, job_id in sent.items()} == {
        name: ["failed"] for name in names
    }
    assert rig.claims() == 0
    assert worker.stop() == 0
    rig.worker(pool)
    last = rig.send("ok")
    rig.until(lambda: rig.ended(last))
    assert rig.written() == {**dict.fromkeys(names, 1), "ok": 1}


def test_in_a_child_it_is_a_failure_also_if_acknowledged_late(rig: Rig) -> None:
    """Celery acknowledges a failure in a child, also with late acknowledgement."""
    rig.worker()
    rig.until(rig.trusted)
    sent = [rig.send("broken_late", name) for name in KINDS]
    rig.until(lambda: not rig.owed())
    assert [rig.ended(job_id) for job_id in sent] == [["failed"]] * len(KINDS)
    assert rig.written() == dict.fromkeys(KINDS, 1)


def test_an_exit_that_celery_queues_again_is_the_same_delivery(rig: Rig) -> None:
    """With reject_on_worker_lost an exit puts the message back; other ends are failures."""
    rig.worker()
    rig.until(rig.trusted)
    sent = {name: rig.send("broken_requeued", name) for name in KINDS}
    rig.until(lambda: not rig.owed())
    back = {"KeyboardInterrupt", "SystemExit"} if celery.VERSION[:2] >= (5, 7) else set[str]()
    assert {name: rig.ended(job_id) for name, job_id in sent.items()} == {
        name: ["completed" if name in back else "failed"] for name in KINDS
    }
    assert rig.written() == {name: 2 if name in back else 1 for name in KINDS}


def test_a_message_rejected_after_its_failure_has_failed(rig: Rig) -> None:
    """With task_acks_on_failure_or_timeout off Celery drops the message of a failure, which has failed."""
    rig.worker(conf={"task_acks_on_failure_or_timeout": False})
    rig.until(rig.trusted)
    sent = [rig.send("broken_late", name) for name in KINDS]
    rig.until(lambda: not rig.owed())
    rig.until(lambda: not rig.redis.hlen("unacked"))
    assert [rig.ended(job_id) for job_id in sent] == [["failed"]] * len(KINDS)
    assert rig.written() == dict.fromkeys(KINDS, 1)


def test_a_hard_time_limit_is_acknowledged(rig: Rig) -> None:
    """A hard time limit is a failure by default, also for a task that is acknowledged late."""
    rig.worker()
    rig.until(rig.trusted)
    job_id = rig.send("too_long_late")
    rig.until(lambda: rig.ended(job_id))
    rig.until(lambda: not rig.redis.hlen("unacked"))
    assert rig.ended(job_id) == ["failed"]
    assert rig.written() == {"too_long_late": 1}


def test_a_time_limit_of_gevents_is_reported_once(rig: Rig) -> None:
    """A Timeout of gevent in the task is reported once, by the worker."""
    rig.worker("gevent")
    rig.until(rig.trusted)
    early, late = rig.send("too_long"), rig.send("late", "late", 30.0, time_limit=1)
    rig.until(lambda: not rig.owed())
    assert rig.ended(early) == rig.ended(late) == ["failed"]
    assert "TimeLimitExceeded" in rig.error(early)
    assert "TimeLimitExceeded" in rig.error(late)


@pytest.mark.parametrize("pool", ["prefork", "gevent"])
def test_a_revoked_run_is_cancelled(rig: Rig, pool: str) -> None:
    """A run that a person revoked does not come back, acknowledged early or late."""
    rig.worker(pool)
    rig.until(rig.trusted)
    sent = [rig.send("slow", "slow", 60.0), rig.send("late", "late", 60.0)]
    rig.until(lambda: rig.written() == {"slow-begins": 1, "late-begins": 1})
    for job_id in sent:
        rig.app.control.revoke(job_id, terminate=True)
    rig.until(lambda: not rig.owed())
    rig.until(lambda: not rig.redis.hlen("unacked"))
    assert [rig.ended(job_id) for job_id in sent] == [["cancelled"]] * 2
    assert rig.written() == {"slow-begins": 1, "late-begins": 1}


def test_a_child_that_is_too_large_is_replaced_after_its_task(rig: Rig) -> None:
    """worker_max_memory_per_child ends a child after its task, which has completed."""
    rig.worker(conf={"worker_max_memory_per_child": 1})
    rig.until(rig.trusted)
    sent = [rig.send("late", f"w{n}", 0.1) for n in range(6)]
    rig.until(lambda: not rig.owed())
    assert [rig.ended(job_id) for job_id in sent] == [["completed"]] * 6
    assert rig.written() == {f"w{n}{end}": 1 for n in range(6) for end in ("", "-begins")}


@pytest.mark.parametrize("pool", ["threads", "gevent"])
def test_an_unacknowledged_message_runs_again(rig: Rig, pool: str) -> None:
    """These pools drop such a run and keep its message, so the next worker must be able to claim it."""
    worker = rig.worker(pool)
    rig.until(rig.trusted)
    names = kinds(pool)
    sent = [rig.send("broken_late", name) for name in names]
    rig.until(lambda: rig.written() == dict.fromkeys(names, 1))
    rig.until(lambda: rig.claims() == 0)
    assert rig.owed() == len(names)
    assert worker.stop() == 0
    rig.worker(pool)
    rig.until(lambda: not rig.owed())
    assert [rig.ended(job_id) for job_id in sent] == [["completed"]] * len(names)
    assert rig.written() == dict.fromkeys(names, 2)
    assert set(rig.ask("select crashes from jobguard.history")) == {(0,)}


@pytest.mark.parametrize(
    ("task", "ends", "runs"), [("broken", "failed", 1), ("broken_late", "completed", 2)]
)
def test_it_ends_a_solo_worker(rig: Rig, task: str, ends: str, runs: int) -> None:
    """A solo worker ends as without jobguard; an acknowledged task has failed, and others run again."""
    worker = rig.worker("solo")
    rig.until(rig.trusted)
    job_id = rig.send(task, "CancelledError")
    worker.wait()
    rig.worker("solo")
    rig.until(lambda: rig.ended(job_id))
    assert rig.ended(job_id) == [ends]
    assert rig.written() == {"CancelledError": runs}


@pytest.mark.parametrize("pool", ["prefork", "gevent"])
@pytest.mark.parametrize("keep", [True, False], ids=["append-only", "emptied"])
def test_a_cancel_for_a_lost_connection_loses_nothing(
    tmp_path: Path, database: str, own_redis: RedisServer, pool: str, keep: bool
) -> None:
    """An unordered termination brings the task back, and no run of it completes twice."""
    with a_rig(tmp_path, database, own_redis.url) as rig:
        rig.reconciler()
        worker = rig.worker(
            pool, conf={"worker_cancel_long_running_tasks_on_connection_loss": True}
        )
        rig.until(rig.trusted)
        job_id = rig.send("late", "late", 6.0)
        rig.until(lambda: rig.written()["late-begins"])
        own_redis.restart(keep_data=keep)
        rig.until(lambda: rig.ended(job_id), 60)
        assert rig.ended(job_id) == ["completed"]
        assert rig.written()["late"] == 1
        assert not worker.ended
