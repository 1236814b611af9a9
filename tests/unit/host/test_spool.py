from __future__ import annotations

import time
from dataclasses import replace
from uuid import uuid4

from hypothesis import given
from hypothesis import strategies as st

from jobguard.host.spool import Adoptable, Cancelled, Entry, MemorySpool, size_of
from jobguard.model import End, Outcome, Parent, Part, new_token
from tests.fakes.world import delivery, token


def end() -> End:
    """Return an end."""
    return End(token(), 1, Outcome.COMPLETED, uuid4())


def cancelled() -> Cancelled:
    """Return a cancel."""
    return Cancelled((token(),), (), None)


def test_empty() -> None:
    """An empty spool returns no entries."""
    spool = MemorySpool(10)

    assert len(spool) == 0
    assert spool.oldest() is None
    assert list(spool.peek(10)) == []


def test_in_order_until_dropped() -> None:
    """Entries stay, oldest first, until they are dropped."""
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
    """A peek returns entries of one kind, so that the order between kinds is kept."""
    spool = MemorySpool(10)
    entries: list[Entry] = [delivery(), delivery(), end(), cancelled(), end()]
    spool.put(entries)

    runs = []
    while run := spool.peek(10):
        runs.append(list(run))
        spool.drop(run)

    assert runs == [entries[:2], entries[2:3], entries[3:4], entries[4:]]


def test_full() -> None:
    """Entries that do not all fit are refused together, and counted."""
    spool = MemorySpool(3)
    assert spool.put([delivery(), delivery()])

    assert not spool.put([delivery(), delivery()])
    assert len(spool) == 2
    assert spool.counts.lost == 2

    assert spool.put([delivery()])
    assert not spool.put([delivery()])
    assert (spool.counts.taken, spool.counts.lost) == (3, 3)


def test_room_again() -> None:
    """A replayed entry makes room."""
    spool = MemorySpool(1)
    one = delivery()
    spool.put([one])
    spool.drop([one])

    assert spool.put([delivery()])


def test_dropping_what_is_not_at_the_head_drops_nothing() -> None:
    """Only the first entries can be dropped, and each once."""
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
    """The spool returns the waiting records of an id or of a queue, in order."""
    spool = MemorySpool(10)
    first, other, again = delivery("a"), delivery("b", queue="film"), delivery("a", queue="film")
    spool.put([first, end(), other, cancelled(), again])

    assert spool.waiting(["a"], None) == (first.token, again.token)
    assert spool.waiting([], "film") == (other.token, again.token)
    assert spool.waiting(["c"], "mail") == (first.token,)
    assert spool.waiting([], None) == ()


def test_an_intent_knows_when_it_was_made() -> None:
    """Later tokens of this process sort after a cancel, and its age grows."""
    earlier = new_token()
    intent = cancelled()

    assert earlier < intent.until < new_token()
    assert replace(intent, made_at=intent.made_at - 60).age >= 60


def test_oldest() -> None:
    """The oldest report counts; a record alone is no report."""
    spool = MemorySpool(10)
    before = time.time()
    record, first = delivery(), end()
    spool.put([record])
    assert spool.oldest() is None
    spool.put([first])
    at = spool.oldest()
    assert at is not None
    assert before <= at <= time.time()

    spool.put([delivery(parent=Parent(token()))])
    assert spool.oldest() == at
    spool.drop([record, first])
    later = spool.oldest()
    assert later is not None
    assert later >= at


def test_bound_in_bytes() -> None:
    """At the bound, records of jobs that are in Redis lose their envelopes, oldest first."""
    reported: list[int] = []
    spool = MemorySpool(1_000, most_bytes=1_000_000, lightened=reported.append)
    follows = delivery("retry", parent=Parent(token()), envelope=b"x" * 100_000)
    records = [delivery(str(n), envelope=b"x" * 100_000) for n in range(20)]
    assert spool.put([follows])
    for record in records:
        assert spool.put([record])
        assert spool.size <= 1_000_000

    assert len(spool) == 21
    assert spool.counts.lost == 0
    assert spool.counts.adoptable == sum(reported) > 0
    assert list(spool.waiting(["0"], None)) == [records[0].token]
    out: list[Entry] = []
    while run := spool.peek(5):
        out += run
        spool.drop(run)
    assert out[0] is follows
    assert isinstance(out[1], Adoptable)
    assert out[-1] is records[-1]
    assert spool.size == 0


def test_what_cannot_give_up_its_envelope_finds_no_room() -> None:
    """An entry without room is counted; a record larger than the spool leaves only its id."""
    spool = MemorySpool(1_000, most_bytes=100_000)
    ends = [
        End(
            token(), 1, Outcome.COMPLETED, uuid4(), error="e" * 5_000, part=Part("j", b"x" * 50_000)
        )
        for _ in range(2)
    ]
    assert spool.put([ends[0]])
    assert not spool.put([ends[1]])
    assert spool.counts.lost == 1
    assert spool.put([delivery(envelope=b"x" * 200_000)])
    assert spool.counts.adoptable == 1


def test_a_peek_is_bounded_in_bytes() -> None:
    """A peek returns at least one entry, even if it is large."""
    spool = MemorySpool(10)
    large = [delivery(envelope=b"x" * 1_000) for _ in range(3)]
    spool.put(large)
    assert list(spool.peek(10, 10)) == large[:1]
    assert list(spool.peek(10, 3_500)) == large[:2]


def test_set_aside() -> None:
    """An entry that was set aside does not block others, is kept, and counts against a bound."""
    spool = MemorySpool(5_000)
    odd, good = end(), delivery()
    spool.put([odd, good])
    spool.set_aside(odd)
    assert list(spool.peek(9)) == [good]
    assert spool.oldest() is None
    assert (len(spool), spool.pending, list(spool.aside())) == (1, 2, [odd])
    spool.drop_aside(odd, lost=False)
    assert (spool.pending, spool.counts.replayed) == (1, 1)
    spool.drop([good])
    for _ in range(1_001):
        odd = end()
        spool.put([odd])
        spool.set_aside(odd)
    assert len(spool.aside()) == 1_000
    assert spool.counts.lost == 1
    assert spool.size == sum(size_of(one) for one in spool.aside())


@given(st.lists(st.integers(0, 4)), st.integers(1, 8), st.integers(1, 5))
def test_nothing_is_dropped_silently(puts: list[int], size: int, limit: int) -> None:
    """Every entry comes out in order, or is counted as lost."""
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
