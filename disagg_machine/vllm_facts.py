"""Which vLLM is on this machine and what it can do.

It belongs to another Python than the one that runs this, so that Python runs vllm_probe.py; where its files cannot be
read, ``vllm --version`` and what is known of that version must do.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from disagg_machine import net
from disagg_machine.context import PACKAGE, Context
from disagg_machine.settings import DEFAULT

PROBE = PACKAGE / "probes" / "vllm_probe.py"

OWN_OLDEST, OWN_NEWEST = 21, 33
"""Minor versions of vLLM 0.x that disagg_kv/engine/versions.py accepts, and was tried with."""

SEVERAL_CACHE_GROUPS = 0, 30
"""The first vLLM with which the connector serves several KV cache groups (``versions.serves_groups`` there)."""

RECURRENT_STATES = 0, 32
"""The first one with which it serves models with recurrent states (``versions.serves_states``)."""

Run = Callable[[Sequence[str]], "str | None"]
"""Runs a command: its stdout, None when it cannot be run, fails, or takes two minutes."""

_PIP_EXEC = re.compile(r"'''exec' \"?([^\"]+python[0-9.]*)\"? ")
_ABSOLUTE = re.compile(r"#!\s*(/\S*python[0-9.]*)$")
_BY_ENV = re.compile(r"#!\s*/usr/bin/env +(python[0-9.]*)$")


@dataclass(frozen=True, slots=True)
class VllmFacts:
    """One vLLM.

    Attributes:
        version: such as ``0.21.0``.
        connector: P2pNcclConnector is in tree (removed in 0.24.0, vllm-project/vllm#44854).
        randomises: engines append a random suffix to the request id (from 0.14.0 on).
        switch: VLLM_DISABLE_REQUEST_ID_RANDOMIZATION exists (vllm-project/vllm#34415; not in 0.14.0).
        command: the words that start its command line.
        python: its interpreter; empty when unknown.
    """

    version: str
    connector: bool = False
    randomises: bool = False
    switch: bool = False
    command: tuple[str, ...] = ("vllm",)
    python: str = ""

    def at_least(self, major: int, minor: int) -> bool:
        """Whether it is this version of vLLM or newer; a version that cannot be read is."""
        found = re.match(r"(\d+)\.(\d+)", self.version)
        return not found or (int(found[1]), int(found[2])) >= (major, minor)


def runs_in(environ: Mapping[str, str]) -> Run:
    """The :data:`Run` of this machine, with this environment."""

    def run(command: Sequence[str]) -> str | None:
        try:
            done = subprocess.run(
                command,
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                timeout=120,
                check=False,
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.decode("utf-8", "replace") if done.returncode == 0 else None

    return run


def find_vllm(context: Context) -> VllmFacts | None:
    """PYTHON's own vLLM when PYTHON was given; else `vllm` on PATH, then the Pythons that are at hand."""
    settings, path = context.settings, context.environ.get("PATH")
    venv = settings.venv_dir / "bin/python"
    return look_for(
        shutil.which(settings.python, path=path),
        str(venv) if os.access(venv, os.X_OK) else None,
        settings.sources["PYTHON"] != DEFAULT,
        runs_in(context.environ),
        lambda name: shutil.which(name, path=path),
    )


def look_for(
    python: str | None, venv_python: str | None, chosen: bool, run: Run, which: Callable[[str], str | None]
) -> VllmFacts | None:
    """See :func:`find_vllm`.

    Args:
        python: the user's, None when it is not there.
        venv_python: that of the virtual environment, None when there is none.
        chosen: the user has set PYTHON, so its vLLM is meant.
    """
    found = of_python(python, run) if chosen and python else None
    if found is None and (program := which("vllm")):
        interpreter = interpreter_of(program, which)
        found = (of_python(interpreter, run, (program,)) if interpreter else None) or by_version(program, run)
    if found is None and not chosen and python:
        found = of_python(python, run)
    if found is None and venv_python:
        found = of_python(venv_python, run)
    return found


def of_python(python: str, run: Run, command: Sequence[str] = ()) -> VllmFacts | None:
    """The one that ``python`` would import; ``command`` starts it, by default ``python`` does."""
    printed = run((python, str(PROBE)))
    if printed is None:
        return None
    facts = dict(line.split("=", 1) for line in printed.splitlines() if "=" in line)
    return VllmFacts(
        facts.get("version", "unknown"),
        connector=facts.get("connector") == "yes",
        randomises=facts.get("randomises") == "yes",
        switch=facts.get("switch") == "yes",
        command=tuple(command) or (python, "-m", "vllm.entrypoints.cli.main"),
        python=python,
    )


def by_version(program: str, run: Run) -> VllmFacts | None:
    """By its own word alone, the last one that ``vllm --version`` prints, and what releases of that version can do."""
    words = (run((program, "--version")) or "").split()
    if not words or not re.match(r"\d+\.\d+", words[-1]):
        return None
    bare = VllmFacts(words[-1], command=(program,))
    return replace(
        bare, connector=not bare.at_least(0, 24), randomises=bare.at_least(0, 14), switch=bare.at_least(0, 16)
    )


def interpreter_of(program: str, which: Callable[[str], str | None] = shutil.which) -> str | None:
    """A script's Python by its first lines; pip and uv write ``'''exec' "python"`` where the path is long."""
    try:
        with open(program, encoding="utf-8", errors="replace") as file:
            first, second = file.readline().rstrip("\n"), file.readline()
    except OSError:
        return None
    found = _PIP_EXEC.match(second) or _ABSOLUTE.match(first) or _BY_ENV.match(first)
    return which(found[1]) if found else None


def can_share_gpu(facts: VllmFacts, setting: str) -> bool:
    """Whether prefill and decode engines of this vLLM can use one GPU. P2pNcclConnector needs NCCL, which refuses."""
    return setting != "p2p_nccl" and facts.at_least(0, OWN_OLDEST)


def choose_connector(facts: VllmFacts, setting: str, *, shared: bool = False) -> str:
    """``p2p_nccl`` or ``own``: vLLM's own connector as long as it is in tree, unless KV_CONNECTOR says otherwise.

    Args:
        shared: prefill and decode share a GPU.
    """
    if setting != "auto":
        return setting
    if shared and can_share_gpu(facts, setting):
        return "own"
    ours = facts.at_least(0, 24) or (not facts.connector and facts.at_least(0, OWN_OLDEST))
    return "own" if ours else "p2p_nccl"


def problem(facts: VllmFacts, connector: str, engine_host: str) -> tuple[str, ...]:
    """Why this vLLM cannot serve with this connector, as message key and arguments; empty when it can."""
    if not facts.at_least(0, 9) or re.match(r"0\.9\.[01]([^0-9]|$)", facts.version):
        return ("vllm_too_old", facts.version)
    if connector == "own":
        if not facts.at_least(0, OWN_OLDEST):
            return ("own_too_old", facts.version)
        # This project's connector resolves no names.
        host = net.reach(engine_host)
        return () if host == "localhost" or net.is_ip(host) else ("own_wants_ip", engine_host)
    if not facts.connector:
        return ("vllm_no_connector", facts.version)
    if facts.randomises and not facts.switch:
        return ("vllm_random_ids", facts.version)
    return ()


def is_untried(facts: VllmFacts, connector: str) -> bool:
    """Whether this vLLM is newer than what this project's connector was tried with."""
    return connector == "own" and facts.at_least(0, OWN_NEWEST + 1)
