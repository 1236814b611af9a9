"""Server-sent events: they tell the browser that something has changed, and it asks for the page again."""

from __future__ import annotations

import asyncio
import hashlib
import json
import threading
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse

from jobguard.errors import JobguardError, StoreUnavailable
from jobguard.operations.overview import Overview, overview_of
from jobguard.operations.read import ReadModel

if TYPE_CHECKING:
    from jobguard.dashboard.application import Site

INTERVAL = 2.0
"""Seconds between two looks, for all browsers together."""
_PATIENCE = 5.0
_PING = 15.0
_MOST = 100
"""Browsers that are served at the same time."""
_LONGEST = 3600.0
"""Seconds after which a browser connects again, and is asked again who it is."""


class Watcher:
    """Reads the overview at most once in an interval, however many browsers look."""

    def __init__(self, model: ReadModel, namespace: str) -> None:
        self._model = model
        self._namespace = namespace
        self._lock = threading.Lock()
        self._at = float("-inf")
        self._seen: Overview | JobguardError | None = None
        self._digest = ""
        self.browsers = 0

    def overview(self) -> Overview:
        """Return the state, at most INTERVAL seconds old. Raises StoreUnavailable.

        A failure is kept as long as a state is, and a browser that has waited for the look of another
        one for some seconds does not look itself.
        """
        if not self._lock.acquire(timeout=_PATIENCE):
            raise StoreUnavailable("an earlier question has no answer yet")
        try:
            if self._seen is None or time.monotonic() - self._at >= INTERVAL:
                try:
                    self._seen = overview_of(self._model, self._namespace)
                except JobguardError as error:
                    self._seen = error
                self._digest = _digest_of(self._seen)
                self._at = time.monotonic()
            seen = self._seen
        finally:
            self._lock.release()
        if isinstance(seen, JobguardError):
            raise seen.with_traceback(None)
        return seen

    def digest(self) -> str:
        """Return a text that differs when something has changed; "away" without PostgreSQL.

        While another browser looks, it is that of the look before: many browsers must not take the threads
        in which pages are made.
        """
        if not self._lock.locked():
            with suppress(JobguardError):
                self.overview()
        return self._digest


def _digest_of(seen: Overview | JobguardError) -> str:
    if isinstance(seen, JobguardError):
        return "away"
    text = json.dumps(_without_ages(seen.as_dict()), default=str, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16]


def _without_ages(value: Any) -> Any:
    """Return the facts without what changes by itself: times since something, and times of beats."""
    if isinstance(value, dict):
        return {
            key: _without_ages(one)
            for key, one in value.items()
            if not (
                str(key).endswith("seconds") or key in ("beat_at", "counted_at", "seconds_left")
            )
        }
    if isinstance(value, list | tuple):
        return [_without_ages(one) for one in value]
    return value


async def events(site: Site, request: Request) -> Response:
    """Send an event at each change, and a comment now and then, so that proxies keep the connection."""
    if site.watcher.browsers >= _MOST:
        return PlainTextResponse("too many browsers look at this page\n", 503)
    return StreamingResponse(
        _stream(site, request),
        media_type="text/event-stream",
        headers={"x-accel-buffering": "no"},
    )


async def _stream(site: Site, request: Request) -> AsyncIterator[str]:
    watcher = site.watcher
    watcher.browsers += 1
    began = sent = time.monotonic()
    last = None
    try:
        yield "retry: 3000\n\n"
        while time.monotonic() - began < _LONGEST and not await request.is_disconnected():
            now = await run_in_threadpool(watcher.digest)
            if now != last:
                last, sent = now, time.monotonic()
                yield f"event: change\ndata: {now}\n\n"
            elif time.monotonic() - sent > _PING:
                sent = time.monotonic()
                yield ": \n\n"
            await asyncio.sleep(INTERVAL)
    finally:
        watcher.browsers -= 1
