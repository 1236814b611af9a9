"""The ledger's schema: its migrations, the migrator, and the named statements.

``queries.sql`` holds the statements in the path of a job. Each one begins with its name and a comment
that gives its purpose, followed by the SQL up to the next name::

    -- name: record_one
    -- Commit one delivery as owed. The same token again changes nothing.
    insert into jobguard.jobs …
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from jobguard.schema.migrator import GRANT_A_ROLE, accept_move, check, latest, migrate, sql
from jobguard.schema.roles import roles_sql

__all__ = [
    "GRANT_A_ROLE",
    "accept_move",
    "check",
    "latest",
    "migrate",
    "parse",
    "roles_sql",
    "sql",
    "statements",
]


@functools.cache
def statements() -> Mapping[str, str]:
    """Return the statements of queries.sql by name."""
    text = Path(__file__).with_name("queries.sql").read_text(encoding="utf-8")
    return MappingProxyType(parse(text))


def parse(text: str) -> dict[str, str]:
    """Return the statements in a text by name, without the comments above them."""
    found: dict[str, str] = {}
    _, *parts = re.split(r"^-- name: *(\w+) *$", text, flags=re.MULTILINE)
    for name, body in zip(parts[::2], parts[1::2], strict=True):
        if name in found:
            raise ValueError(f"two statements are named {name}")
        found[name] = re.sub(r"\A(?:\s*--.*\n)*", "", body).strip().removesuffix(";")
    return found
