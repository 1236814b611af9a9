"""Play a storm on real servers, follow it on the page in a browser, and renew the pictures of the page.

Run ``python -m tests.acceptance.storm [MINUTES]``. Three queues are filled and worked off all the while.
Redis is flushed and killed, workers are killed, one job kills each worker that runs it, some jobs fail, and
PostgreSQL is away for some seconds. The browser has the overview open from the first job to the last and is
never reloaded by this program. The run fails if the page stops to follow, if a script of it fails, if its
numbers differ from the ledger at the end, or if a job was lost.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import redis
import rq
from playwright import sync_api

import jobguard.schema
from jobguard.demo.servers import PostgresServer, RedisServer
from tests.acceptance import roads
from tests.acceptance.roads import BIN, REPOSITORY, Child, Site
from tests.support import eventually, free_port

IMAGES = REPOSITORY / "docs" / "images"
QUEUES = ("mail", "thumbnails", "reports")
MINUTES = 8.0
_PACE = 0.04
"""Seconds between two jobs."""
HOST = "web-1"
"""The host name that the pictures show."""
_COMPLETED = ".card.completed dd"

# -- jobs ------------------------------------------------------------------------------------------


def send_mail(ledger: str, label: str) -> None:
    """Do the work of a moment."""
    time.sleep(random.uniform(0.0, 0.05))
    roads.say(ledger, label)


def make_thumbnail(ledger: str, label: str) -> None:
    """Kill the worker, as a job does that needs too much memory."""
    os.kill(os.getpid(), signal.SIGKILL)


def write_report(ledger: str, label: str) -> None:
    """Fail."""
    roads.say(ledger, label)
    raise ValueError("the template has no field 'total'")


# -- the storm -------------------------------------------------------------------------------------


class _Site(Site):
    """A site whose processes run on a machine with the name HOST, as far as they know."""

    def env(self, **more: str) -> dict[str, str]:
        """Return the environment of the processes."""
        (self.folder / "sitecustomize.py").write_text(
            f"import socket\nsocket.gethostname = lambda: {HOST!r}\n"
        )
        path = os.pathsep.join([str(self.folder), str(REPOSITORY)])
        return super().env(**more) | {"PYTHONPATH": path}


class Storm:
    """The site, its workers under a supervisor, and a producer that goes on while Redis is away."""

    def __init__(self, folder: Path, postgres: PostgresServer, redis_server: RedisServer) -> None:
        self.postgres, self.redis = postgres, redis_server
        self.site = _Site(
            folder, postgres.create_database("ledger"), redis_server.url, JOBGUARD_CRASH_BACKOFF="1"
        )
        jobguard.schema.migrate(self.site.postgres)
        self.sent: set[str] = set()
        self._pace = _PACE
        self._calm, self._over = threading.Event(), threading.Event()
        self._sender = threading.Thread(target=self._send)
        self._supervisor = threading.Thread(target=self._supervise)
        self._workers: dict[str, Child] = {}

    @contextmanager
    def raging(self) -> Iterator[None]:
        """Send jobs until ``calm``, and keep the workers alive until the end of the block."""
        self.site.reconciler("--redis", self.site.redis_url)
        self._sender.start()
        self._supervisor.start()
        try:
            yield
        finally:
            self.calm()
            self._over.set()
            self._supervisor.join()

    def calm(self) -> None:
        """Send no more jobs."""
        self._calm.set()
        self._sender.join()

    def _send(self) -> None:
        with self.site.producer() as (mail, _):
            queues = {name: rq.Queue(name, connection=mail.connection) for name in QUEUES}
            for number in range(10**9):
                if self._calm.wait(self._pace):
                    return
                name, work = random.choice(QUEUES), send_mail
                if number % 90 == 60:
                    name, work = "reports", write_report
                if number % 2000 == 700:
                    name, work = "thumbnails", make_thumbnail
                label = f"{name}-{number}"
                try:
                    queues[name].enqueue(work, str(self.site.ledger), label, job_id=label)
                except redis.RedisError:
                    continue  # Its sender knows that it is not sent.
                self.sent.add(label)

    def _supervise(self) -> None:
        while not self._over.wait(0.2):
            for name in QUEUES:
                worker = self._workers.get(name)
                if worker is None or worker.process.poll() is not None:
                    self._workers[name] = self.site.start(
                        name,
                        *(str(BIN / "rq"), "worker", "--url", self.site.redis_url),
                        *("--worker-class", "jobguard.adapters.rq.SimpleWorker", name),
                    )

    # -- what goes wrong --

    def flush(self) -> None:
        """Lose all data of Redis while many jobs wait."""
        self._pace = 0.0
        self._waiting(400)
        with self.site.client() as client:
            client.flushall()
        self._pace = _PACE

    def kill_redis(self) -> None:
        """Kill Redis, which comes back empty, while many jobs wait."""
        self._pace = 0.0
        self._waiting(200)
        self.redis.kill()
        self.redis.start()
        self._pace = _PACE

    def _waiting(self, count: int) -> None:
        query = "select count(*) from jobguard.jobs"
        eventually(lambda: self.site.ask(query)[0] >= count, 60, message=f"{count} jobs wait")

    def kill_worker(self) -> None:
        """Kill a worker in the middle of its work."""
        self._workers["mail"].process.kill()

    def stop_postgres(self) -> None:
        """Kill PostgreSQL, and start it again five seconds later."""
        self.postgres.kill()
        time.sleep(5)
        self.postgres.start()


class Page:
    """The browser of a person on call."""

    def __init__(self, browser: Any, address: str) -> None:
        self._browser, self._address = browser, address
        self.problems: list[str] = []
        self.overview = self.open("/")

    def open(self, path: str, **options: Any) -> Any:
        """Open a page."""
        options = {"viewport": {"width": 1180, "height": 1250}} | options
        page = self._browser.new_page(**options)
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        page.goto(self._address + path, wait_until="load")
        return page

    def follows(self) -> None:
        """Wait until the open overview shows that more jobs are completed, without a reload."""
        before = self.overview.inner_text(_COMPLETED)
        self.overview.wait_for_function(
            "([at, before]) => document.querySelector(at)?.innerText !== before",
            arg=[_COMPLETED, before],
            timeout=60_000,
        )

    def shows(self, text: str) -> None:
        """Wait until the open overview shows this."""
        self.overview.wait_for_selector(f"main >> text={text}", timeout=60_000)

    def picture(self, path: str, name: str, **options: Any) -> None:
        """Take a picture of a page."""
        page = self.open(path, **options)
        page.wait_for_timeout(1500)  # The chart is drawn.
        page.screenshot(path=IMAGES / name)
        page.close()


def play(storm: Storm, page: Page, minutes: float) -> None:
    """Do one thing after the other, and see each time that the page goes on."""
    acts = [
        storm.flush,
        storm.kill_worker,
        storm.kill_redis,
        storm.stop_postgres,
        storm.flush,
        storm.kill_worker,
    ]
    pause = minutes * 60 / (len(acts) + 1)
    for act in acts:
        time.sleep(pause)
        print(act.__doc__, flush=True)
        act()
        page.follows()
    time.sleep(pause)
    page.shows("put back")


def pictures(storm: Storm, page: Page) -> None:
    """Renew the pictures, while the storm goes on."""
    page.picture("/", "overview.png")
    put_back = (
        "select job_id from jobguard.history where recoveries > 0 order by token desc limit 1"
    )
    (job_id,) = storm.site.ask(put_back)
    page.picture(f"/job?id={job_id}", "job.png", viewport={"width": 1180, "height": 900})
    phone = {"viewport": {"width": 390, "height": 844}, "color_scheme": "dark"}
    page.picture("/", "overview-phone.png", **phone)


def settled(storm: Storm, page: Page) -> None:
    """Wait until nothing is owed, and compare the page with the ledger, and both with what ran."""
    site = storm.site
    eventually(lambda: site.ask("select count(*) from jobguard.jobs") == [0], 120)
    query = "select count(*) from jobguard.history where outcome::text = %s"
    for outcome in ("completed", "failed", "dead"):
        (count,) = site.ask(query, outcome)
        shown = f".card.{outcome} dd:has-text('{count:,}')"
        page.overview.wait_for_selector(shown, timeout=60_000)
    assert page.problems == []
    ran = roads.words(site.ledger)
    dead = set(site.ask("select job_id from jobguard.history where outcome = 'dead'"))
    lost = storm.sent - ran.keys() - dead
    print(f"{len(storm.sent)} jobs, {len(dead)} dead, {len(lost)} lost")
    assert not lost, sorted(lost)


def main() -> None:
    """Play it, and write the pictures."""
    minutes = float(sys.argv[1]) if len(sys.argv) > 1 else MINUTES
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    assert chromium, "there is no Chromium on PATH"
    with (
        tempfile.TemporaryDirectory() as folder,
        PostgresServer() as postgres,
        RedisServer() as redis_server,
        sync_api.sync_playwright() as playwright,
    ):
        storm = Storm(Path(folder), postgres, redis_server)
        site, port = storm.site, free_port()
        try:
            options = ("--port", str(port), "--redis", site.redis_url)
            served = site.start("page", str(BIN / "jobguard"), "dashboard", *options)
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            with storm.raging():
                served.wait_for_log(f":{port}/")
                eventually(lambda: site.ask("select count(*) from jobguard.history")[0] > 0, 60)
                page = Page(browser, f"http://127.0.0.1:{port}")
                play(storm, page, minutes)
                pictures(storm, page)
                storm.calm()
                settled(storm, page)
            browser.close()
        finally:
            site.close()


if __name__ == "__main__":
    from tests.acceptance import storm  # not __main__, where no worker would find the tasks

    storm.main()
