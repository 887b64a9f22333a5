"""The images, as far as they can be checked without a registry: context, instructions, health check, signals."""

from __future__ import annotations

import asyncio
import fnmatch
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType

import pytest

from disagg_machine import table
from disagg_machine.cli import COMMANDS as MACHINE
from disagg_proxy.config.commands import COMMANDS, SERVE
from disagg_proxy.config.table import SETTINGS
from tests.command import MODULE, Command
from tests.conftest import soon
from tests.ports import hold_port
from tools.settings_tables import ROOT

FOLDER = ROOT / "deploy/docker"
DOCKERFILES = [FOLDER / "Dockerfile", FOLDER / "Dockerfile.vllm", FOLDER / "Dockerfile.engine"]
DEFAULTS = {setting.env: setting.default for setting in SETTINGS}
DOCKERFILE = pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)


def instructions(path: Path) -> list[tuple[str, str]]:
    """Each instruction with its arguments, lines joined and comments left out."""
    lines = [line for line in path.read_text().splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in joined.splitlines())]


def last_stage(path: Path) -> list[tuple[str, str]]:
    found = instructions(path)
    return found[max(index for index, (name, _) in enumerate(found) if name == "FROM") :]


def copied(path: Path) -> list[str]:
    """What is copied from the build context."""
    sources: list[str] = []
    for name, rest in instructions(path):
        assert name != "ADD"
        if name == "COPY" and not rest.startswith("--from="):
            sources += rest.split()[:-1]
    return sources


def in_context(name: str) -> bool:
    """Whether .dockerignore leaves a path in: the last pattern that matches it, or a folder above it, decides."""
    kept = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        pattern = line.removeprefix("!")
        parts = Path(name).parts
        above = ["/".join(parts[: end + 1]) for end in range(len(parts))]
        if any(
            fnmatch.fnmatch(one, pattern) or fnmatch.fnmatch(f"/{one}", pattern.replace("**", "*")) for one in above
        ):
            kept = line.startswith("!")
    return kept


# -- the context


@DOCKERFILE
def test_what_is_copied_is_there_and_in_the_context(path: Path) -> None:
    sources = copied(path)
    assert "disagg_proxy" in sources and "disagg_kv" in sources
    for source in sources:
        assert (ROOT / source).exists() and in_context(source), source


def test_nothing_else_is_in_the_context() -> None:
    wanted = {source for path in DOCKERFILES for source in copied(path)}
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in listed.stdout.splitlines():
        needed = any(name == one or name.startswith(f"{one}/") for one in wanted)
        assert in_context(name) == needed, name
    for name in (
        ".git/config",
        ".venv/bin/python",
        "run/proxy.pid",
        "logs/proxy.log",
        "my.conf",
        "reports/x/summary.md",
    ):
        assert not in_context(name), name
    assert not in_context("disagg_proxy/__pycache__/cli.cpython-312.pyc")
    assert not in_context("disagg_proxy/upstream/client.cpython-312-x86_64-linux-gnu.so")


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("Dockerfile", '["pip", "install", "--no-deps", "."]'),
        ("Dockerfile.engine", '["uv", "build", "--no-cache", "--wheel", "--out-dir", "/wheels", "."]'),
    ],
)
def test_what_pip_needs_is_copied_before_it_runs(name: str, command: str) -> None:
    found = instructions(FOLDER / name)
    install = next(index for index, (_, rest) in enumerate(found) if rest == command)
    there = {source for name, rest in found[:install] if name == "COPY" for source in rest.split()[:-1]}
    text = (ROOT / "pyproject.toml").read_text()
    named = set(re.findall(r'"((?:requirements-\w+\.txt|README\.md|LICENSE))"', text)) | {"pyproject.toml", "setup.py"}
    packages = {name.removesuffix("*") for name in re.findall(r'"(disagg_\w+\*)"', text)}
    folders = {name.split("/")[0] for name in re.findall(r'= \["((?:man|completions)/[^"]+)"\]', text)}
    assert named | packages | folders <= there and len(packages) == 7


def test_the_machine_finds_its_checkout_in_the_image() -> None:
    """Without the script beside the package it would take itself for installed."""
    assert {"test_single_machine.sh", "requirements-proxy.txt", "requirements-top.txt"} <= set(
        copied(FOLDER / "Dockerfile.vllm")
    )


# -- the instructions


@DOCKERFILE
def test_bases_are_pinned(path: Path) -> None:
    arguments = dict(rest.split("=", 1) for name, rest in instructions(path) if name == "ARG")
    stages = set()
    for name, rest in instructions(path):
        if name == "FROM":
            image = re.sub(r"\$\{(\w+)\}", lambda match: arguments[match[1]], rest.split()[0])
            assert re.fullmatch(r"[\w./-]+:v?\d+\.\d+[\w.-]*", image) and "latest" not in image, image
            stages |= set(rest.split()[2:])
        if name == "COPY" and rest.startswith("--from="):
            assert rest.split()[0].removeprefix("--from=") in stages


@DOCKERFILE
def test_the_process_is_no_root_and_gets_its_signals(path: Path) -> None:
    stage = dict(last_stage(path))
    assert re.fullmatch(r"[1-9]\d+:[1-9]\d+", stage["USER"]), "a number: Kubernetes cannot look up a name"
    assert stage["STOPSIGNAL"] == "SIGTERM"
    for name in ("ENTRYPOINT", "CMD"):
        words = json.loads(stage[name])
        assert words and not {"sh", "bash", "-c"} & set(words)
    health = stage["HEALTHCHECK"].partition(" CMD ")[2]
    assert json.loads(health)[-1].endswith("healthcheck.py")
    after = [name for name, _ in last_stage(path)]
    assert "RUN" not in after[after.index("USER") :] and "COPY" not in after[after.index("USER") :]


@DOCKERFILE
def test_commands_leave_no_caches_and_run_no_foreign_scripts(path: Path) -> None:
    for name, rest in instructions(path):
        if name == "RUN":
            assert not re.search(r"\b(sudo|curl|wget|chmod 777)\b", rest), rest
            if "apt-get" in rest:
                assert "--no-install-recommends" in rest and rest.endswith("rm -rf /var/lib/apt/lists/*")
            if "pip" in rest.split() or '"pip"' in rest:
                cached = "--no-cache" in rest or "PIP_NO_CACHE_DIR=1" in path.read_text()
                assert cached, rest
        if name in ("ENV", "ARG"):
            assert not re.search(r"(KEY|SECRET|TOKEN|PASSWORD)", rest), rest
        if name == "WORKDIR":
            assert rest.startswith("/")


@DOCKERFILE
def test_ports_and_settings_are_those_of_the_code(path: Path) -> None:
    exposed = next(rest for name, rest in instructions(path) if name == "EXPOSE").split()
    assert exposed[0] == DEFAULTS["HTTP_PROXY_PORT"] and set(exposed) <= {exposed[0], DEFAULTS["PROXY_PORT"]}
    known = {"PATH", "HOME", *DEFAULTS, *table.BY_ENV}
    for name, rest in instructions(path):
        if name == "ENV":
            names = {word.partition("=")[0] for word in shlex.split(rest)}
            assert {one for one in names - known if not one.startswith(("PYTHON", "PIP_"))} == set()


def test_what_the_images_run_are_commands() -> None:
    assert json.loads(dict(last_stage(DOCKERFILES[0]))["CMD"]) == [SERVE] and "sim" in COMMANDS
    command, *flags = json.loads(dict(last_stage(DOCKERFILES[1]))["CMD"])
    assert all(flag in MACHINE[command].arguments for flag in flags) and flags
    entry = json.loads(dict(last_stage(DOCKERFILES[1]))["ENTRYPOINT"])
    assert (ROOT / entry[-1].removeprefix("/opt/disagg-proxy/")).is_file()


# -- the health check


@pytest.fixture(scope="module")
def healthcheck() -> ModuleType:
    spec = importlib.util.spec_from_file_location("healthcheck", FOLDER / "healthcheck.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("argv", "environ", "url"),
    [
        ([], {}, f"http://127.0.0.1:{DEFAULTS['HTTP_PROXY_PORT']}/livez"),
        ([], {"HTTP_PROXY_HOST": "::", "HTTP_PROXY_PORT": "8000"}, "http://[::1]:8000/livez"),
        ([], {"HTTP_PROXY_HOST": "10.0.0.7", "HTTP_PROXY_PORT": ""}, "http://10.0.0.7:10001/livez"),
        (["http://10.0.0.7:1/health"], {"HTTP_PROXY_PORT": "8000"}, "http://10.0.0.7:1/health"),
    ],
)
def test_where_the_health_check_asks(
    healthcheck: ModuleType, argv: list[str], environ: dict[str, str], url: str
) -> None:
    assert healthcheck.url_of(argv, environ) == url


async def test_health_of_a_proxy_with_a_key_and_without_engines(run, healthcheck: ModuleType, capsys) -> None:
    command = await (await run("serve", API_KEY="sesame")).until_ready()
    environ = {"HTTP_PROXY_HOST": "127.0.0.1", "HTTP_PROXY_PORT": command.url.rpartition(":")[2]}
    assert await asyncio.to_thread(healthcheck.main, [], environ) == 0
    assert await asyncio.to_thread(healthcheck.main, [command.url + "/health"], {}) == 1, "no pair: 503"
    with ExitStack() as hold:
        assert await asyncio.to_thread(healthcheck.main, [f"http://127.0.0.1:{hold_port(hold)}/health"], {}) == 1
    assert "503" in capsys.readouterr().out


# -- signals


async def test_sigterm_ends_the_proxy_as_the_first_process_of_a_container(tmp_path: Path) -> None:
    """The kernel gives process 1 no default actions: only a handler of its own ends it."""
    unshare = [shutil.which("unshare") or "unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child"]
    if subprocess.run([*unshare, "true"], capture_output=True).returncode:
        pytest.skip("no PID namespaces here")
    local = {"HTTP_PROXY_HOST": "127.0.0.1", "HTTP_PROXY_PORT": "0", "PROXY_HOST": "127.0.0.1", "PROXY_PORT": "0"}
    process = await asyncio.create_subprocess_exec(
        *unshare, *MODULE, cwd=ROOT, env={"PATH": os.environ["PATH"], **local}, stderr=asyncio.subprocess.PIPE
    )
    command = Command(process)
    try:
        await command.until_ready()
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        for child in children:
            os.kill(int(child), 15)
        _, rest = await soon(process.communicate())
    finally:
        if process.returncode is None:
            process.kill()
    assert process.returncode == 0 and "Stopping" in rest.decode()


def test_the_health_check_runs_in_any_python() -> None:
    done = subprocess.run(
        [sys.executable, "-I", "-S", FOLDER / "healthcheck.py", "http://127.0.0.1:1/x"], capture_output=True, text=True
    )
    assert done.returncode == 1 and "Refused" in done.stdout and not done.stderr
