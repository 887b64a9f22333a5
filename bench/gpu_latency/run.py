"""One run from start to end: processes, warm-up, phases as long as there is time, and always the end of everything."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.gpu_latency import load, record
from bench.gpu_latency.arms import Arm, DirectOwn, DirectP2p, KvCapacity, Proxied, Shot, fire
from bench.gpu_latency.plan import Phase, seconds_for
from bench.gpu_latency.processes import HOST, Machine, NotReady, Stack
from bench.gpu_latency.prompts import Prompts
from bench.gpu_latency.serve import LEAST, bench_serve
from disagg_report.load_client import LoadClient

WRAP_UP = 14.0
"""Seconds kept for the end: processes, files, figures."""

_WARM_UP = 60.0


class WarmUpFailed(Exception):
    """The first requests were not answered."""


@dataclass(frozen=True)
class Wanted:
    """What to measure. ``serve``: also vLLM's own client, if ``serve_clients`` and the time allow."""

    phases: tuple[Phase, ...]
    answer: int
    serve: bool
    serve_clients: int
    seed: int


class Run:
    """Measures until ``deadline`` (``time.monotonic``); what there is stands in the attributes at any moment.

    Attributes:
        about: facts of the run, for the result.
        phases: what was measured.
    """

    def __init__(self, machine: Machine, wanted: Wanted, deadline: float) -> None:
        self._machine, self._wanted, self._deadline = machine, wanted, deadline
        self.about: dict[str, Any] = {"connector": machine.connector, "engines": machine.engines, "skipped": []}
        self.phases: list[record.Measured] = []

    def _left(self) -> float:
        return self._deadline - WRAP_UP - time.monotonic()

    async def whole(self) -> None:
        """Everything. Errors end up in ``about["error"]``; processes are gone afterwards."""
        stack = Stack(self._machine)
        self.about["commands"] = {one.name: one.command for one in stack.processes}
        step = "start"
        try:
            begun = time.monotonic()
            await asyncio.wait_for(stack.start(begun + self._left()), self._left())
            self._say("start_s", round(time.monotonic() - begun, 1))
            step = "warm-up"
            arms, prompts = _arms(stack), Prompts("m", self._wanted.seed)
            begun = time.monotonic()
            await self._warm_up(arms, prompts)
            self._say("warm_up_s", round(time.monotonic() - begun, 1))
            phases = self._wanted.phases
            for number, phase in enumerate(phases):
                step = phase.name
                await self._phase(stack, arms, prompts, phases[number:])
            step = "vllm bench serve"
            await self._serve(stack)
        except Exception as error:
            self._say("error", f"{step}: {type(error).__name__}: {error}")
            if not isinstance(error, NotReady):
                self.about["alive_at_error"] = {
                    one.name: one.popen is not None and one.popen.poll() is None for one in stack.processes
                }
        finally:
            stack.stop()

    def _say(self, name: str, value: Any) -> None:
        self.about[name] = value
        print(f"{self._left():6.0f} s left  {name}: {json.dumps(value)}", file=sys.stderr, flush=True)

    # -- steps

    async def _warm_up(self, arms: Mapping[str, Arm], prompts: Prompts) -> None:
        """First one by one, since the first request of a pair makes its communicator; then a few at once."""
        lengths = sorted({phase.tokens for phase in self._wanted.phases})
        rounds = [[(name, length)] for length in (64, *lengths) for name in load.ARMS]
        rounds += [[(name, lengths[0])] * 6 for name in load.ARMS]
        until = time.monotonic() + min(_WARM_UP, self._left())
        for asked in rounds:
            shots = [Shot(name, length, 0) for name, length in asked]
            tasks = [asyncio.create_task(fire(arms[shot.arm], prompts.body(shot.tokens, 16), shot)) for shot in shots]
            _, pending = await asyncio.wait(tasks, timeout=max(1.0, until - time.monotonic()))
            failed = [shot.error for shot in shots if shot.error]
            if pending or failed:
                raise WarmUpFailed(f"{asked[0]}: {len(pending)} without an answer; failed: {failed}")

    async def _phase(self, stack: Stack, arms: Mapping[str, Arm], prompts: Prompts, phases: Sequence[Phase]) -> None:
        phase = phases[0]
        kept = LEAST if self._wanted.serve and self._left() > LEAST + sum(one.least for one in phases) else 0.0
        seconds = seconds_for(phases, self._left() - kept)
        if not seconds:
            self.about["skipped"].append(f"{phase.name}: {self._left():.0f} s were left, it needs {phase.least:.0f}")
            self._say("skipped", self.about["skipped"])
            return
        loaded, cpu, own = await stack.loaded_tokens(), stack.proxy.cpu_seconds(), time.process_time()
        begun = time.monotonic()
        measured = record.Measured(phase.name, [])
        common = (arms, phase, seconds, prompts, self._wanted.answer, measured.shots)
        try:
            if phase.kind == "low":
                measured.beside["load"] = f"{phase.rate:g} requests/s in all"
                await load.low(*common)
            else:
                measured.beside["load"] = f"{phase.clients} clients without pause"
                await load.saturating(*common, measured.blocks)
        except BaseException as error:
            measured.beside["incomplete"] = type(error).__name__
            self.phases.append(measured)
            record.append(self._machine.out, measured)
            raise
        took = time.monotonic() - begun
        proxied = sum(shot.arm == "proxy" for shot in measured.shots)
        measured.beside |= {
            "seconds": round(took, 1),
            "planned_seconds": round(seconds, 1),
            "prompt_tokens": sum(shot.tokens for shot in measured.shots if not shot.error),
            "prompt_tokens_from_prefill": await stack.loaded_tokens() - loaded,
            "proxy_cpu_ms_per_request": round((stack.proxy.cpu_seconds() - cpu) * 1e3 / max(1, proxied), 2),
            "client_cpu_share": round((time.process_time() - own) / took, 3),
        }
        self.phases.append(measured)
        record.append(self._machine.out, measured)
        failed = sum(bool(shot.error) for shot in measured.shots)
        self._say(phase.name, {"requests": len(measured.shots), "failed": failed, **measured.beside})

    async def _serve(self, stack: Stack) -> None:
        phase = next((one for one in self._wanted.phases if one.kind == "saturating"), None)
        if not self._wanted.serve or phase is None:
            return
        if self._left() < LEAST:
            self.about["skipped"].append(f"vllm bench serve: {self._left():.0f} s were left, it needs {LEAST:.0f}")
            return
        clients, requests = self._wanted.serve_clients, 4 * self._wanted.serve_clients
        for measured in self.phases:
            if measured.name == phase.name:
                seconds = sum(block.end - block.begin for block in measured.blocks)
                requests = max(requests, min(400, round(len(measured.shots) / seconds * 8)))
        left = self._left()
        self._say("serve", await bench_serve(self._machine, stack.proxy.port, requests, clients, phase.tokens,
                                             self._wanted.answer, left))  # fmt: skip


def _arms(stack: Stack) -> dict[str, Arm]:
    """Each arm with connections of its own, also to the engines."""
    machine = stack.machine
    prefill, decode, proxy = (
        LoadClient(f"http://{HOST}:{one.port}") for one in (stack.prefill, stack.decode, stack.proxy)
    )
    direct: Arm
    if machine.connector == "p2p_nccl":
        capacity = KvCapacity(machine.kv_buffer)
        direct = DirectP2p(prefill, decode, stack.kv_addresses, capacity, machine.per_token)
    else:
        direct = DirectOwn(prefill, decode, stack.kv_addresses[0])
    return {"direct": direct, "proxy": Proxied(proxy)}
