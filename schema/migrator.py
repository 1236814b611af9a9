"""Bring a database to the schema of this jobguard, safely beside other processes that do the same.

Each migration runs in a transaction of its own, which first takes one lock and inserts its number into
``jobguard.migrations``. A second process waits, finds the number, and continues with the next
migration, so two machines can migrate at the same time. An applied migration is never applied again. A
mismatch raises an error that names the next step, and nothing is changed.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from jobguard.conninfo import describe, normalise
from jobguard.errors import (
    ConfigurationError,
    JobguardError,
    NoRights,
    NotMigrated,
    SchemaMismatch,
    StoreUnavailable,
    WrongInstallation,
)
from jobguard.schema.roles import ROLES, roles_sql

if TYPE_CHECKING:
    import psycopg

OLDEST_SERVER: Final = 140000
_CONNECT_TIMEOUT = 30
"""Seconds: long enough for a database that starts at its first connection."""

GRANT_A_ROLE: Final = (
    "run `jobguard migrate --roles` as the owner, and grant it jobguard_app (producers and workers), "
    "jobguard_reconciler or jobguard_reader"
)

LOCK: Final = "select pg_advisory_xact_lock(hashtextextended('jobguard.migrate', 0))"

BOOKKEEPING: Final = """\
create table if not exists jobguard.migrations (
  number     integer     primary key,
  name       text        not null,
  checksum   text        not null,
  applied_at timestamptz not null default now()
)"""

# Some database hosting services do not permit pg_control_system(); there the oid alone must be
# enough.
ACCEPT_MOVE: Final = """\
do $$
declare
  present text;
begin
  begin
    select system_identifier::text into present from pg_control_system();
  exception when others then
    present := null;
  end;
  update jobguard.installation set
    system_identifier = present,
    database_oid = (select oid from pg_database where datname = current_database()){only};
end
$$"""


@dataclass(frozen=True, slots=True)
class Migration:
    """One numbered file."""

    number: int
    name: str
    text: str

    @property
    def checksum(self) -> str:
        """Return the hash that shows whether the applied file is this one."""
        return hashlib.sha256(self.text.encode()).hexdigest()


@functools.cache
def migrations() -> tuple[Migration, ...]:
    """Return every migration that this jobguard knows, in order."""
    files = sorted(Path(__file__).with_name("migrations").glob("[0-9][0-9][0-9][0-9]_*.sql"))
    found = tuple(
        # Universal newlines: a checkout on another system has the same checksum.
        Migration(int(file.name[:4]), file.stem, file.read_text(encoding="utf-8"))
        for file in files
    )
    if [migration.number for migration in found] != list(range(1, len(found) + 1)):
        raise SchemaMismatch("the migrations of this jobguard are not numbered 1, 2, 3, …")
    return found


def latest() -> int:
    """Return the number of the newest migration that this jobguard knows."""
    return len(migrations())


def sql(*, after: int = 0) -> str:
    """Return the migrations as one script, for a DBA or for a migration of Alembic or Django.

    ``after`` leaves out the first ones: a later migration of yours brings the schema from there to this
    version of jobguard. The script contains neither ``begin`` nor ``commit``: run it in one transaction.
    """
    parts = [
        f"-- The schema of jobguard, migrations {after + 1}..{latest()}. Run it in one transaction.",
        f"{LOCK};",
    ]
    if not after:
        parts += ["create schema if not exists jobguard;", f"{BOOKKEEPING};"]
    for migration in migrations()[after:]:
        claim = (
            "insert into jobguard.migrations (number, name, checksum)\n"
            f"values ({migration.number}, '{migration.name}', '{migration.checksum}');"
        )
        parts += [f"-- {migration.name}", claim, migration.text.strip()]
    parts.append(_accept_move_once() + ";")
    return "\n\n".join(parts) + "\n"


def migrate(url: str, *, installation: str | None = None, roles: bool = False) -> list[str]:
    """Bring the database up to date; return the names of the migrations applied now.

    ``installation`` names the database, so that processes set to another name refuse it. An existing
    name is not changed. ``roles`` creates the roles of jobguard and gives them their rights; roles that
    have rights already get those of new tables without it.

    Raise SchemaMismatch, WrongInstallation, NoRights, StoreUnavailable or ConfigurationError.
    """
    import psycopg
    from psycopg import IsolationLevel

    from jobguard.postgres_hosts import writable

    conninfo = normalise(url)
    try:
        with psycopg.connect(
            writable(conninfo),
            autocommit=True,
            connect_timeout=_CONNECT_TIMEOUT,
            application_name="jobguard migrate",
            client_encoding="utf8",  # the role may have another default
            prepare_threshold=None,
        ) as connection:
            _require_server(connection)
            # Rows that other processes committed during the lock wait must be visible afterwards.
            connection.isolation_level = IsolationLevel.READ_COMMITTED
            connection.read_only = False  # overrides the default of the role
            with _transaction(connection):
                _begin_books(connection)
                _require_name(connection, installation)
            applied = [
                migration.name for migration in migrations() if _apply(connection, migration)
            ]
            with _transaction(connection):
                connection.execute(LOCK)
                connection.execute(_accept_move_once())
                _name(connection, installation)
            if roles or applied:
                _grant(connection, ROLES if roles else _granted_roles(connection))
            return applied
    except psycopg.errors.InsufficientPrivilege as error:
        raise NoRights(
            f"{_first_line(error)}: run `jobguard migrate` as a role that may create in "
            f"{describe(conninfo)}, or give a DBA the output of `jobguard migrate --sql`"
        ) from error
    except psycopg.OperationalError as error:
        raise StoreUnavailable(f"Postgres at {describe(conninfo)}: {_first_line(error)}") from error


def _granted_roles(connection: psycopg.Connection[Any]) -> list[str]:
    rows = connection.execute(
        "select rolname from pg_roles where rolname = any (%s)"
        " and has_schema_privilege(oid, 'jobguard', 'usage') and not rolsuper",
        [list(ROLES)],
    )
    return [str(name) for (name,) in rows]


def _grant(connection: psycopg.Connection[Any], roles: Sequence[str]) -> None:
    import psycopg

    if not roles:
        return
    try:
        with _transaction(connection):
            connection.execute(LOCK)
            connection.execute(roles_sql(roles).encode())
    except psycopg.errors.InsufficientPrivilege as error:
        raise NoRights(
            f"{_first_line(error)}: creating the roles {', '.join(roles)} and granting them rights needs "
            "CREATEROLE and the ownership of the schema; give a DBA the output of "
            "`jobguard migrate --roles --sql`"
        ) from error


def check(connection: psycopg.Connection[Any]) -> JobguardError | None:
    """Return the error in the database's schema, ready to be raised; None if the schema fits.

    This function only reads, and leaves a transaction as it was.
    """
    if connection.info.server_version < OLDEST_SERVER:
        return _too_old(connection)
    row = connection.execute(
        "select count(c.oid), bool_or(c.relname = 'migrations'),"
        " bool_or(has_schema_privilege(n.oid, 'usage')),"
        " bool_or(c.relname = 'migrations' and has_any_column_privilege(c.oid, 'select'))"
        " from pg_namespace n"
        " left join pg_class c on c.relnamespace = n.oid and c.relkind in ('r', 'p')"
        " where n.nspname = 'jobguard'"
    ).fetchone()
    tables, booked, usable, readable = row or (None, None, None, None)
    if usable is None:
        return NotMigrated(f"no schema in {_place(connection)}: run `jobguard migrate`")
    if not booked:
        return NotMigrated() if tables == 0 else _no_books(connection)
    if not (usable and readable):
        return NoRights(
            f"the role {connection.info.user} may not read the schema jobguard in "
            f"{_place(connection)}: {GRANT_A_ROLE}"
        )
    return _mismatch(_applied(connection), complete=True)


def accept_move(connection: psycopg.Connection[Any]) -> None:
    """Store the current place of this database: the first time, or after a move."""
    connection.execute(ACCEPT_MOVE.format(only=""))


def _accept_move_once() -> str:
    return ACCEPT_MOVE.format(only="\n  where database_oid is null")


def _require_server(connection: psycopg.Connection[Any]) -> None:
    if connection.info.server_version < OLDEST_SERVER:
        raise _too_old(connection)


def _too_old(connection: psycopg.Connection[Any]) -> ConfigurationError:
    version = connection.info.server_version
    return ConfigurationError(
        f"jobguard needs PostgreSQL 14 or later; {_place(connection)} is {version // 10000}"
    )


def _begin_books(connection: psycopg.Connection[Any]) -> None:
    connection.execute(LOCK)
    # Not "if not exists": that needs the right to create, even if a DBA made the schema.
    if not _exists(connection, "select from pg_namespace where nspname = 'jobguard'"):
        connection.execute("create schema jobguard")
    if not _exists(connection, _TABLE, ["migrations"]):
        if _exists(connection, _ANY_TABLE):
            raise _no_books(connection)
        connection.execute(BOOKKEEPING)
    problem = _mismatch(_applied(connection), complete=False)
    if problem:
        raise problem


_ANY_TABLE: Final = (
    "select from pg_class where relnamespace = 'jobguard'::regnamespace and relkind in ('r', 'p')"
)
_TABLE: Final = _ANY_TABLE + " and relname = %s"


def _exists(
    connection: psycopg.Connection[Any], query: str, values: list[str] | None = None
) -> bool:
    return connection.execute(query.encode(), values).rowcount > 0


def _applied(connection: psycopg.Connection[Any]) -> dict[int, tuple[str, str]]:
    rows = connection.execute(
        "select number, name, checksum from jobguard.migrations order by number"
    ).fetchall()
    return {number: (name, checksum) for number, name, checksum in rows}


def _mismatch(
    applied: Mapping[int, tuple[str, str]], *, complete: bool
) -> NotMigrated | SchemaMismatch | None:
    newest = max(applied, default=0)
    if newest > latest():
        return SchemaMismatch(
            f"the database has migration {newest}, this jobguard knows 1..{latest()}: "
            "upgrade jobguard"
        )
    missing = [number for number in range(1, newest) if number not in applied]
    if missing:
        return SchemaMismatch(
            f"the database has migration {newest} but not {missing[0]}: it is half migrated; "
            "restore it from a backup, or drop the schema jobguard and run `jobguard migrate`"
        )
    for migration in migrations():
        if migration.number in applied and applied[migration.number][1] != migration.checksum:
            return SchemaMismatch(
                f"migration {migration.number} was applied with another text than this jobguard's "
                f"{migration.name}: use the release of jobguard that applied it, or restore the "
                "database from a backup"
            )
    if not complete or newest == latest():
        return None
    if newest == 0:
        return NotMigrated()
    return SchemaMismatch(
        f"the database has migrations 1..{newest}, this jobguard needs 1..{latest()}: "
        "run `jobguard migrate`"
    )


def _no_books(connection: psycopg.Connection[Any]) -> SchemaMismatch:
    return SchemaMismatch(
        f"the schema jobguard in {_place(connection)} has tables but no list of migrations: it "
        "is half migrated, or belongs to another program; restore it from a backup, or drop it and run "
        "`jobguard migrate`"
    )


@contextmanager
def _transaction(connection: psycopg.Connection[Any]) -> Iterator[None]:
    """Open a transaction that relies on no default of the role or the database."""
    with connection.transaction():
        connection.execute("set local statement_timeout = 0")
        connection.execute(
            "select set_config('search_path', 'pg_catalog', true), set_config('TimeZone', 'UTC', true),"
            " set_config('lock_timeout', '0', true),"
            " set_config('idle_in_transaction_session_timeout', '0', true),"
            " set_config('standard_conforming_strings', 'on', true)"
        )
        yield


def _apply(connection: psycopg.Connection[Any], migration: Migration) -> bool:
    with _transaction(connection):
        connection.execute(LOCK)
        claimed = connection.execute(
            "insert into jobguard.migrations (number, name, checksum) values (%s, %s, %s)"
            " on conflict do nothing",
            [migration.number, migration.name, migration.checksum],
        )
        if claimed.rowcount == 0:
            return False
        connection.execute(migration.text.encode())
        return True


def _require_name(connection: psycopg.Connection[Any], installation: str | None) -> None:
    # This check comes before the migrations: the wrong database must not get a new table.
    if installation is None or not _exists(connection, _TABLE, ["installation"]):
        return
    row = connection.execute("select name from jobguard.installation").fetchone()
    if row and row[0] is not None and row[0] != installation:
        raise WrongInstallation(
            f"{_place(connection)} is the installation {row[0]!r}, not {installation!r}: check the "
            "URL; an existing name is not changed"
        )


def _name(connection: psycopg.Connection[Any], installation: str | None) -> None:
    if installation is None:
        return
    _require_name(connection, installation)
    connection.execute(
        "update jobguard.installation set name = %s where name is distinct from %s",
        [installation, installation],
    )


def _place(connection: psycopg.Connection[Any]) -> str:
    info = connection.info
    return f"{info.host or 'localhost'}:{info.port}/{info.dbname}"


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
