"""The loop of every producer in every library: it enqueues at a steady rate until a signal stops it.

Each call is announced in the ledger before it is made, and its answer is noted after it has
returned or raised. A killed producer leaves calls without an answer: their jobs were not accepted.
One call may accept several jobs, of which some must run behind others: each is a job of its own
here, and must complete as often as any other job.
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

BLOCK = 1_000_000
"""The count of numbers that one boot of a producer may use."""
LONG = 0.6
"""Seconds of a job that is long enough for a kill during its run."""
SLOWED = 0.25
"""The share of its rate at which a producer continues while the file `enough` exists."""
_REFUSED_PAUSE = 0.05


@dataclass(frozen=True, slots=True)
class Order:
    """The jobs to enqueue in one call."""

    queue: str
    numbers: Sequence[int]
    seconds: float  # of each job
    wait: float  # of the delayed jobs

    @property
    def number(self) -> int:
        """The number of the job, for a call with one job."""
        return self.numbers[0]


LATEST = 8.0
"""The longest delay in seconds: enough for a loss and its restore while a worker has the delayed job."""

Way = Callable[[Order], Sequence[str]]
"""One way into a library: it returns the ids of the accepted jobs, in their order."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A way in, for each library that has it."""

    share: int
    jobs: int = 1
    promised: int | None = None  # None: all of them; else the first job enqueues the rest
    longest: float = LONG


KINDS = {
    "plain": Kind(76),
    "later": Kind(10),  # after a delay
    "failing": Kind(10),  # fails at first, and the library retries it
    "many": Kind(4, jobs=10, longest=0.1),
    "chain": Kind(6, jobs=3),  # one behind the other
    "gather": Kind(
        6, jobs=5
    ),  # the last behind all others, of which the fourth is behind the third
    "sending": Kind(8, jobs=2, promised=1),  # the first enqueues the second
    "far": Kind(2),  # after longer than the time after which the library redelivers a job
}


def produce(
    ways: Mapping[str, Way],
    queues: Sequence[str],
    *,
    rate: float,
    seed: int,
    slow: float = 1.0,
) -> None:
    """Enqueue this many jobs for each second until SIGTERM, in these ways.

    ``slow``: the factor for the length of the jobs, so that a backlog builds up for more workers,
    too.
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
        # After an outage the rate is the same as before: missed calls are not repeated.
        due = max(due + made / rate, time.monotonic() - 1.0)
        time.sleep(max(0.0, due - time.monotonic()))


def _call(
    ways: Mapping[str, Way],
    queues: Sequence[str],
    numbers: Iterator[int],
    chance: random.Random,
    slow: float,
) -> float:
    """Make one call, and return its number of jobs."""
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
    except Exception:  # any error of the library: the caller was informed
        for number in promised:
            note("refused", number)
        time.sleep(_REFUSED_PAUSE)
        return len(mine)
    for number, job_id in zip(promised, ids, strict=True):
        note("enqueued", number, job_id)
    return len(mine)


def _follows(name: str, numbers: Sequence[int], number: int) -> tuple[str, ...]:
    """Return the jobs behind which this one must run, if any."""
    if name == "chain" and number != numbers[0]:
        return (str(number - 1),)
    if name == "gather" and number == numbers[3]:
        return (str(numbers[2]),)
    if name == "gather" and number == numbers[-1]:
        return (",".join(map(str, numbers[:-1])),)
    return ()


def _block() -> int:
    """Take numbers that no producer had before: the progress of a killed producer is unknown."""
    folder = Path(os.environ[VARIABLE]).with_name("blocks")
    return next(n for n in itertools.count(1) if claim(folder / str(n)))
