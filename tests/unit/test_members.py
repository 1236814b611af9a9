"""Members of lists that are read in pieces, kept in eight bytes each, and read again only where needed."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from jobguard import members
from jobguard.members import ListReader, Members

OLD = 1e9
"""Seconds for which a member has been in its list."""


class Lists:
    """A Redis with lists, which counts the members that it returned. It is its own pipeline."""

    def __init__(self, **lists: int) -> None:
        self.lists = {key: [b"%d" % n for n in range(count)] for key, count in lists.items()}
        self.returned = 0
        self._answers: list[Any] | None = None

    def pipeline(self, *, transaction: bool) -> Lists:
        """Begin to collect answers."""
        assert not transaction
        self._answers = []
        return self

    def __enter__(self) -> Lists:
        return self

    def __exit__(self, *_error: object) -> None:
        self._answers = None

    def execute(self) -> list[Any]:
        """Return the answers."""
        assert self._answers is not None
        return self._answers

    def _answer(self, value: Any) -> Any:
        if self._answers is not None:
            self._answers.append(value)
        return value

    def llen(self, key: str) -> Any:
        """Return the length of a list."""
        return self._answer(len(self.lists.get(key, ())))

    def lrange(self, key: str, start: int, end: int) -> Any:
        """Return a part of a list, up to and including ``end``."""
        found = self.lists.get(key, [])
        first, last = (n + len(found) if n < 0 else n for n in (start, end))
        chunk = found[max(0, first) : last + 1]
        self.returned += len(chunk)
        return self._answer(chunk)


def wanted(*names: str, age: float = OLD) -> dict[bytes, float]:
    """Return these as members of one list."""
    return {name.encode(): age for name in names}


def test_members_are_what_was_added() -> None:
    """All of what was added is found, and nothing else."""
    some = Members(10_000)
    some.update(b"%d" % n for n in range(10_000))
    some.add(b"one more")
    assert all(b"%d" % n in some for n in range(10_000)) and b"one more" in some
    assert not any(b"%d" % n in some for n in range(10_000, 30_000))
    assert len(some) == 10_001
    assert sum(map(len, some._buckets)) == 8 * 10_001


def test_a_long_list_is_read_once_for_many_pages() -> None:
    """Pages that a reading answers do not read the list again; there is a pause after each small piece."""
    client, pauses = Lists(a=30_000, b=7), []
    reader = ListReader(client, lambda: pauses.append(client.returned))
    for start in range(0, 30_000, 1_000):
        some = wanted(*map(str, range(start, start + 1_000)))
        reader._cost = 60.0
        assert reader.find({"a": some, "b": wanted("3")}) == {"a": some.keys(), "b": {b"3"}}
    assert client.returned == 30_007
    pieces = [after - before for before, after in itertools.pairwise(pauses)]
    assert max(pieces) <= members.CHUNK


def test_short_lists_are_always_read() -> None:
    """Lists of some thousand members are read for each page, so that what left is not found."""
    client = Lists(a=100)
    reader = ListReader(client)
    assert reader.find({"a": wanted("99", "100")}) == {"a": {b"99"}}
    client.lists["a"].clear()
    assert reader.find({"a": wanted("99")}) == {"a": set()}
    assert reader.find({"no such list": wanted("1")}) == {"no such list": set()}


@pytest.mark.parametrize("age", [0.0, OLD])
def test_what_is_missing_is_looked_for_again(age: float) -> None:
    """A member that came after the reading is found, and the same reading is never a second proof."""
    client = Lists(a=25_000)
    reader = ListReader(client)
    reader.find({"a": wanted("1")})
    reader._cost = 60.0
    client.lists["a"].append(b"new")
    if age == OLD:
        assert reader.find({"a": wanted("new", age=age)}) == {"a": set()}
    assert reader.find({"a": wanted("new", age=age)}) == {"a": {b"new"}}
