"""The roles of jobguard in PostgreSQL, and the rights of each.

=====================  ============================================================================
``jobguard_app``       producers and workers: record, claim, end, beat
``jobguard_reconciler`` the reconciler and the commands that change something: all rows of all tables
``jobguard_reader``    ``jobguard stats`` and dashboards: all rows, without envelopes and arguments
``jobguard_enqueue``   SQL callers: jobguard.enqueue, jobguard.cancel_job and jobguard.job, nothing else
=====================  ============================================================================

They are groups without a login: ``grant jobguard_app to shop``. None of them creates, alters or drops
anything; retention is a function that runs as the owner. A role that may write ``jobs.envelope`` decides
what the workers run, and so does a role that may call ``jobguard.enqueue``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Final

APP: Final = "jobguard_app"
RECONCILER: Final = "jobguard_reconciler"
READER: Final = "jobguard_reader"
ENQUEUE: Final = "jobguard_enqueue"
ROLES: Final = (APP, RECONCILER, READER, ENQUEUE)

_READ = ("select",)
_ALL = ("select", "insert", "update", "delete")

# The app reads all tables, and writes these. The reconciler writes all.
_OF_THE_APP: Final = MappingProxyType(
    {
        "sources": ("select", "insert"),
        "history": ("select", "insert", "update"),
        "jobs": _ALL,
        "running": _ALL,
        "workers": _ALL,
        "suspects": _ALL,
        "outbox": _ALL,
        "joins": _ALL,
        "join_parts": _ALL,
        "locks": _ALL,
        "effects": _ALL,
        "tasks": ("select", "insert"),
        "requests": ("select", "insert"),
        "schedules": _ALL,
        "job_keys": _ALL,
    }
)
_SEALED_FROM_THE_READER: Final = ("envelope bytea", "state bytea", "args jsonb", "kwargs jsonb")
"""Columns that hold messages, and with them the arguments of jobs."""
_FOR_SQL_CALLERS: Final = "jobguard.enqueue, jobguard.cancel_job, jobguard.job"

# The leader vacuums the small tables itself. Before PostgreSQL 17 only an owner may, and autovacuum
# has to do.
_VACUUMED: Final = (
    "jobs",
    "running",
    "workers",
    "suspects",
    "outbox",
    "leader",
    "sources",
    "queues",
)


def rights(role: str, tables: Iterable[str]) -> Mapping[str, tuple[str, ...]]:
    """Return the rights of a role by table; the reader's are for the readable columns."""
    if role == APP:
        return {table: _OF_THE_APP.get(table, _READ) for table in tables}
    if role == READER:
        return dict.fromkeys(tables, _READ)
    if role == ENQUEUE:
        return {}
    # The list of migrations belongs to the migrator alone.
    return {table: _READ if table == "migrations" else _ALL for table in tables}


def roles_sql(roles: Iterable[str] = ROLES) -> str:
    """Return the SQL that creates the roles that are missing, and gives each its rights anew.

    Run it as the owner of the schema, in one transaction, again after each migration: new tables come
    without rights. Creating a role needs CREATEROLE.
    """
    return f"-- The roles of jobguard. Run it after each migration.\n\n{_PUBLIC}\n\n" + "\n\n".join(
        _role_sql(role) for role in roles
    )


_PUBLIC = "revoke execute on all functions in schema jobguard from public;"


def _role_sql(role: str) -> str:
    parts = [
        f"""\
do $$
begin
  create role {role} nologin;
exception when duplicate_object or unique_violation then null;
end
$$;""",
        f"revoke all on all tables in schema jobguard from {role};",
        f"revoke all on all functions in schema jobguard from {role};",
        f"grant usage on schema jobguard to {role};",
    ]
    if role != READER:
        parts.append(f"grant execute on function {_FOR_SQL_CALLERS} to {role};")
    if role == ENQUEUE:
        return "\n".join(parts)
    parts.append(_FUNCTIONS.format(role=role, owners="true" if role == RECONCILER else "false"))
    if role == APP:
        parts.append(f"grant select on all tables in schema jobguard to {role};")
        parts += [
            f"grant {', '.join(given)} on jobguard.{table} to {role};"
            for table, given in _OF_THE_APP.items()
        ]
        # A process that knows the serializer writes it into the row of the first process.
        parts.append(f"grant update (serializer) on jobguard.sources to {role};")
    elif role == READER:
        columns = ", ".join(f"'{column}'" for column in _SEALED_FROM_THE_READER)
        parts.append(_COLUMNS.format(role=role, columns=columns))
    else:
        parts += [
            f"grant {', '.join(_ALL)} on all tables in schema jobguard to {role};",
            f"revoke insert, update, delete on jobguard.migrations from {role};",
            f"grant usage on all sequences in schema jobguard to {role};",
            _MAINTAIN.format(
                role=role, tables=", ".join(f"jobguard.{table}" for table in _VACUUMED)
            ),
        ]
    return "\n".join(parts)


# A function that runs as the owner and changes something (retention) is for the reconciler alone.
_FUNCTIONS = """\
do $$
declare
  f regprocedure;
begin
  for f in select oid from pg_proc
           where pronamespace = 'jobguard'::regnamespace
             and ({owners} or not prosecdef or provolatile <> 'v')
  loop
    execute format('grant execute on function %s to {role}', f);
  end loop;
end
$$;"""

_COLUMNS = """\
do $$
declare
  t regclass;
  readable text;
begin
  for t, readable in
    select c.oid, string_agg(quote_ident(a.attname), ', ')
    from pg_class c
    join pg_attribute a on a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped
    where c.relnamespace = 'jobguard'::regnamespace and c.relkind in ('r', 'p')
      and not c.relispartition and not a.attname || ' ' || a.atttypid::regtype in ({columns})
    group by c.oid
  loop
    execute format('grant select (%s) on %s to {role}', readable, t);
  end loop;
end
$$;"""

_MAINTAIN = """\
do $$
begin
  if current_setting('server_version_num')::integer >= 170000 then
    execute 'grant maintain on {tables} to {role}';
  end if;
end
$$;"""
