"""The process that an object belongs to."""

from __future__ import annotations

import os
import threading

from jobguard.fork import OwnerProcess


def test_a_forked_child_renews_once_what_its_parent_made() -> None:
    """The process that made the object renews nothing; what renews may call back."""
    owner, made = OwnerProcess(), list[int]()

    def renew() -> None:
        owner.take_over(renew)
        made.append(os.getpid())

    owner.take_over(renew)
    assert owner.is_current and not made
    child = os.fork()
    if child == 0:
        first = not owner.is_current
        owner.take_over(renew)
        owner.take_over(renew)
        os._exit(0 if first and owner.is_current and made == [os.getpid()] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert owner.is_current


def test_a_thread_of_the_child_waits_until_all_is_renewed() -> None:
    """It would use a lock that a thread of the parent has, or a connection of the parent."""
    owner = OwnerProcess()
    child = os.fork()
    if child == 0:
        order = list[str]()
        began, asked = threading.Event(), threading.Event()

        def renew() -> None:
            began.set()
            asked.wait(10)
            other.join(0.05)  # it cannot go on
            order.append("renewed")

        def use() -> None:
            began.wait(10)
            asked.set()
            owner.take_over(lambda: order.append("again"))
            order.append("used")

        other = threading.Thread(target=use)
        other.start()
        owner.take_over(renew)
        other.join(10)
        os._exit(0 if order == ["renewed", "used"] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_renewal_that_fails_is_done_again() -> None:
    """The next call must not use what belongs to the parent."""
    owner, calls = OwnerProcess(), list[int]()

    def fail() -> None:
        raise OSError

    child = os.fork()
    if child == 0:
        try:
            owner.take_over(fail)
        except OSError:
            owner.take_over(lambda: calls.append(1))
        os._exit(0 if calls and owner.is_current else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
