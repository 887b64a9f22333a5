"""Write every file that is made from the tables of settings and commands: ``python -m tools.generate``.

The tables in docs/settings.md and its Chinese twin and in docs/connector.md, the completions, and the man page. Tests
compare them.
"""

from __future__ import annotations

from pathlib import Path

from tools import completions, kv_families, man_page, settings_tables
from tools.command_line import program
from tools.settings_tables import ROOT


def generated() -> dict[Path, str]:
    """Each file, and what it must contain."""
    commands = program()
    makers = {**completions.FILES, **man_page.FILES}
    made = {ROOT / path: make(commands) for path, make in makers.items()}
    made[kv_families.PAGE] = kv_families.filled()
    return made | {path: settings_tables.filled(name) for name, path in settings_tables.SETTINGS_PAGES.items()}


if __name__ == "__main__":
    for path, text in generated().items():
        path.write_text(text, encoding="utf-8")
