"""``openai/prepare.py`` on arbitrary bytes, for every generation route.

Holds: nothing but a :class:`ProxyError` of 4xx or 501 is raised. Where bodies come out, prefill's is strict JSON, asks
for exactly one token for each choice as vLLM's request models would read it (by pydantic, in either of the two ways in
which its versions combine the limits) unless they would refuse it, streams only for forced tools, and has every
field that the proxy does not own as the client sent it; decode's is the client's own but for the steering fields; the
drain is prefill's with one token; and what the project's own connector needs can be put in front of both.
"""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel, ValidationError

from disagg_proxy.connectors.disagg_kv import for_decode, for_prefill
from disagg_proxy.errors import ProxyError, answer_of
from disagg_proxy.openai.fields import COMPLETIONS, MESSAGES, ROUTES, Route, forces_tool
from disagg_proxy.openai.prepare import Prepared, prepare

OWN = {"max_tokens", "max_completion_tokens", "min_tokens", "stream", "stream_options"}
"""Fields that prefill may get changed."""

STEERING = ("kv_transfer_params", "request_id")

SEEDS = [
    route + body
    for route in (b"\0", b"\1", b"\2")
    for body in (
        b'{"model": "m", "prompt": "x", "max_tokens": 8, "n": 2, "stream": true, "stream_options": {}}',
        b'{"prompt": [[1, 2], [3]], "max_tokens": "5.0", "min_tokens": 2, "echo": true, "logprobs": 0}',
        b'{"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}], "max_completion_tokens": 0}',
        b'{"messages": [], "tools": [], "tool_choice": {"type": "any"}, "max_tokens": true}',
        b'{"messages": [{"content": [{"type": "image_url", "image_url": {"url": "data:x"}}]}], "top_logprobs": null}',
        b'{"messages": [{"content": [{"type": "tool_result", "content": [{"source": {"url": "h"}}]}]}]}',
        b'{"vllm_xargs": {"kv_transfer_params": {}}, "request_id": "x", "prompt": "\\ud800"}',
        b'{"prompt": "x", "max_tokens": 1, "prompt_logprobs": 0, "temperature": 1e999}',
        '{"prompt": "é", "max_tokens": null}'.encode("utf-16"),
    )
]

WORDS = [
    *(
        f'"{name}":'.encode()
        for name in (*sorted(OWN), *STEERING, "model", "prompt", "messages", "content", "type", "n")
    ),
    *(
        f'"{name}":'.encode()
        for name in ("echo", "logprobs", "top_logprobs", "prompt_logprobs", "tool_choice", "system")
    ),
    *(f'"{name}":'.encode() for name in ("use_beam_search", "prompt_embeds", "chat_template", "chat_template_kwargs")),
    *(
        b"1e999",
        b"-0.0",
        b"1.0",
        b'"1"',
        b'"1_0"',
        b"null",
        b"true",
        b"false",
        b"[]",
        b"{}",
        b'""',
        b"-1",
        b"1E2",
        b"9" * 30,
    ),
    *(
        b'"\\ud800"',
        b"\xef\xbb\xbf",
        b"NaN",
        b'"required"',
        b'{"type":"tool"}',
        b'"data:"',
        b"[[[[",
        b"]]]]",
        b"\xff\xfe",
    ),
]


class Limits(BaseModel):
    """The limits as vLLM's request models declare them; they take more than JSON numbers ("5", 5.0, true)."""

    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    min_tokens: int = 0
    n: int | None = None
    stream: bool | None = False


def check(data: bytes) -> str:
    """One execution: the first byte chooses the route, the rest is the body."""
    route = ROUTES[data[0] % len(ROUTES)] if data else COMPLETIONS
    return check_body(route, data[1:])


def check_body(route: Route, raw: bytes) -> str:
    """The promises for one body; returns what became of it."""
    try:
        prepared = prepare(route, raw)
        if prepared.refusal is not None:
            raise prepared.refusal
    except ProxyError as error:
        assert 400 <= error.status < 500 or error.status == 501, error
        json.loads(error.body())
        assert all(type(value) is bytes for _, value in answer_of(error)[1])
        return f"{error.status} {error.code}"
    if prepared.refusal is not None:
        assert prepared.refusal.status == 400
        return f"400 {prepared.refusal.code}"
    sent = json.loads(raw)
    for body in (for_prefill(prepared.prefill_body, "x"), for_decode(prepared.decode_body, "x", "127.0.0.1:1")):
        assert json.loads(body)["kv_transfer_params"]["transfer_id"] == "x"
    for_p, for_d, drain = (strict(b) for b in (prepared.prefill_body, prepared.decode_body, prepared.kv_release_body))
    expected = without_steering(sent)
    if route is COMPLETIONS and expected.get("max_tokens", 0) is None:
        # vLLM's default, which decode has without the field.
        del expected["max_tokens"]
    assert for_d == expected
    assert {k: v for k, v in for_p.items() if k not in OWN} == {k: v for k, v in for_d.items() if k not in OWN}
    for body, leg in (
        (for_p, for_prefill(prepared.prefill_body, "id")),
        (for_d, for_decode(prepared.decode_body, "id", "a:1")),
    ):
        with_params = strict(leg)
        assert with_params.pop("kv_transfer_params")["transfer_id"] == "id" and with_params == body
    assert drain["max_tokens"] == 1 and drain.get("prompt") == for_d.get("prompt") and drain.get("n") == for_d.get("n")
    assert drain.get("messages") == for_d.get("messages")
    return "refused by prefill" if not one_token(route, for_p, prepared, for_d) else "served"


def strict(body: bytes) -> dict[str, Any]:
    """JSON as RFC 8259 has it: no NaN, no infinity."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is sent to an instance")

    value: dict[str, Any] = json.loads(body, parse_constant=refuse, parse_float=finite)
    return value


def finite(text: str) -> float:
    """A number that every reader takes for the same."""
    value = float(text)
    assert abs(value) != float("inf"), f"{text[:40]} is sent to an instance, which reads infinity"
    return value


def without_steering(body: dict[str, Any]) -> dict[str, Any]:
    """The client's body less what may reach no instance."""
    kept = {k: v for k, v in body.items() if k not in STEERING}
    if isinstance(kept.get("vllm_xargs"), dict):
        kept["vllm_xargs"] = {k: v for k, v in kept["vllm_xargs"].items() if k not in STEERING}
    return kept


def one_token(route: Route, for_p: dict[str, Any], prepared: Prepared, for_d: dict[str, Any]) -> bool:
    """Whether vLLM would take prefill's body; then it asks for one token, of as many choices as decode's."""
    try:
        limits = Limits.model_validate(for_p)
    except ValidationError:
        return False
    found = {limits.max_tokens}
    if route.dialect == "chat":
        most = limits.max_completion_tokens
        found = {most or limits.max_tokens, limits.max_tokens if most is None else most}
    if route is MESSAGES and found == {None}:
        return False
    assert all(limit is not None and limit <= 1 for limit in found), f"prefill is asked for {found} tokens: {for_p}"
    assert limits.min_tokens <= 1, for_p
    assert bool(limits.stream) == forces_tool(route, for_d), for_p
    # vLLM's /v1/messages has no `n`.
    choices = 1 if limits.n is None or route is MESSAGES else limits.n
    assert prepared.choices == choices or choices < 1, f"{choices} choices are counted as {prepared.choices}"
    return True
