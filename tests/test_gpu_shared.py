"""The benchmark on one GPU: stages of TTFT from traces, and its commands. ``--engines sim`` rehearses its flow."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.gpu_shared.engines import Engine, Options
from bench.gpu_shared.stages import STAGES, durations, medians, moments, read_events

EVENTS = [
    {"time": 99.0, "event": "received", "role": "decode"},
    {"time": 100.002, "event": "want", "role": "decode"},
    {"time": 100.003, "event": "open", "role": "prefill"},
    {"time": 100.010, "event": "go", "role": "prefill"},
    {"time": 100.011, "event": "receive", "role": "decode"},
    {"time": 100.012, "event": "received", "role": "decode"},
    {"time": 100.020, "event": "go", "role": "prefill"},
    {"time": 100.0205, "event": "receive", "role": "decode"},
    {"time": 100.0235, "event": "received", "role": "decode"},
    {"time": 100.0215, "event": "step", "role": "decode"},
    {"time": 100.0240, "event": "loaded", "role": "decode"},
    {"time": 100.0245, "event": "step", "role": "prefill"},
    {"time": 100.0250, "event": "step", "role": "decode"},
    {"time": 100.0260, "event": "step", "role": "decode"},
]


def test_stages_of_one_request_come_from_the_events_of_its_time() -> None:
    """The last GO counts, and decode's first step after the load."""
    found = durations(moments(EVENTS, 100.0, 100.030))
    assert found == pytest.approx({STAGES[0][0]: 2, STAGES[1][0]: 3, STAGES[2][0]: 17, STAGES[3][0]: 0.5,
                                   STAGES[4][0]: 3, STAGES[5][0]: 0.5, STAGES[6][0]: 1, STAGES[7][0]: 5})  # fmt: skip
    along = [name for name, begin, _ in STAGES if name != STAGES[0][0]]
    assert sum(found[name] for name in along) == pytest.approx(30), "the second stage runs beside the first"


def test_a_request_without_a_transfer_has_no_stages() -> None:
    assert durations(moments([], 5.0, 6.0)) == {}
    assert medians([{}, {STAGES[4][0]: 1.0}, {STAGES[4][0]: 3.0}]) == {STAGES[4][0]: 2.0}


def test_a_trace_whose_last_line_is_cut_off(tmp_path: Path) -> None:
    trace = tmp_path / "a.trace"
    assert read_events(trace) == []
    trace.write_text('{"time": 1, "event": "go"}\n{"time": 2, "ev')
    assert read_events(trace) == [{"time": 1, "event": "go"}]


def test_commands_leave_memory_to_the_other_engines(tmp_path: Path) -> None:
    options = Options("/model", tmp_path)
    decode = Engine("decode", "decode", "0", options, transport="ipc", proxy=30001)
    command = decode.process.command
    assert command[command.index("--kv-cache-memory-bytes") + 1] == "10G"
    assert command[command.index("--gpu-memory-utilization") + 1] == "0.2"
    config = json.loads(command[command.index("--kv-transfer-config") + 1])
    assert config["kv_connector_extra_config"]["transport"] == "ipc"
    assert decode.process.environment["CUDA_VISIBLE_DEVICES"] == "0"
    assert "--kv-transfer-config" not in Engine("plain", "plain", "0", options).process.command
