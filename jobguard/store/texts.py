"""Escape texts that PostgreSQL cannot store, shorten texts that are too long for a key, and bound times.

PostgreSQL accepts neither NUL nor one half of a surrogate pair, and a btree accepts at most 2,704 bytes
per row. Queue libraries accept any text as a job id, queue or task. So the connection escapes the
refused characters when it writes and restores them when it reads, and the store replaces a long key by
its hash.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from typing import Any

from psycopg.abc import AdaptContext, Buffer
from psycopg.adapt import Loader
from psycopg.pq import Format
from psycopg.types.json import JsonbBinaryLoader, JsonbLoader
from psycopg.types.string import StrBinaryDumper, StrDumperUnknown

_MARK = "\uf6a8"
"""A character for private use. The four hexadecimal digits after it give the original character."""
_REFUSED = re.compile(f"[\x00\ud800-\udfff{_MARK}]")
_ESCAPED = re.compile(f"{_MARK}([0-9a-f]{{4}})")
_LONGEST = 1000
"""Largest size of a key in bytes. Three keys of this size fit into one row of a btree leaf."""


_LAST = 9e12
"""The latest time that is stored, in seconds since the epoch: PostgreSQL ends in the year 294276."""


def moment(seconds: float | None) -> float | None:
    """Return a time that PostgreSQL can store: applications say "never" by any large number."""
    if seconds is None or seconds != seconds:
        return None
    return min(max(seconds, 0.0), _LAST)


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


def json_text(value: object) -> str:
    """Return the value as JSON with every text in it escaped; an object of another type is its text."""

    def text_of(value: object) -> str:
        return escaped(str(value))

    return json.dumps(_each_text(value, escaped), default=text_of)


def _each_text(value: Any, change: Callable[[str], str]) -> Any:
    """Return a value of JSON with each of its texts changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list | tuple):
        return [_each_text(one, change) for one in value]
    if isinstance(value, dict):
        texts = ((_each_text(key, change), one) for key, one in value.items())
        return {key: _each_text(one, change) for key, one in texts}
    return value


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


class JsonLoader(JsonbLoader):
    """Read a value of JSON, and restore the texts in it."""

    def load(self, data: Buffer) -> Any:
        """Return the value. Raises ValueError and RecursionError."""
        return _each_text(super().load(data), restored)


class _JsonBinaryLoader(JsonbBinaryLoader):
    def load(self, data: Buffer) -> Any:
        return _each_text(super().load(data), restored)


def register(context: AdaptContext) -> None:
    """Make a connection escape every text, and restore every text and those in JSON."""
    adapters: Any = context.adapters
    adapters.register_dumper(str, _BinaryDumper)
    adapters.register_dumper(str, _TextDumper)  # the last one is the default
    adapters.register_loader("text", _TextLoader)
    adapters.register_loader("text", _BinaryLoader)
    adapters.register_loader("jsonb", JsonLoader)
    adapters.register_loader("jsonb", _JsonBinaryLoader)
