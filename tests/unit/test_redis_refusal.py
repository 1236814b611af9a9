"""Errors of Redis: those that concern the whole server, and those that pass after a while."""

from __future__ import annotations

import pytest
from redis import exceptions

from jobguard.redis_refusal import refusal_of, takes_no_writes


@pytest.mark.parametrize(
    ("error", "refuses", "for_a_while"),
    [
        (exceptions.OutOfMemoryError("command not allowed"), True, True),
        (exceptions.ResponseError("Error running script: @user_script: 5: -OOM x"), True, True),
        (exceptions.MasterDownError("Link with MASTER is down"), True, True),
        (exceptions.BusyLoadingError("Redis is loading"), True, True),
        (exceptions.TryAgainError("Multiple keys request"), False, True),
        (exceptions.NoPermissionError("this user has no permissions"), True, False),
        (exceptions.ResponseError("WRONGTYPE Operation against a key"), False, False),
        (exceptions.ConnectionError("OOM"), False, False),
    ],
)
def test_an_answer_is_classified(error: Exception, refuses: bool, for_a_while: bool) -> None:
    """Missing rights do not pass by themselves; TRYAGAIN does not concern the whole server."""
    assert (refusal_of(error) is not None) is refuses
    assert takes_no_writes(error) is for_a_while


def test_an_answer_inside_an_error_of_a_library_is_found() -> None:
    """A library may raise its own error from the error of Redis."""
    wrapped = RuntimeError("the push failed")
    wrapped.__cause__ = exceptions.ReadOnlyError("You can't write against a read only replica")
    assert takes_no_writes(wrapped)
