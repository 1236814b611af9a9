"""Children that reach Postgres through their worker: the sockets, the errors and the deadlines."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import pytest

from jobguard.errors import BadRow, BreakerOpen, JobguardError, StoreUnavailable
from jobguard.host.parent import Door, ParentSpool, ParentStore
from jobguard.host.spool import Cancelled, MemorySpool
from jobguard.model import Claim, End, Outcome, new_token
from tests.support import eventually


class Worker:
    """A worker that answers as the test sets it up."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Sequence[Any], Mapping[str, Any]]] = []
        self.answer: Any = None
        self.goes_on = threading.Event()
        self.goes_on.set()

    def for_child(self, name: str, arguments: Sequence[Any], options: Mapping[str, Any]) -> Any:
        """Note the call, and answer it when the test allows it."""
        self.asked.append((name, arguments, options))
        self.goes_on.wait(30)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.fixture
def worker() -> Worker:
    """Return the worker that serves the calls."""
    return Worker()


@pytest.fixture
def door(worker: Worker) -> Iterator[Door]:
    """Return the place where the worker serves its children."""
    door = Door(cast(Any, worker))
    door.open()
    yield door
    door.close()


@pytest.fixture
def store(door: Door) -> Iterator[ParentStore]:
    """Return a child's store."""
    store = ParentStore(door, timeout=10.0)
    yield store
    store.close()


def an_end() -> End:
    """Return a report."""
    return End(new_token(), 1, Outcome.COMPLETED, new_token(), "a", "q", "t")


def test_a_call_is_made_in_the_worker(worker: Worker, store: ParentStore) -> None:
    """A call reaches the worker with its arguments, of any size."""
    worker.answer = Claim(new_token(), 7)
    big = b"x" * 3_000_000
    assert store.claim(1, big, namespace="n") == worker.answer
    assert worker.asked == [("claim", (1, big), {"namespace": "n"})]


@pytest.mark.parametrize("error", [StoreUnavailable("away"), BadRow("bad"), BreakerOpen()])
def test_it_raises_what_the_worker_raised(
    worker: Worker, store: ParentStore, error: JobguardError
) -> None:
    """The child raises the worker's error with its class and text."""
    worker.answer = error
    with pytest.raises(type(error), match=str(error)):
        store.tombstones(1, [])


def test_an_error_of_ours_is_no_error_of_the_store(worker: Worker, store: ParentStore) -> None:
    """An error of jobguard in the worker does not open the circuit of the child."""
    worker.answer = ValueError("a fault of ours")
    with pytest.raises(JobguardError, match="a fault of ours") as raised:
        store.tombstones(1, [])
    assert not isinstance(raised.value, StoreUnavailable)


def test_a_worker_that_does_not_answer_is_left_in_time(worker: Worker, store: ParentStore) -> None:
    """A worker without an answer costs the timeout, and its late answer is not taken for the next one."""
    store._timeout = 0.3
    worker.goes_on.clear()
    worker.answer = "late"
    with pytest.raises(StoreUnavailable):
        store.now()
    store._timeout = 10.0
    worker.answer = "in time"
    worker.goes_on.set()
    assert store.now() == "in time"


def test_several_children_are_served_at_once(worker: Worker, door: Door) -> None:
    """A child that waits does not delay other children."""
    worker.goes_on.clear()
    children = [ParentStore(door, timeout=10.0) for _ in range(5)]
    calls = [threading.Thread(target=child.call, args=("now",)) for child in children]
    for call in calls:
        call.start()
    eventually(lambda: len(worker.asked) == 5)
    worker.goes_on.set()
    for call in calls:
        call.join(10)
    for child in children:
        child.close()


def test_what_postgres_cannot_take_waits_in_the_worker(worker: Worker, store: ParentStore) -> None:
    """Entries wait in the worker, and in the child if the worker has no room; ends go another way."""
    own = MemorySpool(10)
    spool = ParentSpool(store, own)
    worker.answer = True
    intent = Cancelled((new_token(),), (), None)
    assert spool.put([intent])
    assert (len(spool), [name for name, _, _ in worker.asked]) == (0, ["spool"])
    for answer in (False, StoreUnavailable()):
        worker.answer = answer
        assert spool.put([intent])
    assert len(spool) == len(own) == 2
    assert spool.put([an_end()])
    assert len(own) == 3
    assert len(worker.asked) == 3


def test_a_worker_that_is_gone_is_no_wait(door: Door) -> None:
    """A worker that is gone closes the socket, so the child does not wait."""
    door.close()
    with pytest.raises(StoreUnavailable):
        ParentStore(door, timeout=3600.0).now()
