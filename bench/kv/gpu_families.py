"""Model families on one GPU: do prefill and decode give the answers of a plain engine?

    python -m bench.kv.gpu_families FAMILY ... [--parallel 3] [--limit 500] > result.json

Needs one GPU and vLLM. For each family of tools/tiny_model.py it writes a small model with random weights, starts
prefill, decode and a plain engine with CUDA graphs off, all on one GPU, and asks over HTTP without a proxy. Several
families run at the same time. Results are printed to stderr as they come, and as one JSON object at the end, also when
the time is over. Logs go to --folder.

The plain engine answers a prompt; the pair gets the same prompt and the first token of that answer, so that decode
computes one token on transferred KV, as the plain engine did at its second token. So both take the same kernels there.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import random
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench.kv.gpu_pair import ROOT, Engine, Pair

LENGTHS = (*range(65, 81), 5, 129, 300, 500, 1000)
"""All remainders of the usual block size (16), around the window (64) and beyond a chunk of prefill (256)."""
TOKENS = 16


class Family:
    """Three engines with one tiny model."""

    def __init__(self, name: str, arguments: argparse.Namespace) -> None:
        self.name = name
        folder = Path(arguments.folder) / name
        folder.mkdir(parents=True, exist_ok=True)
        self.model = folder / "model"
        more = ["--enforce-eager", "--kv-cache-memory-bytes", arguments.kv_cache, *arguments.engine_argument]
        mine = argparse.Namespace(**{**vars(arguments), "folder": str(folder), "model": str(self.model),
                                     "connector": "own", "engine_argument": more})  # fmt: skip
        gpu = arguments.gpu
        self.prefill = Engine("prefill", gpu, mine, "kv_producer")
        self.decode = Engine("decode", gpu, mine, "kv_consumer")
        self.plain = Engine("plain", gpu, mine, "")
        self.pair = Pair(self.prefill, self.decode, own=True)
        self._numbers = random.Random(name)

    def run(self, deadline: float) -> dict[str, Any]:
        """Start, compare, stop. An error is a part of the result."""
        found: dict[str, Any] = {"family": self.name, "cases": []}
        try:
            self._start(deadline, found)
            for length in LENGTHS:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"the time was over before the prompt of {length} tokens")
                found["cases"].append(self._compare(length, "at once" if length % 2 else "prefill first"))
            found["burst"] = self._burst()
            found["control"] = self._control()
        except Exception as error:
            found["error"] = f"{type(error).__name__}: {str(error)[-1500:]}"
        finally:
            for engine in (self.prefill, self.decode, self.plain):
                engine.kill()
        found["connected"] = self._connected()
        found["equal"] = f"{sum(case['equal'] for case in found['cases'])} of {len(found['cases'])}"
        found["worst_difference"] = max((case["difference"] for case in found["cases"]), default=None)
        return found

    def _start(self, deadline: float, found: dict[str, Any]) -> None:
        command = [sys.executable, str(ROOT / "tools" / "tiny_model.py"), str(self.model), self.name]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        begun = time.monotonic()
        for engine in (self.prefill, self.decode, self.plain):
            engine.start()
        for engine in (self.prefill, self.decode, self.plain):
            engine.wait(deadline)
        found["start_s"] = round(time.monotonic() - begun, 1)

    def _prompt(self, length: int) -> list[int]:
        return [self._numbers.randrange(10, 1000) for _ in range(length)]

    def _reference(self, prompt: list[int]) -> tuple[list[int], dict[str, Any]]:
        """The plain engine's tokens, and its logprobs of the second one."""
        body = {"prompt": prompt, "max_tokens": TOKENS + 1, "logprobs": 5, "return_token_ids": True}
        choice = self.plain.ask(body)["choices"][0]
        return choice["token_ids"], choice["logprobs"]["top_logprobs"][1]

    def _compare(self, length: int, order: str) -> dict[str, Any]:
        prompt = self._prompt(length)
        tokens, logprobs = self._reference(prompt)
        body = {"prompt": [*prompt, tokens[0]], "max_tokens": TOKENS, "logprobs": 5, "return_token_ids": True}
        before = self.decode.loaded_tokens()
        choice = self.pair.ask(body, order)["choices"][0]
        loaded = self.decode.loaded_tokens() - before
        return {"length": length + 1, "order": order, "loaded": loaded, "equal": choice["token_ids"] == tokens[1:],
                "difference": _difference(choice["logprobs"]["top_logprobs"][0], logprobs)}  # fmt: skip

    def _burst(self) -> str:
        """Prompts at the same time: how many answers are equal."""
        prompts = [self._prompt(200 + 7 * number) for number in range(16)]
        references = [self._reference(prompt)[0] for prompt in prompts]
        bodies = [{"prompt": [*prompt, tokens[0]], "max_tokens": TOKENS, "return_token_ids": True}
                  for prompt, tokens in zip(prompts, references, strict=True)]  # fmt: skip
        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            answers = list(pool.map(lambda body: self.pair.ask(body, "at once"), bodies))
        equal = sum(answer["choices"][0]["token_ids"] == tokens[1:]
                    for answer, tokens in zip(answers, references, strict=True))  # fmt: skip
        return f"{equal} of {len(prompts)}"

    def _control(self) -> float:
        """How far the logprobs are off when the first half of the prompt is another one."""
        prompt = self._prompt(100)
        tokens, logprobs = self._reference(prompt)
        other = [*self._prompt(50), *prompt[50:], tokens[0]]
        choice = self.pair.ask({"prompt": other, "max_tokens": 1, "logprobs": 5}, "at once")["choices"][0]
        return _difference(choice["logprobs"]["top_logprobs"][0], logprobs)

    def _connected(self) -> str:
        """What prefill's log says of the transport."""
        text = self.prefill.log.read_text(errors="replace") if self.prefill.log.exists() else ""
        found = re.search(r"decode engine at \S+ connected \((.*)\)", text)
        return found[1] if found else ""


def _difference(ours: dict[str, float], theirs: dict[str, float]) -> float:
    """Largest difference of the logprobs that both have; 99 where they have none in common."""
    return round(max((abs(ours[token] - theirs[token]) for token in ours if token in theirs), default=99.0), 4)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="+", help="names in tools/tiny_model.py, such as qwen3")
    parser.add_argument("--gpu", type=int, default=0)
    parser.add_argument("--parallel", type=int, default=3, help="families at the same time")
    parser.add_argument("--extra", default="{}", help="JSON: more keys for kv_connector_extra_config")
    parser.add_argument("--engine-argument", action="append", default=[], help="one more argument of vllm serve")
    parser.add_argument("--kv-cache", default="1G", help="--kv-cache-memory-bytes of each engine")
    parser.add_argument("--max-model-len", type=int, default=2048)
    parser.add_argument("--max-num-batched-tokens", type=int, default=256)
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.05)
    parser.add_argument("--folder", default="/tmp/disagg-kv-families")
    parser.add_argument("--limit", type=float, default=500, help="seconds after which what there is is printed")
    arguments = parser.parse_args()
    deadline = time.monotonic() + arguments.limit
    results = []
    with concurrent.futures.ThreadPoolExecutor(arguments.parallel) as pool:
        runs = [pool.submit(Family(name, arguments).run, deadline) for name in arguments.families]
        for run in concurrent.futures.as_completed(runs):
            results.append(run.result())
            print(json.dumps(results[-1]), file=sys.stderr, flush=True)
    print(json.dumps(results, indent=1))
    return 1 if any("error" in one for one in results) else 0


if __name__ == "__main__":
    raise SystemExit(main())
