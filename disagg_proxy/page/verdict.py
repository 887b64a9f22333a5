"""Is it working? One sentence, what was done about what is not, and the story of the last incident.

Made from a view, for the page and for ``top`` alike. Nothing here is a text: a sentence is the key of one in
``web/strings.json`` with what is to be filled in, where ``role`` and ``state`` are words that have texts of their own.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

View = dict[str, Any]
Sentence = dict[str, Any]

_TROUBLE = frozenset({"frozen", "lost", "restart_wanted", "breaker_opened"})
_OVER = frozenset({"admitted", "breaker_closed"})
_STORY = _TROUBLE | _OVER | {"freed", "replayed", "restarted", "probing"}


def verdict(view: View) -> dict[str, Any]:
    """``level`` (ok, warn or bad), ``sign`` (a shape), ``head`` (a sentence), ``since`` (Unix time of what it says, or
    None) and ``details`` (sentences).

    Args:
        view: with ``health``.
    """
    instances, health = view["instances"], view["health"]
    pairs = health["pairs"]
    if health["status"] == "stopping":
        return _said("warn", "warning", _say("head_stopping"))
    if frozen := [i for i in instances if i["state"] == "frozen"]:
        return _frozen(view, frozen, pairs)
    off = [i for i in instances if state_of(i) != "ready" or i["restart_wanted"]]
    details = [
        _say("detail_state", role=i["role"], name=i["http_address"], state=state_of(i), reason=i["reason"]) for i in off
    ]
    if pairs and off:
        return _said("warn", "warning", _counted("head_serving_but", pairs), details)
    if pairs:
        return _said("ok", "ready", _counted("head_serving", pairs))
    if health["status"] == "ok":
        return _said("warn", "warning", _say("head_alone"), details)
    return _said("bad", "lost", _why_no_pair(instances), details)


def incident(view: View) -> dict[str, Any] | None:
    """The newest trouble of an instance, from its beginning to its end: ``role``, ``name``, ``steps`` (events) and
    ``over_after`` in seconds (None while it is not over). None when there was none."""
    events = view["events"]
    last = next((e for e in reversed(events) if e["kind"] in _TROUBLE), None)
    if last is None:
        return None
    own = [e for e in events if e["instance"] == last["instance"] and e["kind"] in _STORY]
    # Troubles that follow each other without an end between them are one.
    start = own.index(last)
    while start > 0 and own[start - 1]["kind"] not in _OVER:
        start -= 1
    while own[start]["kind"] not in _TROUBLE:
        start += 1
    story = own[start:]
    end = next((place for place, e in enumerate(story) if e["kind"] in _OVER), None)
    steps = story if end is None else story[: end + 1]
    where = next((i for i in view["instances"] if i["key"] == last["instance"]), None)
    return {
        "role": None if where is None else where["role"],
        "name": last["instance"] if where is None else where["http_address"],
        "steps": steps[-_MOST_STEPS:],
        "over_after": None if end is None else round(steps[-1]["time"] - steps[0]["time"], 3),
    }


_MOST_STEPS = 6


def state_of(instance: dict[str, Any]) -> str:
    """The one word for an instance: an operator's drain hides everything but trouble."""
    return "draining" if instance["draining"] and instance["state"] == "ready" else str(instance["state"])


def _frozen(view: View, frozen: list[dict[str, Any]], pairs: int) -> dict[str, Any]:
    details: list[Sentence] = []
    begun = []
    for instance in frozen:
        reason = instance["reason"].rstrip(".")
        details.append(_say("detail_frozen", role=instance["role"], name=instance["http_address"], reason=reason))
        since, replays = _since_frozen(view["events"], instance["key"])
        if since is not None:
            begun.append(since)
        details.append(_counted("detail_replayed", replays) if replays else _say("detail_replayed_none"))
        details.append(_say("detail_restart" if instance["restart_wanted"] else "detail_waiting"))
    details.append(_counted("detail_others", pairs) if pairs else _say("detail_others_none"))
    first = frozen[0]
    head = _say("head_frozen", role=first["role"], name=first["http_address"])
    if len(frozen) > 1:
        head = _say("head_frozen_many", count=len(frozen))
    return _said("warn" if pairs else "bad", "frozen", head, details, min(begun, default=None))


def _since_frozen(events: Iterable[dict[str, Any]], key: str) -> tuple[float | None, int]:
    """When an instance froze, and how many prefills were replayed for it since then."""
    since, replays = None, 0
    for event in events:
        if event["instance"] != key:
            continue
        if event["kind"] == "frozen":
            since, replays = event["time"], 0
        elif event["kind"] == "replayed":
            replays += event["count"]
    return since, replays


def _why_no_pair(instances: list[dict[str, Any]]) -> Sentence:
    for role in ("prefill", "decode"):
        states = [state_of(i) for i in instances if i["role"] == role]
        if not states:
            return _say(f"head_none_{role}")
        if "ready" not in states:
            return _say(f"head_none_ready_{role}")
    return _say("head_apart")


def _said(
    level: str, sign: str, head: Sentence, details: list[Sentence] | None = None, since: float | None = None
) -> dict[str, Any]:
    return {"level": level, "sign": sign, "head": head, "since": since, "details": details or []}


def _say(key: str, **values: Any) -> Sentence:
    return {"key": key, "values": values}


def _counted(stem: str, count: int) -> Sentence:
    return _say(f"{stem}_{'one' if count == 1 else 'many'}", count=count)
