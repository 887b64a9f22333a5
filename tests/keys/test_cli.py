"""``disagg-proxy key new``: the key on one stream, its table on the other, and nothing stored."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from disagg_proxy import cli
from disagg_proxy.config.keys_file import digest, read_keys


def test_the_key_is_printed_once_and_the_table_holds_its_hash(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    tables = []
    for name in ("alice", "team-b"):
        assert cli.main(["key", "new", name]) == 0
        out, table = capsys.readouterr()
        key = out.removesuffix("\n")
        assert key.startswith("sk-") and key not in table and "\n" not in key
        tables.append((name, key, table))
    assert os.listdir(tmp_path) == []
    file = tmp_path / "keys.toml"
    file.write_text("".join(table for *_, table in tables))
    assert [(one.name, one.hash) for one in read_keys(str(file))] == [
        (name, (digest(key.encode()),)) for name, key, _ in tables
    ]


@pytest.mark.parametrize("argv", [["new", "a b"], ["new", ""], ["new"], [], ["old", "x"]])
def test_wrong_usage_prints_no_key(capsys, argv: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["key", *argv])
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and not out and "usage: disagg-proxy key" in err
