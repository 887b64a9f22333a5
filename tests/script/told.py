"""The stand-in for the proxy (told_proxy.py) in the script's hands, and what a test tells it to say."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tests.script.machine import REPOSITORY, Machine, wait_for
from tests.script.stubs import write_program

REASON = "no token for 41 s, 7 requests wait"
FROZEN = {"state": "frozen", "reason": REASON, "restart_wanted": True, "in_flight": 7}


class Told:
    """What the stand-in says, and how often it was asked."""

    def __init__(self, machine: Machine, folder: Path) -> None:
        self.machine = machine
        self.folder = folder
        self.folder.mkdir()
        self.says()
        python = folder / "bin/python"
        write_program(
            python,
            f"""#!/bin/sh
case "$1" in
  */disagg_prefill_proxy_server.py) exec '{sys.executable}' '{REPOSITORY}/tests/script/told_proxy.py' ;;
  *) exec '{sys.executable}' "$@" ;;
esac
""",
        )
        machine.env |= {"PYTHON": str(python), "TOLD": str(folder)}

    def says(self, served: int = 3, elsewhere: bool = False, **engines: dict[str, Any]) -> None:
        """Each engine has had ``served`` requests; ``engines``: what else differs from a healthy one, by name.

        ``elsewhere`` puts them on another host, as somebody else's engines on the same ports.
        """
        instances = []
        for name in ("prefill", "decode"):
            port = self.machine.env[f"{name.upper()}_HTTP_PORT"]
            healthy = {
                "role": name,
                "http_address": f"{'192.0.2.7' if elsewhere else '127.0.0.1'}:{port}",
                "state": "ready",
                "reason": "",
                "restart_wanted": False,
                "requests_total": served,
                "in_flight": 0,
            }
            instances.append({**healthy, **engines.get(name, {})})
        (self.folder / "new.json").write_text(json.dumps(instances))
        (self.folder / "new.json").rename(self.folder / "instances.json")

    @property
    def asked(self) -> list[str]:
        path = self.folder / "asked"
        return path.read_text().split() if path.exists() else []

    def wait_for_content(self) -> None:
        """Until the supervisor has seen what stands here now; the look before may have seen what was before."""
        before = len(self.asked)
        wait_for(lambda: len(self.asked) >= before + 2)

    def wait_for_no_effect(self) -> None:
        """Until a look that saw what stands here now has come to its end, as the next one tells."""
        before = len(self.asked)
        wait_for(lambda: len(self.asked) >= before + 3)


def restarted(machine: Machine, **old: int) -> bool:
    """Whether these parts, with their PIDs of before, run as other processes now."""
    return all(machine.fields(name).get("pid", "0") not in ("0", str(pid)) for name, pid in old.items())


def pids(machine: Machine) -> dict[str, int]:
    return {name: machine.pid(name) for name in ("proxy", "prefill", "decode")}
