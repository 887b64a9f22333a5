"""Reads API_KEYS_FILE: a TOML file with one ``[[keys]]`` table for each key. Its fields: docs/keys.md.

The file holds the SHA-256 of each key, never a key. A slow hash such as bcrypt protects secrets that can be guessed;
``disagg-proxy key new`` draws 256 random bits, which cannot be guessed. It would also stall the event loop for every
unknown key that a client sends.
"""

from __future__ import annotations

import difflib
import hashlib
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from disagg_proxy.config.model import Config
from disagg_proxy.config.toml_file import read_toml

MAX_KEYS = 500
"""Each key has its own label values in /metrics, and its counters in what workers publish."""

MAX_BYTES = 1024 * 1024
"""Size of the file at most: 500 keys with 2 KiB each, most of it lists of models."""

MAX_PRIORITY = 9

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,39}", re.ASCII)
_HASH = re.compile(r"sha256:([0-9a-fA-F]{64})", re.ASCII)

API_KEY_NAME = "API_KEY"
"""Name under which requests with the key of that setting are counted, so none of the file's."""


class KeysFileError(Exception):
    """The file cannot be used: one line with its path, the entry, and what to change. Contains no key and no hash."""


@dataclass(frozen=True, slots=True)
class KeyEntry:
    """One key of the file.

    Attributes:
        name: label in /metrics and value of ``key`` in the access log.
        hash: SHA-256 digests; several while a key is being replaced.
        requests_per_minute, tokens_per_minute: limits; 0 for none.
        models: served names that it may use; empty for all.
        priority: 0 to 9; higher ones leave the admission queue earlier.
        monitoring: whether it opens /stats, /metrics, the page's feed and profiling, besides the API.
    """

    name: str
    hash: tuple[bytes, ...]
    requests_per_minute: int = 0
    tokens_per_minute: int = 0
    models: tuple[str, ...] = ()
    priority: int = 0
    monitoring: bool = False


_FIELDS = tuple(one.name for one in fields(KeyEntry))


def new_key() -> str:
    """A new key with 256 random bits."""
    return "sk-" + secrets.token_urlsafe(32)


def digest(key: bytes) -> bytes:
    """What the file holds of a key."""
    return hashlib.sha256(key).digest()


def table_of(name: str, key: str) -> str:
    """The table of a new key, to be added to the file."""
    return f'[[keys]]\nname = "{name}"\nhash = "sha256:{digest(key.encode()).hex()}"\n'


def check_name(name: object) -> str:
    """
    Raises:
        ValueError: with what a name must be.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(
            "name must be 1 to 40 letters, digits, dots, hyphens, underscores or @, beginning with a letter or digit"
        )
    if name == API_KEY_NAME:
        raise ValueError(f"name must not be {API_KEY_NAME}, under which requests with the key of that setting count")
    return name


def keys_of(config: Config) -> tuple[KeyEntry, ...]:
    """The keys of a configuration; none without API_KEYS_FILE.

    Raises:
        KeysFileError: see :func:`read_keys`; or one of them is the ADMIN_KEY.
    """
    if not config.api_keys_file:
        return ()
    entries = read_keys(config.api_keys_file)
    admin = digest(config.admin_key.encode())
    for entry in entries:
        if config.admin_key and admin in entry.hash:
            raise KeysFileError(f"{config.api_keys_file}: key {entry.name!r}: must differ from ADMIN_KEY")
    return entries


def read_keys(path: str) -> tuple[KeyEntry, ...]:
    """The keys in the file at ``path``.

    Raises:
        KeysFileError: it cannot be read, or an entry is not valid.
    """
    try:
        content = read_toml(path, MAX_BYTES)
    except OSError as error:
        raise KeysFileError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise KeysFileError(f"{path}: {error}") from None
    tables = content.pop("keys", None)
    if content:
        raise KeysFileError(f"{path}: {_unknown(content, ('keys',))}; each key is a [[keys]] table")
    if not isinstance(tables, list) or not tables or not all(isinstance(one, dict) for one in tables):
        raise KeysFileError(f"{path}: has no [[keys]] table, so it would refuse everybody; add one, or unset the file")
    if len(tables) > MAX_KEYS:
        raise KeysFileError(f"{path}: has {len(tables)} keys; at most {MAX_KEYS} are supported")
    entries: dict[str, KeyEntry] = {}
    owners: dict[bytes, str] = {}
    for number, table in enumerate(tables, 1):
        # A name that is not valid may be a key in the wrong place, so it is not shown.
        valid = isinstance(table.get("name"), str) and _NAME.fullmatch(table["name"]) is not None
        shown = f"key {table['name']!r}" if valid else f"key number {number}"
        try:
            entry = _entry(table)
            if entry.name in entries:
                raise ValueError("is defined twice; names must be unique (hash may be a list of two keys' hashes)")
            for one in entry.hash:
                if (owner := owners.setdefault(one, entry.name)) != entry.name:
                    raise ValueError(
                        f"has the hash of key {owner!r}; create a key of its own with: disagg-proxy key new"
                    )
        except ValueError as error:
            raise KeysFileError(f"{path}: {shown}: {error}") from None
        entries[entry.name] = entry
    return tuple(entries.values())


def _entry(table: dict[str, Any]) -> KeyEntry:
    if not table.keys() <= set(_FIELDS):
        raise ValueError(_unknown(table, _FIELDS))
    return KeyEntry(
        check_name(table.get("name")),
        _hashes(table.get("hash")),
        _number(table, "requests_per_minute", "leave it out for no limit", 1, 10**9),
        _number(table, "tokens_per_minute", "leave it out for no limit", 1, 10**12),
        _models(table.get("models")),
        _number(table, "priority", "higher ones are served earlier", 0, MAX_PRIORITY),
        _flag(table, "monitoring"),
    )


def _unknown(table: dict[str, Any], known: Sequence[str]) -> str:
    """What is wrong with the first unknown field. Its value is not shown."""
    name = next(name for name in table if name not in known)
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"
    return f"unknown field {name!r}; {hint}"


def _hashes(value: object) -> tuple[bytes, ...]:
    values = value if isinstance(value, list) else [value]
    matches = [_HASH.fullmatch(one) if isinstance(one, str) else None for one in values]
    if not matches or not all(matches):
        raise ValueError(
            "hash must be sha256: and 64 hexadecimal digits, or a list of such texts, as disagg-proxy key new prints"
        )
    return tuple(bytes.fromhex(match[1]) for match in matches if match)


def _number(table: dict[str, Any], name: str, hint: str, least: int, most: int) -> int:
    if name not in table:
        return 0
    value = table[name]
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{name} must be a whole number from {least} to {most} ({hint}), not {value!r}")
    return value


def _models(value: object) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not value or not all(isinstance(one, str) and one for one in value):
        raise ValueError("models must be a list of served names; leave it out to allow all")
    return tuple(value)


def _flag(table: dict[str, Any], name: str) -> bool:
    value = table.get(name, False)
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, not {value!r}")
    return value
