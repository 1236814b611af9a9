from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import celery
import kombu
import pytest
import redis
from celery import chain, chord, group

from jobguard.demo.servers import PostgresServer, RedisServer
from tests.integration.celery.rig import WORKER_TIMEOUT, Rig, a_rig

IN_ONE_PROCESS = ["solo", "threads", "gevent"]
LONGER = 1.7 * WORKER_TIMEOUT
"""Seconds in which a reconciler declares a worker dead that does not beat."""


@pytest.fixture
def rig(tmp_path: Path, database: str, redis_url: str) -> Iterator[Rig]:
    """Give real workers with a leader, and a guarded application."""
    with a_rig(tmp_path, database, redis_url) as rig:
        rig.reconciler()
        yield rig


class TestChild:
    """A killed child of a live prefork worker."""

    @pytest.mark.parametrize("protocol", [1, 2])
    @pytest.mark.parametrize("task", ["die", "die_late"])
    def test_a_killed_child_gives_its_task_back(self, rig: Rig, task: str, protocol: int) -> None:
        """A killed task has not failed, and is not lost where Celery itself queues it again at once."""
        rig.app.conf.task_protocol = protocol
        worker = rig.worker()
        rig.until(rig.trusted)
        job_id = rig.send(task)
        rig.until(lambda: not rig.owed())
        assert rig.ended(job_id) == ["completed"]
        assert rig.written() == {task: 2}
        assert rig.ask("select crashes, recoveries from jobguard.history") == [(1, 1)]
        assert rig.app.AsyncResult(job_id).state == "SUCCESS"
        assert not worker.ended

    @pytest.mark.parametrize("task", ["die", "die_late"])
    def test_celerys_own_decision_stands_without_a_leader(
        self, tmp_path: Path, database: str, redis_url: str, task: str
    ) -> None:
        """Without a leader, Celery fails the one, and runs the other again at once in another child."""
        with a_rig(tmp_path, database, redis_url) as rig:
            rig.worker()
            job_id = rig.send(task)
            rig.until(lambda: not rig.owed())
            assert rig.ended(job_id) == [{"die": "failed", "die_late": "completed"}[task]]
            assert rig.written()[task] == {"die": 1, "die_late": 2}[task]

    @pytest.mark.parametrize(("task", "ends"), [("ok", ["completed"]), ("again", ["superseded"])])
    def test_a_child_that_is_killed_after_its_report_changes_nothing(
        self, rig: Rig, tmp_path: Path, task: str, ends: list[str]
    ) -> None:
        """The reported end stands, where Celery alone would fail the task and call its error callbacks.

        The tasks run one at a time: if a retry has succeeded just before its sender is stored as
        retried, Celery may store that over the success.
        """
        place = {"ok": "after_end_committed", "again": "after_move_record"}[task]
        (tmp_path / place).touch()
        worker = rig.worker(
            concurrency=1,
            JOBGUARD_TESTING="1",
            JOBGUARD_FAILPOINT=place,
            JOBGUARD_FAILPOINT_LOGS=str(tmp_path),
        )
        rig.until(rig.trusted)
        job_id = rig.send(task, link_error=rig.signature("ok", "an-error").set(immutable=True))
        rig.until(lambda: (tmp_path / place).read_text())
        (tmp_path / place).unlink()
        rig.until(lambda: "is lost, but its task has ended" in worker.text)
        assert rig.ended(job_id)[: len(ends)] == ends
        rig.until(lambda: not rig.owed())
        assert rig.ended(job_id)[-1] == "completed"
        assert rig.written()["an-error"] == 0
        assert rig.app.AsyncResult(job_id).state == "SUCCESS"

    def test_its_part_of_the_chord_is_kept(
        self, tmp_path: Path, database: str, own_redis: RedisServer
    ) -> None:
        """The result was stored, and the main process reports the completion; then Redis loses the data."""
        with a_rig(tmp_path, database, own_redis.url) as rig:
            rig.reconciler()
            (tmp_path / "after_return").touch()
            rig.worker(
                JOBGUARD_TESTING="1",
                JOBGUARD_FAILPOINT="after_return",
                JOBGUARD_FAILPOINT_LOGS=str(tmp_path),
            )
            rig.until(rig.trusted)
            # The first is killed; the other begins after that.
            header = [rig.signature("ok"), rig.signature("slow", "slow", 4.0).set(countdown=3)]
            chord(header, app=rig.app)(rig.signature("collect", "all"))
            rig.until(lambda: (tmp_path / "after_return").read_text())
            (tmp_path / "after_return").unlink()
            rig.until(lambda: rig.written()["slow-begins"])
            rig.until(lambda: rig.owed() == 1)
            own_redis.restart(keep_data=False)
            rig.until(lambda: rig.written()["all"], 60)
            rig.until(lambda: not rig.owed())
            assert rig.written() == {"ok": 1, "slow-begins": 1, "slow": 1, "all": 1}

    def test_its_outcome_is_decided_when_postgres_is_back(
        self, tmp_path: Path, own_database: str, redis_url: str, own_postgres: PostgresServer
    ) -> None:
        """Until Postgres is back the task has not failed; Celery alone would fail it and its chord."""
        with a_rig(tmp_path, own_database, redis_url) as rig:
            rig.reconciler()
            worker = rig.worker(JOBGUARD_CALL_TIMEOUT="0.5", JOBGUARD_CONNECT_TIMEOUT="0.5")
            rig.until(rig.trusted)
            chord([rig.signature("ok"), rig.signature("slow")], app=rig.app)(
                rig.signature("collect", "all")
            )
            rig.until(lambda: rig.written()["slow-begins"])
            own_postgres.pause()
            os.kill(rig.pid("slow-begins"), signal.SIGKILL)
            rig.until(lambda: "is decided when Postgres is back" in worker.text)
            own_postgres.resume()
            rig.until(lambda: rig.written()["all"])
            rig.until(lambda: not rig.owed())
            assert rig.written() == {"ok": 1, "slow-begins": 2, "slow": 1, "all": 1}

    def test_a_task_that_always_kills_is_dead(self, rig: Rig) -> None:
        """A task that always kills is dead when its crash budget is spent; Celery shows it as failed."""
        rig.worker()
        rig.until(rig.trusted)
        job_id = rig.send("die_always")
        rig.until(lambda: rig.ended(job_id))
        assert rig.ended(job_id) == ["dead"]
        assert 3 <= rig.written()["die_always"] <= 4
        rig.until(lambda: rig.app.AsyncResult(job_id).state == "FAILURE")

    def test_the_children_of_a_spawning_pool_claim_as_well(self, rig: Rig) -> None:
        """The children of a spawning pool claim in their parent's session, which they did not inherit."""
        rig.worker(conf={"worker_pool_start_method": "spawn", "worker_proc_alive_timeout": 60})
        rig.until(rig.trusted)
        sent = [rig.send("ok"), rig.send("slow", "slow", 6.0)]
        killed = rig.send("die")
        rig.until(lambda: not rig.owed())
        assert [rig.ended(job_id) for job_id in [*sent, killed]] == [["completed"]] * 3
        assert rig.written() == {"ok": 1, "slow-begins": 1, "slow": 1, "die": 2}
        claims = rig.ask("select number from jobguard.history order by number")
        assert claims == [(1,), (1,), (2,)], (
            "the children reported it, and no leader had to find it"
        )

    def test_a_child_that_is_replaced_reports_all_it_ran(self, rig: Rig) -> None:
        """worker_max_tasks_per_child ends children all the time, by os._exit, and no report is lost."""
        rig.worker(conf={"worker_max_tasks_per_child": 2})
        sent = [rig.send("ok", f"w{n}") for n in range(20)]
        rig.until(lambda: not rig.owed())
        assert [rig.ended(job_id) for job_id in sent] == [["completed"]] * 20
        assert set(rig.written().values()) == {1}


class TestWorker:
    """A whole worker that is killed."""

    @pytest.mark.parametrize("pool", ["prefork", *IN_ONE_PROCESS])
    def test_its_tasks_run_again_soon(self, rig: Rig, pool: str) -> None:
        """Its running tasks, acknowledged early or late, and its taken ones run again within seconds."""
        worker = rig.worker(pool)
        rig.until(rig.trusted)
        words = ["early", "late"] if pool != "solo" else ["early"]
        rig.send("slow", "early", 15.0)
        if pool != "solo":
            rig.send("late", "late", 15.0)
        taken = [rig.send("ok", f"taken-{n}") for n in range(4)]
        rig.until(lambda: all(rig.written()[f"{word}-begins"] for word in words))
        rig.until(lambda: rig.redis.hlen("unacked"))
        rig.worker("threads", concurrency=8)
        listed = "select sum(cardinality(claims)) from jobguard.workers"
        rig.until(lambda: rig.ask(listed)[0][0] >= len(words))  # only then can a worker be missed

        worker.signal(signal.SIGKILL)
        killed = time.time()
        rig.hurry()  # each of the two runs alone in its process: the second begins when the first has ended
        rig.until(lambda: all(rig.written()[f"{word}-begins"] == 2 for word in words))
        rig.until(lambda: all(rig.written()[f"taken-{n}"] for n in range(4)))
        again = min(rig.when(f"{word}-begins")[-1] for word in words) - killed
        back = max(rig.when(f"taken-{n}")[-1] for n in range(4)) - killed
        print(f"FIGURE {pool}: running again after {again:.1f} s, taken ones after {back:.1f} s")
        rig.until(lambda: all(rig.ended(job_id) == ["completed"] for job_id in taken))
        assert [rig.written()[f"taken-{n}"] for n in range(4)] == [1] * 4

    @pytest.mark.parametrize("pool", ["prefork", "threads"])
    def test_a_task_that_kills_it_is_dead_and_its_siblings_run_once(
        self, rig: Rig, pool: str
    ) -> None:
        """A task that kills the main process is dead after three deaths; tasks beside it complete once."""
        workers = [rig.worker(pool, concurrency=3)]
        rig.until(rig.trusted)
        poison = rig.send("die_with_the_worker")
        beside = [rig.send("slow", f"w{n}", 3.0) for n in range(4)]

        def over() -> bool:
            if workers[-1].ended:
                workers.append(rig.worker(pool, concurrency=3))
            return not rig.owed()

        rig.until(over)
        assert rig.ended(poison) == ["dead"]
        assert rig.written()["die_with_the_worker"] == 3
        assert [rig.ended(job_id) for job_id in beside] == [["completed"]] * 4
        assert [rig.written()[f"w{n}"] for n in range(4)] == [1] * 4

    @pytest.mark.parametrize("pool", ["prefork", *IN_ONE_PROCESS])
    def test_a_task_of_a_queue_that_was_added_runs_again(self, rig: Rig, pool: str) -> None:
        """Tasks of a queue run again that both workers began to consume at run time."""
        worker = rig.worker(pool)
        rig.until(rig.trusted)
        rig.add_consumer(worker, "added")
        rig.until(lambda: rig.trusted("added"))
        rig.send("slow", "slow", 600.0, queue="added")
        rig.until(lambda: rig.written()["slow-begins"])
        rig.add_consumer(rig.worker(), "added")
        rig.until(lambda: rig.queues_in_beats() == [{"celery", "added"}] * 2)

        worker.signal(signal.SIGKILL)
        rig.until(lambda: rig.written() == {"slow-begins": 2})

    def test_a_worker_that_computes_is_alive(self, rig: Rig) -> None:
        """A worker that computes for longer than the worker timeout is alive: a separate thread beats.

        For the other pools the next test has the harder case.
        """
        rig.worker()
        rig.worker("threads")
        rig.until(rig.trusted)
        job_id = rig.send("busy", "busy", LONGER)
        rig.until(lambda: rig.ended(job_id))
        assert rig.ended(job_id) == ["completed"]
        assert rig.written() == {"busy-begins": 1, "busy": 1}
        assert not rig.ask("select 1 from jobguard.workers where dead_at is not null")

    @pytest.mark.parametrize("pool", IN_ONE_PROCESS)
    def test_a_worker_in_a_c_call_is_alive(self, rig: Rig, pool: str) -> None:
        """A worker in a C call that holds the interpreter is alive, although no thread of it can beat."""
        rig.worker(pool)
        rig.worker("threads")
        rig.until(rig.trusted)
        job_id = rig.send("deaf", "deaf", LONGER)
        rig.until(lambda: rig.ended(job_id))
        assert rig.written() == {"deaf-begins": 1, "deaf": 1}
        assert not rig.ask("select 1 from jobguard.workers where dead_at is not null")

    def test_a_stopped_worker_goes_on_in_another_name(self, rig: Rig) -> None:
        """A stopped worker, declared dead, registers again; its children get the id with each task."""
        worker = rig.worker(concurrency=1)
        rig.until(rig.trusted)
        first = rig.send("ok", "first")
        rig.until(lambda: rig.ended(first))
        worker.signal(signal.SIGSTOP)
        rig.until(lambda: rig.ask("select 1 from jobguard.workers where dead_at is not null"))
        worker.signal(signal.SIGCONT)
        alive = "select id from jobguard.workers where dead_at is null and left_at is null"
        rig.until(lambda: rig.ask(alive))
        second = rig.send("slow", "second", 1.0)
        rig.until(lambda: rig.written()["second-begins"])
        claimed = "select worker from jobguard.running"
        assert rig.ask(claimed) == rig.ask(alive)
        rig.until(lambda: rig.ended(second))
        assert rig.ended(second) == ["completed"]
        assert rig.written()["second-begins"] == 1


class TestVisibilityTimeout:
    """Celery's own redelivery, which does not know which worker has a message."""

    TRANSPORT = {  # noqa: RUF012
        "visibility_timeout": 2,
        "unacked_restore_interval": 1,
        "unacked_restore_throttle": 1,
    }

    @pytest.mark.parametrize("mend", [True, False], ids=["mended", "left as it is"])
    def test_a_live_worker_keeps_its_messages(self, rig: Rig, mend: bool) -> None:
        """A live worker keeps its messages; without the fix, workers take them in turn, and one runs."""
        if not mend and kombu.VERSION[:2] < (5, 7):
            pytest.skip("kombu checks every 100 s only, and has no option for it")
        workers = [
            rig.worker(pool, transport=self.TRANSPORT, JOBGUARD_MEND_LIBRARY=str(int(mend)))
            for pool in ("prefork", "threads")
        ]
        sent = [rig.send("ok", f"w{n}", countdown=8) for n in range(5)]
        sent.append(rig.send("late", "late", 6.0))
        rig.until(lambda: not rig.owed(), 60)
        rig.until(lambda: not rig.redis.hlen("unacked") and not rig.redis.llen("celery"), 60)
        assert [rig.ended(job_id) for job_id in sent] == [["completed"]] * 6
        assert set(rig.written().values()) == {1}
        received = [
            len(re.findall(rf"\[{job_id}\] received", "".join(w.text for w in workers)))
            for job_id in sent
        ]
        assert received == [1] * 6 if mend else min(received) > 1

    def test_messages_lost_with_a_connection_are_redelivered(
        self, tmp_path: Path, database: str, own_redis: RedisServer
    ) -> None:
        """Messages of a connection that broke, which Celery forgets, are not taken for claimed ones."""
        with a_rig(tmp_path, database, own_redis.url) as rig:
            worker = rig.worker("threads", transport=self.TRANSPORT)
            rig.send("late", "late", 15.0)
            job_id = rig.send("ok", "ok", countdown=6)
            rig.until(lambda: rig.written()["late-begins"] and rig.redis.hlen("unacked") == 2)
            own_redis.restart(keep_data=True)
            rig.until(lambda: rig.ended(job_id))
            assert rig.written() == {"late-begins": 1, "ok": 1}, "it need not wait for the other"
            assert not worker.ended

    def test_messages_lost_with_a_connection_are_put_back(
        self, tmp_path: Path, database: str, own_redis: RedisServer
    ) -> None:
        """A dropped message is reported, and does not wait for the visibility timeout of an hour."""
        with a_rig(tmp_path, database, own_redis.url) as rig:
            rig.reconciler()
            worker = rig.worker()
            rig.until(rig.trusted)
            sent = [rig.send("slow", f"w{n}", 3.0) for n in range(6)]
            rig.until(lambda: rig.written() and rig.redis.hlen("unacked") >= 3)
            own_redis.restart(keep_data=True)
            rig.until(lambda: not rig.owed(), 90)
            assert [rig.ended(job_id) for job_id in sent] == [["completed"]] * 6
            assert set(rig.written().values()) == {1}
            assert not worker.ended

    def test_an_eta_beyond_it_runs_once(self, rig: Rig) -> None:
        """A task with an ETA beyond the timeout runs once; without us it runs about five times."""
        for _ in range(2):
            rig.worker(transport=self.TRANSPORT)
        sent = [rig.send("ok", f"w{n}", countdown=11) for n in range(5)]
        rig.until(lambda: not rig.owed(), 60)
        rig.until(lambda: not rig.redis.hlen("unacked") and not rig.redis.llen("celery"), 60)
        assert rig.written() == {f"w{n}": 1 for n in range(5)}
        assert [rig.ended(job_id) for job_id in sent] == [["completed"]] * 5

    def test_a_task_that_runs_beyond_it_runs_once(self, rig: Rig) -> None:
        """A task that is acknowledged late and runs beyond the timeout is redelivered, and runs once."""
        for _ in range(2):
            rig.worker(transport=self.TRANSPORT)
        job_id = rig.send("late", "late", 7.0)
        rig.until(lambda: rig.ended(job_id))
        assert rig.written() == {"late-begins": 1, "late": 1}


@pytest.mark.parametrize("pool", ["prefork", *IN_ONE_PROCESS])
class TestRedis:
    """A Redis that is killed while a worker has messages."""

    def test_a_guarded_worker_survives_it(
        self, tmp_path: Path, database: str, own_redis: RedisServer, pool: str
    ) -> None:
        """A worker survives, and each task runs once; kombu 5.7 crashes with one unacknowledged message."""
        with a_rig(tmp_path, database, own_redis.url) as rig:
            rig.reconciler()
            worker = rig.worker(pool, concurrency=4)
            rig.until(rig.trusted)
            sent = [rig.send("ok", "soon", countdown=6)]
            if pool != "solo":
                sent.append(rig.send("late", "late", 4.0))
                rig.until(lambda: rig.written()["late-begins"])
            else:
                rig.until(lambda: rig.redis.hlen("unacked"))
            sent.append(rig.send("ok", "later", countdown=15))
            own_redis.restart(keep_data=False)
            rig.until(lambda: answers(rig.redis))
            sent.append(rig.send("ok", "after"))
            rig.until(lambda: not rig.owed(), 60)
            assert not worker.ended
            assert [rig.ended(job_id) for job_id in sent] == [["completed"]] * len(sent)
            begun = {word: times for word, times in rig.written().items() if word != "late-begins"}
            assert set(begun.values()) == {1}


@pytest.mark.parametrize("pool", ["prefork", "threads"])
class TestAResultThatCannotBeStored:
    """Redis fails just when Celery stores the result of a task: the task has not failed."""

    def test_a_task_has_completed(self, rig: Rig, pool: str) -> None:
        """A completed task calls no error callback, and no report has it as failed."""
        worker = rig.worker(pool)
        rig.until(rig.trusted)
        on_error = rig.signature("ok", "an-error").set(immutable=True)
        job_id = rig.send("unstored", link_error=on_error)
        rig.until(lambda: rig.ended(job_id))
        rig.until(lambda: "could not be stored" in worker.text)
        last = rig.send("ok")
        rig.until(lambda: rig.ended(last))
        assert rig.ended(job_id) == ["completed"]
        assert rig.written() == {"unstored": 1, "ok": 1}
        assert rig.app.AsyncResult(job_id).state == "PENDING"

    def test_a_retry_is_owed(self, rig: Rig, pool: str) -> None:
        """A retry is recorded by then; a failure that Celery stored would close it.

        The tasks run one at a time: if the second run has succeeded before the first one's retry is
        to be stored, Celery does not store that retry at all.
        """
        worker = rig.worker(pool, concurrency=1)
        rig.until(rig.trusted)
        job_id = rig.send("unstored", "unstored", 1)
        rig.until(lambda: "completed" in rig.ended(job_id))
        assert "could not be stored" in worker.text
        assert rig.ended(job_id) == ["superseded", "completed"]
        assert rig.written() == {"unstored": 2}
        assert rig.app.AsyncResult(job_id).state == "SUCCESS"

    def test_another_backend_is_not_ours(
        self, tmp_path: Path, database: str, redis_url: str, pool: str
    ) -> None:
        """If the results are not in Redis, Celery's report stands, as without jobguard."""
        (tmp_path / "results").mkdir()
        conf = {"result_backend": f"file://{tmp_path}/results"}
        with a_rig(tmp_path, database, redis_url, conf) as rig:
            rig.worker(pool, concurrency=1)
            job_id = rig.send("unstored")
            rig.until(lambda: rig.ended(job_id))
            rig.until(lambda: rig.app.AsyncResult(job_id).state == "FAILURE")
            assert rig.ended(job_id) == ["failed"]

    def test_a_chord_goes_on(self, rig: Rig, pool: str) -> None:
        """The member's part of the chord is counted nevertheless, and the body runs once."""
        rig.worker(pool)
        rig.until(rig.trusted)
        header = [rig.signature("unstored"), rig.signature("ok")]
        chord(header, app=rig.app)(rig.signature("collect", "all"))
        rig.until(lambda: rig.written()["all"])
        rig.until(lambda: not rig.owed())
        assert rig.written() == {"unstored": 1, "ok": 1, "all": 1}


@pytest.mark.skipif(
    kombu.VERSION[:2] < (5, 7) or celery.VERSION[:2] < (5, 7),
    reason="kombu 5.7 brought the crash, and Celery before 5.7 survives it",
)
def test_unmended_a_worker_ends_with_its_redis(
    tmp_path: Path, database: str, own_redis: RedisServer
) -> None:
    """With the fix turned off, the worker ends, and its messages are still not lost."""
    with a_rig(tmp_path, database, own_redis.url) as rig:
        rig.reconciler()
        worker = rig.worker(concurrency=4, JOBGUARD_MEND_LIBRARY="0")
        rig.until(rig.trusted)
        sent = [rig.send("ok", f"w{n}", countdown=6) for n in range(3)]
        rig.until(lambda: rig.redis.hlen("unacked") == 3)
        own_redis.restart(keep_data=False)
        assert worker.wait() == 1
        assert "has no attribute 'hostname'" in worker.text
        rig.worker()
        rig.until(lambda: not rig.owed(), 60)
        assert [rig.ended(job_id) for job_id in sent] == [["completed"]] * 3
        assert rig.written() == {f"w{n}": 1 for n in range(3)}


class TestAnIdThatIsUsedAgain:
    """A stored result shows the id of a job, and not its run."""

    def test_a_killed_child_has_not_succeeded_before(self, rig: Rig) -> None:
        """A killed child has not succeeded, although its id has, in an earlier life."""
        rig.worker()
        rig.until(rig.trusted)
        rig.send("ok", task_id="daily")
        rig.until(lambda: rig.ended("daily"))
        rig.send("die", task_id="daily")
        rig.until(lambda: not rig.owed())
        assert rig.ended("daily") == ["completed", "completed"]
        assert rig.written() == {"ok": 1, "die": 2}

    def test_a_lost_worker_has_not_finished_both(self, rig: Rig) -> None:
        """Of two runs with one id at once, the end of one does not end the other."""
        worker = rig.worker()
        rig.until(rig.trusted)
        rig.send("slow", "short", 1.0, task_id="daily")
        rig.send("slow", "long", 8.0, task_id="daily")
        rig.until(lambda: rig.written()["long-begins"] and len(rig.ended("daily")) == 1)
        worker.kill()
        rig.worker()
        rig.until(lambda: not rig.owed(), 60)
        assert rig.written() == {"short-begins": 1, "short": 1, "long-begins": 2, "long": 1}


class TestChords:
    """Header tasks and their bodies."""

    def test_a_chord_goes_through(self, rig: Rig) -> None:
        """A chord sent by a program or from inside a task completes; its body is recorded as its end."""
        rig.worker()
        rig.send("fan", "inner")
        body = rig.signature("collect", "outer-all")
        header = [rig.signature("ok", f"outer-{n}") for n in range(3)]
        chord(header, app=rig.app)(body)
        rig.until(lambda: rig.written()["inner-all"] and rig.written()["outer-all"])
        rig.until(lambda: not rig.owed())
        assert set(rig.written().values()) == {1}
        assert not rig.ask("select 1 from jobguard.joins where closed_at is null")

    def test_a_chord_survives_a_redis_that_forgot_all(
        self, tmp_path: Path, database: str, own_redis: RedisServer
    ) -> None:
        """A chord survives the loss of the Redis that has its results, half of them counted."""
        with a_rig(tmp_path, database, own_redis.url) as rig:
            rig.reconciler()
            rig.worker(concurrency=4)
            rig.until(rig.trusted)
            header = [
                rig.signature("ok", "quick-0"),
                rig.signature("ok", "quick-1"),
                rig.signature("slow", "slow-0", 4.0),
                rig.signature("ok", "eta-0").set(countdown=6),
            ]
            chord(header, app=rig.app)(rig.signature("collect", "all"))
            rig.until(lambda: rig.written()["quick-0"] and rig.written()["quick-1"])
            rig.until(lambda: rig.written()["slow-0-begins"])
            own_redis.restart(keep_data=False)
            rig.until(lambda: rig.written()["all"], 60)
            rig.until(lambda: not rig.owed())
            assert rig.written()["all"] == 1

    def test_a_chord_begins_while_its_redis_is_away(
        self, tmp_path: Path, database: str, own_redis: RedisServer
    ) -> None:
        """A chord as a chain's next step survives an absence longer than Celery's retries of its size."""
        policy = {"max_retries": 1, "interval_start": 0.1, "interval_step": 0, "interval_max": 0.1}
        conf = {"result_backend_transport_options": {"retry_policy": policy}}
        with a_rig(tmp_path, database, own_redis.url, conf) as rig:
            rig.reconciler()
            worker = rig.worker()
            rig.until(rig.trusted)
            header = group(
                [rig.signature("ok", f"m{n}").set(immutable=True) for n in range(3)], app=rig.app
            )
            last = rig.signature("collect", "all")
            first = rig.signature("slow", "first", 2.0).set(immutable=True)
            chain(first, header, last, app=rig.app).apply_async()
            rig.until(lambda: rig.written()["first-begins"])
            own_redis.kill()
            rig.until(lambda: "the size of a chord" in worker.text, 20)
            own_redis.start()
            rig.until(lambda: answers(rig.redis))
            rig.until(lambda: rig.written()["all"], 60)
            rig.until(lambda: not rig.owed())
            assert set(rig.written().values()) == {1}
            assert not rig.ask("select 1 from jobguard.joins where closed_at is null")

    def test_a_chord_that_fails_is_closed(self, rig: Rig) -> None:
        """A chord that fails is closed, because Celery will never send its body."""
        rig.worker()
        chord([rig.signature("ok"), rig.signature("fail")], app=rig.app)(
            rig.signature("collect", "all")
        )
        rig.until(lambda: not rig.owed())
        rig.until(lambda: not rig.ask("select 1 from jobguard.joins where closed_at is null"))
        assert not rig.written()["all"]


def answers(client: redis.Redis) -> bool:
    """Return True if Redis is back."""
    try:
        return bool(client.ping())
    except redis.RedisError:
        return False
