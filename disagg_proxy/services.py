"""All state of a running proxy in one object, made once and handed to whatever needs it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from multidict import CIMultiDict

from disagg_proxy.admission.gate import Gate
from disagg_proxy.admission.limits import Limits
from disagg_proxy.admission.size import TokenGuess
from disagg_proxy.cluster.pairing import Pair, Pairing
from disagg_proxy.cluster.policy import POLICIES
from disagg_proxy.cluster.registry import Registry
from disagg_proxy.config import Config
from disagg_proxy.discovery.service import Discovery
from disagg_proxy.flight.attempts import Attempts
from disagg_proxy.flight.background import Background
from disagg_proxy.flight.drains import Drainer
from disagg_proxy.flight.flight import Flight
from disagg_proxy.flight.legs import Legs
from disagg_proxy.protocol.fields import Route
from disagg_proxy.protocol.prefill_answer import prompt_tokens
from disagg_proxy.protocol.prepare import Prepared
from disagg_proxy.stats import Stats
from disagg_proxy.stopping import Stopping
from disagg_proxy.upstream import Upstream
from disagg_proxy.watch.watchdog import Watchdog

log = logging.getLogger(__name__)


class Services:
    """The parts and how they are joined.

    Args:
        clock: monotonic seconds.

    Raises:
        BindError: the registration port cannot be opened. It is held from now on.
    """

    def __init__(self, config: Config, clock: Callable[[], float] = time.monotonic) -> None:
        self.config = config
        self.stats = Stats(clock)
        self.registry = Registry(clock, config.instance_expiry)
        self.pairing = Pairing(self.registry, POLICIES[config.prefill_policy], POLICIES[config.decode_policy])
        self.gate = Gate(self.pairing, self.registry, _limits(config), self.stats)
        self.token_guess = TokenGuess()
        self.background = Background()
        self.stopping = Stopping(config.shutdown_grace, clock)
        self.drainer = Drainer(self.stats.drains)
        self.discovery = Discovery(config, self.registry)
        self._upstream: Upstream | None = None
        self._watchdog: Watchdog | None = None

    @property
    def upstream(self) -> Upstream:
        """The client pool, from :meth:`start` to :meth:`stop`."""
        if self._upstream is None:
            raise RuntimeError("the services are not started")
        return self._upstream

    async def start(self) -> None:
        """Begin on the running event loop."""
        self._upstream = Upstream(self.config.connect_timeout)
        await self.discovery.start(self._upstream)
        shortest, longest = self.config.freeze_after_min, self.config.freeze_after_max
        self._watchdog = Watchdog(self.registry, self._upstream, shortest, longest, self.discovery.headers)
        self._watchdog.start()
        log.info("Instances may register on %s:%d", self.config.zmq_host, self.discovery.listener.port)

    async def stop(self) -> None:
        """Let what was sent to the instances end in the time that is left, then close everything."""
        self.stopping.begin()
        await self.stopping.wait(self.background.ended(), self.stopping.left)
        await self.background.give_up()
        if self._watchdog is not None:
            await self._watchdog.stop()
        await self.discovery.stop()
        if self._upstream is not None:
            await self._upstream.close()

    async def launch(self, route: Route, headers: CIMultiDict[str], prepared: Prepared) -> Flight:
        """A flight of ``prepared`` on a pair that has room; the caller must call its ``leave`` in the end.

        Raises:
            ProxyError: no pair, an unknown model, or too many requests.
        """
        tokens = self.token_guess.tokens(prepared.model, *prepared.prompt)
        kv_bytes = tokens * self.config.kv_bytes_per_token

        def legs(pair: Pair) -> Legs:
            return Legs(
                self.upstream,
                self.registry,
                self.config,
                pair,
                route,
                headers,
                prepared,
                tokens=tokens,
                kv_bytes=kv_bytes,
            )

        first = await self.gate.admit(prepared.model, kv_bytes, legs)
        return Flight(
            Attempts(first, legs, self.pairing, prepared.model, self.config.max_tries),
            self.background,
            self.drainer,
            self.stats,
            prefill_timeout=self.config.prefill_timeout,
            own_key=bool(self.config.engine_api_key),
            prefilled=lambda body: self._learn(prepared, body),
        )

    def _learn(self, prepared: Prepared, prefill_body: bytes) -> None:
        """Follow how many bytes of text a token takes, where that is asked for."""
        token_ids, text_bytes = prepared.prompt
        if self.config.kv_bytes_per_token and not token_ids and prepared.choices == 1:
            self.token_guess.learn(prepared.model, text_bytes, prompt_tokens(prefill_body))


def _limits(config: Config) -> Limits:
    return Limits(
        in_flight=config.max_in_flight,
        prefill=config.prefill_max_in_flight,
        decode=config.decode_max_in_flight,
        kv_buffer=config.kv_buffer_bytes,
        queue=config.max_queue,
        queue_timeout=config.queue_timeout,
    )
