"""The pulse, a counter that shows whether Redis lost data, and the keys of the workers' beats.

Layout in Redis, in the source's own db:

- ``jobguard:pulse:<namespace>:<library>[:<prefix>]`` (hash): ``epoch`` (uuid; a new one after every
  incident), ``n`` (the counter), ``source`` (the id of the source that the leader takes this Redis for),
  ``installation`` (the uuid of the ledger). Only the leader writes it.
- ``jobguard:beat:<worker id>`` (string): a worker's beat counter, with a time to live.
- ``jobguard:hears_dead:<source id>`` (string): a worker of this source has a function for the event "dead".
  It has the same time to live.

The leader moves ``n`` to ``n + 1`` by compare-and-set, and only after Postgres has the last value. So Redis
can be one ahead of Postgres (the leader died between the two writes), never two, and never behind. A pulse
that is missing or lower means that Redis lost data. A pulse that is further ahead means that Postgres lost
data.
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
"""Value in Postgres instead of the counter: a person has accepted the pulse that is in Redis."""


NO_PULSE = (UUID(int=0), 0)
"""What a worker reports instead of an epoch and a counter if its Redis answers and has no pulse."""


class Kept(Protocol):
    """The identity of a pulse: that of a source, without the address of its Redis."""

    @property
    def namespace(self) -> str:
        """The tenant."""

    @property
    def library(self) -> str:
        """The queue library."""

    @property
    def prefix(self) -> str:
        """The prefix of its keys."""


def pulse_key(source: Kept) -> str:
    """Return the key of a source's pulse.

    The key does not contain the address. A process that reaches the same Redis by another address, and
    takes it for another source, must read the same pulse and see which source it belongs to.
    """
    key = f"jobguard:pulse:{source.namespace}:{source.library}"
    return f"{key}:{source.prefix}" if source.prefix else key


def beat_key(worker: UUID) -> str:
    """Return the key of a worker's beat."""
    return f"jobguard:beat:{worker.hex}"


def hears_dead_key(source: int) -> str:
    """Return the key that shows that a worker of this source calls a function for each dead job."""
    return f"jobguard:hears_dead:{source}"


@dataclass(frozen=True, slots=True)
class Standing:
    """The pulse in Redis."""

    epoch: UUID
    n: int
    source: int
    installation: UUID


def read_pulse(client: Any, source: Kept) -> Any:
    """Read the pulse with a client or a pipeline. Pass the answer to parse_pulse."""
    return client.hmget(pulse_key(source), _FIELDS)


def parse_pulse(answer: Sequence[bytes | None] | Exception | None) -> Standing | None:
    """Parse the answer of read_pulse; None: there is no pulse, or the value is not a valid pulse."""
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
    """The result of comparing the pulse in Redis with the one in Postgres."""

    FIRST = "first"
    """Neither Redis nor Postgres has a pulse: this is a first start."""
    STEADY = "steady"
    LOST = "lost"
    """The pulse is missing, lower, or of another epoch: Redis lost data."""
    UNACKNOWLEDGED = "untold"
    """The pulse is ours and new, and Postgres does not have it: the leader that made it died before."""
    AHEAD = "ahead"
    """The pulse is more than one tick ahead: Postgres was set back. Change nothing, ask a person."""
    FOREIGN = "foreign"
    """Another ledger keeps its pulse here. Change nothing, ask a person."""


def judge_pulse(
    standing: Standing | None,
    *,
    epoch: UUID | None,
    n: int | None,
    installation: UUID,
) -> Reading:
    """Compare the pulse in Redis with the one that Postgres has."""
    if standing is None:
        return Reading.FIRST if epoch is None else Reading.LOST
    if standing.installation != installation:
        return Reading.FOREIGN
    if epoch is None or n is None:
        # A pulse is not moved before Postgres has its first value.
        return Reading.UNACKNOWLEDGED if standing.n == 1 or n == ACCEPTED else Reading.AHEAD
    if standing.n > n + 1:
        return Reading.AHEAD  # also in another epoch: the count goes on through a loss
    return Reading.LOST if standing.epoch != epoch or standing.n < n else Reading.STEADY


# Moves the counter if it still has the value that the leader saw. Another value is not changed.
TICK = """
local at = redis.call('HMGET', KEYS[1], 'epoch', 'n')
if at[1] == ARGV[1] and at[2] == ARGV[2] then
  redis.call('HSET', KEYS[1], 'n', ARGV[3])
  return 1
end
return 0
"""

# Makes a new pulse if there is none, or if the pulse that was judged has not changed.
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
