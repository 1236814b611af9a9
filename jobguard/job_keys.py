"""Keys of jobs: at most one job of a key is owed. The rule of one send, and the answer of the ledger."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from jobguard.errors import InvalidKey

OnConflict = Literal["ignore", "replace", "raise"]

KEY, ON_CONFLICT, THROTTLE = "jobguard_key", "jobguard_on_conflict", "jobguard_throttle"
"""The options of a library's own call: in RQ's meta, Celery's headers, Dramatiq's options."""

_LONGEST = 100 * 366 * 86400.0


@dataclass(frozen=True, slots=True)
class KeyRule:
    """What happens to a job whose key another job holds."""

    key: str
    on_conflict: OnConflict = "ignore"
    throttle: float = 0.0
    """Seconds after a job in which no other one of the key is accepted, even if the job has ended."""

    def __post_init__(self) -> None:
        if not self.key or not isinstance(self.key, str):
            raise InvalidKey(f"a key is a text that is not empty, not {self.key!r}")
        if self.on_conflict not in get_args(OnConflict):
            raise InvalidKey(
                f"on_conflict is 'ignore', 'replace' or 'raise', not {self.on_conflict!r}"
            )
        check_seconds("throttle", self.throttle)


def check_seconds(name: str, given: Any) -> None:
    """Raise InvalidKey if this is no number of seconds that a window can last."""
    is_number = isinstance(given, int | float) and not isinstance(given, bool)
    if not is_number or not 0 <= given <= _LONGEST:
        raise InvalidKey(
            f"{name} is a number of seconds, at least 0 and at most {_LONGEST:.0f}, not {given!r}"
        )


@dataclass(slots=True)
class Sent:
    """The result of a send with a key."""

    sent: bool = True
    """False: the key was held or throttled, and nothing was sent."""
    job_id: str | None = None
    """The id of the job that was sent, or of the job that holds the key."""
    result: Any = field(default=None, repr=False)
    """What the library returned."""


_rule: ContextVar[tuple[KeyRule, Sent] | None] = ContextVar("jobguard_key", default=None)


@contextmanager
def keyed(rule: KeyRule) -> Iterator[Sent]:
    """Give the jobs that are sent inside this rule."""
    answer = Sent()
    before = _rule.set((rule, answer))
    try:
        yield answer
    finally:
        _rule.reset(before)


def rule_of(options: Mapping[str, Any] | None) -> KeyRule | None:
    """Return the rule of a send: that of the block around it, or of the options of the library's call.

    Raises InvalidKey.
    """
    block = _rule.get()
    if block is not None:
        return block[0]
    if not options or KEY not in options:
        return None
    return KeyRule(
        options[KEY],
        options.get(ON_CONFLICT, "ignore"),
        options.get(THROTTLE) or 0.0,
    )


def report(*, sent: bool, job_id: str | None) -> None:
    """Tell the block around a send what became of it."""
    block = _rule.get()
    if block is not None:
        block[1].sent, block[1].job_id = sent, job_id
