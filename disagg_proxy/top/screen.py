"""Renders a view for a terminal, in as many lines as it has.

Names and reasons come from other systems: they are rendered as plain text, never as rich markup, and without control
characters.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from disagg_proxy.page.verdict import CLIENT_OUTCOMES, KEPT_FROM, state_of
from disagg_proxy.top.words import Words, clock, count, duration, joules, plain, size

View = dict[str, Any]

_SIGNS = {
    "ready": "●", "probing": "◐", "frozen": "❄", "lost": "✕", "draining": "‖", "ejected": "⊘", "suspect": "?",
    "busy": "⧗", "warning": "▲",
}  # fmt: skip
"""A symbol for each state, so that colours are not needed."""

_STATE_STYLES = {
    "ready": "green", "probing": "yellow", "frozen": "bold magenta", "lost": "bold red", "draining": "dim",
    "ejected": "bold red", "suspect": "yellow", "busy": "yellow",
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
_WIDE = 110
"""Columns from which every column is shown."""
_WIDEST = 150
"""Columns from which those with the load that engines show are there."""
_MOST_FLOWS = 8


LISTS = {"requests": "recent", "events": "events", "instances": "instances"}
"""Sections that can be shown alone, with all their entries, by the key of these in a view."""

_LEAST_BELOW_HEAD = 12
"""Lines of a terminal that the head leaves to the other sections."""


def screen(
    view: View,
    words: Words,
    height: int | None = None,
    gone: str = "",
    width: int = 160,
    alone: str = "",
    above: int = 0,
) -> RenderableType:
    """The complete screen.

    Args:
        height: lines of the terminal, None for no limit. The lists get what the other sections leave; of causes and
            instances for which there is no line, the number is shown.
        gone: why the connection is lost, empty if it is not; ``view`` is the last one then.
        width: columns of the terminal. Below 110, columns are left out, and addresses are shortened before their port.
        alone: one of :data:`LISTS` to show alone below the verdict, empty for all sections.
        above: entries of that list to skip, the newest first.
    """
    # Above a list alone there is one cause only, so that half a screen, which a page scrolls, shows every entry.
    head = _head(view, words, gone, width, None if height is None else 0 if alone else height - _LEAST_BELOW_HEAD)
    head_lines = _lines(head, width)
    keys = (
        [] if height is None else [Text(words.say("top_keys_list" if alone else "top_keys"), "reverse", no_wrap=True)]
    )
    if alone:
        lines = 1 << 16 if height is None else max(1, height - head_lines - len(keys) - 1)
        return Group(*head, _list(alone, view, words, lines, width, above), *keys)
    count_of = len(view["instances"])
    # A short terminal has the latencies in one line, no flows and no blank lines.
    wanted = 20 + head_lines + count_of + len(view["flows"]) + (5 if view.get("energy") else 0)
    short = height is not None and height < wanted
    parts: list[RenderableType] = [*head]
    gap = [] if short else [Text()]
    parts += [
        *gap,
        _summary(view, words) if short else _latency(view, words, width),
        *gap,
    ]
    energy = [] if short else _energy(view, words, width)
    if energy:
        parts += [*energy, *gap]
    # One for the figures and one for the titles of each list, and at least one entry in the latter two.
    placement = _placement(view, words)
    room = (
        count_of
        if height is None
        else max(1, height - head_lines - len(keys) - (6 if short else 16) - (5 if energy else 0) - len(placement))
    )
    shown, more = _ordered(view, whole=count_of <= room), ""
    if count_of > room:
        shown, more = shown[: room - 1], words.say("top_more", count=count_of - room + 1)
    parts.append(_instances(shown, words, width, more))
    used = (
        head_lines
        + 1
        + (2 if not count_of else min(count_of, room))
        + len(keys)
        + 2
        + (1 if short else 11)
        + (5 if energy else 0)
        + len(placement)
    )
    parts += placement
    if not short:
        parts += [*gap, _flows(view, words, width)]
        used += max(1, min(_MOST_FLOWS, len(view["flows"])))
    lines = 24 if height is None else max(2, height - used)
    for name, some in (("requests", lines // 2), ("events", lines - lines // 2)):
        parts += [*gap, _list(name, view, words, some, width)]
    return Group(*parts, *keys)


def length(view: View, name: str) -> int:
    """Entries of one of :data:`LISTS`."""
    return len(view[LISTS[name]])


def _list(name: str, view: View, words: Words, lines: int, width: int, above: int = 0) -> RenderableType:
    if name == "instances":
        return _instances(_ordered(view)[above : above + lines], words, width)
    entries = view[LISTS[name]]
    shown = entries[max(0, len(entries) - above - lines) : max(0, len(entries) - above)][::-1]
    return _recent(view, shown, words, width) if name == "requests" else _events(view, shown, words, width)


def _text(value: str, style: str = "") -> Text:
    return Text(plain(value), style)


def _lines(texts: Iterable[Text], width: int) -> int:
    """Lines that texts take in a terminal of ``width`` columns."""
    console = Console(width=width)
    return sum(len(text.wrap(console, width)) for text in texts)


def _head(view: View, words: Words, gone: str, width: int, most: int | None) -> list[Text]:
    """What the proxy does, with the causes that fit into ``most`` lines, at least one of them; None for no limit."""
    how = words.say("compiled" if view["compiled"] else "interpreted")
    about = words.say("version", version=view["version"], how=how, uptime=words.age(view["uptime_s"]))
    lines = [Text(f"{words.say('title')} · {about} · {clock(view['now'])}", "dim")]
    if gone:
        lines.append(Text(f"✕ {words.say('head_gone')}", "bold red"))
        return [*lines, _text(f"  {gone}"), Text(f"  {words.say('head_gone_detail', time=clock(view['now']))}")]
    # What an engine is becomes known with its models.
    known = [i["simulated"] for i in view["instances"] if i["models"]]
    if simulated := sum(known):
        some = words.say("simulated_some", count=simulated, all=len(known))
        lines.append(Text(words.say("simulated_all") if simulated == len(known) else some, "bold magenta"))
    verdict = view["verdict"]
    style = _LEVEL_STYLES[verdict["level"]]
    text = words.sentence(verdict["head"])
    if verdict["since"] is not None:
        text += " " + words.say("for_age", age=words.age(view["now"] - verdict["since"]))
    lines.append(_text(f"{_SIGNS[verdict['sign']]} {text}", style))
    details = [_text(f"  {words.sentence(sentence)}") for sentence in verdict["details"]]
    last = [_incident(view["incident"], words)] if view["incident"] else []
    if most is not None and _lines([*lines, *details, *last], width) > most:
        fitting = details
        while len(fitting) > 1 and _lines([*lines, *fitting, *last], width) + 1 > most:
            fitting = fitting[:-1]
        if left := len(details) - len(fitting):
            details = [*fitting, Text(f"  {words.say('top_more', count=left)}")]
    return [*lines, *details, *last]


def _incident(incident: dict[str, Any], words: Words) -> Text:
    role = words.word("role", incident["role"]) if incident["role"] else ""
    after = incident["over_after"]
    end = words.say("incident_open") if after is None else words.say("incident_over", age=duration(1000 * after))
    steps = " → ".join(f"{clock(e['time'])} {words.word('event', e['kind'])}" for e in incident["steps"])
    return _text(f"  {words.say('incident_title', role=role, name=incident['name'])} ({end}): {steps}", "dim")


def _table(*columns: str) -> Table:
    """A table without borders. Columns named ">..." are right-aligned; what does not fit is cut off the last column."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    for place, name in enumerate(columns):
        last = place == len(columns) - 1
        table.add_column(name.lstrip(">"), justify="right" if name.startswith(">") else "left", no_wrap=not last)
    return table


def _steps(view: View) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """The steps that have ended, and the newest of them if something is known of it."""
    steps = [step for step in view["rates"]["steps"] if step["time"] + view["rates"]["step_s"] <= view["now"]]
    return steps, steps[-1] if steps and steps[-1]["requests"] is not None else None


def _per_second(view: View, step: dict[str, Any] | None, name: str) -> float | None:
    """Requests or chunks per second in a step, None where nothing is known of it."""
    if step is None or step["requests"] is None:
        return None
    number: int = sum(step["requests"].values()) if name == "requests" else step["pieces"]
    return number / float(view["rates"]["step_s"])


def _latency(view: View, words: Words, width: int) -> Table:
    marks = 40 if width >= _WIDE else 24
    steps, last = _steps(view)
    totals = view["totals"]
    table = _table("", ">p50", ">p99", "")
    for name, label in (("ttft", "tile_ttft"), ("gap", "tile_gap")):
        found = view["latency"][name]
        line = _line([step[name]["p50"] for step in steps], marks)
        table.add_row(words.say(label), duration(found["p50"]), duration(found["p99"]), line)
    for name, label, digits in (("requests", "tile_requests", 1), ("pieces", "tile_tokens", 0)):
        now, line = _per_second(view, last, name), _line([_per_second(view, step, name) for step in steps], marks)
        table.add_row(words.say(label), "–" if now is None else count(now, digits), "", line)
    queued = words.say("tile_flight_more", queued=count(totals["queued"]))
    table.add_row(
        words.say("tile_flight"), count(totals["in_flight"]), "", _rest(f"{queued}; {_finished(view, words)}")
    )
    return table


def _energy(view: View, words: Words, width: int) -> list[RenderableType]:
    """A line for each role: power, energy per token, and the power of the last minutes. Nothing without GPUs."""
    energy = view.get("energy")
    if not energy:
        return []
    steps, _ = _steps(view)
    table = _table("", ">W", ">", "")
    for role in ("prefill", "decode"):
        found = energy["roles"][role]
        line = _line([(step.get("watts") or {}).get(role) for step in steps], 40 if width >= _WIDE else 24)
        watts = "–" if found["watts"] is None else count(found["watts"])
        table.add_row(words.say(f"energy_{role}"), watts, joules(found["joules_per_token"]), line)
    rate = energy["requests_per_wh"]
    more = f"{words.say('energy_wh')} {'–' if rate is None else count(rate, 1)}"
    if energy["simulated"]:
        more += f" · {words.say('simulated')}"
    return [table, Text(more, "dim", no_wrap=True, overflow="ellipsis")]


def _finished(view: View, words: Words) -> str:
    outcomes = view["totals"]["requests"]
    client = sum(outcomes.get(name, 0) for name in CLIENT_OUTCOMES)
    finished = sum(outcomes.values())
    failed = finished - client - outcomes.get("ok", 0)
    return words.say("tile_requests_more", count=count(finished), failed=count(failed), client=count(client))


def _summary(view: View, words: Words) -> Text:
    """The figures of :func:`_latency` in one line."""
    pace = _per_second(view, _steps(view)[1], "requests")
    ttft, gap = view["latency"]["ttft"], view["latency"]["gap"]
    parts = (
        f"{words.say('tile_flight')} {count(view['totals']['in_flight'])}",
        words.say("per_second", rate="–" if pace is None else count(pace, 1)),
        f"TTFT {duration(ttft['p50'])}, p99 {duration(ttft['p99'])}",
        f"ITL {duration(gap['p50'])}, p99 {duration(gap['p99'])}",
    )
    return Text(" · ".join(parts), no_wrap=True, overflow="ellipsis")


def _line(values: Sequence[float | None], width: int) -> Text:
    """The newest values as a line of bars, scaled to their maximum."""
    values = values[-width:]
    most = max((v for v in values if v is not None), default=0)
    marks = (" " if v is None or not most else _BARS[round(v / most * (len(_BARS) - 1))] for v in values)
    return Text("".join(marks), "cyan", no_wrap=True)


def _ordered(view: View, whole: bool = True) -> list[dict[str, Any]]:
    """Instances by role and address; unless all of them are shown, those that are not ready come first."""
    return sorted(
        view["instances"],
        key=lambda i: (not whole and state_of(i) == "ready", i["role"] != "prefill", i["http_address"]),
    )


def _roles(instance: dict[str, Any], words: Words) -> str:
    return " + ".join(words.word("role", role) for role in instance.get("roles", (instance["role"],)))


def _instances(shown: Sequence[dict[str, Any]], words: Words, width: int, more: str = "") -> Table:
    narrow = width < _WIDE
    columns = ["", ">" + words.say("tile_flight")]
    columns += [] if narrow else [">" + words.say("tokens_in_flight"), ">" + words.say("kv_waiting")]
    loads = width >= _WIDEST and any(i.get("engine_load") for i in shown)
    columns += [">" + words.say(name) for name in ("top_batch", "top_kv_cache", "kv_dropped")] if loads else []
    table = _table(words.say("machine"), *columns, ">" + words.say("served"), ">" + words.say("failed"), "")
    for i in shown:
        state = state_of(i)
        kv = size(i["kv_waiting_bytes"]) if i["kv_waiting_bytes"] else count(i["kv_waiting"])
        why = words.say(f"why_{state}") if state in KEPT_FROM else i["reason"]
        if state == "ready":
            why = ", ".join(i["models"])
        table.add_row(
            _text(f"{_roles(i, words)} {_fitted(i['http_address'], 24 if narrow else 60)}"),
            Text(f"{_SIGNS.get(state, '?')} {words.word('state', state)}", _STATE_STYLES.get(state, "")),
            count(i["in_flight"]), *([] if narrow else [count(i["tokens_in_flight"]), kv]),
            *(_engine_load(i["engine_load"] or {}) if loads else ()), count(i["requests_total"]),
            Text(count(i["failures_total"]), "red" if i["failures_total"] else ""), _rest(why),
        )  # fmt: skip
    if more:
        table.add_row(more)
    elif not shown:
        table.add_row(words.say("none_prefill"))
        table.add_row(words.say("none_decode"))
    return table


def _engine_load(load: Mapping[str, Any]) -> tuple[Text, Text, Text]:
    """Requests that run and wait, share of the KV cache in use and its size, prompts whose KV was dropped."""
    running, waiting, usage, capacity, dropped = (
        load.get(name) for name in ("running", "waiting", "kv_usage", "kv_capacity_tokens", "kv_dropped")
    )
    of = "" if capacity is None else f" / {capacity / 1000:,.0f}k"
    return (
        Text("–" if running is None else f"{count(running)} / {count(waiting or 0)}"),
        Text("–" if usage is None else f"{100 * usage:.0f} %{of}"),
        Text("–" if dropped is None else count(dropped), "red" if dropped else ""),
    )


def _rest(value: str) -> Text:
    """Text of a last column: one line, cut off at the edge of the terminal."""
    text = _text(value, "dim")
    text.no_wrap, text.overflow = True, "ellipsis"
    return text


def _fitted(address: str, width: int) -> str:
    """An address in ``width`` columns: the end of a long host is left out, never the port."""
    if len(address) <= width:
        return address
    host, _, port = address.rpartition(":")
    return f"{host[: max(1, width - len(port) - 2)]}…:{port}"


def _placement(view: View, words: Words) -> list[Text]:
    """Where elastic placement has requests prefilled, in one line; nothing where every request is split."""
    placement = view.get("placement") or {}
    if placement.get("mode") != "elastic":
        return []
    total = sum(placement["requests"].values())
    parts = [
        words.say("placement_share", share=count(100 * found / total), way=words.word("way", way))
        for way, found in placement["requests"].items()
        if found
    ]
    text = words.say("placement", parts=words.say("comma").join(parts), count=count(total))
    text = text if total else words.say("placement_none")
    if placement["state"] != "elastic":
        text += " " + words.word("placement", placement["state"])
    return [Text(plain(text), "bold", no_wrap=True, overflow="ellipsis")]


def _flows(view: View, words: Words, width: int) -> RenderableType:
    if not view["flows"]:
        return Text(words.say("flow_none"), "dim")
    lines = []
    for flow in sorted(view["flows"], key=lambda flow: -flow["total"])[:_MOST_FLOWS]:
        arrow = "═▶" if flow["in_flight"] else "─▷"
        prefill, decode = (
            _fitted(_name(view, flow[role]), 24 if width < _WIDE else 60) for role in ("prefill", "decode")
        )
        load = words.say("flow_label", count=flow["in_flight"]), words.say("flow_total", total=count(flow["total"]))
        lines.append(_text(f"{prefill or _alone(view, words, flow['decode'])} {arrow} {decode}  {', '.join(load)}"))
    return Group(*lines)


def _recent(view: View, shown: Sequence[dict[str, Any]], words: Words, width: int) -> RenderableType:
    if not shown:
        return Text(words.say("requests"), "bold")
    narrow = width < _WIDE
    most = max(r["total_ms"] for r in shown) or 1.0
    bars = [] if narrow else [f"{_legend(words)} 0–{duration(most)}"]
    title = words.say("requests")
    table = _table(words.say("column_time"), *(("", title) if narrow else (title, "")), *bars, ">", "", "")
    for r in shown:
        prefill, decode = (_fitted(_port(view, r[role]), 14 if narrow else 40) for role in ("prefill", "decode"))
        path = f"{prefill or _alone(view, words, r['decode'])} → {decode}" if r["decode"] else "–"
        route = (r["route"] or "").split("/")
        ok, client = r["outcome"] == "ok", r["outcome"] in CLIENT_OUTCOMES
        table.add_row(
            clock(r["time"] + r["total_ms"] / 1000),
            _text(route[2] if len(route) > 2 else "–"),
            _text(path), *([] if narrow else [_bar(r, most)]), duration(r["total_ms"]),
            Text(words.word("outcome", r["outcome"]), "green" if ok else "yellow" if client else "red"),
            _rest(r["cause"] or ""),
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


def _events(view: View, events: Iterable[dict[str, Any]], words: Words, width: int) -> RenderableType:
    lines: list[RenderableType] = [Text(words.say("events"), "bold")]
    for event in events:
        kind = event["kind"]
        line = Text(f"{clock(event['time'])} ", "dim", no_wrap=True, overflow="ellipsis")
        line.append(f"{words.word('event', kind)}", _EVENT_STYLES.get(kind, ""))
        name = _fitted(_name(view, event["instance"]), 24 if width < _WIDE else 60)
        line.append(plain(f" {name} "), "none").append(plain(event["text"]), "dim")
        lines.append(line)
    return Group(*lines)


def _name(view: View, key: str | None) -> str:
    return next((str(i["http_address"]) for i in view["instances"] if i["key"] == key), key or "")


def _alone(view: View, words: Words, key: str) -> str:
    """What takes the place of the prefill where the engine ``key`` serves alone."""
    prefill = any(i["key"] == key and i["role"] == "prefill" for i in view["instances"])
    return words.say("way_prefill_alone" if prefill else "alone")


def _port(view: View, key: str | None) -> str:
    """The short name of an instance: only the port if all instances share a host."""
    name = _name(view, key)
    hosts = {i["http_address"].rpartition(":")[0] for i in view["instances"]}
    host, _, port = name.rpartition(":")
    return f":{port}" if hosts == {host} else name
