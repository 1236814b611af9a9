from __future__ import annotations

from jobguard.reconciler.hold import AutomaticHold
from jobguard.store.protocols import Brake
from tests.fakes.world import Clock


def hold(clock: Clock | None = None, *, count: int = 100, share: float = 0.01) -> AutomaticHold:
    """Make an automatic hold with the default thresholds."""
    return AutomaticHold(count=count, share=share, clock=clock or Clock())


def test_more_than_a_hundred() -> None:
    """A hundred unexplained absences do not hold the queue; one more does."""
    automatic = hold()

    assert not automatic.exceeded("mail", 100, owed=1_000_000)
    assert automatic.exceeded("mail", 1, owed=1_000_000)


def test_more_than_a_share() -> None:
    """More than one percent of a queue holds it, even if these are few."""
    assert not hold().exceeded("mail", 20, owed=2000)
    assert hold().exceeded("mail", 21, owed=2000)


def test_a_share_of_a_small_queue_is_not_counted() -> None:
    """In a small queue the share only counts above ten absences."""
    assert not hold().exceeded("mail", 10, owed=20)
    assert hold().exceeded("mail", 11, owed=20)


def test_only_the_last_minute_counts() -> None:
    """Absences that are spread over hours do not hold the queue."""
    clock = Clock()
    automatic = hold(clock)

    for _ in range(50):
        assert not automatic.exceeded("mail", 60, owed=1_000_000)
        clock.advance(61)


def test_the_inspections_of_a_minute_are_added_up() -> None:
    """All inspections within a minute are added up."""
    clock = Clock()
    automatic = hold(clock)

    assert not automatic.exceeded("mail", 60, owed=1_000_000)
    clock.advance(59)
    assert automatic.exceeded("mail", 60, owed=1_000_000)


def test_each_queue_for_itself() -> None:
    """The absences of one queue do not hold another one."""
    automatic = hold()

    assert not automatic.exceeded("mail", 100, owed=1_000_000)
    assert not automatic.exceeded("video", 100, owed=1_000_000)


def test_forgotten() -> None:
    """The count starts again after a queue was held or resumed."""
    automatic = hold()
    automatic.exceeded("mail", 100, owed=1_000_000)

    automatic.forget("mail")
    automatic.forget("unheard of")

    assert not automatic.exceeded("mail", 100, owed=1_000_000)


def test_what_a_brake_holds() -> None:
    """A pause holds all queues; a hold applies to one queue of one source, or to the whole source."""
    assert not Brake().holds(1, "mail")
    assert Brake(paused=True).holds(1, "mail")

    one = Brake(held={"1/mail": {"reason": "a person"}})
    assert one.holds(1, "mail")
    assert not one.holds(1, "video")
    assert not one.holds(2, "mail")

    whole = Brake(held={"1/*": {"reason": "unsure"}})
    assert whole.holds(1, "mail")
    assert not whole.holds(2, "mail")
