"""JSON that the OpenAI routes share: usage, log probabilities, errors inside a stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from disagg_sim.api_error import ApiError, Dead
from disagg_sim.request import EngineDeadError, LogprobEntry
from disagg_sim.vocabulary import decode


def fingerprint(version: str) -> str:
    """vLLM's system_fingerprint."""
    return f"vllm-{version}-sim"


def usage(prompt: int, completion: int, cached: int | None = None, created: int | None = None) -> dict[str, Any]:
    """vLLM's UsageInfo; ``cached`` where prompt token details are on, and ``created`` on the chat route (0.26)."""
    details = None if cached is None else {"cached_tokens": cached}
    if details is not None and created is not None:
        details["created_cache_tokens"] = created
    return {
        "prompt_tokens": prompt,
        "total_tokens": prompt + completion,
        "completion_tokens": completion,
        "prompt_tokens_details": details,
    }


def without_none(value: dict[str, Any]) -> dict[str, Any]:
    """pydantic's exclude_none, one level into dictionaries."""
    return {
        key: without_none(inner) if isinstance(inner, dict) else inner
        for key, inner in value.items()
        if inner is not None
    }


def completion_logprobs(
    ids: Sequence[int], entries: Sequence[LogprobEntry | None], top: int, offset: int = 0
) -> dict[str, Any]:
    """The logprobs object of /v1/completions; ``offset`` is the length of the text before."""
    out: dict[str, list[Any]] = {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}
    for number, entry in zip(ids, entries, strict=True):
        token = decode([number])
        out["text_offset"].append(offset)
        out["tokens"].append(token)
        offset += len(token)
        if entry is None:
            out["token_logprobs"].append(None)
            out["top_logprobs"].append(None)
        else:
            out["token_logprobs"].append(max(entry[number][0], -9999.0))
            shown = list(entry.items())[: top + 1]
            out["top_logprobs"].append({decode([other]): max(value, -9999.0) for other, (value, _) in shown})
    return out


def chat_logprobs(ids: Sequence[int], entries: Sequence[LogprobEntry | None], top: int) -> dict[str, Any]:
    """The logprobs object of /v1/chat/completions."""
    content = []
    for number, entry in zip(ids, entries, strict=True):
        shown = list((entry or {}).items())[:top] if top else []
        chosen = entry[number][0] if entry else -9999.0
        content.append(
            {**_chat_token(number, chosen), "top_logprobs": [_chat_token(other, value) for other, (value, _) in shown]}
        )
    return {"content": content}


def _chat_token(number: int, logprob: float) -> dict[str, Any]:
    token = decode([number])
    return {"token": token, "logprob": max(logprob, -9999.0), "bytes": list(token.encode())}


def prompt_logprobs(entries: Sequence[LogprobEntry | None] | None) -> list[dict[str, Any] | None] | None:
    """vLLM's own prompt_logprobs field."""
    if entries is None:
        return None
    return [
        None
        if entry is None
        else {
            str(number): {"logprob": value, "rank": rank, "decoded_token": decode([number])}
            for number, (value, rank) in entry.items()
        }
        for entry in entries
    ]


def stream_error(error: ApiError | EngineDeadError) -> dict[str, Any]:
    """What an event stream carries when it fails after its 200: an error object as data."""
    return (error if isinstance(error, ApiError) else Dead(str(error))).info()
