"""What the project's own connector needs, put in front of a body."""

import json

import pytest

from disagg_proxy.connectors.disagg_kv import for_decode, for_prefill

BODY = {"prompt": "东京 🙂", "max_tokens": 5, "x": {}}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32", "utf-32-le"])
@pytest.mark.parametrize("body", [BODY, {}])
def test_the_parameters_stand_in_a_body_of_any_encoding(body: dict, encoding: str) -> None:
    raw = json.dumps(body, ensure_ascii=False).encode(encoding)
    on_p, on_d = {"transfer_id": "id"}, {"transfer_id": "id", "from": "127.0.0.1:1"}
    assert json.loads(for_prefill(raw, "id")) == {"kv_transfer_params": on_p, **body}
    assert json.loads(for_decode(raw, "id", "127.0.0.1:1")) == {"kv_transfer_params": on_d, **body}


def test_bytes_in_utf_8_stay_as_they_are() -> None:
    raw = b' { "prompt" :\t"\\u6771" ,"n":1E0}\n'
    assert for_prefill(raw, "id") == b' {"kv_transfer_params":{"transfer_id": "id"},' + raw[2:]
