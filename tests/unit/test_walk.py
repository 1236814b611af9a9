"""The position in a walk over several keys."""

from __future__ import annotations

from jobguard.walk import following, position


def test_a_walk_visits_every_place_in_order_and_ends() -> None:
    """Each place is visited page by page, and after the last one the walk is over."""
    places, after, seen = ["b x", "a y", "c", ""], "", []
    while after is not None:
        now = position(places, after)
        assert now is not None
        seen.append((now.place, now.cursor))
        after = following(places, now, 5 if now == position(places, "0 b x") else None)  # type: ignore[assignment]
    assert seen == [("", 0), ("a y", 0), ("b x", 0), ("b x", 5), ("c", 0)]


def test_a_place_that_is_gone_is_passed_over() -> None:
    """If the place of the position does not exist any more, the walk goes on at the next one."""
    now = position(["a", "c"], "7 b")
    assert now is not None and (now.place, now.cursor) == ("c", 0)
    assert position(["a"], "7 b") is None
