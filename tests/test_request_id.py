"""The request id: what vLLM finds in it, and what clients see."""

import re

import pytest

from disagg_proxy.address import parse_address
from disagg_proxy.request_id import new_own_id, new_request_id


@pytest.mark.parametrize("prefill", ["127.0.0.1:21001", "::1:21001", "gpu-box:21001"])
@pytest.mark.parametrize("prefix", ["cmpl-{}-0", "chatcmpl-{}", "1_cmpl-{}-3"])
def test_vllm_finds_both_addresses_in_whatever_it_makes_of_the_id(prefill: str, prefix: str) -> None:
    made = prefix.format(new_request_id(parse_address(prefill), parse_address("10.0.0.2:22001")).internal)
    # The patterns of P2pNcclConnector.parse_request_id.
    assert re.search(r"___decode_addr_(.*):(\d+)", made).groups() == ("10.0.0.2", "22001")
    host, _, port = prefill.rpartition(":")
    assert re.search(r"___prefill_addr_(.*):(\d+)___", made).groups() == (host, port)


def test_the_public_id_has_the_same_length_and_no_address() -> None:
    request_id = new_request_id(parse_address("127.0.0.1:21001"), parse_address("127.0.0.1:22001"))
    assert len(request_id.public) == len(request_id.internal)
    assert re.fullmatch(r"[0-9a-f]+", request_id.public)


def test_each_attempt_has_an_id_of_its_own_that_the_requests_id_finds() -> None:
    kv, own = parse_address("127.0.0.1:1"), new_own_id()
    assert re.fullmatch("[0-9a-f]{32}", own) and new_own_id() != own
    first, second = new_request_id(kv, kv, own), new_request_id(kv, kv, own)
    assert first.internal != second.internal and first.public.startswith(own) and second.public.startswith(own)
    assert own[:24] in first.internal and own[:24] in second.internal
    assert len(first.public) == len(first.internal) == len(second.public)


def test_ids_are_unique() -> None:
    kv = parse_address("127.0.0.1:1")
    assert len({new_request_id(kv, kv).internal for _ in range(1000)}) == 1000
