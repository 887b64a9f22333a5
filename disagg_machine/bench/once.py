"""`bench --once`: one load without a report: vLLM's own benchmark, or a small load that says nothing about GPUs."""

from __future__ import annotations

import os
import sys

from disagg_machine import signals, ui, vllm_facts
from disagg_machine.bench import load
from disagg_machine.bench.report import running_kind
from disagg_machine.context import Context
from disagg_machine.engines import VLLM
from disagg_machine.service_client import Failed, Service
from disagg_machine.settings import Settings
from disagg_machine.vllm_facts import VllmFacts

FAILURES_SHOWN = 3


def run(context: Context) -> int:
    """Exit code 1 when a request failed; with vLLM this process becomes its benchmark."""
    settings = context.settings
    facts = vllm_facts.find_vllm(context) if running_kind(settings.run_dir) == VLLM else None
    if facts is not None:
        sys.stdout.flush()
        environment = {**context.child_environment(), "no_proxy": "127.0.0.1,localhost,::1"}
        if settings.api_key:
            environment["OPENAI_API_KEY"] = settings.api_key
        words = vllm_words(settings, facts, context.url)
        signals.restore_sigpipe()
        os.execvpe(words[0], words, environment)
    ui.warn("bench_simulated")
    service = Service(context.url, settings.api_key)
    try:
        model = service.model(settings.served_names[0])
    except Failed as error:
        ui.emit(str(error))
        return 1
    send_one = load.streams(service, model, settings.bench_input_len, settings.bench_output_len)
    found = load.send(send_one, settings.bench_requests or 60, settings.bench_concurrency)
    for line in found.lines():
        ui.out(line)
    for failure in found.failures[:FAILURES_SHOWN]:
        ui.emit(failure)
    return 1 if found.failures else 0


def vllm_words(settings: Settings, facts: VllmFacts, url: str) -> list[str]:
    """``vllm bench serve`` through the proxy."""
    words = [*facts.command, "bench", "serve", "--base-url", url, "--endpoint", "/v1/completions"]
    words += ["--model", settings.served_names[0], "--tokenizer", settings.model, "--dataset-name", "random"]
    words += [
        "--random-input-len",
        str(settings.bench_input_len),
        "--random-output-len",
        str(settings.bench_output_len),
    ]
    words += ["--ignore-eos", "--num-prompts", str(settings.bench_requests or 200)]
    return [*words, "--max-concurrency", str(settings.bench_concurrency)]
