"""The supervisor's process, so that `stop` can stop it first: the real :class:`disagg_machine.supervisor.World`."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Sequence

from disagg_machine import engines, files, launch, net, parts, proxy_view, python_environment, start, ui
from disagg_machine.context import Context
from disagg_machine.launch import Plan
from disagg_machine.layout import Place, layout
from disagg_machine.lock import SUPERVISOR, Lock
from disagg_machine.messages import text
from disagg_machine.parts import Part
from disagg_machine.proxy_view import ProxyView
from disagg_machine.settings import DEFAULT
from disagg_machine.supervisor import Rules, Supervisor
from disagg_machine.table import SETTINGS

COMMAND = "__supervise"
"""The command of the supervisor's process."""

TICK = 0.4
"""Seconds between two looks."""


def begin(plan: Plan) -> None:
    """Start the supervisor for what runs now. It gets every setting; keys as the programs do."""
    context = plan.context
    settings = context.settings
    environment = context.child_environment()
    environment |= {s.env: settings.texts[s.env] for s in SETTINGS if not s.secret}
    environment |= {"CONFIG": "", "ENGINE": plan.engines.kind}
    if settings.sources["PYTHON"] == DEFAULT:
        # A Python that was given decides where vLLM is looked for first.
        environment.pop("PYTHON", None)
    log = settings.log("supervisor")
    files.rotate(log)
    fields = {"kind": "script", "role": "supervisor", "mode": "background"}
    pid_file = context.run_dir / "supervisor.pid"
    parts.spawn([*context.program(), COMMAND], environment, pid_file, fields, folder=context.root, log=log)


def cmd_supervise(context: Context, words: Sequence[str]) -> int:
    """Watch until TERM."""
    ending = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, ending)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    python = python_environment.ensure(context)
    found = engines.resolve(context)
    settings = context.settings
    plan = launch.Plan(context, found, layout(settings), python)
    world = Machine(plan)
    rules = Rules(
        settings.restart_limit,
        settings.restart_window,
        settings.restart_backoff.value,
        engines_share_memory=not (found.simulated or found.kv_cache_bytes),
    )
    supervisor = Supervisor(plan.layout, rules, world)
    world.say(text("sup_watching", " ".join(plan.layout.names)))
    while True:
        attempt(supervisor.step, world.say)
        plan.children = parts.reap(plan.children)
        if signal.sigtimedwait(ending, TICK) is not None:
            break
    world.say(text("sup_ends"))
    return 0


def attempt(step: Callable[[], None], say: Callable[[str], None]) -> None:
    """One step. A full disk, or no process to be had: what cannot be done now is tried again at the next one."""
    try:
        step()
    except OSError as error:
        say(text("sup_failed", error))


class Machine:
    """This machine."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._context = plan.context
        self._run_dir = plan.context.run_dir
        self._lock = Lock(self._run_dir)

    def clock(self) -> float:
        return time.monotonic()

    def now(self) -> float:
        return time.time()

    def part(self, name: str) -> Part | None:
        return parts.load_part(self._run_dir, name)

    def take_lock(self) -> bool:
        try:
            return self._lock.take(0, SUPERVISOR)
        except OSError:
            return False

    def release_lock(self) -> None:
        self._lock.release()

    def ask_proxy(self) -> ProxyView:
        return proxy_view.ask(self._context.settings)

    def listens(self, port: int) -> bool:
        return net.port_taken(port)

    def holder(self, port: int) -> str:
        return net.port_holder(port)

    def ready(self, place: Place) -> bool:
        return start.engine_ready(self._plan, place)

    def end(self, ended: Sequence[tuple[Place, Part | None]]) -> None:
        parts.stop_parts(self._run_dir, 3, [place.name for place, _ in ended])
        for place, part in ended:
            before = {key: part.get(key) if part else "" for key in ("http", "log", "connector")}
            marker = {"pid": 0, "mode": "background", "role": place.role, "kind": self._plan.kind(place)}
            files.write_fields(self._run_dir / f"{place.name}.pid", {**marker, **before})

    def start(self, place: Place, view: ProxyView) -> int:
        log = self._plan.log(place.name)
        with open(log, "a", encoding="utf-8") as file:
            file.write(f"\n{_stamped(text('sup_log_mark', place.name))}\n")
        return self._plan.launch(place, log, view)

    def say(self, line: str) -> None:
        with contextlib.suppress(OSError):
            ui.out(_stamped(line))

    def show_log(self, name: str) -> None:
        with contextlib.suppress(OSError):
            for line in files.tail(self._plan.log(name), 15):
                ui.out(f"    {line}")

    def note(self, name: str, state: str, reason: str = "") -> None:
        path = self._run_dir / f"{name}.restarts"
        before = files.read_fields(path)
        count = int(before.get("count", "0")) + (state == "running")
        reason = reason or before.get("reason", "")
        files.write_fields(path, {"count": count, "state": state, "at": int(time.time()), "reason": reason})


def _stamped(line: str) -> str:
    return f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}"
