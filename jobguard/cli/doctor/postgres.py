"""The database: it answers, its schema fits, this role may use it, and it keeps what it takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from typing import TYPE_CHECKING, Any

from jobguard import schema
from jobguard.cli.doctor.finding import Finding, note, ok, problem
from jobguard.conninfo import describe
from jobguard.errors import JobguardError
from jobguard.schema import GRANT_A_ROLE
from jobguard.schema.roles import APP, READER, RECONCILER, rights
from jobguard.store.connection import Database

if TYPE_CHECKING:
    import psycopg

_CONNECTIONS_LEFT = 5


def check_postgres(conninfo: Callable[[], str], *, pooler: bool) -> Iterator[Finding]:
    """Check the database that the command line names."""
    import psycopg

    try:
        where = conninfo()
        with psycopg.connect(where, autocommit=True, connect_timeout=5) as connection:
            version = connection.info.server_version // 10000
            yield ok("postgres", f"{describe(where)}, PostgreSQL {version}")
            yield from _judge_server(connection, pooler=pooler)
            yield from _judge_session(conninfo, pooler=pooler)
            mismatch = schema.check(connection)
            if mismatch is not None:
                yield problem("schema", str(mismatch))
                return
            yield ok("schema", f"migration {schema.latest()}")
            yield from _judge_durability(connection)
            yield from _judge_rights(connection)
    except (psycopg.Error, JobguardError) as error:
        yield problem("postgres", str(error))


_SERVER = """
select pg_is_in_recovery(), pg_backend_pid(),
  current_setting('max_connections')::int as most,
  case when r.rolsuper then 0 else current_setting('superuser_reserved_connections')::int
    + coalesce(current_setting('reserved_connections', true), '0')::int end as reserved,
  (select sum(numbackends)::int from pg_stat_database) as used,
  r.rolconnlimit,
  (select count(*)::int from pg_stat_activity where usename = current_user) as of_role,
  d.datconnlimit,
  (select numbackends from pg_stat_database where datname = current_database()) as of_database
from pg_roles r, pg_database d
where r.rolname = current_user and d.datname = current_database()
"""


def _judge_server(connection: psycopg.Connection[Any], *, pooler: bool) -> Iterator[Finding]:
    row = connection.execute(_SERVER).fetchone()
    assert row is not None
    standby, pid, most, reserved, used, role_limit, of_role, limit, of_database = row
    if standby:
        yield problem(
            "postgres",
            "this server is a standby and accepts no writes: name the primary, or all hosts with "
            "target_session_attrs=read-write",
        )
    if pid != connection.info.backend_pid and not pooler:
        yield note(
            "postgres", "the connection goes through a pooler: set JOBGUARD_POOLER=1 everywhere"
        )
    limits = [(most - reserved - used, f"max_connections {most}, {used} in use")]
    if role_limit >= 0:
        limits.append((role_limit - of_role, f"limit of the role {role_limit}, {of_role} in use"))
    if limit >= 0:
        limits.append((limit - of_database, f"limit of the database {limit}, {of_database} in use"))
    left, why = min(limits)
    detail = f"{max(0, left)} connections left ({why})"
    if left < _CONNECTIONS_LEFT:
        yield problem(
            "connections",
            f"{detail}: a worker needs 2, a producer 1, a reconciler 3; raise the limit",
        )
    else:
        yield ok("connections", detail)


def _judge_session(conninfo: Callable[[], str], *, pooler: bool) -> Iterator[Finding]:
    """Check a session as a host opens it, with the defaults of the role and the database."""
    query = (
        "select current_setting('transaction_isolation'), current_setting('transaction_read_only')"
    )
    database = Database(conninfo, connect_timeout=5.0, call_timeout=5.0, pooler=pooler)
    with closing(database):
        ((isolation, read_only),) = database.execute(query)
    if read_only == "on":
        yield problem(
            "postgres",
            "sessions of this role are read-only: name the primary, and reset "
            "default_transaction_read_only of the role and the database",
        )
    if isolation != "read committed":
        yield problem(
            "postgres",
            f"sessions of this role are {isolation}; jobguard needs read committed: "
            "alter role … set default_transaction_isolation = 'read committed'",
        )


_DURABILITY = """
select current_setting('fsync'), current_setting('synchronous_commit'), current_setting('autovacuum'),
       current_setting('synchronous_standby_names'),
       (select count(*) from pg_stat_replication where state = 'streaming')
"""


def _judge_durability(connection: psycopg.Connection[Any]) -> Iterator[Finding]:
    """Check whether the server keeps what it has taken."""
    row = connection.execute(_DURABILITY).fetchone()
    assert row is not None
    fsync, commit, autovacuum, standbys, replicas = row
    if fsync != "on":
        yield problem(
            "postgres",
            "fsync is off",
            "a crash of its machine can lose or damage the ledger",
            "alter system set fsync = on",
        )
    if commit == "off":
        yield problem(
            "postgres",
            "synchronous_commit is off for this role",
            "a crash forgets the newest records: accepted jobs are lost, and ended jobs run again",
            "alter role … set synchronous_commit = on; relax single applications with durability='relaxed'",
        )
    if autovacuum != "on":
        yield note(
            "postgres",
            "autovacuum is off",
            "the tables of jobs that come and go grow",
            "alter system set autovacuum = on",
        )
    if replicas and not standbys:
        yield note(
            "replication",
            f"{replicas} replicas follow asynchronously",
            "a failover may forget the last commits; the leader notices this, stops, and asks a person",
            "alter system set synchronous_standby_names = 'ANY 1 (*)'",
        )
    elif replicas:
        yield ok("replication", f"{replicas} replicas, synchronous: {standbys}")


_FOR = {APP: "producers and workers", RECONCILER: "a reconciler", READER: "reading"}
_GRANTED = """
select c.relname, p.privilege,
       case when p.privilege = 'select' then has_any_column_privilege(c.oid, 'select')
            else has_table_privilege(c.oid, p.privilege) end
from pg_class c, unnest(array['select', 'insert', 'update', 'delete']) p(privilege)
where c.relnamespace = 'jobguard'::regnamespace and c.relkind in ('r', 'p') and not c.relispartition
"""


def _judge_rights(connection: psycopg.Connection[Any]) -> Iterator[Finding]:
    """Compare the rights of this role with those of the roles of jobguard."""
    has = {(table, right): bool(given) for table, right, given in connection.execute(_GRANTED)}
    tables = sorted({table for table, _ in has})
    lacks = {
        role: [
            f"no {right} on {table}"
            for table, wanted in rights(role, tables).items()
            for right in wanted
            if not has[table, right]
        ]
        for role in _FOR
    }
    user = connection.info.user
    fits = [what for role, what in _FOR.items() if not lacks[role]]
    if lacks[APP] and lacks[RECONCILER]:
        role = min((APP, RECONCILER), key=lambda role: len(lacks[role]))
        missing = ", ".join(lacks[role][:10])
        may = f"{user} is enough for {', '.join(fits) or 'nothing'}. For {_FOR[role]} it lacks: {missing}"
        yield problem("rights", f"{may}: {GRANT_A_ROLE}")
    else:
        yield ok("rights", f"{user} has the rights for {', '.join(fits)}")
