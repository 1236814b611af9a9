"""A small HTTP server beside the reconciler: ``/livez``, ``/readyz``, ``/metrics`` and ``POST /tick``.

It is for probes and scrapers inside a cluster. Requests have a deadline, and at most a few are answered
at a time. It serves no TLS and, but for ``/tick``, asks for no password: bind it to a private address.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import socket
import threading
from collections.abc import Callable, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final

from jobguard.errors import ConfigurationError
from jobguard.log import log_event
from jobguard.redact import redact

_TIMEOUT: Final = 5.0
"""Seconds in which a client must have sent its request, and taken the answer."""
_AT_ONCE: Final = 16
"""Requests that are answered at the same time; others are refused at once."""
_CONNECTIONS: Final = 64
"""Connections at the same time, with those that have not sent their request yet; others are closed."""
_SHORTEST_SECRET: Final = 16

Problem = Callable[[], str | None]
"""Returns the reason why a probe fails, or None."""
Pass = Callable[[], Mapping[str, Any]]
Answer = tuple[HTTPStatus, str, bytes]

TEXT: Final = "text/plain; charset=utf-8"
JSON: Final = "application/json"


class Endpoints:
    """The answers of the server, without sockets."""

    def __init__(
        self,
        *,
        live: Problem,
        ready: Problem,
        metrics: Callable[[], tuple[str, bytes]] | None = None,
        tick: Pass | None = None,
        secret: str | None = None,
    ) -> None:
        """``metrics`` returns a content type and a page; ``tick`` makes one pass, and needs ``secret``."""
        if tick is not None and len(secret or "") < _SHORTEST_SECRET:
            raise ConfigurationError(
                f"--on-tick needs a secret of {_SHORTEST_SECRET} characters or more: set "
                "JOBGUARD_TICK_SECRET or JOBGUARD_TICK_SECRET_FILE"
            )
        self._live = live
        self._ready = ready
        self._metrics = metrics
        self._tick = tick
        self._secret = (secret or "").encode()
        self._ticking = threading.Lock()

    def get(self, path: str) -> Answer:
        """Answer GET and HEAD."""
        if path in ("/livez", "/healthz"):
            return _probe(self._live())
        if path == "/readyz":
            return _probe(self._ready())
        if path == "/metrics":
            if self._metrics is None:
                return _text(
                    HTTPStatus.NOT_IMPLEMENTED, "metrics need: pip install 'jobguard[metrics]'"
                )
            kind, page = self._metrics()
            return HTTPStatus.OK, kind, page
        if path == "/tick":
            return _text(HTTPStatus.METHOD_NOT_ALLOWED, "POST it")
        return _text(HTTPStatus.NOT_FOUND, "try /livez, /readyz, /metrics, or POST /tick")

    def post(self, path: str, authorization: str) -> Answer:
        """Answer POST: make one pass."""
        if path != "/tick":
            return _text(HTTPStatus.NOT_FOUND, "only /tick takes a POST")
        if self._tick is None:
            return _text(
                HTTPStatus.CONFLICT, "this reconciler watches all the time; start it with --on-tick"
            )
        scheme, _, given = authorization.partition(" ")
        fits = hmac.compare_digest(given.strip().encode("utf-8", "replace"), self._secret)
        if scheme.lower() != "bearer" or not fits:
            return _text(HTTPStatus.UNAUTHORIZED, "give the header Authorization: Bearer SECRET")
        if not self._ticking.acquire(blocking=False):
            return _text(HTTPStatus.TOO_MANY_REQUESTS, "a pass is being made")
        try:
            done = dict(self._tick())
        finally:
            self._ticking.release()
        failed = done.get("unfinished") or done.get("misplaced")
        status = HTTPStatus.BAD_GATEWAY if failed else HTTPStatus.OK
        return status, JSON, json.dumps(done, default=str).encode()


def _probe(problem: str | None) -> Answer:
    if problem is None:
        return _text(HTTPStatus.OK, "ok")
    return _text(HTTPStatus.SERVICE_UNAVAILABLE, problem)


def _text(status: HTTPStatus, line: str) -> Answer:
    return status, TEXT, f"{line}\n".encode()


class HttpServer:
    """The server, in threads of its own."""

    def __init__(self, address: str, endpoints: Endpoints) -> None:
        """Bind the address. Raises ConfigurationError if that is impossible."""
        host, port = parse_address(address)
        places = threading.BoundedSemaphore(_AT_ONCE)

        class Handler(_Handler):
            pass

        Handler.endpoints = endpoints
        Handler.places = places
        try:
            self._server = _Server((host, port), Handler)
        except OSError as error:
            raise ConfigurationError(f"--http {address}: {error}") from error
        self.port = int(self._server.server_address[1])
        self._thread = threading.Thread(
            target=self._server.serve_forever, name="jobguard-http", daemon=True
        )
        self._thread.start()
        log_event("http_serves", address=f"{host}:{self.port}")

    def close(self) -> None:
        """Answer no more requests."""
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 32

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        self._free = threading.BoundedSemaphore(_CONNECTIONS)
        super().__init__(address, handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer in a thread of its own, if there is room for one more."""
        if not self._free.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:  # no thread can be started
            self._free.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer, and make room."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: a client that went away is no event."""


class _Handler(BaseHTTPRequestHandler):
    endpoints: Endpoints
    places: threading.BoundedSemaphore
    timeout = _TIMEOUT
    server_version = "jobguard"
    sys_version = ""

    def handle(self) -> None:
        """Answer one request. ``timeout`` bounds one read, and this bounds the whole request."""
        self._late = threading.Timer(_TIMEOUT, self._cut)
        self._late.daemon = True
        self._late.start()
        try:
            super().handle()
        finally:
            self._late.cancel()

    def _cut(self) -> None:
        with contextlib.suppress(OSError):  # it is closed already
            self.connection.shutdown(socket.SHUT_RD)

    def do_GET(self) -> None:
        self._answer(lambda: self.endpoints.get(self._path()))

    do_HEAD = do_GET

    def do_POST(self) -> None:
        given = self.headers.get("Authorization", "")
        self._answer(lambda: self.endpoints.post(self._path(), given))

    def _path(self) -> str:
        return self.path.partition("?")[0]

    def _answer(self, answer: Callable[[], Answer]) -> None:
        if not self.places.acquire(blocking=False):
            status, kind, page = _text(HTTPStatus.SERVICE_UNAVAILABLE, "too many requests at once")
        else:
            try:
                status, kind, page = answer()
            except Exception as error:
                log_event("http_failed", path=self._path(), error=redact(str(error)))
                status, kind, page = _text(HTTPStatus.INTERNAL_SERVER_ERROR, "failed: see the log")
            finally:
                self.places.release()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(page)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("Connection", "close")
        if status is HTTPStatus.UNAUTHORIZED:
            self.send_header("WWW-Authenticate", "Bearer")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(page)

    def log_message(self, format: str, *args: Any) -> None:
        """Log no line for each probe."""


def parse_address(address: str) -> tuple[str, int]:
    """Return host and port of HOST:PORT, :PORT (all addresses) or [IPv6]:PORT."""
    host, colon, port = address.rpartition(":")
    if not colon or not (port.isascii() and port.isdigit()) or int(port) > 65535:
        raise ConfigurationError(f"--http {address!r}: give HOST:PORT, for example 0.0.0.0:9912")
    return host.strip("[]") or "0.0.0.0", int(port)
