"""What one client key permits, and what is left of its limits. The rules for clients: docs/keys.md.

A limit is a token bucket: it holds one minute's amount, and is refilled continuously. It bounds a burst to the limit,
the mean to the limit a minute, and any 60 s to twice the limit. Tokens are charged by the estimate of the prompt when a
request is admitted, and corrected by ``usage`` when its answer ends; an answer may take the bucket below zero. The next
requests then wait until that is paid back, so the mean holds whatever the estimates were.
"""

from __future__ import annotations

import time
from math import ceil, floor
from typing import Final, Protocol

from disagg_proxy.cluster.registry import Registry
from disagg_proxy.errors import BadRequest, ProxyError, RateLimited, UnknownModel
from disagg_proxy.telemetry.stats import Stats

REQUESTS: Final = "requests"
TOKENS: Final = "tokens"

_MINUTE: Final = 60.0
_ROUNDING: Final = 1e-6
"""What may be missing of a whole request or token because floating point numbers were added up."""


class SharedUsage(Protocol):
    """What the other workers of this proxy use of the same limits. Limits are numbered in the order of the file."""

    def use(self, keys: int) -> None:
        """Count for this list of keys, which the number identifies, from now on."""

    def take(self, limit: int, amount: int) -> None:
        """This worker has used ``amount``; a negative one was given back."""

    def taken(self, limit: int) -> int:
        """What the others have used since the previous call."""


class RateLimit:
    """One limit: a bucket that is refilled continuously.

    Args:
        per_minute: the capacity, and what is refilled in a minute.
        now: reading of the clock in seconds; the same clock is used for every call.
        shared: with several workers, what the others use of it; ``number`` is its number there.
    """

    def __init__(self, per_minute: int, now: float, shared: SharedUsage | None = None, number: int = 0) -> None:
        self.per_minute = per_minute
        self._level = float(per_minute)
        self._at = now
        self._shared = shared
        self._number = number

    def level(self, now: float) -> float:
        """What is left; negative while more was used than fitted."""
        if now > self._at:
            self._level = min(float(self.per_minute), self._level + (now - self._at) * self.per_minute / _MINUTE)
            self._at = now
        if self._shared is not None and (taken := self._shared.taken(self._number)):
            self._level = min(float(self.per_minute), self._level - taken)
        return self._level

    def wait(self, amount: int, now: float) -> float:
        """Seconds until ``amount`` fits, 0 if it does now. More than the capacity fits into a full bucket."""
        missing = min(amount, self.per_minute) - self.level(now)
        return missing * _MINUTE / self.per_minute if missing > _ROUNDING else 0.0

    def take(self, amount: int, now: float) -> None:
        """Use ``amount``, whether it fits or not; a negative one is given back."""
        self._level = min(float(self.per_minute), self.level(now) - amount)
        if self._shared is not None:
            self._shared.take(self._number, amount)

    def reset(self, now: float) -> float:
        """Seconds until it is full."""
        return (self.per_minute - self.level(now)) * _MINUTE / self.per_minute

    def detach(self, now: float) -> None:
        """Take over what the other workers have used by now, and count alone from now on."""
        self.level(now)
        self._shared = None

    def change(self, per_minute: int, shared: SharedUsage | None, number: int) -> None:
        """Apply another limit after :meth:`detach`; what was used stays used."""
        self._level += per_minute - self.per_minute
        self.per_minute = per_minute
        self._shared = shared
        self._number = number

    def used(self, now: float) -> float:
        """What is missing from a full bucket."""
        return self.per_minute - self.level(now)


class ClientKey:
    """A key of API_KEYS_FILE, or the one of API_KEY.

    Attributes:
        name: its label in /metrics and in the access log.
        models: served names that it may use; empty for all.
        priority: higher ones leave the admission queue earlier.
        monitoring: whether it opens the routes that report on all clients.
        from_file: whether it is one of the file, which no engine knows.
        requests, tokens: its limits per minute; None where there is none.
    """

    def __init__(
        self,
        name: str,
        models: frozenset[str] = frozenset(),
        priority: int = 0,
        monitoring: bool = True,
        from_file: bool = False,
        requests: RateLimit | None = None,
        tokens: RateLimit | None = None,
    ) -> None:
        self.name = name
        self.models = models
        self.priority = priority
        self.monitoring = monitoring
        self.from_file = from_file
        self.requests = requests
        self.tokens = tokens

    # -- models

    def check_model(self, model: str | None, registry: Registry) -> None:
        """
        Raises:
            UnknownModel: it may not use ``model``; the same error as for a model that does not exist.
            BadRequest: no model is named, and the engines' default is not one of its models.
        """
        if not self.models or model in self.models:
            return
        if model is not None:
            raise self._unknown(model, registry)
        if not all(i.default_model is None or i.default_model in self.models for i in registry.instances()):
            raise BadRequest("model must be named: this API key is for some models only.", param="model")

    def visible(self, error: ProxyError, registry: Registry) -> ProxyError:
        """``error`` without the names of models that the key may not use."""
        if self.models and isinstance(error, UnknownModel):
            return self._unknown(error.model, registry)
        return error

    def _unknown(self, model: str, registry: Registry) -> UnknownModel:
        return UnknownModel(model, sorted(name for name in registry.models() if name in self.models))

    # -- limits per minute

    def admit(self, tokens: int, stats: Stats, anthropic: bool) -> RateLimited | None:
        """Charge one request with an estimated number of prompt tokens.

        Args:
            stats: counts a refusal; its clock is that of the limits.
            anthropic: whether the client uses Anthropic's API, whose error has another type.

        Returns:
            The error if it does not fit; then nothing is charged.
        """
        now = stats.clock()
        for limit, amount, kind in ((self.requests, 1, REQUESTS), (self.tokens, tokens, TOKENS)):
            if limit is not None and (wait := limit.wait(amount, now)):
                stats.key_refusals[f"{self.name}\t{kind}"] += 1
                return RateLimited(
                    f"API key {self.name!r} has reached its limit of {limit.per_minute} {kind} a minute; "
                    f"try again in {go_duration(wait)}.",
                    kind,
                    anthropic,
                    ceil(wait),
                )
        if self.requests is not None:
            self.requests.take(1, now)
        if self.tokens is not None:
            self.tokens.take(tokens, now)
        return None

    def settle(self, tokens: int, now: float) -> None:
        """Charge ``tokens`` more than :meth:`admit` did; a negative number is given back."""
        if self.tokens is not None and tokens:
            self.tokens.take(tokens, now)

    def headers(self, now: float, anthropic: bool) -> list[tuple[bytes, bytes]]:
        """What is left, as headers of a response in the spelling of the API in use; none without a limit."""
        found: list[tuple[bytes, bytes]] = []
        for kind, limit in ((REQUESTS, self.requests), (TOKENS, self.tokens)):
            if limit is None:
                continue
            left, reset = max(0, floor(limit.level(now) + _ROUNDING)), limit.reset(now)
            names = ANTHROPIC_HEADERS[kind] if anthropic else OPENAI_HEADERS[kind]
            shown = rfc3339(time.time() + reset) if anthropic else go_duration(reset)
            found.append((names[0], b"%d" % limit.per_minute))
            found.append((names[1], b"%d" % left))
            found.append((names[2], shown.encode()))
        return found


OPENAI_HEADERS: Final = {
    kind: [f"x-ratelimit-{part}-{kind}".encode() for part in ("limit", "remaining", "reset")]
    for kind in (REQUESTS, TOKENS)
}
"""The last one has the time until the limit is full again, as a duration of Go: ``12ms``, ``6m0s``."""

ANTHROPIC_HEADERS: Final = {
    kind: [f"anthropic-ratelimit-{kind}-{part}".encode() for part in ("limit", "remaining", "reset")]
    for kind in (REQUESTS, TOKENS)
}
"""The last one has the moment when the limit is full again, in RFC 3339."""


def go_duration(seconds: float) -> str:
    """As Go's ``time.Duration`` prints it, which OpenAI's headers use; rounded up to a millisecond."""
    whole, milliseconds = divmod(ceil(seconds * 1000 - 1e-6), 1000)
    if not whole:
        return f"{milliseconds}ms" if milliseconds else "0s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    fraction = f".{milliseconds:03d}".rstrip("0") if milliseconds else ""
    front = f"{hours}h{minutes}m" if hours else f"{minutes}m" if minutes else ""
    return f"{front}{rest}{fraction}s"


def rfc3339(unix: float) -> str:
    """A Unix time in RFC 3339, rounded up to a second."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(ceil(unix)))
