"""Real nginx and Caddy as processes, with the configuration that a test gives them.

On Debian `apt-get install nginx caddy` starts both as services; `apt-get download` and `dpkg-deb -x` do not.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.conftest import soon

NGINX, CADDY = shutil.which("nginx"), shutil.which("caddy")

needs_nginx = pytest.mark.skipif(NGINX is None, reason="nginx is not on PATH; Debian's package nginx has it")
needs_caddy = pytest.mark.skipif(CADDY is None, reason="caddy is not on PATH; Debian's package caddy has it")

_NGINX = """
daemon off; master_process off; pid {folder}/pid; error_log stderr;
events {{}}
http {{
  access_log off;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
  {http}
}}
"""
_CADDY = """
{{
  admin off
  default_bind 127.0.0.1
}}
{sites}
"""


def caddy_version() -> tuple[int, ...]:
    """Major and minor version of Caddy."""
    said = subprocess.run((str(CADDY), "version"), capture_output=True, text=True, check=True).stdout
    return tuple(map(int, re.findall(r"\d+", said)[:2]))


@asynccontextmanager
async def nginx(folder: Path, port: int, http: str) -> AsyncIterator[str]:
    """Run nginx with ``http`` as content of its http block, which listens on ``port``. Yields its address."""
    settings = folder / "nginx.conf"
    settings.write_text(_NGINX.format(folder=folder, http=http))
    async with _process(folder, port, str(NGINX), "-p", str(folder), "-e", "stderr", "-c", str(settings)) as url:
        yield url


@asynccontextmanager
async def caddy(folder: Path, port: int, sites: str) -> AsyncIterator[str]:
    """Run Caddy with these sites, one of which listens on ``port``. Yields its address."""
    settings = folder / "Caddyfile"
    settings.write_text(_CADDY.format(sites=sites))
    command = (str(CADDY), "run", "--adapter", "caddyfile", "--config", str(settings))
    async with _process(folder, port, *command) as url:
        yield url


@asynccontextmanager
async def _process(folder: Path, port: int, *command: str) -> AsyncIterator[str]:
    with (folder / "stderr").open("wb") as errors:
        # Caddy stores its state there.
        environment = {**os.environ, "XDG_CONFIG_HOME": str(folder), "XDG_DATA_HOME": str(folder)}
        process = await asyncio.create_subprocess_exec(*command, stderr=errors, env=environment)
    try:
        await soon(_listening(folder, port, process))
        yield f"http://127.0.0.1:{port}"
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def _listening(folder: Path, port: int, process: asyncio.subprocess.Process) -> None:
    """Wait until a process accepts connections."""
    while True:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            assert process.returncode is None, (folder / "stderr").read_text()
            await asyncio.sleep(0.02)
        else:
            writer.close()
            return
