"""Proof of an announcement: WELCOME to a control connection says which announcement the engine sends.

An announcement (``disagg_kv.engine.announce``) is not signed. WELCOME has a digest of its fields in ``announced``, and
the proof of the handshake covers WELCOME. So a proxy that shares the secret can check that role, HTTP address, KV
address, boot id and shape in an announcement are those of the engine that listens at the announced KV address.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from disagg_kv.protocol.handshake import Refused

ANNOUNCED = "announced"
"""Field of WELCOME."""

CHANGING = ("kv_links", "power")
"""Fields of an announcement that differ from one ping to the next; they are not proven."""


def digest_of(fields: Mapping[str, Any], without: Sequence[str] = CHANGING) -> str:
    """Return the digest of all fields of an announcement but those in ``without``.

    Raises:
        ValueError: a value cannot be part of an announcement.
    """
    kept = {name: value for name, value in fields.items() if name not in without}
    try:
        text = json.dumps(kept, sort_keys=True, separators=(",", ":"))
    except (TypeError, ValueError) as error:
        raise ValueError(f"not an announcement: {error}") from None
    return hashlib.sha256(text.encode()).hexdigest()


def announced_field(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the value of ``ANNOUNCED`` in WELCOME: the digest, and which fields it leaves out."""
    return {"digest": digest_of(fields), "without": list(CHANGING)}


def check_announced(value: object, fields: Mapping[str, Any]) -> list[str]:
    """Check an announcement against ``ANNOUNCED`` of a WELCOME whose proof was right.

    Returns:
        The names of the fields that are not proven.

    Raises:
        Refused: the engine did not send this announcement, or its release proves none.
        ValueError: the announcement has a value that no engine sends.
    """
    without = value.get("without") if isinstance(value, dict) else None
    if not isinstance(value, dict) or not isinstance(without, list) or len(without) > 64:
        raise Refused("the engine's release of disagg_kv does not prove announcements")
    names = [str(name) for name in without]
    if digest_of(fields, names) != value.get("digest"):
        raise Refused("the engine at this KV address did not send this announcement")
    return names
