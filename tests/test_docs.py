"""Settings tables, names of files, and the failure moments with their tests. Other names: test_docs_names.py."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from bench.proxy.profile import well_formed
from tools.readme_tables import READMES, ROOT, filled

PAGES = [*READMES.values(), *sorted((ROOT / "docs").glob("*.md")), ROOT / "CHANGELOG.md"]


@pytest.mark.parametrize("language", READMES)
def test_settings_tables_are_those_of_the_code(language: str) -> None:
    assert READMES[language].read_text(encoding="utf-8") == filled(language), "run: python -m tools.readme_tables"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_modules_and_files_named_in_the_pages_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"`((?:disagg_\w+|tests|script|tools)/[\w./-]*)`", text):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("picture", sorted((ROOT / "docs").glob("**/*.svg")), ids=lambda one: one.stem)
def test_every_svg_is_xml(picture: Path) -> None:
    assert ElementTree.parse(picture).getroot().tag == "{http://www.w3.org/2000/svg}svg"


def test_a_flame_graph_with_broken_frame_names_becomes_xml() -> None:
    broken = "<svg xmlns='http://www.w3.org/2000/svg'><title>\0\0 (\x01:7)\tand ω\n</title></svg>"
    [title] = ElementTree.fromstring(well_formed(broken))
    assert title.text == "[unknown] ([unknown]:7)\tand ω\n"


def failure_moments() -> list[tuple[str, str, list[str]]]:
    """The rows of docs/failure-moments.md: section, moment, and the ids of its tests from tests/ on."""
    rows = []
    for section in (ROOT / "docs/failure-moments.md").read_text(encoding="utf-8").split("\n## ")[1:]:
        title, _, text = section.partition("\n")
        named = re.search(r"^Tests: `tests/([\w/]+\.py)`$", text, re.M)
        for line in text.splitlines():
            if named is None or not line.startswith("| ") or line.startswith("| moment "):
                continue
            cells = [cell.strip() for cell in line.strip("|").split(" | ")]
            tests = []
            for test in re.findall(r"`([^`]+)`", cells[-1]):
                file, _, name = test.rpartition("::")
                file = file if "/" in file or not file else f"faults/{file}"
                tests.append(f"{file or named[1]}::{name}")
            rows.append((title, cells[0], tests))
    return rows


def test_every_failure_moment_has_tests_and_they_exist() -> None:
    rows = failure_moments()
    assert len(rows) > 80
    there = {}
    for title, moment, tests in rows:
        assert tests, f"{title}: {moment} names no test"
        for test in tests:
            file, _, name = test.partition("::")
            if file not in there:
                tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
                there[file] = {
                    node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
                }
            assert name.startswith("test_") and name in there[file], test


def test_every_file_of_failure_tests_is_in_the_table() -> None:
    named = {test.partition("::")[0] for _, _, tests in failure_moments() for test in tests}
    assert {f"faults/{path.name}" for path in (ROOT / "tests/faults").glob("test_*.py")} <= named
