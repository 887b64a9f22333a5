"""The process that builds. Its own content is part of every build's name (identity.py): it is the recipe.

The sources are copied first and the build is named by the copy, so an edit while it runs changes nothing: the build is
that of the sources as they were. mypyc comes from the package index, in an environment of its own that later builds
use again. It sees no other packages than in a wheel's build, so the native code is the same.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import runpy
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from disagg_machine import parts, signals, ui
from disagg_machine.compiled import identity, store
from disagg_machine.compiled.identity import PythonBuild
from disagg_machine.compiled.store import Store
from disagg_machine.context import Context
from disagg_machine.messages import MachineError
from disagg_machine.python_environment import Environment

COMMAND = "__compile"
"""The command of this process: ``__compile PYTHON [aside]``."""

ASIDE = "aside"
"""Last word of a build that others must not notice: lowest priority for CPU and disk, first to go without memory."""

PART = "compile"
"""Name of its PID file and its log."""

TRIAL = "import disagg_proxy, disagg_proxy.serve, sys; sys.exit(not disagg_proxy.compiled())"


def cmd_compile(context: Context, words: Sequence[str]) -> int:
    """Build the sources of this checkout as they are now, unless that has been done."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    if words[1:] == [ASIDE]:
        step_aside()
    # What the user's Python is to find is not for the compiler's.
    for name in [name for name in os.environ if name.startswith("PYTHON")]:
        del os.environ[name]
    log = context.settings.log(PART)
    try:
        with signals.raised():
            builds = Store(store.folder(context.environ, context.run_dir), context.root)
            return _Build(builds, words[0], context.environ, log).run()
    except signals.Interrupted as ended:
        ui.say("compile_ended")
        return ended.code
    except OSError as error:
        ui.complain("compile_error", error)
        return 1
    finally:
        part = parts.load_part(context.run_dir, PART)
        if part is not None and part.pid == os.getpid():
            (context.run_dir / f"{PART}.pid").unlink(missing_ok=True)


def step_aside() -> None:
    """Be noticed by nobody: the processes that this one starts inherit it."""
    os.nice(19)
    if shutil.which("ionice"):
        subprocess.run(["ionice", "-c", "3", "-p", str(os.getpid())], stdin=subprocess.DEVNULL, check=False)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")


class _Build:
    """One build."""

    def __init__(self, builds: Store, python: str, environ: Mapping[str, str], log: Path) -> None:
        self._builds = builds
        self._python = python
        self._log = log
        self._lock = -1
        self._environ = environ

    def run(self) -> int:
        about = identity.python_build(self._python)
        if about is None:
            ui.complain("no_python", self._python)
            return 1
        with self._locked():
            self._builds.prepare()
            copy = self._builds.folder / f"new-{os.getpid()}"
            try:
                copy_sources(self._builds.checkout, copy)
                digest = identity.digest(copy, about)
                if self._builds.find(digest) is not None:
                    return 0
                return self._try(copy, digest, about)
            finally:
                shutil.rmtree(copy, ignore_errors=True)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """One build at a time. Its programs have the lock too: one whose parent was killed still counts."""
        self._builds.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = os.open(self._builds.root / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(self._lock)

    def _try(self, copy: Path, digest: str, about: PythonBuild) -> int:
        since = time.monotonic()
        self._builds.note(digest, store.RUNNING, self._log)
        try:
            tools = self._tools(copy, about)
            ui.say("compile_begins", self._builds.checkout, self._python)
            words = [str(tools.python), identity.RECIPE, "build_ext", "--inplace"]
            self._step(words, copy, {**os.environ, "DISAGG_PROXY_COMPILE": "1"})
            self._step([self._python, "-c", TRIAL], copy, {**self._environ, "PYTHONSAFEPATH": ""})
            finish(copy)
            os.replace(copy, self._builds.folder / digest)
        except (OSError, subprocess.SubprocessError, MachineError) as error:
            self._builds.note(digest, store.FAILED, self._log)
            ui.complain("compile_error", error)
            return 1
        except signals.Interrupted:
            self._builds.forget(digest)
            raise
        self._builds.forget(digest)
        ui.good("compile_done", self._builds.folder / digest, round(time.monotonic() - since))
        with contextlib.suppress(OSError):
            self._builds.clean(digest, time.time())
        return 0

    def _tools(self, copy: Path, about: PythonBuild) -> Environment:
        """The compiler's environment, made where it is missing.

        Raises:
            MachineError: 1, it cannot be made: no network, for example.
        """
        tools = environment(self._builds, compiler(copy), about, self._log)
        tools.requirements.write_text(f"{compiler(copy)}\n", encoding="utf-8")
        if not tools.ready():
            tools.make(self._python)
        os.utime(tools.folder)
        return tools

    def _step(self, words: Sequence[str], folder: Path, environ: Mapping[str, str]) -> None:
        temporary = folder / "tmp"
        temporary.mkdir(exist_ok=True)
        subprocess.run(
            words,
            cwd=folder,
            env={**environ, "TMPDIR": str(temporary)},
            stdin=subprocess.DEVNULL,
            pass_fds=(self._lock,),
            check=True,
        )


def compiler(root: Path) -> str:
    """The requirement of the compiler that the recipe names."""
    return str(runpy.run_path(str(root / identity.RECIPE), run_name="recipe")["MYPY"])


def environment(builds: Store, wanted: str, about: PythonBuild, log: Path) -> Environment:
    """The environment with this compiler, for this Python."""
    folder = builds.root / f"tools-{identity.short(wanted, about.text)}"
    return Environment(folder, folder.with_name(f"{folder.name}.txt"), log)


def copy_sources(root: Path, to: Path) -> None:
    """What a build is made from, and nothing else."""
    for path in identity.source_files(root):
        target = to / path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(root / path, target)


def finish(copy: Path) -> None:
    """Remove what the compiler has left behind, and bring the rest to the disk: a build outlives a power failure."""
    for name in ("tmp", "build", ".mypy_cache"):
        shutil.rmtree(copy / name, ignore_errors=True)
    for path in copy.rglob("*.so"):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
