"""Words and numbers for a terminal, from the page's own texts, in the language of the locale."""

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
        """As the locale says; like test_single_machine.sh does it."""
        locale = environ.get("LC_ALL") or environ.get("LC_MESSAGES") or environ.get("LANG") or ""
        return cls("zh" if locale.startswith("zh") else "en")

    def say(self, key: str, **values: Any) -> str:
        """One text."""
        return self._texts[key].format(**values)

    def word(self, kind: str, value: str) -> str:
        """A word of the proxy's; as it is where there is no text for it."""
        return self._texts.get(f"{kind}_{value}", value.replace("_", " "))

    def sentence(self, sentence: Mapping[str, Any]) -> str:
        """One of a verdict's."""
        values = dict(sentence["values"])
        for kind in ("role", "state"):
            if kind in values:
                values[kind] = self.word(kind, values[kind])
        return self.say(sentence["key"], **values)

    def age(self, seconds: float) -> str:
        """Of something that goes on."""
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
    """Of milliseconds, in three digits or so."""
    if ms is None:
        return "–"
    if ms < 1000:
        return f"{ms:.{2 if ms < 1 else 1 if ms < 10 else 0}f} ms"
    return f"{ms / 1000:.{2 if ms < 10_000 else 1}f} s"


def count(value: float, digits: int = 0) -> str:
    """With separators."""
    return f"{value:,.{digits}f}"


def size(value: float) -> str:
    """Of bytes."""
    for unit in ("B", "KB", "MB", "GB"):
        if value < 1000:
            return f"{value:.{0 if unit == 'B' or value >= 100 else 1}f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def clock(unix: float) -> str:
    """Local time of day."""
    return time.strftime("%H:%M:%S", time.localtime(unix))


def plain(text: str) -> str:
    """Without control characters, which a terminal would obey."""
    return "".join(c if c.isprintable() else " " for c in text)
