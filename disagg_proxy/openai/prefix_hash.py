"""The beginnings of a prompt, by name, without a tokenizer: what shall meet the KV that was computed for it before.

Text is taken in the order in which chat templates put it: tools, system, messages; with the roles between. It is
named at fixed lengths (``ENDS``), each name a checksum of everything up to there, so two prompts have the same names
as far as they are the same, whatever route they came by. CRC-32 is enough, and the fastest in the standard library
(10 us for 32 KiB): a wrong match costs one detour, and whoever forges one harms only his own request.
"""

from __future__ import annotations

import marshal
import zlib
from dataclasses import dataclass
from typing import Any, NamedTuple

from disagg_proxy.openai.fields import Body, Route

ENDS = (*range(256, 2049, 256), *range(3072, 16385, 1024), *range(20480, 32769, 4096))
"""Bytes after which a beginning has a name; prompts that differ after the last one are taken to be the same."""

MAX_BYTES = ENDS[-1]
"""Bytes of a prompt that are hashed."""

_ID_BYTES = 4
"""Token ids count as text of so many bytes."""

_ID_ENDS = tuple(end // _ID_BYTES for end in ENDS)

_HOME = 1024
"""Bytes that stand for the conversation where there are no messages to tell."""


@dataclass(frozen=True, slots=True)
class AffinityNeeds:
    """What a request shall be looked at for; nothing is hashed for what is not."""

    prefix: bool = False
    session: bool = False


class Affinity(NamedTuple):
    """What a request has in common with others.

    Attributes:
        prefix: names of its beginnings, the shortest first. size: bytes of its whole prompt.
        home: name of what stays the same through a conversation: tools, system and first message. None for prompts
            that are too short for a name, since meeting their KV again saves nothing.
        user: name of the body's ``user`` (chat, completions) or ``metadata.user_id`` (messages).
    """

    prefix: tuple[int, ...] = ()
    size: int = 0
    home: int | None = None
    user: int | None = None


NO_AFFINITY = Affinity()


def affinity(route: Route, body: Body, wanted: AffinityNeeds) -> Affinity:
    """Look at ``body``; never raises, whatever it holds."""
    user = _user(route, body) if wanted.session else None
    if not wanted.prefix:
        return NO_AFFINITY if user is None else Affinity(user=user)
    prompt = body.get("prompt") if route.dialect == "completions" else None
    if isinstance(prompt, str) and len(prompt) < ENDS[0] and prompt.isascii():
        # Too short to have a name.
        return Affinity(size=len(prompt), user=user)
    seed = zlib.crc32(repr((body.get("model"), body.get("cache_salt"))).encode("utf-8", "replace"))
    if route.dialect != "completions":
        return _of_messages(route, body, seed, user)
    prompt = body.get("prompt")
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        # A list of prompts goes to one instance; they mostly share their beginning.
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
    """The name of a session."""
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
        # Names of different lengths never meet.
        names.append(checksum << 8 | depth)
        start = end
    return tuple(names)


def _of_ids(ids: list[Any], seed: int, user: int | None) -> Affinity:
    names = []
    checksum, start, size = seed, 0, len(ids)
    try:
        # Tuples of numbers hash alike in every process.
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
    if route.dialect == "messages" and body.get("system"):
        parts += "\0system\0", _text(body["system"])
    messages = body.get("messages")
    length, unread, first = sum(map(len, parts)), 0, 0
    for message in messages if isinstance(messages, list) else ():
        if not isinstance(message, dict):
            break
        content = message.get("content")
        if length >= MAX_BYTES:
            unread += len(content) if isinstance(content, str) else 0
            continue
        role = str(message.get("role"))
        text = content if isinstance(content, str) else _text(content)
        parts += "\0", role, "\0", text
        if len(message) > 2:
            parts.append(_dumped([value for name, value in message.items() if name not in ("role", "content")]))
        length += len(text)
        if not first and role not in ("system", "developer"):
            first = len(parts)
    joined = "".join(parts)
    raw = _bytes(joined[:MAX_BYTES])
    size = len(raw) + max(0, len(joined) - MAX_BYTES) + unread
    names = _names(raw, seed)
    home = zlib.crc32(_bytes("".join(parts[: first or None])[:MAX_BYTES]), seed) if names else None
    return Affinity(names, size, home, user)


def _text(content: Any) -> str:
    """Content as one text: texts as they are, so that a longer one begins like a shorter one; the rest dumped."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return "" if content is None else _dumped(content)
    return "".join(
        part["text"] if isinstance(part, dict) and isinstance(part.get("text"), str) else _dumped(part)
        for part in content
    )


def _dumped(value: Any) -> str:
    """Any JSON value in a form that is the same for the same value; nobody reads it back."""
    try:
        # Version 2 knows no references, which would depend on the identity of objects. Faster than json by far.
        return marshal.dumps(value, 2).decode("latin-1")
    except ValueError:
        return ""


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")
