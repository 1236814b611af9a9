"""Whether a Redis lost data before a leader ever looked at it, as far as Redis itself can tell.

There is no pulse yet that could show it. A restart and a FLUSHALL leave traces in ``INFO``.
"""

from __future__ import annotations

from typing import Any

import redis

_FLUSHES = ("cmdstat_flushall", "cmdstat_flushdb")


def lost_since(client: Any) -> float | None:
    """Return what age a record must have to be lost, in seconds; None: Redis does not tell.

    Redis counts the flushes since its start, not when they were: after one, any record may be lost.
    Raises RedisError where Redis cannot be asked.
    """
    try:
        stats = client.info("commandstats")
        if client.info("stats").get("evicted_keys") or any(name in stats for name in _FLUSHES):
            return 0.0
        return float(client.info("server")["uptime_in_seconds"])
    except (redis.ResponseError, KeyError, TypeError, ValueError):
        return None
