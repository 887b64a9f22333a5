"""How a part that runs serves, as `status` and `doctor` judge it."""

from __future__ import annotations

from dataclasses import dataclass

from disagg_machine import lock, net, proxy_view
from disagg_machine.context import Context
from disagg_machine.messages import text
from disagg_machine.parts import Part
from disagg_machine.proxy_view import ProxyView

OK, FROZEN, LOADING, HUNG = "ok", "frozen", "loading", "hung"
"""It answers; the proxy says that its forward pass is stalled (its own /health cannot tell); its HTTP port does not
listen yet; it listens without an answer, or without a good one."""


@dataclass(frozen=True, slots=True)
class Readiness:
    """One part.

    Attributes:
        health: :data:`OK`, :data:`FROZEN`, :data:`LOADING` or :data:`HUNG`.
        words: the same for people.
        missing: of the proxy: what keeps every pair from serving, empty when requests can be served.
    """

    health: str
    words: str
    missing: str = ""


def readiness(context: Context, part: Part, view: ProxyView) -> Readiness:
    """How a part that is alive serves."""
    role = part.get("role")
    if role == "power":
        return Readiness(OK, text("status_clocks"))
    if role == "supervisor":
        return Readiness(OK, text("status_watching"))
    if role == "proxy":
        return _proxy(context, part)
    port = part.number("http")
    engine = view.engines.get(port)
    health = OK
    if view.frozen(port):
        health = FROZEN
    else:
        answer = net.http_get(net.reach(context.settings.engine_host), port, "/health")
        if answer is None or not answer.ok:
            found = _no_answer(port, answer)
            reason = f" ({view.wanted(port)})" if view.wanted(port) else ""
            return Readiness(found.health, found.words + reason)
    if engine is None:
        return Readiness(health, text("status_no_key" if view.refused else "status_unknown"))
    return Readiness(health, text("status_proxy_says", engine.words, engine.requests))


def _proxy(context: Context, part: Part) -> Readiness:
    answer, health = proxy_view.health(context.settings)
    if health is None:
        return _no_answer(part.number("http"), answer)
    words = text("status_pairs", health.pairs)
    return Readiness(OK, f"{words}: {health.missing}" if health.missing else words, health.missing)


def _no_answer(port: int, answer: net.Answer | None) -> Readiness:
    if not net.port_taken(port):
        return Readiness(LOADING, text("status_loading"))
    return Readiness(HUNG, text("status_silent") if answer is None else text("status_bad", answer.status))


def pair_is_missing(context: Context, missing: str, loading: bool) -> bool:
    """Whether `all` had everything up and no request can be served now.

    Not while an engine still loads, or while another command or the supervisor changes what runs.
    """
    ready = (context.run_dir / "settings").is_file()
    return bool(missing) and not loading and ready and lock.holder(context.run_dir) is None
