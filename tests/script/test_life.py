"""`all`, `test`, `status`, `logs`, `bench`, `restart`, `stop` with simulated engines."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from pathlib import Path

import pytest

from tests.script.machine import FAST, Machine, wait_for


def test_the_whole_life(machine: Machine) -> None:
    up = machine.ok("all", ENGINE="auto", PATH="/usr/bin:/bin")
    assert "SIMULATED" in up.stderr and "Why:" in up.stderr
    assert f"curl {machine.url}/v1/completions" in up.stdout
    for name in ("proxy", "prefill", "decode", "supervisor"):
        assert f"PID {machine.pid(name)}" in up.stdout
        assert str(machine.log_dir / f"{name}.log") in up.stdout
    assert stat.S_IMODE(machine.run_dir.stat().st_mode) == 0o700

    curl = next(line for line in up.stdout.splitlines() if line.startswith("curl"))
    answer = subprocess.run(["bash", "-c", curl + " -sN"], capture_output=True, text=True, check=True).stdout
    assert answer.rstrip().endswith("data: [DONE]")

    tested = machine.ok("test")
    pair = f"prefill 127.0.0.1:{machine.env['PREFILL_HTTP_PORT']} -> decode 127.0.0.1:{machine.env['DECODE_HTTP_PORT']}"
    assert tested.stdout.count(pair) == 3
    assert [line.split()[0] for line in tested.stdout.splitlines() if pair in line] == ["completion", "stream", "chat"]

    status = machine.ok("status")
    assert status.stdout.count("SIMULATED") == 2 and "1 pair(s)" in status.stdout and "SIMULATED" in status.stderr

    again = machine.ok("all")
    assert "Already running" in again.stderr
    assert machine.pid("proxy") == int(up.stdout.split("PID ")[1].split()[0])

    assert "Serving on" in machine.ok("logs", "proxy").stdout
    assert "==> " in machine.ok("logs", "-n", "1").stdout
    assert machine.run("logs", "nothing").returncode == 3

    bench = machine.ok("bench", "--once", BENCH_REQUESTS="8", BENCH_INPUT_LEN="20", BENCH_OUTPUT_LEN="4")
    assert "requests answered        8" in bench.stdout and "say nothing about GPUs" in bench.stderr

    machine.ok("stop")
    assert machine.leftovers() == {}
    assert sorted(path.name for path in machine.run_dir.iterdir()) == ["lock"]
    assert "Nothing is running" in machine.ok("stop").stderr
    assert machine.run("status").returncode == 3
    assert machine.run("test").returncode == 3
    assert machine.run("bench").returncode == 3


def test_commands_know_what_runs_without_its_settings(machine: Machine) -> None:
    machine.ok("all", SERVED_MODEL_NAME="mine,yours")
    for name in ("HTTP_PROXY_PORT", "PROXY_PORT", "PREFILL_HTTP_PORT", "DECODE_HTTP_PORT"):
        del machine.env[name]
    config = machine.ok("config").stdout
    assert "(what runs now)" in config and "mine,yours" in config
    assert "model: mine" in machine.ok("test").stdout
    machine.ok("stop")
    assert "10001 " in machine.ok("config").stdout


def test_two_prefill_two_decode(machine: Machine) -> None:
    up = machine.ok("all", PREFILL_GPUS="0,1", DECODE_GPUS="2,3")
    ports = {}
    for name in ("prefill1", "prefill2", "decode1", "decode2"):
        fields = machine.fields(name)
        ports[name] = (int(fields["http"]), int(fields["kv"]))
        assert f"{name}: HTTP port {fields['http']}, KV port {fields['kv']}" in up.stderr
        assert (machine.log_dir / f"{name}.log").exists()
    for role in ("prefill", "decode"):
        assert ports[f"{role}1"] == tuple(int(machine.env[f"{role.upper()}_{kind}_PORT"]) for kind in ("HTTP", "KV"))
        assert ports[f"{role}2"] == tuple(port + 1 for port in ports[f"{role}1"])
    health = machine.get("/health")
    assert (health["prefill"]["ready"], health["decode"]["ready"]) == (2, 2)
    machine.ok("test", PREFILL_GPUS="0,1", DECODE_GPUS="2,3")
    machine.ok("stop", "prefill2")
    assert machine.fields("prefill2") == {} and machine.fields("prefill1")
    assert machine.run("all").returncode == 1  # only a part of it runs


def test_api_keys_work_and_stay_private(machine: Machine) -> None:
    machine.env |= {"API_KEY": "front-door", "ENGINE_API_KEY": "back-door"}
    machine.ok("all", EXTRA_SIM_ARGS=FAST)
    machine.ok("test")
    for command, key, says in (
        ("test", "", "requires a key: set API_KEY, or CONFIG"),
        ("top", "", "requires a key: set API_KEY, or CONFIG"),
        ("bench", "", "requires a key: set API_KEY, or CONFIG"),
        ("test", "another", "does not accept this API_KEY"),
    ):
        done = machine.run(command, API_KEY=key)
        assert done.returncode == 1 and says in done.stderr, (command, done.stderr)
    done = machine.ok("status", API_KEY="")
    assert done.stdout.count("what the proxy knows of it needs API_KEY") == 2 and "requires a key" in done.stderr
    assert "requires a key" in machine.run("doctor", API_KEY="").stdout
    assert "The page asks for the key" in machine.ok("page", API_KEY="").stderr

    # A part that starts without the key of the others would be open, or of no use to them.
    proxy = machine.pid("proxy")
    for changes in ({"API_KEY": ""}, {"ENGINE_API_KEY": ""}):
        done = machine.run("restart", "proxy", **changes)
        assert done.returncode == 2 and f"was started with {next(iter(changes))}, and" in done.stderr
    machine.ok("stop", "prefill")
    assert machine.run("prefill", ENGINE_API_KEY="").returncode == 2
    assert machine.pid("proxy") == proxy
    machine.ok("restart", "prefill")

    stored = "".join(path.read_text() for path in machine.run_dir.glob("*") if path.is_file())
    assert "front-door" not in stored and "back-door" not in stored
    assert not any("front-door" in line or "back-door" in line for line in machine.leftovers().values())


def test_restart_of_parts(machine: Machine) -> None:
    machine.ok("all")
    machine.ok("test")
    before = {name: machine.pid(name) for name in ("proxy", "prefill", "decode")}
    machine.ok("restart", "prefill")
    assert machine.pid("prefill") != before["prefill"] and machine.pid("decode") == before["decode"]
    machine.ok("test")
    second = machine.pid("prefill")
    done = machine.ok("restart", "decode")
    assert "prefill sent KV to decode" in done.stderr
    assert machine.pid("prefill") != second and machine.pid("decode") != before["decode"]
    third = machine.pid("prefill")
    machine.ok("restart", "decode")  # nothing was sent meanwhile, so the prefill may stay
    assert machine.pid("prefill") == third
    machine.ok("test")
    assert machine.pid("proxy") == before["proxy"]
    assert machine.run("restart", "nothing").returncode == 2


def test_stop_under_load_ends_in_time_by_itself(machine: Machine) -> None:
    machine.env["STOP_TIMEOUT"] = "8"
    machine.ok("all", EXTRA_SIM_ARGS="--ping-seconds 0.2 --time-per-output-token 0.05")
    with ThreadPoolExecutor(1) as pool:
        long = pool.submit(machine.complete, max_tokens=2000, ignore_eos=True)
        wait_for(lambda: any(i["in_flight"] for i in machine.get("/stats")["instances"] if i["role"] == "decode"))
        done = machine.ok("stop")
        assert isinstance(long.exception(), (OSError, HTTPException))
    assert "KILL" not in done.stderr
    assert machine.leftovers() == {}


def test_logs_are_kept_one_generation(machine: Machine) -> None:
    machine.ok("all")
    first = machine.log("proxy")
    machine.ok("stop")
    first = machine.log("proxy")
    machine.ok("all")
    assert (machine.log_dir / "proxy.log.1").read_text() == first


def test_logs_can_be_followed(machine: Machine) -> None:
    machine.log_dir.mkdir(parents=True)
    (machine.log_dir / "proxy.log").write_text("one\ntwo\n")
    follower = machine.start("logs", "proxy", "-f", "-n", "1")
    try:
        stem = follower.output_stem  # type: ignore[attr-defined]
        wait_for(lambda: Path(f"{stem}.stdout").read_text() == "two\n")
        with open(machine.log_dir / "proxy.log", "a") as log:
            log.write("three\n")
        wait_for(lambda: Path(f"{stem}.stdout").read_text() == "two\nthree\n")
    finally:
        follower.terminate()
        follower.wait(60)


def test_two_machines_do_not_disturb_each_other(machine: Machine, second_machine: Machine) -> None:
    machine.ok("all")
    second_machine.ok("all")
    second_machine.ok("test")
    second_machine.ok("stop")
    assert second_machine.leftovers() == {}
    machine.ok("test")


def test_a_process_of_the_same_name_survives(machine: Machine) -> None:
    decoy = subprocess.Popen(
        [sys.executable, "-c", "import signal; signal.pause()", "disagg_prefill_proxy_server.py", "vllm", "serve"]
    )
    try:
        machine.ok("all")
        machine.ok("stop")
        assert decoy.poll() is None
    finally:
        decoy.kill()
        decoy.wait()


@pytest.fixture
def bystander(machine: Machine) -> subprocess.Popen[bytes]:
    """A process that the script has no business with; the PID files of a test name it."""
    process = subprocess.Popen(["sleep", "60"], start_new_session=True)
    machine.run_dir.mkdir(parents=True, mode=0o700)
    return process


def start_time(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19]


BOOT = Path("/proc/sys/kernel/random/boot_id").read_text().strip()


@pytest.mark.parametrize("case", ["other start time", "other boot"])
def test_a_reused_pid_is_never_touched(machine: Machine, bystander: subprocess.Popen[bytes], case: str) -> None:
    start, boot = start_time(bystander.pid), BOOT
    if case == "other start time":
        start = str(int(start) - 1)
    else:
        boot = "a-former-life"
    try:
        (machine.run_dir / "decode.pid").write_text(f"pid={bystander.pid}\nstart={start}\nboot={boot}\nrole=decode\n")
        status = machine.run("status")
        assert status.returncode == 1 and "dead" in status.stdout
        doctor = machine.run("doctor").stdout
        assert f"PID {bystander.pid}" in doctor
        machine.ok("stop")
        assert bystander.poll() is None
        (machine.run_dir / "decode.pid").write_text(f"pid={bystander.pid}\nstart={start}\nboot={boot}\nrole=decode\n")
        machine.ok("all")
        machine.ok("stop")
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def test_a_matching_pid_file_is_stopped(machine: Machine, bystander: subprocess.Popen[bytes]) -> None:
    """The counterpart: what the test above protects is the start time, nothing else."""
    start = start_time(bystander.pid)
    (machine.run_dir / "decode.pid").write_text(f"pid={bystander.pid}\nstart={start}\nboot={BOOT}\nrole=decode\n")
    machine.ok("stop")
    assert bystander.wait(60) == -signal.SIGTERM


def test_children_that_outlive_their_part_are_stopped(machine: Machine) -> None:
    """As vLLM's engine core when its API server is killed: the group is stopped although its leader is gone."""
    machine.run_dir.mkdir(parents=True, mode=0o700)
    leader = subprocess.Popen(
        ["bash", "-c", "sleep 60 & echo $!; wait"],
        start_new_session=True,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "SCRIPT_TEST": machine.mark},
    )
    assert leader.stdout
    child = int(leader.stdout.readline())
    pid_file = f"pid={leader.pid}\nstart={start_time(leader.pid)}\nboot={BOOT}\nrole=decode\n"
    (machine.run_dir / "decode.pid").write_text(pid_file)
    leader.kill()
    leader.wait()
    leader.stdout.close()
    # Its environment cannot be seen while it becomes `sleep`.
    wait_for(lambda: child in machine.leftovers())
    machine.ok("stop")
    assert machine.leftovers() == {}


def test_a_part_that_ignores_term_is_killed(machine: Machine, bystander: subprocess.Popen[bytes]) -> None:
    bystander.kill()
    bystander.wait()
    stubborn = subprocess.Popen(
        ["bash", "-c", "trap '' TERM; echo ready; while :; do sleep 1; done"],
        start_new_session=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert stubborn.stdout and stubborn.stdout.readline() == "ready\n"
    start = start_time(stubborn.pid)
    (machine.run_dir / "proxy.pid").write_text(f"pid={stubborn.pid}\nstart={start}\nboot={BOOT}\nrole=proxy\n")
    done = machine.ok("stop", STOP_TIMEOUT="1")
    assert "did not end within 1 s after TERM: KILL" in done.stderr
    assert stubborn.wait(60) == -signal.SIGKILL
    stubborn.stdout.close()


def test_in_the_foreground_it_stays_until_a_signal_and_leaves_nothing(machine: Machine) -> None:
    """As systemd and containers want it."""
    process = machine.start("all", "--foreground")
    wait_for(lambda: machine.get("/health").get("pairs") == 1)
    wait_for(lambda: machine.fields("supervisor") != {})
    assert machine.run("all", "--foreground").returncode == 1, "what runs is not its own to stop"
    # The supervisor restarts a part, whose zombie belongs to this process.
    old = machine.pid("prefill")
    os.kill(old, signal.SIGKILL)
    wait_for(lambda: machine.pid("prefill") not in (0, old) and not Path(f"/proc/{old}").exists())
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    assert machine.leftovers() == {} and machine.run("status").returncode == 3


def test_in_the_foreground_it_ends_with_its_supervisor(machine: Machine) -> None:
    process = machine.start("all", "--foreground")
    wait_for(lambda: machine.fields("supervisor") != {})
    wait_for(lambda: machine.get("/health").get("pairs") == 1)
    os.kill(machine.pid("supervisor"), signal.SIGKILL)
    assert process.wait(60) == 1
    assert "supervisor ended by itself" in machine.result(process).stderr
    assert machine.leftovers() == {}


def test_stop_from_elsewhere_ends_the_foreground(machine: Machine) -> None:
    process = machine.start("all", "--foreground", "--no-supervise")
    wait_for(lambda: machine.get("/health").get("pairs") == 1)
    wait_for(lambda: "curl" in machine.result(process).stdout)
    machine.ok("stop")
    assert process.wait(60) == 0 and machine.leftovers() == {}
