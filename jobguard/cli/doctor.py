"""``jobguard doctor``: check everything that jobguard relies on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from enum import StrEnum
from functools import partial
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

import click

from jobguard import schema
from jobguard.adapter import Source
from jobguard.cli.common import (
    ago,
    console,
    json_option,
    namespace_option,
    postgres_option,
    print_json,
    redis_option,
    redis_urls_from,
    settings_of,
)
from jobguard.cli.rights import acl_line, missing_commands, missing_keys, user_of
from jobguard.cli.stats import trusted_since, why_not_trusted
from jobguard.conninfo import describe, postgres_conninfo
from jobguard.errors import JobguardError
from jobguard.host.stream import ReportStream
from jobguard.model import Owed, Presence
from jobguard.redact import redact
from jobguard.redis_urls import parse
from jobguard.settings import Settings, disabled, unknown_variables
from jobguard.store.connection import Database
from jobguard.store.ledger import PostgresLedger

if TYPE_CHECKING:
    import psycopg
    import redis

REDIS_TIMEOUT_SECONDS = 2.0
_WATCHED_SECONDS = 15.0
"""A source whose pulse was advanced within this time is watched."""
_IDLE_SECONDS = 60.0
"""Jobs that wait longer while a worker of their queue is idle are a problem."""
_CONNECTIONS_LEFT = 5
_FULL = 0.95
"""Share of a limit from which on the use is reported."""


class CheckResult(StrEnum):
    """The result of a check."""

    OK = "ok"
    NOTE = "note"
    """Good to know; nothing is broken."""
    PROBLEM = "problem"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was checked."""

    about: str
    verdict: CheckResult
    detail: str


Place = tuple[str, str]
"""The run id of a Redis, and the number of the database."""


@dataclass(frozen=True, slots=True)
class Reached:
    """A Redis of the command line that answered."""

    about: str
    client: redis.Redis
    address: str
    name: str
    run_id: str

    @property
    def names(self) -> set[str]:
        """Return the addresses and names that a source in it may have."""
        return {self.address, self.name} - {""}

    @property
    def place(self) -> Place:
        """Return the run id of the Redis and the number of the database."""
        return self.run_id, _database_of(self.address)


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
    if any(finding.verdict is CheckResult.PROBLEM for finding in findings):
        raise click.exceptions.Exit(1)


def examine(
    settings: Settings, conninfo: Callable[[], str], redis_urls: Sequence[str]
) -> Iterator[Finding]:
    """Check everything. A check that cannot be made is a problem, and the others continue."""
    if disabled():
        yield _problem("settings", "JOBGUARD_DISABLED is set: nothing is guarded")
    for variable in unknown_variables():
        yield _note("settings", f"jobguard has no variable {variable}")
    schema_fits = False
    for finding in _check_postgres(conninfo, pooler=settings.pooler):
        schema_fits = (
            finding.about == "schema" and finding.verdict is CheckResult.OK
        ) or schema_fits
        yield finding
    reached: list[Reached] = []
    for url in redis_urls:
        yield from _check_redis(url, reached)
    if not redis_urls:
        yield _note("redis", "no URL was given: give --redis URL, or set JOBGUARD_REDIS_URL")
    if not schema_fits:
        return
    with closing(PostgresLedger(conninfo)) as ledger:
        try:
            overview = ledger.overview(settings.namespace)
            yield from judge(settings, overview)
            yield from judge_sources(settings, overview["sources"], reached)
            yield from _judge_rights(overview, reached)
            yield from _judge_streams(settings, overview["sources"], reached)
            yield from _judge_idle(ledger, settings, overview["sources"], reached)
        except JobguardError as error:
            yield _problem("ledger", str(error))
        finally:
            for one in reached:
                one.client.close()


def judge(settings: Settings, overview: dict[str, Any]) -> Iterator[Finding]:
    """Return the findings in the ledger's overview."""
    yield from _judge_installation(settings, overview["installation"])
    yield from _judge_leader(overview)
    for source in overview["sources"]:
        if source["settings"] and source["settings"] != settings.fingerprint():
            yield _problem(
                f"source {source['address']}",
                f"was set up with {source['settings']!r}, here it is {settings.fingerprint()!r}",
            )
    if not overview["sources"]:
        yield _note(
            "sources", f"nothing has been guarded yet in the namespace {settings.namespace}"
        )
    for queue in overview["queues"]:
        about = f"queue {queue['queue']}"
        if queue["trusted_since"] is not None:
            yield _ok(about, trusted_since(queue["trusted_since"]))
        elif queue["unguarded"]:
            names = ", ".join(queue["unguarded"])
            yield _problem(
                about, f"unguarded workers consume it, so its jobs are not put back: {names}"
            )
        else:
            why = why_not_trusted(queue)
            yield _problem(about, f"not trusted yet, so its jobs are not put back: {why}")


def judge_sources(
    settings: Settings, sources: Sequence[dict[str, Any]], reached: Sequence[Reached]
) -> Iterator[Finding]:
    """Find sources that no reconciler watches, and sources that are the same Redis."""
    places = {source["id"]: _place_of(source, reached) for source in sources}
    for source in sources:
        about = f"source {source['library']} at {source['name'] or source['address']}"
        seconds = source["watched_seconds"]
        if seconds is not None and seconds < max(_WATCHED_SECONDS, 10 * settings.pulse_interval):
            yield _ok(about, f"watched by the leader, {source['owed']} owed")
            continue
        last = "" if seconds is None else f" (since {ago(seconds)})"
        if not source["owed"]:
            yield _note(about, f"no reconciler watches it{last}; it has no owed jobs")
            continue
        what = f"has {source['owed']} owed jobs and no reconciler watches it{last}: "
        yield _problem(about, what + _way_to_watch(source, places[source["id"]], reached))
    yield from _judge_duplicates(sources, places)


def _way_to_watch(source: dict[str, Any], place: Place | None, reached: Sequence[Reached]) -> str:
    """Return what must be done so that a reconciler watches this source."""
    if any(source["address"] in one.names or source["name"] in one.names for one in reached):
        return "run `jobguard reconcile` with the URLs of this command, and read its log"
    for one in reached:
        if place is not None and one.place == place:
            return (
                f"{one.address} and {source['address']} are two addresses of one Redis. Use one of them "
                "everywhere, or set JOBGUARD_SOURCE=NAME in every process that calls guard() and give "
                "`jobguard reconcile` --redis NAME=URL"
            )
    return (
        f"give `jobguard reconcile` the URL of {source['address']} by --redis or JOBGUARD_REDIS_URL; if "
        "it reaches that Redis by another address, set JOBGUARD_SOURCE"
    )


def _judge_duplicates(
    sources: Sequence[dict[str, Any]], places: Mapping[int, Place | None]
) -> Iterator[Finding]:
    """Find sources of one library in one Redis, whose processes use different addresses."""
    known: dict[tuple[Any, ...], list[str]] = {}
    for source in sources:
        place = places[source["id"]]
        if place is not None:
            key = (source["library"], source["prefix"], place)
            known.setdefault(key, []).append(source["name"] or source["address"])
    for (library, *_), names in known.items():
        if len(names) > 1:
            yield _problem(
                f"source {library} at {names[0]}",
                f"{' and '.join(names)} are two addresses of one Redis, and so two sources: set "
                "JOBGUARD_SOURCE=NAME in every process, or use one address everywhere",
            )


def _place_of(source: dict[str, Any], reached: Sequence[Reached]) -> Place | None:
    """Return the Redis and the database of a source; None if this machine cannot know them."""
    for one in reached:
        if source["address"] in one.names or source["name"] in one.names:
            return one.place
    for one in reached:
        if (place := _ask_at(source["address"], one.client)) is not None:
            return place
    if source["run_id"] is None:
        return None
    return source["run_id"], _database_of(source["address"])


def _ask_at(address: str, like: redis.Redis) -> Place | None:
    """Ask the Redis at this address for its run id, with the account of a given client."""
    import redis

    host, separator, port = address.rpartition("/")[0].rpartition(":")
    if not separator or not port.isdigit():  # a socket of another machine, or sentinels
        return None
    pool = like.connection_pool
    if "host" not in pool.connection_kwargs:
        return None
    kwargs = {**pool.connection_kwargs, "host": host, "port": int(port)}
    own = redis.ConnectionPool(connection_class=pool.connection_class, **kwargs)
    with redis.Redis(connection_pool=own) as client:
        try:
            info: Any = client.info("server")
        except (redis.RedisError, OSError, ValueError):
            return None
    return info.get("run_id", ""), _database_of(address)


def _database_of(address: str) -> str:
    return address.rpartition("/")[2]


def _judge_rights(overview: dict[str, Any], reached: Sequence[Reached]) -> Iterator[Finding]:
    """Compare the rights that a reconciler needs in each Redis with those of the user of its URL."""
    import redis

    for one in reached:
        sources = [
            source
            for source in overview["sources"]
            if source["address"] in one.names or source["name"] in one.names
        ]
        queues = [q["queue"] for q in overview["queues"] if q["address"] in one.names]
        keys = ["jobguard:doctor"]
        patterns: list[str] = []
        for source in sources:
            keys += _keys_of(source, queues, "doctor")
            patterns += _keys_of(source, queues, "*")
        try:
            lacks = missing_commands(one.client)
            lacks += [f"~{key}" for key in missing_keys(one.client, keys)]
            user = user_of(one.client)
        except redis.RedisError as error:
            yield _problem(one.about, f"rights could not be checked: {error}")
            continue
        if lacks:
            yield _problem(
                one.about,
                f"the user {user} lacks {' '.join(lacks)}. A reconciler needs: {acl_line(user, patterns)}",
            )
        else:
            yield _ok(one.about, f"the user {user} has all rights that a reconciler needs")


def _judge_streams(
    settings: Settings, sources: Sequence[dict[str, Any]], reached: Sequence[Reached]
) -> Iterator[Finding]:
    """Find reports that wait in Redis, because PostgreSQL was away and no leader has written them yet."""
    for source in sources:
        for one in reached:
            if not {source["address"], source["name"]} & one.names:
                continue
            known = Source(
                settings.namespace,
                source["library"],
                source["address"],
                source["prefix"],
                source["name"],
            )
            stream = ReportStream(known, partial(_same, one.client), bound=settings.stream_bytes)
            length = stream.length()
            if length is not None and length[0]:
                entries, size = length
                yield _note(
                    one.about,
                    f"{entries} reports ({size} bytes) that PostgreSQL could not take wait in {known}; a "
                    "reconciler that leads writes them within seconds",
                )


def _same(client: redis.Redis) -> redis.Redis:
    return client


def _keys_of(source: dict[str, Any], queues: Sequence[str], rest: str) -> list[str]:
    """Return keys with the default names of a library, or patterns for them."""
    if source["prefix"] and source["library"] != "dramatiq":
        return []  # the user chose these names: they cannot be guessed
    if source["library"] == "celery":
        star = "*" if rest == "*" else ""  # a queue has a list for each priority
        names = [f"_kombu.binding.{rest}", f"unacked{star}", f"celery-task-meta-{rest}"]
        return names + [queue + star for queue in queues]
    return [f"{source['prefix'] or source['library']}:{rest}"]


def _judge_idle(
    ledger: PostgresLedger,
    settings: Settings,
    sources: Sequence[dict[str, Any]],
    reached: Sequence[Reached],
) -> Iterator[Finding]:
    """Find queues whose jobs wait in Redis while live workers of the queue run nothing."""
    import redis

    found = ledger.idle(settings.namespace, seconds=_IDLE_SECONDS)
    if not found:
        return
    time.sleep(1.0)  # a worker may have been between two jobs
    again = {
        (row["source"], row["queue"]): row
        for row in ledger.idle(settings.namespace, seconds=_IDLE_SECONDS)
    }
    by_id = {source["id"]: source for source in sources}
    for row in found:
        later = again.get((row["source"], row["queue"]))
        if later is None or later["since"] != row["since"] or later["jobs"] < row["jobs"]:
            continue
        workers = sorted(set(row["workers"]) & set(later["workers"]))
        source = by_id[row["source"]]
        place = [
            one for one in reached if source["address"] in one.names or source["name"] in one.names
        ]
        if not workers or not place:
            continue
        try:
            waits = _waits_in_redis(source, row, place[0].client)
        except (redis.RedisError, ImportError, ValueError):
            continue
        if waits:
            yield _problem(
                f"queue {row['queue']}",
                f"{row['jobs']} jobs wait, the oldest for {ago(row['seconds'])}, while the workers of this "
                f"queue are alive and run nothing: {', '.join(workers)}. Restart them",
            )


def _waits_in_redis(source: dict[str, Any], row: dict[str, Any], client: redis.Redis) -> bool:
    """Return True if the library's queue has one of these jobs; deferred or limited ones are elsewhere."""
    entries = [e for e in entry_points(group="jobguard.adapters") if e.name == source["library"]]
    if not entries:
        return False
    adapter = entries[0].load()()
    known = Source(
        row["namespace"], source["library"], source["address"], source["prefix"], source["name"]
    )
    page = [
        Owed(token, job_id, row["queue"], task, row["seconds"], 0.0, False, 0, 0, 0, 0.0)
        for token, job_id, task in zip(row["tokens"], row["job_ids"], row["tasks"], strict=True)
    ]
    seen = adapter.broker(known, client).presence(page)
    return any(observation.presence is Presence.WAITING for observation in seen.values())


def _check_postgres(conninfo: Callable[[], str], *, pooler: bool) -> Iterator[Finding]:
    import psycopg

    try:
        where = conninfo()
        with psycopg.connect(where, autocommit=True, connect_timeout=5) as connection:
            version = connection.info.server_version // 10000
            yield _ok("postgres", f"{describe(where)}, PostgreSQL {version}")
            yield from _judge_server(connection, pooler=pooler)
            yield from _judge_session(conninfo, pooler=pooler)
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
        yield _problem(
            "postgres",
            "this server is a standby and accepts no writes: name the primary, or all hosts with "
            "target_session_attrs=read-write",
        )
    if pid != connection.info.backend_pid and not pooler:
        yield _note(
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
        yield _problem(
            "connections",
            f"{detail}: a worker needs 2, a producer 1, a reconciler 3; raise the limit",
        )
    else:
        yield _ok("connections", detail)


def _judge_session(conninfo: Callable[[], str], *, pooler: bool) -> Iterator[Finding]:
    """Check a session as a host opens it, with the defaults of the role and the database."""
    query = (
        "select current_setting('transaction_isolation'), current_setting('transaction_read_only')"
    )
    database = Database(conninfo, connect_timeout=5.0, call_timeout=5.0, pooler=pooler)
    with closing(database):
        ((isolation, read_only),) = database.execute(query)
    if read_only == "on":
        yield _problem(
            "postgres",
            "sessions of this role are read-only: name the primary, and reset "
            "default_transaction_read_only of the role and the database",
        )
    if isolation != "read committed":
        yield _problem(
            "postgres",
            f"sessions of this role are {isolation}; jobguard needs read committed: "
            "alter role … set default_transaction_isolation = 'read committed'",
        )


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


def _check_redis(given: str, reached: list[Reached]) -> Iterator[Finding]:
    import redis

    from jobguard.clients import address_of, client_from_url

    name, separator, url = given.partition("=")
    if not separator or "://" in name:
        name, url = "", given
    try:
        client = client_from_url(url, timeout=REDIS_TIMEOUT_SECONDS)
        unknown = parse(url).unknown
    except JobguardError as error:
        yield _problem("redis", str(error))
        return
    about = f"redis {address_of(client)}"
    if unknown:
        yield _note(about, f"unknown options in its URL: {', '.join(unknown)}")
    try:
        info: dict[str, Any] = client.info()
    except redis.exceptions.NoPermissionError:
        info = {}  # reported with the other rights
    except redis.RedisError as error:
        yield _problem(about, str(error))
        client.close()
        return
    reached.append(Reached(about, client, address_of(client), name, str(info.get("run_id", ""))))
    yield _ok(about, f"version {info.get('redis_version', '?')}, {info.get('role', '?')}")
    yield from _judge_redis(about, info)
    if info:
        yield _judge_persistence(about, info)


def _judge_redis(about: str, info: dict[str, Any]) -> Iterator[Finding]:
    policy, limit = info.get("maxmemory_policy", "noeviction"), info.get("maxmemory") or 0
    if info.get("role") == "slave":
        yield _problem(about, "this is a replica: name the primary, or Sentinel")
    if info.get("cluster_enabled"):
        yield _problem(
            about,
            "cluster mode is on, and jobguard does not work with it: scripts need all keys of a job on one "
            "node. Use a Redis without cluster mode, with Sentinel if you need failover",
        )
    if policy != "noeviction" and limit:
        yield _problem(about, f"maxmemory-policy is {policy}: Redis drops jobs; set noeviction")
    if limit and info.get("used_memory", 0) > _FULL * limit:
        yield _problem(
            about,
            f"{100 * info['used_memory'] // limit} % of maxmemory is used: Redis refuses jobs when it is "
            "full; raise maxmemory, or add workers",
        )
    clients = info.get("maxclients") or 0
    if clients and info.get("connected_clients", 0) > _FULL * clients:
        yield _problem(about, f"{info['connected_clients']} of {clients} clients are connected")


def _judge_persistence(about: str, info: dict[str, Any]) -> Finding:
    if info.get("aof_enabled"):
        return _ok(about, "append-only file on")
    if info.get("rdb_last_bgsave_status", "ok") != "ok":
        return _note(about, "the last snapshot failed")
    return _note(about, "no append-only file: after a crash the leader puts missing jobs back")


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
            "this database is a copy, or was moved: if it is the right one, run "
            "`jobguard resume --moved`",
        )


def _judge_leader(overview: dict[str, Any]) -> Iterator[Finding]:
    leader, brake, workers = overview["leader"], overview["brake"], overview["workers"]
    if leader is not None and leader["live"]:
        yield _ok("leader", f"{leader['host']} pid {leader['pid']}, term {leader['term']}")
    else:
        yield _problem("leader", "no reconciler leads: run `jobguard reconcile`")
    if brake["paused_at"]:
        yield _problem("brake", f"paused since {brake['paused_at']:%Y-%m-%d %H:%M:%S}")
    for key, why in brake["held"].items():
        yield _problem("brake", f"{key} is held: {why.get('reason', '')}; `jobguard resume`")
    yield _ok("workers", f"{workers['alive']} alive")
    for incident in overview["incidents"]:
        # Redis is full or lacks a right: a person must repair it.
        refuses = incident["cause"] == "push"
        yield (_problem if refuses else _note)(
            "incident", f"{incident['cause']} at {incident['address']}: {incident['detail']}"
        )


def _ok(about: str, detail: str) -> Finding:
    return Finding(about, CheckResult.OK, detail)


def _note(about: str, detail: str) -> Finding:
    return Finding(about, CheckResult.NOTE, detail)


def _problem(about: str, detail: str) -> Finding:
    return Finding(about, CheckResult.PROBLEM, " ".join(redact(detail).split()))


_COLOURS = {CheckResult.OK: "green", CheckResult.NOTE: "yellow", CheckResult.PROBLEM: "bold red"}


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
