"""Who takes a reload, and what is logged of it."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from disagg_proxy.config import Config
from disagg_proxy.config.reload import LiveSettings, ReloadError, Reloads


@pytest.mark.parametrize(("quiet", "level"), [(False, logging.INFO), (True, logging.DEBUG)])
def test_each_part_takes_the_configuration_and_rereads_its_file(
    quiet: bool, level: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    reloads, taken = Reloads(quiet), []
    reloads.on_config(taken.append)
    reloads.on_reload(lambda: "keys.toml: 2 keys added" if taken else "read before the configuration")
    reloads.on_reload(lambda: "")
    reloads.run(Config(max_queue=3))
    assert taken == [Config(max_queue=3)]
    assert [(r.levelno, r.getMessage()) for r in caplog.records] == [(level, "Reloaded: keys.toml: 2 keys added")]


def test_a_bad_file_is_one_line_and_ends_no_other_reload(caplog: pytest.LogCaptureFixture) -> None:
    def bad() -> str:
        raise ReloadError("keys.toml: line 3: no name")

    reloads, read = Reloads(), []
    reloads.on_reload(bad)
    reloads.on_reload(lambda: read.append(1) or "")
    reloads.run(Config())
    assert read == [1]
    assert caplog.messages == ["Not reloaded: keys.toml: line 3: no name; the former content stays in use"]


@pytest.fixture
def live(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """Settings of a file, and what a reload with another content takes and logs."""
    path = tmp_path / "proxy.toml"
    caplog.set_level(logging.INFO)

    class Live:
        def __init__(self, before: str, *flags: str, **environ: str) -> None:
            path.write_text(before)
            self.settings = LiveSettings([*flags, "--config", str(path)], environ)

        def reload(self, after: str) -> tuple[Config, list[str]]:
            path.write_text(after)
            caplog.clear()
            taken = []
            self.settings.reload(lambda: taken.append(self.settings.config))
            assert len(taken) == 1
            return taken[0], [line.replace(str(path), "FILE") for line in caplog.messages]

    return Live


def test_one_line_says_what_has_changed_and_what_needs_a_restart(live) -> None:
    one = live("MAX_QUEUE = 4\nWORKERS = 2\nLOG_LEVEL = 'info'\nAPI_KEY = 'old'")
    config, lines = one.reload("MAX_QUEUE = 5\nWORKERS = 3\nLOG_LEVEL = 'debug'\nAPI_KEY = 'new'\nMAX_TRIES = 9")
    assert (config.max_queue, config.log_level, config.max_tries) == (5, "debug", 9)
    assert (config.workers, config.api_key) == (2, "old")
    assert lines == [
        "Reloaded FILE: MAX_TRIES 9 (was 3), MAX_QUEUE 5 (was 4), LOG_LEVEL debug (was info); "
        "needs a restart: WORKERS, API_KEY"
    ]
    # What needs a restart is said at each reload; a removed setting is back at its default.
    config, lines = one.reload("WORKERS = 3\nAPI_KEY = 'old'")
    assert (config.max_queue, config.max_tries, config.workers) == (4096, 3, 2)
    assert lines == [
        "Reloaded FILE: MAX_TRIES 3 (was 9), MAX_QUEUE 4096 (was 5), LOG_LEVEL info (was debug); "
        "needs a restart: WORKERS"
    ]
    config, lines = one.reload("WORKERS = 2\nAPI_KEY = 'old'")
    assert lines == ["Reloaded FILE: nothing has changed"]


def test_what_a_flag_or_the_environment_sets_stays_and_is_named(live) -> None:
    one = live("MAX_QUEUE = 4\nMAX_TRIES = 2", "--max-queue", "7", MAX_TRIES="8")
    config, lines = one.reload("MAX_QUEUE = 5\nMAX_TRIES = 3")
    assert (config.max_queue, config.max_tries) == (7, 8)
    assert lines == [
        "Reloaded FILE: without effect: MAX_TRIES (set by the environment), MAX_QUEUE (set by --max-queue)"
    ]


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ("MAX_QUEUE = 'many'", "FILE: MAX_QUEUE: must be a whole number, 0 for no limit, not 'many'"),
        ("MAX_QUEU = 1", "FILE: MAX_QUEU: there is no such setting; did you mean MAX_QUEUE?"),
        ("MAX_QUEUE =", "FILE: is not valid TOML: Invalid value (at end of document)"),
        ("ADMIN_KEY = 'a'\nAPI_KEY = 'a'", "ADMIN_KEY: must differ from API_KEY, which every client has"),
    ],
)
def test_a_bad_file_keeps_the_settings_and_is_one_line(live, bad: str, says: str) -> None:
    one = live("MAX_QUEUE = 4")
    config, lines = one.reload(bad)
    assert config.max_queue == 4
    assert lines == [f"Not reloaded: {says}; the former settings stay in use"]
    assert one.reload("MAX_QUEUE = 5")[0].max_queue == 5


def test_a_reload_does_not_open_the_proxy_to_requests_without_a_key(live) -> None:
    one = live("API_KEYS_FILE = '/keys.toml'\nMAX_QUEUE = 4")
    for emptied in ("", "MAX_QUEUE = 5", "API_KEYS_FILE = ''", "API_KEY = 'needs-a-restart'"):
        config, lines = one.reload(emptied)
        assert (config.api_keys_file, config.max_queue) == ("/keys.toml", 4)
        assert lines == [
            "Not reloaded: FILE: API_KEYS_FILE is not set any more, so requests without a key would be served; "
            "restart the proxy for that; the former settings stay in use"
        ]
    assert one.reload("API_KEYS_FILE = '/others.toml'")[0].api_keys_file == "/others.toml"
    beside = live("API_KEYS_FILE = '/keys.toml'", API_KEY="valid")
    assert beside.reload("")[0].api_keys_file == ""


def test_a_file_that_is_gone_keeps_the_settings(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "proxy.toml"
    path.write_text("MAX_QUEUE = 4")
    settings = LiveSettings([], {"CONFIG_FILE": str(path)})
    path.unlink()
    settings.reload(lambda: None)
    assert settings.config.max_queue == 4
    assert caplog.messages == [
        f"Not reloaded: {path}: cannot be read: No such file or directory (--config, CONFIG_FILE); "
        "the former settings stay in use"
    ]


def test_without_a_file_only_the_parts_read_theirs(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    taken = []
    LiveSettings([], {}).reload(lambda: taken.append(1))
    assert taken == [1]
    assert caplog.messages == ["SIGHUP: there is no configuration file (--config); the settings stay"]


@pytest.mark.parametrize("levels", [("info", "error"), ("error", "info")])
def test_the_line_is_shown_if_the_former_or_the_new_level_shows_it(
    live, caplog: pytest.LogCaptureFixture, levels: tuple[str, str], tmp_path: Path
) -> None:
    before, after = levels
    one = live(f"LOG_LEVEL = '{before}'")
    caplog.set_level(before.upper())
    (tmp_path / "proxy.toml").write_text(f"LOG_LEVEL = '{after}'")
    one.settings.reload(lambda: caplog.set_level(after.upper()))
    assert [line.partition(": ")[2] for line in caplog.messages] == [f"LOG_LEVEL {after} (was {before})"]


def test_a_worker_uses_what_the_supervisor_has_read(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    environ = {"CONFIG_FILE": str(tmp_path / "is not read")}
    worker = LiveSettings([], environ, {"MAX_QUEUE": "4"})
    assert worker.config.max_queue == 4
    assert worker.use({"MAX_QUEUE": "5"}).max_queue == 5
    # What fails only here, such as a package that is missing, does not end the worker.
    assert worker.use({"MAX_QUEUE": "many"}).max_queue == 5
    assert "Not reloaded" in caplog.text
