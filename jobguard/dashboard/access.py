"""Who may see the page, and who may change something."""

from __future__ import annotations

import hashlib
import hmac
import inspect
import ipaddress
import secrets
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias, cast

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.requests import HTTPConnection, Request
from starlette.responses import Response

Authenticate: TypeAlias = Callable[[HTTPConnection], "str | Awaitable[str | None] | None"]
"""Returns the name of the person, who is then noted with each action; None: refused."""

_SESSION = "jobguard_session"
_CSRF = "jobguard_csrf"
_SESSION_SECONDS = 12 * 3600


def is_loopback(host: str) -> bool:
    """Return True if only programs of this machine reach this host name or address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class Access:
    """The rule of one page: a token, the user's own function, or this machine alone."""

    def __init__(self, *, token: str | None, authenticate: Authenticate | None) -> None:
        self._token = token
        self._authenticate = authenticate

    @property
    def has_login(self) -> bool:
        """True if a person logs in with the token."""
        return self._authenticate is None and self._token is not None

    async def person(self, request: HTTPConnection) -> str | None:
        """Return the name of the person; None: refused."""
        if self._authenticate is not None:
            if inspect.iscoroutinefunction(self._authenticate):
                return str(name) if (name := await self._authenticate(request)) else None
            found: Any = await run_in_threadpool(cast(Any, self._authenticate), request)
            return str(found) if found else None
        if self._token is None:
            # Without a token, a page of a stranger could reach us by a host name that it points here.
            host = request.headers.get("host", "").rsplit(":", 1)[0]
            return "local" if is_loopback(host) else None
        if self._bears_token(request.headers):
            return "token"
        return "token" if self._session_is_valid(request.cookies.get(_SESSION, "")) else None

    def _bears_token(self, headers: Headers) -> bool:
        kind, _, given = headers.get("authorization", "").partition(" ")
        return kind.lower() == "bearer" and self.is_token(given.strip())

    def is_token(self, given: str) -> bool:
        """Return True if this is the token."""
        return self._token is not None and hmac.compare_digest(
            given.encode("utf-8", "replace"), self._token.encode()
        )

    def log_in(self, response: Response, *, secure: bool, path: str) -> None:
        """Let the browser of this person in for some hours; the cookie does not contain the token."""
        until = str(int(time.time()) + _SESSION_SECONDS)
        response.set_cookie(
            _SESSION,
            f"{until}.{self._sign(until)}",
            max_age=_SESSION_SECONDS,
            httponly=True,
            samesite="strict",
            secure=secure,
            path=path or "/",
        )

    def _sign(self, text: str) -> str:
        key = f"jobguard session {self._token}".encode()
        return hmac.new(key, text.encode(), hashlib.sha256).hexdigest()

    def _session_is_valid(self, cookie: str) -> bool:
        until, _, signature = cookie.partition(".")
        if not hmac.compare_digest(signature.encode(), self._sign(until).encode()):
            return False
        return until.isdigit() and int(until) > time.time()

    # -- changes -------------------------------------------------------------------------------

    def csrf_token(self, request: Request) -> str:
        """Return the secret that a form of this browser must send back; it stands in a cookie too."""
        found: str | None = getattr(request.state, "csrf", None)
        if found is None:
            given = request.cookies.get(_CSRF, "")
            found = request.state.csrf = given if len(given) == 43 else secrets.token_urlsafe(32)
        return found

    def keep_csrf(self, request: Request, response: Response, *, path: str) -> None:
        """Set the cookie of the secret if a form was made with it."""
        found = getattr(request.state, "csrf", None)
        if found is not None and request.cookies.get(_CSRF) != found:
            response.set_cookie(
                _CSRF,
                found,
                httponly=True,
                samesite="strict",
                secure=request.url.scheme == "https",
                path=path or "/",
            )

    def may_change(self, request: Request, given: str) -> bool:
        """Return True if this change comes from a form of ours, or from a program with the token."""
        if self._bears_token(request.headers):
            return True
        if request.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
            return False
        known = request.cookies.get(_CSRF, "")
        return bool(known) and hmac.compare_digest(known.encode(), given.encode("utf-8", "replace"))
