"""How the text of one setting becomes a value. Each reader raises ValueError that says what would be right."""

from __future__ import annotations

import re
from collections.abc import Callable

from disagg_machine.messages import text as message

Reader = Callable[[str], object]


class Number(str):
    """A number as it was written, such as ``8e9``: the programs get the text, sums use :attr:`value`."""

    __slots__ = ()

    @property
    def value(self) -> float:
        """The number."""
        return float(self)

    def whole(self, scale: float = 1) -> int:
        """The number times ``scale``, rounded."""
        return round(float(self) * scale)


def _matching(raw: str, pattern: str, wanted: str, *arguments: object) -> str:
    if not re.fullmatch(pattern, raw, re.ASCII):
        raise ValueError(message(wanted, *arguments))
    return raw


def text(raw: str) -> str:
    """Anything in one line."""
    return raw


def secret(raw: str) -> str:
    """A key: never shown, never written to disk."""
    return raw


def path(raw: str) -> str:
    """A file or folder."""
    return raw


def args(raw: str) -> str:
    """Shell-quoted words."""
    return raw


def port(raw: str) -> int:
    """A TCP port."""
    value = int(_matching(raw, r"[1-9][0-9]{0,4}", "want_port"))
    if value > 65535:
        raise ValueError(message("want_port"))
    return value


def count(raw: str) -> int:
    """A whole number from 1."""
    return int(_matching(raw, r"[1-9][0-9]{0,8}", "want_count"))


def number(raw: str) -> Number:
    """A number such as 8e9."""
    return Number(_matching(raw, r"[0-9]+(\.[0-9]+)?([eE][+]?[0-9]{1,2})?", "want_number"))


def clock(raw: str) -> str:
    """A clock in MHz: a cap, or with ``lock:`` before it both bounds. disagg_power reads it."""
    return _matching(raw, r"(lock:)?[1-9][0-9]{1,4}", "want_clock")


def fraction(raw: str) -> Number:
    """Above 0 and at most 1."""
    return Number(_matching(raw, r"0?\.[0-9]*[1-9][0-9]*|1(\.0*)?", "want_fraction"))


def flag(raw: str) -> bool:
    """0 or 1."""
    return _matching(raw, r"[01]", "want_flag") == "1"


def choice(*allowed: str) -> Reader:
    """One of ``allowed``."""

    def read(raw: str) -> str:
        if raw not in allowed:
            raise ValueError(message("want_choice", ",".join(allowed)))
        return raw

    return read


def host(raw: str) -> str:
    """A host name or an IP address."""
    return _matching(raw, r"[A-Za-z0-9._:-]+", "want_host")


def gpu(raw: str) -> str:
    """The GPUs of one engine: an index or UUID, several with ``+``."""
    return _matching(raw, r"[A-Za-z0-9-]+(\+[A-Za-z0-9-]+)*", "want_gpu")


def gpus(raw: str) -> str:
    """The GPUs of several engines, separated by commas."""
    return _matching(raw, r"[A-Za-z0-9-]+([+,][A-Za-z0-9-]+)*", "want_gpus")


def rates(raw: str) -> str:
    """Requests per second, separated by blanks or commas."""
    _matching(raw, r"[0-9.]+([\s,]+[0-9.]+)*", "want_rates")
    if any(not word.strip("0.") for word in re.split(r"[\s,]+", raw)):
        raise ValueError(message("want_rates"))
    return raw


def word(raw: str) -> str:
    """Letters, digits, dots, dashes."""
    return _matching(raw, r"[A-Za-z0-9_.-]+", "want_word")


def names(raw: str) -> str:
    """Names separated by commas, without blanks."""
    return _matching(raw, r"[^,\s]+(,[^,\s]+)*", "want_names")
