"""Which parts of a message's content are media: images, sound, video, documents.

Their base64 is no text of the prompt, whatever the API calls it, and says little of the tokens that a model makes of
them. So they are counted instead (docs/admission.md). The rules are those of vLLM 0.32: ``renderers/chat_utils.py``,
``_parse_chat_message_content_mm_part``, and ``entrypoints/anthropic/serving.py``, ``_convert_block``. What vLLM renders
as text is text even if it looks like media: otherwise a long prompt could pass the limit on waiting KV uncounted.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from typing import Any

_FIELDS = (
    "image_url", "image_pil", "image_embeds", "audio_embeds", "video_embeds", "prompt_embeds", "audio_url",
    "input_audio", "video_url",
)  # fmt: skip
"""They name a type of chat part, and make a part without ``type`` one."""

_TYPES = frozenset((*_FIELDS, "image", "input_image", "document", "file", "input_file"))
"""The last three are refused by vLLM."""

STANDS_FOR = 4096
"""Bytes that media count as where a prompt is measured in bytes of text: about 1,024 tokens."""


def is_media(part: dict[str, Any]) -> bool:
    """Whether a content part is an image, sound, a video or a document."""
    kind = part.get("type")
    if kind is None:
        return any(name in part for name in _FIELDS)
    return isinstance(kind, str) and kind in _TYPES


def take_out(messages: list[Any]) -> tuple[list[Any], int]:
    """What the messages hold but for their media, in any order, and the number of media."""
    rest: list[Any] = []
    media = 0
    for message in messages:
        content = message.get("content") if isinstance(message, dict) else None
        if not isinstance(content, list):
            rest.append(message)
            continue
        rest.append({name: value for name, value in message.items() if name != "content"})
        for part in content:
            # Of the user's tool results vLLM renders the parts, of others the JSON as text.
            if _is_tool_result(part) and message.get("role") == "user":
                rest.append({name: value for name, value in part.items() if name != "content"})
                media += _divide(part["content"], rest)
            else:
                media += _divide((part,), rest)
    return rest, media


def _divide(parts: Iterable[Any], rest: list[Any]) -> int:
    media = 0
    for part in parts:
        if not isinstance(part, dict):
            rest.append(part)
        elif is_media(part):
            media += 1
        elif part.get("type") != "redacted_thinking":
            # Only its maker can read that one; vLLM does not render it.
            rest.append(part)
    return media


def _is_tool_result(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "tool_result" and isinstance(part.get("content"), list)


def stand_in(dumped: bytes) -> str:
    """Text that stands for media, given as bytes, in a prompt whose prefixes are hashed."""
    return f"{zlib.crc32(dumped):08x}" * (STANDS_FOR // 8)
