"""Jobs with a key: at most one of a key waits, whichever call of the library sends it."""

from __future__ import annotations

from typing import Any

import psycopg
import pytest

import jobguard
from jobguard.errors import InvalidKey, KeyHeld, NotTransactional, StoreUnavailable
from jobguard.guard import JobGuard
from tests.conformance.library import Library
from tests.conformance.test_adapter import UNREACHABLE
from tests.conformance.words import Records


def test_an_ignored_job_is_not_sent(library: Library, guard: JobGuard, records: Records) -> None:
    """The second job of a key is not sent; the answer names the first. After its end the key is free."""
    send = library.keyed(guard)
    first = send("one", key="k")
    second = send("two", key="k")
    other = send("three", key="other")
    assert first.sent and other.sent and not second.sent
    assert second.job_id == first.job_id
    assert library.waiting() == [first.job_id, other.job_id]
    assert len(records.owed()) == 2
    with pytest.raises(KeyHeld):
        send("four", key="k", on_conflict="raise")
    library.work()
    assert library.said() == ["one", "three"]
    assert send("five", key="k").sent


def test_a_replacement_is_what_runs(library: Library, guard: JobGuard, records: Records) -> None:
    """The newest arguments run, once, although Redis still has the older message."""
    send = library.keyed(guard)
    send("old", key="k")
    new = send("new", key="k", on_conflict="replace")
    assert [owed.job_id for owed in records.owed()] == [new.job_id]
    library.work()
    assert library.said() == ["new"]
    assert records.owed() == []


def test_a_debounced_job_is_due_after_the_last_send(
    library: Library, guard: JobGuard, records: Records
) -> None:
    """Each send moves the time on."""
    send = library.keyed(guard)
    send("old", key="k", debounce=30)
    last = send("new", key="k", debounce=60)
    (owed,) = records.owed()
    assert (owed.job_id, owed.due_at is not None) == (last.job_id, True)


def test_a_throttled_key_accepts_one_job_in_its_time(library: Library, guard: JobGuard) -> None:
    """A throttled key stays closed although its job has ended."""
    send = library.keyed(guard)
    assert send("x", key="t", throttle=60).sent
    library.work()
    assert library.said() == ["x"]
    assert not send("y", key="t", throttle=60).sent


@pytest.mark.parametrize(
    "wrong",
    [
        {"throttle": float("nan")},
        {"throttle": "5"},
        {"throttle": True},
        {"throttle": float("inf")},
        {"debounce": -1},
        {"delay": float("nan")},
        {"debounce": 5, "on_conflict": "raise"},
        {"debounce": 5, "delay": 9},
    ],
    ids=str,
)
def test_a_wrong_window_is_an_error_and_nothing_is_sent(
    library: Library, guard: JobGuard, wrong: dict[str, Any]
) -> None:
    """It must not become an error of SQL, nor a job without its key."""
    with pytest.raises(InvalidKey):
        library.keyed(guard)("x", key="k", **wrong)
    assert library.waiting() == []


def test_the_librarys_own_call_takes_a_key(
    library: Library, guard: JobGuard, records: Records
) -> None:
    """An option of the library's call is the same; a wrong one is an error, and nothing is sent."""
    library.send_with_options({"jobguard_key": "k"})
    library.send_with_options({"jobguard_key": "k"})
    assert len(records.owed()) == len(library.waiting()) == 1
    with pytest.raises(KeyHeld):
        library.send_with_options({"jobguard_key": "k", "jobguard_on_conflict": "raise"})
    for wrong in (
        {"jobguard_key": "k", "jobguard_on_conflict": "wait"},
        {"jobguard_key": "free", "jobguard_throttle": "soon"},
        {"jobguard_key": "free", "jobguard_throttle": -1},
    ):
        with pytest.raises(InvalidKey):
            library.send_with_options(wrong)
    assert len(records.owed()) == len(library.waiting()) == 1


def test_without_postgres_a_job_with_a_key_is_not_sent(library: Library) -> None:
    """Only the ledger knows whether a key is held, so that the sender gets an error."""
    with jobguard.guard(library.target(), postgres=UNREACHABLE) as guard:
        with pytest.raises(StoreUnavailable):
            library.keyed(guard)("one", key="k")
        assert library.jobs() == {}


def test_a_key_in_a_transaction_is_refused(
    library: Library, guard: JobGuard, database: str
) -> None:
    """Other producers would wait for the commit."""
    with (
        psycopg.connect(database) as connection,
        pytest.raises(NotTransactional, match="key"),
        guard.transaction(connection),
    ):
        library.keyed(guard)("one", key="k")
    assert library.waiting() == []
