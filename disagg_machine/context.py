"""What every command gets: settings, folders, and the environment of the programs that it starts."""

from __future__ import annotations

import os
import sys
from collections.abc import MutableMapping
from dataclasses import dataclass
from pathlib import Path

from disagg_machine import net
from disagg_machine import settings as reading
from disagg_machine.settings import Settings

PACKAGE = Path(__file__).resolve().parent
SCRIPT = "test_single_machine.sh"

SECRETS = {
    "API_KEY": "API_KEY",
    "ENGINE_API_KEY": "ENGINE_API_KEY",
    "VLLM_API_KEY": "ENGINE_API_KEY",
    "DISAGG_KV_SECRET": "DISAGG_KV_SECRET",
}
"""Environment variable of the programs -> the setting that it gets; vLLM reads its key from VLLM_API_KEY."""


@dataclass
class Context:
    """One run of one command.

    Attributes:
        root: the checkout, or the folder of the user when the package is installed without one.
        environ: the environment of this process; the CONFIG file may have added to it.
        script: how the user calls this program, for texts.
    """

    settings: Settings
    root: Path
    environ: MutableMapping[str, str]
    script: str

    @property
    def run_dir(self) -> Path:
        """RUN_DIR."""
        return self.settings.run_dir

    @property
    def url(self) -> str:
        """The proxy's address for clients on this machine."""
        return "http://" + net.authority(self.settings.http_proxy_host, self.settings.http_proxy_port)

    @property
    def quiet(self) -> bool:
        """Whether `bench` runs this command and has said already what it would say."""
        return bool(self.environ.get("BENCH_CHILD"))

    def program(self) -> list[str]:
        """The words that start this program again, in any environment: standard library only."""
        return [sys.executable, "-I", "-S", "-X", "utf8", str(PACKAGE / "__main__.py")]

    def child_environment(self) -> dict[str, str]:
        """The environment of the programs: this one's, with settings as they were read, and the keys.

        Keys go this way and not through arguments, which `ps` shows to other users.
        """
        texts = self.settings.texts
        found = {name: texts.get(name, value) for name, value in self.environ.items()}
        return found | {name: texts[setting] for name, setting in SECRETS.items() if texts[setting]}


def here() -> Path:
    """Where the user stands; the root where that folder was removed, so that `stop` works there too."""
    try:
        return Path.cwd()
    except FileNotFoundError:
        return Path("/")


def checkout() -> Path:
    """The folder that has this package and the script; the current one when the package is installed without it."""
    return PACKAGE.parent if (PACKAGE.parent / SCRIPT).is_file() else here()


def load(script: str) -> Context:
    """The context of a command that is called as ``script``.

    Raises:
        MachineError: 2, a bad setting or CONFIG file.
    """
    root = checkout()
    environ = dict(os.environ)
    return Context(reading.load(environ, root, here()), root, environ, script)
