"""Escape texts that PostgreSQL cannot store, and shorten texts that are too long for a key.

PostgreSQL accepts neither NUL nor one half of a surrogate pair, and a btree accepts at most 2,704 bytes
per row. Queue libraries accept any text as a job id, queue or task. So the connection escapes the
refused characters when it writes and restores them when it reads, and the store replaces a long key by
its hash.
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
"""A character for private use. The four hexadecimal digits after it give the original character."""
_REFUSED = re.compile(f"[\x00\ud800-\udfff{_MARK}]")
_ESCAPED = re.compile(f"{_MARK}([0-9a-f]{{4}})")
_LONGEST = 1000
"""Largest size of a key in bytes. Three keys of this size fit into one row of a btree leaf."""


def escaped(text: str) -> str:
    """Return the text with every character escaped that PostgreSQL refuses."""
    if text.isascii() and "\x00" not in text:
        return text
    return _REFUSED.sub(lambda found: f"{_MARK}{ord(found[0]):04x}", text)


def restored(text: str) -> str:
    """Return the original of an escaped text."""
    if _MARK not in text:
        return text
    return _ESCAPED.sub(lambda found: chr(int(found[1], 16)), text)


def key(text: str) -> str:
    """Return the text, or a short replacement if it is too long. The same text gives the same key."""
    if len(text) <= _LONGEST // 7:  # an escaped character has at most 7 bytes
        return text
    stored = escaped(text).encode()
    if len(stored) <= _LONGEST:
        return text
    return f"{text[:40]}#{hashlib.sha256(stored).hexdigest()}"


def name(text: str) -> str | None:
    """Return the text if its key differs from it, else None."""
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
    """Make a connection escape and restore every text."""
    adapters: Any = context.adapters
    adapters.register_dumper(str, _BinaryDumper)
    adapters.register_dumper(str, _TextDumper)  # the last one is the default
    adapters.register_loader("text", _TextLoader)
    adapters.register_loader("text", _BinaryLoader)
