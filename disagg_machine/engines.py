"""Which engines run: vLLM's or simulated ones, and with which KV connector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from disagg_machine import gpus, vllm_facts
from disagg_machine.context import Context
from disagg_machine.gpus import Gpu
from disagg_machine.kv_bytes import why_unsupported
from disagg_machine.layout import Layout
from disagg_machine.messages import die, text
from disagg_machine.settings import Settings
from disagg_machine.vllm_facts import VllmFacts

VLLM, SIM = "vllm", "sim"


@dataclass(frozen=True, slots=True)
class Engines:
    """What runs as engines.

    Attributes:
        kind: ``vllm`` or ``sim``.
        why: why they are simulated, in words.
        vllm: the vLLM that is used; None for simulated ones.
        connector: ``p2p_nccl`` or ``own``. Simulated engines speak p2p_nccl.
    """

    kind: str
    why: str = ""
    vllm: VllmFacts | None = None
    connector: str = "p2p_nccl"

    @property
    def simulated(self) -> bool:
        """Whether no model runs."""
        return self.kind == SIM

    @property
    def own_connector(self) -> bool:
        """Whether KV moves through this project's connector."""
        return self.connector == "own"


def resolve(context: Context) -> Engines:
    """Decide between vllm and sim.

    What is missing is an error with ENGINE=vllm. With auto, two GPUs and a vLLM that cannot be used are one too:
    simulated engines are not what that user came for.

    Raises:
        MachineError: 1, with the remedy.
    """
    settings = context.settings
    if settings.engine == SIM:
        return Engines(SIM, text("why_asked"))
    found = gpus.read_gpus(context.environ)
    if len(found) < 2:
        if settings.engine == "auto":
            return Engines(SIM, text("why_gpus", len(found)))
        if not (settings.allow_shared_gpu and found):
            raise die(1, "too_few_gpus", len(found))
    facts = vllm_facts.find_vllm(context)
    if facts is None:
        if settings.engine == "auto":
            return Engines(SIM, text("why_no_vllm"))
        raise die(1, "no_vllm")
    return with_vllm(settings, facts, context.environ)


def with_vllm(settings: Settings, facts: VllmFacts, environ: Mapping[str, str]) -> Engines:
    """vLLM engines with the connector that suits this vLLM.

    Raises:
        MachineError: 1, this vLLM cannot serve with it, or it cannot move the model's KV.
    """
    connector = vllm_facts.choose_connector(facts, settings.kv_connector)
    problem = vllm_facts.problem(facts, connector, settings.engine_host)
    if problem:
        raise die(1, *problem)
    if connector == "own" and (reason := why_unsupported(settings.model, settings.extra_prefill_args, environ)):
        raise die(1, "model_unsupported", settings.model, reason)
    return Engines(VLLM, vllm=facts, connector=connector)


def connector_shown(connector: str) -> str:
    """The connector's name for people."""
    return text("connector_own") if connector == "own" else "P2pNcclConnector"


def check_gpus(settings: Settings, engines: Engines, layout: Layout, found: Sequence[Gpu]) -> None:
    """For vllm: the GPUs exist, and no prefill shares one with a decode (NCCL refuses two ranks on one GPU).

    Raises:
        MachineError: 1, naming the GPU.
    """
    if engines.simulated:
        return
    role_of: dict[int, str] = {}
    for place in layout.engines:
        for word in place.gpus:
            gpu = gpus.find(list(found), word)
            if gpu is None:
                raise die(1, "no_such_gpu", word, place.name, " ".join(str(one.index) for one in found))
            if role_of.get(gpu.index, place.role) != place.role and not settings.allow_shared_gpu:
                raise die(1, "gpu_shared", gpu.index)
            role_of[gpu.index] = place.role
