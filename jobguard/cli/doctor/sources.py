"""The sources: does a leader watch each one, is none of them two, do its workers take jobs."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from jobguard.adapter import Source
from jobguard.cli.common import ago
from jobguard.cli.doctor.finding import Finding, note, ok, problem
from jobguard.cli.doctor.redis_server import Place, Reached
from jobguard.host.stream import ReportStream
from jobguard.model import Owed, Presence
from jobguard.redis_values import database_of
from jobguard.settings import Settings
from jobguard.store.ledger import PostgresLedger

if TYPE_CHECKING:
    import redis

_WATCHED_SECONDS = 15.0
"""A source whose pulse was advanced within this time is watched."""
_IDLE_SECONDS = 60.0
"""Jobs that wait longer while a worker of their queue is idle are a problem."""


def judge_sources(
    settings: Settings, sources: Sequence[dict[str, Any]], reached: Sequence[Reached]
) -> Iterator[Finding]:
    """Find sources that no reconciler watches, and sources that are the same Redis."""
    places = {source["id"]: _place_of(source, reached) for source in sources}
    names = [_name(source) for source in sources]
    for source, name in zip(sources, names, strict=True):
        about = f"source {name}"
        if names.count(name) > 1:  # several applications, with a key prefix each
            about += f" ({source['prefix'] or 'no prefix'})"
        seconds = source["watched_seconds"]
        if seconds is not None and seconds < max(_WATCHED_SECONDS, 10 * settings.pulse_interval):
            yield ok(about, f"watched by the leader, {source['owed']} owed")
            continue
        last = "" if seconds is None else f" (since {ago(seconds)})"
        if not source["owed"]:
            yield note(about, f"no reconciler watches it{last}; it has no owed jobs")
            continue
        what = f"has {source['owed']} owed jobs and no reconciler watches it{last}: "
        yield problem(about, what + _way_to_watch(source, places[source["id"]], reached))
    yield from _judge_duplicates(sources, places)


def _name(source: dict[str, Any]) -> str:
    return f"{source['library']} at {source['name'] or source['address']}"


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
            yield problem(
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
    return source["run_id"], database_of(source["address"])


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
    return info.get("run_id", ""), database_of(address)


def judge_idle(
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
            way = "Restart them"
            if source["library"] == "rq":
                way = "Run `rq resume` if somebody has suspended them, else restart them"
            yield problem(
                f"queue {row['queue']}",
                f"{row['jobs']} jobs wait, the oldest for {ago(row['seconds'])}, while the workers of this "
                f"queue are alive and run nothing: {', '.join(workers)}. {way}",
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


def judge_streams(
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
                yield note(
                    one.about,
                    f"{entries} reports ({size} bytes) that PostgreSQL could not take wait in {known}; a "
                    "reconciler that leads writes them within seconds",
                )


def _same(client: redis.Redis) -> redis.Redis:
    return client
