"""The menu's entries and texts. The menu itself is test_single_machine.sh's: it runs each entry as a command."""

from __future__ import annotations

import os
from collections.abc import Sequence

from disagg_machine import signals, ui
from disagg_machine.context import SCRIPT, Context
from disagg_machine.messages import text

ENTRIES = (
    "proxy", "prefill", "decode", "all", "test", "config", "status", "logs", "stop", "restart", "doctor", "bench",
    "env", "page", "top", "power", "help",
)  # fmt: skip
"""The commands behind the numbers 1 to 17; 0 quits."""


def cmd_menu(context: Context, words: Sequence[str]) -> int:
    """The menu, where the script is; else what there is to type."""
    script = context.root / SCRIPT
    if script.is_file():
        signals.restore_sigpipe()
        os.execvp("bash", ["bash", str(script), "menu"])
    from disagg_machine import cli

    return cli.usage()


def cmd_menu_texts(context: Context, words: Sequence[str]) -> int:
    """For the script: title, prompts and formats of printf, one a line, then ``NUMBER COMMAND TEXT`` for each entry."""
    ui.out(text("menu_title"))
    ui.out(text("menu_prompt"))
    ui.out(text("menu_which"))
    ui.out(text("menu_bench_how"))
    ui.out(text("menu_unknown", "%s"))
    ui.out(text("menu_ended", "%s", "%s"))
    for number, name in (*enumerate(ENTRIES, 1), (0, "quit")):
        ui.out(f"{number} {name} {text('menu_' + name)}")
    return 0
