"""The proxies that are compared: where each comes from, how it is started, and what it does of the job."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from bench.proxy.machine import ROOT, free_port

OURS = "ours"
COMPILED = "ours-compiled"
DIRECT = "direct"
REFERENCE = "reference"
EXAMPLE = "vllm-example"


class Missing(Exception):
    """A peer cannot be had here, and why."""


@dataclass(frozen=True)
class Place:
    """Where one peer runs: its ports and those of the engines, and the directory of its programs."""

    prefill: int
    decode: int
    programs: Path
    http: int = field(default_factory=free_port)
    zmq: int = field(default_factory=free_port)
    metrics: int = field(default_factory=free_port)

    def python(self, *arguments: str) -> list[str]:
        """A command of the peer's own Python."""
        return [str(self.programs / "python"), *arguments]


@dataclass(frozen=True)
class Peer:
    """One proxy.

    Attributes:
        command: of its process; None where clients talk to the engines themselves.
        requirements: installed into a separate environment; none if the running Python has all of them.
        environment: variables on top of the present ones, for the installation too.
        pings: engines register by ZMQ; otherwise the command names them.
        hides: clients never see the internal request id, and cached tokens are prefill's.
        prefill_one: prefill gets the client's max_tokens and stops after one token itself, as an SGLang engine does.
        ports: HTTP and ZMQ, where they are fixed.
    """

    name: str
    title: str
    command: Callable[[Place], list[str]] | None
    requirements: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    pings: bool = True
    hides: bool = False
    prefill_one: bool = False
    ports: tuple[int, int] | None = None
    notes: str = ""

    def install(self, environments: Path) -> Path:
        """Make its environment unless it is there; the directory of its programs.

        Raises:
            Missing: the packages cannot be installed.
        """
        if not self.requirements:
            return Path(sys.executable).parent
        home = environments / self.name
        stamp = home / "installed"
        wanted = "\n".join((sys.version, *self.requirements, _sources() if str(ROOT) in self.requirements else ""))
        if not stamp.exists() or stamp.read_text() != wanted:
            for command in (
                [sys.executable, "-m", "venv", "--clear", str(home)],
                [str(home / "bin/python"), "-m", "pip", "install", "--disable-pip-version-check", *self.requirements],
            ):
                done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **self.environment})
                if done.returncode:
                    last = (done.stderr or done.stdout).strip().splitlines()[-1:]
                    raise Missing(f"cannot be installed: {''.join(last)}")
            stamp.write_text(wanted)
        return home / "bin"

    def place(self, prefill: int, decode: int, programs: Path) -> Place:
        """Fresh ports, or its own."""
        if self.ports:
            return Place(prefill, decode, programs, *self.ports)
        return Place(prefill, decode, programs)


def _sources() -> str:
    """A digest of what is built."""
    digest = hashlib.sha256()
    for path in (ROOT / "setup.py", *sorted((ROOT / "disagg_proxy").rglob("*.py"))):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _ours(place: Place, options: tuple[str, ...], *program: str) -> list[str]:
    """With limits that are accounted for but never reached, so that no request waits for capacity."""
    limits = {
        "max-in-flight": 16384,
        "prefill-max-in-flight": 8192,
        "decode-max-in-flight": 8192,
        "kv-buffer-bytes": 10**15,
        "kv-bytes-per-token": 327680,
    }
    ports = {"http-port": place.http, "zmq-port": place.zmq}
    flags = [f"--{name}={value}" for name, value in {**ports, **limits}.items()]
    return [
        *(program or (sys.executable, "-m", "disagg_proxy")),
        *("--http-host=127.0.0.1", "--zmq-host=127.0.0.1", "--log-level=info"),
        *flags,
        *options,
    ]


def _vllm_router(place: Place) -> list[str]:
    discovery = ("--vllm-pd-disaggregation", "--vllm-discovery-address", f"127.0.0.1:{place.zmq}")
    return [str(place.programs / "vllm-router"), *discovery, *_router_options(place)]


def _smg(place: Place) -> list[str]:
    engines = (
        *("--pd-disaggregation", "--prefill", f"http://127.0.0.1:{place.prefill}", "none"),
        *("--decode", f"http://127.0.0.1:{place.decode}", "--worker-startup-check-interval", "1"),
    )
    return [str(place.programs / "smg"), "launch", *engines, *_router_options(place), "--log-level", "warn"]


def _router_options(place: Place) -> tuple[str, ...]:
    return (
        *("--host", "127.0.0.1", "--port", str(place.http), "--policy", "round_robin"),
        *("--prometheus-port", str(place.metrics), "--max-concurrent-requests", "8192"),
    )


def peers(example: Path | None = None, options: tuple[str, ...] = ()) -> dict[str, Peer]:
    """All of them by name.

    Args:
        example: vLLM's example proxy, ``disagg_proxy_p2p_nccl_xpyd.py``.
        options: more flags for this project's proxy.
    """
    known = [
        Peer(OURS, "this proxy", lambda place: _ours(place, options), hides=True, notes="limits, metrics, log at info"),
        Peer(
            COMPILED,
            "this proxy, compiled",
            # By its command: with -m the folder it is run in would come first.
            lambda place: _ours(place, options, str(place.programs / "disagg-proxy")),
            requirements=(str(ROOT),),
            environment={"DISAGG_PROXY_COMPILE": "1"},
            hides=True,
            notes="the same, built with DISAGG_PROXY_COMPILE=1",
        ),
        Peer(
            "vllm-router",
            "vllm-router 0.1.17 (Rust)",
            _vllm_router,
            requirements=("vllm-router==0.1.17",),
            notes="the same job: pings, P then D; shows the internal id, leaves cached tokens out",
        ),
        Peer(
            "smg",
            "smg 1.13.0 (Rust)",
            _smg,
            requirements=("smg==1.13.0",),
            pings=False,
            prefill_one=True,
            notes="successor of sglang-router: static pair, both legs at once, no request id for vLLM; log at warn",
        ),
        Peer(
            REFERENCE,
            "Quart + uvicorn + aiohttp",
            lambda place: [
                *(sys.executable, "-m", "bench.proxy.reference"),
                *("--port", str(place.http), "--zmq-port", str(place.zmq)),
            ],
            notes="bench/proxy/reference.py: the least that does P then D; shows the internal id",
        ),
        Peer(DIRECT, "no proxy", None, pings=False, notes="clients ask P, then D, themselves"),
    ]
    if example:
        known.append(
            Peer(
                EXAMPLE,
                "vLLM's example proxy",
                lambda place: place.python(str(example.resolve())),
                requirements=("quart", "aiohttp", "pyzmq", "msgpack"),
                environment={"OPENAI_API_KEY": "none"},
                ports=(10001, 30001),
                notes="as it ships",
            )
        )
    return {peer.name: peer for peer in known}
