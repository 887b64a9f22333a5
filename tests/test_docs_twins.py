"""Links lead to a place that is there, and the Chinese README says what the English one says."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path

import pytest

from tests.test_docs_names import PAGES, names
from tools.readme_tables import READMES

ENGLISH, CHINESE = (READMES[language].read_text(encoding="utf-8") for language in ("en", "zh"))


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
    waiting = [READMES["en"]]
    while waiting:
        page = waiting.pop()
        if page in seen or page.suffix != ".md":
            continue
        seen.add(page)
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", without_code(page.read_text(encoding="utf-8"))):
            if "://" not in target:
                waiting.append((page.parent / target).resolve())
    assert {page for page in PAGES if page.name != "CHANGELOG.md"} - seen == set()


def headings(text: str) -> list[str]:
    return re.findall(r"^(#+) ", without_code(text), re.M)


def test_both_readmes_have_the_same_sections() -> None:
    assert headings(CHINESE) == headings(ENGLISH)


def tables(text: str) -> list[tuple[int, int]]:
    """Rows and columns of each."""
    found = re.findall(r"(?:^\|.*\n)+", without_code(text), re.M)
    return [(table.count("\n"), table.split("\n", 1)[0].count("|")) for table in found]


def test_both_readmes_have_the_same_tables() -> None:
    assert tables(CHINESE) == tables(ENGLISH)


def commands(text: str) -> list[list[str]]:
    """Code blocks without their comments and without what is drawn."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, re.M | re.S)
    return [
        [re.sub(r"(^|\s+)#.*", "", line).strip() for line in block.splitlines()]
        for kind, block in blocks
        if kind != "mermaid"
    ]


def test_both_readmes_show_the_same_commands() -> None:
    assert commands(CHINESE) == commands(ENGLISH)


def test_both_readmes_link_to_the_same_pages() -> None:
    def links(text: str) -> list[str]:
        return sorted(set(re.findall(r"\]\((?!README)([^)]+)\)", text)))

    assert links(CHINESE) == links(ENGLISH)


def test_both_readmes_draw_the_same() -> None:
    def arrows(text: str) -> list[str]:
        return re.findall(r"^\s+\w+\s*-{1,2}>>\s*\w+", text, re.M)

    assert arrows(CHINESE) == arrows(ENGLISH) != []
