"""Who takes a reload, and what is logged of it."""

from __future__ import annotations

import logging

import pytest

from disagg_proxy.config import Config
from disagg_proxy.config.reload import ReloadError, Reloads


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
