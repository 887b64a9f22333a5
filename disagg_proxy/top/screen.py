"""Renders a view for a terminal, in as many lines as it has.

Names and reasons come from other systems: they are rendered as plain text, never as rich markup, and without control
characters.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from disagg_proxy.page.verdict import state_of
from disagg_proxy.top.words import Words, clock, count, duration, plain, size

View = dict[str, Any]

_SIGNS = {"ready": "●", "probing": "◐", "frozen": "❄", "lost": "✕", "draining": "‖", "warning": "▲"}
"""A symbol for each state, so that colours are not needed."""

_STATE_STYLES = {
    "ready": "green", "probing": "yellow", "frozen": "bold magenta", "lost": "bold red", "draining": "dim",
}  # fmt: skip
_LEVEL_STYLES = {"ok": "bold green", "warn": "bold yellow", "bad": "bold red"}
_EVENT_STYLES = {
    "admitted": "green", "freed": "green", "undrained": "green", "breaker_closed": "green", "frozen": "magenta",
    "replayed": "magenta", "lost": "red", "restart_wanted": "red", "restarted": "red", "probing": "yellow",
    "breaker_opened": "yellow", "pair_refused": "yellow", "drain_failed": "yellow",
}  # fmt: skip
_SEGMENTS = (("queue", "░", "dim"), ("prefill", "▓", "blue"), ("transfer", "▒", "magenta"), ("decode", "█", "yellow"))
_BARS = " ▁▂▃▄▅▆▇█"
_BAR = 24


def screen(view: View, words: Words, height: int | None = None, gone: str = "") -> RenderableType:
    """The complete screen.

    Args:
        height: lines of the terminal; recent requests and events share what the rest leaves. None for no limit.
        gone: why the connection is lost, empty if it is not; ``view`` is the last one then.
    """
    head = _head(view, words, gone)
    parts = [*head, Text(), _latency(view, words), Text(), _instances(view, words), Text(), _flows(view, words)]
    used = 12 + len(head) + len(view["instances"]) + max(1, len(view["flows"]))
    lines = 24 if height is None else max(4, height - used - 6)
    recent, events = view["recent"][-(lines // 2) :], view["events"][-(lines - lines // 2) :]
    parts += [Text(), _recent(view, recent, words), Text(), _events(view, events, words)]
    return Group(*parts)


def _text(value: str, style: str = "") -> Text:
    return Text(plain(value), style)


def _head(view: View, words: Words, gone: str) -> list[RenderableType]:
    about = words.say("version", version=view["version"], uptime=words.age(view["uptime_s"]))
    lines: list[RenderableType] = [Text(f"{words.say('title')} · {about} · {clock(view['now'])}", "dim")]
    if gone:
        lines.append(Text(f"✕ {words.say('head_gone')}", "bold red"))
        return [*lines, _text(f"  {gone}"), Text(f"  {words.say('head_gone_detail', time=clock(view['now']))}")]
    verdict = view["verdict"]
    style = _LEVEL_STYLES[verdict["level"]]
    text = words.sentence(verdict["head"])
    if verdict["since"] is not None:
        text += " " + words.say("for_age", age=words.age(view["now"] - verdict["since"]))
    lines.append(_text(f"{_SIGNS[verdict['sign']]} {text}", style))
    lines += [_text(f"  {words.sentence(sentence)}") for sentence in verdict["details"]]
    if incident := view["incident"]:
        lines.append(_incident(incident, words))
    return lines


def _incident(incident: dict[str, Any], words: Words) -> Text:
    role = words.word("role", incident["role"]) if incident["role"] else ""
    after = incident["over_after"]
    end = words.say("incident_open") if after is None else words.say("incident_over", age=duration(1000 * after))
    steps = " → ".join(f"{clock(e['time'])} {words.word('event', e['kind'])}" for e in incident["steps"])
    return _text(f"  {words.say('incident_title', role=role, name=incident['name'])} ({end}): {steps}", "dim")


def _table(*columns: str) -> Table:
    """A table without borders. Columns named ">..." are right-aligned; only the last column wraps."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    for place, name in enumerate(columns):
        last = place == len(columns) - 1
        table.add_column(name.lstrip(">"), justify="right" if name.startswith(">") else "left", no_wrap=not last)
    return table


def _latency(view: View, words: Words) -> Table:
    steps, step_s = view["rates"]["steps"], view["rates"]["step_s"]
    finished = [step for step in steps if step["time"] + step_s <= view["now"]]
    last = finished[-1] if finished else None
    totals = view["totals"]
    table = _table("", ">p50", ">p99", "")
    for name, label in (("ttft", "tile_ttft"), ("gap", "tile_gap")):
        found = view["latency"][name]
        line = _line([step[name]["p50"] for step in finished])
        table.add_row(words.say(label), duration(found["p50"]), duration(found["p99"]), line)
    requests = [sum(step["requests"].values()) / step_s for step in finished]
    now = "–" if last is None else count(requests[-1], 1)
    table.add_row(words.say("tile_requests"), now, "", _line(requests))
    now = "–" if last is None else count(last["pieces"] / step_s)
    table.add_row(words.say("tile_tokens"), now, "", _line([step["pieces"] / step_s for step in finished]))
    queued = words.say("tile_flight_more", queued=count(totals["queued"]))
    table.add_row(words.say("tile_flight"), count(totals["in_flight"]), "", Text(queued))
    return table


def _line(values: Sequence[float | None], width: int = 40) -> Text:
    """The newest values as a line of bars, scaled to their maximum."""
    values = values[-width:]
    most = max((v for v in values if v is not None), default=0)
    marks = (" " if v is None or not most else _BARS[round(v / most * (len(_BARS) - 1))] for v in values)
    return Text("".join(marks), "cyan")


def _instances(view: View, words: Words) -> Table:
    table = _table(
        words.say("machine"), "", ">" + words.say("in_flight"), ">" + words.say("tokens_in_flight"),
        ">" + words.say("kv_waiting"), ">" + words.say("served"), ">" + words.say("failed"), "",
    )  # fmt: skip
    order = {"prefill": 0, "decode": 1}
    for i in sorted(view["instances"], key=lambda i: (order[i["role"]], i["http_address"])):
        state = state_of(i)
        kv = size(i["kv_waiting_bytes"]) if i["kv_waiting_bytes"] else count(i["kv_waiting"])
        why = ", ".join(i["models"]) if state == "ready" else i["reason"]
        table.add_row(
            _text(f"{words.word('role', i['role'])} {i['http_address']}"),
            Text(f"{_SIGNS.get(state, '?')} {words.word('state', state)}", _STATE_STYLES.get(state, "")),
            count(i["in_flight"]), count(i["tokens_in_flight"]), kv, count(i["requests_total"]),
            Text(count(i["failures_total"]), "red" if i["failures_total"] else ""), _text(why, "dim"),
        )  # fmt: skip
    if not view["instances"]:
        table.add_row(words.say("none_prefill"))
        table.add_row(words.say("none_decode"))
    return table


def _flows(view: View, words: Words) -> RenderableType:
    if not view["flows"]:
        return Text(words.say("flow_none"), "dim")
    lines = []
    for flow in sorted(view["flows"], key=lambda flow: -flow["total"])[:8]:
        arrow = "═▶" if flow["in_flight"] else "─▷"
        where = f"{_name(view, flow['prefill']) or words.say('alone')} {arrow} {_name(view, flow['decode'])}"
        load = words.say("flow_label", count=flow["in_flight"]), words.say("flow_total", total=count(flow["total"]))
        lines.append(_text(f"{where}  {', '.join(load)}"))
    return Group(*lines)


def _recent(view: View, records: Iterable[dict[str, Any]], words: Words) -> RenderableType:
    shown = list(records)[::-1]
    if not shown:
        return Text(words.say("requests"), "bold")
    most = max(r["total_ms"] for r in shown) or 1.0
    table = _table(words.say("requests"), "", "", _legend(words), ">", "")
    for r in shown:
        path = f"{_port(view, r['prefill']) or words.say('alone')} → {_port(view, r['decode'])}" if r["decode"] else "–"
        route = (r["route"] or "").split("/")
        good = r["outcome"] == "ok"
        table.add_row(
            clock(r["time"] + r["total_ms"] / 1000),
            _text(route[2] if len(route) > 2 else "–"),
            _text(path), _bar(r, most), duration(r["total_ms"]),
            Text(words.word("outcome", r["outcome"]), "green" if good else "yellow"),
        )  # fmt: skip
    return table


def _legend(words: Words) -> str:
    return " ".join(f"{mark} {words.word('seg', name)}" for name, mark, _ in _SEGMENTS)


def _bar(record: dict[str, Any], most: float) -> Text:
    cells: list[tuple[str, str]] = [(" ", "")] * _BAR
    for name, mark, style in _SEGMENTS:
        if name in record["bars"]:
            start, end = (ms / most * _BAR for ms in record["bars"][name])
            for cell in range(min(_BAR - 1, int(start)), min(_BAR, max(int(start) + 1, round(end)))):
                cells[cell] = (mark, style)
    return Text.assemble(*cells)


def _events(view: View, events: Iterable[dict[str, Any]], words: Words) -> RenderableType:
    lines: list[RenderableType] = [Text(words.say("events"), "bold")]
    for event in reversed(list(events)):
        kind = event["kind"]
        line = Text(f"{clock(event['time'])} ", "dim", no_wrap=True, overflow="ellipsis")
        line.append(f"{words.word('event', kind)}", _EVENT_STYLES.get(kind, ""))
        line.append(plain(f" {_name(view, event['instance'])} "), "none").append(plain(event["text"]), "dim")
        lines.append(line)
    return Group(*lines)


def _name(view: View, key: str | None) -> str:
    return next((str(i["http_address"]) for i in view["instances"] if i["key"] == key), key or "")


def _port(view: View, key: str | None) -> str:
    """The short name of an instance: only the port if all instances share a host."""
    name = _name(view, key)
    hosts = {i["http_address"].rpartition(":")[0] for i in view["instances"]}
    host, _, port = name.rpartition(":")
    return f":{port}" if hosts == {host} else name
