from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobguard.job import Cause, Outcome, Presence
from jobguard.reconciler.verdict import Case, Decision, Holder, Verdict, decide

P, H, C, V, O = Presence, Holder, Cause, Verdict, Outcome  # noqa: E741
PUTS_BACK = (Verdict.RESTORE, Verdict.REQUEUE)

# What is said of the case, beyond an untroubled one (its queue trusted, nothing held, all reports
# written); then the verdict, the outcome, and what else is to be done: "suspect" or "clear".
TABLE: list[tuple[str, dict[str, Any], Verdict, Outcome | None, str]] = [
    # History wins over everything.
    ("ended", {"presence": P.ABSENT, "tombstone": O.COMPLETED}, V.CLOSE, O.COMPLETED, ""),
    ("ended, waiting", {"presence": P.WAITING, "tombstone": O.CANCELLED}, V.CLOSE, O.CANCELLED, ""),
    ("ended, run", {"presence": P.RUNNING, "holder": H.LIVE, "tombstone": O.SUPERSEDED}, V.CLOSE,
     O.SUPERSEDED, ""),
    # A live holder.
    ("live, absent", {"presence": P.ABSENT, "holder": H.LIVE}, V.WAIT, None, "clear"),
    ("live, overwritten", {"presence": P.OVERWRITTEN, "holder": H.LIVE}, V.WAIT, None, "clear"),
    ("live, finished", {"presence": P.FINISHED, "holder": H.LIVE}, V.WAIT, None, "clear"),
    # The library knows its end.
    ("finished", {"presence": P.FINISHED}, V.CLOSE, O.COMPLETED, ""),
    ("failed", {"presence": P.FAILED}, V.CLOSE, O.FAILED, ""),
    ("cancelled", {"presence": P.CANCELLED}, V.CLOSE, O.CANCELLED, ""),
    ("finished, died", {"presence": P.FINISHED, "holder": H.DEAD}, V.CLOSE, O.COMPLETED, ""),
    # Another life of its id.
    ("overwritten once", {"presence": P.OVERWRITTEN}, V.WAIT, None, "suspect"),
    ("overwritten, young", {"presence": P.OVERWRITTEN, "seen_for": 9.9}, V.WAIT, None, "suspect"),
    ("overwritten twice", {"presence": P.OVERWRITTEN, "seen_for": 10.0}, V.CLOSE, O.SUPERSEDED, ""),
    # Listed, though not claimed.
    ("listed", {"presence": P.ABSENT, "listed": True, "seen_for": 99.0}, V.WAIT, None, "clear"),
    ("listed, dead claim", {"presence": P.ABSENT, "listed": True, "holder": H.DEAD}, V.WAIT, None,
     "clear"),
    # Where it belongs.
    ("waiting", {"presence": P.WAITING}, V.WAIT, None, "clear"),
    ("scheduled", {"presence": P.SCHEDULED}, V.WAIT, None, "clear"),
    ("waiting again", {"presence": P.WAITING, "holder": H.DEAD}, V.WAIT, None, "clear"),
    # Left behind by a dead worker.
    ("died", {"presence": P.RUNNING, "holder": H.DEAD}, V.REQUEUE, None, ""),
    ("died, absent", {"presence": P.ABSENT, "holder": H.DEAD}, V.REQUEUE, None, ""),
    ("died, untrusted", {"presence": P.RUNNING, "holder": H.DEAD, "trusted": False}, V.HOLD, None,
     "suspect"),
    ("died, held", {"presence": P.RUNNING, "holder": H.DEAD, "held": True}, V.HOLD, None, ""),
    ("second death", {"presence": P.RUNNING, "holder": H.DEAD, "crashes": 1}, V.REQUEUE, None, ""),
    ("third death", {"presence": P.RUNNING, "holder": H.DEAD, "crashes": 2}, V.BURY, O.DEAD, ""),
    ("spent", {"presence": P.RUNNING, "holder": H.DEAD, "crashes": 3}, V.BURY, O.DEAD, ""),
    ("in company", {"presence": P.RUNNING, "holder": H.DEAD, "crashes": 3, "alone": False},
     V.REQUEUE, None, ""),
    ("spent, goodbye", {"presence": P.RUNNING, "holder": H.DEAD, "crashes": 3, "announced": True},
     V.REQUEUE, None, ""),
    ("spent, held", {"presence": P.RUNNING, "holder": H.DEAD, "crashes": 3, "held": True}, V.BURY,
     O.DEAD, ""),
    # Running without a claim.
    ("unclaimed run", {"presence": P.RUNNING}, V.WAIT, None, "clear"),
    ("run of the dead", {"presence": P.RUNNING, "cause": C.WORKER, "seen_for": 10.0}, V.RESTORE,
     None, ""),
    # Absent.
    ("expired", {"presence": P.ABSENT, "expired": True}, V.CLOSE, O.CANCELLED, ""),
    ("untrusted", {"presence": P.ABSENT, "trusted": False, "seen_for": 99.0}, V.HOLD, None,
     "suspect"),
    ("was untrusted", {"presence": P.ABSENT, "cause": C.UNTRUSTED, "seen_for": 99.0}, V.HOLD, None,
     "suspect"),
    ("unflushed", {"presence": P.ABSENT, "judgeable": False, "seen_for": 99.0}, V.WAIT, None,
     "suspect"),
    ("unflushed, dead worker's", {"presence": P.ABSENT, "judgeable": False, "cause": C.WORKER,
     "seen_for": 99.0}, V.RESTORE, None, ""),
    ("once", {"presence": P.ABSENT}, V.WAIT, None, "suspect"),
    ("within the grace", {"presence": P.ABSENT, "seen_for": 9.9}, V.WAIT, None, ""),
    ("held", {"presence": P.ABSENT, "seen_for": 10.0, "held": True}, V.HOLD, None, ""),
    ("unexplained, hold", {"presence": P.ABSENT, "seen_for": 10.0, "hold_unexplained": True},
     V.HOLD, None, "suspect"),
    ("explained, hold", {"presence": P.ABSENT, "seen_for": 10.0, "hold_unexplained": True,
     "cause": C.EVICTION}, V.RESTORE, None, ""),
    ("lost", {"presence": P.ABSENT, "seen_for": 10.0}, V.RESTORE, None, ""),
    ("lost, no grace", {"presence": P.ABSENT, "grace": 0.0}, V.RESTORE, None, ""),
]  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "verdict", "outcome", "note"),
    [row[1:] for row in TABLE],
    ids=[row[0] for row in TABLE],
)
def test_table(
    fields: dict[str, Any], verdict: Verdict, outcome: Outcome | None, note: str
) -> None:
    """Each case has its verdict, its outcome, and says whether to suspect or to clear."""
    decision = decide(Case(**fields))

    assert (decision.verdict, decision.outcome) == (verdict, outcome)
    assert (decision.suspect, decision.clear) == (note == "suspect", note == "clear")
    assert decision.reason


def seconds() -> st.SearchStrategy[float]:
    """Durations around the ones that matter."""
    return st.floats(0, 100)


CASES = st.builds(
    Case,
    presence=st.sampled_from(Presence),
    holder=st.sampled_from(Holder),
    tombstone=st.none() | st.sampled_from(Outcome),
    listed=st.booleans(),
    cause=st.sampled_from(Cause),
    seen_for=st.none() | seconds(),
    grace=seconds(),
    judgeable=st.booleans(),
    trusted=st.booleans(),
    held=st.booleans(),
    hold_unexplained=st.booleans(),
    expired=st.booleans(),
    announced=st.booleans(),
    alone=st.booleans(),
    crashes=st.integers(0, 5),
    crash_budget=st.integers(0, 5),
)
OWED = CASES.map(lambda case: replace(case, tombstone=None))


@given(CASES, st.sampled_from(Outcome))
def test_a_tombstone_always_closes(case: Case, outcome: Outcome) -> None:
    """Whatever else is seen, a delivery that history knows is closed as history says."""
    decision = decide(replace(case, tombstone=outcome))

    assert (decision.verdict, decision.outcome) == (Verdict.CLOSE, outcome)


@given(OWED)
def test_a_live_holder_is_left_alone(case: Case) -> None:
    """A delivery whose worker beats and lists it is waited for, and its suspicion is forgotten."""
    decision = decide(replace(case, holder=Holder.LIVE))

    assert decision.verdict is Verdict.WAIT
    assert decision.clear


@given(OWED)
def test_a_listed_delivery_is_never_put_back(case: Case) -> None:
    """A delivery that a beating worker lists is neither put back nor buried, claimed or not."""
    decision = decide(replace(case, listed=True))

    assert decision.verdict in (Verdict.WAIT, Verdict.CLOSE)


@given(OWED, st.sampled_from([Presence.WAITING, Presence.SCHEDULED]))
def test_what_is_where_it_belongs_is_not_pushed_again(case: Case, presence: Presence) -> None:
    """A delivery that waits in Redis is neither restored nor requeued."""
    assert decide(replace(case, presence=presence)).verdict is Verdict.WAIT


@given(OWED)
def test_untrusted_is_never_put_back(case: Case) -> None:
    """What an unguarded worker may have run goes back for no reason."""
    assert decide(replace(case, trusted=False)).verdict not in PUTS_BACK


@given(OWED)
def test_a_suspect_from_before_the_trust_is_never_restored(case: Case) -> None:
    """What was absent before its queue was trusted is not restored while nobody has claimed it."""
    decision = decide(replace(case, cause=Cause.UNTRUSTED, holder=Holder.NOBODY))

    assert decision.verdict not in PUTS_BACK


@given(OWED)
def test_held_is_never_put_back(case: Case) -> None:
    """Nothing of a held queue goes back."""
    assert decide(replace(case, held=True)).verdict not in PUTS_BACK


@given(OWED)
def test_a_restore_needs_two_looks_a_grace_apart(case: Case) -> None:
    """Only what was seen absent a grace ago, unchanged, is restored; or at once with no grace."""
    if decide(case).verdict is Verdict.RESTORE:
        assert case.grace == 0 or (case.seen_for is not None and case.seen_for >= case.grace)


@given(OWED)
def test_a_restore_needs_written_reports_or_a_dead_worker(case: Case) -> None:
    """While a worker has unwritten reports, only a dead worker's job is restored."""
    decision = decide(replace(case, judgeable=False))

    assert decision.verdict is not Verdict.RESTORE or case.cause is Cause.WORKER


@given(CASES)
def test_an_end_has_an_outcome_and_nothing_else_has(case: Case) -> None:
    """CLOSE and BURY say how it ended; no other verdict does; clearing and suspecting are for waits."""
    decision: Decision = decide(case)

    ends = decision.verdict in (Verdict.CLOSE, Verdict.BURY)
    assert (decision.outcome is not None) == ends
    assert not (decision.suspect and decision.clear)
    assert not decision.clear or decision.verdict is Verdict.WAIT
    assert not decision.suspect or decision.verdict in (Verdict.WAIT, Verdict.HOLD)


@given(OWED)
def test_what_a_living_worker_let_go_waits_for_all_reports(case: Case) -> None:
    """Its end, or the retry that took its place, may be among those that are not written yet."""
    decision = decide(replace(case, holder=Holder.LET_GO, judgeable=False))

    assert decision.verdict in (Verdict.WAIT, Verdict.CLOSE)


@given(OWED)
def test_only_a_dead_workers_unannounced_claim_is_buried(case: Case) -> None:
    """A job is buried only for deaths: its holder, or who ran it, is dead and the budget overdrawn."""
    if decide(case).verdict is Verdict.BURY:
        assert case.holder in (Holder.DEAD, Holder.LET_GO)
        assert case.crashes + 1 >= case.crash_budget
        assert case.alone and not case.announced


@given(OWED)
def test_a_death_in_company_is_charged_once(case: Case) -> None:
    """Nobody knows which of them caused it: later deaths count only where the job was alone."""
    decision = decide(replace(case, alone=False, announced=False))

    if decision.verdict is Verdict.REQUEUE:
        assert decision.charge == (case.crashes == 0)
    else:
        assert not decision.charge


@pytest.mark.parametrize("presence", [Presence.FINISHED, Presence.FAILED, Presence.CANCELLED])
def test_an_end_that_only_redis_knows_waits_for_the_workers_own_word(presence: Presence) -> None:
    """It says more: the error, and what the job is to a join."""
    case = Case(presence, judgeable=False)
    decision = decide(case)
    assert (decision.verdict, decision.suspect) == (Verdict.WAIT, False)
    assert decide(replace(case, judgeable=True)).verdict is Verdict.CLOSE
