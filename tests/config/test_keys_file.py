"""API_KEYS_FILE: what it may hold, and the one line that says what is wrong with it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from disagg_proxy import cli, serve
from disagg_proxy.config import ConfigError, check_keys_file, load
from disagg_proxy.config.keys_file import (
    MAX_BYTES,
    MAX_KEYS,
    KeyEntry,
    KeysFileError,
    digest,
    new_key,
    read_keys,
    table_of,
)

KEY = "sk-alice-0123456789abcdef"
HASH = f"sha256:{digest(KEY.encode()).hex()}"
OTHER = f"sha256:{digest(b'other').hex()}"
ALICE = f'[[keys]]\nname = "alice"\nhash = "{HASH}"\n'


def read(tmp_path: Path, text: str | bytes) -> tuple[KeyEntry, ...]:
    file = tmp_path / "keys.toml"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    return read_keys(str(file))


def test_every_field(tmp_path: Path) -> None:
    text = f"""
        # a comment
        [[keys]]
        name = "team.a-1@example"
        hash = ["{HASH}", "{OTHER.upper().replace("SHA", "sha")}"]
        requests_per_minute = 600
        tokens_per_minute = 200_000
        models = ["small", "org/large"]
        priority = 9
        monitoring = true

        [[keys]]
        name = "b"
        hash = "sha256:{"0" * 64}"
    """
    assert read(tmp_path, text) == (
        KeyEntry(
            "team.a-1@example",
            (digest(KEY.encode()), digest(b"other")),
            600,
            200_000,
            ("small", "org/large"),
            9,
            True,
        ),
        KeyEntry("b", (bytes(32),)),
    )


def test_a_byte_order_mark_is_skipped(tmp_path: Path) -> None:
    assert read(tmp_path, b"\xef\xbb\xbf" + ALICE.encode()) == read(tmp_path, ALICE)


def test_what_key_new_prints_is_read(tmp_path: Path) -> None:
    key = new_key()
    (entry,) = read(tmp_path, table_of("alice", key))
    assert entry == KeyEntry("alice", (digest(key.encode()),))
    assert len({new_key() for _ in range(100)}) == 100 and len(key) == 3 + 43


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "has no [[keys]] table, so it would refuse everybody"),
        ("keys = []", "has no [[keys]] table"),
        ('keys = ["alice"]', "has no [[keys]] table"),
        ('[keys]\nname = "alice"', "has no [[keys]] table"),
        ("[[keys]", "is not valid TOML: "),
        (b"\xff\xfe", "is not UTF-8 text (byte 0)"),
        ("x = " + "[" * 5000, "is not valid TOML: "),
        ("x = " + "9" * 5000, "is not valid TOML: "),
        ("#" * MAX_BYTES + "\n", "is larger than 1048576 bytes"),
        (f'[[key]]\nname = "alice"\nhash = "{HASH}"\n{ALICE}', "unknown field 'key'; did you mean keys?"),
        (ALICE + "request_per_minute = 3", "unknown field 'request_per_minute'; did you mean requests_per_minute?"),
        (ALICE + "colour = 3", "key 'alice': unknown field 'colour'; known: name, hash, requests_per_minute"),
        (ALICE.replace('"alice"', '"a b"'), "key number 1: name must be 1 to 40 letters, digits"),
        (ALICE.replace("name", "# name"), "key number 1: name must be"),
        (ALICE.replace('"alice"', '"API_KEY"'), "key 'API_KEY': name must not be API_KEY"),
        (ALICE.replace("hash", "# hash"), "key 'alice': hash must be sha256: and 64 hexadecimal digits"),
        (ALICE.replace(HASH, KEY), "key 'alice': hash must be sha256:"),
        (ALICE.replace(HASH, HASH[:-1]), "key 'alice': hash must be sha256:"),
        (ALICE.replace(f'"{HASH}"', "[]"), "key 'alice': hash must be sha256:"),
        (ALICE + "requests_per_minute = 0", "requests_per_minute must be a whole number from 1 to 1000000000"),
        (ALICE + "requests_per_minute = true", "requests_per_minute must be a whole number from 1"),
        (ALICE + "tokens_per_minute = 1.5", "tokens_per_minute must be a whole number from 1"),
        (ALICE + 'tokens_per_minute = "1"', "(leave it out for no limit), not '1'"),
        (ALICE + "models = []", "models must be a list of served names; leave it out to allow all"),
        (ALICE + 'models = "m"', "models must be a list"),
        (ALICE + 'models = ["m", ""]', "models must be a list"),
        (ALICE + "priority = 10", "priority must be a whole number from 0 to 9"),
        (ALICE + "priority = -1", "priority must be a whole number from 0 to 9"),
        (ALICE + "monitoring = 1", "monitoring must be true or false, not 1"),
        (ALICE + ALICE.replace(HASH, OTHER), "key 'alice': is defined twice"),
        (ALICE + ALICE.replace("alice", "bob"), "key 'bob': has the hash of key 'alice'"),
        ("".join(table_of(f"k{n}", str(n)) for n in range(MAX_KEYS + 1)), f"has {MAX_KEYS + 1} keys; at most 500"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line_with_file_and_entry(
    tmp_path: Path, capsys, monkeypatch, text: str | bytes, says: str
) -> None:
    with pytest.raises(KeysFileError) as caught:
        read(tmp_path, text)
    line = str(caught.value)
    assert line.startswith(f"{tmp_path / 'keys.toml'}: ") and says in line and "\n" not in line
    assert KEY not in line and HASH not in line and HASH[7:] not in line

    def opened(*args: object) -> None:
        raise AssertionError("something was started")

    for part in ("listen", "Services", "Supervisor"):
        monkeypatch.setattr(serve, part, opened)
    for workers in ("1", "2"):
        assert cli.main(["--api-keys-file", str(tmp_path / "keys.toml"), "--workers", workers]) == 2
        assert capsys.readouterr().err == f"disagg-proxy: API_KEYS_FILE: {line}\n"


def test_a_fifo_is_refused_without_waiting_for_a_writer(tmp_path: Path) -> None:
    fifo = tmp_path / "keys.toml"
    os.mkfifo(fifo)
    with pytest.raises(KeysFileError, match=r"keys\.toml: is not a regular file$"):
        read_keys(str(fifo))


def test_a_file_that_is_not_there(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=rf"API_KEYS_FILE: {tmp_path}/keys.toml: cannot be read: No such file"):
        check_keys_file(load([], {"API_KEYS_FILE": "keys.toml"}))


def test_the_admin_key_is_no_clients_key(tmp_path: Path) -> None:
    read(tmp_path, ALICE)
    environ = {"API_KEYS_FILE": str(tmp_path / "keys.toml"), "ADMIN_KEY": KEY}
    with pytest.raises(ConfigError, match=r"keys\.toml: key 'alice': must differ from ADMIN_KEY") as caught:
        check_keys_file(load([], environ))
    assert KEY not in str(caught.value)
    check_keys_file(load([], {**environ, "ADMIN_KEY": "sk-other"}))


def test_check_refuses_a_bad_file(tmp_path: Path, capsys) -> None:
    file = tmp_path / "keys.toml"
    for text, code in ((ALICE, 0), ("[[keys]", 2)):
        file.write_text(text)
        assert cli.main(["check", "--api-keys-file", str(file)]) == code
    assert capsys.readouterr().err.startswith(f"disagg-proxy: API_KEYS_FILE: {file}: is not valid TOML")
