"""Redis clients of our own, and the address of a Redis.

The host's clients may wait for a minute by default; ours have short timeouts. The address is the identity
of a source. Therefore it is made only here, and it contains no password.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import suppress
from contextvars import ContextVar
from functools import cache
from typing import Any, cast

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from jobguard.redis_urls import parse

_RETRIES = [Retry(NoBackoff(), n, supported_errors=(redis.ConnectionError,)) for n in (0, 1)]
_LOOPBACK = {"localhost", "127.0.0.1", "::1", ""}


def waits_forever(client: redis.Redis) -> bool:
    """Return True if a command of this client waits without a limit for a Redis that does not answer."""
    return getattr(client.connection_pool.make_connection(), "socket_timeout", 0) is None


def is_test_double(client: object) -> bool:
    """Return True for a client of fakeredis: its data ends with the process, so nothing is guarded."""
    return any(kind.__module__.split(".")[0] == "fakeredis" for kind in type(client).__mro__)


def address_of(client: redis.Redis) -> str:
    """Return ``host:port/db``, ``unix:path/db`` or ``sentinel:service/db``; loopback is one host."""
    pool = client.connection_pool
    kwargs: dict[str, Any] = pool.connection_kwargs
    db = int(kwargs.get("db") or 0)
    service = getattr(pool, "service_name", None)
    if service:
        return f"sentinel:{service}/{db}"
    if kwargs.get("path"):
        return f"unix:{kwargs['path']}/{db}"
    host = str(kwargs.get("host") or "localhost").lower()
    host = "localhost" if host in _LOOPBACK else host
    return f"{host}:{int(kwargs.get('port') or 6379)}/{db}"


# The options for the address and the account. We choose the others (timeouts, retries, hooks of pools).
_WHERE = ("host", "port", "path", "db", "username", "password", "credential_provider", "protocol")


def own_client(client: redis.Redis, *, timeout: float) -> redis.Redis:
    """Return a client for the same Redis that returns bytes and waits at most ``timeout`` seconds."""
    pool = client.connection_pool
    kwargs: dict[str, Any] = {
        name: value
        for name, value in pool.connection_kwargs.items()
        if (name in _WHERE or name.startswith("ssl_")) and value is not None
    }
    kwargs.update(
        socket_timeout=timeout, socket_connect_timeout=timeout, retry=Retry(NoBackoff(), 0)
    )
    service = getattr(pool, "service_name", None)
    if service:
        for name in ("host", "port", "path"):
            kwargs.pop(name, None)
        kwargs["ssl"] = issubclass(pool.connection_class, redis.SSLConnection)
        return cast(redis.Redis, cast(Any, pool).sentinel_manager.master_for(service, **kwargs))
    if "path" in kwargs:
        kwargs.pop("socket_connect_timeout")
    own = redis.ConnectionPool(connection_class=pool.connection_class, **kwargs)
    return redis.Redis(connection_pool=own)


def take_connection(pool: redis.ConnectionPool, command: str) -> Any:
    """Take a connection from a host's pool as its client would for this command; connect if necessary.

    The pool notices a socket that the other side has closed. Raises RedisError.
    """
    get: Any = pool.get_connection
    return get(command) if _wants_command(type(pool)) else get()


class bounded:
    """Limit the wait of this thread's commands on connections of a host's pool to ``seconds`` inside.

    After this time a command fails with a timeout error, and is not repeated. ``again``: a command on
    a connection that was closed is repeated once. ``connection`` was taken from the pool before; the pool
    gives it out first, to this thread, unless ``used`` says that the caller has it already.

    A connection is limited while this thread has it. Another thread may take it as soon as it is released,
    and a timeout that is set then could make that thread wait for ever.
    """

    __slots__ = ("_again", "_before", "_connection", "_kept", "_used", "pool", "seconds")

    def __init__(
        self, pool: Any, connection: Any, seconds: float, *, again: bool = False, used: bool = False
    ) -> None:
        self.pool, self._connection, self._used = pool, connection, used
        self.seconds, self._again = seconds, again
        self._kept: dict[int, tuple[Any, dict[str, Any]]] = {}

    def __enter__(self) -> None:
        _hook(self.pool)
        if self._used:
            self.take(lambda: None)
        self._before = _block.set(self)

    def __exit__(self, *error: object) -> None:
        _block.reset(self._before)
        for connection, _ in list(self._kept.values()):
            self.restore(connection)
        if (connection := self._connection) is not None:
            self._connection = None
            self.pool.release(connection)

    def take(self, get: Callable[[], Any]) -> Any:
        """Return the next connection for this thread, limited."""
        connection, self._connection = self._connection, None
        if connection is None:
            connection = get()
        self._limit(connection)
        return connection

    def restore(self, connection: Any) -> None:
        """Give a connection its own timeouts again, before it is released."""
        _, kept = self._kept.pop(id(connection), (None, None))
        if kept is not None:
            for name, value in kept.items():
                setattr(connection, name, value)
            _set_timeout(connection, kept.get("socket_timeout"))

    def _limit(self, connection: Any) -> None:
        before = getattr(connection, "socket_timeout", None)
        if before is not None and before <= self.seconds:
            return
        names = ("socket_timeout", "socket_connect_timeout", "retry")
        kept = {name: getattr(connection, name) for name in names if hasattr(connection, name)}
        self._kept[id(connection)] = connection, kept
        for name in kept:
            setattr(connection, name, _RETRIES[self._again] if name == "retry" else self.seconds)
        _set_timeout(connection, self.seconds)


_block: ContextVar[bounded | None] = ContextVar("jobguard_bounded", default=None)
_HOOKED = "_jobguard_bounded"


def _hook(pool: Any) -> None:
    """Have a pool tell the block of a thread which connections it gives out and takes back."""
    if pool.__dict__.setdefault(_HOOKED, mine := object()) is not mine:
        return
    get, put_back = pool.get_connection, pool.release

    def get_connection(*args: Any, **kwargs: Any) -> Any:
        block = _block.get()
        if block is None or block.pool is not pool:
            return get(*args, **kwargs)
        return block.take(lambda: get(*args, **kwargs))

    def release(connection: Any, *args: Any, **kwargs: Any) -> Any:
        block = _block.get()
        if block is not None:
            block.restore(connection)
        return put_back(connection, *args, **kwargs)

    pool.get_connection, pool.release = get_connection, release


def _set_timeout(connection: Any, seconds: float | None) -> None:
    # A pool that gives out a connection looks for unread data, and its parser then sets the timeout
    # again that the connection had when it was opened.
    parser = getattr(connection, "_parser", None)
    for place, name in (
        (getattr(parser, "_buffer", None), "socket_timeout"),
        (parser, "_socket_timeout"),
    ):
        if hasattr(place, name):
            setattr(place, name, seconds)
    sock = getattr(connection, "_sock", None)
    if sock is not None:
        with suppress(OSError):
            sock.settimeout(seconds)


@cache
def _wants_command(pool: type[Any]) -> bool:
    named = inspect.signature(pool.get_connection).parameters.get("command_name")
    return named is not None and named.default is inspect.Parameter.empty  # redis-py before 5.3


def client_from_url(url: str, *, timeout: float) -> redis.Redis:
    """Return a client of our own for a URL of any kind that ``redis_urls`` reads.

    ``sentinel://[user:password@]host[:port][,host[:port]…]/service[/db]`` means the master of that
    service, found by these sentinels; user and password are those of Redis. Raises ConfigurationError.
    """
    return own_client(parse(url).client(timeout=timeout), timeout=timeout)
