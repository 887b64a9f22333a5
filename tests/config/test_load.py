"""Where a setting's value comes from, and what a bad one says."""

import dataclasses
from pathlib import Path

import pytest

from disagg_proxy.config import Config, ConfigError, StaticInstance, load
from disagg_proxy.config.table import SETTINGS


def test_the_table_and_the_config_agree_in_names_order_and_defaults() -> None:
    assert [s.name for s in SETTINGS] == [f.name for f in dataclasses.fields(Config)]
    assert load([], {}) == Config()


def test_flag_over_environment_over_default() -> None:
    environ = {"HTTP_PROXY_PORT": "1234"}
    assert load([], {}).http_port == 10001
    assert load([], environ).http_port == 1234
    assert load(["--http-port", "4321"], environ).http_port == 4321


def test_an_empty_variable_is_an_unset_one() -> None:
    assert load([], {"HTTP_PROXY_PORT": "", "API_KEY": ""}) == Config()


def test_an_empty_flag_is_a_bad_value() -> None:
    with pytest.raises(ConfigError, match="--http-port: must be a port"):
        load(["--http-port", ""], {})


@pytest.mark.parametrize(
    ("env", "raw"),
    [
        ("HTTP_PROXY_HOST", "http://x"),
        ("HTTP_PROXY_HOST", "a:b:zz"),
        ("HTTP_PROXY_PORT", "65536"),
        ("HTTP_PROXY_PORT", "-1"),
        ("HTTP_PROXY_PORT", "10 001"),
        ("PROXY_PORT", "٣"),
        ("INSTANCE_EXPIRY", "0"),
        ("INSTANCE_EXPIRY", "nan"),
        ("PREFILL_TIMEOUT", "soon"),
        ("MAX_BODY_BYTES", "0"),
        ("MAX_BODY_BYTES", "12X"),
        ("PREFILL_POLICY", "best"),
        ("SESSION_HEADER", "two words"),
        ("LOAD_BOUND", "0.5"),
        ("LOAD_BOUND", "nan"),
        ("LOG_LEVEL", "loud"),
        ("LOG_FORMAT", "xml"),
        ("ACCESS_LOG", "/nowhere/access.log"),
        ("ACCESS_LOG", "/tmp"),
        ("ENABLE_PROFILING", "maybe"),
        ("CORS_ORIGINS", "example.org"),
        ("ALLOW_REGISTER", " , "),
        ("ALLOW_REGISTER", "10.0.0.0/99"),
        ("PREFILL_INSTANCES", "https://127.0.0.1:1"),
        ("PREFILL_INSTANCES", "http://127.0.0.1"),
        ("DECODE_INSTANCES", "http://127.0.0.1:1,nowhere:"),
        ("API_KEY", "two words"),
        ("ADMIN_KEY", "two words"),
    ],
)
def test_a_bad_value_is_one_line_that_names_its_setting(env: str, raw: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load([], {env: raw})
    assert str(caught.value).startswith(f"{env}: must ")
    assert "\n" not in str(caught.value)


def test_the_secret_of_the_engines_may_be_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text("s\n")
    assert load([], {"DISAGG_KV_SECRET_FILE": str(file)}).kv_secret == "s"
    with pytest.raises(ConfigError, match=r"^DISAGG_KV_SECRET_FILE: set either"):
        load(["--kv-secret", "t"], {"DISAGG_KV_SECRET_FILE": str(file)})
    file.write_text("")
    with pytest.raises(ConfigError, match=r"^DISAGG_KV_SECRET_FILE: .*: its first line is empty$"):
        load([], {"DISAGG_KV_SECRET_FILE": str(file)})


def test_engines_can_prove_only_a_secret_that_the_proxy_has() -> None:
    with pytest.raises(ConfigError, match=r"^ALLOW_REGISTER: proven needs a secret .*DISAGG_KV_SECRET"):
        load([], {"ALLOW_REGISTER": "local,proven"})
    assert load([], {"ALLOW_REGISTER": "local,proven", "DISAGG_KV_SECRET": "s"}).allow_register == ("local", "proven")


@pytest.mark.parametrize(("wrong", "right", "name"), [
    ("PREFILL_POLICY", "DECODE_POLICY", "joint"), ("DECODE_POLICY", "PREFILL_POLICY", "prefix-aware"),
])  # fmt: skip
def test_a_policy_of_the_other_role_says_where_it_belongs(wrong: str, right: str, name: str) -> None:
    with pytest.raises(ConfigError, match=f"^{wrong}: must be one of .*set it as {right}"):
        load([], {wrong: name})


def test_a_bad_secret_is_not_repeated() -> None:
    with pytest.raises(ConfigError) as caught:
        load(["--api-key", "hush hush"], {})
    assert "hush" not in str(caught.value)


def test_an_unknown_flag_and_an_abbreviation_are_errors() -> None:
    for argv in (["--nope"], ["--http-por", "1"]):
        with pytest.raises(ConfigError, match="--help"):
            load(argv, {})


def test_instances_add_up_and_take_ipv6_and_names() -> None:
    config = load(["--prefill", "http://127.0.0.1:1,127.0.0.1:2", "--prefill", "[::1]:3,::1:4"], {})
    assert config.prefill == (StaticInstance("127.0.0.1:1", "127.0.0.1:2"), StaticInstance("[::1]:3", "::1:4"))
    assert load([], {"DECODE_INSTANCES": "http://gpu-box:5/ http://b:6"}).decode == (
        StaticInstance("gpu-box:5"),
        StaticInstance("b:6"),
    )


def test_sizes_take_units() -> None:
    assert load(["--max-body-bytes", "3M"], {}).max_body_bytes == 3 * 1024 * 1024
    assert load(["--max-body-bytes", "77"], {}).max_body_bytes == 77


def test_help_names_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        load(["--help"], {})
    shown = " ".join(capsys.readouterr().out.split())
    assert stopped.value.code == 0
    for setting in SETTINGS:
        assert setting.flag in shown and setting.env in shown
        assert " ".join(setting.help.split()) in shown.replace("- ", "-")


def test_the_admin_key_is_not_the_one_that_every_client_has() -> None:
    with pytest.raises(ConfigError, match="ADMIN_KEY: must differ from API_KEY") as caught:
        load(["--admin-key", "sk-same"], {"API_KEY": "sk-same"})
    assert "sk-same" not in str(caught.value)
    assert load(["--admin-key", "sk-other"], {"API_KEY": "sk-same"}).admin_key == "sk-other"
    assert load([], {"ADMIN_KEY": "sk-other"}).admin_key == "sk-other"
