"""The errors of a Redis that answers and takes no writes: it is full, a replica, or rights are missing."""

from __future__ import annotations

import re
from collections.abc import Mapping
from uuid import UUID

from redis import exceptions

from jobguard.errors import JobguardError
from jobguard.model import Restored

_CODES = {
    "OutOfMemoryError": "OOM",
    "ReadOnlyError": "READONLY",
    "NoPermissionError": "NOPERM",
    "BusyLoadingError": "LOADING",
    "MasterDownError": "MASTERDOWN",
    "ClusterDownError": "CLUSTERDOWN",
    "TryAgainError": "TRYAGAIN",
}
"""redis-py removes the code from an error that has a class of its own."""
_OF_THE_SERVER = {
    "OOM",
    "READONLY",
    "LOADING",
    "MASTERDOWN",
    "CLUSTERDOWN",
    "NOREPLICAS",
    "MISCONF",
}
_FOR_A_WHILE = {*_OF_THE_SERVER, "TRYAGAIN"}
"""Codes of a Redis that takes no writes now and may take writes later."""
_REFUSALS = {*_OF_THE_SERVER, "NOPERM", "NOAUTH"}
"""Codes of a Redis that takes no writes of jobguard, for a while or until a person changes its settings."""
_CODE = re.compile(rf"\b({'|'.join(sorted(_FOR_A_WHILE | _REFUSALS))})\b")
"""Matches a code also inside the error of a script, as older servers write it."""
_WHERE = re.compile(r",? *(?:script: \w+, )?on @user_script:.*$", re.DOTALL)

_ANSWERS = (
    exceptions.ResponseError,
    exceptions.BusyLoadingError,
    exceptions.AuthenticationError,
)
"""Errors that Redis answers with. Redis certainly did not execute the command."""


class RedisRefuses(JobguardError):
    """Redis answers but stores nothing."""

    def __init__(self, reason: str, result: Mapping[UUID, Restored]) -> None:
        super().__init__(reason)
        self.result = result
        """The results of the restores before the refusal."""


def answer_in(error: BaseException | None) -> BaseException | None:
    """Return the error that Redis answered with, also from inside an error of a library; None: no answer.

    Only the last error of Redis counts: after a NOSCRIPT, for example, the script was sent again.
    """
    while error is not None and not isinstance(error, exceptions.RedisError):
        error = error.__cause__ or error.__context__
    return error if isinstance(error, _ANSWERS) else None


def takes_no_writes(error: BaseException) -> bool:
    """Return True if Redis answered that it takes no writes now. It may take writes later."""
    answer = answer_in(error)
    return answer is not None and _message(answer, _FOR_A_WHILE) is not None


def refusal_of(error: object) -> str | None:
    """Return the message of Redis if this error concerns the whole server; None: it does not."""
    if not isinstance(error, exceptions.ResponseError | exceptions.BusyLoadingError):
        return None
    return _message(error, _REFUSALS)


def _message(answer: BaseException, codes: set[str]) -> str | None:
    """Return the message of an answer with its code, if the answer has one of these codes."""
    text = _WHERE.sub("", str(answer)).strip()
    for kind in type(answer).__mro__:
        if _CODES.get(kind.__name__) in codes:
            return f"{_CODES[kind.__name__]} {text}"
    return text if codes.intersection(_CODE.findall(text)) else None
