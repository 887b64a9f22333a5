"""Simulated vLLM prefill and decode engines: real sockets, real KV hand-over, the real engines' failures.

In tests: :class:`SimEngine` with a :class:`SimConfig`, its ``faults``, and :func:`expected_text` for what is right.
As processes: ``python -m disagg_sim --help``.
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
