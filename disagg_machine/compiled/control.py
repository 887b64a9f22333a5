"""What the commands do about the compiled hot path: look, use, begin a build, wait for one, end it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path

from disagg_machine import files, parts, ui
from disagg_machine.compiled import build, identity, store
from disagg_machine.compiled.identity import PythonBuild
from disagg_machine.compiled.store import Store
from disagg_machine.context import SECRETS, Context
from disagg_machine.messages import die, text
from disagg_machine.table import SETTINGS

AUTO, NEEDED, NEVER = "auto", "1", "0"
"""Values of PROXY_COMPILED."""


class State(Enum):
    """How the compiled hot path of this checkout is."""

    OFF = auto()
    """PROXY_COMPILED=0, or no checkout: nothing is looked for and nothing is built."""
    READY = auto()
    """There is a build of these sources for this Python."""
    RUNNING = auto()
    """It is being built."""
    FAILED = auto()
    """It was tried without success, and is not tried again while the sources are the same."""
    BLOCKED = auto()
    """It cannot be built here."""
    WANTED = auto()
    """It can be built."""


@dataclass(frozen=True, slots=True)
class Look:
    """What was found.

    Attributes:
        folder: the build, when it is ready.
        log: of the build that runs or has failed.
        obstacles: what keeps it from being built, as keys of texts with their arguments.
    """

    state: State
    digest: str = ""
    folder: Path | None = None
    log: str = ""
    obstacles: tuple[tuple[str, str], ...] = ()

    @property
    def server(self) -> Path | None:
        """The proxy's program in the build, when it is ready."""
        return None if self.folder is None else self.folder / identity.SERVER

    @property
    def obstacle_text(self) -> str:
        """What is missing, in words."""
        return "; ".join(text(key, argument) for key, argument in self.obstacles)


def builds_of(context: Context) -> Store:
    """The builds of this checkout."""
    return Store(store.folder(context.environ, context.run_dir), context.root)


def look(context: Context, python: str) -> Look:
    """How it is for ``python``, which runs the proxy. Takes about 0.1 s, nothing is changed."""
    if context.settings.proxy_compiled == NEVER or not identity.is_checkout(context.root):
        return Look(State.OFF)
    about = identity.python_build(python)
    if about is None:
        return Look(State.OFF)
    builds = builds_of(context)
    try:
        digest = identity.digest(context.root, about)
    except OSError:
        # A file goes while the checkout changes.
        return Look(State.OFF)
    folder = builds.find(digest)
    if folder is not None:
        return Look(State.READY, digest, folder)
    attempt = builds.attempt(digest)
    if attempt is not None:
        return Look(State.RUNNING if attempt.runs else State.FAILED, digest, log=attempt.log)
    obstacles = tuple(obstacles_to_build(about, builds.root))
    return Look(State.BLOCKED if obstacles else State.WANTED, digest, obstacles=obstacles)


def obstacles_to_build(about: PythonBuild, root: Path) -> list[tuple[str, str]]:
    """What a build needs of this machine besides the package index."""
    found = []
    if not about.has_compiler:
        found.append(("build_compiler", about.compiler))
    if not about.has_header:
        found.append(("build_header", about.header))
    if not about.can_make_venv:
        found.append(("build_venv", ""))
    above = next((one for one in (root, *root.parents) if one.exists()), root)
    if not os.access(above, os.W_OK | os.X_OK):
        found.append(("build_folder", str(root)))
    return found


def server(context: Context, python: str) -> Path:
    """The program that ``python`` runs as the proxy: that of the build, or the checkout's."""
    return look(context, python).server or context.root / identity.SERVER


def compiler(context: Context, python: str) -> str:
    """The requirement of the compiler that a build will use; empty when it is not here and no index has it."""
    about = identity.python_build(python)
    wanted = build.compiler(context.root)
    if about is None:
        return ""
    tools = build.environment(builds_of(context), wanted, about, context.settings.log(build.PART))
    return wanted if (tools.requirements.is_file() and tools.ready()) or _in_index(python, wanted) else ""


def _in_index(python: str, wanted: str) -> bool:
    """Whether pip finds it; also where this Python has no pip, which tells nothing."""
    name = wanted.partition("[")[0]
    words = [python, "-m", "pip", "index", "versions", name, "--retries", "0", "--timeout", "5"]
    done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    return done.returncode == 0 or "No module named pip" in done.stderr


# -- begin and end


def begin(context: Context, python: str, digest: str, *, aside: bool = True) -> None:
    """Start the build. One of this RUN_DIR that builds other sources is ended."""
    running = parts.alive_part(context.run_dir, build.PART)
    if running is not None:
        if running.get("digest") == digest:
            return
        end(context)
    log = context.settings.log(build.PART)
    files.rotate(log)
    words = [*context.program(), build.COMMAND, python, *([build.ASIDE] if aside else [])]
    fields = {"kind": "script", "role": build.PART, "mode": "background", "digest": digest}
    pid_file = context.run_dir / f"{build.PART}.pid"
    parts.spawn(words, _environment(context), pid_file, fields, folder=context.root, log=log)


def _environment(context: Context) -> dict[str, str]:
    """Every setting, and no key."""
    found = {name: value for name, value in context.environ.items() if name not in SECRETS}
    found |= {s.env: context.settings.texts[s.env] for s in SETTINGS if not s.secret}
    return found | {"CONFIG": ""}


def end(context: Context) -> bool:
    """End the build that was begun from this RUN_DIR; whether one ran."""
    ran = parts.alive_part(context.run_dir, build.PART) is not None
    parts.stop_parts(context.run_dir, 5, [build.PART])
    return ran


# -- for the commands that start a proxy


def need(context: Context, python: str) -> None:
    """With PROXY_COMPILED=1: build it now and wait, also where that has failed before.

    Raises:
        MachineError: 1, it cannot be built.
    """
    if context.settings.proxy_compiled != NEEDED:
        return
    found = look(context, python)
    if found.state is State.OFF:
        raise die(1, "compiled_no_sources", context.root)
    if found.state is State.BLOCKED:
        raise die(1, "compiled_cannot", found.obstacle_text)
    if found.state is State.READY:
        return
    log = context.settings.log(build.PART)
    begin(context, python, found.digest, aside=False)
    try:
        _wait(context, log)
    except BaseException:
        end(context)
        raise
    if look(context, python).state is not State.READY:
        ui.show_log_tail(log, 12)
        raise die(1, "compiled_needed", log)


def _wait(context: Context, log: Path) -> None:
    since = time.monotonic()
    while (part := parts.alive_part(context.run_dir, build.PART)) is not None:
        ui.progress(text("wait_compile"), int(time.monotonic() - since), log)
        time.sleep(0.2)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(part.pid, os.WNOHANG)
    ui.progress_clear()


def report(context: Context, python: str) -> bool:
    """Say whether the proxy that was started is compiled, and begin the build for the next start.

    Returns:
        Whether this call has begun a build. Nothing is begun, or said, for a `bench`, which measures.
    """
    if context.quiet:
        return False
    found = look(context, python)
    if found.state is State.READY:
        proxy = parts.load_part(context.run_dir, "proxy")
        if proxy and proxy.get("server") == str(found.server):
            ui.say("compiled_used")
        else:
            ui.say("compiled_ready", context.script)
    elif found.state is State.FAILED:
        ui.warn("compiled_failed", found.log)
    elif found.state is State.BLOCKED:
        ui.say("compiled_blocked", found.obstacle_text)
    elif found.state in (State.WANTED, State.RUNNING):
        log = context.settings.log(build.PART)
        if found.state is State.WANTED:
            try:
                begin(context, python, found.digest)
            except OSError as error:
                ui.warn("compiled_failed", error)
                return False
        ui.say("compiled_later", found.log or log, context.script)
        return found.state is State.WANTED
    return False
