"""The commands: their table, the help made from it, and the way in.

Data goes to stdout, messages to stderr. Exit codes: 0 all went well; 1 something failed; 2 wrong usage or a bad
setting; 3 nothing is running (status, stop NAME, test, bench, logs); 130 interrupted; 143 terminated.
"""

from __future__ import annotations

import importlib
import io
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from disagg_machine import signals, ui
from disagg_machine.messages import MachineError, language, text
from disagg_machine.table import SETTINGS, WORKED_OUT


@dataclass(frozen=True, slots=True)
class Command:
    """One command.

    Attributes:
        arguments: as `help` shows them.
        module: has ``cmd_NAME(context, words)``, which returns the exit code; imported when the command is called.
    """

    name: str
    arguments: str
    module: str


COMMANDS: dict[str, Command] = {
    command.name: command
    for command in (
        Command("menu", "", "menu"),
        Command("proxy", "", "foreground"),
        Command("prefill", "[N]", "foreground"),
        Command("decode", "[N]", "foreground"),
        Command("all", "[--supervise|--no-supervise] [--foreground]", "up"),
        Command("test", "", "service"),
        Command("status", "", "look"),
        Command("logs", "[NAME...] [-f] [-n LINES]", "look"),
        Command("stop", "[NAME...]", "down"),
        Command("restart", "NAME...", "restart"),
        Command("config", "[--markdown [en|zh]]", "show"),
        Command("doctor", "", "doctor"),
        Command("bench", "[--ratio] [--clocks] [--against-plain] [--traditional] [--once]", "bench"),
        Command("env", "", "show"),
        Command("page", "", "service"),
        Command("top", "[--once]", "service"),
        Command("power", "[COMMAND]", "power"),
        Command("help", "", "cli"),
    )
}

HIDDEN = {
    "__supervise": Command("supervise", "", "supervise"),
    "__compile": Command("compile", "", "compiled.build"),
    "__menu": Command("menu_texts", "", "menu"),
}
"""Commands that other commands start."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the words after the program's name, with ``--script=NAME`` before them when the user calls it otherwise;
            None for those of this process.

    Returns:
        The exit code.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    script = "disagg-proxy machine"
    if words and words[0].startswith("--script="):
        script = words.pop(0).partition("=")[2]
    ui.Program.name = os.path.basename(script)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # The texts are UTF-8 whatever the locale is; the arguments may hold any bytes.
            stream.reconfigure(encoding="utf-8", errors="surrogateescape")
    try:
        return _run(script, words)
    except MachineError as error:
        ui.complain(error.key, *error.arguments)
        return error.code
    except signals.Interrupted as error:
        ui.progress_clear()
        return error.code
    except KeyboardInterrupt:
        ui.progress_clear()
        return 130
    except BrokenPipeError:
        # The reader of the output has closed the pipe; there is nothing to flush.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _run(script: str, words: list[str]) -> int:
    if not os.path.exists("/proc/self/stat"):
        raise MachineError(1, "no_proc")
    if not words:
        if not ui.is_terminal(sys.stdin):
            return usage()
        words = ["menu"]
    name, words = {"-h": "help", "--help": "help"}.get(words[0], words[0]), words[1:]
    command = COMMANDS.get(name) or HIDDEN.get(name)
    if command is None:
        ui.complain("unknown_command", name)
        return usage()
    if name == "help":
        return show_help()
    if name == "config" and words and words[0] == "--markdown":
        return show_markdown(words[1] if len(words) > 1 else language())
    from disagg_machine import context

    function = getattr(importlib.import_module(f"disagg_machine.{command.module}"), f"cmd_{command.name}")
    return int(function(context.load(script), words))


def usage() -> int:
    """One line, and the exit code of wrong usage."""
    ui.emit(text("usage", ui.Program.name))
    return 2


def show_help() -> int:
    """Every command and setting."""
    from disagg_machine.context import checkout

    ui.out(text("usage", ui.Program.name))
    ui.out(f"\n{text('help_commands')}")
    for command in COMMANDS.values():
        ui.out(f"  {command.name + ' ' + command.arguments:<38} {text('help_' + command.name)}")
    ui.out(f"\n{text('help_settings')}")
    for setting in SETTINGS:
        default = "" if setting.default in ("", WORKED_OUT) else f"={setting.default}"
        ui.out(f"  {setting.env}{default}\n      {setting.meaning(language())}")
    ui.out(f"\n{text('help_exit_codes')}")
    folder = checkout() / "completions"
    # Where pip puts them (pyproject.toml).
    ui.out(text("help_completion", folder if folder.is_dir() else f"{sys.prefix}/share"))
    return 0


def markdown(tongue: str) -> str:
    """The table of settings for docs/settings.md, in ``en`` or ``zh``."""
    head = "| 设置 | 默认值 | 含义 |" if tongue == "zh" else "| Setting | Default | Meaning |"
    lines = [head, "|---|---|---|"]
    for setting in SETTINGS:
        default = "" if setting.default in ("", WORKED_OUT) else f"`{setting.default}`"
        lines.append(f"| `{setting.env}` | {default} | {setting.meaning(tongue)} |")
    return "\n".join(lines)


def show_markdown(tongue: str) -> int:
    """:func:`markdown` on stdout."""
    if tongue not in ("en", "zh"):
        raise MachineError(2, "unknown_argument", "config --markdown", tongue)
    ui.out(markdown(tongue))
    return 0
