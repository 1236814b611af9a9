"""The files in deploy/, the image and the compose file agree with each other and with the code."""

from __future__ import annotations

import configparser
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from jobguard.cli import main
from jobguard.serving.http import Endpoints

ROOT = Path(__file__).parents[2]
KUBERNETES = ROOT / "deploy" / "kubernetes"
SYSTEMD = ROOT / "deploy" / "systemd"
KUSTOMIZATION: dict[str, Any] = yaml.safe_load((KUBERNETES / "kustomization.yaml").read_text())
RESOURCES: list[dict[str, Any]] = [
    resource
    for file in KUSTOMIZATION["resources"]
    for resource in yaml.safe_load_all((KUBERNETES / file).read_text())
]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
DOCKERFILE = (ROOT / "Dockerfile").read_text()


def of_kind(kind: str) -> dict[str, dict[str, Any]]:
    """Return the resources of one kind by name."""
    return {one["metadata"]["name"]: one for one in RESOURCES if one["kind"] == kind}


def pods() -> dict[str, dict[str, Any]]:
    """Return the templates of pods by the name of what makes them."""
    return {
        one["metadata"]["name"]: one["spec"]["template"]
        for one in RESOURCES
        if one["kind"] in ("Deployment", "Job")
    }


def parse(words: list[str]) -> None:
    """Parse the words of a command as the program does, without running it."""
    assert words[0].endswith("jobguard"), words
    command: click.Command = main
    context = click.Context(main, info_name="jobguard")
    rest = words[1:]
    while isinstance(command, click.Group):
        found = command.get_command(context, rest[0])
        assert found is not None, rest
        command, rest = found, rest[1:]
    command.make_context("jobguard", list(rest), parent=context)


def commands() -> list[list[str]]:
    """Return every command line that the files run."""
    found = [list(pod["spec"]["containers"][0]["command"]) for pod in pods().values()]
    services = COMPOSE["services"].values()
    found += [one["command"] for one in services if one.get("command", [""])[0] == "jobguard"]
    for unit in SYSTEMD.glob("*.service"):
        found += [
            shlex.split(line) for line in re.findall(r"^ExecStart=(.*)$", unit.read_text(), re.M)
        ]
    image = re.search(r"^CMD (\[.*\])$", DOCKERFILE, re.M)
    assert image is not None
    found.append(yaml.safe_load(image[1]))
    return found


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_command_line_parses(words: list[str]) -> None:
    """A renamed command or option fails here."""
    parse(words)


def test_there_is_what_a_deployment_needs() -> None:
    """Two reconcilers with a budget, a migration, a service, a monitor and a dashboard."""
    assert of_kind("Deployment").keys() == {"jobguard-reconciler", "jobguard-dashboard"}
    assert of_kind("Deployment")["jobguard-reconciler"]["spec"]["replicas"] == 2
    assert of_kind("PodDisruptionBudget")["jobguard-reconciler"]["spec"]["minAvailable"] == 1
    assert of_kind("Job") and of_kind("ServiceMonitor")
    assert sorted(KUSTOMIZATION["resources"]) == sorted(
        file.name for file in KUBERNETES.glob("*.yaml") if file.stem != "kustomization"
    )


def test_every_selector_finds_its_pods() -> None:
    """Deployments, services, budgets and monitors select labels that exist."""
    labels = [pod["metadata"]["labels"] for pod in pods().values()]
    for one in RESOURCES:
        if one["kind"] in ("Deployment", "PodDisruptionBudget"):
            wanted = one["spec"]["selector"]["matchLabels"]
            assert [has for has in labels if wanted.items() <= has.items()] == [wanted]
            pod = one["spec"].get("template", {"spec": {}})
            for spread in pod["spec"].get("topologySpreadConstraints", ()):
                assert spread["labelSelector"]["matchLabels"] == wanted
        if one["kind"] == "Service":
            wanted = one["spec"]["selector"]
            (pod,) = [
                p for p in pods().values() if wanted.items() <= p["metadata"]["labels"].items()
            ]
            ports = {port["name"] for port in pod["spec"]["containers"][0]["ports"]}
            assert {port["targetPort"] for port in one["spec"]["ports"]} <= ports
    (monitor,) = of_kind("ServiceMonitor").values()
    wanted = monitor["spec"]["selector"]["matchLabels"]
    services = [
        s
        for s in of_kind("Service").values()
        if wanted.items() <= s["metadata"].get("labels", {}).items()
    ]
    assert [s["metadata"]["name"] for s in services] == ["jobguard-reconciler"]
    (endpoint,) = monitor["spec"]["endpoints"]
    assert endpoint["port"] in {port["name"] for port in services[0]["spec"]["ports"]}


def test_every_probe_asks_a_path_that_is_served() -> None:
    """Paths of probes, monitor and image are answered; ports are those of the command."""
    served = Endpoints(live=lambda: None, ready=lambda: None, metrics=lambda: ("", b""))
    (container,) = pods()["jobguard-reconciler"]["spec"]["containers"]
    paths = [
        container[name]["httpGet"]["path"]
        for name in ("livenessProbe", "readinessProbe", "startupProbe")
    ]
    paths += [
        one["path"] for one in next(iter(of_kind("ServiceMonitor").values()))["spec"]["endpoints"]
    ]
    paths += re.findall(r"127\.0\.0\.1:9912(/\w+)", DOCKERFILE)
    assert len(paths) == 5
    for path in paths:
        assert served.get(path)[0] == 200, path
    for pod in pods().values():
        (container,) = pod["spec"]["containers"]
        for port in container.get("ports", ()):
            assert str(port["containerPort"]) in " ".join(container["command"])


def test_no_container_has_more_rights_than_it_needs() -> None:
    """No container runs as root, may become it, or writes its own file system."""
    for pod in pods().values():
        spec = pod["spec"]
        assert spec["securityContext"]["runAsNonRoot"]
        assert spec["securityContext"]["runAsUser"] == 1000  # the user of the image
        assert spec["automountServiceAccountToken"] is False
        for container in spec["containers"]:
            security = container["securityContext"]
            assert security["readOnlyRootFilesystem"] and not security["allowPrivilegeEscalation"]
            assert container["resources"]["limits"]["memory"]
    assert re.search(r"^USER jobguard$", DOCKERFILE, re.M)
    assert "--uid 1000" in DOCKERFILE


def test_the_secret_has_the_keys_that_are_used() -> None:
    """The command in the comment creates each key that a container reads; no file has a value."""
    created = set(
        re.findall(r"--from-literal=([\w-]+)=", (KUBERNETES / "kustomization.yaml").read_text())
    )
    used = set()
    for pod in pods().values():
        for variable in pod["spec"]["containers"][0]["env"]:
            assert "value" not in variable
            reference = variable["valueFrom"]["secretKeyRef"]
            assert reference["name"] == "jobguard"
            used.add(reference["key"])
    assert used == created


def test_the_units_of_systemd() -> None:
    """Each unit parses, runs without rights of root, and the timer has its service."""
    for file in SYSTEMD.glob("*.service"):
        unit = configparser.ConfigParser(strict=False, interpolation=None)
        unit.optionxform = str  # type: ignore[assignment,method-assign]
        unit.read(file)
        assert unit["Service"]["DynamicUser"] == "yes"
        assert unit["Service"]["EnvironmentFile"] == "/etc/jobguard/env"
    assert {file.stem for file in SYSTEMD.glob("*.timer")} <= {
        f.stem for f in SYSTEMD.glob("*.service")
    }
    analyze = shutil.which("systemd-analyze")
    if analyze is not None:
        done = subprocess.run(
            [analyze, "verify", "--man=no", *map(str, SYSTEMD.glob("*.timer"))],
            capture_output=True,
            text=True,
        )
        assert "Unknown" not in done.stderr, done.stderr
