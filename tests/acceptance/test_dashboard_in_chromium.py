from __future__ import annotations

import shutil
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from tests.integration.test_operations import HOSTILE, Rows
from tests.support import eventually

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on PATH")


@pytest.fixture
def rows(database: str) -> Iterator[Rows]:
    """Give a migrated database with two sources, to write into."""
    made = Rows(database)
    yield made
    made.connection.close()


@pytest.fixture
def address(database: str) -> Iterator[str]:
    """Serve the page."""
    import uvicorn

    from jobguard import dashboard

    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(
        dashboard.app(database), log_level="warning", timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    eventually(lambda: server.started)
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    thread.join(timeout=20)


def test_a_person_works_with_the_page(rows: Rows, address: str) -> None:
    """In a browser the page is live, works by keyboard and on a phone, and runs no stranger's text."""
    rows.owed(HOSTILE, queue=HOSTILE)
    rows.ended(HOSTILE, "failed", errors=[HOSTILE], queue="mail")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page: Any = browser.new_page(viewport={"width": 390, "height": 844}, color_scheme="dark")
        problems: list[str] = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda line: problems.extend([line.text] * (line.type == "error")))
        page.on("dialog", lambda dialog: problems.append(dialog.message))
        page.goto(f"{address}/", wait_until="load")
        page.wait_for_selector(".chart canvas")
        for path in ("/", "/jobs", "/errors", "/incidents", "/workers"):
            page.goto(address + path, wait_until="load")
            wide = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
            assert page.evaluate(wide) <= 0, path
        page.goto(f"{address}/jobs", wait_until="load")
        page.wait_for_timeout(1000)  # the stream is open, and has told the first state
        rows.owed("a-new-one")
        page.wait_for_selector("text=a-new-one", timeout=60_000)
        page.keyboard.press("/")
        page.keyboard.type("a-new-one")
        page.keyboard.press("Enter")
        page.wait_for_selector("h1:has-text('a-new-one')")
        page.click("main a.button:has-text('Cancel')")
        page.wait_for_selector("text=1 of queue mail: pending")
        page.keyboard.press("Enter")  # the button has the focus
        page.wait_for_selector("text=Done: 1 of 1")
        page.keyboard.press("g")
        page.keyboard.press("i")
        page.wait_for_selector("strong:has-text('cancel')")
        browser.close()
    assert problems == []
    assert rows.ask("select outcome::text from jobguard.history where job_id = 'a-new-one'") == [
        ("cancelled",)
    ]
