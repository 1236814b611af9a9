"""Migrated databases for tests, which are used again as long as they are as new, and sessions with them.

A copy of a database costs the server more than most tests do: it writes ten megabytes, and makes and
deletes three hundred files.
"""

from __future__ import annotations

import subprocess
import uuid
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import psycopg
import pytest
from psycopg import sql

import jobguard.schema
from jobguard.demo.servers.postgres import postgres_bin

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jobguard.demo.servers import NamedPostgres

# A change of a definition, of a right or of a comment is a row that a younger transaction wrote, or one
# row less. A vacuum and an analyze change the plans of later statements.
_CATALOGS = (
    *("pg_attrdef", "pg_attribute", "pg_class", "pg_constraint", "pg_default_acl", "pg_depend"),
    *("pg_description", "pg_event_trigger", "pg_extension", "pg_index", "pg_inherits"),
    *("pg_largeobject_metadata", "pg_namespace", "pg_policy", "pg_proc", "pg_publication"),
    *("pg_rewrite", "pg_statistic", "pg_trigger", "pg_type"),
)
_STATE = " union all ".join(
    [
        *(f"select count(*), max(xmin::text::bigint)::text from {name}" for name in _CATALOGS),
        "select sum(relpages), sum(reltuples)::text from pg_class"
        " where relnamespace = 'jobguard'::regnamespace and relkind in ('r', 'i')",
        "select datconnlimit, concat(datdba, datacl) from pg_database"
        " where datname = current_database()",
        "select count(*), null from pg_db_role_setting join pg_database on setdatabase = oid"
        " where datname = current_database()",
        "select count(*), null from pg_shdepend join pg_database d on dbid = d.oid"
        " where datname = current_database()",
    ]
)
_TABLES = """
select relname from pg_class where relnamespace = 'jobguard'::regnamespace and relkind in ('r', 'p')
and not relispartition
"""
_RESTART_SEQUENCES = """
select setval(format('%I.%I', schemaname, sequencename)::regclass, start_value, false)
from pg_sequences where schemaname = 'jobguard' and last_value is not null
"""
_TABLES_OF_APPLICATIONS = """
select relname from pg_class where relnamespace = 'public'::regnamespace and relkind in ('r', 'p')
and not relispartition
"""
_END_SESSIONS = """
select pg_terminate_backend(pid, 10000) from pg_stat_activity where datname = %s
"""
_RENAME = sql.SQL("alter database {} rename to {}")
_DROP_TABLE = sql.SQL("drop table {} cascade")
_COPY_OUT, _COPY_IN = sql.SQL("copy (table {}) to stdout"), sql.SQL("copy {} from stdin")
_MUCH = 2**20
"""Bytes of dead rows that a database which is used again may contain."""


class Session:
    """The session of a test with a database: begun by the first query, kept, and begun again if it is lost.

    A test that waits asks many times a second, and a new session costs the server more than the query.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._connection: psycopg.Connection[Any] | None = None

    def ask(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        """Run a query, in which %s stands for a value and %% for a percent sign, and return its rows."""
        try:
            return self._run(query, values)
        except psycopg.OperationalError:
            if self._connection is not None and not self._connection.closed:
                raise  # the server refused this query
            return self._run(query, values)

    def _run(self, query: str, values: Sequence[Any]) -> list[tuple[Any, ...]]:
        if self._connection is None or self._connection.closed:
            self._connection = psycopg.connect(
                self.url, autocommit=True, connect_timeout=5, prepare_threshold=None
            )
        cursor = self._connection.execute(query.encode(), values)
        return cursor.fetchall() if cursor.description is not None else []

    def close(self) -> None:
        """End the session."""
        if self._connection is not None:
            self._connection.close()


_kept = Session("")


def rows(url: str, query: str, *values: Any) -> list[tuple[Any, ...]]:
    """Return the rows of a query, in a session that is kept for the next query of the same database."""
    global _kept
    if _kept.url != url:
        _kept.close()
        _kept = Session(url)
    return _kept.ask(query, *values)


class Databases:
    """Clones of a migrated database, each used by one test after another.

    Each test gets a name of its own, so that no process of an earlier test can reach the database.
    If a test changed more than rows and tables of an application, its database is dropped.
    """

    def __init__(self, server: NamedPostgres, template: str) -> None:
        self._server, self._template = server, template
        self._taken: dict[str, _AsNew] = {}
        self._free: list[tuple[str, _AsNew]] = []

    def take(self) -> str:
        """Return the URL of a database that is as new."""
        if self._free:
            name, as_new = self._free.pop()
        else:
            name = _new_name()
            url = self._server.create_database(name, self._template)
            with psycopg.connect(url) as connection:
                # A clone is a copy, and a copy restores no jobs.
                jobguard.schema.accept_move(connection)
            as_new = _AsNew(url)
        self._taken[name] = as_new
        return self._server.database_url(name)

    def give_back(self, url: str) -> None:
        """End all sessions of a database, and keep it for another test if it can be made as new."""
        name, again = urlsplit(url).path.removeprefix("/"), _new_name()
        as_new = self._taken.pop(name)
        try:
            with psycopg.connect(self._server.url, autocommit=True) as connection:
                connection.execute(_END_SESSIONS, [name])
                connection.execute(_RENAME.format(sql.Identifier(name), sql.Identifier(again)))
            if as_new.restore(self._server.database_url(again)):
                self._free.append((again, as_new))
                return
        except psycopg.Error:  # a session does not end, or the server is not ours to command
            self._server.drop_database(name)
        self._server.drop_database(again)

    def close(self) -> None:
        """Drop the databases that no test uses."""
        for name, _ in self._free:
            self._server.drop_database(name)


class _AsNew:
    """What a database contains and how it is defined when it is new."""

    def __init__(self, url: str) -> None:
        with psycopg.connect(url) as connection:
            self._state = connection.execute(_STATE).fetchall()
            self._size = _size(connection)
            names = sorted(name for (name,) in connection.execute(_TABLES))
            tables = [sql.Identifier("jobguard", name) for name in names]
            self._rows = [(table, rows) for table in tables if (rows := _rows(connection, table))]
            self._delete = sql.SQL("; ").join(sql.SQL("delete from {}").format(t) for t in tables)

    def restore(self, url: str) -> bool:
        """Restore the rows, and return True; or False if the definitions have changed."""
        with psycopg.connect(url) as connection:
            for (name,) in connection.execute(_TABLES_OF_APPLICATIONS).fetchall():
                connection.execute(_DROP_TABLE.format(sql.Identifier("public", name)))
            if connection.execute(_STATE).fetchall() != self._state:
                return False
            if _size(connection) > self._size + _MUCH:
                return False
            connection.execute("set track_counts = off")  # no vacuum is due because of us
            connection.execute(self._delete)
            for table, rows in self._rows:
                with connection.cursor().copy(_COPY_IN.format(table)) as copy:
                    copy.write(rows)
            connection.execute(_RESTART_SEQUENCES)
            connection.execute("select pg_stat_reset()")
        return True


def _new_name() -> str:
    return f"jobguard_test_{uuid.uuid4().hex}"


def _size(connection: psycopg.Connection[Any]) -> int:
    ((size,),) = connection.execute("select pg_database_size(current_database())").fetchall()
    return int(size)


def _rows(connection: psycopg.Connection[Any], table: sql.Identifier) -> bytes:
    with connection.cursor().copy(_COPY_OUT.format(table)) as copy:
        return b"".join(copy)


def copy_database(database: str, into: str) -> None:
    """Dump a database and load the dump into another one, as one does to build a staging system.

    Skip the test where the server came without pg_dump.
    """
    tools = postgres_bin()
    if not (tools / "pg_dump").exists() or not (tools / "psql").exists():
        pytest.skip(f"there is no pg_dump in {tools}")
    dump = subprocess.run([str(tools / "pg_dump"), "-d", database], capture_output=True, check=True)
    subprocess.run(
        [str(tools / "psql"), "-q", "-v", "ON_ERROR_STOP=1", "-d", into],
        input=dump.stdout,
        stdout=subprocess.DEVNULL,
        check=True,
    )
