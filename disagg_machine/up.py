"""`all`: everything in the background, or until a signal. What this call started is stopped when one part fails."""

from __future__ import annotations

import contextlib
import os
import shlex
import time
from collections.abc import Sequence

from disagg_machine import clocks, commands, down, engines, files, launch, lock, parts, signals, supervise, ui
from disagg_machine import settings as reading
from disagg_machine.compiled import build, control
from disagg_machine.context import Context
from disagg_machine.launch import Plan
from disagg_machine.layout import Place, layout
from disagg_machine.messages import MachineError, die, text
from disagg_machine.proxy_view import ProxyView
from disagg_machine.start import Starting, wait_for_shared_gpu
from disagg_machine.vllm_facts import is_untried

STAY_SECONDS = 0.5
"""Between two looks of `all --foreground`, and from the end of a process to that of its PID file."""


def cmd_all(context: Context, words: Sequence[str]) -> int:
    """``all [--supervise|--no-supervise] [--foreground]``: returns when requests can be served, or stays.

    Raises:
        MachineError: what keeps it from starting.
    """
    supervised, foreground = context.settings.supervise, False
    for word in words:
        if word == "--foreground":
            foreground = True
        elif word in ("--supervise", "--no-supervise"):
            supervised = word == "--supervise"
        else:
            raise die(2, "unknown_argument", "all", word)
    with lock.held(context.settings, "all"):
        if already_running(context):
            return int(foreground)
        started: list[str] = []
        with signals.raised():
            try:
                _start(context, started, supervised)
            except BaseException as error:
                with signals.ignored():
                    if isinstance(error, MachineError):
                        ui.complain(error.key, *error.arguments)
                    elif isinstance(error, signals.Interrupted):
                        ui.progress_clear()
                        ui.say("interrupted")
                    roll_back(context, started)
                if isinstance(error, MachineError | signals.Interrupted):
                    return error.code
                raise
    if not context.quiet:
        report_ready(context)
    return _stay(context, supervised) if foreground else 0


def _stay(context: Context, supervised: bool) -> int:
    """For systemd and containers: until a signal, which stops everything in order, or until there is nobody to restart
    what dies: the supervisor, or without one the last part, has ended.

    Returns:
        0 after a signal or `stop`, 1 when they ended by themselves; nothing runs any more then.
    """
    run_dir, left = context.run_dir, ""
    try:
        with signals.raised():
            while parts.alive_part(run_dir, "supervisor") if supervised else parts.anything_alive(run_dir):
                _reap()
                time.sleep(STAY_SECONDS)
            _reap()
            # `stop` removes the PID file as soon as it sees the end.
            time.sleep(STAY_SECONDS)
            left = " ".join(name for name in parts.known_parts(run_dir) if name == "supervisor" or not supervised)
    except signals.Interrupted:
        pass
    with signals.ignored():
        if left:
            ui.complain("foreground_ended", left, context.settings.log_dir)
        down.stop_everything(context)
    return int(bool(left))


def _reap() -> None:
    """Children that have ended leave no zombie; the supervisor starts their successors."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _start(context: Context, started: list[str], supervised: bool) -> None:
    plan = launch.plan(context)
    # `bench` has said it already.
    if not context.quiet:
        announce(plan)
    plan.check_ports(plan.layout.parts)
    control.need(context, plan.python)
    # A supervisor whose parts are all gone would bring them back beside the new ones.
    parts.stop_parts(context.run_dir, 30, parts.HELPERS)
    for name in parts.known_parts(context.run_dir):
        parts.sweep(context.run_dir, name)
    clocks.undo(context)
    reading.write_running(context.settings)
    forget_restarts(context)
    start_parts(Starting(plan, started))
    if supervised:
        started.append("supervisor")
        supervise.begin(plan)
    clocks.begin(plan, started)
    if control.report(context, plan.python):
        started.append(build.PART)


def start_parts(starting: Starting) -> None:
    """The proxy first, so that engines find it; then the engines, those that share a GPU one after the other."""
    plan = starting.plan
    earlier: list[Place] = []
    for place in plan.layout.parts:
        wait_for_shared_gpu(starting, place, earlier)
        start_part(starting, place, ProxyView())
        if place.role == "proxy":
            starting.wait_for_proxy()
        else:
            earlier.append(place)
    for place in earlier:
        starting.wait_for_engine(place)
    starting.wait_for_pairs()


def start_part(starting: Starting, place: Place, view: ProxyView) -> None:
    """One part with a new log."""
    log = starting.plan.log(place.name)
    files.rotate(log)
    starting.started.append(place.name)
    starting.plan.launch(place, log, view)


def forget_restarts(context: Context) -> None:
    """Remove what `status` says of earlier restarts."""
    for path in context.run_dir.glob("*.restarts"):
        path.unlink(missing_ok=True)


def already_running(context: Context) -> bool:
    """Whether everything runs, which is no failure.

    Raises:
        MachineError: 1, only a part of it runs.
    """
    found = [part for part in parts.all_parts(context.run_dir) if part.name not in parts.HELPERS]
    alive = [f"{part.name} (PID {part.pid})" for part in found if part.alive]
    if not alive:
        return False
    engines.resolve(context)
    known = {part.name for part in found}
    gone = [part.name for part in found if not part.alive]
    gone += [name for name in layout(context.settings).names if name not in known]
    if gone:
        raise die(1, "partly_running", " ".join(alive), " ".join(gone))
    ui.say("already_running", " ".join(alive), context.url)
    return True


def announce(plan: Plan) -> None:
    """What will run, and what is worth knowing of it."""
    found, settings = plan.engines, plan.context.settings
    if found.vllm is None:
        say_simulated(plan.engines)
    else:
        ui.say("using_vllm", found.vllm.version, engines.connector_shown(found.connector), " ".join(found.vllm.command))
        if is_untried(found.vllm, found.connector):
            ui.warn("own_untried", found.vllm.version)
        if commands.chunks_may_kill(settings, found):
            ui.warn("chunked_warning", settings.max_num_batched_tokens, settings.max_model_len)
        if found.kv_cache_bytes:
            ui.warn("shared_gpu", ", ".join(plan.layout.shared_gpus), found.kv_cache_bytes >> 20)
    for place in plan.layout.parts:
        if place.role == "proxy":
            ui.say("part_proxy", *place.ports)
        else:
            where = text("simulated") if found.simulated else text("on_gpu", ",".join(place.gpus))
            ui.say("part_engine", place.name, place.http, place.kv, where)


def say_simulated(found: engines.Engines) -> None:
    """That no model runs, why, and how it would."""
    ui.loud(text("loud_sim"), text("loud_why", found.why), text("loud_sim_how"))


def roll_back(context: Context, started: Sequence[str]) -> None:
    """Stop what was started, the last one first."""
    names = list(reversed(started))
    if names:
        ui.say("rolling_back", " ".join(names))
        parts.stop_parts(context.run_dir, context.settings.stop_timeout, names)
        (context.run_dir / "settings").unlink(missing_ok=True)


def report_ready(context: Context) -> None:
    """Where everything is, and what to do next."""
    ui.good("all_ready", context.url)
    for part in parts.all_parts(context.run_dir):
        ui.out(f"{part.name:<12} PID {part.pid:<8} {part.get('log')}")
    ui.say("try_it")
    ui.out(example(context))
    ui.say("watch_it", context.url)
    ui.say("next_commands", context.script)


def example(context: Context) -> str:
    """A command that sends a request."""
    names = ("http_proxy", "all_proxy", "ALL_PROXY")
    direct = "--noproxy '*' " if any(context.environ.get(name) for name in names) else ""
    key = '-H "Authorization: Bearer $API_KEY" ' if context.settings.api_key else ""
    model = context.settings.served_names[0]
    body = f'{{"model": "{model}", "prompt": "San Francisco is a", "max_tokens": 32, "stream": true}}'
    url = f"{context.url}/v1/completions"
    return f'curl {direct}{url} -H "Content-Type: application/json" {key}-d {shlex.quote(body)}'
