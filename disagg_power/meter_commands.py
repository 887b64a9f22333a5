"""``power show`` and ``power record``."""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from disagg_power import record_plot
from disagg_power.devices import Devices, PowerError
from disagg_power.gpus import open_devices
from disagg_power.proxy_client import NoProxy, ProxyClient
from disagg_power.recorder import Recorded, Recorder, requests_file, write_parquet

_UNITS = {"ms": 1e-3, "s": 1.0, "min": 60.0, "": 1.0}


def add_parsers(commands: Any) -> None:
    """Add both commands to those of ``disagg-proxy power``."""
    show = commands.add_parser("show", help="power and energy per token of each role, live", allow_abbrev=False)
    _proxy_options(show)
    show.add_argument("--once", action="store_true", help="print once and exit; the default without a terminal")
    show.set_defaults(run=_show)
    record = commands.add_parser(
        "record", help="power and clocks of the GPUs, and the requests, to CSV files and a plot", allow_abbrev=False
    )
    _proxy_options(record)
    record.add_argument(
        "--out", type=Path, required=True, metavar="FILE",
        help="CSV file of the samples; requests, Parquet and plot are written beside it",
    )  # fmt: skip
    record.add_argument("--interval", type=_duration, default=0.1, metavar="TIME", help="such as 100ms (default)")
    record.add_argument("--seconds", type=_duration, metavar="TIME", help="length, such as 60s; else until Ctrl+C")
    record.add_argument(
        "--gpus", default="", metavar="ROLE=GPU,...",
        help="GPUs to record, such as prefill=0,decode=1+2; by default those that the proxy knows, else all",
    )  # fmt: skip
    record.add_argument("--no-proxy", action="store_true", help="record GPUs only, without a proxy's requests")
    record.add_argument("--no-plot", action="store_true", help="draw nothing")
    record.set_defaults(run=_record)


def _proxy_options(parser: argparse.ArgumentParser) -> None:
    port = os.environ.get("HTTP_PROXY_PORT") or "10001"
    parser.add_argument(
        "--url", default=f"http://127.0.0.1:{port}", help="URL of the proxy, with its path prefix if it has one"
    )
    parser.add_argument("--key", default=os.environ.get("API_KEY", ""), help="API key of the proxy (default: API_KEY)")


def _duration(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s|min|)", text)
    if match is None or float(match[1]) <= 0:
        raise argparse.ArgumentTypeError("must be a time such as 100ms, 60s or 5min")
    return float(match[1]) * _UNITS[match[2]]


# -- show


def _show(args: argparse.Namespace) -> int:
    once = args.once or not sys.stdout.isatty()
    try:
        proxy = ProxyClient(args.url, args.key)
        while True:
            text = table(proxy.energy())
            print(text if once else f"\x1b[H\x1b[2J{text}", flush=True)
            if once:
                return 0
            time.sleep(2.0)
    except NoProxy as error:
        print(f"disagg-proxy power: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0


NOTHING = (
    "No engine reports a GPU: use this project's connector, or tell the proxy the GPUs of the others (POWER_GPUS)."
)


def table(energy: dict[str, Any]) -> str:
    """The figures of /stats for people."""
    if not energy:
        return NOTHING
    lines = ["SIMULATED GPUs: the figures are those of a model."] if energy["simulated"] else []
    lines += [f"{'':8} {'now':>8} {'idle':>8} {'tokens':>10} {'per token':>12} {'above idle':>12}"]
    for role, found in energy["roles"].items():
        lines.append(
            f"{role:8} {_unit(found['watts'], 'W'):>8} {_unit(found['idle_watts'], 'W'):>8} {found['tokens']:>10,} "
            f"{_joules(found['joules_per_token']):>12} {_joules(found['active_joules_per_token']):>12}"
        )
    rate = energy["requests_per_wh"]
    lines.append(
        f"{energy['requests']} requests in {energy['window_s']:.0f} s: {_joules(energy['joules_per_request'])} each, "
        f"{'–' if rate is None else f'{rate:,.1f}'} requests/Wh"
    )
    for gpu in energy["gpus"]:
        more = [] if gpu["state"] == "ok" else [gpu["state"]]
        more += ["integral of power"] if gpu["source"] == "integral" else []
        more += [f"shared with {', '.join(gpu['shared_with'])}"] if gpu["shared_with"] else []
        name = gpu["name"] if gpu["index"] is None else f"GPU {gpu['index']} {gpu['name']}"
        clock = _unit(gpu["sm_clock_mhz"], "MHz")
        lines.append(f"  {gpu['role']} {gpu['instance'] or ''}: {name}, {_unit(gpu['watts'], 'W')}, SM {clock}"
                     + "".join(f", {text}" for text in more))  # fmt: skip
    return "\n".join(lines)


def _unit(value: float | None, unit: str) -> str:
    return "–" if value is None else f"{value:,.0f} {unit}"


def _joules(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.2f} J" if value >= 1 else f"{1e3 * value:,.2f} mJ"


# -- record


def _record(args: argparse.Namespace) -> int:
    try:
        proxy = None if args.no_proxy else ProxyClient(args.url, args.key)
        devices = open_devices(os.environ)
        try:
            gpus = chosen(devices, args.gpus, {} if proxy is None else proxy.energy())
            recorder = Recorder(gpus, args.out, args.interval, proxy)
            print(f"Recording {len(gpus)} GPUs to {args.out}, every {1e3 * args.interval:g} ms", flush=True)
            recorder.run(args.seconds)
        finally:
            devices.close()
    except NoProxy as error:
        print(f"disagg-proxy power: {error}; --no-proxy records GPUs only", file=sys.stderr)
        return 1
    except (PowerError, OSError) as error:
        print(f"disagg-proxy power: {error}", file=sys.stderr)
        return 1
    _tell(recorder)
    parquet = write_parquet(args.out)
    if parquet is not None:
        print(parquet)
    if not args.no_plot:
        plot = args.out.with_suffix(".svg")
        simulated = any(one.device.simulated for one in gpus)
        try:
            record_plot.draw(args.out, plot, "SIMULATED GPUs" if simulated else "")
            print(plot)
        except record_plot.NoPlot as error:
            print(f"No plot: {error}")
    return 0


def _tell(recorder: Recorder) -> None:
    print(f"{recorder.samples} samples, {recorder.requests} requests: {recorder.out}, {requests_file(recorder.out)}")
    if recorder.missed:
        print(f"{recorder.missed} samples were skipped: this machine was too busy for the interval")
    if recorder.proxy_error:
        print(f"Requests are missing: {recorder.proxy_error}")
    for one, meter in recorder.meters:
        parts = [f"{meter.counted:.1f} J by its counter" if meter.counted else f"{meter.integrated:.1f} J as integral"]
        if meter.deviation is not None:
            parts.append(f"the integral of power deviates by {meter.deviation:+.1%}")
        if meter.restarts:
            parts.append(f"the counter restarted {meter.restarts} times")
        print(f"  {one.role or 'GPU'} {one.device.index} {one.device.name}: {', '.join(parts)}")


def chosen(devices: Devices, words: str, energy: dict[str, Any]) -> Sequence[Recorded]:
    """The GPUs to record: as ``words`` names them, else as the proxy knows them, else all.

    Raises:
        PowerError: a GPU is not here.
    """
    if words:
        found = []
        for part in words.split(","):
            role, _, names = part.rpartition("=")
            found += [Recorded(devices.find(name), role.strip()) for name in names.split("+")]
        return found
    known = {gpu["uuid"]: gpu for gpu in energy.get("gpus", ())}
    here = [device for device in devices.all() if device.uuid in known]
    if not here:
        return [Recorded(device) for device in devices.all()]
    return [Recorded(d, str(known[d.uuid]["role"]), str(known[d.uuid]["instance"] or "")) for d in here]
