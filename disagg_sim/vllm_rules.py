"""Where vLLM versions differ in what a simulated engine imitates. Read in the sources of 0.21 - 0.28 and 0.30 - 0.33;
/v1/responses in 0.19 too.

docs/engine-behaviour.md has the same table. Everything else is as in 0.21.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

WITH_P2P_NCCL = "0.21.0"
"""The default version of engines with P2pNcclConnector, on which it was measured; 0.24 removed it."""
NEWEST = "0.33.0"
"""The default version of all others."""


@dataclass(frozen=True)
class VllmRules:
    """The rules of one version.

    Attributes:
        null_max_tokens_is_default: ``max_tokens: null`` on /v1/completions means 16; before, the rest of the context
            (0.24, ``openai/completion/protocol.py``, ``normalize_null_max_tokens``).
        reports_no_hits: usage says ``cached_tokens`` 0; before, it then has no ``prompt_tokens_details`` (0.24).
        messages_cache: /v1/messages reports what was cached, and subtracts it from ``input_tokens`` (0.24,
            ``anthropic/serving.py``; ``cache_creation_input_tokens`` is 0).
        created_tokens: chat reports ``created_cache_tokens``, /v1/messages ``cache_creation_input_tokens`` (0.26).
        reads_thinking: /v1/messages reads ``thinking`` and checks its budget (0.31, ``anthropic/protocol.py``,
            ``validate_thinking_budget``); before, the field is ignored.
        responses_transfer_kv: /v1/responses takes ``kv_transfer_params`` (0.19, ``openai/responses/protocol.py``);
            before, they are an unknown field.
        responses_cache_writes: its usage has ``cache_write_tokens`` (0.31).
        responses_incomplete: an answer that ``max_output_tokens`` ends is streamed to ``response.incomplete`` (0.33,
            ``openai/responses/serving.py``); before, to ``response.completed``.
        chat_billing: chat leaves Claude Code's billing header out of system messages (0.32,
            ``renderers/chat_utils.py``, ``_strip_claude_code_billing_header``); /v1/messages does so in all versions.
        kv_cache_size_label: ``vllm:cache_config_info`` has the label ``kv_cache_size_tokens`` (``config/cache.py``, in
            0.27.1 and 0.32; older versions were not read).
    """

    null_max_tokens_is_default: bool
    reports_no_hits: bool
    messages_cache: bool
    created_tokens: bool
    reads_thinking: bool
    responses_transfer_kv: bool
    responses_cache_writes: bool
    responses_incomplete: bool
    chat_billing: bool
    kv_cache_size_label: bool


def parse_version(version: str) -> tuple[int, int]:
    """Major and minor number.

    Raises:
        ValueError: ``version`` does not begin with two numbers.
    """
    found = re.match(r"(\d+)\.(\d+)(?:$|\.)", version)
    if found is None:
        raise ValueError(version)
    return int(found[1]), int(found[2])


@lru_cache
def rules_of(version: str) -> VllmRules:
    """The rules of a version such as 0.33.0."""
    number = parse_version(version)
    since_24 = number >= (0, 24)
    return VllmRules(
        null_max_tokens_is_default=since_24,
        reports_no_hits=since_24,
        messages_cache=since_24,
        created_tokens=number >= (0, 26),
        reads_thinking=number >= (0, 31),
        responses_transfer_kv=number >= (0, 19),
        responses_cache_writes=number >= (0, 31),
        responses_incomplete=number >= (0, 33),
        chat_billing=number >= (0, 32),
        kv_cache_size_label=number >= (0, 27),
    )
