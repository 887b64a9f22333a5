"""The table of model families in docs/connector.md, from docs/kv-families.json: what the tests of real engines ran.

``tests/kv_real`` writes the record where KV_RECORD names it (``make families``), ``make tables`` the page.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from tools.settings_tables import ROOT

RECORD, PAGE = ROOT / "docs/kv-families.json", ROOT / "docs/connector.md"


@dataclass(frozen=True)
class Run:
    """The tests of one file on one family.

    Attributes:
        mechanism: what its KV cache consists of. where: device and transport.
        tests: path of the file. date: of the run, YYYY-MM-DD.
    """

    family: str
    mechanism: str
    vllm: str
    where: str
    tests: str
    passed: int
    failed: int
    date: str

    @property
    def key(self) -> tuple[str, ...]:
        """What a later run replaces."""
        return self.mechanism, self.family, self.vllm, self.where, self.tests


def load(path: Path = RECORD) -> list[Run]:
    """The recorded runs."""
    return [Run(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))] if path.exists() else []


def save(runs: Iterable[Run], path: Path = RECORD) -> None:
    """Add ``runs`` to the record; each replaces an earlier one of the same tests on the same family and version."""
    found = {run.key: run for run in (*load(path), *runs)}
    lines = ",\n".join(json.dumps(asdict(found[key])) for key in sorted(found))
    path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def table(runs: Iterable[Run]) -> str:
    """The rows in Markdown."""
    rows = ["| mechanism | family | vLLM | result | tests | date |", "|---|---|---|---|---|---|"]
    for run in sorted(runs, key=lambda run: run.key):
        total = run.passed + run.failed
        result = "works" if not run.failed else f"**{run.failed} of {total} tests fail**"
        ran = f"{total} tests of `{run.tests}`"
        rows.append(f"| {run.mechanism} | {run.family} | {run.vllm}, {run.where} | {result} | {ran} | {run.date} |")
    return "\n".join(rows if len(rows) > 2 else [*rows, "| – | – | – | no run is recorded yet | – | – |"])


def filled() -> str:
    """docs/connector.md with the table as it should be.

    Raises:
        ValueError: the page does not have exactly one place for it.
    """
    block = f"<!-- model families -->\n{table(load())}\n<!-- end -->"
    text = PAGE.read_text(encoding="utf-8")
    text, found = re.subn(r"<!-- model families -->\n.*?<!-- end -->", lambda _: block, text, flags=re.S)
    if found != 1:
        raise ValueError(f"{PAGE.name} must have one 'model families' block, it has {found}")
    return text
