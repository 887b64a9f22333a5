"""The recorder and its commands: rows, requests, phases, plot; and the table of ``power show``."""

from __future__ import annotations

import csv
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from disagg_power import cli, record_plot
from disagg_power.book import EnergyBook
from disagg_power.meter_commands import NOTHING, chosen, table
from disagg_power.proxy_client import NoProxy, ProxyClient
from disagg_power.recorder import Recorded, Recorder, requests_file
from disagg_power.simulated import GpuModel, SimulatedGpus
from tests.power.figures import count_energy
from tests.power.test_simulated import Clock

MODEL = GpuModel(idle_w=100, dynamic_w=400)


def figures() -> dict[str, Any]:
    book = EnergyBook()
    count_energy(book, 1000.0)
    return book.report(1000.0) or {}


class Proxy(BaseHTTPRequestHandler):
    """/stats and the feed, as the proxy has them."""

    recent: ClassVar[list[dict[str, Any]]] = []

    def do_GET(self) -> None:
        if self.headers.get("Authorization") != "Bearer right":
            self.send_error(401)
            return
        if self.path == "/stats":
            body = json.dumps({"energy": figures()}).encode()
        else:
            body = b"event: view\ndata: " + json.dumps({"recent": self.recent}).encode() + b"\n\n"
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        """Nothing."""


@pytest.fixture
def url() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def record(out: Path, seconds: float = 3.05, proxy: ProxyClient | None = None, **model: Any) -> Recorder:
    clock = Clock()
    gpus = SimulatedGpus(models=[GpuModel(idle_w=100, dynamic_w=400, **model)] * 2, clock=clock)

    def sleep(seconds: float) -> None:
        clock.now += seconds
        gpus.find("0").set_load(1.0 if clock.now > 51 else 0.0)

    recorded = [Recorded(gpus.find("0"), "prefill", "p:1"), Recorded(gpus.find("1"), "decode", "d:1")]
    recorder = Recorder(recorded, out, 0.1, proxy, clock, sleep)
    recorder.run(seconds)
    return recorder


def test_a_row_for_each_gpu_and_sample(tmp_path: Path) -> None:
    recorder = record(out := tmp_path / "run.csv")
    found = rows(out)
    assert recorder.samples == 31 and len(found) == 62 and recorder.missed == 0
    prefill = [row for row in found if row["role"] == "prefill"]
    assert [row["elapsed_s"] for row in prefill[:3]] == ["0.000", "0.100", "0.200"]
    assert {row["power_w"] for row in prefill} == {"100.0", "500.0"} and prefill[-1]["sm_clock_mhz"] == "1980"
    assert float(prefill[-1]["energy_j"]) == pytest.approx(1 * 100 + 2 * 500, rel=0.1)
    assert {row["power_w"] for row in found if row["role"] == "decode"} == {"100.0"}


def test_a_machine_that_is_too_slow_skips_samples_and_counts_them(tmp_path: Path) -> None:
    clock = Clock()
    gpus = SimulatedGpus(models=[MODEL], clock=clock)

    def slow(seconds: float) -> None:
        clock.now += seconds + 0.25

    recorder = Recorder([Recorded(gpus.find("0"))], tmp_path / "run.csv", 0.1, None, clock, slow)
    recorder.run(3.0)
    assert recorder.samples + recorder.missed == pytest.approx(31, abs=3) and recorder.missed > 10


def test_requests_and_their_phases_stand_beside_the_samples(tmp_path: Path, url: str, monkeypatch) -> None:
    monkeypatch.setattr("disagg_power.recorder.time.time", lambda: 1000.0)
    base = {"id": "x", "prefill": "p:1", "decode": "d:1", "outcome": "ok", "prompt_tokens": 9, "cached_tokens": None,
            "output_tokens": 5}  # fmt: skip
    monkeypatch.setattr(Proxy, "recent", [
        {**base, "seq": 1, "time": 999.0, "bars": {}},
        {**base, "seq": 2, "time": 1000.5, "bars": {"prefill": [0, 500], "decode": [600, 1500]}},
        {**base, "seq": 3, "time": 1001.0, "bars": {"decode": [100, 200]}},
    ])  # fmt: skip
    recorder = record(out := tmp_path / "run.csv", proxy=ProxyClient(url, "right"))
    found = rows(requests_file(out))
    assert recorder.requests == 2 and [row["seq"] for row in found] == ["2", "3"], "each once, and none from before"
    assert found[0]["prefill_start_s"] == "0.5" and found[0]["decode_end_s"] == "2.0"
    assert record_plot.read_phases(requests_file(out)) == {
        "prefill": [(0.5, 1.0)], "decode": [(1.1, 2.0), (1.1, 1.2)]
    }  # fmt: skip


def test_overlapping_phases_are_one() -> None:
    assert record_plot.merged([(3, 4), (1, 2), (1.5, 2.5), (2.5, 2.6)]) == [(1, 2.6), (3, 4)]


def test_the_plot_is_drawn_and_equal_recordings_give_equal_files(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    record(out := tmp_path / "run.csv")
    record_plot.draw(out, one := tmp_path / "one.svg", "SIMULATED GPUs")
    record_plot.draw(out, two := tmp_path / "two.svg", "SIMULATED GPUs")
    assert one.read_bytes() == two.read_bytes() and b"SIMULATED GPUs" in one.read_bytes()
    record(bare := tmp_path / "bare.csv", power_reading=False)
    with pytest.raises(record_plot.NoPlot, match="no sample"):
        record_plot.draw(bare, tmp_path / "bare.svg")


def test_which_gpus_are_recorded() -> None:
    gpus = SimulatedGpus(models=[MODEL] * 3)
    named = chosen(gpus, "prefill=0,decode=1+2", {})
    assert [(one.role, one.device.index) for one in named] == [("prefill", 0), ("decode", 1), ("decode", 2)]
    known = {"gpus": [{"uuid": gpus.find("2").uuid, "role": "decode", "instance": "d:1"}]}
    assert [(one.role, one.instance, one.device.index) for one in chosen(gpus, "", known)] == [("decode", "d:1", 2)]
    assert len(chosen(gpus, "", {})) == 3


def test_show_says_what_each_role_costs(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["show", "--once", "--url", url, "--key", "right"]) == 0
    shown = capsys.readouterr().out
    assert "prefill" in shown and "1.00 J" in shown and "2.00 J" in shown and "18.0 requests/Wh" in shown
    assert table({}) == NOTHING
    assert cli.main(["show", "--once", "--url", url, "--key", "wrong"]) == 1
    assert "requires its API key" in capsys.readouterr().err
    with pytest.raises(NoProxy, match="must look like"):
        ProxyClient("127.0.0.1:10001")


def test_record_writes_its_files(tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "gpus.json"
    SimulatedGpus(file, [MODEL])
    monkeypatch.setenv("POWER_SIMULATED", str(file))
    out = tmp_path / "run.csv"
    words = ["record", "--no-proxy", "--no-plot", "--gpus", "decode=0", "--seconds", "200ms", "--interval", "20ms"]
    assert cli.main([*words, "--out", str(out)]) == 0
    assert len(rows(out)) >= 1 and rows(out)[0]["role"] == "decode"
    assert "Recording 1 GPUs" in capsys.readouterr().out
    assert cli.main([*words, "--gpus", "decode=7", "--out", str(out)]) == 1
    assert "no GPU is named '7'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main([*words, "--interval", "0s", "--out", str(out)])
