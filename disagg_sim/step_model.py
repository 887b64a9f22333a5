"""How long a step of an engine takes: one pure model, with the figures of one measured engine as a file.

Simulated engines (``--profile``) and the engines on a virtual clock (``bench/virtual``) use it. The proxy does not:
what it knows of its engines it learns from their answers.

A step computes the next token of every running sequence and, beside it, prompt tokens up to
``max_num_batched_tokens`` (vLLM ``v1/core/sched/scheduler.py``). Its duration is a sum::

    step_seconds (+ connector_step_seconds)                         kernels, weights, scheduler
    (+ mixed_step_seconds)                                          prompts beside running sequences
    + sequences x sequence_seconds + context x context_token_seconds    decode: KV is read
    + prompt tokens x prefill_token_seconds x (1 + context / prefill_context_tokens)
    + loads x load_seconds                                          sequences whose KV has just been loaded

A profile is a JSON object of the fields of :class:`EngineProfile`. ``disagg-proxy calibrate`` makes one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

PROFILES = Path(__file__).parent / "profiles"
"""Profiles that are installed with the package, by name without suffix."""

H200 = "h200-4b"
"""A 3.65B model on an H200, vLLM 0.33.0."""


class ProfileError(ValueError):
    """A profile cannot be read or has an invalid value; the text names the file and the field."""


@dataclass(frozen=True, slots=True)
class EngineProfile:
    """Figures of one engine. Times are in seconds, sizes in tokens.

    Attributes:
        name: of the measured engine. source: where its figures are from.
        step_seconds: a step, whatever it computes.
        connector_step_seconds: more for a step of an engine with a KV connector.
        mixed_step_seconds: more for a step that computes prompts beside running sequences, which vLLM's CUDA graphs for
            decode do not cover.
        prefill_token_seconds: a prompt token without context.
        prefill_context_tokens: context with which a prompt token takes twice as long; 0: context does not matter.
        sequence_seconds: each running sequence. context_token_seconds: each token of their context.
        load_seconds: each sequence that joins the batch with KV from another engine.
        hand_over_seconds: from the end of prefill to loaded KV, however short the prompt.
        hand_over_tokens_per_second: speed of the transfer in addition; one engine sends one prompt after another.
        request_seconds: HTTP and tokenizer, in front of a request's first step.
        delivery_seconds: how much later the tokens of a step that computes prompts reach the client, because the API
            server handles new requests meanwhile. This one and the one above are for engines on a virtual clock only; a
            simulated engine has an HTTP server of its own.
        kv_cache_tokens: size of the KV cache.
        max_num_batched_tokens, max_num_seqs: vLLM's settings of these names.
    """

    name: str
    source: str
    step_seconds: float
    connector_step_seconds: float
    mixed_step_seconds: float
    prefill_token_seconds: float
    prefill_context_tokens: float
    sequence_seconds: float
    context_token_seconds: float
    load_seconds: float
    hand_over_seconds: float
    hand_over_tokens_per_second: float
    request_seconds: float
    delivery_seconds: float
    kv_cache_tokens: int
    max_num_batched_tokens: int = 8192
    max_num_seqs: int = 256

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, str):
                continue
            least = 1 if field.name in ("kv_cache_tokens", "max_num_batched_tokens", "max_num_seqs") else 0
            if not (math.isfinite(value) and value >= least):
                raise ProfileError(f"{field.name} must be at least {least}, not {value}")
        for name in ("step_seconds", "prefill_token_seconds", "hand_over_tokens_per_second"):
            if not getattr(self, name):
                raise ProfileError(f"{name} must be above 0")

    def prefill_seconds(self, chunks: Iterable[tuple[int, int]]) -> float:
        """The part of a step that computes prompt tokens.

        Args:
            chunks: for each prompt in the step its tokens, and the tokens of it that are in the cache already.
        """
        doubles = self.prefill_context_tokens
        work = sum(n * (1 + (before + n / 2) / doubles) if doubles else float(n) for n, before in chunks)
        return work * self.prefill_token_seconds

    def decode_seconds(self, sequences: int, context: int, loads: int = 0) -> float:
        """The part of a step that generates tokens.

        Args:
            sequences: those that get their next token. context: tokens that they have in the cache, all together.
            loads: those of them that are new in the batch with KV from another engine.
        """
        return sequences * self.sequence_seconds + context * self.context_token_seconds + loads * self.load_seconds

    def fixed_seconds(self, *, connector: bool, mixed: bool) -> float:
        """The part of a step that does not depend on how much it computes.

        Args:
            mixed: whether it computes prompts and generates tokens.
        """
        more = self.connector_step_seconds if connector else 0.0
        return self.step_seconds + more + (self.mixed_step_seconds if mixed else 0.0)

    def step(
        self,
        chunks: Iterable[tuple[int, int]],
        sequences: int,
        context: int,
        loads: int = 0,
        *,
        connector: bool = False,
    ) -> float:
        """Seconds of a step; arguments as above."""
        chunks = tuple(chunks)
        fixed = self.fixed_seconds(connector=connector, mixed=bool(chunks and sequences))
        return fixed + self.prefill_seconds(chunks) + self.decode_seconds(sequences, context, loads)

    def transfer_seconds(self, tokens: int) -> float:
        """Seconds for which the KV of so many tokens occupies the sending engine's link."""
        return tokens / self.hand_over_tokens_per_second

    def hand_over(self, tokens: int) -> float:
        """Seconds from the end of prefill until decode has the KV of so many tokens, while nothing else is sent."""
        return self.hand_over_seconds + self.transfer_seconds(tokens)

    def to_json(self) -> str:
        """The text of a profile file."""
        return json.dumps(asdict(self), indent=2) + "\n"


def load_profile(name: str) -> EngineProfile:
    """Read a profile: a file, or one that is installed (:data:`H200`).

    Raises:
        ProfileError: it cannot be read, or is no valid profile.
    """
    path = Path(name)
    if not path.exists() and path.name == name and (PROFILES / f"{name}.json").exists():
        path = PROFILES / f"{name}.json"
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        installed = ", ".join(sorted(file.stem for file in PROFILES.glob("*.json")))
        raise ProfileError(f"{name}: no such file, and no installed profile (there are: {installed})") from None
    except (OSError, ValueError) as error:
        raise ProfileError(f"{name}: {error}") from None
    try:
        return _parse(found)
    except ProfileError as error:
        raise ProfileError(f"{name}: {error}") from None


def _parse(found: Any) -> EngineProfile:
    if not isinstance(found, dict):
        raise ProfileError("not a JSON object")
    known = {field.name: field for field in fields(EngineProfile)}
    if unknown := sorted(found.keys() - known.keys()):
        raise ProfileError(f"unknown field {unknown[0]}")
    for name, field in known.items():
        if name not in found:
            if isinstance(field.default, (int, float)):
                continue
            raise ProfileError(f"{name} is missing")
        value = found[name]
        wanted = {"str": str, "int": int, "float": (int, float)}[str(field.type)]
        if not isinstance(value, wanted) or isinstance(value, bool):  # type: ignore[arg-type]
            raise ProfileError(f"{name} must be {'a text' if field.type == 'str' else 'a number'}, not {value!r}")
    return EngineProfile(**found)
