"""Stand-ins for `vllm` and `nvidia-smi` on PATH.

The stub `vllm` has the files of a version that the script looks at, writes down how it was started, and then becomes
a simulated engine on the ports it was given.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from tests.script.machine import REPOSITORY

_PROGRAM = """\
import json, os, sys, time
words = sys.argv[1:]
record = {{"argv": words, "env": dict(os.environ), "time": time.monotonic()}}
path = os.path.join({records!r}, f"{{os.getpid()}}.json")
with open(path + ".new", "w") as file:
    json.dump(record, file)
os.rename(path + ".new", path)
value = lambda flag: words[words.index(flag) + 1]
if words[0] != "serve":
    print("stub vllm", *words)
    if "--save-result" in words:
        # As vLLM writes it with --save-detailed: requests of 4 tokens, in time.
        count = int(value("--num-prompts"))
        lists = {{"ttfts": 0.05, "itls": [0.01] * 3, "input_lens": 8, "output_lens": 4, "errors": ""}}
        result = {{name: [one] * count for name, one in lists.items()}}
        with open(os.path.join(value("--result-dir"), value("--result-filename")), "w") as file:
            json.dump({{"duration": count / float(value("--request-rate")), **result}}, file)
    sys.exit(0)
os.chdir({repository!r})
names = words[words.index("--served-model-name") + 1 : words.index("--dtype")]
models = [word for name in names for word in ("--model", name)]
if "--kv-transfer-config" not in words:
    os.environ.pop("PYTHONPATH", None)
    os.execv({python!r}, [{python!r}, "-m", "disagg_sim", "--role", "decode", "--connector", "disagg_kv",
        "--host", value("--host"), "--port", value("--port"), "--kv-port", "0", *models])
transfer = json.loads(value("--kv-transfer-config"))
extra = transfer["kv_connector_extra_config"]
os.environ.pop("PYTHONPATH", None)
os.execv({python!r}, [{python!r}, "-m", "disagg_sim",
    "--role", {{"kv_producer": "prefill", "kv_consumer": "decode"}}[transfer["kv_role"]],
    "--host", value("--host"), "--port", value("--port"), "--kv-port", str(transfer["kv_port"]),
    "--proxy", extra["proxy_ip"] + ":" + str(extra["proxy_port"]), "--ping-seconds", "0.2",
    "--startup-seconds", os.environ.get("STUB_STARTUP", "0"),
    *models])
"""


def write_program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


class Stubs:
    """A folder of programs; ``path`` is what PATH must be."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bin = folder / "bin"
        self.records = folder / "records"
        self.records.mkdir(parents=True)
        self.bin.mkdir()
        self.path = f"{self.bin}:{os.environ['PATH']}"

    def vllm(self, version: str, connector: bool = True, randomises: bool = False, switch: bool = False) -> None:
        """A vLLM of this version, run by a Python of its own."""
        site = self.folder / "site"
        package = site / "vllm"
        (package / "v1/engine").mkdir(parents=True)
        (package / "__init__.py").write_text("raise RuntimeError('nobody may import this')\n")
        processor = "request.request_id += random_uuid()\n" if randomises else "pass\n"
        (package / "v1/engine/input_processor.py").write_text(processor)
        (package / "envs.py").write_text("VLLM_DISABLE_REQUEST_ID_RANDOMIZATION = False\n" if switch else "")
        if connector:
            (package / "distributed/kv_transfer/kv_connector/v1/p2p").mkdir(parents=True)
            (package / "distributed/kv_transfer/kv_connector/v1/p2p/p2p_nccl_connector.py").write_text("")
        info = site / f"vllm-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
        python = self.folder / "own/python3"
        write_program(
            python,
            f'#!/bin/sh\nPYTHONPATH={shlex.quote(str(site))}${{PYTHONPATH:+:$PYTHONPATH}} exec {sys.executable} "$@"\n',
        )
        program = _PROGRAM.format(records=str(self.records), repository=str(REPOSITORY), python=sys.executable)
        write_program(self.bin / "vllm", f"#!{python}\n{program}")

    def vllm_that_only_tells_its_version(self, version: str) -> None:
        write_program(self.bin / "vllm", f"#!/bin/sh\necho 'INFO something'\necho 'vLLM {version}'\n")

    def nvidia_smi(self, count: int, total: int = 81559, free: int = 81000, link: str = "NV18") -> None:
        """That many GPUs, all connected by ``link``; memory in MiB."""
        lines = "".join(f"{i}, GPU-{i:04d}-aaaa, NVIDIA Stub {i}, {total}, {free}\n" for i in range(count))

        def matrix(entry: str) -> str:
            names = [f"GPU{i}" for i in range(count)]
            rows = ["\t".join(["", *names, "CPU Affinity", "NUMA Affinity"])]
            for i, name in enumerate(names):
                rows.append("\t".join([name, *(" X " if i == j else entry for j in range(count)), "0-15", "0"]))
            return "\n".join(rows) + "\n"

        (self.folder / "gpus.csv").write_text(lines)
        (self.folder / "topo").write_text(matrix(link))
        (self.folder / "p2p").write_text(matrix("OK"))
        write_program(
            self.bin / "nvidia-smi",
            f"""#!/bin/sh
case "$1 $2" in
  --query-gpu=index,uuid,name,memory.total,memory.free*) cat '{self.folder}/gpus.csv' ;;
  'topo -m') cat '{self.folder}/topo' ;;
  'topo -p2p') cat '{self.folder}/p2p' ;;
  *) exit 3 ;;
esac
""",
        )

    def started(self) -> list[dict[str, Any]]:
        """What was started, in order."""
        found = [json.loads(path.read_text()) for path in self.records.glob("*.json")]
        return sorted(found, key=lambda record: float(record["time"]))
