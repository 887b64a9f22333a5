"""The commands and options of ``disagg-proxy`` as plain values, for the completions and the man page.

Read from the tables of settings and commands, and from the parser of each subcommand, so that nothing is written down
twice. ``test_single_machine.sh`` is the subcommand ``machine``.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from disagg_machine import cli as machine
from disagg_machine.messages.english import TEXTS
from disagg_proxy.config import values
from disagg_proxy.config.commands import COMMANDS, SERVE
from disagg_proxy.config.load import _parser as proxy_parser
from disagg_proxy.config.table import SETTINGS, Setting

SCRIPT = "test_single_machine.sh"
PROGRAM = "disagg-proxy"
PARTS = ("proxy", "prefill", "decode")


@dataclass(frozen=True, slots=True)
class Option:
    """One option.

    Attributes:
        flags: every spelling.
        metavar: what its value is; empty for an option without one.
        choices: the values that it takes, where they are few.
        file: whether its value is a file or folder.
        setting: the setting that it gives, None for options that are no setting.
    """

    flags: tuple[str, ...]
    help: str
    metavar: str = ""
    choices: tuple[str, ...] = ()
    file: bool = False
    repeated: bool = False
    setting: Setting | None = None


@dataclass(frozen=True, slots=True)
class Command:
    """One command.

    Attributes:
        path: the words that lead to it after the program's name; empty for the program itself.
        arguments: what follows, as a synopsis shows it.
        words: values of its arguments.
        files: whether its arguments are files or folders.
        parts: whether its arguments are names of running parts.
    """

    path: tuple[str, ...]
    help: str
    options: tuple[Option, ...] = ()
    commands: tuple[Command, ...] = ()
    arguments: str = ""
    words: tuple[str, ...] = ()
    files: bool = False
    parts: bool = False

    @property
    def name(self) -> str:
        """Its last word."""
        return self.path[-1] if self.path else PROGRAM

    def all(self) -> list[Command]:
        """This command and all below it."""
        return [self, *(one for command in self.commands for one in command.all())]


def program() -> Command:
    """``disagg-proxy`` with everything below it. Without a command it takes the options of ``serve``."""
    serve = parsed((SERVE,), "the proxy; also when no command is given", proxy_parser())
    below = [serve]
    for name, one in COMMANDS.items():
        main = importlib.import_module(one.module).main
        if main is machine.main:
            below.append(of_machine(one.help))
        elif (parser := parser_of(main)) is not None:
            below.append(parsed((name,), one.help, parser))
        else:
            # Its words are those of `serve`.
            below.append(Command((name,), one.help, serve.options))
    help = "One OpenAI-compatible endpoint in front of vLLM prefill and decode engines"
    return Command((), help, serve.options, tuple(below))


def parser_of(main: Callable[[Sequence[str]], int]) -> argparse.ArgumentParser | None:
    """The parser with which a subcommand reads its words; None when ``--help`` reaches none of its own."""
    found: list[argparse.ArgumentParser] = []

    class Found(Exception):
        pass

    def parse(self: argparse.ArgumentParser, *_: object, **__: object) -> Any:
        found.append(self)
        raise Found

    with (
        mock.patch.object(argparse.ArgumentParser, "parse_args", parse),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.suppress(Found, SystemExit),
    ):
        main(["--help"])
    return found[0] if found else None


_SETTINGS = {setting.flag: setting for setting in SETTINGS}


def parsed(path: tuple[str, ...], help: str, parser: argparse.ArgumentParser) -> Command:
    """The command that a parser describes."""
    options: list[Option] = []
    commands: list[Command] = []
    words: tuple[str, ...] = ()
    files, arguments = False, []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            helps = {one.dest: one.help or "" for one in action._choices_actions}
            commands += [parsed((*path, name), helps[name], one) for name, one in action.choices.items()]
            arguments.append("COMMAND")
        elif action.option_strings:
            options.append(option(action, path == (SERVE,)))
        else:
            arguments.append(str(action.metavar or action.dest).upper())
            words += tuple(map(str, action.choices or ()))
            files = files or action.type is Path
    return Command(path, help, tuple(options), tuple(commands), " ".join(arguments), words, files)


def option(action: argparse.Action, of_serve: bool) -> Option:
    """One option of a parser; the values of a setting are in its table."""
    flags = tuple(action.option_strings)
    setting = _SETTINGS.get(flags[-1]) if of_serve else None
    help = " ".join((setting.help if setting else action.help or "").split()).replace("%%", "%")
    help = help.split(" (default: %(default)s)")[0]
    if action.nargs == 0:
        return Option(flags, help)
    metavar = str(action.metavar or (action.choices and flags[-1].rpartition("-")[2]) or action.dest).upper()
    choices = tuple(map(str, action.choices or ()))
    if setting is not None:
        metavar = str(action.metavar)
        choices = setting.read.options if isinstance(setting.read, values.Choice) else ()
        if setting.read in (values.flag, values.traces):
            choices = ("0", "1")
    file = action.type is Path or metavar in ("FILE", "FOLDER")
    return Option(flags, help, metavar, choices, file, setting is not None and setting.repeated, setting)


def of_machine(help: str) -> Command:
    """``disagg-proxy machine``: a table of its own, whose arguments are texts."""
    below = []
    for one in machine.COMMANDS.values():
        takes = one.arguments
        flags = re.findall(r"(-{1,2}[\w-]+)(?: ([A-Z]+))?", takes)
        words = tuple(re.findall(r"(?<=[\[|])\w+(?=[|\]])", re.sub(r"\[[A-Z]+\]|\[-\w\]", "", takes)))
        words += (*PARTS, "supervisor") if one.name == "logs" else PARTS if "NAME" in takes else ()
        options = tuple(Option((flag,), "", metavar) for flag, metavar in flags)
        below.append(
            Command(("machine", one.name), TEXTS[f"help_{one.name}"], options, (), takes, words, parts="NAME" in takes)
        )
    return Command(("machine",), help, (), tuple(below), "COMMAND")
