"""``disagg-proxy calibrate``. Exit codes: 0 a profile was written, 1 the engine cannot be measured, 2 wrong usage."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import aiohttp

from disagg_sim.calibrate.fit import fit_decode, fit_hand_over, fit_prefill
from disagg_sim.calibrate.measure import OUTPUTS, CalibrationError, EngineClient, Facts, medians, timeout
from disagg_sim.step_model import H200, EngineProfile, ProfileError, load_profile

_DESCRIPTION = """Measure an idle engine by HTTP and write an engine profile: what 'disagg-proxy sim --profile' runs
with. It takes about two minutes. The engine must serve requests alone: a plain one, or one with disagg_kv,
NixlConnector or MoRIIOConnector. A request without a pair ends an engine with P2pNcclConnector."""

_PROMPTS = (64, 512, 1024, 2048, 4096, 8000)
_SEQUENCES = (1, 8, 32)
_CONTEXTS = (64, 2048)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="disagg-proxy calibrate", description=_DESCRIPTION, allow_abbrev=False)
    parser.add_argument("engine", metavar="URL", help="the engine, as http://HOST:PORT")
    parser.add_argument(
        "--proxy",
        metavar="URL",
        help="a proxy with one prefill and one decode like this engine, to measure the hand-over",
    )
    parser.add_argument("--output", "-o", type=Path, metavar="FILE", help="the profile (default: standard output)")
    parser.add_argument("--model", default="", help="served name (default: the engine's first)")
    parser.add_argument("--seconds", type=float, default=120.0, help="time to spend (default: 120)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write."""
    parser = _parser()
    args = parser.parse_args(argv)
    for name in ("engine", "proxy"):
        url = getattr(args, name)
        if url and not url.startswith(("http://", "https://")):
            parser.error(f"{url!r} is not http://HOST:PORT")
    if not args.seconds > 0:
        parser.error("--seconds must be above 0")
    try:
        profile = asyncio.run(calibrate(args.engine, args.proxy or "", args.model, args.seconds, _say))
        if args.output is None:
            sys.stdout.write(profile.to_json())
        else:
            args.output.write_text(profile.to_json(), encoding="utf-8")
    except (CalibrationError, ProfileError, OSError) as error:
        print(f"disagg-proxy calibrate: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


async def calibrate(engine: str, proxy: str, model: str, seconds: float, say: Callable[[str], None]) -> EngineProfile:
    """Measure an engine.

    Args:
        proxy: URL of a proxy in front of a pair; empty: the hand-over is that of the installed profile.

    Raises:
        CalibrationError: it cannot be measured.
        ProfileError: what was measured is no valid profile.
    """
    key = os.environ.get("VLLM_API_KEY", "")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    async with aiohttp.ClientSession(headers=headers, timeout=timeout(), read_bufsize=1 << 20) as session:
        one = EngineClient(session, engine, model)
        facts = await one.facts()
        pair = EngineClient(session, proxy, facts.model, seed=1) if proxy else None
        prompts, points = _points(engine, facts)
        await one.ttft(prompts[0])  # what an engine compiles at its first request
        ttft = await medians(prompts, one.ttft, seconds * 0.35, lambda text: say(f"prefill: {text}"))
        steps = await medians(
            points, lambda point: one.step(*point), seconds * 0.45, lambda text: say(f"decode: {text}")
        )
        through: Mapping[int, float] = {}
        if pair is not None:
            await pair.ttft(prompts[0])
            through = await medians(prompts, pair.ttft, seconds * 0.2, lambda text: say(f"hand-over: {text}"))
    prefill, decode = fit_prefill(ttft), fit_decode(steps)
    if not prefill.token or not decode.fixed:
        raise CalibrationError(f"{engine}: times do not grow with the work; is the machine busy with something else?")
    installed = load_profile(H200)
    hand_over = fit_hand_over(ttft, through) if through else None
    return EngineProfile(
        name=f"{facts.model}, vLLM {facts.version or 'of an unknown version'}",
        source="disagg-proxy calibrate" + ("" if hand_over else f"; hand-over and load of {H200}"),
        step_seconds=decode.fixed,
        connector_step_seconds=0.0,
        mixed_step_seconds=0.0,
        prefill_token_seconds=prefill.token,
        prefill_context_tokens=prefill.context,
        sequence_seconds=decode.sequence,
        context_token_seconds=decode.context,
        load_seconds=0.0 if hand_over else installed.load_seconds,
        hand_over_seconds=hand_over.fixed if hand_over else installed.hand_over_seconds,
        hand_over_tokens_per_second=hand_over.speed if hand_over else installed.hand_over_tokens_per_second,
        request_seconds=max(0.0, prefill.fixed - decode.fixed),
        delivery_seconds=0.0,
        kv_cache_tokens=facts.kv_cache_tokens or installed.kv_cache_tokens,
    )


def _points(engine: str, facts: Facts) -> tuple[list[int], list[tuple[int, int]]]:
    """Lengths of prompts, and sequences with their context, that the engine can serve."""
    longest = (facts.max_model_len or _PROMPTS[-1] + 1) - 1
    prompts = [n for n in _PROMPTS if n <= longest]
    most = facts.kv_cache_tokens or 10**9
    points = [
        (count, context) for count in _SEQUENCES for context in _CONTEXTS
        if context + OUTPUTS[-1] <= longest and count * (context + OUTPUTS[-1]) <= most
    ]  # fmt: skip
    if len(prompts) < 3 or len({count for count, _ in points}) < 2:
        raise CalibrationError(
            f"{engine}: max_model_len {facts.max_model_len} or a KV cache of {facts.kv_cache_tokens} tokens is too"
            f" small to measure; prompts of {_PROMPTS[2]} tokens and {_SEQUENCES[1]} requests at once are needed"
        )
    return prompts, points
