"""The backend of Ray Serve LLM: what it configures, and what both legs get.

With Ray's own modules where Ray is installed (tests/cluster_ray; they need no vLLM), else with an interface of the same
shape (fake_ray.py). The engines, and with them the transfer, are not part of it.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from disagg_kv.protocol.keys import transfer_id
from disagg_kv.settings import Settings
from tests.ray import fake_ray

pydantic = pytest.importorskip("pydantic")

MODULE = "disagg_ray.serve_llm"
REAL = importlib.util.find_spec("ray") is not None
# Ray's own models of pydantic.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
PEER = {"disagg_kv_address": "10.8.0.7:21004"}


@pytest.fixture
def patch() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as one:
        one.delitem(sys.modules, MODULE, raising=False)
        yield one
    sys.modules.pop(MODULE, None)


@pytest.fixture
def registered(patch: pytest.MonkeyPatch) -> dict[str, Any]:
    return {} if REAL else fake_ray.install(patch)


@pytest.fixture
def serve_llm(registered: dict[str, Any], patch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    module = importlib.import_module(MODULE)
    patch.setattr(module.ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    yield module
    for block in module._held:
        block.close()


class Request(pydantic.BaseModel):
    """The fields of vLLM's request models that matter here."""

    prompt: str = "a b"
    max_tokens: int | None = 64
    min_tokens: int = 5
    n: int = 2
    stream: bool = True
    stream_options: dict[str, Any] | None = pydantic.Field(default_factory=lambda: {"include_usage": True})
    kv_transfer_params: dict[str, Any] | None = None


def config(role: str = "kv_producer", ranks: int = 1, **more: Any) -> Any:
    transfer = {"kv_connector": "DisaggKVConnector", "kv_role": role}
    fields = {"placement_group_config": None, "experimental_configs": {}, **more}
    engine = {"kv_transfer_config": transfer, "tensor_parallel_size": ranks}
    return SimpleNamespace(engine_kwargs=engine, **fields)


# -- set-up


def test_a_replica_gets_address_ports_and_class(serve_llm: ModuleType) -> None:
    decode = serve_llm.DisaggKVBackend(config("kv_consumer", experimental_configs={"DISAGG_KV_PORTS": "21100-21199"}))
    decode.setup()
    found = decode.kv_transfer_config
    assert found["kv_connector_module_path"] == "disagg_kv.connector" and found["kv_load_failure_policy"] == "recompute"
    assert 21100 <= found["kv_port"] <= 21199
    assert Settings.load(found["kv_connector_extra_config"], {}).listen == "127.0.0.1"
    assert decode.replica_metadata() == {"disagg_kv_address": f"127.0.0.1:{found['kv_port']}"}
    prefill = serve_llm.DisaggKVBackend(config())
    prefill.setup()
    assert "kv_load_failure_policy" not in prefill.kv_transfer_config


def test_replicas_of_one_node_get_different_ports(serve_llm: ModuleType) -> None:
    experimental = {"DISAGG_KV_PORTS": "21200-21207"}
    packed = {"strategy": "STRICT_PACK"}
    firsts = []
    for _ in range(2):
        one = serve_llm.DisaggKVBackend(
            config(ranks=4, experimental_configs=experimental, placement_group_config=packed)
        )
        one.setup()
        firsts.append(one.kv_transfer_config["kv_port"])
    assert firsts == [21200, 21204]
    one = serve_llm.DisaggKVBackend(config(experimental_configs=experimental))
    with pytest.raises(OSError, match=r"experimental_configs\['DISAGG_KV_PORTS'\] 21200-21207: no free port"):
        one.setup()


def test_what_a_user_has_set_stays(serve_llm: ModuleType) -> None:
    given = config("kv_consumer")
    given.engine_kwargs["kv_transfer_config"] |= {
        "kv_connector_module_path": "mine",
        "kv_connector_extra_config": {"peers": "10.0.0.0/8", "secret_file": "/etc/disagg/secret"},
    }
    serve_llm.DisaggKVBackend(given).setup()
    found = given.engine_kwargs["kv_transfer_config"]
    assert found["kv_connector_module_path"] == "mine"
    assert found["kv_connector_extra_config"] == {
        "peers": "10.0.0.0/8", "secret_file": "/etc/disagg/secret", "host_ip": "127.0.0.1",
    }  # fmt: skip


def test_ranks_that_may_be_spread_are_refused(serve_llm: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"needs the 2 ranks of an engine on one node: .*STRICT_PACK"):
        serve_llm.DisaggKVBackend(config(ranks=2, placement_group_config={"strategy": "PACK"})).setup()


def test_a_missing_role_is_named(serve_llm: ModuleType) -> None:
    with pytest.raises(ValueError, match="set kv_role"):
        serve_llm.DisaggKVBackend(config("")).setup()


# -- requests


def test_both_legs_get_one_new_transfer(serve_llm: ModuleType) -> None:
    backend = serve_llm.DisaggKVBackend(config())
    assert backend.requires_peer_binding and backend.concurrent_handoff
    seen = set()
    for _ in range(2):
        # A client's own parameters do not get through.
        request = Request(kv_transfer_params={"transfer_id": "mine", "from": "10.9.9.9:1"})
        prefill = backend.prepare_prefill_request(request=request, peer=PEER)
        decode = backend.prepare_decode_request(request=request, peer=PEER, prefill_response=None)
        name = transfer_id(prefill.kv_transfer_params["transfer_id"])
        assert prefill.kv_transfer_params == {"transfer_id": name}
        assert decode.kv_transfer_params == {"transfer_id": name, "from": "10.8.0.7:21004"}
        seen.add(name)
    assert len(seen) == 2 and "mine" not in seen


def test_prefill_computes_one_token_and_decode_what_was_requested(serve_llm: ModuleType) -> None:
    backend, request = serve_llm.DisaggKVBackend(config()), Request()
    prefill = backend.prepare_prefill_request(request=request, peer=PEER)
    decode = backend.prepare_decode_request(request=request, peer=PEER, prefill_response=None)
    assert (prefill.max_tokens, prefill.min_tokens, prefill.n, prefill.stream) == (1, 0, 1, False)
    assert prefill.stream_options is None
    assert decode.model_dump(exclude={"kv_transfer_params"}) == Request().model_dump(exclude={"kv_transfer_params"})


@pytest.mark.parametrize("peer", [None, {}, {"mori_zmq_address": "x"}])
def test_a_prefill_replica_of_another_connector_is_named(serve_llm: ModuleType, peer: Any) -> None:
    backend, request = serve_llm.DisaggKVBackend(config()), Request()
    backend.prepare_prefill_request(request=request, peer=peer)
    with pytest.raises(ValueError, match="has no KV address: is its kv_connector DisaggKVConnector"):
        backend.prepare_decode_request(request=request, peer=peer, prefill_response=None)


# -- registration


def test_registration_may_be_repeated(serve_llm: ModuleType, registered: dict[str, Any]) -> None:
    serve_llm.register()
    serve_llm.register()
    if REAL:
        factory = serve_llm.KVConnectorBackendFactory
        assert factory.get_backend_class("DisaggKVConnector") is serve_llm.DisaggKVBackend
        factory.unregister_backend("DisaggKVConnector")
    else:
        assert registered == {"DisaggKVConnector": "disagg_ray.serve_llm:DisaggKVBackend"}
    module, _, name = "disagg_ray.serve_llm:DisaggKVBackend".partition(":")
    assert getattr(importlib.import_module(module), name) is serve_llm.DisaggKVBackend


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"version": "2.59.1"}, r"Ray 2.59.1 is too old .* install ray\[llm\]==2.60.0 or newer"),
        ({"version": "nightly"}, "Ray nightly is too old"),
        ({"without": fake_ray.FACTORY}, "has no backends for KV connectors where 2.60 has them"),
        ({"without": "replica_metadata"}, "BaseConnectorBackend has no replica_metadata"),
        ({"without": "requires_peer_binding"}, "BaseConnectorBackend has no requires_peer_binding"),
    ],
)
def test_another_ray_is_refused_with_the_release_that_has_it(
    patch: pytest.MonkeyPatch, arguments: dict[str, str], text: str
) -> None:
    registered = fake_ray.install(patch, **arguments)
    with pytest.raises(RuntimeError, match=text):
        importlib.import_module(MODULE).register()
    assert registered == {}
