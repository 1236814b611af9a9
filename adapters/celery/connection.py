"""Connections of kombu: to which Redis one leads, and the client of each channel."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import wraps
from types import SimpleNamespace
from typing import Any

import redis
from kombu.connection import Connection
from kombu.transport import redis as transport

from jobguard.adapters.celery.layout import Layout
from jobguard.clients import address_of, take_connection
from jobguard.patching import Hooks

_CLIENT = "_jobguard_client"
_OPTIONS = ("master_name", *(f.name for f in fields(Layout)))


@dataclass(frozen=True, slots=True)
class BrokerAddress:
    """A broker: its address, and the layout of its keys."""

    address: str
    layout: Layout
    prefix: str = field(init=False)
    """The layout as the prefix of a source."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "prefix", str(self.layout))


_known: dict[tuple[Any, ...], BrokerAddress | None] = {}


def broker_address_of(connection: Any) -> BrokerAddress | None:
    """Return where this connection leads; None if not to a Redis. Fast, and without any request."""
    if not isinstance(connection, Connection):
        return None  # a user's test double
    options = connection.transport_options or {}
    several = first_of_several(connection)
    where = (
        (several,) if several else (connection.hostname, connection.port, connection.virtual_host)
    )
    asked = [_hashable(options[name]) if name in options else None for name in _OPTIONS]
    key = (connection.transport_cls, *where, *asked)
    if key not in _known:
        if len(_known) > 1_000:
            _known.clear()
        _known[key] = _find(_first(connection))
    return _known[key]


def is_redis(connection: Any) -> bool:
    """Return True if kombu's transport for this connection is Redis. Raise KeyError if there is none."""
    return issubclass(connection.get_transport_cls(), transport.Transport)


def check(connection: Any) -> None:
    """Raise KeyError for a scheme unknown to kombu, which kombu would take for a Redis on this machine."""
    scheme, found, _ = str(connection.hostname or "").partition("://")
    if found and scheme != "socket":
        raise KeyError(f"No such transport: {connection.transport_cls}+{scheme}")


def client_of(connection: Any) -> redis.Redis:
    """Return a client as this connection would make one; it is not connected yet."""
    offline: Any = offline_channel(_first(connection))
    return redis.Redis(connection_pool=offline._get_pool())


def offline_channel(connection: Any) -> transport.Channel:
    """Return a channel with all settings of this connection's channels, but without a connection.

    It prepares a message exactly as a real channel does, so its output equals the bytes in Redis.
    """
    kind: type[Any] = connection.get_transport_cls()
    channel: Any = object.__new__(kind.Channel)
    options: Mapping[str, Any] = connection.transport_options or {}
    for name in kind.Channel.from_transport_options:
        if name in options:
            setattr(channel, name, options[name])
    channel.connection = SimpleNamespace(client=connection, default_port=kind.default_port)
    offline: transport.Channel = channel
    return offline


def check_out(pool: redis.ConnectionPool) -> None:
    """Take a connection from a pool and give it back: this connects if needed, and sends no command.

    This finds a socket that the other side has closed. Raise RedisError.
    """
    pool.release(take_connection(pool, "PING"))


def first_of_several(connection: Any) -> str:
    """Return the first of several brokers for failover; "" for a single broker, or one with Sentinels."""
    urls = connection.alt
    return "" if not urls or len(urls) < 2 or urls[0].startswith("sentinel") else str(urls[0])


def _first(connection: Any) -> Any:
    """Return the guarded one of a list of brokers: the first."""
    url = first_of_several(connection)
    if not url:
        return connection
    return Connection(url, ssl=connection.ssl, transport_options=connection.transport_options)


def _find(connection: Any) -> BrokerAddress | None:
    if not is_redis(connection):
        return None
    offline: Any = offline_channel(connection)
    address = address_of(client_of(connection))
    return BrokerAddress(
        address,
        Layout(
            global_keyprefix=str(offline.global_keyprefix),
            sep=str(offline.sep),
            priority_steps=tuple(int(step) for step in offline.priority_steps),
            unacked_key=str(offline.unacked_key),
            unacked_index_key=str(offline.unacked_index_key),
            fanout_prefix=_fanout_prefix(offline.fanout_prefix),
        ),
    )


def _fanout_prefix(option: bool | str) -> str:
    if isinstance(option, str):
        return option
    return str(transport.Channel.keyprefix_fanout) if option else ""


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list | tuple) else value


def put_on(hooks: Hooks) -> None:
    """Let each channel of kombu keep its client."""
    hooks.put(transport.Channel, "_create_client", create_client)


def create_client(original: Callable[..., Any]) -> Callable[..., Any]:
    """Channel._create_client: create the client of a channel once for its pool, not for each command.

    A client of redis-py only borrows connections of its pool, for any number of threads. Measured with
    redis-py 8.1: a worker creates two clients for a job, in a fourth of the time that it needs for the job.
    """

    @wraps(original)
    def hook(self: Any, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return original(self, *args, **kwargs)
        client = vars(self).get(_CLIENT)
        if getattr(client, "connection_pool", None) is not self.pool:
            client = vars(self)[_CLIENT] = original(self)
        return client

    return hook
