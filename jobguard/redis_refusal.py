"""What a Redis says that answers and takes no writes: it is full, a replica, or rights are missing."""

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
}
"""redis-py cuts the code off an error that has a class of its own."""
_CODE = re.compile(
    r"(?:^|[^\w])(" + "|".join((*_CODES.values(), "NOAUTH", "MISCONF", "NOREPLICAS")) + r")\b"
)
"""Also inside the error of a script, as older servers write it."""
_WHERE = re.compile(r",? *(?:script: \w+, )?on @user_script:.*$", re.DOTALL)


class RedisRefuses(JobguardError):
    """Redis answers, and stores nothing."""

    def __init__(self, reason: str, result: Mapping[UUID, Restored]) -> None:
        super().__init__(reason)
        self.result = result
        """What was done before it refused."""


def refusal_of(error: object) -> str | None:
    """Return Redis' own words if this error is a state of the whole server; None: it is not."""
    if not isinstance(error, exceptions.ResponseError | exceptions.BusyLoadingError):
        return None
    text = _WHERE.sub("", str(error)).strip()
    for kind in type(error).__mro__:
        if kind.__name__ in _CODES:
            return f"{_CODES[kind.__name__]} {text}"
    return text if _CODE.search(text) else None
