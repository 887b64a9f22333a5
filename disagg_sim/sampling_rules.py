"""From a JSON body to checked sampling parameters: vLLM 0.21's rules, in vLLM's order, with vLLM's words.

Sources: ``openai/completion/protocol.py``, ``openai/chat_completion/protocol.py``, ``sampling_params.py``,
``renderers/params.py`` (context length), ``v1/engine/input_processor.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from disagg_sim.api_error import InvalidBody, Raised
from disagg_sim.guided import choice_guide, json_guide
from disagg_sim.request import Sampling
from disagg_sim.text import Guide
from disagg_sim.vocabulary import VOCAB_SIZE

_INT = (int,)
_NUMBER = (int, float)
_TYPES: dict[str, tuple[type, ...]] = {
    "model": (str,),
    "max_tokens": _INT,
    "max_completion_tokens": _INT,
    "min_tokens": _INT,
    "n": _INT,
    "temperature": _NUMBER,
    "top_p": _NUMBER,
    "top_k": _INT,
    "seed": _INT,
    "stop": (str, list),
    "stop_token_ids": (list,),
    "stream": (bool,),
    "stream_options": (dict,),
    "echo": (bool,),
    "top_logprobs": _INT,
    "prompt_logprobs": _INT,
    "truncate_prompt_tokens": _INT,
    "ignore_eos": (bool,),
    "use_beam_search": (bool,),
    "add_generation_prompt": (bool,),
    "continue_final_message": (bool,),
    "chat_template_kwargs": (dict,),
    "response_format": (dict,),
    "structured_outputs": (dict,),
    "kv_transfer_params": (dict,),
    "request_id": (str,),
    "tools": (list,),
    "return_token_ids": (bool,),
    "include_stop_str_in_output": (bool,),
}
_NOT_NULL = ("min_tokens", "use_beam_search", "request_id", "ignore_eos")
_MOST_LOGPROBS = 20


def check_fields(body: Mapping[str, Any]) -> None:
    """Types, and the rules that vLLM's request models share.

    Raises:
        InvalidBody: naming the field.
    """
    for name, types in _TYPES.items():
        value = body.get(name)
        if name not in body or (value is None and name not in _NOT_NULL):
            continue
        wrong = isinstance(value, bool) and bool not in types
        if wrong or not isinstance(value, types):
            kind = " or ".join(t.__name__ for t in types)
            raise InvalidBody(f"[{{'loc': ('body', '{name}'), 'msg': 'Input should be a valid {kind}'}}]", param=name)
    if body.get("stream_options") and not body.get("stream"):
        raise InvalidBody("Stream options can only be defined when `stream=True`.", param="stream_options")
    prompt_logprobs = body.get("prompt_logprobs")
    if prompt_logprobs is not None:
        if body.get("stream") and (prompt_logprobs > 0 or prompt_logprobs == -1):
            raise InvalidBody("`prompt_logprobs` are not available when `stream=True`.", param="prompt_logprobs")
        if prompt_logprobs < -1:
            raise InvalidBody("`prompt_logprobs` must be a positive value or -1.", param="prompt_logprobs")
    form = body.get("response_format")
    if form is not None:
        if form.get("type") not in ("text", "json_object", "json_schema", "structural_tag"):
            raise InvalidBody("response_format.type is not known.", param="response_format")
        if form["type"] == "json_schema" and not isinstance(form.get("json_schema"), dict):
            raise InvalidBody(
                "When response_format type is 'json_schema', the 'json_schema' field must be provided.",
                param="response_format",
            )
    structured = body.get("structured_outputs")
    if structured is not None and sum(structured.get(key) is not None for key in ("json", "regex", "choice")) > 1:
        raise InvalidBody("You can only use one kind of constraints for structured outputs.")


def fit_prompt(ids: list[int], body: Mapping[str, Any], max_output: int | None, max_model_len: int) -> list[int]:
    """Truncate as requested and check the length: prompt and requested output together must fit.

    ``truncate_prompt_tokens: -1`` cuts to what ``max_output`` leaves, so the cut depends on max_tokens.

    Raises:
        Raised: when they do not fit.
    """
    available = max_model_len - (max_output or 0)
    limit = body.get("truncate_prompt_tokens")
    if limit is not None:
        keep = available if limit < 0 else limit
        ids = ids[-keep:] if 0 < keep < len(ids) else ids if keep > 0 else []
    if len(ids) > available:
        total = len(ids) + (max_output or 0)
        raise Raised(
            f"This model's maximum context length is {max_model_len} tokens. However, you requested "
            f"{max_output or 0} output tokens and your prompt contains {len(ids)} input tokens, for a total of "
            f"{total} tokens. Please reduce the length of the input prompt or the number of requested output tokens.",
            param="input_tokens",
        )
    return ids


def check_prompt(ids: list[int], max_model_len: int) -> None:
    """What the engine itself checks, after a stream's headers are out.

    Raises:
        Raised: for an empty prompt, one that leaves no room, or an unknown token.
    """
    if not ids:
        raise Raised("The decoder prompt cannot be empty")
    if len(ids) >= max_model_len:
        raise Raised(
            f"The decoder prompt (length {len(ids)}) plus the number of requested output tokens (at least 1) is longer "
            f"than the maximum model length of {max_model_len}."
        )
    if max(ids) >= VOCAB_SIZE:
        raise Raised(f"Token id {max(ids)} is out of vocabulary")


def sampling_of(
    body: Mapping[str, Any],
    *,
    max_tokens: int,
    logprobs: int | None,
    prompt_logprobs: int | None,
    guide: Guide | None,
) -> Sampling:
    """Build and check the parameters as ``SamplingParams`` does.

    Raises:
        Raised: with vLLM's message.
    """
    n = 1 if body.get("n") is None else body["n"]
    temperature = 1.0 if body.get("temperature") is None else body["temperature"]
    top_p = 1.0 if body.get("top_p") is None else body["top_p"]
    min_tokens = body.get("min_tokens", 0)
    stop = body.get("stop") or []
    stop = [stop] if isinstance(stop, str) else stop
    if not 1 <= n <= 16384:
        raise Raised(f"n must be at least 1, got {n}.")
    if temperature < 0:
        raise Raised(f"temperature must be non-negative, got {temperature}.", param="temperature")
    if not 0 < top_p <= 1:
        raise Raised(f"top_p must be in (0, 1], got {top_p}.", param="top_p")
    if max_tokens < 1:
        raise Raised(f"max_tokens must be at least 1, got {max_tokens}.", param="max_tokens")
    if min_tokens < 0:
        raise Raised(f"min_tokens must be greater than or equal to 0, got {min_tokens}.")
    if min_tokens > max_tokens:
        raise Raised(f"min_tokens must be less than or equal to max_tokens={max_tokens}, got {min_tokens}.")
    if any(not isinstance(text, str) or not text for text in stop):
        raise Raised("stop cannot contain an empty string.")
    beam_search = bool(body.get("use_beam_search"))
    if temperature < 1e-5 and n > 1 and not beam_search:
        raise Raised(f"n must be 1 when using greedy sampling, got {n}.")
    for name, value in (("logprobs", logprobs), ("prompt_logprobs", prompt_logprobs)):
        if value is not None and value > _MOST_LOGPROBS:
            raise Raised(
                f"Requested {name} of {value}, which is greater than max allowed: {_MOST_LOGPROBS}", param=name
            )
    return Sampling(
        max_tokens=max_tokens,
        n=n,
        min_tokens=min_tokens,
        stop=tuple(stop),
        stop_token_ids=tuple(body.get("stop_token_ids") or ()),
        include_stop=bool(body.get("include_stop_str_in_output")),
        ignore_eos=bool(body.get("ignore_eos")),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        guide=guide,
        beam_search=beam_search,
        kv_transfer=body.get("kv_transfer_params"),
    )


def format_guide(body: Mapping[str, Any]) -> Guide | None:
    """The grammar that ``response_format`` or ``structured_outputs`` asks for."""
    form = body.get("response_format") or {}
    if form.get("type") == "json_object":
        return json_guide(None)
    if form.get("type") == "json_schema":
        return json_guide(form["json_schema"].get("schema"))
    structured = body.get("structured_outputs") or {}
    if structured.get("choice"):
        return choice_guide(structured["choice"])
    if isinstance(structured.get("json"), dict):
        return json_guide(structured["json"])
    return json_guide(None) if structured.get("json_object") else None
