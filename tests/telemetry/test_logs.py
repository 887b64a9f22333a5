"""How log lines look."""

import json
import logging
import sys
from datetime import datetime, timedelta

import pytest

from disagg_proxy.config import Config
from disagg_proxy.telemetry.logs import HideUnfinished, JsonLines, TextLines, configure_logging


def record(message: str, *args: object, exc_info=None) -> logging.LogRecord:
    return logging.LogRecord("disagg_proxy.x", logging.WARNING, __file__, 1, message, args, exc_info)


def test_a_json_line_is_one_line_with_an_absolute_time() -> None:
    line = JsonLines().format(record('two\nlines, a "quote" and %s', "中文"))
    assert "\n" not in line
    found = json.loads(line)
    assert datetime.fromisoformat(found.pop("time")).utcoffset() == timedelta(0)
    assert found == {"level": "warning", "logger": "disagg_proxy.x", "message": 'two\nlines, a "quote" and 中文'}


def test_a_traceback_stays_inside_its_json_line() -> None:
    try:
        raise ValueError("no")
    except ValueError:
        line = JsonLines().format(record("failed", exc_info=sys.exc_info()))
    assert "\n" not in line
    assert json.loads(line)["exception"].endswith("ValueError: no")


def test_a_line_about_one_request_names_it() -> None:
    about = record("failed", exc_info=None)
    about.request_id = "mine-1"
    assert json.loads(JsonLines().format(about))["request_id"] == "mine-1"
    assert TextLines("%(levelname)s %(message)s").format(about) == "WARNING failed request_id=mine-1"
    assert TextLines("%(message)s").format(record("stopping")) == "stopping"


def test_the_request_precedes_a_traceback() -> None:
    try:
        raise ValueError("no")
    except ValueError:
        about = record("failed", exc_info=sys.exc_info())
    about.request_id = "mine-1"
    first, *rest = TextLines("%(message)s").format(about).splitlines()
    assert first == "failed request_id=mine-1" and rest[-1] == "ValueError: no"


def test_a_cut_that_was_meant_is_not_reported_again_by_the_server() -> None:
    shown = HideUnfinished().filter
    assert not shown(record("ASGI callable returned without completing response."))
    assert shown(record("Exception in ASGI application\n"))


@pytest.fixture
def restored():
    """The root logger as the test runner has it, whatever a test does to it."""
    root, server = logging.getLogger(), logging.getLogger("uvicorn.error")
    before = root.level, root.handlers[:], server.filters[:], logging.getLogger("asyncio").level
    root.handlers[:] = []
    yield
    root.level, root.handlers[:], server.filters[:] = before[:3]
    logging.getLogger("asyncio").setLevel(before[3])


@pytest.mark.parametrize(("log_format", "begins"), [("text", "20"), ("json", '{"time": "20')])
def test_everything_goes_to_standard_error_in_the_chosen_form(restored, capsys, log_format, begins) -> None:
    configure_logging(Config(log_format=log_format, log_level="warning"))
    logging.getLogger("disagg_proxy.x").info("not shown")
    logging.getLogger("disagg_proxy.x").warning("shown")
    captured = capsys.readouterr()
    assert captured.err.startswith(begins) and captured.err.count("\n") == 1
    assert "shown" in captured.err and "not shown" not in captured.err and not captured.out
