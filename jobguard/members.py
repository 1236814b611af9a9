"""The members of Redis lists, read once in small pieces and kept in 8 bytes each."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

CHUNK = 5_000
"""Members in one call. Redis does nothing else meanwhile: 5,000 ids take about 2 ms."""
_KEYS = 500
"""Lists whose lengths are asked for in one call."""
_IN_A_BUCKET = 256
_WORTH_KEEPING = 20_000
"""Members; fewer are read again for each page, because that is cheap and exact."""
_SHARE = 20
"""Reading takes at most one part in this many of the time, as long as nothing is missing..."""
_SHARE_MISSING = 5
"""...and one part in this many, if something is missing that may have come since."""


def nothing() -> None:
    """Do nothing between two pieces."""


class Members:
    """A set of byte strings that keeps 64 bits of each one.

    Two of ten million strings are taken for each other once in 100,000 years of readings, and not
    twice: the hash has another key in each process.
    """

    __slots__ = ("_buckets", "_count")

    def __init__(self, expected: int = 0) -> None:
        self._buckets = [bytearray() for _ in range(expected // _IN_A_BUCKET + 1)]
        self._count = 0

    def add(self, member: bytes) -> None:
        """Add one."""
        number = hash(member)
        self._buckets[number % len(self._buckets)] += number.to_bytes(8, "little", signed=True)
        self._count += 1

    def update(self, members: Iterable[bytes]) -> None:
        """Add many."""
        buckets = self._buckets
        size = len(buckets)
        for number in map(hash, members):
            buckets[number % size] += number.to_bytes(8, "little", signed=True)
            self._count += 1

    def __contains__(self, member: object) -> bool:
        number = hash(member)
        wanted = number.to_bytes(8, "little", signed=True)
        return wanted in self._buckets[number % len(self._buckets)]

    def __len__(self) -> int:
        """Return how many were added; one that was added twice counts twice."""
        return self._count


@dataclass(slots=True)
class _Reading:
    begun: float
    members: Members
    missed: set[bytes] = field(default_factory=set)
    """Members that it did not have: it is never the second proof of that."""


class ListReader:
    """Knows the members of lists, by readings that serve for some time.

    Workers take from the head, so a list is read from its tail: a member can be seen twice, and is never
    skipped. A member that a reading has may have left since. A member that it does not have may have
    come since; then the list is read again, unless the reading is young.
    """

    def __init__(self, client: Any, pause: Callable[[], None] = nothing) -> None:
        self._client = client
        self.pause = pause
        """Called after each piece."""
        self._readings: dict[str, _Reading] = {}
        self._cost = 0.0  # Seconds that all present readings took.
        self._begun = float("-inf")

    def find(self, wanted: Mapping[str, Mapping[bytes, float]]) -> dict[str, set[bytes]]:
        """Return which of these members are in these lists.

        ``wanted``: for each list the members, each with the seconds for which it must have been there. The
        same member again is looked for in a later reading. Raises RedisError.
        """
        now = time.monotonic()
        count = sum(len(reading.members) for reading in self._readings.values())
        if count < _WORTH_KEEPING or now - self._begun > _SHARE * self._cost:
            self._readings.clear()
            self._cost, self._begun = 0.0, now
        self._read([key for key in wanted if key not in self._readings])
        late = [key for key, members in wanted.items() if self._is_late(key, members)]
        self._read(late)
        found: dict[str, set[bytes]] = {}
        for key, members in wanted.items():
            reading = self._readings[key]
            found[key] = {member for member in members if member in reading.members}
            reading.missed.update(members.keys() - found[key])
        return found

    def has(self, key: str, member: bytes) -> bool:
        """Return True if the present reading of this list has this member."""
        reading = self._readings.get(key)
        return reading is not None and member in reading.members

    def _is_late(self, key: str, wanted: Mapping[bytes, float]) -> bool:
        """Return True if something is missing that a new reading may show."""
        reading = self._readings[key]
        missing = [member for member in wanted if member not in reading.members]
        if not missing:
            return False
        age = time.monotonic() - reading.begun
        return (
            age > _SHARE_MISSING * self._cost
            or any(wanted[member] <= age for member in missing)
            or not reading.missed.isdisjoint(missing)
        )

    def _read(self, keys: Sequence[str]) -> None:
        began = time.monotonic()
        small: list[str] = []
        room = CHUNK
        for key, length in self._lengths(keys):
            if length > CHUNK:
                self._readings[key] = _Reading(time.monotonic(), self._from_the_tail(key, length))
                continue
            if length > room:
                self._read_small(small)
                small, room = [], CHUNK
            small.append(key)
            room -= length
        self._read_small(small)
        self._cost += time.monotonic() - began

    def _lengths(self, keys: Sequence[str]) -> Iterable[tuple[str, int]]:
        for start in range(0, len(keys), _KEYS):
            some = keys[start : start + _KEYS]
            with self._client.pipeline(transaction=False) as pipe:
                for key in some:
                    pipe.llen(key)
                lengths = pipe.execute()
            self.pause()
            yield from zip(some, lengths, strict=True)

    def _read_small(self, keys: Sequence[str]) -> None:
        for start in range(0, len(keys), _KEYS):
            some = keys[start : start + _KEYS]
            begun = time.monotonic()
            with self._client.pipeline(transaction=False) as pipe:
                for key in some:
                    pipe.lrange(key, 0, -1)
                for key, members in zip(some, pipe.execute(), strict=True):
                    self._readings[key] = _Reading(begun, Members(len(members)))
                    self._readings[key].members.update(members)
            self.pause()

    def _from_the_tail(self, key: str, length: int) -> Members:
        found = Members(length)
        end = -1
        while True:
            chunk: list[bytes] = self._client.lrange(key, end - CHUNK + 1, end)
            found.update(chunk)
            self.pause()
            if len(chunk) < CHUNK:
                return found
            end -= CHUNK
