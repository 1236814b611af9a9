"""``jobguard doctor``: check everything that jobguard relies on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import click

from jobguard import schema
from jobguard.cli.common import (
    console,
    json_option,
    namespace_option,
    postgres_option,
    print_json,
    redis_option,
    redis_urls_from,
    settings_of,
)
from jobguard.conninfo import describe, postgres_conninfo
from jobguard.errors import JobguardError
from jobguard.redact import redact
from jobguard.settings import Settings, disabled
from jobguard.store.ledger import PostgresLedger

if TYPE_CHECKING:
    import psycopg

REDIS_TIMEOUT_SECONDS = 2.0


class Verdict(StrEnum):
    """What a check found."""

    OK = "ok"
    NOTE = "note"
    """Worth knowing; nothing is broken."""
    PROBLEM = "problem"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    about: str
    verdict: Verdict
    detail: str


@click.command()
@postgres_option
@namespace_option
@redis_option
@json_option
def command(
    postgres: str | None, namespace: str | None, redis_urls: tuple[str, ...], as_json: bool
) -> None:
    """Check everything that jobguard relies on; exit 1 if something is wrong."""
    settings = settings_of(namespace)
    conninfo = postgres_conninfo(postgres)
    findings = list(examine(settings, conninfo, redis_urls_from(redis_urls)))
    if as_json:
        print_json([asdict(finding) for finding in findings])
    else:
        _print(findings)
    if any(finding.verdict is Verdict.PROBLEM for finding in findings):
        raise click.exceptions.Exit(1)


def examine(
    settings: Settings, conninfo: Callable[[], str], redis_urls: Sequence[str]
) -> Iterator[Finding]:
    """Look at everything; a check that cannot be made is a problem, and the others go on."""
    if disabled():
        yield _problem("settings", "JOBGUARD_DISABLED is set: nothing is guarded")
    schema_fits = False
    for finding in _look_at_postgres(conninfo):
        schema_fits = (finding.about == "schema" and finding.verdict is Verdict.OK) or schema_fits
        yield finding
    for url in redis_urls:
        yield from _look_at_redis(url)
    if not redis_urls:
        yield _note("redis", "none was named: give --redis URL, or set JOBGUARD_REDIS_URL")
    if schema_fits:
        try:
            with closing(PostgresLedger(conninfo)) as ledger:
                overview = ledger.overview(settings.namespace)
        except JobguardError as error:
            yield _problem("ledger", str(error))
        else:
            yield from judge(settings, overview)


def judge(settings: Settings, overview: dict[str, Any]) -> Iterator[Finding]:
    """Say what the ledger's overview means."""
    yield from _judge_installation(settings, overview["installation"])
    yield from _judge_leader(overview)
    for source in overview["sources"]:
        if source["settings"] and source["settings"] != settings.fingerprint():
            yield _problem(
                f"source {source['address']}",
                f"was set up with {source['settings']!r}, here it is {settings.fingerprint()!r}",
            )
    if not overview["sources"]:
        yield _note("sources", f"nothing was guarded yet in the namespace {settings.namespace}")
    for queue in overview["queues"]:
        about = f"queue {queue['queue']}"
        if queue["trusted_since"] is not None:
            yield _ok(about, f"trusted since {queue['trusted_since']:%Y-%m-%d %H:%M:%S}")
        elif queue["unguarded"]:
            names = ", ".join(queue["unguarded"])
            yield _problem(about, f"unguarded workers consume it, so nothing is put back: {names}")
        else:
            yield _problem(about, "not trusted yet, so nothing is put back")


def _look_at_postgres(conninfo: Callable[[], str]) -> Iterator[Finding]:
    import psycopg

    try:
        where = conninfo()
        with psycopg.connect(where, autocommit=True, connect_timeout=5) as connection:
            version = connection.info.server_version // 10000
            yield _ok("postgres", f"{describe(where)}, PostgreSQL {version}")
            problem = schema.check(connection)
            if problem is not None:
                yield _problem("schema", str(problem))
                return
            yield _ok("schema", f"migration {schema.latest()}")
            missing = _missing_rights(connection)
            if missing:
                yield _problem("rights", f"{missing}: grant what schema/grants.sql lists")
            else:
                yield _ok("rights", f"{connection.info.user} may read and write")
    except (psycopg.Error, JobguardError) as error:
        yield _problem("postgres", str(error))


_RIGHTS = """
select string_agg(what, ', ' order by what) from (
  select 'no ' || p || ' on ' || c.relname as what
  from pg_class c, unnest(array['select', 'insert', 'update', 'delete']) p
  where c.relnamespace = 'jobguard'::regnamespace and c.relkind in ('r', 'p')
    and not c.relispartition and (c.relname <> 'migrations' or p = 'select')
    and not has_table_privilege(c.oid, p)
  union all
  select 'no execute on ' || f.proname from pg_proc f
  where f.pronamespace = 'jobguard'::regnamespace and not has_function_privilege(f.oid, 'execute')
) missing
"""


def _missing_rights(connection: psycopg.Connection[Any]) -> str | None:
    row = connection.execute(_RIGHTS).fetchone()
    return row[0] if row else None


def _look_at_redis(url: str) -> Iterator[Finding]:
    import redis

    from jobguard.clients import address_of, client_from_url

    try:
        client = client_from_url(url, timeout=REDIS_TIMEOUT_SECONDS)
    except ValueError as error:
        yield _problem("redis", str(error))
        return
    with client:
        about = f"redis {address_of(client)}"
        try:
            info: dict[str, Any] = client.info()
        except redis.RedisError as error:
            yield _problem(about, str(error))
            return
    yield _ok(about, f"version {info.get('redis_version', '?')}, {info.get('role', '?')}")
    policy = info.get("maxmemory_policy", "noeviction")
    if info.get("role") == "slave":
        yield _problem(about, "this is a replica: name the primary, or Sentinel")
    if policy != "noeviction" and info.get("maxmemory"):
        yield _problem(about, f"maxmemory-policy is {policy}: Redis drops jobs; set noeviction")
    yield _judge_persistence(about, info)


def _judge_persistence(about: str, info: dict[str, Any]) -> Finding:
    if info.get("aof_enabled"):
        return _ok(about, "append-only file on")
    if info.get("rdb_last_bgsave_status", "ok") != "ok":
        return _note(about, "the last snapshot failed")
    return _note(about, "no append-only file: after a crash the leader puts back what is missing")


def _judge_installation(settings: Settings, installation: dict[str, Any]) -> Iterator[Finding]:
    about, name = "installation", installation["name"]
    if settings.installation is not None and name != settings.installation:
        yield _problem(
            about, f"the database is {name!r}, JOBGUARD_INSTALLATION is {settings.installation!r}"
        )
    elif name is None:
        yield _note(about, "the database has no name: `jobguard migrate --installation NAME`")
    else:
        yield _ok(about, name)
    if installation["moved"]:
        yield _problem(
            about,
            "this database is a copy, or was moved: if it is the one that counts, "
            "`jobguard resume --moved`",
        )


def _judge_leader(overview: dict[str, Any]) -> Iterator[Finding]:
    leader, brake, workers = overview["leader"], overview["brake"], overview["workers"]
    if leader is not None and leader["live"]:
        yield _ok("leader", f"{leader['host']} pid {leader['pid']}, term {leader['term']}")
    else:
        yield _problem("leader", "nobody leads: run `jobguard reconcile`")
    if brake["paused_at"]:
        yield _problem("brake", f"paused since {brake['paused_at']:%Y-%m-%d %H:%M:%S}")
    for key, why in brake["held"].items():
        yield _problem("brake", f"{key} is held: {why.get('reason', '')}; `jobguard resume`")
    yield _ok("workers", f"{workers['alive']} alive")
    for incident in overview["incidents"]:
        refuses = incident["cause"] == "push"  # a full Redis, or one without rights: mend it
        yield (_problem if refuses else _note)(
            "incident", f"{incident['cause']} at {incident['address']}: {incident['detail']}"
        )


def _ok(about: str, detail: str) -> Finding:
    return Finding(about, Verdict.OK, detail)


def _note(about: str, detail: str) -> Finding:
    return Finding(about, Verdict.NOTE, detail)


def _problem(about: str, detail: str) -> Finding:
    return Finding(about, Verdict.PROBLEM, " ".join(redact(detail).split()))


_COLOURS = {Verdict.OK: "green", Verdict.NOTE: "yellow", Verdict.PROBLEM: "bold red"}


def _print(findings: Sequence[Finding]) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, show_header=False)
    for finding in findings:
        colour = _COLOURS[finding.verdict]
        table.add_row(
            f"[{colour}]{finding.verdict}[/]", escape(finding.about), escape(finding.detail)
        )
    console().print(table)
