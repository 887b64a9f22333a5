"""Configuration: the table of settings, how values are read, and the resulting ``Config``."""

from disagg_proxy.config.load import ConfigError, check_keys_file, load
from disagg_proxy.config.model import Config, StaticInstance

__all__ = ["Config", "ConfigError", "StaticInstance", "check_keys_file", "load"]
