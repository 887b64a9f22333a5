"""The metrics of a scrape, and those that docs, dashboard and alert rules name."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

from prometheus_client.core import Metric

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/monitoring.md"
RULES = ROOT / "deploy/prometheus"
DASHBOARD = ROOT / "deploy/grafana/disagg-proxy.json"

_NAME = re.compile(r"\b(?:disagg_proxy|process)_\w+")


def described(families: Iterable[Metric]) -> dict[str, tuple[str, frozenset[str]]]:
    """Type and labels by name; a counter's name ends in _total."""
    found = {}
    for family in families:
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        name = family.name + ("_total" if family.type == "counter" else "")
        found[name] = (family.type, frozenset(labels))
    return found


def listed() -> dict[str, tuple[str, frozenset[str]]]:
    """The same from the tables of docs/monitoring.md."""
    found = {}
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("| `disagg_proxy_") or line.startswith("| `process_") or line.startswith("| `python_"):
            name, kind, labels, _ = (cell.strip() for cell in line.strip("|").split("|"))
            found[name.strip("`")] = (kind, frozenset(re.findall(r"`(\w+)`", labels)))
    return found


def named_in(text: str) -> set[str]:
    """Metrics that an expression names, without the suffixes of a histogram's series."""
    return {re.sub(r"_(?:bucket|sum|count)$", "", name) for name in _NAME.findall(text)}


def expressions() -> dict[str, str]:
    """Every expression of the dashboard and the rules, by panel or alert."""
    found = {}
    for panel in json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]:
        for target in panel.get("targets", ()):
            found[f"{panel['title']} {target['refId']}"] = target["expr"]
    rules = (RULES / "alerts.yml").read_text(encoding="utf-8")
    return found | dict(re.findall(r"- alert: (\w+)\n((?:(?!- alert).*\n?)+)", rules))
