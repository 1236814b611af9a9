"""The statements in the path of a job use indexes when much is owed: none of them reads all of `jobs`.

auto_explain logs the plans, including those inside functions, and after enough calls for a generic
plan.
"""

from __future__ import annotations

import re
import time
import uuid
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
import sqlalchemy as sa

import jobguard.store.connection
import jobguard.store.host
from jobguard.host.transaction import rows_of
from jobguard.model import Claim, Delivery, End, Outcome, Parent, new_token
from jobguard.operations import read
from jobguard.operations.read import JobFilter, ReadModel
from jobguard.schema import statements
from jobguard.settings import Settings
from jobguard.store.host import PostgresStore
from jobguard.store.leader import PostgresLeaderStore
from jobguard.store.protocols import ClaimRequest, Closing, QueueRow, Void

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from uuid import UUID

    from jobguard.demo.servers import NamedPostgres

ROWS = 50_000
SOURCE = 7
OFTEN = 12
"""Calls after which a prepared statement may have a generic plan: five of psycopg and five of
PostgreSQL.
"""

FILL = """
insert into jobguard.sources (id, namespace, library, address) values (7, 'default', 'rq', 'here');
insert into jobguard.jobs (source, token, job_id, queue, task, envelope)
  select 7, gen_random_uuid(), 'job-' || n, 'mail', 'send', repeat('e', 400)::bytea
  from generate_series(1, 50000) n;
insert into jobguard.history (source, token, job_id, queue, task, outcome, ended_at)
  select 7, gen_random_uuid(), 'old-' || n, 'mail', 'send', 'completed', now() - (n % 3) * interval '1 hour'
  from generate_series(1, 50000) n;
insert into jobguard.workers (id, source)
  select ('00000000-0000-0000-0000-' || lpad(n::text, 12, '0'))::uuid, 7 from generate_series(1, 50) n;
insert into jobguard.running (source, token, number, nonce, worker, pid)
  select source, token, 1, gen_random_uuid(),
         ('00000000-0000-0000-0000-' || lpad((1 + row_number() over () % 50)::text, 12, '0'))::uuid, 1
  from jobguard.jobs order by token limit 5000
  on conflict do nothing;
insert into jobguard.suspects (source, token, cause)
  select source, token, 'unexplained' from jobguard.jobs order by token desc limit 50;
insert into jobguard.outbox (source, token)
  select source, token from jobguard.jobs order by token desc offset 50 limit 50;
"""
WORKER = uuid.UUID(int=1)


@pytest.fixture(scope="module")
def much(postgres_server: NamedPostgres, template_database: str) -> Iterator[str]:
    """Give a ledger with many owed and many ended deliveries."""
    name = f"jobguard_test_{uuid.uuid4().hex}"
    url = postgres_server.create_database(name, template_database)
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(FILL)
        connection.execute("vacuum analyze")
        try:
            connection.execute("load 'auto_explain'")
        except psycopg.Error as error:
            pytest.skip(f"auto_explain cannot be loaded here: {error}")
    yield url
    postgres_server.drop_database(name)


class Plans:
    """The plans that auto_explain logs for a store's connection."""

    def __init__(self, store: Any) -> None:
        self.reported: list[str] = []
        db = store._db
        rows = db.execute("select distinct tableoid::regclass::text from jobguard.history")
        self._filled = [name.removeprefix("jobguard.") for (name,) in rows]
        for words in (
            "load 'auto_explain'",
            "set auto_explain.log_min_duration = 0",
            "set auto_explain.log_nested_statements = on",
            "set auto_explain.log_analyze = on",
            "set client_min_messages = log",
        ):
            db.execute(words)
        db._connection.add_notice_handler(
            lambda notice: self.reported.append(notice.message_primary or "")
        )

    def whole_reads(self) -> list[str]:
        """Return the plans that read all of jobs, or of a partition of history with rows.

        A read of a whole table counts, and so does a read of an index from its beginning: rows that are
        filtered out later were read too.
        """
        assert self.reported, "auto_explain logged nothing"
        whole = re.compile(
            rf"Seq Scan on (jobs|{'|'.join(self._filled)})\b|Removed by Filter: \d{{4}}"
            rf"|Scan using \w+ on .*actual time=\S+ rows=\d{{4,}}"
        )
        return [plan for plan in self.reported if whole.search(plan)]


@pytest.fixture(scope="module")
def drained(much: str, postgres_server: NamedPostgres, template_database: str) -> Iterator[str]:
    """Give a ledger that was filled again after statistics were taken while it was empty."""
    name = f"jobguard_test_{uuid.uuid4().hex}"
    url = postgres_server.create_database(name, template_database)
    with psycopg.connect(url, autocommit=True) as connection:
        for table in ("jobs", "running", "suspects", "outbox"):
            connection.execute(f"alter table jobguard.{table} set (autovacuum_enabled = off)")
        connection.execute(FILL)
        for table in ("jobs", "running", "suspects", "outbox"):
            connection.execute(f"delete from jobguard.{table}")
            connection.execute(f"vacuum (analyze, truncate off) jobguard.{table}")
        connection.execute("delete from jobguard.sources; delete from jobguard.workers")
        connection.execute(FILL)
    yield url
    postgres_server.drop_database(name)


@pytest.fixture
def host(much: str) -> Iterator[PostgresStore]:
    """Give the store of a host process, with long timeouts for a busy machine."""
    store = PostgresStore(lambda: much, Settings(call_timeout=20, connect_timeout=20))
    yield store
    store.close()


@pytest.fixture
def leader(much: str) -> Iterator[PostgresLeaderStore]:
    """Give the store of a leader."""
    store = PostgresLeaderStore(lambda: much, "default", uuid.uuid4(), Settings(lease=60))
    yield store
    store.close()


@pytest.fixture
def owed(much: str) -> list[UUID]:
    """Give tokens of owed, unclaimed deliveries from the middle."""
    with psycopg.connect(much) as connection:
        rows = connection.execute(
            "select token from jobguard.jobs order by token offset 25000 limit 400"
        ).fetchall()
    return [token for (token,) in rows]


def delivery(**fields: Any) -> Delivery:
    """Return a delivery."""
    usual = {"job_id": uuid.uuid4().hex, "queue": "mail", "task": "send", "envelope": b"e" * 400}
    return Delivery(token=new_token(), **(usual | fields))


def _record(store: PostgresStore, owed: list[UUID], n: int) -> None:
    store.record(SOURCE, [delivery(fresh=True)], namespace="default")
    store.record(SOURCE, [delivery(fresh=True) for _ in range(20)], namespace="default")


def _record_again(store: PostgresStore, owed: list[UUID], n: int) -> None:
    """Record a known id, a new id, and a replay."""
    store.record(SOURCE, [delivery(job_id=f"job-{10_000 + n}")], namespace="default")
    store.record(SOURCE, [delivery() for _ in range(20)], namespace="default")
    store.record(SOURCE, [delivery()], namespace="default", replay=True)


def _retry(store: PostgresStore, owed: list[UUID], n: int) -> None:
    store.record(SOURCE, [delivery(parent=Parent(owed[300 + n]))], namespace="default")


def _claim(store: PostgresStore, owed: list[UUID], n: int) -> None:
    """Claim owed and unknown deliveries."""
    for token in (owed[n], new_token()):
        store.claim(SOURCE, ClaimRequest(token, new_token(), WORKER, 1, "default", 15.0, 3))


def _end(store: PostgresStore, owed: list[UUID], n: int) -> None:
    """End claimed and unknown deliveries."""
    token = owed[100 + n]
    claim = store.claim(SOURCE, ClaimRequest(token, new_token(), WORKER, 1, "default", 15.0, 3))
    assert isinstance(claim, Claim)
    ends = [End(token, claim.number, Outcome.COMPLETED, WORKER)]
    store.end(SOURCE, [*ends, End(new_token(), 1, Outcome.COMPLETED, WORKER)])


def _cancel(store: PostgresStore, owed: list[UUID], n: int) -> None:
    job_ids = [f"job-{20_000 + n}"]
    store.cancel(SOURCE, tokens=[owed[200 + n]], job_ids=job_ids, meant=store.now())


def _outbox(store: PostgresStore, owed: list[UUID], n: int) -> None:
    store.outbox(SOURCE, [owed[220 + n]])
    store.withdraw(SOURCE, [owed[220 + n]])


def _heartbeat(store: PostgresStore, owed: list[UUID], n: int) -> None:
    store.heartbeat(SOURCE, job_id=f"job-{30_000 + n}", progress=0.5)
    store.heartbeat(SOURCE, job_id="x", token=owed[240 + n], number=1, progress=0.5)


def _transaction(store: PostgresStore, _owed: list[UUID], n: int) -> None:
    """Record a job of a run in a transaction of the application, and take its push."""
    one = delivery(job_id=f"job-{40_000 + n}", derived=True)
    for rows in rows_of([one]):
        store._db.execute(
            store._sql["record_in_transaction"], {"source": str(SOURCE), "rows": rows}
        )
    assert store.take_committed(SOURCE, [one.token], deadline=60) == {one.token}


@pytest.mark.parametrize(
    "work",
    [_record, _record_again, _retry, _claim, _end, _cancel, _outbox, _heartbeat, _transaction],
    ids=lambda work: work.__name__.strip("_"),
)
def test_host_statements_read_no_whole_table(
    host: PostgresStore, owed: list[UUID], work: Callable[[PostgresStore, list[UUID], int], None]
) -> None:
    """Each statement of a host finds its rows by an index, the first time and the tenth."""
    plans = Plans(host)
    began = time.monotonic()
    for n in range(OFTEN):
        work(host, owed, n)
    print(f"{(time.monotonic() - began) / OFTEN * 1000:.1f} ms a round with all its plans logged")
    assert not plans.whole_reads(), plans.whole_reads()[0]


def test_a_queue_that_was_empty_at_first(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans made while the queue was empty are replaced when it has many jobs."""
    works = (_record, _record_again, _retry, _claim, _end, _transaction)
    store = PostgresStore(lambda: database, Settings(call_timeout=20, connect_timeout=20))
    for n in range(OFTEN):
        for work in works:
            few = delivery(fresh=True)
            store.record(SOURCE, [few], namespace="default")
            work(store, [few.token] * 400, n)
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute(FILL)
        rows = connection.execute("select token from jobguard.jobs order by token offset 25000")
        owed = [token for (token,) in rows.fetchmany(400)]
    monkeypatch.setattr(jobguard.store.connection, "PLANS_SECONDS", 0.0)
    plans = Plans(store)
    for n in range(OFTEN):
        for work in works:
            work(store, owed, n)
    store.close()
    assert not plans.whole_reads(), plans.whole_reads()[0]


def test_a_statement_that_must_be_alone_makes_no_new_plans(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """VACUUM cannot share its transaction, also when the plans are old."""
    monkeypatch.setattr(jobguard.store.connection, "PLANS_SECONDS", 0.0)
    store = PostgresStore(lambda: database, Settings(call_timeout=20, connect_timeout=20))
    store._db.execute("vacuum (truncate off) jobguard.jobs", timeout=20, alone=True)
    store.close()


def test_the_functions_of_hosts_are_planned_once(database: str) -> None:
    """A function that a host calls keeps its plans for the session, also after it was replaced."""
    host = Path(jobguard.store.host.__file__).read_text(encoding="utf-8")
    asked = [str(statements()[name]) for name in re.findall(r'_sql\["(\w+)"\]', host)]
    called = {name for text in asked for name in re.findall(r"jobguard\.(\w+)\(", text)}
    with psycopg.connect(database) as connection:
        rows = connection.execute(
            "select p.proname, p.proconfig from pg_proc p join pg_language l on l.oid = p.prolang"
            " where p.pronamespace = 'jobguard'::regnamespace and l.lanname = 'plpgsql'"
            " and p.proname = any (%s)",
            [list(called)],
        ).fetchall()
    forgotten = {
        name for name, config in rows if "plan_cache_mode=force_generic_plan" not in (config or [])
    }
    assert len(rows) > 5
    assert not forgotten


def test_leader_statements_read_no_whole_table(
    leader: PostgresLeaderStore, owed: list[UUID]
) -> None:
    """Each statement of the leader finds its rows by an index."""
    term = leader.elect(lease=60)
    assert term is not None
    plans = Plans(leader)
    for n in range(OFTEN):
        page = leader.page(SOURCE, after=owed[n], limit=100)
        assert len(page) == 100
        assert len(leader.watched(SOURCE, limit=2_000)) >= 90
        some = [one.token for one in page[:20]]
        leader.envelopes(SOURCE, some)
        leader.tombstones(SOURCE, some)
        leader.restored(term, SOURCE, some)
        leader.clear(term, SOURCE, some)
        leader.void(term, SOURCE, [Void(token, 1, True, 0.0) for token in some])
        leader.incidents(SOURCE)
        leader.workers(SOURCE)
        leader.listed(SOURCE, some)
        leader.unheld(SOURCE, after=None, workers=5, limit=100)
        leader.tally(SOURCE, after=owed[n], limit=500)
        leader.trust(term, [QueueRow(SOURCE, f"queue-{n}", 1.0) for n in range(20)])
    assert not plans.whole_reads(), plans.whole_reads()[0]


@pytest.mark.parametrize(
    "work",
    [_record, _record_again, _retry, _claim, _end, _cancel, _outbox, _heartbeat, _transaction],
    ids=lambda work: work.__name__.strip("_"),
)
def test_host_statements_after_a_queue_was_drained(
    drained: str, work: Callable[[PostgresStore, list[UUID], int], None]
) -> None:
    """Host statements do not read all of a source after statistics of an empty table."""
    store = PostgresStore(lambda: drained, Settings(call_timeout=20, connect_timeout=20))
    with psycopg.connect(drained) as connection:
        rows = connection.execute(
            "select token from jobguard.jobs order by token offset 25000 limit 400"
        ).fetchall()
    owed = [token for (token,) in rows]
    plans = Plans(store)
    for n in range(OFTEN):
        work(store, owed, n)
    store.close()
    assert not plans.whole_reads(), plans.whole_reads()[0]


def test_leader_statements_after_a_queue_was_drained(drained: str) -> None:
    """Leader statements do not read all of a source after statistics of an empty table."""
    leader = PostgresLeaderStore(lambda: drained, "default", uuid.uuid4(), Settings(lease=60))
    term = leader.elect(lease=60)
    assert term is not None
    plans = Plans(leader)
    for _ in range(OFTEN):
        some = [one.token for one in leader.page(SOURCE, after=None, limit=100)[:20]]
        leader.watched(SOURCE, limit=200)
        leader.watched(SOURCE, limit=200, urgent=True)
        leader.listed(SOURCE, some)
        leader.unheld(SOURCE, after=None, workers=5, limit=100)
        leader.tally(SOURCE, after=None, limit=500)
        leader.envelopes(SOURCE, some)
        leader.known(SOURCE, some)
        leader.sharing_job_id(SOURCE, some)
        leader.overtaken(SOURCE, some)
        leader.last_outcomes(SOURCE, [f"job-{n}" for n in range(20)])
        leader.restored(term, SOURCE, some)
        leader.clear(term, SOURCE, some)
        leader.void(term, SOURCE, [Void(token, 1, True, 0.0) for token in some])
        leader.close_owed(term, SOURCE, [Closing(token, Outcome.COMPLETED) for token in some[:2]])
    leader.close()
    assert not plans.whole_reads(), plans.whole_reads()[0]


@pytest.mark.parametrize(
    "wanted",
    [
        JobFilter(),
        JobFilter(queue="none"),
        JobFilter(("failed", "dead"), error="x"),
        JobFilter(("stuck",)),
        JobFilter(("processing",), worker="w"),
        JobFilter(until=datetime.now(UTC)),
    ],
    ids=["all", "queue", "error", "stuck", "processing", "until"],
)
def test_lists_for_people_read_no_whole_table(much: str, wanted: JobFilter) -> None:
    """A list is read in the order of the tokens, by an index, and stops at its bound."""
    before, since = read._bounds(wanted, None)
    with closing(ReadModel(lambda: much)) as model, model._begin() as connection:
        for query, states, more in read._queries(wanted):
            values = {name: getattr(wanted, name) for name in ("queue", "task", "worker")} | more
            values |= {"namespace": "default", "before": before, "since": since, "limit": 51}
            values |= {"states": list(states), "budget": 1000}
            plan = connection.execute(sa.text(f"explain {query.text}"), values).scalars().all()
            # A partition that is still empty is read at no cost.
            scan = r"Seq Scan on (?:jobs|history).*\.\.\d{3,}\.\d\d rows"
            whole = [line for line in plan if re.search(scan, line)]
            assert not whole, "\n".join(plan)


def test_a_whole_read_is_detected(host: PostgresStore) -> None:
    """A statement that must read everything, such as emptying a queue, is detected."""
    plans = Plans(host)
    host.cancel(SOURCE, queue="no such queue", meant=host.now())
    assert plans.whole_reads()
