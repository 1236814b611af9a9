"""The reports that children have not written, as their worker sees them."""

from __future__ import annotations

import os
import signal
from uuid import UUID, uuid4

import pytest

from jobguard.host import child_slots
from jobguard.host.child_slots import ChildSlots


def child(work: ChildSlots, since: float | None, *ran: UUID | None) -> int:
    """Fork a child that notes this and stays alive."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        work.note(since)
        for token in ran:
            work.runs(token)
        os.write(writer, b".")
        signal.pause()
        os._exit(0)
    os.close(writer)
    assert os.read(reader, 1) == b"."
    os.close(reader)
    return pid


def end(pid: int) -> None:
    """End a child."""
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_the_oldest_of_all_children_counts_as_long_as_it_lives() -> None:
    """The oldest report of live children counts; the reports of a dead child are lost with it."""
    work = ChildSlots()
    assert work.oldest() is None
    first, second, third = child(work, 20.0), child(work, 10.0), child(work, None)
    try:
        assert work.oldest() == 10.0
        end(second)
        assert work.oldest() == 20.0
    finally:
        end(first)
        end(third)
    assert work.oldest() is None


def test_what_is_written_waits_no_more() -> None:
    """A report of this process that is written does not wait any more."""
    work = ChildSlots()
    work.note(5.0)
    assert work.oldest() == 5.0
    work.note(None)
    assert work.oldest() is None


def test_what_children_run_is_known_while_they_run_it() -> None:
    """The last delivery of each live child counts, but not those of dead children or other processes."""
    work = ChildSlots()
    tokens = [uuid4() for _ in range(4)]
    first, second = child(work, None, tokens[0], tokens[1]), child(work, 10.0, tokens[2])
    third = child(work, None, tokens[3], None)
    work.runs(uuid4())  # a delivery of this process, which is in its own list
    try:
        assert work.running() == {tokens[1], tokens[2]}
        os.kill(first, signal.SIGKILL)
        os.waitid(os.P_PID, first, os.WEXITED | os.WNOWAIT)
        assert work.running() == {tokens[2]}, "although it is not reaped yet"
        assert work.oldest() == 10.0
    finally:
        for pid in (first, second, third):
            end(pid)
    assert work.running() == frozenset()


def test_nothing_is_left_of_a_dead_one_with_its_number() -> None:
    """A dead child's slot with the same pid is cleared, wherever it was: its delivery no longer runs."""
    work = ChildSlots()
    place = child_slots._at((os.getpid() + 5) % child_slots._SLOTS)
    child_slots._SLOT.pack_into(work._memory, place, os.getpid(), 1.0, uuid4().bytes)

    work.note(2.0)

    assert [since for pid, since, _ in work._slots() if pid == os.getpid()] == [2.0]


def test_every_child_has_a_place_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Children with any pids get different slots, and a dead child's slot is reused."""
    monkeypatch.setattr(child_slots, "_SLOTS", 8)
    work = ChildSlots()
    tokens = [uuid4() for _ in range(8)]
    children: list[int] = []
    try:
        for token in tokens:
            children.append(child(work, None, token))
            end(child(ChildSlots(), None))  # takes a pid, so that the pids differ by two
        assert work.running() == frozenset(tokens)
        end(children.pop(0))
        last = uuid4()
        children.append(child(work, None, last))
        assert work.running() == {*tokens[1:], last}
    finally:
        for pid in children:
            end(pid)
