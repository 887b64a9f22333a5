"""The configuration file: what it may contain, and what a bad one says."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disagg_proxy.config import Config, ConfigError, StaticInstance, load
from disagg_proxy.config.file import MAX_BYTES, FileError, read_file
from disagg_proxy.config.load import ENVIRONMENT, load_all
from disagg_proxy.config.table import SETTINGS


@pytest.fixture
def file(tmp_path: Path):
    def write(text: str) -> str:
        path = tmp_path / "proxy.toml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def test_each_kind_of_value_is_written_in_its_own_type(file) -> None:
    path = file(
        """
        MAX_QUEUE = 1_000
        QUEUE_TIMEOUT = 2.5
        MAX_BODY_BYTES = "1M"
        MAX_HEADER_BYTES = 4096
        WORKERS = "2"
        DECODE_ALONE = false
        ENABLE_PROFILING = 1
        LOG_LEVEL = "error"
        ALLOW_REGISTER = ["local", "10.0.0.0/8"]
        CORS_ORIGINS = "https://a.example, https://b.example"
        PREFILL_INSTANCES = ["http://127.0.0.1:1,127.0.0.1:2", "http://127.0.0.1:3"]
        DECODE_INSTANCES = []
        """
    )
    assert load(["--config", path], {}) == Config(
        config_file=path, max_queue=1000, queue_timeout=2.5, max_body_bytes=1 << 20, max_header_bytes=4096, workers=2,
        decode_alone=False, enable_profiling=True, log_level="error", allow_register=("local", "10.0.0.0/8"),
        cors_origins=("https://a.example", "https://b.example"),
        prefill=(StaticInstance("127.0.0.1:1", "127.0.0.1:2"), StaticInstance("127.0.0.1:3")),
    )  # fmt: skip


def test_a_flag_wins_over_the_environment_which_wins_over_the_file(file) -> None:
    path = file("MAX_QUEUE = 1\nMAX_TRIES = 1\nMAX_IN_FLIGHT = 1")
    environ = {"CONFIG_FILE": path, "MAX_QUEUE": "2", "MAX_TRIES": "2", "PROXY_PORT": ""}
    loaded = load_all(["--max-queue", "3"], environ)
    assert (loaded.config.max_queue, loaded.config.max_tries, loaded.config.max_in_flight) == (3, 2, 1)
    assert loaded.sources == {
        "config_file": ENVIRONMENT, "max_queue": "--max-queue", "max_tries": ENVIRONMENT, "max_in_flight": path,
    }  # fmt: skip


def test_the_flag_names_another_file_than_the_environment(file, tmp_path: Path) -> None:
    other = tmp_path / "other.toml"
    other.write_text("MAX_QUEUE = 7")
    assert load(["--config", str(other)], {"CONFIG_FILE": file("MAX_QUEUE = 8")}).max_queue == 7


def test_an_empty_file_and_one_with_a_byte_order_mark_are_good(file) -> None:
    path = file("")
    assert load(["--config", path], {}) == Config(config_file=path)
    assert load(["--config", file("\ufeffMAX_QUEUE = 7")], {}).max_queue == 7


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("MAX_QUEU = 1", "MAX_QUEU: there is no such setting; did you mean MAX_QUEUE?"),
        ("max_queue = 1", "max_queue: there is no such setting; did you mean MAX_QUEUE?"),
        ("max-queue = 1", "max-queue: there is no such setting; did you mean MAX_QUEUE?"),
        ("http-port = 1", "http-port: there is no such setting; did you mean HTTP_PROXY_PORT?"),
        ("frobnicate = 1", "frobnicate: there is no such setting; disagg-proxy --help lists the names"),
        ('"two\\nlines" = 1', r"'two\nlines': there is no such setting"),
        ("[proxy]\nMAX_QUEUE = 1", "[proxy]: there are no tables; write the settings at the top"),
        ("CONFIG_FILE = 'x'", "CONFIG_FILE: cannot be set in the file that it names"),
        ("MAX_QUEUE = true", "MAX_QUEUE: must be a number, such as MAX_QUEUE = 4096, not true or false"),
        ("MAX_QUEUE = [1]", "MAX_QUEUE: must be a number, such as MAX_QUEUE = 4096, not a list of something else"),
        ("DECODE_ALONE = 'maybe'", "DECODE_ALONE: must be 1 or 0"),
        ("DECODE_ALONE = [true]", "DECODE_ALONE: must be true or false, not a list"),
        ("API_KEY = 12345", 'API_KEY: must be text in quotes, such as API_KEY = "...", not a number'),
        ("CORS_ORIGINS = [1]", "CORS_ORIGINS: must be text in quotes, or a list of them"),
        ("LOG_LEVEL = 2026-11-29", "LOG_LEVEL: must be text in quotes, such as LOG_LEVEL = \"...\", not a date"),
        ("MAX_QUEUE = 'many'", "MAX_QUEUE: must be a whole number, 0 for no limit, not 'many'"),
        ("MAX_QUEUE = -1", "MAX_QUEUE: must be a whole number, 0 for no limit, not '-1'"),
        ("MAX_QUEUE = 1.0", "MAX_QUEUE: must be a whole number, 0 for no limit, not '1.0'"),
        ("MAX_QUEUE = ''", "MAX_QUEUE: must be a whole number, 0 for no limit, not ''"),
        ("QUEUE_TIMEOUT = inf", "QUEUE_TIMEOUT: must be a number of seconds above 0, not 'inf'"),
        ("MAX_QUEUE = 1\nMAX_QUEUE 2", "is not valid TOML: "),
        ("MAX_QUEUE = 1\nMAX_QUEUE = 2", "is not valid TOML: Cannot overwrite a value (at "),
        ("MAX_QUEUE = " + "9" * 5000, "is not valid TOML: "),
        ("#" * MAX_BYTES + "\n", "is larger than 32768 bytes"),
        ("A = " + "[" * 5000, "is not valid TOML: "),
        ('ACCESS_LOG = "a\\u0000"', "ACCESS_LOG: contains the character U+0000"),
        ('PREFILL_INSTANCES = ["a\\u0000"]', "PREFILL_INSTANCES: contains the character U+0000"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line_with_the_file_the_key_and_the_remedy(file, text: str, says: str) -> None:
    path = file(text)
    with pytest.raises(ConfigError) as caught:
        load(["--config", path], {})
    assert str(caught.value).startswith(f"{path}: {says}")
    assert "\n" not in str(caught.value)


def test_a_bad_value_is_found_where_a_flag_hides_it(file) -> None:
    with pytest.raises(ConfigError, match="MAX_QUEUE: must be a whole number"):
        load(["--config", file("MAX_QUEUE = 'many'"), "--max-queue", "1"], {})


def test_a_secret_in_the_file_is_not_shown(file) -> None:
    for text in ("API_KEY = 'hush hush'", "API_KEY = ['hush']"):
        with pytest.raises(ConfigError, match="API_KEY") as caught:
            load(["--config", file(text)], {})
        assert "hush" not in str(caught.value)


@pytest.mark.parametrize("named", ["nowhere.toml", ".", "latin1.toml"])
def test_a_file_that_cannot_be_read_names_what_to_change(tmp_path: Path, named: str) -> None:
    (tmp_path / "latin1.toml").write_bytes(b"# caf\xe9\n")
    path = str(tmp_path / named) if named != "." else str(tmp_path)
    says = "is not UTF-8 text" if named == "latin1.toml" else r"cannot be read: .* \(--config, CONFIG_FILE\)"
    with pytest.raises(ConfigError, match=f"^{path}: {says}"):
        load([], {"CONFIG_FILE": path})


def test_a_fifo_is_refused_without_waiting_for_a_writer(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "proxy.toml")
    with pytest.raises(ConfigError, match=r"proxy\.toml: is not a regular file$"):
        load([], {"CONFIG_FILE": str(tmp_path / "proxy.toml")})


def test_an_empty_path_is_no_file_in_the_environment_and_an_error_as_a_flag() -> None:
    assert load([], {"CONFIG_FILE": ""}) == Config()
    with pytest.raises(ConfigError, match="--config: must be the path"):
        load(["--config", ""], {})


def test_the_default_of_each_setting_can_be_written_in_the_file(file) -> None:
    lines = [f'{setting.env} = "{setting.default}"' for setting in SETTINGS if setting.env != "CONFIG_FILE"]
    path = file("\n".join(lines))
    assert load(["--config", path], {}) == Config(config_file=path)


@given(st.binary(max_size=200))
def test_any_bytes_are_settings_or_one_error(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.toml"
    path.write_bytes(content)
    try:
        assert set(read_file(str(path))) <= {setting.env for setting in SETTINGS}
    except FileError as error:
        said = str(error)
    else:
        said = ""
    assert said.isprintable()
