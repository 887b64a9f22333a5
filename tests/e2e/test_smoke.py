"""The main promise: a request is prefilled by one engine and decoded by another."""

from disagg_sim import expected_text


async def test_a_completion(machine, pair) -> None:
    status, _headers, body = await machine.post(
        "/v1/completions", {"model": "sim-model", "prompt": "San Francisco is a", "max_tokens": 8}
    )
    assert status == 200, body
    assert body["choices"][0]["text"] == expected_text("San Francisco is a", 8)
