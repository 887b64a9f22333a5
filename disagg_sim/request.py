"""What the HTTP side hands to the step loop, and what comes back.

Ids are vLLM's: ``cmpl-{X-Request-Id}-{prompt}``, ``chatcmpl-{X-Request-Id}``, ``{i}_`` in front for the i-th of n
(vLLM 0.21 ``completion/serving.py``, ``chat_completion/serving.py``, ``v1/engine/parallel_sampling.py``).
"""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from disagg_sim.text import Answer, Guide

_DECODE = re.compile(r"___decode_addr_(.*):(\d+)")
_PREFILL = re.compile(r"___prefill_addr_(.*):(\d+)___")


class EngineDeadError(Exception):
    """The engine has died; every request that it had and every later one ends so."""

    def __init__(self) -> None:
        super().__init__("EngineCore encountered an issue. See stack trace (above) for the root cause.")


class WorkerError(Exception):
    """What kills the engine: an exception in the worker's forward pass or in the scheduler."""


def peer_address(request_id: str, *, is_prefill: bool) -> str:
    """The KV address of the other engine in a request id (``P2pNcclConnector.parse_request_id``).

    Raises:
        WorkerError: when the id holds none; in vLLM a ValueError in the worker.
    """
    match = (_DECODE if is_prefill else _PREFILL).search(request_id)
    if match is None:
        raise WorkerError(f"ValueError: Request id {request_id} does not contain hostname and port")
    return f"{match.group(1)}:{match.group(2)}"


@dataclass(frozen=True)
class Sampling:
    """The checked sampling parameters of one request, in vLLM's names."""

    max_tokens: int
    n: int = 1
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    guide: Guide | None = None
    beam_search: bool = False
    kv_transfer: Mapping[str, Any] | None = None
    """The request's kv_transfer_params; P2pNcclConnector does not read them."""


LogprobEntry = dict[int, tuple[float, int]]
"""Token id to (log probability, rank)."""


@dataclass(frozen=True)
class Token:
    """One generated token; ``finish_reason`` is "stop" or "length" on the last one."""

    id: int
    logprobs: LogprobEntry | None = None
    finish_reason: str | None = None
    stop_reason: int | None = None


@dataclass(frozen=True)
class ReceivedKv:
    """KV of a prompt that decode received from prefill.

    Attributes:
        seed: bytes that determine the answer (:mod:`disagg_sim.text`).
        garbage: part of the KV belongs to another prompt, so every token of the answer is wrong.
    """

    seed: bytes
    garbage: bool


@dataclass(eq=False)
class EngineRequest:
    """One sequence inside the engine. ``outputs`` gets a ``(request, Token or exception)`` per step."""

    id: str
    prompt_ids: list[int]
    sampling: Sampling
    outputs: asyncio.Queue[tuple[EngineRequest, Token | EngineDeadError]]
    prompt_index: int = 0
    index: int = 0
    arrived: float = field(default_factory=time.monotonic)

    # Owned by the step loop and the connector.
    answer: Answer | None = None
    prefilled: int = 0
    generated: int = 0
    local_cached: int = 0
    external_tokens: int = 0
    finished: bool = False
    prompt_logprobs: list[LogprobEntry | None] | None = None
    allocated: bool = False
    """Its blocks in the KV cache are allocated."""
    preempted: bool = False
    """It gave its blocks up for older requests, and its prompt is computed again (``v1/core/sched/scheduler.py``)."""
    load_ended: bool = False
    """A load outside of steps has ended, with KV or without."""
    received: ReceivedKv | None = None
    """KV that came from prefill."""
    kv_transfer: dict[str, Any] | None = None
    """The answer's kv_transfer_params, on prefill with NixlConnector or MoRIIOConnector."""

    @property
    def prompt_complete(self) -> bool:
        """Whether the KV of the complete prompt is there, computed or loaded."""
        return self.prefilled == len(self.prompt_ids)

    @property
    def cached_tokens(self) -> int:
        """What vLLM reports as cached: on decode that counts the tokens whose KV came from prefill."""
        return self.local_cached + self.external_tokens


def engine_ids(request_id: str, n: int, *, randomize: bool) -> list[str]:
    """The engine's ids of one external id: itself, or one child per sequence.

    ``randomize`` appends eight hex digits, as vLLM >= 0.14 does unless VLLM_DISABLE_REQUEST_ID_RANDOMIZATION is set.
    """
    if randomize:
        request_id = f"{request_id}-{uuid.uuid4().hex[:8]}"
    return [request_id] if n == 1 else [f"{index}_{request_id}" for index in range(n)]
