from __future__ import annotations

import time
from dataclasses import replace
from uuid import uuid4

from hypothesis import given
from hypothesis import strategies as st

from jobguard.job import End, Outcome, new_token
from jobguard.spool import Cancelled, Entry, MemorySpool
from tests.unit.core.fakes import delivery, token


def end() -> End:
    """Describe an end."""
    return End(token(), 1, Outcome.COMPLETED, uuid4())


def cancelled() -> Cancelled:
    """Describe an intent."""
    return Cancelled((token(),), (), None)


def test_empty() -> None:
    """A spool with nothing in it has nothing to say."""
    spool = MemorySpool(10)

    assert len(spool) == 0
    assert spool.oldest() is None
    assert list(spool.peek(10)) == []


def test_in_order_until_dropped() -> None:
    """What is peeked at stays until it is dropped, oldest first."""
    spool = MemorySpool(10)
    first, second, third = delivery("1"), delivery("2"), delivery("3")
    assert spool.put([first, second])
    assert spool.put([third])

    assert list(spool.peek(2)) == [first, second]
    assert list(spool.peek(2)) == [first, second]
    spool.drop([first, second])

    assert list(spool.peek(2)) == [third]
    assert (spool.counts.taken, spool.counts.replayed) == (3, 2)


def test_one_kind_at_a_time() -> None:
    """A peek gives a run of one kind, so that order between kinds is kept."""
    spool = MemorySpool(10)
    entries: list[Entry] = [delivery(), delivery(), end(), cancelled(), end()]
    spool.put(entries)

    runs = []
    while run := spool.peek(10):
        runs.append(list(run))
        spool.drop(run)

    assert runs == [entries[:2], entries[2:3], entries[3:4], entries[4:]]


def test_full() -> None:
    """What does not fit is refused whole, and counted."""
    spool = MemorySpool(3)
    assert spool.put([delivery(), delivery()])

    assert not spool.put([delivery(), delivery()])
    assert len(spool) == 2
    assert spool.counts.lost == 2

    assert spool.put([delivery()])
    assert not spool.put([delivery()])
    assert (spool.counts.taken, spool.counts.lost) == (3, 3)


def test_room_again() -> None:
    """What was replayed makes room."""
    spool = MemorySpool(1)
    one = delivery()
    spool.put([one])
    spool.drop([one])

    assert spool.put([delivery()])


def test_dropping_what_is_not_at_the_head_drops_nothing() -> None:
    """Only the very entries that stand first can be dropped, and each once."""
    spool = MemorySpool(10)
    first, second = delivery(), delivery()
    spool.put([first, second])

    spool.drop([second])
    assert len(spool) == 2

    spool.drop([first])
    spool.drop([first])
    assert list(spool.peek(9)) == [second]
    assert spool.counts.replayed == 1


def test_who_waits() -> None:
    """It tells which records of an id, or of a queue, wait in it, in order."""
    spool = MemorySpool(10)
    first, other, again = delivery("a"), delivery("b", queue="film"), delivery("a", queue="film")
    spool.put([first, end(), other, cancelled(), again])

    assert spool.waiting(["a"], None) == (first.token, again.token)
    assert spool.waiting([], "film") == (other.token, again.token)
    assert spool.waiting(["c"], "mail") == (first.token,)
    assert spool.waiting([], None) == ()


def test_an_intent_knows_when_it_was_made() -> None:
    """What this process sends later sorts behind it, and it gets older."""
    earlier = new_token()
    intent = cancelled()

    assert earlier < intent.until < new_token()
    assert replace(intent, made_at=intent.made_at - 60).age >= 60


def test_oldest() -> None:
    """It tells since when something waits."""
    spool = MemorySpool(10)
    before = time.time()
    first = delivery()
    spool.put([first])
    at = spool.oldest()
    assert at is not None
    assert before <= at <= time.time()

    spool.put([delivery()])
    assert spool.oldest() == at
    spool.drop([first])
    later = spool.oldest()
    assert later is not None
    assert later >= at


@given(st.lists(st.integers(0, 4)), st.integers(1, 8), st.integers(1, 5))
def test_nothing_is_dropped_silently(puts: list[int], size: int, limit: int) -> None:
    """Everything put in is kept and comes out in order, or is counted as lost."""
    spool = MemorySpool(size)
    kept: list[Entry] = []
    for count in puts:
        entries = [delivery() if nth % 2 else end() for nth in range(count)]
        if spool.put(entries):
            kept += entries
        assert len(spool) <= size

    out: list[Entry] = []
    while run := spool.peek(limit):
        assert len(run) <= limit
        out += run
        spool.drop(run)

    assert out == kept
    assert spool.counts.taken == spool.counts.replayed == len(kept)
    assert spool.counts.taken + spool.counts.lost == sum(puts)
