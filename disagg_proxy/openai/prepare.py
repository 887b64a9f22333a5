"""From the client's bytes to the bodies of both legs. Pure; the rules are in ``fields`` and ``unsupported``.

The body means the same to the proxy and to both engines: it is parsed as the standard library's ``json`` does, like
vLLM's server. msgspec parses most bodies faster, with the same result; what it refuses is parsed again by ``json``,
which accepts other encodings and lone surrogates, and provides the error messages. Decode gets the client's own bytes
unless a field must be removed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any, NamedTuple, NoReturn

import msgspec

from disagg_proxy.errors import BadRequest, NotServed, ProxyError, UnsupportedField
from disagg_proxy.openai import unsupported
from disagg_proxy.openai.fields import (
    RESPONSES,
    Body,
    Route,
    drop_null_limit,
    for_kv_release,
    for_prefill,
    lax_int,
    responses_for_prefill,
    strip,
)
from disagg_proxy.openai.lazy_json import LONG, read, size_of
from disagg_proxy.openai.media import take_out
from disagg_proxy.openai.prefix_hash import NO_AFFINITY, Affinity, AffinityNeeds, affinity


class PromptSize(NamedTuple):
    """The size of a request's prompts, for :class:`disagg_proxy.admission.token_estimate.TokenEstimator`. Every choice
    of ``n`` counts.

    Attributes:
        token_ids: given as such. text: bytes. media: images, sounds, videos and documents.
    """

    token_ids: int = 0
    text: int = 0
    media: int = 0


NO_PROMPT = PromptSize()


@dataclass(slots=True)
class Prepared:
    """One request, ready for its legs. Not frozen: that would cost 2 µs per request.

    Attributes:
        model: the requested model, None for the instances' default.
        prefill_body, decode_body: JSON for each leg.
        choices: how many choices each prompt gets; 1 when the field holds no number.
        prefill_answers: prefill's answer is the client's; decode only frees the KV.
        streams: whether the client requested a stream.
        prompt: the size of its prompts.
        refusal: why a pair cannot serve it; one engine alone could.
        affinity: as far as the policies need it.
        limit: the client's ``max_tokens``; 0 when that is no number.
        prompts: how many prompts there are.
    """

    model: str | None
    prefill_body: bytes
    decode_body: bytes
    choices: int = 1
    prefill_answers: bool = False
    limit: int = 0
    streams: bool = True
    prompt: PromptSize = NO_PROMPT
    refusal: ProxyError | None = None
    affinity: Affinity = NO_AFFINITY
    prompts: int = 1

    @property
    def kv_release_body(self) -> bytes:
        """The body of a KV release. Created on demand, since it is rarely needed."""
        return encode(for_kv_release(json.loads(self.prefill_body)))

    def forget_bodies(self) -> None:
        """Drop the bodies once the answer streams, so that a long prompt does not stay in memory until its end.

        All attempts of a request share one object; an attempt that still has KV to release keeps :meth:`for_release`.
        """
        self.prefill_body = self.decode_body = b""

    def for_release(self) -> Prepared:
        """A copy for the KV release of an attempt, which :meth:`forget_bodies` does not affect.

        It shares the prefill body, for :attr:`kv_release_body` and for a replayed prefill.
        """
        return replace(self, decode_body=b"")


def prepare(route: Route, raw: bytes, wanted: AffinityNeeds | None = None) -> Prepared:
    """Parse and check one request, and create the bodies of its legs.

    Args:
        wanted: what the policies need to know besides its size.

    Raises:
        BadRequest: not JSON, not an object, or a field that no version of vLLM can serve.
    """
    if len(raw) > LONG and (wanted is None or not wanted.prefix):
        try:
            return _prepare(route, raw, read(raw), wanted)
        except (msgspec.MsgspecError, ValueError, TypeError, RecursionError):
            # Parsing it completely gives the error message.
            pass
    return _prepare(route, raw, parse_object(raw), wanted)


def _prepare(route: Route, raw: bytes, body: Body, wanted: AffinityNeeds | None) -> Prepared:
    model = model_of(body)
    if route is RESPONSES:
        return _responses(model, body, encode(body) if strip(body) else raw, wanted)
    prefill_answers = unsupported.wants_prompt_logprobs(route, body)
    refusal: UnsupportedField | None = None
    try:
        unsupported.check(route, body)
        if prefill_answers and not unsupported.prefill_can_answer(route, body):
            raise unsupported.prompt_logprobs_refused(body)
    except UnsupportedField as error:
        refusal = error
    stripped = strip(body)
    if drop_null_limit(route, body) or stripped:
        raw = encode(body)
    limit = body.get("max_tokens")
    return Prepared(
        model,
        encode(for_prefill(route, body)),
        raw,
        choices_of(route, body),
        prefill_answers,
        limit if type(limit) is int else lax_int(limit) or 0,
        bool(body.get("stream")),
        prompt_size(route, body),
        refusal,
        NO_AFFINITY if wanted is None else affinity(route, body, wanted),
        prompts_of(route, body),
    )


def _responses(model: str | None, body: Body, raw: bytes, wanted: AffinityNeeds | None) -> Prepared:
    refusal: ProxyError | None = None
    try:
        unsupported.check_responses(body)
    except UnsupportedField as error:
        refusal = responses_refusal(error.message)
    limit = body.get("max_output_tokens")
    return Prepared(
        model,
        encode(responses_for_prefill(body)),
        raw,
        limit=limit if type(limit) is int else lax_int(limit) or 0,
        streams=bool(body.get("stream")),
        prompt=prompt_size(RESPONSES, body),
        refusal=refusal,
        affinity=NO_AFFINITY if wanted is None else affinity(RESPONSES, body, wanted),
    )


def responses_refusal(why: str = "") -> NotServed:
    """The 501 where no engine can serve a request for /v1/responses; ``why`` a pair cannot, as a sentence."""
    return NotServed(f"{RESPONSES.path} is not served: {unsupported.NO_RESPONSES}.{why and ' ' + why}")


def parse_object(raw: bytes) -> Body:
    """A JSON object from bytes.

    Raises:
        BadRequest: with what is wrong and where.
    """
    try:
        body = msgspec.json.decode(raw)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        body = _read_slowly(raw)
    if not isinstance(body, dict):
        raise BadRequest(f"The body must be a JSON object, not {_json_name(body)}.")
    return body


def _read_slowly(raw: bytes) -> object:
    if not raw.strip():
        raise BadRequest("The body is empty; it must be a JSON object.")
    try:
        return json.loads(raw, parse_constant=_no_constant, parse_float=_finite)
    except RecursionError:
        raise BadRequest("The JSON body is nested too deeply.") from None
    except ValueError as error:
        raise BadRequest(f"The body is not valid JSON: {error}.") from None


def _no_constant(name: str) -> NoReturn:
    """NaN and infinities are not JSON, and pass range checks of vLLM that should stop them."""
    raise ValueError(f"{name} is not a JSON value")


def _finite(text: str) -> float:
    """1e999 parses as infinity, which would reach prefill as ``Infinity`` and decode as it was sent."""
    value = float(text)
    if not isfinite(value):
        raise ValueError(f"{text[:20]} is beyond the range of numbers")
    return value


def model_of(body: Body) -> str | None:
    """The requested model; vLLM uses its default for an absent, null or empty one."""
    model = body.get("model")
    if model is not None and not isinstance(model, str):
        raise BadRequest(f"model must be a string, not {_json_name(model)}.", param="model")
    return model or None


def encode(body: Body) -> bytes:
    """Compact JSON. Lone surrogates survive, in ASCII."""
    try:
        return msgspec.json.encode(body)
    except (ValueError, OverflowError, RecursionError):
        return json.dumps(body, separators=(",", ":")).encode()


def _json_name(value: object) -> str:
    if isinstance(value, bool):
        return "a boolean"
    names: dict[type, str] = {list: "an array", str: "a string", int: "a number", float: "a number", dict: "an object"}
    return names.get(type(value), "null")


# -- the length of the prompts, without a tokenizer

_PROMPT_FIELDS = {
    "completions": ("prompt",),
    "chat": ("messages", "tools", "documents"),
    "messages": ("messages", "system", "tools"),
    "responses": ("input", "instructions", "tools"),
}
"""The fields that vLLM renders into the prompt, by dialect; it ignores those of other dialects."""


def choices_of(route: Route, body: Body) -> int:
    """Number of choices for each prompt: ``n`` as vLLM reads it, 1 where it is invalid or missing, or no field of the
    route's requests."""
    if "n" not in body or route.dialect not in ("completions", "chat"):
        return 1
    return max(1, lax_int(body["n"]) or 1)


def prompts_of(route: Route, body: Body) -> int:
    """Number of prompts: a list of texts or of lists of token ids holds several."""
    prompt = body.get("prompt") if route.dialect == "completions" else None
    return len(prompt) if isinstance(prompt, list) and prompt and type(prompt[0]) is not int else 1


def prompt_size(route: Route, body: Body) -> PromptSize:
    """The size of a request's prompts."""
    factor = choices_of(route, body)
    tokens = text = media = 0
    for name in _PROMPT_FIELDS[route.dialect]:
        value = body.get(name)
        if value is None:
            continue
        if name in ("messages", "input") and isinstance(value, list):
            value, found = take_out(value)
            media += found
        more_tokens, more_text = _measure(value)
        tokens, text = tokens + more_tokens, text + more_text
    return PromptSize(tokens * factor, text * factor, media * factor)


def _measure(value: Any) -> tuple[int, int]:
    """Lists of numbers count as token ids, strings by their UTF-8 length, containers by content."""
    tokens = text = 0
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, msgspec.Raw):
            text += size_of(item)
        elif isinstance(item, str):
            text += len(item) if item.isascii() else len(item.encode("utf-8", "surrogatepass"))
        elif isinstance(item, list):
            if item and type(item[0]) is int:
                tokens += len(item)
            else:
                waiting.extend(item)
        elif isinstance(item, dict):
            # Chat templates write the names too; without them a tool's schema has more tokens than bytes.
            waiting.extend(item)
            waiting.extend(item.values())
    return tokens, text
