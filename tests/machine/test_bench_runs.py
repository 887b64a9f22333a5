"""`bench`: one report, however its measurement ends, and the setups that are started for it."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from disagg_machine import net
from disagg_machine.bench import child, report, running, setups
from disagg_machine.bench.plan import Setup
from disagg_machine.bench.report import Report
from disagg_machine.bench.setups import Before, Comparison
from disagg_machine.context import Context
from disagg_machine.engines import SIM, VLLM, Engines
from disagg_machine.messages import MachineError
from tests.machine.bench_parts import part, refused
from tests.machine.conftest import MakeContext

# -- one report


PROGRAM = """\
import json, os, signal, sys, pathlib, time
words = sys.argv[3:]
record = {"words": words, "key": os.environ.get("BENCH_KEY"), "folder": os.getcwd()}
with open(os.environ["RECORDS"], "a") as file:
    file.write(json.dumps(record) + "\\n")
if words[0] == "write":
    sys.exit(int(os.environ.get("WRITE_ENDS", "0")))
made = pathlib.Path(words[1], "setups", "01-" + words[words.index("--name") + 1])
made.mkdir(parents=True)
(made / "rate-1.json").write_text("{}")
if os.environ.get("HANGS"):
    # Blocked first: a signal between two statements would be lost to pause().
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    os.kill(os.getppid(), signal.SIGTERM)
    signal.sigwait({signal.SIGTERM})
    sys.exit(130)
sys.exit(int(os.environ.get("SWEEP_ENDS", "0")))
"""


class Records:
    """A stand-in for the Python that has disagg_report, and what it was called with."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "records"
        (folder / "program.py").write_text(PROGRAM)
        self.python = folder / "python"
        self.python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "{folder}/program.py" "$@"\n')
        self.python.chmod(self.python.stat().st_mode | stat.S_IXUSR)

    def read(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.file.read_text().splitlines()] if self.file.exists() else []


@pytest.fixture
def records(tmp_path: Path) -> Records:
    return Records(tmp_path)


def new_report(context: Context, records: Records, **environ: str) -> Report:
    context.environ.update({"RECORDS": str(records.file), **environ})
    folder = context.settings.report_dir / "one"
    folder.mkdir(parents=True)
    return Report(context, str(records.python), SIM, None, "own", folder)


SETUP = Setup("pd", "title", "pd", "sweep", 2, 1, ("http://127.0.0.1:1",))


def test_a_measurement_gets_the_key_in_its_environment(make_context: MakeContext, records: Records) -> None:
    context = make_context()
    one = new_report(context, records)
    assert report.finish(lambda: one.measure(SETUP, "sesame"), one.write) == 0
    first, second = records.read()
    assert first["words"][0] == "sweep" and first["key"] == "sesame" and first["folder"] == str(context.root)
    assert "sesame" not in first["words"] and second["words"] == ["write", str(one.folder)] and second["key"] is None


@pytest.mark.parametrize(
    ("environ", "expected"),
    [({"SWEEP_ENDS": "130"}, 130), ({"SWEEP_ENDS": "1"}, 1), ({"WRITE_ENDS": "5"}, 1), ({"HANGS": "1"}, 143)],
)
def test_the_summary_is_written_however_the_measurement_ends(
    make_context: MakeContext, records: Records, environ: dict[str, str], expected: int
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    one = new_report(make_context(), records, **environ)
    assert report.finish(lambda: one.measure(SETUP, ""), one.write) == expected
    assert [record["words"][0] for record in records.read()] == ["sweep", "write"]
    assert signal.getsignal(signal.SIGTERM) is before


def test_without_a_measurement_there_is_no_report(
    make_context: MakeContext, records: Records, capsys: pytest.CaptureFixture[str]
) -> None:
    one = new_report(make_context(), records)

    def fail() -> None:
        raise MachineError(2, "no_vllm")

    assert report.finish(fail, one.write) == 2
    assert records.read() == []
    err = capsys.readouterr().err
    assert "no vLLM found" in err and f"no report in {one.folder}" in err


def test_the_end_comes_after_an_error_that_nobody_expects() -> None:
    ended: list[str] = []

    def end() -> bool:
        ended.append("end")
        return True

    with pytest.raises(ZeroDivisionError):
        report.finish(lambda: print(1 / 0), end)
    assert ended == ["end"]


def test_what_keeps_a_report_from_beginning(make_context: MakeContext, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report.python_environment, "ensure", lambda context: "/python")
    with refused("bench_too_long", code=2):
        report.begin(make_context(BENCH_INPUT_LEN="9999"), SIM)
    blocked = make_context()
    blocked.settings.report_dir.write_text("a file")
    with refused("cannot_make_dir"):
        report.begin(blocked, SIM)
    blocked.settings.report_dir.unlink()
    begun = report.begin(blocked, SIM, now=0)
    assert begun.folder.parent == blocked.settings.report_dir and begun.folder.name.startswith("19")
    assert (begun.python, begun.client, begun.vllm) == ("/python", "own", None)


# -- what runs


@pytest.mark.parametrize("body", ["{}", '{"pairs": 0, "prefill": {"ready": 1}, "decode": {"ready": 0}}', "<html>"])
def test_a_proxy_without_a_pair(make_context: MakeContext, body: str) -> None:
    with refused("bench_no_pair"):
        running.measure(make_context(), net.Answer(503, body))


def test_the_setup_that_runs(make_context: MakeContext, monkeypatch: pytest.MonkeyPatch) -> None:
    context, measured = make_context(API_KEY="sesame"), []

    class Fake(Report):
        def measure(self, setup: Setup, key: str) -> None:
            measured.append((setup, key))

        def write(self) -> bool:
            return True

    monkeypatch.setattr(running, "begin", lambda context, kind: Fake(context, "", kind, None, "own", Path()))
    body = '{"pairs": 6, "prefill": {"ready": 2}, "decode": {"ready": 3}}'
    assert running.measure(context, net.Answer(200, body)) == 0
    assert measured == [(Setup("pd", "2 prefill + 3 decode", "pd", "sweep", 5, 6, (context.url,)), "sesame")]


# -- setups that do not run yet


class Played(Comparison):
    """What would be run, in order; an entry of ``ends`` says how."""

    def __init__(
        self, context: Context, before: Before, ratio: bool, plain: bool, engines: Engines | None = None, **ends: int
    ) -> None:
        self.said: list[str] = []
        self.ends = ends
        played = self

        class Noted(Report):
            def measure(self, setup: Setup, key: str) -> None:
                played.note(f"measure {setup.name} {setup.kind} {setup.question} {setup.engines} {key}")

            def write(self) -> bool:
                return played.note("write") == 0

        noted = Noted(context, "/python", SIM, None, "own", Path("/report"))
        pool = ["0", "1", "2"] if ratio else ["0", "1"]
        super().__init__(context, noted, engines or Engines(SIM), pool, before, ratio, plain)

    def note(self, words: str) -> int:
        self.said.append(words)
        status = self.ends.get(words.split()[0], 0)
        if status and words.startswith("measure"):
            raise SystemExit(status)
        return status

    def _run(self, *words: str, **changes: str) -> int:
        return self.note(" ".join([*words, *changes.values()]))

    def _start_plain(self, places: Any) -> None:
        self.note("start " + " ".join(f"{place.name}:{place.http}" for place in places))


def test_each_split_and_what_ran_before(make_context: MakeContext, capsys: pytest.CaptureFixture[str]) -> None:
    played = Played(make_context(API_KEY="p", ENGINE_API_KEY="e"), Before(True, True), ratio=True, plain=True)
    assert played.run() == 0
    assert played.said == [
        "stop",
        "all --no-supervise 0 1,2 split",
        "measure p1d2 pd ratio 3 p",
        "stop",
        "all --no-supervise 0,1 2 split",
        "measure p2d1 pd ratio 3 p",
        "stop",
        "start plain1:20003 plain2:20004 plain3:20005",
        "measure plain plain ratio 3 e",
        "write",
        "stop",
        "all --supervise",
    ]
    err = capsys.readouterr().err
    assert "1 prefill + 2 decode (1 of 3)" in err and "3 plain engines (3 of 3)" in err


def test_elastic_placement_is_measured_after_the_splits(
    make_context: MakeContext, capsys: pytest.CaptureFixture[str]
) -> None:
    context = make_context(BENCH_SLO_TTFT_MS="400", BENCH_SLO_TPOT_MS="12.5")
    own = Engines(VLLM, connector="own")
    played = Played(context, Before(False, False), ratio=True, plain=False, engines=own)
    assert played.run() == 0
    assert played.said[6:9] == [
        "stop", "all --no-supervise 0 1,2 elastic 400 12.5", "measure elastic elastic ratio 3 ",
    ]  # fmt: skip
    assert "Elastic placement on 1 prefill + 2 decode (3 of 3)" in capsys.readouterr().err
    assert played.setups == 3


def test_plain_engines_beside_what_runs(make_context: MakeContext, capsys: pytest.CaptureFixture[str]) -> None:
    played = Played(make_context(), Before(True, False), ratio=False, plain=True)
    assert played.run() == 0
    assert played.said == [
        "measure pd pd sweep 2 ",
        "stop",
        "start plain1:20003 plain2:20004",
        "measure plain plain sweep 2 ",
        "write",
        "stop",
        "all --no-supervise",
    ]
    assert "(2 of 2)" in capsys.readouterr().err


def test_nothing_is_started_again_that_did_not_run(make_context: MakeContext) -> None:
    played = Played(make_context(), Before(False, False), ratio=True, plain=False)
    assert played.run() == 0 and played.said[-2:] == ["write", "stop"]


def test_a_setup_that_does_not_start(make_context: MakeContext) -> None:
    played = Played(make_context(), Before(True, True), ratio=True, plain=False, all=1)
    assert played.run() == 1
    assert played.said == ["stop", "all --no-supervise 0 1,2 split", "write", "stop", "all --supervise"]


def test_a_measurement_that_fails_before_anything_was_changed(make_context: MakeContext) -> None:
    played = Played(make_context(), Before(True, True), ratio=False, plain=True, measure=130)
    assert played.run() == 130 and played.said == ["measure pd pd sweep 2 ", "write"]


def test_what_cannot_be_brought_back_is_a_failure(make_context: MakeContext) -> None:
    played = Played(make_context(), Before(True, True), ratio=False, plain=True)
    played.ends = {"write": 0, "all": 7}
    assert played.run() == 1


def test_this_program_runs_again_with_the_settings_of_this_one(
    make_context: MakeContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = make_context(MAX_NUM_SEQS="7", API_KEY="sesame", PATH=os.environ["PATH"])
    script = "import json, os, sys; json.dump([sys.argv[1:], dict(os.environ)], open(sys.argv[1], 'w')); sys.exit(3)"
    monkeypatch.setattr(
        Context, "program", lambda self: [sys.executable, "-I", "-S", "-c", script, str(tmp_path / "ran")]
    )
    empty = Report(context, "", SIM, None, "own", tmp_path)
    one = Comparison(context, empty, Engines(SIM), ["0", "1"], Before(False, False), True, False)
    assert one._run("all", "--no-supervise", PREFILL_GPUS="0") == 3
    words, environ = json.loads((tmp_path / "ran").read_text())
    assert words[1:] == ["--script=script", "all", "--no-supervise"]
    assert environ["MAX_NUM_SEQS"] == "7" and environ["API_KEY"] == "sesame" and environ["PREFILL_GPUS"] == "0"
    assert environ["BENCH_CHILD"] == "1" and "DTYPE" not in environ, "a default stays one"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_program_that_runs_again(
    make_context: MakeContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    context = make_context()
    script = (
        "import os, signal, sys\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})\n"
        f"os.kill(os.getppid(), {int(number)})\nsignal.sigwait({{signal.SIGTERM}})\n"
        "open(sys.argv[1], 'w').close(); sys.exit(143)"
    )
    ended = tmp_path / "ended"
    monkeypatch.setattr(Context, "program", lambda self: [sys.executable, "-I", "-S", "-c", script, str(ended)])
    empty = Report(context, "", SIM, None, "own", tmp_path)
    one = Comparison(context, empty, Engines(SIM), ["0", "1"], Before(False, False), True, False)
    assert report.finish(lambda: one._again("all"), lambda: True) == (130 if number is signal.SIGINT else 143)
    assert ended.exists(), "in order, not killed"


def test_a_signal_in_the_moment_of_a_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The program is known and has ended when the command does."""
    started: list[subprocess.Popen[bytes]] = []
    start = subprocess.Popen

    def start_late(*words: Any, **options: Any) -> subprocess.Popen[bytes]:
        started.append(start(*words, **options))
        signal.raise_signal(signal.SIGTERM)
        return started[0]

    monkeypatch.setattr(child.subprocess, "Popen", start_late)
    sleeps = [sys.executable, "-I", "-S", "-c", "import signal; signal.pause()"]

    def work() -> None:
        child.run(sleeps, os.environ)

    assert report.finish(work, lambda: True) == 143
    assert started[0].returncode == -signal.SIGTERM


def test_a_program_that_a_signal_ended(tmp_path: Path) -> None:
    assert child.run([sys.executable, "-I", "-S", "-c", "import os; os.kill(os.getpid(), 9)"], os.environ) == 137
    assert child.run(["cat"], os.environ, tmp_path) == 0, "stdin is empty"


def test_what_must_not_be_stopped(make_context: MakeContext, monkeypatch: pytest.MonkeyPatch) -> None:
    context = make_context()
    runs = [part("proxy"), part("prefill", mode="foreground")]
    monkeypatch.setattr(setups.parts, "all_parts", lambda folder: runs)
    with refused("in_foreground"):
        setups.what_runs(context, ratio=True)
    runs[1:] = [part("supervisor")]
    assert setups.what_runs(context, ratio=True) == Before(True, True)
    runs[1:] = []
    assert setups.what_runs(context, ratio=False) == Before(True, False)
    runs[:] = []
    assert setups.what_runs(context, ratio=True) == Before(False, False)
    monkeypatch.setattr(setups, "need_key", lambda context: None)
    with refused("bench_not_ours"):
        setups.what_runs(context, ratio=False)
