"""The documents agree with the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from disagg_proxy.config import Config
from disagg_proxy.http import create_app
from disagg_proxy.services import Services
from tests.conftest import LOCAL
from tools.readme_tables import READMES, ROOT, filled

PAGES = [*READMES.values(), *sorted((ROOT / "docs").glob("*.md")), ROOT / "CHANGELOG.md"]


@pytest.mark.parametrize("language", READMES)
def test_settings_tables_are_those_of_the_code(language: str) -> None:
    assert READMES[language].read_text(encoding="utf-8") == filled(language), "run: python -m tools.readme_tables"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_modules_and_files_named_in_the_pages_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"`((?:disagg_proxy|tests|script|tools)/[\w./-]*)`", text):
        assert (ROOT / name).exists(), name


async def test_every_route_in_the_readme_exists() -> None:
    services = Services(Config(**LOCAL, admin_key="k"))
    try:
        app = create_app(services.config, services)
        rules = {re.sub(r"<[^>]+>", "NAME", rule.rule) for rule in app.url_map.iter_rules()}
    finally:
        services.discovery.listener.stop()
    for page in READMES.values():
        section = re.search(r"\n## (?:What it serves|提供的接口)\n(.*?)\n## ", page.read_text(encoding="utf-8"), re.S)
        assert section is not None
        table = "\n".join(line.split("|")[1] for line in section[1].splitlines() if line.startswith("| `"))
        for path in re.findall(r"(?<=[` ])(/[\w/]+)", table):
            assert path in rules, path
