"""Which Python runs the proxy and the simulated engines, and the virtual environment where one is needed.

The user's Python is PYTHON; it is used itself when it has everything in requirements-proxy.txt, else VENV_DIR is made
from it.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from disagg_machine import ui
from disagg_machine.context import PACKAGE, Context
from disagg_machine.messages import MachineError, die, text
from disagg_machine.settings import DEFAULT

REQUIREMENTS = "requirements-proxy.txt"
STAMP = ".proxy-requirements"
"""In VENV_DIR: the checksum of the requirements that it was made from; a changed file makes it out of date."""


def _run(words: Sequence[str | Path], **more: str) -> subprocess.CompletedProcess[str]:
    """A short program, its output as text."""
    environment = {**os.environ, **more}
    return subprocess.run(
        list(map(str, words)),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        env=environment,
    )


def _works(words: Sequence[str | Path]) -> bool:
    try:
        return _run(words).returncode == 0
    except OSError:
        return False


def installed(context: Context) -> bool:
    """Whether this package was installed, with what it needs, and is no checkout."""
    return not (context.root / REQUIREMENTS).is_file()


def base_python(context: Context) -> str:
    """The user's Python; of an installed package its own, unless PYTHON names another one.

    Raises:
        MachineError: 1, there is none, or it is too old.
    """
    if installed(context) and context.settings.sources["PYTHON"] == DEFAULT:
        return sys.executable
    wanted = context.settings.python
    found = shutil.which(wanted, path=context.environ.get("PATH"))
    if found is None:
        raise die(1, "no_python", wanted)
    if not _works([found, "-I", "-S", "-c", "import sys; sys.exit(sys.version_info < (3, 10))"]):
        raise die(1, "python_too_old", found, version(found))
    return found


def version(python: str) -> str:
    """What ``python -V`` says."""
    try:
        done = _run([python, "-V"])
    except OSError as error:
        return str(error)
    return (done.stdout + done.stderr).strip()


def missing(context: Context, python: str) -> str:
    """The proxy's packages that ``python`` lacks or has too old, separated by blanks; empty when it has them all."""
    if installed(context):
        return "" if _works([python, "-c", "import disagg_proxy"]) else "disagg-proxy"
    done = _run([python, PACKAGE / "probes" / "requirements_met.py", context.root / REQUIREMENTS])
    return done.stdout.strip() if done.returncode == 0 else f"{done.stdout}python".strip()


def can_make_environments(python: str) -> bool:
    """Whether it has the modules that Debian packages separately."""
    return _works([python, "-c", "import ensurepip, venv"])


@dataclass(frozen=True)
class Environment:
    """VENV_DIR of one checkout."""

    folder: Path
    requirements: Path
    log: Path

    @property
    def python(self) -> Path:
        """Its Python."""
        return self.folder / "bin" / "python"

    def stamp(self) -> str:
        """What the requirements are now."""
        with open(self.requirements, "rb") as file:
            return subprocess.run(["cksum"], stdin=file, capture_output=True, text=True, check=True).stdout.strip()

    def ready(self) -> bool:
        """Whether it works and is up to date."""
        try:
            made_from = (self.folder / STAMP).read_text(encoding="ascii").strip()
        except (OSError, ValueError):
            return False
        return made_from == self.stamp() and os.access(self.python, os.X_OK) and _works([self.python, "-c", ""])

    def make(self, base: str) -> None:
        """Make it, repair it, or bring it up to date.

        Two commands of one checkout may come here at once: the folder above is the lock.

        Raises:
            MachineError: 1, with the end of the log or the remedy.
        """
        if self.folder.is_dir() and not (self.folder / "pyvenv.cfg").is_file() and any(self.folder.iterdir()):
            raise die(1, "venv_not_ours", self.folder)
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.folder.parent, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if not self.ready():
                self._fill(base)
        finally:
            os.close(descriptor)

    def _fill(self, base: str) -> None:
        if os.access(self.python, os.X_OK) and _works([self.python, "-m", "pip", "--version"]):
            ui.say("venv_updating", self.folder, self.log)
            self.log.write_bytes(b"")
        else:
            if not can_make_environments(base):
                raise die(1, "no_venv_module", remedy(base))
            ui.say("venv_making", self.folder, self.log)
            self.log.write_bytes(b"")
            self._step([base, "-m", "venv", "--clear", "--", self.folder])
        (self.folder / STAMP).unlink(missing_ok=True)
        self.install(self.requirements)
        (self.folder / STAMP).write_text(self.stamp() + "\n", encoding="ascii")
        ui.good("venv_made", self.folder)

    def install(self, requirements: Path) -> None:
        """Install a requirements file into it.

        Raises:
            MachineError: 1, with the end of the log.
        """
        self._step([self.python, "-m", "pip", "install", "--no-input", "--quiet", "-r", requirements])

    def _step(self, words: Sequence[str | Path]) -> None:
        environment = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        with open(self.log, "ab") as log:
            done = subprocess.run(
                list(map(str, words)), stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, check=False
            )
        if done.returncode != 0:
            raise self.failed()

    def failed(self) -> MachineError:
        """Show the end of the log; the error to raise."""
        ui.show_log_tail(self.log, 12)
        return die(1, "venv_failed", self.log)


def environment(context: Context) -> Environment:
    """The virtual environment that the settings name."""
    settings = context.settings
    return Environment(settings.venv_dir, context.root / REQUIREMENTS, settings.log("venv"))


def ensure(context: Context) -> str:
    """The Python that has everything that the proxy needs; makes the virtual environment where that is needed.

    Raises:
        MachineError: 1, it cannot be made.
    """
    base = base_python(context)
    lacking = missing(context, base)
    if not lacking:
        if not context.quiet:
            ui.say("python_chosen", base)
        return base
    if installed(context):
        raise die(1, "python_lacks", base, lacking)
    venv = environment(context)
    if venv.ready():
        if not context.quiet:
            ui.say("python_venv", venv.python)
        return str(venv.python)
    ui.say("python_lacks", base, lacking)
    venv.make(base)
    return str(venv.python)


def likely(context: Context, base: str) -> str:
    """The Python that :func:`ensure` would return, without making anything."""
    return str(environment(context).python) if missing(context, base) else base


def remedy(base: str) -> str:
    """The exact line that brings ``python -m venv`` to a Debian or Ubuntu machine."""
    done = _run([base, "-c", 'import sys; print("python%d.%d-venv" % sys.version_info[:2])'])
    package = done.stdout.strip()
    sudo = "" if os.geteuid() == 0 else "sudo "
    if shutil.which("apt-get"):
        return f"{sudo}apt-get update && {sudo}apt-get install -y {package}"
    return text("install_venv_module", package)
