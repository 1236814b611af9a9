from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from jobguard.reconciler.limiter import TokenBucket, round_robin
from tests.fakes.world import Clock


def test_a_second_worth_at_once() -> None:
    """A new bucket grants the permits of one second, and then no more."""
    bucket = TokenBucket(10, Clock())

    assert bucket.take(100) == 10
    assert bucket.take(1) == 0


def test_fills_with_time() -> None:
    """An empty bucket fills at its rate, up to the permits of one second."""
    clock = Clock()
    bucket = TokenBucket(10, clock)
    bucket.take(10)

    clock.advance(0.35)
    assert bucket.take(100) == 3

    clock.advance(3600)
    assert bucket.take(100) == 10


def test_no_more_than_wanted() -> None:
    """Permits that were not wanted stay in the bucket."""
    bucket = TokenBucket(10, Clock())

    assert bucket.take(4) == 4
    assert bucket.take(100) == 6


@given(
    rate=st.floats(1, 1000),
    pauses=st.lists(st.tuples(st.floats(0, 5), st.integers(0, 2000)), max_size=30),
)
def test_never_faster_than_the_rate(rate: float, pauses: list[tuple[float, int]]) -> None:
    """In any period no more is granted than the rate allows, plus the permits of one second."""
    clock = Clock()
    bucket = TokenBucket(rate, clock)
    granted = 0
    began = clock()

    for pause, wanted in pauses:
        clock.advance(pause)
        got = bucket.take(wanted)
        assert 0 <= got <= wanted
        granted += got

    assert granted <= rate * (clock() - began + 1) + 1e-6


def test_less_than_one_a_second() -> None:
    """A rate of one job in two seconds grants one job every two seconds."""
    clock = Clock()
    bucket = TokenBucket(0.5, clock)
    granted = bucket.take(1)

    for _ in range(10):
        clock.advance(1)
        granted += bucket.take(1)

    assert granted >= 5


def test_round_robin_deals_by_queue() -> None:
    """No queue waits behind a longer one, and each queue keeps its order."""
    dealt = round_robin(["a1", "a2", "a3", "a4", "b1", "c1", "c2"], lambda item: item[0])

    assert list(dealt) == ["a1", "b1", "c1", "a2", "c2", "a3", "a4"]


def test_round_robin_of_nothing() -> None:
    """No items give no items."""
    assert list(round_robin([], str)) == []


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers())))
def test_round_robin_loses_nothing_and_keeps_order(items: list[tuple[str, int]]) -> None:
    """Every item is yielded once, in the order of its queue."""
    dealt = list(round_robin(items, lambda item: item[0]))

    assert sorted(dealt) == sorted(items)
    for queue in "abc":
        assert [i for i in dealt if i[0] == queue] == [i for i in items if i[0] == queue]
