"""Reads the configuration file of ``--config``: TOML, with the names of the environment variables as keys.

TOML because its values have types (no ``no`` that becomes false, no ``22:30`` that becomes a number), its syntax errors
name a line, and Python reads it without a package from 3.11 on. Settings are flat, so YAML would add nothing.

Every value becomes the text that the environment variable would hold, so each setting has one reader only.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping

from disagg_proxy.config import values
from disagg_proxy.config.table import SETTINGS, Setting
from disagg_proxy.config.toml_file import read_toml

MAX_BYTES = 32 * 1024
"""Size of a file at most. With several workers its values travel in one message and in one environment variable."""

CONFIG_FILE = "CONFIG_FILE"
"""The setting that names the file, and so the only one that cannot be in it."""

_NUMBERS = (
    values.count, values.factor, values.limit, values.milliseconds, values.port, values.seconds,
    values.size, values.size_or_none, values.workers,
)  # fmt: skip
_SWITCHES = (values.flag, values.traces)
_SEPARATORS = {values.addresses: ",", values.instances: " ", values.origins: ",", values.registrants: ","}
"""Readers of lists, and what separates their items in a text."""

_BY_ENV = {setting.env: setting for setting in SETTINGS if setting.env != CONFIG_FILE}


class FileError(ValueError):
    """The file cannot be used: one line with its path, the key, and what to change."""


def read_file(path: str) -> dict[str, str]:
    """The settings in the file at ``path``, each as the text that its environment variable would hold.

    Raises:
        FileError: it cannot be read, is not TOML, or has an unknown name or a value of a wrong type. Values that only
            their reader knows to be wrong are returned.
    """
    try:
        return dict(_texts(read_toml(path, MAX_BYTES)))
    except OSError as error:
        raise FileError(f"{path}: cannot be read: {error.strerror} (--config, {CONFIG_FILE})") from None
    except ValueError as error:
        raise FileError(f"{path}: {error}") from None


def _texts(found: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    for name, value in found.items():
        setting = _BY_ENV.get(name)
        if setting is None:
            raise ValueError(_unknown(name, value))
        yield name, _text(setting, value)


def _text(setting: Setting, value: object) -> str:
    """The value as text.

    Raises:
        ValueError: its type does not fit.
    """
    read = setting.read
    if isinstance(value, str):
        if "\0" in value:
            raise ValueError(f"{setting.env}: contains the character U+0000, which no setting may contain")
        return value
    if isinstance(value, bool):
        if read in _SWITCHES:
            return "1" if value else "0"
    elif isinstance(value, (int, float)):
        if read in _NUMBERS or read in _SWITCHES:
            return str(value)
    elif isinstance(value, list) and read in _SEPARATORS and all(isinstance(item, str) for item in value):
        return _text(setting, _SEPARATORS[read].join(value))
    raise ValueError(f"{setting.env}: must be {_wanted(setting)}, not {_kind(value)}")


def _wanted(setting: Setting) -> str:
    if setting.read in _SWITCHES:
        return "true or false"
    if setting.read in _NUMBERS:
        return f"a number, such as {setting.env} = {setting.default if setting.default.isdigit() else 1}"
    if setting.read in _SEPARATORS:
        return f'text in quotes, or a list of them, such as {setting.env} = ["...", "..."]'
    return f'text in quotes, such as {setting.env} = "..."'


def _kind(value: object) -> str:
    """The kind of a value, which may be a secret and is not shown itself."""
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, (int, float)):
        return "a number"
    if isinstance(value, list):
        return "a list" if all(isinstance(item, str) for item in value) else "a list of something else than text"
    return "a table" if isinstance(value, dict) else "a date or time"


def _unknown(name: str, value: object) -> str:
    shown = name[:60] if name.isprintable() else ascii(name[:60])
    if name == CONFIG_FILE:
        return f"{name}: cannot be set in the file that it names"
    if isinstance(value, dict):
        return f"[{shown}]: there are no tables; write the settings at the top, such as MAX_QUEUE = 500"
    known = _closest(name)
    hint = f"did you mean {known}?" if known else "disagg-proxy --help lists the names, such as MAX_QUEUE"
    return f"{shown}: there is no such setting; {hint}"


def _closest(name: str) -> str | None:
    """The setting that is most likely meant by ``name``, which may be written like its flag."""
    written = name.strip("-").replace("-", "_").upper()
    spellings = {s.flag.strip("-").replace("-", "_").upper(): s.env for s in _BY_ENV.values()}
    spellings |= {env: env for env in _BY_ENV}
    close = difflib.get_close_matches(written, spellings, n=1, cutoff=0.7)
    return spellings[close[0]] if close else None
