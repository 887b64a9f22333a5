"""The shared secret of engines and proxy: where it is read from."""

from __future__ import annotations

from pathlib import Path

SECRET_VARIABLE = "DISAGG_KV_SECRET"
SECRET_FILE_VARIABLE = "DISAGG_KV_SECRET_FILE"


def read_secret(path: str) -> str:
    """Read a shared secret: the first line of a file, without surrounding white space.

    Raises:
        ValueError: the file cannot be read, or its first line is empty.
    """
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {error}") from None
    if not lines or not lines[0].strip():
        raise ValueError(f"{path}: its first line is empty")
    return lines[0].strip()
