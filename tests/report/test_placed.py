"""What a report notes of an elastic proxy: where it placed the requests of each rate."""

from __future__ import annotations

import asyncio
import io
from functools import partial
from pathlib import Path

import pytest

from disagg_report.arrivals import Workload
from disagg_report.folder import read_report, setup_folder, write_header
from disagg_report.open_loop import OpenLoopClient, read_placed
from disagg_report.placed import between, shares
from disagg_report.progress import Progress
from disagg_report.rates import Ended
from disagg_report.sweep import Plan, Sweep
from tests.report.make import SLO, header, setup
from tests.simulated import machine, pair

__all__ = ["machine", "pair"]


def test_shares_of_what_was_placed_in_between() -> None:
    placed = between({"split": 10, "decode_alone": 5}, {"split": 13, "decode_alone": 6, "prefill_alone": 0})
    assert placed == {"split": 3, "decode_alone": 1, "prefill_alone": 0}
    assert shares(placed) == "split 75%, decode alone 25%"
    assert shares({}) == shares({"split": 0}) == ""


@pytest.mark.settings(placement="elastic")
async def test_a_sweep_notes_where_requests_were_placed(machine, pair, tmp_path: Path) -> None:
    url = machine.proxy.url
    workload = Workload("sim-model", input_tokens=20, output_tokens=3, seconds=0.2, seed=1)
    client = OpenLoopClient([url], workload)
    write_header(tmp_path, header("ratio"))
    folder = setup_folder(tmp_path, "elastic")
    about, plan = setup("elastic", "Elastic", kind="elastic"), Plan(workload, SLO, [20, 40], 60.0, 2)
    sweep = Sweep(
        about,
        folder,
        plan,
        client,
        client,
        None,
        Progress(io.StringIO()),
        asyncio.Event(),
        partial(read_placed, url, ""),
    )
    assert await sweep.run() is Ended.LIST
    rates = read_report(tmp_path).setups[0].rates
    assert [sum(rate.placed.values()) for rate in rates] == [4, 8], "without the warm-up"
    assert await read_placed(f"http://{pair[0].http_address}", "") == {}, "an engine has no placement"
    await machine.proxy.until_idle()
