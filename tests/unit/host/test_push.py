"""A push: in which order what is asked, recorded, sent and left to the leader."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import pytest
from redis import exceptions

from jobguard.host.push import Push
from jobguard.model import Delivery, Parent, Recorded, new_token

LED = Recorded(leader_live=True)
PARENT = Parent(new_token(), claim=1, worker=new_token())


class Away(Exception):
    """The library's word for a Redis that is away."""


class Tracker:
    """Notes what is asked of it, in one journal with the library."""

    def __init__(self) -> None:
        self.journal: list[str] = []
        self.answer: Recorded | Exception = LED
        self.accepting = True
        self.in_doubt = False
        self.push_deadline = 3600.0  # LED is as old as this module
        self.deferred: list[Callable[[Recorded], None]] | None = None

    def defer(
        self, deliveries: Sequence[Delivery], push: Callable[[Recorded], None]
    ) -> Callable[[], None] | None:
        """Within a batch, keep it."""
        if self.deferred is None:
            return None
        self.deferred.append(push)
        return lambda: self.journal.append("held")

    def record(self, deliveries: Sequence[Delivery], *, outbox: bool = False) -> Recorded:
        """Answer as told."""
        self.journal.append("record for the leader" if outbox else "record")
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def broker_in_doubt(self) -> bool:
        """As told."""
        return self.in_doubt

    def broker_failed(self) -> None:
        """Note it."""
        self.journal.append("broker failed")

    def accepts_without_broker(self, recorded: Recorded) -> bool:
        """As told."""
        return self.accepting and recorded.leader_live and not recorded.lost

    def withdraw(self, deliveries: Sequence[Delivery]) -> None:
        """Note it."""
        self.journal.append(f"withdraw {' '.join(each.job_id for each in deliveries)}")

    def leave_to_outbox(self, tokens: Sequence[UUID]) -> None:
        """Note it."""
        self.journal.append(f"leave {len(tokens)}")


@dataclass
class Sent(Push):
    """What a library sends, which notes what is asked of it."""

    sent: list[Delivery]
    answers: list[BaseException | None] = field(default_factory=list)
    """What comes of each attempt to reach Redis, and then of the sending; None: it is well."""
    broker_down = (Away,)

    @property
    def deliveries(self) -> Sequence[Delivery]:
        """What it sends."""
        return self.sent

    def reach(self) -> None:
        """Answer as told."""
        self._answer("reach")

    def send(self) -> str:
        """Answer as told."""
        self._answer("send")
        return "sent"

    def undo(self) -> None:
        """Note it."""
        self.journal.append("undo")

    def release(self) -> None:
        """Note it."""
        self.journal.append("release")

    @property
    def journal(self) -> list[str]:
        """Of both sides."""
        tracker: Any = self.tracker
        journal: list[str] = tracker.journal
        return journal

    def _answer(self, what: str) -> None:
        self.journal.append(what)
        answer = self.answers.pop(0) if self.answers else None
        if answer is not None:
            raise answer


def delivery(job_id: str = "a", *, parent: Parent | None = None) -> Delivery:
    """Make one."""
    return Delivery(new_token(), job_id, "mail", "task", b"", parent=parent)


def push(tracker: Any, *answers: BaseException | None, parent: Parent | None = None) -> Sent:
    """Make a push of one job."""
    return Sent(tracker, [delivery(parent=parent)], list(answers))


@pytest.fixture
def tracker() -> Tracker:
    """Give a tracker whose Postgres is well, and somebody leads."""
    return Tracker()


class TestRedisIsThere:
    """Reached, recorded, sent; in this order."""

    def test_sent(self, tracker: Tracker) -> None:
        """What the library returns is returned."""
        assert push(tracker).make() == "sent"
        assert tracker.journal == ["reach", "record", "send", "release"]

    def test_refused(self, tracker: Tracker) -> None:
        """What has ended or moved on is not sent."""
        late = push(tracker)
        tracker.answer = Recorded(frozenset({late.sent[0].token}))
        assert late.make() is None
        assert tracker.journal == ["reach", "record", "release"]

    def test_another_of_its_batch_is_refused(self, tracker: Tracker) -> None:
        """That is no business of this one."""
        tracker.answer = Recorded(frozenset({new_token()}))
        assert push(tracker).make() == "sent"

    def test_too_late(self, tracker: Tracker) -> None:
        """A leader may have pushed it by now: a second copy would be ours."""
        tracker.push_deadline = -1.0
        assert push(tracker).make() is None
        assert tracker.journal == ["reach", "record", "leave 1", "release"]

    @pytest.mark.parametrize("unwritten", [Recorded(spooled=True), Recorded(lost=True)])
    def test_late_but_unknown_to_any_leader(self, tracker: Tracker, unwritten: Recorded) -> None:
        """Nobody else can have pushed what Postgres does not have."""
        tracker.push_deadline, tracker.answer = -1.0, unwritten
        assert push(tracker).make() == "sent"

    def test_postgres_is_away_and_the_user_hears_it(self, tracker: Tracker) -> None:
        """Nothing is sent, and nothing remembers it."""
        tracker.answer = OSError("no Postgres")
        with pytest.raises(OSError, match="no Postgres"):
            push(tracker).make()
        assert tracker.journal == ["reach", "record", "undo", "release"]


class TestRedisIsAway:
    """The record alone is kept, and the leader pushes; or the sender hears of it, and it is taken back."""

    def test_seen_before_the_record(self, tracker: Tracker) -> None:
        """It is recorded for the leader in the same statement."""
        assert push(tracker, Away()).make() is None
        assert tracker.journal == ["reach", "broker failed", "record for the leader", "release"]

    def test_known_before(self, tracker: Tracker) -> None:
        """Nobody waits for it again."""
        tracker.in_doubt = True
        assert push(tracker).make() is None
        assert tracker.journal == ["record for the leader", "release"]

    def test_known_but_nobody_would_push(self, tracker: Tracker) -> None:
        """Then it is worth an attempt."""
        tracker.in_doubt = True
        tracker.accepting = False
        assert push(tracker).make() == "sent"
        assert tracker.journal == ["record for the leader", "reach", "send", "release"]

    def test_not_accepted(self, tracker: Tracker) -> None:
        """Its sender hears what the library says, and no leader will push it."""
        tracker.accepting = False
        with pytest.raises(Away):
            push(tracker, Away()).make()
        assert tracker.journal == [
            *("reach", "broker failed", "record for the leader"),
            *("broker failed", "withdraw a", "undo", "release"),
        ]

    def test_not_accepted_but_too_late_to_take_back(self, tracker: Tracker) -> None:
        """A leader may have pushed it while its sender waited: its record stays, and it says so."""
        tracker.accepting, tracker.push_deadline = False, -1.0
        with pytest.raises(Away) as raised:
            push(tracker, Away()).make()
        assert "stays recorded: job a" in raised.value.__notes__[0]
        assert tracker.journal[-2:] == ["leave 1", "release"]
        assert "withdraw a" not in tracker.journal

    def test_what_takes_the_place_of_another_is_not_taken_back(self, tracker: Tracker) -> None:
        """Its parent was superseded in the same transaction: it would be lost."""
        tracker.accepting = False
        with pytest.raises(Away):
            push(tracker, Away(), parent=PARENT).make()
        assert tracker.journal[-3:] == ["leave 1", "undo", "release"]

    def test_it_breaks_off_while_it_is_sent(self, tracker: Tracker) -> None:
        """It may have arrived: it stays recorded, and the leader looks."""
        assert push(tracker, None, Away()).make() is None
        assert tracker.journal == [
            *("reach", "record", "send", "broker failed", "leave 1", "release"),
        ]

    def test_it_breaks_off_and_nobody_would_push(self, tracker: Tracker) -> None:
        """Its sender hears it, and that it may have arrived."""
        tracker.accepting = False
        with pytest.raises(Away) as raised:
            push(tracker, None, Away()).make()
        assert "may have reached Redis, and stays recorded: job a" in raised.value.__notes__[0]
        assert "withdraw a" not in tracker.journal

    def test_what_is_no_word_of_redis_is_raised(self, tracker: Tracker) -> None:
        """An interrupt in the middle of it: in the dark as well, but nobody swallows it."""
        with pytest.raises(KeyboardInterrupt):
            push(tracker, None, KeyboardInterrupt()).make()
        assert tracker.journal == ["reach", "record", "send", "leave 1", "release"]


class TestInABatch:
    """Nothing is asked before its end; then the same, but for the record."""

    @pytest.fixture
    def deferred(self, tracker: Tracker) -> list[Callable[[Recorded], None]]:
        """Open a batch."""
        tracker.deferred = []
        return tracker.deferred

    def test_sent(self, tracker: Tracker, deferred: list[Callable[[Recorded], None]]) -> None:
        """When all of it is recorded."""
        assert push(tracker).make() is None
        assert tracker.journal == ["held"]
        deferred[0](LED)
        assert tracker.journal == ["held", "reach", "send", "release"]

    def test_it_may_not_wait(
        self, tracker: Tracker, deferred: list[Callable[[Recorded], None]]
    ) -> None:
        """Its sender waits for what becomes of it."""
        alone = push(tracker)
        alone.may_wait = lambda: False  # type: ignore[method-assign]
        assert alone.make() == "sent"
        assert deferred == []

    def test_refused(self, tracker: Tracker, deferred: list[Callable[[Recorded], None]]) -> None:
        """It is not sent."""
        late = push(tracker)
        late.make()
        deferred[0](Recorded(frozenset({late.sent[0].token})))
        assert tracker.journal == ["held", "release"]

    def test_known_to_be_away(
        self, tracker: Tracker, deferred: list[Callable[[Recorded], None]]
    ) -> None:
        """Nobody waits for it, nor for anything to send it by."""
        push(tracker).make()
        tracker.in_doubt = True
        deferred[0](LED)
        assert tracker.journal == ["held", "leave 1", "release"]

    def test_interrupted_before_it_is_sent(
        self, tracker: Tracker, deferred: list[Callable[[Recorded], None]]
    ) -> None:
        """It is recorded, but surely not sent, and its sender hears an error: it is taken back."""
        push(tracker, KeyboardInterrupt()).make()
        with pytest.raises(KeyboardInterrupt):
            deferred[0](LED)
        assert tracker.journal == ["held", "reach", "withdraw a", "undo", "release"]

    def test_away(self, tracker: Tracker, deferred: list[Callable[[Recorded], None]]) -> None:
        """It was not recorded for the leader: that is said now."""
        push(tracker, Away()).make()
        deferred[0](LED)
        assert tracker.journal == ["held", "reach", "broker failed", "leave 1", "release"]

    def test_not_accepted(
        self, tracker: Tracker, deferred: list[Callable[[Recorded], None]]
    ) -> None:
        """It is taken back, and whoever ends the batch hears it."""
        tracker.accepting = False
        push(tracker, Away()).make()
        with pytest.raises(Away):
            deferred[0](LED)
        assert tracker.journal[-3:] == ["withdraw a", "undo", "release"]


class TestRefusals:
    """Redis answered: surely nothing of it is there."""

    LOADING = exceptions.BusyLoadingError("Redis is loading the dataset in memory")
    FULL = exceptions.OutOfMemoryError("command not allowed when used memory > 'maxmemory'.")
    ALONE = exceptions.ResponseError("NOREPLICAS Not enough good replicas to write.")
    RIGHTS = exceptions.NoPermissionError("this user has no permissions")

    @pytest.mark.parametrize("answer", [LOADING, FULL, ALONE])
    def test_it_may_take_it_later(self, tracker: Tracker, answer: BaseException) -> None:
        """Accepted: the leader pushes it."""
        assert push(tracker, None, answer).make() is None
        assert tracker.journal[-3:] == ["broker failed", "leave 1", "release"]

    @pytest.mark.parametrize("answer", [LOADING, FULL, ALONE])
    def test_the_sender_wants_to_hear_it(self, tracker: Tracker, answer: BaseException) -> None:
        """Withdrawn, so that what raised does not run."""
        tracker.accepting = False
        with pytest.raises(type(answer)):
            push(tracker, None, answer).make()
        assert tracker.journal[-3:] == ["withdraw a", "undo", "release"]

    def test_a_person_has_to_mend_it(self, tracker: Tracker) -> None:
        """Withdrawn; Redis is not away."""
        with pytest.raises(type(self.RIGHTS)):
            push(tracker, None, self.RIGHTS).make()
        assert tracker.journal == ["reach", "record", "send", "withdraw a", "undo", "release"]

    def test_what_goes_on_from_a_job_is_never_withdrawn(self, tracker: Tracker) -> None:
        """Its parent has ended: the leader pushes it, though the worker hears the error."""
        with pytest.raises(type(self.RIGHTS)):
            push(tracker, None, self.RIGHTS, parent=PARENT).make()
        assert tracker.journal[-3:] == ["leave 1", "undo", "release"]

    def test_inside_what_a_library_made_of_it(self, tracker: Tracker) -> None:
        """It is found by its cause."""
        wrapped = OSError("the transport says")
        wrapped.__cause__ = self.FULL
        tracker.accepting = False
        with pytest.raises(OSError):
            push(tracker, None, wrapped).make()
        assert "withdraw a" in tracker.journal

    def test_a_lost_connection_after_an_answer(self, tracker: Tracker) -> None:
        """After NOSCRIPT the script was sent again, and nobody knows what became of that."""
        lost = exceptions.ConnectionError("closed")
        lost.__context__ = exceptions.NoScriptError("no matching script")
        with pytest.raises(exceptions.ConnectionError):
            push(tracker, None, lost).make()
        assert tracker.journal == ["reach", "record", "send", "leave 1", "release"]
