"""The keys of a running proxy: found by hash, reread, charged when a request ends."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from disagg_proxy.config import Config
from disagg_proxy.config.keys_file import KeysFileError, digest
from disagg_proxy.config.reload import ReloadError
from disagg_proxy.keys import key_table
from disagg_proxy.keys.key_table import KeyTable
from disagg_proxy.telemetry.request_recorder import RequestRecorder
from disagg_proxy.telemetry.stats import Stats


def table(name: str, key: str, *fields: str) -> str:
    return "\n".join(["[[keys]]", f'name = "{name}"', f'hash = "sha256:{digest(key.encode()).hex()}"', *fields, ""])


class Bench:
    """A table over a file, and a clock."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "keys.toml"
        self.now = 0.0
        self.stats = Stats(lambda: self.now)
        self.write(table("alice", "a", "requests_per_minute = 10", "tokens_per_minute = 100"), table("bob", "b"))

    def write(self, *tables: str) -> None:
        self.file.write_text("\n".join(tables))

    def config(self, **settings: Any) -> Config:
        return Config(api_keys_file=str(self.file), **settings)

    def open(self, **settings: Any) -> KeyTable:
        return KeyTable(self.config(**settings), self.stats)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def names(keys: KeyTable, *presented: bytes) -> list[str | None]:
    return [found.name if (found := keys.find(one)) else None for one in presented]


def test_keys_are_found_by_their_hash(bench: Bench) -> None:
    keys = bench.open()
    assert keys.in_use
    hashed = digest(b"a")
    assert names(keys, b"a", b"b", b"c", b"", b"A", hashed, hashed.hex().encode(), b"alice") == [
        "alice", "bob", None, None, None, None, None, None,
    ]  # fmt: skip


def test_api_key_stays_valid_beside_the_file_and_without_one_nothing_is_counted(bench: Bench) -> None:
    assert names(bench.open(), b"single") == [None]
    keys = bench.open(api_key="single")
    assert names(keys, b"single", b"a") == ["API_KEY", "alice"]
    single = keys.find(b"single")
    assert single is not None and single.monitoring and not single.from_file and single.requests is None
    alone = KeyTable(Config(api_key="single"), Stats(lambda: 0.0))
    assert not alone.in_use


def test_one_sha256_and_one_lookup_for_each_check(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is presented: nothing returns early."""
    keys, hashed = bench.open(), []

    def counting(data: bytes) -> bytes:
        hashed.append(data)
        return hashlib.sha256(data).digest()

    monkeypatch.setattr(key_table, "digest", counting)
    for presented in (b"", b"a", b"alice", b"x" * 5000):
        keys.find(presented)
    assert hashed == [b"", b"a", b"alice", b"x" * 5000]


def test_a_reload_says_what_changed_and_notifies(bench: Bench) -> None:
    keys, notified = bench.open(), []
    keys.watch(lambda: notified.append(1))
    assert keys.reload() == "" and not notified
    bench.write(table("bob", "b2"), table("carol", "c"))
    assert keys.reload() == "API_KEYS_FILE: added carol; removed alice; changed bob" and notified == [1]
    assert names(keys, b"a", b"b", b"b2", b"c") == [None, None, "bob", "carol"]
    keys.configure(bench.config(api_key="single"))
    assert keys.reload() == "API_KEYS_FILE: API_KEY changed" and len(notified) == 2


def test_a_bad_file_keeps_the_keys_and_says_why(bench: Bench) -> None:
    keys, notified = bench.open(), []
    keys.watch(lambda: notified.append(1))
    for bad in ("[[keys]", "", table("alice", "z", "colour = 1")):
        bench.write(bad)
        with pytest.raises(ReloadError, match=rf"API_KEYS_FILE: {bench.file}: "):
            keys.reload()
    bench.file.unlink()
    with pytest.raises(ReloadError, match="cannot be read"):
        keys.reload()
    assert names(keys, b"a", b"b", b"z") == ["alice", "bob", None] and not notified
    with pytest.raises(KeysFileError):
        bench.open()


def test_a_file_that_cannot_be_read_opens_nothing(bench: Bench) -> None:
    """Neither does one whose name is given by a reload."""
    keys = KeyTable(Config(api_key="single"), bench.stats)
    keys.configure(Config(api_key="single", api_keys_file="/nowhere/keys.toml"))
    with pytest.raises(ReloadError):
        keys.reload()
    assert not keys.in_use, "API_KEY is checked as before"


def test_a_reload_keeps_what_was_used_of_a_limit(bench: Bench) -> None:
    keys = bench.open()
    for _ in range(10):
        assert keys.find(b"a").admit(5, bench.stats, False) is None
    bench.write(table("alice", "a", "requests_per_minute = 12", "tokens_per_minute = 100"))
    keys.reload()
    alice = keys.find(b"a")
    assert [alice.admit(0, bench.stats, False) is None for _ in range(3)] == [True, True, False]
    assert alice.tokens.level(bench.now) == 50


def test_what_requests_that_run_and_known_heads_charge_counts_after_a_reload(bench: Bench) -> None:
    keys = bench.open()
    former = keys.find(b"a")
    for _ in range(2):
        keys.reload()
    assert all(former.admit(0, bench.stats, False) is None for _ in range(10))
    assert keys.find(b"a").admit(0, bench.stats, False) is not None
    former.settle(60, bench.now)
    assert keys.find(b"a").tokens.level(bench.now) == 40


def test_counters_start_at_zero_and_end_with_their_key(bench: Bench) -> None:
    keys = bench.open()
    stats = bench.stats
    assert stats.key_refusals == {f"{n}\t{k}": 0 for n in ("alice", "bob") for k in ("requests", "tokens")}
    assert stats.key_tokens == {f"{n}\t{k}": 0 for n in ("alice", "bob") for k in ("prompt", "generation")}
    stats.key_requests["alice\tcut"] += 1
    stats.key_requests["bob\tok"] += 2
    bench.write(table("bob", "b"))
    keys.reload()
    assert dict(stats.key_requests) == {"bob\tok": 2}
    assert not any(name.startswith("alice") for name in (*stats.key_tokens, *stats.key_refusals))


@pytest.mark.parametrize(
    ("reached", "prompt", "output", "events", "used"),
    [
        (True, 7, 9, 0, 16),
        (True, 7, None, 12, 19),  # a stream without usage: its events
        (True, None, None, 0, 30),  # nothing is reported: the estimate
        (True, None, 4, 9, 34),
        (False, None, None, 0, 0),  # no engine got it
    ],
)
def test_an_ended_request_is_charged_what_its_engines_counted(
    bench: Bench, reached: bool, prompt: int | None, output: int | None, events: int, used: int
) -> None:
    keys = bench.open()
    recorder = RequestRecorder.standalone(lambda: bench.now)
    recorder.settle_key = keys.settle
    record = recorder.open("/v1/completions", None)
    assert keys.find(b"a").admit(30, bench.stats, False) is None
    record.key, record.charged, record.stream_events = "alice", 30, events
    if reached:
        record.on_prefill_sent()
    record.prompt_tokens, record.output_tokens = prompt, output
    record.end()
    assert keys.find(b"a").tokens.used(bench.now) == used
    assert recorder.stats.key_requests == {"alice\tclient_left": 1}
    assert recorder.stats.key_tokens == {"alice\tprompt": prompt or 0, "alice\tgeneration": output or 0}


def test_a_request_whose_key_was_removed_meanwhile_is_charged_to_nobody(bench: Bench) -> None:
    keys = bench.open()
    recorder = RequestRecorder.standalone(lambda: bench.now)
    recorder.settle_key = keys.settle
    record = recorder.open("/v1/completions", None)
    record.key, record.charged = "alice", 30
    bench.write(table("bob", "b"))
    keys.reload()
    record.end()
    assert names(keys, b"a") == [None]
