"""The document that a browser gets: the files of ``web/`` joined into one, and the headers that go with it.

The page holds no data and no key; both come later, over the feed. Its policy (Content Security Policy Level 3) names
its one script and its one style by their hashes, so that nothing else runs in it whatever text it shows:
``require-trusted-types-for`` forbids the ways by which text could become markup. All that it may reach is the proxy.
"""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

WEB = Path(__file__).with_name("web")

SCRIPTS = (
    "text.js", "dom.js", "model.js", "headline.js", "machine.js", "charts.js", "requests.js", "events.js",
    "stream.js", "ask.js", "main.js",
)  # fmt: skip
"""In the order in which they are joined; each uses those before it only."""


@dataclass(frozen=True)
class Document:
    """What is sent for the page.

    Attributes:
        body: the HTML.
        headers: everything but the length.
    """

    body: bytes
    headers: dict[str, str]


@cache
def document() -> Document:
    """The page, joined once.

    Raises:
        ValueError: a script or the style would end its element early.
    """
    script = "".join(["(() => {\n'use strict';\n", f"const STRINGS = {_strings()};\n", *map(_read, SCRIPTS), "})();\n"])
    style = _read("page.css")
    for name, text in ("script", script), ("style", style):
        if f"</{name}" in text.lower() or "<!--" in text:
            raise ValueError(f"the page's {name} would end early")
    body = _read("index.html").replace("/*STYLE*/", style, 1).replace("/*SCRIPT*/", script, 1).encode()
    policy = (
        "default-src 'none'",
        f"script-src 'sha256-{_digest(script)}'",
        f"style-src 'sha256-{_digest(style)}'",
        "connect-src 'self'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
    )
    return Document(
        body,
        {
            "Content-Type": "text/html; charset=utf-8",
            "Content-Security-Policy": "; ".join(policy),
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Opener-Policy": "same-origin",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Cache-Control": "no-cache",
            "ETag": f'"{hashlib.sha256(body).hexdigest()[:32]}"',
        },
    )


def strings() -> dict[str, dict[str, str]]:
    """Everything that the page says, by language and key."""
    texts: dict[str, dict[str, str]] = json.loads(_read("strings.json"))
    return texts


def _strings() -> str:
    # JSON is JavaScript, but for the "<" that could end the script element.
    return json.dumps(strings(), ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def _read(name: str) -> str:
    return (WEB / name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
