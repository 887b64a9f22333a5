"""``DisaggKVConnector``, the class that vLLM loads. Each method delegates to the scheduler or the worker side.

The interface is ``vllm/distributed/kv_transfer/kv_connector/v1/base.py``, the same from 0.21 to 0.33 in what is used.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

import vllm
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
)

from disagg_kv.engine import digest, versions
from disagg_kv.engine.groups import CacheGroups
from disagg_kv.engine.metrics import PrometheusMetrics, Stats
from disagg_kv.engine.plan import Plan
from disagg_kv.engine.scheduler import ConnectorScheduler
from disagg_kv.engine.worker import ConnectorWorker
from disagg_kv.settings import Settings

if TYPE_CHECKING:
    import torch

if versions.serves_groups():
    from vllm.distributed.kv_transfer.kv_connector.v1.base import SupportsHMA as _KVCacheGroups
else:
    _KVCacheGroups = object

logger = logging.getLogger("vllm.disagg_kv")


def model_identity(config: Any, version: str) -> tuple[str, str]:
    """Return the model's name and its digest, "" where the weights cannot be read (names are compared then)."""
    name = versions.model_name(config)
    if version:
        return name, digest.version_digest(version)
    began = time.monotonic()
    try:
        description, weights, load_format = versions.model_files(config)
        found = digest.model_digest(weights, description, versions.model_facts(config), load_format)
    except Exception as error:
        logger.warning("no digest of the weights: peers are compared by the model name %s only (set model_version in "
                       "kv_connector_extra_config to identify the weights): %s", name, error)  # fmt: skip
        return name, ""
    logger.info("digest of %s: %s, %.2f s", name, found, time.monotonic() - began)
    return name, found


class Metadata(KVConnectorMetadata):
    """Connector metadata of one step: the plan from scheduler to worker."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan


class DisaggKVConnector(KVConnectorBase_V1, _KVCacheGroups):
    """Pushes KV from prefill (``kv_producer``) to decode (``kv_consumer``). With ``kv_both`` an engine is one or the
    other for each request.

    By its base class vLLM decides whether the hybrid KV cache manager stays on, before it knows the model. Where failed
    loads of several groups cannot be reported it is off, so that layers with windows are in one group with the others.
    """

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        versions.check_version(vllm.__version__)
        versions.check_parallel(vllm_config)
        versions.check_model(vllm_config)
        transfer = vllm_config.kv_transfer_config
        if transfer.kv_role not in ("kv_producer", "kv_consumer", "kv_both"):
            raise ValueError("kv_role must be kv_producer (prefill), kv_consumer (decode) or kv_both")
        self._kv_role = transfer.kv_role
        decode, both = transfer.kv_role != "kv_producer", transfer.kv_role == "kv_both"
        if decode and transfer.kv_load_failure_policy != "recompute":
            raise ValueError(
                'set "kv_load_failure_policy": "recompute" in --kv-transfer-config: otherwise a request whose KV does '
                "not arrive fails with an error instead of being computed here"
            )
        settings = Settings.load(transfer.kv_connector_extra_config)
        groups = CacheGroups.of(kv_cache_config.kv_cache_groups, versions.serves_groups(), versions.serves_states())
        self._group_ids = tuple(range(len(groups.groups)))
        self._completes_prefix = decode and groups.load_completes_prefix
        self._num_blocks = versions.num_blocks(kv_cache_config)
        self._scheduler: ConnectorScheduler | None = None
        self._worker: ConnectorWorker | None = None
        if role == KVConnectorRole.SCHEDULER:
            self._scheduler = ConnectorScheduler(decode, groups, settings, self._num_blocks if both else 0)
            versions.watch_engine(self._scheduler.weights_written, self._scheduler.adapters.loaded)
        else:
            self._worker = ConnectorWorker(
                decode, settings, model_identity(vllm_config, settings.model_version), groups,
                versions.tensor_parallel_size(vllm_config), versions.tensor_parallel_rank(), int(transfer.kv_port),
                settings.host_ip or versions.host_ip(), versions.layers_run_once(vllm_config), both,
            )  # fmt: skip

    # Worker side.

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        assert self._worker is not None
        self._worker.register(kv_caches, self._num_blocks)

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        if self._worker is not None and isinstance(kv_connector_metadata, Metadata):
            self._worker.on_preemption(kv_connector_metadata.plan)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        plan = self._current()
        if self._worker is not None and plan is not None:
            self._worker.begin(plan)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """No-op: loads are asynchronous and never part of a running step."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Allow a layer to be sent while later ones are computed.

        vLLM does not call this where one CUDA graph spans all layers; blocks are sent after the step then.
        """
        plan = self._current()
        if self._worker is not None and plan is not None:
            self._worker.layer_enqueued(plan, layer_name)

    def wait_for_save(self) -> None:
        plan = self._current()
        if self._worker is not None and plan is not None:
            self._worker.computed(plan)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        if self._worker is None:
            return None, None
        sent, received = self._worker.finished(self._current(), finished_req_ids)
        return sent or None, received or None

    def get_transfer_results(self, finished_req_ids: set[str]) -> Any:
        """As ``get_finished``, with the requests whose load failed; from vLLM 0.30 on."""
        sent, received = self.get_finished(finished_req_ids)
        failed = self._worker.take_failed_requests() if self._worker is not None else set()
        return versions.transfer_results(sent or set(), received or set(), failed)

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._worker.take_failed_blocks() if self._worker is not None else set()

    def get_kv_connector_stats(self) -> Stats | None:
        counts = self._worker.outcomes.take() if self._worker is not None else {}
        return Stats(data=counts) if counts else None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> Stats:
        return Stats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: Any
    ) -> PrometheusMetrics:
        return PrometheusMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    def shutdown(self) -> None:
        if self._worker is not None:
            self._worker.close()

    # Scheduler side.

    def on_new_request(self, request: Any) -> None:
        assert self._scheduler is not None
        self._scheduler.added(request)

    def get_loaded_kv_cache_group_ids(self, request: Any) -> tuple[int, ...]:
        """Return all groups: vLLM need not zero the blocks that a load fills (called from 0.32 on)."""
        return self._group_ids

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        assert self._scheduler is not None
        return self._scheduler.num_matched_tokens(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        assert self._scheduler is not None
        self._scheduler.allocated(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        assert self._scheduler is not None
        return Metadata(self._scheduler.plan(scheduler_output))

    def update_connector_output(self, connector_output: Any) -> None:
        assert self._scheduler is not None
        self._scheduler.transfers_finished(
            set(connector_output.finished_sending or ()), set(connector_output.finished_recving or ())
        )

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        assert self._scheduler is not None
        return self._scheduler.finished(request), None

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        assert self._scheduler is not None
        return self._scheduler.finished(request, block_ids), None

    @property
    def supports_divergent_local_hybrid_hits(self) -> bool:
        """Return whether ``num_computed_tokens`` may count a prefix without its recurrent states (read from vLLM 0.32
        on); if nothing is loaded, vLLM begins at the last state that it has."""
        return self._completes_prefix

    @property
    def requires_kv_delivery(self) -> bool:
        """Return whether a preempted request computes again even if its last output is under way (read once, from vLLM
        0.27 on at the latest): on prefill, since its blocks are gone. Decode computes what is not delivered."""
        return bool(self._kv_role == "kv_producer")

    def has_pending_push_work(self) -> bool:
        """Return whether an engine without requests has to step once more (called from vLLM 0.27 on at the latest):
        what was noted since the last step reaches the worker side only with one."""
        return self._scheduler is not None and self._scheduler.has_news

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: Any) -> str | None:
        """Return None: any layout. vLLM calls it before it groups the layers, so unsupported models are refused here
        with the reason."""
        versions.check_model(vllm_config)
        return None

    @classmethod
    def supports_sleep_mode(cls, kv_transfer_config: Any) -> bool:
        """Return False (called from vLLM 0.33 on): the cache must not move while peers may read it."""
        return False

    def _current(self) -> Plan | None:
        metadata = self._connector_metadata
        return metadata.plan if isinstance(metadata, Metadata) else None
