"""The command line of a chaos run. Exit codes: 0 passed, 1 failed (the reasons are printed), 2 invalid option."""

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

_DESCRIPTION = """A real proxy and simulated engines in one process under a mixed load, with clients that disconnect
and engines that fail, by a plan derived from the seed. Every response is compared with the expected one; leaks are
counted at the end."""

_EPILOG = """The proxy does not know the size of decode's KV buffer: keep --rate low enough, or --kv-buffer-bytes
large enough, for a burst and the orphans that injected faults explain; the default rate is low enough for half an
hour. A killed decode freezes the prefills that sent to it (P2pNcclConnector), so the runner restarts them with it, and
it restarts the engines that the proxy reports as frozen, as test_single_machine.sh does; --no-supervisor disables
that."""


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
    parser.add_argument("--seconds", type=_positive, default=30.0, help="duration of the load")
    parser.add_argument("--seed", type=int, default=1, help="the same seed gives the same plan; timing may differ")
    parser.add_argument("--prefills", type=_count, default=3, help="prefill engines")
    parser.add_argument("--decodes", type=_count, default=3, help="decode engines")
    parser.add_argument("--rate", type=_positive, default=20.0, help="requests per second")
    parser.add_argument(
        "--trouble",
        type=_kinds,
        default="all",
        metavar="KIND,KIND",
        help=f"faults to inject: all, none, or any of: {kinds}",
    )
    parser.add_argument("--every", type=_positive, default=3.0, help="mean seconds between two faults")
    parser.add_argument(
        "--no-supervisor", action="store_true", help="restart a killed decode alone, and no frozen engine"
    )
    parser.add_argument("--kv-buffer-bytes", type=_count, default=8_000_000_000, help="KV buffer of each decode")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the report to this file")
    parser.add_argument("--show-plan", action="store_true", help="print the planned faults before the run")
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
