"""Texts that Postgres cannot hold, or cannot hold as a key, and how the ledger stores them.

Postgres takes neither NUL nor half of a surrogate pair, and a btree takes no more than 2,704 bytes a row.
Libraries take ids, queues and tasks in any words. So what Postgres refuses is escaped on the way in and
restored on the way out, by the connection; and a long key is replaced by its hash, by the store.
"""

from __future__ import annotations

import hashlib
import re
from typing import Any

from psycopg.abc import AdaptContext, Buffer
from psycopg.adapt import Loader
from psycopg.pq import Format
from psycopg.types.string import StrBinaryDumper, StrDumperUnknown

_MARK = "\uf6a8"
"""A character for private use. Behind it stand four hexadecimal digits of the character that is meant."""
_REFUSED = re.compile(f"[\x00\ud800-\udfff{_MARK}]")
_ESCAPED = re.compile(f"{_MARK}([0-9a-f]{{4}})")
_LONGEST = 1000
"""Bytes of a key. Three of them fit into a row of a btree's leaf."""


def escaped(text: str) -> str:
    """Return the text as Postgres can hold it."""
    if text.isascii() and "\x00" not in text:
        return text
    return _REFUSED.sub(lambda found: f"{_MARK}{ord(found[0]):04x}", text)


def restored(text: str) -> str:
    """Return the text that was escaped."""
    if _MARK not in text:
        return text
    return _ESCAPED.sub(lambda found: chr(int(found[1], 16)), text)


def key(text: str) -> str:
    """Return the text, or a short one in its place that is the same for the same text."""
    if len(text) <= _LONGEST // 7:  # so long is an escaped character at most
        return text
    stored = escaped(text).encode()
    if len(stored) <= _LONGEST:
        return text
    return f"{text[:40]}#{hashlib.sha256(stored).hexdigest()}"


def name(text: str) -> str | None:
    """Return the text if its key is another one; else None."""
    return None if key(text) == text else text


class _BinaryDumper(StrBinaryDumper):
    def dump(self, obj: str) -> Buffer | None:
        return super().dump(escaped(obj))


class _TextDumper(StrDumperUnknown):
    def dump(self, obj: str) -> Buffer | None:
        return super().dump(escaped(obj))


class _TextLoader(Loader):
    def load(self, data: Buffer) -> str:
        return restored(str(data, "utf-8"))


class _BinaryLoader(_TextLoader):
    format = Format.BINARY


def register(context: AdaptContext) -> None:
    """Have a connection escape and restore every text."""
    adapters: Any = context.adapters
    adapters.register_dumper(str, _BinaryDumper)
    adapters.register_dumper(str, _TextDumper)  # the last one is the default
    adapters.register_loader("text", _TextLoader)
    adapters.register_loader("text", _BinaryLoader)
