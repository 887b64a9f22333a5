"""Command line: ``sweep`` and ``clocks`` measure one setup into a folder, ``write`` and ``plots`` generate the page and
the plots.

Exit codes: 0 success; 1 a load generator failed or a folder cannot be read; 2 wrong usage; 130 interrupted.
The API key for the requests comes from the environment: BENCH_KEY.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import shlex
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path

from disagg_report import machine
from disagg_report.arrivals import Workload
from disagg_report.client import Client, ClientFailed
from disagg_report.clocks import cli as clocks_cli
from disagg_report.clocks import folder as clock_folder
from disagg_report.clocks import plots as clock_plots
from disagg_report.clocks import summary as clock_summary
from disagg_report.clocks.folder import is_about_clocks
from disagg_report.folder import Header, Setup, read_header, read_report, setup_folder, write_header
from disagg_report.open_loop import OpenLoopClient, key_from_environment, read_placed
from disagg_report.plots import NO_MATPLOTLIB, NoPlots, draw
from disagg_report.power import NoPower, PowerMeter
from disagg_report.progress import Progress
from disagg_report.rates import Ended
from disagg_report.records import BadRecord
from disagg_report.slo import Slo
from disagg_report.summary import summary
from disagg_report.sweep import Plan, Sweep
from disagg_report.verdict import verdict
from disagg_report.vllm_client import VllmClient

_DESCRIPTION = """Measures a server at increasing request rates into a report folder, and writes its page and plots.
`./test_single_machine.sh bench` calls it with the machine's settings."""

INSTALL = f"{sys.executable} -m pip install -r requirements-report.txt"


def numbers(text: str) -> list[float]:
    """Numbers above 0, separated by blanks or commas."""
    found = [float(word) for word in re.split(r"[\s,]+", text.strip()) if word]
    if not all(0 < one < 1e6 for one in found):
        raise ValueError
    return found


def pair(text: str) -> tuple[str, str]:
    """NAME=VALUE."""
    name, sign, value = text.partition("=")
    if not sign or not name:
        raise ValueError
    return name, value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="disagg-proxy bench", description=_DESCRIPTION)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("sweep", help="measure one setup at rising request rates")
    over = commands.add_parser("clocks", help="measure the energy of one setup over the clocks of its GPUs")
    for command in (one, over):
        _add_setup(command)
    one.add_argument("--question", choices=("sweep", "ratio"), default="sweep")
    one.add_argument("--client", choices=("own", "vllm"), default="own")
    one.add_argument("--vllm", default="vllm", help="how vLLM's command line is started, as shell words")
    one.add_argument("--vllm-version", default="")
    one.add_argument("--rates", type=numbers, default=[], help="requests/s, in order; default: found by doubling")
    one.add_argument("--time-limit", type=float, default=900.0, help="seconds after which no further rate starts")
    one.add_argument("--engines", type=int, default=2, help="engines of the setup")
    one.add_argument("--note", action="append", default=[], help="remark on this setup for the report")
    clocks_cli.add_options(over)
    for name, text in (("write", "generate summary.md and the plots again"), ("plots", "generate only the plots")):
        again = commands.add_parser(name, help=text)
        again.add_argument("folder", type=Path)
    for command in (one, over, commands.choices["write"], commands.choices["plots"]):
        fixed = command in (one, over)
        command.add_argument("--slo-ttft-ms", type=float, default=1000.0 if fixed else None)
        command.add_argument("--slo-tpot-ms", type=float, default=50.0 if fixed else None)
        command.add_argument("--slo-attainment", type=float, default=0.9 if fixed else None,
                             help="share of requests that must be within the limits")  # fmt: skip
    return parser


def _add_setup(one: argparse.ArgumentParser) -> None:
    """The arguments of every measurement of a setup."""
    one.add_argument("folder", type=Path, help="of the report; created if missing")
    one.add_argument("--url", action="append", required=True, help="the proxy; or plain engines, once each")
    one.add_argument("--name", required=True, help="of the setup, short")
    one.add_argument("--title", required=True, help="of the setup, for people")
    one.add_argument("--kind", choices=("pd", "plain", "elastic"), default="pd")
    one.add_argument("--model", required=True, help="served name")
    one.add_argument("--tokenizer", default="", help="folder or name; for vllm bench serve")
    one.add_argument("--seconds", type=float, default=30.0, help="time in which a rate's requests are sent")
    one.add_argument("--patience", type=float, help="seconds to wait for responses after the last request")
    one.add_argument("--warm-up", type=int, default=8, help="number of requests before the measurement")
    one.add_argument("--input-len", type=int, default=512, help="tokens of each prompt")
    one.add_argument("--output-len", type=int, default=64, help="tokens of each response")
    one.add_argument("--gpus", type=pair, action="append", default=[], help="ROLE=0,1: GPUs whose power is measured")
    one.add_argument("--fact", type=pair, action="append", default=[], help="NAME=VALUE for the report")
    one.add_argument("--simulated", action="store_true", help="mark the report: the engines are simulated")


def _vocabulary(tokenizer: str) -> int:
    """Vocabulary size of the model in a folder; a size that fits any model if unknown."""
    try:
        config = json.loads((Path(tokenizer) / "config.json").read_text(encoding="utf-8"))
        return int(config.get("vocab_size") or config.get("text_config", {}).get("vocab_size") or 8000)
    except (OSError, ValueError, AttributeError, TypeError):
        return 8000


def _header(args: argparse.Namespace) -> Header:
    """Header of the report; the first setup writes it."""
    if (args.folder / "report.json").exists():
        return read_header(args.folder)
    now = datetime.now().astimezone()
    header = Header(
        made=now.isoformat(timespec="seconds"),
        question=args.question,
        slo=Slo(args.slo_ttft_ms, args.slo_tpot_ms, args.slo_attainment),
        input_tokens=args.input_len,
        output_tokens=args.output_len,
        seconds=args.seconds,
        seed=int(now.timestamp()),
        simulated=args.simulated,
        facts={**machine.facts(), **dict(args.fact)},
    )
    write_header(args.folder, header)
    return header


async def _sweep(args: argparse.Namespace) -> Ended:
    header = _header(args)
    folder = setup_folder(args.folder, args.name)
    workload = Workload(
        args.model, header.input_tokens, header.output_tokens, header.seconds, header.seed, _vocabulary(args.tokenizer)
    )
    key = key_from_environment()
    own = OpenLoopClient(args.url, workload, key, args.patience)
    client: Client = own
    notes = list(args.note)
    if args.client == "vllm":
        slo = header.slo
        goodput = [f"ttft:{slo.ttft_ms:g}", f"tpot:{slo.tpot_ms:g}"]
        client = VllmClient(shlex.split(args.vllm), args.vllm_version, args.url, workload, args.tokenizer or args.model,
                            goodput, folder, key)  # fmt: skip
        if len(args.url) > 1:
            notes.append(f"{len(args.url)} processes in parallel, one for each engine with its share of the rate.")
    elif len(args.url) > 1:
        notes.append("Requests went to the engines in turn.")
    meter, no_power = None, "no GPUs are measured"
    if args.gpus:
        try:
            meter, no_power = PowerMeter({role: names.split(",") for role, names in args.gpus if names}), ""
        except NoPower as error:
            no_power = str(error)
    setup = Setup(args.name, args.title, args.kind, client.name, tuple(args.url), args.engines, no_power=no_power,
                  notes=tuple(notes))  # fmt: skip
    plan = Plan(workload, header.slo, args.rates, args.time_limit, max(1, args.warm_up))
    placed = partial(read_placed, args.url[0], key) if args.kind == "elastic" else None
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, stop.set)
    return await Sweep(setup, folder, plan, client, own, meter, Progress(sys.stderr), stop, placed).run()


def _write(args: argparse.Namespace, only_plots: bool) -> int:
    about_clocks = is_about_clocks(args.folder)
    plots: list[Path] = []
    no_plots = ""
    if about_clocks:
        over_clocks = clock_folder.read_report(args.folder)
    else:
        report = read_report(args.folder)
        slo = report.header.slo
        changed = Slo(
            slo.ttft_ms if args.slo_ttft_ms is None else args.slo_ttft_ms,
            slo.tpot_ms if args.slo_tpot_ms is None else args.slo_tpot_ms,
            slo.attainment if args.slo_attainment is None else args.slo_attainment,
        )
        report = replace(report, header=replace(report.header, slo=changed))
    try:
        plots = clock_plots.draw(over_clocks, args.folder) if about_clocks else draw(report, args.folder)
    except NoPlots as error:
        no_plots = str(error)
        if no_plots == NO_MATPLOTLIB:
            again = f"-m disagg_report plots {args.folder}"
            print(f"No plots: {no_plots}. {INSTALL} && {sys.executable} {again}", file=sys.stderr)
            no_plots += (
                "; `pip install -r requirements-report.txt`, then `python -m disagg_report plots` with this folder"
            )
        else:
            print(f"No plots: {no_plots}", file=sys.stderr)
        if only_plots:
            return 1
    if about_clocks:
        page, sentence = clock_summary.summary(over_clocks, plots, no_plots), clock_summary.verdict(over_clocks)
    else:
        page, sentence = summary(report, plots, no_plots), verdict(report)
    (args.folder / "summary.md").write_text(page, encoding="utf-8")
    if not only_plots:
        print(sentence)
    print(args.folder / "summary.md")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """See the module for the exit codes."""
    args = _parser().parse_args(argv)
    try:
        if args.command == "clocks":
            return asyncio.run(clocks_cli.run(args, _vocabulary(args.tokenizer)))
        if args.command != "sweep":
            return _write(args, only_plots=args.command == "plots")
        return 130 if asyncio.run(_sweep(args)) is Ended.INTERRUPTED else 0
    except (ClientFailed, BadRecord, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
