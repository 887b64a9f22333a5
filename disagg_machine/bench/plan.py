"""What `bench` compares, and the words of its measurements. Pure: only settings, PID files' fields and GPUs."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from disagg_machine.engines import SIM, VLLM
from disagg_machine.gpus import Gpu
from disagg_machine.layout import Layout, layout
from disagg_machine.messages import die
from disagg_machine.parts import Part
from disagg_machine.settings import Settings
from disagg_machine.vllm_facts import VllmFacts

OWN_CLIENT, VLLM_CLIENT = "own", "vllm"
"""Load generators: this project's, and ``vllm bench serve``."""

SHOWN = (
    *("MODEL", "DTYPE", "TENSOR_PARALLEL", "MAX_MODEL_LEN", "MAX_NUM_BATCHED_TOKENS", "MAX_NUM_SEQS", "ENFORCE_EAGER"),
    *("EXTRA_PREFILL_ARGS", "EXTRA_DECODE_ARGS", "EXTRA_PLAIN_ARGS"),
)
"""Settings that the figures of vLLM's engines depend on."""


@dataclass(frozen=True, slots=True)
class Setup:
    """Something that is measured.

    Attributes:
        name: short, for its folder.
        title: for people.
        kind: ``pd``, or ``plain`` for engines without proxy.
        question: what the report asks: ``sweep`` or ``ratio``.
        engines: how many there are.
        pairs: prefill and decode pairs, or plain engines: the warm-up reaches each of them.
        urls: the proxy, or the plain engines.
    """

    name: str
    title: str
    kind: str
    question: str
    engines: int
    pairs: int
    urls: Sequence[str]


def pd_title(prefills: int, decodes: int) -> str:
    """The title of a setup of prefill and decode engines."""
    return f"{prefills} prefill + {decodes} decode"


def pd_setup(name: str, question: str, prefills: int, decodes: int, url: str) -> Setup:
    """Engines behind the proxy at ``url``."""
    title = pd_title(prefills, decodes)
    return Setup(name, title, "pd", question, prefills + decodes, prefills * decodes, (url,))


# -- the pool


def pool(settings: Settings, ratio: bool, kind: str, gpus: Sequence[Gpu]) -> list[str]:
    """The GPUs of each engine, written as in PREFILL_GPUS.

    They are those of the layout; with ``--ratio`` and without PREFILL_GPUS and DECODE_GPUS all of this machine, in
    groups of TENSOR_PARALLEL. Simulated engines are just counted.

    Raises:
        MachineError: 1, there are fewer than two, or a GPU is named twice.
    """
    if not ratio or settings.prefill_gpus or settings.decode_gpus:
        found = pool_of(layout(settings))
    elif kind == SIM:
        found = [str(number) for number in range(settings.bench_sim_engines)]
    else:
        indexes = [str(gpu.index) for gpu in gpus]
        width = settings.tensor_parallel
        found = ["+".join(indexes[at : at + width]) for at in range(0, len(indexes) - width + 1, width)]
    if len(found) < 2:
        raise die(1, "bench_pool_small", len(found))
    seen: set[str] = set()
    for name in "+".join(found).split("+"):
        if name in seen:
            raise die(1, "bench_pool_twice", name)
        seen.add(name)
    return found


def pool_of(placed: Layout) -> list[str]:
    """The GPUs of each engine of a layout."""
    return ["+".join(place.gpus) for place in placed.engines]


def splits(found: Sequence[str]) -> list[tuple[list[str], list[str]]]:
    """Every way to divide a pool into prefill and decode, those with the fewest prefills first."""
    return [(list(found[:prefills]), list(found[prefills:])) for prefills in range(1, len(found))]


# -- one measurement


def client(settings: Settings, kind: str, facts: VllmFacts | None) -> str:
    """The load generator.

    Raises:
        MachineError: 1, BENCH_CLIENT asks for vLLM's and there is no vLLM.
    """
    if settings.bench_client == VLLM_CLIENT and facts is None:
        raise die(1, "no_vllm")
    wanted = settings.bench_client == VLLM_CLIENT or (settings.bench_client == "auto" and kind == VLLM)
    return VLLM_CLIENT if wanted and facts is not None else OWN_CLIENT


def sweep_words(
    settings: Settings,
    setup: Setup,
    folder: Path,
    kind: str,
    facts: VllmFacts | None,
    generator: str,
    parts: Sequence[Part],
) -> list[str]:
    """The arguments of ``disagg_report`` for one setup.

    Args:
        folder: of the report.
        kind: ``vllm`` or ``sim``.
        parts: what runs, by its PID files.
    """
    seconds, limit = (30, 900) if kind == VLLM else (10, 180)
    options: dict[str, object] = {
        "--question": setup.question,
        "--engines": setup.engines,
        "--client": generator,
        "--rates": settings.bench_rates,
        "--seconds": settings.bench_seconds or seconds,
        "--time-limit": settings.bench_time_limit or limit,
    }
    words = ["sweep", str(folder), *setup_words(settings, setup, options)]
    if kind == SIM:
        words.append("--simulated")
    if generator == VLLM_CLIENT and facts is not None:
        words += ["--vllm", shlex.join(facts.command), "--vllm-version", facts.version]
    for role, gpus in gpus_by_role(parts).items():
        words += ["--gpus", f"{role}={gpus}"]
    for name, value in facts_of(settings, kind, facts, parts).items():
        words += ["--fact", f"{name}={value}"]
    return words


def setup_words(settings: Settings, setup: Setup, more: Mapping[str, object]) -> list[str]:
    """The arguments that every measurement of a setup needs, and ``more``."""
    options: dict[str, object] = {
        "--name": setup.name,
        "--title": setup.title,
        "--kind": setup.kind,
        "--model": settings.served_names[0],
        "--tokenizer": settings.model,
        "--warm-up": 4 * setup.pairs + 4,
        "--slo-ttft-ms": settings.bench_slo_ttft_ms,
        "--slo-tpot-ms": settings.bench_slo_tpot_ms,
        "--slo-attainment": settings.bench_slo_attainment,
        "--input-len": settings.bench_input_len,
        "--output-len": settings.bench_output_len,
        **more,
    }
    words: list[str] = []
    for name, value in options.items():
        words += [name, str(value)]
    for url in setup.urls:
        words += ["--url", url]
    return words


def gpus_by_role(parts: Sequence[Part]) -> dict[str, str]:
    """GPUs of vLLM's engines, by role: their power is measured."""
    found: dict[str, list[str]] = {}
    for part in parts:
        if part.get("kind") == VLLM and part.get("gpus"):
            found.setdefault(part.get("role"), []).append(part.get("gpus"))
    return {role: ",".join(gpus) for role, gpus in found.items()}


def facts_of(settings: Settings, kind: str, facts: VllmFacts | None, parts: Sequence[Part]) -> Mapping[str, str]:
    """What the figures depend on, for the report."""
    found: dict[str, str] = {}
    if kind == VLLM:
        if facts is not None:
            found["vLLM"] = facts.version
        if connectors := sorted({part.get("connector") for part in parts} - {""}):
            found["KV connector"] = connectors[0]
        found |= {name: settings.texts[name] for name in SHOWN if settings.texts[name]}
    else:
        found["Engines"] = "SIMULATED"
        if settings.extra_sim_args:
            found["EXTRA_SIM_ARGS"] = settings.extra_sim_args
    if settings.extra_proxy_args:
        found["EXTRA_PROXY_ARGS"] = settings.extra_proxy_args
    return found
