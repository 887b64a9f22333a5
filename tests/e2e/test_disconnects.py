"""Where tests/e2e/test_shutdown.py looks for ``left``."""

from typing import Any

from tests.conftest import Wire


async def left(machine: Any, client: Wire) -> None:
    await machine.left(client)
