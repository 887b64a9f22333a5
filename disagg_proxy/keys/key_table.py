"""The client keys of a running proxy: looked up by hash, reread on SIGHUP, charged when requests end.

A presented key is hashed and its digest looked up, so nothing that takes measurable time depends on how much of a key
is right, or on which keys exist: to learn anything from a comparison of digests, a client would need the key for a
digest of its choice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from disagg_proxy.admission.client_key import REQUESTS, TOKENS, ClientKey, RateLimit, SharedUsage
from disagg_proxy.config import Config
from disagg_proxy.config.keys_file import API_KEY_NAME, KeyEntry, KeysFileError, digest, keys_of
from disagg_proxy.config.reload import ReloadError
from disagg_proxy.telemetry.request_record import RequestRecord
from disagg_proxy.telemetry.stats import Stats


class KeyTable:
    """The keys of API_KEYS_FILE, and the one of API_KEY beside them.

    Args:
        stats: counts refusals per key; its clock refills the limits.
        usage: with several workers, what the others use of the same limits.

    Attributes:
        in_use: whether there is a file. Without one API_KEY alone is checked, and no request is counted by key.

    Raises:
        KeysFileError: the file cannot be used.
    """

    def __init__(self, config: Config, stats: Stats, usage: SharedUsage | None = None) -> None:
        self._config = config
        self._stats = stats
        self._usage = usage
        self.in_use = False
        self._entries: dict[str, KeyEntry] = {}
        self._by_digest: dict[bytes, ClientKey] = {}
        self._by_name: dict[str, ClientKey] = {}
        self._watchers: list[Callable[[], None]] = []
        self._read()

    def find(self, presented: bytes) -> ClientKey | None:
        """The key that a client presents; None if it is not valid."""
        return self._by_digest.get(digest(presented))

    def watch(self, changed: Callable[[], None]) -> None:
        """Call ``changed`` after each reload that changes something, so that no outcome of :meth:`find` is kept."""
        self._watchers.append(changed)

    # -- reload

    def configure(self, config: Config) -> None:
        """Take the configuration of a reload; :meth:`reload` follows."""
        self._config = config

    def reload(self) -> str:
        """Read the file again, and return what has changed. Limits keep what was used of them.

        Raises:
            ReloadError: the file cannot be used; the former keys stay.
        """
        before = self._entries
        known = set(self._by_digest)
        try:
            self._read()
        except KeysFileError as error:
            raise ReloadError(f"API_KEYS_FILE: {error}") from None
        now = self._entries
        changes = {
            "added": [name for name in now if name not in before],
            "removed": [name for name in before if name not in now],
            "changed": [name for name, entry in now.items() if name in before and before[name] != entry],
        }
        if not any(changes.values()) and known == self._by_digest.keys():
            return ""
        for changed in self._watchers:
            changed()
        parts = [f"{what} {', '.join(names)}" for what, names in changes.items() if names]
        return f"API_KEYS_FILE: {'; '.join(parts) or 'API_KEY changed'}"

    def _read(self) -> None:
        entries = keys_of(self._config)
        now = self._stats.clock()
        for key in self._by_name.values():
            # Numbers of limits belong to one list of keys.
            for limit in (key.requests, key.tokens):
                if limit is not None:
                    limit.detach(now)
        if self._usage is not None and entries:
            self._usage.use(_identity(entries))
        keys = {entry.name: self._key(entry, number) for number, entry in enumerate(entries)}
        found = {one: keys[entry.name] for entry in entries for one in entry.hash}
        if entries and self._config.api_key:
            keys[API_KEY_NAME] = ClientKey(API_KEY_NAME)
            found[digest(self._config.api_key.encode())] = keys[API_KEY_NAME]
        self._entries = {entry.name: entry for entry in entries}
        self._by_digest, self._by_name, self.in_use = found, keys, bool(entries)
        self._count_only(keys)

    def _key(self, entry: KeyEntry, number: int) -> ClientKey:
        before = self._by_name.get(entry.name)
        requests, tokens = (before.requests, before.tokens) if before is not None else (None, None)
        return ClientKey(
            entry.name,
            frozenset(entry.models),
            entry.priority,
            entry.monitoring,
            True,
            self._limit(entry.requests_per_minute, requests, 2 * number),
            self._limit(entry.tokens_per_minute, tokens, 2 * number + 1),
        )

    def _limit(self, per_minute: int, before: RateLimit | None, number: int) -> RateLimit | None:
        """A limit of a key; the same object as before, which requests that run may still charge."""
        if not per_minute:
            return None
        if before is None:
            return RateLimit(per_minute, self._stats.clock(), self._usage, number)
        before.change(per_minute, self._usage, number)
        return before

    # -- counting

    def _count_only(self, keys: dict[str, ClientKey]) -> None:
        """Drop the counters of removed keys, and start those of new ones at 0, so that ``rate()`` sees them."""
        stats = self._stats
        for counts in (stats.key_requests, stats.key_tokens, stats.key_refusals):
            for labels in [one for one in counts if one.partition("\t")[0] not in keys]:
                del counts[labels]
        for name in keys:
            _start(stats.key_requests, f"{name}\tok")
            _start(stats.key_tokens, f"{name}\tprompt", f"{name}\tgeneration")
            _start(stats.key_refusals, f"{name}\t{REQUESTS}", f"{name}\t{TOKENS}")

    def settle(self, record: RequestRecord) -> None:
        """Correct what a request was charged, by what its engines counted.

        Tokens that no engine reports are estimated: the prompt as at its admission, a streamed answer by its events.
        A request that reached no engine costs none.
        """
        key = None if record.key is None else self._by_name.get(record.key)
        if key is None or key.tokens is None or record.charged is None:
            return
        used = 0
        if record.prefill_sent is not None or record.decode_sent is not None:
            used = record.charged if record.prompt_tokens is None else record.prompt_tokens
            used += (record.stream_events or 0) if record.output_tokens is None else record.output_tokens
        key.settle(used - record.charged, self._stats.clock())


def _start(counts: Counter[str], *labels: str) -> None:
    for one in labels:
        counts[one] += 0


def _identity(entries: tuple[KeyEntry, ...]) -> int:
    """A number that is the same in all processes with the same keys in the same order."""
    return 1 + int.from_bytes(digest("\n".join(entry.name for entry in entries).encode())[:7], "big")
