"""The handshake: identities, compatibility of the caches, choice of a transport, proof of the shared secret.

Decode (or the proxy, as ``control``) connects and sends HELLO, prefill answers WELCOME with its proof, the other side
sends PROOF, prefill sends READY. Each proof is an HMAC-SHA256 over both messages with their nonces, prefixed with the
prover's role, so that it can be neither replayed nor reflected. Without a secret proofs are empty strings.
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
NO_SECRET = "none"
"""``secret_mark`` of an engine without a secret."""


class Refused(Exception):
    """The two sides are incompatible; the text is the reason, for a person."""


@dataclass(frozen=True)
class Shape:
    """What must be equal on both sides for a block to have the same meaning."""

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
    """Digest of weights and configuration (``disagg_kv.engine.digest``) or of ``model_version``; "" if there is none,
    None from an engine whose release has no such field."""


@dataclass(frozen=True)
class Identity:
    """One rank of one engine."""

    role: str
    boot: str
    """Boot id: unique per process, tells a restart from a reconnect."""
    rank: int
    shape: Shape | None
    """None for the proxy."""

    def to_wire(self) -> dict[str, Any]:
        return {"name": PROTOCOL_NAME, "version": PROTOCOL_VERSION, **asdict(self)}

    @classmethod
    def from_wire(cls, body: Mapping[str, Any]) -> Identity:
        """Decode HELLO or WELCOME.

        Raises:
            WireError: not an identity.
            Refused: another protocol version.
        """
        if body.get("name") != PROTOCOL_NAME:
            raise WireError("not this protocol")
        if body.get("version") != PROTOCOL_VERSION:
            role = body["role"] if body.get("role") in ROLES else "the other side"
            raise Refused(f"protocol version is {str(body.get('version'))[:20]} on {role}, not {PROTOCOL_VERSION}")
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
            raise WireError(f"the shape's {name} is missing or invalid")
        fields[name] = field
    digest = value.get("digest")
    if digest is not None and (not isinstance(digest, str) or len(digest) > 64):
        raise WireError("the shape's digest is invalid")
    return Shape(**fields, digest=digest)


def _same_model(prefill: Shape, decode: Shape) -> str:
    """Describe how the models differ, by digest, or by name where one side has no digest; "" if they are equal."""
    if prefill.digest and decode.digest:
        if prefill.digest == decode.digest:
            return ""
        names = (f"{shape.model}@{str(shape.digest)[:12]}" for shape in (prefill, decode))
        return "model is {}, on decode {} (other weights or configuration)".format(*names)
    return "" if prefill.model == decode.model else f"model is {prefill.model}, on decode {decode.model}"


def check(mine: Identity, theirs: Identity) -> None:
    """Check that blocks of one side can be used by the other.

    Raises:
        Refused: they cannot; the text names every difference, in the same words on both sides.
    """
    if theirs.role == "control":
        return
    if {mine.role, theirs.role} != {"prefill", "decode"}:
        raise Refused(f"{theirs.role} cannot exchange KV with {mine.role}")
    if mine.shape is None or theirs.shape is None:
        raise Refused("the shape of the KV cache is missing")
    prefill, decode = (mine, theirs) if mine.role == "prefill" else (theirs, mine)
    assert prefill.shape is not None and decode.shape is not None
    wrong = [differs] if (differs := _same_model(prefill.shape, decode.shape)) else []
    theirs_of = {**asdict(decode.shape), "rank": decode.rank}
    wrong += [f"{name} is {value}, on decode {theirs_of[name]}"
              for name, value in {**asdict(prefill.shape), "rank": prefill.rank}.items()
              if name not in ("model", "digest") and value != theirs_of[name]]  # fmt: skip
    if wrong:
        raise Refused("; ".join(wrong))


def choose_transport(mine: Sequence[str], theirs: object) -> str:
    """Return prefill's choice: the first of ``mine`` that decode offers.

    Raises:
        Refused: there is none.
    """
    offered = theirs if isinstance(theirs, list) else []
    for name in mine:
        if name in offered:
            return name
    theirs_text = ", ".join(map(str, offered))[:80] or "none"
    raise Refused(f"no common transport: prefill has {', '.join(mine)}, decode {theirs_text}")


def nonce() -> str:
    return secrets.token_hex(16)


def proof(secret: str, role: str, hello: Mapping[str, Any], welcome: Mapping[str, Any]) -> str:
    """Return the HMAC that proves the secret, "" without one. The proof inside ``welcome`` is not covered."""
    if not secret:
        return ""
    covered = {name: value for name, value in welcome.items() if name != "proof"}
    text = json.dumps([role, hello, covered], sort_keys=True, separators=(",", ":"))
    return hmac.new(secret.encode(), text.encode(), hashlib.sha256).hexdigest()


def secret_mark(secret: str) -> str:
    """Return what an engine announces of its secret, so that the proxy sees which engines share one.

    8 hexadecimal digits, or ``NO_SECRET``. Proofs in handshakes, which any peer gets, tell more about the secret.
    """
    if not secret:
        return NO_SECRET
    return hmac.new(secret.encode(), b"disagg_kv announcement", hashlib.sha256).hexdigest()[:8]


def check_proof(expected: str, value: object) -> None:
    """Compare in constant time.

    Raises:
        Refused: the value is not the expected proof.
    """
    if not isinstance(value, str) or not hmac.compare_digest(expected.encode(), value.encode(errors="replace")):
        raise Refused("the shared secret differs")
