"""The chat template: from messages, tools and template arguments to the text that the model sees.

ChatML, with everything in it that changes the prompt of a real model too, so that a leg which lost a field gets
another prompt, and with it another token count than the KV.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from disagg_sim.api_error import Raised
from disagg_sim.text import Guide, expected_text

BILLING_HEADER = "x-anthropic-billing-header"
"""Begins a system text of Claude Code that newer versions leave out: a part of it changes with every request."""


def without_billing(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """A message as the chat route of vLLM 0.32 renders it, without the billing header's line in a system message."""
    content = message.get("content")
    if message["role"] != "system" or not content:
        return message
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    kept = []
    for part in parts:
        text = part.get("text") if part.get("type") == "text" else None
        if isinstance(text, str) and text.startswith(BILLING_HEADER):
            part = {**part, "text": text.partition("\n")[2]}
            if not part["text"]:
                continue
        kept.append(part)
    return {**message, "content": kept}


def render_chat(
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
) -> str:
    """The prompt text of one conversation.

    Raises:
        Raised: for content that a text-only model does not take.
    """
    parts: list[str] = []
    for name, value in (("tools", tools), ("documents", documents), ("arguments", template_kwargs)):
        if value:
            parts.append(f"<|im_start|>{name}\n{json.dumps(value, sort_keys=True)}<|im_end|>\n")
    for message in messages:
        body = _content(message.get("content"))
        if message.get("tool_calls"):
            body += json.dumps(message["tool_calls"], sort_keys=True)
        parts.append(f"<|im_start|>{message['role']}\n{body}<|im_end|>\n")
    if continue_final_message:
        parts[-1] = parts[-1].removesuffix("<|im_end|>\n")
    elif add_generation_prompt:
        parts.append("<|im_start|>assistant\n")
    return "".join(parts)


def _content(content: Any) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    texts = []
    for part in content:
        kind = part.get("type", "text")
        if kind not in ("text", "input_text", "output_text", "refusal", "thinking"):
            raise Raised(f"At most 0 {kind.removesuffix('_url')}(s) may be provided in one prompt.")
        texts.append(str(part.get("text") or part.get("refusal") or part.get("thinking") or ""))
    return "\n".join(texts)


def expected_chat_text(
    messages: Sequence[Mapping[str, Any]], max_tokens: int, *, index: int = 0, guide: Guide | None = None
) -> str:
    """The right answer to a plain conversation; see :func:`disagg_sim.text.expected_text`."""
    return expected_text(render_chat(messages), max_tokens, index=index, guide=guide)
