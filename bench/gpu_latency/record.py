"""What a run leaves behind: every request as JSON lines, phase by phase, so that figures can be made again later."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.gpu_latency.arms import Shot
from bench.gpu_latency.load import Block

RAW = "raw.jsonl"


@dataclass
class Measured:
    """One phase as it ran. ``beside``: what else was read, by name."""

    name: str
    shots: list[Shot]
    blocks: list[Block] = field(default_factory=list)
    beside: dict[str, Any] = field(default_factory=dict)


def append(folder: Path, measured: Measured) -> None:
    """Add one phase to the folder's file. Times of arrival are kept in microseconds from when the request began."""
    begin = min((shot.sent for shot in measured.shots), default=0.0)
    line = {
        "name": measured.name,
        "beside": measured.beside,
        "blocks": [[block.arm, block.begin - begin, block.end - begin] for block in measured.blocks],
        "shots": [
            {
                "arm": shot.arm, "tokens": shot.tokens, "place": shot.place, "sent": shot.sent - begin,
                "prefill": shot.prefill, "error": shot.error,
                "arrivals_us": [round((moment - shot.sent) * 1e6) for moment in shot.arrivals],
            }
            for shot in measured.shots
        ],
    }  # fmt: skip
    with (folder / RAW).open("a", encoding="utf-8") as out:
        out.write(json.dumps(line, separators=(",", ":")) + "\n")


def load(folder: Path) -> list[Measured]:
    """The phases that ``append`` wrote."""
    path = folder / RAW
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [_phase(json.loads(line)) for line in lines]


def _phase(line: dict[str, Any]) -> Measured:
    shots = []
    for one in line["shots"]:
        shot = Shot(one["arm"], one["tokens"], one["place"])
        shot.sent, shot.prefill, shot.error = one["sent"], one["prefill"], one["error"]
        shot.arrivals = [shot.sent + moment / 1e6 for moment in one["arrivals_us"]]
        shots.append(shot)
    return Measured(line["name"], shots, [Block(*block) for block in line["blocks"]], line["beside"])
