"""Find out the rights of a reconciler's Redis user, by commands that change nothing.

``ACL DRYRUN`` needs Redis 7 and rights of its own. Trying a command works on every version.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

import redis

_PROBE = "jobguard:doctor"
_COMMANDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("+ping", ("PING",)),
    ("+info", ("INFO", "server")),
    ("+time", ("TIME",)),
    ("+exists", ("EXISTS", _PROBE)),
    ("+get", ("GET", _PROBE)),
    ("+mget", ("MGET", _PROBE)),
    ("+hget", ("HGET", _PROBE, "x")),
    ("+hmget", ("HMGET", _PROBE, "x")),
    ("+hgetall", ("HGETALL", _PROBE)),
    ("+hscan", ("HSCAN", _PROBE, "0")),
    ("+scan", ("SCAN", "0", "COUNT", "1")),
    ("+lrange", ("LRANGE", _PROBE, "0", "0")),
    ("+llen", ("LLEN", _PROBE)),
    ("+smembers", ("SMEMBERS", _PROBE)),
    ("+zrange", ("ZRANGE", _PROBE, "0", "0")),
    ("+zscore", ("ZSCORE", _PROBE, "x")),
    ("+del", ("DEL", _PROBE)),
    ("+hset", ("HSET", _PROBE, "x", "1")),
    ("+hdel", ("HDEL", _PROBE, "x")),
    ("+expire", ("EXPIRE", _PROBE, "1")),
    ("+set", ("SET", _PROBE, "1", "XX", "PX", "1")),
    ("+lrem", ("LREM", _PROBE, "0", "x")),
    ("+srem", ("SREM", _PROBE, "x")),
    ("+zrem", ("ZREM", _PROBE, "x")),
    ("+xrange", ("XRANGE", _PROBE, "-", "-", "COUNT", "1")),
    ("+xlen", ("XLEN", _PROBE)),
    ("+xdel", ("XDEL", _PROBE, "0-1")),
    ("+script|load", ("SCRIPT", "LOAD", "return 1")),
    ("+eval", ("EVAL", "return 1", "0")),
    ("+evalsha", ("EVALSHA", "e0e1f9fabfc9d4800c877a703b823ac0578ff8db", "0")),  # return 1
    ("+client|list", ("CLIENT", "LIST", "TYPE", "pubsub")),
    ("+pubsub|channels", ("PUBSUB", "CHANNELS", _PROBE)),
    ("+multi", ("MULTI",)),
)


def missing_commands(client: redis.Redis) -> tuple[list[str], list[str]]:
    """Return the rights that this user lacks, as ACL SETUSER takes them, and the unknown commands.

    ``rename-command`` takes a command away from every user.
    """
    refused: list[str] = []
    unknown: list[str] = []
    own: Any = client
    with own.client() as one:  # MULTI needs one connection
        for right, words in (*_COMMANDS, ("+exec", ("EXEC",))):
            error = _error(one, words)
            if _is_refused(error):
                refused.append(right)
            elif is_unknown(error):
                unknown.append(words[0])
    return refused, unknown


def is_unknown(error: Exception | None) -> bool:
    """Return True if Redis answered that it has no such command."""
    return str(error).lower().removeprefix("err ").startswith("unknown command")


def missing_keys(client: redis.Redis, keys: Iterable[str]) -> list[str]:
    """Return those of these keys that this user may not write.

    The test removes a field that does not exist: this does not change a hash, and fails on a key of
    another type without changing it.
    """
    return [key for key in keys if _is_refused(_error(client, ("HDEL", key, _PROBE)))]


def acl_line(user: str, patterns: Sequence[str]) -> str:
    """Return the command that grants everything that a reconciler needs."""
    keys = " ".join(f"~{pattern}" for pattern in dict.fromkeys(("jobguard:*", *patterns)))
    return (
        f"ACL SETUSER {user} {keys} &* +@read +@write +@transaction +@pubsub -@dangerous +ping +hello "
        "+select +info +time +eval +evalsha +script|load +client|id +client|list +client|setname "
        "+client|setinfo +pubsub|channels +pubsub|numsub"
    )


def user_of(client: redis.Redis) -> str:
    """Return the user's name; if Redis does not report it, take it from the connection's settings."""
    try:
        name = cast(Any, client).execute_command("ACL WHOAMI")
    except redis.RedisError:
        name = client.connection_pool.connection_kwargs.get("username") or "default"
    return name.decode() if isinstance(name, bytes) else str(name)


def _error(client: redis.Redis, words: Sequence[str]) -> redis.RedisError | None:
    try:
        cast(Any, client).execute_command(*words)
    except redis.RedisError as error:
        return error
    return None


def _is_refused(error: Exception | None) -> bool:
    return isinstance(error, redis.exceptions.NoPermissionError) or "NOPERM" in str(error)
