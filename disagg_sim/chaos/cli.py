"""The command line of a chaos run. Exit codes: 0 every promise kept, 1 not (the reasons are printed), 2 a bad flag."""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from disagg_sim.chaos.plan import ALL, KINDS
from disagg_sim.chaos.run import Options, run

_DESCRIPTION = """A real proxy and simulated engines in one process under a mixed load, with clients that leave and
engines that fail, by a plan that the seed makes. Every answer is compared with the right one; what is left over in
the end is counted."""

_EPILOG = """The proxy is not told how large decode's KV buffer is: keep --rate low enough, or --kv-buffer-bytes large
enough, that a burst and the orphans that injected faults explain fit into it; at the default rate they do for half an
hour. A killed decode freezes the prefills that sent to it (P2pNcclConnector), so the runner restarts them with it, and
it restarts what the proxy wants restarted, as test_single_machine.sh does; --no-supervisor shows what happens
without."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (see --help)\n")


def _kinds(text: str) -> tuple[str, ...]:
    if text == "all":
        return ALL
    if text == "none":
        return ()
    kinds = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    for kind in kinds:
        if kind not in KINDS:
            raise argparse.ArgumentTypeError(f"{kind!r} is none of: all, none, {', '.join(KINDS)}")
    return kinds


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError("must be above 0")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def _parser() -> argparse.ArgumentParser:
    kinds = "; ".join(f"{kind}: {what}" for kind, what in KINDS.items())
    parser = _Parser(
        prog="disagg-proxy chaos",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--seconds", type=_positive, default=30.0, help="how long requests come")
    parser.add_argument("--seed", type=int, default=1, help="the same seed makes the same plan; timing may differ")
    parser.add_argument("--prefills", type=_count, default=3, help="prefill engines")
    parser.add_argument("--decodes", type=_count, default=3, help="decode engines")
    parser.add_argument("--rate", type=_positive, default=20.0, help="requests per second")
    parser.add_argument(
        "--trouble", type=_kinds, default="all", metavar="KIND,KIND", help=f"all, none, or any of: {kinds}"
    )
    parser.add_argument("--every", type=_positive, default=3.0, help="seconds between two troubles on average")
    parser.add_argument(
        "--no-supervisor", action="store_true", help="bring a killed decode back alone, and restart nothing frozen"
    )
    parser.add_argument("--kv-buffer-bytes", type=_count, default=8_000_000_000, help="KV buffer of each decode")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there too")
    parser.add_argument("--show-plan", action="store_true", help="print the troubles of the plan before the run")
    parser.add_argument(
        "--log-level", default="error", choices=("debug", "info", "warning", "error"), help="of proxy and engines"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run once; see the module for the exit codes."""
    args = _parser().parse_args(argv)
    logging.basicConfig(
        level=args.log_level.upper(), stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    options = Options(
        seconds=args.seconds,
        seed=args.seed,
        prefills=args.prefills,
        decodes=args.decodes,
        rate=args.rate,
        trouble=args.trouble,
        every=args.every,
        supervisor=not args.no_supervisor,
        knobs={"kv_buffer_bytes": args.kv_buffer_bytes},
        settings={"log_level": args.log_level},
    )
    if args.show_plan:
        print("\n".join(map(str, options.plan().troubles)))
    report = asyncio.run(run(options))
    print(report.to_text())
    if args.json is not None:
        args.json.write_text(report.to_json() + "\n", encoding="utf-8")
    return 1 if report.reasons() else 0
