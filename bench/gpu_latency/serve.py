"""vLLM's own client, ``vllm bench serve``, through the proxy."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from contextlib import suppress
from typing import Any

from bench.gpu_latency.processes import HOST, SERVED, Machine

LEAST = 35.0
"""Seconds: importing vLLM takes most of them."""

_KEPT = (
    "completed", "failed", "request_throughput", "output_throughput", "mean_ttft_ms", "p50_ttft_ms", "p99_ttft_ms",
    "p50_itl_ms", "p99_itl_ms", "p50_tpot_ms", "p99_tpot_ms",
)  # fmt: skip


async def bench_serve(machine: Machine, port: int, requests: int, clients: int, tokens: int, answer: int,
                      seconds: float) -> dict[str, Any]:  # fmt: skip
    """Its figures, or {"error": why}; its output is in ``serve.log``."""
    command = [
        machine.python, "-m", "vllm.entrypoints.cli.main", "bench", "serve", "--backend", "openai",
        "--base-url", f"http://{HOST}:{port}", "--endpoint", "/v1/completions", "--model", SERVED,
        "--tokenizer", machine.model, "--dataset-name", "random", "--random-input-len", str(tokens),
        "--random-output-len", str(answer), "--num-prompts", str(requests), "--max-concurrency", str(clients),
        "--ignore-eos", "--temperature", "0", "--seed", "5", "--percentile-metrics", "ttft,tpot,itl",
        "--metric-percentiles", "50,99", "--save-result", "--result-dir", str(machine.out),
        "--result-filename", "serve.json",
    ]  # fmt: skip
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with (machine.out / "serve.log").open("wb") as out:
        process = await asyncio.create_subprocess_exec(
            *command, stdout=out, stderr=out, env=environment, start_new_session=True
        )
        try:
            code = await asyncio.wait_for(process.wait(), seconds)
        except asyncio.TimeoutError:
            return {"error": f"not done after {seconds:.0f} s"}
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    if code:
        return {"error": f"it ended with {code}, see serve.log"}
    found = json.loads((machine.out / "serve.json").read_text(encoding="utf-8"))
    return {
        "clients": clients, "prompt_tokens": tokens,
        **{key: round(found[key], 2) for key in _KEPT if isinstance(found.get(key), (int, float))},
    }  # fmt: skip
