"""Redis loses all or some data of a running application, and a leader restores the owed messages."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import psycopg
import pytest

import jobguard
from jobguard.adapters.dramatiq.joins import Barriers
from jobguard.adapters.dramatiq.run import Run
from jobguard.guard import JobGuard
from jobguard.host.tracker import HostTracker
from jobguard.model import Presence, Restored
from tests.conformance.words import BRISK, Leader, Records
from tests.integration.dramatiq.stage import KEYS, Stage, open_joins
from tests.support import eventually

HOUR = 3_600_000


class TestParts:
    """A part of the data is lost, or is where no worker would find it."""

    @pytest.fixture(autouse=True)
    def sent(self, stage: Stage, guard: JobGuard) -> list[str]:
        """Send some messages, in order."""
        return [stage.actor("say").send(word).options["redis_message_id"] for word in range(30)]

    def restore(self, records: Records, leader: Leader) -> list[Restored]:
        """Restore the absent messages, and check that a second restore changes nothing."""
        lost = [d for d in records.owed() if leader.observe(d).presence is Presence.ABSENT]
        done = leader.restore(*lost)
        assert set(leader.restore(*lost)) <= {Restored.PRESENT}
        return done

    def test_some_messages(
        self, stage: Stage, records: Records, leader: Leader, sent: list[str]
    ) -> None:
        """Lost messages are restored together with their entries in the list."""
        for rid in sent[::3]:
            stage.client.hdel(f"{KEYS}.msgs", rid)
            stage.client.lrem(KEYS, 0, rid)
        assert self.restore(records, leader) == [Restored.RESTORED] * 10
        stage.work()
        assert sorted(map(int, stage.said())) == list(range(30))

    @pytest.mark.parametrize("evicted", [KEYS, f"{KEYS}.msgs"])
    def test_an_evicted_key(
        self, stage: Stage, records: Records, leader: Leader, sent: list[str], evicted: str
    ) -> None:
        """If the list or its messages are evicted, all are restored."""
        stage.client.delete(evicted)
        assert self.restore(records, leader) == [Restored.RESTORED] * 30
        assert [raw.decode() for raw in stage.client.lrange(KEYS, 0, -1)] == sent
        assert stage.client.hlen(f"{KEYS}.msgs") == 30
        stage.work()
        assert sorted(map(int, stage.said())) == list(range(30))

    def test_what_a_dead_worker_had_fetched(
        self, stage: Stage, records: Records, leader: Leader, sent: list[str]
    ) -> None:
        """A restore takes messages only from the dead worker, and not from a live one."""
        dead, live = "0" * 32, "d00dfeed-0000-4000-8000-000000000000"
        of_the_dead = "00000000-0000-0000-0000-000000000000"
        for worker, rids in ((of_the_dead, sent[:10]), (live, sent[10:20])):
            stage.client.zadd("dramatiq:__heartbeats__", {worker: 1})
            stage.client.sadd(f"dramatiq:__acks__.{worker}.default", *rids)
            for rid in rids:
                stage.client.lrem(KEYS, 0, rid)
        owed = [replace(d, taken_by=dead) for d in records.owed()]
        answers = leader.restore(*owed)
        assert answers == [Restored.RESTORED] * 10 + [Restored.PRESENT] * 20
        assert not stage.client.exists(f"dramatiq:__acks__.{of_the_dead}.default")
        assert stage.client.scard(f"dramatiq:__acks__.{live}.default") == 10
        assert stage.client.llen(KEYS) == 20

    def test_a_dead_letter_is_no_loss(
        self, stage: Stage, records: Records, leader: Leader, sent: list[str]
    ) -> None:
        """A dead letter counts as failed and is not restored."""
        body = stage.client.hget(f"{KEYS}.msgs", sent[0])
        stage.client.hdel(f"{KEYS}.msgs", sent[0])
        stage.client.lrem(KEYS, 0, sent[0])
        stage.client.hset(f"{KEYS}.XQ.msgs", sent[0], body)
        (owed, *_) = records.owed()
        assert leader.observe(owed).presence is Presence.FAILED
        assert leader.restore(owed) == [Restored.PRESENT]

    def test_a_dead_letter_is_that_of_its_own_message(
        self, stage: Stage, records: Records, leader: Leader, guard: JobGuard, database: str
    ) -> None:
        """A dead letter does not end another delivery of the same message."""
        twin = stage.message("say", "twin")
        rids = [stage.broker.enqueue(twin).options["redis_message_id"] for _ in range(2)]
        body = stage.client.hget(f"{KEYS}.msgs", rids[0])
        stage.client.hdel(f"{KEYS}.msgs", rids[0])
        stage.client.lrem(KEYS, 0, rids[0])
        stage.client.hset(f"{KEYS}.XQ.msgs", rids[0], body)
        with psycopg.connect(database) as connection:
            connection.execute("update jobguard.queues set trusted_since = '-infinity'")

        eventually(lambda: guard.reconcile() and records.ended(twin.message_id))
        assert [outcome for outcome, _ in records.ended(twin.message_id)] == ["failed"]
        assert rids[1] in {str(owed.token) for owed in records.owed()}


class TestFlush:
    """FLUSHDB while a worker runs, with an active leader."""

    @pytest.fixture(autouse=True)
    def led(self, stage: Stage, guard: JobGuard, reconciler: Any) -> Any:
        """Wait until the queue is trusted."""
        with stage.worker():
            reconciler()

    def done(self, stage: Stage, records: Records, *words: str) -> None:
        """Wait until all jobs are done, and check that each word was written once."""
        eventually(lambda: len(stage.said()) >= len(words), 30)
        eventually(lambda: records.owed() == [], 30)
        assert sorted(stage.said()) == sorted(words)

    def test_waiting_and_delayed(self, stage: Stage, records: Records) -> None:
        """Waiting and delayed messages are restored to their queues."""
        for word in "abc":
            stage.actor("say").send(word)
        stage.actor("say").send_with_options(args=("d",), delay=4000)
        stage.client.flushdb()
        with stage.worker():
            self.done(stage, records, *"abcd")

    def test_delayed_in_a_workers_memory(self, stage: Stage, records: Records) -> None:
        """A delayed message in a worker's memory runs once, although it is restored in the meantime."""
        with stage.worker() as worker:
            stage.actor("say").send_with_options(args=("a",), delay=3000)
            delayed: Any = worker.consumers["default.DQ"]
            eventually(lambda: delayed.delay_queue.qsize() == 1)
            stage.client.flushdb()
            self.done(stage, records, "a")

    @pytest.mark.parametrize("retries", [False, True])
    def test_delayed_twice_in_a_workers_memory(
        self, stage: Stage, records: Records, retries: bool
    ) -> None:
        """A message that the process has twice in its memory runs once."""
        with stage.worker() as worker:
            if retries:
                backoff = {"min_backoff": 9000, "max_backoff": 9000}
                stage.actor("flaky").send_with_options(args=("a",), max_retries=1, **backoff)
            else:
                stage.actor("say").send_with_options(args=("a",), delay=6000)
            delayed: Any = worker.consumers["default.DQ"]
            eventually(lambda: delayed.delay_queue.qsize() == 1)
            stage.client.flushdb()
            # On a busy machine the first copy may be due, and end, before the second one comes.
            eventually(lambda: delayed.delay_queue.qsize() == 2 or len(stage.said()) == 1 + retries)
            self.done(stage, records, *("aa" if retries else "a"))
            eventually(stage.is_idle)
        assert len(stage.said()) == 1 + retries

    def test_fetched_by_a_worker_that_then_stops(self, stage: Stage, records: Records) -> None:
        """A message that a stopping worker had fetched is restored, although Redis no longer knows it."""
        stage.actor("wait").send("a")
        with stage.worker():
            eventually(lambda: stage.said() == ["a:begun"])
            stage.actor("wait").send("b")
            eventually(lambda: not stage.client.exists(KEYS))
            stage.client.flushdb()
            threading.Timer(0.3, stage.gate("a").touch).start()  # when the worker has begun to stop
        assert stage.said() == ["a:begun", "a"]
        stage.gate("b").touch()
        with stage.worker():
            self.done(stage, records, "a:begun", "a", "b:begun", "b")

    def test_a_retry_that_waits(self, stage: Stage, records: Records) -> None:
        """A lost retry is restored with its number of tries."""
        stage.actor("flaky").send_with_options(
            args=("a",), max_retries=1, min_backoff=1500, max_backoff=1500
        )
        with stage.worker():
            eventually(lambda: stage.said() == ["a"])
            eventually(lambda: stage.client.exists(f"{KEYS}.DQ.msgs"))
        stage.client.flushdb()
        with stage.worker():
            self.done(stage, records, "a", "a")

    def test_a_pipeline_between_two_steps(self, stage: Stage, records: Records) -> None:
        """A lost pipeline continues with the result of its last step."""
        steps = [stage.message("echo", "a"), stage.message("wait"), stage.message("say", "z")]
        steps[2] = steps[2].copy(options={"pipe_ignore": True})
        stage.pipeline(steps).run()
        with stage.worker():
            eventually(lambda: "a:begun" in stage.said())
            stage.client.flushdb()
            stage.gate("a").touch()
            self.done(stage, records, "a", "a:begun", "a", "z")

    def test_a_group_of_which_some_have_completed(
        self, stage: Stage, records: Records, database: str
    ) -> None:
        """A group sends its callback once, when the last member has completed."""
        members = [stage.message("say", w) for w in "abc"] + [stage.message("wait", "d")]
        several = stage.group(members)
        several.add_completion_callback(stage.message("say", "all"))
        several.run()
        with stage.worker(worker_threads=2):
            eventually(lambda: {"a", "b", "c", "d:begun"} <= set(stage.said()))
            eventually(lambda: len(records.owed()) == 1)
            stage.actor("say").send("last")  # something to restore, and the barrier with it
            stage.client.flushdb()
            stage.gate("d").touch()
            self.done(stage, records, *"abc", "d:begun", "d", "all", "last")
        assert open_joins(database) == 0

    @pytest.mark.parametrize("lost", ["before", "after"])
    def test_a_member_that_ends_around_the_loss(
        self,
        stage: Stage,
        records: Records,
        database: str,
        monkeypatch: pytest.MonkeyPatch,
        lost: str,
    ) -> None:
        """A member counts once, whether it ends just before or just after the loss."""
        reached, go = threading.Event(), threading.Event()
        end = HostTracker.end

        def late(self: HostTracker, ends: Any) -> Any:
            if any(e.part for e in ends) and not go.is_set():
                reached.set()
                go.wait(20)
            return end(self, ends)

        monkeypatch.setattr(HostTracker, "end", late)
        members = [
            stage.message("say", "a"),
            stage.message("wait", "b"),
            stage.message("wait", "c"),
        ]
        several = stage.group(members)
        several.add_completion_callback(stage.message("say", "all"))
        several.run()
        with stage.worker(worker_threads=3):
            eventually(lambda: {"b:begun", "c:begun"} <= set(stage.said()))
            eventually(reached.is_set)
            stage.client.flushdb()
            if lost == "after":
                stage.gate("b").touch()
                eventually(lambda: "b" in stage.said())
            stage.actor("say").send("last")
            eventually(lambda: "last" in stage.said(), 20)
            go.set()
            stage.gate("b").touch()
            stage.gate("c").touch()
            words = ("a", "b:begun", "b", "c:begun", "c", "all", "last")
            self.done(stage, records, *words)
        assert open_joins(database) == 0
        assert stage.said()[-1] == "all"  # not before the last member

    def test_a_callback_that_was_never_sent(
        self, stage: Stage, records: Records, database: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """If all members ended and no callback was sent, a leader has a worker send it."""
        lose_callbacks(stage, records, monkeypatch)
        with stage.worker():
            self.done(stage, records, "a", "b", "all", "too")
        assert open_joins(database) == 0

    @pytest.mark.parametrize("away", [False, True], ids=["there", "postgres-away"])
    def test_the_same_in_observe_mode(
        self,
        stage: Stage,
        guard: JobGuard,
        records: Records,
        database: str,
        monkeypatch: pytest.MonkeyPatch,
        away: bool,
    ) -> None:
        """Also in observe mode, a member that is pushed again to be counted does not run."""
        guard.close()
        if away:
            monkeypatch.setattr(HostTracker, "tombstones", lambda *_: None)
        with jobguard.guard(stage.broker, postgres=database, mode="observe", **BRISK):
            lose_callbacks(stage, records, monkeypatch)
            with stage.worker():
                self.done(stage, records, "a", "b", "all", "too")
        assert open_joins(database) == 0


def lose_callbacks(stage: Stage, records: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a group whose members all end without a notice that the last one completed."""
    several = stage.group([stage.message("say", w) for w in "ab"])
    several.add_completion_callback(stage.message("say", "all"))
    several.add_completion_callback(stage.message("say", "too"))
    several.run()
    stage.client.flushdb()
    with monkeypatch.context() as patch:
        patch.setattr(Barriers, "decr", lambda *_: True)
        with stage.worker():
            eventually(lambda: {"a", "b"} <= set(stage.said()), 20)
            eventually(lambda: len(records.owed()) == 0)


class TestRerun:
    """A member runs again after it was counted, because its end was never reported."""

    def test_it_is_counted_once(self, stage: Stage, database: str, records: Records) -> None:
        """A member that runs twice is counted once, so that the callback is not sent too early."""
        with jobguard.guard(stage.broker, postgres=database, **BRISK):
            members = [stage.message("say", "a"), stage.message("wait", "b")]
            several = stage.group(members)
            several.add_completion_callback(stage.message("say", "all"))
            several.run()
            ended = threading.Event()

            def killed(self: Run, *, failed: bool) -> None:
                if self.task == "say" and not ended.is_set():
                    ended.set()
                    self.leave()
                    self.session.release(self.claim)  # as if its worker had died here
                    stage.client.rpush(KEYS, str(self.token))
                    self.reported = True
                    return
                original(self, failed=failed)

            original = Run.end
            Run.end = killed  # type: ignore[method-assign]
            try:
                rid = stage.client.lindex(KEYS, 0)
                body = stage.client.hget(f"{KEYS}.msgs", rid)
                with stage.worker(worker_threads=2):
                    eventually(ended.is_set)
                    eventually(lambda: not stage.client.hexists(f"{KEYS}.msgs", rid))
                    stage.client.delete(KEYS)
                    stage.client.hset(f"{KEYS}.msgs", rid, body)
                    stage.client.rpush(KEYS, rid)
                    eventually(lambda: stage.said().count("a") == 2)
                    eventually(lambda: len(records.owed()) == 1)
                    assert "all" not in stage.said()
                    stage.gate("b").touch()
                    eventually(lambda: "all" in stage.said())
            finally:
                Run.end = original  # type: ignore[method-assign]
