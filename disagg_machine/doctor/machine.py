"""What `doctor` looks at. Each fact is read once, and only when a check needs it; a test sets it instead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from disagg_machine import clocks, gpus, net, parts, proxy_view, python_environment, shared_gpu, vllm_facts
from disagg_machine import readiness as serving
from disagg_machine.compiled import control
from disagg_machine.context import Context
from disagg_machine.doctor import host
from disagg_machine.engines import SIM, VLLM, Engines
from disagg_machine.gpus import Gpu
from disagg_machine.kv_bytes import kv_bytes_per_token
from disagg_machine.layout import Layout, layout
from disagg_machine.parts import Part
from disagg_machine.proxy_view import ProxyView
from disagg_machine.readiness import Readiness
from disagg_machine.settings import Settings
from disagg_machine.vllm_facts import VllmFacts


@dataclass(frozen=True, slots=True)
class PythonFacts:
    """The user's Python.

    Attributes:
        missing: packages of the proxy that it has not, or too old, in words.
        venv_ready: the virtual environment has them.
        can_make_venv: whether it can make one.
        remedy: the command after which it can.
    """

    path: str
    version: str
    missing: str = ""
    venv_ready: bool = False
    can_make_venv: bool = True
    remedy: str = ""


class Machine:
    """The machine of one `doctor`."""

    def __init__(self, context: Context) -> None:
        self.context = context

    @property
    def settings(self) -> Settings:
        """The settings of this command."""
        return self.context.settings

    @property
    def environ(self) -> Mapping[str, str]:
        """The environment of the programs."""
        return self.context.environ

    # -- software

    @cached_property
    def python(self) -> PythonFacts:
        """The user's Python; MachineError when there is none that is new enough."""
        path = python_environment.base_python(self.context)
        known = PythonFacts(path, python_environment.version(path), python_environment.missing(self.context, path))
        if not known.missing:
            return known
        if python_environment.environment(self.context).ready():
            return replace(known, venv_ready=True)
        if python_environment.can_make_environments(path):
            return known
        return replace(known, can_make_venv=False, remedy=python_environment.remedy(path))

    @cached_property
    def compiled(self) -> control.Look:
        """The proxy's hot path as native code, for the Python that runs the proxy, or will once it is made."""
        venv = python_environment.environment(self.context).python
        return control.look(self.context, str(venv) if self.python.venv_ready else self.python.path)

    @cached_property
    def compiler(self) -> str:
        """The requirement of the compiler that a build uses; empty when it must be fetched and cannot be."""
        return control.compiler(self.context, self.python.path)

    @cached_property
    def vllm(self) -> VllmFacts | None:
        """The vLLM that would be used; None when there is none, or none is looked for."""
        return None if self.settings.engine == "sim" else vllm_facts.find_vllm(self.context)

    @cached_property
    def connector(self) -> str:
        """``p2p_nccl`` or ``own``."""
        if self.vllm is None:
            return "p2p_nccl"
        return vllm_facts.choose_connector(self.vllm, self.settings.kv_connector, shared=self.shares_gpu)

    @property
    def own_connector(self) -> bool:
        """Whether KV moves through this project's connector."""
        return self.connector == "own"

    @property
    def wants_vllm(self) -> bool:
        """Whether vLLM's engines are what this user came for: what they lack is an error then."""
        return self.settings.engine == "vllm" or (self.settings.engine == "auto" and len(self.gpus) >= 2)

    @property
    def engines(self) -> Engines:
        """The engines of that vLLM, whether or not it can serve."""
        return Engines(VLLM if self.vllm else SIM, vllm=self.vllm, connector=self.connector)

    # -- hardware

    @cached_property
    def gpus(self) -> Sequence[Gpu]:
        """The GPUs that this user may use."""
        return gpus.read_gpus(self.environ)

    @cached_property
    def placed(self) -> Settings:
        """The settings as they apply to these GPUs."""
        placed = shared_gpu.on_one_gpu(self.settings, self.gpus)
        return shared_gpu.with_small_shares(placed) if self.shares_gpu else placed

    @cached_property
    def shares_gpu(self) -> bool:
        """Whether prefill and decode will run on one GPU."""
        placed = shared_gpu.on_one_gpu(self.settings, self.gpus)
        if not layout(placed).shared_gpus or not shared_gpu.may_share(placed, self.gpus) or self.vllm is None:
            return False
        return vllm_facts.can_share_gpu(self.vllm, self.settings.kv_connector)

    @property
    def kv_cache_mib(self) -> int:
        """KV cache of each engine where they share a GPU."""
        per_token = kv_bytes_per_token(self.settings.model, self.settings.dtype, self.environ)
        return shared_gpu.kv_cache_bytes(self.placed, self.layout, self.gpus, per_token) >> 20

    @property
    def uses_gpus(self) -> bool:
        """Whether engines may run on them."""
        return bool(self.gpus) and self.settings.engine != "sim"

    @cached_property
    def links(self) -> str:
        """The matrix of connections between GPUs."""
        return gpus.run_nvidia_smi(gpus.LINKS)

    @cached_property
    def peers(self) -> str:
        """The matrix of peer access between GPUs."""
        return gpus.run_nvidia_smi(gpus.PEER_READS)

    @cached_property
    def clocks(self) -> dict[str, Any]:
        """What may be set on the GPUs, and what is."""
        venv = self.settings.venv_dir / "bin" / "python"
        return clocks.look(self.context, str(venv) if self.python.venv_ready else self.python.path)

    @cached_property
    def available_gib(self) -> int:
        """Memory that programs can still get."""
        return host.available_gib()

    @cached_property
    def open_files(self) -> int | None:
        """Files that one process may have open; None when that is not limited."""
        return host.open_files()

    @cached_property
    def shm_mib(self) -> int:
        """Free MiB in /dev/shm."""
        return host.shm_mib()

    def free_gib(self, path: Path) -> int:
        """Free GiB where a path is, or would be."""
        return net.free_gib(path)

    # -- what runs

    @cached_property
    def layout(self) -> Layout:
        """Which parts there are to be; MachineError when GPUs or ports contradict each other."""
        return layout(self.placed)

    @cached_property
    def parts(self) -> Sequence[Part]:
        """Everything that has a PID file."""
        return parts.all_parts(self.settings.run_dir)

    @property
    def alive(self) -> dict[str, Part]:
        """What runs, by name."""
        return {part.name: part for part in self.parts if part.alive}

    @cached_property
    def view(self) -> ProxyView:
        """What the proxy says of the engines."""
        return proxy_view.ask(self.settings)

    def readiness(self, part: Part) -> Readiness:
        """How a part that is alive serves."""
        return serving.readiness(self.context, part, self.view)

    def port_taken(self, port: int) -> bool:
        """Whether something listens on ``port``."""
        return net.port_taken(port)
