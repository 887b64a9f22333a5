"""Which vLLM is on this machine and what it can do."""

from __future__ import annotations

from dataclasses import dataclass

from disagg_machine.context import Context

OWN_OLDEST, OWN_NEWEST = 21, 33
"""Minor versions of vLLM 0.x that disagg_kv/engine/versions.py accepts, and was tried with."""


@dataclass(frozen=True, slots=True)
class VllmFacts:
    """One vLLM.

    Attributes:
        version: such as ``0.21.0``.
        connector: P2pNcclConnector is in tree (removed in 0.24.0, vllm-project/vllm#44854).
        randomises: engines put a random suffix to the request id (from 0.14.0 on).
        switch: VLLM_DISABLE_REQUEST_ID_RANDOMIZATION exists (vllm-project/vllm#34415; not in 0.14.0).
        command: the words that start its command line.
        python: its interpreter; empty when unknown.
    """

    version: str
    connector: bool = False
    randomises: bool = False
    switch: bool = False
    command: tuple[str, ...] = ("vllm",)
    python: str = ""

    def at_least(self, major: int, minor: int) -> bool:
        """Whether it is this version of vLLM or newer; a version that cannot be read is."""
        raise NotImplementedError


def find_vllm(context: Context) -> VllmFacts | None:
    """PYTHON's own vLLM when PYTHON was given; else `vllm` on PATH, then the Pythons that are at hand."""
    raise NotImplementedError


def choose_connector(facts: VllmFacts, setting: str) -> str:
    """``p2p_nccl`` or ``own``: vLLM's own connector as long as it is in tree, unless KV_CONNECTOR says otherwise."""
    raise NotImplementedError


def problem(facts: VllmFacts, connector: str, engine_host: str) -> tuple[str, ...]:
    """Why this vLLM cannot serve with this connector, as message key and arguments; empty when it can."""
    raise NotImplementedError
