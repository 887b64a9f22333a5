"""Which engines run: vLLM's or simulated ones, and with which KV connector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from disagg_machine import gpus, shared_gpu, vllm_facts
from disagg_machine.context import Context
from disagg_machine.gpus import Gpu
from disagg_machine.kv_bytes import kv_bytes_per_token, why_unsupported
from disagg_machine.layout import Layout, layout
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
        kv_cache_bytes: KV cache of each engine where prefill and decode share a GPU, else 0: vLLM takes what is free.
    """

    kind: str
    why: str = ""
    vllm: VllmFacts | None = None
    connector: str = "p2p_nccl"
    kv_cache_bytes: int = 0

    @property
    def simulated(self) -> bool:
        """Whether no model runs."""
        return self.kind == SIM

    @property
    def own_connector(self) -> bool:
        """Whether KV moves through this project's connector."""
        return self.connector == "own"


def resolve(context: Context) -> Engines:
    """Decide between vllm and sim. Where engines share a GPU, ``context.settings`` gets what follows from that.

    What is missing is an error with ENGINE=vllm. With auto, two GPUs and a vLLM that cannot be used are one too:
    simulated engines are not what that user came for.

    Raises:
        MachineError: 1, with the remedy.
    """
    settings = context.settings
    if settings.engine == SIM:
        return Engines(SIM, text("why_asked"))
    found = gpus.read_gpus(context.environ)
    settings = shared_gpu.on_one_gpu(settings, found)
    shared = bool(layout(settings).shared_gpus) and shared_gpu.may_share(settings, found)
    facts = vllm_facts.find_vllm(context) if shared or len(found) >= 2 else None
    if len(found) < 2 and not (shared and (facts is None or vllm_facts.can_share_gpu(facts, settings.kv_connector))):
        if settings.engine == "auto":
            return Engines(SIM, text("why_gpus", len(found)))
        raise die(1, "too_few_gpus", len(found))
    if facts is None:
        if settings.engine == "auto":
            return Engines(SIM, text("why_no_vllm"))
        raise die(1, "no_vllm")
    if not shared:
        return with_vllm(settings, facts, context.environ)
    chosen = with_vllm(settings, facts, context.environ, shared=True)
    if not chosen.own_connector:
        return chosen
    context.settings = settings = shared_gpu.with_small_shares(settings)
    per_token = kv_bytes_per_token(settings.model, settings.dtype, context.environ)
    return replace(chosen, kv_cache_bytes=shared_gpu.kv_cache_bytes(settings, layout(settings), found, per_token))


def with_vllm(settings: Settings, facts: VllmFacts, environ: Mapping[str, str], *, shared: bool = False) -> Engines:
    """vLLM engines with the connector that suits this vLLM.

    Args:
        shared: prefill and decode share a GPU.

    Raises:
        MachineError: 1, this vLLM cannot serve with it, or it cannot move the model's KV.
    """
    connector = vllm_facts.choose_connector(facts, settings.kv_connector, shared=shared)
    problem = vllm_facts.problem(facts, connector, settings.engine_host)
    if problem:
        raise die(1, *problem)
    if connector == "own" and (reason := model_problem(settings, facts, environ)):
        raise die(1, "model_unsupported", settings.model, reason)
    return Engines(VLLM, vllm=facts, connector=connector)


def model_problem(settings: Settings, facts: VllmFacts, environ: Mapping[str, str]) -> str:
    """Why this project's connector cannot move the model's KV with this vLLM; "" if it can, or that is not known."""
    return why_unsupported(
        settings.model, settings.extra_prefill_args, environ,
        all_sliding=facts.at_least(*vllm_facts.SEVERAL_CACHE_GROUPS),
        states=facts.at_least(*vllm_facts.RECURRENT_STATES),
    )  # fmt: skip


def connector_shown(connector: str) -> str:
    """The connector's name for people."""
    return text("connector_own") if connector == "own" else "P2pNcclConnector"


def check_gpus(settings: Settings, engines: Engines, layout: Layout, found: Sequence[Gpu]) -> None:
    """For vllm: the GPUs exist, and no prefill shares one with a decode unless ALLOW_SHARED_GPU permits it.

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
            if role_of.get(gpu.index, place.role) != place.role and not shared_gpu.may_share(settings, found):
                raise die(1, "gpu_shared", gpu.index)
            role_of[gpu.index] = place.role
