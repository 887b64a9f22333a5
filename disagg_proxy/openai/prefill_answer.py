"""Whether prefill did its work, read from its complete answer. A 200 alone is no proof.

vLLM 0.9.2 - 0.14 can put an error object into a 200 (docs/request-fields.md, 2g), and an answer that is streamed,
as those to forced tool calls are, reports a refusal as an event. The first chunk of a stream is sent after the
engine's first output, and prefill pushes the KV in that same step: a chunk proves the KV, an error before any chunk
proves that there is none.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

import msgspec

from disagg_proxy.openai.fields import Route
from disagg_proxy.openai.usage import COUNT, PROMPT, cached_beside


class Verdict(Enum):
    """DONE: the KV is on its way to decode. REFUSED: there is none. UNKNOWN: neither is certain."""

    DONE = 1
    REFUSED = 2
    UNKNOWN = 3


@dataclass(frozen=True, slots=True)
class PrefillResult:
    """Verdict on an answer with status 200; for a refusal also its status and JSON body."""

    verdict: Verdict
    status: int = 200
    body: bytes = b""


_DONE = PrefillResult(Verdict.DONE)
_UNKNOWN = PrefillResult(Verdict.UNKNOWN)


def read_prefill(route: Route, body: bytes, streamed: bool, choices: int) -> PrefillResult:
    """Judge the body of a 200.

    Args:
        streamed: whether it is an event stream.
        choices: number of choices; after an error in mid-stream only a single one is known to be complete.
    """
    if not streamed:
        return _DONE if _is_answer(route, body) else _judge_object(route, _object(body))
    begun = False
    for event in _events(body):
        found = _judge_object(route, event)
        if found.verdict is Verdict.DONE:
            begun = True
        elif found.verdict is Verdict.REFUSED:
            if not begun:
                return found
            return _DONE if choices == 1 else _UNKNOWN
    return _DONE if begun else _UNKNOWN


_Answer: Any = msgspec.defstruct(
    "_Answer",
    [("object", Any, None), ("error", Any, None), ("type", Any, None), ("choices", msgspec.Raw, msgspec.Raw(b"null"))],
)
"""The fields that are needed of an answer; parsing only these takes a third of the time. Not a class statement, which
mypyc would not compile to a msgspec struct."""

_answers = msgspec.json.Decoder(_Answer)


def _is_answer(route: Route, body: bytes) -> bool:
    """Fast check for the common case of DONE; False: :func:`_judge_object` decides."""
    try:
        answer = _answers.decode(body)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return False
    if answer.error is not None or answer.object == "error":
        return False
    if route.dialect == "messages":
        return bool(answer.type == "message")
    return bytes(answer.choices).startswith(b"[")


def _judge_object(route: Route, answer: dict[str, Any]) -> PrefillResult:
    error = answer.get("error") if isinstance(answer.get("error"), dict) else None
    if error is None and answer.get("object") == "error":
        error = answer
    if error is not None:
        code = error.get("code")
        status = code if type(code) is int and 400 <= code < 600 else 400
        return PrefillResult(Verdict.REFUSED, status, json.dumps({"type": "error", "error": error}).encode())
    if route.dialect == "messages":
        return _DONE if answer.get("type") in ("message", "message_start") else _UNKNOWN
    return _DONE if isinstance(answer.get("choices"), list) else _UNKNOWN


def _events(stream: bytes) -> Iterator[dict[str, Any]]:
    for line in stream.splitlines():
        if line.startswith(b"data:"):
            yield _object(line[5:])


def _object(text: bytes) -> dict[str, Any]:
    try:
        value = msgspec.json.decode(text)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return {}
    return value if isinstance(value, dict) else {}


_CLIENTS_FAULTS = ("maximum context length", "(s) may be provided in one ")
"""Parts of vLLM's error messages, 0.9.2 - 0.32: prompt and answer do not fit the model; more images or sounds than the
model takes, of which a text model takes none."""


def prompt_tokens(body: bytes) -> int:
    """Length of the prompts in tokens according to an answer's usage, cached tokens included; 0 without usage."""
    most = 0
    for key in PROMPT:
        at = body.find(key)
        while at >= 0:
            found = COUNT.match(body, at + len(key))
            # A quote after a backslash is within text of the model.
            if found and body[at - 1 : at] != b"\\":
                most = max(most, int(found[1]) + cached_beside(body, at))
            at = body.find(key, at + len(key))
    return most


def blames_client(body: bytes) -> bool:
    """Whether an error body is known to be of a client's mistake, whatever its status.

    On /v1/messages vLLM 0.17 - 0.27 answers 500 to every exception, and only the message tells which it was.
    """
    message = error_message(body)
    return any(part in message for part in _CLIENTS_FAULTS)


def blames_engine(body: bytes) -> bool:
    """Whether an error body says that the engine has ended, so that the same request may succeed elsewhere.

    The text is that of vLLM's ``EngineDeadError`` (``v1/engine/exceptions.py``).
    """
    return error_message(body).startswith("EngineCore encountered an issue")


def error_message(body: bytes) -> str:
    """The message in an engine's error body of any version; empty when it has none."""
    answer = _object(body)
    inner = answer.get("error")
    message = inner.get("message") if isinstance(inner, dict) else answer.get("message")
    return message if isinstance(message, str) else ""
