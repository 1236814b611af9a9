from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from celery import group
from celery.app.task import Task

from tests.integration.celery.rig import Rig, a_rig

POOLS = ["prefork", "threads", "gevent", "solo"]


@pytest.fixture
def rig(tmp_path: Path, database: str, redis_url: str) -> Iterator[Rig]:
    """Give real workers, and an application that is guarded."""
    with a_rig(tmp_path, database, redis_url) as rig:
        yield rig


@pytest.mark.parametrize("pool", POOLS)
class TestEnds:
    """How a task ends, in every pool."""

    @pytest.mark.parametrize("protocol", [1, 2])
    def test_every_end_is_told(self, rig: Rig, pool: str, protocol: int) -> None:
        """Each once, in the right table, and nothing is left owed or claimed."""
        expected = {
            "ok": ["completed"],
            "own": ["completed"],
            "fail": ["failed"],
            "again": ["superseded", "superseded", "completed"],
            "ignore": ["completed"],
            "reject": ["failed"],
            "requeue": ["completed"],
            "refuse": ["failed"],
            "replaced": ["superseded", "completed"],
        }
        rig.app.conf.task_protocol = protocol
        worker = rig.worker(pool, conf={"task_protocol": protocol})
        sent = {task: rig.send(task) for task in expected}
        rig.until(lambda: not rig.owed())

        assert {task: rig.ended(job_id) for task, job_id in sent.items()} == expected
        assert rig.claims() == 0
        said = rig.said()
        assert said["before"] == 1
        assert (said["again"], said["requeue"], said["ok"]) == (3, 6, 1)
        assert said["replaced-by-another"] == said["refuse"] == 1
        assert "ValueError: as it must" in rig.error(sent["fail"])
        assert worker.stop() == 0
        assert rig.ask("select 1 from jobguard.workers where left_at is not null")

    def test_what_is_copied_runs_once(self, rig: Rig, pool: str) -> None:
        """Five copies of one message, as Celery's own redelivery makes them: one run, one end."""
        job_id = rig.send("ok")
        (raw,) = rig.redis.lrange("celery", 0, -1)
        for _ in range(4):
            rig.redis.lpush("celery", raw)
        worker = rig.worker(pool)
        rig.until(lambda: worker.text.count("is skipped") == 4)
        rig.until(lambda: not rig.owed())
        assert worker.stop() == 0

        assert rig.said() == {"ok": 1}
        assert rig.ended(job_id) == ["completed"]

    def test_a_group_whose_generator_waits_for_results(self, rig: Rig, pool: str) -> None:
        """What it sends beside the group is not kept for the group's end."""
        rig.worker(pool)

        def load(word: str) -> str:
            return str(rig.app.AsyncResult(rig.send("ok", word)).get(timeout=20))

        members = (rig.signature("ok", "again-" + load(f"w{n}")) for n in range(4))
        group(members, app=rig.app).apply_async()
        rig.until(lambda: not rig.owed())
        assert rig.said() == {f"{kind}w{n}": 1 for kind in ("", "again-") for n in range(4)}

    def test_a_revoked_task_is_cancelled(self, rig: Rig, pool: str) -> None:
        """Before it began; and an expired one too."""
        worker = rig.worker(pool)
        revoked = rig.send("ok", "revoked", countdown=2)
        rig.until(lambda: rig.redis.hlen("unacked"))
        rig.app.control.revoke(revoked)
        expired = rig.send("ok", "expired", countdown=1, expires=0.5)
        rig.until(lambda: not rig.owed())
        assert rig.ended(revoked) == rig.ended(expired) == ["cancelled"]
        assert worker.stop() == 0
        assert not rig.said()

    def test_it_is_known_for_the_queues_it_consumes(self, rig: Rig, pool: str) -> None:
        """To the ledger and in Redis, as they come and go at run time."""
        worker = rig.worker(pool)
        rig.until(lambda: rig.listed() == rig.announced() == [{"celery"}])
        rig.add_consumer(worker, "added")
        rig.until(lambda: rig.listed() == rig.announced() == [{"celery", "added"}])
        job_id = rig.send("ok", queue="added")
        rig.until(lambda: rig.ended(job_id))
        rig.app.control.cancel_consumer("added")
        rig.until(lambda: rig.listed() == rig.announced() == [{"celery"}])
        job_id = rig.send("ok")
        rig.until(lambda: rig.ended(job_id))

    def test_an_unknown_task_goes_back(self, rig: Rig, pool: str) -> None:
        """Where a leader lives, another worker may know it: it has not failed."""
        rig.reconciler()
        worker = rig.worker(pool)
        rig.until(rig.trusted)
        job_id = rig.send("of_tomorrow")
        rig.until(lambda: "it goes back, for others" in worker.text)
        assert rig.owed() == 1
        assert rig.app.AsyncResult(job_id).state == "PENDING"

    def test_an_unknown_task_has_failed_where_nobody_leads(self, rig: Rig, pool: str) -> None:
        """As Celery says."""
        rig.worker(pool)
        job_id = rig.send("of_tomorrow")
        rig.until(lambda: not rig.owed())
        assert rig.ended(job_id) == ["failed"]
        assert rig.app.AsyncResult(job_id).state == "FAILURE"

    def test_a_body_that_nobody_can_read_has_failed(self, rig: Rig, pool: str) -> None:
        """Of a type that is not accepted; and one that is not what its type says."""
        refused = rig.send("ok", serializer="pickle")
        broken = rig.send("ok")
        (raw,) = rig.redis.lrange("celery", 0, 0)
        rig.redis.lset("celery", 0, raw.replace(b'"body": "', b'"body": "AAAA'))
        rig.worker(pool)
        rig.until(lambda: not rig.owed())
        assert rig.ended(refused) == rig.ended(broken) == ["failed"]
        assert not rig.said()

    def test_what_an_unguarded_program_sent_is_recorded_at_its_start(
        self, rig: Rig, pool: str
    ) -> None:
        """And has the same token however often it is put back."""
        raw = unguarded_message(rig)
        rig.worker(pool)
        rig.redis.lpush("celery", raw)
        rig.until(lambda: rig.said()["unguarded"])
        rig.until(lambda: rig.ask("select 1 from jobguard.history where outcome = 'completed'"))

    def test_started_is_taken_back_where_the_task_had_failed(self, rig: Rig, pool: str) -> None:
        """With track_started Celery overwrites FAILURE before anybody is asked."""
        job_id = rig.send("fail")
        (raw,) = rig.redis.lrange("celery", 0, -1)
        worker = rig.worker(pool, concurrency=1)
        rig.until(lambda: not rig.owed())
        before = rig.redis.get(f"celery-task-meta-{job_id}")
        rig.redis.lpush("celery", raw)
        rig.until(lambda: "is skipped" in worker.text)
        # Celery before 5.6 hangs, guarded or not, if it is to stop just as a task is ignored.
        last = rig.send("ok")
        rig.until(lambda: rig.ended(last))
        assert worker.stop() == 0
        assert rig.redis.get(f"celery-task-meta-{job_id}") == before
        assert rig.said() == {"fail": 1, "ok": 1}

    def test_a_warm_shutdown_leaves_nothing_claimed(self, rig: Rig, pool: str) -> None:
        """What runs is finished, what was taken goes back, and the goodbye is said."""
        worker = rig.worker(pool, concurrency=1)
        running = rig.send("slow", "running", 3.0)
        waiting = [rig.send("ok", f"waits-{n}") for n in range(3)]
        rig.until(lambda: rig.said()["running-begins"])
        assert worker.stop() == 0
        assert rig.ended(running) == ["completed"]
        assert rig.claims() == 0
        assert rig.ask("select 1 from jobguard.workers where left_at is not null")

        rig.worker(pool)
        rig.until(lambda: not rig.owed())
        assert [rig.ended(job_id) for job_id in waiting] == [["completed"]] * 3
        assert rig.said()["running"] == 1


class TestByOrder:
    """What Celery kills itself."""

    def test_a_hard_time_limit_is_a_failure(self, rig: Rig) -> None:
        """Not a kill, and nothing brings it back."""
        rig.reconciler()
        rig.worker()
        rig.until(rig.trusted)
        hard, soft = rig.send("too_long"), rig.send("too_slow")
        rig.until(lambda: not rig.owed())
        assert rig.ended(hard) == rig.ended(soft) == ["failed"]
        assert "TimeLimitExceeded(1)" in rig.error(hard)
        assert "SoftTimeLimitExceeded" in rig.error(soft)
        assert rig.said()["too_long-begins"] == rig.said()["too_slow-begins"] == 1

    @pytest.mark.skipif(
        not hasattr(Task, "acks_on_timeout"), reason="before, Celery gave such a task up"
    )
    def test_a_hard_time_limit_that_is_not_acknowledged_is_queued_again(self, rig: Rig) -> None:
        """With task_acks_on_failure_or_timeout off: the same delivery, and no crash of it."""
        rig.worker(conf={"task_acks_on_failure_or_timeout": False})
        job_id = rig.send("too_long_late")
        rig.until(lambda: not rig.owed())
        assert rig.ended(job_id) == ["completed"]
        assert rig.said() == {"too_long_late": 2}
        assert rig.ask("select crashes, number from jobguard.history") == [(0, 2)]

    def test_sys_exit_is_a_failure(self, rig: Rig) -> None:
        """The task asked for it."""
        rig.reconciler()
        rig.worker()
        rig.until(rig.trusted)
        job_id = rig.send("leave")
        rig.until(lambda: not rig.owed())
        assert rig.ended(job_id) == ["failed"]
        assert rig.said() == {"leave": 1}

    def test_a_task_that_is_terminated_is_cancelled(self, rig: Rig) -> None:
        """A person revoked it while it ran: it does not come back."""
        rig.reconciler()
        rig.worker()
        rig.until(rig.trusted)
        job_id = rig.send("slow", "slow", 60.0)
        rig.until(lambda: rig.said()["slow-begins"])
        rig.app.control.revoke(job_id, terminate=True)
        rig.until(lambda: not rig.owed())
        assert rig.ended(job_id) == ["cancelled"]

    def test_a_task_that_a_stamp_revokes_is_cancelled(self, rig: Rig) -> None:
        """By the headers of the worker's memory, which know no id."""
        rig.worker()
        rig.app.control.revoke_by_stamped_headers({"customer": "7"})
        job_id = str(
            rig.app.send_task(
                "tests.integration.celery.program.ok",
                countdown=1,
                stamped_headers=["customer"],
                customer="7",
                stamps={"customer": "7"},
                headers={"stamped_headers": ["customer"], "stamps": {"customer": "7"}},
            ).id
        )
        rig.until(lambda: not rig.owed())
        assert rig.ended(job_id) == ["cancelled"]
        assert not rig.said()

    @pytest.mark.parametrize("task", ["slow", "late"])
    def test_what_a_cold_shutdown_kills_runs_again_at_once(self, rig: Rig, task: str) -> None:
        """Celery says RETRY of it and sends nothing, or puts it back: no crash either way."""
        rig.reconciler()
        worker = rig.worker()
        rig.until(rig.trusted)
        job_id = rig.send(task, task, 4.0)
        rig.until(lambda: rig.said()[f"{task}-begins"])
        worker.signal(signal.SIGQUIT)
        worker.wait()
        rig.worker()
        rig.until(lambda: rig.ended(job_id))
        assert rig.ended(job_id) == ["completed"]
        assert (rig.said()[f"{task}-begins"], rig.said()[task]) == (2, 1)
        assert rig.ask("select crashes from jobguard.history") == [(0,)]


def unguarded_message(rig: Rig) -> bytes:
    """Return a message as a program sends it that has never heard of us."""
    rig.send("ok", "unguarded")
    raw = rig.redis.lpop("celery")
    assert isinstance(raw, bytes)
    head, _, tail = raw.partition(b'"jobguard": "')
    rig.ask("select 1 from jobguard.jobs")
    rig._postgres.execute("delete from jobguard.jobs")
    bare = head.rstrip().removesuffix(b",") + tail[33:]
    assert b"jobguard" not in bare
    return bare
