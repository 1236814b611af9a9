"""A batch records once, and pushes in order."""

from __future__ import annotations

import contextvars
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, cast
from uuid import UUID

import pytest

from jobguard.host import batch as batches
from jobguard.host.batch import defer
from jobguard.model import Delivery, Parent, Recorded, new_token
from tests.support import eventually

SOURCE = 7


class Recorder:
    """A tracker with only the parts that a batch needs."""

    def __init__(self) -> None:
        self.push_deadline = 60.0
        self.answer = Recorded(leader_live=True)
        self.batches: list[list[str]] = []
        self.withdrawn: list[str] = []
        self.outbox: list[UUID] = []

    def record(self, deliveries: Sequence[Delivery], *, outbox: bool = False) -> Recorded:
        """Note the deliveries."""
        self.batches.append([delivery.job_id for delivery in deliveries])
        return self.answer

    def withdraw(self, deliveries: Sequence[Delivery]) -> None:
        """Note the deliveries."""
        self.withdrawn += [delivery.job_id for delivery in deliveries]

    def forget_spooled(self, tokens: Sequence[UUID]) -> bool:
        """Have no spool."""
        return False

    def leave_to_outbox(self, tokens: Sequence[UUID]) -> None:
        """Note the tokens."""
        self.outbox += tokens


def batch(source: int, recorder: Recorder, **options: Any) -> AbstractContextManager[None]:
    """Open a batch with this recorder as its tracker."""
    return batches.batch(source, cast(Any, recorder), **options)


def delivery(job_id: str, *, parent: Parent | None = None) -> Delivery:
    """Return a delivery."""
    return Delivery(new_token(), job_id, "mail", "task", b"", parent=parent)


def send(job_id: str, pushed: list[str]) -> bool:
    """Send a job as an adapter does; return False if there is no batch."""
    return hand_over([delivery(job_id)], lambda _: pushed.append(job_id))


def hand_over(deliveries: Sequence[Delivery], push: Callable[[Recorded], None]) -> bool:
    """Defer the deliveries, and do the work that is left now."""
    now = defer(SOURCE, deliveries, push)
    if now is not None:
        now()
    return now is not None


def test_nothing_is_deferred_outside() -> None:
    """Without a batch, the adapter records and pushes by itself."""
    recorder, pushed = Recorder(), list[str]()
    assert not send("a", pushed)
    with batch(SOURCE + 1, recorder):
        assert not send("a", pushed)
    assert (recorder.batches, pushed) == ([], [])


def test_all_are_recorded_at_once_and_then_pushed_in_order() -> None:
    """Nothing is recorded or pushed before the end of the outermost block."""
    recorder, pushed = Recorder(), list[str]()
    with batch(SOURCE, recorder):
        assert send("a", pushed)
        with batch(SOURCE, recorder):
            assert send("b", pushed)
        assert (recorder.batches, pushed) == ([], [])
        assert send("c", pushed)
    assert recorder.batches == [["a", "b", "c"]]
    assert pushed == ["a", "b", "c"]
    assert not send("d", pushed)


def test_a_thousand_are_not_kept_waiting() -> None:
    """After 1,000 deliveries the batch sends, even if the loop goes on."""
    recorder, pushed = Recorder(), list[str]()
    with batch(SOURCE, recorder):
        for n in range(1001):
            send(str(n), pushed)
        assert len(pushed) == 1000
    assert [len(one) for one in recorder.batches] == [1000, 1]


def test_what_was_sent_before_an_error_is_sent() -> None:
    """Deliveries that were sent before an error are still sent."""
    recorder, pushed = Recorder(), list[str]()
    with pytest.raises(KeyError), batch(SOURCE, recorder):
        send("a", pushed)
        raise KeyError
    assert pushed == ["a"]


def test_an_empty_batch_asks_nothing() -> None:
    """An empty batch records nothing."""
    recorder = Recorder()
    with batch(SOURCE, recorder):
        pass
    assert recorder.batches == []


def test_a_push_that_fails_takes_back_what_comes_after_it() -> None:
    """A failed push withdraws the later deliveries; those that superseded another go to the outbox."""
    recorder, pushed = Recorder(), list[str]()

    def refuse(_: Recorded) -> None:
        raise ConnectionError

    retry = delivery("d", parent=Parent(new_token()))
    with pytest.raises(ConnectionError), batch(SOURCE, recorder):
        send("a", pushed)
        hand_over([delivery("b")], refuse)
        send("c", pushed)
        hand_over([retry], lambda _: pushed.append("d"))
    assert pushed == ["a"]
    assert recorder.withdrawn == ["c"]
    assert recorder.outbox == [retry.token]


def test_where_no_caller_gets_the_error_the_leader_pushes_the_rest() -> None:
    """If no caller receives the error, the leader pushes the rest, as the first one is already in Redis."""
    recorder = Recorder()

    def refuse(_: Recorded) -> None:
        raise ConnectionError

    rest = [delivery("b"), delivery("c")]
    with pytest.raises(ConnectionError), batch(SOURCE, recorder, unheard=True):
        hand_over([delivery("a")], refuse)
        for one in rest:
            hand_over([one], lambda _: None)
    assert recorder.withdrawn == []
    assert recorder.outbox == [one.token for one in rest]


def test_what_is_too_late_to_take_back_is_left_to_the_leader() -> None:
    """Deliveries that the leader may have pushed while an earlier push hung stay in the outbox."""
    recorder = Recorder()

    def hang(_: Recorded) -> None:
        recorder.push_deadline = -1.0
        raise ConnectionError

    rest = delivery("b")
    with pytest.raises(ConnectionError), batch(SOURCE, recorder):
        hand_over([delivery("a")], hang)
        hand_over([rest], lambda _: None)
    assert recorder.withdrawn == []
    assert recorder.outbox == [rest.token]


def test_what_is_sent_after_the_end_by_a_task_that_began_inside() -> None:
    """A task that began inside has a copy of the context, but its batch is over, so it sends by itself."""
    recorder, pushed = Recorder(), list[str]()
    with batch(SOURCE, recorder):
        send("a", pushed)
        inside = contextvars.copy_context()
    assert not inside.run(send, "b", pushed)

    def batch_of_its_own() -> None:
        with batch(SOURCE, recorder):
            assert send("c", pushed)

    inside.run(batch_of_its_own)
    assert recorder.batches == [["a"], ["c"]]
    assert pushed == ["a", "c"]


def test_a_generator_that_is_closed_in_another_context() -> None:
    """If asyncio closes a generator in another context, its deliveries are sent without an error."""
    recorder, pushed = Recorder(), list[str]()

    def batched() -> Iterator[None]:
        with batch(SOURCE, recorder):
            send("a", pushed)
            yield

    inside, steps = contextvars.copy_context(), batched()
    inside.run(next, steps)
    steps.close()  # type: ignore[attr-defined]
    assert pushed == ["a"]
    assert not inside.run(send, "b", pushed)


def test_a_forked_child_sends_by_itself() -> None:
    """A forked child sends by itself, and the parent's batch keeps only the parent's deliveries."""
    recorder, pushed = Recorder(), list[str]()
    with batch(SOURCE, recorder):
        send("a", pushed)
        child = os.fork()
        if child == 0:
            deferred = send("b", pushed)
            with batch(SOURCE, recorder):
                send("c", pushed)
            right = not deferred and pushed == ["c"] and recorder.batches == [["c"]]
            os._exit(0 if right else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert pushed == ["a"]


def test_threads_that_share_a_batch_lose_nothing() -> None:
    """A thread with a copy of the context, as from asyncio.to_thread, uses the same batch."""
    recorder, pushed, alone = Recorder(), list[str](), list[str]()

    def sends(name: int) -> None:
        for n in range(2_000):
            if not send(f"{name}-{n}", pushed):
                alone.append(f"{name}-{n}")

    with batch(SOURCE, recorder):
        threads = [
            threading.Thread(target=contextvars.copy_context().run, args=(sends, name))
            for name in range(4)
        ]
        for thread in threads:
            thread.start()
    for thread in threads:
        thread.join()
    assert len(pushed) + len(alone) == len({*pushed, *alone}) == 8_000
    assert sum(map(len, recorder.batches)) == len(pushed)


def test_what_fails_before_the_end_is_raised_at_once() -> None:
    """An error of a full batch reaches its sender at once, and withdrawn deliveries leave the batch."""
    recorder, pushed = Recorder(), list[str]()

    def refuse(_: Recorded) -> None:
        raise ConnectionError

    with batch(SOURCE, recorder):
        hand_over([delivery(str(n)) for n in range(999)], refuse)
        with pytest.raises(ConnectionError):
            send("last", pushed)
        send("after", pushed)
    assert pushed == ["after"]
    assert recorder.withdrawn == ["last"]


def test_what_is_late_is_left_to_the_leader() -> None:
    """The leader may have pushed late deliveries already, but not those that Postgres does not have."""
    recorder, pushed = Recorder(), list[str]()
    recorder.push_deadline = -1.0
    with batch(SOURCE, recorder):
        send("a", pushed)
        send("b", pushed)
    assert pushed == [] and len(recorder.outbox) == 2
    recorder.answer = Recorded(spooled=True)
    with batch(SOURCE, recorder):
        send("c", pushed)
    assert pushed == ["c"]


def test_a_batch_is_that_of_its_thread() -> None:
    """Another thread's deliveries are sent at once."""
    recorder, pushed = Recorder(), list[str]()
    answers: list[bool] = []
    with batch(SOURCE, recorder):
        threading.Thread(target=lambda: answers.append(send("a", pushed))).start()
        eventually(lambda: answers == [False])


def test_what_comes_slowly_goes_out_as_it_comes() -> None:
    """With ``patience``, slow deliveries are sent as they come, and fast ones wait for the end."""
    for patience, at_once in ((0.0, ["a", "b"]), (60.0, [])):
        recorder, pushed = Recorder(), list[str]()
        with batch(SOURCE, recorder, patience=patience):
            time.sleep(0.001)
            send("a", pushed)
            time.sleep(0.001)
            send("b", pushed)
            assert pushed == at_once
        assert pushed == ["a", "b"]


def test_the_first_may_go_out_at_once() -> None:
    """With ``first_at_once``, the first delivery is sent at once, and the fast ones after it wait."""
    recorder, pushed = Recorder(), list[str]()
    with batch(SOURCE, recorder, patience=60.0, first_at_once=True):
        for job_id in "abc":
            send(job_id, pushed)
        assert pushed == ["a"]
    assert recorder.batches == [["a"], ["b", "c"]]
