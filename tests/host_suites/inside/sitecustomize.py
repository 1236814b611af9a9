"""Runs first in every Python that a host's tests start: it gives them their Redis and their guard.

A host's tests connect to localhost:6379 on every machine. The port is changed where a connection is
made and nowhere else, so that the tests read from a client the values that they wrote.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

import redis.connection

_PORT = os.environ.get("HOST_SUITE_REDIS_PORT")

if _PORT:
    _init: Any = redis.connection.Connection.__init__

    def _redirected(self: Any, host: str = "localhost", port: int = 6379, **kwargs: Any) -> None:
        _init(self, host, int(_PORT or 0) if int(port) == 6379 else port, **kwargs)

    redis.connection.Connection.__init__ = _redirected  # type: ignore[method-assign, assignment]

if "HOST_SUITE_GUARDED" in os.environ:
    importlib.import_module(f"host_{os.environ['HOST_SUITE']}").guard_here()
