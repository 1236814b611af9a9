"""The replacement of the core where a host's tests have no Redis: it accepts everything, and counts.

The hooks of the adapter are all installed then, and called. Nothing is written, and no thread is
started, because the tests of some hosts count threads.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from uuid import UUID

from jobguard.adapter import Source
from jobguard.model import Claim, Delivery, Outcome, Recorded, Refused, new_token

calls: Counter[str] = Counter()
"""The number of calls of each method."""


class Recorder:
    """A tracker that accepts everything."""

    push_deadline = 60.0
    mends_library = True

    def __init__(self, source: Source) -> None:
        self.source = source

    def record(self, deliveries: Sequence[Delivery], *, outbox: bool = False) -> Recorded:
        """Count these deliveries."""
        calls["record"] += len(deliveries)
        return Recorded()

    def defer(self, deliveries: Sequence[Delivery], push: Callable[[Recorded], None]) -> None:
        """Do nothing: there is no batch that records at its end."""

    def batch(self, **_: object) -> AbstractContextManager[None]:
        """Batch nothing."""
        return nullcontext()

    def recovers(self, tokens: Sequence[UUID], *, began: bool = True) -> frozenset[UUID]:
        """Recover nothing: there is no leader."""
        return frozenset()

    def guards(self, queue: str) -> bool:
        """Guard every queue."""
        return True

    def broker_in_doubt(self) -> bool:
        """Return False: there is no broker that could be in doubt."""
        return False

    def accepts_without_broker(self, recorded: Recorded) -> bool:
        """Return False: the host gets the error of a push."""
        return False

    def tombstones(self, tokens: Sequence[UUID]) -> Mapping[UUID, Outcome]:
        """Remember no end."""
        return {}

    def open_session(self, **_: Any) -> Session:
        """Return a session."""
        calls["open_session"] += 1
        return Session()

    def inherit_session(self, *_: Any, **__: Any) -> Session:
        """Return a session."""
        return Session()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return _counting(name)


class Session:
    """A worker that may run everything."""

    def __init__(self) -> None:
        self.id = new_token()

    def start(self, token: UUID, describe: Callable[[], Delivery]) -> Claim | Refused:
        """Grant the claim, and describe the delivery, as for a delivery without a record."""
        calls["start"] += 1
        describe()
        return Claim(token, 1)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return _counting(f"session.{name}")


def _counting(name: str) -> Callable[..., Any]:
    if name.startswith("__"):
        raise AttributeError(name)

    def call(*_: Any, **__: Any) -> None:
        calls[name] += 1

    return call


def write_down() -> None:
    """Write at the end of this process how many deliveries were recorded."""
    folder = Path(os.environ["HOST_SUITE_OUT"])
    (folder / f"recorded-{os.getpid()}").write_text(str(calls["record"]))
    (folder / f"calls-{os.getpid()}.txt").write_text(
        "".join(f"{name} {times}\n" for name, times in calls.most_common())
    )
