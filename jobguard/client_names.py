"""The name that a guarded process gives to the connections on which it takes jobs.

A leader counts the clients of Redis that take jobs from queues (see client_list.py). A name that is set by
``CLIENT SETNAME`` belongs to the connection: it survives a FLUSHALL and ends with the connection. So the
name shows reliably which clients are guarded. A name that the host gave stays in front of ours.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from zlib import crc32

from redis.exceptions import ResponseError

from jobguard.log import log_event

if TYPE_CHECKING:
    from jobguard.adapter import Source

_LABEL = "_jobguard_label"
_READ = re.compile(r"(?:(?P<name>.*):)?jobguard:(?P<source>[0-9a-f]{16}):(?P<place>[0-9a-f]{8})")
_UNNAMEABLE = re.compile(r"[^!-~]")


@dataclass(frozen=True, slots=True)
class Mark:
    """The parts of the name of a guarded connection."""

    name: str
    """The name that the host, or the worker, gave."""
    source: str
    place: str
    """A checksum of the library and the key prefix: the same in every namespace and ledger."""


def mark_of(source: Source, name: str = "") -> Mark:
    """Return the mark of the connections of this source's workers."""
    place = crc32(f"{source.library}\x00{source.prefix}".encode())
    return Mark(nameable(name), f"{source.id % 2**64:016x}", f"{place:08x}")


def read_mark(client_name: str) -> Mark | None:
    """Read the name of a client; None: it is not the name of a guarded client."""
    found = _READ.fullmatch(client_name)
    return None if found is None else Mark(found["name"] or "", found["source"], found["place"])


def nameable(name: str) -> str:
    """Return the name with each character replaced that CLIENT SETNAME does not accept."""
    return _UNNAMEABLE.sub("_", name)


def label_client(client: Any, source: Source, *, name: str = "") -> None:
    """Name the connections of a client: those of its pool, and the one that it keeps for itself.

    With ``single_connection_client=True``, a client takes its one connection out of the pool at once.
    """
    label = label_pool(client.connection_pool, source, name=name)
    if client.connection is not None:
        label.put_on(client.connection)
        client.connection.disconnect()


def label_pool(pool: Any, source: Source, *, name: str = "") -> Label:
    """Name the connections of a pool from now on. Idle connections are closed, to connect again named.

    Those that are in use connect again, named, before they are used next.
    """
    mark = mark_of(source, name)
    label: Label | None = pool.__dict__.get(_LABEL)
    if label is not None:
        label.mark = mark
        return label
    label = pool.__dict__[_LABEL] = Label(mark)
    make = pool.make_connection

    def make_connection(*args: Any, **kwargs: Any) -> Any:
        connection = make(*args, **kwargs)
        label.put_on(connection)
        return connection

    pool.make_connection = make_connection
    for connection in _idle(pool):
        label.put_on(connection)
        connection.disconnect()
    for connection in list(getattr(pool, "_in_use_connections", ())):
        label.put_on(connection)
        # Older versions of redis-py have no such mark.
        getattr(connection, "mark_for_reconnect", bool)()
    return label


def _idle(pool: Any) -> list[Any]:
    queue = getattr(getattr(pool, "pool", None), "queue", ())  # of a BlockingConnectionPool
    known = [*getattr(pool, "_available_connections", ()), *queue]
    return [connection for connection in known if connection is not None]


class Label:
    """The name for connections, set at each connect."""

    def __init__(self, mark: Mark) -> None:
        self.mark = mark
        self._refused = False

    def put_on(self, connection: Any) -> None:
        """Name this connection at its next connect. The connection keeps only a weak reference to this."""
        connection.register_connect_callback(self.name)

    def name(self, connection: Any) -> None:
        """Set the name, as a part of the connect. A refusal is logged once and is no error."""
        given = self.mark.name or nameable(getattr(connection, "client_name", None) or "")
        name = f"jobguard:{self.mark.source}:{self.mark.place}"
        name = f"{given}:{name}" if given else name
        connection.send_command("CLIENT", "SETNAME", name, check_health=False)
        try:
            connection.read_response()
        except ResponseError as error:
            if not self._refused:
                self._refused = True
                log_event("connection_unnamed", error=str(error))
