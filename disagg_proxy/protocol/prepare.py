"""From the client's bytes to the bodies of the legs. Pure; the rules themselves are in ``fields``.

The body is read with the standard library's ``json``, as vLLM's server does: duplicate keys, NaN and lone
surrogates then mean the same to the proxy and to both engines. Decode gets the client's own bytes unless a field in
them must not pass.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from disagg_proxy.errors import BadRequest, UnsupportedField
from disagg_proxy.protocol.fields import (
    PREFILL_VALUES,
    REFUSALS,
    REMOVED_ON_PREFILL,
    STRIPPED,
    Body,
    Route,
)


@dataclass(frozen=True, slots=True)
class Prepared:
    """One request ready for its legs.

    Attributes:
        model: the model asked for, None for the instances' default.
        prefill_body, decode_body, drain_body: JSON for each leg; the drain decodes one token of the same prompt.
    """

    model: str | None
    prefill_body: bytes
    decode_body: bytes
    drain_body: bytes


def prepare(route: Route, raw: bytes) -> Prepared:
    """Read, check and split one request.

    Raises:
        BadRequest: not JSON, not an object, or a model that is no name.
        UnsupportedField: a field that the pair cannot serve.
    """
    body = parse_object(raw)
    model = model_of(body)
    for refusal in REFUSALS:
        if refusal.applies(body):
            raise UnsupportedField(refusal.message, param=refusal.field)
    if any(name in body for name in STRIPPED):
        for name in STRIPPED:
            body.pop(name, None)
        raw = encode(body)
    prefill_body = encode(for_prefill(route, body))
    return Prepared(model, prefill_body, raw, prefill_body)


def for_prefill(route: Route, body: Body) -> Body:
    """The body that makes prefill compute the prompt and one token per choice, and no more."""
    changed = {name: value for name, value in body.items() if name not in REMOVED_ON_PREFILL}
    changed.update(PREFILL_VALUES)
    for name in route.limits:
        # A limit below 1 is left for prefill to refuse, or, with echo, to read as vLLM reads it.
        if not _below_one(body.get(name)):
            changed[name] = 1
    return changed


def _below_one(value: Any) -> bool:
    return type(value) is int and value < 1


def parse_object(raw: bytes) -> Body:
    """A JSON object from bytes.

    Raises:
        BadRequest: with what is wrong and where.
    """
    if not raw.strip():
        raise BadRequest("The body is empty; it must be a JSON object.")
    try:
        body = json.loads(raw)
    except RecursionError:
        raise BadRequest("The JSON body is nested too deeply.") from None
    except ValueError as error:
        raise BadRequest(f"The body is not valid JSON: {error}.") from None
    if not isinstance(body, dict):
        raise BadRequest(f"The body must be a JSON object, not {_json_name(body)}.")
    return body


def model_of(body: Body) -> str | None:
    """The model asked for; vLLM takes its default for an absent, null or empty one."""
    model = body.get("model")
    if model is not None and not isinstance(model, str):
        raise BadRequest(f"model must be a string, not {_json_name(model)}.", param="model")
    return model or None


def encode(body: Body) -> bytes:
    """Compact JSON; ASCII only, so that any character survives."""
    return json.dumps(body, separators=(",", ":")).encode()


def _json_name(value: object) -> str:
    if isinstance(value, bool):
        return "a boolean"
    names: dict[type, str] = {list: "an array", str: "a string", int: "a number", float: "a number", dict: "an object"}
    return names.get(type(value), "null")
