"""vLLM's engines or simulated ones, and the GPUs that they are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from disagg_machine import engines
from disagg_machine.engines import Engines, check_gpus, connector_shown, resolve
from disagg_machine.gpus import Gpu
from disagg_machine.layout import layout
from disagg_machine.messages import text
from disagg_machine.vllm_facts import VllmFacts
from tests.machine.bench_parts import refused
from tests.machine.conftest import MakeContext

OLD = VllmFacts("0.21.0", connector=True, randomises=True, switch=True)
NEW = VllmFacts("0.33.0", randomises=True, switch=True)
NINE = VllmFacts("0.9.2", connector=True)
BROKEN = VllmFacts("0.14.0", connector=True, randomises=True)

Choose = Callable[..., Engines]


def gpus(count: int) -> list[Gpu]:
    return [Gpu(index, f"GPU-{index:04d}", "Stub", 80000, 80000) for index in range(count)]


@pytest.fixture
def choose(make_context: MakeContext, monkeypatch: pytest.MonkeyPatch) -> Choose:
    def resolved(engine: str, count: int | None, found: VllmFacts | None, **settings: str) -> Engines:
        """``count``: GPUs of the machine, None when nobody may look for them."""

        def look(environ: Any) -> list[Gpu]:
            assert count is not None, "not needed"
            return gpus(count)

        monkeypatch.setattr(engines.gpus, "read_gpus", look)
        monkeypatch.setattr(engines.vllm_facts, "find_vllm", lambda context: found)
        return resolve(make_context(ENGINE=engine, **settings))

    return resolved


def test_simulated_where_something_is_missing_and_nobody_insists(choose: Choose) -> None:
    for found, why in (
        (choose("sim", None, NEW), "ENGINE=sim"),
        (choose("auto", 0, NEW), "0 GPU(s) found; two are needed, or one and vLLM 0.21 or newer"),
        (choose("auto", 1, NEW, ALLOW_SHARED_GPU="0"), "1 GPU(s) found; two are needed, or one and vLLM 0.21 or newer"),
        (choose("auto", 1, NINE), "1 GPU(s) found; two are needed, or one and vLLM 0.21 or newer"),
        (choose("auto", 1, NEW, TENSOR_PARALLEL="2"), "1 GPU(s) found; two are needed, or one and vLLM 0.21 or newer"),
        (choose("auto", 1, None), "no vLLM found"),
        (choose("auto", 2, None), "no vLLM found"),
    ):
        assert found == Engines("sim", why) and found.simulated and not found.own_connector


@pytest.mark.parametrize(
    ("engine", "count", "found", "settings", "key"),
    [
        ("vllm", 1, NEW, {"ALLOW_SHARED_GPU": "0"}, "too_few_gpus"),
        ("vllm", 1, NINE, {}, "too_few_gpus"),
        ("vllm", 1, OLD, {"KV_CONNECTOR": "p2p_nccl"}, "too_few_gpus"),
        ("vllm", 1, None, {}, "no_vllm"),
        ("vllm", 0, NEW, {"ALLOW_SHARED_GPU": "1"}, "too_few_gpus"),
        ("vllm", 2, None, {}, "no_vllm"),
        ("auto", 2, BROKEN, {}, "vllm_random_ids"),
        ("vllm", 2, NEW, {"KV_CONNECTOR": "p2p_nccl"}, "vllm_no_connector"),
    ],
)
def test_errors_for_those_who_came_for_vllm(
    choose: Choose, engine: str, count: int, found: VllmFacts | None, settings: dict[str, str], key: str
) -> None:
    with refused(key):
        choose(engine, count, found, **settings)


def test_vllm(choose: Choose) -> None:
    assert choose("auto", 2, NEW) == Engines("vllm", vllm=NEW, connector="own")
    assert choose("auto", 2, OLD) == Engines("vllm", vllm=OLD, connector="p2p_nccl")
    assert choose("auto", 2, OLD, KV_CONNECTOR="own").own_connector


def test_the_connector_for_people() -> None:
    assert connector_shown("p2p_nccl") == "P2pNcclConnector" and connector_shown("own") == text("connector_own")


@pytest.mark.parametrize(
    ("settings", "key", "arguments"),
    [
        ({"DECODE_GPU": "5"}, "no_such_gpu", ("5", "decode", "0 1 2 3")),
        ({"DECODE_GPU": "0"}, "gpu_shared", (0,)),
        ({"PREFILL_GPU": "GPU-0001", "DECODE_GPU": "1"}, "gpu_shared", (1,)),
    ],
)
def test_gpus_that_are_refused(
    make_context: MakeContext, settings: dict[str, str], key: str, arguments: tuple[object, ...]
) -> None:
    one = make_context(**settings).settings
    with refused(key, *arguments):
        check_gpus(one, Engines("vllm", vllm=NEW), layout(one), gpus(4))
    check_gpus(one, Engines("sim"), layout(one), [])


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({"PREFILL_GPUS": "0,0", "DECODE_GPUS": "1"}, 2),
        ({"DECODE_GPU": "0", "ALLOW_SHARED_GPU": "1"}, 2),
        ({"DECODE_GPU": "0"}, 1),
    ],
)
def test_gpus_that_engines_may_share(make_context: MakeContext, settings: dict[str, str], count: int) -> None:
    one = make_context(**settings).settings
    check_gpus(one, Engines("vllm", vllm=NEW), layout(one), gpus(count))


def test_a_model_whose_kv_cannot_be_moved_is_refused_before_its_weights_are_loaded(
    choose: Choose, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "jamba"}')
    reason = "a model of type jamba keeps a recurrent state that cannot be moved (only Mamba-2's can)"
    with refused("model_unsupported", str(tmp_path), reason):
        choose("vllm", 2, NEW, MODEL=str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert choose("vllm", 2, NEW, MODEL=str(tmp_path)).own_connector
