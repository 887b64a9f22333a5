"""Which transports two engines use, by where they run."""

from __future__ import annotations

from dataclasses import replace

import pytest

from disagg_kv.protocol.frames import WireError
from disagg_kv.transport.place import Place, host_mark, rank_transports

ALL = ["nccl", "ipc", "tcp"]
A = Place("host", "GPU-aaaaaaaaaaaa")
B = replace(A, gpu="GPU-bbbbbbbbbbbb")
MIG = replace(A, partition=True)


@pytest.mark.parametrize(
    ("prefill", "decode", "order", "left_out"),
    [
        (A, B, ALL, {}),
        (A, A, ["ipc", "tcp"], {"nccl": "both engines use GPU-aaaaaaaa"}),
        (A, replace(B, host="other"), ["nccl", "tcp"], {"ipc": "the engines are on different hosts"}),
        (A, Place(), ["nccl", "tcp"], {"ipc": "one engine does not say on which host it is"}),
        (Place("host"), Place("host"), ALL, {}),
        (A, Place("host"), ["nccl", "tcp"], {"ipc": "one engine has a GPU, the other has none"}),
        (MIG, replace(MIG, gpu="GPU-c"), ["nccl", "tcp"],
         {"ipc": "MIG partitions cannot map the memory of others"}),
        (MIG, MIG, ["ipc", "tcp"], {"nccl": "both engines use GPU-aaaaaaaa"}),
        (replace(A, without={"ipc": "sleep mode"}), A, ["tcp"],
         {"nccl": "both engines use GPU-aaaaaaaa", "ipc": "sleep mode (on prefill)"}),
    ],
)  # fmt: skip
def test_order(prefill: Place, decode: Place, order: list[str], left_out: dict[str, str]) -> None:
    assert rank_transports(ALL, prefill, decode) == (order, left_out)


def test_a_transport_that_the_settings_require_is_tried() -> None:
    assert rank_transports(["nccl"], A, A) == (["nccl"], {})


def test_a_place_arrives_as_it_was_sent() -> None:
    place = replace(MIG, without={"ipc": "no"})
    assert Place.from_wire(place.to_wire()) == place
    assert Place.from_wire(None) == Place()


@pytest.mark.parametrize("value", [[], "host", {"host": 1, "gpu": "", "without": {}}, {"host": "", "gpu": ""}])
def test_what_is_no_place_is_refused(value: object) -> None:
    with pytest.raises(WireError):
        Place.from_wire(value)


def test_a_host_has_one_mark() -> None:
    assert host_mark() == host_mark() and len(host_mark()) in (0, 16)
