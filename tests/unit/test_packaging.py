"""The packages and files of the repository must also be installed."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS: dict[str, Any] = PROJECT["tool"]["setuptools"]
MOVED: dict[str, str] = SETUPTOOLS["package-dir"]
TOPS = {
    "jobguard": ROOT / "jobguard",
    **{package: ROOT / folder for package, folder in MOVED.items() if "/" not in folder},
}


def packages_on_disk() -> dict[str, Path]:
    """Return every folder with Python files, by the name under which it is installed."""
    found = {}
    for top, folder in TOPS.items():
        for where, _, files in os.walk(folder):  # does not follow the links
            if any(file.endswith(".py") for file in files):
                inner = Path(where).relative_to(folder).parts
                found[".".join((top, *inner))] = Path(where)
    return found


def test_every_package_folder_is_listed() -> None:
    """Every folder with Python files is listed, and every listed package exists."""
    assert sorted(SETUPTOOLS["packages"]) == sorted(packages_on_disk())


def test_every_package_folder_has_an_init() -> None:
    """No folder is a namespace package by mistake."""
    bare = [
        name for name, path in packages_on_disk().items() if not (path / "__init__.py").exists()
    ]
    assert bare == []


def test_every_package_is_taken_from_its_real_folder() -> None:
    """A package outside of jobguard/ is mapped to its folder."""
    for name, path in packages_on_disk().items():
        usual = ROOT.joinpath(*name.split("."))
        assert ROOT / MOVED.get(name, usual.relative_to(ROOT)) == path, name


def test_every_data_file_is_shipped() -> None:
    """SQL files, Lua files and py.typed match a pattern of their package."""
    shipped = {
        file
        for package, patterns in SETUPTOOLS["package-data"].items()
        for pattern in patterns
        for file in packages_on_disk()[package].glob(pattern)
    }
    present = {
        Path(where) / file
        for folder in TOPS.values()
        for where, _, files in os.walk(folder)
        for file in files
        if file.endswith((".sql", ".lua")) or file == "py.typed"
    }
    assert sorted(present - shipped) == []
    assert ROOT / "jobguard" / "py.typed" in present


@pytest.mark.parametrize("name", [name for name in TOPS if name != "jobguard"])
def test_links_show_the_installed_shape(name: str) -> None:
    """Links let type checkers find the mapped folders under their installed names."""
    link = ROOT.joinpath(*name.split("."))
    if link.is_file() and not link.is_symlink():
        pytest.skip("this checkout was made without symbolic links")
    assert link.is_symlink()
    assert link.resolve() == TOPS[name]


def test_every_adapter_entry_point_has_its_package() -> None:
    """The package of every adapter entry point is installed."""
    for target in PROJECT["project"]["entry-points"]["jobguard.adapters"].values():
        module = target.partition(":")[0]
        assert module in SETUPTOOLS["packages"], target


def test_an_old_redis_client_may_stay() -> None:
    """The dashboard of Dramatiq requires redis before 5; redis 4.5 has everything that jobguard uses."""
    (bound,) = [one for one in PROJECT["project"]["dependencies"] if one.startswith("redis")]
    assert bound == "redis>=4.5"
