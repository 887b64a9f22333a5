"""``disagg-proxy calibrate``: the fit, the errors, and a run against simulated engines."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import web

from disagg_sim import SimConfig, SimEngine
from disagg_sim.calibrate.cli import calibrate, main
from disagg_sim.calibrate.fit import fit_decode, fit_hand_over, fit_prefill, least_squares
from disagg_sim.calibrate.measure import CalibrationError, EngineClient
from disagg_sim.step_model import EngineProfile, load_profile

PROFILE = EngineProfile(
    name="test", source="made up",
    step_seconds=5e-3, connector_step_seconds=0.0, mixed_step_seconds=0.0, prefill_token_seconds=1e-6,
    prefill_context_tokens=5000, sequence_seconds=2e-5, context_token_seconds=1e-8, load_seconds=0.0,
    hand_over_seconds=1e-3, hand_over_tokens_per_second=1e6, request_seconds=0.0,
    delivery_seconds=0.0, kv_cache_tokens=100_000,
)  # fmt: skip


def test_the_fit_finds_the_figures_of_exact_measurements() -> None:
    prefill = fit_prefill({n: 0.01 + PROFILE.prefill_seconds([(n, 0)]) for n in (64, 512, 2048, 8000)})
    assert (prefill.fixed, prefill.token, prefill.context) == pytest.approx((0.01, 1e-6, 5000))
    points = [(count, context) for count in (1, 8, 32) for context in (64, 2048)]
    decode = fit_decode({(n, c): PROFILE.step([], n, n * c) for n, c in points})
    assert (decode.fixed, decode.sequence, decode.context) == pytest.approx((5e-3, 2e-5, 1e-8))
    direct = {n: 0.01 + n * 1e-6 for n in (64, 512, 2048)}
    hand_over = fit_hand_over(direct, {n: seconds + PROFILE.hand_over(n) for n, seconds in direct.items()})
    assert (hand_over.fixed, hand_over.speed) == pytest.approx((1e-3, 1e6))


def test_no_figure_is_below_zero() -> None:
    prefill = fit_prefill({64: 0.010, 512: 0.0102, 2048: 0.0109, 8000: 0.0115})
    assert prefill.fixed > 0 and prefill.token > 0 and prefill.context == 0
    assert least_squares([(1.0, 1.0), (1.0, 2.0)], [2.0, 1.0])[1] == 0.0
    # Only one number of sequences: its part cannot be told from the fixed one.
    assert fit_decode({(4, 64): 0.01, (4, 2048): 0.02}).context > 0


@asynccontextmanager
async def server(models: object, metrics: str = "", status: int = 200) -> AsyncIterator[str]:
    async def answer_models(request: web.Request) -> web.Response:
        return web.json_response(models, status=status)

    async def answer_metrics(request: web.Request) -> web.Response:
        return web.Response(text=metrics)

    app = web.Application()
    app.router.add_get("/v1/models", answer_models)
    app.router.add_get("/metrics", answer_metrics)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


MODELS = {"data": [{"id": "m", "max_model_len": 8192}]}
BUSY = 'vllm:num_requests_running{engine="0",model_name="m"} 2.0\n'
SMALL = 'vllm:cache_config_info{block_size="16",num_gpu_blocks="10",engine="0"} 1.0\n'


@pytest.mark.parametrize(
    ("models", "metrics", "status", "message"),
    [
        ([], "", 200, "/v1/models is not that of vLLM"),
        (MODELS, "", 401, "answers 401: set VLLM_API_KEY to its key"),
        (MODELS, BUSY, 200, "serves other requests; calibrate an idle engine"),
        (MODELS, SMALL, 200, "a KV cache of 160 tokens is too small to measure"),
        ({"data": [{"id": "other"}]}, "", 200, "does not serve 'm' but other .--model."),
        (MODELS, "", 200, "answers 404"),
    ],
)
async def test_an_engine_that_cannot_be_measured_is_told_apart(
    models: object, metrics: str, status: int, message: str
) -> None:
    async with server(models, metrics, status) as url:
        with pytest.raises(CalibrationError, match=message):
            await calibrate(url, "", "m", 1.0, lambda text: None)


def test_the_command_says_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["127.0.0.1:8000"])
    assert "'127.0.0.1:8000' is not http://HOST:PORT" in capsys.readouterr().err
    assert main(["http://127.0.0.1:9"]) == 1
    assert "disagg-proxy calibrate: http://127.0.0.1:9: no answer" in capsys.readouterr().err


async def test_a_simulated_engine_gives_a_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ttft, step = EngineClient.ttft, EngineClient.step

    # Real requests, and the times that an idle machine would see.
    async def exact_ttft(client: EngineClient, tokens: int) -> float:
        assert await ttft(client, tokens) > 0
        return 0.01 + PROFILE.prefill_seconds([(tokens, 0)])

    async def exact_step(client: EngineClient, sequences: int, context: int) -> float:
        assert await step(client, sequences, context) > 0
        return PROFILE.step([], sequences, sequences * context)

    monkeypatch.setattr(EngineClient, "ttft", exact_ttft)
    monkeypatch.setattr(EngineClient, "step", exact_step)
    engine = SimEngine(SimConfig(role="decode", connector="disagg_kv", profile=PROFILE, kv_cache_tokens=100_000))
    await engine.start()
    try:
        file, said = tmp_path / "profile.json", list[str]()
        profile = await calibrate(f"http://{engine.http_address}", "", "", 0.01, said.append)
        file.write_text(profile.to_json())
        assert load_profile(str(file)) == profile
        assert profile.name == "sim-model, vLLM 0.33.0" and profile.kv_cache_tokens == 100_000
        assert profile.step_seconds == pytest.approx(5e-3) and profile.prefill_token_seconds == pytest.approx(1e-6)
        assert said[-1] == "decode: 1 of 7"
        await asyncio.wait_for(engine.wait_until(lambda state: not state["running"]), 60)
    finally:
        await engine.stop()
