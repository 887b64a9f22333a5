"""Settings tables, names of files, and the failure moments with their tests. Other names: test_docs_names.py."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from bench.proxy.profile import well_formed
from disagg_proxy import errors
from tools.settings_tables import ROOT, SETTINGS_PAGES, filled

PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("language", SETTINGS_PAGES)
def test_settings_tables_are_those_of_the_code(language: str) -> None:
    page = SETTINGS_PAGES[language].read_text(encoding="utf-8")
    assert page == filled(language), "run: make tables"


@pytest.mark.parametrize("readme", ["README.md", "README.zh-CN.md"])
def test_a_readme_is_short_and_begins_with_the_two_commands(readme: str) -> None:
    lines = (ROOT / readme).read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 125
    commands = [line.partition("#")[0].strip() for line in lines if re.match(r"(\./|tests/)", line)]
    assert commands[:2] == ["./test_single_machine.sh all", "tests/run"]


@pytest.mark.parametrize("page", ["api.md", "api.zh-CN.md"])
def test_every_status_and_code_of_an_error_is_in_the_table(page: str) -> None:
    section = re.split(r"^## (?:Errors|错误)$", (ROOT / "docs" / page).read_text(encoding="utf-8"), flags=re.M)[1]
    rows = re.findall(r"^\| (\d[\d、, ]*) \| ([^|]+) \|", section, re.M)
    listed: dict[str, list[str]] = {}
    for statuses, codes in rows:
        for code in re.findall(r"`(\w+)`", codes):
            listed[code] = re.findall(r"\d{3}", statuses)
    kinds = [one for one in vars(errors).values() if isinstance(one, type) and issubclass(one, errors.ProxyError)]
    for kind in kinds:
        assert str(kind.status) in listed.get(str(kind.code), ()), kind
    assert set(listed) == {kind.code for kind in kinds}


def texts_of_the_code() -> list[str]:
    """Every string constant; what is filled in is a NUL."""
    found = []
    sources = [*ROOT.glob("disagg_*/**/*.py"), ROOT / "disagg_prefill_proxy_server.py"]
    for path in sources:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "\0" for part in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub(r"%[sd]|\{[^}]*\}", "\0", node.value))
    return found


NO_TEXTS = {"No available memory for the cache blocks", "CUDA out of memory", '"state": "frozen"'}
"""Quoted, but vLLM's or JSON."""


@pytest.mark.parametrize("page", ["troubleshooting.md", "troubleshooting.zh-CN.md"])
def test_every_message_that_is_explained_is_one_of_the_code(page: str) -> None:
    code = texts_of_the_code()
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    tables = re.findall(r"^\| (?:message|消息) \|.*\n\|[-| ]+\n((?:\|.*\n)+)", text, re.M)
    assert len(tables) == 5
    missing = set()
    for row in "".join(tables).splitlines():
        for quoted in re.findall(r"`([^`]+)`", row.split(" | ")[0]):
            parts = [part.strip() for part in quoted.split("…") if part.strip(" :.()")]
            if quoted not in NO_TEXTS and not any(in_order(parts, one) for one in code):
                missing.add(quoted)
    assert missing == set()


def in_order(parts: list[str], text: str) -> bool:
    at = 0
    for part in parts:
        at = text.find(part, at)
        if at < 0:
            return False
        at += len(part)
    return True


def test_decisions_have_a_date_and_a_status() -> None:
    index = (ROOT / "docs/index.md").read_text(encoding="utf-8")
    rows = [row for row in index.splitlines() if "decisions about" in row]
    pages = [name for row in rows for name in re.findall(r"\]\(([\w-]+\.md)\)", row)]
    assert len(pages) >= 8
    for name in pages:
        lines = (ROOT / "docs" / name).read_text(encoding="utf-8").splitlines()
        day = r"\d{4}-\d\d-\d\d"
        assert re.fullmatch(rf"Date: {day}\. Status: (accepted(, revised {day})?|superseded by \S+)\.", lines[2]), name


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
                } | {alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names}
            assert name.startswith("test_") and name in there[file], test


def test_every_file_of_failure_tests_is_in_the_table() -> None:
    named = {test.partition("::")[0] for _, _, tests in failure_moments() for test in tests}
    assert {f"faults/{path.name}" for path in (ROOT / "tests/faults").glob("test_*.py")} <= named
