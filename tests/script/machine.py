"""One use of test_single_machine.sh: folders and ports of its own, and a look at what it left behind.

Every process that a test starts carries the environment variable SCRIPT_TEST with a value of that test, so that
leftovers are found whatever they are called.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Callable
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path
from typing import Any

from tests.ports import hold_port

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "test_single_machine.sh"
FAST = "--ping-seconds 0.2 --time-per-output-token 0.002"
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def reserve_ports(hold: ExitStack, width: int = 2) -> list[int]:
    """Six ports of the kernel's choice, each followed by ``width - 1`` that are free too, until ``hold`` is closed."""
    found: list[int] = []
    while len(found) < 6:
        with ExitStack() as attempt:
            try:
                port = hold_port(attempt)
                for offset in range(1, width):
                    hold_port(attempt, port=port + offset)
            except (OSError, OverflowError):
                continue
            hold.push(attempt.pop_all())
            found.append(port)
    return found


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Until ``condition`` holds; for other programs' deeds, which nothing here announces."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.03)


_SURVIVOR = """
import os, pathlib, signal, sys, time
marks = [f"SCRIPT_TEST={mark}".encode() for mark in sys.stdin.read().split()]
while True:
    found = []
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            if set(marks) & set((folder / "environ").read_bytes().split(bytes(1))):
                found.append(int(folder.name))
        except OSError:
            continue
    if not found:
        break
    for pid in found:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    time.sleep(0.05)
"""


@lru_cache(maxsize=1)
def _survivor() -> subprocess.Popen[str]:
    """Ends what is left of all machines when this process has ended, also by SIGKILL or a time limit."""
    return subprocess.Popen(
        [sys.executable, "-S", "-c", _SURVIVOR], stdin=subprocess.PIPE, text=True, start_new_session=True
    )


class Machine:
    """The script with settings that no other test shares."""

    def __init__(self, folder: Path) -> None:
        self.mark = uuid.uuid4().hex
        pipe = _survivor().stdin
        assert pipe is not None
        print(self.mark, file=pipe, flush=True)
        self.run_dir = folder / "run dir"
        self.log_dir = folder / "log dir"
        self.reserved = ExitStack()
        http, zmq, prefill, decode, prefill_kv, decode_kv = reserve_ports(self.reserved)
        inherited = {name: os.environ[name] for name in ("HOME", "PATH", "TMPDIR") if name in os.environ}
        self.env = {
            **inherited,
            "LC_ALL": "C.UTF-8",
            "TERM": "dumb",
            "SCRIPT_TEST": self.mark,
            "PYTHON": sys.executable,
            "RUN_DIR": str(self.run_dir),
            "LOG_DIR": str(self.log_dir),
            "HTTP_PROXY_HOST": "127.0.0.1",
            "HTTP_PROXY_PORT": str(http),
            "PROXY_PORT": str(zmq),
            "PREFILL_HTTP_PORT": str(prefill),
            "DECODE_HTTP_PORT": str(decode),
            "PREFILL_KV_PORT": str(prefill_kv),
            "DECODE_KV_PORT": str(decode_kv),
            "ENGINE": "sim",
            "PROXY_COMPILED": "0",
            "MODEL": "org/model",
            "EXTRA_SIM_ARGS": FAST,
            "RESTART_BACKOFF": "0.1",
        }
        self.url = f"http://127.0.0.1:{http}"

    def command(self, *words: str) -> list[str]:
        return [str(SCRIPT), *words]

    def run(self, *words: str, timeout: float = 120, **changes: str) -> subprocess.CompletedProcess[str]:
        """One command to its end; ``changes`` to the environment, an empty value removes a name.

        Output goes to files: a pipe would stay open as long as what the script leaves running.
        """
        with self.start(*words, **changes) as process:
            try:
                process.wait(timeout)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
        return self.result(process)

    def start(self, *words: str, **changes: str) -> subprocess.Popen[str]:
        """A command in the background, in a session of its own as from another terminal."""
        environment = {name: value for name, value in {**self.env, **changes}.items() if value}
        self.run_dir.parent.mkdir(parents=True, exist_ok=True)
        stem = self.run_dir.parent / f"out-{uuid.uuid4().hex}"
        with open(f"{stem}.stdout", "w") as out, open(f"{stem}.stderr", "w") as err:
            process = subprocess.Popen(
                self.command(*words),
                env=environment,
                cwd=self.run_dir.parent,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                text=True,
                start_new_session=True,
            )
        process.output_stem = str(stem)  # type: ignore[attr-defined]
        return process

    def result(self, process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
        """What an ended command wrote."""
        stem = process.output_stem  # type: ignore[attr-defined]
        out, err = Path(f"{stem}.stdout").read_text(), Path(f"{stem}.stderr").read_text()
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def ok(self, *words: str, timeout: float = 120, **changes: str) -> subprocess.CompletedProcess[str]:
        """:meth:`run`, which must end with 0."""
        done = self.run(*words, timeout=timeout, **changes)
        assert done.returncode == 0, f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def fields(self, name: str) -> dict[str, str]:
        """The PID file of a part, empty when there is none."""
        try:
            lines = (self.run_dir / f"{name}.pid").read_text().splitlines()
        except FileNotFoundError:
            return {}
        return dict(line.split("=", 1) for line in lines)

    def pid(self, name: str) -> int:
        return int(self.fields(name)["pid"])

    def log(self, name: str) -> str:
        path = self.log_dir / f"{name}.log"
        return path.read_text() if path.exists() else ""

    def get(self, path: str) -> dict[str, Any]:
        """The proxy's JSON, empty when it does not answer."""
        try:
            with _OPENER.open(self.url + path, timeout=30) as response:
                value: dict[str, Any] = json.load(response)
                return value
        except OSError:
            return {}

    def complete(self, timeout: float = 60, **fields: Any) -> dict[str, Any]:
        """One completion; OSError (HTTPError with the status) when it fails."""
        body = {"model": "org/model", "prompt": "one two three", "max_tokens": 4, **fields}
        request = urllib.request.Request(
            self.url + "/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with _OPENER.open(request, timeout=timeout) as response:
            value: dict[str, Any] = json.load(response)
            return value

    def leftovers(self) -> dict[int, str]:
        """Processes of this test that still run: PID to command line."""
        mark = f"SCRIPT_TEST={self.mark}".encode()
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if mark in (folder / "environ").read_bytes():
                    found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except (OSError, ValueError):
                continue
        return found

    def clean_up(self) -> dict[int, str]:
        """Stops everything; what had to be killed after `stop` is returned."""
        self.reserved.close()
        if self.run_dir.exists():
            self.run("stop", STOP_TIMEOUT="5")
        left = self.leftovers()
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        return left
