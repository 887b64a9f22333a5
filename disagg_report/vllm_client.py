"""``vllm bench serve`` as load generator: its command line and its result file.

Flags and fields: vllm/benchmarks/serve.py of vLLM 0.9.2 to 0.33. ``--save-detailed`` adds one list for each field of a
request; ``start_times`` and ``latencies`` are in newer versions only. It takes one URL: with several, one process
runs for each with its share of the rate, which together are the same Poisson arrivals.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from disagg_report.arrivals import Workload
from disagg_report.client import ClientFailed, Watch
from disagg_report.records import Measurement, Shot

_BEGINS, _ENDS = b"Starting main benchmark run", b"Serving Benchmark Result"
_DONE = re.compile(rb"\| *(\d+)/\d+ *\[")
"""The progress bar of tqdm."""
_IMPORTS = 240.0
"""Seconds allowed besides the load itself: importing vLLM takes up to a minute on a cold machine."""


def command(program: Sequence[str], url: str, workload: Workload, tokenizer: str, rate: float, count: int, seed: int,
            goodput: Sequence[str], file: Path) -> list[str]:  # fmt: skip
    """The command line of one rate."""
    return [
        *program, "bench", "serve", "--base-url", url, "--endpoint", "/v1/completions", "--model", workload.model,
        "--tokenizer", tokenizer, "--dataset-name", "random", "--random-input-len", str(workload.input_tokens),
        "--random-output-len", str(workload.output_tokens), "--ignore-eos", "--temperature", "0", "--seed", str(seed),
        "--request-rate", f"{rate:g}", "--num-prompts", str(count), "--percentile-metrics", "ttft,tpot,itl,e2el",
        "--metric-percentiles", "50,99", "--goodput", *goodput, "--save-result", "--save-detailed",
        "--result-dir", str(file.parent), "--result-filename", file.name,
    ]  # fmt: skip


def shots_of(result: Mapping[str, Any]) -> list[Shot]:
    """Return the requests of a result file. Raises ClientFailed without the lists of ``--save-detailed``."""
    try:
        ttfts, itls = result["ttfts"], result["itls"]
        errors, outputs, inputs = result["errors"], result["output_lens"], result["input_lens"]
        starts = result.get("start_times") or [None] * len(ttfts)
        latencies = result.get("latencies") or [ttft + sum(gaps) for ttft, gaps in zip(ttfts, itls, strict=True)]
        zero = min((start for start in starts if start), default=0.0)
        return [
            Shot(sent=None if start is None else round(start - zero, 6), prompt_tokens=int(prompt),
                 error=_last_line(error) or "no response")
            if error or not ttft else
            Shot(
                sent=None if start is None else round(start - zero, 6),
                ttft_ms=round(ttft * 1e3, 3), itl_ms=tuple(round(gap * 1e3, 3) for gap in gaps),
                latency_ms=round(latency * 1e3, 3), prompt_tokens=int(prompt), output_tokens=int(output),
            )
            for start, ttft, gaps, latency, prompt, output, error
            in zip(starts, ttfts, itls, latencies, inputs, outputs, errors, strict=True)
        ]  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:
        raise ClientFailed(
            f"the result of vllm bench serve has an unknown format: {type(error).__name__}: {error}"
        ) from None


def _last_line(error: str) -> str:
    lines = error.strip().splitlines()
    return lines[-1][:300] if lines else ""


class VllmClient:
    """Runs ``vllm bench serve`` once for each rate and URL.

    Args:
        program: command that starts vLLM's command line.
        goodput: its SLO arguments, so that its output can be compared.
        folder: for its result files, without the generated texts, and ``vllm-bench.log``.
    """

    def __init__(self, program: Sequence[str], version: str, urls: Sequence[str], workload: Workload, tokenizer: str,
                 goodput: Sequence[str], folder: Path, key: str = "") -> None:  # fmt: skip
        self.name = f"vllm bench serve {version}".strip()
        self._program = list(program)
        self._urls = list(urls)
        self._workload = workload
        self._tokenizer = tokenizer
        self._goodput = list(goodput)
        self._folder = folder
        self._window: tuple[float, float] | None = None
        local = "127.0.0.1,localhost,::1"
        self._environment = {
            **os.environ, "PYTHONUNBUFFERED": "1", "VLLM_NO_USAGE_STATS": "1", "no_proxy": local, "NO_PROXY": local,
        }  # fmt: skip
        if key:
            self._environment["OPENAI_API_KEY"] = key

    def window(self) -> tuple[float, float] | None:
        """Begin and end of the load, without start-up; None if its output does not show it."""
        return self._window if self._window and self._window[1] > self._window[0] else None

    async def measure(self, rate: float, stop: asyncio.Event, watch: Watch) -> Measurement:
        """Measure one rate. Nothing is kept when ``stop`` is set, because the result is written at the end."""
        parts = len(self._urls)
        counts = [max(1, round(self._workload.count(rate) / parts))] * parts
        seen = [0] * parts
        self._window = None

        def progress(part: int, done: int) -> None:
            seen[part] = done
            watch(sum(seen), 0, sum(counts))

        runs = [
            asyncio.create_task(self._run(rate, part, counts[part], partial(progress, part))) for part in range(parts)
        ]
        halt = asyncio.create_task(stop.wait())
        try:
            waiting: set[asyncio.Task[Any]] = set(runs)
            while waiting and not halt.done():
                done, _ = await asyncio.wait({*waiting, halt}, return_when=asyncio.FIRST_COMPLETED)
                for task in done & waiting:
                    task.result()
                waiting -= done
        finally:
            halt.cancel()
            for run in runs:
                run.cancel()
            await asyncio.gather(*runs, return_exceptions=True)
        if stop.is_set():
            return Measurement(rate, 0.0, (), interrupted=True)
        results = [run.result() for run in runs]
        shots = [shot for result in results for shot in shots_of(result)]
        return Measurement(rate, max(float(result["duration"]) for result in results), tuple(shots))

    async def _run(self, whole: float, part: int, count: int, progress: Callable[[int], None]) -> dict[str, Any]:
        url, rate = self._urls[part], whole / len(self._urls)
        stem = f"vllm-rate-{whole:08.3f}" + (f"-{part + 1}" if len(self._urls) > 1 else "")
        file, log = self._folder / f"{stem}.json", self._folder / "vllm-bench.log"
        file.unlink(missing_ok=True)
        seed = (self._workload.seed + round(rate * 1000) + 7919 * part) % 2**31
        words = command(
            self._program, url, self._workload, self._tokenizer, rate, count, seed, self._goodput, file.absolute()
        )
        limit = _IMPORTS + 4 * self._workload.seconds + 60
        try:
            process = await asyncio.create_subprocess_exec(
                *words, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT, env=self._environment, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise ClientFailed(f"cannot start vllm bench serve: {error}") from None
        try:
            code = await asyncio.wait_for(self._follow(process, log, progress), limit)
        except asyncio.TimeoutError:
            raise ClientFailed(f"vllm bench serve did not end within {limit:.0f} s; see {log}") from None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
        if code or not file.exists():
            raise ClientFailed(f"vllm bench serve exited with code {code} and without a result; see {log}")
        try:
            result: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            raise ClientFailed(f"vllm bench serve wrote no JSON to {file}") from None
        result.pop("generated_texts", None)
        file.write_text(json.dumps(result), encoding="utf-8")
        return result

    async def _follow(self, process: asyncio.subprocess.Process, log: Path, progress: Callable[[int], None]) -> int:
        assert process.stdout is not None
        tail = b""
        with log.open("ab") as out:
            while chunk := await process.stdout.read(4096):
                out.write(chunk)
                out.flush()
                tail = tail[-200:] + chunk
                now = time.monotonic()
                if _BEGINS in tail and self._window is None:
                    self._window = (now, now)
                if _ENDS in tail and self._window is not None:
                    self._window = (self._window[0], now)
                if found := _DONE.findall(tail):
                    progress(int(found[-1]))
        return await process.wait()
