"""The settings as a Markdown table, for docs/settings.md: ``python -m disagg_proxy.config.markdown en|zh``."""

from __future__ import annotations

import sys

from disagg_proxy.config.table import SETTINGS

_HEADINGS = {
    "en": ("Environment", "Flag", "Default", "Reload", "Meaning"),
    "zh": ("环境变量", "参数", "默认值", "热加载", "含义"),
}
_RELOAD = {"en": "yes", "zh": "是"}


def table(language: str) -> str:
    """All settings, one row each.

    Raises:
        KeyError: a language other than "en" and "zh".
    """
    rows = [_HEADINGS[language], ("---",) * 5]
    for setting in SETTINGS:
        default = f"`{setting.default}`" if setting.default else "–"
        meaning = setting.help if language == "en" else setting.help_zh
        reload = _RELOAD[language] if setting.reload else "–"
        rows.append((f"`{setting.env}`", f"`{setting.flag}`", default, reload, meaning))
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)


if __name__ == "__main__":
    print(table(sys.argv[1] if len(sys.argv) > 1 else "en"))
