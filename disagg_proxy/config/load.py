"""Precedence: a flag wins over the environment, which wins over the default. A bad value names its setting."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from disagg_proxy import __version__, compiled
from disagg_proxy.config.model import Config
from disagg_proxy.config.table import SETTINGS, Setting


class ConfigError(Exception):
    """One line that names the setting and what it must be."""


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
    parser = _Parser(
        prog="disagg_prefill_proxy_server.py",
        description="One OpenAI endpoint in front of vLLM prefill and decode instances.",
        epilog="Each flag can be set by the environment variable in brackets; a flag wins.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--version", action="version", version=f"{__version__}, compiled" if compiled() else __version__
    )
    for setting in SETTINGS:
        default = f", default {setting.default}" if setting.default else ""
        parser.add_argument(
            setting.flag,
            dest=setting.name,
            action="append" if setting.repeated else "store",
            metavar=setting.env.rpartition("_")[2],
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
        shown = "what was given" if setting.secret else repr(raw)
        raise ConfigError(f"{source}: {error}, not {shown}") from None
