"""The two catalogues: nothing is missing, nothing is left over, and both take the same arguments."""

from __future__ import annotations

import ast
import re
import string
from pathlib import Path

import pytest

import disagg_machine
from disagg_machine import messages
from disagg_machine.messages import MachineError, chinese, english
from disagg_machine.table import SETTINGS

SOURCES = sorted(Path(disagg_machine.__file__).parent.rglob("*.py"))
SPEAKERS = {
    "text", "message", "say", "good", "warn", "complain", "die", "MachineError", "_say", "_say_once", "ok", "warning",
    "error", "bad", "_matching",
}  # fmt: skip
"""Functions whose first text is a key."""

GENERATED = re.compile(r"help_\w+|menu_\w+|source_\w+|doc_stale_\w+|doctor_(ok|warning|error)")
"""Keys that are put together from a name."""


def arguments(template: str) -> int:
    """How many arguments a template takes; it numbers all of them or none."""
    names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    numbers = {int(name) for name in names if name}
    assert not numbers or "" not in names, template
    assert numbers == set(range(len(numbers))), template
    return len(numbers) or len(names)


def texts() -> dict[Path, list[str]]:
    """Every text constant of the package, without docstrings and the catalogues."""
    found: dict[Path, list[str]] = {}
    for path in SOURCES:
        if path.parent.name != "messages" or path.name == "__init__.py":
            tree = ast.parse(path.read_text(encoding="utf-8"))
            found[path] = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    return found


def called() -> set[str]:
    """Keys in calls of :data:`SPEAKERS`."""
    found = set()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                first = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)][:2]
                if name in SPEAKERS:
                    found |= {key for key in first if re.fullmatch(r"[a-z]+(_[a-z]+)+", key)}
    return found


def test_no_text_is_missing() -> None:
    assert english.TEXTS.keys() == chinese.TEXTS.keys()
    assert called() - english.TEXTS.keys() == set()


def test_no_text_is_left_over() -> None:
    used = set().union(*texts().values())
    assert {key for key in english.TEXTS.keys() - used if not GENERATED.fullmatch(key)} == set()


@pytest.mark.parametrize("key", english.TEXTS)
def test_both_languages_take_the_same_arguments(key: str) -> None:
    here, there = english.TEXTS[key], chinese.TEXTS[key]
    assert arguments(here) == arguments(there)
    has_words = len(re.findall(r"[a-z]{3,}", here)) >= 3
    assert re.search(r"[\u4e00-\u9fff]", there) or not has_words


def test_every_setting_is_explained_in_both_languages() -> None:
    for setting in SETTINGS:
        assert re.search(r"[\u4e00-\u9fff]", setting.help_zh) and not re.search(r"[\u4e00-\u9fff]", setting.help)


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, "en"),
        ({"LANG": "zh_CN.UTF-8"}, "zh"),
        ({"LC_ALL": "", "LC_MESSAGES": "zh_TW", "LANG": "C"}, "zh"),
        ({"LC_ALL": "en_US.UTF-8", "LANG": "zh_CN.UTF-8"}, "en"),
    ],
)
def test_the_language_is_the_locales(environ: dict[str, str], expected: str) -> None:
    assert messages.language_of(environ) == expected


def test_an_error_is_its_text() -> None:
    messages.use("zh")
    try:
        assert str(MachineError(2, "port_twice", 1, "a", "b")) == "端口 1 同时分给了 a 和 b"
    finally:
        messages.use("en")
    assert str(MachineError(2, "port_twice", 1, "a", "b")) == "port 1 is given both to a and to b"
