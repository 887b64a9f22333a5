"""Reads the TOML files of the proxy: the configuration file and the file of keys.

A running proxy reads both again in its event loop, so whatever could make it wait, such as a FIFO, is refused.
"""

from __future__ import annotations

import os
import stat
import sys
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def read_toml(path: str, max_bytes: int) -> dict[str, Any]:
    """The content of the TOML file at ``path``.

    Args:
        max_bytes: size of the file at most.

    Raises:
        OSError: it cannot be opened or read.
        ValueError: it is not a regular file, is too large, or is not TOML. The text says which, without the path.
    """
    with open(path, "rb", opener=_open) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("is not a regular file")
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise ValueError(f"is larger than {max_bytes} bytes; is it the right file?")
    try:
        found: dict[str, Any] = tomllib.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 text (byte {error.start})") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not valid TOML: {error}") from None
    return found


def _open(path: str, flags: int) -> int:
    # Without O_NONBLOCK, opening a FIFO waits until somebody opens it for writing.
    return os.open(path, flags | os.O_NONBLOCK)
