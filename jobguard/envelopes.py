"""The envelope of a job that a person requeues. Only the adapter of its library can read an envelope."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any
from uuid import UUID

from jobguard.errors import JobguardError


def renewed(library: str, envelope: bytes, token: UUID) -> bytes:
    """Return the envelope of a new delivery of the same job, with all its retries.

    Raises JobguardError if no worker could read the pushed message.
    """
    for entry in entry_points(group="jobguard.adapters"):
        if entry.name == library:
            renew: Any = getattr(entry.load()(), "renew", None)
            if renew is None:
                return envelope
            try:
                return bytes(renew(envelope, token))
            except ValueError as error:
                raise JobguardError(str(error)) from error
    return envelope
