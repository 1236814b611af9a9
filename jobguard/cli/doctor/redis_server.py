"""The Redis of the command line: version, eviction, memory, persistence, rights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jobguard.cli.doctor.finding import Finding, note, ok, problem
from jobguard.cli.doctor.redis_rights import (
    acl_line,
    is_unknown,
    missing_commands,
    missing_keys,
    user_of,
)
from jobguard.errors import JobguardError
from jobguard.redis_urls import parse
from jobguard.redis_values import database_of

if TYPE_CHECKING:
    import redis

REDIS_TIMEOUT_SECONDS = 2.0
OLDEST = (6, 2)
_FULL = 0.95
"""Share of a limit from which on the use is reported."""

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
        return self.run_id, database_of(self.address)


def check_redis(given: str, reached: list[Reached]) -> Iterator[Finding]:
    """Check one URL; add its Redis to ``reached`` if it answers."""
    import redis

    from jobguard.clients import address_of, client_from_url

    name, separator, url = given.partition("=")
    if not separator or "://" in name:
        name, url = "", given
    try:
        client = client_from_url(url, timeout=REDIS_TIMEOUT_SECONDS)
        unknown = parse(url).unknown
    except JobguardError as error:
        yield problem("redis", str(error))
        return
    about = f"redis {address_of(client)}"
    if unknown:
        yield note(about, f"unknown options in its URL: {', '.join(unknown)}")
    try:
        info: dict[str, Any] = client.info()
    except redis.exceptions.NoPermissionError:
        info = {}  # reported with the other rights
    except redis.RedisError as error:
        if not is_unknown(error):  # also reported with the rights
            yield problem(about, str(error))
            client.close()
            return
        info = {}
    reached.append(Reached(about, client, address_of(client), name, str(info.get("run_id", ""))))
    yield ok(about, f"version {info.get('redis_version', '?')}, {info.get('role', '?')}")
    yield from _judge_redis(about, info)
    if info:
        yield _judge_persistence(about, info)


def _judge_redis(about: str, info: dict[str, Any]) -> Iterator[Finding]:
    version = str(info.get("redis_version", ""))
    if version and tuple(map(int, version.split(".")[:2])) < OLDEST:
        yield problem(
            about, f"version {version} is too old: jobguard needs Redis 6.2 or later, or Valkey"
        )
    policy, limit = info.get("maxmemory_policy", "noeviction"), info.get("maxmemory") or 0
    if info.get("role") == "slave":
        yield problem(about, "this is a replica: name the primary, or Sentinel")
    if info.get("cluster_enabled"):
        yield problem(
            about,
            "cluster mode is on, and jobguard does not work with it: scripts need all keys of a job on one "
            "node. Use a Redis without cluster mode, with Sentinel if you need failover",
        )
    if policy != "noeviction" and limit:
        yield problem(about, f"maxmemory-policy is {policy}: Redis drops jobs; set noeviction")
    if limit and info.get("used_memory", 0) > _FULL * limit:
        yield problem(
            about,
            f"{100 * info['used_memory'] // limit} % of maxmemory is used: Redis refuses jobs when it is "
            "full; raise maxmemory, or add workers",
        )
    clients = info.get("maxclients") or 0
    if clients and info.get("connected_clients", 0) > _FULL * clients:
        yield problem(about, f"{info['connected_clients']} of {clients} clients are connected")


def _judge_persistence(about: str, info: dict[str, Any]) -> Finding:
    if info.get("aof_enabled"):
        return ok(about, "append-only file on")
    if info.get("rdb_last_bgsave_status", "ok") != "ok":
        return note(
            about,
            "the last snapshot failed",
            "a restart brings an older state back, and finished jobs with it: the fence skips them",
            "read the log of Redis; most often its disk is full",
        )
    return note(about, "no append-only file: after a crash the leader puts missing jobs back")


def judge_rights(overview: dict[str, Any], reached: Sequence[Reached]) -> Iterator[Finding]:
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
            lacks, unknown = missing_commands(one.client)
            lacks += [f"~{key}" for key in missing_keys(one.client, keys)]
            user = user_of(one.client)
        except redis.RedisError as error:
            yield problem(one.about, f"rights could not be checked: {error}")
            continue
        if unknown:
            yield problem(
                one.about,
                f"this Redis does not have the commands {' '.join(unknown)}, which a reconciler needs: "
                "remove their rename-command from its configuration",
            )
        if lacks:
            yield problem(
                one.about,
                f"the user {user} lacks {' '.join(lacks)}. A reconciler needs: {acl_line(user, patterns)}",
            )
        elif not unknown:
            yield ok(one.about, f"the user {user} has all rights that a reconciler needs")


def _keys_of(source: dict[str, Any], queues: Sequence[str], rest: str) -> list[str]:
    """Return keys with the default names of a library, or patterns for them."""
    if source["prefix"] and source["library"] != "dramatiq":
        return []  # the user chose these names: they cannot be guessed
    if source["library"] == "celery":
        star = "*" if rest == "*" else ""  # a queue has a list for each priority
        names = [f"_kombu.binding.{rest}", f"unacked{star}", f"celery-task-meta-{rest}"]
        return names + [queue + star for queue in queues]
    return [f"{source['prefix'] or source['library']}:{rest}"]
