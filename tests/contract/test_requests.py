from __future__ import annotations

from dataclasses import replace
from uuid import uuid4

import pytest

from jobguard.errors import NotLeading
from jobguard.job_keys import KeyRule
from jobguard.model import Cause, Claim, Delivery, Ended, Outcome, Request, new_token
from jobguard.store.protocols import Plan, SourceRow
from tests.contract.conftest import NAMESPACE, SOURCE, Contract, delivery


@pytest.fixture(autouse=True)
def _known_source(ledger: Contract) -> None:
    row = SourceRow(SOURCE, NAMESPACE, "rq", "localhost:6379/0", "", None, "", serializer="json")
    ledger.store.register(row)


def waiting(ledger: Contract, limit: int = 100, most_bytes: int = 1 << 20) -> list[Request]:
    """Return the first requests that wait."""
    return list(ledger.leader.requests([SOURCE], limit=limit, most_bytes=most_bytes))


def test_a_request_becomes_one_owed_delivery_that_the_leader_pushes(ledger: Contract) -> None:
    """An accepted request is owed and in the outbox, and a second acceptance changes nothing."""
    term = ledger.elected()
    job_id = ledger.backend.ask("app.task", args=[1, "two"], kwargs={"x": None})
    (request,) = waiting(ledger)
    assert (request.job_id, request.task, request.serializer) == (job_id, "app.task", "json")
    assert (list(request.args), dict(request.kwargs)) == ([1, "two"], {"x": None})
    it = delivery(job_id)
    assert ledger.leader.accept(term, SOURCE, [(request.id, it)]) == 1
    assert ledger.leader.accept(term, SOURCE, [(request.id, delivery(job_id))]) == 0
    assert waiting(ledger) == []
    assert list(ledger.owed()) == [it.token]
    assert ledger.watched()[it.token].suspected is Cause.PUSH
    assert ledger.watched()[it.token].unsent


def test_requests_are_taken_in_their_order_and_in_bounded_pages(ledger: Contract) -> None:
    """A page has the oldest requests, within its limits but at least one; other sources are left."""
    ids = [ledger.backend.ask("app.task", args=["x" * 1000]) for _ in range(3)]
    assert [r.job_id for r in waiting(ledger, limit=2)] == ids[:2]
    assert [r.job_id for r in waiting(ledger, most_bytes=1)] == ids[:1]
    assert ledger.leader.requests([8], limit=9, most_bytes=9) == []


def test_a_request_takes_its_key(ledger: Contract) -> None:
    """Of requests of one key the first is owed, and the others are cancelled until it has ended."""
    term = ledger.elected()
    store = ledger.store

    def accept(*keys: str | None) -> list[Delivery]:
        rendered = [
            delivery(ledger.backend.ask("app.task", key=key), key=key, token=new_token())
            for key in keys
        ]
        ids = [request.id for request in waiting(ledger)]
        assert ledger.leader.accept(term, SOURCE, list(zip(ids, rendered, strict=True))) == len(
            keys
        )
        return rendered

    first, second, other, free = accept("k", "k", "x" * 900, None)
    assert ledger.outcome(second.token) is Outcome.CANCELLED
    assert set(ledger.owed()) == {first.token, other.token, free.token}
    assert set(ledger.watched()) == {first.token, other.token, free.token}
    (third,) = accept("k")
    assert ledger.outcome(third.token) is Outcome.CANCELLED
    sent = delivery("python", rule=KeyRule("k"))
    held = store.record_keyed(SOURCE, sent, namespace=NAMESPACE, deadline=5.0)
    assert held[:2] == ("held", first.job_id)
    worker = ledger.working()
    worker.end(worker.start(first.token))
    (fourth,) = accept("k")
    assert fourth.token in ledger.owed()


def test_a_held_request_is_kept_and_not_taken_again(ledger: Contract) -> None:
    """A request that cannot be rendered does not stop the next one."""
    term = ledger.elected()
    ledger.backend.ask("wrong")
    right = ledger.backend.ask("right")
    ledger.leader.hold_request(term, waiting(ledger)[0].id, "cannot be rendered")
    assert [r.job_id for r in waiting(ledger)] == [right]


def test_of_several_requests_those_that_still_wait_are_accepted(ledger: Contract) -> None:
    """A request that was held or cancelled after it was read gets no delivery."""
    term = ledger.elected()
    gone, right = ledger.backend.ask("app.task"), ledger.backend.ask("app.task")
    first, second = waiting(ledger)
    ledger.leader.hold_request(term, first.id, "not any more")
    rendered = [(first.id, delivery(gone)), (second.id, delivery(right))]
    assert ledger.leader.accept(term, SOURCE, rendered) == 1
    assert [owed.job_id for owed in ledger.owed().values()] == [right]


def test_a_leader_whose_term_is_over_accepts_nothing(ledger: Contract) -> None:
    """With a stale term, no request is taken, held or fired."""
    term = ledger.elected()
    ledger.backend.ask("app.task")
    ledger.backend.schedule("s", every=60.0)
    (request,), (schedule,) = waiting(ledger), ledger.leader.due_schedules(limit=9)
    for stale in (
        lambda: ledger.leader.accept(term - 1, SOURCE, [(request.id, delivery())]),
        lambda: ledger.leader.hold_request(term - 1, request.id, "error"),
        lambda: ledger.leader.fire(term - 1, schedule, Plan([1.0], 2.0, 2.0)),
        lambda: ledger.leader.fail_schedule(term - 1, schedule, "error"),
    ):
        with pytest.raises(NotLeading):
            stale()
    assert waiting(ledger) == [request]
    assert ledger.owed() == {}
    assert ledger.leader.due_schedules(limit=9) == [schedule]


def test_a_slot_is_fired_once_and_the_next_one_is_planned(ledger: Contract) -> None:
    """A plan counts once: with the next slot planned, or the slot fired before, nothing happens."""
    term, now = ledger.elected(), ledger.leader.now()
    ledger.backend.schedule("s", every=60.0)
    (unplanned,) = ledger.leader.due_schedules(limit=9)
    assert unplanned.next_at is None
    slot = float(int(now)) - 1
    assert ledger.leader.fire(term, unplanned, Plan((), slot, slot)) == 0
    (due,) = ledger.leader.due_schedules(limit=9)
    assert due == replace(unplanned, next_at=slot)
    plan = Plan([slot], slot + 60, slot + 60, skipped=2)
    assert ledger.leader.fire(term, due, plan) == 1
    assert ledger.leader.fire(term, due, plan) == 0
    assert ledger.leader.fire(term, unplanned, Plan([slot - 60], slot, slot)) == 0  # an old plan
    assert [(r.task, r.queue) for r in waiting(ledger)] == [("app.task", "default")]
    assert ledger.leader.due_schedules(limit=9) == []
    again = replace(due, next_at=slot + 60)
    assert (
        ledger.leader.fire(term, again, Plan([slot], slot, slot)) == 0
    )  # as after a restored backup
    assert len(waiting(ledger)) == 1


def test_a_plan_for_a_changed_schedule_is_void(ledger: Contract) -> None:
    """A leader that read a schedule before it was changed fires nothing of it."""
    term = ledger.elected()
    ledger.backend.schedule("s", every=60.0)
    (before,) = ledger.leader.due_schedules(limit=9)
    assert ledger.leader.fire(term, replace(before, version=uuid4()), Plan([1.0], 2.0, 2.0)) == 0
    assert waiting(ledger) == []


def test_a_finished_or_failed_schedule_is_not_due(ledger: Contract) -> None:
    """A schedule without a further slot rests, and so does one that cannot be planned."""
    term = ledger.elected()
    ledger.backend.schedule("over", every=60.0)
    ledger.backend.schedule("wrong", cron="no cron")
    over, wrong = sorted(ledger.leader.due_schedules(limit=9), key=lambda row: row.name)
    ledger.leader.fire(term, over, Plan())
    ledger.leader.fail_schedule(term, wrong, "not a cron expression")
    assert ledger.leader.due_schedules(limit=9) == []


def test_a_worker_makes_its_tasks_known_when_they_complete(ledger_in_postgres: Contract) -> None:
    """A completed run makes its task known once, and a failure to write that does not undo the end."""
    ledger = ledger_in_postgres
    it = ledger.recorded()
    worker = ledger.working()
    claim = worker.start(it.token)
    assert isinstance(claim, Claim)
    assert worker.end(claim, queue="default", task="app.task") is Ended.ENDED
