"""What `pip install .` takes from pyproject.toml."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from tools.readme_tables import ROOT

if sys.version_info < (3, 11):
    pytest.skip("tomllib came with Python 3.11", allow_module_level=True)
import tomllib


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_nothing_is_given_twice(project: dict[str, Any]) -> None:
    """setuptools refuses to build what is both dynamic and written out."""
    assert set(project["project"]["dynamic"]).isdisjoint(project["project"])
    given = project["tool"]["setuptools"]["dynamic"]
    assert set(project["project"]["dynamic"]) == set(given)


def test_every_requirements_file_is_there_and_for_developers_too(project: dict[str, Any]) -> None:
    given = project["tool"]["setuptools"]["dynamic"]
    files = [name for extra in given["optional-dependencies"].values() for name in extra["file"]]
    files += given["dependencies"]["file"]
    wanted = (ROOT / "requirements-dev.txt").read_text().splitlines()
    stamp = (ROOT / "tests/environment.sh").read_text()
    for name in files:
        assert (ROOT / name).is_file() and f"-r {name}" in wanted and name in stamp, name


def test_every_file_of_the_page_is_in_the_package(project: dict[str, Any]) -> None:
    for package, patterns in project["tool"]["setuptools"]["package-data"].items():
        folder = ROOT / package.replace(".", "/")
        packed = {path for pattern in patterns for path in folder.glob(pattern)}
        assert packed == {path for path in (folder / "web").iterdir() if path.is_file()} and packed
