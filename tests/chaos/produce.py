"""What every producer does, whatever the library: it enqueues at a steady rate until it is told to stop.

Each call is announced in the ledger before it is made, and answered after it has returned or raised. A
producer that is killed leaves calls without an answer: nothing was promised by them.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from jobguard.demo.ledger import VARIABLE, note
from tests.chaos.tasks import claim

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

BLOCK = 10_000
"""Numbers that one boot of a producer may use."""
MANY = 10
"""Jobs in one call of enqueue_many."""
LONG = 0.6
"""Seconds of a job that is long enough to be caught in the middle."""
SLOWED = 0.25
"""The share of its rate at which a producer goes on while the file `enough` lies beside the ledger."""
_SHARES = {"plain": 76, "later": 10, "failing": 10, "many": 4}
_REFUSED_PAUSE = 0.05


class Enqueue(Protocol):
    """The ways into one library. Each returns the library's ids of the jobs, in order."""

    def plain(self, queue: str, number: int, seconds: float) -> str:
        """Enqueue one job, to be run at once."""

    def later(self, queue: str, number: int, seconds: float, wait: float) -> str:
        """Enqueue one job, to be run after a while."""

    def failing(self, queue: str, number: int, seconds: float) -> str:
        """Enqueue a job that fails at first and that the library retries."""

    def many(self, queue: str, numbers: Sequence[int], seconds: float) -> Sequence[str]:
        """Enqueue several jobs in one call."""


def produce(enqueue: Enqueue, queues: Sequence[str], *, rate: float, seed: int) -> None:
    """Enqueue so many jobs a second until SIGTERM."""
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _frame: stopped.append(number))
    block = _block()
    chance = random.Random(f"{seed}-{block}")
    numbers = itertools.count(block * BLOCK)
    due = time.monotonic()
    enough = Path(os.environ[VARIABLE]).with_name("enough")
    while not stopped:
        made = _call(enqueue, queues, numbers, chance)
        if enough.exists():
            made /= SLOWED
        # After an outage it goes on at its own rate: what could not be called then is not made up for.
        due = max(due + made / rate, time.monotonic() - 1.0)
        time.sleep(max(0.0, due - time.monotonic()))


def _call(
    enqueue: Enqueue, queues: Sequence[str], numbers: Iterator[int], chance: random.Random
) -> float:
    """Make one call; returns how many jobs it was for."""
    (kind,) = chance.choices(list(_SHARES), list(_SHARES.values()))
    queue = chance.choice(queues)
    seconds = LONG if chance.random() < 0.03 else chance.uniform(0.01, 0.15)
    mine = [next(numbers) for _ in range(MANY if kind == "many" else 1)]
    for number in mine:
        note("call", number)
    try:
        if kind == "many":
            ids = enqueue.many(queue, mine, min(seconds, 0.1))
        elif kind == "later":
            ids = [enqueue.later(queue, mine[0], seconds, chance.uniform(1.0, 3.0))]
        elif kind == "failing":
            ids = [enqueue.failing(queue, mine[0], seconds)]
        else:
            ids = [enqueue.plain(queue, mine[0], seconds)]
    except Exception:  # whatever the library raises: the caller was told
        for number in mine:
            note("refused", number)
        time.sleep(_REFUSED_PAUSE)
        return len(mine)
    for number, job_id in zip(mine, ids, strict=True):
        note("enqueued", number, job_id)
    return len(mine)


def _block() -> int:
    """Take numbers that no producer had before: one that was killed cannot tell how far it came."""
    folder = Path(os.environ[VARIABLE]).with_name("blocks")
    return next(n for n in itertools.count(1) if claim(folder / str(n)))
