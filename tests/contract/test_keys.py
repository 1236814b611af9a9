"""At most one delivery of a key is owed, and one more that runs while its replacement waits."""

from __future__ import annotations

import threading
from typing import Any

from jobguard.job_keys import KeyRule
from jobguard.model import Outcome
from tests.contract.conftest import NAMESPACE, SOURCE, Contract, delivery, retry_of


def send(
    ledger: Contract, job_id: str, on_conflict: Any = "ignore", *, key: str = "k", **more: Any
) -> tuple[Any, str, str | None]:
    """Record a delivery with a key; return it, the verdict and the id of the holder."""
    throttle = more.pop("throttle", 0.0)
    it = delivery(job_id, rule=KeyRule(key, on_conflict, throttle), **more)
    verdict, holder, _ = ledger.store.record_keyed(SOURCE, it, namespace=NAMESPACE, deadline=5.0)
    return it, verdict, holder


def test_a_held_key_refuses_others(ledger: Contract) -> None:
    """A key is held while its job waits, runs or is retried, and free when the job has ended."""
    first, verdict, _ = send(ledger, "a")
    assert verdict == "free"
    assert send(ledger, "b")[1:] == ("held", "a")
    assert send(ledger, "b", key="x" * 5000)[1] == "free"
    worker = ledger.working()
    claim = worker.start(first.token)
    assert send(ledger, "c")[1:] == ("held", "a")
    retry = retry_of(claim, "a")
    ledger.record(retry)
    assert send(ledger, "c")[1:] == ("held", "a")
    worker.end(worker.start(retry.token))
    assert send(ledger, "c")[1] == "free"
    assert {owed.job_id for owed in ledger.owed().values()} == {"b", "c"}


def test_a_replacement_takes_the_place_of_a_waiting_one(ledger: Contract) -> None:
    """The waiting delivery is superseded; its replacement is not withdrawn, and the leader pushes it."""
    old, _, _ = send(ledger, "a")
    new, verdict, holder = send(ledger, "b", "replace")
    assert (verdict, holder) == ("replaced", "a")
    assert ledger.outcome(old.token) is Outcome.SUPERSEDED
    ledger.store.withdraw(SOURCE, [new.token])
    ledger.advance(6)
    assert list(ledger.watched()) == [new.token]
    assert send(ledger, "c")[1:] == ("held", "b")


def test_a_replacement_of_a_running_one_waits_beside_it(ledger: Contract) -> None:
    """While one runs, a single replacement waits, and each further one replaces that."""
    first, _, _ = send(ledger, "a")
    worker = ledger.working()
    claim = worker.start(first.token)
    second, verdict, _ = send(ledger, "b", "replace")
    assert verdict == "free"
    third, verdict, holder = send(ledger, "c", "replace")
    assert (verdict, holder) == ("replaced", "b")
    assert ledger.outcome(second.token) is Outcome.SUPERSEDED
    worker.end(claim)
    assert send(ledger, "d")[1:] == ("held", "c")
    worker.end(worker.start(third.token))
    assert send(ledger, "d")[1] == "free"


def test_a_throttled_key_stays_closed_for_its_time(ledger: Contract) -> None:
    """A throttled key accepts no job before its time is over, although its job has ended."""
    first, _, _ = send(ledger, "a", throttle=60.0)
    worker = ledger.working()
    worker.end(worker.start(first.token))
    assert send(ledger, "b", throttle=60.0)[1:] == ("throttled", None)
    ledger.advance(61)
    assert send(ledger, "b", throttle=60.0)[1] == "free"


def test_the_same_record_twice_takes_the_key_once(ledger: Contract) -> None:
    """A statement that is sent again after a lost answer changes nothing; neither does a repeated run."""
    it = delivery("a", derived=True, rule=KeyRule("k"))

    def again() -> str:
        return ledger.store.record_keyed(SOURCE, it, namespace=NAMESPACE, deadline=5.0)[0]

    assert [again(), again()] == ["free", "free"]
    worker = ledger.working()
    worker.end(worker.start(it.token))
    assert again() == "ended"
    assert ledger.owed() == {}


def test_many_producers_never_owe_a_key_twice(ledger_in_postgres: Contract) -> None:
    """However many producers send and replace at once, one waiting delivery of each key is left."""
    ledger, failures = ledger_in_postgres, list[BaseException]()

    def produce(number: int) -> None:
        try:
            store = ledger.backend.host()
            for n in range(40):
                rule = KeyRule(f"k{n % 5}", "replace" if (n + number) % 2 else "ignore")
                it = delivery(f"{number}-{n}", rule=rule)
                store.record_keyed(SOURCE, it, namespace=NAMESPACE, deadline=5.0)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=produce, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures
    ledger.advance(6)
    assert len(ledger.owed()) == 5
