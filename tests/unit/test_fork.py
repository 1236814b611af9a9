"""The process that an object belongs to."""

from __future__ import annotations

import os

from jobguard.fork import OwnerProcess


def test_a_forked_child_does_not_own_what_its_parent_made() -> None:
    """The child can take the object over, once."""
    owner = OwnerProcess()
    assert owner.is_current and not owner.take_over()
    child = os.fork()
    if child == 0:
        right = not owner.is_current and owner.take_over() and owner.is_current
        os._exit(0 if right else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert owner.is_current
