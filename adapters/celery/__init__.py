"""The adapter for Celery 5.4 and later, on Redis.

``guard(app)`` is all that is needed: a worker imports the app, and with it the guard.
"""

from __future__ import annotations

from jobguard.adapters.celery.adapter import CeleryAdapter

__all__ = ["CeleryAdapter"]
