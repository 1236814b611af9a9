"""The worker: starts, ends and skips of fetched messages, and messages that it lost from its memory."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from typing import Any
from uuid import UUID, uuid4

import dramatiq
import psycopg
import pytest
import redis
from dramatiq.middleware import Middleware, SkipMessage
from dramatiq.results import ResultFailure

import jobguard
from jobguard import current
from jobguard.adapter import Source
from jobguard.adapters.dramatiq.layout import is_stranger
from jobguard.errors import StoreUnavailable
from jobguard.guard import JobGuard
from jobguard.host.session import WorkerSession
from jobguard.host.tracker import HostTracker
from jobguard.model import Presence
from tests.conformance.words import BRISK, Leader, Records, another_worker
from tests.integration.dramatiq.stage import KEYS, Stage, open_joins
from tests.integration.dramatiq.test_processes import workers
from tests.support import eventually

HOUR = 3_600_000


def outcomes(records: Records, message: Any) -> list[str]:
    """Return how each delivery of a message ended."""
    return [outcome for outcome, _ in records.ended(message.message_id)]


def rid_of(message: Any) -> str:
    """Return the id of a message in Redis."""
    return str(message.options["redis_message_id"])


class TestEnds:
    """Each run has one end, with the right outcome."""

    def test_a_pipeline(self, stage: Stage, guard: JobGuard, records: Records) -> None:
        """Each step of a pipeline is a job, and passes its result to the next one."""
        steps = [stage.message("echo", "a"), stage.message("echo"), stage.message("echo")]
        stage.pipeline(steps).run()
        stage.work()
        assert stage.said() == ["a", "a", "a"]
        assert [outcomes(records, step) for step in steps] == [["completed"]] * 3

    def test_a_group_and_what_waited_for_it(
        self, stage: Stage, guard: JobGuard, records: Records, database: str
    ) -> None:
        """Both callbacks of a group are sent once, after the last member."""
        several = stage.group([stage.message("flaky", w, max_retries=1) for w in "abcd"])
        callbacks = [stage.message("say", "all"), stage.message("say", "too")]
        for callback in callbacks:
            several.add_completion_callback(callback)
        several.run()
        stage.work(worker_threads=4)
        assert sorted(stage.said()) == sorted([*"aabbccdd", "all", "too"])
        assert [outcomes(records, callback) for callback in callbacks] == [["completed"]] * 2
        assert open_joins(database) == 0

    def test_a_group_with_a_message_twice(self, stage: Stage, guard: JobGuard) -> None:
        """A message that is in a group twice is counted twice, by Dramatiq itself."""
        twin = stage.message("say", "a")
        several = stage.group([twin, twin])
        several.add_completion_callback(stage.message("say", "all"))
        several.run()
        stage.work()
        assert stage.said() == ["a", "a", "all"]

    def test_an_asyncio_actor(self, stage: Stage, guard: JobGuard, records: Records) -> None:
        """A message that an asyncio actor sends is known as a message of that run."""
        sent = stage.actor("later").send("a")
        stage.work()
        assert stage.said() == ["a", "a:sent"]
        assert outcomes(records, sent) == ["completed"]

    def test_a_time_limit(self, stage: Stage, guard: JobGuard, records: Records) -> None:
        """A time limit interrupts the actor, and the run has failed."""
        stage.broker.emit_after("process_boot")  # starts the timer thread, as the command does
        sent = stage.actor("wait").send_with_options(args=("a",), time_limit=50)
        stage.work()
        assert outcomes(records, sent) == ["failed"]

    def test_what_grew_too_old_is_cancelled(
        self, stage: Stage, guard: JobGuard, records: Records
    ) -> None:
        """A message that is too old is cancelled, and is a dead letter too."""
        sent = stage.actor("say").send_with_options(args=("a",), max_age=1)
        stage.work()
        assert stage.said() == []
        assert outcomes(records, sent) == ["cancelled"]
        assert stage.client.hexists(f"{KEYS}.XQ.msgs", rid_of(sent))

    @pytest.mark.parametrize("who", ["the actor", "another middleware"])
    def test_what_is_skipped_is_cancelled(
        self, stage: Stage, guard: JobGuard, records: Records, who: str
    ) -> None:
        """A message that the actor or other middleware skips is cancelled."""

        class Skipper(Middleware):
            def before_process_message(self, broker: Any, message: Any) -> None:
                if who != "the actor":
                    raise SkipMessage("not today")

        def skip() -> None:
            raise SkipMessage("not today")

        stage.broker.add_middleware(Skipper())
        declare: Any = dramatiq.actor
        sent = declare(skip, broker=stage.broker).send()
        stage.work()
        assert outcomes(records, sent) == ["cancelled"]
        assert (records.owed(), records.claims()) == ([], [])

    def test_without_retries_a_failure_is_one(
        self, stage: Stage, guard: JobGuard, records: Records
    ) -> None:
        """Without the Retries middleware a failure is recorded, although Dramatiq acknowledges it."""
        stage.broker.middleware = [
            m for m in stage.broker.middleware if type(m).__name__ != "Retries"
        ]
        sent = stage.actor("fail").send("a")
        stage.work()
        assert outcomes(records, sent) == ["failed"]

    def test_a_job_knows_itself(self, stage: Stage, guard: JobGuard) -> None:
        """A running job knows its id and attempt, and nothing after its end."""
        seen: list[Any] = []

        def observe() -> None:
            seen.append((current().id, current().attempt, current().progress(0.5)))

        declare: Any = dramatiq.actor
        sent = declare(observe, broker=stage.broker).send()
        stage.work()
        assert seen == [(sent.message_id, 1, True)]
        assert not current()

    def test_what_a_message_sends_of_itself_is_a_job_of_its_own(
        self, stage: Stage, guard: JobGuard, records: Records
    ) -> None:
        """A copy that a message sends of itself is a new job and not a retry."""
        seen: list[int] = []

        def again(left: int) -> None:
            seen.append(left)
            if left:
                message = dramatiq.middleware.CurrentMessage.get_current_message()
                stage.broker.enqueue(message.copy(args=(left - 1,)))  # type: ignore[union-attr]

        stage.broker.add_middleware(dramatiq.middleware.CurrentMessage())
        declare: Any = dramatiq.actor
        sent = declare(again, broker=stage.broker).send(2)
        stage.work()
        assert seen == [2, 1, 0]
        assert outcomes(records, sent) == ["completed"] * 3

    def test_an_end_is_reported_when_all_that_follows_is_sent(
        self, stage: Stage, guard: JobGuard, records: Records, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The next step is recorded before the end; else a kill between them loses the pipeline."""
        order: list[str] = []
        end, record = WorkerSession.end, HostTracker.record

        def ended(self: WorkerSession, *args: Any, **kwargs: Any) -> None:
            order.append(f"end {kwargs['task']}")
            end(self, *args, **kwargs)

        def recorded(self: HostTracker, deliveries: Any, **kwargs: Any) -> Any:
            order.extend(f"record {delivery.task}" for delivery in deliveries)
            return record(self, deliveries, **kwargs)

        monkeypatch.setattr(WorkerSession, "end", ended)
        monkeypatch.setattr(HostTracker, "record", recorded)
        steps = [stage.message("echo", "a"), stage.message("say")]
        stage.pipeline(steps).run()
        stage.work()
        assert order == ["record echo", "record say", "end echo", "end say"]

    def test_a_message_that_is_sent_again_is_another_job(
        self, stage: Stage, guard: JobGuard, records: Records
    ) -> None:
        """A message that a worker of this process holds is sent again: it runs as often as it was sent."""
        with stage.worker():
            stage.actor("wait").send("first")
            eventually(lambda: stage.said() == ["first:begun"])
            message = stage.actor("say").send("again")
            eventually(lambda: not stage.client.exists(KEYS))  # in the memory of the worker
            stage.broker.enqueue(message)
            stage.broker.enqueue(message)
            stage.gate("first").touch()
            eventually(stage.is_idle)
        assert stage.said().count("again") == 3
        assert outcomes(records, message) == ["completed"] * 3


class TestSkip:
    """A message that has ended, or that runs elsewhere, does not run, and nothing is lost."""

    def test_the_result_of_the_run_is_kept(
        self, stage: Stage, guard: JobGuard, records: Records
    ) -> None:
        """The result of the run stays, and the Results middleware does not replace it with None."""
        sent = stage.actor("add").send(20, 22)
        body = stage.client.hget(f"{KEYS}.msgs", rid_of(sent))
        stage.work()
        stage.client.hset(f"{KEYS}.msgs", rid_of(sent), body)
        stage.client.rpush(KEYS, rid_of(sent))
        stage.work()
        assert stage.said() == ["add"]
        assert sent.get_result() == 42

    def test_the_failure_of_the_run_is_kept(
        self, stage: Stage, guard: JobGuard, records: Records
    ) -> None:
        """The stored failure of the run stays, and the message is a dead letter again."""
        sent = stage.actor("add").send("a", 1)
        body = stage.client.hget(f"{KEYS}.msgs", rid_of(sent))
        stage.work()
        with pytest.raises(ResultFailure, match="TypeError"):
            sent.get_result()
        stage.client.delete(f"{KEYS}.XQ", f"{KEYS}.XQ.msgs")
        stage.client.hset(f"{KEYS}.msgs", rid_of(sent), body)
        stage.client.rpush(KEYS, rid_of(sent))
        stage.work()
        with pytest.raises(ResultFailure, match="TypeError"):
            sent.get_result()
        assert stage.client.hexists(f"{KEYS}.XQ.msgs", rid_of(sent))

    def test_dramatiq_gives_a_moved_message_to_another_worker(
        self, stage: Stage, guard: JobGuard, records: Records
    ) -> None:
        """A message that was moved and not acknowledged is moved only once."""
        sent = stage.actor("say").send_with_options(args=("a",), delay=1)
        body = stage.client.hget(f"{KEYS}.DQ.msgs", rid_of(sent))
        stage.work()
        stage.client.hset(f"{KEYS}.DQ.msgs", rid_of(sent), body)
        stage.client.rpush(f"{KEYS}.DQ", rid_of(sent))
        stage.work()
        assert stage.said() == ["a"]
        assert outcomes(records, sent) == ["superseded", "completed"]

    def test_dramatiq_gives_a_running_message_to_another_worker(
        self, stage: Stage, guard: JobGuard, records: Records
    ) -> None:
        """A second copy of a running message is skipped: the run goes on, and no key of the copy stays."""
        sent = stage.actor("wait").send("a")
        with stage.worker(worker_threads=2):
            eventually(lambda: stage.said() == ["a:begun"])
            acks = f"dramatiq:__acks__.{stage.broker.broker_id}.default"
            # This is what the maintenance of Dramatiq does.
            stage.client.delete(acks)
            stage.client.rpush(KEYS, rid_of(sent))
            eventually(lambda: not stage.client.exists(KEYS) and not stage.client.exists(acks))
            assert stage.client.hexists(f"{KEYS}.msgs", rid_of(sent))
            assert len(records.claims()) == 1
            stage.gate("a").touch()
            eventually(stage.is_idle)
        assert stage.said() == ["a:begun", "a"]
        assert outcomes(records, sent) == ["completed"]

    def test_a_run_that_ends_while_its_copy_is_skipped_leaves_nothing_behind(
        self, stage: Stage, guard: JobGuard, records: Records, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """If a run ends while its copy is skipped, no message remains in Redis."""
        end, go = HostTracker.end, threading.Event()

        def late(self: HostTracker, ends: Any) -> Any:
            go.wait(20)
            return end(self, ends)

        monkeypatch.setattr(HostTracker, "end", late)
        sent = stage.actor("say").send("a")
        body = stage.client.hget(f"{KEYS}.msgs", rid_of(sent))
        with stage.worker():
            eventually(stage.is_idle)
            stage.client.hset(f"{KEYS}.msgs", rid_of(sent), body)
            stage.client.rpush(KEYS, rid_of(sent))
            eventually(lambda: not stage.client.exists(KEYS))
            eventually(lambda: not stage.client.keys("dramatiq:__acks__*"))
            assert stage.client.hlen(f"{KEYS}.msgs") == 1
            go.set()
            eventually(stage.is_idle)
        assert stage.said() == ["a"]

    def test_what_another_worker_runs_keeps_its_message(
        self,
        stage: Stage,
        guard: JobGuard,
        records: Records,
        leader: Leader,
        source: Source,
        database: str,
    ) -> None:
        """A message that another worker runs stays in Redis, for a restore if that worker dies."""
        sent = stage.actor("say").send("a")
        (owed,) = records.owed()
        with another_worker(database, source, owed), stage.worker():
            eventually(lambda: not stage.client.exists(KEYS))
            eventually(lambda: not stage.client.keys("dramatiq:__acks__*"))
            assert stage.client.hexists(f"{KEYS}.msgs", rid_of(sent))
            assert leader.observe(owed).mark == "stranded"
        leader.restore(owed)
        assert leader.observe(owed).presence is Presence.WAITING


class TestUnfit:
    """Messages that this worker cannot start."""

    def test_without_a_leader_an_unknown_actor_is_a_dead_letter(
        self, stage: Stage, guard: JobGuard, records: Records
    ) -> None:
        """Without a leader, a message with an unknown actor is a dead letter."""
        message = stage.message("say", "a").copy()
        sent = stage.broker.enqueue(dramatiq.Message(**{**message.asdict(), "actor_name": "gone"}))
        stage.work()
        assert outcomes(records, sent) == ["failed"]
        assert stage.client.hexists(f"{KEYS}.XQ.msgs", rid_of(sent))

    def test_with_one_it_goes_back_later(
        self, stage: Stage, guard: JobGuard, records: Records, reconciler: Any
    ) -> None:
        """With a leader, a message with an unknown actor is restored later, for a worker that knows it."""
        with stage.worker():
            reconciler()
            message = stage.message("say", "a")
            sent = stage.broker.enqueue(
                dramatiq.Message(**{**message.asdict(), "actor_name": "new"})
            )
            eventually(stage.is_idle)
            assert len(records.owed()) == 1
            assert not stage.client.exists(f"{KEYS}.XQ")
            declare: Any = dramatiq.actor
            declare(stage.say, broker=stage.broker, actor_name="new")
            eventually(lambda: stage.said() == ["a"], 20)
            eventually(lambda: outcomes(records, sent) == ["completed"])

    def test_poison_takes_nothing_along(
        self, stage: Stage, guard: JobGuard, records: Records
    ) -> None:
        """A message that cannot be decoded stays where Dramatiq leaves it, and the others run."""
        poison = str(uuid4())
        stage.client.hset(f"{KEYS}.msgs", poison, b"no message")
        stage.client.rpush(KEYS, poison)
        for word in range(4):
            stage.actor("say").send(word)
        with stage.worker(worker_threads=4):
            eventually(lambda: sorted(stage.said()) == ["0", "1", "2", "3"])
            eventually(lambda: stage.client.hkeys(f"{KEYS}.msgs") == [poison.encode()])
            acks = f"dramatiq:__acks__.{stage.broker.broker_id}.default"
            assert stage.client.smembers(acks) == {poison.encode()}

    def test_what_is_recorded_and_cannot_be_decoded_goes_back_later(
        self, stage: Stage, guard: JobGuard, records: Records, reconciler: Any
    ) -> None:
        """A recorded message that cannot be decoded is restored later from the ledger."""
        with stage.worker() as worker:
            reconciler()
            worker.pause()
            sent = stage.actor("say").send("a")
            stage.client.hset(f"{KEYS}.msgs", rid_of(sent), b"no message")
            worker.resume()
            eventually(lambda: stage.said() == ["a"], 20)  # the ledger has its true bytes
            eventually(lambda: outcomes(records, sent) == ["completed"])


class TestForgotten:
    """Messages that a live worker has lost from its memory."""

    def test_a_fetch_whose_answer_was_lost(
        self, stage: Stage, guard: JobGuard, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A fetch whose answer was lost is requeued."""
        monkeypatch.setattr("dramatiq.worker.CONSUMER_RESTART_DELAY_SECS", 0.05)
        fetch = stage.broker.do_fetch
        lost = threading.Event()

        def once(queue: str, *args: Any) -> Any:
            answer = fetch(queue, *args)
            if answer and not lost.is_set():
                lost.set()
                raise redis.ConnectionError("the answer was lost")
            return answer

        monkeypatch.setattr(stage.broker, "do_fetch", once, raising=False)
        for word in "abc":
            stage.actor("say").send(word)
        with stage.worker():
            eventually(lambda: sorted(stage.said()) == ["a", "b", "c"])

    def test_what_was_delayed_in_memory_when_the_connection_broke(
        self, stage: Stage, guard: JobGuard, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Delayed messages that Dramatiq drops at a broken connection are requeued."""
        monkeypatch.setattr("dramatiq.worker.CONSUMER_RESTART_DELAY_SECS", 0.05)
        stage.actor("say").send_with_options(args=("a",), delay=700)
        fetch, broken = stage.broker.do_fetch, threading.Event()
        breaks = threading.Event()

        def once(queue: str, *args: Any) -> Any:
            if queue.endswith(".DQ") and breaks.is_set() and not broken.is_set():
                broken.set()
                raise redis.ConnectionError("away")
            return fetch(queue, *args)

        monkeypatch.setattr(stage.broker, "do_fetch", once, raising=False)
        with stage.worker() as worker:
            delayed: Any = worker.consumers["default.DQ"]
            eventually(lambda: delayed.delay_queue.qsize() == 1)
            breaks.set()
            eventually(broken.is_set)
            eventually(lambda: stage.said() == ["a"])

    def test_the_thread_of_a_consumer_that_an_error_ended(
        self, stage: Stage, guard: JobGuard
    ) -> None:
        """The thread of a consumer is restarted after an error, and its messages are requeued."""
        with stage.worker() as worker:
            thread: Any = worker.consumers["default.DQ"]
            eventually(lambda: thread.consumer is not None)

            def die(*_: Any) -> None:
                raise SystemExit

            thread.handle_delayed_messages = die
            eventually(lambda: not thread.is_alive())
            stage.actor("say").send_with_options(args=("a",), delay=10)
            eventually(lambda: stage.said() == ["a"])

    def test_a_move_that_postgres_refuses_ends_no_consumer(
        self, stage: Stage, guard: JobGuard, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """If a record is refused during a move, the consumer continues and the message is requeued."""
        monkeypatch.setattr("dramatiq.worker.CONSUMER_RESTART_DELAY_SECS", 0.05)
        record, refused = HostTracker.record, threading.Event()

        def once(self: HostTracker, deliveries: Any, **kwargs: Any) -> Any:
            if deliveries[0].parent is not None and not refused.is_set():
                refused.set()
                raise StoreUnavailable
            return record(self, deliveries, **kwargs)

        monkeypatch.setattr(HostTracker, "record", once)
        stage.actor("say").send_with_options(args=("a",), delay=50)
        with stage.worker():
            eventually(refused.is_set)
            eventually(lambda: stage.said() == ["a"])

    def test_messages_in_memory_are_left_alone(self, stage: Stage, guard: JobGuard) -> None:
        """Fetched, delayed and running messages are not requeued."""
        stage.actor("wait").send("a")
        stage.actor("say").send_with_options(args=("c",), delay=HOUR)
        with stage.worker() as worker:
            eventually(lambda: stage.said() == ["a:begun"])
            stage.actor("say").send("b")
            eventually(lambda: not stage.client.exists(KEYS))
            delayed: Any = worker.consumers["default.DQ"]
            eventually(lambda: delayed.delay_queue.qsize() == 1)
            threading.Event().wait(0.5)  # several checks
            assert not stage.client.exists(KEYS, f"{KEYS}.DQ")
            stage.gate("a").touch()
            eventually(lambda: stage.said() == ["a:begun", "a", "b"])


class TestOutage:
    """Redis is away while jobs run, and no message that follows from them is lost."""

    @pytest.mark.parametrize("kind", ["retry", "pipeline", "callback"])
    def test_what_follows_is_accepted_and_pushed_later(
        self,
        stage: Stage,
        guard: JobGuard,
        records: Records,
        reconciler: Any,
        monkeypatch: pytest.MonkeyPatch,
        kind: str,
    ) -> None:
        """A retry, next step or callback is accepted and pushed later; Dramatiq ignores the error."""
        with stage.worker() as worker:
            reconciler()
            worker.pause()
            if kind == "retry":
                stage.actor("flaky").send_with_options(args=("a",), max_retries=1)
            elif kind == "pipeline":
                (stage.message("echo", "a") | stage.message("echo")).run()
            else:
                stage.actor("echo").send_with_options(args=("a",), on_success="say")
            lost = threading.Event()

            def away(*_: Any) -> None:
                lost.set()
                raise redis.ConnectionError("away")

            with monkeypatch.context() as patch:
                patch.setattr("jobguard.adapters.dramatiq.push.MessagePush.reach", away)
                worker.resume()
                eventually(lost.is_set)
            eventually(lambda: len(stage.said()) >= 2, 20)
            eventually(lambda: records.owed() == [])

    def test_it_is_kept_without_a_leader_too(
        self,
        stage: Stage,
        guard: JobGuard,
        records: Records,
        database: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Without a leader a retry is kept too, and the next leader pushes it."""
        sent = stage.actor("flaky").send_with_options(args=("a",), max_retries=1)

        def away(*_: Any) -> None:
            raise redis.ConnectionError("away")

        with monkeypatch.context() as patch:
            patch.setattr("jobguard.adapters.dramatiq.push.MessagePush.reach", away)
            with stage.worker():
                eventually(lambda: outcomes(records, sent) == ["superseded"])
        (owed,) = records.owed()
        with psycopg.connect(database) as connection:
            outbox = connection.execute("select token from jobguard.outbox").fetchall()
        assert outbox == [(owed.token,)]

    def test_what_could_be_recorded_nowhere_is_sent_by_another_run(
        self,
        stage: Stage,
        guard: JobGuard,
        records: Records,
        reconciler: Any,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """If a next step could not be recorded, the job does not end, and runs again."""
        with stage.worker() as worker:
            reconciler()
            worker.pause()
            first = stage.message("echo", "a")
            stage.pipeline([first, stage.message("echo")]).run()
            record, refused = HostTracker.record, threading.Event()

            def once(self: HostTracker, deliveries: Any, **kwargs: Any) -> Any:
                if deliveries[0].derived and not refused.is_set():
                    refused.set()
                    raise StoreUnavailable
                return record(self, deliveries, **kwargs)

            monkeypatch.setattr(HostTracker, "record", once)
            worker.resume()
            eventually(lambda: stage.said() == ["a", "a", "a"], 20)
            eventually(lambda: records.owed() == [])
            assert outcomes(records, first) == ["completed"]


class TestName:
    """The name of a worker in Redis."""

    def test_a_worker_is_named_by_its_id(
        self, stage: Stage, guard: JobGuard, leader: Leader, records: Records
    ) -> None:
        """A worker has its session's id in Redis, and a producer has an id of another version."""
        before = stage.broker.broker_id
        assert UUID(before).version == 8
        stage.actor("wait").send("a")
        (owed,) = records.owed()
        with stage.worker():
            eventually(lambda: stage.said() == ["a:begun"])
            assert UUID(stage.broker.broker_id).version == 7
            assert leader.observe(owed).taken_by == UUID(stage.broker.broker_id).hex
            stage.gate("a").touch()
        assert UUID(stage.broker.broker_id).version == 8

    def test_a_queue_declared_while_it_runs_is_among_its_own(
        self, stage: Stage, guard: JobGuard, database: str
    ) -> None:
        """A queue that is declared while the worker runs is added to its queues, and can be trusted."""

        def queues() -> list[list[str]]:
            with psycopg.connect(database) as connection:
                return [row for (row,) in connection.execute("select queues from jobguard.workers")]

        with stage.worker():
            assert queues() == [["default"]]
            for name in ("late", "later"):
                stage.broker.declare_queue(name)
            eventually(lambda: queues() == [["default", "late", "later"]])

    def test_only_strangers_are_consumers(
        self, stage: Stage, guard: JobGuard, leader: Leader, surroundings: Mapping[str, str]
    ) -> None:
        """Only unguarded processes that send heartbeats are consumers."""
        stage.broker.do_qsize("default")
        with stage.worker():
            eventually(lambda: stage.client.zcard("dramatiq:__heartbeats__") == 2)
            found: Any = leader.broker.consumers()
            guarded = {UUID(stage.broker.broker_id).hex}
            assert found["default"] == found.proved == found.alive == guarded
            stranger = str(uuid4())
            stage.client.zadd("dramatiq:__heartbeats__", {stranger: 1})
            found = leader.broker.consumers()
            assert found["any"] - found.proved == {stranger}

    def test_a_process_that_consumes_by_hand_is_a_stranger(
        self, stage: Stage, guard: JobGuard
    ) -> None:
        """A process that consumes without a worker counts as unguarded."""
        next(iter(stage.broker.consume("default", timeout=1)))
        assert UUID(stage.broker.broker_id).version == 4

    def test_a_worker_that_started_before_the_guard_is_a_stranger(
        self, stage: Stage, database: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Its runs are not guarded: the log says so, and its id in Redis stays that of a stranger."""
        with stage.worker():
            eventually(lambda: stage.client.zcard("dramatiq:__heartbeats__"))
            mine = stage.broker.broker_id
            with jobguard.guard(stage.broker, postgres=database, **BRISK):
                assert stage.broker.broker_id == mine and is_stranger(mine)
                stage.actor("say").send("a")
                eventually(stage.is_idle)
        assert stage.said() == ["a"]
        assert not stage.client.keys("dramatiq:__acks__*")  # it was acknowledged under this id
        assert "call guard() before the worker" in caplog.text

    def test_a_worker_may_follow_another(
        self, stage: Stage, guard: JobGuard, records: Records
    ) -> None:
        """A second worker can run in the same process after the first one."""
        for word in "ab":
            stage.actor("say").send(word)
            stage.work()
        assert stage.said() == ["a", "b"]
        assert records.owed() == []

    def test_two_workers_may_run_beside_each_other(
        self, stage: Stage, guard: JobGuard, records: Records, database: str
    ) -> None:
        """Two workers of one process on one broker are guarded, and the end of one is not that of both."""
        declare: Any = dramatiq.actor
        declare(stage.say, broker=stage.broker, actor_name="other", queue_name="other")
        with stage.worker(queues={"default"}):
            with stage.worker(queues={"other"}):
                eventually(lambda: workers(database) == [(os.getpid(), ["default", "other"])])
                sent = stage.actor("other").send("a")
                eventually(lambda: records.ended(sent.message_id) == [("completed", 1)])
            sent = stage.actor("say").send("b")
            eventually(lambda: records.ended(sent.message_id) == [("completed", 1)])
            assert workers(database) != []
        assert workers(database) == []
