"""What `pip install .` takes from pyproject.toml."""

from __future__ import annotations

import re
import sys
from typing import Any

import pytest

import disagg_kv
import disagg_proxy
from tools import completions, man_page
from tools.settings_tables import ROOT

if sys.version_info < (3, 11):
    pytest.skip("tomllib came with Python 3.11", allow_module_level=True)
import tomllib

CONSTRAINTS = (ROOT / "constraints-dev.txt").read_text()


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
    # 75 packages that two folders of tests need: they have an environment of their own (tests/cluster_ray).
    files.remove("requirements-ray.txt")
    wanted = (ROOT / "requirements-dev.txt").read_text().splitlines()
    stamp = (ROOT / "tests/environment.sh").read_text()
    for name in files:
        assert (ROOT / name).is_file() and f"-r {name}" in wanted and name in stamp, name


def test_every_development_tool_is_pinned_and_nothing_else() -> None:
    """The proxy's own packages stay open, so that the tests meet what a new installation gets."""
    wanted = [line for line in (ROOT / "requirements-dev.txt").read_text().splitlines() if not line.startswith("-r")]
    pinned = re.findall(r"^([\w-]+)==[\w.]+(?:; python_version [<>=]+ \"[\d.]+\")?$", CONSTRAINTS, re.M)
    assert set(pinned) == {re.split(r"[\[<>=]", line)[0] for line in wanted}
    assert len(pinned) == sum(bool(line) and not line.startswith("#") for line in CONSTRAINTS.splitlines())
    assert "-c constraints-dev.txt -r requirements-dev.txt" in (ROOT / "tests/environment.sh").read_text()


def test_every_file_of_the_page_is_in_the_package(project: dict[str, Any]) -> None:
    folder = ROOT / "disagg_proxy/page"
    patterns = project["tool"]["setuptools"]["package-data"]["disagg_proxy.page"]
    packed = {path for pattern in patterns for path in folder.glob(pattern)}
    assert packed == {path for path in (folder / "web").iterdir() if path.is_file()} and packed


def test_completions_and_the_man_page_go_where_shells_and_man_look(project: dict[str, Any]) -> None:
    given = project["tool"]["setuptools"]["data-files"]
    assert {name for names in given.values() for name in names} == {*completions.FILES, *man_page.FILES}
    assert all(folder.startswith("share/") for folder in given)


def test_every_package_is_marked_as_typed(project: dict[str, Any]) -> None:
    assert project["tool"]["setuptools"]["package-data"]["*"] == ["py.typed"]
    assert "Typing :: Typed" in project["project"]["classifiers"]
    packages = project["tool"]["mypy"]["packages"]
    assert [package for package in packages if not (ROOT / package / "py.typed").is_file()] == []
    assert {f"{package}*" for package in packages} == set(project["tool"]["setuptools"]["packages"]["find"]["include"])


def test_the_version_is_released_in_the_changelog_and_is_the_connectors() -> None:
    released = re.findall(r"^## \[([\d.]+)\] - \d{4}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.M)
    assert released[0] == disagg_proxy.__version__ == disagg_kv.__version__


def test_the_licence_is_in_the_package(project: dict[str, Any]) -> None:
    assert project["project"]["license"] == "Apache-2.0" and project["project"]["license-files"] == ["LICENSE"]
    text = (ROOT / "LICENSE").read_text()
    assert "Version 2.0, January 2004" in text and "END OF TERMS AND CONDITIONS" in text
