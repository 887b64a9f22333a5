"""The step model, and engine profiles as files."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from disagg_sim.step_model import H200, EngineProfile, ProfileError, load_profile

PROFILE = EngineProfile(
    name="test", source="made up",
    step_seconds=4.0, connector_step_seconds=0.5, mixed_step_seconds=0.0, prefill_token_seconds=0.01,
    prefill_context_tokens=1000, sequence_seconds=0.1, context_token_seconds=0.001, load_seconds=3.0,
    hand_over_seconds=1.0, hand_over_tokens_per_second=100.0, request_seconds=2.0,
    delivery_seconds=0.0, kv_cache_tokens=50_000,
)  # fmt: skip


def test_a_step_is_the_sum_of_what_it_computes() -> None:
    assert PROFILE.step([], 10, 2000) == pytest.approx(4 + 10 * 0.1 + 2000 * 0.001)
    assert PROFILE.step([], 10, 2000, 2, connector=True) == pytest.approx(4.5 + 1 + 2 + 2 * 3)
    # 200 tokens behind 400: on average 500 are in front of a token, half of what doubles its cost.
    assert PROFILE.step([(200, 400)], 0, 0) == pytest.approx(4 + 200 * 0.01 * 1.5)
    assert PROFILE.step([(200, 400), (100, 0)], 1, 10) == pytest.approx(4 + 3 + 100 * 0.01 * 1.05 + 0.1 + 0.01)
    assert replace(PROFILE, prefill_context_tokens=0).prefill_seconds([(200, 400)]) == pytest.approx(2)
    assert PROFILE.hand_over(200) == pytest.approx(3)


def test_a_profile_is_read_as_it_was_written(tmp_path: Path) -> None:
    file = tmp_path / "profile.json"
    file.write_text(PROFILE.to_json(), encoding="utf-8")
    assert load_profile(str(file)) == PROFILE


def test_the_installed_profile_computes_prompts_as_measured() -> None:
    profile = load_profile(H200)
    step = profile.step([(2000, 0)] * 4 + [(192, 0)], 0, 0)
    assert 8192 / step == pytest.approx(67_000, rel=0.05)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step_seconds": -1}, "step_seconds must be at least 0, not -1"),
        ({"step_seconds": 0}, "step_seconds must be above 0"),
        ({"kv_cache_tokens": 0}, "kv_cache_tokens must be at least 1, not 0"),
        ({"kv_cache_tokens": 1.5}, "kv_cache_tokens must be a number, not 1.5"),
        ({"load_seconds": "fast"}, "load_seconds must be a number, not 'fast'"),
        ({"name": 3}, "name must be a text, not 3"),
        ({"colour": "red"}, "unknown field colour"),
        ({"load_seconds": None}, "load_seconds must be a number, not None"),
    ],
)
def test_a_wrong_profile_names_the_field(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    file = tmp_path / "profile.json"
    file.write_text(json.dumps({**asdict(PROFILE), **change}), encoding="utf-8")
    with pytest.raises(ProfileError) as raised:
        load_profile(str(file))
    assert str(raised.value) == f"{file}: {message}"


def test_a_profile_that_cannot_be_read_says_why(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=r"no such file, and no installed profile \(there are: h200-4b\)"):
        load_profile("h100")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ProfileError, match=r"list\.json: not a JSON object"):
        load_profile(str(tmp_path / "list.json"))
    (tmp_path / "no.json").write_text("{")
    with pytest.raises(ProfileError, match=r"no\.json: Expecting property name"):
        load_profile(str(tmp_path / "no.json"))
    known = asdict(PROFILE)
    del known["request_seconds"]
    (tmp_path / "short.json").write_text(json.dumps(known))
    with pytest.raises(ProfileError, match=r"short\.json: request_seconds is missing"):
        load_profile(str(tmp_path / "short.json"))
