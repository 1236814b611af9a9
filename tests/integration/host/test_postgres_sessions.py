"""The sessions of jobguard with Postgres: their settings, their time limits, and their ends."""

from __future__ import annotations

import _socket
import contextlib
import os
import select
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import psycopg
import pytest

import jobguard.schema
from jobguard.demo.servers import PostgresServer
from jobguard.errors import BadRow, NotWritten, StoreUnavailable, TooManyConnections
from jobguard.model import Claim, Delivery, End, Ended, Outcome, new_token
from jobguard.settings import settings_from
from jobguard.store import wire
from jobguard.store.connection import Database
from jobguard.store.host import PostgresStore
from jobguard.store.leader import PostgresLeaderStore
from jobguard.store.ledger import PostgresLedger
from jobguard.store.names import Names
from jobguard.store.protocols import ClaimRequest, SourceRow
from tests.pooler import Pooler
from tests.support import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

LONG = 20.0
"""Seconds for a call in tests where the speed of the machine must not matter."""

# Settings that a role may have, with values that break a statement that relies on the default.
HOSTILE = {
    "default_transaction_isolation": "serializable",
    "default_transaction_read_only": "on",
    "search_path": "elsewhere",
    "TimeZone": "Asia/Kathmandu",
    "standard_conforming_strings": "off",
    "array_nulls": "off",
    "lock_timeout": "1ms",
    "statement_timeout": "100ms",
    "idle_in_transaction_session_timeout": "1s",
}
SHOWN = {
    "transaction_isolation": "read committed",
    "transaction_read_only": "off",
    "search_path": "pg_catalog",
    "TimeZone": "UTC",
    "standard_conforming_strings": "on",
    "array_nulls": "on",
    "lock_timeout": "0",
    "statement_timeout": "18s",
    "client_connection_check_interval": "500ms",
}


def database_of(url: str, **more: Any) -> Database:
    """Return the database access of one process."""
    return Database(lambda: url, **{"connect_timeout": LONG, "call_timeout": LONG, **more})


def delivery(**more: Any) -> Delivery:
    """Return a delivery that can be recorded."""
    given = {"job_id": uuid.uuid4().hex, "queue": "q", "task": "t", "envelope": b"x"} | more
    return Delivery(token=new_token(), **given)


def store(url: str, **more: Any) -> PostgresStore:
    """Return a store with a registered source."""
    made = PostgresStore(
        lambda: url, settings_from({"connect_timeout": LONG, "call_timeout": LONG, **more})
    )
    made.register(
        SourceRow(id=1, namespace="d", library="rq", address="a", prefix="", name=None, settings="")
    )
    return made


def claim_request(one: Delivery, worker: uuid.UUID) -> ClaimRequest:
    """Return a request for the claim of this delivery."""
    return ClaimRequest(
        token=one.token,
        nonce=uuid.uuid4(),
        worker=worker,
        pid=1,
        namespace="d",
        worker_timeout=15.0,
        crash_budget=3,
    )


def one_life(made: PostgresStore) -> None:
    """Record, claim and end a job, with nulls in its arrays."""
    worker, one = uuid.uuid4(), delivery(fresh=False)
    made.record(1, [one, delivery(fresh=False)], namespace="d")
    claim = made.claim(1, claim_request(one, worker))
    assert isinstance(claim, Claim)
    end = End(
        token=one.token,
        number=claim.number,
        outcome=Outcome.COMPLETED,
        worker=worker,
        ended_at=time.time(),
        job_id=one.job_id,
        queue="q",
        task="t",
    )
    assert made.end(1, [end]) == [Ended.ENDED]


def lives(made: PostgresStore, count: int) -> None:
    """Record, claim and end this many jobs."""
    for _ in range(count):
        one_life(made)


def hostile(url: str) -> None:
    """Set harmful defaults in the database."""
    name = urlsplit(url).path[1:]
    with psycopg.connect(url, autocommit=True) as connection:
        for setting, value in HOSTILE.items():
            connection.execute(f"alter database \"{name}\" set {setting} = '{value}'".encode())


def backends(url: str, where: str = "true") -> int:
    """Count the sessions of jobguard on the server."""
    with psycopg.connect(url) as connection:
        row = connection.execute(
            "select count(*) from pg_stat_activity where application_name = 'jobguard'"
            f" and datname = current_database() and {where}".encode()
        ).fetchone()
    assert row is not None
    return int(row[0])


@pytest.fixture
def pooled(database: str) -> Iterator[Pooler]:
    """Start a pooler in front of a database."""
    with Pooler(database) as made:
        yield made


# -- the settings of a session ---------------------------------------------------------------------


def shown(db: Database) -> dict[str, str]:
    """Return the settings that hold inside a statement of jobguard."""
    query = ", ".join(f"current_setting('{name}')" for name in SHOWN)
    return dict(zip(SHOWN, db.execute(f"select {query}")[0], strict=True))


def test_a_session_sets_what_its_statements_rely_on(database: str) -> None:
    """A session sets what its statements need, directly and with an announced pooler."""
    hostile(database)

    for more in ({}, {"pooler": True}):
        db = database_of(database, **more)
        assert shown(db) == SHOWN
        db.close()
        made = store(database, **more)
        one_life(made)
        made.close()


def test_behind_a_pooler_each_transaction_sets_it(pooled: Pooler) -> None:
    """A pooler that was not announced is detected, and its session stays unchanged."""
    hostile(pooled.url)
    db = database_of(pooled.client_url)

    assert shown(db) == SHOWN
    one_life(store(pooled.client_url))

    # The same session, as the next client of the pooler gets it.
    with psycopg.connect(pooled.client_url, prepare_threshold=None, autocommit=True) as other:
        for name in (
            "search_path",
            "TimeZone",
            "statement_timeout",
            "default_transaction_isolation",
        ):
            assert other.execute("select current_setting(%s)", [name]).fetchone() == (
                HOSTILE[name],
            )
        assert other.execute("select count(*) from pg_prepared_statements").fetchone() == (0,)


def test_one_does_not_run_the_statement_of_another(pooled: Pooler) -> None:
    """Two processes share one session, and each runs its own first statement."""
    first, second = database_of(pooled.client_url), database_of(pooled.client_url)

    for _ in range(3):
        assert first.execute("select 'first', %(a)s::int", {"a": 1}) == [("first", 1)]
        assert second.execute("select 'second', %(a)s::int", {"a": 1}) == [("second", 1)]


def test_a_pooler_that_hides_itself(database: str) -> None:
    """The name of a prepared statement depends on its text, so no process runs another one's statement."""
    with (
        Pooler(database, size=2, hidden=True) as pooler,
        psycopg.connect(pooler.client_url, prepare_threshold=None) as one,
        psycopg.connect(pooler.client_url, prepare_threshold=None) as other,
    ):
        first, second = database_of(pooler.client_url), database_of(pooler.client_url)
        one.execute("select 1")  # keeps a session from the others until it commits
        assert first.execute("select 'first', %(a)s::int", {"a": 1}) == [("first", 1)]
        other.execute("select 1")
        one.commit()
        assert second.execute("select 'second', %(a)s::int", {"a": 1}) == [("second", 1)]

        # The first process runs its own statement in the session where the second prepared one.
        assert first.execute("select 'first', %(a)s::int", {"a": 2}) == [("first", 2)]
        other.commit()


def test_an_error_behind_a_pooler_leaves_no_transaction(pooled: Pooler) -> None:
    """The session returns to the pooler, and the next statement is answered."""
    db = database_of(pooled.client_url)
    for _ in range(2):
        with pytest.raises(NotWritten):
            db.execute("select 1 / (select count(*) from nowhere)")
    assert db.execute("select 1") == [(1,)]
    assert database_of(pooled.client_url).execute("select 2") == [(2,)]


def test_vacuum_behind_a_pooler(pooled: Pooler) -> None:
    """VACUUM works behind a pooler, outside a transaction."""
    leader = PostgresLeaderStore(lambda: pooled.client_url, "d", uuid.uuid4(), settings_from())
    one_life(store(pooled.client_url))
    with psycopg.connect(pooled.url, autocommit=True) as connection:
        connection.execute("select pg_stat_force_next_flush()")

    def vacuumed() -> bool:
        return "jobs" in leader.vacuum(least=0)

    eventually(vacuumed)


# -- deadlines -------------------------------------------------------------------------------------


def test_the_server_gives_up_before_we_do(database: str) -> None:
    """A statement that waits for a lock ends on the server, and the session remains usable."""
    db = database_of(database, call_timeout=0.25)
    db.execute("select 1", timeout=LONG)
    with psycopg.connect(database) as holder:
        holder.execute("lock table jobguard.jobs")
        pids: set[int] = set()
        for _ in range(3):
            with pytest.raises(NotWritten):
                db.execute("select count(*) from jobguard.jobs", timeout=1.0)
            pids.update(db.execute("select pg_backend_pid()", timeout=LONG)[0])
        assert len(pids) == 1
    assert db.execute("select count(*) from jobguard.jobs", timeout=LONG) == [(0,)]


def test_a_call_that_is_given_up_is_cancelled() -> None:
    """A commit that waits for a lost standby has no time limit, so a cancel request ends it."""
    with PostgresServer(fsync=False, settings={"synchronous_standby_names": "nosuch"}) as server:
        with psycopg.connect(server.url, autocommit=True) as connection:
            connection.execute("set synchronous_commit = local")
            connection.execute("create table public.t (n int)")
        db = database_of(server.url, call_timeout=0.3)
        for n in range(5):
            with pytest.raises(StoreUnavailable, match="in time"):
                db.execute("insert into public.t values (%(n)s)", {"n": n})
        eventually(lambda: backends(server.url, "wait_event = 'SyncRep'") == 0)
        assert backends(server.url) == 0


def test_giving_up_waits_for_nothing(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cancel request without an answer delays neither its call nor the next one."""
    begun, go_on = threading.Event(), threading.Event()

    def stuck(_pgconn: Any) -> None:
        begun.set()
        go_on.wait(60)

    monkeypatch.setattr(wire, "_cancel", stuck)
    monkeypatch.setattr(wire, "_MARGIN", 100.0)  # the server does not give up before the client
    db = database_of(database)
    try:
        for _ in range(8):
            with pytest.raises(StoreUnavailable, match="in time"):
                db.execute("select pg_sleep(60)", timeout=0.3)
        assert begun.wait(10)
        workers = [t for t in threading.enumerate() if t.name == "jobguard-cancel"]
        assert len(workers) == 1
    finally:
        go_on.set()


def test_a_role_without_connections_is_named(database: str, postgres_server: Any) -> None:
    """The error names the limit, and has its own class."""
    role = f"jobguard_{uuid.uuid4().hex}"
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute(f"create role {role} login connection limit 1".encode())
    try:
        url = database.replace("postgres@", f"{role}@")
        one, other = database_of(url), database_of(url)
        one.execute("select 1")
        with pytest.raises(TooManyConnections, match=r"too many connections.*limit"):
            other.execute("select 1")
        one.close()
        eventually(lambda: _answers(other))
        other.close()
    finally:
        with psycopg.connect(database, autocommit=True) as connection:
            connection.execute(f"drop role {role}".encode())


def _answers(db: Database) -> bool:
    with contextlib.suppress(StoreUnavailable):
        return db.execute("select 1") == [(1,)]
    return False


# -- names -----------------------------------------------------------------------------------------


class Resolver:
    """A replacement for the system's resolver."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[str] = []
        self.answer = threading.Event()
        self.there: list[str] = []
        monkeypatch.setattr(_socket, "getaddrinfo", self)
        monkeypatch.setattr("jobguard.store.connection.names", Names())

    def __call__(self, host: str, *_: Any) -> list[Any]:
        """Answer when the test allows it."""
        self.asked.append(host)
        self.answer.wait(60)
        if not self.there:
            raise OSError("no such name")
        return [(0, 0, 0, "", (address, 0)) for address in self.there]


@pytest.fixture
def resolver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Resolver]:
    """Return a resolver that does not answer before the test allows it."""
    made = Resolver(monkeypatch)
    yield made
    made.answer.set()


def test_a_resolver_that_does_not_answer_delays_no_caller(
    database: str, resolver: Resolver
) -> None:
    """Calls fail in their own time, one thread asks once, and after its answer calls succeed."""
    url = database.replace("127.0.0.1", "db.example")
    dbs = [database_of(url, connect_timeout=0.05) for _ in range(5)]
    for db in dbs:
        with pytest.raises(NotWritten, match=r"name db\.example"):
            db.execute("select 1")
        assert not db.probe()
    assert resolver.asked == ["db.example"]
    assert sum(t.name == "jobguard-names" for t in threading.enumerate()) == 1

    resolver.there = ["127.0.0.1"]
    resolver.answer.set()
    eventually(dbs[0].probe)
    assert dbs[0].execute("select 1") == [(1,)]
    assert database_of(url).execute("select 1") == [(1,)]
    assert resolver.asked == ["db.example"]


def test_a_name_that_cannot_be_resolved_any_more(database: str, resolver: Resolver) -> None:
    """The old addresses are used while the resolver gives no answer, and when it finds none."""
    url = database.replace("127.0.0.1", "db.example")
    resolver.there = ["127.0.0.1"]
    resolver.answer.set()
    db = database_of(url)
    db.execute("select 1")
    db._drop(elsewhere=True)  # the name is resolved again
    resolver.answer.clear()
    assert db.execute("select 1") == [(1,)]

    db._drop(elsewhere=True)
    resolver.there = []
    resolver.answer.set()
    assert db.execute("select 1") == [(1,)]


def test_a_name_without_an_address_is_an_outage(database: str, resolver: Resolver) -> None:
    """The error has the text of the system's error."""
    resolver.answer.set()
    db = database_of(database.replace("127.0.0.1", "db.example"))
    with pytest.raises(NotWritten, match="no such name"):
        db.execute("select 1")


def test_without_poll(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without select.poll, which Eventlet removes, large and small statements are answered."""
    monkeypatch.delattr(select, "poll")
    db = database_of(database)
    assert db.execute("select 1") == [(1,)]
    text = "x" * 8_000_000
    assert db.execute("select length(%(t)s)", {"t": text}) == [(len(text),)]


def test_with_a_libpq_without_pipelines(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before libpq 14 statements are sent one by one."""
    monkeypatch.setattr("jobguard.store.wire._PIPELINES", False)
    for more in ({}, {"pooler": True}):
        made = store(database, **more)
        one_life(made)
        made.close()


# -- several hosts ---------------------------------------------------------------------------------


def several(*urls: str) -> str:
    """Return one URL of several servers, with the database of the last."""
    hosts = ",".join(f"{urlsplit(url).hostname}:{urlsplit(url).port}" for url in urls)
    return f"postgresql://postgres@{hosts}{urlsplit(urls[-1]).path}"


def test_a_silent_first_host_is_left(database: str) -> None:
    """Each host gets a share of the time, and the host that answered is asked first from then on."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(0.0)
        url = several(f"postgresql://x@127.0.0.1:{silent.getsockname()[1]}/x", database)
        for waiting in (True, False):
            db = database_of(url, connect_timeout=4.0)
            if waiting:
                db.execute("select 1")
            else:
                eventually(db.probe)
            silent.accept()[0].close()
            db.close()
            assert db.execute("select 1") == [(1,)]
            with pytest.raises(BlockingIOError):
                silent.accept()
            db.close()


def test_a_primary_that_falls_silent_is_left(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a session ended at a deadline, the next one is not opened at the same host."""
    with Pooler(database) as proxy:
        url = several(proxy.client_url, database)
        db = database_of(url)
        port = "select inet_server_port()"
        db.execute(port)
        monkeypatch.setattr(wire, "_MARGIN", 100.0)
        assert db._first is not None
        assert db._first.port == str(urlsplit(proxy.client_url).port)
        logins = proxy.logins
        with pytest.raises(StoreUnavailable):
            db.execute("select pg_sleep(60)", timeout=0.3)
        db.execute(port)
        assert proxy.logins == logins
        assert db._first is not None
        assert db._first.port == str(urlsplit(database).port)


@pytest.fixture
def standby(tmp_path: Any) -> Iterator[PostgresServer]:
    """Start a standby server without a primary."""

    class Standby(PostgresServer):
        def _answers(self, pid: int) -> bool:
            with contextlib.suppress(psycopg.OperationalError):
                psycopg.connect(self.url, connect_timeout=5).close()
                return True
            return False

    with Standby(fsync=False) as server:
        jobguard.schema.migrate(server.url)
        server.stop()
        (server.data_dir / "standby.signal").touch()
        server.start()
        yield server


def test_a_standby_is_no_place_to_write(standby: PostgresServer, database: str) -> None:
    """A standby is refused at the login, and among several hosts the primary is found."""
    with pytest.raises(NotWritten, match=r"standby|recovery"):
        database_of(standby.url).execute("select 1")
    there = several(standby.url, database)
    for more in ({}, {"pooler": True}):
        made = store(there, **more)
        one_life(made)
        made.close()


def test_a_read_only_answer_drops_the_connection(standby: PostgresServer, database: str) -> None:
    """After a read-only answer the connection is dropped, and the next one resolves the address again."""
    urls = [standby.url]
    db = Database(lambda: urls[-1], connect_timeout=LONG, call_timeout=LONG, pooler=True)
    with pytest.raises(NotWritten, match="recovery"):
        db.execute("select 1")
    urls.append(database)
    assert db.execute("select count(*) from jobguard.jobs") == [(0,)]


# -- a real pgbouncer ------------------------------------------------------------------------------


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """Make a folder that every user may enter, unlike the folders above tmp_path."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o777)
        yield folder


@pytest.mark.skipif(shutil.which("pgbouncer") is None, reason="pgbouncer is not installed")
def test_behind_pgbouncer(database: str, open_folder: Path) -> None:
    """Forty clients share five sessions in transaction mode, without a setting."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    there = urlsplit(database)
    (open_folder / "users").write_text('"postgres" ""\n')
    (open_folder / "ini").write_text(
        f"[databases]\n* = host=127.0.0.1 port={there.port} user=postgres\n[pgbouncer]\n"
        f"listen_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\nauth_type = any\n"
        f"auth_file = {open_folder / 'users'}\npool_mode = transaction\ndefault_pool_size = 5\n"
        f"logfile = {open_folder / 'log'}\npidfile = {open_folder / 'pid'}\n"
    )
    for path in open_folder.iterdir():
        path.chmod(0o666)
    hostile(database)
    user: dict[str, Any] = {} if os.geteuid() else {"user": "nobody", "group": "nogroup"}
    with subprocess.Popen(["pgbouncer", "-q", str(open_folder / "ini")], **user) as bouncer:
        try:
            url = f"postgresql://postgres@127.0.0.1:{port}{there.path}"
            eventually(lambda: _answers(database_of(url)), 60)
            stores = [store(url) for _ in range(40)]
            threads = [threading.Thread(target=lives, args=(each, 3)) for each in stores]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            with psycopg.connect(database, autocommit=True) as connection:
                connection.execute("set statement_timeout = 0")
                row = connection.execute(
                    "select (select count(*) from jobguard.jobs), (select count(*) from jobguard.history),"
                    " (select count(*) from pg_stat_activity where client_port is not null"
                    "  and pid <> pg_backend_pid() and datname = current_database()) <= 5"
                ).fetchone()
            assert row == (120, 120, True)
        finally:
            bouncer.terminate()


# -- the identity of the server --------------------------------------------------------------------


@pytest.mark.parametrize("state", ["42501", "0A000", "55000", "XX000", "22023"])
def test_a_server_that_refuses_its_identifier(empty_database: str, state: str) -> None:
    """A server that refuses its identifier is migrated and led, and known by the rest of its identity."""
    with psycopg.connect(empty_database, autocommit=True) as connection:
        connection.execute("set allow_system_table_mods = on")
        connection.execute("alter function pg_control_system() rename to pg_kept_system")
        refusal = (
            "create function pg_catalog.pg_control_system() returns table (system_identifier bigint)"
            f" language plpgsql as $$ begin raise exception 'no' using errcode = '{state}'; end $$"
        )
        connection.execute(refusal.encode())
    jobguard.schema.migrate(empty_database)
    leader = PostgresLeaderStore(
        lambda: empty_database, "d", uuid.uuid4(), settings_from({"connect_timeout": LONG})
    )

    with psycopg.connect(empty_database, autocommit=True) as connection:
        jobguard.schema.accept_move(connection)
    known = leader.identity()

    assert known["system_identifier"] is known["system_now"] is None
    assert known["database_oid"] == known["database_now"]
    ledger = PostgresLedger(lambda: empty_database)
    shown = ledger.overview("d")["installation"]
    assert (shown["moved"], shown["system_now"]) == (False, None)
    ledger.close()
    leader.close()


def test_people_and_migrations_rely_on_no_default(empty_database: str) -> None:
    """Commands for people and migrations work with any default of the database."""
    hostile(empty_database)
    jobguard.schema.migrate(empty_database)
    ledger = PostgresLedger(lambda: empty_database)
    one_life(store(empty_database))
    ledger.pause("d", queue=None)
    assert ledger.overview("d")["brake"]["paused_at"] is not None
    ledger.close()


@pytest.mark.parametrize(
    ("state", "kind"),
    [
        *((state, BadRow) for state in ("22001", "23514", "54000", "P0001", "42804")),
        *((state, StoreUnavailable) for state in ("53100", "57014", "55000", "58030")),
    ],
)
def test_what_postgres_refuses_for_a_rows_own_sake(
    database: str, state: str, kind: type[Exception]
) -> None:
    """Only an error of the row itself sets the row aside; others mean that PostgreSQL is away."""
    db = Database(lambda: database, connect_timeout=LONG, call_timeout=LONG)
    text = f"do $$ begin raise exception 'no' using errcode = '{state}'; end $$"
    with pytest.raises(kind) as raised:
        db.execute(text)
    assert isinstance(raised.value, BadRow) == (kind is BadRow)
    db.close()


def test_an_answer_is_read_by_another_call_if_it_comes_first(database: str) -> None:
    """A statement whose caller does other work does not block the connection for other callers."""
    db = database_of(database)
    flight = db.begin("select 1", None)
    assert db.execute("select 2") == [(2,)]
    assert flight.read() == [(1,)]
    db.close()


def test_a_lost_answer_is_asked_again(database: str) -> None:
    """A statement whose connection broke before its answer was read is sent again."""
    db = database_of(database)
    (pid,) = db.execute("select pg_backend_pid()")[0]
    with psycopg.connect(database, autocommit=True) as other:
        flight = db.begin("select pg_sleep(0.3), 1", None)
        other.execute("select pg_terminate_backend(%s)", (pid,))
        assert flight.read()[0][1] == 1
    db.close()


def test_a_record_waits_for_an_end_that_deletes_its_row(database: str) -> None:
    """A late record that meets the end of its delivery is not owed after the end is committed."""
    records, it = store(database), delivery(fresh=True)
    records.record(1, [it], namespace="d")
    with psycopg.connect(database) as other:
        other.execute("delete from jobguard.jobs where token = %s", (it.token,))
        other.execute(
            "insert into jobguard.history (source, token, job_id, queue, task, outcome)"
            " values (1, %s, 'j', 'q', 't', 'completed')",
            (it.token,),
        )
        result = records.record_beside(1, it, namespace="d")
        blocked = "select from pg_locks where not granted"
        with psycopg.connect(database, autocommit=True) as watcher:
            eventually(lambda: watcher.execute(blocked).fetchone() is not None)
        other.commit()
        assert result().written
        assert other.execute("select count(*) from jobguard.jobs").fetchone() == (0,)
    records.close()


def test_a_time_limit_of_the_application_ends_a_connect() -> None:
    """The TimeoutError of its signal handler is not taken for a PostgreSQL that does not answer."""

    def handler(number: int, frame: object) -> None:
        raise TimeoutError("of the application")

    before = signal.signal(signal.SIGALRM, handler)
    try:
        with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as silent:
            url = f"postgresql://x@127.0.0.1:{silent.getsockname()[1]}/x"
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            with pytest.raises(TimeoutError, match="of the application"):
                database_of(url).execute("select 1")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("way", ["begin", "execute"])
def test_a_call_does_not_take_the_answer_of_an_interrupted_one(
    database: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal may stop a caller after its statement was sent and before it waits for the answer."""
    made = database_of(database)
    assert made.execute("select 0") == [(0,)]
    with monkeypatch.context() as patch:
        original = wire.Session.begin

        def interrupted(self: wire.Session, *args: Any, **named: Any) -> Any:
            original(self, *args, **named)
            raise KeyboardInterrupt

        patch.setattr(wire.Session, "begin", interrupted)
        with pytest.raises(KeyboardInterrupt):
            if way == "begin":
                made.begin("select 1", None)
            else:
                made.execute("select 1")
    if way == "begin":
        assert made.begin("select 2", None).read() == [(2,)]
    assert made.execute("select 3") == [(3,)]
