"""What every producer does, whatever the library: it enqueues at a steady rate until it is told to stop.

Each call is announced in the ledger before it is made, and answered after it has returned or raised. A
producer that is killed leaves calls without an answer: nothing was promised by them. What one call
promises may be several jobs, of which some are to be run behind others: each is a job of its own here,
and must complete as often as any other.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jobguard.demo.ledger import VARIABLE, note
from tests.chaos.tasks import claim

if TYPE_CHECKING:
    from collections.abc import Iterator

BLOCK = 10_000
"""Numbers that one boot of a producer may use."""
LONG = 0.6
"""Seconds of a job that is long enough to be caught in the middle."""
SLOWED = 0.25
"""The share of its rate at which a producer goes on while the file `enough` lies beside the ledger."""
_REFUSED_PAUSE = 0.05


@dataclass(frozen=True, slots=True)
class Order:
    """What is to be enqueued in one call."""

    queue: str
    numbers: Sequence[int]
    seconds: float  # of each job
    wait: float  # of those that are to wait

    @property
    def number(self) -> int:
        """The job, of a call for one."""
        return self.numbers[0]


LATEST = 8.0
"""Seconds: long enough for a loss and its restore while a worker holds what is delayed."""

Way = Callable[[Order], Sequence[str]]
"""One way into a library: returns its ids of the jobs that are promised, in their order."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A way in, as every library has it that knows such a thing."""

    share: int
    jobs: int = 1
    promised: int | None = None  # None: all of them; else the rest is enqueued by the first
    longest: float = LONG


KINDS = {
    "plain": Kind(76),
    "later": Kind(10),  # after a while
    "failing": Kind(10),  # fails at first, and the library retries it
    "many": Kind(4, jobs=10, longest=0.1),
    "chain": Kind(6, jobs=3),  # one behind the other
    "gather": Kind(6, jobs=5),  # the last behind all others, of which the fourth behind the third
    "sending": Kind(8, jobs=2, promised=1),  # the first enqueues the second
    "far": Kind(2),  # after longer than the library waits for what it calls lost
}


def produce(
    ways: Mapping[str, Way],
    queues: Sequence[str],
    *,
    rate: float,
    seed: int,
    slow: float = 1.0,
) -> None:
    """Enqueue so many jobs a second until SIGTERM, in these ways.

    ``slow``: how much longer each takes, so that there is a backlog for as many workers, too.
    """
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _frame: stopped.append(number))
    block = _block()
    chance = random.Random(f"{seed}-{block}")
    numbers = itertools.count(block * BLOCK)
    due = time.monotonic()
    enough = Path(os.environ[VARIABLE]).with_name("enough")
    while not stopped:
        made = _call(ways, queues, numbers, chance, slow)
        if enough.exists():
            made /= SLOWED
        # After an outage it goes on at its own rate: what could not be called then is not made up for.
        due = max(due + made / rate, time.monotonic() - 1.0)
        time.sleep(max(0.0, due - time.monotonic()))


def _call(
    ways: Mapping[str, Way],
    queues: Sequence[str],
    numbers: Iterator[int],
    chance: random.Random,
    slow: float,
) -> float:
    """Make one call; returns how many jobs it was for."""
    (name,) = chance.choices(list(ways), [KINDS[name].share for name in ways])
    kind = KINDS[name]
    queue = chance.choice(queues)
    seconds = LONG if chance.random() < 0.03 else chance.uniform(0.01, 0.15)
    mine = [next(numbers) for _ in range(kind.jobs)]
    seconds = slow * min(seconds, kind.longest)
    order = Order(queue, mine, seconds, chance.uniform(1.0, LATEST))
    promised = mine[: kind.promised]
    for number in promised:
        note("call", number, *_follows(name, mine, number))
    try:
        ids = ways[name](order)
    except Exception:  # whatever the library raises: the caller was told
        for number in promised:
            note("refused", number)
        time.sleep(_REFUSED_PAUSE)
        return len(mine)
    for number, job_id in zip(promised, ids, strict=True):
        note("enqueued", number, job_id)
    return len(mine)


def _follows(name: str, numbers: Sequence[int], number: int) -> tuple[str, ...]:
    """Say behind which jobs this one is to run, if any."""
    if name == "chain" and number != numbers[0]:
        return (str(number - 1),)
    if name == "gather" and number == numbers[3]:
        return (str(numbers[2]),)
    if name == "gather" and number == numbers[-1]:
        return (",".join(map(str, numbers[:-1])),)
    return ()


def _block() -> int:
    """Take numbers that no producer had before: one that was killed cannot tell how far it came."""
    folder = Path(os.environ[VARIABLE]).with_name("blocks")
    return next(n for n in itertools.count(1) if claim(folder / str(n)))
