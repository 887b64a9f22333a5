"""Links lead to a place that is there, and a Chinese page says what its English twin says."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path

import pytest

from tests.test_docs_names import PAGES, names
from tools.settings_tables import ROOT

CHINESE = [page for page in PAGES if page.name.endswith(".zh-CN.md")]
TWINS = pytest.mark.parametrize("twins", [(page.with_name(page.name.replace(".zh-CN", "")), page) for page in CHINESE],
                                ids=[page.name for page in CHINESE])  # fmt: skip
Twins = tuple[Path, Path]


def test_what_a_new_user_reads_is_in_both_languages() -> None:
    assert {page.name.partition(".")[0] for page in CHINESE} == {"README", "api", "settings", "tour", "troubleshooting"}


def both(twins: Twins) -> tuple[str, str]:
    english, chinese = (page.read_text(encoding="utf-8") for page in twins)
    return english, chinese


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)


def anchors(page: Path) -> set[str]:
    """What GitHub makes of the headings: lower case, no punctuation, dashes for blanks."""
    found = set()
    for heading in re.findall(r"^#+ (.+)$", without_code(page.read_text(encoding="utf-8")), re.M):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        kept = (one for one in plain if one in "-_ " or unicodedata.category(one)[0] in "LN")
        found.add("".join(kept).replace(" ", "-"))
    return found


@pytest.mark.parametrize("page", names())
def test_links_lead_to_a_file_and_to_a_heading(page: Path) -> None:
    text = without_code(page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)[^)]*\)", text):
        if re.match(r"https?:|mailto:", target):
            continue
        file, _, anchor = target.partition("#")
        there = (page.parent / file).resolve() if file else page
        assert there.exists(), target
        if anchor and there.suffix == ".md":
            assert anchor in anchors(there), target


def test_every_page_is_reached_from_the_readme() -> None:
    seen: set[Path] = set()
    waiting = [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        if page in seen or page.suffix != ".md":
            continue
        seen.add(page)
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", without_code(page.read_text(encoding="utf-8"))):
            if "://" not in target:
                waiting.append((page.parent / target).resolve())
    assert set(PAGES) - seen == set()


def headings(text: str) -> list[str]:
    return re.findall(r"^(#+) ", without_code(text), re.M)


@TWINS
def test_twins_have_the_same_sections(twins: Twins) -> None:
    english, chinese = map(headings, both(twins))
    assert chinese == english != []


def tables(text: str) -> list[tuple[int, int]]:
    """Rows and columns of each."""
    found = re.findall(r"(?:^\|.*\n)+", without_code(text), re.M)
    return [(table.count("\n"), table.split("\n", 1)[0].count("|")) for table in found]


@TWINS
def test_twins_have_the_same_tables(twins: Twins) -> None:
    english, chinese = map(tables, both(twins))
    assert chinese == english


def commands(text: str) -> list[list[str]]:
    """Code blocks without their comments and without what is drawn."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, re.M | re.S)
    return [
        [re.sub(r"(^|\s+)#.*", "", line).strip() for line in block.splitlines()]
        for kind, block in blocks
        if kind != "mermaid"
    ]


@TWINS
def test_twins_show_the_same_commands(twins: Twins) -> None:
    english, chinese = map(commands, both(twins))
    assert chinese == english


def links(text: str) -> list[str]:
    """Files that are linked to; which of two twins does not count, nor the language of a heading's anchor."""
    found = re.findall(r"\]\(([^)#]+)[^)]*\)", text)
    return sorted({target.replace(".zh-CN", "") for target in found})


@TWINS
def test_twins_link_to_the_same_pages(twins: Twins) -> None:
    english, chinese = map(links, both(twins))
    assert chinese == english


@TWINS
def test_twins_lead_to_pages_of_their_language(twins: Twins) -> None:
    there = {page.name for page in CHINESE} - {twins[1].name}
    found = re.findall(r"\]\((?:[\w./]*/)?([\w.-]+\.md)", twins[1].read_text(encoding="utf-8"))
    assert {name for name in found if name.replace(".md", ".zh-CN.md") in there} == set()


def test_both_readmes_draw_the_same() -> None:
    def arrows(text: str) -> list[str]:
        return re.findall(r"^\s+\w+\s*-{1,2}>>\s*\w+", text, re.M)

    english, chinese = (arrows((ROOT / name).read_text(encoding="utf-8")) for name in ("README.md", "README.zh-CN.md"))
    assert chinese == english != []
