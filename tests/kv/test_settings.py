"""Settings and versions: what is accepted, and which words refuse the rest."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from disagg_kv.engine.versions import check_parallel, check_version
from disagg_kv.settings import Settings


def test_values_may_be_texts() -> None:
    settings = Settings.load({"proxy_ip": "127.0.0.1", "proxy_port": "30001", "http_port": "8000",
                              "load_timeout_s": "2.5", "peers": "10.0.0.0/8, 127.0.0.1"}, {})  # fmt: skip
    assert (settings.proxy_port, settings.load_timeout_s) == (30001, 2.5)
    assert settings.may_fetch_from("10.1.2.3:5") and not settings.may_fetch_from("127.0.0.2:5")


def test_defaults_allow_only_loopback() -> None:
    settings = Settings.load({}, {})
    assert settings.listen == "127.0.0.1"
    assert settings.may_fetch_from("127.0.0.1:5") and settings.may_fetch_from("[::1]:5")
    assert not settings.may_fetch_from("10.0.0.1:5")


def test_the_secret_comes_from_the_environment() -> None:
    assert Settings.load({}, {"DISAGG_KV_SECRET": "s"}).secret == "s"
    assert Settings.load({"secret": "t"}, {"DISAGG_KV_SECRET": "s"}).secret == "t"


def test_the_secret_comes_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text(" s \n")
    assert Settings.load({"secret_file": str(file)}, {}).secret == "s"
    assert Settings.load({}, {"DISAGG_KV_SECRET_FILE": str(file)}).secret == "s"
    assert Settings.load({"secret": "t"}, {"DISAGG_KV_SECRET_FILE": str(file)}).secret == "t"
    assert Settings.load({"secret_file": str(file)}, {"DISAGG_KV_SECRET": "t"}).secret == "s"
    with pytest.raises(ValueError, match="not both"):
        Settings.load({"secret": "t", "secret_file": str(file)}, {})
    file.write_text("\n")
    with pytest.raises(ValueError, match=f"secret_file: {file}: its first line is empty"):
        Settings.load({"secret_file": str(file)}, {})
    with pytest.raises(ValueError, match="No such file"):
        Settings.load({"secret_file": str(tmp_path / "none")}, {})


def test_one_address_is_announced_and_listened_on() -> None:
    assert Settings.load({"host_ip": "10.0.0.1"}, {}).listen == "10.0.0.1"
    assert Settings.load({"host_ip": "10.0.0.1", "listen": "0.0.0.0"}, {}).listen == "0.0.0.0"


def test_every_proxy_gets_announcements_and_may_connect() -> None:
    extra = {"proxy_ip": "10.0.0.1", "proxy_port": 1, "http_port": 2, "proxies": "10.0.0.2:1,[fd00::1]:1,10.0.0.1:1"}
    settings = Settings.load(extra, {})
    assert settings.announce_to == ("10.0.0.1:1", "10.0.0.2:1", "[fd00::1]:1")
    assert all(map(settings.may_connect, ("10.0.0.1", "10.0.0.2", "fd00::1", "::ffff:10.0.0.2")))
    assert not settings.may_connect("10.0.0.3")
    assert not settings.may_fetch_from("10.0.0.2:1")


def test_a_proxy_may_have_a_name_whose_addresses_are_peers() -> None:
    settings = Settings.load({"proxies": "proxy-0.registration:30001", "http_port": 2, "peers": "10.8.0.0/16"}, {})
    assert settings.announce_to == ("proxy-0.registration:30001",)
    assert settings.may_connect("10.8.3.4") and not settings.may_connect("10.9.0.1")


@pytest.mark.parametrize(
    ("extra", "word"),
    [
        ({"host_ip": "node-1"}, "host_ip is 'node-1', not an IP address"),
        ({"proxies": "node-1", "http_port": 1}, "proxies: 'node-1' is not ip:port or name:port"),
        ({"proxies": "10.0.0:30001", "http_port": 1}, "'10.0.0:30001' is not"),
        ({"proxies": "10.0.0.1:30001"}, "proxies and http_port must be set together"),
        ({"kv_buffer": 1}, "'kv_buffer' is unknown"),
        ({"transport": "rdma"}, "transport"),
        ({"load_timeout_s": 0}, "load_timeout_s"),
        ({"load_timeout_s": "soon"}, "load_timeout_s"),
        ({"staging_mb": True}, "staging_mb"),
        ({"hold_fraction": 1.5}, "hold_fraction"),
        ({"listen": "localhost"}, "localhost"),
        ({"peers": ["everywhere"]}, "peers: 'everywhere' does not appear to be"),
        ({"peers": "10.0.0.5/24"}, "peers: 10.0.0.5/24 has host bits set"),
        ({"proxy_ip": "127.0.0.1", "proxy_port": 1}, "must be set together"),
        ({"staging_buffers": 1}, "staging_buffers"),
    ],
)
def test_what_cannot_be_used_is_named(extra: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        Settings.load(extra, {})


def test_every_setting_is_documented() -> None:
    text = (Path(__file__).parents[2] / "docs" / "connector.md").read_text()
    for field in fields(Settings):
        default = ", ".join(field.default) if isinstance(field.default, tuple) else str(field.default)
        line = next((line for line in text.splitlines() if line.startswith(f"| `{field.name}` |")), "")
        assert line, f"{field.name} is not in docs/connector.md"
        assert f"| {default or 'empty'} |" in line, f"the default of {field.name} is {default!r}: {line}"


@pytest.mark.parametrize("version", ["0.21.0", "0.33.0", "0.32.0+cpu", "0.26.0rc1"])
def test_versions_that_were_tried(version: str, caplog: pytest.LogCaptureFixture) -> None:
    check_version(version)
    assert not caplog.records


def test_an_older_version_is_refused_and_a_newer_one_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ValueError, match="P2pNcclConnector"):
        check_version("0.20.2")
    check_version("0.40.0")
    check_version("dev")
    assert len(caplog.records) == 2


@pytest.mark.parametrize("name", ["pipeline_parallel_size", "data_parallel_size", "decode_context_parallel_size"])
def test_other_parallelism_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        check_parallel(SimpleNamespace(parallel_config=SimpleNamespace(**{name: 2})))


def test_scales_that_each_engine_computes_for_itself_are_refused() -> None:
    cache = SimpleNamespace(calculate_kv_scales=True)
    with pytest.raises(ValueError, match="calculate_kv_scales"):
        check_parallel(SimpleNamespace(parallel_config=SimpleNamespace(), cache_config=cache))
