"""Find out whether Redis lost data before any leader inspected it.

At that time there is no pulse that could show the loss. A restart and a FLUSHALL leave traces in
``INFO``.
"""

from __future__ import annotations

from typing import Any

import redis

_FLUSHES = ("cmdstat_flushall", "cmdstat_flushdb")


def lost_since(client: Any) -> float | None:
    """Return the age in seconds from which a record may be lost; None: Redis does not report it.

    Redis counts the flushes since its start, but not their times: after one flush, any record may
    be lost. Raises RedisError if Redis cannot be asked.
    """
    try:
        stats = client.info("commandstats")
        if client.info("stats").get("evicted_keys") or any(name in stats for name in _FLUSHES):
            return 0.0
        return float(client.info("server")["uptime_in_seconds"])
    except (redis.ResponseError, KeyError, TypeError, ValueError):
        return None
