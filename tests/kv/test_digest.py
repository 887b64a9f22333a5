"""The digest of a model: which engines it tells apart, which it lets meet, and how much it reads."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from disagg_kv.engine import digest, versions
from disagg_kv.engine.adapters import Adapters
from disagg_kv.engine.digest import Unreadable
from tests.kv.checkpoints import CONFIG, NAMES, engine_config, lora, model, tensors, write


def digest_of(path: Path | str, **changes: Any) -> str:
    """As ``connector.model_identity``, which needs vLLM."""
    config = engine_config(path, **changes)
    description, weights, load_format = versions.model_files(config)
    return digest.model_digest(weights, description, versions.model_facts(config), load_format)


def merged(found: dict[str, bytes]) -> dict[str, bytes]:
    """As after the merge of a LoRA: the attention differs, the embeddings do not."""
    other = tensors(1)
    return {name: other[name] if "q_proj" in name else data for name, data in found.items()}


@pytest.mark.parametrize("size", [3000, 5 * 2**20])
def test_other_weights_of_the_same_sizes(tmp_path: Path, size: int) -> None:
    first, second = tensors(0, size), tensors(1, size)
    for folder, found in (("a", first), ("b", second), ("c", merged(first)), ("d", {**first, NAMES[2]: bytes(size)})):
        model(tmp_path / folder / "m", found)
    found = [digest_of(tmp_path / folder / "m") for folder in "abcd"]
    assert len(set(found)) == 4 and all(len(text) == 32 for text in found)


def test_names_and_dtypes_of_tensors_count(tmp_path: Path) -> None:
    found = tensors()
    swapped = dict(zip(reversed(NAMES), found.values(), strict=True))
    folder = model(tmp_path / "m", found)
    seen = [digest_of(folder), digest_of(model(tmp_path / "swapped", swapped))]
    write(folder / "model.safetensors", found, "F16")
    assert len({*seen, digest_of(folder)}) == 3


def test_a_folder_that_is_replaced_between_two_starts(tmp_path: Path) -> None:
    before = digest_of(model(tmp_path / "m"))
    assert digest_of(model(tmp_path / "m")) == before
    assert digest_of(model(tmp_path / "m", tensors(1))) != before


def test_the_same_content_under_two_names(tmp_path: Path) -> None:
    """Also without the fields that say where it comes from, in other shards, and as a snapshot of connections."""
    found = tensors()
    first = model(tmp_path / "models" / "m")
    second = model(tmp_path / "hub" / "3f8a", {}, {**CONFIG, "_name_or_path": "org/m", "transformers_version": "5"})
    (second / "model.safetensors").unlink()
    write(tmp_path / "blob", dict(list(found.items())[:1]), format="pt")
    (second / "model-00001-of-00002.safetensors").symlink_to(tmp_path / "blob")
    write(second / "model-00002-of-00002.safetensors", dict(list(found.items())[1:]))
    (second / "tokenizer.json").write_text("{}")
    assert digest_of(first) == digest_of(second)


def test_a_hub_id_is_its_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = model(tmp_path / "snapshots" / "3f8a")
    asked: list[Any] = []

    def snapshot_download(name: str, **options: Any) -> str:
        asked.append((name, options))
        return str(folder)

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=snapshot_download))
    assert digest_of("org/m", revision="main", download_dir="/cache") == digest_of(folder)
    assert asked[0] == ("org/m", {"revision": "main", "cache_dir": "/cache", "local_files_only": True})


@pytest.mark.parametrize(
    "change",
    [
        {"hf_overrides": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}},
        {"hf_overrides": {"rope_theta": 5000.0}},
        {"quantization": "fp8"},
        {"dtype": "torch.float16"},
        {"cache_dtype": "fp8_e5m2"},
        {"load_format": "dummy"},
        {"hf_text_config": SimpleNamespace(rope_parameters={"rope_type": "longrope"})},
        {"is_multimodal_model": True},
    ],
)
def test_what_else_changes_the_kv(tmp_path: Path, change: dict[str, Any]) -> None:
    folder = model(tmp_path / "m")
    assert digest_of(folder, **change) != digest_of(folder)
    assert digest_of(folder, **change) == digest_of(folder, **change)


def test_what_does_not_change_the_kv(tmp_path: Path) -> None:
    folder = model(tmp_path / "m")
    assert digest_of(folder, max_model_len=2048) == digest_of(folder)
    assert digest_of(folder, cache_dtype="bfloat16") == digest_of(folder, cache_dtype="auto")
    assert digest_of(folder, cache_dtype="fp8") == digest_of(folder, cache_dtype="fp8_e4m3")
    override = {"rope_theta": 1.0, "a": 2}
    assert digest_of(folder, hf_overrides=override) == digest_of(folder, hf_overrides=dict(reversed(override.items())))


def test_overrides_that_are_functions_are_named() -> None:
    config = engine_config("m", hf_overrides=merged)
    assert versions.model_facts(config)["hf_overrides"] == '"tests.kv.test_digest.merged"'


def test_dummy_weights_follow_from_the_configuration(tmp_path: Path) -> None:
    first, second = (model(tmp_path / name, tensors(seed)) for seed, name in enumerate("ab"))
    assert digest_of(first, load_format="dummy") == digest_of(second, load_format="dummy")
    other = model(tmp_path / "c", config={**CONFIG, "num_hidden_layers": 3})
    assert digest_of(first, load_format="dummy") != digest_of(other, load_format="dummy")


def test_quantisation_of_a_checkpoint(tmp_path: Path) -> None:
    folder = model(tmp_path / "m")
    plain, before = digest_of(folder), digest_of(folder, quantization="modelopt")
    (folder / "hf_quant_config.json").write_text('{"kv_cache_quant_algo": "FP8"}')
    assert digest_of(folder, quantization="modelopt") != before and digest_of(folder) == plain


def test_the_files_that_vllm_loads(tmp_path: Path) -> None:
    folder = model(tmp_path / "m")
    before = digest_of(folder)
    (folder / "pytorch_model.bin").write_bytes(b"x")
    assert digest_of(folder) == before, "safetensors come first"
    index = {"weight_map": dict.fromkeys(NAMES, "model.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    write(folder / "extra.safetensors", tensors(2))
    assert digest_of(folder) == before, "no shard of the index"
    write(folder / "consolidated.safetensors", tensors(3))
    assert digest_of(folder) != before, "Mistral's own format comes before them"
    assert digest_of(folder, load_format="safetensors") == before


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.gguf"])
def test_other_formats(tmp_path: Path, name: str) -> None:
    data = tensors(0, 9 << 20)[NAMES[0]]
    found = []
    for number, place in enumerate((None, 0, 4 << 20, len(data) - 1)):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        changed = data if place is None else data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
        (folder / name).write_bytes(changed)
        source = folder / name if name.endswith(".gguf") else folder
        found.append(digest_of(source))
        assert digest_of(source) == found[-1]
    assert len({found[0], found[1], found[3]}) == 3, "a single byte is seen at the start and at the end"


@pytest.mark.parametrize(
    "break_it",
    [
        lambda folder: (folder / "model.safetensors").unlink(),
        lambda folder: (folder / "config.json").unlink(),
        lambda folder: (folder / "config.json").write_text("{"),
        lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 100),
        lambda folder: (folder / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0[]"),
        lambda folder: os.truncate(folder / "model.safetensors", 2000),
    ],
)
def test_what_cannot_be_read(tmp_path: Path, break_it: Any) -> None:
    folder = model(tmp_path / "m")
    break_it(folder)
    with pytest.raises(Unreadable):
        digest_of(folder)


def test_a_model_of_another_kind_of_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match="not on this machine"):
        digest_of("s3://bucket/model")


def test_how_much_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """70 GB in 20,000 tensors, as a sparse file: one sample of each, and the header."""
    size, count = 3_500_000, 20_000
    head = {
        f"layers.{n}": {"dtype": "BF16", "shape": [size // 2], "data_offsets": [n * size, (n + 1) * size]}
        for n in range(count)
    }
    text = json.dumps(head).encode()
    folder = model(tmp_path / "m", {})
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + count * size)
    read = []
    pread = os.pread

    def counted(file: int, amount: int, start: int) -> bytes:
        read.append(amount)
        return pread(file, amount, start)

    monkeypatch.setattr(os, "pread", counted)
    digest_of(folder)
    assert sum(read) == 8 + len(text) + count * digest.SAMPLE_BYTES and len(read) == count + 2
    shutil.rmtree(folder)


def test_an_empty_tensor_makes_the_kernel_read_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``posix_fadvise`` takes a length of 0 for the whole rest of the file."""
    advised: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda _file, start, size, advice: advised.append((size, advice)))
    found = digest_of(model(tmp_path / "a", {"empty": b"", **tensors()}))
    assert found != digest_of(model(tmp_path / "b"))
    assert not [size for size, advice in advised if advice == os.POSIX_FADV_WILLNEED and not size]


def test_a_version_of_the_operators_choice() -> None:
    assert digest.version_digest("1") == digest.version_digest("1") != digest.version_digest("2")


# Adapters.


def test_adapters_by_content(tmp_path: Path) -> None:
    adapters = Adapters()
    same = {adapters.digest(lora(tmp_path / folder, number=n)) for n, folder in enumerate(("a", "b"), 1)}
    assert len(same) == 1 and None not in same
    assert adapters.digest(lora(tmp_path / "c", seed=1, number=3)) not in same | {None}


def test_files_that_change_under_a_loaded_adapter(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    adapters, request = Adapters(), lora(tmp_path / "a")
    adapters.loaded(request)
    before = adapters.digest(request)
    lora(tmp_path / "a", seed=1)
    assert adapters.digest(request) is None and adapters.digest(request) is None
    assert caplog.text.count("files have changed") == 1
    adapters.loaded(request)
    assert adapters.digest(request) not in (None, before)
    shutil.rmtree(tmp_path / "a")
    assert adapters.digest(request) is None


@pytest.mark.parametrize("broken", ["nothing", "no weights", "index"])
def test_adapters_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    request = lora(tmp_path / "a")
    if broken == "nothing":
        request.lora_path = "org/adapter"
    elif broken == "no weights":
        (tmp_path / "a" / "adapter_model.safetensors").unlink()
    else:
        (tmp_path / "a" / "model.safetensors.index.json").write_text("[]")
    assert Adapters().digest(request) is None
