"""The order in which a push asks Redis, records, sends, and leaves deliveries to the leader."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import pytest
from redis import exceptions

from jobguard.host.push import Push
from jobguard.model import Beside, Delivery, Parent, Recorded, new_token

LED = Recorded(leader_live=True)
PARENT = Parent(new_token(), claim=1, worker=new_token())


class Away(Exception):
    """The library's error for a Redis that is away."""


class Tracker:
    """A tracker that notes each call in one journal with the library."""

    def __init__(self) -> None:
        self.journal: list[str] = []
        self.answer: Recorded | Exception = LED
        self.accepting = True
        self.is_away = False
        self.error: Exception | None = None
        self.push_deadline = 3600.0  # LED is as old as this module
        self.deferred: list[Callable[[Recorded], None]] | None = None
        self.overlaps = False

    def defer(
        self, deliveries: Sequence[Delivery], push: Callable[[Recorded], None]
    ) -> Callable[[], None] | None:
        """Keep the push if a batch is open."""
        if self.deferred is None:
            return None
        self.deferred.append(push)
        return lambda: self.journal.append("deferred")

    def record(self, deliveries: Sequence[Delivery], *, outbox: bool = False) -> Recorded:
        """Return the prepared answer."""
        self.journal.append("record for the leader" if outbox else "record")
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def record_beside(self, deliveries: Sequence[Delivery]) -> Beside | None:
        """Return a record under way if the test wants the record and the push to overlap."""
        if not self.overlaps:
            return None
        self.journal.append("record under way")
        return Beside(LED, lambda: self.record(deliveries))

    def broker_answered(self) -> None:
        """Do nothing."""

    def broker_in_doubt(self) -> bool:
        """Return the prepared answer."""
        return self.is_away

    def broker_error(self) -> Exception | None:
        """Return the prepared answer."""
        return self.error

    def broker_failed(self) -> None:
        """Note the call."""
        self.journal.append("broker failed")

    def accepts_without_broker(self, recorded: Recorded) -> bool:
        """Return the prepared answer."""
        return self.accepting and recorded.leader_live and not recorded.lost

    def withdraw(self, deliveries: Sequence[Delivery]) -> None:
        """Note the call."""
        self.journal.append(f"withdraw {' '.join(each.job_id for each in deliveries)}")

    def forget_spooled(self, tokens: Sequence[UUID]) -> bool:
        """Have no spool."""
        return False

    def leave_to_outbox(self, tokens: Sequence[UUID]) -> None:
        """Note the call."""
        self.journal.append(f"leave {len(tokens)}")


@dataclass
class Sent(Push):
    """A push of a library that notes each call."""

    sent: list[Delivery]
    answers: list[BaseException | None] = field(default_factory=list)
    """The results of the attempts to reach Redis, and then of the send; None means success."""
    broker_down = (Away,)

    @property
    def deliveries(self) -> Sequence[Delivery]:
        """Return the deliveries that it sends."""
        return self.sent

    def reach(self) -> None:
        """Return or raise the prepared answer."""
        self._answer("reach")

    def send(self) -> str:
        """Return or raise the prepared answer."""
        self._answer("send")
        return "sent"

    def undo(self) -> None:
        """Note the call."""
        self.journal.append("undo")

    def release(self) -> None:
        """Note the call."""
        self.journal.append("release")

    @property
    def journal(self) -> list[str]:
        """Return the journal of tracker and library."""
        tracker: Any = self.tracker
        journal: list[str] = tracker.journal
        return journal

    def _answer(self, what: str) -> None:
        self.journal.append(what)
        answer = self.answers.pop(0) if self.answers else None
        if answer is not None:
            raise answer


def delivery(job_id: str = "a", *, parent: Parent | None = None) -> Delivery:
    """Return a delivery."""
    return Delivery(new_token(), job_id, "mail", "task", b"", parent=parent)


def push(tracker: Any, *answers: BaseException | None, parent: Parent | None = None) -> Sent:
    """Return a push of one job."""
    return Sent(tracker, [delivery(parent=parent)], list(answers))


@pytest.fixture
def tracker() -> Tracker:
    """Return a tracker with a healthy Postgres and a live leader."""
    return Tracker()


class TestRedisIsThere:
    """Redis is reached, the delivery recorded and then sent, in this order."""

    def test_sent(self, tracker: Tracker) -> None:
        """The push returns the library's result."""
        assert push(tracker).make() == "sent"
        assert tracker.journal == ["reach", "record", "send", "release"]

    def test_sent_while_its_record_is_committed(self, tracker: Tracker) -> None:
        """A push that overlaps its record returns when both are done."""
        tracker.overlaps = True
        assert push(tracker).make() == "sent"
        assert tracker.journal == ["reach", "record under way", "send", "record", "release"]

    @pytest.mark.parametrize(
        ("answer", "after"),
        [
            (LED, ["broker failed", "leave 1"]),
            (Recorded(spooled=True), ["broker failed", "leave 1"]),
        ],
    )
    def test_a_failed_push_waits_for_its_record(
        self, tracker: Tracker, answer: Recorded, after: list[str]
    ) -> None:
        """A push that fails beside its record is treated as after it: by the result of the record."""
        tracker.overlaps, tracker.answer = True, answer
        it = push(tracker, None, Away())
        if answer.leader_live:
            assert it.make() is None
        else:
            with pytest.raises(Away):
                it.make()
        sent = ["reach", "record under way", "send", "record"]
        assert tracker.journal == [*sent, *after, "release"]

    def test_refused(self, tracker: Tracker) -> None:
        """A delivery that has ended or was superseded is not sent."""
        late = push(tracker)
        tracker.answer = Recorded(frozenset({late.sent[0].token}))
        assert late.make() is None
        assert tracker.journal == ["reach", "record", "release"]

    def test_another_of_its_batch_is_refused(self, tracker: Tracker) -> None:
        """A refusal of another delivery of the batch does not change this push."""
        tracker.answer = Recorded(frozenset({new_token()}))
        assert push(tracker).make() == "sent"

    def test_too_late(self, tracker: Tracker) -> None:
        """After the push deadline a leader may have pushed it, so sending would make a second copy."""
        tracker.push_deadline = -1.0
        assert push(tracker).make() is None
        assert tracker.journal == ["reach", "record", "leave 1", "release"]

    @pytest.mark.parametrize("unwritten", [Recorded(spooled=True), Recorded(lost=True)])
    def test_late_but_unknown_to_any_leader(self, tracker: Tracker, unwritten: Recorded) -> None:
        """A delivery that Postgres does not have is sent late as well, because no leader can push it."""
        tracker.push_deadline, tracker.answer = -1.0, unwritten
        assert push(tracker).make() == "sent"

    def test_postgres_is_away_and_the_user_hears_it(self, tracker: Tracker) -> None:
        """If the user gets the error of Postgres, nothing is sent, and nothing remembers the push."""
        tracker.answer = OSError("no Postgres")
        with pytest.raises(OSError, match="no Postgres"):
            push(tracker).make()
        assert tracker.journal == ["reach", "record", "undo", "release"]


class TestRedisIsAway:
    """The record is kept and the leader pushes, or the sender gets an error and it is withdrawn."""

    def test_seen_before_the_record(self, tracker: Tracker) -> None:
        """It is recorded for the leader in the same statement."""
        assert push(tracker, Away()).make() is None
        assert tracker.journal == ["reach", "broker failed", "record for the leader", "release"]

    def test_known_before(self, tracker: Tracker) -> None:
        """If Redis is known to be away, the push does not wait for it again."""
        tracker.is_away = True
        assert push(tracker).make() is None
        assert tracker.journal == ["record for the leader", "release"]

    def test_known_but_no_leader_would_push(self, tracker: Tracker) -> None:
        """If no leader would push it, the push makes one attempt."""
        tracker.is_away = True
        tracker.accepting = False
        assert push(tracker).make() == "sent"
        assert tracker.journal == ["record for the leader", "reach", "send", "release"]

    def test_known_to_be_silent_and_no_leader_would_push(self, tracker: Tracker) -> None:
        """Its sender gets the error at once, and the host's client does not wait for Redis."""
        tracker.is_away, tracker.error, tracker.answer = True, Away(), Recorded(spooled=True)
        with pytest.raises(Away):
            push(tracker).make()
        assert tracker.journal == [
            *("record for the leader", "broker failed", "withdraw a", "undo", "release"),
        ]

    @pytest.mark.parametrize("answer", [LED, Recorded(spooled=True), Recorded(lost=True)])
    def test_every_send_has_a_bound(self, tracker: Tracker, answer: Recorded) -> None:
        """A send that no leader would repeat has a bound as well, and a longer one."""
        tracker.answer = answer
        it = push(tracker)
        it.make()
        assert it.is_kept == answer.written
        assert (it.in_bounded_time(None, None).seconds > 4) != it.is_kept

    def test_not_accepted(self, tracker: Tracker) -> None:
        """Its sender gets the library's error, and no leader will push it."""
        tracker.accepting = False
        with pytest.raises(Away):
            push(tracker, Away()).make()
        assert tracker.journal == [
            *("reach", "broker failed", "record for the leader"),
            *("broker failed", "withdraw a", "undo", "release"),
        ]

    def test_not_accepted_but_too_late_to_take_back(self, tracker: Tracker) -> None:
        """If a leader may have pushed it in between, its record stays, and the error says so."""
        tracker.accepting, tracker.push_deadline = False, -1.0
        with pytest.raises(Away) as raised:
            push(tracker, Away()).make()
        assert "stays recorded: job a" in raised.value.__notes__[0]
        assert tracker.journal[-2:] == ["leave 1", "release"]
        assert "withdraw a" not in tracker.journal

    def test_what_takes_the_place_of_another_is_not_taken_back(self, tracker: Tracker) -> None:
        """A delivery whose parent was superseded in the same transaction would be lost by a withdrawal."""
        tracker.accepting = False
        with pytest.raises(Away):
            push(tracker, Away(), parent=PARENT).make()
        assert tracker.journal[-3:] == ["leave 1", "undo", "release"]

    def test_it_breaks_off_while_it_is_sent(self, tracker: Tracker) -> None:
        """A delivery that may have arrived stays recorded, and the leader checks it."""
        assert push(tracker, None, Away()).make() is None
        assert tracker.journal == [
            *("reach", "record", "send", "broker failed", "leave 1", "release"),
        ]

    def test_it_breaks_off_and_no_leader_would_push(self, tracker: Tracker) -> None:
        """Its sender gets the error, with a note that the delivery may have arrived."""
        tracker.accepting = False
        with pytest.raises(Away) as raised:
            push(tracker, None, Away()).make()
        assert "may have reached Redis, and stays recorded: job a" in raised.value.__notes__[0]
        assert "withdraw a" not in tracker.journal

    def test_an_error_that_is_not_of_redis_is_raised(self, tracker: Tracker) -> None:
        """An interrupt during the send is raised, and the delivery stays recorded."""
        with pytest.raises(KeyboardInterrupt):
            push(tracker, None, KeyboardInterrupt()).make()
        assert tracker.journal == ["reach", "record", "send", "leave 1", "release"]


class TestInABatch:
    """Nothing is asked before the end of the batch; the rest is the same without the record."""

    @pytest.fixture
    def deferred(self, tracker: Tracker) -> list[Callable[[Recorded], None]]:
        """Open a batch."""
        tracker.deferred = []
        return tracker.deferred

    def test_sent(self, tracker: Tracker, deferred: list[Callable[[Recorded], None]]) -> None:
        """It is sent when the whole batch is recorded."""
        assert push(tracker).make() is None
        assert tracker.journal == ["deferred"]
        deferred[0](LED)
        assert tracker.journal == ["deferred", "reach", "send", "release"]

    def test_it_may_not_wait(
        self, tracker: Tracker, deferred: list[Callable[[Recorded], None]]
    ) -> None:
        """A push whose sender waits for the result is not deferred."""
        alone = push(tracker)
        alone.may_wait = lambda: False  # type: ignore[method-assign]
        assert alone.make() == "sent"
        assert deferred == []

    def test_refused(self, tracker: Tracker, deferred: list[Callable[[Recorded], None]]) -> None:
        """A refused delivery is not sent."""
        late = push(tracker)
        late.make()
        deferred[0](Recorded(frozenset({late.sent[0].token})))
        assert tracker.journal == ["deferred", "release"]

    def test_known_to_be_away(
        self, tracker: Tracker, deferred: list[Callable[[Recorded], None]]
    ) -> None:
        """The push does not wait for a Redis that is away, nor for a connection to it."""
        push(tracker).make()
        tracker.is_away = True
        deferred[0](LED)
        assert tracker.journal == ["deferred", "leave 1", "release"]

    def test_interrupted_before_it_is_sent(
        self, tracker: Tracker, deferred: list[Callable[[Recorded], None]]
    ) -> None:
        """A recorded delivery that was surely not sent is withdrawn, as its sender gets an error."""
        push(tracker, KeyboardInterrupt()).make()
        with pytest.raises(KeyboardInterrupt):
            deferred[0](LED)
        assert tracker.journal == ["deferred", "reach", "withdraw a", "undo", "release"]

    def test_away(self, tracker: Tracker, deferred: list[Callable[[Recorded], None]]) -> None:
        """It was not recorded for the leader, so it is left to the outbox now."""
        push(tracker, Away()).make()
        deferred[0](LED)
        assert tracker.journal == ["deferred", "reach", "broker failed", "leave 1", "release"]

    def test_not_accepted(
        self, tracker: Tracker, deferred: list[Callable[[Recorded], None]]
    ) -> None:
        """It is withdrawn, and the end of the batch raises the error."""
        tracker.accepting = False
        push(tracker, Away()).make()
        with pytest.raises(Away):
            deferred[0](LED)
        assert tracker.journal[-3:] == ["withdraw a", "undo", "release"]


class TestRefusals:
    """Redis answered with an error, so surely nothing of the push is there."""

    LOADING = exceptions.BusyLoadingError("Redis is loading the dataset in memory")
    FULL = exceptions.OutOfMemoryError("command not allowed when used memory > 'maxmemory'.")
    ALONE = exceptions.ResponseError("NOREPLICAS Not enough good replicas to write.")
    RIGHTS = exceptions.NoPermissionError("this user has no permissions")

    @pytest.mark.parametrize("answer", [LOADING, FULL, ALONE])
    def test_it_may_take_it_later(self, tracker: Tracker, answer: BaseException) -> None:
        """If Redis may accept it later and the job is accepted, the leader pushes it."""
        assert push(tracker, None, answer).make() is None
        assert tracker.journal[-3:] == ["broker failed", "leave 1", "release"]

    @pytest.mark.parametrize("answer", [LOADING, FULL, ALONE])
    def test_the_sender_wants_to_hear_it(self, tracker: Tracker, answer: BaseException) -> None:
        """If the sender wants the error, the delivery is withdrawn, so it does not run."""
        tracker.accepting = False
        with pytest.raises(type(answer)):
            push(tracker, None, answer).make()
        assert tracker.journal[-3:] == ["withdraw a", "undo", "release"]

    def test_a_person_has_to_mend_it(self, tracker: Tracker) -> None:
        """An error that a person must correct withdraws it, and Redis does not count as away."""
        with pytest.raises(type(self.RIGHTS)):
            push(tracker, None, self.RIGHTS).make()
        assert tracker.journal == ["reach", "record", "send", "withdraw a", "undo", "release"]

    def test_what_goes_on_from_a_job_is_never_withdrawn(self, tracker: Tracker) -> None:
        """A delivery with an ended parent is left to the leader, although the worker gets the error."""
        with pytest.raises(type(self.RIGHTS)):
            push(tracker, None, self.RIGHTS, parent=PARENT).make()
        assert tracker.journal[-3:] == ["leave 1", "undo", "release"]

    def test_inside_what_a_library_made_of_it(self, tracker: Tracker) -> None:
        """The error of Redis is found as the cause of the library's error."""
        wrapped = OSError("the transport failed")
        wrapped.__cause__ = self.FULL
        tracker.accepting = False
        with pytest.raises(OSError):
            push(tracker, None, wrapped).make()
        assert "withdraw a" in tracker.journal

    def test_a_lost_connection_after_an_answer(self, tracker: Tracker) -> None:
        """After NOSCRIPT the script was sent again, and the result of a lost connection is unknown."""
        lost = exceptions.ConnectionError("closed")
        lost.__context__ = exceptions.NoScriptError("no matching script")
        with pytest.raises(exceptions.ConnectionError):
            push(tracker, None, lost).make()
        assert tracker.journal == ["reach", "record", "send", "leave 1", "release"]
