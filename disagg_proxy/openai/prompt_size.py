"""How long the prompts of a request are, as far as that shows without a tokenizer. Pure."""

from __future__ import annotations

from typing import Any

import msgspec

from disagg_proxy.openai.fields import Body, lax_int
from disagg_proxy.openai.lazy_json import size_of


def choices_of(body: Body) -> int:
    """How many choices each prompt gets: ``n`` as vLLM reads it, 1 where that is refused or missing."""
    return max(1, lax_int(body["n"]) or 1) if "n" in body else 1


def prompts_of(body: Body) -> int:
    """How many prompts there are: a list of texts or of lists of token ids holds several."""
    prompt = body.get("prompt")
    return len(prompt) if isinstance(prompt, list) and prompt and type(prompt[0]) is not int else 1


def prompt_size(body: Body) -> tuple[int, int]:
    """(token ids, bytes of text) of a request's prompts; every choice of ``n`` counts."""
    factor = choices_of(body)
    tokens = text = 0
    for name in ("prompt", "messages", "system", "tools", "documents", "input", "instructions"):
        value = body.get(name)
        if value is not None:
            more_tokens, more_text = _measure(value)
            tokens, text = tokens + more_tokens, text + more_text
    return tokens * factor, text * factor


def _measure(value: Any) -> tuple[int, int]:
    """Lists of numbers count as token ids, strings by their UTF-8 length (media not at all), containers by content."""
    tokens = text = 0
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, msgspec.Raw):
            text += size_of(item)
        elif isinstance(item, str):
            if item.startswith("data:"):
                continue
            text += len(item) if item.isascii() else len(item.encode("utf-8", "surrogatepass"))
        elif isinstance(item, list):
            if item and type(item[0]) is int:
                tokens += len(item)
            else:
                waiting.extend(item)
        elif isinstance(item, dict):
            # Templates write the names too; without them a tool's schema has more tokens than bytes.
            waiting.extend(item)
            waiting.extend(item.values())
    return tokens, text
