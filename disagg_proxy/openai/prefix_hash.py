"""Hashes of a prompt's prefixes, without a tokenizer, so that a request can be sent where KV of its prefix is cached.

Text is taken in the order of chat templates: tools, system, messages, with the roles between. It is hashed at fixed
lengths (``ENDS``), each hash covering everything up to there, so two prompts share hashes as far as they are equal,
whatever their route. CRC-32 is sufficient, and the fastest in the standard library (10 us for 32 KiB): a collision
costs one less suitable instance, and a forged one only harms its own request.
"""

from __future__ import annotations

import marshal
import zlib
from dataclasses import dataclass
from typing import Any, NamedTuple

from disagg_proxy.openai.fields import Body, Route
from disagg_proxy.openai.media import is_media, stand_in

ENDS = (*range(256, 2049, 256), *range(3072, 16385, 1024), *range(20480, 32769, 4096))
"""Prefix lengths in bytes that are hashed; prompts that differ only after the last one count as equal."""

MAX_BYTES = ENDS[-1]
"""Bytes of a prompt that are hashed."""

_ID_BYTES = 4
"""Bytes that a token id counts as."""

_ID_ENDS = tuple(end // _ID_BYTES for end in ENDS)

_BILLING = "x-anthropic-billing-header"
"""Begins a system block of Claude Code of which a part changes with every request. vLLM leaves it out of the prompt
(0.32, ``entrypoints/anthropic/serving.py``; on chat ``renderers/chat_utils.py``,
``_strip_claude_code_billing_header``)."""

_RENDERED = ("role", "content", "type")
"""Fields of a message, or an input item of /v1/responses, that are hashed as such or say nothing of the prompt."""

_HOME = 1024
"""Bytes that identify a conversation where the request has no messages."""


@dataclass(frozen=True, slots=True)
class AffinityNeeds:
    """What the policies need to know of a request; the rest is not computed."""

    prefix: bool = False
    session: bool = False


class Affinity(NamedTuple):
    """Properties by which requests may share cached KV.

    Attributes:
        prefix: hashes of its prefixes, the shortest first. size: bytes of the complete prompt.
        home: hash of what stays the same through a conversation: tools, system and first message. None for prompts
            shorter than the shortest prefix, whose KV is not worth finding again.
        user: hash of the body's ``user`` (chat, completions, responses) or ``metadata.user_id`` (messages).
    """

    prefix: tuple[int, ...] = ()
    size: int = 0
    home: int | None = None
    user: int | None = None


NO_AFFINITY = Affinity()


def affinity(route: Route, body: Body, wanted: AffinityNeeds) -> Affinity:
    """The affinity of a request. Never raises, whatever ``body`` holds."""
    user = _user(route, body) if wanted.session else None
    if not wanted.prefix:
        return NO_AFFINITY if user is None else Affinity(user=user)
    prompt = body.get("prompt") if route.dialect == "completions" else None
    if isinstance(prompt, str) and len(prompt) < ENDS[0] and prompt.isascii():
        # Shorter than the shortest prefix.
        return Affinity(size=len(prompt), user=user)
    seed = zlib.crc32(repr((body.get("model"), body.get("cache_salt"))).encode("utf-8", "replace"))
    if route.dialect != "completions":
        return _of_messages(route, body, seed, user)
    prompt = body.get("prompt")
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        # A list of prompts goes to one instance; they mostly share a prefix.
        prompt = prompt[0]
    if isinstance(prompt, str):
        raw = _bytes(prompt[:MAX_BYTES])
        size = len(raw) + max(0, len(prompt) - MAX_BYTES)
        names = _names(raw, seed)
        return Affinity(names, size, zlib.crc32(raw[:_HOME], seed) if names else None, user)
    if isinstance(prompt, list):
        return _of_ids(prompt, seed, user)
    return NO_AFFINITY if user is None else Affinity(user=user)


def session_name(text: str) -> int:
    """The hash of a session's name."""
    raw = _bytes(text)
    return zlib.crc32(raw) << 32 | zlib.crc32(raw, 1)


def _user(route: Route, body: Body) -> int | None:
    holder = body.get("metadata") if route.dialect == "messages" else body
    user = holder.get("user_id" if route.dialect == "messages" else "user") if isinstance(holder, dict) else None
    return session_name(user) if isinstance(user, str) and user else None


def _names(raw: bytes, seed: int) -> tuple[int, ...]:
    names = []
    view = memoryview(raw)
    checksum, start, size = seed, 0, len(raw)
    for depth, end in enumerate(ENDS):
        if end > size:
            break
        checksum = zlib.crc32(view[start:end], checksum)
        # Hashes of different lengths never match.
        names.append(checksum << 8 | depth)
        start = end
    return tuple(names)


def _of_ids(ids: list[Any], seed: int, user: int | None) -> Affinity:
    names = []
    checksum, start, size = seed, 0, len(ids)
    try:
        # Hashes of tuples of numbers are the same in every process.
        for depth, end in enumerate(_ID_ENDS):
            if end > size:
                break
            checksum = hash((checksum, tuple(ids[start:end])))
            names.append((checksum & 0xFFFFFFFFFFFF) << 8 | depth)
            start = end
        home = hash((seed, tuple(ids[: _HOME // _ID_BYTES])))
    except TypeError:
        return NO_AFFINITY if user is None else Affinity(user=user)
    return Affinity(tuple(names), size * _ID_BYTES, home if names else None, user)


def _of_messages(route: Route, body: Body, seed: int, user: int | None) -> Affinity:
    parts: list[str] = []
    tools = body.get("tools")
    if isinstance(tools, list):
        parts.extend(map(_dumped, tools))
    messages = body.get("messages")
    if route.dialect != "chat":
        system, messages = _system_and_messages(route, body)
        if system:
            parts += "\0system\0", _system_text(route, system)
    length, unread, first = sum(map(len, parts)), 0, 0
    for message in messages if isinstance(messages, list) else ():
        if not isinstance(message, dict):
            break
        content = message.get("content")
        if length >= MAX_BYTES:
            unread += len(content) if isinstance(content, str) else 0
            continue
        role = str(message.get("role"))
        if role == "system":
            text = _system_text(route, content)
        else:
            text = content if isinstance(content, str) else _text(content)
        parts += "\0", role, "\0", text
        if len(message) > 2 and (rest := [value for name, value in message.items() if name not in _RENDERED]):
            parts.append(_dumped(rest))
        length += len(text)
        if not first and role not in ("system", "developer"):
            first = len(parts)
    joined = "".join(parts)
    raw = _bytes(joined[:MAX_BYTES])
    size = len(raw) + max(0, len(joined) - MAX_BYTES) + unread
    names = _names(raw, seed)
    home = zlib.crc32(_bytes("".join(parts[: first or None])[:MAX_BYTES]), seed) if names else None
    return Affinity(names, size, home, user)


def _system_and_messages(route: Route, body: Body) -> tuple[Any, Any]:
    """The system prompt beside the messages, and the messages, on /v1/messages and /v1/responses."""
    if route.dialect == "messages":
        return body.get("system"), body.get("messages")
    given = body.get("input")
    return body.get("instructions"), [{"role": "user", "content": given}] if isinstance(given, str) else given


def _text(content: Any) -> str:
    """Content as one text. Texts stay unchanged, so that a longer one starts with a shorter one; the rest is dumped,
    media as a text of fixed length."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return "" if content is None else _dumped(content)
    return "".join(map(_text_of_part, content))


def _text_of_part(part: Any) -> str:
    if isinstance(part, dict) and part.get("type") == "tool_result":
        inner = part.get("content")
        if isinstance(inner, list):
            rest = {name: value for name, value in part.items() if name != "content"}
            return _text_of_leaf(rest) + "".join(map(_text_of_leaf, inner))
    return _text_of_leaf(part)


def _text_of_leaf(part: Any) -> str:
    if not isinstance(part, dict):
        return _dumped(part)
    text = part.get("text")
    if isinstance(text, str):
        return text
    if "cache_control" in part:
        # Anthropic's clients move this mark to the end of the conversation with every turn; vLLM does not read it.
        part = {name: value for name, value in part.items() if name != "cache_control"}
    return stand_in(_marshalled(part)) if is_media(part) else _dumped(part)


def _system_text(route: Route, content: Any) -> str:
    """The system prompt's content as one text, without what vLLM does not render."""
    if isinstance(content, list):
        return "".join([_without_billing(route, _text_of_part(part)) for part in content])
    return _without_billing(route, _text(content))


def _without_billing(route: Route, text: str) -> str:
    if not text.startswith(_BILLING):
        return text
    # On chat it is only the first line, since gateways may have joined the blocks.
    return text.partition("\n")[2] if route.dialect == "chat" else ""


def _dumped(value: Any) -> str:
    """Any JSON value as text that is equal for equal values. It is never parsed."""
    return _marshalled(value).decode("latin-1")


def _marshalled(value: Any) -> bytes:
    try:
        # Version 2 has no references, which would depend on object identity. Much faster than json.
        return marshal.dumps(value, 2)
    except ValueError:
        return b""


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")
