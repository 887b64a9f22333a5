"""``disagg-proxy check``: the verdict of ``serve`` on its settings, and the settings as a configuration file."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from disagg_proxy import cli
from disagg_proxy.config.load import load_all


@pytest.fixture(autouse=True)
def _nothing_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(*args: object, **more: object) -> None:
        raise AssertionError("a port was opened")

    monkeypatch.setattr("socket.socket.bind", opened)
    monkeypatch.setattr("socket.socket.listen", opened)

    def resolve(host: str, *args: object, **more: object) -> list[object]:
        if host.endswith(".invalid"):
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return []

    monkeypatch.setattr("socket.getaddrinfo", resolve)


def test_what_is_no_default_is_shown_with_its_source(capsys, monkeypatch, tmp_path: Path) -> None:
    file = tmp_path / "proxy.toml"
    file.write_text(
        "MAX_QUEUE = 5\nMAX_TRIES = 3\nQUEUE_TIMEOUT = 2.50\nMAX_BODY_BYTES = '1M'\nAPI_KEY = 'hush'\n"
        "PREFILL_INSTANCES = ['http://a:1', 'http://b:2']\nDECODE_ALONE = false\n"
    )
    monkeypatch.setenv("MAX_QUEUE", "6")
    monkeypatch.setenv("LOG_LEVEL", "debug")
    monkeypatch.setenv("ADMIN_KEY", "secret")
    assert cli.main(["check", "--config", str(file), "--http-port", "0", "--log-level", "error"]) == 0
    assert capsys.readouterr().out == (
        f"# The settings are valid. Configuration file: {file}\n"
        "# Not defaults:\n"
        "HTTP_PROXY_PORT = 0                          # --http-port\n"
        'PREFILL_INSTANCES = "http://a:1 http://b:2"  # file\n'
        'MAX_BODY_BYTES = "1M"                        # file\n'
        "DECODE_ALONE = false                         # file\n"
        "MAX_QUEUE = 6                                # the environment\n"
        "QUEUE_TIMEOUT = 2.5                          # file\n"
        'API_KEY = "*** masked ***"                   # file\n'
        'ADMIN_KEY = "*** masked ***"                 # the environment\n'
        'LOG_LEVEL = "error"                          # --log-level\n'
    )


def test_without_any_setting_all_are_defaults(capsys) -> None:
    assert cli.main(["check"]) == 0
    assert capsys.readouterr().out == (
        "# The settings are valid. Configuration file: none\n# All of them are defaults.\n"
    )


def test_the_output_is_a_configuration_file(capsys, tmp_path: Path) -> None:
    flags = [
        "--http-port", "0", "--access-log", "-", "--cors-origins", "https://a.example,https://b.example",
        "--prefill", "http://a:1,b:2", "--prefill", "http://c:3,nixl", "--max-body-bytes", "1M", "--load-bound", "1.5",
        "--decode-alone", "off", "--queue-timeout", "1e2", "--session-header", "X-S", "--workers", "2",
    ]  # fmt: skip
    assert cli.main(["check", *flags]) == 0
    file = tmp_path / "proxy.toml"
    file.write_text(capsys.readouterr().out)
    shown, meant = load_all(["--config", str(file)], {}), load_all([*flags, "--config", str(file)], {})
    assert shown.config == meant.config and len(shown.file) == 10


def test_a_masked_key_is_not_taken_for_a_key(capsys, tmp_path: Path) -> None:
    assert cli.main(["check", "--api-key", "hush"]) == 0
    file = tmp_path / "proxy.toml"
    file.write_text(capsys.readouterr().out)
    assert cli.main(["check", "--config", str(file)]) == 2
    assert f"{file}: API_KEY: must be printable ASCII without spaces" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "content", "says"),
    [
        ([], "MAX_QUEU = 1", "MAX_QUEU: there is no such setting; did you mean MAX_QUEUE?"),
        ([], "API_KEY = 'a'\nADMIN_KEY = 'a'", "ADMIN_KEY: must differ from API_KEY"),
        (["--max-queue", "many"], "", "--max-queue: must be a whole number"),
        (["--nonsense"], "", "unrecognized arguments: --nonsense (see --help)"),
        (
            ["--http-host", "no.such.host.invalid"],
            "",
            "HTTP_PROXY_HOST: no.such.host.invalid cannot be resolved: Name or service not known",
        ),
        (
            ["--zmq-host", "no.such.host.invalid"],
            "",
            "PROXY_HOST: no.such.host.invalid cannot be resolved: Name or service not known",
        ),
    ],
)
def test_what_serve_would_refuse_is_one_line_and_2(capsys, tmp_path: Path, argv: list[str], content: str, says) -> None:
    file = tmp_path / "proxy.toml"
    file.write_text(content)
    assert cli.main(["check", "--config", str(file), *argv]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("disagg-proxy: ") and says in captured.err and captured.err.count("\n") == 1
    assert not captured.out


def test_the_command_as_a_process(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "disagg_proxy", "check", "--workers", "2"],
        env={"PATH": os.environ["PATH"], "LOG_LEVEL": "loud"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "disagg-proxy: LOG_LEVEL: must be one of debug, info, warning, error, not 'loud'\n"
