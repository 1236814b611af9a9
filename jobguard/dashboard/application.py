"""The ASGI application: its routes, its templates, and what all its answers have in common."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from jobguard import __version__
from jobguard.conninfo import postgres_conninfo
from jobguard.dashboard import acts, live, views
from jobguard.dashboard.access import Access, Authenticate
from jobguard.dashboard.fields import fields_in, link
from jobguard.errors import ConfigurationError, JobguardError, StoreUnavailable
from jobguard.log import log_event
from jobguard.operations.act import Operations
from jobguard.operations.brokers import Brokers
from jobguard.operations.explain import duration
from jobguard.operations.text import visible
from jobguard.redact import redact
from jobguard.settings import Settings, settings_from

HERE = Path(__file__).parent
_LARGEST_FORM = 64 << 10
_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src 'self' data:; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}

Handler = Callable[["Site", Request], Response]


@dataclass(slots=True)
class Site:
    """What all handlers of one page share."""

    ledger: Operations
    namespace: str
    settings: Settings
    brokers: Brokers
    access: Access
    read_only: bool
    templates: jinja2.Environment
    watcher: live.Watcher
    checked: bool = False

    def check(self) -> None:
        """Raise WrongInstallation before the first read. A mounted application is not told its start."""
        if not self.checked:
            self.ledger.require_installation(self.settings.installation)
            self.checked = True

    def render(self, request: Request, page: str, status: int = 200, /, **values: Any) -> Response:
        """Return a page made by a template."""
        root = request.scope.get("root_path", "")
        text = self.templates.get_template(page).render(
            link=functools.partial(link, root),
            here=request.scope["path"].removeprefix(root) or "/",
            namespace=self.namespace,
            read_only=self.read_only,
            version=__version__,
            csrf=lambda: self.access.csrf_token(request),
            **values,
        )
        response = HTMLResponse(text, status)
        self.access.keep_csrf(request, response, path=root)
        return response

    def back(self, request: Request, path: str, **query: Any) -> Response:
        """Return a redirection to a page of ours."""
        return RedirectResponse(link(request.scope.get("root_path", ""), path, **query), 303)


def app(
    postgres: str | Mapping[str, Any] | Callable[[], Any] | None = None,
    *,
    namespace: str | None = None,
    redis: Sequence[str] = (),
    token: str | None = None,
    authenticate: Authenticate | None = None,
    read_only: bool = False,
    **settings: Any,
) -> Starlette:
    """Return the page as an ASGI application, to be served or mounted under any path.

    ``postgres`` and the settings are those of ``guard()``, with the same variables. ``redis``: URLs of the
    guarded Redis, as for the reconciler, to ask where a job is now. ``token``: needed in the header
    ``Authorization: Bearer …``, or at a login page. ``authenticate``: your own function; it gets the
    connection and returns the name of the person, or None. With neither of them, only requests that name
    this machine as their host are answered. ``read_only``: nothing can be changed.

    Raises ConfigurationError and NoPostgres.
    """
    if token is not None and authenticate is not None:
        raise ConfigurationError("give a token or authenticate, not both")
    if token is not None and len(token) < 16:
        raise ConfigurationError("the token is too short to be secret: give 16 characters or more")
    chosen = settings_from({**settings, "namespace": namespace})
    ledger = Operations(
        postgres_conninfo(postgres),
        connect_timeout=2.0,
        answer_timeout=10.0,
        keep=True,
        encrypt=chosen.encrypt,
    )
    watcher = live.Watcher(ledger, chosen.namespace)
    site = Site(
        ledger=ledger,
        namespace=chosen.namespace,
        settings=chosen,
        brokers=Brokers(redis),
        access=Access(token=token, authenticate=authenticate),
        read_only=read_only,
        templates=_templates(),
        watcher=watcher,
    )

    @contextlib.asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        yield
        ledger.close()

    def page(path: str, handler: Handler) -> Route:
        return Route(path, _reading(site, handler), methods=["GET"])

    def change(path: str, handler: Callable[[Site, Request, Mapping[str, str]], Response]) -> Route:
        return Route(path, _changing(site, handler), methods=["POST"])

    routes = [
        page("/", views.overview),
        page("/queue", views.queue),
        page("/jobs", views.jobs),
        page("/job", views.job),
        page("/errors", views.errors),
        page("/incidents", views.incidents),
        page("/incident", views.incident),
        page("/workers", views.workers),
        page("/replay", views.replay),
        page("/confirm", acts.confirm),
        change("/act", acts.act),
        Route("/live", _guarded(site, live.events), methods=["GET"]),
        Route("/login", functools.partial(_login_page, site), methods=["GET"]),
        Route("/login", functools.partial(_log_in, site), methods=["POST"]),
        Mount("/static", StaticFiles(directory=HERE / "static")),
    ]
    return Starlette(routes=routes, lifespan=lifespan)


# -- what all answers have in common -----------------------------------------------------------


def _guarded(
    site: Site, handler: Callable[[Site, Request], Awaitable[Response]]
) -> Callable[[Request], Awaitable[Response]]:
    """Let only those in who may see the page."""

    async def endpoint(request: Request) -> Response:
        person = await site.access.person(request)
        if person is None:
            response = _refused(site, request)
        else:
            request.state.person = person
            response = await handler(site, request)
        response.headers.update(_HEADERS)
        return response

    return endpoint


def _refused(site: Site, request: Request) -> Response:
    if site.access.has_login and "text/html" in request.headers.get("accept", ""):
        return site.back(request, "/login")
    return PlainTextResponse(
        "not allowed: give the token as `Authorization: Bearer …`, or use the host name localhost\n",
        401,
        {"www-authenticate": "Bearer"},
    )


def _reading(site: Site, handler: Handler) -> Callable[[Request], Awaitable[Response]]:
    async def answer(site: Site, request: Request) -> Response:
        return await run_in_threadpool(_contained, site, request, lambda: handler(site, request))

    return _guarded(site, answer)


def _changing(
    site: Site, handler: Callable[[Site, Request, Mapping[str, str]], Response]
) -> Callable[[Request], Awaitable[Response]]:
    async def answer(site: Site, request: Request) -> Response:
        form = await _form(request)
        if site.read_only:
            return _message(site, request, 403, "This page is read-only.")
        if form is None or not site.access.may_change(request, form.get("csrf", "")):
            text = "The form is too old or comes from another page. Go back, reload, and try again."
            return _message(site, request, 403, text)
        return await run_in_threadpool(
            _contained, site, request, lambda: handler(site, request, form)
        )

    return _guarded(site, answer)


async def _form(request: Request) -> dict[str, str] | None:
    """Return the fields of a form; None if it is too large or cannot be read."""
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > _LARGEST_FORM:
            return None
    try:
        return fields_in(body.decode("latin-1"))
    except ConfigurationError:
        return None


def _contained(site: Site, request: Request, work: Callable[[], Response]) -> Response:
    """Answer an error of ours as a page that says what to do."""
    try:
        site.check()
        return work()
    except StoreUnavailable as error:
        log_event("step_failed", part="dashboard", error=str(error))
        return _message(site, request, 503, f"PostgreSQL does not answer. {redact(str(error))}")
    except JobguardError as error:
        return _message(site, request, 400, redact(str(error)))


def _message(site: Site, request: Request, status: int, text: str) -> Response:
    return site.render(request, "message.html", status, text=text)


async def _login_page(site: Site, request: Request) -> Response:
    if not site.access.has_login:
        return site.back(request, "/")
    response = site.render(request, "login.html", wrong=False)
    response.headers.update(_HEADERS)
    return response


async def _log_in(site: Site, request: Request) -> Response:
    form = await _form(request)
    if form is None or not site.access.is_token(form.get("token", "").strip()):
        response = site.render(request, "login.html", 401, wrong=True)
    else:
        response = site.back(request, "/")
        root = request.scope.get("root_path", "")
        site.access.log_in(response, secure=request.url.scheme == "https", path=root)
    response.headers.update(_HEADERS)
    return response


# -- templates ---------------------------------------------------------------------------------


def _templates() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE / "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        finalize=_shown,
    )
    environment.filters |= {
        "ago": _ago,
        "time": _time,
        "duration": duration,
        "number": lambda value: f"{value:,.0f}",
        "json": lambda value: json.dumps(value, ensure_ascii=False),
        "lines": lambda text: _Lines(visible(text, lines=True)),
    }
    return environment


class _Lines(str):
    """A text of several lines whose control characters are escaped already."""


def _shown(value: Any) -> Any:
    """Escape control characters in every text that a template prints; None is nothing."""
    if value is None:
        return ""
    if type(value) is str:
        return visible(value)
    return value


def _ago(at: datetime | None) -> str:
    return "" if at is None else f"{duration((datetime.now(UTC) - at).total_seconds())} ago"


def _time(at: datetime | None) -> str:
    return "" if at is None else at.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
