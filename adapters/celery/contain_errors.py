"""Manners: what goes wrong in a hook of ours is not the host's to see."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from jobguard.errors import StoreUnavailable, is_host_interrupt

log = logging.getLogger("jobguard")


@contextmanager
def contain_errors(what: str) -> Iterator[None]:
    """Keep to ourselves what is raised inside, but what the user asked to hear: that Postgres is away."""
    try:
        yield
    except StoreUnavailable:
        raise
    except Exception as error:
        if is_host_interrupt(error):
            raise
        log.exception("jobguard could not %s", what)
