"""The handshake: who talks, whether their caches fit, which transport, and proof of the shared secret.

Decode (or the proxy, as ``control``) connects and says HELLO; prefill answers WELCOME with its own proof, the other
side answers PROOF, prefill says READY. Each proof is an HMAC-SHA256 over both nonces and both texts, with the
prover's role in front, so that neither can be replayed or reflected. Without a secret the proofs are empty texts.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from disagg_kv import PROTOCOL_NAME, PROTOCOL_VERSION
from disagg_kv.protocol.frames import WireError

ROLES = ("prefill", "decode", "control")


class Refused(Exception):
    """The two sides cannot work together; the text says why, for a person."""


@dataclass(frozen=True)
class Shape:
    """What must be equal on both sides for a block to mean the same thing."""

    model: str
    dtype: str
    block_size: int
    """Tokens of one block."""
    layout: str
    """Text of ``disagg_kv.engine.layout``: planes of a layer and the bytes of a block in each."""
    planes: int
    block_bytes: int
    """Bytes of one block over all planes of this rank."""
    tp: int
    digest: str | None = None
    """Stands for the model's weights and configuration (``disagg_kv.engine.digest``) or its ``model_version``. "" where
    there is none, None from an engine of a release without this field."""


@dataclass(frozen=True)
class Identity:
    """One rank of one engine."""

    role: str
    boot: str
    """Differs for every process; tells a restart from a reconnect."""
    rank: int
    shape: Shape | None
    """None for the proxy."""

    def to_wire(self) -> dict[str, Any]:
        return {"name": PROTOCOL_NAME, "version": PROTOCOL_VERSION, **asdict(self)}

    @classmethod
    def from_wire(cls, body: Mapping[str, Any]) -> Identity:
        """WireError if it is no identity, Refused if it is one of another version."""
        if body.get("name") != PROTOCOL_NAME:
            raise WireError("not this protocol")
        if body.get("version") != PROTOCOL_VERSION:
            raise Refused(f"protocol version {str(body.get('version'))[:20]}, here {PROTOCOL_VERSION}")
        role, boot, rank, shape = (body.get(name) for name in ("role", "boot", "rank", "shape"))
        if role not in ROLES or not isinstance(boot, str) or len(boot) > 64:
            raise WireError("not an identity")
        if not isinstance(rank, int) or isinstance(rank, bool) or not 0 <= rank < 4096:
            raise WireError("not a rank")
        return cls(role, boot, rank, None if shape is None else _shape(shape))


def _shape(value: object) -> Shape:
    if not isinstance(value, dict):
        raise WireError("not a shape")
    fields: dict[str, Any] = {}
    for name, kind in (("model", str), ("dtype", str), ("block_size", int), ("layout", str), ("planes", int),
                       ("block_bytes", int), ("tp", int)):  # fmt: skip
        field = value.get(name)
        if not isinstance(field, kind) or isinstance(field, bool):
            raise WireError(f"the shape's {name} is missing or wrong")
        fields[name] = field
    digest = value.get("digest")
    if digest is not None and (not isinstance(digest, str) or len(digest) > 64):
        raise WireError("the shape's digest is wrong")
    return Shape(**fields, digest=digest)


def _same_model(mine: Shape, theirs: Shape) -> str:
    """What differs between the models, by digest, or by name where one side has no digest; "" if nothing does."""
    if mine.digest and theirs.digest:
        if mine.digest == theirs.digest:
            return ""
        return (f"model is {theirs.model}@{theirs.digest[:12]}, here {mine.model}@{mine.digest[:12]} "
                "(other weights or configuration)")  # fmt: skip
    return "" if mine.model == theirs.model else f"model is {theirs.model}, here {mine.model}"


def check(mine: Identity, theirs: Identity) -> None:
    """Refused, naming every difference, unless blocks of one side can be used by the other."""
    if theirs.role == "control":
        return
    if {mine.role, theirs.role} != {"prefill", "decode"}:
        raise Refused(f"{theirs.role} cannot exchange KV with {mine.role}")
    if mine.shape is None or theirs.shape is None:
        raise Refused("the shape of the KV cache is missing")
    ours, others = asdict(mine.shape), asdict(theirs.shape)
    wrong = [said] if (said := _same_model(mine.shape, theirs.shape)) else []
    wrong += [f"{name} is {others[name]}, here {ours[name]}" for name in ours
              if name not in ("model", "digest") and ours[name] != others[name]]  # fmt: skip
    if mine.rank != theirs.rank:
        wrong.append(f"rank is {theirs.rank}, here {mine.rank}")
    if wrong:
        raise Refused("; ".join(wrong))


def choose_transport(mine: Sequence[str], theirs: object) -> str:
    """The first of mine that the other side has too. Refused if there is none."""
    offered = theirs if isinstance(theirs, list) else []
    for name in mine:
        if name in offered:
            return name
    raise Refused(f"no common transport: {', '.join(map(str, offered))[:80] or 'none'}, here {', '.join(mine)}")


def nonce() -> str:
    return secrets.token_hex(16)


def proof(secret: str, role: str, hello: Mapping[str, Any], welcome: Mapping[str, Any]) -> str:
    """What only a side that knows the secret can say; "" without a secret. ``welcome`` is taken without its proof."""
    if not secret:
        return ""
    said = {name: value for name, value in welcome.items() if name != "proof"}
    text = json.dumps([role, hello, said], sort_keys=True, separators=(",", ":"))
    return hmac.new(secret.encode(), text.encode(), hashlib.sha256).hexdigest()


def check_proof(expected: str, value: object) -> None:
    """Refused unless the value is the expected proof."""
    if not isinstance(value, str) or not hmac.compare_digest(expected.encode(), value.encode(errors="replace")):
        raise Refused("the shared secret differs")
