"""The page /metrics on a real ledger, and the rules and the dashboard that read it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from prometheus_client.parser import text_string_to_metric_families

from jobguard.cli import main
from jobguard.cli.reconcile import command as reconcile
from jobguard.operations.read import ReadModel
from jobguard.serving import metrics
from jobguard.serving.metrics import Metrics
from tests.alerts.breakages import BREAKAGES
from tests.conformance.words import leading
from tests.databases import rows
from tests.integration.hosts import Host, trusted
from tests.support import SLOWEST, eventually

DEPLOY = Path(__file__).parents[2] / "deploy" / "prometheus"
RUNBOOK = DEPLOY.parents[1] / "docs" / "runbook.md"
RULES: list[dict[str, Any]] = yaml.safe_load((DEPLOY / "alerts.yaml").read_text())["groups"][0][
    "rules"
]


def samples(page: Metrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Return the values of a scrape by name and labels."""
    _, text = page.page()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


def value(page: Metrics, name: str, **labels: str) -> float:
    """Return the sum of the samples that have these labels."""
    wanted = set(labels.items())
    return sum(
        number for (n, has), number in samples(page).items() if n == name and wanted <= set(has)
    )


def test_a_loss_is_seen_in_the_metrics(
    redis_url: str, database: str, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Jobs, workers, leader and recoveries are numbers; no label is an id; the rules find their metrics."""
    monkeypatch.setattr(metrics, "_FRESH", 0.0)
    monkeypatch.setattr(metrics, "_PATIENCE", SLOWEST)
    host = Host("rq", redis_url)
    guard = host.guard(stack, database)
    with (
        leading(guard, database, redis_url) as service,
        closing(ReadModel(lambda: database)) as model,
    ):
        page = Metrics(model, "default", service)
        eventually(lambda: trusted(database), 20)
        ids = [host.send() for _ in range(3)]
        assert value(page, "jobguard_jobs", state="pending", queue="mail") == 3
        assert value(page, "jobguard_led") == value(page, "jobguard_leader") == 1
        assert value(page, "jobguard_ready") == value(page, "jobguard_live") == 1
        assert value(page, "jobguard_workers", library="rq") == 1
        assert value(page, "jobguard_queue_trusted", queue="mail") == 1
        host.client.flushdb()
        eventually(lambda: value(page, "jobguard_recovered_total", cause="incident") == 3, 30)
        service._leadership.give_up()  # the numbers of a term that is over stay
        eventually(lambda: not service._runners)
        assert value(page, "jobguard_recovered_total", cause="incident") == 3
        found = samples(page)
        text = page.page()[1].decode()
        assert not [job_id for job_id in ids if job_id in text]
        exported = {name for name, _ in found} | {"jobguard_ended_total", "jobguard_incidents_open"}
        used = {name for rule in RULES for name in re.findall(r"jobguard_\w+", rule["expr"])}
        dashboard = (DEPLOY / "dashboard.json").read_text()
        used |= set(re.findall(r"jobguard_\w+", dashboard))
        assert used <= exported
        assert {"ended", "incidents_open"} <= {
            family.name.removeprefix("jobguard_") for family in text_string_to_metric_families(text)
        }


def test_many_queues_are_a_bounded_number_of_labels(
    redis_url: str, database: str, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond the largest queues the others are one, and no job is left out of the sum."""
    monkeypatch.setattr(metrics, "QUEUES", 3)
    host = Host("rq", redis_url)
    host.guard(stack, database)
    host.send()
    copy = (
        "insert into jobguard.jobs (source, token, job_id, queue, task, envelope)"
        " select source, gen_random_uuid(), n::text, 'queue ' || n %% 10, 't', ''"
        " from jobguard.jobs, generate_series(1, 100) n returning 1"
    )
    assert len(rows(database, copy)) == 100
    with closing(ReadModel(lambda: database)) as model:
        page = Metrics(model, "default")
        found = samples(page)
        assert value(page, "jobguard_jobs", state="pending") == 101
    queues = {dict(has)["queue"] for name, has in found if name == "jobguard_jobs"}
    assert len(queues) == 4
    assert "other" in queues


def test_what_cannot_be_sent_is_a_number(database: str) -> None:
    """Held requests and failed schedules are counted."""
    insert = "insert into jobguard.{} values {} returning 1"
    source = "sources (id, namespace, library, address)"
    rows(database, insert.format(source, "(1, 'default', 'rq', 'localhost:1/0')"))
    request = "requests (source, job_id, queue, task, error)"
    rows(database, insert.format(request, "(1, 'a', 'q', 't', 'why'), (1, 'b', 'q', 't', null)"))
    schedule = "schedules (namespace, name, source, queue, task, cron, error)"
    rows(database, insert.format(schedule, "('default', 's', 1, 'q', 't', '* * * * *', 'why')"))
    with closing(ReadModel(lambda: database)) as model:
        page = Metrics(model, "default")
        assert value(page, "jobguard_requests_held") == 1
        assert value(page, "jobguard_schedules_failed") == 1


def test_a_job_that_waits_for_its_backoff_is_not_missing(database: str) -> None:
    """A job of a dead worker counts as absent when the time of crash_backoff is over, not before."""
    insert = "insert into jobguard.{} values {} returning 1"
    source = "sources (id, namespace, library, address)"
    rows(database, insert.format(source, "(1, 'default', 'rq', 'localhost:1/0')"))
    job = "jobs (source, token, job_id, queue, task, envelope, not_before)"
    job += " select 1, gen_random_uuid(), n::text, 'q', 't', '', now() + n * interval '1 hour'"
    rows(database, f"insert into jobguard.{job} from generate_series(-1, 1) n returning 1")
    suspects = "insert into jobguard.suspects (source, token, cause)"
    rows(database, f"{suspects} select 1, token, 'worker' from jobguard.jobs returning 1")
    with closing(ReadModel(lambda: database)) as model:
        assert value(Metrics(model, "default"), "jobguard_suspects") == 2


def test_without_postgres_the_page_still_answers() -> None:
    """A ledger that cannot be read is a metric, not an error of the scrape."""
    with closing(ReadModel(lambda: "postgresql://u@127.0.0.1:1/d", connect_timeout=1)) as model:
        page = Metrics(model, "default")
        assert value(page, "jobguard_postgres_up") == 0


def test_every_alert_has_a_section_in_the_runbook() -> None:
    """Each alert names its section, and each section its alert."""
    alerts = {rule["alert"] for rule in RULES}
    assert set(re.findall(r"^## (Jobguard\w+)$", RUNBOOK.read_text(), re.M)) == alerts
    for rule in RULES:
        assert rule["annotations"]["runbook"] == f"docs/runbook.md#{rule['alert'].lower()}"
        assert rule["labels"]["severity"] in ("page", "warn")
    panels = json.loads((DEPLOY / "dashboard.json").read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels) >= 15


@pytest.mark.parametrize("words", [("check", "alerts.yaml"), ("test", "alerts-test.yaml")])
def test_promtool_accepts_the_rules(words: tuple[str, str]) -> None:
    """Each rule is valid, and fires on the value that it is for."""
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("no promtool here: it comes with Prometheus")
    done = subprocess.run(
        [promtool, words[0], "rules", words[1]], cwd=DEPLOY, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_rule_has_a_test() -> None:
    """The file for promtool tests each alert, and `make alerts` breaks what it is for."""
    text = (DEPLOY / "alerts-test.yaml").read_text()
    alerts = {rule["alert"] for rule in RULES}
    assert set(re.findall(r'alertname=\\?"(\w+)\\?"', text)) == alerts
    assert {one.alert for one in BREAKAGES} == alerts


def test_wrong_combinations_are_usage_errors() -> None:
    """--once serves nothing, and --on-tick needs an address and a secret."""
    for words in (["--once", "--http", ":1"], ["--on-tick"]):
        done = CliRunner().invoke(main, ["reconcile", *words])
        assert done.exit_code == 2, done.output
    words = ["--on-tick", "--http", "127.0.0.1:0", "--redis", "redis://localhost/0"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jobguard.log.configure", lambda level, json: None)
        done = CliRunner().invoke(
            main, ["reconcile", *words, "--postgres", "postgresql://u@localhost/d"]
        )
    assert (done.exit_code, "JOBGUARD_TICK_SECRET" in done.output) == (1, True)
    assert {option.name for option in reconcile.params} >= {"http", "on_tick", "notify_command"}
