"""Configuration: the one table of settings, how a value is read, and the finished ``Config``."""

from disagg_proxy.config.load import ConfigError, load
from disagg_proxy.config.model import Config, StaticInstance

__all__ = ["Config", "ConfigError", "StaticInstance", "load"]
