"""Reload: what SIGHUP changes in a running proxy, and how its parts get it.

``Config`` stays immutable. A reload makes a new one, in which settings that need a restart keep their running values
Every part that uses a reloadable setting gets it through a callable that was registered with
:meth:`Reloads.on_config` (``services.py`` registers for most of them), and replaces the reference or the value that it
holds. The hot path reads the same attributes as before. All callables run in one event loop iteration, and none of them
can fail, so no request sees a mixture.

A part with a file of its own, such as API keys, registers with :meth:`Reloads.on_reload` instead and reads it again.

With several workers the supervisor reads the configuration file and sends its values to the workers
(``workers/supervisor.py``); files of parts are read by each worker.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from disagg_proxy.config.model import Config

log = logging.getLogger(__name__)


class ReloadError(Exception):
    """A file cannot be used: one line with its name, what is wrong and what to change. The former content stays."""


class Reloads:
    """The parts of one process that take a reload.

    Args:
        quiet: another worker of this proxy logs what has changed, so this one logs it at DEBUG.
    """

    def __init__(self, quiet: bool = False) -> None:
        self._level = logging.DEBUG if quiet else logging.INFO
        self._on_config: list[Callable[[Config], None]] = []
        self._on_reload: list[Callable[[], str]] = []

    def on_config(self, take: Callable[[Config], None]) -> None:
        """Call ``take`` with the new configuration at each reload; it must not raise."""
        self._on_config.append(take)

    def on_reload(self, reload: Callable[[], str]) -> None:
        """Call ``reload`` at each reload, after the configuration has been taken.

        It returns what has changed, as a phrase for the log; empty for nothing. It raises :class:`ReloadError` and
        changes nothing if its file cannot be used.
        """
        self._on_reload.append(reload)

    def run(self, config: Config) -> None:
        """Reload every part."""
        for take in self._on_config:
            take(config)
        for reload in self._on_reload:
            try:
                changed = reload()
            except ReloadError as error:
                log.error("Not reloaded: %s; the former content stays in use", error)
            else:
                if changed:
                    log.log(self._level, "Reloaded: %s", changed)
