"""The verdict: whether the proxy is serving, what it does about failed engines, and the course of the last incident.

Computed from a view, for the page and for ``top``. It contains no text: a sentence is a key of ``web/strings.json``
with the values to fill in, of which ``role``, ``state`` and ``why`` are translated too.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

View = dict[str, Any]
Sentence = dict[str, Any]

_INCIDENT = frozenset({"frozen", "lost", "restart_wanted", "breaker_opened"})
_RECOVERY = frozenset({"admitted", "breaker_closed"})
_SHOWN = _INCIDENT | _RECOVERY | {"freed", "replayed", "restarted", "probing"}


def verdict(view: View) -> dict[str, Any]:
    """The verdict of a view.

    Args:
        view: with ``health``.

    Returns:
        ``level`` (ok, warn or bad), ``sign`` (name of an icon), ``head`` (a sentence), ``since`` (Unix time since when
        it holds, or None) and ``details`` (sentences).
    """
    instances, health = view["instances"], view["health"]
    pairs = health["pairs"]
    if health["status"] == "stopping":
        return _verdict("warn", "warning", _sentence("head_stopping"))
    details = [_state(i) for i in instances if state_of(i) != "ready" or i["restart_wanted"]]
    if health["status"] == "not_serving":
        why = _sentence("detail_text", text=health["missing"][0])
        return _verdict("bad", "frozen", _sentence("head_not_serving"), [why, *details])
    if frozen := [i for i in instances if i["state"] == "frozen"]:
        return _frozen(view, frozen, pairs)
    if pairs and details:
        only_suspect = {sentence["values"]["state"] for sentence in details} == {"suspect"}
        head = _counted("head_serving_suspect", pairs) if only_suspect else _counted("head_serving_but", pairs)
        return _verdict("warn", "warning", head, details)
    if pairs:
        return _verdict("ok", "ready", _counted("head_serving", pairs))
    if health["status"] == "ok":
        return _verdict("warn", "warning", _sentence("head_alone"), details)
    if busy := next((role for role in ("prefill", "decode") if _all_busy(instances, role)), None):
        return _verdict("warn", "busy", _sentence(f"head_busy_{busy}"), details)
    return _verdict("bad", "lost", _why_no_pair(instances, health), details)


def incident(view: View) -> dict[str, Any] | None:
    """The last incident of an instance, or None.

    Returns:
        ``role``, ``name``, ``steps`` (its events) and ``over_after`` (its duration in seconds, None while it lasts).
    """
    events = view["events"]
    last = next((e for e in reversed(events) if e["kind"] in _INCIDENT), None)
    if last is None:
        return None
    own = [e for e in events if e["instance"] == last["instance"] and e["kind"] in _SHOWN]
    # Troubles without a recovery in between are one incident.
    start = own.index(last)
    while start > 0 and own[start - 1]["kind"] not in _RECOVERY:
        start -= 1
    while own[start]["kind"] not in _INCIDENT:
        start += 1
    course = own[start:]
    end = next((place for place, e in enumerate(course) if e["kind"] in _RECOVERY), None)
    steps = course if end is None else course[: end + 1]
    where = next((i for i in view["instances"] if i["key"] == last["instance"]), None)
    return {
        "role": None if where is None else where["role"],
        "name": last["instance"] if where is None else where["http_address"],
        "steps": steps[-_MAX_STEPS:],
        "over_after": None if end is None else round(steps[-1]["time"] - steps[0]["time"], 3),
    }


_MAX_STEPS = 6

CLIENT_OUTCOMES = ("client_error", "client_left")
"""Outcomes that the client is the cause of; every other one but "ok" is a failure (``CLIENT`` in web/model.js)."""


def state_of(instance: dict[str, Any]) -> str:
    """The state to show for an instance: if it is ready, what keeps requests from it (``stateOf`` in web/model.js)."""
    if instance["state"] != "ready":
        return str(instance["state"])
    if instance["draining"]:
        return "draining"
    if instance["breaker"] == "open":
        return "ejected"
    return "suspect" if instance["suspect"] else "busy" if instance["busy"] else "ready"


def _state(instance: dict[str, Any]) -> Sentence:
    """State and cause of an instance. That of a ready one is not its ``reason``, which says why it became ready."""
    state = state_of(instance)
    about = {"role": instance["role"], "name": instance["http_address"], "state": state}
    if state in KEPT_FROM:
        return _sentence("detail_why", **about, why=state)
    return _sentence("detail_state", **about, reason=instance["reason"])


KEPT_FROM = frozenset({"ejected", "suspect", "busy"})
"""States to show of a ready instance that gets fewer requests, each with its cause in the texts (``why_...``)."""


def serves(instance: dict[str, Any], role: str) -> bool:
    """Whether an instance of /stats or of the view gets legs of this role."""
    return role in instance.get("roles", (instance["role"],))


def _all_busy(instances: list[dict[str, Any]], role: str) -> bool:
    states = [state_of(i) for i in instances if serves(i, role) and i["state"] == "ready" and not i["draining"]]
    return bool(states) and set(states) == {"busy"}


def _frozen(view: View, frozen: list[dict[str, Any]], pairs: int) -> dict[str, Any]:
    details: list[Sentence] = []
    begun = []
    for instance in frozen:
        reason = instance["reason"].rstrip(".")
        details.append(_sentence("detail_frozen", role=instance["role"], name=instance["http_address"], reason=reason))
        since, replays = _since_frozen(view["events"], instance["key"])
        if since is not None:
            begun.append(since)
        details.append(_counted("detail_replayed", replays) if replays else _sentence("detail_replayed_none"))
        details.append(_sentence("detail_restart" if instance["restart_wanted"] else "detail_waiting"))
    details.append(_counted("detail_others", pairs) if pairs else _sentence("detail_others_none"))
    details += [_state(i) for i in view["instances"] if state_of(i) not in ("ready", "frozen")]
    first = frozen[0]
    head = _sentence("head_frozen", role=first["role"], name=first["http_address"])
    if len(frozen) > 1:
        head = _sentence("head_frozen_many", count=len(frozen))
    return _verdict("warn" if pairs else "bad", "frozen", head, details, min(begun, default=None))


def _since_frozen(events: Iterable[dict[str, Any]], key: str) -> tuple[float | None, int]:
    """Unix time since when an instance is stalled (None if unknown), and the prefills replayed for it since then."""
    since, replays = None, 0
    for event in events:
        if event["instance"] != key:
            continue
        if event["kind"] == "frozen":
            since, replays = event["time"], 0
        elif event["kind"] == "replayed":
            replays += event["count"]
    return since, replays


def _why_no_pair(instances: list[dict[str, Any]], health: dict[str, Any]) -> Sentence:
    for role in ("prefill", "decode"):
        known = [i for i in instances if serves(i, role)]
        if not known:
            return _sentence(f"head_none_{role}")
        if not any(i["state"] == "ready" and not i["draining"] for i in known):
            return _sentence(f"head_none_ready_{role}")
        if not health[role]["ready"]:
            return _sentence(f"head_none_able_{role}")
    return _sentence("head_apart")


def _verdict(
    level: str, sign: str, head: Sentence, details: list[Sentence] | None = None, since: float | None = None
) -> dict[str, Any]:
    return {"level": level, "sign": sign, "head": head, "since": since, "details": details or []}


def _sentence(key: str, **values: Any) -> Sentence:
    return {"key": key, "values": values}


def _counted(stem: str, count: int) -> Sentence:
    return _sentence(f"{stem}_{'one' if count == 1 else 'many'}", count=count)
