"""`disagg-proxy cluster` as far as it goes without Ray."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from disagg_proxy.cli import main


@pytest.fixture(autouse=True)
def _without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name in ("disagg_ray.service", "disagg_ray.app", "disagg_ray.store")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "ray", None)


@pytest.mark.parametrize("words", [["status"], ["down"], ["scale", "prefill=2"], ["drain", "10.0.0.2"]])
def test_without_ray_it_says_what_to_install(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cluster", *words]) == 3
    assert 'pip install "disagg-proxy[ray]"' in capsys.readouterr().err


@pytest.mark.parametrize(("text", "words"), [("name: [", "c.yaml"), ("models: x", "models: is unknown")])
def test_a_bad_file_is_refused_before_ray_is_looked_for(
    tmp_path: Path, text: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("yaml")
    path = tmp_path / "c.yaml"
    path.write_text(text)
    assert main(["cluster", "up", str(path)]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


@pytest.mark.parametrize("word", ["prefill", "prefill=0", "proxy=2", "decode=-1", "decode=x"])
def test_a_bad_count_is_refused(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cluster", "scale", word]) == 2
    assert f"{word!r} is not prefill=COUNT or decode=COUNT" in capsys.readouterr().err
