"""What runs on this machine, worked out once, and the start of one of its processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from disagg_machine import commands, engines, gpus, kv_bytes, net, parts, python_environment, ui
from disagg_machine.commands import Command
from disagg_machine.compiled import control
from disagg_machine.context import Context
from disagg_machine.engines import Engines
from disagg_machine.layout import Layout, Place, layout
from disagg_machine.messages import die
from disagg_machine.proxy_view import ProxyView

SIMULATED_KV_BYTES = 147456
"""KV bytes of one token of a simulated engine (disagg_sim/config.py)."""


@dataclass
class Plan:
    """What runs on this machine.

    Attributes:
        python: the Python that has the proxy's packages.
        children: PIDs that this process started.
    """

    context: Context
    engines: Engines
    layout: Layout
    python: str
    children: set[int] = field(default_factory=set)

    def kind(self, place: Place) -> str:
        """What a part is: proxy, vllm or sim."""
        return "proxy" if place.role == "proxy" else self.engines.kind

    def command(self, place: Place) -> Command:
        """The command line of one part."""
        context = self.context
        if place.role != "proxy":
            root = str(context.root)
            return commands.engine(context.settings, self.engines, place, self.python, root, context.environ)
        return commands.proxy(
            context.settings,
            self.engines,
            proxy_program(context, self.python),
            tensor_parallel=self.layout.tensor_parallel,
            kv_bytes_per_token=self._kv_bytes(),
            environ=context.environ,
            places=self.layout.parts,
        )

    def _kv_bytes(self) -> int:
        if self.engines.simulated:
            return SIMULATED_KV_BYTES
        if self.engines.own_connector:
            return 0
        settings = self.context.settings
        return kv_bytes.kv_bytes_per_token(settings.model, settings.dtype, self.context.environ)

    def launch(self, place: Place, log: Path | None, view: ProxyView) -> int:
        """Start one part, without any check, and return its PID.

        Args:
            log: where its output is added; None keeps it in this terminal.
            view: the PID file keeps how many requests the proxy had sent to this address before.
        """
        context = self.context
        command = self.command(place)
        fields = {
            "kind": self.kind(place),
            "role": place.role,
            "mode": "foreground" if log is None else "background",
            "http": place.http,
            "kv": place.kv if place.kv is not None else "",
            "gpus": ",".join(place.gpus),
            "served": view.requests(place.http) or 0,
        }
        if place.role in ("prefill", "decode"):
            fields["connector"] = self.engines.connector
        if place.role == "proxy":
            # `status` compares them with what the next start would use.
            fields |= {"python": command.words[0], "server": command.words[1]}
        environment = context.child_environment() | without_internet_proxy(context) | dict(command.environment)
        if place.role == "proxy" or self.engines.simulated:
            environment["PYTHONUNBUFFERED"] = "1"
        pid_file = context.run_dir / f"{place.name}.pid"
        pid = parts.spawn(command.words, environment, pid_file, fields, folder=context.root, log=log)
        self.children.add(pid)
        return pid

    def log(self, name: str) -> Path:
        """The log of a part."""
        return self.context.settings.log(name)

    def check_ports(self, places: Sequence[Place]) -> None:
        """Nothing is started while a port is taken.

        Raises:
            MachineError: 1, after a line for each port that says who holds it.
        """
        taken = [(port, place.name) for place in places for port in place.ports if net.port_taken(port)]
        for port, name in taken:
            ui.complain("port_taken", port, name, net.port_holder(port))
        if taken:
            raise die(1, "ports_remedy")


def plan(context: Context) -> Plan:
    """What these settings ask for; makes the virtual environment where it is needed.

    Raises:
        MachineError: 1 or 2, it cannot run here.
    """
    python = python_environment.ensure(context)
    found = engines.resolve(context)
    placed = layout(context.settings)
    if not found.simulated:
        engines.check_gpus(context.settings, found, placed, gpus.read_gpus(context.environ))
    return Plan(context, found, placed, python)


def proxy_program(context: Context, python: str) -> list[str]:
    """The words that start the proxy: of its build where there is one for these sources, else of the checkout."""
    server = control.server(context, python)
    return [python, str(server)] if server.is_file() else [python, "-m", "disagg_proxy"]


def without_internet_proxy(context: Context) -> dict[str, str]:
    """A proxy for the internet, which a download may need, must not get what stays on this machine."""
    before = context.environ.get("no_proxy") or context.environ.get("NO_PROXY") or ""
    direct = ",".join(filter(None, [before, "127.0.0.1", "localhost", "::1", context.settings.engine_host]))
    return {"no_proxy": direct, "NO_PROXY": direct}
