from __future__ import annotations

from jobguard.reconciler.hold import AutomaticHold
from jobguard.store.protocols import Brake
from tests.fakes.world import Clock


def hold(clock: Clock | None = None, *, count: int = 100, share: float = 0.01) -> AutomaticHold:
    """Make one with the default thresholds."""
    return AutomaticHold(count=count, share=share, clock=clock or Clock())


def test_more_than_a_hundred() -> None:
    """A hundred unexplained absences are borne, one more is not."""
    automatic = hold()

    assert not automatic.exceeded("mail", 100, owed=1_000_000)
    assert automatic.exceeded("mail", 1, owed=1_000_000)


def test_more_than_a_share() -> None:
    """More than one percent of a queue holds it, though they are few."""
    assert not hold().exceeded("mail", 20, owed=2000)
    assert hold().exceeded("mail", 21, owed=2000)


def test_a_share_of_little_says_nothing() -> None:
    """In a small queue ten absences are no percentage to speak of."""
    assert not hold().exceeded("mail", 10, owed=20)
    assert hold().exceeded("mail", 11, owed=20)


def test_only_the_last_minute_counts() -> None:
    """Absences that are spread over hours hold nothing."""
    clock = Clock()
    automatic = hold(clock)

    for _ in range(50):
        assert not automatic.exceeded("mail", 60, owed=1_000_000)
        clock.advance(61)


def test_a_minute_of_looks_is_added_up() -> None:
    """Many looks within a minute count together."""
    clock = Clock()
    automatic = hold(clock)

    assert not automatic.exceeded("mail", 60, owed=1_000_000)
    clock.advance(59)
    assert automatic.exceeded("mail", 60, owed=1_000_000)


def test_each_queue_for_itself() -> None:
    """One queue's absences do not hold another."""
    automatic = hold()

    assert not automatic.exceeded("mail", 100, owed=1_000_000)
    assert not automatic.exceeded("video", 100, owed=1_000_000)


def test_forgotten() -> None:
    """A queue that was held or resumed is counted anew."""
    automatic = hold()
    automatic.exceeded("mail", 100, owed=1_000_000)

    automatic.forget("mail")
    automatic.forget("unheard of")

    assert not automatic.exceeded("mail", 100, owed=1_000_000)


def test_what_a_brake_holds() -> None:
    """A pause holds all; a hold holds one queue of one source, or the whole source."""
    assert not Brake().holds(1, "mail")
    assert Brake(paused=True).holds(1, "mail")

    one = Brake(held={"1/mail": {"reason": "a person"}})
    assert one.holds(1, "mail")
    assert not one.holds(1, "video")
    assert not one.holds(2, "mail")

    whole = Brake(held={"1/*": {"reason": "unsure"}})
    assert whole.holds(1, "mail")
    assert not whole.holds(2, "mail")
