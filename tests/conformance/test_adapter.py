"""The contract of an adapter: an adapter is complete if it passes these tests.

Each test runs once for every library in ``conftest.LIBRARIES``, on a real Redis and with the ledger
in a real PostgreSQL. To support another queue library, write the adapter, and a subclass of
``Library`` that describes how that library sends, works and keeps its jobs; then make these tests
pass. An operation that a library does not have is skipped with a reason. Tests for one library only
are in ``tests/integration/<library>``.

In the processes of the host, an adapter records a job before the push, claims it before the run,
and reports its end. If jobguard fails, the library behaves as it does without jobguard. In
the reconciler, an adapter is a broker: it reports where a delivery is, and restores a lost one
atomically and unchanged. It imports no user code.

Each of these faults was once planted in RQ's adapter and made a test fail: the push before the
record; a dropped pipeline recorded; a live execution not inspected; "missing" reported as waiting;
an overwriting delivery not named; a restore without deadline, without time to live, without a check
if the job is present, that replaces any older delivery, or that forgets the front of the queue; a
retry and a move without their parents; a refused start that runs; a skip that changes a claimed
run, or leaves its id in use; a cancel without its tombstone, or before it; dead jobs not seen,
their budget not asked; fakeredis guarded; every queue guarded; no safe tracker, or one that hides
an error that the user asked for; a hook that stays; a broker that unpickles.
"""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import redis

import jobguard
from jobguard.adapter import Session, Source, Tracker
from jobguard.demo.children import kill_tree
from jobguard.errors import StoreUnavailable
from jobguard.guard import JobGuard
from jobguard.host.session import WorkerSession
from jobguard.host.tracker import HostTracker
from jobguard.model import Ended, Presence, Restored, new_token
from tests.conformance import tasks
from tests.conformance.library import OTHER, Library
from tests.conformance.words import (
    BRISK,
    ROOT,
    Leader,
    Records,
    another_worker,
    end,
    environ,
    filler,
)
from tests.support import eventually, keyspace, newly_owed

HOUR = 3600.0


def methods(protocol: type) -> list[str]:
    """Return the names of a protocol's methods."""
    return [name for name, value in vars(protocol).items() if callable(value) and name[0] != "_"]


UNREACHABLE = "postgresql://nobody@127.0.0.1:1/nothing"
SENT: dict[str, dict[str, Any]] = {
    "plain": {},
    "delayed": {"delay": HOUR},
    "with retries": {"retries": 2},
    "at the front": {"at_front": True},
    "of a given id": {"job_id": "given"},
}


class TestRecord:
    """A job is recorded before it is pushed."""

    @pytest.mark.parametrize("how", SENT)
    def test_a_record_is_committed_before_anything_is_pushed(
        self,
        library: Library,
        guard: JobGuard,
        records: Records,
        monkeypatch: pytest.MonkeyPatch,
        how: str,
    ) -> None:
        """Redis has nothing of a job before its record is committed, and then has the recorded token."""
        seen: list[tuple[int, object, list[str]]] = []
        record = HostTracker.record

        def watched(self: HostTracker, deliveries: Any, **options: Any) -> Any:
            recorded = record(self, deliveries, **options)
            body = library.body(deliveries[0].job_id)
            seen.append((len(records.owed()), body, library.waiting()))
            return recorded

        monkeypatch.setattr(HostTracker, "record", watched)
        job_id = library.send(**SENT[how])

        assert seen == [(1, None, [])]
        (owed,) = records.owed()
        assert owed.job_id == job_id
        assert owed.token == library.token(job_id)

    def test_a_push_that_is_dropped_records_nothing(
        self, library: Library, guard: JobGuard, records: Records
    ) -> None:
        """A push that is dropped records nothing, because nothing was promised."""
        library.drop_push()

        assert records.owed() == []
        assert library.waiting() == []

    @pytest.mark.parametrize("then", ["spool", "skip", "raise"])
    def test_a_record_that_fails_is_pushed_or_refused_as_the_user_said(
        self, library: Library, then: str
    ) -> None:
        """Without PostgreSQL the job is pushed and runs, unless the user asked for an error."""
        with jobguard.guard(library.target(), postgres=UNREACHABLE, when_postgres_down=then):
            if then == "raise":
                with pytest.raises(StoreUnavailable):
                    library.send()
                assert library.jobs() == {}
            else:
                job_id = library.send()
                assert library.waiting() == [job_id]
                library.work()
                assert library.said() == ["ran"]


class TestBacklog:
    """A leader records what waits in Redis and is not in the ledger."""

    def test_jobs_that_were_pushed_without_a_record_are_recorded_and_come_back_unchanged(
        self, library: Library, source: Source, records: Records, database: str
    ) -> None:
        """Jobs of an unguarded program are recorded from Redis, and a restore changes nothing of them."""
        with library.bare():
            sent = [library.send(), library.send("fail", retries=2), library.send(delay=HOUR)]
        with filler(library, source, database) as fill:
            counts = fill(mark=False, dry=True)
            assert counts.waiting == 3 and records.owed() == []
            assert fill(page=1).recorded == 3
            assert fill().recorded == 0  # All of them are known now.
        owed = {one.job_id: one for one in records.owed()}
        assert set(owed) == set(sent)
        due = owed[sent[2]].due_at
        assert due is not None and abs(due - time.time() - HOUR) < 60
        before = library.jobs()
        with redis.Redis.from_url(library.redis_url) as client:
            leader = Leader(library.adapter.broker(source, client))
            seen = [leader.observe(owed[job_id]).presence for job_id in sent]
            client.flushdb()
            leader = Leader(library.adapter.broker(source, client))  # Its scans are of now.
            assert leader.restore(*(owed[job_id] for job_id in sent)) == [Restored.RESTORED] * 3
        assert seen[0] is seen[1] is Presence.WAITING
        assert seen[2] in (Presence.WAITING, Presence.SCHEDULED)
        assert without_tags(library.jobs()) == without_tags(before)
        library.work()
        assert "ran" in library.said()

    def test_a_job_whose_record_was_lost_is_recorded_under_its_own_token(
        self, library: Library, source: Source, records: Records, database: str
    ) -> None:
        """A guarded push that no record followed has its token in Redis, and keeps it."""
        with jobguard.guard(library.target(), postgres=UNREACHABLE):
            job_id = library.send()
        token = library.token(job_id)
        with filler(library, source, database) as fill:
            assert fill().recorded == 1
        assert [one.token for one in records.owed()] == [token]


class TestPresence:
    """The presence of a delivery in Redis."""

    def test_waiting(
        self, library: Library, guard: JobGuard, records: Records, leader: Leader
    ) -> None:
        """A job in its queue is waiting."""
        library.send()
        assert leader.observe(*records.owed()).presence is Presence.WAITING

    def test_scheduled(
        self, library: Library, guard: JobGuard, records: Records, leader: Leader
    ) -> None:
        """A job in the delay queue is scheduled."""
        library.send(delay=HOUR)
        where = Presence.SCHEDULED if library.delayed_jobs_are_moved else Presence.WAITING
        assert leader.observe(*records.owed()).presence is where

    def test_running(
        self, library: Library, guard: JobGuard, records: Records, leader: Leader
    ) -> None:
        """A job on a worker is running."""
        if not library.shows_runs:
            pytest.skip("Redis does not show running jobs; claims do")
        library.send("probe")
        (owed,) = records.owed()
        seen: list[Presence] = []
        tasks.PROBES.append(lambda: seen.append(leader.observe(owed).presence))
        library.work()
        assert seen == [Presence.RUNNING]

    @pytest.mark.parametrize("task", ["say", "fail"])
    def test_ended(
        self,
        library: Library,
        guard: JobGuard,
        records: Records,
        leader: Leader,
        task: str,
    ) -> None:
        """A job that has ended has the presence that the library remembers."""
        library.send(task)
        (owed,) = records.owed()
        library.work()
        assert leader.observe(owed).presence is library.remembers[task]

    def test_absent(
        self, library: Library, guard: JobGuard, records: Records, leader: Leader
    ) -> None:
        """One lost job among others is absent, and each inspection of the same loss is equal."""
        kept, lost = library.send(), library.send()
        library.forget(lost)
        first, second = (leader.observe(owed) for owed in records.owed())
        assert library.waiting() == [kept]
        assert (first.presence, second.presence) == (Presence.WAITING, Presence.ABSENT)
        assert leader.observe(records.owed()[1]) == second

    def test_overwritten(
        self, library: Library, guard: JobGuard, records: Records, leader: Leader
    ) -> None:
        """A delivery that was replaced by another one is overwritten, and the other token is reported."""
        if not library.one_body_per_id:
            pytest.skip("every delivery has a body of its own")
        library.send(job_id="same")
        (first,) = records.owed()
        library.send(job_id="same")
        (second,) = records.owed()
        seen = leader.observe(first)
        assert (seen.presence, seen.other) == (Presence.OVERWRITTEN, second.token)


class TestRestore:
    """Lost jobs are restored."""

    @pytest.mark.parametrize("how", SENT)
    def test_it_is_identical_and_runs_once(
        self, library: Library, guard: JobGuard, records: Records, leader: Leader, how: str
    ) -> None:
        """Redis has the same keys as before, and a worker runs the job as usual."""
        job_id = library.send(**SENT[how])
        before, ttl = library.jobs(), library.client.ttl
        lives = {key: ttl(key) for key in before}
        library.client.flushdb()
        assert leader.restore(*records.owed()) == [Restored.RESTORED]

        assert library.jobs() == before
        assert {key: ttl(key) for key in before} == pytest.approx(lives, abs=1)
        library.move_delayed()
        library.work()
        assert library.said() == ["ran"]
        assert records.owed() == []
        assert records.ended(job_id)[-1][0] == "completed"

    def test_two_leaders_at_once_put_each_back_once(
        self, library: Library, guard: JobGuard, records: Records, source: Source
    ) -> None:
        """Each job is restored by one leader and found by the other, in the order of the records."""
        sent = [library.send(job_id=f"j{n}") for n in range(300)]
        library.client.flushdb()
        owed, start = records.owed(), threading.Barrier(2)
        answers: list[list[Restored]] = [[], []]

        def lead(which: int) -> None:
            with redis.Redis.from_url(library.redis_url) as client:
                one = Leader(library.adapter.broker(source, client))
                start.wait(10)
                for at in range(0, len(owed), 10):
                    answers[which] += one.restore(*owed[at : at + 10])

        leaders = [threading.Thread(target=lead, args=(which,)) for which in range(2)]
        for thread in leaders:
            thread.start()
        for thread in leaders:
            thread.join(30)

        both = [Counter(pair) for pair in zip(*answers, strict=True)]
        assert both == [Counter([Restored.RESTORED, Restored.PRESENT])] * 300
        assert library.waiting() == sent

    def test_nothing_is_put_back_past_the_deadline(
        self, library: Library, guard: JobGuard, records: Records, leader: Leader
    ) -> None:
        """After the deadline nothing is restored; the clock is that of Redis."""
        library.send()
        library.client.flushdb()
        late = time.time() - 0.001
        assert leader.restore(*records.owed(), deadline=late) == [Restored.TOO_LATE]
        assert library.jobs() == {}

    def test_what_has_expired_is_not_put_back(
        self, library: Library, guard: JobGuard, records: Records, leader: Leader
    ) -> None:
        """An expired job is not restored, because the library would have dropped it."""
        library.send()
        library.client.flushdb()
        (owed,) = records.owed()
        expired = replace(owed, expires_at=time.time() - 5)
        assert leader.restore(expired) == [Restored.EXPIRED]
        assert library.jobs() == {}

    def test_only_a_life_that_is_known_to_be_over_is_replaced(
        self, library: Library, guard: JobGuard, records: Records, leader: Leader
    ) -> None:
        """If Redis has an older delivery of the id, a restore replaces it only if it is named."""
        if not library.one_body_per_id:
            pytest.skip("every delivery has a body of its own")
        library.send(job_id="same")
        (first,) = records.owed()
        before = dump(library.client)
        library.send(job_id="same", delay=HOUR)
        (second,) = records.owed()
        load(library.client, before)
        older = library.jobs()

        strange = replace(second, replaces=frozenset([new_token()]))
        assert leader.restore(second, strange) == [Restored.CHANGED, Restored.CHANGED]
        assert library.jobs() == older
        known = replace(second, replaces=frozenset([first.token]))
        assert leader.restore(known) == [Restored.RESTORED]
        assert library.token("same") == second.token
        assert library.waiting() == []

    def test_the_order_is_kept(
        self, library: Library, guard: JobGuard, records: Records, leader: Leader
    ) -> None:
        """The order is kept, also for jobs that were put at the front."""
        for n in range(12):
            library.send(job_id=f"j{n}", at_front=n % 3 == 2)
        before = library.waiting()
        library.client.flushdb()
        leader.restore(*records.owed())
        assert library.waiting() == before


class TestBatch:
    """Many jobs are recorded in one statement."""

    def test_a_batch_is_recorded_in_one_statement_and_pushed_in_order(
        self,
        library: Library,
        guard: JobGuard,
        records: Records,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """A batch is one statement, and nothing of it is in Redis before that."""
        counts: list[int] = []
        record = HostTracker.record

        def watched(self: HostTracker, deliveries: Any, **options: Any) -> Any:
            counts.append(len(deliveries))
            return record(self, deliveries, **options)

        monkeypatch.setattr(HostTracker, "record", watched)
        with guard.batch():
            sent = [library.send("say", str(n)) for n in range(20)]
            assert library.waiting() == []
        assert counts == [20]
        assert library.waiting() == sent
        assert [owed.job_id for owed in records.owed()] == sent
        library.work()
        assert sorted(library.said(), key=int) == [str(n) for n in range(20)]


class TestLives:
    """Each push is a delivery, and each delivery ends once."""

    def test_a_retry_supersedes_the_attempt_that_failed(
        self, library: Library, guard: JobGuard, records: Records
    ) -> None:
        """A retry is another delivery of the same job, with the next attempt number."""
        job_id = library.send("fail", retries=2)
        library.work()
        assert library.said() == ["ran"] * 3
        # By attempt: if a retry waits in a delay queue first, the library makes two deliveries of
        # it.
        last = {attempt: outcome for outcome, attempt in records.ended(job_id)}
        assert last == {1: "superseded", 2: "superseded", 3: "failed"}
        assert records.blamed(job_id) == {1, 2, 3}
        assert (records.owed(), records.claims()) == ([], [])

    def test_a_move_from_the_delay_queue_supersedes_what_waited_there(
        self, library: Library, guard: JobGuard, records: Records
    ) -> None:
        """A move from the delay queue is another delivery with the same attempt number."""
        if not library.delayed_jobs_are_moved:
            pytest.skip("a delayed job is not pushed again")
        job_id = library.send(delay=HOUR)
        (delayed,) = records.owed()
        library.move_delayed()
        (moved,) = records.owed()
        assert moved.token == library.token(job_id) != delayed.token
        assert records.ended(job_id) == [("superseded", 1)]
        library.work()
        assert records.ended(job_id) == [("superseded", 1), ("completed", 1)]

    def test_what_has_ended_is_not_moved_from_the_delay_queue(
        self, library: Library, guard: JobGuard, records: Records
    ) -> None:
        """A delayed job that has ended can be pushed again, but that makes no new delivery."""
        if not library.delayed_jobs_are_moved:
            pytest.skip("a delayed job is not pushed again")
        job_id = library.send(delay=HOUR)
        guard.cancel(job_id)
        library.move_delayed()
        library.work()
        assert library.said() == []
        assert (records.owed(), records.ended(job_id)) == ([], [("cancelled", 1)])

    @pytest.mark.parametrize("task", ["say", "fail"])
    def test_what_has_ended_is_skipped_and_put_right(
        self,
        library: Library,
        guard: JobGuard,
        records: Records,
        leader: Leader,
        task: str,
    ) -> None:
        """If Redis goes back in time before an end, the job does not run again, and Redis gets its end."""
        job_id = library.send(task)
        (owed,) = records.owed()
        before = dump(library.client)
        library.work()
        ended = records.ended(job_id)
        load(library.client, before)
        assert library.waiting() == [job_id]

        library.work()
        assert library.said() == ["ran"]
        assert library.waiting() == []
        if library.reports_end_again:
            assert leader.observe(owed).presence is library.remembers[task]
        assert (records.owed(), records.ended(job_id)) == ([], ended)

    def test_what_another_worker_runs_is_skipped_and_its_run_is_not_touched(
        self,
        library: Library,
        guard: JobGuard,
        records: Records,
        source: Source,
        database: str,
    ) -> None:
        """A job that another worker runs is skipped, and only that worker ends its claim."""
        job_id = library.send()
        (owed,) = records.owed()
        with another_worker(database, source, owed) as other:
            body = library.body(job_id)
            library.work()
            assert library.said() == []
            if library.one_body_per_id:  # in the other case one of two messages is gone
                assert library.body(job_id) == body
            assert library.waiting() == []
            assert records.claims() == [(owed.token, 1)]
            assert other.complete() is Ended.ENDED
        assert records.ended(job_id) == [("completed", 1)]

    def test_what_was_cancelled_stays_cancelled(
        self,
        library: Library,
        guard: JobGuard,
        records: Records,
        leader: Leader,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """The tombstone is written first, so neither a leader nor an old Redis brings the job back."""
        job_id = library.send()
        (owed,) = records.owed()
        before = dump(library.client)
        seen: list[list[str]] = []
        cancel = HostTracker.cancel

        def watched(self: HostTracker, **what: Any) -> None:
            cancel(self, **what)
            seen.append([*library.waiting(), *(outcome for outcome, _ in records.ended(job_id))])

        monkeypatch.setattr(HostTracker, "cancel", watched)
        library.cancel(job_id)
        assert seen == [[job_id, "cancelled"]]
        assert records.owed() == []

        load(library.client, before)
        library.work()
        assert library.said() == []
        in_reach = (Presence.WAITING, Presence.SCHEDULED, Presence.RUNNING)
        assert leader.observe(owed).presence not in in_reach
        assert records.ended(job_id) == [("cancelled", 1)]


class TestDeath:
    """If a worker is killed, its jobs are not lost."""

    def test_its_job_comes_back_and_the_next_run_gets_its_lock(
        self, library: Library, guard: JobGuard, records: Records, database: str
    ) -> None:
        """Another worker completes the job: the run gets the lock of the first one, and knows of it."""
        env = environ(database, library.redis_url)
        first = library.start_worker(env)
        try:
            eventually(lambda: guard.reconcile() and records.trusted(), 30)
            job_id = library.send("hold")
            first.wait(120)
            eventually(lambda: guard.reconcile() and library.waiting() == [job_id], 30)
        finally:
            end(first)
        Path(f"{library.ledger}.cured").touch()
        second = library.start_worker(env)
        try:
            completed = [("completed", 1)]
            eventually(lambda: guard.reconcile() and records.ended(job_id) == completed, 30)
        finally:
            end(second)
        known = ["True,False,0,False", "ran", "True,True,1,True", "ran"]
        assert library.said() == known
        assert records.owed() == []
        assert library.waiting() == []

    def test_its_job_is_dead_when_the_crash_budget_is_spent(
        self, library: Library, guard: JobGuard, records: Records, database: str
    ) -> None:
        """After one recovery the job kills another worker, and is dead and kept for a person."""
        env = environ(database, library.redis_url)
        first = library.start_worker(env)
        try:
            eventually(lambda: guard.reconcile() and records.trusted(), 30)
            job_id = library.send("die")
            first.wait(120)
            eventually(lambda: guard.reconcile() and library.waiting() == [job_id], 30)
        finally:
            end(first)
        second = library.start_worker(env)
        try:
            eventually(lambda: guard.reconcile() and library.said() == ["ran", "ran"], 30)
            second.wait(120)
            eventually(lambda: guard.reconcile() and records.owed() == [], 30)
            assert records.ended(job_id) == [("dead", 1)]
        finally:
            end(second)
        third = library.start_worker(env)  # may report the death; does not run it
        try:
            eventually(lambda: library.waiting() == [], 30)
            assert library.said() == ["ran", "ran"]
        finally:
            end(third)
        assert records.owed() == []

    @pytest.mark.timeout(600)
    def test_poison_takes_no_innocent_with_it(
        self, library: Library, guard: JobGuard, records: Records, database: str
    ) -> None:
        """Jobs that kill their process are dead in the end, and the jobs beside them complete."""
        env = environ(database, library.redis_url)
        worker = library.start_crowded_worker(env)
        try:
            eventually(lambda: guard.reconcile() and records.trusted(), 30)
            sent = {word: library.send("nap", word) for word in range(5)}
            poison = [library.send("die", "x")]
            sent |= {word: library.send("nap", word) for word in range(5, 10)}
            poison.append(library.send("die", "y"))
            sent |= {word: library.send("nap", word) for word in range(10, 12)}

            def over() -> bool:
                nonlocal worker
                if worker.poll() is not None:
                    worker = library.start_crowded_worker(env)
                return bool(guard.reconcile()) and records.owed() == []

            eventually(over, 120)
        finally:
            end(worker)
        assert {records.ended(job_id)[0][0] for job_id in sent.values()} == {"completed"}
        assert [records.ended(job_id)[0][0] for job_id in poison] == ["dead", "dead"]
        # At the first death it is unknown which job caused it.
        said = Counter(library.said())
        assert {said["x"], said["y"]} <= {2, 3}
        assert max(said[str(word)] for word in sent) <= 2


class TestInWorkerMemory:
    """A job that a worker keeps in its memory for later, when Redis loses all data."""

    @pytest.mark.parametrize("how", ["delayed", "retried"])
    def test_it_completes_once(
        self, library: Library, guard: JobGuard, records: Records, database: str, how: str
    ) -> None:
        """The job completes once, although the process may have the restored copy and the old one."""
        env = environ(database, library.redis_url)
        worker = library.start_scheduling_worker(env)
        try:
            eventually(lambda: guard.reconcile() and records.trusted(), 30)
            if how == "delayed":
                job_id = library.send(delay=6.0)
            else:
                job_id = library.send("fail", retries=1, retry_delay=6.0)
                eventually(lambda: library.said() == ["ran"], 30)
            # On a busy machine the delay may be over before the copy is seen.
            eventually(lambda: library.delayed_copies() == 1 or not records.owed(), 30)
            library.client.flushdb()
            eventually(
                lambda: guard.reconcile() and (library.delayed_copies() == 1 or not records.owed())
            )
            eventually(lambda: records.owed() == [], 60)
            last = "completed" if how == "delayed" else "failed"
            assert records.ended(job_id)[-1][0] == last
            # A second copy comes to its end too, and must not run.
            eventually(lambda: not library.waiting() and not library.delayed_copies(), 30)
        finally:
            kill_tree(worker.pid)  # RQ's scheduler outlives its worker
            worker.wait(10)
        assert library.said() == ["ran"] * (1 if how == "delayed" else 2)
        assert {outcome for outcome, _ in records.ended(job_id)} <= {last, "superseded"}


class TestStaleLeader:
    """A leader that was suspended between its inspection and its actions."""

    def test_it_changes_nothing_in_redis(
        self, library: Library, guard: JobGuard, records: Records, leader: Leader
    ) -> None:
        """After the deadline it changes neither a running job nor a dead one in Redis."""
        library.send()
        (given,) = records.owed()
        owed = newly_owed(given.token, job_id=given.job_id, queue=given.queue)
        if library.adapter.library == "dramatiq":  # a silent worker has fetched it
            library.client.zadd("dramatiq:__heartbeats__", {"silent": 1})
            library.client.sadd(f"dramatiq:__acks__.silent.{given.queue}", str(given.token))
        before = keyspace(library.client)
        leader.broker.abandon([owed], deadline=time.time() - 1)
        leader.broker.bury([owed], deadline=time.time() - 1)
        assert keyspace(library.client) == before
        leader.broker.abandon([owed], deadline=time.time() + 60)
        leader.broker.bury([owed], deadline=time.time() + 60)
        assert (keyspace(library.client) != before) == (library.adapter.library != "celery")


class TestHostSafety:
    """The host application is not affected by jobguard."""

    def test_an_unguarded_queue_is_left_alone(
        self, library: Library, database: str, records: Records
    ) -> None:
        """Jobs of an unguarded queue carry nothing of ours, are not recorded, and run."""
        bare = library.body(library.send(queue=OTHER))
        with jobguard.guard(library.target("guarded"), postgres=database, **BRISK):
            job_id = library.send(queue=OTHER)
            body = library.body(job_id)
            assert isinstance(body, dict) and isinstance(bare, dict)
            assert body.keys() == bare.keys()
            assert library.token(job_id) is None
            library.work(OTHER)
            assert library.token(job_id) is None
        assert library.said() == ["ran", "ran"]
        assert (records.owed(), records.ended(job_id)) == ([], [])

    def test_a_test_double_is_inert_and_nothing_is_connected_to(
        self, library: Library, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A test double opens no connection, so the host's tests need neither PostgreSQL nor Redis."""
        doubles = library.doubles()
        reached: list[object] = []
        monkeypatch.setattr(socket.socket, "connect", lambda _, address: reached.append(address))
        for name, double in doubles.items():
            with jobguard.guard(double, postgres=UNREACHABLE, connect="require") as guard:
                assert guard.inert, name
                assert guard.stats().total == 0
        assert reached == []

    @pytest.mark.parametrize(
        ("owner", "method"),
        [
            *((HostTracker, name) for name in methods(Tracker)),
            *((WorkerSession, name) for name in methods(Session)),
        ],
        ids=lambda value: value if isinstance(value, str) else value.__name__,
    )
    def test_the_host_never_sees_an_error_of_ours(
        self,
        library: Library,
        guard: JobGuard,
        monkeypatch: pytest.MonkeyPatch,
        owner: type,
        method: str,
    ) -> None:
        """If one of our methods raises, jobs are still sent, cancelled, moved, run and retried."""

        def broken(*_: object, **__: object) -> None:
            raise RuntimeError("an error of jobguard")

        with monkeypatch.context() as patch:
            patch.setattr(owner, method, broken)
            library.send("say", "said")
            library.send("fail", "failed", retries=1)
            library.send("say", "delayed", delay=HOUR)
            library.cancel(library.send("say", "cancelled", queue=OTHER))
            library.work()
            library.move_delayed()
            library.work()
        assert sorted(library.said()) == ["delayed", "failed", "failed", "said"]
        assert library.waiting() == []

    def test_taking_the_guard_away_leaves_the_library_as_it_was(
        self, library: Library, database: str, records: Records
    ) -> None:
        """After the removal every entry is the original one, and a new job carries nothing of ours."""
        with library.bare():
            before = library.hooks()
            with jobguard.guard(library.target(), postgres=database):
                assert library.hooks() != before
            assert library.hooks() == before
            job_id = library.send()
        assert library.token(job_id) is None
        assert records.owed() == []

    def test_a_broker_imports_no_user_code_and_unpickles_nothing(
        self, library: Library, guard: JobGuard, records: Records, source: Source
    ) -> None:
        """A broker inspects and restores with only jobguard, Redis and bytes."""
        job_id = library.send("say", Path("an object to unpickle"))
        (owed,) = records.owed()
        library.client.flushdb()
        reported = {
            "url": library.redis_url,
            "adapter": [type(library.adapter).__module__, type(library.adapter).__qualname__],
            "source": {k: v for k, v in asdict(source).items() if k != "id"},
            "owed": [owed.token.hex, owed.job_id, owed.queue, owed.envelope.hex()],
        }
        done = subprocess.run(
            [sys.executable, "-c", RECONCILER],
            input=json.dumps(reported),
            capture_output=True,
            text=True,
            cwd=ROOT,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        assert library.waiting() == [job_id]


RECONCILER = """
import importlib, json, pickle, sys, time
from uuid import UUID

import redis
from jobguard.adapter import Source
from jobguard.model import Owed, Presence, Restorable, Restored

def audit(event, args):
    if event == "pickle.find_class" or event == "import" and args[0].startswith("tests"):
        sys.exit(f"{event} {args}")

def never(*_, **__):
    sys.exit("an object is unpickled")

sys.addaudithook(audit)
pickle.load = pickle.loads = pickle.Unpickler = never
given = json.load(sys.stdin)
module, name = given["adapter"]
source = Source(**given["source"])
token, job_id, queue, envelope = given["owed"]
token = UUID(hex=token)
client = redis.Redis.from_url(given["url"])
broker = getattr(importlib.import_module(module), name)().broker(source, client)
page = [Owed(token, job_id, queue, "", 0.0, 0.0, False, 0, 0, 0, 0.0)]
lost = Restorable(token, job_id, queue, bytes.fromhex(envelope), None, None)
assert broker.presence(page)[token].presence is Presence.ABSENT
assert broker.restore([lost], deadline=time.time() + 60) == {token: Restored.RESTORED}
assert broker.presence(page)[token].presence is Presence.WAITING
broker.consumers()
broker.abandon(page, deadline=time.time() + 60)
"""


def without_tags(jobs: dict[str, Any]) -> dict[str, Any]:
    """Return these without the tags that Celery draws anew at every push."""
    tag = re.compile(rb'("delivery_tag": ")[^"]*')
    return {
        key: [tag.sub(rb"\1", one) for one in value] if isinstance(value, list) else value
        for key, value in jobs.items()
    }


def dump(client: redis.Redis) -> dict[bytes, tuple[int, bytes]]:
    """Return all keys of Redis with their times to live."""
    asked: Any = client
    return {key: (max(asked.pttl(key), 0), asked.dump(key)) for key in asked.scan_iter()}


def load(client: redis.Redis, dumped: dict[bytes, tuple[int, bytes]]) -> None:
    """Set Redis back to that moment."""
    client.flushdb()
    for key, (ttl, value) in dumped.items():
        client.restore(key, ttl, value)
