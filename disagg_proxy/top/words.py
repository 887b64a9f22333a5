"""Texts and numbers for the terminal: the page's texts, in the language of the locale."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from disagg_proxy.page.document import strings


class Words:
    """The texts of one language."""

    def __init__(self, language: str = "en") -> None:
        self._texts = strings()[language]

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> Words:
        """Chinese if the locale starts with ``zh``, else English, as in test_single_machine.sh."""
        locale = environ.get("LC_ALL") or environ.get("LC_MESSAGES") or environ.get("LANG") or ""
        return cls("zh" if locale.startswith("zh") else "en")

    def say(self, key: str, **values: Any) -> str:
        """The text of ``key`` with ``values`` filled in."""
        return self._texts[key].format(**values)

    def word(self, kind: str, value: str) -> str:
        """The translation of a value such as a state; the value itself if there is none."""
        return self._texts.get(f"{kind}_{value}", value.replace("_", " "))

    def sentence(self, sentence: Mapping[str, Any]) -> str:
        """The text of a sentence from page/verdict.py."""
        values = dict(sentence["values"])
        for kind in ("role", "state", "why"):
            if kind in values:
                values[kind] = self.word(kind, values[kind])
        return self.say(sentence["key"], **values)

    def age(self, seconds: float) -> str:
        """A duration in seconds, in words."""
        whole = max(0, int(seconds))
        minutes, hours = whole // 60, whole // 3600
        if whole < 60:
            return self.say("age_s", count=whole)
        if minutes < 60:
            return self.say("age_min", count=minutes)
        if hours < 24:
            return self.say("age_h", hours=hours, minutes=minutes % 60)
        return self.say("age_d", days=hours // 24, hours=hours % 24)


def duration(ms: float | None) -> str:
    """A duration given in milliseconds, in about three digits."""
    if ms is None:
        return "–"
    if ms < 1000:
        return f"{ms:.{2 if ms < 1 else 1 if ms < 10 else 0}f} ms"
    return f"{ms / 1000:.{2 if ms < 10_000 else 1}f} s"


def joules(value: float | None) -> str:
    """An energy in about three digits, in mJ below 1 J."""
    if value is None:
        return "–"
    scaled, unit = (1000 * value, "mJ") if value < 1 else (value, "J")
    return f"{scaled:,.{2 if scaled < 10 else 1 if scaled < 100 else 0}f} {unit}"


def count(value: float, digits: int = 0) -> str:
    """A number with thousands separators."""
    return f"{value:,.{digits}f}"


def size(value: float) -> str:
    """A size given in bytes."""
    for unit in ("B", "KB", "MB", "GB"):
        if value < 1000:
            return f"{value:.{0 if unit == 'B' or value >= 100 else 1}f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def clock(unix: float) -> str:
    """Unix time as local time of day."""
    return time.strftime("%H:%M:%S", time.localtime(unix))


def plain(text: str) -> str:
    """Replace control characters, which a terminal would interpret."""
    return "".join(c if c.isprintable() else " " for c in text)
