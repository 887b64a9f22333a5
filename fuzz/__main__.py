"""Command line: ``python -m fuzz TARGET [--seconds N] [--seed S]``; one JSON line a target, exit 1 on a finding."""

from __future__ import annotations

import argparse
import asyncio
import importlib
import logging
import sys
from pathlib import Path

from fuzz.pure import Report, has_atheris, load, run_guided, run_seeded

PURE = ("prepare", "bodies", "answers", "announcement", "wire")
LIVE = ("http_side", "pair_side", "zmq_side")


def main() -> int:
    """Run what the command line asks for."""
    options = _parser().parse_args()
    if options.target == "list":
        for name in (*PURE, *LIVE):
            print(f"{name:14}{(importlib.import_module('fuzz.' + name).__doc__ or '').splitlines()[0]}")
        return 0
    if options.input is not None:
        print(load(options.target).check(options.input.read_bytes()))
        return 0
    logging.disable(logging.INFO)
    failed = False
    for name in (*PURE, *LIVE) if options.target == "all" else (options.target,):
        report = _run(name, options)
        print(report.text(), flush=True)
        failed |= bool(report.findings)
    return int(failed)


def _run(name: str, options: argparse.Namespace) -> Report:
    if name in LIVE:
        running = importlib.import_module(f"fuzz.{name}").run(options.seed, seconds=options.seconds)
        report: Report = asyncio.run(running)
        return report
    if options.engine == "atheris" or (options.engine is None and has_atheris()):
        corpus = None if options.corpus is None else options.corpus / name
        return run_guided(name, options.seed, seconds=options.seconds, corpus=corpus)
    return run_seeded(name, options.seed, seconds=options.seconds)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fuzz", description="Hostile input in quantity: docs/fuzzing.md")
    parser.add_argument("target", choices=("list", "all", *PURE, *LIVE), metavar="TARGET", help="list names them")
    parser.add_argument("--seconds", type=float, default=30.0, help="for each target (30)")
    parser.add_argument("--seed", type=int, default=1, help="of what is made up (1)")
    parser.add_argument("--engine", choices=("atheris", "seeded"), help="of targets without sockets (atheris if there)")
    parser.add_argument("--corpus", type=Path, help="folder that keeps what atheris found new")
    parser.add_argument("--input", type=Path, help="run one input of a target without sockets instead")
    return parser


if __name__ == "__main__":
    sys.exit(main())
