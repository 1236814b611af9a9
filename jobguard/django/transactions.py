"""Send jobs in Django's transactions: they exist if, and only if, the transaction commits.

``jobguard.django.atomic()`` is Django's ``transaction.atomic()`` in which every guarded job belongs to the
transaction. Jobs that are sent with ``on_commit`` or ``delay_on_commit`` are sent after it, as before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from django.db import DEFAULT_DB_ALIAS, connections

from jobguard.guard import JobGuard, known_guards, transaction_of
from jobguard.host.callers import caller_of


def atomic(
    using: Any = None,
    savepoint: bool = True,
    durable: bool = False,
    *,
    guards: Sequence[JobGuard] | None = None,
) -> Any:
    """Open ``transaction.atomic()`` and record all jobs sent inside in its transaction.

    The arguments are Django's. ``guards``: only the jobs of these guards; by default the jobs of every
    guard of this process. Use it as a context manager or as a decorator. Raises as
    ``JobGuard.transaction`` does.
    """
    if callable(using):  # a decorator without arguments
        return _block(None, savepoint, durable, guards)(using)
    return _block(using, savepoint, durable, guards)


@contextmanager
def _block(
    using: str | None, savepoint: bool, durable: bool, guards: Sequence[JobGuard] | None
) -> Iterator[None]:
    # The connection is the one of the thread that enters the block, not of the thread that decorates.
    connection = connections[using or DEFAULT_DB_ALIAS]
    caller = caller_of(connection, savepoint=savepoint, durable=durable)
    with transaction_of(known_guards() if guards is None else guards, caller):
        yield
