"""The HTML document of the live page: the files of ``web/`` joined into one, and its response headers.

The document contains no data and no key; data comes over the feed. Its Content Security Policy (Level 3) allows its one
script and its one style by hash, so that no text it shows can be executed; ``require-trusted-types-for`` disables the
APIs that turn text into markup. It can connect to the proxy only.
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
    "text.js", "dom.js", "model.js", "headline.js", "machine.js", "charts.js", "energy.js", "requests.js", "events.js",
    "stream.js", "ask.js", "main.js",
)  # fmt: skip
"""In the order in which they are joined; at load time each uses only those before it."""


@dataclass(frozen=True)
class Document:
    """The response to a request for the page.

    Attributes:
        body: the HTML.
        headers: all but Content-Length.
    """

    body: bytes
    headers: dict[str, str]


@cache
def document() -> Document:
    """The document, built on the first call.

    Raises:
        ValueError: a script or the style contains text that would end its element early.
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
    """The texts of the page, by language and key."""
    texts: dict[str, dict[str, str]] = json.loads(_read("strings.json"))
    return texts


def _strings() -> str:
    # JSON is valid JavaScript; "<" is escaped since it could end the script element.
    return json.dumps(strings(), ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def _read(name: str) -> str:
    return (WEB / name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
