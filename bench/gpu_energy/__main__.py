"""The command line; see the package."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.gpu_energy import __doc__ as about_package
from bench.gpu_energy.load import Engine, Load, Tokens
from bench.gpu_energy.sampler import ReadOnly, Sampler, Window
from disagg_power.devices import Devices, PowerError
from disagg_power.gpus import SIMULATED, open_devices
from disagg_power.nvml import NvmlDevices, load

TOLERANCE = 0.05
"""Largest accepted deviation of the integral of power from the counter, and of announced power from this reader's."""
_WARM_SECONDS, _LEAST_SECONDS, _LOOK_SECONDS = 5.0, 5.0, 3.0
"""Load before a window, the shortest window, and the time between two looks at the proxy."""
_REPORT_AGE = 4.5
"""Seconds by which a figure of the proxy may be old: engines report every 3 s what they read each second."""


class Run:
    """One run: its steps, its lines, and what has failed."""

    def __init__(self, arguments: argparse.Namespace, write: Callable[[Mapping[str, Any]], None]) -> None:
        self.failed: list[str] = []
        self._arguments, self._write = arguments, write
        self._deadline = time.monotonic() + arguments.limit
        self._engine = Engine(arguments.engine, arguments.key)
        self._proxy = Engine(arguments.proxy, arguments.key) if arguments.proxy else None
        self._nvml: ReadOnly | None = None
        self._announced: list[dict[str, Any]] = []

    def run(self) -> int:
        """All steps. Returns the exit code."""
        arguments = self._arguments
        devices = self._devices()
        device = devices.find(arguments.gpu)
        self._uuid = device.uuid
        model = self._engine.model()
        self._write({
            "step": "about", "gpu": device.name, "uuid": device.uuid, "simulated": device.simulated, "mig": device.mig,
            "model": model, "limit_s": arguments.limit, "backend": os.environ.get("POWER_BACKEND", ""),
        })  # fmt: skip
        self._sampler = sampler = Sampler(device)
        sampler.start()
        try:
            if not sampler.wait(5, 10.0):
                self._fail(f"the GPU cannot be read: {dict(sampler.errors)}")
                return self._end()
            busy = max(_LEAST_SECONDS, (self._deadline - time.monotonic() - 4 * _WARM_SECONDS) * 0.36)
            idle = max(_LEAST_SECONDS, busy / 3)
            self._measure("idle_before", idle, None, "")
            self._measure("prefill", busy, self._load(model, arguments.prefill_at_once, arguments.prompt, 1), "prompt")
            self._measure("idle_between", idle / 2, None, "")
            self._measure("decode", busy, self._load(model, arguments.decode_at_once, 16, arguments.output), "output")
        finally:
            sampler.stop()
        return self._end()

    def _devices(self) -> Devices:
        if os.environ.get(SIMULATED):
            return open_devices(os.environ)
        self._nvml = ReadOnly(load())
        return NvmlDevices(self._nvml)

    def _load(self, model: str, at_once: int, prompt: int, output: int) -> Load:
        return Load(self._engine, model, at_once, prompt, output)

    def _measure(self, step: str, seconds: float, load: Load | None, counted: str) -> None:
        """One step: its line, and the checks of it."""
        seconds = min(seconds, self._deadline - time.monotonic() - _WARM_SECONDS)
        if seconds < _LEAST_SECONDS / 2:
            self._write({"step": step, "left_out": "the limit is near"})
            self._fail(f"{step}: left out, the limit is near")
            return
        if load is not None:
            load.start()
        time.sleep(_WARM_SECONDS)
        announced = len(self._announced)
        before, begin = self._tokens(), time.monotonic()
        while (left := begin + seconds - time.monotonic()) > 0:
            time.sleep(min(left, _LOOK_SECONDS))
            self._look()
        after, end = self._tokens(), time.monotonic()
        if load is not None:
            load.stop()
        window = self._sampler.window(begin, end)
        line: dict[str, Any] = {"step": step}
        if window is None:
            self._fail(f"{step}: no readings")
        else:
            line |= _figures(window)
            if window.deviation is not None and abs(window.deviation) > TOLERANCE:
                self._fail(f"{step}: the integral of power deviates from the counter by {window.deviation:+.1%}")
            line |= self._per_token(step, window, before, after, counted)
        if load is not None:
            line["statuses"] = dict(load.statuses)
            if set(load.statuses) != {"200"}:
                self._fail(f"{step}: not every request was answered: {dict(load.statuses)}")
        line |= self._announcement(step, window, self._announced[announced:])
        self._write(line)

    def _tokens(self) -> Tokens | None:
        try:
            return self._engine.tokens()
        except OSError as error:
            self._fail(f"the engine's /metrics: {error}")
            return None

    def _per_token(
        self, step: str, window: Window, before: Tokens | None, after: Tokens | None, counted: str
    ) -> dict[str, Any]:
        if before is None or after is None or not counted:
            return {}
        tokens = getattr(after, counted) - getattr(before, counted)
        other = "output" if counted == "prompt" else "prompt"
        found = {
            f"{counted}_tokens": tokens,
            f"{other}_tokens": getattr(after, other) - getattr(before, other),
            "tokens_per_second": round(tokens / window.seconds, 1),
        }
        if tokens <= 0 or window.joules is None:
            self._fail(f"{step}: no energy per token: {tokens} tokens, {window.joules} J")
            return found
        return {**found, "mj_per_token": round(1e3 * window.joules / tokens, 3)}

    # -- what the proxy shows of the same GPU

    def _look(self) -> None:
        if self._proxy is None:
            return
        asked = time.monotonic()
        try:
            stats = json.loads(self._proxy.get("/stats"))
        except (OSError, ValueError) as error:
            self._fail(f"the proxy's /stats: {error}")
            return
        gpus = (stats.get("energy") or {}).get("gpus", [])
        found = next((gpu for gpu in gpus if gpu["uuid"] == self._uuid), None)
        if found is not None:
            self._announced.append({**found, "asked": asked})

    def _announcement(self, step: str, window: Window | None, seen: Sequence[dict[str, Any]]) -> dict[str, Any]:
        if self._proxy is None:
            return {}
        good = [one for one in seen if one["state"] in ("ok", "mig") and one["joules"] is not None]
        if not good:
            self._fail(f"{step}: the proxy shows no energy of this GPU")
            return {"announced": 0}
        outside = 0
        for one in good:
            own = self._sampler.counter_between(one["asked"] - _REPORT_AGE, one["asked"] + 0.3)
            # The integral of another process has another beginning.
            if one["source"] == "counter" and own is not None and not own[0] - 1 <= one["joules"] <= own[1] + 1:
                outside += 1
        if outside:
            self._fail(f"{step}: {outside} of {len(good)} announced counters are not those of this reader")
        watts = sum(one["watts"] for one in good if one["watts"] is not None) / len(good)
        found = {"announced": len(good), "announced_watts": round(watts, 1), "announced_outside": outside}
        if window is not None and window.joules is not None and len(good) >= 3:
            own_watts = window.joules / window.seconds
            found["announced_deviation"] = round(watts / own_watts - 1, 4)
            if abs(watts / own_watts - 1) > 2 * TOLERANCE:
                self._fail(f"{step}: announced {watts:.0f} W, this reader has {own_watts:.0f} W")
        return found

    # -- the end

    def _fail(self, text: str) -> None:
        self.failed.append(text)

    def _end(self) -> int:
        if self._nvml is not None and self._nvml.attempts:
            self._fail(f"something was set: {self._nvml.attempts}")
        self._write({"step": "verdict", "ok": not self.failed, "failed": self.failed})
        return 1 if self.failed else 0


def _figures(window: Window) -> dict[str, Any]:
    joules = window.joules
    return {
        "seconds": round(window.seconds, 2),
        "watts": None if joules is None else round(joules / window.seconds, 1),
        "counter_j": _rounded(window.counter_j, 3),
        "integral_j": _rounded(window.integral_j, 3),
        "integral_deviation": _rounded(window.deviation, 4),
        "sm_clock_mhz": window.sm_clock_mhz,
        "memory_clock_mhz": window.memory_clock_mhz,
        "utilization": window.utilization,
        "temperature_c": window.temperature_c,
        "throttle": window.throttle,
    }


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0: every check passed; 1: one failed, or there is no GPU or engine; 2: usage."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_energy", description=about_package, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--engine", required=True, metavar="URL", help="the engine to load: http://HOST:PORT")
    parser.add_argument("--proxy", default="", metavar="URL", help="a proxy that shows the same GPU")
    parser.add_argument("--gpu", default="0", help="index or UUID of the engine's GPU (default: 0)")
    parser.add_argument("--key", default=os.environ.get("VLLM_API_KEY", ""), help="API key of engine and proxy")
    parser.add_argument("--limit", type=float, default=240.0, metavar="SECONDS", help="of the whole run (default: 240)")
    parser.add_argument("--prompt", type=int, default=4000, help="tokens of a prompt of the prefill step")
    parser.add_argument("--output", type=int, default=512, help="tokens of an answer of the decode step")
    parser.add_argument("--prefill-at-once", type=int, default=8, help="requests at once in the prefill step")
    parser.add_argument("--decode-at-once", type=int, default=32, help="requests at once in the decode step")
    parser.add_argument("--out", default="", metavar="FILE", help="append the JSON lines to this file too")
    arguments = parser.parse_args(argv)

    def write(line: Mapping[str, Any]) -> None:
        text = json.dumps({"time": round(time.time(), 3), **line})
        print(text, flush=True)
        if arguments.out:
            with Path(arguments.out).open("a", encoding="utf-8") as out:
                out.write(f"{text}\n")

    try:
        return Run(arguments, write).run()
    except (OSError, ValueError, PowerError) as error:
        write({"step": "verdict", "ok": False, "failed": [str(error)]})
        return 1


if __name__ == "__main__":
    sys.exit(main())
