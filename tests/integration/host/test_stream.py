"""The stream of reports in a real Redis, while Postgres (a ledger in memory) is away."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any
from uuid import UUID

import pytest
import redis

from jobguard.errors import StoreUnavailable
from jobguard.host import tracker
from jobguard.host.push import take_back
from jobguard.host.stream import ReportStream, stream_key
from jobguard.host.stream_entries import encode
from jobguard.host.tracker import HostTracker
from jobguard.model import Claim, Delivery, End, Ended, Outcome, Owed, Parent, Refused, new_token
from jobguard.reconciler.service import Service
from jobguard.reconciler.stream_drain import StreamDrain
from jobguard.settings import Settings
from tests.fakes.store import MemoryLedger
from tests.fakes.world import NAMESPACE, SOURCE, delivery, leader_store, outage, source_row
from tests.support import eventually

if TYPE_CHECKING:
    from jobguard.store.protocols import HostStore

KEY = stream_key(SOURCE)


class Site:
    """A ledger in memory, a real Redis, and the processes of one source on them."""

    def __init__(self, redis_url: str) -> None:
        self.url = redis_url
        self.redis: Any = redis.Redis.from_url(redis_url)
        self.ledger = MemoryLedger()
        self.ledger.host().register(source_row())
        self.processes: list[HostTracker] = []

    def process(self, *, lives: bool = False, **settings: Any) -> HostTracker:
        """Start a process of the application; ``lives``: it outlives the outage, and writes its own."""
        given = {"namespace": NAMESPACE, "retry_interval": 60.0, "redis_timeout": 5.0}
        made = HostTracker(
            SOURCE,
            Settings(**{**given, **settings}),
            self.ledger.host,
            client=lambda: redis.Redis.from_url(self.url, socket_timeout=5),
        )
        if not lives:
            made._replay.drain = lambda: None  # type: ignore[method-assign]
        self.processes.append(made)
        return made

    def leader(self, host: HostStore | None = None) -> StreamDrain:
        """Start a leader."""
        stream = ReportStream(SOURCE, lambda: self.redis, bound=1 << 20)
        return StreamDrain(stream, host or self.ledger.host(), SOURCE)

    @property
    def owed(self) -> dict[UUID, Owed]:
        """Return what is owed."""
        page = leader_store(self.ledger).page(SOURCE.id, after=None, limit=100_000)
        return {owed.token: owed for owed in page}

    def outcome(self, of: Delivery) -> Outcome | None:
        """Return how a delivery has ended."""
        return leader_store(self.ledger).tombstones(SOURCE.id, [of.token]).get(of.token)

    def keys(self) -> list[bytes]:
        """Return the keys of the stream that Redis has."""
        return [
            key
            for key in self.redis.scan_iter(f"{KEY}*")
            if b".away:" not in key and b".of:" not in key
        ]


@pytest.fixture
def site(redis_url: str) -> Iterator[Site]:
    """Give a ledger and a Redis."""
    made = Site(redis_url)
    yield made
    made.ledger.down = False
    for process in made.processes:
        process._store = made.ledger.host()
        process.close()
    made.redis.close()


def ended(of: Delivery, worker: UUID | None = None) -> End:
    """Return the end of a run without a claim."""
    return End(of.token, 0, Outcome.COMPLETED, worker or new_token(), of.job_id, of.queue, of.task)


def test_what_a_process_reported_in_an_outage_outlives_it(site: Site) -> None:
    """Records, ends and cancels of a process that is gone are written by the leader, in order."""
    first, done, gone = (delivery(f"job {n}", fresh=True) for n in range(3))
    with outage(site.ledger):
        producer, worker = site.process(), site.process()
        assert producer.record([first, done, gone]).spooled
        assert worker.spool.put([ended(done)])
        producer.cancel(job_ids=[gone.job_id])
        assert producer.spooled()["stream"] == 5
        assert not site.leader().step()  # Nothing may be judged yet.
    leader = site.leader()
    assert leader.step()

    assert set(site.owed) == {first.token}
    assert site.outcome(done) is Outcome.COMPLETED
    assert site.outcome(gone) is Outcome.CANCELLED
    assert site.keys() == []


def test_a_process_that_lives_writes_its_own_and_deletes_it(site: Site) -> None:
    """When Postgres is back, a living process writes its entries, and the stream is empty."""
    job = delivery()
    process = site.process(lives=True, retry_interval=0.01)
    with outage(site.ledger):
        process.record([job])
    eventually(lambda: not site.keys(), 10)
    assert set(site.owed) == {job.token}


@pytest.mark.parametrize("found_by", ["the next check", "the next entry"])
def test_what_redis_lost_in_the_outage_is_added_again(site: Site, found_by: str) -> None:
    """A process that ends before Postgres is back leaves nothing out that Redis lost since it was added."""
    one, two, other = delivery("one", fresh=True), delivery("two", fresh=True), delivery("other")
    with outage(site.ledger):
        worker = site.process()
        worker.record([one, two])
        worker.spool.put([ended(one)])
        site.redis.flushdb()
        site.process().record([other])  # the stream has as many entries as before
        if found_by == "the next entry":
            worker.spool.put([ended(two)])
        worker.stream._ask_at = 0.0  # type: ignore[union-attr]  # the last question was a moment ago
        worker.close()
    assert site.leader().step()
    assert site.outcome(one) is Outcome.COMPLETED
    assert site.outcome(two) is (Outcome.COMPLETED if found_by == "the next entry" else None)


def test_what_a_leader_has_drained_is_not_added_again(site: Site) -> None:
    """A process that does not reach Postgres itself does not take the leader's work for a loss."""
    process = site.process()
    with outage(site.ledger):
        process.record([delivery()])
    assert site.leader().step()
    process.stream._ask_at = 0.0  # type: ignore[union-attr]
    assert process.spool.copy()
    assert process.spool.pending and not site.redis.exists(KEY)


def test_an_entry_that_is_written_twice_changes_nothing(site: Site) -> None:
    """A process and two leaders write the same entries: the delivery ends once, and is not owed again."""
    job = delivery()
    with outage(site.ledger):
        process = site.process(lives=True, retry_interval=0.01)
        process.record([job])
        process.spool.put([ended(job)])
        copied = site.redis.xrange(KEY)
    assert site.leader().step()
    for _, fields in copied:
        site.redis.xadd(KEY, fields)
    assert site.leader().step()
    eventually(lambda: not process.spool.pending, 10)
    assert site.owed == {}
    assert len(site.ledger._tables.history) == 1


def test_a_late_record_of_an_ended_delivery_is_not_owed(site: Site) -> None:
    """An end that is written before its record, by a process that is faster, keeps the record out."""
    job = delivery()
    with outage(site.ledger):
        site.process().record([job])
    assert site.ledger.host().end(SOURCE.id, [ended(job)]) == [Ended.UNKNOWN]
    assert site.leader().step()
    assert site.owed == {}


class Dies:
    """A store whose process dies after some statements."""

    def __init__(self, inner: HostStore, after: int) -> None:
        self._inner, self.left = inner, after

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._inner, name)
        if name not in ("record", "end"):
            return method

        def call(*args: Any, **options: Any) -> Any:
            self.left -= 1
            if self.left < 0:
                raise StoreUnavailable("the leader died here")
            return method(*args, **options)

        return call


def test_a_leader_that_dies_in_the_middle_leaves_the_rest_to_the_next(site: Site) -> None:
    """Entries are deleted after they are written, so that another leader writes the others."""
    jobs = [delivery(f"job {n}", fresh=True) for n in range(600)]
    with outage(site.ledger):
        process = site.process()
        for start in range(0, len(jobs), 100):
            process.record(jobs[start : start + 100])
    one: Any = Dies(site.ledger.host(), 1)
    assert not site.leader(one).step()
    assert 0 < len(site.owed) < len(jobs)
    assert site.redis.xlen(KEY) == len(jobs) - len(site.owed)
    assert site.leader().step()
    assert set(site.owed) == {job.token for job in jobs}
    assert site.keys() == []


def test_an_ended_job_is_not_started_again_in_the_outage(site: Site) -> None:
    """A worker died after its end was in the stream; the next one that gets the job skips it."""
    job, other = delivery("job"), delivery("other")
    with outage(site.ledger):
        site.process().spool.put([ended(job)])
        next_worker = site.process(record_timeout=0.05)
        session = next_worker.open_session(name="w2", queues=["mail"])
        refused = session.start(job.token, lambda: job)
        assert isinstance(refused, Refused) and refused.outcome is Outcome.COMPLETED
        assert session.start(other.token, lambda: other) == Claim(other.token, 0)
        session._stop.set()
        session._beats.stop()


@pytest.mark.parametrize("known", [True, False], ids=["recorded before", "recorded meanwhile"])
@pytest.mark.parametrize("by", ["tokens", "job_ids", "queue"])
def test_a_job_cancelled_in_the_outage_does_not_start(site: Site, by: str, *, known: bool) -> None:
    """A worker that holds it in its memory skips it, in the outage and before the cancel is written."""
    before, other = delivery("job \udcff"), delivery("other", queue="other")
    producer, worker = site.process(), site.process(retry_interval=0.01, record_timeout=0.05)
    if known:
        producer.record([before])
    with outage(site.ledger):
        if not known:
            producer.record([before])
        meant: dict[str, Any] = {
            "tokens": [before.token],
            "job_ids": [before.job_id],
            "queue": before.queue,
        }
        producer.cancel(**{by: meant[by]})
        moved = replace(delivery(before.job_id), queue=before.queue, parent=Parent(before.token))
        session = worker.open_session(name="w1", queues=["mail"])
        held = (before, moved)
        during = [session.start(job.token, partial(lambda job: job, job)) for job in held]
    eventually(lambda: worker.circuit.check() and session._beats.known, 10)
    after = [session.start(job.token, partial(lambda job: job, job)) for job in held]
    retried = replace(delivery("retried"), queue=before.queue, parent=Parent(new_token()))
    assert worker.record([moved, retried]).refused >= {moved.token}

    assert [answer.outcome for answer in (*during, *after) if isinstance(answer, Refused)] == [
        Outcome.CANCELLED
    ] * 4
    again = replace(delivery(before.job_id), token=new_token(), queue=before.queue)
    assert isinstance(session.start(again.token, lambda: again), Claim)
    assert isinstance(session.start(other.token, lambda: other), Claim)


def test_a_start_in_the_outage_is_a_claim_afterwards(site: Site) -> None:
    """The leader learns which worker ran a job when it died, and that it had given up another."""
    job, given_up = delivery("job"), delivery("given up")
    with outage(site.ledger):
        site.process().record([job, given_up])
        worker = site.process(record_timeout=0.05)
        session = worker.open_session(name="w1", queues=["mail"])
        session.start(job.token, lambda: job)
        session.release(session.start(given_up.token, lambda: given_up))  # type: ignore[arg-type]
        session._stop.set()
        session._beats.stop()
    assert site.leader().step()
    assert site.leader().step()
    assert site.owed[job.token].claim_worker == session.id
    assert site.owed[given_up.token].claim_worker is None


def test_a_worker_that_saw_no_outage_knows_what_was_replaced_in_it(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that did nothing meanwhile asks for the notes before the first start after a while."""
    job = delivery()
    idle = site.process()
    idle.record([job])
    session = idle.open_session(name="idle", queues=["mail"])
    assert not idle.reports_may_wait
    with outage(site.ledger):
        worker = site.process(record_timeout=0.05)
        other = worker.open_session(name="w1", queues=["mail"])
        assert isinstance(other.start(job.token, lambda: job), Claim)
        worker.record([delivery(parent=Parent(job.token, worker=other.id))])
    monkeypatch.setattr(tracker, "_UNHEARD", 0.0)
    answer = session.start(job.token, lambda: job)
    assert isinstance(answer, Refused) and answer.outcome is Outcome.SUPERSEDED


@pytest.mark.parametrize("by", ["leader", "process"])
def test_a_job_that_another_run_completed_in_the_outage_has_no_retry(site: Site, by: str) -> None:
    """The library delivered it twice; one run failed and sent a retry, the other one completed."""
    job = delivery()
    site.process().record([job])
    with outage(site.ledger):
        failed, other = site.process(lives=by == "process", retry_interval=0.01), site.process()
        retry = delivery(parent=Parent(job.token, claim=0, worker=new_token()))
        failed.record([retry])
        assert other.spool.put([ended(job)])
    if by == "process":
        eventually(lambda: not failed.spool.pending, 10)
    assert site.leader().step()
    assert site.outcome(job) is Outcome.COMPLETED
    assert site.owed == {}


def test_a_process_remembers_what_no_store_has_taken(site: Site) -> None:
    """A job that this worker has replaced does not start here again while both stores are away."""
    job, done = delivery("job"), delivery("done")
    site.process().record([job, done])
    with outage(site.ledger):
        worker = site.process(record_timeout=0.05)
        session = worker.open_session(name="w1", queues=["mail"])
        worker._redis_health.failed()  # type: ignore[union-attr]
        worker.record([delivery("job", parent=Parent(job.token, claim=0, worker=session.id))])
        worker.spool.put([ended(done)])
        for one, outcome in ((job, Outcome.SUPERSEDED), (done, Outcome.COMPLETED)):
            answer = session.start(one.token, partial(replace, one))
            assert isinstance(answer, Refused) and answer.outcome is outcome


def test_a_cancel_after_the_outage_means_the_records_that_wait(site: Site) -> None:
    """A cancel that Postgres takes at once also means a record that another process left in Redis."""
    job = delivery()
    with outage(site.ledger):
        site.process().record([job])
    site.process().cancel(job_ids=[job.job_id])
    assert site.leader().step()
    assert site.owed == {}
    later = delivery(job.job_id)
    site.ledger.host().record(SOURCE.id, [later], namespace=NAMESPACE)
    assert set(site.owed) == {later.token}


def test_a_withdrawn_record_does_not_come_back(site: Site) -> None:
    """A push that surely failed is withdrawn from the stream, also if a leader has read it."""
    job, other = delivery(), delivery("other")
    with outage(site.ledger):
        process = site.process()
        process.record([job])
        process.withdraw([job])
        assert site.redis.xlen(KEY) == 0
        process.record([other])
        site.redis.delete(KEY)  # As if a leader had taken it in this moment.
        process.withdraw([other])
    assert site.leader().step()
    assert site.outcome(other) is Outcome.CANCELLED


def test_what_was_replaced_in_the_outage_is_over(site: Site) -> None:
    """The library delivers it again: it does not run, and nothing else replaces it."""
    job = delivery()
    moved, again = (delivery(parent=Parent(job.token, claim)) for claim in (0, None))
    worker = site.process(record_timeout=0.05)
    with outage(site.ledger):
        assert worker.record([moved]).spooled
        session = worker.open_session(name="w1", queues=["mail"])
        answer = session.start(job.token, lambda: job)
        assert isinstance(answer, Refused) and answer.outcome is Outcome.SUPERSEDED
        assert worker.record([again]).refused == {again.token}
        assert isinstance(session.start(moved.token, lambda: moved), Claim)


@pytest.mark.parametrize("redis_up", [True, False])
def test_what_was_never_sent_nor_written_replaces_nothing(site: Site, *, redis_up: bool) -> None:
    """The library still has the job that it should replace; that one runs, and nothing else."""
    job = delivery()
    process = site.process(lives=True, retry_interval=0.01)
    process.record([job])
    moved = delivery(parent=Parent(job.token))
    with outage(site.ledger):
        if not redis_up:
            process._redis_health.failed()  # type: ignore[union-attr]
        assert process.record([moved]).spooled
        take_back(process, [moved])
    assert not process.spool.pending and site.keys() == []
    assert set(site.owed) == {job.token}


@pytest.mark.parametrize("lives", [True, False])
def test_what_a_leader_has_to_push_waits_behind_its_record(site: Site, *, lives: bool) -> None:
    """A process that can neither push nor reach Postgres leaves the push to the leader all the same."""
    job = delivery()
    with outage(site.ledger):
        process = site.process(lives=lives, retry_interval=0.01)
        process.record([job])
        process.leave_to_outbox([job.token])
    assert site.leader().step()
    eventually(lambda: not process.spool.pending or not lives, 10)
    assert [token for _, token in site.ledger._tables.outbox] == [job.token]


def test_the_stream_is_bounded(site: Site) -> None:
    """Past the bound records become references; at twice the bound entries stay in memory."""
    jobs = [delivery(f"job {n}", envelope=b"x" * 1000, fresh=True) for n in range(30)]
    with outage(site.ledger):
        process = site.process(stream_bytes=10_000)
        for job in jobs:
            process.record([job])
        entries, size = process.stream.length()  # type: ignore[misc,union-attr]
        assert entries == 30 and 10_000 < size < 20_000
        ends = [delivery(f"end {n}") for n in range(100)]
        assert process.spool.put([ended(one) for one in ends])
        assert len(process.spool.left()) == 100
    leader = site.leader()
    assert leader.step()
    assert 0 < len(site.owed) < 15
    assert leader.take_references()
    assert not leader.take_references()
    assert site.keys() == []


def test_memory_makes_room_for_what_the_stream_has(site: Site) -> None:
    """A full spool in memory drops records that the stream has, and nothing is lost."""
    jobs = [delivery(f"job {n}", fresh=True) for n in range(50)]
    with outage(site.ledger):
        process = site.process(spool_size=10)
        for job in jobs:
            assert process.record([job]).spooled
        assert process.spool.pending <= 10
        assert process.spooled()["lost"] == 0
    assert site.leader().step()
    assert set(site.owed) == {job.token for job in jobs}


def test_entries_wait_in_memory_while_redis_is_away_too(site: Site) -> None:
    """What Redis cannot take is copied to it as soon as it answers, before what comes later."""
    first, second = delivery("1"), delivery("2")
    with outage(site.ledger):
        process = site.process()
        health: Any = process._redis_health
        health.failed()
        process.record([first])
        assert len(process.spool.left()) == 1
        health._is_away = False
        process.record([second])
        assert process.spool.left() == []
    assert site.leader().step()
    assert set(site.owed) == {first.token, second.token}


def test_an_end_reaches_the_stream_soon_after_redis_is_back(site: Site) -> None:
    """A worker whose end neither store took does not wait for its next beat to try the stream again."""
    job = delivery()
    worker = site.process(lives=True, beat_interval=60.0, retry_interval=0.05, record_timeout=0.05)
    session = worker.open_session(name="w1", queues=["mail"])
    with outage(site.ledger):
        worker._redis_health.failed()  # type: ignore[union-attr]
        claim = session.start(job.token, lambda: job)
        assert isinstance(claim, Claim)
        session.end(claim, Outcome.COMPLETED, job_id="job", queue="mail", task="send")
        eventually(lambda: site.redis.exists(KEY), 10)


def test_a_new_process_of_the_host_knows_of_the_outage(site: Site) -> None:
    """A script that starts in an outage does not wait to find it out, nor at its end."""
    calls: list[str] = []

    class Slow:
        installation = None

        def __getattr__(self, name: str) -> Any:
            calls.append(name)
            raise StoreUnavailable("it waited for a second here")

    with outage(site.ledger):
        site.process().record([delivery()])
        script = site.process()
        script._store = Slow()  # type: ignore[assignment]
        began = time.monotonic()
        assert script.record([delivery()]).spooled
        script.drain_spool(last=True)
        assert time.monotonic() - began < 2
        assert set(calls) <= {"probe"}


def test_a_source_that_started_in_the_outage_is_registered_by_the_leader(site: Site) -> None:
    """A source that no process could register is known from its stream; a damaged one is left out."""
    site.ledger = MemoryLedger()
    with outage(site.ledger):
        site.process().record([delivery()])
    for id, description in (("1", "{}"), (str(SOURCE.id + 1), "x"), ("x", '{"settings": ""}')):
        site.redis.hset("jobguard:spool-sources", id, description)
    service = Service(
        Settings(namespace=NAMESPACE),
        str,
        {SOURCE.address: lambda: site.redis},
        store=lambda holder: leader_store(site.ledger, holder),
        host_store=site.ledger.host,
    )
    service._register_sources([])
    (row,) = leader_store(site.ledger).sources()
    assert (row.id, row.library, row.address) == (SOURCE.id, SOURCE.library, SOURCE.address)


def test_an_entry_of_a_later_version_stays(site: Site) -> None:
    """An entry that this version cannot read stays for a leader that can, and stops no other entry."""
    job = delivery()
    site.redis.xadd(KEY, {"c": b"\xff" + encode(job)[1:]})
    with outage(site.ledger):
        site.process().record([job])
    leader = site.leader()
    assert leader.step()
    assert leader.step()
    assert set(site.owed) == {job.token}
    assert site.redis.xlen(KEY) == 1


def test_the_drain_goes_on_after_the_ids_begin_again(site: Site) -> None:
    """A Redis whose clock went back gives lower ids: the leader reads them as well."""
    leader = site.leader()
    old = delivery("old")
    site.redis.xadd(KEY, {"c": encode(old)}, id="99999999999999-0")
    assert leader.step()
    site.redis.delete(KEY)
    new = delivery("new")
    site.redis.xadd(KEY, {"c": encode(new)}, id="5-0")
    assert leader.step()
    assert set(site.owed) == {old.token, new.token}


def test_a_redis_that_fails_raises_nothing(site: Site) -> None:
    """With both stores away, a record stays in memory, and no error reaches the host."""
    with outage(site.ledger):
        process = site.process()
        site.redis.set(KEY, "not a stream")
        assert process.record([delivery()]).spooled
        assert len(process.spool.left()) == 1
    with suppress(redis.ResponseError):
        site.leader().step()
