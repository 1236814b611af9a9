"""The adapter for Dramatiq 1.17 to 2.x on Redis.

A worker is guarded by the module that it imports anyway, the one that calls ``guard(broker)``.
"""

from jobguard.adapters.dramatiq.adapter import DramatiqAdapter

__all__ = ["DramatiqAdapter"]
