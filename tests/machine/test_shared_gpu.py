"""A prefill and a decode engine on one GPU: where they go, and what they take of its memory."""

from __future__ import annotations

from typing import Any

import pytest

from disagg_machine import commands, engines, shared_gpu
from disagg_machine.context import Context
from disagg_machine.engines import Engines, resolve
from disagg_machine.gpus import Gpu
from disagg_machine.layout import layout
from disagg_machine.settings import Settings, write_running
from disagg_machine.vllm_facts import VllmFacts
from tests.machine.conftest import MakeContext

NEW = VllmFacts("0.33.0", randomises=True, switch=True)
OLD = VllmFacts("0.21.0", connector=True, randomises=True, switch=True)
ONE = [Gpu(0, "GPU-0000", "Stub", 80000, 80000)]
TWO = [*ONE, Gpu(1, "GPU-0001", "Stub", 24000, 24000)]


@pytest.fixture
def on(make_context: MakeContext, monkeypatch: pytest.MonkeyPatch) -> Any:
    def resolved(found: list[Gpu], facts: VllmFacts = NEW, **settings: str) -> tuple[Context, Engines]:
        monkeypatch.setattr(engines.gpus, "read_gpus", lambda environ: found)
        monkeypatch.setattr(engines.vllm_facts, "find_vllm", lambda context: facts)
        context = make_context(ENGINE="vllm", **settings)
        return context, resolve(context)

    return resolved


def words_of(settings: Settings, found: Engines) -> dict[str, list[str]]:
    placed = layout(settings)
    return {place.name: list(commands.engine(settings, found, place, "python", "/root", {}).words)
            for place in placed.engines}  # fmt: skip


def after(words: list[str], flag: str) -> str:
    return words[words.index(flag) + 1]


def test_both_engines_get_the_only_gpu_and_a_tenth_of_it_as_cache(on: Any) -> None:
    context, found = on(ONE)
    assert found.own_connector and found.kv_cache_bytes == 8000 << 20
    assert [place.gpus for place in layout(context.settings).engines] == [("0",), ("0",)]
    for words in words_of(context.settings, found).values():
        assert after(words, "--kv-cache-memory-bytes") == str(8000 << 20)
        assert after(words, "--gpu-memory-utilization") == "0.2"


def test_a_vllm_that_has_a_connector_of_its_own_uses_this_project_s(on: Any) -> None:
    assert on(ONE, OLD)[1].own_connector
    assert not on(TWO, OLD)[1].own_connector


def test_two_gpus_are_used_as_before(on: Any) -> None:
    context, found = on(TWO)
    assert found.kv_cache_bytes == 0
    assert [place.gpus for place in layout(context.settings).engines] == [("0",), ("1",)]
    assert all("--kv-cache-memory-bytes" not in words for words in words_of(context.settings, found).values())


def test_one_of_two_gpus_is_shared_where_the_settings_say_so(on: Any) -> None:
    _, found = on(TWO, PREFILL_GPU="1", DECODE_GPU="1", ALLOW_SHARED_GPU="1")
    assert found.kv_cache_bytes == 2400 << 20
    _, found = on(TWO, PREFILL_GPU="1", DECODE_GPU="1")
    assert found.kv_cache_bytes == 0, "check_gpus refuses it"


def test_what_the_user_sets_wins(on: Any) -> None:
    context, found = on(ONE, DECODE_GPU_MEMORY_UTILIZATION="0.4", EXTRA_DECODE_ARGS="--kv-cache-memory-bytes 20G")
    words = words_of(context.settings, found)
    assert after(words["prefill"], "--gpu-memory-utilization") == "0.2"
    assert after(words["decode"], "--gpu-memory-utilization") == "0.4"
    assert words["decode"][-2:] == ["--kv-cache-memory-bytes", "20G"], "vLLM takes the last one"


@pytest.mark.parametrize(("total", "per_token", "mib"), [(80000, 0, 8000), (16000, 147456, 2812), (0, 0, 4096)])
def test_the_cache_holds_two_prompts_of_the_maximum_length(
    make_context: MakeContext, total: int, per_token: int, mib: int
) -> None:
    found = [Gpu(0, "GPU-0000", "Stub", total, total)]
    settings = shared_gpu.on_one_gpu(make_context(MAX_MODEL_LEN="10000").settings, found)
    assert shared_gpu.kv_cache_bytes(settings, layout(settings), found, per_token) >> 20 == mib


def test_a_supervisor_that_reads_the_settings_again_starts_the_same_engines(
    on: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    context, found = on(ONE)
    context.run_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_running(context.settings)
    monkeypatch.setattr("disagg_machine.parts.anything_alive", lambda run_dir: True)
    again, same = on(ONE)
    assert again.settings.sources["DECODE_GPU"] == "running"
    assert words_of(again.settings, same) == words_of(context.settings, found)
