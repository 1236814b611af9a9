"""The pulse: a counter that shows whether Redis lost data, and the beats beside it.

Layout in Redis, all of it in the source's own db:

- ``jobguard:pulse:<namespace>:<library>[:<prefix>]`` (hash): ``epoch`` (uuid; a new one after every
  incident), ``n`` (the counter), ``source`` (the id of the source this Redis is taken for),
  ``installation`` (the uuid of the ledger). Written by the leader alone.
- ``jobguard:beat:<worker id>`` (string): a worker's beat counter, with a time to live.

The leader moves ``n`` to ``n + 1`` by compare-and-set, and only after Postgres holds the last value.
So Redis can be one ahead of Postgres (the leader died between the two), never two, and never behind:
a pulse that is missing or lower means that Redis lost data, one that is further ahead that Postgres
did.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol
from uuid import UUID

from jobguard.redis_values import number_in

_FIELDS = ("epoch", "n", "source", "installation")


ACCEPTED = -1
"""In Postgres, in place of the counter: a person said that what stands in Redis is right."""


class Kept(Protocol):
    """What has a pulse of its own in its Redis: a source, by whichever address it is reached."""

    @property
    def namespace(self) -> str:
        """The tenant."""

    @property
    def library(self) -> str:
        """The queue library."""

    @property
    def prefix(self) -> str:
        """Where its keys lie."""


def pulse_key(source: Kept) -> str:
    """The key of a source's pulse.

    Without its address: a process that reaches the same Redis by another one, and takes it for another
    source, is to read this very pulse, and to see whose it is.
    """
    key = f"jobguard:pulse:{source.namespace}:{source.library}"
    return f"{key}:{source.prefix}" if source.prefix else key


def beat_key(worker: UUID) -> str:
    """The key of a worker's beat."""
    return f"jobguard:beat:{worker.hex}"


@dataclass(frozen=True, slots=True)
class Standing:
    """The pulse as Redis has it."""

    epoch: UUID
    n: int
    source: int
    installation: UUID


def read_pulse(client: Any, source: Kept) -> Any:
    """Ask a client or a pipeline for the pulse; the answer goes to parse_pulse."""
    return client.hmget(pulse_key(source), _FIELDS)


def parse_pulse(answer: Sequence[bytes | None] | Exception | None) -> Standing | None:
    """Read the answer; None: there is no pulse, or nothing that could be one."""
    if answer is None or isinstance(answer, Exception) or any(value is None for value in answer):
        return None
    try:
        epoch, n, source, installation = (bytes(value or b"").decode() for value in answer)
        counter, id = number_in(n), number_in(source)
        if counter is None or id is None:
            return None
        return Standing(UUID(epoch), counter, id, UUID(installation))
    except ValueError:
        return None


class Reading(StrEnum):
    """What a look at the pulse means, against what Postgres knows of it."""

    FIRST = "first"
    """Neither has one: a first start."""
    STEADY = "steady"
    LOST = "lost"
    """Missing, lower, or of another epoch: Redis lost data."""
    UNACKNOWLEDGED = "untold"
    """Ours, just begun, but Postgres was not told: the leader that began it died before it could."""
    AHEAD = "ahead"
    """Further than one tick ahead: Postgres went back in time. Touch nothing, ask a person."""
    FOREIGN = "foreign"
    """Another ledger keeps its pulse here. Touch nothing, ask a person."""


def judge_pulse(
    standing: Standing | None,
    *,
    epoch: UUID | None,
    n: int | None,
    installation: UUID,
) -> Reading:
    """Compare the pulse in Redis with the one that Postgres acknowledged."""
    if standing is None:
        return Reading.FIRST if epoch is None else Reading.LOST
    if standing.installation != installation:
        return Reading.FOREIGN
    if epoch is None or n is None:
        # A pulse is not moved before Postgres holds its first value.
        return Reading.UNACKNOWLEDGED if standing.n == 1 or n == ACCEPTED else Reading.AHEAD
    if standing.epoch != epoch or standing.n < n:
        return Reading.LOST
    return Reading.STEADY if standing.n <= n + 1 else Reading.AHEAD


# Moves the counter, if it still stands where the leader saw it. Another value is left alone.
TICK = """
local at = redis.call('HMGET', KEYS[1], 'epoch', 'n')
if at[1] == ARGV[1] and at[2] == ARGV[2] then
  redis.call('HSET', KEYS[1], 'n', ARGV[3])
  return 1
end
return 0
"""

# Makes the pulse anew: where there is none, or where the one that was judged still stands.
RESET = """
local at = {false, false}
if redis.call('TYPE', KEYS[1]).ok == 'hash' then
  at = redis.call('HMGET', KEYS[1], 'epoch', 'n')
end
if (at[1] or '') == ARGV[1] and (at[2] or '') == ARGV[2] then
  redis.call('DEL', KEYS[1])
  redis.call('HSET', KEYS[1], 'epoch', ARGV[3], 'n', ARGV[4], 'source', ARGV[5],
             'installation', ARGV[6])
  return 1
end
return 0
"""
