"""Where an engine runs, and which transports two engines can use for that. Pure, but for ``host_mark``.

Both sides send their ``Place`` in HELLO and WELCOME. Engines of older releases do not; they use NCCL or TCP.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from disagg_kv.protocol.frames import WireError

FIELD = "place"
"""Its name in HELLO and WELCOME."""
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_MAX_TEXT = 120


@dataclass(frozen=True)
class Place:
    """One rank's process."""

    host: str = ""
    """``host_mark`` of its host, "" if it is unknown."""
    gpu: str = ""
    """UUID of its GPU or MIG partition, "" on a CPU."""
    partition: bool = False
    """Whether ``gpu`` is a MIG partition."""
    without: Mapping[str, str] = field(default_factory=dict)
    """Transports that this process cannot use, with the reasons."""

    def to_wire(self) -> dict[str, Any]:
        without = {name: reason[:_MAX_TEXT] for name, reason in self.without.items()}
        return {"host": self.host, "gpu": self.gpu, "partition": self.partition, "without": without}

    @classmethod
    def from_wire(cls, value: object) -> Place:
        """Decode the field ``place``; an unknown place if the other release does not send one.

        Raises:
            WireError: malformed.
        """
        if value is None:
            return cls()
        if not isinstance(value, dict):
            raise WireError("not a place")
        host, gpu, without = value.get("host"), value.get("gpu"), value.get("without")
        if not isinstance(host, str) or not isinstance(gpu, str) or not isinstance(without, dict):
            raise WireError("not a place")
        reasons = {str(name)[:20]: str(reason)[:_MAX_TEXT] for name, reason in list(without.items())[:8]}
        return cls(host[:64], gpu[:64], value.get("partition") is True, reasons)


def host_mark() -> str:
    """Return what processes of one boot of one host have in common, also in different containers; "" if unknown."""
    try:
        boot = _BOOT_ID.read_bytes().strip()
    except OSError:
        return ""
    return hashlib.sha256(b"disagg_kv " + boot).hexdigest()[:16]


def rank_transports(names: Sequence[str], prefill: Place, decode: Place) -> tuple[list[str], dict[str, str]]:
    """Return which of ``names`` these two engines may use, in the order of ``names``, and why others are left out.

    What remains may still fail to open: containers without a common IPC or PID namespace, for example, have one host.
    """
    left_out = {name: why for name in names if (why := _obstacle(name, prefill, decode))}
    usable = [name for name in names if name not in left_out]
    # A transport that is required by the settings is tried, so that its own error is reported.
    return (usable, left_out) if usable else (list(names), {})


def _obstacle(name: str, prefill: Place, decode: Place) -> str:
    for side, place in (("prefill", prefill), ("decode", decode)):
        if reason := place.without.get(name):
            return f"{reason} (on {side})"
    one_gpu = prefill.gpu != "" and prefill.gpu == decode.gpu
    if name == "nccl" and one_gpu:
        return f"both engines use {prefill.gpu[:12]}"
    if name != "ipc" or one_gpu:
        return ""
    if not prefill.host or not decode.host:
        return "one engine does not say on which host it is"
    if prefill.host != decode.host:
        return "the engines are on different hosts"
    if bool(prefill.gpu) != bool(decode.gpu):
        return "one engine has a GPU, the other has none"
    if prefill.partition or decode.partition:
        return "MIG partitions cannot map the memory of others"
    return ""
