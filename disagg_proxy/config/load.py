"""Loads the settings: a flag takes precedence over the environment, which takes precedence over the default."""

from __future__ import annotations

import argparse
import platform
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from disagg_proxy import __version__, compiled
from disagg_proxy.config import values
from disagg_proxy.config.commands import COMMANDS, SERVE
from disagg_proxy.config.model import Config
from disagg_proxy.config.table import SETTINGS, Setting

_METAVARS: dict[values.Reader, str] = {
    values.access_log: "FILE",
    values.addresses: "HOST:PORT,...",
    values.count: "N",
    values.factor: "FACTOR",
    values.flag: "0|1",
    values.header_name: "HEADER",
    values.host: "HOST",
    values.instances: "URL[,KV_ADDRESS]",
    values.key: "KEY",
    values.limit: "N",
    values.origins: "ORIGIN,...",
    values.port: "PORT",
    values.registrants: "ADDRESS,...",
    values.seconds: "SECONDS",
    values.size: "BYTES",
    values.size_or_none: "BYTES",
    values.traces: "0|1",
    values.workers: "N",
}
"""Metavariables of ``--help``. For other readers the last word of the variable's name is used (LOG_LEVEL: LEVEL)."""


class ConfigError(Exception):
    """A setting has a bad value; one line with its name and what it must be."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see --help)")


def load(argv: Sequence[str], environ: Mapping[str, str]) -> Config:
    """Read all settings.

    Raises:
        ConfigError: for the first setting that has a bad value, or an unknown flag; for keys that must differ.
        SystemExit: after ``--help`` and ``--version``, with code 0.
    """
    given = vars(_parser().parse_args(argv))
    config = Config(**{setting.name: _value(setting, given[setting.name], environ) for setting in SETTINGS})
    if config.admin_key and config.admin_key == config.api_key:
        raise ConfigError("ADMIN_KEY: must differ from API_KEY, which every client has")
    return config


def _parser() -> argparse.ArgumentParser:
    commands = {SERVE: "the proxy; also when no command is given", **{name: one.help for name, one in COMMANDS.items()}}
    parser = _Parser(
        prog="disagg-proxy",
        usage=f"%(prog)s [{SERVE}] [OPTION...]\n       %(prog)s {{{','.join(COMMANDS)}}} [OPTION...]",
        description="One OpenAI-compatible endpoint in front of vLLM prefill and decode engines.\n\ncommands:\n"
        + "\n".join(f"  {name:<8}{text}" for name, text in commands.items())
        + "\n\n%(prog)s COMMAND --help lists the options of a command; the options below are those of the proxy.",
        epilog="Each option can be set by the environment variable in brackets; the option wins.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    how = "compiled" if compiled() else "interpreted"
    parser.add_argument(
        "--version", action="version", version=f"%(prog)s {__version__} ({how}, Python {platform.python_version()})"
    )
    for setting in SETTINGS:
        default = f", default {setting.default}" if setting.default else ""
        parser.add_argument(
            setting.flag,
            dest=setting.name,
            action="append" if setting.repeated else "store",
            metavar=_METAVARS.get(setting.read, setting.env.rpartition("_")[2]),
            help=f"{setting.help} [{setting.env}{default}]".replace("%", "%%"),
        )
    return parser


def _value(setting: Setting, flag: str | list[str] | None, environ: Mapping[str, str]) -> Any:
    if flag is not None:
        raw, source = " ".join(flag) if isinstance(flag, list) else flag, setting.flag
    elif environ.get(setting.env):
        raw, source = environ[setting.env], setting.env
    else:
        raw, source = setting.default, setting.env
    try:
        return setting.read(raw)
    except ValueError as error:
        shown = "the given value" if setting.secret else repr(raw)
        raise ConfigError(f"{source}: {error}, not {shown}") from None
