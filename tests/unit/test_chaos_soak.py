from __future__ import annotations

import pytest

from tests.chaos import soak


def test_a_slope_is_that_of_the_late_samples() -> None:
    """The first ten minutes and the largest single step do not count, and ten minutes more are needed."""
    early = [(float(at), at / 10) for at in range(0, 600, 10)]
    late = [(float(at), 60.0 + at / 3600) for at in range(600, 1210, 10)]
    assert soak.slope(early) is None
    assert soak.slope(early + late[:50]) is None
    assert soak.slope(early + late) == pytest.approx(1.0, abs=0.1)
    once = [(at, size + 30 * (at > 900)) for at, size in late]
    assert soak.slope(early + once) == pytest.approx(1.0, abs=0.1)
    twice = [(at, size + 30 * (at > 700) + 30 * (at > 900)) for at, size in late]
    assert (soak.slope(early + twice) or 0.0) > soak.GROWTH


def test_growth_and_noise_are_problems() -> None:
    """Each process over a bound is named."""
    found = soak.problems({"a": 4.9, "b": 5.1}, {"a": 10.0, "c": 10.1})
    assert found == ["b grows by 5.1 MB an hour", "c logs 10.1 lines a minute"]
    grown = {"reconciler-0": 50.0, "threads": 50.0, "solo": 106.0}
    found = soak.problems(grown, {}, bare=100.0)
    assert found == ["reconciler-0 grows by 50.0 MB an hour", "solo grows by 106.0 MB an hour"]


def test_durations() -> None:
    """A duration has a unit."""
    assert [soak.seconds_in(text) for text in ("90s", "30m", "2h")] == [90, 1800, 7200]
    with pytest.raises(ValueError, match="give 90s, 30m or 2h"):
        soak.seconds_in("30")
