"""Texts for people, by key, in the language of the locale. Errors that end a command are :class:`MachineError`.

The catalogues are :mod:`disagg_machine.messages.english` and :mod:`disagg_machine.messages.chinese`; only the one
that is needed is imported.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping

CATALOGUES = {"en": "english", "zh": "chinese"}


class _Chosen:
    """The language of this process; None until the first text, then that of the locale."""

    language: str | None = None
    texts: Mapping[str, str] = {}


class MachineError(Exception):
    """Ends a command with an exit code and one message.

    Exit codes: 1 something failed, 2 wrong usage or a bad setting, 3 nothing is running.
    """

    def __init__(self, code: int, key: str, *arguments: object) -> None:
        super().__init__(code, key, *arguments)
        self.code = code
        self.key = key
        self.arguments = arguments

    def __str__(self) -> str:
        return text(self.key, *self.arguments)


def die(code: int, key: str, *arguments: object) -> MachineError:
    """For ``raise die(...)``."""
    return MachineError(code, key, *arguments)


def language_of(environ: Mapping[str, str]) -> str:
    """``zh`` or ``en``, as the locale's variables say."""
    locale = environ.get("LC_ALL") or environ.get("LC_MESSAGES") or environ.get("LANG") or ""
    return "zh" if locale.startswith("zh") else "en"


def use(language: str) -> None:
    """Speak ``en`` or ``zh`` from now on."""
    _Chosen.texts = importlib.import_module(f"{__name__}.{CATALOGUES[language]}").TEXTS
    _Chosen.language = language


def language() -> str:
    """The language that is spoken, ``en`` or ``zh``."""
    if _Chosen.language is None:
        use(language_of(os.environ))
    return _Chosen.language or "en"


def text(key: str, *arguments: object) -> str:
    """The text of ``key`` with its arguments filled in.

    Raises:
        KeyError: there is no such text.
    """
    language()
    return _Chosen.texts[key].format(*arguments)
