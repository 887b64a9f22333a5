"""kv_transfer_params are put into the client's own bytes, of which not one is changed."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disagg_kv.protocol.keys import transfer_id
from disagg_proxy.connectors.disagg_kv import for_decode, for_prefill, new_transfer_id


@pytest.mark.parametrize("body", [b"{}", b" { } ", b'{"a":1}', b'\n{\n "prompt": "\\ud800 {}", "b": {"c": []}}\n'])
def test_the_field_is_in_front(body: bytes) -> None:
    for made, params in (
        (for_prefill(body, "t"), {"transfer_id": "t"}),
        (for_decode(body, "t", "127.0.0.1:1"), {"transfer_id": "t", "from": "127.0.0.1:1"}),
    ):
        assert json.loads(made) == {"kv_transfer_params": params, **json.loads(body)}
        assert made.endswith(body[body.index(b"{") + 1 :])


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=20), inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(st.text(max_size=20), _json, max_size=6), st.sampled_from([None, 1]))
def test_any_object(fields: dict[str, object], indent: int | None) -> None:
    fields.pop("kv_transfer_params", None)
    made = json.loads(for_prefill(json.dumps(fields, indent=indent).encode(), "t"))
    assert made.pop("kv_transfer_params") == {"transfer_id": "t"} and made == fields


def test_transfer_ids_are_new_and_acceptable() -> None:
    ids = {new_transfer_id() for _ in range(1000)}
    assert len(ids) == 1000
    assert all(re.fullmatch("[0-9a-f]{32}", transfer_id(one)) for one in ids)
