"""The life of one request: prepare, admit, attempt on its instances, retry, answer.

    prepare    read and check the body; make the bodies of both legs            openai/prepare.py
    admit      wait for capacity, choose the instances                          admission/queue.py, cluster/selection.py
    attempt    the legs, in the order of the KV protocol                        connectors/
    retry      another attempt, while decode cannot have received it coordinator/retry.py
    answer     one answer or one error, to a client that may leave              downstream/reply.py

All of it is one coroutine, which runs without a task. Two calls go against its direction: the connector calls the
``Reply``, which writes to the client's connection, and the stall detector fails the pending answers of an instance.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, NamedTuple

from disagg_proxy.admission.client_key import ClientKey
from disagg_proxy.admission.queue import AdmissionQueue, Demand
from disagg_proxy.cluster.choice import PlacementPreference, Wish
from disagg_proxy.cluster.instance import Role, State
from disagg_proxy.cluster.policies import Traits
from disagg_proxy.cluster.selection import Selection
from disagg_proxy.config import Config
from disagg_proxy.connectors import table
from disagg_proxy.connectors.base import CLIENT_GIVEN_UP, Engines, Request
from disagg_proxy.coordinator.retry import Retry
from disagg_proxy.downstream.reply import Reply
from disagg_proxy.errors import NoPair, ProxyError, Unavailable, UnknownModel
from disagg_proxy.http1.headers import Headers, client_request_id, forwarded_request_lines, value_of, without_key
from disagg_proxy.openai.fields import RESPONSES, Route, responses_transfer_kv
from disagg_proxy.openai.prefix_hash import AffinityNeeds, session_name
from disagg_proxy.openai.prepare import Prepared, prepare, responses_refusal
from disagg_proxy.telemetry.request_record import RequestRecord
from disagg_proxy.telemetry.request_recorder import RequestRecorder
from disagg_proxy.telemetry.stats import Stats

if TYPE_CHECKING:
    from disagg_proxy.telemetry.tracing import SpanExporter

log = logging.getLogger(__name__)


class RequestHead(NamedTuple):
    """The head of one generation request.

    Attributes:
        headers: the client's, as received.
        lines: the same as lines for the instances, without X-Request-Id.
        client_id: the client's own X-Request-Id, None without one.
        session: value of the SESSION_HEADER; empty where no policy needs it.
        key: the client's key; None without API_KEYS_FILE.
    """

    route: Route
    headers: Headers
    lines: bytes
    client_id: str | None
    session: bytes
    key: ClientKey | None = None


def read_head(
    config: Config, wanted: AffinityNeeds, route: Route, headers: Headers, key: ClientKey | None = None
) -> RequestHead:
    """Read the head of a request; ``wanted`` says whether a policy needs the session."""
    session = value_of(headers, config.session_header.lower().encode()) if wanted.session else b""
    if key is not None and key.from_file:
        headers = without_key(headers)
    return RequestHead(
        route,
        headers,
        forwarded_request_lines(headers, config.engine_api_key),
        client_request_id(headers),
        session,
        key,
    )


class Coordinator:
    """Serves generation requests.

    Args:
        engines: what the connectors work with.
        traces: exports spans; None when tracing is off.
    """

    def __init__(
        self,
        engines: Engines,
        selection: Selection,
        admission_queue: AdmissionQueue,
        recorder: RequestRecorder,
        traces: SpanExporter | None = None,
    ) -> None:
        self._engines = engines
        self._registry = engines.registry
        self._background = engines.background
        self._selection = selection
        self._admission_queue = admission_queue
        self._recorder = recorder
        self._traces = traces
        self._stats: Stats = recorder.stats
        self._connectors = table.connectors(engines)
        self._sizes = engines.sizes
        self.policies_changed()

    def policies_changed(self) -> None:
        """The selection has other policies, which may need to know something else of a request."""
        self._wanted = AffinityNeeds(self._selection.needs_prefix, self._selection.needs_session)
        self._wanted_of_one = AffinityNeeds(False, self._selection.needs_session)

    @property
    def wanted(self) -> AffinityNeeds:
        """What the policies need to know of a request: the input of :func:`disagg_proxy.openai.prepare.prepare`."""
        several = self._selection.chooser is not None or len(self._registry.ready(Role.PREFILL)) > 1
        return self._wanted if several else self._wanted_of_one

    def start(self, head: RequestHead, body: bytes, reply: Reply) -> None:
        """Serve one request and deliver the outcome to ``reply``, possibly within this call. Raises no ProxyError."""
        record = self._recorder.open(head.route.path, head.client_id, reply.own_id)
        if head.key is not None:
            record.key = head.key.name
        work = self._background.request(self._run(head, body, record, reply))
        reply.begin(record, work, self._background)
        work.start()

    async def _run(self, head: RequestHead, body: bytes, record: RequestRecord, reply: Reply) -> None:
        outcome: ProxyError | None = None
        try:
            # Prepare
            lines, config = head.lines, self._engines.config
            if self._traces is not None:
                lines = forwarded_request_lines(self._traces.begin(record, head.headers), config.engine_api_key)
            prepared = prepare(head.route, body, self.wanted)
            # This frame lives until the answer ends; a long prompt must be freed before.
            body = b""
            request = self._request(head, lines, prepared, record)
            if head.key is not None:
                self._check_key(head.key, request, reply)

            # Admit
            placement, refresh = None, False
            try:
                placement = self._admission_queue.try_acquire(request.demand)
            except (UnknownModel, NoPair):
                if self._served(prepared.model):
                    raise
                refresh = True
            if refresh:
                # Engines may have loaded an adapter since their last probe.
                await self._registry.refresh_models()
                placement = self._admission_queue.try_acquire(request.demand)
            if placement is None:
                record.waited = True
                placement = await self._admission_queue.wait(request.demand)
            record.on_admitted()

            # Attempt and retry
            computes = placement.decode.kind.computes
            retry = Retry(
                self._admission_queue, self._selection, self._registry, request.demand, computes, config.max_tries
            )
            request.others = retry
            while True:
                connector = self._connectors[placement.decode.kind.protocol]
                failed = await connector.run(request, placement, reply)
                if failed is None:
                    return
                placement = await retry.next(failed, reply)
                if placement is None:
                    raise failed.error
                self._stats.failovers += 1
        except ProxyError as error:
            outcome = error if head.key is None else head.key.visible(error, self._registry)
        except Exception as error:
            log.error("A request failed inside the proxy", exc_info=error, extra={"request_id": record.request_id})
            outcome = ProxyError("The proxy failed; its log has the cause.")
        finally:
            if reply.open:
                reply.fail(outcome or Unavailable(CLIENT_GIVEN_UP, retry_after=1))

    def _served(self, model: str | None) -> bool:
        """Whether ready instances of both roles serve ``model``, as far as is known."""
        return model is None or all(self._registry.accepting(role, model) for role in Role)

    def _request(self, head: RequestHead, lines: bytes, prepared: Prepared, record: RequestRecord) -> Request:
        """What connectors and admission need to know of the request.

        Raises:
            ProxyError: no instance of this proxy can serve it.
        """
        record.on_ready(prepared.model)
        tokens = self._sizes.tokens(prepared)
        kv_tokens = self._sizes.kv_tokens(head.route, prepared) if self._registry.has_kv_buffers else 0
        shared = prepared.affinity
        name = shared.user
        if head.session and self.wanted.session:
            name = session_name(head.session.decode("latin-1"))
        traits = Traits(tokens, shared.prefix, shared.size, shared.home, name)
        output = self._sizes.output(prepared)
        demand = Demand(
            prepared.model, self._preference(head.route, prepared, tokens), kv_tokens, traits,
            wish=Wish(output, tokens + output, record.arrived),
        )  # fmt: skip
        if head.key is not None:
            demand.priority = head.key.priority
        return Request(head.route, lines, prepared, record, tokens, demand)

    def _check_key(self, key: ClientKey, request: Request, reply: Reply) -> None:
        """Charge the request to its client's key.

        Raises:
            ProxyError: the key may not use the model, or has reached a limit.
        """
        key.check_model(request.prepared.model, self._registry)
        anthropic = request.route.dialect == "messages"
        refusal = key.admit(request.tokens, self._stats, anthropic)
        reply.headers = key.headers(self._stats.clock(), anthropic)
        if refusal is not None:
            raise refusal
        if key.tokens is not None:
            request.record.charged, request.record.stream_events = request.tokens, 0

    def _pairs_respond(self) -> bool:
        """Whether any pair of instances may serve /v1/responses, in whatever order they become ready."""
        return all(
            i.kind.computes and (i.state is not State.READY or responses_transfer_kv(i.version))
            for i in self._registry.instances()
        )

    def _preference(self, route: Route, prepared: Prepared, tokens: int) -> PlacementPreference:
        refusal = prepared.refusal
        if refusal is None and route is RESPONSES and not self._pairs_respond():
            refusal = responses_refusal()
        if refusal is not None:
            # Where only such a decode is down, the same request may succeed later.
            if not any(i.kind.computes and i.role is Role.DECODE for i in self._registry.instances()):
                raise refusal
            return PlacementPreference.ALONE
        config = self._engines.config
        if tokens < config.decode_alone_below:
            return PlacementPreference.RATHER_ALONE
        return PlacementPreference.EITHER if config.decode_alone else PlacementPreference.PAIR
