"""A real Prometheus as a child process, with the alert rules of deploy/prometheus."""

from __future__ import annotations

import copy
import json
import re
import shutil
import signal
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from jobguard.demo.servers.server import Server

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

ALERTS = Path(__file__).parents[2] / "deploy" / "prometheus" / "alerts.yaml"
FASTER = 60
"""What is minutes in the rules is seconds here."""
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


def binary() -> str | None:
    """Return the path of the program; None if there is none on PATH."""
    return shutil.which("prometheus")


def rules() -> list[dict[str, Any]]:
    """Return the rules as users have them."""
    (group,) = yaml.safe_load(ALERTS.read_text())["groups"]
    return list(group["rules"])


def seconds_of(rule: Mapping[str, Any]) -> float:
    """Return for how long the expression of a rule must hold."""
    parts = re.findall(r"(\d+)(ms|s|m|h)", rule.get("for", "0s"))
    return sum(int(number) * _UNITS[unit] for number, unit in parts)


def faster(given: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the rules with a ``for`` that is FASTER times shorter. The expressions stay as they are."""
    made = [dict(copy.deepcopy(rule)) for rule in given]
    for rule in made:
        rule["for"] = f"{round(1000 * seconds_of(rule) / FASTER)}ms"
    return made


class Prometheus(Server):
    """Scrapes each job's addresses every second, and judges the rules every half second."""

    _name = "prometheus"
    _stop_signal = signal.SIGTERM
    _close_signal = signal.SIGKILL
    _orphan_signal = signal.SIGKILL

    def __init__(
        self,
        program: str,
        targets: Mapping[str, Sequence[str]],
        given: Sequence[Mapping[str, Any]],
    ) -> None:
        """``targets``: the addresses of each job; ``given``: the rules."""
        super().__init__()
        self._program = program
        self._targets = targets
        self._given = given

    def firing(self) -> set[str]:
        """Return the names of the alerts that fire now."""
        alerts = self._ask("/api/v1/alerts")["alerts"]
        return {one["labels"]["alertname"] for one in alerts if one["state"] == "firing"}

    def fired(self, since: float, until: float) -> set[str]:
        """Return the names of the alerts that fired at any time between two times."""
        found = self.series('ALERTS{alertstate="firing"}', since, until)
        return {labels["alertname"] for labels, _ in found}

    def holds(self, expression: str) -> bool:
        """Return True if an expression has a value now."""
        return bool(self._ask("/api/v1/query", query=expression)["result"])

    def series(
        self, expression: str, since: float, until: float
    ) -> list[tuple[dict[str, str], list[float]]]:
        """Return labels and times of each series of an expression, for every half second."""
        values = {"query": expression, "start": since, "end": until, "step": 0.5}
        found = self._ask("/api/v1/query_range", **values)["result"]
        return [(one["metric"], [float(at) for at, _ in one["values"]]) for one in found]

    def _ask(self, path: str, **values: Any) -> Any:
        url = f"http://127.0.0.1:{self.port}{path}?{urllib.parse.urlencode(values)}"
        with urllib.request.urlopen(url, timeout=30) as answer:
            return json.load(answer)["data"]

    def _command(self) -> tuple[list[str], dict[str, Any]]:
        every = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "500ms"}
        jobs = [
            {"job_name": job, "static_configs": [{"targets": list(addresses)}]}
            for job, addresses in self._targets.items()
        ]
        config = {"global": every, "rule_files": ["rules.yaml"], "scrape_configs": jobs}
        group = {"name": "jobguard", "rules": list(self._given)}
        (self._home / "rules.yaml").write_text(yaml.safe_dump({"groups": [group]}))
        (self._home / "prometheus.yaml").write_text(yaml.safe_dump(config))
        return [
            self._program,
            f"--config.file={self._home / 'prometheus.yaml'}",
            f"--storage.tsdb.path={self._home / 'data'}",
            f"--web.listen-address=127.0.0.1:{self.port}",
            "--log.level=warn",
        ], {}

    def _answers(self, pid: int) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/-/ready", timeout=5):
                return True
        except (urllib.error.URLError, OSError):
            return False
