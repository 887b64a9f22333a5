"""Roles to GPUs and ports."""

from __future__ import annotations

import pytest

from disagg_machine.layout import layout
from disagg_machine.messages import MachineError
from tests.machine.conftest import MakeContext


def test_one_of_each(make_context: MakeContext) -> None:
    found = layout(make_context().settings)
    assert [(p.name, p.role, p.ports, p.gpus) for p in found.parts] == [
        ("proxy", "proxy", [10001, 30001], ()),
        ("prefill", "prefill", [20003, 21001], ("0",)),
        ("decode", "decode", [20005, 22001], ("1",)),
    ]
    assert "decode" in found and "decode1" not in found and found["decode"] is found.parts[2]
    assert found.tensor_parallel == 1


def test_several_engines_count_up_past_what_is_taken(make_context: MakeContext) -> None:
    found = layout(make_context(PREFILL_GPUS="0,1,2,3", DECODE_GPUS="4,5").settings)
    assert found.names == ["proxy", *(f"prefill{n}" for n in range(1, 5)), "decode1", "decode2"]
    assert [place.http for place in found.prefills] == [20003, 20004, 20006, 20007]
    assert [place.http for place in found.decodes] == [20005, 20008]


def test_every_gpu_takes_a_kv_port(make_context: MakeContext) -> None:
    found = layout(make_context(PREFILL_GPUS="0+1,2+3", DECODE_GPUS="GPU-a+5").settings)
    assert [place.ports for place in found.engines] == [
        [20003, 21001, 21002],
        [20004, 21003, 21004],
        [20005, 22001, 22002],
    ]
    assert found["decode"].gpus == ("GPU-a", "5") and found.tensor_parallel == 2


def test_tensor_parallel_widens_single_gpus(make_context: MakeContext) -> None:
    found = layout(make_context(TENSOR_PARALLEL="2").settings)
    assert [place.gpus for place in found.engines] == [("0", "1"), ("2", "3")]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"DECODE_HTTP_PORT": "20003"}, "port 20003 is given both to prefill HTTP and to decode HTTP"),
        ({"PROXY_PORT": "10001"}, "port 10001 is given both to HTTP_PROXY_PORT and to PROXY_PORT"),
        (
            {"PREFILL_KV_PORT": "22000", "TENSOR_PARALLEL": "2"},
            "port 22001 is given both to prefill KV and to decode KV",
        ),
        ({"PREFILL_HTTP_PORT": "65535", "PREFILL_GPUS": "0,1"}, "no ports left above 65535"),
        ({"PREFILL_GPUS": "0+1", "DECODE_GPUS": "2"}, "decode has another number of GPUs"),
        ({"PREFILL_GPU": "0+1", "TENSOR_PARALLEL": "3"}, '"0+1" does not name TENSOR_PARALLEL=3 GPUs'),
        ({"PREFILL_GPU": "GPU-a", "TENSOR_PARALLEL": "2"}, 'GPU "GPU-a" is no number'),
    ],
)
def test_contradictions_are_named(make_context: MakeContext, changes: dict[str, str], words: str) -> None:
    with pytest.raises(MachineError) as refused:
        layout(make_context(**changes).settings)
    assert refused.value.code == 2 and words in str(refused.value)


def test_engines_that_share_a_gpu(make_context: MakeContext) -> None:
    found = layout(make_context(PREFILL_GPUS="0,0", DECODE_GPUS="1").settings)
    first, second = found.prefills
    assert first.shares_gpu_with(second) and not first.shares_gpu_with(found["decode"])
