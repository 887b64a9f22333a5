"""`bench`: the report of what runs, of every split, and beside plain engines; what ends it early; its progress bar."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pexpect
import pytest

from disagg_report.folder import read_report
from disagg_report.verdict import verdict
from tests.script.machine import Machine, wait_for
from tests.script.stubs import Stubs

pytestmark = [
    # The test runner has threads, about which Python 3.12 and newer warn at every fork.
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork.*:DeprecationWarning"),
    pytest.mark.timeout(300),
]


@pytest.fixture
def bench(machine: Machine, tmp_path: Path) -> Iterator[Machine]:
    """A machine whose reports are small and quick."""
    machine.env |= {
        "REPORT_DIR": str(tmp_path / "re ports"),
        "BENCH_RATES": "8 16",
        "BENCH_SECONDS": "1",
        "BENCH_INPUT_LEN": "32",
        "BENCH_OUTPUT_LEN": "4",
        # How many requests keep an SLO depends on the host's load: here all do. tests/report has the verdicts.
        "BENCH_SLO_TTFT_MS": "100000",
        "BENCH_SLO_TPOT_MS": "100000",
    }
    return machine


@pytest.fixture
def stubs(tmp_path: Path, bench: Machine) -> Stubs:
    made = Stubs(tmp_path / "stubs")
    bench.env |= {"PATH": made.path, "ENGINE": "vllm"}
    return made


def report(machine: Machine) -> Path:
    """The folder of the only report."""
    (folder,) = Path(machine.env["REPORT_DIR"]).iterdir()
    return folder


def rates(folder: Path) -> dict[str, list[float]]:
    """Rates that were measured whole, by setup."""
    found: dict[str, list[float]] = {}
    for file in sorted(folder.glob("setups/*/rate-*.json")):
        value: dict[str, Any] = json.loads(file.read_text())
        if not value["interrupted"]:
            found.setdefault(file.parent.name, []).append(value["rate"])
    return found


def test_the_report_of_what_runs(bench: Machine) -> None:
    assert bench.run("bench").returncode == 3
    bench.ok("all")
    pids = {name: bench.pid(name) for name in ("proxy", "prefill", "decode")}
    done = bench.ok("bench")
    folder = report(bench)
    assert rates(folder) == {"01-pd": [8, 16]}
    page = (folder / "summary.md").read_text()
    assert done.stdout.splitlines()[-1] == str(folder / "summary.md")
    assert "1 prefill + 1 decode serves" in done.stdout and "SIMULATED ENGINES" in page
    assert "**Load generator: the project's own**" in page and "say nothing about GPUs" in done.stderr
    assert "1 prefill + 1 decode, 16 requests/s: TTFT p50" in done.stderr and "\r" not in done.stderr
    assert re.search(r"\| 8 \| 8 \| 8 \| 100% \| 8.00 \| kept \|", page)
    assert {name: bench.pid(name) for name in pids} == pids
    assert bench.get("/stats")["instances"][0]["requests_total"] > 0


def test_which_split_serves_most(bench: Machine) -> None:
    """Every split is measured, the verdict is that of the figures, and what ran before runs again afterwards."""
    bench.env |= {"BENCH_SIM_ENGINES": "3", "BENCH_RATES": "8"}
    bench.ok("all", "--no-supervise")
    done = bench.ok("bench", "--ratio", timeout=280)
    folder = report(bench)
    assert rates(folder) == {"01-p1d2": [8], "02-p2d1": [8]}
    sentence = verdict(read_report(folder))
    assert "1 prefill + 2 decode" in sentence and "2 prefill + 1 decode" in sentence and sentence in done.stdout
    assert "# Which ratio of prefill to decode" in (folder / "summary.md").read_text()
    status = bench.ok("status")
    assert re.findall(r"^(\w+) ", status.stdout, re.M)[1:] == ["proxy", "prefill", "decode"]
    assert done.stderr.count("SIMULATED ENGINES") == 1
    bench.ok("test")


def test_against_plain_engines_on_the_same_gpus(bench: Machine) -> None:
    bench.env |= {"ENGINE_API_KEY": "engine-key", "API_KEY": "proxy-key"}
    assert bench.run("bench", "--against-plain").returncode == 3
    bench.ok("all")
    done = bench.ok("bench", "--against-plain", timeout=280)
    folder = report(bench)
    assert rates(folder) == {"01-pd": [8, 16], "02-plain": [8, 16]}
    setup = json.loads((folder / "setups/02-plain/setup.json").read_text())
    first = int(bench.env["PREFILL_HTTP_PORT"])
    assert setup["urls"] == [f"http://127.0.0.1:{first}", f"http://127.0.0.1:{first + 1}"]
    assert "requests within the SLO" in done.stdout and "2 plain engines" in done.stdout
    # All is as before: supervised, and no plain engine is left.
    status = bench.ok("status").stdout
    assert re.findall(r"^(\w+) ", status, re.M)[1:] == ["proxy", "prefill", "decode", "supervisor"]
    for file in folder.rglob("*"):
        assert file.is_dir() or (b"engine-key" not in file.read_bytes() and b"proxy-key" not in file.read_bytes())


def test_vllm_bench_serve_where_there_is_vllm(bench: Machine, stubs: Stubs) -> None:
    stubs.vllm("0.22.0", randomises=True, switch=True)
    stubs.nvidia_smi(2)
    bench.env["ENFORCE_EAGER"] = "1"
    bench.ok("all")
    done = bench.ok("bench", "--against-plain", timeout=280)
    page = (report(bench) / "summary.md").read_text()
    assert "SIMULATED" not in page + done.stderr and "vllm bench serve 0.22.0" in page
    assert rates(report(bench)) == {"01-pd": [8, 16], "02-plain": [8, 16]}
    assert "| GPU 0 | " not in page or "NVIDIA Stub" in page
    assert "| KV connector | p2p_nccl |" in page and "| vLLM | 0.22.0 |" in page
    calls = [record["argv"] for record in stubs.started() if record["argv"][0] == "bench"]
    assert len(calls) == 2 + 4
    through, plain = calls[0], calls[-1]
    assert through[through.index("--base-url") + 1] == bench.url and "--save-detailed" in through
    assert plain[plain.index("--request-rate") + 1] == "8"  # half of 16 for each of two
    served = [record for record in stubs.started() if record["argv"][0] == "serve"]
    alone = [record for record in served if "--kv-transfer-config" not in record["argv"]]
    # They start together; which of them writes its record first is up to the machine.
    alone.sort(key=lambda record: int(record["argv"][record["argv"].index("--port") + 1]))
    assert [record["env"]["CUDA_VISIBLE_DEVICES"] for record in alone] == ["0", "1"]
    # Engines that start together do not look for free ports at the same place.
    ports = sorted(int(record["env"]["VLLM_PORT"]) for record in alone)
    assert ports[1] - ports[0] >= 64
    assert all("--enforce-eager" in record["argv"] for record in alone)


def test_the_splits_are_those_of_the_gpus_on_hand(bench: Machine, stubs: Stubs) -> None:
    stubs.vllm("0.22.0", randomises=True, switch=True)
    stubs.nvidia_smi(3)
    bench.env |= {"BENCH_CLIENT": "own", "BENCH_RATES": "4"}
    done = bench.ok("bench", "--ratio", timeout=280)
    assert "not vllm bench serve" in done.stderr
    assert list(rates(report(bench))) == ["01-p1d2", "02-p2d1"]
    gpus = [
        (json.loads(record["argv"][-1])["kv_role"], record["env"]["CUDA_VISIBLE_DEVICES"]) for record in stubs.started()
    ]
    assert sorted(gpus[:3]) == [("kv_consumer", "1"), ("kv_consumer", "2"), ("kv_producer", "0")]
    assert sorted(gpus[3:]) == [("kv_consumer", "2"), ("kv_producer", "0"), ("kv_producer", "1")]
    assert bench.run("status").returncode == 3  # nothing ran before


def test_wrong_usage_and_what_cannot_be_compared(bench: Machine) -> None:
    assert bench.run("bench", "--fast").returncode == 2
    assert bench.run("bench", "--once", "--ratio").returncode == 2
    assert bench.run("bench", BENCH_RATES="1 zero").returncode == 2
    assert bench.run("bench", BENCH_RATES="1 0 2").returncode == 2
    twice = bench.run("bench", "--ratio", PREFILL_GPUS="0", DECODE_GPUS="0,1")
    assert twice.returncode == 1 and "GPU 0 is named twice" in twice.stderr
    alone = bench.run("bench", "--ratio", BENCH_SIM_ENGINES="1")
    assert alone.returncode == 1 and "two are needed" in alone.stderr
    long = bench.run("bench", "--ratio", BENCH_INPUT_LEN="9999", MAX_MODEL_LEN="10000")
    assert long.returncode == 2 and "MAX_MODEL_LEN" in long.stderr
    assert not Path(bench.env["REPORT_DIR"]).exists()


def test_a_split_that_does_not_start_leaves_nothing_running(bench: Machine) -> None:
    done = bench.run("bench", "--ratio", EXTRA_SIM_ARGS="--no-such-flag")
    assert done.returncode == 1 and "--no-such-flag" in done.stderr and "nothing was measured" in done.stderr
    assert bench.leftovers() == {}


def test_engines_in_terminals_of_their_own_are_left_alone(bench: Machine) -> None:
    process = bench.start("proxy")
    wait_for(lambda: bool(bench.fields("proxy")))
    done = bench.run("bench", "--ratio")
    assert done.returncode == 1 and "terminal of its own" in done.stderr
    process.send_signal(signal.SIGINT)
    process.wait(60)


def terminal(bench: Machine, *words: str) -> pexpect.spawn[str]:
    command = bench.command(*words)
    return pexpect.spawn(
        command[0], command[1:], env=bench.env, encoding="utf-8", timeout=120, dimensions=(50, 200)
    )  # fmt: skip


def test_a_bar_on_a_terminal_and_ctrl_c_that_keeps_what_was_measured(bench: Machine) -> None:
    bench.env |= {"BENCH_RATES": "8 20", "BENCH_SECONDS": "2"}
    bench.ok("all")
    child = terminal(bench, "bench")
    child.expect(r"1 prefill \+ 1 decode, 8 requests/s \[#+-*\] \d+/16 answered")
    child.expect("good requests/s: kept")
    child.expect(r"20 requests/s \[#+-+\] \d+/40 answered")
    child.sendintr()
    child.expect_exact("summary.md")
    child.expect(pexpect.EOF)
    child.wait()
    assert child.exitstatus == 130
    folder = report(bench)
    assert rates(folder) == {"01-pd": [8]}
    page = (folder / "summary.md").read_text()
    assert "it was interrupted" in page and "cut short" in page
    bench.ok("test")


def test_a_signal_to_the_script_alone_ends_the_measurement(bench: Machine) -> None:
    bench.ok("all")
    process = bench.start("bench", BENCH_RATES="8", BENCH_SECONDS="60")
    folder = Path(bench.env["REPORT_DIR"])
    wait_for(lambda: bool(list(folder.glob("*/setups/01-pd/setup.json"))))
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    assert not any("disagg_report" in command for command in bench.leftovers().values())
    bench.ok("test")


def test_ctrl_c_in_a_split_brings_back_what_ran(bench: Machine) -> None:
    bench.env |= {"BENCH_SIM_ENGINES": "2", "BENCH_SECONDS": "30"}
    bench.ok("all", "--no-supervise")
    child = terminal(bench, "bench", "--ratio")
    child.expect(r"requests/s \[#")
    child.sendintr()
    child.expect_exact("Starting again what ran before")
    child.expect(pexpect.EOF)
    child.wait()
    assert child.exitstatus == 130
    bench.ok("test")


def test_the_menu_offers_the_report(bench: Machine) -> None:
    bench.ok("all")
    child = terminal(bench, "menu")
    child.expect_exact("Your choice: ")
    child.sendline("12")
    child.expect_exact("1 report over request rates")
    child.sendline("")
    child.expect_exact("summary.md")
    child.expect_exact("Your choice: ")
    child.sendline("0")
    child.expect(pexpect.EOF)
    assert rates(report(bench)) == {"01-pd": [8, 16]}
