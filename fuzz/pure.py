"""Runs a target that is a function of bytes: guided by coverage (atheris, where it is installed) or by a seed alone."""

from __future__ import annotations

import importlib
import json
import logging
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from fuzz.mutate import mutants

SLOW = 2.0
"""Seconds; an execution that takes longer is a finding."""

_MAX_LEN = 6000


@dataclass
class Report:
    """What one run did; ``labels`` counts how the executions ended."""

    target: str
    engine: str
    seed: int
    executions: int = 0
    seconds: float = 0.0
    findings: list[str] = field(default_factory=list)
    labels: Counter[str] = field(default_factory=Counter)
    more: dict[str, Any] = field(default_factory=dict)

    def text(self) -> str:
        """One line of JSON."""
        return json.dumps({**vars(self), "seconds": round(self.seconds, 1), "labels": dict(self.labels.most_common())})


class Witness(logging.Handler):
    """Keeps what is logged as an error or with a traceback."""

    def __init__(self, seen: list[str]) -> None:
        super().__init__(logging.WARNING)
        self._seen = seen

    def emit(self, record: logging.LogRecord) -> None:
        # The simulated engines' own server says so of what it refuses, such as a second Content-Type.
        if record.name != "aiohttp.server" and (record.exc_info or record.levelno >= logging.ERROR):
            self._seen.append(logging.Formatter().format(record)[-2000:])


def load(name: str) -> ModuleType:
    """The target's module: ``check(data)``, ``SEEDS`` and ``WORDS``."""
    return importlib.import_module(f"fuzz.{name}")


def run_seeded(name: str, seed: int, *, seconds: float = 0.0, executions: int = 0) -> Report:
    """Every seed input, then mutants of them, until the time or the number is over; the first finding ends it."""
    target, report = load(name), Report(name, "seeded", seed)
    inputs, check = _inputs(target, seed), target.check
    if hasattr(target, "inputs"):
        inputs, check = target.inputs(seed), load("prepare").check
    begun = time.monotonic()
    for data in inputs:
        if (executions and report.executions >= executions) or (seconds and time.monotonic() - begun >= seconds):
            break
        report.executions += 1
        started = time.monotonic()
        try:
            report.labels[check(data)] += 1
        except Exception as error:
            report.findings.append(f"{type(error).__name__}: {error} on {data!r}")
            break
        if time.monotonic() - started > SLOW:
            report.findings.append(f"more than {SLOW:g} s on {data!r}")
            break
    report.seconds = time.monotonic() - begun
    return report


def _inputs(target: ModuleType, seed: int) -> Any:
    yield from target.SEEDS
    yield from mutants(seed, target.SEEDS, target.WORDS)


def run_guided(name: str, seed: int, *, seconds: float, corpus: Path | None = None) -> Report:
    """The same through atheris, in a separate process, because libFuzzer ends the process that it runs in.

    Args:
        corpus: where the inputs that reached something new are kept; nowhere when left out.
    """
    report = Report(name, "atheris", seed)
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        seeds = corpus or here / "corpus"
        seeds.mkdir(parents=True, exist_ok=True)
        target = load(name)
        for number, data in enumerate(target.SEEDS):
            (seeds / f"seed-{number}").write_bytes(data)
        (here / "words").write_text("".join(f'"{_escaped(word)}"\n' for word in target.WORDS))
        counts = here / "counts.json"
        options = [f"-seed={seed}", f"-max_total_time={seconds:.0f}", f"-max_len={_MAX_LEN}", f"-dict={here / 'words'}"]
        options += [f"-artifact_prefix={here}/", f"-timeout={SLOW:.0f}", "-rss_limit_mb=2048"]
        command = [sys.executable, "-m", "fuzz.guided", name, str(counts), *options, str(seeds)]
        begun = time.monotonic()
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        report.seconds = time.monotonic() - begun
        said = done.stdout.decode(errors="replace")
        found = json.loads(counts.read_text()) if counts.exists() else {"executions": 0, "labels": {}}
        report.executions, report.labels = found["executions"], Counter(found["labels"])
        report.more["corpus"] = sum(1 for _ in seeds.iterdir())
        for artifact in sorted(here.glob("*-*")):
            report.findings.append(f"{artifact.name.partition('-')[0]} on {artifact.read_bytes()!r}")
        if done.returncode and not report.findings:
            report.findings.append(f"exit {done.returncode}")
        if report.findings:
            report.more["said"] = said[-3000:]
    return report


def has_atheris() -> bool:
    """Whether runs can be guided."""
    return find_spec("atheris") is not None


def _escaped(word: bytes) -> str:
    return "".join(f"\\x{byte:02x}" for byte in word[:120])
