"""Real vLLM engines on two nodes, without a GPU: KV crosses from one node to the other, and the answer is the same.

Needs vllm-cpu besides Ray: VLLM_CPU_PYTHON and VLLM_CPU_MODEL, as `python -m tools.vllm_cpu VERSION` prints them.
"""

from __future__ import annotations

import json
import os
import random
import urllib.request
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from disagg_ray import keys
from disagg_ray.proxies import get_text
from tests.ray_cluster.conftest import LIMIT, SECRET, RayCluster

pytest.importorskip("ray", reason="Ray is not installed: tests/cluster_ray")

PYTHON, MODEL = os.environ.get("VLLM_CPU_PYTHON", ""), os.environ.get("VLLM_CPU_MODEL", "")
ENVIRONMENT = {
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}
ARGS = ["--enforce-eager", "--kv-cache-memory-bytes", "64M", "--block-size", "32"]


def complete(url: str, prompt: list[int], key: str = "") -> Any:
    """The text and the reason of the end of one greedy completion."""
    body = {"model": Path(MODEL).name, "prompt": prompt, "max_tokens": 16, "temperature": 0, "ignore_eos": True}
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    sent = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(sent, timeout=LIMIT) as answer:
        (choice,) = json.load(answer)["choices"]
    return choice["text"], choice["finish_reason"]


@pytest.mark.skipif(not (PYTHON and MODEL), reason="VLLM_CPU_PYTHON and VLLM_CPU_MODEL are not set")
@pytest.mark.timeout(1200)
def test_kv_crosses_between_nodes_and_answers_are_the_same(tmp_path: Path) -> None:
    with ExitStack() as hold:
        cluster = RayCluster(tmp_path, hold)
        try:
            cluster.add_node(1, {})
            cluster.add_node(2, {"p": 1})
            cluster.add_node(3, {"d": 1})
            cluster.patience = 900
            cluster.up(
                engine="vllm",
                device="cpu",
                python=PYTHON,
                model=MODEL,
                environment=ENVIRONMENT,
                prefill={"resources": {"p": 1}, "args": ARGS},
                decode={"resources": {"d": 1}, "args": ARGS},
                settings={"MAX_MODEL_LEN": 1024, "MAX_NUM_SEQS": 16, "DTYPE": "float32"},
                start_timeout=900,
            )
            cluster.until_ready(1, 1)
            (prefill,), (decode,) = cluster.engines("prefill"), cluster.engines("decode")
            assert prefill.startswith(cluster.address(2)) and decode.startswith(cluster.address(3))
            seed = random.Random(7)
            engine_key = keys.derived(SECRET, keys.ENGINE)
            for length in (70, 300, 515):
                prompt = [seed.randrange(5, 250) for _ in range(length)]
                answer = complete(cluster.url, prompt)
                assert answer == complete(f"http://{prefill}", prompt, engine_key)
            lines = get_text(f"http://{decode}/metrics", engine_key).splitlines()
            (loaded,) = [line for line in lines if line.startswith("vllm:external_prefix_cache_hits_total")]
            assert float(loaded.split()[-1]) >= 64 + 288 + 512, "decode has loaded the blocks of all prompts"
        finally:
            cluster.close()
