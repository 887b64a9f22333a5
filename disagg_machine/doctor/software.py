"""Checks of what is installed: Python, vLLM with its KV connector, the model."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from disagg_machine import net
from disagg_machine.commands import chunks_may_kill
from disagg_machine.compiled.control import State
from disagg_machine.doctor.machine import Machine
from disagg_machine.doctor.verdict import Verdict, error, ok, warning
from disagg_machine.engines import connector_shown, model_problem
from disagg_machine.vllm_facts import is_untried, problem

SWITCH = "VLLM_DISABLE_REQUEST_ID_RANDOMIZATION"
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")
DOWNLOAD_GIB = 20
"""Free disk that the download of a model may take."""


def check_python(machine: Machine) -> Iterator[Verdict]:
    """Python, and the packages of the proxy: installed, or installable."""
    python = machine.python
    yield ok("doc_python", python.path, python.version)
    if not python.missing:
        yield ok("doc_packages", python.path)
    elif python.venv_ready:
        yield ok("doc_packages", machine.settings.venv_dir)
    elif python.can_make_venv:
        yield warning("doc_packages_later", python.missing, machine.settings.venv_dir)
    else:
        yield error("doc_no_venv", python.missing, python.remedy)


def check_compiled(machine: Machine) -> Iterator[Verdict]:
    """The proxy's hot path is compiled, or can be."""
    found = machine.compiled
    if found.state is State.OFF:
        yield ok("doc_compiled_off")
    elif found.state is State.READY:
        yield ok("doc_compiled", found.folder)
    elif found.state is State.RUNNING:
        yield ok("doc_compiling", found.log)
    elif found.state is State.FAILED:
        yield warning("compiled_failed", found.log)
    elif found.state is State.BLOCKED:
        yield warning("compiled_blocked", found.obstacle_text)
    elif machine.compiler:
        yield ok("doc_compile_later", machine.compiler)
    else:
        yield warning("doc_compile_index")


def check_vllm(machine: Machine) -> Iterator[Verdict]:
    """vLLM is there, and it can serve with the connector that it gets."""
    settings, vllm = machine.settings, machine.vllm
    bad = error if machine.wants_vllm else warning
    if settings.engine == "sim":
        yield ok("doc_sim_asked")
        return
    if vllm is None:
        # Who has GPUs and no vLLM gets simulated engines with ENGINE=auto.
        yield (bad if settings.engine == "vllm" else warning)("no_vllm")
        return
    if why := problem(vllm, machine.connector, settings.engine_host):
        yield bad(*why)
        return
    yield ok("doc_vllm", vllm.version, connector_shown(machine.connector), " ".join(vllm.command))
    if is_untried(vllm, machine.connector):
        yield warning("own_untried", vllm.version)
    yield from check_secret(machine) if machine.own_connector else check_request_ids(machine)
    if chunks_may_kill(settings, machine.engines):
        yield warning("chunked_warning", settings.max_num_batched_tokens, settings.max_model_len)


def check_secret(machine: Machine) -> Iterator[Verdict]:
    """On the loopback interface only users of this machine reach the KV ports of this project's connector."""
    host = net.reach(machine.settings.engine_host)
    if machine.settings.disagg_kv_secret:
        yield ok("doc_secret")
    elif not (host == "localhost" or net.is_loopback(host)):
        yield warning("doc_no_secret", host)


def check_request_ids(machine: Machine) -> Iterator[Verdict]:
    """P2pNcclConnector finds its peer by the request id, so engines must keep it."""
    if machine.vllm is None or not machine.vllm.randomises:
        yield ok("doc_random_none")
    elif (machine.environ.get(SWITCH) or "1") == "1":
        yield ok("doc_random_set")
    else:
        yield warning("doc_random_zero")


def check_model(machine: Machine) -> Iterator[Verdict]:
    """The model is a complete folder, or is in the cache of downloads, or can be downloaded."""
    model = machine.settings.model
    own = machine.vllm if machine.own_connector else None
    if own is not None and (reason := model_problem(machine.settings, own, machine.environ)):
        yield (error if machine.wants_vllm else warning)("model_unsupported", model, reason)
    if model.startswith("/") or os.path.exists(model):
        yield from _model_folder(Path(model), error if machine.wants_vllm else warning)
    elif not machine.wants_vllm:
        yield ok("doc_model_unused", model)
    else:
        yield from _model_download(machine, model, download_cache(machine.environ))


def _model_folder(model: Path, bad: Callable[..., Verdict]) -> Iterator[Verdict]:
    if not _readable(model / "config.json"):
        yield bad("doc_model_missing", model)
        return
    tokenizers = [name for name in TOKENIZERS if _readable(model / name)]
    if not tokenizers:
        yield bad("doc_no_tokenizer", model)
    if not any(any(model.glob(pattern)) for pattern in ("*.safetensors", "*.bin")):
        yield bad("doc_no_weights", model)
    elif tokenizers:
        yield ok("doc_model", model, tokenizers[-1])


def _readable(path: Path) -> bool:
    return os.access(path, os.R_OK)


def download_cache(environ: Mapping[str, str]) -> Path:
    """Where Hugging Face keeps what it downloads (huggingface_hub/constants.py)."""
    if hub := environ.get("HF_HUB_CACHE"):
        return Path(hub)
    caches = environ.get("XDG_CACHE_HOME") or f"{environ.get('HOME', '')}/.cache"
    return Path(environ.get("HF_HOME") or f"{caches}/huggingface") / "hub"


def _model_download(machine: Machine, model: str, cache: Path) -> Iterator[Verdict]:
    if any(cache.glob(f"models--{model.replace('/', '--')}/snapshots/*/config.json")):
        yield ok("doc_model_cached", model, cache)
    elif machine.environ.get("HF_HUB_OFFLINE", "0") == "1":
        yield error("doc_model_offline", model, cache)
    else:
        free = machine.free_gib(cache)
        if free < DOWNLOAD_GIB:
            yield error("doc_model_disk", model, free, cache)
        else:
            yield warning("doc_model_download", model, free, cache)
