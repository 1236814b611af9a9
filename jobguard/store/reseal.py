"""Seal what is stored with the newest key: after a key was added, or after `encrypt` was set.

Each page is read, sealed here and written back. A row that another process changed meanwhile is left to
the next run. A row that no key unseals is counted and left as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import psycopg
from psycopg.rows import dict_row

from jobguard.errors import Unsealable
from jobguard.postgres_hosts import writable
from jobguard.sealing import Sealer

_PAGE = 500


class _Sealed(NamedTuple):
    """Columns that are sealed, and how a row and the order of rows are known."""

    table: str
    key: tuple[str, ...]
    order: tuple[str, ...]
    columns: tuple[str, ...]


_TABLES = (
    _Sealed("jobs", ("source", "token"), ("token", "source"), ("envelope",)),
    _Sealed(
        "history",
        ("source", "token", "ended_at"),
        ("token", "source", "ended_at"),
        ("envelope", "errors"),
    ),
    _Sealed("joins", ("source", "id"), ("source", "id"), ("state",)),
    _Sealed(
        "join_parts",
        ("source", "join_id", "member"),
        ("source", "join_id", "member"),
        ("state", "envelope"),
    ),
    _Sealed("effects", ("source", "key"), ("key", "source"), ("result",)),
)


@dataclass(slots=True)
class Resealed:
    """What was found."""

    seen: int = 0
    sealed: int = 0
    """Rows that were sealed now."""
    unreadable: int = 0
    """Rows that no key unseals."""


def reseal(conninfo: Callable[[], str], sealer: Sealer, *, dry_run: bool = False) -> Resealed:
    """Seal every row of every namespace with the newest key. Raises StoreUnavailable or KeysUnavailable."""
    done = Resealed()
    with psycopg.connect(
        writable(conninfo()), autocommit=True, prepare_threshold=None, row_factory=dict_row
    ) as connection:
        for table in _TABLES:
            for row in _rows(connection, table):
                done.seen += 1
                try:
                    changed = _changes(row, table.columns, sealer)
                except Unsealable:
                    done.unreadable += 1
                    continue
                if changed and (dry_run or _write(connection, table, row, changed)):
                    done.sealed += 1
    return done


def _rows(connection: psycopg.Connection[Any], table: _Sealed) -> Iterator[Mapping[str, Any]]:
    names = ", ".join(dict.fromkeys((*table.key, *table.columns)))
    filled = " or ".join(f"{column} is not null" for column in table.columns)
    order = ", ".join(table.order)
    after: Sequence[Any] = ()
    while True:
        beyond = f"and ({order}) > ({', '.join(['%s'] * len(after))})" if after else ""
        page = connection.execute(
            f"select {names} from jobguard.{table.table} where ({filled}) {beyond}"
            f" order by {order} limit {_PAGE}".encode(),
            after,
        ).fetchall()
        yield from page
        if len(page) < _PAGE:
            return
        after = [page[-1][name] for name in table.order]


def _changes(row: Mapping[str, Any], columns: Sequence[str], sealer: Sealer) -> dict[str, Any]:
    sealed: dict[str, Any] = {}
    for column in columns:
        stored = row[column]
        if (
            stored is None or stored == b""
        ):  # an empty envelope of a join's part means: not recorded
            continue
        if isinstance(stored, list):
            sealed[column] = [error and sealer.reseal_text(error) for error in stored]
        elif isinstance(stored, str):
            sealed[column] = sealer.reseal_text(stored)
        else:
            sealed[column] = sealer.reseal(bytes(cast(bytes, stored)))
    return {column: value for column, value in sealed.items() if value != row[column]}


def _write(
    connection: psycopg.Connection[Any],
    table: _Sealed,
    row: Mapping[str, Any],
    changed: Mapping[str, Any],
) -> bool:
    sets = ", ".join(f"{column} = %s" for column in changed)
    same = " and ".join(f"{name} = %s" for name in (*table.key, *changed))
    values = [*changed.values(), *(row[name] for name in (*table.key, *changed))]
    done = connection.execute(
        f"update jobguard.{table.table} set {sets} where {same}".encode(), values
    )
    return done.rowcount == 1
