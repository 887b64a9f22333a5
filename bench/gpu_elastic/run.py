"""One run: start, warm-up, first tokens of single requests, the windows as far as the time goes, and always the end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bench.gpu_elastic.figures import figures
from bench.gpu_elastic.plan import Window, seconds_for, windows
from bench.gpu_elastic.stack import ELASTIC, PLAIN, SPLIT, ElasticStack
from bench.gpu_energy.load import totals
from bench.gpu_latency.arms import Proxied, Shot, fire
from bench.gpu_latency.figures import ttft
from bench.gpu_latency.prompts import Prompts
from disagg_report.arrivals import Workload
from disagg_report.figures import percentile
from disagg_report.load_client import Broken, LoadClient
from disagg_report.open_loop import OpenLoopClient
from disagg_report.power import PowerMeter
from disagg_report.records import Power
from disagg_report.slo import Slo

ARMS = (PLAIN, SPLIT, ELASTIC)
WRAP_UP = 12.0
"""Seconds kept for the end of the processes and the files."""
PATIENCE = 3.0
"""Seconds that a window waits for responses after its last arrival; what is missing then has failed. It is longer than
the SLO of the default lengths permits, so a good request is never cut off."""
_OVERHEAD = 2.5
"""Seconds of a window beside its arrivals, before one was measured."""
_FIRST_TOKENS_SHARE = 0.2
"""Share of the time left that single requests may take."""
_IDLE_SECONDS = 2.0
_SETTLED_WITHIN = 8.0
_RECOMPUTED = "vllm:disagg_kv_recomputed_prompts_total"

RAW = "raw.jsonl"

Write = Callable[..., None]


@dataclass(frozen=True)
class ArmWorkload(Workload):
    """The same arrival times on every arm of a round, and prompts of its own for each.

    Split and elastic share their engines: the prompts of one would be in the prefix cache for the other.
    """

    arm: str = ""

    def bodies(self, dice: random.Random, count: int) -> Sequence[bytes]:
        """As in :class:`Workload`; the prompts depend on the arm too."""
        return Workload.bodies(self, random.Random(f"{self.arm} {dice.random()}"), count)


@dataclass(frozen=True)
class Wanted:
    """What to measure.

    Attributes:
        lengths: tokens of the prompts of single requests, ``singles`` of each on each arm.
        tokens, answer: tokens of a prompt and of an answer in the windows.
    """

    rates: Sequence[float]
    rounds: int
    tokens: int
    answer: int
    slo: Slo
    lengths: Sequence[int]
    singles: int
    seed: int


class Run:
    """Measures until ``deadline`` (``time.monotonic``).

    Args:
        write: called with a step and its values, as they come.
        meter: of the energy of all GPUs; None where there is none.
        refresh: called when the table can be made again.
    """

    def __init__(
        self, stack: ElasticStack, wanted: Wanted, deadline: float, write: Write, meter: PowerMeter | None,
        refresh: Callable[[], None],
    ) -> None:  # fmt: skip
        self._stack, self._wanted, self._deadline = stack, wanted, deadline
        self._write, self._meter, self._refresh = write, meter, refresh
        self._idle_watts = 0.0
        self._raw = stack.machine.out / RAW

    def _left(self) -> float:
        return self._deadline - WRAP_UP - time.monotonic()

    async def whole(self) -> None:
        """Everything; the processes are gone afterwards."""
        try:
            begun = time.monotonic()
            await asyncio.wait_for(self._stack.start(begun + self._left()), self._left())
            self._write("start", seconds=round(time.monotonic() - begun, 1))
            await self._warm_up()
            await self._idle()
            await self._first_tokens()
            self._refresh()
            await self._rounds()
        except Exception as error:
            alive = {one.name: one.popen is not None and one.popen.poll() is None for one in self._stack.processes}
            self._write("error", why=f"{type(error).__name__}: {error}", alive=alive)
        finally:
            self._stack.stop()

    # -- before the windows

    async def _warm_up(self) -> None:
        """Kernels, connections and the communicator of the pair; the elastic proxy learns from its own requests."""
        for count in (2, 12):
            for arm in ARMS:
                client = self._client(arm, 1.0, 100 + count)
                failed = [shot.error for shot in await client.warm_up(count) if not shot.answered]
                if failed:
                    raise RuntimeError(f"warm-up of {arm}: {failed[0]}")
        placement = (await self._json(self._stack.elastic.client, "/stats")).get("placement") or {}
        if placement.get("mode") != ELASTIC:
            self._write("note", why=f"the elastic arm is another split: its proxy says {placement.get('mode')}")

    async def _idle(self) -> None:
        if self._meter is None:
            return
        self._meter.start()
        await asyncio.sleep(_IDLE_SECONDS)
        power = self._meter.stop()
        self._idle_watts = sum(one.watts for one in power.values())
        self._write("idle", watts=round(self._idle_watts, 1))

    async def _first_tokens(self) -> None:
        """TTFT of one request at a time, the arms in turn."""
        wanted, prompts = self._wanted, Prompts("m", self._wanted.seed)
        clients = {arm: LoadClient(self._stack.urls(arm)[0]) for arm in ARMS}
        until = time.monotonic() + _FIRST_TOKENS_SHARE * self._left()
        found: dict[tuple[int, str], list[float]] = {(length, arm): [] for length in wanted.lengths for arm in ARMS}
        for number in range(wanted.singles):
            if time.monotonic() > until:
                break
            for length in wanted.lengths:
                for arm in (*ARMS[number % 3 :], *ARMS[: number % 3]):
                    shot = await fire(Proxied(clients[arm]), prompts.body(length, 2), Shot(arm, length, number))
                    if not shot.error:
                        found[length, arm].append(ttft(shot))
        for client in clients.values():
            client.close()
        for length in wanted.lengths:
            p50 = {arm: percentile(found[length, arm], 0.5) for arm in ARMS}
            p99 = {arm: percentile(found[length, arm], 0.99) for arm in ARMS}
            requests = min(len(found[length, arm]) for arm in ARMS)
            self._write("ttft", tokens=length, requests=requests, arms=p50, p99=p99)

    # -- the windows

    async def _rounds(self) -> None:
        rounds = windows(self._wanted.rounds, self._wanted.rates, ARMS)
        overhead, taken = _OVERHEAD, list[float]()
        for number, every in enumerate(rounds):
            seconds = seconds_for(self._left(), len(rounds) - number, len(every), overhead)
            if not seconds:
                self._write("skipped", why=f"rounds {number + 1} to {len(rounds)}: {self._left():.0f} s were left")
                return
            for window in every:
                if self._left() < seconds + PATIENCE:
                    self._write("skipped", why=f"the rest of round {number + 1}: {self._left():.0f} s were left")
                    return
                begun = time.monotonic()
                await self._window(window, seconds)
                taken.append(time.monotonic() - begun - seconds)
            overhead = sum(taken) / len(taken)
            self._refresh()

    def _client(self, arm: str, seconds: float, number: int) -> OpenLoopClient:
        wanted = self._wanted
        seed = wanted.seed * 1000 + number
        workload = ArmWorkload("m", wanted.tokens, wanted.answer, seconds, seed, arm=arm)
        return OpenLoopClient(self._stack.urls(arm), workload, patience=PATIENCE)

    async def _window(self, window: Window, seconds: float) -> None:
        settled = await self._settle(window.arm)
        before = await self._counts(window.arm)
        client = self._client(window.arm, seconds, window.round)
        if self._meter is not None:
            self._meter.start()
        try:
            measured = await client.measure(window.rate, asyncio.Event(), lambda *counts: None)
        finally:
            power = {} if self._meter is None else self._meter.stop()
        after = await self._counts(window.arm)
        about = {**asdict(window), "seconds": round(seconds, 2)}
        with self._raw.open("a", encoding="utf-8") as out:
            shots = [asdict(shot) for shot in measured.shots]
            out.write(json.dumps({**about, "shots": shots}, separators=(",", ":")) + "\n")
        self._write(
            "window", **about, **figures(measured.shots, self._wanted.slo), **_difference(before, after),
            **self._energy(power), settled=settled, client_cpu=round(measured.client_cpu or 0.0, 3),
            errors=sorted({shot.error for shot in measured.shots if shot.error})[:3],
        )  # fmt: skip

    def _energy(self, power: Mapping[str, Power]) -> dict[str, Any]:
        if not power:
            return {}
        seconds = max(one.seconds for one in power.values())
        return {
            "joules": round(sum(one.joules for one in power.values()), 1),
            "joules_idle": round(self._idle_watts * seconds, 1),
            "watts": {gpu: round(one.watts, 1) for gpu, one in power.items()},
            "energy_source": sorted({one.source for one in power.values()}),
        }

    async def _settle(self, arm: str) -> bool:
        """Wait until the arm's engines have nothing left of the window before; whether that is so."""
        until = time.monotonic() + min(_SETTLED_WITHIN, max(0.0, self._left()))
        while True:
            texts = [await self._text(one.client, "/metrics") for one in self._stack.engines_of(arm)]
            busy = sum(_total(text, "vllm:num_requests_running", "vllm:num_requests_waiting") for text in texts)
            if not busy or time.monotonic() > until:
                return not busy
            await asyncio.sleep(0.1)

    async def _counts(self, arm: str) -> dict[str, Any]:
        """Prompts that decode computed again, and where the proxy has placed requests; so far."""
        if arm == PLAIN:
            return {}
        text = await self._text(self._stack.decode.client, "/metrics")
        proxy = self._stack.elastic if arm == ELASTIC else self._stack.proxy
        placement = (await self._json(proxy.client, "/stats")).get("placement") or {}
        ways = placement.get("requests") or {}
        return {"recomputed": _total(text, _RECOMPUTED), "computed_tokens": totals(text).prompt, "placed": dict(ways)}

    async def _text(self, client: LoadClient, path: str) -> str:
        with contextlib.suppress(Broken, asyncio.TimeoutError):
            answer = await asyncio.wait_for(client.get(path), 5)
            return answer.body.decode("utf-8", "replace")
        return ""

    async def _json(self, client: LoadClient, path: str) -> dict[str, Any]:
        try:
            found = json.loads(await self._text(client, path))
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}


def _total(text: str, *names: str) -> float:
    """The sum of all samples of some metrics."""
    lines = (line for line in text.splitlines() if line.startswith(tuple(f"{name}{{" for name in names)))
    return sum(float(line.rpartition(" ")[2]) for line in lines)


def _difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """What was counted in between, numbers and numbers by name."""
    found: dict[str, Any] = {}
    for name, value in after.items():
        if isinstance(value, dict):
            found[name] = {key: count - before.get(name, {}).get(key, 0) for key, count in value.items()}
        else:
            found[name] = value - before.get(name, 0)
    return found
