"""How a run can end, by Celery's source and billiard's: what the ledger says, and what comes back.

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
    """Give real workers with a leader, and an application that is guarded."""
    with a_rig(tmp_path, database, redis_url) as rig:
        rig.reconciler()
        yield rig


def kinds(pool: str) -> list[str]:
    """Return what a task of this pool can raise that is no Exception."""
    return [*KINDS, "gevent.Timeout"] if pool == "gevent" else KINDS


@pytest.mark.parametrize("pool", ["prefork", "threads", "gevent"])
def test_a_base_exception_is_a_failure(rig: Rig, pool: str) -> None:
    """It was acknowledged before it began: it has failed, and runs once, also after a restart."""
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
    assert rig.said() == {**dict.fromkeys(names, 1), "ok": 1}


def test_in_a_child_it_is_a_failure_also_if_acknowledged_late(rig: Rig) -> None:
    """Celery acknowledges a failure."""
    rig.worker()
    rig.until(rig.trusted)
    sent = [rig.send("broken_late", name) for name in KINDS]
    rig.until(lambda: not rig.owed())
    assert [rig.ended(job_id) for job_id in sent] == [["failed"]] * len(KINDS)
    assert rig.said() == dict.fromkeys(KINDS, 1)


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
    assert rig.said() == {name: 2 if name in back else 1 for name in KINDS}


def test_what_is_rejected_after_its_failure_has_failed(rig: Rig) -> None:
    """With task_acks_on_failure_or_timeout off Celery drops the message of a failure."""
    rig.worker(conf={"task_acks_on_failure_or_timeout": False})
    rig.until(rig.trusted)
    sent = [rig.send("broken_late", name) for name in KINDS]
    rig.until(lambda: not rig.owed())
    rig.until(lambda: not rig.redis.hlen("unacked"))
    assert [rig.ended(job_id) for job_id in sent] == [["failed"]] * len(KINDS)
    assert rig.said() == dict.fromkeys(KINDS, 1)


def test_a_hard_time_limit_is_acknowledged(rig: Rig) -> None:
    """By default also of a task that is acknowledged late: it has failed."""
    rig.worker()
    rig.until(rig.trusted)
    job_id = rig.send("too_long_late")
    rig.until(lambda: rig.ended(job_id))
    rig.until(lambda: not rig.redis.hlen("unacked"))
    assert rig.ended(job_id) == ["failed"]
    assert rig.said() == {"too_long_late": 1}


def test_a_time_limit_of_gevents_is_reported_once(rig: Rig) -> None:
    """It throws a Timeout into the task; the worker says what that means."""
    rig.worker("gevent")
    rig.until(rig.trusted)
    early, late = rig.send("too_long"), rig.send("late", "late", 30.0, time_limit=1)
    rig.until(lambda: not rig.owed())
    assert rig.ended(early) == rig.ended(late) == ["failed"]
    assert "TimeLimitExceeded" in rig.error(early)
    assert "TimeLimitExceeded" in rig.error(late)


@pytest.mark.parametrize("pool", ["prefork", "gevent"])
def test_a_revoked_run_is_cancelled(rig: Rig, pool: str) -> None:
    """A person asked for it: it does not come back, acknowledged early or late."""
    rig.worker(pool)
    rig.until(rig.trusted)
    sent = [rig.send("slow", "slow", 60.0), rig.send("late", "late", 60.0)]
    rig.until(lambda: rig.said() == {"slow-begins": 1, "late-begins": 1})
    for job_id in sent:
        rig.app.control.revoke(job_id, terminate=True)
    rig.until(lambda: not rig.owed())
    rig.until(lambda: not rig.redis.hlen("unacked"))
    assert [rig.ended(job_id) for job_id in sent] == [["cancelled"]] * 2
    assert rig.said() == {"slow-begins": 1, "late-begins": 1}


def test_a_child_that_is_too_large_is_replaced_after_its_task(rig: Rig) -> None:
    """worker_max_memory_per_child ends a child; its task has completed."""
    rig.worker(conf={"worker_max_memory_per_child": 1})
    rig.until(rig.trusted)
    sent = [rig.send("late", f"w{n}", 0.1) for n in range(6)]
    rig.until(lambda: not rig.owed())
    assert [rig.ended(job_id) for job_id in sent] == [["completed"]] * 6
    assert rig.said() == {f"w{n}{end}": 1 for n in range(6) for end in ("", "-begins")}


@pytest.mark.parametrize("pool", ["threads", "gevent"])
def test_what_is_not_acknowledged_runs_again(rig: Rig, pool: str) -> None:
    """These pools drop such a run, and its message stays: the next worker must be free to claim it."""
    worker = rig.worker(pool)
    rig.until(rig.trusted)
    names = kinds(pool)
    sent = [rig.send("broken_late", name) for name in names]
    rig.until(lambda: rig.said() == dict.fromkeys(names, 1))
    rig.until(lambda: rig.claims() == 0)
    assert rig.owed() == len(names)
    assert worker.stop() == 0
    rig.worker(pool)
    rig.until(lambda: not rig.owed())
    assert [rig.ended(job_id) for job_id in sent] == [["completed"]] * len(names)
    assert rig.said() == dict.fromkeys(names, 2)
    assert set(rig.ask("select crashes from jobguard.history")) == {(0,)}


@pytest.mark.parametrize(
    ("task", "ends", "runs"), [("broken", "failed", 1), ("broken_late", "completed", 2)]
)
def test_it_ends_a_solo_worker(rig: Rig, task: str, ends: str, runs: int) -> None:
    """As without jobguard; what was acknowledged has failed, and the rest runs again."""
    worker = rig.worker("solo")
    rig.until(rig.trusted)
    job_id = rig.send(task, "CancelledError")
    worker.wait()
    rig.worker("solo")
    rig.until(lambda: rig.ended(job_id))
    assert rig.ended(job_id) == [ends]
    assert rig.said() == {"CancelledError": runs}


@pytest.mark.parametrize("pool", ["prefork", "gevent"])
@pytest.mark.parametrize("keep", [True, False], ids=["append-only", "emptied"])
def test_a_cancel_for_a_lost_connection_loses_nothing(
    tmp_path: Path, database: str, own_redis: RedisServer, pool: str, keep: bool
) -> None:
    """No person has asked for it; and no run of it completes twice."""
    with a_rig(tmp_path, database, own_redis.url) as rig:
        rig.reconciler()
        worker = rig.worker(
            pool, conf={"worker_cancel_long_running_tasks_on_connection_loss": True}
        )
        rig.until(rig.trusted)
        job_id = rig.send("late", "late", 6.0)
        rig.until(lambda: rig.said()["late-begins"])
        own_redis.restart(keep_data=keep)
        rig.until(lambda: rig.ended(job_id), 60)
        assert rig.ended(job_id) == ["completed"]
        assert rig.said()["late"] == 1
        assert not worker.ended
