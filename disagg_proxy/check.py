"""``disagg-proxy check``: refuse what ``serve`` would refuse, without opening a port, and show the settings in effect.

The output is a configuration file: each setting that is not its default, and a comment with its source. Exit codes: 0
the settings are valid, 2 they are not.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import socket
import sys
from collections.abc import Iterator, Sequence

from disagg_proxy.config import Config, ConfigError, check_keys_file
from disagg_proxy.config.load import Loaded, load_all
from disagg_proxy.config.table import SETTINGS, Setting
from disagg_proxy.connectors.table import check_instances

_MASKED = '"*** masked ***"'
"""Instead of a secret. Blanks are not valid in one, so a file that still contains this is refused."""

_NUMBER = re.compile(r"(0|[1-9][0-9]*)(\.[0-9]+)?", re.ASCII)


def main(argv: Sequence[str]) -> int:
    """Check the settings of this command line and this environment. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="disagg-proxy check",
        usage="%(prog)s [--config FILE] [OPTION...]",
        description="Check the settings that 'disagg-proxy serve' would have with the same options, environment and "
        "configuration file, and print those that are not defaults, as a configuration file. Nothing is started. Exit "
        "codes: 0 they are valid, 2 'serve' would refuse them.",
        epilog="The options are those of 'disagg-proxy serve --help'.",
        allow_abbrev=False,
    )
    _, options = parser.parse_known_args(argv)
    try:
        loaded = load_all(options, os.environ)
        check_keys_file(loaded.config)
        _resolve(loaded.config)
        check_instances(loaded.config)
    except ConfigError as error:
        print(f"disagg-proxy: {error}", file=sys.stderr)
        return 2
    for line in _lines(loaded):
        print(line)
    return 0


def _resolve(config: Config) -> None:
    """
    Raises:
        ConfigError: a host name to listen on is unknown.
    """
    for name, host in (("HTTP_PROXY_HOST", config.http_host), ("PROXY_HOST", config.zmq_host)):
        try:
            socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        except OSError as error:
            raise ConfigError(f"{name}: {host} cannot be resolved: {error.strerror}") from None


def _lines(loaded: Loaded) -> Iterator[str]:
    """The settings as TOML."""
    file, default = loaded.config.config_file, Config(config_file=loaded.config.config_file)
    found = [s for s in SETTINGS if getattr(loaded.config, s.name) != getattr(default, s.name)]
    shown = [f"{setting.env} = {_value(loaded, setting)}" for setting in found]
    width = max(map(len, shown), default=0)
    yield f"# The settings are valid. Configuration file: {file or 'none'}"
    yield "# Not defaults:" if found else "# All of them are defaults."
    for setting, text in zip(found, shown, strict=True):
        source = loaded.sources[setting.name]
        yield f"{text:<{width}}  # {'file' if source == file else source}"


def _value(loaded: Loaded, setting: Setting) -> str:
    text, value = loaded.texts[setting.name], getattr(loaded.config, setting.name)
    if setting.secret:
        return _MASKED
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)) and _NUMBER.fullmatch(text):
        return text
    return json.dumps(text, ensure_ascii=False)
