"""Play an incident on real servers, put it right, and write what was seen.

Run ``python -m tests.acceptance.incident``. There is a job that kills its workers, a deleted queue, a
flushed Redis, an unguarded worker and an outage of PostgreSQL: once with the commands alone, and once with
the page alone. Everything in docs/incident.md is real output; ids, ports and times are replaced, so that
another run changes little.
"""

from __future__ import annotations

import html
import http.cookiejar
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jobguard.schema
from jobguard.demo.servers import PostgresServer, RedisServer
from tests.acceptance import roads
from tests.acceptance.roads import BIN, QUEUE, Child, Site
from tests.support import eventually, free_port

PAGE = Path(__file__).parents[2] / "docs" / "incident.md"
IMAGES = PAGE.parent / "images"
WIDTH = 100
MANY = 200
"""Jobs of the deleted queue: more than the brake allows to vanish at once."""
_NOISE = (
    (r"\x1b\[[0-9;]*m", ""),
    (r"\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d", "2026-01-05 09:00:00"),
    (
        r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}",
        "01234567-89ab-7cde-8f01-23456789abcd",
    ),
    (r"\b(?=[0-9a-f]*\d)[0-9a-f]{12}\b", "0123456789ab"),
    (r"…[0-9a-f]{6}\b", "…"),
    (r"\bpid \d+", "pid 4711"),
    (r"\b\d+ connections left", "195 connections left"),
    (r"\b\d+ in use", "5 in use"),
    (re.escape(socket.gethostname()), "host"),
)


def poison(cure: str) -> str:
    """Kill the worker, as a job does that needs too much memory, until the cure is there."""
    if not Path(cure).exists():
        os.kill(os.getpid(), signal.SIGKILL)
    return "done"


class Incident:
    """The servers and processes of one incident, and the transcript of it."""

    def __init__(self, folder: Path, postgres: PostgresServer, redis_server: RedisServer) -> None:
        self.postgres = postgres
        self._ports = {str(postgres.port): "15432", str(redis_server.port): "16379"}
        self.site = Site(
            folder,
            postgres.create_database("ledger"),
            redis_server.url,
            JOBGUARD_CRASH_BACKOFF="0",
        )
        jobguard.schema.migrate(self.site.postgres)
        self.folder = folder
        self.lines: list[str] = []
        self.site.reconciler("--redis", redis_server.url)

    # -- the transcript --------------------------------------------------------------------------

    def say(self, text: str) -> None:
        """Write a sentence."""
        self.lines += [text, ""]

    def show(self, language: str, *blocks: str) -> None:
        """Write real output, without what another run would change."""
        text = "\n".join(blocks)
        ports = [(rf"\b{port}\b", shown) for port, shown in self._ports.items()]
        for pattern, what in (*_NOISE, *ports):
            text = re.sub(pattern, what, text)
        rows = [re.sub(r" {3,}$", "", row).rstrip() for row in text.splitlines()]
        self.lines += [f"```{language}", *(row for row in rows if row), "```", ""]

    def run(self, *words: str, until: Callable[[str], bool] = lambda _text: True) -> str:
        """Run a command of jobguard until its output is as expected, and write the output."""
        seen: list[str] = []

        def done() -> bool:
            found = self.site.command(*words)
            assert found.returncode < 2, found.stderr
            seen[:] = [found.stdout + ("" if found.returncode == 0 else found.stderr)]
            seen.append(f"$ echo $?\n{found.returncode}" if found.returncode else "")
            return until(seen[0])

        eventually(done, 60, message=f"{' '.join(words)}: {seen}")
        self.show("console", f"$ jobguard {' '.join(words)}", *seen)
        return seen[0]

    # -- what happens ----------------------------------------------------------------------------

    def send(self, *job_ids: str, task: Callable[..., Any] | None = None, word: str = "") -> None:
        """Send jobs from the application."""
        with self.site.producer() as (queue, _):
            for job_id in job_ids:
                queue.enqueue(task or roads.say, word or str(self.site.ledger), job_id=job_id)

    def poisoned(self) -> Path:
        """Send a job that kills three workers; a supervisor starts each again."""
        cure = self.folder / "cure"
        worker = self.site.worker()
        self.site.trusted()
        self.send("invoice-7", task=poison, word=str(cure))
        while not self.site.ask("select from jobguard.history where outcome = 'dead'"):
            if worker.process.poll() is not None:
                worker = self.site.worker()
            time.sleep(0.1)
        worker.close()
        return cure

    def flushed(self) -> None:
        """Lose all data of Redis while jobs wait."""
        self.send(*(f"mail-{n}" for n in range(20)))
        with self.site.client() as client:
            client.flushall()
            eventually(lambda: client.llen(f"rq:queue:{QUEUE}") == 20, 60)

    def deleted(self) -> None:
        """Delete a queue of many jobs, as a person may do by mistake."""
        self.send(*(f"bulk-{n}" for n in range(MANY)))
        # A worker that left a moment ago may have taken jobs, and the push of a new job may not be over.
        # Both would be causes: the jobs would be put back at once.
        left = (
            "select count(*) from jobguard.workers"
            " where coalesce(left_at, dead_at, now()) > now() - interval '6 seconds'"
        )
        eventually(lambda: self.site.ask(left) == [0], 30)
        self.site.ask(
            "update jobguard.jobs set recorded_at = recorded_at - interval '1 hour' returning true"
        )
        with self.site.client() as client:
            keys = [f"rq:job:bulk-{n}" for n in range(MANY)]
            client.delete(f"rq:queue:{QUEUE}", *keys)

    def emptied(self) -> None:
        """Let a worker run everything that waits."""
        worker = self.site.worker()
        self.site.nothing_is_owed(60)
        worker.stop()

    def unguarded(self) -> Child:
        """Start a worker without jobguard, as an old deployment does."""
        return self.site.bare_worker()

    def outage(self, job_id: str, look: Callable[[], object]) -> None:
        """Kill PostgreSQL, send and run a job, look, and start PostgreSQL again."""
        worker = self.site.worker()
        with self.site.producer(retry_interval=0.05) as (queue, _):
            self.postgres.kill()
            before = roads.words(self.site.ledger).total()
            queue.enqueue(roads.say, str(self.site.ledger), job_id=job_id)
            self.site.wait_for_runs(before + 1)
            look()
            self.postgres.start()
            self.site.completed(job_id, timeout=60)
        worker.stop()


def by_commands(it: Incident) -> None:
    """Find and put right all of it with the commands."""
    it.say("### A job that kills its workers")
    cure = it.poisoned()
    it.say("Three workers died while they ran `invoice-7`. The alert is `JobguardDeadJobs`.")
    it.run("dead", "list")
    it.run("jobs", "show", "invoice-7")
    it.say("The cause is repaired. The job is sent again, and a worker runs it.")
    cure.touch()
    it.run("dead", "requeue", "invoice-7")
    it.emptied()
    it.run("jobs", "show", "invoice-7", until=lambda text: "completed" in text)

    it.say("### A queue is deleted")
    it.deleted()
    it.say(
        f"Somebody called `DEL` on a queue of {MANY} jobs. This has no known cause, and it may be "
        "meant. The queue is held. The alert is `JobguardHeld`."
    )
    it.run("doctor", until=lambda text: "resume" in text)
    it.say("It was a mistake: the jobs are to run.")
    it.run("resume", "--queue", QUEUE)
    with it.site.client() as client:
        eventually(lambda: client.llen(f"rq:queue:{QUEUE}") == MANY, 60)
    it.run("stats")
    it.emptied()

    it.say("### Redis is flushed")
    it.flushed()
    it.say("Twenty jobs waited. Somebody called `FLUSHALL`. Nobody has to do anything.")
    it.run("incidents", until=lambda text: "20" in text)
    it.emptied()

    it.say("### A worker without a guard")
    bare = it.unguarded()
    it.say("An old deployment starts a worker. The alert is `JobguardUnguarded`.")
    it.run("stats", until=lambda text: "nguarded" in text or "untrusted" in text)
    it.run("doctor", until=lambda text: "nguarded" in text)
    it.say("The worker is stopped. The queue is trusted again.")
    bare.stop()
    it.site.trusted()
    it.run("stats", until=lambda text: "nguarded" not in text and "untrusted" not in text)

    it.say("### PostgreSQL is away")
    it.say(
        "PostgreSQL is killed. The application sends `mail-now`, and a worker runs it. The alert is "
        "`JobguardPostgresDown`."
    )
    it.outage("mail-now", lambda: it.run("doctor"))
    it.say("PostgreSQL is started. The reports come by themselves.")
    it.run("jobs", "show", "mail-now", until=lambda text: "completed" in text)


class Browser:
    """A person with a browser: pages, the forms in them, and screenshots."""

    def __init__(self, it: Incident, address: str) -> None:
        self._it, self._address = it, address
        cookies = urllib.request.HTTPCookieProcessor(http.cookiejar.CookieJar())
        self._open = urllib.request.build_opener(cookies).open

    def get(self, path: str, *, has: str, lacks: str = "\0", most: int = 16) -> str:
        """Read a page until it has one text and lacks another, and write its first lines."""
        seen = [""]

        def done() -> bool:
            seen[0] = self._text(path)
            return has in _words(seen[0]) and lacks not in _words(seen[0])

        try:
            eventually(done, 20)
        except AssertionError as error:
            raise AssertionError(f"no {has!r} in {path}:\n{_words(seen[0])}") from error
        self._it.show("http", f"GET {path}", *_words(seen[0]).splitlines()[:most])
        return seen[0]

    def act(self, path: str) -> None:
        """Ask for an action, read what it would do, and confirm it."""
        page = self.get(path, has="")
        fields = dict(re.findall(r'<input type="hidden" name="(\w+)" value="([^"]*)"', page))
        form = {name: html.unescape(value) for name, value in fields.items()}
        body = urllib.parse.urlencode(form).encode()
        with self._open(self._address + "/act", body, timeout=30) as answer:
            text = answer.read().decode()
        self._it.show("http", "POST /act", *_words(text).splitlines()[:4])

    def picture(self, path: str, name: str) -> None:
        """Take a screenshot, if there is a Chromium."""
        chromium = shutil.which("chromium") or shutil.which("chromium-browser")
        if chromium is None:
            print(f"no Chromium: {name} is not renewed", file=sys.stderr)
            return
        subprocess.run(
            [
                *(chromium, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
                *("--window-size=1100,760", "--timeout=5000"),
                *(f"--screenshot={IMAGES / name}", self._address + path),
            ],
            check=True,
            capture_output=True,
            timeout=60,
        )
        self._it.say(f"![{path}](images/{name})")

    def _text(self, path: str) -> str:
        try:
            with self._open(self._address + path, timeout=30) as answer:
                return str(answer.read().decode())
        except urllib.error.HTTPError as error:
            return error.read().decode()


def _words(page: str) -> str:
    """Return the visible text of the main part of a page."""
    main = re.search(r"<main.*?>(.*)</main>", page, re.DOTALL)
    text = main.group(1) if main else page
    text = re.sub(r"<(script|style|svg|form|noscript).*?</\1>", "", text, flags=re.DOTALL)
    text = re.sub(r"\s+", " ", text)
    text = re.sub(r"</(td|th|dt|a)>", "  ", text)
    text = re.sub(r"</?(tr|p|h\d|li|dl|dd|ul|ol|article|table|div|section)\b.*?>", "\n", text)
    rows = [re.sub(r"\s+", " ", row).strip() for row in _plain(text).splitlines()]
    return "\n".join(row for row in rows if row)


def _plain(text: str) -> str:
    return html.unescape(re.sub(r"<[^>]+>", "", text))


def by_the_page(it: Incident) -> None:
    """Find and put right all of it with the page."""
    port = free_port()
    page = it.site.start(
        "page",
        str(BIN / "jobguard"),
        "dashboard",
        "--port",
        str(port),
        "--redis",
        it.site.redis_url,
    )
    you = Browser(it, f"http://127.0.0.1:{port}")
    eventually(lambda: _answers(port), 60, message=page.log)

    it.say("### A job that kills its workers")
    cure = it.poisoned()
    you.get("/errors", has="crash budget")
    you.get("/job?id=invoice-7", has="dead")
    you.picture("/job?id=invoice-7", "incident-dead.png")
    cure.touch()
    you.act("/confirm?action=requeue-dead&id=invoice-7")
    it.emptied()
    you.get("/job?id=invoice-7", has="completed", most=4)

    it.say("### A queue is deleted")
    it.deleted()
    you.get(f"/queue?name={QUEUE}", has="HELD", most=4)
    you.picture("/", "incident-held.png")
    you.act(f"/confirm?action=resume&queue={QUEUE}")
    with it.site.client() as client:
        eventually(lambda: client.llen(f"rq:queue:{QUEUE}") == MANY, 60)
    you.get(f"/queue?name={QUEUE}", has=" 0 stuck", lacks="HELD", most=3)
    it.emptied()

    it.say("### Redis is flushed")
    it.flushed()
    you.get("/incidents", has="20 put back, over", most=8)
    it.emptied()

    it.say("### A worker without a guard")
    bare = it.unguarded()
    you.get(f"/queue?name={QUEUE}", has="nguarded", most=3)
    bare.stop()
    it.site.trusted()
    you.get(f"/queue?name={QUEUE}", has="trusted", lacks="TRUSTED", most=3)

    it.say("### PostgreSQL is away")
    it.outage("mail-now", lambda: you.get("/", has="PostgreSQL does not answer"))
    you.get("/job?id=mail-now", has="completed", most=4)
    page.stop()


def _answers(port: int) -> bool:
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0


HEAD = """\
<!-- made by python -m tests.acceptance.incident -->

# An incident, found and put right

Five things go wrong on real servers: a job kills its workers, a queue is deleted, Redis is flushed, a
worker without a guard starts, and PostgreSQL is killed. Each is found and put right, once with the commands
alone, and once with the page alone. A program plays it and writes this page, with some times shorter than
the defaults. All output is real; ids, times and ports are replaced. The jobs of the deleted queue are made
an hour old in the ledger: a job of the last minute is put back at once.

What each alert means is in the [runbook](runbook.md).
"""


def main() -> None:
    """Play the incident twice, and write the page; or print the parts that are named."""
    os.environ |= {"COLUMNS": str(WIDTH), "NO_COLOR": "1"}
    parts = {"With the commands": by_commands, "With the page": by_the_page}
    text = [HEAD]
    named = sys.argv[1:]
    for title, play in parts.items():
        if named and title.split()[-1] not in named:
            continue
        with (
            tempfile.TemporaryDirectory() as folder,
            PostgresServer() as postgres,
            RedisServer() as redis_server,
        ):
            it = Incident(Path(folder), postgres, redis_server)
            try:
                play(it)
            except BaseException:
                print("\n".join(it.lines), file=sys.stderr)
                raise
            finally:
                it.site.close()
            text += [f"## {title}", "", *it.lines]
    if named:
        print("\n".join(text))
    else:
        PAGE.write_text("\n".join(text).rstrip() + "\n")


if __name__ == "__main__":
    from tests.acceptance import incident  # not __main__, where no worker would find the task

    incident.main()
