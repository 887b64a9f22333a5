"""Write the settings tables into docs/settings.md and its Chinese twin: ``python -m tools.settings_tables``.

A test compares the pages with :func:`filled`.
"""

from __future__ import annotations

import re
from pathlib import Path

from disagg_machine.cli import markdown as machine_table
from disagg_proxy.config.markdown import table

ROOT = Path(__file__).parents[1]
SETTINGS_PAGES = {"en": ROOT / "docs/settings.md", "zh": ROOT / "docs/settings.zh-CN.md"}


def filled(language: str) -> str:
    """The page of ``language`` with both tables as they should be.

    Raises:
        ValueError: the page does not have exactly one place for each table.
    """
    text = SETTINGS_PAGES[language].read_text(encoding="utf-8")
    for name, content in (("proxy", table(language)), ("script", machine_table(language))):
        block = f"<!-- {name} settings -->\n{content}\n<!-- end -->"
        text, found = re.subn(rf"<!-- {name} settings -->\n.*?<!-- end -->", lambda _, b=block: b, text, flags=re.S)
        if found != 1:
            raise ValueError(f"{SETTINGS_PAGES[language].name} must have one '{name} settings' block, it has {found}")
    return text


if __name__ == "__main__":
    for language, path in SETTINGS_PAGES.items():
        path.write_text(filled(language), encoding="utf-8")
