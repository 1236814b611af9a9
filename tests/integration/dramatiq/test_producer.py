"""Sent messages: their records, their pushes, and outages of Redis or PostgreSQL."""

from __future__ import annotations

import os
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import dramatiq
import psycopg
import pytest
import redis
from dramatiq.encoder import JSONEncoder
from dramatiq.middleware import Middleware

import jobguard
from jobguard.adapter import Source
from jobguard.adapters.dramatiq.broker import DramatiqBroker
from jobguard.adapters.dramatiq.envelope import decode
from jobguard.errors import JobguardError, StoreUnavailable
from jobguard.guard import JobGuard
from jobguard.host.tracker import HostTracker
from jobguard.model import Delivery, Restored, new_token
from tests.conformance.words import BRISK, Leader, Records
from tests.integration.dramatiq.stage import KEYS, Stage, a_broker
from tests.support import eventually

UNREACHABLE = "postgresql://nobody@127.0.0.1:1/nothing"
HOUR = 3_600_000


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[list[Delivery]]:
    """Return a list to which each record adds its deliveries."""
    made: list[list[Delivery]] = []
    record = HostTracker.record

    def watched(self: HostTracker, deliveries: Any, **options: Any) -> Any:
        made.append(list(deliveries))
        return record(self, deliveries, **options)

    monkeypatch.setattr(HostTracker, "record", watched)
    return made


@contextmanager
def redis_away(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make Redis unreachable for the client of the application."""

    def refused(*_: Any, **__: Any) -> Any:
        raise redis.ConnectionError("away")

    with monkeypatch.context() as patch:
        patch.setattr(stage.client, "execute_command", refused)
        patch.setattr(stage.client.connection_pool, "get_connection", refused)
        yield


class TestRecord:
    """The content of a message's record."""

    def test_it_has_all_that_is_known_of_the_message(
        self, stage: Stage, guard: JobGuard, recorded: list[list[Delivery]]
    ) -> None:
        """A record has the job, queue, task, attempt, due time, expiry and the exact bytes."""
        sent = stage.actor("say").send_with_options(args=("a",), delay=HOUR, max_age=2 * HOUR)
        (((one,),)) = recorded
        assert (one.job_id, one.queue, one.task, one.attempt) == (
            sent.message_id,
            "default",
            "say",
            1,
        )
        assert one.due_at == sent.options["eta"] / 1000
        assert one.expires_at == (sent.message_timestamp + 2 * HOUR) / 1000
        assert str(one.token) == sent.options["redis_message_id"]
        envelope = decode(one.envelope)
        assert envelope.queue == "default.DQ"
        assert stage.client.hget(f"{KEYS}.DQ.msgs", str(one.token)) == envelope.data

    def test_an_age_limit_that_is_no_number(
        self, stage: Stage, guard: JobGuard, recorded: list[list[Delivery]]
    ) -> None:
        """Dramatiq logs its own error for such a limit, and runs the message: it is recorded."""
        stage.actor("say").send_with_options(args=("a",), max_age="soon")
        (((one,),)) = recorded
        assert one.expires_at is None

    @pytest.mark.parametrize("priority", [10**9, float("-inf"), float("nan")])
    def test_any_priority(
        self, stage: Stage, guard: JobGuard, recorded: list[list[Delivery]], priority: float
    ) -> None:
        """Dramatiq compares any numbers: a message of such an actor is recorded."""
        actor: Any = stage.actor("say")
        actor.priority = priority
        actor.send("a")
        (((one,),)) = recorded
        assert -32768 <= one.priority <= 32767

    def test_what_other_middleware_adds_is_recorded(
        self, stage: Stage, guard: JobGuard, recorded: list[list[Delivery]]
    ) -> None:
        """Changes by later middleware are in the record, which has the same bytes as Redis."""

        class Late(Middleware):
            def before_enqueue(self, broker: Any, message: Any, delay: int | None) -> None:
                message.options["late"] = "added"

        stage.broker.add_middleware(Late())
        stage.actor("say").send("a")
        (((one,),)) = recorded
        data = decode(one.envelope).data
        assert b"added" in data
        assert stage.client.hvals(f"{KEYS}.msgs") == [data]

    def test_what_cannot_be_encoded_is_not_recorded(
        self, stage: Stage, guard: JobGuard, recorded: list[list[Delivery]]
    ) -> None:
        """A message that cannot be encoded raises the encoder's error and is not recorded."""
        with pytest.raises(TypeError):
            stage.actor("say").send(object())
        assert recorded == []

    def test_a_group_is_one_record(
        self, stage: Stage, guard: JobGuard, recorded: list[list[Delivery]]
    ) -> None:
        """A group with its pipelines is one record, and is pushed in order."""
        members = [stage.message("say", word) for word in range(3)]
        chain = stage.message("echo", "a") | stage.message("echo")
        stage.group([*members, chain]).run()
        assert [len(each) for each in recorded] == [4]
        rids = [raw.decode() for raw in stage.client.lrange(KEYS, 0, -1)]
        assert rids == [str(one.token) for one in recorded[0]]

    def test_a_push_by_hand_is_recorded(
        self, stage: Stage, guard: JobGuard, recorded: list[list[Delivery]]
    ) -> None:
        """A direct push with a chosen id is recorded under that id."""
        token = new_token()
        message = stage.message("say", "a").copy(options={"redis_message_id": str(token)})
        stage.broker.do_enqueue("default", str(token), message.encode())
        assert [one.token for one in recorded[0]] == [token]

    def test_a_fork_of_a_guarded_process_records_too(
        self, stage: Stage, guard: JobGuard, records: Records
    ) -> None:
        """A fork of a guarded process records too, as with gunicorn --preload."""
        stage.actor("say").send("parent")
        child = os.fork()
        if child == 0:
            try:
                stage.actor("say").send("child")
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        assert len(records.owed()) == 2
        assert stage.client.llen(KEYS) == 2

    def test_actors_may_be_declared_before_and_after(
        self, redis_url: str, database: str, records: Records
    ) -> None:
        """Actors can be declared before or after guard(), and brokers of one Redis share a guard."""
        declare: Any = dramatiq.actor
        brokers = [a_broker(redis_url), a_broker(redis_url)]
        before = [declare(print, broker=b, actor_name="before") for b in brokers]
        guards = [jobguard.guard(b, postgres=database, **BRISK) for b in brokers]
        assert guards[0] is guards[1]
        with guards[0]:
            after = [declare(print, broker=b, actor_name="after") for b in brokers]
            for actor in (*before, *after):
                actor.send()
            assert len(records.owed()) == 4
        before[1].send()
        assert len(records.owed()) == 4

    def test_a_namespace_is_a_source_of_its_own(
        self, redis_url: str, database: str, tmp_path: Path, records: Records
    ) -> None:
        """A namespace is a source of its own, and its messages are restored to it."""
        spaced = Stage(a_broker(redis_url, namespace="{mine}"), tmp_path / "ledger")
        with jobguard.guard(spaced.broker, postgres=database, **BRISK) as guard:
            spaced.actor("say").send("a")
            assert guard._tracker is not None
            source = guard._tracker.source
            before = spaced.client.hgetall("{mine}:default.msgs")
            spaced.client.flushdb()
            leader = Leader(DramatiqBroker(source, spaced.client))
            assert leader.restore(*records.owed()) == [Restored.RESTORED]
            assert spaced.client.hgetall("{mine}:default.msgs") == before


class TestRedisAway:
    """Redis is away: the record is accepted, and the leader pushes it."""

    def test_a_first_delivery_is_taken_back_without_a_leader(
        self,
        stage: Stage,
        guard: JobGuard,
        records: Records,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Without a leader the caller gets the error, and the record is withdrawn."""
        with redis_away(stage, monkeypatch), pytest.raises(redis.ConnectionError):
            stage.actor("say").send("a")
        assert records.owed() == []

    def test_it_is_accepted_with_a_leader(
        self,
        stage: Stage,
        guard: JobGuard,
        records: Records,
        reconciler: Any,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """With a leader the record is accepted, and pushed once after the outage."""
        with stage.worker() as worker:
            reconciler()
            worker.pause()
            with redis_away(stage, monkeypatch):
                stage.actor("say").send("a")
                with guard.batch():
                    stage.actor("say").send("b")
                stage.group([stage.message("say", "c")]).run()
            worker.resume()
            eventually(lambda: sorted(stage.said()) == ["a", "b", "c"], 20)
            eventually(lambda: records.owed() == [])

    def test_the_record_of_an_unconfirmed_push_stays(
        self,
        stage: Stage,
        guard: JobGuard,
        records: Records,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """After a push with an unknown result the record stays, and the error names its job."""

        def lost(*_: Any, **__: Any) -> Any:
            raise redis.TimeoutError("no answer")

        with monkeypatch.context() as patch:
            patch.setattr(stage.client, "execute_command", lost)
            with pytest.raises(redis.TimeoutError) as caught:
                stage.actor("say").send("a")
        (owed,) = records.owed()
        assert owed.job_id in caught.value.__notes__[0]

    def test_sent_twice_it_is_there_once(self, stage: Stage, guard: JobGuard) -> None:
        """A push that is repeated adds the message once, as redis-py repeats it after a lost answer."""
        message = stage.actor("say").send("a")
        rid = message.options["redis_message_id"]
        stage.broker.do_enqueue("default", rid, message.encode())
        assert stage.client.llen(KEYS) == 1


class TestPostgresAway:
    """PostgreSQL is away, and the setting decides."""

    def test_a_refused_send_pushes_nothing(self, stage: Stage) -> None:
        """A refused send pushes nothing, not even the members of a group."""
        with jobguard.guard(stage.broker, postgres=UNREACHABLE, when_postgres_down="raise"):
            with pytest.raises(StoreUnavailable):
                stage.actor("say").send("a")
            with pytest.raises(StoreUnavailable):
                stage.group([stage.message("say", "b")]).run()
        assert stage.client.llen(KEYS) == 0


class TestIntent:
    """A message that was deleted stays deleted."""

    def test_a_flushed_queue_stays_empty(
        self, stage: Stage, guard: JobGuard, records: Records
    ) -> None:
        """A flushed queue stays empty, with its delayed messages; other queues keep theirs."""
        stage.broker.declare_queue("other")
        stage.actor("say").send("a")
        stage.actor("say").send_with_options(args=("b",), delay=HOUR)
        stage.broker.enqueue(stage.message("say", "c").copy(queue_name="other"))
        stage.broker.flush("default")
        assert [owed.queue for owed in records.owed()] == ["other"]
        stage.broker.flush_all()
        assert records.owed() == []

    def test_a_purged_list_is_that_alone(
        self, stage: Stage, guard: JobGuard, records: Records
    ) -> None:
        """A purge of one list leaves the delayed messages of the same queue."""
        stage.actor("say").send("a")
        delayed = stage.actor("say").send_with_options(args=("b",), delay=HOUR)
        stage.broker.do_purge("default")
        assert [owed.job_id for owed in records.owed()] == [delayed.message_id]


class Pages:
    """What dramatiq-dashboard does with a broker: it deletes messages by a script of its own."""

    DELETE = """
    redis.call(redis.call('type', KEYS[1])['ok'] == 'zset' and 'zrem' or 'lrem', KEYS[1],
               unpack(redis.call('type', KEYS[1])['ok'] == 'zset' and {ARGV[1]} or {0, ARGV[1]}))
    redis.call('hdel', KEYS[1] .. '.msgs', ARGV[1])
    """

    def __init__(self, broker: Any) -> None:
        self.broker = broker
        self._delete = broker.client.register_script(self.DELETE)

    def delete_message(self, queue_name: str, message_id: str) -> None:
        """Delete a message of one list."""
        self._delete(keys=[f"{self.broker.namespace}:{queue_name}"], args=[message_id])

    def requeue_message(self, queue_name: str, message_id: str) -> Any:
        """Send a copy of a message, with its old ids, and delete the message before."""
        raw = self.broker.client.hget(f"{self.broker.namespace}:{queue_name}.msgs", message_id)
        message: Any = dramatiq.Message.decode(raw)
        self.delete_message(queue_name, message_id)
        return self.broker.enqueue(message.copy(queue_name="default", options={"retries": 0}))


@pytest.mark.parametrize("made", ["before the guard", "after the guard"])
class TestDashboard:
    """dramatiq-dashboard in a guarded process."""

    @pytest.fixture
    def pages(
        self, stage: Stage, database: str, made: str, monkeypatch: pytest.MonkeyPatch
    ) -> Iterator[Any]:
        """Return its pages, made before or after the guard."""
        module: Any = ModuleType("dramatiq_dashboard.interface")
        module.RedisInterface = type("RedisInterface", (Pages,), {})
        monkeypatch.setitem(sys.modules, "dramatiq_dashboard.interface", module)
        before = module.RedisInterface(stage.broker) if made == "before the guard" else None
        with jobguard.guard(stage.broker, postgres=database, **BRISK):
            yield before or module.RedisInterface(stage.broker)
        assert module.RedisInterface.delete_message is Pages.delete_message

    def test_a_deleted_message_stays_deleted(
        self, stage: Stage, pages: Any, records: Records
    ) -> None:
        """The tombstone of a deleted message is written first, so that no leader restores it."""
        kept, deleted = stage.actor("say").send("a"), stage.actor("say").send("b")
        pages.delete_message("default", deleted.options["redis_message_id"])
        assert records.ended(deleted.message_id) == [("cancelled", 1)]
        assert [owed.job_id for owed in records.owed()] == [kept.message_id]

    def test_a_requeued_message_is_a_new_delivery(
        self, stage: Stage, pages: Any, records: Records
    ) -> None:
        """A copy with the old ids is a new life of the job, and only this one is owed."""
        sent = stage.actor("say").send("a")
        copy = pages.requeue_message("default", sent.options["redis_message_id"])
        assert copy.message_id == sent.message_id
        (owed,) = records.owed()
        assert str(owed.token) == copy.options["redis_message_id"]
        assert str(owed.token) != sent.options["redis_message_id"]
        stage.work()
        assert stage.said() == ["a"]
        assert records.ended(sent.message_id) == [("cancelled", 1), ("completed", 1)]


class TestAbort:
    """dramatiq-abort: an abort is a cancellation, which Redis keeps only for some time."""

    @pytest.fixture
    def abortable(self, redis_url: str) -> Any:
        """Return its middleware."""
        kind = pytest.importorskip("dramatiq_abort").Abortable
        backend = pytest.importorskip("dramatiq_abort.backends").RedisBackend
        return kind(backend=backend.from_url(redis_url))

    @pytest.mark.parametrize("added", ["before", "after"])
    def test_an_aborted_message_stays_aborted(
        self, stage: Stage, database: str, records: Records, abortable: Any, added: str
    ) -> None:
        """A message stays aborted after Redis forgets it, because its tombstone was written first."""
        if added == "before":
            stage.broker.add_middleware(abortable)
        with jobguard.guard(stage.broker, postgres=database, **BRISK):
            if added == "after":
                stage.broker.add_middleware(abortable)
            message = stage.actor("say").send("a")
            abortable.abort(message.message_id)
            assert records.ended(message.message_id) == [("cancelled", 1)]
            assert records.owed() == []
            stage.client.delete(f"dramatiq:aborts:cancel:{message.message_id}")
            stage.work()
            assert stage.said() == []
        assert "abort" not in vars(abortable)

    def test_what_is_not_aborted_runs(
        self, stage: Stage, guard: JobGuard, records: Records, abortable: Any
    ) -> None:
        """Other messages run, and a message that only the middleware skips has an end too."""
        stage.broker.add_middleware(abortable)
        sent = [stage.actor("say").send(word) for word in "ab"]
        abortable.abort(sent[0].message_id)
        stage.work()
        assert stage.said() == ["b"]
        eventually(lambda: records.owed() == [])
        assert records.ended(sent[1].message_id) == [("completed", 1)]


class TestRequeue:
    """A person requeues a failed message."""

    def test_it_goes_back_under_a_new_id_and_is_acknowledged_by_that(
        self, stage: Stage, guard: JobGuard, records: Records, leader: Leader, source: Source
    ) -> None:
        """A requeued message has a new id, also in its bytes, and is acknowledged under that id."""
        failed = stage.actor("flaky").send("a")
        with stage.worker():
            eventually(lambda: records.ended(failed.message_id) == [("failed", 1)])
        was = failed.options["redis_message_id"]
        minted = guard.requeue(was)
        (owed,) = records.owed()
        assert owed.token == minted
        assert leader.restore(owed) == [Restored.RESTORED]
        stage.work()
        assert stage.said() == ["a", "a"]
        assert records.ended(failed.message_id) == [("failed", 1), ("completed", 2)]

    def test_it_has_all_its_retries_again(
        self, stage: Stage, guard: JobGuard, records: Records, leader: Leader
    ) -> None:
        """A requeued message has all its retries again."""
        options = {"max_retries": 1, "min_backoff": 1, "max_backoff": 1}
        failed = stage.actor("fail").send_with_options(args=("a",), **options)
        stage.work()
        eventually(lambda: records.ended(failed.message_id)[-1:] == [("failed", 2)])
        with psycopg.connect(records.database) as connection:
            (last,) = connection.execute(
                "select token from jobguard.history where outcome = 'failed'"
            ).fetchone() or (None,)
        assert last is not None
        guard.requeue(last)
        leader.restore(*records.owed())
        stage.work()
        assert stage.said() == ["a"] * 4

    def test_what_no_worker_could_acknowledge_is_refused(
        self, stage: Stage, guard: JobGuard, records: Records
    ) -> None:
        """A message that no worker could acknowledge is refused: it would be restored for ever."""

        class Packed(JSONEncoder):
            def encode(self, data: Any) -> bytes:
                return zlib.compress(super().encode(data))

            def decode(self, data: bytes) -> Any:
                return super().decode(zlib.decompress(data))

        dramatiq.set_encoder(Packed())
        failed = stage.actor("fail").send("a")
        stage.work()
        eventually(lambda: records.ended(failed.message_id) == [("failed", 1)])
        with pytest.raises(JobguardError, match="encoder hides the id"):
            guard.requeue(failed.options["redis_message_id"])
        assert records.owed() == []
