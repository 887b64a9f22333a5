"""Reload: what SIGHUP changes in a running proxy, and how its parts get it.

``Config`` stays immutable. A reload reads the configuration file again and makes a new ``Config``, in which settings
that need a restart keep their running values (:class:`LiveSettings`). Every part that uses a reloadable setting gets it
through a callable that was registered with :meth:`Reloads.on_config` (``services.py`` registers one for most of them),
and replaces the reference or the value that it holds. The hot path reads the same attributes as before. All callables
run in one event loop iteration, and none of them can fail, so no request sees a mixture.

A part with a file of its own, such as API keys, registers with :meth:`Reloads.on_reload` instead and reads it again.

With several workers the supervisor reads the configuration file and sends its values to the workers, also to those that
start later (``workers/supervisor.py``); files of parts are read by each worker.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence

from disagg_proxy.config.file import FileError, read_file
from disagg_proxy.config.load import ConfigError, Loaded, load_all
from disagg_proxy.config.model import Config
from disagg_proxy.config.table import SETTINGS, Setting

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


class LiveSettings:
    """The settings of a running proxy.

    Args:
        argv, environ: flags and environment of this process, which do not change.
        file: the content of the configuration file, see :attr:`disagg_proxy.config.load.Loaded.file`; None reads it.

    Raises:
        ConfigError: see :func:`disagg_proxy.config.load.load_all`.
    """

    def __init__(self, argv: Sequence[str], environ: Mapping[str, str], file: Mapping[str, str] | None = None) -> None:
        self._argv = argv
        self._environ = environ
        self._loaded = load_all(argv, environ, file)

    @property
    def config(self) -> Config:
        """The settings in use."""
        return self._loaded.config

    @property
    def file(self) -> Mapping[str, str]:
        """Those in the configuration file that are in use, as text."""
        return self._loaded.file

    def use(self, file: Mapping[str, str]) -> Config:
        """Use the values of the configuration file that the supervisor has read. Returns the settings in use."""
        try:
            self._loaded = load_all(self._argv, self._environ, file)
        except ConfigError as error:
            log.error("Not reloaded: %s; the former settings stay in use", error)
        return self.config

    def reload(self, take: Callable[[], None]) -> None:
        """Read the configuration file again, have ``take`` pass the settings on, and log one line about it.

        ``take`` is called also where the settings stay as they are, for the parts that read files of their own.
        """
        path, line = self.config.config_file, "SIGHUP: there is no configuration file (--config); the settings stay"
        if path:
            try:
                line = f"Reloaded {path}: {self._read_again(path)}"
            except ReloadError as error:
                line = ""
                log.error("Not reloaded: %s; the former settings stay in use", error)
        # The line is shown if either the former or the new LOG_LEVEL shows it.
        first = log.isEnabledFor(logging.INFO)
        if first and line:
            log.info("%s", line)
        take()
        if line and not first:
            log.info("%s", line)

    def _read_again(self, path: str) -> str:
        """Read the file and use what can change without a restart. Returns what has changed.

        Raises:
            ReloadError: the file cannot be used; nothing has changed.
        """
        before = self._loaded
        try:
            file = read_file(path)
            wanted = load_all(self._argv, self._environ, file)
            places = {setting.env: file if setting.reload else before.file for setting in SETTINGS}
            usable = {env: place[env] for env, place in places.items() if env in place}
            now = load_all(self._argv, self._environ, usable)
        except (FileError, ConfigError) as error:
            raise ReloadError(str(error)) from None
        # An editor may have emptied the file and not yet written it again.
        if _needs_key(before.config) and not _needs_key(now.config):
            raise ReloadError(
                f"{path}: API_KEYS_FILE is not set any more, so requests without a key would be served; "
                "restart the proxy for that"
            )
        self._loaded = now
        return "; ".join(_changes(before, self._loaded, wanted)) or "nothing has changed"


def _needs_key(config: Config) -> bool:
    return bool(config.api_key or config.api_keys_file)


def _changes(before: Loaded, now: Loaded, wanted: Loaded) -> Iterator[str]:
    """What a reload has changed, what needs a restart, and what has no effect, as phrases for the log.

    Args:
        wanted: what the proxy would use if it were started again.
    """
    changed, restart, hidden = [], [], []
    for setting in SETTINGS:
        old, new, later = (getattr(loaded.config, setting.name) for loaded in (before, now, wanted))
        if old != new:
            changed.append(f"{setting.env} {_shown(setting, now)} (was {_shown(setting, before)})")
        if new != later:
            restart.append(setting.env)
        source = wanted.sources.get(setting.name, "")
        if before.file.get(setting.env) != wanted.file.get(setting.env) and source not in ("", now.config.config_file):
            hidden.append(f"{setting.env} (set by {source})")
    if changed:
        yield ", ".join(changed)
    if restart:
        yield "needs a restart: " + ", ".join(restart)
    if hidden:
        yield "without effect: " + ", ".join(hidden)


def _shown(setting: Setting, loaded: Loaded) -> str:
    text = loaded.texts[setting.name]
    return "***" if setting.secret else text if text.isprintable() and text else repr(text)
