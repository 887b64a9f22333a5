"""`config` and `env`: what there is to say before anything runs."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from disagg_machine import engines, gpus, launch, python_environment, ui, vllm_facts
from disagg_machine.context import SECRETS, Context
from disagg_machine.layout import Place, layout
from disagg_machine.messages import die, text
from disagg_machine.table import SETTINGS
from disagg_machine.vllm_facts import VllmFacts


def cmd_config(context: Context, words: Sequence[str]) -> int:
    """``config``: every setting, its value and where it comes from.

    Raises:
        MachineError: 2, wrong usage.
    """
    if words:
        raise die(2, "unknown_argument", "config", words[0])
    settings = context.settings
    for setting in SETTINGS:
        value = settings.texts[setting.env]
        shown = "********" if setting.secret and value else value
        ui.out(f"{setting.env:<32} {shown:<44} {text('source_' + settings.sources[setting.env])}")
    return 0


def cmd_env(context: Context, words: Sequence[str]) -> int:
    """``env``: the exact commands, to copy.

    Nothing is installed or started for it, and ENGINE=vllm is printed without GPUs too.

    Raises:
        MachineError: 1, a vLLM that cannot serve; 2, settings that contradict each other.
    """
    base = python_environment.base_python(context)
    alone = context.settings.engine == "vllm" and len(gpus.read_gpus(context.environ)) != 1
    found = _vllm_to_show(context) if alone else engines.resolve(context)
    plan = launch.Plan(context, found, layout(context.settings), python_environment.likely(context, base))
    if found.simulated:
        ui.say("env_sim", found.why)
    ui.out(f"cd {shlex.quote(str(context.root))}")
    for place in plan.layout.parts:
        ui.out(f"# {place.name}\n{plan.command(place).line(_secrets(context, place))}")
    return 0


_PROXY_ALONE, _ENGINES_ALONE = {"API_KEY", "ENGINE_API_KEY"}, {"VLLM_API_KEY"}


def _secrets(context: Context, place: Place) -> dict[str, str]:
    """The secrets that this process gets beside its command line: variable -> setting."""
    others = _ENGINES_ALONE if place.role == "proxy" else _PROXY_ALONE
    texts = context.settings.texts
    return {name: setting for name, setting in SECRETS.items() if texts[setting] and name not in others}


def _vllm_to_show(context: Context) -> engines.Engines:
    settings = context.settings
    facts = vllm_facts.find_vllm(context)
    if facts is None:
        # What pip would install, or the newest that has vLLM's own connector.
        facts = VllmFacts(f"0.{vllm_facts.OWN_NEWEST}.0")
        if settings.kv_connector == "p2p_nccl":
            facts = VllmFacts("0.23.0", connector=True)
        ui.warn("env_no_vllm", facts.version)
    return engines.with_vllm(settings, facts, context.environ)
