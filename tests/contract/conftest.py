"""The two stores behind one interface, and the helpers of the contract tests.

Each test in this folder runs twice: on the memory store, and on PostgreSQL.
"""

from __future__ import annotations

import importlib
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, cast
from uuid import UUID, uuid4

import psycopg
import pytest
from psycopg import sql
from psycopg.types.json import Jsonb

from jobguard.host.transaction import rows_of
from jobguard.model import (
    Beat,
    Claim,
    ClaimAnswer,
    Delivery,
    End,
    Ended,
    Outcome,
    Owed,
    Parent,
    Recorded,
    RecoverRule,
    Refusal,
    Refused,
    Request,
    new_token,
)
from jobguard.schema import statements
from jobguard.settings import Settings
from jobguard.store.protocols import BeatReply, ClaimRequest, HostStore, LeaderStore, ScheduleRow
from tests.fakes.store import MemoryLedger
from tests.fakes.store.tables import Schedule

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

NAMESPACE = "tests"
SOURCE = 7
WORKER_TIMEOUT = 15.0
CRASH_BUDGET = 3
LONG = 1e6
"""Seconds of a lease that is longer than any test."""
ENDED_COMPLETED = (Refusal.ENDED, Outcome.COMPLETED)
ENDED_SUPERSEDED = (Refusal.ENDED, Outcome.SUPERSEDED)


class Backend(Protocol):
    """One of the two stores."""

    def host(self) -> HostStore:
        """Return a store for a process of the application."""

    def leader(self, namespace: str, holder: UUID) -> LeaderStore:
        """Return a store for a reconciler."""

    def commit(self, deliveries: Sequence[Delivery]) -> None:
        """Record deliveries in a transaction of the application, and commit it."""

    def advance(self, seconds: float) -> None:
        """Make time pass."""

    def ask(self, task: str, **more: Any) -> str:
        """Request a job as SQL does; return its id."""

    def schedule(self, name: str, **more: Any) -> None:
        """Add a schedule."""

    def close(self) -> None:
        """Close all connections."""


class Clock:
    """A clock that a test advances. Each call adds a millisecond, so that no two times are equal."""

    def __init__(self) -> None:
        self._time = time.time()

    def __call__(self) -> float:
        """Return the time."""
        self._time += 0.001
        return self._time

    def advance(self, seconds: float) -> None:
        """Make time pass."""
        self._time += seconds


class InMemory:
    """The ledger in memory."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.ledger = MemoryLedger(clock=self.clock)
        self.host = self.ledger.host
        self.leader = self.ledger.leader

    def commit(self, deliveries: Sequence[Delivery]) -> None:
        """Record deliveries as a committed transaction."""
        self.ledger.host().record_in_transaction(SOURCE, deliveries)

    def advance(self, seconds: float) -> None:
        """Make time pass."""
        self.clock.advance(seconds)

    def ask(self, task: str, **more: Any) -> str:
        """Request a job as SQL does; return its id."""
        tables = self.ledger._tables
        id, job_id = len(tables.requests) + 1, str(uuid4())
        given: dict[str, Any] = {"queue": "default", "args": [], "kwargs": {}, **more}
        with tables.open() as now:
            tables.requests[id] = Request(
                id=id, source=SOURCE, job_id=job_id, task=task, requested_at=now, **given
            )
        return job_id

    def schedule(self, name: str, **more: Any) -> None:
        """Add a schedule."""
        given: dict[str, Any] = {
            **dict.fromkeys(("cron", "every", "rule", "starts_at", "ends_at", "next_at")),
            **{"timezone": "UTC", "jitter": 0.0, "catch_up": "one", "version": uuid4()},
        }
        with self.ledger._tables.open() as now:
            row = ScheduleRow(name, **{**given, "created_at": now, **more})
            self.ledger._tables.schedules[NAMESPACE, name] = Schedule(NAMESPACE, SOURCE, row)

    def close(self) -> None:
        """Do nothing: there is no connection."""


_TIMES = """
select c.table_name, array_agg(c.column_name::text)
from information_schema.columns c
join pg_class t on t.relname = c.table_name and t.relnamespace = c.table_schema::regnamespace
where c.table_schema = 'jobguard' and c.data_type = 'timestamp with time zone'
  and t.relkind in ('r', 'p') and not t.relispartition
group by c.table_name
"""

_WAIT_AT_COMMIT = """
create function public.wait_at_commit() returns trigger language plpgsql as $$
begin
  perform pg_advisory_xact_lock(5170);
  return null;
end $$;
create constraint trigger wait_at_commit after delete on jobguard.jobs
  deferrable initially deferred for each row execute function public.wait_at_commit();
"""

_WAITING = """
select count(*) from pg_stat_activity
where datname = current_database() and wait_event_type = 'Lock'
"""


class InPostgres:
    """The ledger in a database of its own."""

    def __init__(self, database: str) -> None:
        self._database = database
        self._settings = Settings(connect_timeout=10, call_timeout=20, record_timeout=20)
        self._opened: list[HostStore | LeaderStore] = []
        # Imported late, because the tests in memory need no driver.
        self._host_store = importlib.import_module("jobguard.store.host").PostgresStore
        self._leader_store = importlib.import_module("jobguard.store.leader").PostgresLeaderStore

    def _conninfo(self) -> str:
        return self._database

    def host(self) -> HostStore:
        """Return a store for a process of the application."""
        store = cast(HostStore, self._host_store(self._conninfo, self._settings))
        self._opened.append(store)
        return store

    def leader(self, namespace: str, holder: UUID) -> LeaderStore:
        """Return a store for a reconciler."""
        made = self._leader_store(self._conninfo, namespace, holder, self._settings)
        store = cast(LeaderStore, made)
        self._opened.append(store)
        return store

    def commit(self, deliveries: Sequence[Delivery]) -> None:
        """Record deliveries on a connection of the application, and commit."""
        with psycopg.connect(self._database) as connection:
            for rows in rows_of(deliveries):
                connection.execute(
                    statements()["record_in_transaction"], {"source": str(SOURCE), "rows": rows}
                )

    def advance(self, seconds: float) -> None:
        """Make time pass: the clock of a server cannot be moved, so all stored times are moved back."""
        with psycopg.connect(self._database) as connection:
            for table, columns in connection.execute(_TIMES).fetchall():
                shifts = [
                    sql.SQL("{0} = {0} - make_interval(secs => {1})").format(
                        sql.Identifier(column), sql.Literal(seconds)
                    )
                    for column in columns
                ]
                connection.execute(
                    sql.SQL("update jobguard.{} set {}").format(
                        sql.Identifier(table), sql.SQL(", ").join(shifts)
                    )
                )

    def ask(self, task: str, **more: Any) -> str:
        """Request a job as SQL does; return its id."""
        given: dict[str, Any] = {"queue": "default", "args": [], "kwargs": {}, "key": None, **more}
        with psycopg.connect(self._database) as connection:
            ((job_id,),) = connection.execute(
                "insert into jobguard.requests (source, job_id, task, queue, args, kwargs, key)"
                " values (%s, gen_random_uuid()::text, %s, %s, %s, %s, %s) returning job_id",
                (
                    SOURCE,
                    task,
                    given["queue"],
                    Jsonb(given["args"]),
                    Jsonb(given["kwargs"]),
                    given["key"],
                ),
            ).fetchall()
        return str(job_id)

    def schedule(self, name: str, **more: Any) -> None:
        """Add a schedule."""
        columns = {"namespace": NAMESPACE, "name": name, "source": SOURCE, **more}
        columns |= {"queue": "default", "task": "app.task"}
        with psycopg.connect(self._database) as connection:
            connection.execute(
                sql.SQL("insert into jobguard.schedules ({}) values ({})").format(
                    sql.SQL(", ").join(map(sql.Identifier, columns)),
                    sql.SQL(", ").join(map(sql.Literal, columns.values())),
                )
            )

    @contextmanager
    def commits_held_back(self) -> Iterator[Callable[[], int]]:
        """Make each transaction that deletes an owed delivery wait before its commit.

        Give a function that counts the sessions that wait for a lock.
        """
        with psycopg.connect(self._database, autocommit=True) as connection:
            connection.execute(_WAIT_AT_COMMIT)
            connection.execute("select pg_advisory_lock(5170)")
            try:
                yield lambda: int(connection.execute(_WAITING).fetchall()[0][0])
            finally:
                connection.execute("select pg_advisory_unlock(5170)")

    def close(self) -> None:
        """Close the connections."""
        for store in self._opened:
            store.close()


@dataclass
class Worker:
    """A guarded worker process of the application."""

    ledger: Contract
    id: UUID = field(default_factory=uuid4)
    host: str = "host-1"
    holds: set[UUID] = field(default_factory=set)
    beats: int = 0

    def request(
        self,
        token: UUID,
        *,
        nonce: UUID | None = None,
        budget: int = CRASH_BUDGET,
        recover: RecoverRule | None = None,
    ) -> ClaimRequest:
        """Return a request for a claim."""
        return ClaimRequest(
            token=token,
            nonce=nonce or uuid4(),
            worker=self.id,
            pid=100,
            namespace=self.ledger.namespace,
            worker_timeout=WORKER_TIMEOUT,
            crash_budget=budget,
            recover=recover,
        )

    def claim(
        self,
        token: UUID,
        *,
        nonce: UUID | None = None,
        budget: int = CRASH_BUDGET,
        recover: RecoverRule | None = None,
    ) -> ClaimAnswer:
        """Ask for a claim and, if it is granted, list it from the next beat on."""
        answer = self.ledger.store.claim(
            self.ledger.source, self.request(token, nonce=nonce, budget=budget, recover=recover)
        )
        if isinstance(answer, Claim):
            self.holds.add(token)
        return answer

    def start(self, token: UUID) -> Claim:
        """Take a claim that must be granted, as a worker that beats."""
        if not self.beats:
            self.beat()
        answer = self.claim(token)
        assert isinstance(answer, Claim), answer
        return answer

    def beat(self, *, claims: set[UUID] | None = None, **fields: Any) -> BeatReply:
        """Beat once, listing the claims of this worker."""
        self.beats += 1
        listed = tuple(sorted(self.holds if claims is None else claims))
        beat = Beat(worker=self.id, counter=self.beats, claims=listed, host=self.host, **fields)
        return self.ledger.store.beat(self.ledger.source, beat, namespace=self.ledger.namespace)

    def end(self, claim: Claim, outcome: Outcome = Outcome.COMPLETED, **fields: Any) -> Ended:
        """Report an end on behalf of a claim."""
        (answer,) = self.ledger.store.end(
            self.ledger.source, [End(claim.token, claim.number, outcome, self.id, **fields)]
        )
        return answer

    def heartbeat(self, claim: Claim, *, job_id: str = "j") -> bool:
        """Store the progress of a claim."""
        return self.ledger.store.heartbeat(
            self.ledger.source,
            job_id=job_id,
            token=claim.token,
            number=claim.number,
            progress=0.5,
            attrs={"row": 1},
        )

    def forget_by_beats(self, token: UUID) -> None:
        """Beat twice without listing a claim: its run is over, and no process reported it."""
        self.holds.discard(token)
        for _ in range(2):
            self.ledger.advance(1)
            self.beat()

    def leave(self) -> None:
        """Report a regular exit."""
        self.ledger.store.leave(self.id)


class Contract:
    """A ledger of either kind with one host and one leader, and short methods for the steps of tests."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.source = SOURCE
        self.namespace = NAMESPACE
        self.store = backend.host()
        self.leader = backend.leader(NAMESPACE, uuid4())
        self.advance = backend.advance

    def cancel(self, *, ago: float = 0.0, **what: Any) -> int:
        """Cancel the deliveries that existed so many seconds ago."""
        return self.store.cancel(self.source, meant=self.store.now() - ago, **what)

    def elected(self) -> int:
        """Make the leader lead for longer than any test."""
        term = self.leader.elect(lease=LONG)
        assert term is not None
        return term

    def worker(self, *, host: str = "host-1") -> Worker:
        """Start a worker that has not beaten yet."""
        return Worker(self, host=host)

    def working(self, *, host: str = "host-1") -> Worker:
        """Start a worker that has beaten once."""
        worker = self.worker(host=host)
        worker.beat()
        return worker

    def recorded(self, job_id: str = "j", **more: Any) -> Delivery:
        """Record a delivery that must be accepted."""
        it = delivery(job_id, **more)
        assert self.record(it).refused == frozenset()
        return it

    def record(self, *deliveries: Delivery, **how: Any) -> Recorded:
        """Record deliveries in one call."""
        return self.store.record(self.source, deliveries, namespace=self.namespace, **how)

    def owed(self) -> dict[UUID, Owed]:
        """Return all owed deliveries by token."""
        rows = self.leader.page(self.source, after=None, limit=100_000)
        return {row.token: row for row in rows}

    def watched(self) -> dict[UUID, Owed]:
        """Return the deliveries of every inspection by token."""
        rows = [*self.leader.watched(self.source, limit=100_000)]
        rows += self.leader.unheld(self.source, after=None, workers=100, limit=100_000)[0]
        return {row.token: row for row in rows}

    def outcome(self, token: UUID) -> Outcome | None:
        """Return the outcome of a delivery, or None if it has not ended."""
        return self.leader.tombstones(self.source, [token]).get(token)


def delivery(job_id: str = "j", **more: Any) -> Delivery:
    """Return one push of a job, with a token of its own."""
    given: dict[str, Any] = {
        "token": new_token(),
        "queue": "default",
        "task": "app.task",
        "envelope": b"\x80\x00",
    }
    return Delivery(job_id=job_id, **(given | more))


def retry_of(claim: Claim, job_id: str = "j", **more: Any) -> Delivery:
    """Return the delivery by which a worker retries the job it has claimed."""
    return delivery(job_id, parent=Parent(claim.token, claim=claim.number), attempt=2, **more)


def refused(answer: object) -> tuple[Refusal, Outcome | None]:
    """Return why a claim was refused."""
    assert isinstance(answer, Refused), answer
    return answer.reason, answer.outcome


def taken_over(ledger: Contract) -> tuple[Delivery, Worker, Claim, Worker, Claim]:
    """Make a worker silent until it counts as dead, and another worker run its job."""
    it = ledger.recorded()
    zombie, successor = ledger.working(), ledger.working()
    stale = zombie.start(it.token)
    ledger.advance(WORKER_TIMEOUT + 1)
    successor.beat()
    return it, zombie, stale, successor, successor.start(it.token)


def postgres_backend(request: pytest.FixtureRequest) -> InPostgres:
    """Return the stores over a fresh database."""
    database: str = request.getfixturevalue("database")
    return InPostgres(database)


@pytest.fixture
def ledger_in_postgres(request: pytest.FixtureRequest) -> Iterator[Contract]:
    """Give the ledger in PostgreSQL only, for tests that need several sessions."""
    backend = postgres_backend(request)
    yield Contract(backend)
    backend.close()


@pytest.fixture(params=["memory", "postgres"])
def ledger(request: pytest.FixtureRequest) -> Iterator[Contract]:
    """Give the ledger: each test runs on both."""
    backend: Backend = InMemory() if request.param == "memory" else postgres_backend(request)
    yield Contract(backend)
    backend.close()


class Together:
    """Calls made in threads of their own, at the same time."""

    def __init__(self) -> None:
        self._threads: list[threading.Thread] = []
        self._failures: list[BaseException] = []

    def call(self, work: Callable[..., Any], *args: Any) -> list[Any]:
        """Start a call; its answer becomes the only member of the returned list."""
        answers: list[Any] = []
        thread = threading.Thread(target=partial(self._run, work, args, answers), daemon=True)
        self._threads.append(thread)
        thread.start()
        return answers

    def _run(self, work: Callable[..., Any], args: tuple[Any, ...], answers: list[Any]) -> None:
        try:
            answers.append(work(*args))
        except BaseException as error:
            self._failures.append(error)

    def wait(self) -> None:
        """Wait for all calls, and raise the first error."""
        for thread in self._threads:
            thread.join(timeout=30)
            assert not thread.is_alive(), "a call did not return"
        if self._failures:
            raise self._failures[0]


@pytest.fixture
def together() -> Together:
    """Give an object that starts calls at the same time."""
    return Together()
