"""Which Redis a kombu connection leads to, found out without going there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import SimpleNamespace
from typing import Any

import redis
from kombu.connection import Connection
from kombu.transport import redis as transport

from jobguard.adapters.celery.layout import Layout
from jobguard.clients import address_of, take_connection

_OPTIONS = ("master_name", *(f.name for f in fields(Layout)))


@dataclass(frozen=True, slots=True)
class BrokerAddress:
    """A broker: its address, and where its keys lie."""

    address: str
    layout: Layout


_known: dict[tuple[Any, ...], BrokerAddress | None] = {}


def broker_address_of(connection: Any) -> BrokerAddress | None:
    """Return where this connection leads; None: not to a Redis. Asks nobody, and is quick."""
    if not isinstance(connection, Connection):
        return None  # a user's double
    options = connection.transport_options or {}
    several = _several(connection)
    where = (
        (several,) if several else (connection.hostname, connection.port, connection.virtual_host)
    )
    asked = (_hashable(options.get(name)) for name in _OPTIONS)
    key = (connection.transport_cls, *where, *asked)
    if key not in _known:
        if len(_known) > 1_000:
            _known.clear()
        _known[key] = _find(_first(connection))
    return _known[key]


def is_redis(connection: Any) -> bool:
    """Whether kombu's transport for this connection is the Redis one. Raises KeyError if there is none."""
    return issubclass(connection.get_transport_cls(), transport.Transport)


def check(connection: Any) -> None:
    """Raise KeyError for a scheme that kombu does not know, and would take for a Redis on this machine."""
    scheme, found, _ = str(connection.hostname or "").partition("://")
    if found and scheme != "socket":
        raise KeyError(f"No such transport: {connection.transport_cls}+{scheme}")


def client_of(connection: Any) -> redis.Redis:
    """Return a client as this connection would make one; nothing is connected to yet."""
    paper: Any = on_paper(_first(connection))
    return redis.Redis(connection_pool=paper._get_pool())


def on_paper(connection: Any) -> transport.Channel:
    """Return a channel that knows all a channel of this connection would, and has no connection.

    It makes a message just as the real one does: what it writes is what stands in Redis.
    """
    kind: type[Any] = connection.get_transport_cls()
    channel: Any = object.__new__(kind.Channel)
    options: Mapping[str, Any] = connection.transport_options or {}
    for name in kind.Channel.from_transport_options:
        if name in options:
            setattr(channel, name, options[name])
    channel.connection = SimpleNamespace(client=connection, default_port=kind.default_port)
    paper: transport.Channel = channel
    return paper


def check_out(pool: redis.ConnectionPool) -> None:
    """Get a connection of a pool and give it back: connects if need be, and asks nothing.

    A socket that the other side has closed is noticed by this. Raises RedisError.
    """
    pool.release(take_connection(pool, "PING"))


def _several(connection: Any) -> str:
    """Return the first of several brokers to fail over to; "": there is only one, or one of Sentinels."""
    urls = connection.alt
    return "" if not urls or len(urls) < 2 or urls[0].startswith("sentinel") else str(urls[0])


def _first(connection: Any) -> Any:
    """Of a list of brokers, the first is the one that is guarded."""
    url = _several(connection)
    if not url:
        return connection
    return Connection(url, ssl=connection.ssl, transport_options=connection.transport_options)


def _find(connection: Any) -> BrokerAddress | None:
    if not is_redis(connection):
        return None
    paper: Any = on_paper(connection)
    address = address_of(client_of(connection))
    return BrokerAddress(
        address,
        Layout(
            global_keyprefix=str(paper.global_keyprefix),
            sep=str(paper.sep),
            priority_steps=tuple(int(step) for step in paper.priority_steps),
            unacked_key=str(paper.unacked_key),
            unacked_index_key=str(paper.unacked_index_key),
            fanout_prefix=_fanout_prefix(paper.fanout_prefix),
        ),
    )


def _fanout_prefix(option: bool | str) -> str:
    if isinstance(option, str):
        return option
    return str(transport.Channel.keyprefix_fanout) if option else ""


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list | tuple) else value
