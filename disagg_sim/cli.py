"""The command line of the simulated engines: flags to :class:`SimConfig`, signals to an orderly end.

Exit codes: 0 after SIGTERM or SIGINT, 1 when a port cannot be bound or an engine died and its server ended,
2 for a bad flag.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import NoReturn, get_args

from disagg_kv.secret import SECRET_FILE_VARIABLE, SECRET_VARIABLE, read_secret
from disagg_power.devices import PowerError
from disagg_sim.config import Connector, SimConfig, SimConfigError, split_address
from disagg_sim.engine import SimEngine
from disagg_sim.step_model import H200, ProfileError, load_profile

_DESCRIPTION = """Simulated vLLM engines for prefill/decode disaggregation: no GPU, real sockets, real hand-over of
KV, and the failures of real engines. With p2p_nccl every request needs the X-Request-Id that a P/D proxy makes."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (see --help)\n")


def _parser() -> _Parser:
    parser = _Parser(
        prog="disagg-proxy sim",
        description=_DESCRIPTION,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    place = parser.add_argument_group("place")
    place.add_argument("--role", choices=("prefill", "decode", "pair"), required=True, help="what to run; pair is both")
    place.add_argument("--host", default="127.0.0.1", help="address to bind and to announce")
    place.add_argument(
        "--port", type=int, default=20003, help="HTTP port (of prefill, in a pair); 0 lets the kernel choose"
    )
    place.add_argument("--kv-port", type=int, default=21001, help="port of the KV transfer, likewise")
    place.add_argument("--decode-port", type=int, default=20005, help="HTTP port of decode in a pair")
    place.add_argument("--decode-kv-port", type=int, default=22001, help="KV port of decode in a pair")
    place.add_argument(
        "--proxy", metavar="HOST:PORT,...", help="where pings go to, one or more proxies; without it there are none"
    )
    place.add_argument("--ping-seconds", type=float, default=3.0, help="time between two pings")

    serving = parser.add_argument_group("serving")
    serving.add_argument(
        "--model", action="append", metavar="NAME", help="served model name; again for each alias (default: sim-model)"
    )
    serving.add_argument(
        "--vllm-version",
        default="",
        metavar="VERSION",
        help="version to imitate where versions differ (default: 0.21.0 with p2p_nccl, 0.33.0 otherwise)",
    )
    # As vLLM's. It is no default of the parser, whose help would show it.
    serving.add_argument("--api-key", help="key that /v1 asks for; without it VLLM_API_KEY of the environment")
    serving.add_argument("--max-model-len", type=int, default=32768, help="tokens of prompt and answer together")
    serving.add_argument("--max-num-seqs", type=int, default=256, help="requests in one batch")
    serving.add_argument("--max-num-batched-tokens", type=int, default=8192, help="prompt tokens of one prefill step")
    serving.add_argument(
        "--enable-prompt-tokens-details", action="store_true", help="report cached tokens in usage, as vLLM's flag"
    )
    serving.add_argument(
        "--enable-request-id-headers", action="store_true", help="return X-Request-Id as a header, as vLLM's flag"
    )
    serving.add_argument(
        "--disable-auto-tool-choice",
        action="store_true",
        help="behave as without --enable-auto-tool-choice: tools are answered 400",
    )

    speed = parser.add_argument_group("speed")
    speed.add_argument("--startup-seconds", type=float, default=0.0, help="pings begin this long before HTTP answers")
    speed.add_argument(
        "--prefill-tokens-per-second", type=float, default=20_000.0, help="speed of prefill; 0 takes no time"
    )
    speed.add_argument(
        "--time-per-output-token", type=float, default=0.02, metavar="SECONDS", help="time of a decode step"
    )
    speed.add_argument(
        "--profile",
        metavar="FILE",
        help="steps and hand-over as on a measured engine (disagg-proxy calibrate), instead of the two speeds above; "
        f"{H200} is installed",
    )
    speed.add_argument(
        "--communicator-seconds", type=float, default=0.0, help="extra time of a pair's first request (NCCL: 1.1)"
    )

    gpu = parser.add_argument_group("GPU")
    gpu.add_argument(
        "--gpu",
        type=int,
        metavar="INDEX",
        help="simulated GPU: announce its energy and run at its clock's pace; decode of a pair has the next one",
    )
    gpu.add_argument(
        "--gpus-file",
        default=os.environ.get("POWER_SIMULATED", ""),
        metavar="FILE",
        help="simulated GPUs that other processes see too (POWER_SIMULATED); empty: each engine has its own",
    )

    kv = parser.add_argument_group("KV cache")
    kv.add_argument(
        "--connector",
        choices=get_args(Connector),
        default="p2p_nccl",
        help="KV transfer: that of vLLM's P2pNcclConnector, NixlConnector or MoRIIOConnector, or of disagg_kv (this "
        "project's connector)",
    )
    kv.add_argument("--kv-both", action="store_true", help="disagg_kv, decode: prefill for others as well (kv_both)")
    kv.add_argument("--read-mode", action="store_true", help="moriio: decode reads, instead of prefill writing")
    kv.add_argument(
        "--kv-secret",
        help="disagg_kv: secret shared by engines and proxy; without it DISAGG_KV_SECRET, or the "
        "first line of the file that DISAGG_KV_SECRET_FILE names",
    )
    kv.add_argument("--kv-block-size", type=int, default=16, help="disagg_kv, nixl, moriio: tokens of one block")
    kv.add_argument(
        "--load-timeout", type=float, default=30.0, help="disagg_kv: seconds that decode waits for KV, then computes"
    )
    kv.add_argument("--hold-timeout", type=float, default=60.0, help="all but p2p_nccl: seconds that prefill holds KV")
    kv.add_argument("--kv-bytes-per-token", type=int, default=147_456, help="size of one token's KV (Qwen3-4B: 147456)")
    kv.add_argument("--kv-buffer-bytes", type=int, default=8_000_000_000, help="buffer for KV not yet used by decode")
    kv.add_argument("--kv-pool-bytes", type=int, default=4 * 2**30, help="pinned pool behind the buffer")
    kv.add_argument(
        "--kv-wire-bytes-per-token", type=int, default=0, help="padding per token that really travels over the socket"
    )
    kv.add_argument("--kv-layers", type=int, default=4, help="tensors per request")
    kv.add_argument(
        "--kv-cache-tokens",
        type=int,
        metavar="TOKENS",
        help="size of the KV cache (default: the profile's, or as many as requests can need)",
    )
    kv.add_argument("--prefix-cache-blocks", type=int, default=4096, help="blocks of 16 tokens in the prefix cache")

    failure = parser.add_argument_group("failure")
    failure.add_argument(
        "--close-after-400",
        choices=("close", "reset", "keep"),
        default="close",
        help="after some 400s: close the connection unannounced as vLLM 0.21, reset it on its next request, or keep it",
    )
    failure.add_argument(
        "--exit-after-death-seconds",
        type=float,
        default=5.0,
        help="the server ends this long after its engine died; negative: never, it answers 500",
    )
    failure.add_argument(
        "--randomize-request-ids",
        action="store_true",
        help="behave as vLLM >= 0.14 without VLLM_DISABLE_REQUEST_ID_RANDOMIZATION=1: decode waits indefinitely",
    )
    failure.add_argument(
        "--log-level", default="WARNING", choices=("DEBUG", "INFO", "WARNING", "ERROR"), help="log level"
    )
    return parser


def _configs(parser: _Parser, args: argparse.Namespace) -> list[SimConfig]:
    for proxy in args.proxy.split(",") if args.proxy is not None else ():
        try:
            host, _ = split_address(proxy)
        except ValueError:
            host = ""
        if not host:
            parser.error(f"argument --proxy: {proxy!r} is not HOST:PORT")
    death = args.exit_after_death_seconds
    try:
        profile = load_profile(args.profile) if args.profile else None
    except ProfileError as error:
        parser.error(f"argument --profile: {error}")
    cache = args.kv_cache_tokens or (
        profile.kv_cache_tokens if profile else args.max_num_seqs * (args.max_model_len + args.kv_block_size)
    )

    def measured(name: str) -> int:
        """A limit of the scheduler: the profile's, unless the flag says something else."""
        value: int = getattr(args, name)
        return getattr(profile, name) if profile and value == parser.get_default(name) else value

    try:
        first = SimConfig(
            role="prefill" if args.role == "pair" else args.role,
            host=args.host,
            port=args.port,
            kv_port=args.kv_port,
            proxy=args.proxy,
            connector=args.connector,
            kv_both=args.kv_both,
            read_mode=args.read_mode,
            kv_secret=_secret(parser, args.kv_secret),
            kv_block_size=args.kv_block_size,
            load_timeout=args.load_timeout,
            hold_timeout=args.hold_timeout,
            models=tuple(args.model or ("sim-model",)),
            version=args.vllm_version,
            api_key=args.api_key or os.environ.get("VLLM_API_KEY") or None,
            startup_seconds=args.startup_seconds,
            prefill_tokens_per_second=args.prefill_tokens_per_second,
            time_per_output_token=args.time_per_output_token,
            profile=profile,
            communicator_seconds=args.communicator_seconds,
            max_model_len=args.max_model_len,
            max_num_seqs=measured("max_num_seqs"),
            max_num_batched_tokens=measured("max_num_batched_tokens"),
            randomize_request_ids=args.randomize_request_ids,
            kv_cache_tokens=cache,
            prefix_cache_blocks=args.prefix_cache_blocks,
            kv_layers=args.kv_layers,
            kv_bytes_per_token=args.kv_bytes_per_token,
            kv_wire_bytes_per_token=args.kv_wire_bytes_per_token,
            kv_buffer_bytes=args.kv_buffer_bytes,
            kv_pool_bytes=args.kv_pool_bytes,
            close_after_400=args.close_after_400,
            enable_prompt_tokens_details=args.enable_prompt_tokens_details,
            enable_request_id_headers=args.enable_request_id_headers,
            enable_auto_tool_choice=not args.disable_auto_tool_choice,
            exit_after_death_seconds=None if death < 0 else death,
            gpu=args.gpu,
            gpus_file=args.gpus_file,
            ping_seconds=args.ping_seconds,
            record_requests=False,
        )
        if args.role != "pair":
            return [first]
        gpu = None if args.gpu is None else args.gpu + 1
        return [first, replace(first, role="decode", port=args.decode_port, kv_port=args.decode_kv_port, gpu=gpu)]
    except SimConfigError as error:
        parser.error(str(error))


def _secret(parser: _Parser, given: str | None) -> str:
    """The secret, from where disagg_kv's settings take it too."""
    if given is not None or SECRET_VARIABLE in os.environ or not os.environ.get(SECRET_FILE_VARIABLE):
        return given if given is not None else os.environ.get(SECRET_VARIABLE, "")
    try:
        return read_secret(os.environ[SECRET_FILE_VARIABLE])
    except ValueError as error:
        parser.error(f"{SECRET_FILE_VARIABLE}: {error}")


async def _run(engines: Sequence[SimEngine]) -> int:
    asked = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, asked.set)
    until = asyncio.create_task(asked.wait())
    work = asyncio.create_task(_serve(engines))
    try:
        await asyncio.wait((until, work), return_when=asyncio.FIRST_COMPLETED)
        if until.done():
            return 0
        return work.result()
    except PowerError as error:
        print(f"error: {error} (--gpu, --gpus-file)", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {error.strerror or error}", file=sys.stderr)
        return 1
    finally:
        for task in (until, work):
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError, OSError):
            await work
        for engine in engines:
            await engine.stop()


async def _serve(engines: Sequence[SimEngine]) -> int:
    starts = [asyncio.create_task(engine.start()) for engine in engines]
    try:
        await asyncio.gather(*starts)
    finally:
        for start in starts:
            start.cancel()
        await asyncio.gather(*starts, return_exceptions=True)
    for engine in engines:
        config = engine.config
        models = ",".join(config.models)
        print(f"{config.role} http={engine.http_address} kv={engine.kv_address} models={models}", flush=True)
    ends = [asyncio.create_task(engine.wait_exited()) for engine in engines]
    try:
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for end in ends:
            end.cancel()
    return 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run until a signal; see the module for the exit codes."""
    parser = _parser()
    args = parser.parse_args(argv)
    found = _configs(parser, args)
    logging.basicConfig(level=args.log_level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    return asyncio.run(_run([SimEngine(config) for config in found]))
