"""The HTTP server of a real reconciler: probes, a scrape, and a pass on request."""

from __future__ import annotations

import http.client
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING

from tests.acceptance.roads import BIN, Site
from tests.support import PATIENT, eventually, free_port

if TYPE_CHECKING:
    from pathlib import Path

SECRET = "a-secret-of-20-letters"


def ask(port: int, method: str, path: str, secret: str = "") -> tuple[int, str]:
    """Return status and text of an answer; (0, …) as long as nothing listens."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    with closing(connection):
        try:
            connection.request(method, path, headers={"Authorization": f"Bearer {secret}"})
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        except OSError as error:
            return 0, str(error)


def is_ready(port: int) -> bool:
    """Return True if the process at this port is ready."""
    return ask(port, "GET", "/readyz")[0] == 200


def test_a_reconciler_answers_probes_scrapes_and_requests_for_a_pass(
    tmp_path: Path, database: str, redis_url: str
) -> None:
    """A leader and a follower are ready; with --on-tick a pass is made for who knows the secret."""
    site = Site(tmp_path, database, redis_url, **PATIENT)
    ports = [free_port() for _ in range(3)]
    try:
        leader = site.reconciler("--http", f"127.0.0.1:{ports[0]}")
        site.reconciler("--http", f"127.0.0.1:{ports[1]}", leads=False)
        for port in ports[:2]:
            eventually(partial(is_ready, port), 30)
            assert ask(port, "GET", "/livez")[0] == 200
            status, page = ask(port, "GET", "/metrics")
            assert (status, "\njobguard_led 1.0\n" in page) == (200, True)
        assert ask(ports[0], "POST", "/tick", SECRET)[0] == 409
        leader.stop()

        site.start(
            "ticks",
            *(str(BIN / "jobguard"), "reconcile", "--http", f"127.0.0.1:{ports[2]}", "--on-tick"),
            JOBGUARD_TICK_SECRET=SECRET,
            JOBGUARD_NAMESPACE="other",
        )
        eventually(lambda: ask(ports[2], "GET", "/livez")[0] == 200, 30)
        assert ask(ports[2], "POST", "/tick", "wrong")[0] == 401
        status, counts = ask(ports[2], "POST", "/tick", SECRET)
        assert (status, '"leads": true' in counts) == (200, True)
    finally:
        site.close()
