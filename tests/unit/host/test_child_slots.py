"""What children have not written, as their worker sees it."""

from __future__ import annotations

import os
import signal
from uuid import UUID, uuid4

import pytest

from jobguard.host import child_slots
from jobguard.host.child_slots import ChildSlots


def child(work: ChildSlots, since: float | None, *ran: UUID | None) -> int:
    """Fork a child that says so and lives on."""
    said, says = os.pipe()
    pid = os.fork()
    if pid == 0:
        work.note(since)
        for token in ran:
            work.runs(token)
        os.write(says, b".")
        signal.pause()
        os._exit(0)
    os.close(says)
    assert os.read(said, 1) == b"."
    os.close(said)
    return pid


def end(pid: int) -> None:
    """End it."""
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_the_oldest_of_all_children_counts_as_long_as_it_lives() -> None:
    """What a dead child had is lost with it, and nobody waits for that."""
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
    """Also of this very process."""
    work = ChildSlots()
    work.note(5.0)
    assert work.oldest() == 5.0
    work.note(None)
    assert work.oldest() is None


def test_what_children_run_is_known_while_they_run_it() -> None:
    """The last that each has begun; not what a dead one ran, nor a process that is no child of ours."""
    work = ChildSlots()
    tokens = [uuid4() for _ in range(4)]
    first, second = child(work, None, tokens[0], tokens[1]), child(work, 10.0, tokens[2])
    third = child(work, None, tokens[3], None)
    work.runs(uuid4())  # of this process, which lists its own
    try:
        assert work.running() == {tokens[1], tokens[2]}
        os.kill(first, signal.SIGKILL)
        os.waitid(os.P_PID, first, os.WEXITED | os.WNOWAIT)
        assert work.running() == {tokens[2]}, "though nobody has reaped it yet"
        assert work.oldest() == 10.0
    finally:
        for pid in (first, second, third):
            end(pid)
    assert work.running() == frozenset()


def test_nothing_is_left_of_a_dead_one_with_its_number() -> None:
    """Wherever that one had its place: what it ran would seem to run as long as this one lives."""
    work = ChildSlots()
    place = child_slots._at((os.getpid() + 5) % child_slots._SLOTS)
    child_slots._SLOT.pack_into(work._memory, place, os.getpid(), 1.0, uuid4().bytes)

    work.note(2.0)

    assert [since for pid, since, _ in work._slots() if pid == os.getpid()] == [2.0]


def test_every_child_has_a_place_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever their numbers, as long as there are places; a dead one's is given to another."""
    monkeypatch.setattr(child_slots, "_SLOTS", 8)
    work = ChildSlots()
    tokens = [uuid4() for _ in range(8)]
    children: list[int] = []
    try:
        for token in tokens:
            children.append(child(work, None, token))
            end(
                child(ChildSlots(), None)
            )  # takes a number, so that every other of ours is left out
        assert work.running() == frozenset(tokens)
        end(children.pop(0))
        last = uuid4()
        children.append(child(work, None, last))
        assert work.running() == {*tokens[1:], last}
    finally:
        for pid in children:
            end(pid)
