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
    """Give real workers, and a guarded application."""
    with a_rig(tmp_path, database, redis_url) as rig:
        yield rig


@pytest.mark.parametrize("pool", POOLS)
class TestEnds:
    """The ends of tasks, in every pool."""

    @pytest.mark.parametrize("protocol", [1, 2])
    def test_every_end_is_reported(self, rig: Rig, pool: str, protocol: int) -> None:
        """Every end is reported once, in the right table, and nothing stays owed or claimed."""
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
        written = rig.written()
        assert written["before"] == 1
        assert (written["again"], written["requeue"], written["ok"]) == (3, 6, 1)
        assert written["replaced-by-another"] == written["refuse"] == 1
        assert "ValueError: as it must" in rig.error(sent["fail"])
        assert worker.stop() == 0
        assert rig.ask("select 1 from jobguard.workers where left_at is not null")

    def test_a_copied_message_runs_once(self, rig: Rig, pool: str) -> None:
        """Five copies of one message, as Celery's own redelivery makes them, give one run and one end."""
        job_id = rig.send("ok")
        (raw,) = rig.redis.lrange("celery", 0, -1)
        for _ in range(4):
            rig.redis.lpush("celery", raw)
        worker = rig.worker(pool)
        rig.until(lambda: not (rig.redis.exists("celery") or rig.redis.exists("unacked")))
        rig.until(lambda: not rig.owed())
        assert "is skipped" in worker.text  # once for all copies: the log is bounded
        assert worker.stop() == 0

        assert rig.written() == {"ok": 1}
        assert rig.ended(job_id) == ["completed"]

    def test_a_group_whose_generator_waits_for_results(self, rig: Rig, pool: str) -> None:
        """A task that the generator sends beside the group does not wait for the group's end."""
        rig.worker(pool)

        def load(word: str) -> str:
            return str(rig.app.AsyncResult(rig.send("ok", word)).get(timeout=20))

        members = (rig.signature("ok", "again-" + load(f"w{n}")) for n in range(4))
        group(members, app=rig.app).apply_async()
        rig.until(lambda: not rig.owed())
        assert rig.written() == {f"{kind}w{n}": 1 for kind in ("", "again-") for n in range(4)}

    def test_a_revoked_task_is_cancelled(self, rig: Rig, pool: str) -> None:
        """A task that is revoked before its start is cancelled, and so is an expired one."""
        worker = rig.worker(pool)
        revoked = rig.send("ok", "revoked", countdown=2)
        rig.until(lambda: rig.redis.hlen("unacked"))
        rig.app.control.revoke(revoked)
        expired = rig.send("ok", "expired", countdown=1, expires=0.5)
        rig.until(lambda: not rig.owed())
        assert rig.ended(revoked) == rig.ended(expired) == ["cancelled"]
        assert worker.stop() == 0
        assert not rig.written()

    def test_it_is_known_for_the_queues_it_consumes(self, rig: Rig, pool: str) -> None:
        """The ledger and Redis show the queues that the worker consumes, as they change at run time."""
        worker = rig.worker(pool)
        rig.until(lambda: rig.queues_in_beats() == rig.announced() == [{"celery"}])
        rig.add_consumer(worker, "added")
        rig.until(lambda: rig.queues_in_beats() == rig.announced() == [{"celery", "added"}])
        job_id = rig.send("ok", queue="added")
        rig.until(lambda: rig.ended(job_id))
        rig.app.control.cancel_consumer("added")
        rig.until(lambda: rig.queues_in_beats() == rig.announced() == [{"celery"}])
        job_id = rig.send("ok")
        rig.until(lambda: rig.ended(job_id))

    def test_an_unknown_task_goes_back(self, rig: Rig, pool: str) -> None:
        """With a live leader, an unknown task has not failed, because another worker may know it."""
        rig.reconciler()
        worker = rig.worker(pool)
        rig.until(rig.trusted)
        job_id = rig.send("of_tomorrow")
        rig.until(lambda: "it goes back, for other workers" in worker.text)
        assert rig.owed() == 1
        assert rig.app.AsyncResult(job_id).state == "PENDING"

    def test_an_unknown_task_has_failed_without_a_leader(self, rig: Rig, pool: str) -> None:
        """Without a leader, an unknown task has failed, as in Celery."""
        rig.worker(pool)
        job_id = rig.send("of_tomorrow")
        rig.until(lambda: not rig.owed())
        assert rig.ended(job_id) == ["failed"]
        assert rig.app.AsyncResult(job_id).state == "FAILURE"

    def test_an_unreadable_body_has_failed(self, rig: Rig, pool: str) -> None:
        """A body has failed if its type is not accepted, or if it does not match its type.

        Also a message without a token, which the worker decodes to see if it is a task, is refused.
        """
        refused = rig.send("ok", serializer="pickle")
        broken = rig.send("ok")
        (raw,) = rig.redis.lrange("celery", 0, 0)
        rig.redis.lset("celery", 0, raw.replace(b'"body": "', b'"body": "AAAA'))
        with rig.app.connection_for_write() as connection:
            connection.Producer().publish("{}", routing_key="celery", content_type="text/of-others")
        worker = rig.worker(pool)
        rig.until(lambda: not rig.owed())
        assert rig.ended(refused) == rig.ended(broken) == ["failed"]
        assert not rig.written()
        rig.until(lambda: "untrusted content of type text/of-others" in worker.text)

    def test_a_task_of_an_unguarded_program_is_recorded_at_its_start(
        self, rig: Rig, pool: str
    ) -> None:
        """A message without a token gets one, and keeps it however often it is put back."""
        raw = unguarded_message(rig)
        rig.worker(pool)
        rig.redis.lpush("celery", raw)
        rig.until(lambda: rig.written()["unguarded"])
        rig.until(lambda: rig.ask("select 1 from jobguard.history where outcome = 'completed'"))

    def test_started_is_taken_back_where_the_task_had_failed(self, rig: Rig, pool: str) -> None:
        """With track_started Celery overwrites FAILURE before the fence is asked; the skip restores it."""
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
        assert rig.written() == {"fail": 1, "ok": 1}

    def test_a_warm_shutdown_leaves_nothing_claimed(self, rig: Rig, pool: str) -> None:
        """A warm shutdown finishes running tasks, puts taken ones back, and closes the session."""
        worker = rig.worker(pool, concurrency=1)
        running = rig.send("slow", "running", 3.0)
        waiting = [rig.send("ok", f"waits-{n}") for n in range(3)]
        rig.until(lambda: rig.written()["running-begins"])
        assert worker.stop() == 0
        assert rig.ended(running) == ["completed"]
        assert rig.claims() == 0
        assert rig.ask("select 1 from jobguard.workers where left_at is not null")

        rig.worker(pool)
        rig.until(lambda: not rig.owed())
        assert [rig.ended(job_id) for job_id in waiting] == [["completed"]] * 3
        assert rig.written()["running"] == 1


class TestByOrder:
    """Tasks that Celery kills itself."""

    def test_a_hard_time_limit_is_a_failure(self, rig: Rig) -> None:
        """A hard time limit is a failure and not a kill, and nothing brings the task back."""
        rig.reconciler()
        rig.worker()
        rig.until(rig.trusted)
        hard, soft = rig.send("too_long"), rig.send("too_slow")
        rig.until(lambda: not rig.owed())
        assert rig.ended(hard) == rig.ended(soft) == ["failed"]
        assert "TimeLimitExceeded(1)" in rig.error(hard)
        assert "SoftTimeLimitExceeded" in rig.error(soft)
        assert rig.written()["too_long-begins"] == rig.written()["too_slow-begins"] == 1

    @pytest.mark.skipif(
        not hasattr(Task, "acks_on_timeout"), reason="before, Celery gave such a task up"
    )
    def test_a_hard_time_limit_that_is_not_acknowledged_is_queued_again(self, rig: Rig) -> None:
        """With task_acks_on_failure_or_timeout off, the same delivery is queued, and it is no crash."""
        rig.worker(conf={"task_acks_on_failure_or_timeout": False})
        job_id = rig.send("too_long_late")
        rig.until(lambda: not rig.owed())
        assert rig.ended(job_id) == ["completed"]
        assert rig.written() == {"too_long_late": 2}
        assert rig.ask("select crashes, number from jobguard.history") == [(0, 2)]

    def test_sys_exit_is_a_failure(self, rig: Rig) -> None:
        """sys.exit() is a failure, because the task itself called it."""
        rig.reconciler()
        rig.worker()
        rig.until(rig.trusted)
        job_id = rig.send("leave")
        rig.until(lambda: not rig.owed())
        assert rig.ended(job_id) == ["failed"]
        assert rig.written() == {"leave": 1}

    def test_a_task_that_is_terminated_is_cancelled(self, rig: Rig) -> None:
        """A task that a person revokes during its run does not come back."""
        rig.reconciler()
        rig.worker()
        rig.until(rig.trusted)
        job_id = rig.send("slow", "slow", 60.0)
        rig.until(lambda: rig.written()["slow-begins"])
        rig.app.control.revoke(job_id, terminate=True)
        rig.until(lambda: not rig.owed())
        assert rig.ended(job_id) == ["cancelled"]

    def test_a_task_that_a_stamp_revokes_is_cancelled(self, rig: Rig) -> None:
        """A task is cancelled by the stamps in the worker's memory, which have no id."""
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
        assert not rig.written()

    @pytest.mark.parametrize("task", ["slow", "late"])
    def test_a_task_killed_by_a_cold_shutdown_runs_again_at_once(self, rig: Rig, task: str) -> None:
        """Celery's state is RETRY without a message, or it puts the message back: neither is a crash."""
        rig.reconciler()
        worker = rig.worker()
        rig.until(rig.trusted)
        job_id = rig.send(task, task, 4.0)
        rig.until(lambda: rig.written()[f"{task}-begins"])
        worker.signal(signal.SIGQUIT)
        worker.wait()
        rig.worker()
        rig.until(lambda: rig.ended(job_id))
        assert rig.ended(job_id) == ["completed"]
        assert (rig.written()[f"{task}-begins"], rig.written()[task]) == (2, 1)
        assert rig.ask("select crashes from jobguard.history") == [(0,)]

    @pytest.mark.parametrize("pool", ["solo", "threads"])
    def test_a_cold_shutdown_waits_for_a_run_that_the_pool_cannot_stop(
        self, rig: Rig, pool: str
    ) -> None:
        """Celery alone fails the task of a solo worker, and ends a threads worker with an error."""
        worker = rig.worker(pool)
        job_id = rig.send("slow", "w", 2.0)
        rig.until(lambda: rig.written()["w-begins"])
        worker.signal(signal.SIGQUIT)
        worker.wait()
        assert rig.ended(job_id) == ["completed"]
        assert "Unrecoverable error" not in worker.text


def unguarded_message(rig: Rig) -> bytes:
    """Return a message as an unguarded program sends it."""
    rig.send("ok", "unguarded")
    raw = rig.redis.lpop("celery")
    assert isinstance(raw, bytes)
    head, _, tail = raw.partition(b'"jobguard": "')
    rig.ask("select 1 from jobguard.jobs")
    rig._postgres.execute("delete from jobguard.jobs")
    bare = head.rstrip().removesuffix(b",") + tail[33:]
    assert b"jobguard" not in bare
    return bare
