"""Loads the settings; the order of precedence is flag, environment, configuration file, default."""

from __future__ import annotations

import argparse
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from disagg_kv.secret import read_secret
from disagg_proxy import __version__, compiled
from disagg_proxy.config import values
from disagg_proxy.config.commands import COMMANDS, SERVE
from disagg_proxy.config.file import CONFIG_FILE, FileError, read_file
from disagg_proxy.config.keys_file import KeysFileError, keys_of
from disagg_proxy.config.model import PROVEN, Config
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
    values.milliseconds: "MS",
    values.origins: "ORIGIN,...",
    values.path: "FILE",
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


@dataclass(frozen=True, slots=True)
class Loaded:
    """The settings, and where each comes from.

    Attributes:
        file: the settings in the configuration file as text, by the names of their environment variables.
        texts: the text of each setting, by its field of :class:`Config`.
        sources: the flag, ``the environment`` or the path of the file; no entry for a default.
    """

    config: Config
    file: Mapping[str, str]
    texts: Mapping[str, str]
    sources: Mapping[str, str]


ENVIRONMENT = "the environment"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see --help)")


def load(argv: Sequence[str], environ: Mapping[str, str]) -> Config:
    """Read all settings, with the configuration file that they name. Raises as :func:`load_all` does."""
    return load_all(argv, environ).config


def load_all(argv: Sequence[str], environ: Mapping[str, str], file: Mapping[str, str] | None = None) -> Loaded:
    """Read all settings.

    Args:
        file: the content of the configuration file, see :attr:`Loaded.file`; None reads the file that is named.

    Raises:
        ConfigError: for the first setting that has a bad value, or an unknown flag; for a configuration file that
            cannot be used; for keys that must differ.
        SystemExit: after ``--help`` and ``--version``, with code 0.
    """
    given = vars(_parser().parse_args(argv))
    path = _given_path(given, environ)
    if file is None:
        try:
            file = read_file(path) if path else {}
        except FileError as error:
            raise ConfigError(str(error)) from None
    found: dict[str, Any] = {}
    texts: dict[str, str] = {}
    sources: dict[str, str] = {}
    for setting in SETTINGS:
        raw, source, value = setting.default, "", None
        if setting.env in file:
            # Read also where something else wins, so that a bad value is not found only when that is gone.
            raw, source = file[setting.env], path
            value = _value(setting, raw, f"{path}: {setting.env}")
        flag = given[setting.name]
        if flag is not None:
            raw, source = " ".join(flag) if isinstance(flag, list) else flag, setting.flag
            value = _value(setting, raw, setting.flag)
        elif environ.get(setting.env):
            raw, source = environ[setting.env], ENVIRONMENT
            value = _value(setting, raw, setting.env)
        found[setting.name] = value if source else _value(setting, raw, setting.env)
        texts[setting.name] = raw
        if source:
            sources[setting.name] = source
    config = _with_secret(Config(**found))
    _check(config)
    return Loaded(config, file, texts, sources)


def _given_path(given: Mapping[str, Any], environ: Mapping[str, str]) -> str:
    """The path of the configuration file; empty for none."""
    if given["config_file"] == "":
        raise ConfigError("--config: must be the path of a TOML file, not ''")
    return values.path(given["config_file"] or environ.get(CONFIG_FILE) or "")


def _with_secret(config: Config) -> Config:
    """Read the secret from its file, if there is one.

    Raises:
        ConfigError: it cannot be read, or the secret is set too.
    """
    if not config.kv_secret_file:
        return config
    if config.kv_secret:
        raise ConfigError("DISAGG_KV_SECRET_FILE: set either this or DISAGG_KV_SECRET")
    try:
        return replace(config, kv_secret=read_secret(config.kv_secret_file))
    except ValueError as error:
        raise ConfigError(f"DISAGG_KV_SECRET_FILE: {error}") from None


def _check(config: Config) -> None:
    """Check what concerns more than one setting.

    Raises:
        ConfigError: keys that must differ do not, or ALLOW_REGISTER needs a secret.
    """
    if config.admin_key and config.admin_key == config.api_key:
        raise ConfigError("ADMIN_KEY: must differ from API_KEY, which every client has")
    if PROVEN in config.allow_register and not config.kv_secret:
        raise ConfigError("ALLOW_REGISTER: proven needs a secret that the engines share (DISAGG_KV_SECRET)")


def check_keys_file(config: Config) -> None:
    """Read API_KEYS_FILE, so that a bad one is found before anything starts; a running proxy reads it on its own.

    Raises:
        ConfigError: it cannot be used.
    """
    try:
        keys_of(config)
    except KeysFileError as error:
        raise ConfigError(f"API_KEYS_FILE: {error}") from None


def _parser() -> argparse.ArgumentParser:
    commands = {SERVE: "the proxy; also when no command is given", **{name: one.help for name, one in COMMANDS.items()}}
    parser = _Parser(
        prog="disagg-proxy",
        usage=f"%(prog)s [{SERVE}] [OPTION...]\n       %(prog)s {{{','.join(COMMANDS)}}} [OPTION...]",
        description="One OpenAI-compatible endpoint in front of vLLM prefill and decode engines.\n\ncommands:\n"
        + "\n".join(f"  {name:<10}{text}" for name, text in commands.items())
        + "\n\n%(prog)s COMMAND --help lists the options of a command; the options below are those of the proxy.",
        epilog="Each option can be set by the environment variable in brackets, or under that name in the TOML file "
        "of --config.\nThe option wins over the environment, which wins over the file. SIGHUP reads the file again: "
        "docs/config-file.md.",
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


def _value(setting: Setting, raw: str, shown: str) -> Any:
    """The value of a setting.

    Args:
        shown: where it was given, for the error.

    Raises:
        ConfigError: the value is bad.
    """
    try:
        return setting.read(raw)
    except ValueError as error:
        value = "the given value" if setting.secret else repr(raw)
        raise ConfigError(f"{shown}: {error}, not {value}") from None
