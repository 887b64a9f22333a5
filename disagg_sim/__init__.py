"""Simulated vLLM prefill and decode engines: they need no GPU, transfer KV over real sockets, and fail as vLLM does.

In tests: :class:`SimEngine` with a :class:`SimConfig` and its ``faults``; :func:`expected_text` is the right answer.
As processes: ``python -m disagg_sim --help``. With a proxy, under load and faults: :mod:`disagg_sim.chaos`.
"""

from disagg_sim.config import SimConfig, SimConfigError
from disagg_sim.engine import SimEngine
from disagg_sim.exchange import RecordedRequest
from disagg_sim.faults import Faults
from disagg_sim.template import expected_chat_text, render_chat
from disagg_sim.text import expected_ids, expected_text
from disagg_sim.vocabulary import decode, encode

__all__ = [
    "Faults",
    "RecordedRequest",
    "SimConfig",
    "SimConfigError",
    "SimEngine",
    "decode",
    "encode",
    "expected_chat_text",
    "expected_ids",
    "expected_text",
    "render_chat",
]
